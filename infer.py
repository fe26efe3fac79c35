"""Predict with a finished run, or with a base and a public adapter.

    python infer.py                                             # the newest finished run on its own test data
    python infer.py --runs outputs/tiny__base/tiny/run_0 --input new.csv --output predictions.jsonl --submission ""
    torchrun --nproc_per_node=2 infer.py --input test.csv --submission "id,label"
    python infer.py --export merged/                            # a plain transformers model, the adapter merged
    python infer.py --base FacebookAI/roberta-base --adapter folder/of/peft --input new.csv --text "{body}"
    python infer.py --base Qwen/Qwen2.5-0.5B --head label_words --label_names yes,no --text "{q}" --input new.csv
    python infer.py --generate --runs outputs/tiny__base/papers/run_0        # a run of cpt.py completes what you type
    python infer.py --generate --base Qwen/Qwen2.5-0.5B-Instruct --input prompts.jsonl --output completions.jsonl

The output keeps the order of the input. `python infer.py --help` lists every field.
"""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import checks
import cli
import configs
import ddp
import decide
import ensemble
import evaluate
import files
import foreign
import generate
import loop
import predictions
import tables
import trained
from configs import InferConfig
from errors import Degenerate, UserError


def main(argv: list[str]) -> dict:
    # ---- config and run ---------------------------------------------------------------------------------------------
    cfg, hand = cli.parse(InferConfig, {}, argv, __doc__)
    cfg = checks.of_generation(cfg, hand)
    checks.check(cfg, hand)
    if cfg.generate:
        return generate.complete_prompts(cfg, hand)
    given = foreign.given_model(cfg) if cfg.base or cfg.adapter else None
    path = Path(cfg.adapter or cfg.base) if given else trained.find_run(cfg)
    train_cfg, labels = (given.config, given.labels) if given else trained.run_facts(path)
    limit = checks.seconds(cfg.time_limit)
    mismatch = foreign.foreign(given.adapter, given.config.base) if given else ""
    if mismatch and not (cfg.force or cfg.export):
        raise Degenerate(f"{mismatch}: nothing was scored (--force where it is the same model by another name)")
    if cfg.merge and train_cfg.quant != "none":
        raise UserError(f"--merge: run {path} is quantized, which takes no update; --export DIR merges its 16-bit base")
    members = [] if given else list(trained.members(path))
    if cfg.export and len(members) > 1:
        raise UserError(f"--export: {path} is {len(members)} runs; name one of them, such as {path / members[0]}")
    source = cfg.input or train_cfg.test_data
    world = ddp.setup()
    if cfg.export and not source:
        return export(cfg, path, given, world, [])
    if not source:
        raise UserError(f"{path} names no test_data: give the rows to predict with --input FILE")

    # ---- rows, before any weight is loaded --------------------------------------------------------------------------
    rows = files.read_rows(source, "input")[: cfg.limit or None]
    columns = files.template_columns(train_cfg.text)
    files.need_columns(rows, columns + [cfg.by_column] * bool(cfg.by_column), source, "input")
    predictions.as_probability(cfg, train_cfg, labels)
    decoded = files.decode_bytes_literals(rows, columns)
    empty = files.empty_rows(rows, columns)
    ddp.say(
        world,
        f"run {path}: {len(rows):,} rows of {source}" + (f", {decoded} decoded bytes literals" if decoded else ""),
    )
    if cfg.export:
        return export(cfg, path, given, world, rows[:16])
    if empty:
        ddp.say(
            world, f"warning: {len(empty)} rows have an empty text (first: row {empty[0] + 1}); they are scored as such"
        )
    ids = [row.get(train_cfg.id_column, str(i)) for i, row in enumerate(rows)]

    known = predictions.known_labels(rows, train_cfg, labels, lambda words: ddp.say(world, words))
    if known is None and cfg.by_column:
        ddp.say(world, f"--by_column {cfg.by_column}: the rows have no labels, so there are no metrics")
    if known is None and any(row.get(train_cfg.label_column, "").strip() for row in rows):
        ddp.say(world, f"column {train_cfg.label_column} does not hold this run's labels in every row: no metrics")
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)

    # ---- score ------------------------------------------------------------------------------------------------------
    if cfg.scoring == "generate":
        return generate.generate_answers(cfg, path, train_cfg, labels, world, rows, ids, known)
    csvs = {path: ensemble.csv_member(path, train_cfg, labels, ids) for path in cfg.runs[1:] if path.endswith(".csv")}
    blend = ensemble.blending(cfg, train_cfg, labels) if len(cfg.runs) > 1 else None
    run = load(cfg, path, given, world, "")
    run.decision = blend.decision if blend else run.decision
    if cfg.threshold:
        run.decision = decision_at(run, cfg.threshold)
    if not cfg.force:
        ddp.say(world, evaluate.preflight(run, rows, known, cfg.max_tokens))
    started = time.perf_counter()
    logits, report = run.logits(rows, cfg.max_tokens, time_left(limit, len(cfg.runs)))
    missing, prior = (
        limit and np.isnan(logits).any(axis=1),
        predictions.prior_logits(train_cfg, predictions.shares_of(path, train_cfg, labels)),
    )
    if blend:
        found = [logits]
        for left, other in zip(range(len(cfg.runs) - 1, 0, -1), cfg.runs[1:], strict=True):
            more = None if other in csvs else trained.load_run(other, world, cfg.precision)
            z = csvs[other] if more is None else more.logits(rows, cfg.max_tokens, time_left(limit, left))[0]
            found.append(z if z.shape == logits.shape else np.hstack([0 * z, z]))  # a regression beside two classes
        missing = limit and np.isnan(found).any(axis=(0, 2))
        found = [np.where(np.isnan(z), prior, z) if limit else z for z in found]
        logits = ensemble.ensemble(found, cfg.ensemble, blend.weights, blend.task).astype(np.float32)
        ddp.say(world, blend.said)
    missing = np.flatnonzero(missing) if limit else np.zeros(0, int)
    logits[missing] = prior
    seconds = time.perf_counter() - started
    ddp.say(world, f"tokens: {report}")
    ddp.say(world, tables.distribution(logits, list(labels.names), train_cfg.task))
    reason = evaluate.degenerate(np.delete(logits, missing, axis=0)) if len(missing) < len(rows) else ""
    if reason and not cfg.force:
        raise Degenerate(f"{reason}; nothing was written (--force writes it all the same)")

    # ---- metrics and output -----------------------------------------------------------------------------------------
    result = {"run": str(path), "rows": len(rows), "output": cfg.output}
    if known is not None and np.isfinite(logits).all():
        ddp.say(world, tables.summary(train_cfg.task, logits, known, labels.names))
        for key, scores in predictions.decided_metrics(run, logits, known).items():
            result[key] = {k: round(v, 6) for k, v in scores.items()}
        by = evaluate.by_value(train_cfg, cfg.by_column, rows, logits, known, lambda words: ddp.say(world, words))
        result |= by
    if limit:
        result["unscored"] = len(missing)
        ddp.say(world, f"--time_limit {cfg.time_limit}: {len(missing):,} of {len(rows):,} rows were not scored in time")
    if world.rank == 0:
        predictions.write_output(cfg, ids, run, logits, missing, predictions.shares_of(path, train_cfg, labels))
        predictions.write_lines(cfg, "unscored", ["id"], [[ids[i]] for i in missing])
    return {**result, "examples_per_second": round(len(rows) / seconds, 2), "seconds": round(seconds, 2)}


