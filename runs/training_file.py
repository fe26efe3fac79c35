"""Shared by the scripts that write training files: the columns that train.py reads, and the writer."""

import csv
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402
import files  # noqa: E402
from errors import UserError, print_anything  # noqa: E402
from labelling import TEACHER, TRAIN_ONLY  # noqa: E402


def blank(row: dict[str, str]) -> dict[str, str]:
    """The row as one that never judges and has no teacher."""
    taught = {name: "" for name in row if name.startswith(TEACHER)}
    return {**row, **taught, TRAIN_ONLY: "1"}


def write(path: str, own: list[dict[str, str]], more: list[dict[str, str]], overwrite: bool = False) -> dict:
    """Write the rows of a training file and more of them as CSV, TSV or JSONL; cells that a row lacks are empty.

    Returns a summary. Raises UserError for other suffixes, and where the file exists.
    """
    suffix = files.format_of(path)
    if suffix not in (".csv", ".tsv", ".jsonl") or path.lower().endswith(".gz"):
        raise UserError(f"{path}: expected a name ending in .csv, .tsv or .jsonl")
    if Path(path).exists() and not overwrite:
        raise UserError(f"{path} exists: name a new file, or replace it with --overwrite")
    rows = own + more
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    if suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        out = io.StringIO(newline="")
        # every cell is quoted: unquoted, a carriage return in a cell would end its row
        style = {"delimiter": "\t" if suffix == ".tsv" else ",", "lineterminator": "\n", "quoting": csv.QUOTE_ALL}
        writer = csv.DictWriter(out, columns, **style)
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(Path(path), text)
    return {"output": path, "rows": len(rows), "added": len(more)}


def launch(main) -> None:
    """Run a script's main(argv) -> dict: the dict is the last line of stdout, a user's mistake one line of stderr."""
    print_anything()
    try:
        print(json.dumps(main(sys.argv[1:])))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
