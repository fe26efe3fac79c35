"""Predict with a finished run, or with a base and a public adapter.

    python infer.py                                             # the newest finished run on its own test data
    python infer.py --runs outputs/tiny__base/tiny/run_0 --input new.csv --output predictions.jsonl --submission ""
    torchrun --nproc_per_node=2 infer.py --input test.csv --submission "id,label"
    python infer.py --export merged/                            # a plain transformers model, the adapter merged
    python infer.py --base FacebookAI/roberta-base --adapter folder/of/peft --input new.csv --text "{body}"
    python infer.py --base Qwen/Qwen2.5-0.5B --head label_words --label_names yes,no --text "{q}" --input new.csv
    python infer.py --generate --runs outputs/tiny__base/papers/run_0        # a run of cpt.py completes what you type
    python infer.py --generate --base Qwen/Qwen2.5-0.5B-Instruct --input prompts.jsonl --output completions.jsonl

The output keeps the order of the input. `python infer.py --help` lists every field.
"""

import csv
import hashlib
import io
import itertools
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

import checkpoint
import configs
import data
import ddp
import decide
import evaluate
import metrics
import model as models
import prompts
import resume
from configs import InferConfig, UserError


def main(argv: list[str]) -> dict:
    # ---- config and run ---------------------------------------------------------------------------------------------
    cfg, hand = configs.parse(InferConfig, {}, argv, __doc__)
    cfg = configs.of_generation(cfg, hand)
    configs.check(cfg, hand)
    if cfg.generate:
        return generate(cfg, hand)
    given = evaluate.given_model(cfg) if cfg.base or cfg.adapter else None
    path = Path(cfg.adapter or cfg.base) if given else find_run(cfg)
    train_cfg, labels = (given.config, given.labels) if given else evaluate.run_facts(path)
    limit = configs.seconds(cfg.time_limit)
    foreign = evaluate.foreign(given.adapter, given.config.base) if given else ""
    if foreign and not (cfg.force or cfg.export):
        raise evaluate.Degenerate(f"{foreign}: nothing was scored (--force where it is the same model by another name)")
    if cfg.merge and train_cfg.quant != "none":
        raise UserError(f"--merge: run {path} is quantized, which takes no update; --export DIR merges its 16-bit base")
    members = [] if given else list(configs.members(train_cfg))
    if cfg.export and len(members) > 1:
        raise UserError(f"--export: {path} is {len(members)} runs; name one of them, such as {path / members[0]}")
    source = cfg.input or train_cfg.test_data
    world = ddp.setup()
    if cfg.export and not source:
        return export(cfg, path, given, world, [])
    if not source:
        raise UserError(f"{path} names no test_data: give the rows to predict with --input FILE")

    # ---- rows, before any weight is loaded --------------------------------------------------------------------------
    rows = data.read_rows(source, "input")[: cfg.limit or None]
    columns = data.template_columns(train_cfg.text)
    data.need_columns(rows, columns + [cfg.by_column] * bool(cfg.by_column), source, "input")
    as_probability(cfg, train_cfg, labels)
    decoded = data.decode_bytes_literals(rows, columns)
    empty = data.empty_rows(rows, columns)
    ddp.say(
        world,
        f"run {path}: {len(rows):,} rows of {source}" + (f", {decoded} decoded bytes literals" if decoded else ""),
    )
    if cfg.export:
        return export(cfg, path, given, world, rows[:16])
    if empty:
        ddp.say(
            world, f"warning: {len(empty)} rows have an empty text (first: row {empty[0] + 1}); they are scored as such"
        )
    ids = [row.get(train_cfg.id_column, str(i)) for i, row in enumerate(rows)]

    known = known_labels(rows, train_cfg, labels, lambda words: ddp.say(world, words))
    if known is None and cfg.by_column:
        ddp.say(world, f"--by_column {cfg.by_column}: the rows have no labels, so there are no metrics")
    if known is None and any(row.get(train_cfg.label_column, "").strip() for row in rows):
        ddp.say(world, f"column {train_cfg.label_column} does not hold this run's labels in every row: no metrics")
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)

    # ---- score ------------------------------------------------------------------------------------------------------
    if cfg.scoring == "generate":
        return generate_answers(cfg, path, train_cfg, labels, world, rows, ids, known)
    csvs = {path: csv_member(path, train_cfg, labels, ids) for path in cfg.runs[1:] if path.endswith(".csv")}
    blend = blending(cfg, train_cfg, labels) if len(cfg.runs) > 1 else None
    run = load(cfg, path, given, world, "")
    run.decision = blend.decision if blend else run.decision
    if cfg.threshold:
        run.decision = decision_at(run, cfg.threshold)
    if not cfg.force:
        ddp.say(world, evaluate.preflight(run, rows, known, cfg.max_tokens))
    started = time.perf_counter()
    logits, report = run.logits(rows, cfg.max_tokens, time_left(limit, len(cfg.runs)))
    missing, prior = limit and np.isnan(logits).any(axis=1), prior_logits(train_cfg, shares_of(path, train_cfg, labels))
    if blend:
        found = [logits]
        for left, other in zip(range(len(cfg.runs) - 1, 0, -1), cfg.runs[1:], strict=True):
            more = None if other in csvs else evaluate.load_run(other, world, cfg.precision)
            z = csvs[other] if more is None else more.logits(rows, cfg.max_tokens, time_left(limit, left))[0]
            found.append(z if z.shape == logits.shape else np.hstack([0 * z, z]))  # a regression beside two classes
        missing = limit and np.isnan(found).any(axis=(0, 2))
        found = [np.where(np.isnan(z), prior, z) if limit else z for z in found]
        logits = decide.ensemble(found, cfg.ensemble, blend.weights, blend.task).astype(np.float32)
        ddp.say(world, blend.said)
    missing = np.flatnonzero(missing) if limit else np.zeros(0, int)
    logits[missing] = prior
    seconds = time.perf_counter() - started
    ddp.say(world, f"tokens: {report}")
    ddp.say(world, decide.distribution(logits, list(labels.names), train_cfg.task))
    reason = decide.degenerate(np.delete(logits, missing, axis=0)) if len(missing) < len(rows) else ""
    if reason and not cfg.force:
        raise evaluate.Degenerate(f"{reason}; nothing was written (--force writes it all the same)")

    # ---- metrics and output -----------------------------------------------------------------------------------------
    result = {"run": str(path), "rows": len(rows), "output": cfg.output}
    if known is not None and np.isfinite(logits).all():
        ddp.say(world, metrics.summary(train_cfg.task, logits, known, labels.names))
        for key, scores in decided_metrics(run, logits, known).items():
            result[key] = {k: round(v, 6) for k, v in scores.items()}
        by = evaluate.by_value(train_cfg, cfg.by_column, rows, logits, known, lambda words: ddp.say(world, words))
        result |= by
    if limit:
        result["unscored"] = len(missing)
        ddp.say(world, f"--time_limit {cfg.time_limit}: {len(missing):,} of {len(rows):,} rows were not scored in time")
    if world.rank == 0:
        write_output(cfg, ids, run, logits, missing, shares_of(path, train_cfg, labels))
        write_lines(cfg, "unscored", ["id"], [[ids[i]] for i in missing])
    return {**result, "examples_per_second": round(len(rows) / seconds, 2), "seconds": round(seconds, 2)}


