"""Prompts with responses: exactly the answers are learned, as TRL learns them, whole or cut, on any number of ranks."""

import dataclasses
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import forked, forks, log_of, run_of, start
from test_resume import wait_for
from tokenizers import processors
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

import bases
import checkpoint
import configs
import corpus
import cpt
import data
import ddp
import files
import holdout
import language
import model as models
import presets
import prompts
from errors import UserError
from packed import pack

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
ALONE = ddp.World(0, 1, CPU)
ENDS = {  # what closes an answer of each template
    "qwen2_5": "<|im_end|>\n", "llama3_2": "<|eot_id|>", "gemma3": "<end_of_turn>\n", "phi3": "<|end|>\n",
    "qwen3": "<|im_end|>\n",
}  # fmt: skip
WORDS = """<s> <|user|> <|assistant|> <|system|> <|end|> <|eot_id|> <|start_header_id|> <|end_header_id|>
    <start_of_turn> <end_of_turn>""".split()


def template(name: str) -> str:
    trl = pytest.importorskip("trl")
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


def chatty(jinja: str):
    """The tokenizer of tiny/base with a chat template and the added tokens of several families."""
    tokenizer = bases.load_tokenizer(str(ROOT / "tiny/base"))
    tokenizer.add_special_tokens({"bos_token": WORDS[0], "additional_special_tokens": WORDS[1:]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = jinja
    return tokenizer


def prefixed(tokenizer):
    """With BOS before every text, as Llama's."""
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    return tokenizer


def encoded(tokenizer, rows: list[dict], chat: bool = True, system: str = "", max_length: int = 10**6) -> data.Tokens:
    rows = [{k: files.cell(v) for k, v in row.items()} for row in rows]
    names = [f"row {i + 1}" for i in range(len(rows))]
    pieces, spans = corpus.pair_pieces(rows, names, "--train_data", tokenizer, "{prompt}", chat, system)
    return data.encode(tokenizer, pieces, max_length, spans, names)[0]


def learned(tokenizer, tokens: data.Tokens, i: int = 0) -> str:
    return tokenizer.decode(tokens.row(i)[tokens.learned[tokens.starts[i] : tokens.stops[i]]])


def turns(*contents, system: str = "") -> list[dict]:
    found = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]
    return [{"role": "system", "content": system}, *found] if system else found


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A random Qwen2 with large enough weights that training moves it, and a tokenizer with Qwen2.5's template."""
    folder = tmp_path_factory.mktemp("pairs_base")
    tokenizer = bases.load_tokenizer(str(ROOT / "tiny/base"))
    tokenizer.chat_template = template("qwen2_5")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=0, eos_token_id=0, bos_token_id=None, **sizes,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Pairs of many lengths; some prompts end in a space, which joins the answer's first word in one token."""
    ends = ("?", "? Answer: ", "?\n")
    return [
        {
            "prompt": f"What is {i} + {i * 7 % 5}{ends[i % 3]}",
            "response": f"It is {i + i * 7 % 5}." + " Sure." * (i % 4),
        }
        for i in range(24)
    ]


def pair_flags(base: str, path: Path, out: Path, **changes) -> list[str]:
    settings = {
        "base": base, "random_init": "false", "train_data": path, "max_length": 64, "max_tokens": 256, "batch_size": 6,
        "micro_batches": 2, "epochs": 2, "lr": 1e-2, "val_size": 4, "eval_every": 4, "save_every": 2, "samples": 1,
        "precision": "fp32", "outputs": out / "outputs", **changes,
    }  # fmt: skip
    return [str(part) for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


# ---- what is learned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", ["no", "yes"])
def test_tokens_loss_and_training_are_those_of_trl(base, rows, tmp_path, chat):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = bases.load_tokenizer(base)
    flags = pair_flags(
        base, write_jsonl(tmp_path / "pairs.jsonl", rows), tmp_path, chat=chat, batch_size=99,
        max_tokens=9999, epochs=5, schedule="constant", warmup_ratio=0, weight_decay=0, grad_clip=0,
        **({"system": "Be brief."} if chat == "yes" else {}),
    )  # fmt: skip
    result = cpt.main(flags)
    side, _ = holdout.split(len(rows), 4, 0)

    def theirs(row):
        if chat == "no":
            return {"prompt": row["prompt"], "completion": row["response"]}
        said = turns(row["prompt"], row["response"], system="Be brief.")
        return {"prompt": said[:2], "completion": said[2:]}

    args = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=len(side), max_steps=5, learning_rate=1e-2,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", max_length=None, disable_tqdm=True, logging_steps=1, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), args, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list([theirs(rows[i]) for i in side]),
    )  # fmt: skip
    tokens = encoded(tokenizer, [rows[i] for i in side], chat == "yes", "Be brief.")
    for i, want in enumerate(trainer.train_dataset):
        mask = tokens.learned[tokens.starts[i] : tokens.stops[i]]
        assert want["input_ids"] == tokens.row(i).tolist()
        assert want["labels"] == np.where(mask, tokens.row(i), -100).tolist()
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    ours = [line["loss"] for line in log_of(Path(result["run"])) if "loss" in line]
    assert ours == pytest.approx(losses, abs=1e-4) and ours[-1] < ours[0] - 1
    trained = checkpoint.load_tensors(Path(result["run"]) / "last/model.safetensors")
    for name, tensor in trainer.model.state_dict().items():
        if name in trained:
            # AdamW divides a gradient by its own size. Where that is near its eps (1e-8), the rounding of another order
            # of sums moves a weight by a share of the learning rate: one of 330,000 by 1.3e-4 on one machine.
            apart = (trained[name] - tensor).abs()
            assert float(apart.max()) < 1e-3 and int((apart > 2e-5).sum()) <= 2, name  # 5 updates of at most 1e-2


@pytest.mark.parametrize("name", ENDS)
def test_all_assistant_turns_and_nothing_else_are_learned(name):
    tokenizer = prefixed(chatty(template(name)))
    said = turns("Hi ", "Hello! How?", "2+2 <|im_end|>", "It is 4.", "And 3+3?\n", "6", system="Be brief.")
    tokens = encoded(tokenizer, [{"messages": said}])
    end = ENDS[name]
    want = "".join(t["content"] + end for t in said if t["role"] == "assistant")
    want = {"phi3": want + "<|endoftext|>", "qwen3": "<think>\n\n</think>\n\n6" + end}.get(name, want)
    assert learned(tokenizer, tokens) == want
    said[3]["content"] = "2+2"  # without the special token spelled, ids are the tokenizer's own, BOS once
    text = tokenizer.apply_chat_template(said, tokenize=False, date_string=prompts.DATE)
    plain = tokenizer(text)["input_ids"]
    ids = encoded(tokenizer, [{"messages": said}]).ids.tolist()
    assert ids == (plain[1:] if plain[0] == plain[1] else plain) and ids[0] == tokenizer.bos_token_id


def test_reasoning_is_learned_with_its_own_tokens_and_special_tokens_stay_text():
    tokenizer = chatty(template("qwen3"))
    thought = "<think>\nr{} is <|im_end|>\n</think>\n\n{}<|im_end|>."
    said = turns("What is <think> <|im_end|>?", thought.format(1, "one"), "And?", thought.format(2, "two"))
    tokens = encoded(tokenizer, [{"messages": said}])
    ids = tokens.ids.tolist()
    assert learned(tokenizer, tokens) == thought.format(2, "two") + ENDS["qwen3"]
    assert "r1" not in tokenizer.decode(ids)  # the template drops it, and what it leaves is not learned
    count = Counter(ids)
    think, done, end = (tokenizer.convert_tokens_to_ids(t) for t in ("<think>", "</think>", "<|im_end|>"))
    assert (count[think], count[done], count[end]) == (1, 1, 4)  # once a turn, and what users spelled is text
    text = tokenizer.apply_chat_template(said, tokenize=False)
    assert tokenizer.decode(ids) == text
    cut = encoded(tokenizer, [{"messages": turns("Why?", "<think>\n" + "so " * 99 + "\n</think>\n\n4")}], max_length=60)
    assert len(cut.ids) == 60 and cut.learned.any() and not cut.learned[-5:].any()
    assert tokenizer.decode(cut.ids).endswith("</think>\n\n4<|im_end|>\n")
    answers = encoded(tokenizer, [{"prompt": "<think>", "response": "<think>a</think>"}], chat=False).ids.tolist()
    assert Counter(answers)[think] == 1  # raw: that of the answer, not that of the prompt


def test_tools_are_shown_and_calls_are_learned_but_not_their_results():
    tokenizer = chatty(template("qwen2_5"))
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    said = [
        *turns("1 + 1?"), {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."},
    ]  # fmt: skip
    tokens = encoded(tokenizer, [{"messages": said, "tools": tools}], system="Be brief.")
    text = tokenizer.decode(tokens.ids)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and '{"type": "function"' in text
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
    assert learned(tokenizer, tokens) == called + "It is 2.<|im_end|>\n"

    # As services give them: the arguments of a call, or the calls, as a JSON string.
    call["function"]["arguments"] = '{"a": 1}'
    assert learned(tokenizer, encoded(tokenizer, [{"messages": said, "tools": tools}])).startswith(called)
    said[2]["tool_calls"] = json.dumps([call["function"]])
    assert learned(tokenizer, encoded(tokenizer, [{"messages": said, "tools": tools}])).startswith(called)
    said[0]["content"] = "x " * 500  # pieces are kept apart, so a long prompt is cut and no template
    assert tokenizer.decode(encoded(tokenizer, [{"messages": said}], max_length=150).ids).endswith(
        "It is 2.<|im_end|>\n"
    )


def test_system_turn_is_given_added_or_left_out_and_the_date_is_pinned():
    tokenizer = chatty(template("qwen2_5"))
    pair, said = {"prompt": "Hi", "response": "Hello"}, turns("Hi", "Hello", system="Mine.")
    given, added = encoded(tokenizer, [{"messages": said}], system="Ours."), encoded(tokenizer, [pair], system="Ours.")
    assert tokenizer.decode(given.ids).startswith("<|im_start|>system\nMine.<|im_end|>")
    assert tokenizer.decode(added.ids).startswith("<|im_start|>system\nOurs.<|im_end|>")
    turn = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + turn
    tokenizer.chat_template = refuses
    assert tokenizer.decode(encoded(tokenizer, [pair], system="Ours.").ids) == "<|user|>Hi<|end|><|user|>Hello<|end|>"
    with pytest.raises(UserError, match="1 of 1 are no pairs .*row 1: the chat template refuses it .*no system"):
        encoded(tokenizer, [{"messages": said}])
    tokenizer.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + turn
    assert tokenizer.decode(encoded(tokenizer, [pair]).ids).startswith("2024-07-26")
    tokenizer.chat_template = template("llama3_2")
    assert f"Today Date: {prompts.DATE}\n" in tokenizer.decode(encoded(tokenizer, [pair]).ids)


def test_a_template_that_leaves_answers_out_is_refused():
    """Some take lists of parts alone: a text vanishes, and nothing but the end of the turn would be learned."""
    parts = "{% for p in m.content if p.text %}{{ p.text }}{% endfor %}"
    tokenizer = chatty("{% for m in messages %}<|user|>" + parts + "<|end|>{% endfor %}")
    with pytest.raises(UserError, match="the chat template leaves out a user's message"):
        encoded(tokenizer, [{"prompt": "Hi", "response": "Hello"}])


CHANGES = ["replace('  ', ' ')", "upper()", "replace('\\n\\n', '\\n')"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["pair", "messages"])
def test_a_template_that_changes_an_answer_is_named_as_the_cause(change, kind):
    """An answer is learned as it is in the file, or not at all; one that the template leaves alone is learned."""
    tokenizer = chatty("{% for m in messages %}<|user|>{{ m['content']." + change + " }}<|end|>{% endfor %}")
    for answer, fits in (("A  two\n\nlines", False), ("7 + 7", True)):
        row = {"prompt": "Hi", "response": answer}
        if kind == "messages":
            said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": answer}]
            row = {"messages": json.dumps(said)}
        if fits:
            assert "7 + 7" in tokenizer.decode(encoded(tokenizer, [row]).ids)
            continue
        with pytest.raises(UserError, match="chat template changes .its blanks.. or leaves out the answer 'A  two"):
            encoded(tokenizer, [row])


def test_ids_and_answers_with_the_real_tokenizer(shared):
    """Qwen2.5's own, with its published template: ids are its own, answers end with <|im_end|>."""
    if not (shared / "tokenizers/qwen2.5").is_dir():
        pytest.skip("no real tokenizer")
    tokenizer = bases.load_tokenizer(str(shared / "tokenizers/qwen2.5"))
    tokenizer.chat_template = template("qwen2_5")
    rng = random.Random(0)
    words = ["é", "数学", "\\frac{a}{b}", " the", "\n\n", "x²", "12345", "😀", "  ", "nai\u0308ve", "\t"]
    made = [
        {k: k + "".join(rng.choices(words, k=rng.randint(1, 30))) for k in ("prompt", "response")} for _ in range(60)
    ]
    tokens = encoded(tokenizer, made, system="Be brief.")
    for i, row in enumerate(made):
        said = turns(row["prompt"], row["response"], system="Be brief.")
        assert tokens.row(i).tolist() == tokenizer.apply_chat_template(said)["input_ids"]
        before = tokenizer.apply_chat_template(said[:2], add_generation_prompt=True)["input_ids"]
        mask = tokens.learned[tokens.starts[i] : tokens.stops[i]]
        assert mask.tolist() == [t >= len(before) for t in range(len(mask))]


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_too_long_loses_its_longest_field_and_a_cut_answer_has_no_end(chat):
    tokenizer = chatty(template("qwen2_5"))
    rng, cut, words = random.Random(1), Counter(), [" cat", " x", "+1", "\n", ".", " é"]
    text = tokenizer.apply_chat_template(turns("?", "!"), tokenize=False)
    parts = [text[: text.index("?")], text[text.index("?") + 1 : text.index("!")], text[text.index("!") + 1 :]]
    parts = parts if chat else ["", "", "<|endoftext|>"]
    before, between, end = ([] if not part else tokenizer(part)["input_ids"] for part in parts)
    around = len(before + between + end)
    for _ in range(300):
        row = {k: f" {k[0]}" + "".join(rng.choices(words, k=rng.randint(0, 40))) for k in ("prompt", "response")}
        prompt, answer = (tokenizer(row[k])["input_ids"] for k in ("prompt", "response"))
        limit = rng.randint(around + 2, around + 50)
        tokens = encoded(tokenizer, [row], chat, "", limit)
        room, answered = min(limit - around, len(prompt + answer)), int(tokens.learned.sum())
        kept = answered if not tokens.learned[-1] else answered - len(end)
        asked = room - kept
        assert tokens.ids.tolist() == before + prompt[:asked] + between + answer[:kept] + end
        whole = kept == len(answer)
        want = [False] * (len(before + between) + asked) + [True] * kept + [whole] * len(end)
        assert kept and tokens.learned.tolist() == want
        if asked < len(prompt):  # a field that is cut is as long as the other one, or longer
            assert asked >= kept - 1
            cut["prompt"] += 1
        if not whole:
            assert kept >= asked - 1
            cut["answer"] += 1
    assert min(cut["answer"], cut["prompt"]) > 30
    with pytest.raises(UserError, match="max_length"):
        encoded(tokenizer, [row], chat, "", around)


def test_a_tokenizer_that_ends_texts_itself_ends_them_once():
    tokenizer = bases.load_tokenizer(str(ROOT / "tiny/base"))
    plain = encoded(tokenizer, [{"prompt": "Why? ", "response": "So."}], chat=False)
    document, end = data.encode(tokenizer, [[(True, "A text.")]], 99)[0], data.end_of_text(tokenizer)
    plain_document = corpus.end_documents(document, end)
    eos = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"$A {eos[0]}", special_tokens=[eos])
    assert tokenizer("a").input_ids[-1] == end
    ending = encoded(tokenizer, [{"prompt": "Why? ", "response": "So."}], chat=False)
    assert (ending.ids.tolist(), ending.learned.tolist()) == (plain.ids.tolist(), plain.learned.tolist())
    rows = [[(True, "A text.")], [(True, "A text.")]]
    ended = corpus.end_documents(data.encode(tokenizer, rows, 99)[0], end)
    assert [ended.row(i).tolist() for i in (0, 1)] == [plain_document.row(0).tolist()] * 2


# ---- losses ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(base):
    return language.load_language_model(base, CPU, torch.float32).eval()


@pytest.fixture(scope="module")
def both(base, rows) -> dict[str, tuple[data.Tokens, np.ndarray]]:
    """Rows of pairs and segments of documents, and for each the first indices of what it was cut from."""
    tokenizer = bases.load_tokenizer(base)
    documents, _ = data.encode(tokenizer, [[(True, r["prompt"] * (1 + i % 4))] for i, r in enumerate(rows)], 10**6)
    documents = corpus.end_documents(documents, data.end_of_text(tokenizer))
    sizes = np.array([len(r["prompt"].encode()) * (1 + i % 4) for i, r in enumerate(rows)])
    found = corpus.Corpus(documents, sizes, False, [])
    order = np.random.default_rng(0).permutation(len(rows))
    made = {"pairs": encoded(tokenizer, rows, system="Be brief.")}
    for name, cross in (("documents", False), ("stream", True)):
        made[name] = corpus.segments(found, order, tokenizer, 16, cross)
    return made | {"whole": documents}


@pytest.fixture(scope="module")
def plain(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def losses_of(lm, tokens: data.Tokens, chosen: np.ndarray) -> torch.Tensor:
    """(P,) the loss of each target of a packed row."""
    batch = pack(tokens, chosen, CPU, predict=True)
    with torch.no_grad():
        logits = language.vocabulary_head(lm)(models.hidden_states(lm.base_model, batch)[batch.targets - 1])
        found = torch.nn.functional.cross_entropy(logits, batch.input_ids[batch.targets], reduction="none")
        assert language.next_token_loss(lm, batch) == pytest.approx(float(found.sum()), rel=1e-5)
    return found


@pytest.mark.parametrize("kind", ["pairs", "documents"])
def test_a_token_costs_in_a_packed_row_what_it_costs_alone(lm, plain, both, kind):
    tokens = both[kind]
    chosen = np.random.default_rng(1).permutation(len(tokens.lengths))[:15]
    packed, at = losses_of(lm, tokens, chosen), 0
    for i in chosen:
        ids = torch.from_numpy(tokens.row(i).astype(np.int64))[None]
        with torch.no_grad():
            alone = torch.nn.functional.cross_entropy(plain(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        mask = (
            torch.from_numpy(tokens.learned[tokens.starts[i] + 1 : tokens.stops[i]].copy()) if kind == "pairs" else ...
        )
        want = alone[mask]
        torch.testing.assert_close(packed[at : at + len(want)], want, rtol=0, atol=1e-5)
        at += len(want)
    assert at == len(packed) == tokens.targets[chosen].sum()


def test_only_cross_document_segments_see_the_document_before(lm, both):
    """The same stream of tokens, cut with and without its borders: documents do not change with what stands before."""
    documents, stream = both["documents"], both["stream"]
    apart = losses_of(lm, documents, np.arange(len(documents.lengths)))
    across = losses_of(lm, stream, np.arange(len(stream.lengths)))
    assert len(across) > len(apart) and abs(float(across.sum()) / len(across) - float(apart.sum()) / len(apart)) > 1e-2


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["pairs", "documents"])
def test_every_token_is_learned_once_an_epoch_on_any_number_of_ranks(both, kind, world):
    tokens, seen = both[kind], Counter()
    for step in data.plan_epoch(tokens.lengths, 5, 64, max(2, world), seed=3, epoch=1):
        for rank in range(world):
            for j in range(rank, len(step), world):
                batch = pack(tokens, step[j], CPU, predict=True)
                owner = np.repeat(step[j], batch.lengths)
                targets = batch.targets.numpy()
                places = tokens.starts[owner[targets]] + batch.position_ids.numpy()[targets]
                assert (tokens.ids[places] == batch.input_ids.numpy()[targets]).all()
                seen.update(places.tolist())
    want = set(np.flatnonzero(tokens.learned).tolist()) if kind == "pairs" else set(range(len(tokens.ids)))
    want -= set() if kind == "pairs" else set(both["whole"].starts.tolist())
    assert seen == Counter(dict.fromkeys(want, 1))


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_and_bits_per_byte_are_those_of_a_plain_loop(lm, plain, base, tmp_path, bos):
    """A first token that is text is not predicted, so its bytes do not count; BOS is no text."""
    tokenizer = bases.load_tokenizer(base)
    texts = [f"The sum of {i} and {i * i} is {i + i * i}, as é says. " * (1 + i % 3) for i in range(12)]
    if bos:
        tokenizer.bos_token = "<|im_start|>"
        prefixed(tokenizer)
    how = dict(template="{text}", max_length=16, chat="auto", system="")
    read = corpus.load(
        str(write_jsonl(tmp_path / "d.jsonl", [{"text": t} for t in texts])), "train_data", tokenizer, tmp_path / "c",
        ALONE, print, **how,
    )  # fmt: skip
    tokens = corpus.segments(read, np.arange(len(texts)), tokenizer, 10**6)
    nats, count, size = 0.0, 0, 0
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            ids = torch.tensor([ids])
            nats += float(plain(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
        size += len(text.encode()) - (0 if bos else len(tokenizer.decode(ids[0, :1]).encode()))
    scores = language.language_scores(lm, tokens, ALONE, "fp32", 9999)
    want = {"loss": nats / count, "perplexity": np.exp(nats / count), "bits_per_byte": nats / np.log(2) / size}
    assert scores == pytest.approx(want, rel=1e-5)


# ---- bad pairs ------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "Hi", "response": "Hello"}
BAD = {
    "missing response": ([GOOD, {"prompt": "a"}], r"pairs.jsonl row 2: no response"),
    "empty response": ([GOOD, GOOD, {"prompt": "a", "response": " "}], r"row 3: no response"),
    "null response": ([{"prompt": "a", "response": None}], r"row 1: no response"),
    "no prompt": ([{"response": "a"}], r"row 1: no 'prompt'"),
    "messages no list": ([{"messages": {"role": "user"}}], r"row 1: messages is no list"),
    "messages no JSON": ([{"messages": "hello"}], r"row 1: .*Expecting value"),
    "messages too deep": ([{"messages": "[" * 99999}], r"row 1: .*recursion"),
    "bad role": ([{"messages": [{"role": "robot", "content": "a"}, *turns("a", "b")]}], r"row 1: .*'robot'"),
    "content no text": ([{"messages": turns("a", 5)}], r"row 1: .*int as content"),
    "calls, no text": ([{"messages": [*turns("a"), {**turns("a", 5)[1], "tool_calls": []}]}], r"int as content"),
    "no assistant": ([{"messages": turns("a")}], r"row 1: no response"),
    "last turn not assistant": ([{"messages": turns("a", "b", "c")}], r"expected an assistant's turn at the end"),
    "tools no JSON": ([GOOD | {"tools": "add()"}], r"row 1: .*Expecting value"),
    "mixed": ([GOOD, {"text": "a document"}], r"1 of 2 are no pairs .*row 2: no 'prompt'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_pairs_are_one_line_that_names_the_rows_and_nothing_is_left(base, tmp_path, name):
    bad, words = BAD[name]
    path = write_jsonl(tmp_path / "pairs.jsonl", bad)
    with pytest.raises(UserError, match=words) as error:
        cpt.main(pair_flags(base, path, tmp_path))
    assert "\n" not in str(error.value) and not (tmp_path / "outputs").exists()


def test_messages_need_a_chat_template(base, small_base, tmp_path):
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"messages": turns("a", "b")}] * 2)
    for flags in (pair_flags(small_base, path, tmp_path), pair_flags(base, path, tmp_path, chat="no")):
        with pytest.raises(UserError, match="row 1: messages need a chat template"):
            cpt.main(flags)
    with pytest.raises(UserError, match="row 1"):
        cpt.main(pair_flags(small_base, path, tmp_path, chat="yes"))


def test_the_command_says_it_in_one_line_with_status_2(base, tmp_path, command):
    path = write_jsonl(tmp_path / "pairs.jsonl", [GOOD, {"prompt": "a"}])
    status, out, err = command("cpt.py", *pair_flags(base, path, tmp_path))
    assert status == 2 and "Traceback" not in err and not (tmp_path / "outputs").exists()
    assert err.strip().splitlines()[-1].startswith(f"error: --train_data {path}: 1 of 2 are no pairs"), err


# ---- whole runs -----------------------------------------------------------------------------------------------------


@forks
def test_nf4_adapter_on_two_ranks_and_resumed_is_the_same_to_the_bit_and_its_export_loads(base, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    path = write_jsonl(tmp_path / "pairs.jsonl", [*rows, {"prompt": "", "response": "Nothing was asked."}])
    changes = dict(rank=4, alpha=6, targets="all-linear", quant="nf4", lora_dropout=0.1, val_size=5, samples=5)
    flags = {name: pair_flags(base, path, tmp_path / name, **changes) for name in ("one", "two", "cut")}
    for name in flags:
        (tmp_path / name).mkdir()
    result = cpt.main([*flags["one"], "--export", str(tmp_path / "merged")])
    want = Path(result["run"])
    assert result["metrics"]["loss"] < result["before"]["loss"] - 0.5
    (pid,) = start(cpt.main, flags["cut"], tmp_path / "cut")
    assert wait_for(tmp_path / "cut", 5, pid)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for name, ranks, more in (("two", 2, []), ("cut", 1, ["--resume", "auto"])):
        status, out, err = forked(cpt.main, [*flags[name], *more], tmp_path / name, ranks=ranks)
        assert status == 0, err
        assert log_of(run_of(out)) == log_of(want)
        for side in ("best", "last"):
            file = f"{side}/adapter_model.safetensors"
            assert checkpoint.sha256(run_of(out) / file) == checkpoint.sha256(want / file)
    tensors = checkpoint.load_tensors(want / "last/adapter_model.safetensors")
    linears = {f"{m}_proj" for m in ("q", "k", "v", "o", "gate", "up", "down")}
    assert {name.split(".")[-3] for name in tensors} == linears and len(tensors) == 2 * 2 * 7
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    moved = {n for n, t in merged.state_dict().items() if not torch.equal(t.bfloat16(), plain[n].bfloat16())}
    assert {n.split(".")[-2] for n in moved} == linears and len(moved) == 2 * 7
    assert bases.load_tokenizer(str(tmp_path / "merged")).chat_template


def test_presets_are_the_published_recipes():
    plain = dataclasses.asdict(configs.CptConfig())
    projections = tuple(f"{m}_proj" for m in ("q", "k", "v", "o", "gate", "up", "down"))
    want = {
        "llama8b_sft": {
            "base": "meta-llama/Llama-3.1-8B", "train_data": "dataset/train.jsonl", "quant": "nf4", "max_length": 2048,
            "epochs": 3, "lr": 1e-4, "warmup_steps": 100, "warmup_ratio": 0.0, "weight_decay": 0.01,
            "optimizer": "paged_adamw", "batch_size": 8, "micro_batches": 2, "eval_every": 500,
            "save_every": 500, "val_size": 5000, "eval_rows": 500, "rank": 16, "lora_dropout": 0.0,
            "targets": ("all-linear",), "grad_checkpoint": True,
        },
        "qwen_math15b": {
            "base": "Qwen/Qwen2.5-Math-1.5B", "train_data": "dataset/papers", "rank": 8, "max_length": 2048,
            "targets": (*projections, "embed_tokens", "lm_head"), "epochs": 3, "batch_size": 16, "max_tokens": 2048,
            "lr": 1e-4, "embed_lr": 1e-5, "weight_decay": 0.01, "grad_checkpoint": True,
            "micro_batches": 2,
        },
    }  # fmt: skip
    for name, values in want.items():
        found = dataclasses.asdict(presets.CPT_PRESETS[name]())
        assert {k: v for k, v in found.items() if v != plain[k]} == values
        assert (found["alpha"], found["schedule"]) == (16.0, "cosine")
        assert (found["lora_dropout"] == 0.05) == (name == "qwen_math15b")


# ---- pairs as people keep them --------------------------------------------------------------------------------------

SHARED = turns("What is 1+1?", "2")
LAYOUTS = {  # the row, its columns as they are printed
    "prompt, completion": {"prompt": "What is 1+1?", "completion": "2"},
    "Prompt, Response": {"Prompt": "What is 1+1?", "Response": "2"},
    "instruction, input, output": {"instruction": "What is", "input": "1+1?", "output": "2"},
    "instruction, context, response": {"instruction": "What is", "context": "1+1?", "response": "2", "category": "qa"},
    "instruction, output": {"instruction": "What is 1+1?", "output": "2", "history": []},
    "question, answer": {"question": "What is 1+1?", "answer": "2", "id": 7},
    "problem, solution": {"problem": "What is 1+1?", "solution": "2"},
    "query, response": {"query": "What is 1+1?", "response": "2"},
    "input, output": {"input": "What is 1+1?", "output": "2"},
    "conversations": {"conversations": [{"from": "human", "value": "What is 1+1?"}, {"from": "gpt", "value": "2"}]},
    "conversation": {"conversation": SHARED},
    "messages": {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is 1+1?"}]}, SHARED[1]]},
}


def read_pairs(tokenizer, path: Path, rows: list[dict], text: str = "{text}", chat: str = "yes") -> corpus.Corpus:
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_jsonl(path, rows)
    sources = corpus.find_files(str(path), "train_data")
    return corpus.encode_files(sources, "train_data", tokenizer, text, 10**6, chat, "")


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_the_usual_layouts_are_the_same_pair(tmp_path, name, suffix):
    """The answer alone is learned, and what was recognised is said."""
    tokenizer = chatty(template("qwen2_5"))
    found = read_pairs(tokenizer, tmp_path / f"a.{suffix}", [LAYOUTS[name]])
    text = tokenizer.decode(found.tokens.ids)
    assert found.pairs and learned(tokenizer, found.tokens) == "2<|im_end|>\n"
    question = "What is\n\n1+1?" if name.count(",") == 2 else "What is 1+1?"
    assert f"user\n{question}<|im_end|>" in text and f"1 pairs (1 of {name})" in found.summary


def test_rows_of_several_layouts_and_several_turns(tmp_path):
    tokenizer = chatty(template("qwen2_5"))
    said = [
        {"from": "system", "value": "Count."}, {"from": "human", "value": "One?"}, {"from": "gpt", "value": "1"},
        {"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"},
    ]  # fmt: skip
    same = [{"instruction": "Say", "input": "", "output": word, "system": "Brief."} for word in ("a", "b", "b")]
    found = read_pairs(tokenizer, tmp_path / "a.jsonl", [{"conversations": said}, *same, {"messages": SHARED}])
    assert [learned(tokenizer, found.tokens, i).split("<|im_end|>\n")[:-1] for i in range(4)] == [
        ["1", "2"], ["a"], ["b"], ["2"],
    ]  # fmt: skip
    texts = [tokenizer.decode(found.tokens.row(i)) for i in range(4)]
    assert "system\nCount.<" in texts[0] and "system\nBrief.<" in texts[1] and "user\nSay<" in texts[1]


def test_prompts_and_completions_of_turns(tmp_path):
    tokenizer = chatty(template("qwen2_5"))
    found = read_pairs(tokenizer, tmp_path / "a.jsonl", [{"prompt": SHARED[:1], "completion": SHARED[1:]}])
    assert learned(tokenizer, found.tokens) == "2<|im_end|>\n"
    with pytest.raises(UserError, match="row 1: an assistant's turn is not to be learned"):
        row = {"prompt": [*SHARED, SHARED[0]], "completion": SHARED[1:]}
        read_pairs(tokenizer, tmp_path / "a.jsonl", [row])


def test_a_template_names_the_prompt_and_documents_stay_documents(tmp_path):
    tokenizer = chatty(template("qwen2_5"))
    row = {"question": "What is 1+1?", "answer": "2"}
    found = read_pairs(tokenizer, tmp_path / "a.jsonl", [row], text="Q: {question}")
    assert "user\nQ: What is 1+1?<" in tokenizer.decode(found.tokens.ids)
    assert learned(tokenizer, found.tokens) == "2<|im_end|>\n"
    assert not read_pairs(tokenizer, tmp_path / "a.jsonl", [row], text="{question} {answer}").pairs
    found = read_pairs(tokenizer, tmp_path / "a.jsonl", [row | {"text": "A document."}])
    assert not found.pairs and "question, answer are not read" in found.summary


NOT_KNOWN = {
    "role": (
        {"conversations": [{"from": "martian", "value": "a"}, *SHARED]},
        "'martian' .keys from, value.; known are",
    ),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SHARED[1]]},
        "a part of type 'image_url': only text",
    ),
    "weight": ({"messages": [*SHARED[:1], {**SHARED[1], "weight": 0}, *SHARED]}, "not to be learned .weight 0"),
    "train": ({"messages": [SHARED[0], {**SHARED[1], "train": False}, *SHARED]}, "not to be learned .train False"),
    "mask": ({"messages": [SHARED[0], {**SHARED[1], "loss_mask": 0.0}, *SHARED]}, "not to be learned .loss_mask"),
    "bad answer": ({"prompt": "a", "completion": "b", "label": False}, "label false marks a response as a bad one"),
    "arguments": (
        {"messages": [SHARED[0], {**SHARED[1], "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "the arguments of a tool call are no object: '.1.'",
    ),
    "function": ({"messages": [SHARED[0], {**SHARED[1], "function_call": {"name": "f"}}]}, "has a function_call"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen and rejected are preferences"),
    "two answers": ({"question": "a", "solution": "b", "answer": "c"}, "columns solution and answer: name the one"),
    "history": ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "column history is not read"),
    "no answer": ({"instruction": "a", "output": " "}, "row 1: no response"),
}


@pytest.mark.parametrize("name", NOT_KNOWN)
def test_what_is_no_known_pair_is_named_with_its_row(tmp_path, name):
    row, words = NOT_KNOWN[name]
    with pytest.raises(UserError, match=f"a.jsonl row 1: .*{words}" if "row 1" not in words else words) as error:
        read_pairs(chatty(template("qwen2_5")), tmp_path / "a.jsonl", [row])
    assert "\n" not in str(error.value)


def test_system_texts_need_a_chat(tmp_path):
    with pytest.raises(UserError, match="row 1: system texts need a chat template"):
        row = {"instruction": "a", "output": "b", "system": "c"}
        read_pairs(chatty(template("qwen2_5")), tmp_path / "a.jsonl", [row], chat="no")


# ---- what is no text, and tokenizers that cannot end one ------------------------------------------------------------


def encode_file(path: Path, rows: list[dict], tokenizer, **options) -> corpus.Corpus:
    """The corpus of a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"template": "{text}", "max_length": 99, "chat": "auto", "system": "", **options}
    return corpus.encode_files([(path.parent, [path])], "train_data", tokenizer, **settings)


@pytest.mark.parametrize("cell", [["a", "b"], {"en": "a"}])
def test_lists_and_objects_are_no_text_to_learn(tmp_path, cell, capsys):
    """Of documents a line says so; pairs are refused by name; the only row of a file is a table by columns."""
    tokenizer = bases.load_tokenizer(str(ROOT / "tiny/base"))
    path = tmp_path / "a.jsonl"
    encode_file(path, [{"text": cell}, {"text": "b"}], tokenizer)
    assert "column text holds lists or objects in 1 rows (1)" in capsys.readouterr().out
    with pytest.raises(UserError, match="of its only row holds a list or object: write one object a line"):
        encode_file(path, [{"text": cell}], tokenizer)
    for row in (
        {"prompt": "a", "response": cell},
        {"instruction": cell, "output": "b"},
        {"question": "a", "answer": cell},
    ):
        with pytest.raises(UserError, match="a.jsonl row 1: its (prompt|response) is a list or object, no text"):
            encode_file(path, [row, {**row, "more": "c"}], tokenizer)


@pytest.mark.parametrize("row", [{"text": "a b"}, {"prompt": "a", "response": "b"}])
def test_a_tokenizer_without_an_end_is_refused_before_anything_ends_in_a_letter(tmp_path, row):
    """Where a chat template ends the turns nothing is missing, and a padding token will do."""
    tokenizer = bases.load_tokenizer(str(ROOT / "tiny/base"))
    pad = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(UserError, match="has no EOS and no padding token: name its eos_token"):
        encode_file(tmp_path / "a.jsonl", [row], tokenizer, chat="no")
    if "prompt" in row:
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
        assert encode_file(tmp_path / "a.jsonl", [row], tokenizer).pairs
    tokenizer.pad_token = pad
    assert encode_file(tmp_path / "a.jsonl", [row], tokenizer, chat="no").tokens.ids[-1] == tokenizer.pad_token_id
