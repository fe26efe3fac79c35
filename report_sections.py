"""The sections of a run's page: report.json's numbers as pictures, tables and sentences.

Each function takes the page and all facts of the run, keeps its pictures in the page, and returns its parts.
"""

import json

import pictures
from page import Html, Page, card, details, shown, span, table, tag

INTERVAL = "95% interval"
ABOUT = ("run", "base", "data", "finished", "task", "labels", "rows", "steps", "seconds")
MOST_BARS = 40  # of a picture of classes
BASELINES = {
    "single_label": "Majority-class baseline",
    "multi_label": "Baseline that predicts the most frequent label for every row",
    "regression": "Baseline that predicts the mean",
}


# ---- overview -------------------------------------------------------------------------------------------------------


def overview(page: Page, facts: dict) -> list:
    """What the run is, its scores, settings and audit."""
    parts = [tag("p", lead(facts), class_="lead"), facts["note"], about(facts), *score_tables(facts)]
    return [*parts, *settings(facts["settings"]), *audit(facts["audit"])]


def lead(facts: dict) -> str:
    """The run's own metric and its baseline in two sentences."""
    metric = facts["metric"]
    text = f"{metric} {shown(facts['metrics'].get(metric))}"
    if metric in facts["intervals"]:
        text += f" (95% {span(facts['intervals'][metric])})"
    if metric in facts["with_thresholds"]:
        text += f", with fitted thresholds {shown(facts['with_thresholds'][metric])},"
    return f"{text} on {facts['rows']:,} rows. {BASELINES[facts['task']]}: {metric} {shown(facts['baseline'])}."


def about(facts: dict) -> Html:
    """What was trained on what, and when."""
    rows = [[name, shown(facts[name])] for name in ABOUT if facts[name]]
    if facts["folds"]:
        rows.append(["folds", f"{facts['folds']}: each row is scored by models trained on the others"])
    return table(["", ""], rows)


def score_tables(facts: dict) -> list:
    """All scores, and those of each member run of a family."""
    columns = {
        "value": facts["metrics"],
        INTERVAL: facts["intervals"],
        "with thresholds": facts["with_thresholds"],
        "mean of runs": facts["mean"],
        "std": facts["std"],
    }
    columns = {title: scores for title, scores in columns.items() if scores}
    names = [name for name in facts["metrics"] if name != "rows"]
    rows = [[name, *(scores.get(name) for scores in columns.values())] for name in names]
    parts = [table(["metric", *columns], rows)]
    if facts["fitted_thresholds"]:
        parts.append(
            "Predictions are by argmax or probability 0.5. Scores with thresholds are cross-fitted: thresholds are "
            "fitted on four fifths of the rows, as the run's are on all, and scored on the rest."
        )
    if facts["runs"]:
        rows = [[run, *(scores.get(n) for n in names[:6])] for run, scores in facts["runs"].items()]
        parts += [tag("h3", f"{len(rows)} runs"), table(["run", *names[:6]], rows)]
    return parts


def settings(facts: dict) -> list[Html]:
    """The settings that are not the default, and all of them after a click."""
    rows = []
    for name, value in facts["changed"].items():
        rows.append([name, ", ".join(value) if isinstance(value, list) else str(value)])
    whole = tag("div", json.dumps(facts["all"], indent=1) + "\n", class_="text")
    changed = [tag("h3", "Settings that are not the default"), table(["field", "value"], rows)] if rows else []
    return [*changed, details("all settings", whole)]


def audit(findings: list[list] | None) -> list[Html]:
    """How much the audit of the data found."""
    if findings is None:
        return []
    nothing = tag("p", "No duplicates, conflicts or leaks.")
    return [tag("h3", "Data audit"), table(["finding", "groups", "rows"], findings) if findings else nothing]


def training(page: Page, facts: dict) -> list:
    """Curves over steps."""
    figure = pictures.curves(facts["training"], facts["metric"])
    caption = (
        "Training loss (faint: raw, strong: smoothed), validation metric and learning rate. "
        "A ring marks the best checkpoint."
    )
    return [page.picture("loss", figure, caption)]


# ---- classes --------------------------------------------------------------------------------------------------------


def confusion(page: Page, facts: dict) -> list:
    """The confusion matrix."""
    numbers = facts["confusion"]
    caption = "Counts of rows; the colour is their share of the true class."
    shown_classes = len(numbers["classes"])
    if numbers["of"] > shown_classes:
        caption += f" The {shown_classes} most frequent of {numbers['of']} classes."
    return [page.picture("confusion", pictures.confusion(numbers), caption)]


def classes(page: Page, facts: dict) -> list:
    """Precision, recall and F1 of every class."""
    columns = facts["classes"]
    caption = "F1 by class, the most frequent first, with its rows in brackets; lines: 95% intervals."
    look = {"dots": columns["F1, thresholds"]} if facts["fitted_thresholds"] else {}
    return class_bars(page, columns, "F1", "F1", caption, **look)


