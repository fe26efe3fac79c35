"""The only file that touches transformers' model classes: backbone, packed attention, pooling, head, quantization.

Attention is one function in transformers' attention interface. It sees a micro-batch as one row of concatenated
sequences and keeps them apart by their lengths; no mask tensor exists (PITFALLS: packed rows leak under the stock one).
"""

import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.utils import cached_file, logging

import lora
import optim
from configs import UserError

ATTENTION = "lasttoken"
ENCODERS = ("bert", "roberta", "modernbert", "deberta-v2")
PACKS = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3", "bert", "roberta", "modernbert")  # each tested
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?"
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
logging.set_verbosity_error()  # its tables of missing weights: we account for every tensor ourselves


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


# ---- the base -------------------------------------------------------------------------------------------------------


def find_base(base: str) -> str:
    """The base as transformers takes it: a local folder (also relative to this project), or a hub name.

    Raises UserError for a folder that is missing or holds no config, before anything is loaded.
    """
    for folder in (Path(base), Path(__file__).parent / base):
        if os.path.isdir(folder):
            if not (folder / "config.json").exists():
                if (folder / "adapter_config.json").exists():
                    raise UserError(f"--base {base}: this folder is an adapter; name its base, and it with --adapter")
                raise UserError(f"--base {base}: no config.json in this folder; give a folder saved by transformers")
            return str(folder)
    if not re.fullmatch(HUB_NAME, base):
        known = "give a local folder or a hub name such as Qwen/Qwen2.5-0.5B"
        raise UserError(f"--base {one_line(base)}: no such folder; {known}")
    return base


def one_line(error) -> str:
    """A foreign text's first line, cut to a readable length."""
    return "".join(c if c.isprintable() else " " for c in (str(error).strip().split("\n") or [""])[0][:200])


def need_weights(folder: str) -> None:
    """Raise UserError when a local base folder holds no weights, or names or links to files outside of itself."""
    if not os.path.isdir(folder):
        return
    kinds = (".safetensors", ".bin")
    names = [n for n in os.listdir(folder) if n.endswith((*kinds, ".json")) or not os.path.isdir(f"{folder}/{n}")]
    if not [n for n in names if n.endswith(kinds) and not n.startswith("adapter_")]:
        raise UserError(f"--base {folder}: no weights in this folder (model.safetensors or its shards)")
    for name in sorted(names, key=lambda n: not n.endswith(kinds)):
        if not own_file(Path(folder) / name):
            raise UserError(f"--base {folder}: {name} is no file of this folder (a link out of it?): copy it there")
    for index in Path(folder).glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise UserError(f"--base {folder}: {index.name} is no index of shards ({type(e).__name__})") from None
        outside = [s for s in shards if not isinstance(s, str) or s in ("", ".", "..") or Path(s).name != s]
        if outside:
            raise UserError(f"--base {folder}: {index.name} names {outside[0]!r:.200}, outside the folder: not read")


def own_file(path: Path) -> bool:
    """Whether a path is a regular file of its folder, or a link that stays in it or in the hub's cache around it."""
    cache = path.parent.parents[1] if path.parent.parent.name == "snapshots" else path.parent
    return path.is_file() and cache.resolve() in path.resolve().parents


def need_base(base: str) -> str:
    """Where the base is, once its config and weights are known to be there. Raises UserError before anything loads."""
    folder = find_base(base)
    need_weights(folder)
    stored = getattr(load_config(base), "quantization_config", None)
    if stored:
        raise UserError(f"--base {base} is stored quantized: give the 16-bit base it was made from, with --quant nf4")
    return folder


def find_adapter(adapter: str) -> Path:
    """The folder of a PEFT adapter: a local one, or a hub name's, fetched. Raises UserError for what is never read."""
    folder, files = Path(adapter), ("adapter_config.json", "adapter_model.safetensors")
    if not os.path.isdir(folder) and re.fullmatch(HUB_NAME, adapter) and "/" in adapter:
        try:
            folder = [Path(cached_file(adapter, name)).parent for name in files][0]
        except (OSError, ValueError) as e:
            raise UserError(f"--adapter {adapter}: not to be had ({one_line(e)}); give a folder") from None
    if not os.path.isdir(folder):
        raise UserError(f"--adapter {one_line(adapter)}: no such folder; give the one that peft saved")
    missing = [n for n in files if not (folder / n).exists()]
    if missing and any(folder.glob("adapter_model.bin")):
        raise UserError(
            f"--adapter {adapter}: adapter_model.bin is a pickle, which is never read: load it with peft where you "
            "trust it, and save_pretrained writes adapter_model.safetensors"
        )
    if missing:
        raise UserError(f"--adapter {adapter}: no {missing[0]} there; give the folder that peft saved")
    links = [n for n in files if not own_file(folder / n)]
    if links:
        raise UserError(f"--adapter {adapter}: {links[0]} is no file of this folder (a link out of it?): copy it there")
    return folder


