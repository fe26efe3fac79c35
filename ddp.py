"""Data parallel by hand: one process per device, gradients summed once per step, ranks that decide together.

Started by torchrun (RANK, WORLD_SIZE, LOCAL_RANK set) or alone. The number of ranks changes who computes a
micro-batch, never what is computed: see the batch plan in data.py.
"""

import glob
import json
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import signals
from errors import UserError, one_line
from watch import Watch

WAIT = timedelta(hours=12)  # the others wait while rank 0 encodes a corpus; see watch.py for a rank that never comes
# Trained parameters up to which gradients are summed in fp64. GPUs would wait for twice the bytes, and for slow sums.
FP64_LIMIT, FP64_LIMIT_ON_GPUS = 200_000_000, 20_000_000


class World(NamedTuple):
    """This process among all: its rank, the number of ranks, its device."""

    rank: int
    size: int
    device: torch.device


class RankLost(RuntimeError):
    """What ranks do together failed, as a rule because one of them ended."""

    exit_status = 1


WATCHES: list[Watch] = []  # of this process: none, or one where there are other ranks


def ranks() -> tuple[int, int, int]:
    """(rank, local rank, number of ranks) as torchrun sets them. Raises UserError for what another program left."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "1", "MASTER_ADDR": ""}
    given = {name: os.environ[name] for name in alone if name in os.environ}
    rank, local, size, port, _ = (alone | given).values()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in given]
    if not all(map(str.isdecimal, (rank, local, size, port))):
        problem = "expected whole numbers"
    elif max(int(rank), int(local)) >= int(size):
        problem = "expected ranks below WORLD_SIZE"
    elif int(size) > 1 and missing:
        problem = f"without {', '.join(missing)}"
    else:
        return int(rank), int(local), int(size)
    words = " ".join(f"{name}={value}" for name, value in given.items())
    raise UserError(f"the environment has {words}, {problem}: unset them, or start with torchrun, which sets all")


def setup() -> World:
    """Join torchrun's process group (nccl on GPUs, gloo on CPUs), or be a world of one.

    Raises UserError for more ranks than GPUs, and for a GPU that this torch cannot use.
    """
    rank, local, size = ranks()
    need_driver()
    device, backend = torch.device("cpu"), {"backend": "gloo"}
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"local rank {local} has no GPU of its own: use --nproc_per_node={gpus}")
        choose_kernels()
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        backend = {"backend": "nccl", "device_id": device}
    if size > 1 and not dist.is_initialized():
        watch = Watch(rank, size)
        watch.start()
        WATCHES.append(watch)
        with together():
            # torchrun keeps one store over its restarts: the addresses of killed ranks in it would be dialed again.
            store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=WAIT))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(**backend, store=store, rank=rank, world_size=size, timeout=WAIT)
        watch.meet(store.clone())
    return World(rank, size, device)


def need_driver() -> None:
    """Raise UserError where a GPU is present that this torch cannot use: on the CPU it would train for weeks."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if hidden or torch.cuda.is_available() or not glob.glob("/dev/nvidia[0-9]*"):
        return
    version = Path("/proc/driver/nvidia/version")
    driver = re.search(r"Module\D*([\d.]+)", version.read_text()) if version.is_file() else None
    words = f", driver {driver[1]}" if driver else ""
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    raise UserError(
        f"this machine has an NVIDIA GPU{words}, which torch {torch.__version__}, built {build}, cannot use. CUDA 13 "
        "needs driver 580 or newer: update it, or install a build for older ones (pip install torch --index-url "
        "https://download.pytorch.org/whl/cu126); CUDA_VISIBLE_DEVICES=-1 runs on the CPU"
    )


def choose_kernels() -> None:
    """On GPUs: kernels that repeat to the bit, and none that are slow with sequences of many lengths."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

    # Strict: with warn_only, attention adds up its gradients in any order. What has no such version relaxes it.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # another kernel for every new tensor

    # cuDNN plans each new shape of attention anew, for half a second.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


@contextmanager
def relaxed():
    """Inside the block also kernels may run that add up in any order."""
    strict = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict)


@contextmanager
def together():
    """Around what all ranks do together. Raises RankLost where it fails, unless a GPU did."""
    try:
        with WATCHES[0].together():
            yield
    except getattr(torch, "AcceleratorError", ()):
        raise
    except RuntimeError as e:
        raise RankLost(f"a rank ended, see its own message ({one_line(e)})") from None


def computes() -> None:
    """This rank begins a micro-batch: what it does from here on takes no more than minutes."""
    for watch in WATCHES:
        watch.computes()


def stopping(world: World) -> bool:
    """Whether any rank was asked to stop: the same answer on all of them."""
    return sum_over_ranks(world, float(bool(signals.STOP.number))) > 0


def micro_seed(seed: int, step: int, micro_batch: int) -> int:
    """The counted seed of a micro-batch's dropout: a function of (seed, step, micro-batch) alone."""
    return int(np.random.SeedSequence([seed, step, micro_batch]).generate_state(1, np.uint64)[0] >> 1)


def say(world: World, *words) -> None:
    """Print on rank 0, unless all words are empty. Where nobody reads any more, as after Ctrl-C in `train.py | tee`,
    the command goes on, and can save.
    """
    if world.rank == 0 and any(words):
        with suppress(OSError):
            print(*words, flush=True)


