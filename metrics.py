"""Metrics of text classifiers, from logits, in float64. numpy only; scikit-learn is the reference in the tests.

Call these on the gathered rows of the whole evaluation set: F1 and AUC of batches do not average to that of the set.
A metric that the rows cannot define (AUC with one class, r2 of constant targets) is absent from the returned dict,
never NaN; the plain functions raise ValueError instead.

    scores = classification(logits, labels)                  # {"accuracy": 0.87, "micro_f1": 0.87, "macro_f1": ...}
    print(table(confusion_matrix(labels, logits.argmax(1), 8), names))
    low, high = bootstrap_interval(lambda i: float((predictions[i] == labels[i]).mean()), rows=len(labels))
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

# ---------------------------------------------------------------------------------------------------------------------
# inputs


def _finite(name: str, values: ArrayLike, ndim: int, half: bool = True) -> np.ndarray:
    """`values` as float64; ValueError when empty, of another rank, not finite or (where `half` is False) float16."""
    array = np.asarray(values)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}, expected a non-empty array of {ndim} dimension(s)")
    if array.dtype == np.float16 and not half:
        raise ValueError(f"{name}: got float16, expected float32 or float64: compute the head in float32")
    array = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))
    if len(bad):
        raise ValueError(f"{name}: got {len(bad)} of {len(array)} rows that are not finite, the first is row {bad[0]}")
    return array


def _class_ids(name: str, values: ArrayLike, classes: int) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name}: got shape {array.shape}, expected a non-empty array of 1 dimension")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: got dtype {array.dtype}, expected integers from 0 to {classes - 1}")
    bad = np.flatnonzero((array < 0) | (array >= classes))
    if len(bad):
        raise ValueError(f"{name}: got {array[bad[0]]} in row {bad[0]}, expected integers from 0 to {classes - 1}")
    return array.astype(np.int64)


def _zero_one(name: str, values: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {array.shape}, expected {shape}")
    bad = np.argwhere((array != 0) & (array != 1))
    if len(bad):
        raise ValueError(f"{name}: got {array[tuple(bad[0])]} in row {bad[0][0]}, expected only 0 and 1")
    return array.astype(bool)


def _same_length(a: str, first: np.ndarray, b: str, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise ValueError(f"{b}: got {len(second)} rows, expected {len(first)}, as {a} has")


# ---------------------------------------------------------------------------------------------------------------------
# counts: precision, recall, F1


def confusion_matrix(labels: ArrayLike, predictions: ArrayLike, classes: int) -> np.ndarray:
    """Counts (C, C) int64 of labels (N,) by predictions (N,): rows are the true class, columns the predicted one.

    ValueError on empty input, unequal lengths, or class ids outside 0..classes-1.
    """
    true, predicted = _class_ids("labels", labels, classes), _class_ids("predictions", predictions, classes)
    _same_length("labels", true, "predictions", predicted)
    return np.bincount(true * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)  # x / 0 -> 0


def _from_counts(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, predicted + support),
        "support": support,
    }


def _f1_averages(hits: np.ndarray, predicted: np.ndarray, support: np.ndarray) -> dict[str, float]:
    f1 = _from_counts(hits, predicted, support)["f1"]
    return {
        "micro_f1": float(_ratio(2 * hits.sum(), predicted.sum() + support.sum())),
        "macro_f1": float(f1.mean()),
        "weighted_f1": float(_ratio((f1 * support).sum(), support.sum())),
    }


def per_class(confusion: ArrayLike) -> dict[str, np.ndarray]:
    """precision, recall, f1 (C,) float64 and support (C,) int64 (true rows) of a confusion matrix (C, C).

    A division by zero gives 0 (scikit-learn's zero_division=0). ValueError when the matrix is not square.
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(f"confusion: got shape {counts.shape}, expected (C, C)")
    return _from_counts(np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))


