"""LaTeX as training text: what goes, what stays, projects inlined; real books whole; broken sources do no harm."""

import json
import random
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

import corpus
import latex
import latex_clean

CLEAN = {  # what is protected: (source, wanted)
    # comments
    "comment to the line's end": (r"a % b", "a"),
    "comment after a blank leaves the line end": ("one % x\ntwo", "one\ntwo"),
    "comment after a word joins it as TeX does": ("Donau% x\n  dampf", "Donaudampf"),
    "comment after a macro keeps it apart": ("\\Phi% x\na", "\\Phi a"),
    "comment before a paragraph's end": ("one% x\n\ntwo", "one\n\ntwo"),
    "comment line leaves no blank line": ("one\n  % x\n% y\ntwo", "one\ntwo"),
    "comment line between paragraphs": ("one\n\n% x\n\ntwo", "one\n\ntwo"),
    "comment after two joined lines": ("\\Phi%\n%\na", "\\Phi\na"),
    "comment keeps tags on lines of their own": (
        "\\begin{thm}%\n  A%\n\\end{thm}%\nB",
        "\\begin{thm}\nA\n\\end{thm}\nB",
    ),
    "percent sign": (r"50\% of it", r"50\% of it"),
    "comment after a line break": ("a\\\\% x\nb", "a\\\\b"),
    "percent sign after a line break": ("a\\\\\\% b", "a\\\\\\% b"),
    "percent sign in a URL": (r"\url{http://a.b/c%20d} e", r"\url{http://a.b/c%20d} e"),
    "comment in mathematics": ("$a % x\n+ b$", "$a\n+ b$"),
    "comment environment": ("a\n\\begin{comment}\n{ $ %\n\\end{comment}\nb", "a\n\nb"),
    "iffalse": (r"a \iffalse b \ifx c d \fi e \fi f", "a f"),
    "iffalse with else": (r"a \iffalse b \else c \fi d", "a c d"),
    "iffalse within iffalse": (r"a\iffalse b\iffalse c\fi d\fi e", "a e"),
    "iffalse over half a group stays": (r"{a \iffalse b} c \fi d", r"{a \iffalse b} c \fi d"),
    "iffalse without end stays": (r"a \iffalse b", r"a \iffalse b"),
    "iff is no conditional": (r"\iffalse $a \iff b$ \fi c", "c"),
    # verbatim
    "verbatim": ("\\begin{verbatim}\n 50%  \\index{a}\n\n\n\tb\n\\end{verbatim}",) * 2,
    "listings": ("\\begin{lstlisting}[language=C]\n  a = b % 3;  // $x\n\\end{lstlisting}",) * 2,
    "minted": ("\\begin{minted}{py}\nif  a:\n    b\n\\end{minted}",) * 2,
    "verb": (r"a \verb|%  \index{| b \verb+$+ c", r"a \verb|%  \index{| b \verb+$+ c"),
    "lstinline": (r"a \lstinline[language=C]!%! b", r"a \lstinline[language=C]!%! b"),
    "verbatim without end stays": ("\\begin{verbatim} a % b\nc", "\\begin{verbatim} a\nc"),
    # the document around the text
    "preamble": ("\\documentclass{a}\n\\usepackage{b}\n\\begin{document}\nc\n\\end{document}\nd", "c"),
    "preamble's definitions": (
        "\\documentclass{a}\\newcommand{\\R}{\\mathbb{R}} \\usepackage{b}\n"
        "\\def\\x#1{[#1]}\\let\\y=\\x\\newtheorem{t}{T}[s]"
        "\\DeclareMathOperator*{\\lcm}{lcm}\\NewDocumentCommand{\\z}{m}{#1}\\pagestyle{plain}\\begin{document}$\\R$",
        "\\newcommand{\\R}{\\mathbb{R}}\n\\def\\x#1{[#1]}\n\\let\\y=\\x\n\\newtheorem{t}{T}[s]\n"
        "\\DeclareMathOperator*{\\lcm}{lcm}\n\\NewDocumentCommand{\\z}{m}{#1}\n\n$\\R$",
    ),
    "preamble's internals go": ("\\def\\a@b{c}\\def\\d{e}\\begin{document}f", "\\def\\d{e}\n\nf"),
    "definitions keep their layout": (r"\newcommand{\x}[1][2]{\vspace{1em}\noindent #1} a",) * 2,
    "definition cut short stays": (r"\newcommand{\x}{a b", r"\newcommand{\x}{a b"),
    # graphics
    "image": (r"a \includegraphics[width=0.5\textwidth]{b.png} c", "a c"),
    "drawing": ("a\n\\begin{tikzpicture}[x=1]\n\\draw $x$;\n\\end{tikzpicture}\nb", "a\nb"),
    "drawing in a drawing": (
        r"a \begin{tikzpicture}\begin{tikzpicture}\end{tikzpicture}b\end{tikzpicture} c",
        "a c",
    ),
    "drawing without end stays": (r"a \begin{tikzpicture} b", r"a \begin{tikzpicture} b"),
    "drawings that cross": (r"a \begin{asy}\begin{xy}b\end{asy} \end{xy}", r"a \end{xy}"),
    "asymptote": ("a\n\\begin{center}\n\\begin{asy}\ndraw();\n\\end{asy}\n\\end{center}\nb", "a\nb"),
    "figure's caption and label": (
        "a\n\\begin{figure}[ht]\n\\centering"
        "\n\\includegraphics{x}\n\\caption{A \\emph{b}.}\\label{f}\n\\end{figure}\nc",
        "a\n\n\\caption{A \\emph{b}.}\\label{f}\n\nc",
    ),
    "table's caption and rows": (
        "\\begin{table}[h]\n\\small\n\\caption{A}\n\\begin{tabular}{c}1\\\\2\\end{tabular}\n\\end{table}",
        "\\caption{A}\n\\begin{tabular}{c}1\\\\2\\end{tabular}",
    ),
    "xymatrix in mathematics": (r"$$\xymatrix{A \ar[r] & B}$$", r"$$\xymatrix{A \ar[r] & B}$$"),
    # bibliography and index
    "bibliography": (
        "a \\cite[p. 2]{b}.\n\\begin{thebibliography}{9}\n\\bibitem{b} B\n\\end{thebibliography}\n\\bibliography{c}"
        "\\bibliographystyle{d}\\nocite{*}\\printbibliography[heading=none]",
        "a \\cite[p. 2]{b}.",
    ),
    "index": ("a word\\index{word}s \\index[x]{a!b@$c$}and\n\\index{d}\nmore\\printindex", "a words and\nmore"),
    "index after a macro keeps it apart": (r"\LaTeX\index{b}c", r"\LaTeX c"),
    "index without end stays": (r"a \index{b", r"a \index{b"),
    # layout
    "layout": (
        "\\maketitle\n\\tableofcontents\n\\newpage\n\n\\noindent A\\vspace*{-1em}\n\\bigskip\n"
        "\\setlength\\parindent{0pt}"
        "\\pagestyle{plain}\\addcontentsline{toc}{a}{b}\\phantomsection\nB",
        "A\n\nB",
    ),
    "noindent within a paragraph": ("one\n\\noindent\ntwo", "one\ntwo"),
    "space in text": (r"a\hspace{1em}b\hfill c\quad d", r"a b c\quad d"),
    "space in mathematics": (r"$a\hspace{1em}b$", r"$a\hspace{1em}b$"),
    "plain TeX's dimensions": ("\\baselineskip 0.6cm\n\\vskip 1.5 cm plus 1fil\n\\parskip=\\medskipamount\na", "a"),
    "lengths that are values stay": (r"\fbox{\parbox{0.5\textwidth}{a}}", r"\fbox{\parbox{0.5\textwidth}{a}}"),
    "sizes": (r"{\small a} \Large b", "a b"),
    "sizes in an argument": (r"\caption{\small a}", r"\caption{a}"),
    "centre": ("a\\begin{center}b\\end{center}c", "a\nb\nc"),
    "boxes": (r"\centerline{a {b}} \resizebox{1cm}{!}{c}", "a {b} c"),
    "font": ("\\font\\big=cmb22 scaled 2000\na", "a"),
    "no letter grows into a command": (r"\foo\noindent bar", r"\foo bar"),
    # what stays
    "sections, labels, references": ("\\section{A}\\label{s}\nSee \\eqref{e}, \\ref{s}, \\footnote{b}.",) * 2,
    "lists": ("\\begin{enumerate}\n\\item[a] b\n\\item c\n\\end{enumerate}",) * 2,
    "theorems": ("\\begin{theorem}[A]\\label{t}\n\\emph{a}\n\\end{theorem}",) * 2,
    "mathematics of all kinds": (r"$a$ $$b$$ \(c\) \[d\] \begin{align*}e\\[1ex] \vspace{1em}&f\end{align*}",) * 2,
    "mathematics in text in mathematics": (r"$a \text{ if $\small b$ } \hspace{1em}$ \small c", None),
    "one formula after the other": (r"$a$$\vspace{1em}$ \small b", r"$a$$\vspace{1em}$ b"),
    "stray dollar harms one paragraph": ("5$ \\index{a} b\n\nc \\index{d} e", "5$ \\index{a} b\n\nc e"),
    "stray dollar before a display": (r"5$ b \[\hspace{1em}\] \index{d} e", r"5$ b \[\hspace{1em}\] e"),
    "formula without end ends at a heading": ("\\[ a\n\\section{B} \\index{c} d", "\\[ a\n\\section{B} d"),
    "stray braces": (r"}} \index{a} {{ b", "}} {{ b"),
    # characters
    "composed": ("e\u0301 ", "é"),
    "composed only where no longer": ("\u0958", "\u0958"),
    "odd spaces": ("a\u00a0b\u2009c\u3000d", "a b c d"),
    "characters that are no text": ("\ufeffa\u00adb\u200bc\x00d\x0b\ud800e", "abcd\ne"),
    "ligatures": ("e\ufb03cient \ufb01ne\n\n\n\n", "efficient fine"),
    "ligatures that would lengthen": ("\ufb03", "\ufb03"),
    "white space": ("a  \t b  \n\n\n\n   c\n", "a b\n\nc"),
    "characters of ours": ("\ufdd00\ufdd1 a", "0 a"),
    "nothing": ("", ""),
}
CLEAN["mathematics in text in mathematics"] = (
    CLEAN["mathematics in text in mathematics"][0],
    r"$a \text{ if $\small b$ } \hspace{1em}$ c",
)


