"""From files to rows: CSV, TSV, JSONL and Parquet, every value a string, nothing guessed."""

import ast
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import delimited
import formats
import prompts
import spelling
import spool
from errors import UserError, duplicates, few, nearest, note, one_line, warning

LONE = re.compile("[\ud800-\udfff]")  # half a surrogate pair: cannot be encoded, so neither read nor printed
BYTES = re.compile(r"b(['\"]).*\1", re.DOTALL)  # b'Solve ...'
Rows = list[dict[str, str]]  # of a file: column -> cell

DELIMITERS = {".csv": ",", ".tsv": "\t"}
AS_LINES = "write one object a line, in .jsonl (pandas: to_json(orient='records', lines=True))"
UNPACKED, RATIO = 2**26, 200  # a gzip file that unpacks to more bytes than this, and than its own times this, is a bomb


class Nested(str):
    """The cell of a column that holds a list or an object: that as JSON."""


class Unreadable(str):
    """The cell of a column that holds no text: what it holds. It may be in a row, but not be used."""


spool.KINDS.update(Nested=Nested, Unreadable=Unreadable)


class Number(float):
    """A number of JSON, which keeps its spelling: an id 1.10 is not 1.1."""

    def __new__(cls, text: str):
        number = super().__new__(cls, text)
        if not math.isfinite(number):
            raise ValueError(f"{text} is too large a number; write it as a string")
        number.text = text
        return number

    def __str__(self):
        return self.text


# ---- rows -----------------------------------------------------------------------------------------------------------


def read_rows(path: str, flag: str) -> Rows:
    """The rows of a file as a list; see `stream_rows`."""
    return list(stream_rows(path, flag))


def stream_rows(path: str, flag: str, limit: int = 0) -> Sequence[dict[str, str]]:
    """The rows of a CSV, TSV or JSONL file (each also .gz) or Parquet file, all values as strings; see spool.py.

    flag: the command-line flag that names the file, for errors. limit: most rows that are read; 0: all. Raises
    UserError with what is wrong and where.
    """
    where = f"--{flag} {path}"
    suffix = format_of(path)
    if not Path(path).is_file():
        reason = " (it is a folder; one file is read)" if Path(path).is_dir() else ""
        if re.search(r"[*?,\[]", path):
            reason = " (one file is read, no list and no pattern)"
        raise UserError(f"{where}: no such file{reason}; give the path of a CSV, TSV or JSONL file with --{flag} PATH")
    if suffix == ".parquet":
        rows = _parquet(path, where)[: limit or None]
    elif suffix == ".jsonl":
        rows = _jsonl(read_lines(path, where, "\n", limit), where, limit)
    elif suffix in DELIMITERS:
        rows = delimited.read(read_lines(path, where, "", limit), where, DELIMITERS[suffix], limit)
    else:
        advice = f"; {AS_LINES}" if suffix == ".json" else ""
        expected = f"expected a name ending in .csv, .tsv, .jsonl (.gz too) or .parquet, got '{suffix}'"
        raise UserError(f"{where}: {expected}{advice}")
    if not rows:
        raise UserError(f"{where}: no rows")
    for names in spelling.alike(set(chain.from_iterable(rows))):
        note(f"note: {where}: {' and '.join(spelling.quoted(names))} are different columns")
    return rows


def format_of(path: str) -> str:
    """The suffix that names a file's format, .gz aside."""
    return Path(path.lower().removesuffix(".gz")).suffix


def read_text(path: str, where: str) -> str:
    """The text of a file; see `read_lines`."""
    return "".join(read_lines(path, where))


def read_lines(path: str, where: str, newline: str = "", limit: int = 0) -> Iterator[str]:
    """The lines of a UTF-8 file, unpacked, with their ends and without a BOM. newline: as for `open`. limit: where only
    so many rows are read, all of a packed file is not unpacked first.

    Raises UserError, beginning with `where`, for anything else, and for what is too long before it is in memory.
    """
    try:
        with _opened(path, where, limit) as raw:
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline=newline)
            for number, line in enumerate(iter(partial(text.readline, delimited.LIMIT), ""), 1):
                if len(line) == delimited.LIMIT:
                    raise UserError(f"{where}: line {number} has {delimited.LIMIT:,} characters or more: leave it out")
                if "\0" in line:
                    hint = "; this is UTF-16, save it as UTF-8" if formats.utf16(line.encode()) else ""
                    raise UserError(f"{where}: line {number} holds a NUL character{hint}")
                yield line
    except UnicodeDecodeError:
        raise UserError(f"{where}: {_undecodable(path, where)}") from None
    except (OSError, EOFError, zlib.error) as e:
        reason = one_line(e)
        if reason.startswith("Not a gzipped file"):  # its start is, see _opened
            reason = "other bytes follow the end of the gzip archive: damaged, or joined with something else"
        raise UserError(f"{where}: cannot be read ({reason})") from None


