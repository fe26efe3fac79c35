"""Peak memory and time of the LM loss at Qwen2.5's vocabulary: chunked (losses.py) against plain logits.

    python bench/lm_loss.py                 # 4,096 tokens of width 256, forward and backward, fp32 on a CPU

Each side runs in a process of its own. The last line of stdout is one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import losses  # noqa: E402

VOCABULARY, WIDTH, TOKENS = 151_936, 256, 4096


def measure(kind: str) -> dict:
    """Loss, norm of the gradient at the states, GB above what the weights take, and seconds."""
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False).requires_grad_(False)  # frozen, as under an adapter
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (TOKENS,))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    if kind == "chunked":
        loss = losses.lm_cross_entropy(hidden, head, targets)
    else:
        loss = F.cross_entropy(head(hidden), targets, reduction="sum")
    loss.backward()
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    seconds = time.perf_counter() - started
    return {
        "loss": float(loss),
        "gradient": float(hidden.grad.norm()),
        "gb": round(peak, 3),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("chunked", "plain"), help="measure one side in this process")
    kind = parser.parse_args().kind
    if kind:
        print(json.dumps(measure(kind)))
        return
    found = {}
    for side in ("chunked", "plain"):
        done = subprocess.run([sys.executable, __file__, "--kind", side], capture_output=True, text=True, check=True)
        found[side] = json.loads(done.stdout)
        print(f"{side:<8} {found[side]}")
    print(json.dumps({**found, "ratio": round(found["plain"]["gb"] / found["chunked"]["gb"], 2)}))


if __name__ == "__main__":
    main()
