"""A page about a finished run, or a comparison of two, from what the runs left behind: no base, no weights, seconds.

    python report.py                                   # the newest finished run
    python report.py outputs/tiny__base/tiny/run_0     # writes report/index.html in it, and its pictures as PNG
    python report.py RUN_A RUN_B                       # which is better, and can these rows show it?

The page holds its pictures and makes no request. Intervals are 95% percentile bootstrap intervals over rows (Efron
1979) where they are not said to be others; a comparison resamples the same rows for both runs.
"""

import base64
import contextlib
import dataclasses
import html
import io
import itertools
import json
import math
import os
import time
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import bootstrap
import checkpoint
import checks
import cli
import configs
import ddp
import decide
import labelling
import metrics
import splits
import trained
from configs import ReportConfig, TrainConfig
from errors import UserError

MOST_CLASSES, MOST_BARS, MOST_GROUPS = 30, 40, 20  # of a matrix, a picture of bars, a table
LONG, LONGEST = 600, 20_000  # characters of a text that are shown at once, and at all


def main(argv: list[str]) -> dict:
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    cfg, given = cli.parse(ReportConfig, {}, argv[len(words) :], __doc__)
    if words and cfg.runs:
        raise UserError(f"runs {' '.join(words)} and --runs {' '.join(cfg.runs)}: name the runs once")
    cfg = replace(cfg, runs=tuple(words) or cfg.runs)
    checks.check(cfg, given)
    need_matplotlib()
    runs = [read_run(Path(name)) for name in cfg.runs or [newest(cfg.outputs)]]
    for run in runs:
        if run.note:
            print(f"{run.path}: {run.note}")
    with drawing():
        page, found = report(runs[0], cfg) if len(runs) == 1 else comparison(*runs, cfg)
    written = page.write(Path(cfg.output) if cfg.output else runs[0].path / "report")
    print(f"wrote {written['page']}")
    return found | written


def need_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("report.py draws with matplotlib: pip install matplotlib") from None


def newest(outputs: str) -> Path:
    found = checkpoint.newest_finished(outputs, "labels.json")
    if found is None:
        raise UserError(f"--outputs {outputs} holds no finished run of train.py: name one, python report.py RUN")
    return found


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A finished run and what it says about the rows that judge it."""

    path: Path
    cfg: TrainConfig
    labels: labelling.Labels
    result: dict
    decision: decide.Decision | None
    ids: list[str]
    targets: np.ndarray  # (N,) classes or numbers, (N, C) of 0 and 1
    logits: np.ndarray  # (N, C)
    predicted: np.ndarray  # like the targets, by argmax or probability 0.5; a regression's outputs
    probabilities: np.ndarray  # (N, C), not calibrated
    scores: dict | None = None  # before and after thresholds and calibration,
    decided: np.ndarray | None = None  # predictions by thresholds,
    calibrated: np.ndarray | None = None  # and probabilities, all by fits that the row had no part in
    texts: list[str] | None = None  # None where the data files are gone, or others:
    groups: dict[str, list[str]] = field(default_factory=dict)  # values of the columns that rows are grouped by
    note: str = ""  # then it says so

    @property
    def two(self) -> bool:
        return self.cfg.task == "single_label" and len(self.labels.names) == 2

    @property
    def thresholds(self) -> str:
        """The kind of the run's fitted thresholds, empty where it has none."""
        return self.decision.kind if self.decision and self.decision.kind != "none" else ""

    @property
    def right(self) -> np.ndarray:
        """(N,) bool; of several labels, all of them."""
        same = self.predicted == self.targets
        return same.all(axis=1) if same.ndim == 2 else same

    def take(self, rows: np.ndarray) -> "Run":
        """The same about some of the rows."""
        arrays = {n: v[rows] for n, v in vars(self).items() if isinstance(v, np.ndarray)}
        lists = {n: [v[i] for i in rows] for n, v in vars(self).items() if n in ("ids", "texts") and v}
        return replace(self, **arrays, **lists, groups={})


def read_run(path: Path) -> Run:
    """All that a report needs of a run. Raises UserError for one of cpt.py, and for one that is not finished."""
    if (path / "texts.json").is_file():
        raise UserError(f"run {path} is one of cpt.py, which has no labels: expected a run of train.py, name another")
    cfg, labels = trained.run_facts(path)
    if not checkpoint.finished(path):
        raise UserError(f"run {path} is not finished (no result.json): go on with python train.py --resume {path}")
    ids, targets, logits = trained.validation_rows(path, cfg, labels)
    decision = trained.read_decision(path, cfg.task, len(labels.names))
    result = checkpoint.load_json(path / "result.json")
    run = Run(path, cfg, labels, result, decision, ids, targets, logits, *trained.decided(cfg.task, None, logits))
    if decision:
        fits = decide.cross_fitted(cfg.task, logits, targets, seed=cfg.seed, kind=trained.threshold_kind(cfg))
        run.scores, run.decided, run.calibrated = fits
    return with_texts(run)


def with_texts(run: Run) -> Run:
    """The run with its rows' texts and groups, where the data files still hold the rows that judged it."""
    try:
        rows, val, labels = splits.read(run.cfg, lambda *words: None)
        found = splits.judged(run.cfg, rows, val)
    except (OSError, ValueError) as e:
        return replace(run, note=f"no texts and lengths, the data cannot be read again: {e}")
    if found.ids != run.ids or labels.values != run.labels.values or not np.allclose(found.labels, run.targets):
        return replace(run, note="no texts and lengths, the data files no longer hold the rows that judged this run")
    columns = dict.fromkeys(c for c in (run.cfg.group_column, run.cfg.by_column) if c)
    groups = {column: [row.get(column, "") for row in found.rows] for column in columns}
    return replace(run, texts=splits.texts(run.cfg, found.rows), groups=groups)


def logs(run: Run) -> dict[str, tuple[list[dict], dict]]:
    """(lines of metrics.jsonl, result) of the run, or of each run of a family, by name."""
    found = {}
    for name in configs.members(run.cfg):
        log, result = run.path / name / "metrics.jsonl", run.path / name / "result.json"
        if log.is_file() and result.is_file():
            lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
            found[name] = lines, checkpoint.load_json(result)
    return found


