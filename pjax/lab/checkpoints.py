"""Checkpoints: arrays by Orbax and numbers as JSON, under a manifest of checksums.

A checkpoint is a folder named by its step, `00000120`, with

- `arrays/`: written by Orbax, one entry for each leaf, by its name in the tree;
- `numbers.json`: what JSON can hold;
- `manifest.json`: the size and SHA-256 of every other file. It is written last and in one go, so a
  folder without one is a checkpoint that was never finished.

Reading checks the manifest first. A checkpoint that fails is passed over for the one before.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pjax.lab import devices
from pjax.lab.errors import RunError
from pjax.lab.files import read_json, write_json

_ARRAYS, _NUMBERS, _MANIFEST = "arrays", "numbers.json", "manifest.json"
_FORMAT = 1


class CheckpointError(RunError):
    """A checkpoint that cannot be used; the message names the file and the problem."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` batches: arrays by their names in the tree, and numbers."""

    path: Path
    step: int
    arrays: dict[str, np.ndarray]
    numbers: dict[str, Any]


def save(folder: Path, step: int, arrays: Any, numbers: dict[str, Any], keep: int) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep` finished ones. All processes of a
    run call it: each writes what lies on its devices, and process 0 the rest.

    **Arguments:**

    - `folder`: of the checkpoints.
    - `step`: its number; a checkpoint of this number is replaced, and those of higher ones, which
      another way led to, are removed.
    - `arrays`: a pytree.
    - `numbers`: what JSON can hold.
    - `keep`: at least 1.
    """
    path = folder / f"{step:08d}"
    if devices.first():
        _make_room(folder, step)
        path.mkdir()
    devices.meet("checkpoint begins")
    _save_arrays(path / _ARRAYS, dict(named(arrays)))
    devices.meet("checkpoint written")
    if devices.first():
        _finish(path, step, numbers)
        for _, old in list(_numbered(folder))[keep:]:
            _remove(old)
    devices.meet("checkpoint ends")
    return path


def _make_room(folder: Path, step: int) -> None:
    """Removes checkpoints of this and of higher steps, and what is left of unfinished ones."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, old in _numbered(folder):
        if number >= step:
            _remove(old)
    for leftover in folder.iterdir():
        if (leftover.is_dir() and not _is_number(leftover)) or not (leftover / _MANIFEST).exists():
            _remove(leftover)


def _finish(path: Path, step: int, numbers: dict[str, Any]) -> None:
    """Adds numbers and manifest."""
    write_json(path / _NUMBERS, numbers)
    files = {
        name: {"bytes": file.stat().st_size, "sha256": _digest(file)}
        for name, file in _files(path).items()
    }
    write_json(path / _MANIFEST, {"format": _FORMAT, "step": step, "files": files})


def load(path: Path) -> Checkpoint:
    """The checkpoint in a folder.

    **Raises:** `CheckpointError` if it is not finished, or a file is missing or not as written.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint.")
    manifest = path / _MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{path}: was not finished ({_MANIFEST} is missing).")
    try:
        content = read_json(manifest)
        if content["format"] != _FORMAT:
            raise CheckpointError(f"{manifest}: of another version of pjax.")
        step, files = content["step"], dict(content["files"])
        if type(step) is not int or f"{step:08d}" != path.name:
            raise CheckpointError(f"{manifest}: belongs to another folder.")
        for name in (_NUMBERS, f"{_ARRAYS}/_METADATA"):
            if name not in files:
                raise CheckpointError(f"{manifest}: damaged, it does not list {name}.")
        for name, expected in files.items():
            _verify(path / name, expected["bytes"], expected["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RunError):
            raise CheckpointError(str(error)) from error
        raise CheckpointError(f"{manifest}: damaged, not a manifest.") from error
    unknown = sorted(_files(path).keys() - files.keys() - {_MANIFEST})
    if unknown:
        raise CheckpointError(f"{path / unknown[0]}: does not belong to the checkpoint.")
    try:
        arrays = _load_arrays(path / _ARRAYS)
        numbers = read_json(path / _NUMBERS)
    except Exception as error:  # whatever Orbax meets in files that are not its own
        text = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"{path / _ARRAYS}: cannot be read ({text}).") from error
    return Checkpoint(path, step, arrays, numbers)


def newest(
    folder: Path,
    accept: Callable[[Checkpoint], None] = lambda found: None,
    on_skip: Callable[[str], None] = lambda message: None,
) -> Checkpoint | None:
    """The newest checkpoint that can be used; `None` if there never was one.

    **Arguments:**

    - `folder`: of the checkpoints.
    - `accept`: raises `CheckpointError` for one that does not fit.
    - `on_skip`: called with a line for each that is passed over.

    **Raises:** `RunError` if there are checkpoints and none can be used.
    """
    tried: list[str] = []
    finished = False
    for _, path in _numbered(folder):
        try:
            found = load(path)
            accept(found)
        except CheckpointError as error:
            on_skip(str(error))
            tried.append(str(error))
            finished = finished or (path / _MANIFEST).exists()
            continue
        return found
    if finished:
        raise RunError(
            f"{folder}: none of the {len(tried)} checkpoints can be used; the last one tried: "
            f"{tried[-1]}"
        )
    return None


def named(tree: Any) -> list[tuple[str, Any]]:
    """Each leaf of a pytree with a name that a file can have."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator=".") or "leaf", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def fit(found: Checkpoint, like: Any) -> Any:
    """The arrays in the structure of `like`.

    **Raises:** `CheckpointError` for a missing, unknown or differently shaped array.
    """
    leaves = []
    expected = named(like)
    names = {name for name, _ in expected}
    for name in found.arrays:
        if name not in names:
            raise CheckpointError(f"{found.path}: holds {name}, which this run does not have.")
    for name, leaf in expected:
        if name not in found.arrays:
            raise CheckpointError(f"{found.path}: {name} is missing.")
        array = found.arrays[name]
        if array.shape != np.shape(leaf) or array.dtype != leaf.dtype:
            raise CheckpointError(
                f"{found.path}: {name} is {array.dtype} of shape {array.shape}, "
                f"{leaf.dtype} of shape {np.shape(leaf)} expected."
            )
        leaves.append(array)
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    if jax.process_count() == 1:
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
    with _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), arrays)


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    import orbax.checkpoint as ocp

    with _checkpointer() as checkpointer:
        found = checkpointer.metadata(path.absolute()).item_metadata.tree
        plain = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in found}
        arrays = checkpointer.restore(
            path.absolute(), args=ocp.args.PyTreeRestore(restore_args=plain)
        )
    return {name: np.asarray(array) for name, array in arrays.items()}


def _checkpointer() -> Any:
    # Imported where it is needed: it takes half a second.
    import orbax.checkpoint as ocp

    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _verify(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing.")
    if path.stat().st_size != size:
        raise CheckpointError(f"{path}: damaged, {path.stat().st_size} of {size} bytes.")
    if _digest(path) != digest:
        raise CheckpointError(f"{path}: damaged, its checksum is not the one in {_MANIFEST}.")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> dict[str, Path]:
    return {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def _is_number(path: Path) -> bool:
    return path.is_dir() and len(path.name) >= 8 and path.name.isascii() and path.name.isdigit()


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoints' folders, newest first."""
    if folder.is_dir():
        found = [(int(path.name), path) for path in folder.iterdir() if _is_number(path)]
        yield from sorted(found, reverse=True)


def _remove(path: Path) -> None:
    # First what makes it a checkpoint: a process that is killed here leaves an unfinished one.
    (path / _MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
