"""Rows to predict, and predictions as files: what infer.py, ensemble.py, generate.py and train.py share."""

import csv
import itertools
import json
import math
import re
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

import checkpoint
import ddp
import decide
import evaluate
import files
import labelling
import loop
import metrics
import parts
import seals
import spelling
import spool
import tables
import trained
from errors import Degenerate, UserError, few, warning
from labelling import Labels
from metrics import Array
from splits import Split

ALIKE = 8  # rows of a file, and more: one label for all of them is a warning
DECIMALS = re.compile(r"-?[0-9]+\.0|[0-9](?:\.[0-9]+)?[eE]\+?[0-9]+")  # what other tools make of whole numbers

# ---- rows -----------------------------------------------------------------------------------------------------------


class Ids(NamedTuple):
    """What identifies the rows in the output."""

    column: str
    values: list[str]  # as they are in the file, or the row index


def read_input(cfg, train_cfg, source: str, columns: list[str], say) -> tuple[files.Rows, Ids]:
    """(rows, ids) of the file to predict, up to --limit. Raises UserError unless every row has all columns."""
    rows = files.stream_rows(source, "input", cfg.limit)
    files.need_texts(rows, columns, source, "input", filter(None, (cfg.by_column, cfg.id_column)))
    say(f"{len(rows):,} rows of {source}")
    labelled = train_cfg.label_columns or (train_cfg.label_column,)
    if set(_header(cfg)[:1]) & set(labelled):
        raise UserError(f"--submission {cfg.submission}: expected the id column first, then the label column")
    ids = ids_of(cfg, train_cfg.id_column, rows, source, (*columns, *labelled), say)
    decoded = files.decode_bytes_literals(rows, columns)
    if decoded:
        say(f"{decoded} rows were Python bytes literals (b'...') and are decoded")
    empty = files.empty_rows(rows, columns)
    if empty and columns:
        problem = f"{len(empty)} rows have an empty text (first: row {empty[0] + 1})"
        say(warning(problem, "they are scored as such: check the columns of --text"))
    return rows, ids


def ids_of(cfg, own: str, rows: files.Rows, source: str, others: Collection[str], say) -> Ids:
    """The ids of rows: of --id_column; else of the first name of --submission, or of the column `own` (a run's), where
    the rows have it; else the row index, and a line says so.

    others: columns that are no ids. Raises UserError for a column that some rows lack, or that the output cannot have.
    """
    wanted = [*_header(cfg)[:1], own]
    there = [name for name in wanted if any(name in row for row in rows)]
    column = cfg.id_column or next(iter(there), "")
    if not column:
        unused = [name for name in rows[0] if name and name not in others]
        unused.sort(key=lambda name: "id" not in name.lower())  # the likeliest first
        advice = f"--id_column takes one of {few(unused)}" if unused else "add a column of ids if they have any"
        say(warning(f"{source} has no column {wanted[0]}: rows are numbered from 0", advice))
        return Ids(own, [str(i) for i in range(len(rows))])
    files.need_columns(rows, [column], source, "input")
    if not _header(cfg) and (column == "prediction" or column.startswith(labelling.TEACHER)):
        raise UserError(f"--id_column {column}: the output has another column of this name; name both by --submission")
    values = [row[column] for row in rows]
    blank = sum(not value.strip() for value in values)
    repeated = files.duplicates(values)
    if blank or repeated:
        problem = f"column {column}: {blank} ids are empty, {len(repeated)} are duplicated ({few(repeated, 3)})"
        say(warning(problem, "choose another one with --id_column, if they should differ"))
    if all(map(DECIMALS.fullmatch, values)):
        problem = f"column {column}: ids such as {values[0]} look like whole numbers that a tool wrote as decimals"
        say(warning(problem, "they are written as they are: restore them in the input where they should be whole"))
    return Ids(column, values)


@dataclass
class Known:
    """The rows of a file whose labels are known, and these."""

    rows: Array  # (n,) indices
    targets: Array  # (n,) classes or numbers, (n, C) of 0 and 1


