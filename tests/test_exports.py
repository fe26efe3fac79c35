"""Exported models know where to stop, whoever loads them; adapters of language models merge as peft merges them."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import ROOT
from test_ddp import forks, toy_flags
from test_generate import adapter_on
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import cli
import cpt
import foreign
import infer
import train
import trained
from configs import InferConfig
from errors import UserError

pytestmark = forks
CHAT = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SETTINGS = {
    "eos_token_id": [0, 2],
    "pad_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "repetition_penalty": 1.05,
}


def base_with(folder: Path, base: str, settings: str | None = None, template: str | None = CHAT) -> str:
    """A copy of a base with a text as its generation_config.json."""
    shutil.copytree(base, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if settings is not None:
        (folder / "generation_config.json").write_text(settings)
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return str(folder)


def stops_of(folder) -> list[int]:
    """As transformers reads them."""
    stops = GenerationConfig.from_pretrained(folder).eos_token_id
    return stops if isinstance(stops, list) else [stops]


def pairs(folder: Path) -> Path:
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(24):
            file.write(json.dumps({"prompt": f"What is {i}+1?", "response": f"It is {i + 1}."}) + "\n")
    return folder / "pairs.jsonl"


def export_of_cpt(folder: Path, base: str, **changes) -> tuple[Path, Path]:
    """(the run, its export) of two steps."""
    flags = {
        "base": base, "train_data": pairs(folder), "max_length": 64, "batch_size": 8, "max_steps": 2, "val_size": 4,
        "samples": 0, "outputs": folder / "outputs", "export": folder / "exported", **changes,
    }  # fmt: skip
    result = cpt.main([str(part) for name, value in flags.items() for part in (f"--{name}", value)])
    return Path(result["run"]), folder / "exported"


FILES = {  # generation_config.json of the base, its chat template -> the stops of an export
    "as published": (json.dumps(SETTINGS), CHAT, [0, 2]),
    "no template": (json.dumps(SETTINGS), None, [0, 2]),
    "no file": (None, CHAT, [0, 2]),
    "neither": (None, None, [0]),
    "invalid": (json.dumps({"eos_token_id": [0, 2], "do_sample": False, "temperature": 0.7}), None, [0, 2]),
    "one id": ('{"eos_token_id": 2}', None, [0, 2]),
    "null": ('{"eos_token_id": null}', CHAT, [0, 2]),
    "out of range": ('{"eos_token_id": [0, 2, 99999999, -1], "pad_token_id": 99999999}', None, [0, 2]),
    "no numbers": ('{"eos_token_id": [0, "2", [3], true]}', None, [0]),
    "no JSON": ("{bad", CHAT, [0, 2]),
    "a list": ("[]", CHAT, [0, 2]),
    "refused": ('{"cache_implementation": "none of these"}', CHAT, [0, 2]),
}


@pytest.mark.parametrize("case", FILES)
def test_an_export_of_cpt_stops_where_its_base_and_its_chats_stop(case, small_base, tmp_path):
    settings, template, stops = FILES[case]
    base = base_with(tmp_path / "base", small_base, settings, template)
    run, exported = export_of_cpt(tmp_path, base, rank=4 if case == "as published" else 0)
    assert json.loads((exported / "generation_config.json").read_text()) == {"eos_token_id": stops, "pad_token_id": 0}
    assert AutoModelForCausalLM.from_pretrained(exported).generation_config.eos_token_id == stops
    if case != "as published":  # its saves are adapters
        assert stops_of(run / "best") == stops_of(run / "last") == stops
    assert AutoTokenizer.from_pretrained(exported).chat_template == template


def test_weights_drawn_anew_stop_as_the_base_that_they_follow(small_base, tmp_path):
    base = base_with(tmp_path / "base", small_base, json.dumps(SETTINGS), None)
    _, exported = export_of_cpt(tmp_path, base, random_init="true", rank=0)
    assert stops_of(exported) == [0, 2]


@pytest.mark.slow
def test_the_models_own_answers_end_in_transformers_as_here(small_base, tmp_path):
    """It learns by heart to end its turn; without the stop it would write up to the limit."""
    base = base_with(tmp_path / "base", str(ROOT / "tiny/base"), json.dumps(SETTINGS))
    _, exported = export_of_cpt(tmp_path, base, max_steps=30, lr=1e-3, rank=0, export_dtype="fp32", epochs=20)
    tokenizer, lm = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    messages = [{"role": "user", "content": "What is 5+1?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    prompt = tokenizer.apply_chat_template(messages, **options)
    out = lm.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :].tolist()
    assert out[-1] == 2 and len(out) < 40


@pytest.mark.parametrize("rank", [4, 0], ids=["adapter", "whole base"])
def test_an_export_with_label_words_stops_too_and_one_with_a_head_has_no_settings(rank, small_base, tmp_path):
    base = base_with(tmp_path / "base", small_base, json.dumps(SETTINGS), None)
    words = {"head": "label_words", "label_words": ",".join("abcdefgh"), "head_lr": None, "head_dropout": None}
    for name, changes, stops in (("words", words, [0, 2]), ("linear", {}, None)):
        if not rank:
            changes |= {"rank": 0, "alpha": None, "lora_dropout": None, "train_layers": -1}
        (tmp_path / name).mkdir()
        flags = toy_flags(tmp_path / name, base, max_steps=2, eval_every=2, **changes)
        run = train.main(flags)["run"]
        infer.main(["--runs", run, "--export", str(tmp_path / name / "merged")])
        settings = tmp_path / name / "merged/generation_config.json"
        assert (stops_of(settings.parent) == stops) if stops else not settings.exists()


def test_an_adapter_of_a_language_model_merges_as_peft_merges_it(small_base, tmp_path):
    """infer.py --adapter A --base B --export DIR, without any class names."""
    base = base_with(tmp_path / "base", small_base, json.dumps(SETTINGS))
    adapter = adapter_on(tmp_path / "adapter", base)
    flags = ["--adapter", adapter, "--base", base, "--export", str(tmp_path / "merged"), "--precision", "fp32"]
    assert infer.main(flags)["architecture"] == "Qwen2ForCausalLM"
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = peft.PeftModel.from_pretrained(lm, adapter).merge_and_unload()
    merged, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    theirs = expected.state_dict()
    for name, tensor in merged.state_dict().items():
        assert torch.allclose(tensor, theirs[name], atol=1e-6), name
    assert stops_of(tmp_path / "merged") == [0, 2]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHAT
    with pytest.raises(UserError, match="leave it out"):
        infer.main([*flags[:-4], "--export", str(tmp_path / "other"), "--input", "rows.csv"])


TASKS = {
    "multi_label": ("--task", "multi_label", "--label_columns", "x,y"),
    "single_label": ("--label_column", "x"),
    "regression": ("--task", "regression", "--label_column", "x"),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("rank", ["4", "0"], ids=["adapter", "whole base"])
def test_transformers_pipeline_gives_the_probabilities_of_the_run(task, rank, small_base, tmp_path):
    """A sigmoid of each label, a softmax over classes, a regression's number, whatever task the base was made for; and
    with the export as its base infer.py scores as with the run. The save of a whole base is such a model too.
    """
    texts = [f"number {i} " * (1 + i % 3) for i in range(40)]
    rows = [{"q": text, "x": str(i % 2), "y": str(int(i % 3 == 0))} for i, text in enumerate(texts)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = shutil.copytree(small_base, tmp_path / "base")
    other = "single_label_classification" if task == "multi_label" else "multi_label_classification"
    config = json.loads((base / "config.json").read_text()) | {"problem_type": other}
    (base / "config.json").write_text(json.dumps(config))
    flags = ["--base", base, "--train_data", tmp_path / "rows.jsonl", "--outputs", tmp_path, "--max_steps", 2]
    flags += ["--text", "{q}", "--max_length", 32, "--rank", rank, "--lr", 0.01, *TASKS[task]]
    run = trained.load_run(train.main([str(flag) for flag in flags])["run"])
    infer.main(["--runs", str(run.path), "--export", str(tmp_path / "merged")])
    ours = run.predict(texts[:6])
    logits = torch.tensor([answer.get("logits", [answer.get("score")]) for answer in ours])
    expected = {"multi_label": logits.sigmoid(), "single_label": logits.softmax(1), "regression": logits}[task]
    for folder in [tmp_path / "merged"] + [run.path / "best"] * (rank == "0"):
        for answers, values in zip(
            pipeline("text-classification", model=str(folder), top_k=None)(texts[:6]), expected.tolist(), strict=True
        ):
            scores = {answer["label"]: answer["score"] for answer in answers}
            assert [scores[name] for name in run.labels.names] == pytest.approx(values, abs=1e-5)
    given = foreign.given_model(cli.parse(InferConfig, {}, ["--base", str(tmp_path / "merged"), "--text", "{q}"])[0])
    assert given.config.task == task
    assert foreign.load_given(given, run.world).predict(texts[:6])[0].keys() == ours[0].keys()


def test_a_regression_of_several_numbers_is_refused(small_base, tmp_path):
    shutil.copytree(small_base, tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config |= {"architectures": ["Qwen2ForSequenceClassification"], "problem_type": "regression", "num_labels": 3}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a regression with 3 outputs"):
        infer.main(["--base", str(tmp_path / "base"), "--text", "{q}", "--input", "absent.csv"])
