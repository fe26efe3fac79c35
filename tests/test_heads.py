"""Heads beside the linear one: label words and regression; and the export of every kind of run as transformers' own.

The reference is always transformers' (or peft's) own class with stock attention on one row at a time. Bases are small
random models, biases and norms away from their defaults. Tolerances are shares of the reference's largest value.
"""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import load_rows, unsealed
from safetensors.torch import load_file
from test_ddp import forked, forks, log_of, run_of, shas, toy_flags, write_rows

import bases
import checkpoint
import checks
import cli
import configs
import data
import files
import infer
import labelling
import lora
import losses
import metrics
import model as models
import optim
import presets
import train
import trained
from errors import Untrusted, UserError
from packed import Batch, pack

pytestmark = forks
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CLOSE = 1e-5  # of the largest value
SIZES = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=0, pad_token_id=None,
)  # fmt: skip
DECODERS = {  # config and class, as Gemma 3's text part is named otherwise
    "Qwen2": ("Qwen2", dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "Qwen3": ("Qwen3", dict(head_dim=12)),
    "Llama": ("Llama", dict()),
    "Mistral": ("Mistral", dict(sliding_window=6, head_dim=8)),
    "Gemma3Text": (
        "Gemma3",
        dict(
            sliding_window=5, head_dim=8, layer_types=["sliding_attention", "full_attention"],
            final_logit_softcapping=2.0,
        ),
    ),
    "Phi3": ("Phi3", dict(sliding_window=7)),
}  # fmt: skip
ENCODERS = {
    "Bert": dict(max_position_embeddings=130, pad_token_id=0),
    "Roberta": dict(max_position_embeddings=130, pad_token_id=1),
    "ModernBert": dict(local_attention=6, global_attn_every_n_layers=2, pad_token_id=0),
    "DebertaV2": dict(
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4, position_biased_input=False,
        type_vocab_size=0, pad_token_id=0,
    ),
}  # fmt: skip
NAMES = tuple("algebra,geometry,calculus,combinatorics,number,probability,puzzle,other".split(","))
LETTERS = "A,B,C,D,E,F,G,H"  # a word a class; " A" and the others are tokens of tiny/base
ASK = "{Question}\nClass:"


def shaken(model):
    """Biases and norms, and what starts at zero, away from their defaults."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or name.startswith(("classifier", "score")):
                p += 0.2 * torch.randn_like(p)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(family, tied, text) -> a folder with a small random causal LM, or a masked LM of an encoder's family.

    text: as wide as the tokenizer of tiny/base, which then lies beside it. It never changes.
    """
    made = {}

    def make(family, tied=True, text=False):
        key = family, tied, text
        if key in made:
            return made[key]
        torch.manual_seed(0)
        wide = {"vocab_size": 4096} if text else {}
        if family in ENCODERS:
            config = getattr(transformers, f"{family}Config")(**{**SIZES, **ENCODERS[family], **wide})
            model = getattr(transformers, f"{family}ForMaskedLM")(config)
        else:
            name, changes = DECODERS[family]
            sizes = {**SIZES, **changes, **wide, "tie_word_embeddings": tied}
            config = getattr(transformers, f"{family}Config")(**sizes)
            model = getattr(transformers, f"{name}ForCausalLM")(config)
        made[key] = str(tmp_path_factory.mktemp(family))
        shaken(model).save_pretrained(made[key])
        if text:
            transformers.AutoTokenizer.from_pretrained(ROOT / "tiny/base").save_pretrained(made[key])
        return made[key]

    return make


def sequences(lengths=(9, 1, 17, 4), seed=0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(3, 61, n).tolist() for n in lengths]


def batch_of(rows) -> Batch:
    return pack(data.join_tokens(rows), np.arange(len(rows)), CPU)


def near(got, want, share=CLOSE):
    got, want = torch.as_tensor(got), torch.as_tensor(want)
    torch.testing.assert_close(got, want, rtol=0, atol=share * float(want.detach().abs().max()))


def word_logits(model, rows, words) -> torch.Tensor:
    """What label words mean, by their definition, on a causal LM of transformers': (B, C) from each row alone."""
    last = torch.cat([model(input_ids=torch.tensor([r])).logits[:, -1] for r in rows])
    return torch.stack([torch.logsumexp(last[:, list(ids)], dim=1) for ids in words], dim=1)


def read_csv(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# ---- label words: the logits ----------------------------------------------------------------------------------------

WORDS = ((5, 9), (7,), (11, 3, 20))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_label_words_are_log_probabilities_of_the_lm_head(base, family, tied):
    """Their differences are those of log-probabilities, aliases summed; the base brings every weight.

    Packed here, alone in transformers' own causal LM; gradients too, of a tied matrix from both its ends.
    """
    folder, rows = base(family, tied), sequences()
    ours = models.load_classifier(folder, models.Head(3, words=WORDS), CPU, torch.float32).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert ours.fresh == () and ours.heads == () and ours.outputs == 3
    assert (ours.lm_head.weight is ours.backbone.get_input_embeddings().weight) == tied
    got, want = ours(batch_of(rows)), word_logits(theirs, rows, WORDS)
    near(got, want)
    logits = torch.cat([theirs(input_ids=torch.tensor([r])).logits[:, -1] for r in rows])
    shares = torch.stack([logits.softmax(1)[:, list(ids)].sum(1) for ids in WORDS], dim=1).log()
    near(got[:, 1:] - got[:, :1], shares[:, 1:] - shares[:, :1])
    assert got.std(0).min() > 1e-2

    for z in (got, want):
        (z * torch.arange(1.0, 13.0).view(4, 3)).sum().backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    found = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == gradients.keys() and ("lm_head.weight" in found) != tied
    for name, gradient in found.items():
        near(gradient, gradients[name])


def test_a_soft_cap_of_logits_is_honoured(base, tmp_path):
    """A control for Gemma: without the cap of its config the same weights give other logits."""
    shutil.copytree(base("Gemma3Text"), tmp_path / "plain")
    path = tmp_path / "plain/config.json"
    config = json.loads(path.read_text())
    assert config.pop("final_logit_softcapping") == 2.0
    path.write_text(json.dumps(config))
    with torch.no_grad():
        capped, plain = (
            models.load_classifier(folder, models.Head(3, words=WORDS), CPU, torch.float32).eval()(
                batch_of(sequences())
            )
            for folder in (base("Gemma3Text"), str(tmp_path / "plain"))
        )
    assert (capped - plain).abs().max() > 0.1


# ---- label words: which tokens --------------------------------------------------------------------------------------


def tiny_tokenizer():
    return bases.load_tokenizer(str(ROOT / "tiny/base"))


def next_ids(tokenizer, text: str, words: list[str]) -> set[int]:
    """First tokens of continuations of a whole text, which must leave the text's own tokens as they are."""
    before = tokenizer(text)["input_ids"]
    found = set()
    for word in words:
        after = tokenizer(text + word)["input_ids"]
        assert after[: len(before)] == before
        found.add(after[len(before)])
    return found


@pytest.mark.parametrize(
    "template,space", [("{Question}\nAnswer:", " "), ("{Question}\nAnswer:\n", ""), ("Solve: {Question}", " ")]
)
def test_words_are_taken_as_they_follow_the_rendered_text(template, space):
    """Yes with a space before it is another token. A space comes first after a colon and a field, not a line."""
    tokenizer = tiny_tokenizer()
    spaced, bare = (tokenizer(w)["input_ids"][0] for w in (" Yes", "Yes"))
    assert spaced != bare
    found = data.label_word_ids(tokenizer, template, ("Yes", "No"))
    assert found[0] == ((spaced,) if space else (bare,))
    for question in ("What is $2 + 2$?", "Prove it", "x = 1)"):
        text = template.format(Question=question)
        for ids, word in zip(found, ("Yes", "No"), strict=True):
            assert set(ids) == next_ids(tokenizer, text, [space + word])


def test_aliases_are_summed_and_counted_once(base):
    """ "yes|Yes|YES| Yes": spaces around an alias do not count, and two with the same first token are one."""
    tokenizer = tiny_tokenizer()
    template = "{Question}\nAnswer:"
    yes, no = data.label_word_ids(tokenizer, template, ("yes|Yes| Yes |YES", "no"))
    expected = next_ids(tokenizer, "a\nAnswer:", [" yes", " Yes", " YES"])
    assert len(yes) == len(expected) == 2 and set(yes) == expected  # Yes and YES begin alike in this tokenizer
    assert data.label_word_ids(tokenizer, template, ("yes", "no")) == ((yes[0],), no)
    twice = ((5, 9), (7,))
    model = models.load_classifier(base("Qwen2"), models.Head(2, words=twice), CPU, torch.float32).eval()
    single = models.load_classifier(base("Qwen2"), models.Head(3, words=((5,), (9,), (7,))), CPU, torch.float32).eval()
    with torch.no_grad():
        sums, parts = model(batch_of(sequences())), single(batch_of(sequences()))
    near(sums, torch.stack([parts[:, :2].logsumexp(1), parts[:, 2]], dim=1))


def ending(tokenizer, token: str):
    """The same tokenizer, closing every text with a special token, as those of encoders do."""
    from tokenizers.processors import TemplateProcessing

    ids = [(token, tokenizer.convert_tokens_to_ids(token))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {token}", special_tokens=ids)
    assert tokenizer("a")["input_ids"][-1] == ids[0][1]
    return tokenizer


@pytest.mark.parametrize(
    "template,words,said",
    [
        ("{q}\nAnswer:", ("True", "Trust"), "'True' and 'Trust' begin with the same token ' T'"),
        ("{q}\nAnswer:", ("yes|True", "no|Trust"), "'yes|True' and 'no|Trust' begin with the same token ' T'"),
        ("{q}\nAnswer:", ("0", "1"), "'0' and '1' begin with the same token ' '"),
        ("{q}\nAnswer: ", ("Yes", "No"), "a token joins the template's end .* and the word 'Yes'"),
        ("{q}\nAnswer:", ("Yes|", "No"), "has an empty alias"),
        ("{q}\nAnswer:", ("Yes", "|No"), "has an empty alias"),
    ],
)
def test_words_that_cannot_be_told_apart_or_follow_are_refused(template, words, said):
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match=f"--head label_words: .*{said.replace('|', '[|]')}"):
        data.label_word_ids(tokenizer, template, words)


def test_digits_follow_a_space_where_nothing_joins_it():
    """A template may end in a space where the tokenizer keeps digits apart; without it they all begin alike."""
    tokenizer = tiny_tokenizer()
    found = data.label_word_ids(tokenizer, "{q}\nAnswer: ", ("0", "1", "2"))
    assert [tokenizer.decode(ids) for ids in found] == ["0", "1", "2"]
    for ids, word in zip(found, "012", strict=True):
        assert set(ids) == next_ids(tokenizer, "What?\nAnswer: ", [word])


def test_a_tokenizer_that_ends_texts_is_refused():
    tokenizer = ending(tiny_tokenizer(), "<|im_end|>")
    with pytest.raises(UserError, match=r"ends a text with '<\|im_end\|>': no word can follow"):
        data.label_word_ids(tokenizer, "{q}\nAnswer:", ("Yes", "No"))


@pytest.mark.parametrize("words", [("True", "False"), ("yes", "no"), ("Yes|yes|YES", "No|no|NO")])
@pytest.mark.parametrize("template,space", [("{q}\nIs it right?", " "), ("{q}\n", ""), ("{q}", " ")])
def test_words_of_qwen(shared, words, template, space):
    """The published tokenizer: each of these words is one token, with and without the space before it."""
    tokenizer = bases.load_tokenizer(str(shared / "tokenizers/qwen2.5"))
    found = data.label_word_ids(tokenizer, template, words)
    assert [[tokenizer.decode([i]) for i in ids] for ids in found] == [
        [space + alias for alias in word.split("|")] for word in words
    ]
    for question in ("Is 7 prime?", "2+2=4"):
        text = template.format(q=question)
        for ids, word in zip(found, words, strict=True):
            assert set(ids) == next_ids(tokenizer, text, [space + alias for alias in word.split("|")])


# ---- label words: runs ----------------------------------------------------------------------------------------------


def word_flags(folder: Path, base: str, **changes) -> list[str]:
    """A run of label words; None drops a flag."""
    settings = {"head": "label_words", "text": ASK, "label_words": LETTERS, "head_dropout": None, "max_steps": 4}
    return toy_flags(folder, base, **{**settings, "eval_every": 2, "lr": 1e-2, "lora_dropout": 0.1, **changes})


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "q_proj,lm_head,embed_tokens"])
def test_a_trained_head_of_words_is_an_adapter_of_a_causal_lm(base, tmp_path, targets):
    """peft loads it as such and gives the same label logits, the adapted head and embeddings of a tied base too."""
    from peft import AutoPeftModelForCausalLM

    folder = base("Qwen2", text=True)
    result = train.main(word_flags(tmp_path, folder, targets=targets))
    run = Path(result["run"])
    about = json.loads((run / "best/adapter_config.json").read_text())
    assert about["task_type"] == "CAUSAL_LM" and not about["modules_to_save"]
    saved = load_file(run / "best/adapter_model.safetensors")
    layers = {f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in targets.split(",") if "proj" in m}
    keys = {f"{n}.lora_{side}.weight" for n in layers for side in "AB"}
    if "lm_head" in targets:
        keys |= {"lm_head.lora_A.weight", "lm_head.lora_B.weight"}
        keys |= {"model.embed_tokens.lora_embedding_A", "model.embed_tokens.lora_embedding_B"}
    assert saved.keys() == {f"base_model.model.{k}" for k in keys}

    live = trained.load_run(run)
    rows = files.read_rows(str(tmp_path / "val.csv"), "val_data")
    logits, _ = live.logits(rows, 256)
    written = np.array([[float(r[f"logit_{c}"]) for c in range(8)] for r in read_csv(run / "val_predictions.csv")])
    assert np.array_equal(logits, written.astype(np.float32))
    theirs = AutoPeftModelForCausalLM.from_pretrained(run / "best").eval()
    words = data.label_word_ids(live.tokenizer, ASK, tuple(LETTERS.split(",")))
    tokens, _ = data.tokenize(live.tokenizer, ASK, rows, 64)
    with torch.no_grad():
        near(logits, word_logits(theirs, [tokens.row(i).tolist() for i in range(len(rows))], words))
    with lora.disable(live.model):
        assert np.abs(live.logits(rows, 256)[0] - logits).max() > 1e-2  # the adapter does something
    assert metrics.of_task("single_label", logits, np.array([int(r["label"]) for r in rows]))[
        "accuracy"
    ] == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_itself_is_trained_through_its_words(base, tmp_path, tied):
    """Rank 0: every tensor, a tied matrix once; the save is a causal LM of transformers'."""
    folder = base("Llama", tied, text=True)
    flags = word_flags(tmp_path, folder, rank=0, alpha=None, lora_dropout=None, lr=1e-3)
    run = Path(train.main(flags)["run"])
    saved, stored = load_file(run / "best/model.safetensors"), load_file(Path(folder) / "model.safetensors")
    assert saved.keys() == stored.keys() and ("lm_head.weight" in saved) != tied
    assert all(not torch.equal(t, stored[n]) for n, t in saved.items())
    rows = files.read_rows(str(tmp_path / "val.csv"), "val_data")
    live = trained.load_run(run)
    words = data.label_word_ids(live.tokenizer, ASK, tuple(LETTERS.split(",")))
    tokens, _ = data.tokenize(live.tokenizer, ASK, rows, 64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "best").eval()
    with torch.no_grad():
        want = word_logits(theirs, [tokens.row(i).tolist() for i in range(len(rows))], words)
    near(live.logits(rows)[0], want)
    assert theirs.config.tie_word_embeddings == tied


