"""One process at a time trains a run, and two writers of one file do not meet: one is told, or both end well."""

import errno
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from test_ddp import finish, forked, forks, log_of, start, toy_flags
from test_seals import SHORT, predicted, resumed

import checkpoint
import cpt
import disk
import folds
import locks
import seals
import train
from errors import Untrusted, UserError

pytestmark = forks


class Holder:
    """A child that holds a run's lock until it is told to end, or killed."""

    def __init__(self, run: Path, before=lambda: None):
        ready, told = os.pipe(), os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(told[1])
            try:
                before()
                with locks.released():
                    locks.hold(run)
                    os.write(ready[1], b"x")
                    os.read(told[0], 1)
            finally:
                os._exit(0)
        os.close(told[0])
        self.end = told[1]
        assert os.read(ready[0], 1) == b"x"

    def kill(self, wait: bool = True) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | (0 if wait else os.WNOWAIT))

    def release(self) -> None:
        os.write(self.end, b"x")
        os.close(self.end)
        os.waitpid(self.pid, 0)


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder that looks like an unfinished run."""
    folder = tmp_path / "outputs/b/d/run_0"
    folder.mkdir(parents=True)
    seals.write(folder / "config.json", "{}")
    return folder


def taken(run: Path) -> bool:
    """Whether this process can hold a run, and leaves nothing of the lock behind."""
    with locks.released():
        locks.hold(run)
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()
    assert not list(run.glob(".*"))
    return True


def test_the_second_process_is_told_who_trains_the_run(run):
    """By its number, host and time; a process that ends leaves no lock, and one that is killed a free one, at once."""
    other = Holder(run)
    words = f"{run} is being trained by process {other.pid} on {disk.HOST} since {time.strftime('%Y-%m-%d')}"
    for ask in (locks.hold, locks.refuse_if_held):
        with pytest.raises(UserError, match=re.escape(words)) as e:
            ask(run)
        assert "\n" not in str(e.value)
    other.release()
    assert taken(run)
    other = Holder(run)
    other.kill(wait=False)  # nobody has asked for its status yet
    locks.refuse_if_held(run)
    started = time.monotonic()
    assert taken(run) and time.monotonic() - started < 2
    os.waitpid(other.pid, 0)


@pytest.mark.parametrize("command", ["train auto", "train", "cpt", "folds", "folds auto"])
def test_no_command_resumes_a_run_that_trains(tmp_path, small_base, command):
    """Refused before any row is read, and the run is not touched."""
    name, _, auto = command.partition(" ")
    flags = toy_flags(tmp_path, small_base, **{**SHORT, "max_steps": 1, "eval_every": 1, "save_every": 1})
    main = {"train": train.main, "cpt": cpt.main, "folds": folds.main}[name]
    folder = tmp_path / f"outputs/{Path(small_base).as_posix().strip('/').replace('/', '__')}/toy/run_0"
    folder.mkdir(parents=True)
    extra = {"seeds": ["1", "2"]} if name == "folds" else {}
    seals.write(folder / "config.json", json.dumps({"base": small_base, "train_data": "x.csv", **extra}))
    other = Holder(folder)
    before = {p: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}
    flags = [*flags, "--resume", "auto"] if auto else ["--resume", str(folder)]
    if command == "folds auto":
        flags += ["--seeds", "1,2"]
    status, _, err = forked(main, flags, tmp_path)
    assert status == 2 and f"is being trained by process {other.pid}" in err and err.count("\n") == 1, err
    assert {p: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"} == before
    other.release()


def test_two_processes_that_resume_one_run_leave_it_whole(tmp_path, small_base):
    """One of them trains it to its end, the other is told; nobody's lines are doubled; infer.py needs no lock."""
    flags = toy_flags(tmp_path, small_base, **{**SHORT, "max_steps": 12, "eval_every": 3, "save_every": 3})
    (tmp_path / "first").mkdir(), (tmp_path / "second").mkdir()
    first = start(train.main, flags, tmp_path / "first")
    logs = "outputs/*/*/run_0/metrics.jsonl"
    end = time.monotonic() + 100
    while not any(log.read_bytes().count(b"\n") >= 4 for log in tmp_path.glob(logs)):
        assert time.monotonic() < end
        time.sleep(0.002)
    status, _, err = forked(train.main, [*flags, "--resume", "auto"], tmp_path / "second")
    assert status == 2 and f"is being trained by process {first[0]}" in err
    assert finish(first, tmp_path / "first")[0] == 0
    folder = next(tmp_path.glob("outputs/*/*/run_0"))
    assert [line["step"] for line in log_of(folder) if "loss" in line] == list(range(1, 11))
    other = Holder(folder)
    assert predicted(folder).count(b"\n") == 13
    other.release()
    resumed(folder)


def test_of_processes_that_start_together_one_holds_the_run(run):
    """Also where the one before them is just removing its lock."""
    for _ in range(5):
        before, pids, (until, end) = Holder(run), [], os.pipe()
        for _ in range(6):
            pids.append(os.fork())
            if not pids[-1]:
                os.close(end)
                deadline, code = time.monotonic() + 0.3, 2
                while code and time.monotonic() < deadline:
                    try:
                        locks.hold(run)
                        code = 0
                    except UserError:
                        time.sleep(0.001)
                os.read(until, 1)  # until all have tried
                os._exit(code)
        before.release()
        time.sleep(0.5)
        os.close(end)
        assert sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids) == [0] + [2] * 5
        os.close(until)


