"""The forward pass of one batch, and what metric and rules need to know of it.

In come a layout and the arrays of a batch; out go the value of every variable, the reference point
of every node, and how much each row of each loss counts. A metric weighs slots by it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.backend import shardings
from pjax.graph import Node, Slot
from pjax.metrics import Weight
from pjax.problem.layouts import Layout
from pjax.program import pull_together, read, widened
from pjax.projections import scaling
from pjax.projections.gains import PowerIteration, largest
from pjax.rules import Reference

#: What there is to say where the power iterations of another problem were handed on.
OTHER_STATE = (
    "`state` belongs to another function, or to parameters or a batch of other shapes. Make one by "
    "`init` with these."
)
#: The least ratio of a reader's weight to the largest one: below it its entries would count as
#: read by nobody. The steps of a loop read one array with weights that differ by more than numbers
#: can; the force on an entry does not depend on a weight that is far below the largest.
_LEAST_RATIO = 2.0**-30


class LossRows(NamedTuple):
    """How much the rows of the losses count, by the index of each loss.

    **Attributes:**

    - `prox_steps`: `λ c`, what the proximal operator of each row is given.
    - `weights`: how firmly each row holds on to its prediction, relative to the largest of all.
    - `largest`: the largest coefficient of a row in the function's result.
    """

    prox_steps: dict[int, Any]
    weights: dict[int, Any]
    largest: Array


class ForwardPass:
    """The values of a batch at every node of a layout: what [`Metric.weigh`][] is given.

    **Arguments:**

    - `levels`: of a part: those of the whole that it is of.
    - `made`: values of variables that are there already.

    **Attributes:**

    - `values`: of every variable, in at least float32: what deviations are from.
    - `program_values`: the same in the program's own types.
    - `references`: for each node the values of its operands and its output.
    - `vectors`: for each slot where its power iteration begins, or None.
    - `rows`: see `LossRows`.
    """

    def __init__(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        consts: Sequence[Any],
        vectors: Sequence[Any] | None = None,
        levels: int | None = None,
        made: Mapping[int, Any] = {},
    ):
        self.layout = layout
        self.graph = layout.graph
        self.program_values = layout.graph.program.evaluate(leaves, consts, made)
        self.values = {number: _widened(value) for number, value in self.program_values.items()}
        self.readers = self.graph.readers()
        self.vectors = [None] * len(self.graph.slots) if vectors is None else list(vectors)
        if len(self.vectors) != len(self.graph.slots):
            raise ValueError(OTHER_STATE)
        #: Of a part: the weight with which the part behind holds on to what it is handed.
        self.behind: Weight | None = None
        self._levels, self._gains = levels, {}
        self.rows = self._count_rows()
        self.references = {node.index: self._reference(node) for node in self.graph.nodes}

    @property
    def loss(self) -> Array:
        """The function's value."""
        return jnp.asarray(read(self.program_values, self.graph.program.outputs[0]))

    @property
    def levels(self) -> int:
        """How many levels the graph has, or the whole that it is a part of."""
        return len(self.graph.level_groups()) if self._levels is None else self._levels

    @property
    def loss_weights(self) -> Mapping[int, Any]:
        """For each loss the weights of its rows, relative to the largest of all; for what stands
        for the readers in the part behind, their weight.
        """
        if self.behind is None or self.graph.exit is None:
            return self.rows.weights
        return {**self.rows.weights, self.graph.exit.node: self.behind}

    def held_by(self, behind: Weight) -> ForwardPass:
        """The same, of a part whose outputs the part behind holds with this weight."""
        found = copy.copy(self)
        found.behind = behind
        return found

    def data_of(self, slot: Slot) -> Any:
        """The value of the first operand that is data, of the node that a slot belongs to."""
        knowns = self.graph.nodes[slot.node].knowns
        return read(self.values, knowns[0]) if knowns else None

    def copies(self, slot: Slot) -> Any:
        """How many copies of each entry a slot stands for."""
        copies = self.layout.storages[slot.index].copies
        return copies if isinstance(copies, int) else jnp.asarray(copies, slot.dtype)

    def reader_weight(self, node: int, weights: Mapping[int, Weight]) -> Weight:
        """`W_v`: the weight with which the readers of a node hold on to its output.

        In a unit of its own: its exponent is the largest of the readers'.
        """
        slots = [self.graph.slots[i] for i in self.readers[node]]
        exponent = _largest([weights[slot.index].exponent for slot in slots])
        total: Any = 0.0
        pending: list[tuple[Slot, Array]] = []
        for slot in slots:
            mantissa, of_slot, *_ = weights[slot.index]
            weight = mantissa * self.copies(slot) * bounded_power(of_slot, exponent)
            if slot.route.direct:
                total = total + weight
                continue
            for producer, count in zip(slot.producers, self.layout.counts[slot.index], strict=True):
                if producer != node:
                    continue
                if count is None or jnp.ndim(weight):
                    full = jnp.broadcast_to(jnp.asarray(weight, slot.dtype), slot.shape)
                    pending.append((slot, full))
                    break
                total = total + weight * count
        for producer, part in self.pull(pending):
            if producer == node:
                total = total + part
        return Weight(total, exponent)

    def gains(self, wanted: Sequence[bool], iterations: int) -> tuple[list[Any], list[Any]]:
        """Bounds on the squared gain from each slot to its node's output.

        **Arguments:**

        - `wanted`: for each slot whether its bound is needed.
        - `iterations`: steps of the power iteration, where that is what finds it.

        **Returns:** the bounds, 0 where they are not wanted, and where power iterations end.
        """
        # A part is weighed again and again, until it knows what is behind it.
        key = tuple(wanted), iterations
        if key not in self._gains:
            self._gains[key] = self._find_gains(wanted, iterations)
        return self._gains[key]

    def _find_gains(self, wanted: Sequence[bool], iterations: int) -> tuple[list[Any], list[Any]]:
        bounds: list[Any] = [0.0] * len(self.graph.slots)
        ends: list[Any] = [None] * len(self.graph.slots)
        for node in self.graph.nodes:
            if node.kind == "loss":
                continue
            starts = [self.vectors[i] for i in node.slots]
            of_node = node.rule.gains(
                self.references[node.index], [wanted[i] for i in node.slots], starts
            )
            for slot, bound in zip(node.slots, of_node, strict=True):
                if wanted[slot]:
                    bounds[slot] = bound
        unfinished = [i for i, bound in enumerate(bounds) if isinstance(bound, PowerIteration)]
        for i in unfinished:
            start = bounds[i].start
            if start is not None and jnp.shape(start) != bounds[i].shape:
                raise ValueError(OTHER_STATE)
        results = largest([bounds[i] for i in unfinished], iterations)
        for slot, (bound, vector) in zip(unfinished, results, strict=True):
            bounds[slot], ends[slot] = bound, vector
        return [_bound_everywhere(bound) for bound in bounds], ends

    def pull(self, entries: Sequence[tuple[Slot, Array]]) -> list[tuple[int, Array]]:
        """What the entries of slots sum to for each of their producers: `(producer, part)`.

        Slots that share wiring are pulled at once: the steps of a loop read their entries of one
        array, whose transpose then is one array too.
        """
        parts: list[tuple[int, Array]] = []
        groups: list[list[tuple[Slot, Array]]] = []
        # For each group the producers of its sources. An identity stands for its producer in some
        # slots: those have a sum of their own.
        producers: list[dict[int, int]] = []
        group_of: dict[tuple[int, int], int] = {}
        for slot, value in entries:
            if slot.route.direct:
                parts.append((slot.producers[0], value))
                continue
            feeds = dict(zip(slot.route.sources, slot.producers, strict=True))
            keys = [
                (id(e), feeds[v])
                for e in slot.route.equations
                for v in e.inputs
                if isinstance(v, int) and v in feeds
            ]
            places = (group_of[key] for key in keys if key in group_of)
            place = next((p for p in places if _agree(producers[p], feeds)), len(groups))
            if place == len(groups):
                groups.append([])
                producers.append({})
            groups[place].append((slot, value))
            producers[place].update(feeds)
            group_of.update(dict.fromkeys(keys, place))
        for group, feeds in zip(groups, producers, strict=True):
            slots, values = zip(*group, strict=True)
            sums = pull_together([slot.route for slot in slots], values, self.values)
            parts += [(feeds[var], total) for var, total in sums.items()]
        return parts

    def _reference(self, node: Node) -> Reference:
        inner = None
        if node.inner is not None:
            variable, offset = node.inner
            inner = self.values[variable]
            if offset is not None:
                inner = inner - read(self.values, offset)
        return Reference(
            inputs=tuple(self.values[self.graph.slots[i].variable] for i in node.slots),
            knowns=tuple(read(self.values, atom) for atom in node.knowns),
            output=None if node.output is None else self.values[node.output],
            inner=inner,
            entries=tuple(self._entries(self.graph.slots[i]) for i in node.slots),
        )

    def _entries(self, slot: Slot) -> Array:
        """What a slot's value is broadcast from; the value, where it is more than that."""
        value, route = self.values[slot.variable], slot.route
        return self.values[route.sources[0]].astype(value.dtype) if route.even else value

    def _count_rows(self) -> LossRows:
        metric = self.layout.formulation.metric
        given = list(
            zip(self.graph.losses, self.graph.loss_coefficients(self.program_values), strict=True)
        )
        # Constraints have no part in the result: they move to their sets, whatever the step.
        free = {node.index: 1.0 for node, c in given if c is None}
        losses = [node for node, c in given if c is not None]
        coefficients = [c for _, c in given if c is not None]
        # A penalty on parameters has no rows of the batch, unless there is nothing else.
        pairs = list(zip(losses, coefficients, strict=True))
        counted = [c for node, c in pairs if self._reads_predictions(node)] or coefficients
        largest = _largest_size(counted)
        # All rows of the batch may count 0 while a penalty does not.
        every = _largest_size(coefficients)
        if isinstance(every, jax.Array):
            largest = jnp.where(largest > 0, largest, every)
        elif largest == 0:
            largest = every
        relative = [_over(c, largest) for c in coefficients]
        counts = relative if metric.row_weights == "relative" else coefficients
        indices = [node.index for node in losses]
        return LossRows(
            free | {i: metric.prox_step * c for i, c in zip(indices, counts, strict=True)},
            free | {i: _row_weights(c) for i, c in zip(indices, relative, strict=True)},
            jnp.asarray(largest),
        )

    def _reads_predictions(self, node: Node) -> bool:
        return any(self.graph.slots[i].kind == "activation" for i in node.slots)