# ---- markup ---------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{css}</style></head><body>
<h1>{title}</h1>{body}
</body></html>
"""
CSS = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #dde2e8; --paper: #fff; --tint: #f4f6f8;
  --link: #0b5ea8 }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe4ea; --soft: #98a3b1; --line: #313943; --paper: #14181d;
  --tint: #1d232a; --link: #7ab8f0 } }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 45rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .4rem 0 } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line) }
p { margin: .5rem 0 } .soft, figcaption, .facts { color: var(--soft); font-size: .88rem } .lead { font-size: 1.08rem }
nav { margin: .8rem 0; font-size: .9rem } nav a { margin-right: .9rem; white-space: nowrap } a { color: var(--link) }
.scroll, .card { overflow-x: auto } .scroll { margin: .6rem 0 } figure { margin: .8rem 0 }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; width: max-content }
th, td { padding: .22rem .8rem .22rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600; color: var(--soft); max-width: 6.5rem; vertical-align: bottom } .n { text-align: right }
td { min-width: 3rem; max-width: min(28rem, 60vw) } td.n { white-space: nowrap }
.card { background: #fff; border: 1px solid var(--line); border-radius: 6px; padding: .5rem }
.wide { position: relative; left: 50%; transform: translateX(-50%) }
img { display: block; width: 100%; height: auto; margin: 0 auto } figcaption { margin-top: .4rem }
article { background: var(--tint); border-radius: 6px; padding: .6rem .8rem; margin: .6rem 0 }
.facts { margin: 0 0 .3rem } .facts span { margin-right: 1rem } .facts b { color: var(--ink) }
.text { white-space: pre-wrap; font-size: .92rem } summary { cursor: pointer; color: var(--link); font-size: .92rem }
article summary { list-style: none } summary .text { color: var(--ink) } details[open] > summary .text { display: none }
"""


class Html(str):
    """Markup. Every other string is text, and is escaped where it enters markup."""


def tag(name: str, /, *inside, **attributes) -> Html:
    """An element; its class is `class_`. Text among `inside` is escaped, and so are attributes."""
    opened = "".join(f' {key.rstrip("_")}="{html.escape(str(value))}"' for key, value in attributes.items())
    body = "".join(part if isinstance(part, Html) else html.escape(str(part)) for part in inside)
    return Html(f"<{name}{opened}>" if name == "img" else f"<{name}{opened}>{body}</{name}>")


def shown(cell) -> str:
    """A cell of a table: four decimals, or a dash for what is not known."""
    if isinstance(cell, int | np.integer):
        return f"{cell:,}"
    if not isinstance(cell, float | np.floating):
        return cell
    if np.isnan(cell):
        return "–"
    return f"{cell:,.1f}" if abs(cell) >= 100 else f"{cell:.4f}" if cell == 0 or abs(cell) >= 5e-5 else f"{cell:.1e}"


def span_of(span: np.ndarray | None, sign: str = "") -> str:
    """An interval as text, empty where there is none."""
    return "" if span is None or np.isnan(span).any() else f"{span[0]:{sign}.4f} to {span[1]:{sign}.4f}"


