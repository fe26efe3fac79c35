"""Adapters against peft itself: files in both directions for every family, bit-equality, what is refused, and why.

Nothing here shares code with what it tests: peft and transformers compute the reference, with stock attention on each
sequence alone. A variant is told once, in our words (lora.Adapter), and put into peft's by the table WORDS.
"""

import copy
import io
import json
import os
import re
import resource
import shutil
import signal
import struct
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import ROOT
from test_lora import with_our_masks

import checkpoint
import configs
import data
import ddp
import evaluate
import foreign
import labelling
import lora
import model as models
import peft_format
import trained
from errors import Degenerate, Untrusted, UserError
from packed import pack

CPU = torch.device("cpu")
WORLD = ddp.World(0, 1, CPU)
RANK, ALPHA = 4, 6.0  # alpha is never the rank: equal ones hide a wrong scale
LAYERS, VOCABULARY, CLASSES = 3, 61, 3
WORDS = ((7,), (11, 30))  # of a head of label words: the second class has two
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "Qwen2": dict(),
    "Qwen3": dict(head_dim=12),
    "Llama": dict(attention_bias=True),
    "Mistral": dict(sliding_window=6, head_dim=8),
    "Gemma3Text": dict(sliding_window=5, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2),
    "Phi3": dict(),
    "GPT2": dict(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=40),
    "Bert": dict(max_position_embeddings=40),
    "Roberta": dict(max_position_embeddings=40, pad_token_id=1),
    "ModernBert": dict(local_attention=6, global_attn_every_n_layers=2),
    "DebertaV2": dict(relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_buckets=4),
}
FAMILIES["Gemma3Text"]["layer_types"] = FAMILIES["Gemma3Text"]["layer_types"][:LAYERS]
NAMES = {  # attention linears, another linear by a dotted end, the path of layer {}, its list, the embedding
    "Qwen2": (("q_proj", "v_proj"), "mlp.down_proj", "model.layers.{}.", "layers", "embed_tokens"),
    "Phi3": (("qkv_proj",), "mlp.gate_up_proj", "model.layers.{}.", "layers", "embed_tokens"),
    "GPT2": (("c_attn",), "mlp.c_proj", "transformer.h.{}.", "h", "wte"),
    "Bert": (("query", "value"), "output.dense", "bert.encoder.layer.{}.", "layer", "word_embeddings"),
    "Roberta": (("query", "key"), "attention.output.dense", "roberta.encoder.layer.{}.", "layer", "word_embeddings"),
    "ModernBert": (("Wqkv",), "mlp.Wo", "model.layers.{}.", "layers", "tok_embeddings"),
    "DebertaV2": (
        ("query_proj", "value_proj"),
        "pooler.dense",
        "deberta.encoder.layer.{}.",
        "layer",
        "word_embeddings",
    ),
}
ENCODERS = ("Bert", "Roberta", "ModernBert", "DebertaV2")
AUTO = {"SEQ_CLS": transformers.AutoModelForSequenceClassification, "CAUSAL_LM": transformers.AutoModelForCausalLM}


# ---------------------------------------------------------------------------------------------------------------------
# bases and variants


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family, task, ...) -> a folder with a small random classifier or LM, no parameter at its default."""
    made = {}

    def make(family, task="SEQ_CLS", **changes):
        key = (family, task, *changes.items())
        if key not in made:
            torch.manual_seed(0)
            sizes = {**SIZES, **FAMILIES[family], "num_labels": CLASSES, **changes}
            model = AUTO[task].from_config(getattr(transformers, f"{family}Config")(**sizes))
            made[key] = str(tmp_path_factory.mktemp(family))
            scramble(model, 0.1).save_pretrained(made[key])
        return made[key]

    return make


@torch.no_grad()
def scramble(model, scale, trained_only=False, seed=1):
    """Move every (trained) parameter, so that nothing is zero or one by default."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad or not trained_only:
            p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return model


def variant(family, name):
    """The fields of lora.Adapter that a variant of the matrix means for a family."""
    attention, dotted, layer, layers, embedding = NAMES.get(family, NAMES["Qwen2"])
    first, last = attention[0], attention[-1]
    block = re.escape(layer.format(1))
    everywhere, pooler = {"targets": ("all-linear",)}, "head" if family == "ModernBert" else "pooler"
    return {
        "plain": {},
        "patterns": {"rank_pattern": {first: 2}, "alpha_pattern": {rf"{block}.*{last}": 9.0}},
        "patterns, rslora": {
            **everywhere,
            "rslora": True,
            "rank_pattern": {rf"{block}.*": 7, rf"{layer.format(0)}.*{last}": 1},
            "alpha_pattern": {rf".*\.[02]\..*{last}": 11.0},
        },
        "rslora": {"rslora": True},
        "bias all": {"bias": "all"},
        "bias lora_only": {"bias": "lora_only", "targets": (*attention, dotted)},
        "dotted": {"targets": (dotted,)},
        "full names": {"targets": FULL.get(family, FULL["Qwen2"])},
        "regex": {"targets": rf".*\.[12]\..*({first}|{dotted.rsplit('.', 1)[-1]})"},
        "all-linear": everywhere,
        "exclude list": {**everywhere, "exclude": (first, dotted)},
        "exclude regex": {**everywhere, "exclude": rf"{block}.*|.*pooler.*"},
        "layer": {"layers": (1,)},
        "layer list": {"layers": (0, 2)},
        "layers of a list": {"layers": (1, 2), "layers_pattern": (layers,)},
        "a full name beside layers": {"layers": (1,), "targets": (*attention, FULL.get(family, FULL["Qwen2"])[0])},
        "embedding": {"targets": (*attention, embedding)},
        "embedding alone": {"targets": (embedding,), "rslora": True},
        "saved embedding": {"saved": (embedding,)},
        "saved pooler": {"saved": (pooler,), "bias": "lora_only"},
        "saved pooler, bias all": {**everywhere, "saved": (pooler,), "bias": "all"},
        "saved norm": {"saved": ("norm",)},
        "lm_head": {"targets": (*attention, "lm_head")},
        "embedding, lm_head": {"targets": (embedding, "lm_head"), "rank_pattern": {"lm_head": 2}},
        "saved lm_head": {"saved": ("lm_head",)},
        "saved embedding, lm_head": {"saved": (embedding, "lm_head"), "rslora": True},
    }[name]


