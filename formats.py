"""What a file really is, by its first bytes, whatever its name says: for errors that name the cause."""

from pathlib import Path

START = 4096  # bytes that are looked at

# (the bytes that a file begins with, one of several; what it is, what to do)
LFS = b"version https://git-lfs.github.com/spec/v1\n"
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
POINTER = "a Git LFS pointer, which stands for the file; fetch it with git lfs pull"
SIGNATURES = (
    (GZIP, "gzip, not UTF-8 text; end its name in .gz"),
    (PARQUET, "a Parquet file; name it .parquet"),
    (b"SQLite format 3\0", "a SQLite database; export the table as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel or Word file; save it as CSV (UTF-8)"),
    (b"ARROW1", "an Arrow or Feather file; save it as Parquet or CSV"),
    (b"\xff\xff\xff\xff", "an Arrow stream; save it as Parquet or CSV"),
    (b"\x93NUMPY", "a NumPy array; save it as CSV"),
    (b"\x89HDF", "an HDF5 file; save it as Parquet or CSV"),
    ((b"\x89PNG", b"\xff\xd8\xff"), "a picture"),
    (b"%PDF-", "a PDF document"),
    (b"{\\rtf", "an RTF document; save it as text"),
    (b"\xfd7zXZ", "xz; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "zstd; unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive; unpack it first"),
    (b"Rar!\x1a", "a RAR archive; unpack it first"),
    (b"\xff\xfe\0\0", "UTF-32; save it as UTF-8"),
    ((b"\xff\xfe", b"\xfe\xff"), "UTF-16; save it as UTF-8"),
    ((b"PK\3\4", b"PK\5\6", b"PK\7\10"), "a zip archive; unpack it first"),
    ((b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"), "a pickle, which is never opened; save it as Parquet or CSV"),
)
PAGES = (b"<!doctype", b"<html", b"<?xml")  # in lower case, after blanks


def first_bytes(source: bytes | str | Path) -> bytes:
    """The first bytes of a file, given as bytes or by its path."""
    if isinstance(source, bytes):
        return source[:START]
    with open(source, "rb") as file:
        return file.read(START)


def lfs_pointer(source: bytes | str | Path) -> str:
    """What to say of a file (its bytes, or its path) that is a Git LFS pointer; else nothing."""
    return POINTER if first_bytes(source).lstrip(b"\xef\xbb\xbf").startswith(LFS.rstrip()) else ""


def binary(source: bytes | str | Path) -> str:
    """What a file is that cannot be UTF-8 text of the user's, and what to do; else nothing."""
    start = first_bytes(source)
    if lfs_pointer(start):
        return POINTER
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if start[:3] == b"BZh" and start[4:10] == b"1AY&SY":
        return "bzip2; unpack it first"
    if start.startswith(b"PK\3\4") and (b"xl/" in start or b"[Content_Types].xml" in start):
        return "an Excel workbook; save it as CSV (UTF-8)"
    for signature, what in SIGNATURES:
        if start.startswith(signature):
            return what
    if start.removeprefix(b"\xef\xbb\xbf").lstrip()[:9].lower().startswith(PAGES):
        return "a web page or XML, not the file behind it; download the file itself"
    return ""


def utf16(start: bytes) -> bool:
    """Whether bytes look like UTF-16 without a mark: of most scripts of Europe every other byte is NUL."""
    even, odd = start[:START:2], start[1:START:2]
    return any(half.count(0) > 0.8 * len(half) and not other.count(0) for half, other in ((even, odd), (odd, even)))
