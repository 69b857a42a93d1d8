"""Several devices and several processes: which, how arrays lie on them, and what all agree on.

Everything is JAX's own: a mesh, shardings, `jax.distributed`. Rows of a batch lie along the axis
`data` of the mesh, columns of weights along the axis `model`.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjax.lab.errors import UsageError, shown

DATA, MODEL = AXES = ("data", "model")
#: After so many seconds without a sign of life a process counts as gone.
_HEARTBEAT = 30
_LONGEST_NAME = 4096


def parse_mesh(text: str) -> dict[str, int]:
    """The axes of `data=4,model=2` with their sizes.

    **Raises:** `ValueError` with what is wrong with it.
    """
    found: dict[str, int] = {}
    for part in text.split(",") if text else ():
        name, _, size = part.partition("=")
        if name not in AXES or not size.isascii() or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"takes sizes for the axes {' and '.join(AXES)}, such as data=4,model=2; got "
                f"{shown(text)}."
            )
        if name in found:
            raise ValueError(f"names {name} twice: {shown(text)}.")
        found[name] = int(size)
    return found


def start(coordinator: str | None, processes: int | None, number: int | None) -> None:
    """Joins the other processes of a run, if there are any.

    **Arguments:**

    - `coordinator`: `HOST:PORT` of process 0; `auto` where JAX finds all of it by itself, as on
      clusters of Slurm, Open MPI, Kubernetes and on Cloud TPUs.
    - `processes`, `number`: how many there are, and which this is.

    **Raises:** `UsageError` for options that do not fit each other or reach nobody.
    """
    if coordinator is None:
        if processes is not None or number is not None:
            raise UsageError("--num-processes and --process-id need --coordinator HOST:PORT.")
        return
    auto = coordinator == "auto"
    if auto and not (processes is None and number is None):
        raise UsageError("--coordinator auto finds --num-processes and --process-id by itself.")
    if not auto:
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isascii() and port.isdigit()):
            raise UsageError(f"--coordinator must be HOST:PORT or auto, got {shown(coordinator)}.")
        if processes is None or number is None:
            raise UsageError("--coordinator HOST:PORT needs --num-processes and --process-id.")
        if not 0 <= number < processes:
            raise UsageError(f"--process-id must be from 0 to {processes - 1}, got {number}.")
    try:
        jax.distributed.initialize(
            None if auto else coordinator,
            processes,
            number,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"--coordinator {coordinator}: the processes did not find each other "
            f"({str(error).splitlines()[0][:200]})."
        ) from error


def first() -> bool:
    """Whether this is process 0, which writes and shows what only one should."""
    return jax.process_index() == 0


def meet(place: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def any_of(flag: bool) -> bool:
    """Whether it is so in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def path_of_first(path: Path | None) -> Path:
    """The path that process 0 has."""
    if jax.process_count() == 1:
        assert path is not None
        return path
    name = b"" if path is None else os.fsencode(path.absolute())
    padded = np.frombuffer(name.ljust(_LONGEST_NAME, b"\0"), np.uint8)
    found = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    return Path(os.fsdecode(found.astype(np.uint8).tobytes().rstrip(b"\0")))


