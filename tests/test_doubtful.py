"""What stands in a file is what is trained on: doubtful labels, lists, quotation marks, headers and files are named."""

import datetime as dt
import gzip
import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import delimited
import document_files
import errors
import files
import formats
import labelling
import slices
import spelling
import splits
from configs import TrainConfig
from errors import UserError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def read(path: Path, content: str | bytes, **settings):
    """(training rows, classes, what was said) of a file as train.py reads it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = []
    settings = {"text": "{text}", "label_column": "label", **settings}
    rows, _, labels = splits.read(TrainConfig(train_data=str(path), **settings), said.append)
    return rows, labels, said


def refusal(path: Path, content: str | bytes, **settings) -> str:
    """The line that refuses a file."""
    with pytest.raises(UserError) as e:
        read(path, content, **settings)
    assert "\n" not in str(e.value) and f"--train_data {path}" in str(e.value)
    return str(e.value).replace(str(path), "FILE")


def table(labels: list[str], form: str = "csv") -> str:
    """A training file with these labels, one a row."""
    rows = [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    quoted = ['"' + row["label"].replace('"', '""') + '"' for row in rows]
    return "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(quoted))


# ---- labels that a person cannot tell apart -------------------------------------------------------------------------

TWINS = [
    ("algebra", "algebra "), ("algebra", "\talgebra"), ("a b", "a  b"), ("a b", "a\u00a0b"), ("algebra", "Algebra"),
    ("alg\u00e8bre", "alge\u0300bre"), ("algebra", "algebra\u200b"), ("algebra", "al\u00adgebra"),
    ("algebra", "\ufeffalgebra"), ("algebra", "\uff41lgebra"), ("algebra", "\u0430lgebra"), ("it's", "it\u2019s"),
    ("a-b", "a\u2013b"), ("1", "1.0"), ("1", "01"), ("1", "1e0"), ("1", "\uff11"), ("0", "-0"), ("True", "true"),
    ("10", "1e1"), ("\u2764", "\u2764\ufe0f"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("one, other", TWINS)
def test_labels_that_look_alike_are_named_and_stay_what_they_are(tmp_path, form, one, other):
    """One warning names both spellings so that they differ on the screen, with counts and rows; none is merged."""
    content = table([one, other, "third", one, other, "third", one, "third"], form)
    rows, labels, said = read(tmp_path / f"a.{form}", content)
    assert set(labels.values) == {one, other, "third"} and len(rows.ids) == 8
    warnings = [line for line in said if "look alike" in line]
    assert len(warnings) == 1 and "\n" not in warnings[0] and "third" not in warnings[0]
    assert "(3 rows: 1, 4, 7)" in warnings[0] and "(2 rows: 2, 5)" in warnings[0]
    first, second = spelling.quoted([one, other])
    assert first in warnings[0] and second in warnings[0] and spelling.look(first) != spelling.look(second)


@pytest.mark.parametrize(
    "labels", [["a", "b"], ["1", "2", "10"], ["1.5", "15"], ["-1", "1"], ["C", "C++", "C#"], ["é", "e"], ["1 0", "10"],
               ["10000000000000000001", "10000000000000000002"], ["0.1", "0.10000000000000001"], ["yes", "1"]]
)  # fmt: skip
def test_labels_that_differ_to_the_eye_are_no_warning(tmp_path, labels):
    assert not read(tmp_path / "a.csv", table(labels * 3))[2]


@pytest.mark.parametrize("cells", [["a|b", "a|b\u200b", "b", "A"], ['["a", "b"]', '["a", "b "]', '["b"]', '["a "]']])
def test_parts_of_multi_label_columns_are_compared_too(tmp_path, cells):
    _, _, said = read(tmp_path / "a.csv", table(cells * 2), task="multi_label")
    assert sum("look alike" in line for line in said) == 1 and said[0].count(" rows: ") == 4


@pytest.mark.parametrize("task, label", [("single_label", "b "), ("single_label", "B"), ("multi_label", "b\u200b")])
def test_validation_labels_that_only_look_known_are_refused_and_shown(tmp_path, task, label):
    (tmp_path / "val.jsonl").write_text(table(["a", label], "jsonl"))
    train = tmp_path / "a.csv"
    train.write_text(table(["a", "b"] * 4))
    cfg = TrainConfig(train_data=str(train), val_data=str(tmp_path / "val.jsonl"), text="{text}", task=task)
    with pytest.raises(UserError, match="unknown labels .*look alike, but differ") as e:
        splits.read(cfg, print)
    assert all(shown in str(e.value) for shown in spelling.quoted([label, "b"]))


def test_marks_of_missing_values_stay_labels_and_are_named_once(tmp_path):
    _, labels, said = read(tmp_path / "a.csv", table(["NA", "None", "nan", "x"] * 3))
    assert labels.values == ("NA", "None", "nan", "x") and len(said) == 1
    assert "'NA' (3 rows: 1, 5, 9) and 'nan' (3 rows: 3, 7, 11) and 'None'" in said[0] and "taken as labels" in said[0]


def test_slices_names_them_too(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text(table(["a", "A", "b"] * 20))
    out = str(tmp_path / "out")
    slices.main(["--train_data", str(path), "--slices", "2", "--id_column", "text", "--output", out])
    assert "labels that look alike: 'A' (20 rows" in capsys.readouterr().out


# ---- lists of 0 and 1 -----------------------------------------------------------------------------------------------

ROWS = [(1, 0, 1), (0, 1, 0), (0, 0, 0), (1, 1, 1)]
FORMS = {
    "integers": lambda row: list(row),
    "floats": lambda row: list(map(float, row)),
    "booleans": lambda row: list(map(bool, row)),
    "strings": lambda row: list(map(str, row)),
    "text of a list": lambda row: str(list(row)),
    "text of booleans": lambda row: str(list(map(bool, row))),
    "numpy": lambda row: f"[{' '.join(map(str, row))}]",
    "numpy floats": lambda row: f"[{' '.join(f'{x}.' for x in row)}]",
    "commas": lambda row: ",".join(map(str, row)),
    "delimited": lambda row: "|".join(map(str, row)),
    "tuple": lambda row: str(row),
}
MULTI = {"task": "multi_label"}


@pytest.mark.parametrize("form", FORMS)
def test_lists_of_0_and_1_are_indicators(tmp_path, form):
    """With a name for each place they are these labels; without, they are refused with the ways out."""
    path = tmp_path / "a.jsonl"
    content = "".join(json.dumps({"text": f"t{i}", "label": FORMS[form](row)}) + "\n" for i, row in enumerate(ROWS * 3))
    rows, labels, said = read(path, content, **MULTI, label_names=("x", "y", "z"))
    assert labels.values == ("x", "y", "z") and rows.labels.tolist() == [list(map(float, row)) for row in ROWS * 3]
    for names, words in (((), "each of 3 labels: name"), (("x", "y"), "of 3 labels, and --label_names has 2")):
        message = refusal(path, content, **MULTI, label_names=names)
        assert words in message and "--label_columns" in message


@pytest.mark.parametrize(
    "lists",
    [
        [[0, 3], [1], [2], [0]],
        [[0], [1], [0], [1]],
        [[0, 1], [1], [0], []],
        [[1, 2], [0, 1], [0, 2]],
        [["a", "b"], ["b"]],
        [[], [0], [1]],
        [[10], [1], [0, 1]],
    ],
)
def test_lists_of_class_ids_stay_class_ids(tmp_path, lists):
    content = "".join(json.dumps({"text": "t", "label": own}) + "\n" for own in lists * 2)
    rows, labels, _ = read(tmp_path / "a.jsonl", content, **MULTI)
    assert set(labels.values) == {str(part) for own in lists for part in own}
    assert [[labels.values[c] for c in row.nonzero()[0]] for row in rows.labels[: len(lists)]] == [
        sorted(map(str, own), key=labels.values.index) for own in lists
    ]


@pytest.mark.parametrize(
    "lists, words",
    [
        ([[1, 0, 1], [1, 0], [0, 0, 1]], "lists of 3 times 0 or 1, but 1 rows have another number (2)"),
        ([[1, 0, 1], [], [0, 0, 1]], "but 1 rows have another number (2)"),
        ([[True], [True, False], ["a"]], "malformed labels"),
        ([["a", ""], ["b"]], "malformed labels"),
        ([["a"], [None]], "malformed labels"),
    ],
)
def test_lists_that_are_neither_are_refused(tmp_path, lists, words):
    content = "".join(json.dumps({"text": "t", "label": own}) + "\n" for own in lists)
    assert words in refusal(tmp_path / "a.jsonl", content, **MULTI)


@pytest.mark.parametrize("zero, one", [("0", "1"), ("0.0", "1.0"), ("false", "true"), ("False", "True"), (" 0", "1 ")])
def test_label_columns_hold_0_and_1_in_any_usual_form(tmp_path, zero, one):
    content = f"text,a,b\nt,{zero},{one}\nu,{one},{zero}\nv,{zero},{zero}\n"
    rows, _, _ = read(tmp_path / "a.csv", content, **MULTI, label_columns=("a", "b"))
    assert rows.labels.tolist() == [[0, 1], [1, 0], [0, 0]]


@pytest.mark.parametrize("cell", ["", "2", "x", "nan", "01", "1e0", "-1", "0.5"])
def test_label_columns_with_other_cells_are_refused(tmp_path, cell):
    content = f"text,a,b\nt,0,1\nu,{cell},0\nv,1,1\n"
    assert f"['{cell}', '0'] in row 2" in refusal(tmp_path / "a.csv", content, **MULTI, label_columns=("a", "b"))


def test_single_labels_that_are_lists_are_named(tmp_path):
    _, _, said = read(tmp_path / "a.csv", table(["[1, 0]", "[0, 1]"] * 3))
    assert len(said) == 1 and "every label is a list" in said[0] and "--task multi_label reads lists" in said[0]


# ---- lists that are taken as one label, columns that tell the label, numbers -----------------------------------------


@pytest.mark.parametrize("separator", [",", ", ", ";", " ", "\t"])
@pytest.mark.parametrize("task", ["single_label", "multi_label"])
def test_lists_with_another_delimiter_are_said(tmp_path, separator, task):
    """The labels stay what they are, and one line gives the delimiter that makes lists of them."""
    column = [separator.join(sorted({str(i % 4), str(i // 4 % 4)})) for i in range(32)]
    _, labels, said = read(tmp_path / "a.csv", table(column), task=task)
    assert set(labels.values) == set(column) and len(said) == 1
    assert f"--task multi_label --label_delimiter {(separator.strip(' ') or ' ')!r} splits them" in said[0]
    _, labels, said = read(tmp_path / "a.csv", table(column), task="multi_label", label_delimiter=separator)
    assert labels.values == ("0", "1", "2", "3") and not said


@pytest.mark.parametrize(
    "labels",
    [["Yes, certainly", "No, never"], ["New York", "New Jersey", "Jersey City"], ["a, b", "c"], ["x;y", "z"],
     ["Albany, NY", "Buffalo, NY", "Paris, TX"], ["0", "1", "10"]],
)  # fmt: skip
def test_names_with_commas_or_blanks_are_no_lists(tmp_path, labels):
    for task in ("single_label", "multi_label"):
        assert not read(tmp_path / "a.csv", table(labels * 3), task=task)[2]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "text, settings",
    [
        ("{text} {label}", {}),
        ("{label}", {}),
        ("{text}{label}", {"task": "multi_label"}),
        ("{text} {a}", {"task": "multi_label", "label_columns": ("a", "b")}),
        ("{text} {label}", {"task": "regression", "metric": "mae"}),
        ("{text} {probability_x}", {}),
    ],
)
def test_a_text_that_names_the_label_is_refused(tmp_path, form, text, settings):
    rows = [{"text": f"t{i}", "label": "1", "a": "0", "b": "1", "probability_x": "1"} for i in range(4)]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    content = "\n".join(lines if form == "csv" else map(json.dumps, rows))
    with pytest.raises(UserError, match="--text names .*which is to be predicted"):
        read(tmp_path / f"a.{form}", content, text=text, **settings)


def test_columns_that_are_called_probability_have_a_way_out(tmp_path):
    content = "text,label,probability_of_rain\n" + "a,x,0.3\nb,y,0.4\n" * 2
    assert "probability_... are soft targets: rename one that is none" in refusal(tmp_path / "a.csv", content)
    content = "text,label,probability_x,probability_y\n" + "a,x,0_1,0\nb,y,0,1\n" * 2
    assert "malformed probabilities (['0_1', '0'] in row 1, 3)" in refusal(tmp_path / "a.csv", content)


NUMBERS = ["1.10", "1E5", "0.1e1", "-0", "-0.0", "12345678901234567890", "1e-7", "1.0"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_numbers_of_json_keep_their_spelling(tmp_path, name):
    """An id or label is what stands in the file, whatever number it is; what no number can hold is refused."""
    objects = [f'{{"id": {number}, "text": "t", "list": [{number}]}}' for number in NUMBERS]
    path = tmp_path / name
    path.write_text("\n".join(objects) if name == "a.jsonl" else f"[{','.join(objects)}]")
    rows, _ = document_files.rows_of(path, "train_data", named=True)
    assert [row["id"] for row in rows] == NUMBERS
    assert [json.loads(row["list"])[0] for row in rows] == list(map(json.loads, NUMBERS))
    path.write_text('{"id": 1e400}' if name == "a.jsonl" else '[{"id": [-1e999]}]')
    with pytest.raises(UserError, match="1e400 is too large|-1e999 is too large"):
        document_files.rows_of(path, "train_data", named=True)


# ---- JSON of other shapes, folders and damaged archives -------------------------------------------------------------

RECORDS = [{"text": f"t{i}", "label": "xy"[i % 2]} for i in range(4)]
SHAPES = {
    "columns": json.dumps({name: [row[name] for row in RECORDS] for name in ("text", "label")}),
    "pandas": json.dumps({name: {str(i): row[name] for i, row in enumerate(RECORDS)} for name in ("text", "label")}),
    "array": json.dumps(RECORDS),
    "within": json.dumps({"data": RECORDS}),
    "pretty": json.dumps(RECORDS[0], indent=2),
    "joined": "".join(map(json.dumps, RECORDS)),
    "commas": ",\n".join(map(json.dumps, RECORDS)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_of_another_shape_is_refused_with_the_way_out(tmp_path, shape, name):
    content = SHAPES[shape].encode()
    assert files.AS_LINES in refusal(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)


@pytest.mark.parametrize("cell", [["a", "b"], {"en": "a"}, []])
def test_lists_in_a_text_are_said_once(tmp_path, cell, capsys):
    path = tmp_path / "a.jsonl"
    content = "".join(json.dumps({**row, "more": cell}) + "\n" for row in RECORDS)
    read(path, content)
    assert not capsys.readouterr().out
    rows, _, _ = read(path, content, text="{text} {more}")
    assert rows.rows[0]["more"] == json.dumps(cell)
    assert "column more holds lists or objects in 4 rows (1, 2, 3, 4)" in capsys.readouterr().out


def test_folders_lists_and_patterns_are_named(tmp_path):
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "*.csv", "no pattern"), ("a.csv,b.csv", "no list")):
        with pytest.raises(UserError, match=words):
            files.read_rows(str(path), "input")


@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz"])
def test_bytes_after_an_archive_are_named_and_members_joined(tmp_path, name):
    """Archives may have several members, and zeros at their end; anything else is damage."""
    lines = table(["x", "y"] * 4, name.split(".")[1]).encode().splitlines(keepends=True)
    packed = gzip.compress(b"".join(lines[:4])) + gzip.compress(b"".join(lines[4:]))
    for end in (b"", b"\0" * 600):
        assert len(read(tmp_path / name, packed + end)[0].ids) == 8
    assert "other bytes follow the end of the gzip archive" in refusal(tmp_path / name, packed + b"more")
    assert "cannot be read" in refusal(tmp_path / name, packed[:-9])


# ---- Parquet --------------------------------------------------------------------------------------------------------

DAY = dt.datetime(2026, 1, 1)
CELLS = {  # cell -> how it reads in a text
    "a list of times": ([DAY], '["2026-01-01 00:00:00"]'),
    "a struct with a date": ({"when": DAY.date(), "n": 1}, '{"when": "2026-01-01", "n": 1}'),
    "a list of decimals": ([Decimal("1.50")], '["1.50"]'),
    "durations and times of day": (
        {"d": dt.timedelta(hours=1), "t": dt.time(1, 2)},
        '{"d": "1:00:00", "t": "01:02:00"}',
    ),
    "a time": (DAY, "2026-01-01 00:00:00"),
    "a decimal": (Decimal("1.50"), "1.50"),
    "a boolean": (True, "True"),
    "a whole number": (1, "1"),
    "a number": (1.0, "1.0"),
    "nothing": (None, ""),
    "bytes": (b"x", None),
    "a list of bytes": ([b"x"], None),
    "a struct with bytes": ({"bytes": b"x", "path": "p"}, None),
}


@pytest.mark.parametrize("name", CELLS)
def test_parquet_columns_of_any_type_may_be_there(tmp_path, name):
    """What the run does not use may be of any type; what is no text is refused where it is used, by its column."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cell, expected = CELLS[name]
    path = tmp_path / "a.parquet"
    columns = {"text": list("abcdef"), "label": ["x", "y"] * 3, "more": [cell] * 6}
    pq.write_table(pa.table(columns), path)
    rows, _, _ = read(path, path.read_bytes())
    assert [row["text"] for row in rows.rows] == list("abcdef")
    for role in ({"text": "{text} {more}"}, {"label_column": "more", **MULTI}, {"id_column": "more"}):
        if expected is None:
            assert "column more holds bytes" in refusal(path, path.read_bytes(), **role)
    if expected is not None:
        assert rows.rows[0]["more"] == expected


