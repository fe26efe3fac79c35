#!/usr/bin/env bash
# Does reading LaTeX help? tiny/base, continued pretraining on two LaTeX sources and math_text, then classification of
# the math problems with and without it, over three seeds; then bits per byte on LaTeX that was never trained on.
# About 80 minutes on one CPU core. Bases and runs that are there already are not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
SHARED=${SHARED:-../shared}
OUT=${OUT:-outputs/latex_helps}
STEPS=${STEPS:-90} # of 32 segments of 512 tokens: about 1.5 million tokens
mkdir -p "$OUT"
python bench/latex_helps.py texts --shared "$SHARED" --out "$OUT"
for seed in 0 1 2; do
  if [ ! -f "$OUT/base_$seed/model.safetensors" ]; then
    python cpt.py --cfg tiny --train_data "$SHARED/data/latex/OpenLogic,$SHARED/data/latex/stacks-project,$OUT/math_text.jsonl" \
      --guard_data "$OUT/problems.jsonl" --dataset latex_and_math --lr 1e-3 --warmup_ratio 0.05 --batch_size 32 --max_steps "$STEPS" \
      --eval_every 45 --val_size 60 --seed "$seed" --outputs "$OUT/runs" --export "$OUT/base_$seed"
  fi
  for base in tiny/base "$OUT/base_$seed"; do
    result="$OUT/$(basename "$(dirname "$base/x")")_classified_$seed.json"
    if [ ! -f "$result" ]; then
      python train.py --cfg tiny --base "$base" --train_data "$SHARED/data/math_problems/train.csv" --text "{Question}" \
        --label_column label --dataset math_problems --epochs 2 --precision bf16 --seed "$seed" --outputs "$OUT/runs" | tail -n 1 >"$result.part"
      mv "$result.part" "$result"
    fi
  done
done
python bench/latex_helps.py table --shared "$SHARED" --out "$OUT"
