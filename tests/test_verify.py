"""Verification and rules: preflight, time limits, chains."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import forks, toy_flags
from test_slices import BINARY, chain_of, slice_flags, write_pairs

import checkpoint
import ddp
import evaluate
import files
import foreign
import infer
import loop
import predictions
import train
import trained
from errors import Degenerate, UserError

pytestmark = forks


@pytest.fixture(scope="module")
def slices(tmp_path_factory, small_base):
    """(three runs, each on a slice and from the one before; the rows that were cut; the base)."""
    folder = tmp_path_factory.mktemp("slices")
    return chain_of(folder, small_base), folder / "p.jsonl", small_base


# ---- preflight ------------------------------------------------------------------------------------------------------


def test_preflight_stops_what_cannot_be_right_within_seconds(slices, tmp_path, monkeypatch):
    runs, path, base = slices
    rows = files.read_rows(str(path), "x")
    known = predictions.Known(np.arange(len(rows)), (np.arange(len(rows)) % 3 == 0).astype(int))
    good = trained.load_run(runs[-1]["run"])
    assert "preflight of 17 rows: the adapter moves the logits" in evaluate.preflight(good, rows, known, 4096)
    cases = {
        "scores that are not finite": lambda run: run.model.score.weight.fill_(float("nan")),
        "the model ignores its input": lambda run: run.model.score.weight.fill_(0.0),
    }
    for words, spoil in cases.items():
        run = trained.load_run(runs[-1]["run"])
        with torch.no_grad():
            spoil(run)
        started = time.perf_counter()
        with pytest.raises(Degenerate, match=words):
            evaluate.preflight(run, rows, None, 4096)
        assert time.perf_counter() - started < 10
    run = trained.load_run(runs[-1]["run"])
    for name, tensor in run.model.named_parameters():
        if "lora_B" in name:
            tensor.data.zero_()
    with pytest.raises(Degenerate, match="the adapter does not move the logits"):
        evaluate.preflight(run, rows, None, 4096)


def test_an_adapter_of_another_model_is_stopped_before_any_weight_is_loaded(tmp_path, small_base, monkeypatch):
    for adapter, base, wrong in (
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", "/kaggle/input/qwen2.5/transformers/0.5b-instruct/1", False),
        ("/root/base/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B", True),
        ("", "Qwen/Qwen2.5-0.5B", False),
    ):
        named = type("Adapter", (), {"base": adapter})
        assert bool(foreign._base_mismatch(named, base)) == wrong, (adapter, base)


# ---- time limits ----------------------------------------------------------------------------------------------------


def test_a_run_with_a_limit_ends_in_time_whole(tmp_path, small_base, command):
    """The user's command: 25 seconds for what would take half an hour."""
    flags = ["--base", small_base, "--epochs", "2000", "--time_limit", "25s", "--audit", "none", "--max_length", "96"]
    started = time.monotonic()
    status, out, err = command("train.py", *flags, timeout=200)
    seconds = time.monotonic() - started
    assert status == 0, err[-2000:]
    told = json.loads(out.strip().splitlines()[-1])
    assert (
        seconds < 25 + 15
        and "stopped early" in out
        and ("forecast: " in out or told["steps"] < 11)
        and "--time_limit 25s" in out
    )
    run = Path(told["run"])
    assert checkpoint.finished(run) and checkpoint.verify(run / "best")["step"] == told["best_step"] <= told["steps"]
    assert told["metrics"]["rows"] == 400


