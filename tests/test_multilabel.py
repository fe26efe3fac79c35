"""Several labels a row, from the files to the predictions: forms of labels, the loss, the split, whole commands."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, last_json, unsealed
from test_ddp import forked, forks, log_of, run_of, toy_flags

import checkpoint
import checks
import configs
import decide
import files
import infer
import labelling
import losses
import metrics
import presets
import strata
import train
import trained
from errors import Untrusted, UserError

pytestmark = forks
NAMES = ("algebra", "geometry", "rare")


def write_rows(path: Path, rows: int = 60, form: str = "json") -> Path:
    """Problems of the tiny data with two labels and a third on every twelfth row; some rows have none."""
    with open(ROOT / "tiny/data/train.csv", encoding="utf-8", newline="") as f:
        found = [r for r, _ in zip(csv.DictReader(f), range(rows), strict=False)]
    out = []
    for i, row in enumerate(found):
        labels = [n for n, on in zip(NAMES, (i % 2, i % 3 == 0, i % 12 == 0), strict=True) if on]
        row = {"id": i, "Question": row["Question"]}
        cells = {"json": {"tags": labels}, "delimited": {"tags": "|".join(labels)}}.get(form)
        out.append({**row, **(cells or {n: int(n in labels) for n in NAMES})})
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in out), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(out[0]))
            writer.writeheader()
            writer.writerows(out)
    return path


def flags_of(out: Path, base: str, path: Path, **changes) -> list[str]:
    of = {"label_columns": ",".join(NAMES)} if "columns" in path.name else {"label_column": "tags"}
    same = {"train_data": path, "task": "multi_label", "val_size": 0.25, "label_smoothing": 0, "class_weights": None}
    return toy_flags(
        out, base, **{**same, "label_names": None, "val_data": None, "metric": "micro_f1", **of, **changes}
    )


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, form", [("a.jsonl", "json"), ("b.csv", "delimited"), ("columns.csv", "columns")])
def test_the_three_forms_of_labels_give_the_same_targets(tmp_path, name, form):
    rows = files.read_rows(str(write_rows(tmp_path / name, form=form)), "train_data")
    columns = NAMES if form == "columns" else ()
    sets = labelling.label_sets(configs.TrainConfig(label_column="tags", label_columns=columns), rows, "x")
    labels = labelling.find_labels([v for one in sets for v in one], columns, "x")
    i = np.arange(60)
    want = np.stack([i % 2, i % 3 == 0, i % 12 == 0], axis=1).astype(np.float32)
    assert labels.values == NAMES and np.array_equal(labelling.encode_label_sets(sets, labels, "x"), want)


@pytest.mark.parametrize(
    "row, columns, words",
    [
        ({"a": "1", "b": "2"}, ("a", "b"), r"\['1', '2'\] in row 1"), ({"a": "yes", "b": "0"}, ("a", "b"), "0 or 1"),
        ({"tags": '["a", 1.5]'}, (), "JSON list"), ({"tags": '["a"'}, (), "row 1"), ({"tags": '[["a"]]'}, (), "row 1"),
    ],
)  # fmt: skip
def test_malformed_labels_are_named(row, columns, words):
    with pytest.raises(UserError, match=words):
        labelling.label_sets(configs.TrainConfig(label_column="tags", label_columns=columns), [row], "--train_data x")
    known = labelling.Labels(("a", "b"), ("a", "b"))
    with pytest.raises(UserError, match=r"unknown labels \(\['c'\] in row 2\): expected some of 'a', 'b'"):
        labelling.encode_label_sets([["a"], ["c"]], known, "--val_data x")


def test_every_part_gets_its_share_of_every_label():
    rng = np.random.default_rng(0)
    targets = (rng.random((3000, 12)) < np.linspace(0.002, 0.4, 12)).astype(np.float32)
    for shares in ([0.85, 0.15], [0.2] * 5):
        part = strata.stratify(targets, shares, seed=1)
        assert set(part) == set(range(len(shares))) and len(part) == 3000
        for p, share in enumerate(shares):
            want = share * targets.sum(axis=0)
            assert (abs(targets[part == p].sum(axis=0) - want) <= np.maximum(1.5, 0.1 * want)).all()
            assert abs((part == p).mean() - share) < 0.02
    assert np.array_equal(strata.stratify(targets, shares, 1), part)
    assert not np.array_equal(strata.stratify(targets, shares, 2), part)


def test_reuters_is_split_by_every_label(shared):
    rows = files.read_rows(str(shared / "data/reuters/train.jsonl"), "train_data")
    sets = labelling.label_sets(configs.TrainConfig(label_column="labels"), rows, "x")
    targets = labelling.encode_label_sets(sets, labelling.find_labels([v for one in sets for v in one]), "x")
    held_out = strata.hold_out("multi_label", targets, 0.15, seed=0)
    assert targets.shape == (7770, 90) and held_out.shape == (7770,)
    counts = targets.sum(axis=0)
    assert (abs(targets[held_out].sum(axis=0) - 0.15 * counts) <= np.maximum(1.0, 0.02 * counts)).all()


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_bce_is_torchs_and_parts_add_up(smoothing, weighted):
    """transformers#40296: label smoothing with several labels fails there."""
    torch.manual_seed(0)
    z, y = torch.randn(9, 4, dtype=torch.float16), (torch.rand(9, 4) < 0.4).float()
    weight = torch.tensor([1.0, 3.0, 0.5, 2.0]) if weighted else None
    want = F.binary_cross_entropy_with_logits(
        z.float(), torch.where(y > 0, 1 - smoothing / 2, smoothing / 2), pos_weight=weight, reduction="sum"
    )
    got = losses.binary_cross_entropy(z, y, smoothing, weight)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert losses.TASKS["multi_label"].weight(y.numpy(), None) == 36
    parts = [losses.binary_cross_entropy(z[i : i + 4], y[i : i + 4], smoothing, weight) for i in (0, 4, 8)]
    torch.testing.assert_close(sum(parts), want, rtol=1e-6, atol=0)


