"""metrics.py against scikit-learn, against definitions written out as loops, and on the inputs that break metrics."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import metrics
import tables

TIGHT = dict(rel=1e-12, abs=1e-12)


@pytest.fixture
def sk():
    pytest.importorskip("sklearn")
    import sklearn.metrics

    return sklearn.metrics


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def rows_of(seed, rows, classes, ties=False):
    """Logits (N, C) that know something of the labels (N,), every class present; with ties, rounded to halves."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % classes)
    logits = rng.normal(size=(rows, classes)) + 1.2 * np.eye(classes)[labels]
    return (np.round(logits * 2) / 2 if ties else logits), labels


# ---------------------------------------------------------------------------------------------------------------------
# parity with scikit-learn


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows, classes", [(301, 2), (400, 3), (500, 8)])
def test_classification_equals_sklearn(sk, rows, classes, ties):
    logits, labels = rows_of(rows, rows, classes, ties)
    predicted, p = logits.argmax(axis=1), softmax(logits)
    got = metrics.of_task("single_label", logits, labels)
    assert set(got) == {
        *("accuracy", "micro_f1", "macro_f1", "weighted_f1", "log_loss", "roc_auc", "ece", "rows"),
    }
    assert got["rows"] == rows
    assert got["accuracy"] == pytest.approx(sk.accuracy_score(labels, predicted), **TIGHT)
    for average in ("micro", "macro", "weighted"):
        want = sk.f1_score(labels, predicted, average=average)
        assert got[f"{average}_f1"] == pytest.approx(want, **TIGHT)
    assert got["micro_f1"] == pytest.approx(got["accuracy"], **TIGHT)
    assert got["log_loss"] == pytest.approx(sk.log_loss(labels, p), **TIGHT)
    if classes == 2:
        assert got["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, logits[:, 1] - logits[:, 0]), **TIGHT)
    elif not ties:  # with ties, softmax and log-odds round equal rows apart differently: see the next test
        assert got["roc_auc"] == pytest.approx(sk.roc_auc_score(labels, p, multi_class="ovr"), **TIGHT)


def test_one_vs_rest_auc_counts_repeated_rows_as_ties(sk):
    few, _ = rows_of(1, 7, 3)
    labels = np.random.default_rng(2).integers(3, size=210)
    logits = np.tile(few, (30, 1))
    want = sk.roc_auc_score(labels, softmax(logits), multi_class="ovr")
    assert metrics.of_task("single_label", logits, labels)["roc_auc"] == pytest.approx(want, **TIGHT)


@pytest.mark.parametrize("seed", range(20))
def test_confusion_and_per_class_equal_sklearn_with_absent_classes(sk, seed):
    rng = np.random.default_rng(seed)
    classes = 6
    labels, predicted = rng.integers(1, 5, size=15), rng.integers(0, 4, size=15)  # 0 never true, 4 never predicted
    confusion = metrics.confusion_matrix(labels, predicted, classes)
    assert confusion.dtype == np.int64
    assert (confusion == sk.confusion_matrix(labels, predicted, labels=range(classes))).all()
    want = sk.precision_recall_fscore_support(labels, predicted, labels=range(classes), zero_division=0)
    got = metrics.of_counts(np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1))
    for ours, theirs in zip(got, want, strict=False):  # theirs ends with the support
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    scores = metrics.of_task("single_label", np.eye(classes)[predicted], labels)
    for average in ("macro", "weighted"):  # the macro mean leaves out class 5, which occurs nowhere
        want = sk.f1_score(labels, predicted, average=average, zero_division=0)
        assert scores[f"{average}_f1"] == pytest.approx(want, **TIGHT)
    assert "roc_auc" not in scores


@pytest.mark.parametrize("decimals", [0, 1, 12])
@pytest.mark.parametrize("rows", [2, 11, 1000])
def test_auc_and_average_precision_equal_sklearn_with_ties(sk, rows, decimals):
    rng = np.random.default_rng(rows)
    labels = rng.permutation(np.arange(rows) % 2)
    scores = np.round(rng.normal(size=rows) + labels, decimals)
    assert metrics.areas(scores, labels)[0] == pytest.approx(sk.roc_auc_score(labels, scores), **TIGHT)
    want = sk.average_precision_score(labels, scores)
    assert metrics.areas(scores, labels)[1] == pytest.approx(want, **TIGHT)


