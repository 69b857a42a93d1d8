"""Axes along which equations mix nothing: each entry of the output reads one of the input."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pjax.backend.compat import P
from pjax.program.program import Equation, Program
from pjax.program.vocabulary import ELEMENTWISE, JOINS, LOSSES, REDUCTIONS, SHAPES


def independent_axes(
    program: Program, equations: Sequence[Equation], base: int, output: int
) -> tuple[tuple[int, int], ...]:
    """Pairs of an axis of `base` and one of `output` along which nothing is mixed."""
    axes, mixed = carried_axes(program, equations, base)
    pairs = [
        (axis, place)
        for place, axis in enumerate(axes[output])
        if axis is not None and axis not in mixed
    ]
    ascending = all(a[0] < b[0] for a, b in itertools.pairwise(pairs))
    return tuple(pairs) if ascending else ()


def carried_axes(
    program: Program, equations: Sequence[Equation], base: int
) -> tuple[dict[int, tuple[int | None, ...]], set[int]]:
    """For each axis of what `equations` compute the axis of `base` that it is, if it is one; and
    the axes of `base` whose entries are mixed.
    """
    axes: dict[int, tuple[int | None, ...]] = {base: tuple(range(len(program.shape(base))))}
    mixed: set[int] = set()

    def lose(found: Sequence[int | None]) -> None:
        mixed.update(axis for axis in found if axis is not None)

    for equation in equations:
        operands = [a for a in equation.inputs if isinstance(a, int) and a in axes]
        if not operands:
            continue
        for out in equation.outputs:
            shape = program.shape(out)
            axes[out] = _carried(program, equation, operands, axes, shape, lose)
    return axes, mixed


def _carried(
    program: Program,
    equation: Equation,
    operands: Sequence[int],
    axes: Mapping[int, tuple[int | None, ...]],
    shape: tuple[int, ...],
    lose: Any,
) -> tuple[int | None, ...]:
    """For each axis of an equation's result the axis of the base that it is."""
    primitive, params = equation.primitive, equation.params
    first = axes[operands[0]]
    if primitive in ELEMENTWISE:
        carried: list[int | None] = []
        for place in range(len(shape)):
            here = {
                axes[a][place] for a in operands if program.shape(a) and axes[a][place] is not None
            }
            carried.append(next(iter(here)) if len(here) == 1 else None)
            if len(here) > 1:
                lose(tuple(here))
        return tuple(carried)
    if primitive in REDUCTIONS:
        lose([first[axis] for axis in params["axes"]])
        return tuple(a for place, a in enumerate(first) if place not in params["axes"])
    if primitive is P.broadcast_in_dim_p:
        source = program.shape(operands[0])
        kept: list[int | None] = [None] * len(shape)
        for place, target in enumerate(params["broadcast_dimensions"]):
            if source[place] == shape[target]:
                kept[target] = first[place]
            else:
                lose([first[place]])
        return tuple(kept)
    if primitive is P.transpose_p:
        return tuple(first[axis] for axis in params["permutation"])
    if primitive in SHAPES:
        return _reshaped(program.shape(operands[0]), first, shape, lose)
    if primitive in JOINS:
        place = params.get("axis", params.get("dimension"))
        return _joined(place, [axes[a] for a in operands], len(shape), lose)
    if primitive in LOSSES:
        lose(first[-1:])
        return first[:-1]
    if primitive is P.dot_general_p:
        return _multiplied(params["dimension_numbers"], equation.inputs, axes, shape, lose)
    if primitive is P.gather_p and operands == [equation.inputs[0]]:
        return _gathered(params["dimension_numbers"], first, shape, lose)
    for operand in operands:
        lose(axes[operand])
    return (None,) * len(shape)


def _joined(
    place: int, operands: Sequence[tuple[int | None, ...]], ndim: int, lose: Any
) -> tuple[int | None, ...]:
    """The axes of arrays side by side along the axis `place`, which is none of theirs."""
    carried: list[int | None] = []
    stacked = ndim > len(operands[0])
    for axis in range(ndim):
        here = axis - (stacked and axis > place)
        named = set() if stacked and axis == place else {axes[here] for axes in operands}
        if axis == place or len(named) != 1:
            lose(tuple(named))
            named = {None}
        carried.append(named.pop())
    return tuple(carried)


def _multiplied(
    numbers: Any,
    operands: Sequence[Any],
    axes: Mapping[int, tuple[int | None, ...]],
    shape: tuple[int, ...],
    lose: Any,
) -> tuple[int | None, ...]:
    """The batch axes of a product of arrays."""
    kept = []
    for place in range(len(numbers[1][0])):
        here = {
            axes[atom][batch[place]]
            for atom, batch in zip(operands, numbers[1], strict=True)
            if atom in axes
        }
        kept.append(here.pop() if len(here) == 1 else None)
    for atom in operands:
        lose([axis for axis in axes.get(atom, ()) if axis not in kept])
    return (*kept, *(None,) * (len(shape) - len(kept)))


def _gathered(
    numbers: Any, axes: tuple[int | None, ...], shape: tuple[int, ...], lose: Any
) -> tuple[int | None, ...]:
    """The batch axes of a gather: of each row other entries (`jnp.take_along_axis`)."""
    batch = [place for place in range(len(shape)) if place not in numbers.offset_dims]
    carried: list[int | None] = [None] * len(shape)
    kept = set()
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for operand_axis, index_axis in pairs:
        carried[batch[index_axis]] = axes[operand_axis]
        kept.add(operand_axis)
    lose([axis for place, axis in enumerate(axes) if place not in kept])
    return tuple(carried)


def _reshaped(
    source: tuple[int, ...], axes: tuple[int | None, ...], shape: tuple[int, ...], lose: Any
) -> tuple[int | None, ...]:
    """Axes that a reshape leaves whole, from the front and from the back."""
    carried: list[int | None] = [None] * len(shape)
    kept: set[int] = set()
    old = [place for place, n in enumerate(source) if n != 1]
    new = [place for place, n in enumerate(shape) if n != 1]
    for ends in (zip(old, new, strict=False), zip(old[::-1], new[::-1], strict=False)):
        for before, after in ends:
            if source[before] != shape[after]:
                break
            carried[after] = axes[before]
            kept.add(before)
    lose([a for place, a in enumerate(axes) if place not in kept])
    return tuple(carried)
