"""Strings that a person cannot tell apart: they differ in white space, case, composition, invisible characters, letters
of the same look, quotation marks around them, - _ and blanks between words, entities of HTML, bytes that were read in
another encoding, or the form of a number alone. And strings that are no value at all.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from decimal import Decimal
from html import unescape
from unicodedata import category, normalize

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?")
# Characters that show nothing though Unicode calls them letters, marks or symbols.
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
VARIATION = "\ufe00-\ufe0f"  # how an emoji is drawn
HIDDEN = re.compile(f"[{BLANK}{VARIATION}]")
SHOWN = re.compile("[!-~\u00c0-\u02af\u0400-\u10ff\u4e00-\ud7a3]")  # the commonest characters that are seen
APART = re.compile(r"(?<=[^\W_])[-_ ]+(?=[^\W_])")  # what separates words
# What other tools write where there is no value.
MISSING = r"""NA N/A n/a N.A. n.a. #N/A <NA> NaN Nan nan NaT null Null NULL nil None \N undefined unlabeled unlabelled
    #NAME? #VALUE! #REF! #DIV/0! #NULL! #NUM!""".split()
# Letters of Cyrillic and Greek, quotation marks and dashes that look like those of ASCII.
LOOKS = str.maketrans(
    "аеорсухіјѕԁһӏАВЕКМНОРСТХІЈЅαορνΑΒΕΖΗΙΚΜΝΟΡΤΥΧ‘’‚`´“”„«»‐‑‒–—―−",
    "aeopcyxijsdhlABEKMHOPCTXIJSaopvABEZHIKMNOPTYX'''''\"\"\"\"\"-------",
)


def look(text: str) -> str:
    """How a text looks: composed, without what shows nothing, in ASCII where that looks the same."""
    composed = normalize("NFKC", text)
    shown = [c for c in composed if c.isspace() or category(c) not in ("Cf", "Cc")]
    return HIDDEN.sub("", "".join(shown)).translate(LOOKS)


def key(text: str) -> str | Decimal:
    """What all spellings of a text have in common."""
    text = unescape(text)
    with suppress(UnicodeError):  # UTF-8 that was read as cp1252
        text = text.encode("cp1252").decode()
    plain = " ".join(look(text).casefold().split())
    plain = plain.strip("'\"") or plain
    return Decimal(plain) if NUMBER.fullmatch(plain) else APART.sub(" ", plain)


def is_blank(text: str) -> bool:
    """Whether a text shows nothing."""
    return not SHOWN.search(text) and not look(text).strip()


def alike(texts: Iterable[str]) -> list[list[str]]:
    """The groups of different texts with the same key, each sorted."""
    groups = defaultdict(set)
    for text in texts:
        groups[key(text)].add(text)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def quoted(texts: list[str]) -> list[str]:
    """The texts in quotation marks, escaped as far as it takes to see that they differ."""
    shown = list(map(repr, texts))
    looks = set(map(look, shown))
    if len(looks) == len(set(texts)):
        return shown
    return list(map(ascii, texts))
