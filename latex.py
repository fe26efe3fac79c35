r"""LaTeX projects as training text: which files are documents, with what they \input, cleaned.

    python latex.py papers/ papers.jsonl

writes one JSON line {"name", "text"} for each document, as cpt.py would learn it, and prints what became of each file.
"""

import json
import posixpath
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

import formats
from checks import need_output
from errors import UserError, print_anything
from latex_clean import HEADINGS, clean, lex
from latex_syntax import WORD, definitions, ends_of, without
from text_bytes import declared, decode, note, refusal

ARG = r"[ \t]*\n?[ \t]*\{([^{}\n#]*)\}"  # a macro's \input{#1} names no path
BARE = r"[ \t]*\n?[ \t]*([^\s{}\\%#\[]+)"
INPUT = rf"\\(?:input(?:{ARG}|{BARE})|(?:include|subfile(?:include)?){ARG}|(?:sub)?import{ARG}{ARG})([ \t]*\n)?"
ONLY = r"\\includeonly[ \t]*\n?[ \t]*\{([^{}\\#]*)\}"
PARTED = re.compile(  # where a source is cut
    r"\\(?:(?:end)?input|include|subfile|(?:sub)?import|(?:begin|end)[ \t]*\{document\}"
    r"|bye|enddocument|@@end|end(?![ \t\n]*\{))"
)
DEFINED = r"\\(?:let|[gex]?def|(?:re)?newcommand\*?)\s*\{?\s*"
QUOTED = rf"(?:{DEFINED}|\\(?:string|noexpand|expandafter|ifx|show|meaning)\s*)(?:\\[a-zA-Z@]+\s*=?\s*)?$"
STYLES = (".sty", ".cls")  # files whose flags, macros and environments count; they are no documents
STYLE = r"(?m)^[^%\n]*?\\(?:usepackage|RequirePackage|documentclass|LoadClass)\s*(?:\[[^]]{0,500}\])?\s*\{([^{}]*)\}"
SUBFILE = r"(?m)^[^%\n]*\\documentclass[ \t]*(?:\[[^\]]*\])?[ \t]*\{subfiles\}"
OPTIONS = r"\\(?!item|begin)[a-zA-Z@]+\*?(?:\[[^\]\n]{0,200}\])*"  # a command and its own
PROSE = (
    r"(?<!\w)(?:[^\W\d_]{2,}[\s,;:'’()\-~]+){3}[^\W\d_]{2,}|[぀-ヿ㐀-鿿가-힯]{4}|(?<!\\)\$[^$]|\\\[|\\(?:item|begin)\b"
)


@dataclass
class FileReport:
    """What became of one file."""

    file: str  # relative posix path
    encoding: str = ""  # how it was read; "" when it is binary or no .tex
    fate: str = ""  # "root", "inlined into X", "fragment" (no root reaches it: cleaned alone), "dropped: why"
    characters: int = 0  # read
    kept: int = 0  # characters of text of the document it is the root of
    dropped: Counter = field(default_factory=Counter)  # characters dropped of that document, by kind
    notes: list[str] = field(default_factory=list)  # missing files, cycles, paths outside the folder, unbalanced braces


# ---- projects -------------------------------------------------------------------------------------------------------


def _resolve(target, folders, files):
    """(name of the file that a path stands for, ""), looked for in these folders in order; or (None, why not)."""
    target, problem = target.strip(' \t"'), "missing"
    if re.match("/|~|[a-zA-Z]:", target):
        return None, "outside the folder"
    paths = [posixpath.normpath(posixpath.join(folder, target)) for folder in folders]
    for path in paths:
        for name in (path + ".tex", path):
            if name in files:
                return name, ""
        if path.startswith("../"):
            problem = "outside the folder"
    alike = _by_small_letters(tuple(files))
    names = {name for path in paths for name in alike.get(path.casefold().removesuffix(".tex"), ())}
    return (names.pop(), "") if len(names) == 1 else (None, problem)  # as TeX finds Intro.tex where there is intro.tex


@lru_cache(2)
def _by_small_letters(names):
    """{name in small letters, without .tex: the names that are it}."""
    alike = defaultdict(list)
    for name in names:
        alike[name.casefold().removesuffix(".tex")].append(name)
    return alike


def _stops(text, start, end):
    """Whether a \\bye or \\end is plain TeX's, which ends the text: no operand, and no name that the text defines."""
    name = re.escape(text[start:end])
    return not (
        re.search(r"\\(?:documentclass|begin[ \t]*\{document\})", text)
        or re.search(QUOTED, text[max(0, start - 80) : start])
        or re.search(rf"{DEFINED}{name}(?![a-zA-Z@])", text)
    )


