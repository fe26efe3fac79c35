"""What training.py, inference.py and pretraining.py share: sides in processes of their own, bases, a probe, the table.

The process that the user starts only starts others: it loads no torch, for a child's peak memory is never less than
what its parent held when it was started.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.append(str(ROOT))
BASES = {
    "tiny": "the embedded tiny/base",
    "wide": "Qwen2.5-0.5B's widths and vocabulary, 6 layers, random weights",
    "real": "SmolLM2-135M",
}


# ---- options --------------------------------------------------------------------------------------------------------


def options_of(doc: str, sides: tuple, quick: dict, more: Callable, bases="tiny,wide,real") -> argparse.Namespace:
    """The command line. quick: values of --quick, unless they are given by hand; more(parser) adds a script's own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", default=bases, help="; ".join(f"{k}: {v}" for k, v in BASES.items()))
    parser.add_argument("--dtypes", default="fp32,bf16", help="fp32, or bf16 by autocast over fp32 weights")
    parser.add_argument("--sides", default=",".join(sides), help="ours is needed for the ratios")
    parser.add_argument("--rounds", type=int, default=5, help="how often the sides alternate")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every side")
    problems = SHARED / "data/math_problems/train.csv"
    source = problems if problems.exists() else ROOT / "tiny/data/train.csv"
    parser.add_argument("--rows", default=str(source), help="CSV with the columns Question and label")
    parser.add_argument("--quick", action="store_true", help="a smoke test on the tiny base: its times mean nothing")
    more(parser)
    if "--quick" in sys.argv:
        parser.set_defaults(bases="tiny", dtypes="fp32", rounds=1, **quick)
    options = parser.parse_args()
    for name, known in (("bases", BASES), ("dtypes", ("fp32", "bf16")), ("sides", sides)):
        values = tuple(getattr(options, name).split(","))
        setattr(options, name, values)
        unknown = [value for value in values if value not in known]
        if unknown:
            parser.error(f"--{name} {unknown[0]}: expected some of {', '.join(known)}, separated by commas")
    return options


def read_rows(path: str) -> list[dict]:
    """The rows as train.py reads them: texts that were stored as Python's b'...' are decoded, for the peers too."""
    import files

    rows = files.read_rows(path, "rows")
    files.decode_bytes_literals(rows, ["Question"])
    return rows


# ---- processes ------------------------------------------------------------------------------------------------------