@pytest.mark.parametrize("words", [None, "true|True,false|False"])
def test_a_base_scores_words_without_training(base, tmp_path, words):
    """infer.py --base --head label_words: the names of the classes are their words, unless words are given."""
    folder, template = base("Qwen3", text=True), "{Question}\nIs it hard?"
    rows = write_rows(tmp_path / "new.csv", 12)
    flags = ["--base", folder, "--head", "label_words", "--label_names", "yes,no", "--text", template]
    flags += ["--input", str(rows), "--output", str(tmp_path / "out.csv"), "--submission", ""]
    flags += ["--label_words", words] if words else []
    status, out, err = forked(infer.main, flags, tmp_path)
    assert status == 0, err
    assert "no adapter: the base alone" in out
    tokenizer = bases.load_tokenizer(folder)
    ids = data.label_word_ids(tokenizer, template, tuple(words.split(",")) if words else ("yes", "no"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = [tokenizer(template.format(**row))["input_ids"] for row in read_csv(rows)]
    with torch.no_grad():
        shares = word_logits(theirs, texts, ids).softmax(1)
    got = read_csv(tmp_path / "out.csv")
    near(torch.tensor([[float(g["probability_yes"]), float(g["probability_no"])] for g in got]), shares)
    assert [g["prediction"] for g in got] == [("yes", "no")[int(s.argmax())] for s in shares]
    assert [g["id"] for g in got] == [r["id"] for r in read_csv(rows)]


def test_an_adapter_of_words_is_read_without_its_run(base, tmp_path):
    """As a public one is: --base, --adapter, --head label_words give the run's probabilities."""
    folder, out = base("Qwen2", text=True), tmp_path / "out"
    run = train.main(word_flags(tmp_path, folder, targets="q_proj,lm_head"))["run"]
    (unsealed(run) / "decision.json").unlink()  # an adapter alone has no calibration
    words = ["--base", folder, "--adapter", f"{run}/best", "--head", "label_words", "--label_words", LETTERS]
    words += ["--label_names", ",".join(NAMES), "--text", ASK, "--max_length", "64"]
    tables = []
    for given in (["--runs", run], words):
        target = str(out / f"{len(tables)}.csv")
        infer.main([*given, "--input", str(tmp_path / "val.csv"), "--submission", "", "--output", target])
        tables.append([[float(v) for k, v in r.items() if k.startswith("prob")] for r in read_csv(target)])
    assert tables[0] == tables[1]
    forgotten = [w for w in words if w not in ("--head", "label_words", "--label_words", LETTERS)]
    with pytest.raises(UserError, match="target lm_head matches no module"):
        infer.main([*forgotten, "--input", str(tmp_path / "val.csv")])


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"head": None}, "--label_words has no effect: it is used with --head label_words"),
        ({"pooling": "mean"}, "--head label_words with --pooling mean"),
        ({"pooling": "attention"}, "--head label_words with --pooling attention"),
        ({"rank": 0, "alpha": None, "lora_dropout": None, "train_layers": 0}, "nothing would be trained"),
        ({"head_dropout": 0.3}, "--head_dropout has no effect: it is used without --head label_words"),
        ({"label_words": "yes,no"}, "--label_words names 2 words for 8 classes"),
        ({"label_words": None}, "begin with the same token ' '"),  # the names 0 to 7
    ],
)
def test_settings_that_label_words_do_not_have(base, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        train.main(word_flags(tmp_path, base("Qwen2", text=True), targets="q_proj", **changes))


def test_label_words_need_a_plain_decoder(base, tmp_path):
    """An encoder has no next word; before any weight is loaded, in training and in prediction."""
    flags = word_flags(tmp_path, base("Bert", text=True), targets="query", label_words=LETTERS)
    with pytest.raises(UserError, match="--head label_words on bert: it needs a decoder"):
        train.main(flags)
    words = ["--base", base("Bert", text=True), "--head", "label_words", "--label_names", "yes,no"]
    with pytest.raises(UserError, match="--head label_words on bert: it needs a decoder"):
        infer.main([*words, "--input", str(tmp_path / "val.csv")])
    with pytest.raises(UserError, match="--label_words has no effect: it is used with --head label_words"):
        infer.main(["--base", "x", "--label_names", "yes,no", "--label_words", "a,b", "--input", "x.csv"])


# ---- regression: the loss -------------------------------------------------------------------------------------------


def test_squared_error_is_torchs_in_any_cut():
    """A sum and its weight, so that pieces of a batch add up to MSELoss of the whole; in half precision too."""
    torch.manual_seed(0)
    x, targets = torch.randn(11, 5), torch.randn(11)
    weight = torch.randn(1, 5, requires_grad=True)
    outputs = x @ weight.T
    want = torch.nn.MSELoss()(outputs[:, 0], targets)
    (gradient,) = torch.autograd.grad(want, weight, retain_graph=True)
    for cut in ([11], [4, 7], [1, 2, 3, 5]):
        parts = [losses.squared_error(o, t) for o, t in zip(outputs.split(cut), targets.split(cut), strict=True)]
        total = sum(parts) / 11
        near(total, want)
        near(torch.autograd.grad(total, weight, retain_graph=True)[0], gradient)
    half = losses.squared_error(outputs.half(), targets.double())
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float(want) * 11, rel=1e-2)


