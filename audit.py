"""What is wrong with the rows of a data set, before training: equal and nearly equal texts, conflicting labels, leaks.

Two texts are equal when their normal forms are, and nearly equal when the sets of their shingles (all 5 characters in a
row of a normal form; a shorter text is one shingle) have a Jaccard similarity of NEAR or more: Broder 1997, On the
resemblance and containment of documents. Characters, not words, as they serve formulas and scripts without spaces.

Pairs worth comparing share a band of their MinHash signatures (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
3.4); each is then compared exactly, so what is found is nearly equal. What is guaranteed:
- A pair of similarity 0.8 is compared with probability 0.9996, one of 0.9 with 1 - 2e-8.
- Groups are the connected components of pairs: they chain. A ~ B and B ~ C group A with C, however different they are.
- The same texts give the same groups, in any order of rows and in any process.
- The work is bounded. In each band a row meets at most the `width` rows that follow it there, and the more comparisons
  were in vain for both rows of a pair, the better their signatures must agree for one more. So boilerplate that makes
  many rows alike, but not nearly equal, may hide a pair: among 50,000 rows of similarity 0.7 none of 950 pairs, of 0.79
  one in 100. width is 32, or as many as take WORK characters where the texts are few.
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise

import numpy as np

from metrics import Array
from tables import aligned, clip

Groups = list[list[int]]  # of row indices

SPLITS = ("train", "validation", "test")
NEAR = 0.8  # least Jaccard similarity of nearly equal texts
SHINGLE = 5  # characters
BANDS, ROWS = 20, 5  # of signatures; a pair of similarity s shares a band with probability 1 - (1 - s^5)^20
LEAST = 0.6  # agreement of their signatures below which no pair is compared: 5 standard deviations under NEAR
WIDTH, WORK = 32, 200_000_000  # comparisons a row, and characters of all comparisons
CHUNK = 1 << 16  # characters hashed at once
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, odd: Knuth's multiplicative hashing

# ---- findings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Findings:
    """Groups of row indices over all splits; each is sorted, and they are ordered by their first rows."""

    duplicates: Groups  # rows of the same normal form
    near: Groups  # rows that are nearly equal, of two or more normal forms
    conflicts: Groups  # those of duplicates with different labels; unlabelled rows do not count
    near_conflicts: Groups  # those of near
    leaks: dict[str, Groups]  # "train-validation", "train-test", "validation-test": duplicates in both
    near_leaks: dict[str, Groups]  # those of near


def normal_form(text: str) -> str:
    """NFKC, casefolded, each run of white space one space and none at the ends."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def audit(texts: list[str], labels: list, splits: list[str], near: bool = True) -> Findings:
    """The findings of N texts with their labels and splits.

    labels: strings, numbers, lists (compared as sets), or None for an unlabelled row. splits: each of SPLITS. near:
    False leaves out the search for nearly equal texts.
    """
    rows_of = defaultdict(list)
    for row, text in enumerate(texts):
        rows_of[normal_form(text)].append(row)
    duplicates = [rows for rows in rows_of.values() if len(rows) > 1]
    alike = []
    if near and len(rows_of) > 1:
        forms = sorted(rows_of)
        for group in _near(forms):
            alike.append(sorted(row for form in group for row in rows_of[forms[form]]))
        alike.sort()
    return Findings(
        duplicates,
        alike,
        _conflicts(duplicates, labels),
        _conflicts(alike, labels),
        _leaks(duplicates, splits),
        _leaks(alike, splits),
    )


def _conflicts(groups: Groups, labels: list) -> Groups:
    conflicts = []
    for group in groups:
        different = {_key(labels[row]) for row in group}
        if len(different - {None}) > 1:
            conflicts.append(group)
    return conflicts


def _leaks(groups: Groups, splits: list[str]) -> dict[str, Groups]:
    leaks = {f"{a}-{b}": [] for a, b in combinations(SPLITS, 2)}
    for group in groups:
        present = {splits[row] for row in group}
        for sides in leaks:
            if present.issuperset(sides.split("-")):
                leaks[sides].append(group)
    return leaks


def _key(label) -> Hashable:
    return frozenset(label) if isinstance(label, list) else label


