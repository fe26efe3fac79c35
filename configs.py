"""Configs: one flat frozen dataclass per entry point, presets as functions, and the command line. Imports no torch.

    python configs.py                      # every preset and field at once
    python train.py --cfg qwen3b --lr 1e-4 --train_data my.csv
    python train.py --cfg outputs/qwen3b/math/run_0/config.json     # a past run's settings again

The comment behind a field is its help text: it is printed by --help, so it is the one place that describes the field.
"""

import dataclasses
import difflib
import importlib.util
import inspect
import itertools
import json
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, replace
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's: printed as one line without a traceback."""

    exit_status = 2


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_PROJECTIONS = ATTENTION + ("gate_proj", "up_proj", "down_proj")


# ---- train.py -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tuning of a decoder, or an encoder beside it, as a text classifier."""

    # data
    base: str = "tiny/base"  # hub name or local folder of the base model
    train_data: str = ""  # training rows: CSV, TSV or JSONL (.gz too), Parquet where pyarrow is installed
    val_data: str = ""  # validation rows; empty: val_size of the training rows are held out, stratified by label
    test_data: str = ""  # rows that infer.py predicts when it is given none; labels are optional there
    dataset: str = ""  # name of the run folder under outputs/<base>/; empty: taken from train_data
    text: str = "{Question}"  # format template over a row's columns
    prompt: str = ""  # a named prompt of prompts.py, rendered by the tokenizer's chat template, in the place of text
    kept: tuple[str, ...] = ()  # fields of the template that are cut only when nothing is left of the others
    budgets: tuple[str, ...] = ()  # most tokens of a field, as body=300; empty: only max_length cuts
    label_column: str = "label"  # column of the label; multi_label: a list in JSON, or labels between delimiters
    label_columns: tuple[str, ...] = ()  # multi_label: columns of 0 and 1, one a label, instead of label_column
    label_delimiter: str = "|"  # multi_label: what stands between the labels of label_column
    label_names: tuple[str, ...] = ()  # class names in order, comma separated; empty: found in the training rows
    label_words: tuple[str, ...] = ()  # with head label_words: each class's word, aliases apart by |; empty: the names
    id_column: str = "id"  # column of the row id; where a file has none, the row index counts
    group_column: str = ""  # rows with the same value here are never parted by the hold-out or the folds
    val_size: float = 0.1  # hold-out: a fraction below 1, or a number of rows
    folds: int = 0  # cut the training rows into this many parts, each judged by a model of the others; 0: a hold-out
    fold: str = "all"  # with folds: the one to hold out, 0 to folds - 1, or all, a run each under one folder
    seeds: tuple[str, ...] = ()  # a run each under one folder, all with the split of seed; empty: one run with seed
    balance: bool = False  # keep equally many training rows of every class, drawn once from the split's seed
    train_start: int = 0  # train on a slice of the training rows, from here (their order: seeded, classes mixed evenly)
    train_stop: int = 0  # up to here, 0: to the end; the validation rows are the same for every slice
    split: str = ""  # split.csv of an earlier run: its validation rows and its order of training rows, not drawn anew
    examples: tuple[str, ...] = ()  # columns whose texts are training rows too: column=label, as positive_example_1=1
    examples_column: str = "body"  # the column that such a text stands in for
    by_column: str = ""  # metrics are also given for each value of this column
    pseudo_labels: str = ""  # predictions (infer.py --submission "") whose confident rows are trained on too
    pseudo_data: str = ""  # the rows of those predictions, by id; empty: test_data
    pseudo_min_confidence: float = 0.9  # least probability of the answer (multi_label: of every label) of such a row
    pseudo_soft: bool = False  # train on their probabilities instead of the likeliest answer
    audit: str = "near"  # before training: equal and nearly equal rows, conflicts and leaks (near), equal only, or none
    drop_conflicts: bool = False  # leave out training rows whose text also stands there with another label
    eval_rows: int = 0  # most validation rows of a periodic evaluation, 0 for all; the final one always takes all
    max_length: int = 512  # most tokens of a row; of longer ones the end of the longest field is cut, and reported

    # model
    task: str = "single_label"  # single_label, multi_label (any number of labels a row), or regression (one output)
    head: str = "linear"  # linear: the family's classification head; label_words: the LM head's rows of their words
    pooling: str = "last"  # state that the head reads: last token, mean over tokens, or cls for the first token
    rank: int = 16  # LoRA rank; 0: no adapter, the base itself is trained as train_layers says
    alpha: float = 32.0  # LoRA alpha: the update is scaled by alpha / rank
    lora_dropout: float = 0.1  # dropout on the input of each adapter
    targets: tuple[str, ...] = ATTENTION  # name ends of the linears and embeddings that get an adapter, or all-linear
    bias: str = "none"  # biases trained with LoRA: none, lora_only (those of adapted linears) or all
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    train_layers: int = -1  # with rank 0: how many last layers are trained, 0 for the head alone, -1 for the whole base
    quant: str = "none"  # nf4: the frozen linears of the layers in 4 bits, double quantized; none
    head_dropout: float = 0.1  # dropout before the head

    init_from: str = ""  # run folder: start from its best adapter and head, such as that of the slice before

    # optimization
    lr: float = 2e-4  # peak learning rate of adapters or base
    head_lr: float = 0.0  # peak learning rate of the head; 0: the same as lr
    weight_decay: float = 0.01  # AdamW's, on matrices only (never on biases and norms)
    label_smoothing: float = 0.0  # share of the target mass that is spread over all classes
    class_weights: str = "none"  # none, balanced (inverse frequency), effective (number), or a number for each class
    pos_weight: str = "none"  # multi_label, weight of a label's rows: none, balanced (others / its rows), or numbers
    epochs: int = 3  # passes over the training rows
    max_steps: int = 0  # stop after this many optimizer steps, 0 for no limit
    batch_size: int = 16  # examples per optimizer step, over all ranks
    max_tokens: int = 4096  # token budget of one micro-batch
    micro_batches: int = 1  # least number of micro-batches a step is cut into: set it to the number of GPUs
    schedule: str = "cosine"  # cosine, linear or constant, after a linear warm-up
    warmup_steps: int = 0  # warm-up in optimizer steps; takes the place of warmup_ratio
    warmup_ratio: float = 0.0  # warm-up as a share of all steps
    grad_clip: float = 1.0  # largest gradient norm, 0 for no clipping
    optimizer: str = "adamw"  # adamw; of bitsandbytes adamw8bit, and paged_adamw, paged_adamw8bit (paging: GPUs only)
    precision: str = "auto"  # auto: bf16 from capability 8.0, fp16 on older GPUs, fp32 on a CPU; or fp32, fp16, bf16
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, about a third slower

    # run
    eval_every: int = 0  # steps between evaluations, 0: at the end of each epoch
    save_every: int = 0  # steps between saves of last/, 0: after each evaluation
    keep: int = 1  # earlier saves of last/ and best/ that stay as a fallback
    metric: str = "micro_f1"  # chooses best/; the task's first one by default (micro_f1, or mse for regression)
    thresholds: str = "auto"  # fitted on validation: global, per_class, none; auto: multi_label's, by its metric
    patience: int = 0  # stop after this many evaluations without a better metric, 0 for never
    seed: int = 0  # of the split, the plan, the initial weights and every dropout mask
    split_seed: int = -1  # of the hold-out and the folds; -1: seed
    report: tuple[str, ...] = ()  # send the log to tensorboard, wandb or both (pip install them), beside metrics.jsonl
    outputs: str = "outputs"  # folder that holds all runs
    resume: str = ""  # auto (the newest unfinished run of this base and dataset) or a run folder
    time_limit: str = ""  # end in time with a finished run: 8.5h, 90m, 60s; empty: no limit
    dry_run: bool = False  # print the plan (rows, steps, tokens, memory and time estimates) and stop