def time_left(limit: float, members: int) -> float:
    """Seconds for the next of some members to score all rows within the limit, the writing left out; 0 without one."""
    return max(1e-3, (limit - resume.process_seconds() - 1.0) / max(1, members)) if limit else 0.0


def shares_of(path: Path, cfg, labels: data.Labels) -> np.ndarray:
    """(C,) shares of the training rows that have each label, or a regression's mean; equal ones without a run."""
    facts = checkpoint.load_json(path / "labels.json") if (path / "labels.json").is_file() else {}
    count = max(1, len(labels.values))
    return np.array(facts.get("shares") or [1 / count] * count)


def prior_logits(cfg, shares: np.ndarray) -> np.ndarray:
    """(C,) logits that say these shares."""
    if cfg.task == "regression":
        return shares.astype(np.float32)
    p = np.clip(shares, 1e-6, 1 - 1e-6)
    return (np.log(p) - (np.log1p(-p) if cfg.task == "multi_label" else 0)).astype(np.float32)


def write_lines(cfg: InferConfig, what: str, header: list[str], lines: list[list]) -> None:
    """A CSV beside the output, OUTPUT.what.csv, of rows that went wrong; without any an older one is removed."""
    path = Path(f"{cfg.output}.{what}.csv")
    path.unlink(missing_ok=True)
    if lines:
        out = io.StringIO(newline="")
        csv.writer(out, lineterminator="\n").writerows([header, *lines])
        checkpoint.write_atomic(path, out.getvalue())
        print(f"{len(lines):,} rows {what}: {path}")


