"""Next-token training of a base on documents, or on the answers to prompts: the whole base, or an adapter on it.

    python cpt.py --cfg tiny --base tiny/base --train_data outputs/tiny_corpus.jsonl --export tiny/new_base
    python cpt.py --cfg qwen_math15b --train_data papers/ --guard_data wiki.jsonl --export adapted
    torchrun --nproc_per_node=2 cpt.py --cfg llama8b_sft --train_data pairs.jsonl

A LaTeX project, a .txt or .md file, or a line of JSONL is a document; documents end with EOS, longer ones are cut into
segments of max_length tokens, and no token sees another document. Lines of JSONL with prompt and response, or with
messages, are pairs: only the responses are learned. `python cpt.py --help` lists every field.
"""

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import bases
import checkpoint
import checks
import cli
import configs
import corpus
import data
import ddp
import evaluate
import language
import loop
import lora
import model as models
import numerics
import optim
import peft_format
import trained
from configs import CptConfig
from errors import UserError
from packed import Batch, pack


def main(argv: list[str]) -> dict:
    # ---- config -----------------------------------------------------------------------------------------------------
    cfg, given = cli.parse(CptConfig, configs.CPT_PRESETS, argv, __doc__)
    cfg = checks.own_data(cfg, given)
    checks.check(cfg, given)

    # ---- distributed ------------------------------------------------------------------------------------------------
    world = ddp.setup()
    cfg, run = loop.run_to_resume(cfg, given, world)
    ddp.say(world, checks.preset_note(given, argv))
    precision, why = numerics.choose_precision(cfg.precision, world.device)
    ddp.say(world, f"{world.size} rank{'s' * (world.size > 1)} on {world.device.type}; precision {precision} ({why})")

    # ---- data -------------------------------------------------------------------------------------------------------
    tokenizer = bases.load_tokenizer(bases.find_base(cfg.base) if cfg.random_init else bases.need_base(cfg.base))
    check_model(cfg, tokenizer)
    texts = load_texts(cfg, tokenizer, world)
    checks.check_texts(given, texts.pairs)
    train = texts.train
    steps_per_epoch = math.ceil(len(train.lengths) / cfg.batch_size)
    total = min(cfg.epochs * steps_per_epoch, cfg.max_steps or math.inf)
    eval_every = cfg.eval_every or steps_per_epoch
    save_every = cfg.save_every or eval_every
    digest, learned = train.digest(), train.targets  # (N,) tokens to learn of each row, counted once

    # ---- model ------------------------------------------------------------------------------------------------------
    lm = new_language_model(cfg, world, precision)
    if cfg.grad_checkpoint:
        models.checkpoint_activations(lm)
    params = [p for p in lm.parameters() if p.requires_grad]
    ddp.say(world, models.attention_note(world.device, lm.config, precision))
    fresh = f"the weights of {cfg.base} are drawn from seed {cfg.seed}, not loaded" if cfg.random_init else ""
    ddp.say(world, fresh or evaluate.weak_tokens(lm, tokenizer, train))
    ddp.say(world, lora.trainable_table(lm) if cfg.rank else f"{sum(p.numel() for p in params):,} parameters trained")

    # ---- optimizer --------------------------------------------------------------------------------------------------
    vocabulary = language.vocabulary_modules(lm)
    groups = optim.parameter_groups(lm.named_parameters(), cfg.lr, cfg.embed_lr, cfg.weight_decay, vocabulary)
    optimizer = optim.adamw(groups, cfg.optimizer)
    for group in groups:
        name = group["name"].replace("head", "embedding and LM head")
        ddp.say(world, f"{name}: {len(group['params'])} tensors, lr {group['lr']:g}, decay {group['weight_decay']:g}")
    scaler = optim.loss_scaler(world.device.type, precision == "fp16")
    gradients = ddp.GradientSum(params, world)
    if not gradients.exact:
        ddp.say(world, "gradients are summed in fp32: other numbers of ranks are equal to rounding only")
    warmup = optim.warmup_updates(total, cfg.warmup_steps, cfg.warmup_ratio)

    # ---- resume, or a new run ---------------------------------------------------------------------------------------
    about = {"base": lm.base_fingerprint} if cfg.rank else {}
    at = loop.restore(run, world, lambda folder: read_save(folder, lm), optimizer, scaler, digest) if run else None
    at = at or loop.State(micro_batches=max(cfg.micro_batches, world.size))
    if run is None:
        report = "".join(json.dumps(record) + "\n" for record in texts.files)
        run = loop.new_run(cfg, world, {"corpus.jsonl": report, "texts.json": json.dumps({"pairs": texts.pairs})})
    ddp.say(
        world,
        f"plan: {total:,} steps of {cfg.batch_size} rows, micro-batches of at most {cfg.max_tokens:,} tokens, warm-up "
        f"{warmup}, evaluation every {eval_every}, save every {save_every}",
        f"\nrun {run}" + (f", resumed at step {at.step} of {total}" if at.step else ""),
    )

    # ---- loop: step, log, eval, save --------------------------------------------------------------------------------
    stop, log, clock = ddp.StopRequest(), loop.Log(run, cfg, world, at.step), loop.Clock(at)

    def write(folder: Path) -> None:
        write_save(folder, lm, tokenizer)

    def held_out(step: int, val: data.Tokens) -> float:
        scores = language.language_scores(lm, val, world, precision, cfg.max_tokens)
        if texts.guard:
            other = language.language_scores(lm, texts.guard, world, precision, cfg.max_tokens)
            scores |= {f"guard_{key}": value for key, value in other.items()}
        if not all(map(math.isfinite, scores.values())):
            raise FloatingPointError(f"step {step}: the held-out loss is not finite; lower --lr")
        at.evals.append({"step": step, "tokens": int(val.targets.sum()), "eval": scores})
        ddp.say(world, f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()))
        if world.rank == 0:
            samples = complete_samples(lm, tokenizer, texts.samples, precision)
            log.write({"step": step, "eval": scores, "samples": samples})
            for prompt, completion in samples:
                print(f"sample: {prompt[-60:]!r} -> {completion!r}", flush=True)
        clock.lap("eval_seconds")
        return scores["loss"]

    if not at.evals:
        held_out(0, texts.val)
    bar = tqdm(total=total, initial=at.step, disable=world.rank != 0, unit="step", file=sys.stderr, mininterval=2.0)
    while at.step < total:
        epoch, index = divmod(at.step, steps_per_epoch)
        if index == 0 or at.step == at.resumed:
            plan = data.plan_epoch(train.lengths, cfg.batch_size, cfg.max_tokens, at.micro_batches, cfg.seed, epoch)
        rows_of_step = np.concatenate(plan[index])
        targets = float(learned[rows_of_step].sum())
        factor = optim.lr_factor(at.updates, total, warmup, cfg.schedule)
        for j, rows in enumerate(plan[index]):
            if j % world.size != world.rank:
                continue
            torch.manual_seed(ddp.micro_seed(cfg.seed, at.step, j))
            batch = pack(train, rows, world.device, predict=True)
            with numerics.autocast(world.device, precision):
                loss = language.next_token_loss(lm, batch) / targets
            scaler.scale(loss).backward()
            gradients.add(loss, bool(stop.signal))
        norm, taken, (loss, stopping) = optim.step(optimizer, scaler, factor, cfg.grad_clip, gradients.reduce())
        if not taken and not (scaler.is_enabled() and scaler.get_scale() >= 1.0):
            batch = pack(train, plan[index][0], world.device, predict=True)
            raise FloatingPointError(f"step {at.step + 1}: loss {loss:.4g}; {not_finite(lm, batch, world, precision)}")
        at.step, at.updates, at.skipped = at.step + 1, at.updates + taken, at.skipped + (not taken)
        at.rows, at.tokens = at.rows + len(rows_of_step), at.tokens + int(train.lengths[rows_of_step].sum())
        if at.updates == 1 and taken:
            lora.assert_moved(lm)

        # log
        clock.lap("seconds")
        epochs, seen = round(at.step / steps_per_epoch, 4), (loss, norm) if taken else (None, None)  # strict JSON
        log.write(loop.step_line(at, epochs, cfg.lr * factor, *seen))
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{at.tokens / at.seconds:,.0f}", refresh=False)
        bar.update()

        # eval
        last = at.step == total
        if last or at.step % eval_every == 0:
            held_out_loss = held_out(at.step, texts.periodic)
            if at.best is None or held_out_loss < at.best:
                at.best, at.best_step = held_out_loss, at.step
                loop.save(run / "best", world, write, {"step": at.step, **about}, cfg.keep)

        # save
        if last or stopping or at.step % save_every == 0:
            state = (log, at, optimizer, scaler, digest)
            loop.save(run / "last", world, write, {"step": at.step, **about}, cfg.keep, state)
        if stopping and not last:
            raise KeyboardInterrupt(f"stopped after step {at.step}; go on with --resume {run}")
    bar.close()
    stop.close()

    # ---- end: the best save, on everything held out -----------------------------------------------------------------
    ddp.barrier(world)  # rank 0 has written best/
    if at.best_step != at.step:
        read_save(checkpoint.trusted(run / "best").folder, lm)
        ddp.say(world, f"best held-out loss: step {at.best_step}, which is what is kept and exported")
    if at.best_step != at.step or texts.periodic is not texts.val:
        held_out(at.best_step, texts.val)
    log.close()
    ddp.say(world, eval_table(at.evals))
    before, after = at.evals[0]["eval"], at.evals[-1]["eval"]
    if after["loss"] >= before["loss"]:
        ddp.say(world, "warning: the held-out loss did not fall; lower --lr, or take more text")
    result = {
        "run": str(run),
        "before": before,
        "metrics": after,
        "best_step": at.best_step,
        "steps": total,
        "tokens_per_second": round(at.tokens / at.seconds, 1),
        "peak_memory_gb": round(loop.peak_memory_gb(world), 3),
        "train_seconds": round(at.seconds, 2),
        "eval_seconds": round(at.eval_seconds, 2),
    }
    if cfg.export and world.rank == 0:
        export(cfg, lm, tokenizer, run)
    if world.rank == 0:
        checkpoint.write_atomic(run / "result.json", json.dumps(result) + "\n")
    return result


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


