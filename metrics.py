"""Scores of text classifiers, from logits, in float64. numpy only; scikit-learn is the reference in the tests.

    scores = of_task("single_label", logits, labels)  # {"accuracy": 0.87, "micro_f1": 0.87, "macro_f1": ...}
    score = scorer("single_label", logits, labels)    # the same scores as a function of how much each row counts
    draws = score(counts)                             # of bootstrap resamples (S, N): {"accuracy": (S,), ...}

A score is computed in one place, over weighted rows: weights of one give the plain score, counts of rows a resample.
Call these on the gathered rows of the whole evaluation set: F1 and AUC of batches do not average to that of the set.
Labels are class ids (N,) for single_label, 0 and 1 (N, C) for multi_label, numbers (N,) for regression.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray

RANKING = ("roc_auc", "average_precision")  # metrics that sort all rows
LOWER = ("log_loss", "hamming_loss", "mse", "rmse", "mae")  # metrics of which less is better

# ---- inputs and probabilities ---------------------------------------------------------------------------------------


def checked(task: str, logits: Array, labels: Array) -> tuple[Array, Array]:
    """Logits (N, C) as float64, and labels as int64, of regression as float64.

    ValueError on empty, float16 or non-finite logits, on labels of another shape, and on labels that are no class.
    """
    z, y = np.asarray(logits), np.asarray(labels)
    if z.ndim != 2 or z.size == 0 or z.dtype == np.float16:
        raise ValueError(f"logits: got {z.dtype} {z.shape}, expected float32 or float64 (N, C), not empty")
    shape = z.shape if task == "multi_label" else z.shape[:1]
    if y.shape != shape:
        raise ValueError(f"labels: got shape {y.shape}, expected {shape} for {task}")
    _need("logits", z, np.isfinite(z), "finite numbers")
    z = z.astype(np.float64)

    if task == "regression":
        _need("labels", y, np.isfinite(y), "finite numbers")
        return z, y.astype(np.float64)
    top = 1 if task == "multi_label" else z.shape[1] - 1
    in_range = (y >= 0) & (y <= top)
    _need("labels", y, in_range & (y == np.floor(y)), f"integers from 0 to {top}")
    return z, y.astype(np.int64)


def _need(name: str, values: Array, good: Array, expected: str) -> None:
    bad = np.argwhere(~good)
    if len(bad):
        first = tuple(bad[0])
        raise ValueError(f"{name}: got {values[first]} in row {first[0]}, {len(bad)} such values, expected {expected}")


def one_hot(values: Array, classes: int) -> Array:
    """(N, C) float64 of 0 and 1, from class ids (N,) or from the same."""
    if values.ndim == 2:
        return values.astype(np.float64)
    return np.eye(classes)[values]


def softmax(logits: Array) -> Array:
    """(..., C) logits -> probabilities in float64."""
    z = logits.astype(np.float64)
    top = z.max(axis=-1, keepdims=True)
    powers = np.exp(z - top)
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(logits: Array) -> Array:
    """(..., C) logits -> log-probabilities."""
    top = logits.max(axis=-1, keepdims=True)
    shifted = logits - top
    total = np.exp(shifted).sum(axis=-1, keepdims=True)
    return shifted - np.log(total)


def log_sigmoid(logits: Array) -> Array:
    return -np.logaddexp(0, -logits)


def log_odds(logits: Array, k: int) -> Array:
    """log p_k - log(1 - p_k) (N,): orders rows as p_k does, but never saturates at 1. z_1 - z_0 for two classes."""
    others = np.delete(logits, k, axis=1)
    top = others.max(axis=1)
    total = np.exp(others - top[:, None]).sum(axis=1)
    return logits[:, k] - top - np.log(total)


# ---- metrics of probabilities ---------------------------------------------------------------------------------------


def ece(probabilities: Array, correct: Array, weights: Array | float = 1.0) -> float:
    """Expected calibration error: the mean over rows of |mean outcome - mean probability| of their bin.

    probabilities and correct (N,): of single_label the top probability and whether it is right, of multi_label every
    cell and its target. 15 bins (i/15, (i+1)/15], the first with 0 (Guo et al. 2017).
    """
    weights = weights * np.ones(len(probabilities))
    bins = np.ceil(probabilities * 15).astype(int) - 1
    gaps = weights * (correct - probabilities)
    gaps = np.bincount(bins.clip(0, 14), gaps, minlength=15)  # rows * (accuracy - mean probability)
    return float(np.abs(gaps).sum() / weights.sum())


def brier(probabilities: Array, labels: Array) -> float:
    """Brier score (1950) of probabilities (N, C): for class ids (N,) the squared errors summed over classes, from 0 to
    2, mean over rows; for 0 and 1 (N, C) their mean over cells, from 0 to 1.
    """
    squares = (probabilities - one_hot(labels, probabilities.shape[1])) ** 2
    if labels.ndim == 1:
        squares = squares.sum(axis=1)
    return float(squares.mean())


# ---- precision, recall, F1 ------------------------------------------------------------------------------------------


def confusion_matrix(labels: Array, predictions: Array, classes: int) -> Array:
    """Counts (C, C) of class ids (N,): rows are the true class, columns the predicted one."""
    counts = one_hot(labels, classes).T @ one_hot(predictions, classes)
    return counts.astype(np.int64)


def ratio(numerator: Array, denominator: Array) -> Array:
    """The quotient, and 0 where the denominator is 0, as scikit-learn's zero_division=0."""
    zeros = np.zeros(np.shape(numerator))
    return np.divide(numerator, denominator, out=zeros, where=denominator > 0)


