"""A trained model on disk: build it, save it, load it, predict with it, export it.

from trained import load_run
run = load_run("outputs/tiny__base/tiny/run_0")
run.predict(["What is 2 + 2?"])            # [{"label": "0", "name": "0", "probabilities": [...], "logits": [...]}]
"""

import itertools
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import bases
import checkpoint
import cli
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
from errors import Untrusted, UserError

# ---- what a config means for a model --------------------------------------------------------------------------------


def prompted(cfg: TrainConfig, tokenizer) -> TrainConfig:
    """The config with the text of its named prompt, and the prompt's kept fields and words where it has none.

    Raises UserError for an unknown prompt and for a chat template that cannot render it.
    """
    try:
        prompt = prompts.find(cfg.prompt)
        changes = {"text": prompts.as_text(prompt, tokenizer)}
    except ValueError as e:
        raise UserError(f"--prompt {cfg.prompt}: {e}") from None
    if not cfg.kept:
        changes["kept"] = prompt.kept
    if cfg.head == "label_words" and not cfg.label_words:
        changes["label_words"] = prompt.words
    return replace(cfg, **changes)


def words_of(cfg: TrainConfig, labels: labelling.Labels, tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token ids of each class's verbalizer for a head of label words; empty for a linear head."""
    if cfg.head != "label_words":
        return ()
    words = cfg.label_words or labels.names
    if len(words) != len(labels.names):
        raise UserError(f"--label_words names {len(words)} words for {len(labels.names)} classes: {labels.names}")
    return data.label_word_ids(tokenizer, cfg.text, words)


def head_of(cfg: TrainConfig, labels: labelling.Labels, tokenizer) -> models.Head:
    """The head that a config describes."""
    return models.Head(len(labels.names), cfg.pooling, cfg.head_dropout, words_of(cfg, labels, tokenizer))


def adapter_of(cfg: TrainConfig, saved: tuple[str, ...]) -> lora.Adapter | None:
    """The adapter that a config describes, None with rank 0. saved: modules of the head that it trains whole."""
    if not cfg.rank:
        return None
    return lora.Adapter(
        cfg.targets,
        cfg.rank,
        cfg.alpha,
        cfg.lora_dropout,
        cfg.bias,
        cfg.rslora,
        saved=saved,
        task="CAUSAL_LM" if cfg.head == "label_words" else "SEQ_CLS",
        base=cfg.base,
    )


def check_model(cfg: TrainConfig, labels: labelling.Labels, tokenizer, adapter=None, shapes=None) -> None:
    """Check a config's base, head and adapter on a skeleton, before any weight is loaded.

    adapter, shapes: an adapter read from a file, and the shapes of its tensors. Raises UserError for what does not fit.
    """
    bases.need_vocabulary(cfg.base, len(tokenizer))
    bare = models.skeleton(cfg.base, head_of(cfg, labels, tokenizer), cfg.train_layers, cfg.max_length)
    flag = f"--base {cfg.base}" if adapter else f"--targets {','.join(cfg.targets)}"
    try:
        wanted = adapter or adapter_of(cfg, models.head_to_save(bare))
        if wanted:
            lora.inject(bare, wanted)
        if shapes is not None:
            peft_format.match_keys(bare, shapes)
    except ValueError as e:
        raise UserError(f"{flag}: {e}") from None


def new_classifier(
    cfg: TrainConfig, labels: labelling.Labels, tokenizer, device: torch.device, precision: str, adapter=None
) -> models.Classifier:
    """The classifier that a config describes, with fresh adapters and head drawn from its seed, on its device.

    adapter: one read from a file, instead of the config's.
    """
    model = models.load_classifier(
        cfg.base,
        head_of(cfg, labels, tokenizer),
        device,
        numerics.weight_dtype(device, precision),
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
    except ValueError as e:  # known from the weights only: a part of the head that the base lacks is trained whole
        raise UserError(f"--targets {','.join(cfg.targets)}: {e}") from None
    return model


def threshold_kind(cfg: TrainConfig) -> str:
    """The thresholds to fit: one for each label raises macro-F1 but lowers micro-F1; a shared one raises both."""
    if cfg.thresholds != "auto":
        return cfg.thresholds
    if cfg.task != "multi_label":
        return "none"
    return "per_class" if cfg.metric == "macro_f1" else "global"


def decided(task: str, decision: decide.Decision | None, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(predictions, probabilities (N, C)) of logits (N, C), by a decision, or else by argmax or probability 0.5.

    Of a regression: its numbers (N,), and probabilities without columns.
    """
    if task == "regression":
        return logits[:, 0], np.zeros((len(logits), 0))
    return decide.apply(decision or decide.plain(task, logits.shape[1]), logits)


# ---- models as files ------------------------------------------------------------------------------------------------


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
    """Everything that a save needs to be loaded alone: the adapter or the whole model, and the tokenizer."""
    if lora.adapters(model):
        write_adapter(folder, model, tokenizer)
        return
    pad = data.end_of_text(tokenizer, padding=True)
    write_whole(folder, model, tokenizer, models.classifier_config(model, labels.names, pad=pad))


def read_classifier(folder: Path, model) -> str:
    """Load a save into a model of the same config, strictly; returns a report of what matched.

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
    """Write a plain model, its adapter merged, for others to load; sealed by a manifest with the facts `about`.

    A new or empty folder appears whole. In one that holds files, such as a base's config and tokenizer, they are
    replaced one by one, the weights last.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = not folder.is_dir() or not any(folder.iterdir())
    target = folder if fresh else folder / ".export"
    checkpoint.save(target, lambda hidden: write_whole(hidden, model, tokenizer, config, dtype), about, keep=0)
    if not fresh:
        for path in sorted(target.iterdir(), key=lambda path: path.suffix == ".safetensors"):
            checkpoint.fs_rename(path, folder / path.name)
        target.rmdir()


def export_run(folder: Path, run: "Run") -> str:
    """Export a run as transformers' own classifier, in the dtype that it ran in; returns the name of that class.

    Raises UserError where transformers' class would not give the same logits.
    """
    model, tokenizer = run.model, run.tokenizer
    poolings = model.family.poolings
    if model.pooling not in poolings:
        raise UserError(f"--export: {model.architecture} pools {' or '.join(poolings)}, this run {model.pooling}")
    lora.merge(model)
    tokenizer.model_max_length = run.config.max_length
    config = models.classifier_config(model, run.labels.names, pad=data.end_of_text(tokenizer, padding=True))
    dtype = model.backbone.get_input_embeddings().weight.dtype
    export(folder, model, tokenizer, config, dtype, {"exported": str(run.path)})
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

    def logits(self, rows: list[dict[str, str]], max_tokens: int = 8192, seconds: float = 0.0):
        """fp32 logits (N, C) of rows that have the template's columns, and a report of their tokenization.

        seconds: a time limit, 0 for none; rows that no save reached in time are NaN.
        """
        end = time.perf_counter() + seconds
        cfg = self.config
        tokens, report = data.tokenize(self.tokenizer, cfg.text, rows, cfg.max_length, cfg.kept, cfg.budgets)
        # a single save stays loaded, and may be merged; the saves of a family take turns in one model
        saves = self.saves if len(self.saves) > 1 else (None,)
        scores = []
        for done, save in enumerate(saves):
            share = 0.0
            if save:
                read_classifier(save, self.model)
            if seconds:
                share = max(1e-3, (end - time.perf_counter()) / (len(saves) - done))
            scores.append(evaluate.score(self.model, tokens, self.world, self.precision, max_tokens, share))
        reached = np.isfinite(scores) if seconds else True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of rows that no save reached: their mean is NaN
            return np.mean(scores, axis=0, dtype=np.float32, where=reached), report

    def decided(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(predictions, probabilities (N, C)) of logits (N, C): see `decided`."""
        return decided(self.config.task, self.decision, logits)

    def predict(self, texts: list, max_tokens: int = 8192) -> list[dict]:
        """Label and display name (multi_label: lists of them), probabilities and logits (both in the order of `labels`)
        of each text; a regression's score.

        texts: strings, where the template has one column, or rows as dicts of its columns.
        """
        task, columns = self.config.task, prompts.fields(self.config.text)
        if len(columns) > 1 and any(isinstance(text, str) for text in texts):
            raise UserError(f"this run reads the columns {', '.join(columns)}: give a dict of them for each row")
        rows = [{columns[0]: text} if isinstance(text, str) else dict(text) for text in texts]
        if not rows:
            return []
        files.need_columns(rows, columns, "texts", "input")
        files.decode_bytes_literals(rows, columns)
        logits, _ = self.logits(rows, max_tokens)
        if task == "regression":
            return [{"score": float(z)} for z in logits[:, 0]]
        predicted, probabilities = self.decided(logits)
        value, name = ("labels", "names") if task == "multi_label" else ("label", "name")
        display = labelling.Labels(self.labels.names, self.labels.names)
        columns = {
            value: labelling.answers(task, predicted, self.labels),
            name: labelling.answers(task, predicted, display),
            "probabilities": probabilities.tolist(),
            "logits": logits.tolist(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def run_facts(path: Path) -> tuple[TrainConfig, labelling.Labels]:
    """The config and labels of a run, before any weight is loaded. Raises UserError when it is no classifier."""
    if not (path / "config.json").is_file() or not (path / "labels.json").is_file():
        hint = ""
        if (path / "texts.json").is_file():
            hint = f"; a run of cpt.py writes text: python generate.py --runs {path}"
        raise UserError(f"run {path}: no classification run (expected config.json and labels.json in it){hint}")
    stored = checkpoint.load_json(path / "labels.json")
    return cli.read_config(TrainConfig, path), labelling.Labels(tuple(stored["values"]), tuple(stored["names"]))


def members(path: Path) -> dict[str, Path]:
    """Name -> folder of each run of a family over folds or seeds; {"": path} for a single run."""
    if (path / "family.json").is_file():
        folders = checkpoint.load_json(path / "family.json")["members"]
        return {name: path / folder for name, folder in folders.items()}
    # families made before there was a family.json are described by their config alone
    config = checkpoint.load_json(path / "config.json")
    axes = [[f"seed_{seed}" for seed in config.get("seeds", ())]]
    if config.get("fold") == "all":
        axes.append([f"fold_{fold}" for fold in range(config["folds"])])
    names = ["_".join(parts) for parts in itertools.product(*filter(None, axes))]
    return {name: path / name for name in names}


def best_save(run: Path) -> checkpoint.Save:
    """The best save of a single run. Raises UserError where it has none, Untrusted where none can be trusted."""
    save = checkpoint.trusted(run / "best")
    if save is None:
        raise UserError(f"run {run}: it holds no best/ save yet; continue with python train.py --resume {run}")
    return save


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
    runs = list(members(path).values())
    if merge and len(runs) > 1:
        raise UserError(f"--merge: {path} is {len(runs)} runs; name one of them, such as {runs[0]}")
    saves = [best_save(run) for run in runs]
    first, folders = saves[0].folder, tuple(save.folder for save in saves)
    cfg = replace(cfg, quant=quant or cfg.quant)
    tokenizer = bases.load_tokenizer(str(first))
    precision, _ = numerics.choose_precision(precision, world.device)
    adapter = None
    if cfg.rank:
        adapter = peft_format.read_adapter_config(checkpoint.load_json(first / "adapter_config.json"))
    decision = read_decision(path, cfg.task, len(labels.names))
    model = new_classifier(cfg, labels, tokenizer, world.device, precision, adapter)
    for save in saves:
        check_base(model, save.manifest["base"], cfg.base)
    read_classifier(first, model)
    return ready(Run(path, cfg, labels, model, tokenizer, world, precision, folders, decision), merge)


def ready(run: Run, merge: bool) -> Run:
    """The run with its model frozen for prediction, its adapter merged where asked for."""
    if merge:
        lora.merge(run.model)
    run.model.eval().requires_grad_(False)
    return run


def check_base(model, saved: dict, base: str) -> None:
    """Raise Untrusted when the base is not the one that the save was trained on. saved: that one's fingerprint."""
    differs = bases.compare_fingerprints(saved, model.base_fingerprint)
    if differs:
        raise Untrusted(f"base {base} is not the one this run was trained on: {'; '.join(differs[:3])}")


def find_run(run: str, outputs: str, script: str = "train.py") -> Path:
    """The named run, or the newest finished one of a script under `outputs`. Raises UserError when there is none."""
    if run:
        return Path(run)
    markers = ("labels.json",) if script == "train.py" else ("config.json", "labels.json")  # present; absent
    newest = checkpoint.newest_finished(outputs, *markers)
    if newest is None:
        raise UserError(
            f"no finished run of {script} under {outputs}/: train one (python {script}), or name one with --runs"
        )
    return newest


# ---- validation rows and the decision fitted on them ----------------------------------------------------------------


def validation_rows(path: Path, cfg: TrainConfig, labels: labelling.Labels) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids, targets, logits (N, C)) of a run's val_predictions.csv. Raises UserError when it has none."""
    where = str(path / "val_predictions.csv")
    rows = files.read_rows(where, "runs")
    columns = [f"logit_{value}" for value in labels.values] or ["prediction"]
    missing = [column for column in ("id", "label", *columns) if column not in rows[0]]
    if missing:
        raise Untrusted(f"{where}: no column {', '.join(missing)}")
    logits = [labelling.encode_numbers([row[column] for row in rows], where) for column in columns]
    flat = replace(cfg, label_column="label", label_columns=())
    targets = labelling.encode_targets(flat, rows, labels, where)
    if cfg.task != "regression":
        targets = targets.astype(np.int64)
    return [row["id"] for row in rows], targets, np.stack(logits, axis=1)


def read_decision(path: Path, task: str, classes: int) -> decide.Decision | None:
    """The decision of a run, None where it has none. Raises Untrusted for a file that is not one of this run's."""
    try:
        decision = decide.Decision.from_json((path / "decision.json").read_text(encoding="utf-8"))
        if (decision.task, decision.classes) != (task, classes):
            got = f"{decision.classes} classes of {decision.task}"
            raise ValueError(f"it is of {got}, expected {classes} of {task}")
        return decision
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise Untrusted(f"{path / 'decision.json'}: {e}") from None


def fit_decision(cfg: TrainConfig, run: Path, logits: np.ndarray, labels: np.ndarray, world: ddp.World) -> dict:
    """Fit thresholds and calibration on the validation logits, and keep them in the run.

    Returns scores without and with them, cross-fitted over 5 folds: no row is decided by a fit on its own label.
    Nothing for a regression, or where there are too few rows.
    """
    if cfg.task == "regression" or len(labels) < 10:
        return {}
    targets, kind = labels.astype(np.int64), threshold_kind(cfg)
    out_of_fold = cfg.folds and cfg.fold in (-1, "all")
    decision = decide.fit_decision(cfg.task, logits, targets, kind, "out-of-fold" if out_of_fold else "validation")
    scores, _, _ = decide.cross_fitted(cfg.task, logits, targets, seed=cfg.seed, kind=kind)
    if world.rank == 0:
        checkpoint.write_atomic(run / "decision.json", decision.to_json())
    titles = ("plain argmax or probability 0.5", "thresholds and calibration, cross-fitted over 5 folds")
    for title, values in zip(titles, scores.values(), strict=True):
        ddp.say(world, f"{title}: " + ", ".join(f"{score} {value:.4f}" for score, value in values.items()))
    return {"undecided": scores["before"], "decided": scores["after"]}
