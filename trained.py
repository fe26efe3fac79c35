"""A trained model on disk."""

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import bases
import checkpoint
import cli
import configs
import data
import ddp
import decide
import evaluate
import files
import labelling
import lora
import model as models
import numerics
import peft_format
import prompts
from configs import TrainConfig
from errors import Untrusted, UserError, nearest

# ---- labels and predictions -----------------------------------------------------------------------------------------


def threshold_kind(cfg: TrainConfig) -> str:
    """The thresholds that are fitted: a label's own raise macro-F1 but lower micro-F1; a shared one raises both."""
    if cfg.thresholds != "auto":
        return cfg.thresholds
    return "none" if cfg.task != "multi_label" else "per_class" if cfg.metric == "macro_f1" else "global"


def decided(task: str, decision: decide.Decision | None, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, probabilities (N, C)) of logits (N, C), by a decision, or else by argmax or probability 0.5."""
    if task == "regression":
        return logits[:, 0], np.zeros((len(logits), 0))
    return decide.apply(decision or decide.plain(task, logits.shape[1]), logits)


# ---- classifiers on disk --------------------------------------------------------------------------------------------


def prompted(cfg, tokenizer):
    """A config with its named prompt as text, its words where a head of label words has none, its kept fields.

    Raises UserError for a chat template that cannot say it.
    """
    prompt = prompts.PROMPTS.get(cfg.prompt)
    if prompt is None:
        near = nearest(cfg.prompt, prompts.PROMPTS)
        raise UserError(f"--prompt {cfg.prompt}: expected one of {', '.join(prompts.PROMPTS)}{near}")
    try:
        changes = {"text": prompts.as_text(prompt, tokenizer)}
    except ValueError as e:
        raise UserError(f"--prompt {cfg.prompt}: {e}") from None
    changes |= {"kept": prompt.kept} if not getattr(cfg, "kept", True) else {}
    changes |= {"label_words": prompt.words} if cfg.head == "label_words" and not cfg.label_words else {}
    return replace(cfg, **changes)


def words_of(cfg: TrainConfig, labels: labelling.Labels, tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each class's words for a head of label words; empty for a linear head."""
    if cfg.head != "label_words":
        return ()
    words = cfg.label_words or labels.names
    if len(words) != len(labels.names):
        raise UserError(f"--label_words names {len(words)} words for {len(labels.names)} classes: {labels.names}")
    return data.label_word_ids(tokenizer, cfg.text, words)


def adapter_of(cfg: TrainConfig, saved: tuple[str, ...]) -> lora.Adapter | None:
    """The adapter that a config describes, None with rank 0. saved: modules of the head that it trains whole."""
    if not cfg.rank:
        return None
    task = "CAUSAL_LM" if cfg.head == "label_words" else "SEQ_CLS"
    plain = cfg.targets, cfg.rank, cfg.alpha, cfg.lora_dropout, cfg.bias, cfg.rslora
    return lora.Adapter(*plain, saved=saved, task=task, base=cfg.base)


def check_model(cfg: TrainConfig, labels: labelling.Labels, tokenizer, adapter=None, shapes=None) -> None:
    """Check a config's base, head and adapter on a skeleton, before any weight is loaded.

    adapter, shapes: an adapter of its own and the shapes of its tensors. Raises UserError for what does not fit.
    """
    bases.need_vocabulary(cfg.base, len(tokenizer))
    bare = models.skeleton(cfg.base, len(labels.names), cfg.pooling, words_of(cfg, labels, tokenizer))
    models.check_structure(bare, cfg.train_layers, cfg.max_length)
    try:
        mine = adapter or adapter_of(cfg, models.head_to_save(bare))
        if mine:
            lora.inject(bare, mine)
        if shapes is not None:
            peft_format.match_keys(bare, shapes)
    except ValueError as e:
        raise UserError(f"--base {cfg.base}: {e}" if adapter else f"--targets {','.join(cfg.targets)}: {e}") from None


