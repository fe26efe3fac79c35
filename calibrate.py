"""Thresholds and calibration, fitted to logits and labels that `metrics.checked` has accepted. float64, numpy only."""

import math

import numpy as np

import metrics
from metrics import Array, Scores

TASKS = ("single_label", "multi_label")
KINDS = "none global per_class given".split()  # of thresholds; given: the user's, by `Decision.with_threshold`
NEVER = 1e9  # the threshold that predicts nothing: a logit no model gives, and finite as JSON demands
LEAST = 5  # positives below which a label's own optimum is noise, and what all labels together give is taken

# ---- scores of a decision -------------------------------------------------------------------------------------------


def probabilities(task: str, logits: Array) -> Array:
    """(N, C) softmax of logits (N, C), or the sigmoid of each cell for multi_label."""
    if task == "single_label":
        return metrics.softmax(logits)
    return np.exp(metrics.log_sigmoid(logits))


def scores(
    task: str,
    logits: Array,
    predicted: Array,
    labels: Array,
) -> Scores:
    """What a decision can change: metrics of predictions and calibrated logits (N, C). f1: of class 1 of two."""
    p = probabilities(task, logits)
    score = metrics.scorer(task, logits, labels, predicted, ranking=False)(np.ones(len(labels)))
    names, sure, right = ["micro_f1", "macro_f1"], p.ravel(), labels.ravel()
    if task == "single_label":
        names = ["accuracy"]
        sure, right = p.max(axis=1), p.argmax(axis=1) == labels
        if p.shape[1] == 2:
            names.append("f1")
    score |= {"f1": score["f1"][-1], "brier": metrics.brier(p, labels), "ece": metrics.ece(sure, right)}
    return {name: float(score[name]) for name in (*names, "log_loss", "brier", "ece")}


# ---- thresholds for F1 ----------------------------------------------------------------------------------------------


def best_f1(scores: Array, targets: Array) -> float:
    """The best F1 over all cuts of scores (N,) against targets (N,) of 0 and 1; equal scores go together."""
    order = np.argsort(-scores)
    last = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # row of each distinct score
    hits = np.cumsum(targets[order])[last]
    return (2 * hits / (last + 1 + targets.sum())).max()


def fit_thresholds(log_odds: Array, targets: Array, kind: str) -> Array:
    """Thresholds (C,) on calibrated log-odds (N, C) against targets (N, C) of 0 and 1; predicted where they are above.

    Half of the best F1 that any cut reaches, as a probability: optimal where probabilities are calibrated, and less
    noisy than the place of that cut (Lipton et al. 2014, arXiv:1402.1892).
    global: the micro-F1 of all cells with one cut; per_class: each label's own F1, for labels with fewer than LEAST
    positives the global one. NEVER where nothing is positive.
    """
    best = np.full(targets.shape[1], best_f1(log_odds.ravel(), targets.ravel()))
    if kind == "per_class":
        for c in np.flatnonzero(targets.sum(axis=0) >= LEAST):
            best[c] = best_f1(log_odds[:, c], targets[:, c])
    return np.where(best > 0, np.log(np.maximum(best, 1e-300) / (2 - best)), NEVER)


# ---- calibration ----------------------------------------------------------------------------------------------------


def fit_temperature(logits: Array, labels: Array) -> float:
    """The T within 0.05 and 20 of the lowest log-loss of softmax(logits / T), for class ids (N,) (Guo et al. 2017).

    The targets are smoothed as Platt's: N rows that are all right are no proof of certainty. A row's class has the
    target (N + 1) / (N + 2), all others together have the rest. Newton on the derivative by 1 / T within a shrinking
    bracket. 1 where scores are equal within every row.
    """
    rows, classes = logits.shape
    target = (rows + 1) / (rows + 2)
    is_other = labels[:, None] != np.arange(classes)
    others = logits[is_other].reshape(rows, classes - 1)
    top = others.max(axis=1, keepdims=True)
    others = others - top
    true = logits[~is_other] - top[:, 0]
    inverse = 1.0
    low, high = 0.05, 20.0  # of 1 / T, as of T
    for _ in range(100):
        # The log-odds of a row's class against all others, and their two derivatives by 1 / T.
        powers = np.exp(others * inverse)
        total = powers.sum(axis=1)
        mean = (powers * others).sum(axis=1) / total
        spread = (powers * others**2).sum(axis=1) / total - mean**2
        log_odds = true * inverse - np.log(total)
        rise = true - mean
        p = np.exp(metrics.log_sigmoid(log_odds))
        slopes = (p - target) * rise
        slope = slopes.mean()
        curvature = p * (1 - p) * rise**2 - (p - target) * spread
        curvature = curvature.mean()
        if slope == 0:
            break
        if slope > 0:
            high = inverse
        else:
            low = inverse
        # Where Newton's step leaves the bracket, the bracket is halved.
        before = inverse
        inverse = before - slope / curvature if curvature > 0 else low
        if not low < inverse < high:
            inverse = math.sqrt(low * high)
        if abs(inverse - before) <= 1e-13 * inverse:
            break
    return float(1 / inverse)


def fit_platt(scores: Array, targets: Array) -> tuple[float, float]:
    """(a, b) of probability = sigmoid(a * score + b), for scores (N,) and targets (N,) of 0 and 1.

    Platt 1999 with his smoothed targets, by Newton with backtracking (Lin, Lin, Weng 2007); Platt's A and B are -a
    and -b. Constant scores give a = 0; absent positives or negatives a finite b, by the smoothing.
    """
    rows, positives = len(scores), targets.sum()
    negatives = rows - positives
    smoothed = np.where(targets, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    # Standardized scores, so that both numbers of the line are of one size.
    centre, scale = scores[0], 1.0
    if np.ptp(scores) > 0:
        centre, scale = scores.mean(), scores.std()
    x = np.stack([(scores - centre) / scale, np.ones(rows)])  # (2, N)

    def loss(line):
        z = line @ x
        return (np.logaddexp(0, z) - smoothed * z).mean()

    line = np.array([0.0, math.log((positives + 1) / (negatives + 1))])
    for _ in range(100):
        p = np.exp(metrics.log_sigmoid(line @ x))  # (N,)
        gradient = x @ (p - smoothed) / rows
        if np.abs(gradient).max() < 1e-11:
            break
        hessian = (x * p * (1 - p)) @ x.T / rows
        step = -np.linalg.solve(hessian + 1e-12 * np.eye(2), gradient)
        value = loss(line)
        while np.abs(step).max() > 1e-12 and loss(line + step) > value + 1e-4 * (gradient @ step):
            step /= 2
        line += step
    slope, shift = line
    return slope / scale, shift - slope * centre / scale
