"""LoRA, written by hand: inject, train, merge, disable, and PEFT's adapter format in and out.

    names = inject(model, ["q_proj", "v_proj"], rank=16, alpha=32, dropout=0.1)
    train_only(model, bias="none", extra=["score"])       # everything else is frozen
    tensors = adapter_state(model)                         # keys exactly as peft writes them
    load_adapter_state(model, tensors)                     # strict: every key and shape must match
    with disable(model): ...                               # the base, bit for bit
    merge(model)                                           # plain nn.Linear modules again

LoRA: Hu et al. 2021, https://arxiv.org/abs/2106.09685; rank-stabilised scale: Kalajdzievski 2023,
https://arxiv.org/abs/2312.03732. File format: https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import math
from contextlib import contextmanager

import torch
from torch import nn

PEFT_PREFIX = "base_model.model."
HEADS = ("lm_head", "score", "classifier")  # output layers: never part of all-linear, as in peft


class LoRALinear(nn.Module):
    """A frozen linear and its low-rank update: base(x) + B(A(dropout(x))) * scaling.

    base_layer: the nn.Linear (D_in -> D_out) it stands for; rank: columns of A; alpha: scaling is alpha / rank, or
    alpha / sqrt(rank) with rslora. A starts Kaiming-uniform, B at zero, both fp32 whatever the base's dtype. The
    submodule names are peft's, so that parameter names are adapter keys.
    """

    def __init__(self, base_layer: nn.Linear, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRA rank {rank}: expected 1 or more")
        device = base_layer.weight.device
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, device=device, dtype=torch.float32)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, device=device, dtype=torch.float32)
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
        """The update as one fp32 matrix (D_out, D_in)."""
        return (self.lora_B.weight.float() @ self.lora_A.weight.float()) * self.scaling


# ---- inject ---------------------------------------------------------------------------------------------------------


def find_targets(model: nn.Module, targets) -> list[str]:
    """Names of the linears that `targets` mean: exact last name segments, or all-linear for all but the output layer.

    Raises ValueError when a target matches nothing, matches something else than a linear, or is adapted already.
    """
    targets = list(targets)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    adapted = {n for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    if adapted:
        raise ValueError(f"the model already holds an adapter on {len(adapted)} modules: merge or reload it first")
    if targets == ["all-linear"]:
        return [n for n in linears if n.rsplit(".", 1)[-1] not in HEADS]
    found = {t: [n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] == t] for t in targets}
    missing = [t for t in targets if not found[t]]
    odd = [n for names in found.values() for n in names if n not in linears]
    if missing or odd:
        exists = sorted({n.rsplit(".", 1)[-1] for n in linears} - set(HEADS))
        wrong = [f"target {t} matches no module" for t in missing]
        wrong += [f"target {n} is no linear but {type(model.get_submodule(n)).__name__}" for n in odd[:3]]
        raise ValueError(f"{'; '.join(wrong)}: the linears here are {', '.join(exists)} (or all-linear)")
    wanted = {n for names in found.values() for n in names}
    return [n for n in linears if n in wanted]


def inject(model: nn.Module, targets, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> list[str]:
    """Put a LoRALinear in the place of every target and return their names. Nothing is frozen here: see train_only."""
    names = find_targets(model, targets)
    for name in names:
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, last, LoRALinear(getattr(owner, last), rank, alpha, dropout, rslora))
    return names


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """Name -> LoRALinear of every adapted module."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


# ---- what is trained ------------------------------------------------------------------------------------------------


def bias_names(model: nn.Module, bias: str) -> list[str]:
    """Parameter names that `bias` means: none; lora_only: of adapted linears; all: every bias (peft's rule)."""
    if bias == "none":
        return []
    if bias == "all":
        return [n for n, _ in model.named_parameters() if n.rsplit(".", 1)[-1] == "bias"]
    if bias == "lora_only":
        return [f"{n}.base_layer.bias" for n, m in adapters(model).items() if m.base_layer.bias is not None]
    raise ValueError(f"bias {bias}: expected none, lora_only or all")


