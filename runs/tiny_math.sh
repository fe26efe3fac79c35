#!/usr/bin/env bash
# The real competition data with the embedded base on a CPU: LoRA, the frozen base with a trained head, and TF-IDF +
# LinearSVC on the same stratified 10% hold-out.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-../shared/data/math_problems}
flags=(--cfg tiny --train_data "$DATA/train.csv" --text "{Question}" --label_column label)
python train.py "${flags[@]}" --dataset math_problems --test_data "$DATA/test.csv"
python bench/baseline.py --train_data "$DATA/train.csv" --text "{Question}" --label_column label
python infer.py --output outputs/math_submission.csv
python train.py "${flags[@]}" --dataset math_problems_frozen --rank 0 --train_layers 0
