"""Train every fold and every seed with train.py, then pool what they predict for the rows that they did not see.

    python folds.py --train_data my.csv --folds 5                        # five runs under one folder, one by one
    python folds.py --train_data my.csv --folds 5 --seeds 1,2,3          # fifteen runs
    python folds.py --train_data my.csv --seeds 1,2,3 --val_data val.csv # three runs on the same rows
    python folds.py --cfg qwen3b --folds 5 --nproc_per_node 2            # each run on two GPUs
    python folds.py --resume auto                                        # continue the newest unfinished family

A job array trains the runs elsewhere, in any order, and pools them at the end:

    python train.py --train_data my.csv --folds 5 --fold $i              # for each i from 0 to 4
    python folds.py --pool outputs/tiny__base/my/run_*

The folder of all runs predicts like a single one, by their mean logits: python infer.py --runs FOLDER. Every setting
of train.py is one of this command too.
"""

from dataclasses import asdict, dataclass, fields

import cli
from configs import TrainConfig
from presets import TRAIN_PRESETS


@dataclass(frozen=True)
class FoldsConfig(TrainConfig):
    """Cross-validation: train.py for every fold and seed, and their predictions pooled."""

    # folds and seeds
    folds: int = 0  # number of cross-validation folds: each row is judged by the run that did not see it
    seeds: tuple[str, ...] = ()  # one run for each seed (and fold), all with the same split; default: seed
    nproc_per_node: int = 1  # processes (GPUs) of each run, as torchrun has it
    pool: tuple[str, ...] = ()  # train nothing: pool these finished runs of train.py --folds N --fold I --seed S


if __name__ == "__main__":  # help and typos are answered before torch is loaded, which takes seconds
    cli.early(FoldsConfig, TRAIN_PRESETS, __doc__)

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bootstrap
import checkpoint
import checks
import ddp
import evaluate
import labelling
import locks
import loop
import metrics
import predictions
import prepare
import report_runs
import run_folder
import seals
import signals
import splits
import tables
import trained
from errors import Degenerate, Untrusted, UserError, warning
from prepare import Material
from splits import Split

TRAIN = Path(__file__).parent / "train.py"
WORLD = ddp.World(0, 1, torch.device("cpu"))  # this process trains nothing
CLASHES = [
    ("--fold {fold}: folds.py trains every fold; train a single one with train.py", lambda cfg: cfg.fold >= 0),
    (
        "--seeds {seeds}: a seed is given twice",
        lambda cfg: len({seed.lstrip("0") for seed in cfg.seeds}) < len(cfg.seeds),
    ),
    ("--nproc_per_node {nproc_per_node}: expected 1 or more", lambda cfg: cfg.nproc_per_node < 1),
    (
        "torchrun folds.py: start folds.py with python, and give it --nproc_per_node",
        lambda cfg: "WORLD_SIZE" in os.environ,
    ),
]
FREE = {"fold", "seed", "split_seed", "audit", "report", "outputs", "keep", "time_limit"}  # may differ between runs


