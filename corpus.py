"""Documents, or prompts with responses: from folders and files to tokens that are kept in a cache.

A corpus is read and encoded once, by rank 0, into memory-mapped files named by the sha256 of all that they follow from
(texts, template, tokenizer); every rank maps them. Segments of documents are slices of it, so nothing is copied.
"""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import audit
import checkpoint
import data
import ddp
import files
import latex
import pair_formats
import prompts
from document_files import ENDS, NAMED, as_pairs, read_bytes, rows_of
from errors import Untrusted, UserError, few

NO_CHAT = " need a chat template, and this tokenizer has none or --chat no was given"
COMPARED, BEGINNING = 20_000, 20_000  # documents at most, and characters of each, that are compared with others
KINDS = {
    "ids": np.int32,
    "starts": np.int64,
    "stops": np.int64,
    "sizes": np.int64,
    "learned": bool,
}  # files of a cache
# What tokens follow from besides texts.
CODE = """audit corpus cutting data delimited document_files files formats latex latex_clean latex_hidden latex_syntax
    latex_values pair_formats prompts special_tokens spelling spool text_bytes""".split()
Sources = list[tuple[Path, list[Path]]]  # (folder, its files)


@dataclass
class Corpus:
    """Encoded documents, or pairs of prompt and response; a document's last token is EOS."""

    tokens: data.Tokens
    sizes: np.ndarray  # (N,) UTF-8 bytes of each document, or of what is learned of each pair
    pairs: bool
    files: list[dict]  # what became of each file
    summary: str = ""  # what was found, in a line
    names: list[str] = field(default_factory=list)  # of the documents or pairs
    near: list[list[int]] = field(default_factory=list)  # groups of documents that are nearly equal

    def take(self, rows: np.ndarray) -> "Corpus":
        """Some documents or pairs, in the given order."""
        names = [self.names[i] for i in rows] if self.names else []
        return Corpus(self.tokens.take(rows), self.sizes[rows], self.pairs, self.files, names=names)


# ---- reading --------------------------------------------------------------------------------------------------------


def find_files(paths: str, flag: str) -> Sources:
    """(folder, its files) for each of the comma-separated paths; a file counts alone. Raises UserError."""
    sources = []
    for path in (Path(p.strip()) for p in paths.split(",") if p.strip()):
        if path.is_dir():
            found = [file for file in path.rglob("*") if not file.is_dir()]
            sources.append((path, sorted(f for f in found if "/." not in f"/{f.relative_to(path).as_posix()}")))
        elif path.is_file() and path.name.lower().endswith(NAMED):
            sources.append((path.parent, [path]))
        else:
            raise UserError(f"--{flag} {path}: no folder, and no file that ends in {', '.join(ENDS)}")
    return sources


def _named(sources):
    """The folders, and files that count alone, as a str."""
    return ", ".join(str(paths[0] if len(paths) == 1 else root) for root, paths in sources)


def _readable(file):
    """Whether a file's (Path) name is one that is read."""
    return file.name.lower().endswith(ENDS)


def read_documents(sources: Sources, flag: str, columns: tuple[str, ...] = ("text",)) -> tuple[list, list, list]:
    """The documents of files as rows of columns, the name of each, and for each file a record of what became of it.

    LaTeX projects are made into documents by latex.py; .txt and .md files are one document each, lines of JSONL one
    each. A project is one document, unless it is all there is: then its chapters are. Rows whose columns (those given,
    or of pairs) are equal but for white space are kept once. A text that cannot be read is skipped and recorded in a
    folder, and raises UserError where the file was named; so do damaged JSONL, and no documents.
    """
    documents, records = [], []  # (file, row), and what became of each file
    for root, paths in sources:
        tex = {}
        for file in paths:
            name = file.relative_to(root).as_posix()
            try:
                if file.suffix.lower() in (".tex", *latex.STYLES):
                    tex[name] = read_bytes(file, flag)
                    continue
                found, fate, *notes = rows_of(file, flag, named=len(paths) == 1)
            except UserError as e:
                if len(paths) == 1 or ".jsonl" in file.name.lower():
                    raise
                found, fate, notes = [], f"dropped: {str(e).split(': ', 1)[-1]}", []
            found, layouts = as_pairs(found, list(columns))
            documents += [(name, row) for row in found]
            record = {"file": name, "fate": fate, "documents": len(found)}
            records.append(record | ({"notes": notes} if notes else {}) | ({"columns": layouts} if layouts else {}))
        papers, reports = latex.corpus(tex, most=10**9)
        if len(papers) + len(documents) == 1 and len(sources) == 1:
            papers, reports = latex.corpus(tex)
        documents += [(name, {"text": text}) for name, text in papers]
        records += [vars(report) for report in reports]
    rows, names, repeated = _distinct(documents, {*columns, "prompt", "response", "messages", "tools", "system"})
    if not rows:
        found = f"no documents in {len(records)} files ({', '.join(ENDS)} are read)"
        raise UserError(f"--{flag} {_named(sources)}: {found}: {_fates(records + repeated)}")
    return rows, names, records + repeated


