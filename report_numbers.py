"""The numbers of a run's page, section by section, as they go into report.json: no markup and no pictures.

Each function takes the run and returns its section's numbers, or None where the section does not apply.
"""

import dataclasses
import json
import time

import numpy as np

import bootstrap
import checkpoint
import configs
import metrics
import seals
import trained
from configs import TrainConfig
from errors import Untrusted
from report_runs import Run

BINS = 15  # of the reliability diagram, as of the calibration error
MOST_CLASSES, MOST_GROUPS = 30, 20  # of the confusion matrix, of a table of groups
MOST_POINTS = 1000  # of the coverage curve


# ---- overview -------------------------------------------------------------------------------------------------------


def overview(run: Run) -> dict:
    """What the run is, and what it reaches."""
    cfg, result = run.cfg, run.result
    scores = metrics.of_task(cfg.task, run.logits, run.targets)
    finished = time.localtime((run.path / "result.json").stat().st_mtime)
    intervals = {}
    for name, interval in run.intervals.items():
        if name in scores and not np.isnan(interval).any():
            intervals[name] = interval
    return {
        "page": "index",
        "run": str(run.path),
        "title": f"{configs.dataset_name(cfg)}: {cfg.base}",
        "base": cfg.base,
        "data": cfg.val_data or cfg.train_data,
        "finished": time.strftime("%Y-%m-%d %H:%M", finished),
        "task": cfg.task,
        "labels": len(run.labels.values),  # 0 of a regression
        "rows": len(run.ids),
        "folds": cfg.folds if run.out_of_fold else 0,
        "seconds": round(result.get("train_seconds", 0)),
        "note": run.note,
        "metric": cfg.metric,
        "metrics": scores,
        "intervals": intervals,
        "baseline": metrics.majority(cfg.task, run.targets, cfg.metric, len(run.labels.names)),
        "fitted_thresholds": run.thresholds,
        "with_thresholds": with_thresholds(run),
        **{name: result.get(name) for name in ("steps", "runs", "mean", "std")},
        "settings": settings(cfg),
        "audit": audit(run),
    }


def with_thresholds(run: Run) -> dict[str, float]:
    """Scores of predictions by cross-fitted thresholds; empty for a run without thresholds."""
    if not run.thresholds:
        return {}
    scores, _ = run.resampled(run.decided, ranking=False)
    del scores["f1"]  # of each class
    return scores | run.scores["after"]


def settings(cfg: TrainConfig) -> dict[str, dict]:
    """All settings, and those that are not the default."""
    values, defaults = dataclasses.asdict(cfg), dataclasses.asdict(TrainConfig())
    names = [name for name in values if values[name] != defaults[name] and name not in ("base", "outputs")]
    return {"changed": {name: values[name] for name in names}, "all": values}


def audit(run: Run) -> list[list] | None:
    """[finding, groups, rows] of the data audit."""
    path = run.path / "audit.json"
    if not seals.has(path):
        return None
    rows = []
    for name, findings in checkpoint.load_json(path).items():
        if not isinstance(findings, dict):
            findings = {"": findings}
        for key, groups in findings.items():
            if groups:
                rows.append([f"{name} {key}".strip(), len(groups), sum(map(len, groups))])
    return rows


def training(run: Run) -> dict[str, dict]:
    """Curves by member run: loss and learning rate by step, the metric by step of evaluation."""
    curves = {}
    metric = run.cfg.metric
    for name, folder in trained.members(run.path).items():
        log, result = folder / "metrics.jsonl", folder / "result.json"
        text = seals.read(log) if checkpoint.finished(folder) else None
        if text is None:
            continue
        try:
            lines = [dict(json.loads(line)) for line in text.splitlines()]
        except (ValueError, TypeError) as e:
            raise Untrusted(f"{log}: {e}") from None
        steps = [line for line in lines if line.get("loss") is not None]
        evals = [line for line in lines if metric in line.get("eval", {})]
        if steps:
            curves[name] = {
                "step": [line["step"] for line in steps],
                "loss": [line["loss"] for line in steps],
                "lr": [line["lr"] for line in steps],
                "eval_step": [line["step"] for line in evals],
                "eval": [line["eval"][metric] for line in evals],
                "best_step": checkpoint.load_json(result).get("best_step"),
            }
    return curves


