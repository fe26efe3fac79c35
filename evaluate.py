"""Score rows and gather them; write and read classifiers. For train, infer and Python users.

from evaluate import load_run
run = load_run("outputs/tiny__base/tiny/run_0")
run.predict(["What is 2 + 2?"])            # [{"label": "0", "name": "0", "probabilities": [...], "logits": [...]}]
"""

import os
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import checkpoint
import configs
import data
import ddp
import decide
import lora
import losses
import metrics
import model as models
import prompts
from configs import TrainConfig, UserError


class Degenerate(RuntimeError):
    """Scores that cannot be right."""

    exit_status = 5


# ---- scoring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(
    model, tokens: data.Tokens, world: ddp.World, precision: str, max_tokens: int, seconds: float = 0.0
) -> np.ndarray:
    """fp32 logits (N, C) of all rows in their order, on every rank, each row scored once.

    Micro-batches are cut by length, the same for any number of ranks, and shared out in turn. seconds: a limit, 0 for
    none; short rows then come first, and those that were not reached in time are NaN.
    """
    was_training, started = model.training, time.perf_counter()
    model.eval()
    rows, logits = [], []
    batches = data.pack_by_length(tokens.lengths, max_tokens)
    for j, chosen in enumerate(batches[::-1] if seconds else batches):
        if seconds and time.perf_counter() - started > seconds:
            break
        if j % world.size == world.rank:
            with models.autocast(world.device, precision):
                found = model(data.pack(tokens, chosen, world.device))
            logits.append(found.cpu() if seconds else found)  # a clock that does not wait for the GPU says nothing
            rows.append(chosen)
    model.train(was_training)
    mine = torch.cat(logits).cpu().numpy() if logits else np.zeros((0, model.outputs), np.float32)
    index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return ddp.gather_rows(world, index, mine, len(tokens.lengths), partial=seconds > 0)


def next_token_loss(lm, batch: data.Batch) -> torch.Tensor:
    """Sum of the next-token losses (nats) of a packed micro-batch; no token is predicted from another sequence."""
    hidden = models.hidden_states(lm.base_model, batch)[batch.targets - 1]  # (P, D) states that predict a token
    return losses.lm_cross_entropy(hidden, models.vocabulary_head(lm), batch.input_ids[batch.targets])[0]


@torch.no_grad()
def language_scores(lm, tokens: data.Tokens, world: ddp.World, precision: str, max_tokens: int) -> dict[str, float]:
    """loss (mean nats a token), perplexity and bits_per_byte over all segments, the same on every rank."""
    was_training = lm.training
    lm.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)  # read once, at the end
    for j, rows in enumerate(data.pack_by_length(tokens.lengths, max_tokens)):
        if j % world.size == world.rank:
            with models.autocast(world.device, precision):
                total += next_token_loss(lm, data.pack(tokens, rows, world.device, predict=True)).double()
    lm.train(was_training)
    (total,) = ddp.sum_over_ranks(world, [float(total)])
    loss = total / float(tokens.targets.sum())
    scores = {"loss": loss, "perplexity": float(np.exp(min(loss, 700.0)))}
    return scores | ({"bits_per_byte": total / np.log(2) / tokens.bytes} if tokens.bytes else {})


# ---- generation -----------------------------------------------------------------------------------------------------


def stop_ids(lm, tokenizer) -> set[int]:
    """Tokens that end a completion: EOS of the tokenizer and of the base, and what ends a turn of the chat template."""
    own = lm.generation_config.eos_token_id
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if tokenizer.chat_template:
        try:
            turns = prompts.chat(tokenizer, [prompts.QUESTION, {"role": "assistant", "content": "."}])
        except ValueError:
            turns = []
        end = turns[-1][1].lstrip() if len(turns) > 1 and not turns[-1][0] else ""
        first = tokenizer(end, add_special_tokens=False)["input_ids"][:1]
        found.update(set(first) & set(tokenizer.get_added_vocab().values()))
    return {token for token in found if isinstance(token, int)}