FULL = {
    "Qwen2": ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj"),
    "Phi3": ("model.layers.0.self_attn.o_proj", "model.layers.2.mlp.down_proj"),
    "GPT2": ("transformer.h.0.attn.c_proj", "transformer.h.2.mlp.c_fc"),
    "Bert": ("bert.encoder.layer.0.attention.self.key", "bert.pooler.dense"),
    "Roberta": ("roberta.encoder.layer.0.attention.self.key", "roberta.encoder.layer.2.output.dense"),
    "ModernBert": ("model.layers.0.attn.Wo", "head.dense"),
    "DebertaV2": ("deberta.encoder.layer.0.attention.self.key_proj", "deberta.encoder.layer.2.intermediate.dense"),
}
IN_PEFT = {  # our field -> peft's
    "targets": "target_modules", "exclude": "exclude_modules", "layers": "layers_to_transform",
    "layers_pattern": "layers_pattern", "saved": "modules_to_save", "bias": "bias", "rslora": "use_rslora",
    "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
}  # fmt: skip
MATRIX = [
    ("SEQ_CLS", family, name)
    for name, families in (
        ("plain", "Qwen2 Qwen3 Llama Mistral Gemma3Text Phi3 GPT2 Bert Roberta ModernBert DebertaV2"),
        ("patterns", "Qwen2 Phi3 Roberta ModernBert"),
        ("patterns, rslora", "Llama Gemma3Text GPT2 Bert DebertaV2"),
        ("rslora", "Mistral ModernBert"),
        ("bias all", "Qwen2 GPT2 Bert Roberta"),
        ("bias lora_only", "Llama GPT2 DebertaV2"),
        ("dotted", "Gemma3Text Bert Roberta ModernBert"),
        ("full names", "Mistral Phi3 GPT2 Bert ModernBert DebertaV2"),
        ("regex", "Qwen3 GPT2 Roberta DebertaV2"),
        ("all-linear", "Qwen2 Gemma3Text Phi3 GPT2 Bert Roberta ModernBert DebertaV2"),
        ("exclude list", "Llama Bert ModernBert"),
        ("exclude regex", "Qwen2 DebertaV2 GPT2"),
        ("layer", "Mistral GPT2 Bert"),
        ("layer list", "Qwen2 ModernBert"),
        ("layers of a list", "Qwen3 GPT2 Roberta"),
        ("a full name beside layers", "Qwen2 GPT2 Roberta"),
        ("embedding", "Qwen2 Gemma3Text GPT2 Roberta DebertaV2"),
        ("embedding alone", "Llama Bert ModernBert"),
        ("saved embedding", "Qwen2 Gemma3Text Bert"),
        ("saved pooler", "Bert ModernBert DebertaV2"),
        ("saved pooler, bias all", "Bert ModernBert DebertaV2"),
        ("saved norm", "Llama"),  # peft takes modules_to_save as ends of names: every ...layernorm too
    )
    for family in families.split()
]
LANGUAGE = [
    ("CAUSAL_LM", family, name, tied)
    for family, name, tied in (
        ("Qwen2", "plain", True),
        ("Qwen3", "patterns, rslora", True),
        ("Llama", "bias all", False),
        ("GPT2", "all-linear", True),
        ("Phi3", "regex", False),
        ("Qwen2", "lm_head", True),
        ("Mistral", "lm_head", False),
        ("Qwen2", "embedding", True),
        ("Qwen2", "embedding, lm_head", True),
        ("GPT2", "embedding, lm_head", True),
        ("Gemma3Text", "embedding, lm_head", True),
        ("Llama", "embedding, lm_head", False),
        ("Qwen2", "saved lm_head", True),
        ("Qwen2", "saved embedding", True),
        ("Qwen2", "saved embedding, lm_head", True),
        ("Mistral", "saved embedding, lm_head", False),
    )
]
CASES = [(*case, True) for case in MATRIX] + LANGUAGE
IDS = [
    f"{family}, {name}" + ("" if task == "SEQ_CLS" else f", {'tied' if tied else 'untied'} LM")
    for task, family, name, tied in CASES
]
matrix = pytest.mark.parametrize("task, family, name, tied", CASES, ids=IDS)
generator = np.random.default_rng(0)
ROWS = [generator.integers(3, VOCABULARY, n).tolist() for n in (9, 1, 17, 4)]  # longer and shorter than the windows


def folder_of(base, task, family, tied):
    return base(family, task, tie_word_embeddings=tied) if task == "CAUSAL_LM" else base(family)


def stock(folder, task):
    """transformers' own model of a base, with its default attention."""
    return AUTO[task].from_pretrained(folder).eval()


def fields_of(family, name):
    attention = NAMES.get(family, NAMES["Qwen2"])[0]
    return {"targets": attention, **variant(family, name)}


