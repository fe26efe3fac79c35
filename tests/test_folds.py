"""Folds, seeds and groups: who judges whom, a family of runs under one folder, and what they say together."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_ddp import forked, forks, run_of, shas, start, toy_flags, write_rows

import configs
import decide
import files
import infer
import metrics
import splits
import train
import trained
from errors import UserError

pytestmark = forks
QUICK = {"val_data": None, "batch_size": 8, "epochs": 1, "eval_every": 4, "audit": "none"}
SILENT = lambda *words: None  # noqa: E731


# ---- a family of runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory, small_base) -> Path:
    """Seeds 1 and 2 over 3 folds of 58 rows, never interrupted."""
    folder = tmp_path_factory.mktemp("family")
    told = train.main(toy_flags(folder, small_base, folds=3, seeds="1,2", **QUICK))
    assert told["steps"] == 6 * 5 and len(told["runs"]) == 6
    return Path(told["run"])


def facts_of(run: Path):
    cfg, labels = trained.run_facts(run)
    rows, val, _ = splits.read(cfg, SILENT)
    return cfg, labels, splits.judged(cfg, rows, val)


def test_the_out_of_fold_file_holds_each_row_once_with_the_logits_of_the_run_that_did_not_see_it(family):
    cfg, labels, judged = facts_of(family)
    ids, targets, logits = trained.validation_rows(family, cfg, labels)
    assert ids == judged.ids == [r["id"] for r in files.read_rows(cfg.train_data, "x")] and len(set(ids)) == 58
    assert np.array_equal(targets, judged.labels)
    seen, total = dict.fromkeys(ids, 0), {}
    for name, one in configs.members(cfg).items():
        theirs, _, z = trained.validation_rows(family / name, one, labels)
        for i, row in zip(theirs, z, strict=True):
            total[i], seen[i] = total.get(i, 0) + row.astype(np.float64), seen[i] + 1
    assert set(seen.values()) == {2}  # once for each seed
    np.testing.assert_allclose(logits, [total[i] / 2 for i in ids], rtol=1e-6)
    seeds = {configs.members(cfg)[n].seed for n in ("seed_1_fold_0", "seed_2_fold_0")}
    splits_of = {configs.members(cfg)[f"seed_{s}_fold_0"].split_seed for s in (1, 2)}
    assert seeds == {1, 2} and splits_of == {0}


def test_the_summary_is_that_of_its_runs_and_rows(family):
    told = json.loads((family / "result.json").read_text())
    cfg, labels, judged = facts_of(family)
    logits = trained.validation_rows(family, cfg, labels)[2]
    want = metrics.of_task("single_label", logits, judged.labels)
    assert told["metrics"] == {k: round(v, 6) for k, v in want.items()}
    each = [json.loads((family / n / "result.json").read_text())["metrics"] for n in configs.members(cfg)]
    for name in told["mean"]:
        values = [e[name] for e in each if name in e]
        assert (
            abs(told["mean"][name] - np.mean(values)) < 1e-6 and abs(told["std"][name] - np.std(values, ddof=1)) < 1e-6
        )
    low, high = told["intervals"]["micro_f1"]
    assert low <= told["metrics"]["micro_f1"] <= high and high - low > 0.05  # 58 rows
    decision = trained.read_decision(family, "single_label", 8)
    assert decision == decide.fit_decision("single_label", logits, judged.labels, "none", "out-of-fold")


def test_a_member_is_the_run_that_is_started_alone(family, tmp_path, small_base):
    """One process that trains six runs gives the same bits as one that trains one of them."""
    alone = train.main(toy_flags(tmp_path, small_base, folds=3, fold=1, seed=2, split_seed=0, **QUICK))
    mine, theirs = Path(alone["run"]), family / "seed_2_fold_1"
    assert shas(mine, "adapter_model.safetensors") == shas(theirs, "adapter_model.safetensors")
    assert (mine / "val_predictions.csv").read_bytes() == (theirs / "val_predictions.csv").read_bytes()


def test_two_ranks_train_every_fold_together(family, tmp_path, small_base):
    flags = toy_flags(tmp_path, small_base, folds=3, seeds="1,2", **QUICK)
    status, out, err = forked(train.main, flags, tmp_path, ranks=2)
    assert status == 0, out + err
    run = run_of(out)
    for file in ("val_predictions.csv", "decision.json"):
        assert (run / file).read_bytes() == (family / file).read_bytes()
    assert shas(run / "seed_1_fold_2", "adapter_model.safetensors") == shas(
        family / "seed_1_fold_2", "adapter_model.safetensors"
    )


def test_killed_in_the_middle_of_a_fold_it_goes_on_without_repeating_finished_ones(family, tmp_path, small_base):
    flags = [*toy_flags(tmp_path, small_base, folds=3, seeds="1,2", save_every=2, **QUICK), "--resume", "auto"]
    (pid,) = start(train.main, flags, tmp_path)
    logs, end = "outputs/*/*/run_0/seed_1_fold_2/metrics.jsonl", time.monotonic() + 150
    while not any(log.read_bytes().count(b"\n") >= 3 for log in tmp_path.glob(logs)):
        assert time.monotonic() < end, (tmp_path / "err.0").read_text()
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    run = next(tmp_path.glob("outputs/*/*/run_0"))
    assert sorted(p.parent.name for p in run.glob("*/result.json")) == ["seed_1_fold_0", "seed_1_fold_1"]
    before = {p: p.stat().st_mtime_ns for n in (0, 1) for p in (run / f"seed_1_fold_{n}").rglob("*") if p.is_file()}
    status, out, err = forked(train.main, flags, tmp_path)
    assert status == 0, out + err
    assert out.count("is finished") == 2 and "resumed at step 2 of 5" in out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (run / "val_predictions.csv").read_bytes() == (family / "val_predictions.csv").read_bytes()
    told = [json.loads((r / "result.json").read_text()) for r in (run, family)]
    assert all(told[0][k] == told[1][k] for k in ("metrics", "mean", "std", "intervals", "runs", "decided"))


def test_a_finished_family_is_not_begun_again(family):
    with pytest.raises(UserError, match="finished"):
        train.main(["--resume", str(family)])


def test_seeds_alone_share_one_hold_out(tmp_path, small_base):
    told = train.main(toy_flags(tmp_path, small_base, seeds="3,5", **{**QUICK, "val_size": 0.3}))
    run = Path(told["run"])
    one, two = ((run / f"seed_{s}" / "val_predictions.csv").read_text().splitlines() for s in (3, 5))
    assert [line.split(",")[0] for line in one] == [line.split(",")[0] for line in two] and one != two
    assert told["metrics"]["rows"] == len(one) - 1 and list(told["runs"]) == ["seed_3", "seed_5"]


def test_a_dry_run_of_a_family_leaves_nothing(tmp_path, small_base, capsys):
    told = train.main(toy_flags(tmp_path, small_base, folds=3, **QUICK) + ["--dry_run"])
    assert told["runs"] == 3 and "3 runs like this one" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_other_tasks_have_families_too(tmp_path, small_base, task):
    rows = files.read_rows(str(ROOT / "tiny/data/val.csv"), "x")[:60]
    with open(tmp_path / "rows.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["Question", "label"])
        for i, row in enumerate(rows):
            writer.writerow([row["Question"], i / 60 if task == "regression" else ["a", "b|c", "", "c|a"][i % 4]])
    flags = toy_flags(tmp_path, small_base, train_data=tmp_path / "rows.csv", task=task, folds=3, **QUICK)
    told = train.main(flags)
    assert told["metrics"]["rows"] == 60 and len(told["runs"]) == 3
    output = tmp_path / "p.jsonl"
    flags = ["--runs", told["run"], "--input", str(tmp_path / "rows.csv"), "--output", str(output), "--submission", ""]
    assert infer.main(flags)["rows"] == 60 and len(output.read_text().splitlines()) == 60


# ---- what a family predicts -----------------------------------------------------------------------------------------


def test_a_family_predicts_the_mean_of_its_runs(family, tmp_path):
    cfg, _, judged = facts_of(family)
    logits, _ = trained.load_run(family).logits(judged.rows)
    each = [trained.load_run(family / name).logits(judged.rows)[0] for name in configs.members(cfg)]
    np.testing.assert_allclose(logits, np.mean(each, axis=0), atol=1e-6)
    told = infer.main(
        ["--runs", str(family), "--input", cfg.train_data, "--output", str(tmp_path / "a.csv"), "--submission", ""]
    )
    shares = np.array(
        [[float(r[f"probability_{c}"]) for c in range(8)] for r in files.read_rows(str(tmp_path / "a.csv"), "x")]
    )
    decision = trained.read_decision(family, "single_label", 8)
    np.testing.assert_allclose(shares, decide.apply(decision, logits)[1], atol=1e-6)
    assert told["rows"] == 58
    once = trained.load_run(family).predict([judged.rows[0]["Question"]])[0]
    np.testing.assert_allclose(once["logits"], logits[0], atol=1e-5)


def test_one_run_is_exported_or_merged_never_a_family(family, tmp_path):
    with pytest.raises(UserError, match="is 6 runs; name one of them, such as .*seed_1_fold_0"):
        infer.main(["--runs", str(family), "--export", str(tmp_path / "e")])
    with pytest.raises(UserError, match="is 6 runs; name one of them"):
        trained.load_run(family, merge=True)
    assert not (tmp_path / "e").exists()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"folds": 1}, "--folds 1 .*expected 2 or more"),
        ({"folds": -3}, "--folds -3: expected 0 or more"),
        ({"folds": 5, "fold": 5}, "--folds 5 --fold 5: expected"),
        ({"folds": 5, "fold": "first"}, "--fold first: expected"),
        ({"fold": 2}, "--fold has no effect without --folds"),
        ({"folds": 3, "val_size": 0.2}, "--val_size has no effect with --folds"),
        ({"folds": 3, "val_data": "x.csv"}, "--folds 3 with --val_data x.csv"),
        ({"folds": 99}, "--folds 99: there are only 58 rows"),
        ({"seeds": "1,one"}, "--seeds 1,one: expected whole numbers"),
        ({"seeds": "1,1"}, "--seeds 1,1: expected whole numbers of 0 or more, each once"),
        ({"folds": 2, "group_column": "topic"}, "no column topic"),
        ({"folds": 5, "group_column": "label", "fold": 0}, None),
        ({"folds": 9, "group_column": "label"}, "--folds 9: there are only 8 groups"),
        ({"report": "excel"}, "--report excel: expected tensorboard, wandb or both"),
        ({"audit": "much"}, "--audit much: expected one of near, equal, none"),
    ],
)
def test_bad_families_are_one_line_before_anything_is_written(small_base, tmp_path, changes, words):
    flags = toy_flags(tmp_path, small_base, **{**QUICK, **changes})
    if words is None:  # folds by label: a class that no training row has is warned of, and trains
        assert train.main(flags)["steps"] > 0
        return
    with pytest.raises(UserError, match=words):
        train.main(flags)
    assert not (tmp_path / "outputs").exists()


def test_what_is_wrong_with_the_last_fold_is_said_before_the_first_begins(small_base, tmp_path):
    """AUC needs every class among the validation rows: 8 classes in 58 rows, the folds of 7 or 8 rows lack some."""
    with pytest.raises(UserError, match="--metric roc_auc needs rows with and without every label"):
        train.main(toy_flags(tmp_path, small_base, folds=8, metric="roc_auc", **QUICK))
    assert not (tmp_path / "outputs").exists()


# ---- what is wrong with the rows ------------------------------------------------------------------------------------


@pytest.fixture
def planted(tmp_path) -> Path:
    """58 rows; rows 50 and 51 say what rows 2 and 3 say, row 51 under another label; the test file holds row 7."""
    rows = files.read_rows(str(write_rows(tmp_path / "planted.csv", 58)), "x")
    rows[50] = {**rows[50], "Question": " " + rows[2]["Question"].upper(), "label": rows[2]["label"]}
    other = next(r["label"] for r in rows if r["label"] != rows[3]["label"])
    rows[51] = {**rows[51], "Question": rows[3]["Question"], "label": other}
    for name, some in (("planted.csv", rows), ("test.csv", rows[7:8])):
        with open(tmp_path / name, "w", encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, ["id", "Question", "label"])
            writer.writeheader()
            writer.writerows(some)
    return tmp_path / "planted.csv"


def test_the_audit_of_a_run_names_rows_and_is_kept(planted, tmp_path, small_base, capsys):
    flags = {**QUICK, "train_data": planted, "test_data": planted.with_name("test.csv"), "audit": "equal"}
    told = train.main(toy_flags(tmp_path, small_base, folds=2, fold=0, **flags))
    names = [r["id"] for r in files.read_rows(str(planted), "x")]
    kept = json.loads((Path(told["run"]) / "audit.json").read_text())
    ids = {frozenset(name.split(" id ")[1] for name in group) for group in kept["duplicates"]}
    assert ids == {frozenset(names[i] for i in group) for group in ((2, 50), (3, 51), (7,))}
    assert [{n.split(" id ")[1] for n in g} for g in kept["conflicts"]] == [{names[3], names[51]}]
    assert kept["leaks"]["train-test"] or kept["leaks"]["validation-test"]
    out = capsys.readouterr().out
    assert "--drop_conflicts" in out and names[51] in out


def test_dropped_conflicts_are_in_no_split(planted, tmp_path, small_base, capsys):
    told = train.main(
        toy_flags(
            tmp_path, small_base, train_data=planted, drop_conflicts="true", folds=2, **{**QUICK, "audit": "equal"}
        )
    )
    ids = {r["id"] for r in files.read_rows(str(planted), "x")}
    names = [r["id"] for r in files.read_rows(str(planted), "x")]
    judged = [r["id"] for r in files.read_rows(str(Path(told["run"]) / "val_predictions.csv"), "x")]
    assert set(judged) == ids - {names[3], names[51]} and len(judged) == 56
    out = capsys.readouterr().out
    assert "--drop_conflicts: 2 rows dropped, of 1 texts" in out and "may stand in different folds" in out


def test_a_test_file_that_is_not_there_is_no_obstacle(tmp_path, small_base, capsys):
    flags = {**QUICK, "test_data": tmp_path / "later.csv", "audit": "near", "max_steps": 2, "val_size": 0.3}
    train.main(toy_flags(tmp_path, small_base, **flags))
    assert "audit: test rows are left out" in capsys.readouterr().out
