"""LoRA, written by hand: inject, train, merge, disable. PEFT's files in and out are in peft_format.py.

    inject(model, Adapter(("q_proj", "v_proj"), rank=16, alpha=32, saved=("score",)))
    train_only(model)                                     # everything else is frozen
    tensors = peft_format.adapter_state(model)            # keys exactly as peft writes them
    peft_format.load_adapter_state(model, tensors)        # strict: every key and shape must match
    with disable(model): ...                              # the base, bit for bit
    merge(model)                                          # plain modules again

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scale: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732. File format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import math
import re
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from dropout import Dropout

LAYER = r"\.(?P<layer>\d+)\."
HEADS = ("lm_head", "score", "classifier")  # output layers: never part of all-linear, as in peft
ALL_LINEAR = ("all-linear", ("all-linear",))


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
    exclude: tuple[str, ...] | str = ()  # modules that are not adapted, in the form of targets
    layers: tuple[int, ...] = ()  # only these layers; empty: all
    layers_pattern: tuple[str, ...] = ()  # names of the list of layers; empty: any
    saved: tuple[str, ...] = ()  # modules trained and saved whole (modules_to_save), the head among them
    task: str = "SEQ_CLS"
    base: str = ""


# ---- the modules ----------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """A frozen module and the low-rank update of its weight: B A scaled by alpha / rank, or alpha / sqrt(rank).

    A has `rank` rows and B as many columns, both in fp32 whatever the base's dtype. One of them starts at zero, so that
    training starts from the base. Names of submodules and parameters are peft's, so that they are adapter keys. A kind
    of LoRA defines add_factors(rank, options), which makes A and B, and update(x), which is added to the base's output.
    """

    transposed = False  # whether the base stores its weight as (D_in, D_out)

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank {rank}: expected 1 or more")
        self.base_layer = base_layer
        fp32 = {"device": base_layer.weight.device, "dtype": torch.float32}
        self.add_factors(rank, fp32)
        self.lora_dropout = Dropout(dropout)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.enabled = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)  # (..., D_out)
        if not self.enabled:
            return out
        return (out + self.update(x)).to(out.dtype)

    def factors(self) -> list[nn.Parameter]:
        """A and B."""
        return [p for name, p in self.named_parameters() if "lora_" in name]

    def delta(self) -> torch.Tensor:
        """The update as one fp32 matrix, shaped as the base's weight."""
        a, b = self.factors()
        update = b @ a * self.scaling
        return update.T if self.transposed else update

    def idle(self) -> bool:
        """Whether the update is zero."""
        return not all(factor.any() for factor in self.factors())


class LoRALinear(LoRA):
    """A linear (..., D_in) -> (..., D_out), or GPT-2's transposed Conv1D: base(x) + B(A(dropout(x))) * scaling.

    A starts Kaiming-uniform, B at zero.
    """

    def add_factors(self, rank, fp32):
        base = self.base_layer
        self.transposed = isinstance(base, Conv1D)
        if self.transposed:
            inputs, outputs = base.weight.shape
        else:
            inputs, outputs = base.in_features, base.out_features
        self.lora_A = nn.Linear(inputs, rank, bias=False, **fp32)
        self.lora_B = nn.Linear(rank, outputs, bias=False, **fp32)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def update(self, x):
        if not torch.is_autocast_enabled(x.device.type):
            x = x.float()
        low = self.lora_A(self.lora_dropout(x))  # (..., rank)
        return self.lora_B(low) * self.scaling


class LoRAEmbedding(LoRA):
    """An embedding (V, D): base(ids) + (B A)[:, ids] * scaling, without dropout, as in peft.

    A (rank, V) starts at zero, B normal. A base that scales its output (Gemma) scales the update too.
    """

    transposed = True

    def add_factors(self, rank, fp32):
        base = self.base_layer
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, **fp32))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, **fp32))

    def update(self, ids):
        a, b = self.factors()
        rows = F.embedding(ids, a.T, self.base_layer.padding_idx)  # (..., rank)
        return rows @ b.T * self.scaling * getattr(self.base_layer, "embed_scale", 1)


