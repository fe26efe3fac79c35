"""Next-token training of a base on documents, or on the answers to prompts: the whole base, or an adapter on it.

    python cpt.py --cfg tiny --base tiny/base --train_data outputs/tiny_corpus.jsonl --export tiny/new_base
    python cpt.py --cfg qwen_math15b --train_data papers/ --guard_data wiki.jsonl --export adapted
    torchrun --nproc_per_node=2 cpt.py --cfg llama8b_sft --train_data pairs.jsonl

A LaTeX project, a .txt or .md file, or a line of JSONL is a document; documents end with EOS, longer ones are cut into
segments of max_length tokens, and no token sees another document. Lines of JSONL with prompt and response, or with
messages, are pairs: only the responses are learned. `python cpt.py --help` lists every field.
"""

import cli
from configs import CptConfig
from presets import CPT_PRESETS

if __name__ == "__main__":  # help and typos are answered before torch is loaded, which takes seconds
    cli.early(CptConfig, CPT_PRESETS, __doc__)

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import bases
import checks
import corpus
import data
import ddp
import evaluate
import faults
import holdout
import language
import locks
import loop
import lora
import memory
import model as models
import numerics
import optim
import run_folder
import seals
import trained
from errors import UserError, few, warning
from packed import pack


@locks.released()
def main(argv: list[str]) -> dict:
    # ---- settings, ranks, the run to resume -------------------------------------------------------------------------
    cfg, given, world, run = loop.begin(CptConfig, CPT_PRESETS, argv, __doc__)
    say = partial(ddp.say, world)
    precision = loop.say_ranks(world, cfg)

    # ---- data -------------------------------------------------------------------------------------------------------
    # With random_init a base needs no weights, only its config and tokenizer.
    find = bases.find_base if cfg.random_init else bases.need_base
    tokenizer = bases.load_tokenizer(find(cfg.base))
    check_model(cfg, tokenizer)
    texts = load_texts(cfg, tokenizer, world)
    run_folder.same_rows(run, texts.digests())
    checks.check_texts(given, texts.pairs)

    # ---- model ------------------------------------------------------------------------------------------------------
    lm = new_language_model(cfg, world, precision)
    say(models.attention_note(world.device, lm.config, precision))
    if cfg.random_init:
        say(f"the weights of {cfg.base} are drawn from seed {cfg.seed}, not loaded")
    else:
        say(evaluate.weak_tokens(lm, tokenizer, texts.train))
    say(lora.trainable_table(lm))

    # ---- optimizer --------------------------------------------------------------------------------------------------
    # The embedding and the LM head may have a learning rate of their own.
    vocabulary = language.vocabulary_modules(lm)
    groups = optim.parameter_groups(lm.named_parameters(), cfg.lr, cfg.embed_lr, cfg.weight_decay, vocabulary)
    for group in groups:
        name = group["name"].replace("head", "embedding and LM head")
        say(f"{name}: {len(group['params'])} tensors, lr {group['lr']:g}, decay {group['weight_decay']:g}")
    optimizer = optim.adamw(groups, cfg.optimizer)
    facts = {"base": lm.base_fingerprint} if cfg.rank else {}
    job = loop.Job(cfg, world, lm, optimizer, precision, texts.train.lengths, texts.digests(), facts)

    # ---- resume, or a new run ---------------------------------------------------------------------------------------
    if run:
        loop.restore(job, run, partial(trained.read_save, model=lm))
    loss_of = partial(batch_loss, job, texts)
    memory.fit(job, loss_of)
    loop.say_plan(job)
    loop.open_run(job, run, partial(write_record, texts=texts))

    # ---- loop, end --------------------------------------------------------------------------------------------------
    write = partial(write_save, lm=lm, tokenizer=tokenizer)
    with loop.stoppable(job, write):
        fit(job, texts, loss_of, write)
    return finish(job, texts)


# ---- loop -----------------------------------------------------------------------------------------------------------


