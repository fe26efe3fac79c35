"""Estimates of what a run takes: FLOPs and memory; and the memory that it took."""

import sys

import torch
from torch import nn

TRAINED_BYTES = 20  # of a trained weight: its gradient (4), the sum of gradients in fp64 (8), AdamW's two moments (8)


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


def memory_estimate(model, max_tokens: int, precision: str, checkpointing: bool) -> dict[str, float]:
    """Rough GB of one rank: weights, trained state (gradients, sums, AdamW), and activations of one micro-batch."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # A layer keeps its residual stream in fp32, the inputs of its linears in half precision.
    size = 4 if precision == "fp32" else 2
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", 4 * hidden)
    stream = max_tokens * hidden * 4
    layer = stream + max_tokens * size * (6 * hidden + 3 * inner)
    activations = config.num_hidden_layers * layer
    if checkpointing:
        activations = config.num_hidden_layers * stream + layer
    return {"weights": weights / 1e9, "trained state": trained * TRAINED_BYTES / 1e9, "activations": activations / 1e9}


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
