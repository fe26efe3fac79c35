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


@dataclass
class Corpus:
    """Encoded documents, or pairs of prompt and response; a document's last token is EOS."""

    tokens: data.Tokens
    sizes: np.ndarray  # (N,) UTF-8 bytes of each document, or of what is learned of each pair
    pairs: bool
    files: list[dict]  # what became of each file


# ---- reading --------------------------------------------------------------------------------------------------------


def find_files(paths: str, flag: str) -> list[tuple[Path, list[Path]]]:
    """(folder, its files) for each of the comma-separated paths; a file stands alone. Raises UserError."""
    found = []
    for path in (Path(p.strip()) for p in paths.split(",") if p.strip()):
        if not path.exists():
            raise UserError(f"--{flag} {path}: no such file or folder")
        if not path.is_dir() and not (path.is_file() and _readable(path)):
            raise UserError(f"--{flag} {path}: expected {', '.join(ENDS)}, or a folder of them")
        inside = [p for p in path.rglob("*") if not p.is_dir() and "/." not in f"/{p.relative_to(path).as_posix()}"]
        found.append((path, sorted(inside)) if path.is_dir() else (path.parent, [path]))
    return found


def _named(sources: list[tuple[Path, list[Path]]]) -> str:
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
    sources: list[tuple[Path, list[Path]]], flag: str, columns: tuple[str, ...] = ("text",)
) -> tuple[list[dict], list[str], list[dict]]:
    """The documents of files as rows of columns, where each stands, and for each file a record of what became of it.

    LaTeX projects are made into documents by latex.py; .txt and .md files are one document each, lines of JSONL one
    each. A project is one document, unless it is all there is: then its chapters are. Rows whose columns (those given,
    or of pairs) are equal but for white space are kept once. A text that cannot be read is passed over and recorded in
    a folder, and raises UserError where the file was named; so do damaged JSONL, and no documents.
    """
    rows, owners, records = [], [], []
    for root, paths in sources:
        tex = {}
        for file in paths:
            name, found = file.relative_to(root).as_posix(), []
            fate = f"dropped: {file.suffix or 'no suffix'} is not read"
            try:
                if file.suffix.lower() == ".tex":
                    tex[name] = _bytes(file, flag)
                    continue
                if _readable(file):
                    found = _rows_of(file, flag)
                    fate = "read" if found else "dropped: empty"
            except UserError as e:
                if len(paths) == 1 or ".jsonl" in file.name.lower():
                    raise
                fate = f"dropped: {str(e).split(': ', 1)[-1]}"
            rows.extend(found)
            owners.extend([name] * len(found))
            records.append({"file": name, "fate": fate, "documents": len(found)})
        documents, reports = latex.corpus(tex, most=10**9)
        if len(documents) + len(rows) == 1 and len(sources) == 1:
            documents, reports = latex.corpus(tex)
        rows.extend({"text": text} for _, text in documents)
        owners.extend(name for name, _ in documents)
        records.extend({"file": r.name, **{k: v for k, v in vars(r).items() if k != "name"}} for r in reports)
    kept, names, repeated = _distinct(rows, owners, {*columns, "prompt", "response", "messages", "tools"})
    if not kept:
        why = f": {records[0]['fate'].removeprefix('dropped: ')}" if len(records) == 1 else ""
        found = f"no documents in {len(records)} files ({', '.join(ENDS)} are read){why}"
        raise UserError(f"--{flag} {_named(sources)}: {found}")
    return kept, names, records + repeated


def _rows_of(file: Path, flag: str) -> list[dict[str, str]]:
    if file.suffix.lower() in (".txt", ".md"):
        return [{"text": files.decode_text(_bytes(file, flag), f"--{flag} {file}")}]
    return [] if file.is_file() and not file.stat().st_size else files.read_rows(str(file), flag)


def _distinct(rows: list[dict], owners: list[str], columns: set[str]) -> tuple[list[dict], list[str], list[dict]]:
    """Rows whose columns differ by more than white space, where each stands, and records of the others."""
    seen, kept, names, records, count = {}, [], [], [], Counter()
    for row, owner in zip(rows, owners, strict=True):
        count[owner] += 1
        said = {name: row[name].split() for name in sorted(columns & row.keys() or row.keys())}
        key = hashlib.sha256(repr(said).encode("utf-8", "surrogatepass")).digest()
        if key in seen or not any(said.values()):
            why = f"equal to one of {seen[key]}" if key in seen else "empty"
            records.append({"file": owner, "fate": f"dropped: a document {why}", "documents": 1})
            continue
        seen[key] = owner
        kept.append(row)
        names.append(f"{owner} row {count[owner]}")
    return kept, names, records