def _distinct(documents, columns):
    """Of documents (file, row): rows whose columns (a set) differ by more than white space, their names, and records of
    the others; all of them lists.
    """
    first, rows, names, records = {}, [], [], []
    count = Counter()
    for file, row in documents:
        count[file] += 1
        words = {name: row[name].split() for name in sorted(columns & row.keys() or row)}
        key = hashlib.sha256(repr(words).encode("utf-8", "surrogatepass")).digest()
        if key not in first and any(words.values()):
            first[key] = file
            rows.append(row)
            names.append(f"{file} row {count[file]}")
        else:
            reason = f"equal to one of {first[key]}" if key in first else "empty"
            records.append({"file": file, "fate": f"dropped: a document {reason}", "documents": 1})
    return rows, names, records


# ---- the cache ------------------------------------------------------------------------------------------------------


def load(paths: str, flag: str, tokenizer, cache: Path, world, say, **options) -> Corpus:
    """The corpus of folders and files, encoded by rank 0, from the cache where it is there. options: those of
    `encode_files`. Raises UserError for what cannot be read or rendered, before anything is written.
    """

    def on_rank0():
        sources = find_files(paths, flag)
        folder = cache / _cache_name(sources, tokenizer, {"flag": flag, **options})
        try:
            if checkpoint.trusted(folder):
                return folder
        except Untrusted as e:
            print(f"{e}: it is made again")
            checkpoint.fs_remove(folder)
        _store(encode_files(sources, flag, tokenizer, **options), folder)
        return folder

    folder = Path(ddp.from_rank0(world, on_rank0))
    about = checkpoint.load_json(folder / "corpus.json")
    say(f"--{flag} {paths}: {about['summary']} (tokens in {folder})")
    arrays = {path.name: np.memmap(path, KINDS[path.name], mode="r") for path in folder.iterdir() if path.name in KINDS}
    return Corpus(sizes=arrays.pop("sizes"), tokens=data.Tokens(**arrays), **about)


def _cache_name(sources, tokenizer, options):
    """A hash (str) of all that the tokens follow from: texts and their names, options, the tokenizer, and the code."""
    parts = [options, tokenizer.chat_template, str(tokenizer.special_tokens_map), tokenizer.backend_tokenizer.to_str()]
    parts += [checkpoint.sha256(Path(__file__).with_name(f"{name}.py")) for name in CODE]
    for root, paths in sources:
        parts.append("a folder")
        for file in paths:
            try:
                counts = file.name.lower().endswith(ENDS + latex.STYLES) and file.is_file()
                content = checkpoint.sha256(file) if counts else "not read"
            except OSError:
                content = "cannot be read"
            parts.append([file.relative_to(root).as_posix(), content])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _store(corpus, target):
    """Write an encoded corpus into a folder: each array a file without a header, so that every rank can map it."""
    arrays = {**vars(corpus.tokens), "sizes": corpus.sizes}

    def write(folder):
        for name, kind in KINDS.items():
            if arrays[name] is not None:
                checkpoint.fs_write(folder / name, arrays[name].astype(kind).tobytes())
        about = {name: vars(corpus)[name] for name in ("pairs", "files", "summary", "names", "near")}
        checkpoint.save_json(folder / "corpus.json", about)

    checkpoint.save_once(target, write, {"documents": len(corpus.sizes)})


# ---- encoding -------------------------------------------------------------------------------------------------------