@contextlib.contextmanager
def together(folder: Path) -> Iterator[None]:
    """Within it, an exchange with a process that has ended becomes a message and ends this one."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if jax.process_count() == 1 or not _is_exchange(error):
            raise
        text = (str(error).splitlines() or [type(error).__name__])[0][:200]
        print(
            f"pjax: another process of this run has ended, so process {jax.process_index()} ends "
            f"too ({text}). Start all of them again with: pjax train --resume {folder} and their "
            "--coordinator, --num-processes and --process-id.",
            file=sys.stderr,
            flush=True,
        )
        # Not `sys.exit`: what JAX does at the end waits for the process that is gone.
        os._exit(1)


def _is_exchange(error: Exception) -> bool:
    """Whether an error is of what processes exchange, not of this one alone."""
    text = str(error).lower()
    words = ("gloo", "connection", "nccl", "coordination", "heartbeat", "barrier", "peer", "socket")
    return any(word in text for word in words)


class Placement:
    """How the arrays of a training lie on the devices of a mesh; on one device without a mesh.

    Parameters of more than one axis have their last one along `model`, if that divides it; what a
    method carries lies as the parameter of its shape does, and else everywhere.

    **Arguments:**

    - `mesh`: see `parse_mesh`.
    - `batch_size`: rows of a batch, of all processes together.

    **Raises:** `UsageError` for a mesh of more or fewer devices than there are.
    """

    def __init__(self, mesh: str = "", batch_size: int | None = None) -> None:
        axes = parse_mesh(mesh)
        self.axes = axes
        self.mesh = None
        if not axes:
            if jax.process_count() > 1:
                raise UsageError(f"--mesh is missing, with {jax.process_count()} processes.")
            return
        size, there = math.prod(axes.values()), jax.device_count()
        if size > there or (jax.process_count() > 1 and size != there):
            kind = jax.devices()[0].platform
            hint = " For several on a CPU set JAX_NUM_CPU_DEVICES." if kind == "cpu" else ""
            raise UsageError(
                f"--mesh {mesh} needs {size} devices, there are {there} ({kind}) in "
                f"{jax.process_count()} process{'es' * (jax.process_count() > 1)}.{hint}"
            )
        rows = axes.get(DATA, 1)
        if batch_size is not None and batch_size % rows:
            raise UsageError(
                f"--batch-size must be a multiple of the {rows} devices along {DATA}, got "
                f"{batch_size}."
            )
        devices = np.array(jax.devices()[:size]).reshape(*axes.values())
        self.mesh = Mesh(devices, tuple(axes))

    @property
    def text(self) -> str:
        """The mesh as it is written on the command line."""
        return ",".join(f"{name}={size}" for name, size in self.axes.items())

    def everywhere(self) -> Any:
        return self._sharding()

    def batch(self, ndim: int) -> Any:
        """The sharding of `[seeds, rows, …]`."""
        return self._sharding(*(None, DATA, *(None,) * (ndim - 2)))

    def params(self, params: Any) -> Any:
        """The sharding of each of the parameters, `[seeds, …]`."""
        return jax.tree.map(lambda leaf: self._weight(np.shape(leaf)), params)

    def like_params(self, tree: Any, params: Any) -> Any:
        """The sharding of each leaf: that of the parameter of its shape, else everywhere."""
        shapes = {np.shape(leaf) for leaf in jax.tree.leaves(params)}
        return jax.tree.map(
            lambda leaf: (
                self._weight(np.shape(leaf)) if np.shape(leaf) in shapes else self.everywhere()
            ),
            tree,
        )

    def put(self, tree: Any, shardings: Any) -> Any:
        """Arrays that every process has, on the devices: each takes what is its own."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, tree)
        return jax.tree.map(_placed, tree, shardings)

    def rows(self, rows: np.ndarray, chosen: np.ndarray) -> Any:
        """The chosen rows, `[seeds, rows]`, of which each process reads its own."""
        if self.mesh is None:
            return jax.numpy.asarray(rows[chosen])
        shape = (*chosen.shape, *rows.shape[1:])

        def own(index: Any) -> np.ndarray:
            return rows[chosen[index[:2]]][(..., *index[2:])]

        return jax.make_array_from_callback(shape, self.batch(len(shape)), own)

    def _weight(self, shape: tuple[int, ...]) -> Any:
        size = self.axes.get(MODEL, 1)
        if len(shape) > 2 and shape[-1] % size == 0:
            return self._sharding(*(None,) * (len(shape) - 1), MODEL)
        return self.everywhere()

    def _sharding(self, *axes: str | None) -> Any:
        if self.mesh is None:
            return None
        return NamedSharding(
            self.mesh, PartitionSpec(*(axis if axis in self.axes else None for axis in axes))
        )


def _placed(leaf: Any, sharding: Any) -> Any:
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


__all__ = [
    "AXES",
    "Placement",
    "any_of",
    "first",
    "meet",
    "parse_mesh",
    "path_of_first",
    "start",
    "together",
]