def encode_prompts(tokenizer, rows: list, max_length: int, chat: bool = True, rules: list = ()):
    """Ids of prompts given as pieces, as data.encode makes them; an end that the tokenizer adds by itself is left out,
    for nothing could follow it. Of a plain prompt over max_length the last tokens are kept: those are to be continued.
    """
    tokens, report = data.encode(tokenizer, rows, max_length if chat else 10**9, rules=rules)
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    ends = mask[::-1].index(0)
    ids = [tokens.row(i).tolist() for i in range(len(rows))]
    ids = [row[: len(row) - ends] or row for row in ids]
    for i, row in enumerate(ids):
        if len(row) > max_length:
            bos = row[:1] if row[0] == tokenizer.bos_token_id else []
            ids[i] = bos + row[len(row) - max_length + len(bos) :]
            report.cut_rows, report.cut_tokens = report.cut_rows + 1, report.cut_tokens + len(row) - max_length
    return ids, report


def completion_text(tokenizer, prompt: list[int], ids: list[int]) -> str:
    """The text of a completion without special tokens, as it stands behind its prompt: some tokenizers drop the space
    before a text's first word.
    """
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before, whole = (tokenizer.decode(part, **options) for part in (prompt, prompt + ids))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(ids, **options)


def generate(
    lm, tokenizer, rows: list[list[int]], precision="fp32", most=256, temperature=0.0, top_p=1.0, seed=0, stops=None
) -> list[str]:
    """The completions of one batch of encoded prompts as text; see models.complete. stops: ids, None for stop_ids.

    A model in training is left exactly as it was.
    """
    how = precision, most, temperature, top_p, seed
    stops, pad = stop_ids(lm, tokenizer) if stops is None else stops, data.end_of_text(tokenizer, padding=True)
    found = models.complete(lm, rows, pad, stops, *how)
    return [completion_text(tokenizer, row, ids) for row, ids in zip(rows, found, strict=True)]


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


def by_value(cfg: TrainConfig, column: str, rows: list, logits: np.ndarray, targets: np.ndarray, say) -> dict:
    """The metrics of the rows of each value of a column (AUC per rule, say), printed, and their mean over values."""
    if not column:
        return {}
    data.need_columns(rows, [column], "rows", "by_column")
    values = np.array([row[column] for row in rows])
    found = {v: metrics.of_task(cfg.task, logits[values == v], targets[values == v]) for v in np.unique(values)}
    every, width = set().union(*found.values()), max(len(v[:60]) for v in found)
    names = [n for n in dict.fromkeys((cfg.metric, "roc_auc", "accuracy", "mse")) if n in every]
    for value, scores in found.items():
        words = ", ".join(f"{n} {scores[n]:.4f}" for n in names if n in scores)
        say(f"{column} {value[:60]:<{width}} {scores['rows']:>7,} rows: {words}")
    mean = {n: float(np.mean([s[n] for s in found.values() if n in s])) for n in names}
    return {"by_column": {str(v): s for v, s in found.items()}, "mean_by_column": mean}


# ---- classifiers on disk --------------------------------------------------------------------------------------------


def prompted(cfg, tokenizer):
    """A config with its named prompt as text, its words where a head of label words has none, its kept fields.

    Raises UserError for a chat template that cannot say it.
    """
    prompt = prompts.PROMPTS.get(cfg.prompt)
    if prompt is None:
        near = configs._nearest(cfg.prompt, prompts.PROMPTS)
        raise UserError(f"--prompt {cfg.prompt}: expected one of {', '.join(prompts.PROMPTS)}{near}")
    try:
        changes = {"text": prompts.as_text(prompt, tokenizer)}
    except ValueError as e:
        raise UserError(f"--prompt {cfg.prompt}: {e}") from None
    changes |= {"kept": prompt.kept} if not getattr(cfg, "kept", True) else {}
    changes |= {"label_words": prompt.words} if cfg.head == "label_words" and not cfg.label_words else {}
    return replace(cfg, **changes)


def words_of(cfg: TrainConfig, labels: data.Labels, tokenizer) -> tuple[tuple[int, ...], ...]:
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


