"""The second moments of the rows behind each parameter, and of the forces.

The inputs of a matrix or kernel, and the forces on its outputs, are kept by their largest
eigenvectors: spectra, stacked over all units in which they have one rank. Of everything else the
moment is a diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.backend import shardings
from pjax.problem import Problem, State
from pjax.projections import spectrum
from pjax.projections.products import rows as of_rows
from pjax.projections.products.convolution import Convolution
from pjax.projections.spectrum import Shape, Spectra, SpectralFunction
from pjax.rules import LayerSum
from pjax.training.readers import Reader, Unit, Units
from pjax.training.readings import Read, joined


class Stack(NamedTuple):
    """Spectra of one rank.

    **Attributes:**

    - `shape`: of the stack.
    - `members`: the number of the unit that each member is of.
    - `dtype`: of the numbers.
    """

    shape: Shape
    members: tuple[int, ...]
    dtype: Any

    def of(self, numbers: Array) -> Array:
        """For each spectrum the number of its unit."""
        return numbers[np.asarray(self.members)[self.shape.owners]].astype(self.dtype)

    def split(self, function: SpectralFunction) -> dict[int, Part]:
        """A function's numbers by unit."""
        outside = None if self.shape.full else self.shape.split(function.outside)
        return {
            number: (inside, None if outside is None else outside[member][..., None, None])
            for member, (number, inside) in enumerate(
                zip(self.members, self.shape.split(function.inside), strict=True)
            )
        }


#: What a function of a spectrum is inside and outside of its eigenvectors.
Part = tuple[Array, Array | None]


class Stacks(NamedTuple):
    """The spectra of the inputs and of the outputs of units."""

    inputs: tuple[Stack, ...]
    outputs: tuple[Stack, ...]

    @classmethod
    def of(cls, units: Units, values: Sequence[Array], rank: int, output_rank: int) -> Stacks:
        """Those of units with these values, at most of these ranks."""
        inputs: dict[Any, list[tuple[int, int, int]]] = {}
        outputs: dict[Any, list[tuple[int, int, int]]] = {}

        def add(to: Any, number: int, size: int, rank: int, blocks: tuple[int, ...]) -> None:
            key = min(rank, size), rank >= size, jnp.dtype(values[number].dtype)
            to.setdefault(key, []).append((number, size, *(blocks or (0,))))

        for number, (unit, value) in enumerate(zip(units.units, values, strict=True)):
            if unit.matrix is not None:
                add(inputs, number, unit.matrix.rows, rank, unit.matrix.blocks)
                add(outputs, number, unit.matrix.columns, output_rank, unit.matrix.blocks)
            elif value.ndim > 1:
                add(outputs, number, value.shape[-1], output_rank, ())
        return cls(*(_stacks(found) for found in (inputs, outputs)))

    def empty(self) -> tuple[tuple[Spectra, ...], tuple[Spectra, ...]]:
        """Spectra of 0."""
        inputs, outputs = ([spectrum.empty(s.shape, s.dtype) for s in side] for side in self)
        return tuple(inputs), tuple(outputs)


def _stacks(found: Mapping[Any, Sequence[tuple[int, int, int]]]) -> tuple[Stack, ...]:
    stacks = []
    for (rank, _, dtype), members in found.items():
        numbers, sizes, blocks = zip(*members, strict=True)
        stacks.append(Stack(Shape(rank, sizes, blocks), numbers, dtype))
    return tuple(stacks)


class Rows(NamedTuple):
    """What `C` is of in one batch, for one unit.

    **Attributes:**

    - `times`: `U ↦ C U`.
    - `trace`: `tr C`, for each block.
    """

    times: Callable[[Array], Array]
    trace: Array


