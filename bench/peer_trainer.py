"""Training speed: train.py against transformers' Trainer + peft, on the same rows of the math problems.

    python bench/peer_trainer.py                          # Qwen2.5-0.5B's widths, 6 layers, random weights, all cores
    python bench/peer_trainer.py --threads 1 --rounds 1 --steps 4

Needs `pip install peft accelerate`. Each side trains in a process of its own, one after the other, in every round; a
ratio is taken within a round. All have the same base on disk, the same token ids, LoRA on q k v o, fused AdamW,
clipping at 1, and fp32 on a CPU. The clock runs from the end of the last warm-up step to the end of the last step and
sees no evaluation and no save.

ours          python train.py, the whole command; times are those of its metrics.jsonl
trainer       Trainer with DataCollatorWithPadding and sdpa attention; its steps have the same rows as ours
trainer+sort  the same with train_sampling_strategy="group_by_length", which a careful user may choose though batches
              are then no longer drawn at random; measured are steps of its epoch at evenly spaced ranks of length, so
              the rows are others than ours, as long on average, and the ratio is one of tokens/s
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SIDES = ("ours", "trainer", "trainer+sort")
RECIPE = {  # fields of TrainConfig
    "text": "{Question}",
    "label_column": "label",
    "val_size": 16,
    "rank": 16,
    "alpha": 32.0,
    "lora_dropout": 0.1,
    "head_dropout": 0.0,
    "lr": 2e-4,
    "weight_decay": 0.01,
    "schedule": "constant",
    "grad_clip": 1.0,
    "precision": "fp32",
    "seed": 0,
}


def main() -> None:
    options = read_options()
    if options.side:
        print(json.dumps(peer(options)), flush=True)
        return
    results = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="lasttoken_bench_") as folder:
        make_base(folder, options.layers, options.tokenizer)
        for number in range(options.rounds):
            for side in SIDES:
                found = ours(options, folder) if side == "ours" else in_a_process(options, side, folder)
                results[side].append(found)
                print(f"round {number + 1} {side:<13} {line(found)}", flush=True)
            if results["trainer"][-1]["tokens"] != results["ours"][-1]["tokens"]:
                raise AssertionError("the sides did not train on the same rows")
    print("\n" + summary(options, results), flush=True)
    print(json.dumps({"options": vars(options), "results": results}))


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6, help="layers of the random base")
    parser.add_argument("--steps", type=int, default=12, help="measured optimizer steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the clock starts")
    parser.add_argument("--rounds", type=int, default=3, help="how often the sides alternate")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of every side")
    parser.add_argument("--batch_size", type=int, default=16, help="examples per optimizer step")
    parser.add_argument("--max_length", type=int, default=512, help="most tokens of a row")
    parser.add_argument("--train_data", default=str(SHARED / "data/math_problems/train.csv"))
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers/qwen2.5"))
    parser.add_argument("--side", choices=SIDES[1:], help="run one peer in this process (the bench calls itself)")
    parser.add_argument("--base", help="base folder of --side")
    options = parser.parse_args()
    if options.warmup < 1:
        parser.error("--warmup: expected 1 or more, the clock starts where a step ends")
    for path in (options.train_data, options.tokenizer):
        if not Path(path).exists():
            parser.error(f"{path} is absent: the bench needs the math problems and Qwen2.5's tokenizer (../shared)")
    return options


def recipe(options: argparse.Namespace, base: str) -> dict:
    own = {name: getattr(options, name) for name in ("train_data", "batch_size", "max_length")}
    return {**RECIPE, **own, "base": base, "max_steps": options.warmup + options.steps}


def make_base(folder: str, layers: int, tokenizer: str) -> None:
    """A random base of Qwen2.5-0.5B's widths, with the real tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    widths = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2}
    config = Qwen2Config(**widths, vocab_size=151_936, num_hidden_layers=layers, tie_word_embeddings=True)
    config.pad_token_id = words.pad_token_id
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)


def environment(options: argparse.Namespace) -> dict:
    return {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}


