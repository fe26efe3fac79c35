"""The user's mistakes: one line that says what and where, before any weight is loaded, and no run left behind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import cli
import infer
import model as models
import presets
import train
from errors import UserError

QUESTIONS = [
    ("How many apples are left?", "a"),
    ("Solve for x.", "b"),
    ("What is 2 + 2?", "a"),
    ("Find the area.", "b"),
]


def write_csv(path: Path, rows, header="Question,label") -> str:
    path.write_text("\n".join([header, *(",".join(f'"{v}"' for v in row) for row in rows)]) + "\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def good(tmp_path) -> str:
    """A training file without fault."""
    return write_csv(tmp_path / "good.csv", QUESTIONS * 5)


@pytest.fixture
def unloadable(small_base, tmp_path, monkeypatch) -> str:
    """A base, in a process that fails the test when anything tries to load its weights."""
    folder = tmp_path / "unloadable"
    shutil.copytree(small_base, folder)

    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded before the mistake was found")

    monkeypatch.setattr(models, "from_weights", loaded)
    return str(folder)


def refused(main, outputs: Path, *flags) -> str:
    """The one line of a UserError; nothing may be left under outputs."""
    with pytest.raises(UserError) as e:
        main([*map(str, flags), "--outputs", str(outputs)])
    assert e.value.exit_status == 2
    assert not outputs.exists(), "a mistake leaves no run folder"
    assert "\n" not in str(e.value), str(e.value)
    return str(e.value)


# ---- train.py: settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--learning_rate_", "1"], ["unknown flag --learning_rate_"]),
        (["--epoch", "1"], ["unknown flag --epoch (did you mean --epochs?)"]),
        (["--cfg", "qwen3"], ["unknown preset qwen3 (did you mean qwen3b?)"]),
        (["--lr", "fast"], ["--lr fast: expected a number"]),
        (["--text", "{Question"], ["--text {Question: expected a template"]),
        (["--text", "{Question} {b"], ["--text: template", "expected '}'"]),
        (["--text", "{0}"], ["expected named columns"]),
        (["--text", "{Question} {}"], ["expected named columns"]),
        (["--text", "{Question!r}"], ["without a format (:) or conversion (!)"]),
        (["--text", "{Question:>10}"], ["without a format (:) or conversion (!)"]),
        (
            ["--rank", "0", "--bias", "all", "--warmup_steps", "5", "--warmup_ratio", "0.1", "--lr", "-1"],
            ["3 problems in the settings: ", "--lr -1.0", "--bias all with --rank 0", "--warmup_steps 5 and"],
        ),
        (["--max_tokens", "64"], ["--max_tokens 64 is below --max_length 512"]),
    ],
)
def test_wrong_settings(tmp_path, unloadable, good, flags, words):
    message = refused(train.main, tmp_path / "outputs", "--train_data", good, "--base", unloadable, *flags)
    assert all(word in message for word in words), message


# ---- train.py: data -------------------------------------------------------------------------------------------------


def data_refused(tmp_path, base, rows=None, header="Question,label", **flags) -> str:
    path = write_csv(tmp_path / "train.csv", QUESTIONS * 5 if rows is None else rows, header)
    given = [f"--{k}={v}" for k, v in flags.items()]
    return refused(train.main, tmp_path / "outputs", "--train_data", path, "--base", base, *given)


def test_a_missing_train_file_names_path_and_flag(tmp_path, unloadable):
    path = tmp_path / "none.csv"
    message = refused(train.main, tmp_path / "outputs", "--train_data", path, "--base", unloadable)
    assert f"--train_data {path}: no such file" in message


def test_a_missing_validation_file_names_path_and_flag(tmp_path, unloadable):
    assert f"--val_data {tmp_path}/v.csv: no such file" in data_refused(
        tmp_path, unloadable, val_data=tmp_path / "v.csv"
    )


def test_a_missing_column_lists_those_that_exist(tmp_path, unloadable):
    message = data_refused(tmp_path, unloadable, header="question,label")
    assert f"--train_data {tmp_path}/train.csv: no column Question (there is: question, label)" in message
    message = data_refused(tmp_path, unloadable, label_column="target", text="{Question} {more}")
    assert "no column more, target (there is: Question, label)" in message


def test_unknown_labels_of_the_validation_file_are_named_with_rows(tmp_path, unloadable):
    val = write_csv(tmp_path / "val.csv", [*QUESTIONS, ("Really?", "c"), ("Truly?", "c")])
    message = data_refused(tmp_path, unloadable, val_data=val)
    assert f"--val_data {val}: 2 rows have unknown labels ('c' in row 5, 6): expected one of 'a', 'b'" in message


def test_empty_texts_are_named_by_row(tmp_path, unloadable):
    message = data_refused(tmp_path, unloadable, rows=[*QUESTIONS, ("", "a"), ("  ", "b"), ("b''", "b")])
    assert f"--train_data {tmp_path}/train.csv: 3 rows have an empty text (rows 5, 6, 7)" in message


def test_an_empty_label_is_named_by_row(tmp_path, unloadable):
    assert "1 rows have an empty label (rows 5)" in data_refused(tmp_path, unloadable, rows=[*QUESTIONS, ("Q", " ")])


def test_a_class_with_one_row_cannot_be_split(tmp_path, unloadable):
    message = data_refused(tmp_path, unloadable, rows=[*QUESTIONS * 3, ("Once?", "c")])
    assert "needs 2 rows of every class" in message and "(row 13)" in message and "--val_data" in message


@pytest.mark.parametrize("size", [19, 20, 500, 0.99, 0.01, 1])
def test_a_split_that_cannot_be_met(tmp_path, unloadable, size):
    assert f"--val_size {size}" in data_refused(tmp_path, unloadable, val_size=size)


def test_one_class_alone(tmp_path, unloadable):
    assert "expected at least 2 classes" in data_refused(tmp_path, unloadable, rows=[("Q", "a"), ("R", "a")])


def test_label_names_that_do_not_fit(tmp_path, unloadable):
    message = data_refused(tmp_path, unloadable, label_names="a,c")
    assert "unknown labels ('b' in row 2, 4, 6 and 7 more): expected one of 'a', 'c'" in message


def test_class_weights_of_another_number(tmp_path, unloadable):
    assert "3 numbers, expected one for each of 2 classes" in data_refused(tmp_path, unloadable, class_weights="1,2,3")


def test_a_metric_that_the_validation_rows_do_not_allow(tmp_path, unloadable):
    val = write_csv(tmp_path / "val.csv", QUESTIONS[:1])
    assert "--metric roc_auc" in data_refused(tmp_path, unloadable, val_data=val, metric="roc_auc")


def test_a_template_that_fills_max_length(tmp_path, unloadable):
    message = data_refused(tmp_path, unloadable, max_length=8, text="Read the problem and say its class: {Question}.")
    assert "the template alone has" in message and "--max_length 8" in message


def test_a_hostile_file_is_refused_under_its_flag(tmp_path, unloadable):
    path = tmp_path / "bad.csv"
    path.write_bytes(b"Question,label\nfine,a\ncaf\xe9,b\n")
    message = refused(train.main, tmp_path / "outputs", "--train_data", path, "--base", unloadable)
    assert message.startswith(f"--train_data {path}: not UTF-8 (byte 0xe9 in line 3)")


# ---- train.py: base -------------------------------------------------------------------------------------------------


def test_a_missing_base_folder(tmp_path, good):
    message = refused(train.main, tmp_path / "outputs", "--train_data", good, "--base", tmp_path / "nowhere")
    assert f"--base {tmp_path / 'nowhere'}: no such folder" in message


def test_a_base_folder_without_weights(tmp_path, good, unloadable):
    (Path(unloadable) / "model.safetensors").unlink()
    message = refused(train.main, tmp_path / "outputs", "--train_data", good, "--base", unloadable)
    assert f"--base {unloadable}: no weights in this folder" in message


def test_a_base_folder_without_config(tmp_path, good, unloadable):
    (Path(unloadable) / "config.json").unlink()
    message = refused(train.main, tmp_path / "outputs", "--train_data", good, "--base", unloadable)
    assert "no config.json in this folder" in message


def test_a_base_folder_without_tokenizer(tmp_path, good, unloadable):
    for path in Path(unloadable).glob("tokenizer*"):
        path.unlink()
    message = refused(train.main, tmp_path / "outputs", "--train_data", good, "--base", unloadable)
    assert f"--base {unloadable}: no tokenizer" in message


def test_a_tokenizer_with_more_tokens_than_embeddings(tmp_path, good, unloadable):
    path = Path(unloadable) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    message = refused(train.main, tmp_path / "outputs", "--train_data", good, "--base", unloadable)
    assert "tokens for 100 embeddings" in message


def test_an_unmatched_target_lists_those_that_exist(tmp_path, small_base, good):
    flags = ["--train_data", good, "--base", small_base, "--targets", "q_proj,c_attn", "--val_size", "4"]
    message = refused(train.main, tmp_path / "outputs", *flags)
    assert "c_attn" in message and "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in message


# ---- infer.py -------------------------------------------------------------------------------------------------------


def unfinished_run(folder: Path, **changes) -> Path:
    """A run folder as it is before the first save."""
    folder.mkdir()
    cfg = replace(presets.tiny(), **changes)
    (folder / "config.json").write_text(cli.to_json(cfg))
    (folder / "labels.json").write_text('{"values": ["a", "b"], "names": ["a", "b"]}')
    return folder


def infer_refused(tmp_path, *flags) -> str:
    out = tmp_path / "submission.csv"
    message = refused(infer.main, tmp_path / "outputs", "--output", out, *flags)
    assert not out.exists()
    return message


def test_infer_without_a_finished_run(tmp_path):
    message = infer_refused(tmp_path)
    assert f"no finished run under {tmp_path / 'outputs'}/" in message and "--runs" in message


def test_infer_with_a_run_that_is_not_there(tmp_path):
    assert str(tmp_path / "run_9") in infer_refused(tmp_path, "--runs", tmp_path / "run_9")


def test_infer_input_without_the_column_lists_those_that_exist(tmp_path, unloadable):
    run = unfinished_run(tmp_path / "run_0", base=unloadable)
    path = write_csv(tmp_path / "new.csv", [("1", "What?")], "id,question")
    message = infer_refused(tmp_path, "--runs", run, "--input", path)
    assert f"--input {path}: no column Question (there is: id, question)" in message


def test_infer_without_any_input(tmp_path, unloadable):
    run = unfinished_run(tmp_path / "run_0", base=unloadable, test_data="")
    assert "--input FILE" in infer_refused(tmp_path, "--runs", run)


def test_infer_with_an_input_that_is_missing(tmp_path, unloadable):
    run = unfinished_run(tmp_path / "run_0", base=unloadable)
    assert "--input none.csv: no such file" in infer_refused(tmp_path, "--runs", run, "--input", "none.csv")


def test_infer_with_a_run_that_has_saved_nothing_yet(tmp_path, unloadable, good):
    run = unfinished_run(tmp_path / "run_0", base=unloadable)
    assert "no best/ save: finish it" in infer_refused(tmp_path, "--runs", run, "--input", good)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--submission", "id,label,more"], "--submission id,label,more: expected two column names"),
        (["--sumbission", "id,label"], "unknown flag --sumbission (did you mean --submission?)"),
        (["--cfg", "qwen3b"], "unknown preset qwen3b"),
        (["--limit", "-3"], "--limit -3: expected 0 or more"),
    ],
)
def test_infer_settings(tmp_path, flags, words):
    assert words in infer_refused(tmp_path, *flags)


# ---- as the user sees it --------------------------------------------------------------------------------------------


def one_line(status: int, err: str) -> str:
    """The error line of a command that was refused."""
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in err, (status, err)
    return lines[0]


def nothing_saved(tmp_path) -> bool:
    return not [p for p in tmp_path.rglob("*") if p.name in ("best", "last")]


def test_command_missing_file(command, tmp_path, small_base):
    status, _, err = command("train.py", "--train_data", tmp_path / "none.csv", "--base", small_base)
    assert f"--train_data {tmp_path / 'none.csv'}: no such file" in one_line(status, err)
    assert nothing_saved(tmp_path)


def test_command_unmatched_target(command, tmp_path, small_base, good):
    flags = ["--train_data", good, "--base", small_base, "--targets", "wte,q_proj", "--val_size", "4"]
    status, _, err = command("train.py", *flags)
    assert "wte" in one_line(status, err) and nothing_saved(tmp_path)


def test_command_infer_without_a_run(command, tmp_path):
    status, _, err = command("infer.py", "--output", tmp_path / "submission.csv")
    assert "no finished run under" in one_line(status, err) and not (tmp_path / "submission.csv").exists()


def test_command_torchrun_without_data_is_one_line(command, tmp_path):
    """`torchrun --nproc_per_node=2 train.py --cfg qwen3b` in a fresh clone; torchrun itself answers 1."""
    (tmp_path / "clone").mkdir()
    status, _, err = command("train.py", "--cfg", "qwen3b", ranks=2, cwd=tmp_path / "clone")
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 1 and len(lines) == 1, err
    assert "dataset/train.csv" in lines[0] and "--train_data" in lines[0] and nothing_saved(tmp_path)
