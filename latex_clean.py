r"""One LaTeX source as training text: what prints no words is stripped, mathematics stays as it is.

Macros are not expanded: a document keeps its own definitions as text. Every pass is linear and none recurses on
nesting: where an argument or an environment ends is read off a table of pairs, and what has no end is left as it is.
"""

import re
import unicodedata
from collections import Counter, defaultdict

# ---- names ----------------------------------------------------------------------------------------------------------


def table(words: str) -> dict[str, str]:
    """{name: label} of words "label: name name label: name"."""
    parts = re.split(r"(\S+):\s", words)[1:]
    return {name: label for label, names in zip(parts[::2], parts[1::2], strict=True) for name in names.split()}


def kinds(words: str) -> dict[str, tuple[str, str]]:
    """{name: (kind, signature)} of words with labels "kind:" or "kind/signature:"."""
    return {name: tuple(label.partition("/")[::2]) for name, label in table(words).items()}


# Commands by kind and signature: the number of arguments, then o for an optional one after them; or g: a dimension,
# f: a font, =: the parameters and body of a definition, l: what a \let copies. Of the kind "unwrapped" the text stays,
# definitions stay untouched, all others go.
COMMANDS = kinds("""
    layout: noindent indent centering center raggedright raggedleft maketitle titlepage listoffigures listoftables
    parttoc minitoc hfill hfil phantomsection frontmatter mainmatter backmatter tiny scriptsize footnotesize small
    normalsize large Large LARGE huge Huge selectfont sloppy fussy onecolumn makeatletter makeatother normalcolor
    allowbreak strut samepage pause hrule
    layout/1: vspace hspace enlargethispage pagestyle thispagestyle pagenumbering stepcounter refstepcounter newlength
    newcounter linespread markright captionsetup hypersetup usepackage RequirePackage color tikzset usetikzlibrary
    tikzcdset lstset theoremstyle graphicspath externaldocument fancyhead fancyfoot lhead chead rhead lfoot cfoot rfoot
    showthe layout/3: addcontentsline definecolor layout/f: font
    layout/2: setlength addtolength setcounter addtocounter settowidth addtocontents fontsize markboth rule numberwithin
    layout/o: pagebreak nopagebreak linebreak tableofcontents twocolumn allowdisplaybreaks
    layout/g: hskip kern baselineskip parskip parindent hsize vsize textwidth textheight topmargin oddsidemargin
    evensidemargin leftskip rightskip tabcolsep fboxrule fboxsep itemsep hoffset voffset unitlength topskip parsep
    paragraph: par bigskip medskip smallskip newpage clearpage cleardoublepage vfill vfil eject paragraph/g: vskip
    graphics/1: includegraphics includesvg includepdf epsfig epsfbox psfig special tikz
    bibliography/1: bibliography bibliographystyle nocite addbibresource bibliography/o: printbibliography
    index: printglossaries makeglossaries index/1: index glossary index/o: printindex makeindex printglossary
    unwrapped: centerline leftline rightline unwrapped/1: scalebox rotatebox textcolor unwrapped/2: resizebox
    definition: declaretheorem definition/=: def gdef edef xdef definition/l: let definition/1o: newtheorem
    definition/1: newcommand renewcommand providecommand DeclareRobustCommand DeclareMathOperator
    definition/2: DeclarePairedDelimiter NewDocumentCommand RenewDocumentCommand ProvideDocumentCommand
    DeclareDocumentCommand newenvironment renewenvironment definition/3: NewDocumentEnvironment""")
DEFINING = [name for name, (kind, _) in COMMANDS.items() if kind == "definition"]
ENVIRONMENTS = table("""
    graphics: tikzpicture pgfpicture asy asydef picture pspicture xy chart axis circuitikz overpic mpost feynmandiagram
    bibliography: thebibliography index: theindex file: filecontents""")  # these go with everything in them
