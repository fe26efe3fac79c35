"""Somebody else's base and adapter as a model."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import bases
import checkpoint
import ddp
import language
import lora
import model as models
import numerics
import peft_format
import trained
from configs import CptConfig, TrainConfig
from errors import Degenerate, Untrusted, UserError, warning
from labelling import Labels


@dataclass
class Given:
    """A base and perhaps an adapter, checked on their headers; no weight is loaded yet."""

    config: TrainConfig | CptConfig
    labels: Labels | None
    tokenizer: object
    adapter: lora.Adapter | None
    folder: Path | None  # of the adapter


OTHER_TASKS = "TOKEN_CLS QUESTION_ANS SEQ_2_SEQ_LM".split()
SAME = "prompt text label_column head label_words quant max_length".split()


def given_model(cfg) -> Given:
    """The classifier that --base and --adapter name. Raises UserError for what does not fit together."""
    adapter = folder = shapes = None
    if cfg.adapter:
        folder = bases.find_adapter(cfg.adapter)
        adapter, shapes = adapter_header(folder)
    base = cfg.base or adapter.base
    where = bases.need_base(base)
    if folder and (folder / "tokenizer.json").is_file():  # an adapter may bring its own
        where = str(folder)
    tokenizer = bases.load_tokenizer(where)

    if adapter and adapter.task in OTHER_TASKS:
        raise UserError(f"--adapter {cfg.adapter}: an adapter of task {adapter.task}, which gives texts no class")

    # The classes: as given, or else those of the base or as many as the adapter's head has outputs.
    heads = ".score.weight", "classifier.weight", ".out_proj.weight"
    sizes = [shape[0] for name, shape in (shapes or {}).items() if name.endswith(heads) and len(shape) == 2]
    names = cfg.label_names or bases.stored_labels(base, sizes[0] if sizes else 0)
    if not names:
        raise UserError("the classes are not known: name them with --label_names (and --head label_words)")
    labels, task = Labels(names, names), task_of(base, cfg.head, len(names))
    if task == "regression":
        labels = Labels((), names)
    same = {name: getattr(cfg, name) for name in SAME}
    known = TrainConfig(base=base, task=task, pooling=models.stored_pooling(base), rank=0, train_layers=0, **same)
    if cfg.prompt:
        known = trained.prompted(known, tokenizer)
    trained.check_model(known, labels, tokenizer, adapter, shapes)
    return Given(known, labels, tokenizer, adapter, folder)


def task_of(base: str, head: str, outputs: int) -> str:
    """What the outputs of a base's head mean. Raises UserError for a regression of several numbers."""
    stored = getattr(bases.load_config(base), "problem_type", None) if head == "linear" else None
    if outputs == 1:
        return "regression"
    if stored == "regression":
        raise UserError(f"--base {base}: a regression with {outputs} outputs (problem_type), expected one")
    return "multi_label" if stored == trained.PROBLEM_TYPES["multi_label"] else "single_label"


def load_given(given: Given, world: ddp.World, precision: str = "auto", quant: str = "") -> trained.Run:
    """The given model, ready to predict, once what matched is printed. quant: another way to store the base.

    Raises UserError when a part of the head is nowhere, Untrusted for an adapter that holds no usable values.
    """
    precision, _ = numerics.choose_precision(precision, world, given.config.base)
    cfg = replace(given.config, quant=quant or given.config.quant)
    adapter, path, report = given.adapter, given.folder or Path(cfg.base), "no adapter: the base alone"
    model = trained.new_classifier(cfg, given.labels, given.tokenizer, world.device, precision, adapter)
    missing = [name for name in model.fresh if not (adapter and lora.within(name, adapter.saved))]
    if missing:
        remedy = "train a head with train.py, or score words with --head label_words"
        count = f"{len(missing)} tensors of the head ({', '.join(missing[:3])})"
        raise UserError(f"{count} are neither in the base nor in the adapter: {remedy}")
    if adapter:
        report = load_adapter(path, adapter, model, cfg.base)
    ddp.say(world, report)
    return trained.Run(path, cfg, given.labels, model, given.tokenizer, world, precision, (path,))


def _base_mismatch(adapter, base):
    """Why an adapter seems to be another model's, by the base that it names, or an empty string.

    Every part of that name (qwen2.5, 0.5b, instruct) should occur somewhere in the given base's path.
    """
    path = re.sub(r"[^a-z0-9.]", "", base.lower())
    name = re.sub(r"(-unsloth)?-bnb-4bit$", "", Path(adapter.base).name.lower())  # a quantized copy of it
    parts = re.findall(r"[a-z0-9.]+", name)
    if all(part in path for part in parts):
        return ""
    return f"the adapter was trained on {adapter.base}, not on {base}"


def refuse_other_base(given: Given) -> None:
    """Raise Degenerate where an adapter seems to be another model's."""
    mismatch = given.adapter and _base_mismatch(given.adapter, given.config.base)
    if mismatch:
        raise Degenerate(f"{mismatch}: nothing was scored (--force where it is the same model by another name)")


