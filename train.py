"""Fine-tune a decoder LLM as a text classifier: LoRA or the base itself, on one process or under torchrun.

    python train.py                                        # the embedded base and problems, a minute on a CPU
    torchrun --nproc_per_node=2 train.py --cfg qwen3b --train_data train.csv --text "{Question}" --label_column label
    python train.py --cfg qwen05b --train_data my.csv --dry_run
    python train.py --resume auto                          # go on with the newest unfinished run, bit for bit

The run is the same on any number of ranks: see "the batch plan" in data.py and GradientSum in ddp.py.
"""

import csv
import io
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import configs
import data
import ddp
import decide
import evaluate
import lora
import losses
import metrics
import model as models
import optim
import prompts
import resume
import splits
from configs import TrainConfig, UserError
from splits import Split


def main(argv: list[str]) -> dict:
    # ---- config -----------------------------------------------------------------------------------------------------
    cfg, given = configs.parse(TrainConfig, configs.TRAIN_PRESETS, argv, __doc__)
    cfg = configs.own_data(cfg, given)
    configs.check(cfg, given)

    # ---- distributed ------------------------------------------------------------------------------------------------
    world = ddp.setup()
    cfg, run = resume.run_to_resume(cfg, given, world)
    ddp.say(world, configs.preset_note(given, argv))

    # ---- data -------------------------------------------------------------------------------------------------------
    if cfg.prompt:
        cfg = evaluate.prompted(cfg, data.load_tokenizer(models.need_base(cfg.base)))
        ddp.say(world, f"prompt {cfg.prompt} ({prompts.digest(cfg.text)}):\n{cfg.text}")
    rows, val, labels = splits.read(cfg, lambda *words: ddp.say(world, *words))
    tokenizer = data.load_tokenizer(models.need_base(cfg.base))
    evaluate.check_model(cfg, labels, tokenizer)
    for name, part in (("train_data", rows), ("val_data", val)):
        if part:
            part.tokens, report = data.tokenize(tokenizer, cfg.text, part.rows, cfg.max_length, cfg.kept, cfg.budgets)
            part.uncut = np.array(report.lengths)
            ddp.say(world, f"{name}: {report}")
    tokenizer.model_max_length = cfg.max_length  # as others read it from a save

    # ---- one run, or one for each fold and seed ---------------------------------------------------------------------
    todo = [(name, one, *splits.cut(one, rows, val)) for name, one in configs.members(cfg).items()]
    for _, one, train, judge in todo:  # what is wrong with the last of them is said before the first one starts
        class_weights(one, train.labels, len(labels.names))
        periodic_rows(one, judge.labels, len(labels.names))
        ddp.say(world, evaluate.check_chain(one, train.ids, judge.ids))
        short = one.train_stop - one.train_start > len(train.own().ids)
        ddp.say(world, f"note: this slice has only {len(train.own().ids):,} rows" if short else "")
    shares = rows.own().labels.mean(axis=0) if cfg.task != "single_label" else class_shares(rows, labels)
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
        run = resume.new_run(cfg, world, facts)
    problems, limit = [], configs.seconds(cfg.time_limit)
    for number, (name, one, train, val) in enumerate(todo, 1):
        ddp.say(world, f"\n== {name}: {number} of {len(todo)}")
        folder = run / name if run else None
        if folder and ddp.from_rank0(world, lambda f=folder: checkpoint.finished(f)):
            saved = checkpoint.last_state(folder)  # None where last/ was removed to save room
            if saved and saved[1]["digest"] != train.digest():
                raise UserError(f"--resume {run}: {folder} was trained on other rows or tokens; start a new family")
            ddp.say(world, f"{folder} is finished")
            continue
        if ddp.from_rank0(world, lambda: limit and resume.process_seconds() > limit):
            raise KeyboardInterrupt(f"--time_limit {cfg.time_limit} is over; go on with --resume {run}")
        begun = folder if folder and ddp.from_rank0(world, lambda f=folder: (f / "config.json").is_file()) else None
        try:
            own = {"labels.json": facts["labels.json"], "split.csv": books[name]}
            share = (limit - resume.process_seconds()) / (len(todo) - number + 1) if limit else 0.0
            end = resume.process_seconds() + share if limit else 0.0
            result = fit(one, world, tokenizer, labels, train, val, begun, own, folder, end)
        except evaluate.Degenerate as e:  # known when the run is whole: the others may be better
            problems.append(str(e))
        if cfg.dry_run:
            ddp.say(world, f"{len(todo)} runs like this one")
            return {**result, "runs": len(todo)}
    result = together(cfg, run, labels, judged, todo, world) if world.rank == 0 else {}
    if problems:
        raise evaluate.Degenerate("; ".join(problems))
    return result


