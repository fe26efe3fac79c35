"""Complete prompts."""

import hashlib
import itertools
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import answer_parser
import bases
import checkpoint
import cli
import configs
import data
import ddp
import evaluate
import files
import foreign
import language
import lora
import metrics
import numerics
import peft_format
import predictions
import prompts
import trained
from configs import InferConfig
from errors import Degenerate, UserError, one_line


def encode_prompts(tokenizer, rows: list, max_length: int, chat: bool = True, rules: list = ()):
    """Ids of prompts given as pieces, as data.encode makes them; an end that the tokenizer adds by itself is left out,
    for nothing could follow it. Of a plain prompt over max_length the last tokens are kept: those are to be continued.
    """
    tokens, report = data.encode(tokenizer, rows, max_length if chat else 10**9, rules=rules)
    mask = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    ends = mask[::-1].index(0)
    ids = [tokens.row(i).tolist() for i in range(len(rows))]
    ids = [row[: len(row) - ends] or row for row in ids]
    for i, row in enumerate(ids):
        if len(row) > max_length:
            bos = row[:1] if row[0] == tokenizer.bos_token_id else []
            ids[i] = bos + row[len(row) - max_length + len(bos) :]
            report.cut_rows, report.cut_tokens = report.cut_rows + 1, report.cut_tokens + len(row) - max_length
    return ids, report


# ---- language models: a run of cpt.py, a base, or a base and an adapter ---------------------------------------------


def given_language_model(cfg: configs.InferConfig, run: Path | None) -> foreign.Given:
    """What a run of cpt.py, or else --base and --adapter, name: a whole base, or a base with an adapter on it.

    Its config is a CptConfig. Raises UserError for what does not fit together, Untrusted for saves that cannot be
    trusted.
    """
    known, folder = configs.CptConfig(base=cfg.base, quant=cfg.quant), None
    if run:
        known, folder = _run_of_cpt(run)
    elif cfg.adapter:
        folder = bases.find_adapter(cfg.adapter)
    adapter, shapes = foreign.adapter_header(folder) if folder else (None, {})
    if folder and checkpoint.load_json(folder / "adapter_config.json").get("task_type") not in (None, "CAUSAL_LM"):
        raise UserError(f"{folder}: an adapter of task {adapter.task}, which writes no text; leave --generate out")
    base = known.base or adapter.base
    where = bases.need_base(base)
    tokenizer = bases.load_tokenizer(str(folder) if folder and (folder / "tokenizer.json").is_file() else where)
    bases.need_vocabulary(base, len(tokenizer))
    turns = folder / "chat_template.jinja" if folder else None  # of an adapter without a tokenizer of its own
    if turns and bases.own_file(turns):
        tokenizer.chat_template = turns.read_text(encoding="utf-8")
    bare = language.language_skeleton(base)
    try:
        if adapter:
            lora.inject(bare, adapter)
            peft_format.match_keys(bare, shapes)
    except ValueError as e:
        raise UserError(f"--base {base}: {e}") from None
    return foreign.Given(replace(known, base=base), None, tokenizer, adapter, folder)


def _run_of_cpt(run: Path) -> tuple[configs.CptConfig, Path | None]:
    """A run's config and its best save, or its last: where that is an adapter, its folder, or else as the base."""
    if (run / "labels.json").exists() or not (run / "config.json").is_file():
        raise UserError(f"run {run}: no run of cpt.py, whose models write text; leave --generate out or name another")
    known = cli.read_config(configs.CptConfig, run)
    folder = checkpoint.trusted(run / "best") or checkpoint.trusted(run / "last")
    if folder is None:
        raise UserError(f"run {run}: it holds no save yet; go on with python cpt.py --resume {run}")
    whole = (folder / "model.safetensors").exists()
    return (replace(known, base=str(folder), quant="none"), None) if whole else (known, folder)


