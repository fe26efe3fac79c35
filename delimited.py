"""Rows of CSV and TSV files: the delimiter, the header, and quotation marks that swallow rows."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import spool
from errors import UserError, duplicates, few, note, warning

LIMIT, LINES = 2**25, 2**20  # characters of a line, and of a cell; lines of a cell: no text has more
DELIMITERS = ",;\t|"
LINE_END = re.compile("[\r\n]")
csv.field_size_limit(LIMIT)  # its default is shorter than texts are


@dataclass
class Record:
    """One row of a file, as it is written there and as values."""

    line: int  # number of its first line
    lines: list[str]
    values: list[str]


def read(lines: Iterable[str], where: str, usual: str, limit: int = 0) -> Sequence[dict[str, str]]:
    """The rows of a file's lines, or the first `limit` of them; see spool.py. usual: the delimiter of such a file.

    Raises UserError for what cannot be read.
    """
    delimiter, every = records(lines, where, usual)
    names, ragged = next(every, Record(0, [], [])).values, []
    rows, several = spool.Records(), spool.Records()
    for name in duplicates(filter(str.strip, names)):
        raise UserError(f"{where}: column {name!r} is duplicated in the header")
    unnamed, filled = [j for j, name in enumerate(names) if not name.strip()], set()
    for record in islice(every, limit or None):
        rows.append(record.values)
        last = record.line + len(record.lines) - 1
        if len(record.values) != len(names):
            ragged.append(f"line {last} has {len(record.values)}")
            continue
        if len(record.lines) > 1 and may_hold_rows(record, delimiter):
            several.append([str(record.line), *record.lines, *record.values])
        filled.update(j for j in unnamed if record.values[j].strip())
    if ragged:
        raise UserError(f"{where}: {len(ragged)} rows do not have the header's {len(names)} columns ({few(ragged)})")
    if several:
        whole = (Record(int(n[0]), n[1 : -len(names)], n[-len(names) :]) for n in several)
        refuse_swallowed(whole, rows, delimiter, where)
    if len(filled) > 1:
        numbers = [str(j + 1) for j in sorted(filled)]
        raise UserError(f"{where}: columns {few(numbers)} have no name in the header, but cells: give them names")
    # What has neither a name nor cells is no column: each line ends with a delimiter, as spreadsheets write it.
    columns = [(j, names[j]) for j in range(len(names)) if j not in unnamed or j in filled]

    def row_of(record):
        return record if isinstance(record, dict) else {name: record[j] for j, name in columns}

    return rows.rows(row_of)


def records(lines: Iterable[str], where: str, usual: str) -> tuple[str, Iterator[Record]]:
    """(delimiter, the header and the rows of a file), blank lines aside.

    The delimiter is the usual one, unless the header has a single cell by it and several by another one, or Excel's
    first line says sep=;. A note says so.
    """
    lines = iter(lines)
    start = []  # blank lines, sep=, and the header's first line
    for line in lines:
        start.append(line)
        if line.strip("\r\n"):
            break
    first = start.pop().lstrip("\ufeff") if start else ""
    if re.match(r'\s*[{\[] *["{]', first):
        raise UserError(f"{where}: this looks like JSON; name it .jsonl, with one object a line")
    told = re.fullmatch(r"\"?sep=([,;|\t])\"?[\r\n]*", first, re.IGNORECASE)
    if told:
        start.append(first)
        first = next(lines, "")
    delimiter = told[1] if told else delimiter_of(first, usual)
    if delimiter != usual:
        note(f"note: {where}: read with {delimiter!r} between columns, as its header is written")
    return delimiter, _records(chain([first], lines), len(start), where, delimiter)


def delimiter_of(header: str, usual: str) -> str:
    """The delimiter of a file by its header's line: the usual one wherever that makes several columns of it."""

    def cells(delimiter):
        try:
            return len(next(csv.reader([header], delimiter=delimiter, strict=True)))
        except (csv.Error, StopIteration):
            return 0

    others = sorted(DELIMITERS.replace(usual, ""), key=cells)
    return usual if cells(usual) > 1 or cells(others[-1]) < 2 else others[-1]


