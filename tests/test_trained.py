"""Trained models on disk: families of runs, whole models as files, and runs that start from other runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import unsealed
from test_ddp import forks, toy_flags, write_rows

import chains
import checkpoint
import files
import infer
import lora
import splits
import train
import trained
from errors import UserError

pytestmark = forks
SILENT = lambda *words: None  # noqa: E731


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, small_base) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    return Path(train.main(toy_flags(folder, small_base, max_steps=4, eval_every=4))["run"])


# ---- families -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, names",
    [
        ({"folds": 0, "fold": "all", "seeds": []}, [""]),
        ({"folds": 5, "fold": "2", "seeds": []}, [""]),
        ({"folds": 5, "fold": 2}, [""]),
        ({}, [""]),
        ({"folds": 2, "fold": "all", "seeds": []}, ["fold_0", "fold_1"]),
        ({"folds": 0, "fold": "all", "seeds": ["7"]}, ["seed_7"]),
        ({"folds": 3, "fold": "1", "seeds": ["1", "4"]}, ["seed_1", "seed_4"]),
        (
            {"folds": 2, "fold": "all", "seeds": ["1", "2"]},
            ["seed_1_fold_0", "seed_1_fold_1", "seed_2_fold_0", "seed_2_fold_1"],
        ),
    ],
)
def test_members_of_runs_that_have_no_family_file(tmp_path, config, names):
    """As configs of every version name them."""
    (tmp_path / "config.json").write_text(json.dumps({"base": "x", **config}))
    assert trained.members(tmp_path) == {name: tmp_path / name for name in names}
    assert [name == "" for name in names] != [True] or trained.members(tmp_path)[""] == tmp_path


def test_a_family_file_names_its_members_wherever_they_are(fitted, tmp_path):
    shutil.copytree(fitted, tmp_path / "family/near")
    shutil.copytree(fitted, tmp_path / "far")
    for name in ("config.json", "labels.json"):
        shutil.copy(fitted / name, tmp_path / "family" / name)
    members = {"seed_1": "near", "seed_2": str(tmp_path / "far")}
    (tmp_path / "family/family.json").write_text(json.dumps({"members": members, "folds": 0, "seeds": [1, 2]}))
    family = tmp_path / "family"
    assert trained.members(family) == {"seed_1": family / "near", "seed_2": tmp_path / "far"}
    run = trained.load_run(family)
    assert run.saves == (family / "near/best", tmp_path / "far/best") and run.decision is None
    one = trained.load_run(fitted).predict(["1 + 1"])[0]
    np.testing.assert_allclose(run.predict(["1 + 1"])[0]["logits"], one["logits"], atol=1e-6)
    with pytest.raises(UserError, match="is 2 runs; name one of them, such as .*near"):
        infer.main(["--runs", str(family), "--input", "x.csv", "--merge", "true"])
    shutil.rmtree(tmp_path / "far/best")
    shutil.rmtree(tmp_path / "far/.best.1", ignore_errors=True)
    with pytest.raises(UserError, match=r"far: no best/ save: finish it with .* --resume .*far"):
        trained.load_run(family)


def test_rows_that_no_save_of_a_family_reached_are_nan_and_others_a_mean(fitted, monkeypatch):
    run = trained.load_run(fitted)
    run.saves = (fitted / "best",) * 2
    scores = iter(
        [np.array([[1.0, 3.0], [2.0, 4.0], [np.nan] * 2]), np.array([[3.0, 5.0], [np.nan] * 2, [np.nan] * 2])]
    )
    monkeypatch.setattr(trained.evaluate, "score", lambda *given: next(scores).astype(np.float32))
    logits, _ = run.logits([{"Question": "1"}] * 3, seconds=9.0)
    np.testing.assert_array_equal(logits, np.array([[2, 4], [2, 4], [np.nan, np.nan]], np.float32))
    scores = iter([np.array([[1.0, 3.0]]), np.array([[np.nan, 5.0]])])
    assert np.isnan(run.logits([{"Question": "1"}])[0][0, 0]), "without a limit a score that is not finite shows"


# ---- whole models as files ------------------------------------------------------------------------------------------


def test_an_export_keeps_the_files_of_a_folder_and_writes_weights_last(fitted, tmp_path, monkeypatch):
    run = trained.load_run(fitted)
    lora.merge(run.model)
    names = []
    rename = checkpoint.fs_rename
    monkeypatch.setattr(checkpoint, "fs_rename", lambda old, new: (names.append(new.name), rename(old, new)))
    (tmp_path / "base").mkdir()
    for name, text in (("README.md", "mine"), ("config.json", "{}")):
        (tmp_path / "base" / name).write_text(text)
    for folder in (tmp_path / "base", tmp_path / "new"):
        trained.export(
            folder, run.model, run.tokenizer, {"dtype": "float32", "a": 1}, torch.bfloat16, {"exported": "x"}
        )
        tensors = checkpoint.load_tensors(folder / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert not [name for name in tensors if "lora" in name]
        assert json.loads((folder / "config.json").read_text()) == {"dtype": "bfloat16", "a": 1}
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert (tmp_path / "base/README.md").read_text() == "mine"
    assert names.index("model.safetensors") > max(names.index("config.json"), names.index("tokenizer.json"))
    assert names[-1] == "new", "a new folder appears whole"
    checkpoint.verify(tmp_path / "new")


# ---- runs that start from other runs --------------------------------------------------------------------------------


def read_again(path: Path, **changes):
    """(config, training rows, validation rows) as a run on a file has them."""
    cfg, _ = trained.run_facts(path)
    cfg = replace(cfg, init_from=str(path), **changes)
    rows, val, _ = splits.read(cfg, SILENT)
    return cfg, *splits.cut(cfg, rows, val)


@pytest.fixture
def held_out_run(tmp_path, small_base) -> Path:
    """A run on 58 rows that were cut by a seed."""
    flags = toy_flags(tmp_path, small_base, val_data=None, val_size=0.2, max_steps=2, eval_every=2, audit="none")
    return Path(train.main(flags)["run"])


def test_a_chain_may_not_validate_on_texts_that_were_trained_on(held_out_run, tmp_path):
    cfg, train_rows, judges = read_again(held_out_run)
    note = chains.check_chain(cfg, train_rows, judges)
    assert note == f"note: {len(train_rows.ids)} training rows were seen before by --init_from {held_out_run}"
    other = read_again(held_out_run, split_seed=99)
    with pytest.raises(UserError, match="validation rows of this run were trained on there: keep its split"):
        chains.check_chain(*other)
    # the same texts in another file, under other ids and in other spelling
    copy = tmp_path / "copy.jsonl"
    learned = [{"id": f"x{i}", "Question": f"  {row['Question'].upper()}", "label": row["label"]}
               for i, row in enumerate(train_rows.rows)]  # fmt: skip
    copy.write_text("".join(json.dumps(row) + "\n" for row in learned), encoding="utf-8")
    with pytest.raises(UserError, match="were trained on there"):
        chains.check_chain(*read_again(held_out_run, val_data=str(copy)))
    fresh = write_rows(tmp_path / "fresh.csv", 16, skip=20)
    assert chains.check_chain(*read_again(held_out_run, train_data=str(fresh), val_data=str(fresh))) == ""


def test_a_text_that_the_earlier_run_had_on_both_sides_does_not_stop_a_chain_with_its_split(tmp_path, small_base):
    """Its audit warned of it; the validation rows are the same."""
    val = write_rows(tmp_path / "judges.csv", 23, skip=10)
    rows = files.read_rows(str(write_rows(tmp_path / "rows.csv", 58)), "x")
    rows.append({**files.read_rows(str(val), "x")[0], "id": "again"})
    both = tmp_path / "both.jsonl"
    both.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    same = {"max_steps": 2, "eval_every": 2, "audit": "none"}
    run = Path(train.main(toy_flags(tmp_path, small_base, train_data=both, val_data=val, **same))["run"])
    assert chains.check_chain(*read_again(run)).startswith("note: 59 training rows")
    with pytest.raises(UserError, match="1 validation rows of this run were trained on there"):
        chains.check_chain(*read_again(run, val_data=str(write_rows(tmp_path / "val.csv", 16, skip=10))))


@pytest.mark.parametrize("change", ["gone", "other rows", "no split.csv"])
def test_a_chain_whose_files_are_gone_or_changed_is_warned_of(held_out_run, tmp_path, change):
    cfg, train_rows, judges = read_again(held_out_run)
    path = Path(cfg.train_data)
    if change == "gone":
        path.unlink()
    elif change == "other rows":
        write_rows(path, 40, skip=20)
    else:
        (unsealed(held_out_run) / "split.csv").unlink()
    warning = chains.check_chain(cfg, train_rows, judges)
    assert warning.startswith(
        f"warning: cannot check whether {held_out_run} was trained on validation rows of this run"
    )


def test_a_run_without_a_predecessor_has_no_chain(fitted):
    cfg, train_rows, judges = read_again(fitted)
    assert chains.check_chain(replace(cfg, init_from=""), train_rows, judges) == "" and chains.chain("") == []
