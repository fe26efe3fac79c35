"""One process at a time trains a run: RUN/.lock names its owner, and is held until that process is gone.

flock tells at once whether an owner on this host is alive. It may not reach other hosts (NFS), so an owner also gives a
sign of life every BEAT seconds, and its lock is taken over after PATIENCE seconds without one.
"""

import errno
import json
import os
import stat
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import disk
from errors import Untrusted, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

BEAT, PATIENCE = 5.0, 20.0  # seconds
NAME = ".lock"
HELD: dict[Path, "Lock"] = {}  # of this process


class Lock:
    """A lock that this process holds, and the thread that gives its signs of life."""

    def __init__(self, path: Path, fd: int):
        self.path, self.fd, self.pid = path, fd, os.getpid()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.record = {"pid": self.pid, "host": disk.HOST, "started": started(self.pid), "since": since}
        os.ftruncate(fd, 0)
        self.beat()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.live, daemon=True)
        self.thread.start()

    def beat(self) -> None:
        """Write the record, always of one length, so that a reader never sees half of it."""
        os.lseek(self.fd, 0, os.SEEK_SET)
        os.write(self.fd, json.dumps(self.record | {"beat": time.time()}).ljust(300).encode())

    def held(self) -> bool:
        """Whether the lock file still names this process: another host takes a run over while its owner is suspended.
        Half a record says nothing.
        """
        record = _record(self.path)
        return record | self.record == record if record else self.path.exists()

    def live(self) -> None:
        while not self.ended.wait(BEAT):
            with suppress(OSError):
                if self.held():
                    self.beat()

    def release(self) -> None:
        """Remove the lock; a forked child closes its copy and leaves the lock to its parent."""
        self.ended.set()
        if self.pid == os.getpid():
            self.thread.join()  # before the descriptor's number means another file
            with suppress(OSError):
                if self.held():
                    self.path.unlink()
        os.close(self.fd)


@contextmanager
def released():
    """Release what a command came to hold when it ends, however it ends."""
    before = set(HELD)
    try:
        yield
    finally:
        for path in HELD.keys() - before:
            HELD.pop(path).release()


def hold(run: Path) -> None:
    """Make this process the owner of a run's folder, and remove what killed writers left there.

    Raises UserError where another process is the owner.
    """
    path = run.resolve() / NAME
    while path not in HELD:
        fd = _opened(path)
        try:
            locked, owner = _flock(fd), _record(path)
            if locked is False or (owner and not _gone(run, owner, bool(locked))):
                raise UserError(_refusal(run, owner))
            # Whoever held the lock may have removed the file meanwhile: then a new one counts.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    with disk.told(path, 300):
                        HELD[path] = Lock(path, fd)
        finally:
            if path not in HELD:
                os.close(fd)
    for left in (*run.glob(".*.tmp"), *run.glob(".*.new")):
        disk.fs_remove(left)


def need() -> None:
    """Raise UserError where another process took over what this one holds."""
    for path, lock in HELD.items():
        if not lock.held():
            problem = f"another process took it over, as this one gave no sign of life for {PATIENCE:g} s"
            raise UserError(f"run {path.parent}: {problem}: it ends here, and the other continues")


def refuse_if_held(run: Path) -> None:
    """Raise UserError where a living process of this host trains a run: found before any data is read."""
    owner = _record(run / NAME)
    here = owner.get("host") == disk.HOST and owner.get("pid") != os.getpid()
    if here and owner.get("started") == started(owner["pid"]) != "":
        raise UserError(_refusal(run, owner))


def _opened(path):
    """A descriptor of the lock file, made where there is none."""
    with disk.told(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Untrusted(f"{path}: expected a regular file: remove it")
    return fd


def _flock(fd):
    """Whether this process got the lock; None where the file system or Windows has no flock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except (AttributeError, OSError) as e:
        number = getattr(e, "errno", errno.ENOTSUP)
        if number in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        print(f"note: no flock here ({os.strerror(number)}): signs of life alone guard the run", flush=True)
        return None


def _record(path):
    """What a lock file says about its owner, as a dict; empty for nobody, or for half a record."""
    with suppress(Untrusted, ValueError, RecursionError):
        record = json.loads(disk.read(path) or b"{}")
        if isinstance(record, dict) and isinstance(record.get("pid"), int):
            return record
    return {}


def _gone(run, owner, locked):
    """Whether the owner that a lock file names does not live any more."""
    if owner.get("host") == disk.HOST and (locked or started(os.getpid())):
        return locked or owner.get("started") != started(owner["pid"])
    print(f"{_words(run, owner)}: waiting {PATIENCE:g} s for a sign of life", flush=True)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE / 10))
        if _record(run / NAME).get("beat") != owner.get("beat"):
            return False
    return True


def _words(run, owner):
    who = f"process {owner['pid']} on {owner.get('host')} since {owner.get('since')}" if owner else "another process"
    return f"{run} is being trained by {who}"


def _refusal(run, owner):
    return f"{_words(run, owner)}: wait until it ends, or stop it first"


def started(pid: int) -> str:
    """When a process of this host started, in the system's own unit, for its number may be used again.

    Empty where there is no such process, and where the system does not say (no /proc).
    """
    with suppress(OSError, IndexError):
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if words[0] in "ZX" else words[19]  # it ended, and its parent has not asked yet
    return ""