def clean(source: str) -> str:
    return latex_clean.clean(source, Counter())


@pytest.mark.parametrize("name", CLEAN)
def test_clean(name):
    source, wanted = CLEAN[name]
    assert clean(source) == wanted
    assert clean(wanted) == wanted


def test_clean_counts_what_it_drops():
    dropped = Counter()
    latex_clean.clean(
        "\\usepackage{x}\\begin{document}a\\index{b}% c\n\\vfill\\includegraphics{d}\\end{document}", dropped
    )
    assert dropped["index"] == len("\\index{b}") and dropped["graphics"] == len("\\includegraphics{d}")
    assert all(dropped[kind] for kind in ("comments", "preamble", "layout"))


# ---- bytes ----------------------------------------------------------------------------------------------------------

RUSSIAN = "\\usepackage[%s]{inputenc} Небесная механика"
DECODED = {
    "UTF-8": ("é".encode(), ("é", "utf-8")),
    "BOM": (b"\xef\xbb\xbfa", ("a", "utf-8")),
    "UTF-16 LE": ("é".encode("utf-16"), ("é", "utf-16")),
    "UTF-16 BE": (b"\xfe\xff\x00a", ("a", "utf-16")),
    "cp1252 by default": (b"\x93caf\xe9\x94", ("“café”", "cp1252")),
    "what cp1252 lacks": (b"\xe9\x81", None),
    "declared koi8-r": ((RUSSIAN % "koi8-r").encode("koi8-r"), (RUSSIAN % "koi8-r", "koi8-r")),
    "declared cp1251": ((RUSSIAN % "cp1251").encode("cp1251"), (RUSSIAN % "cp1251", "cp1251")),
    "declared but UTF-8 all the same": ((RUSSIAN % "cp1251").encode(), (RUSSIAN % "cp1251", "utf-8")),
    "applemac": (b"\\usepackage[applemac]{inputenc}\x8e", ("\\usepackage[applemac]{inputenc}é", "mac_roman")),
    "line ends": (b"a\r\nb\rc\n", ("a\nb\nc\n", "utf-8")),
    "NUL": (b"a\0b", None),
    "half a UTF-16": (b"\xff\xfea", None),
    "control characters": (bytes(range(1, 32)) * 9, None),
    "empty": (b"", ("", "utf-8")),
}


