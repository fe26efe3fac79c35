r"""One LaTeX source as training text: what prints no words is stripped, mathematics stays as it is.

Macros are not expanded: a document keeps its own definitions as text. Every pass is linear and none recurses on
nesting: where an argument or an environment ends is read off a table of pairs, and what has no end is left as it is.
"""

import re
import unicodedata
from collections import Counter
from operator import itemgetter

from latex_hidden import Meanings, hidden_parts, may_hide, within_conditional
from latex_syntax import (
    COMMANDS,
    END,
    ENVIRONMENTS,
    GAP,
    TAGS,
    WORD,
    arguments_end,
    definition_end,
    definitions,
    ends_of,
)

BETWEEN = {"layout": " ", "paragraph": "\n\n", "float": "\n\n", "block": "\n"}  # what takes the place of a kind
COUNTED = ("graphics", "bibliography", "index")  # by their own names, all others as layout
HEADINGS = "part chapter section subsection subsubsection paragraph".split()  # the coarsest first

# ---- patterns -------------------------------------------------------------------------------------------------------

HIDDEN = r"comment|filecontents\*?"  # environments that TeX does not print
VERBATIM = rf"verbatim\*?|Verbatim\*?|BVerbatim|alltt|lstlisting|minted|spverbatim|tcblisting|{HIDDEN}"
# Verbatim environments of a source's own, and characters that begin and end verbatim text.
OWN_VERBATIM = r"(?m)^[^%\n]*?\\(?:DefineVerbatimEnvironment|lstnewenvironment|newtcblisting)[^{\n]*\{(\w+)\}"
OWN_BAR = r"(?m)^[^%\n]*?\\(?:MakeShortVerb\*?|lstMakeShortInline(?:\[[^]\n]*\])?)[ \t]*\{?\\?([^\s\w{}\\])"
MATH = "equation|align|gather|multline|eqnarray|displaymath|math|alignat|flalign|IEEEeqnarray|tikzcd|CD"
# Macros that begin or end a formula: how a source defines them, and what authors call them, by those that end them.
ABBREVIATION = (
    r"\\(?:(?:re)?newcommand\*?|providecommand\*?|[gex]?def|DeclareRobustCommand)\s*\{?\s*\\(?P<name>[a-zA-Z@]+)"
    rf"[^{{\n]{{0,40}}(?:\{{[^{{}}]{{0,80}}?\\(?P<tag>begin|end)[ \t]*\{{(?P<math>{MATH})\*?\}}"
    r"(?!(?:[^{}]|\{[^{}]*\}){0,300}\\end[ \t]*\{(?P=math)))?"
)
FRONT = rf"\\(?:title|subtitle|abstract|keywords){END}"  # in a preamble: \maketitle prints it
FRONT_ABSTRACT = r"(?s)\\begin[ \t]*\{abstract\}.*?\\end[ \t]*\{abstract\}"
PRINTS_FRONT = r"\\[a-zA-Z@]*title|\{titlepage\}"
USUAL_ABBREVIATIONS = "be:ee bea:eea beq:eeq ba:ea beqn:eeqn beqa:eeqa beqna:eeqna bal:eal bequ:eequ".split()
SIZES = "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|centering|raggedright"
LEX = re.compile(
    rf"\\(?:begin[ \t]*\{{(?P<verbatim>{VERBATIM})\}}|(?P<document>begin|end)[ \t]*\{{document\}}"
    rf"|(?P<verb>(?:verb|lstinline|mintinline\{{\w{{1,40}}\}}){END}\*?(?:\[[^][\n]{{0,200}}\])?"
    r"(?:(?P<bar>[^\sa-zA-Z*{\\])[^\n]{0,200}?(?P=bar)|\{[^{}\n]{0,2000}\})"
    r"|(?:url|path|nolinkurl|href)[ \t]*\{[^{}\n]{0,2000}\})"
    rf"|(?P<endinput>endinput){END}|(?P<stop>(?:bye|enddocument|@@end|end(?![ \t\n]*\{{)){END})"
    rf"|(?P<only>includeonly){END}|(?P<input>input|include|subfile|subfileinclude|import|subimport){END}|[\\%])|(?P<comment>%[^\n]*)"
)
OWN_COMMENT = (  # an environment comment that is text
    r"(?m)^[^%\n]*\\(?:(?:newtheorem|(?:re)?newenvironment)\*?|\w*DocumentEnvironment|include(?:comment|version)"
    r"|specialcomment|declaretheorem[ \t]*(?:\[[^]]*\])?)[ \t]*\{comment\}"
    r"|^[^%\n]*\\(?:def|newcommand\*?\{?)\\endcomment\b"
)
CONSTANT = rf"\\if(?:false|true|num|odd|case|thenelse)?{END}"  # conditionals that may be decided by themselves
TOKEN = (
    rf"(?s)\\(?:(?P<formula>[\[(]|begin[ \t]*\{{(?P<math>{MATH})\*?\}})"
    rf"|(?P<formula_end>[])]|end[ \t]*\{{(?P<math_end>{MATH})\*?\}})"
    r"|begin[ \t]*\{(?P<begin>[^{}\n*]*)\*?\}|end[ \t]*\{(?P<end>[^{}\n*]*)\*?\}"
    rf"|(?P<heading>{'|'.join(HEADINGS)}){END}|(?P<command>[a-zA-Z@]+)|.)|(?P<dollar>\$\$?)|(?P<paragraph>\n[ \t]*\n)"
    rf"|(?P<sized_group>\{{\s*\\(?:{SIZES}){END}\s*)|(?P<group>\{{)|(?P<group_end>\}})"
)
DEEPER = {"group": 1, "sized_group": 1, "group_end": -1}  # how tokens change the depth of groups
LINE_END = re.compile(r"([ \t]*\n(?![ \t]*\n))?")  # one after \fi is none to TeX
WORD_AT_END = re.compile(WORD + "$")
BLOCK = re.compile(r"[ \t]*\\(?:begin|end|item|[][])")  # where TeX ignores a line end
AFTER_COMMENT = re.compile(rf"{GAP.pattern}(?P<apart>\Z|[\n%]|{BLOCK.pattern})?")
ARGUMENT_BEFORE = r"(?:[}\]*]|\\[a-zA-Z@]+)$"  # of a group: it may be the argument of a command
INTERNAL = re.compile(r"\\[a-zA-Z]+\*?[ \t]*(?:\{\s*\\?[^{}\n]*@|\\[a-zA-Z]*@)")  # a definition of a name with @
SPACES = "[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]"
CONTROLS = r"\x00-\x08\r-\x1f\x7f-\x84\x86-\x9f\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
NO_TEXT = rf"[{CONTROLS}\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\uffff]"  # those, zero-width ones, and no characters

