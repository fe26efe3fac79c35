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

OWN, PSEUDO = -1, -2  # where a row comes from, if not from the row of an index


@dataclass
class Split:
    """Rows to train on or to validate with."""

    rows: list[dict[str, str]]
    ids: list[str]
    labels: np.ndarray  # (N,) int64 classes, (N, C) float32 of 0 and 1 for multi_label, or (N,) float32 numbers
    tokens: data.Tokens | None = None
    uncut: np.ndarray | None = None  # (N,) tokens of each row before it was cut to max_length
    soft: np.ndarray | None = None  # (N, C) float32: probabilities of classes to train on in the place of labels
    origin: np.ndarray | None = None  # (N,) where rows were added: OWN, PSEUDO, or the row that a row was made of

    def take(self, chosen: np.ndarray) -> "Split":
        rows, ids = [self.rows[i] for i in chosen], [self.ids[i] for i in chosen]
        arrays = [part if part is None else part[chosen] for part in (self.uncut, self.soft, self.origin)]
        return Split(rows, ids, self.labels[chosen], self.tokens and self.tokens.take(chosen), *arrays)

    def own(self) -> "Split":
        """The rows of the file itself, without those that were added."""
        return self if self.origin is None else self.take(np.flatnonzero(self.origin == OWN))

    def digest(self) -> str:
        """sha256 over tokens and targets: a resumed run must see the same."""
        return self.tokens.digest(self.targets)

    @property
    def targets(self) -> np.ndarray:
        """What is trained on: labels, or (N, C) probabilities of classes where some rows have only those."""
        return self.labels if self.soft is None else self.soft


# ---- from files to rows ---------------------------------------------------------------------------------------------


def read(cfg: TrainConfig, say: Callable) -> tuple[Split, Split | None, labelling.Labels]:
    """All rows of train_data and val_data (None without one) with their class indices, and the classes.

    Raises UserError for everything that is wrong with the files, before the base is touched.
    """
    columns = files.template_columns(cfg.text)
    data.cutting_rules(cfg.text, cfg.kept, cfg.budgets)  # unknown fields are said now
    if cfg.examples and cfg.examples_column not in columns:
        raise UserError(f"--examples_column {cfg.examples_column}: the text has {', '.join(columns)}")
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
    if cfg.drop_conflicts:
        train = without_conflicts(cfg, train, labels, say)
    if cfg.split:
        train = train.take(np.array(list(_of_split(cfg, train)), dtype=int))
        say(f"--split {cfg.split}: {len(train.ids):,} of {len(rows):,} rows, in its order")
    elif cfg.balance:
        train = train.take(equal_rows(train.labels, split_seed(cfg)))
        say(f"--balance: {len(train.ids):,} of {len(rows):,} rows, equally many of every class")
    if cfg.examples or cfg.pseudo_labels:
        train = with_more(cfg, train, labels, say)
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
    group = [c for c in (cfg.group_column, cfg.by_column, cfg.examples and cfg.examples_column) if c]
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


def cut(cfg: TrainConfig, rows: Split, val: Split | None) -> tuple[Split, Split]:
    """(training rows, validation rows) of one run: val_data's, or the run's fold, or the hold-out; of the training rows
    its slice, and what was added to it.
    """
    pool, held = pool_of(cfg, rows, val)
    judges = val or rows.take(held)
    train = pool[cfg.train_start : cfg.train_stop or None]
    if not len(train):
        raise UserError(f"--train_start {cfg.train_start}: there are only {len(pool):,} training rows")
    if rows.origin is not None:
        train = np.concatenate([train, added(cfg, rows, train, judges)])
    return rows.take(train), judges


def pool_of(cfg: TrainConfig, rows: Split, val: Split | None) -> tuple[np.ndarray, np.ndarray]:
    """Row indices (in the order that slices are cut from, of the validation): classes mixed evenly where there are
    slices, as the files have it otherwise.
    """
    own = rows.own()
    held = np.zeros(len(own.ids), bool) if val else held_out(cfg, own)
    pool = np.flatnonzero(~held)
    if (cfg.train_start or cfg.train_stop) and not cfg.split:
        pool = pool[mixed_order(_strata(cfg.task, own.labels[pool]), split_seed(cfg))]
    return pool, np.flatnonzero(held)


def judged(cfg: TrainConfig, rows: Split, val: Split | None) -> Split:
    """The rows of val_predictions.csv in its order; of a family over all folds that is every row."""
    return rows.own() if cfg.folds and cfg.fold == "all" else cut(cfg, rows, val)[1]