def tiny() -> TrainConfig:
    """The embedded base and problems: about a minute on two CPU cores."""
    return TrainConfig(
        train_data="tiny/data/train.csv",
        val_data="tiny/data/val.csv",
        test_data="tiny/data/test.csv",
        targets=("all-linear",),
        rank=16,
        alpha=32.0,
        lora_dropout=0.05,
        lr=2e-3,
        head_lr=4e-3,
        label_smoothing=0.1,
        warmup_ratio=0.1,
        epochs=3,
        micro_batches=1,
    )


def qwen05b() -> TrainConfig:
    """Qwen2.5-0.5B on the math problems, on two T4s: the published recipe of the 3B, at the smallest size."""
    return TrainConfig(
        base="Qwen/Qwen2.5-0.5B",
        train_data="dataset/train.csv",
        test_data="dataset/test.csv",
        rank=16,
        alpha=32.0,
        lora_dropout=0.1,
        targets=ATTENTION,
        bias="all",
        head_dropout=0.5,
        epochs=5,
        label_smoothing=0.1,
        weight_decay=0.001,
        lr=5e-5,
        head_lr=1e-4,
        batch_size=16,
        max_length=512,
        micro_batches=2,
        grad_checkpoint=True,
    )


def qwen15b() -> TrainConfig:
    """Qwen2.5-1.5B with the same recipe."""
    return replace(qwen05b(), base="Qwen/Qwen2.5-1.5B")


def qwen3b() -> TrainConfig:
    """Qwen2.5-3B with the same recipe: published micro-F1 0.87 on the math problems, where encoders reach 0.85."""
    return replace(qwen05b(), base="Qwen/Qwen2.5-3B")


def qwen32b() -> TrainConfig:
    """Qwen2.5-32B with the same recipe in nf4: needs 24 GB or more on each GPU."""
    return replace(qwen05b(), base="Qwen/Qwen2.5-32B", quant="nf4")


def llama1b() -> TrainConfig:
    """Llama-3.2-1B with the same recipe."""
    return replace(qwen05b(), base="meta-llama/Llama-3.2-1B")


def mathbert() -> TrainConfig:
    """MathBERT, the whole encoder trained: published validation micro-F1 0.84 on the math problems."""
    return TrainConfig(
        base="tbs17/MathBERT",
        train_data="dataset/train.csv",
        test_data="dataset/test.csv",
        pooling="cls",
        rank=0,
        lr=2e-5,
        epochs=5,
        batch_size=16,
        max_length=512,
        micro_batches=2,
    )


def modernbert_base() -> TrainConfig:
    """ModernBERT base with the same recipe: published 0.84."""
    return replace(mathbert(), base="answerdotai/ModernBERT-base", pooling="mean")


def modernbert_large() -> TrainConfig:
    """ModernBERT large with the same recipe: published 0.85."""
    return replace(modernbert_base(), base="answerdotai/ModernBERT-large")


def deberta_base() -> TrainConfig:
    """DeBERTa-v3 base, one-output regression of rule violations: published AUC 0.904."""
    return replace(
        mathbert(),
        base="microsoft/deberta-v3-base",
        text="Rule: {rule}\nPost: {body}",
        label_column="rule_violation",
        id_column="row_id",
        task="regression",
        metric="roc_auc",
        epochs=3,
        warmup_ratio=0.1,
    )


def deberta_large() -> TrainConfig:
    """DeBERTa-v3 large with the same recipe."""
    return replace(deberta_base(), base="microsoft/deberta-v3-large")


def roberta_large() -> TrainConfig:
    """RoBERTa large with the same recipe."""
    return replace(deberta_base(), base="roberta-large")


def llama8b_verify() -> TrainConfig:
    """Llama-3.1-8B in nf4 on slices of a balanced pool: is this solution right? Published accuracy 0.83, 0.85, 0.87."""
    return TrainConfig(
        base="meta-llama/Llama-3.1-8B",
        train_data="dataset/train.csv",
        test_data="dataset/test.csv",
        prompt="verify_plain",
        label_column="is_correct",
        head="label_words",
        quant="nf4",
        max_length=2048,
        val_size=5000.0,
        eval_rows=500,
        balance=True,
        train_stop=20_000,
        rank=16,
        alpha=16.0,
        lora_dropout=0.0,
        targets=("all-linear",),
        lr=1e-4,
        warmup_steps=100,
        weight_decay=0.01,
        epochs=3,
        batch_size=8,
        micro_batches=2,
        optimizer="paged_adamw",
        precision="fp16",
        grad_checkpoint=True,
        eval_every=500,
        save_every=500,
        metric="accuracy",
    )


def qwen15b_rules() -> TrainConfig:
    """Qwen2.5-1.5B-Instruct on posts and rules, ranked by AUC: r 16, alpha 32, dropout 0.05 on q and v."""
    return TrainConfig(
        base="Qwen/Qwen2.5-1.5B-Instruct",
        train_data="dataset/train.csv",
        test_data="dataset/test.csv",
        prompt="rules_structured",
        label_column="rule_violation",
        id_column="row_id",
        group_column="body",
        by_column="rule",
        examples=tuple(
            f"{kind}_example_{i}={label}" for kind, label in (("positive", 1), ("negative", 0)) for i in (1, 2)
        ),
        head="label_words",
        max_length=1024,
        rank=16,
        alpha=32.0,
        lora_dropout=0.05,
        targets=("q_proj", "v_proj"),
        epochs=2,
        warmup_ratio=0.05,
        micro_batches=2,
        grad_checkpoint=True,
        metric="roc_auc",
    )


