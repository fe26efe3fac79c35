"""Ensembles: the arithmetic, and the command over runs, families of runs and files of other systems."""

import csv
import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ddp import forks, toy_flags, write_rows
from test_multilabel import NAMES, flags_of
from test_multilabel import write_rows as write_label_rows

import decide
import ensemble
import evaluate
import files
import infer
import loop
import report
import report_runs
import train
import trained
from errors import UserError

pytestmark = forks
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def softmax(z):
    shares = np.exp(z - z.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def single_loss(z, y):
    return float(np.logaddexp.reduce(z, axis=1).mean() - z[np.arange(len(y)), y].mean())


def rows_of(task, rows=300, classes=4, seed=0, scale=2.0):
    """Logits (N, C) that know the labels but are over-confident and shifted, and the labels."""
    rng = np.random.default_rng(seed)
    if task == "single_label":
        y = rng.integers(classes, size=rows)
        return (rng.normal(size=(rows, classes)) + np.eye(classes)[y]) * scale, y
    y = (rng.random((rows, classes)) < np.linspace(0.5, 0.04, classes)).astype(int)
    return (rng.normal(size=y.shape) + 2 * y - 2.2) * scale, y


def probabilities(task, z):
    return softmax(z) if task == "single_label" else 1 / (1 + np.exp(-z))


def loss_of(task, z, y):
    return single_loss(z, y) if task == "single_label" else float(np.logaddexp(0, np.where(y, -z, z)).mean())


def members_of(task, classes, seed, rows=80, count=3):
    """Members that saw the labels through noise of different strengths."""
    z, y = rows_of(task, rows=rows, classes=classes, seed=seed)
    rng = np.random.default_rng(seed + 1)
    return [z * rng.uniform(0.2, 2) + rng.normal(size=z.shape) * rng.uniform(0, 4) for _ in range(count)], y


@pytest.mark.parametrize("task, classes", [("single_label", 2), ("single_label", 4), ("multi_label", 3)])
def test_ensembles_are_the_means_their_names_say(task, classes):
    members, _ = members_of(task, classes, 0)
    np.testing.assert_allclose(ensemble.combine(members, "mean_logit", task=task), np.mean(members, axis=0))
    each = np.array([probabilities(task, z) for z in members])
    got = probabilities(task, ensemble.combine(members, "mean_prob", task=task))
    np.testing.assert_allclose(got, each.mean(axis=0), rtol=1e-9)
    weights = np.array([0.7, 0.0, 0.3])
    got = probabilities(task, ensemble.combine(members, "weighted", weights, task))
    np.testing.assert_allclose(got, np.tensordot(weights, each, 1), rtol=1e-9)
    for how in ("mean_logit", "mean_prob"):  # one member is itself, up to a row's shift, however large
        alone, big = ensemble.combine([members[0] * 1e3], how, task=task), members[0] * 1e3
        shift = (alone - big)[:, :1] if task == "single_label" else 0
        np.testing.assert_allclose(alone - shift, big, atol=1e-8)


def test_rank_ensemble_is_the_mean_of_midranks():
    rank = pytest.importorskip("scipy.stats").rankdata
    members, _ = members_of("multi_label", 3, 1)
    members[1] = np.round(members[1])  # ties
    want = np.mean([(rank(z, axis=0) - 0.5) / 80 for z in members], axis=0)
    got = probabilities("multi_label", ensemble.combine(members, "rank", task="multi_label"))
    np.testing.assert_allclose(got, want, rtol=1e-12)
    two, _ = members_of("single_label", 2, 1)
    want = np.mean([(rank(z[:, 1] - z[:, 0]) - 0.5) / 80 for z in two], axis=0)
    np.testing.assert_allclose(softmax(ensemble.combine(two, "rank"))[:, 1], want, rtol=1e-9)
    assert (ensemble.combine([z[:1] for z in members], "rank", task="multi_label") == 0).all(), "one row has no rank"


MAPS = [lambda x: x**3 + 2 * x, lambda x: np.arctan(x), lambda x: 5 * x - 3, lambda x: np.exp(x / 9)]


@QUICK
@given(SEEDS, st.lists(st.sampled_from(MAPS), min_size=9, max_size=9))
def test_rank_ensemble_is_blind_to_increasing_maps(seed, maps):
    members, _ = members_of("multi_label", 3, seed, rows=25)
    members = [np.round(z, 2) for z in members]  # far enough apart to stay distinct, some tied
    before = ensemble.combine(members, "rank", task="multi_label")
    mapped = [np.stack([maps[3 * m + c](z[:, c]) for c in range(3)], axis=1) for m, z in enumerate(members)]
    np.testing.assert_array_equal(ensemble.combine(mapped, "rank", task="multi_label"), before)
    two = [z[:, :2] for z in members]
    margins = [np.round(z[:, 1] - z[:, 0], 2) for z in two]
    plain = ensemble.combine([np.stack([0 * d, d], axis=1) for d in margins], "rank")
    shifted = [np.stack([0 * d, maps[m](d)], axis=1) for m, d in enumerate(margins)]
    np.testing.assert_array_equal(ensemble.combine(shifted, "rank"), plain)


@QUICK
@given(SEEDS, st.sampled_from([("single_label", 2), ("single_label", 4), ("multi_label", 3)]), st.integers(1, 5))
def test_fitted_weights_are_never_worse_than_the_best_member(seed, case, count):
    task, classes = case
    members, y = members_of(task, classes, seed, count=count)
    weights = ensemble.fit_weights(members, y, task)
    assert weights.shape == (count,) and (weights >= 0).all() and weights.sum() == pytest.approx(1)
    fitted = loss_of(task, ensemble.combine(members, "weighted", weights, task), y)
    assert fitted <= min(loss_of(task, z, y) for z in members) + 1e-14
    rng = np.random.default_rng(seed)
    for other in [np.full(count, 1 / count), *rng.dirichlet(np.ones(count), 20)]:
        assert fitted <= loss_of(task, ensemble.combine(members, "weighted", other, task), y) + 1e-8


def test_fitted_weights_find_the_optimum_of_scipy():
    minimize = pytest.importorskip("scipy.optimize").minimize
    for task, classes in (("single_label", 4), ("multi_label", 3)):
        z, y = rows_of(task, rows=600, classes=classes, scale=1.0)
        rng = np.random.default_rng(5)
        members = [z + rng.normal(size=z.shape) * 1.5 for _ in range(4)]
        got = ensemble.fit_weights(members, y, task)

        def loss(free, members=members, task=task, y=y):
            weights = np.append(free, 0)
            weights = np.exp(weights - weights.max())
            return loss_of(task, ensemble.combine(members, "weighted", weights / weights.sum(), task), y)

        best = minimize(loss, np.zeros(3), tol=1e-12)
        want = np.append(best.x, 0)
        want = np.exp(want - want.max()) / np.exp(want - want.max()).sum()
        np.testing.assert_allclose(got, want, atol=2e-3)
        fitted = loss_of(task, ensemble.combine(members, "weighted", got, task), y)
        assert fitted <= best.fun + 1e-8
        assert fitted < min(loss_of(task, m, y) for m in members) - 0.01, "a mixture is better than each here"


def test_fitted_weights_at_the_edges():
    members, y = members_of("single_label", 4, 2)
    assert ensemble.fit_weights(members[:1], y, "single_label").tolist() == [1]
    assert ensemble.fit_weights([members[0]] * 3, y, "single_label").tolist() == [1, 0, 0], (
        "equal members: one is enough"
    )
    perfect = np.eye(4)[y] * 50
    assert ensemble.fit_weights([members[0], perfect], y, "single_label").tolist() == [0, 1]
    sure_and_wrong = np.eye(4)[(y + 1) % 4] * 1e5  # its probabilities underflow to 0
    assert ensemble.fit_weights([sure_and_wrong, members[0]], y, "single_label").tolist() == [0, 1]
    half = np.arange(len(y)) < 40
    a, b = np.where(half[:, None], perfect, sure_and_wrong), np.where(half[:, None], sure_and_wrong, perfect)
    np.testing.assert_allclose(ensemble.fit_weights([a, b], y, "single_label"), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = ensemble.fit_weights([*members, sure_and_wrong], y, "single_label")
    np.testing.assert_allclose(weights[:3], ensemble.fit_weights(members, y, "single_label"), atol=1e-3)
    assert weights[3] == 0, "a hopeless member is dropped, without a warning"
    constant = [np.zeros((5, 2)), np.zeros((5, 2))]
    assert ensemble.fit_weights(constant, np.zeros((5, 2)), "multi_label").sum() == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: ensemble.combine([], "mean_prob"), "got members of shapes"),
        (lambda: ensemble.combine([np.zeros((2, 2)), np.zeros((3, 2))], "mean_prob"), r"\(2, 2\), \(3, 2\)"),
        (lambda: ensemble.combine([[[0.0, np.nan]]], "mean_prob"), "finite logits"),
        (lambda: ensemble.combine([[[0.0, 1.0]]], "median"), "got 'median'"),
        (lambda: ensemble.combine([[[0.0, 1.0]]], "weighted"), "takes weights"),
        (lambda: ensemble.combine([[[0.0, 1.0]]], "rank", [1.0]), "takes weights"),
        (lambda: ensemble.combine([[[0.0, 1.0]]] * 2, "weighted", [0.5, 0.6]), "sum to 1"),
        (lambda: ensemble.combine([[[0.0, 1.0]]] * 2, "weighted", [-0.5, 1.5]), "0 or more"),
        (lambda: ensemble.combine([[[0.0, 1.0]]] * 2, "weighted", [1.0]), "expected 2 numbers"),
        (lambda: ensemble.fit_weights([[[0.0, 1.0]]], [0, 1], "single_label"), "labels: got shape"),
    ],
)
def test_errors_say_what_was_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(small_base, tmp_path_factory) -> tuple[list[str], Path]:
    """Runs of three seeds of the weights on the same validation rows."""
    out = tmp_path_factory.mktemp("three")
    path, rest = write_label_rows(out / "rows.jsonl", rows=80), write_label_rows(out / "val.jsonl", rows=40)
    flags = [flags_of(out, small_base, path, val_data=rest, val_size=None, max_steps=9, seed=s) for s in (1, 2, 3)]
    return [train.main(f)["run"] for f in flags], path


