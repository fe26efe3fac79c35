"""Run folders, and saves that are either complete or absent.

A save is written into a hidden sibling folder: each file is fsynced, then a manifest with the size and sha256 of every
file, then the folder is renamed into place. The previous save is kept as a hidden fallback. Loading verifies the
manifest and falls back with a warning; it never continues with files that do not match.

    outputs/<base>/<dataset>/run_<i>/   best/ last/           the newest saves
                                        .best.1/ .last.1/     the previous ones
"""

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import Untrusted, UserError

MANIFEST = "manifest.json"


# ---- every change to the disk goes through these functions, so that tests can interrupt each of them ----------------


def fs_write(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
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


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file beside its place, fsync it, then rename: readers see the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        fs_write(temporary, data.encode() if isinstance(data, str) else data)
        fs_rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fs_sync(path.parent)


# ---- run folders ----------------------------------------------------------------------------------------------------


def runs_of(outputs: str, base: str, dataset: str) -> list[Path]:
    """The run folders of a base and dataset, oldest first."""
    parent = run_parent(outputs, base, dataset)
    found = [p for p in parent.glob("run_*") if re.fullmatch(r"run_\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[4:]))


def run_parent(outputs: str, base: str, dataset: str) -> Path:
    """outputs/<base>/<dataset>; a base's "/" becomes "__", and no name can leave the outputs folder."""
    return Path(outputs) / _safe(base.strip("/").replace("/", "__"), "base") / _safe(dataset, "data")


def _safe(name: str, otherwise: str) -> str:
    """A name as that of one folder."""
    return re.sub(r"[^\w.+-]", "_", name).lstrip(".") or otherwise


def new_run(outputs: str, base: str, dataset: str) -> Path:
    """Make the next run_<i>; two processes never get the same one."""
    parent = run_parent(outputs, base, dataset)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(run.name[4:]) for run in runs_of(outputs, base, dataset)]
        run = parent / f"run_{max(numbers, default=-1) + 1}"
        try:
            run.mkdir()
            return run
        except FileExistsError:
            continue


def finished(run: Path) -> bool:
    """Whether a run is complete: result.json is the last file it writes."""
    return (run / "result.json").is_file()


def newest_finished(outputs: str, marker: str, without: str = "") -> Path | None:
    """The run under outputs that finished last and holds the file `marker` but not `without`, or None."""
    runs = []
    # glob, unlike Path.glob, tolerates folders that disappear meanwhile.
    for result in map(Path, glob.glob(f"{glob.escape(outputs)}/*/*/run_*/result.json")):
        excluded = without and (result.parent / without).exists()
        if (result.parent / marker).is_file() and not excluded:
            runs.append((result.stat().st_mtime_ns, result.parent))
    return max(runs)[1] if runs else None


# ---- saves ----------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and make it durable."""
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    os.chmod(path, 0o644)  # safetensors makes it private to the user
    fs_sync(path)


def save_json(path: Path, value) -> None:
    """Write a JSON file and make it durable."""
    fs_write(path, (json.dumps(value, indent=1) + "\n").encode())


def save(target: Path, write, about: dict, keep: int = 1) -> None:
    """Put a new save at `target`: `write(folder)` fills a hidden sibling, a manifest seals it, a rename publishes it.

    about: entries of the manifest (step, base fingerprint, versions). keep: earlier saves that are kept as fallbacks.
    If anything fails, `target` is as it was and the half-written sibling is removed.
    """
    target = Path(target)
    hidden = target.with_name(f".{target.name}.new")
    # Newest first: each save moves one place down, the last one is removed.
    places = [target, *(target.with_name(f".{target.name}.{i}") for i in range(1, max(keep, 1) + 1))]
    moved = []
    try:
        if hidden.exists():
            fs_remove(hidden)
        hidden.mkdir()
        write(hidden)
        seal(hidden, about)
        if target.exists():
            for newer, older in reversed(list(zip(places, places[1:], strict=False))):
                if newer.exists():
                    if older.exists():
                        fs_remove(older)
                    fs_rename(newer, older)
                    moved.append((newer, older))
        fs_rename(hidden, target)
    except BaseException:
        for newer, older in reversed(moved):
            os.replace(older, newer)
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    fs_sync(target.parent)
    if keep == 0 and places[1].exists():
        fs_remove(places[1])


def seal(folder: Path, about: dict) -> None:
    """Write the manifest of a folder, the last file of a save, and make all of it durable."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        fs_sync(path)
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    manifest = {**about, "files": files}
    save_json(folder / MANIFEST, {**manifest, "seal": seal_of(manifest)})
    fs_sync(folder)


def seal_of(manifest: dict) -> str:
    """sha256 of a manifest's own entries, so that a flipped bit in them is noticed too."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(folder: Path) -> dict:
    """The manifest of a save whose files all match it. Raises Untrusted with the first thing that does not."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        files = manifest["files"]
        for name, fact in files.items():
            path = folder / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise Untrusted(f"{folder}: the manifest names {name}, outside the save")
            if not path.is_file():
                raise Untrusted(f"{folder}: {name} is missing")
            if path.stat().st_size != fact["size"]:
                raise Untrusted(f"{folder}: {name} has {path.stat().st_size} bytes, expected {fact['size']}")
            if sha256(path) != fact["sha256"]:
                raise Untrusted(f"{folder}: {name} does not have the sha256 of its manifest")
        if manifest.pop("seal") != seal_of(manifest):
            raise Untrusted(f"{folder}: {MANIFEST} does not have its own sha256")
    except FileNotFoundError:
        raise Untrusted(f"{folder}: no {MANIFEST}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as e:
        raise Untrusted(f"{folder}: unreadable {MANIFEST} ({type(e).__name__}: {e})") from None
    return manifest


class Save(NamedTuple):
    """A save that was verified."""

    folder: Path
    manifest: dict


def trusted(target: Path) -> Save | None:
    """The newest save of `target` that verifies: itself or, with a warning, an earlier one. None if there is none.

    Raises Untrusted when there are saves but none verifies.
    """
    target = Path(target)
    older = sorted(target.parent.glob(f".{target.name}.[0-9]*"), key=lambda path: int(path.name.rsplit(".", 1)[-1]))
    reasons = []
    if older and not target.exists():
        reasons.append(f"{target} is missing: its last save was interrupted")
    for folder in [target, *older]:
        if not folder.exists():
            continue
        try:
            manifest = verify(folder)
        except Untrusted as e:
            reasons.append(str(e))
            continue
        for reason in reasons:
            print(f"warning: {reason}; falling back to the previous save", file=sys.stderr, flush=True)
        return Save(folder, manifest)
    if reasons:
        raise Untrusted("no save can be trusted: " + "; ".join(reasons))
    return None


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file on the CPU. Raises Untrusted when the file is not one."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError, ValueError) as e:
        raise Untrusted(f"{path}: {e}") from None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, read from its header. Raises Untrusted when the file is not one."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (as above)
    except (SafetensorError, OSError, ValueError) as e:
        raise Untrusted(f"{path}: {e}; it is damaged or incomplete, download it again") from None


def load_json(path: Path) -> dict:
    """A JSON object. Raises Untrusted when the file does not hold one."""
    try:
        value = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise Untrusted(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise Untrusted(f"{path}: expected an object, got {type(value).__name__}")
    return value


def environment(threads: int, world: int, device: str) -> dict:
    """Versions, commit, hardware and threads of a run."""
    versions = {"python": platform.python_version(), "platform": platform.platform(), "command": sys.argv}
    for name in ("torch", "transformers", "safetensors", "numpy", "tqdm"):
        versions[name] = version(name)
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        versions["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        versions["commit"] = "unknown"
    return {**versions, "device": device, "world_size": world, "threads": threads, "cores": os.cpu_count()}


# ---- optimizer state as tensors -------------------------------------------------------------------------------------


def optimizer_tensors(optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `group.index.key` -> tensor, in the order of its parameters."""
    tensors = {}
    for prefix, p in _numbered(optimizer):
        for key, value in optimizer.state.get(p, {}).items():
            if not key.startswith("qmap"):  # bitsandbytes' constant tables, shared by all parameters
                tensors[prefix + key] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _numbered(optimizer):
    """(group.index., parameter) of every parameter of an optimizer."""
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            yield f"{g}.{i}.", p


def load_optimizer_tensors(optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the state of an optimizer over the same parameters. Raises Untrusted when it does not fit.

    bitsandbytes makes its own state first, paged or in 8 bits, and the saved values are copied into it.
    """
    init_state = getattr(optimizer, "init_state", None)
    if init_state:
        optimizer.check_overrides()
    for prefix, p in _numbered(optimizer):
        saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not saved:
            continue
        fresh = {"exp_avg": p, "exp_avg_sq": p, "step": None}
        if init_state:
            g, i = map(int, prefix.split(".")[:2])
            init_state(optimizer.param_groups[g], p, g, i)
            fresh = optimizer.state[p]
        expected = {key for key in fresh if not key.startswith("qmap")}
        if saved.keys() != expected:
            raise Untrusted(f"optimizer state {prefix}* has {sorted(saved)}, expected {sorted(expected)}")
        for key, value in saved.items():
            own = fresh[key]
            if torch.is_tensor(own) and value.shape != own.shape:
                raise Untrusted(f"optimizer state {prefix}{key} is {tuple(value.shape)}, expected {tuple(own.shape)}")
            if not init_state:
                optimizer.state[p][key] = value.to(p.device)
            elif torch.is_tensor(own):
                optimizer.state[p][key] = own.copy_(value)
            else:
                optimizer.state[p][key] = int(value)


# ---- resuming -------------------------------------------------------------------------------------------------------


def is_family(run: Path) -> bool:
    """Whether a folder holds the runs of folds.py, also of the time before: one for each fold and seed."""
    if (run / "family.json").exists():
        return True
    try:
        config = json.loads((run / "config.json").read_bytes())
        return bool(config.get("seeds") or (config.get("folds") and config.get("fold") == "all"))
    except (OSError, ValueError, AttributeError):
        return False


def find_run(resume: str, outputs: str, base: str, dataset: str, family: bool = False) -> Path | None:
    """The run that `--resume auto|RUN` means, or None when auto finds no unfinished one.

    family: of folds.py. Raises UserError when RUN is no such run, or already finished.
    """
    if resume == "auto":
        begun = [run for run in runs_of(outputs, base, dataset) if (run / "config.json").is_file()]
        unfinished = [run for run in begun if not finished(run) and is_family(run) == family]
        return unfinished[-1] if unfinished else None
    run = Path(resume)
    if not (run / "config.json").is_file():
        raise UserError(f"--resume {resume}: not a run folder (expected config.json in it)")
    if is_family(run) != family:
        script = "folds.py" if is_family(run) else "train.py"
        raise UserError(f"--resume {resume}: this run belongs to another command: python {script} --resume {resume}")
    if finished(run):
        raise UserError(f"--resume {resume}: this run is finished; start a new one, or predict with infer.py")
    return run


def last_state(run: Path) -> tuple[Save, dict] | None:
    """The newest trusted save of last/ and its state.json; None when nothing was saved yet.

    Raises Untrusted when there are saves but none can be trusted.
    """
    save = trusted(run / "last")
    return (save, load_json(save.folder / "state.json")) if save else None


def append_line(path: Path, line: dict) -> None:
    """Append one JSON object to a log."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


def append_whole(path: Path, text: str) -> None:
    """Append whole lines in one write; if the disk takes only a part of them, none of them."""
    with open(path, "ab", buffering=0) as f:
        before, data = f.seek(0, os.SEEK_END), text.encode()
        if f.write(data) != len(data):
            f.truncate(before)
            raise OSError(f"{path}: the disk took only a part of {len(data)} bytes (is it full?)")


def cut_log(path: Path, size: int) -> None:
    """Truncate a log to `size` bytes: lines after the save that a run resumes from will be written again."""
    if path.exists() and path.stat().st_size > size:
        with open(path, "r+b") as f:
            f.truncate(size)
            f.flush()
            os.fsync(f.fileno())
