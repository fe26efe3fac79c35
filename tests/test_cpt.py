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

import checkpoint
import configs
import cpt
import data
import train
from configs import UserError

pytestmark = forks


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
    cfg, _ = configs.parse(configs.CptConfig, configs.CPT_PRESETS, flags)
    segments, held_out = cpt.load_segments(cfg, data.load_tokenizer(cfg.base))
    lm = AutoModelForCausalLM.from_pretrained(Path(result["run"]) / "last", dtype=torch.float32).eval()
    nats, count = 0.0, 0
    with torch.no_grad():
        for i in range(len(held_out.lengths)):
            ids = torch.from_numpy(held_out.row(i).astype(np.int64))[None]
            nats += float(lm(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert result["metrics"]["loss"] == pytest.approx(nats / count, abs=1e-4)
    # every token after a document's first is predicted once, on one side
    tokenizer = data.load_tokenizer(cfg.base)
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


def test_sigterm_saves_and_names_the_way_on(done, source, tmp_path):
    (pid,) = pids = start(cpt.main, cpt_flags(source, tmp_path), tmp_path)
    assert wait_for(tmp_path, 5, pid)
    os.kill(pid, signal.SIGTERM)
    status, out, err = finish(pids, tmp_path)
    run = next((tmp_path / "outputs").glob("*/*/run_0"))
    assert status == 1 and f"go on with --resume {run}" in err and "Traceback" not in err, err
    resumed = cpt.main([*cpt_flags(source, tmp_path), "--resume", str(run)])
    assert weights(Path(resumed["run"])) == weights(Path(done[0]["run"]))
