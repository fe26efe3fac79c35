"""Rounds of pseudo-labels, guarded: train, predict the unlabelled rows, train on the confident ones too, and again.

    python runs/pseudo_rounds.py --clean clean.csv --test test.csv -- --cfg qwen15b_rules --train_data train.csv

What follows -- goes to train.py as it is. A clean hold-out (--clean: labelled rows that are never trained on and choose
nothing else) judges every round. The best round is kept, and its predictions are the submission. The rounds end early
where the hold-out's metric falls by more than --fall, where the shares of the predicted classes drift from those of the
training rows by more than --drift (total variation), or where one class takes all confident rows (collapse).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cli  # noqa: E402
import configs  # noqa: E402
import files  # noqa: E402
from errors import UserError  # noqa: E402


def main() -> dict:
    options, train_flags = read_options()
    check(options, train_flags)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rounds, pseudo = [], []
    for number in range(options.rounds + 1):
        told = step(options, "train.py", [*train_flags, *pseudo])
        submission = out / f"predictions_{number}.csv"
        common = ["--runs", told["run"], "--submission", "", "--overwrite"]
        scores = step(options, "infer.py", [*common, "--input", options.clean, "--output", str(out / "clean.csv")])
        step(options, "infer.py", [*common, "--input", options.test, "--output", str(submission)])
        prior = json.loads((Path(told["run"]) / "labels.json").read_text(encoding="utf-8"))
        values, rows = prior["values"], files.read_rows(str(submission), "test")
        found = judge(rows, values, prior["shares"], options.confidence)
        metric = options.metric or json.loads((Path(told["run"]) / "config.json").read_text())["metric"]
        rounds.append({"round": number, "run": told["run"], metric: scores["metrics"][metric], **found})
        print(json.dumps(rounds[-1]), flush=True)
        reason = why_stop(rounds, metric, options)
        rounds[-1]["trusted"] = not reason or not rounds[:-1]
        if reason:
            print(f"the rounds end: {reason}", flush=True)
            break
        pseudo = ["--pseudo_labels", str(submission), "--pseudo_data", options.test]
        pseudo += ["--pseudo_min_confidence", str(options.confidence), *["--pseudo_soft"] * options.soft]
    trusted = [r for r in rounds if r["trusted"]] or rounds[:1]
    lower = metric in ("log_loss", "mse", "rmse", "mae", "hamming_loss")
    best = (min if lower else max)(trusted, key=lambda r: r[metric])  # of equal ones the first
    kept = out / f"predictions_{best['round']}.csv"
    return {"best_round": best["round"], "run": best["run"], "output": str(kept), "rounds": rounds}


def check(options, train_flags: list[str]) -> None:
    """Raise UserError, before anything is trained, for tasks without classes and clean rows that cannot judge."""
    cfg, _ = cli.parse(configs.TrainConfig, configs.TRAIN_PRESETS, train_flags)
    if cfg.task != "single_label":
        raise UserError(f"--task {cfg.task}: the rounds are for classes, of which one is the answer")
    rows = files.read_rows(options.clean, "clean")
    files.need_columns(rows, [cfg.label_column], options.clean, "clean")
    texts = [{tuple(sorted(r.items())) for r in files.read_rows(p, "test")} for p in (options.test, cfg.train_data)]
    if any({tuple(sorted(r.items())) for r in rows} & known for known in texts):
        raise UserError(
            f"--clean {options.clean}: some of its rows stand in --test or --train_data; nothing else may know them"
        )


def judge(rows: list[dict], values: list[str], prior: list[float], confidence: float) -> dict:
    """How many rows are confident, how far the predicted shares are from the prior, and the largest class's share of
    the confident rows.
    """
    names = [f"probability_{v}" for v in values]
    chosen = [max(range(len(names)), key=lambda c, r=row: float(r[names[c]])) for row in rows]
    sure = [c for c, row in zip(chosen, rows, strict=True) if float(row[names[c]]) >= confidence]
    shares = [chosen.count(c) / len(rows) for c in range(len(names))]
    largest = max((sure.count(c) / len(sure) for c in range(len(names))), default=0.0) if sure else 0.0
    drift = sum(abs(a - b) for a, b in zip(shares, prior, strict=True)) / 2
    return {"confident": len(sure), "drift": drift, "largest": largest}


def why_stop(rounds: list[dict], metric: str, options) -> str:
    """Why the next round should not be trained, or an empty string."""
    now, best = rounds[-1], rounds[0][metric]
    sign = -1 if metric in ("log_loss", "mse", "rmse", "mae", "hamming_loss") else 1
    for past in rounds[1:]:
        best = max(best, past[metric], key=lambda v: sign * v)
    if sign * (best - now[metric]) > options.fall:
        return f"{metric} on the clean rows fell from {best:.4f} to {now[metric]:.4f}"
    if now["drift"] > options.drift:
        return f"the shares of predicted classes drifted by {now['drift']:.3f} from those of the training rows"
    if now["confident"] == 0:
        return f"no row reaches the confidence {options.confidence:g}"
    if now["largest"] == 1.0:
        return "one class takes every confident row"
    return ""


def step(options, script: str, flags: list[str]) -> dict:
    """Run a script of the project, its progress on stderr; returns its last line. Ends as it ends where it fails."""
    start = [sys.executable]
    if options.nproc > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={options.nproc}"]
    done = subprocess.run([*start, str(ROOT / script), *flags], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_options():
    """(options of this script, flags for train.py)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", required=True, help="labelled rows that judge the rounds")
    parser.add_argument("--test", required=True, help="unlabelled rows to predict and to learn from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--soft", action="store_true", help="train on probabilities instead of answers")
    parser.add_argument("--metric", default="", help="of the clean rows; empty: the run's")
    parser.add_argument("--fall", type=float, default=0.005)
    parser.add_argument("--drift", type=float, default=0.1)
    parser.add_argument("--nproc", type=int, default=1, help="processes of torchrun")
    parser.add_argument("--out", default="outputs/pseudo_rounds")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, train_flags = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    for name in ("clean", "test"):
        if not Path(getattr(options, name)).is_file():
            raise UserError(f"--{name} {getattr(options, name)}: no such file")
    return options, train_flags


if __name__ == "__main__":
    try:
        print(json.dumps(main()))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