class Failed(RuntimeError):
    """A run that ended with an error, which it has printed itself."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.exit_status = status


@dataclass
class Member:
    """One run of the family: its settings and rows, and its folder once there is one."""

    name: str
    cfg: TrainConfig
    train: Split
    judges: Split
    folder: Path | None


@locks.released()
def main(argv: list[str]) -> dict:
    # ---- settings ---------------------------------------------------------------------------------------------------
    cfg, given = cli.parse(FoldsConfig, TRAIN_PRESETS, argv, __doc__)
    cfg = checks.own_data(cfg, given)
    checks.check(cfg, given, clashes=CLASHES)
    processes, limit, dry_run = cfg.nproc_per_node, checks.seconds(cfg.time_limit), cfg.dry_run
    if cfg.pool:
        run = None
        cfg, folders = settings_of_pool(cfg)
    else:
        cfg, run = loop.to_resume(cfg, given - {"nproc_per_node"}, WORLD, family=True)
        folders = trained.members(run) if run else {}
    if not (cfg.folds or cfg.seeds):
        raise UserError("nothing to train: give --folds 5, or --seeds 1,2,3, or finished runs to --pool")

    # ---- data -------------------------------------------------------------------------------------------------------
    # What is wrong with any of the runs is found here, before the first one starts.
    cfg, material = prepare.read(cfg, print)
    digests = splits.digests(material.rows, material.val, material.labels)
    run_folder.same_rows(run, digests)
    members = []
    for name, one in settings_of_members(cfg).items():
        members.append(new_member(name, one, material, folders.get(name), run))
    if cfg.folds:
        judged, audited = material.rows.judging(), (material.rows.judging(), None)
    else:
        judged, audited = members[0].judges, (members[0].train, members[0].judges)
    problems = splits.audit_rows(cfg, material.labels, *audited, print)
    if dry_run:
        return plan_of(members, processes)

    # ---- the family's folder, a folder for each run -----------------------------------------------------------------
    fill = partial(write_family, cfg=cfg, material=material, problems=problems, folders=folders)
    run = run_folder.make(plain(cfg), WORLD, run, digests, fill)
    for member in members:
        member.folder = member.folder or run / member.name
        member.folder.mkdir(exist_ok=True)
        if not seals.has(member.folder / "config.json"):
            seals.write(member.folder / "config.json", cli.to_json(member.cfg))

    # ---- train, pool ------------------------------------------------------------------------------------------------
    for i in range(len(members)):
        train(run, members, i, processes, limit, cfg.keep)
    return pool(cfg, run, material.labels, judged, members)


# ---- settings -------------------------------------------------------------------------------------------------------


def plain(cfg: FoldsConfig, **changes) -> TrainConfig:
    """The settings that train.py has too."""
    return TrainConfig(**{field.name: getattr(cfg, field.name) for field in fields(TrainConfig)} | changes)


def settings_of_members(cfg: FoldsConfig) -> dict[str, TrainConfig]:
    """The settings of each run by the name of its folder: every fold of every seed, all with one split."""
    members = {}
    for seed in cfg.seeds or (str(cfg.seed),):
        for fold in range(cfg.folds) if cfg.folds else (-1,):
            names = [f"seed_{seed}"] if cfg.seeds else []
            names += [f"fold_{fold}"] if cfg.folds else []
            own = {"seed": int(seed), "fold": fold, "split_seed": splits.split_seed(cfg)}
            rest = {"audit": "none", "resume": "", "time_limit": ""}  # the rows are audited here, once
            members["_".join(names)] = plain(cfg, **own, **rest)
    return members


def settings_of_pool(cfg: FoldsConfig) -> tuple[FoldsConfig, dict[str, Path]]:
    """The family that finished runs make: its settings, and the runs' folders by their names.

    Raises UserError for runs that did not finish, differ in more than seed and fold, or lack a fold.
    """
    folders, first, seeds = {}, None, {}
    for path in cfg.pool:
        folder = Path(path).resolve()
        if not checkpoint.finished(folder):
            raise UserError(f"--pool {path}: no finished run; train it, or continue with train.py --resume {path}")
        member = cli.read_config(TrainConfig, folder)
        first = first or member
        differ = [n for n, value in asdict(member).items() if value != getattr(first, n) and n not in FREE]
        if differ or member.folds > 0 > member.fold:
            raise UserError(f"--pool {path}: not a run of the same family: {', '.join(differ) or 'a family itself'}")
        name = f"seed_{member.seed}" + (f"_fold_{member.fold}" if member.folds else "")
        if name in folders:
            raise UserError(f"--pool {path}: {folders[name]} is {name} too")
        folders[name] = folder
        seeds[str(member.seed)] = None
    own = {"fold": -1, "outputs": cfg.outputs, "dataset": cfg.dataset or first.dataset, "audit": cfg.audit}
    family = FoldsConfig(**{**asdict(first), **own}, seeds=tuple(seeds))
    lost = [name for name in settings_of_members(family) if name not in folders]
    if lost:
        raise UserError(f"--pool: no run for {', '.join(lost)}")
    return family, folders


def new_member(name: str, cfg: TrainConfig, material: Material, folder: Path | None, family: Path | None) -> Member:
    """A run with its rows, checked. Raises UserError for what does not fit them.

    folder: where it is already; family: the folder of all runs, if it is resumed.
    """
    begun = folder and seals.has(folder / "config.json")
    if begun:
        cfg = cli.read_config(TrainConfig, folder)
    train, judges = splits.cut(cfg, material.rows, material.val, recorded=folder if begun else family)
    if begun:
        run_folder.same_rows(folder, splits.digests(train, judges, material.labels))
    note = prepare.check(cfg, train, judges, len(material.labels.names))
    if note:
        print(note, flush=True)
    return Member(name, cfg, train, judges, folder)


def write_family(folder: Path, cfg: FoldsConfig, material: Material, problems: dict, folders: dict) -> None:
    """The files of a family: what runs it has, their shared settings, labels and audit."""
    prepare.write(folder, cfg, material, problems)
    if not seals.has(folder / "family.json"):  # a family that was killed before its first run keeps its own
        elsewhere = {name: str(path) for name, path in folders.items() if path.parent != folder}
        members = {name: elsewhere.get(name, name) for name in settings_of_members(cfg)}
        family = {"members": members, "folds": cfg.folds, "seeds": list(cfg.seeds)}
        seals.write(folder / "family.json", family)
    settings = {**asdict(plain(cfg, resume="", dry_run=False)), "seeds": cfg.seeds}
    seals.write(folder / "config.json", settings)


# ---- train ----------------------------------------------------------------------------------------------------------


def train(run: Path, members: list[Member], index: int, processes: int, limit: float, keep: int) -> None:
    """Train or continue a run, unless it is finished.

    A time limit is shared out: each run gets its part of what is left. Raises Failed when it ends with an error,
    KeyboardInterrupt when it is stopped.
    """
    member, folder = members[index], members[index].folder
    print(f"\n== {member.name}: {index + 1} of {len(members)}", flush=True)
    if checkpoint.finished(folder):
        print(f"{folder} is finished", flush=True)
        return
    _wait_until_free(folder, 60)  # a family that was killed leaves a run that still saves
    flags = ["--resume", str(folder), "--keep", str(keep)]
    if limit:
        left = limit - loop.process_seconds()
        share = left / (len(members) - index)
        if share < 1:  # nothing fits into a second, and 0.0s would be no limit
            raise KeyboardInterrupt(f"--time_limit is over; continue with python folds.py --resume {run}")
        flags += ["--time_limit", f"{share:.1f}s"]
    status, stopped = started(command(flags, processes))
    if stopped:
        signals.mark(run, signal.SIGTERM)
        raise KeyboardInterrupt(f"stopped in {member.name}; continue with python folds.py --resume {run}")
    if status and not checkpoint.finished(folder):  # of degenerate scores the family is told at its end
        raise Failed(f"{member.name} failed with status {status}; continue with python folds.py --resume {run}", status)


def _wait_until_free(run: Path, seconds: float) -> None:
    """Wait for the owner of a run, on this host, to end; at most so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(UserError):
            return locks.refuse_if_held(run)
        time.sleep(0.1)


