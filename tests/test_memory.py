"""Memory: what a micro-batch keeps, which budget of tokens fits, and one line where it does not."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from test_ddp import finish, forked, forks, run_of, start, toy_flags
from test_model import CPU, base, batch_of  # noqa: F401
from test_resume import same, wait_for

import cli
import cpt
import data
import ddp
import estimates
import lora
import model as models
import train
from configs import TrainConfig

FP32 = torch.float32

# ---- the budget -----------------------------------------------------------------------------------------------------


def too_small(monkeypatch, script, *limits: int) -> None:
    """A GPU of each rank that runs out of memory beyond so many tokens, simulated."""
    loss_of = script.batch_loss

    def limited(job, data, *rest):
        if job.lengths[rest[-1]].sum() > limits[job.world.rank % len(limits)]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss_of(job, data, *rest)

    monkeypatch.setattr(script, "batch_loss", limited)


@forks
@pytest.mark.parametrize("limits", [(200,), (10**9, 200)], ids=["1 rank", "2 ranks, one smaller"])
def test_auto_is_the_largest_budget_that_fits_on_every_rank_and_stays(tmp_path, small_base, monkeypatch, limits):
    """The run is that with this --max_tokens to the bit, also when it is killed and continues on a larger GPU."""
    ranks = len(limits)
    (tmp_path / "given").mkdir()
    (tmp_path / "auto").mkdir()
    flags = toy_flags(tmp_path / "given", small_base, max_tokens=128, save_every=4)
    status, out, err = forked(train.main, flags, tmp_path / "given", ranks)
    assert status == 0, err
    given, folder = run_of(out), tmp_path / "auto"
    flags = toy_flags(folder, small_base, max_tokens="auto", save_every=4, resume="auto")
    pids = start(train.main, flags, folder, ranks, before=lambda: too_small(monkeypatch, train, *limits))
    assert wait_for(folder, 8, pids[0])
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert finish(pids, folder)[0] == -signal.SIGKILL
    assert "--max_tokens auto: 128, tried with a micro-batch of" in (folder / "out.0").read_text()
    status, out, err = forked(train.main, flags, folder, ranks)
    assert status == 0 and "tried with" not in out and "at most 128 tokens" in out, out + err
    same(run_of(out), given)


def test_auto_ends_at_one_row_with_what_to_do(tmp_path, small_base, monkeypatch):
    too_small(monkeypatch, train, 10)
    flags = toy_flags(tmp_path, small_base, max_tokens="auto")
    with pytest.raises(
        estimates.OutOfMemory, match=r"micro-batch of \d+ tokens.*lower --max_tokens.*--grad_checkpoint"
    ):
        train.main(flags)


def test_auto_in_continued_pretraining(tmp_path, small_base, monkeypatch, capsys):
    too_small(monkeypatch, cpt, 200)
    lines = [json.dumps({"text": f"the number {i} and the number {i * i} " * 12}) for i in range(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    flags = (
        f"--base {small_base} --train_data {tmp_path}/corpus.jsonl --outputs {tmp_path}/out --max_steps 2 --samples 0"
    )
    cpt.main([*flags.split(), "--max_length", "64", "--max_tokens", "auto", "--batch_size", "8", "--eval_every", "2"])
    assert "--max_tokens auto: 128" in capsys.readouterr().out


def test_a_step_that_runs_out_of_memory_is_one_line(tmp_path, small_base, monkeypatch):
    too_small(monkeypatch, train, 100)
    with pytest.raises(estimates.OutOfMemory, match=r"micro-batch of \d\d\d tokens, after a peak of .* GB") as error:
        train.main(toy_flags(tmp_path, small_base))
    assert "\n" not in str(error.value) and error.value.exit_status == 1


@forks
def test_any_other_lack_of_memory_is_one_line_too(tmp_path):
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    status, _, err = forked(main, [], tmp_path)
    assert status == 1 and err == "error: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


def test_pieces_of_memory_can_grow_unless_the_user_chose(monkeypatch):
    monkeypatch.setattr(cli, "print_anything", lambda: None)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    cli.early(TrainConfig, {}, "", [])
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    cli.early(TrainConfig, {}, "", [])
    assert os.environ["PYTORCH_ALLOC_CONF"] == "backend:native"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    cli.early(TrainConfig, {}, "", [])
    assert "PYTORCH_ALLOC_CONF" not in os.environ


def test_the_fullest_micro_batch_fills_the_budget_as_a_step_may():
    lengths = np.array([5, 30, 12, 8, 7, 1])
    assert data.fullest(lengths, 16, 50).tolist() == [1, 2, 3]  # 30 + 12 + 8
    assert data.fullest(lengths, 16, 49).tolist() == [1, 2, 4]
    assert data.fullest(lengths, 2, 49).tolist() == [1, 2]
    assert data.fullest(lengths, 16, 20).tolist() == [1]
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 64, 60)
        steps = data.plan_epoch(lengths, 8, 128, 1, 0, 0)
        most = max(int(lengths[rows].sum()) for rows in sum(steps, []))
        assert lengths[data.fullest(lengths, 8, 128)].sum() >= 0.95 * most


# ---- what a micro-batch keeps ---------------------------------------------------------------------------------------


def alive_after(forward) -> tuple[torch.Tensor, int]:
    """A loss, and the bytes of what its forward pass allocated and did not free, as torch's own profiler counts."""
    with torch.profiler.profile(profile_memory=True) as profile:
        loss = forward()
    return loss, sum(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3Text", "Bert"])
@pytest.mark.parametrize("dropout, targets", [(0.0, ("all-linear",)), (0.3, ("all-linear",)), (0.3, "two")])
def test_the_estimate_counts_what_stays_in_memory(base, family, dropout, targets):  # noqa: F811
    """LoRA's inputs and masks too, in fused layers and in plain ones."""
    model = models.load_classifier(base(family), models.Head(3, "mean"), CPU, FP32)
    two = ("query", "value") if family == "Bert" else ("q_proj", "v_proj")
    saved = models.head_to_save(model)
    models.add_adapter(model, lora.Adapter(two if targets == "two" else targets, 4, 8.0, dropout, saved=saved))
    gradients = ddp.GradientSum([p for p in model.parameters() if p.requires_grad], ddp.World(0, 1, CPU))
    model.train()
    batch = batch_of([[3] * 40, [5] * 25, [7] * 30])
    forward = lambda: model(batch).sum()  # noqa: E731
    forward()  # what is made once
    estimate = estimates.memory_estimate(model, gradients, forward)["activations"]
    loss, alive = alive_after(forward)
    assert estimate * 1e9 == pytest.approx(alive, rel=0.15)


@pytest.mark.parametrize("family", ["Qwen2", "Phi3"])
def test_of_layers_that_are_computed_again_one_is_counted_whole(base, family):  # noqa: F811
    """The others keep their inputs, (T, D) in fp32: fused layers and plain ones."""
    tokens, width, layers = 95, 32, 6
    model = models.load_classifier(base(family, num_hidden_layers=layers), models.Head(3, "mean"), CPU, FP32)
    models.add_adapter(model, lora.Adapter(("all-linear",), 4, 8.0, 0.3, saved=("score",)))
    gradients = ddp.GradientSum([p for p in model.parameters() if p.requires_grad], ddp.World(0, 1, CPU))
    batch = batch_of([[3] * 40, [5] * 25, [7] * 30])
    forward = lambda: model(batch).sum()  # noqa: E731
    model.train()

    def kept():
        return 1e9 * estimates.memory_estimate(model, gradients, forward)["activations"]

    whole = kept()
    models.checkpoint_activations(model.backbone)
    for _ in range(2):  # the first left all as it was
        assert kept() == pytest.approx(whole / layers + (layers - 1) * tokens * width * 4, rel=0.15)
    loss, alive = alive_after(forward)
    assert alive < whole / 4  # of small layers much is the state of the random generator
