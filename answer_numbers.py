"""Numbers in a generated answer: digits and words, fractions and percentages; and what they are the probability of."""

import math
import re
from collections.abc import Callable
from functools import partial

Reading = tuple[float | None, str]  # the score of the second class, and the form it has or what is wrong with it

# ---- numbers --------------------------------------------------------------------------------------------------------

COUNTS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred".split()
COUNTS |= {word: f"{i}0" for i, word in enumerate(TENS, 2)}
PARTS = "half:2 halves:2 third:3 thirds:3 quarter:4 quarters:4 fourths:4 fifth:5 fifths:5 tenth:10 tenths:10"
PARTS = dict(part.split(":") for part in PARTS.split())
COUNT = "|".join(COUNTS)
SPELLED = re.compile(
    rf"\b(?:(?:({COUNT}) )?point((?: (?:{COUNT}))+)"  # zero point eight
    rf"|({COUNT}|an?) ({'|'.join(PARTS)})"  # three quarters
    rf"|({COUNT})(?= out of\b| percent\b| per cent\b)"  # four, before "out of" or a percentage
    rf"|(?<=out of )({COUNT}))\b"  # five, after "out of"
)
DIGITS = r"[-+]?(?:[0-9]+(?:[.,][0-9]+)*(?:e[-+]?[0-9]+)?|[.,][0-9]+)"
NUMBER = re.compile(  # 0.8, 80%, 4/5, 4 out of 5
    rf"(?<![\w.,/%])({DIGITS})(?: ?(?:(%|percent\b|per cent\b)|(?:/|out of|in) ?({DIGITS})))?(?![\w/]|[.,][0-9])"
)
THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")  # 1,000.5


def digits_of(match: re.Match) -> str:
    """A number in words, as SPELLED finds it, in digits."""
    whole, decimals, over, part, left, right = match.groups()
    if decimals:
        digits = "".join(COUNTS[word] for word in decimals.split())
        return f"{COUNTS[whole or 'zero']}.{digits}"
    if part:
        return f"{COUNTS.get(over, '1')}/{PARTS[part]}"
    return COUNTS[left or right]


def value_of(digits: str) -> float:
    """1,000 is a thousand, 0,5 a half; nan for what is neither."""
    digits = digits.replace(",", "" if THOUSANDS.fullmatch(digits) else ".")
    return float(digits) if digits.count(".") < 2 else math.nan


def read_number(match: re.Match) -> Reading:
    """The value of a match of NUMBER, or None, and its form or what is wrong with it."""
    if match[0] in ("50/50", "50 / 50"):
        return None, "unsure"
    digits, percent, whole = match.groups()
    scale, form = 1.0, "number"
    if whole:
        scale, form = value_of(whole), "fraction"
    if percent:
        scale, form = 100.0, "percent"
    score = value_of(digits) / scale if scale > 0 else math.inf
    if math.isnan(score):
        return None, "none"
    if not 0 <= score <= 1:
        return None, "out of range"
    return abs(score), form  # of -0


# ---- stated probabilities -------------------------------------------------------------------------------------------

EQUALS = r"(?:\s?(?::=|==|[-=]>|[:=≈→⇒]|equals\b|is\b|of\b|at\b))?(?: (?:about|around|only|just))?\s?"
# One number, with no range or calculation behind it.
SHORT = r"[-+]?(?:[0-9]{1,6}(?:[.,][0-9]{1,25})?(?:e[-+]?[0-9]{1,3})?|[.,][0-9]{1,25})"
AMOUNT = rf"(?<![\w.,/%])(?P<number>{SHORT}(?: ?(?:%|percent\b|per cent\b|(?:/|out of|in) ?{SHORT}))?)"
AMOUNT += r"(?![\w/]|[.,][0-9]| ?(?:[-+×±=<>≤≥]|to\b|or\b)? ?[0-9])"
LABEL = r"(?P<of>[^\W\d](?:[^\W\d]|'){0,30}(?: (?:[^\W\d]|'){1,30})?)"
CLAUSE = r"(?P<of>(?:[\w']{1,20} ){0,8}?[\w']{1,20})"
SPELLED_OUT = r"(?:prob|probability|likelihood|chance|score)"
NOTATION = rf"(?<!/)\b(?:p|pr|conf|confidence|{SPELLED_OUT})"
LOW = (
    r"(?:very |quite |highly |extremely )?(?:low|small|slim|negligible|minimal|unlikely|improbable|(?:close to|near) 0)"
)
LOW += r"\b(?! to\b| that\b)"

# How a probability is stated of a class. Where the number is missing or is none, the answer is unsure.
STATED = [
    rf"{NOTATION} ?\((?P<of>[^()\n]{{1,80}})\)(?:{EQUALS}{AMOUNT})?",  # P(Yes) = 0.1
    rf"\bp(?:r|rob)? ?[:=≈] ?{AMOUNT} ?\((?P<of>[^()\n]{{1,80}})\)",  # p = 0.1 (violation)
    rf"\b{LABEL} {SPELLED_OUT}{EQUALS}{AMOUNT}",  # yes probability: 0.1
    rf"\bprob {LABEL}{EQUALS}{AMOUNT}",
    r"\bodds ?\((?P<of>[^()\n]{1,80})\)(?P<number>)",
    rf"\b{SPELLED_OUT} (?:of|that|for|in) {CLAUSE} (?:is )?{LOW}(?P<number>)",
    rf"\b{LABEL} ?(?:is|seems|looks|appears|[:=]) {LOW}(?P<number>)",
]
# Those whose numbers are read as any others where they are of the second class.
OF_FIRST = re.compile(rf"\b{SPELLED_OUT} (?:of|that|for|in) {CLAUSE}{EQUALS}{AMOUNT}")  # probability of no: 0.9
# "No: 90%" is of "No", but "No: 10%" may be of either class, unless both are given.
LABELLED = [
    rf"(?m)(?:^|(?<=[,;(])) ?{LABEL} ?[:=→]? ?{AMOUNT}(?= ?(?:$|[,;.)]))",
    rf"{AMOUNT} ?(?:for )?\(?{LABEL}\)?(?= ?(?:[\n,;.]|$))",
]
STATED, LABELLED = (list(map(re.compile, forms)) for forms in (STATED, LABELLED))
BARE = re.compile(rf"\bp(?:r|rob)? ?[:=≈] ?(?={AMOUNT})")


def state_scores(text: str, side_of: Callable[[str], int | None]) -> str:
    """The text with each probability of a class in a line "probability: SCORE", of the second class, or "unsure".

    side_of: the class that words speak for, or None. The word in "P(Yes) = 0.1" would be read as the answer.
    """
    text = re.sub(r"[ \t]+", " ", text)
    scores = []

    def line(match, of_first=False, both=True):
        side = side_of(match["of"].rpartition("=")[2].strip())
        amount = NUMBER.fullmatch(match["number"] or "")
        share = read_number(amount)[0] if amount else None
        if side is None or (side and of_first) or (share is None and not both):
            return match[0]
        if share is None or (share < 0.5 and not both):
            return "\nprobability: unsure\n"
        scores.append(share if side else 1 - share)
        return f"\nprobability: {scores[-1]:.9g}\n"

    for form in STATED:
        text = form.sub(line, text)
    text = OF_FIRST.sub(partial(line, of_first=True), text)
    for form in LABELLED:
        both = {side_of(match["of"]) for match in form.finditer(text)} >= {0, 1}
        text = form.sub(partial(line, of_first=not both, both=both), text)
    if scores and max(scores) - min(scores) > 0.02:
        text += "\nprobability: unsure"
    return BARE.sub("", text)