def class_bars(page: Page, columns: dict, name: str, label: str, caption: str, sign: str = "", **look) -> list:
    """A picture of the column `name` with its intervals, and a table of all columns.

    sign: "+" for intervals of differences; look: colours and dots of all classes.
    """
    many = len(columns["class"]) > MOST_BARS
    if many:
        caption += f" The {MOST_BARS} most frequent of {len(columns['class'])}; the table has all."
    first = {key: values[:MOST_BARS] for key, values in columns.items()}
    look = {key: values[:MOST_BARS] for key, values in look.items()}
    figure = pictures.bars(first, name, label, **look)
    if INTERVAL in columns:
        columns = {**columns, INTERVAL: [span(interval, sign) for interval in columns[INTERVAL]]}
    whole = table(list(columns), [*zip(*columns.values(), strict=True)])
    if many:
        whole = details(f"all {len(columns['class'])} classes", whole)
    return [page.picture("f1", figure, caption), whole]


# ---- probabilities --------------------------------------------------------------------------------------------------


def calibration(page: Page, facts: dict) -> list:
    """The reliability diagram, and scores before and after calibration."""
    axes = ("probability of the predicted class", "accuracy", "rows")
    if facts["task"] == "multi_label":
        axes = ("probability of a label", "share that has it", "cells (rows x labels)")
    series, scores = facts["calibration"]["series"], facts["calibration"]["scores"]
    bins = len(series["as trained"]["count"])
    caption = (
        f"On the dashed line probabilities equal observed frequencies. {bins} bins; lines: 95% intervals (Wilson "
        "1927); below: the size of each bin. Calibrated: cross-fitted, each row by a fit on the other four fifths "
        "of the rows."
    )
    parts = [page.picture("reliability", pictures.reliability(series, *axes), caption)]
    if scores:
        before, after = scores["before"], scores["after"]
        last = "calibrated, with thresholds" if facts["fitted_thresholds"] else "calibrated"
        parts.append(table(["metric", "as trained", last], [[n, before[n], after[n]] for n in before]))
    return parts


def thresholds(page: Page, facts: dict) -> list:
    """What other thresholds would give."""
    numbers = facts["thresholds"]
    caption = "Scores on these rows by threshold."
    if numbers["fitted"] is not None:
        caption += " The fitted one was chosen on these same rows."
    if facts["fitted_thresholds"] == "per_class":
        caption += " The run's own thresholds, one for each label, are not shown."
    return [page.picture("thresholds", pictures.thresholds(numbers), caption)]


def coverage(page: Page, facts: dict) -> list:
    """What leaving out the least confident rows would give."""
    numbers = facts["coverage"]
    caption = (
        f"Accuracy on the more confident half of the rows: {numbers['half']:.4f}; on all rows: {numbers['all']:.4f}. "
        "Band: 95% intervals (Wilson 1927)."
    )
    return [page.picture("coverage", pictures.coverage(numbers), caption)]


def scores(page: Page, facts: dict) -> list:
    """How well the scores separate two groups."""
    numbers = facts["scores"]
    caption = f"{numbers['unit'].capitalize()} by {numbers['label']}: {' and '.join(numbers['names'])}."
    return [page.picture("scores", pictures.histograms(numbers), caption)]


def outputs(page: Page, facts: dict) -> list:
    """Predicted against true numbers of a regression."""
    caption = "Predicted against true values, and the residuals."
    return [page.picture("scores", pictures.residuals(facts["outputs"]), caption)]


# ---- rows -----------------------------------------------------------------------------------------------------------


def lengths(page: Page, facts: dict) -> list:
    """Errors by length of the text."""
    numbers = facts["lengths"]
    method = "1.96 standard errors" if facts["task"] == "regression" else "Wilson 1927"
    caption = f"Tenths of the rows by length; lines: 95% intervals ({method}); dashed: all rows."
    return [page.picture("length", pictures.lengths(numbers), caption)]


def groups(page: Page, facts: dict) -> list:
    """Accuracy or error by the columns that rows are grouped by."""
    parts = []
    for column, numbers in facts["groups"].items():
        title = f"By {column}"
        if numbers["of"] > len(numbers["groups"]):
            title += f", the {len(numbers['groups'])} largest of {numbers['of']:,}"
        head = [column, "rows", numbers["measure"], "95% interval"]
        parts += [tag("h3", title), table(head, numbers["groups"])]
    return parts


def errors(page: Page, facts: dict) -> list:
    """The worst rows with their texts."""
    order = "The largest errors first." if facts["task"] == "regression" else "The most confident errors first."
    return [order, *listings(facts["errors"])]


def listings(kinds: list[dict]) -> list[Html]:
    """Cards of rows under the title of their kind."""
    parts = []
    for kind in kinds:
        size = f"{kind['count']:,}"
        if kind["count"] > len(kind["rows"]):
            size += f", {len(kind['rows'])} shown"
        parts.append(tag("h3", f"{kind['title']} ({size})"))
        parts += [card(row["fields"], row["text"]) for row in kind["rows"]]
    return parts
