"""Next-token training of a base on plain text, packed: the whole base, or an adapter on it.

    python cpt.py --cfg tiny --base tiny/base --train_data outputs/tiny_corpus.jsonl --export tiny/new_base
    torchrun --nproc_per_node=2 cpt.py --base Qwen/Qwen2.5-0.5B --train_data papers.jsonl --lr 2e-5
    python cpt.py --cfg qwen_math15b --train_data papers/ --guard_data wiki.jsonl --export adapted

A .txt or .md file, or a line of JSONL, is a document; documents end with EOS, longer ones are cut into segments of
max_length tokens, and no token sees another document. `python cpt.py --help` lists every field.
"""

import hashlib
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import configs
import data
import ddp
import evaluate
import lora
import model as models
import optim
import prompts
from configs import UserError


def main(argv: list[str]) -> dict:
    # ---- config -----------------------------------------------------------------------------------------------------
    cfg, given = configs.parse(configs.CptConfig, configs.CPT_PRESETS, argv, __doc__)
    cfg = configs.own_data(cfg, given)
    configs.check(cfg, given)

    # ---- distributed ------------------------------------------------------------------------------------------------
    world = ddp.setup()
    cfg, run = evaluate.run_to_resume(cfg, given, world)
    precision, why = models.choose_precision(cfg.precision, world.device)
    ddp.say(world, f"precision {precision}: {why}; {world.size} ranks on {world.device.type}")

    # ---- data -------------------------------------------------------------------------------------------------------
    tokenizer = data.load_tokenizer(models.find_base(cfg.base) if cfg.random_init else models.need_base(cfg.base))
    models.need_vocabulary(cfg.base, len(tokenizer))
    train, val = load_segments(cfg, tokenizer, lambda *words: ddp.say(world, *words))
    guard = load_guard(cfg, tokenizer, lambda *words: ddp.say(world, *words))
    digest = hashlib.sha256(train.ids.tobytes() + train.starts.tobytes()).hexdigest()
    ddp.say(
        world, f"train {len(train.lengths):,} segments, {int(train.starts[-1]):,} tokens; validation {val.starts[-1]:,}"
    )
    total = cfg.epochs * math.ceil(len(train.lengths) / cfg.batch_size)
    total = min(total, cfg.max_steps) if cfg.max_steps else total

    # ---- model ------------------------------------------------------------------------------------------------------
    lm = new_language_model(cfg, world, precision)
    if cfg.grad_checkpoint:
        models.checkpoint_activations(lm)
    params = [p for p in lm.parameters() if p.requires_grad]
    ddp.say(world, lora.trainable_table(lm) if cfg.rank else f"{sum(p.numel() for p in params):,} parameters trained")

    # ---- optimizer --------------------------------------------------------------------------------------------------
    vocabulary = models.vocabulary_modules(lm)
    groups = optim.parameter_groups(lm.named_parameters(), cfg.lr, cfg.embed_lr, cfg.weight_decay, vocabulary)
    optimizer = optim.adamw(groups)
    for group in groups:
        name = group["name"].replace("head", "embedding and LM head")
        ddp.say(world, f"{name}: {len(group['params'])} tensors, lr {group['lr']:g}, decay {group['weight_decay']:g}")
    scaler = optim.loss_scaler(world.device.type, precision == "fp16")
    gradients = ddp.GradientSum(params, world)
    if not gradients.exact:
        ddp.say(world, "gradients are summed in fp32: other numbers of ranks are equal to rounding only")
    warmup = optim.warmup_updates(total, cfg.warmup_steps, cfg.warmup_ratio)

    # ---- resume -----------------------------------------------------------------------------------------------------
    at = restore(run, world, lm, optimizer, scaler, digest) if run else None
    at = at or {
        "digest": digest,
        "micro_batches": max(cfg.micro_batches, world.size),
        "step": 0,
        "updates": 0,
        "tokens": 0.0,
        "seconds": 0.0,
        "evals": [],
    }
    run = run or Path(ddp.from_rank0(world, lambda: new_run(cfg, world)))
    ddp.say(world, f"run {run}" + (f", resumed at step {at['step']} of {total}" if at["step"] else ""))

    # ---- loop -------------------------------------------------------------------------------------------------------
    stop = ddp.StopRequest()
    log, began, last_loss = run / "metrics.jsonl", time.perf_counter(), at.get("loss", float("nan"))

    def held_out(step: int) -> None:
        scores = evaluate.language_scores(lm, val, world, precision, cfg.max_tokens)
        if guard:
            other = evaluate.language_scores(lm, guard, world, precision, cfg.max_tokens)
            scores |= {f"guard_{name}": value for name, value in other.items()}
        if not all(map(math.isfinite, scores.values())):
            raise FloatingPointError(f"step {step}: the held-out loss is not finite; lower --lr")
        line = {"step": step, "eval": scores}
        log_line(world, log, line)
        ddp.say(world, json.dumps(line))
        at["evals"].append(line)

    if not at["evals"]:
        held_out(0)
    bar = tqdm(total=total, initial=at["step"], disable=world.rank != 0, unit="step", file=sys.stderr, mininterval=2.0)
    steps_per_epoch = math.ceil(len(train.lengths) / cfg.batch_size)
    plan, plan_epoch = [], -1
    for step in range(at["step"], total):
        epoch, index = divmod(step, steps_per_epoch)
        if epoch != plan_epoch:
            plan = data.plan_epoch(train.lengths, cfg.batch_size, cfg.max_tokens, at["micro_batches"], cfg.seed, epoch)
            plan_epoch = epoch
        tokens = float(sum((train.lengths[rows] - 1).sum() for rows in plan[index]))
        for j, rows in enumerate(plan[index]):
            if j % world.size != world.rank:
                continue
            torch.manual_seed(ddp.micro_seed(cfg.seed, step, j))
            with models.autocast(world.device, precision):
                loss = evaluate.next_token_loss(lm, data.pack(train, rows, world.device)) / tokens
            scaler.scale(loss).backward()
            gradients.add(loss, stop=bool(stop.signal))
        factor = optim.lr_factor(at["updates"], total, warmup, cfg.schedule)
        norm, taken, (last_loss, stopping) = optim.step(optimizer, scaler, factor, cfg.grad_clip, gradients.reduce())
        at["updates"] += taken
        if not taken and not (scaler.is_enabled() and scaler.get_scale() >= 1.0):
            raise FloatingPointError(f"step {step + 1}: the gradients are not finite (loss {last_loss:.4g})")
        at.update(step=step + 1, loss=last_loss, tokens=at["tokens"] + tokens)

        # eval, save, log
        end = step + 1 == total
        if end or (step + 1) % (cfg.eval_every or steps_per_epoch) == 0:
            held_out(step + 1)
        seconds = time.perf_counter() - began + at["seconds"]
        line = {
            "step": step + 1,
            "epoch": epoch,
            "loss": last_loss,
            "lr": cfg.lr * factor,
            "grad_norm": norm if taken else None,
        }
        log_line(world, log, {**line, "tokens": at["tokens"], "seconds": seconds})
        bar.set_postfix(loss=f"{last_loss:.3f}", tok_s=f"{at['tokens'] / seconds:,.0f}", refresh=False)
        bar.update()
        save_every = cfg.save_every or cfg.eval_every or steps_per_epoch
        if end or stopping or (step + 1) % save_every == 0:
            save(run, world, lm, tokenizer, optimizer, scaler, {**at, "seconds": seconds}, cfg.keep)
        if stopping and not end:
            raise KeyboardInterrupt(f"stopped at step {step + 1}: go on with --resume {run}")

    # ---- end --------------------------------------------------------------------------------------------------------
    bar.close()
    stop.close()
    ddp.say(world, eval_table(at["evals"]))
    if cfg.export and world.rank == 0:
        export(Path(cfg.export), lm, tokenizer, models.DTYPES[cfg.export_dtype])
    seconds = time.perf_counter() - began + at["seconds"]
    result = {"run": str(run), "metrics": at["evals"][-1]["eval"], "steps": total, "train_seconds": round(seconds, 1)}
    result["before"] = at["evals"][0]["eval"]
    result["tokens_per_second"] = round(at["tokens"] / seconds, 1)
    if world.rank == 0:
        checkpoint.write_atomic(run / "result.json", json.dumps(result) + "\n")
    return result


