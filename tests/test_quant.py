"""nf4 and the optimizers of bitsandbytes on a CPU: what is quantized, the same numbers as its own dequantized weights,
about a quarter of fp16's memory, and whole runs that are saved, resumed, shared out and exported like any other.

The reference is the same classifier with plain linears that hold bitsandbytes' own dequantize_4bit of the weights.
"""

import gc
import json
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from test_ddp import finish, forked, forks, log_of, run_of, shas, start, toy_flags, write_rows
from test_resume import same, wait_for
from torch import nn

import checkpoint
import checks
import cli
import configs
import data
import files
import fused
import infer
import lora
import model as models
import numerics
import optim
import presets
import train
import trained
from errors import Untrusted, UserError
from packed import pack

bnb = pytest.importorskip("bitsandbytes")
pytestmark = forks
CPU = torch.device("cpu")
ROUNDING = 2e-6  # of the largest value: the products are the same fp32 ones, sums may come in another order
WORDS = ((5,), (7, 9), (11,))
SIZES = dict(
    vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=2,
)  # fmt: skip
QWEN = {
    f"model.layers.{i}.{name}_proj"
    for i in range(2)
    for name in (*(f"self_attn.{p}" for p in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
}
BERT = {
    f"bert.encoder.layer.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"attention.self.{p}" for p in ("query", "key", "value")),
        "attention.output.dense", "intermediate.dense", "output.dense",
    )
}  # fmt: skip
KINDS = {  # kind: (class that makes the base, changes of its config, linears to quantize, linears outside the layers)
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": False}, QWEN, {"score"}),
    "words": ("Qwen2ForCausalLM", {"tie_word_embeddings": False}, QWEN, {"lm_head"}),
    "tied words": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}, QWEN, {"lm_head"}),
    "bert": ("BertForSequenceClassification", {"num_labels": 3}, BERT, {"bert.pooler.dense", "classifier"}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(kind) -> a folder with a small random model of it, biases and norms away from their defaults."""
    made = {}

    def make(kind, stored=torch.float32, **changes):
        key = (kind, stored, *changes.items())
        if key not in made:
            torch.manual_seed(0)
            name, own, _, _ = KINDS[kind]
            config = getattr(transformers, name).config_class(**{**SIZES, **own, **changes})
            model = getattr(transformers, name)(config)
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim == 1:
                        p += 0.2 * torch.randn_like(p)
            made[key] = str(tmp_path_factory.mktemp("base"))
            model.to(stored).save_pretrained(made[key])
        return made[key]

    return make


def load(folder, kind="qwen2", quant="nf4", dtype=torch.float32, compute=torch.float32):
    words, pooling = WORDS if "words" in kind else (), "cls" if kind == "bert" else "last"
    head = models.Head(3, pooling, words=words)
    return models.load_classifier(folder, head, CPU, dtype, quant=quant, compute=compute, seed=3).eval()


def quantized(model) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def values_of(m) -> torch.Tensor:
    """What bitsandbytes itself makes of a quantized weight, in fp32."""
    m.weight.quant_state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)


def dequantized(folder, kind="qwen2"):
    """The reference: a fresh nf4 classifier whose linears become plain ones with bitsandbytes' own values."""
    model = load(folder, kind)
    for name, m in quantized(model).items():
        linear = nn.Linear(m.in_features, m.out_features, m.bias is not None)
        linear.weight, linear.bias = nn.Parameter(values_of(m)), m.bias
        model.set_submodule(name, linear)
    return model


def batch_of(lengths=(9, 1, 17, 4)):
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, 61, n).tolist() for n in lengths]
    return pack(data.join_tokens(rows), np.arange(len(rows)), CPU)


def near(got, want, share=ROUNDING):
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.detach().abs().max()))


def bytes_of(folder_or_model) -> dict[str, bytes]:
    return {n: m.weight.data.numpy().tobytes() for n, m in quantized(folder_or_model).items()}


