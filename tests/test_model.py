"""model.py against transformers' own models: packed == padded == alone for every family, pooling, heads, precision.

A micro-batch is one packed row. The reference is always stock attention on each sequence alone, or right-padded with an
attention mask. Tolerances are shares of the reference's largest value.
"""

import itertools
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import bases
import configs
import data
import ddp
import estimates
import labelling
import language
import lora
import model as models
import numerics
import peft_format
import trained
from errors import UserError
from packed import Batch, pack, packed_attention

CPU = torch.device("cpu")
ROUNDING = 2e-6  # of the largest value: fp32 sums in another order
LENGTHS = (9, 1, 17, 4)  # longer and shorter than the windows
SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "Qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "Qwen3": dict(head_dim=12),
    "Llama": dict(),
    "Mistral": dict(sliding_window=6, head_dim=8),
    "Gemma3Text": dict(sliding_window=5, head_dim=8, layer_types=["sliding_attention", "full_attention"]),
    "Phi3": dict(sliding_window=7),
}
ENCODERS = {
    "Bert": dict(max_position_embeddings=40),
    "Roberta": dict(max_position_embeddings=40, pad_token_id=1),
    "XLMRoberta": dict(max_position_embeddings=40, pad_token_id=1),
    "DistilBert": dict(max_position_embeddings=40),
    "ModernBert": dict(local_attention=6, global_attn_every_n_layers=2, num_hidden_layers=3),
    "DebertaV2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_buckets=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family) -> a folder with a small random model of it, biases and norms away from their defaults."""
    made = {}

    def make(family, **changes):
        key = (family, *changes.items())
        if key not in made:
            torch.manual_seed(0)
            sizes = {**SIZES, **{**FAMILIES, **ENCODERS}.get(family, {}), **changes}
            model = getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**sizes))
            with torch.no_grad():
                for p in model.parameters():
                    if p.ndim == 1:
                        p += 0.2 * torch.randn_like(p)
            made[key] = str(tmp_path_factory.mktemp(family))
            model.save_pretrained(made[key])
        return made[key]

    return make


def backbone(folder):
    """The base of our classifier, which attends to packed rows where its family can."""
    return models.load_classifier(folder, models.Head(3), CPU, torch.float32).backbone.eval()


def stock(folder, auto=transformers.AutoModel, **options):
    """transformers' own model with its default attention: sdpa, and for DeBERTa the only one it has."""
    return auto.from_pretrained(folder, **options).eval()


def rows(lengths=LENGTHS, low=3, seed=0):
    """Token ids of each sequence, none of them special."""
    generator = np.random.default_rng(seed)
    return [generator.integers(low, 61, n).tolist() for n in lengths]


def batch_of(sequences):
    return pack(data.join_tokens(sequences), np.arange(len(sequences)), CPU)


