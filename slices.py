"""Cut a large training file into balanced, disjoint slices and a fixed validation file, and prove it.

    python slices.py --train_data pairs.csv --label_column is_correct --balance --val_size 5000 --slice_rows 20000
    python train.py --train_data slices/slice_0.csv --val_data slices/validation.csv ...
    python train.py --train_data slices/slice_1.csv --val_data slices/validation.csv --init_from outputs/.../run_0 ...

The files hold the very records of the input, byte for byte; where it has no id column, they get one with the row index.
slices.json is the proof, made from the written files: rows, labels and sha256 of each, and what any two of them share.
"""

from dataclasses import asdict, dataclass

import cli


@dataclass(frozen=True)
class SlicesConfig:
    """A large training file as slices and a validation file."""

    # data
    train_data: str = ""  # rows to cut: CSV, TSV or JSONL (also .gz), Parquet if pyarrow is installed
    task: str = "single_label"  # single_label, multi_label (any number of labels per row), or regression (numbers)
    label_column: str = "label"  # column of the label; multi_label: a JSON list, or labels separated by label_delimiter
    label_columns: tuple[str, ...] = ()  # multi_label: one column of 0 and 1 for each label, instead of label_column
    label_delimiter: str = "|"  # multi_label: separator of the labels in label_column
    label_names: tuple[str, ...] = ()  # class names in order, comma separated; default: the labels of the rows
    id_column: str = "id"  # id column; default: the row index
    group_column: str = ""  # rows with the same value here always stay together in one file
    text_columns: tuple[str, ...] = ()  # count rows with equal texts in these columns that are in different files

    # slices
    val_size: float = 0.1  # validation rows: a fraction below 1, or a count; drawn first, stratified by label
    balance: bool = False  # keep equally many rows of every class, as many as the rarest has
    slices: int = 0  # number of slices, of nearly equal size
    slice_rows: int = 0  # instead of slices: rows of each but the last; with group_column a maximum, kept roughly
    seed: int = 0  # seed of all draws

    # run
    output: str = "slices"  # new folder for slice_0, slice_1, ..., validation (named as train_data) and slices.json


if __name__ == "__main__":  # help and typos are answered before torch is loaded, which takes seconds
    cli.early(SlicesConfig, {}, __doc__)

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from operator import itemgetter, ne
from pathlib import Path

import numpy as np

import audit
import checkpoint
import checks
import ddp
import delimited
import files
import labelling
import splits
import spool
import strata
from errors import UserError, few, refuse

NEEDS = {"label_delimiter": "!label_columns"}
CLASHES = (
    ("--train_data is empty: give the CSV, TSV or JSONL file to cut", lambda cfg: not cfg.train_data),
    (
        "--slices {slices} --slice_rows {slice_rows}: give one of the two, above 0",
        lambda cfg: min(cfg.slices, cfg.slice_rows) != 0 or max(cfg.slices, cfg.slice_rows) == 0,
    ),
    ("--val_size {val_size}: expected a fraction or a count above 0", lambda cfg: cfg.val_size <= 0),
    (
        "--balance with --task {task}: only single_label has classes to balance",
        lambda cfg: cfg.balance and cfg.task != "single_label",
    ),
    (
        "--output {output}: it already exists and is not empty; name a new folder",
        lambda cfg: Path(cfg.output).is_file() or (Path(cfg.output).is_dir() and any(Path(cfg.output).iterdir())),
    ),
    (
        "--output {output}: {problem}; name another folder",
        lambda cfg: checks.folder_problem(cfg.output),
    ),
)


