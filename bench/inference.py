"""Scoring speed: our runs against transformers' pipeline, a loop over sorted batches, and one-at-a-time generation.

    python bench/inference.py                                 # three bases, fp32 and bf16, all cores: an hour or two
    python bench/inference.py --bases tiny --dtypes fp32      # minutes
    python bench/inference.py --quick                         # a smoke test, a minute or two

Needs `pip install peft accelerate`. train.py first trains two adapters for two steps, which all sides then load: one
under a linear head, one under label words. Each side scores the same texts in a process of its own, and all alternate
in every round; ratios are taken within a round. The clock sees tokenization and scoring, but no loading and no warm-up.

ours             load_run(run).predict(texts), a linear head
pipeline         pipeline("text-classification") with batches of 16
sorted           a loop over batches of 16 rows sorted by length, padded to the longest
ours_words       load_run(run).predict(texts), label words: the LM head's rows of the answer words
generate         model.generate for one new token, one row at a time; the answer words' logits are read from its scores

The logits of all sides are compared with ours of the same head, and must be equal up to a tolerance. Rows that are
longer than max_length are left out, so that nothing is truncated. The adapter is live on all sides, with --merge it is
merged. bf16 is autocast on all sides: over fp32 weights for the peers, while ours stores frozen weights in bf16.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import measure

HEADS = {  # the template of each head, and its sides, ours first
    "linear": ("{Question}", ("ours", "pipeline", "sorted")),
    "label_words": ("{Question}\nTopic:\n", ("ours_words", "generate")),
}
SIDES = tuple(side for _, sides in HEADS.values() for side in sides)
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}  # of the largest logit
BATCH = 16
ABOUT = """Scoring of {count} rows of at most {max_length} tokens, LoRA r 16 on q k v o ({how}).
Share: FLOPs of valid tokens / those of torch.nn.functional.linear at the base's shapes in the same dtype, measured
between the rounds. FLOPs: 2 x parameters of the layers x tokens, plus attention (estimates.training_flops); padding,
LoRA and LM heads do not count."""


def main() -> None:
    options = measure.options_of(__doc__, SIDES, {"count": 24, "max_length": 64}, add_options)
    measure.need("peft", "accelerate")
    lines, results, notes = [], {}, []
    for base in options.bases:
        with tempfile.TemporaryDirectory(prefix="lasttoken_bench_") as folder:
            sizes = {name: getattr(options, name) for name in ("rows", "count", "max_length")}
            found = measure.job(options.threads, "prepare", name=base, folder=folder, **sizes)
            for dtype in options.dtypes:
                for head, (_, sides) in HEADS.items():
                    sides = tuple(side for side in sides if side in options.sides)
                    if not sides:
                        continue
                    tokens = found[head]["tokens"] // options.count * BATCH
                    run = partial(run_side, options, folder, dtype)
                    rounds = measure.alternate(options, sides, run, found[head], tokens, dtype)
                    results[f"{base} {dtype} {head}"] = rounds
                    lines += measure.table_rows(base, dtype, rounds)
                    notes.append(measure.products_note(f"{base}, {head}", dtype, rounds))
                    notes += equal_logits(options, folder, base, dtype, sides)
        notes.append(f"{base}: {measure.BASES[base]}")
    how = "merged" if options.merge else "live"
    measure.report(options, ABOUT.format(**vars(options), how=how), lines, results, notes)


def add_options(parser) -> None:
    parser.add_argument("--count", type=int, default=128, help="rows to score")
    parser.add_argument("--max_length", type=int, default=512, help="most tokens of a row")
    parser.add_argument("--merge", action="store_true", help="merge the adapter into the base before scoring")


def run_side(options, folder: str, dtype: str, side: str) -> dict:
    return measure.job(options.threads, "score", side=side, folder=folder, dtype=dtype, merge=options.merge)


# ---- one base, two adapters, the same rows --------------------------------------------------------------------------


def prepare(name: str, folder: str, rows: str, count: int, max_length: int) -> dict:
    """Make the base, train the two adapters, and write the texts to score: HEAD.json for each head."""
    import numpy as np

    base = measure.make_base(name, f"{folder}/base")
    source = measure.read_rows(rows)
    labels = sorted({row["label"] for row in source})
    longest = measure.tokenized(base, [HEADS["label_words"][0].format(**row) for row in source], max_length + 1).lengths
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(longest <= max_length))[:count]
    found = {}
    for head, (template, _) in HEADS.items():
        train_adapter(base, head, folder, rows, labels, max_length)
        texts = [template.format(**source[i]) for i in chosen]
        lengths = measure.tokenized(base, texts, max_length).lengths
        kept = {"questions": [source[i]["Question"] for i in chosen], "texts": texts, "lengths": lengths.tolist()}
        (Path(folder) / f"{head}.json").write_text(json.dumps({**kept, "max_length": max_length}))
        work = measure.work(base, len(labels), lengths, None)
        found[head] = {"tokens": int(lengths.sum()), **work}
    return found


def train_adapter(base: str, head: str, folder: str, rows: str, labels: list[str], max_length: int) -> None:
    """Two steps of train.py, whose run is folder/HEAD."""
    flags = {
        "base": base,
        "train_data": rows,
        "val_size": 16,
        "label_names": ",".join(labels),
        "text": HEADS[head][0],
        "head": head,
        "max_steps": 2,
        "batch_size": 4,
        "max_length": max_length,
        "lr": 1e-3,
        "audit": "none",
        "outputs": f"{folder}/outputs_{head}",
    }
    threads = int(os.environ["OMP_NUM_THREADS"])
    command = measure.command_of("train.py", flags)
    measure.process(command, threads, allowed=(0, 5))  # 5: random weights may score every row alike
    (run,) = Path(flags["outputs"]).rglob("result.json")
    (Path(folder) / head).symlink_to(run.parent)


# ---- the sides ------------------------------------------------------------------------------------------------------


def score(side: str, folder: str, dtype: str, merge: bool) -> dict:
    """Score the texts, and keep the logits beside them."""
    import numpy as np
    import torch

    head = next(head for head, (_, sides) in HEADS.items() if side in sides)
    rows = json.loads((Path(folder) / f"{head}.json").read_text())
    run = Path(folder) / head
    makers = {"pipeline": by_pipeline, "sorted": by_sorted_batches, "generate": by_generation}
    maker = makers.get(side, by_run)
    logits_of, texts, computed = maker(run.resolve(), rows, dtype, merge)

    logits_of(texts[:BATCH])
    started = time.perf_counter()
    with torch.inference_mode(), measure.autocast(dtype if maker is not by_run else "fp32"):
        logits = logits_of(texts)
    seconds = time.perf_counter() - started
    np.save(Path(folder) / f"{side}_{dtype}.npy", np.array(logits, dtype=np.float32))
    return {
        "examples": len(texts),
        "tokens": sum(rows["lengths"]),
        "computed": computed,
        "seconds": seconds,
        "peak_gb": measure.peak_gb(),
    }


def by_run(run: Path, rows: dict, dtype: str, merge: bool):
    """Each of these: (texts -> logits, the texts, tokens that are computed for them)."""
    import lora
    import trained

    loaded = trained.load_run(run, precision=dtype)
    if merge:
        lora.merge(loaded.model)
    logits_of = lambda texts: [answer["logits"] for answer in loaded.predict(texts)]  # noqa: E731
    return logits_of, rows["questions"], sum(rows["lengths"])


def peer_model(run: Path, kind: str, merge: bool, **options):
    """peft's model of the run's best save, and its tokenizer."""
    import peft
    import torch
    from transformers import AutoTokenizer

    best = run / "best"
    model = getattr(peft, kind).from_pretrained(best, dtype=torch.float32, **options).eval()
    return (model.merge_and_unload() if merge else model), AutoTokenizer.from_pretrained(best)


def sequence_classifier(run: Path, merge: bool):
    labels = json.loads((run / "labels.json").read_text())["values"]
    return peer_model(run, "AutoPeftModelForSequenceClassification", merge, num_labels=len(labels))


def by_pipeline(run: Path, rows: dict, dtype: str, merge: bool):
    from transformers import pipeline

    model, tokenizer = sequence_classifier(run, merge)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, batch_size=BATCH, device="cpu")
    columns = model.config.label2id

    def logits_of(texts):
        answers = classify(texts, top_k=None, function_to_apply="none")
        ordered = [sorted(answer, key=lambda one: columns[one["label"]]) for answer in answers]
        return [[one["score"] for one in answer] for answer in ordered]

    return logits_of, rows["texts"], padded(rows["lengths"])


def by_sorted_batches(run: Path, rows: dict, dtype: str, merge: bool):
    model, tokenizer = sequence_classifier(run, merge)

    def logits_of(texts):
        ids = tokenizer(texts)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        logits = [None] * len(ids)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
            for i, row in zip(chosen, model(**batch).logits.float().tolist(), strict=True):
                logits[i] = row
        return logits

    return logits_of, rows["texts"], padded(sorted(rows["lengths"]))


def by_generation(run: Path, rows: dict, dtype: str, merge: bool):
    """The answer words are the label names, and follow the template's line break."""
    import data

    model, tokenizer = peer_model(run, "AutoPeftModelForCausalLM", merge)
    labels = json.loads((run / "labels.json").read_text())["names"]
    words = [token for (token,) in data.label_word_ids(tokenizer, HEADS["label_words"][0], tuple(labels))]

    def logits_of(texts):
        logits = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")
            options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
            out = model.generate(**ids, **options, output_logits=True, return_dict_in_generate=True)
            logits.append(out.logits[0][0, words].float().tolist())
        return logits

    return logits_of, rows["texts"], sum(rows["lengths"])


