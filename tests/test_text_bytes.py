"""Bytes of documents: what is declared is read so, what is guessed is said, a wrong byte harms itself alone."""

import pytest

import corpus
import latex
import text_bytes
from errors import UserError

RUSSIAN = "Небесная механика изучает движение небесных тел под действием сил"
CHINESE = "这是一个关于有限群的定理，我们在这里证明它的主要结果。"
TAIWAN = "這是一個關於有限群的定理，我們在這裡證明它的主要結果。"
JAPANESE = "この論文では、有限群の表現についての定理を証明する。"
KOREAN = "이 논문에서는 유한군의 표현에 대한 정리를 증명한다. 그리고 이는 다음과 같다."
FRENCH = "Éléments de géométrie algébrique, déjà naïve façade"
POLISH = "Zażółć gęślą jaźń, twierdzenie o równości źródeł"
CZECH = "Příklad věty o číslech řádu"

DECLARED = [  # the line of the source, Python's encoding, a text
    (r"\usepackage[GBK]{ctex}", "gbk", CHINESE),
    (r"\documentclass[GBK,a4paper]{ctexart}", "gbk", CHINESE),
    (r"\begin{CJK}{GBK}{song}", "gbk", CHINESE),
    (r"\begin{CJK*}{Bg5}{bsmi}", "big5", TAIWAN),
    (r"\begin{CJK}{SJIS}{min}", "cp932", JAPANESE),
    (r"\begin{CJK}{JIS}{min}", "euc_jp", JAPANESE),
    (r"\begin{CJK}{KS}{mj}", "euc_kr", KOREAN),
    ("% !TEX encoding = IsoLatin2", "iso8859-2", POLISH),
    ("%!TEX encoding = Windows Cyrillic", "cp1251", RUSSIAN),
    ("% -*- coding: koi8-r -*-", "koi8-r", RUSSIAN),
    ("%%% Local Variables:\n%%% coding: cp1251\n%%% End:", "cp1251", RUSSIAN),
    ("% vim: set fileencoding=cp1250 :", "cp1250", POLISH),
    ("%& -translate-file=cp1250cs", "cp1250", CZECH),
    ("%&latex --translate-file=il2-t1.tcx", "iso8859-2", CZECH),
    (r"\usepackage[latin1,latin9]{inputenc}", "iso8859-15", "œuvre à 5 €"),
    ("%\\usepackage[koi8-r]{inputenc}\n\\usepackage[cp1251]{inputenc}", "cp1251", RUSSIAN),
    (r"\inputencoding{cp866}", "cp866", RUSSIAN),
    (r"\usepackage[applemac]{inputenc}", "mac_roman", FRENCH),
    ("% !TEX encoding = UTF-8 Unicode", "utf-8", RUSSIAN),
]


@pytest.mark.parametrize("line, codec, text", DECLARED)
def test_a_declared_encoding_is_read_without_a_word(line, codec, text):
    source = f"{line}\n\n{text} end\n"
    raw = source.encode(codec)
    decoded, encoding = text_bytes.decode(raw)
    assert decoded == source and text_bytes.note(raw, encoding) == ""
    files = {"main.tex": raw, "part.tex": f"A part. {text}".encode(codec)}
    _, (_, part) = latex.corpus(files)
    assert part.encoding in ("utf-8", encoding) and not part.notes, "the project's encoding is that of its other files"


TOLD = [
    ("gbk", CHINESE), ("big5", TAIWAN), ("euc_jp", JAPANESE), ("cp932", JAPANESE), ("euc_kr", KOREAN),
    ("cp1251", RUSSIAN), ("koi8-r", RUSSIAN), ("cp866", RUSSIAN), ("cp1252", FRENCH), ("latin-1", FRENCH),
    ("mac_roman", FRENCH), ("cp1250", POLISH), ("iso8859-2", POLISH), ("cp1250", CZECH), ("iso8859-2", CZECH),
    ("cp1250", "Źródło łączy się z żółtą ćmą, którą wziął niedźwiedź."), ("utf-16-le", FRENCH), ("utf-16-be", FRENCH),
]  # fmt: skip


