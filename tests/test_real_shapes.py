"""The user's own command on the published shapes: Qwen2.5's widths, random weights, the real tokenizer and data."""

import csv
import shutil

import pytest
import torch
from conftest import last_json

SHAPES = {  # from the bases' own config.json
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_attention_heads=16, num_key_value_heads=2),
    "0.5b": dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2),
}


def make_base(folder, shared, size: str, layers: int) -> str:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=151936, num_hidden_layers=layers, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6,
        max_position_embeddings=32768, bos_token_id=151643, eos_token_id=151643, dtype="bfloat16", **SHAPES[size],
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        Qwen2ForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    for path in (shared / "tokenizers/qwen2.5").iterdir():
        shutil.copy(path, folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "layers", "preset", "ranks"), [("3b", 2, "qwen3b", 2), ("0.5b", 24, "qwen05b", 2)])
def test_the_presets_command_trains_saves_and_predicts(tmp_path, shared, command, size, layers, preset, ranks):
    """torchrun train.py --cfg PRESET with the math problems, two steps, then infer.py on rows of test.csv, in order."""
    base = make_base(tmp_path / "base", shared, size, layers)
    rows = list(csv.DictReader(open(shared / "data/math_problems/train.csv", encoding="utf-8", newline="")))
    few = tmp_path / "train.csv"
    with open(few, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, ["Question", "label"])
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: len(r["Question"]))[:400])
    flags = ["--cfg", preset, "--base", base, "--train_data", few, "--val_size", "16", "--max_steps", "2"]
    status, out, err = command("train.py", *flags, ranks=ranks, timeout=900)
    assert status == 0, err[-3000:]
    result = last_json(out)
    assert result["steps"] == 2 and result["metrics"]["rows"] == 16
    flags = [
        "--input",
        shared / "data/math_problems/test.csv",
        "--limit",
        "24",
        "--output",
        tmp_path / "sub.csv",
        "--force",
    ]
    status, out, err = command("infer.py", *flags, timeout=900)
    assert status == 0, err[-3000:]
    assert last_json(out)["rows"] == 24
    submission = list(csv.DictReader(open(tmp_path / "sub.csv", newline="")))
    assert [r["id"] for r in submission] == [str(i) for i in range(24)]
    assert all(r["label"] in [str(i) for i in range(8)] for r in submission)
