"""What stands in the files of predictions: the ids of the input, labels as they are, no metrics of unlabelled rows."""

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_ddp import forks, toy_flags, write_rows

import checkpoint
import ensemble
import files
import generate
import infer
import labelling
import predictions
import train
import trained
from configs import InferConfig, TrainConfig
from errors import Degenerate, Untrusted, UserError
from labelling import Labels

pytestmark = forks
IDS = ["007", " 7 ", "=1", "q01461", "5,000", "é", "0", "1e3", "-0", "None"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, small_base) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    return Path(train.main(toy_flags(folder, small_base, max_steps=3, eval_every=3))["run"])


@pytest.fixture(scope="module")
def several(tmp_path_factory, small_base) -> Path:
    """A run of several labels, of which every row has the second."""
    folder = tmp_path_factory.mktemp("several")
    rows = files.read_rows(str(write_rows(folder / "rows.csv", 40)), "x")
    for i, row in enumerate(rows):
        row["tags"] = "a|b" if i % 3 else "b"
    flags = {"task": "multi_label", "max_steps": 2, "eval_every": 2, "metric": "micro_f1", "val_data": None}
    flags |= {"train_data": write(folder / "tags.csv", rows), "val_size": 0.3, "label_column": "tags"}
    return Path(train.main(toy_flags(folder, small_base, **flags))["run"])


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as CSV, JSONL, Parquet, or gzipped, by the file's name."""
    if path.suffix == ".parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if ".jsonl" in path.name:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        text = predictions.csv_text([list(rows[0]), *(row.values() for row in rows)])
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as f:
        return [json.loads(line) for line in f] if path.suffix == ".jsonl" else list(csv.DictReader(f))


def predict(run, path, out, **flags) -> dict:
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return infer.main(["--force", "--runs", str(run), "--input", str(path), "--output", str(out), *words])


# ---- ids ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, column",
    [
        ("rows.csv", "row_id"),
        ("rows.csv.gz", "Id"),
        ("rows.tsv", "post id"),
        ("rows.jsonl", "ID"),
        ("rows.parquet", "row_id"),
    ],
)
def test_a_submission_holds_the_ids_of_its_file(fitted, tmp_path, name, column):
    """The first name of --submission is a column of the input, or --id_column names one: its values byte for byte."""
    rows = [{column: id_, "Question": f"What is {i}?"} for i, id_ in enumerate(IDS)]
    path = write(tmp_path / name, rows)
    if name == "rows.tsv":
        path.write_text("".join("\t".join(row) + "\n" for row in [rows[0], *(row.values() for row in rows)]))
    out = tmp_path / ("o.jsonl" if "json" in name else "o.csv")
    named = {"id_column": column}
    for header, flags in (
        (column, {"submission": f"{column},label"}),
        ("id", named),
        (column, {**named, "submission": ""}),
    ):
        predict(fitted, path, out, **flags, overwrite="true")
        assert [row[header] for row in read(out)] == IDS


def test_an_output_that_is_a_link_is_written_where_it_leads(fitted, tmp_path):
    """As to a larger disk; what was there is kept beside the link, whole."""
    path = write(tmp_path / "rows.csv", [{"id": str(i), "Question": f"What is {i}?"} for i in range(3)])
    (tmp_path / "large").mkdir()
    target, link = tmp_path / "large/o.csv", tmp_path / "o.csv"
    target.write_text("older\n")
    link.symlink_to(target)
    predict(fitted, path, link)
    assert link.is_symlink() and len(read(target)) == 3
    assert (tmp_path / "o.csv.previous").read_text() == "older\n" and os.listdir(tmp_path / "large") == ["o.csv"]


def test_rows_without_an_id_column_are_numbered_and_a_line_names_the_candidates(fitted, tmp_path, capsys):
    rows = [{"": str(i), "note": "x", "Post_ID": str(5000 + i), "Question": f"What is {i}?"} for i in range(9)]
    predict(fitted, write(tmp_path / "a.csv", rows), tmp_path / "o.csv", submission="row_id,label")
    assert [row["row_id"] for row in read(tmp_path / "o.csv")] == [str(i) for i in range(9)]
    words = "a.csv has no column row_id: rows are numbered from 0; --id_column takes one of Post_ID, note\n"
    assert words in capsys.readouterr().out
    predict(fitted, write(tmp_path / "b.csv", [{"Question": "x?"}, {"Question": "y?"}]), tmp_path / "p.csv")
    assert "b.csv has no column id: rows are numbered from 0; add a column of ids" in capsys.readouterr().out


