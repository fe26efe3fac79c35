"""From the cells of a row to targets: classes, label sets, numbers, and the teacher's probabilities of each label."""

import json
import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain, compress
from statistics import mode

import numpy as np

import cli
import spelling
from errors import UserError, few, warning
from files import Rows

MANY = 1000  # labels: more are classes only where most are in several rows
TEACHER = "probability_"  # columns probability_<label> hold soft targets
TRAIN_ONLY = "train_only"  # this column marks rows that are trained on and never judge
INDICATORS = dict.fromkeys("0 0. 0.0 false".split(), 0) | dict.fromkeys("1 1. 1.0 true".split(), 1)
TRUTHS = "true yes y t 1".split(), "false no n f 0".split()
# What Python prints for a list, a set, an object, a tuple, bytes or an array.
PRINTED = re.compile(r"""(?s)\[.*\]|\{.*\}|\(['"].*\)|b(['"]).*\1|(?:array|tensor|np\.\w+)\(.*\)""")


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
    empty = [str(i) for i, value in enumerate(column, 1) if spelling.is_blank(value)]
    if empty:
        raise UserError(f"{where}: {len(empty)} rows have an empty label (rows {few(empty)})")
    if label_names:
        numbers = tuple(map(str, range(len(label_names))))
        if not distinct <= set(label_names) and distinct <= set(numbers):
            return Labels(numbers, label_names)
        return Labels(label_names, label_names)
    whole = all(re.fullmatch(r"0|-?[1-9][0-9]{0,17}", value) for value in distinct)
    values = tuple(sorted(distinct, key=int if whole else None))
    alone = len(values) > MANY and len(column) < 2 * len(values)  # ids or texts, each in a row of its own
    if len(values) < 2 or alone:
        got = f"{len(values)} different labels ({few(values)})"
        expected = "at least 2 classes" + ", most of them of several rows" * alone
        raise UserError(f"{where} holds {got}: expected {expected}; is this the label column?")
    return Labels(values, values)


def answers(task: str, predicted: np.ndarray, labels: Labels) -> list:
    """Predictions as values of the data: of classes (N,), of a 0/1 matrix (N, C) lists of labels, of numbers floats."""
    if task == "regression":
        return predicted.tolist()
    if task == "multi_label":
        return [[labels.values[c] for c in np.flatnonzero(row)] for row in predicted]
    return [labels.values[c] for c in predicted]


# ---- targets --------------------------------------------------------------------------------------------------------


def encode_targets(cfg, rows: Rows, labels: Labels, where: str) -> np.ndarray:
    """The targets of a TrainConfig's rows: classes (N,) int64, 0 and 1 (N, C) float32, or numbers (N,) float32.

    Raises UserError naming what is malformed or unknown. where: the file, for errors.
    """
    if cfg.task == "multi_label":
        return encode_label_sets(label_sets(cfg, rows, where), labels, where)
    column = [row.get(cfg.label_column, "") for row in rows]
    if cfg.task == "regression":
        return encode_numbers(column, where)
    return encode_labels(column, labels, where)


def encode_labels(column: list[str], labels: Labels, where: str) -> np.ndarray:
    """Class indices (N,) int64 of a label column. Raises UserError naming unknown labels and their rows."""
    index = {value: c for c, value in enumerate(labels.values)}
    expected = f"one of {_known(labels, column)}"
    return np.array(_parsed(column, index.__getitem__, where, "unknown labels", expected), np.int64)


def encode_label_sets(sets: list[list[str]], labels: Labels, where: str) -> np.ndarray:
    """Targets (N, C) float32 of 0 and 1. Raises UserError naming unknown labels and their rows."""
    one_hot = dict(zip(labels.values, np.eye(len(labels.values), dtype=np.float32), strict=True))
    none = np.zeros(len(one_hot), np.float32)

    def target(values):
        return sum((one_hot[value] for value in values), none)

    expected = f"some of {_known(labels, chain.from_iterable(sets))}"
    return np.stack(_parsed(sets, target, where, "unknown labels", expected))


def _known(labels, given):
    """The labels there are, and which of those given look like one of them."""
    known = few(spelling.quoted(labels.values), 20)
    unknown = set(given).difference(labels.values)
    groups = spelling.alike(unknown.union(labels.values))
    pairs = [" and ".join(spelling.quoted(group)) for group in groups if not unknown.isdisjoint(group)]
    if pairs:
        known += f" ({few(pairs)} look alike, but differ)"
    if any("," in label for label in unknown):
        known += """; a name with a comma stands in quotation marks: --label_names 'a,"b, c"'"""
    return known