def combined(*flags) -> dict:
    return ensemble.main([str(flag) for flag in flags])


def shares_in(target: Path, names) -> np.ndarray:
    rows = files.read_rows(str(target), "input")
    return np.array([[float(row[f"probability_{name}"]) for name in names] for row in rows])


def predicted(flags: list, target: Path) -> tuple[dict, np.ndarray]:
    result = combined(*flags, "--output", target, "--submission", "")
    return result, shares_in(target, NAMES)


def write_table(path: Path, header: list[str], *columns) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([header, *zip(*columns, strict=True)])
    return path


@pytest.mark.parametrize("how", ["mean_logit", "mean_prob", "rank", "weighted"])
def test_an_ensemble_is_that_of_its_members_logits(three, tmp_path, how):
    runs, path = three
    result, shares = predicted(["--runs", *runs, "--input", path, "--ensemble", how], tmp_path / "o.jsonl")
    rows = files.read_rows(str(path), "input")
    logits = [trained.load_run(run).logits(rows)[0] for run in runs]
    cfg, labels = trained.run_facts(Path(runs[0]))
    known = [report_runs.validation_rows(Path(run), cfg, labels) for run in runs]
    weights = ensemble.fit_weights([k[2] for k in known], known[0][1], "multi_label") if how == "weighted" else None
    z = ensemble.combine(logits, how, weights, "multi_label").astype(np.float32)
    both = ensemble.combine([k[2] for k in known], how, weights, "multi_label")
    plain, fitted = decide.plain("multi_label", 3), decide.fit_decision("multi_label", both, known[0][1], "global")
    np.testing.assert_allclose(shares, decide.apply(plain if how == "rank" else fitted, z)[1], atol=1e-6)
    assert result["rows"] == 80 and result["runs"] == runs and "micro_f1" in result["metrics"]


