"""A run is resumed on the rows, labels and names that it began with, or refused with the name of what changed."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from conftest import unsealed
from test_cpt import cpt_flags, source  # noqa: F401 (a fixture)
from test_ddp import forks, toy_flags
from test_folds import fork_of

import cpt
import folds
import train
from errors import UserError

pytestmark = forks
SHORT = {"max_steps": 2, "eval_every": 1, "save_every": 1, "audit": "none"}
VAL = "the validation rows or their tokens"
CELLS = "the ids, labels or other cells of the validation rows"


def rewritten(path: Path, change) -> None:
    """Change the rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    rows = change(rows) or rows
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def cell(column: str, value: str, row: int = 3):
    return lambda rows: rows[row].update({column: value})


def rename_label(rows) -> None:
    for row in rows:
        row["label"] = {"7": "9"}.get(row["label"], row["label"])


CHANGES = {  # what changes: (files, change, what is named)
    "a text to judge": (["val.csv"], cell("Question", "What is 1 + 1?"), VAL),
    "a label to judge": (["val.csv"], lambda rows: rows[3].update(label=rows[4]["label"]), VAL),
    "an id to judge": (["val.csv"], cell("id", "new"), CELLS),
    "another column": (["val.csv"], lambda rows: [{**row, "note": "x"} for row in rows], CELLS),
    "fewer rows to judge": (["val.csv"], lambda rows: rows[:-2], VAL),
    "their order": (["val.csv"], lambda rows: rows[::-1], VAL),
    "names of labels": (["val.csv", "train.csv"], rename_label, "the label names"),
    "a text to train on": (["train.csv"], cell("Question", "What is 1 + 1?"), "the training rows or their tokens"),
    "an id to train on": (["train.csv"], cell("id", "new"), "the ids of the training rows"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory, small_base) -> Path:
    """The folder of a run's files, and the run, which wants its end alone."""
    folder = tmp_path_factory.mktemp("begun")
    run = Path(train.main(toy_flags(folder, small_base, **SHORT))["run"])
    (run / "result.json").unlink()
    return folder


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("saved", [True, False])
def test_what_changed_is_named(begun, tmp_path, name, saved):
    """Also where the run was killed before its first save; the files put back, it is continued."""
    run = Path(shutil.copytree(next(begun.glob("outputs/*/*/run_0")), tmp_path / "run"))
    if not saved:
        for save in (*run.glob("best"), *run.glob("last"), *run.glob(".*.1")):
            shutil.rmtree(save)
    names, change, words = CHANGES[name]
    before = {name: (begun / name).read_bytes() for name in names}
    try:
        for path in names:
            rewritten(begun / path, change)
        with pytest.raises(UserError, match=f"{words} changed.* since it began: give it the files") as e:
            train.main(["--resume", str(run)])
        assert "\n" not in str(e.value)
    finally:
        for path, data in before.items():
            (begun / path).write_bytes(data)
    if name == "an id to judge":
        assert train.main(["--resume", str(run)])["steps"] == 2


def test_old_runs_know_their_training_rows_alone(begun, tmp_path):
    run = unsealed(shutil.copytree(next(begun.glob("outputs/*/*/run_0")), tmp_path / "run"))
    (run / "rows.json").unlink()
    before = (begun / "train.csv").read_bytes()
    rewritten(begun / "train.csv", cell("Question", "What is 1 + 1?"))
    with pytest.raises(UserError, match="the training rows or their tokens changed"):
        train.main(["--resume", str(run)])
    (begun / "train.csv").write_bytes(before)
    assert train.main(["--resume", str(run)])["steps"] == 2


def test_a_family_names_what_changed_before_any_of_its_runs_starts(tmp_path, small_base, monkeypatch):
    monkeypatch.setattr(folds, "started", fork_of(tmp_path))
    run = Path(folds.main(toy_flags(tmp_path, small_base, seeds="1,2", **SHORT))["run"])
    (run / "result.json").unlink()
    monkeypatch.setattr(folds, "started", lambda words: pytest.fail("a run was started"))
    rewritten(tmp_path / "val.csv", cell("id", "new"))
    with pytest.raises(UserError, match=f"run_0: {CELLS} changed"):
        folds.main(["--resume", str(run)])
    pool = [str(run / name) for name in ("seed_1", "seed_2")]
    with pytest.raises(UserError, match=f"seed_1: {CELLS} changed"):
        folds.main(["--pool", *pool, "--outputs", str(tmp_path / "pooled")])


@pytest.mark.parametrize("what", ["guard", "held-out"])
def test_cpt_names_the_texts_that_changed(source, tmp_path, what):  # noqa: F811
    papers, guard = tmp_path / "papers.jsonl", tmp_path / "guard.jsonl"
    shutil.copy(source / "papers.jsonl", papers)
    guard.write_text("".join(json.dumps({"text": f"a plain text of {n} words"}) + "\n" for n in range(4)))
    flags = cpt_flags(source, tmp_path, train_data=papers, guard_data=guard, max_steps=2, eval_every=1, save_every=1)
    run = Path(cpt.main(flags)["run"])
    (run / "result.json").unlink()
    guard.write_text(guard.read_text().replace("text of 2", "text of two") if what == "guard" else guard.read_text())
    if what == "held-out":
        lines = papers.read_text().splitlines()
        papers.write_text("\n".join([*lines[:-1], json.dumps({"text": "another text"})]) + "\n")
    with pytest.raises(UserError, match=rf"the (training|{what}) texts or their tokens changed"):
        cpt.main(["--resume", str(run)])
