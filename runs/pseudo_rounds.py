"""Rounds of pseudo-labels, guarded: train, predict the unlabelled rows, train on the confident ones too, and again.

    python runs/pseudo_rounds.py --clean clean.csv --test test.csv -- --cfg qwen15b_rules --train_data train.csv

What follows -- goes to train.py as it is. A clean hold-out (--clean: labelled rows that are never trained on and choose
nothing else) judges every round. The best round is kept, and its predictions are the submission. The rounds end early
if the hold-out's metric falls by more than --fall, if the shares of the predicted classes drift from those of the
training rows by more than --drift (total variation), or if one class takes all confident rows (collapse).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pseudo_labels
import training_file

import checkpoint
import checks
import cli
import configs
import files
import metrics
from errors import UserError
from presets import TRAIN_PRESETS


def main(argv: list[str]) -> dict:
    options, train_flags = read_options(argv)
    cfg = check(options, train_flags)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    metric = options.metric or cfg.metric
    rounds, flags = [], train_flags
    for number in range(options.rounds + 1):
        run = Path(step(options, "train.py", flags)["run"])
        predictions = out / f"predictions_{number}.csv"
        common = ["--runs", str(run), "--submission", "", "--overwrite"]
        scores = step(options, "infer.py", [*common, "--input", options.clean, "--output", str(out / "clean.csv")])
        step(options, "infer.py", [*common, "--input", options.test, "--output", str(predictions)])
        labels = checkpoint.load_json(run / "labels.json")
        rows = files.read_rows(str(predictions), "test")
        drift = judge(rows, labels["values"], labels["shares"], options.confidence)
        rounds.append({"round": number, "run": str(run), metric: scores["metrics"][metric], **drift})
        print(json.dumps(rounds[-1]), flush=True)
        reason = why_stop(rounds, metric, options)
        rounds[-1]["trusted"] = number == 0 or not reason
        if reason:
            print(f"the rounds end: {reason}", flush=True)
            break
        if number < options.rounds:
            flags = next_flags(options, train_flags, cfg, str(predictions), number + 1)
    best = best_round([one for one in rounds if one["trusted"]], metric)
    output = out / f"predictions_{best['round']}.csv"
    return {"best_round": best["round"], "run": best["run"], "output": str(output), "rounds": rounds}


def best_round(rounds: list[dict], metric: str) -> dict:
    """The round with the best metric, of equal ones the first."""
    best = rounds[0]
    for later in rounds[1:]:
        if metrics.better(later[metric], best[metric], metric):
            best = later
    return best


def next_flags(options, flags: list[str], cfg, predictions: str, number: int) -> list[str]:
    """Flags of train.py for the training rows and the confident predictions, with the validation rows of round 0."""
    output = str(Path(options.out) / f"train_{number}.jsonl")
    wanted = ["--min_confidence", str(options.confidence), "--overwrite", *(["--soft"] if options.soft else [])]
    columns = ["--id_column", cfg.id_column, "--label_column", cfg.label_column]
    pseudo_labels.main([cfg.train_data, predictions, options.test, output, *wanted, *columns])
    # other training data drop a preset's validation and test files, and name another folder: keep those of round 0
    own = {"train_data": output, "dataset": configs.dataset_name(cfg), "val_data": cfg.val_data}
    own = {name: value for name, value in own.items() if value}
    same = [[flag, *words] for flag, words in cli.grouped(flags) if flag[2:].replace("-", "_") not in own]
    return [word for group in same for word in group] + [f"--{name}={value}" for name, value in own.items()]


def check(options, train_flags: list[str]) -> configs.TrainConfig:
    """The settings of train.py. Raises UserError, before anything is trained, for tasks without classes and for clean
    rows that cannot judge.
    """
    cfg = checks.own_data(*cli.parse(configs.TrainConfig, TRAIN_PRESETS, train_flags))
    if cfg.task != "single_label":
        raise UserError(f"--task {cfg.task}: the rounds are for classes, of which one is the answer")
    rows = files.read_rows(options.clean, "clean")
    files.need_columns(rows, [cfg.label_column], options.clean, "clean")
    clean = {tuple(sorted(row.items())) for row in rows}
    for path in (options.test, cfg.train_data):
        if clean & {tuple(sorted(row.items())) for row in files.read_rows(path, "test")}:
            problem = f"some of its rows are in {path}; nothing else may know them"
            raise UserError(f"--clean {options.clean}: {problem}")
    return cfg


def judge(rows: list[dict], values: list[str], prior: list[float], confidence: float) -> dict:
    """How many rows are confident, how far the predicted shares are from the prior, and the largest class's share of
    the confident rows.
    """
    names = [f"probability_{value}" for value in values]
    chosen, sure = [], []
    for row in rows:
        shares = [float(row[name]) for name in names]
        chosen.append(shares.index(max(shares)))
        if max(shares) >= confidence:
            sure.append(chosen[-1])
    classes = range(len(names))
    drift = sum(abs(chosen.count(c) / len(rows) - prior[c]) for c in classes) / 2
    largest = max(sure.count(c) for c in classes) / len(sure) if sure else 0.0
    return {"confident": len(sure), "drift": drift, "largest": largest}


def why_stop(rounds: list[dict], metric: str, options) -> str:
    """Why the next round should not be trained, or an empty string."""
    now, best = rounds[-1], best_round(rounds, metric)
    if abs(best[metric] - now[metric]) > options.fall:
        return f"{metric} on the clean rows worsened from {best[metric]:.4f} to {now[metric]:.4f}"
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
    words = [*start, str(training_file.ROOT / script), *flags]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, errors="backslashreplace")
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_options(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of this script, flags for train.py)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clean", required=True, help="labelled rows that judge the rounds")
    parser.add_argument("--test", required=True, help="unlabelled rows to predict and to learn from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--confidence", type=float, default=0.9)
    parser.add_argument("--soft", action="store_true", help="train on probabilities instead of answers")
    parser.add_argument("--metric", default="", help="metric of the clean rows; default: the run's")
    parser.add_argument("--fall", type=float, default=0.005)
    parser.add_argument("--drift", type=float, default=0.1)
    parser.add_argument("--nproc", type=int, default=1, help="processes of torchrun")
    parser.add_argument("--out", default="outputs/pseudo_rounds")
    end = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:end])
    for flag, path in (("clean", options.clean), ("test", options.test)):
        if not Path(path).is_file():
            raise UserError(f"--{flag} {path}: no such file")
    return options, argv[end + 1 :]


if __name__ == "__main__":
    training_file.launch(main)
