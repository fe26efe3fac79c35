"""Find and check a base: its folder or hub name, config, tokenizer, weight files and fingerprint.

Bases and adapters are other people's files. All that is done about hostile ones is here: nothing of theirs is run,
nothing outside their folder is read, and what cannot be loaded is a UserError of one line.
"""

import json
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

import formats
from errors import UserError, few, note, one_line, warning

HUB_NAME = r"\w[\w.-]*(/[\w.-]+)?"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
WEIGHT_FILES = (".safetensors", ".bin")
MOST_CLASSES = 100_000  # a damaged header claims more
# Of a config's sizes: what transformers would build for hours, or until the memory is full.
LARGEST = {"num_labels": MOST_CLASSES, "num_hidden_layers": 10_000, "num_attention_heads": 100_000}
LARGEST |= dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 10_000_000)
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Weights of other programs, by the ends of their names.
FOREIGN = """.gguf llama.cpp's:.pth the publisher's own pickle:.pt a pickle:.h5 TensorFlow's:.msgpack Flax's:.onnx ONNX
    :.incomplete a download that was interrupted:.part a download that was interrupted"""
FOREIGN = dict(row.strip().split(" ", 1) for row in FOREIGN.split(":"))


# ---- the base -------------------------------------------------------------------------------------------------------


def find_base(base: str) -> str:
    """The base as transformers takes it: a local folder (also relative to this project), or a hub name.

    Raises UserError for a folder that is missing or holds no config, before anything is loaded.
    """
    for folder in (Path(base), Path(__file__).parent / base):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            raise UserError(f"--base {base}: this folder cannot be read: permission denied")
        if os.path.exists(folder / "config.json"):
            return str(folder)
        if os.path.isdir(folder):
            advice = "give a folder saved by transformers (an adapter goes to --adapter, with its base here)"
            raise UserError(f"--base {base}: no config.json in this folder; {_deeper(folder, 'config.json') or advice}")
        if os.path.isfile(folder):
            raise UserError(f"--base {base}: this is a file; give its folder, {folder.parent}")
    if not re.fullmatch(HUB_NAME, base):
        advice = "give a local folder or a hub name such as Qwen/Qwen2.5-0.5B"
        raise UserError(f"--base {one_line(base)}: no such folder; {advice}")
    return base


def _deeper(folder, name):
    """Which folders below this one hold a file, in words; an empty string where none does."""
    below = sorted(str(path.parent) for depth in ("*", "*/*") for path in Path(folder).glob(f"{depth}/{name}"))
    return below and f"there is one in {few(below, 3)}: give that folder"


def need_base(base: str) -> str:
    """Where the base is, once its config and weights are known to be there. Raises UserError before anything loads."""
    folder = find_base(base)
    need_weights(folder)
    if getattr(load_config(base), "quantization_config", None) is not None:
        raise UserError(f"--base {base} is stored quantized: give the 16-bit base it was made from, with --quant nf4")
    return folder


def need_weights(folder: str) -> None:
    """Raise UserError when a local base folder holds no weights, or names or links to files outside of itself."""
    if not os.path.isdir(folder):
        return
    paths = sorted(Path(folder).iterdir())
    if all(path.name.startswith("adapter_") for path in paths if path.suffix in WEIGHT_FILES):
        others = [f"{path.name} is {FOREIGN[path.suffix]}" for path in paths if path.suffix in FOREIGN]
        others = f"; {few(others, 2)}: not read" if others else ""
        raise UserError(f"--base {folder}: no weights in this folder (model.safetensors or its shards){others}")

    # transformers would follow a link, and read whatever it points to.
    for path in paths:
        if path.suffix in (*WEIGHT_FILES, ".json") or not path.is_dir():
            need_own(path, f"--base {folder}")

    # It would also follow paths in an index of shards.
    for index in Path(folder).glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
            raise UserError(f"--base {folder}: {index.name} is no index of shards ({type(e).__name__})") from None
        for shard in shards:
            if Path(str(shard)).name != shard or shard in ("", ".."):
                raise UserError(f"--base {folder}: {index.name} names {shard!r:.200}, outside the folder: not read")
        absent = sorted(shard for shard in shards if not (Path(folder) / shard).exists())
        if absent and index.name.startswith("model.safetensors"):
            problem = f"{index.name} names {len(absent)} files that are not there ({few(absent, 3)})"
            raise UserError(f"--base {folder}: {problem}: download them")
    need_readable(folder, paths)