def together(cfg: TrainConfig, run: Path, labels: data.Labels, judged: Split, todo: list, world) -> dict:
    """What the runs of a family say together: each judged row once in val_predictions.csv, with the mean logits of the
    seeds; mean and standard deviation of the runs' metrics; metrics of the whole file with 95% bootstrap intervals;
    thresholds and calibration fitted on it.
    """
    seeds, results = {}, {}
    for name, one, _, val in todo:
        ids, targets, logits = evaluate.validation_rows(run / name, one, labels)
        if ids != val.ids or not np.array_equal(targets, val.labels):
            raise checkpoint.Untrusted(f"{run / name}: val_predictions.csv does not hold this run's validation rows")
        whole = seeds.setdefault(one.seed, np.full((len(judged.ids), logits.shape[1]), np.nan, np.float32))
        whole[splits.held_out(one, judged) if cfg.folds and cfg.fold == "all" else slice(None)] = logits
        results[name] = checkpoint.load_json(run / name / "result.json")
    logits = np.mean(list(seeds.values()), axis=0)
    scores = {n: v for n, v in metrics.of_task(cfg.task, logits, judged.labels).items() if n != "rows"}
    shown = [n for n in scores if n == cfg.metric or n not in metrics.RANKING]
    intervals = metrics.intervals(cfg.task, logits, judged.labels, shown, seed=cfg.seed)
    each = {n: [found["metrics"][n] for found in results.values() if n in found["metrics"]] for n in scores}
    spread = {n: (float(np.mean(v)), float(np.std(v, ddof=len(v) > 1))) for n, v in each.items() if v}
    cut = [name for name, found in results.items() if found.get("ended_by") == "time_limit"]
    ddp.say(world, f"warning: the time limit ended {', '.join(cut)} early: the runs are not alike" if cut else "")
    lines = [f"{'':<16} {'mean':>8} {'std':>8} {'all rows':>9}   95% interval"]
    for n in [n for n in shown if n in spread and n in intervals]:
        (mean, std), (low, high) = spread[n], intervals[n]
        lines.append(f"{n:<16} {mean:8.4f} {std:8.4f} {scores[n]:9.4f}   {low:.4f} to {high:.4f}")
    ddp.say(world, f"\n== {len(todo)} runs together, {len(judged.ids):,} rows\n" + "\n".join(lines))
    ddp.say(world, metrics.summary(cfg.task, logits, judged.labels, labels.names))
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
        **fit_decision(cfg, run, logits, judged.labels, world),
        "ended_by": "time_limit" if cut else "",
        "val_sha256": splits.digest_of(judged.rows),
        "steps": sum(found["steps"] for found in results.values()),
        **{n: round(busy[n] / max(seconds["train_seconds"], 1e-9), 2) for n in rates},
        "peak_memory_gb": max(found["peak_memory_gb"] for found in results.values()),
        "flops": sum(found["flops"] for found in results.values()),
        **{n: round(v, 2) for n, v in seconds.items()},
    }
    write_predictions(run / "val_predictions.csv", judged, cfg.task, logits, labels)
    checkpoint.write_atomic(run / "result.json", json.dumps(result) + "\n")
    return result


