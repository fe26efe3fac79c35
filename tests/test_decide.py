"""From logits to decisions: weights, thresholds, calibration, the alarm for scores that cannot be right."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calibrate
import checks
import configs
import decide
import evaluate
import losses
import metrics
import prepare
import tables
from errors import UserError

QUICK = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10**6)


def logits(rows=40, classes=5, scale=3.0, seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, classes)) * scale).astype(np.float32)


# ---- softmax --------------------------------------------------------------------------------------------------------


def test_softmax_is_torchs():
    z = logits()
    expected = torch.softmax(torch.from_numpy(z).double(), 1).numpy()
    np.testing.assert_allclose(metrics.softmax(z), expected, rtol=1e-12)
    assert metrics.softmax(z).dtype == np.float64


def test_softmax_survives_large_logits_and_ignores_a_shift():
    z = np.array([[1e4, 0.0, -1e4], [-3e38, 3e38, 0.0]], dtype=np.float32)
    np.testing.assert_array_equal(metrics.softmax(z), [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(metrics.softmax(logits() + 512), metrics.softmax(logits()), rtol=1e-3)


def test_half_precision_logits_keep_distinct_probabilities():
    z = np.stack([np.zeros(200), np.linspace(8, 9, 200)], axis=1).astype(np.float16)
    assert len(np.unique(metrics.softmax(z)[:, 1])) == len(np.unique(z[:, 1]))


# ---- class weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[86, 2618, 500], [1, 1], [7, 3, 3, 90, 11]])
def test_balanced_weights_are_scikit_learns(counts):
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    y = np.repeat(np.arange(len(counts)), counts)
    expected = compute("balanced", classes=np.arange(len(counts)), y=y)
    got = losses.class_weights("balanced", np.array(counts))
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    assert got[y].mean() == pytest.approx(1.0), "mean 1 over rows: the learning rate keeps its meaning"


def test_a_class_without_rows_gets_a_finite_weight():
    assert np.isfinite(losses.class_weights("balanced", np.array([5, 0, 3]))).all()


def test_none_and_given_weights():
    assert losses.class_weights("none", np.array([1, 2])) is None
    assert losses.class_weights("1, 2.5,0.5", np.array([9, 9, 9])).tolist() == [1.0, 2.5, 0.5]
    with pytest.raises(ValueError, match="has 2 numbers, expected one for each of 3 classes"):
        losses.class_weights("1,2", np.array([9, 9, 9]))


@pytest.mark.parametrize("setting, beta", [("effective", 0.999), ("effective:0.99", 0.99), ("effective:0", 0.0)])
def test_effective_number_weights_are_those_of_the_paper(setting, beta):
    counts = np.array([5, 40, 3000, 0])
    got = losses.class_weights(setting, counts)
    paper = np.array([1 / sum(beta**i for i in range(max(n, 1))) for n in counts])  # E_n = 1 + beta + ... + beta^(n-1)
    np.testing.assert_allclose(got / got[0], paper / paper[0], rtol=1e-10)
    assert (got * counts).sum() / counts.sum() == pytest.approx(1.0), "mean 1 over rows"


def test_inverse_is_balanced_and_effective_lies_between_it_and_none():
    counts = np.array([10, 100, 1000])
    balanced = losses.class_weights("balanced", counts)
    assert losses.class_weights("inverse", counts).tolist() == balanced.tolist()
    nearly = losses.class_weights("effective:0.9999999", counts)
    np.testing.assert_allclose(nearly, balanced, rtol=1e-3)
    for bad in ("effective:1", "effective:-0.1", "effective:2", "effective:nan"):
        with pytest.raises(ValueError, match="BETA from 0 to below 1"):
            losses.class_weights(bad, counts)


def test_pos_weight_is_negatives_by_positives_within_its_cap():
    got = losses.pos_weight("balanced", np.array([25, 1, 0, 100, 50]), 100)
    assert got.tolist() == [3.0, 20.0, 1.0, 0.05, 1.0]
    assert losses.pos_weight("none", np.array([1]), 2) is None
    assert losses.pos_weight("2.5", np.array([1, 1, 0]), 9).tolist() == [2.5, 2.5, 2.5]
    assert losses.pos_weight("1,2,3", np.array([1, 1, 0]), 9).tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="--pos_weight has 2 numbers, expected 1 or 3"):
        losses.pos_weight("1,2", np.array([1, 1, 0]), 9)


# ---- degenerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, classes", [(1, 2), (8, 2), (40, 5), (3000, 8)])
def test_ordinary_scores_raise_no_alarm(rows, classes):
    assert evaluate.degenerate(logits(rows, classes)) == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_counted_and_the_first_named(bad):
    z = logits()
    z[[6, 30], 2] = bad
    assert evaluate.degenerate(z).startswith("2 of 40 rows have scores that are not finite (first: row 7)")
    assert "1 of 1 rows" in evaluate.degenerate(np.array([[bad, 0.0]])), "however few rows there are"


def test_the_same_score_for_every_row_is_an_alarm():
    assert "1 distinct" in evaluate.degenerate(np.tile(logits(1), (50, 1)))
    assert evaluate.degenerate(np.zeros((8, 3))) != ""


def test_few_distinct_scores_are_an_alarm():
    """As a rules competition entry scored every row alike: an adapter that did not fit its base."""
    z = logits(2000, 2)[np.arange(2000) % 6]
    assert "6 distinct" in evaluate.degenerate(z)


def test_a_repeated_text_counts_once():
    """Scores are compared between different inputs: as many scores as inputs is what a sound model gives."""
    z = logits(2000, 2)
    inputs = np.arange(2000) % 6
    assert evaluate.degenerate(z[inputs], inputs) == ""
    assert "6 different inputs have 1 distinct scores" in evaluate.degenerate(z[inputs * 0], inputs)
    assert "2000 different inputs have 6 distinct" in evaluate.degenerate(z[inputs], np.arange(2000))
    assert evaluate.degenerate(np.tile(z[0], (50, 1)), np.zeros(50)) == "", "one input says nothing about a model"
    assert "2 different inputs" in evaluate.degenerate(np.tile(z[0], (50, 1)), np.arange(50) % 2)
    assert "not finite" in evaluate.degenerate(np.full((50, 2), np.nan), np.zeros(50))


def test_a_shift_of_the_whole_row_matters_to_several_labels_only():
    """Two labels that always come together have equal columns: softmax would be blind to them, sigmoids are not."""
    z = np.repeat(logits(50, 1), 2, axis=1)
    assert evaluate.degenerate(z, task="multi_label") == "" != evaluate.degenerate(z)
    assert evaluate.degenerate(z[:, :1], task="regression") == ""


def test_a_spread_of_rounding_alone_is_an_alarm():
    z = np.tile(logits(1), (50, 1)) + logits(50) * 1e-6
    assert "spread" in evaluate.degenerate(z)
    assert evaluate.degenerate(np.tile(logits(1), (50, 1)) + logits(50) * 1e-2) == ""


def test_a_shift_that_moves_no_probability_is_an_alarm():
    z = np.tile(logits(1), (50, 1)) + np.arange(50, dtype=np.float32)[:, None]  # softmax is blind to it
    assert evaluate.degenerate(z) != ""


def test_one_predicted_class_alone_is_no_alarm():
    z = logits() * 0.1
    z[:, 0] += 5
    assert evaluate.degenerate(z) == ""


# ---- thresholds without an effect -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, classes, words",
    [
        ({"thresholds": "per_class"}, 3, "--thresholds per_class with --task single_label"),
        ({"thresholds": "per_class"}, 2, "two classes take global"),
        ({"thresholds": "global"}, 3, "--thresholds global has no effect on 3 classes"),
        ({"thresholds": "global"}, 2, ""),
        ({"thresholds": "none"}, 3, ""),
        ({"thresholds": "auto"}, 3, ""),
        ({"thresholds": "global", "task": "regression", "metric": "mse"}, 1, "--thresholds global has no meaning"),
        ({"thresholds": "per_class", "task": "multi_label"}, 3, ""),
        ({"thresholds": "global", "task": "multi_label"}, 3, ""),
    ],
)
def test_thresholds_that_decide_nothing_are_refused(settings, classes, words):
    """What is accepted is what `fit_decision` gives the kind of, or auto and none."""
    cfg = configs.TrainConfig(train_data="x.csv", **settings)

    def check():
        checks.check(cfg, {"thresholds"})
        prepare.refuse_idle_thresholds(cfg, classes)

    if words:
        with pytest.raises(UserError, match=words):
            check()
        return
    check()
    if cfg.thresholds in ("global", "per_class"):
        z, y = rows_of(cfg.task, classes=classes)
        assert decide.fit_decision(cfg.task, z, y, cfg.thresholds).kind == cfg.thresholds


# ---- distribution ---------------------------------------------------------------------------------------------------


def test_distribution_counts_every_row_once():
    z = logits(200, 3)
    z[:, 1] = -99  # never chosen
    text = tables.distribution(z, ["algebra", "b", "number theory"])
    lines = text.splitlines()
    rows = {line[:13].strip(): line[13:].split() for line in lines[1:4]}
    counts = np.bincount(z.argmax(1), minlength=3)
    assert [int(rows[n][0]) for n in ("algebra", "b", "number theory")] == counts.tolist()
    assert rows["b"] == ["0", "0.0%", "-"]
    mean = metrics.softmax(z).max(1)[z.argmax(1) == 0].mean()
    assert rows["algebra"][1:] == [f"{counts[0] / 200:.1%}", f"{mean:.3f}"]
    assert "median" in lines[4]


def test_distribution_of_a_single_row():
    assert "100.0%" in tables.distribution(np.array([[0.0, 1.0]]), ["a", "b"])


# ---- scores of probabilities ----------------------------------------------------------------------------------------


def rows_of(task, rows=300, classes=4, seed=0, scale=2.0):
    """Logits (N, C) that know the labels but are over-confident and shifted, and the labels."""
    rng = np.random.default_rng(seed)
    if task == "single_label":
        y = rng.integers(classes, size=rows)
        return (rng.normal(size=(rows, classes)) + np.eye(classes)[y]) * scale, y
    y = (rng.random((rows, classes)) < np.linspace(0.5, 0.04, classes)).astype(int)
    return (rng.normal(size=y.shape) + 2 * y - 2.2) * scale, y


@pytest.mark.parametrize("classes", [2, 5])
def test_brier_is_scikit_learns(classes):
    metric = pytest.importorskip("sklearn.metrics").brier_score_loss
    z, y = rows_of("single_label", classes=classes)
    p = metrics.softmax(z)
    want = metric(y, p, labels=np.arange(classes), scale_by_half=False)
    assert metrics.brier(p, y) == pytest.approx(want, rel=1e-12)
    z, y = rows_of("multi_label", classes=classes)
    p = 1 / (1 + np.exp(-z))
    want = np.mean([metric(y[:, c], p[:, c]) for c in range(classes)])
    assert metrics.brier(p, y) == pytest.approx(want, rel=1e-12)


def test_calibration_error_is_a_loop_over_bins():
    rng = np.random.default_rng(15)
    p = np.concatenate([rng.random(500), [0, 0, 1, 1], np.full(50, 0.2), np.full(50, 0.25)])
    hit = rng.random(604) < p**2
    hit[504:] = p[504:] > 0.2  # 0.2 is the upper end of its bin, not the lower end of the next
    want = 0.0
    for k in range(15):
        inside = (p > k / 15) & (p <= (k + 1) / 15) | ((p == 0) & (k == 0))
        if inside.any():
            want += inside.mean() * abs(hit[inside].mean() - p[inside].mean())
    assert metrics.ece(p, hit) == pytest.approx(want, rel=1e-10)
    counts = rng.integers(4, size=604)
    repeated = metrics.ece(np.repeat(p, counts), np.repeat(hit, counts))
    assert metrics.ece(p, hit, counts) == pytest.approx(repeated, rel=1e-10)


@pytest.mark.parametrize("task, classes", [("single_label", 2), ("single_label", 5), ("multi_label", 5)])
def test_scores_of_a_decision_are_scikit_learns(task, classes):
    sk = pytest.importorskip("sklearn.metrics")
    z, y = rows_of(task, classes=classes)
    decision = decide.fit_decision(task, z, y, "global")
    predicted, p = decide.apply(decision, z)
    cells = y.ravel() if task == "multi_label" else y
    want = {"log_loss": sk.log_loss(cells, p.ravel() if task == "multi_label" else p)}
    if task == "multi_label":
        want |= {f"{a}_f1": sk.f1_score(y, predicted, average=a, zero_division=0) for a in ("micro", "macro")}
    else:
        want |= {"accuracy": sk.accuracy_score(y, predicted)} | (
            {"f1": sk.f1_score(y, predicted)} if classes == 2 else {}
        )
    got = decision.scores["after"]
    assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-12)
    assert set(got) == {*want, "brier", "ece"} == set(decision.scores["before"])


# ---- thresholds -----------------------------------------------------------------------------------------------------


def best_f1_of_scikit_learn(scores, targets):
    precision, recall, _ = pytest.importorskip("sklearn.metrics").precision_recall_curve(targets, scores)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.nan_to_num(2 * precision * recall / (precision + recall)).max()


def f1_at(cut, scores, targets):
    predicted = scores > cut
    return 2 * (predicted & (targets == 1)).sum() / max(1, predicted.sum() + targets.sum())


@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize("rows", [1, 2, 11, 400])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
def test_best_f1_is_scikit_learns(rows, decimals, share):
    rng = np.random.default_rng(rows)
    targets = (rng.random(rows) < share).astype(int)
    targets[0] = 1  # scikit-learn warns without a positive
    scores = np.round(rng.normal(size=rows) + targets, decimals)
    best = calibrate.best_f1(scores, targets)
    assert best == pytest.approx(best_f1_of_scikit_learn(scores, targets), rel=1e-12)
    assert best == max(f1_at(cut, scores, targets) for cut in [*scores, scores.min() - 1])


def test_best_f1_at_the_edges():
    z = np.array([3.0, 1.0, 2.0, 0.0])
    assert calibrate.best_f1(z, np.zeros(4, int)) == 0
    assert calibrate.best_f1(z, np.ones(4, int)) == calibrate.best_f1(z, np.array([1, 0, 1, 0])) == 1
    assert calibrate.best_f1(np.full(4, 0.7), np.array([1, 0, 0, 0])) == 0.4, "equal scores go together"
    near = np.array([1.0, np.nextafter(1.0, 2)])
    assert calibrate.best_f1(near, np.array([0, 1])) == 1, "adjacent floats are apart"


def half(f1: float) -> float:
    """The log-odds of half an F1."""
    return float(np.log(f1 / 2) - np.log1p(-f1 / 2))


def test_thresholds_are_half_of_the_best_f1_and_rare_labels_take_the_shared_one():
    sk = pytest.importorskip("sklearn.metrics")
    z, y = rows_of("multi_label", rows=120, classes=6)
    y[:, 5] = 0
    y[:3, 5] = 1  # fewer than LEAST
    shared = calibrate.fit_thresholds(z, y, "global")
    micro = [sk.f1_score(y, z > cut, average="micro") for cut in [*z.ravel(), z.min() - 1]]
    assert shared.tolist() == pytest.approx([half(max(micro))] * 6)
    own = calibrate.fit_thresholds(z, y, "per_class")
    positives = y.sum(axis=0)
    for c in range(6):
        best = max(sk.f1_score(y[:, c], z[:, c] > cut) for cut in [*z[:, c], z.min() - 1])
        assert own[c] == pytest.approx(shared[0] if positives[c] < calibrate.LEAST else half(best))
    assert positives[5] == 3 and (positives[:4] >= calibrate.LEAST).all()
    assert (calibrate.fit_thresholds(z, 0 * y, "per_class") == calibrate.NEVER).all()
    with pytest.raises(ValueError, match="kind: got 'best', expected one of none, global, per_class"):
        decide.fit_decision("multi_label", z, y, "best")


def test_half_of_the_best_f1_is_the_best_cut_of_calibrated_probabilities():
    """100,000 rows whose labels are drawn from their probabilities: no cut beats the rule by more than noise."""
    rng = np.random.default_rng(0)
    for shift in (-3.0, -1.0, 1.0):
        z = rng.normal(shift, 2, size=(100_000, 1))
        y = (rng.random(z.shape) < 1 / (1 + np.exp(-z))).astype(int)
        cut = calibrate.fit_thresholds(z, y, "per_class")
        best = calibrate.best_f1(z[:, 0], y[:, 0])
        assert best - f1_at(cut, z, y) < 1e-3 < best - f1_at(3, z, y)


# ---- calibration ----------------------------------------------------------------------------------------------------


def smoothed_loss(z, y):
    """Cross-entropy of a row's class against all others, with the target (N + 1) / (N + 2)."""
    log_p = z - np.logaddexp.reduce(z, axis=1, keepdims=True)
    others = np.logaddexp.reduce(np.where(np.arange(z.shape[1]) == y[:, None], -np.inf, log_p), axis=1)
    target = (len(y) + 1) / (len(y) + 2)
    return float(-(target * log_p[np.arange(len(y)), y] + (1 - target) * others).mean())


