"""Numbers that go bad in training: what was not finite first, when to give up, and a loss that spikes."""

import math
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import torch

import ddp
import numerics
from errors import warning

MOST_SKIPPED = 5  # steps in a row that are not taken: then the run ends
REMEDY = "lower --lr, or try --precision bf16 or fp32"


def damaged(model: torch.nn.Module, optimizer, updates: int) -> str:
    """Which weights or optimizer states are not finite, so that no later step can be; or an empty string.

    updates: how often this run has changed the trained weights.
    """
    weights = [*model.named_parameters(), *model.named_buffers()]
    untouched = [(name, tensor) for name, tensor in weights if not (updates and tensor.requires_grad)]
    bad = numerics.not_finite(untouched)
    if bad:
        return f"weights of the base are not finite: {names(bad)}; download it again, or try another --precision"
    bad = numerics.not_finite(trained_state(model, optimizer))
    return f"not finite: {names(bad)}; {REMEDY}" if bad else ""


def trained_state(model: torch.nn.Module, optimizer) -> list[tuple[str, torch.Tensor]]:
    """All that a save holds, by name: trained parameters, and the optimizer's state of each."""
    tensors = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors.append((name, p))
            tensors += [(f"optimizer state {key} of {name}", t) for key, t in optimizer.state.get(p, {}).items()]
    return tensors


def names(bad: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return ", ".join(bad[:3]) + more


def first_place(model: torch.nn.Module, forwards: Iterable[Callable]) -> str:
    """Where the first value that is not finite arises when losses are computed again, or the largest activation.

    forwards: each computes the loss of a micro-batch.
    """
    report = ""
    for forward in forwards:
        with torch.no_grad(), numerics.activation_maxima(model) as maxima:
            loss = forward()
        report = numerics.overflow_report(maxima)
        first = numerics.first_overflow(maxima)
        if first:
            return report + (f" ({first[1]})" if first[1] != first[0] else "")
        if not loss.isfinite():
            return "the scores are finite, their loss is not: look at labels, class weights and soft targets"
    return report


def bad_gradients(model: torch.nn.Module, sums: torch.Tensor) -> str:
    """Which trained parameters have gradients that are not finite. sums: all gradients, flat, in the model's order."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parts = sums.split([p.numel() for _, p in trained])
    bad = numerics.not_finite((name, part) for (name, _), part in zip(trained, parts, strict=True))
    return f"gradients of {names(bad)} are not finite" if bad else ""


def probe(job, forwards: list[Callable]) -> None:
    """Before this process's first fp16 step: say where activations come close to what fp16 holds."""
    if job.precision == "fp16" and not job.probed:
        job.probed = True
        with torch.no_grad(), numerics.activation_maxima(job.model) as maxima:
            forwards[0]()
        job.say(numerics.overflow_forecast(maxima))


def skip(job, forwards: list[Callable], loss: float, ranks: list[int]) -> None:
    """Report a step that was not taken, unless a lower fp16 loss scale is all that it needs.

    ranks: those whose own gradients are not finite. Raises FloatingPointError where no later step can be better, or
    several in a row were not.
    """
    state = job.state
    scale_helps = job.scaler.is_enabled() and job.scaler.get_scale() >= 1.0
    if scale_helps and math.isfinite(loss):
        return
    where = f" on rank {', '.join(map(str, ranks))}" if job.world.size > 1 and ranks else ""
    problem = f"step {state.step + 1}: loss {loss:.4g}, gradients not finite{where}"
    error = not_finite(job, forwards, problem)
    if state.skipped_in_a_row >= MOST_SKIPPED or damaged(job.model, job.optimizer, state.updates):
        raise error
    job.say(warning(str(error), f"skipped, {state.skipped_in_a_row} in a row (the run ends at {MOST_SKIPPED})"))


def at_the_end(skipped: int) -> str:
    """A warning where a run ends before its fp16 loss scale has fallen far enough to tell; or an empty string."""
    if skipped < MOST_SKIPPED:
        return ""
    return warning(f"the last {skipped} steps changed nothing, for their gradients were not finite", REMEDY)


def not_finite(job, forwards: list[Callable], problem: str) -> FloatingPointError:
    """The error that names what is not finite: all ranks look, at the micro-batches that they had."""
    damage = damaged(job.model, job.optimizer, job.state.updates)
    places = ddp.gather_objects(job.world, first_place(job.model, forwards))
    places.sort(key=lambda place: "not finite" not in place)
    gradients = bad_gradients(job.model, job.gradients.sums)
    causes = [places[0], damage or REMEDY]
    if gradients and "finite" not in places[0]:
        causes.insert(0, gradients)
    return FloatingPointError("; ".join([problem, *filter(None, causes)]))


class Spikes:
    """Reports, once, a loss far above those before it."""

    def __init__(self):
        self.losses = deque(maxlen=50)
        self.reported = False

    def note(self, step: int, loss: float) -> str:
        """A warning, or an empty string."""
        mean = sum(self.losses) / max(1, len(self.losses))
        spikes = len(self.losses) >= 10 and loss > 2 * mean and loss > mean + 6 * np.std(self.losses)
        self.losses.append(loss)
        if not spikes or self.reported:
            return ""
        self.reported = True
        problem = f"the loss rose to {loss:.3g} at step {step}, {mean:.3g} on average before"
        return warning(problem, "if it does not fall again, lower --lr, warm up longer, or set --grad_clip 1")
