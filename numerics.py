"""Precision: which one runs here, autocast, and where activations overflow."""

import math
import time
from contextlib import ExitStack, contextmanager
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import nn

import bases
import ddp
from errors import UserError

FP16_MOST = torch.finfo(torch.float16).max
MUCH_FASTER = 1.5  # less gain is not worth bf16's rounding
NARROW = 512  # of hidden states: tiny/base, of 256, trains no faster in bf16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


OVERFLOWING = ("gemma3", "gemma3_text")  # activations of 8e5 (unslothai/unsloth#4014)


def choose_precision(wanted: str, world: ddp.World, base: str) -> tuple[str, str]:
    """The autocast precision, the same on every rank, and why.

    Raises UserError for fp16 on a GPU where a base of this kind overflows.
    """
    precision, why = _precision_of(wanted, world, base)
    if precision == "fp16" and world.device.type == "cuda" and bases.load_config(base).model_type in OVERFLOWING:
        raise UserError(f"--base {base} overflows in fp16 ({why}): --precision fp32, or bf16 from capability 8.0 on")
    return precision, why


def _precision_of(wanted, world, base):
    """By compute capability, for torch.cuda.is_bf16_supported() is True on a T4."""
    if wanted != "auto":
        if wanted not in DTYPES:
            raise UserError(f"precision {wanted!s:.40}: expected auto, {', '.join(DTYPES)}")
        return wanted, "as set"
    if world.device.type != "cuda":
        return ddp.gather_objects(world, _fastest_of_a_cpu(bases.load_config(base).hidden_size < NARROW))[0]
    major, minor = torch.cuda.get_device_capability(world.device)
    precision = "bf16" if major >= 8 else "fp16"
    return precision, f"{torch.cuda.get_device_name(world.device)}, capability {major}.{minor}"


@cache
def _fastest_of_a_cpu(narrow):
    """bf16 where its products are much faster; a CPU with the instructions may still be slower with them.

    narrow: whether the base is so narrow that its products take less time than all else.
    """
    if narrow:
        return "fp32", f"a CPU, and a base narrower than {NARROW}"
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "fp32", "a CPU without products in bf16"
    best = dict.fromkeys((torch.float32, torch.bfloat16), math.inf)
    for _ in range(5):
        for dtype in best:
            x, weight = torch.ones(256, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
            started = time.perf_counter()
            F.linear(x, weight)
            best[dtype] = min(best[dtype], time.perf_counter() - started)
    gain = best[torch.float32] / best[torch.bfloat16]
    return "bf16" if gain >= MUCH_FASTER else "fp32", f"products in bf16 are {gain:.1f} times as fast as in fp32 here"


def settled(wanted: str, world: ddp.World, base: str, resumed: bool) -> str:
    """The precision setting that a run keeps: on a CPU auto is decided once, for later sessions must not differ.

    Runs from before there was a choice computed in fp32.
    """
    if wanted != "auto" or torch.cuda.is_available():
        return wanted
    if resumed:
        return "fp32"
    try:
        precision, why = _precision_of(wanted, world, base)
    except UserError:  # of the base: found again, beside all else that is wrong with it
        return wanted
    ddp.say(world, f"--precision auto: {precision} ({why})")
    return precision


def exact(wanted: str, world: ddp.World) -> str:
    """The precision setting to merge and export with: on a CPU auto is fp32, which rounds nothing."""
    return "fp32" if wanted == "auto" and world.device.type != "cuda" else wanted


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """A context for forward passes: half precision where asked for; fp32 runs as it is."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def weight_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Of frozen weights: the autocast dtype; fp32 instead of fp16 on a CPU, which computes it no faster."""
    return torch.float32 if device.type != "cuda" and precision == "fp16" else DTYPES[precision]


@contextmanager
def activation_maxima(model: nn.Module):
    """Inside the block, note the largest absolute output of each layer and of every module that has no parts, and the
    largest input of linears.

    The dict is filled by a forward pass, in its order: {(place, module): maximum, in the output's dtype}. A place is
    "layer 3", or the module's own name outside the layers (embedding, final norm, head).
    """
    maxima = {}

    def note(place, name, module, inputs, output):
        states = output[0] if isinstance(output, tuple) else output
        if isinstance(module, nn.Linear) and inputs and is_floating(inputs[0]):  # a product of activations, in MLPs
            maxima[place, f"input of {name}"] = inputs[0].detach().abs().max()
        if is_floating(states):
            maxima[place, name] = states.detach().abs().max()

    layers = list(bases.decoder_layers(model))
    places = {}
    for i, layer in enumerate(layers):
        places |= dict.fromkeys(layer.modules(), f"layer {i}")
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if module in layers or not any(module.children()):
                place = places.get(module, name)
                hooks.enter_context(module.register_forward_hook(partial(note, place, name)))
        yield maxima


def first_overflow(maxima: dict) -> tuple[str, str] | None:
    """(place, module) of the first output that is not finite, or None."""
    return next((where for where, value in maxima.items() if not math.isfinite(value)), None)


def overflow_report(maxima: dict) -> str:
    """The first place whose output is not finite, or the one with the largest activations."""
    first = first_overflow(maxima)
    if first:
        return f"{first[0]} is the first whose output is not finite"
    (place, _), value = max(maxima.items(), key=lambda entry: float(entry[1]))
    return f"largest activation {float(value):.3g} in {place}"


def overflow_forecast(maxima: dict) -> str:
    """A note when activations use more than an eighth of what fp16 holds, or an empty string."""
    largest, where = 0.0, ""
    for (place, module), value in maxima.items():
        if value.dtype == torch.float16 and float(value) > largest:
            largest = float(value)
            where = f"{module} ({place})"
    if largest <= FP16_MOST / 8:
        return ""
    return (
        f"note: {where} reaches {largest:.3g} in the first micro-batch, fp16 holds {FP16_MOST:.0f}: "
        "where steps are skipped, use --precision bf16 or fp32"
    )


def is_floating(value) -> bool:
    """Whether a value is a tensor of floating-point numbers."""
    return torch.is_tensor(value) and value.is_floating_point() and value.numel() > 0


def not_finite(tensors) -> list[str]:
    """The names among (name, tensor) pairs whose values are not all finite."""
    bad = []
    for name, tensor in tensors:
        # The sum tells at once, unless it overflows itself.
        if is_floating(tensor) and not tensor.sum().isfinite() and not tensor.isfinite().all():
            bad.append(name)
    return bad
