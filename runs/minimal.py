"""Packed LoRA classification on one device: the core of train.py without its options. Read this first.

    python runs/minimal.py                                         # the embedded base and problems, 60 steps
    python runs/minimal.py my_train.csv my_val.csv "{text}" label 200

Each step is one micro-batch, and nothing is resumed, saved or shared between ranks: train.py adds that around the same
calls. A test holds these losses equal, to the bit, to those of train.py --precision fp32 with micro-batches that are
large enough.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bases
import data
import ddp
import files
import labelling
import lora
import losses
import model as models
import optim
from packed import pack

BASE, SEED, BATCH_SIZE, MAX_LENGTH = "tiny/base", 0, 16, 512
LR, HEAD_LR, WEIGHT_DECAY, GRAD_CLIP, SMOOTHING = 2e-3, 4e-3, 0.01, 1.0, 0.1
LORA = {"targets": ("all-linear",), "rank": 16, "alpha": 32.0, "dropout": 0.05}


def main(
    train="tiny/data/train.csv", val="tiny/data/val.csv", text="{Question}", column="label", steps="60", base=BASE
) -> list[float]:
    """Train and print losses and the accuracy on validation rows; returns the losses."""
    device, steps = torch.device("cuda" if torch.cuda.is_available() else "cpu"), int(steps)

    # Rows become token ids and class indices.
    tokenizer = bases.load_tokenizer(bases.need_base(base))
    rows = {path: files.read_rows(path, "data") for path in (train, val)}
    labels = labelling.find_labels([row[column] for row in rows[train]])
    tokens = {path: data.tokenize(tokenizer, text, rows[path], MAX_LENGTH)[0] for path in rows}
    classes = {path: labelling.encode_labels([row[column] for row in rows[path]], labels, path) for path in rows}

    # The base is frozen. What is trained: the adapters of its linears, and a fresh head.
    head = models.Head(len(labels.names), dropout=0.1)
    model = models.load_classifier(base, head, device, torch.float32, seed=SEED)
    models.add_adapter(model, lora.Adapter(**LORA, saved=models.head_to_save(model)))
    model.train()
    print(lora.trainable_table(model))
    groups = optim.parameter_groups(model.named_parameters(), LR, HEAD_LR, WEIGHT_DECAY, model.heads)
    optimizer = optim.adamw(groups)
    trained = [p for group in groups for p in group["params"]]

    # A step: forward over one packed row of sequences, backward, clip, update.
    epochs, left, history = 0, [], []
    for step in range(steps):
        if not left:
            left = data.plan_epoch(tokens[train].lengths, BATCH_SIZE, 10**9, 1, SEED, epochs)
            epochs += 1
        (batch,) = left.pop(0)
        torch.manual_seed(ddp.micro_seed(SEED, step, 0))  # of the dropout
        logits = model(pack(tokens[train], batch, device))  # (B, C)
        targets = torch.from_numpy(classes[train][batch]).to(device)
        loss = losses.cross_entropy(logits, targets, SMOOTHING) / len(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * optim.lr_factor(step, steps, optim.warmup_updates(steps, 0, 0.1), "cosine")
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
        print(f"step {step + 1}/{steps}: loss {history[-1]:.4f}", flush=True)

    # Scoring needs no dropout, no gradients, and the same packing.
    model.eval()
    right = 0
    with torch.no_grad():
        for batch in data.pack_by_length(tokens[val].lengths, 8192):
            predicted = model(pack(tokens[val], batch, device)).argmax(dim=1).cpu().numpy()
            right += int(np.sum(predicted == classes[val][batch]))
    print(f"accuracy {right / len(rows[val]):.4f} on {len(rows[val])} rows")
    return history


if __name__ == "__main__":
    main(*sys.argv[1:])
