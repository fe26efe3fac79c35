"""From files to rows with labels, and which rows train and which judge: hold-outs, folds, groups.

rows, val, labels = read(cfg, print)          # everything the config's files hold, checked
train, val = cut(cfg, rows, val)              # the part that this run trains on, and the one that judges it
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import audit
import data
import files
import labelling
import prompts
from configs import TrainConfig
from errors import UserError, few


@dataclass
class Split:
    """Rows to train on or to validate with."""

    rows: list[dict[str, str]]
    ids: list[str]
    labels: np.ndarray  # (N,) int64 classes, (N, C) float32 of 0 and 1 for multi_label, or (N,) float32 numbers
    tokens: data.Tokens | None = None
    uncut: np.ndarray | None = None  # (N,) tokens of each row before it was cut to max_length
    soft: np.ndarray | None = None  # (N, C) float32 probabilities of a teacher, NaN rows without one
    train_only: np.ndarray | None = None  # (N,) bool: rows that never judge

    def take(self, chosen: np.ndarray) -> "Split":
        rows, ids = [self.rows[i] for i in chosen], [self.ids[i] for i in chosen]
        arrays = [part if part is None else part[chosen] for part in (self.uncut, self.soft, self.train_only)]
        return Split(rows, ids, self.labels[chosen], self.tokens and self.tokens.take(chosen), *arrays)

    def judging(self) -> "Split":
        """The rows that may judge."""
        return self if self.train_only is None else self.take(np.flatnonzero(~self.train_only))

    def digest(self) -> str:
        """sha256 over tokens and targets: a resumed run must see the same."""
        return self.tokens.digest(self.labels)


# ---- from files to rows ---------------------------------------------------------------------------------------------


def read(cfg: TrainConfig, say: Callable) -> tuple[Split, Split | None, labelling.Labels]:
    """All rows of train_data and val_data (None without one) with their class indices, and the classes.

    Raises UserError for everything that is wrong with the files, before the base is touched.
    """
    columns = files.template_columns(cfg.text)
    data.cutting_rules(cfg.text, cfg.kept, cfg.budgets)  # unknown fields are said now
    rows = _labelled_rows(cfg, cfg.train_data, "train_data", columns, say)
    where = f"--train_data {cfg.train_data}"
    if cfg.task == "regression":
        labels = labelling.Labels((), (cfg.label_column,))
    elif cfg.task == "multi_label":
        sets = labelling.label_sets(rows, cfg.label_column, cfg.label_columns, cfg.label_delimiter, where)
        labels = labelling.find_labels([v for one in sets for v in one], cfg.label_columns or cfg.label_names, where)
    else:
        labels = labelling.find_labels([r[cfg.label_column] for r in rows], cfg.label_names, where)
    train, val = _encoded(cfg, rows, labels, where), None
    names = [f"probability_{v}" for v in labels.values]
    if names and names[0] in rows[0]:
        train.soft = np.array([[float(r[n] or "nan") for n in names] for r in rows], np.float32)
    if cfg.drop_conflicts:
        train = without_conflicts(cfg, train, labels, say)
    if cfg.val_data:
        val_rows = _labelled_rows(cfg, cfg.val_data, "val_data", columns, say)
        val = _encoded(cfg, val_rows, labels, f"--val_data {cfg.val_data}")
    return train, val, labels


def load_rows(cfg: TrainConfig, say: Callable) -> tuple[Split, Split, labelling.Labels]:
    """(training rows, validation rows, classes) of one run."""
    rows, val, labels = read(cfg, say)
    return *cut(cfg, rows, val), labels


def _labelled_rows(cfg: TrainConfig, path: str, flag: str, columns: list[str], say: Callable) -> list[dict[str, str]]:
    """Rows with text, label and groups. Raises UserError for missing columns and, with their numbers, empty texts."""
    rows = files.read_rows(path, flag)
    group = [c for c in (cfg.group_column, cfg.by_column) if c]
    files.need_columns(rows, [*columns, *(cfg.label_columns or (cfg.label_column,)), *group], path, flag)
    decoded = files.decode_bytes_literals(rows, columns)
    if decoded:
        say(f"--{flag} {path}: {decoded} rows were Python bytes literals (b'...') and are decoded")
    empty = [str(i + 1) for i in files.empty_rows(rows, columns)]
    if empty:
        raise UserError(f"--{flag} {path}: {len(empty)} rows have an empty text (rows {few(empty, 20)})")
    return rows


def _encoded(cfg: TrainConfig, rows: list[dict[str, str]], labels: labelling.Labels, where: str) -> Split:
    """Rows with their ids (the id column, or the index in the file) and targets."""
    ids = [row.get(cfg.id_column, str(i)) for i, row in enumerate(rows)]
    return Split(rows, ids, labelling.encode_targets(cfg, rows, labels, where))


def digest_of(rows: list[dict[str, str]]) -> str:
    """sha256 of rows: whether two runs were judged on the same ones."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


