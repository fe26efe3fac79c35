"""From the cells of a row to targets: classes, label sets, numbers, and the teacher's probabilities of each label."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import cli
from errors import UserError, few
from files import Rows

TEACHER = "probability_"  # columns probability_<label> hold soft targets
TRAIN_ONLY = "train_only"  # this column marks rows that are trained on and never judge


# ---- classes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The classes in order: `values` as they are in the data, `names` as they are shown."""

    values: tuple[str, ...]
    names: tuple[str, ...]


def find_labels(column: list[str], label_names: tuple[str, ...] = (), where: str = "the label column") -> Labels:
    """The classes of a label column: whole numbers in numeric order, other strings sorted, or as `label_names` says.

    Where the column holds whole numbers 0..C-1, C label_names that are no such numbers are their display names.
    where: the file, for errors.
    """
    distinct = set(column)
    if any(not value.strip() for value in distinct):
        empty = [str(i) for i, value in enumerate(column, 1) if not value.strip()]
        raise UserError(f"{where}: {len(empty)} rows have an empty label (rows {few(empty)})")
    if label_names:
        numbers = tuple(str(i) for i in range(len(label_names)))
        if not distinct <= set(label_names) and distinct <= set(numbers):
            return Labels(numbers, label_names)
        return Labels(label_names, label_names)
    whole = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", value) for value in distinct)
    values = tuple(sorted(distinct, key=int if whole else None))
    if len(values) < 2:
        raise UserError(f"{where} holds only the label {values[0]!r}: expected at least 2 classes")
    if len(values) > 1000:
        raise UserError(f"{where} holds {len(values)} different labels: is this the label column?")
    return Labels(values, values)


def answers(task: str, predicted: np.ndarray, labels: Labels) -> list:
    """Predictions as values of the data: of classes (N,), of a 0/1 matrix (N, C) lists of labels, of numbers floats."""
    if task == "regression":
        return [float(z) for z in predicted]
    if task == "multi_label":
        return [[labels.values[c] for c in np.flatnonzero(row)] for row in predicted]
    return [labels.values[c] for c in predicted]


# ---- targets --------------------------------------------------------------------------------------------------------


def encode_targets(cfg, rows: Rows, labels: Labels, where: str) -> np.ndarray:
    """The targets of a TrainConfig's rows: classes (N,) int64, 0 and 1 (N, C) float32, or numbers (N,) float32.

    Raises UserError naming what is malformed or unknown. where: the file, for errors.
    """
    if cfg.task == "multi_label":
        sets = label_sets(rows, cfg.label_column, cfg.label_columns, cfg.label_delimiter, where)
        return encode_label_sets(sets, labels, where)
    column = [row.get(cfg.label_column, "") for row in rows]
    if cfg.task == "regression":
        return encode_numbers(column, where)
    return encode_labels(column, labels, where)


def encode_labels(column: list[str], labels: Labels, path: str) -> np.ndarray:
    """Class indices (N,) int64 of a label column. Raises UserError naming unknown labels and their rows."""
    index = {value: c for c, value in enumerate(labels.values)}
    classes = _parsed(column, index.__getitem__, path, "unknown labels", f"one of {few(list(index), 20)}")
    return np.array(classes, np.int64)


def encode_label_sets(sets: list[list[str]], labels: Labels, path: str) -> np.ndarray:
    """Targets (N, C) float32 of 0 and 1. Raises UserError naming unknown labels and their rows."""
    index = {value: c for c, value in enumerate(labels.values)}

    def classes(values: list[str]) -> list[int]:
        return [index[value] for value in values]

    targets = np.zeros((len(sets), len(index)), np.float32)
    chosen = _parsed(sets, classes, path, "unknown labels", f"some of {few(list(index), 20)}")
    for target, row in zip(targets, chosen, strict=True):
        target[row] = 1
    return targets


