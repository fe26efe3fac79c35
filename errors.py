"""The exceptions with their exit statuses, and helpers for messages. Every file may import this one."""

import difflib
import os
import sys
from collections import Counter
from functools import cache


class UserError(ValueError):
    """A mistake of the user's: printed as one line without a traceback."""

    exit_status = 2


class Untrusted(Exception):
    """A checkpoint or adapter that cannot be trusted."""

    exit_status = 3


class DiskError(OSError):
    """A disk that takes no more: one line with the file, the bytes needed and the bytes free."""

    exit_status = 1


class Degenerate(RuntimeError):
    """Scores that cannot be right."""

    exit_status = 5


# What other tools call our settings: theirs=ours.
ELSEWHERE = dict(
    pair.split("=")
    for pair in """
        learning_rate=lr lora_r=rank lora_alpha=alpha target_modules=targets model=base model_name_or_path=base
        num_train_epochs=epochs train_file=train_data max_seq_length=max_length gradient_checkpointing=grad_checkpoint
        max_grad_norm=grad_clip lr_scheduler_type=schedule
    """.split()
)


def print_anything() -> None:
    """Let stdout take every text: what its encoding lacks is printed as \\uXXXX, where it would end the program."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def refuse(problems: list[str], prefix: str = "") -> None:
    """Raise one UserError with all problems, if there are any."""
    if problems:
        raise UserError(prefix + " | ".join(problems))


@cache
def note(line: str) -> None:
    """Print a line once, on rank 0 alone: for files, which every rank reads, some of them twice."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def warning(problem: str, advice: str) -> str:
    """The line of a warning: what is doubtful, and what to do about it."""
    return f"warning: {problem}; {advice}"


def nearest(name: str, known, prefix: str = "") -> str:
    """ " (did you mean --lr?)" for a name that resembles a known one, also by another tool's word; else nothing."""
    theirs = [other for other in ELSEWHERE if ELSEWHERE[other] in known]
    close = [ELSEWHERE[other] for other in difflib.get_close_matches(str(name), theirs, n=1, cutoff=0.8)]
    close += difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def few(items: list[str], most: int = 5) -> str:
    """The first items of a list, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def duplicates(values) -> list[str]:
    """The values that are there more than once."""
    return [value for value, count in Counter(values).items() if count > 1]


def one_line(error) -> str:
    """The first line of a foreign text, printable and of readable length."""
    first = str(error).strip().split("\n")[0][:200]
    return "".join(letter if letter.isprintable() else " " for letter in first)