def encode_files(
    sources: Sources, flag: str, tokenizer, template: str, max_length: int, chat: str, system: str
) -> Corpus:
    """The corpus of files in tokens.

    template: of a document's text, or of a pair's prompt. max_length: most tokens of a pair; documents are not cut.
    chat: yes, no or auto, for pairs: whether the tokenizer's chat template renders them, with the system turn.
    """
    columns = files.template_columns(template)
    rows, names, records = read_documents(sources, flag, columns)

    # Rows with a response or a chat are pairs; with the default template so are prompts, unless all rows have a text.
    default, near = template == "{text}", []
    marks = {"response", "messages", "prompt" if default else "response"}
    documents = default and all("text" in row for row in rows)
    pairs = not documents and any(marks & row.keys() or (default and pair_formats.problem(row)) for row in rows)
    if pairs:
        for name in ("prompt", "response"):
            files.note_marks(rows, name, f"--{flag} {_named(sources)}")
        uses_chat = chat == "yes" or (chat == "auto" and tokenizer.chat_template)
        template = "{prompt}" if default else template
        layouts = Counter()
        for record in records:
            layouts.update(record.get("columns", {}))
        pieces, spans = pair_pieces(rows, names, f"--{flag} {_named(sources)}", tokenizer, template, uses_chat, system)
        tokens, report = data.encode(tokenizer, pieces, max_length, spans, names)
        places = [slice(*place) for place in zip(tokens.starts, tokens.stops, strict=True)]
        sizes = [text_bytes_of(tokenizer, tokens.ids[place][tokens.learned[place]]) for place in places]
        rendering = "the chat template" if uses_chat else f"{template!r}, the response and {tokenizer.eos_token}"
        read = "; ".join(f"{count:,} of {columns}" for columns, count in layouts.most_common(5))
        found = f"{len(rows):,} pairs ({read}), rendered by {rendering}, responses learned"
    else:
        files.need_texts(rows, columns, _named(sources), flag)
        end = data.end_of_text(tokenizer, need=True)
        pieces = [prompts.render(template, row) for row in rows]
        tokens, report = data.encode(tokenizer, pieces, 10**9)
        sizes = [len(prompts.plain(row).encode()) for row in pieces]
        tokens = end_documents(tokens, end)
        near = _near_copies(pieces)
        found = f"{len(rows):,} documents"
        _, others = pair_formats.renamed({k: v for k, v in rows[0].items() if k != "text"}, columns)
        if default and others:
            found += f" (their column text; {others} are not read)"
    if near:
        groups = "group" if len(near) == 1 else "groups"
        copies = few([names[i] for group in near for i in group])
        found += (
            f"; {sum(map(len, near)):,} documents in {len(near):,} {groups} are nearly equal ({copies}): not held out"
        )
    return Corpus(tokens, np.array(sizes), pairs, records, f"{found}; {_fates(records)}; {report}", names, near)


def _near_copies(pieces):
    """Groups of documents whose beginnings are nearly equal, such as versions of a paper."""
    texts = [prompts.plain(row)[:BEGINNING] for row in pieces]
    if len(texts) > COMPARED:
        return []
    findings = audit.audit(texts, [None] * len(texts), ["train"] * len(texts))
    near = {i for group in findings.near for i in group}
    return findings.near + [group for group in findings.duplicates if not near & set(group)]


def _fates(records):
    """What was dropped and noted, as a str."""
    fates = [record["fate"] for record in records]
    counts = Counter(fate.removeprefix("dropped: ").split(" of ")[0] for fate in fates if "dropped: " in fate)
    words = [f"{count:,} {fate}" for fate, count in counts.most_common(5)]
    hidden = sum(record.get("dropped", {}).get("hidden", 0) for record in records)
    if hidden:
        words.append(f"{hidden:,} characters that TeX does not print left out")
    noted = [record for record in records if record.get("notes")]
    if noted:
        first = noted[0]["notes"][0]
        words.append(f"{len(noted)} files have notes, see corpus.jsonl ({first})")
    return "; ".join(words or ["nothing dropped"])


def text_bytes_of(tokenizer, ids):
    """The number of UTF-8 bytes of the text of tokens."""
    return len(tokenizer.decode(ids, skip_special_tokens=True).encode())


def end_documents(tokens: data.Tokens, end: int) -> data.Tokens:
    """The same rows, each with one more token where it does not end in it: some tokenizers add it themselves."""
    added = (tokens.ids[tokens.stops - 1] != end).astype(np.int64)  # (N,)
    ids = np.insert(tokens.ids, tokens.stops[added == 1], end)
    after = np.cumsum(added)  # (N,) tokens added up to the end of each row
    return data.Tokens(ids, tokens.starts + after - added, tokens.stops + after)


