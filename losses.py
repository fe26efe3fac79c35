"""Losses as sums over rows, and the weights of those rows: one table, a row for each task.

A training step divides the summed loss of its micro-batches by the weight of all its rows. Both add up, so any split
of a step into micro-batches and ranks gives the loss of the whole step. To add a loss to a task, write it beside the
others and let `loss_sum` take it where the config says so, as with a new setting.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from configs import TrainConfig
from errors import UserError

POS_WEIGHT_CAP = 20.0  # a rarer label would dominate the gradient with a few rows


# ---- losses of a micro-batch ----------------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    smoothing: float = 0.0,
    weights: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """Label-smoothed, class-weighted cross-entropy in fp32: logits (B, C), labels (B,) int64 or (B, C) probabilities.

    A row weighs as much as its class, weights (C,), as in torch. Smoothing: Szegedy et al. 2015, arXiv:1512.00567.
    """
    logits = logits.float()
    return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction=reduction)


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, smoothing=0.0, weights: Tensor | None = None, reduction="sum"
) -> Tensor:
    """Cross-entropy of every cell in fp32: logits (B, C), labels (B, C) from 0 to 1. weights (C,): of positives.

    Smoothing moves a label by half its share towards the other one: 1 becomes 1 - s / 2, 0 becomes s / 2, as two-class
    smoothing does.
    """
    logits = logits.float()
    smooth = labels.float() * (1 - smoothing) + smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, smooth, pos_weight=weights, reduction=reduction)


def squared_error(outputs: Tensor, targets: Tensor, smoothing=0.0, weights=None, reduction="sum") -> Tensor:
    """Squared error in fp32: outputs (B, 1), targets (B,). Smoothing and weights are of classes only."""
    numbers = outputs[:, 0].float()
    return F.mse_loss(numbers, targets.float(), reduction=reduction)


def lm_cross_entropy(hidden: Tensor, head, targets: Tensor, chunk: int = 512) -> Tensor:
    """Next-token cross-entropy (the sum of nats) without ever holding all logits: they are recomputed in chunks.

    hidden (N, D) states, head: states -> logits over the vocabulary (the LM head, adapted or not), targets (N,) int64.
    At most `chunk` x V logits exist at a time.
    """

    def loss_of_chunk(states, ids):
        return F.cross_entropy(head(states).float(), ids, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for states, ids in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(loss_of_chunk, states, ids, use_reentrant=False)
    return total


# ---- the table ------------------------------------------------------------------------------------------------------


def softened_classes(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1 / T) of a row's classes (B, C), normalised."""
    return F.softmax(probabilities.log() / temperature, dim=1)


def softened_cells(probabilities: Tensor, temperature: float) -> Tensor:
    """p^(1 / T) of each cell (B, C), normalised with that of 1 - p."""
    return F.sigmoid(probabilities.logit() / temperature)


def weight_of_rows(labels: np.ndarray, weights: np.ndarray | None) -> float:
    """The class weights of rows, summed; their number where all classes weigh the same."""
    if weights is None:
        return len(labels)
    return float(weights[labels].sum())


def weight_of_cells(labels: np.ndarray, weights: np.ndarray | None) -> float:
    """A row of several labels weighs as much as it has cells, whatever its positives cost."""
    return labels.size


@dataclass(frozen=True)
class Loss:
    """What a task needs: the loss of rows, the weight of rows that a mean divides by, and soft targets at T."""

    of: Callable  # (logits, labels, smoothing, weights, reduction) -> tensor
    weight: Callable  # (labels, weights) -> float
    softened: Callable | None = None  # (probabilities, temperature) -> probabilities


TASKS = {
    "single_label": Loss(cross_entropy, weight_of_rows, softened_classes),
    "multi_label": Loss(binary_cross_entropy, weight_of_cells, softened_cells),
    "regression": Loss(squared_error, weight_of_rows),
}


