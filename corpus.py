"""Documents, or prompts with responses: from folders and files to tokens that are kept in a cache.

A corpus is read and encoded once, by rank 0, into memory-mapped files named by the sha256 of all that they follow from
(texts, template, tokenizer); every rank maps them. Segments of documents are slices of it, so nothing is copied.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import data
import ddp
import files
import latex
import prompts
from errors import Untrusted, UserError, few

ENDS = (".tex", ".txt", ".md", ".jsonl", ".jsonl.gz")
ROLES = ("system", "user", "assistant", "tool")
KINDS = {"ids": np.int32, "starts": np.int64, "stops": np.int64, "sizes": np.int64, "learned": bool}  # files of a cache
CODE = ("corpus", "data", "files", "latex", "latex_clean", "prompts")  # what tokens follow from besides texts
Sources = list[tuple[Path, list[Path]]]  # (folder, its files)


@dataclass
class Corpus:
    """Encoded documents, or pairs of prompt and response; a document's last token is EOS."""

    tokens: data.Tokens
    sizes: np.ndarray  # (N,) UTF-8 bytes of each document, or of what is learned of each pair
    pairs: bool
    files: list[dict]  # what became of each file
    summary: str = ""  # what was found, in a line


# ---- reading --------------------------------------------------------------------------------------------------------


def find_files(paths: str, flag: str) -> Sources:
    """(folder, its files) for each of the comma-separated paths; a file counts alone. Raises UserError."""
    sources = []
    for path in (Path(p.strip()) for p in paths.split(",") if p.strip()):
        if not path.exists():
            raise UserError(f"--{flag} {path}: no such file or folder")
        if path.is_dir():
            inside = [file for file in path.rglob("*") if not file.is_dir()]
            hidden = [file for file in inside if "/." in f"/{file.relative_to(path).as_posix()}"]
            sources.append((path, sorted(set(inside) - set(hidden))))
        elif path.is_file() and _readable(path):
            sources.append((path.parent, [path]))
        else:
            raise UserError(f"--{flag} {path}: expected {', '.join(ENDS)}, or a folder of them")
    return sources


def _named(sources: Sources) -> str:
    return ", ".join(str(paths[0] if len(paths) == 1 else root) for root, paths in sources)


def _readable(file: Path) -> bool:
    return file.name.lower().endswith(ENDS)


def _bytes(file: Path, flag: str) -> bytes:
    """Raises UserError for what cannot be read; what is no file (a pipe, a link to nothing) would be waited for."""
    try:
        if not file.is_file():
            raise UserError(f"--{flag} {file}: no regular file")
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"--{flag} {file}: cannot be read ({e.strerror})") from None


def read_documents(
    sources: Sources, flag: str, columns: tuple[str, ...] = ("text",)
) -> tuple[list[dict], list[str], list[dict]]:
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
                if file.suffix.lower() == ".tex":
                    tex[name] = _bytes(file, flag)
                    continue
                found, fate = _rows_of(file, flag)
            except UserError as e:
                if len(paths) == 1 or ".jsonl" in file.name.lower():
                    raise
                found, fate = [], f"dropped: {str(e).split(': ', 1)[-1]}"
            documents += [(name, row) for row in found]
            records.append({"file": name, "fate": fate, "documents": len(found)})
        papers, reports = latex.corpus(tex, most=10**9)
        if len(papers) + len(documents) == 1 and len(sources) == 1:
            papers, reports = latex.corpus(tex)
        documents += [(name, {"text": text}) for name, text in papers]
        records += [vars(report) for report in reports]
    rows, names, repeated = _distinct(documents, {*columns, "prompt", "response", "messages", "tools"})
    if not rows:
        reason = f": {records[0]['fate'].removeprefix('dropped: ')}" if len(records) == 1 else ""
        found = f"no documents in {len(records)} files ({', '.join(ENDS)} are read)"
        raise UserError(f"--{flag} {_named(sources)}: {found}{reason}")
    return rows, names, records + repeated


def _rows_of(file: Path, flag: str) -> tuple[list[dict[str, str]], str]:
    """The rows of a file that is no LaTeX, and its fate."""
    if not _readable(file):
        return [], f"dropped: {file.suffix or 'no suffix'} is not read"
    if file.suffix.lower() in (".txt", ".md"):
        return [{"text": files.decode_text(_bytes(file, flag), f"--{flag} {file}")}], "read"
    if file.is_file() and not file.stat().st_size:
        return [], "dropped: empty"
    return files.read_rows(str(file), flag), "read"


def _distinct(documents: list[tuple[str, dict]], columns: set[str]) -> tuple[list[dict], list[str], list[dict]]:
    """Rows whose columns differ by more than white space, their names, and records of the others."""
    first, rows, names, records = {}, [], [], []
    count = Counter()
    for file, row in documents:
        count[file] += 1
        words = {name: row[name].split() for name in sorted(columns & row.keys() or row.keys())}
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