def test_ids_that_are_duplicated_or_empty_are_reported(fitted, tmp_path, capsys):
    rows = [{"id": id_, "Question": f"What is {i}?"} for i, id_ in enumerate(["a", "b", "a", "", " "])]
    predict(fitted, write(tmp_path / "a.csv", rows), tmp_path / "o.csv")
    assert "warning: column id: 2 ids are empty, 1 are duplicated (a)" in capsys.readouterr().out
    assert [row["id"] for row in read(tmp_path / "o.csv")] == ["a", "b", "a", "", " "]


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"id_column": "nope"}, "no column nope"),
        ({"submission": "label,id"}, "expected the id column first, then the label column"),
        ({"submission": "id,id"}, "--submission id,id: expected two different names"),
        ({"submission": "", "id_column": "prediction"}, "--id_column prediction: the output has another column"),
        ({"submission": "part,label"}, "no column part in row 2"),
        ({"submission": "late,label"}, "no column late"),
    ],
)
def test_ids_that_cannot_be_are_refused_before_anything_is_scored(fitted, tmp_path, flags, words):
    rows = [
        {"id": "a", "prediction": "b", "part": "c", "Question": "What?"},
        {"id": "b", "late": "", "prediction": "", "Question": "Y?"},
    ]
    with pytest.raises(UserError, match=words):
        predict(fitted, write(tmp_path / "a.jsonl", rows), tmp_path / "o.csv", **flags)
    assert not (tmp_path / "o.csv").exists()


def test_ids_of_ensembles_generated_text_and_files_beside_the_output(fitted, small_base, tmp_path, monkeypatch):
    rows = [{"row_id": id_, "Question": f"What is {i}?"} for i, id_ in enumerate(IDS)]
    path, out = write(tmp_path / "a.csv", rows), tmp_path / "o.csv"
    for name in ("one.csv", "two.csv"):
        predict(fitted, path, tmp_path / name, submission="", id_column="row_id")
    for members in ([fitted, tmp_path / "one.csv"], [tmp_path / "one.csv", tmp_path / "two.csv"]):
        flags = ["--input", path, "--output", out, "--overwrite", "--submission", "row_id,label"]
        ensemble.main([str(word) for word in ("--runs", *members, *flags)])
        assert [row["row_id"] for row in read(out)] == IDS
    generated = tmp_path / "g.jsonl"
    flags = ["--base", small_base, "--text", "{Question}", "--input", path, "--chat", "no", "--max_new_tokens", 2]
    generate.main([str(word) for word in (*flags, "--id_column", "row_id", "--output", generated)])
    assert [row["id"] for row in read(generated)] == IDS
    monkeypatch.setattr(predictions, "time_left", lambda *options: 1e-9)
    result = predict(fitted, path, out, submission="row_id,label", time_limit="1s", max_tokens=1, overwrite="true")
    late = [row["id"] for row in read(Path(f"{out}.unscored.csv"))]
    assert result["unscored"] == len(late) > 0 and set(late) <= set(IDS) == {row["row_id"] for row in read(out)}


# ---- labels that are not there --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["", "[]", "?", " ", "nan", "absent"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"task": "regression"},
        {"task": "multi_label"},
        {"task": "multi_label", "label_columns": ("a", "b")},
    ],
    ids=["single", "regression", "delimited", "columns"],
)
def test_without_a_label_that_the_run_knows_there_are_no_metrics(settings, cell):
    """One line says why; an absent key of JSONL is as an empty cell, and columns of 0 are no labels."""
    cfg, labels = TrainConfig(**settings), Labels(("a", "b"), ("a", "b"))
    columns = cfg.label_columns or ("label",)
    rows = [dict.fromkeys(columns, cell) for _ in range(9)]
    if cell == "absent":
        rows = [dict.fromkeys(columns, ""), *({} for _ in range(8))]
    if cell == "nan" and cfg.label_columns:
        rows = [dict.fromkeys(columns, "0") for _ in range(9)]
    lines = []
    assert predictions.known_labels(rows, cfg, labels, lines.append) is None
    assert len(lines) == 1 and lines[0].startswith("no metrics: no row of column ")
    assert predictions.known_labels([{"x": "y"}], cfg, labels, lines.append) is None and len(lines) == 1