def pad(sequences, value=0):
    """Right-padded ids (B, L) and their mask."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [value] * (longest - len(s)) for s in sequences])
    return ids, torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])


def near(got, want, share=ROUNDING):
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.detach().abs().max()))


def classifier(folder, pooling="last", classes=3, dtype=torch.float32, targets=(), bias="none", dropout=0.0):
    model = models.load_classifier(folder, models.Head(classes, pooling), CPU, dtype, seed=1).eval()
    if targets:
        saved = models.head_to_save(model)
        models.add_adapter(model, lora.Adapter(tuple(targets), 4, 6.0, dropout, bias, saved=saved))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn_like(p)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# packed == padded == alone


def stock_hidden(model, sequences, how):
    """Hidden states (T, D) of each sequence by stock attention."""
    if how == "alone":
        return torch.cat([model(input_ids=torch.tensor([s])).last_hidden_state[0] for s in sequences])
    ids, mask = pad(sequences)
    return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]


@pytest.mark.parametrize("how", ["alone", "padded"])
@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_packed_equals_stock_in_states_and_gradients(base, family, how):
    """Of every parameter. DeBERTa does not take our attention and runs right-padded inside, with the same result."""
    folder, sequences = base(family), rows()
    ours, theirs = backbone(folder), stock(folder)
    packs = ours.config._attn_implementation == models.ATTENTION
    assert packs == models.family_of(ours.config).packs == (family != "DebertaV2")
    got, want = models.hidden_states(ours, batch_of(sequences)), stock_hidden(theirs, sequences, how)
    near(got, want)
    direction = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    for hidden in (got, want):
        (hidden * direction).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert gradients.keys() == {n for n, p in ours.named_parameters() if p.grad is not None}
    for name, p in ours.named_parameters():
        if p.grad is not None:
            nothing = re.search(r"(k_proj|key|key_proj|k_lin)\.bias$", name)  # all but cancels in the softmax
            scale = largest if nothing else float(gradients[name].abs().max())
            torch.testing.assert_close(p.grad, gradients[name], rtol=0, atol=ROUNDING * scale, msg=name)


def test_every_family_of_the_table_is_tested_here():
    """A new row of models.FAMILIES needs its class in FAMILIES or ENCODERS above, with a config that is not trivial."""
    decoders = {name for name, row in models.FAMILIES.items() if not row.encoder}
    encoders = models.FAMILIES.keys() - decoders
    for tested, known in ((FAMILIES, decoders), (ENCODERS, encoders)):
        assert {getattr(transformers, f"{family}Config").model_type for family in tested} == known


@pytest.mark.parametrize("family", FAMILIES)
def test_contaminated_control(base, family):
    """Stock attention on the packed row with an all-ones mask leaks: the tests above can fail."""
    batch = batch_of(rows())
    theirs, ours = stock(base(family)), backbone(base(family))
    with torch.no_grad():
        leaky = theirs(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            attention_mask=torch.ones(1, len(batch.input_ids), dtype=torch.int64),
        ).last_hidden_state[0]
        clean = models.hidden_states(ours, batch)
    near(clean[: LENGTHS[0]], leaky[: LENGTHS[0]])  # the first sequence sees nothing but itself
    assert (clean - leaky).abs().max() > 1e-2


def test_what_follows_or_stands_beside_a_sequence_does_not_reach_it(base):
    """Bit for bit on a CPU: the same row in two different packs."""
    model = backbone(base("Gemma3Text"))
    row, *others = rows()
    with torch.no_grad():
        first = models.hidden_states(model, batch_of([row, *others]))[: len(row)]
        last = models.hidden_states(model, batch_of([others[1], row]))[-len(row) :]
    near(last, first)


# ---------------------------------------------------------------------------------------------------------------------
# the attention function


class Causal(nn.Module):
    is_causal = True


def heads(lengths, query_heads=4, key_heads=2, width=8):
    torch.manual_seed(0)
    shape = (1, query_heads, sum(lengths), width), (1, key_heads, sum(lengths), width)
    parts = [torch.randn(s, requires_grad=True) for s in (shape[0], shape[1], shape[1])]
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return parts, Batch(tuple(lengths), positions, positions, cu)


def naive_attention(query, key, value, lengths, window, causal, scale):
    """Softmax attention over the whole row with the rule written out as a matrix of who sees whom."""
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    i, j = torch.arange(sum(lengths))[:, None], torch.arange(sum(lengths))[None, :]
    sees = which[:, None] == which[None, :]
    if causal:
        sees = sees & (j <= i) & ((i - j < window) if window else True)
    elif window:
        sees = sees & ((i - j).abs() < window)
    repeat = query.shape[1] // key.shape[1]
    key, value = (t[:, torch.arange(query.shape[1]) // repeat] for t in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~sees, -float("inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)  # (1, T, H, d)


@pytest.mark.parametrize("window", [None, 1, 3, 30])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention_equals_its_definition(causal, window):
    (q, k, v), packed = heads(LENGTHS)
    got, _ = packed_attention(Causal(), q, k, v, scaling=0.3, sliding_window=window, packed=packed, is_causal=causal)
    near(got, naive_attention(q, k, v, LENGTHS, window, causal, 0.3))


def test_attention_refuses_what_it_cannot_do():
    (q, k, v), packed = heads(LENGTHS)
    with pytest.raises(AssertionError, match="Causal got no batch"):
        packed_attention(Causal(), q, k, v)
    with pytest.raises(ValueError, match="softcap"):
        packed_attention(Causal(), q, k, v, packed=packed, softcap=30.0)


LIFTED = """
import sys