@pytest.mark.parametrize("ties", [False, True])
def test_multilabel_equals_sklearn(sk, ties):
    rng = np.random.default_rng(3)
    targets = (rng.random((250, 5)) < [0.1, 0.3, 0.5, 0.7, 0.9]).astype(int)
    logits = rng.normal(size=targets.shape) + targets - 0.5
    logits = np.round(logits) if ties else logits
    predicted, p = (logits > 0).astype(int), 1 / (1 + np.exp(-logits))
    want = {f"{a}_f1": sk.f1_score(targets, predicted, average=a) for a in ("micro", "macro", "weighted")}
    want |= {
        "subset_accuracy": sk.accuracy_score(targets, predicted),
        "hamming_loss": sk.hamming_loss(targets, predicted),
        "log_loss": np.mean([sk.log_loss(targets[:, k], p[:, k]) for k in range(5)]),
        "average_precision": sk.average_precision_score(targets, logits, average="macro"),
        "roc_auc": sk.roc_auc_score(targets, logits, average="macro"),
        "rows": 250,
    }
    assert metrics.of_task("multi_label", logits, targets) == pytest.approx(want, **TIGHT)


def test_regression_equals_sklearn(sk):
    rng = np.random.default_rng(4)
    targets = rng.normal(size=300)
    outputs = 0.7 * targets + 0.2 + rng.normal(size=300)
    want = {
        "mse": sk.mean_squared_error(targets, outputs),
        "rmse": sk.mean_squared_error(targets, outputs) ** 0.5,
        "mae": sk.mean_absolute_error(targets, outputs),
        "pearson": np.corrcoef(outputs, targets)[0, 1],
        "r2": sk.r2_score(targets, outputs),
        "rows": 300,
    }
    assert metrics.of_task("regression", outputs[:, None], targets) == pytest.approx(want, **TIGHT)
    zero_one = (targets > 0).astype(float)
    got = metrics.of_task("regression", outputs[:, None], zero_one)
    assert got["roc_auc"] == pytest.approx(sk.roc_auc_score(zero_one, outputs), **TIGHT)


# ---------------------------------------------------------------------------------------------------------------------
# definitions and pitfalls


def test_auc_is_the_share_of_ordered_pairs_with_half_for_ties():
    scores, labels = np.array([0.0, 1, 1, 2, 2, 3]), np.array([0, 1, 0, 1, 0, 1])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert metrics.areas(scores, labels)[0] == np.mean(pairs)
    assert metrics.areas(-scores, labels)[0] == 1 - np.mean(pairs)


def test_constant_scores_rank_nothing():
    labels = np.array([0, 1, 0, 0])
    assert metrics.areas(np.full(4, 0.3), labels)[0] == 0.5
    assert metrics.areas(np.full(4, 0.3), labels)[1] == 0.25  # the share of positives
    scores = metrics.of_task("single_label", np.zeros((4, 2)), labels)
    assert scores["roc_auc"] == 0.5
    assert scores["log_loss"] == pytest.approx(np.log(2), **TIGHT)
    assert scores["ece"] == pytest.approx(0.25, **TIGHT)  # says 0.5, right on three of four


def test_calibration_error_equals_a_loop_over_bins():
    logits, labels = rows_of(5, 700, 4)
    p = softmax(2 * logits)
    top, right = p.max(axis=1), p.argmax(axis=1) == labels
    want = 0.0
    for k in range(15):
        inside = (top > k / 15) & (top <= (k + 1) / 15)
        if inside.any():
            want += inside.mean() * abs(right[inside].mean() - top[inside].mean())
    assert metrics.of_task("single_label", 2 * logits, labels)["ece"] == pytest.approx(want, **TIGHT)
    assert want > 0.05