# ---- data and model -------------------------------------------------------------------------------------------------


def load_segments(cfg: configs.CptConfig, tokenizer, say=lambda *words: None) -> tuple[data.Tokens, data.Tokens]:
    """Segments of the documents to train on and of the held-out ones, which are chosen by document."""
    rows, said = data.read_documents(cfg.train_data, "train_data", cfg.text)
    say(said)
    count = int(cfg.val_size) if cfg.val_size >= 1 else max(1, round(len(rows) * cfg.val_size))
    if not 0 < count < len(rows):
        raise UserError(f"--val_size {cfg.val_size:g} of {len(rows)} documents leaves none to train on or to hold out")
    held_out = set(np.random.default_rng([cfg.seed, 0x5B11]).permutation(len(rows))[:count].tolist())
    sides = [[row for i, row in enumerate(rows) if (i in held_out) == side] for side in (False, True)]
    return tuple(segments(cfg, tokenizer, side) for side in sides)


def load_guard(cfg: configs.CptConfig, tokenizer, say) -> data.Tokens | None:
    """Segments of the general text on which forgetting is measured."""
    if not cfg.guard_data:
        return None
    rows, said = data.read_documents(cfg.guard_data, "guard_data", cfg.text)
    say(said)
    return segments(cfg, tokenizer, rows)


