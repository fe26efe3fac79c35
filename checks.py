"""What must hold of settings, as tables: ranges, choices, forms, what needs what, what does not go together.

`check` reports every problem of a config in one error, before data are read or weights loaded. A new rule is a row.
"""

import dataclasses
import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path

from configs import CptConfig
from errors import UserError, nearest


def table(text: str) -> list[list[str]]:
    """The rows of a table that is written as text, with columns separated by ::"""
    return [[cell.strip() for cell in line.split("::")] for line in text.strip().splitlines()]


# ---- rules about one field, by its name, in every command -----------------------------------------------------------

CHOICES = {
    name: choices.split()
    for name, choices in table("""
        head :: linear label_words
        quant :: none nf4
        chat :: auto yes no
        answer :: auto label probability
        audit :: near equal none
        thresholds :: auto per_class global none
        ensemble :: mean_logit mean_prob rank weighted
        export_dtype :: bf16 fp16 fp32
        optimizer :: adamw adamw8bit paged_adamw paged_adamw8bit
        pooling :: last mean cls attention
        bias :: none lora_only all
        schedule :: cosine linear constant
        precision :: auto fp32 fp16 bf16
        task :: single_label multi_label regression
    """)
}
METRICS = {
    task: metrics.split()
    for task, metrics in table("""
        single_label :: micro_f1 macro_f1 weighted_f1 accuracy roc_auc log_loss
        multi_label :: micro_f1 macro_f1 weighted_f1 subset_accuracy hamming_loss roc_auc average_precision log_loss
        regression :: mse rmse mae r2 pearson roc_auc
    """)
}
ABOVE = "lr epochs batch_size max_new_tokens max_tokens micro_batches max_length alpha soft_temperature"
NOT_BELOW = (
    "rank head_lr embed_lr weight_decay max_steps warmup_steps grad_clip eval_every save_every keep patience seed "
    "eval_rows limit samples worst folds"
)
FRACTIONS = "lora_dropout head_dropout label_smoothing warmup_ratio"
RANGES = (  # fields, what is expected, test
    (ABOVE, "a number above 0", lambda value: value > 0),
    (NOT_BELOW, "0 or more", lambda value: value >= 0),
    (FRACTIONS, "a fraction from 0 to below 1", lambda value: 0 <= value < 1),
    ("soft_share", "a fraction from 0 to 1", lambda value: 0 <= value <= 1),
    ("top_p", "a fraction above 0, at most 1", lambda value: 0 < value <= 1),
    ("threshold", "a probability below 1, or 0 for the run's own", lambda value: 0 <= value < 1),
    ("temperature", "0 for greedy, or 0.01 and more", lambda value: value == 0 or value >= 0.01),
    ("val_size", "a whole number of rows, if not a fraction", lambda value: value < 1 or value == int(value)),
)
NUMBERS = r"(?=[^,]*[1-9])[0-9.]+(?:e-?[0-9]+)?"  # a positive number
LIST = rf"{NUMBERS}(?:,{NUMBERS})*"
FORMS = {  # field: (regular expression of the value, or of each value of a tuple; what is expected)
    name: (form.replace("LIST", LIST), expected)
    for name, form, expected in table(r"""
        text :: (?s).*\{[^{}]+\}.* :: a template that names a column, like "{Question}"
        label_delimiter :: (?s).+ :: the separator of the labels, or a JSON list in the column
        budgets :: [^=]+=[1-9]\d* :: field=tokens, such as body=300
        time_limit :: (?:(?:\d+(?:\.\d+)?)[hms])* :: a duration like 8.5h, 90m or 60s
        pos_weight :: none|balanced|LIST :: none, balanced or positive numbers like 1,2.5
        class_weights :: none|balanced|inverse|effective(:0?\.\d+)?|LIST :: none, balanced, effective:0.99 or numbers
        report :: tensorboard|wandb :: tensorboard, wandb or both
        submission :: \s*|[^,]*[^,\s][^,]*,[^,]*[^,\s][^,]* :: two column names such as "id,label", or empty
        seeds :: \d+ :: whole numbers of 0 or more
    """)
}

# ---- what a field that is given by hand needs -----------------------------------------------------------------------
# "rank": another field must be set; "!prompt": must not be set; "head=label_words": must have this value;
# "base|adapter": one of them is enough. Several needs are separated by spaces.