def load_texts(cfg: CptConfig, tokenizer, world) -> Texts:
    """The corpus, split by document, and the guard text. Raises UserError for everything wrong with the files."""

    def say(words: str) -> None:
        ddp.say(world, words)

    cache, how = Path(cfg.outputs) / "token_cache", {n: getattr(cfg, n) for n in ("max_length", "chat", "system")}
    guard = None
    if cfg.guard_data:
        general = corpus.load(cfg.guard_data, "guard_data", tokenizer, cache, world, say, template="{text}", **how)
        guard = corpus.segments(general, np.arange(len(general.sizes)), tokenizer, cfg.max_length, cfg.cross_document)
    found = corpus.load(cfg.train_data, "train_data", tokenizer, cache, world, say, template=cfg.text, **how)
    sides = corpus.split(len(found.sizes), cfg.val_size, cfg.seed)
    train, val = (corpus.segments(found, rows, tokenizer, cfg.max_length, cfg.cross_document) for rows in sides)
    periodic = val
    if 0 < cfg.eval_rows < len(sides[1]):
        few = spread(sides[1], cfg.eval_rows)
        periodic = corpus.segments(found, few, tokenizer, cfg.max_length, cfg.cross_document)
    say(f"train {len(train.lengths):,} rows, {train.targets.sum():,} tokens to learn; held out {val.targets.sum():,}")
    return Texts(
        train, val, periodic, found.pairs, guard, beginnings(found, spread(sides[1], cfg.samples)), found.files
    )


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly over all: the first ones would be those of the first file or class."""
    return rows[np.arange(min(most, len(rows))) * len(rows) // max(1, min(most, len(rows)))]


def beginnings(found: corpus.Corpus, rows: np.ndarray, most: int = 32) -> list[list[int]]:
    """Token ids of the beginning of documents, or of all before a pair's first answer."""
    starts, stops = found.tokens.starts[rows], found.tokens.stops[rows]
    ends = np.minimum(starts + most, stops - 1)
    if found.pairs:
        ends = [
            start + int(found.tokens.learned[start:stop].argmax()) for start, stop in zip(starts, stops, strict=True)
        ]
    begun = [found.tokens.ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)]
    return [ids for ids in begun if ids]  # a pair may have an empty prompt