# ---- classes --------------------------------------------------------------------------------------------------------


def confusion(run: Run) -> dict | None:
    """The confusion matrix of the most frequent classes, and all rows of each of them."""
    if run.cfg.task != "single_label":
        return None
    counts = metrics.confusion_matrix(run.targets, run.predicted, len(run.labels.names))
    totals = counts.sum(axis=1)
    frequent = np.sort(np.argsort(-totals, kind="stable")[:MOST_CLASSES])
    return {
        "classes": [run.labels.names[k] for k in frequent],
        "counts": counts[np.ix_(frequent, frequent)],
        "totals": totals[frequent],
        "of": len(counts),
    }


def classes(run: Run) -> dict[str, list] | None:
    """Columns of the table of classes."""
    if run.cfg.task == "regression":
        return None
    columns = class_scores(run, run.predicted)
    if run.intervals:
        columns["95% interval"] = run.intervals["f1"].T
    if run.thresholds:
        for name, values in class_scores(run, run.decided).items():
            columns[f"{name}, thresholds"] = values
    if run.cfg.task == "multi_label":
        areas = []
        for logits, targets in zip(run.logits.T, run.targets.T, strict=True):
            areas.append(metrics.areas(logits, targets)[1])
        columns["average precision"] = areas
    return by_frequency(run, columns)


def class_scores(run: Run, predicted: np.ndarray) -> dict[str, np.ndarray]:
    """Precision, recall and F1 (C,) of each class; 0 where nothing is to be divided by."""
    true, chosen = (metrics.one_hot(values, len(run.labels.names)) for values in (run.targets, predicted))
    hits = (true * chosen).sum(axis=0)
    true, chosen = true.sum(axis=0), chosen.sum(axis=0)
    return dict(zip(("precision", "recall", "F1"), metrics.of_counts(hits, chosen, true), strict=True))


def by_frequency(run: Run, columns: dict) -> dict[str, list]:
    """Columns over classes, after the names and rows of the classes, the most frequent class first."""
    support = metrics.one_hot(run.targets, len(run.labels.names)).sum(axis=0).astype(int)
    order = np.argsort(-support, kind="stable")
    columns = {"class": run.labels.names, "rows": support, **columns}
    return {name: [values[k] for k in order] for name, values in columns.items()}


# ---- probabilities --------------------------------------------------------------------------------------------------


def calibration(run: Run) -> dict | None:
    """Reliability as trained and calibrated, and the scores of both."""
    if run.cfg.task == "regression":
        return None
    series = {}
    for name, p in (("as trained", run.probabilities), ("calibrated", run.calibrated)):
        if p is None:
            continue
        if run.cfg.task == "multi_label":
            series[name] = reliability(p.ravel(), run.targets.ravel())
        else:
            series[name] = reliability(p.max(axis=1), p.argmax(axis=1) == run.targets)
    return {"series": series, "scores": run.scores}


