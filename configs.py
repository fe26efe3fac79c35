"""Settings: a frozen dataclass for train.py, cpt.py and infer.py; the other commands have theirs in their own file.

    python configs.py                      # every preset, and every field with its default
    python train.py --cfg qwen3b --lr 1e-4 --train_data my.csv
    python train.py --cfg outputs/qwen3b/math/run_0/config.json     # the settings of an earlier run

The comment behind a field is its help text, printed by --help. A line such as `# model` starts a topic of the help.
presets.py has the named settings, checks.py says what does not go together, cli.py reads the command line.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NewType

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_PROJECTIONS = ATTENTION + ("gate_proj", "up_proj", "down_proj")
Several = tuple[str, ...]  # values of one field, separated by commas or spaces
OrAuto = NewType("OrAuto", int)  # a whole number, or auto, which is stored as 0


@dataclass(frozen=True)
class Shared:
    """The settings that training a classifier (train.py) and continued pretraining (cpt.py) have in common."""

    # data
    base: str = "tiny/base"  # hub name or local folder of the base model
    train_data: str = ""  # training rows: CSV, TSV or JSONL (also .gz), Parquet if pyarrow is installed
    dataset: str = ""  # name of the run folder under outputs/<base>/; default: taken from train_data
    text: str = "{Question}"  # format template over the columns of a row
    val_size: float = 0.1  # held-out validation rows: a fraction below 1, or a count
    eval_rows: int = 0  # validation rows of a periodic evaluation, 0 for all; the final one always uses all
    max_length: int = 512  # maximum tokens per row; the end of the longest field is truncated, and reported

    # model
    rank: int = 16  # LoRA rank; 0: no adapter, the base itself is trained
    alpha: float = 32.0  # LoRA alpha: the update is scaled by alpha / rank
    lora_dropout: float = 0.1  # dropout on the input of each adapter
    targets: Several = ATTENTION  # modules that get an adapter, by the end of their name, or all-linear
    quant: str = "none"  # with an adapter: nf4 stores the frozen linears of the layers in 4 bits; none

    # optimization
    lr: float = 2e-4  # peak learning rate of the adapters, or of the base
    weight_decay: float = 0.01  # AdamW weight decay, on matrices only (never on biases and norms)
    epochs: int = 3  # passes over the training rows
    max_steps: int = 0  # stop after this many optimizer steps, 0 for no limit
    batch_size: int = 16  # examples per optimizer step, over all ranks
    max_tokens: OrAuto = 4096  # token budget of one micro-batch; auto: what memory holds, tried before the first step
    micro_batches: int = 1  # minimum number of micro-batches per step: set it to the number of GPUs
    schedule: str = "cosine"  # cosine, linear or constant, after a linear warm-up
    warmup_steps: int = 0  # warm-up in optimizer steps; replaces warmup_ratio
    warmup_ratio: float = 0.0  # warm-up as a fraction of all steps
    grad_clip: float = 1.0  # maximum gradient norm, 0 for no clipping
    optimizer: str = "adamw"  # adamw; from bitsandbytes adamw8bit, paged_adamw, paged_adamw8bit (paging: GPUs only)
    precision: str = "auto"  # fp32, fp16, bf16, or auto: by the GPU's capability; on a CPU bf16 where it is much faster
    grad_checkpoint: bool = False  # recompute activations in the backward pass: less memory, about a third slower

    # run
    eval_every: int = 0  # steps between evaluations, 0: at the end of each epoch
    save_every: int = 0  # steps between saves of last/, 0: after each evaluation
    keep: int = 1  # earlier saves of last/ and best/ that are kept as a fallback
    seed: int = 0  # seed of the split, the batch plan, the initial weights and every dropout mask
    report: Several = ()  # also log to tensorboard, wandb or both (install them first), beside metrics.jsonl
    outputs: str = "outputs"  # folder of all runs
    resume: str = ""  # auto (the newest unfinished run of this base and dataset) or a run folder


@dataclass(frozen=True)
class TrainConfig(Shared):
    """Fine-tuning of a decoder, or of an encoder to compare with, as a text classifier."""

    FIRST = """base train_data val_data test_data text label_column id_column task max_length rank targets quant lr
        epochs batch_size max_tokens metric seed resume dry_run"""

    # data
    val_data: str = ""  # validation rows; default: val_size of the training rows, stratified by label
    test_data: str = ""  # rows that infer.py predicts by default; labels are optional there
    prompt: str = ""  # instead of text: a named prompt (prompts/NAME.txt) or a file of your own, rendered as a chat
    kept: Several = ()  # fields of the template that are truncated only when the others are used up
    budgets: Several = ()  # maximum tokens of a field, as body=300; default: only max_length truncates
    label_column: str = "label"  # column of the label; multi_label: a JSON list, or labels separated by label_delimiter
    label_columns: Several = ()  # multi_label: one column of 0 and 1 for each label, instead of label_column
    label_delimiter: str = "|"  # multi_label: separator of the labels in label_column
    label_names: Several = ()  # class names in order, as a,"b, c"; default: the labels of the training rows
    label_words: Several = ()  # verbalizer for each class (aliases separated by |); default: the class names
    id_column: str = "id"  # id column; default: the row index
    group_column: str = ""  # rows with the same value here always stay together in the hold-out and the folds
    folds: int = 0  # with fold: the number of cross-validation folds; folds.py trains all of them
    fold: int = -1  # with folds: the fold that this run holds out, 0 to folds - 1
    by_column: str = ""  # also report metrics for each value of this column
    audit: str = "near"  # report duplicates, conflicts and leaks: near, equal (exact ones only) or none
    drop_conflicts: bool = False  # drop training rows whose text also occurs with another label

    # model
    task: str = "single_label"  # single_label, multi_label (any number of labels per row), or regression (one output)
    head: str = "linear"  # linear: the family's classification head; label_words: the LM head's rows of the verbalizers
    pooling: str = "last"  # the state that the head reads: last token, mean over tokens, cls (first token), attention
    bias: str = "none"  # biases trained with LoRA: none, lora_only (of adapted linears) or all
    rslora: bool = False  # scale by alpha / sqrt(rank) instead of alpha / rank
    train_layers: int = -1  # with rank 0: number of last layers to train, 0 for the head only, -1 for the whole base
    head_dropout: float = 0.1  # dropout before the head
    init_from: str = ""  # run folder: start from its best adapter and head, such as that of the previous slice

    # optimization
    head_lr: float = 0.0  # peak learning rate of the head; 0: the same as lr
    label_smoothing: float = 0.0  # share of the target mass that is spread over all classes
    class_weights: str = "none"  # none, balanced (inverse frequency), effective (number), or one number for each class
    pos_weight: str = "none"  # multi_label, weight of positives: none, balanced (negatives / positives), or numbers
    soft_share: float = 1.0  # with probability_<label> columns: weight of their soft targets against the row's label
    soft_temperature: float = 1.0  # temperature of the soft targets and of the logits they are compared with

    # run
    metric: str = "micro_f1"  # selects best/; default: the task's first metric (micro_f1, or mse for regression)
    thresholds: str = "auto"  # fitted on validation rows: global, per_class, none; auto: for multi_label, by its metric
    patience: int = 0  # stop after this many evaluations without improvement, 0 for never
    split_seed: int = -1  # seed of the hold-out and the folds; -1: seed
    time_limit: str = ""  # finish the run within this time: 8.5h, 90m, 60s; default: no limit
    dry_run: bool = False  # print the plan (rows, steps, estimates of memory and time) and stop


@dataclass(frozen=True)
class CptConfig(Shared):
    """Next-token training of a base on plain text or on answers: the whole base, or an adapter on it."""

    FIRST = """base train_data val_data guard_data text chat max_length rank targets quant lr embed_lr epochs batch_size
        max_tokens val_size samples seed export resume"""

    # data
    train_data: str = ""  # folders of .tex .txt .md .jsonl (.gz too), or such files, comma separated
    text: str = "{text}"  # format template of a document, or of a pair's prompt ({text} means {prompt} there)
    val_data: str = ""  # held-out text, as train_data; default: val_size of the training text
    guard_data: str = ""  # general text on which forgetting is measured, as train_data; never trained on
    chat: str = "auto"  # for pairs: yes, no, or auto (use the tokenizer's chat template if it has one)
    system: str = "You are a helpful assistant."  # for pairs in a chat: system turn of pairs without one
    max_length: int = 512  # tokens of a segment: longer documents are split into several, longer pairs are truncated
    cross_document: bool = False  # cut segments from the stream of all documents: a token then sees the previous one
    val_size: float = 0.02  # held out: a fraction below 1 of the tokens (of pairs, for pairs), or a count of documents
    eval_rows: int = 0  # held-out documents or pairs of a periodic evaluation, 0 for all; first and last use all
    samples: int = 2  # held-out texts, or prompts, that are completed at each evaluation, 0 for none

    # model
    random_init: bool = False  # draw fresh weights from seed: base then needs only config.json and a tokenizer
    rank: int = 0  # LoRA rank; 0: no adapter, the whole base is trained
    alpha: float = 16.0  # LoRA alpha: the update is scaled by alpha / rank
    lora_dropout: float = 0.05  # dropout on the input of each adapter
    targets: Several = ALL_PROJECTIONS  # modules that get an adapter, embed_tokens and lm_head too
    modules_to_save: Several = ()  # with an adapter: modules trained whole, such as embed_tokens,lm_head

    # optimization
    lr: float = 1e-3  # peak learning rate
    embed_lr: float = 0.0  # peak learning rate of the embedding and the LM head; 0: the same as lr
    weight_decay: float = 0.1  # AdamW weight decay, on matrices only
    epochs: int = 1  # passes over the documents
    batch_size: int = 64  # segments per optimizer step, over all ranks
    max_tokens: OrAuto = 8192  # token budget of one micro-batch; auto: what memory holds, tried before the first step
    warmup_ratio: float = 0.02  # warm-up as a fraction of all steps

    # run
    export: str = ""  # folder for the trained base at the end, an adapter merged: config, weights, tokenizer
    export_dtype: str = "bf16"  # dtype of the exported weights: bf16, fp16 or fp32


@dataclass(frozen=True)
class InferConfig:
    """Prediction with a finished run, or with a base and a public adapter."""

    FIRST = "runs input output submission base adapter text head label_names export"

    # what predicts
    runs: Several = ()  # run folder, or a folder of folds and seeds; default: the newest finished run
    base: str = ""  # instead of a run: hub name or folder; with runs: where its base is now; default: the adapter's
    adapter: str = ""  # a PEFT LoRA adapter for that base, folder or hub name
    text: str = "{Question}"  # for base and adapter: format template over the columns of a row
    prompt: str = ""  # for base and adapter, instead of text: a named prompt, as in train.py
    label_column: str = "label"  # for base and adapter: column of the label, if there is one
    label_names: Several = ()  # for base and adapter: class names in the order of the head's outputs
    label_words: Several = ()  # for base and adapter: as in train.py
    head: str = "linear"  # for base and adapter: linear, or label_words to score verbalizers without training
    quant: str = "none"  # for base and adapter: none or nf4
    max_length: int = 512  # for base and adapter: maximum tokens per row

    # input and output
    input: str = ""  # rows to predict; default: the run's own test_data
    output: str = "submission.csv"  # file of the predictions, .csv or .jsonl
    submission: str = "id,label"  # names of the two columns id and label; empty: id, prediction and all probabilities
    id_column: str = ""  # id column; default: the first of submission, or the run's, where input has it; else row index
    answer: str = "auto"  # in a submission: label, probability (of the second of two classes), auto: by the metric
    overwrite: bool = False  # replace an existing output; otherwise it is kept beside it as NAME.previous
    by_column: str = ""  # also report metrics for each value of this column
    threshold: float = 0.0  # probability that decides instead of the thresholds fitted with the run; 0: those
    export: str = ""  # write a plain transformers model, the adapter merged, into this folder, and predict nothing

    # run
    max_tokens: int = 8192  # token budget of one micro-batch
    limit: int = 0  # only the first rows, 0 for all
    time_limit: str = ""  # as in train.py: rows not reached in time get the class frequencies of the training rows
    merge: bool = False  # fold the adapter into the base before scoring: faster, equal to rounding
    precision: str = "auto"  # as in train.py
    force: bool = False  # write the output even if the scores are degenerate
    outputs: str = "outputs"  # folder of all runs


def dataset_name(cfg) -> str:
    """The name of the run folder: `dataset`, else that of the training file, else of its folder if that says more."""
    path = Path(cfg.train_data.split(",")[0])
    names = [path.name.split(".")[0], path.parent.name, path.parent.parent.name]
    telling = [name for name in names if name not in ("", "train", "training", "data", "dataset")]
    return cfg.dataset or [*telling, "data"][0]


if __name__ == "__main__":
    import cli
    from errors import print_anything
    from presets import CPT_PRESETS, TRAIN_PRESETS

    print_anything()
    for config, presets in ((TrainConfig, TRAIN_PRESETS), (InferConfig, {}), (CptConfig, CPT_PRESETS)):
        print(f"== {config.__name__[:-6].lower()}.py: {config.__doc__}\n{cli.describe(config, presets, ['all'])}\n")