def test_rows_that_are_not_reached_in_time_get_the_shares_of_the_training_rows(slices, tmp_path, monkeypatch):
    runs, path, _ = slices
    flags = ["--runs", runs[-1]["run"], "--input", str(path), "--submission", "", "--max_tokens", "64", "--force"]
    infer.main([*flags, "--output", str(tmp_path / "all.csv")])
    ticks = iter(range(10**9))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: float(next(ticks)))  # a second passes at every look
    monkeypatch.setattr(loop, "process_seconds", lambda: 0.0)
    told = infer.main([*flags, "--output", str(tmp_path / "some.csv"), "--time_limit", "16s"])
    some, every = (files.read_rows(str(tmp_path / f"{n}.csv"), "x") for n in ("some", "all"))
    left = [r["id"] for r in files.read_rows(str(tmp_path / "some.csv.unscored.csv"), "x")]
    assert 0 < len(left) == told["unscored"] < 90 == len(some) and [r["id"] for r in some] == [r["id"] for r in every]
    prior = json.loads((Path(runs[-1]["run"]) / "labels.json").read_text())["shares"]
    shares = prior  # as they are, not calibrated
    for one, other in zip(some, every, strict=True):
        if one["id"] in left:
            assert [float(one[f"probability_{v}"]) for v in ("False", "True")] == pytest.approx(shares, abs=1e-5)
        else:
            assert float(one["probability_True"]) == pytest.approx(float(other["probability_True"]), abs=1e-5)


def test_partial_gathering_keeps_what_came():
    world = ddp.World(0, 1, torch.device("cpu"))
    found = ddp.gather_rows(world, np.array([2, 0]), np.array([[1.0], [3.0]], np.float32), 4, partial=True)
    assert found[[0, 2], 0].tolist() == [3.0, 1.0] and np.isnan(found[[1, 3]]).all()
    with pytest.raises(AssertionError, match="2 of 4 rows were not scored exactly once"):
        ddp.gather_rows(world, np.array([2, 0]), np.array([[1.0], [3.0]], np.float32), 4)


@pytest.mark.parametrize("text, seconds", [("", 0), ("60s", 60), ("8.5h", 30600), ("90m", 5400), ("1h30m", 5400)])
def test_durations(text, seconds):
    from checks import seconds as read

    assert read(text) == seconds


@pytest.mark.parametrize("text", ["60", "h", "1d", "-5s", "1 h", "8,5h"])
def test_what_is_no_duration_is_refused(text, small_base, tmp_path):
    with pytest.raises(UserError, match="expected a duration like 8.5h, 90m or 60s"):
        train.main([*toy_flags(tmp_path, small_base), "--time_limit", text])


# ---- what a review found --------------------------------------------------------------------------------------------


def killed(job, line):
    raise KeyboardInterrupt("killed")


def test_a_run_that_starts_from_another_does_so_after_a_kill_before_its_first_save_too(slices, tmp_path):
    runs, path, base = slices
    same = {"lr": 1e-12, "head_lr": 1e-12, "init_from": runs[0]["run"]}
    flags = slice_flags(tmp_path, base, 1, path.parent, **same)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "log", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    told = train.main([*flags, "--resume", "auto"])
    ours, theirs = (
        checkpoint.load_tensors(Path(r) / "best/adapter_model.safetensors") for r in (told["run"], runs[0]["run"])
    )
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in theirs)


@pytest.mark.parametrize("how", ["a fold", "another spelling", "a validation file"])
def test_rows_learned_before_are_noticed_however_the_chain_began(how, small_base, tmp_path):
    path, more = write_pairs(tmp_path / "p.jsonl", 60), {}
    first = {
        "a fold": {"folds": 2, "fold": 0},
        "a validation file": {"val_data": write_pairs(tmp_path / "v.jsonl", 70)},
    }.get(how, {})
    if how == "another spelling":
        more = {"train_data": tmp_path / ".." / tmp_path.name / "p.jsonl", "split_seed": 9}
    begun = train.main(
        toy_flags(tmp_path, small_base, train_data=path, val_size=None if first else 0.2, **{**BINARY, **first})
    )
    settings = {**BINARY, "train_data": path, "val_size": 0.3, "init_from": begun["run"], **more}
    with pytest.raises(UserError, match="validation rows of this run were trained on there"):
        train.main(toy_flags(tmp_path, small_base, **settings))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kept": "nope"}, "--kept nope: no field of the text, which has question, solution"),
        ({"budgets": "bdy=5"}, "--budgets bdy: no field of the text"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(changes, words, small_base, tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", 30)
    with pytest.raises(UserError, match=words):
        train.main(toy_flags(tmp_path, small_base, train_data=path, **{**BINARY, **changes}))