def test_parquet_maps_nanoseconds_dictionaries_and_large_strings(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    columns = {
        "text": pa.array(list("abcd"), pa.large_string()),
        "label": pa.array(["x", "y"] * 2).dictionary_encode(),
        "map": pa.array([[("k", DAY)]] * 4, pa.map_(pa.string(), pa.timestamp("us"))),
        "binary map": pa.array([[(b"k", 1)]] * 4, pa.map_(pa.binary(), pa.int8())),
        "nanoseconds": pa.array([1, 2, 3, 4], pa.duration("ns")),
    }
    pq.write_table(pa.table(columns), path)
    rows, labels, _ = read(path, path.read_bytes())
    assert labels.values == ("x", "y") and rows.rows[0]["map"] == '[["k", "2026-01-01 00:00:00"]]'
    assert "column binary map holds bytes" in refusal(path, path.read_bytes(), text="{binary map}")
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"]), path)
    assert "text" in refusal(path, path.read_bytes()).partition("FILE")[2], "by pyarrow, or by the reader's own check"


@pytest.mark.parametrize("values, other", [([1.0, 0.0, None], "1"), ([True, False], "true"), ([1, 0], "1.0")])
def test_labels_of_parquet_and_csv_in_one_run_are_compared(tmp_path, values, other):
    """pandas makes 1.0 of 1 where a cell is empty; what differs only so is refused and shown."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    values = [value for value in values if value is not None]
    pq.write_table(pa.table({"text": list("abcdef"), "label": (values * 3)[:6]}), tmp_path / "a.parquet")
    (tmp_path / "v.csv").write_text(f"text,label\nx,{other}\n")
    cfg = TrainConfig(train_data=str(tmp_path / "a.parquet"), val_data=str(tmp_path / "v.csv"), text="{text}")
    with pytest.raises(UserError, match="look alike, but differ"):
        splits.read(cfg, print)


# ---- quotation marks ------------------------------------------------------------------------------------------------


def sentences(delimiter: str, spans: list[tuple[int, int]], labels: list[str], ids: bool = False) -> str:
    """30 unquoted rows; a speech opens in the first row of each span and ends in its last one."""
    lines = ["id\ttext\tlabel" if ids else "text\tlabel"]
    for i in range(30):
        text = '"' * any(i == a for a, _ in spans) + f"He said {i * i}." + '"' * any(i == b for _, b in spans)
        label = labels[i % len(labels)]
        cells = [text, label]
        if ids:
            cells = [str(i), text, label]
        lines.append("\t".join(cells))
    return "\n".join(lines).replace("\t", delimiter) + "\n"


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.tsv", "\t"), ("a.csv", ";")])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("span", [(3, 4), (3, 8), (0, 20)])
@pytest.mark.parametrize("labels", [["x", "y", "z"], ["0", "1"]])
def test_quotation_marks_that_are_text_never_swallow_rows(tmp_path, name, delimiter, ids, span, labels):
    content = sentences(delimiter, [span], labels, ids)
    message = refusal(tmp_path / name, content)
    assert f"1 quoted texts hold whole rows of the file (lines {span[0] + 2} to {span[1] + 2})" in message


HONEST = {
    "a comma in the second line": ("Solve it.\nGive a reason, please.", "x"),
    "a comma in the first line": ("Solve it, please.\nGive a reason.", "x"),
    "a comma in each line": ("Solve it, please.\nGive a reason, too.", "x"),
    "a comma in each of three": ("One, two\nthree, four\nfive, six", "x"),
    "a number after a comma": ("f is 1, 2\nf is 1,2", "1"),
    "a line like a row": ("as in\none,x\nsaid", "x"),
    "empty lines": ("a\n\n\nb", "x"),
    "quotes inside": ('He said ""a, b""\nand ""c, d"".', "x"),
}


@pytest.mark.parametrize("name", HONEST)
def test_texts_of_several_lines_are_read_as_they_are(tmp_path, name, capsys):
    text, label = HONEST[name]
    labels = [label, "2" if label == "1" else "y"]
    content = "text,label\n" + "".join(f'"{text} {i}",{labels[i % 2]}\n' for i in range(20))
    rows, _, said = read(tmp_path / "a.csv", content)
    assert [row["text"] for row in rows.rows] == [f"{text} {i}".replace('""', '"') for i in range(20)]
    assert not said and not capsys.readouterr().out


def test_swallowed_rows_without_a_telling_column_are_a_note(tmp_path, capsys):
    lines = [f"question {i * i} of {'abcdefghij'[i]},answer {'klmnopqrst'[i]} {i}" for i in range(10)]
    lines[3], lines[6] = '"' + lines[3], lines[6].replace(",", '",')
    (tmp_path / "a.csv").write_text("prompt,response\n" + "\n".join(lines) + "\n")
    assert len(files.read_rows(str(tmp_path / "a.csv"), "input")) == 7
    assert "1 quoted texts may hold whole rows of the file (lines 5 to 8)" in capsys.readouterr().out


# ---- delimiters and headers -----------------------------------------------------------------------------------------

BODY = "1,a,x\n2,b,y\n3,c,x\n4,d,y\n"


@pytest.mark.parametrize(
    "name, delimiter", [("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|"), ("a.tsv", ","), ("a.csv.gz", ";")]
)
@pytest.mark.parametrize("quote", ["", '"'])
def test_other_delimiters_are_read_and_said(tmp_path, name, delimiter, quote, capsys):
    lines = [
        ["id", "text", "label"],
        *([str(i), f"a 1,5 {i}" if delimiter == ";" else f"a {i}", "xy"[i % 2]] for i in range(6)),
    ]
    content = "".join(delimiter.join(quote + cell + quote for cell in line) + "\r\n" for line in lines).encode()
    rows, labels, _ = read(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    assert [list(row.values()) for row in rows.rows] == lines[1:] and labels.values == ("x", "y")
    assert capsys.readouterr().out.count(f"read with {delimiter!r} between columns") == 1


def test_a_column_with_the_other_delimiters_in_it_is_read_as_before(tmp_path, capsys):
    rows, _, _ = read(tmp_path / "a.csv", "text;or|this,label\n" + "a;b,x\nc|d,y\n" * 3, text="{text;or|this}")
    assert rows.rows[0]["text;or|this"] == "a;b" and not capsys.readouterr().out


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\n', "SEP=;\n", "\ufeffsep=;\n"])
def test_excels_first_line_names_the_delimiter(tmp_path, first):
    rows, _, _ = read(tmp_path / "a.csv", first + "id;text;label\n" + BODY.replace(",", ";"))
    assert rows.ids == ["1", "2", "3", "4"]


def test_errors_of_such_files_name_their_line(tmp_path):
    assert "line 3: ';' expected after '\"'" in refusal(tmp_path / "a.csv", 'sep=;\nid;text;label\n1;"a"b;x\n2;b;y\n')
    assert "1 rows do not have the header's 3 columns (line 3 has 2)" in refusal(
        tmp_path / "a.csv", "id;text;label\n1;a;x\n2;b\n"
    )


@pytest.mark.parametrize(
    "header, words",
    [
        ("id, text, label", "' text' for text, ' label' for label"),
        ("id,Text,label", "'Text' for text"),
        ("id,text,label\u200b", r"'label\u200b' for label"),
        ("id,\ufefftext,label", r"'\ufefftext' for text"),
        ("id,{text},label", "rename a column with braces"),
        ("0,1,2", "there is: 0, 1, 2"),
        ("1,a,x", "the first line looks like a row"),
        ("id,text,label,label", "column 'label' is duplicated"),
        ('{"text":"a","label":"x"}', "this looks like JSON; name it .jsonl"),
        ('[{"text": "a"}]', "this looks like JSON"),
        ("id,textt,label", "did you mean textt?"),
    ],
)
def test_headers_that_lack_a_column_say_why(tmp_path, header, words):
    message = refusal(tmp_path / "a.csv", header + "\n" + BODY)
    assert words in message


@pytest.mark.parametrize("name", ["0", "a:b", "a!r", "{text}", "}", "Wow! Tell us", "Q1: What?", "{"])
def test_names_that_no_template_can_hold_are_to_be_changed(tmp_path, name):
    with pytest.raises(UserError, match="rename a column"):
        read(tmp_path / "a.csv", f"id,{name},label\n" + BODY, text="{" + name + "}")


@pytest.mark.parametrize(
    "name", [" text", "text ", "a b", "a.b", "a[0]", "Unnamed: 0x".replace(":", ""), "\u00e9", "text\u200b"]
)
def test_every_other_name_is_named_by_its_letters(tmp_path, name):
    rows, _, _ = read(tmp_path / "a.csv", f"id,{name},label\n" + BODY, text="{" + name + "}")
    assert splits.texts(TrainConfig(text="{" + name + "}"), rows.rows) == list("abcd")


@pytest.mark.parametrize("start", ["\ufeff", "\ufeff\ufeff", "\n\n", "\ufeff\n"])
def test_what_stands_before_the_header_is_no_part_of_it(tmp_path, start):
    rows, _, _ = read(tmp_path / "a.csv", start + "text,id,label\n" + BODY)
    assert list(rows.rows[0]) == ["text", "id", "label"]
    line = '{"text": "a", "label": "%s"}\n'
    assert len(read(tmp_path / "a.jsonl", start + (line % "x" + line % "y") * 2)[0].ids) == 4


def test_columns_without_name_and_cells_are_none(tmp_path):
    rows, _, _ = read(tmp_path / "a.csv", "id,text,label,,\n" + BODY.replace("\n", ",,\n"))
    assert list(rows.rows[0]) == ["id", "text", "label"]
    rows, _, _ = read(tmp_path / "a.csv", ",text,label\n" + BODY)  # pandas writes its index so
    assert list(rows.rows[0]) == ["", "text", "label"]
    message = refusal(tmp_path / "a.csv", "id,text,label,,\n" + BODY.replace("\n", ",p,q\n"))
    assert "columns 4, 5 have no name in the header" in message


@pytest.mark.parametrize("other", ["Label", "label ", "label\u200b", "\uff4cabel"])
def test_columns_that_look_alike_are_said(tmp_path, other, capsys):
    rows, labels, _ = read(tmp_path / "a.csv", f"id,text,label,{other}\n" + BODY.replace("\n", ",z\n"))
    assert labels.values == ("x", "y") and rows.rows[0][other] == "z"
    out = capsys.readouterr().out
    assert out.count("are different columns") == 1 and all(name in out for name in spelling.quoted(["label", other]))


def test_a_repeated_header_is_said(tmp_path, capsys):
    read(tmp_path / "a.csv", "id,text,label\n" + BODY + "id,text,label\n" + BODY + "id,text,label\n")
    assert "holds its own name in 2 rows (5, 10)" in capsys.readouterr().out


# ---- files that are something else ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.jsonl.gz"])
def test_git_lfs_pointers_are_named(tmp_path, name):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    message = refusal(tmp_path / name, LFS)
    assert message == f"--train_data FILE: this is {formats.POINTER}" and "git lfs pull" in message
    assert formats.lfs_pointer(tmp_path / name) == formats.lfs_pointer(LFS.replace(b"\n", b"\r\n")) == formats.POINTER
    assert not formats.lfs_pointer(b"version https://git") and not formats.lfs_pointer(b"")


KINDS = {
    b"\n <!DOCTYPE html><p>": "a web page", b"<html>": "a web page", b"<?xml version='1.0'?>": "a web page or XML",
    b"PK\3\4\0\0": "a zip archive", b"PK\3\4\0\0[Content_Types].xml": "an Excel workbook", b"PAR1\0": "a Parquet file",
    gzip.compress(b"text,label", mtime=0): "gzip", b"SQLite format 3\0": "a SQLite database",
    b"\xd0\xcf\x11\xe0": "an old", b"\x80\4\x95\0": "a pickle", b"\x93NUMPY\1": "a NumPy array",
    b"ARROW1\0\0": "an Arrow or Feather file",
    b"a" * 257 + b"ustar\0": "a tar archive", b"BZh91AY&SY": "bzip2", b"%PDF-1.7": "a PDF document",
    "text,label\n".encode("utf-16"): "UTF-16", "text,label\n".encode("utf-32"): "UTF-32",
    "text,label\na,x\n".encode("utf-16-le"): "UTF-16", "text,label\na,x\n".encode("utf-16-be"): "UTF-16",
}  # fmt: skip


@pytest.mark.parametrize("content, kind", KINDS.items())
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.tsv.gz"])
def test_files_under_a_wrong_name_are_named(tmp_path, content, kind, name):
    content = gzip.compress(content) if name.endswith("gz") and kind != "gzip" else content
    if name.endswith("gz") and kind == "gzip":
        content = gzip.compress(content)
    assert f"this is {kind}" in refusal(tmp_path / name, content)


def test_texts_that_only_begin_like_something_else_are_read(tmp_path):
    for first in ("PK", "BM", "PAR", "BZh", "ID3", "GIF", "<p>", "version https", "%PDF", "ORC", "MZ"):
        rows, _, _ = read(tmp_path / "a.csv", f"{first},text,label\n" + BODY)
        assert list(rows.rows[0]) == [first, "text", "label"]


def test_parquet_and_gzip_names_on_plain_text(tmp_path):
    assert "take .gz off its name" in refusal(tmp_path / "a.csv.gz", "text,label\na,x\n")
    pytest.importorskip("pyarrow")
    assert "cannot be read as Parquet" in refusal(tmp_path / "a.parquet", "text,label\na,x\n")


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_lines_cells_and_bombs_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(delimited, "LIMIT", 4096)
    monkeypatch.setattr(delimited, "LINES", 100)
    monkeypatch.setattr(files, "UNPACKED", 100_000)
    for name in ("a.csv", "a.jsonl", "a.csv.gz"):
        content = b"text,label\n" + b"a" * 5000 + b",x\n"
        assert "line 2 has 4,096 characters or more" in refusal(
            tmp_path / name,
            gzip.compress(content) if name.endswith("gz") else content.replace(b"text,label", b"{}"),
        )
    assert "a cell of more than 100 lines" in refusal(tmp_path / "a.csv", 'text,label\n"' + "a\n" * 101 + '",x\n')
    bomb = gzip.compress(b"text,label\n" + b"a,x\n" * 100_000)
    assert "it unpacks to more than 100,000 bytes" in refusal(tmp_path / "a.csv.gz", bomb)
    assert len(read(tmp_path / "a.csv.gz", gzip.compress(b"text,label\n" + b"a,x\nb,y\n" * 10_000))[0].ids) == 20_000


# ---- all at once ----------------------------------------------------------------------------------------------------


def test_all_problems_of_a_file_are_one_message(tmp_path):
    content = "id,text,label\n1,a,x\n2,,y\n3,c,\n4,d,y\n5,e,x\n6,f,rare\n7,g, \n"
    assert refusal(tmp_path / "a.csv", content) == (
        "--train_data FILE: 1 rows have an empty text (rows 2) | 2 rows have an empty label (rows 3, 7) | a stratified "
        "split needs 2 rows of every class, but 'rare' (row 6) has one: give --val_data, or drop it"
    )
    message = refusal(tmp_path / "a.csv", content.replace("label", "label,train_only").replace("\n1,a,x", "\n1,a,x,2"))
    assert "columns" in message
    lines = [line + ",0" for line in content.splitlines()]
    lines[0], lines[1] = "id,text,label,train_only", "1,a,x,maybe"
    message = refusal(tmp_path / "a.csv", "\n".join(lines))
    assert "empty text" in message and "empty label" in message and "malformed train_only" in message
    message = refusal(tmp_path / "a.csv", content, label_names=("x", "y"))
    assert all(words in message for words in ("empty text", "empty label", "unknown labels ('rare' in row 6)"))
    assert "empty text (rows 1) | 2 rows have no number" in refusal(
        tmp_path / "a.csv", "text,label\n,1\na,\nb,x\nc,2\n", task="regression", metric="mae"
    )


def test_the_lone_row_is_named_by_its_place_in_the_file(tmp_path):
    """Rows that never judge do not count, but their places do."""
    content = "text,label,train_only\n" + "a,x,1\n" * 3 + "b,x,0\nc,y,0\nd,y,0\ne,x,0\nf,z,0\ng,z,1\n"
    assert "'z' (row 8) has one" in refusal(tmp_path / "a.csv", content)


def test_repeated_ids_are_said(tmp_path):
    _, _, said = read(tmp_path / "a.csv", "id,text,label\n" + BODY + BODY)
    assert len(said) == 1 and "4 ids stand in several rows (1, 2, 3, 4)" in said[0]


@given(st.text(max_size=6), st.text(max_size=6))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_the_key_of_spellings_is_an_equivalence_and_shown_spellings_differ(one, other):
    """key(quoted) never fails; what is shown of two different labels is never the same on the screen."""
    assert spelling.key(one) == spelling.key(one)
    if one != other:
        first, second = spelling.quoted([one, other])
        assert first != second and spelling.look(first) != spelling.look(second)


def test_a_note_is_printed_once(capsys, monkeypatch):
    errors.note("note: a"), errors.note("note: a")
    monkeypatch.setenv("RANK", "1")
    errors.note("note: b")
    assert capsys.readouterr().out == "note: a\n"


def test_labels_are_what_stands_in_the_file():
    """Neither reading nor comparing labels changes them."""
    column = [spelled for pair in TWINS for spelled in pair]
    values = labelling.find_labels(column).values
    labelling.doubts([[value] for value in column], "x")
    assert set(values) == set(column)
