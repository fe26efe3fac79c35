"""From files to rows with labels, and which rows train and which judge: hold-outs, folds, groups.

rows, val, labels = read(cfg, print)          # everything the config's files hold, checked
train, val = cut(cfg, rows, val)              # the part that this run trains on, and the one that judges it
"""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np

import audit
import cli
import data
import files
import labelling
import metrics
import prompts
import seals
import spelling
import spool
import strata
from configs import TrainConfig
from errors import UserError, duplicates, few, refuse, warning
from files import Rows
from labelling import Labels

DRAWN = ("balance", "split", "train_start", "train_stop")  # fields of old runs that chose among the rows
ADDED = {"examples": "example_rows.py", "pseudo_labels": "pseudo_labels.py"}  # those that added rows: what does so now
# what a metric needs of the rows that it is computed on; the others need different numbers
NEEDS = {"roc_auc": "rows with and without every label", "average_precision": "rows with every label"}


@dataclass
class Split:
    """Rows to train on or to validate with."""

    rows: Rows
    ids: list[str]
    labels: np.ndarray  # (N,) int64 classes, (N, C) float32 of 0 and 1 for multi_label, or (N,) float32 numbers
    tokens: data.Tokens | None = None
    uncut: np.ndarray | None = None  # (N,) tokens of each row before it was cut to max_length
    soft: np.ndarray | None = None  # (N, C) float32: a teacher's probabilities; rows without a teacher are NaN
    train_only: np.ndarray | None = None  # (N,) bool: rows that never judge; default: none
    places: np.ndarray | None = None  # (N,) the row's index in the rows that were read, whatever is taken of them

    def __post_init__(self):
        if self.places is None:
            self.places = np.arange(len(self.ids))
        if self.train_only is None:
            self.train_only = np.zeros(len(self.ids), bool)

    def take(self, chosen: np.ndarray) -> "Split":
        """Some rows: those of a mask (N,) bool, or of indices in the given order."""
        indices = np.arange(len(self.ids))[chosen]
        arrays = {name: values[indices] for name, values in vars(self).items() if isinstance(values, np.ndarray)}
        tokens = self.tokens and self.tokens.take(indices)
        return Split(spool.take(self.rows, indices), [self.ids[i] for i in indices], tokens=tokens, **arrays)

    def judging(self) -> "Split":
        """The rows that may judge."""
        return self.take(~self.train_only)

    def digest(self) -> str:
        """sha256 over tokens and targets: a resumed run must see the same."""
        return self.tokens.digest(self.labels, self.soft)


# ---- from files to rows ---------------------------------------------------------------------------------------------


def read(cfg: TrainConfig, say: Callable) -> tuple[Split, Split | None, Labels]:
    """All rows of train_data and val_data (None without one) with their targets, and the classes.

    Raises UserError for everything that is wrong with the files, before the base is touched.
    """
    data.cutting_rules(cfg.text, cfg.kept, cfg.budgets)  # raises for unknown fields
    targets = {cfg.label_column, *cfg.label_columns}
    told = [c for c in files.template_columns(cfg.text) if c in targets or c.startswith(labelling.TEACHER)]
    if told:
        raise UserError(f"--text names {', '.join(told)}, which is to be predicted: leave it out of the text")
    train, labels = _labelled(cfg, "train_data", None, say)
    train.soft = labelling.soft_targets(cfg, train.rows, labels, f"--train_data {cfg.train_data}")
    if train.soft is not None:
        taught = np.isfinite(train.soft[:, 0]).sum()
        say(f"probability columns: {taught:,} of {len(train.ids):,} rows have soft targets")
    if train.train_only.any():
        say(f"train_only: {train.train_only.sum():,} of {len(train.ids):,} rows never judge")
    if cfg.drop_conflicts:
        train = _without_conflicts(cfg, train, labels, say)
    if not cfg.val_data:
        return train, None, labels
    val, _ = _labelled(cfg, "val_data", labels, say)
    if val.train_only.any():
        raise UserError(f"--val_data {cfg.val_data}: {val.train_only.sum():,} rows are marked train_only: remove them")
    return train, val, labels