@pytest.mark.parametrize("classes", [2, 3, 8])
@pytest.mark.parametrize("scale", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("rows", [12, 1000])
def test_temperature_is_that_of_an_independent_optimizer(classes, scale, rows):
    """scipy's minimum of the smoothed loss, the best of a grid too; with many rows scikit-learn's temperature."""
    calibration = pytest.importorskip("sklearn.calibration")
    optimize = pytest.importorskip("scipy.optimize")
    z, y = rows_of("single_label", rows=rows, classes=classes, scale=scale, seed=classes)
    t = calibrate.fit_temperature(z, y)
    best = optimize.minimize_scalar(
        lambda log_t: smoothed_loss(z / np.exp(log_t), y),
        bounds=np.log([0.05, 20]),
        method="bounded",
        options={"xatol": 1e-10},
    )
    assert t == pytest.approx(np.exp(best.x), rel=1e-5)
    assert smoothed_loss(z / t, y) <= min(smoothed_loss(z / other, y) for other in np.geomspace(0.05, 20, 20)) + 1e-12
    if rows == 1000:
        assert t == pytest.approx(1 / calibration._TemperatureScaling().fit(z, y).beta_, rel=0.02)


def easy(rows, classes, seed=0):
    """Logits (N, C) whose argmax is the label, by margins from 2 to 4, and the labels: every class in turn."""
    rng = np.random.default_rng(seed)
    y = np.arange(rows) % classes
    z = rng.normal(size=(rows, classes)) * 0.3
    z[np.arange(rows), y] = z.max(axis=1) + rng.uniform(2, 4, size=rows)
    return z, y


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("rows", [12, 100, 2000])
def test_rows_that_are_all_right_are_no_proof_of_certainty(rows, classes):
    """The mean top probability is about (N + 1) / (N + 2), cross-fitted too: twice the rows, half the doubt."""
    z, y = easy(rows, classes)
    doubt = 1 / (rows + 2)
    decision = decide.fit_decision("single_label", z, y)
    top = decide.apply(decision, z)[1].max(axis=1)
    # Two classes have a target each, of the rows of that class; and a temperature has its bound.
    assert 0.3 * doubt < 1 - top.mean() < 3 * doubt
    scores, _, p = decide.cross_fitted("single_label", z, y)
    assert scores["after"]["log_loss"] > 0.3 * doubt
    assert 1 - p.max(axis=1).mean() > 0.3 * doubt


def test_one_wrong_row_more_does_not_change_the_temperature_tenfold():
    z, y = easy(13, 4)
    all_right = calibrate.fit_temperature(z, y)
    y[3] = (y[3] + 1) % 4
    assert 1 < calibrate.fit_temperature(z, y) / all_right < 4


@pytest.mark.parametrize(
    "labels, words",
    [
        (np.arange(9) % 3, "9 validation rows are too few"),
        (np.full(30, 2), "all of one class"),
        (np.zeros((30, 4), int), "all of one class"),
        (np.ones((30, 4), int), "all of one class"),
        (np.arange(30) % 2, ""),
        (np.eye(10, dtype=int), ""),
    ],
)
def test_what_nothing_can_be_fitted_to_is_named(labels, words):
    assert words in decide.unfit(labels) and bool(words) == bool(decide.unfit(labels))


def test_temperature_at_its_bounds():
    z, y = rows_of("single_label")
    right = np.eye(4)[y]
    top = metrics.softmax(right / calibrate.fit_temperature(right, y)).max(axis=1)
    assert top == pytest.approx(301 / 302), "all right: as sure as 300 rows can tell"
    assert calibrate.fit_temperature(right / 1e3, y) == pytest.approx(0.05), "as sure as allowed"
    assert calibrate.fit_temperature(-right, y) == pytest.approx(20), "all wrong: as unsure as allowed"
    assert calibrate.fit_temperature(np.zeros((5, 3)), np.array([0, 1, 2, 0, 0])) == 1, "constant scores say nothing"
    assert calibrate.fit_temperature(np.arange(5.0)[:, None] + np.zeros(3), np.array([0, 1, 2, 0, 0])) == 1, (
        "a row's shift is nothing"
    )
    assert 0.05 <= calibrate.fit_temperature(z[:1], y[:1]) <= 20, "one row"
    assert calibrate.fit_temperature(z * 1e4, y) == pytest.approx(20), "huge logits do not overflow"


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (5.0, -3.0), (100.0, 40.0), (1e-3, 0.0)])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_platt_is_scikit_learns(scale, shift, share):
    calibration = pytest.importorskip("sklearn.calibration")
    rng = np.random.default_rng(3)
    y = (rng.random(400) < share).astype(int)
    z = (rng.normal(size=400) + 1.5 * y) * scale + shift
    a, b = calibrate.fit_platt(z, y)
    theirs = calibration._SigmoidCalibration().fit(z, y)
    np.testing.assert_allclose(1 / (1 + np.exp(-(a * z + b))), theirs.predict(z), atol=2e-5)
    soft = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))

    def loss(a, b):
        return float((np.logaddexp(0, a * z + b) - soft * (a * z + b)).mean())

    assert loss(a, b) <= loss(-theirs.a_, -theirs.b_) + 1e-14, "at least as deep as L-BFGS"
    assert abs((1 / (1 + np.exp(-(a * z + b))) - soft).mean()) < 1e-9, "the gradient in b"