def _parts(text):
    """A source cut at its document tags and \\input commands: (kind, text, line end).

    The kinds are text, begin and end (of the document), input and include, with the path as its text, and the line end
    after it if there is one, and only, with what is not left out of the includes. What follows the line of an
    \\endinput is left out, and what follows the \\bye of plain TeX.
    """
    if not PARTED.search(text):  # which saves most files of a large project from being read twice more
        yield "text", text, ""
        return
    position = 0
    for kind, start, end, m in lex(text, alone=True):
        m = re.compile(INPUT).match(text, start) if kind == "input" else m
        if kind == "endinput":
            text = text[:start] + text[end:].partition("\n")[0]  # TeX reads the line to its end
            break
        if kind == "stop" and _stops(text, start, end):
            text = text[:start]
            break
        if kind == "only":
            m = re.compile(ONLY).match(text, start)
        if start < position or not m or kind not in ("document", "input", "only"):
            continue
        yield "text", text[position:start], ""
        position = m.end()
        if kind == "document":
            yield m["document"], m[0], ""
        elif kind == "only":
            yield "only", re.sub(r"%[^\n]*|\s", "", m[1]), ""
        else:
            *paths, line_end = m.groups()
            yield (
                "include" if m[0].startswith(r"\include") else "input",
                posixpath.join("", *filter(None, paths)),
                line_end,
            )
    yield "text", text[position:], ""


def _reached(files, name, folders):
    """The names of a file and of all that it asks for in turn."""
    names = [name]
    for name in names:
        paths = [part for kind, part, _ in _parts(files[name]) if kind in ("input", "include")]
        reached = {_resolve(path, (*folders, posixpath.dirname(name)), files)[0] for path in paths}
        names += sorted(reached - {None, *names})
    return names


def inline(files: dict[str, str], root: str) -> tuple[str, list[str], dict[str, str]]:
    """One project's source whole: for every \\input and its kin the file's text, of documents their body.

    Also returns notes on what cannot be followed and is left out (missing, outside the folder, a cycle, more text than
    an honest project has), and the fates of the files that it names.
    """
    room = 1_000_000 + 4 * sum(map(len, files.values()))
    out, notes, fates = [], [], {}
    only = None  # the names of \\includeonly
    stack = {root: (_parts(files[root]), 0)}  # the open files: what is left to read of each, where it starts in out
    while stack:
        name, (parts, start) = next(reversed(stack.items()))
        for kind, part, line_end in parts:
            if kind == "only":
                only = set(part.split(",")) if name == root else only
                continue
            if kind in ("input", "include"):
                folders = posixpath.dirname(root), posixpath.dirname(name), ""
                child, problem = _resolve(part, folders, files)
                if child in stack:
                    problem = "cycle"
                elif child and room <= 0:
                    problem = "too much inlined, left out"
                elif child and kind == "include" and only is not None and part.strip() not in only:
                    unread = _reached(files, child, folders)
                    fates |= {
                        other: rf"dropped: not in \includeonly of {root}" for other in unread if other not in fates
                    }
                    problem = r"not in \includeonly"
                if not problem:  # the line end after it is a blank to TeX, not the end of a paragraph: it goes too
                    room -= len(files[child]) + 100
                    fates[child] = f"inlined into {root}"
                    stack[child] = _parts(files[child]), len(out)
                    break
                notes.append(f"{name}: {problem}: {part}")
                part = line_end
            if kind == "begin" and name != root:
                del out[start:]  # what came before was this file's own preamble
            elif kind == "end" and name != root:
                parts.close()
            elif part:
                out.append(part)
        else:
            stack.popitem()
            if stack and out and not out[-1].endswith("\n"):
                out.append("\n")
    return "".join(out), notes, fates


# ---- documents ------------------------------------------------------------------------------------------------------


def split(text: str, most: int) -> list[str]:
    """Pieces of at most that many characters: cut before the coarsest headings that do, then paragraphs, lines, words.

    Joined they are the text, up to white space. A word longer than most stays whole.
    """
    pieces = [text.strip()]
    for cut in [*(rf"\n(?=\\{name}\b)" for name in HEADINGS), r"\n\n", r"\n", r"\s"]:
        shorter = []
        for piece in pieces:
            parts = re.sub(cut, "\0\\g<0>", piece).split("\0") if len(piece) > most else [piece]
            filled = ""
            for part in parts:
                if filled and len(filled) + len(part) > most:
                    shorter.append(filled.strip())
                    filled = ""
                filled += part
            shorter.append(filled.strip())
        pieces = list(filter(None, shorter))
    return pieces


def _has_text(text, main):
    """Whether there is text beside the definitions: any in a document, sentences, formulas or lists in a fragment."""
    ends = ends_of(text)
    spans = list(definitions(text, ends))
    if main:
        return bool(re.search(r"[^\W_]", re.sub(WORD, "", without(text, spans))))
    sentences = without(text, sorted([*spans, *ends.items()]))  # the arguments of commands are none
    return bool(re.search(PROSE, re.sub(OPTIONS, "|", sentences)))


