"""The comparison of two runs on the rows that both judged: which is better, and can these rows show it?"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import bootstrap
import metrics
import pictures
from errors import UserError, warning
from page import Page, span, table, tag, text_table
from report_numbers import by_frequency, confidence, listing, row_errors, row_fields, truth
from report_runs import Run
from report_sections import INTERVAL, class_bars, listings

METRIC_HEAD = ["metric", "A", "B", "B - A", INTERVAL, "p"]
AGREEMENT_HEAD = ["", "both right", "only A", "only B", "both wrong", "McNemar's p", "test"]


@dataclass
class Pair:
    """Two runs on the rows that both judged."""

    a: Run
    b: Run
    note: str  # how many rows of each are compared, where that is not all of them
    samples: int  # bootstrap resamples
    scores: dict[str, dict]  # of A and B by metric, with their difference

    @property
    def fitted(self) -> bool:
        return bool(self.a.thresholds or self.b.thresholds)


# ---- two runs -------------------------------------------------------------------------------------------------------


def pair_of(a: Run, b: Run, samples: int, seed: int) -> Pair:
    """A and B on the rows that both judged, scored on equal resamples. Raises UserError for runs that share no rows."""
    a, b, note = shared(a, b)
    pair = Pair(a, b, note, samples, {})
    pair.scores = compared(pair, a.predicted, b.predicted, a.worth_ranking(), seed)
    if pair.fitted:
        decided = [run.decided if run.thresholds else run.predicted for run in (a, b)]
        own = compared(pair, *decided, False, seed)
        for name in ("micro_f1", "macro_f1", "weighted_f1"):
            pair.scores[f"{name}, thresholds"] = own[name]
    return pair


def name_beside(a: Path, b: Path) -> str:
    """What tells B from A: the parts of its path after those that both begin with."""
    a, b = a.resolve(), b.resolve()
    common = len(os.path.commonprefix([a.parts, b.parts]))
    return "_".join(b.parts[common:]) or b.name


def shared(a: Run, b: Run) -> tuple[Run, Run, str]:
    """Both runs on the rows that both judged, and a note where that is not all. Raises UserError for other rows."""
    pair, remedy = f"{a.path} and {b.path}", "compare runs judged by the same rows"
    if (a.cfg.task, a.labels.values) != (b.cfg.task, b.labels.values):
        kinds = " and ".join(f"{run.cfg.task} of {len(run.labels.names)} labels" for run in (a, b))
        raise UserError(f"{pair}: {kinds}, expected one task and the same labels in one order; {remedy}")
    place = {name: i for i, name in enumerate(b.ids)}
    unique = len(place) == len(b.ids) and len(set(a.ids)) == len(a.ids)
    if not unique and a.ids != b.ids:
        raise UserError(f"{pair}: row ids are duplicated and in another order; {remedy}")
    note = ""
    if unique:
        rows = np.array([i for i, name in enumerate(a.ids) if name in place], dtype=int)
        if len(rows) < 2:
            raise UserError(f"{pair} share {len(rows)} row ids, expected 2 or more; {remedy}")
        if len(rows) < max(len(a.ids), len(b.ids)):
            note = f" that both judged, of {len(a.ids):,} of A and {len(b.ids):,} of B"
        b = b.take(np.array([place[a.ids[i]] for i in rows]))
        a = a.take(rows)
    if not np.allclose(a.targets, b.targets):
        raise UserError(f"{pair}: rows with the same id have different labels; {remedy}")
    return a, b, note


def compared(pair: Pair, of_a: np.ndarray, of_b: np.ndarray, ranking: bool, seed: int) -> dict[str, dict]:
    """A, B and B - A by metric, with its interval and p over resamples of the same rows; of "f1" arrays (C,), no p.

    of_a, of_b: the predictions that count. Without samples intervals and p are NaN.
    """
    whole_a, draws_a = pair.a.resampled(of_a, ranking, pair.samples, seed)
    whole_b, draws_b = pair.b.resampled(of_b, ranking, pair.samples, seed)
    scores = {}
    for name in whole_a:
        a, b = whole_a[name], whole_b[name]
        if np.isnan(a + b).any():
            continue
        low = high = a * np.nan
        p = np.nan
        if pair.samples:
            differences = draws_b[name] - draws_a[name]
            low, high = bootstrap.interval(differences)
            p = bootstrap.p_value(differences) if name != "f1" else p
        scores[name] = {"a": a, "b": b, "difference": b - a, "low": low, "high": high, "p": p}
    return scores


# ---- the numbers ----------------------------------------------------------------------------------------------------


def overview(pair: Pair) -> dict:
    """What is compared, and which of the two is better."""
    a, b = pair.a.path, pair.b.path
    name = name_beside(a, b)
    scores = {name: score for name, score in pair.scores.items() if name != "f1"}
    metric = pair.a.cfg.metric if pair.a.cfg.metric in scores else next(iter(scores))
    score = scores[metric]
    return {
        "page": f"compare_{name}",
        "title": f"{name_beside(b, a)} against {name}",
        "runs": [str(a), str(b)],
        "rows": len(pair.a.ids),
        "note": pair.note,
        "samples": pair.samples,
        "fitted_thresholds": pair.fitted,
        "metrics": scores,
        "verdict": verdict(metric, score["difference"], score["low"], score["high"]),
    }


def verdict(metric: str, difference: float, low: float, high: float) -> str:
    """One sentence: which run is better, where the interval leaves zero out."""
    name = metric.replace("_f1", "-F1").replace("_", " ")
    if math.isnan(low):
        return f"B - A is {difference:+.4f} {name}, without an interval."
    if low <= 0 <= high:
        interval = f"{difference:+.4f} {name} (95% {low:+.4f} to {high:+.4f})"
        return f"No difference that these rows can show: B - A is {interval}."
    better = "B" if (difference > 0) != (metric in metrics.LOWER) else "A"
    low, high = sorted((abs(low), abs(high)))
    return f"{better} is better by {abs(difference):.4f} {name} (95% {low:.4f} to {high:.4f})."


def agreement(pair: Pair) -> dict[str, dict]:
    """How often both are right, one, or none, and McNemar's test; of rows and, of several labels, of cells."""
    a, b = pair.a, pair.b
    if a.cfg.task == "regression":
        return {}
    kinds = {"rows": (a.correct, b.correct)}
    if a.cfg.task == "multi_label":
        kinds["cells"] = [(run.predicted == run.targets).ravel() for run in (a, b)]
    tests = {}
    for name, (x, y) in kinds.items():
        counts = {"both_right": x & y, "only_a": x & ~y, "only_b": ~x & y, "both_wrong": ~x & ~y}
        counts = {key: int(mask.sum()) for key, mask in counts.items()}
        p, test = bootstrap.mcnemar(counts["only_a"], counts["only_b"])
        tests[name] = {**counts, "p": p, "test": test}
    return tests


