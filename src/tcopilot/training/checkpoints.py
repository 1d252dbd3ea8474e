"""Checkpoints of tensors and plain values, complete or absent, verified before use. Nothing in them can be executed.

A checkpoint is a folder `round=<n>`. `main` is what all processes share, `rank<r>` what belongs to process r alone;
each is a `.safetensors` file of the tensors and a `.json` file of the structure around them. `manifest.json` holds
size and SHA-256 of each. The folder gets its name when all is on disk: a crash leaves nothing or a whole checkpoint.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tcopilot import processes
from tcopilot.run_directory import RunDirectory
from tcopilot.training.serialization import CheckpointError, pack, unpack

log = logging.getLogger(__name__)
FORMAT, VERSION = "tcopilot checkpoint", 2
PER_RANK = "per_rank"  # key of the state that belongs to one process; `save` puts it into that process's files
MANIFEST = "manifest.json"
KINDS = ("json", "safetensors")


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints of a folder, oldest round first, whether they are intact or not.

    >>> checkpoints("no such folder")
    []
    """
    return sorted((path for path in Path(folder).glob("round=*") if _round(path) is not None), key=round_of)


def round_of(path: str | Path) -> int:
    """Round after which a checkpoint was saved.

    >>> round_of("checkpoints/round=40")
    40
    """
    return int(Path(path).name.split("=")[1])


