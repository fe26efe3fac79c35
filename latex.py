r"""LaTeX sources as training text: projects are inlined, what prints no words is stripped, mathematics stays as it is.

Macros are not expanded: a document keeps its own definitions as text. Every pass is linear, none recurses on nesting:
where an argument or an environment ends is read off a table of pairs, and what has no end is left as it stands.
"""

import posixpath
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field

# ---- names ----------------------------------------------------------------------------------------------------------


def _table(words: str) -> dict[str, str]:
    return {name: value for name, _, value in (word.partition(":") for word in words.split())}


# name:how many arguments, o: only an optional one, g: a dimension, f: a font, =: a definition's parameters
COMMANDS = {
    "layout": """vspace:1 hspace:1 hskip:g kern:g pagebreak:o nopagebreak:o linebreak:o enlargethispage:1 pagestyle:1
        thispagestyle:1 pagenumbering:1 noindent indent centering center raggedright raggedleft setlength:2
        addtolength:2 setcounter:2 addtocounter:2 stepcounter:1 refstepcounter:1 newlength:1 newcounter:1
        settowidth:2 maketitle titlepage tableofcontents:o listoffigures listoftables parttoc minitoc
        addcontentsline:3 addtocontents:2 hfill hfil phantomsection frontmatter mainmatter backmatter tiny
        scriptsize footnotesize small normalsize large Large LARGE huge Huge selectfont fontsize:2 linespread:1
        markboth:2 markright:1 sloppy fussy onecolumn twocolumn:o allowdisplaybreaks:o captionsetup:1 hypersetup:1
        usepackage:1 RequirePackage:1 makeatletter makeatother color:1 normalcolor definecolor:3 tikzset:1
        usetikzlibrary:1 tikzcdset:1 lstset:1 allowbreak strut samepage pause hrule rule:2 theoremstyle:1
        numberwithin:2 graphicspath:1 externaldocument:1 fancyhead:1 fancyfoot:1 lhead:1 chead:1 rhead:1 lfoot:1
        cfoot:1 rfoot:1 showthe:1 font:f baselineskip:g parskip:g parindent:g hsize:g vsize:g textwidth:g
        textheight:g topmargin:g oddsidemargin:g evensidemargin:g leftskip:g rightskip:g tabcolsep:g fboxrule:g
        fboxsep:g itemsep:g hoffset:g voffset:g unitlength:g topskip:g parsep:g""",
    "paragraph": "par vskip:g bigskip medskip smallskip newpage clearpage cleardoublepage vfill vfil eject",
    "graphics": "includegraphics:1 includesvg:1 includepdf:1 epsfig:1 epsfbox:1 psfig:1 special:1 tikz:1",
    "bibliography": "bibliography:1 bibliographystyle:1 printbibliography:o nocite:1 addbibresource:1",
    "index": "index:1 printindex:o makeindex:o glossary:1 printglossary:o printglossaries makeglossaries",
}
COMMAND = {name: (kind, how) for kind, words in COMMANDS.items() for name, how in _table(words).items()}
UNWRAPPED = _table("centerline: leftline: rightline: resizebox:2 scalebox:1 rotatebox:1 textcolor:1")
DEFINED = _table("""newcommand:1 renewcommand:1 providecommand:1 DeclareRobustCommand:1 DeclareMathOperator:1
    DeclarePairedDelimiter:2 NewDocumentCommand:2 RenewDocumentCommand:2 ProvideDocumentCommand:2
    DeclareDocumentCommand:2 NewDocumentEnvironment:3 newenvironment:2 renewenvironment:2 newtheorem:1 declaretheorem:
    def:= gdef:= edef:= xdef:= let:""")
ENVIRONMENT = {  # those that go with all they hold
    **dict.fromkeys("""tikzpicture pgfpicture asy asydef picture pspicture xy chart axis circuitikz overpic mpost
        feynmandiagram""".split(), "graphics"), "thebibliography": "bibliography", "theindex": "index",
    "filecontents": "layout"}  # fmt: skip
WRAPPER = _table("""document: center:o figure:o table:o flushleft: flushright: sidewaysfigure:o sidewaystable:o
    titlepage: titlingpage: landscape: raggedleft: raggedright: minipage:1 subfigure:1 subtable:1 spacing:1 multicols:1
    adjustwidth:2 adjustbox:1 threeparttable:o wrapfigure:2 wraptable:2""")  # of these only the tags go
