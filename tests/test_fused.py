"""fused.py against its plain twin, transformers' own forward of a layer: values, gradients, fallbacks."""

import sys
from functools import partial

import numpy as np
import pytest
import torch
from test_model import CPU, ROUNDING, base, batch_of, rows  # noqa: F401

import bases
import fused
import lora
import model as models
import numerics
import products
from dropout import LEVELS, Dropout, keep_mask

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapted(folder: str, targets, dropout: float = 0.0, pooling: str = "mean", bias: str = "none"):
    """A classifier in training whose adapter, if it has one, has moved."""
    model = models.load_classifier(folder, models.Head(3, pooling), CPU, torch.float32)
    if targets:
        torch.manual_seed(1)
        models.add_adapter(model, lora.Adapter(targets, 4, 8.0, dropout, bias, saved=("score",)))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
    return model.train()


def run(model, precision: str = "fp32"):
    """Logits, and every gradient, of one micro-batch; dropout from one seed."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    with numerics.autocast(CPU, precision):
        logits = model(batch_of(rows()))
    logits.square().sum().backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def differences(ours: dict, theirs: dict) -> dict[str, float]:
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name] - want).abs().max() / want.abs().max()) for name, want in theirs.items()}


def calls(monkeypatch) -> list:
    """Notes each layer that runs fused."""
    seen, project = [], fused.project
    monkeypatch.setattr(fused, "project", lambda *args: (seen.append(1), project(*args))[1])
    return seen


def equal_masks(monkeypatch) -> None:
    """Inputs of one shape are dropped alike: fused products of one input share a mask, plain ones draw their own."""

    def mask(x, p):
        return (torch.rand(x.shape, generator=torch.Generator().manual_seed(x.shape[-1])) >= p).to(torch.uint8)

    for module in (products, sys.modules["dropout"]):
        monkeypatch.setattr(module, "keep_mask", mask)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", [QKVO, ("all-linear",), ("k_proj", "down_proj")], ids="qkvo all two".split())
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients_are_those_of_the_plain_layer(base, family, targets, dropout, monkeypatch):  # noqa: F811
    """With the same masks. 20 times the rounding of a sum: gradients pass two layers."""
    equal_masks(monkeypatch)
    model = adapted(base(family), targets, dropout)
    seen = calls(monkeypatch)
    ours = run(model)
    assert len(seen) == 2
    with fused.plain():
        theirs = run(model)
    assert len(seen) == 2 and max(differences(ours, theirs).values()) < 20 * ROUNDING
    if dropout:
        model.eval()
        assert max(differences(ours, run(model)).values()) > 0.01, "dropout did nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_only_pooled_tokens_pass_the_last_mlp(base, family):  # noqa: F811
    """Logits and gradients as when all do."""
    model = adapted(base(family), ("all-linear",), pooling="last")
    ours = run(model)
    with fused.plain():
        assert max(differences(ours, run(model)).values()) < 20 * ROUNDING
    sizes = []
    model.backbone.norm.register_forward_hook(lambda module, inputs, out: sizes.append(out.shape[1]))
    assert run(model) and sizes == [len(rows())]


@pytest.mark.parametrize("targets", [QKVO, ("q_proj", "v_proj")], ids="qkvo qv".split())
def test_half_precision_is_as_near_to_fp32_as_the_plain_layer(base, targets):  # noqa: F811
    """Nearly: the gradients of q, k and v are summed in bf16 here, which rounds three times more."""
    model = adapted(base("Llama"), targets)
    exact = run(model)
    ours = differences(run(model, "bf16"), exact)
    with fused.plain():
        theirs = differences(run(model, "bf16"), exact)
    mean = lambda values: np.mean(list(values.values()))  # noqa: E731
    assert 1e-4 < mean(ours) < 1.5 * mean(theirs)


def test_updates_of_one_input_share_a_mask(base, monkeypatch):  # noqa: F811
    """Four masks in a layer: of q, k and v; of the output; of gate and up; of the product of both."""
    model = adapted(base("Llama"), ("all-linear",), dropout=0.3)
    draws, draw = [], products.keep_mask
    monkeypatch.setattr(products, "keep_mask", lambda *args: (draws.append(1), draw(*args))[1])
    run(model)
    assert len(draws) == 2 * 4


def test_recomputed_activations_give_the_same_gradients(base):  # noqa: F811
    """To the bit, with dropout: the masks are drawn again from the same state."""
    model = adapted(base("Qwen2"), QKVO, dropout=0.3)
    want = run(model)
    models.checkpoint_activations(model.backbone)
    got = run(model)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_scoring_gives_what_training_gives(base):  # noqa: F811
    model = adapted(base("Qwen3"), QKVO).eval()
    want = run(model)["logits"]
    with torch.no_grad():
        assert torch.equal(model(batch_of(rows())), want)


def hook_a_part(model):
    model.backbone.layers[0].self_attn.q_proj.register_forward_hook(lambda *args: None)


def hook_a_base(model):
    model.backbone.layers[1].self_attn.o_proj.base_layer.register_forward_hook(lambda *args: None)


FALLBACKS = {
    "a hook on an adapted linear": hook_a_part,
    "a hook on its base": hook_a_base,
    "a hook on an MLP": lambda model: model.backbone.layers[1].mlp.register_forward_hook(lambda *args: None),
    "a trained norm": lambda model: model.backbone.layers[0].input_layernorm.requires_grad_(),
    "a trained matrix": lambda model: model.backbone.layers[1].mlp.up_proj.requires_grad_(),
}


@pytest.mark.parametrize("change", FALLBACKS.values(), ids=FALLBACKS)
def test_where_it_does_not_apply_a_layer_runs_its_own_forward(base, change, monkeypatch):  # noqa: F811
    model = adapted(base("Qwen2"), QKVO)
    change(model)
    seen = calls(monkeypatch)
    ours = run(model)
    assert len(seen) == 1, "one of two layers falls back"
    with fused.plain():
        assert max(differences(ours, run(model)).values()) < 20 * ROUNDING


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_get_their_gradients(base, bias, monkeypatch):  # noqa: F811
    equal_masks(monkeypatch)
    model = adapted(base("Qwen2"), QKVO, dropout=0.3, bias=bias)
    seen = calls(monkeypatch)
    ours = run(model)
    assert sum(name.endswith("bias") for name in ours) == 6 and len(seen) == 2
    with fused.plain():
        assert max(differences(ours, run(model)).values()) < 20 * ROUNDING


def test_whole_bases_are_scored_alike_before_and_after_a_save(base, monkeypatch):  # noqa: F811
    """Trained weights keep the plain layers in training alone."""
    model = adapted(base("Qwen2"), ())
    seen = calls(monkeypatch)
    assert run(model) and not seen
    with torch.no_grad():
        model(batch_of(rows()))
    assert len(seen) == 2


def test_a_merged_or_disabled_adapter_is_seen(base):  # noqa: F811
    model = adapted(base("Llama"), ("all-linear",)).eval()
    batch = batch_of(rows())
    live = model(batch)
    with lora.disable(model):
        plain_base = model(batch)
        with fused.plain():
            torch.testing.assert_close(plain_base, model(batch), rtol=0, atol=1e-5)
    assert (live - plain_base).abs().max() > 0.01
    lora.merge(model)
    torch.testing.assert_close(model(batch), live, rtol=0, atol=1e-5)


def test_other_families_keep_their_own_layers(base):  # noqa: F811
    for family in ("Gemma3Text", "Phi3", "Bert"):
        model = models.load_classifier(
            base(family), models.Head(3, models.stored_pooling(base(family))), CPU, torch.float32
        )
        assert not any(map(fused.installed, bases.decoder_layers(model.backbone)))


# ---- dropout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.999])
def test_masks_drop_as_often_as_they_should(p):
    """Within 5 standard errors over 1,000,003 elements; equal for equal seeds; independent of their neighbours."""
    draw = partial(keep_mask, torch.empty(1_000_003), p)
    torch.manual_seed(5)
    mask, other = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(mask, draw()) and mask.dtype == torch.uint8
    error = np.sqrt(p * (1 - p) / len(mask)) + 1 / LEVELS
    for values, share in ((mask, 1 - p), (mask[1:] * mask[:-1], (1 - p) ** 2), (mask * other, (1 - p) ** 2)):
        assert abs(values.double().mean() - share) < 5 * error


def test_dropout_keeps_the_mean_and_is_off_in_evaluation():
    dropout, x = Dropout(0.1), torch.ones(500, 500, requires_grad=True)
    torch.manual_seed(0)
    out = dropout(x)
    out.sum().backward()
    assert abs(float(out.detach().mean()) - 1) < 0.005 and torch.equal(x.grad, out.detach())
    assert len(out.unique()) == 2 and torch.equal(dropout.eval()(x), x)
    assert not Dropout(1.0)(x).any()