def peft_words(family, fields):
    """A variant as keyword arguments of peft.LoraConfig."""
    words = {IN_PEFT[k]: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    if words["target_modules"] == ["all-linear"]:
        words["target_modules"] = "all-linear"
    if words.get("layers_to_transform") == [1]:  # peft takes a number, and a name of a list alone
        words["layers_to_transform"] = 1
    if "layers_pattern" in words:
        (words["layers_pattern"],) = words["layers_pattern"]
    return words | {"fan_in_fan_out": family == "GPT2"}


def in_peft(model, task, **words):
    """peft's model over a model of transformers; what it warns of is not our concern here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"task_type": task, "r": RANK, "lora_alpha": ALPHA} | words)
        return peft.get_peft_model(model, config).eval()


def ours_on(folder, task, adapter):
    head = models.Head(CLASSES, models.stored_pooling(folder), words=WORDS if task == "CAUSAL_LM" else ())
    model = models.load_classifier(folder, head, CPU, torch.float32)
    models.add_adapter(model, adapter)
    return model.eval()


@torch.no_grad()
def alone(model, task):
    """Reference logits (N, C): each row by itself, with stock attention."""
    logits = [model(input_ids=torch.tensor([row])).logits for row in ROWS]
    if task == "SEQ_CLS":
        return torch.cat(logits)
    return torch.stack([torch.stack([z[0, -1, list(w)].logsumexp(0) for w in WORDS]) for z in logits])


@torch.no_grad()
def packed(model):
    return model(pack(data.join_tokens(ROWS), np.arange(len(ROWS)), CPU))


def equal_and_moved(model, want):
    """1e-5 of the largest logit (where that is above 1: fp32 rounds by its share); the update alone moves them more."""
    got = packed(model)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5 * max(1.0, float(want.abs().max())))
    with lora.disable(model):
        assert (packed(model) - got).abs().max() > 1e-3


def bookkeeping(key):
    """Copies of a module that bias="all" makes peft write beside the one it trains."""
    return ".original_module." in key or ".modules_to_save." in key


# ---------------------------------------------------------------------------------------------------------------------
# the matrix


@matrix
def test_an_adapter_saved_by_peft_gives_the_logits_of_peft(task, family, name, tied, base, tmp_path):
    """Every tensor of the file finds its place, but for bookkeeping, and merged it computes the same."""
    folder = folder_of(base, task, family, tied)
    theirs = in_peft(stock(folder, task), task, **peft_words(family, fields_of(family, name)))
    scramble(theirs, 0.2, trained_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    adapter = peft_format.read_adapter_config(json.loads((tmp_path / "adapter_config.json").read_text()))
    ours = ours_on(folder, task, adapter)
    tensors = checkpoint.load_tensors(tmp_path / "adapter_model.safetensors")
    report = peft_format.load_adapter_state(ours, tensors)
    assert report.startswith(f"{sum(not bookkeeping(k) for k in tensors)} tensors matched"), report
    equal_and_moved(ours, alone(theirs, task))
    live = packed(ours)
    lora.merge(ours)
    torch.testing.assert_close(packed(ours), live, rtol=0, atol=1e-5 * max(1.0, float(live.abs().max())))


@matrix
def test_an_adapter_written_here_gives_its_logits_in_peft(task, family, name, tied, base, tmp_path):
    """peft finds every key that it looks for, and would write the same ones; disabled, a LM is its base again."""
    folder = folder_of(base, task, family, tied)
    fields = fields_of(family, name)
    if task == "SEQ_CLS":
        head = ("score",) if family not in ENCODERS else ("classifier",)
        fields["saved"] = head + fields.get("saved", ())
    ours = ours_on(folder, task, lora.Adapter(rank=RANK, alpha=ALPHA, dropout=0.1, task=task, base=folder, **fields))
    start = packed(ours)
    scramble(ours, 0.2, trained_only=True)
    if task == "CAUSAL_LM":
        with lora.disable(ours):
            assert torch.equal(packed(ours), start)
    state = peft_format.adapter_state(ours)
    checkpoint.save_json(tmp_path / "adapter_config.json", peft_format.adapter_config(ours.adapter))
    checkpoint.save_tensors(tmp_path / "adapter_model.safetensors", state)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        theirs = peft.PeftModel.from_pretrained(stock(folder, task), tmp_path).eval()
        written = peft.get_peft_model_state_dict(theirs)
    assert not [w for w in said if "missing" in str(w.message)]
    written = {k: t for k, t in written.items() if not bookkeeping(k)}
    copies = {k for k in written if k.endswith(".base_layer.weight")}  # of adapted embeddings
    assert written.keys() - copies == state.keys()
    assert all(torch.equal(written[k], t) for k, t in state.items())
    equal_and_moved(ours, alone(theirs, task))


def test_the_matrix_is_wide():
    """At least 40 different combinations in each direction, and each family as a classifier."""
    assert len(set(CASES)) == len(CASES) >= 40
    assert {family for task, family, *_ in CASES if task == "SEQ_CLS"} == set(FAMILIES)


# ---------------------------------------------------------------------------------------------------------------------
# other ways into and out of files


def tokenizer_of_tiny():
    return transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/base")


@pytest.mark.parametrize("family", ["Qwen2", "Bert"])
def test_a_save_of_ours_loads_through_the_auto_class_of_peft(family, small_base, tmp_path):
    """The user's way, the folder alone. BERT's base has no pooler here: the adapter brings it with the head."""
    tokenizer, folder = tokenizer_of_tiny(), small_base
    if family == "Bert":
        folder = str(tmp_path / "bert")
        sizes = {**SIZES, "vocab_size": len(tokenizer)}
        masked = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, max_position_embeddings=40))
        scramble(masked, 0.1).save_pretrained(folder)
    labels = labelling.Labels(("a", "b", "c"), ("a", "b", "c"))
    cfg = configs.TrainConfig(
        base=folder, pooling="last" if family == "Qwen2" else "cls", rank=RANK, alpha=ALPHA, targets=("all-linear",)
    )
    ours = scramble(trained.new_classifier(cfg, labels, tokenizer, CPU, "fp32").eval(), 0.1, trained_only=True)
    assert ours.adapter.saved == (("score",) if family == "Qwen2" else ("classifier", "bert.pooler"))
    (tmp_path / "save").mkdir()
    trained.write_classifier(tmp_path / "save", ours, tokenizer, labels)
    auto = peft.AutoPeftModelForSequenceClassification
    theirs = auto.from_pretrained(tmp_path / "save", num_labels=CLASSES).eval()
    equal_and_moved(ours, alone(theirs, "SEQ_CLS"))


def test_configs_of_older_and_of_half_precision_adapters(base, tmp_path):
    """Keys that an older peft did not know have their defaults; bf16 tensors become fp32 without another change."""
    folder = base("Qwen2")
    theirs = in_peft(stock(folder, "SEQ_CLS"), "SEQ_CLS", target_modules=["q_proj", "v_proj"])
    scramble(theirs, 0.2, trained_only=True).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    oldest = "peft_type task_type base_model_name_or_path inference_mode r lora_alpha lora_dropout target_modules bias"
    old = {k: about[k] for k in [*oldest.split(), "fan_in_fan_out", "modules_to_save", "init_lora_weights"]}
    assert len(old) < len(about) - 10 and peft_format.read_adapter_config(old) == peft_format.read_adapter_config(about)
    tensors = checkpoint.load_tensors(tmp_path / "adapter_model.safetensors")
    half = {k: t.bfloat16() for k, t in tensors.items()}
    ours = [ours_on(folder, "SEQ_CLS", peft_format.read_adapter_config(old)) for _ in range(2)]
    peft_format.load_adapter_state(ours[0], half)
    peft_format.load_adapter_state(ours[1], {k: t.float() for k, t in half.items()})
    assert torch.equal(packed(ours[0]), packed(ours[1]))
    assert {p.dtype for p in ours[0].parameters()} == {torch.float32}


@pytest.mark.parametrize("start", [False, "gaussian", "orthogonal"])
def test_ways_to_begin_that_leave_the_base_alone_are_read(start, base, tmp_path):
    theirs = in_peft(stock(base("Llama"), "SEQ_CLS"), "SEQ_CLS", target_modules=["v_proj"], init_lora_weights=start)
    scramble(theirs, 0.2, trained_only=True).save_pretrained(tmp_path)
    about = json.loads((tmp_path / "adapter_config.json").read_text())
    assert about["init_lora_weights"] == start
    ours = ours_on(base("Llama"), "SEQ_CLS", peft_format.read_adapter_config(about))
    peft_format.load_adapter_state(ours, checkpoint.load_tensors(tmp_path / "adapter_model.safetensors"))
    equal_and_moved(ours, alone(theirs, "SEQ_CLS"))


@pytest.mark.parametrize("pattern, found", [("(layers|h)", [1]), ("(?:layers|h)", [1]), ("layers|h", [])])
def test_layers_pattern_may_be_any_regex_as_in_peft(pattern, found, base):
    """A group in it is none of ours, and a branch without a number is no layer."""
    model = stock(base("Qwen2"), "SEQ_CLS")
    words = {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": [pattern]}
    names = [f"model.layers.{i}.self_attn.q_proj" for i in found]
    if found:
        assert in_peft(copy.deepcopy(model), "SEQ_CLS", **words).base_model.targeted_module_names == names
        assert lora.find_targets(model, peft_format.read_adapter_config({"peft_type": "LORA", **words})) == names
    else:
        with pytest.raises(ValueError, match="No modules were targeted|not found in the base model"):
            in_peft(copy.deepcopy(model), "SEQ_CLS", **words)
        with pytest.raises(ValueError, match="targets .* leave no module to adapt"):
            lora.find_targets(model, peft_format.read_adapter_config({"peft_type": "LORA", **words}))


# ---------------------------------------------------------------------------------------------------------------------
# bit-equality in memory


BITS = {
    "embedding": ("Qwen2", {"targets": ("embed_tokens",)}),
    "embedding and linears, rslora": ("Qwen2", {"targets": ("embed_tokens", "o_proj", "up_proj"), "rslora": True}),
    "scaled embedding": ("Gemma3Text", {"targets": ("embed_tokens", "q_proj")}),
    "embedding with a padding row": ("Bert", {"targets": ("word_embeddings", "query"), "bias": "lora_only"}),
    "Conv1D": ("GPT2", {"targets": ("c_attn", "c_proj", "c_fc"), "bias": "lora_only"}),
    "Conv1D and embedding": ("GPT2", {"targets": ("c_attn", "wte", "wpe"), "rslora": True}),
    "patterns, rslora": ("Llama", variant("Llama", "patterns, rslora")),
    "patterns, bias all": ("GPT2", {**variant("GPT2", "patterns"), "targets": ("c_attn", "c_proj"), "bias": "all"}),
    "tied LM": ("Qwen2 LM", {"targets": ("embed_tokens", "lm_head"), "rank_pattern": {"lm_head": 2}}),
}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("case", BITS)
def test_logits_and_gradients_equal_those_of_peft_bit_for_bit(case, dropout, base):
    """The same weights and dropout masks on transformers' own model; and exactly the same tensors are trained."""
    family, fields = BITS[case]
    family, task = family.split()[0], "CAUSAL_LM" if family.endswith("LM") else "SEQ_CLS"
    whole = stock(folder_of(base, task, family, True), task)
    head = {"Bert": ("classifier",)}.get(family, ("score",)) if task == "SEQ_CLS" else ()
    theirs = in_peft(copy.deepcopy(whole), task, **peft_words(family, fields), lora_dropout=dropout)
    ours = whole
    lora.inject(ours, lora.Adapter(rank=RANK, alpha=ALPHA, dropout=dropout, saved=head, task=task, **fields))
    lora.train_only(ours)
    scramble(ours, 0.2, trained_only=True)
    named = {n.replace(".default", "").replace(".modules_to_save", ""): p for n, p in theirs.named_parameters()}
    named = {n: p for n, p in named.items() if p.requires_grad and ".original_module." not in n}
    state = peft_format.adapter_state(ours)
    assert named.keys() == state.keys()
    for key, p in named.items():
        p.data.copy_(state[key])
    with_our_masks(theirs)
    ids = torch.tensor([ROWS[2], [ROWS[0][0], 0, 0, *ROWS[2][3:]]])  # the padding row's id among them
    logits = []
    for model in (ours, theirs):
        model.train(dropout > 0)
        torch.manual_seed(7)
        logits.append(model(input_ids=ids, use_cache=False).logits if family != "Bert" else model(input_ids=ids).logits)
        logits[-1].square().sum().backward()
    assert torch.equal(*logits)
    for name, p in ours.named_parameters():
        if p.requires_grad:
            want = named[peft_format.PEFT_PREFIX + name].grad
            assert want.any() and torch.equal(p.grad, want), name
        else:
            assert p.grad is None, name


# ---------------------------------------------------------------------------------------------------------------------
# tied weights


TIED = lora.Adapter(
    ("embed_tokens", "lm_head", "q_proj"), RANK, ALPHA, rslora=True, rank_pattern={"lm_head": 2}, task="CAUSAL_LM"
)


@torch.no_grad()
@pytest.mark.parametrize("how", ["label words", "transformers"])
def test_updates_of_tied_weights_are_two_and_live_equals_merged_and_reloaded(how, base):
    """One storage, two updates (unsloth#9331: merged and live logits 5.9 apart). 1e-6 of the largest: one rounding."""
    folder = base("Qwen2", "CAUSAL_LM", tie_word_embeddings=True)

    def make():
        if how == "label words":
            return ours_on(folder, "CAUSAL_LM", TIED)
        model = stock(folder, "CAUSAL_LM")
        lora.inject(model, TIED)
        lora.train_only(model)
        return model

    def logits(model):
        return packed(model) if how == "label words" else model(input_ids=torch.tensor([ROWS[2]])).logits

    def near(got, want):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * float(want.abs().max()))

    model, again = scramble(make(), 0.2, trained_only=True), make()
    embedding, head = model.model.embed_tokens, model.lm_head
    assert embedding.base_layer.weight is head.base_layer.weight
    live, tied = logits(model), embedding.base_layer.weight.detach().clone()
    changes = {}
    for name, part in (("embedding", embedding), ("head", head)):
        part.enabled = False
        changes[name] = float((logits(model) - live).abs().max())
        part.enabled = True
    assert min(changes.values()) > 1e-2, changes  # each of the two updates counts
    peft_format.load_adapter_state(again, peft_format.adapter_state(model))
    assert torch.equal(logits(again), live)
    want = {"embedding": tied + embedding.delta(), "head": tied + head.delta()}
    assert lora.merge(model) == 2 + LAYERS
    got = {"embedding": model.model.embed_tokens.weight, "head": model.lm_head.weight}
    assert got["embedding"].data_ptr() != got["head"].data_ptr()
    for name in want:
        near(got[name], want[name])
    assert (got["embedding"] - got["head"]).abs().max() > 1e-2
    near(logits(model), live)


