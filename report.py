"""A page about a finished run, or a comparison of two, from what the runs left behind: no base, no weights, seconds.

    python report.py                                   # the newest finished run
    python report.py outputs/tiny__base/tiny/run_0     # writes report/index.html in it, and its pictures as PNG
    python report.py RUN_A RUN_B                       # which is better, and can these rows show it?

The page holds its pictures and makes no request; report.json beside it holds its numbers. Intervals are 95% percentile
bootstrap intervals over rows (Efron 1979) unless stated otherwise; a comparison resamples the same rows for both runs.
"""

import itertools
import os
import sys
from dataclasses import dataclass, replace

import cli


@dataclass(frozen=True)
class ReportConfig:
    """A page about a finished run, or a comparison of two: python report.py RUN, python report.py A B."""

    runs: tuple[str, ...] = ()  # run folder, two to compare them, A against B; default: the newest run
    output: str = ""  # folder of the page and its pictures; default: report/ in the run (of two: in A)
    samples: int = 1000  # bootstrap resamples of rows
    worst: int = 30  # most confident errors whose texts are shown
    seed: int = 0  # seed of the resamples
    outputs: str = "outputs"  # folder that holds all runs


CLASHES = (  # message, test of the config that holds where something is wrong
    (
        "--runs {runs}: expected one run, or two different ones",
        lambda cfg: len(cfg.runs) > 2 or len({os.path.realpath(run) for run in cfg.runs}) < len(cfg.runs),
    ),
    (
        "--samples {samples}: expected 100 or more for 95% intervals, or 0 for none",
        lambda cfg: 0 < cfg.samples < 100,
    ),
    (
        "--output {output}: {problem}; name another folder",
        lambda cfg: cfg.output and checks.folder_problem(cfg.output),
    ),
)


def split_argv(argv: list[str]) -> tuple[list[str], list[str]]:
    """(run folders, flags): the words before the first flag are runs, even with commas in their names."""
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    return names, argv[len(names) :]


if __name__ == "__main__":  # help and typos are answered before numpy, torch and matplotlib are loaded
    cli.early(ReportConfig, {}, __doc__, split_argv(sys.argv[1:])[1])

import math  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402

import bootstrap  # noqa: E402
import checkpoint  # noqa: E402
import checks  # noqa: E402
import compare_runs  # noqa: E402
import ddp  # noqa: E402
import pictures  # noqa: E402
import report_numbers as numbers  # noqa: E402
import report_sections as sections  # noqa: E402
from compare_runs import Pair  # noqa: E402
from errors import UserError  # noqa: E402
from page import Page  # noqa: E402
from report_runs import Run, read_run  # noqa: E402

RETURNED = {  # by the number of runs
    1: ("run", "metrics", "intervals"),
    2: ("runs", "rows", "metrics", "mcnemar", "verdict"),
}

# A section is a key in report.json, a title, a function of the run that gives its numbers, and one of (page, all
# numbers) that returns markup and sentences. It is left out where there are no numbers. Those without a key are the
# head of the page, whose numbers stand at the top level.
SECTIONS = (
    ("", "", numbers.overview, sections.overview),
    ("training", "Training", numbers.training, sections.training),
    ("confusion", "Confusion matrix", numbers.confusion, sections.confusion),
    ("classes", "Classes", numbers.classes, sections.classes),
    ("calibration", "Calibration", numbers.calibration, sections.calibration),
    ("thresholds", "Thresholds", numbers.thresholds, sections.thresholds),
    ("coverage", "Coverage", numbers.coverage, sections.coverage),
    ("scores", "Scores", numbers.scores, sections.scores),
    ("outputs", "Outputs", numbers.outputs, sections.outputs),
    ("lengths", "Lengths", numbers.lengths, sections.lengths),
    ("groups", "Groups", numbers.groups, sections.groups),
    ("errors", "Errors", numbers.errors, sections.errors),
)
COMPARED = (  # of a pair of runs
    ("", "", compare_runs.overview, compare_runs.overview_parts),
    ("", "Metrics", lambda pair: {}, compare_runs.metric_parts),
    ("mcnemar", "Right and wrong", compare_runs.agreement, compare_runs.agreement_parts),
    ("classes", "Classes", compare_runs.classes, compare_runs.class_parts),
    ("changes", "Rows that changed", compare_runs.changes, compare_runs.change_parts),
)


def facts(run: Run | Pair, sections: tuple = SECTIONS) -> dict:
    """Everything that a page is made of, as strict JSON."""
    known = {}
    for key, _, numbers_of, _ in sections:
        values = numbers_of(run)
        known |= {key: values} if key else values
    return as_json(known)


def as_json(value):
    """A value as strict JSON: arrays as lists, numpy's numbers as Python's, None for what is not finite."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [as_json(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def make_page(known: dict, sections: tuple = SECTIONS) -> Page:
    """The page that is made of these facts."""
    page = Page(known["title"], known["page"])
    with pictures.drawing():
        for key, title, _, parts in sections:
            if not key or known[key]:
                page.section(title, parts(page, known))
    return page


def main(argv: list[str]) -> dict:
    """Write the page of a run or of a comparison; returns its main numbers and where they stand."""
    cfg = config(argv)
    need_matplotlib()

    # what the runs left behind
    runs = [read_run(Path(name)) for name in cfg.runs or [newest(cfg.outputs)]]
    for run in runs:
        if run.note:
            print(f"{run.path}: {run.note}")

    # one run, or two on the rows that both judged
    runs = [replace(run, worst=cfg.worst) for run in runs]
    if len(runs) == 1:
        subject, sections = with_intervals(runs[0], cfg.samples, cfg.seed), SECTIONS
    else:
        subject, sections = compare_runs.pair_of(*runs, cfg.samples, cfg.seed), COMPARED

    # all numbers, then the page that is made of them
    known = facts(subject, sections)
    if len(runs) == 2:
        print(compare_runs.summary(known))
    page = make_page(known, sections)
    folder = Path(cfg.output) if cfg.output else runs[0].path / "report"
    written = page.write(folder, known)
    print(f"wrote {written['page']}")
    returned = RETURNED[len(runs)]
    return {key: known[key] for key in returned} | written


def config(argv: list[str]) -> ReportConfig:
    """The checked settings. Raises UserError with everything that is wrong with them."""
    names, flags = split_argv(argv)
    cfg, given = cli.parse(ReportConfig, {}, flags, __doc__)
    if names and cfg.runs:
        raise UserError(f"runs {' '.join(names)} and --runs {' '.join(cfg.runs)}: name the runs once")
    cfg = replace(cfg, runs=tuple(names) or cfg.runs)
    checks.check(cfg, given, clashes=CLASHES)
    return cfg


def with_intervals(run: Run, samples: int, seed: int) -> Run:
    """The run with bootstrap intervals of its scores; without samples there are none."""
    _, draws = run.resampled(run.predicted, run.worth_ranking(), samples, seed)
    return replace(run, intervals={name: bootstrap.interval(values) for name, values in draws.items()})


def need_matplotlib() -> None:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError("report.py draws with matplotlib: pip install matplotlib") from None


def newest(outputs: str) -> Path:
    run = checkpoint.newest_finished(outputs, "labels.json")
    if run is None:
        raise UserError(f"--outputs {outputs} holds no finished run of train.py: name one, python report.py RUN")
    return run


if __name__ == "__main__":
    ddp.launch(main)