@pytest.mark.parametrize("name", DECODED)
def test_decode(name):
    raw, wanted = DECODED[name]
    assert latex.decode(raw) == wanted


def test_a_project_declares_its_encoding_once():
    text = "Небесная механика изучает движение небесных тел"
    files = {
        "a/main.tex": b"\\documentclass{a}\\usepackage[koi8-r]{inputenc}\\begin{document}\\input{b/c}\\end{document}",
        "a/b/c.tex": text.encode("koi8-r"),
        "d.tex": "déjà".encode("latin-1"),
    }
    documents, reports = latex.corpus(files)
    assert dict(documents)["a/main.tex"] == text
    assert [r.encoding for r in reports] == ["koi8-r", "utf-8", "cp1252"]


# ---- projects -------------------------------------------------------------------------------------------------------

INLINED = {  # the root is p/main.tex; of the others: (files, what it becomes, words of the notes)
    "with .tex, without, bare": (
        {"p/a.tex": "A", "p/b.tex": "B", "p/c.tex": "C"},
        "\\input{a}\n\\include{b.tex}\n\\input c\nx",
        "A\nB\nC\nx",
        [],
    ),
    "a line end of the file is a blank": ({"p/a.tex": "A\n"}, "\\input{a}\nx", "A\nx", []),
    "a comment at the file's end": ({"p/a.tex": "A % b"}, "\\input{a} x", "A % b\n x", []),
    "not in comments": ({"p/a.tex": "A"}, "% \\input{a}\nx", "% \\input{a}\nx", []),
    "not in verbatim": ({"p/a.tex": "A"}, *["\\begin{verbatim}\\input{a}\\end{verbatim}\\verb|\\input{a}|"] * 2, []),
    "not behind iffalse": ({"p/a.tex": "A"}, *[r"\iffalse\input{a}\fi"] * 2, []),
    "not where a macro names it": ({"p/a.tex": "A"}, *[r"\newcommand{\x}[1]{\input{#1}}"] * 2, []),
    "from the root's folder": ({"p/s/a.tex": "\\input{s/b}", "p/s/b.tex": "B"}, r"\input{s/a}", "B\n", []),
    "from the file's own folder": ({"p/s/a.tex": "\\input{b}", "p/s/b.tex": "B"}, r"\input{s/a}", "B\n", []),
    "from the corpus folder": ({"q/a.tex": "A"}, r"\input{q/a}", "A\n", []),
    "from the folder above": ({"q/a.tex": "A"}, r"\input{../q/a}", "A\n", []),
    "import": ({"p/s/a.tex": "\\input{b}", "p/s/b.tex": "B"}, r"\import{s/}{a}", "B\n", []),
    "subimport": ({"p/s/a.tex": r"\subimport{t}{b}", "p/s/t/b.tex": "B"}, r"\subimport{s}{a}", "B\n", []),
    "subfile's body": (
        {"p/a.tex": "\\documentclass[main]{subfiles}\\input{b}\\begin{document}A\\end{document}x", "p/b.tex": "B"},
        r"\subfile{a}",
        "A\n",
        [],
    ),
    "twice": ({"p/a.tex": "A"}, "\\input{a}\n\\input{a}\n", "A\nA\n", []),
    "endinput": ({"p/a.tex": "A\n\\endinput\nB"}, r"\input{a}", "A\n", []),
    "missing": ({}, r"a \input{b} c", "a  c", ["missing: b"]),
    "itself": ({}, r"a \input{main} c", "a  c", ["cycle: main"]),
    "each other": (
        {"p/a.tex": r"A \input{b}", "p/b.tex": r"B \input{a}"},
        r"\input{a}",
        "A B \n",
        ["p/b.tex: cycle: a"],
    ),
    "outside": ({}, r"\input{../../x}", "", ["outside the folder: ../../x"]),
    "absolute": ({"etc/passwd.tex": "x"}, r"\input{/etc/passwd}", "", ["outside the folder: /etc/passwd"]),
    "braces missing": ({}, *[r"\input"] * 2, []),
    "empty": ({}, r"\input{}x", "x", ["missing"]),
}


