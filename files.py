"""From files to rows: CSV, TSV, JSONL and Parquet, every value a string, nothing guessed."""

import ast
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import formats
import prompts
from errors import UserError, few

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # texts are longer than its default

LONE = re.compile("[\ud800-\udfff]")  # half a surrogate pair: cannot be encoded, so neither read nor printed
BYTES = re.compile(r"b(['\"]).*\1", re.DOTALL)  # b'Solve ...'
Rows = list[dict[str, str]]  # of a file: column -> cell

DELIMITERS = {".csv": ",", ".tsv": "\t"}


# ---- rows -----------------------------------------------------------------------------------------------------------


def read_rows(path: str, flag: str) -> Rows:
    """The rows of a CSV, TSV or JSONL file (each also .gz) or Parquet file, all values as strings.

    flag: the command-line flag that names the file, for errors. Raises UserError with what is wrong and where.
    """
    where = f"--{flag} {path}"
    suffix = format_of(path)
    if not Path(path).is_file():
        raise UserError(f"{where}: no such file; give the path of a CSV, TSV or JSONL file with --{flag} PATH")
    if suffix == ".parquet":
        rows = _parquet(path, where)
    elif suffix == ".jsonl":
        rows = _jsonl(read_text(path, where), where)
    elif suffix in DELIMITERS:
        rows = _csv(read_text(path, where), where, DELIMITERS[suffix])
    else:
        raise UserError(f"{where}: expected a name ending in .csv, .tsv, .jsonl (.gz too) or .parquet, got '{suffix}'")
    if not rows:
        raise UserError(f"{where}: no rows")
    return rows


def format_of(path: str) -> str:
    """The suffix that names a file's format, .gz aside."""
    return Path(path.lower().removesuffix(".gz")).suffix


def read_text(path: str, where: str) -> str:
    """The text of a UTF-8 file, unpacked. Raises UserError, beginning with `where`, for anything else."""
    try:
        raw = Path(path).read_bytes()
        if path.lower().endswith(".gz"):
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{where}: cannot be read ({e})") from None
    return decode_text(raw, where)


def decode_text(raw: bytes, where: str) -> str:
    """The bytes as text, without a BOM. Raises UserError that names what the file is, or the line that is no UTF-8."""
    what = formats.binary(raw)
    if what:
        raise UserError(f"{where}: this is {what}")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        byte, line = e.object[e.start], e.object.count(b"\n", 0, e.start) + 1
        raise UserError(f"{where}: not UTF-8 (byte 0x{byte:02x} in line {line}); save it as UTF-8") from None
    before, nul, _ = text.partition("\0")
    if nul:
        raise UserError(f"{where}: line {before.count(chr(10)) + 1} holds a NUL character")
    return text


def _csv(text, where, delimiter):
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        for name in duplicates(header):
            raise UserError(f"{where}: column {name!r} is duplicated in the header")
        rows = [(reader.line_num, values) for values in reader if values]  # blank lines aside
    except csv.Error as e:
        raise UserError(f"{where}: line {reader.line_num}: {e} (an unclosed or stray quote?)") from None
    ragged = [f"line {line} has {len(values)}" for line, values in rows if len(values) != len(header)]
    if ragged:
        raise UserError(f"{where}: {len(ragged)} rows do not have the header's {len(header)} columns ({few(ragged)})")
    return [dict(zip(header, values, strict=True)) for _, values in rows]


def _jsonl(text, where):
    def unique_keys(pairs):
        for key in duplicates(key for key, _ in pairs):
            raise ValueError(f"key {key!r} is duplicated")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no JSON value; write null or leave the key out")

    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys, parse_constant=refuse)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            row = {key: _text(value) for key, value in row.items()}
            if "\\u" in line and LONE.search("".join([*row, *row.values()])):
                raise ValueError("it holds a lone surrogate, which is no text")
            rows.append(row)
        except (ValueError, RecursionError) as e:
            problems.append(f"line {number}: {e}")
    if problems:
        raise UserError(f"{where}: {len(problems)} lines are not JSON objects ({few(problems)})")
    return rows


def _parquet(path, where):
    try:
        import pyarrow.parquet as pq

        rows = pq.read_table(path).to_pylist()
    except ImportError:
        raise UserError(f"{where}: Parquet needs pyarrow (pip install pyarrow), or save it as CSV") from None
    except (OSError, ValueError) as e:
        raise UserError(f"{where}: cannot be read as Parquet ({str(e).splitlines()[0]})") from None
    return [{key: _text(value) for key, value in row.items()} for row in rows]


def _text(value):
    if isinstance(value, list | dict):
        return json.dumps(value)
    return "" if value is None else str(value)


def duplicates(values) -> list[str]:
    """The values that are there more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


# ---- columns --------------------------------------------------------------------------------------------------------


def template_columns(template: str) -> list[str]:
    """The columns that a text template names. Raises UserError for a malformed one."""
    try:
        return prompts.fields(template)
    except ValueError as e:
        raise UserError(f"--text: {e}") from None


def need_columns(rows: Rows, columns: list[str], path: str, flag: str) -> None:
    """Raise UserError unless every row has all columns; names what exists."""
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if c not in row]
        if missing:
            names, hint = ", ".join(missing), ""
            if number > 1:  # JSON lines need not have the same keys
                names += f" in row {number}"
            elif len(row) == 1:
                hint = "; the header is a single column: is the file separated by commas?"
            raise UserError(f"--{flag} {path}: no column {names} (there is: {', '.join(row)}){hint}")


def decode_bytes_literals(rows: Rows, columns: list[str]) -> int:
    """Turn fields that are Python bytes literals (b'Solve ...\\n') into the text they stand for, in place.

    Returns how many rows were changed.
    """
    changed = set()
    for i, row in enumerate(rows):
        for column in columns:
            if BYTES.fullmatch(row[column]):
                # what cannot be decoded is ordinary text that merely looks like one
                with suppress(ValueError, SyntaxError, AttributeError, RecursionError, MemoryError):
                    row[column] = ast.literal_eval(row[column]).decode("utf-8")
                    changed.add(i)
    return len(changed)


def empty_rows(rows: Rows, columns: list[str]) -> list[int]:
    """Indices of rows whose text columns are all blank."""
    return [i for i, row in enumerate(rows) if not any(row[c].strip() for c in columns)]