# ---------------------------------------------------------------------------------------------------------------------
# ranking: AUC, average precision


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Area under the ROC curve of scores (N,), higher is more positive, against labels (N,) of 0 and 1.

    Mann-Whitney's U over midranks (Hanley and McNeil 1982): a tie between a positive and a negative counts one half.
    Pass logits or log-odds: half-precision probabilities round to ties. ValueError when only one class occurs.
    """
    score = _finite("scores", scores, 1)
    positive = _zero_one("labels", labels, score.shape)
    positives = int(positive.sum())
    negatives = len(score) - positives
    if positives == 0 or negatives == 0:
        raise ValueError(f"labels: got {positives} positives and {negatives} negatives, AUC needs at least one of each")
    _, group, size = np.unique(score, return_inverse=True, return_counts=True)
    midrank = (np.cumsum(size) - (size - 1) / 2)[group]  # from 1; equal scores share their mean rank
    return float((midrank[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float:
    """Average precision sum_k (R_k - R_{k-1}) P_k of scores (N,) against labels (N,) of 0 and 1, no interpolation.

    k runs over the distinct scores, as scikit-learn's average_precision_score: equal scores enter together.
    ValueError when no label is 1 (scikit-learn warns and returns 0).
    """
    score = _finite("scores", scores, 1)
    positive = _zero_one("labels", labels, score.shape)
    if not positive.any():
        raise ValueError(f"labels: got no 1 in {len(score)} rows, average precision needs at least one positive")
    order = np.argsort(-score, kind="stable")
    last = np.append(np.flatnonzero(np.diff(score[order])), len(score) - 1)  # last row of each distinct score
    hits = np.cumsum(positive[order])[last]
    return float((np.diff(hits, prepend=0) / hits[-1] * (hits / (last + 1))).sum())


# ---------------------------------------------------------------------------------------------------------------------
# the three tasks


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _log_odds(logits: np.ndarray, k: int) -> np.ndarray:
    """log p_k - log(1 - p_k) (N,): orders rows as p_k does, but never saturates at 1. z_1 - z_0 for two classes."""
    others = np.delete(logits, k, axis=1)
    top = others.max(axis=1, keepdims=True)
    return logits[:, k] - top[:, 0] - np.log(np.exp(others - top).sum(axis=1))


RANKING = ("roc_auc", "average_precision")  # those that sort all rows


def classification(logits: ArrayLike, labels: ArrayLike, ranking: bool = True) -> dict[str, float]:
    """Metrics of logits (N, C) float32 or float64, C >= 2, against labels (N,) int; the prediction is the first argmax.

    accuracy, weighted_f1, rows: as named. micro_f1: from the summed counts; equal to accuracy when each row has one
    label. macro_f1: mean over the classes that occur in labels or predictions (scikit-learn's default). log_loss:
    nats per row. roc_auc: for two classes on z_1 - z_0; for more, one-vs-rest macro mean, absent unless every class
    occurs. ece: expected calibration error of the top probability, 15 bins (i/15, (i+1)/15] (Guo et al. 2017).
    ranking: whether roc_auc is wanted.
    ValueError on empty, float16 or non-finite logits, unequal lengths, labels outside 0..C-1.
    """
    z = _finite("logits", logits, 2, half=False)
    rows, classes = z.shape
    if classes < 2:
        raise ValueError(
            f"logits: got {classes} column, expected 2 or more; one output is for regression or multilabel"
        )
    true = _class_ids("labels", labels, classes)
    _same_length("logits", z, "labels", true)
    predicted = z.argmax(axis=1)
    confusion = confusion_matrix(true, predicted, classes)
    hits, columns, support = np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1)
    occurs = columns + support > 0
    log_p = _log_softmax(z)  # (N, C)

    correct, confidence = predicted == true, np.exp(log_p.max(axis=1))
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=15)  # per bin: rows * (accuracy - confidence)

    scores = {"accuracy": float(correct.mean())}
    scores |= _f1_averages(hits[occurs], columns[occurs], support[occurs])
    scores["log_loss"] = float(-log_p[np.arange(rows), true].mean())
    if ranking and (support > 0).all():
        one_vs_rest = [1] if classes == 2 else range(classes)
        scores["roc_auc"] = float(np.mean([roc_auc(_log_odds(z, k), true == k) for k in one_vs_rest]))
    return scores | {"ece": float(np.abs(gaps).sum() / rows), "rows": rows}


def multilabel(
    logits: ArrayLike, targets: ArrayLike, threshold: ArrayLike = 0.0, ranking: bool = True
) -> dict[str, float]:
    """Metrics of logits (N, C) against targets (N, C) of 0 and 1; a label is predicted where its logit > threshold.

    threshold: a logit (0 is probability 0.5), or (C,) one per label. micro_f1, macro_f1 (over all C labels),
    weighted_f1, subset_accuracy (all labels of a row right), hamming_loss (share of wrong cells), log_loss (nats per
    cell), rows; roc_auc and average_precision are macro means, absent unless every label has a positive (and, for
    roc_auc, a negative) row, or where ranking is False. ValueError on empty, float16 or non-finite logits, other
    shapes, other targets.
    """
    z = _finite("logits", logits, 2, half=False)
    true = _zero_one("targets", targets, z.shape)
    cut = np.asarray(threshold, dtype=np.float64)
    if cut.shape not in ((), (z.shape[1],)) or np.isnan(cut).any():
        raise ValueError(f"threshold: got {threshold!r}, expected one logit or {z.shape[1]}, one per label")
    predicted = z > cut
    scores = _f1_averages((true & predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0))
    scores["subset_accuracy"] = float((predicted == true).all(axis=1).mean())
    scores["hamming_loss"] = float((predicted != true).mean())
    scores["log_loss"] = float(np.logaddexp(0, np.where(true, -z, z)).mean())
    if ranking and true.any(axis=0).all():
        columns = list(zip(z.T, true.T, strict=True))
        scores["average_precision"] = float(np.mean([average_precision(*column) for column in columns]))
        if not true.all(axis=0).any():
            scores["roc_auc"] = float(np.mean([roc_auc(*column) for column in columns]))
    return scores | {"rows": len(z)}


def regression(outputs: ArrayLike, targets: ArrayLike) -> dict[str, float]:
    """mse, rmse, mae, pearson, r2, rows of outputs (N,) against targets (N,), in the units of the targets.

    pearson is absent when either side is constant, r2 when the targets are. roc_auc is added when the targets are 0
    and 1 and both occur. ValueError on empty, float16 or non-finite input and unequal lengths.
    """
    out, true = _finite("outputs", outputs, 1, half=False), _finite("targets", targets, 1)
    _same_length("outputs", out, "targets", true)
    error = out - true
    mse = float(np.mean(error**2))
    scores = {"mse": mse, "rmse": mse**0.5, "mae": float(np.abs(error).mean())}
    if np.ptp(true) > 0:
        a, b = out - out.mean(), true - true.mean()
        if np.ptp(out) > 0:
            scores["pearson"] = float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))
        scores["r2"] = float(1 - (error @ error) / (b @ b))
        if np.isin(true, (0, 1)).all():
            scores["roc_auc"] = roc_auc(out, true)
    return scores | {"rows": len(out)}


def of_task(task: str, logits: ArrayLike, labels: ArrayLike, ranking: bool = True) -> dict[str, float]:
    """The metrics of a task: `regression` of its one column of logits, `multilabel`, or `classification`."""
    if task == "regression":
        return regression(np.asarray(logits)[:, 0], labels)
    scores = multilabel if task == "multi_label" else classification
    return scores(logits, labels, ranking=ranking)


def majority(task: str, labels: np.ndarray) -> float:
    """What knowing nothing reaches: the share of the largest class, the micro-F1 of the commonest label on every row,
    or the mse of the mean.
    """
    if task == "regression":
        return float(np.var(labels))
    if task == "multi_label":
        return float(2 * labels.sum(axis=0).max() / (len(labels) + labels.sum()))
    return float(np.bincount(labels).max() / len(labels))


LOWER = ("log_loss", "hamming_loss", "mse", "rmse", "mae")  # metrics of which less is better


def one_hot(values: np.ndarray, classes: int) -> np.ndarray:
    """(N, C) of 0 and 1, from class ids or from the same."""
    return values.astype(np.float64) if values.ndim == 2 else np.eye(classes)[values]


def scorer(task: str, logits: np.ndarray, targets: np.ndarray, predicted: np.ndarray, ranking: bool) -> Callable:
    """weights (S, N) -> {name: (S,)} of metrics.of_task, and "f1" (S, C), as sums over weighted rows.

    predicted takes the place of argmax or probability 0.5. ranking: with roc_auc and average_precision. NaN where the
    weighted rows do not define a metric. Without ece: resampling adds noise to its bins, which alone makes it larger.
    """
    z, multi = logits.astype(np.float64), task == "multi_label"
    if task == "regression":
        return _number_scorer(z[:, 0], targets.astype(np.float64))
    true, chosen = one_hot(targets, z.shape[1]), one_hot(predicted, z.shape[1])
    counts, wrong = np.hstack([true * chosen, chosen, true]), true != chosen
    right = ~wrong.any(axis=1)
    if multi:
        sums = {"subset_accuracy": right, "hamming_loss": wrong.mean(axis=1)}
        sums["log_loss"] = np.logaddexp(0, np.where(true > 0, -z, z)).mean(axis=1)
        ranked = zip(z.T, true.T, strict=True)
    else:
        sums = {"accuracy": right, "log_loss": np.logaddexp.reduce(z, axis=1) - (z * true).sum(axis=1)}
        some = [1] if z.shape[1] == 2 else range(z.shape[1])
        ranked = [(_log_odds(z, k), true[:, k]) for k in some]
    columns = np.stack(list(sums.values()), axis=1).astype(np.float64)
    areas = [_ranking_scorer(*pair) for pair in ranked] if ranking else []

    def score(w: np.ndarray) -> dict[str, np.ndarray]:
        hits, said, support = np.moveaxis((w @ counts).reshape(len(w), 3, -1), 1, 0)  # (S, C) each
        f1, occurs = 2 * hits / np.maximum(said + support, 1), np.maximum(multi, said + support > 0)
        found = {"f1": f1, "micro_f1": 2 * hits.sum(axis=1) / np.maximum((said + support).sum(axis=1), 1)}
        found["macro_f1"] = (f1 * occurs).sum(axis=1) / occurs.sum(axis=1)
        found["weighted_f1"] = (f1 * support).sum(axis=1) / np.maximum(support.sum(axis=1), 1)
        found |= dict(zip(sums, (w @ columns / w.sum(axis=1, keepdims=True)).T, strict=True))
        means = np.mean([area(w) for area in areas], axis=0) if areas else []  # NaN where one of them is
        return found | dict(zip(("roc_auc", "average_precision")[: 1 + multi], means, strict=False))

    return score


def _ranking_scorer(scores: np.ndarray, positive: np.ndarray) -> Callable:
    """weights (S, N) -> (2, S): metrics.roc_auc and average_precision of scores (N,); NaN for one class alone."""
    order = np.argsort(-scores, kind="stable")
    first = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))  # of each distinct score

    def score(w: np.ndarray) -> np.ndarray:
        some, every = (np.add.reduceat(v[:, order], first, axis=1) for v in (w * positive, w))
        hits, seen = some.cumsum(axis=1), every.cumsum(axis=1)
        with np.errstate(invalid="ignore"):
            auc = ((every - some) * (hits - some / 2)).sum(axis=1) / (hits[:, -1] * (seen - hits)[:, -1])
            return np.stack([auc, (some * hits / np.maximum(seen, 1)).sum(axis=1) / hits[:, -1]])

    return score


def _number_scorer(outputs: np.ndarray, targets: np.ndarray) -> Callable:
    """The same of metrics.regression."""
    error, a, b = outputs - targets, outputs - outputs.mean(), targets - targets.mean()
    columns = np.stack([error**2, np.abs(error), a, b, a * a, b * b, a * b], axis=1)
    area = _ranking_scorer(outputs, targets) if np.isin(targets, (0, 1)).all() else None

    def score(w: np.ndarray) -> dict[str, np.ndarray]:
        mse, mae, a1, b1, a2, b2, ab = (w @ columns / w.sum(axis=1, keepdims=True)).T
        of_a, of_b = (np.where(v > 1e-12 * m, v, np.nan) for v, m in ((a2 - a1**2, a2), (b2 - b1**2, b2)))  # variances
        pearson = np.clip((ab - a1 * b1) / np.sqrt(of_a * of_b), -1, 1)
        found = {"mse": mse, "rmse": np.sqrt(mse), "mae": mae, "pearson": pearson, "r2": 1 - mse / of_b}
        return found | ({"roc_auc": area(w)[0]} if area else {})

    return score


def better(now, best: float | None, metric: str) -> bool:  # scaffold: the `numbers` helper has it
    """Whether a score beats the best so far; losses and errors are the smaller the better."""
    now = -1.0 if now is None else now
    return best is None or (now < best if metric in ("log_loss", "hamming_loss", "mse", "rmse", "mae") else now > best)
