"""From logits to decisions: probabilities, class weights, the alarm for scores that cannot be right."""

import numpy as np
import pytest
import torch

import decide


def logits(rows=40, classes=5, scale=3.0, seed=0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, classes)) * scale).astype(np.float32)


# ---- softmax --------------------------------------------------------------------------------------------------------


def test_softmax_is_torchs():
    z = logits()
    expected = torch.softmax(torch.from_numpy(z).double(), 1).numpy()
    np.testing.assert_allclose(decide.softmax(z), expected, rtol=1e-12)
    assert decide.softmax(z).dtype == np.float64


def test_softmax_survives_large_logits_and_ignores_a_shift():
    z = np.array([[1e4, 0.0, -1e4], [-3e38, 3e38, 0.0]], dtype=np.float32)
    np.testing.assert_array_equal(decide.softmax(z), [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_allclose(decide.softmax(logits() + 512), decide.softmax(logits()), rtol=1e-3)


def test_half_precision_logits_keep_distinct_probabilities():
    z = np.stack([np.zeros(200), np.linspace(8, 9, 200)], axis=1).astype(np.float16)
    assert len(np.unique(decide.softmax(z)[:, 1])) == len(np.unique(z[:, 1]))


# ---- class weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[86, 2618, 500], [1, 1], [7, 3, 3, 90, 11]])
def test_balanced_weights_are_scikit_learns(counts):
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    y = np.repeat(np.arange(len(counts)), counts)
    expected = compute("balanced", classes=np.arange(len(counts)), y=y)
    got = decide.class_weights("balanced", np.array(counts))
    np.testing.assert_allclose(got, expected, rtol=1e-14)
    assert got[y].mean() == pytest.approx(1.0), "mean 1 over rows: the learning rate keeps its meaning"


def test_a_class_without_rows_gets_a_finite_weight():
    assert np.isfinite(decide.class_weights("balanced", np.array([5, 0, 3]))).all()


def test_none_and_given_weights():
    assert decide.class_weights("none", np.array([1, 2])) is None
    assert decide.class_weights("1, 2.5,0.5", np.array([9, 9, 9])).tolist() == [1.0, 2.5, 0.5]
    with pytest.raises(ValueError, match="has 2 numbers, expected one for each of 3 classes"):
        decide.class_weights("1,2", np.array([9, 9, 9]))


# ---- degenerate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, classes", [(1, 2), (8, 2), (40, 5), (3000, 8)])
def test_ordinary_scores_raise_no_alarm(rows, classes):
    assert decide.degenerate(logits(rows, classes)) == ""


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_counted_and_the_first_named(bad):
    z = logits()
    z[[6, 30], 2] = bad
    assert decide.degenerate(z).startswith("2 of 40 rows have scores that are not finite (first: row 7)")
    assert "1 of 1 rows" in decide.degenerate(np.array([[bad, 0.0]])), "however few rows there are"


def test_the_same_score_for_every_row_is_an_alarm():
    assert "1 distinct" in decide.degenerate(np.tile(logits(1), (50, 1)))
    assert decide.degenerate(np.zeros((8, 3))) != ""


def test_few_distinct_scores_are_an_alarm():
    """As a rules competition entry scored every row alike: an adapter that did not fit its base."""
    z = logits(2000, 2)[np.arange(2000) % 6]
    assert "6 distinct" in decide.degenerate(z)


def test_a_spread_of_rounding_alone_is_an_alarm():
    z = np.tile(logits(1), (50, 1)) + logits(50) * 1e-6
    assert "spread" in decide.degenerate(z)
    assert decide.degenerate(np.tile(logits(1), (50, 1)) + logits(50) * 1e-2) == ""


def test_a_shift_that_moves_no_probability_is_an_alarm():
    z = np.tile(logits(1), (50, 1)) + np.arange(50, dtype=np.float32)[:, None]  # softmax is blind to it
    assert decide.degenerate(z) != ""


def test_one_predicted_class_alone_is_no_alarm():
    z = logits() * 0.1
    z[:, 0] += 5
    assert decide.degenerate(z) == ""


# ---- distribution ---------------------------------------------------------------------------------------------------


def test_distribution_counts_every_row_once():
    z = logits(200, 3)
    z[:, 1] = -99  # never chosen
    text = decide.distribution(z, ["algebra", "b", "number theory"])
    lines = text.splitlines()
    rows = {line[:13].strip(): line[13:].split() for line in lines[1:4]}
    counts = np.bincount(z.argmax(1), minlength=3)
    assert [int(rows[n][0]) for n in ("algebra", "b", "number theory")] == counts.tolist()
    assert rows["b"] == ["0", "0.0%", "-"]
    mean = decide.softmax(z).max(1)[z.argmax(1) == 0].mean()
    assert rows["algebra"][1:] == [f"{counts[0] / 200:.1%}", f"{mean:.3f}"]
    assert "median" in lines[4]


def test_distribution_of_a_single_row():
    assert "100.0%" in decide.distribution(np.array([[0.0, 1.0]]), ["a", "b"])
