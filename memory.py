"""How many tokens a micro-batch may have on this device: --max_tokens auto."""

from collections.abc import Callable

import torch

import data
import ddp
import estimates
from loop import Job

MOST_TOKENS = 8192  # more in a launch gain little


def fit(job: Job, loss_of: Callable) -> None:
    """--max_tokens auto: halve the budget until its fullest micro-batch passes forward and backward on every rank.

    It is found once, before the first step, and stored with the state: a run that is resumed takes its own again. Kept
    free meanwhile: what AdamW will need, and a sixteenth for gaps. Raises OutOfMemory where not even one row fits.
    """
    cfg, state, device = job.cfg, job.state, job.world.device
    if state.max_tokens:
        return
    spare = torch.cuda.get_device_properties(device).total_memory // 16 if device.type == "cuda" else 0
    _reserved = torch.empty(8 * job.gradients.count + spare, dtype=torch.uint8, device=device)
    budget = max(MOST_TOKENS, cfg.max_length)
    while True:
        rows = data.fullest(job.lengths, cfg.batch_size, budget)
        tokens = int(job.lengths[rows].sum())
        problem = None
        try:
            with estimates.room_for(tokens, device):
                loss_of(rows).backward()
        except estimates.OutOfMemory as e:
            problem = e
        job.gradients.clear()
        if not ddp.sum_over_ranks(job.world, float(problem is not None)):
            break
        if budget == cfg.max_length:
            raise problem or estimates.OutOfMemory(f"another rank ran out of memory at {tokens:,} tokens")
        budget = max(budget // 2, cfg.max_length)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    state.max_tokens = budget
    job.say(f"--max_tokens auto: {budget:,}, tried with a micro-batch of {tokens:,} tokens")
