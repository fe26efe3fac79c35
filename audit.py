"""What is wrong with the rows of a data set, before training: equal and nearly equal texts, conflicting labels, leaks.

Two texts are equal when their normal forms are, and nearly equal when the sets of their shingles (all 5 characters in a
row of a normal form; a shorter text is one shingle) have a Jaccard similarity of NEAR or more: Broder 1997, On the
resemblance and containment of documents. Characters, not words, as they serve formulas and scripts without spaces.

Pairs worth comparing share a band of their MinHash signatures (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
3.4); each is then compared exactly, so what is found is nearly equal. What is guaranteed:
- A pair of similarity 0.8 is compared with probability 0.9996, one of 0.9 with 1 - 2e-8.
- Groups are the connected components of pairs: they chain. A ~ B and B ~ C put A and C together, however far apart.
- The same texts give the same groups, in any order of rows and in any process.
- The work is bounded. In each band a row meets the `width` rows after it, the most similar ones first, and the more
  comparisons were in vain for both rows of a pair, the higher their signatures' agreement must be; after `width` no
  more are made. So where boilerplate makes more rows than that alike, but not nearly equal, a pair near 0.8 may be
  missed. width is 32, and more in small data sets: as much as WORK allows.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import numpy as np

SPLITS = ("train", "validation", "test")
NEAR = 0.8  # least Jaccard similarity of nearly equal texts
SHINGLE = 5  # characters
BANDS, ROWS = 20, 5  # of signatures; a pair of similarity s shares a band with probability 1 - (1 - s^5)^20
LEAST = 60  # values of 100 in which the signatures of a pair to be compared agree: 5 standard deviations below 80
DEPTH = 6  # bands by which the rows of a bucket are sorted
WIDTH, WORK = 32, 500_000_000  # comparisons a row, or as many as take WORK characters in all
CHUNK = 1 << 16  # characters, or pairs, at once
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: Knuth's multiplicative hashing

# ---- findings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """Groups of row indices over all splits; each group is sorted, and groups stand in the order of their first rows."""

    duplicates: list[list[int]]  # rows of the same normal form
    near: list[list[int]]  # rows that are nearly equal, of two or more normal forms
    conflicts: list[list[int]]  # those duplicates with different labels; unlabelled rows do not count
    near_conflicts: list[list[int]]  # those of near
    leaks: dict[str, list[list[int]]]  # "train-validation", "train-test", "validation-test": duplicates in both
    near_leaks: dict[str, list[list[int]]]  # those of near


def normal_form(text: str) -> str:
    """NFKC, casefolded, each run of white space one space and none at the ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def audit(texts: list[str], labels: list, splits: list[str], near: bool = True) -> Findings:
    """The findings of N texts with their labels and splits.

    labels: strings, numbers, lists (compared as sets), or None for an unlabelled row. splits: each of SPLITS. near:
    False leaves out the search for nearly equal texts. ValueError on unequal lengths and unknown splits.
    """
    _check(splits, texts, labels)
    rows_of = defaultdict(list)
    for i, text in enumerate(texts):
        rows_of[normal_form(text)].append(i)
    forms = sorted(rows_of) if near else []
    equal = sorted(rows for rows in rows_of.values() if len(rows) > 1)
    alike = sorted(sorted(i for form in group for i in rows_of[forms[form]]) for group in _near(forms))

    def conflicting(groups: list[list[int]]) -> list[list[int]]:
        return [g for g in groups if len({_key(labels[i]) for i in g} - {None}) > 1]

    def leaking(groups: list[list[int]]) -> dict[str, list[list[int]]]:
        held = [(g, {splits[i] for i in g}) for g in groups]
        return {f"{a}-{b}": [g for g, sides in held if {a, b} <= sides] for a, b in combinations(SPLITS, 2)}

    return Findings(equal, alike, conflicting(equal), conflicting(alike), leaking(equal), leaking(alike))


def _check(splits: Sequence[str], *columns: Sequence) -> None:
    if any(len(column) != len(splits) for column in columns):
        raise ValueError(f"got columns of {[len(c) for c in columns]} rows, expected {len(splits)}, one for each split")
    if unknown := sorted(set(splits) - set(SPLITS)):
        raise ValueError(f"splits: got {unknown[0]!r}, expected one of {', '.join(SPLITS)}")


def _key(label) -> Hashable:
    return frozenset(label) if isinstance(label, (list, tuple, set)) else label


# ---- nearly equal texts ---------------------------------------------------------------------------------------------


