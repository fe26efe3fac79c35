"""Verification and rules: balanced slices, chains, rows of examples, pseudo-labels, preflight, time limits."""

import argparse
import csv
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import ROOT, forked, forks, run_of, toy_flags

import checkpoint
import ddp
import evaluate
import files
import foreign
import infer
import loop
import losses
import metrics
import splits
import train
import trained
from configs import TrainConfig
from errors import Degenerate, UserError

pytestmark = forks
SILENT = lambda *words: None  # noqa: E731
BINARY = {
    "val_data": None, "label_names": None, "batch_size": 8, "epochs": 1, "eval_every": 100, "audit": "none",
    "text": "{question} Answer: {solution}", "label_column": "is_correct", "lora_dropout": 0, "head_dropout": 0,
}  # fmt: skip


def write_pairs(path: Path, rows: int = 90) -> Path:
    """Questions with solutions, a third of them right; the solution says it, so that it can be learned."""
    with open(ROOT / "tiny/data/train.csv", encoding="utf-8", newline="") as f:
        texts = [r["Question"] for r, _ in zip(csv.DictReader(f), range(rows), strict=False)]
    lines = [
        {"id": f"p{i}", "question": t[:60], "solution": "yes sum" if i % 3 == 0 else "no", "is_correct": i % 3 == 0}
        for i, t in enumerate(texts)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in lines), encoding="utf-8")
    return path


def cfg_of(path: Path, **changes) -> TrainConfig:
    same = {"train_data": str(path), "text": BINARY["text"], "label_column": "is_correct", "val_size": 0.2}
    return TrainConfig(**{**same, **changes})


# ---- balance and slices ---------------------------------------------------------------------------------------------


def test_balance_keeps_equally_many_rows_of_every_class_and_slices_cut_one_order(tmp_path):
    path, seen, judges = write_pairs(tmp_path / "p.jsonl"), [], set()
    for start, stop in ((0, 16), (16, 32), (32, 0)):
        cfg = cfg_of(path, balance=True, train_start=start, train_stop=stop)
        rows, val, labels = splits.read(cfg, SILENT)
        assert np.bincount(rows.labels).tolist() == [30, 30]
        known, judge = splits.cut(cfg, rows, val)
        seen.append(known.ids)
        judges.add(tuple(judge.ids))
        assert abs(known.labels.mean() - 0.5) <= 0.5 / len(known.ids) + 1e-9, "every slice is balanced"
    flat = [i for part in seen for i in part]
    assert len(judges) == 1, "the validation split does not depend on the slice"
    assert len(flat) == len(set(flat)) == 48 and not set(flat) & set(judges.pop()), "each row once, none of validation"
    assert [len(part) for part in seen] == [16, 16, 16]


@pytest.mark.parametrize("seed", range(5))
def test_a_mixed_order_has_each_class_in_every_stretch(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=400, p=[0.6, 0.3, 0.1])
    order = splits.mixed_order(labels, seed)
    assert sorted(order) == list(range(400)) and not np.array_equal(order, splits.mixed_order(labels, seed + 1))
    for start in range(0, 400, 40):
        part = np.bincount(labels[order[start : start + 40]], minlength=3) / 40
        assert np.abs(part - np.bincount(labels) / 400).max() <= 1.5 / 40


def test_slices_of_the_real_data_are_disjoint_and_never_in_validation(shared):
    seen, judges = [], set()
    for start, stop in ((0, 1000), (1000, 2000), (2000, 0)):
        cfg = cfg_of(
            shared / "data/math_verification/train.jsonl", text="{question} {solution}", group_column="question",
            val_size=500.0, balance=True, train_start=start, train_stop=stop, split_seed=7, seed=start,
        )  # fmt: skip
        known, judge, _ = splits.load_rows(cfg, SILENT)
        seen += known.ids
        judges.add(tuple(judge.ids))
        assert abs(known.labels.mean() - 0.5) < 0.02
        assert not {r["question"] for r in known.rows} & {r["question"] for r in judge.rows}
    assert len(judges) == 1 and len(seen) == len(set(seen)) and not set(seen) & set(judges.pop())