def label_sets(cfg, rows: Rows, where: str) -> list[list[str]]:
    """The different labels of each row: of a TrainConfig's label_columns those that hold 1, or the parts of its
    label_column, delimited or a JSON list; of lists of 0 and 1 those label_names where there is a 1.

    Raises UserError naming rows whose columns hold neither 0 nor 1, or whose list is no list of strings or numbers.
    """

    def of_columns(cells):
        return list(compress(cfg.label_columns, [INDICATORS[cell.strip().lower()] for cell in cells]))

    def of_list(text):
        if not text.startswith("["):
            if PRINTED.fullmatch(text):
                raise ValueError
            return list(filter(None, map(str.strip, text.split(cfg.label_delimiter))))
        parts = json.loads(text)
        if not all(type(part) in (str, int) and str(part).strip() for part in parts):
            raise ValueError
        return [str(part) for part in parts]

    if cfg.label_columns:
        cells = [[row[name] for name in cfg.label_columns] for row in rows]
        return _parsed(cells, of_columns, where, "malformed labels", "0 or 1 in every label column")
    cells = [row.get(cfg.label_column, "").strip() for row in rows]
    flags = indicators(cells, cfg.label_delimiter)
    if flags:
        check_indicators(flags, cfg.label_names, f"{where}: column {cfg.label_column}")
        return [list(compress(cfg.label_names, row)) for row in flags]
    sets = _parsed(cells, of_list, where, "malformed labels", "a JSON list of strings")
    return [list(dict.fromkeys(labels)) for labels in sets]


def indicators(cells: list[str], delimiter: str) -> list[list[int]]:
    """Cells that are lists of 0 and 1, in any form that tools print, as numbers; of any other cells nothing.

    Lists of class ids have other numbers, or other lengths, and no number twice: none is taken for indicators.
    """
    flags = []
    for cell in cells:
        parts = re.findall(r"[^\s,;|()\[\]{}\"']+", cell.replace(delimiter, " ").lower())
        if not INDICATORS.keys() >= set(parts):
            return []
        flags.append([INDICATORS[part] for part in parts])
    lengths = set(map(len, flags))
    has_one_length = len(lengths) == 1 and max(lengths) > 1
    repeats = any(len(set(row)) < len(row) for row in flags)
    return flags if has_one_length or repeats else []


def check_indicators(flags: list[list[int]], names: tuple[str, ...], where: str) -> None:
    """Raise UserError unless lists of 0 and 1 are as long as there are names."""
    most = mode(map(len, flags))
    other = [str(i) for i, row in enumerate(flags, 1) if len(row) != most]
    if other:
        advice = f"{len(other)} rows have another number ({few(other)}): give each row as many"
        raise UserError(f"{where} holds lists of {most} times 0 or 1, but {advice}")
    if len(names) != most:
        given = f", and --label_names has {len(names)}" if names else ""
        raise UserError(
            f"{where} holds lists of 0 and 1, one for each of {most} labels{given}: name these, in order, with "
            "--label_names, or store lists of names, or a column of 0 and 1 for each label (--label_columns)"
        )


def doubts(sets: list[list[str]], where: str) -> list[str]:
    """Warnings of what may be no labels among those of each row: spellings that a person cannot tell apart, marks of
    missing values, whole lists. They stay what they are.
    """
    rows_of = defaultdict(list)
    for number, labels in enumerate(sets, 1):
        for label in labels:
            rows_of[label].append(str(number))

    def shown(labels):
        names = zip(spelling.quoted(labels), map(rows_of.get, labels), strict=True)
        return " and ".join(f"{name} ({len(rows):,} rows: {few(rows, 3)})" for name, rows in names)

    alike = list(map(shown, spelling.alike(rows_of)))
    missing = [label for label in spelling.MISSING if label in rows_of]
    missing += ["-1"] * ({"-1", "0", "1", "2"} <= rows_of.keys() and "-2" not in rows_of)
    advice_on = {}
    separator = "" if any(len(labels) > 1 for labels in sets) else separator_of(rows_of)
    if separator:
        advice = f"where they are lists, --task multi_label --label_delimiter {separator!r} splits them"
        advice_on[f"labels hold {separator!r} between other labels"] = advice
    if alike:
        advice = "each is a label of its own; where that is not meant, write them alike in the file"
        advice_on[f"labels that look alike: {'; '.join(alike[:5])}{' ...' * (len(alike) > 5)}"] = advice
    if missing:
        advice_on[f"{shown(missing)}: taken as labels"] = "remove such rows if they have none"
    if rows_of and all(map(PRINTED.fullmatch, rows_of)):
        problem = f"every label is a list, or what a program prints ({next(iter(rows_of))!r:.60})"
        advice_on[problem] = "--task multi_label reads lists; or write the label that is in it"
    truths = [[label for label in rows_of if label.strip().lower() in words] for words in TRUTHS]
    if not alike and min(map(len, truths)) > 1:
        problem = f"labels that mean the same: {'; '.join(map(shown, truths))}"
        advice_on[problem] = "each is a label of its own; write them alike in the file"
    return [warning(f"{where}: {problem}", advice) for problem, advice in advice_on.items()]