def batch_loss(job: loop.Job, texts: "Texts", rows: np.ndarray) -> torch.Tensor:
    """The next-token loss of a micro-batch, summed over its targets."""
    device = job.world.device
    batch = pack(texts.train, rows, device, predict=True)
    with numerics.autocast(device, job.precision):
        return language.next_token_loss(job.model, batch)


def fit(job: loop.Job, texts: "Texts", loss_of: Callable, write: Callable) -> None:
    """Step, log, evaluation, save, until the plan is done or a signal stops it."""
    state = job.state
    learned = texts.train.targets  # (N,) tokens to learn of each row
    if not state.evals:
        held_out(job, 0, texts.val, texts)
    for micro_batches in loop.steps(job):
        # step, log: the loss is a mean over the tokens to learn
        targets = float(learned[np.concatenate(micro_batches)].sum())
        loop.step(job, micro_batches, loss_of, targets)

        # evaluation: best/ holds the model with the lowest held-out loss so far
        if loop.due(job, job.eval_every):
            loss = held_out(job, state.step, texts.periodic, texts)
            if state.best is None or loss < state.best:
                state.best, state.best_step = loss, state.step
                loop.save(job.run / "best", job, write)

        # save: last/ holds all that the next step depends on
        loop.save_last(job, write)


def held_out(job: loop.Job, step: int, val: data.Tokens, texts: "Texts") -> float:
    """Evaluate on held-out and guard text, log and print it with a few completions; returns the held-out loss."""
    world = job.world
    options = world, job.precision, job.state.max_tokens
    scores = language.language_scores(job.model, val, *options)
    if texts.guard:
        general = language.language_scores(job.model, texts.guard, *options)
        scores |= {f"guard_{name}": value for name, value in general.items()}
    if not all(map(np.isfinite, scores.values())):
        raise faults.not_finite(job, [], f"step {step}: the held-out loss is not finite")
    job.state.evals.append({"step": step, "tokens": int(val.targets.sum()), "eval": scores})
    shown = [f"{name} {value:.4f}" for name, value in scores.items()]
    job.say(f"step {step}: {', '.join(shown)}")
    if world.rank == 0:
        samples = complete_samples(job, texts)
        loop.log(job, {"step": step, "eval": scores, "samples": samples})
        for prompt, completion in samples:
            job.say(f"sample: {prompt[-60:]!r} -> {completion!r}")
    loop.lap(job, "eval_seconds")
    return scores["loss"]


# ---- end ------------------------------------------------------------------------------------------------------------


def finish(job: loop.Job, texts: "Texts") -> dict:
    """Evaluate the best save on everything held out, export it, and write the results."""
    world, state, run, say = job.world, job.state, job.run, job.say
    ddp.barrier(world)  # rank 0 has written best/
    passed = state.best_step != state.step
    if passed:
        trained.read_save(run_folder.best_save(state, run, say), job.model)
        say(f"best held-out loss: step {state.best_step}; that save is kept and exported")
    if passed or texts.periodic is not texts.val:
        held_out(job, state.best_step, texts.val, texts)
    say(eval_table(state.evals))
    before = state.evals[0]["eval"]
    after = state.evals[-1]["eval"]
    if after["loss"] >= before["loss"]:
        say(warning("the held-out loss did not fall", "lower --lr, or train on more text"))
    result = {
        **loop.measured(job),
        "before": before,
        "metrics": after,
    }
    if world.rank == 0:
        if job.cfg.export:
            export(job.cfg, job.model, texts.tokenizer, run)
        loop.end(job, result)
    return result


def eval_table(evals: list[dict]) -> str:
    """Evaluations as a table: held-out and guard text, before, during and after."""
    names = [name for name in evals[0]["eval"] if not name.endswith("loss")]
    lines = ["    step      tokens" + "".join(f"  {name.replace('_', ' '):>20}" for name in names)]
    for line in evals:
        scores = "".join(f"  {line['eval'][name]:>20.4f}" for name in names)
        lines.append(f"{line['step']:>8}  {line['tokens']:>10,}{scores}")
    return "\n".join(lines)


