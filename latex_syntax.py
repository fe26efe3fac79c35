"""LaTeX as far as it must be known: commands and their arguments, definitions, and where a group ends."""

import re
from collections import defaultdict

# ---- names ----------------------------------------------------------------------------------------------------------


def table(words: str) -> dict[str, str]:
    """{name: label} of words "label: name name label: name"."""
    parts = re.split(r"(\S+):\s", words)[1:]
    return {name: label for label, names in zip(parts[::2], parts[1::2], strict=True) for name in names.split()}


def kinds(words: str) -> dict[str, tuple[str, str]]:
    """{name: (kind, signature)} of words with labels "kind:" or "kind/signature:"."""
    return {name: tuple(label.partition("/")[::2]) for name, label in table(words).items()}


# Commands by kind and signature: the number of arguments, then o for an optional one after them; or g: a dimension,
# f: a font, w: a stream and its file, =: the parameters and body of a definition, l: what a \let copies. Of the kind
# "unwrapped" the text stays, definitions stay untouched, all others go.
COMMANDS = kinds("""
    layout: noindent indent centering center raggedright raggedleft maketitle titlepage listoffigures listoftables
    parttoc minitoc hfill hfil phantomsection frontmatter mainmatter backmatter tiny scriptsize footnotesize small
    normalsize large Large LARGE huge Huge selectfont sloppy fussy onecolumn makeatletter makeatother normalcolor
    allowbreak strut samepage pause hrule immediate listfiles nofiles
    layout/1: vspace hspace enlargethispage pagestyle thispagestyle pagenumbering stepcounter refstepcounter newlength
    newcounter linespread markright captionsetup hypersetup usepackage RequirePackage color tikzset usetikzlibrary
    tikzcdset lstset theoremstyle graphicspath externaldocument fancyhead fancyfoot lhead chead rhead lfoot cfoot rfoot
    show showthe typeout message errmessage wlog errhelp pdfinfo layout/=: write layout/l: closeout closein
    layout/w: openout openin layout/f: font
    layout/3: addcontentsline definecolor PackageError ClassError layout/4: GenericError
    layout/2: PackageWarning PackageWarningNoLine PackageInfo ClassWarning ClassWarningNoLine ClassInfo GenericInfo
    GenericWarning pdfbookmark currentpdfbookmark subpdfbookmark belowpdfbookmark
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
    bibliography: thebibliography index: theindex""")  # these go with everything in them
TAGS = kinds("""
    float/o: figure table sidewaysfigure sidewaystable threeparttable float/1: subfigure subtable
    float/2: wrapfigure wraptable block/1: minipage spacing multicols adjustbox block/2: adjustwidth block/o: center
    block: document flushleft flushright titlepage titlingpage landscape raggedleft raggedright""")  # only the tags go

# ---- patterns -------------------------------------------------------------------------------------------------------

END = "(?![a-zA-Z@])"  # of a command's name
PAIR = rf"\\(?:(?P<tag>begin|end)[ \t]*\{{(?P<name>{'|'.join(ENVIRONMENTS)})\*?\}}|[\\{{}}])|[{{}}]"
DEFINITION = rf"(?s)\\(?:({'|'.join(DEFINING)}){END}|.)"
WORD = r"\\[a-zA-Z@]+"
GAP = re.compile(r"[ \t]*\n?[ \t]*")
ARGUMENT_START = re.compile(rf"{GAP.pattern}(?P<word>{WORD})?")
OPTIONAL = r"(?:[ \t]*\n?[ \t]*\[[^]]{0,498}\])"
OPTIONAL_ARGUMENT, OPTIONAL_ARGUMENTS = re.compile(OPTIONAL + "?"), re.compile(OPTIONAL + "*")
DEFINEE = re.compile(r"\*?[ \t]*(?:\{\s*\\?[^{}\n]*\}|\\(?:[a-zA-Z@]+|.))")
SIZE = r"[ \t]*-?[ \t]*(?:[\d.,]*\\[a-zA-Z@]+|[\d.,]+[ \t]*(?:true[ \t]*)?(?:p[tc]|[cm]m|in|ex|em|bp|dd|cc|sp|mu|fil+))"
PLAIN_ARGUMENT = {  # by signature: what is not in braces
    "g": rf"[ \t]*=?{SIZE}(?:[ \t]*(?:plus|minus){SIZE}){{0,2}}",
    "f": r"[ \t]*\\[a-zA-Z]+[ \t]*=?[ \t]*[\w\-]+(?:[ \t]+(?:scaled|at)[ \t]*[\w.\\]+)?",
    "w": r"[ \t]*(?:\d+|\\[a-zA-Z@]+)[ \t]*=?[ \t]*(?:\\jobname)?[^\s{}\\]*",
    "l": r"[ \t]*=?[ \t]?(?:\\(?:[a-zA-Z@]+|.)|\S)",
}
PARAMETERS = re.compile(r"[^{]{0,199}")

# ---- arguments and definitions --------------------------------------------------------------------------------------


def without(text: str, spans) -> str:
    """The text without its parts (start, end), which come in order of their starts."""
    kept, position = [], 0
    for start, end in spans:
        kept.append(text[position:start])
        position = max(position, end)
    return "".join(kept) + text[position:]


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


def arguments_end(text, position, signature, ends):
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


def definition_end(text, name, position, ends):
    """Where the definition whose arguments start at a position ends; None when it is cut short."""
    definee = DEFINEE.match(text, position)
    return definee and arguments_end(text, definee.end(), COMMANDS[name][1], ends)


def definitions(text: str, ends: dict[int, int] | None = None):
    """(start, end) of all definitions, in order. ends: those of `ends_of`."""
    ends, position = ends or ends_of(text), 0
    for m in re.finditer(DEFINITION, text):
        end = m[1] and m.start() >= position and definition_end(text, m[1], m.end(), ends)
        if end:
            position = end
            yield m.start(), end
