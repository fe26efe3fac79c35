"""Training rows out of confident predictions: the rows of train.csv, then the unlabelled ones that a run is sure of.

    python infer.py --runs RUN --input test.csv --submission "" --output predictions.csv
    python runs/pseudo_labels.py train.csv predictions.csv test.csv out.csv --min_confidence 0.9 --soft
    python train.py --train_data out.csv ...

Added rows are marked train_only, so train.py never judges by them and leaves out those whose text its validation rows
have; their label is the predicted one. With --soft they also keep the probabilities, in columns probability_<label>.
"""

import argparse

import training_file

import checks
import files
from errors import UserError, few
from labelling import TEACHER


def main(argv: list[str]) -> dict:
    options = read_options(argv)
    if not 0.5 <= options.min_confidence <= 1:
        raise UserError(f"--min_confidence {options.min_confidence:g}: expected a probability from 0.5 to 1")
    checks.need_output(options.output, "output", options.train_data, options.predictions, options.test_data)
    rows = files.read_rows(options.train_data, "train_data")
    more = confident_rows(rows, options)
    summary = training_file.write(options.output, rows, more, options.overwrite)
    print(f"{len(rows):,} rows and {len(more):,} with at least {options.min_confidence:g}: {options.output}")
    return summary


def confident_rows(rows: list[dict[str, str]], options) -> list[dict[str, str]]:
    """The unlabelled rows whose prediction is confident, with the columns of the training rows.

    Raises UserError for columns that are missing, ids that are duplicated or unknown, and odd probabilities.
    """
    where, key = f"predictions {options.predictions}", options.id_column
    unlabelled = files.read_rows(options.test_data, "test_data")
    if any(key in row for row in unlabelled):  # else the row index counts
        files.need_columns(unlabelled, [key], options.test_data, "test_data")
    by_id = {row.get(key, str(i)): row for i, row in enumerate(unlabelled)}
    predictions = files.read_rows(options.predictions, "predictions")
    files.need_columns(predictions, [key, "prediction"], options.predictions, "predictions")
    duplicates = files.duplicates([row[key] for row in predictions])
    if len(by_id) < len(unlabelled) or duplicates:
        raise UserError(f"{where}: ids are duplicated, in it or in {options.test_data} ({few(duplicates)})")
    unknown = [row[key] for row in predictions if row[key] not in by_id]
    if unknown:
        raise UserError(f"{where}: {len(unknown)} of its ids are not in {options.test_data} ({few(unknown)})")

    columns = {name for row in rows for name in row}
    more = []
    for number, prediction in enumerate(predictions, 1):
        if not prediction["prediction"] and options.task != "multi_label":
            continue  # an answer that could not be read
        try:
            shares = probabilities(prediction, options)
            sure = confidence(prediction["prediction"], shares, options)
        except (ValueError, KeyError):
            raise UserError(f"{where}: row {number} has no prediction with probabilities from 0 to 1") from None
        if sure >= options.min_confidence:
            source = by_id[prediction[key]].items()
            made = training_file.blank({name: value for name, value in source if name in columns})
            if key in columns:
                made[key] = f"pseudo:{prediction[key]}"
            made |= labelled(prediction["prediction"], shares, options)
            more.append(made)
    return more


def probabilities(prediction: dict[str, str], options) -> dict[str, float]:
    """{label: probability} of a prediction; of a regression its output, as the probability of 1."""
    if options.task == "regression":
        shares = {"1": float(prediction["prediction"])}
    else:
        names = [name for name in prediction if name.startswith(TEACHER)]
        shares = {name.removeprefix(TEACHER): float(prediction[name]) for name in names}
    if not shares or not all(0 <= share <= 1 for share in shares.values()):
        raise ValueError
    return shares


def confidence(answer: str, shares: dict[str, float], options) -> float:
    """The probability of the answer: of the class, or the least of a label that is in it or not."""
    if options.task == "single_label":
        return shares[answer]
    if options.task == "regression":
        return max(shares["1"], 1 - shares["1"])
    chosen = label_set(answer, options)
    return min(share if label in chosen else 1 - share for label, share in shares.items())


def label_set(answer: str, options) -> list[str]:
    return [label for label in answer.split(options.label_delimiter) if label]


def labelled(answer: str, shares: dict[str, float], options) -> dict[str, str]:
    """The cells of the answer: the label, and with --soft the probabilities."""
    if options.task == "regression":
        return {options.label_column: answer if options.soft else str(int(shares["1"] > 0.5))}
    cells = {options.label_column: answer}
    if options.label_columns:
        cells = {label: str(int(label in label_set(answer, options))) for label in options.label_columns}
    if options.soft:
        cells |= {TEACHER + label: repr(share) for label, share in shares.items()}
    return cells


def read_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_data", help="training rows: CSV, TSV, JSONL or Parquet")
    parser.add_argument("predictions", help='infer.py\'s, of --submission ""')
    parser.add_argument("test_data", help="the rows that were predicted")
    parser.add_argument("output", help="file to write: .csv, .tsv or .jsonl")
    parser.add_argument("--min_confidence", type=float, default=0.9, help="least probability of the answer")
    parser.add_argument("--soft", action="store_true", help="keep the probabilities as soft targets")
    parser.add_argument("--task", default="single_label", choices=("single_label", "multi_label", "regression"))
    parser.add_argument("--label_column", default="label", help="column of the label")
    parser.add_argument("--label_columns", nargs="*", default=[], help="multi_label: columns of 0 and 1 instead")
    parser.add_argument("--label_delimiter", default="|", help="multi_label: separator of the labels")
    parser.add_argument("--id_column", default="id", help="id column; default: id, or the row index")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    training_file.launch(main)