@pytest.mark.parametrize("y", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
def test_platt_at_the_edges(y):
    """Absent classes, constant scores, separable and reversed ones: finite, and the smoothed share of positives."""
    y = np.array(y)
    soft = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))
    for z in (np.arange(4.0), np.full(4, 0.1), np.arange(4.0) * 1e6):
        a, b = calibrate.fit_platt(z, y)
        p = 1 / (1 + np.exp(-(a * z + b)))
        assert p.mean() == pytest.approx(soft.mean(), abs=1e-6)
        assert a == 0 or np.ptp(z) > 0
    a, b = calibrate.fit_platt(np.array([2.0]), np.array([1]))
    assert (a, 1 / (1 + np.exp(-b))) == (0, pytest.approx(2 / 3))


# ---- the decision ---------------------------------------------------------------------------------------------------

DECISIONS = [
    ("multi_label", 5, "per_class"),
    ("multi_label", 5, "global"),
    ("multi_label", 1, "none"),
    ("single_label", 5, "per_class"),
    ("single_label", 2, "per_class"),
    ("single_label", 2, "global"),
]


@pytest.mark.parametrize("task, classes, kind", DECISIONS)
def test_decision_round_trips_through_json_and_decides_as_documented(task, classes, kind):
    z, y = rows_of(task, classes=classes)
    decision = decide.fit_decision(task, z, y, kind, fitted_on="out-of-fold")
    again = decide.Decision.from_json(decision.to_json())
    assert again == decision
    assert (again.rows, again.fitted_on, again.classes) == (300, "out-of-fold", classes)
    new, _ = rows_of(task, classes=classes, seed=9)
    predicted, p = decide.apply(again, new)
    assert p.shape == new.shape and predicted.dtype == np.int64
    assert ((p >= 0) & (p <= 1)).all()
    if task == "multi_label":
        lines = np.array([calibrate.fit_platt(z[:, c], y[:, c]) for c in range(classes)])
        np.testing.assert_allclose(p, 1 / (1 + np.exp(-(new * lines[:, 0] + lines[:, 1]))))
        calibrated = z * lines[:, 0] + lines[:, 1]
        one = np.full(classes, calibrate.best_f1(calibrated.ravel(), y.ravel()) / 2)
        own = np.array([calibrate.best_f1(z[:, c], y[:, c]) / 2 for c in range(classes)])
        cut = {"none": 1 / (1 + np.exp(-lines[:, 1])), "global": one, "per_class": own}[kind]  # none: where z is 0
        np.testing.assert_array_equal(predicted, p > cut)
    else:
        np.testing.assert_allclose(p.sum(axis=1), 1)
        if kind == "global":
            best = calibrate.best_f1(z[:, 1] - z[:, 0], y)
            np.testing.assert_array_equal(predicted, p[:, 1] > best / 2)
        else:
            np.testing.assert_array_equal(predicted, new.argmax(axis=1))
        if classes > 2:
            np.testing.assert_allclose(p, metrics.softmax(new / calibrate.fit_temperature(z, y)))
    before, after = decision.scores["before"], decision.scores["after"]
    assert after["log_loss"] < before["log_loss"] and after["ece"] < before["ece"]  # the logits are over-confident
    if kind == "global":
        name = "micro_f1" if task == "multi_label" else "f1"
        assert after[name] > before[name]


