"""From logits to decisions: thresholds and calibrated probabilities. float64, numpy only.

Everything is fitted from the logits (N, C) and labels it is given, which are those of validation or out-of-fold rows.
Labels are class ids (N,) for single_label and 0 and 1 (N, C) for multi_label. Bad input raises ValueError.

    decision = fit_decision("multi_label", logits, targets)
    predictions, probabilities = apply(decision, test_logits)
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import chain

import numpy as np

import calibrate
import metrics
from metrics import Array, Scores

LEAST_ROWS = 10  # to fit anything to
FOLDS = 5  # of the rows, for scores that no row's own label had a part in


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
    scores: dict[str, Scores]  # before and after, on those same rows, where the thresholds look too good

    def __post_init__(self):
        multi = self.task == "multi_label"
        lines = self.classes if multi else int(self.classes == 2)
        cuts = lines if multi or self.thresholds else 0
        numbers = [self.temperature, *chain(self.thresholds, *self.platt, *map(dict.values, self.scores.values()))]
        pairs = [len(line) == 2 and line[0] > 0 for line in self.platt]
        rules = [  # field, whether it is right, what is expected
            ("task", self.task in calibrate.TASKS, f"one of {', '.join(calibrate.TASKS)}"),
            ("kind", self.kind in calibrate.KINDS, f"one of {', '.join(calibrate.KINDS)}"),
            ("classes", type(self.classes) is int and self.classes > 0, "a count"),
            ("rows", type(self.rows) is int and self.rows > 0, "a count"),
            ("fitted_on", type(self.fitted_on) is str, "text"),
            ("thresholds", len(self.thresholds) == cuts, f"{cuts} numbers"),
            ("platt", pairs == [True] * lines, f"{lines} pairs [a, b] with a > 0"),
            ("scores", set(self.scores) == {"before", "after"}, "before and after"),
            ("values", all(type(n) in (int, float) and math.isfinite(n) for n in numbers), "finite numbers"),
            ("temperature", self.temperature > 0, "a number above 0"),
        ]
        for name, right, expected in rules:
            if not right:
                raise ValueError(f"decision: {name}: got {getattr(self, name, numbers)!r:.200}, expected {expected}")

    def to_json(self) -> str:
        """One field a line."""
        lines = [f'  "{name}": {json.dumps(value, allow_nan=False)}' for name, value in asdict(self).items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> "Decision":
        """The decision of `to_json`; ValueError on anything else."""
        values = json.loads(text)
        try:
            return cls(**values)
        except (TypeError, AttributeError) as error:  # a key too many, a list where a number belongs, and the like
            raise ValueError(f"decision: {error}; expected values for {[*cls.__dataclass_fields__]}") from None

    def with_threshold(self, probability: float) -> "Decision":
        """The same with one threshold on the calibrated probability, that of class 1 where there are two classes."""
        if not self.platt:
            raise ValueError(f"threshold: got {probability}, expected none: argmax decides {self.classes} classes")
        if not 0 < probability < 1:
            raise ValueError(f"threshold: got {probability}, expected a probability in (0, 1)")
        log_odds = math.log(probability / (1 - probability))
        return replace(self, kind="given", thresholds=[(log_odds - b) / a for a, b in self.platt])


def plain(task: str, classes: int) -> Decision:
    """Argmax, or probability 0.5 for each label, and probabilities as they are."""
    thresholds = [0.0] * classes if task == "multi_label" else []
    lines = len(thresholds) or int(classes == 2)
    scores = {"before": {}, "after": {}}
    return Decision(task, classes, "none", thresholds, 1.0, [[1.0, 0.0]] * lines, "nothing", 1, scores)


def apply(decision: Decision, logits: Array) -> tuple[Array, Array]:
    """(predictions, probabilities (N, C)) of logits (N, C). multi_label: 0 and 1 (N, C), 1 where logit > threshold.
    single_label: class ids (N,): the argmax, which calibration leaves as it is, or whether z1 - z0 > threshold.
    """
    predicted, z = _decide(decision, logits)
    return predicted, calibrate.probabilities(decision.task, z)


def _decide(decision, logits):
    """Predictions and calibrated logits (N, C) of logits (N, C)."""
    z = np.asarray(logits, float)
    if z.shape[1:] != (decision.classes,):
        raise ValueError(f"logits: got shape {z.shape}, expected (N, {decision.classes}) as the decision was fitted on")
    predicted = z.argmax(axis=1)
    if not decision.platt:
        return predicted, z / decision.temperature
    margin = _margin(decision.task, z)
    slopes, shifts = np.array(decision.platt).T
    line = margin * slopes + shifts
    if decision.thresholds:
        predicted = (margin > decision.thresholds).astype(int)
    if decision.task == "multi_label":
        return predicted, line
    return predicted.reshape(len(z)), np.hstack([0 * line, line])


def _margin(task, z):
    """What thresholds and Platt's lines act on: the logits (N, C), or z1 - z0 (N, 1) of two single-label classes."""
    return z if task == "multi_label" else z[:, 1:] - z[:, :1]


