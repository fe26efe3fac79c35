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
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

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
    of LoRA defines forward, add_factors(rank, options), which makes A and B, and factors() -> (A, B).
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
        self.lora_dropout = nn.Dropout(dropout)
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.enabled = True

    def delta(self) -> torch.Tensor:
        """The update as one fp32 matrix, shaped as the base's weight."""
        a, b = self.factors()
        update = (b.float() @ a.float()) * self.scaling
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

    def factors(self):
        return self.lora_A.weight, self.lora_B.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)  # (..., D_out)
        if not self.enabled:
            return out
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.weight.dtype)
        low = self.lora_A(self.lora_dropout(x))  # (..., rank)
        update = self.lora_B(low) * self.scaling
        return (out + update).to(out.dtype)


class LoRAEmbedding(LoRA):
    """An embedding (V, D): base(ids) + (B A)[:, ids] * scaling, without dropout, as in peft.

    A (rank, V) starts at zero, B normal. A base that scales its output (Gemma) scales the update too.
    """

    transposed = True

    def add_factors(self, rank, fp32):
        base = self.base_layer
        self.lora_embedding_A = nn.Parameter(torch.zeros(rank, base.num_embeddings, **fp32))
        self.lora_embedding_B = nn.Parameter(torch.randn(base.embedding_dim, rank, **fp32))

    def factors(self):
        return self.lora_embedding_A, self.lora_embedding_B

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(ids)  # (..., D)
        if not self.enabled:
            return out
        a, b = self.factors()
        rows = F.embedding(ids, a.T, self.base_layer.padding_idx)  # (..., rank)
        update = rows @ b.T * self.scaling
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            update = update * scale
        return (out + update).to(out.dtype)


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
    """Whether a module's name is one of `ends` or ends in one, by whole segments."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def within(name: str, ends) -> bool:
    """Whether a name lies in, or is, a module that `named` finds."""
    segments = name.split(".")
    parents = [".".join(segments[: i + 1]) for i in range(len(segments))]
    return any(named(parent, ends) for parent in parents)


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
    if targets in ALL_LINEAR:
        names = [name for name in linears if not set(HEADS) & {*name.split(".")}]
        unmatched = []
    elif isinstance(targets, str):
        names = [name for name in modules if re.fullmatch(targets, name)]
        unmatched = [] if names else [targets]
    else:
        names = [name for name in modules if named(name, targets)]
        unmatched = [target for target in targets if not any(named(name, [target]) for name in names)]
        names = [name for name in names if name in targets or in_layers(name, adapter)]

    # All of them must be of a kind that has an update.
    names = [name for name in names if not left_out(name, adapter, model)]
    problems = [f"target {target} matches no module" for target in unmatched]
    for name in names:
        if not isinstance(modules[name], (nn.Linear, nn.Embedding, Conv1D)):
            problems.append(f"target {name} is not a linear or an embedding but {type(modules[name]).__name__}")
    if not problems and not names:
        problems.append("the targets leave no module to adapt")
    if problems:
        known = sorted({name.rsplit(".", 1)[-1] for name in linears} - set(HEADS))
        raise ValueError(f"{in_one_line(problems, 5)}: the linears here are {', '.join(known)} (or all-linear)")
    return names


def left_out(name: str, adapter: Adapter, model: nn.Module) -> bool:
    """Whether a module that the targets name is not adapted: by `exclude`, or because it is trained whole.

    An update of weights that the base does not hold (model.fresh) could never be loaded: nothing stores what it is
    added to.
    """
    if isinstance(adapter.exclude, str):
        excluded = re.fullmatch(adapter.exclude, name) is not None
    else:
        excluded = named(name, adapter.exclude)
    fresh = f"{name}.weight" in getattr(model, "fresh", ())
    return excluded or fresh or within(name, adapter.saved)


def in_layers(name: str, adapter: Adapter) -> bool:
    """Whether a module is in one of the adapter's layers: the first number after the list's name is its layer."""
    if not adapter.layers:
        return True
    lists = [rf"(?:^|.*?\.){pattern}" for pattern in adapter.layers_pattern] or [r".*?\.[^.]*"]
    for pattern in lists:
        match = re.match(pattern + LAYER, name)
        if match:
            return match["layer"] is not None and int(match["layer"]) in adapter.layers
    return False


def inject(model: nn.Module, adapter: Adapter) -> list[str]:
    """Replace every target by its LoRA module and return their names. Nothing is frozen here: see train_only.

    Raises ValueError as find_targets, and for a module in `saved` that does not exist.
    """
    names = find_targets(model, adapter)
    modules = dict(model.named_modules())

    # A module that is trained whole and shares its weight (a tied LM head) gets one of its own.
    for end in adapter.saved:
        saved = [name for name in modules if name.endswith(end)]
        if not saved and end not in ("score", "classifier"):  # peft names both, whichever the model has
            raise ValueError(f"modules_to_save {in_one_line([end])} matches no module")
        for name in saved:
            for module in modules[name].modules():
                weight = getattr(module, "weight", None)
                if weight is not None and is_shared(model, weight):
                    module.weight = nn.Parameter(weight.detach().clone())

    for name in names:
        rank = by_pattern(adapter.rank_pattern, name, adapter.rank)
        alpha = by_pattern(adapter.alpha_pattern, name, adapter.alpha)
        base = modules[name]
        kind = LoRAEmbedding if isinstance(base, nn.Embedding) else LoRALinear
        model.set_submodule(name, kind(base, rank, alpha, adapter.dropout, adapter.rslora))
    model.adapter = adapter
    return names


def by_pattern(patterns: dict, name: str, default):
    """The value of the first pattern (a regex) that a module's name ends in."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def is_shared(model: nn.Module, weight: torch.Tensor) -> bool:
    """Whether the model has this weight, or its storage, under several names."""
    owners = 0
    for _, p in model.named_parameters(remove_duplicate=False):
        storage = p.data_ptr()  # 0 on the meta device
        if p is weight or storage == weight.data_ptr() != 0 and p.shape == weight.shape:
            owners += 1
    return owners > 1


