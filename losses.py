"""Losses as sums: each returns (sum, weight), so that any split of a batch adds up to the whole batch.

The caller divides by the weight of the whole optimizer step, which it knows from the plan.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configs import TrainConfig
from errors import UserError

POS_WEIGHT_CAP = 20.0  # a rarer label would rule the gradient by a few rows


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


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0, class_weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Label-smoothed, class-weighted cross-entropy in fp32, as torch defines it (a row's weight is its class's).

    logits (B, C), labels (B,) int64 or (B, C) probabilities, class_weights (C,) -> (sum of the rows' losses, sum of the
    rows' weights). Smoothing: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567.
    """
    weight = float(len(labels))
    if class_weights is not None:
        weight = (class_weights[labels] if labels.ndim == 1 else labels @ class_weights).sum()
    loss = F.cross_entropy(
        logits.float(), labels, weight=class_weights, label_smoothing=label_smoothing, reduction="sum"
    )
    return loss, weight


def binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0, pos_weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Cross-entropy of each cell on its own, in fp32: logits (B, C), targets (B, C) of 0 and 1 -> (sum, cells).

    Smoothing moves a target by half its share towards the other: 1 becomes 1 - s / 2, 0 becomes s / 2, as two-class
    smoothing does. pos_weight (C,): of each label's positive part, as torch defines it.
    """
    smooth = targets.float() * (1 - label_smoothing) + label_smoothing / 2
    loss = F.binary_cross_entropy_with_logits(logits.float(), smooth, pos_weight=pos_weight, reduction="sum")
    return loss, float(targets.numel())


def squared_error(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """outputs (B, 1), targets (B,) -> (sum of squared errors in fp32, number of rows)."""
    return F.mse_loss(outputs[:, 0].float(), targets.float(), reduction="sum"), float(len(targets))


def lm_cross_entropy(hidden: torch.Tensor, head, targets: torch.Tensor, chunk: int = 512):
    """Next-token cross-entropy without ever holding all logits: chunks of rows, recomputed in the backward pass.

    hidden (N, D) states, head: states -> logits over the vocabulary (the LM head, adapted or not), targets (N,) int64
    -> (sum of nats, number of targets). At most `chunk` x V logits exist at a time.
    """

    def part(h, t):
        return F.cross_entropy(head(h).float(), t, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for i in range(0, len(targets), chunk):
        total = total + checkpoint(part, hidden[i : i + chunk], targets[i : i + chunk], use_reentrant=False)
    return total, len(targets)


# ---- the loop's small parts -----------------------------------------------------------------------------------------


def class_counts(task: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """(C,) rows of each class or label."""
    return labels.sum(axis=0).astype(int) if task == "multi_label" else np.bincount(labels, minlength=classes)


def weights_of_config(cfg: TrainConfig, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """(C,) weights of classes, or of the positive part of labels; None for equal ones."""
    if cfg.task == "regression":
        return None
    counts = class_counts(cfg.task, labels, classes)
    try:
        if cfg.task == "multi_label":
            return pos_weight(cfg.pos_weight, counts, len(labels))
        return class_weights(cfg.class_weights, counts)
    except ValueError as e:
        raise UserError(str(e)) from None


def loss_sum(task: str, logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, weights) -> torch.Tensor:
    """The task's loss as a sum over rows, or over cells for multi_label."""
    if task == "regression":
        return squared_error(logits, target)[0]
    loss = binary_cross_entropy if task == "multi_label" else cross_entropy
    return loss(logits, target, label_smoothing, weights)[0]


def loss_weight(task: str, targets: np.ndarray, weights: np.ndarray | None) -> float:
    """What a step's sum is divided by: its rows, their class weights, or its cells for multi_label."""
    if weights is None or task == "multi_label":
        return float(targets.size if task == "multi_label" else len(targets))
    return float((weights[targets] if targets.ndim == 1 else targets @ weights).sum())