NEEDS = table("""
    TrainConfig CptConfig :: alpha lora_dropout targets :: rank
    TrainConfig :: rslora :: rank
    TrainConfig :: fold :: folds
    TrainConfig :: val_size :: !val_data !folds
    TrainConfig :: split_seed :: !val_data
    TrainConfig :: text :: !prompt
    TrainConfig :: label_words :: head=label_words
    TrainConfig :: head_lr head_dropout :: !head=label_words
    TrainConfig :: label_delimiter :: !label_columns
    CptConfig :: export_dtype :: export
    CptConfig :: system :: !chat=no
    InferConfig :: prompt label_column label_names id_column head quant max_length :: base|adapter
    InferConfig :: text :: base|adapter !prompt
    InferConfig :: label_words :: base|adapter head=label_words
    InferConfig :: answer :: submission
    InferConfig :: runs :: !base !adapter
""")
NO_MEANING = {  # fields that must have their default with a task
    "regression": "label_smoothing class_weights head label_names label_columns label_delimiter pos_weight soft_share "
    "soft_temperature",
    "single_label": "label_columns label_delimiter pos_weight",
    "multi_label": "class_weights",
}


def rows_of(rows, cls):
    """The rows of a table that are about a command's config, or about one that it extends."""
    commands = {base.__name__ for base in cls.__mro__}
    return [row[1:] for row in rows if commands & set(row[0].split())]


def needs_of(cls) -> dict[str, str]:
    """{field: its needs} of a command: its own (a class variable NEEDS), or those above."""
    own = {name: need for names, need in rows_of(NEEDS, cls) for name in names.split()}
    return getattr(cls, "NEEDS", None) or own


def holds(cfg, need: str) -> bool:
    """Whether a config meets one need, such as "rank", "!prompt", "head=label_words" or "base|adapter"."""
    if "|" in need:
        return any(holds(cfg, part) for part in need.split("|"))
    name, equals, value = need.removeprefix("!").partition("=")
    actual = getattr(cfg, name)
    is_set = str(actual) == value if equals else bool(actual)
    return is_set != need.startswith("!")


def in_words(needs: str) -> str:
    """Needs as a person reads them: "with --folds, without --val_data"."""
    words = []
    for need in needs.split():
        flags = " or ".join("--" + part.removeprefix("!").replace("=", " ") for part in need.split("|"))
        words.append(f"without {flags}" if need.startswith("!") else f"with {flags}")
    return ", ".join(words)


# ---- what does not go together --------------------------------------------------------------------------------------
# Rows of: commands, a need that must hold, the message. {name} in a message is the value of a field.

