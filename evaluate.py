"""Score rows and gather them; write and read classifiers. For train, infer and Python users.

from evaluate import load_run
run = load_run("outputs/tiny__base/tiny/run_0")
run.predict(["What is 2 + 2?"])            # [{"label": "0", "name": "0", "probabilities": [...], "logits": [...]}]
"""

import time

import numpy as np
import torch

import data
import ddp
import files
import lora
import metrics
import numerics
import prompts
from configs import TrainConfig
from errors import Degenerate, UserError
from packed import pack

# ---------------------------------------------------------------------------------------------------------------------
# predictions as a person sees them


def degenerate(logits: np.ndarray) -> str:
    """Why these scores (N, C) cannot be trusted, or an empty string: not finite, or the same for every row."""
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        first = int(bad.argmax()) + 1
        return f"{int(bad.sum())} of {len(logits)} rows have scores that are not finite (first: row {first})"
    if len(logits) < 8:
        return ""
    relative = logits - logits.mean(axis=1, keepdims=True) if logits.shape[1] > 1 else logits
    spread = relative.std(axis=0).max()
    distinct = len(np.unique(logits, axis=0))
    if spread < 1e-4 or distinct <= max(2, len(logits) // 100):
        return f"{len(logits)} rows have {distinct} distinct scores, spread {spread:.1e}: the model ignores its input"
    return ""


# ---- scoring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(
    model, tokens: data.Tokens, world: ddp.World, precision: str, max_tokens: int, seconds: float = 0.0
) -> np.ndarray:
    """fp32 logits (N, C) of all rows in their order, on every rank, each row scored once.

    Micro-batches are cut by length, the same for any number of ranks, and shared out in turn. seconds: a limit, 0 for
    none; short rows then come first, and those that were not reached in time are NaN.
    """
    was_training, started = model.training, time.perf_counter()
    model.eval()
    rows, logits = [], []
    batches = data.pack_by_length(tokens.lengths, max_tokens)
    for j, chosen in enumerate(batches[::-1] if seconds else batches):
        if seconds and time.perf_counter() - started > seconds:
            break
        if j % world.size == world.rank:
            with numerics.autocast(world.device, precision):
                found = model(pack(tokens, chosen, world.device))
            logits.append(found.cpu() if seconds else found)  # a clock that does not wait for the GPU says nothing
            rows.append(chosen)
    model.train(was_training)
    mine = torch.cat(logits).cpu().numpy() if logits else np.zeros((0, model.outputs), np.float32)
    index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return ddp.gather_rows(world, index, mine, len(tokens.lengths), partial=seconds > 0)


def by_value(cfg: TrainConfig, column: str, rows: list, logits: np.ndarray, targets: np.ndarray, say) -> dict:
    """The metrics of the rows of each value of a column (AUC per rule, say), printed, and their mean over values."""
    if not column:
        return {}
    files.need_columns(rows, [column], "rows", "by_column")
    values = np.array([row[column] for row in rows])
    found = {v: metrics.of_task(cfg.task, logits[values == v], targets[values == v]) for v in np.unique(values)}
    every, width = set().union(*found.values()), max(len(v[:60]) for v in found)
    names = [n for n in dict.fromkeys((cfg.metric, "roc_auc", "accuracy", "mse")) if n in every]
    for value, scores in found.items():
        words = ", ".join(f"{n} {scores[n]:.4f}" for n in names if n in scores)
        say(f"{column} {value[:60]:<{width}} {scores['rows']:>7,} rows: {words}")
    mean = {n: float(np.mean([s[n] for s in found.values() if n in s])) for n in names}
    return {"by_column": {str(v): s for v, s in found.items()}, "mean_by_column": mean}


def preflight(run, rows: list[dict[str, str]], known: np.ndarray | None, max_tokens: int, most: int = 16) -> str:
    """Score a few rows before all of them; returns how long those will take, and what the few say.

    The rows are spread over the input, of both classes where labels are known. Raises Degenerate where scores are not
    finite, do not depend on the row, or the adapter does not move them.
    """
    order = np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)
    if known is not None and known.ndim == 1 and len(np.unique(known)) > 1:
        values = np.unique(known)[:8]
        order = np.unique(np.concatenate([np.flatnonzero(known == v)[: most // len(values)] for v in values]))
    few = [rows[i] for i in order]
    run.logits(few[:1], max_tokens)  # warms up
    started = time.perf_counter()
    logits, report = run.logits(few, max_tokens)
    seconds = time.perf_counter() - started
    reason, said = degenerate(logits), ""
    if lora.adapters(run.model) and np.isfinite(logits).all():
        moved = probe(run, few, logits)
        if not moved and not reason:
            reason = "the adapter does not move the logits: another model's, or one never trained?"
        said = f"the adapter moves the logits by up to {moved:.3g}; "
    if reason:
        raise Degenerate(f"preflight of {len(few)} rows: {reason}; nothing was written (--force goes on all the same)")
    length = sum(len(row[c]) for row in rows for c in prompts.fields(run.config.text))
    share = length / max(1, sum(len(row[c]) for row in few for c in prompts.fields(run.config.text)))
    return f"preflight of {len(few)} rows: {said}{len(rows):,} rows take about {seconds * share / 60:.1f} min"


def probe(run, rows: list[dict[str, str]], live: np.ndarray) -> float:
    """How far the adapter moves the logits of a few rows, live with it; 0 where that is rounding."""
    with lora.disable(run.model):
        moved = float(np.abs(live - run.logits(rows)[0]).max())
    return moved if moved > 1e-6 * max(1.0, float(np.abs(live).max())) else 0.0


def weak_tokens(model, tokenizer, tokens: data.Tokens) -> str:
    """A warning for tokens in use whose embedding was never trained (its norm is almost 0), or an empty string.

    Raises UserError for embeddings that are not finite: they make every score of their rows NaN.
    """
    table = getattr(model, "backbone", model).get_input_embeddings()
    used = torch.from_numpy(np.unique(tokens.ids).astype(np.int64))
    norms = getattr(table, "base_layer", table).weight[used].detach().float().norm(dim=1).cpu()
    weak = ~(norms.isfinite() & (norms > 0.01 * norms[norms.isfinite()].median()))
    names = tokenizer.convert_ids_to_tokens(used[weak if norms.isfinite().all() else ~norms.isfinite()].tolist())
    if not norms.isfinite().all():
        raise UserError(f"the base's embeddings of {names[:5]} are not finite: its weights are damaged")
    return f"warning: the base never learned the tokens {', '.join(names[:5])}, which occur here" if names else ""