def test_a_merged_model_of_tied_weights_saves_both(base, tmp_path):
    """Its config no longer ties them, so transformers and ours read back what was scored."""
    model = ours_on(base("Qwen2", "CAUSAL_LM", tie_word_embeddings=True), "CAUSAL_LM", TIED)
    live = packed(scramble(model, 0.2, trained_only=True))
    lora.merge(model)
    checkpoint.save_tensors(tmp_path / "model.safetensors", {n: t.contiguous() for n, t in models.state(model).items()})
    config, folder = models.classifier_config(model, ("a", "b")), str(tmp_path)
    assert config["tie_word_embeddings"] is False
    checkpoint.save_json(tmp_path / "config.json", config)
    again = models.load_classifier(folder, models.Head(2, words=WORDS), CPU, torch.float32).eval()
    for got in (packed(again), alone(stock(folder, "CAUSAL_LM"), "CAUSAL_LM")):
        torch.testing.assert_close(got, live, rtol=0, atol=1e-5 * float(live.abs().max()))


# ---------------------------------------------------------------------------------------------------------------------
# what is refused: an adapter that fits small_base, and copies of it with one thing wrong


QV, SEQ_CLS = ["q_proj", "v_proj"], {"task_type": "SEQ_CLS"}
LORA = {"r": RANK, "lora_alpha": ALPHA, "target_modules": QV, **SEQ_CLS}
ASKED = [{"Question": "What is 2 + 2?"}, {"Question": "Solve x - 3 = 4."}]
A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.score.weight"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory, small_base) -> Path:
    """An adapter written by peft on small_base: 2 layers of q and v, and a head of 3 labels."""
    folder = tmp_path_factory.mktemp("good")
    write_with_peft(small_base, folder, peft.LoraConfig(**LORA))
    return folder


def write_with_peft(folder, out, config):
    torch.manual_seed(0)
    labels = {"num_labels": CLASSES} if config.task_type == "SEQ_CLS" else {}
    whole = AUTO[config.task_type].from_pretrained(folder, **labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scramble(peft.get_peft_model(whole, config), 0.1, trained_only=True)
        model.save_pretrained(out)


@pytest.fixture(scope="module")
def hollow(tmp_path_factory, small_base) -> str:
    """small_base with an empty file of weights: what is refused on it was refused before any weight was read."""
    return without_weights(small_base, tmp_path_factory.mktemp("hollow"))


def without_weights(folder, out, **config):
    shutil.copytree(folder, out, dirs_exist_ok=True)
    about = json.loads((Path(folder) / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**about, **config}))
    (out / "model.safetensors").write_bytes(b"")
    return str(out)


@pytest.fixture
def adapter(good, tmp_path) -> Path:
    """A copy of the good adapter, to be spoiled."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@contextmanager
def bounded(megabytes=600, seconds=60):
    """No hostile file may take more memory or time than this: MemoryError or TimeoutError instead of a lost machine."""
    statm = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if statm.exists():
        now = int(statm.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20, hard))

    def stop(number, frame):
        raise TimeoutError(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def look(base, adapter, **flags):
    """What infer.py does with the headers, before any weight is loaded; a base's file is mapped, which is no memory."""
    mapped = sum(path.stat().st_size for path in Path(base).glob("*.safetensors")) // 2**20
    with bounded(600 + 2 * mapped):
        return foreign.given_model(configs.InferConfig(base=str(base), adapter=str(adapter), **flags))


def one_line(error):
    """The text of an error that a user sees: one line, not a page of it."""
    text = str(error.value)
    assert len(text.splitlines()) == 1, text[:300]
    assert len(text) < 20_000, text[:300]
    return text


def edit(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_good_adapter_is_good(good, small_base, hollow, capsys):
    """So that what follows is refused for its one fault: it loads, moves the logits, and needs weights to do so."""
    given = look(small_base, good)
    assert given.labels.names == ("0", "1", "2")
    run = foreign.load_given(given, WORLD)
    report = capsys.readouterr().out
    assert "9 tensors matched (4 lora_A, 4 lora_B, 1 whole tensors) on 2 q_proj, 2 v_proj" in report
    assert evaluate._probe(run, ASKED, run.logits(ASKED)[0]) > 1e-3
    with pytest.raises(UserError, match="its weights cannot be loaded"):
        foreign.load_given(look(hollow, good), WORLD)


UNSUPPORTED = {
    "use_dora": True,
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2], [1, 2]],
    "target_parameters": ["mlp.weight"],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [5],
    "arrow_config": {"top_k": 3},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"a": 1},
    "kasa_config": {"a": 1},
    "ensure_weight_tying": True,
    "a_key_of_tomorrow": 3,
}
VALUES_REFUSED = {
    "peft_type": ["IA3", "PROMPT_TUNING", "LOHA", "ADALORA", None],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"],
}


