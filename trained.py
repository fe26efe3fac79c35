"""A trained model on disk: build it, save it, load it, predict with it, export it.

from trained import load_run
run = load_run("outputs/tiny__base/tiny/run_0")
run.predict(["What is 2 + 2?"])            # [{"label": "0", "name": "0", "probabilities": [...], "logits": [...]}]
"""

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bases
import checkpoint
import cli
import data
import ddp
import decide
import disk
import evaluate
import files
import labelling
import language
import lora
import model as models
import numerics
import parts
import peft_format
import prompts
import seals
from configs import TrainConfig
from decide import Decision
from errors import Untrusted, UserError
from labelling import Labels
from metrics import Array
from model import Classifier

WINDOW = 2**14  # rows that are encoded and scored together: more do not take more memory
# transformers' names of tasks: by them its pipeline takes a softmax of the logits, a sigmoid, or neither.
PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}

# ---- what a config means for a model --------------------------------------------------------------------------------


def prompted(cfg: TrainConfig, tokenizer) -> TrainConfig:
    """The config with the text of its named prompt, and the prompt's kept fields and words where it has none.

    Raises UserError for an unknown prompt and for a chat template that cannot render it.
    """
    try:
        prompt = prompts.find(cfg.prompt)
        text = prompts.as_text(prompt, tokenizer)
    except ValueError as e:
        raise UserError(f"--prompt {cfg.prompt}: {e}") from None
    words = prompt.words if cfg.head == "label_words" else ()
    return replace(cfg, text=text, kept=cfg.kept or prompt.kept, label_words=cfg.label_words or words)


def _head_of(cfg, labels, tokenizer):
    """The head that a config describes. Raises UserError for label words that are not one for each class."""
    classes, ids = len(labels.names), ()
    if cfg.head == "label_words":
        words = cfg.label_words or labels.names
        if len(words) != classes:
            raise UserError(f"--label_words names {len(words)} words for {classes} classes: {labels.names}")
        ids = data.label_word_ids(tokenizer, cfg.text, words)
    return models.Head(classes, cfg.pooling, cfg.head_dropout, ids)


def _adapt(model, cfg, adapter, shapes=None):
    """Inject an adapter that was read from a file, or else the config's, or train layers where it has none.

    shapes: the tensors of the file, to be checked. Raises UserError for what does not fit the model.
    """
    flag = f"--base {cfg.base}" if adapter else f"--targets {','.join(cfg.targets)}"
    if cfg.rank and not adapter:
        shape = cfg.targets, cfg.rank, cfg.alpha, cfg.lora_dropout, cfg.bias, cfg.rslora
        task = "CAUSAL_LM" if cfg.head == "label_words" else "SEQ_CLS"
        adapter = lora.Adapter(*shape, saved=models.head_to_save(model), task=task, base=cfg.base)
    try:
        if adapter:
            models.add_adapter(model, adapter)
        else:
            models.train_layers(model, cfg.train_layers)
        if shapes is not None:
            peft_format.match_keys(model, shapes)
    except ValueError as e:
        raise UserError(f"{flag}: {e}") from None


def check_model(cfg: TrainConfig, labels: Labels, tokenizer, adapter=None, shapes=None) -> None:
    """Check a config's base, head and adapter on a skeleton, before any weight is loaded.

    adapter, shapes: an adapter read from a file, and the shapes of its tensors. Raises UserError for what does not fit.
    """
    bases.need_vocabulary(cfg.base, len(tokenizer))
    bare = models.skeleton(cfg.base, _head_of(cfg, labels, tokenizer), cfg.train_layers, cfg.max_length)
    _adapt(bare, cfg, adapter, shapes)


def new_classifier(cfg: TrainConfig, labels: Labels, tokenizer, device, precision: str, adapter=None) -> Classifier:
    """The classifier that a config describes, with fresh adapters and head drawn from its seed, on its device.

    adapter: one read from a file, instead of the config's.
    """
    head, dtype = _head_of(cfg, labels, tokenizer), numerics.weight_dtype(device, precision)

    # Weights that are trained start from the stored values, not rounded to half precision and back.
    whole = not (cfg.rank or adapter) and cfg.train_layers != 0
    place = (torch.device("cpu"), torch.float32) if whole else (device, dtype)
    model = models.load_classifier(cfg.base, head, *place, cfg.quant, numerics.DTYPES[precision], cfg.seed)
    model.config.problem_type = PROBLEM_TYPES[cfg.task]
    _adapt(model, cfg, adapter)  # what the base lacks of a head is known now, and trained whole
    frozen = [p for p in model.parameters() if not p.requires_grad]
    for p in frozen if whole else ():
        p.data = p.data.to(dtype)
    return model.to(device)


