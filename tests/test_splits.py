"""Which rows train and which judge: hold-outs, folds, groups, rows that only train, and the rows of old runs."""

import csv
import hashlib
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import load_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import splits
import strata
from configs import TrainConfig
from errors import UserError

SILENT = lambda *words: None  # noqa: E731


# ---- draws ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(2, 60), min_size=2, max_size=8), st.floats(0.02, 0.9), st.booleans(), st.integers(0, 2**40))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_stratified_split_properties(counts, share, as_count, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    n, classes = len(labels), len(counts)
    total = int(round(n * share))
    size = float(total) if as_count else share
    if total < 1 or not classes <= total <= n - classes:
        if not as_count or total >= 1:
            with pytest.raises(UserError, match="--val_size"):
                strata.stratified(labels, size, seed)
        return
    held = strata.stratified(labels, size, seed)
    assert held.sum() == total  # the count form is exact
    taken = np.bincount(labels[held], minlength=classes)
    assert (taken >= 1).all() and (taken < counts).all()
    exact = np.array(counts) * total / n
    if (exact >= 1).all() and (exact <= np.array(counts) - 1).all():  # no class is at its bound
        assert (np.abs(taken - exact) < 1).all()
    assert np.array_equal(strata.stratified(labels, size, seed), held)


def test_stratified_split_changes_with_the_seed_and_never_with_global_state():
    labels, found = np.repeat(np.arange(4), 50), []
    for seed in (0, 1, 0):
        np.random.seed(seed + 5)
        random.seed(seed + 7)
        found.append(strata.stratified(labels, 0.2, seed).tolist())
    assert found[0] == found[2] != found[1]


def test_stratified_split_refuses_a_class_with_one_row():
    with pytest.raises(UserError) as e:
        strata.stratified(np.array([0, 0, 1, 2, 2, 0]), 0.5, 0)
    assert "class 1 (row 3)" in str(e.value) and "--val_data" in str(e.value)


# ---- who judges whom ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3, 5, 10])
@pytest.mark.parametrize("seed", range(3))
def test_folds_of_classes_differ_by_at_most_one_row_in_every_class(parts, seed):
    labels = np.random.default_rng(seed).choice(6, size=503, p=[0.5, 0.3, 0.1, 0.06, 0.03, 0.01])
    fold = strata.folds("single_label", labels, parts, seed)
    table = np.stack([np.bincount(labels[fold == k], minlength=6) for k in range(parts)])
    assert np.ptp(table, axis=0).max() <= 1 and np.ptp(table.sum(axis=1)) <= 1
    assert np.array_equal(fold, strata.folds("single_label", labels, parts, seed))
    assert not np.array_equal(fold, strata.folds("single_label", labels, parts, seed + 1))


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
@pytest.mark.parametrize("parts", [2, 5])
def test_a_group_is_never_parted_and_shares_are_kept(task, parts):
    rng = np.random.default_rng(7)
    groups = np.repeat(np.arange(160), rng.integers(1, 9, size=160))
    n = len(groups)
    labels = {
        "single_label": rng.choice(4, size=n, p=[0.5, 0.3, 0.15, 0.05]),
        "multi_label": (rng.random((n, 6)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02]).astype(np.float32),
        "regression": rng.random(n).astype(np.float32),
    }[task]
    shuffled = rng.permutation(n)
    labels, groups = labels[shuffled], groups[shuffled]
    fold = strata.folds(task, labels, parts, 0, groups)
    assert set(fold) == set(range(parts))
    assert all(len(set(fold[groups == g])) == 1 for g in np.unique(groups))
    sizes = np.bincount(fold)
    assert np.ptp(sizes) <= 2 * 8  # two of the largest groups
    if task != "regression":
        hot = labels if labels.ndim == 2 else np.eye(4)[labels]
        share = np.stack([hot[fold == k].mean(axis=0) for k in range(parts)])
        assert np.abs(share - hot.mean(axis=0)).max() < 0.04
    held = strata.hold_out(task, labels, 0.2, 0, groups)
    assert not set(groups[held]) & set(groups[~held]) and abs(held.mean() - 0.2) < 0.03