def fit(
    cfg: TrainConfig, world, tokenizer, labels, train: Split, val: Split, run, facts: dict, folder=None, end=0.0
) -> dict:
    """One run, begun or new, from its rows to its result. facts: files of a new run; folder: where, or run_<i>; end: of
    its time limit in seconds of this process, where it is not the config's own.
    """
    classes = len(labels.names)
    precision, why = models.choose_precision(cfg.precision, world.device)
    ddp.say(world, f"{world.size} rank{'s' * (world.size > 1)} on {world.device.type}; precision {precision} ({why})")
    weights, eval_rows = class_weights(cfg, train.labels, classes), periodic_rows(cfg, val.labels, classes)
    if cfg.task != "regression":
        absent = [labels.names[i] for i in np.flatnonzero(class_counts(cfg.task, train.labels, classes) == 0)]
        ddp.say(world, f"warning: no training row has the label {', '.join(absent)}" if absent else "")
    steps_per_epoch = math.ceil(len(train.labels) / cfg.batch_size)
    total = cfg.epochs * steps_per_epoch
    total = min(total, cfg.max_steps) if cfg.max_steps else total
    eval_every = cfg.eval_every or steps_per_epoch
    save_every = cfg.save_every or eval_every

    # ---- model ------------------------------------------------------------------------------------------------------
    model = evaluate.new_classifier(cfg, labels, tokenizer, world.device, precision)
    model.train()
    if cfg.grad_checkpoint:
        models.checkpoint_activations(model.backbone)
    ddp.say(world, models.attention_note(world.device, model.config, precision))
    ddp.say(world, evaluate.weak_tokens(model, tokenizer, train.tokens))
    if cfg.pooling == "last" and model.family in models.ENCODERS:
        ddp.say(world, "note: the last token of an encoder is a separator; --pooling cls is what its head knows")
    ddp.say(world, lora.trainable_table(model))
    saved = run and any((run / name).exists() for name in ("last", ".last.1"))
    if cfg.init_from and not saved:
        ddp.say(world, evaluate.start_from(Path(cfg.init_from), cfg, labels, model))

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
        evaluate.check_base(model, checkpoint.verify(folder)["base"], "of this run")
        evaluate.read_classifier(folder, model)

    def write(folder: Path) -> None:
        evaluate.write_classifier(folder, model, tokenizer, labels)

    at = resume.restore(run, world, read, optimizer, scaler, train.digest()) if run and not cfg.dry_run else None
    at = at or resume.State(micro_batches=max(cfg.micro_batches, world.size))
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
        run = resume.new_run(cfg, world, facts, folder)
    ddp.say(world, f"run {run}" + (f", resumed at step {at.step} of {total}" if at.step else ""))

    # ---- loop: step, log, eval, save --------------------------------------------------------------------------------
    of_classes = None if weights is None else torch.from_numpy(weights).float().to(world.device)
    stop, log, clock, late = ddp.StopRequest(), resume.Log(run, cfg, world, at.step), resume.Clock(at), False
    limit = resume.Limit(end or configs.seconds(cfg.time_limit), world, float(val.tokens.lengths.sum()))
    bar = tqdm(total=total, initial=at.step, disable=world.rank != 0, unit="step", file=sys.stderr, mininterval=1.0)
    while at.step < total and not at.done:
        epoch, index = divmod(at.step, steps_per_epoch)
        if index == 0 or at.step == at.resumed:
            plan = data.plan_epoch(
                train.tokens.lengths, cfg.batch_size, cfg.max_tokens, at.micro_batches, cfg.seed, epoch
            )
        rows_of_step = np.concatenate(plan[index])
        denominator = loss_weight(cfg.task, train.targets[rows_of_step], weights)
        factor = optim.lr_factor(at.updates, total, warmup, cfg.schedule)
        for j, rows in enumerate(plan[index]):
            if j % world.size != world.rank:
                continue
            torch.manual_seed(ddp.micro_seed(cfg.seed, at.step, j))
            target = torch.from_numpy(train.targets[rows]).to(world.device)
            with models.autocast(world.device, precision):
                logits = model(data.pack(train.tokens, rows, world.device))
            loss = loss_sum(cfg.task, logits, target, cfg.label_smoothing, of_classes) / denominator
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
        log.write(resume.step_line(at, epochs, cfg.lr * factor, *seen))
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
            if better(scores, at.best, cfg.metric):
                at.best, at.best_step, at.stale = scores.get(cfg.metric, -1.0), at.step, 0
                resume.save(run / "best", world, write, {"step": at.step, "base": base}, cfg.keep)
            else:
                at.stale += 1
                at.done = bool(cfg.patience) and at.stale >= cfg.patience
            at.done = at.done or bool(late)

        # save
        if last or at.done or stopping or at.step % save_every == 0:
            state = (log, at, optimizer, scaler, train.digest())
            resume.save(run / "last", world, write, {"step": at.step, "base": base}, cfg.keep, state)
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
    evaluate.read_classifier(checkpoint.trusted(run / "best"), model)
    logits = evaluate.score(model, val.tokens, world, precision, cfg.max_tokens)
    scores = metrics.of_task(cfg.task, logits, val.labels)
    reached, room = scores.get(cfg.metric, -1.0), 0.02 * max(1.0, abs(at.best))  # other hardware may flip a few rows
    if len(eval_rows) == len(val.labels) and abs(reached - at.best) > room:
        raise AssertionError(f"best/ reloaded scores {cfg.metric} {reached}, saved with {at.best}")
    clock.lap("eval_seconds")
    ddp.say(
        world,
        f"best of {cfg.metric}: step {at.best_step}\n" + metrics.summary(cfg.task, logits, val.labels, labels.names),
    )
    result = {
        "run": str(run),
        "train_rows": len(train.ids),
        "text_sha256": prompts.digest(cfg.text),
        "metrics": {k: round(v, 6) for k, v in scores.items()},
        **evaluate.by_value(cfg, cfg.by_column, val.rows, logits, val.labels, lambda words: ddp.say(world, words)),
        "majority": round(metrics.majority(cfg.task, val.labels), 6),
        **fit_decision(cfg, run, logits, val.labels, world),
        "best_step": at.best_step,
        "ended_by": "time_limit" if late else "patience" if at.done else "",
        "val_sha256": splits.digest_of(val.rows),
        "steps": at.step,
        "examples_per_second": round(at.rows / at.seconds, 2),
        "tokens_per_second": round(at.tokens / at.seconds, 1),
        "peak_memory_gb": round(resume.peak_memory_gb(world), 3),
        "flops": models.training_flops(model, train.tokens.lengths) * at.rows / len(train.labels),
        "train_seconds": round(at.seconds, 2),
        "eval_seconds": round(at.eval_seconds, 2),
    }
    result |= {"chain": chain_table(cfg, result, world)} if cfg.init_from else {}
    if world.rank == 0:
        write_predictions(run / "val_predictions.csv", val, cfg.task, logits, labels)
        checkpoint.write_atomic(run / "result.json", json.dumps(result) + "\n")
    reason = decide.degenerate(logits)
    if reason:
        raise evaluate.Degenerate(f"{reason}; the run is in {run}")
    return result


