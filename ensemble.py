"""Combine the predictions of several runs, families of runs, or other systems.

    python ensemble.py --runs outputs/A outputs/B --ensemble weighted --input test.csv
    python ensemble.py --runs outputs/A other_system.csv --ensemble rank --input test.csv --answer probability
    python ensemble.py --runs a.csv b.csv --task multi_label --submission ""           # no model at all

A CSV holds logit_LABEL or probability_LABEL columns beside the ids (prediction for a regression), such as infer.py
writes with --submission "". Runs that were validated on the same rows fit weights, thresholds and calibration on them.
"""

from dataclasses import dataclass
from typing import ClassVar

import cli

ENSEMBLES = ("mean_logit", "mean_prob", "rank", "weighted")


@dataclass(frozen=True)
class EnsembleConfig:
    """Combine the predictions of several runs, families of runs, or other systems."""

    NEEDS: ClassVar[dict] = {"answer": "submission"}

    # members
    runs: tuple[str, ...] = ()  # the members: run folders, families of runs, and CSV or JSONL files of other systems
    base: tuple[str, ...] = ()  # where the runs' bases are now, if they moved: one for all, or one for each run
    ensemble: str = "mean_logit"  # mean_logit, mean_prob, rank, or weighted (fitted on shared validation rows)

    # input and output
    input: str = ""  # rows to predict; default: the first run's test_data, or without a run the rows of the first file
    output: str = "submission.csv"  # where predictions go; CSV, or JSONL by its extension
    submission: str = "id,label"  # names of the two columns id and label; empty: id, prediction and all probabilities
    id_column: str = ""  # id column; default: the first of submission, or the run's, where input has it; else row index
    answer: str = "auto"  # in a submission: label, probability (of the last of two), auto: by the first run's metric
    overwrite: bool = False  # replace an existing output; otherwise it is kept beside it as NAME.previous
    by_column: str = ""  # metrics are also given for each value of this column
    threshold: float = 0.0  # a probability that decides instead of the fitted thresholds; 0: those

    # run
    time_limit: str = ""  # as in infer.py, shared out among the runs
    max_tokens: int = 8192  # token budget of one micro-batch
    limit: int = 0  # only the first rows, 0 for all
    precision: str = "auto"  # as in train.py
    force: bool = False  # write the output even if the scores are degenerate

    # files alone, where no member is a run
    task: str = "single_label"  # single_label or multi_label (regression: by its one column)
    label_names: tuple[str, ...] = ()  # the labels in order; default: those of the first columns
    label_column: str = "label"  # column of the label in input, where there is one
    label_delimiter: str = "|"  # multi_label: separates the labels of label_column


if __name__ == "__main__":  # help and typos are answered before torch is loaded, which takes seconds
    cli.early(EnsembleConfig, {}, __doc__)

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

import checkpoint
import checks
import ddp
import decide
import evaluate
import files
import labelling
import metrics
import predictions
import report_runs
import trained
from configs import TrainConfig
from errors import Degenerate, UserError, few, note

CLASHES = (
    ("--runs {runs}: name two or more members (python infer.py --runs A predicts with one)", lambda c: len(c.runs) < 2),
    (
        "--runs {runs}: a member is duplicated; weigh members with --ensemble weighted",
        lambda c: len({Path(run).resolve() for run in c.runs}) < len(c.runs),
    ),
    ("--output {output}: expected a name that ends in .csv or .jsonl", lambda c: not is_file(c.output)),
    ("--task regression: it is known by its one column, prediction; leave it out", lambda c: c.task == "regression"),
)
FOR_FILES = ("task", "label_names", "label_column", "label_delimiter")  # a run has its own
FOR_RUNS = ("base", "time_limit", "max_tokens", "precision")  # a file is not scored