@pytest.fixture(scope="module")
def slices(tmp_path_factory, small_base):
    """Three slices one after the other, and one run over all of them."""
    folder = tmp_path_factory.mktemp("slices")
    path, runs = write_pairs(folder / "p.jsonl"), []
    for start, stop in ((0, 16), (16, 32), (32, 48)):
        before = {"init_from": runs[-1]["run"]} if runs else {}
        flags = toy_flags(
            folder, small_base, train_data=path, balance="true", train_start=start, train_stop=stop, val_size=0.2,
            **before, **BINARY,
        )  # fmt: skip
        runs.append(train.main(flags))
    return runs, path, small_base


def test_a_chain_of_slices_has_the_books_of_one_run(slices):
    runs, path, _ = slices
    table = runs[-1]["chain"]
    assert [(r["train_start"], r["train_stop"], r["train_rows"]) for r in table] == [
        (0, 16, 16),
        (16, 32, 16),
        (32, 48, 16),
    ]
    assert [r["run"] for r in table] == [r["run"] for r in runs]
    assert [r["metrics"] for r in table] == [r["metrics"] for r in runs]
    parts = [files.read_rows(str(Path(r["run"]) / "split.csv"), "x") for r in runs]
    trained = [r["id"] for rows in parts for r in rows if r["part"] == "train"]
    cfg = cfg_of(path, balance=True)
    whole, judge, _ = splits.load_rows(cfg, SILENT)
    assert sorted(trained) == sorted(whole.ids)
    for rows in parts:
        assert sorted(r["id"] for r in rows if r["part"] == "validation") == sorted(judge.ids)
    assert [[r["id"] for r in rows] for rows in parts] == [[r["id"] for r in parts[0]]] * 3, (
        "one order, cut three times"
    )


def test_a_run_starts_from_the_best_save_of_the_other(slices, tmp_path):
    runs, path, base = slices
    flags = toy_flags(
        tmp_path, base, train_data=path, balance="true", train_start=16, train_stop=32, val_size=0.2, max_steps=1,
        lr=1e-12, head_lr=1e-12, init_from=runs[0]["run"], **BINARY,
    )  # fmt: skip
    told = train.main(flags)  # nearly no step: what it starts from is what it keeps
    ours, theirs = (
        checkpoint.load_tensors(Path(r) / "best/adapter_model.safetensors") for r in (told["run"], runs[0]["run"])
    )
    assert ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)


def test_validation_rows_that_an_earlier_run_learned_are_refused(slices, tmp_path):
    runs, path, base = slices
    same = {"train_data": path, "balance": "true", "train_start": 16, "train_stop": 32, "init_from": runs[0]["run"]}
    with pytest.raises(UserError, match="validation rows of this run were trained on there: keep its split"):
        train.main(toy_flags(tmp_path, base, split_seed=99, val_size=0.2, **same, **BINARY))
    with pytest.raises(UserError, match="it does not fit these settings"):
        train.main(toy_flags(tmp_path, base, val_size=0.2, **same, **{**BINARY, "rank": 2}))
    with pytest.raises(UserError, match="it has another task or other labels"):
        train.main(toy_flags(tmp_path, base, init_from=runs[0]["run"]))


def test_a_written_split_is_used_again(slices, tmp_path):
    runs, path, base = slices
    split = Path(runs[0]["run"]) / "split.csv"
    told = train.main(
        toy_flags(tmp_path, base, train_data=path, split=split, train_start=16, train_stop=32, seed=5, **BINARY)
    )
    theirs = files.read_rows(str(Path(runs[1]["run"]) / "split.csv"), "x")
    assert files.read_rows(str(Path(told["run"]) / "split.csv"), "x") == theirs
    lines = path.read_text().splitlines()
    (tmp_path / "less.jsonl").write_text("\n".join(lines[10:]) + "\n")
    with pytest.raises(UserError, match="of its ids are not in --train_data"):
        train.main(toy_flags(tmp_path, base, train_data=tmp_path / "less.jsonl", split=split, **BINARY))


