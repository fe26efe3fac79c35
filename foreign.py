"""Somebody else's base and adapter as a model."""

import re
from dataclasses import dataclass
from pathlib import Path

import bases
import checkpoint
import ddp
import labelling
import lora
import model as models
import numerics
import peft_format
import trained
from configs import CptConfig, TrainConfig
from errors import Untrusted, UserError


@dataclass
class Given:
    """A base and perhaps an adapter, checked on their headers; no weight is loaded yet."""

    config: TrainConfig | CptConfig
    labels: labelling.Labels | None
    tokenizer: object
    adapter: lora.Adapter | None
    folder: Path | None  # of the adapter


SAME = ("prompt", "text", "label_column", "id_column", "head", "label_words", "quant", "max_length")


def given_model(cfg) -> Given:
    """The classifier that --base and --adapter name. Raises UserError for what does not fit together."""
    adapter, folder, shapes = None, None, None
    if cfg.adapter:
        folder = bases.find_adapter(cfg.adapter)
        adapter, shapes = adapter_header(folder)
    base = cfg.base or adapter.base
    tokenizer = given_tokenizer(base, folder)
    names = cfg.label_names or bases.stored_labels(base, head_rows(shapes or {}))
    if not names:
        raise UserError("the classes are not known: name them with --label_names (and --head label_words)")
    labels = labelling.Labels(names if len(names) > 1 else (), names)
    known = TrainConfig(
        base=base,
        task="regression" if len(names) == 1 else "single_label",
        pooling=models.stored_pooling(base),
        rank=1 if adapter else 0,
        train_layers=0,
        **{name: getattr(cfg, name) for name in SAME},
    )
    if cfg.prompt:
        known = trained.prompted(known, tokenizer)
    trained.check_model(known, labels, tokenizer, adapter, shapes)
    return Given(known, labels, tokenizer, adapter, folder)


def given_tokenizer(base: str, adapter: Path | None):
    """The tokenizer of an adapter's folder where it holds one, or else of the base. Raises UserError without a base."""
    where = bases.need_base(base)
    own = adapter is not None and (adapter / "tokenizer.json").is_file()
    return bases.load_tokenizer(str(adapter) if own else where)


def head_rows(shapes: dict[str, tuple[int, ...]]) -> int:
    """The outputs of the head among an adapter's tensors, 0 where it has none."""
    for name, shape in shapes.items():
        if name.endswith((".score.weight", "classifier.weight", ".out_proj.weight")) and len(shape) == 2:
            return shape[0]
    return 0


def load_given(given: Given, world: ddp.World, precision: str = "auto", merge: bool = False) -> tuple[trained.Run, str]:
    """The given model, ready to predict, and a report of what matched.

    Raises UserError when a part of the head is nowhere, Untrusted for an adapter that holds no usable values.
    """
    precision, _ = numerics.choose_precision(precision, world.device)
    cfg, adapter, report = given.config, given.adapter, "no adapter: the base alone"
    model = trained.new_classifier(cfg, given.labels, given.tokenizer, world.device, precision, adapter)
    saved = adapter.saved if adapter else ()
    missing = [name for name in model.fresh if not lora.within(name, saved)]
    if missing:
        raise UserError(
            f"{len(missing)} tensors of the head ({', '.join(missing[:3])}) are neither in the base nor in the "
            "adapter: train a head with train.py, or score words with --head label_words"
        )
    if adapter:
        report = load_adapter(given.folder, adapter, model, cfg.base)
    run = trained.Run(given.folder or Path(cfg.base), cfg, given.labels, model, given.tokenizer, world, precision)
    return trained.ready(run, merge), report


def base_mismatch(adapter: lora.Adapter | None, base: str) -> str:
    """Why an adapter seems to be another model's, by the base that it names, or an empty string.

    Every part of that name (qwen2.5, 0.5b, instruct) should occur somewhere in the given base's path.
    """
    if not adapter or not adapter.base:
        return ""
    path = re.sub(r"[^a-z0-9.]", "", base.lower())
    parts = re.findall(r"[a-z0-9.]+", Path(adapter.base).name.lower())
    if all(part in path for part in parts):
        return ""
    return f"the adapter was trained on {adapter.base}, not on {base}"


def adapter_header(folder: Path) -> tuple[lora.Adapter, dict]:
    """An adapter's config and the shapes of its tensors. Raises UserError for what cannot be honoured."""
    shapes = checkpoint.tensor_shapes(folder / "adapter_model.safetensors")
    try:
        return peft_format.read_adapter_config(checkpoint.load_json(folder / "adapter_config.json")), shapes
    except ValueError as e:
        raise UserError(f"--adapter {folder}: {e}") from None


def load_adapter(folder: Path, adapter: lora.Adapter, model, base: str) -> str:
    """Load an adapter into the model that it was injected into; returns a report of what matched.

    Raises Untrusted when it does not fit or was never trained.
    """
    matched = trained.read_classifier(folder, model)
    report = f"adapter {folder} (r {adapter.rank}, alpha {adapter.alpha:g}): {matched}"
    layers = lora.adapters(model).values()
    idle = sum(layer.idle() for layer in layers)
    if idle == len(layers):
        raise Untrusted(f"{folder}: every update is zero; the adapter was never trained")
    if idle:
        report += f"; {idle} updates are zero"
    mismatch = base_mismatch(adapter, base)
    if mismatch:
        report += f"\nwarning: {mismatch}: every tensor fits all the same"
    return report