def output_rows(linear: nn.Module, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """fp32 outputs (..., N) of the rows (N,) of a linear, adapted or not: what label words need of a large LM head."""
    base = getattr(linear, "base_layer", linear)
    bias = None if base.bias is None else base.bias[index].float()
    out = F.linear(x, base.weight[index].float(), bias)
    if linear is base or not linear.enabled:
        return out
    low = linear.lora_A(linear.lora_dropout(x))  # (..., rank)
    update = F.linear(low, linear.lora_B.weight[index])
    return out + update * linear.scaling


def adapters(model: nn.Module) -> dict[str, LoRA]:
    """Name -> module of every adapted module."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRA)}


# ---- inject ---------------------------------------------------------------------------------------------------------


def named(name: str, ends) -> bool:
    """Whether a module's name is, or ends in, one of `ends` by whole segments; or a regex means the whole of it."""
    if isinstance(ends, str):
        return re.fullmatch(ends, name) is not None
    return any(end in ends for end in _ends_of(name))


def _ends_of(name):
    """A name, and what is left of it without its first segments."""
    segments = name.split(".")
    starts = range(len(segments))
    return [".".join(segments[start:]) for start in starts]


def within(name: str, ends) -> bool:
    """Whether a name lies in, or is, a module that ends in one of `ends` by whole segments."""
    return any(f".{end}." in f".{name}." for end in ends)


def find_targets(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the linears and embeddings that an adapter means, by peft's rules.

    targets are ends of names by whole segments, all-linear for all linears but the output layer, or one regex. Raises
    ValueError when a target matches nothing, matches something else than a linear or an embedding, or is adapted
    already.
    """
    already = adapters(model)
    if already:
        raise ValueError(f"the model already holds an adapter on {len(already)} modules: merge or reload it first")
    modules = {name: module for name, module in model.named_modules() if name}
    linears = [name for name, module in modules.items() if isinstance(module, (nn.Linear, Conv1D))]

    # What the targets name.
    targets = adapter.targets
    ends = targets if isinstance(targets, str) else set(targets)
    names = [name for name in modules if named(name, ends)]
    problems = []
    if targets in ALL_LINEAR:
        names = [name for name in linears if not within(name, HEADS)]
    elif not isinstance(targets, str):
        matched = {end for name in names for end in _ends_of(name)}
        unmatched = [target for target in targets if target not in matched]
        problems = [f"target {target} matches no module" for target in unmatched]
        names = [name for name in names if name in targets or _in_layers(name, adapter)]

    # Not what is excluded or trained whole, nor weights that the base does not hold (model.fresh): an update of them
    # could never be loaded, because nothing stores what it is added to.
    fresh = getattr(model, "fresh", ())
    names = [
        name
        for name in names
        if not (named(name, adapter.exclude) or within(name, adapter.saved) or f"{name}.weight" in fresh)
    ]

    # All of them must be of a kind that has an update.
    for name in names:
        if name not in linears and not isinstance(modules[name], nn.Embedding):
            problems.append(f"target {name} is not a linear or an embedding but {type(modules[name]).__name__}")
    if not names and not problems:
        problems.append(f"targets {targets} leave no module to adapt")
    if problems:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears} - set(HEADS))
        raise ValueError(f"{in_one_line(problems, 5)}: the linears here are {', '.join(known)} (or all-linear)")
    return names


def _in_layers(name, adapter):
    """Whether a module is in one of the adapter's layers: the first number after the list's name is its layer."""
    if not adapter.layers:
        return True
    lists = [rf"(?:^|.*?\.){pattern}" for pattern in adapter.layers_pattern] or [r".*?\.[^.]*"]
    for pattern in lists:
        match = re.match(pattern + LAYER, name)
        if match:
            return int(match["layer"] or -1) in adapter.layers  # a branch of the regex may have no number
    return False


def inject(model: nn.Module, adapter: Adapter) -> list[str]:
    """Replace every target by its LoRA module and return their names. Nothing is frozen here: see train_only.

    Raises ValueError as find_targets, and for a module in `saved` that does not exist.
    """
    names = find_targets(model, adapter)
    modules = dict(model.named_modules())

    # A module that is trained whole and shares its weight (a tied LM head) gets one of its own.
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for end in adapter.saved:
        saved = [module for name, module in modules.items() if name.endswith(end)]
        if not saved and end not in ("score", "classifier"):  # peft names both, whichever the model has
            raise ValueError(f"modules_to_save {in_one_line([end])} matches no module")
        for module in nn.ModuleList(saved).modules():
            weight = getattr(module, "weight", None)
            if owners[id(weight)] > 1:
                module.weight = nn.Parameter(weight.detach().clone())

    for name in names:
        rank = _by_pattern(adapter.rank_pattern, name, adapter.rank)
        alpha = _by_pattern(adapter.alpha_pattern, name, adapter.alpha)
        base = modules[name]
        kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
        model.set_submodule(name, kind(base, rank, alpha, adapter.dropout, adapter.rslora))
    model.adapter = adapter
    return names


def _by_pattern(patterns, name, default):
    """The value of the first pattern (a regex) that a module's name ends in."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def assert_moved(model: nn.Module) -> None:
    """After the first update no adapter may still be zero: a frozen graph would silently train nothing."""
    idle = [name for name, module in adapters(model).items() if module.idle()]
    if idle:
        raise AssertionError(f"{len(idle)} adapters did not move in the first step (first: {idle[0]})")


# ---- what is trained ------------------------------------------------------------------------------------------------


BIASES = {"none": (), "lora_only": ("base_layer.bias",), "all": ("bias",)}  # ends of the names of those trained


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the parameters of the model's adapter: updates, saved modules, and biases as `bias` says."""
    adapter = model.adapter
    if adapter.bias not in BIASES:
        raise ValueError(f"bias {adapter.bias}: expected none, lora_only or all")
    biases = BIASES[adapter.bias]
    saved = tuple(f"{name}." for name, _ in model.named_modules() if name.endswith(adapter.saved))  # peft: no segments
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if ".lora_" in name or name.startswith(saved) or named(name, biases)]


def train_only(model: nn.Module) -> list[str]:
    """Freeze everything but the adapter, whose tensors become fp32 masters; returns the names of what is trained."""
    names = adapter_names(model)
    model.requires_grad_(False)
    model.base_values = {}
    for name in names:
        p = model.get_parameter(name).requires_grad_()

        # The base's own biases and saved modules that are no heads are remembered, for `disable` to give them back.
        if ".lora_" not in name and not within(name, getattr(model, "heads", HEADS)):
            model.base_values[name] = p.detach().clone()
        p.data = p.data.float()
    return names


def trainable_table(model: nn.Module) -> str:
    """What is trained: one line per pattern of names, with tensors, parameters and their share of all."""
    sizes = defaultdict(list)
    everything = 0
    for name, p in model.named_parameters():
        everything += p.numel() * (2 if p.dtype == torch.uint8 else 1)  # nf4 stores two in a byte
        if p.requires_grad:
            sizes[re.sub(r"\b\d+\b", "*", name)].append(p.numel())

    sizes["all"] = sum(sizes.values(), [])
    width = max(map(len, ["trainable", *sizes]))
    lines = [f"{'trainable':<{width}} {'tensors':>8} {'parameters':>13} {'share':>8}"]
    for pattern, counts in sizes.items():
        lines.append(f"{pattern:<{width}} {len(counts):>8} {sum(counts):>13,} {sum(counts) / everything:>8.3%}")
    return "\n".join(lines)


# ---- disable and merge ----------------------------------------------------------------------------------------------


@contextmanager
def disable(model: nn.Module):
    """Inside the block the model computes as its base, bit for bit: no update, and the base's own biases."""
    _exchange(model, enabled=False)
    try:
        yield model
    finally:
        _exchange(model, enabled=True)


def _exchange(model, enabled):
    """Turn updates on or off, and exchange trained biases and saved modules for what the base has there, or back."""
    values = getattr(model, "base_values", {})
    for name in values:
        p = model.get_parameter(name)
        trained = p.data
        p.data = values[name]
        values[name] = trained
    for module in adapters(model).values():
        module.enabled = enabled


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Fold every update into its base weight and put the plain module back; a second call finds nothing to do.

    The sum is taken in fp32 and stored in the base's dtype. Raises ValueError for quantized weights, before anything is
    changed. Returns how many modules were merged.
    """
    adapted = adapters(model)
    for name, module in adapted.items():
        weight = module.base_layer.weight
        if not weight.is_floating_point():
            raise ValueError(f"{name} is quantized (stored as {weight.dtype}): merge into the 16-bit base instead")

    # A weight of its own: where it was shared (a tied LM head) the update is still its module's alone.
    for name, module in adapted.items():
        base = module.base_layer
        merged = base.weight.float() + module.delta()
        base.weight = nn.Parameter(merged.to(base.weight.dtype), requires_grad=False)
        model.set_submodule(name, base)

    # Trained biases return to the dtype of their module.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, weight in parameters.items():
        bias = parameters.get(name.removesuffix("weight") + "bias")
        if bias is not None and weight.is_floating_point():
            bias.data = bias.data.to(weight.dtype)
    model.base_values = {}
    return len(adapted)


def in_one_line(problems: list[str], most: int = 20) -> str:
    """Problems as one readable line, whatever names a file made up."""
    text = "; ".join(problem[:500] for problem in problems[:most])
    if len(problems) > most:
        text += f"; and {len(problems) - most} more"
    return "".join(letter if letter.isprintable() else " " for letter in text)
