"""What tiny/base is made from: a corpus of mathematics, a BPE vocabulary of 4,096, and a Qwen2 shape of 3.8 M weights.

    python tiny/make_base.py --shared ../shared --out tiny/base --corpus outputs/tiny_corpus.jsonl

Sources: MATH train and GSM8K train (both MIT) without the problems that also occur in the math_problems competition,
found by normalised text, and generated problems of make_problems.py that are in none of its three files. The weights
are then trained by cpt.py: runs/tiny_base.sh holds both commands.
"""

import argparse
import csv
import json
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
GENERATED = 24_000
VOCABULARY = 4096
SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}


def normalised(text: str) -> str:
    """Letters and digits only, lower case: equal for problems that differ in spacing, TeX markup or punctuation."""
    return re.sub(r"[^a-z0-9]", "", text.lower())


def competition_problems(folder: Path) -> set[str]:
    """Normalised texts of every competition problem, labelled or not."""
    found = set()
    for name in ("train.csv", "test.csv"):
        with open(folder / name, encoding="utf-8", newline="") as f:
            found |= {normalised(row["Question"]) for row in csv.DictReader(f)}
    return found


def math_texts(shared: Path) -> tuple[list[str], int]:
    """Problems with solutions of MATH and GSM8K, and how many were left out for they also occur in the competition."""
    known, texts, left_out = competition_problems(shared / "data/math_problems"), [], 0
    for name, problem, answer in (
        ("MATH_train.jsonl", "problem", "solution"),
        ("gsm8k_train.jsonl", "question", "answer"),
    ):
        for line in (shared / "data/math_text" / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if normalised(row[problem]) in known:
                left_out += 1
                continue
            solution = re.sub(r"<<[^<>]*>>", "", row[answer])
            texts.append(row[problem] + "\n" + solution)
    return texts, left_out


def documents(shared: Path) -> tuple[list[str], int]:
    """All training texts, and how many problems were left out of them."""
    texts, left_out = math_texts(shared)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "generated.jsonl"
        command = [sys.executable, str(HERE / "make_problems.py"), "--text", str(GENERATED), "--out", str(out)]
        subprocess.run(command, check=True)
        texts += [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(texts)
    return texts, left_out


def main() -> None:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--shared", type=Path, default=Path("../shared"), help="folder that holds data/ and tokenizers/"
    )
    parser.add_argument("--out", type=Path, default=HERE / "base", help="gets config.json and the tokenizer")
    parser.add_argument("--corpus", type=Path, default=Path("outputs/tiny_corpus.jsonl"), help="gets the documents")
    args = parser.parse_args()

    texts, left_out = documents(args.shared)
    args.corpus.parent.mkdir(parents=True, exist_ok=True)
    args.corpus.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    print(f"{len(texts)} documents; {left_out} problems left out that also occur in the competition")

    pattern = AutoTokenizer.from_pretrained(args.shared / "tokenizers/qwen2.5")  # its splitting rule and special tokens
    extra = sum(not t.special for t in pattern.added_tokens_decoder.values())  # come on top of the trained ones
    tokenizer = pattern.train_new_from_iterator(texts, VOCABULARY - extra)
    assert len(tokenizer) == VOCABULARY, f"vocabulary {len(tokenizer)}, expected {VOCABULARY}"
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    end = tokenizer.eos_token_id
    shape = {**SHAPE, "eos_token_id": end, "pad_token_id": end, "bos_token_id": None, "dtype": "bfloat16"}
    (args.out / "config.json").write_text(json.dumps(shape, indent=1) + "\n")
    count = sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    print(f"vocabulary {len(tokenizer)}, {count:,} tokens")


if __name__ == "__main__":
    main()
