"""Elementwise functions with few values, as thresholds of what they are functions of.

Sums, scales, minima and maxima with constants and the functions that end in levels rise or fall
throughout, in exact numbers and in rounded ones. So the least number that reaches a level is found
by bisection, with the function as JAX computes it: no rounding is done in another way afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pjax.export.predictor import Sums, Value

#: The size of the largest number that thresholds are looked for below.
_LARGEST = np.float32(2.0**64)


@dataclass(frozen=True)
class Thresholds:
    """A number is at the level above as many limits as it is not below.

    **Attributes:**

    - `limits`: `[levels − 1, 1, …]`, in ascending order.
    - `table`: the levels.
    - `flip`: where the function falls: the sign of the number is to be changed; None if nowhere.
    """

    limits: np.ndarray
    table: list[float]
    flip: np.ndarray | None


def find(
    level: Callable[[np.ndarray], np.ndarray],
    value: Value,
    shape: tuple[int, ...],
    levels: np.ndarray,
) -> Thresholds:
    """The thresholds of a function that rises or falls throughout.

    **Arguments:**

    - `level`: from numbers in float32 to the places of the function's values in `levels`.
    - `value`: what the function is of: any number, or whole numbers of units within bounds.
    - `shape`: of the function: in each entry it may be another one.
    """
    candidates = _Whole(value) if isinstance(value, Sums) else _Floats()

    def at(number: np.ndarray) -> np.ndarray:
        return level(np.where(flip, -1, 1).astype(np.float32) * candidates.numbers(number))

    flip = np.zeros(shape, bool)
    first, last = (at(np.full(shape, n, np.int64)) for n in (0, candidates.count - 1))
    flip = first > last
    found = []
    for place in range(1, len(levels)):
        below, above = np.full(shape, -1, np.int64), np.full(shape, candidates.count, np.int64)
        while np.any(above - below > 1):
            middle = np.clip((below + above) // 2, 0, candidates.count - 1)
            reached = at(middle) >= place
            open_ = above - below > 1
            above = np.where(open_ & reached, middle, above)
            below = np.where(open_ & ~reached, middle, below)
        found.append(above)
    found, table = _reached(np.stack(found), levels.astype(np.float32), candidates.count)
    limits = _compressed(candidates.limits(found), 1)
    return Thresholds(limits, table.tolist(), _compressed(flip, 0) if flip.any() else None)


def _reached(found: np.ndarray, table: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Without levels that no number is at, if fewer bits tell the others apart."""
    ends = np.zeros_like(found[:1]), np.full_like(found[:1], count)
    limits = np.concatenate([ends[0], found, ends[1]])
    kept = np.flatnonzero((limits[:-1] < limits[1:]).reshape(len(table), -1).any(-1))
    fewer = len(kept) > 1 and (len(kept) - 1).bit_length() < (len(table) - 1).bit_length()
    if not fewer or len(set(np.round(np.diff(table[kept]), 5))) > 1:
        return found, table
    return found[kept[1:] - 1], table[kept]


def _compressed(array: np.ndarray, first: int) -> np.ndarray:
    """With one entry along axes, from the given one on, where all are equal."""
    for axis in range(first, array.ndim):
        one = array.take([0], axis)
        if np.array_equal(np.broadcast_to(one, array.shape), array):
            array = one
    return array


class _Whole:
    """The whole numbers that sums can be, in ascending order."""

    def __init__(self, sums: Sums):
        self._unit, self._step = sums.unit, 1 if sums.parity is None else 2
        odd = sums.parity is not None and (sums.bound - sums.parity) % 2
        self._bound = sums.bound - int(odd)
        self.count = 2 * self._bound // self._step + 1

    def _counts(self, places: np.ndarray) -> np.ndarray:
        return self._step * places - self._bound

    def numbers(self, places: np.ndarray) -> np.ndarray:
        return (self._unit * self._counts(places)).astype(np.float32)

    def limits(self, places: np.ndarray) -> np.ndarray:
        counts = self._counts(places)
        for dtype in (np.int8, np.int16, np.int32):
            if np.abs(counts).max() <= np.iinfo(dtype).max:
                return counts.astype(dtype)
        return counts


class _Floats:
    """All numbers in float32 up to the largest size, in ascending order."""

    def __init__(self) -> None:
        self._most = int(_LARGEST.view(np.int32))
        self.count = 2 * self._most + 1

    def numbers(self, places: np.ndarray) -> np.ndarray:
        signed = places - self._most
        sizes = np.abs(signed).astype(np.int32).view(np.float32)
        return np.where(signed < 0, -sizes, sizes).astype(np.float32)

    def limits(self, places: Any) -> np.ndarray:
        beyond = places >= self.count
        numbers = self.numbers(np.minimum(places, self.count - 1))
        found = np.where(beyond, np.float32(np.inf), numbers)
        return np.where(places == 0, np.float32(-np.inf), found).astype(np.float32)