# ---- lexing ---------------------------------------------------------------------------------------------------------


def _lexer(whole):
    """LEX with the verbatim environments and characters that a source and its styles declare."""
    if not re.search("DefineVerbatim|lstnewenv|newtcblisting|ShortVerb|ShortInline", whole):
        return LEX
    pattern = LEX.pattern.replace(VERBATIM, "|".join([VERBATIM, *re.findall(OWN_VERBATIM, whole)]))
    bars = [re.escape(bar) for bar in set(re.findall(OWN_BAR, whole))]
    short = "|".join(rf"(?<!\\){bar}[^\n{bar}]{{1,200}}{bar}" for bar in bars)
    return re.compile(f"{pattern}|(?P<short>{short})" if short else pattern)


def _raw(text, own_comment, lexer):
    """(kind, start, end, match) of comments, verbatim parts, \\input commands and document tags, in order."""
    unclosed = set()
    position = 0
    while m := lexer.search(text, position):
        kind, environment, position = m.lastgroup, m["verbatim"], m.end()
        kind = "verb" if kind == "short" else kind
        if environment:
            tag = rf"(?P<tag>\\end[ \t]*\{{{re.escape(environment)}\}})"
            if tag in unclosed or (own_comment and environment == "comment"):
                continue
            close = re.compile(tag + "[^\n]*").search(text, position)
            if not close:
                unclosed.add(tag)  # no later one need look for it again: that would take quadratic time
                continue
            kind = "hidden" if re.fullmatch(HIDDEN, environment) else "verb"
            position = close.end() if kind == "hidden" else close.end("tag")  # of a hidden one TeX drops the whole line
        if kind:
            yield kind, m.start(), position, m


