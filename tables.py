"""Scores as a person reads them."""

from collections.abc import Sequence

import numpy as np

import metrics
from metrics import Array

WIDTH = 100  # columns of a terminal
MOST_LABELS = 100  # lines of a table


def aligned(rows: Sequence[Sequence[str]], gap: str = "  ") -> list[str]:
    """The lines of a table of cells: the first column starts at the left, the others end at the right."""
    columns = zip(*rows, strict=True)
    left, *right = [max(map(len, column)) for column in columns]
    lines = []
    for first, *others in rows:
        cells = map(str.rjust, others, right)
        lines.append(gap.join([first.ljust(left), *cells]))
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
        none = (per_row == 0).mean()
        return f"at probability 0.5: {per_row.mean():.2f} labels a row, {none:.1%} of rows none; {listed}"
    if logits.shape[1] == 1:
        return f"{names[0]}: {_quantiles(logits, '.4g')}, mean {logits.mean():.4g}"

    chosen = logits.argmax(axis=1)
    top = metrics.softmax(logits).max(axis=1)
    rows = [["predicted", "rows", "share", "mean top probability"]]
    for c, name in enumerate(names):
        own = top[chosen == c]
        share = len(own) / len(top)
        mean = f"{own.mean():.3f}" if len(own) else "-"
        rows.append([name, str(len(own)), f"{share:.1%}", mean])
    lines = aligned(rows)
    lines.append(f"top probability: {_quantiles(top, '.3f')}")
    return "\n".join(lines)


def _quantiles(values: Array, digits: str) -> str:
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"5% below {low:{digits}}, median {middle:{digits}}, 5% above {high:{digits}}"


def summary(task: str, logits: Array, labels: Array, names: Sequence[str]) -> str:
    """The scores of logits (N, C) against labels: a table over classes, or a line."""
    if task == "regression":
        scores = metrics.of_task(task, logits, labels)
        del scores["rows"]
        return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    if task == "multi_label":
        return label_table(logits, labels, names)
    predicted = logits.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predicted, len(names))
    return table(confusion, names)


def label_table(logits: Array, targets: Array, names: Sequence[str]) -> str:
    """Precision, recall, F1, average precision and support of each label at probability 0.5; the commonest if many."""
    true = targets > 0
    predicted = logits > 0
    support = true.sum(axis=0)
    hits = (true & predicted).sum(axis=0)
    scores = metrics.of_counts(hits, predicted.sum(axis=0), support)
    precision = list(map(metrics.average_precision, logits.T, true.T))
    scores = np.stack([*scores, precision], axis=1)  # (C, 4)
    commonest = np.argsort(-support, kind="stable")[:MOST_LABELS]
    shown = np.sort(commonest)
    chosen = [names[k] for k in shown]
    lines = _score_lines(chosen, scores[shown], support[shown])
    if len(names) > MOST_LABELS:
        lines.append(f"({len(names) - MOST_LABELS} rarer labels are not shown)")
    return "\n".join(lines)


def _score_lines(names: Sequence[str], scores: Array, support: Sequence[int]) -> list[str]:
    """A line of scores (C, 3 or 4) for each name; a dash where one is not defined."""
    heads = ["precision", "recall", "f1", "ap"]
    rows = [["", *heads[: scores.shape[1]], "support"]]
    for k, name in enumerate(names):
        cells = [f"{value:.4f}" for value in scores[k]]
        cells = ["-" if cell == "nan" else cell for cell in cells]
        rows.append([clip(name, 60), *cells, str(support[k])])
    return aligned(rows)


def table(confusion: Array, names: Sequence[str]) -> str:
    """Text for the end of a run: precision, recall, F1, support per class, then the confusion matrix (C, C).

    Names are shortened so that lines keep within WIDTH columns; a matrix that cannot is left out, and the text says
    so. The macro line is over the classes that occur.
    """
    labels = [f"{k} {name}" for k, name in enumerate(names)]
    hits = np.diag(confusion)
    predicted = confusion.sum(axis=0)
    support = confusion.sum(axis=1)
    scores = metrics.of_counts(hits, predicted, support)
    scores = np.stack(scores, axis=1)  # (C, 3)
    total = support.sum()
    occurs = predicted + support > 0
    macro = scores[occurs].mean(axis=0)
    weighted = support @ scores / total
    names = [*labels, "macro", "weighted"]
    scores = np.vstack([scores, macro, weighted])
    lines = _score_lines(names, scores, [*support, total, total])
    return "\n".join([*lines, "", *_matrix_lines(confusion, labels)])


def _matrix_lines(confusion: Array, labels: Sequence[str]) -> list[str]:
    """The confusion matrix; its columns have the numbers of the classes."""
    numbers = map(str, range(len(labels)))
    rows = [["", *numbers]]
    for label, counts in zip(labels, confusion, strict=True):
        name = clip(label, WIDTH // 5)
        rows.append([name, *map(str, counts)])
    lines = aligned(rows, gap=" ")
    if len(lines[0]) > WIDTH:
        return [f"confusion matrix: {len(labels)} classes do not fit {WIDTH} columns"]
    return ["rows: true class, columns: predicted class", *lines]
