"""LoRA, written by hand: inject, train, merge, disable, and PEFT's adapter format in and out.

    inject(model, Adapter(("q_proj", "v_proj"), rank=16, alpha=32, saved=("score",)))
    train_only(model)                                     # everything else is frozen
    tensors = adapter_state(model)                         # keys exactly as peft writes them
    load_adapter_state(model, tensors)                     # strict: every key and shape must match
    with disable(model): ...                               # the base, bit for bit
    merge(model)                                           # plain modules again

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scale: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732. File format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import math
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

PEFT_PREFIX = "base_model.model."
LAYER = r"\.(?P<layer>\d+)\."
HEADS = ("lm_head", "score", "classifier")  # output layers: never part of all-linear, as in peft


@dataclass(frozen=True)
class Adapter:
    """What an adapter is: the part of peft's adapter_config.json that shapes the model, in the field's words."""

    targets: tuple[str, ...] | str  # ends of module names, ("all-linear",), or as a string a regex over whole names
    rank: int
    alpha: float
    dropout: float = 0.0
    bias: str = "none"  # none, lora_only or all
    rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # regex over ends of names -> another rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    exclude: tuple[str, ...] | str = ()  # as targets, of what is left out
    layers: tuple[int, ...] = ()  # only these layers; empty: all
    layers_pattern: tuple[str, ...] = ()  # names of the list of layers; empty: any
    saved: tuple[str, ...] = ()  # modules trained and saved whole (modules_to_save), the head among them
    task: str = "SEQ_CLS"
    base: str = ""


# ---- the modules ----------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """A frozen linear and its low-rank update: base(x) + B(A(dropout(x))) * scaling.

    base_layer: the nn.Linear (D_in -> D_out), or GPT-2's transposed Conv1D, it stands for; rank: columns of A;
    alpha: scaling is alpha / rank, or alpha / sqrt(rank) with rslora. A starts Kaiming-uniform, B at zero, both fp32
    whatever the base's dtype. The submodule names are peft's, so that parameter names are adapter keys.
    """

    def __init__(self, base_layer: nn.Module, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank {rank}: expected 1 or more")
        device, transposed = base_layer.weight.device, isinstance(base_layer, Conv1D)
        wide = base_layer.weight.shape if transposed else (base_layer.in_features, base_layer.out_features)
        self.base_layer, self.transposed = base_layer, transposed
        self.lora_A = nn.Linear(wide[0], rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, wide[1], bias=False, device=device, dtype=torch.float32)
        self.lora_dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled = True
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)  # (..., D_out)
        if not self.enabled:
            return out
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        delta = self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scaling
        return (out + delta).to(out.dtype)

    def delta(self) -> torch.Tensor:
        """The update as one fp32 matrix, shaped as the base's weight."""
        update = (self.lora_B.weight.float() @ self.lora_A.weight.float()) * self.scaling
        return update.T if self.transposed else update

    def idle(self) -> bool:
        """Whether the update is zero."""
        return not (self.lora_A.weight.any() and self.lora_B.weight.any())


class LoRAEmbedding(nn.Module):
    """A frozen embedding (V, D) and its low-rank update: base(ids) + (B A)[:, ids] * scaling; A (r, V) starts at zero.

    A base that scales its output (Gemma) scales the update too. Parameter names are peft's.
    """

    def __init__(self, base_layer: nn.Embedding, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank {rank}: expected 1 or more")
        fp32 = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.base_layer = base_layer
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base_layer.num_embeddings, **fp32))
        self.lora_embedding_B = nn.Parameter(torch.randn(base_layer.embedding_dim, rank, **fp32))
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled = True

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(ids)  # (..., D)
        if not self.enabled:
            return out
        delta = F.embedding(ids, self.lora_embedding_A.T, self.base_layer.padding_idx) @ self.lora_embedding_B.T
        delta = delta * self.scaling
        scale = getattr(self.base_layer, "embed_scale", None)
        return (out + (delta if scale is None else delta * scale)).to(out.dtype)

    def delta(self) -> torch.Tensor:
        """The update as one fp32 matrix (V, D)."""
        return (self.lora_embedding_B.float() @ self.lora_embedding_A.float()).T * self.scaling

    def idle(self) -> bool:
        """Whether the update is zero."""
        return not (self.lora_embedding_A.any() and self.lora_embedding_B.any())


