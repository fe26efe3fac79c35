"""What can be held of the GPU paths without a GPU: what is chosen, shapes on the meta device, equality with plain twins.

Nothing here ran on a GPU; dev/LOG.md says what to look at first on one.
"""

import glob
import itertools
from pathlib import Path

import pytest
import torch

import ddp
from errors import UserError

CPU = torch.device("cpu")


# ---- how a process is set up ----------------------------------------------------------------------------------------


@pytest.fixture
def restored():
    """Torch's switches as they were, after the test."""
    matmul, deterministic = torch.backends.cuda.matmul, torch.utils.deterministic
    reduced = matmul.allow_fp16_reduced_precision_reduction
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    deterministic.fill_uninitialized_memory = True
    matmul.allow_fp16_reduced_precision_reduction = reduced


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose torch sees one GPU, as far as setup asks."""
    for name, value in (("is_available", True), ("device_count", 1), ("set_device", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_setup_on_a_gpu_is_strict_and_takes_no_kernel_that_is_planned_for_each_shape(gpu, restored):
    assert ddp.setup().device == torch.device("cuda", 0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    with ddp.relaxed():
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("built", ["13.0", None])
def test_a_gpu_that_torch_cannot_use_is_one_line_not_weeks_on_the_cpu(monkeypatch, built):
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/nvidia0"])
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: "NVRM: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"driver 550.54.15, .*for (CUDA 13.0|CPUs).*580.*cu126.*CUDA_VISIBLE_DEVICES"):
        ddp.setup()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert ddp.setup().device == CPU
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(glob, "glob", lambda pattern: [])
    assert ddp.setup().device == CPU


@pytest.mark.parametrize("kind, count, exact", [("cpu", 30e6, True), ("meta", 30e6, False), ("meta", 10e6, True)])
def test_gradients_of_whole_encoders_are_summed_in_fp32_on_gpus(kind, count, exact):
    """The meta device stands for one."""
    weight = torch.nn.Parameter(torch.empty(int(count), device=kind))
    gradients = ddp.GradientSum([weight], ddp.World(0, 1, torch.device(kind)))
    assert gradients.exact == exact and gradients.total.element_size() == (8 if exact else 4)
    assert (gradients.flat is gradients.sums) != exact
