"""Read a generated answer as a score of two classes."""

import re
from functools import partial
from itertools import chain, takewhile

from answer_numbers import COUNTS, NUMBER, SPELLED, Reading, digits_of, read_number, state_scores

# ---- words, all in lower case ---------------------------------------------------------------------------------------

# What says yes and what says no anywhere in a sentence.
YES = set("yes yep yeah true correct right accurate valid".split())
YES |= set("violates violate violated violating violation violations".split())
NO = set("no nope false incorrect wrong untrue inaccurate invalid complies comply compliant compliance".split())

# What says so only as a whole sentence.
ALONE = dict.fromkeys("ja,oui,sí,sì,si,sim,да,はい,是,是的,y,t,it does,it is,i think so".split(","), True)
ALONE |= dict.fromkeys("nein,non,não,нет,いいえ,否,不是,n,f,it doesn't,it isn't,i don't think so".split(","), False)
ALONE |= {f"{word} not": False for word in "it does,it is,absolutely,definitely,certainly,probably".split(",")}
ALONE |= {"not really": False, "of course not": False}

# What negates the words after it (so do all that end with n't, and some "no"), and what no negation reaches over.
NOT = set("not never cannot cant without nothing none hardly neither unlikely fails fail failed doubt non".split())
NOT |= set("isnt doesnt dont wasnt arent didnt aint".split())
STOPS = set("but and because since as so although though while".split())
# After these a "no" is an answer, not the "no" of a noun.
PRONOUNS = set("it it's its this that that's the he she they there there's i i'm we you".split())

# What makes a word after it half-hearted; what makes it a supposition, or only about a part.
HALF = set("may might could should potentially partially partly mostly almost nearly somewhat".split())
SUPPOSED = set("if whether unless check checking verify verifying determine determining".split())
SUPPOSED |= set("step steps line part far".split())
# What a post violates, where "violates" is an answer.
OF_RULES = set("rule rules policy policies guideline guidelines terms it them no".split())
# What may follow a predicate ("correct because"), unlike an attribute's noun ("the correct total").
GOES_ON = STOPS | set("or nor in for with by at on if when that despite given here overall based due according".split())
GOES_ON |= set("under from is was were are seems looks i we then therefore too indeed also out".split())
GOES_ON |= set("found detected exists occurs present".split())

# Words with a number that says how sure the answer is, and with one that is a score.
SURE = set("chance likely likelihood probability sure certain confident confidence".split())
SCORING = SURE | set("say score rate rated rating give assign estimate guess".split())
SCORING |= set("about around approximately roughly".split())

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
TOKEN = re.compile(rf"{WORD.pattern}|[0-9]+(?:[.,][0-9]+)*|[^\w\s'-]")  # a word, a number, a mark that ends a clause
SENTENCES = re.compile(r"\n+|(?<=[.!?])\s+")

# Full-width forms and typographic marks: unicodedata.normalize would take quadratic time.
WIDE = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
WIDE |= str.maketrans(
    {"ℙ": "p", "。": ". ", "’": "'", "−": "-", "–": "-", "—": " - ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"}
)

OUR_RULES = r"(?:the |this |that |these |any |its |no )?(?:subreddit's |community )?rules?\b"
ADJECTIVES = "correct|incorrect|right|wrong|true|false|valid|invalid|accurate|inaccurate"