def segments(cfg: configs.CptConfig, tokenizer, rows: list[dict[str, str]]) -> data.Tokens:
    """Documents, each ended by EOS, cut into segments that share one token: every token but the first is predicted.

    With cross_document the stream of all documents is cut, and only its own first token is not predicted.
    """
    tokens, _ = data.tokenize(tokenizer, cfg.text, rows, max_length=10**9)
    end = data.end_of_text(tokenizer)
    documents = [np.append(tokens.row(i), end) for i in range(len(rows))]
    texts = ["".join(part for _, part in prompts.render(cfg.text, row)) for row in rows]
    if cfg.cross_document:
        documents, texts = [np.concatenate(documents)], ["".join(texts)]
    first = sum(len(tokenizer.decode(d[:1]).encode()) for d in documents)  # not predicted, so not counted
    cut = [d[s : s + cfg.max_length + 1] for d in documents for s in range(0, len(d) - 1, cfg.max_length)]
    found = data.join_tokens(cut)
    return data.Tokens(found.ids, found.starts, max(1, sum(len(t.encode()) for t in texts) - first))


def new_language_model(cfg: configs.CptConfig, world: ddp.World, precision: str):
    """The base to train: whole in fp32, or frozen under an adapter. Raises UserError for targets that do not exist."""
    seed = cfg.seed if cfg.random_init else None
    dtype = models.weight_dtype(world.device, precision) if cfg.rank else torch.float32
    lm = models.load_language_model(cfg.base, world.device, dtype, seed).train()
    if cfg.rank:
        torch.manual_seed(cfg.seed)
        plain = cfg.targets, cfg.rank, cfg.alpha, cfg.lora_dropout
        try:
            lora.inject(lm, lora.Adapter(*plain, saved=cfg.modules_to_save, task="CAUSAL_LM", base=cfg.base))
        except ValueError as e:
            raise UserError(f"--targets {','.join(cfg.targets)}: {e}") from None
        lora.train_only(lm)
    return lm


def eval_table(evals: list[dict]) -> str:
    """Evaluations as a table: held-out and guard text, before, during and after."""
    names = [n for n in evals[0]["eval"] if not n.endswith("loss")]
    lines = ["  ".join(["    step", *(f"{n.replace('_', ' '):>20}" for n in names)])]
    for line in evals:
        lines.append("  ".join([f"{line['step']:>8}", *(f"{line['eval'][n]:>20.4f}" for n in names)]))
    return "\n".join(lines)


