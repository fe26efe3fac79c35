"""From logits to decisions. numpy only."""

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """(N, C) logits -> (N, C) probabilities in fp64, each row summing to 1."""
    z = logits.astype(np.float64)
    z = np.exp(z - z.max(axis=1, keepdims=True))
    return z / z.sum(axis=1, keepdims=True)


def class_weights(setting: str, counts: np.ndarray) -> np.ndarray | None:
    """The weights of `--class_weights`: none, balanced (N / (C * count), mean 1 over rows) or C given numbers.

    counts (C,) training rows per class. Raises ValueError when the number of given weights is not C.
    """
    if setting == "none":
        return None
    if setting == "balanced":
        return counts.sum() / (len(counts) * np.maximum(counts, 1).astype(np.float64))
    weights = np.array([float(w) for w in setting.split(",")])
    if len(weights) != len(counts):
        raise ValueError(f"--class_weights has {len(weights)} numbers, expected one for each of {len(counts)} classes")
    return weights


def degenerate(logits: np.ndarray) -> str:
    """Why these scores (N, C) cannot be trusted, or an empty string: not finite, or the same for every row."""
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        first = int(bad.argmax()) + 1
        return f"{int(bad.sum())} of {len(logits)} rows have scores that are not finite (first: row {first})"
    if len(logits) < 8:
        return ""
    relative = logits - logits.mean(axis=1, keepdims=True) if logits.shape[1] > 1 else logits
    spread = relative.std(axis=0).max()
    distinct = len(np.unique(logits, axis=0))
    if spread < 1e-4 or distinct <= max(2, len(logits) // 100):
        return f"{len(logits)} rows have {distinct} distinct scores, spread {spread:.1e}: the model ignores its input"
    return ""


def distribution(logits: np.ndarray, names: list[str]) -> str:
    """A short summary of predictions: rows and share per class and how sure they are, or a regression's quantiles."""
    if logits.shape[1] == 1:
        low, mid, high = np.quantile(logits, [0.05, 0.5, 0.95])
        return f"{names[0]}: 5% below {low:.4g}, median {mid:.4g}, 5% above {high:.4g}, mean {logits.mean():.4g}"
    top, chosen = softmax(logits).max(axis=1), logits.argmax(axis=1)
    width = max(len(n) for n in names)
    lines = [f"{'predicted':<{width}} {'rows':>7} {'share':>7} {'mean top probability':>21}"]
    for c, name in enumerate(names):
        mine = chosen == c
        mean = f"{top[mine].mean():.3f}" if mine.any() else "-"
        lines.append(f"{name:<{width}} {mine.sum():>7} {mine.mean():>7.1%} {mean:>21}")
    low, mid, high = np.quantile(top, [0.05, 0.5, 0.95])
    lines.append(f"top probability: 5% below {low:.3f}, median {mid:.3f}, 5% above {high:.3f}")
    return "\n".join(lines)