def generate_answers(cfg: InferConfig, path: Path, train_cfg, labels, world, rows, ids, known) -> dict:
    """--scoring generate: the model writes its answers, and they are read as scores; those that cannot be read are
    counted, written beside the output and left empty in it, never filled in.
    """
    if len(labels.values) != 2 or train_cfg.head != "label_words":
        raise UserError("--scoring generate: expected two classes and --head label_words, whose words an answer says")
    given_by_hand = cfg.base or cfg.adapter
    if not given_by_hand and len(configs.members(train_cfg)) > 1:
        raise UserError(f"--scoring generate: {path} is several runs; name one of them with --runs")
    if not given_by_hand and not train_cfg.rank:
        raise UserError(f"--scoring generate: {path} trained its whole base as a classifier, which writes no text")
    words = train_cfg.label_words or labels.names
    source = cfg if given_by_hand else replace(cfg, base=train_cfg.base, adapter=str(path / "best"))
    given = evaluate.given_language_model(replace(source, quant=train_cfg.quant), None)
    precision, _ = models.choose_precision(cfg.precision, world.device)
    lm, report = evaluate.load_language_model(given, world, precision)
    ddp.say(world, report)
    pieces = [prompts.render(train_cfg.text, row) for row in rows]
    rules = data.cutting_rules(train_cfg.text, train_cfg.kept, train_cfg.budgets)
    encoded, told = evaluate.encode_prompts(given.tokenizer, pieces, train_cfg.max_length, rules=rules)
    check_room(given.config.base, max(map(len, encoded)), cfg.max_new_tokens)
    ddp.say(world, f"tokens: {told}")
    order = np.argsort([-len(row) for row in encoded], kind="stable")  # equal lengths together: little padding
    batches = [order[i : i + cfg.batch_size] for i in range(0, len(order), cfg.batch_size)]
    stops, written, started = evaluate.stop_ids(lm, given.tokenizer), {}, time.perf_counter()
    for j, batch in enumerate(tqdm(batches, disable=world.rank != 0, unit="batch", file=sys.stderr)):
        if j % world.size == world.rank:
            how = precision, cfg.max_new_tokens, cfg.temperature, cfg.top_p, cfg.seed + j, stops
            texts = evaluate.generate(lm, given.tokenizer, [encoded[i] for i in batch], *how)
            written |= dict(zip(batch.tolist(), texts, strict=True))
        if j == 0 and not cfg.force and world.rank == 0:
            check_answers([prompts.parse_answer(t, words) for t in written.values()], len(batch))
    written = {i: text for part in ddp.gather_objects(world, written) for i, text in part.items()}
    found = [prompts.parse_answer(written[i], words) for i in range(len(rows))]
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
        write_records(cfg, train_cfg.id_column, labels, ids, chosen, shares, as_probability(cfg, train_cfg, labels))
        bad = [[ids[i], found[i][1], written[i]] for i in range(len(rows)) if found[i][0] is None]
        write_lines(cfg, "malformed", ["id", "why", "answer"], bad)
    return {**result, "examples_per_second": round(len(rows) / seconds, 2), "seconds": round(seconds, 2)}