def of_counts(hits: Array, predicted: Array, support: Array) -> tuple[Array, Array, Array]:
    """Precision, recall and F1 from the numbers of rows that are right, predicted and true, of each class."""
    precision = ratio(hits, predicted)
    recall = ratio(hits, support)
    return precision, recall, ratio(2 * hits, predicted + support)


def _f1_scores(hits: Array, predicted: Array, support: Array, every: bool) -> dict[str, Array]:
    """F1 of each class, and its averages over every class or over those that occur in labels or predictions."""
    f1 = of_counts(hits, predicted, support)[2]
    sizes = predicted + support
    occurs = (sizes > 0) | every
    return {
        "f1": f1,
        "micro_f1": ratio(2 * hits.sum(), sizes.sum()),
        "macro_f1": f1[occurs].mean(),
        "weighted_f1": ratio((f1 * support)[occurs].sum(), support.sum()),
    }


# ---- ranking: AUC, average precision --------------------------------------------------------------------------------


def _ranker(scores: Array, positive: Array) -> Callable:
    """weights (N,) -> (AUC, average precision) of scores (N,), higher is more positive, against 0 and 1 (N,).

    AUC is the share of pairs that rank the positive above the negative, ties counting half (Hanley and McNeil 1982);
    NaN without either. Average precision is sum_k (R_k - R_{k-1}) P_k over the distinct scores; NaN without a positive.
    """
    order = np.argsort(-scores)
    positive = positive[order]
    steps = np.diff(scores[order]) != 0
    starts = np.flatnonzero(np.append(True, steps))  # the first row of each distinct score

    def areas(weights):
        weights = weights[order]
        rows = np.add.reduceat(weights, starts)  # (distinct scores,)
        hits = np.add.reduceat(weights * positive, starts)
        rows_above, hits_above = rows.cumsum(), hits.cumsum()
        positives = hits_above[-1]
        negatives = rows_above[-1] - positives
        pairs = (rows - hits) * (hits_above - hits / 2)
        precision = ratio(hits_above, rows_above)
        with np.errstate(invalid="ignore"):
            auc = pairs.sum() / (positives * negatives)
            return auc, (hits / positives * precision).sum()

    return areas


def roc_auc(scores: Array, labels: Array) -> float:
    """Area under the ROC curve of scores (N,) against labels (N,) of 0 and 1; NaN where only one of them occurs.

    Pass logits or log-odds: half-precision probabilities round to ties.
    """
    weights = np.ones(len(scores))
    return float(_ranker(scores, labels)(weights)[0])


def average_precision(scores: Array, labels: Array) -> float:
    """Average precision of scores (N,) against labels (N,) of 0 and 1; NaN where no label is 1."""
    weights = np.ones(len(scores))
    return float(_ranker(scores, labels)(weights)[1])


# ---- the three tasks ------------------------------------------------------------------------------------------------


def of_task(
    task: str,
    logits: Array,
    labels: Array,
    ranking: bool = True,
    predicted: Array | None = None,
) -> dict[str, float]:
    """The metrics of a task that the rows define, and the number of rows; see `scorer`."""
    rows = len(labels)
    score = scorer(task, logits, labels, predicted, ranking)
    known = {}
    for name, values in score(np.ones((1, rows))).items():
        if name != "f1" and not np.isnan(values[0]):
            known[name] = float(values[0])
    return known | {"rows": rows}