MATH = set("equation align gather multline eqnarray displaymath math alignat flalign IEEEeqnarray tikzcd CD".split())
VERBATIM = "verbatim verbatim* Verbatim Verbatim* BVerbatim alltt lstlisting minted spverbatim comment".split()
SIZES = "tiny scriptsize footnotesize small normalsize large Large LARGE huge Huge centering raggedright".split()
HEADINGS = "part chapter section subsection subsubsection paragraph".split()  # the coarsest first
KNOWN = {*HEADINGS, *DEFINED, *COMMAND, *UNWRAPPED}
CONDITIONALS = set("""if ifcat ifnum ifdim ifodd ifvmode ifhmode ifmmode ifinner ifvoid ifhbox ifvbox ifx ifeof iftrue
    iffalse ifcase ifdefined ifcsname iffontchar ifpdf ifxetex ifluatex""".split())  # fmt: skip
ENCODINGS = _table("""latin1:latin-1 latin2:iso8859-2 latin5:iso8859-9 latin9:iso8859-15 ansinew:cp1252
    applemac:mac_roman maccyr:mac_cyrillic cp1250:cp1250 cp1251:cp1251 cp1252:cp1252 cp866:cp866 cp437:cp437
    cp850:cp850 koi8-r:koi8-r koi8-u:koi8-u koi8-ru:koi8-u""")
LIGATURES = {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "st", "ﬆ": "st"}

# ---- patterns -------------------------------------------------------------------------------------------------------

END = "(?![a-zA-Z@])"  # of a command's name
LEX = re.compile(
    r"\\(?:begin[ \t]*\{(?P<env>" + "|".join(map(re.escape, VERBATIM)) + r")\}"
    r"|(?P<document>begin|end)[ \t]*\{document\}"
    rf"|(?P<verb>(?:verb|lstinline|mintinline\{{\w{{1,40}}\}}){END}\*?(?:\[[^][\n]{{0,200}}\])?"
    r"(?:(?P<bar>[^\sa-zA-Z*{\\])[^\n]{0,200}?(?P=bar)|\{[^{}\n]{0,2000}\})"
    r"|(?:url|path|nolinkurl|href)[ \t]*\{[^{}\n]{0,2000}\})"
    rf"|(?P<hidden>iffalse|fi){END}|(?P<endinput>endinput){END}"
    rf"|(?P<input>input|include|subfile|subfileinclude|import|subimport){END}|[\\%])|(?P<comment>%)"
)
BRANCH = re.compile(rf"(\\newif\s*)?\\(?:(if[a-zA-Z@]*|else|fi){END}|.)|%[^\n]*|[{{}}]", re.DOTALL)
PAIR = re.compile(r"\\(?:(begin|end)[ \t]*\{(" + "|".join(ENVIRONMENT) + r")\*?\}|[\\{}])|[{}]")
TOKEN = re.compile(
    r"\\(?:(begin|end)[ \t]*\{([^{}\n*]*)\*?\}|([a-zA-Z@]+)|.)|\$\$?|\n[ \t]*\n"
    rf"|\{{\s*\\(?:{'|'.join(SIZES)}){END}\s*|[{{}}]", re.DOTALL
)  # fmt: skip
DECLARED = re.compile(rb"\\usepackage[ \t]*\[([\w, \-]{1,80})\][ \t]*\{inputenc\}")
TARGET = re.compile(r"[ \t]*\n?[ \t]*(?:\{([^{}\n]*)\}|([^\s{}\\%#\[]+))")  # \input{this} or \input this
SUBFILE = re.compile(r"^[^%\n]*\\documentclass[ \t]*(?:\[[^\]]*\])?[ \t]*\{subfiles\}", re.MULTILINE)
GAP = re.compile(r"[ \t]*\n?[ \t]*")
WORD = re.compile(r"\\[a-zA-Z@]+")
DEFINEE = re.compile(r"\*?[ \t]*(?:\{\s*(\\?[^{}\n]*)\}|(\\(?:[a-zA-Z@]+|.)))")
LET = re.compile(r"[ \t]*\\(?:[a-zA-Z@]+|.)[ \t]*=?[ \t]?(?:\\(?:[a-zA-Z@]+|.)|\S)")
SIZE = r"[ \t]*-?[ \t]*(?:[\d.,]*\\[a-zA-Z@]+|[\d.,]+[ \t]*(?:true[ \t]*)?(?:p[tc]|[cm]m|in|ex|em|bp|dd|cc|sp|mu|fil+))"
DIMENSION = re.compile(rf"[ \t]*=?{SIZE}(?:[ \t]*(?:plus|minus){SIZE}){{0,2}}")
FONT = re.compile(r"[ \t]*\\[a-zA-Z]+[ \t]*=?[ \t]*[\w\-]+(?:[ \t]+(?:scaled|at)[ \t]*[\w.\\]+)?")
BLOCK = ("\\begin", "\\end", "\\item", "\\[", "\\]")  # where TeX ignores a line end
OPTIONS = re.compile(r"\\(?!item|begin)[a-zA-Z@]+\*?(?:\[[^\]\n]{0,200}\])*")  # a command and its own
PROSE = re.compile(
    r"(?<!\w)(?:[^\W\d_]{2,}[\s,;:'’()\-~]+){3}[^\W\d_]{2,}|[぀-ヿ㐀-鿿가-힯]{4}|(?<!\\)\$[^$]|\\\[|\\(?:item|begin)\b"
)
ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\xa0\xad\u1680\u180e\u2000-\u200b\u200e-\u200f\u2028-\u202f\u205f-\u206f"
                 "\u3000\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\uffff]")  # fmt: skip


