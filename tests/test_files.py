"""Rows as they are in the file, labels, and the columns that any training file may have."""

import gzip
import io
import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import files
import labelling
from errors import UserError

HEAD = b"id,text,label\n"


def rows_of(folder: Path, name: str, content: bytes, columns=("text", "label")) -> list[dict[str, str]]:
    """What a user gets who gives this file as --train_data."""
    path = folder / name
    path.write_bytes(content)
    rows = files.read_rows(str(path), "train_data")
    files.need_columns(rows, list(columns), str(path), "train_data")
    return rows


def table(*values: tuple[str, str, str]) -> list[dict[str, str]]:
    return [dict(zip(("id", "text", "label"), v, strict=True)) for v in values]


# ---- hostile CSV files: the exact rows, or an error that names the place --------------------------------------------

ZIP = io.BytesIO()
with zipfile.ZipFile(ZIP, "w") as z:
    z.writestr("train.csv", "id,text,label\n1,a,x\n")
BIG = "é" * 5_000_000  # 10 MB of UTF-8
GOOD = table(("1", "a", "x"), ("2", "b", "y"))
CSV = {  # name: (bytes, expected rows, or the words of the refusal)
    "empty": (b"", "no rows"),
    "header only": (HEAD, "no rows"),
    "blank lines only": (b"\n\n", "no rows"),
    "no final newline": (HEAD + b"1,a,x\n2,b,y", GOOD),
    "CRLF": (b"id,text,label\r\n1,a,x\r\n2,b,y\r\n", GOOD),
    "CR": (b"id,text,label\r1,a,x\r2,b,y\r", GOOD),
    "mixed line ends": (b"id,text,label\r\n1,a,x\n2,b,y\r", GOOD),
    "BOM": (b"\xef\xbb\xbf" + HEAD + b"1,a,x\n2,b,y\n", GOOD),
    "UTF-16 LE": ("id,text,label\n1,a,x\n".encode("utf-16-le").join([b"\xff\xfe", b""]), "this is UTF-16"),
    "UTF-16 BE": (b"\xfe\xff" + "id,text,label\n1,a,x\n".encode("utf-16-be"), "this is UTF-16"),
    "UTF-16 without a mark": ("id,text,label\n1,a,x\n".encode("utf-16-le"), "line 1 holds a NUL"),
    "latin-1 byte": (HEAD + b"1,caf\xe9,x\n", "not UTF-8 (byte 0xe9 in line 2)"),
    "latin-1 byte after a BOM": (b"\xef\xbb\xbf" + HEAD + b"1,a,x\n\xe9,b,x\n", "not UTF-8 (byte 0xe9 in line 3)"),
    "cut multibyte": (HEAD + b"1,a,x\n2,b\xe2\x82", "not UTF-8 (byte 0xe2 in line 3)"),
    "overlong UTF-8": (HEAD + b"1,\xc0\xaf,x\n", "not UTF-8 (byte 0xc0 in line 2)"),
    "NUL in text": (HEAD + b"1,a,x\n2,b\0,y\n", "line 3 holds a NUL"),
    "NUL in id": (HEAD + b"1\0,a,x\n", "line 2 holds a NUL"),
    "missing text column": (b"id,label\n1,x\n", "no column text (there is: id, label)"),
    "missing label column": (b"id,text\n1,a\n", "no column label (there is: id, text)"),
    "missing id column": (b"text,label\na,x\n", [{"text": "a", "label": "x"}]),
    "duplicate header": (b"id,text,label,text\n1,a,x,b\n", "column 'text' is duplicated"),
    "header with spaces": (b"id, text,label\n1,a,x\n", "no column text (there is: id,  text, label)"),
    "header with other case": (b"id,Text,label\n1,a,x\n", "no column text (there is: id, Text, label)"),
    "extra column": (b"id,text,label,more\n1,a,x,m\n", [{"id": "1", "text": "a", "label": "x", "more": "m"}]),
    "ragged short": (HEAD + b"1,a,x\n2,b\n", "1 rows do not have the header's 3 columns (line 3 has 2)"),
    "ragged long": (
        HEAD + b"1,a,x,z\n2,b,y\n3,c,d,e\n",
        "2 rows do not have the header's 3 columns (line 2 has 4, lin",
    ),
    "unterminated quote": (HEAD + b'1,"a,x\n2,b,y\n3,c,z\n', "line 4: unexpected end of data"),
    "stray quote": (HEAD + b'1,a,x\n2,"b"c,y\n', "line 3: ',' expected after '\"'"),
    "quote inside bare text": (HEAD + b'1,5" disk,x\n', table(("1", '5" disk', "x"))),
    "escaped quotes": (HEAD + b'1,"say ""hi"", twice",x\n', table(("1", 'say "hi", twice', "x"))),
    "newline inside a field": (HEAD + b'1,"a\nb\r\nc",x\n2,b,y\n', table(("1", "a\nb\r\nc", "x"), ("2", "b", "y"))),
    "blank rows": (HEAD + b"\n1,a,x\n\n\n2,b,y\n\n", GOOD),
    "white-space text": (HEAD + b"1,  \t,x\n", table(("1", "  \t", "x"))),
    "empty text": (HEAD + b'1,,x\n2,"",y\n', table(("1", "", "x"), ("2", "", "y"))),
    "empty label": (HEAD + b"1,a,\n", table(("1", "a", ""))),
    "texts that look missing": (
        HEAD + b"NA,null,None\n007,NaN,nan\n-,N/A,NULL\n",
        table(("NA", "null", "None"), ("007", "NaN", "nan"), ("-", "N/A", "NULL")),
    ),
    "labels that look like numbers": (
        HEAD + b"007,1,1\n08,1.0,1.0\n1e3,01,01\n",
        table(("007", "1", "1"), ("08", "1.0", "1.0"), ("1e3", "01", "01")),
    ),
    "duplicate ids": (
        HEAD + b"1,a,x\n1,a,x\n1,a,y\n",
        table(("1", "a", "x"), ("1", "a", "x"), ("1", "a", "y")),
    ),
    "200 KB field": (HEAD + b"1," + b"a" * 200_000 + b",x\n", table(("1", "a" * 200_000, "x"))),
    "10 MB field": (HEAD + b"1," + BIG.encode() + b",x\n", table(("1", BIG, "x"))),
    "ids like formulas": (
        HEAD + b"=1+1,a,x\n+1,b,y\n-1,c,x\n@a,d,y\n",
        table(("=1+1", "a", "x"), ("+1", "b", "y"), ("-1", "c", "x"), ("@a", "d", "y")),
    ),
    "semicolons": (b"id;text;label\n1;a;x\n2;b;y\n", GOOD),
    "tabs in a .csv": (b"id\ttext\tlabel\n1\ta\tx\n2\tb\ty\n", GOOD),
    "zip": (ZIP.getvalue(), "this is a zip archive"),
    "parquet": (b"PAR1" + bytes(range(200)), "this is a Parquet file"),
    "gzip": (gzip.compress(HEAD + b"1,a,x\n", mtime=0), "not UTF-8"),
    "odd spaces stay": (
        HEAD + "1, a\u00a0 ,x\n2,\u2028b\u0085,y\n".encode(),
        table(("1", " a\u00a0 ", "x"), ("2", "\u2028b\u0085", "y")),
    ),
}