# ---- nearly equal texts ---------------------------------------------------------------------------------------------


def _near(texts: Sequence[str]) -> Groups:
    """The groups of nearly equal texts among two or more different ones."""
    signatures = _signatures(texts)
    sketch = signatures.T.astype(np.uint8, order="C")  # b-bit minwise hashing (Li, König 2010)
    width = max(WIDTH, WORK // sum(map(len, texts)))
    rows = len(texts)
    group_of, vain = np.arange(rows), np.zeros(rows)
    members = {row: [row] for row in range(rows)}

    @cache
    def shingles(row: int) -> Array:
        hashes, _ = _shingles([texts[row]])
        hashes.sort()
        return hashes[np.append(True, hashes[1:] != hashes[:-1])]  # np.unique is ten times as slow

    for a, b in _candidates(signatures, width):
        apart = group_of[a] != group_of[b]
        a, b = a[apart], b[apart]

        # The more comparisons were in vain for both, the more of their signatures must agree.
        wasted = np.minimum(vain[a], vain[b]) / width
        least = (LEAST + (1 - LEAST) * wasted**2) * BANDS * ROWS
        agree = np.count_nonzero(sketch[a] == sketch[b], axis=1) >= least
        for i, j in zip(a[agree].tolist(), b[agree].tolist(), strict=True):
            if group_of[i] == group_of[j]:
                continue
            if _jaccard(shingles(i), shingles(j)) < NEAR:
                vain[[i, j]] += 1
                continue
            small, large = group_of[[i, j]].tolist()
            if len(members[small]) > len(members[large]):
                small, large = large, small
            group_of[members[small]] = large
            members[large] += members.pop(small)
    return [group for group in members.values() if len(group) > 1]


def _shingles(texts: Sequence[str]) -> tuple[Array, Array]:
    """The hashes (T,) uint64 of the shingles of N texts, one after the other, and where each text's start (N,).

    Polynomials of code points mod 2^64, mixed: that two of T shingles share one has a chance of about T^2 / 2^65.
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


def _signatures(texts: Sequence[str]) -> Array:
    """MinHash signatures (BANDS * ROWS, N) uint32: the least x * factor mod 2^32 of a text's shingles x."""
    generator = np.random.default_rng(0)
    factors = 2 * generator.integers(2**31, size=BANDS * ROWS, dtype=np.uint32) + 1
    signatures = np.empty((len(factors), len(texts)), np.uint32)
    chunk = np.cumsum([len(text) for text in texts]) // CHUNK
    starts = np.flatnonzero(np.diff(chunk, prepend=-1))
    for start, stop in pairwise([*starts, len(texts)]):
        hashes, segments = _shingles(texts[start:stop])
        x = (hashes >> np.uint64(32)).astype(np.uint32)
        for k, factor in enumerate(factors):
            signatures[k, start:stop] = np.minimum.reduceat(x * factor, segments)
    return signatures


def _candidates(signatures: Array, width: int) -> Iterator[tuple[Array, Array]]:
    """Pairs (P,) and (P,) of rows that share a band of their signatures (BANDS * ROWS, N).

    Of each band the rows that are next to each other when sorted by it, then those two apart, up to `width` apart.
    """
    keys = np.zeros((BANDS, signatures.shape[1]), np.uint64)
    for k in range(ROWS):
        keys = keys * FACTOR + signatures[k::ROWS]
    orders = np.argsort(keys, axis=1, kind="stable")
    keys = np.take_along_axis(keys, orders, axis=1)
    for step in range(1, min(width + 1, keys.shape[1])):
        for key, rows in zip(keys, orders, strict=True):
            pairs = np.flatnonzero(key[step:] == key[:-step])
            if len(pairs):
                yield rows[pairs], rows[pairs + step]


def _jaccard(a: Array, b: Array) -> float:
    """The similarity of two sets, each sorted."""
    nearest = b.take(np.searchsorted(b, a), mode="clip")
    common = np.count_nonzero(nearest == a)
    return common / (len(a) + len(b) - common)


# ---- as a person reads it -------------------------------------------------------------------------------------------


def label_counts(labels: list, splits: list[str], names: Sequence) -> str:
    """A table of rows a label and split, with their share of the split's rows, the commonest label first.

    labels: as for `audit`; of a list each label counts. names: labels that have a line even without a row. Of more than
    40 labels the 20 commonest and the 20 rarest are shown. ValueError on unequal lengths.
    """
    counts, total = {name: Counter() for name in names}, Counter(splits)
    for label, split in zip(labels, splits, strict=True):
        several = label if isinstance(label, list) else [label]
        for name in several or ["(no label)"]:
            counts.setdefault(name, Counter())[split] += 1
    if None in counts:
        counts["(unlabelled)"] = counts.pop(None)

    columns = [split for split in SPLITS if total[split]]
    rows = [["", *columns]]
    order = sorted(counts, key=lambda name: -counts[name].total())
    for name in order:
        cells = [f"{counts[name][split]:,} {counts[name][split] / total[split]:6.1%}" for split in columns]
        rows.append([_shown(name), *cells])
    lines = aligned(rows)
    if len(order) > 40:
        lines[21:-20] = [f"({len(order) - 40} more)"]
    rarest = ", ".join(f"{_shown(name)} ({counts[name].total():,})" for name in order[:-4:-1])
    return "\n".join([*lines, f"rarest: {rarest}"])


def length_table(lengths: Array, splits: list[str], max_length: int) -> str:
    """A table of each split's lengths (N,), in tokens before they were cut to max_length: quantiles that are lengths of
    rows, rows over max_length, and the share of tokens that the cut loses.
    """
    rows = [["tokens", "rows", "min", "median", "90%", "99%", "max", f"over {max_length}", "lost"]]
    for split in SPLITS:
        own = lengths[np.asarray(splits) == split]
        if len(own) == 0:
            continue
        quantiles = np.quantile(own, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf")
        cut = np.maximum(own - max_length, 0)
        counts = [len(own), *quantiles.astype(int), np.count_nonzero(cut)]
        lost = cut.sum() / max(1, own.sum())
        rows.append([split, *(f"{count:,}" for count in counts), f"{lost:.2%}"])
    return "\n".join(aligned(rows))


def warnings_of(findings: Findings, labels: list, splits: list[str], rows_of: list[str]) -> list[str]:
    """A line for each kind of finding: how many rows, examples by the rows' names and labels, and what to do."""
    check = "Check some of them: "
    kinds = [
        (findings.duplicates, "have the same text", "Each copy counts as a row of its own"),
        (findings.near, "have nearly the same text", check + "are they meant to be separate rows?"),
        (findings.conflicts, "have the same text but different labels", "--drop_conflicts removes those of train"),
        (
            findings.near_conflicts,
            "have nearly the same text but different labels",
            check + "should so small a difference change the label?",
        ),
    ]
    for same, leaks in (("the same", findings.leaks), ("nearly the same", findings.near_leaks)):
        for sides, groups in leaks.items():
            first, second = sides.split("-")
            advice = f"They inflate the scores of {second}: remove them from one side"
            if sides == "train-validation":
                advice += ", or hold out whole groups: --group_column with a column that such rows share"
            kinds.append((groups, f"of {first} and {second} have {same} text", advice))

    lines = []
    for groups, finding, advice in kinds:
        if not groups:
            continue
        examples = [_examples(group, labels, splits, rows_of) for group in groups[:3]]
        if len(groups) > 3:
            examples.append(f"and {len(groups) - 3:,} more")
        plural = "s" if len(groups) > 1 else ""
        count = f"{sum(map(len, groups)):,} rows in {len(groups):,} group{plural}"
        lines.append(f"{count} {finding}: {'; '.join(examples)}. {advice}")
    return lines


def _examples(group: list[int], labels: list, splits: list[str], rows_of: list[str]) -> str:
    """Up to three rows of a group, by name and label; those that differ in split or label come first."""
    different = {(splits[row], _key(labels[row])): row for row in reversed(group)}
    rows = dict.fromkeys([*sorted(different.values()), *group])
    shown = []
    for row in list(rows)[:3]:
        label = "" if labels[row] is None else f" ({_shown(labels[row])})"
        shown.append(rows_of[row] + label)
    return ", ".join(shown)


def _shown(label) -> str:
    text = ", ".join(map(str, label)) if isinstance(label, list) else str(label)
    return clip(text)
