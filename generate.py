"""Complete prompts with a language model: a run of cpt.py, a base, or a base with an adapter.

    python generate.py                                                        # the newest run completes what you type
    python generate.py --base Qwen/Qwen2.5-0.5B-Instruct --input prompts.jsonl
    python generate.py --runs outputs/tiny__base/papers/run_0 --temperature 0.8 --input prompts.csv --output out.jsonl
    echo "What is 2 + 2?" | python generate.py --base Qwen/Qwen2.5-0.5B-Instruct

With --score each completion is read as an answer, and becomes a score of two classes:

    python generate.py --score --base Qwen/Qwen2.5-1.5B-Instruct --prompt verify_steps --label_names False,True \\
        --input solutions.csv

The output keeps the order of the input. `python generate.py --help` lists every field.
"""

from dataclasses import dataclass, replace

import cli


@dataclass(frozen=True)
class GenerateConfig:
    """Completions of prompts, or answers read as scores."""

    # what writes
    runs: str = ""  # run folder; default: the newest finished run, of cpt.py, or with score of train.py
    base: str = ""  # instead of a run: hub name or folder; with runs: where its base is now; default: the adapter's
    adapter: str = ""  # a PEFT LoRA adapter for that base, folder or hub name
    quant: str = "none"  # of base and adapter: none or nf4
    precision: str = "auto"  # auto: bf16 from capability 8.0, fp16 on older GPUs, fp32 on a CPU; or fp32, fp16, bf16
    outputs: str = "outputs"  # folder that holds all runs

    # prompts
    input: str = ""  # rows (CSV, TSV, JSONL, Parquet); default: the terminal or a pipe, with score the run's test_data
    text: str = "{prompt}"  # format template over a row's columns; a column messages holds whole chats
    id_column: str = ""  # id column; default: the first of submission, or the run's, where input has it; else row index
    limit: int = 0  # only the first rows, 0 for all
    max_length: int = 512  # most tokens of a prompt: longer ones are cut, and counted
    chat: str = "auto"  # prompts as chats: yes, no, or auto: where the tokenizer has a chat template
    system: str = "You are a helpful assistant."  # system turn of chats that have none
    examples: str = ""  # solved examples put before each prompt: rows of the template's columns and response
    tools: str = ""  # JSON list of tool descriptions for the chat template

    # completions
    max_new_tokens: int = 256  # most tokens of a completion
    temperature: float = 0.0  # 0 takes the likeliest token, more draws from softmax(logits / temperature)
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share
    batch_size: int = 8  # prompts of a batch
    seed: int = 0  # of what is drawn
    output: str = ""  # file to write; default: completions.jsonl, with score submission.csv
    overwrite: bool = False  # replace an existing output; otherwise it is kept beside it as NAME.previous

    # scores
    score: bool = False  # read each completion as a score of two classes
    prompt: str = ""  # with score, instead of text: a named prompt (prompts/NAME.txt) or the path of such a file
    label_names: tuple[str, ...] = ()  # of base and adapter: names of the two classes, the negative first
    label_words: tuple[str, ...] = ()  # verbalizer for each class (aliases separated by |); default: the prompt's
    label_column: str = "label"  # of base and adapter: column of the label, where there is one
    submission: str = "id,label"  # names of the two columns id and label; empty: id, prediction and both probabilities
    answer: str = "auto"  # of a submission: label, probability (of the second class), or auto: by the run's metric
    by_column: str = ""  # metrics are also given for each value of this column
    force: bool = False  # write the output even when none of the first answers can be read


if __name__ == "__main__":  # help and typos are answered before torch is loaded, which takes seconds
    cli.early(GenerateConfig, {}, __doc__)

import functools
import hashlib
import itertools
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

import answers
import chats
import checkpoint
import checks
import configs
import data
import ddp
import files
import foreign
import numerics
import parts
import predictions
import prompts
import run_folder
import seals
import writer
from errors import UserError

OF_SCORES = "prompt label_names label_words label_column submission answer by_column force".split()
OF_CHATS = "chat system examples tools".split()
NEEDS = {  # a field given by hand that has no effect without another ("!": with it)
    **dict.fromkeys(OF_SCORES, "score"),
    **dict.fromkeys(OF_CHATS, "!score"),
    "answer": "score submission",
    "top_p": "temperature",
    "seed": "temperature",
}
OF_BASE = ("quant",)
SCORED_OF_BASE = tuple("text prompt label_names label_words label_column quant max_length".split())


def idle_fields(cfg: GenerateConfig) -> list[str]:
    """Fields of a base that are set although a run, which has its own, is to write."""
    if (cfg.base or cfg.adapter) and not cfg.runs:
        return []
    names = SCORED_OF_BASE if cfg.score else OF_BASE
    return [f"--{name}" for name in names if getattr(cfg, name) != getattr(GenerateConfig, name)]


