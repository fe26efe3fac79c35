"""Somebody else's base and adapter as a model."""

import re
from dataclasses import dataclass
from pathlib import Path

import bases
import checkpoint
import configs
import ddp
import labelling
import lora
import model as models
import numerics
import peft_format
import prompts
import trained
from configs import TrainConfig
from errors import Untrusted, UserError


def foreign(adapter: lora.Adapter | None, base: str) -> str:
    """Why an adapter seems to be another model's, by the base it names, or an empty string.

    Every part of that name (qwen2.5, 0.5b, instruct) should occur somewhere in the given base's path.
    """
    path = re.sub(r"[^a-z0-9.]", "", base.lower())
    wanted = re.findall(r"[a-z0-9.]+", Path(adapter.base).name.lower()) if adapter and adapter.base else []
    lost = [part for part in wanted if part not in path]
    return f"the adapter was trained on {adapter.base}, not on {base}" if lost else ""


# ---- models that are no run: a base, or a base and a public adapter -------------------------------------------------


@dataclass
class Given:
    """A base and perhaps an adapter, checked on their headers; no weight is loaded yet."""

    config: TrainConfig | configs.CptConfig
    labels: labelling.Labels | None
    tokenizer: object
    adapter: lora.Adapter | None
    folder: Path | None  # of the adapter


def given_model(cfg: configs.InferConfig) -> Given:
    """What --base and --adapter name, as a run's facts. Raises UserError for what does not fit together."""
    adapter, folder, shapes = None, None, {}
    if cfg.adapter:
        folder = bases.find_adapter(cfg.adapter)
        adapter, shapes = adapter_header(folder)
    base = cfg.base or (adapter.base if adapter else "")
    where = bases.need_base(base)
    tokenizer = bases.load_tokenizer(str(folder) if folder and (folder / "tokenizer.json").is_file() else where)
    ends = (".score.weight", "classifier.weight", ".out_proj.weight")
    rows = [s[0] for k, s in shapes.items() if k.endswith(ends) and len(s) == 2]
    names = cfg.label_names or bases.stored_labels(base, rows[0] if rows else 0)
    if not names:
        raise UserError("the classes are not known: name them with --label_names (and --head label_words)")
    labels = labelling.Labels(names if len(names) > 1 else (), names)
    cfg = trained.prompted(cfg, tokenizer) if cfg.prompt else cfg
    same = {n: getattr(cfg, n) for n in ("prompt", "text", "label_column", "id_column", "head", "label_words", "quant")}
    same |= {"kept": prompts.PROMPTS[cfg.prompt].kept if cfg.prompt else ()}
    same |= {"task": "regression" if len(names) == 1 else "single_label", "max_length": cfg.max_length, "base": base}
    known = TrainConfig(pooling=models.stored_pooling(base), rank=int(bool(adapter)), train_layers=0, **same)
    trained.check_model(known, labels, tokenizer, adapter, shapes if adapter else None)
    return Given(known, labels, tokenizer, adapter, folder)


def load_given(given: Given, world: ddp.World, precision: str = "auto", merge: bool = False) -> tuple[trained.Run, str]:
    """The given model, ready to predict, and a report of what matched.

    Raises UserError when a part of the head is nowhere, Untrusted for an adapter that holds no usable values.
    """
    precision, _ = numerics.choose_precision(precision, world.device)
    cfg, adapter, report = given.config, given.adapter, "no adapter: the base alone"
    model = trained.new_classifier(cfg, given.labels, given.tokenizer, world.device, precision, adapter)
    saved = adapter.saved if adapter else ()
    lost = [n for n in model.fresh if not lora.within(n, saved)]
    if lost:
        raise UserError(
            f"{len(lost)} tensors of the head ({', '.join(lost[:3])}) are neither in the base nor in the adapter: "
            "train a head with train.py, or score words with --head label_words"
        )
    if adapter:
        report = load_adapter(given.folder, adapter, model, cfg.base)
    run = trained.Run(given.folder or Path(cfg.base), cfg, given.labels, model, given.tokenizer, world, precision)
    return trained._ready(run, merge), report


def adapter_header(folder: Path) -> tuple[lora.Adapter, dict]:
    """An adapter's config and the shapes of its tensors. Raises UserError for what cannot be honoured."""
    shapes = checkpoint.tensor_shapes(folder / "adapter_model.safetensors")
    try:
        return peft_format.read_adapter_config(checkpoint.load_json(folder / "adapter_config.json")), shapes
    except ValueError as e:
        raise UserError(f"--adapter {folder}: {e}") from None


def load_adapter(folder: Path, adapter: lora.Adapter, model, base: str) -> str:
    """Load an adapter into the model that it was injected into, and say what matched.

    Raises Untrusted when it does not fit or was never trained.
    """
    matched = trained.read_classifier(folder, model)
    report = f"adapter {folder} (r {adapter.rank}, alpha {adapter.alpha:g}): {matched}"
    idle = [n for n, m in lora.adapters(model).items() if m.idle()]
    if len(idle) == len(lora.adapters(model)):
        raise Untrusted(f"{folder}: every update is zero; the adapter was never trained")
    report += f"; {len(idle)} updates are zero" if idle else ""
    if foreign(adapter, base):
        report += f"\nwarning: {foreign(adapter, base)}: every tensor fits all the same"
    return report
