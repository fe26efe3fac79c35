"""Parameter groups, schedules, and the optimizer step: unscale, clip, step, zero, update."""

import logging
import math
import sys
from collections.abc import Callable

import torch


def parameter_groups(named, lr: float, head_lr: float, weight_decay: float, heads=("score",)) -> list[dict]:
    """Groups for AdamW from (name, parameter) pairs: head or body, with weight decay (matrices) or without (vectors).

    heads: names of the head's modules. head_lr 0 means lr. Each group keeps its peak learning rate in `peak_lr`, for
    the schedule.
    """
    groups = {}
    for name, p in named:
        if not p.requires_grad:
            continue
        is_head = name.startswith(tuple(f"{head}." for head in heads))
        part, peak = ("head", head_lr or lr) if is_head else ("body", lr)
        decay = weight_decay
        if p.ndim < 2:
            part, decay = f"{part} (no decay)", 0.0
        group = {"params": [], "name": part, "lr": peak, "peak_lr": peak, "weight_decay": decay}
        groups.setdefault(part, group)["params"].append(p)
    return list(groups.values())


def adamw(groups: list[dict], kind: str = "adamw") -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, https://arxiv.org/abs/1711.05101), fused, betas 0.9 and 0.999.

    kind: adamw; adamw8bit, whose state is stored in 8 bits (Dettmers et al. 2021, arXiv:2110.02861); paged_adamw and
    paged_adamw8bit, whose state moves to the host when a GPU runs out. Raises ImportError without bitsandbytes.
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    kinds = {"adamw8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit", "paged_adamw8bit": "PagedAdamW8bit"}
    return getattr(bitsandbytes().optim, kinds[kind])(groups)


def bitsandbytes():
    """The library, imported without the hub's CPU kernel that it would fetch and run where `kernels` is installed."""
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)  # it would warn that the kernel is missing
    try:
        import bitsandbytes

        return bitsandbytes
    finally:
        log.setLevel(level)
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before


def loss_scaler(device: str, enabled: bool) -> torch.amp.GradScaler:
    """The fp16 loss scaler, ready also on a rank that has no micro-batch in its first step."""
    scaler = torch.amp.GradScaler(device, enabled=enabled)
    scaler.scale(torch.zeros((), device=device))
    return scaler


def lr_factor(update: int, total: int, warmup: int, schedule: str) -> float:
    """Fraction of the peak learning rate at optimizer update `update` (from 0) of `total`.

    Linear warm-up over `warmup` updates that starts above zero, then cosine or linear decay to zero, or constant.
    """
    if update < warmup:
        return (update + 1) / warmup
    done = min(1.0, (update - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if schedule == "linear" else 1.0


def warmup_updates(total: int, warmup_steps: int, warmup_ratio: float) -> int:
    """Length of the warm-up in updates."""
    return warmup_steps or math.ceil(total * warmup_ratio)


def step(
    optimizer, scaler, factor: float, grad_clip: float, riders: torch.Tensor, whole: Callable = lambda riders: True
) -> tuple[float, bool, list[float]]:
    """One optimizer step from gradients already summed over micro-batches and ranks.

    factor: of the schedule; riders: numbers on the device that are read together with the norm, in the step's only
    host read. Returns the gradient norm before clipping, whether the step was taken, and the riders. A step whose
    gradients are not finite changes no parameter and keeps them to be looked at; with fp16 the scaler then lowers its
    scale. Where whole(riders) is false, micro-batches are missing, and nothing changes at all.
    """
    # The gradients are still scaled (fp16): their true norm decides whether the step is taken, and is clipped.
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    *read, host_norm = torch.cat([riders, norm.to(riders.dtype)[None]]).tolist()
    if not whole(read):
        return host_norm, False, read
    taken = math.isfinite(host_norm)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    if taken:
        if grad_clip:
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, norm)
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=False)  # the .grad tensors are views of GradientSum's buffer: they stay
    scaler.update()
    return host_norm, taken, read
