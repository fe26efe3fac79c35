"""Dropout whose masks cost little on a CPU (Srivastava et al. 2014, https://jmlr.org/papers/v15/srivastava14a.html)."""

import numpy as np
import torch
from torch import nn

LEVELS = 2**16  # of a random number that drops an element or keeps it


def keep_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """(uint8, in the shape of x) 1 where dropout keeps an element: drawn from the seed that torch was given.

    On a CPU torch draws 64 random bits for each element one after the other, for a tenth of a training step. Here 16
    bits decide, which take a tenth of that.
    """
    dropped = round(dropout * LEVELS)
    if x.device.type != "cpu":
        keep = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
        return keep.bernoulli_(1 - dropped / LEVELS)
    seed = torch.randint(2**62, ())
    count = x.numel()
    draws = np.random.SFC64(int(seed)).random_raw(count // 4 + 1)
    keep = draws.view(np.uint16)[:count] >= dropped
    return torch.from_numpy(keep).view(torch.uint8).view(x.shape)


def keep_scale(dropout: float) -> float:
    """What elements that are kept are multiplied with, so that the mean stays."""
    dropped = round(dropout * LEVELS)
    return LEVELS / max(1, LEVELS - dropped)


class Dropout(nn.Dropout):
    """Dropout with `keep_mask` (Srivastava et al. 2014)."""

    def forward(self, x):
        if not (self.training and self.p):
            return x
        keep = keep_mask(x, self.p).to(x.dtype)
        return x * keep * keep_scale(self.p)
