"""Configs: one flat frozen dataclass per entry point, presets as functions, and the command line. Imports no torch.

    python configs.py                      # every preset and field at once
    python train.py --cfg qwen3b --lr 1e-4 --train_data my.csv
    python train.py --cfg outputs/qwen3b/math/run_0/config.json     # a past run's settings again

The comment behind a field is its help text: it is printed by --help, so it is the one place that describes the field.
"""

import inspect
from dataclasses import dataclass, replace
from pathlib import Path

import cli

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


if __name__ == "__main__":
    for title, cls, presets in (
        ("train.py", TrainConfig, TRAIN_PRESETS),
        ("infer.py", InferConfig, {}),
        ("cpt.py", CptConfig, CPT_PRESETS),
        ("report.py", ReportConfig, {}),
    ):
        print(f"== {title}: {inspect.getdoc(cls)}\n{cli.describe(cls, presets)}\n")
