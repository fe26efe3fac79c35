"""From folders of files to cached tokens: nothing read twice, nothing lost without a record, nothing half-written."""

import csv
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import last_json
from test_ddp import forked, forks, log_of
from transformers import AutoModelForCausalLM

import bases
import checkpoint
import cli
import configs
import corpus
import cpt
import data
import ddp
import holdout
import presets
from errors import DiskError, UserError

ROOT = Path(__file__).resolve().parent.parent
ALONE = ddp.World(0, 1, torch.device("cpu"))
HOW = dict(template="{text}", max_length=32, chat="auto", system="Be brief.")
PROSE = "Let us recall that every finite group of prime order is cyclic, and so it is abelian. "
PAPER = "\\documentclass{article}\\begin{document}" + PROSE + "\\input{sec/one}\\end{document}"


@pytest.fixture(scope="module")
def texts() -> list[str]:
    with open(ROOT / "tiny/data/train.csv", encoding="utf-8", newline="") as f:
        return [row["Question"] for row, _ in zip(csv.DictReader(f), range(60), strict=False)]


@pytest.fixture
def tokenizer(small_base):
    return bases.load_tokenizer(small_base)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


@pytest.fixture
def papers(tmp_path, texts) -> Path:
    return write_jsonl(tmp_path / "papers.jsonl", [t * (1 + i % 3) for i, t in enumerate(texts[:30])])


def load(path: Path, tokenizer, cache: Path, said=None, **how) -> corpus.Corpus:
    words = said.append if said is not None else lambda _: None
    return corpus.load(str(path), "train_data", tokenizer, cache, ALONE, words, **{**HOW, **how})


