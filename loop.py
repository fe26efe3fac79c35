"""The training state and the step: what train.py and cpt.py share. Their loops read like this:

    with loop.stoppable(job, write):
        for micro_batches in loop.steps(job):
            loop.step(job, micro_batches, loss_of, weight)   # backward, sum over ranks, clip, update, log
            if loop.due(job, job.eval_every): ...
            loop.save_last(job, write)   # where it is due

A Job holds what a step needs; these are functions over it, and nothing is overridden. A run that is killed anywhere
and resumed repeats the same steps to the bit: they depend on State, the optimizer and the loss scale, nothing else.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import checks
import cli
import data
import ddp
import disk
import estimates
import faults
import locks
import lora
import numerics
import optim
import run_folder
import seals
import signals
import tracking
from errors import warning
from limits import Limit

LOADED = time.monotonic()
NO_LOG = {"log_bytes": 0}


# ---- state ----------------------------------------------------------------------------------------------------------


@dataclass
class State:
    """Everything that a run's next step depends on beside tensors. Stored in last/state.json."""

    micro_batches: int
    max_tokens: int = 0  # of a micro-batch; 0 until it is found: see memory.py
    step: int = 0  # optimizer steps of the plan that are done
    updates: int = 0  # those that changed parameters: the schedule counts these
    skipped: int = 0  # those whose gradients were not finite
    skipped_in_a_row: int = 0
    stepped: bool = False  # the step was done, its evaluation was not
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent training, saves included, evaluations not
    eval_seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    done: bool = False  # stopped early
    ended_by: str = ""  # the setting that stopped it: time_limit or patience
    evals: list = field(default_factory=list)  # of cpt.py: all evaluations so far


@dataclass
class Job:
    """One process's part of a run at step 0: what a step reads and changes. `restore` takes it to where a run was."""

    cfg: object  # the settings that train.py and cpt.py share
    world: ddp.World
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    precision: str  # of forward passes
    lengths: np.ndarray  # (N,) tokens of each training row
    digests: dict[str, str]  # of what a resumed run must see again, by its name in words; first the training rows
    about: dict  # entries for the manifest of every save
    run: Path | None = None  # from here on set by open_run
    log: seals.Log | None = None  # of rank 0, as the tracker
    tracker: tracking.Tracker | None = None
    limit: Limit | None = None
    bar: tqdm | None = None
    lapped: float = 0.0  # when the clock was last read
    probed: bool = False  # whether the first micro-batch was looked at for overflow
    late: bool = False  # the time limit ends the run with this step

    def __post_init__(self):
        cfg = self.cfg
        self.say = partial(ddp.say, self.world)
        self.state = State(max(cfg.micro_batches, self.world.size), cfg.max_tokens)
        self.scaler = optim.loss_scaler(self.world.device.type, self.precision == "fp16")
        self.gradients = ddp.GradientSum([p for p in self.model.parameters() if p.requires_grad], self.world)

        # The plan: how many steps there are, and when to evaluate and save.
        self.steps_per_epoch = math.ceil(len(self.lengths) / cfg.batch_size)
        self.total = min(cfg.epochs * self.steps_per_epoch, cfg.max_steps or math.inf)
        self.warmup = optim.warmup_updates(self.total, cfg.warmup_steps, cfg.warmup_ratio)
        self.eval_every = cfg.eval_every or self.steps_per_epoch
        self.save_every = cfg.save_every or self.eval_every
        self.spikes = faults.Spikes()


def say_ranks(world: ddp.World, cfg) -> str:
    """The precision to train in; prints it, and on what."""
    precision, why = numerics.choose_precision(cfg.precision, world, cfg.base)
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    ddp.say(world, f"{ranks} on {world.device.type}; precision {precision} ({why})")
    return precision


def say_plan(job: Job) -> None:
    """Print how many steps there are and how they are cut."""
    cfg, cut = job.cfg, job.state.micro_batches
    if cut != cfg.micro_batches:
        job.say(
            f"steps are cut into {cut} micro-batches, more than --micro_batches {cfg.micro_batches}, to keep "
            f"{job.world.size} ranks busy: equal to a run on fewer ranks to rounding only"
        )
    if not job.gradients.exact:
        job.say(f"{job.gradients.count:,} trained parameters: gradients are summed in fp32, equal to rounding only")
    mean = np.mean([len(micro_batches) for micro_batches in epoch_of(job, 0)])
    job.say(
        f"plan: {job.total:,} steps of {cfg.batch_size} rows in {mean:.1f} micro-batches of at most "
        f"{job.state.max_tokens:,} tokens, warm-up {job.warmup}, evaluation every {job.eval_every}, "
        f"save every {job.save_every}"
    )
    if job.warmup >= job.total:
        problem = f"the warm-up of {job.warmup:,} updates is as long as the run, which never reaches --lr {cfg.lr:g}"
        job.say(warning(problem, "lower --warmup_steps or --warmup_ratio, or train longer"))