def stored_labels(base: str, rows: int) -> tuple[str, ...]:
    """Class names of a base that is a classifier (with `rows` outputs, if not 0), or else the numbers below `rows`."""
    config = load_config(base)
    if rows > 100_000:
        raise UserError(f"the adapter's head, score.weight or the like, claims {rows:,} outputs: it is damaged")
    whole = any("ForSequenceClassification" in a for a in config.architectures or ())
    if whole and rows in (0, config.num_labels):
        return tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return tuple(str(i) for i in range(rows))


def stored_pooling(base: str) -> str:
    """The pooling with which transformers' own classifier of this base was trained."""
    config = load_config(base)
    if config.model_type == "modernbert":
        return config.classifier_pooling
    return "cls" if config.model_type in ENCODERS else "last"


def need_vocabulary(base: str, tokens: int) -> None:
    """Raise UserError when the tokenizer has more tokens than the base has embeddings."""
    rows = load_config(base).vocab_size
    if tokens > rows:
        raise UserError(f"--base {base}: its tokenizer has {tokens} tokens for {rows} embeddings")


def load_config(base: str):
    """The transformers config of a base. Raises UserError with what to do when it cannot be had."""
    try:
        config = AutoConfig.from_pretrained(find_base(base), trust_remote_code=False).get_text_config()
        config._attn_implementation = None  # a kernel of its choice would be fetched and run
        config.transformers_weights = None  # a file of its choice may lie anywhere
        return config
    except UserError:
        raise
    except Exception as e:  # whatever a foreign file can make of it
        if "custom code" in str(e) or "trust_remote_code" in str(e):
            raise UserError(
                f"--base {base}: it needs code of its own (auto_map), which is never run, and transformers has no "
                "class for it; take a base of a family that transformers knows"
            ) from None
        raise UserError(
            f"--base {base}: not to be had ({one_line(e)}); for a gated base accept its licence on its hub page and "
            "set HF_TOKEN, offline give a local folder with --base"
        ) from None


def packs(config) -> bool:
    """Whether the family is known to compute packed rows right with our attention; others run right-padded.

    A list, not transformers' own flag: families with that flag still drop attention sinks, ignore chunked masks or
    carry state from one row to the next (gpt-oss, Llama 4, hybrids).
    """
    return config.model_type in PACKS


def load_language_model(
    base: str,
    device: torch.device,
    dtype: torch.dtype,
    random_seed: int | None = None,
    quant: str = "none",
    compute: torch.dtype = torch.float32,
):
    """The base with its LM head, every tensor accounted for; with random_seed its weights are drawn, not loaded.

    quant, compute: as in load_classifier.
    """
    if random_seed is None:
        model, fresh = _load(AutoModelForCausalLM, base, "auto" if quant == "nf4" else dtype)
        _refuse_missing(base, fresh)
        model.base_fingerprint = fingerprint(model)
        if quant == "nf4":
            quantize(model.base_model, device, compute)
            for p in model.parameters():
                p.data = p.data.to(dtype) if p.is_floating_point() else p.data
    else:
        torch.manual_seed(random_seed)
        options = {"dtype": dtype, "attn_implementation": _attention(base)}
        model = _from_config(AutoModelForCausalLM, base, _config(base), **options)
        model.get_input_embeddings().register_forward_hook(_cast_out)
    return model.to(device)


def language_skeleton(base: str) -> nn.Module:
    """A decoder with its LM head and no weights (on the meta device). Raises UserError for an encoder."""
    config = _config(base)
    if config.model_type in ENCODERS:
        raise UserError(f"--base {base}: {config.model_type} is an encoder, which writes no text; give a decoder")
    with torch.device("meta"):
        return _from_config(AutoModelForCausalLM, base, config)