def classes(pair: Pair) -> dict[str, list] | None:
    """Columns of F1 by class."""
    if "f1" not in pair.scores:
        return None
    f1 = pair.scores["f1"]
    columns = {"A": f1["a"], "B": f1["b"], "B - A": f1["difference"]}
    columns[INTERVAL] = np.stack([f1["low"], f1["high"]], axis=1)
    return by_frequency(pair.a, columns)


def changes(pair: Pair) -> list[dict]:
    """The rows that only one of the two has right, of a regression those that one is closer to."""
    a, b = pair.a, pair.b
    if a.cfg.task == "regression":
        gain = row_errors(a)[0] - row_errors(b)[0]
        kinds = {"A is closer": (gain < 0, -gain), "B is closer": (gain > 0, gain)}
    else:
        kinds = {
            "Only A is right": (a.correct & ~b.correct, confidence(b)),
            "Only B is right": (b.correct & ~a.correct, confidence(a)),
        }

    def fields(_, i: int) -> dict[str, str]:
        return {"true": truth(a, i), "A": answer(a, i), "B": answer(b, i)}

    listed = []
    for title, (mask, worth) in kinds.items():
        order = np.argsort(-worth, kind="stable")
        listed.append(listing(title, order[mask[order]], a if a.texts else b, fields))
    return listed