def test_a_threshold_given_by_hand_decides(three, tmp_path):
    runs, path = three
    combined(
        "--runs", *runs[:2], "--input", path, "--output", tmp_path / "o.jsonl", "--submission", "", "--threshold", 0.3
    )
    for row in map(json.loads, open(tmp_path / "o.jsonl", encoding="utf-8")):
        assert row["prediction"] == [name for name in NAMES if row[f"probability_{name}"] > 0.3]


def test_a_csv_of_another_system_is_a_member(three, tmp_path):
    runs, path = three
    rows = files.read_rows(str(path), "input")
    first, z = (trained.load_run(run).logits(rows)[0].astype(np.float64) for run in runs[:2])
    other, ids = tmp_path / "other.csv", [row["id"] for row in rows]
    for name, values in (("logit", z), ("probability", 1 / (1 + np.exp(-z)))):
        write_table(other, ["id", *(f"{name}_{n}" for n in NAMES)], ids[::-1], *values[::-1].T.tolist())
        for members in ([runs[0], other], [other, runs[0]]):
            _, got = predicted(["--runs", *members, "--input", path], tmp_path / "o.jsonl")
            np.testing.assert_allclose(got, 1 / (1 + np.exp(-(first + z) / 2)), atol=1e-5)
        with pytest.raises(UserError, match="not validated on the same rows"):
            combined("--runs", runs[0], other, "--input", path, "--ensemble", "weighted")
    other.write_text("id,logit_algebra,logit_geometry,logit_rare\n0,1,2,3\n")
    with pytest.raises(UserError, match="79 of 80 ids are not in it"):
        combined("--runs", runs[0], other, "--input", path)
    other.write_text("id,logit_algebra,logit_geometry,logit_rare\n" + "".join(f"{i},1,2,3\n" for i in [*ids, "0"]))
    with pytest.raises(UserError, match="1 of its ids are duplicates"):
        combined("--runs", runs[0], other, "--input", path)


