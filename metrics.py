"""Scores of text classifiers, from logits, in float64. numpy only; scikit-learn is the reference in the tests.

    scores = of_task("single_label", logits, labels)  # {"accuracy": 0.87, "micro_f1": 0.87, "macro_f1": ...}
    score = scorer("single_label", logits, labels)    # the same scores as a function of how much each row counts
    draw = score(counts)                              # of a bootstrap resample (N,): {"accuracy": 0.86, ...}

A score is computed in one place, over weighted rows: weights of one give the plain score, counts of rows a resample.
Call these on the gathered rows of the whole evaluation set: F1 and AUC of batches do not average to that of the set.
Labels are class ids (N,) for single_label, 0 and 1 (N, C) for multi_label, numbers (N,) for regression.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Scores = dict[str, float]  # by the metric's name

RANKING = ("roc_auc", "average_precision")  # metrics that sort all rows
LOWER = "log_loss hamming_loss mse rmse mae".split()  # metrics of which less is better

# ---- inputs and probabilities ---------------------------------------------------------------------------------------


def checked(task: str, logits: Array, labels: Array) -> tuple[Array, Array]:
    """Logits (N, C) as float64, and labels as int64, of regression as float64.

    ValueError on empty, float16 or non-finite logits, on labels of another shape, and on labels that are no class.
    """
    z, y = np.asarray(logits), np.asarray(labels)
    if z.ndim != 2 or not z.size or z.dtype == np.float16:
        raise ValueError(f"logits: got {z.dtype} {z.shape}, expected float32 or float64 (N, C), not empty")
    top, shape = z.shape[1] - 1, z.shape[:1]
    if task == "multi_label":
        top, shape = 1, z.shape
    if y.shape != shape:
        raise ValueError(f"labels: got shape {y.shape}, expected {shape} for {task}")

    rules = [
        ("logits", z, np.isfinite(z), "finite numbers"),
        ("labels", y, np.isfinite(y), "finite numbers"),
    ]
    if task != "regression":
        rules[1] = "labels", y, np.isin(y, range(top + 1)), f"integers from 0 to {top}"
    for name, values, right, expected in rules:
        bad = np.argwhere(~right)
        if len(bad):
            got = f"{values[tuple(bad[0])]} in row {bad[0, 0]}, {len(bad)} such values"
            raise ValueError(f"{name}: got {got}, expected {expected}")
    return z.astype(float), y.astype(float if task == "regression" else int)


def one_hot(values: Array, classes: int) -> Array:
    """(N, C) float64 of 0 and 1, from class ids (N,) or from the same."""
    if values.ndim == 2:
        return values.astype(float)
    return np.eye(classes)[values]


def softmax(logits: Array) -> Array:
    """(..., C) logits -> probabilities in float64."""
    z = logits.astype(float)
    powers = np.exp(z - z.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(logits: Array) -> Array:
    """(..., C) logits -> log-probabilities."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def log_sigmoid(logits: Array) -> Array:
    return -np.logaddexp(0, -logits)


def log_odds(logits: Array, k: int) -> Array:
    """log p_k - log(1 - p_k) (N,): orders rows as p_k does, but never saturates at 1. z_1 - z_0 for two classes."""
    others = np.delete(logits, k, axis=1)
    top = others.max(axis=1)
    return logits[:, k] - top - np.log(np.exp(others - top[:, None]).sum(axis=1))


# ---- metrics of probabilities ---------------------------------------------------------------------------------------


def ece(probabilities: Array, correct: Array, weights: Array | float = 1.0) -> float:
    """Expected calibration error: the mean over rows of |mean outcome - mean probability| of their bin.

    probabilities and correct (N,): of single_label the top probability and whether it is right, of multi_label every
    cell and its target. 15 bins (i/15, (i+1)/15], the first with 0 (Guo et al. 2017).
    """
    weights = weights * np.ones(len(probabilities))
    bins = np.ceil(probabilities * 15).astype(int) - 1
    # rows * (accuracy - mean probability), of each bin
    gaps = np.bincount(bins.clip(0, 14), weights * (correct - probabilities), minlength=15)
    return np.abs(gaps).sum() / weights.sum()


def brier(probabilities: Array, labels: Array) -> float:
    """Brier score (1950) of probabilities (N, C): for class ids (N,) the squared errors summed over classes, from 0 to
    2, mean over rows; for 0 and 1 (N, C) their mean over cells, from 0 to 1.
    """
    squares = (probabilities - one_hot(labels, probabilities.shape[1])) ** 2
    if labels.ndim == 1:
        squares = squares.sum(axis=1)
    return squares.mean()