def adapter_header(folder: Path) -> tuple[lora.Adapter, dict]:
    """An adapter's config and the shapes of its tensors. Raises UserError for what cannot be honoured."""
    shapes = checkpoint.tensor_shapes(folder / "adapter_model.safetensors")
    try:
        shapes = peft_format.plain_keys(shapes)
        return peft_format.read_adapter_config(checkpoint.load_json(folder / "adapter_config.json")), shapes
    except ValueError as e:
        raise UserError(f"--adapter {folder}: {e}") from None


def load_adapter(folder: Path, adapter: lora.Adapter, model, base: str) -> str:
    """Load an adapter into the model that it was injected into; returns a report of what matched.

    Raises Untrusted when it does not fit or was never trained.
    """
    report = f"adapter {folder} (r {adapter.rank}, alpha {adapter.alpha:g}): {trained.read_classifier(folder, model)}"
    layers = lora.adapters(model).values()
    idle = sum(layer.idle() for layer in layers)
    if idle == len(layers):
        raise Untrusted(f"{folder}: every update is zero; the adapter was never trained")
    if idle:
        report += f"; {idle} updates are zero"
    if adapter.base.endswith("-bnb-4bit") and not base.endswith("-bnb-4bit"):
        report += f"; it was trained on {adapter.base}, a 4-bit copy of the base"
    mismatch = _base_mismatch(adapter, base)
    if mismatch:
        report += "\n" + warning(f"{mismatch}; every tensor fits all the same", "make sure of --base")
    return report


# ---- language models ------------------------------------------------------------------------------------------------


def given_writer(config: CptConfig, folder: Path | None) -> Given:
    """A base and the folder of its adapter as a Given, once they are known to fit each other."""
    adapter, shapes = None, {}
    if folder:
        adapter, shapes = adapter_header(folder)
        task = checkpoint.load_json(folder / "adapter_config.json").get("task_type")
        if task not in (None, "CAUSAL_LM"):
            raise UserError(f"{folder}: an adapter of task {task}, which writes no text; predict with infer.py")
    base = config.base or adapter.base
    where = bases.need_base(base)

    # An adapter may bring its tokenizer, or a chat template alone.
    if folder and (folder / "tokenizer.json").is_file():
        where = str(folder)
    tokenizer = bases.load_tokenizer(where)
    bases.need_vocabulary(base, len(tokenizer))
    if folder and bases.own_file(folder / "chat_template.jinja"):
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text(encoding="utf-8")

    # The adapter must fit the base's modules, which a model without weights can tell.
    bare = language.language_skeleton(base)
    if adapter:
        try:
            lora.inject(bare, adapter)
            peft_format.match_keys(bare, shapes)
        except ValueError as e:
            raise UserError(f"--base {base}: {e}") from None
    return Given(replace(config, base=base), None, tokenizer, adapter, folder)


def load_writer(given: Given, world: ddp.World, precision: str):
    """(the language model, ready to write; a report of what matched).

    Raises Untrusted for an adapter of no values, and for a run's on another base than it was trained on.
    """
    config = given.config
    dtype = numerics.weight_dtype(world.device, precision)
    compute = numerics.DTYPES[precision]
    lm = language.load_language_model(config.base, world.device, dtype, None, config.quant, compute)
    report = f"{config.base}, no adapter"
    if given.adapter:
        manifest = given.folder / checkpoint.MANIFEST
        if manifest.is_file():  # of a run: its base is known
            trained.check_base(lm, checkpoint.load_json(manifest)["base"], config.base)
        lora.inject(lm, given.adapter)
        lora.train_only(lm)
        report = load_adapter(given.folder, given.adapter, lm, config.base)
    return lm.eval().requires_grad_(False), report


def writes_text(cfg) -> bool:
    """Whether infer.py's settings name an adapter of a language model, and no classes for it."""
    if not cfg.adapter or cfg.label_names or cfg.head == "label_words":
        return False
    folder = bases.find_adapter(cfg.adapter)
    return checkpoint.load_json(folder / "adapter_config.json").get("task_type") == "CAUSAL_LM"


def export_writer(cfg, world: ddp.World) -> dict:
    """Merge the adapter of a language model into its 16-bit base and write the whole, as transformers loads it."""
    if cfg.input:
        raise UserError("--input: an adapter of a language model has no classes to compare rows by: leave it out")
    given = given_writer(CptConfig(base=cfg.base), bases.find_adapter(cfg.adapter))
    wanted = numerics.exact(cfg.precision, world)
    precision, _ = numerics.choose_precision(wanted, world, given.config.base)
    lm, report = load_writer(given, world, precision)
    ddp.say(world, report)
    lora.merge(lm)
    dtype = lm.get_input_embeddings().weight.dtype
    config = language.whole_config(lm)
    trained.export(Path(cfg.export), lm, given.tokenizer, config, dtype, {"exported": str(given.folder)})
    architecture = type(lm).__name__
    ddp.say(world, f"{cfg.export}: {architecture}")
    return {"run": cfg.adapter, "export": cfg.export, "architecture": architecture}