def test_slices_are_the_same_on_two_ranks(slices, tmp_path):
    runs, path, base = slices
    flags = toy_flags(
        tmp_path, base, train_data=path, balance="true", train_start=0, train_stop=16, val_size=0.2, **BINARY
    )
    status, out, err = forked(train.main, flags, tmp_path, ranks=2)
    assert status == 0, out + err
    for name in ("split.csv", "val_predictions.csv"):
        assert (run_of(out) / name).read_bytes() == (Path(runs[0]["run"]) / name).read_bytes()


# ---- rows from examples ---------------------------------------------------------------------------------------------


def write_rules(path: Path, rows: int = 48) -> Path:
    """Posts under two rules; row i's violating example is `bad i // 2` (so that each stands twice), its other `good i`;
    the examples `both` stand with both labels, and row 0's own body is another row's example.
    """
    out = []
    for i in range(rows):
        violates = int(i % 3 == 0)
        out.append(
            {"row_id": i, "body": f"post number {i} {'buy now' if violates else 'hello'}",
             "rule": ["ads", "law"][i % 2],
             "positive": f"bad {i // 4}" if i != 5 else "both", "negative": f"good {i}" if i != 7 else "both",
             "rule_violation": violates}
        )  # fmt: skip
    out[9]["negative"] = out[1]["body"].upper() + " "
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(out[0]))
        writer.writeheader()
        writer.writerows(out)
    return path


RULES = {
    "text": "{rule} {positive} {negative} {body}", "label_column": "rule_violation", "id_column": "row_id",
    "group_column": "body", "by_column": "rule", "examples": ("positive=1", "negative=0"),
}  # fmt: skip


def test_examples_become_rows_once_each_and_never_of_validation(tmp_path):
    path = write_rules(tmp_path / "rules.csv")
    cfg = TrainConfig(train_data=str(path), val_size=0.25, **RULES)
    rows, _, labels = splits.read(cfg, SILENT)
    known, judge = splits.cut(cfg, rows, None)
    own, made = known.own(), [i for i, o in enumerate(known.origin) if o >= 0]
    assert len(judge.ids) == 12 and (judge.origin == splits.OWN).all()
    keys = [(known.rows[i]["body"], known.rows[i]["rule"]) for i in made]
    trained = {int(i) for i in own.ids}
    wanted = {(f"bad {i // 4}", ["ads", "law"][i % 2]) for i in trained if i != 5}
    wanted |= {(f"good {i}", ["ads", "law"][i % 2]) for i in trained if i not in (7, 9)}
    both = {k for k in keys if k[0] == "both"}  # rows 5 and 7 are of one rule: with both in training it is a conflict
    assert set(keys) - both == wanted and len(keys) == len(set(keys))
    assert not both if {5, 7} <= trained else len(both) == len({5, 7} & trained)
    assert not {k[0].strip().lower() for k in keys} & {r["body"].lower() for r in judge.rows + own.rows}
    for i in made:
        row, label = known.rows[i], known.rows[i]["rule_violation"]
        assert row["body"] not in (row["positive"], row["negative"]), "never beside itself as a solved example"
        assert label == ("1" if row["body"].startswith("bad") else "0") or row["body"] == "both"
        assert int(label) == known.labels[i]