# ---- precision, recall, F1 ------------------------------------------------------------------------------------------


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Counts (C, C) of class ids (N,): rows are the true class, columns the predicted one."""
    return (one_hot(labels, classes).T @ one_hot(predictions, classes)).astype(int)


def ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where the denominator is 0, as scikit-learn's zero_division=0."""
    # [()]: of two numbers a number, not an array without axes
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)[()]


def of_counts(hits: Array, predicted: Array, support: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 from the numbers of rows that are right, predicted and true, of each class."""
    return ratio(hits, predicted), ratio(hits, support), ratio(2 * hits, predicted + support)


# ---- ranking: AUC, average precision --------------------------------------------------------------------------------


def _ranker(scores, positive):
    """weights (N,) -> (AUC, average precision) of scores (N,), higher is more positive, against 0 and 1 (N,).

    AUC is the share of pairs that rank the positive above the negative, ties counting half (Hanley and McNeil 1982);
    NaN without either. Average precision is sum_k (R_k - R_{k-1}) P_k over the distinct scores; NaN without a positive.
    """
    order = np.argsort(-scores)
    positive = positive[order]
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))  # the first row of each distinct score

    def of_weights(weights):
        weights = weights[order]
        rows = np.add.reduceat(weights, starts)  # (distinct scores,)
        hits = np.add.reduceat(weights * positive, starts)
        misses = rows - hits
        above = hits.cumsum()
        with np.errstate(invalid="ignore"):
            auc = (misses * (above - hits / 2)).sum() / (hits.sum() * misses.sum())
            return auc, (hits / hits.sum() * ratio(above, rows.cumsum())).sum()

    return of_weights


def areas(scores: Array, labels: Array) -> tuple[float, float]:
    """(AUC, average precision) of scores (N,) against labels (N,) of 0 and 1; see `_ranker`.

    Pass logits or log-odds: half-precision probabilities round to ties.
    """
    return _ranker(scores, labels)(np.ones(len(scores)))


# ---- the three tasks ------------------------------------------------------------------------------------------------


def of_task(
    task: str,
    logits: Array,
    labels: Array,
    ranking: bool = True,
    predicted: Array | None = None,
) -> Scores:
    """The metrics of a task that the rows define, and the number of rows; see `scorer`."""
    scores = scorer(task, logits, labels, predicted, ranking)(np.ones(len(labels)))
    known = {name: float(value) for name, value in scores.items() if name != "f1" and not np.isnan(value)}
    return known | {"rows": len(labels)}


def scorer(
    task: str,
    logits: Array,
    targets: Array,
    predicted: Array | None = None,
    ranking: bool = True,
) -> Callable:
    """A function of weights (N,) that gives the metrics of a task by name, and "f1" (C,) of each class.

    predicted: class ids (N,), or 0 and 1 (N, C), instead of the first argmax, or of logits above 0. ranking: whether
    the metrics of RANKING are wanted. What the weighted rows do not define (AUC with one class, r2 of constant targets)
    is NaN, or absent where all rows do not define it.

    micro_f1: from the summed counts; equal to accuracy when each row has one label. macro_f1: mean over the classes
    that occur in labels or predictions (scikit-learn's default), of multi_label over all. subset_accuracy: all labels
    of a row right. hamming_loss: share of wrong cells. log_loss: nats per row, of multi_label per cell. roc_auc: of two
    classes on z_1 - z_0, of more the one-vs-rest macro mean, of multi_label the macro mean, as average_precision; of
    regression where the targets are 0 and 1. ece: of the top probability, absent where `predicted` is given.
    """
    z, y = checked(task, logits, targets)
    return _of_numbers(z[:, 0], y) if task == "regression" else _of_classes(z, y, predicted, ranking)


def _of_classes(z, y, predicted, ranking):
    """weights (N,) -> the metrics of single_label, or of multi_label where the labels are y (N, C)."""
    classes, multi, own = z.shape[1], y.ndim == 2, predicted is None
    if own:
        predicted = z > 0 if multi else z.argmax(axis=1)
    chosen = one_hot(predicted, classes)
    true = one_hot(y, classes)
    both, either = true * chosen, true + chosen
    wrong = true != chosen
    right = ~wrong.any(axis=1)
    if multi:
        columns = z.T
        loss = np.logaddexp(0, np.where(y, -z, z))  # (N, C)
    else:
        columns = (log_odds(z, k) for k in range(classes))
        log_p = log_softmax(z)
        loss = -log_p[np.arange(len(z)), y]  # (N,)
        confidence = np.exp(log_p.max(axis=1))

    # Each class against the others, by what orders the rows as its probability does.
    rankers = []
    if ranking and true.any(axis=0).all():
        rankers = list(map(_ranker, columns, true.T))

    def of_weights(weights):
        accuracy = _mean(right, weights)
        scores = {} if multi else {"accuracy": accuracy}
        hits, sizes, support = weights @ both, weights @ either, weights @ true  # (C,) each
        f1 = ratio(2 * hits, sizes)
        occurs = (sizes > 0) | multi
        scores |= {
            "f1": f1,
            "micro_f1": ratio(2 * hits.sum(), sizes.sum()),
            "macro_f1": f1[occurs].mean(),
            "weighted_f1": ratio((f1 * support)[occurs].sum(), support.sum()),
        }
        if multi:
            scores |= {"subset_accuracy": accuracy, "hamming_loss": _mean(wrong, weights)}
        scores["log_loss"] = _mean(loss, weights)
        if rankers:
            auc, precision = np.transpose([ranker(weights) for ranker in rankers])  # (C,) each
            if multi:
                scores["average_precision"] = precision.mean()
            scores["roc_auc"] = auc.mean()
        if own and not multi:
            scores["ece"] = ece(confidence, right, weights)
        return scores

    return of_weights


def _of_numbers(outputs, targets):
    """weights (N,) -> the metrics of regression for outputs (N,) and targets (N,), in the units of the targets."""
    error = outputs - targets
    ranker = _ranker(outputs, targets)
    two_classes = np.isin(targets, (0, 1)).all()

    def of_weights(weights):
        mse = _mean(error**2, weights)
        a, b = _centred(outputs, weights), _centred(targets, weights)
        variation = (weights * b) @ b
        norms = np.sqrt((weights * a) @ a) * np.sqrt(variation)
        scores = {
            "mse": mse,
            "rmse": mse**0.5,
            "mae": _mean(np.abs(error), weights),
            "pearson": np.clip((weights * a) @ b / norms, -1, 1),
            "r2": 1 - (weights * error) @ error / variation,
        }
        if two_classes:
            scores["roc_auc"] = ranker(weights)[0]
        return scores

    return of_weights


def _centred(values, weights):
    """values (N,) less their weighted mean; NaN where all are equal, which correlates with nothing."""
    mean = np.nan if np.ptp(values[weights > 0]) == 0 else _mean(values, weights)
    return values - mean


def _mean(values, weights):
    """The weighted mean of values (N,) or of cells (N, C); weights of one give the very bits of values.mean()."""
    cells = values.reshape(len(values), -1)
    return (cells * weights[:, None]).sum() / (weights.sum() * cells.shape[1])


def majority(task: str, labels: Array, metric: str = "", classes: int = 0) -> float | None:
    """What a metric (default: micro_f1, or mse) gives for the same answer to every row: the largest class or commonest
    label, with the classes' frequencies as probabilities, or the mean. None where the metric is not defined for it.

    classes: of single-label ids (N,); default: those up to the largest one.
    """
    if task == "regression":
        mean = np.full((len(labels), 1), np.mean(labels))
        scores = of_task(task, mean, labels)
        return scores.get(metric or "mse")
    true = labels
    if task == "single_label":
        true = one_hot(labels, classes or labels.max() + 1)
    shares = true.mean(axis=0, dtype=float)
    shares = shares.clip(1e-12, 1 - 1e-12)
    constant = np.log(shares)
    predicted = np.full(len(labels), shares.argmax())
    if task == "multi_label":
        constant -= np.log1p(-shares)
        predicted = one_hot(predicted, len(shares))
    constant = np.tile(constant, (len(labels), 1))
    scores = of_task(task, constant, labels, predicted=predicted)
    return scores.get(metric or "micro_f1")


def better(now: float | None, best: float | None, metric: str) -> bool:
    """Whether a metric beats the best so far; the first evaluation does (None).

    A metric that the rows do not define (None), as pearson while every output is the same, counts as -1.
    """
    if best is None:
        return True
    now = -1.0 if now is None else now
    return now < best if metric in LOWER else now > best