def assert_moved(model: nn.Module) -> None:
    """After the first update no adapter may still be zero: a frozen graph would silently train nothing."""
    idle = [name for name, module in adapters(model).items() if module.idle()]
    if idle:
        raise AssertionError(f"{len(idle)} adapters did not move in the first step (first: {idle[0]})")


# ---- what is trained ------------------------------------------------------------------------------------------------


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the parameters of the model's adapter: updates, saved modules, and biases as `bias` says."""
    adapter = model.adapter
    if adapter.bias not in ("none", "lora_only", "all"):
        raise ValueError(f"bias {adapter.bias}: expected none, lora_only or all")
    adapted = adapters(model)
    saved = tuple(f"{name}." for name, _ in model.named_modules() if name.endswith(adapter.saved))  # peft: no segments

    def belongs(name: str) -> bool:
        owner, _, last = name.rpartition(".")
        if ".lora_" in name or name.startswith(saved):
            return True
        if last != "bias" or adapter.bias == "none":
            return False
        return adapter.bias == "all" or owner.removesuffix(".base_layer") in adapted

    return [name for name, _ in model.named_parameters() if belongs(name)]


def train_only(model: nn.Module) -> list[str]:
    """Freeze everything but the adapter, whose tensors become fp32 masters; returns the names of what is trained."""
    names = adapter_names(model)
    heads = getattr(model, "heads", HEADS)
    model.base_values = {}
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
        if not p.requires_grad:
            continue

        # The base's own biases and saved modules that are no heads are remembered, for `disable` to give them back.
        if ".lora_" not in name and not within(name, heads):
            model.base_values[name] = p.detach().clone()
        p.data = p.data.float()
    return names


def trainable_table(model: nn.Module) -> str:
    """What is trained: one line per pattern of names, with tensors, parameters and their share of all."""
    tensors, sizes = Counter(), Counter()
    everything = 0
    for name, p in model.named_parameters():
        everything += p.numel()
        if p.dtype == torch.uint8:  # nf4 stores two in a byte
            everything += p.numel()
        if p.requires_grad:
            pattern = ".".join("*" if segment.isdigit() else segment for segment in name.split("."))
            tensors[pattern] += 1
            sizes[pattern] += p.numel()

    rows = [(pattern, tensors[pattern], sizes[pattern]) for pattern in tensors]
    rows.append(("all", tensors.total(), sizes.total()))
    width = max(len("trainable"), *(len(pattern) for pattern, _, _ in rows))
    lines = [f"{'trainable':<{width}} {'tensors':>8} {'parameters':>13} {'share':>8}"]
    for pattern, count, size in rows:
        lines.append(f"{pattern:<{width}} {count:>8} {size:>13,} {size / everything:>8.3%}")
    return "\n".join(lines)


# ---- disable and merge ----------------------------------------------------------------------------------------------


@contextmanager
def disable(model: nn.Module):
    """Inside the block the model computes as its base, bit for bit: no update, and the base's own biases."""
    parameters = dict(model.named_parameters())
    trained = {}
    for name, values in getattr(model, "base_values", {}).items():
        trained[name] = parameters[name].data
        parameters[name].data = values
    adapted = adapters(model).values()
    for module in adapted:
        module.enabled = False
    try:
        yield model
    finally:
        for module in adapted:
            module.enabled = True
        for name, values in trained.items():
            parameters[name].data = values


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

    # A weight that is shared (a tied LM head) is untied first: the update is its module's own.
    for name, module in adapted.items():
        base = module.base_layer
        merged = base.weight.float() + module.delta()
        merged = merged.to(base.weight.dtype)
        if is_shared(model, base.weight):
            base.weight = nn.Parameter(merged, requires_grad=False)
        else:
            base.weight.copy_(merged)
        model.set_submodule(name, base)

    # Trained biases return to the dtype of their module.
    for module in model.modules():
        weight = getattr(module, "weight", None)
        bias = getattr(module, "bias", None)
        both = isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter)
        if both and weight.is_floating_point():
            bias.data = bias.data.to(weight.dtype)
    if adapted:
        model.base_values = {}
    return len(adapted)


def in_one_line(problems: list[str], most: int = 20) -> str:
    """Problems as one readable line, whatever names a file made up."""
    lines = ["".join(c if c.isprintable() else " " for c in problem[:500]) for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"and {len(problems) - most} more")
    return "; ".join(lines)