def cpt_flags(base: str, train: Path, out: Path, **changes) -> list[str]:
    settings = {
        "base": base, "random_init": "false", "train_data": train, "max_length": 32, "max_tokens": 256, "batch_size": 9,
        "micro_batches": 2, "epochs": 2, "lr": 1e-2, "val_size": 6, "precision": "fp32", "samples": 0,
        "outputs": out / "outputs", **changes,
    }  # fmt: skip
    return [str(part) for name, value in settings.items() if value is not None for part in (f"--{name}", value)]


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Everything that may lie around."""
    root = tmp_path / "mixed"
    for inside in ("sec", ".git", "x.txt"):
        (root / inside).mkdir(parents=True)
    made = {
        "paper.tex": PAPER, "sec/one.tex": "In section one, " + PROSE, "B.TEX": PAPER.replace("finite", "small"),
        "notes.txt": "Plain notes.", "NOTES2.TXT": "Other notes.", "same.md": "Plain \n\n notes.\n",
        "x.txt/in.md": "In.", "latin.txt": "é".encode("latin-1"),
        "empty.txt": "", "blank.md": " \n", "empty.jsonl": "", ".git/config.txt": "hidden", ".hidden.txt": "hidden",
        "paper.pdf": b"%PDF-1.4", "figure.png": b"\x89PNG\r\n", "binary.txt": b"a\0b",
        "wide.txt": "wide".encode("utf-16"), "zero.tex": b"\0\1\2",
    }  # fmt: skip
    for name, content in made.items():
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    write_jsonl(root / "rows.jsonl", ["Row one.", "Row two.", "Row  one."])
    (root / "more.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Row three."}\n'))
    (root / "gone.md").symlink_to(root / "nowhere.md")
    (root / "mem.md").symlink_to("/proc/self/mem")  # is a file, and cannot be read, by root neither
    os.mkfifo(root / "pipe.txt")
    return root


posix = pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux: a pipe and an unreadable file")


@posix
def test_every_file_of_a_folder_has_its_fate_on_record(folder):
    rows, names, records = corpus.read_documents(corpus.find_files(str(folder), "train_data"), "train_data")
    found = [" ".join(row["text"].split()) for row in rows]
    want = ["In.", "Plain notes.", "Other notes.", "Row one.", "Row two.", "Row three.", "wide"]
    assert sorted(t for t in found if "group" not in t) == sorted(want)
    papers = [t for t in found if "group" in t]
    assert len(papers) == 2 and sum("In section one" in t for t in papers) == 2  # \input files are no documents
    first = {}
    for record in records:
        first.setdefault(record["file"], record["fate"])
    inside = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    assert first.keys() == inside - {".git/config.txt", ".hidden.txt"}
    fates = {
        "paper.tex": "root", "B.TEX": "root", "sec/one.tex": "inlined into", "zero.tex": "dropped: binary",
        "notes.txt": "read", "NOTES2.TXT": "read", "same.md": "read", "x.txt/in.md": "read", "rows.jsonl": "read",
        "more.jsonl.gz": "read", "empty.jsonl": "dropped: empty", "paper.pdf": "dropped: .pdf is not read",
        "figure.png": "dropped: .png is not read", "binary.txt": "dropped: line 1 holds a NUL",
        "wide.txt": "read", "latin.txt": "dropped: not UTF-8", "gone.md": "dropped: no regular file",
        "mem.md": "dropped: cannot be read", "pipe.txt": "dropped: no regular file", "empty.txt": "read",
        "blank.md": "read",
    }  # fmt: skip
    assert first.keys() == fates.keys()
    assert {n: f for n, f in first.items() if not f.startswith(fates[n])} == {}
    again = {(r["file"], r["fate"]) for r in records if r["fate"].startswith("dropped: a document")}
    assert again == {
        ("same.md", "dropped: a document equal to one of notes.txt"), ("empty.txt", "dropped: a document empty"),
        ("rows.jsonl", "dropped: a document equal to one of rows.jsonl"), ("blank.md", "dropped: a document empty"),
    }  # fmt: skip
    assert len(rows) == len(names) and names[found.index("Row two.")] == "rows.jsonl row 2"


@posix
def test_the_order_is_that_of_names_and_the_run_keeps_the_record(folder, tmp_path, small_base, tokenizer):
    one = corpus.read_documents(corpus.find_files(str(folder), "train_data"), "train_data")
    for name in sorted(p.name for p in folder.iterdir() if p.is_file()):  # another order of the folder's own entries
        (folder / name).rename(folder / f"{name}~")
        (folder / f"{name}~").rename(folder / name)
    assert corpus.read_documents(corpus.find_files(str(folder), "train_data"), "train_data") == one
    flags = cpt_flags(small_base, folder, tmp_path, val_size=2, max_steps=1, samples=2)
    record = Path(cpt.main(flags)["run"]) / "corpus.jsonl"
    assert [json.loads(line) for line in open(record, encoding="utf-8")] == one[2]


@posix
@pytest.mark.parametrize("name", ["pipe.txt", "mem.md", "binary.txt", "zero.tex", "empty.txt", "paper.pdf", "gone.md"])
def test_a_named_file_that_cannot_be_read_is_an_error(folder, name):
    words = {
        "paper.pdf": "no file that ends in .tex",
        "pipe.txt": "no file that ends in .tex",
        "mem.md": "cannot be read",
        "zero.tex": "binary",
    }
    words |= {
        "empty.txt": "no documents in 1 files",
        "binary.txt": "line 1 holds a NUL",
        "gone.md": "no folder, and no file",
    }
    with pytest.raises(UserError, match=words[name]) as error:
        corpus.read_documents(corpus.find_files(str(folder / name), "train_data"), "train_data")
    assert "\n" not in str(error.value)


# ---- the cache ------------------------------------------------------------------------------------------------------


def same(a: corpus.Corpus, b: corpus.Corpus) -> bool:
    one, two = ({**vars(c.tokens), "sizes": c.sizes} for c in (a, b))
    return all(np.array_equal(one[n], two[n]) for n in ("ids", "starts", "stops", "sizes")) and a.files == b.files


def stamps(cache: Path) -> dict[str, tuple[int, int]]:
    return {p.relative_to(cache).as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns) for p in cache.rglob("*")}


def test_a_corpus_is_encoded_once_and_mapped(papers, tokenizer, tmp_path):
    cache, said = tmp_path / "cache", []
    first = load(papers, tokenizer, cache, said)
    before = stamps(cache)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    second = load(shutil.copy(papers, moved), tokenizer, cache, said)
    assert stamps(cache) == before and same(first, second)
    assert isinstance(second.tokens.ids, np.memmap) and second.tokens.ids.dtype == np.int32
    assert said[0].split(": ", 1)[1] == said[1].split(": ", 1)[1] and "30 documents" in said[0]
    assert [p.name for p in cache.iterdir()] == [next(iter(before)).split("/")[0]]  # nothing hidden is left


def test_whatever_the_tokens_follow_from_names_another_cache(papers, tokenizer, tmp_path, texts):
    cache = tmp_path / "cache"

    def made(path=papers, **how) -> int:
        load(path, tokenizer, cache, **how)
        return len(list(cache.iterdir()))

    assert made() == made() == 1
    changes = [{"template": "Paper: {text}"}, {"max_length": 33}, {"chat": "no"}, {"system": "Hi."}]
    assert [made(**change) for change in changes] == [2, 3, 4, 5]
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert made() == 6
    tokenizer.add_tokens(["<think>"])
    assert made() == 7
    text = papers.read_text()
    papers.write_text(text.replace("a", "e", 1))
    assert made() == 8
    papers.write_text(text)
    assert made() == 8
    os.rename(papers, papers.with_name("other.jsonl"))
    assert made(papers.with_name("other.jsonl")) == 9


def test_the_code_that_makes_the_tokens_names_the_cache(papers, tokenizer, tmp_path, monkeypatch):
    """Every file of ours that corpus.py stands on is hashed, but those that only write, share or report."""
    needed, todo = set(), ["corpus"]
    while todo:
        name = todo.pop()
        if name not in needed and (ROOT / f"{name}.py").exists():
            needed.add(name)
            todo += re.findall(r"^(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.MULTILINE)
    others = """answer_numbers answer_parser checkpoint checks configs ddp disk errors locks metrics seals signals
        tables template_trial watch"""
    assert needed - set(others.split()) == set(corpus.CODE)
    load(papers, tokenizer, tmp_path / "cache")
    (tmp_path / "code").mkdir()
    for name in corpus.CODE:
        shutil.copy(ROOT / f"{name}.py", tmp_path / "code")
    monkeypatch.setattr(corpus, "__file__", str(tmp_path / "code/corpus.py"))
    load(papers, tokenizer, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1, "where the code lies does not count"
    with open(tmp_path / "code/latex_clean.py", "a") as f:
        f.write("# changed")
    load(papers, tokenizer, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("file", ["ids", "starts", "stops", "sizes", "corpus.json", "manifest.json"])
def test_a_damaged_cache_is_made_again_and_never_used(papers, tokenizer, tmp_path, capsys, file):
    cache = tmp_path / "cache"
    want = load(papers, tokenizer, cache)
    (path,) = cache.glob(f"*/{file}")
    whole = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    sizes = len(whole[file])
    damages = {
        "flipped": lambda raw: raw[: sizes // 2] + bytes([raw[sizes // 2] ^ 1]) + raw[sizes // 2 + 1 :],
        "cut": lambda raw: raw[: sizes // 3], "longer": lambda raw: raw + b"\0", "empty": lambda raw: b"", "gone": None,
    }  # fmt: skip
    want = corpus.Corpus(
        data.Tokens(*(np.array(a) for a in list(vars(want.tokens).values())[:3])), want.sizes, False, want.files
    )
    for damage in damages.values():
        path.unlink()
        if damage:
            path.write_bytes(damage(whole[file]))
        assert same(load(papers, tokenizer, cache), want)
        assert "made again" in capsys.readouterr().out
        assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == whole
    assert len(list(cache.iterdir())) == 1


def test_a_write_that_is_cut_short_leaves_nothing(papers, tokenizer, tmp_path, monkeypatch):
    cache, count, write = tmp_path / "cache", 0, checkpoint.fs_write
    for at in range(1, 7):
        count = 0

        def full(path, content, at=at):
            nonlocal count
            count += 1
            write(path, content[: len(content) // 2] if count == at else content)
            if count == at:
                raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "fs_write", full)
            with pytest.raises(OSError, match="No space"):
                load(papers, tokenizer, cache)
        assert count == at and not list(cache.iterdir())
    assert len(load(papers, tokenizer, cache).sizes) == 30


@pytest.mark.parametrize("at", [1, 2])
def test_a_disk_that_fails_at_a_rename_is_named(papers, tokenizer, tmp_path, monkeypatch, at):
    """The save's own rename, and the one that gives it its name."""
    cache, rename, renames = tmp_path / "cache", checkpoint.fs_rename, []

    def full(*paths):
        renames.append(paths)
        if len(renames) >= at:
            raise OSError(28, "No space left on device")
        rename(*paths)

    monkeypatch.setattr(checkpoint, "fs_rename", full)
    with pytest.raises(DiskError, match="No space left on device; "):
        load(papers, tokenizer, cache)
    assert len(renames) == at and not list(cache.iterdir())


