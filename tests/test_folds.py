"""folds.py: a family of runs over folds and seeds under one folder, and what they predict together."""

import csv
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_ddp import finish, forked, forks, run_of, shas, start, toy_flags, write_rows

import checkpoint
import cli
import decide
import evaluate
import files
import folds
import infer
import loop
import metrics
import report_runs
import splits
import train
import trained
from configs import TrainConfig
from errors import Degenerate, UserError

pytestmark = forks
QUICK = {"val_data": None, "batch_size": 8, "epochs": 1, "eval_every": 4, "audit": "none"}
SILENT = lambda *words: None  # noqa: E731
started = folds.started


@pytest.fixture(autouse=True)
def forked_members(tmp_path_factory, monkeypatch):
    """Fork train.py instead of starting an interpreter, which takes seconds; `started` above is the real one."""
    monkeypatch.setattr(folds, "started", fork_of(tmp_path_factory.mktemp("members")))


def fork_of(folder: Path):
    def fork(words: list[str]) -> tuple[int, bool]:
        flags = words[words.index(str(folds.TRAIN)) + 1 :]
        ranks = [int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node=")]
        status, out, err = forked(train.main, flags, folder, *ranks)
        print(out, err)
        return status, False

    return fork


@pytest.fixture(scope="module")
def family(tmp_path_factory, small_base) -> Path:
    """Seeds 1 and 2 over 3 folds of 58 rows, never interrupted."""
    folder = tmp_path_factory.mktemp("family")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folds, "started", fork_of(folder))
        result = folds.main(toy_flags(folder, small_base, folds=3, seeds="1,2", **QUICK))
    assert result["steps"] == 6 * 5 and len(result["runs"]) == 6
    return Path(result["run"])


def judged_by(run: Path):
    cfg, labels = trained.run_facts(run)
    rows, val, _ = splits.read(cfg, SILENT)
    return cfg, labels, rows.judging() if cfg.folds and cfg.fold < 0 else splits.cut(cfg, rows, val)[1]


def member_configs(run: Path) -> dict[str, TrainConfig]:
    return {name: cli.read_config(TrainConfig, folder) for name, folder in trained.members(run).items()}


# ---- the folder of a family -----------------------------------------------------------------------------------------


def test_files_of_a_family_and_of_its_members(family):
    names = {p.name for p in family.iterdir()}
    members = {f"seed_{s}_fold_{f}" for s in (1, 2) for f in range(3)}
    assert names == members | {
        "config.json", "family.json", "labels.json", "environment.json", "val_predictions.csv", "decision.json",
        "result.json", "rows.json", "seal.json",
    }  # fmt: skip
    stored = json.loads((family / "family.json").read_text())
    assert stored == {"members": {name: name for name in stored["members"]}, "folds": 3, "seeds": ["1", "2"]}
    assert set(stored["members"]) == members
    cfg = cli.read_config(TrainConfig, family)
    assert (cfg.folds, cfg.fold) == (3, -1)
    for name, one in member_configs(family).items():
        assert name == f"seed_{one.seed}_fold_{one.fold}" and one.split_seed == 0
        found = {p.name for p in (family / name).iterdir()}
        assert found >= {"config.json", "labels.json", "split.csv", "environment.json", "best", "last", "result.json"}


def test_the_out_of_fold_file_holds_each_row_once_with_the_logits_of_the_run_that_did_not_see_it(family):
    cfg, labels, judged = judged_by(family)
    ids, targets, logits = report_runs.validation_rows(family, cfg, labels)
    assert ids == judged.ids == [r["id"] for r in files.read_rows(cfg.train_data, "x")] and len(set(ids)) == 58
    assert np.array_equal(targets, judged.labels)
    seen, total = dict.fromkeys(ids, 0), {}
    for name, one in member_configs(family).items():
        theirs, _, z = report_runs.validation_rows(family / name, one, labels)
        for i, row in zip(theirs, z, strict=True):
            total[i], seen[i] = total.get(i, 0) + row.astype(np.float64), seen[i] + 1
    assert set(seen.values()) == {2}  # once for each seed
    np.testing.assert_allclose(logits, [total[i] / 2 for i in ids], rtol=1e-6)