def test_members_must_fit_together(three, small_base, tmp_path):
    runs, path = three
    other = train.main(toy_flags(tmp_path, small_base, max_steps=2, eval_every=2))["run"]
    for flags, words in (
        (["--runs", runs[0], other], "its task or labels are not those"),
        (["--runs", runs[0], runs[0]], "a member is duplicated"),
        (["--runs", runs[0], "--ensemble", "rank"], "name two or more members"),
        (["--runs", *runs, "--id_column", "x"], "no column x"),
        (["--runs", *runs, "--output", "x.parquet"], "expected a name that ends in .csv or .jsonl"),
        (["--runs", *runs, "--ensemble", "median"], "--ensemble median: expected one of mean_logit"),
        (["--runs", *runs, "--threshold", "1.5"], "--threshold 1.5: expected a probability"),
        (["--runs", *runs, "--submission", "", "--answer", "label"], "--answer has no effect"),
    ):
        with pytest.raises(UserError, match=words):
            combined(*flags, "--input", path)


@pytest.fixture(scope="module")
def family(small_base, tmp_path_factory) -> tuple[Path, str, Path]:
    """A family of two runs, another run on the same validation rows, and rows to predict."""
    out = tmp_path_factory.mktemp("family")
    runs = [train.main(toy_flags(out, small_base, seed=seed, max_steps=4, eval_every=4))["run"] for seed in (1, 2, 3)]
    folder = out / "family"
    folder.mkdir()
    for name in ("config.json", "labels.json", "result.json", "val_predictions.csv"):
        shutil.copy(Path(runs[0]) / name, folder / name)
    members = {"seed_1": runs[0], "seed_2": "second"}
    shutil.copytree(runs[1], folder / "second")
    (folder / "family.json").write_text(json.dumps({"members": members, "folds": 0, "seeds": [1, 2]}))
    return folder, runs[2], write_rows(out / "new.csv", 31, skip=14)