def _near(texts: Sequence[str]) -> list[list[int]]:
    """The groups of nearly equal texts among N different ones."""
    n = len(texts)
    if n < 2:
        return []
    signatures = _signatures(texts)
    sketch = signatures.astype(np.uint8)  # b-bit minwise hashing (Li, Koenig 2010)
    width = max(WIDTH, WORK // sum(map(len, texts)))
    group, members = np.arange(n), {i: [i] for i in range(n)}
    vain, different = np.zeros(n, np.int64), set()

    @cache
    def shingles(i: int) -> np.ndarray:
        return _distinct(_shingles([texts[i]])[0])

    for first, second in _candidates(signatures, width):
        apart = group[first] != group[second]
        pairs = _distinct(first[apart] * n + second[apart])
        for part in np.split(pairs, range(CHUNK, len(pairs), CHUNK)):
            a, b = np.divmod(part, n)
            bar = LEAST + (BANDS * ROWS - LEAST) * (np.minimum(vain[a], vain[b]) / width) ** 2
            part = part[np.count_nonzero(sketch[a] == sketch[b], axis=1) >= bar]
            for pair in part.tolist():
                i, j = divmod(pair, n)
                if group[i] == group[j] or pair in different:
                    continue
                if _jaccard(shingles(i), shingles(j)) < NEAR:
                    different.add(pair)
                    vain[[i, j]] += 1
                    continue
                small, large = sorted(group[[i, j]].tolist(), key=lambda g: len(members[g]))
                group[members[small]] = large
                members[large] += members.pop(small)
    return [found for found in members.values() if len(found) > 1]


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes (T,) uint64 of the shingles of N texts, one after the other, and where each text's start (N,).

    Polynomials of code points mod 2^64, mixed: two of T shingles share one by a chance of about T^2 / 2^65.
    """
    padded = [text.ljust(SHINGLE, "\0") for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), "<u4")
    hashes = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    for k in range(SHINGLE):
        hashes = hashes * FACTOR + codes[k : k + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(32))) * FACTOR
    ends = np.cumsum([0, *map(len, padded)])
    across = ends[1:-1, None] - np.arange(1, SHINGLE)  # those that reach into the next text
    return np.delete(hashes, across.ravel()), ends[:-1] - (SHINGLE - 1) * np.arange(len(texts))


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures (N, BANDS * ROWS) uint32: the least x * factor mod 2^32 of a text's shingles x."""
    factors = np.random.default_rng(0).integers(2**31, size=BANDS * ROWS, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
    signatures = np.empty((len(factors), len(texts)), np.uint32)
    chunk = np.cumsum([len(text) for text in texts]) // CHUNK
    starts = np.flatnonzero(np.diff(chunk, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(texts)], strict=True):
        hashes, segments = _shingles(texts[start:stop])
        x = (hashes >> np.uint64(32)).astype(np.uint32)
        product = np.empty_like(x)
        for k, factor in enumerate(factors):
            np.multiply(x, factor, out=product)
            signatures[k, start:stop] = np.minimum.reduceat(product, segments)
    return np.ascontiguousarray(signatures.T)


def _candidates(signatures: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (P,) and (P,) of rows that share a bucket of some band, the lower first: those that stand next to each
    other when the bucket is sorted by the bands that follow, then those two apart, up to `width` apart.
    """
    keys = np.zeros((BANDS, len(signatures)), np.uint64)
    for k in range(ROWS):
        keys = keys * FACTOR + signatures[:, k::ROWS].T
    rows, buckets = [], []
    for band in range(BANDS):
        _, bucket, size = np.unique(keys[band], return_inverse=True, return_counts=True)
        shared = np.flatnonzero(size[bucket] > 1)
        order = shared[np.lexsort([keys[(band + k) % BANDS, shared] for k in reversed(range(DEPTH))])]
        rows.append(order)
        buckets.append(bucket[order] + band * len(signatures))
    rows, buckets = np.concatenate(rows), np.concatenate(buckets)
    at = np.arange(len(rows))
    for step in range(1, width + 1):
        at = at[at + step < len(rows)]
        at = at[buckets[at] == buckets[at + step]]
        if not len(at):
            return
        yield np.minimum(rows[at], rows[at + step]), np.maximum(rows[at], rows[at + step])


def _distinct(values: np.ndarray) -> np.ndarray:
    """The distinct values in order; for these sizes ten times as fast as np.unique, which hashes."""
    values = np.sort(values)
    return values[np.append(True, values[1:] != values[:-1])[: len(values)]]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The similarity of two sets, sorted."""
    common = np.count_nonzero(b.take(np.searchsorted(b, a), mode="clip") == a)
    return common / (len(a) + len(b) - common)


# ---- as a person reads it -------------------------------------------------------------------------------------------


def label_counts(labels: list, splits: list[str], names: Sequence) -> str:
    """A table of rows a label and split, with their share of the split's rows, the commonest label first.

    labels: as for `audit`; of a list each label counts. names: labels that have a line even without a row. Of more than
    40 labels the 20 commonest and the 20 rarest are shown. ValueError as for `audit`.
    """
    _check(splits, labels)
    counts = {name: Counter() for name in names}
    for label, split in zip(labels, splits, strict=True):
        several = label if isinstance(label, (list, tuple, set)) else ["(unlabelled)" if label is None else label]
        for one in several or ["(no label)"]:
            counts.setdefault(one, Counter())[split] += 1
    order = sorted(counts, key=lambda name: -counts[name].total())
    total = Counter(splits)
    width = max((len(_clip(name)) for name in order), default=0)
    lines = [" " * width + "".join(f" {split:>16}" for split in SPLITS if total[split])]
    for name in order:
        cells = (f" {counts[name][s]:>9,} {counts[name][s] / total[s]:6.1%}" for s in SPLITS if total[s])
        lines.append(f"{_clip(name):<{width}}" + "".join(cells))
    if len(order) > 40:
        lines[21:-20] = [f"({len(order) - 40} labels between them)"]
    rarest = ", ".join(f"{_clip(name)} ({counts[name].total():,})" for name in order[: -min(4, len(order)) : -1])
    return "\n".join([*lines, f"rarest: {rarest}"])


def length_table(lengths: np.ndarray, splits: list[str], max_length: int) -> str:
    """A table of each split's lengths (N,), in tokens before they were cut to max_length: quantiles that are lengths of
    rows, rows over max_length, and the share of tokens that the cut loses. ValueError as for `audit`.
    """
    _check(splits, lengths)
    over = f"over {max_length}"
    lines = [
        f"{'tokens':<10}" + "".join(f" {h:>9}" for h in ("rows", "min", "median", "90%", "99%", "max", over, "lost"))
    ]
    for split in SPLITS:
        held = np.asarray(lengths)[[s == split for s in splits]]
        if len(held):
            ranks = np.quantile(held, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf")
            cells = [len(held), *ranks, (held > max_length).sum()]
            lost = np.maximum(held - max_length, 0).sum() / max(1, held.sum())
            lines.append(f"{split:<10}" + "".join(f" {int(c):>9,}" for c in cells) + f" {lost:>9.2%}")
    return "\n".join(lines)


def _clip(name, width: int = 40) -> str:
    text = " ".join(str(name).split())
    return text if len(text) <= width else text[: width - 1] + "."


def said(findings: Findings, labels: list, splits: list[str], rows_of: list[str]) -> list[str]:
    """A line for each kind of finding: how much there is, the first of it by the rows' names, and what to do about it."""
    lines = []

    def say(
        groups: list[list[int]], what: str, advice: str, by: Callable = int, shown: Callable = lambda i: ""
    ) -> None:
        if groups:
            firsts = [{by(i): i for i in reversed(group)}.values() for group in groups[:3]]
            named = [" = ".join(f"{rows_of[i]}{shown(i)}" for i in sorted(rows)[:3]) for rows in firsts]
            count = f"{sum(map(len, groups)):,} rows in {len(groups):,} group{'s' * (len(groups) > 1)} {what}"
            lines.append(f"{count}: {'; '.join(named)}{'; ...' * (len(groups) > 3)}. {advice}")

    of_label = dict(by=lambda i: _key(labels[i]), shown=lambda i: f" ({_clip(labels[i])})")
    say(findings.duplicates, "have the same text", "Each counts as often as it stands there")
    say(findings.near, "have nearly the same text", "Look at some: are they meant to stand there more than once?")
    say(findings.conflicts, "have the same text and different labels", "--drop_conflicts leaves them out", **of_label)
    advice = "Is the small difference meant to change the label? Correct those where it is not"
    say(findings.near_conflicts, "have nearly the same text and different labels", advice, **of_label)
    for kind, leaks in (("the same", findings.leaks), ("nearly the same", findings.near_leaks)):
        for sides, groups in leaks.items():
            advice = f"Scores of {sides.split('-')[1]} are too good by them: leave them out on one side"
            if sides == "train-validation":
                advice += ", or hold out whole groups: --group_column with a column that such rows share"
            say(groups, f"stand on both sides of {sides} with {kind} text", advice, by=lambda i: splits[i])
    return lines