def load_given_language_model(given: foreign.Given, world: ddp.World, precision: str):
    """(the language model, ready to write; a report of what matched).

    Raises Untrusted for an adapter of no values, and for a run's on another base than it was trained on.
    """
    dtype, cfg = numerics.weight_dtype(world.device, precision), given.config
    lm = language.load_language_model(cfg.base, world.device, dtype, None, cfg.quant, numerics.DTYPES[precision])
    report = f"{cfg.base}, no adapter"
    if given.adapter:
        if cfg.rank:  # of a run, whose save was verified
            trained.check_base(lm, checkpoint.load_json(given.folder / checkpoint.MANIFEST)["base"], cfg.base)
        lora.inject(lm, given.adapter)
        lora.train_only(lm)
        report = foreign.load_adapter(given.folder, given.adapter, lm, cfg.base)
    return lm.eval().requires_grad_(False), report


def generate_answers(cfg: InferConfig, path: Path, train_cfg, labels, world, rows, ids, known) -> dict:
    """--scoring generate: the model writes its answers, and they are read as scores; those that cannot be read are
    counted, written beside the output and left empty in it, never filled in.
    """
    if len(labels.values) != 2 or train_cfg.head != "label_words":
        raise UserError("--scoring generate: expected two classes and --head label_words, whose words an answer says")
    given_by_hand = cfg.base or cfg.adapter
    if not given_by_hand and len(trained.members(path)) > 1:
        raise UserError(f"--scoring generate: {path} is several runs; name one of them with --runs")
    if not given_by_hand and not train_cfg.rank:
        raise UserError(f"--scoring generate: {path} trained its whole base as a classifier, which writes no text")
    words = train_cfg.label_words or labels.names
    source = cfg if given_by_hand else replace(cfg, base=train_cfg.base, adapter=str(path / "best"))
    given = given_language_model(replace(source, quant=train_cfg.quant), None)
    precision, _ = numerics.choose_precision(cfg.precision, world.device)
    lm, report = load_given_language_model(given, world, precision)
    ddp.say(world, report)
    pieces = [prompts.render(train_cfg.text, row) for row in rows]
    rules = data.cutting_rules(train_cfg.text, train_cfg.kept, train_cfg.budgets)
    encoded, told = encode_prompts(given.tokenizer, pieces, train_cfg.max_length, rules=rules)
    check_room(given.config.base, max(map(len, encoded)), cfg.max_new_tokens)
    ddp.say(world, f"tokens: {told}")
    order = np.argsort([-len(row) for row in encoded], kind="stable")  # equal lengths together: little padding
    batches = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    stops, written, started = language.stop_ids(lm, given.tokenizer), {}, time.perf_counter()
    for j, batch in enumerate(tqdm(batches, disable=world.rank != 0, unit="batch", file=sys.stderr)):
        if j % world.size == world.rank:
            how = precision, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed + j, stops
            texts = language.generate(lm, given.tokenizer, [encoded[i] for i in batch], *how)
            written |= dict(zip(batch.tolist(), texts, strict=True))
        if j == 0 and not cfg.force and world.rank == 0:
            check_answers([answer_parser.parse_answer(t, words) for t in written.values()], len(batch))
    written = {i: text for part in ddp.gather_objects(world, written) for i, text in part.items()}
    found = [answer_parser.parse_answer(written[i], words) for i in range(len(rows))]
    seconds, scores = time.perf_counter() - started, np.array([np.nan if s is None else s for s, _ in found])
    good = np.flatnonzero(np.isfinite(scores))
    result = {"run": str(path), "rows": len(rows), "output": cfg.output, "malformed": len(rows) - len(good)}
    ddp.say(world, f"{len(good):,} of {len(rows):,} answers can be read: {dict(Counter(how for _, how in found))}")
    p = np.clip(scores, 1e-6, 1 - 1e-6)
    logits = np.stack([np.zeros(len(p)), np.log(p / (1 - p))], axis=1).astype(np.float32)
    if known is not None and len(good):
        told = metrics.classification(logits[good], known[good])
        result["metrics"] = {k: round(v, 6) for k, v in told.items()}
        result["metrics"]["accuracy_all"] = round(told["accuracy"] * len(good) / len(rows), 6)  # malformed: wrong
        result |= evaluate.by_value(
            train_cfg, cfg.by_column, [rows[i] for i in good], logits[good], known[good], lambda w: ddp.say(world, w)
        )
    if world.rank == 0:
        chosen = ["" if np.isnan(s) else labels.values[int(s > 0.5)] for s in scores]
        shares = [["", ""] if np.isnan(s) else [1 - s, s] for s in scores]
        predictions.write_records(
            cfg, train_cfg.id_column, labels, ids, chosen, shares, predictions.as_probability(cfg, train_cfg, labels)
        )
        bad = [[ids[i], found[i][1], written[i]] for i in range(len(rows)) if found[i][0] is None]
        predictions.write_lines(cfg, "malformed", ["id", "why", "answer"], bad)
    return {**result, "examples_per_second": round(len(rows) / seconds, 2), "seconds": round(seconds, 2)}


