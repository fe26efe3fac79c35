"""Strings that a person cannot tell apart: they differ in white space, case, composition, invisible characters, letters
of the same look, or the form of a number alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from unicodedata import category, normalize

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,3})?")
# Characters that show nothing though Unicode calls them letters, marks or symbols.
BLANK = "\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0"
VARIATION = "\ufe00-\ufe0f"  # how an emoji is drawn
HIDDEN = re.compile(f"[{BLANK}{VARIATION}]")
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
    plain = " ".join(look(text).casefold().split())
    return Decimal(plain) if NUMBER.fullmatch(plain) else plain


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