# ---- encoding -------------------------------------------------------------------------------------------------------


def load(paths: str, flag: str, tokenizer, cache: Path, world, say, **how) -> Corpus:
    """The corpus of folders and files, encoded by rank 0, from the cache where it is there. how: see `encoded`.

    Raises UserError for what cannot be read or rendered, before anything is written.
    """
    folder = Path(ddp.from_rank0(world, lambda: _cached(find_files(paths, flag), flag, tokenizer, cache, how)))
    facts = checkpoint.load_json(folder / "corpus.json")
    say(f"--{flag} {paths}: {facts['said']} (tokens in {folder})")
    arrays = {name: np.memmap(folder / name, kind, mode="r") for name, kind in kinds(facts["pairs"]).items()}
    sizes = np.array(arrays.pop("sizes"))
    return Corpus(data.Tokens(**arrays), sizes, facts["pairs"], facts["files"])


def kinds(pairs: bool) -> dict[str, type]:
    """The files of an encoded corpus, each one array without a header, and what they hold."""
    found = {"ids": np.int32, "starts": np.int64, "stops": np.int64, "sizes": np.int64}
    return {**found, "learned": bool} if pairs else found


def _digest(file: Path) -> str:
    try:
        return checkpoint.sha256(file) if file.is_file() else "no regular file"
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def _cached(sources: list[tuple[Path, list[Path]]], flag: str, tokenizer, cache: Path, how: dict) -> Path:
    """The folder of an encoded corpus, made where it is not there: named by all that it follows from, code included."""
    key = hashlib.sha256(json.dumps([flag, how, tokenizer.chat_template, str(tokenizer.special_tokens_map)]).encode())
    code = [Path(__file__).with_name(f"{name}.py") for name in ("corpus", "latex", "prompts", "data")]
    for root, paths in [(Path(__file__).parent, code), *sources]:
        key.update(b"a folder\n")
        for file in paths:
            content = _digest(file) if _readable(file) or file in code else "not read"
            key.update(f"{file.relative_to(root).as_posix()} {content}\n".encode("utf-8", "surrogatepass"))
    key.update(tokenizer.backend_tokenizer.to_str().encode())
    target = cache / key.hexdigest()[:32]
    try:
        if checkpoint.trusted(target):
            return target
    except Untrusted as e:
        print(f"{e}: it is made again")
        checkpoint.fs_remove(target)
    corpus, said = encoded(sources, flag, tokenizer, **how)
    arrays = {**vars(corpus.tokens), "sizes": corpus.sizes}

    def write(folder: Path) -> None:
        for name, kind in kinds(corpus.pairs).items():
            checkpoint.fs_write(folder / name, arrays[name].astype(kind).tobytes())
        checkpoint.save_json(folder / "corpus.json", {"pairs": corpus.pairs, "files": corpus.files, "said": said})

    cache.mkdir(parents=True, exist_ok=True)
    mine = cache / f"{os.getpid()}-{target.name}"  # another run may be making the same one
    checkpoint.save(mine, write, {"documents": len(corpus.sizes)}, keep=0)
    try:
        checkpoint.fs_rename(mine, target)
    except OSError:
        checkpoint.fs_remove(mine)
        checkpoint.verify(target)
    return target


def encoded(
    sources: list[tuple[Path, list[Path]]], flag: str, tokenizer, template: str, max_length: int, chat: str, system: str
) -> tuple[Corpus, str]:
    """The corpus of files in tokens, and a line that says what was found.

    template: of a document's text, or of a pair's prompt. max_length: most tokens of a pair; documents are not cut.
    chat: yes, no or auto, for pairs: whether the tokenizer's chat template renders them, with the system turn.
    """
    columns = files.template_columns(template)
    rows, names, records = read_documents(sources, flag, columns)
    dropped = Counter(f["fate"].removeprefix("dropped: ").split(" of ")[0] for f in records if "dropped" in f["fate"])
    noted = sum(bool(f.get("notes")) for f in records)
    said = "; ".join(f"{count:,} {why}" for why, count in dropped.most_common(5)) or "nothing dropped"
    said += f"; {noted} files have notes, see corpus.jsonl" if noted else ""
    if not are_pairs(rows, template):
        files.need_columns(rows, columns, _named(sources), flag)
        texts = [prompts.render(template, row) for row in rows]
        tokens, report = data.encode(tokenizer, texts, max_length=10**9)
        sizes = np.array([sum(len(text.encode()) for _, text in row) for row in texts])
        tokens = _ended(tokens, data.end_of_text(tokenizer))
        return Corpus(tokens, sizes, False, records), f"{len(rows):,} documents, {said}; {report}"
    chatty = chat == "yes" or (chat == "auto" and bool(tokenizer.chat_template))
    template = "{prompt}" if template == "{text}" else template
    pieces, spans = pair_pieces(rows, names, f"--{flag} {_named(sources)}", tokenizer, template, chatty, system)
    tokens, report = data.encode(tokenizer, pieces, max_length, spans, names)
    learned = [tokens.row(i)[tokens.learned[tokens.starts[i] : tokens.stops[i]]] for i in range(len(rows))]
    sizes = np.array([len(tokenizer.decode(ids, skip_special_tokens=True).encode()) for ids in learned])
    way = "the chat template" if chatty else f"{template!r}, the response and {tokenizer.eos_token}"
    said = f"{len(rows):,} pairs, rendered by {way}, responses learned; {said}; {report}"
    return Corpus(tokens, sizes, True, records), said


