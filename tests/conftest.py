"""Shared by all tests: small bases made on the spot, the user's commands, and ../shared where it is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch at import: bit-equality holds for one thread count
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # --precision auto is fp32 on every CPU: no bf16 products

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture
def shared() -> Path:
    """The real data beside the project; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real data) is absent")
    return SHARED


@pytest.fixture
def command(tmp_path):
    """Run one of the project's scripts as a user does, on `ranks` processes.

    command("train.py", "--lr", "1e-3", ranks=2) -> (status, stdout, stderr). Runs in the project's folder with
    outputs under tmp_path unless --outputs is given.
    """

    def run(script: str, *flags, ranks: int = 1, timeout: int = 480, cwd=ROOT, env=None):
        flags = [str(f) for f in flags]
        if "--outputs" not in flags and script != "ensemble.py":  # which looks for no runs
            flags += ["--outputs", str(tmp_path / "outputs")]
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
            start += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
        done = subprocess.run(
            [*start, str(ROOT / script), *flags],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return run


def load_rows(cfg, say):
    """(training rows, validation rows, classes) of one run."""
    import splits

    rows, val, labels = splits.read(cfg, say)
    return *splits.cut(cfg, rows, val, say=say), labels


def unsealed(run) -> Path:
    """A run as it was left before runs were sealed: its files are read as they are, whoever changed them."""
    (Path(run) / "seal.json").unlink(missing_ok=True)
    return Path(run)


def last_json(stdout: str) -> dict:
    """The JSON object that every entry point prints as its last line."""
    return json.loads(stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def small_base(tmp_path_factory) -> str:
    """A folder with a random Qwen2 of 2 layers, 32 wide, and the tokenizer of tiny/base: loads in milliseconds."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("small_base")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny/base")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)