@pytest.mark.parametrize("name", INLINED)
def test_inline(name):
    files, source, wanted, words = INLINED[name]
    text, notes, _ = latex.inline(files | {"p/main.tex": source}, "p/main.tex")
    assert text == wanted
    assert len(notes) == len(words) and all(w in note for w, note in zip(words, notes, strict=True))


DOCUMENT = b"\\documentclass{a}\n\\begin{document}\n%s\n\\end{document}"


def test_corpus_finds_roots_fragments_and_what_is_no_text():
    files = {
        "book/main.tex": DOCUMENT % b"\\input{macros}\\subfile{one}\\input{shared}\\input{a}",
        "book/a.tex": DOCUMENT % b"A.",
        "book/macros.tex": b"\\newcommand{\\x}{y}",
        "book/one.tex": b"\\documentclass[main]{subfiles}\\begin{document}One.\\end{document}",
        "book/lost.tex": b"\\documentclass[main]{subfiles}\\begin{document}Nobody reads this one.\\end{document}",
        "book/shared.tex": b"Shared.",
        "stacks/a.tex": b"\\input{preamble}\\begin{document}A.\\input{../book/shared}\\end{document}",
        "stacks/preamble.tex": b"\\documentclass{x}\\def\\z{w}",
        "notes/part.tex": b"Some words that no root reads.\\input{formula}",
        "notes/formula.tex": b"$a$",
        "style/macros.tex": b"\\usepackage{x}\\newcommand{\\y}{words that are a macro only}\n\\definecolor{a}{b}{c}",
        "picture.tex": DOCUMENT % b"\\begin{tikzpicture}a\\end{tikzpicture}",
        "round/a.tex": b"Round and round it goes. \\input{b}",
        "round/b.tex": b"\\input{a}",
        "binary.tex": b"\0\1",
        "empty.tex": b"",
    }
    documents, reports = latex.corpus(files)
    assert dict(documents) == {
        "book/main.tex": "\\newcommand{\\x}{y}\nOne.\nShared.\n\nA.",
        "book/lost.tex": "Nobody reads this one.",
        "stacks/a.tex": "\\def\\z{w}\n\nA.Shared.",
        "notes/part.tex": "Some words that no root reads.$a$",
        "round/a.tex": "Round and round it goes.",
    }
    assert {r.file: r.fate for r in reports} == {
        "book/main.tex": "root",
        "book/a.tex": "inlined into book/main.tex",
        "book/macros.tex": "inlined into book/main.tex",
        "book/one.tex": "inlined into book/main.tex",
        "book/lost.tex": "fragment",
        "book/shared.tex": "inlined into book/main.tex",
        "stacks/a.tex": "root",
        "stacks/preamble.tex": "inlined into stacks/a.tex",
        "notes/part.tex": "fragment",
        "notes/formula.tex": "inlined into notes/part.tex",
        "style/macros.tex": "dropped: nothing but preamble/macros",
        "picture.tex": "dropped: nothing but preamble/macros",
        "round/a.tex": "fragment",
        "round/b.tex": "inlined into round/a.tex",
        "binary.tex": "dropped: binary",
        "empty.tex": "dropped: empty",
    }
    kept = {r.file: r.kept for r in reports if r.kept}
    assert kept == {name: len(text) for name, text in documents}
    assert [r.characters for r in reports if r.file == "book/shared.tex"] == [7]