# Texts are rewritten row by row: (pattern, what stands for it).
REWRITES = [
    # Pr[yes], p_yes and P(yes | post) are P(yes); of "1 - P(yes)" nobody knows.
    (r"\\(?:text|math|operatorname)[a-z]{0,9} ?\{([^{}\n]{0,60})\}|\\(pr)\b", r"\1\2"),
    (r"\b(p|pr|prob)_\{?([a-z_]{1,40})\}?", r"\1(\2)"),
    (r"\b(p|pr|prob|probability) ?[\[{]([^\[\]{}\n]{1,60})[\]}]", r"\1(\2)"),
    (r"(\b(?:p|pr|prob|probability) ?\([^()|\n]{1,60})\|[^()\n]{0,60}\)", r"\1)"),
    (r"(\b(?:p|pr|prob|probability) ?\( ?)[~¬!]", r"\1not "),
    (r"\b1(?:\.0)? ?- ?(?:p|pr|prob|probability) ?\(", "odds("),
    # LaTeX fractions are numbers, and a box holds the final answer.
    (r"\\[dt]?frac ?\{ ?([0-9.]{1,9}) ?\} ?\{ ?([0-9.]{1,9}) ?\}", r" \1/\2"),
    (r"\\f?boxed ?\{([^{}]{0,99}(?:\{[^{}]{0,99}\}[^{}]{0,99})?)\}", r"\nfinal answer: \1\n"),
    # Fences and tags are line breaks; other markup and quotes are spaces.
    (r"```\w*|<\|?/?[\w ]{1,30}\|?>", "\n"),
    (r"\\[a-z]+|[*_`\"“”„«»‘$#~|\\{}\[\]]", " "),
    # A line begins with its words: without bullets, the numbers of a list, emoji.
    (r"(?m)^(?:[^\w\n.,+-]|[-+][ \t]+|[0-9]{1,2}[.)][ \t]+(?=\S))+", ""),
    # The prompt's own choice ("True or False:") and its scale ("from 0 to 1") answer nothing.
    (r"\b(?:true|yes) ?(?:/|or) ?(?:false|no)(?=[ )]{0,3}[:?])", "choice"),
    (r"(?<![\w.,])(?:from |between )?[01](?:\.0+)? ?(?:to|and|-) ?10{0,2}(?:\.0+)?(?![\w%/]|[.,][0-9])", "scale"),
    # 70-80% is two percentages; "100% correct" is correct.
    (r"\b([0-9]{1,3}) ?(?:-|to) ?([0-9]{1,3} ?%)", r"\1% \2"),
    (rf"\b100 ?% (?=(?:not )?(?:{ADJECTIVES})\b)", ""),
    # "Confidence: 90%" is about the answer, whichever it is.
    (r"\bconfidence(?: level)? ?[:=] ?(?:0?[.,][0-4][0-9]*|[0-4]?[0-9] ?%|low\b)", "\nprobability: unsure\n"),
    (r"\bconfidence(?: level)? ?[:=] ?[0-9.,]+ ?%?", "confidence"),
    # "Step 2" is no number.
    (r"\b(rule|step|example|question|part|line|equation|case) ?#? ?[0-9]+(?![\w%/]|[.,][0-9])", r"\1"),
    # The dots of "i.e." end no sentence.
    (r"\b(?:i\.e|e\.g)\.", ","),
    # Two rows that look like negations and are none, and four that decide what negates ("it is false that ...").
    (r"\b(?:no doubt|without (?:a |any )?doubt|not (?:only|just))\b", ""),
    (r"\bi(?: would|'d)\b", "i"),
    (r"\b(?:far from|anything but)\b", "not"),
    (r"\b(?:0|zero) (?=violations?\b)", "no "),
    (r"\b(?:false|wrong|incorrect|untrue) (?=that\b)", "not "),
    (r"\b(?:true|correct|right) (?=that\b)", ""),
    # Other words for violating a rule and for keeping to it.
    (rf"\b(?:break(?:s|ing)?|broke|against) (?={OUR_RULES})", "violates "),
    (r"\bviolat(?:es?|ed|ing) (?:nothing\b|none of |no (?=rules?\b|polic|guideline))", "complies with "),
    (rf"\b(?:follow|obey|respect)(?:s|ing)? (?={OUR_RULES})|\badher(?:es?|ing) to (?={OUR_RULES})", "complies with "),
    # "This is a correct solution" says that this is correct.
    (
        rf"\b(this|that|it|solution|answer)('s| is| was| isn't| wasn't)( not|) (?:an?|the) ({ADJECTIVES})"
        r" (?:solution|answer|statement|claim)\b",
        r"\1\2\3 \4",
    ),
    # A dash between words ends a clause.
    (r" -+ ", " , "),
]
REWRITES = [(re.compile(pattern), new) for pattern, new in REWRITES]

