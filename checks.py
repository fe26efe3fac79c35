"""What must hold of settings."""

import dataclasses
import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path

import configs
from errors import UserError, nearest

CHOICES = {
    "head": ("linear", "label_words"),
    "quant": ("none", "nf4"),
    "chat": ("auto", "yes", "no"),
    "answer": ("auto", "label", "probability"),
    "scoring": ("label_words", "generate"),
    "audit": ("near", "equal", "none"),
    "thresholds": ("auto", "per_class", "global", "none"),
    "ensemble": ("mean_logit", "mean_prob", "rank", "weighted"),
    "export_dtype": ("bf16", "fp16", "fp32"),
    "optimizer": ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"),
    "pooling": ("last", "mean", "cls", "attention"),
    "bias": ("none", "lora_only", "all"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "fp32", "fp16", "bf16"),
}
METRICS = {
    "single_label": ("micro_f1", "macro_f1", "weighted_f1", "accuracy", "roc_auc", "log_loss"),
    "multi_label": (
        "micro_f1",
        "macro_f1",
        "weighted_f1",
        "subset_accuracy",
        "hamming_loss",
        "roc_auc",
        "average_precision",
        "log_loss",
    ),
    "regression": ("mse", "rmse", "mae", "r2", "pearson", "roc_auc"),
}
OF_CLASSES = {"label_smoothing": 0.0, "class_weights": "none", "head": "linear", "label_names": ()}  # no regression's
OF_SETS = {"label_columns": (), "label_delimiter": "|", "pos_weight": "none"}  # of multi_label alone


def train_problems(cfg: configs.TrainConfig) -> list[str]:
    """Everything wrong with a TrainConfig that can be seen without reading data or weights, one line each."""
    found = _range_problems(cfg) + _training_problems(cfg)
    if cfg.task not in METRICS:
        found.append(f"--task {cfg.task}: expected one of {', '.join(METRICS)}{nearest(cfg.task, METRICS)}")
    elif cfg.metric not in METRICS[cfg.task]:
        known = METRICS[cfg.task]
        found.append(f"--metric {cfg.metric}: expected one of {', '.join(known)}{nearest(cfg.metric, known)}")
    others = {"regression": {**OF_CLASSES, **OF_SETS}, "single_label": OF_SETS}
    others["multi_label"] = {"class_weights": "none"}
    found += [
        f"--{name} {getattr(cfg, name)} with --task {cfg.task}: it has no meaning there, leave it out"
        for name, plain in others.get(cfg.task, {}).items()
        if getattr(cfg, name) != plain
    ]
    if cfg.task == "multi_label" and cfg.head != "linear":
        found.append(f"--head {cfg.head} with --task multi_label: words exclude one another; take the linear head")
    if cfg.label_columns and cfg.label_names:
        found.append("--label_names with --label_columns: the columns name the labels; give one of the two")
    if not cfg.label_delimiter:
        found.append("--label_delimiter is empty: give what stands between labels, or a JSON list in the column")
    if cfg.pos_weight not in ("none", "balanced") and not _weights(cfg.pos_weight):
        found.append(f"--pos_weight {cfg.pos_weight}: expected none, balanced or positive numbers like 1,2.5")
    if cfg.head == "label_words" and cfg.rank == 0 and cfg.train_layers == 0:
        found.append("--head label_words with --rank 0 --train_layers 0: nothing would be trained; give a --rank")
    if cfg.head == "label_words" and cfg.pooling != "last":
        found.append(f"--head label_words with --pooling {cfg.pooling}: the next word follows the last token")
    if not cfg.train_data:
        found.append("--train_data is empty: give the CSV, TSV or JSONL file to train on")
    if cfg.rank > 0 and cfg.train_layers != -1:
        found.append(f"--train_layers {cfg.train_layers} with --rank {cfg.rank}: layers are trained with --rank 0 only")
    if cfg.rank == 0 and cfg.bias != "none":
        found.append(f"--bias {cfg.bias} with --rank 0: biases are trained with an adapter only")
    if not cfg.val_data and cfg.val_size <= 0:
        found.append(f"--val_size {cfg.val_size} without --val_data: expected a fraction or a count above 0")
    if cfg.val_size >= 1 and cfg.val_size != int(cfg.val_size):
        found.append(f"--val_size {cfg.val_size}: a count of rows must be whole")
    if not re.search(r"\{[^{}]+\}", cfg.text):
        found.append(f'--text "{cfg.text}" names no column: expected a template like "{{Question}}"')
    if len(set(cfg.label_names)) != len(cfg.label_names):
        found.append(f"--label_names {','.join(cfg.label_names)}: a name stands twice")
    if len(cfg.label_names) == 1:
        found.append(f"--label_names {cfg.label_names[0]}: expected at least 2 names")
    for part in cfg.budgets:
        if not re.fullmatch(r"[^=]+=[1-9]\d*", part):
            found.append(f"--budgets {part}: expected field=tokens, such as body=300")
    if cfg.folds and cfg.val_data:
        found.append(
            f"--folds {cfg.folds} with --val_data {cfg.val_data}: folds judge the training rows; leave one out"
        )
    if cfg.folds == 1 or cfg.fold < -1 or (cfg.folds and cfg.fold >= cfg.folds):
        found.append(f"--folds {cfg.folds} --fold {cfg.fold}: expected 2 or more folds, and one of them")
    kinds = r"none|balanced|inverse|effective(:0?\.\d+)?"
    if not re.fullmatch(kinds, cfg.class_weights) and not _weights(cfg.class_weights):
        kinds = "none, balanced, effective, effective:0.99 or positive numbers like 1,2.5"
        found.append(f"--class_weights {cfg.class_weights}: expected {kinds}")
    return found


