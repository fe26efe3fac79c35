r"""What TeX prints is learned, and nothing else: sources as authors write them, with words that say which is which.

Each source is a project. TeX prints its words PRINTED1, PRINTED2 ... in that order and no word UNPRINTED; the scan of
the result knows no LaTeX but braces, \if and \fi.
"""

import re
from collections import Counter

import pytest

import latex
import latex_clean

LEAD = "Let $G$ be a finite group, and let $p$ divide its order; then $G$ has an element of order $p$.\n"
PRINTED = re.compile(r"(?<!UN)PRINTED\d")
END = "Hence $|G| = p^k m$ for some $m$.\n"


def paper(text: str, preamble: str = "", kind: str = "article") -> str:
    return f"\\documentclass{{{kind}}}\n{preamble}\n\\begin{{document}}\n{LEAD}\n{text}\n\n{END}\\end{{document}}\n"


SOURCES = {  # name: the files, of which main.tex is the root; or main.tex alone
    # numbers
    "if0": paper(
        "\\if0\nUNPRINTED $a$\n\\fi\nPRINTED1\n\\if 0 UNPRINTED\\else PRINTED2\\fi\n\\if1 UNPRINTED\\fi PRINTED3"
    ),
    "two digits": paper("\\if00PRINTED1\\else UNPRINTED\\fi\n\\if01UNPRINTED\\fi PRINTED2 \\if11 PRINTED3\\fi"),
    "ifnum": paper(
        "\\ifnum0=1 UNPRINTED\\fi PRINTED1\n\\ifnum 1>0 PRINTED2\\else UNPRINTED\\fi\n\\ifnum1 < 0\nUNPRINTED\n"
        "\\fi PRINTED3"
    ),
    "ifodd and ifcase": paper(
        "\\ifodd 1 PRINTED1\\else UNPRINTED\\fi \\ifcase1 UNPRINTED\\or PRINTED2\\or UNPRINTED\\else UNPRINTED\\fi"
        " \\ifcase7 UNPRINTED\\else PRINTED3\\fi"
    ),
    "unless": paper("\\unless\\iffalse PRINTED1\\else UNPRINTED\\fi \\unless\\iftrue UNPRINTED\\fi PRINTED2"),
    "blinded template": paper(
        "\\if0\\blind{\\title{PRINTED1}}\\fi\n\\if1\\blind{\\title{UNPRINTED}}\\fi PRINTED2", "\\newcommand{\\blind}{0}"
    ),
    "version number": paper("\\ifnum\\version=2 PRINTED1\\else UNPRINTED\\fi", "\\def\\version{2}"),
    # flags
    "newif": paper(
        "\\ifsol UNPRINTED $x$\\else PRINTED1\\fi \\ifdraft PRINTED2\\fi \\draftfalse \\ifdraft UNPRINTED\\fi PRINTED3",
        "\\newif\\ifsol \\solfalse\n\\newif\\ifdraft\n\\drafttrue",
    ),
    "a flag of a group": paper(
        "{\\atrue \\ifa PRINTED1\\fi} \\ifa UNPRINTED\\fi {\\global\\btrue} \\ifb PRINTED2\\fi", "\\n"
        "ewif\\ifa\\newif\\ifb"
    ),
    "a flag that a macro may set": paper(
        "\\ifa PRINTED1\\else PRINTED2\\fi", "\\newif\\ifa\n\\newcommand{\\long}{\\atrue}\n\\AtBeginDocument{\\long}"
    ),
    "a flag under a test": paper(
        "\\ifa PRINTED1\\else PRINTED2\\fi", "\\newif\\ifa\n\\ifdefined\\solutions\\atrue\\fi\n% \\afalse"
    ),
    "a flag set in a file": {
        "main.tex": paper("\\ifa PRINTED1 \\input{part}\\fi \\ifb UNPRINTED\\fi", "\\newif\\ifa\\n"
        "ewif\\ifb\\input{set}"),
        "set.tex": "\\atrue % \\btrue\n",
        "part.tex": "PRINTED2",
    },
    "a flag of a style file": {
        "main.tex": paper("\\ifa PRINTED1\\fi \\hide{UNPRINTED}\\ifb UNPRINTED\\fi", "\\usepackage{own}"),
        "own.sty": "\\RequirePackage{deeper}\\newif\\ifa \\atrue\n\\newcommand{\\hide}[1]{}",
        "deeper.sty": "\\newif\\ifb",
    },
    "a flag of an absent style file": paper("\\iflong PRINTED1\\else PRINTED2\\fi", "\\usepackage{gone}"),
    "aliases": paper(
        "\\iflong UNPRINTED\\else PRINTED1\\fi \\ifshort PRINTED2\\else UNPRINTED\\fi \\ifarxiv UNPRINTED\\fi",
        "\\let\\iflong\\iffalse \\let\\ifshort=\\iftrue \\def\\ifarxiv{\\iffalse}",
    ),
    "booleans": paper(
        "\\ifthenelse{\\boolean{a}}{PRINTED1}{UNPRINTED} \\ifthenelse{\\NOT\\boolean{a}}{UNPRINTED}{PRINTED2}"
        " \\ifthenelse{\\isodd{\\value{page}}}{PRINTED3}{PRINTED4}",
        "\\usepackage{ifthen}\\newboolean{a}\\setboolean{a}{true}",
    ),
    "toggles": paper(
        "\\iftoggle{a}{UNPRINTED}{PRINTED1} \\toggletrue{a}\\iftoggle{a}{PRINTED2}{UNPRINTED}"
        " \\iftoggle{b}{PRINTED3}{}",
        "\\usepackage{etoolbox}\\newtoggle{a}",
    ),
    # nesting
    "nested, with names nobody knows": paper(
        "\\iffalse UNPRINTED \\iflongversion UNPRINTED\\else UNPRINTED\\fi UNPRINTED $a \\iff b$"
        " \\ifstrempty{}{x}{y}\\fi PRINTED1"
    ),
    "tests that are not decided": paper(
        "\\ifx\\ifpdf\\undefined PRINTED1\\fi \\ifpdf PRINTED2\\else PRINTED3\\fi \\ifdefined\\x PRINTED4\\fi"
        " \\ifcsname x\\endcsname PRINTED5\\fi \\iffalse UNPRINTED\\fi"
    ),
    "half groups": paper("\\iffalse UNPRINTED { \\fi PRINTED1 {PRINTED2 \\iffalse UNPRINTED } \\fi}"),
    "verbatim and comments": paper(
        "\\begin{verbatim}\n\\iffalse\n\\end{verbatim}\nPRINTED1 \\verb|\\fi| PRINTED2 \\iffalse UNPRINTED %"
        " \\fi\nUNPRINTED\\fi"
    ),
    "definitions are not executed": paper(
        "\\sol{PRINTED1}", "\\newcommand{\\sol}[1]{\\ifx#1\\empty none\\else #1\\fi}\n\\newcommand{\\stop}{\\fi}"
    ),
    # macros
    "macros that print nothing": paper(
        "\\hide{UNPRINTED $x$ {a}} PRINTED1 \\comment{UNPRINTED} \\todo{UNPRINTED}{UNPRINTED} \\note{PRINTED2}"
        " \\skipped UNPRINTED \\endskipped",
        "\\newcommand{\\hide}[1]{}\n\\long\\def\\comment#1{}\n\\newcommand{\\todo}[2]{\\hide{#1}}\n"
        "\\providecommand{\\note}[1]{}\n\\long\\def\\skipped#1\\endskipped{}",
    ),
    "a macro under a flag": paper(
        "\\todo{UNPRINTED} PRINTED1 \\drafttrue \\todo{PRINTED2}",
        "\\newif\\ifdraft\n\\newcommand{\\todo}[1]{\\ifdraft\\textbf{#1}\\fi}",
    ),
    # environments
    "comment": paper(
        "PRINTED1\\begin{comment} UNPRINTED\nUNPRINTED\n\\end{comment} UNPRINTED\nPRINTED2", "\\usepackage{verbatim}"
    ),
    "a theorem called comment": paper("\\begin{comment}\nPRINTED1\n\\end{comment}", "\\newtheorem*{comment}{Comment}"),
    "excluded and included": paper(
        "\\begin{hint}\nUNPRINTED $x$\n\\end{hint}\n\\begin{sol}\nPRINTED1\n\\end{sol}\n\\begin{comment}\n"
        "UNPRINTED\n\\end{comment}",
        "\\usepackage{comment}\\excludecomment{hint}\\includecomment{sol}",
    ),
    "versions under a flag": paper(
        "\\begin{sol}\nUNPRINTED\n\\end{sol}\nPRINTED1",
        "\\usepackage{versions}\\newif\\ifsol\n\\ifsol\\includeversion{sol}\\else\\excludeversion{sol}\\fi",
    ),
    "environments of one's own that hide": paper(
        "\\begin{sol}\nUNPRINTED\n\\end{sol}\nPRINTED1\n\\begin{key}\nUNPRINTED\n\\end{key}\n\\begin{memo}\n"
        "UNPRINTED\n\\end{memo}",
        "\\usepackage{comment,environ}\\newenvironment{sol}{\\comment}{\\endcomment}\n\\NewEnviron{key}{}\n"
        "\\let\\memo\\comment\\let\\endmemo\\endcomment",
    ),
    # ends
    "endinput": {
        "main.tex": paper("\\input{a}\\input{b}"),
        "a.tex": "\\ifx\\loaded\\undefined\\else\n\\endinput\n\\fi PRINTED1\n\\endinput\nUNPRINTED",
        "b.tex": "PRINTED2 \\endinput PRINTED3\nUNPRINTED",
    },
    "after the end": paper("PRINTED1") + "UNPRINTED $x$",
    "ends of plain TeX": {
        "main.tex": "\\input a\n" + LEAD + "\\input b \\input c \\input d\n" + END + "\\vfill\\eject\\end\nUNPRINTED",
        "a.tex": "\\def\\ee{\\end{equation}}\\let\\finish\\end % \\bye\n\\verb|\\bye|",
        "b.tex": "PRINTED1\n\\bye\nUNPRINTED $x$",
        "c.tex": "\\iffalse\\bye\\fi PRINTED2 \\enddocument UNPRINTED",
        "d.tex": "\\def\\bye{\\par}\\bye PRINTED3",
    },
    # files
    "files of files": paper(
        "\\begin{filecontents*}{b.bib}\nUNPRINTED {\n\\end{filecontents*}\nPRINTED1",
        "\\begin{filecontents}{a.tex}\n\\documentclass{article}\\begin{document}UNPRINTED\\end{document}\n\\iffalse\n"
        "\\end{filecontents}",
    ),
    "names in other letters": {"main.tex": paper("\\input{Intro}\\include{SECTIONS/One}"), "intro.tex": "PRINTED1\n",
        "sections/one.TEX": "PRINTED2"},
    "includeonly": {
        "main.tex": paper("\\include{a}\\include{b}\\input{c}", "% \\includeonly{b}\n\\includeonly{a,%b,\n c}"),
        "a.tex": "PRINTED1\n", "b.tex": "UNPRINTED\\include{d}", "c.tex": "PRINTED2", "d.tex": "UNPRINTED",
    },
    # what a page does not show
    "written to the log": paper(
        "\\typeout{UNPRINTED} \\immediate\\write18{UNPRINTED} \\openout\\file=UNPRINTED.txt "
        "\\write\\file{UNPRINTED} \\pdfinfo{/Title (UNPRINTED)}"
        "\\PackageWarning{x}{UNPRINTED}\\listfiles PRINTED1 \\message{UNPRINTED {x}} \\ClassError{a}{UNPRINTED}{x}"
    ),
    "a test that goes on after a comment": paper(
        "\\if0%\n0 PRINTED1\\fi \\ifnum5<1% one\n0 PRINTED2\\fi\n\\if0%\nUNPRINTED\\fi \\if0\n0 UNPRINTED\\fi PRINTED3"
    ),
}  # fmt: skip


