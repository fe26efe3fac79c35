"""From logits to decisions: class weights, thresholds, calibration, ensembles. float64, numpy only.

Everything is fitted from the logits (N, C) and labels it is given, which are those of validation or out-of-fold rows.
Labels are class ids (N,) for single_label and 0 and 1 (N, C) for multi_label. Bad input raises ValueError.

    decision = fit_decision("multi_label", logits, targets)
    predictions, probabilities = apply(decision, test_logits)
    both = ensemble([a, b], "weighted", fit_weights([a, b], targets, "multi_label"), "multi_label")
"""

import json
import math
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
from numpy.typing import ArrayLike

import calibrate

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
            ("task", self.task in calibrate.TASKS, f"one of {', '.join(calibrate.TASKS)}"),
            ("kind", self.kind in calibrate.KINDS, f"one of {', '.join(calibrate.KINDS)}"),
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
    return predicted, calibrate._probabilities(decision.task, z)


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
    z, y = calibrate._checked(task, logits, labels)
    multi, two = task == "multi_label", task == "single_label" and z.shape[1] == 2
    cells, targets = _margin(task, z), y if multi else y[:, None]
    kind = kind if multi or (two and kind == "global") else "none"
    enough = targets.sum(axis=0) >= (calibrate.LEAST if multi else 0)
    columns = zip(cells.T, targets.T, enough, strict=True) if multi or two else []
    platt = [calibrate.fit_platt(cell, target) if own else (0.0, 0.0) for cell, target, own in columns]
    if any(a <= 0 for a, _ in platt):
        shared, positives = calibrate.fit_platt(cells.ravel(), targets.ravel()), int(targets.sum())
        if shared[0] <= 0:  # the scores know nothing: nearly the share of positives for every cell
            shared = 1e-6, math.log((positives + 1) / (targets.size - positives + 1))
        platt = [line if line[0] > 0 else shared for line in platt]
    temperature = 1.0 if multi or two else calibrate.fit_temperature(z, y)
    lines, empty, thresholds = [[a, b] for a, b in platt], {"before": {}, "after": {}}, []
    if multi or kind == "global":
        slope, shift = np.array(lines).T if kind != "none" else (1.0, 0.0)
        cuts = calibrate.fit_thresholds(cells * slope + shift, targets, kind)
        thresholds = np.where(cuts == calibrate.NEVER, calibrate.NEVER, (cuts - shift) / slope).tolist()
    decision = Decision(task, z.shape[1], kind, thresholds, temperature, lines, fitted_on, len(z), empty)
    predicted, after = _decide(decision, z)
    return replace(
        decision, scores={"before": _plain(task, z, y), "after": calibrate._scores(task, after, predicted, y)}
    )


def _plain(task: str, z: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """The scores without a decision: probability 0.5, or the argmax."""
    return calibrate._scores(task, z, (z > 0).astype(np.int64) if task == "multi_label" else z.argmax(axis=1), y)


def cross_fitted(
    task: str, logits: ArrayLike, labels: ArrayLike, folds: int = 5, seed: int = 0, kind: str = "per_class"
) -> tuple[dict[str, dict[str, float]], np.ndarray, np.ndarray]:
    """(scores before and after, predictions, probabilities) in which no row had a part in the decision it got.

    The rows are dealt into `folds` at random and each fold is decided by a fit on the others: an honest estimate of
    what the thresholds give on new rows. At most one fold a row; ValueError below two rows or folds.
    """
    z, y = calibrate._checked(task, logits, labels)
    if min(len(z), folds) < 2:
        raise ValueError(f"cross_fitted: got {len(z)} rows and {folds} folds, expected two or more of each")
    after, predicted = np.zeros_like(z), np.zeros_like(y)
    for held in np.array_split(np.random.default_rng(seed).permutation(len(z)), min(folds, len(z))):
        others = np.setdiff1d(np.arange(len(z)), held)
        predicted[held], after[held] = _decide(fit_decision(task, z[others], y[others], kind), z[held])
    scores = {"before": _plain(task, z, y), "after": calibrate._scores(task, after, predicted, y)}
    return scores, predicted, calibrate._probabilities(task, after)
