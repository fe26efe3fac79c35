"""Written answers as scores of two classes: the model completes each row's prompt, and what it writes is read."""

import functools
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

import checks
import data
import ddp
import evaluate
import files
import foreign
import metrics
import numerics
import parts
import predictions
import prompts
import run_folder
import trained
import writer
from answer_parser import parse_answer
from configs import TrainConfig
from errors import Degenerate, UserError
from labelling import Labels


@dataclass
class Subject:
    """What answers, and what its answers mean."""

    name: str  # of the run, the adapter or the base
    given: foreign.Given
    config: TrainConfig  # the template, the columns, what is cut first
    labels: Labels
    words: tuple[str, ...]  # verbalizers of the two classes


def subject(cfg) -> Subject:
    """The model that the settings name, checked before any weight is loaded.

    Raises UserError for what does not say two words, Degenerate for an adapter that seems to be another base's.
    """
    if (cfg.base or cfg.adapter) and not cfg.runs:
        given = writer.of_base(cfg.base, cfg.adapter, cfg.quant)
        if not cfg.force:
            foreign.refuse_other_base(given)
        same = ("prompt", "text", "label_words", "label_column", "max_length")
        fields = {name: getattr(cfg, name) for name in same}
        config = TrainConfig(base=given.config.base, head="label_words", **fields)
        if cfg.prompt:
            config = trained.prompted(config, given.tokenizer)
        labels = Labels(cfg.label_names, cfg.label_names)
        name = cfg.adapter or cfg.base
    else:
        name = run_folder.finished_run(cfg.runs, cfg.outputs)
        config, labels = trained.run_facts(name)
        if len(labels.values) != 2 or config.head != "label_words":
            raise UserError(f"run {name}: expected two classes and --head label_words, whose words an answer says")
        if not config.rank:
            raise UserError(f"run {name}: it trained its whole base as a classifier, which writes no text")
        if not (name / "best").is_dir():
            raise UserError(f"run {name}: it holds no best/ save (of several folds or seeds name one run with --runs)")
        base = cfg.base or config.base
        trained.need_base(name, base)
        given = writer.of_base(base, str(name / "best"), config.quant)
    words = config.label_words or labels.names
    if len(words) != 2:
        raise UserError(f"--label_words {','.join(words)}: expected those of two classes")
    return Subject(str(name), given, config, labels, words)


def score(cfg) -> dict:
    """The story of --score: answers that cannot be read are counted, written beside the output and left empty in it,
    never filled in.
    """
    world = ddp.setup()
    say = functools.partial(ddp.say, world)
    asked = subject(cfg)
    config, labels = asked.config, asked.labels

    # ---- rows, before any weight is loaded --------------------------------------------------------------------------
    source = cfg.input or config.test_data
    if not source:
        raise UserError(f"{asked.name} names no test_data: give the rows to score with --input FILE")
    checks.need_output(cfg.output, "--output", source, asked.name, config.train_data, config.val_data)
    rows = files.read_rows(source, "input")
    rows = rows[: cfg.limit or None]
    others = (*files.template_columns(config.text), config.label_column)
    ids = predictions.ids_of(cfg, config.id_column, rows, source, others, say)
    encoded, report = encode_rows(cfg, asked, rows, source)
    known = predictions.known_labels(rows, config, labels, say)
    if known is None and cfg.by_column:
        say(f"--by_column {cfg.by_column}: the rows have no labels, so there are no metrics")
    probability = predictions.as_probability(cfg, config, labels)
    writer.check_room(asked.given.config.base, max(map(len, encoded)), cfg.max_new_tokens)
    say(f"{asked.name}: {len(rows):,} rows of {source}; tokens: {report}")

    # ---- write and read the answers ---------------------------------------------------------------------------------
    precision, _ = numerics.choose_precision(cfg.precision, world, asked.given.config.base)
    lm, matched = foreign.load_writer(asked.given, world, precision)
    say(matched)
    options = precision, cfg.max_new_tokens, cfg.temperature, cfg.top_p
    started = time.perf_counter()
    answers = written(writer.Writer(lm, asked.given.tokenizer, *options), cfg, world, encoded, asked.words)
    seconds = time.perf_counter() - started
    readings = [parse_answer(answer, asked.words) for answer in answers]
    scores = np.array([np.nan if value is None else value for value, _ in readings])
    good = np.flatnonzero(np.isfinite(scores))
    forms = Counter(form for _, form in readings)
    say(f"{len(good):,} of {len(rows):,} answers can be read: {dict(forms)}")

    # ---- metrics and output -----------------------------------------------------------------------------------------
    result = {"run": asked.name, "rows": len(rows), "output": cfg.output, "malformed": len(rows) - len(good)}
    read = np.isfinite(scores[known.rows]) if known else np.zeros(0, bool)
    if read.any():
        judged, targets = known.rows[read], known.targets[read]
        logits = logits_of(scores[judged])
        values = metrics.of_task("single_label", logits, targets)
        values["accuracy_all"] = values["accuracy"] * read.mean()  # an answer that cannot be read is wrong
        result["metrics"] = {name: round(value, 6) for name, value in values.items()}
        result |= evaluate.by_value(config, cfg.by_column, [rows[i] for i in judged], logits, targets, say)
    if world.rank == 0:
        chosen, shares, malformed = [], [], []
        for i, p in enumerate(scores):
            if np.isnan(p):
                chosen.append("")
                shares.append(["", ""])
                malformed.append([ids.values[i], readings[i][1], answers[i]])
            else:
                chosen.append(labels.values[int(p > 0.5)])
                shares.append([1 - p, p])
        predictions.write_records(cfg, labels, ids, chosen, shares, probability)
        predictions.write_lines(cfg, "malformed", ["id", "why", "answer"], malformed)
        parts.remove(cfg.output)
    return {**result, "examples_per_second": round(len(rows) / seconds, 2), "seconds": round(seconds, 2)}