def output_rows(linear: nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """fp32 outputs (..., N) of the rows (N,) of a linear, adapted or not: what label words need of a large LM head."""
    base = getattr(linear, "base_layer", linear)
    bias = None if base.bias is None else base.bias[index].float()
    out = F.linear(x, base.weight[index].float(), bias)
    if linear is base or not linear.enabled:
        return out
    return out + F.linear(linear.lora_A(linear.lora_dropout(x)), linear.lora_B.weight[index]) * linear.scaling


# ---- inject ---------------------------------------------------------------------------------------------------------


def named(name: str, ends) -> bool:
    """Whether a module's name is one of `ends` or ends in one, by whole segments."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def within(name: str, ends) -> bool:
    """Whether a name lies in, or is, a module that `named` finds."""
    parts = name.split(".")
    return any(named(".".join(parts[: i + 1]), ends) for i in range(len(parts)))


def find_targets(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the linears and embeddings that an adapter means, by peft's rules.

    targets are ends of names by whole segments, all-linear for all linears but the output layer, or one regex.
    Modules in `saved` are never adapted. Raises ValueError when a target matches nothing, matches something else than
    a linear or an embedding, or is adapted already.
    """
    modules = {n: m for n, m in model.named_modules() if n}
    linears = [n for n, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))]
    already = adapters(model)
    if already:
        raise ValueError(f"the model already holds an adapter on {len(already)} modules: merge or reload it first")
    targets, missing = adapter.targets, []
    if targets in ("all-linear", ("all-linear",), ["all-linear"]):
        found = [n for n in linears if not set(n.split(".")) & set(HEADS)]
    elif isinstance(targets, str):
        found = [n for n in modules if re.fullmatch(targets, n)]
        missing = [] if found else [targets]
    else:
        found = [n for n in modules if named(n, targets)]
        missing = [t for t in targets if not any(named(n, [t]) for n in found)]
        found = [n for n in found if n in targets or _in_layers(n, adapter)]
    if isinstance(adapter.exclude, str):
        found = [n for n in found if not re.fullmatch(adapter.exclude, n)]
    else:
        found = [n for n in found if not named(n, adapter.exclude)]
    found = [n for n in found if not within(n, adapter.saved)]
    odd = [n for n in found if not isinstance(modules[n], (nn.Linear, nn.Embedding, Conv1D))]
    if missing or odd or not found:
        exists = sorted({n.rsplit(".", 1)[-1] for n in linears} - set(HEADS))
        wrong = [f"target {t} matches no module" for t in missing[:5]]
        wrong += [f"and {len(missing) - 5} more match none"] if len(missing) > 5 else []
        wrong += [f"target {n} is no linear or embedding but {type(modules[n]).__name__}" for n in odd[:3]]
        wrong += [] if wrong else ["the targets leave no module to adapt"]
        raise ValueError(f"{_one_line(wrong)}: the linears here are {', '.join(exists)} (or all-linear)")
    return found


def _in_layers(name: str, adapter: Adapter) -> bool:
    """Whether a module stands in one of the adapter's layers: the first number after the list's name is its layer."""
    if not adapter.layers:
        return True
    lists = [rf"(?:^|.*?\.){p}" for p in adapter.layers_pattern] or [r".*?\.[^.]*"]
    found = next(filter(None, (re.match(rf"{p}{LAYER}", name) for p in lists)), None)
    return found is not None and found["layer"] is not None and int(found["layer"]) in adapter.layers