def main(argv: list[str]) -> dict:
    # Settings: everything wrong with them is reported at once.
    cfg, given = cli.parse(EnsembleConfig, {}, argv, __doc__)
    checks.check(cfg, given, clashes=CLASHES)
    world = ddp.setup()
    say = partial(ddp.say, world)

    # The first run says what the rows and labels are; without a run, the columns of the first file.
    folders = {member: Path(member) for member in cfg.runs if not is_file(member)}
    runs = list(folders.values())
    refuse_idle(given, runs)
    if len(cfg.base) > 1 and len(cfg.base) != len(runs):
        raise UserError(f"--base {','.join(cfg.base)}: expected one for all {len(runs)} runs, or one for each")
    train_cfg, labels = trained.run_facts(runs[0]) if runs else described(cfg)
    predictions.as_probability(cfg, train_cfg, labels)

    # The rows, in the order of the input, with their labels where the file has them.
    source = cfg.input or (train_cfg.test_data if runs else cfg.runs[0])
    if not source:
        raise UserError(f"{runs[0]} names no test_data: give the rows to predict with --input FILE")
    rows, ids = predictions.read_input(cfg, train_cfg, source, columns_of(runs), say)
    checks.need_output(cfg.output, "--output", source, *cfg.runs, train_cfg.train_data, train_cfg.val_data)
    known = predictions.known_labels(rows, train_cfg, labels, say)

    # Before any weight is loaded: weights and decision, from the members' validation rows, and the files' logits.
    blend = blending(cfg, runs, train_cfg, labels)
    classes = len(labels.names)
    blend.decision = predictions.decision_at(cfg.threshold, train_cfg.task, classes, blend.decision)
    members = {member: csv_member(member, train_cfg, labels, ids) for member in cfg.runs if is_file(member)}

    # Score the rows with each run in turn; a row that one of them did not reach in time counts as not scored.
    started = time.perf_counter()
    shares = predictions.class_shares(runs[0] if runs else Path(), labels)
    members |= score_runs(cfg, folders, rows, known, world)
    logits = blended([members[name] for name in cfg.runs], cfg, blend, train_cfg.task, shares)
    inputs = inputs_of(rows, runs)
    seconds = time.perf_counter() - started
    say(blend.report)

    # Decide, measure where labels are known, and write.
    result = predictions.finish(cfg, train_cfg, labels, blend.decision, rows, ids, known, logits, inputs, shares, world)
    rate = round(len(rows) / seconds, 2)
    return {"runs": list(cfg.runs), **result, "examples_per_second": rate, "seconds": round(seconds, 2)}


# ---- the members ----------------------------------------------------------------------------------------------------


def is_file(member: str) -> bool:
    """Whether a member is another system's file, and not a run folder."""
    return member.endswith((".csv", ".jsonl"))


def refuse_idle(given: set[str], runs: list[Path]) -> None:
    """Raise UserError for flags given by hand that have no effect on these members."""
    idle = FOR_FILES if runs else FOR_RUNS
    why = "with a run, which has its own" if runs else "on files, whose rows are scored already"
    problems = [f"--{name} has no effect {why}" for name in idle if name in given]
    if problems:
        raise UserError(" | ".join(problems))


def columns_of(runs: list[Path]) -> list[str]:
    """The columns that the runs read."""
    columns = {}
    for run in runs:
        columns |= dict.fromkeys(files.template_columns(trained.run_facts(run)[0].text))
    return list(columns)


def inputs_of(rows: files.Rows, runs: list[Path]) -> np.ndarray:
    """(N,) numbers, equal for rows of equal texts; without a run the texts are not known, and all are equal."""
    columns = columns_of(runs)
    return np.array([hash(tuple(row[name] for name in columns)) for row in rows])


def described(cfg: EnsembleConfig) -> tuple[TrainConfig, labelling.Labels]:
    """What a run's config and labels say, for files alone: from the flags and the columns of the first file."""
    first = cfg.runs[0]
    header = list(files.read_rows(first, "runs")[0])
    same = {"label_column": cfg.label_column, "label_delimiter": cfg.label_delimiter}
    for prefix in PREFIXES:
        names = tuple(column.removeprefix(prefix) for column in header if column.startswith(prefix))
        if names:
            names = cfg.label_names or names
            return TrainConfig(task=cfg.task, **same), labelling.Labels(names, names)
    if "prediction" not in header:
        expected = "logit_LABEL or probability_LABEL for each label, or prediction for a regression"
        raise UserError(f"--runs {first}: no column {expected} (there is: {', '.join(header)})")
    return TrainConfig(task="regression", metric="mse", **same), labelling.Labels((), (cfg.label_column,))


