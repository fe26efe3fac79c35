"""Estimates of what a run takes: FLOPs and memory."""

from torch import nn

TRAINED_BYTES = 4 + 8 + 8  # of a trained weight: its gradient, the sum of gradients in fp64, AdamW's two moments


def training_flops(model, lengths) -> float:
    """Model FLOPs of one forward and backward pass over rows of these lengths (B,), recomputation not counted.

    2 per weight and token forward, 2 for the gradient of activations, 2 for that of trained weights; attention
    4 * n^2 / 2 * width a layer forward (causal) and twice that backward. After Kaplan et al. 2020, arXiv:2001.08361.
    """
    frozen = trained = 0
    for module in model.backbone.modules():
        if isinstance(module, nn.Linear):
            weights = module.in_features * module.out_features
            if module.weight.requires_grad:
                trained += weights
            else:
                frozen += weights

    config = model.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = head_width * config.num_attention_heads
    tokens = float(sum(lengths))
    squares = float(sum(float(n) ** 2 for n in lengths))
    attention = 2 * squares * width * config.num_hidden_layers

    # With a trained head alone there is no backward pass through the backbone.
    if not any(p.requires_grad for p in model.backbone.parameters()):
        return 2 * tokens * (frozen + trained) + attention
    return tokens * (4 * frozen + 6 * trained) + 3 * attention


def memory_estimate(model, max_tokens: int, precision: str, checkpointing: bool) -> dict[str, float]:
    """Rough GB of one rank: weights, trained state (gradients, sums, AdamW), and activations of one micro-batch."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # A layer keeps its residual stream in fp32, the inputs of its linears in half precision.
    size = 4 if precision == "fp32" else 2
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    layer = max_tokens * (config.hidden_size * (4 + 6 * size) + 3 * inner * size)
    activations = config.num_hidden_layers * layer
    if checkpointing:
        stream = max_tokens * config.hidden_size * 4
        activations = config.num_hidden_layers * stream + layer
    return {
        "weights": weights / 1e9,
        "trained state": trained * TRAINED_BYTES / 1e9,
        "activations": activations / 1e9,
    }
