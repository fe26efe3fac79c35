"""Fine-tune a decoder LLM as a text classifier: LoRA or the base itself, on one process or under torchrun.

    python train.py                                        # the embedded base and problems, a minute on a CPU
    torchrun --nproc_per_node=2 train.py --cfg qwen3b --train_data train.csv --text "{Question}" --label_column label
    python train.py --cfg qwen05b --train_data my.csv --dry_run
    python train.py --resume auto                          # continue the newest unfinished run, bit for bit
    python train.py --train_data my.csv --folds 5 --fold 0 # one fold of five; folds.py trains and pools all of them

The run is the same on any number of ranks: see "the batch plan" in data.py and GradientSum in ddp.py.
runs/minimal.py has the core of this file without its options: read it first.
"""

import cli
from configs import TrainConfig
from presets import TRAIN_PRESETS

if __name__ == "__main__":  # help and typos are answered before torch is loaded, which takes seconds
    cli.early(TrainConfig, TRAIN_PRESETS, __doc__)

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import chains
import ddp
import estimates
import evaluate
import faults
import locks
import loop
import lora
import losses
import memory
import metrics
import model as models
import numerics
import optim
import predictions
import prepare
import prompts
import run_folder
import splits
import tables
import trained
from errors import Degenerate
from labelling import Labels
from packed import pack
from prepare import Material
from splits import Split

CLASHES = [
    (
        "--folds moved: python folds.py --folds {folds} trains every fold; --fold 0 with it trains one here",
        lambda cfg: cfg.folds > 0 > cfg.fold,
    )
]


@locks.released()
def main(argv: list[str]) -> dict:
    # ---- settings, ranks, the run to resume -------------------------------------------------------------------------
    cfg, _, world, run = loop.begin(TrainConfig, TRAIN_PRESETS, argv, __doc__, CLASHES)
    say = partial(ddp.say, world)

    # ---- data -------------------------------------------------------------------------------------------------------
    # Everything that can be wrong with the rows is found here, before the base's weights are loaded.
    cfg, material = prepare.read(cfg, say, world)
    labels, tokenizer = material.labels, material.tokenizer
    train, judges = splits.cut(cfg, material.rows, material.val, run, say)
    digests = splits.digests(train, judges, labels)
    run_folder.same_rows(run, digests)
    say(prepare.check(cfg, train, judges, len(labels.names)))
    problems = splits.audit_rows(cfg, labels, train, judges, print) if world.rank == 0 else {}

    # ---- model ------------------------------------------------------------------------------------------------------
    precision = loop.say_ranks(world, cfg)
    say(prepare.untrained_labels(cfg.task, train.labels, labels.names))
    model = new_model(cfg, material, precision, say, world)
    say(evaluate.weak_tokens(model, tokenizer, train.tokens))
    say(lora.trainable_table(model))
    weights = losses.label_weights(cfg.task, cfg.class_weights, cfg.pos_weight, train.labels, len(labels.names))

    # ---- optimizer --------------------------------------------------------------------------------------------------
    rates = cfg.lr, cfg.head_lr, cfg.weight_decay
    groups = optim.parameter_groups(model.named_parameters(), *rates, model.heads)
    optimizer = optim.adamw(groups, cfg.optimizer)
    if cfg.optimizer.startswith("paged") and world.device.type != "cuda":
        say(f"{cfg.optimizer}: paging exists on GPUs only; the state stays in this machine's memory")
    job = loop.Job(
        cfg,
        world,
        model,
        optimizer,
        precision,
        lengths=train.tokens.lengths,
        digests=digests,
        about={"base": model.base_fingerprint},
    )

    # ---- resume, or a new run ---------------------------------------------------------------------------------------
    if run and not cfg.dry_run:
        loop.restore(job, run, partial(trained.read_save, model=model))
    if cfg.init_from and not job.state.step:
        say(chains.start_from(Path(cfg.init_from), cfg, labels, model))
    on_device = None
    if weights is not None:
        on_device = torch.from_numpy(weights).float().to(world.device)
    loss_of = partial(batch_loss, job, train, on_device)
    memory.fit(job, loss_of)
    loop.say_plan(job)
    if cfg.dry_run:
        return dry_run(job, loss_of)
    fill = partial(prepare.write, cfg=cfg, material=material, problems=problems)
    loop.open_run(job, run, fill, val_tokens=float(judges.tokens.lengths.sum()))

    # ---- loop, end --------------------------------------------------------------------------------------------------
    write = partial(trained.write_classifier, model=model, tokenizer=tokenizer, labels=labels)
    with loop.stoppable(job, write):
        fit(job, train, judges, loss_of, weights, write)
    return finish(job, train, judges, labels)


