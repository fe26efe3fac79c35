"""Completions: batched == alone == transformers' own, training left to the bit, prompts as text, the user's command."""

import copy
import hashlib
import io
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, last_json
from test_ddp import finish, forked, forks, start
from transformers import AutoModelForCausalLM, GenerationConfig

import bases
import chats
import checkpoint
import cli
import configs
import data
import ddp
import foreign
import generate
import language
import lora
import model as models
import peft_format
import prompts
import writer
from errors import Untrusted, UserError
from packed import pack

CPU = torch.device("cpu")
WORLD = ddp.World(0, 1, CPU)
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=0, max_position_embeddings=400,
)  # fmt: skip
FAMILIES = {
    "Qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "Qwen3": dict(head_dim=12),
    "Llama": dict(),
    "Gemma3Text": dict(sliding_window=5, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 2),
    "GPT2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=400),
}
FAMILIES["Gemma3Text"]["layer_types"] = FAMILIES["Gemma3Text"]["layer_types"][:3]
TEXTS = ["What is", "Let $n=12$ be a number. Find the sum of all positive divisors of $n$", "Prove", "a b c d e f"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
WILD = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "max_new_tokens": 2}


def template_of(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_with(template: str | None = None):
    tokenizer = bases.load_tokenizer(str(ROOT / "tiny/base"))
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family, tied, template) -> a folder with a small random model, the tiny tokenizer, wild generation flags."""
    made = {}

    def make(family="Qwen2", tied=True, template=None, **changes):
        key = (family, tied, template, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            tokenizer = tokenizer_with(template_of(template) if template else None)
            tokenizer.save_pretrained(folder)
            sizes = {**SIZES, **FAMILIES[family], "vocab_size": len(tokenizer), "tie_word_embeddings": tied, **changes}
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
            with torch.no_grad():
                for p in model.parameters():
                    p += 0.2 * torch.randn_like(p)
            model.save_pretrained(folder)
            (folder / "generation_config.json").write_text(json.dumps({**WILD, "eos_token_id": [0, 7]}))
            made[key] = str(folder)
        return made[key]

    return make


@pytest.fixture
def one(base) -> str:
    return base("Llama")


def adapter_on(folder: Path, base: str, seed=0, **changes) -> str:
    """An adapter in PEFT's files whose updates are not small."""
    lm = language.load_language_model(base, CPU, torch.float32)
    fields = {"targets": ("q_proj", "v_proj", "down_proj"), "rank": 4, "alpha": 6.0, **changes}
    lora.inject(lm, lora.Adapter(**fields, task="CAUSAL_LM", base=base))
    lora.train_only(lm)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in lm.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn_like(p)
    folder.mkdir(exist_ok=True)
    checkpoint.save_json(folder / "adapter_config.json", peft_format.adapter_config(lm.adapter))
    checkpoint.save_tensors(folder / "adapter_model.safetensors", peft_format.adapter_state(lm))
    return str(folder)


def opened(**flags):
    """(language model, tokenizer) as generate.py loads them."""
    given = writer.of_base(**flags)
    return foreign.load_writer(given, WORLD, "fp32")[0], given.tokenizer


def ids_of(tokenizer, texts=TEXTS) -> list[list[int]]:
    return writer.encode_prompts(tokenizer, [[(True, t)] for t in texts], 512)[0]


def greedy(lm, rows, stops=(0,), max_new_tokens=20, **draw):
    return language.complete(lm, rows, 0, set(stops), max_new_tokens=max_new_tokens, **draw)


def plain(lm, row: list[int], max_new_tokens=20, eos=0) -> list[int]:
    """transformers' own greedy completion of one prompt."""
    lm.generation_config = GenerationConfig()
    settings = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0)
    with torch.no_grad():
        return lm.generate(torch.tensor([row]), generation_config=settings)[0, len(row) :].tolist()