# ---- the step -------------------------------------------------------------------------------------------------------


def epoch_of(job: Job, epoch: int) -> list[list[np.ndarray]]:
    """The steps of an epoch as lists of micro-batches: a function of the seed, not of the number of ranks."""
    cfg = job.cfg
    cut = job.state.max_tokens, job.state.micro_batches
    return data.plan_epoch(job.lengths, cfg.batch_size, *cut, cfg.seed, epoch)


def steps(job: Job) -> Iterator[list[np.ndarray]]:
    """The micro-batches of each step that is left: arrays of row indices.

    A step that was done when its evaluation was interrupted comes first again; `step` knows it.
    """
    state, planned = job.state, None
    while state.stepped or (state.step < job.total and not state.done):
        epoch, index = divmod(state.step - state.stepped, job.steps_per_epoch)
        if epoch != planned:
            planned, batches = epoch, epoch_of(job, epoch)
        yield batches[index]
    with suppress(OSError):
        job.bar.close()
    job.say(faults.at_the_end(state.skipped_in_a_row))


@contextmanager
def stoppable(job: Job, write: Callable):
    """Around training: when any rank is asked to stop, last/ is saved as of the last whole step.

    Raises KeyboardInterrupt then, after a note in the run's folder.
    """
    run = None
    signals.STOP.begin()
    try:
        yield
        if ddp.stopping(job.world):
            raise signals.Stopped
        run = job.run
    except signals.Stopped:
        save(job.run / "last", job, write, resumable=True)
        if job.world.rank == 0:
            signals.mark(job.run, signals.STOP.number or signals.NUMBERS[0])
        raise KeyboardInterrupt(f"stopped after step {job.state.step}; continue with --resume {job.run}") from None
    finally:
        signals.STOP.end(run)


def step(job: Job, micro_batches: list[np.ndarray], loss_of: Callable, weight: float) -> None:
    """One optimizer step, the same on any number of ranks; then its line of the log.

    loss_of(rows) is the summed loss of a micro-batch, weight what the step's sum is divided by. Raises Stopped, with
    nothing changed, where a rank was asked to stop; FloatingPointError for gradients that stay not finite.
    """
    world, state, cfg = job.world, job.state, job.cfg
    if state.stepped:
        return
    factor = optim.lr_factor(state.updates, job.total, job.warmup, cfg.schedule)
    forwards = []  # of this rank, to be repeated where numbers go bad

    # Each rank takes its share of the micro-batches; a micro-batch's dropout depends on its number, not on the rank.
    for j, rows in list(enumerate(micro_batches))[world.rank :: world.size]:
        if signals.STOP.number:
            break
        ddp.computes()
        forwards.append(partial(seeded_loss, job, j, rows, loss_of, weight))
        with estimates.room_for(int(job.lengths[rows].sum()), world.device):
            faults.probe(job, forwards)
            loss = forwards[-1]()
            job.scaler.scale(loss).backward()
        job.gradients.add(loss)

    # The loss and the reasons to stop travel with the gradients, so that all ranks decide alike.
    sums = job.gradients.reduce(bool(signals.STOP.number), job.limit.over(state))
    norm, taken, (loss, count, stopping, late, *bad) = optim.step(
        job.optimizer, job.scaler, factor, cfg.grad_clip, sums, lambda riders: riders[1] == len(micro_batches)
    )
    if count < len(micro_batches):
        raise signals.Stopped
    job.late = bool(late)
    state.skipped_in_a_row = 0 if taken else state.skipped_in_a_row + 1
    if not taken:
        state.skipped += 1
        faults.skip(job, forwards, loss, [rank for rank, is_bad in enumerate(bad) if is_bad])
    job.gradients.clear()

    # Count what was done. An adapter that its first update does not move is a bug, not a slow start.
    rows = np.concatenate(micro_batches)
    state.step += 1
    state.stepped = True
    state.updates += taken
    state.rows += len(rows)
    state.tokens += int(job.lengths[rows].sum())
    if taken and state.updates == 1:
        lora.assert_moved(job.model)
    lap(job, "seconds")

    # Strict JSON has no NaN: a step that was not taken has no loss.
    line = {
        "step": state.step,
        "epoch": round(state.step / job.steps_per_epoch, 4),
        "lr": cfg.lr * factor,
        "loss": loss if taken else None,
        "grad_norm": norm if taken else None,
        "tokens": state.tokens,
        "skipped": state.skipped,
        "seconds": round(state.seconds, 3),
    }
    log(job, line)
    with suppress(OSError):  # nobody sees the bar any more
        job.bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{state.tokens / state.seconds:,.0f}", refresh=False)
        job.bar.update()
    job.say(job.limit.forecast(state, job.total))
    job.say(job.spikes.note(state.step, loss) if taken else "")