TAGS = kinds("""
    float/o: figure table sidewaysfigure sidewaystable threeparttable float/1: subfigure subtable
    float/2: wrapfigure wraptable block/1: minipage spacing multicols adjustbox block/2: adjustwidth block/o: center
    block: document flushleft flushright titlepage titlingpage landscape raggedleft raggedright""")  # only the tags go
BETWEEN = {"layout": " ", "paragraph": "\n\n", "float": "\n\n", "block": "\n"}  # what takes the place of a kind
COUNTED = ("graphics", "bibliography", "index")  # by their own names, all others as layout
HEADINGS = "part chapter section subsection subsubsection paragraph".split()  # the coarsest first
CONDITIONALS = set("""if ifcat ifnum ifdim ifodd ifvmode ifhmode ifmmode ifinner ifvoid ifhbox ifvbox ifx ifeof iftrue
    iffalse ifcase ifdefined ifcsname iffontchar ifpdf ifxetex ifluatex""".split())  # fmt: skip

# ---- patterns -------------------------------------------------------------------------------------------------------

VERBATIM = r"verbatim\*?|Verbatim\*?|BVerbatim|alltt|lstlisting|minted|spverbatim|comment"
MATH = "equation|align|gather|multline|eqnarray|displaymath|math|alignat|flalign|IEEEeqnarray|tikzcd|CD"
SIZES = "tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|centering|raggedright"
END = "(?![a-zA-Z@])"  # of a command's name
LEX = re.compile(
    rf"\\(?:begin[ \t]*\{{(?P<verbatim>{VERBATIM})\}}|(?P<document>begin|end)[ \t]*\{{document\}}"
    rf"|(?P<verb>(?:verb|lstinline|mintinline\{{\w{{1,40}}\}}){END}\*?(?:\[[^][\n]{{0,200}}\])?"
    r"(?:(?P<bar>[^\sa-zA-Z*{\\])[^\n]{0,200}?(?P=bar)|\{[^{}\n]{0,2000}\})"
    r"|(?:url|path|nolinkurl|href)[ \t]*\{[^{}\n]{0,2000}\})"
    rf"|(?P<hidden>iffalse|fi){END}|(?P<endinput>endinput){END}"
    rf"|(?P<input>input|include|subfile|subfileinclude|import|subimport){END}|[\\%])|(?P<comment>%[^\n]*)"
)
NEW_CONDITIONAL = r"\\newif\s*\\(if[a-zA-Z@]+)"
BRANCH = rf"(?s){NEW_CONDITIONAL}|\\(?:(?P<name>if[a-zA-Z@]*|else|fi){END}|.)|%[^\n]*|[{{}}]"
PAIR = rf"\\(?:(?P<tag>begin|end)[ \t]*\{{(?P<name>{'|'.join(ENVIRONMENTS)})\*?\}}|[\\{{}}])|[{{}}]"
DEFINITION = rf"(?s)\\(?:({'|'.join(DEFINING)}){END}|.)"
TOKEN = (
    rf"(?s)\\(?:(?P<formula>[\[(]|begin[ \t]*\{{(?P<math>{MATH})\*?\}})"
    rf"|(?P<formula_end>[])]|end[ \t]*\{{(?P<math_end>{MATH})\*?\}})"
    r"|begin[ \t]*\{(?P<begin>[^{}\n*]*)\*?\}|end[ \t]*\{(?P<end>[^{}\n*]*)\*?\}"
    rf"|(?P<heading>{'|'.join(HEADINGS)}){END}|(?P<command>[a-zA-Z@]+)|.)|(?P<dollar>\$\$?)|(?P<paragraph>\n[ \t]*\n)"
    rf"|(?P<sized_group>\{{\s*\\(?:{SIZES}){END}\s*)|(?P<group>\{{)|(?P<group_end>\}})"
)
DEEPER = {"group": 1, "sized_group": 1, "group_end": -1}  # how tokens change the depth of groups
WORD = r"\\[a-zA-Z@]+"
WORD_AT_END = re.compile(WORD + "$")
GAP = re.compile(r"[ \t]*\n?[ \t]*")
ARGUMENT_START = re.compile(rf"{GAP.pattern}(?P<word>{WORD})?")
BLOCK = re.compile(r"[ \t]*\\(?:begin|end|item|[][])")  # where TeX ignores a line end
AFTER_COMMENT = re.compile(rf"{GAP.pattern}(?P<apart>\Z|[\n%]|{BLOCK.pattern})?")
OPTIONAL = r"(?:[ \t]*\n?[ \t]*\[[^]]{0,498}\])"
OPTIONAL_ARGUMENT, OPTIONAL_ARGUMENTS = re.compile(OPTIONAL + "?"), re.compile(OPTIONAL + "*")
ARGUMENT_BEFORE = r"(?:[}\]*]|\\[a-zA-Z@]+)$"  # of a group: it may be the argument of a command
DEFINEE = re.compile(r"\*?[ \t]*(?:\{\s*\\?[^{}\n]*\}|\\(?:[a-zA-Z@]+|.))")
INTERNAL = re.compile(r"\\[a-zA-Z]+\*?[ \t]*(?:\{\s*\\?[^{}\n]*@|\\[a-zA-Z]*@)")  # a definition of a name with @
SIZE = r"[ \t]*-?[ \t]*(?:[\d.,]*\\[a-zA-Z@]+|[\d.,]+[ \t]*(?:true[ \t]*)?(?:p[tc]|[cm]m|in|ex|em|bp|dd|cc|sp|mu|fil+))"
PLAIN_ARGUMENT = {  # by signature: what is not in braces
    "g": rf"[ \t]*=?{SIZE}(?:[ \t]*(?:plus|minus){SIZE}){{0,2}}",
    "f": r"[ \t]*\\[a-zA-Z]+[ \t]*=?[ \t]*[\w\-]+(?:[ \t]+(?:scaled|at)[ \t]*[\w.\\]+)?",
    "l": r"[ \t]*=?[ \t]?(?:\\(?:[a-zA-Z@]+|.)|\S)",
}
PARAMETERS = re.compile(r"[^{]{0,199}")
SPACES = "[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]"
CONTROLS = r"\x00-\x08\r-\x1f\x7f-\x84\x86-\x9f\xad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
NO_TEXT = rf"[{CONTROLS}\ud800-\udfff\ufdd0-\ufdef\ufeff\ufff9-\uffff]"  # those, zero-width ones, and no characters

