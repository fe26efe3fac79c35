"""Runs that start from other runs (--init_from): what they take over, and whether their validation rows are unseen."""

from pathlib import Path

import audit
import checkpoint
import files
import labelling
import seals
import splits
import spool
import trained
from configs import TrainConfig
from errors import Untrusted, UserError, warning


def start_from(path: Path, cfg: TrainConfig, labels: labelling.Labels, model) -> str:
    """Give a new model the best adapter and head of another run (--init_from), strictly; returns a report.

    Raises UserError where that run has other labels, another shape or another base.
    """
    other, other_labels = trained.run_facts(path)
    save = trained.best_save(path)
    if (other.task, other_labels.values) != (cfg.task, labels.values):
        raise UserError(f"--init_from {path}: it has another task or other labels: {other.task} {other_labels.values}")
    try:
        trained.check_base(model, save.manifest["base"], cfg.base)
        return f"starts from {save.folder}: {trained.read_classifier(save.folder, model)}"
    except Untrusted as e:
        raise UserError(f"--init_from {path}: it does not fit these settings: {e}") from None


def chain(path: str) -> list[Path]:
    """The runs that a run started from one after the other, oldest first, itself last; empty for an empty path."""
    runs = []
    while path and Path(path) not in runs:
        runs.append(Path(path))
        path = trained.run_facts(runs[-1])[0].init_from
    return runs[::-1]


def check_chain(cfg: TrainConfig, train: splits.Split, judges: splits.Split) -> str:
    """Raise UserError where texts that judge this run were trained on by a run that it starts from (--init_from).

    Returns a note on texts that it trains on again, or a warning where the earlier rows cannot be read any more.
    """
    if not cfg.init_from:
        return ""
    own, judging, seen = _normal_texts(cfg, train), _normal_texts(cfg, judges), set()
    for run in chain(cfg.init_from):
        try:
            learned, judged = _texts_of(run, cfg)
        except (OSError, ValueError) as e:
            problem = f"cannot check whether {run} was trained on validation rows of this run ({e})"
            return warning(problem, "put its training file back, or do not trust scores that jump")
        leaked = len(learned & judging)
        if leaked and judged != judging:
            raise UserError(
                f"--init_from {run}: {leaked:,} validation rows of this run were trained on there: keep its split "
                "(the same --val_data, or the same --val_size, --split_seed and --group_column)"
            )
        seen |= learned & own
    return f"note: {len(seen):,} training rows were seen before by --init_from {cfg.init_from}" if seen else ""


def _texts_of(run, cfg):
    """The texts that a run was trained on and those that judged it, read again and rendered as `cfg` does.

    Raises UserError where the files are gone, or hold other rows or columns by now.
    """
    other, _ = trained.run_facts(run)
    rows, val, _ = splits.read(other, lambda *words: None)
    train, judges = splits.cut(other, rows, val, recorded=run)
    seals.read(run / "split.csv")
    recorded = {row["id"] for row in files.read_rows(str(run / "split.csv"), "init_from") if row["part"] == "train"}
    if not recorded <= set(train.ids):
        raise UserError(f"{other.train_data} has changed since")
    files.need_columns(spool.joined([train.rows, judges.rows]), files.template_columns(cfg.text), str(run), "init_from")
    return _normal_texts(cfg, train), _normal_texts(cfg, judges)


def _normal_texts(cfg, part):
    """Digests of the different texts of a split, but for case and white space."""
    return {audit.digest_of(audit.normal_form(text)) for text in splits.texts(cfg, part.rows)}


def chain_table(cfg: TrainConfig, result: dict, say) -> list[dict]:
    """The runs that a run started from one after the other, and itself: rows and metrics, printed as a table."""
    kept = {"run": "", "train_data": "", "train_rows": 0, "metrics": {}}
    links = []
    for run in chain(cfg.init_from):
        known = checkpoint.load_json(run / "result.json") if checkpoint.finished(run) else {}
        links.append({**kept, "run": str(run), "train_data": trained.run_facts(run)[0].train_data, **known})
    links.append({**kept, "train_data": cfg.train_data, **result})
    names = [key for key in dict.fromkeys((cfg.metric, "accuracy", "roc_auc", "log_loss")) if key in result["metrics"]]
    say(f"{'rows':>9} " + " ".join(f"{name:>10}" for name in names) + "  run")
    for link in links:
        scores = [link["metrics"].get(name, float("nan")) for name in names]
        say(f"{link['train_rows']:>9,} " + " ".join(f"{score:10.4f}" for score in scores) + f"  {link['run']}")
    return [{name: link[name] for name in kept} for link in links]