sys.path.insert(0, sys.argv[1])
import numpy as np
import torch
from packed import pack, packed_attention


class Tokens:
    ids = np.arange(100, 131)
    starts = np.array([0, 9, 10, 27])
    stops = np.array([9, 10, 27, 31])
    lengths = stops - starts
    learned = np.arange(31) % 3 > 0

    def row(self, i):
        return self.ids[self.starts[i] : self.stops[i]]


class Layer(torch.nn.Module):
    is_causal = True

    def forward(self, batch):
        table = torch.nn.functional.one_hot(batch.input_ids - 100, 31).float()
        query, key, value = ((table @ w).view(1, -1, h, 8).transpose(1, 2) for w, h in weights)
        return packed_attention(self, query, key, value, packed=batch, sliding_window=window)[0][0]


torch.manual_seed(0)
weights = [(torch.randn(31, 32), 4), (torch.randn(31, 16), 2), (torch.randn(31, 16), 2)]
tokens = Tokens()
for window in (None, 5):
    whole = Layer()(pack(tokens, np.array([2, 0, 3, 1]), "cpu"))
    alone = torch.cat([Layer()(pack(tokens, np.array([i]), "cpu")) for i in (2, 0, 3, 1)])
    assert whole.shape == (31, 4, 8) and torch.allclose(whole, alone, rtol=0, atol=1e-6)
batch = pack(tokens, np.array([3, 0]), "cpu", predict=True)
assert batch.lengths == (4, 9) and batch.cu_seqlens.tolist() == [0, 4, 13]
assert batch.targets.tolist() == [1, 2, 5, 6, 8, 9, 11, 12]
here = {name for name, m in sys.modules.items() if (getattr(m, "__file__", None) or "").startswith(sys.argv[1])}
print(sorted(here), len({"transformers", "errors", "data"} & set(sys.modules)))
"""


def test_packed_attention_can_be_lifted(tmp_path):
    """packed.py alone in a folder, with torch and numpy: packs, and attends packed as alone. At most 160 lines."""
    source = (Path(models.__file__).parent / "packed.py").read_text(encoding="utf-8")
    (tmp_path / "packed.py").write_text(source, encoding="utf-8")
    command = [sys.executable, "-I", "-c", LIFTED, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "['packed'] 0"), done.stderr
    assert len(source.splitlines()) <= 160


# ---------------------------------------------------------------------------------------------------------------------
# pooling and heads


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_classifiers(base, family, tmp_path):
    """On padded rows without special tokens, where theirs is right; read from the whole-model save that ours writes."""
    ours, sequences = classifier(base(family)), rows()
    names = ("x", "y", "z")
    trained.write_classifier(tmp_path, ours, Tokenizer(), labelling.Labels(names, names))
    theirs = stock(tmp_path, transformers.AutoModelForSequenceClassification)
    ids, mask = pad(sequences)
    with torch.no_grad():
        near(ours(batch_of(sequences)), theirs(input_ids=ids, attention_mask=mask).logits)
    assert type(theirs).__name__ == f"{family}ForSequenceClassification"
    assert theirs.config.id2label == dict(enumerate(names))


class Tokenizer:
    eos_token_id, pad_token_id = 2, 0
    backend_tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())

    def save_pretrained(self, folder):
        """Nothing: these tests make their ids themselves."""


def test_pooling_by_position_where_pad_is_eos(base):
    """transformers#35352: it takes the rightmost token that is not pad, so with pad == eos the row ending in EOS is
    pooled one token early, even without padding."""
    folder = base("Llama", pad_token_id=2)
    ours, theirs = classifier(folder), stock(folder, transformers.AutoModelForSequenceClassification, num_labels=3)
    theirs.score.weight.data = ours.score.weight.data
    plain, ended = rows((6, 6))
    ended[-1] = 2
    with torch.no_grad():
        at_end = theirs.score(theirs.model(input_ids=torch.tensor([ended])).last_hidden_state[0])
        wrong = theirs(input_ids=torch.tensor([ended])).logits[0]
        got = ours(batch_of([plain, ended]))[1]
    near(got, at_end[-1])
    near(wrong, at_end[-2])
    assert (got - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("pooling", models.POOLINGS)
def test_pooling_by_hand(pooling):
    hidden = torch.randn(sum(LENGTHS), 5, generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32)
    pool = models.POOLINGS[pooling]
    if pooling == "attention":
        pool = pool(5)
        pool.query.weight.data = torch.tensor([[0.3, -1.0, 2.0, 0.0, 900.0]])  # exp alone would overflow
    rules = {
        "last": lambda h: h[-1],
        "mean": lambda h: h.mean(0),
        "cls": lambda h: h[0],
        "attention": lambda h: (h @ pool.query.weight[0]).softmax(0) @ h,
    }
    want = torch.stack([rules[pooling](part) for part in hidden.split(LENGTHS)])
    near(pool(hidden, cu), want)


# ---------------------------------------------------------------------------------------------------------------------
# attention pooling, and any module that is new in a head


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3Text", "Bert", "ModernBert", "DebertaV2"])
def test_attention_pooling_packed_equals_padded_equals_alone(base, family):
    """Values and the gradient of its query, against the definition on transformers' own states."""
    folder, sequences = base(family), rows()
    ours, theirs = classifier(folder, "attention"), stock(folder)
    query = ours.attention_pooling.query.weight
    with torch.no_grad():
        query.normal_(generator=torch.Generator().manual_seed(5))
    direction = torch.randn(len(sequences), 3, generator=torch.Generator().manual_seed(6))

    def gradient(logits):
        return torch.autograd.grad((logits * direction).sum(), query)[0]

    got = ours(batch_of(sequences))
    near(torch.cat([ours(batch_of([s])) for s in sequences]), got, 2 * ROUNDING)
    for how in ("alone", "padded"):
        states = stock_hidden(theirs, sequences, how).split([len(s) for s in sequences])
        pooled = torch.stack([(h @ query[0]).softmax(0) @ h for h in states])
        want = ours.family.head(ours, pooled)
        near(got, want, 2 * ROUNDING)
        near(gradient(got if how == "alone" else ours(batch_of(sequences))), gradient(want), 2e-5)
    assert got.std(0).min() > 1e-3 and gradient(ours(batch_of(sequences))).abs().min() > 0


