"""lora.py against peft (bit for bit, in memory and through files), and the rules that adapters must not break."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

import data
import labelling
import lora
import model as models
import optim
import peft_format
import trained
from packed import pack

RANK, ALPHA = 4, 6.0  # alpha is never the rank: equal ones hide a wrong scale
CPU = torch.device("cpu")
QV = ["q_proj", "v_proj"]


def toy_base(layers=2):
    """A random Qwen2 classifier of transformers, its biases and norms away from their defaults."""
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, num_labels=3, use_cache=False,
    )  # fmt: skip
    model = Qwen2ForSequenceClassification(config)
    return scramble(model.eval(), 0.2)


@torch.no_grad()
def scramble(model, scale, trained_only=False, seed=1):
    """Move every (trained) parameter, so that nothing is zero or one by default."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad or not trained_only:
            p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def described(targets=QV, **more):
    return lora.Adapter(tuple(targets), RANK, ALPHA, **{"saved": ("score",), **more})


def adapted(base, targets=QV, bias="none", rslora=False, dropout=0.0, seed=2):
    """Ours on a copy of the base, with every trained parameter moved."""
    model = copy.deepcopy(base)
    lora.inject(model, described(targets, bias=bias, rslora=rslora, dropout=dropout))
    lora.train_only(model)
    return scramble(model, 0.3, trained_only=True, seed=seed)


def peft_model(base, targets=QV, bias="none", rslora=False, dropout=0.0):
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules=targets,
        bias=bias, use_rslora=rslora, lora_dropout=dropout, modules_to_save=["score"],
    )  # fmt: skip
    return peft.get_peft_model(copy.deepcopy(base), config).eval()


def peft_name(name):
    """The key under which peft writes a parameter of its model."""
    return name.replace(".default", "").replace(".modules_to_save", "")