def new_classifier(
    cfg: TrainConfig, labels: labelling.Labels, tokenizer, device: torch.device, precision: str, adapter=None
) -> models.Classifier:
    """The classifier that a config describes, with fresh adapters and head drawn from its seed, on its device.

    adapter: one read from a file, in the place of the config's.
    """
    model = models.load_classifier(
        cfg.base,
        len(labels.names),
        device,
        numerics.weight_dtype(device, precision),
        cfg.pooling,
        cfg.head_dropout,
        words_of(cfg, labels, tokenizer),
        cfg.quant,
        numerics.DTYPES[precision],
        cfg.seed,
    )
    adapter = adapter or adapter_of(cfg, models.head_to_save(model))
    try:
        if adapter:
            models.add_adapter(model, adapter)
        else:
            models.train_layers(model, cfg.train_layers)
    except ValueError as e:  # what only the weights tell: a part of the head that the base lacks is trained whole
        raise UserError(f"--targets {','.join(cfg.targets)}: {e}") from None
    return model


def write_whole(folder: Path, model, tokenizer, config: dict, dtype: torch.dtype | None = None) -> None:
    """A whole model as transformers loads it: safetensors in `dtype` (None: each as it is), config.json, tokenizer."""
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in models.state(model).items()}
    checkpoint.save_tensors(folder / "model.safetensors", tensors)
    if dtype:
        config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    checkpoint.save_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)


def write_adapter(folder: Path, model, tokenizer) -> None:
    """An adapter in PEFT's format, and the tokenizer."""
    checkpoint.save_json(folder / "adapter_config.json", peft_format.adapter_config(model.adapter))
    checkpoint.save_tensors(folder / "adapter_model.safetensors", peft_format.adapter_state(model))
    tokenizer.save_pretrained(folder)


def write_classifier(folder: Path, model: models.Classifier, tokenizer, labels: labelling.Labels) -> None:
    """All that a save needs to be loaded alone: an adapter in PEFT's format or the whole model, and the tokenizer."""
    if lora.adapters(model):
        checkpoint.save_json(folder / "adapter_config.json", peft_format.adapter_config(model.adapter))
        checkpoint.save_tensors(folder / "adapter_model.safetensors", peft_format.adapter_state(model))
    else:
        tensors = {n: t.cpu().contiguous() for n, t in models.state(model).items()}
        checkpoint.save_tensors(folder / "model.safetensors", tensors)
        pad = data.end_of_text(tokenizer, padding=True)
        checkpoint.save_json(folder / "config.json", models.classifier_config(model, labels.names, pad=pad))
    tokenizer.save_pretrained(folder)


def read_classifier(folder: Path, model: models.Classifier) -> str:
    """Load what write_classifier wrote into a model of the same config, strictly; returns a report of an adapter's.

    Raises Untrusted when anything is missing, left over, misshapen or not finite.
    """
    try:
        if (folder / "adapter_model.safetensors").exists():
            return peft_format.load_adapter_state(model, checkpoint.load_tensors(folder / "adapter_model.safetensors"))
        tensors = checkpoint.load_tensors(folder / "model.safetensors")
        differ = sorted(tensors.keys() ^ models.state(model).keys())
        if differ:
            raise ValueError(f"{len(differ)} tensors of the save or of the model have no counterpart ({differ[0]})")
        model.load_state_dict(tensors, strict=False)
        return f"{len(tensors)} tensors"
    except (ValueError, RuntimeError) as e:
        raise Untrusted(f"{folder}: {e}") from None