@contextmanager
def generating(lm: nn.Module):
    """Inside the block a language model takes transformers' `generate`: eval mode, stock attention, a cache, and no
    setting of the base's generation_config.json. Afterwards everything is exactly as it was.
    """
    modes, before = [(m, m.training) for m in lm.modules()], lm.generation_config
    packed, use_cache = lm.config._attn_implementation, lm.config.use_cache
    try:
        lm.eval()
        lm.generation_config, lm.config.use_cache = GenerationConfig(), True
        lm.config._attn_implementation = "sdpa" if packed == ATTENTION else packed
        yield lm
    finally:
        lm.generation_config, lm.config.use_cache, lm.config._attn_implementation = before, use_cache, packed
        for module, mode in modes:
            module.training = mode


def complete(
    lm, prompts: list[list[int]], pad: int, stops, precision="fp32", most=256, temperature=0.0, top_p=1.0, seed=0
) -> list[list[int]]:
    """At most `most` token ids after each prompt, up to and with its first stop token, from one left-padded batch.

    Temperature 0 is greedy; else tokens are drawn from seed. Neither the model nor torch's random state is changed.
    """
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=lm.device)  # (B, L)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=lm.device)
    draw = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else {}
    ends = {"max_new_tokens": most, "pad_token_id": pad, "eos_token_id": sorted(stops) or None}
    gpus = [lm.device] if lm.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), autocast(lm.device, precision), generating(lm):
        torch.manual_seed(seed)
        out = lm.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**ends, **draw))
    found = out[:, longest:].tolist()
    return [row[: next((t + 1 for t, token in enumerate(row) if token in stops), len(row))] for row in found]


def vocabulary_head(lm: nn.Module):
    """The LM head as a function: states (N, D) -> logits (N, V), capped where the family caps them."""
    head, cap = lm.get_output_embeddings(), getattr(lm.config, "final_logit_softcapping", None)
    return head if not cap else lambda hidden: torch.tanh(head(hidden) / cap) * cap


def vocabulary_modules(lm: nn.Module) -> tuple[str, ...]:
    """Names of the embedding and the LM head, adapted or not."""
    ends = (lm.get_input_embeddings(), lm.get_output_embeddings())
    return tuple(n for n, m in lm.named_modules() if any(m is end for end in ends))


def _from_config(auto, base: str, config, **options) -> nn.Module:
    """A model with drawn weights. Raises UserError for a family or a config that transformers cannot make one of."""
    try:
        return auto.from_config(config, trust_remote_code=False, **options)
    except Exception as e:  # whatever a foreign config can make of it
        raise UserError(f"--base {base}: no model of this kind can be made of it ({one_line(e)})") from None


def _config(base: str, **changes):
    config = load_config(base)
    for name, value in {"use_cache": False, **changes}.items():
        setattr(config, name, value)
    return config


def _attention(base: str) -> str | None:
    return ATTENTION if packs(load_config(base)) else None  # None: transformers' choice, for DeBERTa has one kind only


def _load(auto, base: str, dtype, **changes) -> tuple[nn.Module, list[str]]:
    """A model on the CPU and the names of its tensors that the base does not hold, or holds in another size."""
    folder = find_base(base)
    need_weights(folder)
    options = {"config": _config(base, **changes), "dtype": dtype, "attn_implementation": _attention(base)}
    safe = {"trust_remote_code": False, "weights_only": True, "ignore_mismatched_sizes": True}
    try:
        with without_adapter(folder) as folder:
            model, info = auto.from_pretrained(folder, **options, **safe, output_loading_info=True)
    except Exception as e:  # whatever a foreign file, pickled ones included, can make of loading
        raise UserError(f"--base {base}: its weights cannot be loaded ({type(e).__name__}: {one_line(e)})") from None
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise UserError(f"--base {base}: an adapter lies beside this base and was put into it; give the base alone")
    model.get_input_embeddings().register_forward_hook(_cast_out)
    return model, sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})


def _refuse_missing(base: str, names: list[str]) -> None:
    if names:
        raise UserError(
            f"--base {base}: {len(names)} tensors are missing from its weights or misshapen ({names[0]}, ...)"
        )


@contextmanager
def without_adapter(folder: str):
    """The base's folder; where an adapter lies in it, a view without it, for transformers would put it in by itself."""
    if not os.path.isfile(os.path.join(folder, "adapter_config.json")):
        yield folder
        return
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {folder} holds an adapter too, which is left out (see infer.py --adapter)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as view:
        for path in Path(folder).iterdir():
            if not path.name.startswith("adapter_"):
                os.symlink(path.resolve(), Path(view) / path.name)
        yield view


def _cast_out(module, inputs, output):
    """fp32 from the embedding on: the residual stream of a half-precision model overflows otherwise."""
    return output.float()