def test_what_is_wrong_with_labels_is_said_in_the_readers_words():
    """Which rows, what they hold, what was expected and what looks like it, as training says it; of lists too."""
    lines, labels = [], Labels(("a", "b"), ("a", "b"))
    assert predictions.known_labels([{"label": "b "}] * 2, TrainConfig(), labels, lines.append) is None
    assert "('b ' in row 1, 2): expected one of 'a', 'b' ('b' and 'b ' look alike, but differ)" in lines[0]
    rows = [{"label": flags} for flags in ("[1, 0]", "[0, 1]")]
    assert predictions.known_labels(rows, TrainConfig(task="multi_label"), labels, lines.append) is None
    assert "column label holds lists of 0 and 1, one for each of 2 labels: name these" in lines[1]
    rows = [{"label": "a"}, {"label": "b\u200b"}]
    known = predictions.known_labels(rows, TrainConfig(task="multi_label"), labels, lines.append)
    assert known.targets.tolist() == [[1, 0], [0, 0]] and "does not know the labels 'b\\u200b'" in lines[2]


def test_all_columns_that_an_input_lacks_are_named_at_once(tmp_path):
    path = write(tmp_path / "a.csv", [{"q": "a"}])
    cfg = InferConfig(input=str(path), id_column="key", by_column="kind", submission="")
    with pytest.raises(UserError, match="no column text, kind, key"):
        predictions.read_input(cfg, TrainConfig(), str(path), ["text"], print)


@pytest.mark.parametrize("cell", ["", "?"])
def test_unlabelled_rows_are_predicted_without_metrics(several, tmp_path, capsys, cell):
    rows = [{"id": str(i), "Question": f"What is {i}?", "tags": cell} for i in range(9)]
    result = predict(several, write(tmp_path / "a.jsonl", rows), tmp_path / "o.csv")
    assert "metrics" not in result and len(read(tmp_path / "o.csv")) == 9
    assert capsys.readouterr().out.count("no metrics: no row of column tags") == 1


def test_rows_with_labels_are_measured_and_the_others_named(fitted, several, tmp_path, capsys):
    rows = files.read_rows(str(write_rows(tmp_path / "rows.csv", 24)), "x")
    labelled = predict(fitted, write(tmp_path / "half.csv", rows[::2]), tmp_path / "o.csv")["metrics"]
    for i, row in enumerate(rows):
        row["label"] = ("?" if i % 4 == 1 else "") if i % 2 else row["label"]
    assert predict(fitted, write(tmp_path / "a.csv", rows), tmp_path / "p.csv")["metrics"] == labelled
    words = (
        "metrics are over 12 of 24 rows; column label: 12 rows have unknown labels ('?' in row 2, 6, 10 and 3 more, "
    )
    assert words in capsys.readouterr().out

    # Of several labels a row without one counts as such, as soon as another has one.
    rows = [{"Question": f"What is {i}?", "tags": ["a", "", "a|new", "[1"][i % 4]} for i in range(12)]
    result = predict(several, write(tmp_path / "b.csv", rows), tmp_path / "q.csv")
    out = capsys.readouterr().out
    assert result["metrics"]["rows"] == 9 and "metrics are over 9 of 12 rows" in out and "the labels 'new'" in out


@pytest.mark.parametrize("rows", [["", ""], ["nan", "?"], ["1", ""], ["1", "inf"]])
def test_numbers_that_are_missing_are_left_out(rows):
    cfg, lines = TrainConfig(task="regression"), []
    labels = Labels((), ("label",))
    known = predictions.known_labels([{"label": cell} for cell in rows], cfg, labels, lines.append)
    assert len(lines) == 1
    if rows[0] == "1":
        assert known.rows.tolist() == [0] and known.targets.tolist() == [1]
    else:
        assert known is None


# ---- repeated texts -------------------------------------------------------------------------------------------------


