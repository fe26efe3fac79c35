"""Products with frozen weights and LoRA updates, forward and backward: what the autograd functions of fused.py do."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora
from dropout import keep_mask, keep_scale


@dataclass(frozen=True)
class Product:
    """A linear with a frozen weight, its bias, and the LoRA update that it may have."""

    weight: Tensor  # (D_out, D_in)
    bias: Tensor | None
    a: Tensor | None = None  # (rank, D_in)
    b: Tensor | None = None  # (D_out, rank)
    scaling: float = 1.0
    dropout: float = 0.0

    @property
    def trained(self) -> list[Tensor]:
        """What gets a gradient: A and B, and a bias that is trained."""
        return [p for p in (self.a, self.b, self.bias) if p is not None and p.requires_grad]

    @property
    def scale(self) -> float:
        """Of the update, with what dropout multiplies by."""
        return self.scaling * keep_scale(self.dropout)


def outs_of(products: list[Product], x: Tensor) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Outputs (T, D_out) of products that share their input x (T, D_in), and what `back` needs of them.

    That is a dropout mask (T, D_in), and the outputs (T, ranks) of all A side by side: one wide product instead of
    thin ones. Updates of the same input have the same mask.
    """
    outs = []
    for p in products:
        bias = None if p.bias is None else p.bias.to(x.dtype)
        outs.append(F.linear(x, p.weight.to(x.dtype), bias))

    updates = updates_among(products)
    if not updates:
        return outs, None, None
    dropout = products[updates[0]].dropout
    keep = keep_mask(x, dropout) if dropout else None
    low = F.linear(kept(x, keep), side_by_side(products, x.dtype))
    lows = split_by_rank(low, products)
    for i, own in zip(updates, lows, strict=True):
        p = products[i]
        outs[i].addmm_(own, p.b.to(x.dtype).T, alpha=p.scale)
    return outs, keep, low


def back(products: list[Product], ds, x: Tensor | None, keep, low, needed=True) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of the input, if that is needed, and those of what is trained, in the order of `trained_by`.

    ds: gradients of the outputs. x: the input, for A's gradient alone. keep, low: as `outs_of` gave them.
    """
    d_x = None
    for d, p in zip(ds, products, strict=True):
        if not needed:
            break
        weight = p.weight.to(d.dtype)
        if d_x is None:
            d_x = d @ weight
        else:
            d_x.addmm_(d, weight)

    # Through the updates, all A at once.
    grads = {}
    updates = updates_among(products)
    if updates:
        d_lows = []
        for i, own in zip(updates, split_by_rank(low, products), strict=True):
            p, d = products[i], ds[i]
            d_lows.append((d @ p.b.to(d.dtype)).mul_(p.scale))
            grads[p.b] = (own.T @ d).mul_(p.scale).T
        d_low = torch.cat(d_lows, 1)
        d_as = d_low.T @ kept(x, keep)
        for i, d_a in zip(updates, split_by_rank(d_as.T, products), strict=True):
            grads[products[i].a] = d_a.T
        if needed:
            add_kept(d_x, d_low @ side_by_side(products, d_low.dtype), keep)

    for d, p in zip(ds, products, strict=True):
        if p.bias is not None and p.bias.requires_grad:
            grads[p.bias] = d.float().sum(0)
    return d_x, [grads[parameter].float() for parameter in trained_by(products)]


def trained_by(products: list[Product]) -> list[Tensor]:
    return [parameter for p in products for parameter in p.trained]


def updates_among(products: list[Product]) -> list[int]:
    """Places of the products that have an update."""
    return [i for i, p in enumerate(products) if p.a is not None]


def side_by_side(products: list[Product], dtype: torch.dtype) -> Tensor:
    """(ranks, D_in) every A of the products."""
    return torch.cat([p.a for p in products if p.a is not None]).to(dtype)


def split_by_rank(low: Tensor, products: list[Product]) -> tuple[Tensor, ...]:
    """What belongs to each update of (T, ranks)."""
    return low.split([len(p.a) for p in products if p.a is not None], 1)


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return x
    return x * keep.to(x.dtype)


def add_kept(total: Tensor, x: Tensor, keep: Tensor | None) -> None:
    if keep is None:
        total.add_(x)
    else:
        total.addcmul_(x, keep.to(x.dtype))


# ---- of a model's modules -------------------------------------------------------------------------------------------


def product_of(module: nn.Module) -> Product | None:
    """The product of a linear, adapted or not; None where it is of another kind."""
    base = module.base_layer if type(module) is lora.LoRALinear else module
    if type(base) is not nn.Linear or not (is_plain(base) and is_plain(module)):
        return None
    if base.weight.requires_grad and torch.is_grad_enabled():
        return None
    if module is base or not module.enabled:
        return Product(base.weight, base.bias)
    return Product(
        base.weight,
        base.bias,
        module.lora_A.weight,
        module.lora_B.weight,
        module.scaling,
        module.lora_dropout.p if module.training else 0.0,
    )


def is_frozen(module: nn.Module) -> bool:
    """Whether none of a module's own parameters gets a gradient, and nobody looks at what it computes."""
    trained = any(p.requires_grad for p in module.parameters(recurse=False))
    return is_plain(module) and not (trained and torch.is_grad_enabled())


def is_plain(module: nn.Module) -> bool:
    """Whether a module has no hooks, which would not be called here."""
    return not (module._forward_hooks or module._forward_pre_hooks)
