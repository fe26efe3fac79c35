"""A disk that takes no more: one line with the file, the bytes needed and the bytes free; earlier files stay whole."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from test_checkpoint import interrupt
from test_cpt import cpt_flags, source  # noqa: F401 (a fixture)
from test_ddp import finish, forked, forks, start, toy_flags
from test_seals import SHORT, events_of

import checkpoint
import cpt
import disk
import seals
import train
import trained
from errors import DiskError

pytestmark = forks
LINE = r"^[^\n]+: {}; [\d,]+ bytes needed, [\d,]+ bytes free; earlier files are unchanged$"
TINY = {**SHORT, "max_steps": 2, "eval_every": 1, "save_every": 1}
RUST = "Error while serializing: I/O error: {} (os error {})"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])
def test_each_failure_of_the_disk_is_one_line_whoever_meets_it(tmp_path, number):
    """Python's, safetensors' and tokenizers' own exceptions alike; others pass as they are."""
    words = os.strerror(number)
    for error in (
        OSError(number, words),
        SafetensorError(RUST.format(words, number)),
        Exception(f"{words} (os error {number})"),
    ):
        with pytest.raises(DiskError, match=LINE.format(words)), disk.told(tmp_path / "a/b.json", 1234):
            raise error
    for error in (ValueError("x"), KeyboardInterrupt(), SafetensorError("header too large")):
        with pytest.raises(type(error)) as e, disk.told(tmp_path):
            raise error
        assert not isinstance(e.value, DiskError)


def test_a_full_device_is_named():
    """/dev/full takes nothing."""
    with pytest.raises(DiskError, match=LINE.format("No space left on device")):
        disk.append_whole(Path("/dev/full"), "line\n")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_real_full_disk_keeps_the_save_before(small_disk):
    def write(folder, size):
        checkpoint.save_tensors(folder / "a.safetensors", {"a": torch.ones(size)})

    checkpoint.save(small_disk / "last", lambda folder: write(folder, 50_000), {"step": 1})
    for size in (150_000, 10**6):
        with pytest.raises(DiskError, match=r"No space left on device; [\d,]+ bytes needed, \d[\d,]* bytes free"):
            checkpoint.save(small_disk / "last", lambda folder, size=size: write(folder, 2 * size), {"step": 2})
        assert checkpoint.trusted(small_disk / "last").manifest["step"] == 1
        assert [path.name for path in small_disk.iterdir()] == ["last"]


def test_room_is_looked_at_before_a_run_and_before_each_save(tmp_path, small_base, monkeypatch):
    """Nothing is made, and nothing of the save before is moved."""
    monkeypatch.setattr(disk, "free_bytes", lambda path: 20_000)
    with pytest.raises(DiskError, match="bytes needed, 20,000 bytes free"):
        train.main(toy_flags(tmp_path, small_base, **TINY))
    assert not (tmp_path / "outputs").exists()
    monkeypatch.setattr(disk, "free_bytes", lambda path: 10**9)
    save = tmp_path / "last"
    checkpoint.save(save, lambda folder: checkpoint.save_json(folder / "a.json", "x" * 30_000), {"step": 1})
    monkeypatch.setattr(disk, "free_bytes", lambda path: 20_000)
    with pytest.raises(DiskError, match=r"last: No space left on device; 3\d,\d+ bytes needed, 20,000 bytes free"):
        checkpoint.save(save, lambda folder: pytest.fail("it was begun"), {"step": 2})
    assert checkpoint.trusted(save).manifest["step"] == 1


def test_a_tokenizer_that_cannot_be_written_is_one_line(tmp_path, small_base, monkeypatch):
    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(DiskError, match=r"tokenizer.json: No space left on device; [1-9][\d,]+ bytes needed"):
        train.main(toy_flags(tmp_path, small_base, **TINY))


# ---- at every event of a whole run ----------------------------------------------------------------------------------


def full_at(main, flags: list[str], folder: Path, at: int) -> tuple[int, str]:
    """(exit status, stderr) of a command whose disk is full at the at-th event and from then on."""

    def arm():
        patch, events = pytest.MonkeyPatch(), []
        names = ("fs_write", "fs_sync", "fs_rename", "save_file")

        def hook(name, real):
            def hooked(*args, **kwargs):
                events.append(name)
                if len(events) >= at and name == "save_file":
                    raise SafetensorError(RUST.format("No space left on device", 28))
                if len(events) >= at:
                    raise OSError(28, "No space left on device")
                return real(*args, **kwargs)

            return hooked

        for name in names:
            hooked = hook(name, getattr(checkpoint, name))
            for module in (checkpoint, disk):
                patch.setattr(module, name, hooked, raising=False)

    status, _, err = finish(start(main, flags, folder, before=arm), folder)
    return status, err


def told_in_one_line(status: int, err: str) -> bool:
    """Whether a command ended as it should on a full disk."""
    errors = [line for line in err.splitlines() if "error: " in line]
    words = "No space left on device; ", "bytes needed"
    return status == 1 and "Traceback" not in err and len(errors) == 1 and all(word in errors[0] for word in words)