def test_macro_f1_is_not_the_mean_of_the_macro_f1_of_batches():
    logits, labels = rows_of(6, 240, 8)
    whole = metrics.of_task("single_label", logits, labels)
    batches = [metrics.of_task("single_label", logits[i : i + 8], labels[i : i + 8]) for i in range(0, 240, 8)]
    assert np.mean([b["accuracy"] for b in batches]) == pytest.approx(whole["accuracy"], **TIGHT)
    assert abs(np.mean([b["macro_f1"] for b in batches]) - whole["macro_f1"]) > 0.03


def test_half_precision_probabilities_destroy_auc_and_float32_logits_keep_it():
    rng = np.random.default_rng(7)
    logits = np.linspace(8, 18, 2000).astype(np.float32)  # a confident model: 2,000 distinct logits
    labels = (rng.random(2000) < np.linspace(0, 1, 2000)).astype(int)
    exact = metrics.areas(logits.astype(np.float64), labels)[0]
    assert len(np.unique(logits)) == 2000
    assert exact > 0.8
    assert metrics.areas(logits, labels)[0] == exact
    half = (1 / (1 + np.exp(-logits.astype(np.float64)))).astype(np.float16)
    assert len(np.unique(half)) < 5
    assert metrics.areas(half, labels)[0] < exact - 0.2


@pytest.mark.parametrize("classes", [2, 3])
def test_auc_of_saturated_probabilities_is_kept(classes):
    margin = np.linspace(40, 60, 50)  # softmax gives 1.0 exactly, even in float64
    logits = np.zeros((50, classes))
    logits[:, 0] = margin
    labels = np.where(np.arange(50) < 25, 1, 0)  # the lower margins are the mistakes
    if classes == 3:
        logits, labels = np.vstack([logits, [0, 0, 90]]), np.append(labels, 2)
    assert len(np.unique(softmax(logits)[:50, 0])) == 1
    scores = metrics.of_task("single_label", logits, labels)
    assert scores["roc_auc"] == 1.0
    if classes == 2:
        assert scores["log_loss"] == pytest.approx(margin[:25].sum() / 50, **TIGHT)


def test_large_logits_do_not_overflow():
    big = np.array([[1e4, -1e4], [1e4, -1e4]])
    assert metrics.of_task("single_label", big, np.array([0, 1]))["log_loss"] == 1e4
    assert metrics.of_task("multi_label", big, np.array([[1, 0], [0, 1]]))["log_loss"] == 5e3


def test_one_row_and_one_class():
    one = metrics.of_task("single_label", np.array([[2.0, 1.0, 0.0]]), np.array([0]))
    assert (one["accuracy"], one["micro_f1"], one["macro_f1"], one["weighted_f1"], one["rows"]) == (1, 1, 1, 1, 1)
    assert "roc_auc" not in one
    assert set(metrics.of_task("multi_label", np.array([[1.0, -1.0]]), np.array([[1, 0]]))) == {
        *("micro_f1", "macro_f1", "weighted_f1", "subset_accuracy", "hamming_loss", "log_loss", "rows"),
    }
    assert metrics.of_task("regression", np.array([[1.0]]), np.array([3.0])) == {
        "mse": 4,
        "rmse": 2,
        "mae": 2,
        "rows": 1,
    }
    assert set(metrics.of_task("regression", np.ones((3, 1)), np.arange(3.0))) == {"mse", "rmse", "mae", "r2", "rows"}
    for labels in (np.zeros(4), np.ones(4)):
        assert np.isnan(metrics.areas(np.arange(4.0), labels)[0])
    assert np.isnan(metrics.areas(np.arange(4.0), np.zeros(4))[1])
    assert metrics.areas(np.arange(4.0), np.ones(4))[1] == 1


def test_predictions_may_be_given():
    logits, targets = np.array([[0.0, 2.0], [1.0, 3.0]]), np.array([[0, 0], [1, 1]])
    plain = metrics.of_task("multi_label", logits, targets)
    assert plain["subset_accuracy"] == 0.5  # a logit of 0 is not predicted
    given = metrics.of_task("multi_label", logits, targets, predicted=logits > [0.5, 2.5])
    assert given["subset_accuracy"] == given["micro_f1"] == 1 and given["log_loss"] == plain["log_loss"]
    classes = metrics.of_task("single_label", logits, np.array([0, 1]), predicted=np.array([0, 1]))
    assert classes["accuracy"] == 1 and "ece" not in classes


