"""The scripts that write training files: rows out of example columns, pseudo-labels, guarded rounds of them."""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import load_rows
from test_ddp import ROOT, forks, toy_flags
from test_slices import BINARY, write_pairs

import files
import infer
import metrics
import report_runs
import train
import trained
from configs import TrainConfig
from errors import UserError

sys.path.insert(0, str(ROOT / "runs"))
import example_rows  # noqa: E402
import pseudo_labels  # noqa: E402
import pseudo_rounds  # noqa: E402
import training_file  # noqa: E402

pytestmark = forks
SILENT = lambda *words: None  # noqa: E731


# ---- the writer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_what_is_written_is_read_again_as_it_was(tmp_path, name):
    """A carriage return alone, too: csv would write it unquoted, and read it as the end of the row."""
    own = [{"text": 'a\rb, "c"\t\r\n é\u2028', "label": "1"}, {"text": " \rx", "label": ""}]
    path = str(tmp_path / "new" / name)
    summary = training_file.write(path, own, [{"text": "more", "train_only": "1"}])
    assert files.read_rows(path, "x") == [
        {**own[0], "train_only": ""}, {**own[1], "train_only": ""}, {"text": "more", "label": "", "train_only": "1"},
    ]  # fmt: skip
    assert summary == {"output": path, "rows": 3, "added": 1}
    with pytest.raises(UserError, match="exists: name a new file, or replace it with --overwrite"):
        training_file.write(path, own, [])
    training_file.write(path, own, [], overwrite=True)
    assert files.read_rows(path, "x") == own
    with pytest.raises(UserError, match="expected a name ending in .csv, .tsv or .jsonl"):
        training_file.write(str(tmp_path / "a.csv.gz"), own, [])


# ---- rows from examples ---------------------------------------------------------------------------------------------


def write_rules(path: Path, rows: int = 48) -> Path:
    """Posts under two rules; row i's violating example is `bad i // 4` (so that each is there twice), its other `good
    i`; the example `both` has both labels, and row 1's own body is another row's example.
    """
    out = []
    for i in range(rows):
        violates = int(i % 3 == 0)
        out.append(
            {"row_id": i, "body": f"post number {i} {'buy now' if violates else 'hello'}",
             "rule": ["ads", "law"][i % 2],
             "positive": f"bad {i // 4}" if i != 5 else "both", "negative": f"good {i}" if i != 7 else "both",
             "rule_violation": violates}
        )  # fmt: skip
    out[9]["negative"] = out[1]["body"].upper() + " "
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(out[0]))
        writer.writeheader()
        writer.writerows(out)
    return path


EXAMPLES = ["--examples", "positive=1", "negative=0", "--label_column", "rule_violation", "--id_column", "row_id"]
RULES = {
    "text": "{rule} {positive} {negative} {body}", "label_column": "rule_violation", "id_column": "row_id",
    "group_column": "body", "by_column": "rule",
}  # fmt: skip


def with_examples(folder: Path, *flags: str) -> Path:
    target = folder / "with_examples.csv"
    example_rows.main([str(write_rules(folder / "rules.csv")), str(target), *EXAMPLES, *flags])
    return target


def test_examples_become_rows_once_each(tmp_path):
    rows = files.read_rows(str(with_examples(tmp_path, "--by_column", "rule")), "x")
    own, made = rows[:48], rows[48:]
    assert [{**row, "train_only": ""} for row in own] == rows[:48]
    assert [{k: v for k, v in row.items() if k != "train_only"} for row in own] == files.read_rows(
        str(tmp_path / "rules.csv"), "x"
    )
    keys = [(row["body"], row["rule"]) for row in made]
    wanted = {(f"bad {i // 4}", ["ads", "law"][i % 2]) for i in range(48) if i != 5}
    wanted |= {(f"good {i}", ["ads", "law"][i % 2]) for i in range(48) if i not in (7, 9)}
    assert set(keys) == wanted and len(keys) == len(wanted), "not `both`, which has two labels, nor row 1's own text"
    for row in made:
        parent = own[int(row["row_id"].split(":")[0])]
        assert row["body"] not in (row["positive"], row["negative"]), "never beside itself as a solved example"
        assert row["rule_violation"] == ("1" if row["body"].startswith("bad") else "0") and row["train_only"] == "1"
        column = row["row_id"].split(":")[1]
        assert parent[column] == row["body"] and parent["rule"] == row["rule"]
        if parent["rule_violation"] == row["rule_violation"]:
            assert row[column] == parent["body"], "the row's own text is shown in its place"
    assert len({row["row_id"] for row in rows}) == len(rows)