def need_readable(folder: str, paths: list[Path]) -> None:
    """Raise UserError for files of a base that stand for others, are cut off, or hold no floating-point weights."""
    for path in paths:
        if path.is_file() and formats.lfs_pointer(path):
            raise UserError(f"--base {folder}: {path.name} is {formats.POINTER}")
        if path.suffix != ".safetensors" or path.stat().st_size < 8:  # an empty one is refused when it is loaded
            continue
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.endswith((".weight", ".bias"))]  # noqa: SIM118
                dtypes = {name: file.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError, ValueError) as e:
            remedy = "damaged or incomplete: download it again"
            raise UserError(
                f"--base {folder}: its weights cannot be loaded ({path.name}: {one_line(e)}); {remedy}"
            ) from None
        for name, dtype in dtypes.items():
            if dtype not in ("F64", "F32", "F16", "BF16"):
                remedy = "give the 16-bit base it was made from, with --quant nf4"
                raise UserError(f"--base {folder}: {name:.200} is stored as {dtype}, quantized or damaged: {remedy}")


def own_file(path: Path) -> bool:
    """Whether a path is a regular file of its folder, or a link that stays in it or in the hub's cache around it."""
    cache = path.parents[2] if path.parent.parent.name == "snapshots" else path.parent
    return path.is_file() and cache.resolve() in path.resolve().parents


def need_own(path: Path, flag: str) -> None:
    """Raise UserError for a file that is not its folder's own, or cannot be read."""
    if not own_file(path):
        raise UserError(f"{flag}: {path.name} is not a file of this folder (a link out of it?): copy it there")
    if not os.access(path, os.R_OK):
        raise UserError(f"{flag}: {path.name} cannot be read: permission denied")


def load_config(base: str):
    """The transformers config of a base. Raises UserError with what to do when it cannot be loaded."""
    folder = find_base(base)
    need_sane_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as e:  # whatever a foreign file can make of it
        advice = "code of its own (auto_map) is never run: take a family that transformers knows; for a gated base "
        advice += "accept its licence on its hub page and set HF_TOKEN; offline give a local folder"
        raise UserError(f"--base {base}: its config could not be loaded ({one_line(e)}); {advice}") from None
    config._attn_implementation = None  # a kernel of its choice would be fetched and run
    config.transformers_weights = None  # a file of its choice may be anywhere
    return config