@forks
def test_two_runs_may_make_the_same_cache_at_once(papers, tokenizer, tmp_path, monkeypatch):
    """Another process makes it while this one writes: both have it, and one is kept."""
    cache, write, children = tmp_path / "cache", checkpoint.fs_write, []

    def meanwhile(path, content):
        if not children:
            children.append(os.fork())
            if not children[0]:
                try:
                    os._exit(len(load(papers, tokenizer, cache).sizes))
                finally:
                    os._exit(99)
            assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 30
        write(path, content)

    monkeypatch.setattr(checkpoint, "fs_write", meanwhile)
    assert len(load(papers, tokenizer, cache).sizes) == 30 and children
    assert len(list(cache.iterdir())) == 1 and checkpoint.verify(next(cache.iterdir()))


@forks
def test_two_ranks_share_one_cache(papers, small_base, tmp_path):
    status, out, err = forked(cpt.main, cpt_flags(small_base, papers, tmp_path, max_steps=1), tmp_path, ranks=2)
    assert status == 0, err
    assert len(list((tmp_path / "outputs/token_cache").iterdir())) == 1


# ---- documents into segments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "count, val_size, held_out",
    [(10, 1, 1), (10, 9, 9), (10, 0.02, 1), (10, 0.5, 5), (2, 0.5, 1), (1000, 0.02, 20)],
)
def test_the_split_is_by_document_and_of_the_asked_size(count, val_size, held_out):
    train, val = holdout.split(count, val_size, seed=3)
    assert len(val) == held_out and sorted([*train, *val]) == list(range(count))
    assert [a.tolist() for a in holdout.split(count, val_size, 3)] == [train.tolist(), val.tolist()]
    if count == 1000:
        assert holdout.split(count, val_size, 4)[1].tolist() != val.tolist()


