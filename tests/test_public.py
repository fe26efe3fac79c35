"""Public bases and adapters as they are found, wrapped, emptied or half downloaded: right, or one line."""

import json
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from test_generate import adapter_on, tokenizer_with
from transformers import AutoTokenizer

import bases
import checkpoint
import ddp
import foreign
import peft_format
import prompts
import trained
from configs import CptConfig
from errors import Degenerate, Untrusted, UserError

WORLD = ddp.World(0, 1, torch.device("cpu"))
PREFIX = "base_model.model."
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def base(small_base, tmp_path) -> Path:
    return Path(shutil.copytree(small_base, tmp_path / "base"))


@pytest.fixture
def adapter(small_base, tmp_path) -> Path:
    return Path(adapter_on(tmp_path / "adapter", small_base))


def opened(base, adapter=None):
    """(the language model, the report) as generate.py and infer.py --export open them."""
    folder = bases.find_adapter(str(adapter)) if adapter else None
    given = foreign.given_writer(CptConfig(base=str(base)), folder)
    return foreign.load_writer(given, WORLD, "fp32")


def changed_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def changed_tensors(path: Path, change) -> None:
    checkpoint.save_tensors(path, change(checkpoint.load_tensors(path)))


# ---- adapters -------------------------------------------------------------------------------------------------------