def test_repeated_texts_are_predicted_and_one_score_for_different_texts_is_not(fitted, tmp_path, monkeypatch):
    flags = ["--runs", str(fitted), "--output", str(tmp_path / "o.csv"), "--overwrite", "--input"]
    for kinds, count in ((1, 10), (2, 40), (3, 300)):
        rows = [{"id": str(i), "Question": f"What is {i % kinds}?"} for i in range(count)]
        path = write(tmp_path / f"{kinds}.csv", rows)
        assert infer.main([*flags, str(path)])["rows"] == count
        assert ensemble.main([*flags[:1], str(fitted), predict_to(fitted, path, tmp_path), *flags[2:], str(path)])
    logits_of = trained.Run.logits

    def ignores_its_input(self, *args, **options):
        logits, report = logits_of(self, *args, **options)
        return logits[:1].repeat(len(logits), axis=0), report

    monkeypatch.setattr(trained.Run, "logits", ignores_its_input)
    monkeypatch.setattr("evaluate.lora.adapters", lambda model: {})
    assert infer.main([*flags, str(tmp_path / "1.csv")])["rows"] == 10
    for name in ("2.csv", "3.csv"):
        with pytest.raises(Degenerate, match="different inputs have 1 distinct scores"):
            infer.main([*flags, str(tmp_path / name)])


def predict_to(run, path, folder) -> str:
    predict(run, path, folder / "member.csv", submission="", overwrite="true")
    return str(folder / "member.csv")


# ---- cells ----------------------------------------------------------------------------------------------------------

ODD = (
    "=1+1",
    'a "b"',
    "a,b",
    "two\nlines",
    "a\rb",
    " edge ",
    "id",
    "prediction",
    "\U0001f600",
    "None",
    "007",
    "a|b",
    "[x",
)


@pytest.mark.parametrize("name", ["o.csv", "o.jsonl"])
@pytest.mark.parametrize("submission", ["id,label", ""])
def test_odd_labels_read_back_equal(tmp_path, name, submission):
    cfg = InferConfig(output=str(tmp_path / name), submission=submission)
    labels = Labels(ODD, ODD)
    shares = np.random.default_rng(0).dirichlet(np.ones(len(ODD)), size=len(ODD)).tolist()
    ids = predictions.Ids("id", list(ODD))
    predictions.write_records(cfg, labels, ids, list(ODD), shares, False)
    rows = read(tmp_path / name)
    answer = "label" if submission else "prediction"
    assert [row["id"] for row in rows] == [row[answer] for row in rows] == list(ODD)
    if not submission:
        got = [[float(row[f"probability_{value}"]) for value in ODD] for row in rows]
        assert got == shares and np.allclose(np.sum(got, axis=1), 1, atol=1e-12)
    if name == "o.csv":
        pd = pytest.importorskip("pandas")
        table = pd.read_csv(tmp_path / name, dtype=str, keep_default_na=False)
        assert table["id"].tolist() == table[answer].tolist() == list(ODD)


def test_sets_of_odd_labels_read_back_as_these_sets():
    """Delimited where that can be read, a JSON list where a label holds what would separate or begin one."""
    for values, delimiter in ((("a", "b c", "d"), "|"), (ODD, "|"), (("a|", "b"), "||"), (("[x", "b"), "|")):
        cfg = TrainConfig(task="multi_label", label_delimiter=delimiter)
        labels = Labels(values, values)
        sets = [[], [values[0]], list(values), list(values[1:])]
        cells = predictions.as_cells(sets, cfg, labels)
        assert labelling.label_sets(cfg, [{"label": cell} for cell in cells], "x") == sets
        assert cells[2].startswith("[") == (values != ("a", "b c", "d"))


def test_neither_minus_zero_nor_nan_is_written(tmp_path):
    labels, ids = Labels((), ("score",)), predictions.Ids("id", ["a", "b", "c"])
    for name, expected in (("o.csv", "id,label\na,0.0\nb,\nc,1.5\n"), ("o.jsonl", '{"id": "a", "label": 0.0}\n')):
        cfg = InferConfig(output=str(tmp_path / name))
        predictions.write_records(cfg, labels, ids, [-0.0, float("nan"), 1.5], [[]] * 3, False)
        assert (tmp_path / name).read_text().startswith(expected)
    assert [row["label"] for row in read(tmp_path / "o.jsonl")] == [0.0, "", 1.5]