def numbers(path: Path, count: int, label, skip: int = 0) -> Path:
    """Toy rows whose label is label(class, index)."""
    rows = read_csv(write_rows(path, count, skip))
    return write_csv(path, [{**row, "label": label(int(row["label"]), i)} for i, row in enumerate(rows)])


def regression_flags(folder: Path, base: str, label=lambda c, i: c / 4 - 1, **changes) -> list[str]:
    """A regression of 58 rows onto numbers, by default those from -1 to 0.75."""
    files = {"train_data": numbers(folder / "numbers.csv", 58, label)}
    files["val_data"] = numbers(folder / "held_out.csv", 23, label, skip=10)
    return toy_flags(folder, base, task="regression", **{**files, "max_steps": 4, "eval_every": 2, **changes})


def test_one_step_of_any_cut_has_the_gradients_of_mseloss(small_base, tmp_path, monkeypatch):
    """The gradients that the optimizer is given are those of torch's MSELoss over the step's rows at once."""
    taken, step = [], optim.step

    def look(optimizer, scaler, factor, clip, riders, whole):
        named = [p for group in optimizer.param_groups for p in group["params"]]
        taken.append([p.grad.clone() for p in named])
        return step(optimizer, scaler, factor, clip, riders, whole)

    monkeypatch.setattr(optim, "step", look)
    plain = {"lora_dropout": 0, "head_dropout": 0, "max_steps": 1, "batch_size": 24, "targets": "all-linear"}
    logs = []
    for cut in ({"max_tokens": 4096, "micro_batches": 1}, {"max_tokens": 64, "micro_batches": 3}):
        run = Path(train.main(regression_flags(tmp_path, small_base, **plain, **cut))["run"])
        logs.append(next(line for line in log_of(run) if "loss" in line))
    cfg, labels = trained.run_facts(run)
    tokenizer = bases.load_tokenizer(small_base)
    split, _, _ = load_rows(cfg, lambda *words: None)
    split.tokens, _ = data.tokenize(tokenizer, cfg.text, split.rows, cfg.max_length)
    model = trained.new_classifier(cfg, labels, tokenizer, CPU, "fp32")
    plan = data.plan_epoch(split.tokens.lengths, 24, 64, 3, cfg.seed, 0)[0]
    assert len(plan) > 3  # the step was cut
    rows = np.sort(np.concatenate(plan))
    outputs = model(pack(split.tokens, rows, CPU))
    loss = torch.nn.MSELoss()(outputs.squeeze(1), torch.tensor([float(split.rows[i]["label"]) for i in rows]))
    loss.backward()
    groups = optim.parameter_groups(model.named_parameters(), cfg.lr, cfg.head_lr, cfg.weight_decay, model.heads)
    want = [p.grad for group in groups for p in group["params"]]
    norm = float(torch.stack([g.norm() for g in want]).norm())
    assert len(taken) == 2 and sum(bool(g.any()) for g in want) > 10
    for got, log in zip(taken, logs, strict=True):
        assert log["loss"] == pytest.approx(float(loss), rel=1e-5)
        assert log["grad_norm"] == pytest.approx(norm, rel=1e-5)
        for g, w in zip(got, want, strict=True):
            near(g, w) if w.any() else near(g, w + 1e-9, 1.0)


