"""Read a finished run of train.py: its settings, its results, and what it says about the rows that judge it."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import bootstrap
import checkpoint
import decide
import files
import labelling
import metrics
import seals
import splits
import trained
from configs import TrainConfig
from errors import Untrusted, UserError


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

    # cross-fitted: thresholds and calibration of a row come from a fit that the row had no part in
    scores: dict | None = None  # before and after
    decided: np.ndarray | None = None  # predictions by thresholds
    calibrated: np.ndarray | None = None  # probabilities (N, C)

    # from the data files, where they still hold the rows that judged the run
    texts: list[str] | None = None
    groups: dict[str, list[str]] = field(default_factory=dict)  # values of the columns that rows are grouped by
    note: str = ""  # why texts and groups are missing

    # what a report adds
    intervals: dict[str, np.ndarray] = field(default_factory=dict)  # 95% of each metric (2,), of "f1" by class (2, C)
    worst: int = 30  # errors that are listed

    @property
    def binary(self) -> bool:
        return self.cfg.task == "single_label" and len(self.labels.names) == 2

    @property
    def out_of_fold(self) -> bool:
        """Whether it is a family over folds, whose rows were each scored by models that did not see them."""
        return bool(self.cfg.folds) and str(self.cfg.fold) in ("-1", "all")

    @property
    def thresholds(self) -> str:
        """The kind of the run's fitted thresholds, empty where it has none."""
        if self.decision is None or self.decision.kind == "none":
            return ""
        return self.decision.kind

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool; of several labels, all of them."""
        same = self.predicted == self.targets
        return same.all(axis=1) if same.ndim == 2 else same

    def resampled(self, predicted: np.ndarray, ranking: bool, samples: int = 0, seed: int = 0) -> tuple[dict, dict]:
        """Scores of predictions by metric, on all rows and on bootstrap resamples (S,); of "f1" (C,) and (S, C).

        ranking: with AUC and average precision. Equal seeds draw equal rows.
        """
        score = metrics.scorer(self.cfg.task, self.logits, self.targets, predicted, ranking)
        draws = bootstrap.bootstrap(score, len(self.ids), samples, seed)
        return score(np.ones(len(self.ids))), draws

    def worth_ranking(self) -> bool:
        """Whether AUC and average precision are resampled: of many columns it takes a while."""
        return self.logits.shape[1] <= 10 or self.cfg.metric in metrics.RANKING

    def take(self, rows: np.ndarray) -> "Run":
        """The same run on some of its rows."""
        changes = {"groups": {}}
        for name, values in vars(self).items():
            if isinstance(values, np.ndarray):
                changes[name] = values[rows]
            elif name in ("ids", "texts") and values:
                changes[name] = [values[i] for i in rows]
        return replace(self, **changes)


def validation_rows(path: Path, cfg: TrainConfig, labels: labelling.Labels) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids, targets, logits (N, C)) of a run's val_predictions.csv. Raises UserError when it has none."""
    where = str(path / "val_predictions.csv")
    seals.read(Path(where))
    rows = files.read_rows(where, "runs")
    columns = [f"logit_{value}" for value in labels.values] or ["prediction"]
    files.need_columns(rows, ["id", "label", *columns], where, "runs")
    logits = [labelling.encode_numbers([row[column] for row in rows], where) for column in columns]
    flat = replace(cfg, label_column="label", label_columns=())
    targets = labelling.encode_targets(flat, rows, labels, where)
    if cfg.task != "regression":
        targets = targets.astype(np.int64)
    return [row["id"] for row in rows], targets, np.stack(logits, axis=1)


def read_run(path: Path) -> Run:
    """All that a report needs of a run. Raises UserError for a run of cpt.py and for one that is not finished."""
    if seals.has(path / "texts.json"):
        raise UserError(f"run {path} was trained by cpt.py and has no labels: expected a run of train.py")
    cfg, labels = trained.run_facts(path)
    if not checkpoint.finished(path):
        raise UserError(f"run {path} is not finished (no result.json): continue it with --resume {path}")
    try:
        ids, targets, logits = validation_rows(path, cfg, labels)
    except UserError as e:  # the run wrote this file, so it is damaged
        raise Untrusted(str(e)) from None
    predicted, probabilities = trained.decided(cfg.task, None, logits)
    decision = trained.read_decision(path, cfg.task, len(labels.names))
    result = checkpoint.load_json(path / "result.json")
    run = Run(path, cfg, labels, result, decision, ids, targets, logits, predicted, probabilities)
    if decision:
        kind = trained.threshold_kind(cfg)
        fits = decide.cross_fitted(cfg.task, logits, targets, seed=cfg.seed, kind=kind)
        run.scores, run.decided, run.calibrated = fits
    return with_texts(run)


def with_texts(run: Run) -> Run:
    """The run with the texts and groups of its rows, or with a note on why there are none."""
    cfg = run.cfg
    missing = "texts and lengths are left out"
    try:
        rows, val, labels = splits.read(cfg, lambda *words: None)
        judges = rows.judging() if cfg.folds and cfg.fold < 0 else splits.cut(cfg, rows, val)[1]
    except (OSError, ValueError) as e:
        return replace(run, note=f"{missing}: the data cannot be read again: {e}")
    same = judges.ids == run.ids and labels.values == run.labels.values
    if not same or not np.allclose(judges.labels, run.targets):
        return replace(run, note=f"{missing}: the data files no longer hold the rows that judged this run")
    groups = {}
    for column in (cfg.group_column, cfg.by_column):
        if column:
            groups[column] = [row.get(column, "") for row in judges.rows]
    return replace(run, texts=splits.texts(cfg, judges.rows), groups=groups)
