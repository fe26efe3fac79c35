"""From files to rows."""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from pathlib import Path

import prompts
from errors import UserError, few

LONE = re.compile("[\ud800-\udfff]")  # half a surrogate pair: cannot be encoded, so neither read nor printed
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


# ---- rows -----------------------------------------------------------------------------------------------------------


def read_rows(path: str, flag: str) -> list[dict[str, str]]:
    """The rows of a CSV, TSV or JSONL file (each also .gz) or Parquet file, all values as strings, nothing guessed.

    flag: the command-line flag that names the file, for errors. Raises UserError with what is wrong and where.
    """
    p = Path(path)
    suffix = Path(p.stem).suffix.lower() if p.suffix.lower() == ".gz" else p.suffix.lower()
    if not p.is_file():
        raise UserError(f"--{flag} {path}: no such file; give the path of a CSV, TSV or JSONL file with --{flag} PATH")
    if suffix not in FORMATS:
        raise UserError(f"--{flag} {path}: expected a name ending in {', '.join(FORMATS)} (.gz too), got '{suffix}'")
    where = f"--{flag} {path}"
    if suffix == ".parquet":
        rows = _parquet(path, where)
    else:
        try:
            raw = gzip.decompress(p.read_bytes()) if p.suffix.lower() == ".gz" else p.read_bytes()
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{where}: cannot be read ({e})") from None
        text = decode_text(raw, where)
        rows = _jsonl(text, where) if suffix == ".jsonl" else _csv(text, where, suffix)
    if not rows:
        raise UserError(f"{where}: no rows")
    return rows


def decode_text(raw: bytes, where: str) -> str:
    if raw[:2] == b"PK":
        raise UserError(f"{where}: this is a zip archive; unpack it first")
    if raw[:4] == b"PAR1":
        raise UserError(f"{where}: this is a Parquet file; name it .parquet")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where}: this is UTF-16; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1  # e.object: the bytes without their BOM
        raise UserError(
            f"{where}: not UTF-8 (byte 0x{e.object[e.start]:02x} in line {line}); save it as UTF-8"
        ) from None
    if "\0" in text:
        raise UserError(f"{where}: line {text.count(chr(10), 0, text.index(chr(0))) + 1} holds a NUL character")
    return text


def _csv(text: str, where: str, suffix: str) -> list[dict[str, str]]:
    delimiter = "\t" if suffix == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, odd = [], []
    try:
        header = next(reader, None)
        if header is None:
            raise UserError(f"{where}: the file is empty")
        twice = [name for name, n in Counter(header).items() if n > 1]
        if twice:
            raise UserError(f"{where}: column {', '.join(map(repr, twice))} stands twice in the header")
        for values in reader:
            if not values:
                continue  # a blank line
            if len(values) != len(header):
                odd.append(f"line {reader.line_num} has {len(values)}")
            else:
                rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as e:
        raise UserError(f"{where}: line {reader.line_num}: {e} (an unclosed or stray quote?)") from None
    if odd:
        raise UserError(f"{where}: {len(odd)} rows do not have the header's {len(header)} columns ({few(odd)})")
    return rows


def _jsonl(text: str, where: str) -> list[dict[str, str]]:
    def once(pairs):
        twice = [k for k, n in Counter(k for k, _ in pairs).items() if n > 1]
        if twice:
            raise ValueError(f"key {twice[0]!r} stands twice")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no JSON value; write null or leave the key out")

    rows, bad = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=once, parse_constant=refuse)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            row = {k: _text(v) for k, v in row.items()}
            if "\\u" in line and any(LONE.search(part) for pair in row.items() for part in pair):
                raise ValueError("it holds a lone surrogate, which is no text")
            rows.append(row)
        except (ValueError, RecursionError) as e:
            bad.append(f"line {number}: {e}")
    if bad:
        raise UserError(f"{where}: {len(bad)} lines are not JSON objects ({few(bad)})")
    return rows


def _parquet(path: str, where: str) -> list[dict[str, str]]:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{where}: Parquet needs pyarrow (pip install pyarrow), or save it as CSV") from None
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as e:
        raise UserError(f"{where}: cannot be read as Parquet ({str(e).splitlines()[0]})") from None
    return [{k: _text(v) for k, v in row.items()} for row in rows]


def _text(value) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def template_columns(template: str) -> list[str]:
    """The columns that a text template names. Raises UserError for a malformed one."""
    try:
        return prompts.fields(template)
    except ValueError as e:
        raise UserError(f"--text: {e}") from None


def need_columns(rows: list[dict[str, str]], columns: list[str], path: str, flag: str) -> None:
    """Raise UserError unless every row has all columns; names what exists."""
    missing = [c for c in columns if any(c not in row for row in rows)]
    if missing:
        exists = list(rows[0])
        hint = ""
        if len(exists) == 1 and re.search(r"[;\t|]", exists[0]):
            hint = "; the header is a single column: is the file separated by commas?"
        names = ", ".join(missing)
        if any(c in exists for c in missing):  # JSON lines need not have the same keys
            first = next(i for i, row in enumerate(rows) if any(c not in row for c in missing))
            names, exists = f"{names} in row {first + 1}", list(rows[first])
        raise UserError(f"--{flag} {path}: no column {names} (there is: {', '.join(exists)}){hint}")


def decode_bytes_literals(rows: list[dict[str, str]], columns: list[str]) -> int:
    """Turn fields that are Python bytes literals (b'Solve ...\\n') into the text they stand for, in place.

    Returns how many rows were changed.
    """
    changed = 0
    for row in rows:
        before = changed
        for column in columns:
            value = row[column]
            if value[:2] in ("b'", 'b"') and value[-1:] == value[1]:
                try:
                    row[column] = ast.literal_eval(value).decode("utf-8")
                    changed = before + 1
                except (ValueError, SyntaxError, AttributeError, RecursionError, MemoryError):
                    pass  # ordinary text that merely looks like one
    return changed


def empty_rows(rows: list[dict[str, str]], columns: list[str]) -> list[int]:
    """Indices of rows whose text columns are all blank."""
    return [i for i, row in enumerate(rows) if not any(row[c].strip() for c in columns)]
