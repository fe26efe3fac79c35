"""Large files: rows lie on the disk, tokens in mapped files, and every result is that of rows in memory."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from test_ddp import finish, forked, forks, shas, start, toy_flags, write_rows
from test_parts import Killed, stop_at

import audit
import bases
import data
import ddp
import files
import infer
import slices
import splits
import spool
import token_store
import train
import trained
from configs import TrainConfig
from errors import UserError

WINDOW = 13


@pytest.fixture
def large(monkeypatch):
    """Every file is a large one."""
    monkeypatch.setattr(spool, "MEMORY", 50)
    monkeypatch.setattr(token_store, "WINDOW", WINDOW)
    monkeypatch.setattr(trained, "WINDOW", WINDOW)


def pair_of(read, monkeypatch) -> tuple:
    """What a function returns with rows in memory, and with rows on the disk."""
    whole = read()
    monkeypatch.setattr(spool, "MEMORY", 50)
    return whole, read()


# ---- rows -----------------------------------------------------------------------------------------------------------

TABLE = "id,text,label,\n" + "".join(f'{i},"line {i}\nand ""more"" é, 字",{i % 2},\n' for i in range(40))
QUOTED = "q,label\n" + "".join(f"t{i},{'yes' if i % 3 else 'no'}\n" for i in range(40))
QUOTED += '"cc,yes\ndd,no\nee,yes\nff",no\n'
OBJECTS = [{"text": f"a {i}", "tags": [i, "x"], "none": None, **({} if i % 7 else {"odd": 1.10})} for i in range(40)]


def test_rows_on_the_disk_are_those_in_memory(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text(TABLE, encoding="utf-8")
    (tmp_path / "filled.csv").write_text(TABLE + "40,t,1,cell\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OBJECTS))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    for name in ("a.csv", "filled.csv", "a.jsonl", "a.csv.gz"):
        path = str(tmp_path / name)
        with monkeypatch.context() as m:
            whole, rows = pair_of(lambda path=path: files.stream_rows(path, "x"), m)
        assert isinstance(whole, list) and isinstance(rows, spool.View)
        assert list(rows) == whole == files.read_rows(path, "x") and len(rows) == len(whole)
        assert [list(map(type, row.values())) for row in rows] == [list(map(type, row.values())) for row in whole]
        assert list(rows[3:9]) == whole[3:9] and rows[-1] == whole[-1]
        assert list(spool.take(rows, [5, 2, 5])) == spool.take(whole, [5, 2, 5])
        assert list(spool.joined([rows[:2], rows[3:5]])) == spool.joined([whole[:2], whole[3:5]])
        rows[2] = whole[2] = {"text": "another"}
        assert list(rows) == whole and splits.digest_of(rows) == splits.digest_of(whole)
        assert splits.digest_of([whole, rows[:0]]) == splits.digest_of([whole, []])


def test_a_digest_is_the_one_that_runs_have_recorded():
    rows, labels = [{"b": "é", "a": "1"}, {}], [("x", "y"), []]
    for value in (rows, labels, []):
        assert splits.digest_of(value) == hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    "text, words",
    [
        (TABLE + "1,2\n", "1 rows do not have the header's 4 columns"),
        ("a,,b,\n" + "1,2,3,4\n" * 40, "columns 2, 4 have no name"),
        (QUOTED, "hold whole rows of the file"),
    ],
)
def test_the_checks_of_a_whole_file_stay(tmp_path, monkeypatch, text, words):
    def read():
        with pytest.raises(UserError, match=words) as e:
            files.stream_rows(str(tmp_path / "a.csv"), "x")
        return str(e.value)

    (tmp_path / "a.csv").write_text(text)
    told, again = pair_of(read, monkeypatch)
    assert told == again


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.csv.gz"])
def test_a_limit_does_not_read_the_rest(tmp_path, name):
    """What cannot be read stands far behind the rows that are asked for."""
    head = "text\n" if "csv" in name else ""
    line = "some words\n" if "csv" in name else '{"text": "some words"}\n'
    content = (head + line * 100_000).encode() + b"\xff\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert files.stream_rows(str(tmp_path / name), "input", 7) == [{"text": "some words"}] * 7
    with pytest.raises(UserError, match="not UTF-8"):
        files.stream_rows(str(tmp_path / name), "input")


def test_the_audit_of_texts_on_the_disk_is_that_of_texts_in_memory(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), 60)) for _ in range(150)]
    texts += [text[:57] + "xyz" for text in texts[:40]] + texts[20:60]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = TrainConfig(text="{text}")
    read = lambda: splits.texts(cfg, files.stream_rows(str(tmp_path / "a.jsonl"), "x"))  # noqa: E731
    whole, rows = pair_of(read, monkeypatch)
    labels, parts = [i % 3 for i in range(len(texts))], ["train", "validation"] * (len(texts) // 2)
    findings = audit.audit(whole, labels, parts)
    assert audit.audit(rows, labels, parts) == findings and len(findings.near) > 20 and len(findings.duplicates) > 20


# ---- whole commands -------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_run(tmp_path, small_base) -> Path:
    """A run whose rows are in memory."""
    (tmp_path / "plain").mkdir()
    return Path(train.main(toy_flags(tmp_path / "plain", small_base, val_data=None, val_size=0.3))["run"])


@pytest.mark.parametrize("ranks", [1, 2])
@forks
def test_a_run_on_a_large_file_is_the_same_run(plain_run, large, tmp_path, small_base, monkeypatch, ranks):
    """Also on two ranks, of which the first alone encodes; a second run finds the tokens in their place."""

    def on_rank0(*given):
        assert os.environ.get("RANK", "0") == "0"
        return encode(*given)

    encode = token_store.encode
    flags = toy_flags(tmp_path, small_base, val_data=None, val_size=0.3)
    monkeypatch.setattr(token_store, "encode", on_rank0)
    status, out, err = forked(train.main, flags, tmp_path, ranks)
    assert status == 0, err
    run = Path(json.loads(out.strip().splitlines()[-1])["run"])
    assert shas(run) == shas(plain_run)
    for name in ("val_predictions.csv", "split.csv", "audit.json", "rows.json", "labels.json"):
        assert (run / name).read_bytes() == (plain_run / name).read_bytes(), name
    (cache,) = (tmp_path / "outputs/token_cache").iterdir()
    assert (cache / "ids").stat().st_size > 4 * 58 and "100%" in err

    monkeypatch.setattr(token_store, "encode", None)
    assert train.main(flags)["metrics"] == json.loads((plain_run / "result.json").read_text())["metrics"]


def tokens_of(cfg, rows):
    return token_store.tokenize(cfg, bases.load_tokenizer(cfg.base), rows, ddp.World(0, 1, None))


def test_tokens_in_files_are_those_in_memory(tmp_path, small_base, monkeypatch):
    path = write_rows(tmp_path / "rows.csv", 58)
    cfg = TrainConfig(base=small_base, text="{Question}", max_length=20, outputs=str(tmp_path / "outputs"))
    monkeypatch.setattr(token_store, "WINDOW", WINDOW)
    whole, rows = pair_of(lambda: files.stream_rows(str(path), "x"), monkeypatch)
    (tokens, report), (mapped, again) = tokens_of(cfg, whole), tokens_of(cfg, rows)
    assert mapped.digest() == tokens.digest() and isinstance(mapped.ids, np.memmap)
    assert str(again) == str(report) and again.lengths.tolist() == report.lengths and report.cut_rows
    for change in ({"max_length": 21}, {"text": "{Question} {label}"}):
        tokens_of(TrainConfig(**{**vars(cfg), **change}), rows)
    rows[3] = {**rows[3], "Question": "another"}
    assert tokens_of(cfg, rows)[0].digest() != tokens.digest()
    assert len(list((tmp_path / "outputs/token_cache").iterdir())) == 4


@forks
def test_killed_while_encoding_nothing_is_half_written(large, tmp_path, small_base, monkeypatch):
    """Stopped at every change to the disk, and by SIGKILL: the next process makes the same tokens, and tidies up."""
    path = write_rows(tmp_path / "rows.csv", 58)

    def tokens(folder):
        cfg = TrainConfig(base=small_base, text="{Question}", max_length=20, outputs=str(tmp_path / folder))
        return tokens_of(cfg, files.stream_rows(str(path), "x"))[0].digest()

    with monkeypatch.context() as m:
        calls = stop_at(m, 0, None)
        whole = tokens("whole")
    assert calls.count("append_whole") == 3 * -(-58 // WINDOW)
    for number in range(1, len(calls) + 1):
        with monkeypatch.context() as m, pytest.raises(Killed):
            stop_at(m, number, Killed())
            tokens(str(number))
        assert tokens(str(number)) == whole
        assert len(list((tmp_path / str(number) / "token_cache").iterdir())) == 1

    with monkeypatch.context() as m:
        append = token_store.checkpoint.append_whole

        def dies(target, content):
            if target.name == "ids" and target.exists():
                os.kill(os.getpid(), signal.SIGKILL)
            append(target, content)

        before = lambda: setattr(token_store.checkpoint, "append_whole", dies)  # noqa: E731
        pids = start(lambda argv: {"digest": tokens("killed")}, [], tmp_path, before=before)
        assert finish(pids, tmp_path)[0] == -signal.SIGKILL
    left = list((tmp_path / "killed/token_cache").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".")
    assert tokens("killed") == whole
    (cache,) = (tmp_path / "killed/token_cache").iterdir()
    assert not cache.name.startswith(".")


@forks
def test_predictions_of_a_large_file(plain_run, large, tmp_path, monkeypatch):
    """Window by window, to the same numbers; killed at any event it continues to the same bytes."""
    path = write_rows(tmp_path / "new.csv", 40, skip=14)
    flags = ["--force", "--runs", str(plain_run), "--input", str(path), "--submission", "", "--max_tokens", "200"]
    whole = tmp_path / "whole.csv"
    encoded, tokenize = [], data.tokenize
    with monkeypatch.context() as m:
        calls = stop_at(m, 0, None)
        m.setattr(data, "tokenize", lambda *given: encoded.append(len(given[2])) or tokenize(*given))
        result = infer.main([*flags, "--output", str(whole)])
    assert encoded == [13, 13, 13, 1] and result["rows"] == 40
    with monkeypatch.context() as m:
        m.setattr(spool, "MEMORY", 10**9)
        m.setattr(trained, "WINDOW", 10**9)
        infer.main([*flags, "--output", str(tmp_path / "once.csv")])
    rows, once = files.read_rows(str(whole), "x"), files.read_rows(str(tmp_path / "once.csv"), "x")
    columns = [name for name in rows[0] if name.startswith("probability_")]
    assert [(row["id"], row["prediction"]) for row in rows] == [(row["id"], row["prediction"]) for row in once]
    numbers = [[[float(row[name]) for name in columns] for row in table] for table in (rows, once)]
    np.testing.assert_allclose(*numbers, atol=1e-6)

    for number in range(1, len(calls) + 1, 3):
        out = tmp_path / str(number) / "out.csv"
        with monkeypatch.context() as m, pytest.raises(Killed):
            stop_at(m, number, Killed())
            infer.main([*flags, "--output", str(out)])
        infer.main([*flags, "--output", str(out), "--overwrite"])
        assert out.read_bytes() == whole.read_bytes()
        assert [p.name for p in out.parent.iterdir() if not p.name.endswith(".tmp")] == ["out.csv"]


def test_a_time_limit_leaves_later_windows_out(plain_run, large, tmp_path, monkeypatch):
    rows = files.stream_rows(str(write_rows(tmp_path / "new.csv", 40)), "x")
    run = trained.load_run(plain_run)
    encoded, tokenize = [], data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *given: encoded.append(len(given[2])) or tokenize(*given))
    logits, report = run.logits(rows, seconds=1e-9)
    assert encoded == [13] and np.isnan(logits[13:]).all() and len(logits) == len(report.keys) == 40


@pytest.mark.parametrize("name, id_column", [("r.csv", "id"), ("r.csv", "number"), ("r.jsonl", "number")])
def test_slices_of_a_large_file_are_the_same(tmp_path, monkeypatch, name, id_column):
    path = write_rows(tmp_path / "r.csv", 58)
    if name == "r.jsonl":
        rows = files.read_rows(str(path), "x")
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def cut():
        folder = tmp_path / str(spool.MEMORY)
        flags = {"train_data": path, "slice_rows": 20, "val_size": 9, "id_column": id_column, "output": folder}
        slices.main([f"--{name}={value}" for name, value in flags.items()])
        return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "slices.json"}

    whole, again = pair_of(cut, monkeypatch)
    assert whole == again and len(whole) == 4


def test_a_slice_encodes_its_own_rows_alone(tmp_path, small_base, monkeypatch):
    path = write_rows(tmp_path / "rows.csv", 400)
    flags = {"train_data": path, "slice_rows": 50, "val_size": 20, "output": tmp_path / "slices"}
    slices.main([f"--{name}={value}" for name, value in flags.items()])
    encoded, tokenize = [], data.tokenize
    monkeypatch.setattr(data, "tokenize", lambda *given: encoded.append(len(given[2])) or tokenize(*given))
    own = {"train_data": tmp_path / "slices/slice_1.csv", "val_data": tmp_path / "slices/validation.csv"}
    train.main(toy_flags(tmp_path, small_base, max_steps=2, eval_every=2, **own))
    assert encoded == [50, 20]


# ---- memory ---------------------------------------------------------------------------------------------------------

FLAT = 48  # MB that 80,000 more rows may take: their ids, labels and lengths; their texts are 80 MB
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import ddp, bases, splits, token_store
from configs import TrainConfig
cfg = TrainConfig(train_data=sys.argv[2], text="{text}", base=sys.argv[3], outputs=sys.argv[4])
rows, _, labels = splits.read(cfg, print)
rows.tokens, _ = token_store.tokenize(cfg, bases.load_tokenizer(cfg.base), rows.rows, ddp.World(0, 1, None))
splits.digests(rows, None, labels)
(peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))  # a parent's in ru_maxrss
print(len(rows.tokens.lengths), int(peak) // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_rows(tmp_path, small_base):
    peaks = []
    for count in (20_000, 100_000):
        path = tmp_path / f"{count}.csv"
        filler = "x" * 1000
        path.write_text("id,text,filler,label\n" + "".join(f"{i},word {i},{filler},{i % 2}\n" for i in range(count)))
        arguments = [str(ROOT), str(path), small_base, str(tmp_path / "outputs")]
        done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=400)
        rows, peak = map(int, done.stdout.split()[-2:]) if done.returncode == 0 else pytest.fail(done.stderr)
        assert rows == count
        peaks.append(peak)
    assert peaks[1] - peaks[0] < FLAT, peaks
