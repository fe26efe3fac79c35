"""Run folders, and saves that are either complete or absent.

A save is written into a hidden sibling folder: each file is fsynced, then a manifest with the size and sha256 of every
file, then the folder is renamed into place. The previous save is kept as a hidden fallback. Loading verifies the
manifest and falls back with a warning; it never continues with files that do not match.

    outputs/<base>/<dataset>/run_<i>/   best/ last/           the newest saves
                                        .best.1/ .last.1/     the previous ones
"""

import glob
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import disk
import locks
import seals
from disk import append_whole, fs_remove, fs_rename, fs_sync, fs_write, sha256, write_atomic  # noqa: F401 (for others)
from errors import DiskError, Untrusted, UserError, one_line, warning
from seals import seal_of

MANIFEST = "manifest.json"


# ---- run folders ----------------------------------------------------------------------------------------------------


def runs_of(outputs: str, base: str, dataset: str) -> list[Path]:
    """The run folders of a base and dataset, oldest first."""
    paths = run_parent(outputs, base, dataset).glob("run_*")
    return sorted((path for path in paths if path.name[4:].isdecimal() and path.is_dir()), key=_number_of)


def _number_of(run):
    return int(run.name[4:])


def run_parent(outputs: str, base: str, dataset: str) -> Path:
    """outputs/<base>/<dataset>; a base's "/" becomes "__", and no name can leave the outputs folder."""
    names = ((base.strip("/").replace("/", "__"), "base"), (dataset, "data"))
    return Path(outputs, *(re.sub(r"[^\w.+-]", "_", name).lstrip(".") or otherwise for name, otherwise in names))


def new_run(outputs: str, base: str, dataset: str) -> Path:
    """Make the next run_<i>; two processes never get the same one."""
    parent = run_parent(outputs, base, dataset)
    with disk.told(parent):
        parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(max(map(_number_of, runs_of(outputs, base, dataset)), default=-1) + 1):
        run = parent / f"run_{number}"
        with suppress(FileExistsError):  # of another process
            run.mkdir()
            return run


def finished(run: Path) -> bool:
    """Whether a run is complete: result.json is the last file it writes."""
    return seals.has(run / seals.RESULT)


def newest_finished(outputs: str, marker: str, without: str = "") -> Path | None:
    """The run under outputs that finished last and holds the file `marker` but not `without`, or None."""
    # glob, unlike Path.glob, tolerates folders that disappear meanwhile.
    results = filter(os.path.exists, glob.glob(f"{glob.escape(outputs)}/*/*/run_*/{seals.RESULT}"))
    for path in sorted(results, key=lambda path: (os.stat(path).st_mtime_ns, path), reverse=True):
        run = Path(path).parent
        if finished(run) and seals.has(run / marker) and not (without and seals.has(run / without)):
            return run  # whatever befell those before it
    return None


# ---- saves ----------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file; `seal` makes it durable."""
    with disk.told(path, sum(tensor.nbytes for tensor in tensors.values())):
        save_file(tensors, path, metadata={"format": "pt"})
        os.chmod(path, 0o644)  # safetensors makes it private to the user


def save_json(path: Path, value) -> None:
    """Write a JSON file and make it durable."""
    data = (json.dumps(value, indent=1) + "\n").encode()
    with disk.told(path, len(data)):
        fs_write(path, data)


def save(target: Path, write, about: dict, keep: int = 1, needed: int = 0) -> None:
    """Put a new save at `target`: `write(folder)` fills a hidden sibling, a manifest seals it, a rename publishes it.

    about: entries of the manifest (step, base fingerprint, versions). keep: earlier saves that are kept as fallbacks.
    needed: bytes that it is known to take, if there is no earlier one to tell. If anything fails, `target` is as it was
    and the half-written sibling is removed. Raises DiskError where the disk has no room.
    """
    needed = max(needed, size_of(target))
    disk.need_room(target, needed)
    with disk.told(target, needed):
        hidden = disk.temporary_of(target)
        # Newest first: each save moves one place down, the last one is removed.
        places = [target, *(target.with_name(f".{target.name}.{i}") for i in range(1, max(keep, 1) + 1))]
        moved = []
        try:
            hidden.mkdir()
            write(hidden)
            seal(hidden, about)
            if target.exists():
                for newer, older in reversed(list(itertools.pairwise(places))):
                    if newer.exists():
                        fs_remove(older)
                        fs_rename(newer, older)
                        moved.append((newer, older))
            fs_rename(hidden, target)
        except BaseException:
            with suppress(OSError):  # a disk that fails here too leaves a fallback, which is found
                for newer, older in reversed(moved):
                    os.replace(older, newer)
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        fs_sync(target.parent)
        if keep == 0:
            fs_remove(places[1])