def test_a_regression_is_the_same_on_two_ranks(small_base, tmp_path):
    """To the bit: losses, evaluations, weights, predictions."""
    runs = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        status, out, err = forked(train.main, regression_flags(folder, small_base), folder, ranks)
        assert status == 0, out + err
        runs[ranks] = run_of(out)
    one, two = runs[1], runs[2]
    assert log_of(one) == log_of(two) and shas(one) == shas(two)
    assert len({line["loss"] for line in log_of(one) if "loss" in line}) == 4
    assert (one / "val_predictions.csv").read_bytes() == (two / "val_predictions.csv").read_bytes()


# ---- regression: what is kept and written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric,sign", [("mse", 1), ("roc_auc", -1), ("mae", 1), ("pearson", -1)], ids=lambda v: str(v)
)
def test_best_is_the_smallest_error_or_the_largest_auc(small_base, tmp_path, metric, sign):
    """Over evaluations that go up and down, with other extremes for errors than for ranks."""
    changes = {"metric": metric, "eval_every": 1, "max_steps": 12, "lr": 2e-2, "epochs": 3, "val_data": None, "seed": 3}
    flags = regression_flags(tmp_path, small_base, lambda c, i: float(c > 3), **changes, val_size=20)
    result = train.main(flags)
    scores = {line["step"]: line["eval"] for line in log_of(Path(result["run"])) if "eval" in line}
    values = {step: sign * s[metric] for step, s in scores.items()}
    assert len(scores) == 12
    best = min(values, key=values.get)
    assert result["best_step"] == best != max(values, key=values.get) and best != 12
    assert checkpoint.verify(Path(result["run"]) / "best")["step"] == best
    for name, value in scores[best].items():
        assert result["metrics"][name] == pytest.approx(value, abs=1e-6)
    extremes = [f({s: v["mse"] for s, v in scores.items()}.items(), key=lambda x: x[1])[0] for f in (min, max)]
    assert extremes[0] != extremes[1]


