"""Data parallel by hand: one process a device, gradients summed once a step, ranks that decide together.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK set) or alone. Nothing here depends on the number of ranks except
who computes what: see the batch semantics in data.py.
"""

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from errors import UserError

WAIT = timedelta(hours=12)  # others wait while rank 0 encodes a corpus; torchrun ends them when one is gone
FP64_LIMIT = 200_000_000  # trained parameters up to which gradients are summed in fp64


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, its device."""

    rank: int
    size: int
    device: torch.device


def setup() -> World:
    """Join torchrun's process group (nccl on GPUs, gloo on CPUs), or be a world of one.

    On GPUs, kernels are chosen to be deterministic where there is a choice. Raises TooFewGPUs.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            gpus = torch.cuda.device_count()
            raise UserError(f"local rank {local} has no GPU of its own: take --nproc_per_node={gpus}")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1 and not dist.is_initialized():
        backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**backend, timeout=WAIT)
    return World(rank, size, device)


def micro_seed(seed: int, step: int, micro_batch: int) -> int:
    """The counted seed of a micro-batch's dropout: a function of (seed, step, micro-batch) alone."""
    return int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def say(world: World, *words) -> None:
    """Print on rank 0, if there is anything to say."""
    if world.rank == 0 and any(words):
        print(*words, flush=True)


def launch(main) -> None:
    """Run an entry point's main(argv) -> dict, print the dict as the last line of stdout, leave with the exit status.

    0 done, 1 failure or stopped, 4 numbers not finite; an exception's own `exit_status` otherwise (2 the user's
    mistake, 3 untrusted checkpoint, 5 degenerate scores). Those that speak to the user come as one line.
    """
    rank = int(os.environ.get("RANK", 0))
    try:
        result = main(sys.argv[1:])
        if rank == 0:
            print(json.dumps(result), flush=True)
        code = 0
    except (Exception, KeyboardInterrupt) as e:
        code = 4 if isinstance(e, FloatingPointError) else getattr(e, "exit_status", 1)
        spoken = isinstance(e, (KeyboardInterrupt, FloatingPointError, OSError)) or hasattr(e, "exit_status")
        if rank > 0:  # let rank 0 say it, unless it is this rank's alone
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        if spoken:
            tqdm.write(f"error: {e}" if str(e) else "interrupted", file=sys.stderr)  # on a line of its own
        else:
            traceback.print_exc()
    if dist.is_initialized():  # destroy_process_group hangs now and then (gloo, torch 2.13; pytorch#190489)
        if code == 0:
            dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class StopRequest:
    """SIGTERM and SIGINT set a flag; training polls it and all ranks stop together after the step.

    A second signal acts as it did before, and so does any after `close`.
    """

    def __init__(self):
        self.signal = 0
        self.before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGINT)}

    def _note(self, number, frame):
        self.signal = number
        self.close()
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step, with a save\n".encode())

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


class GradientSum:
    """The gradients of one optimizer step as one flat buffer, whatever the number of micro-batches and ranks.

    Every trained parameter's .grad is a view into one flat fp32 tensor, so a backward pass writes there directly.
    `add` puts that into an fp64 buffer: fp32 values add up in fp64 almost without rounding, so the sum does not depend
    on who added what first. `reduce` sums over ranks and writes the result back into the .grad views; the loss and the
    stop requests ride along. Above FP64_LIMIT parameters everything is fp32, equal to rounding only.
    """

    def __init__(self, params: list[torch.nn.Parameter], world: World, flags: int = 1):
        if any(p.dtype != torch.float32 for p in params):
            raise AssertionError(f"trained parameters must be fp32 masters: {sorted({str(p.dtype) for p in params})}")
        self.params, self.world, self.count = params, world, sum(p.numel() for p in params)
        self.exact = self.count <= FP64_LIMIT
        device = params[0].device
        self.flat = torch.zeros(self.count, dtype=torch.float32, device=device)
        dtype = torch.float64 if self.exact else torch.float32
        self.total = torch.zeros(self.count + 1 + flags, dtype=dtype, device=device)
        start = 0
        for p in params:
            p.grad = self.flat[start : start + p.numel()].view_as(p)
            start += p.numel()

    def add(self, loss: torch.Tensor, *flags: bool) -> None:
        """Add the gradients of the micro-batch just run backward, its loss, and this rank's reasons to stop."""
        self.total[: self.count].add_(self.flat)
        self.flat.zero_()
        self.total[self.count].add_(loss.detach())
        for i, flag in enumerate(flags, 1):
            if flag:
                self.total[self.count + i].add_(1.0)

    def reduce(self) -> torch.Tensor:
        """Sum over ranks into the .grad views and start at zero; returns (loss, ranks' flags counted) on the device."""
        if self.world.size > 1:
            dist.all_reduce(self.total)
        self.flat.copy_(self.total[: self.count])
        riders = self.total[self.count :].clone()
        self.total.zero_()
        return riders


def gather_rows(world: World, rows: np.ndarray, values: np.ndarray, count: int, partial: bool = False) -> np.ndarray:
    """Rows scored by any rank, put in order on every rank.

    rows (n,) int64 indices that this rank scored, values (n, C) fp32 -> (count, C) fp32. Each rank fills its own rows
    of a zero matrix and the sum puts them together exactly. partial: a row that did not come is NaN. Raises
    AssertionError unless every row came exactly once.
    """
    width = values.shape[1]
    full = torch.zeros(count, width + 1, dtype=torch.float32)
    full[torch.from_numpy(rows), :width] = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    np.add.at(full.numpy()[:, width], rows, 1.0)
    if world.size > 1:
        full = full.to(world.device)
        dist.all_reduce(full)
        full = full.cpu()
    seen = full[:, width].numpy().copy()
    if partial:
        full[seen == 0] = float("nan")
        seen = np.maximum(seen, 1)
    if not (seen == 1).all():
        raise AssertionError(f"{int((seen != 1).sum())} of {count} rows were not scored exactly once")
    return full[:, :width].numpy().copy()


def sum_over_ranks(world: World, values: list[float]) -> list[float]:
    """Sum a few host numbers over ranks, in fp64."""
    if world.size == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.tolist()


def gather_objects(world: World, value) -> list:
    """What each rank gives, in the order of ranks, on every rank."""
    found = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(found, value)
    return found


def barrier(world: World) -> None:
    """Wait until every rank is here."""
    if world.size > 1:
        dist.barrier()


def from_rank0(world: World, make) -> str:
    """What make() returns on rank 0, as a string on every rank; None becomes an empty one."""
    box = [str(make() or "") if world.rank == 0 else ""]
    if world.size > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]
