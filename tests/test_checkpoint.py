"""Saves that survive death and full disks at every moment, and corruption that is always seen."""

import errno
import json
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch

import checkpoint
import disk
import seals
from checkpoint import verify
from errors import Untrusted, UserError

EVENTS = ("fs_write", "fs_sync", "fs_rename", "fs_remove", "save_file")


# ---- a toy save -----------------------------------------------------------------------------------------------------


def put(target, step: int, keep: int = 1) -> None:
    def write(folder):
        checkpoint.save_tensors(folder / "adapter_model.safetensors", {"a": torch.full((40,), float(step))})
        checkpoint.save_tensors(folder / "state.safetensors", {"m": torch.full((8,), -float(step))})
        checkpoint.save_json(folder / "state.json", {"step": step})
        (folder / "tokenizer.json").write_text(f"words of step {step}")

    checkpoint.save(target, write, {"step": step, "base": {"hidden_size": 32}}, keep)


def trusted(target):
    """The folder of the newest save that verifies."""
    save = checkpoint.trusted(target)
    assert save is None or save.manifest == verify(save.folder)
    return save and save.folder


def step_of(folder) -> int | None:
    """The one step that every file of a save belongs to."""
    if folder is None:
        return None
    found = {
        verify(folder)["step"],
        checkpoint.load_json(folder / "state.json")["step"],
        int(checkpoint.load_tensors(folder / "adapter_model.safetensors")["a"][0]),
        -int(checkpoint.load_tensors(folder / "state.safetensors")["m"][0]),
        int((folder / "tokenizer.json").read_text().split()[-1]),
    }
    assert len(found) == 1, found
    return found.pop()


def interrupt(patch, at: int, how: str, act) -> list[str]:
    """Let `act` happen at the at-th file-system event: before it, or after half of it. Returns the events seen."""
    seen = []

    def half(name, args):
        if name in ("fs_write", "save_file"):
            path = args[0] if name == "fs_write" else args[1]
            originals[name](*args)
            os.truncate(path, os.path.getsize(path) // 2)
        elif name == "fs_remove" and args[0].is_dir():
            sorted(args[0].iterdir())[0].unlink()

    def wrap(name):
        def hooked(*args, **kwargs):
            seen.append(name)
            if len(seen) == at:
                if how == "half":
                    half(name, args)
                act()
            return originals[name](*args, **kwargs)

        return hooked

    originals = {name: getattr(checkpoint, name) for name in EVENTS}
    for name in EVENTS:
        patch.setattr(checkpoint, name, wrap(name))
        patch.setattr(disk, name, wrap(name), raising=False)  # write_atomic's
    return seen


HISTORIES = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 3)]  # (keep, saves made before)


def past(folder, keep: int, saves: int):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for step in range(1, saves + 1):
        put(folder / "last", step, keep)
    return folder / "last"


def count_events(folder, keep, saves) -> int:
    target = past(folder, keep, saves)
    with pytest.MonkeyPatch.context() as patch:
        seen = interrupt(patch, -1, "before", None)
        put(target, saves + 1, keep)
    assert {"fs_write", "fs_sync", "fs_rename", "save_file"} <= set(seen)
    return len(seen)


@pytest.mark.parametrize("keep,saves", HISTORIES)
def test_a_save_killed_at_any_event_leaves_the_old_or_the_new_one(tmp_path, keep, saves, capsys):
    old, new, outcomes = saves or None, saves + 1, set()
    for at in range(1, count_events(tmp_path / "run", keep, saves) + 1):
        for how in ("before", "half"):
            target = past(tmp_path / "run", keep, saves)
            pid = os.fork()
            if pid == 0:
                try:
                    patch = pytest.MonkeyPatch()
                    interrupt(patch, at, how, lambda: os.kill(os.getpid(), signal.SIGKILL))
                    put(target, new, keep)
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            found = step_of(trusted(target))
            assert found in (old, new), (at, how, found)
            outcomes.add(found)
            put(target, new + 1, keep)  # and the next save clears up
            assert step_of(trusted(target)) == new + 1 and trusted(target) == target
            assert not list(target.parent.glob(".*.tmp"))
    assert outcomes == {old, new}


