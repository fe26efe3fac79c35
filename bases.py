"""Find and check a base."""

import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import AutoConfig
from transformers.utils import cached_file

from errors import UserError, one_line


def load_tokenizer(base: str):
    """The fast tokenizer of a base. Raises UserError when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as e:  # whatever a foreign file can make of it
        reason = (str(e).strip().split("\n") or [""])[0][:200]
        if "tiktoken" in reason or "sentencepiece" in reason.lower():  # DeBERTa-v3 is published as spm.model alone
            reason = "it is a sentencepiece model: pip install sentencepiece protobuf"
        raise UserError(f"--base {base}: no tokenizer could be loaded ({reason})") from None
    if not tokenizer.is_fast:
        raise UserError(f"--base {base}: its tokenizer has no fast version, which bulk encoding and offsets need")
    if not set(tokenizer("a b 1", add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}:
        raise UserError(f"--base {base}: no tokenizer files there (transformers made an empty one up)")
    tokenizer.model_max_length = int(1e9)  # lengths are limited by max_length, with a report
    return tokenizer


ENCODERS = ("bert", "roberta", "modernbert", "deberta-v2")
PACKS = ("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "phi3", "bert", "roberta", "modernbert")  # each tested
HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?"


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


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a backbone."""
    lists = [m for n, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and re.search(r"(layers?|h)$", n)]
    if not lists:
        raise UserError(f"{type(backbone).__name__} has no list of layers")
    return lists[0]
