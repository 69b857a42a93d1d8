"""Bounds on how much an output moves with an operand: the largest eigenvalue of `JᵀJ`.

By the power iteration, of all operands of a problem side by side: none waits for another, and one
loop holds them all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
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
    - `start`: where to begin, of length 1 in each block.
    - `axes`: the axes within a block; the others number the blocks.
    - `factor`: of the eigenvalue.
    - `kind`: equal for equal responses, so that what also has the same operands is found once.
    - `is_product`: whether the response is a product of a matrix and a vector, and another.
    """

    response: Callable[..., Array]
    operands: tuple[Array, ...]
    start: Array
    axes: tuple[int, ...]
    factor: Any = 1.0
    kind: Hashable = None
    is_product: bool = False

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        within = {axis % self.start.ndim for axis in self.axes}
        return math.prod(n for axis, n in enumerate(self.start.shape) if axis not in within)

    @property
    def numbers(self) -> int:
        """How many numbers there are in the operands."""
        return sum(operand.size for operand in self.operands)


def first_direction(shape: Sequence[int], axes: Sequence[int], dtype: Any) -> Array:
    """A direction to begin with, equal in all blocks: neither constant nor orthogonal to that."""
    return _direction(shape, axes, dtype, 2.4)


def _direction(shape: Sequence[int], axes: Sequence[int], dtype: Any, turn: float) -> Array:
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
    kinds = Counter(one.kind for one in different if one.is_product)
    doubled = [
        kinds[one.kind] >= _MANY_PRODUCTS and one.is_product and one.numbers <= _FEW_NUMBERS
        for one in different
    ]
    different = [
        _with_second_row(one) if double else one
        for one, double in zip(different, doubled, strict=True)
    ]
    found: list[Any] = [None] * len(different)
    for count, members in _by_steps(different, steps).items():
        for first in range(0, len(members), _ONE_LOOP):
            chosen = members[first : first + _ONE_LOOP]
            results = _side_by_side([different[i] for i in chosen], count)
            for i, (value, last) in zip(chosen, results, strict=True):
                found[i] = value, last[0] if doubled[i] else last
    return [
        (MARGIN * iteration.factor * found[place][0], found[place][1])
        for iteration, place in zip(iterations, places, strict=True)
    ]


def _by_steps(iterations: Sequence[PowerIteration], steps: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, iteration in enumerate(iterations):
        count = min(steps, 2) if iteration.blocks >= _MANY_BLOCKS else steps
        found.setdefault(count, []).append(place)
    return found


def _side_by_side(iterations: Sequence[PowerIteration], steps: int) -> list[tuple[Array, Array]]:
    """The largest eigenvalues and the last vectors, by so many steps of each."""

    def step(_: Any, states: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        return [_step(one, vector) for one, (_, vector) in zip(iterations, states, strict=True)]

    states = [(jnp.zeros((), one.start.dtype), one.start) for one in iterations]
    if steps > 2:  # a loop compiles in a fraction of the time
        return lax.fori_loop(0, steps, step, states)
    for count in range(steps):
        states = step(count, states)
    return states


def _step(iteration: PowerIteration, vector: Array) -> tuple[Array, Array]:
    """`max |JᵀJ x|`, the eigenvalue if `x` is an eigenvector, and the next `x`."""
    # Products may have a wider type. The largest entry is 1: squares are then in range. Of all
    # blocks at once: one that falls far behind does not have the largest eigenvalue.
    image = iteration.response(vector, *iteration.operands).astype(vector.dtype)
    size = jnp.maximum(jnp.max(jnp.abs(image)), jnp.finfo(vector.dtype).tiny)
    image = image / size
    length = jnp.sqrt(jnp.sum(jnp.square(image), axis=iteration.axes, keepdims=True))
    return size * jnp.max(length), jnp.where(length > 0, image / length, vector)


def _with_second_row(iteration: PowerIteration) -> PowerIteration:
    """From two directions at once, the first of which is the one that is gone on with."""
    second = _direction(iteration.start.shape, iteration.axes, iteration.start.dtype, 1.1)
    return replace(
        iteration,
        response=jax.vmap(iteration.response, (0, *(None for _ in iteration.operands))),
        start=jnp.stack([iteration.start, second]),
        axes=tuple(axis % iteration.start.ndim + 1 for axis in iteration.axes),
    )


__all__ = ["MARGIN", "PowerIteration", "first_direction", "largest"]