def test_families_are_members_and_weighed_on_their_validation_rows(family, tmp_path):
    folder, other, path = family
    cfg, labels = trained.run_facts(folder)
    known = [report_runs.validation_rows(Path(run), cfg, labels) for run in (folder, other)]
    weights = ensemble.fit_weights([k[2] for k in known], known[0][1], "single_label")
    target = tmp_path / "w.csv"
    members = ["--runs", f"{folder}/", other]  # as completion in a shell writes it
    combined(*members, "--ensemble", "weighted", "--input", path, "--submission", "", "--output", target)
    rows = files.read_rows(str(path), "x")
    each = [trained.load_run(run).logits(rows)[0] for run in trained.members(folder).values()]
    z = [trained.load_run(run).logits(rows)[0] for run in (folder, other)]
    np.testing.assert_allclose(z[0], np.mean(each, axis=0), atol=1e-6)
    both = ensemble.combine(z, "weighted", weights).astype(np.float32)
    fitted = ensemble.combine([k[2] for k in known], "weighted", weights)
    decision = decide.fit_decision("single_label", fitted, known[0][1], "none")
    np.testing.assert_allclose(shares_in(target, range(8)), decide.apply(decision, both)[1], atol=1e-6)


def test_rows_that_a_member_does_not_reach_in_time_get_the_shares_of_the_training_rows(three, tmp_path, monkeypatch):
    runs, path = three
    ticks = iter(range(10**9))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: float(next(ticks)))  # a second passes at every look
    monkeypatch.setattr(loop, "process_seconds", lambda: 0.0)
    flags = ["--runs", *runs[:2], "--input", path, "--max_tokens", "64", "--force", "--time_limit", "16s"]
    result, shares = predicted(flags, tmp_path / "o.jsonl")
    left = [row["id"] for row in files.read_rows(str(tmp_path / "o.jsonl.unscored.csv"), "x")]
    assert 0 < len(left) == result["unscored"] < 80
    prior = json.loads((Path(runs[0]) / "labels.json").read_text())["shares"]
    late = np.array([row["id"] in left for row in files.read_rows(str(tmp_path / "o.jsonl"), "x")])
    assert np.allclose(shares[late], prior, atol=1e-5) and not np.isclose(shares[~late], prior).all(axis=1).any()