def test_rules_train_with_metrics_for_each_rule_and_predict_probabilities(tmp_path, small_base):
    path = write_rules(tmp_path / "rules.csv")
    flags = {
        **BINARY,
        **RULES,
        "examples": "positive=1,negative=0",
        "examples_column": "body",
        "label_column": "rule_violation",
    }
    told = train.main(
        toy_flags(tmp_path, small_base, train_data=path, test_data=path, val_size=0.25, metric="roc_auc", **flags)
    )
    run = Path(told["run"])
    assert told["train_rows"] > 36 and set(told["by_column"]) == {"ads", "law"}
    cfg, labels = trained.run_facts(run)
    ids, targets, logits = trained.validation_rows(run, cfg, labels)
    rule = np.array([["ads", "law"][int(i) % 2] for i in ids])
    for name in ("ads", "law"):
        want = metrics.of_task("single_label", logits[rule == name], targets[rule == name])
        assert told["by_column"][name] == pytest.approx(want)
    assert told["mean_by_column"]["roc_auc"] == pytest.approx(
        np.mean([told["by_column"][n]["roc_auc"] for n in ("ads", "law")])
    )
    target = tmp_path / "s.csv"
    flags = [
        "--runs",
        str(run),
        "--submission",
        "row_id,rule_violation",
        "--output",
        str(target),
        "--by_column",
        "rule",
    ]
    found = infer.main([*flags, "--force"])
    rows = files.read_rows(str(target), "x")
    assert list(rows[0]) == ["row_id", "rule_violation"] and all(0 < float(r["rule_violation"]) < 1 for r in rows)
    assert len({r["rule_violation"] for r in rows}) > 24 and set(found["by_column"]) == {"ads", "law"}
    infer.main([*flags, "--force", "--answer", "label", "--overwrite"])
    assert {r["rule_violation"] for r in files.read_rows(str(target), "x")} <= {"0", "1"}


# ---- pseudo-labels --------------------------------------------------------------------------------------------------


def test_soft_targets_are_torchs_and_hard_ones_are_a_special_case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator)
    hard = torch.randint(4, (7,), generator=generator)
    weights = torch.rand(4, generator=generator) + 0.5
    for smoothing in (0.0, 0.1):
        for w in (None, weights):
            one, many = (losses.cross_entropy(logits, t, smoothing, w) for t in (hard, torch.eye(4)[hard]))
            if w is None or not smoothing:  # torch weighs the smoothed part by class weights in its own two ways
                torch.testing.assert_close(one[0], many[0])
            assert float(one[1]) == pytest.approx(float(many[1]))
    for targets in (hard.numpy(), torch.eye(4)[hard].numpy()):
        assert losses.loss_weight("single_label", targets, weights.numpy()) == pytest.approx(float(weights[hard].sum()))
        assert losses.loss_weight("single_label", targets, None) == 7.0