def test_the_summary_is_that_of_its_runs_and_rows(family):
    result = json.loads((family / "result.json").read_text())
    cfg, labels, judged = judged_by(family)
    logits = report_runs.validation_rows(family, cfg, labels)[2]
    want = metrics.of_task("single_label", logits, judged.labels)
    assert result["metrics"] == {k: round(v, 6) for k, v in want.items()}
    each = [json.loads((folder / "result.json").read_text())["metrics"] for folder in trained.members(family).values()]
    for name in result["mean"]:
        values = [e[name] for e in each if name in e]
        assert abs(result["mean"][name] - np.mean(values)) < 1e-6
        assert abs(result["std"][name] - np.std(values, ddof=1)) < 1e-6
    low, high = result["intervals"]["micro_f1"]
    assert low <= result["metrics"]["micro_f1"] <= high and high - low > 0.05  # 58 rows
    decision = trained.read_decision(family, "single_label", 8)
    assert decision == decide.fit_decision("single_label", logits, judged.labels, "none", "out-of-fold")


def test_a_member_is_the_run_that_is_started_alone(family, tmp_path, small_base):
    alone = train.main(toy_flags(tmp_path, small_base, folds=3, fold=1, seed=2, split_seed=0, **QUICK))
    mine, theirs = Path(alone["run"]), family / "seed_2_fold_1"
    assert shas(mine) == shas(theirs)
    assert (mine / "val_predictions.csv").read_bytes() == (theirs / "val_predictions.csv").read_bytes()


def test_two_ranks_train_every_fold_together(family, tmp_path, small_base):
    flags = toy_flags(tmp_path, small_base, folds=3, seeds="1,2", nproc_per_node=2, **QUICK)
    run = Path(folds.main(flags)["run"])
    for file in ("val_predictions.csv", "decision.json"):
        assert (run / file).read_bytes() == (family / file).read_bytes()
    assert shas(run / "seed_1_fold_2") == shas(family / "seed_1_fold_2")
    environment = json.loads((run / "seed_1_fold_2/environment.json").read_text())
    assert environment["world_size"] == 2


def test_seeds_alone_share_one_hold_out(tmp_path, small_base):
    result = folds.main(toy_flags(tmp_path, small_base, seeds="3,5", **{**QUICK, "val_size": 0.3}))
    run = Path(result["run"])
    one, two = ((run / f"seed_{s}" / "val_predictions.csv").read_text().splitlines() for s in (3, 5))
    assert [line.split(",")[0] for line in one] == [line.split(",")[0] for line in two] and one != two
    assert result["metrics"]["rows"] == len(one) - 1 and list(result["runs"]) == ["seed_3", "seed_5"]
    assert (run / "split.csv").read_bytes() == (run / "seed_3/split.csv").read_bytes()