# ---- set-up ---------------------------------------------------------------------------------------------------------


def new_model(cfg: TrainConfig, material: Material, precision: str, say: Callable, world) -> models.Classifier:
    """The classifier to train, and what is worth knowing about its attention and pooling."""
    model = trained.new_classifier(cfg, material.labels, material.tokenizer, world.device, precision)
    model.train()
    if cfg.grad_checkpoint:
        models.checkpoint_activations(model.backbone)
    say(models.attention_note(world.device, model.config, precision))
    if not model.family.packs:
        torch.use_deterministic_algorithms(False)  # DeBERTa's gradients would sort every cell of its attention
    if cfg.pooling == "last" and model.family.encoder:
        say("note: the last token of an encoder is a separator; its head was made for --pooling cls")
    return model


def dry_run(job: loop.Job, loss_of: Callable) -> dict:
    """Time the largest micro-batch forward and backward, print what the run would take, and stop."""
    device = job.world.device
    rows = max(sum(loop.epoch_of(job, 0), []), key=lambda rows: job.lengths[rows].sum())
    size = int(job.lengths[rows].sum())
    with estimates.room_for(size, device):
        memory = estimates.memory_estimate(job.model, job.gradients, partial(loss_of, rows))
        for _ in range(2):  # the first one warms up
            started = time.perf_counter()
            loss_of(rows).backward()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    rate = size / seconds * job.world.size
    tokens = float(job.lengths.sum()) * job.total / job.steps_per_epoch
    total = sum(memory.values())
    parts = ", ".join(f"{name} {gigabytes:.2f}" for name, gigabytes in memory.items())
    peak = ""
    if device.type == "cuda":
        peak = f"; peak without AdamW {estimates.peak_memory_gb(device):.2f} GB"
    job.say(f"memory: about {total:.2f} GB a rank at the largest micro-batch, {size:,} tokens ({parts}){peak}")
    job.say(
        f"time: about {tokens / rate / 60:.1f} min for {tokens:,.0f} tokens at {rate:,.0f} tokens/s, "
        "without evaluations (one micro-batch timed)"
    )
    return {
        "run": None,
        "dry_run": True,
        "steps": job.total,
        "rows": len(job.lengths),
        "tokens": int(tokens),
        "memory_gb": round(total, 3),
        "train_seconds": round(tokens / rate, 1),
    }


# ---- loop -----------------------------------------------------------------------------------------------------------


def batch_loss(job: loop.Job, train: Split, weights: torch.Tensor | None, rows: np.ndarray) -> torch.Tensor:
    """The loss of a micro-batch, summed over its rows. weights (C,): of classes, or of labels' positives."""
    device = job.world.device
    targets = [train.labels[rows]]
    if train.soft is not None:
        targets.append(train.soft[rows])
    batch = pack(train.tokens, rows, device, beside=targets)
    with numerics.autocast(device, job.precision):
        logits = job.model(batch)
    return losses.loss_sum(job.cfg, logits, batch.beside[0], weights, *batch.beside[1:])