def test_an_example_is_shown_nowhere_in_its_own_row(tmp_path):
    """Of two equal examples neither stays; the one shown instead is another text of that label."""
    row = {"body": "b", "p1": "x", "p2": " X", "p3": "y", "n1": "z", "label": "0", "probability_0": "0.9"}
    options = argparse.Namespace(column="body", label_column="label", by_column="", id_column="id")
    pairs = [("p1", "1"), ("p2", "1"), ("p3", "1"), ("n1", "0")]
    made = {r["body"]: r for r in example_rows.example_rows([row], pairs, options)}
    assert {k: (r["p1"], r["p2"], r["p3"], r["n1"]) for k, r in made.items()} == {
        "x": ("y", "y", "y", "z"), "y": ("x", " X", "x", "z"), "z": ("x", " X", "y", "b"),
    }  # fmt: skip
    assert all(r["probability_0"] == "" and r["train_only"] == "1" and "id" not in r for r in made.values())


def test_rows_of_examples_never_judge_nor_show_a_validation_text(tmp_path):
    path = with_examples(tmp_path, "--by_column", "rule")
    alone = TrainConfig(train_data=str(tmp_path / "rules.csv"), val_size=0.25, **RULES)
    both = TrainConfig(train_data=str(path), val_size=0.25, **RULES)
    _, judges, _ = load_rows(alone, SILENT)
    known, again, _ = load_rows(both, SILENT)
    assert again.ids == judges.ids and len(again.ids) == 12 and known.train_only.sum() > 40
    assert not {r["body"].strip().lower() for r in known.rows} & {r["body"].lower() for r in again.rows}


def test_rules_train_with_metrics_for_each_rule_and_predict_probabilities(tmp_path, small_base):
    path = with_examples(tmp_path, "--by_column", "rule")
    flags = {**BINARY, **RULES, "test_data": tmp_path / "rules.csv", "val_size": 0.25, "metric": "roc_auc"}
    told = train.main(toy_flags(tmp_path, small_base, **{**flags, "train_data": path}))
    run = Path(told["run"])
    assert told["train_rows"] > 36 and set(told["by_column"]) == {"ads", "law"}
    cfg, labels = trained.run_facts(run)
    ids, targets, logits = report_runs.validation_rows(run, cfg, labels)
    rule = np.array([["ads", "law"][int(i) % 2] for i in ids])
    for name in ("ads", "law"):
        want = metrics.of_task("single_label", logits[rule == name], targets[rule == name])
        assert told["by_column"][name] == pytest.approx(want)
    assert told["mean_by_column"]["roc_auc"] == pytest.approx(
        np.mean([told["by_column"][n]["roc_auc"] for n in ("ads", "law")])
    )
    target = tmp_path / "s.csv"
    flags = [
        "--runs",
        str(run),
        "--submission",
        "row_id,rule_violation",
        "--output",
        str(target),
        "--by_column",
        "rule",
    ]
    found = infer.main([*flags, "--force"])
    rows = files.read_rows(str(target), "x")
    assert list(rows[0]) == ["row_id", "rule_violation"] and all(0 < float(r["rule_violation"]) < 1 for r in rows)
    assert len({r["rule_violation"] for r in rows}) > 24 and set(found["by_column"]) == {"ads", "law"}
    infer.main([*flags, "--force", "--answer", "label", "--overwrite"])
    assert {r["rule_violation"] for r in files.read_rows(str(target), "x")} <= {"0", "1"}