def check_answers(found: list[tuple], count: int) -> None:
    """Raise Degenerate where none of the first answers can be read: the prompt, the words or the adapter is wrong."""
    if count >= 4 and all(score is None for score, _ in found):
        why = ", ".join(f"{how} {n}" for how, n in Counter(how for _, how in found).items())
        raise evaluate.Degenerate(
            f"preflight: none of the first {count} answers can be read ({why}); nothing was written (--force goes on)"
        )


def as_probability(cfg: InferConfig, train_cfg, labels: data.Labels) -> bool:
    """Whether a submission holds the probability of the last of two classes, as rankings are judged by."""
    two = train_cfg.task == "single_label" and len(labels.values) == 2
    wanted = two and train_cfg.metric == "roc_auc" if cfg.answer == "auto" else cfg.answer == "probability"
    if wanted and not two:
        raise UserError(f"--answer probability: it is that of the last of two classes; this run has {labels.values}")
    return wanted


def export(cfg: InferConfig, path: Path, given, world: ddp.World, rows: list[dict[str, str]]) -> dict:
    """Merge the adapter into the 16-bit base, write it with transformers' own class, and say how far logits moved.

    rows: what live and merged logits are compared on. Raises UserError on several processes.
    """
    if world.size > 1:
        raise UserError("--export: one process does it: python infer.py --export DIR")
    run = load(cfg, path, given, world, "")
    before = run.logits(rows)[0] if rows else np.zeros((0, 1))
    if run.config.quant != "none":
        run = load(cfg, path, given, world, "none")
    name = evaluate.export(Path(cfg.export), run)
    after = run.logits(rows)[0] if rows else before
    drift, flips = float(np.abs(after - before).max(initial=0)), int((after.argmax(1) != before.argmax(1)).sum())
    note = f"logits of {len(rows)} rows moved by at most {drift:.2g}, {flips} predictions changed"
    ddp.say(world, f"{cfg.export}: {name}; {note if rows else 'not compared: no rows (name some with --input)'}")
    return {"run": str(path), "export": cfg.export, "architecture": name, "rows": len(rows), "drift": drift}


def load(cfg: InferConfig, path: Path, given, world: ddp.World, quant: str) -> evaluate.Run:
    """The run, or the given base and adapter; quant: another way to store the base, or an empty string."""
    if not given:
        return evaluate.load_run(path, world, cfg.precision, cfg.merge, quant)
    known = replace(given, config=replace(given.config, quant=quant or given.config.quant))
    run, report = evaluate.load_given(known, world, cfg.precision, cfg.merge)
    ddp.say(world, report)
    return run


def decision_at(run: evaluate.Run, probability: float) -> decide.Decision:
    """The run's decision with one probability for a threshold. Raises UserError where argmax or a number decides."""
    if run.config.task == "regression":
        raise UserError(f"--threshold {probability:g}: a regression's output is no probability; leave it out")
    try:
        return (run.decision or decide.plain(run.config.task, run.model.outputs)).with_threshold(probability)
    except ValueError as e:
        raise UserError(f"--threshold {probability:g}: {e}") from None


# ---- ensembles ------------------------------------------------------------------------------------------------------


@dataclass
class Blend:
    """How several runs become one, fitted on their validation rows before any weight is loaded."""

    task: str  # as decide.ensemble knows it
    weights: np.ndarray | None
    decision: decide.Decision | None
    said: str


