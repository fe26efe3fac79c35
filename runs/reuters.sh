#!/usr/bin/env bash
# Reuters' 90 labels with the embedded base: thresholds fitted on validation rows, judged on 15% held out beforehand.
set -euo pipefail
cd "$(dirname "$0")/.."
rows=${1:-../shared/data/reuters/train.jsonl} out=outputs/reuters
python - "$rows" "$out" <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np

import splits

lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
sets = [json.loads(line)["labels"] for line in lines]
names = sorted({name for one in sets for name in one})
targets = np.array([[name in one for name in names] for one in sets], dtype=np.float32)
Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
for name, part in zip(("train", "held_out"), splits.hold_out("multi_label", targets, 0.15, seed=0)):
    Path(sys.argv[2], f"{name}.jsonl").write_text("".join(lines[i] + "\n" for i in part), encoding="utf-8")
PYTHON
flags="--task multi_label --label_column labels --val_size 0.15 --max_length 128 --epochs 5 --precision bf16 --lr 7e-4 --metric macro_f1"
python train.py --train_data $out/train.jsonl --dataset reuters --text "{title} {text}" $flags --head_lr 1e-2 --label_smoothing 0
for kind in "" "--threshold 0.5"; do # the run's own thresholds, and none
    python infer.py --input $out/held_out.jsonl --submission "" --output $out/predictions.jsonl --overwrite $kind | tail -1
done