def test_groups_are_dealt_as_evenly_as_by_scikit_learn():
    from sklearn.model_selection import StratifiedGroupKFold

    rng = np.random.default_rng(3)
    groups, worst = np.repeat(np.arange(120), rng.integers(1, 15, size=120)), []
    labels = (rng.random(120)[groups] + 0.4 * rng.random(len(groups)) > 0.9).astype(int)  # groups lean to a class
    theirs = np.zeros(len(groups), int)
    split = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, groups)
    for k, (_, held) in enumerate(split):
        theirs[held] = k
    for fold in (strata.folds("single_label", labels, 5, 0, groups), theirs):
        worst.append(np.ptp([labels[fold == k].mean() for k in range(5)]) + np.ptp(np.bincount(fold)) / len(fold))
    assert worst[0] <= worst[1] + 0.01, worst


def cfg_of(shared: Path, name: str, **changes) -> TrainConfig:
    of = {
        "math": {"train_data": shared / "data/math_problems/train.csv"},
        "reuters": {
            "train_data": shared / "data/reuters/train.jsonl", "task": "multi_label", "label_column": "labels",
            "text": "{title} {text}",
        },
        "rules": {
            "train_data": shared / "data/reddit_rules/train.csv", "text": "{rule} {body}", "id_column": "row_id",
            "label_column": "rule_violation", "group_column": "body",
        },
        "verification": {
            "train_data": shared / "data/math_verification/train.jsonl", "text": "{question} {solution}",
            "label_column": "is_correct", "group_column": "question",
        },
    }[name]  # fmt: skip
    return TrainConfig(**{**of, "train_data": str(of["train_data"]), **changes})


@pytest.mark.parametrize("name", ["math", "reuters", "rules", "verification"])
def test_on_real_data_every_row_is_judged_once_and_shares_are_kept(shared, name):
    rows, _, labels = splits.read(cfg_of(shared, name), SILENT)
    every = np.zeros(len(rows.ids), int)
    hot = rows.labels if rows.labels.ndim == 2 else np.eye(len(labels.values))[rows.labels]
    for fold in range(5):
        cfg = cfg_of(shared, name, folds=5, fold=fold)
        held = splits.held_out(cfg, rows)
        every += held
        known, judges = splits.cut(cfg, rows, None)
        assert len(known.ids) + len(judges.ids) == len(rows.ids)
        # of labels with 50 rows and more: a row from a fifth for classes, 5 rows or 2% for label sets, 10% in groups
        got, want = hot[held].sum(axis=0), hot.sum(axis=0) / 5
        room = {"math": 1.0, "reuters": np.maximum(5, 0.02 * want[hot.sum(axis=0) >= 50])}.get(name, 0.1 * want.max())
        assert (np.abs(got - want)[hot.sum(axis=0) >= 50] <= room).all(), np.abs(got - want).max()
        assert abs(held.sum() - len(every) / 5) <= (1 if name == "math" else 0.02 * len(every))
        if cfg.group_column:
            assert not {r[cfg.group_column] for r in known.rows} & {r[cfg.group_column] for r in judges.rows}
    assert (every == 1).all()


def test_rows_without_a_group_stand_alone():
    rows = splits.Split([{"g": g} for g in ("a", "", "b", " ", "a")], list("12345"), np.zeros(5, int))
    assert splits.groups_of(TrainConfig(group_column="g"), rows).tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("column", ["subreddit", "body"])
@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_hold_out_of_real_groups_has_its_share_of_rows_and_classes(shared, column, share):
    """Groups of up to 100 rows (subreddits) or of a few (bodies): within a hundredth of the rows, 4 of the classes."""
    known, judge, _ = load_rows(cfg_of(shared, "rules", group_column=column, val_size=share), SILENT)
    rows = len(known.ids) + len(judge.ids)
    assert abs(len(judge.ids) / rows - share) < 0.01 and abs(judge.labels.mean() - known.labels.mean()) < 0.04
    assert not {r[column] for r in known.rows} & {r[column] for r in judge.rows}


