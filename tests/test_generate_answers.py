"""Written answers: they are transformers' own, read as scores, and those that cannot be read are counted."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_ddp import forked, forks, toy_flags
from test_scoring import WORDS, rendered
from test_verify import write_pairs

import answer_parser
import cpt
import files
import generate
import train
from errors import Degenerate, UserError

pytestmark = forks


@pytest.fixture(scope="module")
def writer(small_base, tmp_path_factory) -> tuple[str, Path]:
    """A base that has learned to answer two questions right, one with a word that cannot be read."""
    folder = tmp_path_factory.mktemp("writer")
    path = write_pairs(folder / "p.jsonl", 24)
    rows = files.read_rows(str(path), "x")
    texts, _ = rendered(small_base, "verify_plain", rows)
    answers = [
        " perhaps" if i % 8 == 7 else " True" if r["is_correct"] == "True" else " False" for i, r in enumerate(rows)
    ]
    pairs = folder / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": t, "response": a}) + "\n" for t, a in zip(texts, answers, strict=True))
    )
    cpt.main(
        ["--base", small_base, "--train_data", str(pairs), "--text", "{prompt}", "--chat", "no", "--val_size", "2",
         "--epochs", "60", "--batch_size", "11", "--lr", "1e-2", "--max_length", "400", "--samples", "0",
         "--outputs", str(folder / "outputs"), "--export", str(folder / "base"), "--export_dtype", "fp32"]
    )  # fmt: skip
    return str(folder / "base"), path


def answer_flags(base: str, path: Path, target: Path) -> list[str]:
    flags = ["--score", "--base", base, "--prompt", "verify_plain", "--label_names", "False,True"]
    flags += ["--label_column", "is_correct", "--max_new_tokens", "4", "--max_length", "400"]
    return [*flags, "--input", str(path), "--output", str(target)]


def test_answers_are_read_and_those_that_cannot_be_are_counted_and_left_empty(writer, tmp_path):
    base, path = writer
    result = generate.main([*answer_flags(base, path, tmp_path / "o.csv"), "--submission", ""])
    rows, out = files.read_rows(str(path), "x"), files.read_rows(str(tmp_path / "o.csv"), "x")
    bad = files.read_rows(str(tmp_path / "o.csv.malformed.csv"), "x")
    assert [r["id"] for r in out] == [r["id"] for r in rows] and 0 < result["malformed"] == len(bad) < 12
    empty = {r["id"] for r in out if r["prediction"] == "" and r["probability_True"] == ""}
    assert empty == {r["id"] for r in bad} and all(r["why"] and "answer" in r for r in bad)
    known = {r["id"]: r["is_correct"] for r in rows}
    right = [known[r["id"]] == r["prediction"] for r in out if r["id"] not in empty]
    assert result["metrics"]["accuracy"] == pytest.approx(np.mean(right), abs=1e-6) and np.mean(right) > 0.8
    assert result["metrics"]["accuracy_all"] == pytest.approx(sum(right) / 24, abs=1e-6)


def test_the_answers_are_those_of_transformers_generate(writer, tmp_path):
    from transformers import AutoModelForCausalLM

    base, path = writer
    generate.main([*answer_flags(base, path, tmp_path / "o.csv"), "--submission", "", "--batch_size", "5"])
    texts, tokenizer = rendered(base, "verify_plain", files.read_rows(str(path), "x"))
    lm = AutoModelForCausalLM.from_pretrained(base).eval()
    for text, row in zip(texts, files.read_rows(str(tmp_path / "o.csv"), "x"), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
        score, _ = answer_parser.parse_answer(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), WORDS)
        assert row["probability_True"] == ("" if score is None else str(score))


def test_a_model_that_answers_nothing_readable_is_stopped_at_the_first_batch(small_base, tmp_path):
    path = write_pairs(tmp_path / "p.jsonl", 20)
    flags = answer_flags(small_base, path, tmp_path / "o.csv")
    with pytest.raises(Degenerate, match="none of the first 8 answers can be read"):
        generate.main(flags)
    assert not (tmp_path / "o.csv").exists()
    result = generate.main([*flags, "--force"])
    assert result["malformed"] == 20 and len(files.read_rows(str(tmp_path / "o.csv"), "x")) == 20


@pytest.mark.parametrize(
    "change, words",
    [
        (["--label_names", "a,b,c"], "--score expects the names of two classes"),
        (["--label_words", "a,b,c"], "--label_words a,b,c: expected those of two classes"),
        (["--prompt", "verify_plan"], "did you mean verify_plain"),
        (["--input", ""], "names no test_data: give the rows to score with --input"),
        (["--examples", "x.csv"], "--examples has no effect: it is used without --score"),
    ],
)
def test_what_cannot_be_scored_is_refused(small_base, tmp_path, change, words):
    path = write_pairs(tmp_path / "p.jsonl", 20)
    flags = answer_flags(small_base, path, tmp_path / "o.csv")
    if change[0] in flags:
        i = flags.index(change[0])
        flags = flags[:i] + flags[i + 2 :]
    with pytest.raises(UserError, match=words):
        generate.main([*flags, *change])
    assert not (tmp_path / "o.csv").exists()


def test_a_prompt_of_the_users_own_file_is_asked(writer, tmp_path, capsys):
    """The named prompt's own text in another folder gives the same answers; a longer text asks more tokens."""
    base, path = writer
    generate.main(answer_flags(base, path, tmp_path / "named.csv"))
    own = tmp_path / "own.txt"
    own.write_text((ROOT / "prompts/verify_plain.txt").read_text())
    flags = answer_flags(base, path, tmp_path / "own.csv")
    flags[flags.index("--prompt") + 1] = str(own)
    generate.main(flags)
    assert (tmp_path / "own.csv").read_bytes() == (tmp_path / "named.csv").read_bytes()
    short = re.findall(r"24 rows, \S+ tokens", capsys.readouterr().out)
    own.write_text(own.read_text().replace("Reply with", "Do not reply with"))
    generate.main([*flags, "--force", "--overwrite"])  # the answers may stay the same, the question does not
    long = re.findall(r"24 rows, \S+ tokens", capsys.readouterr().out)
    assert len(short) == 2 and short[0] == short[1] < long[0]