REFUSED = [*UNSUPPORTED.items(), *((k, v) for k, values in VALUES_REFUSED.items() for v in values)]


@pytest.mark.parametrize("key, value", REFUSED, ids=[f"{k} {v}" for k, v in REFUSED])
def test_a_setting_that_cannot_be_honoured_is_named_with_the_way_out(key, value, adapter, hollow):
    """Before any weight is loaded. The same key without a value changes nothing."""
    edit(adapter, **{key: value})
    with pytest.raises(UserError, match=f"^--adapter .*: {key} .*merge_and_unload") as e:
        look(hollow, adapter)
    one_line(e)
    if key in UNSUPPORTED:
        edit(adapter, **{key: False if value is True else None})
        look(hollow, adapter)


IA3 = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], **SEQ_CLS}
WRITTEN = {
    "use_dora True": peft.LoraConfig(use_dora=True, **LORA),
    "lora_bias True": peft.LoraConfig(lora_bias=True, **LORA),
    "trainable_token_indices": peft.LoraConfig(trainable_token_indices=[3, 5], **LORA),
    "init_lora_weights pissa": peft.LoraConfig(init_lora_weights="pissa", **LORA),
    "layer_replication": peft.LoraConfig(layer_replication=[[0, 2], [1, 2]], **LORA),
    "peft_type IA3": peft.IA3Config(**IA3),
    "peft_type LOHA": peft.LoHaConfig(r=RANK, alpha=ALPHA, target_modules=QV, **SEQ_CLS),
    "peft_type PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=2, **SEQ_CLS),
}


@pytest.mark.parametrize("said", WRITTEN)
def test_files_that_peft_writes_for_other_methods_are_refused_by_name(said, small_base, hollow, tmp_path):
    """DoRA, IA3 and the like, as peft itself saves them."""
    write_with_peft(small_base, tmp_path, copy.deepcopy(WRITTEN[said]))
    with pytest.raises(UserError, match=f"^--adapter .*{said}.*merge_and_unload") as e:
        look(hollow, tmp_path)
    one_line(e)


def test_a_pickled_adapter_is_never_read(small_base, hollow, tmp_path):
    model = peft.get_peft_model(AUTO["SEQ_CLS"].from_pretrained(small_base), peft.LoraConfig(**LORA))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(UserError, match="a pickle such as adapter_model.bin is never read.*save_pretrained") as e:
        look(hollow, tmp_path)
    one_line(e)


# ---------------------------------------------------------------------------------------------------------------------
# hostile adapters


