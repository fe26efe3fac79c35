"""Predict with a finished run, or with a base and a public adapter.

    python infer.py                                             # the newest finished run on its own test data
    python infer.py --runs outputs/tiny__base/tiny/run_0 --input new.csv --output predictions.jsonl --submission ""
    torchrun --nproc_per_node=2 infer.py --input test.csv --submission "id,label"
    python infer.py --export merged/                            # a plain transformers model, the adapter merged
    python infer.py --base FacebookAI/roberta-base --adapter folder/of/peft --input new.csv --text "{body}"
    python infer.py --base Qwen/Qwen2.5-0.5B --head label_words --label_names yes,no --text "{q}" --input new.csv

The output keeps the order of the input. ensemble.py combines several runs or systems; generate.py completes prompts.
"""

import cli
from configs import InferConfig

if __name__ == "__main__":  # help and typos are answered before torch is loaded, which takes seconds
    cli.early(InferConfig, {}, __doc__)

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

import checks
import ddp
import evaluate
import files
import foreign
import predictions
import trained
from errors import Degenerate, UserError


def main(argv: list[str]) -> dict:
    # Settings: everything wrong with them is reported at once.
    cfg, hand = cli.parse(InferConfig, {}, argv, __doc__)
    checks.check(cfg, hand)
    world = ddp.setup()
    say = partial(ddp.say, world)

    # What predicts, from its config and headers alone: a mistake is found before any weight is loaded.
    given = None
    if cfg.base or cfg.adapter:
        given = foreign.given_model(cfg)
        path = Path(cfg.adapter or cfg.base)
        train_cfg, labels = given.config, given.labels
    else:
        named = cfg.runs[0] if cfg.runs else ""
        path = trained.find_run(named, cfg.outputs)
        train_cfg, labels = trained.run_facts(path)
    refuse(cfg, path, given, train_cfg)
    predictions.as_probability(cfg, train_cfg, labels)
    say(f"run {path}")

    # The rows, in the order of the input, with their labels where the file has them.
    source = cfg.input or train_cfg.test_data
    if not source and not cfg.export:
        raise UserError(f"{path} names no test_data: give the rows to predict with --input FILE")
    rows, ids = [], []
    if source:
        columns = files.template_columns(train_cfg.text)
        rows, ids = predictions.read_input(cfg, train_cfg, source, columns, say)
    if cfg.export:
        return export(cfg, path, given, world, rows[:16])
    known = predictions.known_labels(rows, train_cfg, labels, say)
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)

    # A few rows first: what cannot be right shows in seconds, not after hours.
    run = load(cfg, path, given, world)
    if cfg.threshold:
        run.decision = predictions.decision_at(run.config.task, len(labels.names), run.decision, cfg.threshold)
    if not cfg.force:
        say(evaluate.preflight(run, rows, known, cfg.max_tokens))

    # Every row is scored once, over all ranks; of a family by each run in turn, and their logits are averaged.
    started = time.perf_counter()
    limit = predictions.time_left(checks.seconds(cfg.time_limit))
    logits, report = run.logits(rows, cfg.max_tokens, limit)
    seconds = time.perf_counter() - started
    say(f"tokens: {report}")

    # Decide, measure where labels are known, and write: nothing is written where the scores cannot be right.
    shares = predictions.class_shares(path, labels)
    result = predictions.finish(cfg, train_cfg, labels, run.decision, rows, ids, known, logits, shares, world)
    return {
        "run": str(path),
        **result,
        "examples_per_second": round(len(rows) / seconds, 2),
        "seconds": round(seconds, 2),
    }


def refuse(cfg: InferConfig, path: Path, given: foreign.Given | None, train_cfg) -> None:
    """Raise for what can be seen to be wrong before any weight is loaded."""
    if cfg.merge and train_cfg.quant != "none":
        raise UserError(f"--merge: run {path} is quantized, which takes no update; --export DIR merges its 16-bit base")
    if given:
        mismatch = foreign.base_mismatch(given.adapter, train_cfg.base)
        if mismatch and not (cfg.force or cfg.export):
            raise Degenerate(f"{mismatch}: nothing was scored (--force where it is the same model by another name)")
    elif cfg.export:
        members = list(trained.members(path).values())
        if len(members) > 1:
            raise UserError(f"--export: {path} is {len(members)} runs; name one of them, such as {members[0]}")


def load(cfg: InferConfig, path: Path, given: foreign.Given | None, world: ddp.World, quant: str = "") -> trained.Run:
    """The run, or the given base and adapter; quant: another way to store the base, or an empty string."""
    if not given:
        return trained.load_run(path, world, cfg.precision, cfg.merge, quant)
    if quant:
        given = replace(given, config=replace(given.config, quant=quant))
    run, report = foreign.load_given(given, world, cfg.precision, cfg.merge)
    ddp.say(world, report)
    return run


def export(cfg: InferConfig, path: Path, given: foreign.Given | None, world: ddp.World, rows: list) -> dict:
    """Merge the adapter into the 16-bit base, write it as transformers' own class, and report how far logits moved.

    rows: those that live and merged logits are compared on. Raises UserError on several processes.
    """
    if world.size > 1:
        raise UserError("--export runs in one process: python infer.py --export DIR")
    run = load(cfg, path, given, world)
    if rows:
        before, _ = run.logits(rows)
    if run.config.quant != "none":  # quantized weights take no update
        run = load(cfg, path, given, world, "none")
    name = trained.export_run(Path(cfg.export), run)
    drift, note = 0.0, "not compared: no rows (name some with --input)"
    if rows:
        after, _ = run.logits(rows)
        drift = float(np.abs(after - before).max())
        flips = (after.argmax(axis=1) != before.argmax(axis=1)).sum()
        note = f"logits of {len(rows)} rows moved by at most {drift:.2g}, {flips} predictions changed"
    ddp.say(world, f"{cfg.export}: {name}; {note}")
    return {"run": str(path), "export": cfg.export, "architecture": name, "rows": len(rows), "drift": drift}


if __name__ == "__main__":
    ddp.launch(main)
