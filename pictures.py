"""Figures of a report, drawn with matplotlib from the numbers of report.json."""

import contextlib

import numpy as np

BLUE, ORANGE = "#0072B2", "#D55E00"  # the palette of Okabe and Ito 2008
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5d6878", "#a8960c")
INK = "#1c2430"
GREY = "#8a94a0"
FONTS = (  # for letters that DejaVu Sans lacks
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
    "Hiragino Sans",
    "Malgun Gothic",
    "Arial Unicode MS",
    "Noto Emoji",
)
STYLE = {
    "font.size": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "figure.dpi": 200,
    "text.parse_math": False,  # a class may be called $x$
    "figure.constrained_layout.use": True,
}
TILTED = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}  # names under an axis
DASHED = {"color": GREY, "linestyle": "--", "linewidth": 1}  # reference lines


def drawing() -> contextlib.AbstractContextManager:
    """This file's style for all that is drawn inside, with the machine's fonts for other scripts."""
    import matplotlib
    from matplotlib import font_manager

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(name for name in FONTS if name in installed)]
    return matplotlib.rc_context({**STYLE, "font.family": fonts})


def figure(height: float, rows: int = 1, columns: int = 1, width: float = 6.4, **options):
    """(figure, axes...): a figure in inches, and its panels in reading order."""
    from matplotlib.figure import Figure

    fig = Figure((width, height))
    return fig, *fig.subplots(rows, columns, squeeze=False, **options).flat


def array(values: list) -> np.ndarray:
    """Numbers of report.json as float64; null becomes NaN, which leaves a gap in a line."""
    return np.array(values, dtype=np.float64)


def short(name: str, most: int = 26) -> str:
    """A name as it fits a picture."""
    name = " ".join(str(name).split())
    if len(name) <= most:
        return name
    return name[: most - 1] + "…"


def count_axis(ax, logarithmic: bool) -> None:
    """A y axis of counts."""
    if logarithmic:
        ax.set(yscale="log")
    else:
        ax.set(ylim=(0, None))
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


# ---- training -------------------------------------------------------------------------------------------------------