def quantize(backbone: nn.Module, device: torch.device, compute: torch.dtype) -> None:
    """Store the linears of the layers in nf4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).

    One module at a time goes to the device, so neither memory ever holds the 16-bit base whole. Embeddings, norms and
    every head stay as they are; so do linears whose inputs are no multiple of a block of 64, of which bitsandbytes'
    CPU kernel loses the scales. compute: the dtype of products. Raises UserError without bitsandbytes.
    """
    try:
        bnb = optim.bitsandbytes()
    except ImportError:
        raise UserError("--quant nf4 needs bitsandbytes: pip install bitsandbytes") from None

    class NF4(bnb.nn.Linear4bit):
        """The product alone: its own forward repacks weights for AVX512-BF16 (rounded, no gradient), casts biases."""

        def forward(self, x):
            y = bnb.matmul_4bit(x.to(self.compute_dtype), self.weight.t(), quant_state=self.weight.quant_state)
            y = y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)  # autocast leaves it in half precision
            return y if self.bias is None else y + self.bias.to(y.dtype)

    nf4 = {"compress_statistics": True, "quant_type": "nf4"}
    for layer in decoder_layers(backbone):
        for name, linear in [(n, m) for n, m in layer.named_modules() if type(m) is nn.Linear]:
            if linear.in_features % 64 == 0:
                sizes = linear.in_features, linear.out_features, linear.bias is not None
                small = NF4(*sizes, compute_dtype=compute, device="meta", **nf4)
                weight = linear.weight.data.to(compute)  # dequantized to the dtype of products, not rounded to another
                small.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=small, **nf4).to(device)
                small.bias = linear.bias
                layer.set_submodule(name, small)