@pytest.mark.parametrize("keep,saves", HISTORIES)
def test_a_save_that_runs_out_of_disk_at_any_event_keeps_the_old_one(tmp_path, keep, saves, capsys):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    old, new = saves or None, saves + 1
    for at in range(1, count_events(tmp_path / "run", keep, saves) + 1):
        for how in ("before", "half"):
            target = past(tmp_path / "run", keep, saves)
            capsys.readouterr()
            with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
                interrupt(patch, at, how, full)
                put(target, new, keep)
            found = trusted(target)
            assert step_of(found) in (old, new) and found in (None, target), (at, how)
            assert capsys.readouterr().err == ""  # no falling back
            hidden = {p.name for p in target.parent.iterdir()} - {
                "last",
                *(f".last.{i}" for i in range(1, max(keep, 1) + 1)),
            }
            assert not hidden, (at, how, hidden)
            if step_of(found) == new:  # only what follows the publishing rename failed
                assert at >= count_events(tmp_path / "again", keep, saves) - (1 if keep or not saves else 2)


def test_an_exception_of_the_writer_leaves_nothing(tmp_path):
    put(tmp_path / "best", 1)

    def write(folder):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "best", write, {})
    assert [p.name for p in tmp_path.iterdir()] == ["best"] and step_of(trusted(tmp_path / "best")) == 1


@pytest.mark.parametrize("keep,kept", [(0, set()), (1, {4}), (2, {3, 4})])
def test_keep_is_the_number_of_fallbacks(tmp_path, keep, kept):
    for step in range(1, 6):
        put(tmp_path / "last", step, keep)
    assert {step_of(p) for p in tmp_path.glob(".last.*")} == kept
    assert step_of(tmp_path / "last") == 5
    for n, step in enumerate(sorted(kept, reverse=True), 1):  # the newest fallback first
        shutil.rmtree(tmp_path / "last" if n == 1 else tmp_path / f".last.{n - 1}")
        assert step_of(trusted(tmp_path / "last")) == step


# ---- corruption -----------------------------------------------------------------------------------------------------

FILES = ("adapter_model.safetensors", "state.safetensors", "state.json", "tokenizer.json", "manifest.json")