PINNED = {  # (task, in groups): sha256 of folds and hold-out, as they were before this file was written anew
    ("single_label", False): "afc27baf8a08fa70",
    ("single_label", True): "848db621c15b8500",
    ("multi_label", False): "a8010e1784dbd283",
    ("multi_label", True): "056b706b56ef50ae",
    ("regression", False): "cddf6f521979c58c",
    ("regression", True): "48842b75cf6a8ae2",
}


@pytest.mark.parametrize("task, grouped", PINNED)
def test_draws_are_those_of_every_earlier_version(task, grouped):
    """A resumed run, and a fold that is trained elsewhere, must find the same rows."""
    rng = np.random.default_rng(11)
    targets = {
        "single_label": rng.choice(4, size=301, p=[0.5, 0.3, 0.15, 0.05]),
        "multi_label": (rng.random((301, 5)) < [0.5, 0.3, 0.2, 0.1, 0.05]).astype(np.float32),
        "regression": rng.random(301).astype(np.float32),
    }[task]
    groups = np.unique(rng.integers(0, 80, 301), return_inverse=True)[1] if grouped else None
    fold, held = strata.folds(task, targets, 5, 3, groups), strata.hold_out(task, targets, 0.2, 3, groups)
    found = hashlib.sha256(np.concatenate([fold, held]).astype(np.int64).tobytes()).hexdigest()[:16]
    assert found == PINNED[task, grouped]


# ---- rows that only train -------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> str:
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def posts(count: int, **more) -> list[dict]:
    return [
        {"id": f"r{i}", "Question": f"text {i}", "label": "abc"[i % 3], "g": f"g{i // 2}", **more} for i in range(count)
    ]


@pytest.mark.parametrize("changes", [{"val_size": 0.2}, {"folds": 4}, {"folds": 3, "group_column": "g"}])
def test_rows_that_only_train_change_no_draw_and_train_in_every_fold(tmp_path, changes):
    own = posts(60)
    more = [
        {"id": f"x{i}", "Question": f"other {i}", "label": "abc"[i % 3], "g": "", "train_only": "yes"}
        for i in range(20)
    ]
    mixed = [{**row, "train_only": ["0", "", "no", "False"][i % 4]} for i, row in enumerate(own)]
    for i, row in enumerate(more):
        mixed.insert(3 * i, row)
    alone = TrainConfig(train_data=write(tmp_path / "own.csv", own), **changes)
    both = replace(alone, train_data=write(tmp_path / "both.csv", mixed))
    for fold in range(changes.get("folds", 1)):
        known, judges, _ = load_rows(replace(alone, fold=fold), SILENT)
        known_of_both, judges_of_both, _ = load_rows(replace(both, fold=fold), SILENT)
        assert judges_of_both.ids == judges.ids and judges_of_both.train_only.sum() == 0
        order = [row["id"] for row in mixed]
        assert known_of_both.ids == sorted(known.ids + [row["id"] for row in more], key=order.index)
    rows, _, labels = splits.read(both, SILENT)
    assert rows.judging().ids == [row["id"] for row in own]
    assert splits.class_shares(rows, labels).tolist() == [1 / 3] * 3


def test_rows_that_the_judges_would_know_are_left_out(tmp_path):
    """By their text, normalized, and by their group; of a row without a group only the text counts."""
    own, heard = posts(40), []
    cfg = TrainConfig(train_data=write(tmp_path / "own.csv", own), group_column="g", val_size=0.25)
    _, judges, _ = load_rows(cfg, SILENT)
    judge, other = judges.rows[0], next(row for row in own if row["id"] not in judges.ids)
    more = [
        {"id": "same text", "Question": f"  {judge['Question'].upper()}", "g": ""},
        {"id": "same group", "Question": "new", "g": f" {judge['g']} "},
        {"id": "both known to training", "Question": other["Question"], "g": other["g"]},
        {"id": "no group", "Question": "newer", "g": " "},
    ]
    rows = [{**row, "train_only": 0} for row in own] + [{**row, "label": "a", "train_only": 1} for row in more]
    cfg = replace(cfg, train_data=write(tmp_path / "both.csv", rows))
    rows, val, _ = splits.read(cfg, heard.append)
    known, again = splits.cut(cfg, rows, val, say=heard.append)
    assert again.ids == judges.ids and known.ids[-2:] == ["both known to training", "no group"] and len(known.ids) == 32
    assert heard == [
        "train_only: 4 of 44 rows never judge",
        "train_only: 2 rows left out, whose text or group is among the validation rows",
    ]
    lines = splits.split_csv(cfg, rows, val).splitlines()
    assert lines[0] == "id,part" and lines[31:35] == [
        "both known to training,train", "no group,train", "same text,left out", "same group,left out",
    ]  # fmt: skip
    assert [line.split(",")[0] for line in lines[35:]] == judges.ids