@pytest.mark.parametrize("name", CSV)
def test_hostile_csv(tmp_path, name):
    content, expected = CSV[name]
    if isinstance(expected, str):
        with pytest.raises(UserError) as e:
            rows_of(tmp_path, "a.csv", content)
        assert expected in str(e.value) and f"--train_data {tmp_path / 'a.csv'}: " in str(e.value)
        assert "\n" not in str(e.value) and len(str(e.value)) < 600
    else:
        assert rows_of(tmp_path, "a.csv", content) == expected


DEEP = b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b', "label": "x"}\n'
LINE = b'{"text": "a", "label": "x"}\n'
JSONL = {
    "empty": (b"", "no rows"),
    "blank lines": (b"\n" + LINE + b"  \n\r\n" + LINE, [{"text": "a", "label": "x"}] * 2),
    "BOM, CRLF, no final newline": (
        b"\xef\xbb\xbf" + LINE[:-1] + b"\r\n" + LINE[:-1],
        [{"text": "a", "label": "x"}] * 2,
    ),
    "cut last line": (LINE * 2 + LINE[:-9], "1 lines are not JSON objects (line 3: "),
    "not an object": (LINE + b"[1, 2]\n", "line 2: expected an object, got list"),
    "a bare string": (b'"a"\n', "line 1: expected an object, got str"),
    "duplicate keys": (LINE + b'{"text": "a", "label": "x", "text": "b"}\n', "line 2: key 'text' is duplicated"),
    "nested text": (
        b'{"text": ["a", {"b": "\\u00e9"}], "label": "x"}\n',
        [{"text": '["a", {"b": "\\u00e9"}]', "label": "x"}],
    ),
    "too deeply nested": (LINE + DEEP, "line 2: "),
    "NaN": (LINE + b'{"text": NaN, "label": "x"}\n', "line 2: NaN is no JSON value"),
    "Infinity": (b'{"text": "a", "label": -Infinity}\n', "line 1: -Infinity is no JSON value"),
    "bad escape": (LINE + b'{"text": "\\x41", "label": "x"}\n', "line 2: Invalid \\escape"),
    "control character": (b'{"text": "a\tb", "label": "x"}\n', "line 1: Invalid control character"),
    "lone surrogate in a text": (LINE + b'{"text": "a\\ud83d", "label": "x"}\n', "line 2: it holds a lone surrogate"),
    "lone surrogate in a label": (LINE + b'{"text": "a", "label": "\\udc00"}\n', "line 2: it holds a lone surrogate"),
    "surrogate pair": (b'{"text": "\\ud83d\\ude00", "label": "x"}\n', [{"text": "😀", "label": "x"}]),
    "numbers, booleans and null": (
        b'{"text": 7, "label": 1}\n{"text": 1.5, "label": true}\n{"text": null, "label": false}\n',
        [{"text": "7", "label": "1"}, {"text": "1.5", "label": "True"}, {"text": "", "label": "False"}],
    ),
    "texts that look missing": (
        b'{"text": "null", "label": "None"}\n{"text": "NA", "label": "01"}\n',
        [{"text": "null", "label": "None"}, {"text": "NA", "label": "01"}],
    ),
    "unusual line separators in a text": (
        '{"text": "a\u2028b\u0085c", "label": "x"}\n'.encode(),
        [{"text": "a\u2028b\u0085c", "label": "x"}],
    ),
    "a key missing everywhere": (b'{"label": "x"}\n', "no column text (there is: label)"),
    "a key missing in one row": (LINE * 2 + b'{"text": "b"}\n', "no column label in row 3 (there is: text)"),
    "latin-1 byte": (LINE + b'{"text": "\xe9", "label": "x"}\n', "not UTF-8 (byte 0xe9 in line 2)"),
    "NUL byte": (LINE + b'{"text": "\0", "label": "x"}\n', "line 2 holds a NUL"),
    "a CSV": (HEAD + b"1,a,x\n", "2 lines are not JSON objects (line 1: "),
    "one big array": (
        b'[{"text": "a", "label": "x"},\n {"text": "b", "label": "y"}]\n',
        "2 lines are not JSON objects",
    ),
    "10 MB field": (json.dumps({"text": BIG, "label": "x"}).encode(), [{"text": BIG, "label": "x"}]),
}


