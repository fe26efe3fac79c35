"""Training speed: train.py against transformers' Trainer + peft, a plain peft loop and TRL's SFTTrainer.

    python bench/training.py                                  # three bases, fp32 and bf16, all cores: hours
    python bench/training.py --bases tiny --dtypes fp32       # minutes
    python bench/training.py --quick                          # a smoke test, a minute or two

Needs `pip install peft accelerate trl datasets`. Each side trains in a process of its own, and all alternate in every
round; ratios are taken within a round. All have the same base on disk, the same token ids, LoRA r 16 on q k v o,
dropout 0.1, AdamW, clipping at 1, no checkpointing, steps of 16 rows. The clock runs from the end of the last warm-up
step to the end of the last step: it sees no evaluation and no save.

ours             python train.py, the whole command; times are those of its metrics.jsonl
trainer_padded   Trainer, rows padded to max_length. Each step costs the same, so that two are measured
trainer          Trainer, padded to the longest row of a step
trainer_grouped  the same with train_sampling_strategy="group_by_length": batches are then no longer drawn at random
loop             a DataLoader, padded to the longest row, peft, autocast, clipping and AdamW in a plain loop
trl              SFTTrainer: the label's word is the completion of the row, padded to the longest row of a step
trl_packed       the same with packing=True: as many packed sequences a step as 16 rows fill

The measured rows are the same for all: steps that group_by_length makes of the whole epoch, evenly spaced by length.
trainer_grouped gets these steps, the others get their rows in random order. Packing warms up on some of the rows.
bf16 is autocast on all sides: over fp32 weights for the peers, while ours stores frozen weights in bf16.
"""

import csv
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import measure

SIDES = ("ours", "trainer_padded", "trainer", "trainer_grouped", "loop", "trl", "trl_packed")
PADDED_STEPS = 2  # measured steps of trainer_padded
LORA = {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "rank": 16, "alpha": 32.0, "dropout": 0.1}
LR, WEIGHT_DECAY, GRAD_CLIP, SEED = 2e-4, 0.01, 1.0, 0
ABOUT = """Training of LoRA r 16 on q k v o, {batch_size} rows a step, at most {max_length} tokens, {steps} steps.
Share of products: FLOPs of valid tokens / those of torch.nn.functional.linear at the base's shapes in the same dtype,
measured between the rounds. FLOPs: 4 x parameters of the layers x tokens, plus LoRA's own and attention
(estimates.training_flops); padding and LM heads do not count."""


def main() -> None:
    options = measure.options_of(__doc__, SIDES, {"steps": 3, "batch_size": 4, "max_length": 64}, add_options)
    measure.need("peft", "accelerate", "trl", "datasets")
    lines, results, notes = [], {}, []
    for base in options.bases:
        with tempfile.TemporaryDirectory(prefix="lasttoken_bench_") as folder:
            sizes = {name: getattr(options, name) for name in ("rows", "steps", "warmup", "batch_size", "max_length")}
            found = measure.job(options.threads, "prepare", name=base, folder=folder, **sizes)
            for dtype in options.dtypes:
                run = partial(run_side, options, found, folder, dtype)
                tokens = found["tokens"] // options.steps
                rounds = measure.alternate(options, options.sides, run, found, tokens, dtype)
                results[f"{base} {dtype}"] = rounds
                lines += measure.table_rows(base, dtype, rounds)
                notes.append(measure.products_note(base, dtype, rounds))
        whole = found["computed"]
        notes.append(
            f"{base}: {measure.BASES[base]}; a whole epoch of random batches computes {whole['random']:.2f} tokens for "
            f"one of text, one of grouped batches {whole['grouped']:.2f}"
        )
    measure.report(options, ABOUT.format(**vars(options)), lines, results, notes)


def add_options(parser) -> None:
    parser.add_argument("--steps", type=int, default=6, help="measured optimizer steps")
    parser.add_argument("--warmup", type=int, default=1, help="steps before the clock starts, at least 1")
    parser.add_argument("--batch_size", type=int, default=16, help="rows per optimizer step")
    parser.add_argument("--max_length", type=int, default=512, help="most tokens of a row")


def run_side(options, found: dict, folder: str, dtype: str, side: str) -> dict:
    if side == "ours":
        return ours(options, found, folder, dtype)
    return measure.job(options.threads, "peer", side=side, folder=folder, base=found["base"], dtype=dtype)


# ---- rows: the same for all sides -----------------------------------------------------------------------------------


