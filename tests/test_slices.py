"""slices.py: disjoint, balanced slices and one validation file, the proof of it, and a chain of runs over them."""

import csv
import gzip
import hashlib
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import ROOT, forks, toy_flags

import checkpoint
import files
import slices
import train
from errors import UserError

pytestmark = forks
BINARY = {
    "val_data": None, "label_names": None, "batch_size": 8, "epochs": 1, "eval_every": 100, "audit": "none",
    "text": "{question} Answer: {solution}", "label_column": "is_correct", "lora_dropout": 0, "head_dropout": 0,
}  # fmt: skip


def write_pairs(path: Path, rows: int = 90) -> Path:
    """Questions with solutions, a third of them right; the solution says it, so that it can be learned."""
    with open(ROOT / "tiny/data/train.csv", encoding="utf-8", newline="") as f:
        texts = [r["Question"] for r, _ in zip(csv.DictReader(f), range(rows), strict=False)]
    lines = [
        {"id": f"p{i}", "question": t[:60], "solution": "yes sum" if i % 3 == 0 else "no", "is_correct": i % 3 == 0}
        for i, t in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    return path


def cut(path: Path, output: Path, **settings) -> tuple[dict, dict[str, list[dict]]]:
    """(summary, rows of every written file by its stem)."""
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    summary = slices.main(["--train_data", str(path), "--output", str(output), *flags])
    written = {p.stem: files.read_rows(str(p), "x") for p in output.iterdir() if p.name != "slices.json"}
    return summary, dict(sorted(written.items()))


# ---- what the files hold --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"slices": 3}, {"slice_rows": 16}, {"slice_rows": 20}])
def test_slices_are_disjoint_balanced_and_together_the_pool(tmp_path, sizes):
    path = write_pairs(tmp_path / "p.jsonl")
    settings = {"label_column": "is_correct", "balance": "true", "val_size": 0.2, **sizes}
    summary, written = cut(path, tmp_path / "a", **settings)
    assert {name: len(rows) for name, rows in written.items()} == {
        "slice_0": sizes.get("slice_rows", 16), "slice_1": sizes.get("slice_rows", 16),
        "slice_2": 48 - 2 * sizes.get("slice_rows", 16), "validation": 12,
    }  # fmt: skip
    for rows in written.values():
        assert sum(row["is_correct"] == "True" for row in rows) * 2 == len(rows), "equally many rows of both classes"
    ids = [row["id"] for rows in written.values() for row in rows]
    assert len(set(ids)) == len(ids) == 60 and summary["left_out"] == 30 and summary["shared"] == {"ids": 0}
    assert {row["id"] for row in files.read_rows(str(path), "x") if row["is_correct"] == "True"} <= set(ids)
    again, _ = cut(path, tmp_path / "b", **settings)
    assert {**again, "output": summary["output"]} == summary
    for name in written:
        assert (tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
    other, _ = cut(path, tmp_path / "c", **settings, seed=1)
    assert (tmp_path / "c/validation.jsonl").read_bytes() != (tmp_path / "a/validation.jsonl").read_bytes()


def test_the_validation_file_does_not_depend_on_how_the_rest_is_cut(tmp_path):
    path = write_pairs(tmp_path / "p.jsonl")
    for name, sizes in (("a", {"slices": 2}), ("b", {"slice_rows": 7})):
        cut(path, tmp_path / name, label_column="is_correct", **sizes)
    assert (tmp_path / "a/validation.jsonl").read_bytes() == (tmp_path / "b/validation.jsonl").read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_a_mixed_order_has_each_class_in_every_stretch(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=400, p=[0.6, 0.3, 0.1])
    order = slices.mixed_order(labels, seed)
    assert sorted(order) == list(range(400)) and not np.array_equal(order, slices.mixed_order(labels, seed + 1))
    for start in range(0, 400, 40):
        part = np.bincount(labels[order[start : start + 40]], minlength=3) / 40
        assert np.abs(part - np.bincount(labels) / 400).max() <= 1.5 / 40


@pytest.mark.parametrize("sizes", [{"slices": 3}, {"slice_rows": 900}])
def test_groups_of_the_real_data_are_in_one_file_only(shared, tmp_path, sizes):
    summary, written = cut(
        shared / "data/math_verification/train.jsonl", tmp_path / "s", label_column="is_correct", balance="true",
        group_column="question", text_columns="question,solution", val_size=500, seed=7, **sizes,
    )  # fmt: skip
    assert summary["shared"] == {"ids": 0, "groups": 0, "texts": 0} and summary["slices"] == 3
    for a, b in combinations(written.values(), 2):
        assert not {row["question"] for row in a} & {row["question"] for row in b}
    for name, rows in written.items():
        assert abs(sum(row["is_correct"] == "True" for row in rows) / len(rows) - 0.5) < 0.02, name
        assert name == "validation" or abs(len(rows) - (2984 - 500) / 3) < 8


def test_a_split_of_the_real_data_is_that_of_the_flags_it_replaces(shared, tmp_path):
    """sha256 of the ids that --balance --val_size 500 --split_seed 7 held out and cut before."""
    _, written = cut(
        shared / "data/math_verification/train.jsonl", tmp_path / "s", label_column="is_correct", balance="true",
        val_size=500, seed=7, slice_rows=1000,
    )  # fmt: skip
    found = {
        name: hashlib.sha256(",".join(r["id"] for r in rows).encode()).hexdigest()[:16]
        for name, rows in written.items()
    }
    assert found == BEFORE


BEFORE = {
    "slice_0": "2693630505962c53",
    "slice_1": "09f200910524b365",
    "slice_2": "69e05e75c8d2dcda",
    "validation": "fdff45627658b0e0",
}


# ---- records --------------------------------------------------------------------------------------------------------


def test_records_are_copied_byte_for_byte(tmp_path):
    """Quotes, line breaks in cells and line ends stay; a missing id column is put in front, and a missing last line end
    is added.
    """
    head, tail = b'text,"la""bel"\r\n', b"last,a"
    rows = [
        b'"a, ""quoted"" one",a\r\n',
        b'"two\nlines\r\nhere",b\n',
        b"plain,b\n",
        b"\n",
        "Ü\u2028 ,a\n".encode(),
        tail,
    ]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + head + b"".join(rows))
    flags = {"label_column": 'la"bel', "val_size": 2, "slices": 1}
    _, written = cut(tmp_path / "t.csv", tmp_path / "s", **flags)
    ids = [int(row["id"]) for name in ("slice_0", "validation") for row in written[name]]
    assert sorted(ids) == list(range(5))
    records = [row for row in rows if row != b"\n"]
    for name in ("slice_0", "validation"):
        lines = [b"%d," % int(row["id"]) + records[int(row["id"])].rstrip(b"\n") for row in written[name]]
        data = (tmp_path / "s" / f"{name}.csv").read_bytes()
        assert data.startswith(b"id," + head) and all(line in data for line in lines) and data.endswith(b"\n")
        assert len(data) == len(b"id," + head) + sum(map(len, lines)) + len(lines)


def test_json_lines_keep_their_types_and_get_an_id(tmp_path):
    lines = [f'{{"text": "a\\u00e9", "label": {i % 2}, "more": {{"x": [1.50, null]}}}}' for i in range(8)]
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress("\r\n\n".join(lines).encode()))
    cut(tmp_path / "t.jsonl.gz", tmp_path / "s", slices=2, val_size=0.25)
    found = [line for p in (tmp_path / "s").glob("*.jsonl") for line in p.read_text(encoding="utf-8").splitlines()]
    assert sorted(found) == sorted(f'{{"id": {i}, {line[1:]}' for i, line in enumerate(lines))


