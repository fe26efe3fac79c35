#!/usr/bin/env bash
# Math problems into 8 topics with Qwen2.5-3B + LoRA on two T4s (the published recipe), then a submission.
# DATA holds train.csv (Question,label) and test.csv (id,Question).
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-dataset}
torchrun --nproc_per_node=2 train.py --cfg qwen3b --train_data "$DATA/train.csv" --test_data "$DATA/test.csv" \
  --resume auto "$@"
torchrun --nproc_per_node=2 infer.py --submission "id,label"