def infer_problems(cfg: configs.InferConfig) -> list[str]:
    """Everything wrong with an InferConfig that can be seen without reading data or weights, one line each."""
    found = _range_problems(cfg)
    if cfg.submission and len([c for c in cfg.submission.split(",") if c.strip()]) != 2:
        found.append(f'--submission "{cfg.submission}": expected two column names such as "id,label", or empty')
    if len(set(cfg.runs)) < len(cfg.runs):
        found.append(f"--runs {','.join(cfg.runs)}: a run stands twice; weigh runs with --ensemble weighted")
    if len(cfg.runs) > 1 and (cfg.export or cfg.generate):
        found.append(f"--runs {','.join(cfg.runs)}: --{'export' if cfg.export else 'generate'} takes one run")
    if len(cfg.runs) > 1 and cfg.scoring == "generate":
        found.append(f"--runs {','.join(cfg.runs)}: --scoring generate takes one run")
    if cfg.runs and (cfg.base or cfg.adapter):
        found.append(
            f"--runs {','.join(cfg.runs)} with --base or --adapter: a run has its own base; give one or the other"
        )
    if cfg.merge and cfg.quant != "none":
        found.append(f"--merge with --quant {cfg.quant}: quantized weights take no update; leave --quant out")
    if cfg.export and os.path.isfile(cfg.export):
        found.append(f"--export {cfg.export} is a file: name a new folder")
    held = sorted(os.listdir(cfg.export), reverse=True) if cfg.export and os.path.isdir(cfg.export) else []
    if held:
        held = [n for n in held if n.endswith(".safetensors")] or held
        found.append(f"--export {cfg.export} already holds {held[0]}: name a new folder")
    if cfg.temperature != 0 and not cfg.temperature >= 0.01:
        found.append(f"--temperature {cfg.temperature:g}: expected 0 for greedy, or 0.01 and more")
    if not 0 <= cfg.threshold < 1:
        found.append(f"--threshold {cfg.threshold:g}: expected a probability below 1, or 0 for the run's own")
    if not 0 < cfg.top_p <= 1:
        found.append(f"--top_p {cfg.top_p:g}: expected a share above 0 up to 1")
    ends = ("jsonl",) if cfg.generate else ("csv", "jsonl")
    if not cfg.output.endswith(tuple(f".{end}" for end in ends)):
        found.append(f"--output {cfg.output}: expected a name that ends in .{' or .'.join(ends)}")
    return found