def test_confident_predictions_become_rows(tmp_path, small_base):
    path, rest = write_pairs(tmp_path / "p.jsonl", 60), tmp_path / "rest.jsonl"
    lines = [json.loads(line) for line in write_pairs(tmp_path / "all.jsonl", 90).read_text().splitlines()][60:]
    rest.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "is_correct"}) + "\n" for r in lines))
    told = [("p60", 0.03, 0.97), ("p61", 0.95, 0.05), ("p62", 0.6, 0.4), ("p75", 0.09, 0.91)]
    with open(tmp_path / "told.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["id", "prediction", "probability_False", "probability_True"])
        writer.writerows([i, "", a, b] for i, a, b in told)
    cfg = cfg_of(path, pseudo_labels=str(tmp_path / "told.csv"), pseudo_data=str(rest), pseudo_min_confidence=0.9)
    known, judge, labels = splits.load_rows(cfg, SILENT)
    extra = known.take(np.flatnonzero(known.origin == splits.PSEUDO))
    assert labels.values == ("False", "True")
    assert extra.ids == ["pseudo:p60", "pseudo:p61", "pseudo:p75"] and extra.labels.tolist() == [1, 0, 1]
    assert known.soft is None and (judge.origin == splits.OWN).all()
    soft, _, _ = splits.load_rows(cfg_of(**{**vars(cfg), "path": path, "pseudo_soft": True}), SILENT)
    np.testing.assert_allclose(soft.targets[-3:], [[0.03, 0.97], [0.95, 0.05], [0.09, 0.91]], atol=1e-6)
    assert np.array_equal(soft.targets[:-3], np.eye(2)[soft.labels[:-3]])
    flags = {"pseudo_labels": tmp_path / "told.csv", "pseudo_data": rest, "pseudo_soft": "true", "val_size": 0.2}
    told = train.main(toy_flags(tmp_path, small_base, train_data=path, **flags, **BINARY))
    assert told["train_rows"] == 48 + 3
    (tmp_path / "bad.csv").write_text("id,probability_False,probability_True\nnobody,0,1\n")
    with pytest.raises(UserError, match="1 of its ids are not among the rows of --pseudo_data"):
        train.main(
            toy_flags(
                tmp_path, small_base, train_data=path, **{**flags, "pseudo_labels": tmp_path / "bad.csv"}, **BINARY
            )
        )


# ---- preflight ------------------------------------------------------------------------------------------------------


def test_preflight_stops_what_cannot_be_right_within_seconds(slices, tmp_path, monkeypatch):
    runs, path, base = slices
    rows = files.read_rows(str(path), "x")
    known = np.arange(len(rows)) % 3 == 0
    good = trained.load_run(runs[-1]["run"])
    assert "preflight of 16 rows: the adapter moves the logits" in evaluate.preflight(
        good, rows, known.astype(int), 4096
    )
    cases = {
        "scores that are not finite": lambda run: run.model.score.weight.fill_(float("nan")),
        "the model ignores its input": lambda run: run.model.score.weight.fill_(0.0),
    }
    for words, spoil in cases.items():
        run = trained.load_run(runs[-1]["run"])
        with torch.no_grad():
            spoil(run)
        started = time.perf_counter()
        with pytest.raises(Degenerate, match=words):
            evaluate.preflight(run, rows, None, 4096)
        assert time.perf_counter() - started < 10
    run = trained.load_run(runs[-1]["run"])
    for name, tensor in run.model.named_parameters():
        if "lora_B" in name:
            tensor.data.zero_()
    with pytest.raises(Degenerate, match="the adapter does not move the logits"):
        evaluate.preflight(run, rows, None, 4096)


def test_an_adapter_of_another_model_is_stopped_before_any_weight_is_loaded(tmp_path, small_base, monkeypatch):
    for adapter, base, wrong in (
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", "/kaggle/input/qwen2.5/transformers/0.5b-instruct/1", False),
        ("/root/base/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B", False),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct", True),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B", True),
        ("", "Qwen/Qwen2.5-0.5B", False),
    ):
        named = type("Adapter", (), {"base": adapter})
        assert bool(foreign.base_mismatch(named, base)) == wrong, (adapter, base)


# ---- time limits ----------------------------------------------------------------------------------------------------


def test_a_run_with_a_limit_ends_in_time_whole(tmp_path, small_base, command):
    """The user's command: 25 seconds for what would take half an hour."""
    flags = ["--base", small_base, "--epochs", "2000", "--time_limit", "25s", "--audit", "none", "--max_length", "96"]
    started = time.monotonic()
    status, out, err = command("train.py", *flags, timeout=200)
    seconds = time.monotonic() - started
    assert status == 0, err[-2000:]
    told = json.loads(out.strip().splitlines()[-1])
    assert (
        seconds < 25 + 15
        and "stopped early" in out
        and ("forecast: " in out or told["steps"] < 11)
        and "--time_limit 25s" in out
    )
    run = Path(told["run"])
    assert checkpoint.finished(run) and checkpoint.verify(run / "best")["step"] == told["best_step"] <= told["steps"]
    assert told["metrics"]["rows"] == 400