@pytest.mark.parametrize("codec, text", TOLD)
def test_an_encoding_that_its_letters_tell_is_read_and_said(codec, text):
    source = f"A theorem.\n\n{text} end\n"
    raw = source.encode(codec)
    decoded, encoding = text_bytes.decode(raw)
    assert decoded == source and encoding in text_bytes.note(raw, encoding)
    assert codec.startswith("utf") or "the first in line 3" in text_bytes.note(raw, encoding)


@pytest.mark.parametrize(
    "codec, text", [("mac_cyrillic", RUSSIAN), ("cp850", FRENCH), ("cp1255", "שלום עולם של מתמטיקה")]
)
def test_what_cannot_be_told_is_no_text_and_counted(codec, text):
    raw = f"A theorem.\n\n{text} end\n".encode(codec)
    assert text_bytes.decode(raw) is None
    _, (report,) = latex.corpus({"main.tex": raw})
    count = sum(byte > 127 for byte in raw)
    assert report.fate.startswith(
        f"dropped: {count} bytes are no UTF-8, the first in line 3, and no encoding is declared"
    )


WRONG = {
    "one byte of Latin-1": ("Gödel's naïve façade, M".encode() + b"\xfchl", "Gödel's naïve façade, Mühl", 1),
    "cut within a letter": ("Gödel and Poincaré".encode() + b"\xc3", "Gödel and Poincaré\ufffd", 1),
    "cut within a long letter": ("日本語の文章".encode() + b"\xe6\x97", "日本語の文章\ufffd", 2),
    "declared": (b"\\usepackage[utf8]{inputenc} G\xc3\xb6del, M\xfchl", "\\usepackage[utf8]{inputenc} Gödel, Mühl", 1),
    "quotes of Windows": ("Gödel, naïve, café: ".encode() + b"\x93so\x94", "Gödel, naïve, café: “so”", 2),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("suffix", [".tex", ".md", ".txt"])
def test_a_wrong_byte_harms_itself_alone_and_is_reported(tmp_path, name, suffix):
    raw, text, count = WRONG[name]
    (tmp_path / f"main{suffix}").write_bytes(b"These are words of a text that is long enough.\n\n" + raw)
    rows, _, (record,) = corpus.read_documents(corpus.find_files(str(tmp_path), "train_data"), "train_data")
    wanted = text.split("} ")[-1]
    if suffix == ".tex":
        wanted = wanted.replace("\ufffd", "")  # no character of a text
    assert rows[0]["text"].endswith(wanted)
    words = f"{count} byte{' is' if count == 1 else 's are'} no UTF-8, the first in line 3"
    assert words in record["notes"][0]


def test_zero_bytes_and_pointers_are_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 3\n"
    _, reports = latex.corpus({"a.tex": b"a\nb\0c", "b.tex": pointer})
    assert [report.fate[:28] for report in reports] == ["dropped: binary", "dropped: a Git LFS pointer, "]
    for name in ("a.jsonl", "a.jsonl.gz", "a.md", "a.json"):
        (tmp_path / name).write_bytes(pointer)
        with pytest.raises(UserError, match="this is a Git LFS pointer"):
            corpus.read_documents(corpus.find_files(str(tmp_path / name), "train_data"), "train_data")


def test_a_plain_text_is_not_guessed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"-*- coding: cp1251 -*-\n" + RUSSIAN.encode("cp1251"))
    (tmp_path / "b.txt").write_bytes(RUSSIAN.encode("cp1251"))
    rows, _, records = corpus.read_documents(corpus.find_files(str(tmp_path), "train_data"), "train_data")
    assert [row["text"].splitlines()[-1] for row in rows] == [RUSSIAN]
    assert [record["fate"][:18] for record in records] == ["read", "dropped: not UTF-8"]
