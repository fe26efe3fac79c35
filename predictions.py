"""Rows to predict, and predictions as files: what infer.py, ensemble.py, generate.py and train.py share."""

import csv
import io
import itertools
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np

import checkpoint
import ddp
import decide
import evaluate
import files
import labelling
import loop
import metrics
import seals
import tables
import trained
from errors import Degenerate, UserError, few
from labelling import Labels
from metrics import Array
from splits import Split

# ---- rows -----------------------------------------------------------------------------------------------------------


def read_input(cfg, train_cfg, source: str, columns: list[str], say) -> tuple[files.Rows, list[str]]:
    """(rows, ids) of the file to predict, up to --limit. Raises UserError unless every row has all columns."""
    rows = files.read_rows(source, "input")[: cfg.limit or None]
    files.need_columns(rows, [name for name in (*columns, cfg.by_column) if name], source, "input")
    say(f"{len(rows):,} rows of {source}")
    decoded = files.decode_bytes_literals(rows, columns)
    if decoded:
        say(f"{decoded} rows were Python bytes literals (b'...') and are decoded")
    empty = files.empty_rows(rows, columns)
    if empty and columns:
        say(f"warning: {len(empty)} rows have an empty text (first: row {empty[0] + 1}); they are scored as such")
    return rows, [row.get(train_cfg.id_column, str(i)) for i, row in enumerate(rows)]


def known_labels(rows: files.Rows, train_cfg, labels: Labels, say) -> Array | None:
    """The targets of the rows where every row has labels of this run, else None.

    multi_label: labels that the run does not know are left out of their rows, and named in a warning.
    """
    columns = train_cfg.label_columns or (train_cfg.label_column,)
    if not rows[0].keys() >= set(columns):
        return None
    try:
        if train_cfg.task != "multi_label":
            return labelling.encode_targets(train_cfg, rows, labels, "input")
        sets = labelling.label_sets(train_cfg, rows, "input")
    except (UserError, KeyError):
        if any(row.get(column, "").strip() for row in rows for column in columns):
            say(f"column {', '.join(columns)} does not hold this run's labels in every row: no metrics")
        return None
    unknown = sorted(set().union(*sets).difference(labels.values))
    if unknown:
        say(f"warning: this run does not know the labels {few(unknown, 10)}: metrics are over those it knows")
    sets = [[label for label in own if label not in unknown] for own in sets]
    return labelling.encode_label_sets(sets, labels, "input")


# ---- rows that a time limit leaves out ------------------------------------------------------------------------------


def time_left(limit: float, members: int = 1) -> float:
    """Seconds for the next of some members to score all rows within the limit, less those for writing; 0: no limit."""
    if not limit:
        return 0.0
    return max(1e-3, (limit - loop.process_seconds() - 1.0) / members)


def class_shares(path: Path, labels: Labels) -> Array:
    """(C,) shares of the training rows of a run that have each label, or a regression's mean; equal ones without it."""
    file, classes = path / "labels.json", max(1, len(labels.values))
    stored = checkpoint.load_json(file) if seals.has(file) else {}
    return np.array(stored.get("shares") or [1 / classes] * classes)


def prior_logits(task: str, shares: Array) -> Array:
    """(C,) logits whose softmax (multi_label: sigmoid) equals these shares; a regression's mean as it is."""
    p = np.clip(shares, 1e-6, 1 - 1e-6)
    logits = shares if task == "regression" else np.log(p)
    if task == "multi_label":
        logits -= np.log1p(-p)
    return logits.astype(np.float32)


# ---- scores, decisions, metrics -------------------------------------------------------------------------------------


def decision_at(probability: float, task: str, classes: int, decision: decide.Decision | None):
    """A decision with one probability as its threshold; 0: as it is. UserError where argmax or a number decides."""
    if not probability:
        return decision
    try:
        return (decision or decide.plain(task, classes)).with_threshold(probability)
    except ValueError as e:
        raise UserError(f"--threshold {probability:g}: {e}; or leave it out") from None


