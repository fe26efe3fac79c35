"""Resampled metrics against metrics of the repeated rows, intervals against a loop, tests against scipy."""

import numpy as np
import pytest

import bootstrap
import metrics


def drawn(task: str, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(targets, logits) of a model of some skill."""
    rng = np.random.default_rng(rows)
    noise = rng.normal(size=(rows, classes))
    if task == "regression":
        targets = rng.gamma(2, 2, rows)
        return targets, 1.5 * targets[:, None] + noise
    if task == "single_label":
        targets = rng.choice(classes, rows)
        return targets, (noise + 1.5 * np.eye(classes)[targets]).astype(np.float32)
    targets = (rng.random((rows, classes)) < 0.3).astype(int)
    return targets, (noise + 3 * targets - 1.5).astype(np.float32)


TASKS = [("single_label", 5), ("single_label", 2), ("multi_label", 4), ("regression", 1)]


@pytest.mark.parametrize("task, classes", TASKS)
@pytest.mark.parametrize("ties", [False, True])
def test_weighted_metrics_are_those_of_the_repeated_rows(task, classes, ties):
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    targets, logits = drawn(task, 20, classes)
    logits = np.round(logits) if ties else logits
    targets = (targets > 3).astype(float) if task == "regression" and ties else targets
    predicted = logits > 0 if task == "multi_label" else logits.argmax(axis=1)
    weights = np.stack(list(bootstrap.resamples(20, 40, seed=1)))
    weights[0] = 1
    weights[1] = np.arange(20) == 7  # one row defines no AUC and no correlation
    score = metrics.scorer(task, logits, targets)
    undefined = set()
    for i, w in enumerate(weights.astype(int)):
        scores = score(weights[i])
        rows = np.repeat(np.arange(20), w)
        want = metrics.of_task(task, logits[rows], targets[rows])
        if task != "regression":
            labels = range(classes) if task == "single_label" else None
            options = {"average": None, "zero_division": 0, "labels": labels}
            np.testing.assert_allclose(scores["f1"], f1_score(targets[rows], predicted[rows], **options))
        for name in scores.keys() - {"f1"}:
            if name in want:
                np.testing.assert_allclose(scores[name], want[name], rtol=1e-9, atol=1e-9, err_msg=name)
            else:
                assert np.isnan(scores[name]), name
                undefined.add(name)
        assert set(want) - set(scores) == {"rows"}
    assert undefined == {"pearson", "r2", *metrics.RANKING} & scores.keys()


@pytest.mark.parametrize("task, classes", [("single_label", 3), ("multi_label", 3), ("regression", 1)])
def test_intervals_are_the_percentiles_of_a_loop_over_resamples(task, classes):
    labels, logits = drawn(task, 120, classes)
    names = [name for name in metrics.of_task(task, logits, labels) if name != "rows"]
    draws = {name: [] for name in names}
    rng = np.random.default_rng(5)
    for _ in range(100):
        rows = rng.integers(120, size=120)
        for name, value in metrics.of_task(task, logits[rows], labels[rows]).items():
            if name in draws:
                draws[name].append(value)
    spans = bootstrap.intervals(task, logits, labels, names, samples=100, seed=5)
    assert list(spans) == names
    for name in names:
        np.testing.assert_allclose(spans[name], np.quantile(draws[name], [0.025, 0.975]), rtol=1e-12)


def test_a_metric_that_most_resamples_do_not_define_has_no_interval():
    labels, logits = np.array([0, 0, 0, 0, 0, 0, 1, 2]), np.eye(3)[[0, 0, 0, 0, 1, 2, 1, 2]]
    spans = bootstrap.intervals("single_label", logits, labels, ["accuracy", "roc_auc", "no_metric"], samples=200)
    assert list(spans) == ["accuracy"], "two of three resamples lack class 1 or 2"
    assert spans["accuracy"][0] < 0.75 < spans["accuracy"][1]


def test_resamples_are_counts_of_rows_drawn_with_replacement():
    generator = np.random.default_rng(3)
    want = [np.bincount(generator.integers(17, size=17), minlength=17) for _ in range(23)]
    assert np.array_equal(np.stack(list(bootstrap.resamples(17, 23, 3))), want)
    assert bootstrap.bootstrap(None, 17, 0, 3) == {}, "no resamples, no draws"


def test_p_value_counts_the_resamples_beyond_zero():
    differences = np.array([-0.1, 0.0, 0.2, 0.3, np.nan, 0.4])
    assert bootstrap.p_value(differences) == 2 * (2 + 1) / (5 + 1)
    assert bootstrap.p_value(np.full(99, 0.1)) == 2 / 100
    assert bootstrap.p_value(np.zeros(9)) == 1


def test_mcnemar_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for only_a, only_b in [(0, 0), (0, 1), (3, 9), (12, 12), (0, 24), (12, 13), (25, 0), (40, 22), (700, 900)]:
        p, test = bootstrap.mcnemar(only_a, only_b)
        if only_a + only_b < 25:
            want = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
            assert test == "exact binomial"
        else:
            chi = max(0, abs(only_a - only_b) - 1) ** 2 / (only_a + only_b)
            want = stats.chi2.sf(chi, 1)
            assert test.startswith("chi-square")
        assert p == pytest.approx(want, rel=1e-9) and bootstrap.mcnemar(only_b, only_a)[0] == p


def test_wilson_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for hits, rows in [(0, 5), (3, 7), (50, 50), (1, 1000)]:
        want = stats.binomtest(hits, rows).proportion_ci(method="wilson")
        np.testing.assert_allclose(bootstrap.wilson(np.array([hits]), np.array([rows]))[:, 0], want, atol=1e-6)