def test_doubling_is_capped_and_reported():
    files = {f"{i}.tex": f"\\input{{{i + 1}}}a\\input{{{i + 1}}}".encode() for i in range(30)}
    documents, reports = latex.corpus(files | {"30.tex": b"", "main.tex": DOCUMENT % b"\\input{0}"})
    assert any("too much inlined" in note for r in reports for note in r.notes)
    assert sum(len(text) for _, text in documents) < 10_000_000


# ---- splitting ------------------------------------------------------------------------------------------------------


def test_split_cuts_before_the_coarsest_heading():
    section = "\\section{A}\n" + "word " * 10
    text = f"intro\n\\chapter{{1}}\n{section}\n{section}\n\\chapter{{2}}\n{section}"
    assert latex.split(text, 10_000) == [text.strip()]
    pieces = latex.split(text, 160)
    assert [p.split("{")[0] for p in pieces] == ["intro\n\\chapter", "\\chapter"]
    pieces = latex.split(text, 80)
    assert [p.split("{")[0] for p in pieces] == ["intro", "\\chapter", "\\section", "\\chapter"]


WORDS = st.lists(st.sampled_from(["a", " ", "\n", "\\section{", "\\chapter{", "}"]), max_size=100).map("".join)


@given(WORDS, st.integers(1, 50))
@settings(max_examples=300, deadline=None)
def test_split_keeps_all_and_the_bound(text, most):
    pieces = latex.split(text, most)
    assert "".join("".join(pieces).split()) == "".join(text.split()) and all(pieces)
    assert all(len(p) <= most or not re.search(r"\s", p) for p in pieces)


# ---- real sources ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real():
    folder = SHARED / "data/latex"
    if not folder.is_dir():
        pytest.skip("../shared/data/latex (real LaTeX sources) is absent")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*.tex"))}


@pytest.fixture(scope="module")
def cleaned(real):
    """Of each document file and fragment: its name, its inlined source, its cleaned text."""
    texts = {name: latex.decode(raw)[0] for name, raw in real.items()}
    _, reports = latex.corpus(real)
    names = [r.file for r in reports if not r.fate.startswith("inlined")]
    wholes = [latex.inline(texts, name)[0] for name in names]
    return [(name, whole, clean(whole)) for name, whole in zip(names, wholes, strict=True)]


