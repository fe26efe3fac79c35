"""The command line: parsing, presets, help."""

import dataclasses
import inspect
import itertools
import json
import os
import re
import sys
import types
import typing
from dataclasses import replace
from pathlib import Path

from errors import UserError, nearest

# ---- the command line ----------------------------------------------------------------------------------------------


def parse(cls, presets: dict, argv: list[str], doc: str = ""):
    """Parse `--cfg NAME|FILE --field value ...` to (config, set of fields given by hand).

    A flag of a bool field may stand alone. Raises UserError naming the nearest known flag or preset; prints the help
    and exits with 0 at --help. The config is not checked yet: call `check`.
    """
    if "--help" in argv or "-h" in argv:
        print(doc.strip() + "\n\n" + describe(cls, presets))
        sys.exit(0)
    given = _pairs(cls, argv)
    cfg = _start(cls, presets, given.pop("cfg", None))
    values, problems = {}, []
    hints = typing.get_type_hints(cls)
    for name, text in given.items():
        try:
            values[name] = convert(text, hints[name])
        except ValueError as e:
            problems.append(f"--{name} {text}: expected {e}")
    if problems:
        raise UserError(" | ".join(problems))
    given = set(values)
    for one, other in (("warmup_steps", "warmup_ratio"), ("warmup_ratio", "warmup_steps")):
        if one in given and other not in given:
            values[other] = 0  # of two ways to say it, the one given by hand takes the preset's place
    return replace(cfg, **values), given


def early(cls, presets: dict, doc: str) -> None:
    """Stand-in: help before torch is loaded."""
    if "--help" in sys.argv or "-h" in sys.argv:
        parse(cls, presets, sys.argv[1:], doc)


def _pairs(cls, argv: list[str]) -> dict[str, str]:
    names = [f.name for f in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    pairs, problems, i = {}, [], 0
    while i < len(argv):
        flag, eq, value = argv[i].partition("=")
        i += 1
        if not flag.startswith("--"):
            problems.append(f"'{flag}' stands alone: expected --field value")
            continue
        name = flag[2:].replace("-", "_")
        if name not in names and name != "cfg":
            problems.append(f"unknown flag {flag}{nearest(name, names + ['cfg'], '--')}")
            while i < len(argv) and not argv[i].startswith("--"):
                i += 1
            continue
        if not eq:
            several = isinstance(hints.get(name), types.GenericAlias)  # --runs A B C, as --runs A,B,C
            words = [w for w in itertools.takewhile(lambda w: not w.startswith("--"), argv[i:])]
            if words:
                words = words if several else words[:1]
                value, i = ",".join(words), i + len(words)
            elif name in hints and hints[name] is bool:
                value = "true"
            else:
                problems.append(f"{flag} has no value")
                continue
        if name in pairs:
            problems.append(f"{flag} is given twice")
        pairs[name] = value
    if problems:
        raise UserError(" | ".join(problems))
    return pairs


def _start(cls, presets: dict, name: str | None):
    if name is None:
        return presets["tiny"]() if "tiny" in presets else cls()
    if name in presets:
        return presets[name]()
    if name.endswith(".json") or os.path.isdir(name):
        return read_config(cls, name)
    known = ", ".join(presets) or "none here"
    raise UserError(f"unknown preset {name}{nearest(name, presets)}: expected one of {known}, or a config.json")


def read_config(cls, path: str | Path):
    """The config of a past run, from its config.json or the run folder that holds it."""
    path = Path(path) / "config.json" if os.path.isdir(path) else Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"config {path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"config {path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected an object of fields, got {type(values).__name__}")
    hints, problems, fields = typing.get_type_hints(cls), [], {}
    for name, value in values.items():
        if name not in hints:
            problems.append(f"unknown field {name}{nearest(name, hints)}")
        elif isinstance(value, list) and isinstance(hints[name], types.GenericAlias):
            fields[name] = tuple(str(v) for v in value)
        elif value is None or isinstance(value, (list, dict)):
            problems.append(f"{name} {json.dumps(value)}: expected {EXPECTED.get(hints[name], 'a string')}")
        else:
            try:
                fields[name] = convert(value, hints[name])
            except ValueError as e:
                problems.append(f"{name} {value}: expected {e}")
    if problems:
        raise UserError(f"config {path}: " + " | ".join(problems))
    return cls(**fields)


EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def convert(value, kind):
    """A command-line or JSON value as the type of its field. Raises ValueError with what was expected."""
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise ValueError(EXPECTED[bool])
        return words[str(value).lower()]
    if kind is int:
        try:
            return int(str(value))  # exact at any size
        except ValueError:
            pass
        try:
            whole = float(value)  # 1e4
            if whole == int(whole) and not isinstance(value, bool):
                return int(whole)
        except (ValueError, OverflowError):
            pass
        raise ValueError(EXPECTED[int])
    if kind is float:
        try:
            return float(str(value))
        except ValueError:
            raise ValueError(EXPECTED[float]) from None
    if isinstance(kind, types.GenericAlias):  # tuple[str, ...]
        return tuple(part.strip() for part in str(value).split(",") if part.strip())
    return str(value)


def comments(cls) -> dict[str, str]:
    """The comment behind each field in the source: its documentation."""
    found = re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.MULTILINE)
    return dict(found)


def describe(cls, presets: dict) -> str:
    """Presets and fields of an entry point, as --help prints them."""
    start = presets["tiny"]() if "tiny" in presets else cls()
    lines = ["presets (--cfg NAME, or the config.json of a past run; without --cfg: tiny):"] if presets else []
    for name, make in presets.items():
        lines.append(f"  {name:<10} {inspect.getdoc(make)}")
    lines.append("fields (--field value), in brackets their value without --cfg:")
    help_of = comments(cls)
    for f in dataclasses.fields(cls):
        value = getattr(start, f.name)
        shown = ",".join(value) if isinstance(value, tuple) else value
        shown = '""' if shown == "" else shown
        lines.append(f"  --{f.name:<16} {help_of[f.name]} [{shown}]")
    return "\n".join(lines)


def resumed(cfg, given: set[str], run: Path):
    """The config that a run to be resumed began with. Raises UserError for flags given by hand that contradict it."""
    saved = read_config(type(cfg), run)
    free = {"resume", "dry_run", "outputs", "keep", "export", "export_dtype", "time_limit"} & set(vars(cfg))
    differ = [n for n in sorted(given - free) if getattr(cfg, n) != getattr(saved, n)]
    if differ:
        facts = ", ".join(f"--{n} {getattr(cfg, n)} (the run has {getattr(saved, n)})" for n in differ)
        raise UserError(f"--resume {run}: a run goes on as it began, but {facts}; leave these flags out")
    return replace(saved, **{n: getattr(cfg, n) for n in free})


def to_json(cfg) -> str:
    """The resolved config as it is stored in a run."""
    return json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"