OF_SCORES = "threshold label_column label_names label_words head submission max_tokens merge export force".split()
OF_SCORES += "prompt answer scoring by_column time_limit".split()
OF_TEXTS = "chat system examples tools max_new_tokens temperature top_p batch_size seed".split()


def of_generation(cfg: configs.InferConfig, given: set[str]) -> configs.InferConfig:
    """The config with generate's own defaults where nothing was given by hand."""
    own = {"text": "{prompt}", "output": "completions.jsonl"} if cfg.generate else {}
    return replace(cfg, **{name: value for name, value in own.items() if name not in given})


def _idle_infer(cfg: configs.InferConfig, given: set[str]) -> list[str]:
    """Flags given by hand that have no effect on what is asked for."""
    side, others = ("with", OF_SCORES) if cfg.generate else ("without", OF_TEXTS)
    if cfg.scoring == "generate" and not cfg.generate:
        side, others = "with", "chat system examples tools ensemble threshold merge export time_limit".split()
    idle = [f"--{n} has no effect {side} --generate" for n in others if n in given]
    if not (cfg.base or cfg.adapter):
        ours = "text prompt label_column label_names label_words id_column head quant max_length".split()
        ours = ["quant"] if cfg.generate else ours
        idle += [f"--{n} has no effect without --base or --adapter: a run has its own" for n in ours if n in given]
    if "answer" in given and not cfg.submission:
        idle.append("--answer has no effect without --submission, which then holds every probability")
    if "ensemble" in given and len(cfg.runs) < 2:
        idle.append("--ensemble has no effect on one run: name several with --runs A B")
    drawn = {"top_p", "seed"} & given if cfg.generate and cfg.temperature == 0 else ()
    idle += [f"--{n} has no effect with --temperature 0, which draws nothing" for n in sorted(drawn)]
    chats = {"system", "tools"} & given if cfg.chat == "no" else ()
    return idle + [f"--{n} has no effect with --chat no" for n in sorted(chats)]


def cpt_problems(cfg: configs.CptConfig) -> list[str]:
    """Everything wrong with a CptConfig that can be seen without reading data or weights, one line each."""
    found = _range_problems(cfg) + _training_problems(cfg)
    if not cfg.train_data:
        found.append("--train_data is empty: give the folder or the file of documents to train on")
    if cfg.rank and cfg.random_init:
        found.append("--random_init with --rank: an adapter on a random base learns nothing; give a trained base")
    if cfg.rank == 0 and cfg.modules_to_save:
        found.append("--modules_to_save with --rank 0: the whole base is trained already")
    if cfg.val_size <= 0 or (cfg.val_size >= 1 and cfg.val_size != int(cfg.val_size)):
        found.append(f"--val_size {cfg.val_size}: expected a share below 1 or a whole number of documents above 0")
    if cfg.export:
        ours = os.path.realpath(cfg.export) == os.path.realpath(cfg.base)
        old = ("adapter_config.json", *(() if ours else ("chat_template.jinja",)))
        held = os.listdir(cfg.export) if os.path.isdir(cfg.export) else []
        held = [n for n in sorted(held, reverse=True) if n.endswith((".safetensors", ".index.json")) or n in old]
        parent = next(p for p in [Path(cfg.export).absolute(), *Path(cfg.export).absolute().parents] if p.exists())
        if held:
            found.append(f"--export {cfg.export} already holds {held[0]}: name another folder or remove it")
        elif not parent.is_dir() or not os.access(parent, os.W_OK):
            found.append(f"--export {cfg.export}: {parent} is no folder that can be written to")
    return found


def report_problems(cfg: configs.ReportConfig) -> list[str]:
    """Everything wrong with a ReportConfig that can be seen without reading a run, one line each."""
    found = _range_problems(cfg)
    if len(cfg.runs) > 2 or len(set(cfg.runs)) < len(cfg.runs):
        found.append(f"--runs {','.join(cfg.runs)}: expected one run, or two different ones")
    if 0 < cfg.samples < 100:
        found.append(f"--samples {cfg.samples}: expected 100 or more for 95% intervals")
    if os.path.isfile(cfg.output):
        found.append(f"--output {cfg.output} is a file: name a folder")
    return found


