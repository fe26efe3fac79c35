"""The same run on any number of ranks, to the bit; and the helpers that fork ranks instead of starting interpreters."""

import csv
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forks follow

import numpy as np
import pytest
import torch
from tqdm import tqdm

import checkpoint
import ddp
import model as models
import train
import trained

tqdm.monitor_interval = 0  # no monitor thread in a process that forks
tqdm.set_lock(threading.RLock())  # its own lock is shared by forks: one that is killed would keep it for ever
ROOT = Path(__file__).resolve().parent.parent
forks = pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are forked: run with CUDA_VISIBLE_DEVICES= on CPUs")
pytestmark = forks


# ---- helpers, for the other tests of whole runs too -----------------------------------------------------------------


def write_rows(path: Path, count: int, skip: int = 0) -> Path:
    """`count` of the tiny problems, the eight classes in turn, with ids; `skip` leaves out that many of each class."""
    with open(ROOT / "tiny/data/train.csv", encoding="utf-8", newline="") as f:
        by_class: dict[str, list] = {}
        for row in csv.DictReader(f):
            by_class.setdefault(row["label"], []).append(row)
    classes = sorted(by_class)
    rows = [by_class[classes[i % len(classes)]][skip + i // len(classes)] for i in range(count)]
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, ["id", "Question", "label"])
        writer.writeheader()
        writer.writerows({"id": f"q{skip}-{i}", **row} for i, row in enumerate(rows))
    return path


def toy_flags(folder: Path, base: str, **changes) -> list[str]:
    """Flags of a run of a second: 58 training and 23 validation rows, 18 steps, both dropouts on. None drops a flag."""
    settings = {
        "base": base, "train_data": write_rows(folder / "train.csv", 58), "dataset": "toy",
        "val_data": write_rows(folder / "val.csv", 23, skip=10), "outputs": folder / "outputs", "max_length": 64,
        "max_tokens": 256, "batch_size": 7, "micro_batches": 3, "epochs": 2, "eval_every": 5, "lr": 3e-3, "rank": 4,
        "alpha": 12, "lora_dropout": 0.2, "head_dropout": 0.3, **changes,
    }  # fmt: skip
    return [str(part) for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


def start(main, flags: list[str], folder: Path, ranks: int = 1, before=None) -> list[int]:
    """Fork one process a rank that does what `python script.py FLAGS` does; `before()` runs in it first."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 99
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            for stream in (1, 2):
                fd = os.open(
                    folder / f"{'out' if stream == 1 else 'err'}.{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC
                )
                os.dup2(fd, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            if ranks > 1:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
                os.environ.update(MASTER_ADDR="localhost", GLOO_SOCKET_IFNAME="lo")
            sys.argv = ["script.py", *map(str, flags)]
            if before:
                before()
            ddp.launch(main)
        except SystemExit as e:
            code = e.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def finish(pids: list[int], folder: Path, seconds: float = 150) -> tuple[int, str, str]:
    """Wait for forked ranks: (the first status that is not 0, or 0; stdout of rank 0; stderr of all)."""
    statuses, end = {}, time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
                    statuses[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            raise AssertionError(f"still running after {seconds} s: {read(folder, 'err', len(pids))}")
        time.sleep(0.005)
    status = next((s for s in (statuses[p] for p in pids) if s), 0)
    return status, (folder / "out.0").read_text(), read(folder, "err", len(pids))


def read(folder: Path, kind: str, ranks: int) -> str:
    return "".join((folder / f"{kind}.{r}").read_text() for r in range(ranks) if (folder / f"{kind}.{r}").exists())


def forked(main, flags: list[str], folder: Path, ranks: int = 1) -> tuple[int, str, str]:
    """`command` of conftest without the seconds that an interpreter needs to import torch and transformers."""
    return finish(start(main, flags, folder, ranks), folder)


def run_of(stdout: str) -> Path:
    return Path(json.loads(stdout.strip().splitlines()[-1])["run"])


def log_of(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def shas(run: Path, name: str = "adapter_model.safetensors") -> dict[str, str]:
    return {side: checkpoint.sha256(run / side / name) for side in ("best", "last")}


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory, small_base) -> dict[int, Path]:
    """The toy run on 1, 2 and 3 ranks."""
    found = {}
    for ranks in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        status, out, err = forked(train.main, toy_flags(folder, small_base), folder, ranks)
        assert status == 0, out + err
        found[ranks] = run_of(out)
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_losses_weights_and_metrics_are_those_of_one_rank_to_the_bit(by_ranks, ranks):
    one, many = by_ranks[1], by_ranks[ranks]
    steps = [line for line in log_of(one) if "loss" in line]
    assert len(steps) == 18 and len({line["loss"] for line in steps}) == 18
    assert log_of(many) == log_of(one)
    assert shas(many) == shas(one)
    assert (many / "val_predictions.csv").read_bytes() == (one / "val_predictions.csv").read_bytes()
    results = [json.loads((run / "result.json").read_text()) for run in (one, many)]
    assert results[0]["metrics"] == results[1]["metrics"] and results[0]["metrics"]["rows"] == 23
    assert json.loads((many / "environment.json").read_text())["world_size"] == ranks


def test_torchrun_command_is_the_same_run(by_ranks, tmp_path, small_base, command):
    env = {"CUDA_VISIBLE_DEVICES": ""}
    status, out, err = command("train.py", *toy_flags(tmp_path, small_base), ranks=2, env=env)
    assert status == 0, err
    run = run_of(out)
    assert log_of(run) == log_of(by_ranks[1]) and shas(run) == shas(by_ranks[1])


def test_seed_decides(by_ranks, tmp_path, small_base):
    again = Path(train.main(toy_flags(tmp_path, small_base))["run"])
    other = Path(train.main(toy_flags(tmp_path, small_base, seed=1))["run"])
    assert log_of(again) == log_of(by_ranks[1]) and shas(again) == shas(by_ranks[1])
    assert shas(other)["last"] != shas(again)["last"]


def test_more_ranks_than_micro_batches_says_so_and_a_mistake_ends_all_ranks(tmp_path, small_base):
    flags = toy_flags(tmp_path, small_base, micro_batches=1, max_steps=2, eval_every=2)
    status, out, err = forked(train.main, flags, tmp_path, ranks=3)
    assert status == 0, err
    assert "cut into 3 micro-batches, more than --micro_batches 1" in out and "to rounding only" in out
    alone = forked(train.main, flags, tmp_path)[1]
    assert "more than --micro_batches" not in alone
    close = [[line["loss"] for line in log_of(run_of(o)) if "loss" in line] for o in (out, alone)]
    assert close[0] != close[1]  # other dropout masks, as announced
    status, out, err = forked(train.main, [*flags, "--text", "{Nothing}"], tmp_path, ranks=2)
    assert status == 2 and "no column Nothing" in err and "Traceback" not in err


# ---- one big batch --------------------------------------------------------------------------------------------------


def test_any_cut_of_a_step_is_one_big_batch(tmp_path, small_base):
    """Class weights and label smoothing on: the denominators are the step's, not the micro-batch's.

    Losses and parameters are equal to the rounding of a forward pass. On this random base attention is nearly uniform,
    so gradients of q and k are 1e-3 of the others', and AdamW, which divides by their size, magnifies that rounding.
    """
    changes = {"lora_dropout": 0, "head_dropout": 0, "class_weights": "balanced", "label_smoothing": 0.1}
    changes |= {"batch_size": 24, "epochs": 4, "train_data": uneven(tmp_path)}
    adapters, losses = [], []
    for cut in ({"max_tokens": 4096}, {"max_tokens": 1024}, {"max_tokens": 256}, {"max_tokens": 64, "max_length": 64}):
        folder = tmp_path / f"cut{cut['max_tokens']}"
        folder.mkdir()
        run = Path(train.main(toy_flags(folder, small_base, **{**changes, "micro_batches": 1, **cut}))["run"])
        adapters.append(checkpoint.load_tensors(run / "last/adapter_model.safetensors"))
        losses.append([line["loss"] for line in log_of(run) if "loss" in line])
    assert len(losses[0]) == 8
    for other, loss in zip(adapters[1:], losses[1:], strict=True):
        np.testing.assert_allclose(loss, losses[0], atol=2e-6)
        for name, tensor in adapters[0].items():
            room = 5e-5 if "q_proj" in name or "k_proj" in name else 1e-6  # of a learning rate of 3e-3
            torch.testing.assert_close(other[name], tensor, atol=room, rtol=0)
    assert not torch.equal(adapters[0]["base_model.model.score.weight"], adapters[-1]["base_model.model.score.weight"])


def uneven(folder: Path) -> Path:
    """41 training rows in which classes differ in number, so that class weights differ."""
    rows = list(csv.reader(open(write_rows(folder / "all.csv", 80), newline="")))
    with open(folder / "uneven.csv", "w", newline="") as f:
        csv.writer(f).writerows([rows[0], *(r for i, r in enumerate(rows[1:]) if i // 8 <= i % 8 + 1)])
    return folder / "uneven.csv"


def test_the_base_stays_bit_identical(tmp_path, small_base, monkeypatch):
    kept = []
    make = trained.new_classifier
    monkeypatch.setattr(trained, "new_classifier", lambda *a: kept.append(make(*a)) or kept[-1])
    result = train.main(toy_flags(tmp_path, small_base, targets="all-linear", weight_decay=0.5))
    fitted = {n.replace(".base_layer", ""): p for n, p in kept[0].named_parameters() if not p.requires_grad}
    loaded = trained.load_run(result["run"]).model
    fresh = models.load_classifier(small_base, models.Head(8), torch.device("cpu"), torch.float32).backbone.state_dict()
    assert {f"model.{n}" for n in fresh} == fitted.keys()
    frozen = {n.replace(".base_layer", ""): p for n, p in loaded.named_parameters() if ".lora_" not in n}
    for name, tensor in fresh.items():
        assert torch.equal(fitted[f"model.{name}"], tensor) and torch.equal(frozen[f"model.{name}"], tensor), name


# ---- the parts ------------------------------------------------------------------------------------------------------


def alone() -> ddp.World:
    return ddp.World(0, 1, torch.device("cpu"))


def test_gradient_sum_is_the_plain_sum_and_keeps_its_views():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    params, optimizer = list(layers.parameters()), torch.optim.AdamW(layers.parameters(), lr=0.1)
    gradients = ddp.GradientSum(params, alone())
    where = [p.grad.data_ptr() for p in params]
    for _ in range(2):  # the second step starts from zero again
        batches = [torch.randn(4, 6) for _ in range(3)]
        plain = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        for x in batches:
            for total, g in zip(plain, torch.autograd.grad(layers(x).square().sum(), params), strict=True):
                total += g
        losses = []
        for x in batches:
            loss = layers(x).square().sum()
            losses.append(loss.item())
            loss.backward()
            gradients.add(loss)
        riders = gradients.reduce(True, False)
        for p, total in zip(params, plain, strict=True):
            assert torch.equal(p.grad, total.float())
        assert riders.tolist() == [sum(losses), 3, 1, 0, 0]  # loss, micro-batches, two reasons, whose are bad
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        gradients.clear()
        assert [p.grad.data_ptr() for p in params] == where
        assert not gradients.total.any() and not any(p.grad.any() for p in params)


def test_gradient_sum_wants_fp32_masters_and_knows_its_limit(monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(AssertionError, match="fp32 masters.*bfloat16"):
        ddp.GradientSum([weight, torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], alone())
    assert ddp.GradientSum([weight], alone()).total.dtype == torch.float64
    monkeypatch.setattr(ddp, "FP64_LIMIT", 8)
    large = ddp.GradientSum([weight], alone())
    weight.sum().backward()
    large.add(torch.tensor(2.0))
    assert not large.exact and large.total.dtype == torch.float32
    assert large.reduce(False, True).tolist() == [2.0, 1, 0, 1, 0] and torch.equal(weight.grad, torch.ones(3, 3))
    assert weight.grad.data_ptr() == large.total.data_ptr()  # no second copy
    large.clear()
    (weight.sum() * float("nan")).backward()
    large.add(torch.tensor(2.0))
    assert large.reduce(False, False).tolist() == [2.0, 1, 0, 0, 0]  # of several ranks alone it is told whose are bad
    assert weight.grad.isnan().all()


def test_gather_rows_wants_every_row_once():
    values = np.arange(6, dtype=np.float32).reshape(3, 2)
    rows = np.array([2, 0, 1])
    assert ddp.gather_rows(alone(), rows, values, 3).tolist() == [[2, 3], [4, 5], [0, 1]]
    with pytest.raises(AssertionError, match="1 of 4 rows"):
        ddp.gather_rows(alone(), rows, values, 4)
    with pytest.raises(AssertionError, match="2 of 3 rows"):  # one twice, so one never
        ddp.gather_rows(alone(), np.array([2, 0, 0]), values, 3)


def test_ranks_exchange(tmp_path):
    """Rows, sums and strings between three ranks; a row scored by two of them is refused on all."""

    def main(argv):
        world = ddp.setup()
        mine = np.arange(world.rank, 7, 3)
        full = ddp.gather_rows(world, mine, np.stack([mine, -mine], 1).astype(np.float32), 7)
        assert full.tolist() == [[i, -i] for i in range(7)], full
        assert ddp.sum_over_ranks(world, world.rank + 0.25) == 3.75
        assert ddp.from_rank0(world, lambda: f"of {world.rank}") == "of 0"
        try:
            ddp.gather_rows(world, np.array([0, world.rank]), np.zeros((2, 1), np.float32), 3)
        except AssertionError as e:
            assert "1 of 3 rows" in str(e), e
            return {"run": "", "rank": world.rank}
        raise RuntimeError("accepted")

    status, out, err = forked(main, [], tmp_path, ranks=3)
    assert status == 0, err
    assert json.loads(out) == {"run": "", "rank": 0}


def test_micro_batches_have_their_own_seeds():
    seeds = {ddp.micro_seed(s, t, j) for s in range(4) for t in range(20) for j in range(5)}
    assert len(seeds) == 400 and max(seeds) < 2**63 and ddp.micro_seed(1, 2, 3) == ddp.micro_seed(1, 2, 3)