def blending(cfg: InferConfig, train_cfg, labels: data.Labels) -> Blend:
    """What the ensemble's validation rows say: weights, thresholds and calibration, where all runs share those rows.

    Raises UserError for runs of other tasks or labels, and for weights without rows to fit them on.
    """
    runs = [Path(p) for p in cfg.runs if not p.endswith(".csv")]
    for run in runs[1:]:
        other, theirs = evaluate.run_facts(run)
        if cfg.ensemble == "rank" and other.task == "regression" and len(labels.values) == 2:
            said = f"rank of {len(cfg.runs)} members, a regression's output beside the log-odds of {labels.values[1]}"
            return Blend(train_cfg.task, None, None, said)
        if (other.task, theirs.values) != (train_cfg.task, labels.values):
            raise UserError(
                f"--runs {run}: its task or labels are not those of {runs[0]}: {other.task} {theirs.values}"
            )
    if train_cfg.task == "regression":
        if cfg.ensemble in ("mean_prob", "weighted"):
            raise UserError(f"--ensemble {cfg.ensemble}: a regression has no probabilities; take mean_logit or rank")
        return Blend("multi_label", None, None, f"{cfg.ensemble} of {len(cfg.runs)} members")
    known = [evaluate.validation_rows(run, train_cfg, labels) for run in runs]
    judged = {checkpoint.load_json(run / "result.json").get("val_sha256") for run in runs}  # None of older runs
    shared = len(runs) == len(cfg.runs) and len(judged) == 1
    shared = shared and all(k[0] == known[0][0] and np.array_equal(k[1], known[0][1]) for k in known)
    if cfg.ensemble == "weighted" and not shared:
        raise UserError("--ensemble weighted: the members were not validated on the same rows; take mean_logit or rank")
    logits, truth = [k[2] for k in known], known[0][1]
    weights = decide.fit_weights(logits, truth, train_cfg.task) if cfg.ensemble == "weighted" else None
    said = f"{cfg.ensemble} of {len(cfg.runs)} members" + (
        f", weights {np.round(weights, 3)}" if weights is not None else ""
    )
    if not shared or cfg.ensemble == "rank" or len(truth) < 10:  # ranks depend on the rows they are among
        return Blend(train_cfg.task, weights, None, f"{said}; argmax or probability 0.5 decides")
    both = decide.ensemble(logits, cfg.ensemble, weights, train_cfg.task)
    decision = decide.fit_decision(train_cfg.task, both, truth, evaluate.threshold_kind(train_cfg))
    return Blend(train_cfg.task, weights, decision, f"{said}; thresholds and calibration of their validation rows")


def csv_member(path: str, cfg, labels: data.Labels, ids: list[str]) -> np.ndarray:
    """fp32 logits (N, C) of another system, by the ids of its CSV: log-odds or log of its probabilities.

    Raises UserError for ids or columns that the file lacks.
    """
    found, kinds = data.read_rows(path, "runs"), ("logit_", "probability_") if labels.values else ("",)
    names = labels.values or ("prediction",)
    kind = next((k for k in kinds if k + names[0] in found[0]), kinds[-1])
    data.need_columns(found, [cfg.id_column, *(kind + n for n in names)], path, "runs")
    by_id = {row[cfg.id_column]: row for row in found}
    lost = [i for i in ids if i not in by_id]
    if lost or len(by_id) != len(found):
        raise UserError(f"--runs {path}: {len(lost)} of {len(ids)} ids are not in it, or one stands twice")
    values = np.stack([data.encode_numbers([by_id[i][kind + n] for i in ids], path) for n in names], axis=1)
    if kind != "probability_":
        return values
    p = np.clip(values.astype(np.float64), 1e-12, 1)
    other = np.log1p(-np.minimum(p, 1 - 1e-12)) if cfg.task == "multi_label" else 0
    return (np.log(p) - other).astype(np.float32)


def find_run(cfg: InferConfig) -> Path:
    """The run named first by --runs, or the newest finished one. Raises UserError when there is none."""
    if cfg.runs:
        return Path(cfg.runs[0])
    one, facts = ("cpt", ("config.json", "labels.json")) if cfg.generate else ("train", ("labels.json",))
    newest = checkpoint.newest_finished(cfg.outputs, *facts)
    if newest is None:
        found = f"no finished run of {one}.py under {cfg.outputs}/"
        raise UserError(f"{found}: train one (python {one}.py), or name one with --runs")
    return newest