# ---- who judges -----------------------------------------------------------------------------------------------------


def cut(cfg: TrainConfig, rows: Split, val: Split | None, recorded=None) -> tuple[Split, Split]:
    """(training rows, validation rows) of one run: val_data's, or the run's fold, or the hold-out."""
    if val:
        return rows, val
    held = held_out(cfg, rows)
    return rows.take(np.flatnonzero(~held)), rows.take(np.flatnonzero(held))


def judged(cfg: TrainConfig, rows: Split, val: Split | None) -> Split:
    """The rows of val_predictions.csv in its order; of a family over all folds that is every row."""
    return rows.judging() if cfg.folds and cfg.fold < 0 else cut(cfg, rows, val)[1]


def split_csv(cfg: TrainConfig, rows: Split, val: Split | None) -> str:
    held = np.zeros(len(rows.ids), bool) if val else held_out(cfg, rows)
    pool, held = np.flatnonzero(~held), np.flatnonzero(held)
    out = io.StringIO(newline="")
    pairs = zip([*pool, *held], ["train"] * len(pool) + ["validation"] * len(held), strict=True)
    csv.writer(out, lineterminator="\n").writerows([("id", "part"), *((rows.ids[i], part) for i, part in pairs)])
    return out.getvalue()


def split_seed(cfg: TrainConfig) -> int:
    return cfg.seed if cfg.split_seed < 0 else cfg.split_seed


def held_out(cfg: TrainConfig, rows: Split) -> np.ndarray:
    """(N,) bool: the rows of the config's fold, or of its hold-out; a function of the data and the split's seed."""
    groups, seed = groups_of(cfg, rows), split_seed(cfg)
    if cfg.folds:
        return folds(cfg.task, rows.labels, cfg.folds, seed, groups) == int(cfg.fold)
    held = np.zeros(len(rows.labels), bool)
    held[hold_out(cfg.task, rows.labels, cfg.val_size, seed, groups)[1]] = True
    return held


def groups_of(cfg: TrainConfig, rows: Split) -> np.ndarray | None:
    """(N,) the group of each row as a number from 0, None without a group_column; a row without one is its own."""
    if not cfg.group_column:
        return None
    names = [row[cfg.group_column].strip() or ("", i) for i, row in enumerate(rows.rows)]
    index = {name: g for g, name in enumerate(dict.fromkeys(names))}
    return np.array([index[name] for name in names])