# ---- data -----------------------------------------------------------------------------------------------------------


@dataclass
class Texts:
    """What a run trains on and what it is measured on, as rows of tokens."""

    train: data.Tokens
    val: data.Tokens
    periodic: data.Tokens  # of val, for evaluations on the way
    pairs: bool
    guard: data.Tokens | None  # general text, on which forgetting is measured
    samples: list[list[int]]  # beginnings of held-out documents, or prompts of pairs, to complete
    files: list[dict]  # what became of each file
    tokenizer: object

    def digests(self) -> dict[str, str]:
        """What a resumed run must see again, by its name in words."""
        parts = {"training": self.train, "held-out": self.val, "guard": self.guard}
        return {f"the {name} texts or their tokens": part.digest() for name, part in parts.items() if part}


def load_texts(cfg: CptConfig, tokenizer, world: ddp.World) -> Texts:
    """The corpus, split by document, and the guard text. Raises UserError for everything wrong with the files."""
    say = partial(ddp.say, world)
    place = tokenizer, Path(cfg.outputs) / "token_cache", world, say
    options = {"max_length": cfg.max_length, "chat": cfg.chat, "system": cfg.system}
    cut = partial(corpus.segments, tokenizer=tokenizer, max_length=cfg.max_length, cross_document=cfg.cross_document)
    guard = None
    if cfg.guard_data:
        general = corpus.load(cfg.guard_data, "guard_data", *place, template="{text}", **options)
        guard = cut(general, np.arange(len(general.sizes)))
    documents = corpus.load(cfg.train_data, "train_data", *place, template=cfg.text, **options)
    if cfg.val_data:
        rest, held_out = documents, corpus.load(cfg.val_data, "val_data", *place, template=cfg.text, **options)
        how = f"all of {cfg.val_data}"
        say(clash_of(cfg, rest, held_out))
    else:
        rest, held_out, how = holdout.hold_out(documents, cfg.val_size, cfg.seed, tokenizer)
    val_rows = np.arange(len(held_out.sizes))
    train, val = cut(rest, np.arange(len(rest.sizes))), cut(held_out, val_rows)
    if guard:
        shared = holdout.repeated(rest, general)
        if shared:
            problem = f"{len(shared):,} texts of --guard_data are trained on: their loss does not measure forgetting"
            say(warning(problem, "remove them from one side"))
    periodic = val
    if 0 < cfg.eval_rows < len(val_rows):
        periodic = cut(held_out, spread(val_rows, cfg.eval_rows))
    samples = beginnings(held_out, spread(val_rows, cfg.samples))
    learned, judged = int(train.targets.sum()), int(val.targets.sum())
    say(f"train {len(train.lengths):,} rows, {learned:,} tokens to learn; held out {judged:,}: {how}")
    if judged > learned and not cfg.val_data:
        say(warning("most of the text is held out, not trained on", "lower --val_size"))
    return Texts(train, val, periodic, documents.pairs, guard, samples, documents.files, tokenizer)


def clash_of(cfg: CptConfig, train: corpus.Corpus, val: corpus.Corpus) -> str:
    """A warning of texts that are trained on and held out too, or nothing. UserError for pairs beside documents."""
    if train.pairs != val.pairs:
        kinds = ["pairs" if texts.pairs else "documents" for texts in (train, val)]
        raise UserError(f"--val_data {cfg.val_data} has {kinds[1]}, --train_data {kinds[0]}: give one kind")
    names = holdout.repeated(train, val)
    if not names:
        return ""
    problem = f"{len(names)} of --val_data are in --train_data too ({few(names)}): their loss flatters"
    return warning(problem, "remove them from one side")