@pytest.mark.parametrize("name", JSONL)
def test_hostile_jsonl(tmp_path, name):
    content, expected = JSONL[name]
    if isinstance(expected, str):
        with pytest.raises(UserError) as e:
            rows_of(tmp_path, "a.jsonl", content)
        assert expected in str(e.value) and f"--train_data {tmp_path / 'a.jsonl'}: " in str(e.value)
        assert "\n" not in str(e.value) and len(str(e.value)) < 800
    else:
        assert rows_of(tmp_path, "a.jsonl", content) == expected


def test_tsv_and_gz(tmp_path):
    tsv = b'id\ttext\tlabel\n1\t"a\tb, c"\tx\n'
    expected = table(("1", "a\tb, c", "x"))
    assert rows_of(tmp_path, "a.tsv", tsv) == expected
    assert rows_of(tmp_path, "a.tsv.gz", gzip.compress(tsv, mtime=0)) == expected
    assert rows_of(tmp_path, "a.CSV.GZ", gzip.compress(HEAD + b"1,a,x\n2,b,y\n", mtime=0)) == GOOD
    assert rows_of(tmp_path, "a.jsonl.gz", gzip.compress(LINE, mtime=0)) == [{"text": "a", "label": "x"}]


def damaged() -> bytes:
    packed = bytearray(gzip.compress(HEAD + b"1,a,x\n" * 200, mtime=0))
    packed[10] = 0xFF  # no such type of block: zlib.error, which is no OSError
    return bytes(packed)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv.gz", gzip.compress(HEAD + b"1,a,x\n" * 99, mtime=0)[:-20], "cannot be read"),
        ("b.csv.gz", HEAD, "cannot be read"),
        ("c.csv.gz", damaged(), "cannot be read"),
        ("a.txt", b"x", "expected a name ending in .csv, .tsv, .jsonl"),
        ("a", b"x", "expected a name ending in"),
        ("a.txt.gz", b"x", "got '.txt'"),
        ("a.parquet", b"PAR1 but no parquet file", "arquet"),
    ],
)
def test_files_of_the_wrong_kind_are_named(tmp_path, name, content, words):
    with pytest.raises(UserError) as e:
        rows_of(tmp_path, name, content)
    assert words in str(e.value) and f"--train_data {tmp_path / name}: " in str(e.value)


