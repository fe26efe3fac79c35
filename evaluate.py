"""Score rows and gather them; write and read classifiers. For train, infer and Python users.

from evaluate import load_run
run = load_run("outputs/tiny__base/tiny/run_0")
run.predict(["What is 2 + 2?"])            # [{"label": "0", "name": "0", "probabilities": [...], "logits": [...]}]
"""

from dataclasses import dataclass
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
import model as models
import prompts
from configs import TrainConfig, UserError


class Degenerate(RuntimeError):
    """Scores that cannot be right."""

    exit_status = 5


# ---- scoring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(model, tokens: data.Tokens, world: ddp.World, precision: str, max_tokens: int) -> np.ndarray:
    """fp32 logits (N, C) of all rows in their order, on every rank, each row scored once.

    Micro-batches are cut by length, the same for any number of ranks, and shared out in turn.
    """
    was_training = model.training
    model.eval()
    rows, logits = [], []
    for j, chosen in enumerate(data.pack_by_length(tokens.lengths, max_tokens)):
        if j % world.size == world.rank:
            with models.autocast(world.device, precision):
                logits.append(model(data.pack(tokens, chosen, world.device)))
            rows.append(chosen)
    model.train(was_training)
    mine = torch.cat(logits).cpu().numpy() if logits else np.zeros((0, model.score.out_features), np.float32)
    index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return ddp.gather_rows(world, index, mine, len(tokens.lengths))


def next_token_loss(lm, batch: data.Batch) -> torch.Tensor:
    """Sum of the next-token losses (nats) of a packed micro-batch; no token is predicted from another sequence."""
    keep = torch.ones(len(batch.input_ids), dtype=torch.bool, device=batch.input_ids.device)
    keep[batch.cu_seqlens[1:].long() - 1] = False
    at = keep.nonzero()[:, 0]  # (N,) states that predict a token
    hidden = models.hidden_states(lm.base_model, batch)[at]
    return losses.lm_cross_entropy(hidden, lm.get_output_embeddings().weight, batch.input_ids[at + 1])[0]


@torch.no_grad()
def language_loss(lm, tokens: data.Tokens, world: ddp.World, precision: str, max_tokens: int) -> float:
    """Mean next-token loss in nats over all segments, the same on every rank."""
    was_training = lm.training
    lm.eval()
    total = 0.0
    for j, rows in enumerate(data.pack_by_length(tokens.lengths, max_tokens)):
        if j % world.size == world.rank:
            with models.autocast(world.device, precision):
                total += float(next_token_loss(lm, data.pack(tokens, rows, world.device)))
    lm.train(was_training)
    (total,) = ddp.sum_over_ranks(world, [total])
    return total / float((tokens.lengths - 1).sum())


# ---- classifiers on disk --------------------------------------------------------------------------------------------


def new_classifier(cfg: TrainConfig, classes: int, device: torch.device, precision: str) -> models.Classifier:
    """The classifier that a config describes, with fresh adapters and head, drawn from its seed."""
    backbone = models.load_backbone(cfg.base, device, models.weight_dtype(device, precision))
    torch.manual_seed(cfg.seed)
    model = models.Classifier(backbone, classes, cfg.head_dropout, cfg.pooling)
    if cfg.rank:
        models.add_adapter(model, cfg.targets, cfg.rank, cfg.alpha, cfg.lora_dropout, cfg.bias, cfg.rslora)
    else:
        models.train_layers(model, cfg.train_layers)
    return model


def write_classifier(folder: Path, model: models.Classifier, tokenizer, cfg: TrainConfig, labels: data.Labels) -> None:
    """All that a save needs to be loaded alone: an adapter in PEFT's format or the whole model, and the tokenizer."""
    if cfg.rank:
        about = lora.adapter_config(cfg.base, cfg.targets, cfg.rank, cfg.alpha, cfg.lora_dropout, cfg.bias, cfg.rslora)
        checkpoint.save_json(folder / "adapter_config.json", about)
        checkpoint.save_tensors(folder / "adapter_model.safetensors", lora.adapter_state(model))
    else:
        tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
        checkpoint.save_tensors(folder / "model.safetensors", tensors)
        checkpoint.save_json(folder / "config.json", models.classifier_config(model, labels.names))
    tokenizer.save_pretrained(folder)


