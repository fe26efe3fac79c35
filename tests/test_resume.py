"""Runs that are killed, stopped and resumed end as the one that was never interrupted, to the bit."""

import glob
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from test_ddp import finish, forked, forks, log_of, run_of, shas, start, toy_flags, write_rows

import checkpoint
import loop
import numerics
import train
import trained
from errors import UserError

pytestmark = forks
LONG = {"batch_size": 6, "epochs": 3, "save_every": 3, "eval_every": 5, "micro_batches": 2, "metric": "log_loss"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_base) -> Path:
    """30 steps, never interrupted."""
    run = Path(train.main(toy_flags(tmp_path_factory.mktemp("whole"), small_base, **LONG))["run"])
    assert len(log_of(run)) == 30 + 6
    return run


def lines_at(folder: Path) -> int:
    """Complete lines in the log of the only run."""
    found = glob.glob(f"{folder}/outputs/*/*/run_*/metrics.jsonl")  # which bears folders that are renamed meanwhile
    return Path(found[0]).read_bytes().count(b"\n") if found else 0


def wait_for(folder: Path, lines: int, pid: int) -> bool:
    """Until the log has that many lines; False when the process ended before."""
    end = time.monotonic() + 150
    while lines_at(folder) < lines:
        assert time.monotonic() < end, (folder / "err.0").read_text()
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.001)
    return True


def same(run: Path, whole: Path, name: str = "adapter_model.safetensors") -> None:
    assert log_of(run) == log_of(whole)
    assert shas(run, name) == shas(whole, name) and shas(run, "adapter_config.json") == shas(
        whole, "adapter_config.json"
    )
    for side in ("best", "last"):
        checkpoint.verify(run / side)
    assert (run / "val_predictions.csv").read_bytes() == (whole / "val_predictions.csv").read_bytes()
    results = [json.loads((r / "result.json").read_text()) for r in (run, whole)]
    assert all(results[0][k] == results[1][k] for k in ("metrics", "best_step", "steps", "flops"))


