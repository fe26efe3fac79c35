"""What is wrong with the rows of a data set, before training: equal and nearly equal texts, conflicting labels, leaks.

Two texts are equal when their normal forms are, and nearly equal when the sets of their shingles (all 5 characters in a
row of a normal form; a shorter text is one shingle) have a Jaccard similarity of NEAR or more: Broder 1997, On the
resemblance and containment of documents. Characters, not words, as they serve formulas and scripts without spaces.

Pairs worth comparing share a band of their MinHash signatures (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
3.4); each is then compared exactly, so what is found is nearly equal. What is guaranteed:
- A pair of similarity 0.8 is compared with probability 0.9996, one of 0.9 with 1 - 2e-8.
- Groups are the connected components of pairs: they chain. A ~ B and B ~ C put A and C together, however far apart.
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
from itertools import combinations

import numpy as np

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
    """Groups of row indices over all splits; each is sorted, and they stand in the order of their first rows."""

    duplicates: list[list[int]]  # rows of the same normal form
    near: list[list[int]]  # rows that are nearly equal, of two or more normal forms
    conflicts: list[list[int]]  # those of duplicates with different labels; unlabelled rows do not count
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
    if not len(texts) == len(labels) == len(splits) or not set(splits) <= set(SPLITS):
        sizes = f"{len(texts)} texts, {len(labels)} labels and {len(splits)} splits {sorted(set(splits))}"
        raise ValueError(f"got {sizes}, expected as many of each, and splits of {', '.join(SPLITS)}")
    rows_of = defaultdict(list)
    for i, text in enumerate(texts):
        rows_of[normal_form(text)].append(i)
    forms = sorted(rows_of)
    equal = [rows for rows in rows_of.values() if len(rows) > 1]
    found = _near(forms) if near and len(forms) > 1 else []
    alike = sorted(sorted(i for form in group for i in rows_of[forms[form]]) for group in found)
    conflicts = [[g for g in groups if len({_key(labels[i]) for i in g} - {None}) > 1] for groups in (equal, alike)]
    return Findings(equal, alike, *conflicts, _leaks(equal, splits), _leaks(alike, splits))


def _leaks(groups: list[list[int]], splits: list[str]) -> dict[str, list[list[int]]]:
    pairs = combinations(SPLITS, 2)
    return {f"{a}-{b}": [g for g in groups if {a, b} <= {splits[i] for i in g}] for a, b in pairs}


def _key(label) -> Hashable:
    return frozenset(label) if isinstance(label, list) else label


# ---- nearly equal texts ---------------------------------------------------------------------------------------------


def _near(texts: Sequence[str]) -> list[list[int]]:
    """The groups of nearly equal texts among two or more different ones."""
    signatures = _signatures(texts)
    sketch = signatures.T.astype(np.uint8, order="C")  # b-bit minwise hashing (Li, König 2010)
    width = max(WIDTH, WORK // sum(map(len, texts)))
    group, members, vain = np.arange(len(texts)), {i: [i] for i in range(len(texts))}, np.zeros(len(texts))

    @cache
    def shingles(i: int) -> np.ndarray:
        found = np.sort(_shingles([texts[i]])[0])
        return found[np.append(True, found[1:] != found[:-1])]  # np.unique is ten times as slow

    for a, b in _candidates(signatures, width):
        apart = group[a] != group[b]
        a, b = a[apart], b[apart]
        bar = LEAST + (1 - LEAST) * (np.minimum(vain[a], vain[b]) / width) ** 2
        agree = np.count_nonzero(sketch[a] == sketch[b], axis=1) >= bar * BANDS * ROWS
        for i, j in zip(a[agree].tolist(), b[agree].tolist(), strict=True):
            if group[i] == group[j]:
                continue
            if _jaccard(shingles(i), shingles(j)) < NEAR:
                vain[[i, j]] += 1
            else:
                small, large = sorted(group[[i, j]].tolist(), key=lambda g: len(members[g]))
                group[members[small]] = large
                members[large] += members.pop(small)
    return [found for found in members.values() if len(found) > 1]


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
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


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures (BANDS * ROWS, N) uint32: the least x * factor mod 2^32 of a text's shingles x."""
    factors = 2 * np.random.default_rng(0).integers(2**31, size=BANDS * ROWS, dtype=np.uint32) + 1
    signatures = np.empty((len(factors), len(texts)), np.uint32)
    chunk = np.cumsum([len(text) for text in texts]) // CHUNK
    starts = np.flatnonzero(np.diff(chunk, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(texts)], strict=True):
        hashes, segments = _shingles(texts[start:stop])
        x = (hashes >> np.uint64(32)).astype(np.uint32)
        for k, factor in enumerate(factors):
            signatures[k, start:stop] = np.minimum.reduceat(x * factor, segments)
    return signatures