def raw(header, content=b"", size=None):
    """The bytes of a safetensors file with this header, a dict or bytes; size: what it says the header's length is."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if size is None else size) + header + content


def entry(start, end, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


def crowd(content, count=100_000):
    """The same file with so many tiny tensors more."""
    start = 8 + struct.unpack("<Q", content[:8])[0]
    header, end = json.loads(content[8:start]), len(content) - start
    more = {f"x.{i}": entry(end + 4 * i, end + 4 * i + 4) for i in range(count)}
    return raw({**header, **more}, content[start:] + bytes(4 * count))


def zipped(content):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("adapter_model/data.pkl", content)
    return out.getvalue()


def pickled(content):
    out = io.BytesIO()
    torch.save({"a": torch.ones(2)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def without(*names):
    return lambda tensors: {k: t for k, t in tensors.items() if k not in names}


def put(name, tensor):
    return lambda tensors: tensors | {name: tensor}


def rename(old, new):
    return lambda tensors: {re.sub(old, new, k): t for k, t in tensors.items()}


def replaced(name, make):
    """make(path, kept): something else in the place of a file, which is kept outside of the folder."""

    def spoil(folder):
        kept = folder.parent / f"kept {name}"
        shutil.move(folder / name, kept)
        make(folder / name, kept)

    return spoil


NOT_SAFE = r"adapter_model\.safetensors: .*; if it was downloaded, it is damaged or incomplete: download it again"
FIT = "the adapter does not fit this model: "
BYTES = {  # what becomes of the bytes of the weights: refused as no safetensors file
    "truncated": lambda b: b[:-100],
    "cut in the header": lambda b: b[:40],
    "cut to its first bytes": lambda b: b[:5],
    "empty": lambda b: b"",
    "more bytes than tensors": lambda b: b + b"more",
    "huge header": lambda b: struct.pack("<Q", 2**62) + b[8:],
    "header beyond the file": lambda b: struct.pack("<Q", 50_000_000) + b[8:],
    "header no JSON": lambda b: raw(b"{nonsense" * 9),
    "header 100,000 deep": lambda b: raw(b"[" * 100_000),
    "header a list": lambda b: raw([1, 2]),
    "overlapping offsets": lambda b: raw({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"),
    "a hole in the offsets": lambda b: raw({"a": entry(4, 8)}, b"12345678"),
    "offsets beyond the file": lambda b: raw({"a": entry(0, 4 * 10**9, (10**9,))}, b"1234"),
    "negative offsets": lambda b: raw({"a": entry(-4, 0)}, b"1234"),
    "shape against offsets": lambda b: raw({"a": entry(0, 4, (9, 9))}, b"1234"),
    "shape beyond 64 bits": lambda b: raw({"a": entry(0, 4, (2**63, 2**63))}, b"1234"),
    "a type of no tensor": lambda b: raw({"a": entry(0, 4) | {"dtype": "OBJECT"}}, b"1234"),
    "zip": zipped,
    "pickle": pickled,
}
TENSORS = {  # what becomes of the tensors, and what is said
    "none": (lambda t: {}, "the classes are not known"),
    "one missing": (without(A0), FIT + rf"1 missing tensors \({A0}\)"),
    "head missing": (without(HEAD), "the classes are not known"),
    "one more": (put("x", torch.ones(2)), FIT + r"1 unexpected tensors \(x\)"),
    "renamed": (rename("q_proj", "k_proj"), FIT + "4 missing tensors .*; 4 unexpected tensors .*k_proj"),
    "transposed": (lambda t: t | {A0: t[A0].T.contiguous()}, FIT + rf"{A0} has shape \(32, 4\), expected \(4, 32\)"),
    "another rank": (lambda t: t | {A0: t[A0][:2]}, FIT + rf"{A0} has shape \(2, 32\), expected \(4, 32\)"),
    "empty": (put(A0, torch.zeros(0, 32)), FIT + rf"{A0} has shape \(0, 32\), expected \(4, 32\)"),
    "head of no dimension": (put(HEAD, torch.zeros(())), "score.weight|the classes are not known"),
    "head of 10^12 labels": (put(HEAD, torch.zeros(10**12, 0)), "score.weight"),
    "a name of two lines": (put("x\ny", torch.ones(2)), FIT + "1 unexpected tensors"),
    "a name of 5,000 letters": (put("x" * 5000, torch.ones(2)), FIT + "1 unexpected tensors"),
}
GONE, NO_FILE = f"no {WEIGHTS} there", "is not a file of this folder"
PLACES = {  # what becomes of the files themselves
    "link out of the folder as weights": (replaced(WEIGHTS, lambda p, kept: p.symlink_to(kept)), "a link out of it"),
    "link out of the folder as config": (replaced(CONFIG, lambda p, kept: p.symlink_to(kept)), "a link out of it"),
    "link to nothing": (replaced(WEIGHTS, lambda p, kept: p.symlink_to("nothing")), GONE),
    "link to itself": (replaced(WEIGHTS, lambda p, kept: p.symlink_to(p.name)), GONE),
    "device as weights": (replaced(WEIGHTS, lambda p, kept: p.symlink_to("/dev/zero")), NO_FILE),
    "folder as weights": (replaced(WEIGHTS, lambda p, kept: p.mkdir()), NO_FILE),
    "folder as config": (replaced(CONFIG, lambda p, kept: p.mkdir()), NO_FILE),
    "FIFO as config": (replaced(CONFIG, lambda p, kept: os.mkfifo(p)), NO_FILE),
    "no config": (replaced(CONFIG, lambda p, kept: None), f"no {CONFIG} there"),
}
TEXTS = {  # an adapter_config.json that is none
    "empty": (b"", "Expecting value"),
    "no JSON": (b"r: 8\nalpha: 16\n", "Expecting value"),
    "cut short": (b'{"peft_type": "LORA", "r": 8', "delimiter"),
    "no text": (b"\xff\xfe\xfa\x00{", "decode"),
    "a list": (b'["LORA"]', "expected an object, got list"),
    "a number": (b"NaN", "expected an object, got float"),
    "10,000 deep": (b'{"r":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "recursion"),
    "10,000 brackets": (b"[" * 10_000, "recursion"),
    "a number of 5,000 digits": (b'{"r": ' + b"9" * 5000 + b"}", "digits"),
}
VALUES = {  # settings that are not valid, and what is said
    "r 0": ({"r": 0}, "r 0: expected a whole number from 1"),
    "r -4": ({"r": -4}, "r -4: expected a whole number from 1"),
    "r true": ({"r": True}, "r True: expected a whole number from 1"),
    "r in quotes": ({"r": "8"}, "r 8: expected a whole number from 1"),
    "r 4.5": ({"r": 4.5}, "r 4.5: expected a whole number from 1"),
    "r 10^6": ({"r": 10**6}, FIT + r".*shape \(4, 32\), expected \(1000000, 32\)"),
    "r 10^6 by a pattern": ({"rank_pattern": {"q_proj": 10**6}}, FIT + r".*expected \(1000000, 32\)"),
    "r 10^9": ({"r": 10**9}, "r 1000000000: expected a whole number from 1"),
    "r 10^9 by a pattern": ({"rank_pattern": {"q_proj": 10**9}}, "rank_pattern .*: expected ranks by regex"),
    "r 10^18": ({"r": 10**18}, "r 1000000.*: expected a whole number from 1"),  # torch itself raises RuntimeError here,
    "r 10^30": ({"r": 10**30}, "r 1000000.*: expected a whole number from 1"),  # here TypeError,
    "r 10^400": ({"r": 10**400}, "r 1000000.*: expected a whole number from 1"),  # and math.isfinite OverflowError
    "alpha 10^400": ({"lora_alpha": 10**400}, "lora_alpha 1000000.*: expected a finite number"),
    "alpha 10^308": ({"lora_alpha": 1e308}, r"lora_alpha 1e\+308: expected a finite number"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha nan: expected a finite number"),
    "alpha inf": ({"lora_alpha": float("inf")}, "lora_alpha inf: expected a finite number"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha 0: expected a finite number that is not 0"),
    "alpha a list": ({"lora_alpha": [6]}, r"lora_alpha \[6\]: expected a finite number"),
    "alpha 0 by a pattern": ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern .*: expected alphas by regex"),
    "negative layers": ({"layers_to_transform": [-1]}, r"layers_to_transform \[-1\]: expected layer numbers"),
    "layers in quotes": ({"layers_to_transform": "1"}, "layers_to_transform 1: expected layer numbers"),
    "layers that are not there": ({"layers_to_transform": [7]}, "targets .* leave no module to adapt"),
    "bad regex of layers": ({"layers_to_transform": [1], "layers_pattern": ["("]}, "layers_pattern"),
    "flags in a regex of ranks": ({"rank_pattern": {"(?i)q_proj": 4}}, "rank_pattern"),
    "endless regex of targets": (
        {"target_modules": "([a-z_.0-9]+)+!"},
        "target_modules .*: expected a list of names or a re",
    ),
    "endless regex of ranks": ({"rank_pattern": {"([a-z_.0-9]+)+!": 4}}, "rank_pattern"),
    "bad regex of targets": ({"target_modules": "(q_proj"}, "target_modules .q_proj: expected a list of names or a re"),
    "bad regex of ranks": ({"rank_pattern": {"(q": 4}}, "rank_pattern .*: expected ranks by regex"),
    "bad regex of exclusions": ({"exclude_modules": "["}, "exclude_modules .: expected a list of names or a regex"),
    "unknown key": ({"surprise": {"a": 1}}, "surprise .* is not supported"),
    "key of two lines": ({"a\nb": "c\nd"}, "is not supported"),
    "bias of two lines": ({"bias": "a\nb"}, "expected none, lora_only or all"),
    "method of two lines": ({"peft_type": "a\nb"}, "only LORA is read"),
    "start of two lines": ({"init_lora_weights": "a\nb"}, "init_lora_weights"),
    "target of two lines": ({"target_modules": ["a\nb"]}, "matches no module"),
    "start of 5,000 letters": ({"init_lora_weights": "x" * 5000}, "init_lora_weights"),
    "targets empty": ({"target_modules": []}, r"target_modules \[\]: expected a list of names or a regex"),
    "targets null": ({"target_modules": None}, "target_modules .*: expected a list of names or a regex"),
    "targets an empty string": ({"target_modules": ""}, "target_modules : expected a list of names or a regex"),
    "targets a number": ({"target_modules": 7}, "target_modules 7: expected a list of names or a regex"),
    "targets numbers": ({"target_modules": [1, 2]}, r"target_modules \[1, 2\]: expected a list of names"),
    "targets an object": ({"target_modules": {"q_proj": 1}}, "target_modules .*: expected a list of names"),
    "a target that is not there": ({"target_modules": [*QV, "wte"]}, "target wte matches no module: the linears here"),
    "a target that is a block": (
        {"target_modules": ["self_attn"]},
        "is not a linear or an embedding but Qwen2Attention",
    ),
    "100,000 targets": ({"target_modules": [f"x{i}" for i in range(100_000)]}, "matches no module"),
    "everything excluded": ({"exclude_modules": QV}, "targets .* leave no module to adapt"),
    "saved modules not there": ({"modules_to_save": ["heart"]}, "modules_to_save heart matches no module"),
    "saved modules a string": ({"modules_to_save": "score"}, "modules_to_save score: expected a list of names"),
    "bias of another name": ({"bias": "some"}, "bias some: expected none, lora_only or all"),
    "dropout 1.5": ({"lora_dropout": 1.5}, "lora_dropout 1.5: expected a share"),
    "rslora yes": ({"use_rslora": "yes"}, "use_rslora yes: expected true or false"),
    "ranks a list": ({"rank_pattern": [4]}, r"rank_pattern \[4\]: expected ranks by regex"),
    "base a number": ({"base_model_name_or_path": 7}, "base_model_name_or_path 7: expected a name"),
}


def spoiled_bytes(change):
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def spoiled_tensors(change):
    return lambda folder: checkpoint.save_tensors(folder / WEIGHTS, change(checkpoint.load_tensors(folder / WEIGHTS)))


def spoiled_values(changes):
    return lambda folder: edit(folder, **changes)


def written(content):
    return lambda folder: (folder / CONFIG).write_bytes(content)


SEEN = {
    **{f"bytes: {k}": (spoiled_bytes(v), Untrusted, NOT_SAFE) for k, v in BYTES.items()},
    **{f"tensors: {k}": (spoiled_tensors(v), UserError, words) for k, (v, words) in TENSORS.items()},
    "tensors: 100,000 more": (
        spoiled_bytes(crowd),
        UserError,
        FIT + r"100000 unexpected tensors \(x.0, x.1, x.10 and 9",
    ),
    **{f"files: {k}": (v, UserError, words) for k, (v, words) in PLACES.items()},
    **{f"config: {k}": (written(v), Untrusted, words) for k, (v, words) in TEXTS.items()},
    **{f"values: {k}": (spoiled_values(v), UserError, words) for k, (v, words) in VALUES.items()},
}


@pytest.mark.parametrize("case", SEEN)
def test_a_hostile_adapter_is_refused_before_any_weight_is_loaded(case, adapter, hollow):
    """In one line, with what is wrong; the base's weights are an empty file here, so they cannot have been read."""
    spoil, error, words = SEEN[case]
    spoil(adapter)
    with pytest.raises(error, match=words) as e:
        look(hollow, adapter)
    one_line(e)


