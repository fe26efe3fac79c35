"""Bootstrap intervals."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import metrics

# ---------------------------------------------------------------------------------------------------------------------
# uncertainty and print


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], rows: int, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of statistic(indices (rows,)), drawn with replacement (Efron 1979).

    Resamples on which the statistic raises ValueError or is not finite (AUC of one class) are left out. ValueError
    when that is more than half of them, when the full set itself raises, or on arguments out of range.
    """
    if rows < 1 or samples < 1 or not 0 < level < 1:
        raise ValueError(f"got rows {rows}, samples {samples}, level {level}; expected 1 or more, 1 or more, in (0, 1)")
    statistic(np.arange(rows))  # a mistake in the statistic shows here, not as a left-out resample
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        indices = generator.integers(rows, size=rows)
        try:
            values.append(float(statistic(indices)))
        except ValueError:
            continue
    values = [value for value in values if np.isfinite(value)]
    if 2 * len(values) < samples:
        raise ValueError(f"got {len(values)} of {samples} resamples with a defined statistic, expected half or more")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(
    task: str, logits: np.ndarray, labels: np.ndarray, names: Sequence[str], samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95% percentile bootstrap intervals over rows of the named metrics of a task, all from the same resamples.

    A metric that less than half of the resamples define is left out.
    """
    generator, found = np.random.default_rng(seed), {name: [] for name in names}
    for _ in range(samples):
        rows = generator.integers(len(labels), size=len(labels))
        scores = metrics.of_task(task, logits[rows], labels[rows], ranking=bool(set(metrics.RANKING) & set(names)))
        for name in found.keys() & scores.keys():
            found[name].append(scores[name])
    kept = {name: values for name, values in found.items() if 2 * len(values) >= samples}
    return {name: tuple(np.quantile(values, [0.025, 0.975]).tolist()) for name, values in kept.items()}


BLOCK = 300_000  # numbers of one block of resamples: as fits a cache


# ---- resampled metrics ----------------------------------------------------------------------------------------------


def resamples(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Blocks (S, N) of how often each row was drawn in a bootstrap resample: those of metrics.intervals."""
    generator, step = np.random.default_rng(seed), max(1, BLOCK // rows)
    for start in range(0, samples, step):
        draws = [generator.integers(rows, size=rows) for _ in range(min(step, samples - start))]
        yield np.stack([np.bincount(draw, minlength=rows) for draw in draws]).astype(np.float64)


def bootstrap(score: Callable, rows: int, samples: int, seed: int) -> dict[str, np.ndarray]:
    """What score(weights (S, N)) gives on all resamples, (samples, ...) by name; equal seeds draw equal rows."""
    parts = [score(weights) for weights in resamples(rows, samples, seed)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}


def interval(draws: np.ndarray) -> np.ndarray:
    """(2, ...) the 95% percentile interval of draws (S, ...); NaN where less than half of them are defined."""
    few = np.isnan(draws).mean(axis=0) > 0.5
    return np.where(few, np.nan, np.nanquantile(np.where(few, 0.0, draws), [0.025, 0.975], axis=0))


def p_value(differences: np.ndarray) -> float:
    """Two-sided bootstrap p of differences (S,): twice the smaller share of resamples at or beyond zero, at most 1.

    One is added to both counts (Davison and Hinkley 1997, 4.2): no p is below 2 / (S + 1).
    """
    known = differences[~np.isnan(differences)]
    beyond = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(known) + 1)))


def mcnemar(only_a: int, only_b: int) -> tuple[float, str]:
    """(p, name of the test) of McNemar 1947 for the numbers of cases that only A, and only B, has right.

    Below 25 in all the exact binomial, two-sided; else chi-square of one degree of freedom, whose tail is
    erfc(sqrt(x / 2)), with Edwards' continuity correction (1948).
    """
    n, least = only_a + only_b, min(only_a, only_b)
    if n < 25:
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n), "exact binomial"
    chi = max(0, abs(only_a - only_b) - 1) ** 2 / n
    return math.erfc(math.sqrt(chi / 2)), f"chi-square {chi:.2f}"


def wilson(hits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(2, ...) the 95% interval of shares hits / rows, rows above 0 (Wilson 1927)."""
    z2, share = 1.959964**2, hits / rows
    half = np.sqrt(z2 * (share * (1 - share) + z2 / (4 * rows)) / rows)
    return np.clip((share + z2 / (2 * rows) + np.multiply.outer([-1, 1], half)) / (1 + z2 / rows), 0, 1)