# ---- lexing ------------------------------------------------------------------------------------------------------


def _hidden(text):
    """What \\iffalse hides, {start: end}: only where it holds whole groups, so that no brace loses its partner."""
    hidden, conditionals, depth = {}, [], 0
    if "\\iffalse" not in text:
        return hidden
    names = CONDITIONALS | set(re.findall(NEW_CONDITIONAL, text))
    for m in re.finditer(BRANCH, text):
        depth += (m[0] == "{") - (m[0] == "}")
        if m["name"] in names:
            conditionals.append([m, depth, None])
        elif m["name"] == "else" and conditionals:
            conditionals[-1][2] = conditionals[-1][2] or m
        elif m["name"] == "fi" and conditionals:
            begin, outside, other = conditionals.pop()
            if begin["name"] == "iffalse" and outside == depth:
                hidden[begin.start()] = (other or m).end()
                if other:  # what is between \else and \fi stays
                    hidden[m.start()] = m.end()
    return hidden


def lex(text: str):
    """(kind, start, end, match) of comments, verbatim and hidden parts, \\input commands and document tags in order."""
    hidden, unclosed = _hidden(text), set()
    m = LEX.search(text)
    while m:
        kind, start, end = m.lastgroup, m.start(), m.end()
        if kind == "hidden":
            end = hidden.get(start)
        elif kind == "verbatim":
            kind = "hidden" if m["verbatim"] == "comment" else "verb"
            tag = f"\\end{{{m['verbatim']}}}"
            close = -1 if tag in unclosed else text.find(tag, end)
            end = close + len(tag) if close >= 0 else None
            if not end:
                unclosed.add(tag)  # no later one need look for it again: that would take quadratic time
        if kind and end:
            yield kind, start, end, m
        m = LEX.search(text, end or m.end())