def test_the_lock_of_another_host_is_taken_over_without_a_sign_of_life(run, monkeypatch, capsys):
    """flock may not reach that host: a beat that moves is life, one that stands still is death; a copy is no lock."""
    monkeypatch.setattr(locks, "PATIENCE", 0.6)
    record = {"pid": 7, "host": "elsewhere", "started": "1", "since": "2026-01-01 00:00:00", "beat": 5.0}
    (run / ".lock").write_text(json.dumps(record))
    locks.refuse_if_held(run)
    assert taken(run)
    assert (
        "process 7 on elsewhere since 2026-01-01 00:00:00: waiting 0.6 s for a sign of life" in capsys.readouterr().out
    )
    (run / ".lock").write_text(json.dumps(record))
    pid = os.fork()
    if not pid:
        for beat in range(100):
            disk.write_atomic(run / ".lock", json.dumps({**record, "beat": beat}))
            time.sleep(0.05)
        os._exit(0)
    time.sleep(0.2)
    with pytest.raises(UserError, match="process 7 on elsewhere"):
        locks.hold(run)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_an_owner_that_slept_leaves_the_run_to_the_next_one(run, tmp_path, small_base, monkeypatch):
    """A process was suspended, and another host took its run over: it writes nothing more, and keeps its hands off."""
    record = {"pid": 7, "host": "elsewhere", "started": "1", "since": "2026-01-01 00:00:00", "beat": 5.0}
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    for taken_over in (lambda path: disk.write_atomic(path, json.dumps(record)), Path.unlink):  # and it ended meanwhile
        with locks.released():
            locks.hold(run)
            time.sleep(0.2)
            locks.need()
            taken_over(run / ".lock")
            with pytest.raises(UserError, match="another process took it over"):
                locks.need()
            after = (run / ".lock").exists() and (run / ".lock").read_text()
        assert ((run / ".lock").exists() and (run / ".lock").read_text()) == after

    # In training no save comes after the takeover.
    save, at = checkpoint.save, []

    def meanwhile(target, *args, **kwargs):
        save(target, *args, **kwargs)
        if target.name == "last" and not at:
            disk.write_atomic(target.parent / ".lock", json.dumps(record))
            at.append(target.parent)

    monkeypatch.setattr(checkpoint, "save", meanwhile)
    with pytest.raises(UserError, match="another process took it over"):
        train.main(toy_flags(tmp_path, small_base, **SHORT))
    assert json.loads((at[0] / ".lock").read_text()) == record
    assert checkpoint.verify(at[0] / "last")["step"] == SHORT["save_every"] and not (at[0] / "result.json").exists()


def test_a_holder_gives_signs_of_life(run, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with locks.released():
        locks.hold(run)
        beats = set()
        for _ in range(20):
            beats.add(json.loads((run / ".lock").read_text())["beat"])
            time.sleep(0.02)
    assert len(beats) > 2


def test_without_flock_the_owner_counts_by_its_number_and_start(run, monkeypatch, capsys):
    """As on some network file systems: the failure is named, a living owner refuses, a dead one does not."""

    def none(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    other = Holder(run)
    with pytest.raises(UserError, match=f"process {other.pid}"):
        locks.hold(run)
    assert "no flock here (No locks available)" in capsys.readouterr().out
    other.kill()
    assert taken(run)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}', "\0" * 300, '{"pid": 5}'])
def test_a_lock_file_that_names_nobody_alive_is_free(run, content, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.1)
    (run / ".lock").write_text(content)
    locks.refuse_if_held(run)
    assert taken(run)


def test_a_lock_that_is_no_file_is_refused(run):
    os.mkfifo(run / ".lock")
    with pytest.raises(Untrusted, match=r"\.lock"):
        locks.hold(run)


def test_the_next_owner_clears_what_killed_writers_left(run):
    (run / ".last.host-1-ab.tmp").mkdir()
    (run / ".last.new").mkdir()
    (run / ".result.json.tmp").write_text("half")
    assert taken(run)


# ---- two writers of one file ----------------------------------------------------------------------------------------


def test_two_writers_of_one_file_leave_one_whole_file(tmp_path):
    """Their halves are written in turn: the file is that of one of them, both end well, nothing is left."""
    path = tmp_path / "o.csv"
    texts = [letter * 400_000 for letter in "abcd"]
    for _ in range(3):
        pids = []
        for text in texts:
            pids.append(os.fork())
            if not pids[-1]:
                for _ in range(5):
                    checkpoint.write_atomic(path, text)
                os._exit(0)
        assert not any(os.waitpid(pid, 0)[1] for pid in pids)
        assert path.read_text() in texts and [p.name for p in tmp_path.iterdir()] == ["o.csv"]


def test_the_next_writer_clears_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    path = tmp_path / "a[1]*.csv"  # its name is no pattern
    pid = os.fork()
    if not pid:
        disk.fs_rename = lambda old, new: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.write_atomic(path, "new")
    os.waitpid(pid, 0)
    living = disk.temporary_of(path)
    assert not list(tmp_path.iterdir())
    living.write_text("half")
    checkpoint.write_atomic(path, "newer")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, living.name} and path.read_text() == "newer"


def test_a_save_is_not_mistaken_on_a_host_whose_name_begins_with_a_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "HOST", "3f1c")
    checkpoint.save(tmp_path / "last", lambda folder: checkpoint.save_json(folder / "a.json", {}), {"step": 1})
    disk.temporary_of(tmp_path / "last").mkdir()
    assert checkpoint.trusted(tmp_path / "last").manifest["step"] == 1
