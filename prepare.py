"""What a training run reads and checks before its model is loaded: for train.py, and for all the runs of folds.py."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import bases
import chains
import ddp
import losses
import prompts
import seals
import splits
import token_store
import trained
from configs import TrainConfig
from errors import UserError, warning
from labelling import Labels
from splits import Split

ALONE = ddp.World(0, 1, None)


@dataclass
class Material:
    """The rows of a config's files, tokenized, and what their labels mean."""

    rows: Split  # of train_data
    val: Split | None  # of val_data
    labels: Labels
    tokenizer: object


def read(cfg: TrainConfig, say: Callable, world: ddp.World = ALONE) -> tuple[TrainConfig, Material]:
    """The config with its prompt as text, and the rows. Raises UserError for what is wrong with files, base or adapter.

    say: prints what is worth knowing about the rows.
    """
    if cfg.prompt:
        cfg = trained.prompted(cfg, bases.load_tokenizer(bases.need_base(cfg.base)))
        say(f"prompt {cfg.prompt} ({prompts.digest(cfg.text)}):\n{cfg.text}")
    rows, val, labels = splits.read(cfg, say)
    tokenizer = bases.load_tokenizer(bases.need_base(cfg.base))
    trained.check_model(cfg, labels, tokenizer)
    for name, split in (("train_data", rows), ("val_data", val)):
        if split:
            split.tokens, report = token_store.tokenize(cfg, tokenizer, split.rows, world)
            split.uncut = np.array(report.lengths)
            say(f"{name}: {report}")
    tokenizer.model_max_length = cfg.max_length  # as others read it from a save
    return cfg, Material(rows, val, labels, tokenizer)


def check(cfg: TrainConfig, train: Split, judges: Split, classes: int) -> str:
    """Raise UserError for thresholds, weights, evaluations or earlier runs that do not fit its rows; returns a note."""
    refuse_idle_thresholds(cfg, classes)
    losses.label_weights(cfg.task, cfg.class_weights, cfg.pos_weight, train.labels, classes)
    splits.periodic_rows(cfg, judges.labels, classes)
    return chains.check_chain(cfg, train, judges)


def refuse_idle_thresholds(cfg: TrainConfig, classes: int) -> None:
    """Raise UserError for a threshold of more than two classes, of which the largest score decides."""
    if cfg.task == "single_label" and cfg.thresholds == "global" and classes > 2:
        raise UserError(f"--thresholds global has no effect on {classes} classes: the largest score decides")


def untrained_labels(task: str, labels: np.ndarray, names: tuple[str, ...]) -> str:
    """A warning for labels that no training row has, or an empty string."""
    if task == "regression":
        return ""
    counts = losses.label_counts(task, labels, len(names))
    absent = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if not absent:
        return ""
    return warning(f"no training row has the label {', '.join(absent)}", "add such rows, or leave it out")


def write(folder: Path, cfg: TrainConfig, material: Material, problems: dict) -> None:
    """What a run's folder holds before its first step: its labels, its split, and what is wrong with its rows."""
    labels, rows = material.labels, material.rows
    known = {"values": labels.values, "names": labels.names, "shares": splits.class_shares(rows, labels).tolist()}
    seals.write(folder / "labels.json", known)
    if not cfg.folds > 0 > cfg.fold:  # a family over all folds has one split in each of its runs
        seals.write(folder / "split.csv", splits.split_csv(cfg, rows, material.val))
    if problems:
        seals.write(folder / "audit.json", json.dumps(problems, ensure_ascii=False, indent=1) + "\n")