def check_answers(found: list[tuple], count: int) -> None:
    """Raise Degenerate where none of the first answers can be read: the prompt, the words or the adapter is wrong."""
    if count >= 4 and all(score is None for score, _ in found):
        why = ", ".join(f"{how} {n}" for how, n in Counter(how for _, how in found).items())
        raise Degenerate(
            f"preflight: none of the first {count} answers can be read ({why}); nothing was written (--force goes on)"
        )


# ---- completions ----------------------------------------------------------------------------------------------------


def complete_prompts(cfg: InferConfig, hand: set[str]) -> dict:
    """The story of --generate: prompts of a file, a pipe or a terminal, completed in batches, written as they come."""
    world, name = ddp.setup(), cfg.adapter or cfg.base
    run = None if name else trained.find_run(cfg)
    given = given_language_model(cfg, run)
    cfg, tokenizer = as_trained(cfg, hand, given.config, run) if run else cfg, given.tokenizer
    precision, _ = numerics.choose_precision(cfg.precision, world.device)

    # ---- prompts, before any weight is loaded -----------------------------------------------------------------------
    live = not cfg.input and sys.stdin.isatty()
    if live and (world.size > 1 or "output" in hand):
        raise UserError("a terminal has one process and no --output: give prompts with --input FILE or through a pipe")
    columns = files.template_columns(cfg.text)
    if not cfg.input and len(columns) > 1:
        raise UserError(f"--text names the columns {', '.join(columns)}, a line has one: give them with --input FILE")
    rows = files.read_rows(cfg.input, "input") if cfg.input else [] if live else piped_rows(columns[0], world)
    rows = rows[: cfg.limit or None]
    pieces_of, chat, why = prompt_maker(cfg, hand, tokenizer, rows)
    pieces = [pieces_of(row, f"row {i + 1}") for i, row in enumerate(rows)] or [pieces_of({columns[0]: "?"}, "a line")]
    ids, report = encode_prompts(tokenizer, pieces, cfg.max_length, chat)
    check_room(given.config.base, max(map(len, ids)), cfg.max_new_tokens)
    how = f"temperature {cfg.temperature:g}, top_p {cfg.top_p:g}" if cfg.temperature else "greedy"
    size = "lines of the terminal" if live else f"{len(rows):,} in batches of {cfg.batch_size}; {report}"
    plan = f"{run or name}: prompts {why}: {size}; {how}, at most {cfg.max_new_tokens} new tokens each, {precision}"
    ddp.say(world, plan)

    # ---- complete and write -----------------------------------------------------------------------------------------
    lm, matched = load_given_language_model(given, world, precision)
    ddp.say(world, matched)
    stops, pad = language.stop_ids(lm, tokenizer), data.end_of_text(tokenizer, padding=True)

    def completed(batch: list[list[int]], number: int) -> list[list[int]]:
        draw = cfg.max_new_tokens, cfg.temperature, cfg.top_p, ddp.micro_seed(cfg.seed, number, 0)
        return language.complete(lm, batch, pad, stops, precision, *draw)

    source = in_batches(world, ids, cfg.batch_size, completed)
    if live:
        source = typed(cfg, given, lambda line: pieces_of({columns[0]: line}, "this line"), chat, completed)
    started, lengths, finished, out = time.perf_counter(), [], 0, Path(cfg.output)
    bar = tqdm(total=len(rows), unit="row", disable=live or world.rank != 0, file=sys.stderr)
    for first, found in source:
        lengths += map(len, found)
        finished += sum(answer[-1] in stops for answer in found)
        bar.update(len(found))
        if live or world.rank != 0:
            continue
        lines = []
        for i, answer in enumerate(found, first):
            read = tokenizer.decode(ids[i]) if report.cut_rows else "".join(text for _, text in pieces[i])
            record = {"id": rows[i].get(cfg.id_column, str(i)), "prompt": read}
            record["completion"] = language.completion_text(tokenizer, ids[i], answer)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        if first == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            predictions.keep_previous(out, cfg.overwrite)
            checkpoint.write_atomic(out, "")
        checkpoint.append_whole(out, "".join(lines))
    bar.close()
    seconds = time.perf_counter() - started
    words = "".join(text for user, text in pieces[0] if not user)
    result = {"run": str(run or name), "rows": len(lengths), "output": "" if live else cfg.output}
    result |= {"finished": finished, "cut": report.cut_rows, "prompt_hash": hashlib.sha256(words.encode()).hexdigest()}
    return {**result, "tokens_per_second": round(sum(lengths) / seconds, 1), "seconds": round(seconds, 2)}


