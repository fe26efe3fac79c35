"""losses.py against torch on the whole batch: however a step is cut, the parts' sums and weights make the same mean."""

import pytest
import torch
import torch.nn.functional as F

import losses

ROWS, CLASSES = 12, 4
WEIGHTS = [0.3, 1.0, 2.5, 6.0]
SPLITS = {"whole": [12], "halves": [6, 6], "uneven": [1, 8, 3], "singles": [1] * 12}


def toy_rows(dtype=torch.float32):
    """Logits (N, C) far from uniform and labels (N,) in order, so that class weights differ between the parts."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, CLASSES, generator=generator)
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3])
    return logits.to(dtype).requires_grad_(), labels


def by_parts(logits, labels, sizes, smoothing, weights):
    """Sum of the parts' sums, and of their weights."""
    parts = zip(logits.split(sizes), labels.split(sizes), strict=True)
    sums, masses = zip(*(losses.cross_entropy(z, y, smoothing, weights) for z, y in parts), strict=True)
    return torch.stack(sums).sum(), sum(masses)


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
    halves = [losses.cross_entropy(logits[i : i + 6], labels[i : i + 6], 0.1, weights) for i in (0, 6)]
    mean_of_halves = sum(s / m for s, m in halves) / 2
    assert abs(mean_of_halves - whole) > 0.05 * whole
    torch.testing.assert_close(sum(s for s, _ in halves) / sum(m for _, m in halves), whole, rtol=1e-6, atol=0)


def test_smoothed_weighted_loss_equals_its_definition():
    """Sum over rows of w_y * ((1 - s) * nll_y) + s/C * sum_c w_c * nll_c, written out in fp64; 1e-6 for fp32."""
    logits, labels = toy_rows()
    nll = -F.log_softmax(logits.detach().double(), dim=1)
    w = torch.tensor(WEIGHTS, dtype=torch.float64)
    want = sum(0.9 * w[y] * nll[i, y] + 0.1 / CLASSES * (w * nll[i]).sum() for i, y in enumerate(labels))
    total, mass = losses.cross_entropy(logits, labels, 0.1, torch.tensor(WEIGHTS))
    assert float(total.detach()) == pytest.approx(float(want), rel=1e-6)
    assert float(mass) == pytest.approx(float(w[labels].sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_logits_is_taken_in_fp32(dtype):
    logits, labels = toy_rows(dtype)
    total, mass = losses.cross_entropy(logits, labels, 0.1)
    assert total.dtype == torch.float32 and float(mass) == ROWS
    assert torch.equal(total, losses.cross_entropy(logits.float(), labels, 0.1)[0])


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
    total, count = losses.lm_cross_entropy(hidden, lambda h: F.linear(h, head), targets, chunk)
    assert count == 11
    torch.testing.assert_close(total, want, rtol=1e-6, atol=0)
    for got, wanted in zip(torch.autograd.grad(total, [hidden, head]), want_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_lm_cross_entropy_never_holds_all_logits(monkeypatch):
    """Forward and backward see at most `chunk` rows of logits at a time, each chunk twice: it is recomputed."""
    seen = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda h, w: seen.append(len(h)) or linear(h, w))
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.randn(23, 8)
    losses.lm_cross_entropy(hidden, lambda h: F.linear(h, head), torch.zeros(10).long(), chunk=4)[0].backward()
    assert sorted(seen) == [2, 2, 4, 4, 4, 4]
