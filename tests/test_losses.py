"""losses.py against torch on the whole batch: however a step is cut, the sums and weights of its parts add up."""

import pytest
import torch
import torch.nn.functional as F

import losses
from configs import TrainConfig

ROWS, CLASSES = 12, 4
WEIGHTS = [0.3, 1.0, 2.5, 6.0]
SPLITS = {"whole": [12], "halves": [6, 6], "uneven": [1, 8, 3], "singles": [1] * 12}


def toy_rows(dtype=torch.float32):
    """Logits (N, C) far from uniform and labels (N,) in order, so that class weights differ between the parts."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, CLASSES, generator=generator)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    return logits.to(dtype).requires_grad_(), labels


def settings(smoothing=0.0, share=1.0, temperature=1.0, task="single_label"):
    return TrainConfig(task=task, label_smoothing=smoothing, soft_share=share, soft_temperature=temperature)


def mass_of(labels, weights):
    return losses.TASKS["single_label"].weight(labels.numpy(), None if weights is None else weights.numpy())


def by_parts(logits, labels, sizes, smoothing, weights, soft=None, share=1.0, temperature=1.0):
    """Sum of the parts' sums, and of their weights."""
    total, mass, start = 0.0, 0.0, 0
    for size in sizes:
        part = slice(start, start + size)
        teacher = None if soft is None else soft[part]
        cfg = settings(smoothing, share, temperature)
        total = total + losses.loss_sum(cfg, logits[part], labels[part], weights, teacher)
        mass += mass_of(labels[part], weights)
        start += size
    return total, mass


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_any_split_equals_torch_on_the_whole_batch(split, smoothing, weighted):
    """Value and gradient; 1e-6: fp32 sums of a dozen terms in another order."""
    weights = torch.tensor(WEIGHTS) if weighted else None
    logits, labels = toy_rows()
    want = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    (want_grad,) = torch.autograd.grad(want, logits)
    total, mass = by_parts(logits, labels, SPLITS[split], smoothing, weights)
    (grad,) = torch.autograd.grad(total / mass, logits)
    torch.testing.assert_close(total / mass, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-7)


def test_loss_normalisation_under_accumulation():
    """The pitfall itself: the mean of the halves' class-weighted, smoothed means is another number."""
    weights = torch.tensor(WEIGHTS)
    logits, labels = toy_rows()
    whole = F.cross_entropy(logits, labels, weight=weights, label_smoothing=0.1)
    halves = [by_parts(logits[i : i + 6], labels[i : i + 6], [6], 0.1, weights) for i in (0, 6)]
    mean_of_halves = sum(s / m for s, m in halves) / 2
    assert abs(mean_of_halves - whole) > 0.05 * whole
    torch.testing.assert_close(sum(s for s, _ in halves) / sum(m for _, m in halves), whole, rtol=1e-6, atol=0)