def as_trained(cfg: InferConfig, hand: set[str], trained: configs.CptConfig, run: Path) -> InferConfig:
    """The config with the prompts that the run was trained on, where nothing else was given by hand: those of pairs,
    or the plain beginnings of documents.
    """
    own = {"chat": "no", "max_length": trained.max_length}
    if (run / "texts.json").is_file() and checkpoint.load_json(run / "texts.json").get("pairs"):
        own |= {"chat": trained.chat, "system": trained.system}
        own |= {"text": trained.text} if trained.text != "{text}" else {}
    return replace(cfg, **{name: value for name, value in own.items() if name not in hand})


def in_batches(world: ddp.World, ids: list[list[int]], size: int, completed):
    """Yield (first row, completions) of whole rounds, one batch a rank, in the order of the rows, on every rank.

    Batches are neighbours in the input: what is drawn depends on the file and the batch size, never on the ranks.
    """
    for first in range(0, len(ids), size * world.size):
        mine = first + size * world.rank
        batch = ids[mine : mine + size]
        parts = ddp.gather_objects(world, completed(batch, mine // size) if batch else [])
        yield first, [answer for part in parts for answer in part]


def typed(cfg: InferConfig, given: foreign.Given, pieces_of, chat: bool, completed):
    """Print the completion of each line typed at the terminal and yield it, until Ctrl-D."""
    for number in itertools.count():
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            (ids,), _ = encode_prompts(given.tokenizer, [pieces_of(line)], cfg.max_length, chat)
            check_room(given.config.base, len(ids), cfg.max_new_tokens)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            continue
        found = completed([ids], number)
        print(language.completion_text(given.tokenizer, ids, found[0]), flush=True)
        yield number, found


def piped_rows(column: str, world: ddp.World) -> list[dict[str, str]]:
    """One row a line of stdin, blank ones left out; rank 0 reads. Raises UserError when there is none."""
    text = ddp.from_rank0(world, lambda: sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape"))
    rows = [{column: line.rstrip("\r")} for line in text.split("\n") if line.strip()]
    if not rows:
        raise UserError("no prompts: give them with --input FILE, or one a line through a pipe")
    return rows


def check_room(base: str, prompt: int, most: int) -> None:
    """Raise UserError where a prompt's tokens and a completion's exceed the positions that the base was made for."""
    room = getattr(bases.load_config(base), "max_position_embeddings", None)
    if room and prompt + most > room:
        found = f"a prompt of {prompt} tokens and --max_new_tokens {most} exceed the {room} positions of {base}"
        raise UserError(
            f"{found}: lower --max_new_tokens" + (f", or --max_length to {room - most}" if room > most else "")
        )


def prompt_maker(cfg: InferConfig, hand: set[str], tokenizer, rows: list[dict[str, str]]):
    """A function from (row, its name in errors) to its prompt's pieces, whether that is a chat, and why.

    A row is a whole chat where it has messages and no --text was given. Raises UserError for columns that are missing
    and for flags that the tokenizer's chat template cannot honour.
    """
    columns, shots = files.template_columns(cfg.text), []
    whole = bool(rows) and "messages" in rows[0] and "text" not in hand
    files.need_columns(rows, ["messages"] if whole else columns, cfg.input, "input")
    if cfg.examples:
        shots = files.read_rows(cfg.examples, "examples")
        files.need_columns(shots, [*columns, "response"], cfg.examples, "examples")
    tools, takes_system = read_tools(cfg.tools), prompts.takes_system(tokenizer)
    if cfg.chat == "no" or not tokenizer.chat_template:
        reason = "no chat was asked for" if cfg.chat == "no" else "the tokenizer has no chat template"
        asked = {"--chat yes": cfg.chat == "yes", "--tools": tools, "--system": "system" in hand, "messages": whole}
        if any(asked.values()):
            raise UserError(f"{next(flag for flag in asked if asked[flag])}: needs a chat, but {reason}")
        before = [p for s in shots for p in [*prompts.render(cfg.text, s), (True, s["response"]), (False, "\n\n")]]
        return lambda row, name: before + prompts.render(cfg.text, row), False, f"raw ({reason})"
    if tools and prompts.chat(tokenizer, [prompts.QUESTION], tools) == prompts.chat(tokenizer, [prompts.QUESTION]):
        raise UserError(f"--tools {cfg.tools}: the tokenizer's chat template takes no tools")

    def turn(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    def question(row: dict[str, str]) -> dict[str, str]:
        return turn("user", "".join(text for _, text in prompts.render(cfg.text, row)))

    system = [turn("system", cfg.system)] if cfg.system and takes_system else []
    shown = [t for s in shots for t in (question(s), turn("assistant", s["response"]))]

    def pieces_of(row: dict[str, str], name: str) -> list[tuple[bool, str]]:
        try:
            turns = read_messages(row["messages"]) if whole else [question(row)]
            own = turns[:1] if turns[0].get("role") == "system" else []
            offered = tools or (json.loads(row["tools"]) if row.get("tools") else None)
            return prompts.chat(tokenizer, [*(own or system), *shown, *turns[len(own) :]], offered, answer=True)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{name}: {e}") from None

    note = "" if takes_system or not cfg.system else ", which takes no system turn"
    return pieces_of, True, f"as chats (the tokenizer has a template{note})"


def read_messages(text: str) -> list[dict]:
    """The turns of a chat that is to be answered. Raises ValueError for what is none."""

    def good(turn) -> bool:
        return isinstance(turn, dict) and all(isinstance(turn.get(k) or "", str) for k in ("role", "content"))

    turns = json.loads(text)
    if not (isinstance(turns, list) and turns and all(map(good, turns))) or turns[-1].get("role") == "assistant":
        raise ValueError('messages: expected turns such as {"role": "user", "content": "Hi"}, the last one no answer')
    return turns


def read_tools(path: str) -> list[dict] | None:
    """The tool descriptions of a JSON file, or None. Raises UserError for anything but a list of objects."""
    try:
        tools = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"--tools {path}: cannot be read as JSON ({one_line(e)})") from None
    if path and not (isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"--tools {path}: expected a JSON list of tool descriptions (objects)")
    return tools


if __name__ == "__main__":  # scaffold: the `words` helper makes this a command
    import sys

    import infer

    sys.argv.insert(1, "--generate")
    ddp.launch(infer.main)
