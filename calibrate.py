"""Thresholds and calibration."""

import math

import numpy as np
from numpy.typing import ArrayLike

TASKS = ("single_label", "multi_label")
KINDS = ("none", "global", "per_class", "given")  # of thresholds; given: the user's, by `with_threshold`
NEVER = 1e9  # the threshold that predicts nothing: a logit no model gives, and finite as JSON demands
LEAST = 5  # positives below which a label's own optimum is noise, and what all labels together give is taken
TEMPERATURES = (0.05, 20.0)

# ---------------------------------------------------------------------------------------------------------------------
# inputs and probabilities


def _checked(task: str, logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """logits (N, C) as float64, labels (N,) or (N, C) as int64."""
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
    z, y, single = np.asarray(logits, dtype=np.float64), np.asarray(labels), task == "single_label"
    if z.ndim != 2 or not z.size or (single and z.shape[1] < 2):
        raise ValueError(f"logits: got shape {z.shape}, expected (N, C), not empty{', C >= 2' if single else ''}")
    if y.shape != (shape := z.shape[:1] if single else z.shape):
        raise ValueError(f"labels: got shape {y.shape}, expected {shape} for {task}")
    if bad := int((~np.isfinite(z)).any(axis=1).sum()):
        raise ValueError(f"logits: got {bad} of {len(z)} rows that are not finite")
    top = z.shape[1] - 1 if single else 1
    if (wrong := ~((y >= 0) & (y <= top) & (y == np.floor(y)))).any():
        raise ValueError(f"labels: got {y[wrong][0]}, expected integers from 0 to {top}")
    return z, y.astype(np.int64)


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) logits -> (N, C) probabilities in fp64, each row summing to 1."""
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def _log_softmax(z: np.ndarray) -> np.ndarray:
    """(..., C) -> (..., C); log1p over the other classes, so that probabilities near 1 stay distinct in their logs."""
    shifted = z - z.max(axis=-1, keepdims=True)
    others = np.exp(shifted)
    np.put_along_axis(others, shifted.argmax(axis=-1)[..., None], 0, axis=-1)
    return shifted - np.log1p(others.sum(axis=-1, keepdims=True))


def _log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -z)


def _probabilities(task: str, z: np.ndarray) -> np.ndarray:
    return softmax(z) if task == "single_label" else np.exp(_log_sigmoid(z))


# ---------------------------------------------------------------------------------------------------------------------
# scores of probabilities


def ece(probabilities: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error: the mean over all values of |mean outcome - mean probability| of their bin.

    probabilities of any shape, correct of 0 and 1 in the same: of single_label the top probability and whether it is
    right, of multi_label every cell and its target. Bins (i/bins, (i+1)/bins], the first with 0 (Guo et al. 2017).
    """
    p, outcome = np.ravel(probabilities).astype(np.float64), np.ravel(correct).astype(np.float64)
    index = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    return float(np.abs(np.bincount(index, weights=outcome - p)).sum() / len(p))


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Brier score (1950) of probabilities (N, C): class ids (N,): the squared errors summed over classes, from 0 to 2,
    mean over rows; 0 and 1 in the shape of the probabilities: mean over cells, from 0 to 1."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p.shape == y.shape:
        return float(((p - y) ** 2).mean())
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1).mean())