def _ended(tokens: data.Tokens, end: int) -> data.Tokens:
    """The same rows, each with one more token."""
    ids = np.insert(tokens.ids, tokens.stops, end)
    count = np.arange(len(tokens.starts))
    return data.Tokens(ids, tokens.starts + count, tokens.stops + count + 1)


def are_pairs(rows: list[dict[str, str]], template: str) -> bool:
    """Whether rows are prompts with responses, or chats: they have such columns, and no text of the default's name."""
    if template == "{text}" and all("text" in row for row in rows):
        return False
    marks = {"response", "messages", *(["prompt"] if template == "{text}" else [])}
    return any(marks & row.keys() for row in rows)


def pair_pieces(rows: list[dict], names: list[str], where: str, tokenizer, template: str, chat: bool, system: str):
    """Pieces, and the spans to learn, of rows that hold a response, or messages as JSON. names: for errors.

    Raises UserError that names the rows that are no pairs.
    """
    system = system if chat and prompts.takes_system(tokenizer) else ""
    end = tokenizer.convert_ids_to_tokens(data.end_of_text(tokenizer))
    words, pieces, spans, wrong = prompts.ordinary_words(tokenizer), [], [], []
    for row, name in zip(rows, names, strict=True):
        try:
            if chat:
                turns, tools = _messages(row, template)
                first = [{"role": "system", "content": system}] if system and turns[0]["role"] != "system" else []
                found = prompts.conversation(tokenizer, first + turns, tools)
            elif "messages" in row:
                raise ValueError("messages need a chat template, and this tokenizer has none or --chat no was given")
            else:
                found = prompts.completion(template, row, _response(row), end)
        except (KeyError, ValueError, RecursionError) as e:
            wrong.append(f"{name}: {f'no {e}' if isinstance(e, KeyError) else e}")
            continue
        pieces.append(prompts.spell(words, *found))
        spans.append(found[1])
    if wrong:
        raise UserError(f"{where}: {len(wrong)} of {len(rows)} are no pairs to learn from ({few(wrong, 3)})")
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
    if not isinstance(turns, list) or not turns or not all(isinstance(t, dict) for t in turns):
        raise ValueError("messages is no list of objects with role and content")
    for turn in turns:
        content = turn.get("content")
        silent = content is None and turn.get("tool_calls")
        if turn.get("role") not in ROLES or not (silent or isinstance(content, str)):
            raise ValueError(f"a turn has the role {turn.get('role')!r} and {type(content).__name__} as content")
    if not any(t["role"] == "assistant" and ((t.get("content") or "").strip() or t.get("tool_calls")) for t in turns):
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
    if corpus.pairs:
        tokens.bytes = max(1, int(corpus.sizes[rows].sum()))
        return tokens
    if cross_document:
        stream = np.concatenate([tokens.row(i) for i in range(len(rows))])
        tokens = data.Tokens(stream, np.array([0]), np.array([len(stream)]))
    count = -(-(tokens.lengths - 1) // max_length)  # (N,) segments of each document
    which = np.repeat(np.arange(len(count)), count)
    offset = (np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)) * max_length
    starts = tokens.starts[which] + offset
    stops = np.minimum(starts + max_length + 1, tokens.stops[which])
    first, times = np.unique(tokens.ids[tokens.starts], return_counts=True)  # not predicted, so not counted
    plain = [tokenizer.decode([i], skip_special_tokens=True) for i in first]  # BOS is no text
    unseen = sum(len(text.encode()) * int(n) for text, n in zip(plain, times, strict=True))
    return data.Tokens(tokens.ids, starts, stops, bytes=max(1, int(corpus.sizes[rows].sum()) - unseen))
