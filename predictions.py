"""Write predictions."""

import csv
import io
import itertools
import json
import shutil
from pathlib import Path

import numpy as np

import checkpoint
import labelling
import metrics
import trained
from configs import InferConfig
from errors import UserError, few
from splits import Split


def shares_of(path: Path, cfg, labels: labelling.Labels) -> np.ndarray:
    """(C,) shares of the training rows that have each label, or a regression's mean; equal ones without a run."""
    facts = checkpoint.load_json(path / "labels.json") if (path / "labels.json").is_file() else {}
    count = max(1, len(labels.values))
    return np.array(facts.get("shares") or [1 / count] * count)


def prior_logits(cfg, shares: np.ndarray) -> np.ndarray:
    """(C,) logits that say these shares."""
    if cfg.task == "regression":
        return shares.astype(np.float32)
    p = np.clip(shares, 1e-6, 1 - 1e-6)
    return (np.log(p) - (np.log1p(-p) if cfg.task == "multi_label" else 0)).astype(np.float32)


def write_lines(cfg: InferConfig, what: str, header: list[str], lines: list[list]) -> None:
    """A CSV beside the output, OUTPUT.what.csv, of rows that went wrong; without any an older one is removed."""
    path = Path(f"{cfg.output}.{what}.csv")
    path.unlink(missing_ok=True)
    if lines:
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator="\n").writerows([header, *lines])
        checkpoint.write_atomic(path, out.getvalue())
        print(f"{len(lines):,} rows {what}: {path}")


def as_probability(cfg: InferConfig, train_cfg, labels: labelling.Labels) -> bool:
    """Whether a submission holds the probability of the last of two classes, as rankings are judged by."""
    two = train_cfg.task == "single_label" and len(labels.values) == 2
    wanted = two and train_cfg.metric == "roc_auc" if cfg.answer == "auto" else cfg.answer == "probability"
    if wanted and not two:
        raise UserError(f"--answer probability: it is that of the last of two classes; this run has {labels.values}")
    return wanted


def known_labels(rows: list[dict[str, str]], train_cfg, labels: labelling.Labels, say) -> np.ndarray | None:
    """Labels of the rows where every row has one that this run knows, else None. Of several labels a row the unknown
    ones are left out, and named.
    """
    columns = train_cfg.label_columns or (train_cfg.label_column,)
    if not all(c in rows[0] for c in columns):
        return None
    try:
        if train_cfg.task != "multi_label":
            return labelling.encode_targets(train_cfg, rows, labels, "input")
        sets = labelling.label_sets(
            rows, train_cfg.label_column, train_cfg.label_columns, train_cfg.label_delimiter, "input"
        )
        unknown = sorted({v for one in sets for v in one} - set(labels.values))
        if unknown:
            say(f"warning: this run does not know the labels {few(unknown, 10)}: metrics are over those it knows")
        return labelling.encode_label_sets([[v for v in one if v not in unknown] for one in sets], labels, "input")
    except (UserError, KeyError):
        return None


def decided_metrics(run: trained.Run, logits: np.ndarray, known: np.ndarray) -> dict[str, dict[str, float]]:
    """`metrics` of what is written; where a threshold of the run or the user decides, `undecided` without it."""
    plain, task, decision = metrics.of_task(run.config.task, logits, known), run.config.task, run.decision
    if not decision or not decision.thresholds:
        return {"metrics": plain}
    if task == "multi_label":
        scores = metrics.of_task(task, logits, known, predicted=logits > decision.thresholds)
        return {"metrics": scores, "undecided": plain}
    shifted = logits - np.array([0.0, decision.thresholds[0]])  # then class 1 wins where z1 - z0 is above it
    return {"metrics": metrics.of_task(task, shifted, known), "undecided": plain}


def write_output(
    cfg: InferConfig, ids: list[str], run: trained.Run, logits: np.ndarray, missing: np.ndarray, prior: np.ndarray
) -> None:
    """Write predictions in one piece: two named columns, or id, prediction and a probability for each class.

    A regression's prediction is its output as it is, neither cut to a range nor rounded: ranks would be lost. Several
    labels are a list in JSONL, and stand between the run's delimiters in CSV.
    """
    labels, id_column = run.labels, run.config.id_column
    predicted, shares = run.decided(logits)
    if run.config.task != "regression":
        shares[missing] = prior  # as they are: nothing calibrates a row that was not scored
    chosen = labelling.answers(run.config.task, predicted, labels)
    if run.config.task == "multi_label" and not cfg.output.endswith(".jsonl"):
        chosen = [run.config.label_delimiter.join(row) for row in chosen]
    write_records(cfg, id_column, labels, ids, chosen, shares.tolist(), as_probability(cfg, run.config, labels))


def write_records(
    cfg: InferConfig, id_column: str, labels: labelling.Labels, ids, chosen, shares, probability: bool
) -> None:
    """Write the two columns of a submission, or id, prediction and a probability for each class, in one piece."""
    if cfg.submission:
        header = [c.strip() for c in cfg.submission.split(",")]
        answers = [share[-1] for share in shares] if probability else chosen
        records = [dict(zip(header, pair, strict=True)) for pair in zip(ids, answers, strict=True)]
    else:
        names = [f"probability_{v}" for v in labels.values]
        records = [
            {id_column: i, "prediction": c, **dict(zip(names, p, strict=True))}
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
    keep_previous(out, cfg.overwrite)
    checkpoint.write_atomic(out, text)
    print(f"wrote {len(records):,} predictions to {out}")


def keep_previous(out: Path, overwrite: bool) -> None:
    """Copy an existing output beside it; the old file stays in place until the new one is there."""
    if out.exists() and not overwrite:
        names = (out.with_name(f"{out.name}.previous{i or ''}") for i in itertools.count())
        kept = next(name for name in names if not name.exists())
        shutil.copyfile(out, kept)
        print(f"{out} existed: it is kept as {kept}")


def write_predictions(path: Path, val: Split, task: str, logits: np.ndarray, labels: labelling.Labels) -> None:
    """val_predictions.csv: id, label, prediction (without thresholds: those are fitted here), and a logit a class."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "label", "prediction", *(f"logit_{v}" for v in labels.values)])
    known, predicted = (
        labelling.answers(task, rows, labels) for rows in (val.labels, trained.decided(task, None, logits)[0])
    )
    for i, label, prediction, z in zip(val.ids, known, predicted, logits, strict=True):
        cells = [json.dumps(c, ensure_ascii=False) if isinstance(c, list) else c for c in (label, prediction)]
        writer.writerow([i, *cells, *(repr(float(x)) for x in z if labels.values)])
    checkpoint.write_atomic(path, out.getvalue())