def lex(text: str, styles: str = "", alone: bool = False):
    """(kind, start, end, match) of comments, verbatim and hidden parts, \\input commands and document tags in order.

    styles: the source's style files, whose flags, macros and environments count. alone: it is one file of several, and
    only what is decided whatever the others say is hidden.
    """
    whole = text + "\n" + styles
    own_comment = "comment" in whole and bool(re.search(OWN_COMMENT, whole))
    lexer = _lexer(whole)
    raw = list(_raw(text, own_comment, lexer))
    masked, hidden = _mask(text, raw), {}
    if own_comment or (re.search(CONSTANT, text) if alone else may_hide(whole)):
        meanings = Meanings({"{comment": True} if own_comment else {}, frozen=alone)
        if styles:
            hidden_parts(_mask(styles, _raw(styles, own_comment, lexer)), meanings)
            meanings.groups.clear()
        hidden = hidden_parts(masked, meanings)
    spans = [("hidden", start, end, None) for start, end in hidden.items()]
    position = 0
    for part in sorted([*spans, *raw], key=itemgetter(1)):
        kind, start, end, m = part
        if not m:
            position = end
        elif start < position:
            continue
        elif kind in ("endinput", "stop", "only") and within_conditional(masked, start, hidden):
            continue
        yield part


def _mask(text, parts):
    """The text with blanks for comments, verbatim and hidden parts; a line of comment is no line."""
    masked, position = [], 0
    for kind, start, end, _ in parts:
        if kind in ("comment", "verb", "hidden"):
            whole = not text[text.rfind("\n", 0, start) + 1 : start].strip()
            end += kind == "comment" and whole and text.startswith("\n", end)
            masked += [text[position:start], " " * (end - start)]
            position = end
    return "".join(masked) + text[position:]


def _uncomment(text, start, end):
    """Where a comment with its blanks starts, what is left of it, and where it ends: TeX joins the lines around it."""
    line = text.rfind("\n", 0, start) + 1
    left = line + len(text[line:start].rstrip(" \t"))
    if left == line:  # it is all of its line
        return left, "", end + 1
    after = AFTER_COMMENT.match(text, end)
    if left < start or after["apart"] is not None or BLOCK.match(text, line):
        return left, "", end
    return left, _apart(text, left, after.end()), after.end()


def _apart(text, left, right):
    r"""The blank that stands for what goes, where a letter would become part of a command (\Phi a, not \Phia)."""
    return " " if text[right : right + 1].isalpha() and WORD_AT_END.search(text, max(0, left - 40), left) else ""


def _hide(text, dropped, styles):
    """The text without comments and hidden parts and with numbered marks for verbatim ones, and the verbatim ones."""
    out, verbatim, position = [], [], 0
    for kind, start, end, m in lex(text, styles):
        left = ""
        if kind == "verb":
            left = f"\ufdd0{len(verbatim)}\ufdd1"
            verbatim.append(text[start:end])
        elif kind == "comment":
            start, left, end = _uncomment(text, start, end)
        elif kind == "hidden":
            if not m:
                end = LINE_END.match(text, end).end()
            left = _apart(text, start, end)
        else:
            continue
        start = max(start, position)
        if kind != "verb":
            dropped["comments" if kind == "comment" else "hidden"] += end - start
        out += [text[position:start], left]
        position = end
    return "".join(out) + text[position:], verbatim


