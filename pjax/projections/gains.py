"""Bounds on how much an output moves with an operand: the largest eigenvalue of `JᵀJ`.

By the power iteration, of all operands of a problem side by side: none waits for another, and one
loop holds them all. Many equal ones are stacked: a program does not grow with their number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from pjax.backend import device
from pjax.projections.scaling import times

#: The power iteration underestimates: after the few steps it is given, by up to this factor.
MARGIN = 1.4
#: With so many blocks two steps are enough: the largest bound is far too small only if the first
#: direction is nearly orthogonal to what is sought in every block.
_MANY_BLOCKS = 64
#: So many equal products are stacked on a CPU, where they take turns: XLA compiles each product of
#: a matrix and a vector by itself. Where kernels are launched any are, as one product is faster.
_MANY_PRODUCTS = 16
#: Matrices of at most so many numbers are stacked, which takes a copy: with more, a product takes
#: longer than its launch.
_STACKED_NUMBERS = 2**18
#: Directions of at most so many numbers are part of the program; it computes larger ones.
_KNOWN_NUMBERS = 2**17
#: XLA sums so many numbers in one kernel, and more in two.
_ONE_SUM = 31
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
    - `stackable`: whether equal ones may be one batched operation: products of matrices.
    """

    response: Callable[..., Array]
    operands: tuple[Array, ...]
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[int, ...]
    start: Array | None = None
    factor: Any = 1.0
    kind: Hashable = None
    stackable: bool = False

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return math.prod(n for axis, n in enumerate(self.shape) if axis not in self.axes)

    @property
    def numbers(self) -> int:
        """How many numbers there are in the operands."""
        return sum(operand.size for operand in self.operands)


def first_direction(shape: Sequence[int], axes: Sequence[int], dtype: Any) -> Array:
    """A direction to begin with, equal in all blocks: neither constant nor orthogonal to that."""
    block = tuple(n if axis in axes else 1 for axis, n in enumerate(shape))
    count = math.prod(block)
    direction = 1 + 0.5 * np.cos(2.4 * np.arange(count))
    length = float(np.linalg.norm(direction)) or 1.0
    if count > _KNOWN_NUMBERS:
        direction = 1 + 0.5 * jnp.cos(2.4 * jnp.arange(count, dtype=dtype))
    found = jnp.asarray(direction / length, dtype).reshape(block)
    return jnp.broadcast_to(found, tuple(shape))


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
    found: dict[int, tuple[Array, Array]] = {}
    fixed: dict[Any, Array] = {}
    for count, members in _by_steps(different, steps).items():
        groups = _groups(different, members)
        runs = [_run([different[i] for i in group], fixed) for group in groups]
        for group, (values, lasts) in zip(groups, _largest(runs, count), strict=True):
            alone = len(group) == 1
            entries = [values] if alone else _entries(values)
            for k, i in enumerate(group):
                found[i] = entries[k], lasts if alone else lasts[k]
    bounds = []
    for iteration, place in zip(iterations, places, strict=True):
        value, last = found[place]
        bounds.append((times(iteration.factor, value), last))
    return bounds


def _entries(values: Float[Array, " count"]) -> list[Array]:
    """The entries of a vector, as numbers.

    XLA computes a slice in whatever reads it, which is then another kernel for each place of the
    slice. On a CPU, where kernels are most of the compile time, masks are read in their stead.
    """
    if device.launches_kernels():
        return [values[k] for k in range(len(values))]
    found = []
    for first in range(0, len(values), _ONE_SUM):
        part = values[first : first + _ONE_SUM]
        zeros = jnp.zeros_like(part)
        for mask in np.eye(len(part), dtype=bool):
            found.append(jnp.sum(lax.select(jnp.asarray(mask), part, zeros)))
    return found


def _groups(iterations: Sequence[PowerIteration], members: Sequence[int]) -> list[list[int]]:
    """The members, those together that are equal, small and enough to be stacked."""
    alike: dict[Any, list[int]] = {}
    for i in members:
        one = iterations[i]
        types = tuple((x.shape, jnp.dtype(x.dtype)) for x in one.operands)
        key = one.kind, one.shape, one.axes, jnp.dtype(one.dtype), types
        small = one.stackable and one.numbers <= _STACKED_NUMBERS and one.kind is not None
        alike.setdefault(key if small else i, []).append(i)
    least = 2 if device.launches_kernels() else _MANY_PRODUCTS
    groups = alike.values()
    found = [group for group in groups if len(group) >= least]
    return found + [[i] for group in groups if len(group) < least for i in group]