def test_a_validation_file_drops_known_rows_too_and_holds_none_itself(tmp_path):
    val = write(tmp_path / "val.csv", posts(6))
    rows = [{"id": "a", "Question": "text 3", "label": "a", "train_only": 1}]
    rows += [{"id": "b", "Question": "text 4", "label": c, "train_only": 0} for c in "abc"]
    cfg = TrainConfig(train_data=write(tmp_path / "train.csv", rows), val_data=val)
    known, judges, _ = load_rows(cfg, SILENT)
    assert known.ids == ["b"] * 3 and len(judges.ids) == 6
    with pytest.raises(UserError, match="--val_data .*: 1 rows are marked train_only"):
        load_rows(replace(cfg, val_data=cfg.train_data), SILENT)


# ---- soft targets ---------------------------------------------------------------------------------------------------


def test_soft_targets_follow_their_rows_and_are_part_of_the_digest(tmp_path):
    rows, heard = posts(30), []
    for i, row in enumerate(rows):
        row |= {f"probability_{c}": "" if i % 5 == 0 else 0.5 if c == row["label"] else 0.25 for c in "abc"}
    cfg = TrainConfig(train_data=write(tmp_path / "soft.csv", rows), val_size=0.2)
    read, _, labels = splits.read(cfg, heard.append)
    assert heard == ["probability columns: 24 of 30 rows have soft targets"]
    known, judges = splits.cut(cfg, read, None)
    for part in (known, judges):
        untaught = np.array([int(id[1:]) % 5 == 0 for id in part.ids])
        assert np.array_equal(np.isnan(part.soft).all(axis=1), untaught) and part.soft.dtype == np.float32
        assert np.array_equal(part.soft[~untaught].argmax(axis=1), part.labels[~untaught])
    known.tokens = data.join_tokens([[i] for i in range(len(known.ids))])
    plain = replace(known, soft=None)
    assert plain.digest() == known.tokens.digest(known.labels) != known.digest()
    changed = replace(known, soft=known.soft[::-1])
    assert changed.digest() != known.digest()


# ---- the rows of old runs -------------------------------------------------------------------------------------------


def old_run(folder: Path, lines: list[tuple[str, str]], **fields) -> Path:
    """A run folder of before slices.py: its config and split.csv."""
    config = {**asdict(TrainConfig()), "fold": "all", "seeds": [], "balance": False, "train_start": 0, "train_stop": 0}
    config |= {"split": "", "examples": [], "pseudo_labels": "", **fields}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "split.csv").write_text("id,part\n" + "".join(f"{id},{part}\n" for id, part in lines))
    return folder


def tokenized(cfg: TrainConfig) -> splits.Split:
    rows, _, _ = splits.read(cfg, SILENT)
    rows.tokens = data.join_tokens([list(range(1, 2 + int(id[1:]))) for id in rows.ids])
    return rows


@pytest.mark.parametrize("field", ["balance", "train_stop", "split"])
def test_an_old_slice_is_resumed_on_its_own_rows_in_their_order(tmp_path, field):
    """The digest is that of an old run, which had tokenized these rows alone, in the order of the file or the split."""
    cfg = TrainConfig(train_data=write(tmp_path / "rows.csv", posts(30)), val_size=0.2)
    order = np.random.default_rng(0).permutation(30)[:24].tolist()
    lines = [(f"r{i}", "train" if k < 10 else "later" if k < 18 else "validation") for k, i in enumerate(order)]
    run = old_run(tmp_path / "run", lines, **{field: {"split": "other/split.csv"}.get(field, 20)})
    known, judges = splits.cut(cfg, tokenized(cfg), None, run)
    assert known.ids == [f"r{i}" for i in order[:10]] and judges.ids == [f"r{i}" for i in order[18:]]
    pool = order if field == "split" else sorted(order)
    tokens = data.join_tokens([list(range(1, 2 + i)) for i in pool])
    theirs = tokens.take(np.array([pool.index(i) for i in order[:10]]))
    assert known.digest() == theirs.digest(np.array([i % 3 for i in order[:10]]))
    val = tokenized(cfg)
    assert splits.cut(cfg, tokenized(cfg), val, run)[1] is val, "a validation file judges, if there is one"


