"""PEFT's adapter files in and out: the keys of adapter_model.safetensors, and adapter_config.json.

https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import re
from collections import Counter

import torch
from torch import nn

import lora
from checks import table
from errors import few

PEFT_PREFIX = "base_model.model."
MOST_NAMES = 100_000  # of targets, patterns or layers in a config


# ---- PEFT's tensors -------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the adapter under the key that peft gives it, on the CPU, in fp32."""
    return {
        PEFT_PREFIX + name: model.get_parameter(name).detach().to("cpu", torch.float32, copy=True).contiguous()
        for name in lora.adapter_names(model)
    }


# What wrappers put between or before the names of modules: torch.compile, FSDP, activation checkpointing, DDP.
WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(?:module\.)+")


# What an adapter is called, default or another name, where the file was written without save_pretrained.
ADAPTER_NAME = re.compile(r"(?<=\.lora_[AB])\.[^.]+(?=\.(?:weight|bias)$)|(?<=\.lora_embedding_[AB])\.[^.]+$")


def plain_keys(tensors: dict) -> dict:
    """The tensors (or shapes) of an adapter file under the keys that peft gives them, without the names of wrappers.

    Raises ValueError where two keys become one.
    """
    bare = not any(PEFT_PREFIX in key for key in tensors)
    plain = {}
    for key, value in tensors.items():
        name = WRAPPERS.sub("", key)
        prefix = PEFT_PREFIX if bare or name.startswith(PEFT_PREFIX) else ""
        while name.startswith(PEFT_PREFIX):
            name = name.removeprefix(PEFT_PREFIX)
        name = prefix + ADAPTER_NAME.sub("", name)
        if name in plain:
            raise ValueError(f"{lora.in_one_line([key])} and another key name the same tensor")
        plain[name] = value
    return plain