def save_once(target: Path, write, about: dict) -> None:
    """As `save`, of a folder whose content follows from its name: where another process was first, its folder stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    disk.temporary_of(target)  # removes what processes that were killed left
    mine = target.with_name(f"{target.name}.{disk.HOST}-{os.getpid()}")
    save(mine, write, about, keep=0)
    try:
        with disk.told(target):
            fs_rename(mine, target)
    except DiskError:
        fs_remove(mine)
        if not target.exists():  # the disk failed; otherwise the other run was first
            raise
        verify(target)


def size_of(folder: Path) -> int:
    """Bytes of the files of a save; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def seal(folder: Path, about: dict) -> None:
    """Write the manifest of a folder, the last file of a save, and make all of it durable."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        fs_sync(path)
        files[path.relative_to(folder).as_posix()] = _size_and_hash(path)
    manifest = about | {"files": files}
    save_json(folder / MANIFEST, manifest | {"seal": seal_of(manifest)})
    fs_sync(folder)


def _size_and_hash(path):
    """What a manifest holds about a file."""
    return {"sha256": sha256(path), "size": path.stat().st_size}


def verify(folder: Path) -> dict:
    """The manifest of a save whose files all match it. Raises Untrusted with the first thing that does not."""
    if not folder.exists():
        raise Untrusted(f"{folder} is missing: its last save was interrupted")
    try:
        manifest = json.loads(disk.read(folder / MANIFEST) or b"")
        if manifest.pop("seal") != seal_of(manifest):
            raise Untrusted(f"{folder}: {MANIFEST} does not have its own sha256")
        for name, expected in manifest["files"].items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise Untrusted(f"{folder}: {MANIFEST} names {name}, outside the save")
            actual = _size_and_hash(folder / name)
            if actual != expected:
                raise Untrusted(f"{folder}: {name} is {actual}, expected {expected} as in {MANIFEST}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as e:
        raise Untrusted(f"{folder}: incomplete or damaged ({type(e).__name__}: {e})") from None
    return manifest


class Save(NamedTuple):
    """A save that was verified."""

    folder: Path
    manifest: dict


def trusted(target: Path) -> Save | None:
    """The newest save of `target` that verifies: itself or, with a warning, an earlier one. None if there is none.

    Raises Untrusted when there are saves but none verifies.
    """
    older = target.parent.glob(f".{glob.escape(target.name)}.*")
    older = sorted((path for path in older if path.suffix[1:].isdecimal()), key=lambda path: int(path.suffix[1:]))
    if not (older or target.exists()):
        return None
    reasons = []
    for folder in [target, *older]:
        try:
            save = Save(folder, verify(folder))
            for reason in reasons:
                advice = "falling back to the save before it: check this disk"
                print(warning(reason, advice), file=sys.stderr, flush=True)
            return save
        except Untrusted as e:
            reasons.append(str(e))
    raise Untrusted("no save can be trusted: " + "; ".join(reasons))


def load_tensors(path: Path, read=safe_open.get_tensor) -> dict:
    """Tensors of a safetensors file on the CPU, by name. Raises Untrusted when the file is not one."""
    try:
        disk.need_regular(path)
        with safe_open(path, framework="pt") as f:
            return {name: read(f, name) for name in f.keys()}  # noqa: SIM118 (safe_open is no dict)
    except (SafetensorError, OSError, ValueError) as e:
        raise Untrusted(
            f"{path}: {one_line(e)}; if it was downloaded, it is damaged or incomplete: download it again"
        ) from None


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file, read from its header. Raises Untrusted when the file is not one."""
    return load_tensors(path, lambda f, name: tuple(f.get_slice(name).get_shape()))


def load_json(path: Path) -> dict:
    """A JSON object; one of a run's files must be as the run wrote it. Raises Untrusted when the file is not that."""
    data = seals.read(Path(path))
    if data is None:
        raise Untrusted(f"{path}: no such file")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise Untrusted(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise Untrusted(f"{path}: expected an object, got {type(value).__name__}")
    return value


def environment(world: int, device: torch.device) -> dict:
    """Versions, commit, hardware and threads of a run."""
    git = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {
        "python": platform.python_version(), "platform": platform.platform(), "command": sys.argv,
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "numpy", "tqdm")}, "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "world_size": world,
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
    }  # fmt: skip