# ---- the loop's small parts -----------------------------------------------------------------------------------------


def class_counts(task: str, labels: np.ndarray, classes: int) -> np.ndarray:
    """(C,) rows of each class or label."""
    return labels.sum(axis=0).astype(int) if task == "multi_label" else np.bincount(labels, minlength=classes)


def class_shares(rows: Split, labels: data.Labels) -> np.ndarray:
    """(C,) the share of rows of each class."""
    own = rows.own().labels
    return np.bincount(own, minlength=len(labels.values)) / len(own)


def class_weights(cfg: TrainConfig, labels: np.ndarray, classes: int) -> np.ndarray | None:
    """(C,) weights of classes, or of the positive part of labels; None for equal ones."""
    if cfg.task == "regression":
        return None
    counts = class_counts(cfg.task, labels, classes)
    try:
        if cfg.task == "multi_label":
            return decide.pos_weight(cfg.pos_weight, counts, len(labels))
        return decide.class_weights(cfg.class_weights, counts)
    except ValueError as e:
        raise UserError(str(e)) from None


def loss_sum(task: str, logits: torch.Tensor, target: torch.Tensor, label_smoothing: float, weights) -> torch.Tensor:
    """The task's loss as a sum over rows, or over cells for multi_label."""
    if task == "regression":
        return losses.squared_error(logits, target)[0]
    loss = losses.binary_cross_entropy if task == "multi_label" else losses.cross_entropy
    return loss(logits, target, label_smoothing, weights)[0]


def loss_weight(task: str, targets: np.ndarray, weights: np.ndarray | None) -> float:
    """What a step's sum is divided by: its rows, their class weights, or its cells for multi_label."""
    if weights is None or task == "multi_label":
        return float(targets.size if task == "multi_label" else len(targets))
    return float((weights[targets] if targets.ndim == 1 else targets @ weights).sum())


def periodic_rows(cfg: TrainConfig, labels: np.ndarray, classes: int) -> np.ndarray:
    """The validation rows of periodic evaluations: all, or eval_rows drawn once from the seed.

    Raises UserError when `metric` is not defined on them.
    """
    rows = np.arange(len(labels))
    if 0 < cfg.eval_rows < len(labels):
        rows = np.sort(np.random.default_rng([cfg.seed, 0xE7A1]).permutation(len(labels))[: cfg.eval_rows])
    present = set(np.unique(labels[rows]).tolist())
    if cfg.task == "multi_label":
        some, every = (labels[rows] > 0).any(axis=0).all(), (labels[rows] > 0).all(axis=0).any()
        if cfg.metric in ("roc_auc", "average_precision") and (not some or (cfg.metric == "roc_auc" and every)):
            raise UserError(f"--metric {cfg.metric} needs rows with and without every label: choose another")
        return rows
    if cfg.metric == "roc_auc" and (present != {0, 1} if cfg.task == "regression" else len(present) < classes):
        wanted = "labels 0 and 1" if cfg.task == "regression" else "every class"
        raise UserError(f"--metric roc_auc needs {wanted} among the validation rows: choose another, or other rows")
    if cfg.metric in ("r2", "pearson") and len(present) < 2:
        raise UserError(f"--metric {cfg.metric} needs different numbers among the validation rows: choose another")
    return rows