BASES = {
    "../../../etc": "no config.json|no such folder",
    "/etc": "no config.json in this folder",
    "/nowhere/at/all": "no such folder",
    "~root/base": "could not be loaded|no such folder",
    "https://example.com/a/b": "no such folder",
    "nobody/has-this-name": "could not be loaded",
    "a\0b": "could not be loaded|no such folder",
    "a\nb/c": "could not be loaded|no such folder",
    "x" * 5000: "could not be loaded|no such folder",
    "": "--base",
}


@pytest.mark.parametrize("name", BASES, ids=lambda name: repr(name[:25]))
def test_the_base_that_an_adapter_names_is_looked_for_and_never_trusted(name, adapter):
    """A path-like name climbs nowhere by itself: it is a folder with a base in it, a hub name, or an error."""
    edit(adapter, base_model_name_or_path=name)
    with pytest.raises(UserError, match=BASES[name]) as e:
        look("", adapter)
    one_line(e)


def times(factor, part):
    return spoiled_tensors(lambda tensors: {k: t * factor if part in k else t for k, t in tensors.items()})


def cast(dtype):
    return spoiled_tensors(lambda tensors: tensors | {A0: tensors[A0].to(dtype)})


DAMAGED = Untrusted
ZERO = "every update is zero; the adapter was never trained"
LOADED = {  # in values only: what spoils the good adapter, the error, its words
    "int64": (cast(torch.int64), DAMAGED, rf"{A0} has dtype torch.int64, expected floating point"),
    "bool": (cast(torch.bool), DAMAGED, rf"{A0} has dtype torch.bool, expected floating point"),
    "complex": (cast(torch.complex64), DAMAGED, rf"{A0} has dtype torch.complex64, expected floating point"),
    "float8": (cast(torch.float8_e4m3fn), DAMAGED, "[Ff]loat8"),
    "NaN": (times(float("nan"), A0), DAMAGED, f"{A0} holds values that are not finite"),
    "inf": (times(float("inf"), A0), DAMAGED, f"{A0} holds values that are not finite"),
    "NaN in the head": (times(float("nan"), HEAD), DAMAGED, f"{HEAD} holds values that are not finite"),
    "finite in fp64 alone": (spoiled_tensors(lambda t: t | {A0: t[A0].double() * 1e300}), DAMAGED, "not finite"),
    "every B zero": (times(0, "lora_B"), DAMAGED, ZERO),
    "every A zero": (times(0, "lora_A"), DAMAGED, ZERO),
    "too small to matter": (times(1e-30, "lora_B"), Degenerate, "does not move the logits"),
    "finite with a product that is not": (times(1e25, "lora_"), Degenerate, "scores that are not finite"),
}


@pytest.mark.parametrize("case", LOADED)
def test_hostile_values_are_refused_once_they_are_loaded(case, adapter, small_base):
    """By the loader, or by the preflight where only the logits tell."""
    spoil, error, words = LOADED[case]
    spoil(adapter)
    given = look(small_base, adapter)
    with pytest.raises(error, match=words) as e, bounded():
        evaluate.preflight(foreign.load_given(given, WORLD), ASKED, None, 4096)
    one_line(e)


