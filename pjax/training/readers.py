"""How the nodes of a graph read each parameter: the rows behind a solve for it.

From a graph to its *units*: arrays that are solved for at once, each over all its readers. A unit
is a parameter, or what a threshold makes of parameters (`sign(W)`), which the layers read in their
place. In `x @ w + b` the unit `w` has one reader, the layer, with the rows of `x`; the unit `b` has
the same layer for a reader, with rows of ones. In a loop each step is a reader.

A reader is one of three kinds:

- *product*: a matrix or kernel in a product of a layer. `JᵀJ` is `XᵀX` for each column.
- *linear*: any other operand of a layer: a bias, the scale of a norm. `JᵀJ` is bounded by a
  diagonal.
- *entries*: what is read in any other way is asked for a move of its own entries, wherever they
  are read: an embedding's rows, an operand of a function. All that reads them through the same
  wiring is one reader: of `embedding[tokens]`, that the steps of a loop have parts of, the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.backend import device
from pjax.graph import Graph, Slot, feeds_thresholds, latent_nodes
from pjax.program import Equation, Program, Route
from pjax.projections.products.convolution import Convolution
from pjax.projections.products.dot_general import DotGeneral
from pjax.projections.products.operation import Bilinear, Side, inverse
from pjax.projections.products.rows import moment, trace
from pjax.rules import Addend, LayerSum, Product, Rule, Threshold

Kind = Literal["product", "linear", "entries"]


@dataclass(frozen=True)
class Matrix:
    """One operand of a product as matrices: blocks × rows × columns.

    Of `x @ w` the rows of the operand `w` are contracted with `x`, and its columns are the outputs.
    A batched product has such a matrix for each batch index, a block; else there is no such axis.

    **Attributes:**

    - `operation`, `side`: the product, and which operand it is.
    - `axes`: the operand's axes in the order blocks, rows, columns.
    - `blocks`: their number, or nothing.
    - `rows`, `columns`: of each.
    """

    operation: Bilinear
    side: Side
    axes: tuple[int, ...]
    blocks: tuple[int, ...]
    rows: int
    columns: int

    def of(self, operand: Array) -> Array:
        """The operand, `[*blocks, rows, columns]`."""
        ordered = jnp.transpose(operand, self.axes)
        return ordered.reshape(*self.blocks, self.rows, self.columns)

    def back(self, matrix: Array) -> Array:
        """The operand that a matrix stands for."""
        shape = self._operand_shape
        ordered = matrix.reshape([shape[axis] for axis in self.axes])
        return jnp.transpose(ordered, inverse(self.axes))

    @property
    def _operand_shape(self) -> tuple[int, ...]:
        op = self.operation
        return op.left_shape if self.side == "left" else op.right_shape

    def outputs(self, output: Array) -> Array:
        """The product's output, `[*blocks, *places, columns]`: a row for each that is asked."""
        if isinstance(self.operation, Convolution):
            return self._channels_last(output)
        places = [self._other_shape[axis] for axis in self._places]
        if self.side == "right":
            return output.reshape(*self.blocks, *places, self.columns)
        output = output.reshape(*self.blocks, self.columns, *places)
        return jnp.moveaxis(output, len(self.blocks), -1)

    def _channels_last(self, output: Array) -> Array:
        assert isinstance(self.operation, Convolution)
        return jnp.moveaxis(output, self.operation.dimension_numbers[2][1], -1)

    @property
    def _other_shape(self) -> tuple[int, ...]:
        op = self.operation
        return op.right_shape if self.side == "left" else op.left_shape

    @property
    def _other_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the other operand of a `dot_general`: the contracted axes and those of the batch."""
        assert isinstance(self.operation, DotGeneral)
        (left, right), (batch_l, batch_r) = self.operation.dimension_numbers
        return (right, batch_r) if self.side == "left" else (left, batch_l)

    @property
    def _places(self) -> list[int]:
        """The other axes of the other operand."""
        contracted, batch = self._other_axes
        return [a for a in range(len(self._other_shape)) if a not in (*contracted, *batch)]

    def inputs(self, other: Array) -> Array:
        """The other operand of a `dot_general`, `[*blocks, *places, rows]`."""
        contracted, batch = self._other_axes
        ordered = jnp.transpose(other, (*batch, *self._places, *contracted))
        places = [self._other_shape[axis] for axis in self._places]
        return ordered.reshape(*self.blocks, *places, self.rows)

    def moment(self, other: Array, asked: Array, directions: Array) -> Array:
        """`XᵀX U` over the places that are asked, `[*blocks, rows, k]`.

        **Arguments:**

        - `other`: the other operand.
        - `asked`: `[*blocks, *places, 1]`, 1 where a place counts.
        - `directions`: `U`, `[*blocks, rows, k]`.
        """
        if not isinstance(self.operation, Convolution):
            return moment(self.inputs(other), directions, asked)
        # A kernel whose output channels are the directions.
        op, count = self.operation, directions.shape[-1]
        spec, channel = op.dimension_numbers[1], op.dimension_numbers[2][1]
        shape = tuple(count if a == spec[0] else n for a, n in enumerate(op.right_shape))
        narrow = replace(op, right_shape=shape)
        kernel = directions.reshape([shape[axis] for axis in self.axes])
        places = jnp.moveaxis(narrow(other, jnp.transpose(kernel, inverse(self.axes))), channel, -1)
        places = places * asked
        back = narrow.transpose_right(jnp.moveaxis(places, -1, channel), other)
        return jnp.transpose(back, self.axes).reshape(directions.shape)

    def trace(self, other: Array, asked: Array) -> Array:
        """`tr XᵀX` over the places that are asked, for each block."""
        if isinstance(self.operation, Convolution):
            squares = self._channels_last(self.operation.left_energy(jnp.square(other)))
            return jnp.sum(squares[..., 0] * asked[..., 0])
        return trace(self.inputs(other), len(self.blocks), asked)


def matrix_of(operation: Bilinear, side: Side) -> Matrix | None:
    """An operand of a product as matrices; None where it is not one."""
    if isinstance(operation, DotGeneral):
        (left, right), (batch_l, batch_r) = operation.dimension_numbers
        shape, contracted, batch = (
            (operation.left_shape, left, batch_l)
            if side == "left"
            else (operation.right_shape, right, batch_r)
        )
        free = tuple(a for a in range(len(shape)) if a not in (*contracted, *batch))
        axes = (*batch, *contracted, *free)
        blocks, *sizes = (math.prod(shape[a] for a in part) for part in (batch, contracted, free))
        return Matrix(operation, side, axes, (blocks,) if batch else (), *sizes)
    if isinstance(operation, Convolution) and side == "right":
        if operation.feature_group_count * operation.batch_group_count > 1:
            return None
        channel, shape = operation.dimension_numbers[1][0], operation.right_shape
        axes = (*(a for a in range(len(shape)) if a != channel), channel)
        columns = shape[channel]
        return Matrix(operation, side, axes, (), math.prod(shape) // columns, columns)
    return None


@dataclass(frozen=True, eq=False)
class Wires:
    """The wiring through which slots read entries of a unit.

    **Attributes:**

    - `head`: the way from the unit to an array of which all slots have parts.
    - `slots`: by index.
    - `tails`: the way to each, from this array and others that wiring makes of the unit; these
        share them.
    """

    head: Route
    slots: tuple[int, ...]
    tails: tuple[Route, ...]


@dataclass(frozen=True)
class Reader:
    """One way in which a unit is read.

    **Attributes:**

    - `slot`: the index of the slot that reads it; of entries, of one of them.
    - `kind`: see the module.
    - `place`: of a layer's operand, the number of the slot among the node's.
    - `matrix`: of a product.
    - `wires`: of entries.
    """

    slot: int
    kind: Kind
    place: int
    matrix: Matrix | None = None
    wires: Wires | None = None


@dataclass(frozen=True)
class Unit:
    """What is solved for at once.

    **Attributes:**

    - `node`: the index of the node whose output it is.
    - `readers`: all that reads it.
    - `layer`: the number of its layer: a weight and its bias are one.
    - `matrix`: the form of its solve, of the first product that reads it; None: entry by entry.
    - `slot`: the slot of that product.
    - `thresholds`: whether only thresholds read what its readers make.
    - `hidden`: whether activations, and no data, are the input that it is multiplied with.
    - `reads_thresholds`: whether thresholds make that input.
    - `latent`: whether it is what a threshold makes of parameters.
    """

    node: int
    readers: tuple[Reader, ...]
    layer: int
    matrix: Matrix | None
    slot: int | None
    thresholds: bool = False
    hidden: bool = False
    reads_thresholds: bool = False
    latent: bool = False


class Units(NamedTuple):
    """The units of a graph, and how many layers they form."""

    units: tuple[Unit, ...]
    layers: int


def find_units(graph: Graph) -> Units:
    """The units of a graph in layer splitting."""
    latent = latent_nodes(graph)
    reading: dict[int, list[Slot]] = {}
    for slot in graph.slots:
        if slot.node in latent or graph.nodes[slot.node].kind == "identity":
            continue
        for producer in dict.fromkeys(slot.producers):
            if graph.nodes[producer].kind == "parameter" or producer in latent:
                reading.setdefault(producer, []).append(slot)
    readers = {node: tuple(_reader(graph, slot, node) for slot in slots)
               for node, slots in reading.items()}  # fmt: skip
    # Units are one layer if a node reads both as operands: all steps of a loop belong together.
    layer_of: dict[Any, Any] = {}

    def root(key: Any) -> Any:
        while layer_of.setdefault(key, key) != key:
            key = layer_of[key]
        return key

    for node, found in readers.items():
        for reader in found:
            if reader.kind != "entries":
                layer_of[root(("unit", node))] = root(("node", graph.slots[reader.slot].node))
    numbers: dict[Any, int] = {}
    units = []
    for node in sorted(readers):
        layer = numbers.setdefault(root(("unit", node)), len(numbers))
        first = next((r for r in readers[node] if r.kind == "product"), None)
        kept = tuple(_consistent(graph, r, first) for r in readers[node])
        slot = None if first is None else first.slot
        blind = all(feeds_thresholds(graph, graph.slots[r.slot].node) for r in kept)
        inputs = [] if slot is None else _activations_beside(graph, graph.slots[slot])
        reads = any(all(isinstance(r, Threshold) for r in rules) for rules in inputs)
        kept = (*(r for r in kept if r.kind != "entries"), *_entry_readers(graph, node, kept))
        units.append(
            Unit(
                node,
                kept,
                layer,
                first and first.matrix,
                slot,
                blind,
                bool(inputs),
                reads,
                node in latent,
            )
        )
    return Units(tuple(units), len(numbers))


def _activations_beside(graph: Graph, slot: Slot) -> list[list[Rule]]:
    """For each activation that is an operand of the node beside a slot, the rules that make it."""
    return [
        [graph.nodes[producer].rule for producer in other.producers]
        for other in (graph.slots[i] for i in graph.nodes[slot.node].slots)
        if other is not slot and other.kind == "activation"
    ]


def _reader(graph: Graph, slot: Slot, producer: int) -> Reader:
    node = graph.nodes[slot.node]
    place = node.slots.index(slot.index)
    rule = node.rule
    if not isinstance(rule, LayerSum) or slot.producers != (producer,) or not slot.route.even:
        return Reader(slot.index, "entries", place)
    term, side = operand_at(rule, place)
    if isinstance(term, Product):
        matrix = matrix_of(term.operation, side)
        if matrix is not None and _size(graph, slot) == math.prod(slot.shape):
            return Reader(slot.index, "product", place, matrix)
    return Reader(slot.index, "linear", place)


def _entry_readers(graph: Graph, producer: int, readers: Sequence[Reader]) -> list[Reader]:
    """The readers of entries: one for each array that wiring makes of them."""
    reading: dict[int, list[Slot]] = {}
    for slot in (graph.slots[reader.slot] for reader in readers if reader.kind == "entries"):
        for variable, source in zip(slot.route.sources, slot.producers, strict=True):
            if source == producer:
                reading.setdefault(variable, []).append(slot)
    found = []
    for variable, slots in reading.items():
        heads = _heads(graph.program, variable, slots)
        indices = tuple(slot.index for slot in slots)
        tails = tuple(_tail(slot.route, variable, heads) for slot in slots)
        for head in heads:
            found.append(Reader(indices[0], "entries", 0, wires=Wires(head, indices, tails)))
    return found


def _heads(program: Program, variable: int, slots: Sequence[Slot]) -> list[Route]:
    """The ways from a variable to the arrays that slots have parts of."""
    readers: dict[int, dict[Equation, None]] = {}
    for slot in slots:
        for equation in slot.route.equations:
            for atom in equation.inputs:
                if isinstance(atom, int):
                    readers.setdefault(atom, {})[equation] = None
    ends = {slot.route.target for slot in slots}

    def follow(step: Equation, target: int) -> list[Equation] | None:
        """This wire and those behind it; None if it makes several arrays, or of several ones."""
        others = (a for a in step.inputs if isinstance(a, int) and a != target)
        if len(step.outputs) != 1 or any(map(program.is_variable, others)):
            return None
        (output,) = step.outputs
        steps = list(readers.get(output, ()))
        more = follow(steps[0], output) if len(steps) == 1 and output not in ends else None
        return [step, *(more or ())]

    ways = [follow(step, variable) for step in readers.get(variable, ())]
    if variable in ends or not all(ways):
        return [Route(program, (variable,), (), variable)]
    return [Route(program, (variable,), tuple(way), way[-1].outputs[0]) for way in ways if way]


def _tail(route: Route, source: int, heads: Sequence[Route]) -> Route:
    """A route from where the heads of its source end."""
    done = {equation for head in heads for equation in head.equations}
    equations = tuple(equation for equation in route.equations if equation not in done)
    read = {atom for equation in equations for atom in equation.inputs if isinstance(atom, int)}
    ends = [head.target for head in heads if head.target in read | {route.target}]
    sources = (*ends, *(variable for variable in route.sources if variable != source))
    return replace(route, sources=sources, equations=equations)


def _size(graph: Graph, slot: Slot) -> int:
    return math.prod(graph.program.shape(slot.route.sources[0]))


def _consistent(graph: Graph, reader: Reader, first: Reader | None) -> Reader:
    """The reader, as a linear one if its matrix has other rows than the first one's."""
    if reader.kind != "product" or first is None or reader is first:
        return reader
    if _layout(graph, reader) == _layout(graph, first):
        return reader
    return Reader(reader.slot, "linear", reader.place)


def _layout(graph: Graph, reader: Reader) -> Any:
    """Which entry of the unit stands where in the matrix; equal for equal views of it."""
    slot, matrix = graph.slots[reader.slot], reader.matrix
    assert matrix is not None
    key = matrix.axes, matrix.blocks, matrix.rows, matrix.columns
    if slot.route.direct:
        return key, None
    source = slot.route.sources[0]

    def numbers() -> Any:
        shape = graph.program.shape(source)
        index = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
        return matrix.of(slot.route([index], {}))

    return key, np.asarray(device.run_once(numbers)).tobytes()


def operand_at(rule: LayerSum, place: int) -> tuple[Product | Addend, Side]:
    """The term of a layer that has its slot number `place`, and on which side."""
    count = 0
    for term in rule.terms:
        if isinstance(term, Addend):
            if count == place:
                return term, "left"
            count += 1
            continue
        sides: Sequence[tuple[Side, bool]] = (("left", term.left), ("right", term.right))
        for side, free in sides:
            if free:
                if count == place:
                    return term, side
                count += 1
    raise IndexError(place)


__all__ = [
    "Matrix", "Reader", "Unit", "Units", "Wires", "find_units", "matrix_of", "operand_at",
]  # fmt: skip
