"""optim.py: schedules against transformers, parameter groups as set equality, and the step that must not slip."""

import copy
import math

import pytest
import torch
from torch import nn

import optim


class Toy(nn.Module):
    """A body with a matrix, a bias and a norm; a head called score; something frozen; a body module named like it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 4)
        self.norm = nn.LayerNorm(4)
        self.scorer = nn.Linear(4, 4, bias=False)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.score = nn.Linear(4, 3, bias=True)


def toy_optimizer(lr=1e-2, head_lr=5e-2, weight_decay=0.1):
    model = Toy()
    optimizer = optim.adamw(optim.parameter_groups(model.named_parameters(), lr, head_lr, weight_decay))
    return model, optimizer


def fill_gradients(model, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = scale * torch.randn(p.shape, generator=generator)


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def snapshot(model, optimizer):
    """Bytes of the parameters and of the optimizer's moments and counters."""
    states = [t.clone() for p in trained(model).values() for t in optimizer.state[p].values()]
    return [p.detach().clone() for p in model.parameters()] + states


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def step(optimizer, scaler, factor, grad_clip):
    """optim.step without riders: the norm and whether the step was taken."""
    return optim.step(optimizer, scaler, factor, grad_clip, torch.zeros(0))[:2]


def off():
    return torch.amp.GradScaler("cpu", enabled=False)


# ---------------------------------------------------------------------------------------------------------------------
# schedules


