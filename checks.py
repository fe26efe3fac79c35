"""What must hold of settings, as tables: ranges, choices, forms, what needs what, what does not go together.

`check` reports every problem of a config in one error, before data are read or weights loaded. A new rule is a row.
"""

import dataclasses
import importlib.util
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

from configs import CptConfig
from errors import nearest, refuse


def table(text: str) -> list[list[str]]:
    """The rows of a table that is written as text, with columns separated by ::"""
    return [[cell.strip() for cell in line.split("::")] for line in text.strip().splitlines()]


def lists(text: str) -> dict[str, list[str]]:
    """{name: words} of a table with the columns name and words."""
    return {name: words.split() for name, words in table(text)}


# ---- rules about one field, by its name, in every command -----------------------------------------------------------

CHOICES = lists("""
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
METRICS = lists("""
        single_label :: micro_f1 macro_f1 weighted_f1 accuracy roc_auc log_loss
        multi_label :: micro_f1 macro_f1 weighted_f1 subset_accuracy hamming_loss roc_auc average_precision log_loss
        regression :: mse rmse mae r2 pearson roc_auc
""")
# fmt: off
RANGES = {name: rule for names, *rule in (  # fields, what is expected, test
    ("lr epochs batch_size max_new_tokens micro_batches max_length alpha soft_temperature",
     "a number above 0", lambda value: value > 0),
    ("rank head_lr embed_lr weight_decay max_steps warmup_steps grad_clip eval_every save_every keep patience seed "
     "eval_rows max_tokens limit samples worst folds", "0 or more", lambda value: value >= 0),
    ("lora_dropout head_dropout label_smoothing warmup_ratio", "a fraction from 0 to below 1",
     lambda value: 0 <= value < 1),
    ("soft_share", "a fraction from 0 to 1", lambda value: 0 <= value <= 1),
    ("top_p", "a fraction above 0, at most 1", lambda value: 0 < value <= 1),
    ("threshold", "a probability below 1, or 0 for the run's own", lambda value: 0 <= value < 1),
    ("temperature", "0 for greedy, or 0.01 and more", lambda value: value == 0 or value >= 0.01),
    ("submission", "two different names", lambda value: len(set(map(str.strip, value.split(",")))) > value.count(",")),
    ("val_size", "a whole number of rows, if not a fraction", lambda value: value < 1 or value == int(value)),
) for name in names.split()}
# fmt: on
MOST = 2**63 - 1  # of whole numbers: torch takes no larger seed
NUMBERS = r"(?:(?=[^,]*[1-9])[0-9.]+(?:e-?[0-9]+)?(?:,(?!$)|$))+"  # positive, separated by commas
FORMS = {  # field: (regular expression of the value, or of each value of a tuple; what is expected)
    name: (form.replace("NUMBERS", NUMBERS), expected)
    for name, form, expected in table(r"""
        text :: (?s).*\{[^{}]+\}.* :: a template that names a column, like "{Question}"
        label_delimiter :: (?s).+ :: the separator of the labels, or a JSON list in the column
        budgets :: [^=]+=[1-9]\d* :: field=tokens, such as body=300
        time_limit :: (?:(?:\d+(?:\.\d+)?)[hms])* :: a duration like 8.5h, 90m or 60s
        pos_weight :: none|balanced|NUMBERS :: none, balanced or positive numbers like 1,2.5
        class_weights :: none|balanced|inverse|effective(:0?\.\d+)?|NUMBERS :: none, balanced, effective:0.99 or numbers
        report :: tensorboard|wandb :: tensorboard, wandb or both
        submission :: \s*|[^,]*[^,\s][^,]*,[^,]*[^,\s][^,]* :: two column names such as "id,label", or empty
        seeds :: \d{1,18} :: whole numbers of 0 or more, up to 18 digits
    """)
}

# ---- what a field that is given by hand needs -----------------------------------------------------------------------
# "rank": another field must be set; "!prompt": must not be set; "head=label_words": must have this value;
# "base|adapter": one of them is enough. Several needs are separated by spaces.

NEEDS = table("""
    Shared :: alpha lora_dropout targets :: rank
    TrainConfig :: rslora :: rank
    TrainConfig :: fold :: folds
    TrainConfig :: val_size :: !val_data !folds
    TrainConfig :: split_seed :: !val_data
    TrainConfig :: text :: !prompt
    TrainConfig :: label_words :: head=label_words
    TrainConfig :: head_lr head_dropout :: !head=label_words
    TrainConfig :: label_delimiter :: !label_columns
    CptConfig :: export_dtype :: export
    CptConfig :: val_size :: !val_data
    CptConfig :: system :: !chat=no
    InferConfig :: prompt label_column label_names head quant max_length :: base|adapter !runs
    InferConfig :: text :: base|adapter !runs !prompt
    InferConfig :: label_words :: base|adapter !runs head=label_words
    InferConfig :: answer :: submission
    InferConfig :: runs :: !adapter
    InferConfig :: merge :: !export
""")
# Fields that must have their default with a task.
NO_MEANING = lists("""
    regression :: label_smoothing class_weights head label_names label_columns label_delimiter pos_weight soft_share \
soft_temperature thresholds
    single_label :: label_columns label_delimiter pos_weight
    multi_label :: class_weights
""")


def rows_of(rows, cls):
    """The rows of a table that are about a command's config, or about one that it extends."""
    commands = {base.__name__ for base in cls.__mro__}
    return [row[1:] for row in rows if row[0] in commands]


def by_field(rows, cls) -> dict[str, str]:
    """{field: text} of a command from a table of: command, fields, text."""
    return {name: text for names, text in rows_of(rows, cls) for name in names.split()}


def needs_of(cls) -> dict[str, str]:
    """{field: its needs} of a command: its own (a class variable NEEDS), or those above."""
    return getattr(cls, "NEEDS", None) or by_field(NEEDS, cls)


def _holds(cfg, need):
    """Whether a config meets one need, such as "rank", "!prompt", "head=label_words" or "base|adapter"."""
    if "|" in need:
        return any(_holds(cfg, part) for part in need.split("|"))
    name, equals, value = need.removeprefix("!").partition("=")
    actual = getattr(cfg, name)
    is_set = str(actual) == value if equals else bool(actual)
    return is_set != need.startswith("!")


def in_words(needs: str) -> str:
    """Needs as a person reads them: "with --folds, without --val_data"."""
    words = [f"without --{need[1:]}" if need.startswith("!") else f"with --{need}" for need in needs.split()]
    return ", ".join(words).replace("=", " ").replace("|", " or --")


# ---- what does not go together --------------------------------------------------------------------------------------
# Rows of: command (Shared: train.py and cpt.py), a need that must hold, the message. {name} there is a field's value.

CLASHES = table("""
    Shared :: quant=none|rank :: --quant {quant} with --rank 0: 4-bit weights cannot be trained
    Shared :: !rank|targets :: --rank {rank} with empty --targets: name linears, or all-linear
    Shared :: !warmup_steps|!warmup_ratio :: --warmup_steps {warmup_steps} and --warmup_ratio {warmup_ratio}: give \
one of the two
    Shared :: train_data :: --train_data is empty: give the file or folder to train on
    TrainConfig :: !folds|!val_data :: --folds {folds} with --val_data {val_data}: folds validate on training rows
    TrainConfig :: !task=multi_label|head=linear :: --head {head} with --task multi_label: use --head linear
    TrainConfig :: !head=label_words|pooling=last :: --head label_words with --pooling {pooling}: use --pooling last
    TrainConfig :: !head=label_words|rank|train_layers :: --head label_words with --rank 0 --train_layers 0: nothing \
would be trained
    TrainConfig :: !rank|train_layers=-1 :: --train_layers {train_layers} with --rank {rank}: it needs --rank 0
    TrainConfig :: rank|bias=none :: --bias {bias} with --rank 0: biases are trained with an adapter only
    TrainConfig :: !thresholds=per_class|!task=single_label :: --thresholds per_class with --task single_label: \
it is for --task multi_label; two classes take global
    TrainConfig :: !label_names|!label_columns :: --label_names with --label_columns: the columns name the labels
    CptConfig :: !random_init|!rank :: --random_init with --rank: an adapter on a random base learns nothing
    CptConfig :: rank|!modules_to_save :: --modules_to_save with --rank 0: the whole base is trained already
    InferConfig :: !merge|quant=none :: --merge with --quant {quant}: an adapter is never merged into 4-bit weights
""")
# Rows of: command, a message ({problem}: what the function returns), a function that is true where it does not hold.
# fmt: off
PROBLEMS = [
    ("Shared", "--max_tokens {max_tokens} is below --max_length {max_length}: the longest row fits in no micro-batch",
     lambda cfg: 0 < cfg.max_tokens < cfg.max_length),
    ("Shared", "--optimizer {optimizer} needs bitsandbytes: pip install bitsandbytes",
     lambda cfg: cfg.optimizer != "adamw" and _missing("bitsandbytes")),
    ("Shared", "--targets {targets}: all-linear cannot be combined with names",
     lambda cfg: "all-linear" in cfg.targets and len(cfg.targets) > 1),
    ("Shared", "--report {report}: not installed: pip install {report}",
     lambda cfg: any(name in ("tensorboard", "wandb") and _missing(name) for name in cfg.report)),
    ("Shared", "--outputs {outputs}: {problem}; name another folder",
     lambda cfg: cfg.resume in ("", "auto") and not getattr(cfg, "dry_run", False) and folder_problem(cfg.outputs)),
    ("Shared", "--val_size {val_size}: expected a fraction or a count above 0",
     lambda cfg: not getattr(cfg, "val_data", "") and cfg.val_size <= 0),
    ("TrainConfig", "--folds {folds}: expected 2 or more", lambda cfg: cfg.folds == 1),
    ("TrainConfig", "--fold {fold}: expected 0 to one below --folds {folds}", lambda cfg: 0 < cfg.folds <= cfg.fold),
    ("TrainConfig", "--label_names {label_names}: expected at least 2 names, each once",
     lambda cfg: len(cfg.label_names) == 1 or len(set(cfg.label_names)) < len(cfg.label_names)),
    ("TrainConfig", "--label_columns {label_columns}: expected each column once",
     lambda cfg: len(set(cfg.label_columns)) < len(cfg.label_columns)),
    ("TrainConfig", "--metric {metric}: expected one of {problem}",
     lambda cfg: cfg.task in METRICS and _not_among(cfg.metric, METRICS[cfg.task])),
    ("CptConfig", "--export {export}: {problem}", lambda cfg: _export_problem(cfg.export, cfg.base)),
    ("InferConfig", "--export {export}: {problem}", lambda cfg: _export_problem(cfg.export)),
    *[(command, "--max_tokens 0: expected a number above 0", lambda cfg: not cfg.max_tokens)
      for command in ("InferConfig", "EnsembleConfig")],
    ("InferConfig", "--runs {runs} moved: python ensemble.py --runs A B combines several runs",
     lambda cfg: len(cfg.runs) > 1),
    ("InferConfig", "--output {output}: expected a name that ends in .csv or .jsonl",
     lambda cfg: not cfg.output.endswith((".csv", ".jsonl"))),
]
# fmt: on


def _not_among(value, choices):
    """The choices, and the one that was probably meant; an empty string for a value that is one of them."""
    return "" if value in choices else ", ".join(choices) + nearest(value, choices)


def _missing(package):
    return importlib.util.find_spec(package) is None


def _export_problem(folder, base=None):
    """Why a model cannot be exported to a folder, or an empty string.

    infer.py wants a new or empty one. cpt.py (base) leaves other files in place: there may be none of a model, and in
    the base's own folder no weights.
    """
    if not folder:
        return ""
    path = Path(folder).absolute()
    forbidden = (".safetensors", ".index.json", "adapter_config.json", "chat_template.jinja")
    if base is None:
        forbidden = ""  # with which every name ends
    elif os.path.realpath(folder) == os.path.realpath(base):
        forbidden = forbidden[:-1]
    names = [name for name in os.listdir(path) if name.endswith(forbidden)] if path.is_dir() else []
    if names:
        first = min(names, key=lambda name: (not name.endswith(".safetensors"), name))
        return f"it already holds {first}; name another folder or remove it"
    problem = folder_problem(folder)
    return problem and f"{problem}; name another folder"


# ---- what is to be written ------------------------------------------------------------------------------------------


OWN_FILES = "split.csv val_predictions.csv metrics.jsonl corpus.jsonl".split()  # of a run: an output must not be one


def need_output(path: str, flag: str, *inputs: str | Path) -> None:
    """Raise UserError, before hours are spent, for a file that cannot be written or would replace what is read.

    inputs: the files and runs that are read; empty names are none.
    """
    read = [Path(other, name) for other in inputs if other for name in ("", *OWN_FILES)]
    if os.path.isdir(path):
        problem = "it is a folder"
    elif os.path.lexists(path) and not os.path.isfile(path):
        problem = "it is no regular file"
    elif os.path.isfile(path) and any(os.path.samefile(path, other) for other in read if os.path.isfile(other)):
        problem = "this file is read, and would be replaced"
    else:
        problem = folder_problem(Path(path).absolute().parent, Path(path).name)
    refuse([f"{flag} {path}: {problem}; name another file".strip()] if problem else [])


def folder_problem(folder: str | Path, name: str = "") -> str:
    """Why a folder, or a file of this name in it, cannot be made, or an empty string: an empty file is tried."""
    path = Path(folder).absolute()
    parent = next(above for above in (path, *path.parents) if os.path.lexists(above))
    if not os.path.isdir(parent):
        return f"{parent} is not a folder"
    longest = max((*path.relative_to(parent).parts, name), key=lambda part: len(os.fsencode(part)))
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{longest}.", dir=parent):
            return ""
    except OSError as e:
        return f"{parent} takes no new file ({e.strerror})"


# ---- all of them ----------------------------------------------------------------------------------------------------


def check(cfg, given: set[str] = frozenset(), needs: dict[str, str] | None = None, clashes=()) -> None:
    """Raise one UserError with every problem of a config.

    given: fields set by hand, which must have an effect. needs, clashes: the rules of a command that has its own.
    """
    problems = _idle_fields(cfg, given, needs or needs_of(type(cfg))) + _field_problems(cfg)
    problems += [_message_of(text, cfg) for need, text in rows_of(CLASHES, type(cfg)) if not _holds(cfg, need)]
    tests = [*rows_of(PROBLEMS, type(cfg)), *clashes]
    problems += [_message_of(text, cfg, problem) for text, test in tests if (problem := test(cfg))]
    refuse(problems, f"{len(problems)} problems in the settings: " if len(problems) > 1 else "")


def _idle_fields(cfg, given, needs):
    """A problem for each field that was given by hand and has no effect."""
    problems = []
    for name in sorted(given & needs.keys()):
        missing = [need for need in needs[name].split() if not _holds(cfg, need)]
        # A field set to its empty value is how a preset's is switched off: that is no request.
        if missing and getattr(cfg, name) not in ("", (), None):
            problems.append(f"--{name} has no effect: it is used {in_words(' '.join(missing))}")
    for name in NO_MEANING.get(getattr(cfg, "task", ""), []):
        value = getattr(cfg, name, None)
        if value != getattr(type(cfg), name, None):  # the default
            problems.append(f"--{name} {shown(value)} has no meaning with --task {cfg.task}: leave it out")
    if "embed_lr" in given and cfg.rank:
        vocabulary = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
        if not any(name.endswith(vocabulary) for name in cfg.targets + cfg.modules_to_save):
            problems.append("--embed_lr has no effect: no embedding or LM head in --targets or --modules_to_save")
    return problems


def _field_problems(cfg):
    """A problem for each field whose value is out of its range, no known choice, or malformed."""
    problems = []
    for name, value in dataclasses.asdict(cfg).items():
        expected, in_range = RANGES.get(name, ("", bool))
        if isinstance(value, float) and not abs(value) < float("inf"):
            problems.append(f"--{name} {value}: expected a finite number")
        elif isinstance(value, int) and abs(value) > MOST:
            problems.append(f"--{name} {value}: expected at most {MOST}")
        elif expected and not in_range(value):
            problems.append(f"--{name} {value}: expected {expected}")
        elif name in CHOICES and value not in CHOICES[name]:
            problems.append(f"--{name} {value}: expected one of {_not_among(value, CHOICES[name])}")
        elif name in FORMS:
            form, expected = FORMS[name]
            values = value if isinstance(value, tuple) else (value,)
            problems += [f"--{name} {part}: expected {expected}" for part in values if not re.fullmatch(form, part)]
    return problems


def _message_of(message, cfg, problem=None):
    """The text of a rule: a function of the config, or a text in which {name} stands for a field's value."""
    if callable(message):
        return message(cfg)
    return message.format(problem=problem, **{name: shown(value) for name, value in vars(cfg).items()})


def shown(value) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


# ---- what follows from settings -------------------------------------------------------------------------------------


def seconds(text: str) -> float:
    """A duration such as 8.5h, 90m, 1h30m or 60s; 0 for an empty text. FORMS checks that it is one."""
    units = {"h": 3600, "m": 60, "s": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([hms])", text))


def check_texts(given: set[str], pairs: bool) -> None:
    """Raise UserError for flags of cpt.py given by hand that have no effect on pairs, or on documents."""
    idle = sorted(given & ({"cross_document"} if pairs else {"chat", "system"}))
    kind = "pairs of prompt and response" if pairs else "documents"
    refuse([f"--{name} has no effect: the training data are {kind}" for name in idle])


def preset_note(given: set[str], argv: list[str]) -> str:
    """A warning where another base meets the tiny preset's settings, or an empty string."""
    if "base" not in given or any(word.startswith("--cfg") for word in argv):
        return ""
    return "note: without --cfg the settings are those of the tiny preset, made for tiny/base; see --help for others"


def own_data(cfg, given: set[str]):
    """The config after what follows from flags given by hand.

    With training data of the user's own, the preset's validation and test files are dropped; a task takes its first
    metric, and drops settings that have no meaning for it.
    """
    changes = {}
    if "train_data" in given:
        changes = {"dataset": ""} if isinstance(cfg, CptConfig) else {"val_data": "", "test_data": ""}
    if "folds" in given:
        changes["val_data"] = ""
    if "task" in given:
        changes |= {name: getattr(type(cfg), name) for name in NO_MEANING.get(cfg.task, [])}
        metrics = METRICS.get(cfg.task, [cfg.metric])
        if cfg.metric not in metrics:
            changes["metric"] = metrics[0]
    return replace(cfg, **{name: changes[name] for name in changes.keys() - given})
