"""Estimates of what a run takes: FLOPs and memory; and the memory that it took."""

import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn

import bases
import ddp


def training_flops(model, lengths) -> float:
    """Model FLOPs of one forward and backward pass over rows of these lengths (B,), recomputation not counted.

    2 per weight and token forward, 2 for the gradient of activations, 2 for that of trained weights; attention
    4 * n^2 / 2 * width a layer forward (causal) and twice that backward. After Kaplan et al. 2020, arXiv:2001.08361.
    """
    weights = trained = 0
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear):
            size = module.in_features * module.out_features
            weights += size
            trained += size * module.weight.requires_grad

    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    tokens = float(sum(lengths))
    attention = 2 * sum(float(n) ** 2 for n in lengths) * width * config.num_hidden_layers

    # With a trained head alone there is no backward pass through the backbone.
    if not any(p.requires_grad for p in model.backbone.parameters()):
        return 2 * tokens * weights + attention
    return tokens * (4 * weights + 2 * trained) + 3 * attention


def memory_estimate(model, gradients: ddp.GradientSum, forward: Callable) -> dict[str, float]:
    """GB of one rank: weights, trained state (gradients, their sums, AdamW's moments), and activations.

    Activations are what forward(), the loss of a micro-batch, keeps for its backward pass. Where layers are computed
    again there, one of them is kept whole: so much exists at a time.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with kept_whole(bases.decoder_layers(model)[0]), hooks:
        loss = forward()  # noqa: F841  alive: no two tensors that are kept have the same place
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    state = gradients.total.nbytes + 8 * gradients.count + (gradients.flat.nbytes if gradients.exact else 0)
    return {"weights": weights / 1e9, "trained state": state / 1e9, "activations": sum(kept.values()) / 1e9}


@contextmanager
def kept_whole(layer: nn.Module):
    """Inside the block a layer keeps what its backward pass needs: nothing is computed again."""
    flags = {name: getattr(layer, name, False) for name in ("gradient_checkpointing", "recomputed")}  # see fused.py
    for name in flags:
        setattr(layer, name, False)
    yield
    for name, flag in flags.items():
        setattr(layer, name, flag)


class OutOfMemory(RuntimeError):
    """A micro-batch that a GPU's memory does not hold."""

    exit_status = 1


@contextmanager
def room_for(tokens: int, device: torch.device):
    """Around a micro-batch of so many tokens. Raises OutOfMemory, which says what to do, where it does not fit."""
    try:
        yield
    except torch.OutOfMemoryError:
        size = torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else 0.0
        raise OutOfMemory(
            f"out of memory at a micro-batch of {tokens:,} tokens, after a peak of {peak_memory_gb(device):.1f} of "
            f"{size:.1f} GB: lower --max_tokens (in training auto tries what fits), or train with --grad_checkpoint "
            "or --quant nf4"
        ) from None


def peak_memory_gb(device: torch.device) -> float:
    """Of this process: memory allocated on its GPU, or resident on a CPU (0 if that is not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