def test_rows_that_are_not_reached_in_time_get_the_shares_of_the_training_rows(slices, tmp_path, monkeypatch):
    runs, path, _ = slices
    flags = ["--runs", runs[-1]["run"], "--input", str(path), "--submission", "", "--max_tokens", "64", "--force"]
    infer.main([*flags, "--output", str(tmp_path / "all.csv")])
    ticks = iter(range(10**9))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: float(next(ticks)))  # a second passes at every look
    monkeypatch.setattr(loop, "process_seconds", lambda: 0.0)
    told = infer.main([*flags, "--output", str(tmp_path / "some.csv"), "--time_limit", "16s"])
    some, every = (files.read_rows(str(tmp_path / f"{n}.csv"), "x") for n in ("some", "all"))
    left = [r["id"] for r in files.read_rows(str(tmp_path / "some.csv.unscored.csv"), "x")]
    assert 0 < len(left) == told["unscored"] < 90 == len(some) and [r["id"] for r in some] == [r["id"] for r in every]
    prior = json.loads((Path(runs[-1]["run"]) / "labels.json").read_text())["shares"]
    shares = prior  # as they are, not calibrated
    for one, other in zip(some, every, strict=True):
        if one["id"] in left:
            assert [float(one[f"probability_{v}"]) for v in ("False", "True")] == pytest.approx(shares, abs=1e-5)
        else:
            assert float(one["probability_True"]) == pytest.approx(float(other["probability_True"]), abs=1e-5)


def test_partial_gathering_keeps_what_came():
    world = ddp.World(0, 1, torch.device("cpu"))
    found = ddp.gather_rows(world, np.array([2, 0]), np.array([[1.0], [3.0]], np.float32), 4, partial=True)
    assert found[[0, 2], 0].tolist() == [3.0, 1.0] and np.isnan(found[[1, 3]]).all()
    with pytest.raises(AssertionError, match="2 of 4 rows were not scored exactly once"):
        ddp.gather_rows(world, np.array([2, 0]), np.array([[1.0], [3.0]], np.float32), 4)


@pytest.mark.parametrize("text, seconds", [("", 0), ("60s", 60), ("8.5h", 30600), ("90m", 5400), ("1h30m", 5400)])
def test_durations(text, seconds):
    from checks import seconds as read

    assert read(text) == seconds


@pytest.mark.parametrize("text", ["60", "h", "1d", "-5s", "1 h", "8,5h"])
def test_what_is_no_duration_is_refused(text, small_base, tmp_path):
    with pytest.raises(UserError, match="expected a duration like 8.5h, 90m or 60s"):
        train.main([*toy_flags(tmp_path, small_base), "--time_limit", text])


# ---- what a review found --------------------------------------------------------------------------------------------


def test_a_run_that_starts_from_another_does_so_after_a_kill_before_its_first_save_too(slices, tmp_path):
    runs, path, base = slices
    flags = toy_flags(
        tmp_path, base, train_data=path, balance="true", train_start=16, train_stop=32, val_size=0.2, lr=1e-12,
        head_lr=1e-12, init_from=runs[0]["run"], **BINARY,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Log, "write", lambda self, line: (_ for _ in ()).throw(KeyboardInterrupt("killed")))
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    told = train.main([*flags, "--resume", "auto"])
    ours, theirs = (
        checkpoint.load_tensors(Path(r) / "best/adapter_model.safetensors") for r in (told["run"], runs[0]["run"])
    )
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in theirs)