# ---- ours: the user's command ---------------------------------------------------------------------------------------


def ours(options: argparse.Namespace, base: str) -> dict:
    with tempfile.TemporaryDirectory(prefix="lasttoken_bench_") as outputs:
        flags = {**recipe(options, base), "outputs": outputs}
        command = [sys.executable, "train.py"] + [f"--{name}={value}" for name, value in flags.items()]
        done = subprocess.run(command, env=environment(options), cwd=ROOT, capture_output=True, text=True)
        found = list(Path(outputs).rglob("result.json"))
        if not found:  # exit status 5 is allowed: a random base may score every row alike
            sys.exit(f"train.py failed:\n{done.stderr[-3000:]}")
        result = json.loads(found[0].read_text())
        lines = [json.loads(x) for x in found[0].with_name("metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    start, end = steps[options.warmup - 1], steps[-1]
    return figures(
        examples=options.steps * options.batch_size,
        tokens=end["tokens"] - start["tokens"],
        computed=end["tokens"] - start["tokens"],
        ends=[x["seconds"] for x in steps[options.warmup - 1 :]],
        loss=sum(x["loss"] for x in steps) / len(steps),
        peak_gb=result["peak_memory_gb"],
    )


def figures(examples: int, tokens: int, computed: int, ends: list[float], loss: float, peak_gb: float) -> dict:
    """What a side reports.

    computed: tokens that the model saw, padding included; ends: times at which the last warm-up step and each measured
    step ended; loss: mean over all steps.
    """
    seconds = ends[-1] - ends[0]
    return {
        "step_seconds": [round(b - a, 4) for a, b in zip(ends, ends[1:], strict=False)],
        "examples_per_second": examples / seconds,
        "tokens_per_second": tokens / seconds,
        "tokens": tokens,
        "computed_per_token": computed / tokens,
        "seconds": seconds,
        "loss": loss,
        "peak_gb": peak_gb,
    }


# ---- the peer: Trainer and peft -------------------------------------------------------------------------------------


def in_a_process(options: argparse.Namespace, side: str, base: str) -> dict:
    values = {**vars(options), "side": side, "base": base}
    command = [sys.executable, __file__] + [f"--{name}={value}" for name, value in values.items()]
    done = subprocess.run(command, env=environment(options), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peer(options: argparse.Namespace) -> dict:
    """Train with the Trainer, on the steps that train.py plans."""
    sys.path.insert(0, str(ROOT))
    import numpy as np

    import data
    import splits
    from configs import TrainConfig

    cfg = TrainConfig(**recipe(options, options.base))
    rows, val, labels = splits.read(cfg, lambda *words: None)
    rows, _ = splits.cut(cfg, rows, val)
    rows.tokens, _ = data.tokenize(data.load_tokenizer(cfg.base), cfg.text, rows.rows, cfg.max_length)
    lengths = rows.tokens.lengths
    plan = data.plan_epoch(lengths, cfg.batch_size, cfg.max_tokens, cfg.micro_batches, cfg.seed, 0)
    epoch = [np.concatenate(step) for step in plan]
    steps = epoch[: cfg.max_steps]
    if options.side == "trainer+sort":
        epoch = group_by_length(lengths, cfg.batch_size)
        ranked = sorted((s for s in epoch if len(s) == cfg.batch_size), key=lambda s: lengths[s].max())
        places = ((np.arange(options.steps) + 0.5) / options.steps * len(ranked)).astype(int)
        steps[options.warmup :] = [ranked[i] for i in places]
    examples = [{"input_ids": rows.tokens.row(i).tolist(), "labels": int(rows.labels[i])} for s in steps for i in s]
    ends, loss = run_trainer(cfg, examples, len(labels.values), options.warmup)
    measured = steps[options.warmup :]
    found = figures(
        examples=sum(map(len, measured)),
        tokens=sum(int(lengths[s].sum()) for s in measured),
        computed=padded(measured, lengths),
        ends=ends,
        loss=loss,
        peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    )
    return {**found, "computed_per_token_epoch": padded(epoch, lengths) / int(lengths.sum())}


def group_by_length(lengths, batch_size: int) -> list:
    """The steps of an epoch whose rows transformers groups by length."""
    import numpy as np
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    torch.manual_seed(0)
    order = np.array(get_length_grouped_indices(lengths.tolist(), batch_size))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def padded(steps: list, lengths) -> int:
    """Tokens of all steps when each is padded to its longest row."""
    return sum(len(step) * int(lengths[step].max()) for step in steps)


def run_trainer(cfg, examples: list[dict], classes: int, warmup: int) -> tuple[list[float], float]:
    """Times at which the steps from the last warm-up step on ended, and the mean loss of all steps."""
    try:
        import accelerate  # noqa: F401
        from peft import LoraConfig, get_peft_model
    except ImportError as e:
        sys.exit(f"the peer of this bench needs peft and accelerate ({e}): pip install peft accelerate")
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(cfg.base)
    torch.manual_seed(cfg.seed)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        cfg.base, num_labels=classes, dtype=torch.float32, attn_implementation="sdpa"
    )
    adapter = LoraConfig(
        task_type="SEQ_CLS",
        r=cfg.rank,
        lora_alpha=cfg.alpha,
        lora_dropout=cfg.lora_dropout,
        target_modules=list(cfg.targets),
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(cfg.base) / "trainer"),
        per_device_train_batch_size=cfg.batch_size,
        num_train_epochs=1,
        learning_rate=cfg.lr,
        weight_decay=cfg.weight_decay,
        lr_scheduler_type=cfg.schedule,
        max_grad_norm=cfg.grad_clip,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",  # the rows of each step are chosen by the caller
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
        seed=cfg.seed,
    )

    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            ends.append(time.perf_counter())

    trainer = transformers.Trainer(
        model=get_peft_model(model, adapter),
        args=arguments,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        train_dataset=examples,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    done = trainer.train()
    if done.global_step != cfg.max_steps:
        raise AssertionError(f"the Trainer took {done.global_step} steps, expected {cfg.max_steps}")
    return ends[warmup - 1 :], done.training_loss


# ---- words ----------------------------------------------------------------------------------------------------------


def line(found: dict) -> str:
    return (
        f"{found['examples_per_second']:6.2f} examples/s {found['tokens_per_second']:6.0f} tokens/s  "
        f"{found['computed_per_token']:.2f} computed per token  {found['peak_gb']:.2f} GB  loss {found['loss']:.3f}"
    )


def summary(options: argparse.Namespace, results: dict) -> str:
    """Each side's median round, and ours over each peer: median, least, largest, and that of undisturbed steps.

    The last takes each step's least time over the rounds: on a machine that others use too, what a step needs alone.
    """
    middle = options.rounds // 2
    lines = [f"medians of {options.rounds} rounds of {options.steps} steps, {options.threads} threads"]
    for side, found in results.items():
        lines.append(f"{side:<13} {line(sorted(found, key=lambda r: r['seconds'])[middle])}")
    for side in SIDES[1:]:
        pairs = zip(results["ours"], results[side], strict=True)
        ratios = sorted(a["tokens_per_second"] / b["tokens_per_second"] for a, b in pairs)
        whole = results[side][0]["computed_per_token_epoch"]
        alone = undisturbed(results["ours"]) / undisturbed(results[side])
        lines.append(
            f"ours / {side:<13} {ratios[middle]:.2f} (rounds {ratios[0]:.2f} to {ratios[-1]:.2f}, undisturbed "
            f"{alone:.2f}); {side} over a whole epoch: {whole:.2f} computed per token"
        )
    return "\n".join(lines)


def undisturbed(rounds: list[dict]) -> float:
    """Tokens/s when each step is taken from the round in which it was fastest."""
    return rounds[0]["tokens"] / sum(map(min, zip(*(r["step_seconds"] for r in rounds), strict=True)))


if __name__ == "__main__":
    main()