def _uncomment(text, start, end):
    """Where a comment with its blanks starts, what is left of it, and where it ends: TeX joins the lines around it."""
    line = text.rfind("\n", 0, start) + 1
    left = line + len(text[line:start].rstrip(" \t"))
    if left == line:  # it is all of its line
        return left, "", end + 1
    after = AFTER_COMMENT.match(text, end)
    if left < start or after["apart"] is not None or BLOCK.match(text, line):
        return left, "", end
    end = after.end()
    glued = text[end].isalpha() and WORD_AT_END.search(text, max(0, left - 40), left)  # \Phi% and a: not \Phia
    return left, " " if glued else "", end


def _hide(text, dropped):
    """The text without comments and hidden parts and with numbered marks for verbatim ones, and the verbatim ones."""
    out, verbatim, position = [], [], 0
    for kind, start, end, _ in lex(text):
        left = ""
        if kind == "verb":
            left = f"\ufdd0{len(verbatim)}\ufdd1"
            verbatim.append(text[start:end])
        elif kind == "comment":
            start, left, end = _uncomment(text, start, end)
        elif kind != "hidden":
            continue
        start = max(start, position)
        dropped["comments"] += 0 if kind == "verb" else end - start
        out += [text[position:start], left]
        position = end
    return "".join(out) + text[position:], verbatim


# ---- arguments and definitions --------------------------------------------------------------------------------------


def ends_of(text: str) -> dict[int, int]:
    """Where each closed group, and each closed environment that is to go, ends: by where it starts."""
    ends, opened = {}, defaultdict(list)
    for m in re.finditer(PAIR, text):
        starts = opened[m["name"]]  # None: of braces
        if m[0] == "{" or m["tag"] == "begin":
            starts.append(m.start())
        elif starts and (m[0] == "}" or m["tag"]):
            ends[starts.pop()] = m.end()
    return ends


def _arguments_end(text, position, signature, ends):
    """Where the arguments that start at a position end; None when they are not all there. ends: those of `ends_of`."""
    if signature in PLAIN_ARGUMENT:
        m = re.compile(PLAIN_ARGUMENT[signature]).match(text, position)
        return m and m.end()
    if signature == "=":  # \def\name#1#2{...}
        return ends.get(PARAMETERS.match(text, position).end())
    position += text.startswith("*", position)
    if signature[:1].isdigit():
        position = OPTIONAL_ARGUMENTS.match(text, position).end()
        for _ in range(int(signature[0])):
            m = ARGUMENT_START.match(text, position)
            position = m.end() if m["word"] else ends.get(m.end())
            if position is None:
                return None
    return OPTIONAL_ARGUMENT.match(text, position).end() if signature.endswith("o") else position


def _definition_end(text, name, position, ends):
    """Where the definition whose arguments start at a position ends; None when it is cut short."""
    definee = DEFINEE.match(text, position)
    return definee and _arguments_end(text, definee.end(), COMMANDS[name][1], ends)


def definitions(text: str):
    """(start, end) of all definitions, in order."""
    ends, position = ends_of(text), 0
    for m in re.finditer(DEFINITION, text):
        end = m[1] and m.start() >= position and _definition_end(text, m[1], m.end(), ends)
        if end:
            position = end
            yield m.start(), end


# ---- cleaning -------------------------------------------------------------------------------------------------------