def complete_samples(lm, tokenizer, prompts: list[list[int]], precision: str, most: int = 48) -> list[list[str]]:
    """(prompt, greedy completion) of each prompt."""
    if not prompts:
        return []
    found = language.generate(lm, tokenizer, prompts, precision, most)
    return [[tokenizer.decode(p), completion] for p, completion in zip(prompts, found, strict=True)]


def eval_table(evals: list[dict]) -> str:
    """Evaluations as a table: held-out and guard text, before, during and after."""
    names = [n for n in evals[0]["eval"] if not n.endswith("loss")]
    lines = ["  ".join(["    step", "    tokens", *(f"{n.replace('_', ' '):>20}" for n in names)])]
    for line in evals:
        lines.append(
            "  ".join([f"{line['step']:>8}", f"{line['tokens']:>10,}", *(f"{line['eval'][n]:>20.4f}" for n in names)])
        )
    return "\n".join(lines)


# ---- model ----------------------------------------------------------------------------------------------------------


def adapter_of(cfg: CptConfig) -> lora.Adapter:
    plain = cfg.targets, cfg.rank, cfg.alpha, cfg.lora_dropout
    return lora.Adapter(*plain, saved=cfg.modules_to_save, task="CAUSAL_LM", base=cfg.base)


def check_model(cfg: CptConfig, tokenizer) -> None:
    """Check base and adapter on a skeleton, before any weight is loaded. Raises UserError for what does not fit."""
    bases.need_vocabulary(cfg.base, len(tokenizer))
    bare = language.language_skeleton(cfg.base)
    room = getattr(bare.config, "max_position_embeddings", None)
    if room and cfg.max_length > room:
        raise UserError(f"--max_length {cfg.max_length}: {cfg.base} was made for {room} positions; lower it")
    try:
        if cfg.rank:
            lora.inject(bare, adapter_of(cfg))
    except ValueError as e:
        saved = f" --modules_to_save {','.join(cfg.modules_to_save)}" if cfg.modules_to_save else ""
        raise UserError(f"--targets {','.join(cfg.targets)}{saved}: {e}") from None