def power_between(exponent: Any, other: Any) -> Any:
    """`2**(exponent − other)`; a plain 1 where the two are known to be the same."""
    return 1.0 if exponent is other else scaling.power(exponent - other)


def bounded_power(exponent: Any, largest: Any) -> Any:
    """`2**(exponent − largest)`, the ratio of a reader's weight to the largest, bounded below."""
    ratio = power_between(exponent, largest)
    if isinstance(ratio, float):
        return max(ratio, _LEAST_RATIO)
    return jnp.maximum(ratio, _LEAST_RATIO)


def _agree(feeds: Mapping[int, int], others: Mapping[int, int]) -> bool:
    """Whether no source has two producers."""
    return all(feeds.get(var, producer) == producer for var, producer in others.items())


def _widened(value: Any) -> Any:
    dtype = getattr(value, "dtype", None)
    if dtype is None or widened(dtype) == dtype:
        return value
    return value.astype(widened(dtype))


def _largest(exponents: Sequence[Any]) -> Any:
    largest = exponents[0]
    for exponent in exponents[1:]:
        if isinstance(largest, (int, float)) and isinstance(exponent, (int, float)):
            largest = max(largest, exponent)
        else:
            largest = jnp.maximum(largest, exponent)
    return largest


def _largest_size(coefficients: Sequence[Any]) -> Any:
    """The largest size of losses' coefficients; a plain number where that is known."""
    if all(not isinstance(c, jax.Array) for c in coefficients):
        return max(float(np.max(np.abs(c))) for c in coefficients)
    return jnp.max(jnp.stack([jnp.max(jnp.abs(c)) for c in coefficients]))


def _over(coefficient: Any, largest: Any) -> Any:
    """A loss's coefficients over the largest of all; a plain 1 where that is known to be so."""
    if isinstance(coefficient, jax.Array) or isinstance(largest, jax.Array):
        return coefficient / jnp.where(largest > 0, largest, 1)
    ratio = np.asarray(coefficient / (largest if largest > 0 else 1))
    return float(ratio) if ratio.ndim == 0 else ratio


def _row_weights(counts: Any) -> Any:
    """How firmly the rows of a loss hold on to their predictions, from how much each counts.

    A row holds by the size of its count. A loss of which no row counts asks for nothing, whatever
    it weighs; with a weight of 0 nothing behind it would have a unit.
    """
    size = abs(counts)
    if not isinstance(size, jax.Array) and np.ndim(size) == 0:
        return size if size > 0 else 1.0
    size = jnp.where(jnp.max(size) > 0, size, 1)
    return size[..., None] if size.ndim else size


def _bound_everywhere(bound: Any) -> Any:
    """A bound that holds on all devices; a plain number is known, and one."""
    return bound if isinstance(bound, (int, float)) else shardings.largest_everywhere(bound)