def time_left(limit: float, members: int) -> float:
    """Seconds for the next of some members to score all rows within the limit, the writing left out; 0 without one."""
    return max(1e-3, (limit - loop.process_seconds() - 1.0) / max(1, members)) if limit else 0.0


def export(cfg: InferConfig, path: Path, given, world: ddp.World, rows: list[dict[str, str]]) -> dict:
    """Merge the adapter into the 16-bit base, write it with transformers' own class, and say how far logits moved.

    rows: what live and merged logits are compared on. Raises UserError on several processes.
    """
    if world.size > 1:
        raise UserError("--export: one process does it: python infer.py --export DIR")
    run = load(cfg, path, given, world, "")
    before = run.logits(rows)[0] if rows else np.zeros((0, 1))
    if run.config.quant != "none":
        run = load(cfg, path, given, world, "none")
    name = trained.export_run(Path(cfg.export), run)
    after = run.logits(rows)[0] if rows else before
    drift, flips = float(np.abs(after - before).max(initial=0)), int((after.argmax(1) != before.argmax(1)).sum())
    note = f"logits of {len(rows)} rows moved by at most {drift:.2g}, {flips} predictions changed"
    ddp.say(world, f"{cfg.export}: {name}; {note if rows else 'not compared: no rows (name some with --input)'}")
    return {"run": str(path), "export": cfg.export, "architecture": name, "rows": len(rows), "drift": drift}


def load(cfg: InferConfig, path: Path, given, world: ddp.World, quant: str) -> trained.Run:
    """The run, or the given base and adapter; quant: another way to store the base, or an empty string."""
    if not given:
        return trained.load_run(path, world, cfg.precision, cfg.merge, quant)
    known = replace(given, config=replace(given.config, quant=quant or given.config.quant))
    run, report = foreign.load_given(known, world, cfg.precision, cfg.merge)
    ddp.say(world, report)
    return run


def decision_at(run: trained.Run, probability: float) -> decide.Decision:
    """The run's decision with one probability for a threshold. Raises UserError where argmax or a number decides."""
    if run.config.task == "regression":
        raise UserError(f"--threshold {probability:g}: a regression's output is no probability; leave it out")
    try:
        return (run.decision or decide.plain(run.config.task, run.model.outputs)).with_threshold(probability)
    except ValueError as e:
        raise UserError(f"--threshold {probability:g}: {e}") from None


if __name__ == "__main__":
    ddp.launch(main)
