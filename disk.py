"""Every change to the disk: a file is whole or absent, and a disk that takes no more is named in one line.

All changes go through the four fs_ functions, so that tests can interrupt each of them.
"""

import errno
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import DiskError, Untrusted

HOST = re.sub(r"[^\w.]", "_", socket.gethostname())[:40]
KINDS = {"d": "folder", "p": "pipe", "s": "socket", "c": "device", "b": "device"}  # letters of stat.filemode


# ---- the four kinds of changes --------------------------------------------------------------------------------------


def fs_write(path: Path, data: bytes | Iterable[bytes]) -> None:
    with open(path, "wb") as f:
        f.writelines([data] if isinstance(data, bytes) else data)
        f.flush()
        os.fsync(f.fileno())


def fs_sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    if path.is_dir() and os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fs_rename(old: Path, new: Path) -> None:
    os.replace(old, new)


def fs_remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---- disks that take no more ----------------------------------------------------------------------------------------


@contextmanager
def told(path: Path, needed: int = 0):
    """Turn a failure of the disk, whoever meets it, into one DiskError with the file and the bytes needed and free."""
    try:
        yield
    except DiskError:
        raise
    except Exception as e:
        # safetensors and tokenizers write from Rust: their exceptions have the number in their text alone.
        in_text = re.search(r"\(os error (\d+)\)", str(e))
        if not (in_text or isinstance(e, OSError)):
            raise
        number = int(in_text[1]) if in_text else e.errno
        reason = os.strerror(number) if number else str(e)
        raise disk_error(path, reason, needed) from None


def disk_error(path: Path, reason: str, needed: int) -> DiskError:
    room = free_bytes(path)
    free = "an unknown number of" if room is None else f"{room:,}"
    return DiskError(f"{path}: {reason}; {needed:,} bytes needed, {free} bytes free; earlier files are unchanged")


def free_bytes(path: Path) -> int | None:
    """Bytes free where a path is or will be; None where the system does not say."""
    with suppress(OSError):
        place = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
        usage = shutil.disk_usage(place)
        return usage.free if usage.total else None


def need_room(path: Path, needed: int) -> None:
    """Raise DiskError where a save of so many bytes cannot fit."""
    room = free_bytes(path)
    if room is not None and room < needed:
        raise disk_error(path, os.strerror(errno.ENOSPC), needed)


# ---- writing --------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str | Iterable[str]) -> None:
    """Write a file, whole or in pieces, beside its place, fsync it, then rename: readers see the old file or the new
    one, whoever else writes it too.
    """
    path = Path(path)
    data = data.encode() if isinstance(data, str) else data if isinstance(data, bytes) else map(str.encode, data)
    temporary = temporary_of(path)
    with told(path, len(data) if isinstance(data, bytes) else 0):
        try:
            fs_write(temporary, data)
            fs_rename(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        fs_sync(path.parent)


def temporary_of(path: Path) -> Path:
    """A name beside a path that no other process uses. Removes what processes of this host that are gone left there."""
    stem = f".{path.name[:80]}.{HOST}-"
    for left in glob.glob(f"{glob.escape(str(path.parent / stem))}*.tmp"):
        pid = left.rpartition(f"{HOST}-")[2].partition("-")[0]
        if pid.isdecimal() and not alive(int(pid)):
            with suppress(OSError):
                fs_remove(Path(left))
    return path.with_name(f"{stem}{os.getpid()}-{secrets.token_hex(3)}.tmp")


def alive(pid: int) -> bool:
    """Whether a process of this host exists."""
    if os.name == "nt":  # where signal 0 is no mere question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # of another user
    return True


def append_whole(path: Path, data: bytes | str) -> None:
    """Append whole lines or records in one write; if the disk takes only a part of them, none of them."""
    data = data.encode() if isinstance(data, str) else data
    with told(path, len(data)), open(path, "ab", buffering=0) as f:
        before = f.seek(0, os.SEEK_END)
        if f.write(data) != len(data):
            f.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def cut_log(path: Path, size: int) -> None:
    """Truncate a log to `size` bytes: lines after the save that a run resumes from will be written again."""
    if path.exists() and path.stat().st_size > size:
        with told(path):
            os.truncate(path, size)
            fs_sync(path)


# ---- reading --------------------------------------------------------------------------------------------------------


def read(path: Path) -> bytes | None:
    """The bytes of a regular file; None where there is nothing. Raises Untrusted for anything else: a pipe would be
    waited for.
    """
    try:
        need_regular(path)
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise Untrusted(f"{path}: cannot be read ({e.strerror})") from None


def need_regular(path: Path) -> None:
    """Raise Untrusted for what is no regular file, OSError where there is nothing."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise Untrusted(f"{path}: expected a regular file, got a {KINDS.get(stat.filemode(mode)[0], 'special file')}")


def sha256(path: Path) -> str:
    need_regular(path)
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