@dataclass
class FileReport:
    """What became of one file."""

    name: str  # relative posix path
    encoding: str = ""  # how it was read; "" when it is binary or no .tex
    fate: str = ""  # "root", "inlined into X", "fragment" (no root reaches it: cleaned alone), "dropped: why"
    characters: int = 0  # read
    kept: int = 0  # characters of text of the document it is the root of
    dropped: Counter = field(default_factory=Counter)  # characters dropped of that document, by kind
    notes: list[str] = field(default_factory=list)  # missing files, cycles, paths outside the folder, unbalanced braces


# ---- characters and lexing ------------------------------------------------------------------------------------------


def decode(raw: bytes, otherwise: str | None = None) -> tuple[str, str] | None:
    """Text with \\n line ends and its encoding; None for binary. otherwise: what the rest of the project declares."""
    wanted = DECLARED.search(raw)
    declared = wanted and ENCODINGS.get(wanted[1].decode("ascii", "replace").split(",")[-1].strip())
    codecs = ["utf-8-sig", declared or otherwise or "cp1252", "cp1252", "latin-1"]
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        codecs = ["utf-16"]
    elif b"\0" in raw or len(re.findall(rb"[\x01-\x08\x0e-\x1f\x7f]", raw)) > 2 + len(raw) // 50:
        return None
    for codec in codecs:
        try:
            text = raw.decode(codec).replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            continue
        return None if "\0" in text else (text, codec.removesuffix("-sig"))
    return None


def _characters(text: str) -> str:
    """Odd spaces, control and zero-width characters away; composed (NFC) where that is no longer."""
    ends = "\f\v\x85\u2028\u2029"
    text = ODD.sub(lambda m: "\n" if m[0] in ends else " " * (unicodedata.category(m[0]) == "Zs"), text)
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    return composed if len(composed) <= len(text) else text


def _conditionals(text: str) -> dict[int, int]:
    """What \\iffalse hides, start to end; only where it holds whole groups, so that no brace loses its partner."""
    spans, stack, depth = {}, [], 0
    names = CONDITIONALS | set(re.findall(r"\\newif\s*\\(if[a-zA-Z@]+)", text))
    for m in BRANCH.finditer(text) if "\\iffalse" in text else ():
        depth += (m[0] == "{") - (m[0] == "}")
        if m[2] in names and not m[1]:
            stack.append([m, depth, None])
        elif m[2] == "else" and stack:
            stack[-1][2] = stack[-1][2] or m
        elif m[2] == "fi" and stack:
            start, outside, other = stack.pop()
            if start[2] == "iffalse" and outside == depth:
                spans[start.start()] = (other or m).end()
                spans.update({m.start(): m.end()} if other else {})
    return spans


