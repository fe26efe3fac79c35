#!/usr/bin/env bash
# Make tiny/base again: corpus, vocabulary and shape, then weights by cpt.py (about 40 minutes on two CPU cores).
# Needs ../shared (see tiny/README.md for the sources). The folder must not hold model.safetensors yet.
set -euo pipefail
cd "$(dirname "$0")/.."
base=${1:-outputs/tiny_base}
python tiny/make_problems.py
python tiny/make_base.py --shared ../shared --out "$base" --corpus outputs/tiny_corpus.jsonl
python cpt.py --cfg tiny --random_init true --lr 3e-3 --base "$base" --export "$base" --resume auto