def test_parquet_becomes_json_lines(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a\nb"] * 9, "label": [0, 1, 2] * 3}), tmp_path / "t.parquet")
    _, written = cut(tmp_path / "t.parquet", tmp_path / "s", slices=2, val_size=3)
    assert sorted(int(row["id"]) for rows in written.values() for row in rows) == list(range(9))
    assert {(row["text"], row["label"]) for row in written["slice_0"]} <= {("a\nb", str(c)) for c in range(3)}


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_other_tasks_are_cut_too(tmp_path, task):
    rng = np.random.default_rng(0)
    cells = (
        [f"{x:.3f}" for x in rng.random(60)]
        if task == "regression"
        else [["a", "b|a", "", "c"][i % 4] for i in range(60)]
    )
    (tmp_path / "t.csv").write_text("id,label\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells)))
    summary, written = cut(tmp_path / "t.csv", tmp_path / "s", task=task, slices=3, val_size=12)
    assert summary["validation_rows"] == 12 and [len(rows) for rows in written.values()] == [16, 16, 16, 12]
    proof = json.loads((tmp_path / "s/slices.json").read_text())
    if task == "multi_label":
        assert proof["files"]["slice_0.csv"]["labels"]["a"] == sum("a" in row["label"] for row in written["slice_0"])


# ---- the proof ------------------------------------------------------------------------------------------------------


def test_the_proof_counts_what_files_share(tmp_path, capsys):
    lines = [{"id": i, "text": f"T {i // 2}" if i % 2 else f"t  {i // 2} ", "label": i // 2 % 2} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary, written = cut(tmp_path / "t.jsonl", tmp_path / "s", slices=2, val_size=10, text_columns="text")
    proof, out = json.loads((tmp_path / "s/slices.json").read_text()), capsys.readouterr().out
    texts = {name: {row["text"].lower().split()[1] for row in rows} for name, rows in written.items()}
    for pair in proof["pairs"]:
        a, b = (name.split(".")[0] for name in pair["files"])
        assert pair["ids"] == 0 and pair["texts"] == len(texts[a] & texts[b])
    assert len(proof["pairs"]) == 3 and proof["shared"] == summary["shared"]
    assert summary["shared"]["texts"] == max(pair["texts"] for pair in proof["pairs"]) > 0
    for name, about in proof["files"].items():
        path = tmp_path / "s" / name
        assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert about["rows"] == len(written[path.stem]) == sum(about["labels"].values())
        assert f"{name:<18} {about['rows']:>9,} " in out
    assert f"any two files share at most: 0 ids, {summary['shared']['texts']} texts" in out


def test_a_file_that_does_not_hold_its_rows_is_noticed(tmp_path, monkeypatch):
    path = write_pairs(tmp_path / "p.jsonl")
    before = checkpoint.write_atomic
    monkeypatch.setattr(checkpoint, "write_atomic", lambda path, text: before(path, text.replace("yes", "no")))
    with pytest.raises(AssertionError, match="does not hold the rows"):
        cut(path, tmp_path / "s", label_column="is_correct", slices=2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "give one of the two, above 0"),
        ({"slices": 2, "slice_rows": 5}, "--slices 2 --slice_rows 5: give one of the two"),
        ({"slices": -1}, "give one of the two, above 0"),
        ({"slices": 2, "val_size": 0}, "--val_size 0.0: expected a fraction or a count above 0"),
        ({"slices": 2, "task": "regression", "balance": "true"}, "only single_label has classes to balance"),
        ({"slices": 2, "label_column": "no"}, "no column no"),
        ({"slices": 2, "group_column": "no"}, "no column no"),
        ({"slices": 2, "text_columns": "question,no"}, "no column no"),
        ({"slices": 2, "id_column": "is_correct"}, "ids are duplicated"),
        ({"slices": 99}, "--slices 99: there are only 81 rows beside those of the validation file"),
        ({"slices": 2, "output": "full"}, "already exists and is not empty"),
        ({"slices": 2, "output": "full/file"}, "already exists"),
    ],
)
def test_what_cannot_be_cut_is_one_line_and_writes_nothing(tmp_path, monkeypatch, changes, words):
    path = write_pairs(tmp_path / "p.jsonl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    settings = {"label_column": "is_correct", "output": "s", **changes}
    with pytest.raises(UserError, match=words) as e:
        cut(path, Path(settings.pop("output")), **settings)
    assert "\n" not in str(e.value) and not (tmp_path / "s").exists() and (tmp_path / "full/file").read_text() == "x"


def test_the_command(tmp_path):
    path = write_pairs(tmp_path / "p.jsonl")
    flags = ["--train_data", path, "--label_column", "is_correct", "--slices", "2", "--output", tmp_path / "s"]
    start = [sys.executable, ROOT / "slices.py", *flags]
    done = subprocess.run(start, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1])["slices"] == 2, done.stderr
    done = subprocess.run(start, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: --output") and len(done.stderr.splitlines()) == 1


# ---- a chain of runs ------------------------------------------------------------------------------------------------


def chain_of(folder: Path, base: str) -> list[dict]:
    """Three slices of 16 rows, each run from the best save of the one before; results, the first run's first."""
    path, runs = write_pairs(folder / "p.jsonl"), []
    cut(path, folder / "slices", label_column="is_correct", balance="true", slice_rows=16, val_size=0.2)
    for number in range(3):
        before = {"init_from": runs[-1]["run"]} if runs else {}
        runs.append(train.main(slice_flags(folder, base, number, **before)))
    return runs


def slice_flags(folder: Path, base: str, number: int, where: Path | None = None, **changes) -> list[str]:
    cut_to = (where or folder) / "slices"
    data = {"train_data": cut_to / f"slice_{number}.jsonl", "val_data": cut_to / "validation.jsonl"}
    return toy_flags(folder, base, **{**BINARY, **data, **changes})


@pytest.fixture(scope="module")
def chain(tmp_path_factory, small_base):
    folder = tmp_path_factory.mktemp("chain")
    return chain_of(folder, small_base), folder, small_base


def test_a_chain_of_slices_has_the_books_of_one_run(chain):
    runs, folder, _ = chain
    table = runs[-1]["chain"]
    assert [row["train_rows"] for row in table] == [16, 16, 16] and [row["run"] for row in table] == [
        r["run"] for r in runs
    ]
    assert [row["metrics"] for row in table] == [r["metrics"] for r in runs]
    trained = [files.read_rows(str(Path(r["run"]) / "split.csv"), "x") for r in runs]
    ids = [row["id"] for rows in trained for row in rows]
    assert all(row["part"] == "train" for rows in trained for row in rows) and len(set(ids)) == len(ids) == 48
    judges = {row["id"] for row in files.read_rows(str(folder / "slices/validation.jsonl"), "x")}
    assert not judges & set(ids)
    for run in runs:
        assert {row["id"] for row in files.read_rows(str(Path(run["run"]) / "val_predictions.csv"), "x")} == judges


def test_a_run_starts_from_the_best_save_of_the_other(chain, tmp_path):
    runs, folder, base = chain
    same = {"max_steps": 1, "lr": 1e-12, "head_lr": 1e-12, "init_from": runs[0]["run"]}
    result = train.main(slice_flags(tmp_path, base, 1, folder, **same))  # nearly no step: what it starts from is kept
    ours, theirs = (
        checkpoint.load_tensors(Path(r) / "best/adapter_model.safetensors") for r in (result["run"], runs[0]["run"])
    )
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)


def test_a_run_that_does_not_fit_is_no_start(chain, tmp_path):
    runs, folder, base = chain
    with pytest.raises(UserError, match="it does not fit these settings"):
        train.main(slice_flags(tmp_path, base, 1, folder, init_from=runs[0]["run"], rank=2))
    with pytest.raises(UserError, match="it has another task or other labels"):
        train.main(toy_flags(tmp_path, base, init_from=runs[0]["run"]))