def _opened(path, where, limit=0):
    """The unpacked bytes of a file as a stream. Raises UserError for what is no text."""
    if path.lower().endswith(".gz"):
        start = formats.first_bytes(path)
        if not start.startswith(formats.GZIP):
            _refuse_binary(start, where)
            raise UserError(f"{where}: cannot be read: it is not packed; take .gz off its name")
        most = max(UNPACKED, RATIO * Path(path).stat().st_size)
        with gzip.open(path) as raw:
            while not limit and raw.read(2**20):
                if raw.tell() > most:
                    raise UserError(f"{where}: it unpacks to more than {most:,} bytes: no data, but a gzip bomb")
        raw = gzip.open(path)
    else:
        raw = open(path, "rb")
    _refuse_binary(raw.peek(formats.START), where)
    return raw


def _refuse_binary(start, where, but=b"\0"):
    """Raise UserError for the first bytes of a file that is of some other kind than the one it may be."""
    what = formats.binary(start)
    if what and not start.startswith(but):
        raise UserError(f"{where}: this is {what}")


def _undecodable(path, where):
    """What to say of the first line of a file that is no UTF-8."""
    with _opened(path, where) as raw:
        for number, line in enumerate(iter(partial(raw.readline, 4 * delimited.LIMIT), b""), 1):
            try:
                line.decode()
            except UnicodeDecodeError as e:
                return f"not UTF-8 (byte 0x{line[e.start]:02x} in line {number}); save it as UTF-8"


def from_json(text: str):
    """A JSON value. Raises ValueError for what is none, for duplicated keys and for numbers that are too large."""

    def unique_keys(pairs):
        for key in duplicates(key for key, _ in pairs):
            raise ValueError(f"key {key!r} is duplicated")
        return dict(pairs)

    def refuse(word):
        raise ValueError(f"{word} is no JSON value; write null or leave the key out")

    def whole_number(text):
        return Number(text) if text == "-0" else int(text)

    numbers = {"parse_float": Number, "parse_int": whole_number, "parse_constant": refuse}
    return json.loads(text, object_pairs_hook=unique_keys, **numbers)


def _jsonl(lines, where, limit):
    rows, problems = spool.Records(), []
    for number, line in enumerate(lines, 1):
        if limit and len(rows) + len(problems) == limit:
            break
        line = line.lstrip("\ufeff")
        if not line.strip():
            continue
        try:
            row = from_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            row = {key: cell(value) for key, value in row.items()}
            if "\\u" in line and LONE.search("".join([*row, *row.values()])):
                raise ValueError("it holds a lone surrogate, which is no text")
            rows.append(row)
        except (ValueError, RecursionError) as e:
            problems.append(f"line {number}: {e}")
    if problems:
        raise UserError(f"{where}: {len(problems)} lines are not JSON objects ({few(problems)}); {AS_LINES}")
    return rows.rows()


def _parquet(path, where):
    try:
        import pyarrow.parquet as pq

        table = pq.read_table(path)
    except ImportError:
        raise UserError(f"{where}: Parquet needs pyarrow (pip install pyarrow), or save it as CSV") from None
    except (OSError, ValueError) as e:
        _refuse_binary(formats.first_bytes(path), where, but=formats.PARQUET)
        raise UserError(f"{where}: cannot be read as Parquet ({one_line(e)})") from None
    for name in duplicates(table.column_names):
        raise UserError(f"{where}: column {name!r} is duplicated")
    rows = spool.Records()
    for row in zip(*map(_cells, table.columns), strict=True):
        rows.append(dict(zip(table.column_names, row, strict=True)))
    return rows.rows()


def _cells(column):
    """The cells of a Parquet column as strings."""
    try:
        return list(map(cell, column.to_pylist()))
    except (ValueError, OverflowError) as e:  # nanoseconds, years over 9999
        return [Unreadable(f"{column.type} ({one_line(e)})")] * len(column)


def cell(value) -> str:
    """A value of JSON or Parquet as the cell of a row."""
    if isinstance(value, list | dict):
        try:
            return Nested(json.dumps(value, default=_plain))
        except TypeError:
            return Unreadable("bytes in a list or struct")
    if isinstance(value, bytes):
        return Unreadable("bytes")
    return "" if value is None else str(value)


def _plain(value):
    """A date, time, duration or decimal within a list as it reads alone."""
    if isinstance(value, bytes):
        raise TypeError
    return str(value)