@pytest.mark.parametrize("count, val_size", [(10, 10), (10, 11), (1, 0.5), (1, 1), (10, 0.99)])
def test_a_split_without_a_side_is_refused(count, val_size):
    with pytest.raises(UserError, match=f"--val_size .* of {count} documents"):
        holdout.split(count, val_size, 0)


@pytest.mark.parametrize("cross", [False, True])
def test_segments_share_one_token_and_documents_end_with_eos(papers, tokenizer, tmp_path, cross):
    found = load(papers, tokenizer, tmp_path / "cache")
    rows = np.array([7, 0, 2, 29])
    got = corpus.segments(found, rows, tokenizer, 16, cross)
    documents = [found.tokens.row(i).tolist() for i in rows]
    texts = [json.loads(line)["text"] for line in open(papers, encoding="utf-8")]
    assert documents == [[*tokenizer(texts[i])["input_ids"], tokenizer.eos_token_id] for i in rows]
    want = []
    for ids in [sum(documents, [])] if cross else documents:
        want += [ids[i : i + 17] for i in range(0, len(ids) - 1, 16)]
    assert [got.row(i).tolist() for i in range(len(got.lengths))] == want
    assert int(got.targets.sum()) == sum(map(len, documents)) - (1 if cross else 4)
    if not cross:  # a slice of the mapped file, not a copy
        assert np.shares_memory(got.ids, found.tokens.ids)


def test_no_text_is_on_both_sides(papers, small_base, tmp_path):
    cfg, _ = cli.parse(configs.CptConfig, presets.CPT_PRESETS, cpt_flags(small_base, papers, tmp_path, eval_rows=3))
    texts = cpt.load_texts(cfg, bases.load_tokenizer(small_base), ALONE)

    def documents(tokens: data.Tokens) -> set[int]:  # each segment's document, by where the text begins in the file
        cache, how = tmp_path / "outputs/token_cache", dict(chat=cfg.chat, system=cfg.system)
        found = load(papers, bases.load_tokenizer(small_base), cache, **how)
        return set(np.searchsorted(found.tokens.starts, tokens.starts, side="right").tolist())

    train, val, few = documents(texts.train), documents(texts.val), documents(texts.periodic)
    assert len(train) == 24 and len(val) == 6 and not train & val and few < val and len(few) == 3
    assert few != set(sorted(val)[:3])  # not those of the first file or class alone


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_nothing_is_written(small_base, tmp_path, papers):
    for name in ("none", "junk", "macros"):
        (tmp_path / name).mkdir()
    (tmp_path / "junk/a.png").write_bytes(b"\x89PNG")
    (tmp_path / "junk/b.txt").write_bytes(b"\0\1")
    (tmp_path / "macros/a.tex").write_text("\\newcommand{\\R}{\\mathbb{R}}\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    bad = {
        "none": "no documents in 0 files", "junk": "no documents in 2 files", "macros": "nothing but preamble",
        "gone": "no folder, and no file", "bad.jsonl": "line 2", "other.jsonl": r"no column text \(there is: body\)",
    }  # fmt: skip
    for name, words in bad.items():
        for flags in ({"train": tmp_path / name}, {"train": papers, "guard_data": tmp_path / name}):
            with pytest.raises(UserError, match=words) as error:
                cpt.main(cpt_flags(small_base, out=tmp_path, **flags))
            flag = "--guard_data" if len(flags) > 1 else "--train_data"
            assert str(error.value).startswith(flag) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="--text"):
        cpt.main(cpt_flags(small_base, papers, tmp_path, text="{text"))
    assert not (tmp_path / "outputs").exists()


