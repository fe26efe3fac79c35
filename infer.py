"""Predict with a finished run.

    python infer.py                                             # the newest finished run on its own test data
    python infer.py --runs outputs/tiny__base/tiny/run_0 --input new.csv --output predictions.jsonl --submission ""
    torchrun --nproc_per_node=2 infer.py --input test.csv --submission "id,label"

The output keeps the order of the input. `python infer.py --help` lists every field.
"""

import csv
import io
import itertools
import json
import shutil
import time
from pathlib import Path

import numpy as np

import checkpoint
import configs
import data
import ddp
import decide
import evaluate
import metrics
from configs import InferConfig, UserError


def main(argv: list[str]) -> dict:
    # ---- config and run ---------------------------------------------------------------------------------------------
    cfg, _ = configs.parse(InferConfig, {}, argv, __doc__)
    configs.check(cfg)
    path = find_run(cfg)
    train_cfg, labels = evaluate.run_facts(path)
    source = cfg.input or train_cfg.test_data
    if not source:
        raise UserError(f"run {path} names no test_data: give the rows to predict with --input FILE")
    world = ddp.setup()

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
    if empty:
        ddp.say(
            world, f"warning: {len(empty)} rows have an empty text (first: row {empty[0] + 1}); they are scored as such"
        )
    ids = [row.get(train_cfg.id_column, str(i)) for i, row in enumerate(rows)]

    known = known_labels(rows, train_cfg.label_column, labels)
    if known is None and any(row.get(train_cfg.label_column, "").strip() for row in rows):
        ddp.say(world, f"column {train_cfg.label_column} does not hold this run's labels in every row: no metrics")
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)

    # ---- score ------------------------------------------------------------------------------------------------------
    run = evaluate.load_run(path, world, cfg.precision, cfg.merge)
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
        scores = metrics.classification(logits, known)
        confusion = metrics.confusion_matrix(known, logits.argmax(axis=1), len(labels.values))
        ddp.say(world, metrics.table(confusion, list(labels.names)))
        result["metrics"] = {k: round(v, 6) for k, v in scores.items()}
    if world.rank == 0:
        write_output(cfg, ids, logits, labels, train_cfg.id_column)
    return {**result, "examples_per_second": round(len(rows) / seconds, 2), "seconds": round(seconds, 2)}


def find_run(cfg: InferConfig) -> Path:
    """The run named by --runs, or the newest finished one. Raises UserError when there is none."""
    if cfg.runs:
        return Path(cfg.runs)
    newest = checkpoint.newest_finished(cfg.outputs, "labels.json")
    if newest is None:
        raise UserError(f"no finished run under {cfg.outputs}/: train one (python train.py), or name one with --runs")
    return newest


def known_labels(rows: list[dict[str, str]], column: str, labels: data.Labels) -> np.ndarray | None:
    """Class indices where every row has a label of this run, else None: there is nothing to measure against."""
    index = {v: i for i, v in enumerate(labels.values)}
    found = [index.get(row.get(column, "")) for row in rows]
    return None if None in found else np.array(found, dtype=np.int64)


def write_output(cfg: InferConfig, ids: list[str], logits: np.ndarray, labels: data.Labels, id_column: str) -> None:
    """Write predictions in one piece: two named columns, or id, prediction and a probability for each class."""
    chosen = [labels.values[c] for c in logits.argmax(axis=1)]
    if cfg.submission:
        header = [c.strip() for c in cfg.submission.split(",")]
        records = [dict(zip(header, pair, strict=True)) for pair in zip(ids, chosen, strict=True)]
    else:
        names = [f"probability_{v}" for v in labels.values]
        records = [
            {id_column: i, "prediction": c, **dict(zip(names, map(float, p), strict=True))}
            for i, c, p in zip(ids, chosen, decide.softmax(logits), strict=True)
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