def test_a_missing_file_names_path_and_flag(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match=re.escape(f"--val_data {path}: no such file")):
            files.read_rows(str(path), "val_data")


CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=8))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_any_text_survives_csv_tsv_and_jsonl(tmp_path_factory, cells):
    folder = tmp_path_factory.getbasetemp()
    expected = [{"text": a, "label": b} for a, b in cells]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        quoted = [
            delimiter.join('"' + c.replace('"', '""') + '"' for c in pair) for pair in [("text", "label"), *cells]
        ]
        assert rows_of(folder, name, ("\n".join(quoted) + "\n").encode()) == expected
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in expected)
    assert rows_of(folder, "a.jsonl", lines.encode()) == expected


def test_bytes_literals_become_text_and_nothing_else_does():
    texts = {
        r"b'Solve 0 = x.\n'": "Solve 0 = x.\n",
        r"""b"It's \\frac{1}{2}" """.strip(): r"It's \frac{1}{2}",
        r"b'caf\xc3\xa9'": "café",
        "b''": "",
        r"b'\xff'": r"b'\xff'",  # not UTF-8
        "b'": "b'",
        "b'a' + b'c'": "b'a' + b'c'",
        "b'a', b'c'": "b'a', b'c'",
        "b'-" + "(" * 9000 + "'": "-" + "(" * 9000,
        "b''" + "-" * 30000 + "b''": "b''" + "-" * 30000 + "b''",
        "b'unclosed": "b'unclosed",
        "b is 'b'": "b is 'b'",
        "": "",
        "B'a'": "B'a'",
    }
    rows = [{"text": t, "other": "b'stays'"} for t in texts]
    changed = files.decode_bytes_literals(rows, ["text"])
    assert [row["text"] for row in rows] == list(texts.values())
    assert changed == sum(a != b for a, b in texts.items())
    assert {row["other"] for row in rows} == {"b'stays'"}
    two = [{"a": "b'x'", "b": "b'y'"}]
    assert files.decode_bytes_literals(two, ["a", "b"]) == 1 and two == [{"a": "x", "b": "y"}]  # rows, not fields


def test_empty_rows_are_those_without_any_text():
    rows = [{"a": "x", "b": ""}, {"a": " \n", "b": "\t"}, {"a": "", "b": ""}, {"a": "", "b": "0"}]
    assert files.empty_rows(rows, ["a", "b"]) == [1, 2]


