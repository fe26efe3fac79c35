"""audit.py against planted findings, exact searches over all pairs, worst cases, and the real files."""

import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import audit
import files

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("train-validation", "train-test", "validation-test")


def shingles(text: str) -> set[str]:
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def similarity(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


def components(pairs) -> list[list[int]]:
    """Groups of what pairs link, by a search through each."""
    links = defaultdict(set)
    for a, b in pairs:
        links[a].add(b)
        links[b].add(a)
    groups, left = [], set(links)
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            group |= edge
            edge = {b for a in edge for b in links[a]} - group
        groups.append(sorted(group))
        left -= group
    return sorted(groups)


def rows_by_form(texts: list[str]) -> dict[str, list[int]]:
    """Without normal_form, for texts that NFKC leaves as they are once they are in lower case."""
    found = defaultdict(list)
    for i, text in enumerate(texts):
        found[" ".join(unicodedata.normalize("NFKC", text).casefold().split())].append(i)
    return found


def all_pairs(forms: list[str]) -> list[tuple[int, int]]:
    sets = [shingles(form) for form in forms]
    return [(a, b) for a, b in combinations(range(len(forms)), 2) if similarity(sets[a], sets[b]) >= 0.8]


def shared_prefix(forms: list[str]) -> list[tuple[int, int]]:
    """The same as all_pairs, fast enough for real files: exact prefix filtering (Bayardo, Ma, Srikant 2007).

    Of two sets with Jaccard 0.8 or more, the rarest fifth (and one more) of each have an element in common.
    """
    sets = [shingles(form) for form in forms]
    counts = Counter(s for one in sets for s in one)
    holders, candidates = defaultdict(list), set()
    for i, one in enumerate(sets):
        rare = sorted(one, key=lambda s: (counts[s], s))[: len(one) // 5 + 2]
        for s in rare:
            if counts[s] > 1:
                candidates.update((j, i) for j in holders[s])
                holders[s].append(i)
    return [(a, b) for a, b in candidates if similarity(sets[a], sets[b]) >= 0.8]


def near_groups(texts: list[str], search) -> list[list[int]]:
    rows = rows_by_form(texts)
    forms = list(rows)
    return sorted(sorted(i for form in group for i in rows[forms[form]]) for group in components(search(forms)))


def of_train(texts: list[str], labels: list | None = None) -> audit.Findings:
    return audit.audit(texts, labels or [None] * len(texts), ["train"] * len(texts))


def words(rng: random.Random, count: int) -> str:
    return " ".join("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 8))) for _ in range(count))


def edited(rng: random.Random, text: str, changes: int) -> str:
    """The text with some of its words exchanged."""
    parts = text.split()
    for at in rng.sample(range(len(parts)), changes):
        parts[at] = words(rng, 1)
    return " ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# what was planted


@pytest.mark.parametrize("seed", range(3))
def test_planted_findings_are_found_and_nothing_else(seed):
    rng = random.Random(seed)
    rows, groups = [], []  # (text, label, split), and what they belong to

    def plant(kind: str, *members) -> None:
        groups.append((kind, range(len(rows), len(rows) + len(members))))
        rows.extend(members)

    for i in range(400):
        plant("alone", (words(rng, rng.randint(1, 120)), i % 3, rng.choice(audit.SPLITS)))
    for a, b in [("train", "train"), *combinations(audit.SPLITS, 2), ("test", "test")]:
        for other in (0, 1, None):
            text = words(rng, rng.randint(1, 80))
            plant("duplicates", (text, 0, a), (f"\t {text.upper()}\n", other, b))
            text = words(rng, 80)
            plant("near", (text, 0, a), (edited(rng, text, 2), other, b), (edited(rng, text, 3), 0, a))
    text = words(rng, 60)
    plant("near", (text, 2, "train"), (edited(rng, text, 1), 2, "train"), (text, 2, "validation"))
    groups.append(("duplicates", [len(rows) - 3, len(rows) - 1]))

    order = rng.sample(range(len(rows)), len(rows))
    place = {row: i for i, row in enumerate(order)}
    groups = [(kind, sorted(place[i] for i in members)) for kind, members in groups]
    texts, labels, splits = zip(*(rows[i] for i in order), strict=True)
    found = audit.audit(list(texts), list(labels), list(splits))

    for kind in ("duplicates", "near"):
        want = sorted(members for k, members in groups if k == kind)
        assert getattr(found, kind) == want
        differ = [g for g in want if len({labels[i] for i in g} - {None}) == 2]
        assert len(differ) >= 5
        assert (found.conflicts if kind == "duplicates" else found.near_conflicts) == differ
        leaks = found.leaks if kind == "duplicates" else found.near_leaks
        assert tuple(leaks) == SIDES
        for sides in SIDES:
            assert leaks[sides] == [g for g in want if set(sides.split("-")) <= {splits[i] for i in g}]
            assert len(leaks[sides]) >= 3

    equal = audit.audit(list(texts), list(labels), list(splits), near=False)
    assert (equal.duplicates, equal.conflicts, equal.leaks) == (found.duplicates, found.conflicts, found.leaks)
    assert equal.near == equal.near_conflicts == [] and equal.near_leaks == {sides: [] for sides in SIDES}


# ---------------------------------------------------------------------------------------------------------------------
# against exact searches


def family(rng: random.Random, alphabet: str, count: int, longest: int) -> list[str]:
    """Texts and texts made from them, so that similarities of all sizes occur."""
    texts = []
    while len(texts) < count:
        text = list(rng.choice(texts)) if texts and rng.random() < 0.6 else []
        if not text:
            text = rng.choices(alphabet, k=rng.randint(0, longest))
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            at = rng.randint(0, len(text))
            text[at : at + rng.randint(0, 2)] = rng.choices(alphabet, k=rng.randint(0, 3))
        texts.append("".join(text))
    return texts


@pytest.mark.parametrize("longest", [8, 30, 100, 300])
@pytest.mark.parametrize("alphabet", ["ab ", "abcdefghijklmnop  ", "数学题目证明三角形的面积🙂👩‍👩‍👧é"])
def test_groups_equal_those_of_all_pairs(alphabet, longest):
    for seed in range(4):
        texts = family(random.Random(seed), alphabet, 90, longest)
        assert of_train(texts).near == near_groups(texts, all_pairs)


def test_the_exact_searches_agree():
    texts = family(random.Random(9), "abcd ", 200, 60)
    rows = list(rows_by_form(texts))
    assert sorted(shared_prefix(rows)) == all_pairs(rows) != []


def chinese(rng: random.Random, count: int) -> str:
    return "".join(map(chr, rng.sample(range(0x4E00, 0x9FA5), count)))


def test_recall_and_precision_at_the_threshold():
    """3,000 pairs of Jaccard exactly 0.8 are found but for one in 1,000; 3,000 just below it never."""
    rng = random.Random(0)
    for count, cut, lowest, highest in ((254, 204, 2997, 3000), (254, 203, 0, 0)):  # 200 and 199 of 250 shingles
        texts = [part for text in (chinese(rng, count) for _ in range(3000)) for part in (text, text[:cut])]
        near = of_train(texts).near
        assert near == [[2 * (g[0] // 2), 2 * (g[0] // 2) + 1] for g in near]
        assert lowest <= len(near) <= highest


def test_signatures_agree_as_often_as_sets_do():
    rng = random.Random(1)
    texts = [part for text in (chinese(rng, 104) for _ in range(4000)) for part in (text, text[:84])]
    found = audit._signatures(texts)
    agree = (found[:, ::2] == found[:, 1::2]).sum(axis=0)  # binomial: 100 draws of probability 0.8
    assert agree.mean() == pytest.approx(80, abs=0.25)
    assert agree.std() == pytest.approx(4, abs=0.25)
    assert (found[:, :-2:2] == found[:, 2::2]).mean() < 1e-3


def test_groups_chain():
    text = chinese(random.Random(2), 400)
    steps = [text[i : i + 200] for i in range(0, 180, 20)]
    assert similarity(shingles(steps[0]), shingles(steps[-1])) < 0.2
    assert of_train(steps).near == [list(range(9))]
    assert of_train(steps[::4]).near == []


def test_shingle_hashes_are_one_to_one():
    texts = family(random.Random(3), "abcdefgh ", 300, 400) + ["", "a", "abcd", "abcde"]
    hashes, starts = audit._shingles(texts)
    spelt = [s for text in texts for s in (text[i : i + 5] for i in range(max(1, len(text) - 4)))]
    pairs = set(zip(hashes.tolist(), spelt, strict=True))
    assert len(pairs) == len(set(spelt)) == len(set(hashes.tolist())) > 3000
    assert len(set((hashes >> np.uint64(32)).tolist())) == len(set(spelt))
    assert starts.tolist() == np.cumsum([0, *(max(1, len(t) - 4) for t in texts)])[:-1].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# rows, labels, normal forms


@pytest.mark.parametrize("width", [None, 1])
def test_permuted_rows_give_permuted_findings(width, monkeypatch):
    """Also where pairs are missed, with a width of 1."""
    if width:
        monkeypatch.setattr(audit, "WORK", 0)
        monkeypatch.setattr(audit, "WIDTH", width)
    rng = random.Random(4)
    texts = family(rng, "abcde ", 250, 80)
    labels, splits = rng.choices(["x", "y", None], k=250), rng.choices(audit.SPLITS, k=250)
    found = audit.audit(texts, labels, splits)
    order = rng.sample(range(250), 250)
    moved = audit.audit(*([column[i] for i in order] for column in (texts, labels, splits)))

    def back(groups):
        if isinstance(groups, dict):
            return {sides: back(value) for sides, value in groups.items()}
        return sorted(sorted(order[i] for i in group) for group in groups)

    assert {name: back(value) for name, value in vars(moved).items()} == vars(found)
    assert all(vars(found).values()) and all(found.near_leaks.values())


@pytest.mark.parametrize(
    "text, form",
    [
        ("  Two\t words \r\n\n here\u00a0now ", "two words here now"),
        ("ﬁne ｆｕｌｌ ① x²", "fine full 1 x2"),
        ("STRASSE Straße", "strasse strasse"),
        ("e\u0301 É", "é é"),
        ("\u03aa\u0301 \u0390", "\u0390 \u0390"),  # folding undoes the composition of the second, not of the first
        ("数学　题", "数学 题"),
        ("👩‍👩‍👧", "👩‍👩‍👧"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_normal_form(text, form):
    assert audit.normal_form(text) == form


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text())
def test_a_normal_form_is_its_own(text):
    form = audit.normal_form(text)
    assert audit.normal_form(form) == form
    assert audit.normal_form(f" \t{unicodedata.normalize('NFD', text)}\n") == form


@pytest.mark.parametrize(
    "first, second, differ",
    [
        ("a", "a", False), ("a", "b", True), ("1", 1, True), (1, 2, True), (0.5, 0.5, False), (0.5, 0.25, True),
        (None, "a", False), (None, None, False), (0, None, False), (["a", "b"], ["b", "a"], False),
        (["a"], ["a", "b"], True), ([], ["a"], True), ([], None, False), ([], [], False),
    ],
)  # fmt: skip
def test_which_labels_conflict(first, second, differ):
    text = "Find the largest n for which the sum of the digits of n is prime, and show that there is no larger one."
    found = of_train([text, text.upper(), text + "!"], [first, second, None])
    assert found.duplicates == [[0, 1]] and found.near == [[0, 1, 2]]
    assert found.conflicts == ([[0, 1]] if differ else [])
    assert found.near_conflicts == ([[0, 1, 2]] if differ else [])


def test_few_rows_and_short_texts():
    nothing = audit.Findings([], [], [], [], {s: [] for s in SIDES}, {s: [] for s in SIDES})
    assert of_train([]) == of_train([""]) == of_train(["a"]) == of_train(["", "a", "ab", "abcd", "abcde"]) == nothing
    assert of_train(["", " ", "\n", "b"]).duplicates == [[0, 1, 2]]
    assert of_train(["🙂", "🙃", "🙂 "]).duplicates == [[0, 2]]
    assert of_train(["half a \ud83d pair", "half A \ud83d pair", "\ud83d"]).duplicates == [[0, 1]]


def test_labels_and_splits_of_other_lengths_are_refused():
    with pytest.raises(ValueError):
        audit.label_counts(["x"], ["train", "test"], ["x"])


def test_the_salt_of_hashes_does_not_matter():
    code = (
        "import random, audit; r = random.Random(5)\n"
        "t = [''.join(r.choices('ab ', k=r.randint(3, 40))) for _ in range(400)]\n"
        "y = [['a', 'b', 'c'][: r.randint(0, 3)] for _ in t]; s = r.choices(audit.SPLITS, k=400)\n"
        "f = audit.audit(t, y, s); print(f, audit.warnings_of(f, y, s, t), audit.label_counts(y, s, ()))"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONHASHSEED": str(salt)}) for salt in (0, 1)]  # fmt: skip
    first, second = (run.communicate(timeout=60)[0] for run in runs)
    assert first == second and len(first) > 1000


# ---------------------------------------------------------------------------------------------------------------------
# worst cases


@pytest.fixture
def compared(monkeypatch) -> list:
    """One entry for each exact comparison that is made."""
    calls, jaccard = [], audit._jaccard
    monkeypatch.setattr(audit, "_jaccard", lambda a, b: calls.append(1) or jaccard(a, b))
    return calls


def test_equal_texts_are_compared_once(compared):
    text = words(random.Random(6), 80)
    assert of_train([text] * 50_000 + [edited(random.Random(6), text, 1)]).near == [list(range(50_001))]
    assert len(compared) == 1


def test_nearly_equal_texts_join_without_all_pairs(compared):
    base = words(random.Random(7), 12)
    texts = [f"{base} {i}" for i in range(50_000)]
    found = of_train(texts)
    assert found.near == [list(range(50_000))] and found.duplicates == []
    assert len(compared) < 4 * len(texts)


def test_boilerplate_is_bounded_and_hides_little(compared, monkeypatch):
    """What all rows share makes them alike, but not nearly equal; 200 pairs of them are."""
    monkeypatch.setattr(audit, "WORK", 0)
    rng, n = random.Random(8), 10_000
    base = "".join(rng.choices("abcdefghij", k=120))
    texts = [base + "".join(rng.choices("klmnopqrst", k=30)) for _ in range(n)]
    texts += [text[:-2] + "zz" for text in texts[:200]]
    one, other, pair = (shingles(texts[i]) for i in (0, 1, n))
    assert 0.6 < similarity(one, other) < 0.8 < similarity(one, pair)
    near = of_train(texts).near
    assert {tuple(g) for g in near} <= {(i, n + i) for i in range(200)} and len(near) >= 190
    assert len(compared) < (audit.WIDTH + 2) * len(texts)  # of 50 million pairs


def test_long_texts():
    rng = random.Random(9)
    texts = [words(rng, 15_000) for _ in range(3)]
    texts += [edited(rng, texts[0], 500), edited(rng, texts[1], 4000)]
    assert min(map(len, texts)) > 95_000
    assert of_train(texts).near == [[0, 3]]


# ---------------------------------------------------------------------------------------------------------------------
# real files


def check(texts: list[str], labels: list[str], most: int) -> audit.Findings:
    """The findings of one split, which are those of a dict, and in the first rows those of an exact search."""
    found, want = of_train(texts, labels), sorted(rows for rows in rows_by_form(texts).values() if len(rows) > 1)
    assert found.duplicates == want != []
    assert found.conflicts == [rows for rows in want if len({labels[i] for i in rows}) > 1]
    first, near = of_train(texts[:most], labels[:most]), near_groups(texts[:most], shared_prefix)
    assert first.near == near != []
    assert first.near_conflicts == [rows for rows in near if len({labels[i] for i in rows}) > 1]
    return found


def test_math_problems(shared):
    rows = files.read_rows(str(shared / "data/math_problems/train.csv"), "input")
    tested = [row["Question"] for row in files.read_rows(str(shared / "data/math_problems/test.csv"), "input")]
    texts, labels = [row["Question"] for row in rows], [row["label"] for row in rows]
    check(texts, labels, most=2500)  # all 8,151 rows agree too, in 8 seconds
    splits = ["train"] * len(texts) + ["test"] * len(tested)
    found = audit.audit(texts + tested, labels + [None] * len(tested), splits)
    assert len(found.leaks["train-test"]) == len(set(rows_by_form(texts)) & set(rows_by_form(tested))) > 0
    for group in found.near_leaks["train-test"]:
        sets = [shingles(audit.normal_form((texts + tested)[i])) for i in group]
        assert all(max(similarity(a, b) for b in sets if b is not a) >= 0.8 for a in sets)


@pytest.mark.parametrize("template", ["{body}", "Rule: {rule}\nPost: {body}"])
def test_reddit_rules(shared, template):
    rows = files.read_rows(str(shared / "data/reddit_rules/train.csv"), "input")
    assert check([template.format(**row) for row in rows], [row["rule_violation"] for row in rows], len(rows)).conflicts


# ---------------------------------------------------------------------------------------------------------------------
# tables and warnings


def cells(text: str) -> list[list[str]]:
    return [line.replace(",", "").split() for line in text.splitlines()]


def test_label_counts():
    labels, splits = ["b", "a", "b", None, "b", "a"], ["train", "train", "train", "test", "validation", "validation"]
    assert cells(audit.label_counts(labels, splits, ["a", "b", "c"])) == [
        ["train", "validation", "test"],
        ["b", "2", "66.7%", "1", "50.0%", "0", "0.0%"],
        ["a", "1", "33.3%", "1", "50.0%", "0", "0.0%"],
        ["(unlabelled)", "0", "0.0%", "0", "0.0%", "1", "100.0%"],
        ["c", "0", "0.0%", "0", "0.0%", "0", "0.0%"],
        ["rarest:", "c", "(0)", "(unlabelled)", "(1)", "a", "(2)"],
    ]
    several = audit.label_counts([["x", "y"], ["y"], []], ["train"] * 3, ())
    assert cells(several)[1:-1] == [["y", "2", "66.7%"], ["x", "1", "33.3%"], ["(no", "label)", "1", "33.3%"]]
    assert audit.label_counts([], [], ()).endswith("rarest: ")


def test_label_counts_of_many_labels_stay_short():
    labels = [i for i in range(300) for _ in range(i + 1)]
    table = audit.label_counts(labels, ["train"] * len(labels), range(300)).splitlines()
    assert len(table) == 43
    assert [line.split()[:2] for line in table[1:21]] == [[str(i), str(i + 1)] for i in range(299, 279, -1)]
    assert table[21] == "(260 more)"
    assert [line.split()[:2] for line in table[22:42]] == [[str(i), str(i + 1)] for i in range(19, -1, -1)]
    assert table[42] == "rarest: 0 (1), 1 (2), 2 (3)"
    wide = audit.label_counts(["a long\nname " * 20, "b"], ["train"] * 2, ())
    assert len(wide.splitlines()) == 4 and max(map(len, wide.splitlines()[:3])) < 60


def test_length_table():
    lengths, splits = np.array([*range(1, 101), 5000, 7]), ["train"] * 100 + ["test"] * 2
    table = audit.length_table(lengths, splits, 90)
    assert table.split("\n")[0].split()[-3:] == ["over", "90", "lost"]
    assert cells(table)[1:] == [
        ["train", "100", "1", "50", "90", "99", "100", "10", f"{sum(range(1, 11)) / 5050:.2%}"],
        ["test", "2", "7", "7", "5000", "5000", "5000", "1", f"{4910 / 5007:.2%}"],
    ]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_warnings_name_rows_and_give_advice():
    long = "Find the largest n for which the sum of the digits of n is prime, and show that there is no larger one."
    rows = [
        ("same", "x", "train"), ("same", "x", "train"), ("same", "x", "train"), ("Same", "y", "validation"),
        (long, "x", "train"), (long + "!", "z", "validation"), ("other", "x", "train"), ("other", None, "test"),
    ]  # fmt: skip
    texts, labels, splits = map(list, zip(*rows, strict=True))
    names = [f"{split}.csv row {i}" for i, split in enumerate(splits)]
    lines = audit.warnings_of(audit.audit(texts, labels, splits), labels, splits, names)
    assert len(lines) == 7
    same, near, conflicts, near_conflicts, leak, test_leak, near_leak = lines
    assert same.startswith("6 rows in 2 groups have the same text: train.csv row 0 (x), validation.csv row 3 (y), ")
    assert "; train.csv row 6 (x), test.csv row 7. Each" in same
    pair = "train.csv row 4 (x), validation.csv row 5 (z)."
    assert near.startswith(f"2 rows in 1 group have nearly the same text: {pair}")
    assert conflicts.startswith("4 rows in 1 group have") and "row 3 (y)" in conflicts
    assert "--drop_conflicts" in conflicts
    assert pair in near_conflicts and "--drop" not in near_conflicts
    for line in (leak, near_leak):
        assert "of train and validation have" in line and "--group_column" in line
    assert "2 rows in 1 group of train and test have the same text: train.csv row 6 (x), test.csv row 7." in test_leak
    assert "--group_column" not in test_leak and "scores of test" in test_leak

    clean = audit.audit(["one", "two"], ["x", "y"], ["train", "test"])
    assert audit.warnings_of(clean, ["x", "y"], ["train", "test"], ["a", "b"]) == []
    many = audit.audit([str(i // 2) for i in range(2000)], [["p", "q"]] * 2000, ["train"] * 2000)
    (line,) = audit.warnings_of(many, [["p", "q"]] * 2000, ["train"] * 2000, [f"row {i}" for i in range(2000)])
    assert line.startswith("2,000 rows in 1,000 groups have the same text: row 0 (p, q), row 1 (p, q); ")
    assert "; and 997 more. " in line and len(line) < 300