def finish(cfg, train_cfg, labels, decision, rows, ids, known, logits, shares, world: ddp.World) -> dict:
    """From logits (N, C), NaN where a time limit left a row out, to the output file; returns what to report of it.

    shares (C,): what rows that were left out get. Raises Degenerate, before anything is written, for scores that cannot
    be right.
    """
    task, say = train_cfg.task, partial(ddp.say, world)
    result = {"rows": len(rows), "output": cfg.output}

    # Rows that were left out get the class frequencies of the training rows, once the others have been checked.
    late = np.isnan(logits).any(axis=1) & bool(cfg.time_limit)
    unscored = [[ids[i]] for i in np.flatnonzero(late)]
    reason = evaluate.degenerate(logits[~late])
    logits[late] = prior_logits(task, shares)
    say(tables.distribution(logits, labels.names, task))
    if reason and not cfg.force:
        raise Degenerate(f"{reason}; nothing was written (--force writes it all the same)")

    # Metrics, where every row has a label: of what is written, and of plain argmax where thresholds decide.
    predicted, probabilities = trained.decided(task, decision, logits)
    if known is None and cfg.by_column:
        say(f"--by_column {cfg.by_column}: the rows have no labels, so there are no metrics")
    if known is not None and np.isfinite(logits).all():
        say(tables.summary(task, logits, known, labels.names))
        ways = {"metrics": predicted, "undecided": None} if decision and decision.thresholds else {"metrics": None}
        for name, way in ways.items():
            scores = metrics.of_task(task, logits, known, predicted=way)
            result[name] = {score: round(value, 6) for score, value in scores.items()}
        result |= evaluate.by_value(train_cfg, cfg.by_column, rows, logits, known, say)
    if cfg.time_limit:
        result["unscored"] = len(unscored)
        say(f"--time_limit {cfg.time_limit}: {len(unscored):,} of {len(rows):,} rows were not scored in time")

    # One rank writes; calibration has nothing to say about rows that were not scored. A regression's output is written
    # as it is, neither cut to a range nor rounded: ranks would be lost.
    if world.rank == 0:
        probabilities[late] = shares  # a regression's have no columns
        answers = labelling.answers(task, predicted, labels)
        if task == "multi_label" and not cfg.output.endswith(".jsonl"):  # there it is a list
            answers = [train_cfg.label_delimiter.join(own) for own in answers]
        ranking = as_probability(cfg, train_cfg, labels)
        write_records(cfg, train_cfg.id_column, labels, ids, answers, probabilities.tolist(), ranking)
        write_lines(cfg, "unscored", ["id"], unscored)
    return result


# ---- files ----------------------------------------------------------------------------------------------------------


def as_probability(cfg, train_cfg, labels: Labels) -> bool:
    """Whether a submission holds the probability of the last of two classes, as rankings are judged by."""
    two = train_cfg.task == "single_label" and len(labels.values) == 2
    if cfg.answer == "probability" and not two:
        raise UserError(f"--answer probability: it is that of the last of two classes; this run has {labels.values}")
    return cfg.answer == "probability" or (cfg.answer == "auto" and two and train_cfg.metric == "roc_auc")


def write_records(cfg, id_column: str, labels: Labels, ids, answers, shares, probability: bool) -> None:
    """Write the two columns of a submission, or id, prediction and a probability for each class, in one piece."""
    if cfg.submission:
        header = [column.strip() for column in cfg.submission.split(",")]
        values = [share[-1] for share in shares] if probability else answers
        table = list(zip(ids, values, strict=True))
    else:
        header = [id_column, "prediction", *(f"probability_{value}" for value in labels.values)]
        table = [[id_, answer, *share] for id_, answer, share in zip(ids, answers, shares, strict=True)]
    out = Path(cfg.output)
    lines = (json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in table)
    text = "".join(lines) if out.suffix == ".jsonl" else csv_text([header, *table])
    keep_previous(out, cfg.overwrite)
    checkpoint.write_atomic(out, text)
    print(f"wrote {len(table):,} predictions to {out}")


def write_lines(cfg, what: str, header: list[str], lines: list[list]) -> None:
    """A CSV beside the output, OUTPUT.what.csv, of rows that went wrong; without any an older one is removed."""
    path = Path(f"{cfg.output}.{what}.csv")
    path.unlink(missing_ok=True)
    if lines:
        checkpoint.write_atomic(path, csv_text([header, *lines]))
        print(f"{len(lines):,} rows {what}: {path}")


def write_predictions(path: Path, val: Split, task: str, logits: Array, labels: Labels) -> None:
    """val_predictions.csv: id, label, prediction (without thresholds: those are fitted here), and a logit a class."""

    def cells(values) -> list:
        answers = labelling.answers(task, values, labels)
        return [json.dumps(own, ensure_ascii=False) for own in answers] if task == "multi_label" else answers

    predicted, _ = trained.decided(task, None, logits)
    scores = logits[:, : len(labels.values)].tolist()  # a regression's prediction is its output
    header = ["id", "label", "prediction", *(f"logit_{value}" for value in labels.values)]
    columns = zip(val.ids, cells(val.labels), cells(predicted), scores, strict=True)
    seals.write(path, csv_text([header, *([*row, *scores] for *row, scores in columns)]))


def csv_text(lines) -> str:
    """Lines of cells as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def keep_previous(out: Path, overwrite: bool) -> None:
    """Copy an existing output beside it; the old file stays in place until the new one is there."""
    if not out.exists() or overwrite:
        return
    names = (out.with_name(f"{out.name}.previous{number or ''}") for number in itertools.count())
    kept = next(itertools.filterfalse(Path.exists, names))
    shutil.copyfile(out, kept)
    print(f"{out} existed: it is kept as {kept}")