# A new question, after which a model answers that one.
NEXT = re.compile(r"\n[ \t]*(?:question|proposed solution|subreddit|rule|post|user|human) ?:")
# What introduces the final answer.
FINAL = re.compile(
    r"\b(?:answer|verdict|score|rating|probability|likelihood|label|conclusion|decision|judge?ment|classification|"
    r"prediction|assessment)\b(?:(?! is )[^:=]){0,40}?:|\bscore ?=|"
    r"\bfinal (?:answer|verdict|score|decision|judge?ment) (?:is\b|=)|"
    r"^(?:is |rule )?(?:correct|violation|violates|violated)(?: rule)? ?[:=]"
)
# Before it: a final answer that is not the model's own.
OTHERS = re.compile(r"\b(?:correct|right|expected|actual|given|reference|his|her|their|[a-z]{1,20}'s) (?:final )?$")
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
NOTHING = re.compile(r"(?:if|unless|suppose|assume|let|let's|to be|step|line|part)\b")  # begins what decides nothing
CERTAIN = re.compile(r"[0-9]%? (?:sure|certain|confident)\b")  # a number that needs words beside it
LEADS = re.compile(r"\b(?:is|it's|be|an?|of|so|with|as|gets?) $")  # before a number that is a score


# ---- stages ---------------------------------------------------------------------------------------------------------
# In all of them, sides are {word: the class that it speaks for}.


def parse_answer(text: str, words: tuple[str, ...]) -> Reading:
    """What a generated answer says: (score from 0 to 1 of the second class, or None for a malformed one; its form).

    words: verbalizers of the two classes, the negative first, aliases separated by "|"; () for numbers alone. Where
    one of them is a yes or a no, the other words of YES and NO count too, and as a whole sentence those of ALONE. What
    follows a first line that answers and a new question is another answer. The first stage that finds something
    decides:

    1. the last explicit final answer ("Answer: ...", "final answer is", a box): "final line"; one out of range leaves
       words to the other stages;
    2. sentences that are an answer and no more: "word", "number", "percent", "fraction"; whatever is around them;
    3. refusals and hedges: "refusal", "unsure";
    4. words and numbers within the first and the last sentence (or all of three): "word", "number in text", "percent",
       "fraction". A negation turns the words after it in its clause around ("never wrong" is right); an adjective
       before a noun ("the correct total") and what follows "if" say nothing; a number before a noun is a count.
       A number and a word must agree ("90% sure it is wrong" is "ambiguous").

    None otherwise: "empty", "ambiguous" (contradictions, several numbers), "out of range", "none". Reasoning in
    <think> and questions count for nothing. Time is linear in the text. Raises ValueError for one word or three.
    """
    if len(words) not in (0, 2):
        raise ValueError(f"words: got {words}, expected those of two classes")
    text = re.split(r"</think(?:ing)?>", text.translate(WIDE).lower())[-1]
    if re.search(r"<think(?:ing)?>", text):  # reasoning that was cut off before it ended
        return None, "none"
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    text = SPELLED.sub(digits_of, text)
    sides = _sides(words)
    text = state_scores(text, partial(_side_of, sides))

    # A first line that answers stands alone; a model may have continued with another question and its answer.
    before_next = _sentences(NEXT.split(text, maxsplit=1)[0])
    if len(before_next) == 1:
        score, form = _answer(before_next, sides)
        if score is not None:
            return score, form
    sentences = _sentences(text)
    return _answer(sentences, sides) if sentences else (None, "empty")


def _sentences(text):
    """Its lines and sentences that hold a word, white space collapsed."""
    return [" ".join(part.split()) for part in SENTENCES.split(text) if re.search(r"\w", part)]


