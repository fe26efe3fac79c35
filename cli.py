"""The command line: flags, presets, config files and help.

Nothing here imports torch, so that help and typos are answered at once: see `early`.
"""

import dataclasses
import inspect
import json
import os
import re
import sys
import textwrap
import typing
from dataclasses import dataclass, replace
from pathlib import Path

import checks
from errors import UserError, nearest

# Flags that live in another command now: {command's config: {flag: what to do instead}}.
MOVED = {
    "TrainConfig": {
        "seeds": "python folds.py --seeds 1,2 ...",
        "balance": "python slices.py --balance ... writes slices; train on one of them",
        "train_start": "python slices.py --slice_rows 20000 ... writes slices; train on one of them",
        "train_stop": "python slices.py --slice_rows 20000 ... writes slices; train on one of them",
        "split": "python slices.py ... writes the validation rows to a file for --val_data",
        "examples": "python runs/example_rows.py TRAIN OUT --examples column=label ... writes rows to train on",
        "examples_column": "python runs/example_rows.py TRAIN OUT --column body ... writes rows to train on",
        "pseudo_labels": "python runs/pseudo_labels.py TRAIN PREDICTIONS TEST OUT writes rows to train on",
        "pseudo_data": "python runs/pseudo_labels.py TRAIN PREDICTIONS TEST OUT writes rows to train on",
        "pseudo_min_confidence": "python runs/pseudo_labels.py ... --min_confidence 0.9 writes rows to train on",
        "pseudo_soft": "python runs/pseudo_labels.py ... --soft writes probability columns to train on",
    },
    "InferConfig": {
        "ensemble": "python ensemble.py --runs A B --ensemble mean_prob ...",
        "scoring": "python generate.py --score ... reads generated answers as scores",
        **dict.fromkeys(
            "generate chat system examples tools max_new_tokens temperature top_p batch_size seed".split(),
            "python generate.py ... completes prompts",
        ),
    },
}
# The values of moved fields that mean nothing: configs that hold them load without a note.
IDLE = (None, "", 0, False, [], "body", 0.9, "mean_logit", "label_words", "all")


def moved_fields(cls) -> dict[str, str]:
    """{flag: what to do instead} of a command, also of one whose settings it extends."""
    rows = {name: hint for base in cls.__mro__ for name, hint in MOVED.get(base.__name__, {}).items()}
    return {name: hint for name, hint in rows.items() if not hasattr(cls, name)}


# ---- from argv to a config ------------------------------------------------------------------------------------------


def early(cls, presets: dict, doc: str, argv: list[str] | None = None) -> None:
    """Answer --help and typos of a script's command line and exit; return if the command line is fine.

    Scripts call it before they import torch, which takes seconds. Under torchrun only rank 0 speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        parse(cls, presets, sys.argv[1:] if argv is None else argv, doc)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


def parse(cls, presets: dict, argv: list[str], doc: str = ""):
    """Parse `--cfg NAME|FILE --field value ...` to (config, set of fields given by hand).

    A flag of a bool field may stand alone. Raises UserError naming the nearest known flag or preset; prints the help
    and exits with 0 at --help. The config is not checked yet: call `checks.check`.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls, presets, argv, doc))
        sys.exit(0)
    texts = read_flags(cls, argv)
    start = starting_config(cls, presets, texts.pop("cfg", None))
    hints = kinds_of(cls)
    values, problems = {}, []
    for name, text in texts.items():
        try:
            values[name] = convert(text, hints[name])
        except ValueError as e:
            problems.append(f"--{name} {text}: expected {e}")
    refuse(problems)
    given = set(values)

    # Two ways to state the warm-up: the one given by hand replaces the preset's.
    if "warmup_steps" in given and "warmup_ratio" not in given:
        values["warmup_ratio"] = 0.0
    if "warmup_ratio" in given and "warmup_steps" not in given:
        values["warmup_steps"] = 0
    return replace(start, **values), given