def reliability(p: np.ndarray, outcome: np.ndarray) -> dict:
    """How many values each bin holds and, of the bins that hold some, mean probability and share of outcomes."""
    index = np.clip(np.ceil(p * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(index, minlength=BINS)
    used = np.flatnonzero(count)
    hits = np.bincount(index, weights=outcome)[used]
    return {
        "ece": metrics.ece(p, outcome),
        "count": count,
        "mean": np.bincount(index, weights=p)[used] / count[used],
        "share": hits / count[used],
        "interval": bootstrap.wilson(hits, count[used]),
    }


def thresholds(run: Run) -> dict | None:
    """Scores by one threshold on the probability, of two classes or of all labels."""
    multi = run.cfg.task == "multi_label"
    if not multi and not run.binary:
        return None
    p = run.probabilities if multi else run.probabilities[:, 1:]
    y = run.targets if multi else run.targets[:, None]
    grid = np.linspace(0.005, 0.995, 199)
    hits, chosen = counts_above(p, y, grid)
    support = y.sum(axis=0)
    _, recall, f1 = metrics.of_counts(hits, chosen, support)
    if multi:
        _, _, micro = metrics.of_counts(hits.sum(axis=1), chosen.sum(axis=1), support.sum())
        series = {"micro-F1": micro, "macro-F1": f1.mean(axis=1)}
    else:
        precision = hits / np.where(chosen > 0, chosen, np.nan)
        series = {"precision": precision, "recall": recall, "F1": f1}
    label = "one threshold for all labels, on the probability"
    if run.binary:
        label = f"threshold on the probability of {run.labels.names[1]}"
    fitted = None
    if run.thresholds == "global":
        fitted = np.exp(-np.logaddexp(0, -run.decision.thresholds[0]))  # its sigmoid
    series = {name: values.ravel() for name, values in series.items()}
    return {"label": label, "grid": grid, "series": series, "fitted": fitted}


def counts_above(p: np.ndarray, y: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(true positives, predicted) (T, C) of probabilities (N, C) above each threshold of a grid (T,)."""
    hits, chosen = [], []
    for values, true in zip(p.T, y.T, strict=True):
        above = values > grid[:, None]  # (T, N)
        hits.append(above @ true)
        chosen.append(above.sum(axis=1))
    return np.stack(hits, axis=1), np.stack(chosen, axis=1)


def coverage(run: Run) -> dict | None:
    """Accuracy of the most confident rows by their share, from 20 rows on; of three classes and more."""
    if run.cfg.task != "single_label" or run.binary:
        return None
    order = np.argsort(-confidence(run), kind="stable")
    n = len(order)
    rows = np.unique(np.linspace(min(20, n), n, MOST_POINTS).round().astype(int))
    hits = run.correct[order].cumsum()[rows - 1]
    return {
        "half": run.correct[order][: (n + 1) // 2].mean(),
        "all": run.correct.mean(),
        "share": rows / n,
        "accuracy": hits / rows,
        "interval": bootstrap.wilson(hits, rows),
    }


def scores(run: Run) -> dict | None:
    """Histograms of the scores of two groups that they should separate."""
    values, positive, unit = run.probabilities, run.targets == 1, "rows"
    if run.cfg.task == "regression":
        if outputs(run):
            return None
        values = run.logits[:, 0]
        names, label = ("label 1", "label 0"), "output"
    elif run.cfg.task == "multi_label":
        names, label = ("label present", "label absent"), "probability of a label"
        unit = "cells (rows x labels)"
    elif run.binary:
        values = values[:, 1]
        names, label = run.labels.names[::-1], f"probability of {run.labels.names[1]}"
    else:
        values, positive = values.max(axis=1), run.correct
        names, label = ("correct", "wrong"), "probability of the predicted class"
    within = (0, 1) if values.min() >= 0 and values.max() <= 1 else None
    edges = np.histogram_bin_edges(values, 40, within)
    counts = [np.histogram(values[mask], edges)[0] for mask in (positive, ~positive)]
    return {"label": label, "unit": unit, "names": names, "edges": edges, "counts": counts}


def outputs(run: Run) -> dict | None:
    """Predicted and true numbers of a regression whose targets are not only 0 and 1."""
    if run.cfg.task != "regression" or np.isin(run.targets, (0, 1)).all():
        return None
    return {"predicted": run.logits[:, 0], "true": run.targets}


# ---- groups of rows -------------------------------------------------------------------------------------------------


def row_errors(run: Run) -> tuple[np.ndarray, str]:
    """(N,) how wrong each row is, and what the mean of that is called."""
    if run.cfg.task == "regression":
        return np.abs(run.logits[:, 0] - run.targets), "mean absolute error"
    name = "share of rows with a wrong label" if run.targets.ndim == 2 else "error rate"
    return 1.0 - run.correct, name


def group_means(run: Run, values: np.ndarray, groups: np.ndarray) -> list[list]:
    """[group, rows, mean, its 95% interval] of values (N,) by group (N,), in the order of the groups.

    The interval is Wilson's of a share, and 1.96 standard errors to both sides of a regression's error.
    """
    rows = []
    for group in np.unique(groups):
        inside = values[groups == group]
        n, mean = len(inside), inside.mean()
        if run.cfg.task != "regression":
            interval = bootstrap.wilson(inside.sum(), np.float64(n))
        elif n > 1:
            half = 1.96 * inside.std(ddof=1) / n**0.5
            interval = [mean - half, mean + half]
        else:
            interval = [np.nan, np.nan]
        rows.append([group, n, mean, interval])
    return rows


def lengths(run: Run) -> dict | None:
    """Mean errors of ten groups of rows by length."""
    if not run.texts:
        return None
    errors, name = row_errors(run)
    size = np.array([len(text) for text in run.texts])
    edges = np.unique(np.quantile(size, np.linspace(0, 1, 11), method="nearest"))
    tenths = np.searchsorted(edges[1:-1], size, side="right")
    rows = group_means(run, errors, tenths)
    for row in rows:
        inside = size[tenths == row[0]]
        row[0] = f"{inside.min():,}–{inside.max():,}"
    return {"measure": name, "overall": errors.mean(), "groups": rows}


def groups(run: Run) -> dict[str, dict]:
    """Accuracy, or a regression's error, of the largest groups by each column."""
    values, measure = row_errors(run)
    if run.cfg.task != "regression":
        values, measure = 1 - values, "accuracy"
    tables = {}
    for column, names in run.groups.items():
        rows = group_means(run, values, np.array(names))
        rows.sort(key=lambda row: -row[1])
        tables[column] = {"measure": measure, "groups": rows[:MOST_GROUPS], "of": len(rows)}
    return tables


# ---- rows -----------------------------------------------------------------------------------------------------------


def errors(run: Run) -> list[dict]:
    """The most confident errors, of two classes by kind; of a regression the rows with the largest errors."""
    order = np.argsort(-confidence(run), kind="stable")
    wrong = order[~run.correct[order]]
    if run.cfg.task == "regression":
        kinds = {"Rows": order}
    elif run.binary:
        negative, positive = run.labels.names
        kinds = {
            f"False positives: predicted {positive}, true {negative}": wrong[run.targets[wrong] == 0],
            f"False negatives: predicted {negative}, true {positive}": wrong[run.targets[wrong] == 1],
        }
    else:
        kinds = {"Wrong rows": wrong}
    return [listing(title, rows, run, row_fields) for title, rows in kinds.items()]


def listing(title: str, rows: np.ndarray, run: Run, fields_of) -> dict:
    """Rows of one kind: how many there are, and fields_of(run, i) and text of the first ones."""
    cards = []
    for i in rows[: run.worst]:
        fields = {"id": run.ids[i], **fields_of(run, i)}
        cards.append({"fields": fields, "text": run.texts[i] if run.texts else None})
    return {"title": title, "count": len(rows), "rows": cards}


def confidence(run: Run) -> np.ndarray:
    """(N,) by what errors are sorted: the probability of the predicted class, of several labels the distance of the
    worst error from 0.5, of a regression the error.
    """
    if run.cfg.task == "regression":
        return row_errors(run)[0]
    if run.cfg.task == "multi_label":
        return (np.abs(run.probabilities - 0.5) * (run.predicted != run.targets)).max(axis=1)
    return run.probabilities.max(axis=1)


def truth(run: Run, i: int) -> str:
    """A row's target in words."""
    target, names = run.targets[i], run.labels.names
    if run.cfg.task == "regression":
        return f"{target:.4g}"
    if run.cfg.task == "single_label":
        return names[target]
    return ", ".join(names[c] for c in np.flatnonzero(target)) or "none"


def row_fields(run: Run, i: int) -> dict[str, str]:
    """A row's target, what the run predicts, and with which probabilities."""
    true, predicted = run.targets[i], run.predicted[i]
    if run.cfg.task == "regression":
        return {"true": truth(run, i), "predicted": f"{predicted:.4g}", "error": f"{predicted - true:+.4g}"}

    def named(classes) -> str:
        return ", ".join(f"{run.labels.names[c]} ({run.probabilities[i, c]:.3f})" for c in classes)

    if run.cfg.task == "single_label":
        return {"true": named([true]), "predicted": named([predicted])}
    fields = {
        "true": truth(run, i),
        "missed": named(np.flatnonzero(true > predicted)),
        "false positives": named(np.flatnonzero(predicted > true)),
    }
    return {name: value for name, value in fields.items() if value}