def _lex(text: str):
    """(kind, start, end, match) of comments, verbatim and hidden parts, \\input commands and document tags in order."""
    hidden, missing, pos = _conditionals(text), set(), 0
    for m in LEX.finditer(text):
        kind, start, end = m.lastgroup, m.start(), m.end()
        if kind is None or start < pos or (kind == "hidden" and start not in hidden):
            continue
        if kind == "env":
            tag = "\\end{" + m["env"] + "}"
            end = -1 if tag in missing else text.find(tag, end)
            if end < 0:
                missing.add(tag)  # no later one need look for it again
                continue
            end, kind = end + len(tag), "hidden" if m["env"] == "comment" else "verb"
        elif kind == "hidden":
            end = hidden[start]
        elif kind == "comment":
            end = text.find("\n", end)
            end = len(text) if end < 0 else end
        pos = end
        yield kind, start, end, m


def _uncomment(text: str, start: int, end: int) -> tuple[int, str, int]:
    """Where a comment with its blanks starts, what is left of it, and where it ends: TeX joins the lines around it."""
    left = start
    while left and text[left - 1] in " \t":
        left -= 1
    if not left or text[left - 1] == "\n":
        return left, "", end + 1  # it is all of its line
    after = GAP.match(text, end).end()
    line, rest = text[text.rfind("\n", 0, left) + 1 : left].lstrip(), text[after : after + 7]
    if left < start or rest[:1] in ("", "\n", "%") or line.startswith(BLOCK) or rest.startswith(BLOCK):
        return left, "", end
    words = rest[:1].isalpha() and re.search(r"\\[a-zA-Z@]+$", text[max(0, left - 40) : left])
    return left, " " if words else "", after


# ---- projects -------------------------------------------------------------------------------------------------------


def _resolve(target: str, folders: list[str], files: dict[str, str]) -> tuple[str | None, str]:
    """The file that a path stands for, looked for in these folders in order, or None and why there is none."""
    target, why = target.strip(' \t"'), "missing"
    if re.match("/|~|[a-zA-Z]:", target):
        return None, "outside the folder"
    for path in (posixpath.normpath(posixpath.join(folder, target)) for folder in folders):
        for name in (path + ".tex", path):
            if name in files:
                return name, ""
        why = "outside the folder" if path.startswith("../") else why
    return None, why


def _target(m: re.Match, text: str) -> tuple[str, int] | None:
    """The path that an \\input command names and where the command ends; None when it names none (\\input{#1})."""
    first = TARGET.match(text, m.end())
    second = first and TARGET.match(text, first.end()) if "import" in m["input"] else first
    if not second or "#" in first[0] + second[0] or (m["input"] != "input" and None in (first[1], second[1])):
        return None
    return (first[1] or first[2] or "") if second is first else posixpath.join(first[1], second[1]), second.end()


def _above(name: str) -> list[str]:
    """The folders that a file is in, the nearest first."""
    parts = name.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def _links(name: str, text: str, files: dict[str, str]) -> tuple[set[str], bool]:
    """The files that a file includes, seen from its own folder and all above it, and whether it is a document."""
    folders, found, document = _above(name), set(), False
    for kind, _, _, m in _lex(text):
        document |= m["document"] == "begin"
        if kind == "input" and (target := _target(m, text)):
            found.add(_resolve(target[0], folders, files)[0])
    return found - {None, name}, document


def inline(files: dict[str, str], root: str, notes: list[str] | None = None, reached: set[str] | None = None) -> str:
    """One project's source whole: for every \\input and its kin the file's text, of documents their body.

    What cannot be followed (missing, outside the folder, a cycle, more text than an honest project has) is left out
    and named in notes; reached collects the files that were read.
    """
    notes, reached = [] if notes is None else notes, set() if reached is None else reached
    out, busy, room = [], {root}, 1_000_000 + 4 * sum(map(len, files.values()))
    stack = [[root, 0, _lex(files[root]), 0]]  # name, how far the file is read, its further lexemes, its start in out
    while stack:
        name, pos, lexemes, first = frame = stack[-1]
        text, child, stop = files[name], None, len(files[name])
        for kind, start, end, m in lexemes:
            if m["document"] == "begin" and len(stack) > 1:
                del out[first:]  # what stood before was this file's own preamble
                pos = end
            elif (m["document"] and len(stack) > 1) or (
                kind == "endinput" and not text[text.rfind("\n", 0, start) + 1 : start].strip()
            ):
                stop = start
                break
            elif kind == "input" and start >= pos and (target := _target(m, text)):
                child, why = _resolve(target[0], [posixpath.dirname(root), posixpath.dirname(name), ""], files)
                why = "cycle" if child in busy else "too much inlined, left out" if child and room <= 0 else why
                out += [text[pos:start]] if start > pos else []
                pos = target[1]
                if not why:
                    break
                notes.append(f"{name}: {why}: {target[0]}")
                child = None
        if child:
            line = re.compile(r"[ \t]*\n").match(text, pos)  # a blank to TeX, not the end of a paragraph
            frame[1] = line.end() if line else pos
            room -= len(files[child]) + 100
            reached.add(child)
            busy.add(child)
            stack.append([child, 0, _lex(files[child]), len(out)])
            continue
        out += [text[pos:stop]] if stop > pos else []
        stack.pop()
        busy.discard(name)
        if stack and out and out[-1][-1] != "\n":
            out.append("\n")
    return "".join(out)