HIDDEN = "slogan|reference|history|"  # the stacks project makes comments of these
DRAWINGS = "tikzpicture|pgfpicture|asy|picture|pspicture|xy|chart"
NOT_READ = re.compile(
    r"\\begin\{(?P<v>verbatim\*?|lstlisting|comment|" + HIDDEN + DRAWINGS + r")\}.*?\\end\{(?P=v)\}"
    r"|\\verb(?P<d>[^\sa-z]).*?(?P=d)|\\\\|\\%|%[^\n]*",
    re.DOTALL,
)
FORMULA = re.compile(
    r"\\\\|\\\$|(?P<f>\$\$.+?\$\$|\$(?:\\.|\n(?!\s*\n)|[^$\\\n])+\$|(?<!\\)\\\(.+?\\\)|(?<!\\)\\\[.+?\\\]"
    r"|\\begin\{(?P<e>(?:equation|align|gather|multline|eqnarray|displaymath|math)\*?)\}.+?\\end\{(?P=e)\})",
    re.DOTALL,
)


def formulas(source: str) -> Counter:
    """The formulas of a source without white space, as a reader who knows nothing of the code finds them."""
    source = NOT_READ.sub(lambda m: m[0] if m[0] in ("\\\\", "\\%") else "", source)
    return Counter("".join(m["f"].split()) for m in FORMULA.finditer(source) if m["f"])


def body(source: str) -> str:
    """What is between the document tags that are no comments, if they are there."""
    source = re.split(r"(?m)^[^%\n]*\\begin\{document\}", source, maxsplit=1)[-1]
    return re.split(r"(?m)^[^%\n]*\\end\{document\}", source, maxsplit=1)[0]


def test_real_mathematics_is_kept(cleaned):
    there, lost = 0, Counter()
    for _, whole, text in cleaned:
        wanted = formulas(body(whole))
        there += wanted.total()
        lost += wanted - formulas(text)
    print(f"formulas: {there}, not found again: {lost.total()} ({1 - lost.total() / there:.4%} kept)")
    for formula, n in lost.most_common(5):
        print(n, formula[:120])
    assert there > 100_000 and lost.total() <= 0.01 * there


def test_real_sources_never_grow_and_clean_twice_is_once(cleaned):
    for name, whole, text in cleaned:
        assert len(text) <= len(whole), name
        assert clean(text) == text, name


def test_real_documents_have_no_input_left_that_exists(real):
    documents, _ = latex.corpus(real)
    for name, text in documents:
        text = NOT_READ.sub("", text)
        for target in re.findall(r"\\(?:input|include|subfile)\s*\{([^{}]*)\}", text):
            base = name.split("#")[0].rsplit("/", 1)[0]
            assert not {f"{base}/{target}", f"{base}/{target}.tex", target, target + ".tex"} & set(real), (name, target)


def test_real_corpus_reports_each_file_once(real):
    start = time.process_time()
    documents, reports = latex.corpus(real, most=20_000)
    speed = sum(map(len, real.values())) / 1e6 / (time.process_time() - start)
    print(f"{len(real)} files, {len(documents)} documents, {speed:.1f} MB/s")
    assert speed >= 1  # MB/s of CPU time
    assert [r.file for r in reports] == sorted(real)
    assert all(r.fate and r.encoding for r in reports)
    assert all(text.strip() for _, text in documents) and len({n for n, _ in documents}) == len(documents)
    fates = {r.file: r.fate for r in reports}
    assert fates["napkin/Napkin.tex"] == fates["stacks-project/sets.tex"] == fates["clowder/sets.tex"] == "root"
    assert fates["napkin/tex/linalg/dets.tex"] == "inlined into napkin/Napkin.tex"
    assert fates["OpenLogic/content/sets-functions-relations/sets/basics.tex"] == "fragment"
    assert all(len(text) <= 20_000 for _, text in documents)


# ---- broken sources -------------------------------------------------------------------------------------------------

JUNK = [
    "{", "}", "$", "$$", "%", "\\", "\\begin{tikzpicture}", "\\end{tikzpicture}", "\\input{", "\\input{b}", "\0",
    "\n\n", "\\begin{document}", "\\end{document}", "\\iffalse", "\\fi", "\\else", "\\verb|", "\\begin{verbatim}",
    "\\index{", "\\newcommand{\\x}{", "\\def", "\\[", "\\]", "\\begin{align}", "\\end{figure}",
    "\\includegraphics[", "\ufb03", "\u0958", "\ufdd0", "\\centerline{", "{\\small ", "\\vskip", "\\let",
    "\\import{a}", "\r",
]  # fmt: skip


