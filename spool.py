"""Rows of a file: a list where they are few; else they lie on the disk, and each is parsed when it is asked for.

    records = Records()                  # a reader appends what it parsed: dicts, or the cells of a line
    records.append(["1", "a text"])
    rows = records.rows(make)            # a list or a View: len, rows[i], rows[a:b], rows[i] = row, loops

The file has no name: it is gone with the process, however that ends. It lies in the system's folder for such files;
TMPDIR names another one.
"""

import json
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from pathlib import Path

import disk

MEMORY = 2**24  # characters of a file's rows that stay in memory
TYPED = "*"  # begins the line of a record with cells that are no plain str: [record, {column: kind}]
as_json = json.JSONEncoder(ensure_ascii=False).encode
KINDS: dict[str, type] = {}  # the kinds of these, by name


class Records(Sequence):
    """What was read of a file, in its order."""

    def __init__(self):
        self.kept, self.size = [], 0
        self.file, self.ends = None, array("q", [0])

    def __len__(self):
        return len(self.kept) if self.file is None else len(self.ends) - 1

    def __getitem__(self, i: int):
        if self.file is None:
            return self.kept[i]
        text = self.line(i).decode("utf-8", "surrogatepass")
        if not text.startswith(TYPED):
            return json.loads(text)
        record, kinds = json.loads(text[1:])
        return record | {name: KINDS[kind](record[name]) for name, kind in kinds.items()}

    def line(self, i: int) -> bytes:
        """A record as it lies on the disk."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self.ends[i], self.ends[i + 1]
        if self.file.tell() != start:
            self.file.seek(start)
        return self.file.read(end - start)

    def append(self, record: list[str] | dict[str, str]) -> None:
        if self.file is not None:
            self._write(record)
            return
        self.kept.append(record)
        self.size += sum(map(len, record.values() if isinstance(record, dict) else record))
        if self.size > MEMORY:
            kept, self.kept = self.kept, []
            self.file = tempfile.TemporaryFile()
            for record in kept:
                self._write(record)

    def _write(self, record):
        text = as_json(record)
        if isinstance(record, dict):
            kinds = {name: type(cell).__name__ for name, cell in record.items() if type(cell) is not str}
            text = TYPED + as_json([record, kinds]) if kinds else text
        data = text.encode("utf-8", "surrogatepass")
        try:
            self.file.seek(self.ends[-1])
            self.file.write(data)
        except OSError as e:
            folder = Path(tempfile.gettempdir())
            raise disk.disk_error(folder, f"{e.strerror} (TMPDIR names another folder)", len(data)) from None
        self.ends.append(self.ends[-1] + len(data))

    def rows(self, make: Callable = lambda record: record):
        """The rows made of the records: a list, or a View of those on the disk."""
        if self.file is None:
            return list(map(make, self.kept))
        return View(self, make, array("q", range(len(self))))


class View(Sequence):
    """Values made of records on the disk, in an order."""

    def __init__(self, records: Records, make: Callable, order: Sequence[int]):
        self.records, self.make, self.order = records, make, order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, i: int | slice):
        if isinstance(i, slice):
            return View(self.records, self.make, self.order[i])
        return self.make(self.records[self.order[i]])

    def __setitem__(self, i: int, row: dict[str, str]):
        """Put another row in the place of one: the new one is appended to the file."""
        self.records.append(row)
        self.order[i] = len(self.records) - 1

    def lines(self) -> Iterable[bytes]:
        """The records as they lie on the disk."""
        return map(self.records.line, self.order)


class Joined(Sequence):
    """Sequences one after the other."""

    def __init__(self, parts: Iterable[Sequence]):
        self.parts = list(parts)
        self.starts = [0, *accumulate(map(len, self.parts))]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, i: int):
        if not 0 <= i < len(self):
            raise IndexError(i)
        part = bisect_right(self.starts, i) - 1
        return self.parts[part][i - self.starts[part]]


def take(rows: Sequence, indices: Iterable[int]):
    """Some rows, in the given order."""
    if isinstance(rows, View):
        return View(rows.records, rows.make, array("q", [rows.order[i] for i in indices]))
    return [rows[i] for i in indices]


def mapped(make: Callable, rows: Sequence) -> Sequence:
    """make(row) of each row."""
    if isinstance(rows, View):
        return View(rows.records, lambda record: make(rows.make(record)), rows.order)
    return list(map(make, rows))


def joined(parts: Iterable[Sequence]) -> Sequence:
    """Sequences one after the other: a list, where they are lists."""
    parts = list(parts)
    if any(isinstance(part, View) for part in parts):
        return Joined(parts)
    return [item for part in parts for item in part]