def padded(lengths: list[int]) -> int:
    """Tokens of batches of consecutive rows, each padded to its longest."""
    batches = [lengths[i : i + BATCH] for i in range(0, len(lengths), BATCH)]
    return sum(len(batch) * max(batch) for batch in batches)


# ---- equal logits ---------------------------------------------------------------------------------------------------


def equal_logits(options, folder: str, base: str, dtype: str, sides: tuple) -> list[str]:
    """A note for each peer: how far its logits are from ours. Raises AssertionError where that is too far."""
    notes = []
    for side in sides[1:]:
        found = measure.job(options.threads, "differences", folder=folder, ours=sides[0], side=side, dtype=dtype)
        largest, most = found["largest"], TOLERANCE[dtype] * found["scale"]
        if not largest <= most:
            raise AssertionError(f"{base} {dtype}: logits of {side} differ from ours by {largest:.2g}, not {most:.2g}")
        notes.append(
            f"{base} {dtype}: logits of {side} and {sides[0]} differ by at most {largest:.1e} (allowed {most:.1e}: "
            f"{TOLERANCE[dtype]:g} of the largest), {found['flips']} of {options.count} predictions differ"
        )
    return notes


def differences(folder: str, ours: str, side: str, dtype: str) -> dict:
    import numpy as np

    own, other = (np.load(Path(folder) / f"{name}_{dtype}.npy") for name in (ours, side))
    flips = int((own.argmax(axis=1) != other.argmax(axis=1)).sum())
    return {"largest": float(abs(own - other).max()), "scale": float(abs(own).max()), "flips": flips}


if __name__ == "__main__" and not measure.answer((prepare, score, differences, measure.probe)):
    sys.exit(main())
