"""From logits to decisions: class weights, thresholds, calibration, ensembles. float64, numpy only.

Everything is fitted from the logits (N, C) and labels it is given, which are those of validation or out-of-fold rows.
Labels are class ids (N,) for single_label and 0 and 1 (N, C) for multi_label. Bad input raises ValueError.

    decision = fit_decision("multi_label", logits, targets)
    predictions, probabilities = apply(decision, test_logits)
    both = ensemble([a, b], "weighted", fit_weights([a, b], targets, "multi_label"), "multi_label")
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike

TASKS = ("single_label", "multi_label")
KINDS = ("none", "global", "per_class", "given")  # of thresholds; given: the user's, by `with_threshold`
ENSEMBLES = ("mean_logit", "mean_prob", "rank", "weighted")
NEVER = 1e9  # the threshold that predicts nothing: a logit no model gives, and finite as JSON demands
LEAST = 5  # positives below which a label's own optimum is noise, and what all labels together give is taken
POS_WEIGHT_CAP = 20.0  # a rarer label would rule the gradient by a few rows
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
# weights of the loss


def class_weights(setting: str, counts: np.ndarray) -> np.ndarray | None:
    """The weights (C,) of `--class_weights` from counts (C,) of training rows per class; None for "none".

    balanced (or inverse): N / (C * count). effective or effective:BETA: (1 - BETA) / (1 - BETA^count), BETA 0.999
    (Cui et al. 2019, arXiv:1901.05555). Both have mean 1 over rows. Otherwise C numbers, as given.
    ValueError when these are not C numbers, or BETA is not in [0, 1).
    """
    if setting == "none":
        return None
    present = np.maximum(counts, 1).astype(np.float64)
    if setting in ("balanced", "inverse"):
        return counts.sum() / (len(counts) * present)
    name, _, given = setting.partition(":")
    if name == "effective":
        if not 0 <= (beta := float(given or 0.999)) < 1:
            raise ValueError(f"--class_weights {setting}: expected effective:BETA, BETA from 0 to below 1, like 0.999")
        weights = (1 - beta) / (1 - beta**present)
        return weights * counts.sum() / (weights @ counts)
    weights = np.array([float(w) for w in setting.split(",")])
    if len(weights) != len(counts):
        raise ValueError(f"--class_weights has {len(weights)} numbers, expected one for each of {len(counts)} classes")
    return weights


def pos_weight(setting: str, positives: np.ndarray, rows: int) -> np.ndarray | None:
    """The weights (C,) of `--pos_weight`, of each label's positive part of the BCE; None for "none".

    balanced: negatives / positives, kept within 1/20 and 20, and 1 for a label without a positive row. Otherwise one
    number for all, or C. positives (C,): rows that have the label. ValueError on other counts of numbers.
    """
    if setting == "none":
        return None
    if setting != "balanced":
        weights = np.array([float(w) for w in setting.split(",")])
        if len(weights) not in (1, len(positives)):
            raise ValueError(
                f"--pos_weight has {len(weights)} numbers, expected 1 or {len(positives)}, one for each label"
            )
        return np.ones(len(positives)) * weights
    ratio = (rows - positives) / np.maximum(positives, 1)
    return np.where(positives > 0, np.clip(ratio, 1 / POS_WEIGHT_CAP, POS_WEIGHT_CAP), 1.0)


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


# ---------------------------------------------------------------------------------------------------------------------
# the decision of a run


@dataclass(frozen=True)
class Decision:
    """How logits become predictions and probabilities; made by `fit_decision`, kept in the run as JSON.

    multi_label: a threshold and a Platt line per label, on the logits. Two classes: one line and at most one threshold,
    on z1 - z0. More classes: argmax and the temperature.
    """

    task: str
    classes: int
    kind: str  # of the thresholds, one of KINDS
    thresholds: list[float]
    temperature: float
    platt: list[list[float]]  # [a, b]: probability = sigmoid(a * z + b)
    fitted_on: str  # which rows, in words
    rows: int  # how many
    scores: dict[str, dict[str, float]]  # before and after, on those same rows, where the thresholds look too good

    def __post_init__(self):
        lines = self.classes if self.task == "multi_label" else int(self.classes == 2)
        cuts = lines if self.task == "multi_label" or self.thresholds else 0
        numbers = [self.temperature, *self.thresholds, *(v for pair in self.platt for v in pair)]
        numbers += [v for scores in self.scores.values() for v in scores.values()]
        for name, holds, expected in (
            ("task", self.task in TASKS, f"one of {', '.join(TASKS)}"),
            ("kind", self.kind in KINDS, f"one of {', '.join(KINDS)}"),
            ("classes", type(self.classes) is int and self.classes > 0, "a count"),
            ("rows", type(self.rows) is int and self.rows > 0, "a count"),
            ("fitted_on", type(self.fitted_on) is str, "text"),
            ("thresholds", len(self.thresholds) == cuts, f"{cuts} numbers"),
            ("platt", [len(p) for p in self.platt] == [2] * lines, f"{lines} pairs [a, b]"),
            ("scores", set(self.scores) == {"before", "after"}, "before and after"),
            ("values", all(type(v) in (int, float) and math.isfinite(v) for v in numbers), "finite numbers"),
            ("platt", all(pair[0] > 0 for pair in self.platt if pair), "a > 0 in each [a, b]"),
            ("temperature", self.temperature > 0, "a number above 0"),
        ):
            if not holds:
                raise ValueError(f"decision: {name}: got {getattr(self, name, numbers)!r:.200}, expected {expected}")

    def to_json(self) -> str:
        """One field a line."""
        lines = [f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in asdict(self).items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Decision":
        """The decision of `to_json`; ValueError on anything else."""
        values, names = json.loads(text), {field.name for field in fields(cls)}
        if odd := names ^ set(values) if isinstance(values, dict) else {type(values).__name__}:
            raise ValueError(f"decision: missing or unknown {sorted(odd)}, expected the keys {sorted(names)}")
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:  # a list where a number belongs, and the like
            raise ValueError(f"decision: a value of the wrong type: {error}") from None

    def with_threshold(self, probability: float) -> "Decision":
        """The same with one threshold on the calibrated probability, that of class 1 where there are two classes."""
        if not 0 < probability < 1 or not self.platt:
            expected = "a probability in (0, 1)" if self.platt else f"none: argmax decides {self.classes} classes"
            raise ValueError(f"threshold: got {probability}, expected {expected}")
        log_odds = math.log(probability / (1 - probability))
        return replace(self, kind="given", thresholds=[(log_odds - b) / a for a, b in self.platt])


def plain(task: str, classes: int) -> Decision:
    """Argmax, or probability 0.5 for each label, and probabilities as they are."""
    lines = classes if task == "multi_label" else int(classes == 2)
    cuts = [0.0] * classes if task == "multi_label" else []
    return Decision(task, classes, "none", cuts, 1.0, [[1.0, 0.0]] * lines, "nothing", 1, {"before": {}, "after": {}})


def _margin(task: str, z: np.ndarray) -> np.ndarray:
    """What thresholds and Platt's lines act on: z1 - z0 (N, 1) of two single-label classes, else the logits."""
    return z[:, 1:] - z[:, :1] if task == "single_label" and z.shape[1] == 2 else z


