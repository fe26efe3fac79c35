"""Score rows over ranks, check a few of them first, and break metrics down by a column."""

import time

import numpy as np
import torch

import data
import ddp
import estimates
import files
import lora
import metrics
import numerics
import prompts
import signals
from configs import TrainConfig
from errors import Degenerate, UserError, warning
from metrics import Array
from packed import pack
from parts import Parts

# ---- scoring --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def score(
    model,
    tokens: data.Tokens,
    world: ddp.World,
    precision: str,
    max_tokens: int,
    seconds: float = 0.0,
    progress: Parts | None = None,
) -> Array:
    """fp32 logits (N, C) of all rows in their order, on every rank, each row scored once.

    Micro-batches are cut by length, the same for any number of ranks, and dealt to the ranks in turn. seconds: a limit,
    0 for none; short rows then come first, and those that were not reached in time are NaN. progress: where the scores
    of each micro-batch are kept, and those of an earlier process that was killed are taken from. Raises Stopped where a
    rank was asked to stop in training.
    """
    was_training, started = model.training, time.perf_counter()
    model.eval()
    batches = list(enumerate(data.pack_by_length(tokens.lengths, max_tokens)))
    if seconds:
        batches.reverse()
    done = progress.read() if progress else {}
    if done:
        ddp.say(world, f"{len(done):,} of {len(batches):,} micro-batches were scored before: {progress.folder}")

    # Scores stay on the GPU, unless the clock must wait for them, or each is kept before the next one begins.
    device = "cpu" if seconds or progress else world.device
    scored, logits = [np.zeros(0, np.int64)], [torch.zeros(0, model.outputs, device=device)]
    running = None

    def fetch():
        if running is None:
            return
        number, rows, values = running
        values = values.float().to(device)
        if seconds:
            values.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # NaN: a row that was not reached
        scored.append(rows)
        logits.append(values)
        if progress:
            progress.append(number, values.numpy().tobytes())

    for number, rows in batches[world.rank :: world.size]:
        if signals.STOP.number:
            break
        if len(done.get(number, b"")) == 4 * len(rows) * model.outputs:
            scored.append(rows)
            logits.append(torch.frombuffer(bytearray(done[number]), dtype=torch.float32).view(len(rows), -1))
            continue
        batch = pack(tokens, rows, world.device)  # while the GPU still scores the one before
        fetch()
        running = None
        if seconds and time.perf_counter() - started > seconds:
            continue
        ddp.computes()
        tokens_here = sum(batch.lengths)
        with estimates.room_for(tokens_here, world.device), numerics.autocast(world.device, precision):
            running = number, rows, model(batch)
    fetch()
    model.train(was_training)
    if ddp.stopping(world):
        raise signals.Stopped
    values = torch.cat(logits).cpu().numpy()
    return ddp.gather_rows(world, np.concatenate(scored), values, len(tokens.lengths), partial=seconds > 0)