# ---- checks shared by all ------------------------------------------------------------------------------------

POSITIVE = ("lr", "epochs", "batch_size", "max_new_tokens", "max_tokens", "micro_batches", "max_length", "alpha")
NOT_NEGATIVE = (
    "rank head_lr embed_lr weight_decay max_steps warmup_steps grad_clip "
    "eval_every save_every keep patience seed eval_rows limit samples worst folds"
).split()
SHARES = ("lora_dropout", "head_dropout", "label_smoothing", "warmup_ratio")


def _range_problems(cfg) -> list[str]:
    found = []
    values = dataclasses.asdict(cfg)
    for name, value in values.items():
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
            found.append(f"--{name} {value}: expected a finite number")
        elif name in POSITIVE and value <= 0:
            found.append(f"--{name} {value}: expected a number above 0")
        elif name in NOT_NEGATIVE and value < 0:
            found.append(f"--{name} {value}: expected 0 or more")
        elif name in SHARES and not 0 <= value < 1:
            found.append(f"--{name} {value}: expected a share from 0 up to, not including, 1")
        elif name in CHOICES and value not in CHOICES[name]:
            found.append(f"--{name} {value}: expected one of {', '.join(CHOICES[name])}{nearest(value, CHOICES[name])}")
    try:
        seconds(values.get("time_limit", ""))
    except ValueError as e:
        found.append(str(e))
    if values.get("max_tokens", 0) < values.get("max_length", 0) and "lr" in values:
        found.append(
            f"--max_tokens {cfg.max_tokens} is below --max_length {cfg.max_length}: the longest row would fit no "
            "micro-batch; raise max_tokens or lower max_length"
        )
    return found


def _training_problems(cfg) -> list[str]:
    found = []
    if cfg.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        found.append(f"--optimizer {cfg.optimizer} needs bitsandbytes: pip install bitsandbytes")
    if cfg.quant != "none" and cfg.rank == 0:
        found.append(f"--quant {cfg.quant} with --rank 0: quantized weights cannot be trained; give a --rank")
    if "all-linear" in cfg.targets and len(cfg.targets) > 1:
        found.append(f"--targets {','.join(cfg.targets)}: all-linear stands alone; name the modules instead")
    if cfg.rank > 0 and not cfg.targets:
        found.append(f"--rank {cfg.rank} with empty --targets: name the linears to adapt, or all-linear")
    for name in cfg.report:
        if name not in ("tensorboard", "wandb"):
            found.append(
                f"--report {name}: expected tensorboard, wandb or both{nearest(name, ('tensorboard', 'wandb'))}"
            )
        elif importlib.util.find_spec(name) is None:
            found.append(f"--report {name}: it is not installed: pip install {name}")
    if cfg.warmup_steps and cfg.warmup_ratio:
        found.append(f"--warmup_steps {cfg.warmup_steps} and --warmup_ratio {cfg.warmup_ratio}: give one of the two")
    return found


def needs_of(cls):
    return {}


def in_words(need):
    return ""