def threshold_kind(cfg: TrainConfig) -> str:
    """The thresholds to fit: one for each label raises macro-F1 but lowers micro-F1; a shared one raises both."""
    if cfg.thresholds != "auto":
        return cfg.thresholds
    if cfg.task != "multi_label":
        return "none"
    return "per_class" if cfg.metric == "macro_f1" else "global"


def decided(task: str, decision: Decision | None, logits: Array) -> tuple[Array, Array]:
    """(predictions, probabilities (N, C)) of logits (N, C), by a decision, or else by argmax or probability 0.5.

    Of a regression: its numbers (N,), and probabilities without columns.
    """
    if task == "regression":
        return logits[:, 0], logits[:, :0]
    return decide.apply(decision or decide.plain(task, logits.shape[1]), logits)


# ---- models as files ------------------------------------------------------------------------------------------------


def write_whole(folder: Path, model, tokenizer, config: dict, dtype: torch.dtype | None = None) -> None:
    """A whole model as transformers loads it: safetensors in `dtype` (None: each as it is), config.json, tokenizer."""
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in models.state(model).items()}
    checkpoint.save_tensors(folder / "model.safetensors", tensors)
    if dtype:
        config = {**config, "dtype": str(dtype).removeprefix("torch.")}
    checkpoint.save_json(folder / "config.json", config)
    if getattr(model, "generation_config", None):  # it writes text, and must know where to stop
        checkpoint.save_json(folder / "generation_config.json", language.generation_settings(model, tokenizer))
    write_tokenizer(folder, tokenizer)


def write_adapter(folder: Path, model, tokenizer) -> None:
    """An adapter in PEFT's format, and the tokenizer."""
    checkpoint.save_json(folder / "adapter_config.json", peft_format.adapter_config(model.adapter))
    checkpoint.save_tensors(folder / "adapter_model.safetensors", peft_format.adapter_state(model))
    write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer) -> None:
    """The tokenizer's files; when the disk is full, its own writers raise various errors."""
    with disk.told(folder / "tokenizer.json", len(tokenizer.backend_tokenizer.to_str().encode())):
        tokenizer.save_pretrained(folder)


def write_classifier(folder: Path, model: Classifier, tokenizer, labels: Labels) -> None:
    """Everything that a save needs to be loaded alone: the adapter or the whole model, and the tokenizer."""
    if lora.adapters(model):
        write_adapter(folder, model, tokenizer)
    else:
        pad = data.end_of_text(tokenizer, padding=True)
        write_whole(folder, model, tokenizer, models.classifier_config(model, labels.names, pad=pad))


def read_classifier(folder: Path, model) -> str:
    """Load a save into a model of the same config, strictly; returns a report of what matched.

    Raises Untrusted when anything is missing, left over, misshapen or not finite.
    """
    try:
        adapter = folder / "adapter_model.safetensors"
        if adapter.exists():
            return peft_format.load_adapter_state(model, peft_format.plain_keys(checkpoint.load_tensors(adapter)))
        tensors = checkpoint.load_tensors(folder / "model.safetensors")
        differ = sorted(tensors.keys() ^ models.state(model).keys())
        if differ:
            raise ValueError(f"{len(differ)} tensors of the save or of the model have no counterpart ({differ[0]})")
        model.load_state_dict(tensors, strict=False)
        return f"{len(tensors)} tensors"
    except (ValueError, RuntimeError) as e:
        raise Untrusted(f"{folder}: {e}") from None


def read_save(save: checkpoint.Save, model) -> None:
    """Load a save of this run. Raises Untrusted when it does not fit, or the base has changed."""
    if "base" in save.manifest:  # not where cpt.py trains the whole base
        check_base(model, save.manifest["base"], "of this run")
    read_classifier(save.folder, model)