# ---- what is quantized ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, compute", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_linears_of_the_layers_are_quantized(base, kind, dtype, compute):
    """Embeddings, norms and every head keep the base's values; the head is fp32, label words stay tied or untied."""
    folder, (_, _, inside, outside) = base(kind), KINDS[kind]
    model, plain = load(folder, kind, "nf4", dtype, compute), load(folder, kind, "none")
    found = quantized(model)
    assert found.keys() == inside
    for m in found.values():
        state = m.weight.quant_state
        assert (m.weight.quant_type, state.quant_type, state.nested, m.compute_dtype) == ("nf4", "nf4", True, compute)
        assert m.weight.dtype == torch.uint8 and not m.weight.requires_grad
        assert m.weight.numel() == m.in_features * m.out_features // 2
    assert {n for n, m in model.named_modules() if type(m) is nn.Linear} == outside
    values, left = dict(plain.named_parameters()), {}
    for name, p in model.named_parameters():
        if name.removesuffix(".weight") not in inside:
            left[name] = p
            want = torch.float32 if lora.within(name, model.heads) else dtype
            assert p.dtype == want and torch.equal(p, values[name].to(want)), name
    assert values.keys() - left.keys() == {f"{n}.weight" for n in inside}
    if "words" in kind:
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied words")


@pytest.mark.parametrize("width, inner", [(64, 128), (128, 192), (64, 96), (32, 64), (80, 160)])
@torch.no_grad()
def test_a_quantized_weight_is_near_its_own_but_not_it(base, width, inner):
    """The control of everything below. Where a row is no multiple of a block of 64 the linear stays as it is.

    (bitsandbytes' CPU kernel takes other blocks' scales there.) nf4's widest step is 0.304 of a block's largest value,
    so no weight is off by more than half of it, and the scales are themselves rounded to 8 bits.
    """
    folder = base("qwen2", hidden_size=width, intermediate_size=inner)
    model, plain = load(folder), load(folder, quant="none")
    found = quantized(model)
    assert found.keys() == {n for n in QWEN if plain.get_submodule(n).in_features % 64 == 0}
    for name in QWEN:
        weight = plain.get_submodule(name).weight
        if name not in found:
            assert torch.equal(model.get_submodule(name).weight, weight), name
            continue
        got, want = values_of(found[name]).reshape(-1, 64), weight.reshape(-1, 64)
        error = (got - want).abs().amax(1) / want.abs().amax(1)
        assert 0.01 < error.mean() and error.max() < 0.2, (name, error.max())


# ---- the same numbers as the dequantized weights --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_dequantized_weights(base, kind, mode):
    """On an fp32 base both sides multiply the same fp32 matrices, so only the order of sums may differ."""
    batch, plain = batch_of(), load(base(kind), kind, "none")
    model, reference = load(base(kind), kind), dequantized(base(kind), kind)
    for m in (model, reference):
        m.train(mode == "train")
        for dropout in (d for d in m.modules() if isinstance(d, nn.Dropout)):
            dropout.p = 0.0
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(model.config, name):
            for layer in (x for m in (model, reference) for x in m.modules() if hasattr(x, "attention_dropout")):
                layer.attention_dropout = 0.0
    with torch.no_grad():
        got, want, control = model(batch), reference(batch), plain(batch)
    near(got, want)
    assert float((want - control).abs().max()) > 1e-2 * float(control.abs().max())


def test_logits_on_a_base_stored_in_bf16(base):
    """The weights are dequantized in the dtype that products run in, not rounded to the stored one first."""
    folder = base("qwen2", torch.bfloat16)
    with torch.no_grad():
        near(load(folder)(batch_of()), dequantized(folder)(batch_of()))


@pytest.mark.parametrize("width, inner", [(64, 128), (64, 80), (192, 96)])
def test_training_and_evaluating_in_turn_changes_nothing(base, width, inner):
    """train -> eval -> train -> eval: the same logits, gradients and packed bytes each time, whatever the CPU.

    (On AVX512-BF16 bitsandbytes' own layer repacks its weights in eval mode, rounds to bf16 and has no gradient.)
    """
    folder = base("qwen2", hidden_size=width, intermediate_size=inner)
    model, reference = adapted(load(folder)), adapted(dequantized(folder))
    before, seen = bytes_of(model), []
    assert len(before) >= 12
    want, want_gradients = gradients(reference)
    for _ in range(2):
        logits, found = gradients(model)
        model.eval()
        with torch.no_grad():
            evaluated = model(batch_of())
        model.train()
        near(logits, want)
        near(evaluated, want)
        assert found.keys() == want_gradients.keys()
        for name, g in found.items():
            near(g, want_gradients[name], 1e-5)
        seen.append((logits, evaluated, found))
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert all(torch.equal(seen[0][2][n], seen[1][2][n]) for n in seen[0][2])
    assert bytes_of(model) == before