def check(cfg, given: set[str] = frozenset(), needs=None, clashes=()) -> None:
    """Raise one UserError with every problem of the config; given: fields set by hand, which must have an effect."""
    idle = ["--text has no effect with --prompt, which has its own"] if {"text", "prompt"} <= given else []
    if isinstance(cfg, (configs.TrainConfig, configs.CptConfig)) and cfg.rank == 0:
        adapter = sorted(given & {"alpha", "lora_dropout", "targets", "rslora"})
        idle += [f"--{n} has no effect with --rank 0, which trains no adapter" for n in adapter]
    if isinstance(cfg, configs.CptConfig):
        idle += ["--export_dtype has no effect without --export"] if {"export_dtype"} & given and not cfg.export else []
        idle += ["--system has no effect with --chat no"] if {"system"} & given and cfg.chat == "no" else []
        ends = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
        vocabulary = cfg.rank == 0 or any(n.endswith(ends) for n in cfg.targets + cfg.modules_to_save)
        if "embed_lr" in given and not vocabulary:
            idle.append("--embed_lr has no effect: neither --targets nor --modules_to_save names embedding or LM head")
    if isinstance(cfg, configs.TrainConfig) and cfg.val_data and "val_size" in given:
        idle.append("--val_size has no effect with --val_data, whose rows are all used")
    if isinstance(cfg, configs.TrainConfig):
        idle += ["--val_size has no effect with --folds"] if cfg.folds and "val_size" in given else []
        idle += ["--split_seed has no effect with --val_data"] * ("split_seed" in given and bool(cfg.val_data))
        idle += ["--fold has no effect without --folds"] if "fold" in given and not cfg.folds else []
    if (
        isinstance(cfg, (configs.TrainConfig, configs.InferConfig))
        and cfg.head != "label_words"
        and "label_words" in given
    ):
        idle.append("--label_words has no effect without --head label_words")
    if isinstance(cfg, configs.TrainConfig) and cfg.head == "label_words":
        idle += [f"--{n} has no effect with --head label_words" for n in sorted(given & {"head_lr", "head_dropout"})]
    if isinstance(cfg, configs.InferConfig):
        idle += _idle_infer(cfg, given)
    of = {configs.TrainConfig: train_problems, configs.InferConfig: infer_problems, configs.CptConfig: cpt_problems}
    kind = next((f for k, f in of.items() if isinstance(cfg, k)), report_problems)
    for field, other in (needs or {}).items():
        for word in other.split():
            if field in given and bool(getattr(cfg, word.lstrip("!"))) == word.startswith("!"):
                idle.append(f"--{field} has no effect {'with' if word[0] == '!' else 'without'} --{word.lstrip('!')}")
    problems = idle + kind(cfg) + [m if isinstance(m, str) else m(cfg) for m, test in clashes if test(cfg)]
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems)} problems in the settings: "
        raise UserError(head + " | ".join(problems))


def seconds(text: str) -> float:
    """A duration such as 8.5h, 90m, 1h30m or 60s; 0 for an empty text. Raises ValueError for anything else."""
    if text and not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise ValueError(f"--time_limit {text}: expected a duration like 8.5h, 90m or 60s")
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


def _weights(text: str) -> bool:
    """Whether a text is positive numbers between commas."""
    try:
        return all(0 < float(part) < float("inf") for part in text.split(","))
    except ValueError:
        return False


def check_texts(given: set[str], pairs: bool) -> None:
    """Raise UserError for flags given by hand that have no effect on pairs, or on documents, now that it is known."""
    idle = sorted(given & ({"cross_document"} if pairs else {"chat", "system"}))
    if idle:
        kind = "pairs of prompt and response" if pairs else "documents"
        raise UserError(" | ".join(f"--{n} has no effect: the training data are {kind}" for n in idle))


def preset_note(given: set[str], argv: list[str]) -> str:
    """A warning where another base meets the tiny preset's settings, or an empty string."""
    if "base" not in given or any(a.split("=")[0] == "--cfg" for a in argv):
        return ""
    return "note: without --cfg the settings are the tiny preset's, made for tiny/base; for others see --help's presets"


def own_data(cfg, given: set[str]):
    """What follows from flags given by hand: with a train_data of the user's own, the preset's validation and test
    files are not theirs and dropped; a task takes its first metric, and a regression drops settings of classes.
    """
    if isinstance(cfg, configs.CptConfig):
        return replace(cfg, dataset="") if "train_data" in given and "dataset" not in given else cfg
    if "task" in given and "metric" not in given and cfg.metric not in METRICS.get(cfg.task, (cfg.metric,)):
        cfg = replace(cfg, metric=METRICS[cfg.task][0])
    drop = {"regression": OF_CLASSES, "multi_label": {"class_weights": "none"}}.get(cfg.task, {})
    if "task" in given:
        cfg = replace(cfg, **{name: plain for name, plain in drop.items() if name not in given})
    if "folds" in given and "val_data" not in given:
        cfg = replace(cfg, val_data="")
    if "train_data" not in given:
        return cfg
    return replace(cfg, **{name: "" for name in ("val_data", "test_data") if name not in given})