@pytest.mark.parametrize("how", ["a fold", "another spelling", "a validation file"])
def test_rows_learned_before_are_noticed_however_the_chain_began(how, small_base, tmp_path):
    path, more = write_pairs(tmp_path / "p.jsonl", 60), {}
    first = {"a fold": {"folds": 2}, "a validation file": {"val_data": write_pairs(tmp_path / "v.jsonl", 70)}}.get(
        how, {}
    )
    if how == "another spelling":
        more = {"train_data": tmp_path / ".." / tmp_path.name / "p.jsonl", "split_seed": 9}
    begun = train.main(
        toy_flags(tmp_path, small_base, train_data=path, val_size=None if first else 0.2, **{**BINARY, **first})
    )
    start = Path(begun["run"]) / "fold_0" if how == "a fold" else begun["run"]
    settings = {**BINARY, "train_data": path, "val_size": 0.3, "init_from": start, **more}
    with pytest.raises(UserError, match="validation rows of this run were trained on there"):
        train.main(toy_flags(tmp_path, small_base, **settings))


def test_one_seed_is_that_seed(small_base, tmp_path):
    flags = toy_flags(tmp_path, small_base, seeds="5", audit="none")
    told = train.main(flags)
    alone = train.main(toy_flags(tmp_path, small_base, seed=5, audit="none"))
    assert list(told["runs"]) == ["seed_5"] and told["runs"]["seed_5"] == alone["metrics"]
    assert trained.load_run(told["run"]).predict(["1 + 1"])


def test_a_limit_is_shared_by_the_runs_of_a_family(small_base, tmp_path, monkeypatch):
    asked = []
    before = loop.Limit.__init__
    monkeypatch.setattr(loop.Limit, "__init__", lambda s, end, *a: (asked.append(end), before(s, end, *a))[1])
    train.main(toy_flags(tmp_path, small_base, val_data=None, folds=2, time_limit="2h", audit="none", max_steps=2))
    now = loop.process_seconds()
    assert len(asked) == 2 and asked[0] - now == pytest.approx(3600 - now / 2, abs=120)
    assert asked[1] == pytest.approx(7200, abs=5)


def test_a_finished_fold_of_other_texts_is_not_taken(small_base, tmp_path):
    flags = toy_flags(tmp_path, small_base, val_data=None, folds=2, audit="none", max_steps=2)
    run = Path(train.main(flags)["run"])
    (run / "result.json").unlink()  # as if it had been killed before its end
    path = tmp_path / "train.csv"
    rows = files.read_rows(str(path), "x")
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows({**r, "Question": r["Question"][::-1]} for r in rows)
    with pytest.raises(UserError, match="was trained on other rows or tokens"):
        train.main(["--resume", str(run)])