@QUICK
@given(SEEDS, st.integers(3, 6), st.floats(0.05, 20))
def test_temperature_never_changes_the_argmax(seed, classes, scale):
    z, y = rows_of("single_label", rows=30, classes=classes, seed=seed, scale=scale)
    predicted, p = decide.apply(decide.fit_decision("single_label", z, y), z)
    np.testing.assert_array_equal(predicted, z.argmax(axis=1))
    assert (p[np.arange(30), predicted] == p.max(axis=1)).all()


@QUICK
@given(SEEDS, st.sampled_from(DECISIONS))
def test_rows_not_given_cannot_influence_the_fit(seed, case):
    """The fit of the first 40 rows is the same whatever stands in the other 40, which share their memory."""
    task, classes, kind = case
    z, y = rows_of(task, rows=80, classes=classes, seed=seed)
    first = decide.fit_decision(task, z[:40], y[:40], kind)
    z[40:], y[40:] = np.nan, -7
    assert decide.fit_decision(task, z[:40], y[:40], kind) == first


@pytest.mark.parametrize("task, classes, kind", DECISIONS)
def test_cross_fitted_rows_never_see_their_own_labels(task, classes, kind):
    z, y = rows_of(task, rows=60, classes=classes)
    scores, predicted, p = decide.cross_fitted(task, z, y, seed=2, kind=kind)
    held = np.array_split(np.random.default_rng(2).permutation(60), 5)[3]
    other = y.copy()
    other[held] = 1 - y[held] if task == "multi_label" else (y[held] + 1) % classes
    _, predicted_again, p_again = decide.cross_fitted(task, z, other, seed=2, kind=kind)
    np.testing.assert_array_equal(predicted_again[held], predicted[held])
    np.testing.assert_array_equal(p_again[held], p[held])
    assert (p_again != p).any(), "the rows fitted on them do change"
    rest = np.setdiff1d(np.arange(60), held)
    expected, _ = decide.apply(decide.fit_decision(task, z[rest], y[rest], kind), z[held])
    np.testing.assert_array_equal(predicted[held], expected)
    assert scores["after"]["brier"] == pytest.approx(metrics.brier(p, y), rel=1e-12)
    assert decide.cross_fitted(task, z[:3], y[:3])[1].shape == y[:3].shape, "fewer rows than folds"


