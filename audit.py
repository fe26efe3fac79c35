"""What is wrong with the rows of a data set, before training: equal and nearly equal texts, conflicting labels, leaks.

Two texts are equal when their normal forms are, and nearly equal when the sets of their shingles (all 5 characters in a
row of a normal form; a shorter text is one shingle) have a Jaccard similarity of NEAR or more: Broder 1997, On the
resemblance and containment of documents. Characters, not words, as they serve formulas and scripts without spaces.

Pairs worth comparing share a band of their MinHash signatures (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets,
3.4); each is then compared exactly, so what is found is nearly equal. What is guaranteed:
- A pair of similarity 0.8 is compared with probability 0.9996, one of 0.9 with 1 - 2e-8.
- Groups are the connected components of pairs: they chain. A ~ B and B ~ C group A with C, however different they are.
- The same texts give the same groups, in any order of rows and in any process.
- The work is bounded. Of a text the first 262,144 characters count. In each band a row meets at most the `width` rows
  that follow it there, and the more comparisons were in vain for both rows of a pair, the better their signatures must
  agree for one more. So boilerplate that makes many rows alike, but not nearly equal, may hide a pair: among 50,000
  rows of similarity 0.7 none of 950 pairs, of 0.79 one in 100. width is 32, or as many as take WORK characters where
  the texts are few.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import combinations
from unicodedata import normalize

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
CHUNK = 64  # texts hashed at once
KEPT = 2**16  # texts whose shingles are kept, to be compared again
LONGEST = 2**18  # characters: what follows them does not count for nearly equal texts
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
    folded = normalize("NFKC", text).casefold()
    return " ".join(normalize("NFKC", folded).split())


def digest_of(text: str) -> bytes:
    """16 bytes that stand for a text, where many are compared."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def audit(texts: Sequence[str], labels: list, splits: list[str], near: bool = True) -> Findings:
    """The findings of N texts with their labels and splits. Of texts that lie on the disk only digests are in memory.

    labels: strings, numbers, lists (compared as sets), or None for an unlabelled row. splits: each of SPLITS. near:
    False leaves out the search for nearly equal texts.
    """
    rows_of = defaultdict(list)
    for row, text in enumerate(texts):
        form = normal_form(text)
        if not isinstance(texts, list):
            form = digest_of(form)
        rows_of[form].append(row)
    forms = sorted(rows_of)
    groups = []
    if near and len(forms) > 1:
        groups = _near(Forms(texts, [rows_of[form][0] for form in forms]))
    kinds = (
        [rows for rows in rows_of.values() if len(rows) > 1],
        sorted(sorted(row for form in group for row in rows_of[forms[form]]) for group in groups),
    )
    conflicts = [_conflicts(groups, labels) for groups in kinds]
    leaks = [_leaks(groups, splits) for groups in kinds]
    return Findings(*kinds, *conflicts, *leaks)


class Forms(Sequence):
    """The normal forms of some rows' texts, as far as they count for nearly equal texts."""

    def __init__(self, texts: Sequence[str], rows: list[int]):
        self.texts, self.rows = texts, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i: int):
        return normal_form(self.texts[self.rows[i]])[:LONGEST]


def _conflicts(groups, labels):
    """The groups of rows that have two or more labels."""

    def differ(group):
        return len({frozenset(_several(labels[row])) for row in group if labels[row] is not None}) > 1

    return list(filter(differ, groups))


def _leaks(groups, splits):
    """The groups of rows that are in both of two splits, by their names."""
    return {
        "-".join(pair): [group for group in groups if {splits[row] for row in group}.issuperset(pair)]
        for pair in combinations(SPLITS, 2)
    }


def _several(label):
    return label if isinstance(label, list) else [label]


# ---- nearly equal texts ---------------------------------------------------------------------------------------------