# ---------------------------------------------------------------------------------------------------------------------
# the same tokens


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapter"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batched_is_alone_is_transformers(base, family, tied, adapted, tmp_path):
    from peft import PeftModel

    folder, flags = base(family, tied), {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    if adapted:
        targets = ("c_attn", "c_proj") if family == "GPT2" else ("q_proj", "v_proj", "down_proj", "embed_tokens")
        flags = {"adapter": adapter_on(tmp_path / "adapter", folder, targets=targets)}
        theirs = PeftModel.from_pretrained(theirs, flags["adapter"]).eval()
        theirs = theirs.base_model.model
    lm, tokenizer = opened(base=folder, **flags)
    rows = ids_of(tokenizer)
    found = greedy(lm, rows)
    assert found == [greedy(lm, [row])[0] for row in rows] == [plain(theirs, row) for row in rows]
    assert len({tuple(f) for f in found}) == len(rows) and len(set(sum(found, []))) > 6  # not one token again and again


def test_the_trained_tiny_base_too():
    lm, tokenizer = opened(base=str(ROOT / "tiny/base"))
    theirs = AutoModelForCausalLM.from_pretrained(ROOT / "tiny/base", dtype=torch.float32).eval()
    rows = ids_of(tokenizer)
    want = [plain(theirs, row, max_new_tokens=40) for row in rows]
    assert greedy(lm, rows, max_new_tokens=40) == [greedy(lm, [r], max_new_tokens=40)[0] for r in rows] == want
    texts = language.generate(lm, tokenizer, rows, max_new_tokens=40)
    assert texts == [tokenizer.decode(w, skip_special_tokens=True) for w in want] and all(texts)


def test_the_real_public_adapter_completes(shared, base, tmp_path):
    """Qwen2.5-0.5B's 24 layers and widths, random, with a small MLP and vocabulary; it brings its own chat template."""
    sizes = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, intermediate_size=16)
    folder = base("Qwen2", use_sliding_window=False, initializer_range=0.02, **sizes)
    flags = {"base": folder, "adapter": str(shared / "adapters/SGOD-UTH_qwen2.5-0.5b_r8_math-latex")}
    given = writer.of_base(**flags)
    lm, report = foreign.load_writer(given, WORLD, "fp32")
    assert "96 tensors matched (48 lora_A, 48 lora_B) on 24 q_proj, 24 v_proj" in report
    rows = ids_of(given.tokenizer, TEXTS[:2])
    live = greedy(lm, rows, max_new_tokens=6)
    with lora.disable(lm):
        assert greedy(lm, rows, max_new_tokens=6) != live
    assert "<|im_start|>" in given.tokenizer.chat_template
    given.tokenizer.chat_template = None
    with pytest.raises(UserError, match="12.*layers|unexpected tensors"):
        writer.of_base(**{**flags, "base": base("Qwen2")})


def test_a_completion_ends_with_its_first_stop_and_rows_beside_it_go_on(one):
    lm, tokenizer = opened(base=one)
    rows = ids_of(tokenizer)
    free = greedy(lm, rows)
    stop = free[1][4]
    want = [f[: f.index(stop) + 1] if stop in f else f for f in free]
    assert greedy(lm, rows, stops=(0, stop)) == want and len(want[1]) < len(free[1])
    assert [len(f) for f in greedy(lm, rows, max_new_tokens=3)] == [3] * len(rows)
    calls = []
    lm.register_forward_hook(lambda *_: calls.append(1))
    assert greedy(lm, [rows[1]], stops=(0, stop)) == [want[1]] and len(calls) == len(want[1])  # and nothing after it


def test_stops_are_eos_of_both_and_the_end_of_a_turn(base, one):
    for template in ("qwen2_5", "gemma3"):
        lm, tokenizer = opened(base=base("Llama", template=template))
        end = [tokenizer.convert_tokens_to_ids("<|im_end|>")] if template == "qwen2_5" else []
        assert language.stop_ids(lm, tokenizer) == {0, 7, *end}  # 7: of generation_config.json
    assert language.stop_ids(*opened(base=one)) == {0, 7}


# ---------------------------------------------------------------------------------------------------------------------
# drawn tokens


