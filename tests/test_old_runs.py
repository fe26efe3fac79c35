"""Runs made before folds.py, slices.py and generate.py were commands still load, resume and lend settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from test_ddp import forks, shas, toy_flags

import cli
import infer
import train
from configs import TrainConfig

pytestmark = forks

# What config.json held then; values that switched nothing on.
MOVED = {
    "seeds": [], "balance": False, "train_start": 0, "train_stop": 0, "split": "", "examples": [],
    "examples_column": "body", "pseudo_labels": "", "pseudo_data": "", "pseudo_min_confidence": 0.9,
    "pseudo_soft": False, "fold": "all",
}  # fmt: skip


def aged(run: Path) -> None:
    """The files of a run as they were written before."""
    config = json.loads((run / "config.json").read_text())
    for name in ("soft_share", "soft_temperature", "fold"):
        del config[name]
    (run / "config.json").write_text(json.dumps({**config, **MOVED}))
    for name in ("seal.json", "rows.json"):
        (run / name).unlink()


@pytest.fixture(scope="module")
def old(tmp_path_factory, small_base) -> Path:
    """A finished run of 18 steps, saved every 5."""
    folder = tmp_path_factory.mktemp("old")
    run = Path(train.main(toy_flags(folder, small_base, save_every=5))["run"])
    aged(run)
    return run


def test_an_old_run_predicts(old, tmp_path):
    target = tmp_path / "o.csv"
    rows = cli.read_config(TrainConfig, old).val_data
    told = infer.main(["--runs", str(old), "--input", rows, "--output", str(target)])
    assert told["rows"] == 23 and len(target.read_text().splitlines()) == 24


def test_an_old_run_is_continued_where_it_was(old, tmp_path):
    """Its newest save and its result are lost: it goes back to step 15 and ends with the same bytes."""
    run = tmp_path / "run"
    shutil.copytree(old, run)
    shutil.rmtree(run / "last")
    for name in ("result.json", "val_predictions.csv", "decision.json"):
        (run / name).unlink()
    state = run / ".last.1/state.json"
    assert json.loads(state.read_text())["at"]["step"] == 15
    result = train.main(["--resume", str(run)])
    assert result["steps"] == 18 and shas(run) == shas(old)
    for name in ("val_predictions.csv", "decision.json"):
        assert (run / name).read_bytes() == (old / name).read_bytes()


def test_settings_of_an_old_run_are_taken_with_a_note(old, tmp_path, capsys):
    cfg, given = cli.parse(TrainConfig, {}, ["--cfg", str(old), "--lr", "1e-4"])
    assert cfg == replace(cli.read_config(TrainConfig, old), lr=1e-4)
    assert given == {"lr"} and capsys.readouterr().err == ""
    values = json.loads((old / "config.json").read_text()) | {"train_stop": 20000, "examples": ["good=1"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    cli.parse(TrainConfig, {}, ["--cfg", str(tmp_path)])
    note = capsys.readouterr().err
    assert "train_stop 20000: python slices.py" in note and 'examples ["good=1"]: python runs/example_rows.py' in note
