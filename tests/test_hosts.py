"""What hosts and hasty commands do: outputs that cannot be written or are inputs, terminals, rank variables, rights.

Each is right, or refused in one line before anything is loaded, and no file that was there is lost.
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from test_ddp import toy_flags, write_rows

import bases
import checks
import cli
import cpt
import ddp
import ensemble
import errors
import folds
import generate
import infer
import latex
import model as models
import report
import slices
import train
from errors import UserError


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, small_base) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    return Path(train.main(toy_flags(folder, small_base, max_steps=2, eval_every=2))["run"])


@pytest.fixture
def unloaded(monkeypatch):
    """Fails the test where weights are loaded."""

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(models, "from_weights", loaded)


def refused(main, *flags) -> str:
    with pytest.raises(UserError) as e:
        main([str(flag) for flag in flags])
    assert e.value.exit_status == 2 and "\n" not in str(e.value)
    return str(e.value)


# ---- outputs --------------------------------------------------------------------------------------------------------


def targets(folder: Path, suffix: str) -> dict[str, tuple[Path, str]]:
    """Outputs that cannot be written, and what is said of them."""
    (folder / f"folder{suffix}").mkdir()
    (folder / "file").write_text("x")
    os.mkfifo(folder / f"fifo{suffix}")
    os.symlink(folder / "nowhere" / "x", folder / f"dangling{suffix}")
    os.symlink(folder / "nowhere", folder / "lost")
    return {
        "a folder": (folder / f"folder{suffix}", "it is a folder"),
        "within a file": (folder / "file" / f"x{suffix}", "file is not a folder"),
        "a pipe": (folder / f"fifo{suffix}", "it is no regular file"),
        "a link to nothing": (folder / f"dangling{suffix}", "it is no regular file"),
        "within a link to nothing": (folder / "lost" / f"x{suffix}", "lost is not a folder"),
        "too long": (folder / f"{'y' * 250}{suffix}", "takes no new file \\(File name too long\\)"),
        "too long above": (folder / ("y" * 300) / f"x{suffix}", "takes no new file \\(File name too long\\)"),
        "not writable": (Path(f"/proc/x{suffix}"), "/proc takes no new file"),
    }


def test_outputs_that_cannot_be_written_are_refused_by_every_command(fitted, small_base, tmp_path, unloaded):
    """Before anything is loaded, by the same words, and nothing is left behind."""
    rows = write_rows(tmp_path / "rows.csv", 9)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers/a.tex").write_text("Words that are here to stay, for ever and ever.")
    (tmp_path / "p.jsonl").write_text('{"prompt": "Let"}\n')
    commands = [
        (infer.main, ["--runs", fitted, "--input", rows, "--output"]),
        (ensemble.main, ["--runs", fitted, rows, "--input", rows, "--output"]),
        (generate.main, ["--base", small_base, "--input", tmp_path / "p.jsonl", "--output"]),
        (latex.main, [tmp_path / "papers"]),
    ]
    for target, words in targets(tmp_path, ".jsonl").values():
        before = set(tmp_path.iterdir())
        for main, flags in commands:
            with pytest.raises(UserError, match=f"{words}.*; name another file"):
                main([str(flag) for flag in (*flags, target)])
        assert set(tmp_path.iterdir()) == before


def test_folders_that_cannot_be_made_are_refused_by_every_command(fitted, small_base, tmp_path, unloaded):
    rows = write_rows(tmp_path / "rows.csv", 40)
    commands = [
        (train.main, ["--base", small_base, "--train_data", rows, "--outputs"]),
        (folds.main, ["--base", small_base, "--train_data", rows, "--folds", 2, "--outputs"]),
        (cpt.main, ["--base", small_base, "--train_data", tmp_path, "--outputs"]),
        (cpt.main, ["--base", small_base, "--train_data", tmp_path, "--outputs", tmp_path / "o", "--export"]),
        (infer.main, ["--runs", fitted, "--input", rows, "--export"]),
        (slices.main, ["--train_data", rows, "--slices", 2, "--output"]),
        (report.main, [fitted, "--output"]),
    ]
    known = targets(tmp_path, "")
    for case in ("within a file", "within a link to nothing", "too long", "not writable"):
        target, words = known[case]
        for main, flags in commands:
            with pytest.raises(UserError, match=f"{words}.*; name another folder"):
                main([str(flag) for flag in (*flags, target)])
    assert not (tmp_path / "o").exists()
    assert "file is not a folder" in refused(train.main, "--train_data", rows, "--outputs", tmp_path / "file")


def test_what_is_needed_is_not_refused(tmp_path, monkeypatch):
    """New folders, a link to a file, a file to replace, long names that fit, a relative name; and nothing is made."""
    (tmp_path / "real.csv").write_text("x")
    os.symlink(tmp_path / "real.csv", tmp_path / "link.csv")
    for name in ("new.csv", "a/b/c/new.csv", "link.csv", "real.csv", "y" * 200 + ".csv", "é 体育.csv", ".hidden.csv"):
        checks.need_output(str(tmp_path / name), "--output", "", "absent.csv", tmp_path / "absent")
    monkeypatch.chdir(tmp_path)
    checks.need_output("new.csv", "--output")
    assert checks.folder_problem("a/b") == checks.folder_problem(".") == ""
    assert {path.name for path in tmp_path.iterdir()} == {"real.csv", "link.csv"}
    # a dry run and a run that is resumed elsewhere need no place for new runs
    for changes in ({"dry_run": True}, {"resume": "some/run"}):
        checks.check(train.TrainConfig(train_data="x.csv", outputs="real.csv", **changes))


def test_no_output_replaces_what_is_read(fitted, small_base, tmp_path, unloaded):
    """By its name, another spelling of it, and links; with --overwrite too. The files are as they were."""
    rows = Path(write_rows(tmp_path / "rows.csv", 9))
    other = Path(write_rows(tmp_path / "other.csv", 9))
    (tmp_path / "p.jsonl").write_text('{"prompt": "Let"}\n')
    (tmp_path / "shots.jsonl").write_text('{"prompt": "Let", "response": "x"}\n')
    os.symlink(rows, tmp_path / "soft.csv")
    os.link(rows, tmp_path / "hard.csv")
    settings = json.loads((fitted / "config.json").read_text())
    spellings = [rows, tmp_path / "x/../rows.csv", tmp_path / "soft.csv", tmp_path / "hard.csv"]
    (tmp_path / "x").mkdir()
    base = ["--base", small_base, "--input", tmp_path / "p.jsonl", "--examples", tmp_path / "shots.jsonl"]
    own = [settings["train_data"], settings["val_data"], fitted / "val_predictions.csv", fitted / "split.csv"]
    commands = [
        *((infer.main, ["--runs", fitted, "--input", rows], target) for target in (*spellings, *own)),
        *((ensemble.main, ["--runs", fitted, other, "--input", rows], target) for target in (rows, other, *own)),
        *((generate.main, base, tmp_path / name) for name in ("p.jsonl", "shots.jsonl")),
    ]
    before = {path: Path(path).read_bytes() for path in (*spellings, *own, other, tmp_path / "p.jsonl")}
    for main, flags, target in commands:
        for more in ([], ["--overwrite"]):
            assert "this file is read, and would be replaced" in refused(main, *flags, "--output", target, *more)
    assert all(Path(path).read_bytes() == content for path, content in before.items())


def test_latex_writes_no_source(tmp_path):
    for name in ("main.tex", "refs.bib", "notes.md"):
        (tmp_path / name).write_text("Words that are here to stay, for ever and ever.")
        assert "expected a file to write that ends in .jsonl" in refused(latex.main, tmp_path, tmp_path / name)
        assert (tmp_path / name).read_text().startswith("Words")


def test_scripts_of_training_files_replace_no_input(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "runs")
    import example_rows
    import pseudo_labels

    rows = write_rows(tmp_path / "rows.csv", 9)
    for main, flags in (
        (example_rows.main, [rows, rows, "--examples", "Question=0", "--column", "Question"]),
        (pseudo_labels.main, [tmp_path / "a.csv", tmp_path / "b.csv", rows, rows]),
    ):
        assert "this file is read, and would be replaced" in refused(main, *flags, "--overwrite")


# ---- terminals ------------------------------------------------------------------------------------------------------


NARROW = [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]


@pytest.mark.parametrize("env", NARROW, ids=["ascii", "C"])
def test_a_terminal_that_cannot_show_a_text_ends_no_command(env, tmp_path):
    """The text is escaped, the last line is whole, and files hold the text itself."""
    (tmp_path / "体育").mkdir()
    (tmp_path / "体育/новость.tex").write_text(
        "Words that are here to stay, for ever and ever, 体育.", encoding="utf-8"
    )
    target = tmp_path / "体育.jsonl"
    flags = [sys.executable, ROOT / "latex.py", tmp_path / "体育", target]
    done = subprocess.run(flags, env={**os.environ, **env}, capture_output=True)
    assert done.returncode == 0 and b"\\u" in done.stdout.splitlines()[0], done.stderr
    assert json.loads(done.stdout.decode().splitlines()[-1])["documents"] == 1
    assert "体育" in json.loads(target.read_text(encoding="utf-8"))["text"]


def test_labels_that_the_terminal_cannot_show(tmp_path, monkeypatch):
    """Of every command: each calls cli.early first."""
    rows = "".join(f"{i},text {i},{'новость 体育 été'.split()[i % 3]}\n" for i in range(30))
    (tmp_path / "rows.csv").write_text("id,q,label\n" + rows, encoding="utf-8")
    flags = ["--train_data", str(tmp_path / "rows.csv"), "--slices", "2", "--output", str(tmp_path / "slices")]
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="cp1252", write_through=True))
    cli.early(slices.SlicesConfig, {}, slices.__doc__, flags)
    assert slices.main(flags)["rows"] == 30
    assert "\\u4f53\\u80b2" in shown.getvalue().decode("cp1252") and "été" in shown.getvalue().decode("cp1252")


def test_a_stream_that_takes_every_text_is_left_as_it_is(monkeypatch):
    class Notebook:  # has no reconfigure
        pass

    for stream in (Notebook(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        errors.print_anything()


# ---- rank variables -------------------------------------------------------------------------------------------------

VARIABLES = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
PLACE = "MASTER_ADDR=a MASTER_PORT=29500"


@pytest.fixture
def environment(monkeypatch):
    """Sets the rank variables of a text such as "RANK=1 WORLD_SIZE=2", and no other."""

    def set_to(words: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for word in words.split():
            monkeypatch.setenv(*word.split("="))

    return set_to


@pytest.mark.parametrize(
    "words, problem",
    [
        ("WORLD_SIZE=2", "without RANK, MASTER_ADDR, MASTER_PORT"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0", "without MASTER_ADDR, MASTER_PORT"),
        ("RANK=1", "expected ranks below WORLD_SIZE"),
        ("LOCAL_RANK=1", "expected ranks below WORLD_SIZE"),
        ("WORLD_SIZE=0", "expected ranks below WORLD_SIZE"),
        (f"RANK=2 WORLD_SIZE=2 {PLACE}", "expected ranks below WORLD_SIZE"),
        ("WORLD_SIZE=", "expected whole numbers"),
        ("RANK=", "expected whole numbers"),
        ("RANK=-1", "expected whole numbers"),
        ("WORLD_SIZE=two", "expected whole numbers"),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=x", "expected whole numbers"),
    ],
)
def test_rank_variables_that_another_program_left_are_named(environment, words, problem):
    environment(words)
    for start in (ddp.ranks, ddp.setup):
        with pytest.raises(UserError, match=f"the environment has .*{problem}: unset them, or start with torchrun"):
            start()


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", (0, 0, 1)),
        ("WORLD_SIZE=1 RANK=0", (0, 0, 1)),
        ("LOCAL_RANK=0", (0, 0, 1)),
        (PLACE, (0, 0, 1)),
        (f"RANK=3 LOCAL_RANK=1 WORLD_SIZE=4 {PLACE}", (3, 1, 4)),
        (f"RANK=3 WORLD_SIZE=4 {PLACE}", (3, 0, 4)),  # Slurm with a GPU for each task
    ],
)
def test_rank_variables_of_torchrun_and_none_are_taken(environment, words, expected):
    environment(words)
    assert ddp.ranks() == expected


def test_a_command_that_has_no_ranks_names_them_too(environment, capsys):
    """With RANK=1 left over it would print no result."""
    environment("RANK=1")
    with pytest.raises(SystemExit) as e:
        ddp.launch(lambda argv: {"rows": 1})
    assert e.value.code == 2 and "RANK=1, expected ranks below WORLD_SIZE" in capsys.readouterr().err


# ---- rights ---------------------------------------------------------------------------------------------------------


@contextmanager
def another_user():
    """Inside the block this process is no root, who may read everything."""
    if os.geteuid():
        yield
        return
    os.setresuid(54321, 54321, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", ""])
def test_a_base_that_may_not_be_read_is_named(name, small_base):
    """Another user's file or folder, as of a container that does not run as root."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's own are private
        os.chmod(folder, 0o755)
        base = shutil.copytree(small_base, f"{folder}/base")
        for path in (base, *Path(base).iterdir()):
            os.chmod(path, 0o755)
        os.chmod(f"{base}/{name}", 0o000)
        what = f"{name} cannot be read" if name else "this folder cannot be read"
        with another_user(), pytest.raises(UserError, match=f"--base {base}: {what}: permission denied"):
            bases.need_base(base)
        os.chmod(f"{base}/{name}", 0o755)
        with another_user():
            assert bases.need_base(base) == base