def known_labels(rows: files.Rows, train_cfg, labels: Labels, say) -> Known | None:
    """The targets of the rows that hold labels of this run, or None. What is left out is named in a line.

    multi_label: a row without a label counts as such if others have one; labels that the run does not know are ignored.
    """
    columns = train_cfg.label_columns or (train_cfg.label_column,)
    if not any(name in row for row in rows for name in columns):
        return None
    name = f"column {', '.join(columns)}"
    read = partial(labelling.encode_targets, train_cfg, labels=labels, where=name)
    if train_cfg.task == "multi_label":
        read = partial(labelling.label_sets, train_cfg, where=name)
    good, targets, problem = _readable(read, rows)
    unknown = []
    if train_cfg.task == "multi_label":
        unknown = sorted(set().union(*targets).difference(labels.values))
        sets = [[label for label in own if label not in unknown] for own in targets]
        good = good if any(sets) else good[:0]
        targets = labelling.encode_label_sets(sets, labels, name) if any(sets) else None

    # Rows that cannot be judged, and why.
    unknown = few(spelling.quoted(unknown), 10)
    if not len(good):
        say(f"no metrics: no row of {name} holds a label of this run ({problem or unknown or 'they have none'})")
        return None
    if problem:
        say(warning(f"metrics are over {len(good):,} of {len(rows):,} rows", problem))
    if unknown:
        say(warning(f"this run does not know the labels {unknown}", "metrics are over those it knows"))
    if train_cfg.task == "single_label" and len(good) >= ALIKE and len(set(targets)) == 1:
        problem = f"all {len(good):,} rows of {name} have the label {labels.values[targets[0]]!r}"
        say(warning(problem, "if it only stands for labels to come, the metrics mean nothing"))
    return Known(good, targets)


def _readable(read, rows):
    """(indices of the rows that `read` takes, what it makes of them, why not of the others)."""

    def takes(row):
        with suppress(UserError, KeyError):
            read(rows=[row])
            return True

    try:
        return np.arange(len(rows)), read(rows=rows), ""
    except UserError as e:
        problem = str(e)
    except KeyError as e:
        problem = f"rows without a column {e}"
    good = [i for i, row in enumerate(rows) if takes(row)]
    return np.array(good, int), read(rows=spool.take(rows, good)) if good else [], problem


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


def finish(cfg, train_cfg, labels, decision, rows, ids, known, logits, inputs, shares, world: ddp.World) -> dict:
    """From logits (N, C), NaN where a time limit left a row out, to the output file; returns what to report of it.

    inputs (N,): equal where the inputs of rows are equal. shares (C,): what rows that were left out get. Raises
    Degenerate, before anything is written, for scores that cannot be right.
    """
    task, say = train_cfg.task, partial(ddp.say, world)
    result = {"rows": len(rows), "output": cfg.output}

    # Rows that were left out get the class frequencies of the training rows, once the others have been checked.
    late = np.isnan(logits).any(axis=1) & bool(cfg.time_limit)
    unscored = [[ids.values[i]] for i in np.flatnonzero(late)]
    reason = evaluate.degenerate(logits[~late], inputs[~late], task)
    logits[late] = prior_logits(task, shares)
    say(tables.distribution(logits, labels.names, task))
    if reason and not cfg.force:
        raise Degenerate(f"{reason}; nothing was written (--force writes it all the same)")

    # Metrics, of rows that have a label: of what is written, and of plain argmax where thresholds decide.
    predicted, probabilities = trained.decided(task, decision, logits)
    if known is None and cfg.by_column:
        say(f"--by_column {cfg.by_column}: the rows have no labels, so there are no metrics")
    if known is not None and np.isfinite(logits).all():
        judged = logits[known.rows]
        say(tables.summary(task, judged, known.targets, labels.names))
        ways = {"metrics": None}
        if decision and decision.thresholds:
            ways = {"metrics": predicted[known.rows], "undecided": None}
        for name, way in ways.items():
            scores = metrics.of_task(task, judged, known.targets, predicted=way)
            result[name] = {score: round(value, 6) for score, value in scores.items()}
        labelled = spool.take(rows, known.rows)
        result |= evaluate.by_value(train_cfg, cfg.by_column, labelled, judged, known.targets, say)
    if cfg.time_limit:
        result["unscored"] = len(unscored)
        say(f"--time_limit {cfg.time_limit}: {len(unscored):,} of {len(rows):,} rows were not scored in time")

    # One rank writes; calibration has nothing to say about rows that were not scored. A regression's output is written
    # as it is, neither cut to a range nor rounded: ranks would be lost.
    if world.rank == 0:
        probabilities[late] = shares  # a regression's have no columns
        answers = labelling.answers(task, predicted, labels)
        if task == "multi_label" and not cfg.output.endswith(".jsonl"):  # there it is a list
            answers = as_cells(answers, train_cfg, labels)
        for i in np.flatnonzero(~np.isfinite(logits).all(axis=1)):  # --force writes what there is
            answers[i] = ""
        ranking = as_probability(cfg, train_cfg, labels)
        write_records(cfg, labels, ids, answers, probabilities, ranking)
        write_lines(cfg, "unscored", ["id"], unscored)
        parts.remove(cfg.output)
    return result