def better(scores: dict[str, float], best: float | None, metric: str) -> bool:
    """Whether an evaluation beats the best so far; losses and errors are the smaller the better."""
    now = scores.get(metric, -1.0)  # pearson is absent while every output is the same
    return best is None or (now < best if metric in ("log_loss", "hamming_loss", "mse", "rmse", "mae") else now > best)


def refuse_not_finite(cfg, world, model, scaler, train: Split, micro_batches, precision: str, step: int, loss) -> None:
    """After a step whose gradients were not finite: go on while fp16 scaling can still help, else raise not_finite."""
    if scaler.is_enabled() and scaler.get_scale() >= 1.0:
        return
    found = f"step {step + 1}: loss {loss:.4g}, gradients not finite"
    raise not_finite(world, model, train, micro_batches, precision, found)


def not_finite(world, model, train: Split, micro_batches, precision: str, found: str) -> FloatingPointError:
    """The error that names the first layer whose output is not finite, or else the largest activation."""
    with torch.no_grad(), models.autocast(world.device, precision), models.activation_maxima(model) as maxima:
        model(data.pack(train.tokens, micro_batches[0], world.device))
    where = models.overflow_report(maxima)
    return FloatingPointError(f"{found}; {where}; lower --lr, or try --precision bf16 or fp32")


def fit_decision(cfg: TrainConfig, run: Path, logits: np.ndarray, labels: np.ndarray, world) -> dict:
    """Fit thresholds and calibration on the validation logits and keep them in the run; scores that no row's own label
    had a part in (5 folds), without and with them. Nothing for a regression, or where there are too few rows.
    """
    if cfg.task == "regression" or len(labels) < 10:
        return {}
    targets, kind = labels.astype(np.int64), evaluate.threshold_kind(cfg)
    fitted_on = "out-of-fold" if cfg.folds and cfg.fold == "all" else "validation"
    decision = decide.fit_decision(cfg.task, logits, targets, kind, fitted_on)
    scores, _, _ = decide.cross_fitted(cfg.task, logits, targets, seed=cfg.seed, kind=kind)
    if world.rank == 0:
        checkpoint.write_atomic(run / "decision.json", decision.to_json())
    for name, values in scores.items():
        when = "argmax or probability 0.5" if name == "before" else "thresholds and calibration of the other folds"
        ddp.say(world, f"{when}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    return {"undecided": scores["before"], "decided": scores["after"]}


def chain_table(cfg: TrainConfig, result: dict, world) -> list[dict]:
    """The runs that this one goes on from and itself, with their slices and metrics, printed as a table."""
    past = [
        (run, evaluate.run_facts(run)[0], checkpoint.load_json(run / "result.json") if checkpoint.finished(run) else {})
        for run in evaluate.chain(cfg.init_from)
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


def write_predictions(path: Path, val: Split, task: str, logits: np.ndarray, labels: data.Labels) -> None:
    """val_predictions.csv: id, label, prediction (without thresholds: those are fitted here), and a logit a class."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "label", "prediction", *(f"logit_{v}" for v in labels.values)])
    known, predicted = (
        data.answers(task, rows, labels) for rows in (val.labels, evaluate.decided(task, None, logits)[0])
    )
    for i, label, prediction, z in zip(val.ids, known, predicted, logits, strict=True):
        cells = [json.dumps(c, ensure_ascii=False) if isinstance(c, list) else c for c in (label, prediction)]
        writer.writerow([i, *cells, *(repr(float(x)) for x in z if labels.values)])
    checkpoint.write_atomic(path, out.getvalue())


def dry_run(cfg: TrainConfig, world, model, precision: str, train: Split, plan, total: int) -> dict:
    """Time one micro-batch forward and backward, print what the run would take, and stop."""
    seconds = []
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        with models.autocast(world.device, precision):
            logits = model(data.pack(train.tokens, plan[0][0], world.device))
        logits.square().sum().backward()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    rate = float(train.tokens.lengths[plan[0][0]].sum()) / seconds[-1] * world.size
    tokens = float(train.tokens.lengths.sum()) * total / len(plan)
    memory = models.memory_estimate(model, cfg.max_tokens, precision, cfg.grad_checkpoint)
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