def cleaned(name: str) -> str:
    source = SOURCES[name]
    files = {"main.tex": source} if isinstance(source, str) else source
    documents, _ = latex.corpus({file: text.encode() for file, text in files.items()})
    return dict(documents)["main.tex"]


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_printed_is_learned_and_nothing_else(name):
    text, source = cleaned(name), SOURCES[name]
    whole = source if isinstance(source, str) else "\n".join(source.values())
    assert PRINTED.findall(text) == sorted(PRINTED.findall(whole)) and "UNPRINTED" not in text

    # What follows the definitions, which may hold half of a conditional, has its braces and conditionals in pairs.
    body = text[text.index("Let $G$") :]
    bare = re.sub(r"(?s)\\begin\{verbatim\}.*?\\end\{verbatim\}|\\verb\|.*?\|", "", body).replace(
        r"\ifx\ifpdf", r"\ifx"
    )
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"\\if(?!f\b|thenelse|toggle)[a-z0-9]*", bare)) == len(re.findall(r"\\fi\b", bare))
    formula = r"\$[^$]+\$"
    assert Counter(re.findall(formula, body)) == Counter(re.findall(formula, LEAD + END))


def test_files_left_out_by_includeonly_are_reported():
    files = SOURCES["includeonly"]
    documents, reports = latex.corpus({file: text.encode() for file, text in files.items()})
    fates = {report.file: report.fate for report in reports}
    assert len(documents) == 1 and fates["b.tex"] == fates["d.tex"] == r"dropped: not in \includeonly of main.tex"
    assert "main.tex: not in \\includeonly: b" in reports[-1].notes

    # Where another root has them, they are there.
    files = {**files, "whole.tex": paper("\\include{b}")}
    documents, _ = latex.corpus({file: text.encode() for file, text in files.items()})
    assert [name for name, text in documents if "UNPRINTED" in text] == ["whole.tex"]


