"""The generated problem files of the tiny task: reproducible, without repeats, neither trivial nor noise."""

import csv
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "val", "test")


def load_generator():
    spec = importlib.util.spec_from_file_location("make_problems", ROOT / "tiny" / "make_problems.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_problems = load_generator()


@pytest.fixture(scope="module")
def rows():
    files = {}
    for split in SPLITS:
        with open(ROOT / "tiny" / "data" / f"{split}.csv", encoding="utf-8", newline="") as file:
            files[split] = list(csv.DictReader(file))
    return files


def test_regenerating_gives_the_same_bytes(tmp_path):
    make_problems.write_csvs(tmp_path)
    for split in SPLITS:
        name = f"{split}.csv"
        assert (tmp_path / name).read_bytes() == (ROOT / "tiny" / "data" / name).read_bytes(), name


def test_sizes_columns_and_labels(rows):
    assert {split: len(rows[split]) for split in SPLITS} == make_problems.SIZES
    assert list(rows["train"][0]) == list(rows["val"][0]) == ["Question", "label"]
    assert list(rows["test"][0]) == ["id", "Question", "label"]
    assert [row["id"] for row in rows["test"]] == [str(number) for number in range(len(rows["test"]))]
    for split in SPLITS:
        assert {row["label"] for row in rows[split]} == set("01234567")


def test_every_slot_is_filled_and_lengths_fit(rows):
    for split in SPLITS:
        for row in rows[split]:
            text = row["Question"]
            assert "<" not in text and text == text.strip()
            assert text.count("$") % 2 == 0 and text.count("{") == text.count("}")
            assert make_problems.MIN_PARTS <= make_problems.parts(text) <= make_problems.MAX_PARTS


def test_no_text_and_no_core_occurs_twice(rows):
    texts = [make_problems.normalise(row["Question"]) for split in SPLITS for row in rows[split]]
    assert len(texts) == len(set(texts))
    cores = [core for split in make_problems.make_splits().values() for _, _, core in split]
    assert len(cores) == len(set(cores)) == len(texts)


def test_majority_share(rows):
    for split in SPLITS:
        counts = Counter(row["label"] for row in rows[split])
        assert max(counts.values()) / len(rows[split]) <= 0.30


def test_every_class_has_tasks_about_every_setup():
    for name, topic in make_problems.TOPICS.items():
        assert {label for label, _, _ in topic["tasks"]} == set(range(8)), name
    counts = Counter(label for topic in make_problems.TOPICS.values() for label, _, _ in topic["tasks"])
    assert min(counts.values()) >= 20


def test_further_texts_hold_no_held_out_problem(rows, tmp_path):
    out = tmp_path / "text.jsonl"
    make_problems.main(["--text", "3000", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 3000 and all(list(line) == ["text"] for line in lines)
    texts = [make_problems.normalise(line["text"]) for line in lines]
    assert len(set(texts)) == len(texts)
    everything = "\n".join(texts)
    for split in ("val", "test"):
        for row in rows[split]:
            assert make_problems.normalise(row["Question"]) not in everything


def test_linear_baseline_is_neither_perfect_nor_lost(rows):
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline, make_union
    from sklearn.svm import LinearSVC

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    chars = TfidfVectorizer(analyzer="char", ngram_range=(2, 5), sublinear_tf=True)
    model = make_pipeline(make_union(words, chars), LinearSVC(random_state=0))
    model.fit([row["Question"] for row in rows["train"]], [row["label"] for row in rows["train"]])
    score = model.score([row["Question"] for row in rows["val"]], [row["label"] for row in rows["val"]])
    assert 0.60 <= score <= 0.95