def export(folder: Path, model, tokenizer, config: dict, dtype: torch.dtype, about: dict) -> None:
    """Merge a model's adapter and write it for others to load.

    A new or empty folder appears whole, sealed by a manifest with the facts `about`. In a folder that holds files, such
    as a base's config and tokenizer, they are replaced one by one, the weights last.
    """
    lora.merge(model)
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)

    def write(hidden: Path) -> None:
        write_whole(hidden, model, tokenizer, config, dtype)

    if not folder.is_dir() or not any(folder.iterdir()):
        checkpoint.save(folder, write, about, keep=0)
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as hidden:
        write(Path(hidden))
        for path in sorted(Path(hidden).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            checkpoint.fs_rename(path, folder / path.name)


def export_run(path: Path, run: "Run") -> str:
    """Write a run as a plain transformers model into a folder: its adapter merged, in the dtype that it ran in.

    Raises UserError where transformers' own class could not give the same logits. Returns the class that loads it.
    """
    model, pooling = run.model, models.transformers_pooling(run.model)
    if model.pooling not in pooling:
        raise UserError(f"--export: {model.architecture} pools {' or '.join(pooling)}, this run {model.pooling}")
    lora.merge(model)
    run.tokenizer.model_max_length = run.config.max_length
    dtype = model.backbone.get_input_embeddings().weight.dtype
    pad = data.end_of_text(run.tokenizer, padding=True)
    config = models.classifier_config(model, run.labels.names, str(dtype).removeprefix("torch."), pad)

    def write(folder: Path) -> None:
        tensors = {n: t.to("cpu", dtype).contiguous() for n, t in models.state(model).items()}
        checkpoint.save_tensors(folder / "model.safetensors", tensors)
        checkpoint.save_json(folder / "config.json", config)
        run.tokenizer.save_pretrained(folder)

    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path.absolute(), write, {"exported": str(run.path)}, keep=0)
    return model.architecture


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trained classifier, ready to predict."""

    path: Path
    config: TrainConfig
    labels: labelling.Labels
    model: models.Classifier
    tokenizer: object
    world: ddp.World
    precision: str
    saves: tuple[Path, ...] = ()  # of a family of runs: the best save of each, whose logits are averaged
    decision: decide.Decision | None = None  # thresholds and calibration; None: argmax, or probability 0.5

    def decided(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(predictions, probabilities (N, C)) of logits (N, C); of a regression its numbers (N,), and no columns."""
        return decided(self.config.task, self.decision, logits)

    def logits(self, rows: list[dict[str, str]], max_tokens: int = 8192, seconds: float = 0.0):
        """fp32 logits (N, C) of rows that have the template's columns, and what tokenization did to them.

        seconds: a limit, 0 for none; rows that no save reached in time are NaN.
        """
        end = time.perf_counter() + seconds
        cfg = self.config
        tokens, report = data.tokenize(self.tokenizer, cfg.text, rows, cfg.max_length, cfg.kept, cfg.budgets)
        found, saves = [], self.saves if len(self.saves) > 1 else (None,)
        for left, save in zip(range(len(saves), 0, -1), saves, strict=True):
            if save:
                read_classifier(save, self.model)
            share = max(1e-3, (end - time.perf_counter()) / left) if seconds else 0.0
            found.append(evaluate.score(self.model, tokens, self.world, self.precision, max_tokens, share))
        if not seconds:
            return np.mean(found, axis=0, dtype=np.float32), report
        known = np.isfinite(found)
        sums = np.where(known, found, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
        return np.where(known.any(axis=0), sums, np.nan).astype(np.float32), report

    def predict(self, texts: list, max_tokens: int = 8192) -> list[dict]:
        """Label and display name (multi_label: lists of them), probabilities and logits (both in the order of `labels`)
        of each text; a regression's score.

        texts: strings, where the template has one column, or rows as dicts of its columns.
        """
        columns = prompts.fields(self.config.text)
        if len(columns) > 1 and any(isinstance(t, str) for t in texts):
            raise UserError(f"this run reads the columns {', '.join(columns)}: give a dict of them for each row")
        rows = [{columns[0]: t} if isinstance(t, str) else dict(t) for t in texts]
        if not rows:
            return []
        files.need_columns(rows, columns, "texts", "input")
        files.decode_bytes_literals(rows, columns)
        logits, _ = self.logits(rows, max_tokens)
        if self.config.task == "regression":
            return [{"score": float(z)} for z in logits[:, 0]]
        predicted, probabilities = self.decided(logits)
        shown = labelling.Labels(self.labels.names, self.labels.names)
        values, names = (labelling.answers(self.config.task, predicted, known) for known in (self.labels, shown))
        words = ("labels", "names") if self.config.task == "multi_label" else ("label", "name")
        return [
            {words[0]: value, words[1]: name, "probabilities": p.tolist(), "logits": z.tolist()}
            for value, name, p, z in zip(values, names, probabilities, logits, strict=True)
        ]


def members(path: Path) -> dict[str, Path]:
    """Scaffold: name -> folder of each run of a family, {"": path} for a plain run."""
    path = Path(path)
    if (path / "family.json").is_file():
        return {n: path / p for n, p in checkpoint.load_json(path / "family.json")["members"].items()}
    raw = cli.raw_config(path)
    folds = [f"fold_{i}" for i in range(raw.get("folds", 0))] if raw.get("fold") == "all" else []
    seeds = [f"seed_{s}" for s in raw.get("seeds", ())]
    names = [f"{s}_{f}" for s in seeds for f in folds] or seeds or folds
    return {n: path / n for n in names} or {"": path}


def run_facts(path: Path) -> tuple[TrainConfig, labelling.Labels]:
    """The config and labels of a run, before any weight is loaded. Raises UserError when it is no classifier."""
    if not (path / "config.json").is_file() or not (path / "labels.json").is_file():
        hint = "; a run of cpt.py writes text: --generate" if (path / "texts.json").is_file() else ""
        raise UserError(f"run {path}: no classification run (expected config.json and labels.json in it){hint}")
    facts = checkpoint.load_json(path / "labels.json")
    return cli.read_config(TrainConfig, path), labelling.Labels(tuple(facts["values"]), tuple(facts["names"]))


def load_run(
    path: str | Path, world: ddp.World | None = None, precision: str = "auto", merge: bool = False, quant: str = ""
) -> Run:
    """The best save of a run, on this process's device, verified file by file and against its base; of a family over
    folds or seeds the saves of all its runs, whose mean logits it gives.

    quant: another way to store the base than the run's. Raises UserError when there is no such run, Untrusted when
    nothing in it can be trusted or its base has changed.
    """
    path, world = Path(path), world or ddp.setup()
    cfg, labels = run_facts(path)
    names = members(path)
    saves = tuple(checkpoint.trusted(folder / "best") for folder in names.values())
    if None in saves:
        lacks = path / list(names)[saves.index(None)]
        raise UserError(f"run {lacks}: it holds no best/ save yet; go on with python train.py --resume {path}")
    if len(saves) > 1 and merge:
        raise UserError(f"--merge: {path} is {len(saves)} runs; name one of them, such as {path / list(names)[0]}")
    folder = saves[0]
    cfg, tokenizer = replace(cfg, quant=quant or cfg.quant), bases.load_tokenizer(str(folder))
    precision, _ = numerics.choose_precision(precision, world.device)
    adapter = (
        peft_format.read_adapter_config(checkpoint.load_json(folder / "adapter_config.json")) if cfg.rank else None
    )
    decision = read_decision(path, cfg.task, len(labels.names))
    model = new_classifier(cfg, labels, tokenizer, world.device, precision, adapter)
    for save in saves:
        check_base(model, checkpoint.verify(save)["base"], cfg.base)
    read_classifier(folder, model)
    return _ready(Run(path, cfg, labels, model, tokenizer, world, precision, saves, decision), merge)


def validation_rows(path: Path, cfg: TrainConfig, labels: labelling.Labels) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids, targets, logits (N, C)) of a run's val_predictions.csv. Raises UserError when it has none."""
    rows = files.read_rows(str(path / "val_predictions.csv"), "runs")
    flat, where = replace(cfg, label_column="label", label_columns=()), str(path / "val_predictions.csv")
    columns = [f"logit_{v}" for v in labels.values] or ["prediction"]
    lost = [c for c in ("id", "label", *columns) if c not in rows[0]]
    if lost:
        raise Untrusted(f"{where}: no column {', '.join(lost)}")
    logits = [labelling.encode_numbers([row[c] for row in rows], where) for c in columns]
    targets = labelling.encode_targets(flat, rows, labels, where)
    targets = targets if cfg.task == "regression" else targets.astype(np.int64)
    return [row["id"] for row in rows], targets, np.stack(logits, axis=1)