def _round(path: Path) -> int | None:
    return round_of(path) if re.fullmatch(r"round=\d+", path.name) else None


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; all processes of the job must call this, and all raise if one of them fails.

    Args:
        checkpoint: the first process's goes into `main`; everyone's own `checkpoint[PER_RANK]`, if there is one, into
            that process's files.
        path: the folder it becomes. One of that name is replaced when the new one is complete.

    Raises:
        CheckpointError: if it cannot be written. What was written of it is removed; the ones before stay.
    """
    world_size = processes.world_size()
    rank = processes.rank() if world_size > 1 else 0
    draft = path.with_name(f".{path.name}.tmp")

    def begin() -> None:
        if rank == 0:
            remove_leftovers(path.parent)
            draft.mkdir(parents=True, exist_ok=True)

    def write() -> dict[str, Any]:
        own = _write(draft, f"rank{rank}", {PER_RANK: checkpoint.get(PER_RANK, {})})
        shared = {key: value for key, value in checkpoint.items() if key != PER_RANK}
        return own | (_write(draft, "main", shared) if rank == 0 else {})

    def finish() -> None:
        if rank == 0:
            files = {name: entry for part in written for name, entry in part.items()}
            about = {"format": FORMAT, "version": VERSION, "round": _round(path), "world_size": world_size}
            (draft / MANIFEST).write_text(_sealed({**about, "files": files}), encoding="utf-8")
            _flush(draft / MANIFEST)
            _flush(draft)
            discard(path)
            draft.rename(path)
            _flush(path.parent)

    try:
        _together(begin)
        written = _together(write)
        _together(finish)
    except (CheckpointError, OSError, SafetensorError) as error:
        if rank == 0:
            shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(_not_saved(path, error)) from error


def discard(path: Path) -> None:
    """Remove a checkpoint, if there is one, so that a crash in between does not leave half of it."""
    if path.exists():
        names = (path.with_name(f".{path.name}.old{number}.tmp") for number in itertools.count())
        trash = next(name for name in names if not name.exists())
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what crashed saves have left in a folder, as far as the file system allows."""
    for path in folder.glob(".round=*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def _together(action: Callable[[], Any]) -> list[Any]:
    """Return what the action gives on every process. If one fails, all raise, since none may go on alone."""
    problem, result = None, None
    try:
        result = action()
    except Exception as error:
        problem = error
    everyones = processes.gather([(problem is None, result)])
    if problem is not None:
        raise problem
    if not all(succeeded for succeeded, _ in everyones):
        raise OSError("another process of this job could not write its part, and says why itself")
    return [result for _, result in everyones]


def _write(folder: Path, part: str, value: Any) -> dict[str, Any]:
    """Write both files of a part; returns their entries in the manifest."""
    structure, tensors = pack(value)
    save_file(tensors, folder / f"{part}.safetensors")
    (folder / f"{part}.json").write_text(json.dumps(structure), encoding="utf-8")
    files = {}
    for path in (folder / f"{part}.{kind}" for kind in KINDS):
        _flush(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    return files


def _flush(path: Path) -> None:
    """Force a file or a folder's entries to the disk; not all file systems can flush a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(number)
    finally:
        os.close(number)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(body: dict[str, Any]) -> str:
    """The manifest's text, with a checksum of itself."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def _parts(world_size: int) -> list[str]:
    return ["main", *(f"rank{rank}" for rank in range(world_size))]


def _not_saved(path: Path, error: Exception) -> str:
    good = next((str(old) for old in reversed(checkpoints(path.parent)) if verify(old) is None), None)
    last, go_on = "No checkpoint was saved before it", "start the run anew"
    if good is not None:
        last, go_on = f"Last good checkpoint: {good}", f"go on with: {RunDirectory(path.parent.parent).go_on}"
    return (
        f"{path} could not be saved: {error}. {last}. Free some space there, or make the folder writable, and {go_on}"
    )


def verify(path: str | Path, world_size: int | None = None) -> str | None:
    """Say what is wrong with a checkpoint, or None if it is whole, unchanged and fits.

    Args:
        path: its folder.
        world_size: number of processes of this job; None accepts any.
    """
    path = Path(path)
    try:
        manifest = _manifest(path, world_size)
        _check_files(path, manifest, _parts(manifest["world_size"]))
    except CheckpointError as problem:
        return str(problem)
    return None


def newest_good(folder: str | Path, world_size: int) -> Path | None:
    """Find the newest checkpoint that is intact; None if the folder has none at all.

    Raises:
        CheckpointError: if none is intact, or if the newest intact one is of another number of processes.
    """
    say = log.warning if processes.is_first() else log.debug
    for old in sorted(Path(folder).glob("*.ckpt")):
        say("%s is not used: it is a pickle file, which can execute code when it is loaded", old)
    problems = []
    for path in reversed(checkpoints(folder)):
        if (problem := verify(path)) is None:
            for found in problems:
                say("%s. The one before it is used: %s", found, path)
            _manifest(path, world_size)
            return path
        problems.append(problem)
    if problems:
        raise CheckpointError(f"{folder}: no checkpoint is intact, start the run anew. " + ". ".join(problems))
    return None


class SafeCheckpointIO(CheckpointIO):
    """Gives Lightning this module's checkpoints. Several processes save together, through `RoundCheckpoint` only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint of a single process; with several, Lightning would call this in the first one only."""
        if processes.world_size() > 1:
            raise CheckpointError(f"{path}: with several processes, states are saved by callbacks.checkpoint only")
        save(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Check and read what all processes share and what belongs to this one, onto the CPU."""
        path, world_size = Path(path), processes.world_size()
        own = f"rank{processes.rank() if world_size > 1 else 0}"
        _check_files(path, _manifest(path, world_size), ["main", own])
        checkpoint, states = _read(path, "main", owned=True), _read(path, own, owned=False)[PER_RANK]
        return checkpoint | {"callbacks": checkpoint.get("callbacks", {}) | states.get("callbacks", {})}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint."""
        discard(Path(path))


def _manifest(path: Path, world_size: int | None = None) -> dict[str, Any]:
    """Return a checkpoint's manifest if it is intact and, if given, for this number of processes; else raise."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder, and so no checkpoint")
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it is no checkpoint, or parts of it are lost") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path / MANIFEST} does not describe a checkpoint")
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has format version {manifest.get('version')}; this program reads {VERSION}")
    if text != _sealed({key: value for key, value in manifest.items() if key != "sha256"}):
        raise CheckpointError(f"{path / MANIFEST} has been changed: its checksum does not match")
    saved = _files_described(path, manifest)
    if world_size not in (None, saved):
        raise CheckpointError(
            f"{path} was saved by {saved} process{'es' * (saved != 1)}, each with its own Mistake Log and random "
            f"state; this run has {world_size}. Resume with {saved} (trainer.devices × trainer.num_nodes), or start a "
            f"new run from an export"
        )
    return manifest


def _files_described(path: Path, manifest: dict[str, Any]) -> int:
    """Refuse a manifest that names anything but the files of a checkpoint; returns the number of processes."""
    files, saved, rounds = (manifest.get(key) for key in ("files", "world_size", "round"))
    known = isinstance(files, dict) and type(saved) is int and saved >= 1
    if not known or len(files) != (1 + saved) * len(KINDS):
        raise CheckpointError(f"{path / MANIFEST} does not list the files of a checkpoint")
    expected = {f"{part}.{kind}" for part in _parts(saved) for kind in KINDS}
    for name, entry in files.items():
        if name not in expected:
            raise CheckpointError(f"{path / MANIFEST} names {name!r}, which is no file of a checkpoint")
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{path / MANIFEST} does not describe {name}")
    if _round(path) not in (None, rounds):
        raise CheckpointError(f"{path} was saved after round {rounds}: it has been renamed")
    return saved


def _check_files(path: Path, manifest: dict[str, Any], parts: list[str]) -> None:
    for file in (path / f"{part}.{kind}" for part in parts for kind in KINDS):
        saved = manifest["files"][file.name]
        try:
            size = file.stat().st_size if file.is_file() else None
            same = size == saved["bytes"] and _sha256(file) == saved["sha256"]
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error})") from None
        if size is None:
            raise CheckpointError(f"{file} is missing")
        if size != saved["bytes"]:
            raise CheckpointError(f"{file} has {size} bytes instead of {saved['bytes']}")
        if not same:
            raise CheckpointError(f"{file} has been changed: its SHA-256 is not the one it was saved with")


def _read(path: Path, part: str, owned: bool) -> Any:
    """Read a part. Tensors stay in the file unless `owned`, since a log may be larger than the memory."""
    try:
        structure = json.loads((path / f"{part}.json").read_text(encoding="utf-8"))
        tensors = load_file(path / f"{part}.safetensors")
        return unpack(structure, {name: tensor.clone() for name, tensor in tensors.items()} if owned else tensors)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path / part}.*: the content is not that of a checkpoint ({error})") from None
