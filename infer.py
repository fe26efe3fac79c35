"""Predict with a finished run, or with a base and a public adapter.

    python infer.py                                             # the newest finished run on its own test data
    python infer.py --runs outputs/tiny__base/tiny/run_0 --input new.csv --output predictions.jsonl --submission ""
    torchrun --nproc_per_node=2 infer.py --input test.csv --submission "id,label"
    python infer.py --export merged/                            # a plain transformers model, the adapter merged
    python infer.py --base FacebookAI/roberta-base --adapter folder/of/peft --input new.csv --text "{body}"
    python infer.py --base Qwen/Qwen2.5-0.5B --head label_words --label_names yes,no --text "{q}" --input new.csv

The output keeps the order of the input. `python infer.py --help` lists every field.
"""

import csv
import io
import itertools
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

import checkpoint
import configs
import data
import ddp
import decide
import evaluate
import lora
import metrics
from configs import InferConfig, UserError


def main(argv: list[str]) -> dict:
    # ---- config and run ---------------------------------------------------------------------------------------------
    cfg, hand = configs.parse(InferConfig, {}, argv, __doc__)
    configs.check(cfg, hand)
    given = evaluate.given_model(cfg) if cfg.base or cfg.adapter else None
    path = Path(cfg.adapter or cfg.base) if given else find_run(cfg)
    train_cfg, labels = (given.config, given.labels) if given else evaluate.run_facts(path)
    if cfg.merge and train_cfg.quant != "none":
        raise UserError(f"--merge: run {path} is quantized, which takes no update; --export DIR merges its 16-bit base")
    source = cfg.input or train_cfg.test_data
    world = ddp.setup()
    if cfg.export and not source:
        return export(cfg, path, given, world, [])
    if not source:
        raise UserError(f"{path} names no test_data: give the rows to predict with --input FILE")

    # ---- rows, before any weight is loaded --------------------------------------------------------------------------
    rows = data.read_rows(source, "input")[: cfg.limit or None]
    columns = data.template_columns(train_cfg.text)
    data.need_columns(rows, columns, source, "input")
    decoded = data.decode_bytes_literals(rows, columns)
    empty = data.empty_rows(rows, columns)
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

    known = known_labels(rows, train_cfg, labels)
    if known is None and any(row.get(train_cfg.label_column, "").strip() for row in rows):
        ddp.say(world, f"column {train_cfg.label_column} does not hold this run's labels in every row: no metrics")
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)

    # ---- score ------------------------------------------------------------------------------------------------------
    run = load(cfg, path, given, world, "")
    if lora.adapters(run.model) and not cfg.force:
        ddp.say(
            world, f"the adapter moves the logits of {len(rows[:4])} rows by up to {evaluate.probe(run, rows[:4]):.3g}"
        )
    started = time.perf_counter()
    logits, report = run.logits(rows, cfg.max_tokens)
    seconds = time.perf_counter() - started
    ddp.say(world, f"tokens: {report}")
    ddp.say(world, decide.distribution(logits, list(labels.names)))
    reason = decide.degenerate(logits)
    if reason and not cfg.force:
        raise evaluate.Degenerate(f"{reason}; nothing was written (--force writes it all the same)")

    # ---- metrics and output -----------------------------------------------------------------------------------------
    result = {"run": str(path), "rows": len(rows), "output": cfg.output}
    if known is not None and np.isfinite(logits).all():
        scores = metrics.of_task(train_cfg.task, logits, known)
        ddp.say(world, metrics.summary(train_cfg.task, logits, known, labels.names))
        result["metrics"] = {k: round(v, 6) for k, v in scores.items()}
    if world.rank == 0:
        write_output(cfg, ids, logits, labels, train_cfg.id_column)
    return {**result, "examples_per_second": round(len(rows) / seconds, 2), "seconds": round(seconds, 2)}


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
    name = evaluate.export(Path(cfg.export), run)
    after = run.logits(rows)[0] if rows else before
    drift, flips = float(np.abs(after - before).max(initial=0)), int((after.argmax(1) != before.argmax(1)).sum())
    note = f"logits of {len(rows)} rows moved by at most {drift:.2g}, {flips} predictions changed"
    ddp.say(world, f"{cfg.export}: {name}; {note if rows else 'not compared: no rows (name some with --input)'}")
    return {"run": str(path), "export": cfg.export, "architecture": name, "rows": len(rows), "drift": drift}


def load(cfg: InferConfig, path: Path, given, world: ddp.World, quant: str) -> evaluate.Run:
    """The run, or the given base and adapter; quant: another way to store the base, or an empty string."""
    if not given:
        return evaluate.load_run(path, world, cfg.precision, cfg.merge, quant)
    known = replace(given, config=replace(given.config, quant=quant or given.config.quant))
    run, report = evaluate.load_given(known, world, cfg.precision, cfg.merge)
    ddp.say(world, report)
    return run


def find_run(cfg: InferConfig) -> Path:
    """The run named by --runs, or the newest finished one. Raises UserError when there is none."""
    if cfg.runs:
        return Path(cfg.runs)
    newest = checkpoint.newest_finished(cfg.outputs, "labels.json")
    if newest is None:
        raise UserError(f"no finished run under {cfg.outputs}/: train one (python train.py), or name one with --runs")
    return newest


def known_labels(rows: list[dict[str, str]], train_cfg, labels: data.Labels) -> np.ndarray | None:
    """Labels of the rows where every row has one that this run knows, else None."""
    column = [row.get(train_cfg.label_column, "") for row in rows]
    try:
        if train_cfg.task == "regression":
            return data.encode_numbers(column, "input")
        return data.encode_labels(column, labels, "input")
    except UserError:
        return None


def write_output(cfg: InferConfig, ids: list[str], logits: np.ndarray, labels: data.Labels, id_column: str) -> None:
    """Write predictions in one piece: two named columns, or id, prediction and a probability for each class.

    A regression's prediction is its output as it is, neither cut to a range nor rounded: ranks would be lost.
    """
    one = not labels.values
    chosen = [float(z) for z in logits[:, 0]] if one else [labels.values[c] for c in logits.argmax(axis=1)]
    if cfg.submission:
        header = [c.strip() for c in cfg.submission.split(",")]
        records = [dict(zip(header, pair, strict=True)) for pair in zip(ids, chosen, strict=True)]
    else:
        names = [f"probability_{v}" for v in labels.values]
        shares = np.zeros((len(ids), 0)) if one else decide.softmax(logits)
        records = [
            {id_column: i, "prediction": c, **dict(zip(names, map(float, p), strict=True))}
            for i, c, p in zip(ids, chosen, shares, strict=True)
        ]
    out = Path(cfg.output)
    if out.suffix == ".jsonl":
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        text = buffer.getvalue()
    if out.exists() and not cfg.overwrite:
        names = (out.with_name(f"{out.name}.previous{i or ''}") for i in itertools.count())
        kept = next(name for name in names if not name.exists())
        shutil.copyfile(out, kept)  # the old file stays in place until the new one is whole
        print(f"{out} existed: it is kept as {kept}")
    checkpoint.write_atomic(out, text)
    print(f"wrote {len(records):,} predictions to {out}")


if __name__ == "__main__":
    ddp.launch(main)