def fit_decision(
    task: str, logits: Array, labels: Array, kind: str = "per_class", fitted_on: str = "validation"
) -> Decision:
    """Thresholds and calibration from logits (N, C) and labels, and from nothing else.

    multi_label: Platt per label and, on its log-odds, `fit_thresholds` of that kind; labels with fewer than LEAST
    positives, or whose slope is not above 0, take the line of all cells together: no ranking is ever reversed.
    single_label: argmax and temperature; two classes: Platt on z1 - z0, and with kind "global" a cut of z1 - z0 for the
    F1 of class 1.
    """
    z, y = metrics.checked(task, logits, labels)
    decision = _fitted(task, z, y, kind)
    scores = _before_and_after(task, z, y, *_decide(decision, z))
    return replace(decision, fitted_on=fitted_on, rows=len(z), scores=scores)


def unfit(labels: Array) -> str:
    """Why nothing can be fitted to these labels, or an empty string."""
    if len(labels) < LEAST_ROWS:
        return f"{len(labels)} validation rows are too few (expected {LEAST_ROWS})"
    return "" if np.ptp(labels) else "the validation rows are all of one class"


def cross_fitted(
    task: str, logits: Array, labels: Array, seed: int = 0, kind: str = "per_class"
) -> tuple[dict[str, Scores], Array, Array]:
    """(scores before and after, predictions, probabilities), each row decided by a fit that it had no part in.

    The rows are dealt into FOLDS at random and each fold is decided by a fit on the others: an honest estimate of
    what the thresholds give on new rows. At most one fold a row; ValueError for a single row.
    """
    z, y = metrics.checked(task, logits, labels)
    if len(z) == 1:
        raise ValueError("cross_fitted: got 1 row, expected two or more")
    order = np.random.default_rng(seed).permutation(len(z))
    predicted = np.zeros_like(y)
    calibrated = np.zeros_like(z)
    for held_out in np.array_split(order, min(FOLDS, len(z))):
        others = np.setdiff1d(order, held_out)
        decision = _fitted(task, z[others], y[others], kind)
        predicted[held_out], calibrated[held_out] = _decide(decision, z[held_out])
    scores = _before_and_after(task, z, y, predicted, calibrated)
    return scores, predicted, calibrate.probabilities(task, calibrated)


def _before_and_after(task, z, y, predicted, calibrated):
    return {"before": calibrate.scores(task, z, None, y), "after": calibrate.scores(task, calibrated, predicted, y)}


def _fitted(task, z, y, kind):
    """The decision of `fit_decision` without what it says about the rows."""
    argmax = plain(task, z.shape[1])
    if not argmax.platt:
        return replace(argmax, temperature=calibrate.fit_temperature(z, y))

    cells, targets = _margin(task, z), y.reshape(len(y), -1)
    lines = _lines(cells, targets)
    decision = replace(argmax, platt=lines.tolist())
    if kind == "none" or (kind == "per_class" and task == "single_label"):
        return decision

    # Thresholds are fitted on calibrated log-odds, and kept on the logits.
    slopes, shifts = lines.T
    cuts = calibrate.fit_thresholds(cells * slopes + shifts, targets, kind)
    thresholds = np.where(cuts == calibrate.NEVER, cuts, (cuts - shifts) / slopes)
    return replace(decision, kind=kind, thresholds=thresholds.tolist())


def _lines(cells, targets):
    """Platt's a > 0 and b (K, 2) of columns (N, K); those with few positives, or a slope below 0, take that of all."""
    lines = np.array(list(map(calibrate.fit_platt, cells.T, targets.T)))
    weak = (lines[:, 0] <= 0) | (targets.sum(axis=0) < calibrate.LEAST)
    if weak.any():
        slope, shift = calibrate.fit_platt(cells.ravel(), targets.ravel())
        if slope <= 0:  # the scores know nothing: nearly the share of positives for every cell
            positives = targets.sum()
            slope, shift = 1e-6, math.log((positives + 1) / (targets.size - positives + 1))
        lines[weak] = slope, shift
    return lines