def rows_of_texts(texts, columns: list[str]) -> Rows:
    """Texts or dicts, or a single one of them, as rows of the template's columns. UserError for anything else."""
    if isinstance(texts, str | dict):
        texts = [texts]
    ordered = isinstance(texts, Iterable) and not isinstance(texts, bytes | set | frozenset)
    if not ordered or getattr(texts, "ndim", 1) != 1:  # a table's rows would be its column names
        advice = 'expected a list of strings or of dicts (of a DataFrame: df["text"] or df.to_dict("records"))'
        raise UserError(f"texts: got {type(texts).__name__}, {advice}")
    rows, problems = [], []
    for number, text in enumerate(texts):
        row = {columns[0]: text} if isinstance(text, str) else text
        if not isinstance(row, dict):
            problems.append(f"texts[{number}] is {type(text).__name__}, expected a string or a dict of columns")
            continue
        for name in columns:
            if name not in row:
                problems.append(
                    f"texts[{number}] has no column {name} (a string is the first column, a dict has several)"
                )
            elif not isinstance(row[name], str | int):
                problems.append(f"texts[{number}][{name!r}] is {type(row[name]).__name__}, expected a string")
        rows.append({name: str(value) for name, value in row.items()})
    if problems:
        raise UserError(few(problems, 3))
    return rows


# ---- columns --------------------------------------------------------------------------------------------------------


def template_columns(template: str) -> list[str]:
    """The columns that a text template names. Raises UserError for a malformed one."""
    try:
        return prompts.fields(template)
    except ValueError as e:
        raise UserError(f"--text: {e}") from None


def need_columns(rows: Rows, columns: list[str], path: str, flag: str) -> None:
    """Raise UserError unless every row has text in all columns; names what exists. Notes header lines among them."""
    where, headers = f"--{flag} {path}", []
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if c not in row]
        if missing:
            # JSON lines need not have the same keys.
            place = f" in row {number}" if number > 1 else ""
            there = f"there is: {', '.join(row)}"
            raise UserError(
                f"{where}: no column {', '.join(missing)}{place} ({there}){_hint(rows, row, missing, path)}"
            )
        odd = [c for c in columns if type(row[c]) not in (str, Nested)]
        if odd:
            holds = row[odd[0]] if isinstance(row[odd[0]], Unreadable) else type(row[odd[0]]).__name__
            raise UserError(
                f"{where}: column {odd[0]} holds {holds} in row {number}: expected text; store it as strings"
            )
        if any(row[c] == c for c in columns):
            headers.append(str(number))
    if headers:
        advice = "does the file repeat its header, or lack one?"
        note(warning(f"{where}: a column holds its own name in {len(headers)} rows ({few(headers)})", advice))


def need_texts(rows: Rows, texts: list[str], path: str, flag: str, others: Iterable[str] = ()) -> None:
    """As need_columns, of the columns of a text and others; lists and objects in a text are reported, and in a file of
    a single row refused: that is a table stored by columns.
    """
    where = f"--{flag} {path}"
    need_columns(rows, [*texts, *others], path, flag)
    for name in texts:
        nested = [str(i) for i, row in enumerate(rows, 1) if isinstance(row[name], Nested)]
        if nested and len(rows) == 1:
            raise UserError(f"{where}: column {name} of its only row holds a list or object: {AS_LINES}")
        if nested:
            what = f"column {name} holds lists or objects in {len(nested):,} rows ({few(nested)})"
            note(warning(f"{where}: {what}: their JSON is the text", "store text where that is not meant"))
        note_marks(rows, name, where)


def note_marks(rows: Rows, name: str, where: str) -> None:
    """Note the cells of a text column that hold nothing but what other tools write where there is no value."""
    cells = [row.get(name, "").strip() for row in rows]
    marked = [str(i) for i, cell in enumerate(cells, 1) if cell in spelling.MISSING]
    if marked:
        marks = few(sorted({repr(cell) for cell in cells if cell in spelling.MISSING}))
        what = f"column {name} holds nothing but {marks} in {len(marked):,} rows ({few(marked)})"
        note(warning(f"{where}: {what}: read as text", "leave such rows out if they have none"))


def _hint(rows, row, missing, path):
    """Why a file may lack columns, as far as its first row shows it."""
    same = [
        f"{ascii(other)} for {name}" for other in row for name in missing if spelling.key(other) == spelling.key(name)
    ]
    if same:
        return f"; give names as they are written there: {', '.join(same)}"
    if any(f"{{{name}}}" in row for name in missing):
        return "; rename a column with braces in its name"
    if any(name and name == cell for other in rows[:1000] for name, cell in other.items()):
        return "; the first line looks like a row: write one with the names of the columns before it"
    if len(row) == 1 and row == rows[0]:
        name = next(iter(row))
        if isinstance(row[name], Nested) and len(rows) == 1:
            return f"; {name} holds a list or object: {AS_LINES}"
        if format_of(path) not in DELIMITERS:
            return nearest(missing[0], list(row))
        kind = "JSON lines? Name it .jsonl" if name.startswith(("{", "[")) else "the file separated by commas?"
        return f"; the header is a single column: is {kind}"
    return nearest(missing[0], list(row))


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
                    rows[i] = row  # it may lie on the disk
                    changed.add(i)
    return len(changed)


def empty_rows(rows: Rows, columns: list[str]) -> list[int]:
    """Indices of rows whose text columns show nothing."""
    return [i for i, row in enumerate(rows) if all(spelling.is_blank(row[c]) for c in columns)]