def test_predictions_are_the_raw_outputs(small_base, tmp_path):
    """Neither cut to a range nor rounded: written digits give the fp32 outputs again, in every file."""
    flags = regression_flags(tmp_path, small_base, lambda c, i: 40.0 * c - 100, head_lr=0.5, max_steps=12)
    result = train.main(flags)
    run = trained.load_run(result["run"])
    assert run.labels == labelling.Labels((), ("label",)) and run.model.score.weight.shape == (1, 32)
    rows = read_csv(tmp_path / "held_out.csv")
    logits = run.logits(rows, 256)[0][:, 0]
    lines = read_csv(run.path / "val_predictions.csv")
    assert list(lines[0]) == ["id", "label", "prediction"] and [line["id"] for line in lines] == [r["id"] for r in rows]
    assert [float(line["label"]) for line in lines] == [float(r["label"]) for r in rows]
    assert np.array_equal(np.array([float(line["prediction"]) for line in lines], np.float32), logits)
    assert len(set(logits.tolist())) == 23 and logits.min() < 0 and np.abs(logits).max() > 1  # no probabilities
    error = logits.astype(np.float64) - np.array([float(r["label"]) for r in rows])
    assert result["metrics"]["mse"] == pytest.approx(np.mean(error**2), rel=1e-6)
    assert result["majority"] == pytest.approx(np.var([float(r["label"]) for r in rows]), rel=1e-6)

    given = ["--runs", str(run.path), "--input", str(tmp_path / "held_out.csv"), "--max_tokens", "256"]
    for name, submission, column in (("a.csv", "id,score", "score"), ("b.csv", "", "prediction")):
        answer = infer.main([*given, "--output", str(tmp_path / name), "--submission", submission])
        found = read_csv(tmp_path / name)
        assert list(found[0]) == ["id", column] and [r["id"] for r in found] == [r["id"] for r in rows]
        assert np.array_equal(np.array([float(r[column]) for r in found], np.float32), logits)
        assert answer["metrics"]["mse"] == pytest.approx(result["metrics"]["mse"], rel=1e-6)
    infer.main([*given, "--output", str(tmp_path / "c.jsonl"), "--submission", "id,score"])
    found = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert np.array_equal(np.array([r["score"] for r in found], np.float32), logits)
    texts = [r["Question"] for r in rows]
    assert [p["score"] for p in run.predict(texts, 256)] == [float(z) for z in logits]


@pytest.mark.parametrize("text", ["much", "", "nan", "inf", "1,5", "1e60"])
def test_labels_that_are_no_numbers_are_refused_with_their_rows(small_base, tmp_path, text):
    """In training and in validation rows; 1e60 is infinite in fp32."""
    flags = regression_flags(tmp_path, small_base, lambda c, i: text if i in (4, 16) else c)
    with pytest.raises(UserError, match=r"2 rows have no number \(.* in row 5, 17"):
        train.main(flags)
    numbers(tmp_path / "numbers.csv", 58, lambda c, i: c)
    with pytest.raises(UserError, match=r"--val_data .*held_out.csv: 2 rows have no number \(.* in row 5, 17"):
        train.main(flags)


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"label_smoothing": 0.1}, "--label_smoothing 0.1 has no meaning with --task regression"),
        ({"class_weights": "balanced"}, "--class_weights balanced has no meaning with --task regression"),
        ({"label_names": "a,b"}, "--label_names .* has no meaning with --task regression"),
        ({"head": "label_words", "head_dropout": None}, "--head label_words has no meaning with --task regression"),
        ({"metric": "macro_f1"}, "--metric macro_f1: expected one of mse"),
        ({"metric": "roc_auc"}, "--metric roc_auc needs rows with and without every label"),
    ],
)
def test_settings_that_a_regression_does_not_have(small_base, tmp_path, changes, said):
    """The smoothing of a preset is dropped without a word, what is given by hand is refused."""
    with pytest.raises(UserError, match=said):
        train.main(regression_flags(tmp_path, small_base, **changes))
    assert presets.tiny().label_smoothing > 0
    cfg, given = cli.parse(configs.TrainConfig, presets.TRAIN_PRESETS, regression_flags(tmp_path, small_base))
    cfg = checks.own_data(cfg, given)
    checks.check(cfg, given)
    assert (cfg.label_smoothing, cfg.class_weights, cfg.metric) == (0.0, "none", "mse")