def test_killed_five_times_at_random(whole, tmp_path, small_base):
    rng, kills = random.Random(11), 0
    flags = [*toy_flags(tmp_path, small_base, **LONG), "--resume", "auto"]
    for lines in sorted(rng.sample(range(1, 34), 5)):
        (pid,) = start(train.main, flags, tmp_path)
        if wait_for(tmp_path, lines, pid):
            time.sleep(rng.uniform(0, 0.06))  # into a step, an evaluation or a save
            os.kill(pid, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        out = (tmp_path / "out.0").read_text()
        if kills == 1:
            assert "--resume auto: no unfinished run of this base and dataset; a new one starts" in out
    assert kills >= 4
    status, out, err = forked(train.main, flags, tmp_path)
    assert status == 0 and "resumed at step" in out, out + err
    run = run_of(out)
    assert [p.name for p in run.parent.iterdir()] == ["run_0"]
    same(run, whole)


@pytest.mark.parametrize("side,nth", [("last", 2), ("last", 3), ("best", 3)])
def test_killed_between_the_two_renames_of_a_save(whole, tmp_path, small_base, side, nth):
    """Of the second save: 2 is before the first one moves aside, 3 before the new one comes in."""
    original, seen = checkpoint.fs_rename, []

    def kill(old, new):
        if side in str(new):
            seen.append(new)
            if len(seen) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
        original(old, new)

    flags = toy_flags(tmp_path, small_base, **LONG)
    pids = start(train.main, flags, tmp_path, before=lambda: setattr(checkpoint, "fs_rename", kill))
    status, out, err = finish(pids, tmp_path)
    assert status == -signal.SIGKILL, out + err
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    status, out, err = forked(train.main, [*flags, "--resume", str(run)], tmp_path)
    assert status == 0 and "resumed at step" in out, err
    assert (f"{side} is missing: its last save was interrupted" in err) == (nth == 3)
    same(run, whole)


def test_resumed_on_two_ranks_after_one(whole, tmp_path, small_base):
    flags = [*toy_flags(tmp_path, small_base, **LONG), "--resume", "auto"]
    (pid,) = start(train.main, flags, tmp_path)
    assert wait_for(tmp_path, 14, pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    status, out, err = forked(train.main, flags, tmp_path, ranks=2)
    assert status == 0 and "resumed at step" in out and "2 ranks" in out, err
    same(run_of(out), whole)


def test_resumed_where_auto_would_find_another_precision(tmp_path, small_base, monkeypatch):
    """A killed run goes on in its own precision, to the bit."""
    monkeypatch.setattr(numerics, "_fastest_of_a_cpu", lambda narrow: ("bf16", "as this test says"))
    whole = Path(train.main(toy_flags(tmp_path, small_base, **LONG))["run"])
    due = loop.due
    monkeypatch.setattr(loop, "due", lambda job, every: due(job, every) if job.state.step < 11 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(toy_flags(tmp_path, small_base, **LONG))
    monkeypatch.setattr(loop, "due", due)
    monkeypatch.setattr(numerics, "_fastest_of_a_cpu", lambda narrow: ("fp32", "as this test says"))
    run = whole.with_name("run_1")
    assert checkpoint.load_json(run / "config.json")["precision"] == "bf16"
    train.main(["--resume", str(run)])
    same(run, whole)


def test_sigterm_to_one_of_two_ranks_saves_and_stops_both(whole, tmp_path, small_base):
    flags = toy_flags(tmp_path, small_base, **LONG)
    pids = start(train.main, flags, tmp_path, ranks=2)
    assert wait_for(tmp_path, 8, pids[0])
    os.kill(pids[1], signal.SIGTERM)
    status, out, err = finish(pids, tmp_path)
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert status == 1 and f"continue with --resume {run}" in err and "Traceback" not in err, err
    stopped = checkpoint.verify(run / "last")["step"]
    assert 7 <= stopped < 30 and f"stopped after step {stopped};" in err and not (run / "result.json").exists()
    assert max(line["step"] for line in log_of(run)) == stopped

    # it goes on as it began
    for more, words in (
        (["--lr", "1"], "--lr 1.0 .the run has 0.003."),
        (["--seed", "4", "--epochs", "9"], "--epochs 9 .the run has 3., --seed 4"),
    ):
        kept = [f for pair in zip(flags[::2], flags[1::2], strict=True) if pair[0] not in more[::2] for f in pair]
        with pytest.raises(UserError, match=words):
            train.main([*kept, *more, "--resume", str(run)])
    for name in ("train.csv", "val.csv"):
        shutil.copy(tmp_path / name, tmp_path / f"{name}.kept")
    write_rows(tmp_path / "train.csv", 58, skip=1)
    with pytest.raises(UserError, match="training rows or their tokens changed"):
        train.main(["--resume", str(run)])
    shutil.copy(tmp_path / "train.csv.kept", tmp_path / "train.csv")
    assert checkpoint.verify(run / "last")["step"] == stopped

    status, out, err = forked(train.main, ["--resume", str(run), "--keep", "2"], tmp_path)
    assert status == 0 and f"resumed at step {stopped} of 30" in out, err
    same(run, whole)
    with pytest.raises(UserError, match="this run is finished"):
        train.main(["--resume", str(run)])
    with pytest.raises(UserError, match="not a run folder"):
        train.main(["--resume", str(tmp_path / "outputs")])


def test_whole_base_and_fp16_resume_too(tmp_path, small_base):
    """A trained base is not its own fingerprint; the loss scale and the skipped steps go on."""
    changes = {**LONG, "rank": 0, "alpha": None, "lora_dropout": None, "precision": "fp16", "lr": 1e-2, "epochs": 1}
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    one = Path(train.main(toy_flags(tmp_path / "a", small_base, **changes))["run"])
    flags = [*toy_flags(tmp_path / "b", small_base, **changes), "--resume", "auto"]
    for lines in (5, 9):
        (pid,) = start(train.main, flags, tmp_path / "b")
        assert wait_for(tmp_path / "b", lines, pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    status, out, err = forked(train.main, flags, tmp_path / "b")
    assert status == 0 and "resumed at step" in out, err
    run = run_of(out)
    assert log_of(run) == log_of(one) and shas(run, "model.safetensors") == shas(one, "model.safetensors")
    states = [checkpoint.load_json(r / "last/state.json") for r in (run, one)]
    assert states[0]["scaler"] == states[1]["scaler"] and states[0]["at"]["skipped"] == states[1]["at"]["skipped"]
    assert trained.load_run(run).predict(["What is 2 + 2?"]) == trained.load_run(one).predict(["What is 2 + 2?"])


def test_a_run_whose_saves_are_all_corrupted_never_starts_afresh(whole, tmp_path, command):
    run = tmp_path / "outputs/base/toy/run_0"
    shutil.copytree(whole, run)
    (run / "result.json").unlink()
    for side in ("last", ".last.1"):
        path = run / side / "state.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    status, out, err = command("train.py", "--resume", run, env={"CUDA_VISIBLE_DEVICES": ""})
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 3 and len(error) == 1 and "no save can be trusted" in error[0] and "Traceback" not in err, err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert [p.name for p in run.parent.iterdir()] == ["run_0"]
