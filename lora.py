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
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

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


def _one_line(problems: list[str]) -> str:
    """Problems as one readable line, whatever names a file made up."""
    texts = ["".join(c if c.isprintable() else " " for c in p[:500]) for p in problems[:20]]
    return "; ".join(texts) + ("; ..." if len(problems) > 20 else "")