def label_sets(
    rows: Rows,
    column: str,
    columns: tuple[str, ...],
    delimiter: str,
    where: str,
) -> list[list[str]]:
    """The labels of each row: names of `columns` that hold 1, or the parts of one column, delimited or a JSON list.

    Raises UserError naming rows whose columns hold neither 0 nor 1, or whose list is no list of strings or numbers.
    """

    def of_columns(cells: list[str]) -> list[str]:
        numbers = [float(cell) for cell in cells]
        if not set(numbers) <= {0.0, 1.0}:
            raise ValueError
        return [name for name, number in zip(columns, numbers, strict=True) if number]

    def of_list(text: str) -> list[str]:
        if not text.startswith("["):
            return [part.strip() for part in text.split(delimiter) if part.strip()]
        parts = json.loads(text)
        if not all(isinstance(part, str | int) for part in parts):
            raise ValueError
        return [str(part) for part in parts]

    if columns:
        cells = [[row[name] for name in columns] for row in rows]
        sets = _parsed(cells, of_columns, where, "malformed labels", "0 or 1 in every label column")
    else:
        cells = [row.get(column, "").strip() for row in rows]
        sets = _parsed(cells, of_list, where, "malformed labels", "a JSON list of strings")
    return [list(dict.fromkeys(labels)) for labels in sets]


def encode_numbers(column: list[str], path: str) -> np.ndarray:
    """The numbers (N,) float32 of a regression's label column. Raises UserError naming rows that hold none."""

    def number(text: str) -> float:
        value = float(text)
        if not abs(value) <= float(np.finfo(np.float32).max):
            raise ValueError
        return value

    return np.array(_parsed(column, number, path, "no number", "finite ones"), np.float32)


# ---- columns that any training file may have ------------------------------------------------------------------------


def train_only(rows: Rows, where: str) -> np.ndarray | None:
    """(N,) bool: the rows marked in column train_only, None where there are none. UserError for odd cells."""
    cells = [row.get(TRAIN_ONLY, "").strip() or "0" for row in rows]
    marks = np.array(
        _parsed(cells, lambda cell: cli.convert(cell, bool), where, "a malformed train_only", "1 or 0"), bool
    )
    return marks if marks.any() else None


def soft_targets(cfg, rows: Rows, labels: Labels, where: str) -> np.ndarray | None:
    """(N, C) float32 of the columns probability_<label>, None without them; rows whose cells are empty are NaN.

    The rows of classes sum to 1. Raises UserError for columns that are missing or of unknown labels, and naming rows
    whose cells are no probabilities.
    """
    columns = {name for row in rows for name in row if name.startswith(TEACHER)} - {cfg.label_column}
    names = [TEACHER + value for value in labels.values]
    if not columns:
        return None
    if columns != set(names):
        missing, unknown = (few(sorted(wrong)) or "none" for wrong in (set(names) - columns, columns - set(names)))
        raise UserError(f"{where}: expected a probability column for each label: missing {missing}; unknown {unknown}")

    def probabilities(cells: list[str]) -> list[float]:
        if not any(cells):
            return [np.nan] * len(cells)
        shares = [float(cell) for cell in cells]
        total = sum(shares) if cfg.task == "single_label" else 1.0
        if not all(0 <= share <= 1 for share in shares) or abs(total - 1) > 1e-3:
            raise ValueError
        return [share / total for share in shares]

    cells = [[row.get(name, "").strip() for name in names] for row in rows]
    expected = "sums of 1 or empty cells" if cfg.task == "single_label" else "numbers from 0 to 1"
    return np.array(_parsed(cells, probabilities, where, "malformed probabilities", expected), np.float32)


def _parsed(cells: list, read: Callable, where: str, problem: str, expected: str) -> list:
    """read(cell) of every cell. Raises UserError naming the cells, and their rows, where it raises ValueError."""
    values, wrong = [], {}
    for number, cell in enumerate(cells, 1):
        try:
            values.append(read(cell))
        except (ValueError, KeyError, RecursionError):
            wrong.setdefault(f"{cell!r:.60}", []).append(str(number))
    if wrong:
        count = len(cells) - len(values)
        named = few([f"{cell} in row {few(rows, 3)}" for cell, rows in wrong.items()], 3)
        raise UserError(f"{where}: {count} rows have {problem} ({named}): expected {expected}")
    return values
