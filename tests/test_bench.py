"""The benchmarks: all sides see the same rows, ratios are taken within rounds, and the scripts run to their tables."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import inference  # noqa: E402
import measure  # noqa: E402
import pretraining  # noqa: E402
import training  # noqa: E402

ROWS = ROOT / "tiny/data/train.csv"


def test_training_sides_get_the_same_rows(tmp_path):
    """train.py's plan over train.csv has the steps of the peers, and the grouped peer's rows are the others'."""
    found = training.prepare("tiny", str(tmp_path), str(ROWS), steps=3, warmup=2, batch_size=4, max_length=48)
    plan = json.loads((tmp_path / "plan.json").read_text())
    with (tmp_path / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tokens = measure.tokenized(found["base"], [row["Question"] for row in rows], 48)
    key = lambda ids, label: (tuple(ids), label)  # noqa: E731
    steps = data.plan_epoch(tokens.lengths, 4, 10**9, 1, training.SEED, 0)
    ours = [{key(tokens.row(i).tolist(), int(rows[i]["label"])) for i in np.concatenate(step)} for step in steps]
    peers = [{key(*row) for row in step} for step in plan["random"]]
    assert ours == peers and len(peers) == 5
    grouped = [{key(*row) for row in step} for step in plan["grouped"]]
    assert grouped[:2] == peers[:2] and grouped != peers
    assert set().union(*grouped) == set().union(*peers)
    assert found["tokens"] == sum(len(ids) for step in plan["random"][2:] for ids, _ in step)


def test_useful_work_is_that_of_the_layers():
    """4 FLOPs a parameter and token for training of LoRA, 2 for scoring; the small rest is LoRA and attention."""
    lengths, adapter = [10, 20], {"targets": ["q_proj"], "rank": 2, "alpha": 8.0, "dropout": 0.0}
    scoring = measure.work(str(ROOT / "tiny/base"), 8, lengths, None)
    trained = measure.work(str(ROOT / "tiny/base"), 8, lengths, adapter)
    weights = 4 * sum(n * m for n, m in scoring["shapes"])  # of four layers
    assert len(scoring["shapes"]) == 7
    assert 2 * weights < scoring["flops_per_token"] < 2.1 * weights
    assert 4 * weights < trained["flops_per_token"] < 4.2 * weights


def test_ratios_are_medians_within_rounds():
    """A round that was slow for both sides changes no ratio."""
    result = lambda rate: {  # noqa: E731
        "examples_per_second": rate / 10,
        "tokens_per_second": rate,
        "peak_gb": 1.0,
        "share": 0.5,
        "computed": 300,
        "tokens": 200,
    }
    results = {"ours": [result(r) for r in (300.0, 30.0, 400.0)], "loop": [result(r) for r in (100.0, 10.0, 100.0)]}
    own, peer = measure.table_rows("tiny", "fp32", results)
    assert peer == "| tiny | fp32 | loop | 10.00 | 100 | 1.50 | 1.00 | 50.0% | **3.00** (3.00 to 4.00) |"
    assert own.endswith("| 300 | 1.50 | 1.00 | 50.0% |  |")


def test_sides_that_compute_something_else_are_refused(tmp_path):
    rounds = {"ours": [{"first_loss": 2.0}], "trainer": [{"first_loss": 2.01}]}
    with pytest.raises(AssertionError, match=r"2\.0000 here, 2\.0100 in the Trainer"):
        pretraining.equal_losses("tiny", "fp32", rounds)
    assert len(pretraining.equal_losses("tiny", "bf16", rounds)) == 1

    own = np.array([[3.0, 1.0], [0.0, 2.0]], dtype=np.float32)
    np.save(tmp_path / "ours_fp32.npy", own)
    np.save(tmp_path / "sorted_fp32.npy", own + np.float32([[0, 0], [2.5, 0]]))
    found = inference.differences(str(tmp_path), "ours", "sorted", "fp32")
    assert found == {"largest": 2.5, "scale": 3.0, "flips": 1}


@pytest.mark.slow
@pytest.mark.parametrize("script", [training, inference, pretraining], ids=lambda script: script.__name__)
def test_the_script_runs(script):
    """--quick, to the table and the JSON of every side."""
    for name in ("peft", "accelerate", "trl", "datasets"):
        pytest.importorskip(name)
    path = f"bench/{script.__name__}.py"
    command = [sys.executable, path, "--quick", "--threads", "1", "--rows", str(ROWS)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| tiny | fp32 | ")]
    assert [line.split(" | ")[2].replace(" ", "_") for line in table] == list(script.SIDES)
    assert f"`python {path} --quick" in done.stdout
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert all(rounds[0]["share"] > 0 for sides in results.values() for rounds in sides.values())