def folds(task: str, labels: np.ndarray, parts: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(N,) the fold of each row, 0 to parts - 1, stratified by class, by every label, or by quantiles of numbers.

    Sizes, and a class's rows, differ by at most one between folds, where neither groups nor several labels a row
    forbid it (see `stratify`); the rows of a group share a fold. Raises UserError for too few rows or groups.
    """
    units = len(labels) if groups is None else len(np.unique(groups))
    if units < parts:
        raise UserError(f"--folds {parts}: there are only {units} {'rows' if groups is None else 'groups'}")
    strata = _strata(task, labels)
    if strata.ndim == 2 or groups is not None:
        return stratify(_one_hot(strata), [1 / parts] * parts, seed, groups)
    fold = np.zeros(len(labels), int)
    fold[np.lexsort((np.random.default_rng([seed, 0x5B11]).random(len(labels)), strata))] = np.arange(units) % parts
    return fold


def hold_out(task: str, labels: np.ndarray, val_size: float, seed: int, groups: np.ndarray | None = None):
    """Sorted row indices (train, validation), stratified as `folds` are."""
    strata = _strata(task, labels)
    if strata.ndim == 1 and groups is None:
        return stratified_split(strata, val_size, seed)
    share = val_size / len(labels) if val_size >= 1 else val_size
    part = stratify(_one_hot(strata), [1 - share, share], seed, groups) if 0 < share < 1 else np.zeros(len(labels))
    if len(np.unique(part)) < 2:
        of = f"{len(labels)} rows" + ("" if groups is None else f" in {len(np.unique(groups))} groups")
        raise UserError(f"--val_size {val_size:g} of {of} leaves none to train on or to validate with")
    return np.flatnonzero(part == 0), np.flatnonzero(part == 1)


def _strata(task: str, labels: np.ndarray) -> np.ndarray:
    return number_strata(labels) if task == "regression" else labels


def _one_hot(strata: np.ndarray) -> np.ndarray:
    return strata if strata.ndim == 2 else np.eye(strata.max() + 1, dtype=np.float32)[strata]


def number_strata(values: np.ndarray, most: int = 10) -> np.ndarray:
    """Strata (N,) int64 of numbers for a stratified split: the values where they are few, or else quantiles."""
    distinct, stratum, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(distinct) <= most and counts.min() > 1:
        return stratum
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return ranks * min(most, max(1, len(values) // 2)) // len(values)


def stratified_split(labels: np.ndarray, val_size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted row indices (train, validation); each class gives its share, at least one row, and keeps at least one.

    val_size: a fraction below 1 or a count. Raises UserError for a class with one row or a count that cannot be met.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if (counts < 2).any():
        lone = ", ".join(f"class {c} (row {int(np.flatnonzero(labels == c)[0]) + 1})" for c in classes[counts < 2][:5])
        raise UserError(
            f"a stratified split needs 2 rows of every class, but {lone} has one: give --val_data, or drop it"
        )
    total = int(val_size) if val_size >= 1 else int(round(len(labels) * val_size))
    if not len(classes) <= total <= len(labels) - len(classes):
        raise UserError(
            f"--val_size {val_size:g} asks for {total} of {len(labels)} rows, expected {len(classes)} to "
            f"{len(labels) - len(classes)}: one row a class on each side"
        )
    exact = counts * (total / len(labels))
    take = np.clip(np.floor(exact).astype(int), 1, counts - 1)
    while take.sum() != total:  # largest remainders first, or smallest taken back
        step = 1 if take.sum() < total else -1
        room = (take < counts - 1) if step > 0 else (take > 1)
        gain = np.where(room, step * (exact - take), -np.inf)
        take[int(gain.argmax())] += step
    rng = np.random.default_rng([seed, 0x5B11])
    val = [rng.permutation(np.flatnonzero(labels == c))[:n] for c, n in zip(classes, take, strict=True)]
    val = np.sort(np.concatenate(val))
    return np.setdiff1d(np.arange(len(labels)), val), val


def stratify(targets: np.ndarray, shares: list[float], seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(N,) which part each row of multi-label targets (N, C) goes to, so that each part gets its share of every label.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011): the rarest label that is left is dealt out first,
    each row to the part that wants it most. Rows without labels fill the parts up. groups (N,): numbers from 0; the
    rows of a group go to the same part, the largest groups of the label first, each to the part that it brings nearest
    to its shares of all labels and of rows (by chi-squared).
    """
    rng = np.random.default_rng([seed, 0x5B11])
    of = np.arange(len(targets)) if groups is None else groups
    count, rows = np.zeros((of.max() + 1, targets.shape[1])), np.bincount(of)
    np.add.at(count, of, targets > 0)
    order = rng.permutation(len(rows))
    count, rows, part = count[order], rows[order], np.full(len(rows), -1)  # of groups not dealt yet
    total, size = count.sum(axis=0), np.array(shares) * len(targets)  # size: room of each part
    want, whole = np.outer(shares, total), np.maximum(total, 1)  # (parts, C) of each label
    while total.any():
        rare = int(np.where(total > 0, total, len(targets) + 1).argmin())
        for i in np.argsort(-count[:, rare], kind="stable")[: int((count[:, rare] > 0).sum())]:
            if groups is None:
                best = max(range(len(shares)), key=lambda p: (want[p, rare], size[p], rng.random()))
            else:
                nearer = (count[i] * (2 * want - count[i]) / whole).sum(axis=1) + rows[i] * (2 * size - rows[i]) / len(
                    of
                )
                best = int((nearer / shares).argmax())
            part[i] = best
            want[best] -= count[i]
            size[best] -= rows[i]
            count[i] = 0
        total = count.sum(axis=0)
    for i in np.flatnonzero(part < 0)[np.argsort(-rows[part < 0], kind="stable")]:
        part[i] = int(size.argmax())
        size[part[i]] -= rows[i]
    return part[np.argsort(order)][of]


# ---- what is wrong with the rows ------------------------------------------------------------------------------------


def texts(cfg: TrainConfig, rows: list[dict[str, str]]) -> list[str]:
    """Each row's rendered text, as the model reads it."""
    return ["".join(piece for _, piece in prompts.render(cfg.text, row)) for row in rows]


def without_conflicts(cfg: TrainConfig, rows: Split, labels: labelling.Labels, say: Callable) -> Split:
    """The rows but for those whose text stands there with different labels."""
    known = labelling.answers(cfg.task, rows.labels, labels)
    groups = audit.audit(texts(cfg, rows.rows), known, ["train"] * len(known), near=False).conflicts
    drop = [i for group in groups for i in group]
    say(f"--drop_conflicts: {len(drop)} rows dropped, of {len(groups)} texts that had different labels")
    return rows.take(np.setdiff1d(np.arange(len(known)), drop))


def audit_rows(cfg: TrainConfig, labels: labelling.Labels, train: Split, val: Split | None, say: Callable) -> dict:
    """Print label counts, lengths and what is wrong with the rows: see audit.py.

    val: None where every training row is judged in turn. Returns the groups of rows by their names, to be kept.
    """
    parts = {"train": train} | ({"validation": val} if val else {})
    known = [a for part in parts.values() for a in labelling.answers(cfg.task, part.labels, labels)]
    splits = [name for name, part in parts.items() for _ in part.ids]
    if cfg.task != "regression":
        say(audit.label_counts(known, splits, labels.values))
    say(audit.length_table(np.concatenate([part.uncut for part in parts.values()]), splits, cfg.max_length))
    if cfg.audit == "none":
        return {}
    parts["test"] = _unlabelled(cfg, say)
    rows, tested = [row for part in parts.values() for row in part.rows], len(parts["test"].rows)
    splits, known = splits + ["test"] * tested, known + [None] * tested
    names = [_name(cfg, name, *row) for name, part in parts.items() for row in zip(part.rows, part.ids, strict=True)]
    found = audit.audit(texts(cfg, rows), known, splits, near=cfg.audit == "near")
    warnings, twice = audit.said(found, known, splits, names), len(found.duplicates) + len(found.near)
    if val is None and twice and not cfg.group_column:
        equal = f"{twice} groups of equal or nearly equal rows may stand in different folds"
        warnings.append(f"{equal}, which flatters their scores: keep such rows together with --group_column")
    for line in warnings or ["no duplicates, conflicts or leaks found"]:
        say(f"audit: {line}")
    return _named(dataclasses.asdict(found), names)


def _unlabelled(cfg: TrainConfig, say: Callable) -> Split:
    """The rows of test_data as far as they can be read: a leak is worth knowing, a missing file is not in the way."""
    try:
        rows = files.read_rows(cfg.test_data, "test_data") if cfg.test_data else []
        if rows:
            files.need_columns(rows, files.template_columns(cfg.text), cfg.test_data, "test_data")
            files.decode_bytes_literals(rows, files.template_columns(cfg.text))
    except UserError as e:
        say(f"audit: test rows are left out: {e}")
        rows = []
    return Split(rows, [row.get(cfg.id_column, str(i)) for i, row in enumerate(rows)], np.zeros(len(rows)))


def _name(cfg: TrainConfig, split: str, row: dict, id: str) -> str:
    """A row as a person finds it: by its id, or by its number in the file."""
    return (
        f"{split} row {int(id) + 1}" if cfg.id_column not in row and id.isdigit() else f"{split} {cfg.id_column} {id}"
    )


def _named(groups, names: list[str]):
    """The same with names in the place of row indices."""
    if isinstance(groups, dict):
        return {key: _named(value, names) for key, value in groups.items()}
    return [_named(group, names) if isinstance(group, list) else names[group] for group in groups]


def class_shares(rows: Split, labels: labelling.Labels) -> np.ndarray:
    """(C,) the share of rows of each class."""
    own = rows.judging().labels
    if own.ndim == 2 or not labels.values:
        return np.atleast_1d(own.mean(axis=0))
    return np.bincount(own, minlength=len(labels.values)) / len(own)


def periodic_rows(cfg: TrainConfig, labels: np.ndarray, classes: int) -> np.ndarray:
    """The validation rows of periodic evaluations: all, or eval_rows drawn once from the seed.

    Raises UserError when `metric` is not defined on them.
    """
    rows = np.arange(len(labels))
    if 0 < cfg.eval_rows < len(labels):
        rows = np.sort(np.random.default_rng([cfg.seed, 0xE7A1]).permutation(len(labels))[: cfg.eval_rows])
    present = set(np.unique(labels[rows]).tolist())
    if cfg.task == "multi_label":
        some, every = (labels[rows] > 0).any(axis=0).all(), (labels[rows] > 0).all(axis=0).any()
        if cfg.metric in ("roc_auc", "average_precision") and (not some or (cfg.metric == "roc_auc" and every)):
            raise UserError(f"--metric {cfg.metric} needs rows with and without every label: choose another")
        return rows
    if cfg.metric == "roc_auc" and (present != {0, 1} if cfg.task == "regression" else len(present) < classes):
        wanted = "labels 0 and 1" if cfg.task == "regression" else "every class"
        raise UserError(f"--metric roc_auc needs {wanted} among the validation rows: choose another, or other rows")
    if cfg.metric in ("r2", "pearson") and len(present) < 2:
        raise UserError(f"--metric {cfg.metric} needs different numbers among the validation rows: choose another")
    return rows
