"""A large file of verification rows, made from the real ones: every question with many solutions, none of them twice.

python bench/million.py 1000000 /tmp/million.csv        # about 550 MB
"""

import csv
import json
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "shared/data/math_verification/train.jsonl"


def rows(count: int):
    """Row i is a question with the solution (and its label) of another row: a new one in each round over the data."""
    with open(DATA, encoding="utf-8") as f:
        real = list(map(json.loads, f))
    for i in range(count):
        round, place = divmod(i, len(real))
        other = real[(place + 7919 * round) % len(real)]
        yield i, real[place]["question"], other["solution"], other["is_correct"]


def write(count: int, path: str) -> None:
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["id", "question", "solution", "is_correct"])
        writer.writerows(rows(count))


if __name__ == "__main__":
    write(int(sys.argv[1]), sys.argv[2])