def mutated(text: str, rng: random.Random) -> str:
    for _ in range(rng.randint(1, 6)):
        i, j, k = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        j, k = min(j, i + 200), min(k, j + 200)
        match rng.randrange(4):
            case 0:
                text = text[:i] + text[j:]
            case 1:
                text = text[:i] + text[i:j] * 2 + text[j:]
            case 2:
                text = text[:i] + text[j:k] + text[i:j] + text[k:]
            case 3:
                text = text[:i] + rng.choice(JUNK) * rng.choice((1, 1, 1, 30)) + text[i:]
    return text


def test_broken_sources_never_fail_hang_or_grow(real):
    rng = random.Random(7)
    names = sorted(real)
    for n in range(4_000):
        source = latex.decode(real[rng.choice(names)])[0]
        at = rng.randrange(max(1, len(source) - 1500))
        text = mutated(source[at : at + 1500], rng)
        start = time.process_time()
        whole = latex.inline({"a.tex": text, "b.tex": "b"}, "a.tex")[0]
        result = clean(whole)
        assert len(result) <= len(whole), (n, text)
        assert time.process_time() - start < 1, (n, text)
        if n % 10 == 0:
            documents, reports = latex.corpus({"a.tex": text.encode("utf-8", "replace"), "b.tex": b"b"}, 300)
            assert len(reports) == 2 and all(t for _, t in documents)


@given(st.lists(st.sampled_from([*JUNK, "a", " ", "b c", "\n", "$x$", "\\foo", "[", "]"]), max_size=40).map("".join))
@settings(max_examples=1000, deadline=None)
def test_junk_never_fails_or_grows(text):
    assert len(clean(text)) <= len(text)
    latex.corpus({"a.tex": text.encode("utf-8", "replace")})