def curves(members: dict[str, dict], metric: str):
    """Loss, metric and learning rate by step, a colour for each member run."""
    fig, top, middle, bottom = figure(5.2, 3, sharex=True, height_ratios=[3, 2.2, 1.2])
    alpha = 0.25 if len(members) == 1 else 0.12
    for i, (name, log) in enumerate(members.items()):
        look = {"color": PALETTE[i % len(PALETTE)], "linewidth": 1.2}
        faint = {**look, "linewidth": 0.8, "alpha": alpha}
        loss = array(log["loss"])
        top.plot(log["step"], loss, **faint)
        top.plot(log["step"], smoothed(loss), label=name, **look)
        bottom.plot(log["step"], array(log["lr"]), **look)
        steps = array(log["eval_step"])
        scores = array(log["eval"])
        best = steps == log["best_step"]
        middle.plot(steps, scores, "o-", markersize=3, **look)
        middle.plot(steps[best], scores[best], "o", markersize=7, mfc="none", **look)
    top.set_ylabel("training loss")
    middle.set_ylabel(f"validation {metric}")
    bottom.set(xlabel="optimizer step", ylabel="learning rate", ylim=(0, None))
    if 1 < len(members) <= 12:
        fig.legend(loc="outside lower center", ncols=4)
    return fig


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean over about a twentieth of the values to either side of each, the near ones weighing more."""
    kernel = np.hanning(len(values) // 20 * 2 + 3)[1:-1]
    weights = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(values, kernel, "same") / weights


# ---- classes --------------------------------------------------------------------------------------------------------


def confusion(numbers: dict):
    """Counts of rows, true by predicted class, coloured by their share of all rows of the true class."""
    counts = np.array(numbers["counts"])
    totals = np.array(numbers["totals"])
    names = [short(name, 22) for name in numbers["classes"]]
    n = len(names)
    if n <= 15:
        side, font = max(2.2, 0.4 * n), 8.5
    else:
        side, font = 0.27 * n, 6.5
    fig, ax = figure(side + 1.2, width=side + 2)
    share = counts / np.maximum(totals, 1)[:, None]
    image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    bar = fig.colorbar(image, fraction=0.04, pad=0.02, format=lambda value, _: f"{value:.0%}")
    bar.set_label("share of the true class")

    for i, j in np.argwhere(counts > 0):
        size = font if counts[i, j] <= 999 else font - 1.5
        colour = "white" if share[i, j] > 0.55 else INK
        look = {"ha": "center", "va": "center", "fontsize": size, "color": colour}
        ax.text(j, i, str(counts[i, j]), **look)
    tilt = {}
    if max(map(len, names)) > 3:
        tilt = {**TILTED, "rotation": 45}
    ax.set_xticks(range(n), names, **tilt)
    ax.set_yticks(range(n), names)
    ax.set(xlabel="predicted", ylabel="true")
    ax.grid(False)
    for axes in (ax, bar.ax):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return fig


def bars(columns: dict[str, list], value: str, label: str, colours=BLUE, dots: list | None = None):
    """Horizontal bars of a column by class with its intervals, and perhaps a second value of each as a dot."""
    classes = zip(columns["class"], columns["rows"], strict=True)
    names = [f"{short(name, 34)} ({rows:,})" for name, rows in classes]
    height = 0.8 + 0.2 * len(names)
    fig, ax = figure(height if dots is None else height + 0.25)
    places = range(len(names))
    look = {"color": colours, "height": 0.66, "alpha": 0.85}
    ax.barh(places, columns[value], label="at probability 0.5", **look)
    if "95% interval" in columns:
        spans = array(columns["95% interval"]).T
        ax.hlines(places, *np.nan_to_num(spans), color=INK, linewidth=1)
    if dots is not None:
        ax.plot(dots, places, "D", color=ORANGE, markersize=3.2, clip_on=False, label="with thresholds")
        fig.legend(loc="outside upper center", ncols=2, reverse=True)
    ax.set_yticks(places, names)
    ax.set(xlabel=label, ylim=(len(names) - 0.4, -0.6))
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    return fig


# ---- probabilities --------------------------------------------------------------------------------------------------


def reliability(series: dict[str, dict], x: str, y: str, unit: str):
    """Observed frequencies by probability in bins, with intervals, and how many values a bin holds."""
    fig, top, bottom = figure(5.2, 2, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], **DASHED)
    for (name, bins), colour in zip(series.items(), PALETTE, strict=False):
        label = f"{name} (ECE {bins['ece']:.4f})"
        mean, count = bins["mean"], bins["count"]
        edges = np.linspace(0, 1, len(count) + 1)
        top.vlines(mean, *bins["interval"], color=colour, alpha=0.35, linewidth=1)
        top.plot(mean, bins["share"], "o-", color=colour, markersize=3.5, label=label)
        bottom.stairs(count, edges, color=colour, linewidth=1.4)
    fig.legend(loc="outside upper center", ncols=2)
    top.set(ylabel=y, ylim=(-0.02, 1.02), xlim=(-0.01, 1.01))
    bottom.set(xlabel=x, ylabel=unit)
    count_axis(bottom, max(count) > 50 * max(1, np.median(count)))
    return fig


def thresholds(numbers: dict):
    """Scores by threshold, with 0.5 and the fitted one marked."""
    fig, ax = figure(3.4)
    for (name, values), colour in zip(numbers["series"].items(), PALETTE, strict=False):
        ax.plot(numbers["grid"], array(values), color=colour, label=name)
    ax.axvline(0.5, label="0.5", **DASHED)
    fitted = numbers["fitted"]
    if fitted is not None:
        label = f"fitted: {fitted:.3f}"
        ax.axvline(fitted, color=INK, linestyle=":", linewidth=1.4, label=label)
    label = short(numbers["label"], 57)
    ax.set(xlabel=label, ylabel="score", xlim=(0, 1), ylim=(0, 1.02))
    fig.legend(loc="outside upper center", ncols=5)
    return fig


def coverage(numbers: dict):
    """Accuracy of the most confident rows by their share, with its interval as a band."""
    fig, ax = figure(3.2)
    share = numbers["share"]
    ax.fill_between(share, *numbers["interval"], color=BLUE, alpha=0.15, linewidth=0)
    ax.plot(share, numbers["accuracy"], color=BLUE)
    label = "coverage: share of rows, the most confident first"
    ax.set(xlabel=label, ylabel="accuracy", xlim=(0, 1.005))
    return fig


def histograms(numbers: dict):
    """Histograms of two groups over the same bins, counts logarithmic where one group dwarfs the other."""
    fig, ax = figure(3.2)
    edges = numbers["edges"]
    counts = numbers["counts"]
    for count, name, colour in zip(counts, numbers["names"], PALETTE, strict=False):
        label = f"{short(name)} ({sum(count):,})"
        ax.stairs(count, edges, fill=True, color=colour, alpha=0.4)
        ax.stairs(count, edges, color=colour, linewidth=1.2, label=label)
    peaks = [max(count) for count in counts]
    count_axis(ax, max(peaks) > 30 * max(1, min(peaks)))
    label = short(numbers["label"], 41)
    ax.set(xlabel=label, ylabel=numbers["unit"], xlim=(edges[0], edges[-1]))
    fig.legend(loc="outside upper center", ncols=2)
    return fig


# ---- rows -----------------------------------------------------------------------------------------------------------


def residuals(numbers: dict):
    """Predicted against true numbers, and the residuals."""
    fig, left, right = figure(3.2, 1, 2)
    predicted = array(numbers["predicted"])
    true = array(numbers["true"])
    low = min(predicted.min(), true.min())
    high = max(predicted.max(), true.max())
    values = np.unique(true)
    jitter = 0.0
    if 1 < len(values) <= 20:  # points of few values would hide one another
        jitter = 0.3 * np.diff(values).min()
    shift = np.random.default_rng(0).uniform(-jitter, jitter, len(true))
    alpha = min(0.6, max(0.1, 400 / len(true)))
    left.plot([low, high], [low, high], **DASHED)
    left.scatter(true + shift, predicted, s=9, color=BLUE, alpha=alpha, linewidths=0)
    left.set(xlabel="true (jittered)" if jitter else "true", ylabel="predicted")
    right.hist(predicted - true, bins=40, color=BLUE, alpha=0.8)
    right.axvline(0, **DASHED)
    right.set(xlabel="predicted - true", ylabel="rows")
    return fig


def lengths(numbers: dict):
    """Mean errors by length with their intervals, and a line at the mean of all rows."""
    fig, ax = figure(3.2)
    names, _, means, intervals = zip(*numbers["groups"], strict=True)
    places = range(len(names))
    ax.axhline(numbers["overall"], **DASHED)
    ax.vlines(places, *array(intervals).T, color=BLUE, alpha=0.5, linewidth=1.4)
    ax.plot(places, means, "o", color=BLUE, markersize=5)
    ax.set_xticks(places, names, **TILTED)
    ax.set(xlabel="characters of the text", ylabel=numbers["measure"], ylim=(0, None))
    ax.grid(False, axis="x")
    return fig
