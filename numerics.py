"""Precision: which one runs here, autocast, and where activations overflow."""

import math
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

import bases
from errors import UserError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The autocast precision and why. By compute capability, for torch.cuda.is_bf16_supported() is True on a T4."""
    if wanted != "auto":
        if wanted not in DTYPES:
            raise UserError(f"precision {wanted!s:.40}: expected auto, {', '.join(DTYPES)}")
        return wanted, "as given"
    if device.type != "cuda":
        return "fp32", "a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    precision = "bf16" if major >= 8 else "fp16"
    return precision, f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context for forward passes: half precision where asked for; fp32 runs as it is."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def weight_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Of frozen weights: the autocast dtype on a GPU, fp32 on a CPU."""
    return DTYPES[precision] if device.type == "cuda" else torch.float32


@contextmanager
def activation_maxima(model: nn.Module):
    """Inside the block, note each layer's largest absolute output; the dict is filled by a forward pass."""
    maxima = {}

    def note(name, module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        maxima[name] = states.detach().abs().max().float()

    with ExitStack() as hooks:
        for i, layer in enumerate(bases.decoder_layers(model)):
            hooks.enter_context(layer.register_forward_hook(partial(note, f"layer {i}")))
        yield maxima


def overflow_report(maxima: dict[str, torch.Tensor]) -> str:
    """The layer with the largest activations, or the first one that is not finite."""
    for name, value in maxima.items():
        if not math.isfinite(value):
            return f"{name} is the first whose output is not finite"
    name = max(maxima, key=maxima.get)
    return f"largest activation {float(maxima[name]):.3g} in {name}"