def pair_pieces(
    rows: list[dict],
    names: list[str],
    where: str,
    tokenizer,
    template: str,
    chat: bool,
    system: str,
):
    """Pieces, and the spans to learn, of rows that hold a response, or messages as JSON. names: for errors.

    Raises UserError that names the rows that are no pairs.
    """
    # Added tokens that are not special (<think>, <tool_call>): a model learns to write them.
    words = prompts.spelled(set(tokenizer.get_added_vocab()) - prompts.special_tokens(tokenizer))
    end = tokenizer.convert_ids_to_tokens(data.end_of_text(tokenizer, need=not chat))  # a chat has its own
    system_turn = [prompts.turn("system", system)] if system and chat and prompts.takes_system(tokenizer) else []
    pieces, spans, problems = [], [], []
    for row, name in zip(rows, names, strict=True):
        try:
            turns = _turns(row, template)
            if chat:
                opening = [] if turns and turns[0]["role"] == "system" else system_turn
                tools = json.loads(row.get("tools") or "null")
                rendered, learned = prompts.conversation(tokenizer, opening + turns, tools)
                for key in pair_formats.THOUGHTS:
                    if str(turns[-1].get(key) or "").strip() not in prompts.plain(rendered):
                        raise ValueError(f"the chat template leaves out {key} of the answer: put it into content")
            elif row.get("system", "").strip():
                raise ValueError("system texts" + NO_CHAT)
            elif "messages" in row:
                raise ValueError("messages" + NO_CHAT)
            else:
                prompt = prompts.render(template, row)
                rendered = [*prompt, (True, row["response"]), (False, end)]
                learned = [(len(prompts.plain(prompt)), len(prompts.plain(rendered)))]
            pieces.append(prompts.spell(words, rendered, learned))
            spans.append(learned)
        except KeyError as e:
            problems.append(f"{name}: no {e}")
        except (ValueError, RecursionError) as e:
            problems.append(f"{name}: {e}")
    if problems:
        raise UserError(f"{where}: {len(problems)} of {len(rows)} are no pairs to learn from ({few(problems, 3)})")
    return pieces, spans


def _turns(row, template):
    """A row's turns, as a list of dicts. Raises ValueError or KeyError for what is neither messages nor a pair."""
    wrong = pair_formats.problem(row, files.template_columns(template))
    if wrong:
        raise ValueError(wrong)
    nested = [name for name in ("prompt", "response") if isinstance(row.get(name), files.Nested)]
    if nested and "messages" not in row:
        raise ValueError(f"its {' and '.join(nested)} is a list or object, no text")
    if "messages" in row:
        turns = pair_formats.read_turns(row["messages"])
    else:
        prompt = prompts.plain(prompts.render(template, row))
        turns = [prompts.turn("user", prompt), prompts.turn("assistant", row.get("response", ""))]
    if row.get("system", "").strip() and turns and turns[0]["role"] != "system":
        turns.insert(0, prompts.turn("system", row["system"]))
    answered = False
    for turn in turns:
        role, content, calls = map(turn.get, ("role", "content", "tool_calls"))
        if not (isinstance(content, str) or (content is None and calls)):
            raise ValueError(f"a turn has the role {role!r} and {type(content).__name__} as content")
        answered |= role == "assistant" and bool(calls or content.strip())
    if not answered:
        raise ValueError("no response")
    return turns


# ---- segments -------------------------------------------------------------------------------------------------------


def segments(corpus: Corpus, rows: np.ndarray, tokenizer, max_length: int, cross_document: bool = False) -> data.Tokens:
    """Documents, in the given order, cut into segments that share one token: every one but the first is predicted.

    With cross_document the stream of all documents is cut, and only its own first token is not predicted. Pairs stay
    whole.
    """
    tokens = corpus.tokens.take(rows)
    size = int(corpus.sizes[rows].sum())
    if corpus.pairs:
        tokens.bytes = max(1, size)
        return tokens
    if cross_document:
        tokens = data.join_tokens([np.concatenate([tokens.row(i) for i in range(len(rows))])])

    # A document of n tokens has n - 1 to predict: a segment begins at every max_length-th of them.
    starts = [np.arange(a, b - 1, max_length) for a, b in zip(tokens.starts, tokens.stops, strict=True)]
    ends = np.repeat(tokens.stops, [len(part) for part in starts])
    starts = np.concatenate(starts)

    # The first token of a document is not predicted, so its bytes do not count; BOS is no text and has none.
    for token, times in Counter(tokens.ids[tokens.starts].tolist()).items():
        size -= times * text_bytes_of(tokenizer, [token])
    return data.Tokens(tokens.ids, starts, np.minimum(starts + max_length + 1, ends), bytes=max(1, size))