def scorer(
    task: str,
    logits: Array,
    targets: Array,
    predicted: Array | None = None,
    ranking: bool = True,
) -> Callable:
    """A function of weights (S, N) that gives the metrics (S,) of a task by name, and "f1" (S, C) of each class.

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
    if task == "regression":
        of_weights = _of_numbers(z[:, 0], y)
    else:
        of_weights = _of_classes(z, y, predicted, ranking)

    def score(weights):
        samples = [of_weights(row) for row in weights]
        return {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}

    return score


def _of_classes(z: Array, y: Array, predicted: Array | None, ranking: bool) -> Callable:
    """weights (N,) -> the metrics of single_label, or of multi_label where the labels are y (N, C)."""
    classes, multi = z.shape[1], y.ndim == 2
    own = z > 0 if multi else z.argmax(axis=1)
    chosen = one_hot(own if predicted is None else predicted, classes)
    true = one_hot(y, classes)
    both = true * chosen
    wrong = true != chosen
    right = ~wrong.any(axis=1)
    if multi:
        loss = np.logaddexp(0, np.where(y, -z, z))  # (N, C)
    else:
        log_p = log_softmax(z)
        loss = -log_p[np.arange(len(z)), y]  # (N,)
        confidence = np.exp(log_p.max(axis=1))

    # Each class against the others, by what orders the rows as its probability does.
    rankers = []
    if ranking and true.any(axis=0).all():
        columns = z.T if multi else [log_odds(z, k) for k in range(classes)]
        rankers = list(map(_ranker, columns, true.T))

    def of_weights(weights):
        scores = {} if multi else {"accuracy": _mean(right, weights)}
        scores |= _f1_scores(weights @ both, weights @ chosen, weights @ true, every=multi)
        if multi:
            scores["subset_accuracy"] = _mean(right, weights)
            scores["hamming_loss"] = _mean(wrong, weights)
        scores["log_loss"] = _mean(loss, weights)
        if rankers:
            auc, precision = np.transpose([ranker(weights) for ranker in rankers])  # (C,) each
            if multi:
                scores["average_precision"] = precision.mean()
            scores["roc_auc"] = auc.mean()
        if predicted is None and not multi:
            scores["ece"] = ece(confidence, right, weights)
        return scores

    return of_weights


def _of_numbers(outputs: Array, targets: Array) -> Callable:
    """weights (N,) -> the metrics of regression, in the units of the targets."""
    error = outputs - targets
    ranker = None
    if np.isin(targets, (0, 1)).all():
        ranker = _ranker(outputs, targets)

    def of_weights(weights):
        mse = _mean(error**2, weights)
        scores = {"mse": mse, "rmse": mse**0.5, "mae": _mean(np.abs(error), weights)}
        a = _centred(outputs, weights)
        b = _centred(targets, weights)
        variation = (weights * b) @ b
        norms = np.sqrt((weights * a) @ a) * np.sqrt(variation)
        scores["pearson"] = np.clip((weights * a) @ b / norms, -1, 1)
        scores["r2"] = 1 - (weights * error) @ error / variation
        if ranker:
            scores["roc_auc"] = ranker(weights)[0]
        return scores

    return of_weights


def _centred(values: Array, weights: Array) -> Array:
    """values (N,) less their weighted mean; NaN where all are equal, which correlates with nothing."""
    if np.ptp(values[weights > 0]) == 0:
        return np.full(len(values), np.nan)
    return values - _mean(values, weights)


def _mean(values: Array, weights: Array) -> float:
    """The weighted mean of values (N,) or of cells (N, C); weights of one give the very bits of values.mean()."""
    cells = values.reshape(len(values), -1)
    total = (cells * weights[:, None]).sum()
    return float(total / (weights.sum() * cells.shape[1]))


def majority(task: str, labels: Array) -> float:
    """The majority-class baseline: the share of the largest class, the micro-F1 of the commonest label on every row,
    or the mse of the mean.
    """
    if task == "regression":
        return float(np.var(labels))
    if task == "multi_label":
        most = labels.sum(axis=0).max()
        return float(2 * most / (len(labels) + labels.sum()))
    return float(np.bincount(labels).max() / len(labels))


def better(now: float | None, best: float | None, metric: str) -> bool:
    """Whether a metric beats the best so far; the first evaluation does (None).

    A metric that the rows do not define (None), as pearson while every output is the same, counts as -1.
    """
    if best is None:
        return True
    now = -1.0 if now is None else now
    return now < best if metric in LOWER else now > best