def encode_rows(cfg, asked: Subject, rows: list[dict[str, str]], source: str):
    """(token ids of each row's prompt, what encoding did), fields over max_length cut as the run's own settings say.

    Raises UserError for missing columns.
    """
    config = asked.config
    columns = files.template_columns(config.text)
    by_column = [cfg.by_column] if cfg.by_column else []
    files.need_texts(rows, columns, source, "input", by_column)
    files.decode_bytes_literals(rows, columns)
    pieces = [prompts.render(config.text, row) for row in rows]
    rules = data.cutting_rules(config.text, config.kept, config.budgets)
    return writer.encode_prompts(asked.given.tokenizer, pieces, config.max_length, rules=rules)


def written(model: writer.Writer, cfg, world: ddp.World, encoded: list[list[int]], words) -> list[str]:
    """The answer to each row, the same on every rank.

    Raises Degenerate where none of the first batch can be read: the prompt, the words or the adapter is wrong.
    """
    # Rows of equal lengths go together, which takes little padding; the longest batch comes first.
    order = np.argsort([-len(row) for row in encoded], kind="stable")
    longest_first = [encoded[i] for i in order]

    def complete(batch: list[list[int]], number: int) -> list[list[int]]:
        return model.complete(batch, cfg.seed + number)

    complete = model.progress(cfg.output, longest_first, cfg.batch_size, cfg.seed).once(complete)
    answers = [""] * len(encoded)
    bar = tqdm(total=len(encoded), unit="row", disable=world.rank != 0, file=sys.stderr)
    for first, completions in writer.in_batches(world, longest_first, cfg.batch_size, complete):
        for i, ids in enumerate(completions, first):
            answers[order[i]] = model.text(longest_first[i], ids)
        bar.update(len(completions))
        if first == 0 and not cfg.force:
            asked = {tuple(encoded[i]): answers[i] for i in order[: cfg.batch_size]}  # a repeated prompt counts once
            check_answers(list(asked.values()), words)
    bar.close()
    return answers


def check_answers(answers: list[str], words: tuple[str, ...]) -> None:
    """Raise Degenerate where none of the first answers can be read."""
    readings = [parse_answer(answer, words) for answer in answers]
    if len(answers) < 4 or any(value is not None for value, _ in readings):
        return
    forms = Counter(form for _, form in readings)
    why = ", ".join(f"{form} {count}" for form, count in forms.items())
    raise Degenerate(
        f"preflight: none of the first {len(answers)} answers can be read ({why}); nothing was written "
        "(--force continues)"
    )


def logits_of(scores: np.ndarray) -> np.ndarray:
    """(N, 2) logits whose softmax gives the second class these scores, up to one in a million."""
    p = np.clip(scores, 1e-6, 1 - 1e-6)
    return np.stack([np.zeros(len(p)), np.log(p / (1 - p))], axis=1).astype(np.float32)