TRAINING = "TrainConfig CptConfig"
CLASHES = table("""
    TrainConfig CptConfig :: quant=none|rank :: --quant {quant} with --rank 0: 4-bit weights cannot be trained
    TrainConfig CptConfig :: !rank|targets :: --rank {rank} with empty --targets: name linears, or all-linear
    TrainConfig CptConfig :: !warmup_steps|!warmup_ratio :: --warmup_steps {warmup_steps} and --warmup_ratio \
{warmup_ratio}: give one of the two
    TrainConfig CptConfig :: train_data :: --train_data is empty: give the file or folder to train on
    TrainConfig :: !folds|!val_data :: --folds {folds} with --val_data {val_data}: folds validate on training rows
    TrainConfig :: !task=multi_label|head=linear :: --head {head} with --task multi_label: use --head linear
    TrainConfig :: !head=label_words|pooling=last :: --head label_words with --pooling {pooling}: use --pooling last
    TrainConfig :: !head=label_words|rank|train_layers :: --head label_words with --rank 0 --train_layers 0: nothing \
would be trained
    TrainConfig :: !rank|train_layers=-1 :: --train_layers {train_layers} with --rank {rank}: it needs --rank 0
    TrainConfig :: rank|bias=none :: --bias {bias} with --rank 0: biases are trained with an adapter only
    TrainConfig :: !label_names|!label_columns :: --label_names with --label_columns: the columns name the labels
    CptConfig :: !random_init|!rank :: --random_init with --rank: an adapter on a random base learns nothing
    CptConfig :: rank|!modules_to_save :: --modules_to_save with --rank 0: the whole base is trained already
    InferConfig :: !merge|quant=none :: --merge with --quant {quant}: an adapter is never merged into 4-bit weights
""")
# Rows of: commands, a function that is true where it does not hold, the message (or a function that makes it).
# fmt: off
PROBLEMS = [
    (TRAINING, lambda cfg: cfg.max_tokens < cfg.max_length,
     "--max_tokens {max_tokens} is below --max_length {max_length}: the longest row would fit in no micro-batch"),
    (TRAINING, lambda cfg: cfg.optimizer != "adamw" and not installed("bitsandbytes"),
     "--optimizer {optimizer} needs bitsandbytes: pip install bitsandbytes"),
    (TRAINING, lambda cfg: "all-linear" in cfg.targets and len(cfg.targets) > 1,
     "--targets {targets}: all-linear cannot be combined with names"),
    (TRAINING, lambda cfg: any(name in ("tensorboard", "wandb") and not installed(name) for name in cfg.report),
     "--report {report}: not installed: pip install {report}"),
    (TRAINING, lambda cfg: not getattr(cfg, "val_data", "") and cfg.val_size <= 0,
     "--val_size {val_size}: expected a fraction or a count above 0"),
    ("TrainConfig", lambda cfg: cfg.folds and not cfg.fold < cfg.folds > 1,
     "--folds {folds} --fold {fold}: expected 2 or more folds, and one of 0 to folds - 1"),
    ("TrainConfig", lambda cfg: len(cfg.label_names) == 1 or len(set(cfg.label_names)) < len(cfg.label_names),
     "--label_names {label_names}: expected at least 2 names, each once"),
    ("TrainConfig", lambda cfg: cfg.task in METRICS and cfg.metric not in METRICS[cfg.task],
     lambda cfg: f"--metric {cfg.metric}: expected one of {one_of(cfg.metric, METRICS[cfg.task])}"),
    ("CptConfig", lambda cfg: export_problem(cfg.export, cfg.base),
     lambda cfg: f"--export {cfg.export}: {export_problem(cfg.export, cfg.base)}"),
    ("InferConfig", lambda cfg: taken_problem(cfg.export),
     lambda cfg: f"--export {cfg.export}: {taken_problem(cfg.export)}"),
    ("InferConfig", lambda cfg: len(cfg.runs) > 1,
     "--runs {runs} moved: python ensemble.py --runs A B combines several runs"),
    ("InferConfig", lambda cfg: not cfg.output.endswith((".csv", ".jsonl")),
     "--output {output}: expected a name that ends in .csv or .jsonl"),
]
# fmt: on


def one_of(value: str, choices: list[str]) -> str:
    """The choices, and the one that was probably meant."""
    return ", ".join(choices) + nearest(value, choices)


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def export_problem(folder: str, base: str) -> str:
    """Why cpt.py cannot export to a folder, or an empty string. The base's own folder may lack only its weights."""
    if not folder:
        return ""
    own = os.path.realpath(folder) == os.path.realpath(base)
    foreign = ("adapter_config.json",) if own else ("adapter_config.json", "chat_template.jinja")
    names = sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else []
    taken = [name for name in names if name.endswith((".safetensors", ".index.json")) or name in foreign]
    if taken:
        return f"it already holds {taken[0]}; name another folder or remove it"
    path = Path(folder).absolute()
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK)
    return "" if writable else f"{parent} is not a folder that can be written to"


def taken_problem(folder: str) -> str:
    """Why infer.py cannot export to a folder, or an empty string: it must be new or empty."""
    if os.path.isfile(folder):
        return "it is a file; name a new folder"
    names = sorted(os.listdir(folder), reverse=True) if os.path.isdir(folder) else []
    weights = [name for name in names if name.endswith(".safetensors")]
    return f"it already holds {(weights or names)[0]}; name a new folder" if names else ""


# ---- all of them ----------------------------------------------------------------------------------------------------


def check(cfg, given: set[str] = frozenset(), needs: dict[str, str] | None = None, clashes=()) -> None:
    """Raise one UserError with every problem of a config.

    given: fields set by hand, which must have an effect. needs, clashes: the rules of a command that has its own.
    """
    needs = needs_of(type(cfg)) if needs is None else needs
    problems = idle_fields(cfg, given, needs) + field_problems(cfg)
    problems += [message_of(text, cfg) for need, text in rows_of(CLASHES, type(cfg)) if not holds(cfg, need)]
    problems += [message_of(text, cfg) for test, text in rows_of(PROBLEMS, type(cfg)) if test(cfg)]
    problems += [message_of(text, cfg) for text, test in clashes if test(cfg)]
    if problems:
        count = "" if len(problems) == 1 else f"{len(problems)} problems in the settings: "
        raise UserError(count + " | ".join(problems))