def match_keys(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Adapter key -> parameter name for every tensor of an adapter file, given by its shape.

    Every key and shape must be right; a model on the meta device will do. Raises ValueError naming what is missing,
    unexpected or misshapen.
    """
    required = [PEFT_PREFIX + name for name in lora.adapter_names(model)]

    # peft adds two kinds of tensors: copies of a head with bias="all", which are skipped, and the base weights of
    # adapted embeddings and LM heads, which are taken.
    given = {key for key in shapes if not re.search(r"\.(original_module|modules_to_save)\.", key)}
    adapters = lora.adapters(model).items()
    tied = [name for name, m in adapters if isinstance(m, lora.LoRAEmbedding) or lora.named(name, ["lm_head"])]
    optional = [f"{PEFT_PREFIX}{name}.base_layer.weight" for name in tied]

    # Two ways to lose an adapter's tensors without losing their keys.
    empty = sorted(key[:200] for key in given if tuple(shapes[key]) == (0,))
    if empty:
        problem = f"{len(empty)} tensors are empty ({few(empty, 2)}), as DeepSpeed ZeRO-3 leaves them"
        raise ValueError(f"{problem}: gather the parameters when saving (stage3_gather_16bit_weights_on_model_save)")
    resized = [key for key in given if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
    rows = getattr(getattr(model, "config", None), "vocab_size", 0)
    resized = [key for key in resized if rows and shapes[key][:1] and shapes[key][0] != rows]
    if resized:
        problem = f"{resized[0]:.200} has {shapes[resized[0]][0]:,} rows, the base's vocabulary {rows:,}"
        way_out = "load it with peft's AutoPeftModelForCausalLM, merge_and_unload, save_pretrained, give that as --base"
        raise ValueError(f"{problem}: it was trained on a resized vocabulary. Way out: {way_out}")

    problems = []
    for side, keys in (("missing", set(required) - given), ("unexpected", given.difference(required, optional))):
        if keys:
            problems.append(f"{len(keys)} {side} tensors ({few(sorted(keys), 3)})")
    names = {key: key.removeprefix(PEFT_PREFIX) for key in required + optional if key in given}
    for key, name in sorted(names.items()):
        expected = tuple(model.get_parameter(name).shape)
        if tuple(shapes[key]) != expected:
            problems.append(f"{key} has shape {tuple(shapes[key])}, expected {expected}")
    _refuse(problems)
    return names


def load_adapter_state(model: nn.Module, tensors: dict[str, torch.Tensor]) -> str:
    """Copy adapter tensors into the model and return a report of what went where.

    Every key, shape and value must be right, or nothing changes: raises ValueError as match_keys does, and for
    tensors that are not floating point or not finite.
    """
    names = match_keys(model, {key: tensor.shape for key, tensor in tensors.items()})
    problems, first = [], {}
    for key, name in names.items():
        tensor = tensors[key]
        # A tied weight comes twice, and must be the same.
        twin = first.setdefault(model.get_parameter(name).data_ptr(), key)
        if not tensor.is_floating_point():
            problems.append(f"{key} has dtype {tensor.dtype}, expected floating point")
        elif not tensor.float().isfinite().all():
            problems.append(f"{key} holds values that are not finite")
        elif not torch.equal(tensors[twin], tensor):
            problems.append(f"{key} is tied to {twin} in this model, but differs from it in the file")
    _refuse(problems)
    with torch.no_grad():
        for key, name in names.items():
            model.get_parameter(name).copy_(tensors[key])

    kinds = ["".join(re.findall(r"lora_(?:embedding_)?[AB]", name)) or "whole tensors" for name in names.values()]
    modules = [name.rsplit(".", 1)[-1] for name in lora.adapters(model)]
    report = f"{len(names)} tensors matched ({_counted(kinds)}) on {_counted(modules)}"
    if len(tensors) > len(names):
        report += f"; {len(tensors) - len(names)} bookkeeping tensors of peft's skipped"
    return report


def _counted(words):
    return ", ".join(f"{count} {word}" for word, count in Counter(words).items())


def _refuse(problems):
    if problems:
        raise ValueError(f"the adapter does not fit this model: {lora.in_one_line(problems, 4)}")


# ---- PEFT's config --------------------------------------------------------------------------------------------------


def _is_number(value):
    return type(value) in (int, float) and 0 < abs(value) < 1e30


def _is_rank(value):
    return type(value) is int and 0 < value <= 1_000_000


def _is_names(value):
    return (
        isinstance(value, list) and len(value) <= MOST_NAMES and all(isinstance(name, str) and name for name in value)
    )


def _is_regex(value, around="{}"):
    if not isinstance(value, str) or re.search(r"[+*}]\??\)[+*{]", value):  # (a+)+ takes forever on some names
        return False
    try:
        return bool(re.compile(around.format(value)))
    except (re.error, RecursionError, OverflowError):
        return False


def _is_modules(value):
    return _is_names(value) or _is_regex(value)


def _are_by_regex(values, valid):
    """Whether this is a dict from regexes over names to valid values."""
    return isinstance(values, dict) and all(_is_regex(k, r"(.*\.)?({})$") and valid(v) for k, v in values.items())


# Our field, peft's key, what is valid.
FORMAT = table("""
    targets :: target_modules :: a list of names or a regex, not empty
    rank :: r :: a whole number from 1 to 1,000,000
    alpha :: lora_alpha :: a finite number that is not 0
    dropout :: lora_dropout :: a share from 0 to 1
    bias :: bias :: none, lora_only or all
    rslora :: use_rslora :: true or false
    rank_pattern :: rank_pattern :: ranks by regex
    alpha_pattern :: alpha_pattern :: alphas by regex
    exclude :: exclude_modules :: a list of names or a regex
    layers :: layers_to_transform :: layer numbers
    layers_pattern :: layers_pattern :: a list of names or regexes
    saved :: modules_to_save :: a list of names
    task :: task_type :: a name
    base :: base_model_name_or_path :: a name
""")
VALID = {  # by the third column
    "a list of names or a regex, not empty": lambda value: value and _is_modules(value),
    "a whole number from 1 to 1,000,000": _is_rank,
    "a finite number that is not 0": _is_number,
    "a share from 0 to 1": lambda value: value == 0 or _is_number(value) and 0 < value < 1,
    "none, lora_only or all": lambda value: str(value) in lora.BIASES,
    "true or false": lambda value: isinstance(value, bool),
    "ranks by regex": lambda value: _are_by_regex(value, _is_rank),
    "alphas by regex": lambda value: _are_by_regex(value, _is_number),
    "a list of names or a regex": _is_modules,
    "layer numbers": lambda value: all(type(layer) is int and layer >= 0 for layer in value),
    "a list of names or regexes": lambda value: all(_is_regex(v, "(?:^|.*?[.]){}" + lora.LAYER) for v in value),
    "a list of names": _is_names,
    "a name": lambda value: isinstance(value, str),
}

# Without effect once loaded: where it came from, how it began, and fan_in_fan_out, which the module tells.
NO_EFFECT = """peft_type init_lora_weights inference_mode auto_mapping revision peft_version megatron_core loftq_config
    eva_config corda_config lora_ga_config qalora_group_size runtime_config fan_in_fan_out""".split()
PLAIN_STARTS = "True False None 'gaussian' 'orthogonal' 'eva'".split()  # others change the base's own weights
DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": []}


def adapter_config(adapter: lora.Adapter) -> dict:
    """The adapter_config.json that peft reads."""
    config = {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True, "fan_in_fan_out": False}
    for name, key, _ in FORMAT:
        value = getattr(adapter, name)
        config[key] = (list(value) or None) if isinstance(value, tuple) else value
    if config["target_modules"] == ["all-linear"]:
        config["target_modules"] = "all-linear"
    return config


def read_adapter_config(config: dict) -> lora.Adapter:
    """The Adapter that an adapter_config.json describes. Raises ValueError naming all that cannot be honoured."""
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type {config.get('peft_type')!s:.60}: only LORA is read")

    given = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    values = {}
    for name, key, expected in FORMAT:
        if key not in given:
            continue
        value = given[key]
        if isinstance(value, list | dict) and len(value) > MOST_NAMES:
            problems.append(f"{key} has {len(value):,} entries, at most {MOST_NAMES:,} are read")
            continue
        if name.startswith("layers") and not isinstance(value, list):
            value = [value]
        if not VALID[expected](value):
            problems.append(f"{key} {str(given[key])[:60]}: expected {expected}")
        elif isinstance(value, list):
            value = tuple(dict.fromkeys(value))
        values[name] = value

    if isinstance(given["target_modules"], str):
        layers = [key for key in ("layers_to_transform", "layers_pattern") if given.get(key) is not None]
        target = given["target_modules"]
        problems += [f"{key} with target_modules {target:.60}: peft refuses the pair" for key in layers]

    # What is not known here may change the model, unless it is off.
    if repr(config.get("init_lora_weights", True)) not in PLAIN_STARTS:
        problems.append(f"init_lora_weights {config['init_lora_weights']!s:.60}: it changed the base's own weights")
    known = NO_EFFECT + [key for _, key, _ in FORMAT]
    idle = {key: value for key, value in config.items() if value and key not in known}
    problems += [f"{key:.60} {str(value)[:60]} is not supported" for key, value in idle.items()]
    if problems:
        way_out = "load it with peft on its own base, merge_and_unload, save_pretrained, and give that folder as --base"
        raise ValueError(f"{lora.in_one_line(problems)}. Way out: {way_out}")
    return lora.Adapter(**values)
