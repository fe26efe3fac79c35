"""A command that is killed while it scores or writes continues from its last batch, to the same bytes."""

import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import unsealed
from test_ddp import forked, forks, toy_flags, write_rows

import checkpoint
import generate
import infer
import language
import numerics
import parts
import train

pytestmark = forks
EVENTS = "fs_write fs_sync fs_rename fs_remove append_whole".split()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program catches it."""


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, small_base) -> tuple[Path, Path]:
    """A run, and rows to predict."""
    folder = tmp_path_factory.mktemp("parts")
    run = Path(train.main(toy_flags(folder, small_base, max_steps=3, eval_every=3))["run"])
    return run, write_rows(folder / "new.csv", 20, skip=14)


def flags_of(fitted, out, **changes) -> list[str]:
    run, rows = fitted
    settings = {"runs": run, "input": rows, "output": out, "submission": "", "max_tokens": 200, **changes}
    return ["--force", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def another(run: Path, folder: Path) -> Path:
    """A copy of a run with other weights."""
    shutil.copytree(run, folder)
    manifest = checkpoint.verify(folder / "best")
    tensors = checkpoint.load_tensors(folder / "best/adapter_model.safetensors")
    checkpoint.save_tensors(folder / "best/adapter_model.safetensors", {k: t * 1.5 for k, t in tensors.items()})
    checkpoint.seal(folder / "best", {k: manifest[k] for k in ("step", "base", "versions")})
    return folder


def stop_at(monkeypatch, number: int, error) -> list[str]:
    """Raise before the file-system event of this number; appends and writes leave half of their bytes behind."""
    calls = []
    originals = {name: getattr(checkpoint, name) for name in EVENTS}
    for name, original in originals.items():

        def event(*args, name=name, original=original):
            calls.append(name)
            if len(calls) == number:
                if name in ("append_whole", "fs_write"):
                    data = args[1].encode() if isinstance(args[1], str) else args[1]
                    with open(args[0], "ab") as f:
                        f.write(data[: len(data) // 2])
                raise error
            return original(*args)

        monkeypatch.setattr(checkpoint, name, event)
    return calls


def counted(monkeypatch, owner, name: str) -> list:
    """The calls of a function that is still carried out."""
    calls, original = [], getattr(owner, name)

    def call(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


@pytest.mark.parametrize("error", [Killed(), OSError(errno.ENOSPC, "No space left on device")], ids=["killed", "full"])
def test_infer_continues_after_each_file_system_event(fitted, tmp_path, monkeypatch, error):
    """Stopped at every event: the same bytes, at most one micro-batch done twice, nothing left behind."""
    whole = tmp_path / "whole.csv"
    with monkeypatch.context() as m:
        calls = stop_at(m, 0, error)
        batches = counted(m, numerics, "autocast")
        infer.main(flags_of(fitted, whole))
    assert calls.count("append_whole") == len(batches) > 3
    for number in range(1, len(calls) + 1):
        out = tmp_path / str(number) / "out.csv"
        with monkeypatch.context() as m:
            stop_at(m, number, error)
            before = counted(m, numerics, "autocast")
            with pytest.raises(type(error)):
                infer.main(flags_of(fitted, out))
        assert not out.exists() or out.read_bytes() == whole.read_bytes(), "never a part of an output"
        with monkeypatch.context() as m:
            after = counted(m, numerics, "autocast")
            infer.main(flags_of(fitted, out, overwrite="true"))
        assert out.read_bytes() == whole.read_bytes(), f"event {number}: {calls[number - 1]}"
        assert len(before) + len(after) <= len(batches) + 1
        left = [path.name for path in out.parent.iterdir() if not path.name.endswith(".tmp")]
        assert left == ["out.csv"]


def test_two_ranks_continue_what_one_began(fitted, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    infer.main(flags_of(fitted, whole))
    with monkeypatch.context() as m:
        stop_at(m, 3, Killed())
        with pytest.raises(Killed):
            infer.main(flags_of(fitted, out))
    status, stdout, err = forked(infer.main, flags_of(fitted, out), tmp_path, 2)
    # Two are kept; the other rank may have added some of its own before rank 0 looks.
    assert status == 0 and re.search(r"[1-9] of \d+ micro-batches were scored before", stdout), err
    assert out.read_bytes() == whole.read_bytes() and not parts.folder_of(out).exists()


@pytest.mark.parametrize("change", ["input", "run", "max_tokens", "limit"])
def test_parts_of_another_input_run_or_setting_are_not_taken(fitted, tmp_path, monkeypatch, capsys, change):
    """The digest of what the scores depend on: what another command left is neither read nor kept."""
    run, rows = fitted
    changes = {"max_tokens": {"max_tokens": 150}, "limit": {"limit": 15}}.get(change, {})
    if change == "input":
        changes = {"input": write_rows(tmp_path / "other.csv", 20, skip=16)}
    if change == "run":
        changes = {"runs": another(run, tmp_path / "run")}
    fresh, out = tmp_path / "fresh.csv", tmp_path / "out.csv"
    infer.main(flags_of(fitted, fresh, **changes))
    with monkeypatch.context() as m:
        stop_at(m, 4, Killed())
        with pytest.raises(Killed):
            infer.main(flags_of(fitted, out))
    capsys.readouterr()
    infer.main(flags_of(fitted, out, **changes))
    assert "were scored before" not in capsys.readouterr().out
    assert out.read_bytes() == fresh.read_bytes() and not parts.folder_of(out).exists()


def test_a_family_and_a_time_limit_continue_too(fitted, tmp_path, monkeypatch):
    """Two saves in turn: each has its own digest, and the mean of their logits is that of an uninterrupted run."""
    run, rows = fitted
    family = tmp_path / "family"
    unsealed(shutil.copytree(run, family))
    (family / "family.json").write_text(
        json.dumps({"members": {"a": str(run), "b": str(another(run, tmp_path / "b"))}})
    )
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    both = (family, rows)
    infer.main(flags_of(both, whole))
    for number in (3, 9):
        with monkeypatch.context() as m:
            stop_at(m, number, Killed())
            with pytest.raises(Killed):
                infer.main(flags_of(both, out))
    assert infer.main(flags_of(both, out, time_limit="1000h"))["unscored"] == 0
    assert out.read_bytes() == whole.read_bytes()


def test_generated_answers_continue_to_the_same_file(small_base, tmp_path, monkeypatch):
    """Stopped at each event, the file is absent or whole, and at most one batch is completed twice."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"What is {i} + 2?", "row_id": f"a{i}"}) + "\n" for i in range(5)))
    flags = ["--base", small_base, "--input", str(prompts), "--id_column", "row_id", "--batch_size", "2"]
    flags += ["--max_new_tokens", "4", "--chat", "no", "--temperature", "1", "--output"]
    whole = tmp_path / "whole.jsonl"
    with monkeypatch.context() as m:
        calls = stop_at(m, 0, Killed())
        generate.main([*flags, str(whole)])
    assert [json.loads(line)["id"] for line in whole.read_text().splitlines()] == [f"a{i}" for i in range(5)]
    for number in range(1, len(calls) + 1):
        out = tmp_path / str(number) / "out.jsonl"
        with monkeypatch.context() as m:
            stop_at(m, number, Killed())
            done = counted(m, language, "complete")
            with pytest.raises(Killed):
                generate.main([*flags, str(out)])
        assert not out.exists() or out.read_bytes() == whole.read_bytes()
        with monkeypatch.context() as m:
            more = counted(m, language, "complete")
            generate.main([*flags, str(out), "--overwrite"])
        assert out.read_bytes() == whole.read_bytes() and len(done) + len(more) <= 4
        assert not parts.folder_of(out).exists()


def test_damaged_parts_are_done_again(tmp_path):
    """Cut anywhere, or with a byte changed: whole batches before the damage are read, and nothing else."""
    out = tmp_path / "out.csv"
    writer = parts.Parts(out, "d")
    batches = {3: b"abc", 0: b"", 7: bytes(range(50))}
    for number, data in batches.items():
        writer.append(number, data)
    assert parts.Parts(out, "d").read() == batches and parts.Parts(out, "other").read() == {}
    whole = writer.path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        for data in (whole[:place], bytes(damaged)):
            writer.path.write_bytes(data)
            done = parts.Parts(out, "d").read()
            assert done.items() < batches.items()
    parts.remove(out)
    parts.remove(out)
    assert not list(tmp_path.iterdir())


def test_the_digest_is_of_the_model_and_the_settings():
    torch.manual_seed(0)
    model = torch.nn.Linear(100, 100).to(torch.bfloat16)
    digest = parts.digest_of(model, 1, "a")
    assert digest == parts.digest_of(model, 1, "a") != parts.digest_of(model, 1, "b")
    with torch.no_grad():
        model.bias += 1
    assert digest != parts.digest_of(model, 1, "a")
