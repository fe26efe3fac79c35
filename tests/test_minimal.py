"""runs/minimal.py is the core of train.py: the same losses, to the bit."""

import importlib.util

from test_ddp import ROOT, forks, log_of, write_rows

import train

pytestmark = forks


def minimal_script():
    spec = importlib.util.spec_from_file_location("minimal", ROOT / "runs/minimal.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_are_those_of_train_to_the_bit(tmp_path, small_base, capsys):
    """More than two epochs of one micro-batch a step, the last of each smaller; dropout, smoothing, clipping on."""
    rows, val = write_rows(tmp_path / "rows.csv", 40), write_rows(tmp_path / "val.csv", 16, skip=6)
    losses = minimal_script().main(str(rows), str(val), steps="7", base=small_base)
    flags = ["--base", small_base, "--train_data", rows, "--val_data", val, "--outputs", tmp_path / "outputs"]
    flags += ["--max_tokens", 100_000, "--max_steps", 7, "--audit", "none", "--eval_every", 100]
    result = train.main([str(flag) for flag in flags])
    lines = [line for line in log_of(tmp_path / result["run"]) if "loss" in line]
    assert losses == [line["loss"] for line in lines] and len(set(losses)) == 7
    accuracy = result["metrics"]["accuracy"]
    assert f"accuracy {accuracy:.4f} on 16 rows" in capsys.readouterr().out