def known_labels(rows: list[dict[str, str]], train_cfg, labels: data.Labels, say) -> np.ndarray | None:
    """Labels of the rows where every row has one that this run knows, else None. Of several labels a row the unknown
    ones are left out, and named.
    """
    columns = train_cfg.label_columns or (train_cfg.label_column,)
    if not all(c in rows[0] for c in columns):
        return None
    try:
        if train_cfg.task != "multi_label":
            return data.encode_targets(train_cfg, rows, labels, "input")
        sets = data.label_sets(
            rows, train_cfg.label_column, train_cfg.label_columns, train_cfg.label_delimiter, "input"
        )
        unknown = sorted({v for one in sets for v in one} - set(labels.values))
        if unknown:
            say(f"warning: this run does not know the labels {data._few(unknown, 10)}: metrics are over those it knows")
        return data.encode_label_sets([[v for v in one if v not in unknown] for one in sets], labels, "input")
    except (UserError, KeyError):
        return None


def decided_metrics(run: evaluate.Run, logits: np.ndarray, known: np.ndarray) -> dict[str, dict[str, float]]:
    """`metrics` of what is written; where a threshold of the run or the user decides, `undecided` without it."""
    plain, task, decision = metrics.of_task(run.config.task, logits, known), run.config.task, run.decision
    if not decision or not decision.thresholds:
        return {"metrics": plain}
    if task == "multi_label":
        return {"metrics": metrics.multilabel(logits, known, decision.thresholds), "undecided": plain}
    shifted = logits - np.array([0.0, decision.thresholds[0]])  # then class 1 wins where z1 - z0 is above it
    return {"metrics": metrics.classification(shifted, known), "undecided": plain}


def write_output(
    cfg: InferConfig, ids: list[str], run: evaluate.Run, logits: np.ndarray, missing: np.ndarray, prior: np.ndarray
) -> None:
    """Write predictions in one piece: two named columns, or id, prediction and a probability for each class.

    A regression's prediction is its output as it is, neither cut to a range nor rounded: ranks would be lost. Several
    labels are a list in JSONL, and stand between the run's delimiters in CSV.
    """
    labels, id_column = run.labels, run.config.id_column
    predicted, shares = run.decided(logits)
    if run.config.task != "regression":
        shares[missing] = prior  # as they are: nothing calibrates a row that was not scored
    chosen = data.answers(run.config.task, predicted, labels)
    if run.config.task == "multi_label" and not cfg.output.endswith(".jsonl"):
        chosen = [run.config.label_delimiter.join(row) for row in chosen]
    write_records(cfg, id_column, labels, ids, chosen, shares.tolist(), as_probability(cfg, run.config, labels))


def write_records(
    cfg: InferConfig, id_column: str, labels: data.Labels, ids, chosen, shares, probability: bool
) -> None:
    """Write the two columns of a submission, or id, prediction and a probability for each class, in one piece."""
    if cfg.submission:
        header = [c.strip() for c in cfg.submission.split(",")]
        answers = [share[-1] for share in shares] if probability else chosen
        records = [dict(zip(header, pair, strict=True)) for pair in zip(ids, answers, strict=True)]
    else:
        names = [f"probability_{v}" for v in labels.values]
        records = [
            {id_column: i, "prediction": c, **dict(zip(names, p, strict=True))}
            for i, c, p in zip(ids, chosen, shares, strict=True)
        ]
    out = Path(cfg.output)
    if out.suffix == ".jsonl":
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    else:
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        text = buffer.getvalue()
    keep_previous(out, cfg.overwrite)
    checkpoint.write_atomic(out, text)
    print(f"wrote {len(records):,} predictions to {out}")


def keep_previous(out: Path, overwrite: bool) -> None:
    """Copy an existing output beside it; the old file stays in place until the new one is there."""
    if out.exists() and not overwrite:
        names = (out.with_name(f"{out.name}.previous{i or ''}") for i in itertools.count())
        kept = next(name for name in names if not name.exists())
        shutil.copyfile(out, kept)
        print(f"{out} existed: it is kept as {kept}")


# ---- completions ----------------------------------------------------------------------------------------------------


