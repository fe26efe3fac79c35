"""Inference as a user runs it, at toy size: order, formats, kept files, and what it refuses."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import forked, forks, toy_flags, write_rows

import checkpoint
import infer
import lora
import train
import trained
from errors import Untrusted, UserError

pytestmark = forks


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, small_base) -> Path:
    folder = tmp_path_factory.mktemp("infer")
    return Path(train.main(toy_flags(folder, small_base, targets="all-linear", lr=1e-2))["run"])


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "new.csv", 31, skip=14)


def read(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return [json.loads(line) for line in f] if path.suffix == ".jsonl" else list(csv.DictReader(f))


def probabilities(record: dict) -> list[float]:
    return [float(record[f"probability_{i}"]) for i in range(8)]


def test_rows_come_in_the_order_of_the_input_in_both_formats(fitted, rows, tmp_path, capsys):
    given = read(rows)
    expected = trained.load_run(fitted).predict([r["Question"] for r in given])
    flags = ["--runs", fitted, "--input", rows, "--submission", ""]
    for name in ("all.csv", "all.jsonl"):
        result = infer.main([str(f) for f in (*flags, "--output", tmp_path / "deep" / name)])
        got = read(tmp_path / "deep" / name)
        assert list(got[0]) == ["id", "prediction", *(f"probability_{i}" for i in range(8))]
        assert [g["id"] for g in got] == [r["id"] for r in given]
        assert [g["prediction"] for g in got] == [e["label"] for e in expected]
        assert [probabilities(g) for g in got] == [e["probabilities"] for e in expected]
        assert result["rows"] == 31 and result["output"].endswith(name) and result["run"] == str(fitted)
        right = np.mean([g["prediction"] == r["label"] for g, r in zip(got, given, strict=True)])
        assert result["metrics"]["accuracy"] == pytest.approx(right, abs=1e-6)
        assert capsys.readouterr().out.strip().endswith(f"wrote 31 predictions to {tmp_path / 'deep' / name}")
    assert len({e["label"] for e in expected}) > 1


def test_named_columns_row_index_limit_and_the_kept_output(fitted, rows, tmp_path, capsys):
    plain = tmp_path / "plain.jsonl"  # neither id nor label
    plain.write_text("".join(json.dumps({"Question": r["Question"]}) + "\n" for r in read(rows)))
    out = tmp_path / "out.csv"
    flags = ["--runs", str(fitted), "--output", str(out)]
    first = infer.main([*flags, "--input", str(plain), "--submission", "row_id, label", "--limit", "9"])
    assert first["rows"] == 9 and "metrics" not in first
    nine = read(out)
    assert list(nine[0]) == ["row_id", "label"] and [r["row_id"] for r in nine] == [str(i) for i in range(9)]
    infer.main([*flags, "--input", str(rows)])
    assert "it is kept as" in capsys.readouterr().out
    assert read(tmp_path / "out.csv.previous") == nine and list(read(out)[0]) == ["id", "label"]
    assert [r["label"] for r in read(out)[:9]] == [r["label"] for r in nine]  # --limit changes no prediction here
    infer.main([*flags, "--input", str(rows), "--overwrite", "true"])
    assert read(tmp_path / "out.csv.previous") == nine


def test_empty_texts_are_scored_with_a_warning(fitted, rows, tmp_path, capsys):
    given = read(rows)
    given[4]["Question"], given[7]["Question"] = "", "  \n"
    with open(tmp_path / "gaps.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, list(given[0]))
        writer.writeheader()
        writer.writerows(given)
    flags = ["--runs", str(fitted), "--input", str(tmp_path / "gaps.csv"), "--output", str(tmp_path / "o.csv")]
    assert infer.main(flags)["rows"] == 31
    assert "warning: 2 rows have an empty text (first: row 5)" in capsys.readouterr().out
    assert [r["id"] for r in read(tmp_path / "o.csv")] == [r["id"] for r in given]


def test_merged_and_on_two_ranks_and_in_small_batches(fitted, rows, tmp_path):
    flags = ["--runs", str(fitted), "--input", str(rows), "--submission", "", "--max_tokens", "200"]
    found = {}
    for name, ranks, more in (("one", 1, []), ("two", 2, []), ("merged", 1, ["--merge", "true"])):
        out = str(tmp_path / f"{name}.csv")
        status, stdout, err = forked(infer.main, [*flags, "--output", out, *more], tmp_path, ranks)
        assert status == 0, err
        result = json.loads(stdout.strip().splitlines()[-1])
        found[name] = [probabilities(r) for r in read(Path(out))], result["metrics"]
    assert found["two"] == found["one"]
    np.testing.assert_allclose(found["merged"][0], found["one"][0], atol=1e-5)
    assert found["merged"][0] != found["one"][0]
    run = trained.load_run(fitted)
    whole, _ = run.logits(read(rows))
    np.testing.assert_allclose(run.logits(read(rows), max_tokens=64)[0], whole, atol=1e-5)
    lora.merge(run.model)
    merged, _ = run.logits(read(rows))
    np.testing.assert_allclose(merged, whole, atol=1e-5)


def test_the_newest_finished_run_is_taken(fitted, rows, tmp_path):
    outputs = tmp_path / "outputs"
    runs = [outputs / "base/toy" / f"run_{i}" for i in range(3)]
    for run in runs:
        shutil.copytree(fitted, run)
    (runs[2] / "result.json").unlink()  # newer, and not finished
    flags = ["--outputs", str(outputs), "--input", str(rows), "--output", str(tmp_path / "o.csv"), "--limit", "3"]
    for newest in (1, 0):
        for i in (0, 1):
            os.utime(runs[i] / "result.json", (1000 + (i == newest), 1000 + (i == newest)))
        assert infer.main(flags)["run"] == str(runs[newest])
    shutil.rmtree(outputs)
    with pytest.raises(UserError, match="no finished run"):
        infer.main(flags)


def test_degenerate_scores_are_not_written_unless_forced(fitted, rows, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    manifest = checkpoint.verify(run / "best")
    tensors = checkpoint.load_tensors(run / "best/adapter_model.safetensors")
    tensors["base_model.model.score.weight"].zero_()
    checkpoint.save_tensors(run / "best/adapter_model.safetensors", tensors)
    flags = ["--runs", str(run), "--input", str(rows), "--output", str(tmp_path / "o.csv")]
    with pytest.raises(Untrusted):  # not sealed: the fallback or nothing, never the changed file
        shutil.rmtree(run / ".best.1", ignore_errors=True)
        infer.main(flags)
    checkpoint.seal(run / "best", {k: manifest[k] for k in ("step", "base", "versions")})
    status, out, err = forked(infer.main, flags, tmp_path)
    assert status == 5 and err.startswith("error: ") and err.count("\n") == 1 and "--force" in err
    assert not (tmp_path / "o.csv").exists()
    status, out, err = forked(infer.main, [*flags, "--force", "true"], tmp_path)
    assert status == 0 and len(read(tmp_path / "o.csv")) == 31, err


def test_a_run_whose_base_was_swapped_is_refused(tmp_path, small_base, rows):
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    run = train.main(toy_flags(tmp_path, str(base), max_steps=2, eval_every=2))["run"]
    flags = ["--runs", run, "--input", str(rows), "--output", str(tmp_path / "o.csv")]
    infer.main(flags)
    tensors = checkpoint.load_tensors(base / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    other = {n: torch.randn(t.shape, generator=generator) * 0.02 for n, t in tensors.items()}
    checkpoint.save_tensors(base / "model.safetensors", other)
    (tmp_path / "o.csv").unlink()
    status, out, err = forked(infer.main, flags, tmp_path)
    assert status == 3 and err.startswith("error: base ") and "not the one this run was trained on" in err, err
    assert err.count("\n") == 1 and not (tmp_path / "o.csv").exists()
    shutil.copytree(small_base, base, dirs_exist_ok=True)
    infer.main(flags)


def test_a_broken_best_falls_back_with_a_warning(fitted, rows, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(fitted, run)
    shutil.rmtree(run / ".best.1", ignore_errors=True)
    shutil.copytree(run / "best", run / ".best.1")
    path = run / "best/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    flags = ["--runs", str(run), "--input", str(rows), "--output", str(tmp_path / "o.csv")]
    assert infer.main(flags)["rows"] == 31
    assert "falling back to the save before it" in capsys.readouterr().err


def test_a_missing_id_never_becomes_that_of_another_row(fitted, tmp_path, capsys):
    """JSON lines of which some have no id are refused, the first one too; empty ids are counted."""
    flags = ["--runs", str(fitted), "--input", str(tmp_path / "new.jsonl"), "--output", str(tmp_path / "o.csv")]
    for lacking in (0, 1):
        rows = [{"id": i, "Question": f"text {i}", "label": "x"} for i in (1, 2, 0)]
        del rows[lacking]["id"]
        (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for more in ([], ["--id_column", "id"], ["--submission", ""]):
            with pytest.raises(UserError, match="no column id"):
                infer.main([*flags, *more])
        with pytest.raises(UserError, match="no column id"):
            train.main(["--train_data", str(tmp_path / "new.jsonl")])
    rows = [{"id": cell, "Question": f"text {cell!r}"} for cell in ("7", "", None, " ", "0", "7")]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    infer.main(flags)
    assert "warning: column id: 3 ids are empty, 2 are duplicated" in capsys.readouterr().out
    assert [row["id"] for row in read(tmp_path / "o.csv")] == ["7", "", "", " ", "0", "7"]


def test_many_values_of_a_column_are_not_a_wall_of_lines(fitted, rows, tmp_path, capsys):
    """At most 20 lines, all in the result, and a warning that so few rows say little; a column of two is as ever."""
    flags = ["--runs", str(fitted), "--output", str(tmp_path / "o.csv")]
    result = infer.main([*flags, "--input", str(rows), "--by_column", "id"])
    out = capsys.readouterr().out
    assert sum(line.startswith("id ") for line in out.splitlines()) == 20 and len(result["by_column"]) == 31
    assert "id: and 11 more values, in the result" in out
    assert "warning: 31 of 31 values of id have fewer than 10 rows" in out
    with open(tmp_path / "two.csv", "w", newline="") as f:
        table = csv.DictWriter(f, ["id", "Question", "label", "rule"])
        table.writeheader()
        table.writerows({**row, "rule": "ab"[i % 2]} for i, row in enumerate(read(rows)))
    infer.main([*flags, "--input", str(tmp_path / "two.csv"), "--by_column", "rule"])
    out = capsys.readouterr().out
    assert "more values" not in out and "below 10" not in out


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_whose_probability_a_submission_holds_is_stated(suffix, small_base, tmp_path, capsys):
    """The second class is not always the one that a competition means."""
    text = "".join(f"{i},text {i},{'real fake'.split()[i % 2]}\n" for i in range(40))
    (tmp_path / "rows.csv").write_text("id,q,label\n" + text)
    flags = ["--train_data", tmp_path / "rows.csv", "--base", small_base, "--outputs", tmp_path, "--max_steps", "1"]
    run = train.main([str(flag) for flag in (*flags, "--text", "{q}", "--metric", "roc_auc")])["run"]
    flags = ["--runs", run, "--input", str(tmp_path / "rows.csv"), "--output", str(tmp_path / f"o.{suffix}")]
    for header, answer in (("id,label", "auto"), ("id,target", "probability"), ("id,label", "label"), ("", "auto")):
        infer.main([*flags, "--force", "--submission", header, *(["--answer", answer] if header else [])])
        column = header.partition(",")[2]
        stated = f"column {column} holds the probability of real" in capsys.readouterr().out
        assert stated == (bool(header) and answer != "label")


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--runs", "RUN", "--input", "absent.csv"], "no such file"),
        (["--runs", "nowhere"], "nowhere"),
        (["--runs", "RUN", "--submission", "a,b,c"], "two column names"),
        (["--runs", "RUN", "--output", "x.parquet"], "expected a name that ends"),
        (["--runs", "RUN"], "names no test_data"),
        (["--runs", "RUN", "--inputs", "x"], "did you mean --input"),
    ],
)
def test_mistakes(fitted, flags, words):
    with pytest.raises(UserError, match=words):
        infer.main([f.replace("RUN", str(fitted)) for f in flags])


def test_the_command_itself(fitted, rows, tmp_path, command):
    status, out, err = command(
        "infer.py", "--runs", fitted, "--input", rows, "--output", tmp_path / "o.csv", env={"CUDA_VISIBLE_DEVICES": ""}
    )
    assert status == 0, err
    result = json.loads(out.strip().splitlines()[-1])
    assert set(result) >= {"run", "rows", "output", "metrics"} and len(read(tmp_path / "o.csv")) == 31