def train_only(model: nn.Module, bias: str = "none", extra=()) -> list[str]:
    """Freeze everything but the adapters, the biases that `bias` means and the modules named in `extra`.

    What is trained becomes an fp32 master. The base's own biases are remembered, so that `disable` gives the base
    back exactly. Returns the names of the trained parameters.
    """
    biases = set(bias_names(model, bias))
    trained = {n for n, _ in model.named_parameters() if ".lora_A." in n or ".lora_B." in n} | biases
    trained |= {n for n, _ in model.named_parameters() if any(n.startswith(e + ".") for e in extra)}
    model.base_biases = {n: p.detach().clone() for n, p in model.named_parameters() if n in biases}
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
    everything = sum(p.numel() for p in model.parameters())
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
    for name, original in getattr(model, "base_biases", {}).items():
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
    """Fold every update into its base weight and put the plain linear back; a second call finds nothing to do.

    The sum is taken in fp32 and stored in the base's dtype. Raises ValueError for weights that cannot take it
    (quantized, or shared with another module). Returns how many modules were merged.
    """
    layers = adapters(model)
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(p.data_ptr(), []).append(name)
    for name, layer in layers.items():  # look at all before changing one
        weight = layer.base_layer.weight
        if not weight.is_floating_point():
            raise ValueError(f"{name} is stored as {weight.dtype}: merge into the 16-bit base instead")
        if len(owners[weight.data_ptr()]) > 1:
            shared = ", ".join(owners[weight.data_ptr()])
            raise ValueError(f"{name} shares its weight ({shared}): merging would change both")
    for name, layer in layers.items():
        base = layer.base_layer
        base.weight.copy_((base.weight.float() + layer.delta()).to(base.weight.dtype))
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, base)
    for module in model.modules():  # trained biases return to the dtype of their module
        if isinstance(module, nn.Linear) and module.bias is not None and module.bias.dtype != module.weight.dtype:
            module.bias.data = module.bias.data.to(module.weight.dtype)
    if layers:
        model.base_biases = {}
    return len(layers)


# ---- PEFT's format --------------------------------------------------------------------------------------------------


def adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every trained tensor under the key that peft gives it, on the CPU, in fp32."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {PEFT_PREFIX + n: p.detach().to("cpu", torch.float32, copy=True).contiguous() for n, p in named.items()}


def load_adapter_state(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy adapter tensors into the trained parameters. Every key, shape and value must be right, or nothing changes.

    Raises ValueError naming what is missing, unexpected, misshapen, not floating point or not finite.
    """
    wanted = {PEFT_PREFIX + n: p for n, p in model.named_parameters() if p.requires_grad}
    problems = []
    for side, keys in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if keys:
            first = ", ".join(sorted(keys)[:3])
            problems.append(f"{len(keys)} {side} tensors ({first}{', ...' if len(keys) > 3 else ''})")
    for key in sorted(wanted.keys() & tensors.keys()):
        got, want = tensors[key], wanted[key]
        if got.shape != want.shape:
            problems.append(f"{key} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        elif not got.is_floating_point():
            problems.append(f"{key} has dtype {got.dtype}, expected floating point")
        elif not torch.isfinite(got).all():
            problems.append(f"{key} holds values that are not finite")
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ValueError(f"the adapter does not fit this model: {'; '.join(problems[:4])}{more}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])


def adapter_config(base: str, targets, rank: int, alpha: float, dropout: float, bias: str, rslora: bool) -> dict:
    """The adapter_config.json that peft reads, for a classifier with its head in modules_to_save."""
    targets = list(targets)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": "all-linear" if targets == ["all-linear"] else targets,
        "bias": bias,
        "use_rslora": rslora,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": ["score"],
    }