N = 100_000
PATHOLOGICAL = {
    "open braces": "{" * N,
    "braces of arguments": "\\index{" * N,
    "open optional arguments": "\\includegraphics[" * N,
    "braces after definitions": "\\newcommand{\\a}{" * N,
    "definitions without body": "\\def\\a " * N,
    "dollars": "$" * (N + 1),
    "dollars in groups": "{$" * N,
    "groups and displays": "{\\[" * N + "\\]" * N + "\\end{align}" * N,
    "figures": "\\begin{figure}" * N,
    "drawings": "\\begin{tikzpicture}" * N,
    "drawings, ends of others": "\\begin{asy}\\begin{xy}" * N + "\\end{picture}" * N,
    "verbatims": "\\begin{verbatim}" * N,
    "verbs": "".join(f"\\verb{chr(0x4E00 + i % 20_000)}" for i in range(N)),
    "percent signs": "%" * 1_000_000,
    "comment lines": "%\n" * N,
    "comments that join": "a%\n" * N,
    "blanks": " " * 1_000_000,
    "blanks and line ends": " \n\t" * N,
    "nested iffalse": "\\iffalse" * N + "\\fi" * N,
    "open iffalse": "\\iffalse" * N,
    "nested iftrue": "\\iftrue" * (N // 2) + "\\fi" * (N // 2),
    "open iftrue": "\\iftrue a" * (N // 2),
    "unknown tests": "\\ifa" * (N // 2) + "\\iffalse" + "\\fi" * (N // 2),
    "flags in groups": "\\newif\\ifa{\\atrue " * (N // 2) + "}" * (N // 2),
    "branches": "\\ifnum0=1 " * (N // 2) + "\\else" * (N // 2) + "\\fi" * (N // 2),
    "toggles": "\\newtoggle{a}" + "\\iftoggle{a}{" * (N // 2) + "}{}" * (N // 2),
    "excluded without end": "\\excludecomment{a}" + "\\begin{a}" * (N // 2),
    "macros that print nothing": "\\newcommand{\\x}[1]{}" + "\\x{" * (N // 2),
    "macros of macros": "".join(f"\\newcommand{{\\x{c}}}[1]{{\\if0#1\\fi\\x{d}{{}}}}" for c, d in ("ab", "ba")) * 1000
    + "\\xa{}" * 10_000,
    "marks on a letter": "a" + "\u0301\u0316" * (N // 2),
    "iffalse and half groups": "\\iffalse{" * N + "\\fi" * N,
    "deep groups": "{" * N + "}" * N,
    "deep sizes": "{\\small " * N + "}" * N,
    "deep boxes": "\\centerline{" * N + "}" * N,
    "backslashes": "\\" * 1_000_000,
    "vskips": "\\vskip 1" * N,
    "inputs": "\\input{" * N,
    "one long word": "a" * 1_000_000,
    "layout in a line": "\\noindent" * N,
    "many glued words": "a\\index{b}" * N,
    "documents": "\\begin{document}" * N,
}


@pytest.mark.parametrize("name", PATHOLOGICAL)
def test_pathological_sources_take_linear_time(name):
    start = time.process_time()
    _, (report,) = latex.corpus({"a.tex": PATHOLOGICAL[name].encode()}, 1000)
    assert time.process_time() - start < 8  # about one second each; quadratic ones take minutes
    assert report.kept <= report.characters


def test_a_long_chain_of_files():
    files = {f"{i}.tex": f"a\\input{{{i + 1}}}".encode() for i in range(5000)}
    documents, _ = latex.corpus(files | {"5000.tex": b"Here it ends at last."})
    assert documents[0][1].endswith("Here it ends at last.")


# ---- the command ----------------------------------------------------------------------------------------------------


def run_command(*flags, cwd=None) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, ROOT / "latex.py", *flags], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_command_writes_the_documents_that_cpt_would_learn(tmp_path):
    made = {
        "a/main.tex": DOCUMENT % b"See $x$.\\index{x}\\input{part}\\input{gone}", "a/part.tex": b"A part. % note",
        "B.TEX": DOCUMENT % b"Caf\xe9.", "macros.tex": b"\\newcommand{\\R}{r}", "zero.tex": b"\0\1",
        ".git/x.tex": DOCUMENT % b"Hidden.", "notes.txt": b"No LaTeX.",
    }  # fmt: skip
    for name, content in made.items():
        (tmp_path / "papers" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "papers" / name).write_bytes(content)
    status, out, err = run_command(tmp_path / "papers", tmp_path / "papers.jsonl")
    assert status == 0, err
    lines = [json.loads(line) for line in open(tmp_path / "papers.jsonl", encoding="utf-8")]
    assert lines == [{"name": "B.TEX", "text": "Café."}, {"name": "a/main.tex", "text": "See $x$.A part."}]
    rows, _, records = corpus.read_documents(corpus.find_files(str(tmp_path / "papers"), "train_data"), "train_data")
    assert [row["text"] for row in rows if row["text"] != "No LaTeX."] == [line["text"] for line in lines]
    *told, last = out.splitlines()
    assert told == [f"{r['file']}: {'; '.join([r['fate'], *r['notes']])}" for r in records if "notes" in r]
    assert "a/main.tex: root; a/main.tex: missing: gone" in told
    result = json.loads(last)
    assert result["output"] == str(tmp_path / "papers.jsonl")
    assert (result["documents"], result["characters"]) == (2, sum(len(line["text"]) for line in lines))
    assert result["dropped"]["index"] == len("\\index{x}") and result["dropped"]["comments"] == len(" % note")


def test_a_single_project_is_cut_at_its_chapters(tmp_path):
    (tmp_path / "book.tex").write_text(
        "".join(f"\\chapter{{{i}}} " + "Some words and some more. " * 1500 for i in range(3))
    )
    assert latex.main([str(tmp_path), str(tmp_path / "o.jsonl")])["documents"] == 3
    assert [json.loads(line)["name"] for line in open(tmp_path / "o.jsonl")] == [f"book.tex#{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["papers"], "expected a folder and the file to write"),
        (["--ouput", "x", "y"], "expected a folder and the file to write"),
        (["gone", "x.jsonl"], "gone: no such folder"),
        ([".", "x.jsonl"], "no documents in 0 .tex files"),
        (["book", "none/x.jsonl"], "none/x.jsonl: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line_with_status_2(tmp_path, flags, words):
    (tmp_path / "book").mkdir()
    (tmp_path / "book/a.tex").write_text("Some words that make a document, in four words or more.")
    where = tmp_path / "book" if flags[0] == "book" else tmp_path / "empty"
    (tmp_path / "empty").mkdir()
    flags = [flag if flag != "book" else "." for flag in flags]
    status, out, err = run_command(*flags, cwd=where)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: ") and words in err


def test_help_is_the_docstring():
    status, out, _ = run_command("--help")
    assert status == 0 and "python latex.py papers/ papers.jsonl" in out