WRAPPED = {  # how a key is found
    "compiled": lambda key: key.replace(PREFIX, PREFIX + "_orig_mod."),
    "compiled, outside": lambda key: "_orig_mod." + key,
    "compiled layers": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "FSDP": lambda key: key.replace(PREFIX, PREFIX + "_fsdp_wrapped_module."),
    "activation checkpointing": lambda key: key.replace(".mlp", "._checkpoint_wrapped_module.mlp"),
    "DDP": lambda key: "module." + key,
    "DDP in DDP, compiled": lambda key: "module.module._orig_mod." + key,
    "prefix twice": lambda key: PREFIX + key,
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_names_of_wrappers_are_no_part_of_a_key(case, small_base, adapter):
    """Set equality of the keys, and every value of the adapter, with those of the plain file."""
    path = adapter / "adapter_model.safetensors"
    plain = checkpoint.load_tensors(path)
    changed_tensors(path, lambda tensors: {WRAPPED[case](key): value for key, value in tensors.items()})
    lm, _ = opened(small_base, adapter)
    loaded = peft_format.adapter_state(lm)
    assert loaded.keys() == plain.keys() and all(torch.equal(loaded[key], plain[key]) for key in plain)


def test_two_keys_of_one_tensor_are_refused(small_base, adapter):
    path = adapter / "adapter_model.safetensors"
    changed_tensors(path, lambda tensors: tensors | {"module." + key: value + 1 for key, value in tensors.items()})
    with pytest.raises(UserError, match="and another key name the same tensor"):
        opened(small_base, adapter)


def emptied(tensors, part=""):
    return {key: value.new_zeros(0) if part in key else value for key, value in tensors.items()}


TENSORS = {  # what is done to the tensors of an adapter -> what is said
    "ZeRO-3": (emptied, "12 tensors are empty .*ZeRO-3"),
    "ZeRO-3, a part": (lambda tensors: emptied(tensors, "layers.1.mlp"), "2 tensors are empty .*ZeRO-3"),
    "resized embedding": (
        lambda tensors: tensors | {PREFIX + "model.embed_tokens.weight": torch.zeros(4099, 32)},
        r"embed_tokens.weight has 4,099 rows, the base's vocabulary 4,096.*AutoPeftModelForCausalLM",
    ),
    "resized head": (
        lambda tensors: tensors | {PREFIX + "lm_head.weight": torch.zeros(4000, 32)},
        r"lm_head.weight has 4,000 rows, the base's vocabulary 4,096",
    ),
    "NaN": (lambda tensors: {key: value * float("nan") for key, value in tensors.items()}, "not finite"),
    "int64": (lambda tensors: {key: value.long() for key, value in tensors.items()}, "has dtype torch.int64"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_damaged_tensors_of_an_adapter_are_named(case, small_base, adapter):
    change, words = TENSORS[case]
    changed_tensors(adapter / "adapter_model.safetensors", change)
    with pytest.raises((UserError, Untrusted), match=words) as e:
        opened(small_base, adapter)
    assert "\n" not in str(e.value) and len(str(e.value)) < 1500


def test_an_added_token_in_the_tokenizer_of_an_adapter_is_refused_with_the_reason(small_base, adapter):
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(adapter)
    with pytest.raises(UserError, match="4098 tokens for 4096 embeddings .*resized base"):
        opened(small_base, adapter)


@pytest.mark.parametrize(
    "name, fits",
    [
        ("unsloth/base-bnb-4bit", True), ("unsloth/Base-unsloth-bnb-4bit", True), ("someone/base", True),
        ("unsloth/llama-3-8b-bnb-4bit", False), ("someone/base-4bit-of-another", False),
    ],
)  # fmt: skip
def test_an_adapter_of_a_4_bit_copy_is_taken_on_the_base_with_a_note(name, fits, base, adapter):
    changed_json(adapter / "adapter_config.json", base_model_name_or_path=name)
    given = foreign.given_writer(CptConfig(base=str(base)), adapter)
    if not fits:
        with pytest.raises(Degenerate, match="the adapter was trained on"):
            foreign.refuse_other_base(given)
        return
    foreign.refuse_other_base(given)
    _, report = opened(base, adapter)
    assert ("a 4-bit copy of the base" in report) == name.endswith("4bit") and "warning" not in report


CONFIGS = {  # of an adapter's config: a change -> what is said
    "layers of all-linear": ({"target_modules": "all-linear", "layers_to_transform": [0]}, "peft refuses the pair"),
    "layers of a regex": ({"target_modules": ".*q_proj", "layers_to_transform": 1}, "peft refuses the pair"),
    "a pattern of all-linear": ({"target_modules": "all-linear", "layers_pattern": ["layers"]}, "refuses the pair"),
    **{
        f"a million of {key}": ({key: [f"q{i}" for i in range(10**6)]}, f"{key} has 1,000,000 entries")
        for key in ("target_modules", "modules_to_save", "exclude_modules")
    },
    "a million layers": ({"layers_to_transform": list(range(10**6))}, "has 1,000,000 entries"),
    "many ranks": ({"rank_pattern": {f"q{i}": 4 for i in range(2 * 10**5)}}, "has 200,000 entries"),
    "a long method": ({"peft_type": "Z" * 10**7}, "only LORA is read"),
    "a long key": ({"x" * 10**7: "y"}, "is not supported"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_cannot_be_honoured_is_refused_at_once(case, small_base, adapter):
    changes, words = CONFIGS[case]
    changed_json(adapter / "adapter_config.json", **changes)
    started = time.process_time()
    with pytest.raises(UserError, match=words) as e:
        opened(small_base, adapter)
    assert time.process_time() - started < 4 and len(str(e.value)) < 1000


LONG = "k" * 10**6
HEADERS = {
    "long keys": json.dumps({LONG + str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20)}),
    "no end": '{"' + LONG * 20,
    "a long type": json.dumps({"k": {"dtype": LONG * 20, "shape": [0], "data_offsets": [0, 0]}}),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_large_header_makes_no_large_message(case, small_base, adapter):
    header = HEADERS[case].encode()
    (adapter / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises((UserError, Untrusted)) as e:
        opened(small_base, adapter)
    assert len(str(e.value)) < 2000 and "\n" not in str(e.value)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_of_a_base_is_named(name, base):
    (base / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        opened(base)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_of_an_adapter_is_named(name, small_base, adapter):
    (adapter / name).write_text(POINTER)
    with pytest.raises(UserError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        opened(small_base, adapter)


OTHERS = {  # what lies in the place of model.safetensors -> what is said
    "model.safetensors.incomplete": "a download that was interrupted",
    "consolidated.00.pth": "the publisher's own pickle",
    "model-q4_k_m.gguf": "llama.cpp's", "tf_model.h5": "TensorFlow's", "flax_model.msgpack": "Flax's",
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_weights_of_another_kind_are_named(name, base):
    (base / "model.safetensors").rename(base / name)
    with pytest.raises(UserError, match=f"no weights in this folder .*{name} is {OTHERS[name]}"):
        opened(base)


def test_half_a_download_is_named(base):
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors: .*damaged or incomplete: download it again"):
        opened(base)
    weights.write_bytes(whole)
    weights.rename(base / "model-00001-of-00002.safetensors")
    shards = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match=r"1 files that are not there \(model-00002-of-00002.safetensors\)"):
        opened(base)


def test_a_folder_too_high_and_a_file_name_the_folder(base, adapter, small_base, tmp_path):
    (tmp_path / "high").mkdir()
    shutil.copytree(base, tmp_path / "high/snapshots/0a1b")
    shutil.copytree(adapter, tmp_path / "high/checkpoint-20")
    for given, words in (
        ((tmp_path / "high",), "there is one in .*snapshots/0a1b: give that folder"),
        ((base / "model.safetensors",), f"this is a file; give its folder, {base}"),
        ((small_base, tmp_path / "high"), "there is one in .*checkpoint-20: give that folder"),
        ((small_base, adapter / "adapter_model.safetensors"), f"this is a file; give its folder, {adapter}"),
    ):
        with pytest.raises(UserError, match=words):
            opened(*given)


# ---- a base's config and values -------------------------------------------------------------------------------------


BASES = {  # of a base's config: a change -> what is said
    "classes": ({"num_labels": 10**9}, "claims num_labels 1e[+]09: it is damaged"),
    "layers": ({"num_hidden_layers": 10**9}, "claims num_hidden_layers 1e[+]09"),
    "vocabulary": ({"vocab_size": 10**9}, "claims vocab_size 1e[+]09"),
    "GPTQ": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "stored quantized: give the 16-bit base"),
    "bitsandbytes": ({"quantization_config": {"load_in_4bit": True}}, "stored quantized: give the 16-bit base"),
    "no method": ({"quantization_config": {}}, "stored quantized: give the 16-bit base"),
    "dtype": (
        {"torch_dtype": "torch.float16", "dtype": "torch.float16"},
        "dtype torch.float16, expected one of float32",
    ),
    "pictures": ({"vision_config": {}, "model_type": "qwen2_5_vl"}, "qwen2_5_vl reads pictures"),
    "family": ({"model_type": "mistral5"}, "its config could not be loaded"),
    "rope": ({"rope_scaling": {"rope_type": "zzz", "factor": 2.0}}, "no model of this kind"),
    "pad": ({"pad_token_id": 10**8}, "no model of this kind .*Padding_idx"),
    "vocabulary too small": ({"vocab_size": 100}, "4096 tokens for 100 embeddings"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_config_that_cannot_be_built_is_refused(case, base):
    changes, words = BASES[case]
    changed_json(base / "config.json", **changes)
    with pytest.raises(UserError, match=words) as e:
        opened(base)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("changes", [{"eos_token_id": 10**8}, {"max_position_embeddings": 10**9}, {"dtype": "float64"}])
def test_a_config_with_oddities_that_change_nothing_is_taken(changes, base, small_base):
    changed_json(base / "config.json", **changes)
    expected = opened(small_base)[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in opened(base)[0].state_dict().items())


def test_a_head_that_is_stored_beside_a_tied_embedding_is_the_head(base):
    """tie_word_embeddings is true, but the file holds two different matrices: what stands in the file counts."""
    head = torch.randn(4096, 32)
    changed_tensors(base / "model.safetensors", lambda tensors: tensors | {"lm_head.weight": head})
    lm, _ = opened(base)
    assert torch.equal(lm.lm_head.weight, head) and not torch.equal(lm.model.embed_tokens.weight, head)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_damaged_values_of_a_base_are_named(value, base):
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors):
        tensors[name][3, 5] = float(value)
        return tensors

    changed_tensors(base / "model.safetensors", spoil)
    with pytest.raises(UserError, match=rf"1 of its weights hold NaN or infinity \({name}\)"):
        opened(base)


def test_whole_numbers_as_weights_are_named(base):
    name = "model.layers.1.mlp.up_proj.weight"
    changed_tensors(base / "model.safetensors", lambda tensors: tensors | {name: tensors[name].long()})
    with pytest.raises(UserError, match=f"{name} is stored as I64"):
        opened(base)


def test_damaged_labels_of_a_run_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for text in ("{}", '{"values": ["a"]}', '{"names": ["a"], "values": 3}'):
        (tmp_path / "labels.json").write_text(text)
        with pytest.raises(Untrusted, match="labels.json: expected lists of strings"):
            trained.run_facts(tmp_path)


# ---- chat templates -------------------------------------------------------------------------------------------------


GOOD = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 10**10 }}",
    "a filter": "{{ 'a'|center(10**10) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "a range": "{% for a in range(10**9) %}x{% endfor %}",
    "doubling": "{% set n = namespace(x='aa') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_chat_template_ends_and_is_refused(case):
    tokenizer = tokenizer_with(GOOD + HOSTILE[case])
    started = time.monotonic()
    for _ in range(3):  # it is tried once
        with pytest.raises(ValueError, match="the chat template refuses it"):
            prompts.chat(tokenizer, [prompts.QUESTION])
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    "template", ["{{ 'Hello' }}", GOOD.replace("{{ m['content'] }}", ""), "{{ messages[0].content }}"]
)
def test_a_chat_template_that_leaves_out_what_a_user_wrote_is_refused(template):
    tokenizer = tokenizer_with(template)
    with pytest.raises(ValueError, match="leaves out a user's message"):
        prompts.chat(
            tokenizer, [prompts.turn("user", "1 + 1?"), prompts.turn("assistant", "2"), prompts.turn("user", "3?")]
        )
    with pytest.raises(ValueError, match="one is left out"):
        prompts.as_text(prompts.Prompt(user="Is {a} so?", shots=(("Is it?", "No"),)), tokenizer)


def test_trying_a_template_does_not_slow_rendering():
    tokenizer = tokenizer_with(GOOD)
    prompts.rendered(tokenizer, [prompts.QUESTION])
    started = time.process_time()
    for i in range(500):
        prompts.rendered(tokenizer, [prompts.turn("user", str(i))])
    assert time.process_time() - started < 1