def adapted(model, bias="none", dropout=0.0, start=0.05):
    """With LoRA on every linear, its B moved away from zero by `start`."""
    torch.manual_seed(5)
    models.add_adapter(model, lora.Adapter(("all-linear",), 4, 12.0, dropout, bias, saved=("score",)))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".lora_B" in n:
                p += start * torch.randn_like(p)
    return model.train()


def gradients(model, seed=0):
    """Logits and every trained parameter's gradient of one backward pass."""
    torch.manual_seed(seed)
    with fused.plain():  # as nf4 runs: with dropout masks for every token of the last layer
        logits = model(batch_of())
    (logits * torch.tensor([1.0, -2.0, 0.5])).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return logits.detach(), found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
def test_gradients_equal_those_on_dequantized_weights(base, bias, checkpointing):
    """Of every adapter, trained bias and the head, dropout on; recomputed activations give the same ones."""
    model, reference = (adapted(m, bias, 0.2) for m in (load(base("qwen2")), dequantized(base("qwen2"))))
    if checkpointing:
        models.checkpoint_activations(model.backbone)
    (logits, found), (want_logits, want) = gradients(model), gradients(reference)
    near(logits, want_logits)
    assert found.keys() == want.keys() and len(found) == 2 * 14 + 1 + 6 * (bias == "all")
    for name, g in found.items():
        near(g, want[name], 1e-5)