FRONT = r"""\title[short]{A title \thanks{of mine}}
\newcommand{\other}{\title{none}}
\author{A. Name}
\abstract{What we show.}
\begin{abstract}
In words.
\end{abstract}"""


@pytest.mark.parametrize("begin, printed", [("\\maketitle", True), ("\\frame{\\titlepage}", True), ("", False)])
def test_title_and_abstract_of_a_preamble_are_kept_where_they_are_printed(begin, printed):
    text = latex_clean.clean(paper(begin, FRONT), Counter())
    front = "\\title[short]{A title \\thanks{of mine}}\n\\abstract{What we show.}\n\\begin{abstract}\nIn words."
    assert (front in text) == printed and text.count("A title") == printed and "Name" not in text
    assert latex_clean.clean(text, Counter()) == text


def test_what_is_hidden_is_counted():
    hidden = "\\if0 UNPRINTED\\fi"
    _, (report,) = latex.corpus({"main.tex": paper(f"{hidden} PRINTED1").encode()})
    assert report.dropped["hidden"] == len(hidden)


ABBREVIATED = {
    "defined": "\\newcommand{\\be}{\\begin{equation}}\n\\newcommand{\\ee}{\\end{equation}}\n"
    "\\def\\bea{\\begin{eqnarray}}"
    "\\def\\eea{\\end{eqnarray}}\n",
    "with an argument": "\\def\\be#1{\\begin{equation}\\label{#1}}\\def\\ee{\\end{equation}}\n",
    "of an absent style file": "",
}


@pytest.mark.parametrize("name", ABBREVIATED)
def test_formulas_between_macros_of_ones_own_stay_as_they_are(name):
    """As between the tags of the environments: nothing that only lays out is cut there, and all is after the end."""
    formulas = ["\\be{a} x \\hspace{1em} \\vspace{2pt} y \\ee", "\\bea a &=& b \\noindent\\small c \\eea"]
    text = latex_clean.clean(f"{ABBREVIATED[name]}\n\\noindent {formulas[0]} \\noindent A.\n\n{formulas[1]}", Counter())
    assert text.endswith(f"{formulas[0]} A.\n\n{formulas[1]}" if name != "with an argument" else text[-5:])
    assert formulas[0] in text and "\\noindent A" not in text


def test_a_vector_that_is_called_as_a_formula_begins_none():
    text = latex_clean.clean("\\newcommand{\\ba}{\\mathbf a} $\\ba\\hspace{1em}$ \\noindent b \\ea", Counter())
    assert text.endswith("$\\ba\\hspace{1em}$ b \\ea")
