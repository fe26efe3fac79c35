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
from functools import partial
from pathlib import Path

import checks
import ddp
import evaluate
import files
import foreign
import lora
import numerics
import predictions
import run_folder
import trained
from errors import UserError


def main(argv: list[str]) -> dict:
    # Settings: everything wrong with them is reported at once.
    cfg, hand = cli.parse(InferConfig, {}, argv, __doc__)
    checks.check(cfg, hand)
    world = ddp.setup()
    say = partial(ddp.say, world)

    # An adapter of a language model predicts nothing, but it can be merged.
    if cfg.export and foreign.writes_text(cfg):
        _need_one_process(world)
        return foreign.export_writer(cfg, world)

    # What predicts, from its config and headers alone: a mistake is found before any weight is loaded.
    precision = numerics.exact(cfg.precision, world) if cfg.export or cfg.merge else cfg.precision
    if (cfg.base or cfg.adapter) and not cfg.runs:
        given = foreign.given_model(cfg)
        if not (cfg.force or cfg.export):
            foreign.refuse_other_base(given)
        path, train_cfg, labels = Path(cfg.adapter or cfg.base), given.config, given.labels
        load = partial(foreign.load_given, given, world, precision)
    else:
        path = run_folder.finished_run(cfg.runs[0] if cfg.runs else "", cfg.outputs)
        train_cfg, labels = trained.run_facts(path)
        members = list(trained.members(path).values())
        if len(members) > 1 and (cfg.merge or cfg.export):
            count = f"{path} is {len(members)} runs"
            raise UserError(f"--export and --merge take a single run: {count}; name one of them, such as {members[0]}")
        if cfg.merge and train_cfg.quant != "none":
            raise UserError(f"--merge: {path} is quantized, which takes no update; --export DIR merges its 16-bit base")
        load = partial(trained.load_run, path, world, precision, base=cfg.base)
    predictions.as_probability(cfg, train_cfg, labels)
    say(f"run {path}")

    # The rows, in the order of the input, with their labels where the file has them.
    source = cfg.input or train_cfg.test_data
    rows = []
    if source:
        rows, ids = predictions.read_input(cfg, train_cfg, source, files.template_columns(train_cfg.text), say)
    elif not cfg.export:
        raise UserError(f"{path} names no test_data: give the rows to predict with --input FILE")
    if cfg.export:
        return _export(cfg, path, load, world, rows[:16])
    checks.need_output(cfg.output, "--output", source, path, train_cfg.train_data, train_cfg.val_data)
    known = predictions.known_labels(rows, train_cfg, labels, say)

    # A few rows first: what cannot be right shows in seconds, not after hours.
    run = load()
    if cfg.merge:
        lora.merge(run.model)
    decision = predictions.decision_at(cfg.threshold, train_cfg.task, len(labels.names), run.decision)
    if not cfg.force:
        say(evaluate.preflight(run, rows, known, cfg.max_tokens))

    # Every row is scored once, over all ranks; of a family by each run in turn, and their logits are averaged.
    started = time.perf_counter()
    seconds_left = predictions.time_left(checks.seconds(cfg.time_limit))
    logits, report = run.logits(rows, cfg.max_tokens, seconds_left, cfg.output)
    seconds = time.perf_counter() - started
    say(f"tokens: {report}")

    # Decide, measure where labels are known, and write: nothing is written where the scores cannot be right.
    shares = predictions.class_shares(path, labels)
    result = predictions.finish(cfg, train_cfg, labels, decision, rows, ids, known, logits, report.keys, shares, world)
    rate = round(len(rows) / seconds, 2)
    return {"run": str(path), **result, "examples_per_second": rate, "seconds": round(seconds, 2)}


def _export(cfg, path, load, world, rows):
    """Merge the adapter into the 16-bit base, write it as transformers' own class, and report how far logits moved.

    load: opens the run. rows: those that live and merged logits are compared on. UserError on several processes.
    """
    _need_one_process(world)
    run = load()
    if rows:
        before, _ = run.logits(rows)
    if run.config.quant != "none":  # quantized weights take no update
        run = load("none")
    name = trained.export_run(Path(cfg.export), run)
    drift, note = 0.0, "not compared: no rows (name some with --input)"
    if rows:
        after, _ = run.logits(rows)
        drift = float(abs(after - before).max())
        flips = (after.argmax(axis=1) != before.argmax(axis=1)).sum()
        note = f"logits of {len(rows)} rows moved by at most {drift:.2g}, {flips} predictions changed"
    ddp.say(world, f"{cfg.export}: {name}; {note}")
    return {"run": str(path), "export": cfg.export, "architecture": name, "rows": len(rows), "drift": drift}


def _need_one_process(world):
    if world.size > 1:
        raise UserError("--export runs in one process: python infer.py --export DIR")


if __name__ == "__main__":
    ddp.launch(main)
