"""Divide and concur: all operations are one set, and that they agree is the other.

Where [`pjax.Problem`][] keeps the operands of operations and gives the nodes two colours, here
every
operation has its output too. So all operations are projected at once, each on values of its own,
and what is left is linear: the values that stand for one number agree. What else must hold of that
number joins that set: parameters lie in sets, predictions are labels, data is data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from pjax.graph import Node
from pjax.options import Grouping
from pjax.problem.forward import ForwardPass
from pjax.problem.layouts import Layout
from pjax.program import TraceError, read
from pjax.rules import Dense, Lifted, Loss, SignedProduct, Storage
from pjax.sets import Set


class Copies(NamedTuple):
    """A state: deviations of the values that operations hold from the forward pass.

    **Attributes:**

    - `operands`: for each operation its operands, each in the form of its storage.
    - `outputs`: for each operation its output.
    """

    operands: tuple[tuple[Array, ...], ...]
    outputs: tuple[Array, ...]


@dataclass(frozen=True)
class Operand:
    """An operand of an operation: where its agreement comes from.

    **Attributes:**

    - `storage`: how its copies are kept.
    - `slot`: the slot of the graph, or None for data.
    """

    storage: Storage
    slot: int | None


class DividedProblem:
    """The two sets of a program: its operations (0), and their agreement (1).

    As `Sets` of `pjax.solvers` for solvers of two sets; distances have weight 1 for every
    value that an operation holds, times the weight of the constraint.

    **Arguments:**

    - `layout`: in neuron splitting, its groups levels.
    - `leaves`, `consts`: of the program: the parameters that deviations are from, and data.
    - `sets`: for each leaf its set, or None; nothing where there are none.

    **Raises:** `TraceError` for a loss that no prediction makes 0, or that does not read the output
    of one operation as it is.
    """

    def __init__(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        consts: Sequence[Any],
        sets: Sequence[Set | None] = (),
    ):
        graph = layout.graph
        self.graph, self.leaves = graph, list(leaves)
        self.sets = tuple(sets) or (None,) * len(leaves)
        self._forward = ForwardPass(layout, leaves, consts)
        self.values = self._forward.values
        self.nodes = [node for node in graph.nodes if node.kind == "operation"]
        self.operands = [_operands(node) for node in self.nodes]
        counts = graph.loss_coefficients(self._forward.program_values)
        self.labels: dict[int, tuple[_Label, Any]] = {}
        for node, count in zip(graph.losses, counts, strict=True):
            label = self._label(node)
            if label.producer in self.labels:
                raise TraceError(
                    f"`{node.name}` ({node.source}) is the second loss of one prediction: its "
                    "labels can be one constraint only."
                )
            if not isinstance(count, Tracer) and np.any(np.asarray(count) < 0):
                raise TraceError(
                    f"`{node.name}` ({node.source}) counts negatively: a constraint has no sign."
                )
            self.labels[label.producer] = label, count
        #: The weights of constraints, one array or number for each operation.
        self.weights: tuple[Array, ...] = self.even_weights()

    # What solvers ask for.

    @property
    def num_groups(self) -> int:
        return 2

    @property
    def loss(self) -> Array:
        """The function's value in the forward pass."""
        return self._forward.loss

    def require(self, grouping: Grouping, reflecting: bool) -> None:
        """Raises `ValueError` for a solver that goes around levels of a graph."""
        if grouping != "colours":
            raise ValueError(
                "The operations of a divided problem and their agreement are two sets, and the "
                f"solver projects onto {grouping}: take one of two sets, such as "
                "`pjax.solvers.DouglasRachford`."
            )

    def initial(self) -> Copies:
        """The forward pass: every deviation 0."""
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes())

    def shapes(self) -> Any:
        """The shapes of a state, in its structure."""
        found = jax.eval_shape(
            lambda: tuple(
                tuple(o.storage.fill(self._value(node, o)) for o in operands)
                for node, operands in zip(self.nodes, self.operands, strict=True)
            )
        )
        outputs: Any = tuple(
            jax.ShapeDtypeStruct(self._output(n).shape, self._output(n).dtype) for n in self.nodes
        )
        return Copies(found, outputs)

    def random(self, key: Array, spread: float = 1.0) -> Copies:
        """A state whose values, not deviations, are drawn evenly from `[−spread, spread]`."""
        shapes, structure = jax.tree.flatten(self.shapes())
        keys = jax.random.split(key, len(shapes))
        largest = max(math.prod(s.shape) for s in shapes)
        dtype = jnp.result_type(*(s.dtype for s in shapes))
        # One kernel for all: XLA takes a second for each array that is drawn by its own.
        whole = jax.vmap(lambda k: jax.random.uniform(k, (largest,), dtype, -spread, spread))(keys)
        drawn = [
            numbers[: math.prod(s.shape)].reshape(s.shape).astype(s.dtype)
            for numbers, s in zip(whole, shapes, strict=True)
        ]
        return self.difference(jax.tree.unflatten(structure, drawn), self._reference())

    def project(self, group: int, state: Copies) -> Copies:
        """The nearest point of the operations (0) or of their agreement (1)."""
        return self._operate(state) if group == 0 else self.agree(state)[0]

    def difference(self, a: Copies, b: Copies) -> Copies:
        """`a − b`."""
        return jax.tree.map(jnp.subtract, a, b)

    def distance(self, a: Copies, b: Copies) -> Float[Array, ""]:
        """`(Σ g |a − b|²)^½` with the weights `g` of the constraints."""
        gaps = self.gaps(a, b)
        return jnp.sqrt(sum(jnp.sum(w * gap) for w, gap in zip(self.weights, gaps, strict=True)))

    # Weights of constraints.

    def even_weights(self) -> tuple[Array, ...]:
        """1 for each constraint."""
        return tuple(jnp.ones(s.shape, s.dtype) for s in map(self._constraints, self.nodes))

    def weighted(self, weights: Sequence[Array]) -> DividedProblem:
        """The same problem with other weights of its constraints."""
        new = copy.copy(self)
        new.weights = tuple(weights)
        return new

    def gaps(self, a: Copies, b: Copies) -> tuple[Array, ...]:
        """`|a − b|²` over the values of each constraint: of each scalar product, and of each other
        operation.
        """
        found = []
        for place, node in enumerate(self.nodes):
            total = jnp.square(a.outputs[place] - b.outputs[place])
            parts = [
                jnp.square(x - y) for x, y in zip(a.operands[place], b.operands[place], strict=True)
            ]
            if isinstance(node.rule, SignedProduct):
                found.append(total + sum(jnp.sum(part, axis=-1) for part in parts))
            else:
                found.append(jnp.sum(total) + sum(jnp.sum(part) for part in parts))
        return tuple(found)

    # The sets.

    def _operate(self, state: Copies) -> Copies:
        operands, outputs = [], []
        for node, copies, output in zip(self.nodes, state.operands, state.outputs, strict=True):
            reference = self._forward.references[node.index]
            # Within a constraint all weights are the same, and move nothing.
            moved, made = node.rule.project(reference, copies, (1.0,) * len(copies), output, 1.0)
            operands.append(moved)
            outputs.append(made)
        return Copies(tuple(operands), tuple(outputs))

    def agree(self, state: Copies) -> tuple[Copies, dict[int, Array]]:
        """The nearest state whose values agree, and the deviations of all nodes' outputs."""
        sums: dict[int, list[tuple[Array, Array]]] = {}
        for place, (node, operands) in enumerate(zip(self.nodes, self.operands, strict=True)):
            weight = self.weights[place]
            sums.setdefault(node.index, []).append(
                (
                    weight * state.outputs[place],
                    jnp.broadcast_to(weight, state.outputs[place].shape),
                )
            )
            for operand, copies in zip(operands, state.operands[place], strict=True):
                if operand.slot is None:
                    continue
                slot = self.graph.slots[operand.slot]
                totals = _totals(operand.storage, weight, copies, slot.shape)
                parts = [slot.route.pull(total, self.values) for total in totals]
                for producer, *pair in zip(slot.producers, *parts, strict=True):
                    sums.setdefault(producer, []).append(tuple(pair))
        agreed = {index: self._agreed(index, pairs) for index, pairs in sums.items()}
        operands = tuple(
            tuple(self._given(node, operand, agreed) for operand in of_node)
            for node, of_node in zip(self.nodes, self.operands, strict=True)
        )
        return Copies(operands, tuple(agreed[node.index] for node in self.nodes)), agreed

    def _agreed(self, index: int, pairs: Sequence[tuple[Array, Array]]) -> Array:
        node = self.graph.nodes[index]
        value = self._output(node)
        total, weight = (sum(parts[1:], start=parts[0]) for parts in zip(*pairs, strict=True))
        mean = total / jnp.where(weight > 0, weight, 1)
        if index in self.labels:
            label, count = self.labels[index]
            nearest = label.rule.satisfied(value + mean, *label.knowns)
            assert nearest is not None
            wanted = nearest - value
            # A row that does not count has no label.
            counts = jnp.asarray(count) > 0
            return jnp.where(counts[..., None] if counts.ndim else counts, wanted, mean)
        assert node.output is not None
        one = self.sets[node.output] if node.kind == "parameter" else None
        return mean if one is None else one.project(value + mean).astype(value.dtype) - value

    def _given(self, node: Node, operand: Operand, agreed: dict[int, Array]) -> Array:
        if operand.slot is None:  # data is what it is
            return operand.storage.fill(jnp.zeros_like(self._value(node, operand)))
        slot = self.graph.slots[operand.slot]
        return operand.storage.fill(
            slot.route([agreed[producer] for producer in slot.producers], self.values)
        )

    def parameters(self, agreed: dict[int, Array]) -> list[Array]:
        """The leaves, moved to where the readers of each agree."""
        found = list(self.leaves)
        for node in self.graph.parameters:
            if node.index in agreed:
                assert node.output is not None
                leaf = self.leaves[node.output]
                found[node.output] = (leaf + agreed[node.index]).astype(leaf.dtype)
        return found

    # Values of the forward pass.

    def _output(self, node: Node) -> Array:
        assert node.output is not None
        return self.values[node.output]

    def _value(self, node: Node, operand: Operand) -> Array:
        if operand.slot is not None:
            return self.values[self.graph.slots[operand.slot].variable]
        (known,) = node.knowns
        return jnp.asarray(read(self.values, known))

    def _reference(self) -> Copies:
        return Copies(
            tuple(
                tuple(o.storage.fill(self._value(node, o)) for o in operands)
                for node, operands in zip(self.nodes, self.operands, strict=True)
            ),
            tuple(map(self._output, self.nodes)),
        )

    def _constraints(self, node: Node) -> jax.ShapeDtypeStruct:
        output = self._output(node)
        shape = output.shape if isinstance(node.rule, SignedProduct) else ()
        return jax.ShapeDtypeStruct(shape, output.dtype)

    def _label(self, node: Node) -> _Label:
        (slot,) = (self.graph.slots[i] for i in node.slots)
        producer = self.graph.nodes[slot.producers[0]]
        knowns = tuple(read(self.values, atom) for atom in node.knowns)
        if not isinstance(node.rule, Loss) or (
            node.rule.satisfied(self.values[slot.variable], *knowns) is None
        ):
            raise TraceError(
                f"`{node.name}` ({node.source}) names no prediction that satisfies it. Where "
                "labels are constraints take `pjax.squared_error(prediction, labels)` or "
                "`pjax.margin_loss`."
            )
        if not slot.route.direct or producer.kind != "operation":
            raise TraceError(
                f"`{node.name}` ({node.source}) must read the output of one operation as it is, "
                "without reshaping or slicing it."
            )
        return _Label(node.rule, knowns, producer.index)


class _Label(NamedTuple):
    rule: Loss
    knowns: tuple[Array, ...]
    producer: int


def _operands(node: Node) -> tuple[Operand, ...]:
    rule = node.rule
    if isinstance(rule, SignedProduct):
        slots = iter(node.slots)
        return tuple(
            Operand(storage, next(slots) if free else None)
            for storage, free in zip(rule.all_storages(), rule.free, strict=True)
        )
    storages = rule.storages(True, (True,) * len(node.slots))
    return tuple(Operand(s, i) for s, i in zip(storages, node.slots, strict=True))


def _totals(
    storage: Storage, weight: Array, copies: Array, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """`Σ g·copy` and `Σ g` over the copies of each entry of an operand."""
    if isinstance(storage, Dense):
        return weight * copies, jnp.broadcast_to(weight, shape)
    assert isinstance(storage, Lifted)
    op = storage.operation
    lower = op.lower_left if storage.side == "left" else op.lower_right
    weight = weight[..., None] if weight.ndim else weight
    weight = op.mask_slices(jnp.broadcast_to(weight, copies.shape))
    return lower(weight * copies), lower(weight)