def main(argv: list[str]) -> dict:
    cfg, given = cli.parse(SlicesConfig, {}, argv, __doc__)
    checks.check(cfg, given, NEEDS, CLASHES)

    # ---- rows -------------------------------------------------------------------------------------------------------
    where = f"--train_data {cfg.train_data}"
    rows, records = read_records(cfg)
    labels = splits.labels_of(cfg, rows, where)
    ids = [row[cfg.id_column] for row in rows]
    duplicates = files.duplicates(ids)
    if duplicates:
        raise UserError(f"{where}: ids are duplicated ({few(duplicates)}): give an --id_column with unique values")
    every = splits.Split(rows, ids, labelling.encode_targets(cfg, rows, labels, where))
    refuse(splits.lone_classes(cfg, every.labels, ~every.train_only, labels), f"{where}: ")
    for line in splits.label_doubts(cfg, rows, where):
        print(line)

    # ---- slices -----------------------------------------------------------------------------------------------------
    parts = deal(cfg, every)
    suffix = files.format_of(cfg.train_data).replace(".parquet", ".jsonl")
    folder = Path(cfg.output)
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in parts.items():
        checkpoint.write_atomic(folder / f"{name}{suffix}", records.header + "".join(records.rows[i] for i in chosen))

    # ---- proof ------------------------------------------------------------------------------------------------------
    written = {f"{name}{suffix}": every.take(chosen) for name, chosen in parts.items()}
    proof = prove(cfg, labels, written)
    checkpoint.write_atomic(folder / "slices.json", json.dumps(proof, ensure_ascii=False, indent=1) + "\n")
    print(table(proof))
    left = len(rows) - sum(map(len, parts.values()))
    if left:
        print(f"left out: {left:,} rows of the larger classes")
    summary = {"output": cfg.output, "slices": len(parts) - 1, "rows": len(rows), "left_out": left}
    return {**summary, "validation_rows": len(parts["validation"]), "shared": proof["shared"]}


# ---- records --------------------------------------------------------------------------------------------------------


@dataclass
class Records:
    """The rows of a file as they are written there."""

    header: str
    rows: Sequence[str]


def read_records(cfg: SlicesConfig) -> tuple[files.Rows, Records]:
    """(rows, their records); without an id column the row index is put in front of both."""
    rows = files.stream_rows(cfg.train_data, "train_data")
    texts, separator = written_rows(cfg, rows)
    header = next(texts) if separator else ""
    kept = spool.Records()
    is_numbered = not any(cfg.id_column in row for row in rows)
    if is_numbered:
        for i, row in enumerate(rows):
            rows[i] = {cfg.id_column: str(i), **row}
        name = json.dumps(cfg.id_column, ensure_ascii=False)
        header = header and f"{cfg.id_column}{separator}{header}"
    for i, text in enumerate(texts):
        if is_numbered:
            text = f"{i}{separator}{text}" if header else f"{{{name}: {i}, {text[1:].lstrip()}"
        kept.append([text if text.endswith(("\n", "\r")) else f"{text}\n"])
    records = Records(header, kept.rows(itemgetter(0)))
    columns = [cfg.id_column, cfg.group_column, *cfg.text_columns, *(cfg.label_columns or (cfg.label_column,))]
    needed = list(filter(None, columns))
    files.need_columns(rows, needed, cfg.train_data, "train_data")
    return rows, records


def written_rows(cfg: SlicesConfig, rows: files.Rows) -> tuple[Iterator[str], str]:
    """(the header, if there is one, and the rows as they are written in the file; the separator of its cells)."""
    where, suffix = f"--train_data {cfg.train_data}", files.format_of(cfg.train_data)
    if suffix == ".parquet":
        files.need_columns(rows, list(rows[0]), cfg.train_data, "train_data")
        return (json.dumps(row, ensure_ascii=False) for row in rows[:]), ""
    if suffix == ".jsonl":
        lines = files.read_lines(cfg.train_data, "train_data", "\n")
        return (line.strip() for line in lines if line.strip()), ""
    separator, every = delimited.records(files.read_lines(cfg.train_data, where), where, files.DELIMITERS[suffix])
    return ("".join(record.lines) for record in every), separator


# ---- which row goes where -------------------------------------------------------------------------------------------