def test_held_out_rows_have_the_share_of_zeros_and_ones(tmp_path):
    """And the quantiles of numbers that hardly repeat; nothing is in both parts, nothing lost."""
    questions = read_csv(write_rows(tmp_path / "rows.csv", 200))
    ones = write_csv(tmp_path / "ones.csv", [{**r, "label": int(i % 20 < 3)} for i, r in enumerate(questions)])
    cfg = configs.TrainConfig(train_data=str(ones), task="regression", metric="mse", val_size=0.2)
    kept, held_out, labels = load_rows(cfg, lambda *words: None)
    assert held_out.labels.dtype == np.float32 and labels.values == ()
    assert len(held_out.labels) == 40 and held_out.labels.sum() == 6 and kept.labels.sum() == 24
    assert sorted(kept.ids + held_out.ids) == sorted(r["id"] for r in questions)
    values = np.random.default_rng(0).lognormal(size=200)
    many = write_csv(
        tmp_path / "many.csv", [{**r, "label": repr(float(v))} for r, v in zip(questions, values, strict=True)]
    )
    cfg = configs.TrainConfig(train_data=str(many), task="regression", metric="mse", val_size=0.2)
    kept, held_out, _ = load_rows(cfg, lambda *words: None)
    tenths = np.searchsorted(np.quantile(values, np.arange(1, 10) / 10), held_out.labels)
    assert np.bincount(tenths, minlength=10).tolist() == [4] * 10


# ---- export ---------------------------------------------------------------------------------------------------------

RUNS = {  # name: (family, what its flags change)
    "lora": ("Qwen2", {"targets": "q_proj,v_proj"}),
    "lora bias all": ("Qwen2", {"targets": "all-linear", "bias": "all"}),
    "lora embeddings": ("Llama", {"targets": "q_proj,embed_tokens"}),
    "lora rslora": ("Gemma3Text", {"targets": "all-linear", "rslora": "true"}),
    "whole": ("Qwen2", {"rank": 0}),
    "last layer": ("Phi3", {"rank": 0, "train_layers": 1}),
    "regression": ("Qwen3", {"task": "regression", "targets": "all-linear"}),
    "words": ("Qwen2", {"head": "label_words", "targets": "q_proj,v_proj", "bias": "lora_only"}),
    "words lm_head": ("Qwen2", {"head": "label_words", "targets": "q_proj,lm_head"}),
    "words embeddings": ("Llama", {"head": "label_words", "targets": "q_proj,embed_tokens"}),
    "words both": ("Gemma3Text", {"head": "label_words", "targets": "lm_head,embed_tokens"}),
    "words whole": ("Llama", {"head": "label_words", "rank": 0}),
    "bert": ("Bert", {"pooling": "cls", "targets": "all-linear", "bias": "all"}),
    "roberta": ("Roberta", {"pooling": "cls", "targets": "query,value"}),
    "modernbert": ("ModernBert", {"pooling": "mean", "targets": "all-linear"}),
    "modernbert cls": ("ModernBert", {"pooling": "cls", "rank": 0}),
    "deberta": ("DebertaV2", {"pooling": "cls", "targets": "all-linear"}),
    "deberta regression": ("DebertaV2", {"pooling": "cls", "rank": 0, "task": "regression"}),
    "decoder mean": ("Qwen2", {"pooling": "mean", "targets": "q_proj"}),
    "decoder attention": ("Qwen2", {"pooling": "attention", "targets": "all-linear"}),
    "decoder attention whole": ("Llama", {"pooling": "attention", "rank": 0}),
    "bert attention": ("Bert", {"pooling": "attention", "targets": "query"}),
    "bert mean": ("Bert", {"pooling": "mean", "targets": "query"}),
    "bert last": ("Bert", {"pooling": "last", "targets": "query"}),
}


NOT_EXPORTED = {
    "decoder mean": "Qwen2ForSequenceClassification pools last, this run mean",
    "decoder attention": "Qwen2ForSequenceClassification pools last, this run attention",
    "decoder attention whole": "LlamaForSequenceClassification pools last, this run attention",
    "bert attention": "BertForSequenceClassification pools cls, this run attention",
    "bert mean": "BertForSequenceClassification pools cls, this run mean",
    "bert last": "BertForSequenceClassification pools cls, this run last",
}


@pytest.fixture(scope="module")
def fitted(base, tmp_path_factory):
    """fitted(name) -> the run of that name in RUNS, made when it is first asked for."""
    made = {}

    def make(name) -> Path:
        if name not in made:
            family, changes = RUNS[name]
            flags = {"max_steps": 4, "eval_every": 2, "lr": 1e-2, **changes}
            if flags.get("rank") == 0:
                flags |= {"alpha": None, "lora_dropout": None, "lr": 1e-3}
            if flags.get("head") == "label_words":
                flags |= {"text": ASK, "label_words": LETTERS, "head_dropout": None}
            if "task" not in flags:
                flags["label_names"] = ",".join(NAMES)
            folder = tmp_path_factory.mktemp("run")
            made[name] = Path(train.main(toy_flags(folder, base(family, text=True), **flags))["run"])
        return made[name]

    return make


