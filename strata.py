"""Which rows judge: folds and hold-outs that each have their share of every class, and never part of a group.

Everything is a pure function of targets, groups and seed, the same in any process and on any number of ranks.
"""

import numpy as np

from errors import UserError, few

QUANTILES = 10  # strata of numbers
DRAW = 0x5B11  # with the seed: the stream of random numbers that rows are drawn from


def folds(
    task: str,
    labels: np.ndarray,
    parts: int,
    seed: int,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """(N,) the fold of each row, 0 to parts - 1, stratified by class, by every label, or by quantiles of numbers.

    Sizes, and a class's rows, differ by at most one between folds, where neither groups nor several labels a row
    forbid it (see `stratify`); the rows of a group share a fold. Raises UserError for too few rows or groups.
    """
    units = np.arange(len(labels)) if groups is None else np.unique(groups)
    if len(units) < parts:
        raise UserError(f"--folds {parts}: there are only {len(units)} rows, or groups of rows")
    strata = of_targets(task, labels)
    if strata.ndim == 2 or groups is not None:
        return stratify(strata, [1 / parts] * parts, seed, groups)

    # the rows of each class in a random order, one class after the other, are dealt like cards
    chance = np.random.default_rng([seed, DRAW]).random(len(units))
    fold = np.empty_like(units)
    fold[np.lexsort((chance, strata))] = units % parts
    return fold


def hold_out(task: str, labels: np.ndarray, val_size: float, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(N,) bool: the rows held out, stratified as `folds` are. val_size: a fraction below 1 or a count.

    Raises UserError where none would be left to train on or to validate with.
    """
    strata, rows = of_targets(task, labels), len(labels)
    if strata.ndim == 1 and groups is None:
        return stratified(strata, val_size, seed)
    share = val_size if val_size < 1 else val_size / rows
    held = np.zeros(rows, bool)
    if 0 < share < 1:
        held = stratify(strata, [1 - share, share], seed, groups) == 1
    if not 0 < held.sum() < rows:
        raise UserError(
            f"--val_size {val_size:g} of {rows} rows leaves none, or no whole group, to train on or to validate with"
        )
    return held


def of_targets(task: str, labels: np.ndarray) -> np.ndarray:
    """What is stratified by: classes (N,), 0 and 1 (N, C) of several labels; of numbers the values (N,) where they are
    few, or else their quantiles.
    """
    if task != "regression":
        return labels
    _, stratum, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(counts) <= QUANTILES and counts.min() > 1:
        return stratum
    ranks = np.argsort(np.argsort(labels, kind="stable"))
    return ranks * min(QUANTILES, len(labels) // 2) // len(labels)


def stratified(labels: np.ndarray, val_size: float, seed: int) -> np.ndarray:
    """(N,) bool: the rows held out; each class gives its share, at least one row, and keeps at least one.

    Raises UserError for a class with one row, or a count that cannot be met.
    """
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    lone = [f"class {classes[c]} (row {first[c] + 1})" for c in np.flatnonzero(counts < 2)]
    if lone:
        raise UserError(
            f"a stratified split needs 2 rows of every class, but {few(lone)} has one: give --val_data, or drop it"
        )
    rows, least = len(labels), len(classes)
    total = int(val_size if val_size >= 1 else round(rows * val_size))
    if not least <= total <= rows - least:
        raise UserError(
            f"--val_size {val_size:g} asks for {total} of {rows} rows, expected {least} to {rows - least}: one row a "
            "class on each side; give such a number with --val_size, or --val_data"
        )

    # each class's share, rounded down; what is missing goes to the largest remainders, what is too much comes from
    # the smallest
    exact = counts * (total / rows)
    take = np.clip(exact.astype(int), 1, counts - 1)
    step = np.sign(total - take.sum())
    while take.sum() != total:
        allowed = (take + step >= 1) & (take + step < counts)
        need = np.where(allowed, step * (exact - take), -np.inf)
        take[need.argmax()] += step

    rng = np.random.default_rng([seed, DRAW])
    held = np.zeros(rows, bool)
    for c, count in zip(classes, take, strict=True):
        held[rng.permutation(np.flatnonzero(labels == c))[:count]] = True
    return held


def stratify(targets: np.ndarray, shares: list[float], seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """(N,) which part each row goes to, so that each part gets its share of every label.

    targets: 0 and 1 (N, C), or classes (N,). groups (N,): numbers from 0; the rows of a group go to the same part.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011): the rarest label that is left is dealt out first,
    each row to the part that wants it most. Rows without labels fill the parts up. Of groups, those with most rows of
    the label come first, each to the part that it brings nearest to its shares of all labels and of rows (chi-squared).
    """
    if targets.ndim == 1:
        targets = np.eye(targets.max() + 1, dtype=bool)[targets]
    rng = np.random.default_rng([seed, DRAW])

    # what is dealt: groups, or single rows; how many rows each has, and how many with each label (0 once it is dealt)
    unit_of = np.arange(len(targets)) if groups is None else groups
    rows = np.bincount(unit_of)
    count = np.zeros((len(rows), targets.shape[1]))  # (units, C)
    np.add.at(count, unit_of, targets)
    order = rng.permutation(len(rows))
    part = np.full(len(rows), -1)

    # what each part still wants: rows (parts,), and rows with each label (parts, C)
    room = np.array(shares) * len(targets)
    want = np.outer(shares, count.sum(axis=0))
    scale = np.maximum(count.sum(axis=0), 1)

    def deal(unit, to):
        part[unit] = to
        room[to] -= rows[unit]
        want[to] -= count[unit]
        count[unit] = 0

    while count.any():
        left = count.sum(axis=0)
        rare = np.where(left > 0, left, np.inf).argmin()
        units = order[np.argsort(-count[order, rare], kind="stable")]
        for unit in units[: np.count_nonzero(count[:, rare])]:
            if groups is None:
                to = np.lexsort((rng.random(len(shares)), room, want[:, rare]))[-1]  # ties are broken by chance
            else:
                by_label = count[unit] * (2 * want - count[unit]) / scale
                by_rows = rows[unit] * (2 * room - rows[unit]) / len(targets)
                to = ((by_label.sum(axis=1) + by_rows) / shares).argmax()
            deal(unit, to)

    for unit in order[np.argsort(-rows[order], kind="stable")]:
        if part[unit] < 0:
            deal(unit, room.argmax())
    return part[unit_of]