def idle_fields(cfg, given: set[str], needs: dict[str, str]) -> list[str]:
    """A problem for each field that was given by hand and has no effect."""
    problems = []
    for name in sorted(given & needs.keys()):
        missing = [need for need in needs[name].split() if not holds(cfg, need)]
        # A field set to its empty value is how a preset's is switched off: that is no request.
        if missing and getattr(cfg, name) not in ("", (), None):
            problems.append(f"--{name} has no effect: it is used {in_words(' '.join(missing))}")
    for name in NO_MEANING.get(getattr(cfg, "task", ""), "").split():
        if hasattr(cfg, name) and getattr(cfg, name) != cfg.__dataclass_fields__[name].default:
            problems.append(f"--{name} {shown(getattr(cfg, name))} has no meaning with --task {cfg.task}: leave it out")
    if isinstance(cfg, CptConfig) and "embed_lr" in given and not trains_vocabulary(cfg):
        problems.append("--embed_lr has no effect: neither --targets nor --modules_to_save names embedding or LM head")
    return problems


def trains_vocabulary(cfg: CptConfig) -> bool:
    """Whether the embedding or the LM head is trained."""
    ends = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
    return cfg.rank == 0 or any(name.endswith(ends) for name in cfg.targets + cfg.modules_to_save)


def field_problems(cfg) -> list[str]:
    """A problem for each field whose value is out of its range, no known choice, or malformed."""
    problems = []
    ranges = {name: (expected, test) for names, expected, test in RANGES for name in names.split()}
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, float) and not abs(value) < float("inf"):
            problems.append(f"--{name} {value}: expected a finite number")
        elif name in ranges and not ranges[name][1](value):
            problems.append(f"--{name} {value}: expected {ranges[name][0]}")
        elif name in CHOICES and value not in CHOICES[name]:
            problems.append(f"--{name} {value}: expected one of {one_of(value, CHOICES[name])}")
        elif name in FORMS:
            form, expected = FORMS[name]
            values = value if isinstance(value, tuple) else (value,)
            wrong = [part for part in values if not re.fullmatch(form, part)]
            problems += [f"--{name} {part}: expected {expected}" for part in wrong]
    return problems


def message_of(message, cfg) -> str:
    """The text of a rule: a function of the config, or a text in which {name} stands for a field's value."""
    if callable(message):
        return message(cfg)
    values = {name: str(shown(value)) for name, value in vars(cfg).items()}
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), message)


def shown(value):
    return ",".join(value) if isinstance(value, tuple) else value


# ---- what follows from settings -------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    """A duration such as 8.5h, 90m, 1h30m or 60s; 0 for an empty text. FORMS checks that it is one."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([hms])", text))


def check_texts(given: set[str], pairs: bool) -> None:
    """Raise UserError for flags of cpt.py given by hand that have no effect on pairs, or on documents."""
    idle = sorted(given & ({"cross_document"} if pairs else {"chat", "system"}))
    if idle:
        kind = "pairs of prompt and response" if pairs else "documents"
        raise UserError(" | ".join(f"--{name} has no effect: the training data are {kind}" for name in idle))


def preset_note(given: set[str], argv: list[str]) -> str:
    """A warning where another base meets the tiny preset's settings, or an empty string."""
    if "base" not in given or any(word.split("=")[0] == "--cfg" for word in argv):
        return ""
    return "note: without --cfg the settings are those of the tiny preset, made for tiny/base; see --help for others"


def own_data(cfg, given: set[str]):
    """The config after what follows from flags given by hand.

    With training data of the user's own, the preset's validation and test files are dropped; a task takes its first
    metric, and drops settings that have no meaning for it.
    """
    if isinstance(cfg, CptConfig):
        return replace(cfg, dataset="") if "train_data" in given and "dataset" not in given else cfg
    changes = {}
    if "task" in given:
        metrics = METRICS.get(cfg.task, [cfg.metric])
        if cfg.metric not in metrics:
            changes["metric"] = metrics[0]
        defaults = cfg.__dataclass_fields__
        changes |= {name: defaults[name].default for name in NO_MEANING.get(cfg.task, "").split()}
    if "folds" in given:
        changes["val_data"] = ""
    if "train_data" in given:
        changes |= {"val_data": "", "test_data": ""}
    return replace(cfg, **{name: value for name, value in changes.items() if name not in given})
