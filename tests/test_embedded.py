"""The embedded default, whole: what the README's first command does and reaches."""

import csv

from conftest import ROOT, last_json


def test_train_and_infer_without_arguments(command, tmp_path):
    """At least 0.75 micro-F1 on validation and test, 5 points above the frozen base with a trained head."""
    status, out, err = command("train.py", timeout=900)
    assert status == 0, err[-2000:]
    ours = last_json(out)["metrics"]["micro_f1"]
    status, out, err = command("infer.py", "--output", tmp_path / "submission.csv")
    assert status == 0, err[-2000:]
    assert last_json(out)["metrics"]["micro_f1"] >= 0.75
    submission = list(csv.reader(open(tmp_path / "submission.csv", newline="")))
    ids = [r["id"] for r in csv.DictReader(open(ROOT / "tiny/data/test.csv", newline="", encoding="utf-8"))]
    assert submission[0] == ["id", "label"] and [r[0] for r in submission[1:]] == ids
    status, out, err = command("train.py", "--rank", "0", "--train_layers", "0", timeout=900)
    assert status == 0, err[-2000:]
    frozen = last_json(out)["metrics"]["micro_f1"]
    assert ours >= 0.75 and ours >= frozen + 0.05
