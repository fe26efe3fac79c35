"""Continued pretraining at toy size: it learns, loads elsewhere, resumes to the bit, and its loss is the plain one."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_ddp import ROOT, finish, forked, forks, log_of, run_of, start, toy_flags
from test_resume import wait_for
from transformers import AutoModelForCausalLM

import bases
import checkpoint
import checks
import cli
import configs
import corpus
import cpt
import data
import ddp
import language
import optim
import presets
import train
from errors import UserError

pytestmark = forks
ALONE = ddp.World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def source(tmp_path_factory, small_base) -> Path:
    """A base without weights, and 50 documents of which some are longer than a segment."""
    folder = tmp_path_factory.mktemp("cpt")
    (folder / "base").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(small_base) / name, folder / "base")
    with open(ROOT / "tiny/data/train.csv", encoding="utf-8", newline="") as f:
        texts = [row["Question"] for row, _ in zip(csv.DictReader(f), range(100), strict=False)]
    with open(folder / "papers.jsonl", "w", encoding="utf-8") as f:
        for i in range(50):
            f.write(json.dumps({"text": " ".join(texts[i : i + 1 + i % 3])}) + "\n")
    return folder


def cpt_flags(source: Path, out: Path, **changes) -> list[str]:
    settings = {
        "base": source / "base", "random_init": "true", "train_data": source / "papers.jsonl", "max_length": 32,
        "max_tokens": 128, "batch_size": 9, "micro_batches": 2, "epochs": 2, "lr": 1e-2, "val_size": 8,
        "eval_every": 10, "save_every": 4, "precision": "fp32", "outputs": out / "outputs", **changes,
    }  # fmt: skip
    return [str(part) for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


def weights(run: Path) -> str:
    return checkpoint.sha256(run / "last/model.safetensors")


@pytest.fixture(scope="module")
def done(source, tmp_path_factory) -> tuple[dict, list[str]]:
    out = tmp_path_factory.mktemp("whole")
    flags = cpt_flags(source, out, export=out / "new_base")
    return cpt.main(flags), flags


def test_loss_falls_and_the_base_loads_everywhere(done, small_base, tmp_path):
    result, flags = done
    run, exported = Path(result["run"]), flags[flags.index("--export") + 1]
    lines = log_of(run)
    losses, evals = [x["loss"] for x in lines if "loss" in x], [x["eval"]["loss"] for x in lines if "eval" in x]
    assert len(losses) == result["steps"] >= 20 and np.mean(losses[-3:]) < losses[0] - 1
    assert evals[-1] < evals[0] and result["metrics"]["loss"] == evals[-1]
    assert result["metrics"]["perplexity"] == pytest.approx(np.exp(evals[-1]))
    assert losses[0] == pytest.approx(np.log(4096), abs=0.3)  # fresh weights know nothing
    lm, info = AutoModelForCausalLM.from_pretrained(run / "last", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and lm.config.tie_word_embeddings
    manifest = checkpoint.verify(run / "last")
    assert manifest["step"] == result["steps"] and {"model.safetensors", "state.safetensors"} <= set(manifest["files"])
    half = checkpoint.load_tensors(Path(exported) / "model.safetensors")
    full = lm.state_dict()
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, full[n].bfloat16()) for n, t in half.items())
    assert train.main(toy_flags(tmp_path, exported, max_steps=2, eval_every=2))["steps"] == 2
    with pytest.raises(UserError, match="already holds model.safetensors"):
        cpt.main(flags)


def test_held_out_loss_is_that_of_each_segment_alone_in_transformers(done, source, tmp_path):
    result, flags = done
    cfg, _ = cli.parse(configs.CptConfig, presets.CPT_PRESETS, flags)
    texts = cpt.load_texts(cfg, bases.load_tokenizer(cfg.base), ALONE)
    segments, held_out = texts.train, texts.val
    lm = AutoModelForCausalLM.from_pretrained(Path(result["run"]) / "last", dtype=torch.float32).eval()
    nats, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(held_out.lengths)):
            ids = torch.from_numpy(held_out.row(i).astype(np.int64))[None]
            nats += float(lm(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert result["metrics"]["loss"] == pytest.approx(nats / count, abs=1e-4)
    # every token after a document's first is predicted once, on one side
    tokenizer = bases.load_tokenizer(cfg.base)
    documents = [json.loads(line)["text"] for line in open(source / "papers.jsonl", encoding="utf-8")]
    predicted = sum(len(tokenizer(text)["input_ids"]) for text in documents)  # its tokens and EOS, less the first
    assert int((segments.lengths - 1).sum() + (held_out.lengths - 1).sum()) == predicted
    assert max(segments.lengths) == 33 and min(segments.lengths) >= 2


def test_resumed_and_on_two_ranks_it_is_the_same_to_the_bit(done, source, tmp_path):
    result, _ = done
    whole = Path(result["run"])
    (tmp_path / "two").mkdir(), (tmp_path / "killed").mkdir()
    status, out, err = forked(cpt.main, cpt_flags(source, tmp_path / "two"), tmp_path / "two", ranks=2)
    assert status == 0, err
    assert log_of(run_of(out)) == log_of(whole) and weights(run_of(out)) == weights(whole)
    flags = [*cpt_flags(source, tmp_path / "killed"), "--resume", "auto"]
    for lines in (6, 13):
        (pid,) = start(cpt.main, flags, tmp_path / "killed")
        assert wait_for(tmp_path / "killed", lines, pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    status, out, err = forked(cpt.main, flags, tmp_path / "killed")
    assert status == 0 and "resumed at step" in out, err
    assert log_of(run_of(out)) == log_of(whole) and weights(run_of(out)) == weights(whole)
    assert cpt.main(cpt_flags(source, tmp_path, seed=1, max_steps=2))["metrics"] != result["metrics"]


def test_guard_text_that_is_trained_on_is_reported(source, small_base, tmp_path, capsys):
    """Of documents and of pairs, whatever the file; text that is not trained on is no clash, nor is held-out text."""
    texts = [json.loads(line)["text"] for line in open(source / "papers.jsonl", encoding="utf-8")]
    (tmp_path / "copy.jsonl").write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts[:20]))
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text + "!"}) + "\n" for text in texts[:20]))
    pairs = [json.dumps({"prompt": f"What is {i}?", "response": f"It is {i}."}) + "\n" for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(pairs))
    cases = [
        (source / "papers.jsonl", source / "papers.jsonl", True),
        (source / "papers.jsonl", tmp_path / "copy.jsonl", True),
        (tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl", True),
        (source / "papers.jsonl", tmp_path / "other.jsonl", False),
    ]
    tokenizer = bases.load_tokenizer(small_base)
    for train_data, guard_data, clash in cases:
        flags = cpt_flags(source, tmp_path, train_data=train_data, guard_data=guard_data)
        cfg, _ = cli.parse(configs.CptConfig, presets.CPT_PRESETS, flags)
        cpt.load_texts(cfg, tokenizer, ALONE)
        assert (" of --guard_data are trained on" in capsys.readouterr().out) == clash


def test_sigterm_saves_and_names_the_way_on(done, source, tmp_path):
    (pid,) = pids = start(cpt.main, cpt_flags(source, tmp_path), tmp_path)
    assert wait_for(tmp_path, 5, pid)
    os.kill(pid, signal.SIGTERM)
    status, out, err = finish(pids, tmp_path)
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert status == 1 and f"continue with --resume {run}" in err and "Traceback" not in err, err
    resumed = cpt.main([*cpt_flags(source, tmp_path), "--resume", str(run)])
    assert weights(Path(resumed["run"])) == weights(Path(done[0]["run"]))


@pytest.mark.parametrize("evaluation", [1, 2])
def test_stopped_inside_an_evaluation_it_is_the_same_to_the_bit(source, tmp_path, evaluation):
    """The one before the first step, and the one of the tenth: each is repeated whole."""

    def ask():
        score, pack, calls = language.language_scores, language.pack, {"evaluations": 0, "batches": 0}

        def scored(*args):
            calls.update(evaluations=calls["evaluations"] + 1, batches=0)
            return score(*args)

        def packed(*args, **kwargs):
            calls["batches"] += 1
            if calls == {"evaluations": evaluation, "batches": 2}:
                os.kill(os.getpid(), signal.SIGUSR1)
            return pack(*args, **kwargs)

        language.language_scores, language.pack = scored, packed

    flags = cpt_flags(source, tmp_path, max_tokens=40, max_steps=12)  # an evaluation has several micro-batches
    (tmp_path / "whole").mkdir()
    whole = run_of(
        forked(cpt.main, cpt_flags(source, tmp_path / "whole", max_tokens=40, max_steps=12), tmp_path / "whole")[1]
    )
    status, out, err = finish(start(cpt.main, flags, tmp_path, 1, ask), tmp_path)
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert status == 1 and (run / "PREEMPTED").exists() and "Traceback" not in err, err
    status, out, err = forked(cpt.main, ["--resume", str(run)], tmp_path)
    assert status == 0 and not (run / "PREEMPTED").exists(), err
    assert log_of(run) == log_of(whole) and weights(run) == weights(whole)


# ---- an adapter on the base, its embedding and LM head included -----------------------------------------------------


@pytest.fixture(scope="module", params=["tied", "untied"])
def adapted(request, source, small_base, tmp_path_factory) -> tuple[dict, Path, list[str]]:
    """A short run with LoRA on q_proj, embedding and LM head, on a trained base; its result, export and flags."""
    out, base = tmp_path_factory.mktemp(request.param), small_base
    if request.param == "untied":
        lm, base = AutoModelForCausalLM.from_pretrained(small_base), str(out / "base")
        shutil.copytree(small_base, base)
        lm.config.tie_word_embeddings = False
        lm.lm_head.weight = torch.nn.Parameter(lm.lm_head.weight.detach() * 1.5)
        lm.save_pretrained(base)
    flags = cpt_flags(
        source, out, base=base, random_init=None, rank=4, alpha=6, targets="q_proj,embed_tokens,lm_head", lr=1e-2,
        embed_lr=1e-3, max_steps=16, eval_every=8, save_every=2, export=out / "merged", export_dtype="fp32",
        guard_data=source / "papers.jsonl",
    )  # fmt: skip
    return cpt.main(flags), out / "merged", flags


def test_live_merged_and_reloaded_give_the_same_logits(adapted):
    """With LoRA on an embedding and an LM head that share their weight: one sum for both would be 0.3 off on a toy."""
    from peft import PeftModel

    result, merged, flags = adapted
    base = flags[flags.index("--base") + 1]
    ids = torch.randint(5, 900, (2, 23), generator=torch.Generator().manual_seed(0))
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), Path(result["run"]) / "last").eval()
    plain, whole = AutoModelForCausalLM.from_pretrained(base), AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        want = live(input_ids=ids).logits
        torch.testing.assert_close(whole(input_ids=ids).logits, want, rtol=0, atol=1e-5 * float(want.abs().max()))
        assert (plain(input_ids=ids).logits - want).abs().max() > 1e-2
    assert not whole.config.tie_word_embeddings
    cfg, _ = cli.parse(configs.CptConfig, presets.CPT_PRESETS, flags)
    held_out = cpt.load_texts(checks.own_data(cfg, set()), bases.load_tokenizer(base), ALONE).val
    scores = language.language_scores(
        language.load_language_model(str(merged), torch.device("cpu"), torch.float32), held_out, ALONE, "fp32", 128
    )
    assert scores == pytest.approx({n: result["metrics"][n] for n in scores}, rel=1e-6)


def test_exactly_what_is_listed_is_trained_each_group_at_its_rate(adapted, capsys):
    result, _, flags = adapted
    tensors = checkpoint.load_tensors(Path(result["run"]) / "last/adapter_model.safetensors")
    ends = {"q_proj": ("lora_A.weight", "lora_B.weight"), "lm_head": ("lora_A.weight", "lora_B.weight")}
    stems = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] + ["lm_head"]
    want = {f"base_model.model.{s}.{e}" for s in stems for e in ends[s.rsplit(".", 1)[-1]]}
    want |= {f"base_model.model.model.embed_tokens.lora_embedding_{x}" for x in "AB"}
    assert tensors.keys() == want and all(t.any() for t in tensors.values())
    cfg, given = cli.parse(configs.CptConfig, presets.CPT_PRESETS, flags)
    lm = cpt.new_language_model(checks.own_data(cfg, given), ALONE, "fp32")
    names = {id(p): n for n, p in lm.named_parameters()}
    groups = optim.parameter_groups(lm.named_parameters(), 1e-2, 1e-3, 0.1, language.vocabulary_modules(lm))
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert rates == {n: 1e-3 if "embed" in n or "lm_head" in n else 1e-2 for n in rates}
    assert {f"base_model.model.{n}" for n in rates} == want


def test_an_adapter_run_is_resumed_and_on_two_ranks_the_same_to_the_bit(adapted, tmp_path):
    result, _, flags = adapted
    ours = ("--export", "--export_dtype")
    flags = [f for i, f in enumerate(flags) if f not in ours and not set(flags[i - 1 : i]) & set(ours)]
    at = flags.index("--outputs") + 1
    want = checkpoint.sha256(Path(result["run"]) / "last/adapter_model.safetensors")
    for name, ranks, more in (("two", 2, []), ("cut", 1, ["--resume", "auto"])):
        mine = [*flags[:at], str(tmp_path / name / "outputs"), *flags[at + 1 :], *more]
        (tmp_path / name).mkdir()
        if more:
            (pid,) = start(cpt.main, mine, tmp_path / name)
            assert wait_for(tmp_path / name, 5, pid)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        status, out, err = forked(cpt.main, mine, tmp_path / name, ranks=ranks)
        assert status == 0, err
        assert checkpoint.sha256(run_of(out) / "last/adapter_model.safetensors") == want


def test_modules_trained_whole_are_untied_and_saved(source, small_base, tmp_path):
    changes = {"base": small_base, "random_init": None, "rank": 2, "alpha": 3, "targets": "q_proj", "max_steps": 2}
    result = cpt.main(cpt_flags(source, tmp_path, modules_to_save="embed_tokens,lm_head", eval_every=2, **changes))
    tensors = checkpoint.load_tensors(Path(result["run"]) / "last/adapter_model.safetensors")
    embed, head = (tensors[f"base_model.model.{n}.weight"] for n in ("model.embed_tokens", "lm_head"))
    assert embed.shape == head.shape and not torch.equal(embed, head)


# ---- the corpus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_document", [False, True])
def test_every_token_is_predicted_once_and_bytes_are_those_of_the_text(source, tmp_path, cross_document):
    """Of each document, or of the whole stream, only the very first token is not predicted."""
    tokenizer = bases.load_tokenizer(str(source / "base"))
    texts = [json.loads(line)["text"] for line in open(source / "papers.jsonl", encoding="utf-8")]
    rows = [{"text": t} for t in dict.fromkeys(texts)]
    read = corpus.load(
        str(source / "papers.jsonl"), "train_data", tokenizer, tmp_path, ALONE, print, template="{text}", max_length=32,
        chat="auto", system="",
    )  # fmt: skip
    found = corpus.segments(read, np.arange(len(rows)), tokenizer, 32, cross_document)
    ids = [[*tokenizer(r["text"])["input_ids"], data.end_of_text(tokenizer)] for r in rows]
    documents = [sum(ids, [])] if cross_document else ids
    predicted = [t for i in range(len(found.lengths)) for t in found.row(i)[1:].tolist()]
    assert predicted == [t for d in documents for t in d[1:]] and max(found.lengths) == 33
    first = sum(len(tokenizer.decode(d[:1]).encode()) for d in documents)
    assert found.bytes == sum(len(r["text"].encode()) for r in rows) - first