PREFIXES = ("logit_", "probability_")


def csv_member(path: str, cfg: TrainConfig, labels: labelling.Labels, ids: predictions.Ids) -> np.ndarray:
    """fp32 logits (N, C) of another system, by the ids of its file: log-odds or log of its probabilities. Its id column
    has the name of the input's, or of the first run's.

    Raises UserError for ids or columns that the file lacks.
    """
    rows = files.read_rows(path, "runs")
    names = labels.values or ("prediction",)
    prefix = ""
    if labels.values:
        prefix = next((prefix for prefix in PREFIXES if prefix + names[0] in rows[0]), PREFIXES[-1])
    columns = [prefix + name for name in names]
    id_column = ids.column if ids.column in rows[0] else cfg.id_column
    files.need_columns(rows, [id_column, *columns], path, "runs")
    by_id = {row[id_column]: row for row in rows}
    missing = [id_ for id_ in ids.values if id_ not in by_id]
    if missing:
        raise UserError(f"--runs {path}: {len(missing)} of {len(ids.values)} ids are not in it ({few(missing)})")
    if len(by_id) < len(rows):
        raise UserError(f"--runs {path}: {len(rows) - len(by_id)} of its ids are duplicates")
    values = [labelling.encode_numbers([by_id[id_][column] for id_ in ids.values], path) for column in columns]
    values = np.stack(values, axis=1)
    if prefix != "probability_":
        return values
    wrong = values[(values < -1e-6) | (values > 1 + 1e-6)]
    if len(wrong):
        raise UserError(f"--runs {path}: {len(wrong)} probabilities are not from 0 to 1 ({wrong[0]:g}): percentages?")
    off = int((abs(values.sum(axis=1) - 1) > 0.02).sum())
    if off and cfg.task == "single_label":
        note(f"note: --runs {path}: the probabilities of {off} rows do not sum to 1: they are scaled to it")
    p = np.clip(values.astype(np.float64), 1e-12, 1)
    logits = np.log(p)
    if cfg.task == "multi_label":
        logits = logits - np.log1p(-np.minimum(p, 1 - 1e-12))
    return logits.astype(np.float32)


def score_runs(cfg: EnsembleConfig, runs: dict[str, Path], rows: list, known, world: ddp.World) -> dict:
    """Name -> fp32 logits (N, C) of each run, NaN in rows that it did not reach in time. runs: name -> folder.

    Raises Degenerate for scores that are not finite, or that a few rows first show to be wrong.
    """
    limit, scores = checks.seconds(cfg.time_limit), {}
    moved = cfg.base if len(cfg.base) > 1 else (cfg.base or ("",)) * len(runs)
    for done, (name, path) in enumerate(runs.items()):
        run = trained.load_run(path, world, cfg.precision, base=moved[done])
        if not cfg.force:
            ddp.say(world, f"run {path}: {evaluate.preflight(run, rows, known, cfg.max_tokens)}")
        seconds = predictions.time_left(limit, len(runs) - done)
        logits, report = run.logits(rows, cfg.max_tokens, seconds, cfg.output)
        ddp.say(world, f"run {path}: tokens: {report}")
        if not limit and not np.isfinite(logits).all():
            raise Degenerate(f"run {path}: {evaluate.degenerate(logits)}; nothing was written")
        scores[name] = logits
    return scores


# ---- how they combine -----------------------------------------------------------------------------------------------


@dataclass
class Blend:
    """How several members become one, fitted on their validation rows before any weight is loaded."""

    task: str  # as `combine` knows it
    weights: np.ndarray | None
    decision: decide.Decision | None
    report: str