def test_one_seed_is_that_seed(small_base, tmp_path):
    result = folds.main(toy_flags(tmp_path, small_base, seeds="5", audit="none"))
    alone = train.main(toy_flags(tmp_path, small_base, seed=5, audit="none"))
    assert list(result["runs"]) == ["seed_5"] and result["runs"]["seed_5"] == alone["metrics"]
    assert trained.load_run(result["run"]).predict(["1 + 1"])


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_other_tasks_have_families_too(tmp_path, small_base, task):
    rows = files.read_rows(str(ROOT / "tiny/data/val.csv"), "x")[:60]
    with open(tmp_path / "rows.csv", "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["Question", "label"])
        for i, row in enumerate(rows):
            writer.writerow([row["Question"], i / 60 if task == "regression" else ["a", "b|c", "", "c|a"][i % 4]])
    flags = toy_flags(tmp_path, small_base, train_data=tmp_path / "rows.csv", task=task, folds=3, **QUICK)
    result = folds.main(flags)
    assert result["metrics"]["rows"] == 60 and len(result["runs"]) == 3
    output = tmp_path / "p.jsonl"
    flags = ["--runs", result["run"], "--input", str(tmp_path / "rows.csv"), "--output", str(output)]
    assert infer.main([*flags, "--submission", ""])["rows"] == 60 and len(output.read_text().splitlines()) == 60


def test_a_family_predicts_the_mean_of_its_runs(family, tmp_path):
    cfg, _, judged = judged_by(family)
    logits, _ = trained.load_run(family).logits(judged.rows)
    each = [trained.load_run(folder).logits(judged.rows)[0] for folder in trained.members(family).values()]
    np.testing.assert_allclose(logits, np.mean(each, axis=0), atol=1e-6)
    flags = ["--runs", str(family), "--input", cfg.train_data, "--output", str(tmp_path / "a.csv"), "--submission", ""]
    assert infer.main(flags)["rows"] == 58
    rows = files.read_rows(str(tmp_path / "a.csv"), "x")
    shares = np.array([[float(r[f"probability_{c}"]) for c in range(8)] for r in rows])
    decision = trained.read_decision(family, "single_label", 8)
    np.testing.assert_allclose(shares, decide.apply(decision, logits)[1], atol=1e-6)
    once = trained.load_run(family).predict([judged.rows[0]["Question"]])[0]
    np.testing.assert_allclose(once["logits"], logits[0], atol=1e-5)


def test_one_run_is_exported_or_merged_never_a_family(family, tmp_path):
    with pytest.raises(UserError, match="is 6 runs; name one of them, such as .*seed_1_fold_0"):
        infer.main(["--runs", str(family), "--export", str(tmp_path / "e")])
    with pytest.raises(UserError, match="is 6 runs; name one of them"):
        infer.main(["--runs", str(family), "--input", "x.csv", "--merge", "true"])
    assert not (tmp_path / "e").exists()


# ---- as users start it ----------------------------------------------------------------------------------------------


def test_the_command_trains_each_run_in_a_process_of_its_own(tmp_path, small_base, command):
    flags = toy_flags(tmp_path, small_base, folds=2, **{**QUICK, "max_steps": 2})
    status, out, err = command("folds.py", *flags, env={"CUDA_VISIBLE_DEVICES": ""})
    assert status == 0, err
    run = run_of(out)
    assert "== fold_0: 1 of 2" in out and "== fold_1: 2 of 2" in out and "== 2 runs together, 58 rows" in out
    assert out.count("best checkpoint by micro_f1") == 2 and err.count("2/2") >= 2  # the runs' own output
    assert checkpoint.finished(run) and all(checkpoint.finished(f) for f in trained.members(run).values())
    status, out, err = command("folds.py", "--help")
    assert status == 0 and "--nproc_per_node" in out and "--lr" in out


CHILD = """
import signal, sys, time
def note(number, frame):
    open(sys.argv[1], "a").write(f"{number} ")
    sys.exit(1)
signal.signal(signal.SIGTERM, note), signal.signal(signal.SIGINT, note)  # torchrun dies of SIGUSR1
open(sys.argv[1], "w").write("ready ")
time.sleep(60)
"""


def wait_for_text(path: Path, text: str) -> None:
    end = time.monotonic() + 30
    while not path.exists() or path.read_text() != text:
        assert time.monotonic() < end, path.exists() and path.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGKILL])
def test_signals_reach_the_run_in_training_once(tmp_path, number):
    """Passed on by folds.py; where it is killed itself, Linux tells the run, so that no two write one folder."""
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux tells a process that its parent is gone")
    path = tmp_path / "signals"

    def main(argv):
        status, stopped = started([sys.executable, "-c", CHILD, str(path)])
        return {"status": status, "stopped": stopped}

    (pid,) = pids = start(main, [], tmp_path)
    wait_for_text(path, "ready ")
    os.kill(pid, number)
    status, out, err = finish(pids, tmp_path)
    if number == signal.SIGKILL:
        wait_for_text(path, f"ready {int(signal.SIGTERM)} ")
        return
    assert status == 0 and json.loads(out) == {"status": 1, "stopped": True}, err
    passed_on = number if number == signal.SIGINT else signal.SIGTERM
    assert path.read_text() == f"ready {int(passed_on)} "


def test_a_stopped_run_names_the_way_on(tmp_path, small_base, monkeypatch):
    monkeypatch.setattr(folds, "started", lambda words: (1, True))
    with pytest.raises(KeyboardInterrupt, match="stopped in fold_0; continue with python folds.py --resume"):
        folds.main(toy_flags(tmp_path, small_base, folds=2, **QUICK))
    assert len(list(tmp_path.glob("outputs/*/*/run_0/PREEMPTED"))) == 1


def test_a_family_killed_while_its_folder_was_made_goes_on(tmp_path, small_base, monkeypatch):
    """Before environment.json, which is written last; with --outputs as people give it, relative."""
    monkeypatch.chdir(tmp_path)
    flags = toy_flags(tmp_path, small_base, folds=2, **{**QUICK, "outputs": "outputs"})
    monkeypatch.setattr(checkpoint, "environment", lambda *facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folds.main(flags)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folds, "started", in_process)
    result = folds.main([*flags, "--resume", "auto"])
    run = Path(result["run"])
    assert json.loads((run / "family.json").read_text())["members"] == {"fold_0": "fold_0", "fold_1": "fold_1"}
    assert all(checkpoint.finished(run / name) for name in ("fold_0", "fold_1"))


