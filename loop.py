"""The training state and the step."""

import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

import checkpoint
import cli
import configs
import ddp
import metrics
import tracking
from errors import UserError


@dataclass
class State:
    """Everything that the loop needs beside tensors. Stored as last/state.json."""

    micro_batches: int
    step: int = 0  # optimizer steps of the plan that are done
    updates: int = 0  # those that changed parameters: the schedule counts these
    skipped: int = 0  # those whose fp16 gradients were not finite
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training, saves included, evaluations not
    eval_seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    done: bool = False  # stopped early
    evals: list = field(default_factory=list)  # of cpt: all evaluations so far
    resumed: int = 0  # the step that this process began with


def step_line(at: State, epoch: float, lr: float, loss: float | None, grad_norm: float | None) -> dict:
    """A step's line of metrics.jsonl."""
    line = {"step": at.step, "epoch": epoch, "lr": lr, "loss": loss, "grad_norm": grad_norm}
    return {**line, "tokens": at.tokens, "skipped": at.skipped, "seconds": round(at.seconds, 3)}


class Log:
    """metrics.jsonl of a run, and the reports that the config names; rank 0 alone writes."""

    def __init__(self, run: Path, cfg, world: ddp.World, step: int):
        self.path = run / "metrics.jsonl"
        self.tracker = tracking.Tracker(cfg.report, run, cli.to_json(cfg), step) if world.rank == 0 else None

    def write(self, line: dict) -> None:
        if self.tracker:
            checkpoint.append_line(self.path, line)
            self.tracker.log(line)

    def close(self) -> None:
        if self.tracker:
            self.tracker.close()


class Limit:
    """A time limit (0 for none): when to stop so that evaluations and saves still fit, and what first steps foretell.

    val_tokens: of the evaluation, whose time is guessed from training until one was measured. Only rank 0 looks at the
    clock: the others hear of it with the step's sums.
    """

    def __init__(self, seconds: float, world: ddp.World, val_tokens: float):
        self.seconds, self.rank, self.val_tokens = seconds, world.rank, val_tokens
        self.evaluation, self.begun, self.said = 0.0, None, False

    def left(self, at: State) -> float:
        """Seconds for training: what is left without two evaluations, of the last step and of best/, and the saves."""
        guess = 0.5 * self.val_tokens * at.seconds / max(at.tokens, 1)
        return self.seconds - process_seconds() - 2.2 * (self.evaluation or guess) - 4.0

    def over(self, at: State) -> bool:
        """Whether this step should be the last one."""
        return bool(self.seconds) and self.rank == 0 and self.left(at) < 0

    def forecast(self, at: State, total: int) -> str:
        """Once, after a few steps: how long all of them take and how many fit; an empty string otherwise."""
        self.begun = self.begun or (at.step, at.seconds)
        steps, seconds = at.step - self.begun[0], at.seconds - self.begun[1]
        if not self.seconds or self.said or steps < 10:
            return ""
        self.said, a_step = True, seconds / steps
        fit = min(total, at.step + int(max(0.0, self.left(at)) / a_step))
        whole = f"{total - at.step:,} more steps take about {(total - at.step) * a_step / 60:.1f} min"
        ends = "all of them fit" if fit == total else f"it will end at about step {fit:,} of {total:,}"
        return f"forecast: {whole}; with the time limit of {self.seconds / 60:.1f} min {ends}"


LOADED = time.monotonic()


def process_seconds() -> float:
    """Seconds since this process was started; since this file was loaded where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        age = 0.0
    return max(age, time.monotonic() - LOADED)


class Clock:
    """Adds the time since the last lap to one of the state's counters of seconds, and returns it."""

    def __init__(self, at: State):
        self.at, self.last = at, time.perf_counter()

    def lap(self, counter: str) -> float:
        now, before = time.perf_counter(), self.last
        setattr(self.at, counter, getattr(self.at, counter) + now - before)
        self.last = now
        return now - before