def check_full(main, flags_of, tmp_path, every: int) -> int:
    """A disk that is full from some event on: one line, status 1, and the run goes on once there is room."""
    (tmp_path / "whole").mkdir()
    count = events_of(main, flags_of(tmp_path / "whole"), tmp_path / "whole")
    for at in range(1 + every // 3, count + 1, every):
        folder = tmp_path / str(at)
        folder.mkdir()
        flags = flags_of(folder)
        status, err = full_at(main, flags, folder, at)
        if status == 0:  # events of appending and removing do not fail here, so there are fewer
            break
        assert told_in_one_line(status, err), (at, err)
        if not list(folder.glob("outputs/*/*/run_*/result.json")):
            status, _, err = forked(main, [*flags, "--resume", "auto"], folder)
            assert status == 0, (at, err)
        for run in (path.parent for path in folder.glob("outputs/*/*/run_*/result.json")):
            seals.verify(run)
            assert checkpoint.trusted(run / "best") and checkpoint.trusted(run / "last")
        shutil.rmtree(folder)
    return count


def test_a_full_disk_at_some_events_of_a_run(small_base, tmp_path):
    check_full(train.main, lambda folder: toy_flags(folder, small_base, **TINY), tmp_path, every=60)


@pytest.mark.slow
def test_a_full_disk_at_every_event_of_a_run(small_base, tmp_path):
    print(check_full(train.main, lambda folder: toy_flags(folder, small_base, **TINY), tmp_path, every=1))


@pytest.mark.slow
def test_a_full_disk_at_many_events_of_a_run_of_cpt(source, tmp_path):  # noqa: F811
    print(check_full(cpt.main, lambda folder: cpt_flags(source, folder, max_steps=4), tmp_path, every=1))


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", range(8, 1300, 92))
def test_a_run_on_a_real_disk_that_is_too_small(small_disk, tmp_path, small_base, kilobytes):
    """The check beforehand left out: the disk itself refuses, from the first file to the last save."""
    subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", small_disk], check=True)
    flags = toy_flags(tmp_path, small_base, **TINY, outputs=small_disk)
    pids = start(train.main, flags, tmp_path, before=lambda: setattr(disk, "need_room", lambda *args: None))
    status, _, err = finish(pids, tmp_path)
    assert told_in_one_line(status, err), err
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    status, _, err = forked(train.main, [*flags, "--resume", "auto"], tmp_path)
    assert status == 0, err


# ---- a best save that was damaged -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_base) -> Path:
    """A run whose best saves are those of steps 2 and 4, its last one."""
    return Path(train.main(toy_flags(tmp_path_factory.mktemp("best"), small_base, **SHORT))["run"])


def damage(save: Path) -> None:
    path = next(save.glob("*model.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def score_at(run: Path, step: int) -> float:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next(line["eval"]["log_loss"] for line in lines if "eval" in line and line["step"] == step)


@pytest.mark.parametrize("scores", [True, False])
def test_a_run_whose_best_save_is_damaged_ends_with_the_one_before(run, tmp_path, scores, capsys):
    """Every time it is resumed; scores: whether saves hold their score, which older ones do not."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    assert json.loads((run / "result.json").read_text())["best_step"] == 4
    if not scores:
        manifest = json.loads((copy / ".best.1/manifest.json").read_text())
        del manifest["best"], manifest["seal"]
        (copy / ".best.1/manifest.json").write_text(json.dumps({**manifest, "seal": seals.seal_of(manifest)}))
    damage(copy / "best")
    for _ in range(2):
        (copy / "result.json").unlink()
        capsys.readouterr()
        result = train.main(["--resume", str(copy)])
        assert "cannot be trusted" in capsys.readouterr().out
        assert result["best_step"] == 2 and result["metrics"]["log_loss"] == pytest.approx(score_at(run, 2), abs=1e-5)
    assert trained.load_run(copy).saves == (copy / ".best.1",)


def test_a_run_without_any_best_save_is_refused_in_one_line(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "result.json").unlink()
    for save in ("best", ".best.1"):
        damage(copy / save)
    for words in ("no save can be trusted", "best is missing, but step 4 was saved there"):
        status, _, err = forked(train.main, ["--resume", str(copy)], tmp_path)
        assert status == 3 and words in err and "Traceback" not in err and err.count("error: ") == 1, err
        for save in ("best", ".best.1"):
            shutil.rmtree(copy / save, ignore_errors=True)


def test_a_damaged_best_save_of_cpt_is_replaced_by_the_one_before(source, tmp_path):  # noqa: F811
    flags = cpt_flags(source, tmp_path, max_steps=6, eval_every=2, save_every=2)
    copy = Path(cpt.main(flags)["run"])
    steps = [checkpoint.verify(copy / save)["step"] for save in (".best.1", "best")]
    (copy / "result.json").unlink()
    damage(copy / "best")
    assert cpt.main(["--resume", str(copy)])["best_step"] == steps[0] < steps[1]


def test_an_interrupt_in_a_write_leaves_nothing(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 2, "before", stop)
        disk.write_atomic(tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())