def prepare(name: str, folder: str, rows: str, steps: int, warmup: int, batch_size: int, max_length: int) -> dict:
    """Make the base, and write the rows: train.csv in the order that train.py's plan turns into the steps wanted,
    val.csv, and for the peers plan.json with token ids, labels and steps.
    """
    import numpy as np

    import data

    base = measure.make_base(name, f"{folder}/base")
    source = measure.read_rows(rows)
    tokens = measure.tokenized(base, [row["Question"] for row in source], max_length)
    lengths = tokens.lengths

    # Whole steps of the grouped epoch, evenly spaced by length; the same rows in random order; others to warm up on.
    rng = np.random.default_rng(SEED)
    epoch = grouped_epoch(lengths, batch_size)
    ranked = sorted((step for step in epoch if len(step) == batch_size), key=lambda step: lengths[step].max())
    grouped = [ranked[i] for i in ((np.arange(steps) + 0.5) / steps * len(ranked)).astype(int)]
    measured = rng.permutation(np.concatenate(grouped))
    others = rng.permutation(np.setdiff1d(np.arange(len(source)), measured))
    first, val = np.split(others[: warmup * batch_size + 2 * batch_size], [warmup * batch_size])
    cut = lambda order: [order[i : i + batch_size] for i in range(0, len(order), batch_size)]  # noqa: E731
    random = cut(np.concatenate([first, measured]))

    order = np.empty(len(random) * batch_size, dtype=int)
    plan = data.plan_epoch(np.ones(len(order), int), batch_size, 10**9, 1, SEED, 0)
    for (places,), step in zip(plan, random, strict=True):
        order[places] = step
    for file, chosen in (("train.csv", order), ("val.csv", val)):
        write_csv(Path(folder) / file, [source[i] for i in chosen])
    labels = sorted({row["label"] for row in source})
    rows_of = lambda step: [(tokens.row(i).tolist(), labels.index(source[i]["label"])) for i in step]  # noqa: E731
    peers = {
        "random": [rows_of(step) for step in random],
        "grouped": [rows_of(step) for step in [*random[:warmup], *grouped]],
        "labels": labels,
        "warmup": warmup,
        "max_length": max_length,
    }
    (Path(folder) / "plan.json").write_text(json.dumps(peers))
    shuffled = cut(rng.permutation(len(source)))
    whole = {"random": padded(shuffled, lengths), "grouped": padded(epoch, lengths)}
    return {
        "base": base,
        "labels": labels,
        "tokens": int(lengths[measured].sum()),
        "computed": {name: count / int(lengths.sum()) for name, count in whole.items()},
        **measure.work(base, len(labels), lengths[measured], LORA),
    }