def fingerprint(model: nn.Module) -> dict:
    """What makes a base itself: its sizes, and of every matrix the mean and mean magnitude of 64 spread-out weights."""
    sizes = "model_type hidden_size num_hidden_layers num_attention_heads vocab_size tie_word_embeddings".split()
    weights = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and name not in getattr(model, "fresh", ()):
            sample = p.detach().flatten()[:: max(1, p.numel() // 64)][:64].double()
            weights[name] = [float(sample.mean()), float(sample.abs().mean())]
    return {**{k: getattr(model.config, k, None) for k in sizes}, "weights": weights}


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
    """transformers' own modules of a sequence classifier under their own names, run over packed rows.

    So parameter names are those of its checkpoints and of peft's adapters. The head is the family's own: dropout and
    a bias-free linear `score` for decoders, poolers and `classifier` for encoders, fp32 whatever the rest is. With
    `words` it is a causal LM, and the logits of class c are those of its words' rows of the LM head, summed as
    probabilities. heads: names of the head's modules; fresh: names of tensors that the base did not hold.
    """

    def __init__(self, whole: nn.Module, pooling: str = "last", dropout: float = 0.0, words=(), fresh=()):
        super().__init__()
        for name, module in whole.named_children():
            self.add_module(name, module)
        self.config, self.prefix = whole.config, whole.base_model_prefix
        self.pooling, self.words, self.fresh = pooling, words, tuple(fresh)
        self.family, self.architecture = self.config.model_type, type(whole).__name__
        outside = () if words else tuple(n for n, _ in whole.named_children() if n != self.prefix)
        pooler = () if words or getattr(self.backbone, "pooler", None) is None else (f"{self.prefix}.pooler",)
        self.heads = outside + pooler
        if words:
            sizes = [len(w) for w in words]
            self.word_spans = [slice(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
            self.register_buffer("word_ids", torch.tensor([i for w in words for i in w]), persistent=False)
        elif self.family not in ENCODERS:
            if not hasattr(self, "score"):
                raise UserError(f"{self.family}: its head is not known here; the encoders are {', '.join(ENCODERS)}")
            self.dropout = nn.Dropout(dropout)
        for name in self.heads:
            self.get_submodule(name).float()

    @property
    def backbone(self) -> nn.Module:
        return getattr(self, self.prefix)

    @property
    def outputs(self) -> int:
        """Columns of the logits."""
        return len(self.words) or self.config.num_labels

    def forward(self, batch) -> torch.Tensor:
        """fp32 logits (B, C) of a packed micro-batch (a data.Batch)."""
        pooled = pool(hidden_states(self.backbone, batch), batch.cu_seqlens, self.pooling)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.logits(pooled.float())

    def logits(self, pooled: torch.Tensor) -> torch.Tensor:
        """The head: pooled states (B, D) -> logits (B, C). Poolers of encoders read a sequence's first state."""
        if self.words:
            z = lora.output_rows(self.lm_head, pooled, self.word_ids)  # (B, words)
            cap = getattr(self.config, "final_logit_softcapping", None)
            z = torch.tanh(z / cap) * cap if cap else z
            return torch.stack([z[:, span].logsumexp(1) for span in self.word_spans], dim=1)
        if self.family == "bert":
            return self.classifier(self.dropout(self.bert.pooler(pooled[:, None])))
        if self.family == "roberta":
            return self.classifier(pooled[:, None])
        if self.family == "modernbert":
            return self.classifier(self.drop(self.head(pooled)))
        if self.family == "deberta-v2":
            return self.classifier(self.dropout(self.pooler(pooled[:, None])))
        return self.score(self.dropout(pooled))


def _parts(base: str, outputs: int, dropout: float, words) -> tuple[type, dict]:
    """transformers' class of model for a head, and what its config must say for it."""
    if words:
        return AutoModelForCausalLM, {}
    encoder = load_config(base).model_type in ENCODERS
    rates = {n: dropout for n in ("classifier_dropout", "cls_dropout", "pooler_dropout") if encoder}
    return AutoModelForSequenceClassification, {"num_labels": outputs, **rates}


def skeleton(base: str, outputs: int, pooling: str = "last", words=()) -> Classifier:
    """A classifier without weights (on the meta device), to check structure before anything is loaded.

    Raises UserError for a family without the head, or a head that the family's logits do not allow.
    """
    auto, changes = _parts(base, outputs, 0.0, words)
    config = _config(base, **changes)
    if words and (config.model_type in ENCODERS or any(hasattr(config, n) for n in ("logit_scale", "logits_scaling"))):
        raise UserError(f"--head label_words on {config.model_type}: it needs a decoder with a plain LM head")
    with torch.device("meta"):
        model = Classifier(_from_config(auto, base, config), pooling, 0.0, words)
    if pooling == "cls" and config.model_type not in ENCODERS:
        raise UserError(f"--pooling cls on {config.model_type}: a causal decoder's first token sees nothing; take last")
    return model


def check_structure(model: Classifier, layers: int, max_length: int) -> None:
    """Raise UserError for trained layers or lengths that a skeleton does not have, before weights are loaded."""
    if layers > len(decoder_layers(model.backbone)):
        raise UserError(f"--train_layers {layers}: this base has {len(decoder_layers(model.backbone))} layers")
    tables = ("position_embeddings", "wpe")
    for name, table in model.backbone.named_modules():
        if isinstance(table, nn.Embedding) and name.rsplit(".", 1)[-1] in tables:
            most = table.num_embeddings - first_position(model.backbone)
            if max_length > most:
                raise UserError(f"--max_length {max_length}: this base has positions for {most} tokens; lower it")


def load_classifier(
    base: str,
    outputs: int,
    device: torch.device,
    dtype: torch.dtype,
    pooling: str = "last",
    dropout: float = 0.0,
    words=(),
    quant: str = "none",
    compute: torch.dtype = torch.float32,
    seed: int = 0,
) -> Classifier:
    """A classifier on its device: the base's weights in `dtype`, or its layers in nf4; a fresh head drawn from seed.

    outputs: columns of the logits; words: token ids of each class, for a head of label words; compute: the dtype of
    nf4 products. A base that is a classifier with this many outputs brings its head. Raises UserError when weights
    are missing or do not fit.
    """
    auto, changes = _parts(base, outputs, dropout, words)
    whole, fresh = _load(auto, base, "auto" if quant == "nf4" else dtype, **changes)
    model = Classifier(whole, pooling, dropout, words, fresh)
    _refuse_missing(base, [n for n in fresh if not lora.within(n, model.heads)])
    model.base_fingerprint = fingerprint(model)
    torch.manual_seed(seed)  # the head follows from the seed alone, whatever loading drew before
    for linear in (m for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" in fresh):
        linear.reset_parameters()
        nn.init.normal_(linear.weight, std=0.02)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    if quant == "nf4":
        quantize(model.backbone, device, compute)
        for name, p in model.named_parameters():
            if p.is_floating_point() and not lora.within(name, model.heads):
                p.data = p.data.to(device, dtype)
    model.to(device)
    strays = {str(p.device) for p in model.parameters() if p.device != device}
    if strays:
        raise AssertionError(f"weights on {strays}, expected all on {device}")
    return model


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
    layers = decoder_layers(model.backbone)
    modules = [model.get_submodule(n) for n in model.heads]
    if count > 0:
        modules += [*layers[-count:], *(m for n, m in model.backbone.named_children() if "norm" in n)]
    if count == -1:
        modules.append(model)
    chosen = {id(p) for m in modules for p in m.parameters()}
    for p in model.parameters():
        p.requires_grad_(id(p) in chosen)
        if id(p) in chosen:
            p.data = p.data.float()
    return [n for n, p in model.named_parameters() if p.requires_grad]


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a backbone."""
    lists = [m for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and re.search(r"(layers?|h)$", n)]
    if not lists:
        raise UserError(f"{type(backbone).__name__} has no list of layers")
    return lists[0]


def add_adapter(model: Classifier, adapter: lora.Adapter) -> None:
    """LoRA on the backbone and a trained head; everything else frozen."""
    lora.inject(model, adapter)
    lora.train_only(model)


def head_to_save(model: Classifier) -> tuple[str, ...]:
    """What an adapter trains and saves whole beside its updates: the output layer, and what the base did not hold."""
    last = [n for n in ("score", "classifier") if n in model.heads]
    return tuple(last + [n for n in model.heads if n not in last and any(lora.within(f, [n]) for f in model.fresh)])


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of a model once: what a tied LM head shares stands under the embedding's name."""
    seen, found = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            found[name] = tensor.detach()
        seen.add(tensor.data_ptr())
    return found


def classifier_config(model: Classifier, names, dtype: str = "float32", pad: int | None = None) -> dict:
    """The config.json with which transformers loads the whole model as its own. names: of the classes."""
    config = plain_config(model)
    config.update(architectures=[model.architecture], dtype=dtype)
    config.pop("use_cache", None)
    tied = model.words and model.lm_head.weight is model.backbone.get_input_embeddings().weight
    if model.words:
        return {**config, "tie_word_embeddings": bool(tied)}
    if pad is not None and model.family not in ENCODERS:
        config["pad_token_id"] = pad  # transformers pools the last token that is not this one
    if model.family == "modernbert":
        config["classifier_pooling"] = model.pooling
    if model.outputs == 1:
        config["problem_type"] = "regression"
    return {**config, "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def transformers_pooling(model: Classifier) -> tuple[str, ...]:
    """The poolings with which transformers' own class computes what this one does."""
    return {"modernbert": ("cls", "mean")}.get(model.family, ("cls",) if model.family in ENCODERS else ("last",))


def plain_config(model: nn.Module) -> dict:
    """A model's config as its own file holds it: what differs from the family's defaults, no paths, code or kernels."""
    left_out = ("_name_or_path", "_attn_implementation", "transformers_version", "auto_map", "transformers_weights")
    return {k: v for k, v in model.config.to_diff_dict().items() if k not in left_out}


def checkpoint_activations(backbone: nn.Module) -> None:
    """Recompute activations in the backward pass; never reentrant, which trains nothing on a frozen base."""
    backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


# ---- numbers about a model ------------------------------------------------------------------------------------------


def training_flops(model: Classifier, lengths) -> float:
    """Model FLOPs of one forward and backward pass over rows of these lengths (B,), recomputation not counted.

    2 per weight and token forward, 2 for the gradient of activations, 2 for that of trained weights; attention
    4 * n^2 / 2 * width a layer forward (causal) and twice that backward. After Kaplan et al. 2020, arXiv:2001.08361.
    """
    linears = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)]
    frozen = sum(m.in_features * m.out_features for m in linears if not m.weight.requires_grad)
    trained = sum(m.in_features * m.out_features for m in linears if m.weight.requires_grad)
    backward = any(p.requires_grad for p in model.backbone.parameters())
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width *= config.num_attention_heads
    tokens, squares = float(sum(lengths)), float(sum(float(n) ** 2 for n in lengths))
    attention = 2 * squares * width * config.num_hidden_layers
    if not backward:
        return 2 * tokens * (frozen + trained) + attention
    return tokens * (4 * frozen + 6 * trained) + 3 * attention


def memory_estimate(model: Classifier, max_tokens: int, precision: str, checkpointing: bool) -> dict[str, float]:
    """Rough GB of one rank: weights, trained state (gradients, sums, AdamW), and activations of one micro-batch."""
    config = model.config
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

    layers = decoder_layers(model)
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