@pytest.mark.parametrize("total, warmup", [(20, 0), (20, 7), (1, 0), (5, 5), (300, 30)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_equals_transformers_after_the_warmup(schedule, total, warmup):
    """Equal after the warm-up. In it, ours at update u is theirs at u + 1: theirs throws the first update away."""
    import transformers

    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(probe, warmup, total).lr_lambdas[0]
    for u in range(total):
        want = theirs(u + 1) if u + 1 < warmup else 1.0 if u + 1 == warmup else theirs(u)
        assert optim.lr_factor(u, total, warmup, schedule) == pytest.approx(want, abs=1e-12), u


def test_schedule_values_by_hand():
    def factors(schedule):
        return [optim.lr_factor(u, 6, 2, schedule) for u in range(7)]

    half = math.sqrt(0.5)
    assert factors("constant") == [0.5, 1, 1, 1, 1, 1, 1]
    assert factors("linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25, 0])
    assert factors("cosine") == pytest.approx([0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2, 0])


@pytest.mark.parametrize("steps, ratio, want", [(0, 0.0, 0), (0, 0.1, 11), (7, 0.0, 7), (7, 0.5, 7), (0, 0.001, 1)])
def test_warmup_steps_take_the_place_of_the_ratio(steps, ratio, want):
    assert optim.warmup_updates(101, steps, ratio) == want


# ---------------------------------------------------------------------------------------------------------------------
# groups


def test_groups_decay_matrices_only_and_give_the_head_its_own_rate():
    model = Toy()
    groups = optim.parameter_groups(model.named_parameters(), lr=1e-4, head_lr=3e-4, weight_decay=0.1)
    name_of = {id(p): n for n, p in model.named_parameters()}
    got = {(frozenset(name_of[id(p)] for p in g["params"]), g["lr"], g["peak_lr"], g["weight_decay"]) for g in groups}
    assert got == {
        (frozenset({"body.weight", "scorer.weight"}), 1e-4, 1e-4, 0.1),
        (frozenset({"body.bias", "norm.weight", "norm.bias"}), 1e-4, 1e-4, 0.0),
        (frozenset({"score.weight"}), 3e-4, 3e-4, 0.1),
        (frozenset({"score.bias"}), 3e-4, 3e-4, 0.0),
    }


def test_head_lr_zero_means_lr():
    groups = optim.parameter_groups(Toy().named_parameters(), lr=1e-4, head_lr=0.0, weight_decay=0.1)
    assert {g["peak_lr"] for g in groups} == {1e-4}


# ---------------------------------------------------------------------------------------------------------------------
# the step


@pytest.mark.parametrize("grad_clip", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("scaled", [False, True])
def test_step_equals_clip_grad_norm_and_plain_adamw(grad_clip, scaled):
    """Several updates, with the schedule's factor, scaled gradients or not, equal torch's own clipping and AdamW.

    Bit for bit without a scaler; with one, its scale (2 ** 16) is a power of two, so unscaling is exact too.
    """
    model, optimizer = toy_optimizer()
    reference = copy.deepcopy(model)
    groups = optim.parameter_groups(reference.named_parameters(), 1e-2, 5e-2, 0.1)
    plain = torch.optim.AdamW([{k: g[k] for k in ("params", "lr", "weight_decay")} for g in groups], fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(torch.ones(()))  # as a training step does before backward
    for update, factor in enumerate((0.5, 1.0, 0.25)):
        fill_gradients(model, scaler.get_scale(), seed=update)
        norm, taken = step(optimizer, scaler, factor, grad_clip)
        fill_gradients(reference, seed=update)
        for group, g in zip(plain.param_groups, groups, strict=True):
            group["lr"] = g["peak_lr"] * factor
        params = [p for g in groups for p in g["params"]]  # in our order: a norm's last bit depends on it
        want = nn.utils.clip_grad_norm_(params, grad_clip or float("inf"))
        plain.step()
        assert taken and norm == float(want)
    assert same(list(model.parameters()), list(reference.parameters()))


def test_gradients_are_zeroed_in_place_and_do_not_leak_into_the_next_step():
    """.grad tensors are views of one buffer elsewhere: they must stay the same tensors, holding zeros."""
    model, optimizer = toy_optimizer()
    fill_gradients(model)
    before = {n: p.grad for n, p in trained(model).items()}
    step(optimizer, off(), 1.0, 1.0)
    for name, p in trained(model).items():
        assert p.grad is before[name] and not p.grad.any(), name
    for p in trained(model).values():
        p.grad += 1e-3  # as backward accumulates
    norm, _ = step(optimizer, off(), 1.0, 0.0)
    count = sum(p.numel() for p in trained(model).values())
    assert norm == pytest.approx(1e-3 * math.sqrt(count), rel=1e-5)  # fp32


def test_rates_follow_the_peak_and_never_compound():
    _, optimizer = toy_optimizer(lr=1e-2, head_lr=5e-2)
    for factor in (0.5, 0.5, 0.1):
        fill_gradients_of(optimizer)
        step(optimizer, off(), factor, 0.0)
        assert {(g["name"].split()[0], g["lr"]) for g in optimizer.param_groups} == {
            ("body", 1e-2 * factor),
            ("head", 5e-2 * factor),
        }


def fill_gradients_of(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("scaled", [False, True])
def test_non_finite_gradients_change_nothing(bad, scaled):
    """Parameters, moments and counters stay bit for bit; with fp16 the scale is halved; the next step is taken."""
    model, optimizer = toy_optimizer()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(torch.ones(()))
    fill_gradients(model, scaler.get_scale())
    assert step(optimizer, scaler, 1.0, 1.0)[1]
    before, scale = snapshot(model, optimizer), scaler.get_scale()
    fill_gradients(model, scale, seed=1)
    model.norm.bias.grad[2] = bad
    norm, taken = step(optimizer, scaler, 1.0, 1.0)
    assert taken is False and not math.isfinite(norm)
    assert same(before, snapshot(model, optimizer))
    assert not model.norm.bias.grad[2].isfinite()  # faults.py names it
    assert scaler.get_scale() == (scale / 2 if scaled else 1.0)
    fill_gradients(model, scaler.get_scale(), seed=2)
    assert step(optimizer, scaler, 1.0, 1.0)[1]
    assert not same(before, snapshot(model, optimizer))


@pytest.mark.parametrize("scaled", [False, True])
def test_taken_is_the_truth_where_only_the_norm_overflows(scaled):
    """Finite gradients of 1e25 whose norm is infinite in fp32: reported as not taken, so nothing may change."""
    model, optimizer = toy_optimizer()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(torch.ones(()))
    before = [p.detach().clone() for p in model.parameters()]
    fill_gradients(model, 1e25 * scaler.get_scale())
    _, taken = step(optimizer, scaler, 1.0, 1.0)
    assert taken == (not same(before, list(model.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_riders_come_back_in_order_whatever_the_gradients_are(dtype):
    """Numbers that are read together with the norm, also of a step that is not taken."""
    model, optimizer = toy_optimizer()
    riders = torch.tensor([2.5, -1.0, float("nan")], dtype=dtype)
    for bad in (0.0, float("nan")):
        fill_gradients(model)
        model.norm.bias.grad[0] += bad
        norm, taken, read = optim.step(optimizer, off(), 1.0, 1.0, riders)
        assert taken == (bad == 0) == math.isfinite(norm)
        assert read[:2] == [2.5, -1.0] and math.isnan(read[2])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_whose_micro_batches_are_not_all_there_changes_nothing(scaled):
    """Neither parameters nor the loss scale: the step will be repeated whole."""
    model, optimizer = toy_optimizer()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    scaler.scale(torch.ones(()))
    before, scale = snapshot(model, optimizer), scaler.state_dict()
    fill_gradients(model, scaler.get_scale())
    _, taken, _ = optim.step(optimizer, scaler, 1.0, 1.0, torch.tensor([1.0, 2.0]), lambda riders: riders[1] == 3)
    assert not taken and same(before, snapshot(model, optimizer)) and scaler.state_dict() == scale


def test_fp16_step_of_a_rank_without_micro_batches():
    """A rank that has scaled no loss yet still unscales: its gradients come from the others."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.adamw([{"params": [p], "lr": 0.1, "peak_lr": 0.1, "weight_decay": 0.0}])
    p.grad = torch.full((3,), 65536.0)
    norm, taken, _ = optim.step(optimizer, optim.loss_scaler("cpu", True), 1.0, 0.0, torch.zeros(2))
    assert taken and norm == pytest.approx(3**0.5)