def process(command: list, threads: int, allowed=(0,)) -> str:
    """The stdout of a command that runs on so many threads; a failure ends the benchmark."""
    silent = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **silent}
    done = subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in allowed:
        sys.exit(f"{' '.join(map(str, command))[:300]} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def command_of(script: str, flags: dict) -> list[str]:
    """One of the project's commands."""
    return [sys.executable, script] + [f"--{name}={value}" for name, value in flags.items()]


def job(threads: int, name: str, /, **arguments) -> dict:
    """What one of the script's jobs returns, called in a process of its own."""
    words = json.dumps({"job": name, **arguments})
    out = process([sys.executable, Path(sys.argv[0]).resolve(), "--job", words], threads)
    return json.loads(out.strip().splitlines()[-1])


def answer(jobs: tuple) -> bool:
    """Whether this process is a job, which is done and printed then."""
    if sys.argv[1:2] != ["--job"]:
        return False
    arguments = json.loads(sys.argv[2])
    name = arguments.pop("job")
    found = {function.__name__: function for function in jobs}[name](**arguments)
    print("\n" + json.dumps(found), flush=True)
    return True


# ---- bases, and what they compute -----------------------------------------------------------------------------------


def make_base(name: str, folder: str) -> str:
    """The folder of a base; random ones are made in the given folder."""
    if name == "tiny":
        return str(ROOT / "tiny/base")
    tool = SHARED / "tools/smollm.py"
    if name == "real" and tool.exists():
        done = subprocess.run([sys.executable, str(tool)], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip().splitlines()[-1]
        print(f"{tool} failed ({done.stderr.strip()[-200:]}): its shape with random weights instead", file=sys.stderr)

    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    if name == "wide":
        widths = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
        config = Qwen2Config(**widths, vocab_size=151_936, num_hidden_layers=6, tie_word_embeddings=True)
        kind, source = Qwen2ForCausalLM, SHARED / "tokenizers/qwen2.5"
    else:
        widths = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = LlamaConfig(**widths, vocab_size=49_152, num_hidden_layers=30, tie_word_embeddings=True)
        kind, source = LlamaForCausalLM, ROOT / "tiny/base"
    tokenizer = AutoTokenizer.from_pretrained(source if source.exists() else ROOT / "tiny/base")
    config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenized(base: str, texts: list[str], max_length: int):
    """Our tokens of texts, whose ids are those of the base's own tokenizer."""
    import bases
    import data

    return data.tokenize(bases.load_tokenizer(base), "{t}", [{"t": text} for text in texts], max_length)[0]


def work(base: str, classes: int, lengths, adapter: dict | None) -> dict:
    """FLOPs per token of rows of these lengths, useful work only, and the shapes (D_in, D_out) of a layer's products.

    adapter: LoRA that is trained; None: forward passes. Counted by estimates.training_flops on a model without weights.
    """
    from torch import nn

    import bases
    import estimates
    import lora
    import model as models

    bare = models.skeleton(base, models.Head(classes))
    layer = bases.decoder_layers(bare.backbone)[0]
    shapes = [(m.in_features, m.out_features) for m in layer.modules() if isinstance(m, nn.Linear)]
    bare.requires_grad_(False)
    if adapter:
        models.add_adapter(bare, lora.Adapter(**adapter, saved=models.head_to_save(bare)))
    flops = estimates.training_flops(bare, lengths) / float(sum(lengths))
    return {"flops_per_token": flops, "shapes": shapes}


def probe(shapes: list, tokens: int, dtype: str, seconds: float = 2.0) -> dict:
    """FLOP/s of torch.nn.functional.linear at a layer's shapes: the median of passes over all of them."""
    import torch
    from torch.nn.functional import linear

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    pairs = [(torch.randn(tokens, n, dtype=kind), torch.randn(m, n, dtype=kind)) for n, m in shapes]
    flops = sum(2 * tokens * n * m for n, m in shapes)
    times, end = [], time.perf_counter() + seconds
    with torch.inference_mode():
        while len(times) < 4 or time.perf_counter() < end:
            started = time.perf_counter()
            for x, weight in pairs:
                linear(x, weight)
            times.append(time.perf_counter() - started)
    return {"flops_per_second": flops / statistics.median(times[1:])}


def autocast(dtype: str):
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def peak_gb() -> float:
    import torch

    import estimates

    return estimates.peak_memory_gb(torch.device("cpu"))


# ---- rounds and the table -------------------------------------------------------------------------------------------

HEADER = """| base | dtype | side | examples/s | valid tokens/s | computed per token | peak GB | share | ours / side |
|---|---|---|---|---|---|---|---|---|"""


def alternate(options, sides: tuple, run: Callable, found: dict, tokens: int, dtype: str) -> dict[str, list]:
    """{side: the result of each round}. Every second round takes the sides in reverse order.

    run(side) -> examples, tokens, computed, seconds, peak_gb; found: what `work` found; tokens: rows of the probe.
    """
    results = {side: [] for side in sides}
    for number in range(options.rounds):
        rate = job(options.threads, "probe", shapes=found["shapes"], tokens=tokens, dtype=dtype)["flops_per_second"]
        for side in sides if number % 2 == 0 else sides[::-1]:
            result = run(side)
            seconds = result["seconds"]
            result["examples_per_second"] = result["examples"] / seconds
            result["tokens_per_second"] = result["tokens"] / seconds
            result["share"] = result["tokens_per_second"] * found["flops_per_token"] / rate
            result["probe_gflops"] = rate / 1e9
            results[side].append(result)
            print(f"{dtype} round {number + 1} {side:<16} {json.dumps(rounded(result))}", file=sys.stderr, flush=True)
    return results


def rounded(result: dict) -> dict:
    return {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in result.items()}


def table_rows(base: str, dtype: str, results: dict[str, list]) -> list[str]:
    """A line for each side: medians over the rounds, and ours over it in tokens/s, taken within each round."""
    own, lines = next((side for side in results if side.startswith("ours")), None), []
    for side, rounds in results.items():
        middle = {
            name: statistics.median(result[name] for result in rounds)
            for name in ("examples_per_second", "tokens_per_second", "peak_gb", "share")
        }
        computed = sum(r["computed"] for r in rounds) / sum(r["tokens"] for r in rounds)
        ratio = ""
        if own and side != own:
            pairs = zip(results[own], rounds, strict=True)
            ratios = [ours["tokens_per_second"] / peer["tokens_per_second"] for ours, peer in pairs]
            ratio = f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
        cells = [
            base,
            dtype,
            side.replace("_", " "),
            f"{middle['examples_per_second']:.2f}",
            f"{middle['tokens_per_second']:,.0f}",
            f"{computed:.2f}",
            f"{middle['peak_gb']:.2f}",
            f"{middle['share']:.1%}",
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def products_note(base: str, dtype: str, results: dict[str, list]) -> str:
    """The rates that shares are taken of: where they differ from round to round, the machine was disturbed."""
    rates = [result["probe_gflops"] for result in next(iter(results.values()))]
    middle, least, most = statistics.median(rates), min(rates), max(rates)
    return f"{base} {dtype}: products run at {middle:.0f} GFLOP/s (rounds {least:.0f} to {most:.0f})"


def report(options, about: str, lines: list[str], results: dict, notes=()) -> None:
    """Print the section for bench/RESULTS.md; the last line is one JSON object with every result."""
    print(f"\n{about}\n\n{HEADER}", *lines, "", *(f"- {note}" for note in notes), sep="\n")
    print(f"- {hardware(options)}\n- {provenance()}\n", flush=True)
    print(json.dumps({"options": vars(options), "results": results}))


def hardware(options) -> str:
    """The CPU, the flags that matter here, cores, threads, memory."""
    lines = dict.fromkeys(("model name", "flags"), "")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = map(str.strip, line.partition(":"))
        if name in lines:
            lines[name] = value
    flags = lines["flags"].split()
    known = [name for name in ("avx512f", "avx512_bf16", "amx_tile", "amx_bf16") if name in flags]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return (
        f"{lines['model name']} ({', '.join(known) or 'no AVX-512'}; AMX: {'yes' if 'amx_bf16' in flags else 'no'}), "
        f"{len(os.sched_getaffinity(0))} cores, {size:.0f} GiB, no GPU; {options.threads} threads a side; medians of "
        f"{options.rounds} rounds"
    )


def provenance() -> str:
    """Date, commit, command and versions."""
    commit, changed = (
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
    )
    names = [name for name in ("torch", "transformers", "peft", "accelerate", "trl") if is_installed(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    command = " ".join(["python", str(script), *sys.argv[1:]])
    edited = " with changes" if changed else ""
    return f"{datetime.date.today()}, commit {commit}{edited}; `{command}`; {versions}"


def is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def need(*names: str) -> None:
    """End the benchmark where a peer's packages are absent."""
    absent = [name for name in names if not is_installed(name)]
    if absent:
        sys.exit(f"the peers of this benchmark need {', '.join(absent)}: pip install {' '.join(absent)}")