def read_decision(path: Path, task: str, classes: int) -> decide.Decision | None:
    """The decision of a run, None where it has none. Raises Untrusted for a file that is not one of this run's."""
    try:
        found = decide.Decision.from_json((path / "decision.json").read_text(encoding="utf-8"))
        if (found.task, found.classes) != (task, classes):
            raise ValueError(f"it is of {found.classes} classes of {found.task}, expected {classes} of {task}")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise Untrusted(f"{path / 'decision.json'}: {e}") from None


def _ready(run: Run, merge: bool) -> Run:
    if merge:
        lora.merge(run.model)
    run.model.eval().requires_grad_(False)
    return run


def start_from(path: Path, cfg: TrainConfig, labels: labelling.Labels, model: models.Classifier) -> str:
    """Give a new model the best adapter and head of another run (--init_from), strictly; returns a report.

    Raises UserError where that run has other labels, another shape or another base.
    """
    other, theirs = run_facts(path)
    folder = checkpoint.trusted(path / "best") if list(members(path)) == [""] else None
    if folder is None:
        raise UserError(f"--init_from {path}: it holds no best/ save (of a family name one of its runs)")
    if (other.task, theirs.values) != (cfg.task, labels.values):
        raise UserError(f"--init_from {path}: its task or labels are others: {other.task} {theirs.values}")
    try:
        check_base(model, checkpoint.verify(folder)["base"], cfg.base)
        return f"starts from {folder}: {read_classifier(folder, model)}"
    except Untrusted as e:
        raise UserError(f"--init_from {path}: it does not fit these settings: {e}") from None