def blending(cfg: EnsembleConfig, runs: list[Path], train_cfg: TrainConfig, labels: labelling.Labels) -> Blend:
    """Weights, thresholds and calibration from validation rows, where all members are runs that share those rows.

    Raises UserError for runs of other tasks or labels, and for weights without rows to fit them on.
    """
    task, report = train_cfg.task, f"{cfg.ensemble} of {len(cfg.runs)} members"
    for run in runs[1:]:
        other, other_labels = trained.run_facts(run)
        if cfg.ensemble == "rank" and other.task == "regression" and len(labels.values) == 2:
            report += f", a regression's output beside the log-odds of {labels.values[1]}"
            return Blend(task, None, None, report)
        if (other.task, other_labels.values) != (task, labels.values):
            got = f"{other.task} {other_labels.values}"
            raise UserError(f"--runs {run}: its task or labels are not those of {runs[0]}: {got}")
    if task == "regression":
        if cfg.ensemble in ("mean_prob", "weighted"):
            raise UserError(f"--ensemble {cfg.ensemble}: a regression has no probabilities; take mean_logit or rank")
        return Blend("multi_label", None, None, report)
    logits, truth = shared_validation(runs, train_cfg, labels) if len(runs) == len(cfg.runs) else ([], [])
    weights = None
    if cfg.ensemble == "weighted":
        if not logits:
            raise UserError(
                "--ensemble weighted: the members were not validated on the same rows; take mean_logit or rank"
            )
        weights = fit_weights(logits, truth, task)
        report += f", weights {np.round(weights, 3)}"
    if not logits or decide.unfit(truth) or cfg.ensemble == "rank":  # ranks depend on the rows that they are among
        return Blend(task, weights, None, f"{report}; argmax or probability 0.5 decides")
    both = combine(logits, cfg.ensemble, weights, task)
    decision = decide.fit_decision(task, both, truth, trained.threshold_kind(train_cfg))
    return Blend(task, weights, decision, f"{report}; thresholds and calibration of their validation rows")


def shared_validation(runs: list[Path], train_cfg: TrainConfig, labels: labelling.Labels):
    """(logits (N, C) of each run, targets) of the validation rows that all runs share; two empty lists otherwise."""
    digests = {checkpoint.load_json(run / "result.json").get("val_sha256") for run in runs}
    known = [report_runs.validation_rows(run, train_cfg, labels) for run in runs]
    ids, targets, _ = known[0]
    same = all(other[0] == ids and np.array_equal(other[1], targets) for other in known)
    if not same or len(digests) > 1:
        return [], []
    return [logits for _, _, logits in known], targets


def blended(members: list[np.ndarray], cfg: EnsembleConfig, blend: Blend, task: str, shares: np.ndarray) -> np.ndarray:
    """fp32 logits (N, C) of all members together; NaN where a time limit kept one of them from scoring a row."""
    width = max(member.shape[1] for member in members)
    # a regression's one output stands beside two classes as the log-odds of the second
    members = [member if member.shape[1] == width else np.hstack([0 * member, member]) for member in members]
    if not cfg.time_limit:
        return combine(members, cfg.ensemble, blend.weights, blend.task).astype(np.float32)
    late = np.isnan(members).any(axis=(0, 2))
    prior = predictions.prior_logits(task, shares)
    members = [np.where(np.isnan(member), prior, member) for member in members]
    logits = combine(members, cfg.ensemble, blend.weights, blend.task).astype(np.float32)
    logits[late] = np.nan
    return logits


# ---- the arithmetic -------------------------------------------------------------------------------------------------


def stacked(members: Sequence[ArrayLike]) -> np.ndarray:
    """M logits (N, C) -> (M, N, C) float64."""
    shapes = {np.shape(member) for member in members}
    if len(shapes) != 1 or len(min(shapes)) != 2:
        got = [np.shape(member) for member in members]
        raise ValueError(f"ensemble: got members of shapes {got}, expected one shape (N, C)")
    z = np.stack([np.asarray(member, dtype=np.float64) for member in members])
    if not (z.size and np.isfinite(z).all()):
        raise ValueError(f"ensemble: got {len(z)} members of shape {min(shapes)}, expected rows and finite logits")
    return z


def midranks(scores: np.ndarray) -> np.ndarray:
    """(N,) -> ranks (N,) scaled into (0, 1); equal scores share their mean rank."""
    _, group, size = np.unique(scores, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - size / 2)[group] / len(scores)