def export(folder: Path, model, tokenizer, config: dict, dtype: torch.dtype, about: dict) -> None:
    """Write a plain model, its adapter merged, for others to load; sealed by a manifest with the facts `about`.

    A new or empty folder appears whole. In one that holds files, such as a base's config and tokenizer, they are
    replaced one by one, the weights last.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    filled = folder.is_dir() and any(folder.iterdir())
    target = folder / ".export" if filled else folder
    checkpoint.save(target, lambda hidden: write_whole(hidden, model, tokenizer, config, dtype), about, keep=0)
    if filled:
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
    config = models.classifier_config(model, run.labels.names, pad=data.end_of_text(tokenizer, padding=True, need=True))
    dtype = model.backbone.get_input_embeddings().weight.dtype
    export(folder, model, tokenizer, config, dtype, {"exported": str(run.path)})
    return model.architecture


# ---- runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A trained classifier, ready to predict."""

    path: Path
    config: TrainConfig
    labels: Labels
    model: Classifier
    tokenizer: object
    world: ddp.World
    precision: str
    saves: tuple[Path, ...]  # its best save; of a family of runs that of each, whose logits are averaged
    decision: Decision | None = None  # thresholds and calibration; None: argmax, or probability 0.5

    def __post_init__(self):
        self.model.eval().requires_grad_(False)

    def logits(self, rows: files.Rows, max_tokens: int = 8192, seconds: float = 0.0, output: str = ""):
        """fp32 logits (N, C) of rows that have the template's columns, and a report of their tokenization.

        seconds: a time limit, 0 for none; rows that no save reached in time are NaN. output: the file that they are
        for, beside which progress is kept. Many rows are encoded and scored window by window.
        """
        end = time.perf_counter() + seconds
        report, scores = data.TokenReport(), []
        is_quiet = len(rows) <= WINDOW or self.world.rank != 0
        with tqdm(total=len(rows), desc="scoring", unit=" rows", disable=is_quiet) as bar:  # on stderr
            for start in range(0, max(1, len(rows)), WINDOW):
                window = rows[start : start + WINDOW]
                left = seconds and max(1e-3, end - time.perf_counter())
                # No rank stops alone. What no rank has time for is not even encoded.
                if start and seconds and ddp.sum_over_ranks(self.world, float(left <= 1e-3)):
                    own = np.full((len(window), self.model.outputs), np.nan, np.float32)
                    about = data.TokenReport(keys=np.zeros(len(window), np.int64))
                else:
                    own, about = self._window(window, max_tokens, left, output)
                report.add(about)
                scores.append(own)
                bar.update(len(window))
        return np.concatenate(scores), report

    def _window(self, rows, max_tokens, seconds, output):
        """As `logits`, of rows that are encoded together."""
        end, cfg = time.perf_counter() + seconds, self.config
        tokens, report = data.tokenize(self.tokenizer, cfg.text, rows, cfg.max_length, cfg.kept, cfg.budgets)
        report.keys = tokens.keys()
        scores = []
        for done, save in enumerate(self.saves):
            if len(self.saves) > 1:  # they take turns in one model; a single save stays loaded, and may be merged
                read_classifier(save, self.model)
            share = seconds and max(1e-3, (end - time.perf_counter()) / (len(self.saves) - done))
            progress = None
            if output:
                settings = repr(cfg), self.precision, max_tokens, tokens.digest()
                progress = parts.Parts(output, parts.digest_of(self.model, *settings))
            how = self.world, self.precision, max_tokens, share, progress
            scores.append(evaluate.score(self.model, tokens, *how))
        reached = ~np.isnan(scores) if seconds else True
        with warnings.catch_warnings(action="ignore"):  # of rows that no save reached: their mean is NaN
            return np.mean(scores, axis=0, dtype=np.float32, where=reached), report

    def predict(self, texts: Iterable[str | dict], max_tokens: int = 8192) -> list[dict]:
        """Label and display name (multi_label: lists of them), probabilities and logits (both in the order of `labels`)
        of each text; a regression's score.

        texts: strings, where the template has one column, or rows as dicts of its columns; one of them counts as a list
        of one. Raises UserError for anything else.
        """
        task, columns = self.config.task, prompts.fields(self.config.text)
        rows = files.rows_of_texts(texts, columns)
        if not rows:
            return []
        files.decode_bytes_literals(rows, columns)
        logits, _ = self.logits(rows, max_tokens)
        if task == "regression":
            return [{"score": float(z)} for z in logits[:, 0]]
        predicted, probabilities = decided(task, self.decision, logits)
        values = labelling.answers(task, predicted, self.labels)
        names = labelling.answers(task, predicted, replace(self.labels, values=self.labels.names))
        plural = "s" if task == "multi_label" else ""
        keys = f"label{plural}", f"name{plural}", "probabilities", "logits"
        columns = values, names, probabilities.tolist(), logits.tolist()
        return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def run_facts(path: Path) -> tuple[TrainConfig, Labels]:
    """The config and labels of a run, before any weight is loaded. Raises UserError when it is no classifier."""
    if not seals.has(path / "labels.json"):
        cpt = f"a run of cpt.py writes text: python generate.py --runs {path}"
        raise UserError(f"run {path}: no classification run (expected config.json and labels.json in it); {cpt}")
    stored = checkpoint.load_json(path / "labels.json")
    lists = [stored.get(name) for name in ("values", "names")]
    if not all(isinstance(part, list) and all(isinstance(label, str) for label in part) for part in lists):
        raise Untrusted(f"{path / 'labels.json'}: expected lists of strings, values and names")
    return cli.read_config(TrainConfig, path), Labels(*map(tuple, lists))