def in_process(words: list[str]) -> tuple[int, bool]:
    train.main(words[words.index(str(folds.TRAIN)) + 1 :])
    return 0, False


def test_killed_in_the_middle_of_a_fold_it_continues_without_repeating_finished_ones(family, tmp_path, small_base):
    flags = [*toy_flags(tmp_path, small_base, folds=3, seeds="1,2", save_every=2, **QUICK), "--resume", "auto"]
    (pid,) = start(folds.main, flags, tmp_path, before=lambda: setattr(folds, "started", in_process))
    logs, end = "outputs/*/*/run_0/seed_1_fold_2/metrics.jsonl", time.monotonic() + 150
    while not any(log.read_bytes().count(b"\n") >= 3 for log in tmp_path.glob(logs)):
        assert time.monotonic() < end, (tmp_path / "err.0").read_text()
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    run = next(tmp_path.glob("outputs/*/*/run_0"))
    assert sorted(p.parent.name for p in run.glob("*/result.json")) == ["seed_1_fold_0", "seed_1_fold_1"]
    before = {p: p.stat().st_mtime_ns for n in (0, 1) for p in (run / f"seed_1_fold_{n}").rglob("*") if p.is_file()}
    pids = start(folds.main, flags, tmp_path, before=lambda: setattr(folds, "started", in_process))
    status, out, err = finish(pids, tmp_path)
    assert status == 0, out + err
    assert out.count("is finished") == 2 and "resumed at step 2 of 5" in out
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (run / "val_predictions.csv").read_bytes() == (family / "val_predictions.csv").read_bytes()
    results = [json.loads((r / "result.json").read_text()) for r in (run, family)]
    assert all(results[0][k] == results[1][k] for k in ("metrics", "mean", "std", "intervals", "runs", "decided"))


def test_train_resumes_no_family_and_folds_no_single_run(family, tmp_path, small_base):
    with pytest.raises(UserError, match="finished"):
        folds.main(["--resume", str(family)])
    with pytest.raises(UserError, match="belongs to another command: python folds.py --resume"):
        train.main(["--resume", str(family)])
    with pytest.raises(UserError, match="belongs to another command: python train.py --resume"):
        folds.main(["--resume", str(family / "seed_1_fold_0")])
    # an unfinished family is not what train.py continues, nor the other way around
    flags = toy_flags(tmp_path, small_base, folds=2, **{**QUICK, "max_steps": 1})
    run = Path(folds.main(flags)["run"])
    (run / "result.json").unlink()
    one = train.main([*flags, "--fold", "0", "--resume", "auto"])
    assert Path(one["run"]).name == "run_1"
    assert folds.main([*flags, "--resume", "auto"])["run"] == str(run)


def test_an_old_family_is_continued_to_the_same_bytes(family, tmp_path, small_base):
    """As train.py left them before folds.py: "fold": "all" and seeds in config.json, no family.json, audited once."""
    flags = toy_flags(tmp_path, small_base, folds=3, seeds="1,2", **QUICK)
    run = Path(folds.main(flags)["run"])
    old = {"balance": False, "train_start": 0, "split": "", "examples": [], "pseudo_labels": ""}
    for folder in (run, *trained.members(run).values()):
        config = json.loads((folder / "config.json").read_text())
        fold = str(config.pop("fold")) if folder != run else "all"
        seeds = ["1", "2"] if folder == run else []
        (folder / "config.json").write_text(json.dumps({**config, "fold": fold, "seeds": seeds, **old}))
        for name in ("seal.json", "rows.json"):
            (folder / name).unlink()
    (run / "family.json").unlink()
    for name in ("result.json", "seed_2_fold_2/result.json"):
        (run / name).unlink()
    for path in sorted((run / "seed_2_fold_1").rglob("*"), reverse=True):  # was not begun
        path.rmdir() if path.is_dir() else path.unlink()
    (run / "seed_2_fold_1").rmdir()
    folds.main(["--resume", str(run)])
    for file in ("val_predictions.csv", "decision.json"):
        assert (run / file).read_bytes() == (family / file).read_bytes()
    assert shas(run / "seed_2_fold_1") == shas(family / "seed_2_fold_1")
    assert not (run / "seed_2_fold_2/audit.json").exists()