def _sides(words):
    """The class that each word speaks for; English and foreign words where the classes' own are a yes and a no."""
    own = {}
    for side, aliases in enumerate(words):
        for alias in aliases.split("|"):
            own[" ".join(alias.lower().replace("_", " ").split())] = side
    own.pop("", None)
    general = {**dict.fromkeys(YES, True), **dict.fromkeys(NO, False), **ALONE}
    yes_sides = {int(side == general[word]) for word, side in own.items() if word in general}
    if len(yes_sides) != 1:
        return own
    (yes_side,) = yes_sides
    return {word: int(yes_side == is_yes) for word, is_yes in general.items()} | own


def _answer(sentences, sides):
    """The reading of all stages."""
    score, form = _final(sentences, sides)
    if form == "none":
        return _read(sentences, sides)
    if form == "out of range":
        reading = _read(sentences, sides)
        if reading[1] == "word":
            return reading
    return score, form


def _final(sentences, sides):
    """Stage 1: the last explicit final answer that says something.

    One out of range is the question's own ("Answer: 18") where a word stands before it.
    """
    out_of_range = False
    for i in reversed(range(len(sentences))):
        readings = _final_answers(sentences, i, sides)
        if len({score for score, _ in readings}) > 1:
            return None, "ambiguous"
        if readings:
            score, form = min(readings)
            if form != "out of range" and (form == "word" or not out_of_range):
                return score, "final line" if score is not None else form
            out_of_range = True
    return None, "out of range" if out_of_range else "none"


def _final_answers(sentences, i, sides):
    """What the final answers of one sentence say, each up to the next one, or in the next sentence where it is over."""
    text = sentences[i]
    marks = [m for m in FINAL.finditer(text) if not OTHERS.search(text, max(0, m.start() - 24), m.start())]
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    readings = set()
    for mark, end in zip(marks, ends, strict=False):
        answer = text[mark.end() : end]
        if not re.search(r"\w", answer) and end == len(text) and i + 1 < len(sentences):
            answer = sentences[i + 1]
        reading = _read([answer.strip()], sides, final=True)
        if reading[1] != "none":
            readings.add(reading)
    return readings


def _read(sentences, sides, final=False):
    """Stages 2 to 4. final: the whole text is the answer, so that each number counts."""
    # Stage 2: words anywhere, numbers at the begin and the end.
    statements = [sentence for sentence in sentences if not sentence.rstrip(" )'").endswith("?")]
    ends = (0, len(statements) - 1)
    alone = [_alone(sentence, sides, i in ends) for i, sentence in enumerate(statements)]
    alone_sides = {side for side, _ in alone if side is not None}
    alone_numbers = [number for _, number in alone if number]
    score, form = _decide(alone_sides, alone_numbers)
    if form != "none":
        return score, form

    # Stage 3: of a long text the first and the last sentence.
    if len(sentences) > 3:
        sentences = [sentences[0], sentences[-1]]
    for pattern, form in ((REFUSAL, "refusal"), (UNSURE, "unsure")):
        if any(pattern.search(sentence) for sentence in sentences):
            return None, form

    # Stage 4: words, and numbers that may be scores.
    statements = [sentence for sentence in sentences if sentence in statements]
    spoken = set().union(*(_spoken(sentence, sides) for sentence in statements))
    sure = any(SURE & set(WORD.findall(sentence)) for sentence in statements)
    numbers = []
    for sentence in statements:
        if spoken or not CERTAIN.search(sentence):
            numbers += _numbers(sentence, sides, final)
    score, form = _decide(spoken, numbers, sure)
    if form == "none":
        return None, _why_none(statements, alone_numbers)
    return score, "number in text" if form == "number" else form


def _why_none(statements, alone_numbers):
    """What is wrong with a text that says nothing."""
    matches = chain.from_iterable(map(NUMBER.finditer, statements))
    readings = {*alone_numbers, *map(read_number, matches)}
    if len(readings) > 1:
        return "ambiguous"
    return "out of range" if (None, "out of range") in readings else "none"