class _Run(NamedTuple):
    """A power iteration as it is carried out.

    **Attributes:**

    - `response`, `axes`: as in `PowerIteration`.
    - `stacked`: whether these are several, numbered by a first axis of operands and start, which
        `axes` do not count.
    """

    response: Callable[..., Array]
    operands: tuple[Array, ...]
    start: Array
    axes: tuple[int, ...]
    stacked: bool


def _run(iterations: Sequence[PowerIteration], fixed: dict[Any, Array]) -> _Run:
    """Equal ones as one; from a fixed direction, each made once, where no other is given."""
    one = iterations[0]
    key = one.shape, one.axes, jnp.dtype(one.dtype)
    if key not in fixed and any(i.start is None for i in iterations):
        fixed[key] = first_direction(one.shape, one.axes, one.dtype)
    starts = [fixed[key] if i.start is None else i.start for i in iterations]
    if len(iterations) == 1:
        return _Run(one.response, one.operands, starts[0], one.axes, stacked=False)
    operands = tuple(map(jnp.stack, zip(*(i.operands for i in iterations), strict=True)))
    if all(start is starts[0] for start in starts):
        start = jnp.broadcast_to(starts[0], (len(starts), *one.shape))
    else:
        start = jnp.stack(starts)
    return _Run(one.response, operands, start, one.axes, stacked=True)


def _largest(runs: Sequence[_Run], steps: int) -> list[tuple[Array, Array]]:
    """A bound on the largest eigenvalue, and the last vector, of each run."""
    stacked = [place for place, run in enumerate(runs) if run.stacked]
    in_turn = [] if device.launches_kernels() else stacked
    found = {place: _in_turn(runs[place], steps) for place in in_turn}
    together = [place for place in range(len(runs)) if place not in found]
    for first in range(0, len(together), _ONE_LOOP):
        chosen = together[first : first + _ONE_LOOP]
        results = _side_by_side([runs[place] for place in chosen], steps)
        found.update(zip(chosen, results, strict=True))
    return [found[place] for place in range(len(runs))]


def _in_turn(run: _Run, steps: int) -> tuple[Array, Array]:
    """What is stacked, one after the other."""

    def find(entry: tuple[Array, tuple[Array, ...]]) -> tuple[Array, Array]:
        start, operands = entry
        alone = run._replace(start=start, operands=operands, stacked=False)
        return _side_by_side([alone], steps)[0]

    return lax.map(find, (run.start, run.operands))


def _by_steps(iterations: Sequence[PowerIteration], steps: int) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for place, one in enumerate(iterations):
        count = min(steps, 2) if one.blocks >= _MANY_BLOCKS else steps
        found.setdefault(count, []).append(place)
    return found


class _State(NamedTuple):
    """Of each block of a power iteration: the bound so far, the vector and its length."""

    value: Array
    vector: Array
    length: Array


def _side_by_side(runs: Sequence[_Run], steps: int) -> list[tuple[Array, Array]]:
    """Bounds on the largest eigenvalues and the last vectors, by so many steps of each."""

    def each(run: _Run, function: Callable[..., _State]) -> Callable[..., _State]:
        function = functools.partial(function, run)
        return jax.vmap(function) if run.stacked else function

    def step(_: Any, states: list[_State]) -> list[_State]:
        return [
            each(run, _step)(state, run.operands) for run, state in zip(runs, states, strict=True)
        ]

    states = [each(run, _first)(run.start) for run in runs]
    if steps > 2:  # a loop compiles in a fraction of the time
        states = lax.fori_loop(0, steps, step, states)
    else:
        for count in range(steps):
            states = step(count, states)
    return [
        (
            jnp.max(state.value, axis=tuple(range(int(run.stacked), state.value.ndim))),
            jnp.where(state.length > 0, state.vector / state.length, run.start),
        )
        for run, state in zip(runs, states, strict=True)
    ]


def _first(run: _Run, start: Array) -> _State:
    lengths = tuple(1 if axis in run.axes else n for axis, n in enumerate(start.shape))
    ones = jnp.ones(lengths, start.dtype)
    return _State(0 * ones, start, ones)


def _step(run: _Run, state: _State, operands: tuple[Array, ...]) -> _State:
    _, x, before = state
    # Products may have a wider type. The largest entry is 1: squares are then in range. In each
    # block by itself: blocks that lie on several devices are only compared at the end.
    image = run.response(x, *operands).astype(x.dtype)
    tiny = jnp.finfo(x.dtype).tiny
    size = jnp.maximum(jnp.max(jnp.abs(image), axis=run.axes, keepdims=True), tiny)
    image = image / size
    length = jnp.sqrt(jnp.sum(jnp.square(image), axis=run.axes, keepdims=True))
    growth = length / jnp.maximum(before, tiny)
    return _State(MARGIN * size * growth, image, length)


__all__ = ["MARGIN", "PowerIteration", "first_direction", "largest"]
