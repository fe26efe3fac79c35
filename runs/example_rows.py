"""Training rows out of example columns: a text that a row shows as an example of a label is a labelled text itself.

    python runs/example_rows.py train.csv out.csv --column body --label_column rule_violation --by_column rule \\
        --examples positive_example_1=1 positive_example_2=1 negative_example_1=0 negative_example_2=0
    python train.py --train_data out.csv --group_column body ...

out.csv has the rows of train.csv, then those made of its examples, marked train_only: train.py never judges by them. In
such a row the example stands in --column, and in its old place another example of that label, so that it is never shown
beside itself. Each text becomes one row (one for each value of --by_column); texts that are given with two labels, or
that a row of train.csv has, become none. With --group_column train.py also leaves out the texts of its validation rows.
"""

import argparse

import training_file

import audit
import checks
import files
from errors import UserError


def main(argv: list[str]) -> dict:
    options = read_options(argv)
    pairs = [pair.partition("=")[::2] for pair in options.examples]
    for column, label in pairs:
        if not column or not label:
            raise UserError(f"--examples {column}={label}: expected column=label, such as positive_example_1=1")
    checks.need_output(options.output, "output", options.train_data)
    rows = files.read_rows(options.train_data, "train_data")
    columns = [options.column, options.label_column, options.by_column, *(column for column, _ in pairs)]
    files.need_columns(rows, [name for name in columns if name], options.train_data, "train_data")
    more = example_rows(rows, pairs, options)
    summary = training_file.write(options.output, rows, more, options.overwrite)
    print(f"{len(rows):,} rows and {len(more):,} made of {len(pairs)} example columns: {options.output}")
    return summary


def example_rows(rows: list[dict[str, str]], pairs: list[tuple[str, str]], options) -> list[dict[str, str]]:
    """A row for each text of the example columns that no row has and that has one label."""

    def key(row: dict[str, str]) -> tuple[str, str]:
        return audit.normal_form(row[options.column]), row.get(options.by_column, "")

    known = {key(row) for row in rows}
    candidates = {}
    for row in rows:
        for column, label in pairs:
            made = from_example(row, column, label, pairs, options)
            if row[column].strip() and key(made) not in known:
                candidates.setdefault(key(made), []).append(made)
    return [same[0] for same in candidates.values() if len({row[options.label_column] for row in same}) == 1]


def from_example(row: dict[str, str], column: str, label: str, pairs: list[tuple[str, str]], options) -> dict[str, str]:
    """The row in which an example is the text, and another example of its label is shown where it was."""
    text = audit.normal_form(row[column])
    same = [row[name] for name, other in pairs if other == label and audit.normal_form(row[name]) != text]
    if row[options.label_column] == label:
        same.insert(0, row[options.column])  # the row's own text is an example of its label
    made = training_file.blank(row)
    made |= {name: (same or [""])[0] for name, _ in pairs if audit.normal_form(row[name]) == text}
    made |= {options.column: row[column], options.label_column: label}
    if options.id_column in row:
        made[options.id_column] = f"{row[options.id_column]}:{column}"
    return made


def read_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train_data", help="training rows: CSV, TSV, JSONL or Parquet")
    parser.add_argument("output", help="file to write: .csv, .tsv or .jsonl")
    parser.add_argument("--examples", nargs="+", required=True, help="column=label, as positive_example_1=1")
    parser.add_argument("--column", default="body", help="column of the text that an example takes the place of")
    parser.add_argument("--label_column", default="label", help="column of the label")
    parser.add_argument("--id_column", default="id", help="id column; made rows get ROW:COLUMN")
    parser.add_argument("--by_column", default="", help="a text counts once for each value of this column")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    training_file.launch(main)