def deal(cfg: SlicesConfig, rows: splits.Split) -> dict[str, np.ndarray]:
    """The indices of the rows of slice_0, slice_1, ... and validation: a function of the rows and the seed.

    Raises UserError where there are too few rows or groups.
    """
    pool = equal_rows(rows.labels, cfg.seed) if cfg.balance else np.arange(len(rows.ids))
    groups = splits.groups_of(cfg, rows.take(pool))
    held = strata.hold_out(cfg.task, rows.labels[pool], cfg.val_size, cfg.seed, groups)

    # classes are mixed evenly in the order of the training rows, so every stretch of it is a balanced slice
    train = pool[~held]
    order = mixed_order(strata.of_targets(cfg.task, rows.labels[train]), cfg.seed)
    count = cfg.slices or -(-len(train) // cfg.slice_rows)
    units = len(train) if groups is None else len(np.unique(groups[~held]))
    if units < count:
        kind = "rows" if groups is None else "groups"
        raise UserError(f"--slices {count}: there are only {units} {kind} beside those of the validation file")
    if groups is not None:
        groups = np.unique(groups[~held], return_inverse=True)[1]
        part = strata.folds(cfg.task, rows.labels[train], count, cfg.seed, groups)[order]
    elif cfg.slices:
        part = np.arange(len(train)) * count // len(train)
    else:
        part = np.arange(len(train)) // cfg.slice_rows
    slices = {f"slice_{k}": train[order[part == k]] for k in range(count)}
    return {**slices, "validation": pool[held]}


def equal_rows(labels: np.ndarray, seed: int) -> np.ndarray:
    """Sorted indices of equally many rows of every class, as many as the rarest has, drawn from the seed."""
    classes, counts = np.unique(labels, return_counts=True)
    rng = np.random.default_rng([seed, 0xBA1A])
    drawn = [rng.permutation(np.flatnonzero(labels == c))[: counts.min()] for c in classes]
    return np.sort(np.concatenate(drawn))


def mixed_order(classes: np.ndarray, seed: int) -> np.ndarray:
    """An order (N,) from the seed in which every stretch has nearly the same share of each class; of several labels a
    row (N, C) it is any order.
    """
    order = np.random.default_rng([seed, 0x511C]).permutation(len(classes))
    if classes.ndim == 2:
        return order
    place = np.zeros(len(classes))
    for c in np.unique(classes):
        members = order[classes[order] == c]
        place[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(place[order], kind="stable")]


# ---- the proof ------------------------------------------------------------------------------------------------------


def prove(cfg: SlicesConfig, labels: labelling.Labels, written: dict[str, splits.Split]) -> dict:
    """What slices.json holds, computed from the files as they are read again."""
    known, about = {}, {}
    for name, rows in written.items():
        path = Path(cfg.output) / name
        again = files.read_rows(str(path), "output")
        if len(again) != len(rows.rows) or any(map(ne, again, rows.rows)):
            raise AssertionError(f"{path} does not hold the rows that were written")
        known[name] = keys_of(cfg, again)
        counts = {}
        if cfg.task != "regression":
            answers = labelling.answers(cfg.task, rows.labels, labels)
            counts = Counter(label for answer in answers for label in np.atleast_1d(answer).tolist())
            counts = {value: counts[value] for value in labels.values}
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        about[name] = {"rows": len(again), "sha256": sha256, "labels": counts}
    pairs = [
        {"files": [a, b], **{kind: len(known[a][kind] & known[b][kind]) for kind in known[a]}}
        for a, b in combinations(written, 2)
    ]
    shared = {kind: max(pair[kind] for pair in pairs) for kind in pairs[0] if kind != "files"}
    return {"settings": asdict(cfg), "files": about, "shared": shared, "pairs": pairs}


def keys_of(cfg: SlicesConfig, rows: list[dict[str, str]]) -> dict[str, set[str]]:
    """The ids, groups and normalized texts of rows, as far as there are columns of them."""
    keys = {"ids": {row[cfg.id_column] for row in rows}}
    if cfg.group_column:
        keys["groups"] = {row[cfg.group_column].strip() for row in rows} - {""}
    if cfg.text_columns:
        rows = [dict(row) for row in rows]
        files.decode_bytes_literals(rows, list(cfg.text_columns))
        forms = (audit.normal_form("\n".join(row[c] for c in cfg.text_columns)) for row in rows)
        keys["texts"] = set(map(audit.digest_of, forms))
    return keys


def table(proof: dict) -> str:
    """The proof as a person reads it: a line for each file, and what any two of them share at most."""
    first = next(iter(proof["files"].values()))
    names = list(first["labels"])[:8]
    lines = [f"{'file':<18} {'rows':>9} " + " ".join(f"{name[:9]:>9}" for name in names)]
    for name, about in proof["files"].items():
        cells = " ".join(f"{about['labels'][label]:>9,}" for label in names)
        lines.append(f"{name:<18} {about['rows']:>9,} {cells}")
    shared = ", ".join(f"{count:,} {kind}" for kind, count in proof["shared"].items())
    return "\n".join([*lines, f"any two files share at most: {shared}"])


if __name__ == "__main__":
    ddp.launch(main)