def degenerate(logits: Array, inputs: Array | None = None, task: str = "single_label") -> str:
    """Why these scores (N, C) cannot be trusted, or an empty string: not finite, or the same for different inputs.

    inputs (N,): equal where the rows' inputs are equal, so that a repeated text counts once; None: all differ.
    """
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        return f"{bad.sum()} of {len(bad)} rows have scores that are not finite (first: row {bad.argmax() + 1})"

    # Only different inputs should have different scores: with a single one there is nothing to compare.
    if inputs is not None:
        _, first = np.unique(inputs, return_index=True)
        logits = logits[first]
    rows = len(logits)
    if rows < 2:
        return ""
    distinct = len(np.unique(logits, axis=0))
    if task != "multi_label" and logits.shape[1] > 1:
        logits = logits - logits.mean(axis=1, keepdims=True)  # softmax is blind to a shift of the whole row
    spread = logits.std(axis=0).max()
    if rows < 8:  # so few may resemble each other, but are never the same
        wrong = spread < 1e-6
    else:
        wrong = spread < 1e-4 or distinct <= max(2, rows // 100)
    found = f"{rows} different inputs have {distinct} distinct scores, spread {spread:.1e}"
    return f"{found}: the model ignores its input" if wrong else ""


MOST_VALUES = 20  # that are printed


def by_value(cfg: TrainConfig, column: str, rows: list, logits: Array, targets: Array, say) -> dict:
    """The metrics of the rows of each value of a column (such as AUC per rule), printed, and their mean over values."""
    if not column:
        return {}
    values = np.array([row[column] for row in rows])
    scores, mean = {}, {}
    for value in np.unique(values):
        chosen = values == value
        scores[str(value)] = metrics.of_task(cfg.task, logits[chosen], targets[chosen])
    for name in (cfg.metric, "roc_auc", "accuracy", "mse"):
        defined = [own[name] for own in scores.values() if name in own]
        if defined:
            mean[name] = float(np.mean(defined))
    width = min(60, max(map(len, scores)))
    for value, own in list(scores.items())[:MOST_VALUES]:
        words = ", ".join(f"{name} {own[name]:.4f}" for name in mean if name in own)
        say(f"{column} {value[:60]:<{width}} {own['rows']:>7,} rows: {words}")
    more, rare = len(scores) - MOST_VALUES, sum(own["rows"] < 10 for own in scores.values())
    if more > 0:
        say(f"{column}: and {more:,} more values, in the result")
    if 2 * rare > len(scores):
        problem = f"{rare:,} of {len(scores):,} values of {column} have fewer than 10 rows, whose metrics say little"
        say(warning(problem, "choose a column with fewer values"))
    return {"by_column": scores, "mean_by_column": mean}


# ---- before hours are spent -----------------------------------------------------------------------------------------


def preflight(run, rows: files.Rows, known, max_tokens: int) -> str:
    """Score a few rows before all of them; returns how far the adapter moves them, and how long all rows will take.

    known: the rows with labels (predictions.Known), or None. Raises Degenerate where scores are not finite, do not
    depend on the row, or the adapter does not move them.
    """
    # A few rows: spread over the input, and the first of every class where labels are known.
    chosen = np.linspace(0, len(rows) - 1, min(16, len(rows))).astype(int)
    if known is not None and known.targets.ndim == 1:
        _, first = np.unique(known.targets, return_index=True)
        chosen = np.union1d(chosen, known.rows[first[:8]])
    few = [rows[i] for i in chosen]
    run.logits(few[:1], max_tokens)  # warms up
    started = time.perf_counter()
    logits, report = run.logits(few, max_tokens)
    seconds = time.perf_counter() - started
    reason, moves = degenerate(logits, report.keys, run.config.task), ""
    if lora.adapters(run.model) and not reason:
        moved = _probe(run, few, logits)
        moves = f"the adapter moves the logits by up to {moved:.3g}; "
        if not moved:
            reason = "the adapter does not move the logits: another model's, or one never trained?"
    if reason:
        raise Degenerate(f"preflight of {len(few)} rows: {reason}; nothing was written (--force continues)")
    columns = prompts.fields(run.config.text)
    lengths = np.array([sum(len(row[column]) for column in columns) for row in rows])
    minutes = seconds / 60 * lengths.sum() / max(1, lengths[chosen].sum())
    return f"preflight of {len(few)} rows: {moves}{len(rows):,} rows take about {minutes:.1f} min"


def _probe(run, rows, live):
    """How far the adapter moves the logits of a few rows, live with it; 0 where that is rounding."""
    with lora.disable(run.model):
        base, _ = run.logits(rows)
    moved = float(abs(live - base).max())
    return moved if moved > 1e-6 * max(1.0, abs(live).max()) else 0.0


def weak_tokens(model, tokenizer, tokens: data.Tokens) -> str:
    """A warning for tokens in use whose embedding was never trained (its norm is almost 0), or an empty string.

    Raises UserError for embeddings that are not finite: they make every score of their rows NaN.
    """
    table = getattr(model, "backbone", model).get_input_embeddings()
    weight = getattr(table, "base_layer", table).weight  # below an adapter
    used = torch.from_numpy(np.unique(np.concatenate(list(map(np.unique, data.pages(tokens.ids))))))
    norms = weight[used].float().norm(dim=1).cpu()
    damaged = ~norms.isfinite()
    wrong = damaged if damaged.any() else norms <= 0.01 * norms.median()
    names = tokenizer.convert_ids_to_tokens(used[wrong][:5].tolist())
    if damaged.any():
        raise UserError(f"the base's embeddings of {names} are not finite: its weights are damaged")
    if not names:
        return ""
    problem = f"the base never learned the tokens {', '.join(names)}, which occur here"
    return warning(problem, "take another --prompt or --text, or the instruct version of the base")