def fit(job: loop.Job, train: Split, judges: Split, loss_of: Callable, weights, write: Callable) -> None:
    """Step, log, evaluation, save: until the plan is done, patience or a time limit ends it, or a signal stops it.

    weights: of classes or of labels' positives, or None.
    """
    cfg, world, state = job.cfg, job.world, job.state
    some = splits.periodic_rows(cfg, judges.labels, job.model.outputs)

    for micro_batches in loop.steps(job):
        # step, log: micro-batches are means over the whole step, so their losses are divided by its weight
        rows = np.concatenate(micro_batches)
        weight = losses.TASKS[cfg.task].weight(train.labels[rows], weights)
        loop.step(job, micro_batches, loss_of, weight)

        # evaluation: best/ holds the model with the best metric so far
        if loop.due(job, job.eval_every):
            tokens = judges.tokens.take(some)
            logits = evaluate.score(job.model, tokens, world, job.precision, state.max_tokens)
            if not np.isfinite(logits).all():
                forward = partial(loss_of, micro_batches[0])
                raise faults.not_finite(job, [forward], f"step {state.step}: scores not finite")
            scores = metrics.of_task(cfg.task, logits, judges.labels[some])
            job.limit.evaluation = loop.lap(job, "eval_seconds") * len(judges.labels) / len(some)
            loop.log(job, {"step": state.step, "eval": scores})
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "rows")
            job.say(f"step {state.step}: {shown}")
            if metrics.better(scores.get(cfg.metric), state.best, cfg.metric):
                state.best = scores.get(cfg.metric, -1.0)
                state.best_step = state.step
                state.stale = 0
                loop.save(job.run / "best", job, write)
            else:
                state.stale += 1
            if job.late:
                state.ended_by = "time_limit"
            elif 0 < cfg.patience <= state.stale:
                state.ended_by = "patience"
            state.done = bool(state.ended_by)

        # save: last/ holds all that the next step depends on
        loop.save_last(job, write)


# ---- end ------------------------------------------------------------------------------------------------------------


def finish(job: loop.Job, train: Split, judges: Split, labels: Labels) -> dict:
    """Score the best save on all validation rows, fit thresholds and calibration, and write the results.

    Raises Degenerate for scores that cannot be right.
    """
    cfg, world, state, run, say = job.cfg, job.world, job.state, job.run, job.say
    if state.ended_by:
        say(f"stopped early, at step {state.step} of {job.total}: --{state.ended_by} {getattr(cfg, state.ended_by)}")

    # The best save is what users load: it is scored as it was read back from the disk.
    ddp.barrier(world)  # rank 0 has written best/
    best = run_folder.best_save(state, run, say)
    trained.read_classifier(best.folder, job.model)
    logits = evaluate.score(job.model, judges.tokens, world, job.precision, state.max_tokens)
    scores = metrics.of_task(cfg.task, logits, judges.labels)
    loop.lap(job, "eval_seconds")
    reached = scores.get(cfg.metric, -1.0)
    saved = best.manifest.get("best", reached)
    room = 0.02 * max(1.0, abs(saved))  # other hardware may flip a few rows
    evaluated_all = not 0 < cfg.eval_rows < len(judges.labels)
    if evaluated_all and abs(reached - saved) > room:
        raise AssertionError(f"best/ reloaded scores {cfg.metric} {reached}, saved with {saved}")
    say(f"best checkpoint by {cfg.metric}: step {state.best_step}")
    say(tables.summary(cfg.task, logits, judges.labels, labels.names))

    result = {
        **loop.measured(job),
        "train_rows": len(train.ids),
        "text_sha256": prompts.digest(cfg.text),
        "metrics": {name: round(value, 6) for name, value in scores.items()},
        **evaluate.by_value(cfg, cfg.by_column, judges.rows, logits, judges.labels, say),
        "majority": metrics.majority(cfg.task, judges.labels, cfg.metric, len(labels.names)),
        **trained.fit_decision(cfg, run, logits, judges.labels, world),
        "ended_by": state.ended_by,
        "val_sha256": splits.digest_of(judges.rows),
        "examples_per_second": round(state.rows / state.seconds, 2),
        "flops": estimates.training_flops(job.model, job.lengths) * state.rows / len(job.lengths),
    }
    if cfg.init_from:
        result["chain"] = chains.chain_table(cfg, result, say)
    reason = evaluate.degenerate(logits, judges.tokens.keys(), cfg.task)
    if reason:
        result["degenerate"] = reason
    if world.rank == 0:
        predictions.write_predictions(run / "val_predictions.csv", judges, cfg.task, logits, labels)
        loop.end(job, result)
    if reason:
        raise Degenerate(f"{reason}; the run is in {run}")
    return result


if __name__ == "__main__":
    ddp.launch(main)
