"""What names of a LaTeX source mean at a place, and what follows for its tests: numbers, characters and flags."""

import re
from dataclasses import dataclass

from latex_syntax import END

OPERATORS = {"<": int.__lt__, "=": int.__eq__, ">": int.__gt__}
NUMBER = rf"(?:(-?\d+)|\\([a-zA-Z@]+){END})"
COMPARED = re.compile(rf"\s*{NUMBER}\s*([<=>])\s*{NUMBER}\s?")
COUNTED = re.compile(rf"\s*{NUMBER}\s?")
CHARACTERS = re.compile(r"\s*(?:([^\\{}#$&~^_%\s])|\\([a-zA-Z@]+)\s*)(?:([^\\{}#$&~^_%])|\\([a-zA-Z@]+)\s*)?")
BOOLEAN = re.compile(r"\s*(\\(?:NOT|not))?\s*\\boolean\s*\{\s*([\w@]+)\s*\}\s*")
EQUAL = re.compile(r"\s*(\\(?:NOT|not))?\s*\\equal\s*\{([^{}]*)\}\s*\{([^{}]*)\}\s*")

# Where a comment was, before a line end that TeX does not see: a number, or what is compared, may go on after it.
COMMENT = r"(?:[ \t]+\n)+[ \t]*"
GOES_ON = re.compile(rf"(?<=[ \t])\n[ \t]*\d|{COMMENT}\d")

# ---- meanings -------------------------------------------------------------------------------------------------------


@dataclass
class Macro:
    """A macro of the source: how many arguments it takes, or by which word they end, and its body."""

    arguments: str
    body: str
    silent: bool | None = False  # whether it prints nothing; None: that depends on flags


class Meanings:
    """What names mean at one place of a source. Changes within a group end with it, unless they are global.

    Keys: "ifdraft" and "hide" for commands, "toggle:x", "{x" for environments. Flags are True or False, environments
    True where they are hidden, macros a Macro; None is what cannot be known.
    """

    def __init__(self, known=(), frozen=False):
        self.known = {"@gobble": Macro("1", "", True), "@gobbletwo": Macro("2", "", True)} | dict(known)
        self.frozen = frozen  # nothing is learned: another file may say otherwise
        self.groups = []  # of each open one: where its brace is (-1: an environment), and what names meant before it
        self.doubtful = set()  # names that may change at any time: a macro sets them

    def learn(self, key, meaning, everywhere=False):
        """Give a name its meaning from here on."""
        if self.frozen:
            return
        if self.groups and not everywhere:
            self.groups[-1][1].setdefault(key, self.known.get(key))
        self.known[key] = None if key in self.doubtful else meaning

    def doubt(self, key):
        """Whatever it meant or will mean: it cannot be known."""
        self.doubtful.add(key)
        self.known[key] = None

    def leave(self):
        """End the innermost group."""
        if self.groups:
            for key, meaning in self.groups.pop()[1].items():
                self.learn(key, meaning, everywhere=True)


# ---- tests ----------------------------------------------------------------------------------------------------------


def outcome(
    text: str,
    word: str,
    position: int,
    meanings: Meanings,
) -> tuple[int | None, int]:
    """(the branch that a test takes: 0, 1 ..., -1 for \\else, None where unknown; where the test ends)."""
    known = meanings.known.get(word)
    if word in ("iftrue", "iffalse") or isinstance(known, bool):
        return (0 if word == "iftrue" or known else -1), position
    if word == "ifnum":
        m = COMPARED.match(text, position)
        left = m and _number(m[1], m[2], meanings)
        right = m and _number(m[4], m[5], meanings)
        if None not in (left, right) and not GOES_ON.match(text, m.end()):
            return (0 if OPERATORS[m[3]](left, right) else -1), m.end()
    if word in ("ifodd", "ifcase"):
        m = COUNTED.match(text, position)
        number = m and _number(m[1], m[2], meanings)
        if number is not None and not GOES_ON.match(text, m.end()):
            return (number if word == "ifcase" else number % 2 - 1), m.end()
    if word == "if":
        return _compare(text, position, meanings)
    return None, position


def _number(digits, name, meanings):
    """The number that digits or a macro stand for, or None."""
    digits = digits or _word(name, meanings)
    return int(digits) if digits and re.fullmatch(r"-?\d{1,9}", digits) else None


def _word(name, meanings):
    """The plain text that a macro without arguments stands for, or None."""
    macro = meanings.known.get(name)
    plain = isinstance(macro, Macro) and not macro.arguments and not re.search(r"[\\{}#$&~^_%]", macro.body)
    return macro.body.strip() if plain else None


def _compare(text, position, meanings):
    """The branch of \\if, which compares two characters, as `outcome` gives it."""
    m = CHARACTERS.match(text, position)
    if not m:
        return None, position
    joined = re.compile(COMMENT + r"(\S)").match(text, m.start(3)) if m[3] else None
    if joined and joined[1] in ("\\", m[1]):
        return None, position
    first = m[1] or _word(m[2], meanings)
    second = m[3] or _word(m[4], meanings)
    if first and len(first) == 1 and second and len(second) == 1:
        return (0 if first == second else -1), m.end()
    if m[1] and not m[3] and m[4] not in meanings.known:  # a character is no command
        return -1, m.end()
    return None, position


def truth(test: str, meanings: Meanings) -> tuple[bool, bool | None]:
    """(is it negated?, the value of a test of \\ifthenelse or None)."""
    boolean, equal, compared = (pattern.fullmatch(test) for pattern in (BOOLEAN, EQUAL, COMPARED))
    if boolean:
        return bool(boolean[1]), meanings.known.get("if" + boolean[2])
    if equal:
        sides = [_word(side.strip()[1:], meanings) if "\\" in side else side.strip() for side in equal.groups()[1:]]
        return bool(equal[1]), None if None in sides else sides[0] == sides[1]
    branch, _ = outcome(test, "ifnum", 0, meanings) if compared else (None, 0)
    return False, None if branch is None else branch == 0