def renewed(
    stacks: Sequence[Stack],
    kept: Sequence[Spectra],
    rows: Mapping[int, Rows],
    scales: Array,
    keep: Array,
    iterations: Any,
) -> tuple[Spectra, ...]:
    """Spectra with the rows of this batch taken in.

    **Arguments:**

    - `rows`: by the number of the unit.
    - `scales`: a factor on the moments of each unit.
    - `keep`, `iterations`: see `pjax.projections.spectrum.renew`.
    """
    found = []
    for stack, before in zip(stacks, kept, strict=True):
        own = [rows[number] for number in stack.members]

        def times(vectors: Sequence[Array], own: Sequence[Rows] = own) -> list[Array]:
            return [part.times(directions) for part, directions in zip(own, vectors, strict=True)]

        scale = stack.of(scales)
        trace = scale * stack.shape.join([part.trace.astype(stack.dtype) for part in own])
        found.append(
            spectrum.renew(
                stack.shape, before, times, trace, keep.astype(stack.dtype), scale, iterations
            )
        )
    return tuple(found)


def input_rows(
    problem: Problem, unit: Unit, found: Sequence[Read], forces: Mapping[int, Array]
) -> Rows:
    """The input rows of a unit that is a matrix or a kernel."""
    assert unit.matrix is not None
    parts = [
        (matrix, other, reading.asked)
        for readers, reading in found
        for matrix, other in _operands(problem, [r for r in readers if r.kind == "product"])
    ]
    # What has no rows counts as rows in all directions alike.
    others = [
        jnp.mean(diagonal(problem, unit, part, forces))
        for part in found
        if any(reader.matrix is None for reader in part.readers)
    ]

    def times(directions: Array) -> Array:
        total: Any = sum(m.moment(other, asked, directions) for m, other, asked in parts)
        total = shardings.everywhere(total)
        return total + sum(others) * directions if others else total

    trace: Any = sum(matrix.trace(other, asked) for matrix, other, asked in parts)
    trace = shardings.everywhere(trace)
    return Rows(times, trace + unit.matrix.rows * sum(others) if others else trace)


def sums_of_forces(
    problem: Problem, units: Units, reads: Sequence[Sequence[Read]], state: State
) -> list[Array]:
    """`XᵀG` for each unit: the sum of the forces of all readers.

    Of a weight that several nodes read, such as the steps of a loop, by one product of all rows.
    """
    found: dict[int, Array] = {}
    for unit, parts in zip(units.units, reads, strict=True):
        if len(unit.readers) == 1 or len(parts) > 1 or unit.matrix is None:
            continue
        ((readers, reading),) = parts
        if any(reader.matrix is None for reader in readers):
            continue
        ((kind, rows), *_) = _operands(problem, readers)
        if isinstance(kind, _Dense):
            total = of_rows.across(rows, reading.force, len(unit.matrix.blocks))
            found[unit.node] = from_matrix(problem, unit, total)
    others = [unit.node for unit in units.units if unit.node not in found]
    found |= problem.node_forces(others, state)
    return [shardings.everywhere(found[unit.node]) for unit in units.units]


def as_matrix(problem: Problem, unit: Unit, array: Array) -> Array:
    """An array in the shape of a unit as the matrix that its first product reads."""
    assert unit.slot is not None
    assert unit.matrix is not None
    slot = problem.graph.slots[unit.slot]
    return unit.matrix.of(array if slot.route.direct else slot.route([array], problem.values))


def from_matrix(problem: Problem, unit: Unit, matrix: Array) -> Array:
    """The array in the shape of a unit that such a matrix stands for."""
    assert unit.slot is not None
    assert unit.matrix is not None
    slot = problem.graph.slots[unit.slot]
    array = unit.matrix.back(matrix)
    if slot.route.direct:
        return array
    (back,) = slot.route.pull(array.astype(slot.dtype), problem.values)
    return back