# ---- cleaning -------------------------------------------------------------------------------------------------------


def _abbreviations(text):
    """{command: (begin or end, of which formula)} of the macros that stand for the tags of formulas."""
    defined = {m["name"]: (m["tag"], m["math"]) for m in re.finditer(ABBREVIATION, text)}
    for pair in USUAL_ABBREVIATIONS:
        first, last = pair.split(":")
        if not {first, last} & defined.keys() and re.search(rf"\\{last}{END}", text):
            defined |= {first: ("begin", last), last: ("end", last)}
    return {name: tag for name, tag in defined.items() if tag[0]}


def _follow(m, formulas, depth, tag, math):
    """Read one TOKEN: the depth of groups after it. A formula without end harms no more than its paragraph or section.

    formulas: the list of those that are open, each as (what closes it, the depth of groups it is in). tag, math: begin
    or end, and which formula, where the token is a macro for that.
    """
    kind = {"begin": "formula", "end": "formula_end"}.get(tag, m.lastgroup)
    if tag == "begin" and formulas:
        return depth  # it has another meaning in mathematics
    depth += DEEPER.get(kind, 0)
    while formulas:
        close, outside = formulas[-1]
        stray = close[0] == "$" and (kind == "paragraph" or (kind == "formula" and outside == depth))
        if outside <= depth and kind != "heading" and not stray:
            break
        formulas.pop()
    if kind == "formula":
        formulas.append((m["math"] or math or {"[": "]", "(": ")"}[m[0][1]], depth))
    elif kind == "formula_end":
        close = m["math_end"] or math or m[0][1]
        if close in [recent for recent, _ in formulas[-8:]]:
            while formulas.pop()[0] != close:
                pass
    elif kind == "dollar":
        if not formulas or formulas[-1][1] < depth:  # the latter in a group of a formula: \text{if $a$}
            formulas.append((m[0], depth))
        elif formulas[-1][0] == m[0]:
            formulas.pop()
    return depth


def _cuts(text, abbreviations):
    """(kind, start, end) of all that only lays out, draws or indexes, in order; of formulas and definitions nothing."""
    ends, formulas, depth, position = ends_of(text), [], 0, 0
    known = COMMANDS.keys() | abbreviations.keys()
    wrapped = set()  # closing braces that go because their opening ones went
    for m in re.finditer(TOKEN, text):
        token = m.lastgroup
        command = m["command"] if token == "command" else None
        if not token or (command and command not in known) or m.start() < position:
            continue
        start, end = m.span()
        if token in ("group", "group_end") and not formulas and start not in wrapped:  # most tokens
            continue  # only within formulas the depth matters
        tag = abbreviations.get(command, (None, None))
        depth = _follow(m, formulas, depth, *tag)
        if tag[0] or (formulas and start not in wrapped):
            continue
        begin, cut_end = m["begin"], None
        kind, signature = COMMANDS.get(command) or TAGS.get(begin or m["end"]) or ("brace", "")
        if start in wrapped or m["end"] in TAGS:
            cut_end = end
        elif token == "sized_group":  # {\small ...}: its braces go too, unless they hold an argument
            cut_end = end
            if start in ends and not re.search(ARGUMENT_BEFORE, text[max(0, start - 40) : start].rstrip(" ")):
                wrapped.add(ends[start] - 1)
            else:
                start += 1
        elif kind == "definition":
            position = definition_end(text, command, end, ends) or position
        elif kind == "unwrapped":
            brace = arguments_end(text, end, signature, ends)
            brace = brace and GAP.match(text, brace).end()
            if brace in ends and text[brace] == "{":
                wrapped.add(ends[brace] - 1)
                cut_end = brace + 1
        elif begin in ENVIRONMENTS:
            kind, cut_end = ENVIRONMENTS[begin], ends.get(start)
        elif command or begin in TAGS:
            cut_end = arguments_end(text, end, signature, ends)
        if cut_end:
            position = cut_end
            yield kind, start, position