def test_gradients_on_a_base_stored_in_bf16(base):
    """Backward multiplies by the weights of the forward pass, not by ones rounded to the stored dtype."""
    folder = base("qwen2", torch.bfloat16)
    (_, found), (_, want) = gradients(adapted(load(folder))), gradients(adapted(dequantized(folder)))
    for name, g in found.items():
        near(g, want[name], 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_update_moves_and_the_packed_base_does_not(base, checkpointing):
    """Three steps of AdamW from B = 0: losses those of the dequantized base, packed bytes and scales untouched."""
    losses = []
    for model in (load(base("qwen2")), dequantized(base("qwen2"))):
        adapted(model, start=0.0)
        if checkpointing:
            models.checkpoint_activations(model.backbone)
        before, mine = bytes_of(model), []
        scales = {n: m.weight.quant_state.absmax.clone() for n, m in quantized(model).items()}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        assert all(m.idle() for m in lora.adapters(model).values())
        for _ in range(3):
            loss = nn.functional.cross_entropy(model(batch_of()), torch.tensor([0, 1, 2, 1]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mine.append(loss.item())
        assert len(lora.adapters(model)) == 14 and not any(m.idle() for m in lora.adapters(model).values())
        assert bytes_of(model) == before
        assert all(torch.equal(m.weight.quant_state.absmax, scales[n]) for n, m in quantized(model).items())
        losses.append(mine)
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert losses[0][2] < losses[0][0]


def test_the_table_of_what_is_trained_counts_weights_not_bytes(base):
    tables = [lora.trainable_table(adapted(load(base("qwen2"), quant=quant))) for quant in ("nf4", "none")]
    assert tables[0] == tables[1]


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_frozen_linears_take_about_a_quarter_of_fp16(base, record_property):
    """4 bits a weight, a byte per 64 and 4 bytes per 64 * 256 of them, at a realistic width; nothing 16-bit is left."""
    folder = base("qwen2", torch.float16, hidden_size=512, intermediate_size=1536, num_hidden_layers=1)
    model = load(folder, dtype=torch.float16, compute=torch.float16)
    stored, weights = {}, 0
    for m in quantized(model).values():
        state = m.weight.quant_state
        for t in (m.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code):
            stored[t.data_ptr()] = t.numel() * t.element_size()
        weights += m.in_features * m.out_features
    ratio = sum(stored.values()) / (2 * weights)
    record_property("memory_ratio", ratio)
    assert weights == 512 * (512 + 256 + 256 + 512) + 512 * 1536 * 3 and 0.25 < ratio < 0.28, ratio
    gc.collect()
    shapes = {(m.out_features, m.in_features) for m in quantized(model).values()}
    whole = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and o.is_floating_point()]
    assert not [tuple(t.shape) for t in whole if tuple(t.shape) in shapes]


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory, small_base) -> str:
    """conftest's small base at a width that blocks of 64 weights divide."""
    folder = tmp_path_factory.mktemp("toy") / "base"
    shutil.copytree(small_base, folder)
    torch.manual_seed(1)
    config = transformers.Qwen2Config.from_pretrained(small_base, hidden_size=64, intermediate_size=128)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


NF4 = {"quant": "nf4", "targets": "all-linear"}
LONG = {**NF4, "batch_size": 6, "save_every": 3, "micro_batches": 2, "metric": "log_loss"}  # 20 steps


@pytest.fixture(scope="module")
def done(tmp_path_factory, toy) -> Path:
    """The toy run in nf4, on one rank, never interrupted."""
    folder = tmp_path_factory.mktemp("nf4")
    return Path(train.main(toy_flags(folder, toy, **LONG))["run"])


def rows_of(run: Path) -> list[dict[str, str]]:
    return files.read_rows(str(run.parents[3] / "val.csv"), "input")


def test_a_run_is_saved_reloaded_and_predicts_as_it_did(done, tmp_path):
    """The save holds the adapter and the head and nothing of the base; the logits are those of the training process."""
    keys = checkpoint.load_tensors(done / "best/adapter_model.safetensors").keys()
    names = {f"base_model.model.{n}.lora_{ab}.weight" for n in QWEN for ab in "AB"}
    assert keys == names | {"base_model.model.score.weight"}
    run = trained.load_run(done)
    assert quantized(run.model).keys() == {f"{n}.base_layer" for n in QWEN}
    logits, _ = run.logits(rows_of(done), 256)  # the token budget of training: the same micro-batches
    lines = (done / "val_predictions.csv").read_text().splitlines()[1:]
    assert [[float(x) for x in line.split(",")[-8:]] for line in lines] == logits.astype(float).tolist()
    out = tmp_path / "o.jsonl"
    result = infer.main(
        [f"--runs={done}", f"--input={done.parents[3] / 'val.csv'}", f"--output={out}", "--submission="]
    )
    predicted = [json.loads(line) for line in out.read_text().splitlines()]
    assert result["rows"] == len(predicted) == 23
    assert [p["prediction"] for p in predicted] == [line.split(",")[2] for line in lines]
    texts = [r["Question"] for r in rows_of(done)]
    assert [p["label"] for p in run.predict(texts)] == [p["prediction"] for p in predicted]


def test_the_same_adapter_on_two_ranks(done, tmp_path, toy):
    status, out, err = forked(train.main, toy_flags(tmp_path, toy, **LONG), tmp_path, ranks=2)
    assert status == 0, err
    assert log_of(run_of(out)) == log_of(done) and shas(run_of(out)) == shas(done)


def test_killed_and_resumed_is_the_run_that_was_not(done, tmp_path, toy):
    flags = [*toy_flags(tmp_path, toy, **LONG), "--resume", "auto"]
    (pid,) = start(train.main, flags, tmp_path)
    assert wait_for(tmp_path, 9, pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    status, out, err = forked(train.main, flags, tmp_path)
    assert status == 0 and "resumed at step" in out, err
    same(run_of(out), done)


def test_recomputed_activations_give_the_same_losses(done, tmp_path, toy):
    run = Path(train.main(toy_flags(tmp_path, toy, **LONG, grad_checkpoint="true"))["run"])
    losses = [[line["loss"] for line in log_of(r) if "loss" in line] for r in (run, done)]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(*losses, rtol=2e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_trains_fp32_masters_on_nf4(tmp_path, toy, precision):
    """Every update moves, is saved as fp32, and the reloaded run scores as it did."""
    run = Path(train.main(toy_flags(tmp_path, toy, **LONG, precision=precision))["run"])
    saved = checkpoint.load_tensors(run / "last/adapter_model.safetensors")
    assert all(t.dtype == torch.float32 and t.isfinite().all() and t.any() for t in saved.values())
    logits, _ = trained.load_run(run, precision=precision).logits(rows_of(run), 256)
    lines = (run / "val_predictions.csv").read_text().splitlines()[1:]
    assert [[float(x) for x in line.split(",")[-8:]] for line in lines] == logits.astype(float).tolist()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_trained_biases_stay_fp32_masters_in_half_precision(tmp_path, toy, precision):
    """As qwen32b trains them: nf4, bias all, products in half precision."""
    changes = {**NF4, "bias": "all", "precision": precision, "max_steps": 3, "eval_every": 3, "grad_checkpoint": "true"}
    run = Path(train.main(toy_flags(tmp_path, toy, **changes))["run"])
    saved = checkpoint.load_tensors(run / "last/adapter_model.safetensors")
    biases = {n: t for n, t in saved.items() if n.endswith(".bias")}
    started = load_state(toy)
    assert len(biases) == 6 and all(t.dtype == torch.float32 for t in biases.values())
    for name, t in biases.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        moved = t - started[plain]
        assert moved.abs().max() > 0
        assert not torch.equal(t, t.to(numerics.DTYPES[precision]).float()), f"{name} was rounded to {precision}"


def load_state(folder: str) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_forward_pass_leaves_trained_biases_as_they_are(base, precision):
    """Products may run in half precision; what is trained stays an fp32 master, bit for bit."""
    model = adapted(load(base("qwen2"), compute=numerics.DTYPES[precision]), "all")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("bias")}
    with numerics.autocast(CPU, precision):
        model(batch_of())
    for name, p in model.named_parameters():
        if name in before:
            assert p.dtype == torch.float32 and torch.equal(p, before[name]), name


def test_merge_is_refused_with_the_way_out(done, tmp_path, toy):
    with pytest.raises(UserError, match=r"is quantized.*--export DIR merges its 16-bit base"):
        infer.main([f"--runs={done}", f"--input={done.parents[3] / 'val.csv'}", "--merge=true"])
    given = [f"--base={toy}", f"--adapter={done / 'best'}", "--quant=nf4", "--merge=true"]
    with pytest.raises(UserError, match=r"--merge with --quant nf4: an adapter is never merged into 4-bit weights"):
        infer.main([*given, f"--input={done.parents[3] / 'val.csv'}"])
    with pytest.raises(ValueError, match="is quantized .*merge into the 16-bit base"):
        lora.merge(trained.load_run(done).model)


@pytest.mark.parametrize("way", ["run", "adapter"])
def test_export_merges_into_the_16_bit_base_and_tells_the_drift(done, tmp_path, toy, way, capsys):
    """The exported model is what peft makes of the unquantized base and this adapter; drift is how far that is off."""
    target, rows = tmp_path / "merged", rows_of(done)[:16]
    which = [f"--runs={done}"] if way == "run" else [f"--base={toy}", f"--adapter={done / 'best'}"]
    more = [] if way == "run" else ["--quant=nf4", "--max_length=64"]
    result = infer.main([*which, *more, f"--input={done.parents[3] / 'val.csv'}", f"--export={target}"])
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(toy, num_labels=8)
    merged = peft.PeftModel.from_pretrained(plain, str(done / "best")).merge_and_unload().eval()
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(target).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    with torch.no_grad():
        ids = [tokenizer(r["Question"], truncation=True, max_length=64, return_tensors="pt") for r in rows]
        got, want = (np.array([m(**i).logits[0].tolist() for i in ids]) for m in (exported, merged))
    np.testing.assert_allclose(got, want, atol=1e-5)
    live, _ = trained.load_run(done).logits(rows)
    assert result["rows"] == 16 and result["drift"] > 1e-3
    assert result["drift"] == pytest.approx(np.abs(got - live).max(), abs=1e-5)
    assert f"logits of 16 rows moved by at most {result['drift']:.2g}" in capsys.readouterr().out
    assert json.loads((target / "config.json").read_text()).get("quantization_config") is None


def test_a_run_can_be_read_unquantized_and_the_adapter_is_the_same(done):
    """quant="none" takes the 16-bit base; only the base's rounding lies between the two."""
    rows = rows_of(done)
    (nf4, _), (plain, _) = (trained.load_run(done, quant=q).logits(rows) for q in ("", "none"))
    assert 1e-3 < np.abs(nf4 - plain).max() < 0.2 * np.abs(plain).max()


@pytest.mark.parametrize("change", ["other weights", "one matrix by 1%"])
def test_a_swapped_base_is_refused_under_nf4(tmp_path, toy, change):
    """The fingerprint is of the weights before they are quantized: also what nf4 would round away is seen."""
    folder = tmp_path / "base"
    shutil.copytree(toy, folder)
    run = train.main(toy_flags(tmp_path, str(folder), **NF4, max_steps=2, eval_every=2))["run"]
    trained.load_run(run)
    tensors, generator = load_state(toy), torch.Generator().manual_seed(3)
    if change == "other weights":
        tensors = {n: torch.randn(t.shape, generator=generator) * 0.02 for n, t in tensors.items()}
    else:
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.01
    checkpoint.save_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(Untrusted, match="is not the one this run was trained on"):
        trained.load_run(run)
    os.remove(Path(run) / "result.json")
    with pytest.raises(Untrusted, match="is not the one this run was trained on"):
        train.main(["--resume", run])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_nf4_without_an_adapter_is_refused(tmp_path, toy):
    with pytest.raises(UserError, match="--quant nf4 with --rank 0: 4-bit weights cannot be trained"):
        train.main(toy_flags(tmp_path, toy, quant="nf4", rank=0, alpha=None, lora_dropout=None))
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("quant", ["none", "nf4"])
@pytest.mark.parametrize("method", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq"}])
def test_a_base_that_is_stored_quantized_is_refused(tmp_path, toy, quant, method):
    folder = tmp_path / "base"
    shutil.copytree(toy, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": method}))
    words = r"is stored quantized: give the 16-bit base it was made from, with --quant nf4"
    with pytest.raises(UserError, match=words):
        train.main(toy_flags(tmp_path, str(folder), quant=quant))
    rows = write_rows(tmp_path / "new.csv", 8)
    with pytest.raises(UserError, match=words):
        infer.main([f"--base={folder}", "--label_names=a,b", f"--input={rows}", f"--quant={quant}"])
    assert not (tmp_path / "outputs").exists()


def without_bitsandbytes() -> None:
    """As where it is not installed: every import of it fails."""
    sys.modules["bitsandbytes"] = None


@pytest.mark.parametrize(
    "changes", [{"quant": "nf4"}, {"optimizer": "adamw8bit"}, {"optimizer": "paged_adamw"}], ids=str
)
def test_missing_bitsandbytes_is_one_line_with_what_to_do(tmp_path, toy, changes):
    pids = start(train.main, toy_flags(tmp_path, toy, **changes), tmp_path, before=without_bitsandbytes)
    status, out, err = finish(pids, tmp_path)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert "needs bitsandbytes: pip install bitsandbytes" in err and f"--{next(iter(changes))}" in err
    assert not (tmp_path / "outputs").exists()


def test_nothing_else_needs_bitsandbytes(tmp_path, toy):
    flags = toy_flags(tmp_path, toy, max_steps=2, eval_every=2)
    status, out, err = finish(start(train.main, flags, tmp_path, before=without_bitsandbytes), tmp_path)
    assert status == 0, err


def test_qwen32b_is_a_valid_preset():
    cfg = replace(presets.qwen32b(), train_data="x.csv")
    checks.check(cfg)
    assert (cfg.quant, cfg.base, cfg.bias) == ("nf4", "Qwen/Qwen2.5-32B", "all")
    cfg, given = cli.parse(configs.TrainConfig, presets.TRAIN_PRESETS, ["--cfg", "qwen32b", "--train_data", "x.csv"])
    checks.check(cfg, given)


# ---- optimizers -----------------------------------------------------------------------------------------------------

KIND = ("adamw8bit", "paged_adamw", "paged_adamw8bit")
WIDE = {"rank": 64, "alpha": 48, "epochs": 1, "batch_size": 6, "save_every": 3, "eval_every": 5, "metric": "log_loss"}


@pytest.mark.parametrize("kind", KIND)
def test_optimizers_train_and_resume_to_the_bit(tmp_path, toy, kind):
    """From main, killed and resumed; the state of tensors from 4,096 values on is uint8 in the 8-bit ones."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    status, out, err = forked(train.main, toy_flags(tmp_path / "a", toy, optimizer=kind, **WIDE), tmp_path / "a")
    assert status == 0, err
    whole, note = run_of(out), f"{kind}: paging exists on GPUs only"
    assert (note in out) == kind.startswith("paged")
    steps = [line["loss"] for line in log_of(whole) if "loss" in line]
    assert len(steps) == len(set(steps)) == 10 and np.isfinite(steps).all()
    state = checkpoint.load_tensors(whole / "last/state.safetensors")
    moments = {n: t for n, t in state.items() if ".state" in n}
    large = {n for n, t in moments.items() if t.numel() >= 4096}
    assert large and len(large) < len(moments)
    for name, t in moments.items():
        assert t.dtype == (torch.uint8 if "8bit" in kind and name in large else torch.float32), name
    assert {n.split(".")[2] for n in state} == {"step", "state1", "state2"} | (
        {"absmax1", "absmax2"} if "8bit" in kind else set()
    )
    flags = [*toy_flags(tmp_path / "b", toy, optimizer=kind, **WIDE), "--resume", "auto"]
    (pid,) = start(train.main, flags, tmp_path / "b")
    assert wait_for(tmp_path / "b", 5, pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    status, out, err = forked(train.main, flags, tmp_path / "b")
    assert status == 0 and "resumed at step" in out, err
    same(run_of(out), whole)
    assert shas(run_of(out))["last"] == shas(whole)["last"]


def parameters(width=64):
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(width, s, generator=generator)) for s in (64, 3)] + [
        nn.Parameter(torch.randn(width, generator=generator))
    ]


def stepped(kind, params, steps=5):
    """The optimizer of `kind` after a few steps on given gradients, two groups, weight decay in one."""
    groups = [{"params": params[:2], "lr": 0.01, "weight_decay": 0.1}, {"params": params[2:], "lr": 0.03}]
    groups[1]["weight_decay"] = 0.0
    optimizer, generator = optim.adamw(groups, kind), torch.Generator().manual_seed(2)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return optimizer


def test_paged_adamw_is_torchs_to_rounding_and_8_bits_are_near():
    want, found = parameters(), {}
    stepped("adamw", want, 20)
    for kind in KIND:
        found[kind] = parameters()
        stepped(kind, found[kind], 20)
    for got, expected, start_at in zip(found["paged_adamw"], want, parameters(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
        assert (expected - start_at).abs().max() > 0.02
    for kind in ("adamw8bit", "paged_adamw8bit"):
        assert all(torch.equal(a, b) for a, b in zip(found[kind], found["adamw8bit"], strict=True))
        moved = (want[0] - parameters()[0]).abs().mean()
        assert 0 < (found[kind][0] - want[0]).abs().mean() < 0.1 * moved
        torch.testing.assert_close(found[kind][1], want[1], rtol=0, atol=2e-6)  # small: fp32 state


@pytest.mark.parametrize("kind", ("adamw", *KIND))
def test_state_goes_round_and_goes_on_bit_for_bit(kind, tmp_path):
    one, two = parameters(), parameters()
    optimizer = stepped(kind, one)
    checkpoint.save_tensors(tmp_path / "s.safetensors", checkpoint.optimizer_tensors(optimizer))
    with torch.no_grad():
        for a, b in zip(two, one, strict=True):
            a.copy_(b)
    fresh = stepped(kind, two, 0)
    checkpoint.load_optimizer_tensors(fresh, checkpoint.load_tensors(tmp_path / "s.safetensors"))
    saved, loaded = checkpoint.optimizer_tensors(optimizer), checkpoint.optimizer_tensors(fresh)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[k], loaded[k]) for k in saved)
    assert all(saved[k].dtype == loaded[k].dtype for k in saved)
    for o, params in ((optimizer, one), (fresh, two)):
        for p in params:
            p.grad = torch.ones_like(p)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", ("adamw", *KIND))
def test_state_of_other_shapes_is_refused(kind):
    tensors = checkpoint.optimizer_tensors(stepped(kind, parameters(65)))
    with pytest.raises(Untrusted, match=r"optimizer state 0\.0\.\* has shapes {.*}, expected {"):
        checkpoint.load_optimizer_tensors(stepped(kind, parameters(64), 0), tensors)


@pytest.mark.parametrize("saved, now", [(a, b) for a in ("adamw", *KIND) for b in ("adamw", *KIND) if a[-8:] != b[-8:]])
def test_state_of_another_optimizer_is_refused(saved, now):
    tensors = checkpoint.optimizer_tensors(stepped(saved, parameters()))
    if {saved, now} == {"adamw8bit", "paged_adamw8bit"}:
        pytest.skip("the same state")
    with pytest.raises(Untrusted, match="optimizer state"):
        checkpoint.load_optimizer_tensors(stepped(now, parameters(), 0), tensors)


@pytest.mark.parametrize(
    "wrong, right", [("adamw8bits", "adamw8bit"), ("paged_adam", "paged_adamw"), ("adam", "adamw")]
)
def test_an_unknown_optimizer_is_refused_with_the_nearest(tmp_path, toy, wrong, right):
    with pytest.raises(UserError, match=re.escape(f"--optimizer {wrong}: expected one of adamw, ")) as e:
        train.main(toy_flags(tmp_path, toy, optimizer=wrong))
    assert f"(did you mean {right}?)" in str(e.value)