def load(
    paths: str, flag: str, tokenizer, cache: Path, world, say, template: str, max_length: int, chat: str, system: str
) -> Corpus:
    """The corpus of folders and files, encoded by rank 0, from the cache where it is there. For the last four see
    `encode_files`. Raises UserError for what cannot be read or rendered, before anything is written.
    """

    def on_rank0() -> Path:
        sources = find_files(paths, flag)
        folder = cache / _cache_name(sources, tokenizer, [flag, template, max_length, chat, system])
        try:
            if checkpoint.trusted(folder):
                return folder
        except Untrusted as e:
            print(f"{e}: it is made again")
            checkpoint.fs_remove(folder)
        _store(encode_files(sources, flag, tokenizer, template, max_length, chat, system), folder)
        return folder

    folder = Path(ddp.from_rank0(world, on_rank0))
    about = checkpoint.load_json(folder / "corpus.json")
    say(f"--{flag} {paths}: {about['summary']} (tokens in {folder})")
    arrays = {
        name: np.memmap(folder / name, kind, mode="r") for name, kind in KINDS.items() if (folder / name).exists()
    }
    return Corpus(sizes=np.array(arrays.pop("sizes")), tokens=data.Tokens(**arrays), **about)


def _cache_name(sources: Sources, tokenizer, options: list) -> str:
    """A hash of all that the tokens follow from: texts and their names, options, the tokenizer, and the code."""
    chat = [tokenizer.chat_template, str(tokenizer.special_tokens_map)]
    digest = hashlib.sha256(json.dumps([options, chat]).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name in CODE:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    for root, paths in sources:
        digest.update(b"a folder\n")
        for file in paths:
            line = f"{file.relative_to(root).as_posix()} {_content(file)}\n"
            digest.update(line.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _content(file: Path) -> str:
    try:
        return checkpoint.sha256(file) if _readable(file) and file.is_file() else "not read"
    except OSError:
        return "cannot be read"


def _store(corpus: Corpus, target: Path) -> None:
    """Write an encoded corpus: each array a file without a header, so that every rank can map it."""
    arrays = {**vars(corpus.tokens), "sizes": corpus.sizes}

    def write(folder: Path) -> None:
        for name, kind in KINDS.items():
            if arrays[name] is not None:
                checkpoint.fs_write(folder / name, arrays[name].astype(kind).tobytes())
        about = {"pairs": corpus.pairs, "files": corpus.files, "summary": corpus.summary}
        checkpoint.save_json(folder / "corpus.json", about)

    target.parent.mkdir(parents=True, exist_ok=True)
    mine = target.with_name(f"{os.getpid()}-{target.name}")  # another run may be making the same one
    checkpoint.save(mine, write, {"documents": len(corpus.sizes)}, keep=0)
    try:
        checkpoint.fs_rename(mine, target)
    except OSError:
        checkpoint.fs_remove(mine)
        checkpoint.verify(target)


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
    pairs = are_pairs(rows, template)
    if pairs:
        uses_chat = chat == "yes" or (chat == "auto" and bool(tokenizer.chat_template))
        template = "{prompt}" if template == "{text}" else template
        where = f"--{flag} {_named(sources)}"
        pieces, spans = pair_pieces(rows, names, where, tokenizer, template, uses_chat, system)
        tokens, report = data.encode(tokenizer, pieces, max_length, spans, names)
        sizes = _learned_bytes(tokens, tokenizer)
        rendering = "the chat template" if uses_chat else f"{template!r}, the response and {tokenizer.eos_token}"
        found = f"{len(rows):,} pairs, rendered by {rendering}, responses learned"
    else:
        files.need_columns(rows, columns, _named(sources), flag)
        pieces = [prompts.render(template, row) for row in rows]
        tokens, report = data.encode(tokenizer, pieces, max_length=10**9)
        sizes = [sum(len(text.encode()) for _, text in row) for row in pieces]
        tokens = end_documents(tokens, data.end_of_text(tokenizer))
        found = f"{len(rows):,} documents"
    summary = f"{found}; {_fates(records)}; {report}"
    return Corpus(tokens, np.array(sizes), pairs, records, summary)


def _fates(records: list[dict]) -> str:
    """What was dropped and noted, in words."""
    fates = [record["fate"].split(" of ")[0] for record in records if "dropped: " in record["fate"]]
    words = [f"{count:,} {fate.removeprefix('dropped: ')}" for fate, count in Counter(fates).most_common(5)]
    noted = sum(bool(record.get("notes")) for record in records)
    if noted:
        words.append(f"{noted} files have notes, see corpus.jsonl")
    return "; ".join(words or ["nothing dropped"])


def _learned_bytes(tokens: data.Tokens, tokenizer) -> list[int]:
    """(N,) UTF-8 bytes of the text that is learned of each row."""
    sizes = []
    for start, stop in zip(tokens.starts, tokens.stops, strict=True):
        ids = tokens.ids[start:stop][tokens.learned[start:stop]]
        sizes.append(len(tokenizer.decode(ids, skip_special_tokens=True).encode()))
    return sizes


def end_documents(tokens: data.Tokens, end: int) -> data.Tokens:
    """The same rows, each with one more token."""
    ids = np.insert(tokens.ids, tokens.stops, end)
    before = np.arange(len(tokens.starts))  # (N,) tokens added before each row
    return data.Tokens(ids, tokens.starts + before, tokens.stops + before + 1)


def are_pairs(rows: list[dict[str, str]], template: str) -> bool:
    """Whether rows are prompts with responses, or chats: they have such columns, and no text of the default's name."""
    marks = {"response", "messages"}
    if template == "{text}":
        if all("text" in row for row in rows):
            return False
        marks.add("prompt")
    return any(marks & row.keys() for row in rows)


def pair_pieces(rows: list[dict], names: list[str], where: str, tokenizer, template: str, chat: bool, system: str):
    """Pieces, and the spans to learn, of rows that hold a response, or messages as JSON. names: for errors.

    Raises UserError that names the rows that are no pairs.
    """
    words = prompts.ordinary_words(tokenizer)
    end = tokenizer.convert_ids_to_tokens(data.end_of_text(tokenizer))
    system_turn = []
    if system and chat and prompts.takes_system(tokenizer):
        system_turn = [{"role": "system", "content": system}]
    pieces, spans, problems = [], [], []
    for row, name in zip(rows, names, strict=True):
        try:
            if chat:
                turns, tools = _messages(row, template)
                opening = [] if turns[0]["role"] == "system" else system_turn
                rendered, learned = prompts.conversation(tokenizer, opening + turns, tools)
            elif "messages" in row:
                raise ValueError("messages need a chat template, and this tokenizer has none or --chat no was given")
            else:
                rendered, learned = prompts.completion(template, row, _response(row), end)
        except (KeyError, ValueError, RecursionError) as e:
            reason = f"no {e}" if isinstance(e, KeyError) else e
            problems.append(f"{name}: {reason}")
        else:
            pieces.append(prompts.spell(words, rendered, learned))
            spans.append(learned)
    if problems:
        raise UserError(f"{where}: {len(problems)} of {len(rows)} are no pairs to learn from ({few(problems, 3)})")
    return pieces, spans


def _response(row: dict[str, str]) -> str:
    if not row.get("response", "").strip():
        raise ValueError("no response")
    return row["response"]


def _messages(row: dict[str, str], template: str) -> tuple[list[dict], list | None]:
    """A row's turns and tools. Raises ValueError or KeyError for what is neither messages nor a pair."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    if "messages" not in row:
        prompt = "".join(text for _, text in prompts.render(template, row))
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": _response(row)}], tools
    turns = json.loads(row["messages"])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("messages is no list of objects with role and content")
    answered = False
    for turn in turns:
        role, content, calls = turn.get("role"), turn.get("content"), turn.get("tool_calls")
        if role not in ROLES or not (isinstance(content, str) or (content is None and calls)):
            raise ValueError(f"a turn has the role {role!r} and {type(content).__name__} as content")
        if role == "assistant" and (calls or content.strip()):
            answered = True
    if not answered:
        raise ValueError("no response")
    return turns, tools


# ---- segments -------------------------------------------------------------------------------------------------------


def split(count: int, val_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of documents to train on and of those held out. Raises UserError where one side would be empty."""
    held_out = int(val_size) if val_size >= 1 else max(1, round(count * val_size))
    if not 0 < held_out < count:
        raise UserError(f"--val_size {val_size:g} of {count} documents leaves none to train on or to hold out")
    order = np.random.default_rng([seed, 0x5B11]).permutation(count)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


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
        stream = np.concatenate([tokens.row(i) for i in range(len(rows))])
        tokens = data.Tokens(stream, np.array([0]), np.array([len(stream)]))

    # A document of n tokens has n - 1 to predict: a segment begins at every max_length-th of them.
    starts = [np.arange(a, b - 1, max_length) for a, b in zip(tokens.starts, tokens.stops, strict=True)]
    document = np.repeat(np.arange(len(starts)), [len(part) for part in starts])
    starts = np.concatenate(starts)
    stops = np.minimum(starts + max_length + 1, tokens.stops[document])

    # The first token of a document is not predicted, so its bytes do not count; BOS is no text and has none.
    for token, times in Counter(tokens.ids[tokens.starts].tolist()).items():
        size -= times * len(tokenizer.decode([token], skip_special_tokens=True).encode())
    return data.Tokens(tokens.ids, starts, stops, bytes=max(1, size))