def test_attention_pooling_is_a_head_that_is_drawn_trained_and_saved_but_never_adapted(base):
    """By all-linear or by its name; the other tensors of the head are drawn as with every pooling."""
    query = "attention_pooling.query.weight"
    for targets in (("all-linear",), ("q_proj", "query")):
        model = models.load_classifier(base("Qwen2"), models.Head(3, "attention"), CPU, torch.float32, seed=4)
        assert model.fresh == ("score.weight", query) and query not in model.base_fingerprint["weights"]
        plain = models.load_classifier(base("Qwen2"), models.Head(3), CPU, torch.float32, seed=4)
        again = models.load_classifier(base("Qwen2"), models.Head(3, "attention"), CPU, torch.float32, seed=4)
        assert torch.equal(plain.score.weight, model.score.weight)
        assert torch.equal(again.get_parameter(query), model.get_parameter(query))
        assert 0.01 < float(model.get_parameter(query).detach().std()) < 0.03
        saved = models.head_to_save(model)
        assert saved == ("score", "attention_pooling")
        with pytest.raises(ValueError, match="targets .* leave no module to adapt"):
            lora.inject(model, lora.Adapter(("query",), 4, 6.0, saved=saved))
        models.add_adapter(model, lora.Adapter(targets, 4, 6.0, saved=saved))
        assert not [n for n in lora.adapters(model) if "pooling" in n]
        trained_heads = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
        assert trained_heads == {"score.weight", query}
    models.train_layers(plain := classifier(base("Qwen2"), "attention"), 0)
    assert {n for n, p in plain.named_parameters() if p.requires_grad} == {"score.weight", query}


