"""The least squares of what recent batches ask of each parameter together.

In numbers, which are found for all parameters at once, and in products and sums of arrays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pjax.problem import Problem
from pjax.projections import spectrum
from pjax.projections.products.rows import dot
from pjax.projections.spectrum import Side, Spectra
from pjax.training import within
from pjax.training.memory import Memory
from pjax.training.moments import Part, Stack, Stacks, as_matrix, from_matrix
from pjax.training.readers import Unit, Units

#: The share of the mean square of its requests that a unit's move may explain. It is more where all
#: rows ask for one move, which can end a layer of relus, and where directions of the inputs come up
#: that were not in the rows before.
_EXPLAINED = 0.3


class Plan(NamedTuple):
    """What the move of each unit is made of: numbers, for the arrays of units.

    **Attributes:**

    - `pace`, `paces`: see `pjax.training.requests`.
    - `squares`: the mean square of the rows of requests.
    - `kept`, `ahead`: weights of the request so far and of the force, in the mean and in what it
        will be if the next batch asks for the same: Nesterov's look ahead.
    - `inputs`, `outputs`: functions of spectra, by the number of the unit.
    - `dampings`: of units whose `C` is a diagonal, by number.
    """

    pace: Array
    paces: Array
    squares: list[Array]
    kept: list[tuple[Array, Array]]
    ahead: list[tuple[Array, Array]]
    inputs: dict[int, Part]
    outputs: dict[int, Part]
    dampings: dict[int, Array]


def solve(
    problem: Problem,
    units: Units,
    stacks: Stacks,
    asked: Sequence[Array],
    memory: Memory,
    plan: Plan,
) -> list[Array]:
    """`(C + ρ)⁻¹ M` for each unit, its columns equalised."""
    left = _sides(stacks.inputs, memory.inputs, plan.inputs)
    right = _sides(stacks.outputs, memory.outputs, plan.outputs)
    found = []
    for number, (unit, own, ahead) in enumerate(zip(units.units, memory.units, asked, strict=True)):
        if own.diagonal is None:
            found.append(_solved(problem, unit, left[number], ahead, right[number]))
            continue
        damping = plan.dampings[number].astype(ahead.dtype)
        move = ahead * spectrum.inverse(own.diagonal + damping)
        if number in right:
            flat = move.reshape(-1, move.shape[-1])
            move = spectrum.between(None, flat, right[number]).reshape(move.shape)
        found.append(move)
    return found


def limit(explained: Array, square: Array) -> Array:
    """A factor on a move that would explain more of its requests than there is.

    **Arguments:**

    - `explained`: the product of the move and the requests, `tr WᵀCW` for a solve.
    - `square`: the mean square of the rows of requests.
    """
    most = _EXPLAINED * square
    return jnp.where(explained > most, most * spectrum.inverse(explained), 1)


def stiffnesses(
    problem: Problem,
    units: Units,
    stacks: Stacks,
    memory: Memory,
    plan: Plan,
    wanted: Sequence[int],
) -> dict[int, tuple[Callable[[Array], Array], Array]]:
    """The inverse of what `solve` multiplies with, and a bound on its largest eigenvalue, for some
    units by number.
    """
    left = _sides(stacks.inputs, memory.inputs, plan.inputs)
    right = _sides(stacks.outputs, memory.outputs, plan.outputs)
    found = {}
    for number in wanted:
        diagonal = memory.units[number].diagonal
        if diagonal is None:
            found[number] = within.of_matrix(
                problem, units.units[number], left[number], right[number]
            )
        else:
            damped = diagonal + plan.dampings[number].astype(diagonal.dtype)
            found[number] = within.of_diagonal(damped, right.get(number))
    return found


def whitened(
    problem: Problem,
    units: Units,
    stacks: Stacks,
    arrays: Sequence[Array],
    memory: Memory,
    unseen: float,
) -> list[tuple[Array, Array]]:
    """For an array `D` of each unit `tr Dᵀ(C + ε)⁻¹D`, and the number of directions,
    `tr C(C + ε)⁻¹`, with `ε` a small share of the mean eigenvalue of `C`.
    """
    found: list[Any] = [None] * len(arrays)
    for number, (own, array) in enumerate(zip(memory.units, arrays, strict=True)):
        if own.diagonal is not None:
            columns = array.shape[-1] if array.ndim else 1
            inverses = spectrum.inverse(own.diagonal + unseen * jnp.mean(own.diagonal))
            directions = dot(own.diagonal, inverses) / columns
            found[number] = dot(jnp.square(array), inverses), directions
    for stack, spectra in zip(stacks.inputs, memory.inputs, strict=True):
        squares = []
        for number, vectors in zip(stack.members, spectra.vectors, strict=True):
            matrix = as_matrix(problem, units.units[number], arrays[number])
            along = jnp.swapaxes(vectors, -1, -2) @ matrix
            squares.append((jnp.sum(along**2, axis=-1), jnp.sum(matrix**2, axis=(-1, -2))))
        numbers = functools.partial(_whitened, stack, unseen)
        for number, pair in zip(
            stack.members, numbers(spectra._replace(vectors=()), squares), strict=True
        ):
            found[number] = pair
    return found


def _whitened(
    stack: Stack, unseen: float, spectra: Spectra, squares: Sequence[tuple[Array, Array]]
) -> list[tuple[Array, Array]]:
    shape = stack.shape
    along, total = (shape.join(part) for part in zip(*squares, strict=True))
    small = unseen * spectra.trace(shape) / shape.lengths.astype(spectra.rest.dtype)
    inverses = spectrum.inverse(spectra.values + small[:, None])
    square = jnp.sum(along * inverses, axis=-1)
    count = jnp.sum(spectra.values * inverses, axis=-1)
    if not shape.full:
        other = spectrum.inverse(spectra.rest + small)
        square = square + jnp.maximum(total - jnp.sum(along, axis=-1), 0) * other
        others = (shape.lengths - shape.rank).astype(spectra.rest.dtype)
        count = count + others * spectra.rest * other
    first = [shape.places(member)[0] for member in range(len(stack.members))]
    both = shape.sums(square), shape.sums(count)
    return [(spectrum.pick(both[0], place), spectrum.pick(both[1], place)) for place in first]


def _sides(
    stacks: Sequence[Stack], spectra: Sequence[Spectra], parts: Mapping[int, Part]
) -> dict[int, Side]:
    """Functions of the spectra of units, by number."""
    return {
        number: Side(vectors, *parts[number])
        for stack, own in zip(stacks, spectra, strict=True)
        for number, vectors in zip(stack.members, own.vectors, strict=True)
    }


def _solved(problem: Problem, unit: Unit, left: Side, asked: Array, right: Side) -> Array:
    """The move of a matrix or kernel."""
    move = spectrum.between(left, as_matrix(problem, unit, asked), right)
    return from_matrix(problem, unit, move).astype(asked.dtype)


__all__ = ["Plan", "limit", "solve", "stiffnesses", "whitened"]