def _near(texts):
    """The groups of nearly equal texts among two or more different ones."""
    keys, bits, size = _sketches(texts)
    width = max(WIDTH, WORK // size)
    group_of = np.arange(len(texts))
    vain = np.zeros(len(texts))
    members = {}  # of the groups of two or more

    @lru_cache(KEPT)
    def shingles(row):
        hashes = np.sort(_shingles([texts[row]])[0])
        return hashes[np.append(True, np.diff(hashes) > 0)]  # np.unique is ten times as slow

    for a, b in _candidates(keys, width):
        apart = group_of[a] != group_of[b]
        a, b = a[apart], b[apart]

        # The more comparisons were in vain for both, the more of their signatures must agree.
        wasted = np.minimum(vain[a], vain[b]) / width
        least = (LEAST + (1 - LEAST) * wasted**2) * BANDS * ROWS
        agree = np.count_nonzero(bits[a] == bits[b], axis=1) >= least
        for i, j in zip(a[agree], b[agree], strict=True):
            if group_of[i] == group_of[j]:
                continue
            if _jaccard(shingles(i), shingles(j)) < NEAR:
                vain[[i, j]] += 1
                continue
            both = group_of[[i, j]].tolist()
            small, large = sorted(both, key=lambda group: len(members.get(group, "1")))
            joining = members.pop(small, [small])
            group_of[joining] = large
            members.setdefault(large, [large]).extend(joining)
    return list(members.values())


def _shingles(texts):
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


def _signatures(texts):
    """MinHash signatures (BANDS * ROWS, N) uint32 of N texts: the least x * factor mod 2^32 of a text's shingles x."""
    factors = 2 * np.random.default_rng(0).integers(2**31, size=BANDS * ROWS, dtype=np.uint32) + 1
    hashes, segments = _shingles(texts)
    x = (hashes >> np.uint64(32)).astype(np.uint32)
    return np.array([np.minimum.reduceat(x * factor, segments) for factor in factors])


def _sketches(texts):
    """(keys (BANDS, N) uint64 of the bands of N signatures, their last bits (N, BANDS * ROWS) uint8, the characters of
    all texts). For b-bit minwise hashing see Li, König 2010.
    """
    keys = np.zeros((BANDS, len(texts)), np.uint64)
    bits = np.empty((len(texts), BANDS * ROWS), np.uint8)
    size = 0
    for start in range(0, len(texts), CHUNK):
        stop = min(start + CHUNK, len(texts))
        block = [texts[i] for i in range(start, stop)]
        size += sum(map(len, block))
        signatures = _signatures(block)
        bits[start:stop] = signatures.T
        own = keys[:, start:stop]
        for k in range(ROWS):
            own *= FACTOR
            own += signatures[k::ROWS]
    return keys, bits, size


def _candidates(keys, width):
    """Pairs (P,) and (P,) of rows that share a band of their signatures, by its keys (BANDS, N), which are sorted.

    Of each band the rows that are next to each other when sorted by it, then those two apart, up to `width` apart.
    """
    orders = np.empty(keys.shape, np.uint32)
    for key, rows in zip(keys, orders, strict=True):
        rows[:] = np.argsort(key, kind="stable")
        key[:] = key[rows]
    for step in range(1, min(width + 1, keys.shape[1])):
        for key, rows in zip(keys, orders, strict=True):
            pairs = np.flatnonzero(key[step:] == key[:-step])
            if len(pairs):
                yield rows[pairs], rows[pairs + step]


def _jaccard(a, b):
    """The similarity of two sets of hashes, each sorted."""
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
        for name in _several("(unlabelled)" if label is None else label) or ["(no label)"]:
            counts.setdefault(name, Counter())[split] += 1

    columns = [split for split in SPLITS if split in total]
    rows = [["", *columns]]
    sizes = []
    for name, count in sorted(counts.items(), key=lambda item: -item[1].total()):
        cells = [f"{count[split]:,} {count[split] / total[split]:6.1%}" for split in columns]
        rows.append([_shown(name), *cells])
        sizes.append(f"{_shown(name)} ({count.total():,})")
    lines = aligned(rows)
    if len(sizes) > 40:
        lines[21:-20] = [f"({len(sizes) - 40} more)"]
    return "\n".join([*lines, f"rarest: {', '.join(sizes[:-4:-1])}"])


def length_table(lengths: Array, splits: list[str], max_length: int) -> str:
    """A table of each split's lengths (N,), in tokens before they were cut to max_length: quantiles that are lengths of
    rows, rows over max_length, and the share of tokens that the cut loses.
    """
    rows = [[*"tokens rows min median 90% 99% max".split(), f"over {max_length}", "lost"]]
    for split in SPLITS:
        own = lengths[np.asarray(splits) == split]
        if len(own):
            quantiles = np.quantile(own, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf")
            cut = np.maximum(own - max_length, 0)
            counts = [len(own), *quantiles.astype(int), np.count_nonzero(cut)]
            rows.append([split, *map("{:,}".format, counts), f"{cut.sum() / max(1, own.sum()):.2%}"])
    return "\n".join(aligned(rows))


def warnings_of(findings: Findings, labels: list, splits: list[str], rows_of: list[str]) -> list[str]:
    """A line for each kind of finding: how many rows, examples by the rows' names and labels, and what to do."""
    kinds = [
        (findings.duplicates, "have the same text", "Each copy counts as a row of its own"),
        (findings.near, "have nearly the same text", "Check some of them: are they meant to be separate rows?"),
        (findings.conflicts, "have the same text but different labels", "--drop_conflicts removes those of train"),
        (
            findings.near_conflicts,
            "have nearly the same text but different labels",
            "Check some of them: should so small a difference change the label?",
        ),
    ]
    for same, leaks in (("the same", findings.leaks), ("nearly the same", findings.near_leaks)):
        for sides, groups in leaks.items():
            advice = f"They inflate the scores of {sides.split('-')[1]}: remove them from one side"
            if sides == "train-validation":
                advice += ", or hold out whole groups: --group_column with a column that such rows share"
            kinds.append((groups, f"of {sides.replace('-', ' and ')} have {same} text", advice))

    def examples_of(group):
        """Up to three rows, by name and label; those that differ in split or label come first."""
        different = {(splits[row], frozenset(_several(labels[row]))): row for row in reversed(group)}
        rows = dict.fromkeys([*sorted(different.values()), *group])
        return ", ".join(
            rows_of[row] if labels[row] is None else f"{rows_of[row]} ({_shown(labels[row])})" for row in list(rows)[:3]
        )

    lines = []
    for groups, finding, advice in kinds:
        examples = list(map(examples_of, groups[:3]))
        if len(groups) > 3:
            examples.append(f"and {len(groups) - 3:,} more")
        noun = "group" if len(groups) == 1 else "groups"
        count = f"{sum(map(len, groups)):,} rows in {len(groups):,} {noun}"
        if groups:
            lines.append(f"{count} {finding}: {'; '.join(examples)}. {advice}")
    return lines


def _shown(label):
    return clip(", ".join(map(str, _several(label))))