def _decide(decision: Decision, logits: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Predictions and calibrated logits (N, C)."""
    z = np.asarray(logits, dtype=np.float64)
    if z.ndim != 2 or z.shape[1] != decision.classes:
        raise ValueError(f"logits: got shape {z.shape}, expected (N, {decision.classes}) as the decision was fitted on")
    margin = _margin(decision.task, z)
    predicted = (margin > decision.thresholds).astype(np.int64) if decision.thresholds else z.argmax(axis=1)
    line = margin * [a for a, _ in decision.platt] + [b for _, b in decision.platt] if decision.platt else z
    if decision.task == "multi_label":
        return predicted, line
    return predicted.reshape(len(z)), np.hstack([0 * line, line]) if decision.platt else z / decision.temperature


def apply(decision: Decision, logits: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, probabilities (N, C)) of logits (N, C). multi_label: 0 and 1 (N, C), 1 where logit > threshold.
    single_label: class ids (N,): the argmax, which calibration leaves as it is, or whether z1 - z0 > threshold."""
    predicted, z = _decide(decision, logits)
    return predicted, _probabilities(decision.task, z)


def calibrated(logits: ArrayLike, decision: Decision) -> np.ndarray:
    """The probabilities (N, C) of `apply`: rows sum to 1 for single_label, cells stand alone for multi_label."""
    return apply(decision, logits)[1]


def fit_decision(
    task: str, logits: ArrayLike, labels: ArrayLike, kind: str = "per_class", fitted_on: str = "validation"
) -> Decision:
    """Thresholds and calibration from logits (N, C) and labels, and from nothing else.

    multi_label: Platt per label and, on its log-odds, `fit_thresholds` of that kind; labels with fewer than LEAST
    positives, or whose slope is not above 0, take the line of all cells together: no ranking is ever reversed.
    single_label: argmax and temperature; two classes: Platt on z1 - z0, and with kind "global" a cut of z1 - z0 for the
    F1 of class 1.
    """
    z, y = _checked(task, logits, labels)
    multi, two = task == "multi_label", task == "single_label" and z.shape[1] == 2
    cells, targets = _margin(task, z), y if multi else y[:, None]
    kind = kind if multi or (two and kind == "global") else "none"
    enough = targets.sum(axis=0) >= (LEAST if multi else 0)
    columns = zip(cells.T, targets.T, enough, strict=True) if multi or two else []
    platt = [fit_platt(cell, target) if own else (0.0, 0.0) for cell, target, own in columns]
    if any(a <= 0 for a, _ in platt):
        shared, positives = fit_platt(cells.ravel(), targets.ravel()), int(targets.sum())
        if shared[0] <= 0:  # the scores know nothing: nearly the share of positives for every cell
            shared = 1e-6, math.log((positives + 1) / (targets.size - positives + 1))
        platt = [line if line[0] > 0 else shared for line in platt]
    temperature = 1.0 if multi or two else fit_temperature(z, y)
    lines, empty, thresholds = [[a, b] for a, b in platt], {"before": {}, "after": {}}, []
    if multi or kind == "global":
        slope, shift = np.array(lines).T if kind != "none" else (1.0, 0.0)
        cuts = fit_thresholds(cells * slope + shift, targets, kind)
        thresholds = np.where(cuts == NEVER, NEVER, (cuts - shift) / slope).tolist()
    decision = Decision(task, z.shape[1], kind, thresholds, temperature, lines, fitted_on, len(z), empty)
    predicted, after = _decide(decision, z)
    return replace(decision, scores={"before": _plain(task, z, y), "after": _scores(task, after, predicted, y)})


def _plain(task: str, z: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The scores without a decision: probability 0.5, or the argmax."""
    return _scores(task, z, (z > 0).astype(np.int64) if task == "multi_label" else z.argmax(axis=1), y)


def cross_fitted(
    task: str, logits: ArrayLike, labels: ArrayLike, folds: int = 5, seed: int = 0, kind: str = "per_class"
) -> tuple[dict[str, dict[str, float]], np.ndarray, np.ndarray]:
    """(scores before and after, predictions, probabilities) in which no row had a part in the decision it got.

    The rows are dealt into `folds` at random and each fold is decided by a fit on the others: an honest estimate of
    what the thresholds give on new rows. At most one fold a row; ValueError below two rows or folds.
    """
    z, y = _checked(task, logits, labels)
    if min(len(z), folds) < 2:
        raise ValueError(f"cross_fitted: got {len(z)} rows and {folds} folds, expected two or more of each")
    after, predicted = np.zeros_like(z), np.zeros_like(y)
    for held in np.array_split(np.random.default_rng(seed).permutation(len(z)), min(folds, len(z))):
        others = np.setdiff1d(np.arange(len(z)), held)
        predicted[held], after[held] = _decide(fit_decision(task, z[others], y[others], kind), z[held])
    scores = {"before": _plain(task, z, y), "after": _scores(task, after, predicted, y)}
    return scores, predicted, _probabilities(task, after)


# ---------------------------------------------------------------------------------------------------------------------
# ensembles


def _stacked(members: Sequence[ArrayLike]) -> np.ndarray:
    """M logits (N, C) -> (M, N, C) float64."""
    if len(shapes := {np.shape(member) for member in members}) != 1 or len(shape := shapes.pop()) != 2:
        raise ValueError(f"ensemble: got members of shapes {[np.shape(m) for m in members]}, expected one shape (N, C)")
    z = np.stack([np.asarray(member, dtype=np.float64) for member in members])
    if not (z.size and np.isfinite(z).all()):
        raise ValueError(f"ensemble: got {len(z)} members of shape {shape}, expected rows and finite logits")
    return z


def _midranks(scores: np.ndarray) -> np.ndarray:
    """(N,) -> ranks (N,) scaled into (0, 1); equal scores share their mean rank."""
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - size / 2)[group] / len(scores)


def ensemble(
    members: Sequence[ArrayLike], how: str, weights: ArrayLike | None = None, task: str = "single_label"
) -> np.ndarray:
    """One set of logits (N, C) from several: their softmax (multi_label: sigmoid) is what `how` says.

    mean_logit: of the mean logits. mean_prob: the mean of probabilities; weighted: with weights (M,), 0 or more and
    summing to 1. rank: the mean of each column's midranks among these N rows, scaled into (0, 1): the same under any
    increasing map of a column (of z1 - z0 of two single-label classes, of log p of more). Good for AUC.
    """
    z, single = _stacked(members), task == "single_label"
    if task not in TASKS or how not in ENSEMBLES or (how == "weighted") != (weights is not None):
        raise ValueError(
            f"ensemble: got {how!r} of {task!r} with weights {weights}; weighted, and no other, takes weights"
        )
    share = np.full(len(z), 1 / len(z)) if weights is None else np.asarray(weights, dtype=np.float64)
    if share.shape != (len(z),) or not (share >= 0).all() or abs(share.sum() - 1) > 1e-6:
        raise ValueError(f"weights: got {share.tolist()}, expected {len(z)} numbers of 0 or more that sum to 1")
    if how == "mean_logit":
        return z.mean(axis=0)
    if how == "rank":
        if single:
            z = (z - z[..., ::-1]) if z.shape[-1] == 2 else _log_softmax(z)
        ranks = np.apply_along_axis(_midranks, 1, z).mean(axis=0)
        return np.log(ranks) - (0 if single else np.log1p(-ranks))
    z, logs = z[share > 0], np.log(share[share > 0])[:, None, None]

    if single:
        return np.logaddexp.reduce(_log_softmax(z) + logs, axis=0)
    return np.logaddexp.reduce(_log_sigmoid(z) + logs, axis=0) - np.logaddexp.reduce(_log_sigmoid(-z) + logs, axis=0)


def fit_weights(members: Sequence[ArrayLike], labels: ArrayLike, task: str) -> np.ndarray:
    """Weights (M,) on the simplex of the lowest log-loss of the weighted mean of the members' probabilities.

    Pass out-of-fold logits (N, C). The EM step of mixtures, w_m <- w_m * mean(p_m / mixture), which never raises the
    loss, taken to a power while that lowers it too; ends where convexity proves it within 1e-9 nats of the optimum.
    Never worse than the best member, which is returned alone unless the mixture is better.
    """
    z = _stacked(members)
    y = _checked(task, z[0], labels)[1]
    single = task == "single_label"
    log_p = _log_softmax(z)[:, np.arange(len(y)), y] if single else _log_sigmoid(np.where(y, z, -z))
    log_p = log_p.reshape(len(z), -1)  # (M, N) of what happened, or (M, N * C)
    top = log_p.max(axis=0)
    p = np.exp(log_p - top)  # one scale for all members of a row moves no weight

    def loss(weights: np.ndarray) -> float:
        return float(-(np.log(weights @ p) + top).mean())

    weights, power = np.full(len(z), 1 / len(z)), 1.0
    for _ in range(1000):
        value, gain = loss(weights), p @ (1 / (weights @ p)) / p.shape[1]  # gain (M,), weights @ gain = 1
        if gain.max() - 1 <= 1e-9:  # at least the distance to the optimum (Jensen)
            break
        while True:
            log_w = np.log(weights) + power * np.log(np.maximum(gain, 1e-300))
            new = np.maximum(np.exp(log_w - log_w.max()), 1e-12)
            new /= new.sum()
            if power == 1 or loss(new) <= value:
                break
            power = max(1.0, power / 4)
        weights, power = new, power * 1.5
    weights = np.where(weights < 1e-9, 0, weights)  # its loss is infinite where only a dropped member explains a row
    weights, alone = weights / weights.sum(), -log_p.mean(axis=1)
    with np.errstate(divide="ignore"):
        return weights if loss(weights) < alone.min() - 1e-12 else np.eye(len(z))[alone.argmin()]


# ---------------------------------------------------------------------------------------------------------------------
# predictions as a person sees them


def degenerate(logits: np.ndarray) -> str:
    """Why these scores (N, C) cannot be trusted, or an empty string: not finite, or the same for every row."""
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        first = int(bad.argmax()) + 1
        return f"{int(bad.sum())} of {len(logits)} rows have scores that are not finite (first: row {first})"
    if len(logits) < 8:
        return ""
    relative = logits - logits.mean(axis=1, keepdims=True) if logits.shape[1] > 1 else logits
    spread = relative.std(axis=0).max()
    distinct = len(np.unique(logits, axis=0))
    if spread < 1e-4 or distinct <= max(2, len(logits) // 100):
        return f"{len(logits)} rows have {distinct} distinct scores, spread {spread:.1e}: the model ignores its input"
    return ""


def distribution(logits: np.ndarray, names: list[str], task: str = "single_label") -> str:
    """A short summary of predictions: rows and share per class and how sure they are, or a regression's quantiles; of
    multi_label how many labels a row gets, and the commonest.
    """
    if task == "multi_label":
        predicted = logits > 0
        order = np.argsort(-predicted.sum(axis=0), kind="stable")[:10]
        shares = ", ".join(f"{names[c]} {predicted[:, c].mean():.1%}" for c in order if predicted[:, c].any())
        none = (~predicted.any(axis=1)).mean()
        return f"at probability 0.5: {predicted.sum(axis=1).mean():.2f} labels a row, {none:.1%} of rows none; {shares}"
    if logits.shape[1] == 1:
        low, mid, high = np.quantile(logits, [0.05, 0.5, 0.95])
        return f"{names[0]}: 5% below {low:.4g}, median {mid:.4g}, 5% above {high:.4g}, mean {logits.mean():.4g}"
    top, chosen = softmax(logits).max(axis=1), logits.argmax(axis=1)
    width = max(len(n) for n in names)
    lines = [f"{'predicted':<{width}} {'rows':>7} {'share':>7} {'mean top probability':>21}"]
    for c, name in enumerate(names):
        mine = chosen == c
        mean = f"{top[mine].mean():.3f}" if mine.any() else "-"
        lines.append(f"{name:<{width}} {mine.sum():>7} {mine.mean():>7.1%} {mean:>21}")
    low, mid, high = np.quantile(top, [0.05, 0.5, 0.95])
    lines.append(f"top probability: 5% below {low:.3f}, median {mid:.3f}, 5% above {high:.3f}")
    return "\n".join(lines)