def test_better_knows_which_metrics_fall():
    assert metrics.better(0.1, None, "accuracy") and metrics.better(None, None, "pearson")
    assert metrics.better(0.8, 0.7, "accuracy") and not metrics.better(0.7, 0.7, "accuracy")
    assert metrics.better(0.7, 0.8, "log_loss") and not metrics.better(0.8, 0.7, "mse")
    assert not metrics.better(None, -0.3, "pearson"), "equal outputs correlate with nothing"


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_the_majority_baseline_is_the_score_of_a_constant(task):
    rng = np.random.default_rng(11)
    labels = {
        "single_label": rng.choice(3, size=50, p=[0.2, 0.5, 0.3]),
        "multi_label": (rng.random((50, 3)) < [0.1, 0.6, 0.3]).astype(int),
        "regression": rng.normal(size=50),
    }[task]
    constant = np.full((50, 1), labels.mean()) if task == "regression" else np.tile([-1.0, 1.0, -1.0], (50, 1))
    scores = metrics.of_task(task, constant, labels)
    name = {"single_label": "accuracy", "multi_label": "micro_f1", "regression": "mse"}[task]
    assert metrics.majority(task, labels) == pytest.approx(scores[name], **TIGHT)


def test_the_majority_baseline_is_in_the_metric_that_it_stands_beside():
    """Of scikit-learn's dummy classifier on the newcomer's 42, 9 and 3 rows, a mean, and undefined ones."""
    dummy = pytest.importorskip("sklearn.dummy")
    scores = pytest.importorskip("sklearn.metrics")
    y = np.repeat([0, 1, 2], [42, 9, 3])
    x = np.zeros((54, 1))
    frequent = dummy.DummyClassifier(strategy="most_frequent").fit(x, y).predict(x)
    prior = dummy.DummyClassifier(strategy="prior").fit(x, y).predict_proba(x)
    expected = {
        "accuracy": 42 / 54,
        "micro_f1": 42 / 54,
        "macro_f1": scores.f1_score(y, frequent, average="macro", zero_division=0),
        "weighted_f1": scores.f1_score(y, frequent, average="weighted", zero_division=0),
        "log_loss": scores.log_loss(y, prior),
        "roc_auc": 0.5,
    }
    assert {name: metrics.majority("single_label", y, name, 3) for name in expected} == pytest.approx(expected)
    assert metrics.majority("single_label", y, "roc_auc", 4) is None, "no row of the fourth class: not defined"
    several = (np.random.default_rng(0).random((60, 3)) < [0.6, 0.3, 0.1]).astype(int)
    commonest = np.tile([1, 0, 0], (60, 1))
    for name, average in (("micro_f1", "micro"), ("macro_f1", "macro")):
        value = scores.f1_score(several, commonest, average=average, zero_division=0)
        assert metrics.majority("multi_label", several, name) == pytest.approx(value)
    assert metrics.majority("multi_label", several, "roc_auc") == 0.5
    assert metrics.majority("multi_label", several, "average_precision") == pytest.approx(several.mean())
    numbers = np.arange(10.0)
    assert metrics.majority("regression", numbers, "rmse") == pytest.approx(numbers.std())
    assert (
        metrics.majority("regression", numbers, "r2") == 0
        and metrics.majority("regression", numbers, "pearson") is None
    )


# ---------------------------------------------------------------------------------------------------------------------
# tables, errors


NAMES = [
    *("Algebra", "Geometry and Trigonometry", "Calculus and Analysis", "Probability and Statistics", "Number Theory"),
    *("Combinatorics and Discrete Math", "Linear Algebra", "Abstract Algebra and Topology"),
]


