"""PEFT's adapter files in and out: the keys of adapter_model.safetensors, and adapter_config.json.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import re
from collections import Counter

import torch
from torch import nn

import lora

PEFT_PREFIX = "base_model.model."


# ---- PEFT's tensors -------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the adapter under the key that peft gives it, on the CPU, in fp32."""
    tensors = {}
    for name in lora.adapter_names(model):
        tensor = model.get_parameter(name).detach()
        tensors[PEFT_PREFIX + name] = tensor.to("cpu", torch.float32, copy=True).contiguous()
    return tensors


def match_keys(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Adapter key -> parameter name for every tensor of an adapter file, given by its shape.

    Every key and shape must be right; a model on the meta device will do. Raises ValueError naming what is missing,
    unexpected or misshapen.
    """
    required = {PEFT_PREFIX + name: name for name in lora.adapter_names(model)}

    # peft adds two kinds of tensors: copies of a head with bias="all", which are skipped, and the base weights of
    # adapted embeddings and LM heads, which are taken.
    given = {key for key in shapes if not re.search(r"\.(original_module|modules_to_save)\.", key)}
    optional = {}
    for name, module in lora.adapters(model).items():
        if isinstance(module, lora.LoRAEmbedding) or lora.named(name, ["lm_head"]):
            optional[f"{PEFT_PREFIX}{name}.base_layer.weight"] = f"{name}.base_layer.weight"

    problems = []
    allowed = required | optional
    for side, keys in (("missing", required.keys() - given), ("unexpected", given - allowed.keys())):
        if keys:
            first = ", ".join(sorted(keys)[:3])
            problems.append(f"{len(keys)} {side} tensors ({first}{', ...' if len(keys) > 3 else ''})")
    names = {key: name for key, name in allowed.items() if key in given}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for key, name in sorted(names.items()):
        expected = tuple(parameters[name].shape)
        if tuple(shapes[key]) != expected:
            problems.append(f"{key} has shape {tuple(shapes[key])}, expected {expected}")
    refuse(problems)
    return names


def load_adapter_state(model: nn.Module, tensors: dict[str, torch.Tensor]) -> str:
    """Copy adapter tensors into the model and return a report of what went where.

    Every key, shape and value must be right, or nothing changes: raises ValueError as match_keys does, and for
    tensors that are not floating point or not finite.
    """
    names = match_keys(model, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    problems, first = [], {}
    for key, name in names.items():
        twin = first.setdefault(parameters[name].data_ptr(), key)  # a tied weight comes twice, and must be the same
        if not tensors[key].is_floating_point():
            problems.append(f"{key} has dtype {tensors[key].dtype}, expected floating point")
        elif not tensors[key].float().isfinite().all():
            problems.append(f"{key} holds values that are not finite")
        elif not torch.equal(tensors[twin], tensors[key]):
            problems.append(f"{key} is tied to {twin} in this model, but differs from it in the file")
    refuse(problems)
    with torch.no_grad():
        for key, name in names.items():
            parameters[name].copy_(tensors[key])

    kinds = ["".join(re.findall(r"lora_(?:embedding_)?[AB]", name)) or "whole tensors" for name in names.values()]
    modules = [name.rsplit(".", 1)[-1] for name in lora.adapters(model)]
    skipped = len(tensors) - len(names)
    report = f"{len(names)} tensors matched ({counted(kinds)}) on {counted(modules)}"
    return report + (f"; {skipped} bookkeeping tensors of peft's skipped" if skipped else "")


def counted(words: list[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(f"the adapter does not fit this model: {lora.in_one_line(problems, 4)}")


# ---- PEFT's config --------------------------------------------------------------------------------------------------


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < abs(value) < 1e30


def is_rank(value) -> bool:
    return is_number(value) and isinstance(value, int) and 0 < value <= 1_000_000


def is_name(value) -> bool:
    return isinstance(value, str)


def is_names(value) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) and name for name in value)


def is_regex(value, around: str = "{}") -> bool:
    if not isinstance(value, str) or re.search(r"[+*}]\??\)[+*{]", value):  # (a+)+ takes forever on some names
        return False
    try:
        return bool(re.compile(around.format(value)))
    except (re.error, RecursionError, OverflowError):
        return False


def is_modules(value) -> bool:
    return is_names(value) or is_regex(value)


def is_layers(values) -> bool:
    return all(isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in values)


def is_layer_lists(values) -> bool:
    return all(is_regex(pattern, "(?:^|.*?[.]){}" + lora.LAYER) for pattern in values)


def by_regex(valid):
    """The check of a dict from regexes over names to valid values."""

    def check(value) -> bool:
        return isinstance(value, dict) and all(is_regex(k, r"(.*\.)?({})$") and valid(v) for k, v in value.items())

    return check


FORMAT = {  # our field: peft's key, what is valid, in words
    "targets": ("target_modules", lambda v: v and is_modules(v), "a list of names or a regex"),
    "rank": ("r", is_rank, "a whole number from 1 to 1,000,000"),
    "alpha": ("lora_alpha", is_number, "a finite number that is not 0"),
    "dropout": ("lora_dropout", lambda v: v == 0 or is_number(v) and 0 < v < 1, "a share from 0 to 1"),
    "bias": ("bias", lambda v: v in ("none", "lora_only", "all"), "none, lora_only or all"),
    "rslora": ("use_rslora", lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": ("rank_pattern", by_regex(is_rank), "ranks by regex"),
    "alpha_pattern": ("alpha_pattern", by_regex(is_number), "alphas by regex"),
    "exclude": ("exclude_modules", is_modules, "a list of names or a regex"),
    "layers": ("layers_to_transform", is_layers, "layer numbers"),
    "layers_pattern": ("layers_pattern", is_layer_lists, "a list of names"),
    "saved": ("modules_to_save", is_names, "a list of names"),
    "task": ("task_type", is_name, "a name"),
    "base": ("base_model_name_or_path", is_name, "a name"),
}
NO_EFFECT = {  # once loaded: where it came from, how it began, and fan_in_fan_out, which the module tells
    "peft_type", "init_lora_weights", "inference_mode", "auto_mapping", "revision", "peft_version", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "fan_in_fan_out",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's own weights
DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": []}


def adapter_config(adapter: lora.Adapter) -> dict:
    """The adapter_config.json that peft reads."""
    config = {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True, "fan_in_fan_out": False}
    for name, (key, _, _) in FORMAT.items():
        value = getattr(adapter, name)
        config[key] = (list(value) or None) if isinstance(value, tuple) else value
    if config["target_modules"] == ["all-linear"]:
        config["target_modules"] = "all-linear"
    return config


def read_adapter_config(config: dict) -> lora.Adapter:
    """The Adapter that an adapter_config.json describes. Raises ValueError naming all that cannot be honoured."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')}: only LORA is read")

    given = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    values = {}
    for name, (key, valid, expected) in FORMAT.items():
        value = given.get(key)
        if value is None:
            continue
        if name in ("layers", "layers_pattern") and not isinstance(value, list):
            value = [value]
        if not valid(value):
            problems.append(f"{key} {str(given[key])[:60]}: expected {expected}")
        elif isinstance(value, list):
            values[name] = tuple(dict.fromkeys(value))
        else:
            values[name] = value

    # What is not known here may change the model, unless it is off.
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool | str | None) or start not in PLAIN_STARTS:
        problems.append(f"init_lora_weights {start}: it changed the base's own weights")
    known = NO_EFFECT | {key for key, _, _ in FORMAT.values()}
    for key, value in config.items():
        if value and key not in known:
            problems.append(f"{key} {str(value)[:60]} is not supported")
    if problems:
        raise ValueError(
            f"{lora.in_one_line(problems)}. Way out: load it with peft on its own base, merge_and_unload, "
            "save_pretrained, and give that folder as --base"
        )
    return lora.Adapter(**values)
