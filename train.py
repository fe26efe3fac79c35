"""Fine-tune a decoder LLM as a text classifier: LoRA or the base itself, on one process or under torchrun.

    python train.py                                        # the embedded base and problems, a minute on a CPU
    torchrun --nproc_per_node=2 train.py --cfg qwen3b --train_data train.csv --text "{Question}" --label_column label
    python train.py --cfg qwen05b --train_data my.csv --dry_run
    python train.py --resume auto                          # go on with the newest unfinished run, bit for bit

The run is the same on any number of ranks: see "the batch plan" in data.py and GradientSum in ddp.py.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bases
import bootstrap
import checkpoint
import checks
import cli
import configs
import data
import ddp
import estimates
import evaluate
import labelling
import loop
import lora
import losses
import metrics
import model as models
import numerics
import optim
import predictions
import prompts
import splits
import tables
import trained
from configs import TrainConfig
from errors import Degenerate, Untrusted, UserError
from packed import pack
from splits import Split


def main(argv: list[str]) -> dict:
    # ---- config -----------------------------------------------------------------------------------------------------
    cfg, given = cli.parse(TrainConfig, configs.TRAIN_PRESETS, argv, __doc__)
    cfg = checks.own_data(cfg, given)
    checks.check(cfg, given)

    # ---- distributed ------------------------------------------------------------------------------------------------
    world = ddp.setup()
    cfg, run = loop.run_to_resume(cfg, given, world)
    ddp.say(world, checks.preset_note(given, argv))

    # ---- data -------------------------------------------------------------------------------------------------------
    if cfg.prompt:
        cfg = trained.prompted(cfg, bases.load_tokenizer(bases.need_base(cfg.base)))
        ddp.say(world, f"prompt {cfg.prompt} ({prompts.digest(cfg.text)}):\n{cfg.text}")
    rows, val, labels = splits.read(cfg, lambda *words: ddp.say(world, *words))
    tokenizer = bases.load_tokenizer(bases.need_base(cfg.base))
    trained.check_model(cfg, labels, tokenizer)
    for name, part in (("train_data", rows), ("val_data", val)):
        if part:
            part.tokens, report = data.tokenize(tokenizer, cfg.text, part.rows, cfg.max_length, cfg.kept, cfg.budgets)
            part.uncut = np.array(report.lengths)
            ddp.say(world, f"{name}: {report}")
    tokenizer.model_max_length = cfg.max_length  # as others read it from a save

    # ---- one run, or one for each fold and seed ---------------------------------------------------------------------
    todo = [(name, one, *splits.cut(one, rows, val)) for name, one in configs.members(cfg).items()]
    for _, one, train, judge in todo:  # what is wrong with the last of them is said before the first one starts
        losses.weights_of_config(one, train.labels, len(labels.names))
        splits.periodic_rows(one, judge.labels, len(labels.names))
        ddp.say(world, trained.check_chain(one, train.ids, judge.ids))
        short = one.train_stop - one.train_start > len(train.own().ids)
        ddp.say(world, f"note: this slice has only {len(train.own().ids):,} rows" if short else "")
    shares = rows.own().labels.mean(axis=0) if cfg.task != "single_label" else splits.class_shares(rows, labels)
    shares = np.atleast_1d(shares).tolist()
    facts = {"labels.json": json.dumps({"values": labels.values, "names": labels.names, "shares": shares}, indent=1)}
    books = {name: splits.split_csv(one, rows, val) for name, one in configs.members(cfg).items()}
    facts |= {"split.csv": books[""]} if "" in books else {}
    if world.rank == 0:
        parts = (rows.own(), None) if cfg.folds and cfg.fold == "all" else todo[0][2:]
        found = splits.audit_rows(cfg, labels, *parts, print)
        facts |= {"audit.json": json.dumps(found, ensure_ascii=False, indent=1) + "\n"} if found else {}
    if "" in configs.members(cfg):
        return fit(cfg, world, tokenizer, labels, *todo[0][2:], run, facts)
    return family(cfg, world, tokenizer, labels, splits.judged(cfg, rows, val), todo, run, facts, books)


def family(
    cfg: TrainConfig, world, tokenizer, labels, judged: Split, todo: list, run, facts: dict, books: dict[str, str]
) -> dict:
    """A run for each of todo (name, config, training rows, validation rows) under one folder, one after the other;
    finished ones are not run again. Then what all of them say together: see `together`. books: split.csv of each run.

    A time limit is shared out: each run gets its part of what is left. Raises UserError where a finished run was
    trained on other rows.
    """
    if run is None and not cfg.dry_run:
        run = loop.new_run(cfg, world, facts)
    problems, limit = [], checks.seconds(cfg.time_limit)
    for number, (name, one, train, val) in enumerate(todo, 1):
        ddp.say(world, f"\n== {name}: {number} of {len(todo)}")
        folder = run / name if run else None
        if folder and ddp.from_rank0(world, lambda f=folder: checkpoint.finished(f)):
            saved = checkpoint.last_state(folder)  # None where last/ was removed to save room
            if saved and saved[1]["digest"] != train.digest():
                raise UserError(f"--resume {run}: {folder} was trained on other rows or tokens; start a new family")
            ddp.say(world, f"{folder} is finished")
            continue
        if ddp.from_rank0(world, lambda: limit and loop.process_seconds() > limit):
            raise KeyboardInterrupt(f"--time_limit {cfg.time_limit} is over; go on with --resume {run}")
        begun = folder if folder and ddp.from_rank0(world, lambda f=folder: (f / "config.json").is_file()) else None
        try:
            own = {"labels.json": facts["labels.json"], "split.csv": books[name]}
            share = (limit - loop.process_seconds()) / (len(todo) - number + 1) if limit else 0.0
            end = loop.process_seconds() + share if limit else 0.0
            result = fit(one, world, tokenizer, labels, train, val, begun, own, folder, end)
        except Degenerate as e:  # known when the run is whole: the others may be better
            problems.append(str(e))
        if cfg.dry_run:
            ddp.say(world, f"{len(todo)} runs like this one")
            return {**result, "runs": len(todo)}
    result = together(cfg, run, labels, judged, todo, world) if world.rank == 0 else {}
    if problems:
        raise Degenerate("; ".join(problems))
    return result


def together(cfg: TrainConfig, run: Path, labels: labelling.Labels, judged: Split, todo: list, world) -> dict:
    """What the runs of a family say together: each judged row once in val_predictions.csv, with the mean logits of the
    seeds; mean and standard deviation of the runs' metrics; metrics of the whole file with 95% bootstrap intervals;
    thresholds and calibration fitted on it.
    """
    seeds, results = {}, {}
    for name, one, _, val in todo:
        ids, targets, logits = trained.validation_rows(run / name, one, labels)
        if ids != val.ids or not np.array_equal(targets, val.labels):
            raise Untrusted(f"{run / name}: val_predictions.csv does not hold this run's validation rows")
        whole = seeds.setdefault(one.seed, np.full((len(judged.ids), logits.shape[1]), np.nan, np.float32))
        whole[splits.held_out(one, judged) if cfg.folds and cfg.fold == "all" else slice(None)] = logits
        results[name] = checkpoint.load_json(run / name / "result.json")
    logits = np.mean(list(seeds.values()), axis=0)
    scores = {n: v for n, v in metrics.of_task(cfg.task, logits, judged.labels).items() if n != "rows"}
    shown = [n for n in scores if n == cfg.metric or n not in metrics.RANKING]
    intervals = bootstrap.intervals(cfg.task, logits, judged.labels, shown, seed=cfg.seed)
    each = {n: [found["metrics"][n] for found in results.values() if n in found["metrics"]] for n in scores}
    spread = {n: (float(np.mean(v)), float(np.std(v, ddof=len(v) > 1))) for n, v in each.items() if v}
    cut = [name for name, found in results.items() if found.get("ended_by") == "time_limit"]
    ddp.say(world, f"warning: the time limit ended {', '.join(cut)} early: the runs are not alike" if cut else "")
    lines = [f"{'':<16} {'mean':>8} {'std':>8} {'all rows':>9}   95% interval"]
    for n in [n for n in shown if n in spread and n in intervals]:
        (mean, std), (low, high) = spread[n], intervals[n]
        lines.append(f"{n:<16} {mean:8.4f} {std:8.4f} {scores[n]:9.4f}   {low:.4f} to {high:.4f}")
    ddp.say(world, f"\n== {len(todo)} runs together, {len(judged.ids):,} rows\n" + "\n".join(lines))
    ddp.say(world, tables.summary(cfg.task, logits, judged.labels, labels.names))
    seconds = {n: sum(found[n] for found in results.values()) for n in ("train_seconds", "eval_seconds")}
    rates = ("examples_per_second", "tokens_per_second")
    busy = {n: sum(found[n] * found["train_seconds"] for found in results.values()) for n in rates}
    result = {
        "run": str(run),
        "metrics": {n: round(v, 6) for n, v in {**scores, "rows": len(judged.ids)}.items()},
        "mean": {n: round(v[0], 6) for n, v in spread.items()},
        "std": {n: round(v[1], 6) for n, v in spread.items()},
        "intervals": {n: [round(v, 6) for v in pair] for n, pair in intervals.items()},
        "runs": {name: found["metrics"] for name, found in results.items()},
        "majority": round(metrics.majority(cfg.task, judged.labels), 6),
        **evaluate.by_value(
            cfg, cfg.by_column, judged.rows, logits, judged.labels, lambda words: ddp.say(world, words)
        ),
        **trained.fit_decision(cfg, run, logits, judged.labels, world),
        "ended_by": "time_limit" if cut else "",
        "val_sha256": splits.digest_of(judged.rows),
        "steps": sum(found["steps"] for found in results.values()),
        **{n: round(busy[n] / max(seconds["train_seconds"], 1e-9), 2) for n in rates},
        "peak_memory_gb": max(found["peak_memory_gb"] for found in results.values()),
        "flops": sum(found["flops"] for found in results.values()),
        **{n: round(v, 2) for n, v in seconds.items()},
    }
    predictions.write_predictions(run / "val_predictions.csv", judged, cfg.task, logits, labels)
    checkpoint.write_atomic(run / "result.json", json.dumps(result) + "\n")
    return result


def fit(
    cfg: TrainConfig, world, tokenizer, labels, train: Split, val: Split, run, facts: dict, folder=None, end=0.0
) -> dict:
    """One run, begun or new, from its rows to its result. facts: files of a new run; folder: where, or run_<i>; end: of
    its time limit in seconds of this process, where it is not the config's own.
    """
    classes = len(labels.names)
    precision, why = numerics.choose_precision(cfg.precision, world.device)
    ddp.say(world, f"{world.size} rank{'s' * (world.size > 1)} on {world.device.type}; precision {precision} ({why})")
    weights, eval_rows = (
        losses.weights_of_config(cfg, train.labels, classes),
        splits.periodic_rows(cfg, val.labels, classes),
    )
    if cfg.task != "regression":
        absent = [labels.names[i] for i in np.flatnonzero(losses.class_counts(cfg.task, train.labels, classes) == 0)]
        ddp.say(world, f"warning: no training row has the label {', '.join(absent)}" if absent else "")
    steps_per_epoch = math.ceil(len(train.labels) / cfg.batch_size)
    total = cfg.epochs * steps_per_epoch
    total = min(total, cfg.max_steps) if cfg.max_steps else total
    eval_every = cfg.eval_every or steps_per_epoch
    save_every = cfg.save_every or eval_every

    # ---- model ------------------------------------------------------------------------------------------------------
    model = trained.new_classifier(cfg, labels, tokenizer, world.device, precision)
    model.train()
    if cfg.grad_checkpoint:
        models.checkpoint_activations(model.backbone)
    ddp.say(world, models.attention_note(world.device, model.config, precision))
    ddp.say(world, evaluate.weak_tokens(model, tokenizer, train.tokens))
    if cfg.pooling == "last" and model.family.encoder:
        ddp.say(world, "note: the last token of an encoder is a separator; --pooling cls is what its head knows")
    ddp.say(world, lora.trainable_table(model))
    saved = run and any((run / name).exists() for name in ("last", ".last.1"))
    if cfg.init_from and not saved:
        ddp.say(world, trained.start_from(Path(cfg.init_from), cfg, labels, model))

    # ---- optimizer --------------------------------------------------------------------------------------------------
    groups = optim.parameter_groups(model.named_parameters(), cfg.lr, cfg.head_lr, cfg.weight_decay, model.heads)
    optimizer = optim.adamw(groups, cfg.optimizer)
    if cfg.optimizer.startswith("paged") and world.device.type != "cuda":
        ddp.say(world, f"{cfg.optimizer}: paging exists on GPUs only; the state stays in this machine's memory")
    scaler = optim.loss_scaler(world.device.type, precision == "fp16")
    gradients = ddp.GradientSum([p for p in model.parameters() if p.requires_grad], world, flags=2)
    if not gradients.exact:
        ddp.say(world, f"{gradients.count:,} trained parameters: gradients add up in fp32, equal to rounding only")
    warmup = optim.warmup_updates(total, cfg.warmup_steps, cfg.warmup_ratio)

    # ---- resume, or a new run ---------------------------------------------------------------------------------------
    base = model.base_fingerprint

    def read(folder: Path) -> None:
        trained.check_base(model, checkpoint.verify(folder)["base"], "of this run")
        trained.read_classifier(folder, model)

    def write(folder: Path) -> None:
        trained.write_classifier(folder, model, tokenizer, labels)

    at = loop.restore(run, world, read, optimizer, scaler, train.digest()) if run and not cfg.dry_run else None
    at = at or loop.State(micro_batches=max(cfg.micro_batches, world.size))
    if at.micro_batches != cfg.micro_batches:
        ddp.say(
            world,
            f"steps are cut into {at.micro_batches} micro-batches, more than --micro_batches "
            f"{cfg.micro_batches}, to keep {world.size} ranks busy: equal to a run on fewer ranks to rounding only",
        )
    plan = data.plan_epoch(train.tokens.lengths, cfg.batch_size, cfg.max_tokens, at.micro_batches, cfg.seed, 0)
    per_step = np.mean([len(step) for step in plan])
    ddp.say(
        world,
        f"plan: {total:,} steps of {cfg.batch_size} rows in {per_step:.1f} micro-batches of at most "
        f"{cfg.max_tokens:,} tokens, warm-up {warmup}, evaluation every {eval_every}, save every {save_every}",
    )
    if cfg.dry_run:
        return dry_run(cfg, world, model, precision, train, plan, total)
    if run is None:
        run = loop.new_run(cfg, world, facts, folder)
    ddp.say(world, f"run {run}" + (f", resumed at step {at.step} of {total}" if at.step else ""))

    # ---- loop: step, log, eval, save --------------------------------------------------------------------------------
    of_classes = None if weights is None else torch.from_numpy(weights).float().to(world.device)
    stop, log, clock, late = ddp.StopRequest(), loop.Log(run, cfg, world, at.step), loop.Clock(at), False
    limit = loop.Limit(end or checks.seconds(cfg.time_limit), world, float(val.tokens.lengths.sum()))
    bar = tqdm(total=total, initial=at.step, disable=world.rank != 0, unit="step", file=sys.stderr, mininterval=1.0)
    while at.step < total and not at.done:
        epoch, index = divmod(at.step, steps_per_epoch)
        if index == 0 or at.step == at.resumed:
            plan = data.plan_epoch(
                train.tokens.lengths, cfg.batch_size, cfg.max_tokens, at.micro_batches, cfg.seed, epoch
            )
        rows_of_step = np.concatenate(plan[index])
        denominator = losses.loss_weight(cfg.task, train.targets[rows_of_step], weights)
        factor = optim.lr_factor(at.updates, total, warmup, cfg.schedule)
        for j, rows in enumerate(plan[index]):
            if j % world.size != world.rank:
                continue
            torch.manual_seed(ddp.micro_seed(cfg.seed, at.step, j))
            target = torch.from_numpy(train.targets[rows]).to(world.device)
            with numerics.autocast(world.device, precision):
                logits = model(pack(train.tokens, rows, world.device))
            loss = losses.loss_sum(cfg.task, logits, target, cfg.label_smoothing, of_classes) / denominator
            scaler.scale(loss).backward()
            gradients.add(loss, bool(stop.signal), limit.over(at))
        sums = gradients.reduce()
        norm, taken, (loss, stopping, late) = optim.step(optimizer, scaler, factor, cfg.grad_clip, sums)
        if not taken:
            at.skipped += 1
            refuse_not_finite(cfg, world, model, scaler, train, plan[index], precision, at.step, loss)
        at.step, at.updates = at.step + 1, at.updates + taken
        at.rows += len(rows_of_step)
        at.tokens += int(train.tokens.lengths[rows_of_step].sum())
        if at.updates == 1 and taken:
            lora.assert_moved(model)

        # log
        clock.lap("seconds")
        epochs, seen = round(at.step / steps_per_epoch, 4), (loss, norm) if taken else (None, None)  # strict JSON
        log.write(loop.step_line(at, epochs, cfg.lr * factor, *seen))
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{at.tokens / at.seconds:,.0f}", refresh=False)
        bar.update()

        # eval
        last = at.step == total
        ddp.say(world, limit.forecast(at, total))
        if last or late or at.step % eval_every == 0:
            logits = evaluate.score(model, val.tokens.take(eval_rows), world, precision, cfg.max_tokens)
            if not np.isfinite(logits).all():
                raise not_finite(world, model, train, plan[index], precision, f"step {at.step}: scores not finite")
            scores = metrics.of_task(cfg.task, logits, val.labels[eval_rows])
            limit.evaluation = clock.lap("eval_seconds") * len(val.labels) / len(eval_rows)
            log.write({"step": at.step, "eval": scores})
            ddp.say(world, f"step {at.step}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items() if k != "rows"))
            if loop.better(scores, at.best, cfg.metric):
                at.best, at.best_step, at.stale = scores.get(cfg.metric, -1.0), at.step, 0
                loop.save(run / "best", world, write, {"step": at.step, "base": base}, cfg.keep)
            else:
                at.stale += 1
                at.done = bool(cfg.patience) and at.stale >= cfg.patience
            at.done = at.done or bool(late)

        # save
        if last or at.done or stopping or at.step % save_every == 0:
            state = (log, at, optimizer, scaler, train.digest())
            loop.save(run / "last", world, write, {"step": at.step, "base": base}, cfg.keep, state)
        if stopping and not last:
            raise KeyboardInterrupt(f"stopped after step {at.step}; go on with --resume {run}")
    bar.close()
    stop.close()
    log.close()

    # ---- end: the best save, on all validation rows -----------------------------------------------------------------
    if at.done:
        why = f"--time_limit {cfg.time_limit}" if late else f"{cfg.patience} evaluations without a better {cfg.metric}"
        ddp.say(world, f"stopped early, at step {at.step} of {total}: {why}")
    ddp.barrier(world)  # rank 0 has written best/
    trained.read_classifier(checkpoint.trusted(run / "best"), model)
    logits = evaluate.score(model, val.tokens, world, precision, cfg.max_tokens)
    scores = metrics.of_task(cfg.task, logits, val.labels)
    reached, room = scores.get(cfg.metric, -1.0), 0.02 * max(1.0, abs(at.best))  # other hardware may flip a few rows
    if len(eval_rows) == len(val.labels) and abs(reached - at.best) > room:
        raise AssertionError(f"best/ reloaded scores {cfg.metric} {reached}, saved with {at.best}")
    clock.lap("eval_seconds")
    ddp.say(
        world,
        f"best of {cfg.metric}: step {at.best_step}\n" + tables.summary(cfg.task, logits, val.labels, labels.names),
    )
    result = {
        "run": str(run),
        "train_rows": len(train.ids),
        "text_sha256": prompts.digest(cfg.text),
        "metrics": {k: round(v, 6) for k, v in scores.items()},
        **evaluate.by_value(cfg, cfg.by_column, val.rows, logits, val.labels, lambda words: ddp.say(world, words)),
        "majority": round(metrics.majority(cfg.task, val.labels), 6),
        **trained.fit_decision(cfg, run, logits, val.labels, world),
        "best_step": at.best_step,
        "ended_by": "time_limit" if late else "patience" if at.done else "",
        "val_sha256": splits.digest_of(val.rows),
        "steps": at.step,
        "examples_per_second": round(at.rows / at.seconds, 2),
        "tokens_per_second": round(at.tokens / at.seconds, 1),
        "peak_memory_gb": round(loop.peak_memory_gb(world), 3),
        "flops": estimates.training_flops(model, train.tokens.lengths) * at.rows / len(train.labels),
        "train_seconds": round(at.seconds, 2),
        "eval_seconds": round(at.eval_seconds, 2),
    }
    result |= {"chain": chain_table(cfg, result, world)} if cfg.init_from else {}
    if world.rank == 0:
        predictions.write_predictions(run / "val_predictions.csv", val, cfg.task, logits, labels)
        checkpoint.write_atomic(run / "result.json", json.dumps(result) + "\n")
    reason = evaluate.degenerate(logits)
    if reason:
        raise Degenerate(f"{reason}; the run is in {run}")
    return result


def refuse_not_finite(cfg, world, model, scaler, train: Split, micro_batches, precision: str, step: int, loss) -> None:
    """After a step whose gradients were not finite: go on while fp16 scaling can still help, else raise not_finite."""
    if scaler.is_enabled() and scaler.get_scale() >= 1.0:
        return
    found = f"step {step + 1}: loss {loss:.4g}, gradients not finite"
    raise not_finite(world, model, train, micro_batches, precision, found)


def not_finite(world, model, train: Split, micro_batches, precision: str, found: str) -> FloatingPointError:
    """The error that names the first layer whose output is not finite, or else the largest activation."""
    with torch.no_grad(), numerics.autocast(world.device, precision), numerics.activation_maxima(model) as maxima:
        model(pack(train.tokens, micro_batches[0], world.device))
    where = numerics.overflow_report(maxima)
    return FloatingPointError(f"{found}; {where}; lower --lr, or try --precision bf16 or fp32")


def chain_table(cfg: TrainConfig, result: dict, world) -> list[dict]:
    """The runs that this one goes on from and itself, with their slices and metrics, printed as a table."""
    past = [
        (run, trained.run_facts(run)[0], checkpoint.load_json(run / "result.json") if checkpoint.finished(run) else {})
        for run in trained.chain(cfg.init_from)
    ]
    found = [
        {
            "run": str(run),
            "train_start": c.train_start,
            "train_stop": c.train_stop,
            "train_rows": told.get("train_rows", 0),
            "metrics": told.get("metrics", {}),
        }
        for run, c, told in [*past, (result["run"], cfg, result)]
    ]
    shown = [n for n in dict.fromkeys((cfg.metric, "accuracy", "roc_auc", "log_loss")) if n in result["metrics"]]
    lines = [f"{'slice':<20} {'rows':>9} " + " ".join(f"{n:>10}" for n in shown) + "  run"]
    for one in found:
        stretch = f"{one['train_start']:,} to {one['train_stop'] or 'the end'}"
        numbers = " ".join(f"{one['metrics'].get(n, float('nan')):10.4f}" for n in shown)
        lines.append(f"{stretch:<20} {one['train_rows']:>9,} {numbers}  {one['run']}")
    ddp.say(world, "\n".join(lines))
    return found


def dry_run(cfg: TrainConfig, world, model, precision: str, train: Split, plan, total: int) -> dict:
    """Time one micro-batch forward and backward, print what the run would take, and stop."""
    seconds = []
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        with numerics.autocast(world.device, precision):
            logits = model(pack(train.tokens, plan[0][0], world.device))
        logits.square().sum().backward()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = float(train.tokens.lengths[plan[0][0]].sum()) / seconds[-1] * world.size
    tokens = float(train.tokens.lengths.sum()) * total / len(plan)
    memory = estimates.memory_estimate(model, cfg.max_tokens, precision, cfg.grad_checkpoint)
    parts = ", ".join(f"{k} {v:.2f}" for k, v in memory.items())
    ddp.say(world, f"memory: about {sum(memory.values()):.2f} GB a rank ({parts})")
    ddp.say(
        world,
        f"time: about {tokens / rate / 60:.1f} min for {tokens:,.0f} tokens at {rate:,.0f} tokens/s, "
        "evaluations aside (one micro-batch timed)",
    )
    estimate = {"memory_gb": round(sum(memory.values()), 3), "train_seconds": round(tokens / rate, 1)}
    return {"run": None, "dry_run": True, "steps": total, "rows": len(train.labels), "tokens": int(tokens), **estimate}


if __name__ == "__main__":
    ddp.launch(main)
