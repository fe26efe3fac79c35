"""A run's own files are those that it wrote: whatever happened to one, a reader names it or is not touched by it."""

import json
import os
import random
import shutil
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import unsealed
from test_checkpoint import interrupt
from test_cpt import cpt_flags, source  # noqa: F401 (a fixture)
from test_ddp import finish, forked, forks, log_of, start, toy_flags, write_rows
from test_folds import in_process

import chains
import checkpoint
import cli
import cpt
import disk
import folds
import infer
import report_numbers
import report_runs
import seals
import train
import trained
from configs import TrainConfig
from errors import Untrusted, UserError

pytestmark = forks
SHORT = {"max_steps": 4, "eval_every": 2, "save_every": 2, "metric": "log_loss", "val_data": None, "val_size": 0.4}


@pytest.fixture(scope="module")
def sound(tmp_path_factory, small_base) -> Path:
    return Path(train.main(toy_flags(tmp_path_factory.mktemp("sound"), small_base, **SHORT))["run"])


@pytest.fixture(scope="module")
def other(tmp_path_factory, small_base) -> Path:
    """A run of the same base and data with another seed."""
    flags = toy_flags(tmp_path_factory.mktemp("other"), small_base, **SHORT, seed=7)
    return Path(train.main(flags)["run"])


# ---- readers: what they make of a run -------------------------------------------------------------------------------


def predicted(run: Path) -> bytes:
    out = run.parent / "o.csv"
    rows = write_rows(run.parent / "rows.csv", 12, skip=3)
    infer.main(["--runs", str(run), "--input", str(rows), "--output", str(out), "--overwrite"])
    return out.read_bytes()


def loaded(run: Path) -> list:
    return trained.load_run(run).predict(["What is 2 + 2?", "Find x."])


def reported(run: Path) -> str:
    facts = report_runs.read_run(run)
    numbers = facts.ids, facts.targets.tolist(), facts.logits.tolist(), facts.decision, facts.texts
    return repr(
        (numbers, facts.result["metrics"], report_numbers.audit(facts), list(report_numbers.training(facts).values()))
    )


def resumed(run: Path) -> dict:
    """The files of a run that was killed before its result, and is resumed."""
    if (run / "result.json").is_file():
        (run / "result.json").unlink()
    train.main(["--resume", str(run)])
    names = "config.json labels.json environment.json rows.json split.csv audit.json decision.json val_predictions.csv"
    files = {name: (run / name).read_bytes() for name in names.split() if (run / name).exists()}
    weights = [checkpoint.sha256(run / side / "adapter_model.safetensors") for side in ("best", "last")]
    return {**files, "log": log_of(run), "weights": weights}


READERS = {"infer": predicted, "load_run": loaded, "report": reported, "resume": resumed}


@pytest.fixture(scope="module")
def expected(sound, tmp_path_factory) -> dict:
    """What each reader makes of the sound run."""
    folder = tmp_path_factory.mktemp("expected")
    return {name: read(Path(shutil.copytree(sound, folder / name / "run"))) for name, read in READERS.items()}


# ---- harms ----------------------------------------------------------------------------------------------------------


def flip(data: bytes, rng: random.Random) -> bytes:
    """One digit, or else one bit, is another."""
    digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    i = rng.choice(digits or range(len(data)))
    return data[:i] + (bytes([48 + (data[i] - 47) % 10]) if digits else bytes([data[i] ^ 4])) + data[i + 1 :]


def harm(path: Path, kind: str, rng: random.Random, foreign: Path) -> None:
    data = path.read_bytes()
    if kind in CONTENT:
        path.write_bytes(CONTENT[kind](data, rng))
        return
    path.unlink()
    if kind == "swapped":
        shutil.copy(foreign, path)
    elif kind == "link to another run":
        path.symlink_to(foreign)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with inside(path.parent):  # its address may not be long
            socket.socket(socket.AF_UNIX).bind(path.name)


@contextmanager
def inside(folder: Path):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