def llama1b_multilabel() -> TrainConfig:
    """Llama-3.2-1B with several labels a text: published micro-F1 0.824, macro-F1 0.741 (means of seeds 1, 3, 4, 5)."""
    return TrainConfig(
        base="meta-llama/Llama-3.2-1B",
        train_data="dataset/train.jsonl",
        text="{text}",
        label_column="labels",
        task="multi_label",
        rank=2,
        alpha=2.0,
        lora_dropout=0.05,
        targets=ALL_PROJECTIONS,
        quant="nf4",
        precision="bf16",
        max_length=1024,
        lr=2e-4,
        weight_decay=0.01,
        batch_size=32,
        epochs=20,
        patience=2,
        optimizer="adamw8bit",
        keep=0,
        seed=1,
        seeds=("1", "3", "4", "5"),
    )


_DECODERS = (tiny, llama1b_multilabel, llama8b_verify, qwen15b_rules, qwen05b, qwen15b, qwen3b, qwen32b, llama1b)
_ENCODERS = (mathbert, modernbert_base, modernbert_large, deberta_base, deberta_large, roberta_large)
TRAIN_PRESETS = {f.__name__: f for f in _DECODERS + _ENCODERS}
CHOICES = {
    "head": ("linear", "label_words"),
    "quant": ("none", "nf4"),
    "chat": ("auto", "yes", "no"),
    "answer": ("auto", "label", "probability"),
    "scoring": ("label_words", "generate"),
    "audit": ("near", "equal", "none"),
    "thresholds": ("auto", "per_class", "global", "none"),
    "ensemble": ("mean_logit", "mean_prob", "rank", "weighted"),
    "export_dtype": ("bf16", "fp16", "fp32"),
    "optimizer": ("adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"),
    "pooling": ("last", "mean", "cls"),
    "bias": ("none", "lora_only", "all"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("auto", "fp32", "fp16", "bf16"),
}
METRICS = {
    "single_label": ("micro_f1", "macro_f1", "weighted_f1", "accuracy", "roc_auc", "log_loss"),
    "multi_label": (
        "micro_f1",
        "macro_f1",
        "weighted_f1",
        "subset_accuracy",
        "hamming_loss",
        "roc_auc",
        "average_precision",
        "log_loss",
    ),
    "regression": ("mse", "rmse", "mae", "r2", "pearson", "roc_auc"),
}
OF_CLASSES = {"label_smoothing": 0.0, "class_weights": "none", "head": "linear", "label_names": ()}  # no regression's
OF_SETS = {"label_columns": (), "label_delimiter": "|", "pos_weight": "none"}  # of multi_label alone


def train_problems(cfg: TrainConfig) -> list[str]:
    """Everything wrong with a TrainConfig that can be seen without reading data or weights, one line each."""
    found = _range_problems(cfg) + _training_problems(cfg)
    if cfg.task not in METRICS:
        found.append(f"--task {cfg.task}: expected one of {', '.join(METRICS)}{_nearest(cfg.task, METRICS)}")
    elif cfg.metric not in METRICS[cfg.task]:
        known = METRICS[cfg.task]
        found.append(f"--metric {cfg.metric}: expected one of {', '.join(known)}{_nearest(cfg.metric, known)}")
    others = {"regression": {**OF_CLASSES, **OF_SETS}, "single_label": OF_SETS}
    others["multi_label"] = {"class_weights": "none"}
    found += [
        f"--{name} {getattr(cfg, name)} with --task {cfg.task}: it has no meaning there, leave it out"
        for name, plain in others.get(cfg.task, {}).items()
        if getattr(cfg, name) != plain
    ]
    if cfg.task == "multi_label" and cfg.head != "linear":
        found.append(f"--head {cfg.head} with --task multi_label: words exclude one another; take the linear head")
    if cfg.label_columns and cfg.label_names:
        found.append("--label_names with --label_columns: the columns name the labels; give one of the two")
    if not cfg.label_delimiter:
        found.append("--label_delimiter is empty: give what stands between labels, or a JSON list in the column")
    if cfg.pos_weight not in ("none", "balanced") and not _weights(cfg.pos_weight):
        found.append(f"--pos_weight {cfg.pos_weight}: expected none, balanced or positive numbers like 1,2.5")
    if cfg.head == "label_words" and cfg.rank == 0 and cfg.train_layers == 0:
        found.append("--head label_words with --rank 0 --train_layers 0: nothing would be trained; give a --rank")
    if cfg.head == "label_words" and cfg.pooling != "last":
        found.append(f"--head label_words with --pooling {cfg.pooling}: the next word follows the last token")
    if not cfg.train_data:
        found.append("--train_data is empty: give the CSV, TSV or JSONL file to train on")
    if cfg.rank > 0 and cfg.train_layers != -1:
        found.append(f"--train_layers {cfg.train_layers} with --rank {cfg.rank}: layers are trained with --rank 0 only")
    if cfg.rank == 0 and cfg.bias != "none":
        found.append(f"--bias {cfg.bias} with --rank 0: biases are trained with an adapter only")
    if not cfg.val_data and cfg.val_size <= 0:
        found.append(f"--val_size {cfg.val_size} without --val_data: expected a fraction or a count above 0")
    if cfg.val_size >= 1 and cfg.val_size != int(cfg.val_size):
        found.append(f"--val_size {cfg.val_size}: a count of rows must be whole")
    if not re.search(r"\{[^{}]+\}", cfg.text):
        found.append(f'--text "{cfg.text}" names no column: expected a template like "{{Question}}"')
    if len(set(cfg.label_names)) != len(cfg.label_names):
        found.append(f"--label_names {','.join(cfg.label_names)}: a name stands twice")
    if len(cfg.label_names) == 1:
        found.append(f"--label_names {cfg.label_names[0]}: expected at least 2 names")
    if cfg.train_start < 0 or cfg.train_stop < 0 or (cfg.train_stop and cfg.train_stop <= cfg.train_start):
        found.append(f"--train_start {cfg.train_start} --train_stop {cfg.train_stop}: expected a slice from 0 up")
    if cfg.balance and cfg.task != "single_label":
        found.append(f"--balance with --task {cfg.task}: only single_label has classes to balance")
    if cfg.split and (cfg.balance or cfg.folds or cfg.val_data):
        found.append(f"--split {cfg.split} with --balance, --folds or --val_data: the split is drawn already")
    if cfg.examples and cfg.task == "multi_label":
        found.append("--examples with --task multi_label: an example column has one label; leave it out")
    for part in cfg.examples:
        if not all(part.partition("=")):
            found.append(f"--examples {part}: expected column=label, such as positive_example_1=1")
    if cfg.pseudo_labels and not (cfg.pseudo_data or cfg.test_data):
        found.append("--pseudo_labels without --pseudo_data or --test_data: name the rows that were predicted")
    if not 0.5 <= cfg.pseudo_min_confidence <= 1:
        found.append(f"--pseudo_min_confidence {cfg.pseudo_min_confidence:g}: expected a probability from 0.5 to 1")
    for part in cfg.budgets:
        if not re.fullmatch(r"[^=]+=[1-9]\d*", part):
            found.append(f"--budgets {part}: expected field=tokens, such as body=300")
    wanted = [str(i) for i in range(cfg.folds)]
    if cfg.folds == 1 or (cfg.folds and cfg.fold not in ["all", *wanted]):
        found.append(f"--folds {cfg.folds} --fold {cfg.fold}: expected 2 or more folds, and one of them or all")
    if cfg.folds and cfg.val_data:
        found.append(
            f"--folds {cfg.folds} with --val_data {cfg.val_data}: folds judge the training rows; leave one out"
        )
    if not all(s.isdigit() for s in cfg.seeds) or len(set(map(int, cfg.seeds))) < len(cfg.seeds):
        found.append(f"--seeds {','.join(cfg.seeds)}: expected whole numbers of 0 or more, each once")
    kinds = r"none|balanced|inverse|effective(:0?\.\d+)?"
    if not re.fullmatch(kinds, cfg.class_weights) and not _weights(cfg.class_weights):
        kinds = "none, balanced, effective, effective:0.99 or positive numbers like 1,2.5"
        found.append(f"--class_weights {cfg.class_weights}: expected {kinds}")
    return found


# ---- infer.py -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InferConfig:
    """Prediction with a finished run; or, with generate, completions of prompts by a language model."""

    runs: tuple[str, ...] = ()  # run folder, several for an ensemble (after the first CSVs too); empty: the newest run
    ensemble: str = "mean_logit"  # of several runs: mean_logit, mean_prob, rank, or weighted (fitted on validation)
    base: str = ""  # instead of a run: a base, hub name or folder; empty with adapter: the one that the adapter names
    adapter: str = ""  # a PEFT LoRA adapter for that base, folder or hub name
    text: str = "{Question}"  # for base, adapter and generate (there {prompt}): format template over a row's columns
    prompt: str = ""  # for base and adapter, instead of text: a named prompt, as in train.py
    label_column: str = "label"  # for base and adapter: column of the label, where there is one
    label_names: tuple[str, ...] = ()  # for base and adapter: class names in the order of the head's outputs
    label_words: tuple[str, ...] = ()  # for base and adapter: as in train.py
    id_column: str = "id"  # for base, adapter and generate: column of the row id
    head: str = "linear"  # for base and adapter: linear, or label_words to score words without training
    quant: str = "none"  # for base and adapter: none or nf4
    max_length: int = 512  # for base, adapter and generate: most tokens of a row, or of a prompt
    input: str = ""  # rows to predict; empty: the run's own test_data, with generate the terminal or a pipe
    output: str = "submission.csv"  # where predictions go; CSV, or JSONL by its extension (generate: completions.jsonl)
    submission: str = "id,label"  # names of the two columns id and label; empty: id, prediction and all probabilities
    answer: str = "auto"  # of a submission: label, probability (of the last of two), auto: by the run's metric
    scoring: str = "label_words"  # label_words: one forward pass; generate: answers are written out, and read
    by_column: str = ""  # metrics are also given for each value of this column
    time_limit: str = ""  # as in train.py: rows that are not reached in time get the shares of the training rows
    max_tokens: int = 8192  # token budget of one micro-batch
    limit: int = 0  # only the first rows, 0 for all
    merge: bool = False  # fold the adapter into the base before scoring: faster, equal to rounding
    export: str = ""  # write a plain transformers model, the adapter merged, into this folder, and predict nothing
    precision: str = "auto"  # as in train.py
    threshold: float = 0.0  # a probability that decides in the place of the thresholds fitted with the run; 0: those
    force: bool = False  # write the output even when the scores are degenerate
    generate: bool = False  # complete prompts: of input, or lines of the terminal or a pipe
    chat: str = "auto"  # generate: prompts as a chat, yes, no, or auto: where the tokenizer has a chat template
    system: str = "You are a helpful assistant."  # generate: a chat's system turn, where messages have none
    examples: str = ""  # generate: solved examples put before each prompt, rows of the template's columns and response
    tools: str = ""  # generate: a JSON list of tool descriptions for the chat template
    max_new_tokens: int = 256  # generate: most tokens of a completion
    temperature: float = 0.0  # generate: 0 takes the likeliest token, more draws from softmax(logits / temperature)
    top_p: float = 1.0  # generate: draw from the likeliest tokens that hold this share
    batch_size: int = 8  # generate: prompts of a batch, in the order of the input
    seed: int = 0  # generate: of what is drawn
    overwrite: bool = False  # replace an existing output; otherwise it is kept beside it as NAME.previous
    outputs: str = "outputs"  # folder that holds all runs


def infer_problems(cfg: InferConfig) -> list[str]:
    """Everything wrong with an InferConfig that can be seen without reading data or weights, one line each."""
    found = _range_problems(cfg)
    if cfg.submission and len([c for c in cfg.submission.split(",") if c.strip()]) != 2:
        found.append(f'--submission "{cfg.submission}": expected two column names such as "id,label", or empty')
    if len(set(cfg.runs)) < len(cfg.runs):
        found.append(f"--runs {','.join(cfg.runs)}: a run stands twice; weigh runs with --ensemble weighted")
    if len(cfg.runs) > 1 and (cfg.export or cfg.generate):
        found.append(f"--runs {','.join(cfg.runs)}: --{'export' if cfg.export else 'generate'} takes one run")
    if len(cfg.runs) > 1 and cfg.scoring == "generate":
        found.append(f"--runs {','.join(cfg.runs)}: --scoring generate takes one run")
    if cfg.runs and (cfg.base or cfg.adapter):
        found.append(
            f"--runs {','.join(cfg.runs)} with --base or --adapter: a run has its own base; give one or the other"
        )
    if cfg.merge and cfg.quant != "none":
        found.append(f"--merge with --quant {cfg.quant}: quantized weights take no update; leave --quant out")
    if cfg.export and os.path.isfile(cfg.export):
        found.append(f"--export {cfg.export} is a file: name a new folder")
    held = sorted(os.listdir(cfg.export), reverse=True) if cfg.export and os.path.isdir(cfg.export) else []
    if held:
        held = [n for n in held if n.endswith(".safetensors")] or held
        found.append(f"--export {cfg.export} already holds {held[0]}: name a new folder")
    if cfg.temperature != 0 and not cfg.temperature >= 0.01:
        found.append(f"--temperature {cfg.temperature:g}: expected 0 for greedy, or 0.01 and more")
    if not 0 <= cfg.threshold < 1:
        found.append(f"--threshold {cfg.threshold:g}: expected a probability below 1, or 0 for the run's own")
    if not 0 < cfg.top_p <= 1:
        found.append(f"--top_p {cfg.top_p:g}: expected a share above 0 up to 1")
    ends = ("jsonl",) if cfg.generate else ("csv", "jsonl")
    if not cfg.output.endswith(tuple(f".{end}" for end in ends)):
        found.append(f"--output {cfg.output}: expected a name that ends in .{' or .'.join(ends)}")
    return found


OF_SCORES = "threshold label_column label_names label_words head submission max_tokens merge export force".split()
OF_SCORES += "prompt answer scoring by_column time_limit".split()
OF_TEXTS = "chat system examples tools max_new_tokens temperature top_p batch_size seed".split()


def of_generation(cfg: InferConfig, given: set[str]) -> InferConfig:
    """The config with generate's own defaults where nothing was given by hand."""
    own = {"text": "{prompt}", "output": "completions.jsonl"} if cfg.generate else {}
    return replace(cfg, **{name: value for name, value in own.items() if name not in given})


def _idle_infer(cfg: InferConfig, given: set[str]) -> list[str]:
    """Flags given by hand that have no effect on what is asked for."""
    side, others = ("with", OF_SCORES) if cfg.generate else ("without", OF_TEXTS)
    if cfg.scoring == "generate" and not cfg.generate:
        side, others = "with", "chat system examples tools ensemble threshold merge export time_limit".split()
    idle = [f"--{n} has no effect {side} --generate" for n in others if n in given]
    if not (cfg.base or cfg.adapter):
        ours = "text prompt label_column label_names label_words id_column head quant max_length".split()
        ours = ["quant"] if cfg.generate else ours
        idle += [f"--{n} has no effect without --base or --adapter: a run has its own" for n in ours if n in given]
    if "answer" in given and not cfg.submission:
        idle.append("--answer has no effect without --submission, which then holds every probability")
    if "ensemble" in given and len(cfg.runs) < 2:
        idle.append("--ensemble has no effect on one run: name several with --runs A B")
    drawn = {"top_p", "seed"} & given if cfg.generate and cfg.temperature == 0 else ()
    idle += [f"--{n} has no effect with --temperature 0, which draws nothing" for n in sorted(drawn)]
    chats = {"system", "tools"} & given if cfg.chat == "no" else ()
    return idle + [f"--{n} has no effect with --chat no" for n in sorted(chats)]


# ---- cpt.py ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CptConfig:
    """Next-token training of a base on plain text: the whole base, or an adapter on it."""

    base: str = "tiny/base"  # hub name or local folder of the base model
    random_init: bool = False  # draw fresh weights from seed: base then needs only config.json and a tokenizer
    train_data: str = ""  # folders of .tex .txt .md .jsonl (.gz too), or such files, comma separated
    guard_data: str = ""  # general text on which forgetting is measured, as train_data; never trained on
    dataset: str = ""  # name of the run folder under outputs/<base>/; empty: taken from train_data
    text: str = "{text}"  # format template of a document, or of a pair's prompt ({text} means {prompt} there)
    chat: str = "auto"  # for pairs: yes, no, or auto: by the tokenizer's chat template where it has one
    system: str = "You are a helpful assistant."  # for pairs in a chat: the system turn of those without one
    max_length: int = 512  # tokens of a segment: longer documents are cut into several, longer pairs are shortened
    cross_document: bool = False  # cut segments from the stream of all documents: a token then sees the one before
    val_size: float = 0.02  # held-out documents: a fraction below 1, or a count
    eval_rows: int = 0  # most held-out documents or pairs of a periodic evaluation, 0 for all; first and last take all
    samples: int = 2  # held-out texts, or prompts, that are completed at each evaluation, 0 for none
    rank: int = 0  # LoRA rank; 0: no adapter, the whole base is trained
    alpha: float = 16.0  # LoRA alpha: the update is scaled by alpha / rank
    lora_dropout: float = 0.05  # dropout on the input of each adapter
    targets: tuple[str, ...] = ALL_PROJECTIONS  # name ends of what gets an adapter, embed_tokens and lm_head too
    modules_to_save: tuple[str, ...] = ()  # with an adapter: modules trained whole, such as embed_tokens,lm_head
    quant: str = "none"  # with an adapter: nf4 stores the frozen linears of the layers in 4 bits; none
    lr: float = 1e-3  # peak learning rate
    embed_lr: float = 0.0  # peak learning rate of the embedding and the LM head; 0: the same as lr
    weight_decay: float = 0.1  # AdamW's, on matrices only
    epochs: int = 1  # passes over the documents
    max_steps: int = 0  # stop after this many optimizer steps, 0 for no limit
    batch_size: int = 64  # segments per optimizer step, over all ranks
    max_tokens: int = 8192  # token budget of one micro-batch
    micro_batches: int = 1  # least number of micro-batches a step is cut into
    schedule: str = "cosine"  # cosine, linear or constant, after a linear warm-up
    warmup_steps: int = 0  # warm-up in optimizer steps; takes the place of warmup_ratio
    warmup_ratio: float = 0.02  # warm-up as a share of all steps
    grad_clip: float = 1.0  # largest gradient norm, 0 for no clipping
    optimizer: str = "adamw"  # as in train.py
    precision: str = "auto"  # as in train.py
    grad_checkpoint: bool = False  # recompute activations in the backward pass
    eval_every: int = 0  # steps between evaluations, 0: at the end of each epoch
    save_every: int = 0  # steps between saves of last/, 0: after each evaluation
    keep: int = 1  # earlier saves that stay as a fallback
    seed: int = 0  # of the split, the plan and the initial weights
    report: tuple[str, ...] = ()  # as in train.py
    outputs: str = "outputs"  # folder that holds all runs
    export: str = ""  # folder that gets the trained base at the end, an adapter merged: config, weights, tokenizer
    export_dtype: str = "bf16"  # of the exported weights: bf16, fp16 or fp32
    resume: str = ""  # auto (the newest unfinished run of this base and dataset) or a run folder


def cpt_tiny() -> CptConfig:
    """For tiny/base on a CPU; runs/tiny_base.sh makes that base with it, from random weights."""
    return CptConfig(
        train_data="outputs/tiny_corpus.jsonl",
        dataset="tiny_corpus",
        epochs=3,
        eval_every=300,
        save_every=100,
        precision="bf16",
    )


def qwen_math15b() -> CptConfig:
    """Qwen2.5-Math-1.5B on the sources of papers: the published LaTeX recipe, its embedding and LM head named right."""
    return CptConfig(
        base="Qwen/Qwen2.5-Math-1.5B",
        train_data="dataset/papers",
        max_length=2048,
        rank=8,
        alpha=16.0,
        lora_dropout=0.05,
        targets=ALL_PROJECTIONS + ("embed_tokens", "lm_head"),
        lr=1e-4,
        embed_lr=1e-5,
        weight_decay=0.01,
        epochs=3,
        batch_size=16,
        max_tokens=2048,
        micro_batches=2,
        precision="fp16",
        grad_checkpoint=True,
    )


def llama8b_sft() -> CptConfig:
    """Llama-3.1-8B in nf4 on prompts and responses: the published recipe of the verifier, responses learned."""
    return CptConfig(
        base="meta-llama/Llama-3.1-8B",
        train_data="dataset/train.jsonl",
        max_length=2048,
        val_size=5000.0,
        eval_rows=500,
        rank=16,
        alpha=16.0,
        lora_dropout=0.0,
        targets=("all-linear",),
        quant="nf4",
        lr=1e-4,
        warmup_steps=100,
        warmup_ratio=0.0,
        weight_decay=0.01,
        epochs=3,
        batch_size=8,
        micro_batches=2,
        optimizer="paged_adamw",
        precision="fp16",
        grad_checkpoint=True,
        eval_every=500,
        save_every=500,
    )


CPT_PRESETS = {"tiny": cpt_tiny, "qwen_math15b": qwen_math15b, "llama8b_sft": llama8b_sft}


def cpt_problems(cfg: CptConfig) -> list[str]:
    """Everything wrong with a CptConfig that can be seen without reading data or weights, one line each."""
    found = _range_problems(cfg) + _training_problems(cfg)
    if not cfg.train_data:
        found.append("--train_data is empty: give the folder or the file of documents to train on")
    if cfg.rank and cfg.random_init:
        found.append("--random_init with --rank: an adapter on a random base learns nothing; give a trained base")
    if cfg.rank == 0 and cfg.modules_to_save:
        found.append("--modules_to_save with --rank 0: the whole base is trained already")
    if cfg.val_size <= 0 or (cfg.val_size >= 1 and cfg.val_size != int(cfg.val_size)):
        found.append(f"--val_size {cfg.val_size}: expected a share below 1 or a whole number of documents above 0")
    if cfg.export:
        ours = os.path.realpath(cfg.export) == os.path.realpath(cfg.base)
        old = ("adapter_config.json", *(() if ours else ("chat_template.jinja",)))
        held = os.listdir(cfg.export) if os.path.isdir(cfg.export) else []
        held = [n for n in sorted(held, reverse=True) if n.endswith((".safetensors", ".index.json")) or n in old]
        parent = next(p for p in [Path(cfg.export).absolute(), *Path(cfg.export).absolute().parents] if p.exists())
        if held:
            found.append(f"--export {cfg.export} already holds {held[0]}: name another folder or remove it")
        elif not parent.is_dir() or not os.access(parent, os.W_OK):
            found.append(f"--export {cfg.export}: {parent} is no folder that can be written to")
    return found


# ---- report.py ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReportConfig:
    """A page about a finished run, or a comparison of two: python report.py RUN, python report.py A B."""

    runs: tuple[str, ...] = ()  # run folder, two to compare them, A against B; empty: the newest run
    output: str = ""  # folder of the page and its pictures; empty: report/ in the run (of two: in A)
    samples: int = 1000  # bootstrap resamples of rows
    worst: int = 30  # most confident errors whose texts are shown
    seed: int = 0  # of the resamples
    outputs: str = "outputs"  # folder that holds all runs


def report_problems(cfg: ReportConfig) -> list[str]:
    """Everything wrong with a ReportConfig that can be seen without reading a run, one line each."""
    found = _range_problems(cfg)
    if len(cfg.runs) > 2 or len(set(cfg.runs)) < len(cfg.runs):
        found.append(f"--runs {','.join(cfg.runs)}: expected one run, or two different ones")
    if 0 < cfg.samples < 100:
        found.append(f"--samples {cfg.samples}: expected 100 or more for 95% intervals")
    if os.path.isfile(cfg.output):
        found.append(f"--output {cfg.output} is a file: name a folder")
    return found


# ---- checks shared by all ------------------------------------------------------------------------------------

POSITIVE = ("lr", "epochs", "batch_size", "max_new_tokens", "max_tokens", "micro_batches", "max_length", "alpha")
NOT_NEGATIVE = (
    "rank head_lr embed_lr weight_decay max_steps warmup_steps grad_clip "
    "eval_every save_every keep patience seed eval_rows limit samples worst folds"
).split()
SHARES = ("lora_dropout", "head_dropout", "label_smoothing", "warmup_ratio")


def _range_problems(cfg) -> list[str]:
    found = []
    values = dataclasses.asdict(cfg)
    for name, value in values.items():
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
            found.append(f"--{name} {value}: expected a finite number")
        elif name in POSITIVE and value <= 0:
            found.append(f"--{name} {value}: expected a number above 0")
        elif name in NOT_NEGATIVE and value < 0:
            found.append(f"--{name} {value}: expected 0 or more")
        elif name in SHARES and not 0 <= value < 1:
            found.append(f"--{name} {value}: expected a share from 0 up to, not including, 1")
        elif name in CHOICES and value not in CHOICES[name]:
            found.append(
                f"--{name} {value}: expected one of {', '.join(CHOICES[name])}{_nearest(value, CHOICES[name])}"
            )
    try:
        seconds(values.get("time_limit", ""))
    except ValueError as e:
        found.append(str(e))
    if values.get("max_tokens", 0) < values.get("max_length", 0) and "lr" in values:
        found.append(
            f"--max_tokens {cfg.max_tokens} is below --max_length {cfg.max_length}: the longest row would fit no "
            "micro-batch; raise max_tokens or lower max_length"
        )
    return found


def _training_problems(cfg) -> list[str]:
    found = []
    if cfg.optimizer != "adamw" and importlib.util.find_spec("bitsandbytes") is None:
        found.append(f"--optimizer {cfg.optimizer} needs bitsandbytes: pip install bitsandbytes")
    if cfg.quant != "none" and cfg.rank == 0:
        found.append(f"--quant {cfg.quant} with --rank 0: quantized weights cannot be trained; give a --rank")
    if "all-linear" in cfg.targets and len(cfg.targets) > 1:
        found.append(f"--targets {','.join(cfg.targets)}: all-linear stands alone; name the modules instead")
    if cfg.rank > 0 and not cfg.targets:
        found.append(f"--rank {cfg.rank} with empty --targets: name the linears to adapt, or all-linear")
    for name in cfg.report:
        if name not in ("tensorboard", "wandb"):
            found.append(
                f"--report {name}: expected tensorboard, wandb or both{_nearest(name, ('tensorboard', 'wandb'))}"
            )
        elif importlib.util.find_spec(name) is None:
            found.append(f"--report {name}: it is not installed: pip install {name}")
    if cfg.warmup_steps and cfg.warmup_ratio:
        found.append(f"--warmup_steps {cfg.warmup_steps} and --warmup_ratio {cfg.warmup_ratio}: give one of the two")
    return found


def check(cfg, given: set[str] = frozenset()) -> None:
    """Raise one UserError with every problem of the config; given: fields set by hand, which must have an effect."""
    idle = ["--text has no effect with --prompt, which has its own"] if {"text", "prompt"} <= given else []
    if isinstance(cfg, (TrainConfig, CptConfig)) and cfg.rank == 0:
        adapter = sorted(given & {"alpha", "lora_dropout", "targets", "rslora"})
        idle += [f"--{n} has no effect with --rank 0, which trains no adapter" for n in adapter]
    if isinstance(cfg, CptConfig):
        idle += ["--export_dtype has no effect without --export"] if {"export_dtype"} & given and not cfg.export else []
        idle += ["--system has no effect with --chat no"] if {"system"} & given and cfg.chat == "no" else []
        ends = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
        vocabulary = cfg.rank == 0 or any(n.endswith(ends) for n in cfg.targets + cfg.modules_to_save)
        if "embed_lr" in given and not vocabulary:
            idle.append("--embed_lr has no effect: neither --targets nor --modules_to_save names embedding or LM head")
    if isinstance(cfg, TrainConfig) and cfg.val_data and "val_size" in given:
        idle.append("--val_size has no effect with --val_data, whose rows are all used")
    if isinstance(cfg, TrainConfig):
        idle += ["--val_size has no effect with --folds"] if cfg.folds and "val_size" in given else []
        drawn = {"val_size", "split_seed", "group_column"} & given if cfg.split else ()
        idle += [f"--{n} has no effect with --split, which is drawn already" for n in sorted(drawn)]
        idle += ["--split_seed has no effect with --val_data"] * ("split_seed" in given and bool(cfg.val_data))
        more = {"pseudo_data", "pseudo_min_confidence", "pseudo_soft"} & given if not cfg.pseudo_labels else ()
        idle += [f"--{n} has no effect without --pseudo_labels" for n in sorted(more)]
        idle += ["--examples_column has no effect without --examples"] * (
            "examples_column" in given and not cfg.examples
        )
        idle += ["--fold has no effect without --folds"] if "fold" in given and not cfg.folds else []
    if isinstance(cfg, (TrainConfig, InferConfig)) and cfg.head != "label_words" and "label_words" in given:
        idle.append("--label_words has no effect without --head label_words")
    if isinstance(cfg, TrainConfig) and cfg.head == "label_words":
        idle += [f"--{n} has no effect with --head label_words" for n in sorted(given & {"head_lr", "head_dropout"})]
    if isinstance(cfg, InferConfig):
        idle += _idle_infer(cfg, given)
    of = {TrainConfig: train_problems, InferConfig: infer_problems, CptConfig: cpt_problems}
    problems = idle + of.get(type(cfg), report_problems)(cfg)
    if problems:
        head = "" if len(problems) == 1 else f"{len(problems)} problems in the settings: "
        raise UserError(head + " | ".join(problems))


# ---- the command line ----------------------------------------------------------------------------------------------


def parse(cls, presets: dict, argv: list[str], doc: str = ""):
    """Parse `--cfg NAME|FILE --field value ...` to (config, set of fields given by hand).

    A flag of a bool field may stand alone. Raises UserError naming the nearest known flag or preset; prints the help
    and exits with 0 at --help. The config is not checked yet: call `check`.
    """
    if "--help" in argv or "-h" in argv:
        print(doc.strip() + "\n\n" + describe(cls, presets))
        sys.exit(0)
    given = _pairs(cls, argv)
    cfg = _start(cls, presets, given.pop("cfg", None))
    values, problems = {}, []
    hints = typing.get_type_hints(cls)
    for name, text in given.items():
        try:
            values[name] = convert(text, hints[name])
        except ValueError as e:
            problems.append(f"--{name} {text}: expected {e}")
    if problems:
        raise UserError(" | ".join(problems))
    given = set(values)
    for one, other in (("warmup_steps", "warmup_ratio"), ("warmup_ratio", "warmup_steps")):
        if one in given and other not in given:
            values[other] = 0  # of two ways to say it, the one given by hand takes the preset's place
    return replace(cfg, **values), given


def _pairs(cls, argv: list[str]) -> dict[str, str]:
    names = [f.name for f in dataclasses.fields(cls)]
    hints = typing.get_type_hints(cls)
    pairs, problems, i = {}, [], 0
    while i < len(argv):
        flag, eq, value = argv[i].partition("=")
        i += 1
        if not flag.startswith("--"):
            problems.append(f"'{flag}' stands alone: expected --field value")
            continue
        name = flag[2:].replace("-", "_")
        if name not in names and name != "cfg":
            problems.append(f"unknown flag {flag}{_nearest(name, names + ['cfg'], '--')}")
            while i < len(argv) and not argv[i].startswith("--"):
                i += 1
            continue
        if not eq:
            several = isinstance(hints.get(name), types.GenericAlias)  # --runs A B C, as --runs A,B,C
            words = [w for w in itertools.takewhile(lambda w: not w.startswith("--"), argv[i:])]
            if words:
                words = words if several else words[:1]
                value, i = ",".join(words), i + len(words)
            elif name in hints and hints[name] is bool:
                value = "true"
            else:
                problems.append(f"{flag} has no value")
                continue
        if name in pairs:
            problems.append(f"{flag} is given twice")
        pairs[name] = value
    if problems:
        raise UserError(" | ".join(problems))
    return pairs


def _start(cls, presets: dict, name: str | None):
    if name is None:
        return presets["tiny"]() if "tiny" in presets else cls()
    if name in presets:
        return presets[name]()
    if name.endswith(".json") or os.path.isdir(name):
        return read_config(cls, name)
    known = ", ".join(presets) or "none here"
    raise UserError(f"unknown preset {name}{_nearest(name, presets)}: expected one of {known}, or a config.json")


def read_config(cls, path: str | Path):
    """The config of a past run, from its config.json or the run folder that holds it."""
    path = Path(path) / "config.json" if os.path.isdir(path) else Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"config {path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"config {path} is not JSON: {e}") from None
    if not isinstance(values, dict):
        raise UserError(f"config {path}: expected an object of fields, got {type(values).__name__}")
    hints, problems, fields = typing.get_type_hints(cls), [], {}
    for name, value in values.items():
        if name not in hints:
            problems.append(f"unknown field {name}{_nearest(name, hints)}")
        elif isinstance(value, list) and isinstance(hints[name], types.GenericAlias):
            fields[name] = tuple(str(v) for v in value)
        elif value is None or isinstance(value, (list, dict)):
            problems.append(f"{name} {json.dumps(value)}: expected {EXPECTED.get(hints[name], 'a string')}")
        else:
            try:
                fields[name] = convert(value, hints[name])
            except ValueError as e:
                problems.append(f"{name} {value}: expected {e}")
    if problems:
        raise UserError(f"config {path}: " + " | ".join(problems))
    return cls(**fields)


EXPECTED = {bool: "true or false", int: "a whole number", float: "a number"}


def convert(value, kind):
    """A command-line or JSON value as the type of its field. Raises ValueError with what was expected."""
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise ValueError(EXPECTED[bool])
        return words[str(value).lower()]
    if kind is int:
        try:
            return int(str(value))  # exact at any size
        except ValueError:
            pass
        try:
            whole = float(value)  # 1e4
            if whole == int(whole) and not isinstance(value, bool):
                return int(whole)
        except (ValueError, OverflowError):
            pass
        raise ValueError(EXPECTED[int])
    if kind is float:
        try:
            return float(str(value))
        except ValueError:
            raise ValueError(EXPECTED[float]) from None
    if isinstance(kind, types.GenericAlias):  # tuple[str, ...]
        return tuple(part.strip() for part in str(value).split(",") if part.strip())
    return str(value)


def seconds(text: str) -> float:
    """A duration such as 8.5h, 90m, 1h30m or 60s; 0 for an empty text. Raises ValueError for anything else."""
    if text and not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
        raise ValueError(f"--time_limit {text}: expected a duration like 8.5h, 90m or 60s")
    parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
    return sum(float(number) * {"h": 3600, "m": 60, "s": 1}[unit] for number, unit in parts)


def comments(cls) -> dict[str, str]:
    """The comment behind each field in the source: its documentation."""
    found = re.findall(r"^    (\w+):[^#\n]*#\s*(.+)$", inspect.getsource(cls), re.MULTILINE)
    return dict(found)


def describe(cls, presets: dict) -> str:
    """Presets and fields of an entry point, as --help prints them."""
    start = presets["tiny"]() if "tiny" in presets else cls()
    lines = ["presets (--cfg NAME, or the config.json of a past run; without --cfg: tiny):"] if presets else []
    for name, make in presets.items():
        lines.append(f"  {name:<10} {inspect.getdoc(make)}")
    lines.append("fields (--field value), in brackets their value without --cfg:")
    help_of = comments(cls)
    for f in dataclasses.fields(cls):
        value = getattr(start, f.name)
        shown = ",".join(value) if isinstance(value, tuple) else value
        shown = '""' if shown == "" else shown
        lines.append(f"  --{f.name:<16} {help_of[f.name]} [{shown}]")
    return "\n".join(lines)


ELSEWHERE = {  # what other tools call our fields
    "learning_rate": "lr", "lora_r": "rank", "lora_alpha": "alpha", "target_modules": "targets", "model": "base",
    "model_name_or_path": "base", "num_train_epochs": "epochs", "train_file": "train_data",
    "max_seq_length": "max_length",
    "gradient_checkpointing": "grad_checkpoint", "max_grad_norm": "grad_clip", "lr_scheduler_type": "schedule",
}  # fmt: skip


def _nearest(name: str, known, prefix: str = "") -> str:
    theirs = difflib.get_close_matches(str(name), [n for n in ELSEWHERE if ELSEWHERE[n] in known], n=1, cutoff=0.8)
    close = [ELSEWHERE[n] for n in theirs] or difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""


def _weights(text: str) -> bool:
    """Whether a text is positive numbers between commas."""
    try:
        return all(0 < float(part) < float("inf") for part in text.split(","))
    except ValueError:
        return False


def check_texts(given: set[str], pairs: bool) -> None:
    """Raise UserError for flags given by hand that have no effect on pairs, or on documents, now that it is known."""
    idle = sorted(given & ({"cross_document"} if pairs else {"chat", "system"}))
    if idle:
        kind = "pairs of prompt and response" if pairs else "documents"
        raise UserError(" | ".join(f"--{n} has no effect: the training data are {kind}" for n in idle))


def preset_note(given: set[str], argv: list[str]) -> str:
    """A warning where another base meets the tiny preset's settings, or an empty string."""
    if "base" not in given or any(a.split("=")[0] == "--cfg" for a in argv):
        return ""
    return "note: without --cfg the settings are the tiny preset's, made for tiny/base; for others see --help's presets"


def own_data(cfg, given: set[str]):
    """What follows from flags given by hand: with a train_data of the user's own, the preset's validation and test
    files are not theirs and dropped; a task takes its first metric, and a regression drops settings of classes.
    """
    if isinstance(cfg, CptConfig):
        return replace(cfg, dataset="") if "train_data" in given and "dataset" not in given else cfg
    if "task" in given and "metric" not in given and cfg.metric not in METRICS.get(cfg.task, (cfg.metric,)):
        cfg = replace(cfg, metric=METRICS[cfg.task][0])
    drop = {"regression": OF_CLASSES, "multi_label": {"class_weights": "none"}}.get(cfg.task, {})
    if "task" in given:
        cfg = replace(cfg, **{name: plain for name, plain in drop.items() if name not in given})
    if "folds" in given and "val_data" not in given:
        cfg = replace(cfg, val_data="")
    if "train_data" not in given:
        return cfg
    return replace(cfg, **{name: "" for name in ("val_data", "test_data") if name not in given})


def dataset_name(cfg) -> str:
    """The name of the run folder: `dataset`, or that of the training file, or of its folder where it says nothing."""
    path = Path(cfg.train_data.split(",")[0])
    names = [path.name.split(".")[0], path.parent.name, path.parent.parent.name]
    return cfg.dataset or next((n for n in names if n and n not in ("train", "training", "data", "dataset")), "data")


def members(cfg: TrainConfig) -> dict[str, TrainConfig]:
    """The runs that a config asks for: one for each seed and fold, by the name of its folder; "" for a single run."""
    folds = [str(i) for i in range(cfg.folds)] if cfg.fold == "all" else []
    if not folds and not cfg.seeds:
        return {"": cfg}
    found, split = {}, cfg.seed if cfg.split_seed < 0 else cfg.split_seed
    for seed in cfg.seeds or (str(cfg.seed),):
        for fold in folds or [cfg.fold]:
            name = "_".join([f"seed_{seed}"] * bool(cfg.seeds) + [f"fold_{fold}"] * bool(folds))
            found[name] = replace(cfg, seed=int(seed), seeds=(), fold=fold, split_seed=split)
    return found


def resumed(cfg, given: set[str], run: Path):
    """The config that a run to be resumed began with. Raises UserError for flags given by hand that contradict it."""
    saved = read_config(type(cfg), run)
    free = {"resume", "dry_run", "outputs", "keep", "export", "export_dtype", "time_limit"} & set(vars(cfg))
    differ = [n for n in sorted(given - free) if getattr(cfg, n) != getattr(saved, n)]
    if differ:
        facts = ", ".join(f"--{n} {getattr(cfg, n)} (the run has {getattr(saved, n)})" for n in differ)
        raise UserError(f"--resume {run}: a run goes on as it began, but {facts}; leave these flags out")
    return replace(saved, **{n: getattr(cfg, n) for n in free})


def to_json(cfg) -> str:
    """The resolved config as it is stored in a run."""
    return json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"


if __name__ == "__main__":
    for title, cls, presets in (
        ("train.py", TrainConfig, TRAIN_PRESETS),
        ("infer.py", InferConfig, {}),
        ("cpt.py", CptConfig, CPT_PRESETS),
        ("report.py", ReportConfig, {}),
    ):
        print(f"== {title}: {inspect.getdoc(cls)}\n{describe(cls, presets)}\n")
