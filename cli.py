"""The command line: flags, presets, config files and help.

Nothing here imports torch, so that help and typos are answered at once: see `early`.
"""

import csv
import dataclasses
import inspect
import json
import os
import re
import sys
import textwrap
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import checks
import seals
import signals
from configs import OrAuto, Several
from errors import Untrusted, UserError, nearest, print_anything, refuse

# Flags that live in another command now: commands, flags, what to do instead.
MOVED = checks.table("""
    TrainConfig :: seeds :: python folds.py --seeds 1,2 ...
    TrainConfig :: balance :: python slices.py --balance ... writes slices; train on one of them
    TrainConfig :: train_start train_stop :: python slices.py --slice_rows 20000 ... writes slices; train on one of them
    TrainConfig :: split :: python slices.py ... writes the validation rows to a file for --val_data
    TrainConfig :: examples :: python runs/example_rows.py TRAIN OUT --examples column=label ... writes rows to train on
    TrainConfig :: examples_column :: python runs/example_rows.py TRAIN OUT --column body ... writes rows to train on
    TrainConfig :: pseudo_labels pseudo_data :: python runs/pseudo_labels.py TRAIN PREDICTIONS TEST OUT writes rows to \
train on
    TrainConfig :: pseudo_min_confidence :: python runs/pseudo_labels.py ... --min_confidence 0.9 writes rows to train \
on
    TrainConfig :: pseudo_soft :: python runs/pseudo_labels.py ... --soft writes probability columns to train on
    InferConfig :: ensemble :: python ensemble.py --runs A B --ensemble mean_prob ...
    InferConfig :: scoring :: python generate.py --score ... reads generated answers as scores
    InferConfig :: generate chat system examples tools max_new_tokens temperature top_p batch_size seed :: python \
generate.py ... completes prompts
""")
# The values of moved fields that mean nothing: configs that hold them load without a note.
IDLE = (None, "", 0, [], "body", 0.9, "mean_logit", "label_words", "all")


def moved_fields(cls) -> dict[str, str]:
    """{flag: what to do instead} of a command, also of one whose settings it extends."""
    return {name: hint for name, hint in checks.by_field(MOVED, cls).items() if not hasattr(cls, name)}


def _kinds_of(cls):
    """The type of each field of a config."""
    return {field.name: field.type for field in dataclasses.fields(cls)}


# ---- from argv to a config ------------------------------------------------------------------------------------------


def early(cls, presets: dict, doc: str, argv: list[str] | None = None) -> None:
    """Answer --help and typos of a script's command line and exit; return if the command line is fine.

    Scripts call it before they import torch, which takes seconds. Under torchrun only rank 0 speaks.
    """
    signals.early()
    print_anything()
    if sys.platform == "linux" and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # Micro-batches differ in size: pieces of a GPU's memory that can grow leave fewer gaps.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        parse(cls, presets, sys.argv[1:] if argv is None else argv, doc)
    except (UserError, Untrusted) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_status)


def parse(cls, presets: dict, argv: list[str], doc: str = ""):
    """Parse `--cfg NAME|FILE --field value ...` to (config, set of fields given by hand).

    A flag of a bool field may stand alone. Raises UserError naming the nearest known flag or preset; prints the help
    and exits with 0 at --help. The config is not checked yet: call `checks.check`.
    """
    if "--help" in argv or "-h" in argv:
        print(f"{doc.strip()}\n\n{describe(cls, presets, argv)}")
        sys.exit(0)
    values = _read_flags(cls, argv)
    start = _starting_config(cls, presets, values.pop("cfg", None))
    given = set(values)
    # Two ways to state the warm-up: the one given by hand replaces the preset's.
    warmup = {"warmup_steps": 0, "warmup_ratio": 0.0}
    if given & warmup.keys():
        values = warmup | values
    return replace(start, **values), given