CONTENT = {
    "flipped": flip,
    "cut": lambda data, rng: data[: len(data) // 2],
    "cut at a line": lambda data, rng: data[: data[:-1].rfind(b"\n") + 1],
    "emptied": lambda data, rng: b"",
    "hole": lambda data, rng: data[:8] + bytes(len(data) - 8),
    "appended": lambda data, rng: data + data[-20:],
}
HARMS = [*CONTENT, "deleted", "swapped", "link to another run", "link to nothing", "pipe", "folder", "socket"]
OWN = "config.json labels.json environment.json rows.json split.csv audit.json decision.json result.json metrics.jsonl \
val_predictions.csv seal.json".split()


def silent(run: Path, name: str, reader: str, expected: dict, capsys) -> str:
    """What a reader made of a harmed run, if it neither named the file nor gave what the sound run gives."""
    capsys.readouterr()
    signal.alarm(100)  # a pipe would be waited for
    try:
        result = READERS[reader](run)
    except (Untrusted, UserError) as e:
        return "" if Path(name).name in str(e) or Path(name).parts[0] in str(e) else f"another reason: {e}"
    finally:
        signal.alarm(0)
    fallen_back = "/" in name and f"{Path(name).parts[0]}" in capsys.readouterr().err
    return "" if fallen_back or result == expected[reader] else "another result"


def corruptions(sound: Path, seed: int, count: int) -> list[tuple[str, str, str]]:
    """(file, harm, reader): each file and each harm about equally often."""
    saves = [p.relative_to(sound).as_posix() for side in ("best", "last") for p in sorted((sound / side).iterdir())]
    rng = random.Random(seed)
    files, readers = [*OWN, *OWN, *saves], list(READERS)
    return [(files[i % len(files)], rng.choice(HARMS), rng.choice(readers)) for i in range(count)]


def check_corruptions(sound, other, expected, tmp_path, capsys, seed: int, count: int) -> None:
    problems = []
    for i, (name, kind, reader) in enumerate(corruptions(sound, seed, count)):
        run = Path(shutil.copytree(sound, tmp_path / str(i) / "run"))
        if not (run / name).exists() or not (other / name).exists():
            continue
        harm(run / name, kind, random.Random(i), other / name)
        problem = silent(run, name, reader, expected, capsys)
        if problem:
            problems.append((name, kind, reader, problem))
        shutil.rmtree(run.parent)
    assert not problems, problems


def test_no_reader_takes_a_harmed_file_in_silence(sound, other, expected, tmp_path, capsys):
    check_corruptions(sound, other, expected, tmp_path, capsys, seed=1, count=30)


@pytest.mark.slow
def test_no_reader_takes_any_of_400_harmed_files_in_silence(sound, other, expected, tmp_path, capsys):
    check_corruptions(sound, other, expected, tmp_path, capsys, seed=2, count=400)


@pytest.mark.parametrize("name", OWN)
def test_whoever_reads_a_changed_file_names_it(sound, tmp_path, name):
    """One digit: its reader, or the resumed run, refuses it with exit status 3 and its name, in one line."""
    run = Path(shutil.copytree(sound, tmp_path / "run"))
    harm(run / name, "flipped", random.Random(0), run)
    (run / "result.json").unlink() if name not in ("result.json", "metrics.jsonl") else None
    with pytest.raises(Untrusted, match=name) as e:
        report_numbers.training(report_runs.read_run(run)) if name in ("result.json", "metrics.jsonl") else resumed(run)
    assert e.value.exit_status == 3 and "\n" not in str(e.value)


def test_a_file_that_the_run_did_not_write_is_refused(sound, other, tmp_path):
    """A decision or a family that is put into a run is as bad as one that is changed."""
    run = Path(shutil.copytree(sound, tmp_path / "run"))
    for name, text in (("family.json", '{"members": {"a": "/x"}}'), ("texts.json", '{"pairs": true}')):
        (run / name).write_text(text)
        with pytest.raises(Untrusted, match=name):
            trained.load_run(run) if name == "family.json" else report_runs.read_run(run)
        (run / name).unlink()
    loaded(run)


def test_the_save_of_another_run_is_refused(sound, other, tmp_path):
    run = Path(shutil.copytree(sound, tmp_path / "run"))
    shutil.rmtree(run / "best")
    shutil.copytree(other / "best", run / "best")
    with pytest.raises(Untrusted, match="best is a save of another run"):
        trained.load_run(run)


def test_settings_are_not_taken_from_a_changed_config(sound, tmp_path):
    """--cfg RUN is refused after an edit, also by its path; a copy elsewhere is taken."""
    run = Path(shutil.copytree(sound, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "lr": 0.5}))
    for path in (run, run / "config.json"):
        with pytest.raises(Untrusted, match=r"config\.json has sha256"):
            cli.parse(TrainConfig, {}, ["--cfg", str(path)])
        with pytest.raises(SystemExit) as e:
            cli.early(TrainConfig, {}, "", ["--cfg", str(path)])
        assert e.value.code == 3
    copy = shutil.copy(run / "config.json", tmp_path / "mine.json")
    assert cli.parse(TrainConfig, {}, ["--cfg", str(copy)])[0].lr == 0.5
    unsealed(run)  # the way out for those who mean it
    assert cli.parse(TrainConfig, {}, ["--cfg", str(run)])[0].lr == 0.5