def _strip(text, dropped, abbreviations):
    """The body without its cuts. The white space around a cut is joined, and no letter becomes part of a command."""
    out, copied, written = [], 0, "\n"  # written: the end of what is in out
    for kind, start, end in _cuts(text, abbreviations):
        piece, between = text[copied:start], BETWEEN.get(kind, "")
        written = (written + piece[-40:])[-40:]
        before, after = written[-1], text[end : end + 1]
        if before.isspace():  # single blanks are all there are
            end += text.startswith(" ", end)
        if before == "\n":
            end += text.startswith("\n", end)  # nothing else was on its line
            between = "\n" if between == "\n\n" else ""
        elif between == " " and (before in " ([{~" or after in ")]},.;:~ \n"):
            between = ""
        elif not between and before.isalpha():
            between = _apart(written + after, len(written), len(written))
        out += [piece, between]
        written += between
        dropped[kind if kind in COUNTED else "layout"] += end - start
        copied = end
    return "".join(out) + text[copied:]


def _tidy(text):
    """Lines without blanks around them, single blanks within, at most one blank line in a row."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _composed(text):
    """The text in NFC; as it is where so many marks stand on one letter that sorting them would take hours."""
    marks = "".join(letter for letter in set(text) if unicodedata.combining(letter))
    if marks and re.search(f"[{re.escape(marks)}]{{100}}", text):
        return text
    return unicodedata.normalize("NFC", text)


def _preamble(text, body):
    """What is kept of a preamble: its definitions, and title and abstract where the body prints them; two lists."""
    ends = ends_of(text)
    spans = list(definitions(text, ends))
    kept = [text[i:j] for i, j in spans if not INTERNAL.match(text, i)]
    if not re.search(PRINTS_FRONT, body):
        return kept, []
    rest = _mask(text, [("hidden", i, j, None) for i, j in spans])
    front = {m.start(): arguments_end(rest, m.end(), "1", ends) for m in re.finditer(FRONT, rest)}
    front |= {m.start(): m.end() for m in re.finditer(FRONT_ABSTRACT, rest)}
    return kept, [text[i:j] for i, j in sorted(front.items()) if j]


def clean(source: str, dropped: Counter, styles: str = "") -> str:
    """The text of one source (inline it before): definitions of its preamble, then its body, stripped. Never longer.

    dropped: counts the characters dropped, by kind. styles: the text of the source's own style files.
    """
    # Odd spaces, control and zero-width characters go; characters are composed (NFC) where that is no longer.
    text = re.sub(SPACES, " ", re.sub("[\f\v\x85\u2028\u2029]", "\n", source))
    text = re.sub(NO_TEXT, "", text)
    text = min(_composed(text), text, key=len)

    text, verbatim = _hide(text, dropped, styles)
    abbreviations = _abbreviations(text + "\n" + styles)
    *preamble, body = re.split(r"\\begin *\{document\}", _tidy(text), maxsplit=1)
    macros = front = ""
    for part in preamble:
        kept, front = _preamble(part, body)
        dropped["preamble"] += len(part) - len("".join([*kept, *front]))
        macros, front = "\n".join(kept) + "\n\n", "".join(text + "\n" for text in front)
    body, *after = re.split(r"\\end *\{document\}", body, maxsplit=1)
    for part in after:
        dropped["after the end"] += len(part)
    text = _tidy(macros + _strip(front + body, dropped, abbreviations))
    text = re.sub("\ufdd0(\\d+)\ufdd1", lambda mark: verbatim[int(mark[1])], text).strip()
    plain = re.sub("[\ufb00-\ufb06]", lambda ligature: unicodedata.normalize("NFKC", ligature[0]), text)
    return plain if len(plain) <= len(source) else text