def table(head: list[str], rows: list[list]) -> Html:
    """A table; columns of numbers stand to the right."""
    sides = [{"class_": "n"} if isinstance(cell, int | float | np.number) else {} for cell in rows[0]]
    top = [tag("th", name, **side) for name, side in zip(head, sides, strict=True)]
    body = [tag("tr", *(tag("td", shown(c), **side) for c, side in zip(row, sides, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", *top)), tag("tbody", *body)), class_="scroll")


def lines(head: list[str], rows: list[list]) -> str:
    """The same table for a terminal."""
    cells = [[str(shown(cell)) for cell in row] for row in [head, *rows]]
    width = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([r[0].ljust(width[0]), *map(str.rjust, r[1:], width[1:])]).rstrip() for r in cells)


def behind(title: str, *inside) -> Html:
    """What is seen after a click."""
    return tag("details", tag("summary", title), *inside)


def prose(text: str) -> Html:
    """A row's text with its white space, the whole of a long one behind a click."""
    whole, start = (tag("div", part, class_="text", dir="auto") for part in (text[:LONGEST], text[: LONG // 2] + " …"))
    of = f"{LONGEST:,} of " * (len(text) > LONGEST)
    return whole if len(text) <= LONG else behind(Html(start + f"{of or 'all '}{len(text):,} characters"), whole)


def card(facts: dict[str, str], text: str | None) -> Html:
    """A row of the data: what is known about it and, where that is known, its text."""
    known = [tag("span", f"{name} ", tag("b", value, dir="auto")) for name, value in facts.items()]
    return tag("article", tag("p", *known, class_="facts"), "" if text is None else prose(text))


class Page:
    """A page in the making: sections, and pictures by the names of their files."""

    def __init__(self, title: str, name: str = "index"):
        self.title, self.name, self.sections, self.pictures = title, name, [], {}

    def section(self, title: str, *parts) -> None:
        """Markup, or sentences."""
        self.sections.append((title, [p if isinstance(p, Html) else tag("p", p, class_="soft") for p in parts if p]))

    def picture(self, name: str, fig, caption: str) -> Html:
        """Keep a figure as NAME.png, of a comparison compare_B_NAME.png, and show it on a white card."""
        name, out = f"{name}.png" if self.name == "index" else f"{self.name}_{name}.png", io.BytesIO()
        with warnings.catch_warnings(record=True) as noted:
            warnings.filterwarnings("always", "Glyph")
            fig.savefig(out, format="png", metadata={"Software": None})
        if noted:
            caption += " Boxes stand for letters that no font on this machine has."
        self.pictures[name], inches = out.getvalue(), fig.get_figwidth()
        source = "data:image/png;base64," + base64.b64encode(self.pictures[name]).decode()
        image = tag(
            "img", src=source, alt=caption, style=f"min-width:{4.7 * inches:.0f}rem;max-width:{6.5 * inches:.0f}rem"
        )
        wide = {"class_": "card wide", "style": f"width:min(92vw,{6.5 * inches + 1:.0f}rem)"}  # than the page's column
        shot = tag("div", image, **(wide if inches > 7 else {"class_": "card"}))
        return tag("figure", shot, tag("figcaption", caption))

    def write(self, folder: Path) -> dict:
        """Write the pictures, then the page that holds them, each of them whole or not at all."""
        (_, top), *rest = self.sections
        links = tag("nav", *(tag("a", title, href=f"#s{i}") for i, (title, _) in enumerate(rest)))
        blocks = [tag("section", tag("h2", title, id=f"s{i}"), *parts) for i, (title, parts) in enumerate(rest)]
        page = PAGE.format(title=html.escape(self.title), css=CSS, body="\n".join([links, *top, *blocks]))
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in {**self.pictures, f"{self.name}.html": page}.items():
            checkpoint.write_atomic(folder / name, content)
        return {"page": str(folder / f"{self.name}.html"), "pictures": list(self.pictures)}


# ---- pictures -------------------------------------------------------------------------------------------------------

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5d6878", "#a8960c")  # Okabe, Ito 2008
BLUE, ORANGE, GREY, INK = PALETTE[0], PALETTE[1], "#8a94a0", "#1c2430"
FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei",
         "Hiragino Sans", "Malgun Gothic", "Arial Unicode MS", "Noto Emoji")  # fmt: skip
STYLE = {
    "font.size": 9, "axes.labelsize": 9, "legend.fontsize": 8.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.grid": True, "grid.color": "#e8ebee", "grid.linewidth": 0.7,
    "axes.axisbelow": True, "lines.linewidth": 1.6, "legend.frameon": False, "savefig.dpi": 200, "figure.dpi": 200,
    "text.parse_math": False, "figure.constrained_layout.use": True,
}  # fmt: skip


def drawing() -> contextlib.AbstractContextManager:
    """This file's style for all that is drawn inside, with a machine's fonts for other scripts."""
    import matplotlib
    from matplotlib import font_manager

    here = set(font_manager.get_font_names())
    return matplotlib.rc_context({**STYLE, "font.family": ["DejaVu Sans", *(f for f in FONTS if f in here)]})


def figure(height: float, rows: int = 1, columns: int = 1, width: float = 6.4, **options):
    """(figure, axes...): a figure in inches, and its panels in reading order."""
    from matplotlib.figure import Figure

    fig = Figure((width, height))
    return fig, *fig.subplots(rows, columns, squeeze=False, **options).flat


def short(name: str, most: int = 26) -> str:
    """A name as it fits a picture."""
    name = " ".join(str(name).split())
    return name if len(name) <= most else name[: most - 1] + "…"


def curves(found: dict[str, tuple[list[dict], dict]], metric: str):
    """Loss, metric and learning rate by step, a colour for each run."""
    fig, top, middle, bottom = figure(5.2, 3, sharex=True, height_ratios=[3, 2.2, 1.2])
    for i, (name, (log, result)) in enumerate(found.items()):
        look = {"color": PALETTE[i % len(PALETTE)], "linewidth": 1.2}
        steps = [line for line in log if line.get("loss") is not None]
        evals = {line["step"]: line["eval"][metric] for line in log if metric in line.get("eval", {})}
        at, loss = [line["step"] for line in steps], [line["loss"] for line in steps]
        top.plot(at, loss, alpha=0.25 if len(found) == 1 else 0.12, **{**look, "linewidth": 0.8})
        top.plot(at, smoothed(loss), label=name, **look)
        middle.plot(list(evals), list(evals.values()), "o-", markersize=3, **look)
        kept = [step for step in evals if step == result.get("best_step")]
        middle.plot(kept, [evals[step] for step in kept], "o", markersize=7, mfc="none", **look)
        bottom.plot(at, [line["lr"] for line in steps], **look)
    for ax, label in ((top, "training loss"), (middle, f"validation {metric}"), (bottom, "learning rate")):
        ax.set_ylabel(label)
    bottom.set(xlabel="optimizer step", ylim=(0, None))
    if 1 < len(found) <= 12:
        fig.legend(loc="outside lower center", ncols=4)
    return fig


def smoothed(values: list[float]) -> np.ndarray:
    """The mean over about a twentieth of the values to either side of each, the near ones weighing more."""
    kernel = np.hanning(len(values) // 20 * 2 + 3)[1:-1]
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def confusion(counts: np.ndarray, names: list[str], totals: np.ndarray):
    """Counts of rows, true by predicted class, coloured by their share of the true class's rows, totals (C,)."""
    share, n = counts / np.maximum(totals, 1)[:, None], len(names)
    side, size = (max(2.2, 0.4 * n), 8.5) if n <= 15 else (0.27 * n, 6.5)
    fig, ax = figure(side + 1.2, width=side + 2)
    bar = fig.colorbar(ax.imshow(share, cmap="Blues", vmin=0, vmax=1), fraction=0.04, pad=0.02, format=percent)
    bar.set_label("share of the true class")
    for i, j in np.argwhere(counts > 0):
        look = {"fontsize": size - 1.5 * (counts[i, j] > 999), "color": "white" if share[i, j] > 0.55 else INK}
        ax.text(j, i, str(counts[i, j]), ha="center", va="center", **look)
    tilt = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if max(map(len, names)) > 3 else {}
    ax.set_xticks(range(n), names, **tilt)
    ax.set_yticks(range(n), names)
    ax.set(xlabel="predicted", ylabel="true")
    ax.grid(False)
    for part in (ax, bar.ax):
        part.tick_params(length=0)
        part.spines[:].set_visible(False)
    return fig


def percent(value: float, _) -> str:
    return f"{value:.0%}"


def bars(names: list[str], values: np.ndarray, spans: np.ndarray | None, label: str, colours=BLUE, dots=None):
    """Horizontal bars from top to bottom with intervals (2, N), and perhaps a second value of each as a dot."""
    fig, ax = figure(0.8 + 0.2 * len(names) + 0.25 * (dots is not None))
    at = np.arange(len(names))
    ax.barh(at, values, color=colours, height=0.66, alpha=0.85, label="at probability 0.5")
    if spans is not None:
        ax.hlines(at, *np.nan_to_num(spans), color=INK, linewidth=1)
    if dots is not None:
        ax.plot(dots, at, "D", color=ORANGE, markersize=3.2, clip_on=False, label="with thresholds")
        fig.legend(loc="outside upper center", ncols=2, reverse=True)
    ax.set_yticks(at, names)
    ax.set(xlabel=label, ylim=(len(names) - 0.4, -0.6))
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
    return fig


def reliability(series: dict[str, tuple[np.ndarray, np.ndarray]], x: str, y: str, of: str):
    """Shares of outcomes by probability in 15 bins with Wilson's intervals, and how many values a bin holds."""
    fig, top, bottom = figure(5.2, 2, sharex=True, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1)
    for (name, (p, outcome)), colour in zip(series.items(), PALETTE, strict=False):
        at = np.clip(np.ceil(p * 15).astype(int) - 1, 0, 14)
        count, total, hits = (np.bincount(at, weights=v, minlength=15) for v in (np.ones(len(p)), p, outcome))
        some = count > 0
        mean, share = total[some] / count[some], hits[some] / count[some]
        top.vlines(mean, *bootstrap.wilson(hits[some], count[some]), color=colour, alpha=0.35, linewidth=1)
        top.plot(mean, share, "o-", color=colour, markersize=3.5, label=name)
        bottom.stairs(count, np.linspace(0, 1, 16), color=colour, linewidth=1.4)
    fig.legend(loc="outside upper center", ncols=2)
    top.set(ylabel=y, ylim=(-0.02, 1.02), xlim=(-0.01, 1.01))
    bottom.set(xlabel=x, ylabel=of)
    counted(bottom, count.max() > 50 * max(1, np.median(count)))
    return fig


def counted(ax, logarithmic: bool) -> None:
    """A y axis of counts."""
    ax.set(yscale="log") if logarithmic else ax.set(ylim=(0, None))
    ax.minorticks_off()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def thresholds(grid: np.ndarray, series: dict[str, np.ndarray], fitted: float | None, label: str):
    """Scores by threshold, with 0.5 and the fitted one marked."""
    fig, ax = figure(3.4)
    for (name, values), colour in zip(series.items(), PALETTE, strict=False):
        ax.plot(grid, values, color=colour, label=name)
    ax.axvline(0.5, color=GREY, linestyle="--", linewidth=1, label="0.5")
    if fitted is not None:
        ax.axvline(fitted, color=INK, linestyle=":", linewidth=1.4, label=f"fitted: {fitted:.3f}")
    ax.set(xlabel=label, ylabel="score", xlim=(0, 1), ylim=(0, 1.02))
    fig.legend(loc="outside upper center", ncols=5)
    return fig


def coverage(sure: np.ndarray, right: np.ndarray):
    """Accuracy of the surest rows by their share, from 20 rows on, with Wilson's intervals."""
    fig, ax = figure(3.2)
    rows, kept = np.arange(1, len(sure) + 1), slice(min(20, len(sure)) - 1, None)
    hits = right[np.argsort(-sure, kind="stable")].cumsum()
    ax.fill_between(rows[kept] / len(rows), *bootstrap.wilson(hits, rows)[:, kept], color=BLUE, alpha=0.15, linewidth=0)
    ax.plot(rows[kept] / len(rows), (hits / rows)[kept], color=BLUE)
    ax.set(xlabel="share of rows answered, the surest first", ylabel="their accuracy", xlim=(0, 1.005))
    return fig


def histograms(values: np.ndarray, on: np.ndarray, names: tuple[str, str], label: str, of: str):
    """Histograms of the values that are on and of the others, counts logarithmic where one dwarfs the other."""
    fig, ax = figure(3.2)
    within = (0, 1) if values.min() >= 0 and values.max() <= 1 else None
    edges = np.histogram_bin_edges(values, 40, within)
    counts = [np.histogram(values[mask], edges)[0] for mask in (on, ~on)]
    for count, name, colour in zip(counts, names, PALETTE, strict=False):
        ax.stairs(count, edges, fill=True, color=colour, alpha=0.4)
        ax.stairs(count, edges, color=colour, linewidth=1.2, label=f"{name} ({count.sum():,})")
    counted(ax, max(c.max() for c in counts) > 30 * max(1, min(c.max() for c in counts)))
    ax.set(xlabel=label, ylabel=of, xlim=(edges[0], edges[-1]))
    fig.legend(loc="outside upper center", ncols=2)
    return fig


def residuals(outputs: np.ndarray, targets: np.ndarray):
    """Predicted against true numbers, and what they are off by."""
    fig, left, right = figure(3.2, 1, 2)
    both, few = np.concatenate([outputs, targets]), np.unique(targets)
    wide = 0.3 * np.diff(few).min() if 1 < len(few) <= 20 else 0.0  # few values: their points are spread
    at = targets + np.random.default_rng(0).uniform(-wide, wide, len(targets))
    left.plot([both.min(), both.max()], [both.min(), both.max()], "--", color=GREY, linewidth=1)
    left.scatter(at, outputs, s=9, color=BLUE, alpha=min(0.6, max(0.1, 400 / len(at))), linewidths=0)
    left.set(xlabel="true" + " (spread out)" * bool(wide), ylabel="predicted")
    right.hist(outputs - targets, bins=40, color=BLUE, alpha=0.8)
    right.axvline(0, color=GREY, linestyle="--", linewidth=1)
    right.set(xlabel="predicted - true", ylabel="rows")
    return fig


def points(names: list[str], values: list[float], spans: np.ndarray, overall: float, x: str, y: str):
    """Values with intervals (2, N), and a line at the overall one."""
    fig, ax = figure(3.2)
    at = np.arange(len(names))
    ax.axhline(overall, color=GREY, linestyle="--", linewidth=1)
    ax.vlines(at, *spans, color=BLUE, alpha=0.5, linewidth=1.4)
    ax.plot(at, values, "o", color=BLUE, markersize=5)
    ax.set_xticks(at, names, rotation=30, ha="right", rotation_mode="anchor")
    ax.set(xlabel=x, ylabel=y, ylim=(0, None))
    ax.grid(False, axis="x")
    return fig


# ---- the page of a run ----------------------------------------------------------------------------------------------

BASELINES = {
    "single_label": "the share of the largest class",
    "multi_label": "the micro-F1 of the commonest label on every row",
    "regression": "the mse of the mean",
}


def report(run: Run, cfg: ReportConfig) -> tuple[Page, dict]:
    """The page of one run, and its metrics with their intervals."""
    page, task = Page(f"{configs.dataset_name(run.cfg)}: {run.cfg.base}"), run.cfg.task
    scores = metrics.of_task(task, run.logits, run.targets)
    score = metrics.scorer(task, run.logits, run.targets, run.predicted, worth_ranking(run))
    spans = {
        n: bootstrap.interval(v) for n, v in bootstrap.bootstrap(score, len(run.ids), cfg.samples, cfg.seed).items()
    }
    of_classes, spans = spans.get("f1"), {n: v for n, v in spans.items() if n in scores and not np.isnan(v).any()}
    overview(page, run, scores, spans)
    training(page, run)
    if task == "single_label":
        confusions(page, run)
    if task != "regression":
        classes(page, run, of_classes)
        calibration(page, run)
        cuts(page, run)
    distributions(page, run)
    lengths(page, run)
    errors(page, run, cfg.worst)
    return page, {"run": str(run.path), "metrics": scores, "intervals": {n: v.tolist() for n, v in spans.items()}}


def worth_ranking(run: Run) -> bool:
    """Whether AUC and average precision are resampled: of many columns it takes a while."""
    return run.logits.shape[1] <= 10 or run.cfg.metric in metrics.RANKING


def overview(page: Page, run: Run, scores: dict, spans: dict) -> None:
    """What the run is and what it reaches."""
    cfg, result, metric, folded = run.cfg, run.result, run.cfg.metric, bool(run.cfg.folds) and run.cfg.fold == "all"
    after = {}
    if run.thresholds:
        own = metrics.scorer(cfg.task, run.logits, run.targets, run.decided, ranking=False)(np.ones((1, len(run.ids))))
        after = {name: values[0] for name, values in own.items()} | run.scores["after"]
    lead = f"{metric} {shown(scores.get(metric, np.nan))}" + f" (95% {span_of(spans.get(metric))})" * (metric in spans)
    lead += f", with fitted thresholds {shown(after[metric])}," if metric in after else ""
    lead += f" on {len(run.ids):,} rows. Knowing nothing reaches {metrics.majority(cfg.task, run.targets):.4f}: "
    facts = {
        "run": run.path,
        "base": cfg.base,
        "data": cfg.val_data or cfg.train_data,
        "finished": time.strftime("%Y-%m-%d %H:%M", time.localtime((run.path / "result.json").stat().st_mtime)),
        "task": cfg.task + f", {len(run.labels.names)} labels" * (cfg.task != "regression"),
        "rows": f"{len(run.ids):,}" + f", each by models of the other {cfg.folds - 1} folds" * folded,
        "training": f"{result.get('steps', 0):,} steps, {result.get('train_seconds', 0):,.0f} seconds",
    }
    extra = {"with thresholds": after, "mean of runs": result.get("mean"), "std": result.get("std")}
    extra = {name: found for name, found in extra.items() if found}
    names, rows = [name for name in scores if name != "rows"], []
    for name in names:
        rows.append([name, scores[name], span_of(spans.get(name)), *(v.get(name, np.nan) for v in extra.values())])
    parts = [tag("p", lead, BASELINES[cfg.task], ".", class_="lead"), run.note]
    parts += [table(["", ""], [*facts.items()]), table(["metric", "value", "95% interval", *extra], rows)]
    if run.thresholds:
        parts.append("Predictions are by argmax or probability 0.5. With thresholds: fitted as the run's are, but on "
                     "the other four fifths of the rows, so that no row decides for itself.")  # fmt: skip
    if found := result.get("runs"):
        rows = [[name, *(one.get(n, np.nan) for n in names[:6])] for name, one in found.items()]
        parts += [tag("h3", f"{len(found)} runs"), table(["run", *names[:6]], rows)]
    page.section("", *parts, *settings(cfg), *audited(run.path))


def settings(cfg: TrainConfig) -> list[Html]:
    """The settings that are not the default, and all of them behind a click."""
    own, plain = (dataclasses.asdict(one) for one in (cfg, TrainConfig()))
    said = {n: ", ".join(v) if isinstance(v, tuple) else str(v) for n, v in own.items() if v != plain[n]}
    rows = [[name, value] for name, value in said.items() if name not in ("base", "outputs")]
    parts = [tag("h3", "Settings that are not the default"), table(["field", "value"], rows)] if rows else []
    return [*parts, behind("all settings", tag("div", cli.to_json(cfg), class_="text"))]


def audited(path: Path) -> list[Html]:
    """How much the audit of the data found."""
    if not (path / "audit.json").is_file():
        return []
    flat = {}
    for name, found in checkpoint.load_json(path / "audit.json").items():
        more = found.items() if isinstance(found, dict) else [("", found)]
        flat |= {f"{name} {key}".strip(): groups for key, groups in more}
    rows = [[name, len(groups), sum(map(len, groups))] for name, groups in flat.items() if groups]
    none = tag("p", "No duplicates, conflicts or leaks.")
    return [tag("h3", "Audit of the data"), table(["finding", "groups", "rows"], rows) if rows else none]


def training(page: Page, run: Run) -> None:
    """Curves over steps."""
    found = {name: one for name, one in logs(run).items() if any(line.get("loss") is not None for line in one[0])}
    if found:
        said = "Training loss (faint: as it was, strong: smoothed), validation metric and learning rate. A ring marks "
        said += "the evaluation whose model was kept."
        page.section("Training", page.picture("loss", curves(found, run.cfg.metric), said))


def confusions(page: Page, run: Run) -> None:
    """The confusion matrix, of many classes that of the commonest."""
    counts = metrics.confusion_matrix(run.targets, run.predicted, len(run.labels.names))
    totals = counts.sum(axis=1)
    some = np.sort(np.argsort(-totals, kind="stable")[:MOST_CLASSES])
    names = [short(run.labels.names[k], 22) for k in some]
    said = "Counts of rows; the colour is their share of the true class."
    said += f" The {MOST_CLASSES} commonest of {len(counts)} classes." * (len(counts) > MOST_CLASSES)
    fig = confusion(counts[np.ix_(some, some)], names, totals[some])
    page.section("Confusion matrix", page.picture("confusion", fig, said))


def class_bars(page: Page, run: Run, values: np.ndarray, spans, label: str, said: str, columns: dict, **look) -> tuple:
    """A picture of values (C,) with intervals (2, C), or None, and a table of columns, the commonest class first."""
    support, names = metrics.one_hot(run.targets, len(run.labels.names)).sum(axis=0).astype(int), run.labels.names
    order = np.argsort(-support, kind="stable")
    some, many = order[:MOST_BARS], len(order) > MOST_BARS
    look = {key: value[some] for key, value in look.items() if value is not None}
    ticks = [f"{short(names[k], 34)} ({support[k]:,})" for k in some]
    fig = bars(ticks, values[some], None if spans is None else spans[:, some], label, **look)
    said += f" The {MOST_BARS} commonest of {len(order)}; the table has all." * many
    rows = [[names[k], support[k], *(column[k] for column in columns.values())] for k in order]
    whole = table(["class", "rows", *columns], rows)
    return page.picture("f1", fig, said), behind(f"all {len(order)} classes", whole) if many else whole


def classes(page: Page, run: Run, spans: np.ndarray | None) -> None:
    """Precision, recall and F1 of every class."""
    three, plain, fitted = ("precision", "recall", "F1"), class_scores(run, run.predicted), None
    columns = dict(zip(three, plain, strict=True))
    if spans is not None:
        columns["95% interval"] = [span_of(span) for span in spans.T]
    if run.thresholds:
        fitted = class_scores(run, run.decided)
        columns |= {f"{name}, thresholds": values for name, values in zip(three, fitted, strict=True)}
    if run.cfg.task == "multi_label":
        pairs = zip(run.logits.T, run.targets.T, strict=True)
        columns["average precision"] = [metrics.average_precision(z, y) if y.any() else np.nan for z, y in pairs]
    said = "F1 by class, the commonest first, with its rows in brackets; lines: 95% intervals."
    dots = None if fitted is None else fitted[2]
    page.section("Classes", *class_bars(page, run, plain[2], spans, "F1", said, columns, dots=dots))


def class_scores(run: Run, predicted: np.ndarray) -> np.ndarray:
    """(3, C) precision, recall and F1 of each class."""
    true, chosen = (metrics.one_hot(values, len(run.labels.names)) for values in (run.targets, predicted))
    return np.stack(metrics.of_counts((true * chosen).sum(axis=0), chosen.sum(axis=0), true.sum(axis=0)))


def calibration(page: Page, run: Run) -> None:
    """Whether probabilities are what they say, as they are and calibrated on other rows."""
    multi, series = run.cfg.task == "multi_label", {}
    for name, p in (("as trained", run.probabilities), ("calibrated", run.calibrated)):
        if p is not None:
            pair = (p.ravel(), run.targets.ravel()) if multi else (p.max(axis=1), p.argmax(axis=1) == run.targets)
            series[f"{name} (ECE {metrics.ece(*pair):.4f})"] = pair
    words = "probability of a label", "share that has it", "cells (rows x labels)"
    words = words if multi else ("probability of the predicted class", "share that is right", "rows")
    said = "On the dashed line a probability is what it says. 15 bins; lines: 95% intervals (Wilson 1927); below: the "
    said += "size of each bin. Calibrated: each row by a fit on the other four fifths of the rows."
    parts = [page.picture("reliability", reliability(series, *words), said)]
    if run.scores:
        before, after = run.scores["before"], run.scores["after"]
        head = ["metric", "as trained", "calibrated" + ", with thresholds" * bool(run.thresholds)]
        parts.append(table(head, [[name, before[name], after[name]] for name in before]))
    page.section("Calibration", *parts)


def cuts(page: Page, run: Run) -> None:
    """What other thresholds would give; of more than two classes, what leaving out the least sure rows would."""
    multi, p, y = run.cfg.task == "multi_label", run.probabilities, run.targets
    if not multi and not run.two:
        sure = p.max(axis=1)
        half = run.right[np.argsort(-sure, kind="stable")[: (len(sure) + 1) // 2]].mean()
        said = f"The surer half of the rows has accuracy {half:.4f}, all have {run.right.mean():.4f}. "
        said += "Band: 95% intervals (Wilson 1927)."
        return page.section("Coverage", page.picture("coverage", coverage(sure, run.right), said))
    p, y = (p, y) if multi else (p[:, 1:], y[:, None])
    grid, support = np.linspace(0.005, 0.995, 199), y.sum(axis=0)
    hits, chosen = counts_above(p, y, grid)
    if multi:
        micro = 2 * hits.sum(axis=1) / np.maximum((chosen + support).sum(axis=1), 1)
        series = {"micro-F1": micro, "macro-F1": (2 * hits / np.maximum(chosen + support, 1)).mean(axis=1)}
        label = "one threshold for all labels, on the probability"
    else:
        hits, chosen, label = hits[:, 0], chosen[:, 0], f"threshold on the probability of {short(run.labels.names[1])}"
        series = {"precision": np.where(chosen > 0, hits / np.maximum(chosen, 1), np.nan)}
        series |= {"recall": hits / max(1, support[0]), "F1": 2 * hits / np.maximum(chosen + support, 1)}
    fitted = np.exp(-np.logaddexp(0, -run.decision.thresholds[0])) if run.thresholds == "global" else None
    said = "Scores on these rows by threshold." + " The fitted one comes from these same rows." * (fitted is not None)
    said += " The run's own thresholds, one a label, have no place here." * (run.thresholds == "per_class")
    page.section("Thresholds", page.picture("thresholds", thresholds(grid, series, fitted, label), said))


def counts_above(p: np.ndarray, y: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(true positives, predicted) (T, C) of probabilities (N, C) above each threshold of an increasing grid (T,)."""
    size = len(grid) + 1
    cell = np.searchsorted(grid, p) + size * np.arange(p.shape[1])  # thresholds below p, in each label's block

    def above(weights: np.ndarray) -> np.ndarray:
        counts = np.bincount(cell.ravel(), weights.ravel(), minlength=size * p.shape[1]).reshape(-1, size)
        return counts[:, ::-1].cumsum(axis=1)[:, -2::-1].T

    return above(y), above(np.ones_like(p))


def distributions(page: Page, run: Run) -> None:
    """How well the scores part what they should."""
    y, p, z, of = run.targets, run.probabilities, run.logits[:, 0], "rows"
    if run.cfg.task == "regression" and not np.isin(y, (0, 1)).all():
        fig, said = residuals(z, y), "Predicted against true numbers, and what they are off by."
        return page.section("Outputs", page.picture("scores", fig, said))
    if run.cfg.task == "regression":
        values, on, names, label = z, y == 1, ("label 1", "label 0"), "output"
    elif run.cfg.task == "multi_label":
        names, label, of = ("has the label", "has it not"), "probability of a label", "cells (rows x labels)"
        values, on = p.ravel(), y.ravel() == 1
    elif run.two:
        zero, one = map(short, run.labels.names)
        values, on, names, label = p[:, 1], y == 1, (one, zero), f"probability of {one}"
    else:
        values, on, names, label = p.max(axis=1), run.right, ("right", "wrong"), "probability of the predicted class"
    said = f"{of.capitalize()} by {label}: {names[0]} and {names[1]}."
    page.section("Scores", page.picture("scores", histograms(values, on, names, label, of), said))


def misses(run: Run) -> tuple[np.ndarray, str]:
    """(N,) how wrong each row is, and what the mean of that is."""
    if run.cfg.task == "regression":
        return np.abs(run.logits[:, 0] - run.targets), "mean absolute error"
    return 1.0 - run.right, "share of rows with a wrong label" if run.targets.ndim == 2 else "share of wrong rows"


def mean_span(values: np.ndarray, share: bool) -> np.ndarray:
    """(2,) the 95% interval of a mean: Wilson's of a share, else 1.96 standard errors to both sides."""
    if share:
        return bootstrap.wilson(values.sum(), np.float64(len(values)))
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return values.mean() + np.array([-half, half])


def lengths(page: Page, run: Run) -> None:
    """Errors by length, and by group."""
    (error, name), share, parts = misses(run), run.cfg.task != "regression", []
    if run.texts:
        size = np.array([len(text) for text in run.texts])
        edges = np.unique(np.quantile(size, np.linspace(0, 1, 11), method="nearest"))
        tenths = np.searchsorted(edges[1:-1], size, side="right")
        masks = [tenths == k for k in np.unique(tenths)]
        ranges = [f"{size[m].min():,}–{size[m].max():,}" for m in masks]
        means, spans = [error[m].mean() for m in masks], np.array([mean_span(error[m], share) for m in masks]).T
        how = "Wilson 1927" if share else "1.96 standard errors"
        said = f"Tenths of the rows by length; lines: 95% intervals ({how}); dashed: all rows."
        fig = points(ranges, means, spans, error.mean(), "characters of the text", name)
        parts.append(page.picture("length", fig, said))
    for column, groups in run.groups.items():
        known, at, count = np.unique(groups, return_inverse=True, return_counts=True)
        masks = [at == g for g in np.argsort(-count, kind="stable")[:MOST_GROUPS]]
        values, name = (1 - error, "accuracy") if share else (error, name)
        spans = [span_of(mean_span(values[m], share)) for m in masks]
        rows = [[groups[m.argmax()], m.sum(), values[m].mean(), span] for m, span in zip(masks, spans, strict=True)]
        most = f", the {MOST_GROUPS} largest of {len(known):,}" * (len(known) > MOST_GROUPS)
        parts += [tag("h3", f"By {column}{most}"), table([column, "rows", name, "95% interval"], rows)]
    if parts:
        page.section("Lengths" + " and groups" * bool(run.groups), *parts)


def facts_of(run: Run, i: int) -> dict[str, str]:
    """What is true of a row, and what the run says."""
    p, names = run.probabilities[i], run.labels.names
    if run.cfg.task == "regression":
        true, said = float(run.targets[i]), float(run.predicted[i])
        return {"true": f"{true:.4g}", "predicted": f"{said:.4g}", "off by": f"{said - true:+.4g}"}
    if run.cfg.task == "single_label":
        return {k: f"{names[c]} ({p[c]:.3f})" for k, c in (("true", run.targets[i]), ("predicted", run.predicted[i]))}
    true, said = run.targets[i] > 0, run.predicted[i] > 0
    listed = {"true": true & said, "missed": true & ~said, "wrongly": ~true & said}
    facts = {key: ", ".join(f"{names[c]} ({p[c]:.3f})" for c in np.flatnonzero(on)) for key, on in listed.items()}
    facts["true"] = ", ".join(names[c] for c in np.flatnonzero(true)) or "none"
    return {key: value for key, value in facts.items() if value}


def confidence(run: Run) -> np.ndarray:
    """(N,) the probability of what a run says, of several labels the distance of the worst mistake from 0.5, of numbers
    the error: by what its mistakes are sorted.
    """
    if run.cfg.task == "regression":
        return misses(run)[0]
    if run.cfg.task == "multi_label":
        return (np.abs(run.probabilities - 0.5) * (run.predicted != run.targets)).max(axis=1)
    return run.probabilities.max(axis=1)


def errors(page: Page, run: Run, most: int) -> None:
    """The most confident errors, of two classes by kind."""
    order, name = np.argsort(-confidence(run), kind="stable"), "wrong rows"
    order, name = (order, "rows") if run.cfg.task == "regression" else (order[~run.right[order]], name)
    kinds = {name.capitalize(): order}
    if run.two:
        zero, one = run.labels.names
        kinds = {f"False positives: said {one}, in truth {zero}": order[run.targets[order] == 0]}
        kinds[f"False negatives: said {zero}, in truth {one}"] = order[run.targets[order] == 1]
    parts = []
    for title, rows in kinds.items():
        parts += [title_of(title, rows, most), *(row_card(run, i, facts_of(run, i)) for i in rows[:most])]
    page.section("Errors", "The surest mistakes first." if name != "rows" else "The largest errors first.", *parts)


def title_of(title: str, rows: np.ndarray, most: int) -> Html:
    return tag("h3", f"{title} ({len(rows):,}" + f", {most} of them here" * (len(rows) > most) + ")")


def row_card(run: Run, i: int, facts: dict[str, str]) -> Html:
    return card({"id": run.ids[i], **facts}, run.texts[i] if run.texts else None)


# ---- the comparison of two ------------------------------------------------------------------------------------------


def comparison(a: Run, b: Run, cfg: ReportConfig) -> tuple[Page, dict]:
    """The page of A against B on the rows that both judged; most of it is printed too."""
    names = name_beside(b.path, a.path), name_beside(a.path, b.path)
    page = Page(" against ".join(names), f"compare_{names[1]}")
    a, b, note = shared(a, b)
    found = versus(a, b, (a.predicted, b.predicted), cfg, worth_ranking(a))
    of_classes = found.pop("f1", None)
    if a.thresholds or b.thresholds:
        own = versus(a, b, [run.decided if run.thresholds else run.predicted for run in (a, b)], cfg, False)
        found |= {f"{n}, thresholds": own[n] for n in ("micro_f1", "macro_f1", "weighted_f1")}
    metric = a.cfg.metric if a.cfg.metric in found else next(iter(found))
    says = verdict(metric, *found[metric][2:5])
    head, cells = ["metric", "A", "B", "B - A", "95% interval", "p"], []
    for name, values in found.items():
        cells.append([name, *values[:3], span_of(values[3:5], "+"), values[5]])
    facts = [["A", str(a.path)], ["B", str(b.path)], ["rows", f"{len(a.ids):,}{note}"]]
    print(f"A: {a.path}\nB: {b.path}\n{len(a.ids):,} rows{note}\n{lines(head, cells)}")
    more = "The interval is over rows: another seed of either run would give another model."
    page.section("", tag("p", says, class_="lead"), more, table(["", ""], facts))
    said = f"{cfg.samples:,} bootstrap resamples, the same rows for both runs. p: twice the smaller share of resamples "
    said += "in which the difference is at most, or at least, zero (one added to both counts), at most 1."
    if a.thresholds or b.thresholds:
        said += " Thresholds: each row by a fit on the other four fifths of the rows."
    page.section("Metrics", table(head, cells), said)
    tests = agreement(page, a, b)
    if of_classes:
        class_differences(page, a, *of_classes)
    changes(page, a, b, cfg.worst)
    print(says)
    keys = ("a", "b", "difference", "low", "high", "p")
    plain = {n: {k: None if np.isnan(v) else float(v) for k, v in zip(keys, found[n], strict=True)} for n in found}
    runs = {"runs": [str(a.path), str(b.path)], "rows": len(a.ids)}
    return page, {**runs, "metrics": plain, "mcnemar": tests, "verdict": says}


def name_beside(a: Path, b: Path) -> str:
    """What tells B from A: the parts of its path behind those that both begin with."""
    a, b = a.resolve(), b.resolve()
    return "_".join(b.parts[len(os.path.commonprefix([a.parts, b.parts])) :]) or b.name


def shared(a: Run, b: Run) -> tuple[Run, Run, str]:
    """Both runs on the rows that both judged, and a note where that is not all. Raises UserError for other rows."""
    pair, same = f"{a.path} and {b.path}", "compare runs judged by the same rows"
    if (a.cfg.task, a.labels.values) != (b.cfg.task, b.labels.values):
        kinds = [f"{run.cfg.task} of {len(run.labels.names)} labels" for run in (a, b)]
        raise UserError(f"{pair}: {' and '.join(kinds)}, expected one task and the same labels in one order; {same}")
    place, note = {name: i for i, name in enumerate(b.ids)}, ""
    if len(place) == len(b.ids) and len(set(a.ids)) == len(a.ids):
        mine = np.array([i for i, name in enumerate(a.ids) if name in place], dtype=int)
        if len(mine) < 2:
            raise UserError(f"{pair} share {len(mine)} row ids, expected 2 or more; {same}")
        if len(mine) < max(len(a.ids), len(b.ids)):
            note = f" that both judged, of {len(a.ids):,} of A and {len(b.ids):,} of B"
            print(f"warning: only the {len(mine):,} rows{note} are compared")
        a, b = a.take(mine), b.take(np.array([place[a.ids[i]] for i in mine]))
    elif a.ids != b.ids:
        raise UserError(f"{pair}: ids stand there twice and in another order; {same}")
    if not np.allclose(a.targets, b.targets):
        raise UserError(f"{pair}: rows with the same id have different labels; {same}")
    return a, b, note


def versus(a: Run, b: Run, chosen: tuple, cfg: ReportConfig, ranking: bool) -> dict[str, tuple]:
    """(A, B, B - A, low, high, p) by metric over paired resamples; of f1 arrays (C,) without p."""
    found, rows = {}, len(a.ids)
    scores = [
        metrics.scorer(r.cfg.task, r.logits, r.targets, said, ranking) for r, said in zip((a, b), chosen, strict=True)
    ]
    whole = [score(np.ones((1, rows))) for score in scores]
    draws = [bootstrap.bootstrap(score, rows, cfg.samples, cfg.seed) for score in scores]
    for name in whole[0]:
        x, y = (one[name][0] for one in whole)
        apart = draws[1][name] - draws[0][name] if draws[0] else np.full((1, *x.shape), np.nan)
        if not np.isnan(x + y).any():
            found[name] = (
                x,
                y,
                y - x,
                *bootstrap.interval(apart),
                *([] if x.ndim else [bootstrap.p_value(apart) if draws[0] else np.nan]),
            )
    return found


def verdict(metric: str, difference: float, low: float, high: float) -> str:
    """One sentence: which run is better, where the interval leaves zero out."""
    name = metric.replace("_f1", "-F1").replace("_", " ")
    if math.isnan(low):
        return f"B - A is {difference:+.4f} {name}, without an interval."
    if low <= 0 <= high:
        span = f"B - A is {difference:+.4f} {name} (95% {low:+.4f} to {high:+.4f})"
        return f"No difference that these rows can show: {span}."
    better, (low, high) = "B" if (difference > 0) != (metric in metrics.LOWER) else "A", sorted((abs(low), abs(high)))
    return f"{better} is better by {abs(difference):.4f} {name} (95% {low:.4f} to {high:.4f})."


def agreement(page: Page, a: Run, b: Run) -> dict:
    """How often both are right, one, or none, and McNemar's test of the two."""
    if a.cfg.task == "regression":
        return {}
    kinds, multi, rows, found = {"rows": (a.right, b.right)}, a.cfg.task == "multi_label", [], {}
    if multi:
        kinds["cells"] = tuple((run.predicted == run.targets).ravel() for run in (a, b))
    for name, (x, y) in kinds.items():
        counts = [int(n.sum()) for n in (x & y, x & ~y, ~x & y, ~x & ~y)]
        p, test = bootstrap.mcnemar(*counts[1:3])
        rows.append([name, *counts, p, test])
        found[name] = {"only_a": counts[1], "only_b": counts[2], "p": p, "test": test}
    head = ["", "both right", "only A", "only B", "both wrong", "McNemar's p", "test"]
    said = "McNemar 1947 on what only one of them has right: exact below 25, else with continuity correction."
    said += " Cells of a row (right where all its labels are) are not independent: their p is too small." * multi
    page.section("Right and wrong", table(head, rows), said)
    print(lines(head, rows))
    return found


def class_differences(page: Page, a: Run, x, y, difference, low, high) -> None:
    """Differences of F1 by class."""
    spans = np.stack([low, high])
    colours = np.select([low > 0, high < 0], [BLUE, ORANGE], "#b8c0c9")
    columns = {"A": x, "B": y, "B - A": difference, "95% interval": [span_of(span, "+") for span in spans.T]}
    said = "F1 of B less that of A, the commonest class first, with its rows in brackets; lines: paired 95% intervals. "
    said += "Blue: B is better, orange: A is, grey: zero is within; of twenty equal classes one is coloured by chance."
    parts = class_bars(page, a, difference, spans, "F1 of B - F1 of A", said, columns, colours=colours)
    page.section("Classes", *parts)


def changes(page: Page, a: Run, b: Run, most: int) -> None:
    """The rows that only one of the two has right, of numbers those that one is closer to."""
    if a.cfg.task == "regression":
        gain = misses(a)[0] - misses(b)[0]
        kinds = {"A is closer": (-gain, gain < 0), "B is closer": (gain, gain > 0)}
    else:
        kinds = {"Only A is right": (confidence(b), a.right & ~b.right)}
        kinds["Only B is right"] = confidence(a), b.right & ~a.right
    parts = []
    for title, (worth, on) in kinds.items():
        rows = np.flatnonzero(on)[np.argsort(-worth[on], kind="stable")]
        parts.append(title_of(title, rows, most))
        for i in rows[:most]:
            said = {name: facts_of(run, i) for name, run in (("A", a), ("B", b))}
            true = {"true": said["A"]["true"].rsplit(" (", 1)[0] if a.targets.ndim == 1 else said["A"]["true"]}
            each = {n: ", ".join(f"{k} {v}" for k, v in f.items() if k != "true") or "right" for n, f in said.items()}
            parts.append(row_card(a if a.texts else b, i, true | each))
    page.section("Rows that changed", *parts)


if __name__ == "__main__":
    ddp.launch(main)
