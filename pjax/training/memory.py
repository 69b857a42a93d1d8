"""What a rule keeps of the batches."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Array, Float

from pjax.projections.spectrum import Spectra


class UnitMemory(NamedTuple):
    """What is kept of the batches for one unit.

    **Attributes:**

    - `asked`: `M`, in the shape of the unit.
    - `move`: the last one, in full length.
    - `diagonal`: `C` where it is a diagonal, in the unit's shape; else None.
    """

    asked: Array
    move: Array
    diagonal: Array | None


class Memory(NamedTuple):
    """What is kept of the batches.

    **Attributes:**

    - `units`: for each unit.
    - `inputs`: `C` of matrices and kernels, for each stack.
    - `outputs`: of the forces, for each stack.
    - `force`: for each unit the largest mean force on its readers so far.
    - `first`, `output`: how large its layer's output was in the first batch, and is taken to be.
    - `noise`: `1/N`, where a batch has `N` independent rows; measured.
    - `renewals`, `renewed`: how often second moments were renewed, and in which batch last.
    - `pace`, `paces`: the share of its length that every move is given, and each unit's own.
    """

    units: tuple[UnitMemory, ...]
    inputs: tuple[Spectra, ...]
    outputs: tuple[Spectra, ...]
    force: Float[Array, " units"]
    first: Float[Array, " units"]
    output: Float[Array, " units"]
    noise: Float[Array, " units"]
    renewals: Array
    renewed: Array
    pace: Array
    paces: Float[Array, " units"]


__all__ = ["Memory", "UnitMemory"]
