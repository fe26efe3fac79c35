"""PEFT's files in and out."""

import re
from collections import Counter

import torch
from torch import nn

import lora

PEFT_PREFIX = "base_model.model."


# ---- PEFT's tensors -------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the adapter under the key that peft gives it, on the CPU, in fp32."""
    parameters = dict(model.named_parameters())
    return {
        PEFT_PREFIX + n: parameters[n].detach().to("cpu", torch.float32, copy=True).contiguous()
        for n in lora.adapter_names(model)
    }


def match_keys(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Adapter key -> parameter name for every tensor of an adapter file, given by its shape.

    Every key and shape must be right; a model on the meta device will do. peft adds two kinds of tensors of its own:
    bookkeeping copies of a head with bias="all" (passed over), and the base weights of adapted embeddings (taken).
    Raises ValueError naming what is missing, unexpected or misshapen.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {PEFT_PREFIX + n: n for n in lora.adapter_names(model)}
    base = {f"{n}.base_layer.weight" for n, m in lora.adapters(model).items() if isinstance(m, lora.LoRAEmbedding)}
    base |= {f"{n}.base_layer.weight" for n in lora.adapters(model) if n.rsplit(".", 1)[-1] == "lm_head"}
    extra = {PEFT_PREFIX + n: n for n in base}
    copies = re.compile(r"\.(original_module|modules_to_save)\.")
    found = {k for k in shapes if not copies.search(k)}
    problems = []
    sides = (("missing", wanted.keys() - found), ("unexpected", found - wanted.keys() - extra.keys()))
    for side, keys in sides:
        if keys:
            first = ", ".join(sorted(keys)[:3])
            problems.append(f"{len(keys)} {side} tensors ({first}{', ...' if len(keys) > 3 else ''})")
    taken = {k: n for k, n in {**wanted, **extra}.items() if k in found}
    for key, name in sorted(taken.items()):
        if tuple(shapes[key]) != tuple(parameters[name].shape):
            problems.append(f"{key} has shape {tuple(shapes[key])}, expected {tuple(parameters[name].shape)}")
    _refuse(problems)
    return taken


def load_adapter_state(model: nn.Module, tensors: dict[str, torch.Tensor]) -> str:
    """Copy adapter tensors into the model and return a report of what went where.

    Every key, shape and value must be right, or nothing changes: raises ValueError as match_keys does, and for
    tensors that are not floating point or not finite.
    """
    names = match_keys(model, {k: tuple(t.shape) for k, t in tensors.items()})
    parameters, first, problems = dict(model.named_parameters(remove_duplicate=False)), {}, []
    for key, name in names.items():
        twin = first.setdefault(parameters[name].data_ptr(), key)  # a tied weight comes twice, and must be the same
        if not tensors[key].is_floating_point():
            problems.append(f"{key} has dtype {tensors[key].dtype}, expected floating point")
        elif not tensors[key].float().isfinite().all():
            problems.append(f"{key} holds values that are not finite")
        elif not torch.equal(tensors[twin], tensors[key]):
            problems.append(f"{key} is tied to {twin} here, and differs from it there")
    _refuse(problems)
    with torch.no_grad():
        for key, name in names.items():
            parameters[name].copy_(tensors[key])
    kinds = Counter("".join(re.findall(r"lora_(?:embedding_)?[AB]", n)) or "whole tensors" for n in names.values())
    places = Counter(n.rsplit(".", 1)[-1] for n in lora.adapters(model))
    left = len(tensors) - len(names)
    return (
        f"{len(names)} tensors matched ({', '.join(f'{v} {k}' for k, v in kinds.items())}) on "
        f"{', '.join(f'{v} {k}' for k, v in places.items())}"
        + (f"; {left} bookkeeping tensors of peft's passed over" if left else "")
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the adapter does not fit this model: {lora._one_line(problems[:4])}{more}")


# ---- PEFT's config --------------------------------------------------------------------------------------------------


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < abs(value) < 1e30


def _is_rank(value) -> bool:
    return _is_number(value) and isinstance(value, int) and 0 < value <= 1_000_000


def _is_names(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)


def _is_regex(value, around: str = "{}") -> bool:
    endless = isinstance(value, str) and re.search(r"[+*}]\??\)[+*{]", value)  # (a+)+ takes forever on some names
    try:
        return isinstance(value, str) and not endless and bool(re.compile(around.format(value)))
    except (re.error, RecursionError, OverflowError):
        return False


def _is_layers(value) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in several)


def _is_patterns(good):
    around = r"(.*\.)?({})$"
    return lambda value: isinstance(value, dict) and all(_is_regex(k, around) and good(v) for k, v in value.items())


def _is_modules(value) -> bool:
    return _is_names(value) or _is_regex(value)


def _is_lists(value) -> bool:
    several = value if isinstance(value, list) else [value]
    return all(_is_regex(v, "(?:^|.*?[.]){}" + lora.LAYER) for v in several)


FORMAT = {  # our field: peft's key, what is valid, in words
    "targets": ("target_modules", lambda v: v and _is_modules(v), "a list of names or a regex"),
    "rank": ("r", _is_rank, "a whole number from 1 to 1,000,000"),
    "alpha": ("lora_alpha", _is_number, "a finite number that is not 0"),
    "dropout": ("lora_dropout", lambda v: v == 0 or _is_number(v) and 0 < v < 1, "a share from 0 to 1"),
    "bias": ("bias", lambda v: v in ("none", "lora_only", "all"), "none, lora_only or all"),
    "rslora": ("use_rslora", lambda v: isinstance(v, bool), "true or false"),
    "rank_pattern": ("rank_pattern", _is_patterns(_is_rank), "ranks by regex"),
    "alpha_pattern": ("alpha_pattern", _is_patterns(_is_number), "alphas by regex"),
    "exclude": ("exclude_modules", _is_modules, "a list of names or a regex"),
    "layers": ("layers_to_transform", _is_layers, "layer numbers"),
    "layers_pattern": ("layers_pattern", _is_lists, "a list of names"),
    "saved": ("modules_to_save", _is_names, "a list of names"),
    "task": ("task_type", lambda v: isinstance(v, str), "a name"),
    "base": ("base_model_name_or_path", lambda v: isinstance(v, str), "a name"),
}
NO_EFFECT = {  # once loaded: where it came from, how it began, and fan_in_fan_out, which the module tells
    "peft_type", "init_lora_weights", "inference_mode", "auto_mapping", "revision", "peft_version", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
    "fan_in_fan_out",
}  # fmt: skip
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others change the base's own weights


def adapter_config(adapter: lora.Adapter) -> dict:
    """The adapter_config.json that peft reads."""
    values = {key: getattr(adapter, name) for name, (key, _, _) in FORMAT.items()}
    values = {k: (list(v) or None) if isinstance(v, tuple) else v for k, v in values.items()}
    if values["target_modules"] == ["all-linear"]:
        values["target_modules"] = "all-linear"
    return {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True, "fan_in_fan_out": False} | values


def read_adapter_config(about: dict) -> lora.Adapter:
    """The Adapter that an adapter_config.json describes. Raises ValueError naming all that cannot be honoured."""
    wrong = [] if about.get("peft_type") == "LORA" else [f"peft_type {about.get('peft_type')}: only LORA is read"]
    given = {"r": 8, "lora_alpha": 8, "target_modules": []} | {k: v for k, v in about.items() if v is not None}
    values = {}
    for name, (key, good, expected) in FORMAT.items():
        value = given.get(key)
        if value is not None and not good(value):
            wrong.append(f"{key} {str(value)[:60]}: expected {expected}")
        elif value is not None:
            alone = name in ("layers", "layers_pattern") and not isinstance(value, list)
            values[name] = (value,) if alone else tuple(dict.fromkeys(value)) if isinstance(value, list) else value
    start = about.get("init_lora_weights", True)
    if not (start is None or isinstance(start, (bool, str)) and start in PLAIN_STARTS):
        wrong.append(f"init_lora_weights {start}: it changed the base's own weights")
    known = NO_EFFECT | {key for key, _, _ in FORMAT.values()}
    wrong += [f"{k} {str(v)[:60]} is not supported" for k, v in about.items() if k not in known and v]
    if wrong:
        raise ValueError(
            f"{lora._one_line(wrong)}. Way out: load it with peft on its own base, merge_and_unload, save_pretrained, "
            "and give that folder as --base"
        )
    return lora.Adapter(**values)
