"""What can be held of the GPU paths without a GPU: choices, shapes on the meta device, equality with plain twins.

Nothing here ran on a GPU; dev/LOG.md says what to look at first on one.
"""

import glob
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_ddp import toy_flags
from test_model import Causal, base, batch_of, classifier, heads, naive_attention, near, rows  # noqa: F401

import bases
import checkpoint
import data
import ddp
import labelling
import language
import lora
import model as models
import numerics
import packed
import packed_cuda
import train
import trained
from configs import TrainConfig
from errors import UserError

CPU = torch.device("cpu")
HALF, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


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


@pytest.mark.parametrize("layers", [-1, 1])
def test_weights_that_are_trained_start_from_the_stored_values(base, layers, monkeypatch):  # noqa: F811
    """Frozen ones are in half precision on a GPU; those that are trained must not have been rounded on the way."""
    monkeypatch.setattr(numerics, "weight_dtype", lambda device, precision: BF16)
    folder = base("Bert")
    cfg = TrainConfig(base=folder, rank=0, train_layers=layers, pooling="cls")
    tokenizer = bases.load_tokenizer("tiny/base")
    model = trained.new_classifier(cfg, labelling.find_labels(["a", "b"]), tokenizer, CPU, "bf16")
    stored = checkpoint.load_tensors(Path(folder) / "model.safetensors")
    kinds = set()
    for name, p in model.named_parameters():
        kinds.add((p.requires_grad, p.dtype))
        key = name.removeprefix("bert.")
        want = stored.get(name, stored.get(key))
        if p.requires_grad and want is not None:
            assert torch.equal(p, want), name
    assert kinds == {(True, FP32)} | ({(False, BF16)} if layers > 0 else set())


@pytest.mark.parametrize("family, strict", [("Bert", True), ("DebertaV2", False)])
def test_only_families_that_do_not_pack_are_relaxed(base, family, strict, restored):  # noqa: F811
    torch.use_deterministic_algorithms(True)
    cfg = TrainConfig(base=base(family), rank=0, pooling="cls")
    labels, tokenizer = labelling.find_labels(["a", "b"]), bases.load_tokenizer("tiny/base")
    train.new_model(cfg, SimpleNamespace(labels=labels, tokenizer=tokenizer), "fp32", print, ddp.World(0, 1, CPU))
    assert torch.are_deterministic_algorithms_enabled() == strict


def test_a_trained_vocabulary_is_cut_into_fewer_chunks_on_gpus():
    head = torch.nn.Linear(4, 9)
    assert [language.chunk_of(kind, head) for kind in ("cuda", "cpu")] == [2048, 512]
    assert language.chunk_of("cuda", head.requires_grad_(False)) == 512
    assert language.chunk_of("cuda", lora.LoRALinear(head, 2, 4.0)) == 512


def test_generation_may_run_what_has_no_deterministic_kernel(restored):
    torch.use_deterministic_algorithms(True)
    lm = language.load_language_model("tiny/base", CPU, FP32)
    with language.generating(lm):
        assert not torch.are_deterministic_algorithms_enabled()
    assert torch.are_deterministic_algorithms_enabled()


def test_gradients_that_are_not_finite_are_named_where_the_sum_is_the_gradient(tmp_path, small_base, monkeypatch):
    """Above the limit there is one buffer: a step that is not taken must leave it to be looked at."""
    monkeypatch.setattr(ddp, "FP64_LIMIT", 0)
    model = trained.new_classifier

    def poisoned(*args):
        made = model(*args)
        made.get_submodule("model.layers.1.mlp.up_proj").lora_B.weight.register_hook(lambda g: g * float("nan"))
        return made

    monkeypatch.setattr(trained, "new_classifier", poisoned)
    flags = toy_flags(tmp_path, small_base, targets="up_proj")
    with pytest.raises(FloatingPointError, match=r"gradients of model.layers.1.mlp.up_proj.lora_B.* not finite"):
        train.main(flags)


@pytest.mark.parametrize("soft", [False, True])
def test_targets_travel_with_the_tokens(soft):
    tokens = data.join_tokens([[3, 4], [5], [6, 7, 8]])
    chosen, labels, shares = np.array([2, 0]), np.array([1, 0, 2]), np.eye(3, dtype=np.float32)
    beside = [labels[chosen], shares[chosen]] if soft else [labels[chosen]]
    batch = packed.pack(tokens, chosen, CPU, beside=beside)
    assert [t.tolist() for t in batch.beside] == [array.tolist() for array in beside]
    assert batch.input_ids.tolist() == [6, 7, 8, 3, 4] and batch.targets is None and batch.asked is None


