"""The seal of a run's own files: RUN/seal.json holds the sha256 of each, and whoever reads one compares.

    write(run / "labels.json", text)      # the file and its place in the seal
    read(run / "labels.json")             # its bytes; Untrusted, naming it, if they are not those that the run wrote

A process that is killed between the two writes leaves a sound run: the seal first takes the new sha256 beside the old
one, then the file is written, then the old one goes. A run from before there were seals is read as it is.
"""

import hashlib
import json
import secrets
from pathlib import Path

import disk
from errors import Untrusted

SEAL = "seal.json"
RESULT = "result.json"  # the last file of a run
LOG = "metrics.jsonl"  # grows with each step: sealed by each save up to there, and whole at the end of the run
CHANGED = "put back the file that the run wrote (for other settings start a new run with --cfg COPY_OF_CONFIG.json)"


def stored(folder: Path) -> dict:
    """The seal of a folder: "run", its random name, and "files", the sha256s (None: absent) that each file may have.

    Raises Untrusted for one that is damaged. Without one, both are empty.
    """
    data = disk.read(folder / SEAL)
    if data is None:
        return {"run": "", "files": {}}
    try:
        seal = json.loads(data)
        if seal.pop("seal") == seal_of(seal) and all(isinstance(sums, list) for sums in seal["files"].values()):
            return {"run": str(seal["run"]), "files": seal["files"]}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise Untrusted(f"{folder / SEAL}: damaged: it does not have its own sha256")


def seal_of(entries: dict) -> str:
    """sha256 of a seal's or a manifest's own entries, so that a flipped bit in them is noticed too."""
    return _sum(json.dumps(entries, sort_keys=True).encode())


def _sum(data):
    return None if data is None else hashlib.sha256(data).hexdigest()


def write(path: Path, content) -> None:
    """Write one of a run's files, a text or a value as JSON, and seal it; with the result its log too."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    folder, data = path.parent, text.encode()
    seal = stored(folder)
    before = seal["files"].get(path.name) or [_sum(disk.read(path))]
    log = {LOG: [_sum(disk.read(folder / LOG))]} if path.name == RESULT else {}
    _allow(folder, seal, {**log, path.name: [*before, _sum(data)]})
    disk.write_atomic(path, data)
    _allow(folder, seal, {path.name: [_sum(data)]})


def _allow(folder, seal, sums):
    """Put the sha256s that some files may have into the seal of a folder."""
    seal["run"] = seal["run"] or secrets.token_hex(8)
    seal["files"] |= sums
    disk.write_atomic(folder / SEAL, json.dumps(seal | {"seal": seal_of(seal)}, indent=1) + "\n")


def read(path: Path) -> bytes | None:
    """The bytes of a run's file, or of any other; None where there is none. Raises Untrusted where that is not what the
    run's seal says.
    """
    for _ in range(2):  # a run that is being trained may write between the two
        data, files = disk.read(path), stored(path.parent)["files"]
        if _sum(data) in files.get(path.name, _unlisted(path.name, data, files)):
            return data
        if path.name == RESULT and data is None:  # without its result a run is not finished, and repeats its end
            return data
    problem = "is missing" if data is None else f"has sha256 {_sum(data)[:12]}..., not that in {SEAL}"
    raise Untrusted(f"{path} {problem}: {CHANGED}")


def _unlisted(name, data, files):
    """What a file that the seal does not list may be: absent, once the seal is whole; else as it is."""
    whole = "config.json" in files  # the last file of a new run
    return [None] if whole and name not in (SEAL, LOG) else [_sum(data)]


def has(path: Path) -> bool:
    """Whether a run has one of its files. Raises Untrusted where it is damaged, or should be there and is not."""
    return read(path) is not None


def note(run: Path) -> str:
    """A note on a run without a seal, or an empty string."""
    old = (run / "environment.json").is_file() and not (run / SEAL).exists()
    return f"note: {run} has no {SEAL}, as older runs: its files are taken as they are" if old else ""


def verify(folder: Path) -> None:
    """Raise Untrusted for the first of a run's files that is not as the run wrote it, but for its log."""
    for name in stored(folder)["files"]:
        if name != LOG:
            read(folder / name)


class Log:
    """A run's log, and its sha256 as it grows: saves hold that, for the log goes on after them.

    facts: those of the save that a run continues from; lines after it are cut off, to be written again. Raises
    Untrusted where the log begins otherwise. Saves from before there were seals hold no sha256.
    """

    def __init__(self, run: Path, facts: dict):
        self.path, size = run / LOG, facts["log_bytes"]
        data = (disk.read(self.path) or b"")[:size]
        self.bytes, self.sum = len(data), hashlib.sha256(data)
        if facts.get("log_sha256", _sum(data)) != _sum(data):
            raise Untrusted(f"{self.path}: its first {size:,} bytes are not those of the run's last save; put it back")
        disk.cut_log(self.path, size)

    def add(self, data: bytes) -> None:
        """Count what was appended."""
        self.bytes += len(data)
        self.sum.update(data)

    def facts(self) -> dict:
        """For a save, which must not outlive what it names: the log is durable by then."""
        if self.bytes:
            disk.fs_sync(self.path)
        return {"log_bytes": self.bytes, "log_sha256": self.sum.hexdigest()}