def grouped_epoch(lengths, batch_size: int) -> list:
    """The steps of an epoch whose rows transformers groups by length."""
    import numpy as np
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    torch.manual_seed(SEED)
    order = np.array(get_length_grouped_indices(lengths.tolist(), batch_size))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padded(steps: list, lengths) -> int:
    """Tokens of all steps when each is padded to its longest row."""
    return sum(len(step) * int(lengths[step].max()) for step in steps)


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["Question", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


# ---- ours: the user's command ---------------------------------------------------------------------------------------


def ours(options, found: dict, folder: str, dtype: str) -> dict:
    flags = {
        "base": found["base"],
        "train_data": f"{folder}/train.csv",
        "val_data": f"{folder}/val.csv",
        "label_names": ",".join(found["labels"]),
        "text": "{Question}",
        "rank": LORA["rank"],
        "alpha": LORA["alpha"],
        "lora_dropout": LORA["dropout"],
        "targets": ",".join(LORA["targets"]),
        "head_dropout": 0.0,
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "grad_clip": GRAD_CLIP,
        "schedule": "constant",
        "epochs": 1,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "precision": dtype,
        "audit": "none",
        "seed": SEED,
    }
    with tempfile.TemporaryDirectory(prefix="lasttoken_bench_") as outputs:
        command = measure.command_of("train.py", {**flags, "outputs": outputs})
        measure.process(command, options.threads, allowed=(0, 5))  # 5: a random base may score every row alike
        (path,) = Path(outputs).rglob("result.json")
        result = json.loads(path.read_text())
        log = [json.loads(line) for line in path.with_name("metrics.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    start, end = steps[options.warmup - 1], steps[-1]
    tokens = end["tokens"] - start["tokens"]
    if tokens != found["tokens"]:
        raise AssertionError(f"train.py trained on {tokens} tokens, the peers on {found['tokens']}: not the same rows")
    return {
        "examples": options.steps * options.batch_size,
        "tokens": tokens,
        "computed": tokens,
        "seconds": end["seconds"] - start["seconds"],
        "peak_gb": result["peak_memory_gb"],
        "loss": sum(line["loss"] for line in steps) / len(steps),
    }


# ---- peers ----------------------------------------------------------------------------------------------------------


def peer(side: str, folder: str, base: str, dtype: str) -> dict:
    """Train one peer on the steps of plan.json."""
    plan = json.loads((Path(folder) / "plan.json").read_text())
    warmup = plan["warmup"]
    steps = plan["grouped" if side == "trainer_grouped" else "random"]
    longest = [max(len(ids) for ids, _ in step) for step in steps]
    measured = steps[warmup:]
    if side == "trainer_padded":
        longest = [plan["max_length"]] * len(steps)
        steps = steps[: warmup + PADDED_STEPS]
    outcome = {
        "examples": sum(map(len, measured)),
        "tokens": sum(len(ids) for step in measured for ids, _ in step),
        "computed": sum(len(step) * most for step, most in zip(measured, longest[warmup:], strict=True)),
    }
    if side.startswith("trl"):
        outcome |= train_trl(base, dtype, steps, plan, side == "trl_packed")
    elif side == "loop":
        outcome |= train_loop(base, dtype, steps, plan)
    else:
        outcome |= train_trainer(base, dtype, steps, plan, side == "trainer_padded")

    # Steps of the same length take as long on other rows: all rows count, as if each had taken a step's time.
    if side == "trainer_padded":
        outcome["seconds"] *= len(measured) / (len(steps) - warmup)
    return {**outcome, "peak_gb": measure.peak_gb()}


def classifier(base: str, classes: int):
    """transformers' classifier under peft's LoRA, in fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=classes, dtype=torch.float32, attn_implementation="sdpa"
    )
    return get_peft_model(model, LoraConfig(**peft_settings("SEQ_CLS")))


def peft_settings(task: str) -> dict:
    return {
        "task_type": task,
        "r": LORA["rank"],
        "lora_alpha": LORA["alpha"],
        "lora_dropout": LORA["dropout"],
        "target_modules": LORA["targets"],
    }


def arguments(folder: str, dtype: str, batch_size: int) -> dict:
    """Of TrainingArguments and SFTConfig. Rows are taken in their order, for the caller has chosen the steps."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": 1,
        "learning_rate": LR,
        "weight_decay": WEIGHT_DECAY,
        "lr_scheduler_type": "constant",
        "max_grad_norm": GRAD_CLIP,
        "optim": "adamw_torch_fused",
        "bf16": dtype == "bf16",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "seed": SEED,
    }


def clock():
    """A callback that notes in `ends` when each step ended."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        ends = []

        def on_step_end(self, *words, **kwargs):
            self.ends.append(time.perf_counter())

    return Clock()


def train_trainer(base: str, dtype: str, steps: list, plan: dict, pad_whole: bool) -> dict:
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer, ticks = AutoTokenizer.from_pretrained(base), clock()
    padding = {"padding": "max_length", "max_length": plan["max_length"]} if pad_whole else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=classifier(base, len(plan["labels"])),
            args=TrainingArguments(**arguments(folder, dtype, len(steps[0]))),
            data_collator=DataCollatorWithPadding(tokenizer, **padding),
            train_dataset=[{"input_ids": ids, "labels": label} for step in steps for ids, label in step],
            processing_class=tokenizer,
            callbacks=[ticks],
        )
        done = trainer.train()
    return {"seconds": ticks.ends[-1] - ticks.ends[plan["warmup"] - 1], "loss": done.training_loss}


def train_loop(base: str, dtype: str, steps: list, plan: dict) -> dict:
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, DataCollatorWithPadding

    model = classifier(base, len(plan["labels"])).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    rows = [{"input_ids": ids, "labels": label} for step in steps for ids, label in step]
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(base))
    ends, total = [], 0.0
    for batch in DataLoader(rows, batch_size=len(steps[0]), collate_fn=collate):
        with measure.autocast(dtype):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        ends.append(time.perf_counter())
    return {"seconds": ends[-1] - ends[plan["warmup"] - 1], "loss": total / len(ends)}


def train_trl(base: str, dtype: str, steps: list, plan: dict, packing: bool) -> dict:
    """The label's word and EOS follow each row, and alone are learned; they do not count as tokens of the row."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer, ticks, warmup = AutoTokenizer.from_pretrained(base), clock(), plan["warmup"]
    words = [tokenizer(f" {label}", add_special_tokens=False)["input_ids"] for label in plan["labels"]]
    words = [[*word, tokenizer.eos_token_id] for word in words]
    rows = [
        {"input_ids": ids + words[label], "labels": [-100] * len(ids) + words[label]}
        for step in steps
        for ids, label in step
    ]
    room, batch_size = plan["max_length"] + max(map(len, words)), len(steps[0])
    if packing:
        batch_size = max(1, round(sum(len(row["input_ids"]) for row in rows) / len(steps) / room))
    torch.manual_seed(SEED)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(**arguments(folder, dtype, batch_size), max_length=room, packing=packing)
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa"),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(**peft_settings("CAUSAL_LM")),
            callbacks=[ticks],
        )
        packed = trainer.train_dataset["seq_lengths"] if packing else []
        done = trainer.train()
    found = {"seconds": ticks.ends[-1] - ticks.ends[warmup - 1], "loss": done.training_loss}
    if packing:  # its steps have other rows: all but those of the packed sequences that it warmed up on
        lengths = [length for sequence in packed[warmup * batch_size :] for length in sequence]
        own = sum(map(len, words)) / len(words)
        found |= {"examples": len(lengths), "tokens": sum(lengths) - own * len(lengths), "computed": sum(lengths)}
    return found


if __name__ == "__main__" and not measure.answer((prepare, peer, measure.probe)):
    sys.exit(main())