def answer(run: Run, i: int) -> str:
    """What a run says of a row, in one line."""
    fields = row_fields(run, i)
    del fields["true"]
    return ", ".join(f"{name} {value}" for name, value in fields.items()) or "right"


# ---- the page and the terminal --------------------------------------------------------------------------------------


def metric_rows(facts: dict) -> list[list]:
    rows = []
    for name, score in facts["metrics"].items():
        interval = span([score["low"], score["high"]], "+")
        rows.append([name, score["a"], score["b"], score["difference"], interval, score["p"]])
    return rows


def agreement_rows(facts: dict) -> list[list]:
    return [[name, *test.values()] for name, test in facts["mcnemar"].items()]


def summary(facts: dict) -> str:
    """The comparison as it is printed."""
    lines = []
    if facts["note"]:
        lines.append(
            warning(f"only the {facts['rows']:,} rows{facts['note']} are compared", "give both the same --val_data")
        )
    for name, path in zip("AB", facts["runs"], strict=True):
        lines.append(f"{name}: {path}")
    lines += [f"{facts['rows']:,} rows{facts['note']}", text_table(METRIC_HEAD, metric_rows(facts))]
    if facts["mcnemar"]:
        lines.append(text_table(AGREEMENT_HEAD, agreement_rows(facts)))
    return "\n".join([*lines, facts["verdict"]])


def overview_parts(page: Page, facts: dict) -> list:
    """The verdict and what is compared."""
    a, b = facts["runs"]
    rows = [["A", a], ["B", b], ["rows", f"{facts['rows']:,}{facts['note']}"]]
    caveat = "The interval is over rows: it does not cover what another training seed would give."
    return [tag("p", facts["verdict"], class_="lead"), caveat, table(["", ""], rows)]


def metric_parts(page: Page, facts: dict) -> list:
    """All metrics with their paired intervals."""
    method = (
        f"{facts['samples']:,} bootstrap resamples, the same rows for both runs. p: twice the smaller share of "
        "resamples in which the difference is at most, or at least, zero (one added to both counts), at most 1."
    )
    if facts["fitted_thresholds"]:
        method += " Thresholds: cross-fitted, each row by a fit on the other four fifths of the rows."
    return [table(METRIC_HEAD, metric_rows(facts)), method]


def agreement_parts(page: Page, facts: dict) -> list:
    """How often both are right, one, or none, and McNemar's test of the two."""
    method = "McNemar 1947 on what only one of them has right: exact below 25, else with continuity correction."
    if "cells" in facts["mcnemar"]:
        method += " A row is right where all its labels are; cells of a row are not independent: their p is too small."
    return [table(AGREEMENT_HEAD, agreement_rows(facts)), method]


def class_parts(page: Page, facts: dict) -> list:
    """Differences of F1 by class."""
    columns = facts["classes"]
    low, high = pictures.array(columns[INTERVAL]).T
    colours = np.select([low > 0, high < 0], [pictures.BLUE, pictures.ORANGE], "#b8c0c9")
    caption = (
        "F1 of B minus F1 of A, the most frequent class first, with its rows in brackets; lines: paired 95% intervals. "
        "Blue: B is better, orange: A is better, grey: zero is within the interval. Of twenty equal classes one is "
        "coloured by chance."
    )
    return class_bars(page, columns, "B - A", "F1 of B - F1 of A", caption, colours=colours, sign="+")


def change_parts(page: Page, facts: dict) -> list:
    return listings(facts["changes"])
