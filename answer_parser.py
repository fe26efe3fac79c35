"""Read a generated answer as a score."""

import math
import re

# ---- answers --------------------------------------------------------------------------------------------------------
# words, all in lower case

YES = set("yes yep yeah true correct right accurate valid".split())
YES |= set("violates violate violated violating violation violations".split())
NO = set("no nope false incorrect wrong untrue inaccurate invalid complies comply compliant".split())
ALONE = dict.fromkeys("ja oui sí sì si sim да はい 是 是的 y t".split(), True)  # where they stand alone
ALONE |= dict.fromkeys("nein non não нет いいえ 否 不是 n f".split(), False)
ALONE |= dict.fromkeys(("it does", "it is", "i think so"), True)
ALONE |= dict.fromkeys(("it doesn't", "it isn't", "i don't think so", "not really", "of course not"), False)
ALONE |= {f"{word} not": False for word in ("it does", "it is", "absolutely", "definitely", "certainly", "probably")}
NOT = set("not never cannot cant without nothing none hardly neither unlikely fails fail failed doubt non".split())
NOT |= set("isnt doesnt dont wasnt arent didnt aint".split())  # and all that end with n't; of "no" see _negations
STOPS = set("but and because since as so although though while".split())  # no negation reaches over them
PRONOUNS = set("it it's its this that that's the he she they there there's i i'm we you".split())
HALF = set("may might could should potentially partially partly mostly almost nearly somewhat".split())
SUPPOSED = set("if whether unless check checking verify verifying determine determining".split())  # not said yet, or
SUPPOSED |= set("step steps line part far".split())  # not of the whole
OF_RULES = set("rule rules policy policies guideline guidelines terms it them no".split())  # what a post violates
GOES_ON = STOPS | set("or nor in for with by at on if when that despite given here overall based due according".split())
GOES_ON |= set("under from is was were are seems looks i we then therefore too indeed also out".split())
GOES_ON |= set("found detected exists occurs present".split())  # what follows a predicate, not the noun of an attribute
SURE = set("chance likely likelihood probability sure certain confident confidence".split())
SCORING = SURE | set("say score rate rated rating give assign estimate guess".split())
SCORING |= set("about around approximately roughly".split())

COUNTS = {word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())}
TENS = "twenty thirty forty fifty sixty seventy eighty ninety hundred".split()
COUNTS |= {word: f"{i}0" for i, word in enumerate(TENS, 2)}
PARTS = dict(half=2, halves=2, third=3, thirds=3, quarter=4, quarters=4, fourths=4, fifth=5, fifths=5, tenths=10)
COUNT = "|".join(COUNTS)
SPELLED = re.compile(  # "zero point eight", "three quarters", "four" before "out of" or a percentage, "five" after
    rf"\b(?:(?:({COUNT}) )?point((?: (?:{COUNT}))+)|({COUNT}|an?) ({'|'.join(PARTS)})"
    rf"|({COUNT})(?= out of\b| percent\b| per cent\b)|(?<=out of )({COUNT}))\b"
)
DIGITS = r"[-+]?(?:[0-9]+(?:[.,][0-9]+)*(?:e[-+]?[0-9]+)?|[.,][0-9]+)"
NUMBER = re.compile(
    rf"(?<![\w.,/%])({DIGITS})(?: ?(?:(%|percent\b|per cent\b)|(?:/|out of|in) ?({DIGITS})))?(?![\w/]|[.,][0-9])"
)
THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
TOKEN = re.compile(rf"{WORD.pattern}|[0-9]+(?:[.,][0-9]+)*|[^\w\s'-]")  # a word, a number, a mark that ends a clause

WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}  # full-width forms; unicodedata takes quadratic time
WIDE |= str.maketrans({"。": ". ", "’": "'", "−": "-", "–": "-", "—": " - ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
OUR_RULES = r"(?:the |this |that |these |any |its |no )?(?:subreddit's |community )?rules?\b"
ADJECTIVES = "correct|incorrect|right|wrong|true|false|valid|invalid|accurate|inaccurate"
REWRITES = [(re.compile(pattern), new) for pattern, new in (
    (r"\\[dt]?frac ?\{ ?([0-9.]{1,9}) ?\} ?\{ ?([0-9.]{1,9}) ?\}", r" \1/\2"),
    (r"\\f?boxed ?\{([^{}]{0,99}(?:\{[^{}]{0,99}\}[^{}]{0,99})?)\}", r"\nfinal answer: \1\n"),
    (r"```\w*|<\|?/?[\w ]{1,30}\|?>", "\n"),  # fences and tags
    (r"\\[a-z]+|[*_`\"“”„«»‘$#~|\\{}\[\]]", " "),  # markup and quotes
    (r"(?m)^(?:[^\w\n.,+-]|[-+][ \t]+|[0-9]{1,2}[.)][ \t]+(?=\S))+", ""),  # bullets, numbers of a list, emoji
    (r"\b(?:true|yes) ?(?:/|or) ?(?:false|no)(?=[ )]{0,3}[:?])", "choice"),  # the prompt's, and its scale
    (r"(?<![\w.,])(?:from |between )?[01](?:\.0+)? ?(?:to|and|-) ?10{0,2}(?:\.0+)?(?![\w%/]|[.,][0-9])", "scale"),
    (r"\b([0-9]{1,3}) ?(?:-|to) ?([0-9]{1,3} ?%)", r"\1% \2"),
    (rf"\b100 ?% (?=(?:not )?(?:{ADJECTIVES})\b)", ""),
    (r"\bconfidence(?: level)? ?[:=] ?[0-9.,]+ ?%?", "confidence"),  # in the answer, whichever it is
    (r"\b(rule|step|example|question|part|line|equation|case) ?#? ?[0-9]+(?![\w%/]|[.,][0-9])", r"\1"),
    (r"\b(?:i\.e|e\.g)\.", ","),
    (r"\b(?:no doubt|without (?:a |any )?doubt|not (?:only|just))\b", ""),
    (r"\bi(?: would|'d)\b", "i"),
    (r"\b(?:far from|anything but)\b", "not"),
    (r"\b(?:0|zero) (?=violations?\b)", "no "),
    (r"\b(?:false|wrong|incorrect|untrue) (?=that\b)", "not "),
    (r"\b(?:true|correct|right) (?=that\b)", ""),
    (rf"\b(?:break(?:s|ing)?|broke|against) (?={OUR_RULES})", "violates "),
    (r"\bviolat(?:es?|ed|ing) (?:nothing\b|none of |no (?=rules?\b|polic|guideline))", "complies with "),
    (rf"\b(?:follow|obey|respect)(?:s|ing)? (?={OUR_RULES})|\badher(?:es?|ing) to (?={OUR_RULES})", "complies with "),
    (rf"\b(this|that|it|solution|answer)('s| is| was| isn't| wasn't)( not|) (?:an?|the) ({ADJECTIVES})"
     r" (?:solution|answer|statement|claim)\b", r"\1\2\3 \4"),
    (r" -+ ", " , "),
)]  # fmt: skip
CERTAIN = re.compile(r"[0-9]%? (?:sure|certain|confident)\b")
NOTHING = re.compile(r"(?:if|unless|suppose|assume|let|let's|to be|step|line|part)\b")  # a sentence that begins so
NEXT = re.compile(r"\n[ \t]*(?:question|proposed solution|subreddit|rule|post|user|human) ?:")  # a new question
LEADS = re.compile(r"\b(?:is|it's|be|an?|of|so|with|as|gets?) $")
SENTENCES = re.compile(r"\n+|(?<=[.!?])\s+")
FINAL = re.compile(
    r"\b(?:answer|verdict|score|rating|probability|likelihood|label|conclusion|decision|judge?ment|classification|"
    r"prediction|assessment)\b(?:(?! is )[^:=]){0,40}?:|\bscore ?=|"
    r"\bfinal (?:answer|verdict|score|decision|judge?ment) (?:is\b|=)|"
    r"^(?:is |rule )?(?:correct|violation|violates|violated)(?: rule)? ?[:=]"
)
OTHERS = re.compile(  # a final answer that is not the model's own
    r"\b(?:correct|right|expected|actual|given|reference|his|her|their|[a-z]{1,20}'s) (?:final )?$"
)
REFUSAL = re.compile(
    r"\bas an? (?:ai|artificial|(?:large )?language model)\b|\b(?:can't|cannot|can not|couldn't|could not|won't|"
    r"will not|unable to|not able to|impossible to|refuse to|decline to) (?:\w+ ){0,2}(?:determined?|decided?|judge|"
    r"say|tell|answer|help|assist|provide|verify|assess|evaluate|comply|rate)\b"
)
UNSURE = re.compile(
    r"\b(?:maybe|perhaps|possibly|borderline|unsure|uncertain|unclear|undecided|inconclusive|undetermined|dunno|"
    r"no idea|not enough|insufficient|n/a|either way|(?:it|that) depends|depends on|(?:hard|difficult) to (?:say|tell|"
    r"judge))\b|(?:\bnot|n't) (?:[\w%]+ ){0,2}(?:sure|certain|clear|know|confident)\b"
)


def parse_answer(text: str, words: tuple[str, ...]) -> tuple[float | None, str]:
    """What a generated answer says: (score from 0 to 1 of the second class, or None for a malformed one; how it says).

    words: the two classes', the negative first, aliases apart by "|"; () for numbers alone. Where one of them is a yes
    or a no, the other words of YES and NO speak too, and as a whole sentence those of ALONE. What follows a first line
    that answers and a new question is another answer. Stages, of which the first that finds something decides:

    1. the last explicit final answer ("Answer: ...", "final answer is", a box): "final line"; one out of range leaves
       words to the other stages;
    2. sentences that are an answer and no more: "word", "number", "percent", "fraction"; whatever is around them;
    3. refusals and hedges: "refusal", "unsure";
    4. words and numbers within the first and the last sentence (or all of three): "word", "number in text", "percent",
       "fraction". A negation turns the words after it in its clause around ("never wrong" is right); an adjective
       before a noun ("the correct total") and what stands after "if" say nothing; a number before a noun is a count.
       A number and a word must agree ("90% sure it is wrong" is "ambiguous").

    None otherwise: "empty", "ambiguous" (contradictions, several numbers), "out of range", "none". Reasoning in
    <think> counts for nothing, questions neither. Time is linear in the text. Raises ValueError for one word or three.
    """
    if len(words) not in (0, 2):
        raise ValueError(f"words: got {words}, expected those of two classes")
    *_, text = re.split(r"</think(?:ing)?>", text.translate(WIDE).lower())
    if re.search(r"<think(?:ing)?>", text):
        return None, "none"
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text, sides = SPELLED.sub(_digits, text), _sides(words)
    score, how, first = None, "empty", _sentences(NEXT.split(text, maxsplit=1)[0])
    for sentences in (first if len(first) == 1 else [], _sentences(text)):
        if sentences and score is None:
            score, how = _final(sentences, sides)
            if how in ("none", "out of range"):
                said = _read(sentences, sides)
                score, how = said if how == "none" or said[1] == "word" else (score, how)
    return score, how


def _sentences(text: str) -> list[str]:
    """Its lines and sentences that say something, white space collapsed."""
    return [" ".join(part.split()) for part in SENTENCES.split(text) if re.search(r"\w", part)]


def _digits(match: re.Match) -> str:
    """A number in words, as SPELLED finds it, in digits."""
    whole, decimals, over, part, left, right = match.groups()
    if decimals:
        return f"{COUNTS[whole or 'zero']}.{''.join(COUNTS[word] for word in decimals.split())}"
    return f"{COUNTS.get(over, '1')}/{PARTS[part]}" if part else COUNTS[left or right]


def _sides(words: tuple[str, ...]) -> dict[str, int]:
    """The class that each word speaks for; English and foreign words where the classes' own are a yes and a no."""
    own = {" ".join(alias.lower().replace("_", " ").split()): c for c, w in enumerate(words) for alias in w.split("|")}
    own.pop("", None)
    general = {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False), **ALONE}
    yes = {c if general[word] else 1 - c for word, c in own.items() if word in general}
    return {word: min(yes) if side else 1 - min(yes) for word, side in general.items() if len(yes) == 1} | own


def _final(sentences: list[str], sides: dict[str, int]) -> tuple[float | None, str]:
    """Stage 1: the last explicit final answer that says something, in the next sentence where its own is over.

    One out of range is the question's own ("Answer: 18") where a word stands before it.
    """
    wild = False
    for i in reversed(range(len(sentences))):
        text, found = sentences[i], set()
        marks = [m for m in FINAL.finditer(text) if not OTHERS.search(text, max(0, m.start() - 24), m.start())]
        for mark, end in zip(marks, [*(m.start() for m in marks), len(text)][1:], strict=True):
            said = text[mark.end() : end]
            if not re.search(r"\w", said) and end == len(text) and i + 1 < len(sentences):
                said = sentences[i + 1]
            found.add(_read([said.strip()], sides, final=True))
        found = {(score, how) for score, how in found if how != "none"}
        if len({score for score, _ in found}) > 1:
            return None, "ambiguous"
        if found:
            score, how = min(found)
            if how != "out of range" and (how == "word" or not wild):
                return score, "final line" if score is not None else how
            wild = True
    return None, "out of range" if wild else "none"


def _read(sentences: list[str], sides: dict[str, int], final: bool = False) -> tuple[float | None, str]:
    """Stages 2 to 4. final: all that it says is the answer, so that each number counts."""
    told = [s for s in sentences if not s.rstrip(" )'").endswith("?")]
    alone = [_alone(s, sides, number=i in (0, len(told) - 1)) for i, s in enumerate(told)]
    seen = [n for _, n in alone if n]
    score, how = _decide({side for side, _ in alone if side is not None}, seen)
    if how != "none":
        return score, how
    if len(sentences) > 3:
        sentences = [sentences[0], sentences[-1]]
    for pattern, how in ((REFUSAL, "refusal"), (UNSURE, "unsure")):
        if any(pattern.search(s) for s in sentences):
            return None, how
    told = [s for s in sentences if s in told]
    said = {side for s in told for side in _said(s, sides)}
    numbers = [n for s in told if said or not CERTAIN.search(s) for n in _numbers(s, sides, final)]
    score, how = _decide(said, numbers, sure=any(SURE & set(WORD.findall(s)) for s in told))
    if how == "none":
        seen = {*seen, *(_number(m) for s in told for m in NUMBER.finditer(s))}
        how = "ambiguous" if len(seen) > 1 else "out of range" if (None, "out of range") in seen else "none"
    return score, "number in text" if how == "number" else how


def _alone(sentence: str, sides: dict[str, int], number: bool) -> tuple[int | None, tuple[float | None, str] | None]:
    """Stage 2, of a sentence that is an answer and no more: (its side or None, its number or None)."""
    words, found = WORD.findall(sentence), NUMBER.search(sentence)
    key = sentence.strip(" .,;:!()'") if re.search("[0-9]", sentence) else " ".join(words)
    if key in sides:
        return sides[key], None
    if number and found and not re.search(r"\w", sentence[: found.start()] + sentence[found.end() :]):
        return None, _number(found)
    if number and key in COUNTS:
        return None, _number(NUMBER.match(COUNTS[key]))
    return None, (None, "out of range") if key in ("nan", "inf", "infinity") else None


def _number(match: re.Match) -> tuple[float | None, str]:
    """The value of a match of NUMBER, or None, and its form or what is wrong with it."""

    def value(digits: str) -> float:
        digits = digits.replace(",", "" if THOUSANDS.fullmatch(digits) else ".")
        return float(digits) if digits.count(".") < 2 else math.nan

    digits, percent, top = match.groups()
    if match[0] in ("50/50", "50 / 50"):
        return None, "unsure"
    scale = value(top) if top else 100 if percent else 1
    score = value(digits) / scale if scale > 0 else math.inf
    if not 0 <= score <= 1:
        return None, "none" if math.isnan(score) else "out of range"
    return abs(score), "percent" if percent else "fraction" if top else "number"


def _numbers(sentence: str, sides: dict[str, int], final: bool) -> list[tuple[float | None, str]]:
    """Stage 4: the numbers of a sentence that may be scores, as `_number` gives them.

    Not those before a noun. All others of a sentence that speaks of scores, begins with one, or says nothing else;
    elsewhere decimals after words such as "is", and a share of a word ("50% correct").
    """
    words, first, found = set(WORD.findall(sentence)), WORD.search(sentence), []
    no_nouns = GOES_ON | SCORING | {"to"} | sides.keys()
    scoring = final or bool(SCORING & words) or words <= no_nouns
    for match in NUMBER.finditer(sentence):
        before, rest = sentence[max(0, match.start() - 8) : match.start()], sentence[match.end() : match.end() + 40]
        word = re.match(r" ([^\W\d_]+)", rest)
        if word and word[1] not in no_nouns:
            continue
        score, how = _number(match)
        exact = how != "number" or re.search("[.,]", match[1]) or rest.startswith((",", " (", " because", " since"))
        scoring |= bool(exact) and (first is None or match.start() < first.start())
        if scoring or (exact and LEADS.search(before)) or (how != "number" and word and word[1] in sides):
            found.append((score, how))
    return found


def _said(sentence: str, sides: dict[str, int]) -> set[int | None]:
    """Stage 4: the classes that a sentence's words speak for, None for a half-hearted one."""
    tokens, found = TOKEN.findall(sentence), set()
    if NOTHING.match(sentence) or {"if", "would"} <= set(tokens):
        return found
    for i, token in enumerate(tokens):
        if token in sides and (len(token) > 1 or not token.isascii()):
            before = _clause(tokens[max(0, i - 8) : i][::-1])[::-1]
            after = _clause(tokens[i + 1 : i + 7])
            if _counts(token, i == 0, before, after):
                turned = _negations([*before, token]) % 2
                found.add(None if HALF & set(before[-3:]) else sides[token] ^ turned)
    return found


def _clause(tokens: list[str]) -> list[str]:
    """The words before the first mark."""
    end = next((i for i, token in enumerate(tokens) if not token[0].isalnum()), len(tokens))
    return tokens[:end]


def _counts(token: str, first: bool, before: list[str], after: list[str]) -> bool:
    """Whether a word of a side is said of the whole: no attribute of a noun, no supposition, no "no" of a noun."""
    goes_on = not after or after[0] in GOES_ON
    if SUPPOSED & set(before):
        return False
    if token in ALONE:
        return first and not after
    if token == "no":
        return goes_on or after[0] in PRONOUNS
    if token.startswith("violat"):
        return goes_on or bool(OF_RULES & set(after))
    if token in ("true", "false") and first:
        return True
    return goes_on or token not in YES | NO or token in ("yes", "yep", "yeah", "nope")


def _negations(words: list[str]) -> int:
    """How many words negate the last one: those after the last conjunction."""
    start = max((i + 1 for i, word in enumerate(words) if word in STOPS), default=0)
    pairs = zip(words[start:], words[start + 1 :], strict=False)
    return sum(
        word in NOT or word.endswith("n't") or (word == "no" and after not in PRONOUNS | GOES_ON)
        for word, after in pairs
    )


def _decide(sides: set[int | None], numbers: list, sure: bool = False) -> tuple[float | None, str]:
    """(score, how) of the sides that words speak for and of numbers. sure: the numbers say how sure the words are."""
    scores = {round(score, 9): (score, how) for score, how in reversed(numbers) if score is not None}
    if None in sides or (None, "unsure") in numbers:
        return None, "unsure"
    if len(sides) > 1 or len(scores) > 1 or (scores and any(score is None for score, _ in numbers)):
        return None, "ambiguous"
    if not sides or not scores:
        return next(iter(scores.values()), (float(min(sides)), "word") if sides else (None, "none"))
    ((score, how),), (side,) = scores.values(), sides
    agree = side == 1 if sure else score >= 0.5 if side else score <= 0.5
    return (score, how) if agree else (None, "ambiguous")