def inject(model: nn.Module, adapter: Adapter) -> list[str]:
    """Put LoRA in the place of every target and return their names. Nothing is frozen here: see train_only.

    A module in `saved` that shares its weight (a tied LM head) gets one of its own. Raises ValueError as find_targets.
    """
    names = find_targets(model, adapter)
    modules = dict(model.named_modules())
    for end in adapter.saved:
        mine = [n for n in modules if n.endswith(end)]
        if not mine and end not in ("score", "classifier"):  # peft names both, whichever the model has
            raise ValueError(f"modules_to_save {_one_line([end])} matches no module")
        for m in (m for n in mine for m in modules[n].modules()):
            if getattr(m, "weight", None) is not None and len(_owners(model, m.weight)) > 1:
                m.weight = nn.Parameter(m.weight.detach().clone())
    for name in names:
        parent, _, last = name.rpartition(".")
        rank = _by_pattern(adapter.rank_pattern, name, adapter.rank)
        alpha = _by_pattern(adapter.alpha_pattern, name, adapter.alpha)
        kind = LoRAEmbedding if isinstance(modules[name], nn.Embedding) else LoRALinear
        setattr(model.get_submodule(parent), last, kind(modules[name], rank, alpha, adapter.dropout, adapter.rslora))
    model.adapter = adapter
    return names


def _by_pattern(patterns: dict, name: str, default):
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), default)