def _follow(m, formulas, depth):
    """Read one TOKEN: the depth of groups after it. A formula without end harms no more than its paragraph or section.

    formulas: the list of those that are open, each as (what closes it, the depth of groups it is in).
    """
    kind = m.lastgroup
    depth += DEEPER.get(kind, 0)
    while formulas:
        close, outside = formulas[-1]
        stray = close[0] == "$" and (kind == "paragraph" or (kind == "formula" and outside == depth))
        if outside <= depth and kind != "heading" and not stray:
            break
        formulas.pop()
    if kind == "formula":
        formulas.append((m["math"] or {"[": "]", "(": ")"}[m[0][1]], depth))
    elif kind == "formula_end":
        close = m["math_end"] or m[0][1]
        if close in [recent for recent, _ in formulas[-8:]]:
            while formulas.pop()[0] != close:
                pass
    elif kind == "dollar":
        if not formulas or formulas[-1][1] < depth:  # the latter in a group of a formula: \text{if $a$}
            formulas.append((m[0], depth))
        elif formulas[-1][0] == m[0]:
            formulas.pop()
    return depth


def _cuts(text):
    """(kind, start, end) of all that only lays out, draws or indexes, in order; of formulas and definitions nothing."""
    ends, formulas, depth, position = ends_of(text), [], 0, 0
    wrapped = set()  # closing braces that go because their opening ones went
    for m in re.finditer(TOKEN, text):
        token, command, start, end = m.lastgroup, m["command"], m.start(), m.end()
        if token is None or start < position or (command and command not in COMMANDS):
            continue
        depth = _follow(m, formulas, depth)
        if formulas and start not in wrapped:
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
            position = _definition_end(text, command, end, ends) or position
        elif kind == "unwrapped":
            brace = _arguments_end(text, end, signature, ends)
            brace = brace and GAP.match(text, brace).end()
            if brace in ends and text[brace] == "{":
                wrapped.add(ends[brace] - 1)
                depth += 1
                cut_end = brace + 1
        elif begin in ENVIRONMENTS:
            kind, cut_end = ENVIRONMENTS[begin], ends.get(start)
        elif command or begin in TAGS:
            cut_end = _arguments_end(text, end, signature, ends)
        if cut_end:
            position = cut_end
            yield kind, start, position


def _strip(text, dropped):
    """The body without its cuts. The white space around a cut is joined, and no letter becomes part of a command."""
    out, copied, written = [], 0, "\n"  # written: the end of what is in out
    for kind, start, end in _cuts(text):
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
        elif not between and before.isalpha() and after.isalpha() and WORD_AT_END.search(written):
            between = " "
        out += [piece, between]
        written += between
        dropped[kind if kind in COUNTED else "layout"] += end - start
        copied = end
    return "".join(out) + text[copied:]


def _tidy(text):
    """Lines without blanks around them, single blanks within, at most one blank line in a row."""
    lines = [" ".join(line.split()) for line in text.split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def clean(source: str, dropped: Counter) -> str:
    """The text of one source (inline it before): definitions of its preamble, then its body, stripped. Never longer.

    dropped: counts the characters dropped, by kind.
    """
    # Odd spaces, control and zero-width characters go; characters are composed (NFC) where that is no longer.
    text = re.sub(SPACES, " ", re.sub("[\f\v\x85\u2028\u2029]", "\n", source))
    text = re.sub(NO_TEXT, "", text)
    text = min(unicodedata.normalize("NFC", text), text, key=len)

    text, verbatim = _hide(text, dropped)
    *preamble, body = re.split(r"\\begin *\{document\}", _tidy(text), maxsplit=1)
    macros = ""
    for part in preamble:
        kept = [part[i:j] for i, j in definitions(part) if not INTERNAL.match(part, i)]
        dropped["preamble"] += len(part) - sum(map(len, kept))
        macros = "\n".join(kept) + "\n\n"
    body, *after = re.split(r"\\end *\{document\}", body, maxsplit=1)
    for part in after:
        dropped["after the end"] += len(part)
    text = _tidy(macros + _strip(body, dropped))
    text = re.sub("\ufdd0(\\d+)\ufdd1", lambda mark: verbatim[int(mark[1])], text).strip()
    plain = re.sub("[\ufb00-\ufb06]", lambda ligature: unicodedata.normalize("NFKC", ligature[0]), text)
    return plain if len(plain) <= len(source) else text