def test_table_of_eight_long_names_fits_a_hundred_columns():
    confusion = np.random.default_rng(9).integers(0, 3000, size=(8, 8)) + 100 * np.eye(8, dtype=int)
    text = tables.table(confusion, NAMES)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert text.isascii()
    support = confusion.sum(axis=1)
    scores = metrics.of_counts(np.diag(confusion), confusion.sum(axis=0), support)
    for k in range(8):
        top, bottom = [line for line in lines if line.startswith(f"{k} ")]
        want = [f"{values[k]:.4f}" for values in scores]
        assert top.split()[-4:] == [*want, str(support[k])]
        assert bottom.split()[-8:] == [str(count) for count in confusion[k]]
    matrix = lines[-9:]
    assert len({len(line) for line in matrix}) == 1  # aligned
    weighted = next(line for line in lines if line.startswith("weighted"))
    assert weighted.split()[2] == f"{np.trace(confusion) / confusion.sum():.4f}"  # weighted recall is accuracy


def test_table_at_other_sizes():
    small = tables.table(np.array([[2, 1, 0], [0, 3, 0], [0, 0, 0]]), ["no", "two\nlines", "absent"])
    assert "1 two lines" in small
    assert tables.table(np.eye(2, dtype=int), ["no", "yes"]).splitlines()[-3:] == [
        "      0 1",
        "0 no  1 0",
        "1 yes 0 1",
    ]
    macro = next(line for line in small.splitlines() if line.startswith("macro"))
    assert macro.split() == ["macro", "0.8750", "0.8333", "0.8286", "6"]  # the absent class is not in the mean
    many = tables.table(np.eye(77, dtype=int), [f"a rather long intent name {k}" for k in range(77)])
    assert "77 classes do not fit 100 columns" in many
    assert max(map(len, many.splitlines())) <= 100
    middle = tables.table(np.eye(20, dtype=int), NAMES * 2 + NAMES[:4]).splitlines()
    assert max(map(len, middle)) <= 100
    assert middle[-21].split() == [str(k) for k in range(20)]


def test_non_finite_rows_are_counted_and_the_first_is_named():
    logits, labels = rows_of(10, 30, 3)
    logits[[4, 9, 9], [0, 1, 2]] = np.nan, np.inf, -np.inf
    message = "logits: got nan in row 4, 3 such values, expected finite numbers"
    with pytest.raises(ValueError, match=message):
        metrics.of_task("single_label", logits, labels)
    with pytest.raises(ValueError, match=message):
        metrics.of_task("multi_label", logits, np.eye(3)[labels])
    with pytest.raises(ValueError, match="logits: got nan in row 4, 1 such values"):
        metrics.of_task("regression", logits[:, :1], labels)


@pytest.mark.parametrize(
    "task, logits, labels, message",
    [
        ("single_label", np.zeros((3, 2)), [0, 1], r"labels: got shape \(2,\), expected \(3,\) for single_label"),
        ("single_label", np.zeros((2, 2)), [0, 2], "got 2 in row 1, .*expected integers from 0 to 1"),
        ("single_label", np.zeros((2, 2)), [-1, 0], "got -1 in row 0"),
        ("single_label", np.zeros((2, 2)), [0.5, 1.0], "got 0.5 in row 0, .*expected integers"),
        ("single_label", np.zeros((0, 2)), [], r"logits: got float64 \(0, 2\), expected .*, not empty"),
        ("single_label", np.zeros(2), [0, 1], r"logits: got float64 \(2,\), expected float32 or float64 \(N, C\)"),
        ("single_label", np.zeros((2, 2), np.float16), [0, 1], "got float16 .*, expected float32"),
        ("multi_label", np.zeros((2, 3)), np.zeros((2, 2)), r"got shape \(2, 2\), expected \(2, 3\)"),
        ("multi_label", np.zeros((2, 2)), [[0, 1], [2, 0]], "got 2 in row 1, .*expected integers from 0 to 1"),
        ("multi_label", np.zeros((1, 2)), [[0, np.nan]], "labels: got nan in row 0"),
        ("regression", np.zeros((3, 1)), np.zeros(2), r"labels: got shape \(2,\), expected \(3,\)"),
        ("regression", np.zeros((2, 1)), [0, np.inf], "labels: got inf in row 1, .*expected finite numbers"),
    ],
)
def test_errors_say_what_was_got_and_expected(task, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.of_task(task, logits, np.array(labels))


def test_metrics_imports_numpy_alone():
    code = "import sys, metrics; assert not {'torch', 'sklearn', 'scipy', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(metrics.__file__).parent, check=True)
