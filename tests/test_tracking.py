"""The log of a run in TensorBoard and W&B: the numbers of metrics.jsonl, after a resumption too."""

import json
import os
import signal
from pathlib import Path

import pytest
from test_ddp import forked, forks, log_of, run_of, start, toy_flags
from test_resume import wait_for

import checks
import cpt
import train
from errors import UserError

pytestmark = forks


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Name -> step -> value of a run's event files, as TensorBoard itself reads them."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def expected(run: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        step, scores = line.pop("step"), line.pop("eval", None)
        prefix, values = ("eval", scores) if scores else ("train", line)
        for name, value in values.items():
            found.setdefault(f"{prefix}/{name}", {})[step] = value
    return found


def same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        assert got[name].keys() == values.keys(), name
        assert all(got[name][step] == pytest.approx(v, rel=1e-6) for step, v in values.items()), name  # fp32 there


def test_tensorboard_holds_what_the_log_holds(tmp_path, small_base):
    run = Path(train.main(toy_flags(tmp_path, small_base, report="tensorboard"))["run"])
    same(scalars(run), expected(run))


def test_continued_pretraining_is_tracked_too(tmp_path, small_base):
    lines = [json.dumps({"text": f"Let $n={i}$. Twice $n$ is ${2 * i}$, and $n+1={i + 1}$."}) for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines))
    flags = ["--base", small_base, "--train_data", tmp_path / "texts.jsonl", "--outputs", tmp_path / "outputs"]
    flags += ["--epochs", 1, "--batch_size", 8, "--max_length", 64, "--samples", 0, "--report", "tensorboard"]
    run = Path(cpt.main([str(flag) for flag in flags])["run"])
    same(scalars(run), expected(run))


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path, small_base):
    pytest.importorskip("tensorboard")
    flags = [*toy_flags(tmp_path, small_base, report="tensorboard", save_every=3), "--resume", "auto"]
    (pid,) = start(train.main, flags, tmp_path)
    assert wait_for(tmp_path, 9, pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    status, out, err = forked(train.main, flags, tmp_path)
    assert status == 0 and "resumed at step" in out, out + err
    run = run_of(out)
    same(scalars(run), expected(run))
    assert len(log_of(run)) == 18 + 4


def test_wandb_offline_writes_the_run_and_ends(tmp_path, small_base, monkeypatch):
    pytest.importorskip("wandb")
    home = tmp_path / "home"
    home.mkdir()
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DATA_DIR", home), ("CONFIG_DIR", home)):
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    flags = toy_flags(tmp_path, small_base, report="wandb", max_steps=6)
    status, out, err = forked(train.main, flags, tmp_path)
    assert status == 0, out + err
    run = run_of(out)
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    same(logged(file), expected(run))


def logged(file: Path) -> dict[str, dict[int, float]]:
    """Name -> our step -> value of an offline run's file: records in LevelDB's log format behind W&B's 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    raw, at, payload, found = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        payload += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record.FromString(payload)
            payload = b""
            values = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            for name in values.keys() - {"at"}:
                if not name.startswith("_"):
                    found.setdefault(name, {})[int(values["at"])] = values[name]
    return found


def test_what_is_not_installed_is_named_before_anything_starts(monkeypatch, tmp_path, small_base):
    find = checks.importlib.util.find_spec
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None if name == "wandb" else find(name))
    with pytest.raises(UserError, match="--report wandb: not installed: pip install wandb"):
        train.main(toy_flags(tmp_path, small_base, report="wandb"))
    assert not (tmp_path / "outputs").exists()