def test_cross_fitting_takes_the_optimism_out():
    """Scores that know nothing: the rows that thresholds are tuned on flatter them, cross-fitting does not."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(60, 30)), (rng.random((60, 30)) < 0.2).astype(int)
    tuned = decide.fit_decision("multi_label", z, y).scores["after"]["macro_f1"]
    honest = decide.cross_fitted("multi_label", z, y)[0]["after"]["macro_f1"]
    chance = calibrate.best_f1(np.zeros(1800), y.ravel())
    assert tuned - 0.01 > honest < chance


@QUICK
@given(SEEDS, st.floats(0.01, 0.99))
def test_with_threshold_cuts_the_calibrated_probability(seed, cut):
    for task, classes in (("multi_label", 3), ("single_label", 2)):
        z, y = rows_of(task, rows=50, classes=classes, seed=seed)
        decision = decide.fit_decision(task, z, y).with_threshold(cut)
        predicted, p = decide.apply(decision, z)
        p = p if task == "multi_label" else p[:, 1]
        sure = abs(p - cut) > 1e-9  # at the cut itself rounding decides
        np.testing.assert_array_equal(predicted[sure], (p > cut)[sure])
        assert decide.Decision.from_json(decision.to_json()) == decision
        assert decision.kind == "given"


def test_with_threshold_refuses_what_means_nothing():
    z, y = rows_of("single_label")
    with pytest.raises(ValueError, match="got 0.5, expected none: argmax decides 4 classes"):
        decide.fit_decision("single_label", z, y).with_threshold(0.5)
    z, y = rows_of("multi_label")
    for bad in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match=r"expected a probability in \(0, 1\)"):
            decide.fit_decision("multi_label", z, y).with_threshold(bad)


def test_calibration_never_reverses_a_ranking():
    """A label ranked the wrong way round and one with two positives take the line of all cells."""
    z, y = rows_of("multi_label", rows=400)
    z[:, 1] *= -1
    y[:, 3] = 0
    y[[5, 9], 3] = 1
    decision = decide.fit_decision("multi_label", z, y)
    shared = list(calibrate.fit_platt(z.ravel(), y.ravel()))
    assert decision.platt[1] == decision.platt[3] == shared
    assert decision.platt[0] == list(calibrate.fit_platt(z[:, 0], y[:, 0]))
    backwards = decide.fit_decision("multi_label", np.where(y, -1.0, 1.0) + z * 1e-3, y)
    p = decide.apply(backwards, z)[1]
    np.testing.assert_allclose(p, y.mean(), atol=2e-3, err_msg="no line at all rises: the share of positives")
    np.testing.assert_array_equal(p.argsort(axis=0), z.argsort(axis=0))


@pytest.mark.parametrize("task, classes, kind", DECISIONS)
def test_decisions_from_constant_scores_one_row_and_absent_classes(task, classes, kind):
    z, y = rows_of(task, classes=classes)
    cases = [(np.zeros_like(z), y), (z[:1], y[:1]), (z, np.zeros_like(y))]
    cases += [(z, np.ones_like(y))] if task == "multi_label" else []
    for logits, labels in cases:
        decision = decide.fit_decision(task, logits, labels, kind)
        predicted, p = decide.apply(decide.Decision.from_json(decision.to_json()), z)
        assert np.isfinite(p).all() and predicted.shape == y.shape


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("rows"), r"missing .* 'rows'; expected values for \['task', 'classes', "),
        (lambda d: d.update(extra=1), "unexpected .* 'extra'; expected values for"),
        (lambda d: d.update(task="regression"), "task: got 'regression', expected one of single_label, multi_label"),
        (lambda d: d.update(kind="best"), "kind: got 'best'"),
        (lambda d: d["thresholds"].pop(), "thresholds: got .* expected 4 numbers"),
        (lambda d: d.update(thresholds=[]), r"thresholds: got \[\], expected 4 numbers"),
        (lambda d: d["platt"].pop(), "platt: got .* expected 4 pairs"),
        (lambda d: d["platt"][0].pop(), "platt: got .* expected 4 pairs"),
        (lambda d: d["platt"].__setitem__(0, [-1.0, 0.0]), "a > 0"),
        (lambda d: d["thresholds"].__setitem__(0, float("inf")), "values: got .*inf.* expected finite numbers"),
        (lambda d: d["platt"].__setitem__(2, [1.0, float("nan")]), "expected finite numbers"),
        (lambda d: d["scores"]["after"].update(ece=float("nan")), "expected finite numbers"),
        (lambda d: d["scores"].pop("before"), "expected before and after"),
        (lambda d: d.update(thresholds=["0", 0, 0, 0]), "expected finite numbers"),
        (lambda d: d.update(thresholds=[True, 0, 0, 0]), "expected finite numbers"),
        (lambda d: d.update(temperature=0), "temperature: got 0, expected a number above 0"),
        (lambda d: d.update(temperature=None), "expected values for|finite numbers"),
        (lambda d: d.update(classes=5), "expected 5 numbers"),
        (lambda d: d.update(classes="4"), "expected"),
        (lambda d: d.update(rows=0), "rows: got 0, expected a count"),
        (lambda d: d.update(fitted_on=3), "fitted_on: got 3, expected text"),
        (lambda d: d.update(platt=7), "expected values for"),
        (lambda d: d.update(scores=[]), "expected values for"),
    ],
)
def test_a_damaged_decision_is_refused_in_one_line(change, message):
    values = json.loads(decide.fit_decision("multi_label", *rows_of("multi_label")).to_json())
    decide.Decision.from_json(json.dumps(values))
    change(values)
    with pytest.raises(ValueError, match=message) as error:
        decide.Decision.from_json(json.dumps(values))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_json_that_is_no_decision_is_refused():
    for text in ("", "[]", "3", "null", "{}", '{"task": 1e999}'):
        with pytest.raises(ValueError):
            decide.Decision.from_json(text)
    single = decide.fit_decision("single_label", *rows_of("single_label"))
    for field in ({"thresholds": [0.0]}, {"platt": [[1.0, 0.0]]}):
        with pytest.raises(ValueError, match="expected 0"):
            replace(single, **field)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: decide.fit_decision("regression", [[0.0, 1.0]], [0]), "task: got 'regression'"),
        (
            lambda: decide.fit_decision("single_label", [[0.0, 1.0]], [2]),
            "labels: got 2 in row 0, .*expected integers from 0 to 1",
        ),
        (lambda: decide.fit_decision("single_label", [[0.0, 1.0]], [0.5]), "labels: got 0.5"),
        (lambda: decide.fit_decision("single_label", np.zeros((0, 2)), []), "not empty"),
        (lambda: decide.fit_decision("multi_label", [[0.0, 1.0]], [1]), r"expected \(1, 2\) for multi_label"),
        (
            lambda: decide.fit_decision("multi_label", [[0.0, 1.0]], [[0, -1]]),
            "labels: got -1 in row 0, .*expected integers from 0 to 1",
        ),
        (lambda: decide.fit_decision("multi_label", [[0.0, np.nan]], [[0, 1]]), "got nan in row 0"),
        (lambda: decide.cross_fitted("single_label", [[0.0, 1.0]], [0]), "got 1 row, expected two"),
    ],
)
def test_errors_say_what_was_got_and_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_decision_refuses_logits_of_another_width():
    decision = decide.fit_decision("multi_label", *rows_of("multi_label"))
    with pytest.raises(ValueError, match=r"got shape \(3, 5\), expected \(N, 4\)"):
        decide.apply(decision, np.zeros((3, 5)))
