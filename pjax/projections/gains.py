"""Bounds on how much an output moves with an operand: the largest eigenvalue of `JᵀJ`.

By the power iteration, of all operands of a problem side by side: none waits for another, and one
loop holds them all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

#: The power iteration underestimates: after the few steps it is given, by up to this factor.
MARGIN = 1.4

#: Of so many blocks two steps are enough: that the largest bound of all is far too small takes a
#: start that is bad for each of them.
_MANY_BLOCKS = 64

#: XLA compiles each product of a matrix and a vector by itself, and equal products of matrices
#: once. So many equal ones are given two rows, which for few numbers costs little more.
_MANY_PRODUCTS, _FEW_NUMBERS = 16, 2**14

#: More are not put into one loop: `pjax.rolling` finds loops that are equal.
_ONE_LOOP = 256


@dataclass(frozen=True)
class PowerIteration:
    """The largest eigenvalue of `factor JᵀJ` over all blocks, which is to be found.

    **Attributes:**

    - `response`: `(x, *operands) ↦ JᵀJ x`, block diagonal.
    - `operands`: what it reads.
    - `shape`, `dtype`: of `x`.
    - `axes`: the axes within a block; the others number the blocks.
    - `start`: where to begin, of length 1 in each block; None for a fixed direction.
    - `factor`: of the eigenvalue.
    - `kind`: equal for equal responses, so that what also has the same operands is found once.
    - `rows`: of a product of a matrix and a vector the axis on which there may be more vectors.
    """

    response: Callable[..., Array]
    operands: tuple[Array, ...]
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[int, ...]
    start: Array | None = None
    factor: Any = 1.0
    kind: Hashable = None
    rows: int | None = None

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return math.prod(n for axis, n in enumerate(self.shape) if axis not in self.axes)

    @property
    def numbers(self) -> int:
        """How many numbers there are in the operands."""
        return sum(operand.size for operand in self.operands)


def first_direction(
    shape: Sequence[int], axes: Sequence[int], dtype: Any, turn: float = 2.4
) -> Array:
    """A direction to begin with, equal in all blocks: neither constant nor orthogonal to that."""
    block = tuple(n if axis in axes else 1 for axis, n in enumerate(shape))
    count = math.prod(block)
    length = float(np.linalg.norm(1 + 0.5 * np.cos(turn * np.arange(count)))) or 1.0
    steps = jnp.arange(count, dtype=dtype)
    direction = (1 / length + (0.5 / length) * jnp.cos(turn * steps)).reshape(block)
    return jnp.broadcast_to(direction, tuple(shape))


def largest(
    iterations: Sequence[PowerIteration], steps: int
) -> list[tuple[Float[Array, ""], Array]]:
    """Bounds on the eigenvalues, with a margin.

    **Arguments:**

    - `iterations`: what is asked for.
    - `steps`: how many steps of each, at least 1; where there are many blocks at most 2.

    **Returns:** for each the bound, and the last vector, to begin the next one with.
    """
    names: dict[Any, int] = {}
    places: list[int] = []
    different: list[PowerIteration] = []
    for number, iteration in enumerate(iterations):
        operands = tuple(id(operand) for operand in iteration.operands)
        name = number if iteration.kind is None else (iteration.kind, operands)
        if name not in names:
            names[name] = len(different)
            different.append(iteration)
        places.append(names[name])
    different = _with_more_rows(_with_starts(different))
    found: list[Any] = [None] * len(different)
    for count, members in _by_steps(different, steps).items():
        for first in range(0, len(members), _ONE_LOOP):
            chosen = members[first : first + _ONE_LOOP]
            results = _side_by_side([different[i] for i in chosen], count)
            for i, result in zip(chosen, results, strict=True):
                found[i] = result
    bounds = []
    for iteration, place in zip(iterations, places, strict=True):
        value, last = found[place]
        if last.shape != iteration.shape:
            last = lax.slice_in_dim(last, 0, 1, axis=iteration.rows or 0)
        bounds.append((MARGIN * iteration.factor * value, last))
    return bounds


def _with_starts(iterations: Sequence[PowerIteration]) -> list[PowerIteration]:
    """The fixed directions where no other is given, each computed once."""
    made: dict[Any, Array] = {}
    found = []
    for one in iterations:
        if one.start is None:
            key = one.shape, one.axes, jnp.dtype(one.dtype)
            if key not in made:
                made[key] = first_direction(one.shape, one.axes, one.dtype)
            one = replace(one, start=made[key])
        found.append(one)
    return found


def _with_more_rows(iterations: Sequence[PowerIteration]) -> list[PowerIteration]:
    """Those of many equal small products with a second row."""
    small = [one.rows is not None and one.numbers <= _FEW_NUMBERS for one in iterations]
    kinds = Counter(one.kind for one, is_small in zip(iterations, small, strict=True) if is_small)
    return [
        _with_second_row(one) if is_small and kinds[one.kind] >= _MANY_PRODUCTS else one
        for one, is_small in zip(iterations, small, strict=True)
    ]


def _by_steps(iterations: Sequence[PowerIteration], steps: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, iteration in enumerate(iterations):
        count = min(steps, 2) if iteration.blocks >= _MANY_BLOCKS else steps
        found.setdefault(count, []).append(place)
    return found


class _State(NamedTuple):
    """Of a power iteration: the eigenvalue so far, the vector and its length in each block."""

    value: Array
    vector: Array
    length: Array


def _side_by_side(iterations: Sequence[PowerIteration], steps: int) -> list[tuple[Array, Array]]:
    """The largest eigenvalues and the last vectors, by so many steps of each."""

    def step(_: Any, states: list[_State]) -> list[_State]:
        return [_step(one, state) for one, state in zip(iterations, states, strict=True)]

    states = [_first(one) for one in iterations]
    if steps > 2:  # a loop compiles in a fraction of the time
        states = lax.fori_loop(0, steps, step, states)
    else:
        for count in range(steps):
            states = step(count, states)
    found = []
    for one, state in zip(iterations, states, strict=True):
        assert one.start is not None
        last = jnp.where(state.length > 0, state.vector / state.length, one.start)
        found.append((state.value, last))
    return found


def _first(iteration: PowerIteration) -> _State:
    dtype, start = iteration.dtype, iteration.start
    assert start is not None
    lengths = tuple(1 if axis in iteration.axes else n for axis, n in enumerate(start.shape))
    return _State(jnp.zeros((), dtype), start, jnp.ones(lengths, dtype))


def _step(iteration: PowerIteration, state: _State) -> _State:
    _, x, before = state
    # Products may have a wider type. The largest entry is 1: squares are then in range. Of all
    # blocks at once: one that falls far behind does not have the largest eigenvalue.
    image = iteration.response(x, *iteration.operands).astype(x.dtype)
    tiny = jnp.finfo(x.dtype).tiny
    size = jnp.maximum(jnp.max(jnp.abs(image)), tiny)
    image = image / size
    length = jnp.sqrt(jnp.sum(jnp.square(image), axis=iteration.axes, keepdims=True))
    growth = jnp.max(length / jnp.maximum(before, tiny))
    return _State(size * growth, image, length)


def _with_second_row(iteration: PowerIteration) -> PowerIteration:
    """From two directions at once, the first of which is the one that is gone on with."""
    start, rows = iteration.start, iteration.rows
    assert start is not None
    assert rows is not None
    second = first_direction(iteration.shape, iteration.axes, iteration.dtype, 1.1)
    axes = tuple(axis for axis in iteration.axes if axis != rows)
    return replace(iteration, start=jnp.concatenate([start, second], rows), axes=axes)


__all__ = ["MARGIN", "PowerIteration", "first_direction", "largest"]