def combine(
    members: Sequence[ArrayLike], how: str, weights: ArrayLike | None = None, task: str = "single_label"
) -> np.ndarray:
    """One set of logits (N, C) from several; their softmax (multi_label: sigmoid) is what `how` names.

    mean_logit: of the mean logits. mean_prob: the mean of probabilities; weighted: with weights (M,), 0 or more and
    summing to 1. rank: the mean of each column's midranks among these N rows, scaled into (0, 1): the same under any
    increasing map of a column (of z1 - z0 of two single-label classes, of log p of more). Good for AUC.
    """
    z, single = stacked(members), task == "single_label"
    if (
        task not in ("single_label", "multi_label")
        or how not in ENSEMBLES
        or (how == "weighted") != (weights is not None)
    ):
        got = f"{how!r} of {task!r} with weights {weights}"
        raise ValueError(f"ensemble: got {got}; weighted, and no other, takes weights")
    if weights is None:
        weights = np.full(len(z), 1 / len(z))
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (len(z),) or not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
        raise ValueError(f"weights: got {weights.tolist()}, expected {len(z)} numbers of 0 or more that sum to 1")
    if how == "mean_logit":
        return z.mean(axis=0)
    if how == "rank":
        return mean_ranks(z, single)
    # the log of a weighted mean of probabilities, from their logs: nothing underflows
    z, logs = z[weights > 0], np.log(weights[weights > 0])[:, None, None]
    if single:
        return np.logaddexp.reduce(metrics.log_softmax(z) + logs, axis=0)
    positive = np.logaddexp.reduce(metrics.log_sigmoid(z) + logs, axis=0)
    negative = np.logaddexp.reduce(metrics.log_sigmoid(-z) + logs, axis=0)
    return positive - negative


def mean_ranks(z: np.ndarray, single: bool) -> np.ndarray:
    """Logits (N, C) whose softmax (or sigmoid) follows the mean midranks of members (M, N, C)."""
    if single and z.shape[-1] == 2:
        z = z - z[..., ::-1]
    elif single:
        z = metrics.log_softmax(z)
    ranks = np.apply_along_axis(midranks, 1, z).mean(axis=0)
    logits = np.log(ranks)
    return logits if single else logits - np.log1p(-ranks)


def fit_weights(members: Sequence[ArrayLike], labels: ArrayLike, task: str) -> np.ndarray:
    """Weights (M,) on the simplex of the lowest log-loss of the weighted mean of the members' probabilities.

    Pass out-of-fold logits (N, C). The EM step of mixtures, w_m <- w_m * mean(p_m / mixture), which never raises the
    loss, taken to a power while that lowers it too; ends where convexity proves it within 1e-9 nats of the optimum.
    Never worse than the best member, which is returned alone unless the mixture is better.
    """
    z, y = stacked(members), np.asarray(labels).astype(np.int64)
    wanted = z.shape[1:2] if task == "single_label" else z.shape[1:]
    if y.shape != wanted:
        raise ValueError(f"labels: got shape {y.shape}, expected {wanted} for {task}")
    if task == "single_label":
        log_p = metrics.log_softmax(z)[:, np.arange(len(y)), y]
    else:
        log_p = metrics.log_sigmoid(np.where(y, z, -z)).reshape(len(z), -1)
    top = log_p.max(axis=0)  # log_p (M, N) of what happened, or (M, N * C)
    p = np.exp(log_p - top)  # one scale for all members of a row moves no weight

    def loss(weights: np.ndarray) -> float:
        return float(-(np.log(weights @ p) + top).mean())

    weights, power = np.full(len(z), 1 / len(z)), 1.0
    for _ in range(1000):
        gain = p @ (1 / (weights @ p)) / p.shape[1]  # (M,), weights @ gain = 1
        if gain.max() - 1 <= 1e-9:  # at least the distance to the optimum (Jensen)
            break
        before = loss(weights)
        while True:
            log_w = np.log(weights) + power * np.log(np.maximum(gain, 1e-300))
            new = np.maximum(np.exp(log_w - log_w.max()), 1e-12)
            new /= new.sum()
            if power == 1 or loss(new) <= before:
                break
            power = max(1.0, power / 4)
        weights, power = new, power * 1.5
    weights = np.where(weights < 1e-9, 0, weights)  # its loss is infinite where only a dropped member explains a row
    weights = weights / weights.sum()
    alone = -log_p.mean(axis=1)
    with np.errstate(divide="ignore"):
        better = loss(weights) < alone.min() - 1e-12
    return weights if better else np.eye(len(z))[alone.argmin()]


if __name__ == "__main__":
    ddp.launch(main)