def command(flags: list[str], processes: int) -> list[str]:
    """The command line of train.py, under torchrun where it takes several processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(TRAIN), *flags]


def started(words: list[str]) -> tuple[int, bool]:
    """(exit status, whether it was stopped) of a command. Stop signals are passed on to it, so that it saves."""
    asked = []
    child = subprocess.Popen(words, start_new_session=True, preexec_fn=signals.end_with_parent)

    def pass_on(number, frame):
        asked.append(number)
        child.send_signal(number if number == signal.SIGINT else signal.SIGTERM)  # torchrun dies of others

    before = {number: signal.signal(number, pass_on) for number in signals.catchable()}
    try:
        return child.wait(), bool(asked)
    finally:
        signals.restore(before)


def plan_of(members: list[Member], processes: int) -> dict:
    """The plan of the first run, as train.py prints it, and how many there are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(cli.to_json(members[0].cfg))
        done = subprocess.run(
            command(["--cfg", str(path), "--dry_run"], processes),
            stdout=subprocess.PIPE,
            text=True,
            errors="backslashreplace",
            check=False,
        )
    *lines, last = done.stdout.splitlines() or [""]
    print("\n".join(lines), flush=True)
    if done.returncode:
        raise Failed(f"the dry run of {members[0].name} failed", done.returncode)
    print(f"{len(members)} runs like this one", flush=True)
    return {**json.loads(last), "runs": len(members)}


# ---- pool -----------------------------------------------------------------------------------------------------------


