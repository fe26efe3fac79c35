"""Training as a user runs it, at toy size: what a run leaves, where it loads, and how it ends when it fails."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import forked, forks, log_of, toy_flags, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import checkpoint
import infer
import loop
import metrics
import optim
import train
import trained
from errors import UserError

pytestmark = forks
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "manifest.json"} | TOKENIZER
RUN = {
    "config.json",
    "labels.json",
    "environment.json",
    "audit.json",
    "split.csv",
    "metrics.jsonl",
    "val_predictions.csv",
    "result.json",
    "decision.json",
    "rows.json",
    "seal.json",
}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def rows_of(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def no_dropout(folder, base, **changes) -> list[str]:
    return toy_flags(folder, base, **{"lora_dropout": 0, "head_dropout": 0, "max_steps": 4, "eval_every": 2, **changes})


# ---- what a run leaves ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory, small_base) -> tuple[dict, list[dict], Path]:
    """The toy run through the launcher: its last line, its validation rows, and its folder."""
    folder = tmp_path_factory.mktemp("train")
    status, out, err = forked(train.main, toy_flags(folder, small_base, save_every=4), folder)
    assert status == 0, err
    assert "100%" in err and "18/18" in err  # the bar is on stderr
    result = json.loads(out.strip().splitlines()[-1])
    return result, rows_of(folder / "val.csv"), Path(result["run"])


def test_files_of_a_run_and_its_last_line(done):
    result, _, run = done
    assert run.parent.name == "toy" and run.name == "run_0"
    assert names(run) == RUN | {"best", "last", ".last.1", *(p.name for p in run.glob(".best.1"))}
    assert names(run / "best") == ADAPTER and names(run / "last") == ADAPTER | {"state.safetensors", "state.json"}
    for side in ("best", "last"):
        assert set(checkpoint.verify(run / side)) == {"step", "best", "run", "base", "versions", "files"}
    assert (
        checkpoint.verify(run / "last")["step"] == 18 and checkpoint.verify(run / "best")["step"] == result["best_step"]
    )
    assert set(result) >= {
        "run", "metrics", "steps", "examples_per_second", "tokens_per_second", "peak_memory_gb", "flops",
        "train_seconds", "eval_seconds",
    }  # fmt: skip
    assert result["steps"] == 18 and json.loads((run / "result.json").read_text()) == result
    assert set(result["metrics"]) >= {"accuracy", "micro_f1", "macro_f1", "log_loss", "rows"}
    assert set(json.loads((run / "environment.json").read_text())) >= {"torch", "transformers", "commit", "threads"}
    assert json.loads((run / "labels.json").read_text())["values"] == [str(i) for i in range(8)]


def test_lines_of_the_log(done):
    _, _, run = done
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, evals = [x for x in lines if "eval" not in x], [x for x in lines if "eval" in x]
    assert [x["step"] for x in steps] == list(range(1, 19)) and [x["step"] for x in evals] == [5, 10, 15, 18]
    for line in steps:
        assert set(line) == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", "skipped", "seconds"}
    assert all(set(x) == {"step", "eval"} and x["eval"]["rows"] == 23 for x in evals)
    assert steps[8]["epoch"] == 1.0 and steps[-1]["epoch"] == 2.0
    assert all(
        a["tokens"] < b["tokens"] and a["seconds"] <= b["seconds"] for a, b in zip(steps, steps[1:], strict=False)
    )
    best = max(x["eval"]["micro_f1"] for x in evals)
    first = next(x for x in evals if x["eval"]["micro_f1"] == best)
    assert json.loads((run / "result.json").read_text())["best_step"] == first["step"]


def test_validation_predictions_are_those_of_the_loaded_run_bit_for_bit(done):
    result, val, run = done
    rows = rows_of(run / "val_predictions.csv")
    assert list(rows[0]) == ["id", "label", "prediction", *(f"logit_{i}" for i in range(8))]
    assert [(r["id"], r["label"]) for r in rows] == [(v["id"], v["label"]) for v in val]
    saved = np.array([[float(r[f"logit_{i}"]) for i in range(8)] for r in rows], dtype=np.float32)
    loaded = trained.load_run(run)
    live, _ = loaded.logits(val, max_tokens=256)
    assert np.array_equal(saved, live) and len(np.unique(saved, axis=0)) > 20
    assert [r["prediction"] for r in rows] == [str(z.argmax()) for z in saved]
    accuracy = float(np.mean([r["label"] == r["prediction"] for r in rows]))
    assert result["metrics"]["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    one = loaded.predict([val[3]["Question"]])[0]
    assert one["label"] == rows[3]["prediction"] and np.allclose(one["logits"], saved[3], atol=2e-6)
    assert sum(one["probabilities"]) == pytest.approx(1) and loaded.predict([]) == []


# ---- the base itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1, -1])
def test_without_adapter_the_base_is_trained_saved_and_loads_in_transformers(tmp_path, small_base, layers):
    flags = toy_flags(
        tmp_path,
        small_base,
        rank=0,
        train_layers=layers,
        lr=1e-2,
        max_steps=4,
        eval_every=2,
        alpha=None,
        lora_dropout=None,
    )
    run = Path(train.main(flags)["run"])
    assert names(run / "best") == {"model.safetensors", "config.json", "manifest.json"} | TOKENIZER
    val = rows_of(tmp_path / "val.csv")
    loaded = trained.load_run(run)
    live, _ = loaded.logits(val, max_tokens=256)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(run / "best", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.id2label == {i: str(i) for i in range(8)} and not theirs.training
    tokenizer = AutoTokenizer.from_pretrained(run / "best")
    with torch.no_grad():
        for row, logits in zip(val[:8], live, strict=False):
            ids = torch.tensor([tokenizer(row["Question"])["input_ids"][:64]])
            np.testing.assert_allclose(theirs(input_ids=ids).logits[0].numpy(), logits, atol=2e-6)
    whole = trained.models.load_classifier(small_base, trained.models.Head(8), torch.device("cpu"), torch.float32)
    before = whole.backbone.state_dict()
    after = checkpoint.load_tensors(run / "best/model.safetensors")
    changed = {n for n, t in before.items() if not torch.equal(t, after[f"model.{n}"])}
    used = {n for n in before if not n.endswith("k_proj.bias")}  # a key bias has no gradient but rounding
    wanted = {0: set(), 1: {n for n in used if n.startswith(("layers.1.", "norm."))}, -1: used}[layers]
    assert wanted <= changed and (layers == -1 or all(n.startswith(("layers.1.", "norm.")) for n in changed))


# ---- soft targets ---------------------------------------------------------------------------------------------------


def test_a_student_learns_from_the_probabilities_that_infer_writes(tmp_path, small_base):
    """Distillation: predictions with probability columns, beside the labels, are soft targets; some rows have none."""
    rows = rows_of(write_rows(tmp_path / "rows.csv", 40))
    teacher = train.main(no_dropout(tmp_path, small_base, lr=1e-2))["run"]
    infer.main(["--runs", teacher, "--input", str(tmp_path / "rows.csv"), "--output", str(tmp_path / "p.csv"),
                "--submission", ""])  # fmt: skip
    predictions = rows_of(tmp_path / "p.csv")
    names = [name for name in predictions[0] if name.startswith("probability_")]
    assert len(names) == 8 and [r["id"] for r in predictions] == [r["id"] for r in rows]
    for i, (row, predicted) in enumerate(zip(rows, predictions, strict=True)):
        row.update({name: predicted[name] if i % 5 else "" for name in names})
    taught = tmp_path / "taught.csv"
    with open(taught, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    losses = {}
    for share in (None, 0.0, 0.5, 1.0):
        data = tmp_path / "rows.csv" if share is None else taught
        flags = no_dropout(tmp_path, small_base, train_data=data, soft_share=share, soft_temperature=2.0)
        run = Path(train.main(flags)["run"])
        losses[share] = [x["loss"] for x in log_of(run) if "loss" in x]
    np.testing.assert_allclose(losses[0.0], losses[None], rtol=1e-6)
    assert abs(losses[1.0][0] - losses[None][0]) > 1e-3
    assert losses[0.5][0] == pytest.approx((losses[0.0][0] + losses[1.0][0]) / 2, rel=1e-5)


# ---- switches -------------------------------------------------------------------------------------------------------


def test_patience_and_eval_rows(tmp_path, small_base):
    flags = toy_flags(tmp_path, small_base, patience=2, eval_every=1, eval_rows=9, lr=1e-9, epochs=5)
    result = train.main(flags)
    run = Path(result["run"])
    evals = [x["eval"] for x in log_of(run) if "eval" in x]
    assert result["steps"] == 3 and len(evals) == 3  # the first is the best, two more are not better
    assert all(e["rows"] == 9 for e in evals) and result["metrics"]["rows"] == 23
    assert result["best_step"] == 1 and len(rows_of(run / "val_predictions.csv")) == 23


def test_what_ended_a_run_is_known_when_it_is_resumed_for_its_end(tmp_path, small_base, monkeypatch):
    """Killed after its last save and before result.json: the process that writes the result did not see the clock."""
    flags = toy_flags(tmp_path, small_base)
    monkeypatch.setattr(loop.Limit, "over", lambda limit, state: state.step == 2)
    first = train.main(flags)
    assert (first["ended_by"], first["steps"]) == ("time_limit", 3)
    monkeypatch.undo()
    (Path(first["run"]) / "result.json").unlink()
    again = train.main([*flags, "--resume", "auto"])
    assert (again["ended_by"], again["steps"], again["metrics"]) == ("time_limit", 3, first["metrics"])


def test_dry_run_prints_the_plan_and_leaves_nothing(tmp_path, small_base, capsys):
    result = train.main(toy_flags(tmp_path, small_base, dry_run="true"))
    out = capsys.readouterr().out
    for words in ("58 rows", "plan: 18 steps of 7 rows", "memory: about", "time: about", "trainable"):
        assert words in out, words
    assert not (tmp_path / "outputs").exists()
    assert result["run"] is None and result["steps"] == 18 and result["memory_gb"] > 0 and result["train_seconds"] > 0


@pytest.mark.parametrize("changes", [{"warmup_steps": 18}, {"warmup_steps": 500}, {"warmup_ratio": 0.999}])
def test_a_warmup_as_long_as_the_run_is_reported_before_it(tmp_path, small_base, capsys, changes):
    train.main(toy_flags(tmp_path, small_base, dry_run="true", **changes))
    out = capsys.readouterr().out
    assert "warning: the warm-up of" in out and "--lr 0.003" in out
    train.main(toy_flags(tmp_path, small_base, dry_run="true", warmup_steps=17))
    assert "warning: the warm-up of" not in capsys.readouterr().out


def scale_from(monkeypatch, start: float) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda d, enabled: scaler(d, enabled=enabled, init_scale=start))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_fp32_masters(tmp_path, small_base, precision, monkeypatch):
    scale_from(monkeypatch, 2.0**8)  # low enough that no step is skipped
    run = Path(train.main(no_dropout(tmp_path, small_base, lr=1e-4, precision=precision))["run"])
    losses = [x["loss"] for x in log_of(run) if "loss" in x]
    other = Path(train.main(no_dropout(tmp_path, small_base, lr=1e-4))["run"])
    exact = [x["loss"] for x in log_of(other) if "loss" in x]
    assert losses != exact and np.allclose(losses, exact, atol=0.01)  # the same course, rounded
    assert all(
        t.dtype == torch.float32 for t in checkpoint.load_tensors(run / "last/adapter_model.safetensors").values()
    )
    scaler = json.loads((run / "last/state.json").read_text())["scaler"]
    assert bool(scaler) == (precision == "fp16")


def test_fp16_goes_on_after_an_overflow_that_scaling_can_help(tmp_path, small_base, monkeypatch):
    scale_from(monkeypatch, 2.0**22)
    result = train.main(no_dropout(tmp_path, small_base, precision="fp16", max_steps=18, schedule="linear"))
    steps = [x for x in log_of(Path(result["run"])) if "loss" in x]
    before = [0, *(x["skipped"] for x in steps)]
    taken = [x for x, n in zip(steps, before, strict=False) if x["skipped"] == n]
    assert 0 < len(taken) == 18 - steps[-1]["skipped"] < 18 and np.isfinite([x["grad_norm"] for x in taken]).all()
    schedule = [3e-3 * optim.lr_factor(n, 18, 2, "linear") for n in range(len(taken))]
    assert [x["lr"] for x in taken] == schedule  # it counts the updates that were taken


def test_recomputed_activations_give_the_same_losses(tmp_path, small_base):
    runs = [Path(train.main(toy_flags(tmp_path, small_base, max_steps=4, grad_checkpoint=g))["run"]) for g in (0, 1)]
    logs = [[x["loss"] for x in log_of(r) if "loss" in x] for r in runs]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert json.loads((runs[1] / "config.json").read_text())["grad_checkpoint"] is True


# ---- how runs fail --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"eval_every": 5}, {"eval_every": 1}, {"rank": 0, "alpha": None, "lora_dropout": None, "eval_every": 1}]
)
def test_numbers_that_are_not_finite_end_with_status_4(tmp_path, small_base, changes):
    status, out, err = forked(train.main, toy_flags(tmp_path, small_base, lr=1e30, **changes), tmp_path)
    assert status == 4
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and "Traceback" not in err, err
    assert "not finite" in error[0] and ("layer " in error[0] or "largest activation" in error[0])
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert not (run / "result.json").exists() and not list(run.glob(".*.new"))


def test_a_base_with_an_infinite_weight_is_named_by_its_layer(tmp_path, small_base):
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    tensors = checkpoint.load_tensors(base / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    checkpoint.save_tensors(base / "model.safetensors", tensors)
    with pytest.raises(UserError, match=r"hold NaN or infinity \(model.layers.1.mlp.down_proj.weight\)"):
        train.main(toy_flags(tmp_path, str(base), max_steps=2))


@pytest.mark.parametrize("side,part", [("best", "save_tensors"), ("last", "seal"), ("best", "fs_rename")])
def test_a_failing_save_leaves_no_half_written_one(tmp_path, small_base, monkeypatch, side, part):
    original, count = getattr(checkpoint, part), []

    def fail(path, *args, **kwargs):
        if side in str(path):
            count.append(path)
            if len(count) == 3:  # the second or third save of that side
                raise OSError(28, "No space left on device")
        return original(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint, part, fail)
    monkeypatch.setattr(metrics, "better", lambda *a: True)  # every evaluation saves best/
    flags = toy_flags(tmp_path, small_base, eval_every=1, save_every=1, max_steps=5)
    with pytest.raises(OSError, match="No space"):
        train.main(flags)
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    saves = {p.name for p in run.iterdir() if p.is_dir()}
    assert saves <= {"best", "last", ".best.1", ".last.1"} and {"best", "last"} <= saves | {side}
    for name in saves:
        checkpoint.verify(run / name)
    monkeypatch.setattr(checkpoint, part, original)
    assert Path(train.main([*flags, "--resume", str(run)])["run"]) == run  # with room again it goes on


def test_mistakes_are_told_before_a_run_folder_is_made(tmp_path, small_base):
    for base, changes, words in (
        (small_base, {"train_layers": 9, "rank": 0, "alpha": None, "lora_dropout": None}, "this base has 2 layers"),
        (small_base, {"targets": "q_prj"}, "matches no module"),
        (small_base, {"class_weights": "1,2"}, "expected one for each of 8"),
        (tmp_path / "nowhere", {}, "no such folder"),
    ):
        with pytest.raises(UserError, match=words):
            train.main(toy_flags(tmp_path, base, **changes))
    assert not (tmp_path / "outputs").exists()