def new_language_model(cfg: CptConfig, world: ddp.World, precision: str):
    """The base to train: whole in fp32, or frozen under an adapter drawn from the seed."""
    dtype = numerics.weight_dtype(world.device, precision) if cfg.rank else torch.float32
    seed, compute = cfg.seed if cfg.random_init else None, numerics.DTYPES[precision]
    lm = language.load_language_model(cfg.base, world.device, dtype, seed, cfg.quant, compute).train()
    if cfg.rank:
        torch.manual_seed(cfg.seed)
        lora.inject(lm, adapter_of(cfg))
        lora.train_only(lm)
    return lm


def not_finite(lm, batch: Batch, world: ddp.World, precision: str) -> str:
    """Where a forward pass overflows first, and what to do."""
    with torch.no_grad(), numerics.autocast(world.device, precision), numerics.activation_maxima(lm) as maxima:
        language.next_token_loss(lm, batch)
    return f"{numerics.overflow_report(maxima)}; lower --lr, or try --precision bf16 or fp32"


# ---- the model on disk ----------------------------------------------------------------------------------------------


def write_save(folder: Path, lm, tokenizer) -> None:
    """The adapter in PEFT's format, or the base as transformers loads it."""
    if lora.adapters(lm):
        checkpoint.save_json(folder / "adapter_config.json", peft_format.adapter_config(lm.adapter))
        checkpoint.save_tensors(folder / "adapter_model.safetensors", peft_format.adapter_state(lm))
        tokenizer.save_pretrained(folder)
    else:
        write_base(folder, lm, tokenizer, torch.float32)


def read_save(folder: Path, lm) -> None:
    """Load what write_save wrote. Raises Untrusted when it does not fit, or the base has changed."""
    if lora.adapters(lm):
        trained.check_base(lm, checkpoint.verify(folder)["base"], "of this run")
    trained.read_classifier(folder, lm)


def write_base(folder: Path, lm, tokenizer, dtype: torch.dtype) -> None:
    """A base as transformers loads it: weights in `dtype`, config, tokenizer."""
    tensors = {n: t.to("cpu", dtype).contiguous() for n, t in models.state(lm).items()}
    checkpoint.save_tensors(folder / "model.safetensors", tensors)
    config = models.plain_config(lm)
    config.update(dtype=str(dtype).removeprefix("torch."), architectures=[type(lm).__name__], use_cache=True)
    config["tie_word_embeddings"] = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    checkpoint.save_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)


def export(cfg: CptConfig, lm, tokenizer, run: Path) -> None:
    """Merge an adapter and write the base into a folder, which may hold its config and tokenizer; weights come last.

    A quantized base takes no update: its 16-bit weights are loaded for it.
    """
    folder, dtype = Path(cfg.export), numerics.DTYPES[cfg.export_dtype]
    if cfg.quant != "none":
        lm = language.load_language_model(cfg.base, torch.device("cpu"), dtype)
        lora.inject(lm, adapter_of(cfg))
        trained.read_classifier(checkpoint.trusted(run / "best").folder, lm)
    lora.merge(lm)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as hidden:
        write_base(Path(hidden), lm, tokenizer, dtype)
        for path in sorted(Path(hidden).iterdir(), key=lambda p: p.suffix == ".safetensors"):
            checkpoint.fs_rename(path, folder / path.name)


if __name__ == "__main__":
    ddp.launch(main)