def read_classifier(folder: Path, model: models.Classifier) -> None:
    """Load what write_classifier wrote into a model of the same config, strictly. Raises Untrusted otherwise."""
    try:
        if (folder / "adapter_model.safetensors").exists():
            lora.load_adapter_state(model, checkpoint.load_tensors(folder / "adapter_model.safetensors"))
        else:
            model.load_state_dict(checkpoint.load_tensors(folder / "model.safetensors"))
    except (ValueError, RuntimeError) as e:
        raise checkpoint.Untrusted(f"{folder}: {e}") from None


# ---- resuming -------------------------------------------------------------------------------------------------------


def run_to_resume(cfg, given: set[str], world: ddp.World):
    """(config, run folder) of the run that cfg.resume means, for train and cpt; (cfg, None) when a new run starts.

    Rank 0 looks, all know. Raises UserError for flags given by hand that contradict the run.
    """
    if not cfg.resume:
        return cfg, None
    name = configs.dataset_name(cfg)
    found = ddp.from_rank0(world, lambda: checkpoint.find_run(cfg.resume, cfg.outputs, cfg.base, name))
    if not found:
        ddp.say(world, "--resume auto: no unfinished run of this base and dataset; a new one starts")
        return cfg, None
    return configs.resumed(cfg, given, Path(found)), Path(found)


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

    def logits(self, rows: list[dict[str, str]], max_tokens: int = 8192) -> tuple[np.ndarray, data.TokenReport]:
        """fp32 logits (N, C) of rows that have the template's columns, and what tokenization did to them."""
        tokens, report = data.tokenize(self.tokenizer, self.config.text, rows, self.config.max_length)
        return score(self.model, tokens, self.world, self.precision, max_tokens), report

    def predict(self, texts: list, max_tokens: int = 8192) -> list[dict]:
        """Label, display name, probabilities and logits (both in the order of `labels`) of each text.

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
        probabilities = decide.softmax(logits)
        return [
            {
                "label": self.labels.values[c],
                "name": self.labels.names[c],
                "probabilities": p.tolist(),
                "logits": z.tolist(),
            }
            for c, p, z in zip(logits.argmax(axis=1), probabilities, logits, strict=True)
        ]


def run_facts(path: Path) -> tuple[TrainConfig, data.Labels]:
    """The config and labels of a run, before any weight is loaded. Raises UserError when it is no classifier."""
    if not (path / "config.json").is_file() or not (path / "labels.json").is_file():
        raise UserError(f"run {path}: no classification run (expected config.json and labels.json in it)")
    facts = checkpoint.load_json(path / "labels.json")
    return configs.read_config(TrainConfig, path), data.Labels(tuple(facts["values"]), tuple(facts["names"]))


def load_run(path: str | Path, world: ddp.World | None = None, precision: str = "auto", merge: bool = False) -> Run:
    """The best save of a run, on this process's device, verified file by file and against its base.

    Raises UserError when there is no such run, Untrusted when nothing in it can be trusted or its base has changed.
    """
    path, world = Path(path), world or ddp.setup()
    cfg, labels = run_facts(path)
    folder = checkpoint.trusted(path / "best")
    if folder is None:
        raise UserError(f"run {path}: it holds no best/ save yet; go on with python train.py --resume {path}")
    precision, _ = models.choose_precision(precision, world.device)
    model = new_classifier(cfg, len(labels.values), world.device, precision)
    check_base(model, checkpoint.verify(folder)["base"], cfg.base)
    read_classifier(folder, model)
    if merge:
        lora.merge(model)
    model.eval().requires_grad_(False)
    return Run(path, cfg, labels, model, data.load_tokenizer(str(folder)), world, precision)


def check_base(model: models.Classifier, saved: dict, base: str) -> None:
    """Raise Untrusted when the base is not the one that the save was trained on."""
    differs = models.compare_fingerprints(saved, models.fingerprint(model.model))
    if differs:
        raise checkpoint.Untrusted(f"base {base} is not the one this run was trained on: {'; '.join(differs[:3])}")