def chain(path: str) -> list[Path]:
    """The runs that a run started from one after the other, oldest first, itself last; empty for an empty path."""
    found = []
    while path and Path(path) not in found:
        found.append(Path(path))
        path = run_facts(found[-1])[0].init_from
    return found[::-1]


def check_chain(cfg: TrainConfig, train, judges) -> str:
    """Raise UserError where rows that judge (by ids) were trained on by a run that this one starts from; returns a note
    on those that it trains on again.
    """
    again, here = set(), os.path.realpath(cfg.train_data)
    train, judges = train.ids, judges.ids  # scaffold
    for run in chain(cfg.init_from):
        if not (run / "split.csv").is_file() or len(set(judges)) < len(judges):
            return f"warning: whether {run} was trained on validation rows of this run cannot be told by its ids"
        if os.path.realpath(run_facts(run)[0].train_data) != here or cfg.val_data:
            continue
        seen = {row["id"] for row in files.read_rows(str(run / "split.csv"), "init_from") if row["part"] == "train"}
        if seen & set(judges):
            raise UserError(
                f"--init_from {run}: {len(seen & set(judges)):,} validation rows of this run were trained on there: "
                f"keep its split (--split {run / 'split.csv'}, or the same --balance, --val_size and --split_seed)"
            )
        again |= seen & set(train)
    return f"note: {len(again):,} training rows were seen before by --init_from {cfg.init_from}" if again else ""


def check_base(model: models.Classifier, saved: dict, base: str) -> None:
    """Raise Untrusted when the base is not the one that the save was trained on."""
    differs = bases.compare_fingerprints(saved, model.base_fingerprint)
    if differs:
        raise Untrusted(f"base {base} is not the one this run was trained on: {'; '.join(differs[:3])}")


def fit_decision(cfg: TrainConfig, run: Path, logits: np.ndarray, labels: np.ndarray, world) -> dict:
    """Fit thresholds and calibration on the validation logits and keep them in the run; scores that no row's own label
    had a part in (5 folds), without and with them. Nothing for a regression, or where there are too few rows.
    """
    if cfg.task == "regression" or len(labels) < 10:
        return {}
    targets, kind = labels.astype(np.int64), threshold_kind(cfg)
    fitted_on = "out-of-fold" if cfg.folds and cfg.fold < 0 else "validation"
    decision = decide.fit_decision(cfg.task, logits, targets, kind, fitted_on)
    scores, _, _ = decide.cross_fitted(cfg.task, logits, targets, seed=cfg.seed, kind=kind)
    if world.rank == 0:
        checkpoint.write_atomic(run / "decision.json", decision.to_json())
    for name, values in scores.items():
        when = "argmax or probability 0.5" if name == "before" else "thresholds and calibration of the other folds"
        ddp.say(world, f"{when}: " + ", ".join(f"{k} {v:.4f}" for k, v in values.items()))
    return {"undecided": scores["before"], "decided": scores["after"]}


def find_run(cfg) -> Path:
    """The run named first by --runs, or the newest finished one. Raises UserError when there is none."""
    if cfg.runs:
        return Path(cfg.runs[0])
    one, facts = ("cpt", ("config.json", "labels.json")) if cfg.generate else ("train", ("labels.json",))
    newest = checkpoint.newest_finished(cfg.outputs, *facts)
    if newest is None:
        found = f"no finished run of {one}.py under {cfg.outputs}/"
        raise UserError(f"{found}: train one (python {one}.py), or name one with --runs")
    return newest
