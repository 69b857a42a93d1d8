"""What the readers of parameters made in one batch, and the forces on it.

What reads the operands of a layer shares one reading, and so do the steps of a loop: their rows are
one array, since they ask for moves of one weight. Entries that are read in several places are one
array too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pjax.backend import shardings
from pjax.problem import Problem, State
from pjax.program import pull_together
from pjax.projections.products.convolution import Convolution
from pjax.projections.products.rows import dot, row_squares, total
from pjax.training.readers import Matrix, Reader, Unit, Units


class Reading(NamedTuple):
    """Readers in one batch.

    **Attributes:**

    - `output`, `force`: of the readers and on them, as rows: `[*blocks, *places, length]`. The
        first axis of places numbers the readers, where there are several.
    - `asked`: 1 for each row with a force, else 0: others take no part, as if they were not there.
    - `square`: the sum of the squares of the forces.
    - `rows`: how many rows are asked.
    """

    output: Array
    force: Array
    asked: Array
    square: Array
    rows: Array

    @property
    def entries(self) -> Array:
        """How many entries the rows that are asked have."""
        return self.rows * self.force.shape[-1]

    @property
    def output_square(self) -> Array:
        """The sum of the squares of the outputs that are asked."""
        return shardings.everywhere(dot(row_squares(self.output), self.asked))


class Read(NamedTuple):
    """One reading of a unit, and the readers whose rows it has."""

    readers: tuple[Reader, ...]
    reading: Reading


def readings(
    problem: Problem, units: Units, state: State, forces: Mapping[int, Array]
) -> list[list[Read]]:
    """For each unit those of its readers."""
    nodes = _Nodes(problem, units, forces)
    found = []
    for unit in units.units:
        parts: dict[Any, list[Reader]] = {}
        for reader in unit.readers:
            if reader.wires is None:
                parts.setdefault(nodes.key(problem.graph.slots[reader.slot].node), []).append(
                    reader
                )
        own = [Read(tuple(readers), nodes.reading(key)) for key, readers in parts.items()]
        found.append(own + _entries(problem, unit, state))
    return found


def _entries(problem: Problem, unit: Unit, state: State) -> list[Read]:
    """The readings of what is read as entries: of all arrays of one shape."""
    pulled: dict[Any, dict[int, Array]] = {}
    parts: dict[Any, list[tuple[Reader, Array, Array]]] = {}
    for reader in unit.readers:
        wires = reader.wires
        if wires is None:
            continue
        if wires.tails not in pulled:
            forces = [problem.slot_force(problem.graph.slots[i], state) for i in wires.slots]
            pulled[wires.tails] = pull_together(wires.tails, forces, problem.values)
        target = wires.head.target
        value, force = problem.values[target], pulled[wires.tails][target]
        key = value.shape, value.dtype, force.dtype
        parts.setdefault(key, []).append((reader, value, force))
    found = []
    for group in parts.values():
        readers, values, forces = zip(*group, strict=True)
        found.append(Read(readers, _reading(joined(values), joined(forces))))
    return found


def joined(arrays: Sequence[Array], axis: int = 0) -> Array:
    """Arrays of rows as one, along a new axis of places if they are several."""
    return arrays[0] if len(arrays) == 1 else jnp.stack(arrays, axis)


class _Nodes:
    """The readings of layers: one for all nodes that the same units read in the same form."""

    def __init__(self, problem: Problem, units: Units, forces: Mapping[int, Array]) -> None:
        self._problem, self._forces = problem, forces
        self._matrices: dict[int, Matrix] = {}
        read_by: dict[int, set[int]] = {}
        for number, unit in enumerate(units.units):
            for reader in unit.readers:
                if reader.wires is None:
                    node = problem.graph.slots[reader.slot].node
                    read_by.setdefault(node, set()).add(number)
                    if reader.matrix is not None:
                        self._matrices.setdefault(node, reader.matrix)
        self._keys: dict[int, Any] = {}
        self._members: dict[Any, list[int]] = {}
        self._found: dict[Any, Reading] = {}
        for node, numbers in read_by.items():
            matrix, key = self._matrices.get(node), (node,)
            if matrix is not None and not isinstance(matrix.operation, Convolution):
                output = self._output(node)
                kind = output.shape, output.dtype
                key = (*sorted(numbers), matrix.side, matrix.blocks, matrix.columns, *kind)
            self._keys[node] = key
            self._members.setdefault(key, []).append(node)

    def key(self, node: int) -> Any:
        return self._keys[node]

    def reading(self, key: Any) -> Reading:
        if key not in self._found:
            members = self._members[key]
            matrix = self._matrices.get(members[0])
            blocks = 0 if matrix is None else len(matrix.blocks)
            both = zip(*map(self._rows, members), strict=True)
            self._found[key] = _reading(*(joined(part, blocks) for part in both))
        return self._found[key]

    def _output(self, node: int) -> Array:
        place = self._problem.graph.nodes[node].output
        assert place is not None
        return self._problem.values[place]

    def _rows(self, node: int) -> tuple[Array, Array]:
        """The output of a node and the force on it."""
        both, matrix = (self._output(node), self._forces[node]), self._matrices.get(node)
        return both if matrix is None else (matrix.outputs(both[0]), matrix.outputs(both[1]))


def _reading(output: Array, force: Array) -> Reading:
    if not force.ndim:
        force, output = force[None], output[None]
    of_rows = row_squares(force)
    asked = (of_rows > 0).astype(output.dtype)
    square, rows = (shardings.everywhere(total(part)) for part in (of_rows, asked))
    return Reading(output, force, asked, square, rows)


__all__ = ["Read", "Reading", "joined", "readings"]