# ---- cleaning -------------------------------------------------------------------------------------------------------


def _hide(text: str, dropped: Counter) -> tuple[str, list[str]]:
    """The text without comments and hidden parts and with numbered marks for verbatim ones, and the verbatim ones."""
    out, verbatim, pos = [], [], 0
    for kind, start, end, _ in _lex(text):
        what = ""
        if kind == "comment":
            start, what, end = _uncomment(text, start, end)
        elif kind == "verb":
            what = f"\ufdd0{len(verbatim)}\ufdd1"
            verbatim.append(text[start:end])
        elif kind != "hidden":
            continue
        start = max(start, pos)
        dropped["comments"] += end - start if kind != "verb" else 0
        out += text[pos:start], what
        pos = end
    return "".join(out) + text[pos:], verbatim


def _ends(text: str) -> dict[int, int]:
    """Where each closed group, and each closed environment that is to go, ends: by where it starts."""
    ends, braces, opened, names = {}, [], [], Counter()
    for m in PAIR.finditer(text):
        if m[0] == "{":
            braces.append(m.start())
        elif m[0] == "}" and braces:
            ends[braces.pop()] = m.end()
        elif m[1] == "begin":
            opened.append((m[2], m.start()))
            names[m[2]] += 1
        elif m[1] and names[m[2]]:
            name = None
            while name != m[2]:
                name, start = opened.pop()
                names[name] -= 1
            ends[start] = m.end()
    return ends


def _arguments(text: str, pos: int, how: str, ends: dict[int, int]) -> int | None:
    """Where the arguments that start at pos end; None when they are not all there."""
    if how in ("g", "f"):
        m = (DIMENSION if how == "g" else FONT).match(text, pos)
        return m and m.end()
    count, optional = int(how) if how.isdigit() else 0, how != ""
    pos += text.startswith("*", pos)
    while optional or count:
        start = GAP.match(text, pos).end()
        if bracket := optional and text.startswith("[", start):
            end = text.find("]", start, start + 500) + 1
        else:
            word = WORD.match(text, start)
            end = count and (ends.get(start) or (word and word.end()))
        if not end:
            break
        pos, count = end, count - (not bracket)
        optional = bracket and count > 0
    return None if count else pos


def _definition(text: str, name: str, pos: int, ends: dict[int, int]) -> tuple[str, int] | None:
    """What the definition whose arguments start at pos defines, and where it ends; None when it is cut short."""
    m = (LET if name == "let" else DEFINEE).match(text, pos)
    end = m and m.end()
    if m and DEFINED[name] == "=":  # \def\name#1#2{...}
        end = ends.get(text.find("{", end, end + 200))
    elif m and name != "let":
        end = _arguments(text, end, DEFINED[name], ends)
        end = _arguments(text, end, "o", ends) if end and name == "newtheorem" else end
    return (m[0], end) if end else None


def _definitions(text: str, ends: dict[int, int]):
    """(what, start, end) of all definitions, in order."""
    pos = 0
    for m in TOKEN.finditer(text):
        if m.start() >= pos and m[3] in DEFINED and (found := _definition(text, m[3], m.end(), ends)):
            what, pos = found
            yield what, m.start(), pos