def _labelled(cfg, flag, labels, say):
    """(Split of train_data or val_data with its targets, Labels: those given, or else those of the rows).

    Raises one UserError for all that is wrong with the rows of the file, with their numbers.
    """
    where = f"--{flag} {getattr(cfg, flag)}"
    columns = cfg.label_columns or (cfg.label_column,)
    rows, decoded, empty = _texts(cfg, flag, *columns, cfg.group_column, cfg.by_column)
    if decoded:
        say(f"{where}: {decoded} rows were Python bytes literals (b'...') and are decoded")
    problems = []
    if empty:
        problems.append(f"{len(empty)} rows have an empty text (rows {few(empty, 20)})")

    def attempt(read, *given):
        try:
            return read(*given, where)
        except UserError as e:
            problems.append(str(e).removeprefix(where).lstrip(": "))

    # Rows without a label are of no class; a known one takes its place, so that all other problems are found too.
    blank = np.zeros(len(rows), bool)
    if cfg.task == "single_label":
        blank[:] = [spelling.is_blank(row[cfg.label_column]) for row in rows]
    if blank.any():
        numbers = list(map(str, np.flatnonzero(blank) + 1))
        problems.append(f"{len(numbers)} rows have an empty label (rows {few(numbers, 20)})")
    is_new = labels is None
    if is_new and not blank.all():
        labelled = spool.take(rows, np.flatnonzero(~blank)) if blank.any() else rows
        labels = attempt(labels_of, cfg, labelled)
    train_only = attempt(labelling.train_only, rows)
    if labels and train_only is not None:
        for i in np.flatnonzero(blank):
            rows[i] = {**rows[i], cfg.label_column: labels.values[0]}
        targets = attempt(labelling.encode_targets, cfg, rows, labels)
        if is_new and targets is not None:
            problems += lone_classes(cfg, targets, ~blank & ~train_only, labels)
            for line in label_doubts(cfg, rows, where):
                say(line)
    refuse(problems, f"{where}: ")
    repeated = duplicates(row[cfg.id_column] for row in rows if cfg.id_column in row)
    if repeated:
        problem = f"{where}: {len(repeated)} ids stand in several rows ({few(repeated)}), and predictions repeat them"
        say(warning(problem, "give each row an id of its own"))
    return Split(rows, _ids(cfg, rows), targets, train_only=train_only), labels


def lone_classes(cfg, targets: np.ndarray, judging: np.ndarray, labels: Labels) -> list[str]:
    """What to say of classes with a single row of those that may judge (N,), where a hold-out needs two."""
    others = ("group_column", "val_data", "folds")
    if cfg.task != "single_label" or any(getattr(cfg, name, "") for name in others):
        return []
    lone = []
    for c, name in enumerate(labels.names):
        rows = np.flatnonzero((targets == c) & judging)
        if len(rows) == 1:
            lone.append(f"{name!r} (row {rows[0] + 1})")
    problem = f"a stratified split needs 2 rows of every class, but {few(lone)} has one: give --val_data, or drop it"
    return [problem] if lone else []


def label_doubts(cfg, rows: Rows, where: str) -> list[str]:
    """Warnings of what may be no labels; see labelling.doubts."""
    if cfg.task == "regression" or cfg.label_columns:
        return []
    if cfg.task == "multi_label":
        sets = labelling.label_sets(cfg, rows, where)
    else:
        sets = [[row[cfg.label_column]] for row in rows]
    return labelling.doubts(sets, where)


def _texts(cfg, flag, *others):
    """(rows of a file, how many were bytes literals, the numbers of those without text). Raises UserError unless it has
    the columns of the text and all others.
    """
    path, columns = getattr(cfg, flag), files.template_columns(cfg.text)
    rows = files.stream_rows(path, flag)
    needed = list(filter(None, others))
    if any(cfg.id_column in row for row in rows):  # else the row index counts, which must not be the id of another row
        needed.append(cfg.id_column)
    files.need_texts(rows, columns, path, flag, needed)
    decoded = files.decode_bytes_literals(rows, columns)
    return rows, decoded, [str(i + 1) for i in files.empty_rows(rows, columns)]


def labels_of(cfg, rows: Rows, where: str) -> Labels:
    """The classes of a config's training rows; of a regression its label column is the name."""
    if cfg.task == "regression":
        return Labels((), (cfg.label_column,))
    if cfg.task == "single_label":
        column = [row[cfg.label_column] for row in rows]
    else:
        column = [label for labels in labelling.label_sets(cfg, rows, where) for label in labels]
    return labelling.find_labels(column, cfg.label_columns or cfg.label_names, where)


def _ids(cfg, rows):
    """The cells of the id column, or where there is none the index in the file."""
    return [row.get(cfg.id_column, str(i)) for i, row in enumerate(rows)]


def texts(cfg: TrainConfig, rows: Rows) -> Sequence[str]:
    """Each row's rendered text, as the model reads it."""
    return spool.mapped(lambda row: prompts.plain(prompts.render(cfg.text, row)), rows)


def digest_of(rows: Rows | list) -> str:
    """sha256 of the JSON of rows, or of other values: whether two runs were judged on the same ones."""
    digest = hashlib.sha256()

    def feed(values):
        before = "["
        for value in values:
            digest.update(before.encode())
            before = ", "
            if isinstance(value, spool.View):
                feed(value)
            else:
                digest.update(json.dumps(value, sort_keys=True).encode())
        digest.update(b"]" if len(values) else b"[]")

    feed(rows)
    return digest.hexdigest()


