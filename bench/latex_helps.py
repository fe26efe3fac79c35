"""The texts and the tables of runs/latex_helps.sh: bits per byte on LaTeX never trained on, and F1 with and without.

    python bench/latex_helps.py texts --out outputs/latex_helps     # math_text.jsonl and problems.jsonl
    python bench/latex_helps.py table --out outputs/latex_helps     # after the runs

The last line of stdout is one JSON object.
"""

import argparse
import csv
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]

import make_base  # noqa: E402

import bases  # noqa: E402
import corpus  # noqa: E402
import data  # noqa: E402
import ddp  # noqa: E402
import language  # noqa: E402
from packed import pack  # noqa: E402

ENGLISH = ("clowder", "napkin", "katja-celestial-mechanics", "dlfer-symorb")  # never trained on
OTHER = ("mathieu-r-celestial-mechanics", "mipt-celestial")  # French and Russian: neither is what the text teaches
SEEDS = (0, 1, 2)


def write_texts(shared: Path, out: Path, most: int = 3000) -> dict:
    """math_text.jsonl: problems with solutions, without the competition's; problems.jsonl: what was known before."""
    texts, left_out = make_base.math_texts(shared)
    random.Random(0).shuffle(texts)
    with open(ROOT / "tiny/data/test.csv", encoding="utf-8", newline="") as f:
        problems = [row["Question"] for row in csv.DictReader(f)]
    for name, documents in (("math_text", texts[:most]), ("problems", problems)):
        lines = "".join(json.dumps({"text": t}) + "\n" for t in documents)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return {"math_text": len(texts[:most]), "problems": len(problems), "left_out": left_out}


@torch.no_grad()
def nats(lm, tokens: data.Tokens, rows: np.ndarray) -> np.ndarray:
    """(N,) next-token loss of each segment alone."""
    return np.array(
        [float(language.next_token_loss(lm, pack(tokens, np.array([i]), "cpu", predict=True))) for i in rows]
    )


def bits_per_byte(shared: Path, out: Path, segments: int = 120) -> list[dict]:
    """Of each source: before and after (mean over seeds), and the difference with a 95% bootstrap interval."""
    world, tokenizer = ddp.World(0, 1, torch.device("cpu")), bases.load_tokenizer("tiny/base")
    folders = ["tiny/base", *(str(out / f"base_{seed}") for seed in SEEDS)]
    loaded = [language.load_language_model(b, world.device, torch.float32).eval() for b in folders]
    how = {"template": "{text}", "max_length": 512, "chat": "no", "system": ""}
    found = []
    for source in ENGLISH + OTHER:
        folder = str(shared / "data/latex" / source)
        read = corpus.load(folder, "train_data", tokenizer, out / "token_cache", world, print, **how)
        tokens = corpus.segments(read, np.arange(len(read.sizes)), tokenizer, 512)
        rng = np.random.default_rng(0)
        rows = np.sort(rng.permutation(len(tokens.lengths))[:segments])
        size = np.array([len(tokenizer.decode(tokens.row(i)[1:], skip_special_tokens=True).encode()) for i in rows])
        before, *after = (nats(lm, tokens, rows) / np.log(2) for lm in loaded)
        mean = np.mean(after, axis=0)
        drawn = rng.integers(0, len(rows), (10_000, len(rows)))
        low, high = np.quantile(((mean - before)[drawn].sum(1) / size[drawn].sum(1)), [0.025, 0.975])
        each = [float(a.sum() / size.sum()) for a in after]
        found.append({
            "source": source, "segments": len(rows), "before": float(before.sum() / size.sum()),
            "after": float(np.mean(each)), "spread": float(np.ptp(each)), "change": [float(low), float(high)],
        })  # fmt: skip
        print("{source:<32} {before:.3f} -> {after:.3f} (spread {spread:.3f}), change {change}".format(**found[-1]))
    return found


def classified(out: Path) -> dict:
    """Micro- and macro-F1 with and without, a list over the seeds."""
    found = {}
    for name, stem in (("without", "base_classified"), ("with", "base_{seed}_classified")):
        for metric in ("micro_f1", "macro_f1"):
            files = [out / f"{stem.format(seed=s)}_{s}.json" for s in SEEDS]
            values = [json.loads(f.read_text(encoding="utf-8"))["metrics"][metric] for f in files]
            found[f"{name} {metric}"] = values
            print(f"{name:<8} {metric}: {np.mean(values):.4f} +- {np.std(values, ddof=1):.4f} {values}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("texts", "table"))
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder that holds data/")
    parser.add_argument("--out", type=Path, default=Path("outputs/latex_helps"), help="folder of folders and results")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.what == "texts":
        result = write_texts(args.shared, args.out)
    else:
        result = {"bits_per_byte": bits_per_byte(args.shared, args.out), "f1": classified(args.out)}
        (args.out / "table.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