def _strip(text: str, dropped: Counter) -> str:
    """The body without what only lays out, draws or indexes; nothing inside formulas and definitions changes."""
    out, ends, copied, pos, depth, last = [], _ends(text), 0, 0, 0, "\n"
    math, unwrapped = [], set()  # open formulas: (what closes it, group depth); braces that go with their command
    for m in TOKEN.finditer(text):
        (token, tag, env, name), (start, end), kind, between = m.group(0, 1, 2, 3), m.span(), None, ""
        if start < pos or (name and name not in KNOWN):
            continue
        within = math and depth <= math[-1][1]  # directly in a formula, not in a group of it
        if token == "}":
            depth -= 1
            while math and math[-1][1] > depth:
                math.pop()
            kind = "layout" if start in unwrapped else None
        elif token[0] == "{":
            if token != "{" and not math:  # {\small ...}: its braces go too, unless they hold an argument
                kind, before = "layout", text[max(0, start - 40) : start].rstrip(" ")
                if start in ends and not re.search(r"[}\]*]$|\\[a-zA-Z@]+$", before):
                    unwrapped.add(ends[start] - 1)
                else:
                    start += 1
            depth += 1
        elif token in ("$", "$$"):
            if not within:
                math.append((token, depth))
            elif math[-1][0] == token:
                math.pop()
        elif token in ("\\[", "\\(") or (tag == "begin" and env in MATH):
            while math and math[-1][0][0] == "$" and depth <= math[-1][1]:
                math.pop()  # a stray dollar
            math.append((env or {"[": "\\]", "(": "\\)"}[token[1]], depth))
        elif token in ("\\]", "\\)") or (tag == "end" and env in MATH):
            found = [i for i in range(max(0, len(math) - 8), len(math)) if math[i][0] == (env or token)]
            del math[found[-1] if found else len(math) :]
        elif token[0] == "\n":
            while math and math[-1][0][0] == "$":  # no formula spans paragraphs: a stray dollar
                math.pop()
        elif name in HEADINGS:
            math.clear()
        elif math:
            continue
        elif tag == "begin" and env in ENVIRONMENT and start in ends:
            kind, end = ENVIRONMENT[env], ends[start]
        elif tag and env in WRAPPER:
            kind, between = "layout", "\n\n" if "figure" in env or "table" in env else "\n"
            end = tag == "begin" and _arguments(text, end, WRAPPER[env], ends) or end
        elif name in DEFINED:
            pos = (_definition(text, name, end, ends) or ("", pos))[1]
        elif name in UNWRAPPED:
            brace = _arguments(text, end, UNWRAPPED[name], ends)
            brace = brace and GAP.match(text, brace).end()
            if brace in ends and text[brace] == "{":
                unwrapped.add(ends[brace] - 1)
                kind, end, depth = "layout", brace + 1, depth + 1
        elif name in COMMAND and (stop := _arguments(text, end, COMMAND[name][1], ends)):
            kind, end, between = COMMAND[name][0], stop, {"layout": " ", "paragraph": "\n\n"}.get(COMMAND[name][0], "")
        if not kind:
            continue
        piece = text[copied:start]
        last, nxt = piece[-1:] or last, text[end : end + 1]
        while last in " \t\n" and text[end : end + 1] == " ":
            end += 1
        if last == "\n":
            end += text[end : end + 1] == "\n"  # nothing else was on its line
            between = "\n" if between == "\n\n" else ""
        elif between == " " and (last in " ([{~" or nxt in ")]},.;:~ \n"):
            between = ""
        elif not between and last.isalpha() and nxt.isalpha():
            between = " " if re.search(r"\\[a-zA-Z@]+$", (piece or out[-2])[-40:]) else ""
        out += piece, between
        dropped["layout" if kind == "paragraph" else kind] += end - start
        last, copied, pos = between[-1:] or last, end, end
    return "".join(out) + text[copied:]


def _tidy(text: str) -> str:
    """Lines without blanks around them, single blanks within, at most one blank line in a row."""
    return re.sub(r"\n{3,}", "\n\n", "\n".join(" ".join(line.split()) for line in text.split("\n"))).strip()