def short_rows(tokenizer, template: str) -> list[dict]:
    """Validation rows that no limit cuts: transformers' tokenizer knows none."""
    rows = read_csv(ROOT / "tiny/data/val.csv")[:60]
    texts = [template.format(**r) for r in rows]
    keep = [r for r, ids in zip(rows, tokenizer(texts)["input_ids"], strict=True) if len(ids) <= 64]
    assert len({len(tokenizer(template.format(**r))["input_ids"]) for r in keep[:16]}) > 8
    return keep[:16]


def exported_logits(folder: Path, texts: list[str], words, batched: bool) -> torch.Tensor:
    """The logits of texts by transformers' own classes from a folder alone."""
    auto = transformers.AutoModelForCausalLM if words else transformers.AutoModelForSequenceClassification
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    model.eval()
    found = []
    for chunk in [texts] if batched else [[t] for t in texts]:
        inputs = tokenizer(chunk, padding=batched, return_tensors="pt")
        inputs = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = model(**inputs).logits
        if words:
            logits = logits[torch.arange(len(chunk)), inputs["attention_mask"].sum(1) - 1]
            logits = torch.stack([torch.logsumexp(logits[:, list(ids)], dim=1) for ids in words], dim=1)
        found.append(logits)
    return torch.cat(found)


@pytest.mark.parametrize("name", [n for n in RUNS if n not in NOT_EXPORTED])
def test_an_export_is_the_run_in_transformers_own_class(fitted, tmp_path, capsys, name):
    """Tokenizer, weights and config from the folder alone: the same logits one by one and right-padded, the names of
    the classes; and nothing but the files of a model in it, and their manifest."""
    run = fitted(name)
    rows_file = write_rows(tmp_path / "rows.csv", 24)
    out = tmp_path / "deep" / "export"
    result = infer.main(["--runs", str(run), "--export", str(out), "--input", str(rows_file)])
    live = trained.load_run(run)
    family, changes = RUNS[name]
    words = ()
    if changes.get("head") == "label_words":
        words = data.label_word_ids(live.tokenizer, live.config.text, tuple(LETTERS.split(",")))
    kind = "ForCausalLM" if words else "ForSequenceClassification"
    assert result["architecture"].endswith(kind) and result["export"] == str(out) and result["rows"] == 16
    assert result["drift"] < 1e-4 and "0 predictions changed" in capsys.readouterr().out
    assert not [p for p in [*out.iterdir(), *out.parent.iterdir()] if p.name.startswith(".")]
    others = {"tokenizer.json", "tokenizer_config.json"} | ({"generation_config.json"} if "words" in name else set())
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "manifest.json"} | others
    checkpoint.verify(out)
    assert all(os.stat(p).st_mode & 0o444 == 0o444 for p in out.iterdir())

    alone = shutil.move(out, tmp_path / "elsewhere")
    rows = short_rows(live.tokenizer, live.config.text)
    texts = [live.config.text.format(**r) for r in rows]
    want, _ = live.logits(rows)
    for batched in (False, True):
        near(exported_logits(alone, texts, words, batched), want)
    with lora.disable(live.model):
        base_logits, _ = live.logits(rows)
    assert live.config.rank == 0 or np.abs(base_logits - want).max() > 1e-3  # the update is in it
    config = transformers.AutoConfig.from_pretrained(alone)
    assert config.architectures == [result["architecture"]] and config.dtype == torch.float32
    if "task" in changes:
        assert config.num_labels == 1 and config.problem_type == "regression" and config.id2label == {0: "label"}
    elif not words:
        assert config.id2label == dict(enumerate(NAMES)) and config.label2id == {n: i for i, n in enumerate(NAMES)}
    if words:
        tied = name in ("words", "words whole")
        assert config.tie_word_embeddings == tied
        assert ("lm_head.weight" in load_file(Path(alone) / "model.safetensors")) != tied
    if family == "ModernBert":
        assert config.classifier_pooling == changes["pooling"]


@pytest.mark.parametrize("name", ["lora bias all", "regression", "modernbert", "deberta regression"])
def test_an_export_is_a_base_with_a_head_for_this_project(fitted, tmp_path, name):
    """infer.py --base DIR gives the run's predictions, with no name of a class, pooling or task given."""
    run = fitted(name)
    (unsealed(run) / "decision.json").unlink(missing_ok=True)  # a plain model has no calibration
    rows, out = write_rows(tmp_path / "rows.csv", 20), tmp_path / "export"
    infer.main(["--runs", str(run), "--export", str(out)])
    tables = []
    for given in (["--runs", str(run)], ["--base", str(out), "--max_length", "64"]):
        target = str(tmp_path / f"{len(tables)}.csv")
        infer.main([*given, "--input", str(rows), "--submission", "", "--output", target])
        tables.append(read_csv(target))
    if "regression" in name:
        live, again = ([float(r["prediction"]) for r in t] for t in tables)
        near(torch.tensor(again), torch.tensor(live))
        return
    live, again = ([[float(v) for k, v in r.items() if k.startswith("prob")] for r in t] for t in tables)
    near(torch.tensor(again), torch.tensor(live))
    assert [r["prediction"] for r in tables[1]] == [NAMES[int(r["prediction"])] for r in tables[0]]


@pytest.mark.parametrize("name", ["bert", "lora"])
def test_an_exported_tokenizer_cuts_what_the_run_cuts(fitted, tmp_path, name):
    """transformers' truncation=True takes the limit from the folder; BERT has no positions beyond its table."""
    run, out = trained.load_run(fitted(name)), tmp_path / "export"
    infer.main(["--runs", str(run.path), "--export", str(out)])
    text = " ".join(r["Question"] for r in read_csv(ROOT / "tiny/data/val.csv")[:12])
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(text, truncation=True, return_tensors="pt")
    want, report = run.logits([{"Question": text}])
    assert report.cut_rows == 1 and inputs["input_ids"].shape[1] == run.config.max_length
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    with torch.no_grad():
        near(model(input_ids=inputs["input_ids"]).logits, want)


