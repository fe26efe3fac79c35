"""Continued pretraining: cpt.py against transformers' Trainer on the same segments of 2,048 tokens.

    python bench/pretraining.py                               # vocabulary of 151,936, fp32 and bf16: an hour
    python bench/pretraining.py --quick                       # a smoke test, a minute

Needs `pip install peft accelerate`. bench/lm_loss.py measures the loss alone. Each side trains in a process of its own,
and both alternate in every round; ratios are taken within a round. LoRA r 8 on all projections, no dropout, a frozen LM
head, AdamW, clipping at 1, one segment a micro-batch. The clock runs from the end of the last warm-up step to that of
the last step. The losses of the first step must be equal.

ours      python cpt.py, the whole command; the loss is computed over chunks of tokens and recomputed backward
trainer   Trainer and peft, AutoModelForCausalLM's own loss over the logits of all tokens
"""

import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import measure

SIDES = ("ours", "trainer")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"targets": TARGETS, "rank": 8, "alpha": 16.0, "dropout": 0.0}
LR, WEIGHT_DECAY, GRAD_CLIP, SEED = 1e-4, 0.01, 1.0, 0
TOLERANCE = {"fp32": 1e-3, "bf16": 1e-2}  # of the first step's loss; the Trainer's log is rounded
ABOUT = """Continued pretraining on segments of {max_length} tokens, {batch_size} a step, {steps} steps, LoRA r 8 on all
projections. Share: FLOPs of valid tokens / those of torch.nn.functional.linear at the layers' shapes in the same dtype,
measured between the rounds. FLOPs: 4 x parameters of the layers and the LM head x tokens, plus LoRA's own and attention
(estimates.training_flops); what is recomputed does not count."""


def main() -> None:
    options = measure.options_of(
        __doc__, SIDES, {"steps": 2, "batch_size": 2, "max_length": 128}, add_options, bases="wide"
    )
    measure.need("peft", "accelerate")
    lines, results, notes = [], {}, []
    for base in options.bases:
        with tempfile.TemporaryDirectory(prefix="lasttoken_bench_") as folder:
            sizes = {name: getattr(options, name) for name in ("rows", "steps", "warmup", "batch_size", "max_length")}
            found = measure.job(options.threads, "prepare", name=base, folder=folder, **sizes)
            for dtype in options.dtypes:
                run = partial(run_side, options, found, folder, dtype)
                rounds = measure.alternate(options, options.sides, run, found, options.max_length, dtype)
                results[f"{base} {dtype}"] = rounds
                lines += measure.table_rows(base, dtype, rounds)
                notes += [measure.products_note(base, dtype, rounds), *equal_losses(base, dtype, rounds)]
        notes.append(f"{base}: {measure.BASES[base]}; vocabulary {found['vocabulary']:,}")
    measure.report(options, ABOUT.format(**vars(options)), lines, results, notes)


def add_options(parser) -> None:
    parser.add_argument("--steps", type=int, default=3, help="measured optimizer steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts, at least 1")
    parser.add_argument("--batch_size", type=int, default=2, help="segments per optimizer step")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a segment")


def run_side(options, found: dict, folder: str, dtype: str, side: str) -> dict:
    if side == "ours":
        return ours(options, found, dtype)
    sizes = {"warmup": options.warmup, "batch_size": options.batch_size}
    return measure.job(options.threads, "trainer", folder=folder, base=found["flags"]["base"], dtype=dtype, **sizes)


