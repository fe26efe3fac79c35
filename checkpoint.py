"""Run folders, and saves that are either whole or not there.

A save is written into a hidden sibling folder; each file is fsynced, then a manifest with every file's size and
sha256, then the folder is renamed into place; the save before it stays as a hidden fallback. Loading verifies the
manifest and falls back with a warning; it never goes on with files that do not match.

    outputs/<base>/<dataset>/run_<i>/   best/ last/           the newest saves
                                        .best.1/ .last.1/     the saves before them
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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import Untrusted, UserError

MANIFEST = "manifest.json"


# ---- every change to the disk goes through these, so that tests can stop the world at each of them ------------------


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
    """Write a whole file beside its place, fsync it, then rename: readers see the old one or the new one."""
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
    """outputs/<base>/<dataset>; a base's "/" becomes "__", and nothing climbs out of outputs."""
    safe = re.sub(r"[^\w.+-]", "_", base.strip("/").replace("/", "__")).lstrip(".") or "base"
    return Path(outputs) / safe / (re.sub(r"[^\w.+-]", "_", dataset).lstrip(".") or "data")


def new_run(outputs: str, base: str, dataset: str) -> Path:
    """Make the next run_<i>; two processes never get the same one."""
    parent = run_parent(outputs, base, dataset)
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        past = runs_of(outputs, base, dataset)
        run = parent / f"run_{int(past[-1].name[4:]) + 1 if past else 0}"
        try:
            run.mkdir()
            return run
        except FileExistsError:
            continue


def finished(run: Path) -> bool:
    """Whether the run came to its end: result.json is the last file it writes."""
    return (run / "result.json").is_file()


def newest_finished(outputs: str, marker: str, without: str = "") -> Path | None:
    """The run under outputs that ended last and holds the file `marker` but not `without`, or None."""
    ended = []
    for result in map(Path, glob.glob(f"{glob.escape(outputs)}/*/*/run_*/result.json")):  # bears folders that go
        if (result.parent / marker).is_file() and not (without and (result.parent / without).exists()):
            ended.append((result.stat().st_mtime_ns, result.parent))
    return max(ended)[1] if ended else None


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

    about: facts for the manifest (step, base fingerprint, versions). keep: earlier saves that stay as fallbacks.
    If anything fails, `target` is as it was and the half-written sibling is removed.
    """
    target = Path(target)
    hidden = target.with_name(f".{target.name}.new")
    spare = [target.with_name(f".{target.name}.{i}") for i in range(max(keep, 1) + 1)]  # [0] is not used
    moved = []
    try:
        if hidden.exists():
            fs_remove(hidden)
        hidden.mkdir()
        write(hidden)
        seal(hidden, about)
        if target.exists():
            for i in range(len(spare) - 1, 0, -1):
                older = target if i == 1 else spare[i - 1]
                if older.exists():
                    if spare[i].exists():
                        fs_remove(spare[i])
                    fs_rename(older, spare[i])
                    moved.append((older, spare[i]))
        fs_rename(hidden, target)
    except BaseException:
        for older, newer in reversed(moved):
            os.replace(newer, older)
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    fs_sync(target.parent)
    if keep == 0 and spare[1].exists():
        fs_remove(spare[1])


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
    """sha256 of a manifest's own facts, so that a flipped bit in them is seen too."""
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


