"""Combine predictions of several runs or systems."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

import calibrate
import checkpoint
import decide
import files
import labelling
import metrics
import trained
from configs import InferConfig
from errors import UserError

ENSEMBLES = ("mean_logit", "mean_prob", "rank", "weighted")


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
    if task not in calibrate.TASKS or how not in ENSEMBLES or (how == "weighted") != (weights is not None):
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
            z = (z - z[..., ::-1]) if z.shape[-1] == 2 else metrics.log_softmax(z)
        ranks = np.apply_along_axis(_midranks, 1, z).mean(axis=0)
        return np.log(ranks) - (0 if single else np.log1p(-ranks))
    z, logs = z[share > 0], np.log(share[share > 0])[:, None, None]

    if single:
        return np.logaddexp.reduce(metrics.log_softmax(z) + logs, axis=0)
    return np.logaddexp.reduce(metrics.log_sigmoid(z) + logs, axis=0) - np.logaddexp.reduce(
        metrics.log_sigmoid(-z) + logs, axis=0
    )


def fit_weights(members: Sequence[ArrayLike], labels: ArrayLike, task: str) -> np.ndarray:
    """Weights (M,) on the simplex of the lowest log-loss of the weighted mean of the members' probabilities.

    Pass out-of-fold logits (N, C). The EM step of mixtures, w_m <- w_m * mean(p_m / mixture), which never raises the
    loss, taken to a power while that lowers it too; ends where convexity proves it within 1e-9 nats of the optimum.
    Never worse than the best member, which is returned alone unless the mixture is better.
    """
    z = _stacked(members)
    y = metrics.checked(task, z[0], labels)[1]
    single = task == "single_label"
    log_p = metrics.log_softmax(z)[:, np.arange(len(y)), y] if single else metrics.log_sigmoid(np.where(y, z, -z))
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


# ---- ensembles ------------------------------------------------------------------------------------------------------


@dataclass
class Blend:
    """How several runs become one, fitted on their validation rows before any weight is loaded."""

    task: str  # as decide.ensemble knows it
    weights: np.ndarray | None
    decision: decide.Decision | None
    said: str


def blending(cfg: InferConfig, train_cfg, labels: labelling.Labels) -> Blend:
    """What the ensemble's validation rows say: weights, thresholds and calibration, where all runs share those rows.

    Raises UserError for runs of other tasks or labels, and for weights without rows to fit them on.
    """
    runs = [Path(p) for p in cfg.runs if not p.endswith(".csv")]
    for run in runs[1:]:
        other, theirs = trained.run_facts(run)
        if cfg.ensemble == "rank" and other.task == "regression" and len(labels.values) == 2:
            said = f"rank of {len(cfg.runs)} members, a regression's output beside the log-odds of {labels.values[1]}"
            return Blend(train_cfg.task, None, None, said)
        if (other.task, theirs.values) != (train_cfg.task, labels.values):
            raise UserError(
                f"--runs {run}: its task or labels are not those of {runs[0]}: {other.task} {theirs.values}"
            )
    if train_cfg.task == "regression":
        if cfg.ensemble in ("mean_prob", "weighted"):
            raise UserError(f"--ensemble {cfg.ensemble}: a regression has no probabilities; take mean_logit or rank")
        return Blend("multi_label", None, None, f"{cfg.ensemble} of {len(cfg.runs)} members")
    known = [trained.validation_rows(run, train_cfg, labels) for run in runs]
    judged = {checkpoint.load_json(run / "result.json").get("val_sha256") for run in runs}  # None of older runs
    shared = len(runs) == len(cfg.runs) and len(judged) == 1
    shared = shared and all(k[0] == known[0][0] and np.array_equal(k[1], known[0][1]) for k in known)
    if cfg.ensemble == "weighted" and not shared:
        raise UserError("--ensemble weighted: the members were not validated on the same rows; take mean_logit or rank")
    logits, truth = [k[2] for k in known], known[0][1]
    weights = fit_weights(logits, truth, train_cfg.task) if cfg.ensemble == "weighted" else None
    said = f"{cfg.ensemble} of {len(cfg.runs)} members" + (
        f", weights {np.round(weights, 3)}" if weights is not None else ""
    )
    if not shared or cfg.ensemble == "rank" or len(truth) < 10:  # ranks depend on the rows they are among
        return Blend(train_cfg.task, weights, None, f"{said}; argmax or probability 0.5 decides")
    both = ensemble(logits, cfg.ensemble, weights, train_cfg.task)
    decision = decide.fit_decision(train_cfg.task, both, truth, trained.threshold_kind(train_cfg))
    return Blend(train_cfg.task, weights, decision, f"{said}; thresholds and calibration of their validation rows")


def csv_member(path: str, cfg, labels: labelling.Labels, ids: list[str]) -> np.ndarray:
    """fp32 logits (N, C) of another system, by the ids of its CSV: log-odds or log of its probabilities.

    Raises UserError for ids or columns that the file lacks.
    """
    found, kinds = files.read_rows(path, "runs"), ("logit_", "probability_") if labels.values else ("",)
    names = labels.values or ("prediction",)
    kind = next((k for k in kinds if k + names[0] in found[0]), kinds[-1])
    files.need_columns(found, [cfg.id_column, *(kind + n for n in names)], path, "runs")
    by_id = {row[cfg.id_column]: row for row in found}
    lost = [i for i in ids if i not in by_id]
    if lost or len(by_id) != len(found):
        raise UserError(f"--runs {path}: {len(lost)} of {len(ids)} ids are not in it, or one stands twice")
    values = np.stack([labelling.encode_numbers([by_id[i][kind + n] for i in ids], path) for n in names], axis=1)
    if kind != "probability_":
        return values
    p = np.clip(values.astype(np.float64), 1e-12, 1)
    other = np.log1p(-np.minimum(p, 1 - 1e-12)) if cfg.task == "multi_label" else 0
    return (np.log(p) - other).astype(np.float32)