def test_draws_follow_from_the_seed_alone(one):
    lm, tokenizer = opened(base=one)
    rows, state = ids_of(tokenizer), torch.get_rng_state()

    def drawn(seed, **how):
        return greedy(lm, rows, temperature=3.0, seed=seed, **how)

    first = drawn(1)
    torch.rand(7)
    assert drawn(1) == first != drawn(2) and first != greedy(lm, rows)
    assert drawn(1, top_p=1e-6) == greedy(lm, rows)  # the likeliest token alone
    torch.set_rng_state(state)
    drawn(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_temperature_draws_from_the_whole_softmax(one):
    """Shares of the first token over many draws: no cut to the 50 likeliest, which transformers makes by itself."""
    lm, tokenizer = opened(base=one)
    row = ids_of(tokenizer)[0]
    with torch.no_grad(), language.generating(lm):
        want = (lm(torch.tensor([row])).logits[0, -1] / 4.0).softmax(0)
    found = torch.tensor([f[0] for f in greedy(lm, [row] * 4000, max_new_tokens=1, temperature=4.0)])
    best = want.topk(50).indices
    share = float(torch.isin(found, best).float().mean())
    assert share == pytest.approx(float(want[best].sum()), abs=0.04) and share < 0.9


def test_settings_of_the_base_are_ignored(base, one, tmp_path):
    """Its generation_config.json draws at temperature 5, punishes repeats and stops after two tokens; flags decide."""
    lm, tokenizer = opened(base=one)
    assert lm.generation_config.do_sample and lm.generation_config.repetition_penalty == 9.0
    shutil.copytree(one, tmp_path / "calm")
    (tmp_path / "calm/generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    calm, rows = opened(base=str(tmp_path / "calm"))[0], ids_of(tokenizer)
    for how in ({}, {"temperature": 2.0, "seed": 3}):
        assert greedy(lm, rows, **how) == greedy(calm, rows, **how)
    assert {len(f) for f in greedy(lm, rows)} == {20}


# ---------------------------------------------------------------------------------------------------------------------
# a model in training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_goes_on_to_the_bit(base, checkpointing):
    """Loss and gradients of a packed batch with dropout, before and after a completion in the middle of training."""
    lm = language.load_language_model(base("Gemma3Text"), CPU, torch.float32).train()
    lora.inject(lm, lora.Adapter(("q_proj", "v_proj"), 4, 6.0, 0.3))
    lora.train_only(lm)
    lm.get_submodule("model.layers.1").eval()  # modes may differ from module to module
    if checkpointing:
        models.checkpoint_activations(lm)
    tokenizer = tokenizer_with()
    rows = ids_of(tokenizer)
    batch = pack(data.join_tokens(rows), np.arange(len(rows)), CPU, predict=True)
    with torch.no_grad():
        for module in lora.adapters(lm).values():
            module.lora_B.weight.normal_()

    def step():
        lm.zero_grad()
        language.next_token_loss(lm, batch).backward()
        return [p.grad.clone() for p in lm.parameters() if p.requires_grad], torch.get_rng_state()

    def facts():
        config = json.dumps(lm.config.to_dict(), default=str), lm.config._attn_implementation
        return config, lm.generation_config.to_dict(), [m.training for m in lm.modules()]

    torch.manual_seed(5)
    want, before = step(), facts()
    assert before[0][1] == models.ATTENTION
    torch.manual_seed(5)
    texts = language.generate(lm, tokenizer, rows, max_new_tokens=8, temperature=1.0, seed=9)
    assert facts() == before and len(texts) == len(rows)
    got = step()
    assert all(torch.equal(a, b) for a, b in zip(want[0], got[0], strict=True)) and torch.equal(want[1], got[1])
    with pytest.raises(RuntimeError, match="inside"), language.generating(lm):
        assert lm.config._attn_implementation == "sdpa" and not any(m.training for m in lm.modules())
        raise RuntimeError("inside")
    assert facts() == before
    assert language.generate(lm, tokenizer, rows) == language.generate(copy.deepcopy(lm).eval(), tokenizer, rows)


# ---------------------------------------------------------------------------------------------------------------------
# prompts


def prompt_of(tokenizer, row, **fields):
    """The pieces and the reason that generate.py makes of one row."""
    maker = chats.prompter(generate.GenerateConfig(**fields), set(fields), tokenizer, [row])
    return maker.pieces(row, "row 1"), maker.reason


def text_of(pieces) -> str:
    return "".join(text for _, text in pieces)


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_2", "gemma3", "qwen3", "phi3"])
def test_a_chat_is_rendered_and_encoded_as_the_tokenizer_does(name):
    tokenizer = tokenizer_with(template_of(name))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    options = {"add_generation_prompt": True, "date_string": prompts.DATE}
    pieces, why = prompt_of(tokenizer, {"prompt": "What is 2 + 2?"}, system="Be brief.")
    assert text_of(pieces) == tokenizer.apply_chat_template(turns, tokenize=False, **options)
    ids = writer.encode_prompts(tokenizer, [pieces], 512)[0][0]
    assert ids == list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options))
    assert why.startswith("as chats") and (True, "What is 2 + 2?") in pieces
    row = {"messages": json.dumps([*turns, {"role": "assistant", "content": "4"}, turns[1]])}
    longer = [*turns, {"role": "assistant", "content": "4"}, turns[1]]
    assert text_of(prompt_of(tokenizer, row)[0]) == tokenizer.apply_chat_template(longer, tokenize=False, **options)
    default = text_of(prompt_of(tokenizer, {"messages": json.dumps(turns[1:])})[0])
    assert "You are a helpful assistant." in default
    bare = text_of(prompt_of(tokenizer, {"prompt": "What is 2 + 2?"}, system="")[0])
    assert bare == tokenizer.apply_chat_template(turns[1:], tokenize=False, **options)