# ---- fp16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, capability, wanted, got",
    [
        ("Gemma3Text", (7, 5), "auto", None), ("Gemma3Text", (7, 5), "fp32", "fp32"),
        ("Gemma3Text", (8, 0), "auto", "bf16"), ("Gemma3Text", (8, 0), "fp16", None), ("Qwen2", (7, 5), "auto", "fp16"),
    ],
)  # fmt: skip
def test_a_base_that_overflows_is_refused_in_fp16(base, monkeypatch, family, capability, wanted, got):  # noqa: F811
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Some GPU")
    choose = partial(numerics.choose_precision, wanted, ddp.World(0, 1, torch.device("cuda", 0)), base(family))
    if got:
        assert choose()[0] == got
    else:
        with pytest.raises(UserError, match=r"overflows in fp16.*--precision fp32, or bf16"):
            choose()


def test_the_maxima_of_a_first_forward_pass_cover_what_overflows_inside_a_layer(base):  # noqa: F811
    """Outputs of o_proj and down_proj, and the product of two activations that down_proj reads; fused layers too."""
    model = classifier(base("Qwen2"), targets=("all-linear",))
    with torch.no_grad(), numerics.activation_maxima(model) as maxima:
        model(batch_of(rows()))
    names = {name for _, name in maxima}
    for layer in ("model.layers.0", "model.layers.1"):
        down = f"{layer}.mlp.down_proj.base_layer"
        assert {f"{layer}.self_attn.o_proj.base_layer", down, f"input of {down}"} <= names


# ---- attention ------------------------------------------------------------------------------------------------------

KERNELS = [  # capability, dtype, width of a head, window, dropout, kernel
    ((7, 5), HALF, 64, None, 0.1, "efficient"),  # a T4
    ((7, 5), FP32, 128, None, 0.0, "efficient"),
    ((7, 5), HALF, 256, 512, 0.0, "padded"),  # Gemma 3 beyond its window
    ((7, 5), BF16, 64, None, 0.0, "padded"),  # which has no bf16
    ((8, 0), BF16, 128, None, 0.1, "flash"),
    ((8, 0), HALF, 256, 512, 0.0, "flash"),
    ((8, 0), FP32, 128, None, 0.0, "efficient"),
    ((8, 0), FP32, 128, 64, 0.0, "padded"),
    ((8, 0), BF16, 320, None, 0.0, "efficient"),
    ((8, 9), BF16, 256, 512, 0.0, "flash"),
    ((8, 9), BF16, 256, 512, 0.1, "padded"),
    ((8, 6), BF16, 256, None, 0.1, "efficient"),
    ((12, 0), BF16, 208, None, 0.0, "efficient"),
    ((9, 0), BF16, 256, None, 0.1, "flash"),
    ((10, 0), BF16, 208, 64, 0.1, "flash"),
    ((9, 0), BF16, 36, None, 0.0, "padded"),  # not aligned
    ((9, 0), torch.float64, 64, None, 0.0, "padded"),
    ((0, 0), HALF, 64, None, 0.0, "padded"),  # ROCm
]


@pytest.mark.parametrize("capability, dtype, width, window, dropout, kernel", KERNELS)
def test_the_kernel_follows_from_the_gpu_and_what_is_asked(capability, dtype, width, window, dropout, kernel):
    assert packed_cuda.kernel_of(capability, dtype, width, window, dropout) == kernel


def alike(got, want):
    """Several tensors, some of which may be zero but for rounding: by the largest value of all."""
    most = max(float(t.abs().max()) for t in want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * most)


@pytest.mark.parametrize("window", [None, 1, 3, 30])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [(3, 7, 1, 12, 5), (1,), (5, 5)])
def test_padded_inside_attention_equals_the_loop(monkeypatch, lengths, key_heads, causal, window):
    """Values and gradients: padding is never seen, and gets no gradient."""
    parts, batch = heads(lengths, key_heads=key_heads)
    options = {"scaling": 0.3, "packed": batch, "is_causal": causal, "sliding_window": window}
    loop, _ = packed.packed_attention(Causal(), *parts, **options)
    monkeypatch.setitem(packed.KERNELS, "cpu", packed_cuda.padded)
    padded, _ = packed.packed_attention(Causal(), *parts, **options)
    near(padded, loop)
    direction = torch.randn_like(loop)
    gradients = [torch.autograd.grad((y * direction).sum(), parts) for y in (padded, loop)]
    alike(*gradients)