def _f1(predicted: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """micro-F1 and macro-F1 over all labels of (N, C) 0/1; 0 for a label neither true nor predicted."""
    hits, sizes = (predicted * true).sum(axis=0), predicted.sum(axis=0) + true.sum(axis=0)
    return float(2 * hits.sum() / max(1, sizes.sum())), float((2 * hits / np.maximum(sizes, 1)).mean())


def _scores(task: str, z: np.ndarray, predictions: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Of predictions and calibrated logits (N, C). log_loss in nats per row, or per cell of multi_label."""
    p = _probabilities(task, z)
    if task == "multi_label":
        log_p, calibration = _log_sigmoid(np.where(y, z, -z)), ece(p, y)
        scores = dict(zip(("micro_f1", "macro_f1"), _f1(predictions, y), strict=True))
    else:
        log_p, calibration = _log_softmax(z)[np.arange(len(y)), y], ece(p.max(axis=1), p.argmax(axis=1) == y)
        scores = {"accuracy": float((predictions == y).mean())}
        scores |= {"f1": _f1(predictions[:, None], y[:, None])[0]} if z.shape[1] == 2 else {}
    return scores | {"log_loss": float(-log_p.mean()), "brier": brier(p, y), "ece": calibration}


# ---------------------------------------------------------------------------------------------------------------------
# thresholds for F1


def f1_threshold(scores: ArrayLike, targets: ArrayLike) -> tuple[float, float]:
    """(threshold, F1) of the best F1 over all cuts of scores (N,) against targets (N,) of 0 and 1: score > threshold.

    Exact: every distinct score is tried, equal scores go together; of equally good cuts the highest is taken. The cut
    lies midway between the neighbouring scores, one below the lowest where all rows are predicted. Without a positive:
    (NEVER, 0.0).
    """
    z, y = _checked("multi_label", np.asarray(scores)[..., None], np.asarray(targets)[..., None])
    if not y.any():
        return NEVER, 0.0
    order = np.argsort(-z[:, 0])
    z, y = z[order, 0], y[order, 0]  # from the highest score down
    last = np.append(np.flatnonzero(np.diff(z)), len(z) - 1)  # last row of each distinct score
    f1 = 2 * np.cumsum(y)[last] / (last + 1 + y.sum())
    best = int(f1.argmax())
    high = z[last[best]]
    low = z[last[best] + 1] if best + 1 < len(last) else min(high - 2, np.nextafter(high, -np.inf))
    middle = low / 2 + high / 2
    return float(middle if low <= middle < high else low), float(f1[best])  # adjacent floats have nothing between


def fit_thresholds(log_odds: ArrayLike, targets: ArrayLike, kind: str, least: int = LEAST) -> np.ndarray:
    """Thresholds (C,) on calibrated log-odds (N, C) against targets (N, C) of 0 and 1; predicted where they are above.

    none: 0, a probability of 0.5. Else half of the best F1 that any cut reaches, as a probability: optimal where
    probabilities are calibrated, and less noisy than the place of that cut (Lipton et al. 2014, arXiv:1402.1892).
    global: the micro-F1 of all cells with one cut; per_class: each label's own F1, for labels with fewer than `least`
    positives the global one. NEVER where nothing is positive.
    """
    z, y = _checked("multi_label", log_odds, targets)
    if kind not in KINDS[:3]:
        raise ValueError(f"thresholds: got {kind!r}, expected one of {', '.join(KINDS[:3])}")
    if kind == "none":
        return np.zeros(z.shape[1])
    own = (y.sum(axis=0) >= least) & (kind == "per_class")
    shared = f1_threshold(z.ravel(), y.ravel())[1]
    best = np.array([f1_threshold(z[:, c], y[:, c])[1] if own[c] else shared for c in range(z.shape[1])])
    return np.where(best > 0, np.log(np.maximum(best, 1e-300) / (2 - best)), NEVER)


# ---------------------------------------------------------------------------------------------------------------------
# calibration


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The T within 0.05 and 20 of the lowest log-loss of softmax(logits / T) (Guo et al. 2017).

    Convex in 1 / T: Newton on the derivative within a shrinking bracket. 1 where scores are equal within every row.
    """
    z, y = _checked("single_label", logits, labels)
    z = z - z.max(axis=1, keepdims=True)
    inverse, low, high = 1.0, 1 / TEMPERATURES[1], 1 / TEMPERATURES[0]
    for _ in range(100):
        p = softmax(z * inverse)
        mean = (p * z).sum(axis=1)
        first, second = (mean - z[np.arange(len(z)), y]).mean(), ((p * z * z).sum(axis=1) - mean**2).mean()
        if first == 0:
            break
        low, high = (low, inverse) if first > 0 else (inverse, high)
        step = inverse - first / second if second > 0 else low
        before, inverse = inverse, step if low < step < high else math.sqrt(low * high)
        if abs(inverse - before) <= 1e-13 * inverse:
            break
    return float(1 / inverse)


def fit_platt(scores: ArrayLike, targets: ArrayLike) -> tuple[float, float]:
    """(a, b) of probability = sigmoid(a * score + b), for scores (N,) and targets (N,) of 0 and 1.

    Platt 1999 with his smoothed targets, by Newton with backtracking (Lin, Lin, Weng 2007); Platt's A and B are -a
    and -b. Constant scores give a = 0; absent positives or negatives a finite b, by the smoothing.
    """
    z, y = _checked("multi_label", np.asarray(scores)[..., None], np.asarray(targets)[..., None])
    z, y, positives = z[:, 0], y[:, 0], int(y.sum())
    soft = np.where(y, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))
    centre, scale = (z.mean(), z.std()) if np.ptp(z) > 0 else (z[0], 1.0)
    x = np.stack([(z - centre) / scale, np.ones(len(z))])  # (2, N)

    def loss(line: np.ndarray) -> float:
        return float((np.logaddexp(0, line @ x) - soft * (line @ x)).mean())

    line = np.array([0.0, math.log((positives + 1) / (len(y) - positives + 1))])
    for _ in range(100):
        p = np.exp(_log_sigmoid(line @ x))
        gradient = x @ (p - soft) / len(y)
        if np.abs(gradient).max() < 1e-11:
            break
        hessian = (x * p * (1 - p)) @ x.T / len(y) + 1e-12 * np.eye(2)
        move, value = -np.linalg.solve(hessian, gradient), loss(line)
        while loss(line + move) > value + 1e-4 * (gradient @ move) and np.abs(move).max() > 1e-12:
            move = move / 2
        line = line + move
    return float(line[0] / scale), float(line[1] - line[0] * centre / scale)