def test_other_old_runs_are_drawn_as_ever(tmp_path):
    cfg = TrainConfig(train_data=write(tmp_path / "rows.csv", posts(30)), val_size=0.2)
    run = old_run(tmp_path / "run", [("r0", "train"), ("r1", "validation")])
    rows = tokenized(cfg)
    for recorded, drawn in zip(splits.cut(cfg, rows, None, run), splits.cut(cfg, rows, None), strict=True):
        assert recorded.ids == drawn.ids and recorded.digest() == drawn.digest()


@pytest.mark.parametrize(
    "fields, lines, words",
    [
        ({"examples": ["positive=1"]}, [], "--examples moved to runs/example_rows.py; start a new run"),
        ({"pseudo_labels": "p.csv", "balance": True}, [], "--pseudo_labels moved to runs/pseudo_labels.py"),
        ({"balance": True}, [("r0", "train"), ("r0", "validation")], "needs unique ids that --train_data has too"),
        ({"train_start": 5}, [("r0", "train"), ("q", "validation")], "needs unique ids that --train_data has too"),
    ],
)
def test_old_runs_that_cannot_be_resumed_say_why(tmp_path, fields, lines, words):
    cfg = TrainConfig(train_data=write(tmp_path / "rows.csv", posts(30)), val_size=0.2)
    run = old_run(tmp_path / "run", lines, **fields)
    with pytest.raises(UserError, match=f"--resume {run}: .*{words}"):
        splits.cut(cfg, tokenized(cfg), None, run)


# ---- the rows of periodic evaluations -------------------------------------------------------------------------------

SETS = np.array([[1, 0], [0, 1], [1, 1]], np.float32)


@pytest.mark.parametrize(
    "task, metric, labels, classes, needed",
    [
        ("single_label", "roc_auc", np.array([0, 1, 1]), 3, "rows with and without every label"),
        ("single_label", "micro_f1", np.array([0, 0, 0]), 3, None),
        ("multi_label", "roc_auc", SETS[[0, 2]], 2, "rows with and without every label"),
        ("multi_label", "average_precision", SETS[[0, 2]], 2, None),
        ("multi_label", "average_precision", SETS[[0, 0]], 2, "rows with every label"),
        ("regression", "roc_auc", np.array([0.0, 1.0, 0.5]), 1, "rows with and without every label"),
        ("regression", "roc_auc", np.array([0.0, 1.0, 1.0]), 1, None),
        ("regression", "pearson", np.array([2.0, 2.0]), 1, "different numbers"),
        ("regression", "r2", np.array([2.0, 2.5]), 1, None),
    ],
)
def test_a_metric_that_the_validation_rows_cannot_define_is_refused(task, metric, labels, classes, needed):
    cfg = TrainConfig(task=task, metric=metric)
    if needed:
        with pytest.raises(UserError, match=f"--metric {metric} needs {needed} among the validation rows"):
            splits.periodic_rows(cfg, labels, classes)
    else:
        assert splits.periodic_rows(cfg, labels, classes).tolist() == list(range(len(labels)))


def test_periodic_rows_are_drawn_once_from_the_seed():
    cfg, labels = TrainConfig(eval_rows=10), np.arange(50) % 2
    rows = splits.periodic_rows(cfg, labels, 2)
    assert len(set(rows)) == 10 and (np.diff(rows) > 0).all()
    assert np.array_equal(rows, splits.periodic_rows(cfg, labels, 2))
    assert not np.array_equal(rows, splits.periodic_rows(replace(cfg, seed=1), labels, 2))