def test_pos_weight_changes_no_denominator():
    y = np.array([[1, 0], [0, 1], [0, 0]], np.float32)
    assert losses.TASKS["multi_label"].weight(y, np.array([5.0, 2.0])) == 6.0


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(small_base, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("multi")
    path = write_rows(out / "rows.jsonl")
    return train.main(flags_of(out, small_base, path, epochs=4, pos_weight="balanced")), path


def test_a_run_is_measured_saved_and_decides(done, small_base):
    result, path = done
    run = Path(result["run"])
    labels = json.loads((run / "labels.json").read_text())
    assert labels["values"] == labels["names"] == list(NAMES)
    assert labels["shares"] == pytest.approx([1 / 2, 1 / 3, 1 / 12])  # what rows get that a time limit leaves out
    assert {"micro_f1", "macro_f1", "weighted_f1", "subset_accuracy", "hamming_loss", "log_loss"} < result[
        "metrics"
    ].keys()
    decision = decide.Decision.from_json((run / "decision.json").read_text())
    assert (decision.task, decision.classes) == ("multi_label", 3) and {"decided", "undecided"} <= result.keys()
    with open(run / "val_predictions.csv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f))
    logits = np.array([[float(r[f"logit_{n}"]) for n in NAMES] for r in rows], np.float32)
    targets = np.array([[n in json.loads(r["label"]) for n in NAMES] for r in rows])
    predicted = np.array([[n in json.loads(r["prediction"]) for n in NAMES] for r in rows])
    assert np.array_equal(predicted, logits > 0) and len(rows) == result["metrics"]["rows"]
    scores = metrics.of_task("multi_label", logits, targets)
    assert scores == pytest.approx({k: result["metrics"][k] for k in scores}, abs=2e-6)
    want = decide.fit_decision("multi_label", logits, targets.astype(int), "global")
    assert want.thresholds == pytest.approx(decision.thresholds, abs=1e-6)


@pytest.mark.parametrize("name", ["out.jsonl", "out.csv"])
def test_predictions_round_trip(done, tmp_path, name):
    """Written by the run's thresholds, read back as labels, and equal to predict() and to plain arithmetic."""
    result, path = done
    flags = ["--runs", result["run"], "--input", str(path), "--output", str(tmp_path / name), "--submission", ""]
    told = infer.main(flags)
    rows = files.read_rows(str(tmp_path / name), "input")
    sets = labelling.label_sets(configs.TrainConfig(label_column="prediction"), rows, "x")
    run = trained.load_run(result["run"])
    source = files.read_rows(str(path), "input")
    found = run.predict([{"Question": r["Question"]} for r in source])
    assert [f["labels"] for f in found] == sets and len(found) == told["rows"] == 60
    logits = np.array([f["logits"] for f in found])
    assert [[n for n, z, t in zip(NAMES, row, run.decision.thresholds, strict=True) if z > t] for row in logits] == sets
    shares = np.array([[float(r[f"probability_{n}"]) for n in NAMES] for r in rows])
    lines = np.array(run.decision.platt)
    np.testing.assert_allclose(shares, 1 / (1 + np.exp(-(logits * lines[:, 0] + lines[:, 1]))), atol=1e-9)
    given = labelling.label_sets(configs.TrainConfig(label_column="tags"), source, "x")
    known = labelling.encode_label_sets(given, run.labels, "x")
    predicted = logits > run.decision.thresholds
    want = metrics.of_task("multi_label", logits.astype(np.float32), known, predicted=predicted)
    assert told["metrics"] == pytest.approx(want, abs=1e-4) and told["undecided"] != told["metrics"]


def test_the_rows_that_are_judged_cannot_influence_thresholds_or_predictions(small_base, tmp_path):
    """Two runs and predictions that differ only in the labels of the held-out file: every byte is the same."""
    known, found = write_rows(tmp_path / "rows.jsonl"), []
    rest = [json.loads(line) for line in open(write_rows(tmp_path / "all.jsonl", rows=100), encoding="utf-8")][60:]
    for number, tags in enumerate((None, ["rare"], [])):
        held_out = tmp_path / f"held_out_{number}.jsonl"
        rows = [{**row, "tags": row["tags"] if tags is None else tags} for row in rest]
        held_out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        run = train.main(flags_of(tmp_path, small_base, known, test_data=held_out, max_steps=9, thresholds="per_class"))
        target = tmp_path / f"{number}.jsonl"
        told = infer.main(["--runs", run["run"], "--submission", "", "--output", str(target)])
        decision = (Path(run["run"]) / "decision.json").read_bytes()
        found.append((decision, target.read_bytes(), told.get("metrics", {}).get("micro_f1")))
    assert found[0][:2] == found[1][:2] == found[2][:2] and len({score for _, _, score in found}) > 1


def test_labels_that_the_run_does_not_know_are_named_and_left_out(done, tmp_path, capsys):
    result, path = done
    rows = [json.loads(line) for line in open(path, encoding="utf-8")]
    rows[3]["tags"].append("novel")
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    told = [
        infer.main(["--runs", result["run"], "--input", str(p), "--output", str(tmp_path / f"{i}.jsonl")])["metrics"]
        for i, p in enumerate((path, tmp_path / "more.jsonl"))
    ]
    assert told[0] == told[1] and "does not know the labels 'novel'" in capsys.readouterr().out


def test_a_threshold_given_by_hand_decides(done, tmp_path):
    result, path = done
    flags = ["--runs", result["run"], "--input", str(path), "--output", str(tmp_path / "o.jsonl"), "--submission", ""]
    infer.main([*flags, "--threshold", "0.3"])
    for row in map(json.loads, open(tmp_path / "o.jsonl", encoding="utf-8")):
        assert row["prediction"] == [n for n in NAMES if row[f"probability_{n}"] > 0.3]
    for value, words in (("1.5", "--threshold 1.5: expected a probability"), ("-0.1", "--threshold -0.1")):
        with pytest.raises(UserError, match=words):
            infer.main([*flags, "--threshold", value])


def test_a_damaged_decision_is_not_trusted(done, tmp_path):
    import shutil

    run = unsealed(shutil.copytree(done[0]["run"], tmp_path / "run"))
    for text in ('{"task": 1}', "", (run / "decision.json").read_text().replace('"classes": 3', '"classes": 2')):
        (run / "decision.json").write_text(text)
        with pytest.raises(Untrusted, match="decision.json"):
            trained.load_run(run)
    (run / "decision.json").unlink()
    assert trained.load_run(run).decision is None


def test_ranks_and_micro_batches_do_not_matter(small_base, tmp_path):
    path, runs = write_rows(tmp_path / "columns.csv", form="columns"), []
    for ranks, tokens in ((1, 512), (2, 512)):
        out = tmp_path / str(ranks)
        out.mkdir()
        status, said, err = forked(train.main, flags_of(out, small_base, path, max_tokens=tokens), out, ranks=ranks)
        assert status == 0, err
        runs.append(run_of(said))
    assert log_of(runs[0]) == log_of(runs[1])
    first, second = (checkpoint.sha256(r / "best/adapter_model.safetensors") for r in runs)
    assert first == second and (runs[0] / "decision.json").read_text() == (runs[1] / "decision.json").read_text()


def test_the_users_command(command, small_base, tmp_path):
    path = write_rows(tmp_path / "rows.csv", form="delimited")
    status, out, err = command("train.py", *flags_of(tmp_path, small_base, path, max_steps=2))
    assert status == 0, err
    run = last_json(out)["run"]
    status, out, err = command("infer.py", "--runs", run, "--input", path, "--output", tmp_path / "s.csv")
    assert status == 0 and (tmp_path / "s.csv").read_text().splitlines()[0] == "id,label", err


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"class_weights": "balanced"}, "--class_weights balanced has no meaning with --task multi_label"),
        ({"head": "label_words"}, "use --head linear"), ({"pos_weight": "-1"}, "--pos_weight -1: expected"),
        ({"pos_weight": "1,2"}, "2 numbers, expected"), ({"metric": "accuracy"}, "--metric accuracy: expected one of"),
        ({"task": "single_label", "pos_weight": "balanced"}, "--pos_weight balanced has no meaning"),
        ({"label_column": "nope"}, "no column nope"), ({"val_size": 100}, "--val_size 100 of 60 rows"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(small_base, tmp_path, changes, words):
    path = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match=words):
        train.main(flags_of(tmp_path, small_base, path, **changes))
    assert not (tmp_path / "outputs").exists()


def test_the_preset_has_the_published_values():
    cfg = presets.TRAIN_PRESETS["llama1b_multilabel"]()
    want = {
        "base": "meta-llama/Llama-3.2-1B", "task": "multi_label", "rank": 2, "alpha": 2.0, "lora_dropout": 0.05,
        "targets": configs.ALL_PROJECTIONS, "quant": "nf4", "max_length": 1024, "lr": 2e-4,
        "weight_decay": 0.01, "batch_size": 32, "epochs": 20, "patience": 2, "metric": "micro_f1",
        "optimizer": "adamw8bit", "keep": 0, "seed": 1,
    }  # fmt: skip
    assert {name: getattr(cfg, name) for name in want} == want
    checks.check(cfg)
