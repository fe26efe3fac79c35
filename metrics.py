"""Metrics of text classifiers, from logits, in float64. numpy only; scikit-learn is the reference in the tests.

Call these on the gathered rows of the whole evaluation set: F1 and AUC of batches do not average to that of the set.
A metric that the rows cannot define (AUC with one class, r2 of constant targets) is absent from the returned dict,
never NaN; the plain functions raise ValueError instead.

    scores = classification(logits, labels)                  # {"accuracy": 0.87, "micro_f1": 0.87, "macro_f1": ...}
    print(table(confusion_matrix(labels, logits.argmax(1), 8), names))
    low, high = bootstrap_interval(lambda i: float((predictions[i] == labels[i]).mean()), rows=len(labels))
"""

from collections.abc import Callable, Sequence

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


def summary(task: str, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """The scores as a person reads them: a table over classes, or a line."""
    if task == "regression":
        return ", ".join(f"{k} {v:.4f}" for k, v in of_task(task, logits, labels).items() if k != "rows")
    if task == "multi_label":
        return label_table(logits, labels, list(names))
    return table(confusion_matrix(labels, logits.argmax(axis=1), len(names)), list(names))


def label_table(logits: np.ndarray, targets: np.ndarray, names: Sequence[str], most: int = 100) -> str:
    """Precision, recall, F1, average precision and support of each label at probability 0.5; the commonest if many."""
    true, predicted = np.asarray(targets).astype(bool), np.asarray(logits) > 0
    scores = _from_counts((true & predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0))
    left = max(8, *(len(_clip(name, 60)) for name in names))
    lines = [f"{'':<{left}} {'precision':>9} {'recall':>7} {'f1':>7} {'ap':>7} {'support':>9}"]
    order = np.argsort(-scores["support"], kind="stable")
    for k in sorted(order[:most]):
        ap = f"{average_precision(logits[:, k], true[:, k]):7.4f}" if true[:, k].any() else f"{'-':>7}"
        p, r, f1 = (scores[name][k] for name in ("precision", "recall", "f1"))
        lines.append(f"{_clip(names[k], 60):<{left}} {p:9.4f} {r:7.4f} {f1:7.4f} {ap} {scores['support'][k]:9d}")
    return "\n".join(lines + ([f"({len(names) - most} rarer labels are not shown)"] if len(names) > most else []))


# ---------------------------------------------------------------------------------------------------------------------
# uncertainty and print


def bootstrap_interval(
    statistic: Callable[[np.ndarray], float], rows: int, samples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of statistic(indices (rows,)), drawn with replacement (Efron 1979).

    Resamples on which the statistic raises ValueError or is not finite (AUC of one class) are left out. ValueError
    when that is more than half of them, when the full set itself raises, or on arguments out of range.
    """
    if rows < 1 or samples < 1 or not 0 < level < 1:
        raise ValueError(f"got rows {rows}, samples {samples}, level {level}; expected 1 or more, 1 or more, in (0, 1)")
    statistic(np.arange(rows))  # a mistake in the statistic shows here, not as a left-out resample
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(samples):
        indices = generator.integers(rows, size=rows)
        try:
            values.append(float(statistic(indices)))
        except ValueError:
            continue
    values = [value for value in values if np.isfinite(value)]
    if 2 * len(values) < samples:
        raise ValueError(f"got {len(values)} of {samples} resamples with a defined statistic, expected half or more")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(
    task: str, logits: np.ndarray, labels: np.ndarray, names: Sequence[str], samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95% percentile bootstrap intervals over rows of the named metrics of a task, all from the same resamples.

    A metric that less than half of the resamples define is left out.
    """
    generator, found = np.random.default_rng(seed), {name: [] for name in names}
    for _ in range(samples):
        rows = generator.integers(len(labels), size=len(labels))
        scores = of_task(task, logits[rows], labels[rows], ranking=bool(set(RANKING) & set(names)))
        for name in found.keys() & scores.keys():
            found[name].append(scores[name])
    kept = {name: values for name, values in found.items() if 2 * len(values) >= samples}
    return {name: tuple(np.quantile(values, [0.025, 0.975]).tolist()) for name, values in kept.items()}


def _clip(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "."


def table(confusion: ArrayLike, names: Sequence[str], width: int = 100) -> str:
    """Text for the end of a run: precision, recall, F1, support per class, then the confusion matrix (C, C).

    Names are shortened so that lines keep within `width` columns; a matrix that cannot is left out, and the text says
    so. The macro line is over the classes that occur. ValueError when names and matrix differ in length.
    """
    scores, counts = per_class(confusion), np.asarray(confusion)
    if len(names) != len(counts):
        raise ValueError(f"names: got {len(names)}, expected {len(counts)}, one per row of the confusion matrix")
    classes = len(names)
    labels = [f"{k} {name}" for k, name in enumerate(names)]

    left = max(len("weighted"), *(len(_clip(label, width - 40)) for label in labels))
    lines = [f"{'':<{left}} {'precision':>9} {'recall':>7} {'f1':>7} {'support':>9}"]
    columns = np.stack([scores[name] for name in ("precision", "recall", "f1")], axis=1)  # (C, 3)
    support, occurs = scores["support"], counts.sum(axis=0) + scores["support"] > 0
    macro = columns[occurs].mean(axis=0) if occurs.any() else np.zeros(3)
    weighted = _ratio(columns.T @ support, np.full(3, support.sum()))
    for label, values, number in [
        *zip(labels, columns, support, strict=True),
        ("macro", macro, support.sum()),
        ("weighted", weighted, support.sum()),
    ]:
        precision, recall, f1 = values
        lines.append(f"{_clip(label, left):<{left}} {precision:9.4f} {recall:7.4f} {f1:7.4f} {number:9d}")

    left = max(len(_clip(label, max(20, width // 5))) for label in labels)
    room = (width - left) // classes - 1  # characters for one cell
    least = max(len(str(counts.max())), len(str(classes - 1)))
    if room < least:
        return "\n".join([*lines, "", f"confusion matrix: {classes} classes do not fit {width} columns"])
    cell = max(least, min(room, max(len(label) for label in labels)))
    heads = [_clip(label, cell) if cell >= min(6, len(label)) else str(k) for k, label in enumerate(labels)]
    lines += ["", "rows: true class, columns: predicted class"]
    lines.append(" " * left + "".join(f" {head:>{cell}}" for head in heads))
    for label, row in zip(labels, counts, strict=True):
        lines.append(f"{_clip(label, left):<{left}}" + "".join(f" {count:>{cell}d}" for count in row))
    return "\n".join(lines)