class Gated(nn.Module):
    """A pooling of a fork's own: a norm, a linear with a bias, and the first state gated by them."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, hidden, cu_seqlens):
        first = models.first(hidden, cu_seqlens)
        return first * self.gate(self.norm(first)).sigmoid()


class Forgotten(nn.Module):
    """One that does not say how it is drawn."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(width))


def test_a_new_module_in_a_head_needs_nothing_but_its_row(base, monkeypatch):
    """Drawn from the seed, saved whole; no adapter on weights that no base holds, even where nothing else is saved."""
    monkeypatch.setitem(models.POOLINGS, "gated", Gated)
    names = {f"gated_pooling.{n}" for n in ("norm.weight", "norm.bias", "gate.weight", "gate.bias")}
    states = []
    for before in (1, 2):
        torch.manual_seed(before)
        model = models.load_classifier(base("Qwen2"), models.Head(3, "gated"), CPU, torch.bfloat16, seed=9)
        assert set(model.fresh) == names | {"score.weight"} and models.head_to_save(model)[1] == "gated_pooling"
        assert {model.get_parameter(n).dtype for n in names} == {torch.float32}
        states.append({n: p for n, p in model.named_parameters() if n in names})
    assert all(torch.equal(p, states[1][n]) for n, p in states[0].items())
    assert lora.find_targets(model, lora.Adapter(("gate", "q_proj"), 4, 6.0)) == [
        f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)
    ]
    monkeypatch.setitem(models.POOLINGS, "forgotten", Forgotten)
    with pytest.raises(AssertionError, match=r"forgotten_pooling: .*reset_parameters.* scale"):
        models.load_classifier(base("Qwen2"), models.Head(3, "forgotten"), CPU, torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# logits


@pytest.mark.parametrize("pooling", models.POOLINGS)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_head_logits_and_residual_stream_are_fp32_under_autocast(base, pooling, weights):
    model = classifier(base("Qwen2"), pooling, dtype=weights, targets=("q_proj", "o_proj"))
    seen = {"layer": set(), "linear": set(), "head in": set()}
    for layer in bases.decoder_layers(model.backbone):
        layer.register_forward_hook(
            lambda m, i, out: seen["layer"].add((out[0] if isinstance(out, tuple) else out).dtype)
        )
        layer.mlp.down_proj.register_forward_hook(lambda m, i, out: seen["linear"].add(out.dtype))
    model.score.register_forward_hook(lambda m, i, out: seen["head in"].add(i[0].dtype))
    with numerics.autocast(CPU, "bf16"):
        logits = model(batch_of(rows()))
    fp32, bf16 = {torch.float32}, {torch.bfloat16}
    assert seen == {"layer": fp32, "linear": bf16, "head in": fp32}  # and autocast was on: linears gave bf16
    assert logits.dtype == model.score.weight.dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("family", ["Qwen2", "Gemma3Text"])
def test_gradient_checkpointing_gives_the_same_gradients_and_reaches_every_adapter(base, family):
    """Bit for bit, dropout masks included; and it does recompute. Reentrant mode would train nothing (frozen base)."""
    gradients, calls = [], []
    for checkpointed in (False, True):
        model = classifier(base(family), targets=("all-linear",), bias="all", dropout=0.2).train()
        if checkpointed:
            models.checkpoint_activations(model.backbone)
        count = []
        bases.decoder_layers(model.backbone)[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        torch.manual_seed(3)
        model(batch_of(rows())).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        calls.append(len(count))
    assert calls == [1, 2]
    plain, recomputed = gradients
    assert sum("lora_B" in n for n in plain) == 14
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name
        assert gradient.any() or name.endswith("k_proj.base_layer.bias"), name


@pytest.mark.parametrize("count", [0, 1, 2, -1])
def test_train_layers_trains_exactly_those(base, count):
    """The head; the last layers with the final norm; or everything. As fp32, also on a half-precision base."""
    model = classifier(base("Qwen2"), dtype=torch.bfloat16)
    returned = models.train_layers(model, count)
    every = [n for n, _ in model.named_parameters()]
    chosen = {0: r"score\.", 1: r"score\.|model\.norm\.|model\.layers\.1\.", -1: ""}
    chosen[2] = chosen[1] + r"|model\.layers\.0\."
    want = {n for n in every if re.match(chosen[count], n)}
    assert set(returned) == {n for n, p in model.named_parameters() if p.requires_grad} == want
    assert len(want) == {0: 1, 1: 14, 2: 26, -1: 27}[count]
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} <= {torch.bfloat16}


def test_more_layers_than_there_are_is_the_users_mistake(base):
    with pytest.raises(UserError, match="--train_layers 3: this base has 2 layers"):
        models.skeleton(base("Qwen2"), models.Head(3), layers=3)


def test_more_tokens_than_a_decoder_was_made_for_are_refused(base, tmp_path):
    """Rotary positions compute any length, but beyond those trained on they mean nothing: as cpt.py and generate.py."""
    folder = base("Qwen2")
    most = bases.load_config(folder).max_position_embeddings
    models.skeleton(folder, models.Head(3), max_length=most)
    with pytest.raises(UserError, match=f"--max_length {most + 1}: .* was made for {most} positions; lower it"):
        models.skeleton(folder, models.Head(3), max_length=most + 1)


def test_unmatched_targets_are_the_users_mistake(base):
    cfg = configs.TrainConfig(base=base("Qwen2"), targets=("q_proj", "wte"))
    with pytest.raises(UserError, match="--targets q_proj,wte: target wte matches no module.*k_proj"):
        trained.check_model(cfg, labelling.Labels(("x", "y"), ("x", "y")), range(60))


def test_families_that_packing_would_break_run_right_padded():
    """They take transformers' attention interface, yet pass sinks or chunked masks that our function would drop."""
    from transformers import GptOssConfig, Llama4TextConfig, Qwen2Config

    assert [models.family_of(c()).packs for c in (GptOssConfig, Llama4TextConfig, Qwen2Config)] == [False, False, True]


def test_an_adapter_beside_the_base_is_left_out(base, tmp_path, capfd):
    """transformers would put it in by itself wherever peft is installed; said, not silent."""
    folder = shutil.copytree(base("Qwen2"), tmp_path / "both")
    model = classifier(str(folder), targets=("q_proj",))
    (folder / "adapter_config.json").write_text(json.dumps(peft_format.adapter_config(model.adapter)))
    save_file(peft_format.adapter_state(model), folder / "adapter_model.safetensors")
    both, plain = backbone(str(folder)).state_dict(), backbone(base("Qwen2")).state_dict()
    assert both.keys() == plain.keys() and all(torch.equal(both[k], plain[k]) for k in plain)
    assert "also holds an adapter, which is ignored" in capfd.readouterr().err


def test_cls_pooling_of_a_causal_decoder_is_refused(base):
    """Its first token has seen nothing: the head would train on rounding noise."""
    with pytest.raises(UserError, match="--pooling cls on qwen2"):
        models.skeleton(base("Qwen2"), models.Head(3, "cls"))


# ---------------------------------------------------------------------------------------------------------------------
# loading


@pytest.mark.parametrize(
    "problem", ["no folder", "no config", "no weights", "missing tensor", "other size", "truncated"]
)
def test_a_base_that_cannot_be_loaded_is_the_users_mistake(base, tmp_path, problem):
    folder = tmp_path / "base"
    source = stock(base("Qwen2"))
    if problem != "no folder":
        source.save_pretrained(folder)
    weights = folder / "model.safetensors"
    said = {
        "no folder": "no such folder",
        "no config": "no config.json in this folder",
        "no weights": "no weights in this folder",
        "missing tensor": r"1 tensors are missing from its weights or misshapen \(model.layers.1.mlp.up_proj.weight",
        "other size": r"1 tensors are missing from its weights or misshapen \(model.layers.1.mlp.up_proj.weight",
        "truncated": "its weights cannot be loaded",
    }[problem]
    if problem == "no config":
        (folder / "config.json").unlink()
    elif problem == "no weights":
        weights.unlink()
    elif problem in ("missing tensor", "other size"):
        tensors = load_file(weights)
        gone = tensors.pop("layers.1.mlp.up_proj.weight")
        if problem == "other size":
            tensors["layers.1.mlp.up_proj.weight"] = gone[:-1].contiguous()
        save_file(tensors, weights, metadata={"format": "pt"})
    elif problem == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"--base {folder}.*{said}"):
        bases.need_base(str(folder))
        backbone(str(folder))