def trusted(target: Path) -> Path | None:
    """The newest save of `target` that verifies: itself or, with a warning, one before it. None if none was ever made.

    Raises Untrusted when there are saves but none verifies.
    """
    target = Path(target)
    older = sorted(target.parent.glob(f".{target.name}.[0-9]*"), key=lambda p: int(p.name.rsplit(".", 1)[-1]))
    reasons = []
    for folder in [target, *older]:
        if folder == target and not folder.exists():
            if older:
                reasons.append(f"{folder} is missing: its last save was cut short")
            continue
        try:
            verify(folder)
        except Untrusted as e:
            reasons.append(str(e))
            continue
        for reason in reasons:
            print(f"warning: {reason}; falling back to the save before it", file=sys.stderr, flush=True)
        return folder
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
    """Names and shapes of a safetensors file, from its header alone. Raises Untrusted when the file is not one."""
    try:
        with safe_open(path, framework="pt") as f:
            return {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (as above)
    except (SafetensorError, OSError, ValueError) as e:
        raise Untrusted(f"{path}: {e}; it is damaged or cut short, get it again") from None


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
    """What a run ran on: versions, commit, hardware, threads."""
    found = {"python": platform.python_version(), "platform": platform.platform(), "command": sys.argv}
    for name in ("torch", "transformers", "safetensors", "numpy", "tqdm"):
        found[name] = version(name)
    try:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        found["commit"] = "unknown"
    return {**found, "device": device, "world_size": world, "threads": threads, "cores": os.cpu_count()}


# ---- optimizer state as tensors -------------------------------------------------------------------------------------


def optimizer_tensors(optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `group.index.key` -> tensor, in the order of its parameters."""
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            for key, value in optimizer.state.get(p, {}).items():
                if not key.startswith("qmap"):  # bitsandbytes' constant tables, shared by all
                    found[f"{g}.{i}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return found


def load_optimizer_tensors(optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Give an optimizer over the same parameters its state back. Raises Untrusted when it does not fit.

    bitsandbytes makes its own state first, paged or in 8 bits, and the saved values go into it.
    """
    own = getattr(optimizer, "init_state", None)
    if own:
        optimizer.check_overrides()
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            prefix = f"{g}.{i}."
            state = {k[len(prefix) :]: t for k, t in tensors.items() if k.startswith(prefix)}
            if not state:
                continue
            if own:
                own(group, p, g, i)
            fresh = optimizer.state[p] if own else {"exp_avg": p, "exp_avg_sq": p, "step": None}
            wanted = {k for k in fresh if not k.startswith("qmap")}
            if state.keys() != wanted:
                raise Untrusted(f"optimizer state {prefix}* has {sorted(state)}, expected {sorted(wanted)}")
            for key, value in state.items():
                want = fresh[key]
                if torch.is_tensor(want) and value.shape != want.shape:
                    shapes = f"{tuple(value.shape)}, expected {tuple(want.shape)}"
                    raise Untrusted(f"optimizer state {prefix}{key} is {shapes}")
                if own:
                    optimizer.state[p][key] = want.copy_(value) if torch.is_tensor(want) else int(value)
                else:
                    optimizer.state[p][key] = value.to(p.device)


# ---- resuming -------------------------------------------------------------------------------------------------------


def is_family(run: Path) -> bool:
    """Whether a run folder holds runs over folds and seeds, as folds.py makes them, or train.py made them before."""
    if (run / "family.json").is_file():
        return True
    config = load_json(run / "config.json")
    return bool(config.get("seeds")) or (config.get("fold") == "all" and bool(config.get("folds")))


def find_run(resume: str, outputs: str, base: str, dataset: str, family: bool = False) -> Path | None:
    """The run that `--resume auto|RUN` means, or None when auto finds no unfinished one.

    family: whether a family of runs is meant. Raises UserError when RUN is no such folder, or already finished.
    """
    if resume == "auto":
        for run in reversed(runs_of(outputs, base, dataset)):
            if (run / "config.json").is_file() and not finished(run) and is_family(run) == family:
                return run
        return None
    run = Path(resume)
    if not (run / "config.json").is_file():
        raise UserError(f"--resume {resume}: no run folder (expected config.json in it)")
    if is_family(run) and not family:
        raise UserError(f"--resume {resume}: a family of runs; continue with python folds.py --resume {resume}")
    if family and not is_family(run):
        raise UserError(f"--resume {resume}: one run, not a family; continue with python train.py --resume {resume}")
    if finished(run):
        raise UserError(f"--resume {resume}: this run is finished; start a new one, or predict with infer.py")
    return run


def last_state(run: Path) -> tuple[Path, dict] | None:
    """The folder of the newest trusted save of last/ and its state.json; None when nothing was saved yet.

    Raises Untrusted when there are saves but none can be trusted.
    """
    folder = trusted(run / "last")
    return (folder, load_json(folder / "state.json")) if folder else None


def append_line(path: Path, line: dict) -> None:
    """Append one JSON object to a log."""
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")


def append_whole(path: Path, text: str) -> None:
    """Append whole lines in one write; where the disk takes only a part of them, none stay."""
    with open(path, "ab", buffering=0) as f:
        before, data = f.seek(0, os.SEEK_END), text.encode()
        if f.write(data) != len(data):
            f.truncate(before)
            raise OSError(f"{path}: the disk took only a part of {len(data)} bytes; is it full?")


def cut_log(path: Path, size: int) -> None:
    """Cut a log back to `size` bytes: lines written after the save that a run resumes from are written again."""
    if path.exists() and path.stat().st_size > size:
        with open(path, "r+b") as f:
            f.truncate(size)
            f.flush()
            os.fsync(f.fileno())