def _operands(problem: Problem, readers: Sequence[Reader]) -> list[tuple[Any, Array]]:
    """The rows that products have beside the operand that readers read: those of all as one.

    Of `x @ w + z @ w`, one layer, they are those of `x + z`.
    """
    of_nodes: dict[Any, list[tuple[Any, Array]]] = {}
    for reader in readers:
        assert reader.matrix is not None
        node, operation = problem.graph.slots[reader.slot].node, reader.matrix.operation
        key = node, operation if isinstance(operation, Convolution) else None
        of_nodes.setdefault(key, []).append((reader.matrix, _other(problem, reader)))
    found = list(of_nodes.values())
    if not found:
        return []
    if isinstance(found[0][0][0].operation, Convolution):
        return [(own[0][0], sum(other for _, other in own)) for own in found]  # pyright: ignore
    rows: list[Any] = [sum(matrix.inputs(other) for matrix, other in own) for own in found]
    blocks = len(found[0][0][0].blocks)
    return [(_Dense(blocks), joined(rows, blocks))]


class _Dense(NamedTuple):
    """Rows as they are."""

    blocks: int

    def moment(self, rows: Array, asked: Array, directions: Array) -> Array:
        return of_rows.moment(rows, directions, asked)

    def trace(self, rows: Array, asked: Array) -> Array:
        return of_rows.trace(rows, self.blocks, asked)


def force_rows(unit: Unit, found: Sequence[Read], force: Array) -> Rows:
    """The forces on the outputs of a unit; where there is no matrix, those on its entries."""
    parts = [part.reading.force for part in found if part.readers[0].kind == "product"]
    summed = shardings.everywhere
    if unit.matrix is None:  # the force is a sum over devices already
        parts, summed = [force], lambda array: array

    def times(directions: Array) -> Array:
        total: Any = sum(of_rows.moment(g, directions) for g in parts)
        return summed(total)

    blocks = 0 if unit.matrix is None else len(unit.matrix.blocks)
    trace: Any = sum(of_rows.trace(g, blocks) for g in parts)
    return Rows(times, summed(trace))


def _other(problem: Problem, reader: Reader) -> Array:
    """The value of the operand beside that which a product's reader reads."""
    slot = problem.graph.slots[reader.slot]
    rule = problem.graph.nodes[slot.node].rule
    assert isinstance(rule, LayerSum)
    assert reader.matrix is not None
    reference = problem.reference(slot.node)
    return rule.operand_beside(reader.place, reference)


def diagonal(problem: Problem, unit: Unit, found: Read, forces: Mapping[int, Array]) -> Array:
    """A bound on `JᵀJ` of the readers of a reading that have no matrix, in the unit's shape."""
    total = jnp.zeros(())
    for number, reader in enumerate(found.readers):
        if reader.matrix is not None:
            continue
        if reader.wires is None:
            total = total + _operand_diagonal(problem, unit, reader, forces)
            continue
        head = reader.wires.head
        shape = jnp.shape(problem.values[head.target])
        asked = found.reading.asked if len(found.readers) == 1 else found.reading.asked[number]
        asked = asked.reshape((*shape[:-1], 1) if shape else ())
        dtype = problem.graph.program.deviation_dtype(head.target)
        (part,) = head.pull(jnp.broadcast_to(asked, shape).astype(dtype), problem.values)
        total = total + part
    return shardings.everywhere(total)


def _operand_diagonal(
    problem: Problem, unit: Unit, reader: Reader, forces: Mapping[int, Array]
) -> Array:
    slot = problem.graph.slots[reader.slot]
    node = problem.graph.nodes[slot.node]
    assert isinstance(node.rule, LayerSum)
    force = forces[node.index]
    asked = jnp.any(force != 0, axis=-1, keepdims=True) if force.ndim else force != 0
    asked = jnp.broadcast_to(asked, force.shape).astype(force.dtype)
    entries = node.rule.diagonal(reader.place, problem.reference(slot.node), asked)
    return problem.pull(slot, unit.node, entries)


__all__ = ["Rows", "Stack", "Stacks", "diagonal", "force_rows", "input_rows", "renewed"]
