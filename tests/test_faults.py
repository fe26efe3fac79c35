"""What ends a run from outside or goes bad within it: signals in every phase, ranks that vanish or hang, NaN."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import ROOT, finish, forked, forks, log_of, read, run_of, shas, start, toy_flags
from test_resume import LONG, lines_at, same, wait_for
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import checkpoint
import data
import ddp
import evaluate
import faults
import loop
import losses
import predictions
import signals
import train
import trained
import watch

pytestmark = forks


FEW = {**LONG, "max_steps": 15}  # an epoch and a half
FP16 = {**LONG, "precision": "fp16"}  # a loss scale falls 17 times before it helps no more
SLOW = {**LONG, "epochs": 400, "lr": 1e-4}  # minutes


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small_base) -> Path:
    """15 steps, never interrupted."""
    return Path(train.main(toy_flags(tmp_path_factory.mktemp("whole"), small_base, **FEW))["run"])


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def at_call(module, name: str, nth: int, act, ranks=(0, 1)):
    """For `start`: in these ranks, act() before the nth call of module.name."""

    def patch():
        original, calls = getattr(module, name), []

        def patched(*args, **kwargs):
            calls.append(name)
            if len(calls) == nth and rank() in ranks:
                act()
            return original(*args, **kwargs)

        setattr(module, name, patched)

    return patch


def ask(number, whom=os.getpid):
    return lambda: os.kill(whom(), number)


# ---- signals --------------------------------------------------------------------------------------------------------

# Where a signal comes: (module, function, its call), and whether last/ holds something then.
PHASES = {
    "encoding": (data, "tokenize", 2, False),
    "loading": (trained, "new_classifier", 1, False),
    "micro-batch": (loop, "seeded_loss", 12, True),
    "evaluation": (evaluate, "pack", 4, True),
    "saving": (checkpoint, "seal", 2, True),
    "end": (predictions, "write_predictions", 1, True),
}
WHO = {"one": (1,), "both": (0, 1), "torchrun": (0,)}


def start_torchrun(main, flags: list[str], folder: Path, ranks: int, before) -> list[int]:
    """As `start`, in torchrun's own agent; the ranks leave their process ids in pid.*."""

    def in_rank():
        (folder / f"pid.{rank()}").write_text(str(os.getpid()))
        sys.argv = ["script.py", *map(str, flags)]
        before()
        ddp.launch(main)

    launcher = os.fork()
    if launcher:
        return [launcher]
    with suppress(BaseException):
        for stream, name in ((1, "out.0"), (2, "err.0")):
            os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        agent = LaunchConfig(1, 1, ranks, rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
        elastic_launch(agent, in_rank)()
    os._exit(1)


def stopped(folder: Path, base: str, phase: str, number: int, who: str) -> Path | None:
    """The run of two ranks, if there is one, after a signal in a phase; asserts how they ended."""
    module, name, nth, saved = PHASES[phase]
    ranks = (0,) if phase in ("saving", "end") else WHO[who]  # rank 0 alone writes
    asked, by_torchrun = folder / "asked", who == "torchrun"
    act = ask(number, os.getppid if by_torchrun else os.getpid)
    before = at_call(module, name, nth, lambda: asked.touch() or act(), ranks)
    begin = start_torchrun if by_torchrun else start
    status, _, err = finish(begin(train.main, toy_flags(folder, base, **FEW), folder, 2, before), folder, 60)
    wait_until(lambda: all(gone(int(path.read_text())) for path in folder.glob("pid.*")), 30, folder)
    seconds = time.time() - asked.stat().st_mtime
    print(f"{phase}, {signal.Signals(number).name} to {who}: all ended after {seconds:.1f} s")
    err = read(folder, "err", 2)
    assert seconds < 10 and status != 0 and (by_torchrun or "Traceback" not in err), err
    runs = list((folder / "outputs").glob("*/*/run_0"))
    assert bool(runs) == saved, err
    if saved:
        assert (runs[0] / "PREEMPTED").is_file() and f"continue with --resume {runs[0]}" in err, err
        checkpoint.verify(runs[0] / "last")
    return runs[0] if saved else None


def resumed_is_whole(folder: Path, run: Path, whole: Path, ranks: int = 1) -> None:
    status, out, err = forked(train.main, ["--resume", str(run)], folder, ranks)
    assert status == 0 and not (run / "PREEMPTED").exists(), err
    same(run_of(out), whole)


SAMPLE = [
    ("encoding", signal.SIGINT, "one"), ("micro-batch", signal.SIGUSR1, "one"), ("evaluation", signal.SIGTERM, "both"),
    ("end", signal.SIGTERM, "both"),
]  # fmt: skip
ALL = [(phase, number, who) for phase in PHASES for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
       for who in WHO]  # fmt: skip


@pytest.mark.parametrize("phase,number,who", SAMPLE)
def test_a_signal_in_any_phase_loses_nothing(whole, tmp_path, small_base, phase, number, who):
    """Nothing is left of a run that had not begun; otherwise the resumed run is the undisturbed one, to the bit."""
    run = stopped(tmp_path, small_base, phase, number, who)
    if run:
        resumed_is_whole(tmp_path, run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("phase,number,who", ALL)
def test_every_signal_in_every_phase(whole, tmp_path, small_base, phase, number, who):
    run = stopped(tmp_path, small_base, phase, number, who)
    if run:
        resumed_is_whole(tmp_path, run, whole, 2)


# ---- ranks that hang or vanish --------------------------------------------------------------------------------------


def hang(seconds: float, who: int, how):
    """For `start`: one rank hangs in its sixth micro-batch or so; the limits of watch.py are seconds, not minutes."""

    def patch():
        watch.SILENT, watch.STUCK, watch.BEAT = seconds, 2 * seconds, 0.2
        at_call(loop, "seeded_loss", 6, how, (who,))()

    return patch


def test_one_rank_is_interrupted_before_training_and_both_end_at_once(tmp_path, small_base):
    """Also without torchrun, and while the other rank is busy with what takes hours."""

    def patch():
        at_call(data, "tokenize", 1, ask(signal.SIGINT), (1,))()
        at_call(data, "tokenize", 1, lambda: time.sleep(600), (0,))()

    status, _, err = finish(start(train.main, toy_flags(tmp_path, small_base), tmp_path, 2, patch), tmp_path, 60)
    assert status == 1 and err.split() == "rank 0: SIGINT: stopped rank 1: SIGINT: stopped".split(), err


@pytest.mark.parametrize("who,how", [(0, "stopped"), (1, "sleeps")])
def test_a_rank_that_hangs_is_named_and_the_others_end(tmp_path, small_base, who, how):
    """Rank 0 also holds the store through which ranks watch each other."""
    act = {"stopped": ask(signal.SIGSTOP), "sleeps": lambda: time.sleep(600)}[how]
    pids = start(train.main, toy_flags(tmp_path, small_base, **FEW), tmp_path, 2, hang(2.0, who, act))
    other = pids[1 - who]
    end = time.monotonic() + 60
    while not os.waitid(os.P_PID, other, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        assert time.monotonic() < end, read(tmp_path, "err", 2)
        time.sleep(0.05)
    os.kill(pids[who], signal.SIGKILL)
    finish(pids, tmp_path)
    err = read(tmp_path, "err", 2)
    words = {"stopped": "gives no sign of life", "sleeps": "has been in one micro-batch"}[how]
    assert f"error: rank {who} {words}" in err and "Traceback" not in err, err


def gone(pid: int) -> bool:
    """Whether a process that is no child of this one has ended."""
    try:
        return "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


def wait_until(condition, seconds: float, folder: Path) -> float:
    """Seconds until condition()."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, read(folder, "err", 2)
        time.sleep(0.02)
    return time.monotonic() - begun


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process that its parent is gone")
def test_ranks_save_and_end_when_their_launcher_is_killed(whole, tmp_path, small_base):
    """kill -9 of torchrun: no orphan trains on beside the process that resumes the run."""
    launcher = os.fork()
    if not launcher:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"
        kill_it = at_call(loop, "seeded_loss", 7, lambda: os.kill(os.getppid(), signal.SIGKILL), (0,))
        pids = start(train.main, toy_flags(tmp_path, small_base, **FEW), tmp_path, 2, kill_it)
        (tmp_path / "pids").write_text(" ".join(map(str, pids)))
        time.sleep(600)
        os._exit(1)
    os.waitpid(launcher, 0)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert wait_until(lambda: all(map(gone, pids)), 30, tmp_path) < 20
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert (run / "PREEMPTED").is_file() and not (run / "result.json").exists()
    resumed_is_whole(tmp_path, run, whole)


def test_a_stop_is_saved_where_nobody_reads_any_more(tmp_path, small_base):
    """As after Ctrl-C in `train.py 2>&1 | tee log`, and where the terminal was closed."""
    words = [sys.executable, str(ROOT / "train.py"), *toy_flags(tmp_path, small_base, **SLOW)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)
    (tmp_path / "err.0").touch()
    assert wait_for(tmp_path, 8, process.pid)
    process.stdout.close()
    before, end = lines_at(tmp_path), time.monotonic() + 1.5  # the bar moves each second
    while time.monotonic() < end or lines_at(tmp_path) < before + 12:  # scores are printed too
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert (run / "PREEMPTED").is_file()
    assert checkpoint.verify(run / "last")["step"] == max(line["step"] for line in log_of(run))


def test_a_run_that_cannot_begin_gives_the_signals_back(tmp_path, small_base, monkeypatch):
    """From Python: Ctrl-C must not be noted for ever by a run that never was."""
    before = {number: signal.getsignal(number) for number in signals.NUMBERS}

    def fail(*args):
        raise OSError("no service")

    monkeypatch.setattr(loop.tracking, "Tracker", fail)
    with pytest.raises(OSError, match="no service"):
        train.main(toy_flags(tmp_path, small_base, **FEW))
    assert before == {number: signal.getsignal(number) for number in signals.NUMBERS} and not signals.STOP.training


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGKILL"])
def test_torchrun_itself_is_sent_a_signal(tmp_path, small_base, name):
    """In training; torchrun passes some on and dies of the others: the ranks save within 10 s and end either way."""
    base = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    words = [*base, "--rdzv-endpoint=localhost:0", str(ROOT / "train.py"), *toy_flags(tmp_path, small_base, **SLOW)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "err.0", "w") as err:
        process = subprocess.Popen(words, env=environment, stdout=err, stderr=err)
    assert wait_for(tmp_path, 8, process.pid)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    process.send_signal(getattr(signal, name))
    seconds = wait_until((run / "PREEMPTED").is_file, 30, tmp_path)
    wait_until(lambda: all(gone(int(pid)) for pid in ranks), 30, tmp_path)
    process.wait(60)
    print(f"{name} to torchrun: saved after {seconds:.1f} s")
    assert seconds < 10 and not (run / "result.json").exists()
    step = checkpoint.verify(run / "last")["step"]
    assert step == max(line["step"] for line in log_of(run))


@pytest.mark.slow
def test_random_kills_under_max_restarts_change_nothing(tmp_path, small_base):
    """torchrun starts all ranks again whenever one was killed; the parameters are those of the undisturbed run."""
    changes = {**LONG, "epochs": 20}
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    status, out, err = finish(
        start(train.main, toy_flags(undisturbed, small_base, **changes), undisturbed), undisturbed, 600
    )
    assert status == 0, err
    base = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=40"]
    base += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "train.py"), "--resume", "auto"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp_path / "err.0", "w") as log:
        process = subprocess.Popen([*base, *toy_flags(tmp_path, small_base, **changes)], env=environment,
                                   stdout=log, stderr=log)  # fmt: skip
    rng, kills, lines = random.Random(5), 0, 0
    while kills < 25 and wait_for(tmp_path, lines + 1, process.pid):
        time.sleep(rng.uniform(0, 1.0))
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        if ranks:
            os.kill(int(rng.choice(ranks)), signal.SIGKILL)
            kills += 1
            wait_until(lambda ranks=ranks: all(gone(int(pid)) for pid in ranks), 60, tmp_path)
        lines = lines_at(tmp_path)
    assert process.wait(300) == 0 and kills == 25, (tmp_path / "err.0").read_text()[-3000:]
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert shas(run) == shas(run_of(out)) and log_of(run) == log_of(run_of(out))


@pytest.mark.slow
def test_a_hundred_runs_on_two_ranks_end_with_0(tmp_path, small_base):
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        status, _, err = forked(train.main, toy_flags(folder, small_base, max_steps=2, eval_every=2), folder, 2)
        assert status == 0 and "Traceback" not in err, f"{number}: {err}"


# ---- numbers that go bad --------------------------------------------------------------------------------------------

INF = float("inf")


def spoil(name: str):
    """Put inf into the first column of a weight of the model, so that every token meets it."""

    def act(job):
        with torch.no_grad():
            weight = dict(job.model.named_parameters())[name]
            weight.view(len(weight), -1)[:, 0] = INF

    return act


def spoil_state(key: str):
    """Put inf into the optimizer's state of the head."""

    def act(job):
        with torch.no_grad():
            job.optimizer.state[job.model.score.weight][key].view(-1)[0] = INF

    return act


def spoil_output(job):
    """Embeddings of a row that are NaN."""
    job.model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * float("nan"))


def spoil_loss(job):
    losses.loss_sum = lambda *args: LOSS_SUM(*args) * float("nan")


def spoil_gradient(job):
    """A gradient that is NaN on rank 1, or on the only one."""
    if job.world.rank == job.world.size - 1:
        job.model.score.weight.register_hook(lambda gradient: gradient * float("nan"))


LOSS_SUM = losses.loss_sum
LAYER = "model.layers.1.mlp.down_proj.base_layer.weight"
BAD = {  # place: (what is done to a job before its eighth step, what the error says)
    "embedding weight": (spoil("model.embed_tokens.weight"), "base are not finite: model.embed_tokens.weight"),
    "norm": (spoil("model.norm.weight"), "model.norm is the first .*base are not finite: model.norm.weight"),
    "layer norm": (spoil("model.layers.0.input_layernorm.weight"),
                   r"layer 0 is the first .*\(model.layers.0.input_layernorm\); .*input_layernorm.weight"),
    "layer": (spoil(LAYER), rf"layer 1 is the first .*not finite: {LAYER}"),
    "head": (spoil("score.weight"), "score is the first .*not finite: score.weight"),
    "loss": (spoil_loss, "the scores are finite, their loss is not"),
    "gradient": (spoil_gradient, "gradients of score.weight are not finite"),
    "first moment": (spoil_state("exp_avg"), "not finite: .*optimizer state exp_avg of score.weight"),
    "second moment": (spoil_state("exp_avg_sq"), "not finite: optimizer state exp_avg_sq of score.weight"),
    "input": (spoil_output, "model.embed_tokens is the first whose output is not finite"),
}  # fmt: skip


def spoiled(act):
    """For `start`: act(job) before the eighth step."""

    def patch():
        original = loop.step

        def step(job, *args):
            if job.state.step == 7:
                act(job)
            original(job, *args)

        loop.step = step

    return patch


def ends_with_4(folder: Path, base: str, place: str, precision: str, ranks: int) -> tuple[Path, str]:
    """(the run, its error) after something became bad in its eighth step; what is saved is finite, and of before."""
    act, words = BAD[place]
    flags = toy_flags(folder, base, **(FP16 if precision == "fp16" else FEW))
    pids = start(train.main, flags, folder, ranks, spoiled(act))
    status, _, err = finish(pids, folder)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 4 and len(set(errors)) == 1 and re.search(words, errors[0]), err
    run = next((folder / "outputs").glob("*/*/run_0"))
    for side in ("best", "last"):
        step = checkpoint.verify(run / side)["step"]
        tensors = checkpoint.load_tensors(run / side / "adapter_model.safetensors")
        latest = 10 if place == "gradient" else 7  # skipped steps change nothing, and an evaluation follows the tenth
        assert step <= latest and all(t.isfinite().all() for t in tensors.values())
    return run, errors[0]


@pytest.fixture(scope="module")
def whole_fp16(tmp_path_factory, small_base) -> Path:
    return Path(train.main(toy_flags(tmp_path_factory.mktemp("fp16"), small_base, **FP16))["run"])


@pytest.mark.parametrize("place,precision", [("norm", "fp32"), ("head", "fp16"), ("second moment", "fp32")])
def test_what_is_not_finite_is_named_and_never_saved(tmp_path, small_base, place, precision):
    ends_with_4(tmp_path, small_base, place, precision, 1)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("place", BAD)
def test_in_every_place_and_precision_and_resumed_it_is_the_undisturbed_run(
    whole, whole_fp16, tmp_path, small_base, place, precision, ranks
):
    """`last/` stays as it was before, so that a fault of the machine costs the steps since."""
    run, _ = ends_with_4(tmp_path, small_base, place, precision, ranks)
    resumed_is_whole(tmp_path, run, whole if precision == "fp32" else whole_fp16)


def test_a_gradient_on_one_rank_is_skipped_by_all_and_several_in_a_row_end_the_run(tmp_path, small_base):
    """The first four are counted and reported; the fifth ends the run, with the rank and the parameter named."""
    run, error = ends_with_4(tmp_path, small_base, "gradient", "fp32", 2)
    assert "gradients not finite on rank 1;" in error
    lines = [line for line in log_of(run) if "lr" in line]
    assert [line["skipped"] for line in lines[6:]] == [0, 1, 2, 3, 4] and lines[10]["loss"] is None
    assert (tmp_path / "out.0").read_text().count("in a row (the run ends at 5)") == 4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_one_bad_step_changes_no_parameter_and_training_continues(tmp_path, small_base, precision):
    """On two ranks: neither the schedule nor a parameter moves, and the other 14 steps are taken."""

    def act(job):
        handle = job.model.score.weight.register_hook(lambda gradient: gradient * float("nan"))
        original = job.gradients.reduce
        job.gradients.reduce = lambda *reasons: handle.remove() or original(*reasons)

    flags = toy_flags(tmp_path, small_base, **FEW, precision=precision)
    status, out, err = finish(start(train.main, flags, tmp_path, 2, spoiled(act)), tmp_path)
    assert status == 0, err
    lines = [line for line in log_of(run_of(out)) if "lr" in line]
    assert lines[7]["loss"] is None and lines[8]["lr"] == lines[7]["lr"] and lines[8]["loss"] is not None
    assert lines[14]["skipped"] - lines[6]["skipped"] == 1


def test_a_run_that_ends_while_its_loss_scale_falls_says_so(tmp_path, small_base):
    """Seven steps are taken, and eight are not."""
    flags = toy_flags(tmp_path, small_base, **FEW, precision="fp16")
    pids = start(train.main, flags, tmp_path, before=spoiled(BAD["gradient"][0]))
    status, out, err = finish(pids, tmp_path)
    assert status == 0 and out.count("the last 8 steps changed nothing") == 1, out + err


def test_a_loss_that_spikes_is_reported_once():
    spikes = faults.Spikes()
    rng = np.random.default_rng(0)
    calm = [spikes.note(step, 2.0 + 0.2 * rng.standard_normal()) for step in range(1, 100)]
    assert not any(calm)
    assert "the loss rose to 9 at step 100, 2" in spikes.note(100, 9.0) and not spikes.note(101, 90.0)


def test_activations_near_the_limit_of_fp16_are_reported_before_the_first_step(tmp_path, small_base, monkeypatch):
    """And only in fp16: a large weight is no problem elsewhere."""
    make = trained.new_classifier

    def large(*args):
        model = make(*args)
        with torch.no_grad():
            model.get_submodule("model.layers.1.mlp.up_proj").base_layer.weight *= 3e5
        return model

    monkeypatch.setattr(trained, "new_classifier", large)
    lines = []
    monkeypatch.setattr(ddp, "say", lambda world, *words: lines.append(" ".join(map(str, words))))
    for precision, count in (("fp32", 0), ("fp16", 1)):
        flags = toy_flags(tmp_path, small_base, max_steps=1, eval_every=1, precision=precision)
        with suppress(FloatingPointError):
            train.main(flags)
        notes = [line for line in lines if "fp16 holds 65504" in line]
        assert len(notes) == count and all("layer 1" in line for line in notes), lines


# ---- resumed to the bit, dropout on ---------------------------------------------------------------------------------


# Where a run is stopped: (module, function, its call) on every rank.
MOMENTS = {
    "mid-epoch": (loop, "log", 9),  # 10 steps an epoch, a line a step and one an evaluation
    "epoch end": (loop, "log", 12),
    "between micro-batches": (loop, "seeded_loss", 8),
    "inside evaluation": (evaluate, "pack", 3),
    "after evaluation": (loop, "save_last", 10),
}


def stopped_at(folder: Path, flags: list[str], moment: str, ranks: int) -> Path:
    """The run, stopped on all its ranks at a moment."""
    module, name, nth = MOMENTS[moment]
    pids = start(train.main, flags, folder, ranks, at_call(module, name, nth, ask(signal.SIGTERM), range(ranks)))
    status, _, err = finish(pids, folder)
    assert status != 0 and "Traceback" not in err and "stopped after step" in err, err
    return next((folder / "outputs").glob("*/*/run_0"))


def test_stopped_on_four_ranks_then_two_it_ends_on_one_as_if_undisturbed(four, tmp_path, small_base):
    """Between micro-batches, then inside an evaluation. FEW's steps have two micro-batches: four ranks need four."""
    flags = toy_flags(tmp_path, small_base, **{**FEW, "micro_batches": 4})
    run = stopped_at(tmp_path, flags, "between micro-batches", 4)
    stopped_at(tmp_path, ["--resume", str(run)], "inside evaluation", 2)
    resumed_is_whole(tmp_path, run, four)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_any_moment_on_any_ranks(tmp_path, small_base, four, moment, ranks):
    flags = toy_flags(tmp_path, small_base, **{**FEW, "micro_batches": 4})
    run = stopped_at(tmp_path, flags, moment, ranks)
    resumed_is_whole(tmp_path, run, four, ranks)


@pytest.fixture(scope="module")
def four(tmp_path_factory, small_base) -> Path:
    """Undisturbed, with four micro-batches a step."""
    flags = toy_flags(tmp_path_factory.mktemp("four"), small_base, **{**FEW, "micro_batches": 4})
    return Path(train.main(flags)["run"])


def dropout_by_rank():
    seed = ddp.micro_seed
    ddp.micro_seed = lambda *counts: seed(*counts) + rank()


def dropout_by_process():
    loop.seeded_loss = lambda job, number, rows, loss_of, weight: loss_of(rows) / weight


def a_step_is_left_out():
    original = loop.restore

    def restore(job, *args):
        original(job, *args)
        job.state.step += 1

    loop.restore = restore


@pytest.mark.parametrize(
    "fault",
    [
        a_step_is_left_out,
        pytest.param(dropout_by_rank, marks=pytest.mark.slow),
        pytest.param(dropout_by_process, marks=pytest.mark.slow),
    ],
)
def test_the_comparison_itself_notices(whole, tmp_path, small_base, fault):
    """Negative controls: a resume that is wrong in one of the ways it could be is not taken for the undisturbed run."""
    run = stopped_at(tmp_path, toy_flags(tmp_path, small_base, **FEW), "mid-epoch", 2)
    pids = start(train.main, ["--resume", str(run)], tmp_path, 2, fault)
    status, out, err = finish(pids, tmp_path)
    assert status == 0, err
    assert shas(run_of(out)) != shas(whole)
