"""The exceptions with their exit statuses, and helpers for messages."""

import difflib


class Untrusted(Exception):
    """A checkpoint that cannot be trusted."""

    exit_status = 3


class UserError(ValueError):
    """A mistake of the user's: printed as one line without a traceback."""

    exit_status = 2


ELSEWHERE = {  # what other tools call our fields
    "learning_rate": "lr", "lora_r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "model": "base",
    "model_name_or_path": "base", "num_train_epochs": "epochs", "train_file": "train_data",
    "max_seq_length": "max_length",
    "gradient_checkpointing": "grad_checkpoint", "max_grad_norm": "grad_clip", "lr_scheduler_type": "schedule",
}  # fmt: skip


def nearest(name: str, known, prefix: str = "") -> str:
    theirs = difflib.get_close_matches(str(name), [n for n in ELSEWHERE if ELSEWHERE[n] in known], n=1, cutoff=0.8)
    close = [ELSEWHERE[n] for n in theirs] or difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def few(items: list[str], most: int = 5) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


class Degenerate(RuntimeError):
    """Scores that cannot be right."""

    exit_status = 5


def one_line(error) -> str:
    """A foreign text's first line, cut to a readable length."""
    return "".join(c if c.isprintable() else " " for c in (str(error).strip().split("\n") or [""])[0][:200])