def split_csv(cfg: TrainConfig, rows: Split, val: Split | None) -> str:
    """The ids of all rows, and as what they took part (train, later, validation; those of a validation file are not
    listed), in the order that slices are cut from: what --split reads.
    """
    pool, held = pool_of(cfg, rows, val)
    stop = cfg.train_stop or len(pool)
    parts = ["train" if cfg.train_start <= i < stop else "later" for i in range(len(pool))]
    out = io.StringIO(newline="")
    pairs = zip([*pool, *held], parts + ["validation"] * len(held), strict=True)
    csv.writer(out, lineterminator="\n").writerows([("id", "part"), *((rows.ids[i], part) for i, part in pairs)])
    return out.getvalue()


def _of_split(cfg: TrainConfig, rows: Split) -> dict[int, str]:
    """The parts of --split by row index, in its order. Raises UserError for ids that the rows lack or that stand twice,
    other parts than split_csv writes, and a file without validation rows.
    """
    where, found = f"--split {cfg.split}", files.read_rows(cfg.split, "split")
    files.need_columns(found, ["id", "part"], cfg.split, "split")
    place, ids = {id: i for i, id in enumerate(rows.ids)}, [row["id"] for row in found]
    if len(place) < len(rows.ids) or len(set(ids)) < len(ids):
        raise UserError(f"{where}: ids stand twice, in it or in --train_data: give an --id_column without repeats")
    lost = [id for id in ids if id not in place]
    if lost:
        raise UserError(f"{where}: {len(lost)} of its ids are not in --train_data ({few(lost)})")
    parts = {place[row["id"]]: row["part"] for row in found}
    if set(parts.values()) - {"train", "later", "validation"} or "validation" not in parts.values():
        raise UserError(f"{where}: parts {sorted(set(parts.values()))}: expected train, later and some validation")
    return parts


def split_seed(cfg: TrainConfig) -> int:
    return cfg.seed if cfg.split_seed < 0 else cfg.split_seed


def equal_rows(labels: np.ndarray, seed: int) -> np.ndarray:
    """Sorted indices of equally many rows of every class, as many as the rarest has, drawn from the seed."""
    classes, counts = np.unique(labels, return_counts=True)
    rng = np.random.default_rng([seed, 0xBA1A])
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(labels == c))[: counts.min()] for c in classes]))


def mixed_order(strata: np.ndarray, seed: int) -> np.ndarray:
    """An order (N,) from the seed in which every stretch has nearly the same share of each class; of several labels a
    row it is any order.
    """
    order = np.random.default_rng([seed, 0x511C]).permutation(len(strata))
    if strata.ndim == 2:
        return order
    place = np.zeros(len(strata))
    for c in np.unique(strata):
        mine = order[strata[order] == c]
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return order[np.argsort(place[order], kind="stable")]


def held_out(cfg: TrainConfig, rows: Split) -> np.ndarray:
    """(N,) bool: the rows of the config's fold, or of its hold-out; a function of the data and the split's seed."""
    groups, seed = groups_of(cfg, rows), split_seed(cfg)
    if cfg.split:
        parts = _of_split(cfg, rows)
        return np.array([parts[i] == "validation" for i in range(len(rows.ids))])
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


# ---- more training rows ---------------------------------------------------------------------------------------------


def with_more(cfg: TrainConfig, own: Split, labels: labelling.Labels, say: Callable) -> Split:
    """The rows, then those made of their example columns, then the confident ones of --pseudo_labels.

    Every run takes of them what it may: see `added`. Raises UserError for columns, ids or numbers that are missing.
    """
    made, origin = [], []
    pairs = [part.partition("=")[::2] for part in cfg.examples]
    if pairs:
        files.need_columns(own.rows, [cfg.examples_column, *(c for c, _ in pairs)], cfg.train_data, "train_data")
    for parent, row in enumerate(own.rows):
        for column, label in pairs:
            if row[column].strip():
                others = [row[c] for c, same in pairs if same == label and c != column]
                shown = row[cfg.examples_column] if row[cfg.label_column] == label else next(iter(others), "")
                texts_of = {cfg.examples_column: row[column], column: shown}  # never beside itself as an example
                made.append((f"{own.ids[parent]}:{column}", {**row, **texts_of, cfg.label_column: label}))
                origin.append(parent)
    targets = labelling.encode_targets(cfg, [row for _, row in made], labels, "--examples") if made else own.labels[:0]
    pseudo, answers_of, soft = pseudo_rows(cfg, labels, say) if cfg.pseudo_labels else ([], own.labels[:0], None)
    found = Split(
        own.rows + [row for _, row in made] + [row for _, row in pseudo],
        own.ids + [i for i, _ in made] + [f"pseudo:{i}" for i, _ in pseudo],
        np.concatenate([own.labels, targets, answers_of]),
        origin=np.array([OWN] * len(own.ids) + origin + [PSEUDO] * len(pseudo)),
    )
    if soft is not None and cfg.task == "single_label":
        found.soft = np.eye(len(labels.values), dtype=np.float32)[found.labels]
        found.soft[len(found.soft) - len(soft) :] = soft
    return found


