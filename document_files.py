"""Files of documents or pairs that are no LaTeX, as rows: plain text, JSON lines and lists, tables."""

from collections import Counter
from pathlib import Path

import files
import formats
import pair_formats
import text_bytes
from errors import UserError, one_line

ENDS = tuple(".tex .txt .md .jsonl .jsonl.gz".split())
NAMED = (*ENDS, ".json", ".json.gz", ".csv", ".tsv", ".parquet")  # only where such a file is named: a folder has many


def read_bytes(file: Path, flag: str) -> bytes:
    """The bytes of a file (Path). Raises UserError for what cannot be read; what is no file (a pipe, a link to nothing)
    would be waited for.
    """
    try:
        if not file.is_file():
            raise UserError(f"--{flag} {file}: no regular file")
        return file.read_bytes()
    except OSError as e:
        raise UserError(f"--{flag} {file}: cannot be read ({e.strerror})") from None


def rows_of(file: Path, flag: str, named: bool) -> tuple:
    """(rows, fate, and perhaps a note) of a file (Path) that is no LaTeX. named: by the user, not found in a folder."""
    if not file.name.lower().endswith(NAMED if named else ENDS):
        return [], f"dropped: {file.suffix or 'no suffix'} is not read"
    if file.suffix.lower() in (".txt", ".md"):
        return _plain_document(file, flag)
    if file.is_file() and not file.stat().st_size:
        return [], "dropped: empty"
    if file.is_file() and formats.lfs_pointer(file):
        raise UserError(f"--{flag} {file}: this is {formats.POINTER}")
    if files.format_of(str(file)) == ".json":
        return _json_rows(file, flag), "read"
    return files.read_rows(str(file), flag), "read"


def _plain_document(file, flag):
    """(rows, fate, and perhaps a note) of a .txt or .md file."""
    raw = read_bytes(file, flag)
    decoded = text_bytes.decode(raw, guess=False)
    if decoded is None or formats.lfs_pointer(raw):
        where = f"--{flag} {file}"
        files.read_text(str(file), where)  # says what is wrong
        raise UserError(f"{where}: {text_bytes.refusal(raw)}")
    text, encoding = decoded
    return [{"text": text}], "read", *filter(None, [text_bytes.note(raw, encoding)])


def _json_rows(file, flag):
    """The rows of a file that holds a JSON list of objects."""
    where = f"--{flag} {file}"
    try:
        values = files.from_json(files.read_text(str(file), where))
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: cannot be read as JSON ({one_line(e)}); JSON lines end in .jsonl") from None
    if not pair_formats.are_objects(values):
        raise UserError(f"{where}: expected a list of objects, each a document or a pair")
    return [{key: files.cell(value) for key, value in row.items()} for row in values]


def as_pairs(rows: list[dict], columns: list[str]) -> tuple[list[dict], dict[str, int]]:
    """The rows with the names of pairs where they are some, and how many have which columns: {columns: count}."""
    renamed = [pair_formats.renamed(row, columns) for row in rows]
    layouts = Counter(layout for _, layout in renamed if layout)
    return [row for row, _ in renamed], dict(layouts)