def _alone(sentence, sides, at_end):
    """Stage 2, of a sentence that is an answer and no more: (its side or None, its number or None).

    at_end: of the first and the last sentence, whose numbers count.
    """
    key = " ".join(WORD.findall(sentence))
    if re.search("[0-9]", sentence):
        key = sentence.strip(" .,;:!()'")
    if key in sides:
        return sides[key], None
    if at_end:
        match = NUMBER.search(sentence)
        if match and not re.search(r"\w", sentence[: match.start()] + sentence[match.end() :]):
            return None, read_number(match)
        if key in COUNTS:
            return None, read_number(NUMBER.match(COUNTS[key]))
    return None, (None, "out of range") if key in ("nan", "inf", "infinity") else None


def _numbers(sentence, sides, final):
    """Stage 4: the numbers of a sentence that may be scores, as `read_number` gives them.

    Not those before a noun. All others of a sentence that speaks of scores, begins with one, or says nothing else;
    elsewhere decimals after words such as "is", and a share of a word ("50% correct").
    """
    words = set(WORD.findall(sentence))
    first_word = WORD.search(sentence)
    no_nouns = GOES_ON | SCORING | {"to"} | sides.keys()
    scoring = final or bool(SCORING & words) or words <= no_nouns
    readings = []
    for match in NUMBER.finditer(sentence):
        before = sentence[max(0, match.start() - 8) : match.start()]
        after = sentence[match.end() : match.end() + 40]
        word = re.match(r" ([^\W\d_]+)", after)
        if word and word[1] not in no_nouns:
            continue
        score, form = read_number(match)
        of_word = form != "number" and word and word[1] in sides
        exact = form != "number" or re.search("[.,]", match[1]) or after.startswith((",", " (", " because", " since"))
        if exact and (first_word is None or match.start() < first_word.start()):
            scoring = True
        if scoring or of_word or (exact and LEADS.search(before)):
            readings.append((score, form))
    return readings


def _spoken(sentence, sides):
    """Stage 4: the classes that a sentence's words speak for, None for a half-hearted one."""
    tokens = TOKEN.findall(sentence)
    spoken = set()
    if NOTHING.match(sentence) or {"if", "would"} <= set(tokens):
        return spoken
    for i, token in enumerate(tokens):
        if token not in sides or (len(token) == 1 and token.isascii()):
            continue
        before = _clause(tokens[max(0, i - 8) : i][::-1])[::-1]
        after = _clause(tokens[i + 1 : i + 7])
        if not _counts(token, i == 0, before, after):
            continue
        if HALF & set(before[-3:]):
            spoken.add(None)
        else:
            spoken.add(sides[token] ^ _negations([*before, token]) % 2)
    return spoken


def _side_of(sides, label):
    """The class that a few words speak for, or None."""
    spoken = {sides[label]} if label in sides else _spoken(label, sides)
    return min(spoken) if len(spoken) == 1 and None not in spoken else None


def _clause(tokens):
    """The words before the first mark."""
    return list(takewhile(lambda token: token[0].isalnum(), tokens))


def _counts(token, first, before, after):
    """Whether a word of a side is about the whole: no attribute of a noun, no supposition, no "no" of a noun."""
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


def _negations(words):
    """How many words negate the last one: those after the last conjunction."""
    start = max((i + 1 for i, word in enumerate(words) if word in STOPS), default=0)
    count = 0
    for word, after in zip(words[start:], words[start + 1 :], strict=False):
        no_of_noun = word == "no" and after not in PRONOUNS | GOES_ON
        if no_of_noun or word in NOT or word.endswith("n't"):
            count += 1
    return count


def _decide(sides, numbers, sure=False):
    """The score and form of the sides that words speak for and of numbers. sure: numbers say how sure the words are."""
    if None in sides or (None, "unsure") in numbers:
        return None, "unsure"
    scores = {round(score, 9): (score, form) for score, form in reversed(numbers) if score is not None}
    if len(sides) > 1 or len(scores) > 1:
        return None, "ambiguous"
    if scores and any(score is None for score, _ in numbers):
        return None, "ambiguous"
    side = min(sides, default=None)
    if not scores:
        return (None, "none") if side is None else (float(side), "word")
    ((score, form),) = scores.values()
    if side is None:
        return score, form
    agree = side == 1 if sure else abs(side - score) <= 0.5
    return (score, form) if agree else (None, "ambiguous")