@pytest.mark.parametrize(
    "lines, words",
    [
        (["p0,train", "p0,validation"], "ids stand twice"),
        (["p0,train", "p1,val"], "expected train, later and some validation"),
        (["p0,train", "p1,train"], "expected train, later and some validation"),
    ],
)
def test_a_split_that_cannot_be_is_refused(lines, words, small_base, tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", 30)
    (tmp_path / "split.csv").write_text("\n".join(["id,part", *lines]) + "\n")
    with pytest.raises(UserError, match=words):
        train.main(toy_flags(tmp_path, small_base, train_data=path, split=tmp_path / "split.csv", **BINARY))


def test_pseudo_labels_of_repeated_ids_or_of_validation_texts_are_not_learned(small_base, tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", 60)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    (tmp_path / "rest.jsonl").write_text("".join(json.dumps({**r, "id": f"x{i}"}) + "\n" for i, r in enumerate(lines)))
    told = "id,probability_False,probability_True\n" + "".join(f"x{i},0,1\n" for i in range(60))
    (tmp_path / "told.csv").write_text(told)
    same = {"pseudo_labels": str(tmp_path / "told.csv"), "pseudo_data": str(tmp_path / "rest.jsonl")}
    known, judge, _ = splits.load_rows(cfg_of(path, **same), SILENT)
    extra = {r["id"] for r in known.take(np.flatnonzero(known.origin == splits.PSEUDO)).rows}
    assert extra == {f"x{i}" for i in range(60)} - {f"x{i[1:]}" for i in judge.ids}
    (tmp_path / "told.csv").write_text(told + "x0,1,0\n")
    with pytest.raises(UserError, match="ids stand twice"):
        splits.load_rows(cfg_of(path, **same), SILENT)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"kept": "nope"}, "--kept nope: no field of the text, which has question, solution"),
        ({"budgets": "bdy=5"}, "--budgets bdy: no field of the text"),
        ({"examples": "solution=True", "examples_column": "id"}, "--examples_column id: the text has"),
        ({"seeds": "1,01"}, "each once"),
        ({"split": "x.csv", "split_seed": 3}, "--split_seed has no effect with --split"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(changes, words, small_base, tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", 30)
    with pytest.raises(UserError, match=words):
        train.main(toy_flags(tmp_path, small_base, train_data=path, **{**BINARY, **changes}))


def test_examples_without_an_id_column_are_audited_by_their_rows(small_base, tmp_path, capsys):
    path = write_rules(tmp_path / "rules.csv")
    flags = {**BINARY, **RULES, "examples": "positive=1,negative=0", "id_column": "nothing", "audit": "near"}
    told = train.main(toy_flags(tmp_path, small_base, train_data=path, val_size=0.25, **flags))
    assert told["train_rows"] > 36


# ---- rounds of pseudo-labels ----------------------------------------------------------------------------------------


def rounds_of():
    spec = importlib.util.spec_from_file_location("pseudo_rounds", ROOT / "runs/pseudo_rounds.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rounds_are_judged_by_clean_rows_and_stopped_by_drift_and_collapse():
    rounds, options = rounds_of(), argparse.Namespace(fall=0.01, drift=0.2, confidence=0.8)
    rows = [{"probability_a": str(p), "probability_b": str(1 - p)} for p in (0.9, 0.85, 0.6, 0.3)]
    found = rounds.judge(rows, ["a", "b"], [0.5, 0.5], 0.8)
    assert found == {"confident": 2, "drift": 0.25, "largest": 1.0}
    good = {"accuracy": 0.8, "confident": 9, "drift": 0.1, "largest": 0.6}
    assert rounds.why_stop([good], "accuracy", options) == ""
    for change, words in (
        ({"accuracy": 0.78}, "accuracy on the clean rows fell from 0.8000 to 0.7800"),
        ({"drift": 0.3}, "drifted by 0.300"),
        ({"confident": 0}, "no row reaches the confidence 0.8"),
        ({"largest": 1.0}, "one class takes every confident row"),
    ):
        assert words in rounds.why_stop([good, {**good, **change}], "accuracy", options)
    assert rounds.why_stop([{**good, "log_loss": 0.5}, {**good, "log_loss": 0.4}], "log_loss", options) == ""


def test_two_rounds_as_a_user_runs_them(small_base, tmp_path):
    path, clean, test = (tmp_path / f"{n}.jsonl" for n in ("train", "clean", "test"))
    lines = [json.loads(line) for line in write_pairs(tmp_path / "all.jsonl", 90).read_text().splitlines()]
    for target, some in ((path, lines[:50]), (clean, lines[50:70])):
        target.write_text("".join(json.dumps(r) + "\n" for r in some))
    test.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "is_correct"}) + "\n" for r in lines[70:]))
    flags = toy_flags(tmp_path, small_base, train_data=path, val_size=0.2, **BINARY)
    start = [
        sys.executable,
        str(ROOT / "runs/pseudo_rounds.py"),
        "--rounds",
        "1",
        "--confidence",
        "0.55",
        "--drift",
        "1",
    ]
    start += ["--fall", "1", "--out", str(tmp_path / "rounds"), "--test", str(test)]
    done = subprocess.run([*start, "--clean", str(clean), "--", *flags], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert [r["round"] for r in told["rounds"]] in ([0], [0, 1]) and len(files.read_rows(told["output"], "x")) == 20
    for wrong, words in ((test, "no column is_correct"), (path, "some of its rows stand in")):
        done = subprocess.run([*start, "--clean", str(wrong), "--", *flags], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