def corruptions(folder, name: str):
    path = folder / name
    data = path.read_bytes()
    rng = random.Random(name)

    def flipped(i: int) -> bytes:
        changed = bytearray(data)
        changed[i] ^= 1 << rng.randrange(8)
        return bytes(changed)

    yield "truncated", lambda: path.write_bytes(data[: len(data) // 2])
    yield "two bytes short", lambda: path.write_bytes(data[:-2])  # (the last byte of a manifest is a line end)
    yield "empty", lambda: path.write_bytes(b"")
    yield "deleted", path.unlink
    yield "appended", lambda: path.write_bytes(data + b"}")
    yield "hole", lambda: path.write_bytes(data[:8] + bytes(len(data) - 8))
    yield "folder", lambda: (path.unlink(), path.mkdir())
    for i in (0, len(data) // 3, len(data) - 2):
        yield f"flip at {i}", lambda i=i: path.write_bytes(flipped(i))


@pytest.mark.parametrize("name", FILES)
def test_every_corruption_is_seen_and_the_save_before_is_taken(tmp_path, name, capsys):
    run, whole = tmp_path / "run", tmp_path / "whole"
    run.mkdir()
    put(run / "last", 1)
    put(run / "last", 2)
    shutil.copytree(run, whole)
    for kind, harm in corruptions(run / "last", name):
        harm()
        with pytest.raises(Untrusted, match=r"last[:/]"):
            verify(run / "last")
        capsys.readouterr()
        assert step_of(trusted(run / "last")) == 1, kind
        warning = capsys.readouterr().err
        assert warning.startswith("warning: ") and "falling back" in warning and warning.count("\n") == 1, kind
        (run / ".last.1/state.json").write_text("{}")
        with pytest.raises(Untrusted, match="no save can be trusted"):
            trusted(run / "last")
        with pytest.raises(Untrusted):
            checkpoint.last_state(run)
        for side in ("last", ".last.1"):
            shutil.rmtree(run / side)
            shutil.copytree(whole / side, run / side)
    files = FILES[: FILES.index(name)]
    for other in files:  # two files swapped
        a, b = (run / "last" / n for n in (name, other))
        one, two = a.read_bytes(), b.read_bytes()
        a.write_bytes(two), b.write_bytes(one)
        with pytest.raises(Untrusted):
            verify(run / "last")
        a.write_bytes(one), b.write_bytes(two)
    assert step_of(trusted(run / "last")) == 2


def test_no_flipped_bit_of_a_manifest_changes_a_fact(tmp_path):
    put(tmp_path / "last", 2)
    path = tmp_path / "last/manifest.json"
    data, whole = path.read_bytes(), verify(tmp_path / "last")
    assert whole["step"] == 2 and whole["base"] == {"hidden_size": 32} and set(whole["files"]) == set(FILES[:-1])
    silent = 0
    for i in range(len(data)):
        for bit in range(8):
            path.write_bytes(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :])
            try:
                assert verify(tmp_path / "last") == whole
                silent += 1
            except Untrusted:
                pass
    assert silent < len(data) / 4  # white space that became other white space


@pytest.mark.parametrize("name", ["../secret", "a/../../secret", "/etc/hostname"])
def test_a_manifest_that_names_files_outside_is_refused(tmp_path, name):
    put(tmp_path / "last", 1)
    (tmp_path / "secret").write_text("s")
    manifest = json.loads((tmp_path / "last/manifest.json").read_text())
    manifest.pop("seal")
    manifest["files"][name] = {"size": 1, "sha256": checkpoint.sha256(tmp_path / "secret")}
    manifest["seal"] = checkpoint.seal_of(manifest)
    (tmp_path / "last/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Untrusted, match="outside the save"):
        verify(tmp_path / "last")


@pytest.mark.parametrize("text", ["[]", "null", '{"files": []}', '{"files": {"a": 3}}', '{"files"', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    put(tmp_path / "last", 1)
    (tmp_path / "last/manifest.json").write_text(text)
    with pytest.raises(Untrusted):
        trusted(tmp_path / "last")


def test_nothing_saved_is_none_and_not_an_error(tmp_path):
    assert trusted(tmp_path / "last") is None and checkpoint.last_state(tmp_path) is None


@pytest.mark.parametrize(
    "data", [b"", b"junk", b"\xff" * 64, b"\x08" + bytes(7) + b'{"a":1}}', (2**40).to_bytes(8, "little") + b"{}"]
)
def test_tensors_of_garbage_are_refused(tmp_path, data):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(Untrusted, match="x.safetensors"):
        checkpoint.load_tensors(tmp_path / "x.safetensors")
    with pytest.raises(Untrusted):
        checkpoint.load_tensors(tmp_path / "absent.safetensors")
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(Untrusted, match="x.json"):
        checkpoint.load_json(tmp_path / "x.json")


# ---- single files ---------------------------------------------------------------------------------------------------


def test_write_atomic_is_the_old_or_the_new_file(tmp_path):
    path = tmp_path / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        events = interrupt(patch, -1, "before", None)
        checkpoint.write_atomic(path, "old")
    assert events == ["fs_write", "fs_rename", "fs_sync"]

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    for at, left in ((1, {"old"}), (2, {"old"}), (3, {"new"})):
        for how in ("before", "half"):
            path.write_text("old")
            with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space"):
                interrupt(patch, at, how, full)
                checkpoint.write_atomic(path, "new")
            assert path.read_text() in left and [p.name for p in tmp_path.iterdir()] == ["result.json"]
            path.write_text("old")
            pid = os.fork()
            if pid == 0:
                try:
                    interrupt(pytest.MonkeyPatch(), at, how, lambda: os.kill(os.getpid(), signal.SIGKILL))
                    checkpoint.write_atomic(path, b"new")
                finally:
                    os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
            assert path.read_text() in left
            for rest in tmp_path.glob(".*.tmp"):
                rest.unlink()
    checkpoint.write_atomic(path, "späte Worte")
    assert path.read_text(encoding="utf-8") == "späte Worte"


def test_a_log_is_cut_back_and_never_grown(tmp_path):
    log = tmp_path / "metrics.jsonl"
    disk.cut_log(log, 5)  # nothing there
    checkpoint.append_whole(log, '{"step": 1}\n')
    size = log.stat().st_size
    checkpoint.append_whole(log, '{"step": 2}\n')
    disk.cut_log(log, size)
    disk.cut_log(log, 10_000)
    assert log.read_text() == '{"step": 1}\n'


# ---- run folders ----------------------------------------------------------------------------------------------------


def test_processes_never_share_a_run_folder(tmp_path):
    (tmp_path / "b/d/run_x").mkdir(parents=True)  # no number: not a run
    pids = []
    for i in range(6):
        pid = os.fork()
        if pid == 0:
            try:
                names = [checkpoint.new_run(str(tmp_path), "b", "d").name for _ in range(8)]
                (tmp_path / f"names{i}").write_text(" ".join(names))
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    names = [name for i in range(6) for name in (tmp_path / f"names{i}").read_text().split()]
    assert len(names) == 48 and set(names) == {f"run_{i}" for i in range(48)}
    assert [p.name for p in checkpoint.runs_of(str(tmp_path), "b", "d")] == [f"run_{i}" for i in range(48)]


def test_a_hub_name_becomes_one_folder():
    parent = checkpoint.run_parent("outputs", "Qwen/Qwen2.5-0.5B", "math")
    assert parent.as_posix() == "outputs/Qwen__Qwen2.5-0.5B/math"


EVIL = [
    "..",
    "../..",
    "/etc",
    "/",
    ".",
    "...",
    "",
    "~",
    "a/../../b",
    "../../../x",
    "..\\..\\x",
    "C:\\x",
    ".hidden",
    "a\nb",
]


@pytest.mark.parametrize("name", EVIL)
def test_no_name_climbs_out_of_outputs(tmp_path, name):
    for base, dataset in ((name, "d"), ("b", name), (name, name)):
        parent = checkpoint.run_parent(str(tmp_path / "outputs"), base, dataset)
        inside = parent.resolve().relative_to((tmp_path / "outputs").resolve())
        assert len(inside.parts) == 2 and not any(p.startswith(".") or p == "" for p in inside.parts)
        run = checkpoint.new_run(str(tmp_path / "outputs"), base, dataset)
        assert run.parent == parent and [p.name for p in tmp_path.iterdir()] == ["outputs"]


def test_which_run_is_resumed_and_which_is_newest(tmp_path):
    out, runs = str(tmp_path), []
    for _ in range(11):  # run_10 is newer than run_9
        runs.append(checkpoint.new_run(out, "b", "d"))
        (runs[-1] / "config.json").write_text("{}")
    assert checkpoint.find_run("auto", out, "b", "d") == runs[10]
    assert checkpoint.find_run("auto", out, "b", "other") is None
    (runs[10] / "result.json").write_text("{}")
    (runs[9] / "config.json").unlink()  # killed before it could write it
    assert checkpoint.find_run("auto", out, "b", "d") == runs[8]
    assert checkpoint.find_run(str(runs[3]), out, "x", "y") == runs[3]
    for wrong, words in (
        (runs[9], "not a run folder"),
        (tmp_path / "none", "not a run folder"),
        (runs[10], "finished"),
    ):
        with pytest.raises(ValueError, match=words):
            checkpoint.find_run(str(wrong), out, "b", "d")
    for name, text in (("family.json", "{}"), ("config.json", '{"folds": 5, "fold": "all"}')):  # of now, and before
        (runs[6] / name).write_text(text)
        assert checkpoint.is_family(runs[6])
        assert (
            checkpoint.find_run("auto", out, "b", "d", family=True)
            == runs[6]
            != checkpoint.find_run("auto", out, "b", "d")
        )
        with pytest.raises(UserError, match="belongs to another command: python folds.py"):
            checkpoint.find_run(str(runs[6]), out, "b", "d")
        (runs[6] / "family.json").unlink(missing_ok=True)
    assert checkpoint.newest_finished(out, "labels.json") is None
    for i in (10, 2):
        (runs[i] / "result.json").write_text("{}")
        (runs[i] / "labels.json").write_text("{}")
    os.utime(runs[10] / "result.json", (1, 1))
    assert checkpoint.newest_finished(out, "labels.json") == runs[2]

    # Only the run that is wanted must be as it was written: what befell another one is no obstacle.
    for name in ("result.json", "config.json", "labels.json"):
        seals.write(runs[10] / name, {})
    for name in ("config.json", "labels.json"):
        (runs[10] / name).write_text("{ }")
    os.utime(runs[10] / "result.json", (1, 1))
    assert checkpoint.newest_finished(out, "labels.json") == runs[2]
    assert checkpoint.find_run("auto", out, "b", "d") == runs[8]
    os.utime(runs[10] / "result.json")
    with pytest.raises(Untrusted, match="labels.json"):
        checkpoint.newest_finished(out, "labels.json")


# ---- optimizer state ------------------------------------------------------------------------------------------------


def test_optimizer_state_goes_round_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    start = [torch.randn(3, 2) for _ in range(12)] + [torch.randn(5)]

    def make():
        params = [torch.nn.Parameter(p.clone()) for p in start]
        groups = [{"params": params[:12]}, {"params": params[12:], "lr": 0.2}]
        return params, torch.optim.AdamW(groups, lr=0.1, fused=True)

    def steps(params, optimizer, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()

    params, optimizer = make()
    steps(params, optimizer, [1, 2])
    tensors = checkpoint.optimizer_tensors(optimizer)
    assert set(tensors) == {f"{g}.{i}.{k}" for g, i in [*((0, i) for i in range(12)), (1, 0)] for k in KEYS}
    checkpoint.save_tensors(tmp_path / "state.safetensors", tensors)
    again, other = make()
    with torch.no_grad():
        for p, q in zip(again, params, strict=True):
            p.copy_(q)
    checkpoint.load_optimizer_tensors(other, checkpoint.load_tensors(tmp_path / "state.safetensors"))
    for pair in ((params, optimizer), (again, other)):
        steps(*pair, [3, 4])
    assert all(torch.equal(p, q) for p, q in zip(params, again, strict=True))
    fresh = make()
    steps(*fresh, [3, 4])
    assert not np.allclose(fresh[0][0].detach(), params[0].detach())
    with pytest.raises(Untrusted, match=r"0\.1\.\* has .*'exp_avg': \(2, 3\).*, expected .*'exp_avg': \(3, 2\)"):
        checkpoint.load_optimizer_tensors(other, {**tensors, "0.1.exp_avg": torch.zeros(2, 3)})
    with pytest.raises(Untrusted, match=r"0\.1\.\* has shapes {'exp_avg': \(3, 2\)}, expected"):
        checkpoint.load_optimizer_tensors(other, {"0.1.exp_avg": torch.zeros(3, 2)})


KEYS = ("step", "exp_avg", "exp_avg_sq")
