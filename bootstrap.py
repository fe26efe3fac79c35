"""Bootstrap intervals and tests of scores over rows, which are drawn with replacement (Efron 1979)."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

import metrics
from metrics import Array


def intervals(
    task: str,
    logits: Array,
    labels: Array,
    names: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95% percentile intervals of the named metrics of a task, all from the same resamples.

    A metric that less than half of the resamples define is left out.
    """
    ranking = any(name in metrics.RANKING for name in names)
    score = metrics.scorer(task, logits, labels, ranking=ranking)
    draws = bootstrap(score, len(labels), samples, seed)
    spans = {}
    for name in names:
        if name not in draws:
            continue
        low, high = interval(draws[name]).tolist()
        if not math.isnan(low):
            spans[name] = low, high
    return spans


def resamples(rows: int, samples: int, seed: int) -> Iterator[Array]:
    """How often each row was drawn (N,), for each resample."""
    generator = np.random.default_rng(seed)
    for _ in range(samples):
        draw = generator.integers(rows, size=rows)
        yield np.bincount(draw, minlength=rows).astype(np.float64)


def bootstrap(score: Callable, rows: int, samples: int, seed: int) -> dict[str, Array]:
    """What score(weights (N,)) gives on all resamples, (samples, ...) by name; equal seeds draw equal rows."""
    draws = [score(weights) for weights in resamples(rows, samples, seed)]
    if not draws:
        return {}
    names = draws[0]
    return {name: np.stack([draw[name] for draw in draws]) for name in names}


def interval(draws: Array) -> Array:
    """(2, ...) the 95% percentile interval of draws (S, ...); NaN where less than half of them are defined."""
    undefined = np.isnan(draws).mean(axis=0) > 0.5
    known = np.where(undefined, 0.0, draws)
    ends = np.nanquantile(known, [0.025, 0.975], axis=0)
    return np.where(undefined, np.nan, ends)


def p_value(differences: Array) -> float:
    """Two-sided bootstrap p of differences (S,): twice the smaller share of resamples at or beyond zero, at most 1.

    One is added to both counts (Davison and Hinkley 1997, 4.2): no p is below 2 / (S + 1).
    """
    known = differences[~np.isnan(differences)]
    below = (known <= 0).sum()
    above = (known >= 0).sum()
    p = 2 * (min(below, above) + 1) / (len(known) + 1)
    return float(min(1.0, p))


def mcnemar(only_a: int, only_b: int) -> tuple[float, str]:
    """(p, name of the test) of McNemar 1947 for the numbers of cases that only A, and only B, has right.

    Below 25 in all the exact binomial, two-sided; else chi-square of one degree of freedom, whose tail is
    erfc(sqrt(x / 2)), with Edwards' continuity correction (1948).
    """
    n = only_a + only_b
    if n < 25:
        least = min(only_a, only_b)
        tail = sum(math.comb(n, k) for k in range(least + 1))
        return min(1.0, 2 * tail / 2**n), "exact binomial"
    difference = abs(only_a - only_b)
    chi = max(0, difference - 1) ** 2 / n
    return math.erfc(math.sqrt(chi / 2)), f"chi-square {chi:.2f}"


def wilson(hits: Array, rows: Array) -> Array:
    """(2, ...) the 95% interval of shares hits / rows, rows above 0 (Wilson 1927)."""
    z2 = 1.959964**2
    share = hits / rows
    middle = share + z2 / (2 * rows)
    variance = share * (1 - share) + z2 / (4 * rows)
    half = np.sqrt(z2 * variance / rows)
    ends = np.stack([middle - half, middle + half])
    return np.clip(ends / (1 + z2 / rows), 0, 1)