def members(path: Path) -> dict[str, Path]:
    """Name -> folder of each run of a family over folds or seeds; {"": path} for a single run."""
    family = path / "family.json"
    if seals.has(family):
        folders = checkpoint.load_json(family)["members"]
        return {name: path / folder for name, folder in folders.items()}
    # families made before there was a family.json are described by their config alone
    config = checkpoint.load_json(path / "config.json")
    names = [f"seed_{seed}" for seed in config.get("seeds", ())] or [""]
    if config.get("fold") == "all":
        names = [f"{name}_fold_{fold}".strip("_") for name in names for fold in range(config["folds"])] or names
    return {name: path / name for name in names}


def best_save(run: Path) -> checkpoint.Save:
    """The best save of a single run. Raises UserError where it has none, Untrusted where none can be trusted."""
    save = checkpoint.trusted_of(run, "best")
    if save is None:
        raise UserError(f"run {run}: no best/ save: finish it with train.py --resume {run}; of a family name a member")
    return save


def load_run(
    path: str | Path, world: ddp.World | None = None, precision: str = "auto", quant: str = "", base: str = ""
) -> Run:
    """The best save of a run, on this process's device, verified file by file and against its base; of a family over
    folds or seeds the saves of all its runs, whose mean logits it gives.

    quant: another way to store the base than the run's. base: where the base is now. Raises UserError when there is no
    such run or base, Untrusted when nothing in it can be trusted or its base has changed.
    """
    path, world = Path(path), world or ddp.setup()
    ddp.say(world, seals.note(path))
    cfg, labels = run_facts(path)
    saves = [best_save(run) for run in members(path).values()]
    first = saves[0].folder
    cfg = replace(cfg, quant=quant or cfg.quant, base=base or cfg.base)
    need_base(path, cfg.base)
    tokenizer = bases.load_tokenizer(str(first))
    precision, _ = numerics.choose_precision(precision, world, cfg.base)
    adapter = None
    if cfg.rank:
        adapter = peft_format.read_adapter_config(checkpoint.load_json(first / "adapter_config.json"))
    decision = read_decision(path, cfg.task, len(labels.names))
    model = new_classifier(cfg, labels, tokenizer, world.device, precision, adapter)
    for save in saves:
        check_base(model, save.manifest["base"], cfg.base)
    read_classifier(first, model)
    folders = tuple(save.folder for save in saves)
    return Run(path, cfg, labels, model, tokenizer, world, precision, folders, decision)


def need_base(run: Path, base: str) -> None:
    """Raise UserError where the base of a run cannot be found or read, before any weight is loaded."""
    try:
        bases.need_base(base)
    except UserError as e:
        advice = "if this base moved, name its new folder with --base, or load_run(run, base=...)"
        raise UserError(f"run {run}: {e}; {advice}") from None


def check_base(model, saved: dict, base: str) -> None:
    """Raise Untrusted when the base is not the one that the save was trained on. saved: that one's fingerprint."""
    differs = bases.compare_fingerprints(saved, model.base_fingerprint)
    if differs:
        raise Untrusted(f"base {base} is not the one this run was trained on: {'; '.join(differs[:3])}")


# ---- the decision fitted on validation rows --------------------------------------------------------------------------


def read_decision(path: Path, task: str, classes: int) -> Decision | None:
    """The decision of a run, None where it has none. Raises Untrusted for a file that is not one of this run's."""
    try:
        text = seals.read(path / "decision.json")
        if text is None:
            return None
        decision = Decision.from_json(text.decode())
        if (decision.task, decision.classes) != (task, classes):
            raise ValueError(f"it is of {decision.classes} classes of {decision.task}, expected {classes} of {task}")
        return decision
    except (ValueError, RecursionError) as e:
        raise Untrusted(f"{path / 'decision.json'}: {e}") from None


def fit_decision(cfg: TrainConfig, run: Path, logits: Array, labels: Array, world: ddp.World) -> dict:
    """Fit thresholds and calibration on the validation logits, and keep them in the run.

    Returns scores without and with them, cross-fitted over 5 folds: no row is decided by a fit on its own label.
    Nothing for a regression, or where the rows cannot tell; a line says so.
    """
    if cfg.task == "regression":
        return {}
    problem = decide.unfit(labels)
    if problem:
        ddp.say(world, f"no thresholds, no calibration: {problem}")
        return {}
    kind, rows = threshold_kind(cfg), "out-of-fold" if cfg.folds and cfg.fold < 0 else "validation"
    decision = decide.fit_decision(cfg.task, logits, labels, kind, rows)
    scores, _, _ = decide.cross_fitted(cfg.task, logits, labels, cfg.seed, kind)
    if world.rank == 0:
        seals.write(run / "decision.json", decision.to_json())
    titles = "plain argmax or probability 0.5", "thresholds and calibration, cross-fitted over 5 folds"
    for title, values in zip(titles, scores.values(), strict=True):
        ddp.say(world, f"{title}: " + ", ".join(f"{score} {value:.4f}" for score, value in values.items()))
    return {"undecided": scores["before"], "decided": scores["after"]}