def run_to_resume(cfg, given: set[str], world: ddp.World):
    """(config, run folder) of the run that cfg.resume means; (cfg, None) when a new run starts.

    Rank 0 looks, all know. Raises UserError for flags given by hand that contradict the run.
    """
    if not cfg.resume:
        return cfg, None
    name = configs.dataset_name(cfg)
    found = ddp.from_rank0(world, lambda: checkpoint.find_run(cfg.resume, cfg.outputs, cfg.base, name))
    if not found:
        ddp.say(world, "--resume auto: no unfinished run of this base and dataset; a new one starts")
        return cfg, None
    return cli.resumed(cfg, given, Path(found)), Path(found)


def new_run(cfg, world: ddp.World, facts: dict[str, str], folder: Path | None = None) -> Path:
    """Make the run folder, on rank 0, and write what is known at the start; facts: more files and their texts.

    folder: of one run among several, in the place of the next run_<i>.
    """

    def make() -> Path:
        run = folder or checkpoint.new_run(cfg.outputs, cfg.base, configs.dataset_name(cfg))
        run.mkdir(exist_ok=True)
        environment = checkpoint.environment(torch.get_num_threads(), world.size, device_name(world))
        texts = {"environment.json": json.dumps(environment, indent=1) + "\n", **facts}
        for name, text in {**texts, "config.json": cli.to_json(replace(cfg, resume=""))}.items():
            checkpoint.write_atomic(run / name, text)
        return run

    return Path(ddp.from_rank0(world, make))


def save(target: Path, world, write, about: dict, keep: int, state: tuple | None = None) -> None:
    """Write best/ or, with the state (log, at, optimizer, scaler, digest) to go on from, last/. Rank 0 alone writes."""
    if world.rank != 0:
        return

    def whole(folder: Path) -> None:
        write(folder)
        if state:
            log, at, optimizer, scaler, digest = state
            checkpoint.save_tensors(folder / "state.safetensors", checkpoint.optimizer_tensors(optimizer))
            facts = {
                "at": vars(at),
                "scaler": scaler.state_dict(),
                "log_bytes": log.path.stat().st_size,
                "digest": digest,
            }
            checkpoint.save_json(folder / "state.json", {**facts, "threads": torch.get_num_threads()})

    versions = {"torch": torch.__version__, "lasttoken": 1}
    checkpoint.save(target, whole, {**about, "versions": versions}, keep)


def restore(run: Path, world, read, optimizer, scaler, digest: str) -> State | None:
    """Load the last save, the model by read(folder), and cut the log back to it; None if nothing was saved yet.

    Raises UserError when the training rows are not those the run began with.
    """
    found = checkpoint.last_state(run)
    if world.rank == 0:
        checkpoint.cut_log(run / "metrics.jsonl", found[1]["log_bytes"] if found else 0)
    if not found:
        ddp.say(world, f"{run} has no save yet: it starts at step 0")
        return None
    folder, saved = found
    if saved["digest"] != digest:
        raise UserError(f"--resume {run}: the training rows or their tokens changed since this run began")
    if saved["threads"] != torch.get_num_threads():
        ddp.say(
            world,
            f"warning: {torch.get_num_threads()} threads, the run began with {saved['threads']}: "
            "equal to rounding, not to the bit (set OMP_NUM_THREADS)",
        )
    read(folder)
    checkpoint.load_optimizer_tensors(optimizer, checkpoint.load_tensors(folder / "state.safetensors"))
    if saved["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(saved["scaler"])
    elif bool(saved["scaler"]) != scaler.is_enabled():
        ddp.say(world, "warning: the precision is not the one this run began with: equal to rounding, not to the bit")
    at = State(**saved["at"])
    at.resumed = at.step
    return at


def device_name(world: ddp.World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def peak_memory_gb(world: ddp.World) -> float:
    """Of this process: memory allocated on its GPU, or resident on a CPU (0 where that is not known)."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def better(scores: dict[str, float], best: float | None, metric: str) -> bool:
    """Whether an evaluation beats the best so far; losses and errors are the smaller the better."""
    return metrics.better(scores.get(metric), best, metric)
