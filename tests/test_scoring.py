"""Named prompts from the command line, words scored as transformers does, fields cut."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import forks, toy_flags
from test_more_rows import write_rules
from test_slices import write_pairs

import bases
import data
import files
import infer
import metrics
import optim
import prompts
import train
import trained
from errors import UserError

pytestmark = forks
WORDS = ("False|false", "True|true")


def rendered(base: str, name: str, rows: list[dict]) -> tuple[list[str], object]:
    tokenizer = bases.load_tokenizer(base)
    text = prompts.as_text(prompts.find(name), tokenizer)
    return ["".join(piece for _, piece in prompts.render(text, row)) for row in rows], tokenizer


def plain_shares(base: str, tokenizer, texts: list[str], quant: str = "none", words=WORDS) -> np.ndarray:
    """Softmax over the words of each class (aliases summed) from a plain forward of transformers, row by row.

    nf4: the linears of the layers hold bitsandbytes' own dequantized values.
    """
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for module in lm.model.layers.modules() if quant == "nf4" else ():
        if isinstance(module, torch.nn.Linear) and module.in_features % 64 == 0:  # others are kept: see model.quantize
            bnb = optim.bitsandbytes()
            stored = bnb.nn.Params4bit(module.weight.data, quant_type="nf4", compress_statistics=True).to("cpu")
            module.weight.data = bnb.functional.dequantize_4bit(stored.data, stored.quant_state).float()
    found = []
    for text in texts:
        with torch.no_grad():
            logits = lm(torch.tensor([tokenizer(text)["input_ids"]])).logits[0, -1].double()
        ids = [
            [tokenizer(f"Answer: {w}")["input_ids"][len(tokenizer("Answer:")["input_ids"])] for w in c.split("|")]
            for c in words
        ]
        found.append(torch.stack([logits[sorted(set(i))].logsumexp(0) for i in ids]).softmax(0).numpy())
    return np.array(found)


@pytest.mark.parametrize("name", ["verify_plain", "verify_structured", "verify_few_shot"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_scores_are_the_softmax_over_the_words_of_a_plain_forward(name, tied, quant, small_base, tmp_path):
    from transformers import AutoModelForCausalLM

    base = str(tmp_path / "base")
    lm = AutoModelForCausalLM.from_pretrained(small_base, tie_word_embeddings=tied)
    if not tied:
        torch.manual_seed(1)
        lm.lm_head.weight = torch.nn.Parameter(torch.randn_like(lm.lm_head.weight) * 0.1)
    lm.save_pretrained(base)
    bases.load_tokenizer(small_base).save_pretrained(base)
    path = write_pairs(tmp_path / "p.jsonl", 20)
    flags = ["--base", base, "--prompt", name, "--head", "label_words", "--label_names", "False,True", "--force"]
    flags += ["--label_column", "is_correct", "--max_length", "1024", "--submission", "", "--input", str(path)]
    flags += ["--quant", quant]
    told = infer.main([*flags, "--output", str(tmp_path / "o.csv")])
    rows = files.read_rows(str(path), "x")
    texts, tokenizer = rendered(base, name, rows)
    got = np.array(
        [
            [float(r[f"probability_{v}"]) for v in ("False", "True")]
            for r in files.read_rows(str(tmp_path / "o.csv"), "x")
        ]
    )
    np.testing.assert_allclose(got, plain_shares(base, tokenizer, texts, quant), atol=1e-5)
    known = np.array([r["is_correct"] == "True" for r in rows]).astype(int)
    assert told["metrics"]["roc_auc"] == pytest.approx(metrics.areas(got[:, 1], known)[0], abs=1e-6)


def test_a_prompt_trains_is_kept_with_its_hash_and_predicts(small_base, tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", 60)
    flags = toy_flags(
        tmp_path, small_base, train_data=path, val_data=None, val_size=0.3, prompt="verify_structured",
        metric="accuracy",
        head="label_words", label_column="is_correct", max_length=512, max_tokens=2048, batch_size=8, head_dropout=None,
    )  # fmt: skip
    told = train.main(flags)
    cfg, labels = trained.run_facts(Path(told["run"]))
    want = prompts.as_text(prompts.find("verify_structured"), bases.load_tokenizer(small_base))
    assert (cfg.text, cfg.kept, cfg.label_words) == (want, ("question",), WORDS) and labels.values == ("False", "True")
    assert told["text_sha256"] == prompts.digest(want)
    found = infer.main(["--runs", told["run"], "--input", str(path), "--output", str(tmp_path / "o.csv"), "--force"])
    assert found["rows"] == 60
    with pytest.raises(UserError, match="--prompt verify_plan: expected one of .*did you mean verify_plain"):
        train.main(
            [*flags[: flags.index("--prompt")], "--prompt", "verify_plan", *flags[flags.index("--prompt") + 2 :]]
        )
    with pytest.raises(UserError, match="--text has no effect: it is used without --prompt"):
        train.main([*flags, "--text", "{question}"])


# ---- fields that are cut --------------------------------------------------------------------------------------------


def test_kept_fields_are_cut_last_and_the_templates_words_never(small_base):
    tokenizer = bases.load_tokenizer(small_base)
    text, row = "Q: {question} S: {solution} Right?", {"question": "one two three " * 8, "solution": "four five " * 30}
    whole = len(tokenizer(f"Q: {row['question']} S: {row['solution']} Right?")["input_ids"])
    for limit in (whole, whole - 7, 60, 30, 12):
        for kept in ((), ("question",), ("question", "solution")):
            tokens, report = data.tokenize(tokenizer, text, [row], limit, kept=kept)
            said = tokenizer.decode(tokens.row(0))
            assert (
                len(tokens.row(0)) == min(limit, whole) and said.startswith("Q:") and said.rstrip().endswith("Right?")
            )
            if kept == ("question",) and limit >= 60:
                assert row["question"].strip() in said, "nothing of the question goes while there is a solution to cut"


def test_budgets_are_the_most_tokens_of_a_field(small_base):
    tokenizer = bases.load_tokenizer(small_base)
    rows = [{"a": "one two three " * n, "b": "four five " * n} for n in (1, 10, 40)]
    for budget in (3, 10, 50):
        tokens, report = data.tokenize(tokenizer, "A: {a} B: {b} C", rows, 512, budgets=(f"a={budget}",))
        free, _ = data.tokenize(tokenizer, "A: {a} B: {b} C", rows, 512)
        bare, _ = data.tokenize(tokenizer, "A: {a} B: {b} C", [{**r, "a": ""} for r in rows], 512)
        cut = free.lengths - tokens.lengths
        assert (tokens.lengths - bare.lengths <= budget + 2).all() and report.cut_tokens == cut.sum()
        assert (cut[free.lengths - bare.lengths <= budget] == 0).all()


def test_the_rules_preset_runs_on_a_small_base(small_base, tmp_path):
    """Its prompt, groups and metric from the command line; columns named as the competition has them."""
    rows = files.read_rows(str(write_rules(tmp_path / "few.csv", 48)), "x")
    path = tmp_path / "rules.jsonl"
    named = [
        {"row_id": r["row_id"], "body": r["body"], "rule": r["rule"], "subreddit": "s",
         "rule_violation": r["rule_violation"],
         "positive_example_1": r["positive"], "positive_example_2": f"worse {i}", "negative_example_1": r["negative"],
         "negative_example_2": f"fine {i}"}
        for i, r in enumerate(rows)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in named))
    flags = [
        "--cfg",
        "qwen15b_rules",
        "--base",
        small_base,
        "--train_data",
        str(path),
        "--outputs",
        str(tmp_path / "o"),
    ]
    told = train.main([*flags, "--val_size", "0.25", "--epochs", "1", "--batch_size", "32", "--test_data", str(path)])
    assert told["train_rows"] == 36 and set(told["by_column"]) == {"ads", "law"} and "roc_auc" in told["mean_by_column"]
    out = tmp_path / "s.csv"
    infer.main(["--runs", told["run"], "--submission", "row_id,rule_violation", "--output", str(out), "--force"])
    assert all(0 <= float(r["rule_violation"]) <= 1 for r in files.read_rows(str(out), "x"))