def loss_sum(
    cfg: TrainConfig,
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    soft: Tensor | None = None,
) -> Tensor:
    """The loss of a micro-batch of the config's task, summed over its rows.

    soft (B, C): a teacher's probabilities, NaN in rows without. The loss of the others becomes
    (1 - share) * loss(z, label) + share * T^2 * loss(z / T, p^(1 / T) normalised), which is knowledge distillation
    (Hinton et al. 2015, arXiv:1503.02531).
    """
    loss = TASKS[cfg.task]
    share, temperature = cfg.soft_share, cfg.soft_temperature
    if soft is None:
        return loss.of(logits, labels, cfg.label_smoothing, weights)
    hard = loss.of(logits, labels, cfg.label_smoothing, weights, "none")  # (B,), or (B, C) of cells
    targets = loss.softened(soft.nan_to_num(0.5), temperature)  # NaN would spoil gradients even of unused terms
    taught = loss.of(logits / temperature, targets, 0.0, weights, "none")
    both = (1 - share) * hard + share * temperature**2 * taught
    unknown = soft.isnan()
    if hard.ndim == 1:
        unknown = unknown.any(dim=1)
    return torch.where(unknown, hard, both).sum()


# ---- weights of classes and labels ----------------------------------------------------------------------------------


def label_counts(task: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """(C,) rows of each class or label."""
    if task == "multi_label":
        return labels.sum(axis=0).astype(int)
    return np.bincount(labels, minlength=classes)


def label_weights(task: str, by_class: str, by_label: str, labels: np.ndarray, classes: int):
    """(C,) weights of classes (--class_weights), or of the positives of labels (--pos_weight); None for equal ones.

    Raises UserError for settings that do not fit the number of classes.
    """
    if task == "regression":
        return None
    counts = label_counts(task, labels, classes)
    if task == "multi_label":
        return pos_weight(by_label, counts, len(labels))
    return class_weights(by_class, counts)


def class_weights(setting: str, counts: np.ndarray) -> np.ndarray | None:
    """The weights (C,) of `--class_weights` from counts (C,) of training rows per class; None for "none".

    balanced (or inverse): N / (C * count). effective or effective:BETA: (1 - BETA) / (1 - BETA^count), BETA 0.999
    (Cui et al. 2019, arXiv:1901.05555). Both have mean 1 over rows. Otherwise C numbers, as given.
    Raises UserError when these are not C numbers, or BETA is not in [0, 1).
    """
    if setting == "none":
        return None
    present = np.maximum(counts, 1)
    if setting in ("balanced", "inverse"):
        return counts.sum() / (len(counts) * present)
    if setting.startswith("effective"):
        given = setting.partition(":")[2]
        beta = float(given or 0.999)
        if not 0 <= beta < 1:
            raise UserError(f"--class_weights {setting}: expected effective:BETA, BETA from 0 to below 1, like 0.999")
        weights = (1 - beta) / (1 - beta**present)
        return weights * counts.sum() / (weights @ counts)
    weights = np.array(setting.split(","), dtype=float)
    if len(weights) != len(counts):
        expected = f"one for each of {len(counts)} classes"
        raise UserError(f"--class_weights has {len(weights)} numbers, expected {expected}")
    return weights


def pos_weight(setting: str, positives: np.ndarray, rows: int) -> np.ndarray | None:
    """The weights (C,) of `--pos_weight`, of each label's positive part of the BCE; None for "none".

    balanced: negatives / positives, limited to 1/20 and 20, and 1 for a label without a positive row. Otherwise one
    number for all, or C. positives (C,): rows that have the label. Raises UserError on other counts of numbers.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        ratio = (rows - positives) / np.maximum(positives, 1)
        limited = np.clip(ratio, 1 / POS_WEIGHT_CAP, POS_WEIGHT_CAP)
        return np.where(positives > 0, limited, 1.0)
    weights = np.array(setting.split(","), dtype=float)
    if len(weights) not in (1, len(positives)):
        expected = f"1 or {len(positives)}, one for each label"
        raise UserError(f"--pos_weight has {len(weights)} numbers, expected {expected}")
    return weights * np.ones(len(positives))
