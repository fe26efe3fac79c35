"""A run's folder: which one is resumed, what it holds at the start, and whether it is still the run that it was."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import checkpoint
import cli
import configs
import ddp
import locks
import seals
from errors import Untrusted, UserError, warning


def to_resume(cfg, given: set[str], world: ddp.World, family: bool = False):
    """(config, run folder) of the run that cfg.resume means; (cfg, None) when a new run starts.

    family: whether a family of runs over folds and seeds is meant, or one run. Rank 0 looks for it. Raises UserError
    for flags given by hand that contradict the run.
    """
    run = None
    if cfg.resume:
        name = configs.dataset_name(cfg)
        found = ddp.from_rank0(world, lambda: checkpoint.find_run(cfg.resume, cfg.outputs, cfg.base, name, family))
        run = Path(found) if found else None
        note = "--resume auto: no unfinished run of this base and dataset; a new one starts"
        ddp.say(world, seals.note(run) if run else note)
    if run:
        cfg = cli.resumed(cfg, given, run)
    return cfg, run


def make(cfg, world: ddp.World, run: Path | None, digests: dict[str, str], fill: Callable) -> Path:
    """The next run_<i>, made by rank 0; or the run to resume, completed: folds.py starts runs with a config.json alone.

    fill(folder) writes the files that a script knows before its first step. digests: see Job.
    """

    def on_rank0() -> Path:
        folder = run or checkpoint.new_run(cfg.outputs, cfg.base, configs.dataset_name(cfg))
        locks.hold(folder)
        (folder / "PREEMPTED").unlink(missing_ok=True)
        if not seals.has(folder / "environment.json"):
            fill(folder)
            seals.write(folder / "rows.json", digests)
            seals.write(folder / "environment.json", checkpoint.environment(world.size, world.device))
        if not seals.has(folder / "config.json"):  # last: a folder without it is no run
            seals.write(folder / "config.json", cli.to_json(replace(cfg, resume="")))
        return folder

    ddp.barrier(world)  # a run whose ranks do not all come this far leaves no folder
    return Path(ddp.from_rank0(world, on_rank0))


def same_rows(run: Path | None, digests: dict[str, str]) -> None:
    """Raise UserError, naming them, where rows or labels are not those that a run began with.

    A run from before there was a rows.json kept a digest of its training rows alone, in each save.
    """
    began = {}
    if run and seals.has(run / "rows.json"):
        began = checkpoint.load_json(run / "rows.json")
    elif run and (last := checkpoint.last_state(run)):
        began = {next(iter(digests)): last[1]["digest"]}
    changed = [f"{name} changed" for name in digests if name in began and began[name] != digests[name]]
    if changed:
        raise UserError(f"run {run}: {', '.join(changed)} since it began: give it the files that it began with")


def best_save(state, run: Path, say: Callable) -> checkpoint.Save | None:
    """The best save that can be trusted, or None before there is one. Where a newer one was damaged, the training state
    goes back to it, with a warning.

    A save that is newer than the state is no problem: its evaluation will be repeated. Raises Untrusted where no save
    is left.
    """
    if state.best is None:
        return None
    save = checkpoint.trusted_of(run, "best")
    if save is None:
        raise Untrusted(f"{run / 'best'} is missing, but step {state.best_step} was saved there: put it back")
    step = save.manifest["step"]
    if step < state.best_step:
        lost = f"{run / 'best'} of step {state.best_step} (score {state.best:.4f}) cannot be trusted"
        say(warning(lost, f"the best save is now that of step {step}: check this disk"))
        state.best, state.best_step = save.manifest.get("best", state.best), step  # older saves hold no score
    return save


def finished_run(run: str, outputs: str, script: str = "train.py") -> Path:
    """The named run, or the newest finished one of a script under `outputs`. Raises UserError when there is none."""
    if run:
        return Path(run)
    present, absent = ("labels.json", "") if script == "train.py" else ("config.json", "labels.json")
    newest = checkpoint.newest_finished(outputs, present, absent)
    if newest is None:
        raise UserError(f"no finished run under {outputs}/: train one (python {script}), or name one with --runs")
    return newest
