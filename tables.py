"""Scores as a person reads them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

import calibrate
import metrics


def distribution(logits: np.ndarray, names: list[str], task: str = "single_label") -> str:
    """A short summary of predictions: rows and share per class and how sure they are, or a regression's quantiles; of
    multi_label how many labels a row gets, and the commonest.
    """
    if task == "multi_label":
        predicted = logits > 0
        order = np.argsort(-predicted.sum(axis=0), kind="stable")[:10]
        shares = ", ".join(f"{names[c]} {predicted[:, c].mean():.1%}" for c in order if predicted[:, c].any())
        none = (~predicted.any(axis=1)).mean()
        return f"at probability 0.5: {predicted.sum(axis=1).mean():.2f} labels a row, {none:.1%} of rows none; {shares}"
    if logits.shape[1] == 1:
        low, mid, high = np.quantile(logits, [0.05, 0.5, 0.95])
        return f"{names[0]}: 5% below {low:.4g}, median {mid:.4g}, 5% above {high:.4g}, mean {logits.mean():.4g}"
    top, chosen = calibrate.softmax(logits).max(axis=1), logits.argmax(axis=1)
    width = max(len(n) for n in names)
    lines = [f"{'predicted':<{width}} {'rows':>7} {'share':>7} {'mean top probability':>21}"]
    for c, name in enumerate(names):
        mine = chosen == c
        mean = f"{top[mine].mean():.3f}" if mine.any() else "-"
        lines.append(f"{name:<{width}} {mine.sum():>7} {mine.mean():>7.1%} {mean:>21}")
    low, mid, high = np.quantile(top, [0.05, 0.5, 0.95])
    lines.append(f"top probability: 5% below {low:.3f}, median {mid:.3f}, 5% above {high:.3f}")
    return "\n".join(lines)


def summary(task: str, logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> str:
    """The scores as a person reads them: a table over classes, or a line."""
    if task == "regression":
        return ", ".join(f"{k} {v:.4f}" for k, v in metrics.of_task(task, logits, labels).items() if k != "rows")
    if task == "multi_label":
        return label_table(logits, labels, list(names))
    return table(metrics.confusion_matrix(labels, logits.argmax(axis=1), len(names)), list(names))


def label_table(logits: np.ndarray, targets: np.ndarray, names: Sequence[str], most: int = 100) -> str:
    """Precision, recall, F1, average precision and support of each label at probability 0.5; the commonest if many."""
    true, predicted = np.asarray(targets).astype(bool), np.asarray(logits) > 0
    scores = metrics._from_counts((true & predicted).sum(axis=0), predicted.sum(axis=0), true.sum(axis=0))
    left = max(8, *(len(_clip(name, 60)) for name in names))
    lines = [f"{'':<{left}} {'precision':>9} {'recall':>7} {'f1':>7} {'ap':>7} {'support':>9}"]
    order = np.argsort(-scores["support"], kind="stable")
    for k in sorted(order[:most]):
        ap = f"{metrics.average_precision(logits[:, k], true[:, k]):7.4f}" if true[:, k].any() else f"{'-':>7}"
        p, r, f1 = (scores[name][k] for name in ("precision", "recall", "f1"))
        lines.append(f"{_clip(names[k], 60):<{left}} {p:9.4f} {r:7.4f} {f1:7.4f} {ap} {scores['support'][k]:9d}")
    return "\n".join(lines + ([f"({len(names) - most} rarer labels are not shown)"] if len(names) > most else []))


def _clip(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1].rstrip() + "."


def table(confusion: ArrayLike, names: Sequence[str], width: int = 100) -> str:
    """Text for the end of a run: precision, recall, F1, support per class, then the confusion matrix (C, C).

    Names are shortened so that lines keep within `width` columns; a matrix that cannot is left out, and the text says
    so. The macro line is over the classes that occur. ValueError when names and matrix differ in length.
    """
    scores, counts = metrics.per_class(confusion), np.asarray(confusion)
    if len(names) != len(counts):
        raise ValueError(f"names: got {len(names)}, expected {len(counts)}, one per row of the confusion matrix")
    classes = len(names)
    labels = [f"{k} {name}" for k, name in enumerate(names)]

    left = max(len("weighted"), *(len(_clip(label, width - 40)) for label in labels))
    lines = [f"{'':<{left}} {'precision':>9} {'recall':>7} {'f1':>7} {'support':>9}"]
    columns = np.stack([scores[name] for name in ("precision", "recall", "f1")], axis=1)  # (C, 3)
    support, occurs = scores["support"], counts.sum(axis=0) + scores["support"] > 0
    macro = columns[occurs].mean(axis=0) if occurs.any() else np.zeros(3)
    weighted = metrics._ratio(columns.T @ support, np.full(3, support.sum()))
    for label, values, number in [
        *zip(labels, columns, support, strict=True),
        ("macro", macro, support.sum()),
        ("weighted", weighted, support.sum()),
    ]:
        precision, recall, f1 = values
        lines.append(f"{_clip(label, left):<{left}} {precision:9.4f} {recall:7.4f} {f1:7.4f} {number:9d}")

    left = max(len(_clip(label, max(20, width // 5))) for label in labels)
    room = (width - left) // classes - 1  # characters for one cell
    least = max(len(str(counts.max())), len(str(classes - 1)))
    if room < least:
        return "\n".join([*lines, "", f"confusion matrix: {classes} classes do not fit {width} columns"])
    cell = max(least, min(room, max(len(label) for label in labels)))
    heads = [_clip(label, cell) if cell >= min(6, len(label)) else str(k) for k, label in enumerate(labels)]
    lines += ["", "rows: true class, columns: predicted class"]
    lines.append(" " * left + "".join(f" {head:>{cell}}" for head in heads))
    for label, row in zip(labels, counts, strict=True):
        lines.append(f"{_clip(label, left):<{left}}" + "".join(f" {count:>{cell}d}" for count in row))
    return "\n".join(lines)