def check_model(cfg: TrainConfig, labels: data.Labels, tokenizer, adapter=None, shapes=None) -> None:
    """Check a config's base, head and adapter on a skeleton, before any weight is loaded.

    adapter, shapes: an adapter of its own and the shapes of its tensors. Raises UserError for what does not fit.
    """
    models.need_vocabulary(cfg.base, len(tokenizer))
    bare = models.skeleton(cfg.base, len(labels.names), cfg.pooling, words_of(cfg, labels, tokenizer))
    models.check_structure(bare, cfg.train_layers, cfg.max_length)
    try:
        mine = adapter or adapter_of(cfg, models.head_to_save(bare))
        if mine:
            lora.inject(bare, mine)
        if shapes is not None:
            lora.match_keys(bare, shapes)
    except ValueError as e:
        raise UserError(f"--base {cfg.base}: {e}" if adapter else f"--targets {','.join(cfg.targets)}: {e}") from None


def new_classifier(
    cfg: TrainConfig, labels: data.Labels, tokenizer, device: torch.device, precision: str, adapter=None
) -> models.Classifier:
    """The classifier that a config describes, with fresh adapters and head drawn from its seed, on its device.

    adapter: one read from a file, in the place of the config's.
    """
    model = models.load_classifier(
        cfg.base,
        len(labels.names),
        device,
        models.weight_dtype(device, precision),
        cfg.pooling,
        cfg.head_dropout,
        words_of(cfg, labels, tokenizer),
        cfg.quant,
        models.DTYPES[precision],
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


def write_classifier(folder: Path, model: models.Classifier, tokenizer, labels: data.Labels) -> None:
    """All that a save needs to be loaded alone: an adapter in PEFT's format or the whole model, and the tokenizer."""
    if lora.adapters(model):
        checkpoint.save_json(folder / "adapter_config.json", lora.adapter_config(model.adapter))
        checkpoint.save_tensors(folder / "adapter_model.safetensors", lora.adapter_state(model))
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
            return lora.load_adapter_state(model, checkpoint.load_tensors(folder / "adapter_model.safetensors"))
        tensors = checkpoint.load_tensors(folder / "model.safetensors")
        differ = sorted(tensors.keys() ^ models.state(model).keys())
        if differ:
            raise ValueError(f"{len(differ)} tensors of the save or of the model have no counterpart ({differ[0]})")
        model.load_state_dict(tensors, strict=False)
        return f"{len(tensors)} tensors"
    except (ValueError, RuntimeError) as e:
        raise checkpoint.Untrusted(f"{folder}: {e}") from None


def export(path: Path, run: "Run") -> str:
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
    labels: data.Labels
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
            found.append(score(self.model, tokens, self.world, self.precision, max_tokens, share))
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
        data.need_columns(rows, columns, "texts", "input")
        data.decode_bytes_literals(rows, columns)
        logits, _ = self.logits(rows, max_tokens)
        if self.config.task == "regression":
            return [{"score": float(z)} for z in logits[:, 0]]
        predicted, probabilities = self.decided(logits)
        shown = data.Labels(self.labels.names, self.labels.names)
        values, names = (data.answers(self.config.task, predicted, known) for known in (self.labels, shown))
        words = ("labels", "names") if self.config.task == "multi_label" else ("label", "name")
        return [
            {words[0]: value, words[1]: name, "probabilities": p.tolist(), "logits": z.tolist()}
            for value, name, p, z in zip(values, names, probabilities, logits, strict=True)
        ]


def run_facts(path: Path) -> tuple[TrainConfig, data.Labels]:
    """The config and labels of a run, before any weight is loaded. Raises UserError when it is no classifier."""
    if not (path / "config.json").is_file() or not (path / "labels.json").is_file():
        hint = "; a run of cpt.py writes text: --generate" if (path / "texts.json").is_file() else ""
        raise UserError(f"run {path}: no classification run (expected config.json and labels.json in it){hint}")
    facts = checkpoint.load_json(path / "labels.json")
    return configs.read_config(TrainConfig, path), data.Labels(tuple(facts["values"]), tuple(facts["names"]))


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
    names = configs.members(cfg)
    saves = tuple(checkpoint.trusted(path / name / "best") for name in names)
    if None in saves:
        lacks = path / list(names)[saves.index(None)]
        raise UserError(f"run {lacks}: it holds no best/ save yet; go on with python train.py --resume {path}")
    if len(saves) > 1 and merge:
        raise UserError(f"--merge: {path} is {len(saves)} runs; name one of them, such as {path / list(names)[0]}")
    folder = saves[0]
    cfg, tokenizer = replace(cfg, quant=quant or cfg.quant), data.load_tokenizer(str(folder))
    precision, _ = models.choose_precision(precision, world.device)
    adapter = lora.read_adapter_config(checkpoint.load_json(folder / "adapter_config.json")) if cfg.rank else None
    decision = read_decision(path, cfg.task, len(labels.names))
    model = new_classifier(cfg, labels, tokenizer, world.device, precision, adapter)
    for save in saves:
        check_base(model, checkpoint.verify(save)["base"], cfg.base)
    read_classifier(folder, model)
    return _ready(Run(path, cfg, labels, model, tokenizer, world, precision, saves, decision), merge)


def validation_rows(path: Path, cfg: TrainConfig, labels: data.Labels) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(ids, targets, logits (N, C)) of a run's val_predictions.csv. Raises UserError when it has none."""
    rows = data.read_rows(str(path / "val_predictions.csv"), "runs")
    flat, where = replace(cfg, label_column="label", label_columns=()), str(path / "val_predictions.csv")
    columns = [f"logit_{v}" for v in labels.values] or ["prediction"]
    lost = [c for c in ("id", "label", *columns) if c not in rows[0]]
    if lost:
        raise checkpoint.Untrusted(f"{where}: no column {', '.join(lost)}")
    logits = [data.encode_numbers([row[c] for row in rows], where) for c in columns]
    targets = data.encode_targets(flat, rows, labels, where)
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
        raise checkpoint.Untrusted(f"{path / 'decision.json'}: {e}") from None


def _ready(run: Run, merge: bool) -> Run:
    if merge:
        lora.merge(run.model)
    run.model.eval().requires_grad_(False)
    return run


def start_from(path: Path, cfg: TrainConfig, labels: data.Labels, model: models.Classifier) -> str:
    """Give a new model the best adapter and head of another run (--init_from), strictly; returns a report.

    Raises UserError where that run has other labels, another shape or another base.
    """
    other, theirs = run_facts(path)
    folder = checkpoint.trusted(path / "best") if len(configs.members(other)) == 1 else None
    if folder is None:
        raise UserError(f"--init_from {path}: it holds no best/ save (of a family name one of its runs)")
    if (other.task, theirs.values) != (cfg.task, labels.values):
        raise UserError(f"--init_from {path}: its task or labels are others: {other.task} {theirs.values}")
    try:
        check_base(model, checkpoint.verify(folder)["base"], cfg.base)
        return f"starts from {folder}: {read_classifier(folder, model)}"
    except checkpoint.Untrusted as e:
        raise UserError(f"--init_from {path}: it does not fit these settings: {e}") from None


def chain(path: str) -> list[Path]:
    """The runs that a run started from one after the other, oldest first, itself last; empty for an empty path."""
    found = []
    while path and Path(path) not in found:
        found.append(Path(path))
        path = run_facts(found[-1])[0].init_from
    return found[::-1]


def check_chain(cfg: TrainConfig, train: list[str], judges: list[str]) -> str:
    """Raise UserError where rows that judge (by ids) were trained on by a run that this one starts from; returns a note
    on those that it trains on again.
    """
    again, here = set(), os.path.realpath(cfg.train_data)
    for run in chain(cfg.init_from):
        if not (run / "split.csv").is_file() or len(set(judges)) < len(judges):
            return f"warning: whether {run} was trained on validation rows of this run cannot be told by its ids"
        if os.path.realpath(run_facts(run)[0].train_data) != here or cfg.val_data:
            continue
        seen = {row["id"] for row in data.read_rows(str(run / "split.csv"), "init_from") if row["part"] == "train"}
        if seen & set(judges):
            raise UserError(
                f"--init_from {run}: {len(seen & set(judges)):,} validation rows of this run were trained on there: "
                f"keep its split (--split {run / 'split.csv'}, or the same --balance, --val_size and --split_seed)"
            )
        again |= seen & set(train)
    return f"note: {len(again):,} training rows were seen before by --init_from {cfg.init_from}" if again else ""


def check_base(model: models.Classifier, saved: dict, base: str) -> None:
    """Raise Untrusted when the base is not the one that the save was trained on."""
    differs = models.compare_fingerprints(saved, model.base_fingerprint)
    if differs:
        raise checkpoint.Untrusted(f"base {base} is not the one this run was trained on: {'; '.join(differs[:3])}")


def preflight(run: Run, rows: list[dict[str, str]], known: np.ndarray | None, max_tokens: int, most: int = 16) -> str:
    """Score a few rows before all of them; returns how long those will take, and what the few say.

    The rows are spread over the input, of both classes where labels are known. Raises Degenerate where scores are not
    finite, do not depend on the row, or the adapter does not move them.
    """
    order = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    if known is not None and known.ndim == 1 and len(np.unique(known)) > 1:
        values = np.unique(known)[:8]
        order = np.unique(np.concatenate([np.flatnonzero(known == v)[: most // len(values)] for v in values]))
    few = [rows[i] for i in order]
    run.logits(few[:1], max_tokens)  # warms up
    started = time.perf_counter()
    logits, report = run.logits(few, max_tokens)
    seconds = time.perf_counter() - started
    reason, said = decide.degenerate(logits), ""
    if lora.adapters(run.model) and np.isfinite(logits).all():
        moved = probe(run, few, logits)
        if not moved and not reason:
            reason = "the adapter does not move the logits: another model's, or one never trained?"
        said = f"the adapter moves the logits by up to {moved:.3g}; "
    if reason:
        raise Degenerate(f"preflight of {len(few)} rows: {reason}; nothing was written (--force goes on all the same)")
    length = sum(len(row[c]) for row in rows for c in prompts.fields(run.config.text))
    share = length / max(1, sum(len(row[c]) for row in few for c in prompts.fields(run.config.text)))
    return f"preflight of {len(few)} rows: {said}{len(rows):,} rows take about {seconds * share / 60:.1f} min"


def probe(run: Run, rows: list[dict[str, str]], live: np.ndarray) -> float:
    """How far the adapter moves the logits of a few rows, live with it; 0 where that is rounding."""
    with lora.disable(run.model):
        moved = float(np.abs(live - run.logits(rows)[0]).max())
    return moved if moved > 1e-6 * max(1.0, float(np.abs(live).max())) else 0.0


def foreign(adapter: lora.Adapter | None, base: str) -> str:
    """Why an adapter seems to be another model's, by the base it names, or an empty string.

    Every part of that name (qwen2.5, 0.5b, instruct) should occur somewhere in the given base's path.
    """
    path = re.sub(r"[^a-z0-9.]", "", base.lower())
    wanted = re.findall(r"[a-z0-9.]+", Path(adapter.base).name.lower()) if adapter and adapter.base else []
    lost = [part for part in wanted if part not in path]
    return f"the adapter was trained on {adapter.base}, not on {base}" if lost else ""


def weak_tokens(model, tokenizer, tokens: data.Tokens) -> str:
    """A warning for tokens in use whose embedding was never trained (its norm is almost 0), or an empty string.

    Raises UserError for embeddings that are not finite: they make every score of their rows NaN.
    """
    table = getattr(model, "backbone", model).get_input_embeddings()
    used = torch.from_numpy(np.unique(tokens.ids).astype(np.int64))
    norms = getattr(table, "base_layer", table).weight[used].detach().float().norm(dim=1).cpu()
    weak = ~(norms.isfinite() & (norms > 0.01 * norms[norms.isfinite()].median()))
    names = tokenizer.convert_ids_to_tokens(used[weak if norms.isfinite().all() else ~norms.isfinite()].tolist())
    if not norms.isfinite().all():
        raise UserError(f"the base's embeddings of {names[:5]} are not finite: its weights are damaged")
    return f"warning: the base never learned the tokens {', '.join(names[:5])}, which occur here" if names else ""


# ---- models that are no run: a base, or a base and a public adapter -------------------------------------------------


@dataclass
class Given:
    """A base and perhaps an adapter, checked on their headers; no weight is loaded yet."""

    config: TrainConfig | configs.CptConfig
    labels: data.Labels | None
    tokenizer: object
    adapter: lora.Adapter | None
    folder: Path | None  # of the adapter


def given_model(cfg: configs.InferConfig) -> Given:
    """What --base and --adapter name, as a run's facts. Raises UserError for what does not fit together."""
    adapter, folder, shapes = None, None, {}
    if cfg.adapter:
        folder = models.find_adapter(cfg.adapter)
        adapter, shapes = adapter_header(folder)
    base = cfg.base or (adapter.base if adapter else "")
    where = models.need_base(base)
    tokenizer = data.load_tokenizer(str(folder) if folder and (folder / "tokenizer.json").is_file() else where)
    ends = (".score.weight", "classifier.weight", ".out_proj.weight")
    rows = [s[0] for k, s in shapes.items() if k.endswith(ends) and len(s) == 2]
    names = cfg.label_names or models.stored_labels(base, rows[0] if rows else 0)
    if not names:
        raise UserError("the classes are not known: name them with --label_names (and --head label_words)")
    labels = data.Labels(names if len(names) > 1 else (), names)
    cfg = prompted(cfg, tokenizer) if cfg.prompt else cfg
    same = {n: getattr(cfg, n) for n in ("prompt", "text", "label_column", "id_column", "head", "label_words", "quant")}
    same |= {"kept": prompts.PROMPTS[cfg.prompt].kept if cfg.prompt else ()}
    same |= {"task": "regression" if len(names) == 1 else "single_label", "max_length": cfg.max_length, "base": base}
    known = TrainConfig(pooling=models.stored_pooling(base), rank=int(bool(adapter)), train_layers=0, **same)
    check_model(known, labels, tokenizer, adapter, shapes if adapter else None)
    return Given(known, labels, tokenizer, adapter, folder)


def load_given(given: Given, world: ddp.World, precision: str = "auto", merge: bool = False) -> tuple[Run, str]:
    """The given model, ready to predict, and a report of what matched.

    Raises UserError when a part of the head is nowhere, Untrusted for an adapter that holds no usable values.
    """
    precision, _ = models.choose_precision(precision, world.device)
    cfg, adapter, report = given.config, given.adapter, "no adapter: the base alone"
    model = new_classifier(cfg, given.labels, given.tokenizer, world.device, precision, adapter)
    saved = adapter.saved if adapter else ()
    lost = [n for n in model.fresh if not lora.within(n, saved)]
    if lost:
        raise UserError(
            f"{len(lost)} tensors of the head ({', '.join(lost[:3])}) are neither in the base nor in the adapter: "
            "train a head with train.py, or score words with --head label_words"
        )
    if adapter:
        report = load_adapter(given.folder, adapter, model, cfg.base)
    run = Run(given.folder or Path(cfg.base), cfg, given.labels, model, given.tokenizer, world, precision)
    return _ready(run, merge), report


def adapter_header(folder: Path) -> tuple[lora.Adapter, dict]:
    """An adapter's config and the shapes of its tensors. Raises UserError for what cannot be honoured."""
    shapes = checkpoint.tensor_shapes(folder / "adapter_model.safetensors")
    try:
        return lora.read_adapter_config(checkpoint.load_json(folder / "adapter_config.json")), shapes
    except ValueError as e:
        raise UserError(f"--adapter {folder}: {e}") from None


def load_adapter(folder: Path, adapter: lora.Adapter, model, base: str) -> str:
    """Load an adapter into the model that it was injected into, and say what matched.

    Raises Untrusted when it does not fit or was never trained.
    """
    matched = read_classifier(folder, model)
    report = f"adapter {folder} (r {adapter.rank}, alpha {adapter.alpha:g}): {matched}"
    idle = [n for n, m in lora.adapters(model).items() if m.idle()]
    if len(idle) == len(lora.adapters(model)):
        raise checkpoint.Untrusted(f"{folder}: every update is zero; the adapter was never trained")
    report += f"; {len(idle)} updates are zero" if idle else ""
    if foreign(adapter, base):
        report += f"\nwarning: {foreign(adapter, base)}: every tensor fits all the same"
    return report


# ---- language models: a run of cpt.py, a base, or a base and an adapter ---------------------------------------------


def given_language_model(cfg: configs.InferConfig, run: Path | None) -> Given:
    """What a run of cpt.py, or else --base and --adapter, name: a whole base, or a base with an adapter on it.

    Its config is a CptConfig. Raises UserError for what does not fit together, Untrusted for saves that cannot be
    trusted.
    """
    known, folder = configs.CptConfig(base=cfg.base, quant=cfg.quant), None
    if run:
        known, folder = _run_of_cpt(run)
    elif cfg.adapter:
        folder = models.find_adapter(cfg.adapter)
    adapter, shapes = adapter_header(folder) if folder else (None, {})
    if folder and checkpoint.load_json(folder / "adapter_config.json").get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{folder}: an adapter of task {adapter.task}, which writes no text; leave --generate out")
    base = known.base or adapter.base
    where = models.need_base(base)
    tokenizer = data.load_tokenizer(str(folder) if folder and (folder / "tokenizer.json").is_file() else where)
    models.need_vocabulary(base, len(tokenizer))
    turns = folder / "chat_template.jinja" if folder else None  # of an adapter without a tokenizer of its own
    if turns and models.own_file(turns):
        tokenizer.chat_template = turns.read_text(encoding="utf-8")
    bare = models.language_skeleton(base)
    try:
        if adapter:
            lora.inject(bare, adapter)
            lora.match_keys(bare, shapes)
    except ValueError as e:
        raise UserError(f"--base {base}: {e}") from None
    return Given(replace(known, base=base), None, tokenizer, adapter, folder)


def _run_of_cpt(run: Path) -> tuple[configs.CptConfig, Path | None]:
    """A run's config and its best save, or its last: where that is an adapter, its folder, or else as the base."""
    if (run / "labels.json").exists() or not (run / "config.json").is_file():
        raise UserError(f"run {run}: no run of cpt.py, whose models write text; leave --generate out or name another")
    known = configs.read_config(configs.CptConfig, run)
    folder = checkpoint.trusted(run / "best") or checkpoint.trusted(run / "last")
    if folder is None:
        raise UserError(f"run {run}: it holds no save yet; go on with python cpt.py --resume {run}")
    whole = (folder / "model.safetensors").exists()
    return (replace(known, base=str(folder), quant="none"), None) if whole else (known, folder)


def load_language_model(given: Given, world: ddp.World, precision: str):
    """(the language model, ready to write; a report of what matched).

    Raises Untrusted for an adapter of no values, and for a run's on another base than it was trained on.
    """
    dtype, cfg = models.weight_dtype(world.device, precision), given.config
    lm = models.load_language_model(cfg.base, world.device, dtype, None, cfg.quant, models.DTYPES[precision])
    report = f"{cfg.base}, no adapter"
    if given.adapter:
        if cfg.rank:  # of a run, whose save was verified
            check_base(lm, checkpoint.load_json(given.folder / checkpoint.MANIFEST)["base"], cfg.base)
        lora.inject(lm, given.adapter)
        lora.train_only(lm)
        report = load_adapter(given.folder, given.adapter, lm, cfg.base)
    return lm.eval().requires_grad_(False), report