def write_record(folder: Path, texts: Texts) -> None:
    """What a run's folder says about its texts: what became of each file, and whether they are pairs."""
    report = "".join(json.dumps(record) + "\n" for record in texts.files)
    seals.write(folder / "corpus.jsonl", report)
    seals.write(folder / "texts.json", {"pairs": texts.pairs})


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly over all: the first ones would be those of the first file or class."""
    count = min(most, len(rows))
    return rows[np.arange(count) * len(rows) // count]


def beginnings(documents: corpus.Corpus, rows: np.ndarray) -> list[list[int]]:
    """Token ids of the beginning of documents, or of everything before a pair's first answer."""
    tokens = documents.tokens
    prompts = []
    for row in rows:
        ids = tokens.row(row)
        count = min(32, len(ids) - 1)
        if documents.pairs:
            count = tokens.learned[tokens.starts[row] :].argmax()
        if count:  # a pair may have an empty prompt
            prompts.append(ids[:count].tolist())
    return prompts


def complete_samples(job: loop.Job, texts: Texts) -> list[list[str]]:
    """(prompt, greedy completion of at most 48 tokens) of each sample, for a person to read."""
    if not texts.samples:
        return []
    completions = language.generate(
        job.model, texts.tokenizer, texts.samples, precision=job.precision, max_new_tokens=48
    )
    return [[texts.tokenizer.decode(ids), text] for ids, text in zip(texts.samples, completions, strict=True)]


# ---- model ----------------------------------------------------------------------------------------------------------


def adapter_of(cfg: CptConfig) -> lora.Adapter:
    return lora.Adapter(
        cfg.targets,
        cfg.rank,
        cfg.alpha,
        cfg.lora_dropout,
        saved=cfg.modules_to_save,
        task="CAUSAL_LM",
        base=cfg.base,
    )


def check_model(cfg: CptConfig, tokenizer) -> None:
    """Check base and adapter on a skeleton, before any weight is loaded. Raises UserError for what does not fit."""
    bases.need_vocabulary(cfg.base, len(tokenizer))
    bare = language.language_skeleton(cfg.base)
    bases.need_positions(cfg.base, cfg.max_length)
    try:
        if cfg.rank:
            lora.inject(bare, adapter_of(cfg))
    except ValueError as e:
        saved = f" --modules_to_save {','.join(cfg.modules_to_save)}" if cfg.modules_to_save else ""
        raise UserError(f"--targets {','.join(cfg.targets)}{saved}: {e}") from None


def new_language_model(cfg: CptConfig, world: ddp.World, precision: str):
    """The base to train: whole in fp32, or frozen under an adapter drawn from the seed."""
    dtype = numerics.weight_dtype(world.device, precision) if cfg.rank else torch.float32
    seed = cfg.seed if cfg.random_init else None
    compute = numerics.DTYPES[precision]
    lm = language.load_language_model(cfg.base, world.device, dtype, seed, cfg.quant, compute)
    lm.train()
    if cfg.rank:
        torch.manual_seed(cfg.seed)
        lora.inject(lm, adapter_of(cfg))
        lora.train_only(lm)
    if cfg.grad_checkpoint:
        models.checkpoint_activations(lm)
    return lm


# ---- the model on disk ----------------------------------------------------------------------------------------------


def write_save(folder: Path, lm, tokenizer) -> None:
    """The adapter in PEFT's format, or the base as transformers loads it."""
    if lora.adapters(lm):
        trained.write_adapter(folder, lm, tokenizer)
    else:
        config = language.whole_config(lm)
        trained.write_whole(folder, lm, tokenizer, config, torch.float32)


def export(cfg: CptConfig, lm, tokenizer, run: Path) -> None:
    """Merge an adapter and write the base into a folder, which may hold its config and tokenizer.

    A quantized base takes no update: its 16-bit weights are loaded for it.
    """
    dtype = numerics.DTYPES[cfg.export_dtype]
    if cfg.quant != "none":
        lm = language.load_language_model(cfg.base, torch.device("cpu"), dtype)
        lora.inject(lm, adapter_of(cfg))
        trained.read_classifier(trained.best_save(run).folder, lm)
    lora.merge(lm)
    config = language.whole_config(lm)
    facts = {"exported": str(run)}
    trained.export(Path(cfg.export), lm, tokenizer, config, dtype, facts)


if __name__ == "__main__":
    ddp.launch(main)