def need_sane_config(folder: str) -> None:
    """Raise UserError for a local config.json that stands for another file, or whose sizes nobody can build."""
    path = Path(folder) / "config.json"
    if not os.path.isfile(path):
        return
    if formats.lfs_pointer(path):
        raise UserError(f"--base {folder}: config.json is {formats.POINTER}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # transformers says why
    if not isinstance(config, dict):
        return
    dtype = config.get("dtype", config.get("torch_dtype"))
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UserError(f"--base {folder}: config.json has dtype {dtype:.40}, expected one of {', '.join(DTYPES)}")
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    sizes = [(name, part[name]) for part in parts for name in LARGEST if type(part.get(name)) is int]
    wrong = [f"{name} {size:.3g}" for name, size in sizes if size > LARGEST[name]]
    if wrong:
        raise UserError(f"--base {folder}: config.json claims {few(wrong)}: it is damaged")
    if "vision_config" in config:
        kind = config.get("model_type")
        remedy = "save its language model alone, or take a base of text"
        raise UserError(
            f"--base {folder}: {kind!s:.40} reads pictures (vision_config), which is not supported: {remedy}"
        )


def stored_labels(base: str, rows: int) -> tuple[str, ...]:
    """Class names of a base that is a classifier (with `rows` outputs, if not 0), or else the numbers below `rows`."""
    config = load_config(base)
    if rows > MOST_CLASSES:
        raise UserError(f"the adapter's head, score.weight or the like, claims {rows:,} outputs: it is damaged")
    if "ForSequenceClassification" in str(config.architectures) and rows in (0, config.num_labels):
        if set(config.id2label) != set(range(config.num_labels)):
            raise UserError(f"--base {base}: id2label in its config does not name each of {config.num_labels} classes")
        return tuple(str(config.id2label[i]) for i in range(config.num_labels))
    return tuple(map(str, range(rows)))


def generation_config(folder: str) -> GenerationConfig | None:
    """The base's generation_config.json; None where it has none, or with a warning one that cannot be read."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as e:  # whatever a foreign file can make of it
        if os.path.exists(Path(folder) / "generation_config.json"):
            _warn(f"{folder}: generation_config.json cannot be read and is ignored ({one_line(e)})")
    return None


@contextmanager
def alone(folder: str):
    """The base's folder; or a view without an adapter, which transformers would load by itself, and without a
    generation_config.json that cannot be read, at which it would stop.
    """
    left_out = ()
    if (Path(folder) / "adapter_config.json").is_file():
        _warn(f"{folder} also holds an adapter, which is ignored (see infer.py --adapter)")
        left_out += ("adapter_",)
    if os.path.isdir(folder) and not generation_config(folder):
        left_out += ("generation_config.json",)
    if not left_out or not any(path.name.startswith(left_out) for path in Path(folder).iterdir()):
        yield folder
        return
    with tempfile.TemporaryDirectory() as view:
        for path in Path(folder).iterdir():
            if not path.name.startswith(left_out):
                os.symlink(path.resolve(), Path(view) / path.name)
        yield view


def _warn(problem):
    if os.environ.get("RANK", "0") == "0":
        print(warning(problem, "see infer.py --adapter"), file=sys.stderr)


# ---- its values -----------------------------------------------------------------------------------------------------


def not_finite(model: nn.Module) -> list[str]:
    """Names of the weights that hold NaN or infinity; those of the embedding are judged by the tokens that occur."""
    embedding = model.get_input_embeddings().weight
    weights = [(name, p) for name, p in model.named_parameters() if p.is_floating_point() and p is not embedding]
    return [name for name, p in weights if p.numel() and not all(value.isfinite() for value in p.detach().aminmax())]


# ---- its tokenizer --------------------------------------------------------------------------------------------------


def load_tokenizer(base: str):
    """The fast tokenizer of a base. Raises UserError when there is none."""
    for path in sorted(Path(base).glob("*token*")) + sorted(Path(base).glob("*vocab*")):
        if path.is_file() and formats.lfs_pointer(path):
            raise UserError(f"--base {base}: {path.name} is {formats.POINTER}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    except Exception as e:  # whatever a foreign file can make of it
        advice = "a sentencepiece model, as DeBERTa-v3's, needs: pip install sentencepiece protobuf"
        raise UserError(f"--base {base}: no tokenizer could be loaded ({one_line(e)}); {advice}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--base {base}: its tokenizer has no fast version, which bulk encoding and offsets need")

    # Without tokenizer files transformers makes up one that knows nothing.
    if set(tokenizer("a b 1", add_special_tokens=False)["input_ids"]) <= {tokenizer.unk_token_id}:
        raise UserError(f"--base {base}: no tokenizer files there (transformers made an empty one up)")
    lost = [c for c in "\u0436\u03b1\u6570\ud55c" if not tokenizer(c, add_special_tokens=False)["input_ids"]]
    if lost:
        what = f"leaves out letters that it does not know, such as {', '.join(lost)}, and has no token for them"
        note(warning(f"the tokenizer of {base} {what}", "take a base that reads them"))
    tokenizer.model_max_length = 1_000_000_000  # lengths are limited by max_length, with a report
    return tokenizer


def need_positions(base: str, max_length: int) -> None:
    """Raise UserError for more tokens than a base was made for; those with relative positions have no such limit."""
    config = load_config(base)
    room = getattr(config, "max_position_embeddings", None)
    if room and max_length > room and not getattr(config, "relative_attention", False):
        raise UserError(f"--max_length {max_length}: {base} was made for {room} positions; lower it")


def need_vocabulary(base: str, tokens: int) -> None:
    """Raise UserError when the tokenizer has more tokens than the base has embeddings."""
    embeddings = load_config(base).vocab_size
    if tokens > embeddings:
        problem = f"its tokenizer has {tokens} tokens for {embeddings} embeddings"
        remedy = "the tokenizer of an adapter that was trained on a resized base? Then merge that one with peft first"
        raise UserError(f"--base {base}: {problem} ({remedy})")


# ---- an adapter -----------------------------------------------------------------------------------------------------


def find_adapter(adapter: str) -> Path:
    """The folder of a PEFT adapter: a local one, or a hub name's, fetched. Raises UserError for what is never read."""
    flag, folder = f"--adapter {adapter}", Path(adapter)
    if os.path.isfile(folder):
        raise UserError(f"{flag}: this is a file; give its folder, {folder.parent}")
    if not os.path.isdir(folder):
        if "/" not in adapter or not re.fullmatch(HUB_NAME, adapter):
            raise UserError(f"--adapter {one_line(adapter)}: no such folder; give the one that peft saved")
        try:
            folder = [Path(cached_file(adapter, name)).parent for name in ADAPTER_FILES][0]
        except (OSError, ValueError) as e:
            raise UserError(f"{flag}: could not be loaded ({one_line(e)}); give a folder") from None
    for name in ADAPTER_FILES:
        if not (folder / name).exists():
            if below := _deeper(folder, name):
                raise UserError(f"{flag}: no {name} there; {below}")
            advice = "give the folder that peft saved (a pickle such as adapter_model.bin is never read: load it where "
            advice += "you trust it, and peft's save_pretrained writes adapter_model.safetensors)"
            raise UserError(f"{flag}: no {name} there; {advice}")
        need_own(folder / name, flag)
        if formats.lfs_pointer(folder / name):
            raise UserError(f"{flag}: {name} is {formats.POINTER}")
    return folder


# ---- its structure and identity -------------------------------------------------------------------------------------


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of transformer blocks of a backbone."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.ModuleList) and re.search(r"(layers?|h)$", name):
            return module
    raise UserError(f"{type(backbone).__name__} has no list of layers")


def fingerprint(model: nn.Module) -> dict:
    """What makes a base itself: its sizes, and of every matrix the mean and mean magnitude of 64 spread-out weights."""
    weights = {}
    for name, p in model.named_parameters():
        if p.ndim == 2 and name not in getattr(model, "fresh", ()):
            sample = p.detach().flatten()[:: max(1, p.numel() // 64)][:64].double()
            weights[name] = [float(sample.mean()), float(sample.abs().mean())]
    sizes = "model_type hidden_size num_hidden_layers num_attention_heads vocab_size tie_word_embeddings".split()
    return {name: getattr(model.config, name, None) for name in sizes} | {"weights": weights}


def compare_fingerprints(saved: dict, now: dict) -> list[str]:
    """What differs between the base of a run and this one, beyond the rounding of bf16; empty if nothing."""
    sizes = [name for name in now if name != "weights" and now[name] != saved.get(name)]
    if sizes:
        return [f"{name} {now[name]}, expected {saved.get(name)}" for name in sizes]
    differing = []
    for name, expected in saved.get("weights", {}).items():
        tolerance = 0.002 * expected[1] + 1e-9  # bf16 rounds a weight by at most 0.2% of itself
        values = now["weights"].get(name)
        if values is None or not all(abs(a - b) <= tolerance for a, b in zip(values, expected, strict=True)):
            differing.append(f"weights of {name}")
    return differing