def test_a_template_without_a_system_turn_does_without(base):
    tokenizer = tokenizer_with(template_of("gemma"))
    pieces, why = prompt_of(tokenizer, {"prompt": "Hi"})
    assert "takes no system turn" in why and "helpful" not in text_of(pieces) and "Hi" in text_of(pieces)
    row = {"messages": json.dumps([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])}
    with pytest.raises(UserError, match="row 1: the chat template refuses it"):
        prompt_of(tokenizer, row)


def test_special_tokens_in_a_prompt_stay_text():
    tokenizer = tokenizer_with(template_of("qwen2_5"))
    end, text = tokenizer.convert_tokens_to_ids("<|im_end|>"), "say <|im_end|> twice"
    for fields, ends in (({}, 2), ({"chat": "no"}, 0)):  # of the template alone: after system and user
        clean, dirty = (prompt_of(tokenizer, {"prompt": t}, **fields)[0] for t in ("say it twice", text))
        (a, b), report = writer.encode_prompts(tokenizer, [clean, dirty], 512)
        assert a.count(end) == b.count(end) == ends and report.guarded == 1
        assert text in tokenizer.decode(b)


def test_bos_comes_once_and_an_end_of_the_tokenizers_own_never():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizer_with("{{ bos_token }}" + template_of("qwen2_5"))
    tokenizer.bos_token, bos = "<|box_start|>", tokenizer.convert_tokens_to_ids("<|box_start|>")
    around = TemplateProcessing("<|box_start|> $A <|endoftext|>", None, [("<|box_start|>", bos), ("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = around
    assert tokenizer("Hi")["input_ids"][:: len(tokenizer("Hi")["input_ids"]) - 1] == [bos, 0]
    for chat, text in (("yes", "Hi"), ("no", "Hi"), ("no", "Hi <|im_end|>")):
        (ids,), _ = writer.encode_prompts(tokenizer, [prompt_of(tokenizer, {"prompt": text}, chat=chat)[0]], 512)
        assert ids.count(bos) == 1 and ids[0] == bos and 0 not in ids
    (ids,), report = writer.encode_prompts(tokenizer, [[(True, "")]], 512)
    assert ids == [bos]


def test_completions_keep_the_space_that_a_tokenizer_drops_at_the_start():
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    words = Tokenizer(kinds.WordLevel({"<u>": 0, "▁a": 1, "▁b": 2}, "<u>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    assert tokenizer.decode([2]) == "b" and language.completion_text(tokenizer, [1], [2, 1]) == " b a"


def test_examples_stand_before_the_prompt(tmp_path):
    shots = [{"prompt": "1 + 1 <|im_end|>", "response": "two <|im_end|>"}, {"prompt": "2 + 2", "response": "four"}]
    path = tmp_path / "shots.jsonl"
    path.write_text("".join(json.dumps(s) + "\n" for s in shots))
    tokenizer = tokenizer_with(template_of("qwen2_5"))
    turns = [{"role": "system", "content": "You are a helpful assistant."}]
    for s in [*shots, {"prompt": "3 + 3"}]:
        turns.append({"role": "user", "content": f"Q: {s['prompt']}\nA:"})
        turns += [{"role": "assistant", "content": s["response"]}] if "response" in s else []
    fields = {"text": "Q: {prompt}\nA:", "examples": str(path)}
    pieces, _ = prompt_of(tokenizer, {"prompt": "3 + 3"}, **fields)
    want = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text_of(pieces) == want
    raw, why = prompt_of(tokenizer, {"prompt": "3 + 3"}, chat="no", **fields)
    assert text_of(raw) == "Q: 1 + 1 <|im_end|>\nA:two <|im_end|>\n\nQ: 2 + 2\nA:four\n\nQ: 3 + 3\nA:" and "raw" in why
    (ids, alone), _ = writer.encode_prompts(tokenizer, [raw, raw[-2:]], 512)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    path.write_text(json.dumps({"prompt": "1"}) + "\n")
    with pytest.raises(UserError, match="--examples .*: no column response"):
        prompt_of(tokenizer, {"prompt": "3 + 3"}, **fields)


def test_tools_reach_the_template_or_are_refused(tmp_path):
    tools = [{"type": "function", "function": {"name": "lookup", "description": "Looks up.", "parameters": {}}}]
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(tools))
    tokenizer = tokenizer_with(template_of("qwen2_5"))
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}]
    want = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, add_generation_prompt=True)
    assert text_of(prompt_of(tokenizer, {"prompt": "Hi"}, tools=str(path), system="S")[0]) == want and "lookup" in want
    for template, chat, words in ((template_of("gemma3"), "auto", "takes no tools"), (None, "auto", "needs a chat")):
        with pytest.raises(UserError, match=f"--tools.*{words}"):
            prompt_of(tokenizer_with(template), {"prompt": "Hi"}, tools=str(path), chat=chat)
    for content in ("{}", "[]", "[1]", "[", ""):
        path.write_text(content)
        with pytest.raises(UserError, match=r"--tools .*(cannot be read as JSON|expected a JSON list)") as e:
            prompt_of(tokenizer, {"prompt": "Hi"}, tools=str(path))
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# the story, in this process


def records(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def asked(tmp_path) -> Path:
    path = tmp_path / "asked.jsonl"
    rows = [{"id": f"q{i}", "prompt": f"{text} é {i}"} for i, text in enumerate(TEXTS * 3)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows[:11]))
    return path


def flags_of(base, asked, out, *more) -> list[str]:
    flags = ["--base", base, "--input", asked, "--output", out, "--max_new_tokens", 9, "--batch_size", 3]
    return [str(f) for f in (*flags, *more)]


def test_the_file_of_completions(one, asked, tmp_path, capsys):
    out = tmp_path / "deep/out.jsonl"
    result = generate.main(flags_of(one, asked, out))
    found, rows = records(out), records(asked)
    assert [list(f) for f in found] == [["id", "prompt", "completion"]] * 11
    assert [(f["id"], f["prompt"]) for f in found] == [(r["id"], r["prompt"]) for r in rows]
    lm, tokenizer = opened(base=one)
    ids = ids_of(tokenizer, [r["prompt"] for r in rows])
    stops = language.stop_ids(lm, tokenizer)
    want = [greedy(lm, [row], stops=stops, max_new_tokens=9)[0] for row in ids]
    assert [f["completion"] for f in found] == [
        language.completion_text(tokenizer, *pair) for pair in zip(ids, want, strict=True)
    ]
    assert result["rows"] == 11 and result["cut"] == 0 and result["run"] == one and result["output"] == str(out)
    assert result["finished"] == sum(w[-1] in stops for w in want)
    assert result["prompt_hash"] == hashlib.sha256(b"").hexdigest()  # a template of one field, and nothing else
    said = capsys.readouterr().out
    assert "raw (the tokenizer has no chat template): 11 in batches of 3" in said and "greedy" in said
    before = out.read_bytes()
    generate.main(flags_of(one, asked, out, "--limit", 2))
    assert len(records(out)) == 2 and (out.parent / "out.jsonl.previous").read_bytes() == before
    generate.main(flags_of(one, asked, out, "--limit", 3, "--overwrite"))
    assert len(records(out)) == 3 and sorted(p.name for p in out.parent.iterdir()) == [
        "out.jsonl",
        "out.jsonl.previous",
    ]


def test_long_prompts_are_cut_and_counted(base, asked, tmp_path):
    folder, out = base("Llama", template="qwen2_5"), tmp_path / "out.jsonl"
    result = generate.main(flags_of(folder, asked, out, "--max_length", 44, "--chat", "yes"))
    assert 0 < result["cut"] < 11 and len(records(out)) == 11
    other = generate.main(flags_of(folder, asked, out, "--chat", "yes", "--text", "Q: {prompt}"))
    assert other["cut"] == 0
    assert result["prompt_hash"] == other["prompt_hash"] != hashlib.sha256(b"").hexdigest()  # a chat's words


def test_each_batch_is_on_disk_before_the_next(one, asked, tmp_path, monkeypatch):
    """Stopped in the third batch: the older file is as it was, and the same command begins with the third."""
    out, calls, complete = tmp_path / "out.jsonl", [], language.complete

    def stopped(lm, batch, *options):
        calls.append(out.read_text())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(lm, batch, *options)

    out.write_text("older\n")
    monkeypatch.setattr(language, "complete", stopped)
    with pytest.raises(KeyboardInterrupt):
        generate.main(flags_of(one, asked, out))
    assert calls == ["older\n"] * 3 and out.read_text() == "older\n"
    generate.main(flags_of(one, asked, out))
    fresh = tmp_path / "fresh.jsonl"
    monkeypatch.setattr(language, "complete", complete)
    generate.main(flags_of(one, asked, fresh))
    assert out.read_bytes() == fresh.read_bytes() and len(calls) == 5
    assert (tmp_path / "out.jsonl.previous").read_text() == "older\n"


def test_a_full_disk_leaves_whole_lines(tmp_path):
    import resource
    import signal

    path = tmp_path / "log.jsonl"
    checkpoint.append_whole(path, "one\n" * 100)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
        with pytest.raises(OSError):
            checkpoint.append_whole(path, "four\n" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_text() == "one\n" * 100


@forks
@pytest.mark.parametrize("draw", [[], ["--temperature", "2", "--seed", "4"]], ids=["greedy", "drawn"])
def test_two_ranks_write_the_same_file(one, asked, tmp_path, draw):
    for ranks in (1, 2, 3):
        out = tmp_path / f"{ranks}.jsonl"
        status, stdout, err = forked(generate.main, flags_of(one, asked, out, *draw), tmp_path, ranks)
        assert status == 0, err
        assert last_json(stdout)["rows"] == 11
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()
    generate.main(flags_of(one, asked, tmp_path / "greedy.jsonl"))
    assert ((tmp_path / "1.jsonl").read_bytes() == (tmp_path / "greedy.jsonl").read_bytes()) == (not draw)


# ---------------------------------------------------------------------------------------------------------------------
# runs of cpt.py


def run_of_cpt(folder: Path, base: str, save="best", whole=False, **fields) -> Path:
    """A finished run as cpt.py leaves it: an adapter, embedding and LM head with it, or the whole base."""
    run, target = folder / "outputs/some/data/run_0", folder / "outputs/some/data/run_0" / save
    run.mkdir(parents=True, exist_ok=True)

    def write(hidden: Path) -> None:
        if whole:
            shutil.copytree(base, hidden, dirs_exist_ok=True)
        else:
            adapter_on(hidden, base, targets=("q_proj",), saved=("embed_tokens", "lm_head"))
            tokenizer_with().save_pretrained(hidden)

    lm = language.load_language_model(base, CPU, torch.float32)
    checkpoint.save(target, write, {"step": 3, "base": lm.base_fingerprint})
    known = configs.CptConfig(base=base, train_data="x", rank=0 if whole else 4, **fields)
    (run / "config.json").write_text(cli.to_json(known))
    (run / "texts.json").write_text('{"pairs": true}')
    (run / "result.json").write_text("{}")
    return run


@pytest.mark.parametrize("save,whole", [("best", False), ("last", False), ("last", True)])
def test_a_run_of_cpt_is_found_and_completes(one, asked, tmp_path, save, whole):
    run, out = run_of_cpt(tmp_path, one, save, whole), tmp_path / "out.jsonl"
    flags = ["--outputs", str(tmp_path / "outputs"), "--input", str(asked), "--output", str(out)]
    flags += ["--max_new_tokens", "8", "--limit", "4"]
    assert generate.main(flags)["run"] == str(run)  # the newest finished one
    found = [r["completion"] for r in records(out)]
    generate.main([*flags, "--runs", str(run), "--overwrite"])
    assert [r["completion"] for r in records(out)] == found
    theirs = ["--base", one] + ([] if whole else ["--adapter", str(run / save)])
    generate.main([*flags, *theirs, "--overwrite"])
    assert [r["completion"] for r in records(out)] == found
    generate.main([*flags, "--base", one, "--overwrite"])
    assert ([r["completion"] for r in records(out)] == found) == whole


def test_a_run_whose_base_was_swapped_is_refused(one, base, asked, tmp_path):
    shutil.copytree(one, tmp_path / "base")
    run = run_of_cpt(tmp_path, str(tmp_path / "base"))
    tensors = checkpoint.load_tensors(tmp_path / "base/model.safetensors")
    checkpoint.save_tensors(tmp_path / "base/model.safetensors", {n: t + 0.1 for n, t in tensors.items()})
    with pytest.raises(Untrusted, match="is not the one this run was trained on"):
        generate.main(["--runs", str(run), "--input", str(asked), "--output", str(tmp_path / "o.jsonl")])
    assert not (tmp_path / "o.jsonl").exists()


def test_a_run_of_pairs_is_asked_as_it_was_trained(base, asked, tmp_path):
    folder = base("Llama", template="qwen2_5")
    run = run_of_cpt(tmp_path, folder, whole=True, text="Question: {prompt}\n", system="Be exact.")
    flags = ["--runs", str(run), "--input", str(asked), "--max_new_tokens", "2", "--limit", "1"]
    flags += ["--output", str(tmp_path / "o.jsonl"), "--overwrite"]
    generate.main(flags)
    (first,) = records(tmp_path / "o.jsonl")
    assert "system\nBe exact.<" in first["prompt"] and "user\nQuestion: What is é 0" in first["prompt"]
    generate.main([*flags, "--system", "Other.", "--text", "{prompt}"])
    (second,) = records(tmp_path / "o.jsonl")
    assert "Other." in second["prompt"] and "user\nWhat is é 0" in second["prompt"]
    run_of_cpt(tmp_path, folder, whole=True, text="Q {prompt} A", chat="no")
    generate.main(flags)
    assert records(tmp_path / "o.jsonl")[0]["prompt"] == "Q What is é 0 A"


# ---------------------------------------------------------------------------------------------------------------------
# mistakes: one line, before any weight is read


MISTAKES = {
    "no text": (["--output", "o.csv"], "expected a name that ends in .jsonl"),
    "too hot": (["--temperature", "-1"], "expected 0 for greedy"),
    "nearly 0": (["--temperature", "1e-9"], "expected 0 for greedy"),
    "top_p 0": (["--top_p", "0", "--temperature", "1"], "expected a fraction above 0"),
    "top_p over 1": (["--top_p", "1.5", "--temperature", "1"], "expected a fraction above 0"),
    "top_p greedy": (["--top_p", "0.9"], "--top_p has no effect: it is used with --temperature"),
    "seed greedy": (["--seed", "3"], "--seed has no effect: it is used with --temperature"),
    "no batch": (["--batch_size", "0"], "expected a number above 0"),
    "no tokens": (["--max_new_tokens", "0"], "expected a number above 0"),
    "chat": (["--chat", "maybe"], "expected one of auto, yes, no"),
    "a classifier's": (["--submission", "a,b"], "--submission has no effect: it is used with --score"),
    "merged": (["--merge"], "unknown flag --merge"),
    "words": (["--label_words", "a,b"], "--label_words has no effect: it is used with --score"),
    "chat of scores": (["--chat", "no", "--score", "true"], "--chat has no effect: it is used without --score"),
    "one class": (["--score", "true", "--label_names", "a"], "--label_names a: --score expects the names of two"),
    "score to text": (["--score", "true", "--output", "o.txt"], "expected a name that ends in .csv or .jsonl"),
    "run and adapter": (["--runs", "outputs/x", "--adapter", "a"], "--runs outputs/x with --adapter"),
    "no chat": (["--chat", "yes"], "--chat yes: needs a chat, but the tokenizer has no chat template"),
    "system": (["--system", "Be brief."], "--system: needs a chat"),
    "system, no chat": (["--system", "Be brief.", "--chat", "no"], "--system has no effect with --chat no"),
    "too long": (["--max_new_tokens", "400"], "exceed the 400 positions of .* lower --max_new_tokens"),
    "columns": (["--text", "{question}"], "no column question"),
    "examples": (["--examples", "nowhere.jsonl"], "--examples nowhere.jsonl: no such file"),
    "tools": (["--tools", "nowhere.json"], "--tools nowhere.json: cannot be read as JSON"),
    "no base": (["--base", "nowhere/at/all"], "no such folder"),
}  # fmt: skip


@pytest.fixture
def hollow(one, tmp_path) -> str:
    """A base whose weights are no weights: whoever reads them fails."""
    shutil.copytree(one, tmp_path / "hollow")
    (tmp_path / "hollow/model.safetensors").write_bytes(b"none")
    return str(tmp_path / "hollow")


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(hollow, asked, tmp_path, case):
    more, words = MISTAKES[case]
    flags = [f for f in flags_of(hollow, asked, tmp_path / "o.jsonl")]
    for flag in more[::2]:
        if flag in flags:
            at = flags.index(flag)
            flags[at : at + 2] = []
    with pytest.raises(UserError, match=words) as e:
        generate.main([*flags, *more])
    assert "\n" not in str(e.value) and not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize(
    "messages", ['[{"role": "user"', "{}", "[]", "[7]", '[{"role": 3}]', '[{"role": "assistant", "content": "a"}]']
)
def test_messages_that_are_none(base, tmp_path, messages):
    path = tmp_path / "m.csv"
    path.write_text('messages\n"' + messages.replace('"', '""') + '"\n')
    with pytest.raises(UserError, match="row 1: ") as e:
        generate.main(flags_of(base("Llama", template="qwen2_5"), path, tmp_path / "o.jsonl"))
    assert "\n" not in str(e.value)


def test_what_writes_no_text_is_refused(one, asked, tmp_path):
    run = tmp_path / "outputs/base/data/run_0"
    run.mkdir(parents=True)
    for name in ("config.json", "labels.json", "result.json"):
        (run / name).write_text("{}")
    flags = ["--input", str(asked), "--output", str(tmp_path / "o.jsonl")]
    for more, words in (
        (["--runs", str(run)], "no run of cpt.py"),
        (["--runs", str(tmp_path)], "no run of cpt.py"),
        (["--outputs", str(tmp_path / "outputs")], "no finished run under .*python cpt.py"),
        (["--runs", str(run), "--quant", "nf4"], "--quant: no effect without --base"),
        (["--score", "--runs", str(run), "--text", "{a}"], "--text: no effect without --base"),
    ):
        with pytest.raises(UserError, match=words):
            generate.main([*flags, *more])
    (run / "labels.json").unlink()
    (run / "config.json").write_text(cli.to_json(configs.CptConfig(base=one)))
    with pytest.raises(UserError, match="holds no save yet"):
        generate.main([*flags, "--runs", str(run)])
    transformers.BertModel(
        transformers.BertConfig(vocab_size=4096, hidden_size=12, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "bert")
    tokenizer_with().save_pretrained(tmp_path / "bert")
    adapter = adapter_on(tmp_path / "adapter", one)
    about = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**about, "task_type": "SEQ_CLS"}))
    for more, words in (
        (["--base", str(tmp_path / "bert")], "bert is an encoder, which writes no text"),
        (["--base", one, "--adapter", adapter], "an adapter of task SEQ_CLS"),
    ):
        with pytest.raises(UserError, match=words):
            generate.main([*flags, *more])


