"""From labels in a file to targets."""

import json
import re
from dataclasses import dataclass

import numpy as np

from errors import UserError, few

# ---- labels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labels:
    """The classes in order: `values` as they stand in the data, `names` as they are shown."""

    values: tuple[str, ...]
    names: tuple[str, ...]


def find_labels(column: list[str], label_names: tuple[str, ...] = (), where: str = "the label column") -> Labels:
    """The classes of a label column: whole numbers in numeric order, other strings sorted, or as `label_names` says.

    Where the column holds whole numbers 0..C-1, C label_names that are no such numbers are their display names.
    where: the file, for errors.
    """
    found = set(column)
    if any(not v.strip() for v in found):
        rows = [str(i + 1) for i, v in enumerate(column) if not v.strip()]
        raise UserError(f"{where}: {len(rows)} rows have an empty label (rows {few(rows)})")
    whole = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", v) for v in found)
    if label_names:
        numbers = tuple(str(i) for i in range(len(label_names)))
        if not found <= set(label_names) and found <= set(numbers):
            return Labels(numbers, label_names)
        return Labels(label_names, label_names)
    values = tuple(sorted(found, key=int) if whole else sorted(found))
    if len(values) < 2:
        raise UserError(f"{where} holds only the label {values[0]!r}: expected at least 2 classes")
    if len(values) > 1000:
        raise UserError(f"{where} holds {len(values)} different labels: is this the label column?")
    return Labels(values, values)


def encode_labels(column: list[str], labels: Labels, path: str) -> np.ndarray:
    """Class indices (N,) int64 of a label column. Raises UserError naming unknown labels and their rows."""
    index = {v: i for i, v in enumerate(labels.values)}
    unknown = {}
    for i, v in enumerate(column):
        if v not in index:
            unknown.setdefault(v, []).append(str(i + 1))
    if unknown:
        parts = [f"{v!r} (rows {few(rows, 3)})" for v, rows in unknown.items()]
        raise UserError(f"{path}: unknown labels {few(parts, 3)}: expected one of {few(list(labels.values), 20)}")
    return np.array([index[v] for v in column], dtype=np.int64)


def label_sets(rows: list[dict], column: str, columns: tuple[str, ...], delimiter: str, where: str) -> list[list[str]]:
    """The labels of each row: names of `columns` that hold 1, or the parts of one column, delimited or a JSON list.

    Raises UserError naming rows whose columns hold neither 0 nor 1, or whose list is no list of strings or numbers.
    """
    found, wrong = [], []
    for i, row in enumerate(rows):
        text = row.get(column, "").strip()
        try:
            if columns:
                cells = {name: float(row[name]) for name in columns}
                if set(cells.values()) - {0.0, 1.0}:
                    raise ValueError
                labels = [name for name, value in cells.items() if value]
            elif text.startswith("["):
                labels = [str(part) if isinstance(part, (str, int)) else [][0] for part in json.loads(text)]
            else:
                labels = [part.strip() for part in text.split(delimiter) if part.strip()]
        except (ValueError, IndexError, RecursionError):
            wrong.append(f"row {i + 1}: {[row[c] for c in columns] if columns else text!r:.60}")
            continue
        found.append(list(dict.fromkeys(labels)))
    if wrong:
        expected = "0 or 1 in every label column" if columns else "a JSON list of strings"
        raise UserError(f"{where}: {len(wrong)} rows have malformed labels ({few(wrong, 3)}): expected {expected}")
    return found


def encode_label_sets(sets: list[list[str]], labels: Labels, path: str) -> np.ndarray:
    """Targets (N, C) float32 of 0 and 1. Raises UserError naming unknown labels and their rows."""
    rows = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    flat = [label for one in sets for label in one]
    index = {v: i for i, v in enumerate(labels.values)}
    unknown = sorted({f"{v!r} (row {rows[i] + 1})" for i, v in enumerate(flat) if v not in index})
    if unknown:
        raise UserError(f"{path}: unknown labels {few(unknown, 3)}: expected some of {few(list(labels.values), 20)}")
    targets = np.zeros((len(sets), len(index)), np.float32)
    targets[rows, [index[v] for v in flat]] = 1
    return targets


def encode_numbers(column: list[str], path: str) -> np.ndarray:
    """The numbers (N,) float32 of a regression's label column. Raises UserError naming rows that hold none."""
    wrong, values = [], np.zeros(len(column), np.float32)
    for i, text in enumerate(column):
        try:
            values[i] = float(text)
        except ValueError:
            values[i] = np.nan
        if not np.isfinite(values[i]):
            wrong.append(f"row {i + 1}: {text[:30]!r}")
    if wrong:
        raise UserError(f"{path}: {len(wrong)} labels are no finite numbers ({few(wrong)})")
    return values


def encode_targets(cfg, rows: list[dict[str, str]], labels: Labels, where: str) -> np.ndarray:
    """The targets of a TrainConfig's rows: classes (N,) int64, 0 and 1 (N, C) float32, or numbers (N,) float32.

    Raises UserError naming what is malformed or unknown. where: the file, for errors.
    """
    if cfg.task == "multi_label":
        sets = label_sets(rows, cfg.label_column, cfg.label_columns, cfg.label_delimiter, where)
        return encode_label_sets(sets, labels, where)
    column = [row.get(cfg.label_column, "") for row in rows]
    return encode_numbers(column, where) if cfg.task == "regression" else encode_labels(column, labels, where)


def answers(task: str, predicted: np.ndarray, labels: Labels) -> list:
    """Predictions as values of the data: of classes (N,), of a 0/1 matrix (N, C) lists of labels, of numbers floats."""
    if task == "regression":
        return [float(z) for z in predicted]
    if task == "multi_label":
        return [[labels.values[c] for c in np.flatnonzero(row)] for row in predicted]
    return [labels.values[c] for c in predicted]