@pytest.mark.parametrize("family", ["Qwen2", "Roberta"])
def test_a_fresh_head_follows_from_the_seed_alone(base, family):
    """Also of RoBERTa's two linears; what was drawn before, or by transformers in loading, does not matter."""
    heads = []
    for before, seed in ((1, 5), (2, 5), (2, 6)):
        torch.manual_seed(before)
        model = models.load_classifier(base(family), models.Head(3), CPU, torch.float32, seed=seed)
        heads.append({n: dict(model.named_parameters())[n] for n in model.fresh})
    assert heads[0] and all(torch.equal(t, heads[1][n]) for n, t in heads[0].items())
    assert not any(torch.equal(t, heads[2][n]) for n, t in heads[0].items() if t.ndim == 2)


def test_a_hub_name_offline_says_what_to_do():
    """Tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(UserError, match="HF_TOKEN.*offline give a local folder"):
        bases.load_config("nobody/this-is-not-there")


def test_language_model_with_a_seed_is_drawn_not_loaded(base):
    a, b, c = (language.load_language_model(base("Qwen2"), CPU, torch.float32, seed).state_dict() for seed in (1, 1, 2))
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a[name], c[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fingerprint_of_the_same_base_agrees_across_dtypes_and_adapters(base, dtype):
    saved = classifier(base("Qwen2")).base_fingerprint
    now = classifier(base("Qwen2"), dtype=dtype, targets=("all-linear",)).base_fingerprint
    assert saved["weights"] and bases.compare_fingerprints(saved, now) == []
    assert bases.compare_fingerprints(now, saved) == []


@pytest.mark.parametrize("moved", [0.01, 1.0])
def test_fingerprint_names_other_weights(base, moved):
    """Also of a base that was trained a little further: every weight moved by 1%. bf16 rounds by 0.2%."""
    other = classifier(base("Qwen2"))
    saved = other.base_fingerprint
    with torch.no_grad():
        for p in other.parameters():
            p *= 1 + moved
    found = bases.compare_fingerprints(saved, bases.fingerprint(other))
    assert found == [f"weights of {n}" for n, p in other.backbone.named_parameters("model") if p.ndim == 2]


def test_fingerprint_names_other_sizes(base):
    prints = [
        classifier(f).base_fingerprint for f in (base("Qwen2"), base("Qwen2", num_hidden_layers=3, vocab_size=67))
    ]
    assert bases.compare_fingerprints(*prints) == ["num_hidden_layers 3, expected 2", "vocab_size 67, expected 61"]


# ---------------------------------------------------------------------------------------------------------------------
# precision and numbers


@pytest.mark.parametrize(
    "capability, precision, grouped",
    [((6, 0), "fp16", False), ((7, 5), "fp16", False), ((8, 0), "bf16", True), ((9, 0), "bf16", True)],
)
def test_precision_and_kernel_by_capability_never_by_is_bf16_supported(monkeypatch, capability, precision, grouped):
    """It is True on a T4, capability 7.5 (pytorch#148322), where bf16 is emulated and slow."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Some GPU")
    cuda = torch.device("cuda", 0)
    assert numerics.choose_precision("auto", ddp.World(0, 1, cuda), "tiny/base") == (
        precision,
        f"Some GPU, capability {capability[0]}.{capability[1]}",
    )
    assert numerics.weight_dtype(cuda, precision) == numerics.DTYPES[precision]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert ("expanded" in models.attention_note(cuda, transformers.LlamaConfig(), precision)) != grouped
    assert "expanded" in models.attention_note(cuda, transformers.LlamaConfig(), "fp32")


@pytest.mark.parametrize("wanted, got", [("auto", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")])
def test_precision_on_a_cpu(wanted, got):
    """Its frozen weights are stored as they are computed with, but for fp16, which no CPU computes faster."""
    assert numerics.choose_precision(wanted, ddp.World(0, 1, CPU), "tiny/base")[0] == got
    assert numerics.weight_dtype(CPU, got) == (torch.bfloat16 if got == "bf16" else torch.float32)


@pytest.mark.parametrize("instructions", [False, True])
def test_a_cpu_computes_in_bf16_where_its_products_are_much_faster(monkeypatch, instructions):
    """A CPU may have the instructions and be slow with them, as the tests' own is made to be (see conftest.py)."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: instructions)
    for much, got in ((1.5, "fp32"), (0.0, "bf16" if instructions else "fp32")):
        monkeypatch.setattr(numerics, "MUCH_FASTER", much)
        assert numerics._fastest_of_a_cpu.__wrapped__(narrow=False)[0] == got
        assert numerics._fastest_of_a_cpu.__wrapped__(narrow=True)[0] == "fp32"


def test_a_run_keeps_the_precision_that_auto_found_on_its_cpu(monkeypatch):
    world = ddp.World(0, 1, CPU)
    monkeypatch.setattr(numerics, "_fastest_of_a_cpu", lambda narrow: ("fp32" if narrow else "bf16", "a test"))
    monkeypatch.setattr(numerics, "NARROW", 256)
    settled = partial(numerics.settled, world=world, base="tiny/base")
    assert settled("auto", resumed=False) == "bf16"
    assert settled("auto", resumed=True) == "fp32", "that of runs before there was a choice"
    assert numerics.settled("auto", world, "no/such base", resumed=False) == "auto", "reported with all else"
    assert settled("fp16", resumed=True) == "fp16" and numerics.exact("auto", world) == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settled("auto", resumed=False) == "auto", "a GPU's own is known without a try"


def test_training_flops_by_hand(base):
    """2 FLOPs a weight and token for each of: forward, gradient of activations, gradient of trained weights."""
    lengths = (3, 5)
    linears = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)  # q o, k v, gate up down of 2 layers
    adapters = 2 * 2 * 4 * (32 + 32)  # A and B of q and o, 2 layers
    scores = 2 * 2 * 32 * (3**2 + 5**2)  # layers, both products of half an n x n matrix, width
    model = classifier(base("Qwen2"), targets=("q_proj", "o_proj"))
    assert estimates.training_flops(model, lengths) == 8 * (4 * linears + 6 * adapters) + 3 * scores
    model = classifier(base("Qwen2"))
    models.train_layers(model, -1)
    assert estimates.training_flops(model, lengths) == 8 * 6 * linears + 3 * scores
    models.train_layers(model, 0)  # the head alone: the backbone runs forward only
    assert estimates.training_flops(model, lengths) == 8 * 2 * linears + scores


def test_overflow_report_names_the_first_layer_that_is_not_finite(base):
    model = classifier(base("Qwen2", num_hidden_layers=4))
    layers = bases.decoder_layers(model.backbone)

    def report():
        with torch.no_grad(), numerics.activation_maxima(model) as maxima:
            model(batch_of(rows()))
        return numerics.overflow_report(maxima)

    with torch.no_grad():
        layers[1].mlp.down_proj.weight *= 1e3
        largest = re.fullmatch(r"largest activation (\S+) in layer (\d)", report())
        assert float(largest[1]) > 1e3 and int(largest[2]) >= 1
        layers[2].mlp.down_proj.bias = nn.Parameter(torch.full((32,), float("nan")))
        assert report() == "layer 2 is the first whose output is not finite"
        layers[1].mlp.down_proj.bias = nn.Parameter(torch.full((32,), -float("inf")))
        assert report() == "layer 1 is the first whose output is not finite"
    assert not any(layer._forward_hooks for layer in layers)


def test_disabled_adapter_gives_the_bases_hidden_states_bit_for_bit(base):
    """Through our own attention, with every bias trained."""
    model, batch = classifier(base("Qwen2"), targets=("q_proj", "v_proj"), bias="all"), batch_of(rows())
    plain = backbone(base("Qwen2"))
    with torch.no_grad():
        want = models.hidden_states(plain, batch)
        assert not torch.equal(models.hidden_states(model.backbone, batch), want)
        with lora.disable(model):
            assert torch.equal(models.hidden_states(model.backbone, batch), want)