OTHERS = {
    "wider": ({"hidden_size": 48}, {}, FIT + r".*has shape \(4, 32\), expected \(4, 48\)"),
    "more layers": (
        {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        {},
        FIT + r"4 missing tensors \(.*layers\.2\.",
    ),
    "fewer layers": (
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
        {},
        FIT + r"4 unexpected tensors \(.*layers\.1\.",
    ),
    "narrower keys": (
        {"num_key_value_heads": 1},
        {},
        FIT + r".*v_proj.lora_B.weight has shape \(16, 4\), expected \(8",
    ),
    "more labels": ({}, {"label_names": ("a", "b", "c", "d")}, FIT + r".*shape \(3, 32\), expected \(4, 32\)"),
    "fewer labels": ({}, {"label_names": ("a", "b")}, FIT + r".*score.weight has shape \(3, 32\), expected \(2, 32\)"),
    "label words": ({}, {"head": "label_words", "label_names": ("yes", "no")}, FIT + r"1 unexpected .*score.weight"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_an_adapter_of_another_base_or_head_is_refused_with_what_differs(case, good, small_base, tmp_path):
    """From its config and the headers alone."""
    config, flags, words = OTHERS[case]
    other = without_weights(small_base, tmp_path / "other", **config)
    with pytest.raises(UserError, match=words) as e:
        look(other, good, **flags)
    one_line(e)


def test_an_adapter_without_a_head_is_not_given_a_random_one(small_base, tmp_path):
    """A CAUSAL_LM adapter on a bare LM scores words; a linear head is nowhere, and nothing is made up."""
    write_with_peft(small_base, tmp_path, peft.LoraConfig(**{**LORA, "task_type": "CAUSAL_LM"}))
    words = {"head": "label_words", "label_names": ("yes", "no")}
    run = foreign.load_given(look(small_base, tmp_path, **words), WORLD)
    assert evaluate._probe(run, ASKED, run.logits(ASKED)[0]) > 1e-3
    with pytest.raises(
        UserError, match=r"1 tensors of the head \(score.weight\) are neither in the base nor in the"
    ) as e:
        foreign.load_given(look(small_base, tmp_path, label_names=("yes", "no")), WORLD)
    one_line(e)
    with pytest.raises(UserError, match="the classes are not known: name them with --label_names"):
        look(small_base, tmp_path)


def test_an_adapter_of_another_family_is_refused_by_its_names(good, small_base, tmp_path):
    other = tmp_path / "other"
    transformers.BertConfig(**{**SIZES, "vocab_size": 4096}).save_pretrained(other)
    tokenizer_of_tiny().save_pretrained(other)
    (other / "model.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match="target [qv]_proj matches no module.*the linears here are dense, key, query"
    ) as e:
        look(other, good)
    one_line(e)


def test_names_of_adapters_that_lead_nowhere(good, hollow, tmp_path):
    """No folder, a file, a hub name that is could not be loaded, and an adapter in the place of the base."""
    for name in (tmp_path / "nothing", good / WEIGHTS, "nobody/has-this-name", "../..", "\0", "x" * 5000):
        with pytest.raises(UserError, match="^--adapter .*") as e:
            look(hollow, name)
        one_line(e)
    with pytest.raises(UserError, match="an adapter goes to --adapter, with its base here") as e:
        look(good, good)
    one_line(e)


class Trap:
    """Its pickle leaves a mark when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_pickle_beside_the_weights_is_ignored(adapter, small_base, tmp_path):
    mark = tmp_path / "the pickle was loaded"
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt", "pytorch_model.bin"):
        torch.save(Trap(mark), adapter / name)
    run = foreign.load_given(look(small_base, adapter), WORLD)
    assert evaluate._probe(run, ASKED, run.logits(ASKED)[0]) > 1e-3 and not mark.exists()
    torch.load(adapter / "adapter_model.bin", weights_only=False)
    assert mark.exists()  # the trap works


def test_the_tokenizer_of_an_adapter_must_fit_the_base_and_be_one(adapter, hollow):
    """It takes the place of the base's: one with more tokens than the base has rows, or a damaged one, is refused."""
    tokenizer = tokenizer_of_tiny()
    tokenizer.save_pretrained(adapter)
    look(hollow, adapter)
    tokenizer.add_tokens([f"<more {i}>" for i in range(9)])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(UserError, match="its tokenizer has .* tokens for .* embeddings") as e:
        look(hollow, adapter)
    one_line(e)
    for content in ("{}", "", '{"version": "1.0", "model": {"type": "BPE"}}', "[" * 10_000, "7"):
        (adapter / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match="tokenizer") as e:
            look(hollow, adapter)
        one_line(e)


def test_the_command_does_not_wait_for_a_fifo(adapter, hollow, tmp_path, command):
    """Nobody writes into it: opening it would wait for ever. Status 2 and one line, and nothing is written."""
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)
    rows, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    rows.write_text("Question\nWhat is 2 + 2?\n")
    flags = ["--base", hollow, "--adapter", adapter, "--input", rows, "--output", out]
    status, _, err = command("infer.py", *flags, timeout=120)
    assert status == 2 and err.startswith("error: --adapter ") and err.count("\n") == 1, err
    assert f"{WEIGHTS} is not a file of this folder" in err and not out.exists()


def test_at_least_forty_hostile_adapters():
    assert len(SEEN) + len(LOADED) + len(BASES) + len(OTHERS) >= 40


# ---------------------------------------------------------------------------------------------------------------------
# real adapters, on random bases of their true shape and a small vocabulary


QWEN = dict(
    hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
    tie_word_embeddings=True, pad_token_id=0, bos_token_id=None, eos_token_id=0,
)  # fmt: skip
ROBERTA = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=514)
MATH = "adapters/SGOD-UTH_qwen2.5-0.5b_r8_math-latex"
FOUR = "adapters/fzinnah17_roberta_seqcls_r4"
CUT = "adapters/yongshuaiy_qwen2.5-vl-7b_truncated"


def of_shape(folder, kind, weights, **sizes):
    """A base's folder: its config and a tokenizer, and bf16 weights drawn in blocks, or an empty file of them."""
    tokenizer = tokenizer_of_tiny()
    tokenizer.save_pretrained(folder)
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **sizes)
    if not weights:
        config.save_pretrained(folder)
        (folder / "model.safetensors").write_bytes(b"")
        return folder
    auto = transformers.AutoModelForCausalLM if kind == "Qwen2" else transformers.AutoModel
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    block = 0.02 * torch.randn(65_537, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.data.fill_(float("norm" in name.lower() and name.endswith("weight")))
        else:
            p.data.copy_(block.repeat(-(-p.numel() // len(block)))[: p.numel()].view_as(p))
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def big(tmp_path):
    """A folder that is gone after the test: hundreds of megabytes."""
    folder = tmp_path / "big"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_real_qwen_adapter_loads_on_its_shape_and_moves_the_logits(shared, big, capsys):
    """All of its 96 tensors: A and B of q and v in 24 layers. It has no head, so label words are read."""
    base = of_shape(big, "Qwen2", True, **QWEN)
    given = look(base, shared / MATH, head="label_words", label_names=("yes", "no"))
    run = foreign.load_given(given, WORLD)
    report = capsys.readouterr().out
    assert "96 tensors matched (48 lora_A, 48 lora_B) on 24 q_proj, 24 v_proj" in report and "zero" not in report
    assert "the adapter was trained on Qwen/Qwen2.5-0.5B, not on" in report
    tensors = checkpoint.load_tensors(shared / MATH / WEIGHTS)
    assert len(tensors) == 96 and all(
        torch.equal(t, tensors[k]) for k, t in peft_format.adapter_state(run.model).items()
    )
    assert evaluate._probe(run, ASKED, run.logits(ASKED)[0]) > 1e-3


OTHER_SHAPES = {
    "fewer layers": ("Qwen2", {"num_hidden_layers": 12}, FIT + r"48 unexpected tensors \(.*layers\.12\."),
    "more layers": ("Qwen2", {"num_hidden_layers": 28}, FIT + r"16 missing tensors \(.*layers\.24\."),
    "wider": (
        "Qwen2", {"hidden_size": 1536, "num_attention_heads": 12}, FIT + r".*shape \(8, 896\), expected \(8, 1536\)"
    ),
    "more key heads": ("Qwen2", {"num_key_value_heads": 14}, FIT + r".*v_proj.lora_B.weight has shape \(128, 8\)"),
    "other names": ("GPT2", {"n_embd": 896, "n_layer": 24, "n_head": 14}, "target [qv]_proj matches no.*c_attn"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_the_real_qwen_adapter_is_refused_on_another_base(case, shared, tmp_path):
    """Other layers, widths or names: said from the headers, before any weight (an empty file here) is read."""
    kind, changes, words = OTHER_SHAPES[case]
    base = of_shape(tmp_path, kind, False, **{**(QWEN if kind == "Qwen2" else {}), **changes})
    with pytest.raises(UserError, match=words) as e:
        look(base, shared / MATH, head="label_words", label_names=("yes", "no"))
    one_line(e)


def test_the_real_roberta_adapter_brings_its_head(shared, big, capsys):
    """4 labels on a bare RoBERTa: every tensor of the file is in the model, the classifier with them."""
    base = of_shape(big, "Roberta", True, **ROBERTA)
    given = look(base, shared / FOUR)
    assert given.labels.names == ("0", "1", "2", "3") and given.config.pooling == "cls"
    run = foreign.load_given(given, WORLD)
    report = capsys.readouterr().out
    tensors = checkpoint.load_tensors(shared / FOUR / WEIGHTS)
    state = peft_format.adapter_state(run.model)
    assert f"{len(tensors)} tensors matched (36 lora_A, 36 lora_B, 4 whole tensors)" in report
    assert state.keys() == tensors.keys() and all(torch.equal(t.float(), state[k]) for k, t in tensors.items())
    assert {k for k in tensors if "classifier" in k} == {
        f"base_model.model.classifier.{m}.{p}" for m in ("dense", "out_proj") for p in ("weight", "bias")
    }
    assert evaluate._probe(run, ASKED, run.logits(ASKED)[0]) > 1e-3
    (first, second) = run.predict([row["Question"] for row in ASKED])
    assert len(first["probabilities"]) == 4 and first["logits"] != second["logits"]
    with pytest.raises(UserError, match=r"out_proj\.(weight|bias) has shape .*4.*, expected .*2") as e:
        look(base, shared / FOUR, label_names=("yes", "no"))
    one_line(e)


def test_the_real_truncated_adapter_is_refused_in_one_line(shared, hollow, tmp_path, command):
    """As a user meets it: status 3, no traceback, and what to do."""
    with pytest.raises(Untrusted, match=NOT_SAFE) as e:
        look(hollow, shared / CUT)
    one_line(e)
    rows = tmp_path / "rows.csv"
    rows.write_text("Question\nWhat is 2 + 2?\n")
    status, _, err = command("infer.py", "--base", hollow, "--adapter", shared / CUT, "--input", rows, timeout=120)
    assert status == 3 and err.startswith("error: ") and err.count("\n") == 1 and "download it again" in err, err