def test_take_has_the_gradient_of_an_index():
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    there = torch.tensor([0, 1, 5, 5, 2, 3, 4, 5])  # 5: padding
    back = torch.tensor([0, 1, 4, 5, 6])
    torch.autograd.gradcheck(lambda x: packed_cuda.Take.apply(x, there, back), x)
    torch.autograd.gradcheck(lambda x: packed_cuda.Take.apply(packed_cuda.Take.apply(x, there, back), back, there), x)
    assert torch.equal(packed_cuda.Take.apply(packed_cuda.Take.apply(x, there, back), back, there), x)


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3Text", "Bert", "ModernBert"])
def test_a_model_gives_the_same_padded_inside_attention(base, family, monkeypatch):  # noqa: F811
    def run():
        model = classifier(base(family))
        models.train_layers(model, -1)
        logits = model(batch_of(rows()))
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    loop = run()
    monkeypatch.setitem(packed.KERNELS, "cpu", packed_cuda.padded)
    alike(run(), loop)


@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, None), (False, 3)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_flash_has_the_shapes_of_the_loop_and_gradients_for_grouped_heads(causal, window, key_heads):
    """On the meta device the operator itself says what it takes and gives."""
    parts, batch = heads((3, 7), key_heads=key_heads)
    parts = [t.detach().to("meta", HALF).requires_grad_() for t in parts]
    batch.cu_seqlens = batch.cu_seqlens.to("meta")
    out = packed_cuda.flash(*parts, batch, 0.1, 0.3, window, causal)
    assert out.shape == (1, 10, 4, 8)
    out.sum().backward()
    assert [p.grad.shape for p in parts] == [p.shape for p in parts]
    with torch.no_grad():
        assert packed_cuda.efficient(*parts, batch, 0.1, 0.3, None, causal).shape == (1, 10, 4, 8)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("causal, window", [(True, None), (True, 3), (False, None), (False, 3)])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_the_operators_are_asked_for_what_the_loop_computes(causal, window, key_heads):
    """Stand-ins for both operators on the CPU compute what their documentation says of the arguments that they get."""
    lengths = (3, 7, 1, 12)

    def dense(q, k, v, starts, longest, sees, scale):  # (T, H, d), with starts (B + 1,)
        assert longest == max(lengths) and starts.dtype == torch.int32
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        which = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff().long())
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        allowed = (which[:, None] == which) & sees(distance)
        scores = torch.einsum("ihd,jhd->hij", q, k) * scale
        return torch.einsum("hij,jhd->ihd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)

    def flash(q, k, v, starts, _, longest, __, dropout, is_causal, debug, *, scale=None, window_size_left=None,
              window_size_right=None, **options):  # fmt: skip
        assert not debug and not options
        left, right = (torch.inf if size < 0 else size for size in (window_size_left, window_size_right))
        assert not is_causal or right == 0
        out = dense(q, k, v, starts, longest, lambda distance: (distance <= left) & (-distance <= right), scale)
        empty = torch.zeros(0)
        return out, empty, empty, empty, empty

    def efficient(q, k, v, bias, starts, _, longest, __, dropout, kind, keep=False, *, scale=None, **options):
        assert bias is None and not options and k.shape == q.shape
        out = dense(q[0], k[0], v[0], starts, longest, lambda distance: (distance >= 0) | (kind == 0), scale)
        return out[None], torch.zeros(0), torch.zeros(0), torch.zeros(0), longest, longest

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash, "CPU")
    library.impl("_efficient_attention_forward", efficient, "CPU")
    parts, batch = heads(lengths, key_heads=key_heads)
    want = naive_attention(*parts, lengths, window, causal, 0.3)
    with torch.no_grad():
        near(packed_cuda.flash(*parts, batch, 0.0, 0.3, window, causal), want)
        if not window:
            near(packed_cuda.efficient(*parts, batch, 0.0, 0.3, window, causal), want)
    library._destroy()