def _owners(model: nn.Module, weight: torch.Tensor) -> list[str]:
    """Names under which a weight's storage stands in the model."""
    return [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight or _same(p, weight)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device.type != "meta" and a.data_ptr() == b.data_ptr() and a.shape == b.shape


def adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> LoRALinear or LoRAEmbedding of every adapted module."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (LoRALinear, LoRAEmbedding))}


def assert_moved(model: nn.Module) -> None:
    """After the first update no adapter may still be zero: a frozen graph would train nothing in silence."""
    still = [n for n, m in adapters(model).items() if m.idle()]
    if still:
        raise AssertionError(f"{len(still)} adapters did not move in the first step (first: {still[0]})")


# ---- what is trained ------------------------------------------------------------------------------------------------


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that make up the model's adapter: updates, biases as `bias` says, and saved modules."""
    adapter = model.adapter
    if adapter.bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias {adapter.bias}: expected none, lora_only or all")
    layers = adapters(model)
    saved = tuple(f"{n}." for n, _ in model.named_modules() if n.endswith(adapter.saved))  # peft: not by segments

    def belongs(name: str) -> bool:
        owner, _, last = name.rpartition(".")
        if ".lora_" in name or name.startswith(saved):
            return True
        if last != "bias" or adapter.bias == "none":
            return False
        return adapter.bias == "all" or owner.removesuffix(".base_layer") in layers

    return [n for n, _ in model.named_parameters() if belongs(n)]


def train_only(model: nn.Module) -> list[str]:
    """Freeze everything but the adapter, whose tensors become fp32 masters; returns the names of what is trained.

    The base's own values of what the adapter overwrites (biases, saved modules that are no heads) are remembered, so
    that `disable` gives the base back exactly.
    """
    trained = set(adapter_names(model))
    heads = getattr(model, "heads", HEADS)
    kept = {n for n in trained if ".lora_" not in n and not within(n, heads)}
    model.base_values = {n: p.detach().clone() for n, p in model.named_parameters() if n in kept}
    for n, p in model.named_parameters():
        p.requires_grad_(n in trained)
        if n in trained:
            p.data = p.data.float()
    return [n for n, _ in model.named_parameters() if n in trained]


def trainable_table(model: nn.Module) -> str:
    """What is trained: one line per pattern of names, with tensors, parameters and their share of all."""
    rows: dict[str, list[int]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            pattern = ".".join("*" if part.isdigit() else part for part in name.split("."))
            count = rows.setdefault(pattern, [0, 0])
            count[0], count[1] = count[0] + 1, count[1] + p.numel()
    everything = sum(p.numel() * (1 + (p.dtype == torch.uint8)) for p in model.parameters())  # nf4: two in a byte
    width = max([len(p) for p in rows] + [9])
    lines = [f"{'trainable':<{width}} {'tensors':>8} {'parameters':>13} {'share':>8}"]
    lines += [f"{p:<{width}} {t:>8} {n:>13,} {n / everything:>8.3%}" for p, (t, n) in rows.items()]
    total = sum(n for _, n in rows.values())
    lines.append(f"{'all':<{width}} {sum(t for t, _ in rows.values()):>8} {total:>13,} {total / everything:>8.3%}")
    return "\n".join(lines)


# ---- disable and merge ----------------------------------------------------------------------------------------------


@contextmanager
def disable(model: nn.Module):
    """Inside the block the model computes as its base, bit for bit: no update, and the base's own biases."""
    layers = adapters(model).values()
    parameters = dict(model.named_parameters())
    trained = {}
    for layer in layers:
        layer.enabled = False
    for name, original in getattr(model, "base_values", {}).items():
        trained[name] = parameters[name].data
        parameters[name].data = original
    try:
        yield model
    finally:
        for layer in layers:
            layer.enabled = True
        for name, data in trained.items():
            parameters[name].data = data


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Fold every update into its base weight and put the plain module back; a second call finds nothing to do.

    The sum is taken in fp32 and stored in the base's dtype. A weight that is shared (a tied LM head) is untied first:
    its update is its own. Raises ValueError for quantized weights. Returns how many modules were merged.
    """
    layers = adapters(model)
    for name, layer in layers.items():  # look at all before changing one
        if not layer.base_layer.weight.is_floating_point():
            stored = layer.base_layer.weight.dtype
            raise ValueError(f"{name} is quantized (stored as {stored}): merge into the 16-bit base instead")
    for name, layer in layers.items():
        base = layer.base_layer
        merged = (base.weight.float() + layer.delta()).to(base.weight.dtype)
        if len(_owners(model, base.weight)) > 1:
            base.weight = nn.Parameter(merged, requires_grad=False)
        else:
            base.weight.copy_(merged)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, base)
    for module in model.modules():  # trained biases return to the dtype of their module
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and weight.is_floating_point():
            bias.data = bias.data.to(weight.dtype)
    if layers:
        model.base_values = {}
    return len(layers)


# ---- PEFT's tensors -------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the adapter under the key that peft gives it, on the CPU, in fp32."""
    parameters = dict(model.named_parameters())
    return {
        PEFT_PREFIX + n: parameters[n].detach().to("cpu", torch.float32, copy=True).contiguous()
        for n in adapter_names(model)
    }


def match_keys(model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """Adapter key -> parameter name for every tensor of an adapter file, given by its shape.

    Every key and shape must be right; a model on the meta device will do. peft adds two kinds of tensors of its own:
    bookkeeping copies of a head with bias="all" (passed over), and the base weights of adapted embeddings (taken).
    Raises ValueError naming what is missing, unexpected or misshapen.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = {PEFT_PREFIX + n: n for n in adapter_names(model)}
    base = {f"{n}.base_layer.weight" for n, m in adapters(model).items() if isinstance(m, LoRAEmbedding)}
    base |= {f"{n}.base_layer.weight" for n in adapters(model) if n.rsplit(".", 1)[-1] == "lm_head"}
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
    places = Counter(n.rsplit(".", 1)[-1] for n in adapters(model))
    left = len(tensors) - len(names)
    return (
        f"{len(names)} tensors matched ({', '.join(f'{v} {k}' for k, v in kinds.items())}) on "
        f"{', '.join(f'{v} {k}' for k, v in places.items())}"
        + (f"; {left} bookkeeping tensors of peft's passed over" if left else "")
    )


def _refuse(problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the adapter does not fit this model: {_one_line(problems[:4])}{more}")


def _one_line(problems: list[str]) -> str:
    """Problems as one readable line, whatever names a file made up."""
    texts = ["".join(c if c.isprintable() else " " for c in p[:500]) for p in problems[:20]]
    return "; ".join(texts) + ("; ..." if len(problems) > 20 else "")


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
    return all(_is_regex(v, "(?:^|.*?[.]){}" + LAYER) for v in several)


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


def adapter_config(adapter: Adapter) -> dict:
    """The adapter_config.json that peft reads."""
    values = {key: getattr(adapter, name) for name, (key, _, _) in FORMAT.items()}
    values = {k: (list(v) or None) if isinstance(v, tuple) else v for k, v in values.items()}
    if values["target_modules"] == ["all-linear"]:
        values["target_modules"] = "all-linear"
    return {"peft_type": "LORA", "inference_mode": True, "init_lora_weights": True, "fan_in_fan_out": False} | values


def read_adapter_config(about: dict) -> Adapter:
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
            f"{_one_line(wrong)}. Way out: load it with peft on its own base, merge_and_unload, save_pretrained, and "
            "give that folder as --base"
        )
    return Adapter(**values)
