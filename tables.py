"""Scores as a person reads them."""

from collections.abc import Sequence

import numpy as np

import metrics
from metrics import Array

WIDTH = 100  # columns of a terminal
MOST_LABELS = 100  # lines of a table


def aligned(
    rows: Sequence[Sequence[str]],
    gap: str = "  ",
) -> list[str]:
    """The lines of a table of cells: the first column starts at the left, the others end at the right."""
    left, *right = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [gap.join([first.ljust(left), *map(str.rjust, others, right)]) for first, *others in rows]


def clip(name: str, width: int = 40) -> str:
    """A name on one line of at most `width` characters."""
    name = " ".join(name.split())
    if len(name) > width:
        return name[: width - 1].rstrip() + "."
    return name


def distribution(
    logits: Array,
    names: Sequence[str],
    task: str = "single_label",
) -> str:
    """A short summary of predictions: rows and share per class and how sure they are, or a regression's quantiles; of
    multi_label how many labels a row gets, and the commonest.
    """
    if task == "multi_label":
        predicted = logits > 0
        shares = predicted.mean(axis=0)
        commonest = np.argsort(-shares, kind="stable")[:10]
        listed = ", ".join(f"{names[c]} {shares[c]:.1%}" for c in commonest if shares[c] > 0)
        counts = predicted.sum(axis=1)
        return (
            f"at probability 0.5: {counts.mean():.2f} labels a row, {np.mean(counts == 0):.1%} of rows none; {listed}"
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


def _quantiles(values, digits):
    low, middle, high = np.quantile(values, [0.05, 0.5, 0.95])
    return f"5% below {low:{digits}}, median {middle:{digits}}, 5% above {high:{digits}}"


def summary(
    task: str,
    logits: Array,
    labels: Array,
    names: Sequence[str],
) -> str:
    """The scores of logits (N, C) against labels: a table over classes, or a line.

    Of multi_label at probability 0.5, with average precision; of the commonest labels where there are many.
    """
    if task == "regression":
        scores = metrics.of_task(task, logits, labels)
        return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "rows")
    if task == "single_label":
        return table(metrics.confusion_matrix(labels, logits.argmax(axis=1), len(names)), names)

    true, predicted = labels > 0, logits > 0
    support = true.sum(axis=0)
    scores = metrics.of_counts((true & predicted).sum(axis=0), predicted.sum(axis=0), support)
    precision = [areas[1] for areas in map(metrics.areas, logits.T, true.T)]
    scores = np.stack([*scores, precision], axis=1)  # (C, 4)
    shown = np.sort(np.argsort(-support, kind="stable")[:MOST_LABELS])
    lines = _score_lines([names[k] for k in shown], scores[shown], support[shown])
    if len(names) > MOST_LABELS:
        lines.append(f"({len(names) - MOST_LABELS} rarer labels are not shown)")
    return "\n".join(lines)


def _score_lines(names, scores, support):
    """A line of scores (C, 3 or 4) and support (C,) for each name; a dash where a score is not defined."""
    heads = "precision recall f1 ap".split()[: scores.shape[1]]
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
    predicted = confusion.sum(axis=0)
    support = confusion.sum(axis=1)
    scores = np.stack(metrics.of_counts(np.diag(confusion), predicted, support), axis=1)  # (C, 3)
    macro = scores[predicted + support > 0].mean(axis=0)
    total = support.sum()
    scores = np.vstack([scores, macro, support @ scores / total])
    lines = _score_lines([*labels, "macro", "weighted"], scores, [*support, total, total])

    # The columns of the matrix have the numbers of the classes.
    rows = [["", *map(str, range(len(labels)))]]
    for label, counts in zip(labels, confusion, strict=True):
        rows.append([clip(label, WIDTH // 5), *map(str, counts)])
    matrix = ["rows: true class, columns: predicted class", *aligned(rows, gap=" ")]
    if len(matrix[1]) > WIDTH:
        matrix = [f"confusion matrix: {len(labels)} classes do not fit {WIDTH} columns"]
    return "\n".join([*lines, "", *matrix])