def generate(cfg: InferConfig, hand: set[str]) -> dict:
    """The story of --generate: prompts of a file, a pipe or a terminal, completed in batches, written as they come."""
    world, name = ddp.setup(), cfg.adapter or cfg.base
    run = None if name else find_run(cfg)
    given = evaluate.given_language_model(cfg, run)
    cfg, tokenizer = as_trained(cfg, hand, given.config, run) if run else cfg, given.tokenizer
    precision, _ = models.choose_precision(cfg.precision, world.device)

    # ---- prompts, before any weight is loaded -----------------------------------------------------------------------
    live = not cfg.input and sys.stdin.isatty()
    if live and (world.size > 1 or "output" in hand):
        raise UserError("a terminal has one process and no --output: give prompts with --input FILE or through a pipe")
    columns = data.template_columns(cfg.text)
    if not cfg.input and len(columns) > 1:
        raise UserError(f"--text names the columns {', '.join(columns)}, a line has one: give them with --input FILE")
    rows = data.read_rows(cfg.input, "input") if cfg.input else [] if live else piped_rows(columns[0], world)
    rows = rows[: cfg.limit or None]
    pieces_of, chat, why = prompt_maker(cfg, hand, tokenizer, rows)
    pieces = [pieces_of(row, f"row {i + 1}") for i, row in enumerate(rows)] or [pieces_of({columns[0]: "?"}, "a line")]
    ids, report = evaluate.encode_prompts(tokenizer, pieces, cfg.max_length, chat)
    check_room(given.config.base, max(map(len, ids)), cfg.max_new_tokens)
    how = f"temperature {cfg.temperature:g}, top_p {cfg.top_p:g}" if cfg.temperature else "greedy"
    size = "lines of the terminal" if live else f"{len(rows):,} in batches of {cfg.batch_size}; {report}"
    plan = f"{run or name}: prompts {why}: {size}; {how}, at most {cfg.max_new_tokens} new tokens each, {precision}"
    ddp.say(world, plan)

    # ---- complete and write -----------------------------------------------------------------------------------------
    lm, matched = evaluate.load_language_model(given, world, precision)
    ddp.say(world, matched)
    stops, pad = evaluate.stop_ids(lm, tokenizer), data.end_of_text(tokenizer, padding=True)

    def completed(batch: list[list[int]], number: int) -> list[list[int]]:
        draw = cfg.max_new_tokens, cfg.temperature, cfg.top_p, ddp.micro_seed(cfg.seed, number, 0)
        return models.complete(lm, batch, pad, stops, precision, *draw)

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
            record["completion"] = evaluate.completion_text(tokenizer, ids[i], answer)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        if first == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            keep_previous(out, cfg.overwrite)
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


def typed(cfg: InferConfig, given: evaluate.Given, pieces_of, chat: bool, completed):
    """Print the completion of each line typed at the terminal and yield it, until Ctrl-D."""
    for number in itertools.count():
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            return print()
        try:
            (ids,), _ = evaluate.encode_prompts(given.tokenizer, [pieces_of(line)], cfg.max_length, chat)
            check_room(given.config.base, len(ids), cfg.max_new_tokens)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            continue
        found = completed([ids], number)
        print(evaluate.completion_text(given.tokenizer, ids, found[0]), flush=True)
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
    room = getattr(models.load_config(base), "max_position_embeddings", None)
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
    columns, shots = data.template_columns(cfg.text), []
    whole = bool(rows) and "messages" in rows[0] and "text" not in hand
    data.need_columns(rows, ["messages"] if whole else columns, cfg.input, "input")
    if cfg.examples:
        shots = data.read_rows(cfg.examples, "examples")
        data.need_columns(shots, [*columns, "response"], cfg.examples, "examples")
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
        raise UserError(f"--tools {path}: cannot be read as JSON ({models.one_line(e)})") from None
    if path and not (isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools)):
        raise UserError(f"--tools {path}: expected a JSON list of tool descriptions (objects)")
    return tools


if __name__ == "__main__":
    ddp.launch(main)