# ---- pseudo-labels --------------------------------------------------------------------------------------------------

PREDICTED = [("p60", "True", 0.03, 0.97), ("p61", "False", 0.95, 0.05), ("p62", "False", 0.6, 0.4)]
PREDICTED += [("p75", "True", 0.09, 0.91), ("p76", "False", 0.05, 0.95), ("p77", "", "", "")]


def unlabelled(folder: Path, predicted=tuple(PREDICTED)) -> list[str]:
    """Paths of 60 training rows, of predictions, and of the 30 rows without labels that they are of."""
    lines = [json.loads(line) for line in write_pairs(folder / "all.jsonl", 90).read_text().splitlines()]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines[:60]))
    rest = [{k: v for k, v in row.items() if k != "is_correct"} | {"more": "m"} for row in lines[60:]]
    (folder / "rest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rest))
    with open(folder / "predicted.csv", "w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["id", "prediction", "probability_False", "probability_True"])
        writer.writerows(predicted)
    return [str(folder / name) for name in ("train.jsonl", "predicted.csv", "rest.jsonl")]


@pytest.mark.parametrize("soft", [False, True])
def test_confident_predictions_become_rows(tmp_path, small_base, soft):
    paths, target = unlabelled(tmp_path), str(tmp_path / "out.csv")
    more = ["--label_column", "is_correct", *(["--soft"] if soft else [])]
    assert pseudo_labels.main([*paths, target, *more])["added"] == 3
    rows = files.read_rows(target, "x")
    added = rows[60:]
    assert [row["id"] for row in added] == ["pseudo:p60", "pseudo:p61", "pseudo:p75"], "p76 answers what is not likely"
    assert [row["is_correct"] for row in added] == ["True", "False", "True"] and "more" not in rows[0]
    assert all(row["train_only"] == "1" for row in added) and not any(row["train_only"] for row in rows[:60])
    cfg = TrainConfig(train_data=target, text=BINARY["text"], label_column="is_correct", val_size=0.2)
    known, judges, labels = load_rows(cfg, SILENT)
    assert known.ids[-3:] == [row["id"] for row in added] and known.labels[-3:].tolist() == [1, 0, 1]
    assert len(judges.ids) == 12 and labels.values == ("False", "True")
    if soft:
        np.testing.assert_allclose(known.soft[-3:], [[0.03, 0.97], [0.95, 0.05], [0.09, 0.91]], atol=1e-6)
        assert np.isnan(known.soft[:-3]).all()
    else:
        assert known.soft is None
    flags = toy_flags(tmp_path, small_base, **{**BINARY, "train_data": target, "val_size": 0.2})
    assert train.main(flags)["train_rows"] == 48 + 3


def test_texts_of_validation_rows_are_not_learned_from_predictions(tmp_path):
    train_data, _, _ = unlabelled(tmp_path)
    same = [{**row, "id": f"x{i}"} for i, row in enumerate(files.read_rows(train_data, "x"))]
    (tmp_path / "rest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    told = "id,prediction,probability_False,probability_True\n" + "".join(f"x{i},True,0,1\n" for i in range(60))
    (tmp_path / "told.csv").write_text(told)
    target = tmp_path / "out.jsonl"
    pseudo_labels.main(
        [
            train_data,
            str(tmp_path / "told.csv"),
            str(tmp_path / "rest.jsonl"),
            str(target),
            "--label_column",
            "is_correct",
        ]
    )
    cfg = TrainConfig(train_data=str(target), text=BINARY["text"], label_column="is_correct", val_size=0.2)
    known, judges, _ = load_rows(cfg, SILENT)
    added = {id.removeprefix("pseudo:") for id in known.ids if id.startswith("pseudo:")}
    assert added == {f"x{i}" for i in range(60)} - {f"x{id[1:]}" for id in judges.ids}


@pytest.mark.parametrize("columns", [(), ("a", "b")])
def test_several_labels_and_numbers_have_their_own_confidence(tmp_path, columns):
    """Of several labels the least sure one decides; of a regression the nearer of 0 and 1 is the label."""
    (tmp_path / "rest.csv").write_text("id,text\n" + "".join(f"u{i},t{i}\n" for i in range(4)))
    train_rows = {"id": 1, "text": "t", "label": "a"} | dict.fromkeys(columns, 1)
    (tmp_path / "t.jsonl").write_text(json.dumps(train_rows) + "\n")
    (tmp_path / "p.csv").write_text(
        "id,prediction,probability_a,probability_b\nu0,a|b,0.9,0.95\nu1,a,0.9,0.3\nu2,,0.05,0.05\nu3,b,0.04,0.97\n"
    )
    paths = [str(tmp_path / name) for name in ("t.jsonl", "p.csv", "rest.csv", "out.jsonl")]
    more = ["--label_columns", *columns] if columns else []
    pseudo_labels.main([*paths, "--task", "multi_label", *more])
    added = files.read_rows(paths[3], "x")[1:]
    assert [row["id"] for row in added] == ["pseudo:u0", "pseudo:u2", "pseudo:u3"]
    if columns:
        assert [(row["a"], row["b"]) for row in added] == [("1", "1"), ("0", "0"), ("0", "1")]
    else:
        assert [row["label"] for row in added] == ["a|b", "", "b"]
    (tmp_path / "p.csv").write_text("id,prediction\nu0,0.96\nu1,0.5\nu2,0.02\n")
    for soft, labels in (([], ["1", "0"]), (["--soft"], ["0.96", "0.02"])):
        pseudo_labels.main([*paths, "--task", "regression", "--overwrite", *soft])
        assert [row["label"] for row in files.read_rows(paths[3], "x")[1:]] == labels


@pytest.mark.parametrize(
    "predicted, flags, words",
    [
        ([("p60", "True", 0.1, 0.9)] * 2, (), r"ids are duplicated, in it or in .*rest.jsonl \(p60\)"),
        ([("nobody", "True", 0.1, 0.9)], (), r"1 of its ids are not in .*rest.jsonl \(nobody\)"),
        ([("p60", "True", 0.1, 1.9)], (), "row 1 has no prediction with probabilities from 0 to 1"),
        ([("p60", "maybe", 0.1, 0.9)], (), "row 1 has no prediction with probabilities"),
        ([("p60", "True", "much", 0.9)], (), "row 1 has no prediction with probabilities"),
        (PREDICTED, ("--min_confidence", "0.2"), "--min_confidence 0.2: expected a probability from 0.5 to 1"),
        (PREDICTED, ("--id_column", "row"), "no column row"),
    ],
)
def test_predictions_that_cannot_be_learned_are_one_line(tmp_path, predicted, flags, words):
    with pytest.raises(UserError, match=words) as e:
        pseudo_labels.main([*unlabelled(tmp_path, predicted), str(tmp_path / "out.csv"), *flags])
    assert "\n" not in str(e.value) and not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("script", ["example_rows.py", "pseudo_labels.py", "pseudo_rounds.py"])
def test_the_scripts_answer_mistakes_in_a_line(script, tmp_path):
    flags = {
        "example_rows.py": ["no.csv", "out.csv", "--examples", "a=1"],
        "pseudo_labels.py": ["no.csv", "p.csv", "t.csv", "out.csv"],
        "pseudo_rounds.py": ["--clean", "no.csv", "--test", "no.csv"],
    }[script]
    done = subprocess.run(
        [sys.executable, ROOT / "runs" / script, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no.csv: no such file" in done.stderr


# ---- rounds of pseudo-labels ----------------------------------------------------------------------------------------


def test_rounds_are_judged_by_clean_rows_and_stopped_by_drift_and_collapse():
    options = argparse.Namespace(fall=0.01, drift=0.2, confidence=0.8)
    rows = [{"probability_a": str(p), "probability_b": str(1 - p)} for p in (0.9, 0.85, 0.6, 0.3)]
    found = pseudo_rounds.judge(rows, ["a", "b"], [0.5, 0.5], 0.8)
    assert found == {"confident": 2, "drift": 0.25, "largest": 1.0}
    good = {"accuracy": 0.8, "confident": 9, "drift": 0.1, "largest": 0.6}
    assert pseudo_rounds.why_stop([good], "accuracy", options) == ""
    for change, words in (
        ({"accuracy": 0.78}, "accuracy on the clean rows worsened from 0.8000 to 0.7800"),
        ({"drift": 0.3}, "drifted by 0.300"),
        ({"confident": 0}, "no row reaches the confidence 0.8"),
        ({"largest": 1.0}, "one class takes every confident row"),
    ):
        assert words in pseudo_rounds.why_stop([good, {**good, **change}], "accuracy", options)
    losses = [{**good, "log_loss": loss} for loss in (0.5, 0.4)]
    assert pseudo_rounds.why_stop(losses, "log_loss", options) == ""
    assert "from 0.4000 to 0.5000" in pseudo_rounds.why_stop(losses[::-1], "log_loss", options)
    assert pseudo_rounds.best_round(losses, "log_loss")["log_loss"] == 0.4
    same = [{"round": i, "accuracy": 0.5} for i in range(3)]
    assert pseudo_rounds.best_round(same, "accuracy")["round"] == 0


@pytest.mark.slow
def test_two_rounds_as_a_user_runs_them(small_base, tmp_path):
    path, clean, test = (tmp_path / f"{n}.jsonl" for n in ("train", "clean", "test"))
    lines = [json.loads(line) for line in write_pairs(tmp_path / "all.jsonl", 90).read_text().splitlines()]
    for target, some in ((path, lines[:50]), (clean, lines[50:70])):
        target.write_text("".join(json.dumps(r) + "\n" for r in some))
    test.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "is_correct"}) + "\n" for r in lines[70:]))
    flags = toy_flags(tmp_path, small_base, **{**BINARY, "train_data": path, "val_size": 0.2})
    script, out = str(ROOT / "runs/pseudo_rounds.py"), tmp_path / "rounds"
    start = [sys.executable, script, "--rounds", "1", "--confidence", "0.5", "--drift", "1", "--fall", "1", "--soft"]
    start += ["--out", str(out), "--test", str(test)]
    done = subprocess.run([*start, "--clean", str(clean), "--", *flags], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert [r["round"] for r in told["rounds"]] in ([0], [0, 1]) and len(files.read_rows(told["output"], "x")) == 20
    if len(told["rounds"]) == 2:
        first, second = (Path(r["run"]) for r in told["rounds"])
        assert len(files.read_rows(str(out / "train_1.jsonl"), "x")) == 50 + told["rounds"][0]["confident"]
        judged = [[r["id"] for r in files.read_rows(str(run / "val_predictions.csv"), "x")] for run in (first, second)]
        assert judged[0] == judged[1] and first.parent == second.parent
    for wrong, words in ((test, "no column is_correct"), (path, "some of its rows are in")):
        done = subprocess.run([*start, "--clean", str(wrong), "--", *flags], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


def test_flags_of_later_rounds_keep_the_validation_rows_and_the_folder(tmp_path):
    paths = unlabelled(tmp_path)
    options = argparse.Namespace(out=str(tmp_path), confidence=0.9, soft=False, test=paths[2])
    cfg = TrainConfig(train_data=paths[0], label_column="is_correct", val_data="v.csv")
    flags = ["--lr", "1", f"--train_data={paths[0]}", "--val-data", "v.csv", "--dry_run", "--targets", "a", "b"]
    found = pseudo_rounds.next_flags(options, flags, cfg, paths[1], 1)
    assert found[:6] == ["--lr", "1", "--dry_run", "--targets", "a", "b"]
    assert found[6] == f"--train_data={tmp_path / 'train_1.jsonl'}" and found[8] == "--val_data=v.csv"
    assert found[7] == f"--dataset={tmp_path.name}" and len(files.read_rows(str(tmp_path / "train_1.jsonl"), "x")) == 63
