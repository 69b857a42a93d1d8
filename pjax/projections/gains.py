"""Bounds on how much an output moves with an operand: the largest eigenvalue of `JᵀJ`.

By the power iteration, of all operands of a problem side by side: none waits for another, and one
loop holds them all. Where kernels are launched one by one, on a GPU, equal ones are stacked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pjax import _compat

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

#: Matrices of at most so many numbers are stacked, which takes a copy: with more, a product takes
#: longer than its launch.
_STACKED_NUMBERS = 2**18


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
    find = _stacked if _compat.launches_kernels() else _in_loops
    found = find(different, steps)
    bounds = []
    for iteration, place in zip(iterations, places, strict=True):
        value, last = found[place]
        if last.shape != iteration.shape:
            last = lax.slice_in_dim(last, 0, 1, axis=iteration.rows or 0)
        bounds.append((MARGIN * iteration.factor * value, last))
    return bounds


def _in_loops(iterations: Sequence[PowerIteration], steps: int) -> list[tuple[Array, Array]]:
    """The largest eigenvalues and the last vectors: as loops, each with its own products."""
    runs = _runs(iterations)
    found: dict[int, tuple[Array, Array]] = {}
    for count, members in _by_steps(iterations, steps).items():
        for first in range(0, len(members), _ONE_LOOP):
            chosen = members[first : first + _ONE_LOOP]
            results = _side_by_side([runs[i] for i in chosen], count)
            found.update(zip(chosen, results, strict=True))
    return [found[i] for i in range(len(runs))]


def _stacked(iterations: Sequence[PowerIteration], steps: int) -> list[tuple[Array, Array]]:
    """The largest eigenvalues and the last vectors, of equal products by one batched product."""
    found: dict[int, tuple[Array, Array]] = {}
    for count, members in _by_steps(iterations, steps).items():
        groups: dict[Any, list[int]] = {}
        for i in members:
            one = iterations[i]
            small = one.rows is not None and one.numbers <= _STACKED_NUMBERS
            types = tuple((x.shape, jnp.dtype(x.dtype)) for x in one.operands)
            like = one.kind, one.shape, one.axes, jnp.dtype(one.dtype), types
            alike = like if small and one.kind is not None else i
            groups.setdefault(alike, []).append(i)
        stacks = [_stack([iterations[i] for i in group]) for group in groups.values()]
        results = _side_by_side(stacks, count)
        for group, (values, lasts) in zip(groups.values(), results, strict=True):
            alone = len(group) == 1
            for k, i in enumerate(group):
                found[i] = (values, lasts) if alone else (values[k], lasts[k])
    return [found[i] for i in range(len(iterations))]


def _stack(iterations: Sequence[PowerIteration]) -> _Run:
    """Equal ones as one, with a first axis for them; one by itself as it is."""
    one = iterations[0]
    begin = first_direction(one.shape, one.axes, one.dtype)
    starts = [begin if i.start is None else i.start for i in iterations]
    if len(iterations) == 1:
        return _Run(one.response, one.operands, starts[0], one.axes)
    operands = tuple(map(jnp.stack, zip(*(i.operands for i in iterations), strict=True)))
    return _Run(jax.vmap(one.response), operands, jnp.stack(starts), one.axes, stacked=True)


class _Run(NamedTuple):
    """A power iteration as it is carried out: from where, and the axes within a block of that.

    **Attributes:**

    - `stacked`: whether the first axis numbers several ones, which `axes` do not count.
    """

    response: Callable[..., Array]
    operands: tuple[Array, ...]
    start: Array
    axes: tuple[int, ...]
    stacked: bool = False


def _runs(iterations: Sequence[PowerIteration]) -> list[_Run]:
    """With fixed directions where no other is given, each computed once; those of many equal small
    products with a second row, of which the first is the one that is gone on with.
    """
    made: dict[Any, Array] = {}

    def direction(one: PowerIteration, turn: float) -> Array:
        key = one.shape, one.axes, jnp.dtype(one.dtype), turn
        if key not in made:
            made[key] = first_direction(one.shape, one.axes, one.dtype, turn)
        return made[key]

    small = [one.rows is not None and one.numbers <= _FEW_NUMBERS for one in iterations]
    kinds = Counter(one.kind for one, is_small in zip(iterations, small, strict=True) if is_small)
    runs = []
    for one, is_small in zip(iterations, small, strict=True):
        start = direction(one, 2.4) if one.start is None else one.start
        axes, rows = one.axes, one.rows
        if is_small and rows is not None and kinds[one.kind] >= _MANY_PRODUCTS:
            start = jnp.concatenate([start, direction(one, 1.1)], rows)
            axes = tuple(axis for axis in axes if axis != rows)
        runs.append(_Run(one.response, one.operands, start, axes))
    return runs


def _by_steps(iterations: Sequence[PowerIteration], steps: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, one in enumerate(iterations):
        count = min(steps, 2) if one.blocks >= _MANY_BLOCKS else steps
        found.setdefault(count, []).append(place)
    return found


class _State(NamedTuple):
    """Of a power iteration: the eigenvalue so far, the vector and its length in each block."""

    value: Array
    vector: Array
    length: Array


def _side_by_side(runs: Sequence[_Run], steps: int) -> list[tuple[Array, Array]]:
    """The largest eigenvalues and the last vectors, by so many steps of each."""

    def step(_: Any, states: list[_State]) -> list[_State]:
        return [_step(run, state) for run, state in zip(runs, states, strict=True)]

    states = [_first(run) for run in runs]
    if steps > 2:  # a loop compiles in a fraction of the time
        states = lax.fori_loop(0, steps, step, states)
    else:
        for count in range(steps):
            states = step(count, states)
    return [
        (state.value, jnp.where(state.length > 0, state.vector / state.length, run.start))
        for run, state in zip(runs, states, strict=True)
    ]


def _first(run: _Run) -> _State:
    dtype, shape = run.start.dtype, run.start.shape
    within = {axis + run.stacked for axis in run.axes}
    lengths = tuple(1 if axis in within else n for axis, n in enumerate(shape))
    return _State(jnp.zeros(shape[: run.stacked], dtype), run.start, jnp.ones(lengths, dtype))


def _step(run: _Run, state: _State) -> _State:
    _, x, before = state
    # Products may have a wider type. The largest entry is 1: squares are then in range. Of all
    # blocks at once: one that falls far behind does not have the largest eigenvalue.
    image = run.response(x, *run.operands).astype(x.dtype)
    tiny = jnp.finfo(x.dtype).tiny
    all_blocks = tuple(range(int(run.stacked), x.ndim))
    size = jnp.maximum(jnp.max(jnp.abs(image), axis=all_blocks, keepdims=True), tiny)
    image = image / size
    within = tuple(axis + run.stacked for axis in run.axes)
    length = jnp.sqrt(jnp.sum(jnp.square(image), axis=within, keepdims=True))
    growth = jnp.max(length / jnp.maximum(before, tiny), axis=all_blocks, keepdims=True)
    return _State((size * growth).reshape(state.value.shape), image, length)


__all__ = ["MARGIN", "PowerIteration", "first_direction", "largest"]