def digests(train: Split, judges: Split | None, labels: Labels) -> dict[str, str]:
    """What a resumed run must see again, by its name in words: sha256s of the rows of a run and their labels."""
    sums = {
        "the training rows or their tokens": train.digest(),
        "the ids of the training rows": digest_of(train.ids),
        "the label names": digest_of([labels.values, labels.names]),
    }
    if judges:
        sums["the validation rows or their tokens"] = judges.digest()
        sums["the ids, labels or other cells of the validation rows"] = digest_of([judges.ids, judges.rows])
    return sums


def class_shares(rows: Split, labels: Labels) -> np.ndarray:
    """(C,) the share of each class among the rows that may judge, of a regression (1,) the mean."""
    targets = rows.judging().labels
    if targets.ndim == 2 or not labels.values:
        return np.atleast_1d(targets.mean(axis=0))
    return np.bincount(targets, minlength=len(labels.values)) / len(targets)


# ---- who judges -----------------------------------------------------------------------------------------------------


def cut(
    cfg: TrainConfig, rows: Split, val: Split | None, recorded: Path | None = None, say: Callable = lambda line: None
) -> tuple[Split, Split]:
    """(training rows, validation rows) of one run: val_data's, or the run's fold, or the hold-out.

    recorded: the folder of a run that is resumed; where it is a slice of before slices.py, the rows are those of its
    split.csv. Raises UserError for runs with rows that were added by fields that are gone.
    """
    if recorded:
        old = cli.raw_config(recorded)
        for name, script in ADDED.items():
            if old.get(name):
                raise UserError(f"--resume {recorded}: --{name} moved to runs/{script}; start a new run on its output")
        if any(map(old.get, DRAWN)):
            return _recorded(rows, val, recorded, old)
    part = _parts(cfg, rows, val)
    dropped = np.count_nonzero(part == "left out")
    if dropped:
        say(f"train_only: {dropped:,} rows left out, whose text or group is among the validation rows")
    return rows.take(part == "train"), val or rows.take(part == "validation")


def _parts(cfg, rows, val):
    """An array (N,) of what each row is in this run: train, validation, or left out: a train_only row whose text, or
    whose group, is among the judges'.
    """
    held = np.zeros(len(rows.ids), bool) if val else held_out(cfg, rows)
    part = np.where(held, "validation", "train")
    if rows.train_only.any():
        known = set().union(*_keys(cfg, (val or rows.take(held)).rows)) - {("group", "")}
        met = [bool(keys & known) for keys in _keys(cfg, rows.rows)]
        part[rows.train_only & met] = "left out"
    return part


def _keys(cfg, rows):
    """A set for each row of what it is recognized by: its text and its group."""
    for row, text in zip(rows, texts(cfg, rows), strict=True):
        group = cfg.group_column and row[cfg.group_column].strip()
        yield {("text", audit.normal_form(text)), ("group", group)}


def held_out(cfg: TrainConfig, rows: Split) -> np.ndarray:
    """(N,) bool: the rows of the config's fold, or of its hold-out; a function of the data and the split's seed."""
    own = rows.judging()
    groups, seed = groups_of(cfg, own), split_seed(cfg)
    held = ~rows.train_only
    if cfg.folds:
        held[held] = strata.folds(cfg.task, own.labels, cfg.folds, seed, groups) == cfg.fold
    else:
        held[held] = strata.hold_out(cfg.task, own.labels, cfg.val_size, seed, groups)
    return held


def split_seed(cfg: TrainConfig) -> int:
    return cfg.seed if cfg.split_seed < 0 else cfg.split_seed


def groups_of(cfg: TrainConfig, rows: Split) -> np.ndarray | None:
    """(N,) the group of each row as a number from 0, None without a group_column; a row without one is its own."""
    if not cfg.group_column:
        return None
    names = [row[cfg.group_column].strip() or ("", i) for i, row in enumerate(rows.rows)]
    number = {}
    return np.array([number.setdefault(name, len(number)) for name in names])


def split_csv(cfg: TrainConfig, rows: Split, val: Split | None) -> str:
    """The ids of all rows and what they are (train, left out, validation), in this order; those of a validation file
    are not listed.
    """
    part, out = _parts(cfg, rows, val), io.StringIO(newline="")
    lines = [(rows.ids[i], name) for name in ("train", "left out", "validation") for i in np.flatnonzero(part == name)]
    csv.writer(out, lineterminator="\n").writerows([("id", "part"), *lines])
    return out.getvalue()


