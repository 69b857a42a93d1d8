"""Equal layers side by side: the problem of a network whose layers are one part, many times.

`last(layer(… layer(first(x))), y)` is three programs: what is before the layers, a layer, what is
behind. Each is a graph of its own with open ends (`pjax.graph.Ends`). What one part hands on is a
node; its readers are in the part behind, where the same node is the last leaf. In a projection the
weighted mean of these readers goes back to the node, and its new output goes forward to them. That
is all that layers tell each other, so that each may be on a device of its own.

The code is that of one layer; `jax.vmap` makes it that of all on a device, and
[`Neighbours`][pjax.backend.neighbours.Neighbours] has what they exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjax.backend.neighbours import Neighbours
from pjax.graph import Graph, Node, Slot
from pjax.metrics import Metric, Weight
from pjax.options import Grouping
from pjax.problem import moves, projection, state
from pjax.problem.consensus import Consensus
from pjax.problem.forward import ForwardPass
from pjax.problem.state import State
from pjax.problem.weights import Weights


class Parts(NamedTuple):
    """Something for each part of a network: what is before the layers, a layer, what is behind.

    A state is one of three states.
    """

    first: Any
    layer: Any
    last: Any


class _Part:
    """One part: its projections, in two halves, between which neighbours exchange outputs."""

    def __init__(self, forward: ForwardPass):
        self.layout, self.graph = forward.layout, forward.graph
        self.entry, self.exit = self.graph.entry, self.graph.exit
        self.weights = Weights(forward)
        self.consensus = Consensus(self.weights)

    def initial(self) -> State:
        return self.closed(state.zero(self.layout))

    def unmoved(self) -> State:
        return self.closed(state.unmoved(self.layout))

    def closed(self, point: State) -> State:
        """Without what stands for the readers in the part behind: that is no value of this part."""
        if self.exit is None:
            return point
        slots = list(point.slots)
        slots[self.exit.index] = None
        return State(tuple(slots))

    def asked(self, point: State) -> Array:
        """The weighted mean of the readers of what the part before hands on."""
        node = _entry(self.graph).index
        return self.consensus.targets((node,), point)[node]

    def move(
        self, group: int, point: State, asked: Array | None = None
    ) -> tuple[State, dict[int, Array]]:
        """The nodes of a group projected, and their outputs, which are not written yet.

        **Arguments:**

        - `asked`: the weighted mean of the readers in the part behind, where it asks this group.
        """
        if asked is not None:
            slots = list(point.slots)
            slots[_exit(self.graph).index] = asked
            point = State(tuple(slots))
        others = {self.entry.index} if self.entry is not None else set()
        others |= {self.exit.node} if self.exit is not None else set()
        members = [index for index in self.layout.groups[group] if index not in others]
        targets = self.consensus.targets(members, point)
        return projection.project_nodes(self.weights, members, point, targets)

    def handed_on(self, outputs: Mapping[int, Array]) -> Array:
        """What the part behind reads of the outputs."""
        return self.consensus.routed(_exit(self.graph), outputs)

    def written(
        self,
        group: int,
        before: State,
        moved: tuple[State, dict[int, Array]],
        came: Array | None = None,
    ) -> State:
        """The state in which all readers have the outputs of a group.

        **Arguments:**

        - `came`: what the part before hands on, where it is of this group.
        """
        new, outputs = moved
        if came is not None:
            outputs = {**outputs, _entry(self.graph).index: came}
        members = self.layout.groups[group]
        return self.closed(projection.written(self.consensus, members, before, new, outputs))

    def difference(self, a: State, b: State) -> State:
        return self.closed(state.difference(self.layout, a, b))

    def squared_distance(self, a: State, b: State) -> Array:
        return state.squared_distance(self.weights, a, b)

    def deviations(self, point: State) -> list[Array | None]:
        """How far each parameter has moved."""
        found = moves.parameter_deviations(self.consensus, point)
        return found[:-1] if self.graph.ends.input else found


class StackedProblem:
    """The sets of a network of equal layers, as [`Sets`][pjax.solvers.solver.Sets] of a solver over
    two colours; written for one layer.

    **Arguments:**

    - `row`: how layers lie on devices.
    - `number`: of the layer on its device; `jax.vmap` maps it.
    - `count`: how many layers there are.
    - `passes`: the forward passes of the parts, that of `layer` of this layer.
    """

    def __init__(self, row: Neighbours, number: Array, count: int, passes: Parts):
        self.row, self.number = row, number
        self._formulation = passes.layer.layout.formulation
        of_layer, of_first = _readers(row, number, count, passes)
        self.parts = Parts(
            _Part(passes.first.held_by(of_first)),
            _Part(passes.layer.held_by(of_layer)),
            _Part(passes.last),
        )
        #: The group of the nodes that hand something on.
        self._edge = 0 if self._formulation.ends.colour == "A" else 1
        self.loss: Array = row.over_devices(row.at_end(lambda: passes.last.loss))

    # What a solver calls.

    @property
    def num_groups(self) -> int:
        """Two: the colours."""
        return 2

    def require(self, grouping: Grouping, reflecting: bool) -> None:
        """Checks that the parts were made for a kind of solver.

        **Raises:** `ValueError` if their groups are others, or their storages.
        """
        given = self._formulation
        if grouping != given.grouping or (reflecting and not given.reflecting):
            raise ValueError("The parts were made for another solver.")

    def initial(self) -> Parts:
        """The forward pass itself: every deviation 0."""
        return Parts(*(part.initial() for part in self.parts))

    def unmoved(self) -> Parts:
        """`initial` in a form that costs nothing in a first step."""
        return Parts(*(part.unmoved() for part in self.parts))

    def project(self, group: int, point: Parts) -> Parts:
        """The nearest point to `point` that satisfies every node of a group."""
        row, parts = self.row, self.parts
        if group != self._edge:
            return Parts(
                row.at_start(lambda: _projected(parts.first, group, point.first)),
                _projected(parts.layer, group, point.layer),
                row.at_end(lambda: _projected(parts.last, group, point.last)),
            )
        asked = row.at_end(lambda: parts.last.asked(point.last))
        of_layer, of_first = row.back(self.number, parts.layer.asked(point.layer), asked)

        def first() -> tuple[State, Array]:
            moved = parts.first.move(group, point.first, of_first)
            return parts.first.written(group, point.first, moved), parts.first.handed_on(moved[1])

        new, out = row.at_start(first)
        moved = parts.layer.move(group, point.layer, of_layer)
        came, to_last = row.forward(self.number, parts.layer.handed_on(moved[1]), out)

        def last() -> State:
            moved = parts.last.move(group, point.last)
            return parts.last.written(group, point.last, moved, to_last)

        layer = parts.layer.written(group, point.layer, moved, came)
        return Parts(new, layer, row.at_end(last))

    def difference(self, a: Parts, b: Parts) -> Parts:
        """`a − b`, as a state."""
        return Parts(*(part.difference(*ab) for part, *ab in zip(self.parts, a, b, strict=True)))

    def distance(self, a: Parts, b: Parts) -> Float[Array, ""]:
        """`(Σ ρ |a − b|²)^½`, over all parts."""
        squares = self._total(lambda part, a, b: part.squared_distance(a, b), a, b)
        return jnp.sqrt(jnp.maximum(squares, 0))

    def _total(self, of: Callable[..., Array], *points: Parts) -> Array:
        """The sum of a number over all parts."""
        row, (first, layer, last) = self.row, zip(self.parts, *points, strict=True)
        ends = row.at_start(lambda: of(*first)) + row.at_end(lambda: of(*last))
        return row.over_devices(row.total(self.number, of(*layer)) + ends)

    # What comes out.

    def parameter_deviations(self, point: Parts) -> Parts:
        """For each leaf of each part how far it has moved; None where nothing reads it."""
        row, parts = self.row, self.parts
        first = row.at_start(lambda: parts.first.deviations(point.first))
        last = row.at_end(lambda: parts.last.deviations(point.last))
        layer = parts.layer.deviations(point.layer)
        return Parts(row.over_devices(first), layer, row.over_devices(last))

    def violations(self) -> dict[str, Float[Array, ""]]:
        """See `Problem.violations`."""
        found = Parts(*(part.weights.squared_violations() for part in self.parts))
        lines = dict.fromkeys(line for squares in found for line in squares)

        def total(line: str) -> Array:
            return self._total(lambda _, squares: squares.get(line, jnp.zeros(())), found)

        return {line: jnp.sqrt(total(line)) for line in lines}


def _entry(graph: Graph) -> Node:
    """The node of what the part before hands on."""
    assert graph.entry is not None
    return graph.entry


def _exit(graph: Graph) -> Slot:
    """The slot that stands for the readers in the part behind."""
    assert graph.exit is not None
    return graph.exit


def _projected(part: _Part, group: int, point: State) -> State:
    return part.written(group, point, part.move(group, point))


def run_forward(
    row: Neighbours, layouts: Parts, leaves: Parts, consts: Parts, levels: int
) -> tuple[ForwardPass, tuple[Array, dict[int, Array]], ForwardPass]:
    """The forward pass through all parts, each layer where it is.

    **Arguments:**

    - `leaves`: of the parameters of each part; of layers those on this device, stacked.
    - `consts`: of each program.
    - `levels`: see [`count_levels`][].

    **Returns:** that of the part before the layers; of the layers on this device, stacked, their
    inputs and the values of what moves; and that of the part behind them (on the last device; on
    others it is of no use).
    """
    first = ForwardPass(layouts.first, leaves.first, consts.first, levels=levels)
    program = layouts.layer.graph.program

    def step(x: Array, own: Sequence[Any]) -> tuple[Array, tuple[Array, dict[int, Array]]]:
        values = program.evaluate([*own, x], consts.layer)
        made = {v: values[v] for v in values if v in program.variable and v >= len(own) + 1}
        return values[_exit(layouts.layer.graph).variable], (x, made)

    start = first.program_values[_exit(layouts.first.graph).variable]
    end, of_layers = row.through(step, start, list(leaves.layer))
    last = ForwardPass(layouts.last, [*leaves.last, end], consts.last, levels=levels)
    return first, of_layers, last


def count_levels(layouts: Parts, count: int) -> int:
    """How many levels the graph of a network of so many layers has: `len(level_groups())`."""

    def of(graph: Graph) -> tuple[int, int]:
        """The level of what the part before hands on, and the deepest one."""
        level = graph.levels()
        deepest = max(level[node.index] for node in graph.nodes if node.kind != "parameter")
        return (0 if graph.entry is None else level[graph.entry.index]), deepest

    (_, of_first), (through, of_layer), (now, deepest) = (of(found.graph) for found in layouts)
    # In a part level 1 is that of what it hands on.
    for _ in range(count):
        deepest = max(deepest, now - 1 + of_layer)
        now += through - 1
    return 2 + max(deepest, now - 1 + of_first)


# --- Weights -------------------------------------------------------------------------------------


def _readers(row: Neighbours, number: Array, count: int, passes: Parts) -> tuple[Weight, Weight]:
    """The weights with which the part behind holds on to what a layer hands on, and to what the
    part before the layers does.

    A metric whose weights follow from those behind them is asked once for each layer: so many steps
    it takes from the last layer to the first.
    """
    (layer, last), dtype = passes[1:], passes.layer.values[_exit(passes.layer.graph).variable].dtype
    end = _held(last)
    own = _held(layer.held_by(Weight(1.0)))
    follows = type(layer.layout.formulation.metric).weigh is not Metric.weigh

    def back(own: Weight) -> tuple[Weight, Weight]:
        found = []
        for a, b in ((own.mantissa, end.mantissa), (own.exponent, end.exponent)):
            if not follows and all(isinstance(x, (int, float)) for x in (a, b)) and a == b:
                found.append((a, a))
                continue
            shape = jnp.broadcast_shapes(jnp.shape(a), jnp.shape(b))
            pair = (jnp.broadcast_to(jnp.asarray(x, dtype), shape) for x in (a, b))
            found.append(row.back(number, *pair))
        of_layer, of_first = zip(*found, strict=True)
        return Weight(*of_layer), Weight(*of_first)

    def step(_: Any, behind: Weight) -> Weight:
        return back(_held(layer.held_by(behind)))[0]

    if follows:
        behind = jax.lax.fori_loop(1, count, step, back(own)[0])
        own = _held(layer.held_by(behind))
    return back(own)


def _held(forward: ForwardPass) -> Weight:
    """The weight with which a part holds on to what it is handed."""
    weights = forward.layout.formulation.metric.weigh(forward).weights
    return forward.reader_weight(_entry(forward.graph).index, dict(enumerate(weights)))


__all__ = ["Parts", "StackedProblem", "count_levels", "run_forward"]
