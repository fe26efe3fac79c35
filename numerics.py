"""Precision."""

from contextlib import contextmanager

import torch
from torch import nn

import bases

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- precision ------------------------------------------------------------------------------------------------------


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The autocast precision and why. By compute capability, for torch.cuda.is_bf16_supported() is True on a T4."""
    if wanted != "auto":
        return wanted, "as given"
    if device.type != "cuda":
        return "fp32", "a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"
    return ("bf16", name) if major >= 8 else ("fp16", name)


@contextmanager
def autocast(device: torch.device, precision: str):
    """Forward passes in half precision where asked for; fp32 runs as it is."""
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield


def weight_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Of frozen weights: the autocast dtype on a GPU, fp32 on a CPU."""
    return DTYPES[precision] if device.type == "cuda" else torch.float32


@contextmanager
def activation_maxima(model: nn.Module):
    """Inside the block, note each layer's largest absolute output; the dict is filled after the forward pass."""
    maxima: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(module, inputs, output):
            out = output[0] if isinstance(output, tuple) else output
            maxima[name] = out.detach().abs().max().float()

        return hook

    layers = bases.decoder_layers(model)
    hooks = [layer.register_forward_hook(note(f"layer {i}")) for i, layer in enumerate(layers)]
    try:
        yield maxima
    finally:
        for hook in hooks:
            hook.remove()


def overflow_report(maxima: dict[str, torch.Tensor]) -> str:
    """The layer with the largest activations, or the first one that is not finite."""
    values = {k: float(v) for k, v in maxima.items()}
    for name, value in values.items():
        if value != value or value == float("inf"):
            return f"{name} is the first whose output is not finite"
    name = max(values, key=values.get)
    return f"largest activation {values[name]:.3g} in {name}"