def pool(cfg: FoldsConfig, run: Path, labels: labelling.Labels, judged: Split, members: list[Member]) -> dict:
    """What the runs say together: each judged row once in val_predictions.csv, with the mean logits of the seeds.

    Mean and standard deviation of the runs' metrics, metrics of all rows with 95% bootstrap intervals, thresholds and
    calibration fitted on rows that their run did not see. Raises Degenerate, once all is written, where the scores of
    a run cannot be right.
    """
    logits = pooled_logits(labels, judged, members)
    results = {member.name: checkpoint.load_json(member.folder / "result.json") for member in members}
    scores = metrics.of_task(cfg.task, logits, judged.labels)
    rows = scores.pop("rows")
    shown = [name for name in scores if name == cfg.metric or name not in metrics.RANKING]
    intervals = bootstrap.intervals(cfg.task, logits, judged.labels, shown, seed=cfg.seed)
    means, deviations = spread([result["metrics"] for result in results.values()], list(scores))

    print(f"\n== {len(members)} runs together, {rows:,} rows")
    cut = [name for name, result in results.items() if result.get("ended_by") == "time_limit"]
    if cut:
        problem = f"the time limit ended {', '.join(cut)} early: the runs are not alike"
        print(warning(problem, "train all of them with a longer --time_limit, or with --max_steps"))
    print(f"{'':<16} {'mean':>8} {'std':>8} {'all rows':>9}   95% interval")
    for name in shown:
        if name in means and name in intervals:
            low, high = intervals[name]
            alone = f"{means[name]:8.4f} {deviations[name]:8.4f}"
            print(f"{name:<16} {alone} {scores[name]:9.4f}   {low:.4f} to {high:.4f}")
    print(tables.summary(cfg.task, logits, judged.labels, labels.names), flush=True)

    seconds = {name: sum(result[name] for result in results.values()) for name in ("train_seconds", "eval_seconds")}
    rates = {}
    for name in ("examples_per_second", "tokens_per_second"):
        done = sum(result[name] * result["train_seconds"] for result in results.values())
        rates[name] = round(done / max(seconds["train_seconds"], 1e-9), 2)
    result = {
        "run": str(run),
        "metrics": rounded({**scores, "rows": rows}),
        "mean": rounded(means),
        "std": rounded(deviations),
        "intervals": {name: [round(end, 6) for end in ends] for name, ends in intervals.items()},
        "runs": {name: result["metrics"] for name, result in results.items()},
        "majority": metrics.majority(cfg.task, judged.labels, cfg.metric, len(labels.names)),
        **evaluate.by_value(cfg, cfg.by_column, judged.rows, logits, judged.labels, print),
        **trained.fit_decision(plain(cfg), run, logits, judged.labels, WORLD),
        "ended_by": "time_limit" if cut else "",
        "val_sha256": splits.digest_of(judged.rows),
        "steps": sum(result["steps"] for result in results.values()),
        **rates,
        "peak_memory_gb": max(result["peak_memory_gb"] for result in results.values()),
        "flops": sum(result["flops"] for result in results.values()),
        **{name: round(value, 2) for name, value in seconds.items()},
    }
    predictions.write_predictions(run / "val_predictions.csv", judged, cfg.task, logits, labels)
    seals.write(run / seals.RESULT, result)
    weak = [name for name, result in results.items() if "degenerate" in result]
    if weak:
        raise Degenerate(f"the scores of {', '.join(weak)} are degenerate; the run is in {run}")
    return result


def pooled_logits(labels: labelling.Labels, judged: Split, members: list[Member]) -> np.ndarray:
    """(N, C) logits of the judged rows by the runs that did not see them, the mean over seeds.

    Raises Untrusted when a run's val_predictions.csv is not that of its rows, or a row was judged by no run.
    """
    place = {row: i for i, row in enumerate(judged.places)}
    of_seeds: dict[int, np.ndarray] = {}
    for member in members:
        ids, targets, logits = report_runs.validation_rows(member.folder, member.cfg, labels)
        if ids != member.judges.ids or not np.array_equal(targets, member.judges.labels):
            raise Untrusted(f"{member.folder}: val_predictions.csv does not hold this run's validation rows")
        if member.cfg.seed not in of_seeds:
            of_seeds[member.cfg.seed] = np.full((len(place), logits.shape[1]), np.nan, np.float32)
        of_seeds[member.cfg.seed][[place[row] for row in member.judges.places]] = logits
    logits = np.mean(list(of_seeds.values()), axis=0)
    if np.isnan(logits).any():
        raise Untrusted(f"{int(np.isnan(logits).any(axis=1).sum())} rows were judged by no run of every seed")
    return logits


def spread(results: list[dict], names: list[str]) -> tuple[dict, dict]:
    """Mean and standard deviation of each metric over the runs that have it."""
    means, deviations = {}, {}
    for name in names:
        values = [scores[name] for scores in results if name in scores]
        if values:
            means[name] = float(np.mean(values))
            deviations[name] = float(np.std(values, ddof=1 if len(values) > 1 else 0))
    return means, deviations


def rounded(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in scores.items()}


if __name__ == "__main__":
    ddp.launch(main)