def test_smoothed_weighted_loss_equals_its_definition():
    """Sum over rows of w_y * ((1 - s) * nll_y) + s/C * sum_c w_c * nll_c, written out in fp64; 1e-6 for fp32."""
    logits, labels = toy_rows()
    nll = -F.log_softmax(logits.detach().double(), dim=1)
    w = torch.tensor(WEIGHTS, dtype=torch.float64)
    want = sum(0.9 * w[y] * nll[i, y] + 0.1 / CLASSES * (w * nll[i]).sum() for i, y in enumerate(labels))
    total = losses.cross_entropy(logits, labels, 0.1, torch.tensor(WEIGHTS))
    assert float(total.detach()) == pytest.approx(float(want), rel=1e-6)
    assert mass_of(labels, w) == pytest.approx(float(w[labels].sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_logits_is_taken_in_fp32(dtype):
    logits, labels = toy_rows(dtype)
    total = losses.cross_entropy(logits, labels, 0.1)
    assert total.dtype == torch.float32 and mass_of(labels, None) == ROWS
    assert torch.equal(total, losses.cross_entropy(logits.float(), labels, 0.1))


# ---- soft targets ---------------------------------------------------------------------------------------------------


def toy_teacher(rows: int = ROWS) -> torch.Tensor:
    return torch.randn(rows, CLASSES, generator=torch.Generator().manual_seed(7)).softmax(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_teacher_that_says_the_labels_changes_nothing(weighted):
    logits, labels = toy_rows()
    weights = torch.tensor(WEIGHTS) if weighted else None
    plain = losses.loss_sum(settings(), logits, labels, weights)
    for share in (0.0, 0.3, 1.0):
        teacher = F.one_hot(labels, CLASSES).float()
        taught = losses.loss_sum(settings(share=share), logits, labels, weights, teacher)
        torch.testing.assert_close(taught, plain, rtol=1e-6, atol=0)


def test_share_1_at_temperature_1_is_torchs_loss_of_probabilities():
    logits, labels = toy_rows()
    soft = toy_teacher()
    got = losses.loss_sum(settings(0.1), logits, labels, soft=soft)
    torch.testing.assert_close(got, F.cross_entropy(logits, soft, reduction="sum"), rtol=1e-6, atol=0)


def test_soft_targets_equal_their_definition():
    """(1 - s) CE(z, y) + s T^2 CE(z / T, p^(1 / T) normalised) in fp64; rows without a teacher: CE(z, y)."""
    logits, labels = toy_rows()
    soft, share, t = toy_teacher(), 0.7, 3.0
    soft[[2, 5, 11]] = float("nan")
    z, p = logits.detach().double(), soft.double()
    want = 0.0
    for i, y in enumerate(labels):
        hard = -F.log_softmax(z[i], 0)[y]
        if i in (2, 5, 11):
            want += hard
            continue
        q = p[i] ** (1 / t) / (p[i] ** (1 / t)).sum()
        want += (1 - share) * hard - share * t**2 * (q * F.log_softmax(z[i] / t, 0)).sum()
    total = losses.loss_sum(settings(0.0, share, t), logits, labels, soft=soft)
    assert float(total.detach()) == pytest.approx(float(want), rel=1e-6)
    (grad,) = torch.autograd.grad(total, logits)
    assert grad.isfinite().all()


@pytest.mark.parametrize("split", SPLITS)
def test_soft_targets_add_up_over_any_split(split):
    weights = torch.tensor(WEIGHTS)
    logits, labels = toy_rows()
    soft = toy_teacher()
    soft[3] = float("nan")
    whole, _ = by_parts(logits, labels, [ROWS], 0.1, weights, soft, 0.6, 2.0)
    total, mass = by_parts(logits, labels, SPLITS[split], 0.1, weights, soft, 0.6, 2.0)
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    assert mass == pytest.approx(float(weights[labels].sum()), rel=1e-6)


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_soft_cells_of_several_labels(t):
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(6, 3, generator=generator), (torch.rand(6, 3, generator=generator) > 0.5).float()
    weights, soft, share = torch.tensor([1.0, 2.0, 5.0]), torch.rand(6, 3, generator=generator), 0.4
    soft[4] = float("nan")
    soft[0, 0], soft[0, 1] = 0.0, 1.0
    q = soft ** (1 / t) / (soft ** (1 / t) + (1 - soft) ** (1 / t))
    rest = [0, 1, 2, 3, 5]
    bce = F.binary_cross_entropy_with_logits
    options = {"pos_weight": weights, "reduction": "sum"}
    hard = [bce(logits[rows], labels[rows], **options) for rows in (rest, [4])]
    want = (1 - share) * hard[0] + share * t**2 * bce(logits[rest] / t, q[rest], **options) + hard[1]
    got = losses.loss_sum(settings(0.0, share, t, "multi_label"), logits, labels, weights, soft)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    same = losses.loss_sum(settings(task="multi_label"), logits, labels, weights, labels)
    torch.testing.assert_close(same, bce(logits, labels, **options), rtol=1e-6, atol=0)


def test_weights_of_steps():
    """Rows, class weights of labels, or cells: what a step's summed loss is divided by."""
    labels = torch.tensor([0, 2, 2]).numpy()
    weights = torch.tensor(WEIGHTS).double().numpy()
    assert losses.TASKS["single_label"].weight(labels, None) == 3.0
    assert losses.TASKS["single_label"].weight(labels, weights) == pytest.approx(0.3 + 2.5 + 2.5)
    assert losses.TASKS["multi_label"].weight(torch.zeros(3, 4).numpy(), weights) == 12.0
    assert losses.TASKS["regression"].weight(torch.zeros(3).numpy(), None) == 3.0


# ---- language models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 64])
def test_chunked_lm_cross_entropy_equals_plain(chunk):
    """Value and the gradients of states and of the LM head, also where the chunk does not divide the rows (11).

    1e-5: the head's gradient is a sum over chunks, in fp32.
    """
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(11, 8, generator=generator).requires_grad_()
    head = torch.randn(23, 8, generator=generator).requires_grad_()
    targets = torch.randint(0, 23, (11,), generator=generator)
    want = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    want_grads = torch.autograd.grad(want, [hidden, head])
    total = losses.lm_cross_entropy(hidden, lambda h: F.linear(h, head), targets, chunk)
    torch.testing.assert_close(total, want, rtol=1e-6, atol=0)
    for got, wanted in zip(torch.autograd.grad(total, [hidden, head]), want_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_lm_cross_entropy_never_holds_all_logits(monkeypatch):
    """Forward and backward see at most `chunk` rows of logits at a time, each chunk twice: it is recomputed."""
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda h, w: seen.append(len(h)) or linear(h, w))
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.randn(23, 8)
    losses.lm_cross_entropy(hidden, lambda h: F.linear(h, head), torch.zeros(10).long(), chunk=4).backward()
    assert sorted(seen) == [2, 2, 4, 4, 4, 4]