def clean(source: str, dropped: Counter | None = None) -> str:
    """The text of one source (inline it before): definitions of its preamble, then its body, stripped. Never longer.

    dropped: counts the characters dropped, by kind.
    """
    dropped = Counter() if dropped is None else dropped
    text, verbatim = _hide(_characters(source), dropped)
    text, head = _tidy(text), ""
    if begin := re.search(r"\\begin *\{document\}", text):
        head, text = text[: begin.start()], text[begin.end() :]
        kept = [head[i:j] for what, i, j in _definitions(head, _ends(head)) if "@" not in what]  # no internals
        dropped["preamble"] += len(head) - sum(map(len, kept))
        head = "\n".join(kept) + "\n\n"
    if finish := re.search(r"\\end *\{document\}", text):
        dropped["after the end"] += len(text) - finish.end()
        text = text[: finish.start()]
    text = _tidy(head + _strip(text, dropped))
    text = re.sub("\ufdd0(\\d+)\ufdd1", lambda m: verbatim[int(m[1])], text).strip()
    plain = re.sub("[ﬀ-ﬆ]", lambda m: LIGATURES[m[0]], text)
    return plain if len(plain) <= len(source) else text


# ---- documents ------------------------------------------------------------------------------------------------------


def split(text: str, most: int) -> list[str]:
    """Pieces of at most that many characters: cut before the coarsest headings that do, then paragraphs, lines, words.

    Joined they are the text, up to white space. A word longer than most stays whole.
    """
    pieces = [text.strip()]
    for cut in [*(rf"\n(?=\\{name}\b)" for name in HEADINGS), r"\n\n", r"\n", r"\s"]:
        done = []
        for piece in pieces:
            start = end = 0  # of what is being filled
            for at in [m.start() for m in re.finditer(cut, piece) if len(piece) > most] + [len(piece)]:
                if at - start > most and end > start:
                    done.append(piece[start:end].strip())
                    start = end
                end = at
            done.append(piece[start:].strip())
        pieces = [piece for piece in done if piece]
    return pieces


def _tells(text: str, main: bool) -> bool:
    """Whether there is text beside the definitions: any in a document, sentences, formulas or lists in a fragment."""
    ends, kept, pos = _ends(text), [], 0
    for _, start, end in _definitions(text, ends):
        kept.append(text[pos:start])
        pos = end
    rest = "".join(kept) + text[pos:]
    if main:
        return bool(re.search(r"[^\W_]", WORD.sub("", rest)))
    ends, kept, pos = _ends(rest), [], 0
    for start in sorted(ends):  # the arguments of commands are no sentences
        if start >= pos and rest[start] == "{":
            kept.append(rest[pos:start])
            pos = ends[start]
    return bool(PROSE.search(OPTIONS.sub("|", "".join(kept) + rest[pos:])))


def corpus(files: dict[str, bytes], most: int = 50_000) -> tuple[list[tuple[str, str]], list[FileReport]]:
    """Documents, (name, text) in pieces of at most that many characters, and a report on each file, by name."""
    reports = {name: FileReport(name) for name in sorted(files)}
    sources = {name: files[name] for name in reports if name.lower().endswith(".tex")}
    texts, declares, documents = {}, {}, []
    for name, raw in sources.items():
        if m := DECLARED.search(raw):
            declares[posixpath.dirname(name)] = ENCODINGS.get(m[1].decode("ascii", "replace"))
    for name, report in reports.items():
        otherwise = next((declares[folder] for folder in _above(name) if folder in declares), None)
        if found := name in sources and decode(files[name], otherwise):
            (texts[name], report.encoding), report.characters = found, len(found[0])
        else:
            report.fate = "dropped: binary" if name in sources else "dropped: not .tex"
    links = {name: _links(name, text, texts) for name, text in texts.items()}
    included = set().union(*(found for found, _ in links.values()))
    mains = [name for name, (_, main) in links.items() if main and not SUBFILE.search(texts[name])]
    order = [n for n in mains if n not in included] + [n for n in links if n not in included] + mains + list(links)
    for name in dict.fromkeys(order):
        report, reached = reports[name], set()
        if report.fate:
            continue
        source = inline(texts, name, report.notes, reached)
        text = clean(source, report.dropped)
        if text.count("{") - text.count("\\{") != text.count("}") - text.count("\\}"):
            report.notes.append(f"{name}: unbalanced braces")
        for other in reached:
            reports[other].fate = reports[other].fate or f"inlined into {name}"
        report.fate = "root" if name in mains else "fragment"
        if not _tells(text, name in mains):
            report.fate = "dropped: nothing but preamble/macros" if source.strip() else "dropped: empty"
            continue
        report.kept, pieces = len(text), split(text, most)
        documents += [(f"{name}#{i}" if len(pieces) > 1 else name, piece) for i, piece in enumerate(pieces, 1)]
    return documents, list(reports.values())