def test_the_command_ends_with_status_2(small_base, tmp_path, command):
    (tmp_path / "none").mkdir()
    status, out, err = command("cpt.py", *cpt_flags(small_base, tmp_path / "none", tmp_path))
    assert status == 2 and "Traceback" not in err and not (tmp_path / "outputs").exists()
    assert (
        err.strip().splitlines()[-1].startswith(f"error: --train_data {tmp_path / 'none'}: no documents in 0 files")
    ), err


def test_fragments_without_a_root_are_documents(tmp_path):
    for i in range(3):
        (tmp_path / f"part{i}.tex").write_text(f"Part {i}. " + PROSE)
    rows, _, records = corpus.read_documents(corpus.find_files(str(tmp_path), "train_data"), "train_data")
    assert [row["text"][:6] for row in rows] == ["Part 0", "Part 1", "Part 2"]
    assert {r["fate"] for r in records} == {"fragment"}


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overfit(small_base, texts, tmp_path_factory) -> tuple[dict, Path, list[str]]:
    """A few texts learned by heart: the last evaluation is worse than an earlier one."""
    out = tmp_path_factory.mktemp("overfit")
    train, guard = write_jsonl(out / "papers.jsonl", texts[:20]), write_jsonl(out / "guard.jsonl", texts[40:45])
    flags = cpt_flags(
        small_base, train, out, epochs=12, batch_size=5, lr=3e-2, weight_decay=0, eval_every=7, eval_rows=3,
        guard_data=guard, samples=2, export=out / "exported", export_dtype="fp32",
    )  # fmt: skip
    return cpt.main(flags), out, flags


def test_the_best_save_is_kept_and_exported(overfit):
    result, out, _ = overfit
    run = Path(result["run"])
    evals = [line for line in log_of(run) if "eval" in line]
    losses = {line["step"]: line["eval"]["loss"] for line in evals[1:-1]}  # before: all rows; last line: the best again
    best = min(losses, key=losses.get)
    assert result["best_step"] == best < result["steps"] and losses[result["steps"]] > losses[best] + 0.1
    assert evals[-1]["step"] == best and evals[-1]["eval"] == result["metrics"]
    assert (
        checkpoint.verify(run / "best")["step"] == best and checkpoint.verify(run / "last")["step"] == result["steps"]
    )
    kept, last = (checkpoint.load_tensors(run / side / "model.safetensors") for side in ("best", "last"))
    exported = checkpoint.load_tensors(out / "exported/model.safetensors")
    assert all(torch.equal(t, exported[n]) for n, t in kept.items()) and kept.keys() == exported.keys()
    assert not any(torch.equal(t, last[n]) for n, t in kept.items())