def test_two_ranks_write_the_same_scores(writer, tmp_path):
    base, path = writer
    for ranks in (1, 2):
        flags = answer_flags(base, path, tmp_path / f"{ranks}.csv")
        flags += ["--batch_size", "3", "--temperature", "0.7", "--seed", "5", "--submission", ""]
        status, _, err = forked(generate.main, flags, tmp_path, ranks)
        assert status == 0, err
    for end in ("csv", "csv.malformed.csv"):
        assert (tmp_path / f"1.{end}").read_bytes() == (tmp_path / f"2.{end}").read_bytes()


def test_a_run_with_label_words_answers_as_it_was_trained(writer, tmp_path):
    """Its adapter, its prompt, words, columns and test rows, without a flag; the prompt's file is not needed again."""
    base, path = writer
    own = tmp_path / "own.txt"
    own.write_text((ROOT / "prompts/verify_plain.txt").read_text())
    flags = toy_flags(
        tmp_path, base, train_data=path, val_data=None, val_size=0.3, prompt=own, head="label_words",
        label_column="is_correct", metric="roc_auc", max_length=400, max_tokens=2048, batch_size=8, head_dropout=None,
        epochs=1, lr=1e-6, test_data=path,
    )  # fmt: skip
    run = train.main(flags)["run"]
    stored = json.loads((Path(run) / "config.json").read_text())
    assert stored["prompt"] == str(own) and stored["text"].endswith("True or False.\n\nAnswer:")
    own.unlink()
    result = generate.main(
        [
            "--score",
            "--outputs",
            str(tmp_path / "outputs"),
            "--output",
            str(tmp_path / "o.csv"),
            "--max_new_tokens",
            "4",
        ]
    )
    assert result["run"] == run and result["rows"] == 24 and result["metrics"]["accuracy"] > 0.7
    values = {row["label"] for row in files.read_rows(str(tmp_path / "o.csv"), "x")}
    assert {"0.0", "1.0"} <= values <= {"0.0", "1.0", ""}, "roc_auc is judged by probabilities"
    with pytest.raises(UserError, match="--prompt: no effect without --base or --adapter, as a run has its own"):
        generate.main(["--score", "--runs", run, "--prompt", "verify_plain"])
    shutil.rmtree(Path(run) / "best")
    with pytest.raises(UserError, match="holds no best/ save"):
        generate.main(["--score", "--runs", run, "--input", str(path)])