@pytest.mark.parametrize("name", ["config.json", "labels.json", "decision.json", "metrics.jsonl", "result.json"])
def test_a_pipe_instead_of_a_file_of_an_old_run_is_refused(sound, tmp_path, name):
    """Also without a seal nothing is waited for."""
    run = unsealed(shutil.copytree(sound, tmp_path / "run"))
    (run / name).unlink()
    os.mkfifo(run / name)
    signal.alarm(60)
    try:
        for read in (resumed, reported) if name == "metrics.jsonl" else (reported,):
            with pytest.raises((Untrusted, UserError), match=name):
                read(run)
            shutil.copy(sound / "result.json", run) if name == "metrics.jsonl" else None
    finally:
        signal.alarm(0)


def test_chains_ensembles_and_families_read_sealed_files(sound, tmp_path, small_base):
    """--init_from reads split.csv, folds.py --pool reads val_predictions.csv."""
    run = Path(shutil.copytree(sound, tmp_path / "run"))
    cfg, _ = trained.run_facts(run)
    harm(run / "split.csv", "cut at a line", random.Random(0), run)
    with pytest.raises(Untrusted, match="split.csv"):
        chains._texts_of(run, cfg)
    harm(run / "val_predictions.csv", "flipped", random.Random(0), run)
    with pytest.raises(Untrusted, match="val_predictions.csv"):
        report_runs.validation_rows(run, cfg, trained.run_facts(run)[1])
    harm(run / "config.json", "flipped", random.Random(0), run)
    with pytest.raises(Untrusted, match="config.json"):
        folds.main(["--pool", str(run), "--outputs", str(tmp_path / "out")])


def test_old_runs_without_a_seal_are_read_and_continued(sound, expected, tmp_path):
    """They get a seal for what they write from then on."""
    run = unsealed(shutil.copytree(sound, tmp_path / "run"))
    assert loaded(run) == expected["load_run"] and resumed(run) == expected["resume"]
    assert set(seals.stored(run)["files"]) == {"decision.json", "val_predictions.csv", "result.json", "metrics.jsonl"}


# ---- kills ----------------------------------------------------------------------------------------------------------


def write_in_a_child(path: Path, text: str, at: int, how: str) -> bool:
    """Write a sealed file in a process that is killed at its at-th event; whether there was one."""
    pid = os.fork()
    if pid == 0:
        interrupt(pytest.MonkeyPatch(), at, how, lambda: os.kill(os.getpid(), signal.SIGKILL))
        seals.write(path, text)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0


def test_a_kill_while_a_file_is_sealed_leaves_a_run_that_is_trusted(tmp_path):
    """Before or in the middle of each event, for a new file and for one that is replaced: the old or the new one."""
    for old in (None, "old"):
        outcomes, at, killed = set(), 0, True
        while killed:
            at += 1
            for how in ("before", "half"):
                run = tmp_path / f"{old}-{at}-{how}"
                run.mkdir()
                seals.write(run / "config.json", "{}")
                if old:
                    seals.write(run / "a.json", old)
                killed = write_in_a_child(run / "a.json", "new", at, how)
                seals.verify(run)
                data = seals.read(run / "a.json")
                outcomes.add(data)
                seals.write(run / "a.json", "newer")
                assert seals.read(run / "a.json") == b"newer" and not list(run.glob(".*"))
                (run / "a.json").write_bytes(data or b"x")
                with pytest.raises(Untrusted, match="a.json"):
                    seals.verify(run)
        assert outcomes == {old and old.encode(), b"new"} and at >= 9


def test_a_save_names_a_log_that_is_durable_and_reads_none_of_it(tmp_path, small_base, monkeypatch):
    """After a power cut the log has all that the newest save says; and what saves cost does not grow with the log."""
    events = []

    def record(module, name, path_at=0):
        original = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, **kw: (events.append((name, Path(args[path_at]).name)), original(*args, **kw))[1],
        )

    record(disk, "fs_sync")
    record(disk, "read")
    record(checkpoint, "fs_rename", 1)
    run = Path(train.main(toy_flags(tmp_path, small_base, **SHORT))["run"])
    saves = [i for i, event in enumerate(events) if event == ("fs_rename", "last")]
    assert len(saves) == 2
    for before, save in zip([0, *saves], saves, strict=False):
        assert ("fs_sync", "metrics.jsonl") in events[before:save]
        assert ("read", "metrics.jsonl") not in events[max(before, saves[0]) : save]
    saved = json.loads((run / "last/state.json").read_text())
    data = (run / "metrics.jsonl").read_bytes()
    assert saved["log_bytes"] == len(data) and saved["log_sha256"] == disk.sha256(run / "metrics.jsonl")