def test_a_regression_and_a_classifier_are_averaged_by_their_ranks(small_base, tmp_path):
    """The encoder's one output and the log-odds of two classes: midranks of each, averaged."""
    path = tmp_path / "rows.jsonl"
    rows = files.read_rows(str(write_rows(tmp_path / "rows.csv", 60)), "x")
    lines = [{"id": r["id"], "Question": r["Question"], "right": int(r["label"]) % 2} for r in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    same = {"train_data": path, "label_column": "right", "val_data": None, "val_size": 0.2, "max_steps": 4}
    first = train.main(toy_flags(tmp_path, small_base, **same))["run"]
    other = train.main(toy_flags(tmp_path, small_base, **same, task="regression", metric="roc_auc"))["run"]
    target = tmp_path / "both.csv"
    both = ["--runs", first, other, "--input", path, "--submission", "", "--output", target, "--force"]
    combined(*both, "--ensemble", "rank")
    rows = files.read_rows(str(path), "x")
    z, out = (trained.load_run(run).logits(rows)[0] for run in (first, other))
    rankdata = pytest.importorskip("scipy.stats").rankdata
    mean = (rankdata(z[:, 1] - z[:, 0]) + rankdata(out[:, 0])) / 2
    got = shares_in(target, (1,))[:, 0]
    assert np.array_equal(rankdata(np.round(got, 9)), rankdata(np.round(mean, 6)))
    with pytest.raises(UserError, match="its task or labels are not those"):
        combined(*both)


# ---- files alone ----------------------------------------------------------------------------------------------------


def tables_of(tmp_path: Path, kind: str = "probability", labels=("no", "yes")) -> list[Path]:
    """Two systems' files: 20 ids in different orders, the first with labels."""
    rng, paths = np.random.default_rng(0), []
    truth = rng.integers(len(labels), size=20)
    for number in range(2):
        z = rng.normal(size=(20, len(labels))) + 3 * np.eye(len(labels))[truth]
        values = softmax(z) if kind == "probability" else z
        order = rng.permutation(20)
        header = ["id", "label", *(f"{kind}_{label}" for label in labels)]
        columns = [[f"r{i}" for i in order], [labels[k] for k in truth[order]], *values[order].T.tolist()]
        paths.append(write_table(tmp_path / f"{kind}_{number}.csv", header, *columns))
    return paths


@pytest.mark.parametrize("kind", ["probability", "logit"])
@pytest.mark.parametrize("how", ["mean_prob", "mean_logit", "rank"])
def test_files_alone_need_no_model(tmp_path, kind, how):
    """Ids and order are the first file's, labels those of its columns; its own labels give metrics."""
    paths, target = tables_of(tmp_path, kind), tmp_path / "o.csv"
    result = combined("--runs", *paths, "--ensemble", how, "--submission", "", "--output", target)
    first, second = (files.read_rows(str(path), "x") for path in paths)
    rows = files.read_rows(str(target), "x")
    assert [row["id"] for row in rows] == [row["id"] for row in first] != [row["id"] for row in second]
    by_id = {row["id"]: row for row in second}
    z = [np.array([[float(r[f"{kind}_{n}"]) for n in ("no", "yes")] for r in table])
         for table in (first, [by_id[row["id"]] for row in first])]  # fmt: skip
    if kind == "probability":
        z = [np.log(p) for p in z]
    np.testing.assert_allclose(shares_in(target, ("no", "yes")), softmax(ensemble.combine(z, how)), atol=1e-6)
    right = np.mean([row["prediction"] == known["label"] for row, known in zip(rows, first, strict=True)])
    assert result["metrics"]["accuracy"] == pytest.approx(right, abs=1e-6) and right > 0.7


def test_what_are_no_probabilities_is_refused_or_reported(tmp_path, capsys):
    """Percentages, negative ones and odds; what only does not sum to 1 is scaled, with a note; rounding is not."""
    good, other = tables_of(tmp_path)
    rows = files.read_rows(str(other), "x")

    def with_values(change) -> list:
        values = np.array([[float(row[f"probability_{name}"]) for name in ("no", "yes")] for row in rows])
        header = ["id", "probability_no", "probability_yes"]
        write_table(tmp_path / "changed.csv", header, [row["id"] for row in rows], *change(values).T.tolist())
        return ["--runs", good, tmp_path / "changed.csv", "--submission", ""]

    target = tmp_path / "o.csv"
    for change in (lambda p: 100 * p, lambda p: p - 0.5, lambda p: p / (1 - p) + 1):
        for more in ([], ["--task", "multi_label"]):
            with pytest.raises(UserError, match="changed.csv: .* probabilities are not from 0 to 1 .*percentages"):
                combined(*with_values(change), *more, "--output", target)
    scores = {}
    for change, noted in ((lambda p: p, False), (lambda p: p / 2, True), (lambda p: p.round(3) + 1e-7, False)):
        combined(*with_values(change), "--output", target, "--overwrite")
        scores[len(scores)] = shares_in(target, ("no", "yes"))
        assert ("probabilities of 20 rows do not sum to 1" in capsys.readouterr().out) == noted
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-6)