def _read_texts(files, reports):
    """The sources that are text, decoded, by name; encodings and sizes go into the reports."""
    encodings = {PurePosixPath(name): declared(files[name]) for name in reports}
    by_folder = {path.parent: encoding for path, encoding in encodings.items() if encoding}  # by folder: its last
    texts = {}
    for name, report in reports.items():
        nearest = [by_folder[folder] for folder in PurePosixPath(name).parents if folder in by_folder]
        decoded = decode(files[name], *nearest[:1])
        if decoded is None or formats.lfs_pointer(files[name]):
            report.fate = f"dropped: {refusal(files[name])}"
            continue
        texts[name], report.encoding = decoded
        report.characters = len(texts[name])
        odd = note(files[name], report.encoding, *nearest[:1])
        report.notes += [f"{name}: {odd}"] if odd else []
    return texts


def _styles_of(source, root, texts):
    """The names of the style files of a project that a source asks for, and those that these ask for, in order."""
    names, todo = [], [source] if texts else []
    for text in todo:
        for name in re.findall(STYLE, text):
            folders = posixpath.dirname(root), ""
            stems = [posixpath.join(folder, part.strip()) for part in name.split(",") for folder in folders]
            for path in [stem + suffix for stem in stems for suffix in STYLES]:
                if path in texts and path not in names:
                    names.append(path)
                    todo.append(texts[path])
    return names


def _in_order(texts):
    """Names of sources in the order in which to make documents of them, roots first; the set of whole documents."""
    included, mains = set(), set()
    for name, text in texts.items():
        parts, folders = list(_parts(text)), PurePosixPath(name).parents
        included |= {_resolve(part, folders, texts)[0] for kind, part, _ in parts if kind in ("input", "include")} - {
            name
        }
        if "begin" in {kind for kind, *_ in parts} and not re.search(SUBFILE, text):
            mains.add(name)
    return sorted(texts, key=lambda name: (name in included, name not in mains)), mains


def corpus(files: dict[str, bytes], most: int = 50_000) -> tuple[list[tuple[str, str]], list[FileReport]]:
    """Documents, (name, text) in pieces of at most that many characters, and a report on each file, by name.

    files: .tex files and style files, by relative posix path. A .tex file that no other includes is a document; so is
    what its root leaves out.
    """
    reports = {name: FileReport(name) for name in sorted(files)}
    texts = _read_texts(files, reports)
    styles = {name: texts.pop(name) for name in list(texts) if name.lower().endswith(STYLES)}
    for name in styles:
        reports[name].fate = "dropped: a style file"
    order, mains = _in_order(texts)
    documents = []
    for name in order:
        report = reports[name]
        if report.fate:  # an earlier one has inlined it
            continue
        source, notes, fates = inline(texts, name)
        report.notes += notes
        asked = _styles_of(source, name, styles)
        for style in asked:
            reports[style].fate = f"style of {name}"
        text = clean(source, report.dropped, "\n".join(styles[style] for style in reversed(asked)))
        braces = Counter(re.findall(r"\\?[{}]", text))
        if braces["{"] != braces["}"]:
            report.notes.append(f"{name}: unbalanced braces")
        for other, fate in fates.items():
            if not reports[other].fate or reports[other].fate.startswith("dropped: not in"):
                reports[other].fate = fate
        report.fate = "root" if name in mains else "fragment"
        if not _has_text(text, name in mains):
            report.fate = "dropped: nothing but preamble/macros" if source.strip() else "dropped: empty"
            continue
        report.kept = len(text)
        pieces = split(text, most)
        documents += [(f"{name}#{i}" if len(pieces) > 1 else name, piece) for i, piece in enumerate(pieces, 1)]
    return documents, list(reports.values())


# ---- the command ----------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> dict:
    """Make documents of the .tex files in a folder. Raises UserError for what cannot be read or written."""
    if len(argv) != 2:
        raise UserError("expected a folder and the file to write, as in: python latex.py papers/ papers.jsonl")
    folder, output = map(Path, argv)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if output.suffix != ".jsonl":
        raise UserError(f"{output}: expected a file to write that ends in .jsonl, as cpt.py reads it")
    need_output(argv[1], "")
    suffixes = (".tex", *STYLES)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in suffixes]
    try:
        files = {name: (folder / name).read_bytes() for name in names if "/." not in f"/{name}"}  # no hidden ones
        documents, reports = corpus(files, most=10**9)
        if len(documents) == 1:  # a single project: its chapters
            documents, reports = corpus(files)
        if not documents:
            raise UserError(f"{folder}: no documents in {len(files)} .tex files")
        lines = [json.dumps({"name": name, "text": text}) + "\n" for name, text in documents]
        output.write_text("".join(lines), encoding="utf-8")
    except OSError as e:
        raise UserError(f"{e.filename}: {e.strerror}") from None
    dropped = Counter()
    for report in reports:
        print(f"{report.file}: {'; '.join([report.fate, *report.notes])}")
        dropped += report.dropped
    characters = sum(len(text) for _, text in documents)
    return {"documents": len(documents), "characters": characters, "dropped": dropped, "output": str(output)}


if __name__ == "__main__":
    print_anything()
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    try:
        print(json.dumps(main(sys.argv[1:])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