# ---- the real files -------------------------------------------------------------------------------------------------


def test_math_problems_463_bytes_literals_in_train_175_in_test(shared):
    for name, count, literals in (("train.csv", 8151, 463), ("test.csv", 3044, 175)):
        rows = files.read_rows(str(shared / "data/math_problems" / name), "train_data")
        assert len(rows) == count
        before = [row["Question"] for row in rows]
        assert files.decode_bytes_literals(rows, ["Question"]) == literals
        after = [row["Question"] for row in rows]
        assert sum(a != b for a, b in zip(before, after, strict=True)) == literals
        assert not [t for t in after if t.startswith(("b'", 'b"'))] and all(t.strip() for t in after)


def test_math_problems_test_rows_stay_in_order(shared):
    rows = files.read_rows(str(shared / "data/math_problems/test.csv"), "input")
    assert [row["id"] for row in rows] == [str(i) for i in range(3044)]


def test_real_jsonl_is_read_whole(shared):
    rows = files.read_rows(str(shared / "data/math_verification/train.jsonl"), "train_data")
    assert len(rows) == 3960 and {row["is_correct"] for row in rows} == {"True", "False"}


# ---- labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "column, names, values, shown",
    [
        (["10", "9", "0", "-2", "9"], (), ("-2", "0", "9", "10"), None),  # whole numbers: numeric order
        (["b", "10", "9", "a"], (), ("10", "9", "a", "b"), None),  # strings: sorted
        (["1", "1.0", "01"], (), ("01", "1", "1.0"), None),  # no whole number is another's spelling
        (["-0", "0"], (), ("-0", "0"), None),
        (["NA", "null", "None", "nan"], (), ("NA", "None", "nan", "null"), None),
        (["a", "b"], ("b", "c", "a"), ("b", "c", "a"), None),  # given names, in their order
        (["2", "0", "1"], ("x", "y", "z"), ("0", "1", "2"), ("x", "y", "z")),  # display names
        (["1", "1"], ("x", "y", "z"), ("0", "1", "2"), ("x", "y", "z")),
        (["1", "2"], ("2", "1"), ("2", "1"), None),  # numbers as given names
        (["9" * 5000, "1"], (), ("1", "9" * 5000), None),
        (list(map(str, range(1001))) * 2, (), tuple(map(str, range(1001))), None),
    ],
)
def test_find_labels(column, names, values, shown):
    assert labelling.find_labels(column, names) == labelling.Labels(values, shown or values)


@pytest.mark.parametrize(
    "column, words",
    [
        (["a", "", "b", " "], "2 rows have an empty label (rows 2, 4)"),
        (["a", "a"], "holds 1 different labels (a): expected at least 2 classes"),
        ([str(i) for i in range(1001)], "1001 different labels"),
        ([str(i % 1001) for i in range(2001)], "most of them of several rows"),
    ],
)
def test_find_labels_refuses(column, words):
    with pytest.raises(UserError) as e:
        labelling.find_labels(column)
    assert words in str(e.value)


def test_encode_labels_inverts_and_names_unknown_labels_with_rows():
    labels = labelling.find_labels(["x", "y", "z"])
    column = ["z", "x", "y", "x"]
    encoded = labelling.encode_labels(column, labels, "f")
    assert encoded.dtype == np.int64 and [labels.values[i] for i in encoded] == column
    with pytest.raises(UserError) as e:
        labelling.encode_labels(["x", "Y", "y", "w", "Y", "Y", "Y"], labels, "--val_data v.csv")
    for words in ("--val_data v.csv: 5 rows", "'Y' in row 2, 5, 6 and 1 more", "'w' in row 4", "one of 'x', 'y', 'z'"):
        assert words in str(e.value)


def test_a_name_with_a_comma_has_a_way_out():
    labels = labelling.Labels(("a", "Yes", "sure"), ("a", "Yes", "sure"))
    expected = """expected one of 'a', 'Yes', 'sure'; a name with a comma stands in quotation marks"""
    with pytest.raises(UserError, match=expected):
        labelling.encode_labels(["a", "Yes, sure"], labels, "x")