CLASHES = [  # (message, test)
    (
        lambda cfg: f"--runs {cfg.runs} with --adapter: a run has its own; give one or the other",
        lambda cfg: cfg.runs and cfg.adapter,
    ),
    (
        lambda cfg: f"{', '.join(idle_fields(cfg))}: no effect without --base or --adapter, as a run has its own",
        lambda cfg: idle_fields(cfg),
    ),
    (
        lambda cfg: f"--label_names {','.join(cfg.label_names)}: --score expects the names of two classes",
        lambda cfg: cfg.score and (cfg.base or cfg.adapter) and not cfg.runs and len(cfg.label_names) != 2,
    ),
    (
        lambda cfg: f"--output {cfg.output}: expected a name that ends in .jsonl",
        lambda cfg: not cfg.score and not cfg.output.endswith(".jsonl"),
    ),
    (
        lambda cfg: f"--output {cfg.output}: expected a name that ends in .csv or .jsonl",
        lambda cfg: cfg.score and not cfg.output.endswith((".csv", ".jsonl")),
    ),
    (
        "--system has no effect with --chat no",
        lambda cfg: cfg.chat == "no" and cfg.system != GenerateConfig.system,
    ),
    ("--tools has no effect with --chat no", lambda cfg: cfg.chat == "no" and cfg.tools),
]


def main(argv: list[str]) -> dict:
    cfg, given = cli.parse(GenerateConfig, {}, argv, __doc__)
    if not cfg.output:
        cfg = replace(cfg, output="submission.csv" if cfg.score else "completions.jsonl")
    checks.check(cfg, given, NEEDS, CLASHES)
    if cfg.score:
        return answers.score(cfg)
    return complete(cfg, given)


def complete(cfg: GenerateConfig, given: set[str]) -> dict:
    """Prompts of a file, a pipe or a terminal, completed in batches."""
    world = ddp.setup()

    # ---- what writes ------------------------------------------------------------------------------------------------
    if (cfg.base or cfg.adapter) and not cfg.runs:
        name = cfg.adapter or cfg.base
        source = writer.of_base(cfg.base, cfg.adapter, cfg.quant)
    else:
        name = run_folder.finished_run(cfg.runs, cfg.outputs, "cpt.py")
        source = writer.of_run(name, cfg.base)
        cfg = as_trained(cfg, given, source.config, name)
    precision, _ = numerics.choose_precision(cfg.precision, world, source.config.base)

    # ---- prompts, before any weight is loaded -----------------------------------------------------------------------
    live = not cfg.input and sys.stdin.isatty()
    if live and (world.size > 1 or "output" in given):
        raise UserError("a terminal has one process and no --output: give prompts with --input FILE or through a pipe")
    if not live:
        checks.need_output(cfg.output, "--output", cfg.input, cfg.examples, name)
    rows = [] if live else read_prompts(cfg, world)
    maker = chats.prompter(cfg, given, source.tokenizer, rows)
    pieces = [maker.pieces(row, f"row {i + 1}") for i, row in enumerate(rows)]
    if live:
        pieces = [maker.pieces(line_as_row(cfg, "?"), "a line")]  # to find what is wrong before the first line
    ids, report = writer.encode_prompts(source.tokenizer, pieces, cfg.max_length, maker.chat)
    writer.check_room(source.config.base, max(map(len, ids)), cfg.max_new_tokens)
    size = "lines of the terminal" if live else f"{len(rows):,} in batches of {cfg.batch_size}; {report}"
    draw = f"temperature {cfg.temperature:g}, top_p {cfg.top_p:g}" if cfg.temperature else "greedy"
    plan = f"{name}: prompts {maker.reason}: {size}; {draw}, at most {cfg.max_new_tokens} new tokens each, {precision}"
    ddp.say(world, plan)

    # ---- complete and write -----------------------------------------------------------------------------------------
    lm, matched = foreign.load_writer(source, world, precision)
    ddp.say(world, matched)
    model = writer.Writer(lm, source.tokenizer, precision, cfg.max_new_tokens, cfg.temperature, cfg.top_p)
    started = time.perf_counter()
    if live:
        batches = typed(cfg, source, maker, model)
    else:
        batches = to_file(cfg, world, rows, pieces, ids, report, model)
    counts = Counter()
    for completions in batches:
        counts["rows"] += len(completions)
        counts["tokens"] += sum(map(len, completions))
        counts["finished"] += sum(completion[-1] in model.stops for completion in completions)
    seconds = time.perf_counter() - started
    template = "".join(text for is_users, text in pieces[0] if not is_users)
    return {
        "run": str(name),
        "rows": counts["rows"],
        "output": "" if live else cfg.output,
        "finished": counts["finished"],
        "cut": report.cut_rows,
        "prompt_hash": hashlib.sha256(template.encode()).hexdigest(),
        "tokens_per_second": round(counts["tokens"] / seconds, 1),
        "seconds": round(seconds, 2),
    }