# ---- files ----------------------------------------------------------------------------------------------------------


def as_probability(cfg, train_cfg, labels: Labels) -> bool:
    """Whether a submission holds the probability of the last of two classes, as rankings are judged by."""
    two = train_cfg.task == "single_label" and len(labels.values) == 2
    if cfg.answer == "probability" and not two:
        raise UserError(f"--answer probability: it is that of the last of two classes; this run has {labels.values}")
    return cfg.answer == "probability" or (cfg.answer == "auto" and two and train_cfg.metric == "roc_auc")


def _header(cfg):
    """The two names of --submission, if there are any."""
    return [name.strip() for name in cfg.submission.split(",") if name.strip()]


def as_cells(answers: list[list[str]], train_cfg, labels: Labels) -> list[str]:
    """Lists of labels as cells that read back as these lists: delimited, or as JSON where a label is in the way."""
    join = train_cfg.label_delimiter.join
    sets = [[value] for value in labels.values] + [list(labels.values)]
    rows = [{train_cfg.label_column: join(own)} for own in sets]
    with suppress(UserError):
        if labelling.label_sets(replace(train_cfg, label_columns=()), rows, "labels") == sets:
            return list(map(join, answers))
    return [json.dumps(own, ensure_ascii=False) for own in answers]


def write_records(cfg, labels: Labels, ids: Ids, answers, shares, probability: bool) -> None:
    """Write the two columns of a submission, or id, prediction and a probability for each class, in one piece."""
    two = _header(cfg)
    header = two or [ids.column, "prediction", *(f"{labelling.TEACHER}{value}" for value in labels.values)]
    if two and probability:
        print(f"column {header[1]} holds the probability of {labels.names[-1]}")
    out, count = Path(cfg.output), len(ids.values)

    def text_of(start):
        rows = slice(start, start + trained.WINDOW)
        table = []
        for id_, answer, share in zip(ids.values[rows], answers[rows], np.asarray(shares[rows]).tolist(), strict=True):
            cells = [id_, share[-1] if probability else answer] if two else [id_, answer, *share]
            table.append([_cell(value) for value in cells])
        if out.suffix == ".jsonl":
            lines = (json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in table)
            return "".join(lines)
        return csv_text(table if start else [header, *table])

    starts = range(0, max(1, count), trained.WINDOW)
    text = map(text_of, starts) if len(starts) > 1 else text_of(0)
    write_output(cfg, text)
    print(f"wrote {count:,} predictions to {out}")


def _cell(value):
    """A value as it is written: neither -0.0 nor NaN."""
    if isinstance(value, float):
        return value + 0.0 if math.isfinite(value) else ""
    return value


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
    """Lines of cells as CSV. Each ends with a newline; but a writer of such lines would leave a lone \\r unquoted."""
    texts = []
    ends = SimpleNamespace(write=lambda text: texts.append(text.removesuffix("\r\n") + "\n"))
    csv.writer(ends).writerows(lines)
    return "".join(texts)


def write_output(cfg, text: str | Iterable[str]) -> None:
    """Write an output in one piece, also where it is a link. What was there before is copied beside it, unless
    --overwrite is set.
    """
    out = Path(cfg.output)
    if out.exists() and not cfg.overwrite:
        names = (out.with_name(f"{out.name}.previous{number or ''}") for number in itertools.count())
        kept = next(itertools.filterfalse(Path.exists, names))
        checkpoint.write_atomic(kept, out.read_bytes())
        print(f"{out} existed: it is kept as {kept}")
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(out.resolve(), text)