def seeded_loss(job: Job, number: int, rows: np.ndarray, loss_of: Callable, weight: float) -> torch.Tensor:
    """A micro-batch's share of the step's loss, with the dropout of its number."""
    torch.manual_seed(ddp.micro_seed(job.cfg.seed, job.state.step, number))
    return loss_of(rows) / weight


def due(job: Job, every: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens after this one."""
    done = job.state.step
    return done % every == 0 or done == job.total or job.late


# ---- log and clock --------------------------------------------------------------------------------------------------


def log(job: Job, line: dict) -> None:
    """Append a line to metrics.jsonl, and send it to the trackers of the config; rank 0 alone writes."""
    if job.tracker:
        locks.need()
        data = (json.dumps(line) + "\n").encode()
        checkpoint.append_whole(job.log.path, data)
        job.log.add(data)
        job.tracker.log(line)


def lap(job: Job, counter: str) -> float:
    """Add the seconds since the last call to one of the state's counters, and return them."""
    now = time.perf_counter()
    seconds, job.lapped = now - job.lapped, now
    vars(job.state)[counter] += seconds
    return seconds


def process_seconds() -> float:
    """Seconds since this process was started; since this file was loaded if the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        age = 0.0
    return max(age, time.monotonic() - LOADED)


def measured(job: Job) -> dict:
    """What the result of a run holds beside its scores."""
    state = job.state
    return {
        "run": str(job.run),
        "best_step": state.best_step,
        "steps": state.step,
        "tokens_per_second": round(state.tokens / state.seconds, 1),
        "peak_memory_gb": round(estimates.peak_memory_gb(job.world.device), 3),
        "train_seconds": round(state.seconds, 2),
        "eval_seconds": round(state.eval_seconds, 2),
    }


def end(job: Job, result: dict) -> None:
    """End the trackers' curves, and write result.json, the last file: it marks the run as finished."""
    job.tracker.close()
    seals.write(job.run / seals.RESULT, result)


# ---- runs on disk ---------------------------------------------------------------------------------------------------


def begin(cls, presets: dict, argv: list[str], doc: str, clashes=()):
    """(settings, the flags given by hand, ranks, the run to resume or None) of a training command.

    Raises UserError for everything wrong with the settings.
    """
    cfg, given = cli.parse(cls, presets, argv, doc)
    cfg = checks.own_data(cfg, given)
    checks.check(cfg, given, clashes=clashes)
    world = ddp.setup()
    cfg, run = to_resume(cfg, given, world)
    ddp.say(world, checks.preset_note(given, argv))
    return cfg, given, world, run


def to_resume(cfg, given: set[str], world: ddp.World, family: bool = False):
    """As run_folder.to_resume, with the precision that the run keeps."""
    cfg, run = run_folder.to_resume(cfg, given, world, family)
    return replace(cfg, precision=numerics.settled(cfg.precision, world, cfg.base, resumed=bool(run))), run


def open_run(job: Job, run: Path | None, fill: Callable, val_tokens: float = 0.0) -> None:
    """Make or complete the run's folder (see run_folder.py), and start its log, time limit, bar and clock.

    val_tokens: of an evaluation, for the time limit.
    """
    cfg, world, state = job.cfg, job.world, job.state
    disk.need_room(run or Path(cfg.outputs), save_bytes(job, resumable=False) + save_bytes(job, resumable=True))
    job.run = run_folder.make(cfg, world, run, job.digests, fill)
    resumed = f", resumed at step {state.step} of {job.total}" if state.step else ""
    job.say(f"run {job.run}{resumed}")
    if world.rank == 0:
        job.log = job.log or seals.Log(job.run, NO_LOG)
        job.tracker = tracking.Tracker(cfg.report, job.run, cli.to_json(cfg), state.step)
    job.limit = Limit(checks.seconds(getattr(cfg, "time_limit", "")), world.rank, val_tokens, process_seconds)
    job.bar = tqdm(total=job.total, initial=state.step, disable=world.rank != 0, unit="step", mininterval=1.0)
    job.lapped = time.perf_counter()


def save(folder: Path, job: Job, write: Callable, resumable: bool = False) -> None:
    """A save of the model by write(folder); resumable: with all that the next step depends on. Rank 0 alone writes.

    Raises FloatingPointError, on all ranks, for values that are not finite.
    """
    bad = numerics.not_finite(faults.trained_state(job.model, job.optimizer))
    if bad:
        raise FloatingPointError(f"step {job.state.step}: not finite: {faults.names(bad)}; not saved; {faults.REMEDY}")

    if job.world.rank != 0:
        return
    locks.need()

    def whole(hidden: Path) -> None:
        write(hidden)
        if resumable:
            checkpoint.save_tensors(hidden / "state.safetensors", checkpoint.optimizer_tensors(job.optimizer))
            state = {
                "at": vars(job.state),
                "scaler": job.scaler.state_dict(),
                **job.log.facts(),
                "digest": next(iter(job.digests.values())),
                "threads": torch.get_num_threads(),
            }
            checkpoint.save_json(hidden / "state.json", state)

    about = {
        "step": job.state.step,
        "best": job.state.best,
        "run": seals.stored(job.run)["run"],
        **job.about,
        "versions": {"torch": torch.__version__, "lasttoken": 1},
    }
    checkpoint.save(folder, whole, about, job.cfg.keep, save_bytes(job, resumable))


def save_bytes(job: Job, resumable: bool) -> int:
    """About how many bytes a save takes: an adapter or the whole model, in fp32, and AdamW's two moments."""
    trained = 4 * job.gradients.count
    whole = sum(4 * p.numel() for p in job.model.parameters())
    return (trained if lora.adapters(job.model) else whole) + (2 * trained if resumable else 0)


def save_last(job: Job, write: Callable) -> None:
    """A step and its evaluation are done: save all that the next step depends on, where that is due.

    While steps are skipped in a row the save stays as it was before: what made them bad may be gone after a restart.
    """
    job.state.stepped = False
    good = not job.state.skipped_in_a_row or job.state.step == job.total
    if job.state.done or (due(job, job.save_every) and good):
        save(job.run / "last", job, write, resumable=True)


def restore(job: Job, run: Path, read: Callable) -> None:
    """Take a job to the run's last save: the model by read(save), optimizer, scaler, state; cut the log back to it.

    Nothing else is stored: dropout and the order of rows follow from the seed and the step, the learning rate from the
    updates. Without a save the run starts at step 0. Raises UserError when another process trains the run, Untrusted
    for files that are not as it wrote them.
    """
    ddp.from_rank0(job.world, lambda: locks.hold(run))
    save, saved = checkpoint.last_state(run) or (None, NO_LOG)
    if job.world.rank == 0:
        job.log = seals.Log(run, saved)
    if not save:
        job.say(f"{run} has no save yet: it starts at step 0")
        return
    threads = torch.get_num_threads()
    if saved["threads"] != threads:
        problem = f"{threads} threads, but the run began with {saved['threads']}: equal to rounding, not to the bit"
        job.say(warning(problem, f"set OMP_NUM_THREADS={saved['threads']}"))
    read(save)
    checkpoint.load_optimizer_tensors(job.optimizer, checkpoint.load_tensors(save.folder / "state.safetensors"))
    if saved["scaler"] and job.scaler.is_enabled():
        job.scaler.load_state_dict(saved["scaler"])
    elif bool(saved["scaler"]) != job.scaler.is_enabled():
        problem = "this run began in another precision: equal to rounding, not to the bit"
        job.say(warning(problem, "continue on hardware like that of environment.json"))
    saved["at"].pop("resumed", None)  # of runs before it was left out
    job.state = State(**{"max_tokens": job.cfg.max_tokens} | saved["at"])
    run_folder.best_save(job.state, run, job.say)