def as_trained(cfg: GenerateConfig, given: set[str], trained: configs.CptConfig, run: Path) -> GenerateConfig:
    """The config with the prompts that the run was trained on, where nothing else was given by hand: those of pairs,
    or the plain beginnings of documents.
    """
    own = {"chat": "no", "max_length": trained.max_length}
    texts = run / "texts.json"
    if seals.has(texts) and checkpoint.load_json(texts).get("pairs"):
        own |= {"chat": trained.chat, "system": trained.system}
        if trained.text != "{text}":
            own["text"] = trained.text
    return replace(cfg, **{name: value for name, value in own.items() if name not in given})


# ---- prompts of a file, a pipe or a terminal ------------------------------------------------------------------------


def read_prompts(cfg: GenerateConfig, world: ddp.World) -> list[dict[str, str]]:
    """The rows of the input file, or one for each line of stdin, blank ones left out; of a pipe rank 0 reads.

    Raises UserError when there is none.
    """
    if cfg.input:
        rows = files.read_rows(cfg.input, "input")
    else:
        text = ddp.from_rank0(world, lambda: sys.stdin.buffer.read().decode("utf-8-sig", errors="surrogateescape"))
        lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
        rows = [line_as_row(cfg, line) for line in lines]
    if not rows:
        raise UserError("no prompts: give them with --input FILE, or one a line through a pipe")
    return rows[: cfg.limit or None]


def line_as_row(cfg: GenerateConfig, line: str) -> dict[str, str]:
    """A line of the terminal or a pipe, as the template's only column."""
    columns = files.template_columns(cfg.text)
    if len(columns) > 1:
        raise UserError(f"--text names the columns {', '.join(columns)}, a line has one: give them with --input FILE")
    return {columns[0]: line}


def typed(cfg: GenerateConfig, source: foreign.Given, maker: chats.Prompter, model: writer.Writer):
    """Print the completion of each line typed at the terminal and yield it, until Ctrl-D or Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in itertools.count():
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            pieces = maker.pieces(line_as_row(cfg, line), "this line")
            (ids,), _ = writer.encode_prompts(source.tokenizer, [pieces], cfg.max_length, maker.chat)
            writer.check_room(source.config.base, len(ids), cfg.max_new_tokens)
        except UserError as e:  # the next line may be better
            print(f"error: {e}", file=sys.stderr)
            continue
        completions = model.complete([ids], ddp.micro_seed(cfg.seed, number, 0))
        print(model.text(ids, completions[0]), flush=True)
        yield completions


def to_file(cfg: GenerateConfig, world: ddp.World, rows, pieces, prompts_ids, report: data.TokenReport, model):
    """Yield the completions of each round of batches, kept before the next one begins; then write all of them."""

    def complete_batch(batch: list[list[int]], number: int) -> list[list[int]]:
        return model.complete(batch, ddp.micro_seed(cfg.seed, number, 0))

    ids = ids_of_prompts(cfg, rows, world)
    progress = model.progress(cfg.output, prompts_ids, cfg.batch_size, cfg.seed)
    complete_batch = progress.once(complete_batch)
    lines = []
    bar = tqdm(total=len(rows), unit="row", disable=world.rank != 0, file=sys.stderr)
    for first, completions in writer.in_batches(world, prompts_ids, cfg.batch_size, complete_batch):
        bar.update(len(completions))
        for i, completion in enumerate(completions, first):
            prompt = prompts.plain(pieces[i])
            if report.cut_rows:  # what was read may be less than the row's prompt
                prompt = model.tokenizer.decode(prompts_ids[i])
            record = {"id": ids[i], "prompt": prompt, "completion": model.text(prompts_ids[i], completion)}
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        yield completions
    bar.close()
    if world.rank == 0:
        predictions.write_output(cfg, "".join(lines))
        parts.remove(cfg.output)


def ids_of_prompts(cfg: GenerateConfig, rows, world: ddp.World) -> list[str]:
    """The ids of a file's rows; of lines of a pipe their index."""
    if not cfg.input:
        return [str(i) for i in range(len(rows))]
    say = functools.partial(ddp.say, world)
    return predictions.ids_of(cfg, "id", rows, cfg.input, files.template_columns(cfg.text), say).values


if __name__ == "__main__":
    ddp.launch(main)
