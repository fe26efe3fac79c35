"""Presets: each is a function that returns complete settings, and its name is what `--cfg` takes.

A preset states only what differs from the defaults of configs.py. To add one, write a function and list it at the end.
max_tokens is what 15 GB hold without computing activations again, by arithmetic; --max_tokens auto tries it instead.
"""

from dataclasses import replace

from configs import ALL_PROJECTIONS, CptConfig, TrainConfig

# fmt: off
DATASET = dict(train_data="dataset/train.csv", test_data="dataset/test.csv", micro_batches=2)
LLAMA8B = dict(  # what the two published recipes of the verifier share
    base="meta-llama/Llama-3.1-8B", max_length=2048, eval_rows=500, lora_dropout=0.0, targets=("all-linear",),
    quant="nf4", lr=1e-4, warmup_steps=100, batch_size=8, micro_batches=2, optimizer="paged_adamw",
    grad_checkpoint=True, eval_every=500, save_every=500,
)


def tiny() -> TrainConfig:
    """The embedded base and problems: about a minute on two CPU cores."""
    return TrainConfig(
        train_data="tiny/data/train.csv", val_data="tiny/data/val.csv", test_data="tiny/data/test.csv",
        targets=("all-linear",), lora_dropout=0.05, lr=2e-3, head_lr=4e-3, label_smoothing=0.1, warmup_ratio=0.1,
    )


def qwen05b() -> TrainConfig:
    """Qwen2.5-0.5B on the math problems, on two T4s: the published recipe of the 3B, at the smallest size."""
    return TrainConfig(
        **DATASET, base="Qwen/Qwen2.5-0.5B", bias="all", head_dropout=0.5, epochs=5, label_smoothing=0.1,
        weight_decay=0.001, lr=5e-5, head_lr=1e-4,
    )


def qwen15b() -> TrainConfig:
    """Qwen2.5-1.5B with the same recipe."""
    return replace(qwen05b(), base="Qwen/Qwen2.5-1.5B", max_tokens=2048)


def qwen3b() -> TrainConfig:
    """Qwen2.5-3B with the same recipe: published micro-F1 0.87 on the math problems, where encoders reach 0.85."""
    return replace(qwen05b(), base="Qwen/Qwen2.5-3B", max_tokens=1024)


def qwen32b() -> TrainConfig:
    """Qwen2.5-32B with the same recipe in nf4: needs 24 GB or more on each GPU."""
    return replace(qwen05b(), base="Qwen/Qwen2.5-32B", quant="nf4", grad_checkpoint=True, max_tokens=1536)


def llama1b() -> TrainConfig:
    """Llama-3.2-1B with the same recipe."""
    return replace(qwen15b(), base="meta-llama/Llama-3.2-1B")


def mathbert() -> TrainConfig:
    """MathBERT, the whole encoder trained: published validation micro-F1 0.84 on the math problems."""
    return TrainConfig(**DATASET, base="tbs17/MathBERT", pooling="cls", rank=0, lr=2e-5, epochs=5)


def modernbert_base() -> TrainConfig:
    """ModernBERT base with the same recipe: published 0.84."""
    return replace(mathbert(), base="answerdotai/ModernBERT-base", pooling="mean")


def modernbert_large() -> TrainConfig:
    """ModernBERT large with the same recipe: published 0.85."""
    return replace(modernbert_base(), base="answerdotai/ModernBERT-large")


def deberta_base() -> TrainConfig:
    """DeBERTa-v3 base, one-output regression of rule violations: published AUC 0.904."""
    return replace(
        mathbert(), base="microsoft/deberta-v3-base", text="Rule: {rule}\nPost: {body}",
        label_column="rule_violation", id_column="row_id", task="regression", metric="roc_auc", epochs=3,
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
        **LLAMA8B, train_data="dataset/slices/slice_0.csv", val_data="dataset/slices/validation.csv",
        test_data="dataset/test.csv", prompt="verify_plain", label_column="is_correct", head="label_words", alpha=16.0,
        metric="accuracy",
    )


def qwen15b_rules() -> TrainConfig:
    """Qwen2.5-1.5B-Instruct on posts and rules, ranked by AUC: r 16, alpha 32, dropout 0.05 on q and v."""
    return TrainConfig(
        **DATASET, base="Qwen/Qwen2.5-1.5B-Instruct", prompt="rules_structured", label_column="rule_violation",
        id_column="row_id", group_column="body", by_column="rule", head="label_words", max_length=1024,
        lora_dropout=0.05, targets=("q_proj", "v_proj"), epochs=2, warmup_ratio=0.05, max_tokens=2048,
        metric="roc_auc",
    )


def llama1b_multilabel() -> TrainConfig:
    """Llama-3.2-1B with several labels a text: published micro-F1 0.824, macro-F1 0.741 (means of seeds 1, 3, 4, 5)."""
    return TrainConfig(
        base="meta-llama/Llama-3.2-1B", train_data="dataset/train.jsonl", text="{text}", label_column="labels",
        task="multi_label", rank=2, alpha=2.0, lora_dropout=0.05, targets=ALL_PROJECTIONS, quant="nf4",
        max_length=1024, batch_size=32, epochs=20, patience=2, optimizer="adamw8bit", keep=0, seed=1,
    )


def cpt_tiny() -> CptConfig:
    """For tiny/base on a CPU; runs/tiny_base.sh makes that base with it, from random weights."""
    return CptConfig(
        train_data="outputs/tiny_corpus.jsonl", dataset="tiny_corpus", epochs=3, eval_every=300, save_every=100,
        precision="bf16",
    )


def qwen_math15b() -> CptConfig:
    """Qwen2.5-Math-1.5B on the sources of papers: the published LaTeX recipe, its embedding and LM head named right."""
    return CptConfig(
        base="Qwen/Qwen2.5-Math-1.5B", train_data="dataset/papers", max_length=2048, rank=8,
        targets=ALL_PROJECTIONS + ("embed_tokens", "lm_head"), lr=1e-4, embed_lr=1e-5, weight_decay=0.01, epochs=3,
        batch_size=16, max_tokens=2048, micro_batches=2, grad_checkpoint=True,
    )


def llama8b_sft() -> CptConfig:
    """Llama-3.1-8B in nf4 on prompts and responses: the published recipe of the verifier, responses learned."""
    return CptConfig(
        **LLAMA8B, train_data="dataset/train.jsonl", val_size=5000.0, rank=16, warmup_ratio=0.0, weight_decay=0.01,
        epochs=3,
    )
# fmt: on


TRAIN_MAKERS = (tiny, qwen05b, qwen15b, qwen3b, qwen32b, llama1b, mathbert, modernbert_base, modernbert_large)
TRAIN_MAKERS += (deberta_base, deberta_large, roberta_large, llama8b_verify, qwen15b_rules, llama1b_multilabel)
TRAIN_PRESETS = {make.__name__: make for make in TRAIN_MAKERS}
CPT_PRESETS = {"tiny": cpt_tiny, "qwen_math15b": qwen_math15b, "llama8b_sft": llama8b_sft}