def _recorded(rows, val, run, old):
    """(training rows, validation rows) as the split.csv of a run with the config `old` has them: a slice (train; later:
    what follows it), perhaps of a balanced pool. Raises UserError unless it names rows of the file, by unique ids.
    """
    seals.read(run / "split.csv")
    recorded = files.read_rows(str(run / "split.csv"), "resume")
    place = {row["id"]: i for i, row in enumerate(recorded)}
    listed = [i for i, id in enumerate(rows.ids) if id in place]

    # the old run read these rows alone, in the order of the file they came from: its digest is over all their tokens
    if old.get("split"):
        listed.sort(key=lambda i: place[rows.ids[i]])
    pool = rows.take(listed)
    if not len(listed) == len(set(pool.ids)) == len(recorded):
        raise UserError(
            f"--resume {run}: its split.csv needs unique ids that --train_data has too: give it the file it began "
            "with, or start a new run"
        )
    if pool.tokens:
        pool.tokens = data.join_tokens([pool.tokens.row(i) for i in range(len(listed))])
    order = np.argsort([place[id] for id in pool.ids])
    part = np.array([row["part"] for row in recorded])
    return pool.take(order[part == "train"]), val or pool.take(order[part == "validation"])


# ---- what is wrong with the rows ------------------------------------------------------------------------------------


def _without_conflicts(cfg, rows, labels, say):
    """The rows of a Split but for those whose text also has another label."""
    answers = labelling.answers(cfg.task, rows.labels, labels)
    groups = audit.audit(texts(cfg, rows.rows), answers, ["train"] * len(answers), near=False).conflicts
    drop = [i for group in groups for i in group]
    say(f"--drop_conflicts: {len(drop)} rows dropped, of {len(groups)} texts that had different labels")
    return rows.take(np.setdiff1d(np.arange(len(answers)), drop))


def audit_rows(
    cfg: TrainConfig,
    labels: Labels,
    train: Split,
    val: Split | None,
    say: Callable,
) -> dict:
    """Print label counts, lengths and what is wrong with the rows: see audit.py.

    val: None where every training row is judged in turn. Returns the groups of rows by their names, to be kept.
    """
    parts = {"train": train} | ({"validation": val} if val else {})
    answers, splits, rows, ids, names = [], [], [], [], []
    for split, part in parts.items():
        answers += labelling.answers(cfg.task, part.labels, labels)
        splits += [split] * len(part.ids)
        rows.append(part.rows)
        ids += part.ids
    if cfg.task != "regression":
        say(audit.label_counts(answers, splits, labels.values))
    say(audit.length_table(np.concatenate([part.uncut for part in parts.values()]), splits, cfg.max_length))
    if cfg.audit == "none":
        return {}

    tests = _test_rows(cfg, say)
    answers += [None] * len(tests)
    splits += ["test"] * len(tests)
    rows.append(tests)
    ids += _ids(cfg, tests)
    for split, row, id in zip(splits, chain(*rows), ids, strict=True):  # named by its id, or its number in the file
        names.append(f"{split} {cfg.id_column} {id}" if cfg.id_column in row else f"{split} row {int(id) + 1}")
    every = spool.joined(texts(cfg, part) for part in rows)
    findings = audit.audit(every, answers, splits, near=cfg.audit == "near")
    warnings = audit.warnings_of(findings, answers, splits, names)
    alike = len(findings.duplicates) + len(findings.near)
    if val is None and alike and not cfg.group_column:
        warnings.append(
            f"{alike} groups of equal or nearly equal rows may be in different folds, which flatters their scores: "
            "keep such rows together with --group_column"
        )
    for line in warnings or ["no duplicates, conflicts or leaks found"]:
        say(f"audit: {line}")
    # Every number in the findings is the index of a row: the row's id takes its place.
    return json.loads(json.dumps(asdict(findings)), parse_int=lambda row: names[int(row)])


def _test_rows(cfg, say):
    """The rows of test_data as far as they can be read: a leak is worth knowing, a missing file is not in the way."""
    try:
        return _texts(cfg, "test_data")[0] if cfg.test_data else []
    except UserError as e:
        say(f"audit: test rows are left out: {e}")
        return []


def periodic_rows(cfg: TrainConfig, labels: np.ndarray, classes: int) -> np.ndarray:
    """The validation rows of periodic evaluations: all, or eval_rows drawn once from the seed.

    Raises UserError when `metric` is not defined on them.
    """
    rows = np.arange(len(labels))
    if 0 < cfg.eval_rows < len(rows):
        rows = np.sort(np.random.default_rng([cfg.seed, 0xE7A1]).permutation(rows)[: cfg.eval_rows])
    # any outputs will do that differ: a metric that the labels cannot define is absent
    outputs = np.arange(len(rows) * classes, dtype=float).reshape(-1, classes)
    scores = metrics.of_task(cfg.task, outputs, labels[rows], ranking=cfg.metric in metrics.RANKING)
    if cfg.metric not in scores:
        needs = NEEDS.get(cfg.metric, "different numbers")
        raise UserError(f"--metric {cfg.metric} needs {needs} among the validation rows: choose another, or other rows")
    return rows
