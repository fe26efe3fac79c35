"""The only file that touches transformers' model classes: backbone, packed attention, pooling, head.

Attention is one function in transformers' attention interface. It sees a micro-batch as one row of concatenated
sequences and keeps them apart by their lengths; no mask tensor exists (PITFALLS: packed rows leak under the stock one).
"""

import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.utils import logging

import lora
from configs import UserError

ATTENTION = "lasttoken"
ENCODERS = ("bert", "roberta", "modernbert", "deberta-v2")
PACKS = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3", "bert", "roberta", "modernbert")  # each tested
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- packed attention -----------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """How a row of concatenated sequences falls apart; shared by all layers of a forward pass."""

    cu_seqlens: torch.Tensor  # (B + 1,) int32
    lengths: tuple[int, ...]

    def __post_init__(self):
        self._gather = None

    def gather(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices (B, L) of each sequence's tokens in the packed row (its last one repeated), and (T,) the way back."""
        if self._gather is None:
            device, longest = self.cu_seqlens.device, max(self.lengths)
            starts, ends = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
            columns = torch.arange(longest, device=device)
            out = torch.minimum(starts[:, None] + columns, ends[:, None] - 1)  # (B, L)
            which = torch.repeat_interleave(
                torch.arange(len(self.lengths), device=device), ends - starts, output_size=sum(self.lengths)
            )
            back = which * longest + torch.arange(sum(self.lengths), device=device) - starts[which]  # (T,)
            self._gather = out, back
        return self._gather


def packed_attention(
    module,
    query,
    key,
    value,
    attention_mask=None,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    packed=None,
    **kwargs,
):
    """Block-diagonal attention over one packed row: query (1, H, T, d), key and value (1, H_kv, T, d) -> (1, T, H, d).

    Causal unless the module says otherwise; a sliding window lets token i see tokens i - window + 1 .. i (and as far
    ahead where not causal), as in transformers. Signature: https://huggingface.co/docs/transformers/attention_interface
    """
    if packed is None:
        raise AssertionError(f"{type(module).__name__} got no packing: its model does not pass keyword arguments on")
    unknown = [n for n in ("softcap", "s_aux", "position_bias") if kwargs.get(n) is not None]
    if unknown:
        raise UserError(f"{type(module).__name__} asks for {unknown}, which packed attention does not do")
    query, key = query.to(value.dtype), key.to(value.dtype)  # fp32 rotary angles on an fp32 residual leave them fp32
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    longest = max(packed.lengths)
    window = sliding_window if sliding_window and sliding_window < longest else None
    grouped = query.is_cuda and takes_grouped(query.device, query.dtype)
    if not grouped and key.shape[1] != query.shape[1]:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": grouped and key.shape[1] != query.shape[1]}
    if query.is_cuda and causal and window is None:
        return _padded(query, key, value, packed, options).transpose(1, 2), None
    outs = []
    parts = zip(*(t.split(packed.lengths, dim=2) for t in (query, key, value)), strict=True)
    for q, k, v in parts:  # (1, H, n, d)
        n = q.shape[2]
        band = _band(n, window, causal, q.device) if window and n > window else None
        outs.append(F.scaled_dot_product_attention(q, k, v, band, is_causal=causal and band is None, **options))
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _padded(query, key, value, packed: Packed, options: dict) -> torch.Tensor:
    """One causal kernel call over right-padded sequences: what follows a token is never seen, so no mask is needed."""
    out, back = packed.gather()
    q, k, v = (t[0][:, out].transpose(0, 1) for t in (query, key, value))  # (B, H, L, d)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)  # (B, H, L, d)
    return y.transpose(0, 1).flatten(1, 2)[None][:, :, back]  # (1, H, T, d)


def _band(n: int, window: int, causal: bool, device) -> torch.Tensor:
    """(n, n) bool: which keys a query sees within its window."""
    distance = torch.arange(n, device=device)[:, None] - torch.arange(n, device=device)[None, :]
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def takes_grouped(device, dtype) -> bool:
    """Whether the fused kernel takes fewer key heads than query heads: flash, from capability 8.0 in half precision."""
    return torch.cuda.get_device_capability(device) >= (8, 0) and dtype in (torch.float16, torch.bfloat16)


def attention_note(device: torch.device, config, precision: str) -> str:
    """Which attention runs here, and why."""
    causal = config.model_type not in ENCODERS
    if not packs(config):
        return f"stock attention on right-padded rows: {config.model_type} is not known to compute packed rows right"
    if device.type != "cuda":
        return "packed, one fused call a sequence: fastest on a CPU, where no padding is free"
    if not causal:
        return "packed, one fused call a sequence: a bidirectional row cannot be right-padded without a mask"
    if takes_grouped(device, DTYPES[precision]):
        return "packed, one causal flash call over a micro-batch, grouped key heads"
    return "packed, one causal memory-efficient call over a micro-batch, key heads expanded (below 8.0, or fp32)"


AttentionInterface.register(ATTENTION, packed_attention)
logging.disable_progress_bar()  # transformers' bars for weights; ours is the one of training


# ---- precision ------------------------------------------------------------------------------------------------------


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The autocast precision and why. By compute capability, for torch.cuda.is_bf16_supported() is True on a T4."""
    if wanted != "auto":
        return wanted, "as given"
    if device.type != "cuda":
        return "fp32", "a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"
    return ("bf16", name) if major >= 8 else ("fp16", name)


@contextmanager
def autocast(device: torch.device, precision: str):
    """Forward passes in half precision where asked for; fp32 runs as it is."""
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield


def weight_dtype(device: torch.device, precision: str) -> torch.dtype:
    """Of frozen weights: the autocast dtype on a GPU, fp32 on a CPU."""
    return DTYPES[precision] if device.type == "cuda" else torch.float32


# ---- backbone -------------------------------------------------------------------------------------------------------


def find_base(base: str) -> str:
    """The base as transformers takes it: a local folder (also relative to this project), or a hub name.

    Raises UserError for a folder that is missing or holds no weights, before anything is loaded.
    """
    for folder in (Path(base), Path(__file__).parent / base):
        if folder.is_dir():
            names = os.listdir(folder)
            if "config.json" not in names:
                raise UserError(f"--base {base}: no config.json in this folder; give a folder saved by transformers")
            return str(folder)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise UserError(f"--base {base}: no such folder; give a local folder or a hub name such as Qwen/Qwen2.5-0.5B")
    return base


def need_weights(folder: str) -> None:
    """Raise UserError when a local base folder holds no weights."""
    if os.path.isdir(folder) and not any(n.endswith((".safetensors", ".bin")) for n in os.listdir(folder)):
        raise UserError(f"--base {folder}: no weights in this folder (model.safetensors or its shards)")


def need_base(base: str) -> str:
    """Where the base is, once its config and weights are known to be there. Raises UserError before anything loads."""
    folder = find_base(base)
    need_weights(folder)
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise UserError(f"--base {base}: this folder also holds an adapter (adapter_config.json); give the base alone")
    load_config(base)
    return folder


def need_vocabulary(base: str, tokens: int) -> None:
    """Raise UserError when the tokenizer has more tokens than the base has embeddings."""
    rows = load_config(base).vocab_size
    if tokens > rows:
        raise UserError(f"--base {base}: its tokenizer has {tokens} tokens for {rows} embeddings")


def load_config(base: str):
    """The transformers config of a base. Raises UserError with what to do when it cannot be had."""
    try:
        return AutoConfig.from_pretrained(find_base(base), trust_remote_code=False).get_text_config()
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as e:
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"--base {base}: not to be had ({reason}); for a gated base accept its licence on its hub page and set "
            "HF_TOKEN, offline give a local folder with --base"
        ) from None


def packs(config) -> bool:
    """Whether the family is known to compute packed rows right with our attention; others run right-padded.

    A list, not transformers' own flag: families with that flag still drop attention sinks, ignore chunked masks or
    carry state from one row to the next (gpt-oss, Llama 4, hybrids).
    """
    return config.model_type in PACKS


def check_structure(base: str, pooling: str, targets, layers: int) -> None:
    """Raise UserError for pooling, targets or trained layers that this base does not have, before weights are loaded.

    targets: of the adapter, empty without one; layers: how many last layers are trained.
    """
    config = load_config(base)
    if pooling == "cls" and config.model_type not in ENCODERS:
        raise UserError(f"--pooling cls on {config.model_type}: a causal decoder's first token sees nothing; take last")
    with torch.device("meta"):
        skeleton = AutoModel.from_config(config)
    try:
        lora.find_targets(skeleton, targets)
    except ValueError as e:
        raise UserError(f"--targets {','.join(targets)}: {e}") from None
    if layers > len(decoder_layers(skeleton)):
        raise UserError(f"--train_layers {layers}: this base has {len(decoder_layers(skeleton))} layers")


def load_backbone(base: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The base without its LM head, on its device, weights in `dtype`, every tensor of it accounted for.

    Raises UserError when weights are missing or do not fit.
    """
    return _load(AutoModel, base, device, dtype)


def load_language_model(base: str, device: torch.device, dtype: torch.dtype, random_seed: int | None = None):
    """The base with its LM head, as load_backbone does; with random_seed its weights are drawn instead of loaded."""
    return _load(AutoModelForCausalLM, base, device, dtype, random_seed)


def _load(auto, base: str, device: torch.device, dtype: torch.dtype, random_seed: int | None = None) -> nn.Module:
    config = load_config(base)
    config.use_cache = False
    attention = ATTENTION if packs(config) else None  # None: transformers' choice, for DeBERTa has one kind only
    if random_seed is not None:
        torch.manual_seed(random_seed)
        model = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    else:
        folder = find_base(base)
        need_weights(folder)
        options = {"config": config, "dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
        try:
            model, info = auto.from_pretrained(folder, **options, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as e:
            reason = str(e).strip().split("\n")[0]
            raise UserError(f"--base {base}: its weights cannot be loaded ({reason})") from None
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(f"--base {base}: {len(missing)} tensors are missing from its weights ({missing[0]}, ...)")
    model.get_input_embeddings().register_forward_hook(_cast_out)
    return model.to(device)


def _cast_out(module, inputs, output):
    """fp32 from the embedding on: the residual stream of a half-precision model overflows otherwise."""
    return output.float()


def fingerprint(backbone: nn.Module) -> dict:
    """What makes a base itself: its sizes, and of every matrix the mean and mean magnitude of 64 spread-out weights."""
    sizes = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    weights = {}
    for name, p in backbone.named_parameters():
        if p.ndim == 2 and ".lora_" not in name:
            sample = p.detach().flatten()[:: max(1, p.numel() // 64)][:64].double()
            weights[name.replace(".base_layer", "")] = [float(sample.mean()), float(sample.abs().mean())]
    return {**{k: getattr(backbone.config, k, None) for k in sizes}, "weights": weights}


def compare_fingerprints(saved: dict, now: dict) -> list[str]:
    """What differs between the base of a run and this one, beyond the rounding of bf16; empty if nothing."""
    found = [f"{k} {now[k]}, expected {saved.get(k)}" for k in now if k != "weights" and now[k] != saved.get(k)]
    if found:
        return found
    for name, values in saved.get("weights", {}).items():
        got = now["weights"].get(name)
        room = 0.002 * values[1] + 1e-9  # bf16 rounds a weight by at most 0.2% of itself
        if got is None or not all(abs(a - b) <= room for a, b in zip(got, values, strict=True)):
            found.append(f"weights of {name}")
    return found


def hidden_states(backbone: nn.Module, batch) -> torch.Tensor:
    """Final hidden states (T, D) of a packed micro-batch (a data.Batch).

    A family that cannot pack runs right-padded inside, with the same result.
    """
    packed = Packed(batch.cu_seqlens, batch.lengths)
    if backbone.config._attn_implementation == ATTENTION:
        positions = batch.position_ids + first_position(backbone)
        out = backbone(input_ids=batch.input_ids[None], position_ids=positions[None], use_cache=False, packed=packed)
        return out.last_hidden_state[0]
    index, back = packed.gather()
    lengths = (batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]).long()
    mask = torch.arange(index.shape[1], device=index.device) < lengths[:, None]  # (B, L)
    out = backbone(input_ids=batch.input_ids[index], attention_mask=mask.long())
    return out.last_hidden_state.flatten(0, 1)[back]


def first_position(backbone: nn.Module) -> int:
    """The id of a sequence's first position: 0, but after the padding row in RoBERTa's table of positions."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


# ---- the classifier -------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A backbone and a head on one pooled state a sequence. Names are those of transformers' own classifiers.

    The head is dropout and a bias-free linear called `score`, fp32 whatever the rest is.
    """

    def __init__(self, backbone: nn.Module, classes: int, dropout: float = 0.0, pooling: str = "last"):
        super().__init__()
        self.model = backbone
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        hidden = backbone.config.hidden_size
        self.score = nn.Linear(hidden, classes, bias=False, device=backbone.device, dtype=torch.float32)
        nn.init.normal_(self.score.weight, std=0.02)

    def forward(self, batch) -> torch.Tensor:
        """fp32 logits (B, C) of a packed micro-batch (a data.Batch)."""
        pooled = pool(hidden_states(self.model, batch), batch.cu_seqlens, self.pooling)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.score(self.dropout(pooled.float()))


def pool(hidden: torch.Tensor, cu_seqlens: torch.Tensor, pooling: str) -> torch.Tensor:
    """One state (B, D) a sequence from packed states (T, D), by position only, never by comparing ids with pad."""
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if pooling == "last":
        return hidden[ends - 1]
    if pooling == "cls":
        return hidden[starts]
    lengths = ends - starts
    which = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths, output_size=len(hidden))
    total = hidden.new_zeros(len(lengths), hidden.shape[1], dtype=torch.float32).index_add(0, which, hidden.float())
    return total / lengths[:, None]


def train_layers(model: Classifier, count: int) -> list[str]:
    """Train the head and the last `count` layers with the final norm (0: the head alone; -1: the whole base), as fp32.

    Returns the names of the trained parameters.
    """
    layers = decoder_layers(model.model)
    chosen = set() if count == 0 else {id(p) for layer in layers[-count:] for p in layer.parameters()}
    if count > 0:
        rest = [m for n, m in model.model.named_children() if "norm" in n]
        chosen |= {id(p) for m in rest for p in m.parameters()}
    if count == -1:
        chosen = {id(p) for p in model.model.parameters()}
    chosen |= {id(p) for p in model.score.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
        if id(p) in chosen:
            p.data = p.data.float()
    model.base_biases = {}
    return [n for n, p in model.named_parameters() if p.requires_grad]


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a backbone."""
    lists = [m for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and re.search(r"layers?$", n)]
    if not lists:
        raise UserError(f"{type(backbone).__name__} has no list of layers")
    return lists[0]


def add_adapter(model: Classifier, targets, rank: int, alpha: float, dropout: float, bias: str, rslora: bool) -> None:
    """LoRA on the backbone and a trained head; everything else frozen."""
    lora.inject(model, targets, rank, alpha, dropout, rslora)
    lora.train_only(model, bias, extra=("score",))


def classifier_config(model: Classifier, names) -> dict:
    """The config.json with which transformers loads the whole model as its own sequence classifier."""
    config = plain_config(model.model)
    family = type(model.model).__name__.removesuffix("Model")
    config.update(architectures=[f"{family}ForSequenceClassification"], dtype="float32")
    config.update(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    return config


def plain_config(backbone: nn.Module) -> dict:
    """A base's config as its own file holds it: what differs from the family's defaults, no paths, no attention."""
    config = backbone.config.to_diff_dict()
    return {
        k: v for k, v in config.items() if k not in ("_name_or_path", "_attn_implementation", "transformers_version")
    }


def checkpoint_activations(backbone: nn.Module) -> None:
    """Recompute activations in the backward pass; never reentrant, which trains nothing on a frozen base."""
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


# ---- numbers about a model ------------------------------------------------------------------------------------------


def training_flops(model: Classifier, lengths) -> float:
    """Model FLOPs of one forward and backward pass over rows of these lengths (B,), recomputation not counted.

    2 per weight and token forward, 2 for the gradient of activations, 2 for that of trained weights; attention
    4 * n^2 / 2 * width a layer forward (causal) and twice that backward. After Kaplan et al. 2020, arXiv:2001.08361.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.score]
    frozen = sum(m.weight.numel() for m in linears if not m.weight.requires_grad)
    trained = sum(m.weight.numel() for m in linears if m.weight.requires_grad)
    backward = any(p.requires_grad for p in model.model.parameters())
    config = model.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width *= config.num_attention_heads
    tokens, squares = float(sum(lengths)), float(sum(float(n) ** 2 for n in lengths))
    attention = 2 * squares * width * config.num_hidden_layers
    if not backward:
        return 2 * tokens * (frozen + trained) + attention
    return tokens * (4 * frozen + 6 * trained) + 3 * attention


def memory_estimate(model: Classifier, max_tokens: int, precision: str, checkpointing: bool) -> dict[str, float]:
    """Rough GB of one rank: weights, trained state (gradients, sums, AdamW), and activations of one micro-batch."""
    config = model.model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    half = 4 if precision == "fp32" else 2
    mlp = getattr(config, "intermediate_size", 4 * config.hidden_size)
    layer = max_tokens * (config.hidden_size * (4 + 6 * half) + 3 * mlp * half)
    kept = max_tokens * config.hidden_size * 4
    layers = config.num_hidden_layers
    activations = layers * kept + layer if checkpointing else layers * layer
    parts = {"weights": weights, "trained state": trained * (4 + 8 + 8), "activations": activations}
    return {k: v / 1e9 for k, v in parts.items()}


@contextmanager
def activation_maxima(model: nn.Module):
    """Inside the block, note each layer's largest absolute output; the dict is filled after the forward pass."""
    maxima: dict[str, torch.Tensor] = {}

    def note(name):
        def hook(module, inputs, output):
            out = output[0] if isinstance(output, tuple) else output
            maxima[name] = out.detach().abs().max().float()

        return hook

    layers = decoder_layers(model.model)
    hooks = [layer.register_forward_hook(note(f"layer {i}")) for i, layer in enumerate(layers)]
    try:
        yield maxima
    finally:
        for hook in hooks:
            hook.remove()


def overflow_report(maxima: dict[str, torch.Tensor]) -> str:
    """The layer with the largest activations, or the first one that is not finite."""
    values = {k: float(v) for k, v in maxima.items()}
    for name, value in values.items():
        if value != value or value == float("inf"):
            return f"{name} is the first whose output is not finite"
    name = max(values, key=values.get)
    return f"largest activation {values[name]:.3g} in {name}"