def _records(lines, number, where, delimiter):
    """Records of lines that follow `number` others."""
    pending = []  # lines of the record that is being read

    def fed():
        for line in lines:
            if len(pending) == LINES:
                raise csv.Error(f"a cell of more than {LINES:,} lines")
            pending.append(line)
            yield line

    reader = csv.reader(fed(), delimiter=delimiter, strict=True)
    try:
        for values in reader:
            if values:  # blank lines aside
                yield Record(number + 1, pending.copy(), values)
            number += len(pending)
            pending.clear()
    except csv.Error as e:
        problem = f"line {number + len(pending)}: {e}"
        begins = f" The row begins in line {number + 1}" if len(pending) > 1 else ""
        raise UserError(f"{where}: {problem} (an unclosed or stray quote?{begins})") from None


# ---- quotation marks that are text ----------------------------------------------------------------------------------


def may_hold_rows(record: Record, delimiter: str) -> bool:
    """Whether several lines of a record, or all, have as many cells as the header: others are no rows of the file."""
    are_rows = [line.count(delimiter) == len(record.values) - 1 for line in record.lines]
    return all(are_rows) or are_rows[1:-1].count(True) > 1


def refuse_swallowed(several: Iterable[Record], rows: Sequence[list[str]], delimiter: str, where: str) -> None:
    """Raise UserError for records of several lines that hold whole rows of the file: files that quote nothing, where
    one text begins with a quotation mark and a later one ends with one.

    Such a line has as many cells as the header, and a value known from other rows where a column has few values, as
    labels are. Where no column has, cells like those of other rows (ids) are not sure enough: a note names the lines.
    """
    few_values, one_kind = telling_columns(rows)
    sure, unsure = [], []
    for record in several:
        cells = [line.rstrip("\r\n").split(delimiter) for line in record.lines]
        whole = all(len(line) == len(record.values) > 1 for line in cells)
        known = [_is_known(record, k, line, few_values, hash) for k, line in enumerate(cells)]
        place = f"lines {record.line} to {record.line + len(cells) - 1}"
        if known[1:-1].count(True) > 1 or (whole and True in known and False not in known):
            sure.append(place)
        elif whole and not few_values:
            alike = [_is_known(record, k, line, one_kind, _kind) for k, line in enumerate(cells)]
            if False not in alike and (True in alike or len(cells) > 2):
                unsure.append(place)
    if sure:
        raise UserError(
            f"{where}: {len(sure)} quoted texts hold whole rows of the file ({few(sure)}): are its quotation marks "
            'text? Then quote such a text and write each of its marks twice (""), or save the file as JSON lines'
        )
    if unsure:
        count = f"{len(unsure)} quoted texts may hold whole rows of the file"
        note(warning(f"{where}: {count} ({few(unsure)})", "if so, write quotation marks that are text twice"))


def telling_columns(rows: Sequence[list[str]]) -> tuple[dict[int, set[int]], dict[int, set[str]]]:
    """The values (as hashes) of the columns that have few different ones, and the kind of those of one kind."""
    cells, hashes = Counter(), [set() for _ in rows[0]]
    kinds = [set() for _ in rows[0]]
    for row in rows:
        for j, cell in enumerate(row):
            if LINE_END.search(cell):
                continue
            cells[j] += 1
            hashes[j].add(hash(cell))
            if len(kinds[j]) < 2:
                kinds[j].add(_kind(cell))
    few_values = {j: values for j, values in enumerate(hashes) if cells[j] >= 2 * len(values) > 0}
    one_kind = {j: own for j, own in enumerate(kinds) if len(own) == 1 and j not in few_values}
    return few_values, one_kind


def _kind(cell):
    """A cell with any number as 0."""
    return re.sub(r"[0-9]+", "0", cell)


def _is_known(record, k, cells, known, form):
    """Whether line k of a record, split into cells, is a row by the column with the fewest known values; None: no
    column tells. What stands before the quoted text in the first line, and after it in the last one, is the record's.
    """
    quoted = [j for j, value in enumerate(record.values) if LINE_END.search(value)]
    first = quoted[0] + 1 if k == 0 else 0
    last = quoted[-1] if k == len(record.lines) - 1 else len(record.values)
    columns = sorted((j for j in known if first <= j < last), key=lambda j: len(known[j]))
    if not columns or len(cells) != len(record.values):
        return False if columns else None
    return form(cells[columns[0]].strip('"')) in known[columns[0]]