def test_guard_text_and_samples_are_reported(overfit, small_base):
    """The guard text is scored as held-out text is; samples begin held-out documents and are the base's own words."""
    result, out, flags = overfit
    run, lm = Path(result["run"]), AutoModelForCausalLM.from_pretrained(out / "exported", dtype=torch.float32).eval()
    tokenizer = bases.load_tokenizer(str(out / "exported"))
    nats = count = 0
    for line in open(out / "guard.jsonl", encoding="utf-8"):
        ids = [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        for i in range(0, len(ids) - 1, 32):
            part = torch.tensor([ids[i : i + 33]])
            with torch.no_grad():
                nats += float(lm(input_ids=part, labels=part).loss) * (part.shape[1] - 1)
            count += part.shape[1] - 1
    names = {"loss", "perplexity", "bits_per_byte"}
    assert result["metrics"].keys() == result["before"].keys() == names | {f"guard_{n}" for n in names}
    assert result["metrics"]["guard_loss"] == pytest.approx(nats / count, abs=1e-4)
    evals = [line for line in log_of(run) if "eval" in line]
    assert all(len(line["samples"]) == 2 for line in evals)
    prompt, completion = evals[-1]["samples"][0]
    held_out = holdout.split(20, 6, 0)[1]
    texts = [json.loads(line)["text"] for line in open(out / "papers.jsonl", encoding="utf-8")]
    assert texts[held_out[0]].startswith(prompt) and len(tokenizer(prompt)["input_ids"]) <= 32
    ids = tokenizer(prompt, return_tensors="pt")
    new = lm.generate(**ids, max_new_tokens=48, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
    assert completion == tokenizer.decode(new, skip_special_tokens=True)


def test_the_table_samples_and_the_result_are_printed(small_base, papers, tmp_path, command):
    guard = write_jsonl(tmp_path / "guard.jsonl", ["General text about nothing.", "Other text."])
    flags = cpt_flags(small_base, papers, tmp_path, max_steps=2, guard_data=guard, samples=1)
    status, out, err = command("cpt.py", *flags)
    assert status == 0, err
    result, lines = last_json(out), out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split()[:2] == ["step", "tokens"])
    assert lines[header].split() == "step tokens perplexity bits per byte guard perplexity guard bits per byte".split()
    row = lines[header + 2].split()
    names = ("perplexity", "bits_per_byte", "guard_perplexity", "guard_bits_per_byte")
    assert [row[0], *row[2:]] == [str(result["best_step"]), *(f"{result['metrics'][n]:.4f}" for n in names)]
    assert sum(line.startswith("sample: ") for line in lines) == 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("rank", [0, 4])
def test_half_precision_runs_on_a_cpu_are_close_to_fp32(small_base, papers, tmp_path, precision, rank):
    runs = {}
    for name in ("fp32", precision):
        changes = {"rank": rank, "alpha": 6, "lora_dropout": 0} if rank else {}
        result = cpt.main(cpt_flags(small_base, papers, tmp_path / name, precision=name, max_steps=4, **changes))
        lines = [line for line in log_of(Path(result["run"])) if "loss" in line]
        assert all(line["loss"] is not None and np.isfinite(line["loss"]) for line in lines) and len(lines) == 4
        runs[name] = [line["loss"] for line in lines] + [result["metrics"]["loss"]]
    assert runs[precision] == pytest.approx(runs["fp32"], rel=1e-2) and runs[precision] != runs["fp32"]


def test_checkpointing_changes_no_loss(small_base, papers, tmp_path):
    losses = []
    for name in ("false", "true"):
        changes = dict(rank=4, alpha=6, targets="q_proj,down_proj,embed_tokens", lora_dropout=0.2, embed_lr=1e-3)
        flags = cpt_flags(small_base, papers, tmp_path / name, grad_checkpoint=name, max_steps=5, **changes)
        losses.append([line["loss"] for line in log_of(Path(cpt.main(flags)["run"])) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0][-1] < losses[0][0]


def test_modules_trained_whole_move_at_embed_lr(small_base, papers, tmp_path):
    """AdamW's first update is its learning rate, whatever the gradient: the embedding's is embed_lr's."""
    changes = dict(rank=2, alpha=3, targets="q_proj", modules_to_save="embed_tokens", max_steps=1, warmup_ratio=0)
    flags = cpt_flags(small_base, papers, tmp_path, lr=1e-2, embed_lr=1e-4, weight_decay=0, grad_clip=0, **changes)
    run = Path(cpt.main(flags)["run"])
    tensors = checkpoint.load_tensors(run / "last/adapter_model.safetensors")
    before = checkpoint.load_tensors(Path(small_base) / "model.safetensors")["model.embed_tokens.weight"]
    moved = (tensors["base_model.model.model.embed_tokens.weight"] - before).abs()
    assert float(moved.max()) == pytest.approx(1e-4, rel=2e-2) and (moved > 0).any(dim=1).sum() > 50
    adapter = [t for n, t in tensors.items() if "lora_B" in n]
    assert max(float(t.abs().max()) for t in adapter) == pytest.approx(1e-2, rel=2e-2)


# ---- what is held out -----------------------------------------------------------------------------------------------


def sides(cfg_flags: list[str], base: str) -> cpt.Texts:
    cfg, _ = cli.parse(configs.CptConfig, presets.CPT_PRESETS, cfg_flags)
    return cpt.load_texts(cfg, bases.load_tokenizer(base), ALONE)


def test_a_share_is_one_of_tokens_and_no_book_is_held_out_whole():
    """A document that holds a tenth of all tokens or more is trained on, whatever the seed draws."""
    lengths = np.array([100_000, *[50] * 10, *[400] * 200])
    for seed in range(20):
        train, val = holdout.split(len(lengths), 0.02, seed, lengths)
        held_out = lengths[val].sum()
        assert sorted([*train, *val]) == list(range(len(lengths))) and 0 in train
        assert 0.02 * lengths.sum() <= held_out < 0.02 * lengths.sum() + 400
    same = np.full(1000, 7)
    assert [rows.tolist() for rows in holdout.split(1000, 0.02, 3, same)] == [
        rows.tolist() for rows in holdout.split(1000, 0.02, 3)
    ], "documents of one length: as a share of documents"


@pytest.mark.parametrize("count", [1, 3, 9])
def test_of_few_documents_the_ends_are_held_out(small_base, tmp_path, texts, capsys, count):
    """One book among fragments: all of it but its end is trained on; together both sides are the documents."""
    documents = [" ".join(texts), *(f"A short piece {i}." for i in range(1, count))]
    path = write_jsonl(tmp_path / "few.jsonl", documents)
    found = sides(cpt_flags(small_base, path, tmp_path, val_size=0.1), small_base)
    assert f"the ends of {count} documents" in capsys.readouterr().out
    tokenizer = bases.load_tokenizer(small_base)
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in documents]
    total = sum(map(len, ids))
    assert 0.08 * total < found.val.targets.sum() <= 0.1 * total < found.train.targets.sum()

    def learned(tokens):  # the predicted tokens in order
        return [t for i in range(len(tokens.lengths)) for t in tokens.row(i)[1:].tolist()]

    book = ids[0]
    first = len(learned(found.val)) if count == 1 else None
    assert learned(found.train)[:50] == book[1:51]
    if count == 1:
        assert learned(found.train) + [book[-first - 1]] + learned(found.val) == book[1:]
        text = tokenizer.decode(book[-first:-1])
        assert found.val.bytes == len(text.encode())


def test_one_book_is_trained_on(small_base, tmp_path, texts):
    book = tmp_path / "book"
    book.mkdir()
    (book / "book.txt").write_text("\n\n".join(texts))
    result = cpt.main(cpt_flags(small_base, book, tmp_path, val_size=0.05, max_steps=4, save_every=2, epochs=1))
    assert result["steps"] == 4 and np.isfinite(result["metrics"]["loss"])


def versions(texts, folder) -> None:
    """Three versions of one paper, in a folder each."""
    for i in range(3):
        (folder / f"v{i}").mkdir(parents=True)
        (folder / f"v{i}/main.txt").write_text("\n\n".join([*texts[:20], f"Version {i}.", *texts[20 + i : 22 + i]]))


def test_versions_of_a_text_are_named_and_never_held_out(small_base, tmp_path, texts, capsys):
    """Whatever the seed draws: nothing that is held out has a nearly equal text in training."""
    versions(texts, tmp_path / "papers")
    for i, text in enumerate(texts[25:45]):
        (tmp_path / f"papers/{i}.txt").write_text(text)
    for seed in range(5):
        flags = cpt_flags(small_base, tmp_path / "papers", tmp_path, val_size=4, seed=seed)
        tokens = sides(flags, small_base).val
        assert max(tokens.lengths) < len(" ".join(texts[:20]).split())
    out = capsys.readouterr().out
    assert "3 documents in 1 group are nearly equal (v0/main.txt row 1, v1/main.txt row 1, v2/main.txt row 1)" in out


def test_versions_of_one_text_alone_are_refused_without_val_data(small_base, tmp_path, texts):
    versions(texts, tmp_path / "papers")
    with pytest.raises(UserError, match="all 3 documents are nearly equal to others: .* give --val_data"):
        sides(cpt_flags(small_base, tmp_path / "papers", tmp_path), small_base)


def test_most_of_the_text_held_out_is_a_warning(small_base, papers, tmp_path, capsys):
    sides(cpt_flags(small_base, papers, tmp_path, val_size=20), small_base)
    assert "warning: most of the text is held out" in capsys.readouterr().out


@pytest.fixture
def own(tmp_path, texts) -> Path:
    return write_jsonl(tmp_path / "own.jsonl", texts[40:45])


def test_val_data_is_what_is_held_out(small_base, papers, own, tmp_path, capsys):
    """Nothing of the training text is held out; documents in both are named."""
    found = sides(cpt_flags(small_base, papers, tmp_path, val_size=None, val_data=own), small_base)
    alone = sides(cpt_flags(small_base, own, tmp_path, val_size=1), small_base)
    whole = sides(cpt_flags(small_base, papers, tmp_path, val_size=1), small_base)
    assert found.val.targets.sum() == alone.train.targets.sum() + alone.val.targets.sum()
    assert found.train.targets.sum() == whole.train.targets.sum() + whole.val.targets.sum()
    assert "are in --train_data too" not in capsys.readouterr().out
    both = write_jsonl(tmp_path / "both.jsonl", [json.loads(line)["text"] for line in open(papers)][:2] + ["New."])
    sides(cpt_flags(small_base, papers, tmp_path, val_size=None, val_data=both), small_base)
    assert (
        "warning: 2 of --val_data are in --train_data too (both.jsonl row 1, both.jsonl row 2)"
        in capsys.readouterr().out
    )


def test_val_data_of_pairs_with_guard_data(small_base, tmp_path, capsys):
    """What is held out are all pairs of --val_data; guard texts may be documents; what is on both sides is reported."""

    def pairs(name, numbers):
        rows = [{"prompt": f"What is {i}+1?", "response": f"It is {i + 1}."} for i in numbers]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    train, val, guard = pairs("t.jsonl", range(20)), pairs("v.jsonl", range(18, 30)), tmp_path / "g.jsonl"
    guard.write_text("".join(json.dumps({"text": f"Other words {i}."}) + "\n" for i in range(5)))
    for general, count in ((guard, 0), (pairs("p.jsonl", range(19, 25)), 1)):
        flags = cpt_flags(small_base, train, tmp_path, val_size=None, val_data=val, guard_data=general)
        texts = sides(flags, small_base)
        assert texts.pairs and (len(texts.train.lengths), len(texts.val.lengths)) == (20, 12)
        said = capsys.readouterr().out
        assert "2 of --val_data are in --train_data too (v.jsonl row 1, v.jsonl row 2)" in said
        assert (f"{count} texts of --guard_data are trained on" in said) == bool(count)


def test_val_data_of_another_kind_or_with_val_size_is_refused(small_base, papers, own, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(UserError, match="--val_data .* has pairs, --train_data documents: give one kind"):
        cpt.main(cpt_flags(small_base, papers, tmp_path, val_size=None, val_data=pairs))
    with pytest.raises(UserError, match="--val_size has no effect: it is used without --val_data"):
        cpt.main(cpt_flags(small_base, papers, tmp_path, val_data=own))
    with pytest.raises(UserError, match="--val_data .*: no folder, and no file"):
        cpt.main(cpt_flags(small_base, papers, tmp_path, val_size=None, val_data=tmp_path / "gone"))


@forks
def test_val_data_on_two_ranks_and_resumed_is_the_same_and_another_is_refused(small_base, papers, own, tmp_path):
    flags = dict(val_size=None, val_data=own, max_steps=4, save_every=2, epochs=2)
    result = cpt.main(cpt_flags(small_base, papers, tmp_path / "one", **flags))
    (tmp_path / "two").mkdir()
    status, out, err = forked(cpt.main, cpt_flags(small_base, papers, tmp_path / "two", **flags), tmp_path / "two", 2)
    assert status == 0, err
    run = next((tmp_path / "two/outputs").glob("*/*/run_0"))
    assert log_of(run) == log_of(Path(result["run"]))
    again = cpt_flags(small_base, papers, tmp_path / "one", **flags | {"resume": result["run"]})
    (Path(result["run"]) / "result.json").unlink()  # as if it had been killed before its end
    assert cpt.main(again)["metrics"] == result["metrics"]
    (Path(result["run"]) / "result.json").unlink()
    own.write_text(own.read_text() + '{"text": "One more."}\n')
    with pytest.raises(UserError, match="changed since it began"):
        cpt.main(again)
