"""Losses as sums: each returns (sum, weight), so that any split of a batch adds up to the whole batch.

The caller divides by the weight of the whole optimizer step, which it knows from the plan.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