def launch(main) -> None:
    """Run an entry point's main(argv) -> dict, print the dict as the last line of stdout, leave with the exit status.

    0 done, 1 failure or stopped, 4 numbers not finite; otherwise an exception's own `exit_status` (2 the user's
    mistake, 3 untrusted checkpoint, 5 degenerate scores). Errors that are meant for the user are one line.
    """
    signals.early()
    rank = 0
    try:
        rank, _, _ = ranks()
        result = main(sys.argv[1:])
        if rank == 0:
            print(json.dumps(result), flush=True)
        if dist.is_initialized():
            barrier(World(rank, dist.get_world_size(), None))
        code = 0
    except (Exception, KeyboardInterrupt) as e:
        code = 4 if isinstance(e, FloatingPointError) else getattr(e, "exit_status", 1)
        # Rank 0 reports an error that all ranks share, a rank that failed its own; torchrun ends the others meanwhile.
        if rank > 0 or isinstance(e, RankLost):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
        expected = KeyboardInterrupt, FloatingPointError, OSError, torch.OutOfMemoryError
        if isinstance(e, expected) or hasattr(e, "exit_status"):
            tqdm.write(f"error: {e}" if str(e) else "interrupted", file=sys.stderr)  # on a line of its own
        else:
            traceback.print_exc()

    # destroy_process_group hangs now and then (gloo, torch 2.13; pytorch#190489): leave without it.
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class GradientSum:
    """The gradients of one optimizer step as one flat buffer, whatever the number of micro-batches and ranks.

    Every trained parameter's .grad is a view into one flat fp32 tensor, so a backward pass writes there directly.
    `add` adds that to an fp64 buffer: fp32 values are summed in fp64 almost without rounding, so the sum does not
    depend on the order. `reduce` sums over ranks and writes the result back into the .grad views; with it travel the
    loss, the number of micro-batches, two reasons to stop, and whose gradients are not finite. Above the limit of
    parameters the flat tensor is the sum itself: fp32, equal to rounding only.
    """

    def __init__(self, params: list[torch.nn.Parameter], world: World):
        if any(p.dtype != torch.float32 for p in params):
            raise AssertionError(f"trained parameters must be fp32 masters: {sorted({str(p.dtype) for p in params})}")
        sizes = [p.numel() for p in params]
        self.world, self.count = world, sum(sizes)
        device = params[0].device
        self.exact = self.count <= (FP64_LIMIT if device.type == "cpu" else FP64_LIMIT_ON_GPUS)
        dtype = torch.float64 if self.exact else torch.float32
        riders = 4 + world.size
        self.total = torch.zeros(self.count + riders, dtype=dtype, device=device)
        self.sums, self.riders = self.total.split([self.count, riders])
        self.flat = torch.zeros(self.count, device=device) if self.exact else self.sums
        for p, view in zip(params, self.flat.split(sizes), strict=True):
            p.grad = view.view_as(p)

    def add(self, loss: torch.Tensor) -> None:
        """Add the gradients of the micro-batch just run backward, and its loss."""
        if self.exact:
            self.sums.add_(self.flat)
            self.flat.zero_()
        self.riders[0] += loss.detach()
        self.riders[1] += 1

    def reduce(self, *reasons: bool) -> torch.Tensor:
        """Sum over ranks into the .grad views; reasons: this rank's two to stop. `clear` begins the next step.

        Returns, on the device: the loss, the number of micro-batches, for each reason how many ranks have it, and of
        several ranks for each whether its own gradients are not finite.
        """
        self.riders[2], self.riders[3] = reasons
        if self.world.size > 1:
            self.riders[4 + self.world.rank] = ~self.sums.sum().isfinite()
            with together():
                dist.all_reduce(self.total)
                if self.total.is_cuda:
                    torch.cuda.synchronize()  # a GPU is waited for here, where the wait is watched
        if self.exact:
            self.flat.copy_(self.sums)
        return self.riders

    def clear(self) -> None:
        self.total.zero_()
        self.flat.zero_()


def gather_rows(world: World, rows: np.ndarray, values: np.ndarray, count: int, partial: bool = False) -> np.ndarray:
    """Rows scored by any rank, in order, on every rank.

    rows (n,) int64 indices that this rank scored, values (n, C) fp32 -> (count, C) fp32. Each rank fills its own rows
    of a zero matrix, and the sum over ranks is exact. partial: a row that no rank scored is NaN. Raises
    AssertionError unless every row was scored exactly once.
    """
    full = np.zeros((count, values.shape[1] + 1), np.float32)
    full[rows, :-1] = values
    np.add.at(full[:, -1], rows, 1)
    full = _all_reduce(world, torch.from_numpy(full)).numpy()
    seen = full[:, -1]
    wrong = np.count_nonzero(seen > 1 if partial else seen != 1)
    if wrong:
        raise AssertionError(f"{wrong} of {count} rows were not scored exactly once")
    full[seen == 0] = np.nan
    return full[:, :-1].copy()


def sum_over_ranks(world: World, value: float) -> float:
    """Sum a host number over ranks, in fp64."""
    return _all_reduce(world, torch.tensor(value, dtype=torch.float64)).item()


def _all_reduce(world, tensor):
    """The sum over ranks of a tensor on the CPU, on the CPU."""
    if world.size > 1:
        tensor = tensor.to(world.device)
        with together():
            dist.all_reduce(tensor)
            tensor = tensor.cpu()  # as above
    return tensor.cpu()


def gather_objects(world: World, value) -> list:
    """The value of each rank, in the order of ranks, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        with together():
            dist.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        with together():
            dist.barrier()


def from_rank0(world: World, make) -> str:
    """The result of make() on rank 0, as a string on every rank; None becomes an empty string."""
    return gather_objects(world, str(make() or "") if world.rank == 0 else "")[0]