def copy_to_peft(ours, theirs):
    """Give peft's model the trained values of ours, by name; returns theirs by that name."""
    named = {peft_name(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    state = peft_format.adapter_state(ours)
    assert set(named) == set(state)
    for key, p in named.items():
        p.data.copy_(state[key])
    return named


def ids(n=9, seed=3):
    return torch.randint(1, 61, (1, n), generator=torch.Generator().manual_seed(seed))


def batch_of(rows):
    return pack(data.join_tokens(rows), np.arange(len(rows)), CPU)


def bits(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def with_our_masks(model) -> None:
    """Give peft's model our dropout: it draws its masks by torch's slower generator, from the same seed others."""
    for module in model.modules():
        for name, part in module.named_children():
            if isinstance(module, torch.nn.ModuleDict) and isinstance(part, torch.nn.Dropout):
                module[name] = lora.Dropout(part.p)


# ---------------------------------------------------------------------------------------------------------------------
# parity with peft, in memory


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_logits_and_gradients_equal_peft_bit_for_bit(bias, rslora, dropout):
    """The same weights and masks give the same bits, and the same tensors are trained."""
    base = toy_base()
    ours, theirs = adapted(base, bias=bias, rslora=rslora, dropout=dropout), peft_model(base, QV, bias, rslora, dropout)
    named = copy_to_peft(ours, theirs)
    with_our_masks(theirs)
    logits = []
    for model in (ours, theirs):
        model.train(dropout > 0)
        torch.manual_seed(7)
        logits.append(model(input_ids=ids()).logits)
        logits[-1].square().sum().backward()
    assert torch.equal(*logits)
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert p.grad.any() and torch.equal(p.grad, named[peft_format.PEFT_PREFIX + name].grad), name
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_saved_keys_are_those_of_peft_and_trained_biases_are_saved(bias):
    """Set equality with what peft writes. Before 0.21 it forgot the trained lora_only biases (peft#3306)."""
    from peft import get_peft_model_state_dict

    base = toy_base()
    model = adapted(base, bias=bias)
    ours = {k: v.shape for k, v in peft_format.adapter_state(model).items()}
    theirs = {k: v.shape for k, v in get_peft_model_state_dict(peft_model(base, QV, bias)).items()}
    if bias == "lora_only":
        biases = [f"model.layers.{i}.self_attn.{t}.base_layer.bias" for i in (0, 1) for t in QV]
        theirs |= {peft_format.PEFT_PREFIX + n: model.get_parameter(n).shape for n in biases}
    assert ours == theirs


def test_adapter_state_is_a_copy_that_later_steps_do_not_change():
    model = adapted(toy_base())
    state = peft_format.adapter_state(model)
    kept = {k: t.clone() for k, t in state.items()}
    scramble(model, 0.1, trained_only=True, seed=5)
    assert equal(state, kept) and not equal(state, peft_format.adapter_state(model))


class Names(nn.Module):
    """Modules whose names contain each other, and one target name that is a container."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.my_q_proj = nn.Linear(4, 4)
        self.q_proj_extra = nn.Linear(4, 4)
        self.block = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "k": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.score = nn.Linear(4, 2)


def test_targets_are_exact_last_segments_as_in_peft():
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(Names(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "k"]))
    model = Names()
    assert set(lora.inject(model, described(["q_proj", "k"]))) == {"q_proj", "block.q_proj", "block.k"}
    assert set(lora.adapters(model)) == set(theirs.base_model.targeted_module_names)


@pytest.mark.parametrize("family", ["Qwen2", "Phi3", "Bert"])
def test_all_linear_is_every_linear_but_the_head_as_in_peft(family):
    import transformers

    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    base = getattr(transformers, f"{family}ForSequenceClassification")(config)
    want = {n for n, m in base.named_modules() if isinstance(m, nn.Linear)} - {"score", "classifier"}
    found = lora.find_targets(base, described(["all-linear"]))
    assert set(found) == want and len(found) == len(want)
    assert want == set(peft_model(base, "all-linear").base_model.targeted_module_names)


@pytest.mark.parametrize(
    "targets, said",
    [
        (["q_proj", "wte"], "target wte matches no module"),
        (["block"], "target block is not a linear or an embedding but ModuleDict"),
    ],
)
def test_a_target_that_cannot_be_met_raises_and_lists_what_exists(targets, said):
    """Even where another target matches (peft#1959); nothing is injected then."""
    model = Names()
    with pytest.raises(ValueError, match=said) as e:
        lora.inject(model, described(targets))
    listed = set(re.search(r"the linears here are (.*) \(or all-linear\)", str(e.value))[1].split(", "))
    assert listed == {"q_proj", "my_q_proj", "q_proj_extra", "k"}
    assert not lora.adapters(model)


def test_double_injection_raises():
    model = Names()
    lora.inject(model, described(["k"]))
    with pytest.raises(ValueError, match="already holds an adapter on 1 modules"):
        lora.inject(model, described(["q_proj"]))
    assert set(lora.adapters(model)) == {"block.k"}


def test_rank_zero_raises():
    with pytest.raises(ValueError, match="rank 0"):
        lora.LoRALinear(nn.Linear(4, 4), 0, ALPHA)


# ---------------------------------------------------------------------------------------------------------------------
# parity with peft, through files


ROWS = [[5, 9, 300, 7], [11], [42, 8, 8, 13, 2, 77, 31]]
VARIANTS = {
    "plain": {},
    "rslora": {"rslora": True},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "all-linear": {"targets": ("all-linear",)},
}


def classifier(base, targets=QV, bias="none", rslora=False, dtype=torch.float32):
    """Our own Classifier on a saved base, adapted, every trained parameter moved."""
    model = models.load_classifier(base, models.Head(3), CPU, dtype)
    models.add_adapter(model, described(targets, dropout=0.1, bias=bias, rslora=rslora, base=base))
    return scramble(model.eval(), 0.1, trained_only=True)


@torch.no_grad()
def logits_alone(model):
    return torch.cat([model(input_ids=torch.tensor([row])).logits for row in ROWS])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_adapter_loads_with_peft_to_the_same_logits(variant, small_base, tmp_path):
    """Also with lora_only biases, which every peft reads. 1e-5: attention kernels differ."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    ours = classifier(small_base, **VARIANTS[variant])
    labels = labelling.Labels(("a", "b", "c"), ("a", "b", "c"))
    trained.write_classifier(tmp_path, ours, AutoTokenizer.from_pretrained(small_base), labels)
    theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3).eval()
    with torch.no_grad():
        got = ours(batch_of(ROWS))
        with lora.disable(ours):
            assert (ours(batch_of(ROWS)) - got).abs().max() > 1e-2  # the adapter matters, so the next line can fail
    torch.testing.assert_close(logits_alone(theirs), got, rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["plain", "rslora", "bias all", "all-linear"])
def test_an_adapter_saved_by_peft_loads_in_ours(variant, small_base, tmp_path):
    """1e-5: attention kernels differ."""
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    options = VARIANTS[variant]
    targets = "all-linear" if variant == "all-linear" else QV
    base = AutoModelForSequenceClassification.from_pretrained(small_base, num_labels=3)
    theirs = peft_model(base, targets, options.get("bias", "none"), options.get("rslora", False))
    scramble(theirs, 0.1, trained_only=True, seed=5).save_pretrained(tmp_path)
    ours = classifier(small_base, **options)
    peft_format.load_adapter_state(ours, load_file(tmp_path / "adapter_model.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(ours(batch_of(ROWS)), logits_alone(theirs), rtol=0, atol=1e-5)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    named = about["target_modules"] if targets == "all-linear" else targets  # peft writes all-linear out
    mine = peft_format.adapter_config(described(named, bias=about["bias"], rslora=about["use_rslora"], base=small_base))
    for field in mine.keys() - {"target_modules", "modules_to_save"}:
        assert mine[field] == about[field], field
    assert set(mine["target_modules"]) == set(about["target_modules"])
    assert "score" in about["modules_to_save"]  # peft adds its own guesses of head names


# ---------------------------------------------------------------------------------------------------------------------
# merge and disable


@pytest.mark.parametrize("bias, rslora", [("none", True), ("all", False)])
def test_merged_equals_live_and_merging_is_idempotent(bias, rslora):
    """1e-6 of the largest logit: one fp32 rounding of each weight. Plain modules with the base's names are left."""
    base = toy_base()
    model = adapted(base, ("all-linear",), bias, rslora)
    with torch.no_grad():
        live = model(input_ids=ids()).logits
        count = lora.merge(model)
        merged = model(input_ids=ids()).logits
    assert count == 14 and not lora.adapters(model)
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-6 * float(live.abs().max()))
    assert (live - base(input_ids=ids()).logits).abs().max() > 1e-2
    once = bits(model)
    assert lora.merge(model) == 0 and equal(once, bits(model))


def test_merged_half_precision_weights_and_biases_keep_the_dtype_of_the_base():
    model = adapted(toy_base().half(), bias="all")
    wanted = {n: m.base_layer.weight.float() + m.delta() for n, m in lora.adapters(model).items()}
    lora.merge(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "score"}
    assert {p.dtype for m in linears.values() for p in m.parameters()} == {torch.float16}
    for name, weight in wanted.items():
        assert torch.equal(linears[name].weight, weight.half()), name


def toy_lm(tied):
    """A random Qwen2 with its LM head, adapted on q_proj, embedding and LM head, every update moved."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    lora.inject(model, described(["q_proj", "embed_tokens", "lm_head"], saved=()))
    lora.train_only(model)
    return scramble(model, 0.1, trained_only=True)


@torch.no_grad()
def test_merging_unties_a_shared_weight_so_that_merged_equals_live():
    """One sum for both would give other logits: 0.3 on a toy, 5.9 on Qwen2.5-0.5B (unsloth#9331)."""
    model = toy_lm(tied=True)
    live = model(input_ids=ids()).logits
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.base_layer.weight
    lora.merge(model)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(model(input_ids=ids()).logits, live, rtol=0, atol=1e-6 * float(live.abs().max()))


def test_merge_refuses_quantized_weights_and_changes_nothing():
    model = toy_lm(tied=False)
    model.lm_head.base_layer.weight = nn.Parameter(torch.ones(61, 32, dtype=torch.int8), requires_grad=False)
    before = bits(model)
    with pytest.raises(ValueError, match=r"lm_head is quantized \(stored as torch.int8\): merge into the 16-bit base"):
        lora.merge(model)
    assert equal(before, bits(model)) and len(lora.adapters(model)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_disable_gives_the_base_bit_for_bit_with_all_biases_trained(dtype):
    """And the trained model back on leaving, even by an exception."""
    base = toy_base().to(dtype)
    model = adapted(base, bias="all")
    base.score = copy.deepcopy(model.score)  # the head is no part of the adapter: only the backbone is the base again
    trained = bits(model)

    def logits(m):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float16):
            return m(input_ids=ids()).logits

    live = logits(model)
    with lora.disable(model):
        assert torch.equal(logits(model), logits(base))
    with pytest.raises(RuntimeError), lora.disable(model):
        raise RuntimeError
    assert not torch.equal(live, logits(base))
    assert equal(trained, bits(model)) and torch.equal(logits(model), live)


# ---------------------------------------------------------------------------------------------------------------------
# what is trained


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_the_trained_set_is_exactly_what_is_asked_for(bias):
    base = toy_base()
    model = copy.deepcopy(base)
    lora.inject(model, described(bias=bias))
    returned = lora.train_only(model)
    stem = [f"model.layers.{i}.self_attn." for i in (0, 1)]
    want = {f"{s}{t}.lora_{x}.weight" for s in stem for t in QV for x in "AB"} | {"score.weight"}
    if bias != "none":
        want |= {f"{s}{t}.base_layer.bias" for s in stem for t in QV}
    if bias == "all":
        want |= {f"{s}k_proj.bias" for s in stem}
    assert {n for n, p in model.named_parameters() if p.requires_grad} == want == set(returned)
    with torch.no_grad():  # B starts at zero: the start is the base
        assert torch.equal(model(input_ids=ids()).logits, base(input_ids=ids()).logits)


def test_unknown_bias_raises():
    with pytest.raises(ValueError, match="bias some: expected none, lora_only or all"):
        lora.inject(model := Names(), described(["k"], bias="some"))
        lora.train_only(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_tensors_are_fp32_masters_on_a_half_precision_base(dtype, small_base):
    model = classifier(small_base, bias="all", dtype=dtype)
    dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, dtype)}
    assert {t.dtype for t in peft_format.adapter_state(model).values()} == {torch.float32}


def test_base_weights_are_bit_identical_after_steps_and_every_trained_tensor_moves(small_base):
    model = classifier(small_base, bias="lora_only").train()
    optimizer = optim.adamw(optim.parameter_groups(model.named_parameters(), 1e-2, 0.0, 0.1))
    before = bits(model)
    for _ in range(2):
        model(batch_of(ROWS)).square().sum().backward()
        optim.step(optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0, 1.0, torch.zeros(0))
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}


def test_trainable_table_counts_by_hand():
    """Qwen2 of 2 layers, 32 wide, value heads 16 wide: A is 4x32, B is 32x4 (q) or 16x4 (v); head 3x32."""
    model = adapted(toy_base(), bias="lora_only")
    head, *lines, last = [line.split() for line in lora.trainable_table(model).splitlines()]
    assert head == ["trainable", "tensors", "parameters", "share"]
    stem = "model.layers.*.self_attn."
    want = {
        f"{stem}q_proj.lora_A.weight": 2 * 4 * 32,
        f"{stem}q_proj.lora_B.weight": 2 * 32 * 4,
        f"{stem}q_proj.base_layer.bias": 2 * 32,
        f"{stem}v_proj.lora_A.weight": 2 * 4 * 32,
        f"{stem}v_proj.lora_B.weight": 2 * 16 * 4,
        f"{stem}v_proj.base_layer.bias": 2 * 16,
        "score.weight": 3 * 32,
    }
    layer = 2 * (32 * 32 + 32 * 16) + 32 + 2 * 16 + 3 * 32 * 48 + 2 * 32
    everything = 61 * 32 + 2 * layer + 32 + 3 * 32 + sum(n for k, n in want.items() if "lora_" in k)
    assert {k: (int(t), int(n.replace(",", ""))) for k, t, n, _ in lines} == {
        k: (1 if k == "score.weight" else 2, n) for k, n in want.items()
    }
    total = sum(want.values())
    assert last == ["all", "13", f"{total:,}", f"{total / everything:.3%}"]
    assert [share for *_, share in lines] == [f"{want[k] / everything:.3%}" for k, *_ in lines]


# ---------------------------------------------------------------------------------------------------------------------
# strict loading


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def corrupt(state, how):
    if how == "missing":
        del state[A0]
    elif how == "head missing":
        del state["base_model.model.score.weight"]
    elif how == "unexpected":
        state["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"] = torch.zeros(4, 32)
    elif how == "shape":
        state[A0] = torch.zeros(2, 32)
    elif how == "transposed":
        state[A0] = state[A0].T.contiguous()
    elif how in ("nan", "inf"):
        state[A0][1, 2] = float(how)
    elif how == "int":
        state[A0] = torch.ones(4, 32, dtype=torch.int64)
    return state


REFUSED = {
    "missing": rf"1 missing tensors \({A0}\)",
    "head missing": r"1 missing tensors \(base_model.model.score.weight\)",
    "unexpected": r"1 unexpected tensors \(.*o_proj.lora_A.weight\)",
    "shape": rf"{A0} has shape \(2, 32\), expected \(4, 32\)",
    "transposed": rf"{A0} has shape \(32, 4\), expected \(4, 32\)",
    "nan": rf"{A0} holds values that are not finite",
    "inf": rf"{A0} holds values that are not finite",
    "int": rf"{A0} has dtype torch.int64, expected floating point",
}


@pytest.mark.parametrize("how", REFUSED)
def test_an_adapter_that_does_not_fit_is_refused_by_name_and_changes_nothing(how):
    base = toy_base()
    model, other = adapted(base), adapted(base, seed=9)
    before = bits(model)
    with pytest.raises(ValueError, match=REFUSED[how]):
        peft_format.load_adapter_state(model, corrupt(peft_format.adapter_state(other), how))
    assert equal(before, bits(model))
    peft_format.load_adapter_state(model, peft_format.adapter_state(other))  # untouched, the same one is taken
    assert equal(bits(other), bits(model))


def test_a_four_layer_adapter_does_not_load_on_a_two_layer_base():
    """It does in peft, with no warning: how a competition entry came to score 0.0 on every row."""
    two, four = adapted(toy_base()), adapted(toy_base(layers=4))
    before = bits(two)
    with pytest.raises(ValueError, match=r"8 unexpected tensors \(.*layers\.2\."):
        peft_format.load_adapter_state(two, peft_format.adapter_state(four))
    with pytest.raises(ValueError, match=r"8 missing tensors \(.*layers\.2\."):
        peft_format.load_adapter_state(four, peft_format.adapter_state(two))
    assert equal(before, bits(two))


def test_trained_biases_that_are_not_in_the_file_are_named():
    """peft#3306: a lora_only adapter saved by an older peft lacks its trained biases: said, instead of guessed."""
    model = adapted(toy_base(), bias="lora_only")
    state = {k: t for k, t in peft_format.adapter_state(model).items() if not k.endswith(".bias")}
    with pytest.raises(ValueError, match=r"4 missing tensors \(.*q_proj.base_layer.bias"):
        peft_format.load_adapter_state(model, state)