def pseudo_rows(
    cfg: TrainConfig, labels: labelling.Labels, say: Callable
) -> tuple[list, np.ndarray, np.ndarray | None]:
    """((id, row) of confident predictions, their answers as targets, probabilities (M, C) to train on if soft)."""
    where, key = f"--pseudo_labels {cfg.pseudo_labels}", cfg.id_column
    rows = files.read_rows(cfg.pseudo_data or cfg.test_data, "pseudo_data")
    files.need_columns(rows, files.template_columns(cfg.text), cfg.pseudo_data or cfg.test_data, "pseudo_data")
    files.decode_bytes_literals(rows, files.template_columns(cfg.text))
    by_id = {row.get(key, str(i)): row for i, row in enumerate(rows)}
    told = files.read_rows(cfg.pseudo_labels, "pseudo_labels")
    if len(by_id) < len(rows) or len({row.get(key) for row in told}) < len(told):
        raise UserError(f"{where}: ids stand twice, in it or in --pseudo_data: which text is whose?")
    names = [f"probability_{v}" for v in labels.values] or ["prediction"]
    files.need_columns(told, [key, *names], cfg.pseudo_labels, "pseudo_labels")
    lost = [row[key] for row in told if row[key] not in by_id]
    if lost:
        raise UserError(f"{where}: {len(lost)} of its ids are not among the rows of --pseudo_data ({few(lost)})")
    p = np.stack([labelling.encode_numbers([row[n] for row in told], where) for n in names], axis=1)
    if not ((p >= 0) & (p <= 1)).all():
        raise UserError(f"{where}: {int(((p < 0) | (p > 1)).any(axis=1).sum())} rows hold numbers outside 0 to 1")
    sure = p.max(axis=1) if cfg.task == "single_label" else np.maximum(p, 1 - p).min(axis=1)
    chosen = np.flatnonzero(sure >= cfg.pseudo_min_confidence)
    say(f"{where}: {len(chosen)} of {len(told)} rows with at least {cfg.pseudo_min_confidence:g}")
    p, found = p[chosen], [(told[i][key], by_id[told[i][key]]) for i in chosen]
    if cfg.task == "single_label":
        return found, p.argmax(axis=1), p / p.sum(axis=1, keepdims=True) if cfg.pseudo_soft else None
    answer = p if cfg.pseudo_soft else (p > 0.5).astype(np.float32)
    return found, answer[:, 0] if cfg.task == "regression" else answer, None


def added(cfg: TrainConfig, rows: Split, train: np.ndarray, judges: Split) -> np.ndarray:
    """Indices of the added rows that a run trains on: made of its own training rows, each text once, and none that a
    training or validation row has, or that stands there with both labels; and the pseudo-labelled ones but for
    validation texts.
    """

    def key(row: dict) -> tuple:
        return audit.normal_form(row[cfg.examples_column]), row.get(cfg.by_column, "")

    judged_texts = {audit.normal_form(text) for text in texts(cfg, judges.rows)}
    pseudo = np.flatnonzero(rows.origin == PSEUDO)
    fresh = [audit.normal_form(text) not in judged_texts for text in texts(cfg, [rows.rows[i] for i in pseudo])]
    pseudo, candidates = pseudo[np.array(fresh, dtype=bool)], np.flatnonzero(np.isin(rows.origin, train))
    if not len(candidates):
        return pseudo
    taken = {key(row) for row in rows.own().rows}
    unseen, answers_of = {audit.normal_form(row[cfg.examples_column]) for row in judges.rows}, {}
    for i in candidates:
        if key(rows.rows[i]) not in taken and key(rows.rows[i])[0] not in unseen:
            answers_of.setdefault(key(rows.rows[i]), []).append(i)
    agreed = [same[0] for same in answers_of.values() if len({rows.rows[i][cfg.label_column] for i in same}) == 1]
    return np.concatenate([np.array(agreed, dtype=int), pseudo])


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
    warnings, twice = audit.warnings_of(found, known, splits, names), len(found.duplicates) + len(found.near)
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
    own = rows.own().labels
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