def separator_of(labels: Collection[str]) -> str:
    """What separates the labels of lists that were taken as one label each: they are made of fewer parts, or of as many
    where several lists begin with a label that stands alone too; or nothing.

    Of blanks only numbers are lists: words have them too.
    """
    for separator in ",;|\t ":
        lists = [[part.strip() for part in label.split(separator)] for label in labels]
        parts = set().union(*lists)
        nested = sum(len(several) > 1 and several[0] in labels for several in lists) > 1
        fewer = len(parts) < len(labels) or (len(parts) == len(labels) and nested)
        if fewer and (separator != " " or all(map(str.isdecimal, parts))):
            return separator
    return ""


def number_of(text: str) -> float:
    """A number as files hold it. Raises ValueError for anything else, also for Python's 1_000."""
    if "_" in text:
        raise ValueError
    return float(text)


def encode_numbers(column: list[str], where: str) -> np.ndarray:
    """The numbers (N,) float32 of a regression's label column. Raises UserError naming rows that hold none."""

    def number(text):
        value = number_of(text)
        if not abs(value) <= 3.4028234663852886e38:  # the largest float32
            raise ValueError
        return value

    return np.array(_parsed(column, number, where, "no number", "finite ones"), np.float32)


# ---- columns that any training file may have ------------------------------------------------------------------------


def train_only(rows: Rows, where: str) -> np.ndarray:
    """(N,) bool: the rows marked in column train_only. UserError for odd cells."""
    cells = [row.get(TRAIN_ONLY, "").strip() or "0" for row in rows]
    return np.array(_parsed(cells, lambda cell: cli.convert(cell, bool), where, "a malformed train_only", "1 or 0"))


def soft_targets(cfg, rows: Rows, labels: Labels, where: str) -> np.ndarray | None:
    """(N, C) float32 of the columns probability_<label>, None without them; rows whose cells are empty are NaN.

    The rows of classes sum to 1. Raises UserError for columns that are missing or of unknown labels, and naming rows
    whose cells are no probabilities.
    """
    columns = {name for row in rows for name in row if name.startswith(TEACHER)} - {cfg.label_column}
    names = [TEACHER + value for value in labels.values]
    classes = cfg.task == "single_label"
    if not columns:
        return None
    wrong = sorted(columns ^ set(names))
    if wrong:
        advice = f"columns {TEACHER}... are soft targets: rename one that is none"
        raise UserError(
            f"{where}: expected a probability column for each label; missing or unknown: {few(wrong)}; {advice}"
        )

    def probabilities(cells):
        if not any(cells):
            return [np.nan] * len(cells)
        shares = list(map(number_of, cells))
        total = sum(shares) if classes else 1.0
        if not all(0 <= share <= 1 for share in shares) or abs(total - 1) > 1e-3:
            raise ValueError
        return [share / total for share in shares]

    cells = [[row.get(name, "").strip() for name in names] for row in rows]
    expected = "sums of 1 or empty cells" if classes else "numbers from 0 to 1"
    return np.array(_parsed(cells, probabilities, where, "malformed probabilities", expected), np.float32)


def _parsed(cells, read, where, problem, expected):
    """A list of read(cell) of every cell. Raises UserError naming cells, and their rows, where it raises ValueError."""
    values, wrong = [], {}
    for number, cell in enumerate(cells, 1):
        try:
            values.append(read(cell))
        except (ValueError, KeyError, RecursionError):
            wrong.setdefault(f"{cell!r:.60}", []).append(str(number))
    if wrong:
        named = few([f"{cell} in row {few(rows, 3)}" for cell, rows in wrong.items()], 3)
        raise UserError(f"{where}: {len(cells) - len(values)} rows have {problem} ({named}): expected {expected}")
    return values