def test_names_that_do_not_cover_the_column_are_refused():
    labels = labelling.find_labels(["a", "q"], ("a", "b"))
    with pytest.raises(UserError, match=r"unknown labels \('q' in row 2\)"):
        labelling.encode_labels(["a", "q"], labels, "--train_data t.csv")


@pytest.mark.parametrize("text", ["much", "", "nan", "inf", "1,5", "1e60", "1_000"])
def test_numbers_that_are_none_are_named(text):
    assert labelling.encode_numbers(["1", "-2.5e-3", " 7 "], "x").tolist() == [1, np.float32(-2.5e-3), 7]
    with pytest.raises(UserError, match=rf"x: 2 rows have no number \('{text}' in row 2, 4\): expected finite ones"):
        labelling.encode_numbers(["1", text, "2", text], "x")


# ---- columns that any training file may have ------------------------------------------------------------------------


def test_train_only_is_read_as_yes_or_no():
    rows = [{"train_only": cell} for cell in ("1", " TRUE", "yes", "0", "false", "No", "", "  ")] + [{}]
    assert labelling.train_only(rows, "x").tolist() == [True] * 3 + [False] * 6
    assert not labelling.train_only([*rows[3:], {"a": "1"}], "x").any()
    with pytest.raises(UserError, match=r"x: 2 rows have a malformed train_only \('2' in row 2, 'maybe' in row 3\)"):
        labelling.train_only([{"train_only": cell} for cell in ("1", "2", "maybe")], "x")


def soft(task: str, *rows: dict, label_column: str = "label"):
    labels = labelling.Labels(*[() if task == "regression" else ("a", "b")] * 2)
    cfg = SimpleNamespace(task=task, label_column=label_column)
    return labelling.soft_targets(cfg, [{k: str(v) for k, v in row.items()} for row in rows], labels, "--train_data t")


def of(a, b) -> dict:
    return {"probability_a": a, "probability_b": b}


def test_soft_targets_of_classes_sum_to_one_and_those_of_labels_need_not():
    found = soft("single_label", of(0.25, 0.7495), of("", " "), of("1e0", 0), {"label": "a"})
    assert found.dtype == np.float32 and np.isnan(found[[1, 3]]).all()
    np.testing.assert_allclose(found[[0, 2]], [[0.25 / 0.9995, 0.7495 / 0.9995], [1, 0]], rtol=1e-7)
    found = soft("multi_label", of(0.9, 0.8), of(0, 0), of("", ""))
    np.testing.assert_allclose(found[:2], [[0.9, 0.8], [0, 0]], rtol=1e-7)
    assert np.isnan(found[2]).all()
    assert soft("single_label", {"label": "a"}) is None and soft("regression", {"label": 1}) is None
    assert soft("regression", {"probability_a": 0.3}, label_column="probability_a") is None, "the numbers themselves"


@pytest.mark.parametrize(
    "task, row, words",
    [
        ("single_label", {"probability_a": 1}, "missing or unknown: probability_b"),
        ("multi_label", {**of(0, 1), "probability_c": 1}, "missing or unknown: probability_c"),
        ("single_label", {"probability_A": 1, "probability_b": 0}, "missing or unknown: probability_A, probability_a"),
        ("regression", {"probability_a": 1}, "missing or unknown: probability_a"),
        ("single_label", of(0.5, 0.498), "malformed probabilities .* in row 1.: expected sums of 1"),
        ("single_label", of(0.5, ""), r"\['0.5', ''\] in row 1"),
        ("single_label", of(1.5, -0.5), "row 1"),
        ("multi_label", of(1.1, 0), "expected numbers from 0 to 1"),
        ("multi_label", of("nan", 0), "row 1"),
        ("multi_label", of("much", 0), "row 1"),
    ],
)
def test_wrong_probability_columns_are_named(task, row, words):
    with pytest.raises(UserError, match=f"--train_data t: .*{words}"):
        soft(task, row)