def kinds_of(cls) -> dict[str, type]:
    """The type of each field of a config."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def refuse(problems: list[str], prefix: str = "") -> None:
    """Raise one UserError with all problems, if there are any."""
    if problems:
        raise UserError(prefix + " | ".join(problems))


def read_flags(cls, argv: list[str]) -> dict[str, str]:
    """{field: text} of `--field value`, `--field=value` and, for bool fields, `--field` alone.

    A field that takes several values takes all words up to the next flag.
    """
    hints = kinds_of(cls)
    moved = moved_fields(cls)
    texts, problems = {}, []
    for flag, words in grouped(argv):
        name = flag.removeprefix("--").replace("-", "_")
        kind = str if name == "cfg" else hints.get(name)
        if not flag.startswith("--"):
            problems.append(f"'{flag}' is not a flag: expected --field value")
        elif name in moved:
            problems.append(f"{flag} moved: {moved[name]}")
        elif kind is None:
            problems.append(f"unknown flag {flag}{nearest(name, [*hints, 'cfg'], '--')}")
        elif name in texts:
            problems.append(f"{flag} is given twice")
        elif not words and kind is not bool:
            problems.append(f"{flag} has no value")
        elif len(words) > 1 and kind in (str, int, float, bool):
            problems.append(f"'{words[1]}' is not a flag: expected --field value")
        else:
            texts[name] = ",".join(words) if words else "true"
    refuse(problems)
    return texts


def grouped(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Each flag with the words that follow it; `--field=value` counts as two words, leading words as flags."""
    groups = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups and groups[-1][0].startswith("--"):
            groups[-1][1].append(word)
        else:
            groups.append((word, []))
    return groups


def starting_config(cls, presets: dict, name: str | None):
    """The config that flags start from: a preset's, that of an earlier run, or by default tiny."""
    if name is None and "tiny" not in presets:
        return cls()
    name = name or "tiny"
    if name in presets:  # folds.py has more fields than its presets know
        return cls(**vars(presets[name]()))
    if name.endswith(".json") or os.path.isdir(name):
        note = moved_note(cls, name)
        if note:
            print(note, file=sys.stderr)
        return read_config(cls, name)
    known = ", ".join(presets) or "none here"
    raise UserError(f"unknown preset {name}{nearest(name, presets)}: expected one of {known}, or a config.json")