def prepare(name: str, folder: str, rows: str, steps: int, warmup: int, batch_size: int, max_length: int) -> dict:
    """Make the base and the texts, and write the segments of each step of cpt.py's plan: plan.json."""
    import bases
    import cpt
    import data
    import ddp
    from configs import CptConfig

    base = measure.make_base(name, f"{folder}/base")
    texts = [json.dumps({"text": row["Question"]}) for row in measure.read_rows(rows)]
    for file, lines in (("train.jsonl", texts[20:]), ("val.jsonl", texts[:20])):
        (Path(folder) / file).write_text("\n".join(lines) + "\n")
    flags = {
        "base": base,
        "train_data": f"{folder}/train.jsonl",
        "val_data": f"{folder}/val.jsonl",
        "cross_document": True,
        "samples": 0,
        "rank": LORA["rank"],
        "alpha": LORA["alpha"],
        "lora_dropout": LORA["dropout"],
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "grad_clip": GRAD_CLIP,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "max_steps": warmup + steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "max_tokens": max_length,
        "seed": SEED,
    }
    cfg = CptConfig(**flags, targets=tuple(TARGETS), outputs=f"{folder}/outputs")
    tokens = cpt.load_texts(cfg, bases.load_tokenizer(base), ddp.setup()).train
    plan = data.plan_epoch(tokens.lengths, batch_size, max_length, 1, SEED, 0)[: warmup + steps]
    if len(plan) < warmup + steps:
        sys.exit(f"{rows} has {len(plan)} steps of text, expected {warmup + steps}: lower --steps or --batch_size")
    segments = [[tokens.row(i).tolist() for micro_batch in step for i in micro_batch] for step in plan]
    (Path(folder) / "plan.json").write_text(json.dumps(segments))

    lengths = [len(ids) for step in segments[warmup:] for ids in step]
    config = bases.load_config(base)
    work = measure.work(base, 2, lengths, LORA)
    work["flops_per_token"] += 4 * config.hidden_size * config.vocab_size
    flags |= {"cross_document": "true", "targets": ",".join(TARGETS)}
    return {"flags": flags, "tokens": sum(lengths), "vocabulary": config.vocab_size, **work}


def ours(options, found: dict, dtype: str) -> dict:
    with tempfile.TemporaryDirectory(prefix="lasttoken_bench_") as outputs:
        command = measure.command_of("cpt.py", {**found["flags"], "precision": dtype, "outputs": outputs})
        measure.process(command, options.threads)
        (path,) = Path(outputs).rglob("result.json")
        result = json.loads(path.read_text())
        log = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    start, end = steps[options.warmup - 1], steps[-1]
    tokens = end["tokens"] - start["tokens"]
    if tokens != found["tokens"]:
        raise AssertionError(f"cpt.py trained on {tokens} tokens, the Trainer on {found['tokens']}: not the same rows")
    return {
        "examples": options.steps * options.batch_size,
        "tokens": tokens,
        "computed": tokens,
        "seconds": end["seconds"] - start["seconds"],
        "peak_gb": result["peak_memory_gb"],
        "first_loss": steps[0]["loss"],
    }


def trainer(folder: str, base: str, dtype: str, warmup: int, batch_size: int) -> dict:
    """The Trainer on the segments of plan.json, one a micro-batch."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    steps = json.loads((Path(folder) / "plan.json").read_text())
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *words, **kwargs):
            ends.append(time.perf_counter())

    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=LORA["rank"],
        lora_alpha=LORA["alpha"],
        lora_dropout=LORA["dropout"],
        target_modules=TARGETS,
    )
    arguments = transformers.TrainingArguments(
        output_dir=f"{folder}/trainer",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=batch_size,
        num_train_epochs=1,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="constant",
        max_grad_norm=GRAD_CLIP,
        optim="adamw_torch_fused",
        bf16=dtype == "bf16",
        train_sampling_strategy="sequential",
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=SEED,
    )
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    run = transformers.Trainer(
        model=get_peft_model(model, adapter),
        args=arguments,
        train_dataset=[{"input_ids": ids, "labels": ids} for step in steps for ids in step],
        callbacks=[Clock()],
    )
    run.train()
    measured = [ids for step in steps[warmup:] for ids in step]
    tokens = sum(map(len, measured))
    return {
        "examples": len(measured),
        "tokens": tokens,
        "computed": tokens,
        "seconds": ends[-1] - ends[warmup - 1],
        "peak_gb": measure.peak_gb(),
        "first_loss": float(run.state.log_history[0]["loss"]),
    }


def equal_losses(base: str, dtype: str, rounds: dict) -> list[str]:
    """A note with both losses of the first step. Raises AssertionError where they differ."""
    if len(rounds) < 2:
        return []
    own, other = (rounds[side][0]["first_loss"] for side in SIDES)
    most = TOLERANCE[dtype]
    losses = f"{base} {dtype}: loss of the first step {own:.4f} here, {other:.4f} in the Trainer (allowed {most:g})"
    if not abs(own - other) <= most * own:
        raise AssertionError(losses)
    return [losses]


if __name__ == "__main__" and not measure.answer((prepare, trainer, measure.probe)):
    sys.exit(main())