def test_a_member_by_another_spelling_counts_once(three, tmp_path, monkeypatch):
    """A slash at the end, a relative path, a link, a detour; a file likewise."""
    runs, path = three
    os.symlink(runs[0], tmp_path / "link")
    run = Path(runs[0])
    for again in (f"{run}/", run.parent / "x/.." / run.name, os.path.relpath(run), tmp_path / "link"):
        with pytest.raises(UserError, match="a member is duplicated"):
            combined("--runs", run, again, "--input", path)
        with pytest.raises(UserError, match="two different ones"):
            report.main([str(run), str(again)])
    table, _ = tables_of(tmp_path)
    with pytest.raises(UserError, match="a member is duplicated"):
        combined("--runs", table, os.path.relpath(table))


def test_files_alone_of_several_labels_and_of_numbers(tmp_path):
    paths, target = tables_of(tmp_path, "logit", NAMES), tmp_path / "o.csv"
    flags = ["--runs", *paths, "--submission", "", "--output", target]
    combined(*flags, "--task", "multi_label", "--label_delimiter", "+", "--label_names", "rare,algebra")
    rows = files.read_rows(str(target), "x")
    assert list(rows[0]) == ["id", "prediction", "probability_rare", "probability_algebra"]
    for row in rows:
        assert row["prediction"].split("+") == [
            n for n in ("rare", "algebra") if float(row[f"probability_{n}"]) > 0.5
        ] or [""]
    numbers = [
        write_table(tmp_path / f"n{k}.csv", ["id", "prediction"], "abc", v)
        for k, v in enumerate([[1, 2, 3], [3, 2, 7]])
    ]
    combined("--runs", *numbers, "--submission", "", "--output", tmp_path / "n.csv")
    assert [float(row["prediction"]) for row in files.read_rows(str(tmp_path / "n.csv"), "x")] == [2, 2, 5]


def test_files_alone_predict_the_rows_of_an_input(tmp_path):
    paths, asked = (
        tables_of(tmp_path),
        write_table(tmp_path / "asked.csv", ["id", "answer"], ["r7", "r3"], ["no", "yes"]),
    )
    flags = ["--runs", *paths, "--input", asked, "--label_column", "answer", "--output", tmp_path / "o.csv"]
    result = combined(*flags)
    assert [row["id"] for row in files.read_rows(str(tmp_path / "o.csv"), "x")] == ["r7", "r3"]
    assert result["metrics"]["rows"] == 2
    for more, words in (
        (["--time_limit", "5m"], "--time_limit has no effect on files"),
        (["--label_names", "no,maybe"], "no column probability_maybe"),
        (["--task", "regression"], "it is known by its one column"),
        (["--ensemble", "weighted"], "not validated on the same rows"),
    ):
        with pytest.raises(UserError, match=words):
            combined(*flags, *more)
    (tmp_path / "empty.csv").write_text("id,label\na,b\n")
    with pytest.raises(UserError, match="no column logit_LABEL or probability_LABEL"):
        combined("--runs", tmp_path / "empty.csv", paths[0])


def test_what_infer_writes_is_a_member_and_the_command_itself(family, tmp_path, command):
    folder, other, path = family
    for number, run in enumerate((folder, other)):
        flags = ["--runs", run, "--input", path, "--submission", "", "--output", tmp_path / f"{number}.csv"]
        infer.main([str(flag) for flag in flags])
    members = [tmp_path / "0.csv", tmp_path / "1.csv"]
    status, out, err = command("ensemble.py", "--runs", *members, "--output", tmp_path / "o.csv")
    assert status == 0 and (tmp_path / "o.csv").read_text().startswith("id,label\n"), err
    assert json.loads(out.strip().splitlines()[-1])["rows"] == 31