def convert(value, kind):
    """A command-line or JSON value as the type of its field. Raises ValueError with what was expected."""
    text = str(value)
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise ValueError("true or false")
        return words[text.lower()]
    if kind is int:
        return whole_number(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError("a number") from None
    if kind is str:
        return text
    return tuple(part.strip() for part in text.split(",") if part.strip())  # tuple[str, ...]


def whole_number(text: str) -> int:
    """An int of any size, also written as 1e4. Raises ValueError for anything else."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise ValueError("a whole number")


# ---- config files ---------------------------------------------------------------------------------------------------


def raw_config(path: str | Path) -> dict:
    """The fields of a config.json, or of the run folder that holds one, as they are stored."""
    path = Path(path) / "config.json" if os.path.isdir(path) else Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"config {path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"config {path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected an object of fields, got {type(values).__name__}")
    return values


def read_config(cls, path: str | Path):
    """The config of an earlier run, from its config.json or its folder. Fields that moved are left out: see moved_note.

    Raises UserError naming every field that is unknown or has a wrong value.
    """
    hints = kinds_of(cls)
    moved = moved_fields(cls)
    fields, problems = {}, []
    for name, value in raw_config(path).items():
        if name == "fold" and value == "all":  # a family of runs over all folds, before folds.py
            continue
        kind = hints.get(name)
        several = isinstance(value, list) and kind not in (str, int, float, bool)
        if name in moved:
            continue
        if kind is None:
            problems.append(f"unknown field {name}{nearest(name, hints)}")
        elif several:
            fields[name] = tuple(str(part) for part in value)
        elif value is None or isinstance(value, (list, dict)):
            expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a string")
            problems.append(f"{name} {json.dumps(value)}: expected {expected}")
        else:
            try:
                fields[name] = convert(value, kind)
            except ValueError as e:
                problems.append(f"{name} {value}: expected {e}")
    refuse(problems, f"config {path}: ")
    return cls(**fields)


def moved_note(cls, path: str | Path) -> str:
    """Which settings of a config.json moved, and what replaces them; an empty string if none has an effect."""
    moved = moved_fields(cls)
    used = {name: value for name, value in raw_config(path).items() if name in moved and value not in IDLE}
    if not used:
        return ""
    hints = "; ".join(f"{name} {json.dumps(value)}: {moved[name]}" for name, value in used.items())
    return f"note: {path}: not read, because it moved: {hints}"


def resumed(cfg, given: set[str], run: Path):
    """The config with which a run that is to be resumed began.

    Raises UserError for flags given by hand that contradict it.
    """
    saved = read_config(type(cfg), run)
    free = {"resume", "dry_run", "outputs", "keep", "export", "export_dtype", "time_limit"} & set(vars(cfg))
    changed = [name for name in sorted(given - free) if getattr(cfg, name) != getattr(saved, name)]
    if changed:
        pairs = ", ".join(f"--{name} {getattr(cfg, name)} (the run has {getattr(saved, name)})" for name in changed)
        raise UserError(f"--resume {run}: a run continues with its own settings, but {pairs}; leave these flags out")
    return replace(saved, **{name: getattr(cfg, name) for name in free})


def to_json(cfg) -> str:
    """The resolved config as it is stored in a run."""
    return json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"


# ---- help -----------------------------------------------------------------------------------------------------------


@dataclass
class Help:
    """What the source says about a field."""

    topic: str
    text: str


def field_help(cls) -> dict[str, Help]:
    """The comment behind each field, and the topic (a comment line of its own) that it stands under."""
    fields = {}
    for part in reversed(cls.__mro__[:-1]):
        topic = ""
        for line in inspect.getsource(part).splitlines():
            heading = re.fullmatch(r"    # (.+)", line)
            field = re.match(r"    (\w+):[^#]*#\s*(.+)$", line)
            if heading:
                topic = heading[1]
            elif field:
                fields[field[1]] = Help(topic, field[2])
    return fields


def help_text(cls, presets: dict, argv: list[str], doc: str) -> str:
    """The answer to --help: the script's own text, presets, and fields with the values of --cfg."""
    preset = None
    if "--cfg" in argv and argv[-1] != "--cfg":
        preset = argv[argv.index("--cfg") + 1]
    return f"{doc.strip()}\n\n{describe(cls, presets, everything='all' in argv, preset=preset)}"


def describe(cls, presets: dict, everything: bool = False, preset: str | None = None) -> str:
    """Presets and fields of a command as text: the fields that people change first, or all of them by topic."""
    start = starting_config(cls, presets, preset)
    helps = field_help(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    first = [] if everything else getattr(cls, "FIRST", "").split()
    lines = ["presets (--cfg NAME, or the config.json of an earlier run; default: tiny):"] if presets else []
    for name, make in presets.items():
        lines.append(f"  {name:<18} {inspect.getdoc(make)}")
    values = f"the values of {preset}" if preset else "their defaults"
    lines.append(f"settings (--name value), with {values} in brackets:")
    lines += [field_line(cls, start, name, helps[name].text) for name in first]

    # The rest by topic: named only, or described.
    for topic in dict.fromkeys(helps[name].topic for name in names):
        rest = [name for name in names if helps[name].topic == topic and name not in first]
        if not first:
            lines.append(f" {topic}:" if topic else "")
            lines += [field_line(cls, start, name, helps[name].text) for name in rest]
        elif rest:
            text = f"more on {topic}: " + " ".join(f"--{name}" for name in rest)
            lines.append(textwrap.fill(text, 118, initial_indent="  ", subsequent_indent="    "))
    if first:
        lines.append("`--help all` describes every setting")
    return "\n".join(lines)


def field_line(cls, start, name: str, text: str) -> str:
    """One field of the help: its name, its comment, what it needs, its value."""
    value = getattr(start, name)
    shown = ",".join(value) if isinstance(value, tuple) else value
    shown = '""' if shown == "" else shown
    need = checks.needs_of(cls).get(name)
    need = f" (only {checks.in_words(need)})" if need else ""
    return f"  --{name:<16} {text}{need} [{shown}]"