def events_of(main, flags: list[str], folder: Path) -> int:
    """How many file-system events a command has."""

    def count():
        seen = interrupt(pytest.MonkeyPatch(), -1, "before", None)
        append = checkpoint.append_whole
        checkpoint.append_whole = lambda *args: (seen.append("append"), append(*args))
        inner = main_of[main]

        def counted(argv):
            result = inner(argv)
            (folder / "events").write_text(str(len(seen)))
            return result

        main_of[main] = counted

    main_of = {main: main}
    pids = start(lambda argv: main_of[main](argv), flags, folder, before=count)
    status, _, err = finish(pids, folder)
    assert status == 0, err
    return int((folder / "events").read_text())


def killed_at(main, flags: list[str], folder: Path, at: int) -> int:
    """The exit status of a command that is killed before its at-th event."""

    def arm():
        seen = interrupt(pytest.MonkeyPatch(), at, "before", lambda: os.kill(os.getpid(), signal.SIGKILL))
        append = checkpoint.append_whole

        def hooked(*args):
            seen.append("append")
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            append(*args)

        checkpoint.append_whole = hooked

    return finish(start(main, flags, folder, before=arm), folder)[0]


def check_kills(main, flags_of, outcome, tmp_path, every: int) -> None:
    """Killed before every so-many-th event of a run and resumed: the files of the run that was not."""
    (tmp_path / "whole").mkdir()
    count = events_of(main, flags_of(tmp_path / "whole"), tmp_path / "whole")
    wanted = outcome(next((tmp_path / "whole/outputs").glob("*/*/run_0")))
    for at in range(1 + every // 2, count + 1, every):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert killed_at(main, flags_of(folder), folder, at) == -signal.SIGKILL, at
        finished = list(folder.glob("outputs/*/*/run_*/result.json"))
        ended = [path.parent for path in folder.glob("outputs/**/result.json")]  # members too: nobody opens them again
        if not finished:
            status, out, err = forked(main, [*flags_of(folder), "--resume", "auto"], folder)
            assert status == 0, (at, err)
        (run,) = (path.parent for path in folder.glob("outputs/*/*/run_*/result.json"))
        for part in (run, *(path.parent for path in run.glob("*/config.json") if path.parent.name not in SAVES)):
            seals.verify(part)
        got = outcome(run)
        for name in wanted.keys() - {"config.json", "environment.json"}:  # these have paths and the command line
            assert got[name] == wanted[name], (at, name)
        if not finished:  # else nobody came to clear what the killed process left
            left = {p for p in run.rglob(".*") if p.name not in (".best.1", ".last.1")}
            assert not [p for p in left if p.parent not in ended], at
        shutil.rmtree(folder)
    print(f"{count} events, one in {every}", file=sys.stderr)


SAVES = ("best", "last")
TINY = {**SHORT, "max_steps": 2, "eval_every": 1, "save_every": 1}


def test_a_run_killed_at_some_events_ends_as_the_one_that_was_not(small_base, tmp_path):
    check_kills(train.main, lambda folder: toy_flags(folder, small_base, **TINY), resumed, tmp_path, every=48)


@pytest.mark.slow
def test_a_run_killed_at_every_event_ends_as_the_one_that_was_not(small_base, tmp_path):
    check_kills(train.main, lambda folder: toy_flags(folder, small_base, **TINY), resumed, tmp_path, every=1)


def weights_of(run: Path) -> dict:
    """sha256s of the weights of all saves, and the predictions where there are any."""
    files = [*run.rglob("best/*.safetensors"), *run.rglob("last/*model.safetensors"), *run.rglob("val_predictions.csv")]
    return {path.relative_to(run).as_posix(): disk.sha256(path) for path in files}


@pytest.mark.slow
def test_a_run_of_cpt_killed_at_many_events_ends_as_the_one_that_was_not(source, tmp_path):  # noqa: F811
    settings = {"max_steps": 4, "eval_every": 2, "save_every": 2}
    check_kills(cpt.main, lambda folder: cpt_flags(source, folder, **settings), weights_of, tmp_path, every=5)


@pytest.mark.slow
def test_a_family_killed_at_many_events_ends_as_the_one_that_was_not(small_base, tmp_path, monkeypatch):
    """Two folds, trained in the process that is killed."""
    monkeypatch.setattr(folds, "started", in_process)
    settings = {**TINY, "val_size": None, "folds": 2, "audit": "none"}
    flags_of = lambda folder: toy_flags(folder, small_base, **settings)  # noqa: E731
    check_kills(folds.main, flags_of, weights_of, tmp_path, every=17)