def _read_flags(cls, argv):
    """{field: value} of `--field value`, `--field=value` and, for bool fields, `--field` alone; also of --cfg.

    A field that takes several values takes all words up to the next flag.
    """
    kinds = _kinds_of(cls) | {"cfg": str}
    moved = moved_fields(cls)
    texts, problems = {}, []
    for flag, words in grouped(argv):
        name = flag.removeprefix("--").replace("-", "_")
        kind = kinds.get(name)
        if not flag.startswith("--"):
            problems.append(f"'{flag}' is not a flag: expected --field value")
        elif name in moved:
            problems.append(f"{flag} moved: {moved[name]}")
        elif kind is None:
            problems.append(f"unknown flag {flag}{nearest(name, kinds, '--')}")
        elif name in texts:
            problems.append(f"{flag} is given twice")
        elif not words and kind is not bool:
            problems.append(f"{flag} has no value")
        elif len(words) > 1 and kind != Several:
            problems.append(f"'{words[1]}' is not a flag: expected --field value")
        else:
            texts[name] = ",".join(words) if words else "true"
    return _converted(texts, kinds, problems, "--")


def grouped(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words that follow it; `--field=value` counts as two words, a leading word as a flag."""
    groups = []
    for word in argv:
        flag, equals, value = word.partition("=")
        if word.startswith("--"):
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(word)
        else:
            groups.append((word, []))
    return groups


def _starting_config(cls, presets, name):
    """The config that flags start from: a preset's, that of an earlier run, or by default tiny."""
    if name is None and not presets:
        return cls()
    name = name or "tiny"
    if name in presets:  # folds.py has more fields than its presets know
        return cls(**vars(presets[name]()))
    if name.endswith(".json") or os.path.isdir(name):
        if note := moved_note(cls, name):
            print(note, file=sys.stderr)
        return read_config(cls, name)
    known = ", ".join(presets) or "none here"
    raise UserError(f"unknown preset {name}{nearest(name, presets)}: expected one of {known}, or a config.json")


def whole_number(text: str) -> int:
    """An int of any size, also written as 1e4. Raises ValueError for anything else."""
    with suppress(ValueError):
        return int(text)
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def several(text: str) -> tuple[str, ...]:
    """The values of a list separated by commas, as in CSV: one that holds a comma stands in quotation marks."""
    try:
        values = next(csv.reader([text], skipinitialspace=True, strict=True), [])
    except csv.Error as e:
        raise ValueError(text) from e
    return tuple(value.strip() for value in values if value.strip())


TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
READERS = {  # type of a field: how a text is read as its value, what is expected
    bool: (lambda text: TRUTH[text.lower()], "true or false"),
    int: (whole_number, "a whole number"),
    OrAuto: (lambda text: 0 if text == "auto" else whole_number(text), "a whole number, or auto"),
    float: (float, "a number"),
    str: (str, "a string"),
    Several: (several, "values separated by commas; one that holds a comma in quotation marks: 'a,\"b, c\"'"),
}


def convert(value, kind):
    """A command-line or JSON value as the type of its field. Raises ValueError with what was expected."""
    if kind == Several and isinstance(value, list):
        return tuple(map(str, value))
    read, expected = READERS[kind]
    with suppress(ValueError, KeyError):
        if isinstance(value, str | int | float):
            return read(str(value))
    raise ValueError(expected)


def _converted(raw, kinds, problems, dashes="", where=""):
    """{field: value} of raw values. Raises UserError for the problems so far and those met here."""
    fields = {}
    for name, value in raw.items():
        try:
            fields[name] = convert(value, kinds[name])
        except ValueError as e:
            shown = value if isinstance(value, str) else json.dumps(value)
            problems.append(f"{dashes}{name} {shown}: expected {e}")
    refuse(problems, where)
    return fields


# ---- config files ---------------------------------------------------------------------------------------------------


def raw_config(path: str | Path) -> dict:
    """The fields of a config.json, or of the run folder that holds one, as they are stored.

    Raises Untrusted where it is not as its run wrote it.
    """
    path = Path(path)
    if path.is_dir():
        path /= "config.json"
    text = seals.read(path)
    try:
        values = json.loads(text or "")
        if not isinstance(values, dict):
            raise ValueError(f"expected an object of fields, got {type(values).__name__}")
        return values
    except (ValueError, RecursionError) as e:
        reason = "No such file" if text is None else e
        raise UserError(f"config {path} cannot be read as JSON: {reason}") from None


def read_config(cls, path: str | Path):
    """The config of an earlier run, from its config.json or its folder. Fields that moved are left out: see moved_note.

    Raises UserError naming every field that is unknown or has a wrong value.
    """
    kinds, raw = _kinds_of(cls), raw_config(path)
    unknown = raw.keys() - (kinds | moved_fields(cls))
    problems = [f"unknown field {name}{nearest(name, kinds)}" for name in sorted(unknown)]
    if raw.get("fold") == "all":  # a family of runs over all folds, before folds.py
        del raw["fold"]
    known = {name: value for name, value in raw.items() if name in kinds}
    return cls(**_converted(known, kinds, problems, where=f"config {path}: "))


def moved_note(cls, path: str | Path) -> str:
    """Which settings of a config.json moved, and what replaces them; an empty string if none has an effect."""
    moved = moved_fields(cls)
    used = [(name, value) for name, value in raw_config(path).items() if name in moved and value not in IDLE]
    hints = [f"{name} {json.dumps(value)}: {moved[name]}" for name, value in used]
    return f"note: {path}: not read, because it moved: {'; '.join(hints)}" if hints else ""


def resumed(cfg, given: set[str], run: Path):
    """The config with which a run that is to be resumed began.

    Raises UserError for flags given by hand that contradict it.
    """
    new, old = vars(cfg), vars(read_config(type(cfg), run))
    free = {"resume", "dry_run", "outputs", "keep", "export", "export_dtype", "time_limit"}
    if (run / "last").is_dir():  # the base may have moved: its fingerprint is compared with that of the save
        free |= {"base"} & given
    if changed := [name for name in sorted(given - free) if new[name] != old[name]]:
        pairs = ", ".join(f"--{name} {new[name]} (the run has {old[name]})" for name in changed)
        raise UserError(f"--resume {run}: a run continues with its own settings, but {pairs}; leave these flags out")
    return replace(cfg, **{name: old[name] for name in old.keys() - free})


def to_json(cfg) -> str:
    """The resolved config as it is stored in a run."""
    return json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"


# ---- help -----------------------------------------------------------------------------------------------------------


def field_help(cls) -> dict[str, tuple[str, str]]:
    """{field: (topic, text)}: the comment behind it, and the comment line of its own that it stands under."""
    fields = {}
    for part in reversed(cls.__mro__[:-1]):
        topic = ""
        for heading, name, text in re.findall(r"(?m)^    (?:# (.+)|(\w+):[^#\n]*# *(.+))$", inspect.getsource(part)):
            topic = heading or topic
            if name:
                fields[name] = topic, text
    return fields


def describe(cls, presets: dict, argv: list[str]) -> str:
    """The answer to --help: presets, and the fields that people change first, or with "all" every field by topic.

    The values shown are those of --cfg.
    """
    preset = (dict(grouped(argv)).get("--cfg") or [None])[0]
    start = _starting_config(cls, presets, preset)
    needs = checks.needs_of(cls)
    topics, described = {}, {}
    for name, (topic, text) in field_help(cls).items():
        topics.setdefault(topic, []).append(name)
        need = f" (only {checks.in_words(needs[name])})" if name in needs else ""
        value = checks.shown(getattr(start, name)) or '""'
        described[name] = f"  --{name:<16} {text}{need} [{value}]"

    lines = ["presets (--cfg NAME, or the config.json of an earlier run; default: tiny):"] if presets else []
    lines += [f"  {name:<18} {make.__doc__}" for name, make in presets.items()]
    values = f"the values of {preset}" if preset else "their defaults"
    lines.append(f"settings (--name value), with {values} in brackets:")
    first = [] if "all" in argv else getattr(cls, "FIRST", "").split()
    lines += [described[name] for name in first]
    for topic, names in topics.items():
        rest = " ".join(f"--{name}" for name in names if name not in first)
        if not first:
            lines += [f" {topic}:" if topic else "", *(described[name] for name in names)]
        elif rest:
            lines.append(textwrap.fill(f"  more on {topic}: {rest}", 118, subsequent_indent="    "))
    if first:
        lines.append("`--help all` describes every setting")
    return "\n".join(lines)