# ---- a base that moved, texts of all kinds, another folder ----------------------------------------------------------


def test_a_run_finds_its_base_where_it_is_now(small_base, tmp_path):
    """Predictions are the same bytes; another base is refused by its fingerprint, and the old place names the flag."""
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(small_base, base)
    run = train.main(toy_flags(tmp_path, str(base), max_steps=2, eval_every=2))["run"]
    rows = write_rows(tmp_path / "new.csv", 12, skip=14)
    predict(run, rows, tmp_path / "before.csv", submission="")
    base.rename(moved)
    with pytest.raises(UserError, match=r"no such folder.*name its new folder with --base, or load_run\(run, base="):
        predict(run, rows, tmp_path / "o.csv")
    predict(run, rows, tmp_path / "after.csv", submission="", base=moved)
    assert (tmp_path / "after.csv").read_bytes() == (tmp_path / "before.csv").read_bytes()
    assert trained.load_run(run, base=str(moved)).predict(["x"])
    members = ["--runs", run, str(tmp_path / "before.csv"), "--input", str(rows), "--output", str(tmp_path / "e.csv")]
    assert ensemble.main([*members, "--base", str(moved)])["rows"] == 12
    with pytest.raises(UserError, match="--text has no effect: it is used without --runs"):
        predict(run, rows, tmp_path / "o.csv", base=moved, text="{label}")

    # A resumed run looks there too, and goes on to the same end.
    resumed = Path(run)
    (resumed / "result.json").unlink()
    flags = ["--resume", run, "--base", str(moved)]
    assert train.main(flags)["steps"] == 2
    tensors = checkpoint.load_tensors(moved / "model.safetensors")
    checkpoint.save_tensors(moved / "model.safetensors", {name: tensor * 1.1 for name, tensor in tensors.items()})
    with pytest.raises(Untrusted, match="not the one this run was trained on"):
        predict(run, rows, tmp_path / "o.csv", base=moved)
    (resumed / "result.json").unlink()
    with pytest.raises(Untrusted, match="not the one this run was trained on"):
        train.main(flags)


def test_texts_are_taken_as_they_are_meant_or_refused(fitted):
    run = trained.load_run(fitted)
    expected = run.predict(["one text"])
    single = "one text", {"Question": "one text"}
    for texts in (
        *single,
        ("one text",),
        np.array(["one text"]),
        (text for text in single[:1]),
        [{"Question": "one text"}],
    ):
        assert run.predict(texts) == expected
    assert run.predict([]) == [] and run.predict(iter(())) == []
    refused = [None, 3, True, b"x", {"a", "b"}, np.array("x"), np.array([["x"]])]
    refused += [[bad] for bad in (None, 3, b"x", ["x"], {"x": "y"}, {"Question": None}, float("nan"), np.bytes_(b"x"))]
    for texts in refused:
        with pytest.raises(UserError, match=r"^texts"):
            run.predict(texts)
    pd = pytest.importorskip("pandas")
    assert run.predict(pd.Series(["one text"], index=[7])) == expected
    with pytest.raises(UserError, match="got DataFrame, expected a list"):
        run.predict(pd.DataFrame({"Question": ["one text"]}))


def test_lasttoken_is_imported_beside_packages_of_the_same_names(fitted, tmp_path):
    """From another folder, after another evaluate and data: both sides keep their own, first or last on the path."""
    for name in ("evaluate.py", "data/__init__.py", "data/part.py", "model.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('OWNER = "theirs"\n')
    code = f"""
import sys, evaluate, data.part
for place in (len(sys.path), 0):
    sys.path.insert(place, {str(ROOT)!r})
    sys.modules.pop("lasttoken", None)
    before = sys.path[:]
    from lasttoken import UserError, load_run
    assert load_run({str(fitted)!r}).predict("What is 2 + 2?")[0]["label"]
    assert evaluate.OWNER == sys.modules["evaluate"].OWNER == sys.modules["data"].part.OWNER == "theirs"
    assert sys.path == before and "trained" not in sys.modules
    import model
    assert model.OWNER == "theirs"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