def _candidates(signatures: np.ndarray, width: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (P,) and (P,) of rows that share a band of their signatures (BANDS * ROWS, N).

    Of each band the rows that stand next to each other when sorted by it, then those two apart, up to `width` apart.
    """
    keys = np.zeros((BANDS, signatures.shape[1]), np.uint64)
    for k in range(ROWS):
        keys = keys * FACTOR + signatures[k::ROWS]
    orders = np.argsort(keys, axis=1, kind="stable")
    keys = np.take_along_axis(keys, orders, axis=1)
    for step in range(1, min(width + 1, keys.shape[1])):
        for key, rows in zip(keys, orders, strict=True):
            at = np.flatnonzero(key[step:] == key[:-step])
            if len(at):
                yield rows[at], rows[at + step]


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """The similarity of two sets, each sorted."""
    common = np.count_nonzero(b.take(np.searchsorted(b, a), mode="clip") == a)
    return common / (len(a) + len(b) - common)


# ---- as a person reads it -------------------------------------------------------------------------------------------


def label_counts(labels: list, splits: list[str], names: Sequence) -> str:
    """A table of rows a label and split, with their share of the split's rows, the commonest label first.

    labels: as for `audit`; of a list each label counts. names: labels that have a line even without a row. Of more than
    40 labels the 20 commonest and the 20 rarest are shown. ValueError on unequal lengths.
    """
    counts, total = {name: Counter() for name in names}, Counter(splits)
    for label, split in zip(labels, splits, strict=True):
        for one in (label or ["(no label)"]) if isinstance(label, list) else [label]:
            counts.setdefault(one, Counter())[split] += 1
    if None in counts:
        counts["(unlabelled)"] = counts.pop(None)
    order = sorted(counts, key=lambda name: -counts[name].total())
    width, columns = max((len(_clip(name)) for name in order), default=0), [s for s in SPLITS if total[s]]
    lines = [" " * width + "".join(f" {split:>16}" for split in columns)]
    for name in order:
        cells = (f" {counts[name][split]:>9,} {counts[name][split] / total[split]:6.1%}" for split in columns)
        lines.append(f"{_clip(name):<{width}}" + "".join(cells))
    if len(order) > 40:
        lines[21:-20] = [f"({len(order) - 40} more)"]
    rarest = ", ".join(f"{_clip(name)} ({counts[name].total():,})" for name in order[:-4:-1])
    return "\n".join([*lines, f"rarest: {rarest}"])


def length_table(lengths: np.ndarray, splits: list[str], max_length: int) -> str:
    """A table of each split's lengths (N,), in tokens before they were cut to max_length: quantiles that are lengths of
    rows, rows over max_length, and the share of tokens that the cut loses.
    """
    heads = ("rows", "min", "median", "90%", "99%", "max", f"over {max_length}", "lost")
    lines = [f"{'tokens':<10}" + "".join(f" {head:>10}" for head in heads)]
    for split in [s for s in SPLITS if s in splits]:
        held = np.asarray(lengths)[np.asarray(splits) == split]
        ranks = np.quantile(held, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf")
        cells = "".join(f" {int(cell):>10,}" for cell in (len(held), *ranks, (held > max_length).sum()))
        lines.append(f"{split:<10}{cells} {np.maximum(held - max_length, 0).sum() / max(1, held.sum()):>10.2%}")
    return "\n".join(lines)


def said(findings: Findings, labels: list, splits: list[str], rows_of: list[str]) -> list[str]:
    """A line for each kind of finding: how much of it, the first by the rows' names and labels, and what to do."""
    two = "Look at some: is so small a difference meant to change the label?"
    found = [
        (findings.duplicates, "have the same text", "Each counts as often as it stands there"),
        (findings.near, "have nearly the same text", "Look at some: is each meant to stand there?"),
        (findings.conflicts, "have the same text but different labels", "--drop_conflicts leaves out those of train"),
        (findings.near_conflicts, "have nearly the same text but different labels", two),
    ]
    for how, leaks in (("the same", findings.leaks), ("nearly the same", findings.near_leaks)):
        for sides, groups in leaks.items():
            advice = f"They flatter the scores of {sides.split('-')[1]}: leave them out on one side"
            if sides == "train-validation":
                advice += ", or hold out whole groups: --group_column with a column that such rows share"
            found.append((groups, f"of {sides.replace('-', ' and ')} have {how} text", advice))

    def shown(group: list[int]) -> str:
        first = {(splits[i], _key(labels[i])): i for i in reversed(group)}  # rows of every split and label come first
        rows = list(dict.fromkeys([*sorted(first.values()), *group]))[:3]
        return ", ".join(rows_of[i] if labels[i] is None else f"{rows_of[i]} ({_clip(labels[i])})" for i in rows)

    def line(groups: list[list[int]], what: str, advice: str) -> str:
        count = f"{sum(map(len, groups)):,} rows in {len(groups):,} group{'s' * (len(groups) > 1)}"
        more = f"; and {len(groups) - 3:,} more" if len(groups) > 3 else ""
        return f"{count} {what}: {'; '.join(map(shown, groups[:3]))}{more}. {advice}"

    return [line(*one) for one in found if one[0]]


def _clip(name) -> str:
    text = ", ".join(map(str, name)) if isinstance(name, list) else str(name)
    return " ".join(text.split())[:40]