def test_a_dry_run_of_a_family_leaves_nothing(tmp_path, small_base, capsys):
    result = folds.main(toy_flags(tmp_path, small_base, folds=3, **QUICK) + ["--dry_run"])
    out = capsys.readouterr().out
    assert result["runs"] == 3 and "3 runs like this one" in out and "plan: " in out
    assert not (tmp_path / "outputs").exists()


def test_a_limit_is_shared_by_the_runs_of_a_family(small_base, tmp_path, monkeypatch):
    given = []
    fork = folds.started
    monkeypatch.setattr(folds, "started", lambda words: given.append(words[-2:]) or fork(words))
    flags = toy_flags(tmp_path, small_base, val_data=None, folds=2, time_limit="2h", audit="none", max_steps=2)
    folds.main(flags)
    now = loop.process_seconds()
    (flag, first), (_, second) = given
    assert flag == "--time_limit" and float(first.removesuffix("s")) == pytest.approx(3600 - now / 2, abs=60)
    assert float(second.removesuffix("s")) == pytest.approx(7200 - now, abs=60)
    for now in (7199.95, 9000.0):  # 0.05 s for two runs would be written as 0.0, which is no limit
        monkeypatch.setattr(loop, "process_seconds", lambda now=now: now)
        with pytest.raises(KeyboardInterrupt, match="time_limit is over; continue with python folds.py --resume"):
            folds.main(flags)


def test_degenerate_runs_are_told_when_the_family_is_whole(tmp_path, small_base, monkeypatch):
    """Every run is trained and pooled, then the family ends with status 5; also where it was killed in between."""
    flags = toy_flags(tmp_path, small_base, folds=2, **{**QUICK, "max_steps": 1})
    fork = folds.started

    def first_one_alone(words):
        if "fold_1" in str(words):
            return 1, False
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "degenerate", lambda *args: "all alike")
            status, _ = fork(words)
        assert status == 5
        return status, False

    monkeypatch.setattr(folds, "started", first_one_alone)
    with pytest.raises(folds.Failed, match="fold_1 failed"):
        folds.main(flags)
    monkeypatch.setattr(folds, "started", fork)
    with pytest.raises(Degenerate, match="the scores of fold_0 are degenerate"):
        folds.main([*flags, "--resume", "auto"])
    assert checkpoint.finished(next((tmp_path / "outputs").glob("*/*/run_0")))


def test_a_failing_run_ends_the_family_with_its_status(tmp_path, small_base):
    flags = toy_flags(tmp_path, small_base, folds=2, **{**QUICK, "lr": 1e30})
    with pytest.raises(folds.Failed, match="fold_0 failed with status 4; continue with") as error:
        folds.main(flags)
    assert error.value.exit_status == 4


def test_a_finished_fold_of_other_texts_is_not_taken(small_base, tmp_path):
    flags = toy_flags(tmp_path, small_base, val_data=None, folds=2, audit="none", max_steps=2)
    run = Path(folds.main(flags)["run"])
    (run / "result.json").unlink()  # as if it had been killed before its end
    path = tmp_path / "train.csv"
    rows = files.read_rows(str(path), "x")
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({**r, "Question": r["Question"][::-1]} for r in rows)
    with pytest.raises(UserError, match="the training rows or their tokens changed"):
        folds.main(["--resume", str(run)])


# ---- runs trained elsewhere -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory, small_base) -> tuple[Path, list[str]]:
    """The runs of `family`, each started alone as a job array does."""
    folder = tmp_path_factory.mktemp("elsewhere")
    runs = []
    for seed in (1, 2):
        for fold in range(3):
            flags = toy_flags(folder, small_base, folds=3, fold=fold, seed=seed, split_seed=0, **QUICK)
            runs.append(train.main(flags)["run"])
    return folder, runs


def test_pooled_runs_are_the_family(family, elsewhere, tmp_path):
    folder, runs = elsewhere
    result = folds.main(["--pool", *runs[::-1], "--outputs", str(tmp_path / "pooled")])
    run = Path(result["run"])
    assert run.is_relative_to(tmp_path / "pooled")
    for file in ("val_predictions.csv", "decision.json"):
        assert (run / file).read_bytes() == (family / file).read_bytes()
    assert set(trained.members(run).values()) == {Path(r).resolve() for r in runs}
    rows = files.read_rows(str(folder / "train.csv"), "x")[:5]
    logits = [trained.load_run(r).logits(rows)[0] for r in (run, family)]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-6)


