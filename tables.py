"""Scores as a person reads them."""

from collections.abc import Sequence

import numpy as np

import metrics
from metrics import Array

WIDTH = 100  # columns of a terminal
MOST_LABELS = 100  # lines of a table


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """The lines of a table of cells: the first column starts at the left, the others end at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append(gap.join(cells))
    return lines


def clip(name: str, width: int = 40) -> str:
    """A name on one line of at most `width` characters."""
    name = " ".join(name.split())
    if len(name) <= width:
        return name
    return name[: width - 1].rstrip() + "."


def distribution(logits: Array, names: Sequence[str], task: str = "single_label") -> str:
    """A short summary of predictions: rows and share per class and how sure they are, or a regression's quantiles; of
    multi_label how many labels a row gets, and the commonest.
    """
    if task == "multi_label":
        predicted = logits > 0
        shares = predicted.mean(axis=0)
        commonest = np.argsort(-shares, kind="stable")[:10]
        listed = ", ".join(f"{names[c]} {shares[c]:.1%}" for c in commonest if shares[c] > 0)
        per_row = predicted.sum(axis=1)
        return (
            f"at probability 0.5: {per_row.mean():.2f} labels a row, {(per_row == 0).mean():.1%} of rows none; {listed}"
        )
    if logits.shape[1] == 1:
        return f"{names[0]}: {_quantiles(logits, '.4g')}, mean {logits.mean():.4g}"

    chosen = logits.argmax(axis=1)
    top = metrics.softmax(logits).max(axis=1)
    rows = [["predicted", "rows", "share", "mean top probability"]]
    for c, name in enumerate(names):
        own = top[chosen == c]
        mean = f"{own.mean():.3f}" if len(own) else "-"
        rows.append([name, str(len(own)), f"{len(own) / len(top):.1%}", mean])
    return "\n".join([*aligned(rows), f"top probability: {_quantiles(top, '.3f')}"])


def _quantiles(values: Array, digits: str) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"5% below {low:{digits}}, median {middle:{digits}}, 5% above {high:{digits}}"


def summary(task: str, logits: Array, labels: Array, names: Sequence[str]) -> str:
    """The scores of logits (N, C) against labels: a table over classes, or a line."""
    if task == "regression":
        scores = metrics.of_task(task, logits, labels)
        return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "rows")
    if task == "multi_label":
        return label_table(logits, labels, names)
    return table(metrics.confusion_matrix(labels, logits.argmax(axis=1), len(names)), names)


def label_table(logits: Array, targets: Array, names: Sequence[str]) -> str:
    """Precision, recall, F1, average precision and support of each label at probability 0.5; the commonest if many."""
    true, predicted = targets > 0, logits > 0
    support = true.sum(axis=0)
    scores = metrics.of_counts((true & predicted).sum(axis=0), predicted.sum(axis=0), support)
    precision = [metrics.average_precision(*column) for column in zip(logits.T, true.T, strict=True)]
    scores = np.stack([*scores, precision], axis=1)  # (C, 4)
    shown = np.sort(np.argsort(-support, kind="stable")[:MOST_LABELS])
    lines = _score_lines([names[k] for k in shown], scores[shown], support[shown])
    if len(names) > MOST_LABELS:
        lines.append(f"({len(names) - MOST_LABELS} rarer labels are not shown)")
    return "\n".join(lines)


def _score_lines(names: Sequence[str], scores: Array, support: Array) -> list[str]:
    heads = ["precision", "recall", "f1", "ap"][: scores.shape[1]]
    rows = [["", *heads, "support"]]
    for name, values, count in zip(names, scores, support, strict=True):
        cells = ["-" if np.isnan(value) else f"{value:.4f}" for value in values]
        rows.append([clip(name, 60), *cells, str(count)])
    return aligned(rows)


def table(confusion: Array, names: Sequence[str]) -> str:
    """Text for the end of a run: precision, recall, F1, support per class, then the confusion matrix (C, C).

    Names are shortened so that lines keep within WIDTH columns; a matrix that cannot is left out, and the text says
    so. The macro line is over the classes that occur.
    """
    labels = [f"{k} {name}" for k, name in enumerate(names)]
    predicted, support = confusion.sum(axis=0), confusion.sum(axis=1)
    scores = np.stack(metrics.of_counts(np.diag(confusion), predicted, support), axis=1)  # (C, 3)
    total = support.sum()
    macro = scores[predicted + support > 0].mean(axis=0)
    weighted = support @ scores / total
    lines = _score_lines(
        [*labels, "macro", "weighted"],
        np.vstack([scores, macro, weighted]),
        [*support, total, total],
    )
    return "\n".join([*lines, "", *_matrix_lines(confusion, labels)])


def _matrix_lines(confusion: Array, labels: list[str]) -> list[str]:
    """The confusion matrix with named columns where the names fit, else with numbered ones."""
    labels = [clip(label, WIDTH // 5) for label in labels]
    numbers = [str(k) for k in range(len(labels))]
    for heads in (labels, numbers):
        rows = [["", *heads]]
        for label, counts in zip(labels, confusion, strict=True):
            rows.append([label, *map(str, counts)])
        lines = aligned(rows, gap=" ")
        if len(lines[0]) <= WIDTH:
            return ["rows: true class, columns: predicted class", *lines]
    return [f"confusion matrix: {len(labels)} classes do not fit {WIDTH} columns"]