# ---- optimizer state as tensors -------------------------------------------------------------------------------------


def optimizer_tensors(optimizer) -> dict[str, torch.Tensor]:
    """The optimizer's state as `group.index.key` -> tensor, in the order of its parameters."""
    tensors = {}
    for g, i, p in _numbered(optimizer):
        for key, value in optimizer.state.get(p, {}).items():
            if not key.startswith("qmap"):  # bitsandbytes' constant tables, shared by all parameters
                tensors[f"{g}.{i}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def _numbered(optimizer):
    """(group, index, parameter) of every parameter of an optimizer."""
    for g, group in enumerate(optimizer.param_groups):
        for i, p in enumerate(group["params"]):
            yield g, i, p


def load_optimizer_tensors(optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Restore the state of an optimizer over the same parameters. Raises Untrusted when it does not fit.

    bitsandbytes makes its own state first, paged or in 8 bits, and the saved values are copied into it.
    """
    if init_state := getattr(optimizer, "init_state", None):
        optimizer.check_overrides()
    for g, i, p in _numbered(optimizer):
        prefix = f"{g}.{i}."
        saved = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if not saved:
            continue
        own = {"exp_avg": p, "exp_avg_sq": p, "step": 0}
        if init_state:
            init_state(optimizer.param_groups[g], p, g, i)
            own = optimizer.state[p]
        expected = {key: tuple(torch.as_tensor(own[key]).shape) for key in own if not key.startswith("qmap")}
        actual = {key: tuple(value.shape) for key, value in saved.items()}
        if actual != expected:
            raise Untrusted(f"optimizer state {prefix}* has shapes {actual}, expected {expected}")
        for key, value in saved.items():
            if not init_state:
                optimizer.state[p][key] = value.to(p.device)
            else:
                own[key] = own[key].copy_(value) if torch.is_tensor(own[key]) else int(value)


# ---- resuming -------------------------------------------------------------------------------------------------------


def is_family(run: Path) -> bool:
    """Whether a folder holds the runs of folds.py, also of the time before: one for each fold and seed."""
    if seals.has(run / "family.json"):
        return True
    config = load_json(run / "config.json")
    return bool(config.get("seeds") or (config.get("folds") and config.get("fold") == "all"))


def find_run(resume: str, outputs: str, base: str, dataset: str, family: bool = False) -> Path | None:
    """The run that `--resume auto|RUN` means, or None when auto finds no unfinished one.

    family: of folds.py. Raises UserError when RUN is no such run, already finished, or being trained by another
    process; Untrusted when one of its files is not as the run wrote it.
    """
    if resume == "auto":
        runs = reversed(runs_of(outputs, base, dataset))
        begun = (run for run in runs if not finished(run) and seals.has(run / "config.json"))
        run = next((run for run in begun if is_family(run) == family), None)
    else:
        run = Path(resume)
        if not seals.has(run / "config.json"):
            raise UserError(f"--resume {resume}: not a run folder (expected config.json in it)")
        if is_family(run) != family:
            script = "train.py" if family else "folds.py"
            raise UserError(
                f"--resume {resume}: this run belongs to another command: python {script} --resume {resume}"
            )
        if finished(run):
            raise UserError(f"--resume {resume}: this run is finished; start a new one, or predict with infer.py")
    if run:
        locks.refuse_if_held(run)
        seals.verify(run)
    return run


def trusted_of(run: Path, name: str) -> Save | None:
    """The newest trusted save of a run: its last or its best. Raises Untrusted also for a save of another run."""
    save = trusted(run / name)
    owner, here = save and save.manifest.get("run"), seals.stored(run)["run"]
    if owner and here and owner != here:
        raise Untrusted(f"{save.folder} is a save of another run: put back that of this one")
    return save


def last_state(run: Path) -> tuple[Save, dict] | None:
    """The newest trusted save of last/ and its state.json; None when nothing was saved yet.

    Raises Untrusted when there are saves but none can be trusted.
    """
    save = trusted_of(run, "last")
    return (save, load_json(save.folder / "state.json")) if save else None
