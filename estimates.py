"""Estimates."""

from torch import nn

# ---- numbers about a model ------------------------------------------------------------------------------------------


def training_flops(model, lengths) -> float:
    """Model FLOPs of one forward and backward pass over rows of these lengths (B,), recomputation not counted.

    2 per weight and token forward, 2 for the gradient of activations, 2 for that of trained weights; attention
    4 * n^2 / 2 * width a layer forward (causal) and twice that backward. After Kaplan et al. 2020, arXiv:2001.08361.
    """
    linears = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
    frozen = sum(m.in_features * m.out_features for m in linears if not m.weight.requires_grad)
    trained = sum(m.in_features * m.out_features for m in linears if m.weight.requires_grad)
    backward = any(p.requires_grad for p in model.backbone.parameters())
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width *= config.num_attention_heads
    tokens, squares = float(sum(lengths)), float(sum(float(n) ** 2 for n in lengths))
    attention = 2 * squares * width * config.num_hidden_layers
    if not backward:
        return 2 * tokens * (frozen + trained) + attention
    return tokens * (4 * frozen + 6 * trained) + 3 * attention


def memory_estimate(model, max_tokens: int, precision: str, checkpointing: bool) -> dict[str, float]:
    """Rough GB of one rank: weights, trained state (gradients, sums, AdamW), and activations of one micro-batch."""
    config = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    half = 4 if precision == "fp32" else 2
    mlp = getattr(config, "intermediate_size", 4 * config.hidden_size)
    layer = max_tokens * (config.hidden_size * (4 + 6 * half) + 3 * mlp * half)
    kept = max_tokens * config.hidden_size * 4
    layers = config.num_hidden_layers
    activations = layers * kept + layer if checkpointing else layers * layer
    parts = {"weights": weights, "trained state": trained * (4 + 8 + 8), "activations": activations}
    return {k: v / 1e9 for k, v in parts.items()}