def test_a_public_adapter_is_exported_too(base, fitted, tmp_path):
    """--base and --adapter in the place of a run: the same tensors, to the bit, and the same config but for dropout."""
    run = fitted("lora")
    infer.main(["--runs", str(run), "--export", str(tmp_path / "a")])
    given = ["--base", base("Qwen2", text=True), "--adapter", str(run / "best"), "--label_names", ",".join(NAMES)]
    infer.main([*given, "--export", str(tmp_path / "b")])
    a, b = (load_file(tmp_path / side / "model.safetensors") for side in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    a, b = (json.loads((tmp_path / side / "config.json").read_text()) for side in "ab")
    assert {k: v for k, v in a.items() if "dropout" not in k} == {k: v for k, v in b.items() if "dropout" not in k}


@pytest.mark.parametrize("name,said", NOT_EXPORTED.items())
def test_a_pooling_that_transformers_lacks_is_not_exported(fitted, tmp_path, name, said):
    """One line, status 2, and not even the folder."""
    run, out = fitted(name), tmp_path / "export"
    status, _, err = forked(infer.main, ["--runs", run, "--export", out], tmp_path)
    assert status == 2 and err.startswith("error: --export: ") and said in err and err.count("\n") == 1, err
    assert not out.exists()


@pytest.mark.parametrize("name", ["decoder attention", "decoder attention whole", "bert attention"])
def test_attention_pooling_is_trained_saved_and_loaded(fitted, name):
    """The query moves, lies in the save under its own name without an adapter, and gives the live logits again."""
    run, key = fitted(name), "attention_pooling.query.weight"
    cfg, labels = trained.run_facts(run)
    start = trained.new_classifier(cfg, labels, bases.load_tokenizer(cfg.base), CPU, "fp32").get_parameter(key)
    if cfg.rank:
        saved = load_file(run / "best/adapter_model.safetensors")
        about = json.loads((run / "best/adapter_config.json").read_text())
        assert "attention_pooling" in about["modules_to_save"]
        assert not [n for n in saved if "attention_pooling" in n and ".lora_" in n]
        moved = saved[f"base_model.model.{key}"]
    else:
        moved = load_file(run / "best/model.safetensors")[key]
    assert moved.shape == start.shape and not torch.equal(moved, start)
    loaded = trained.load_run(run)
    assert torch.equal(loaded.model.get_parameter(key), moved)
    live = [[float(r[f"logit_{c}"]) for c in range(8)] for r in read_csv(run / "val_predictions.csv")]
    logits, _ = loaded.logits(files.read_rows(cfg.val_data, "val_data"), cfg.max_tokens)
    assert np.array_equal(logits, np.array(live, np.float32))
    with pytest.raises(Untrusted, match="attention_pooling|no counterpart"):  # of another pooling
        other = trained.replace(cfg, pooling="last")
        trained.read_classifier(run / "best", trained.new_classifier(other, labels, loaded.tokenizer, CPU, "fp32"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_export_is_not_overwritten(fitted, tmp_path):
    run, out = fitted("lora"), tmp_path / "export"
    infer.main(["--runs", str(run), "--export", str(out)])
    before = contents(out)
    status, _, err = forked(infer.main, ["--runs", fitted("whole"), "--export", out], tmp_path)
    assert status == 2 and "already holds model.safetensors" in err and err.count("\n") == 1, err
    assert contents(out) == before


@pytest.mark.parametrize("kind", ["run", "base as bin", "base in shards", "notes"])
def test_an_export_writes_over_nothing_else(fitted, base, tmp_path, kind):
    """A folder that holds something else, a run or a base in another format, stays as it is."""
    out = tmp_path / "folder"
    if kind == "run":
        shutil.copytree(fitted("lora"), out)
    elif kind == "notes":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        shutil.copytree(base("Qwen2", text=True), out)
        shard = "pytorch_model.bin" if kind == "base as bin" else "model-00001-of-00001.safetensors"
        (out / "model.safetensors").rename(out / shard)
    before = contents(out)
    with pytest.raises(UserError, match="--export "):
        infer.main(["--runs", str(fitted("lora")), "--export", str(out)])
    assert contents(out) == before


# BUG: a file is no folder that holds something: checkpoint.save moves it aside and removes it
def test_an_export_writes_over_no_file(fitted, tmp_path):
    """Of the name it is given, or of a folder above it; an empty folder is as good as none."""
    flags, file = ["--runs", str(fitted("lora")), "--export"], tmp_path / "notes.txt"
    file.write_text("mine")
    for out in (file, file / "deeper"):
        status, _, err = forked(infer.main, [*flags, out], tmp_path)
        assert file.is_file() and file.read_text() == "mine"
        assert status in (1, 2) and err.startswith("error: ") and err.count("\n") == 1, err
    (tmp_path / "empty").mkdir()
    infer.main([*flags, str(tmp_path / "empty")])
    assert (tmp_path / "empty/model.safetensors").is_file()


def test_a_failed_export_leaves_nothing_that_loads(fitted, tmp_path, monkeypatch):
    """The disk fails at each write and at each rename in turn: no weights, no hidden folder; then it succeeds."""
    run = fitted("lora")
    failed = 0
    for operation in ("save_tensors", "save_json", "fs_rename", "fs_sync"):
        for at in range(12):
            place = tmp_path / f"{operation}{at}"
            place.mkdir()
            flags, calls = ["--runs", str(run), "--export", str(place / "export")], []
            real = getattr(checkpoint, operation)

            def failing(*given, at=at, real=real, calls=calls):
                calls.append(given)
                if len(calls) == at + 1:
                    raise OSError(28, "No space left on device")
                return real(*given)

            with monkeypatch.context() as patch:
                patch.setattr(checkpoint, operation, failing)
                try:
                    infer.main(flags)
                except OSError:
                    failed += 1
                else:
                    break
            left = {p.relative_to(place).as_posix() for p in place.rglob("*")}
            assert not [n for n in left if n.split("/")[-1].startswith(".")], left
            if "export/model.safetensors" in left:  # whole: all that was left to do is the last sync
                assert operation == "fs_sync" and checkpoint.verify(place / "export")
                continue
            infer.main(flags)
            assert (place / "export/model.safetensors").is_file()
    assert failed >= 8