# ---- the run's files ------------------------------------------------------------------------------------------------


def new_run(cfg: configs.CptConfig, world: ddp.World) -> Path:
    """Make the run folder and write what is known at the start."""
    run = checkpoint.new_run(cfg.outputs, cfg.base, configs.dataset_name(cfg))
    facts = checkpoint.environment(torch.get_num_threads(), world.size, str(world.device))
    checkpoint.write_atomic(run / "environment.json", json.dumps(facts, indent=1) + "\n")
    checkpoint.write_atomic(run / "config.json", configs.to_json(replace(cfg, resume="")))
    return run


def restore(run: Path, world, lm, optimizer, scaler, digest: str) -> dict | None:
    """Load the last save into model, optimizer and scaler and cut the log back to it; None if nothing was saved yet."""
    found = checkpoint.last_state(run)
    if world.rank == 0:
        checkpoint.cut_log(run / "metrics.jsonl", found[1]["log_bytes"] if found else 0)
    if not found:
        return None
    folder, at = found
    if at["digest"] != digest:
        raise UserError(f"--resume {run}: the training documents or their tokens changed since this run began")
    try:
        if lora.adapters(lm):
            lora.load_adapter_state(lm, checkpoint.load_tensors(folder / "adapter_model.safetensors"))
        else:
            tensors = checkpoint.load_tensors(folder / "model.safetensors")
            if tensors.keys() != models.state(lm).keys():
                raise ValueError("its weights are not those of this base")
            lm.load_state_dict(tensors, strict=False)
    except (ValueError, RuntimeError) as e:
        raise checkpoint.Untrusted(f"{folder}: {e}") from None
    checkpoint.load_optimizer_tensors(optimizer, checkpoint.load_tensors(folder / "state.safetensors"))
    scaler.load_state_dict(at["scaler"])
    return at


def save(run: Path, world, lm, tokenizer, optimizer, scaler, at: dict, keep: int) -> None:
    """Write last/: the base as transformers loads it, and the state to go on from."""
    if world.rank != 0:
        return
    log_bytes = (run / "metrics.jsonl").stat().st_size

    def write(folder: Path) -> None:
        if lora.adapters(lm):
            checkpoint.save_json(folder / "adapter_config.json", lora.adapter_config(lm.adapter))
            checkpoint.save_tensors(folder / "adapter_model.safetensors", lora.adapter_state(lm))
            tokenizer.save_pretrained(folder)
        else:
            write_base(folder, lm, tokenizer, torch.float32)
        checkpoint.save_tensors(folder / "state.safetensors", checkpoint.optimizer_tensors(optimizer))
        checkpoint.save_json(folder / "state.json", {**at, "scaler": scaler.state_dict(), "log_bytes": log_bytes})

    checkpoint.save(run / "last", write, {"step": at["step"]}, keep)


def write_base(folder: Path, lm, tokenizer, dtype: torch.dtype) -> None:
    """A base as transformers loads it: weights in `dtype`, config, tokenizer."""
    tensors = {n: t.to("cpu", dtype).contiguous() for n, t in models.state(lm).items()}
    checkpoint.save_tensors(folder / "model.safetensors", tensors)
    config = models.plain_config(lm)
    config.update(dtype=str(dtype).removeprefix("torch."), architectures=[type(lm).__name__], use_cache=True)
    config["tie_word_embeddings"] = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    checkpoint.save_json(folder / "config.json", config)
    tokenizer.save_pretrained(folder)


def export(folder: Path, lm, tokenizer, dtype: torch.dtype) -> None:
    """Merge an adapter and write the base into a folder, which may hold its config and tokenizer; weights come last."""
    lora.merge(lm)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as hidden:
        write_base(Path(hidden), lm, tokenizer, dtype)
        for path in sorted(Path(hidden).iterdir(), key=lambda p: p.suffix == ".safetensors"):
            checkpoint.fs_rename(path, folder / path.name)


def log_line(world, path: Path, line: dict) -> None:
    if world.rank == 0:
        checkpoint.append_line(path, line)


if __name__ == "__main__":
    ddp.launch(main)