def test_what_is_no_family_is_not_pooled(elsewhere, tmp_path, small_base):
    folder, runs = elsewhere
    out = ["--outputs", str(tmp_path / "pooled")]
    with pytest.raises(UserError, match="no run for seed_1_fold_1, seed_2_fold_0"):
        folds.main(["--pool", runs[0], runs[2], *runs[4:], *out])
    with pytest.raises(UserError, match="is seed_1_fold_0 too"):
        folds.main(["--pool", *runs, runs[0], *out])
    with pytest.raises(UserError, match="no finished run"):
        folds.main(["--pool", runs[0], str(tmp_path), *out])
    other = train.main(toy_flags(tmp_path, small_base, folds=3, fold=1, seed=1, split_seed=0, rank=2, **QUICK))["run"]
    with pytest.raises(UserError, match="not a run of the same family: .*rank"):
        folds.main(["--pool", runs[0], other, *out])
    assert not (tmp_path / "pooled").exists()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "nothing to train: give --folds 5, or --seeds 1,2,3"),
        ({"folds": 1}, "--folds 1: expected 2 or more"),
        ({"folds": -3}, "--folds -3: expected 0 or more"),
        ({"folds": 5, "fold": 2}, "--fold 2: folds.py trains every fold"),
        ({"folds": 3, "val_size": 0.2}, "--val_size has no effect: it is used without --folds"),
        ({"folds": 3, "val_data": "x.csv"}, "--folds 3 with --val_data x.csv"),
        ({"folds": 99}, "--folds 99: there are only 58 rows"),
        ({"seeds": "1,one"}, "--seeds one: expected whole numbers"),
        ({"seeds": "1,1"}, "--seeds 1,1: a seed is given twice"),
        ({"seeds": "1,01"}, "a seed is given twice"),
        ({"folds": 2, "nproc_per_node": 0}, "--nproc_per_node 0: expected 1 or more"),
        ({"folds": 2, "group_column": "topic"}, "no column topic"),
        ({"folds": 9, "group_column": "label"}, "--folds 9: there are only 8 rows, or groups"),
        ({"folds": 2, "class_weights": "1,2"}, "expected one for each of 8"),
        (
            {"folds": 8, "metric": "roc_auc"},
            "--metric roc_auc needs rows with and without every label",
        ),  # folds of 7 or 8 rows lack some
    ],
)
def test_bad_families_are_one_line_before_anything_is_written(small_base, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        folds.main(toy_flags(tmp_path, small_base, **{**QUICK, **changes}))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"folds": 5}, "--folds moved: python folds.py --folds 5 trains every fold"),
        ({"folds": 5, "fold": 5}, "--fold 5: expected 0 to one below --folds 5"),
        ({"folds": 5, "fold": "first"}, "--fold first: expected a whole number"),
        ({"fold": 2}, "--fold has no effect: it is used with --folds"),
        ({"folds": 5, "group_column": "label", "fold": 0}, None),
    ],
)
def test_one_fold_is_trained_by_train(small_base, tmp_path, changes, words):
    flags = toy_flags(tmp_path, small_base, **{**QUICK, **changes})
    if words is None:  # folds by label: a class that no training row has is warned of, and trains
        assert train.main(flags)["steps"] > 0
        return
    with pytest.raises(UserError, match=words):
        train.main(flags)
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
    told = folds.main(
        toy_flags(
            tmp_path, small_base, train_data=planted, drop_conflicts="true", folds=2, **{**QUICK, "audit": "equal"}
        )
    )
    ids = {r["id"] for r in files.read_rows(str(planted), "x")}
    names = [r["id"] for r in files.read_rows(str(planted), "x")]
    judged = [r["id"] for r in files.read_rows(str(Path(told["run"]) / "val_predictions.csv"), "x")]
    assert set(judged) == ids - {names[3], names[51]} and len(judged) == 56
    out = capsys.readouterr().out
    assert "--drop_conflicts: 2 rows dropped, of 1 texts" in out and "may be in different folds" in out


def test_a_test_file_that_is_not_there_is_no_obstacle(tmp_path, small_base, capsys):
    flags = {**QUICK, "test_data": tmp_path / "later.csv", "audit": "near", "max_steps": 2, "val_size": 0.3}
    train.main(toy_flags(tmp_path, small_base, **flags))
    assert "audit: test rows are left out" in capsys.readouterr().out
