"""The least squares of what recent batches ask of each parameter together.

In numbers, which are found for all parameters at once, and in products and sums of arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Array

from pjax.problem import Problem
from pjax.projections import spectrum
from pjax.projections.spectrum import Side, Spectra
from pjax.training.memory import Memory
from pjax.training.moments import Part, Stack, Stacks
from pjax.training.readers import Unit, Units


class Plan(NamedTuple):
    """What the move of each unit is made of: numbers, for the arrays of units.

    **Attributes:**

    - `pace`: see `pjax.training.requests`.
    - `kept`, `ahead`: weights of the request so far and of the force, in the mean and in what it
        will be if the next batch asks for the same: Nesterov's look ahead.
    - `inputs`, `outputs`: functions of spectra, by the number of the unit.
    - `dampings`: of units whose `C` is a diagonal, by number.
    """

    pace: Array
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
    assert unit.slot is not None
    assert unit.matrix is not None
    slot = problem.graph.slots[unit.slot]
    entries = asked if slot.route.direct else slot.route([asked], problem.values)
    matrix = unit.matrix.of(entries)
    move = unit.matrix.back(spectrum.between(left, matrix, right)).astype(asked.dtype)
    if slot.route.direct:
        return move
    (back,) = slot.route.pull(move.astype(slot.dtype), problem.values)
    return back


__all__ = ["Plan", "solve"]