# ---------------------------------------------------------------------------------------------------------------------
# the user's command


def test_the_command_on_piped_lines(one, tmp_path):
    """On two ranks, of which the first reads; the lines are those of a file with the same prompts."""
    (tmp_path / "asked.csv").write_text("prompt\nWhat is é\nProve that\n")
    flags = ["--base", one, "--max_new_tokens", "5", "--batch_size", "1"]
    generate.main([*flags, "--input", str(tmp_path / "asked.csv"), "--output", str(tmp_path / "file.jsonl")])
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    done = subprocess.run(
        [sys.executable, *ranks, str(ROOT / "generate.py"), *flags], input="What is é\r\n\n  \nProve that\n".encode(),
        cwd=tmp_path, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "completions.jsonl").read_bytes() == (tmp_path / "file.jsonl").read_bytes()
    assert [(r["id"], r["prompt"]) for r in records(tmp_path / "file.jsonl")] == [
        ("0", "What is é"),
        ("1", "Prove that"),
    ]
    result = last_json(done.stdout.decode())
    keys = {"run", "rows", "output", "tokens_per_second", "seconds", "prompt_hash", "finished", "cut"}
    assert set(result) == keys and result["output"] == "completions.jsonl" and b"2/2" in done.stderr


@forks
@pytest.mark.parametrize(
    "text,flags,words",
    [
        (b"\n", [], "no prompts"),
        (b"caf\xe9\n", [], "lone surrogate"),
        (b"a\n", ["--text", "{a} {b}"], "--text names the columns a, b, a line has one"),
    ],
)
def test_the_command_says_a_mistake_in_one_line(hollow, tmp_path, text, flags, words):
    def pipe():
        sys.stdin = io.TextIOWrapper(io.BytesIO(text))

    flags = ["--base", hollow, "--output", str(tmp_path / "o.jsonl"), *flags]
    status, out, err = finish(start(generate.main, flags, tmp_path, before=pipe), tmp_path)
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "o.jsonl").exists() and not out


def test_the_terminal_is_a_loop(base, tmp_path):
    """A pseudo-terminal: a prompt, its completion, a mistake that does not end it, Ctrl-D, and the JSON line."""
    ours, theirs = pty.openpty()
    flags = ["--base", base("Llama", template="qwen2_5"), "--max_new_tokens", "330", "--chat", "no"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "generate.py"), *flags],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=ENVIRONMENT, text=True,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, b"What is 2 + 2?\n" + b"x y z w " * 30 + b"\n\x04")
    out, err = process.communicate(timeout=120)
    os.close(ours)
    assert process.returncode == 0, err
    assert out.count("> ") >= 3 and "lines of the terminal" in out and not list(tmp_path.glob("*.jsonl"))
    assert err.startswith("error: a prompt of ") and err.count("\n") == 1 and "exceed the 400 positions" in err
    result = last_json(out)
    assert result["rows"] == 1 and result["output"] == "" and result["tokens_per_second"] > 0
    lm, tokenizer = opened(base=flags[1])
    (want,) = language.generate(lm, tokenizer, ids_of(tokenizer, ["What is 2 + 2?"]), max_new_tokens=330)
    assert want in out and want.strip()
