"""A graph, a metric and data become a feasibility problem: its projections, its state, its
distances.

The state of a problem is the deviation of every slot from the forward pass, in the form that the
slot's storage gives it. The projections act on groups of nodes that share no slot entry: the two
colours for alternating and reflecting algorithms, reverse topological levels for cyclic ones.
Nothing below knows which algorithm uses them.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from pjax.graph import Graph, Node, Slot, bipartite, build_graph, warn_unused
from pjax.metrics import Metric, Uniform
from pjax.rules import Exactness, Reference
from pjax.slots import Compact, Dense, Lifted, Storage
from pjax.trace import Program, TraceError, read, trace

Fanout = Literal["exact", "paper"]
Splitting = Literal["neuron"]
Grouping = Literal["colours", "levels"]
State = tuple[Any, ...]


@dataclass(frozen=True)
class Layout:
    """Everything about a problem that does not depend on data; a static argument of compiled code.

    **Attributes:**

    - `graph`: with identities if the groups are colours.
    - `groups`: indices of nodes, a projection each.
    - `storages`: the form of each slot's state.
    - `weights`: ρ of each slot, per copy.
    """

    graph: Graph
    groups: tuple[tuple[int, ...], ...]
    storages: tuple[Storage, ...]
    weights: tuple[float, ...]
    metric: Metric
    fanout: Fanout
    grouping: Grouping
    reflecting: bool

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


_LAYOUTS: OrderedDict[Any, Layout] = OrderedDict()
_MAX_LAYOUTS = 256


def layout(
    program: Program,
    *,
    metric: Metric,
    fanout: Fanout = "exact",
    splitting: Splitting = "neuron",
    grouping: Grouping = "colours",
    reflecting: bool = False,
) -> Layout:
    """The layout of a program's problem; equal programs share one, so nothing compiles twice."""
    if fanout not in ("exact", "paper"):
        raise ValueError(f'`fanout` must be "exact" or "paper", got {fanout!r}.')
    if splitting != "neuron":
        raise ValueError(f'`splitting` must be "neuron", got {splitting!r}.')
    key = (program.key, metric, fanout, splitting, grouping, reflecting)
    found = _LAYOUTS.get(key)
    if found is None:
        found = _LAYOUTS[key] = _make_layout(program, metric, fanout, grouping, reflecting)
        if len(_LAYOUTS) > _MAX_LAYOUTS:
            _LAYOUTS.popitem(last=False)
    _LAYOUTS.move_to_end(key)
    return found


def _make_layout(
    program: Program, metric: Metric, fanout: Fanout, grouping: Grouping, reflecting: bool
) -> Layout:
    graph = build_graph(program)
    warn_unused(graph)
    for slot in graph.slots:
        if 0 in slot.shape:
            node = graph.nodes[slot.node]
            raise TraceError(
                f"The batch is empty: `{node.name}` ({node.source}) gets an operand of shape "
                f"{slot.shape}."
            )
    if grouping == "colours":
        graph = bipartite(graph)
        groups = graph.colour_groups()
    else:
        groups = graph.level_groups()
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    storages: list[Storage] = [Dense()] * len(graph.slots)
    for node in graph.nodes:
        if node.rule is not None:
            shared = [
                len({group_of[producer] for producer in graph.slots[index].producers}) > 1
                for index in node.slots
            ]
            forms = node.rule.storages(reflecting, shared)
            for index, form in zip(node.slots, forms, strict=True):
                storages[index] = form
    found = Layout(
        graph=graph,
        groups=tuple(tuple(group) for group in groups),
        storages=tuple(storages),
        weights=tuple(float(weight) for weight in metric.slot_weights(graph)),
        metric=metric,
        fanout=fanout,
        grouping=grouping,
        reflecting=reflecting,
    )
    _warn_large(found)
    return found


class LargeStateWarning(UserWarning):
    """A solver that reflects will store copies that take much memory."""


#: Bytes of stored copies from which on a layout warns.
_LARGE = 2**30


def _warn_large(layout: Layout) -> None:
    copied = {
        layout.graph.slots[i].node for i, s in enumerate(layout.storages) if isinstance(s, Lifted)
    }
    rows = [(sizes(layout).nodes[index], layout.graph.nodes[index]) for index in sorted(copied)]
    total = sum(size.bytes for size, _ in rows)
    if total > _LARGE:
        largest, node = max(rows, key=lambda row: row[0].bytes)
        warnings.warn(
            f"A solver that reflects stores the copies of {len(rows)} operation(s) with two free "
            f"operands: {total / 1e9:.1f} GB for one state, {largest.bytes / 1e9:.1f} GB of it for "
            f"`{node.name}` ({node.source}). AlternatingProjections and CyclicProjections store "
            "none; a smaller batch stores fewer.",
            LargeStateWarning,
            stacklevel=4,
        )


class NodeSize(NamedTuple):
    """Edge variables of one node's slots: as the paper counts them, and as they are stored.

    `exactness` is the class of its rule: `"exact"`, `"inexact"` or `"relaxed"`.
    """

    name: str
    exactness: Exactness
    edge_variables: int
    stored: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """How large a problem is.

    **Attributes:**

    - `nodes`: for each node its edge variables (every copy counted), the numbers stored for them,
        and the bytes of these.
    - `edge_variables`, `stored`, `bytes`: the sums.
    """

    nodes: tuple[NodeSize, ...]

    @property
    def edge_variables(self) -> int:
        return sum(node.edge_variables for node in self.nodes)

    @property
    def stored(self) -> int:
        return sum(node.stored for node in self.nodes)

    @property
    def bytes(self) -> int:
        return sum(node.bytes for node in self.nodes)


def sizes(layout: Layout) -> Sizes:
    """The edge variables and bytes of a layout's state, before anything is allocated."""
    rows = []
    for node in layout.graph.nodes:
        count = stored = size = 0
        for index in node.slots:
            slot, storage = layout.graph.slots[index], layout.storages[index]
            count += int(np.prod(slot.shape, dtype=np.int64)) * storage.copies
            numbers = storage.numbers(slot.shape)
            stored += numbers
            size += numbers * np.dtype(slot.dtype).itemsize
        # A parameter's constraint is that its readers agree: their mean is the nearest point.
        exactness = "exact" if node.rule is None else node.rule.exactness
        rows.append(NodeSize(node.name, exactness, count, stored, size))
    return Sizes(tuple(rows))


class Problem:
    """Find slot values that satisfy every node: the projections and distances of one problem.

    Made by [`pjax.feasibility_problem`][], or inside compiled code from a layout and data.
    """

    def __init__(self, layout: Layout, leaves: Sequence[Any], consts: Sequence[Any]):
        self.layout = layout
        self.graph = layout.graph
        self.leaves = list(leaves)
        #: The forward pass: the value of every variable of the program.
        self.values = layout.graph.program.evaluate(leaves, consts)
        self._readers = self.graph.readers()
        # What does not change during a solve is computed here, outside of every loop.
        self._total_weights = self._sum_weights()
        self._rule_weights = self._fanout_weights()
        self._prox_steps = self._find_prox_steps()
        self._references = {
            node.index: self._reference(node) for node in self.graph.nodes if node.rule is not None
        }
        self._kept = {
            (slot.index, group): self._kept_mask(slot, frozenset(members))
            for slot in self.graph.slots
            for group, members in enumerate(layout.groups)
            if not frozenset(members).isdisjoint(slot.producers)
        }

    # What does not change during a solve.

    def _sum_weights(self) -> dict[int, Any]:
        """`W_v`: the weight with which the readers of each node hold on to its output."""
        totals: dict[int, Any] = {}
        for slot in self.graph.slots:
            weight = self._weight(slot)
            if slot.route.direct:
                pulled: Sequence[Any] = (weight,)
            else:
                pulled = slot.route.pull(jnp.full(slot.shape, weight, slot.dtype), self.values)
            for producer, part in zip(slot.producers, pulled, strict=True):
                totals[producer] = totals[producer] + part if producer in totals else part
        return totals

    def _fanout_weights(self) -> dict[int, Any]:
        """The target weight that a node's rule is given: `W_v`, or 1 in the paper's convention."""
        if self.layout.fanout == "exact":
            return self._total_weights
        return {
            node: jnp.where(total > 0, 1.0, 0.0).astype(total.dtype)
            if isinstance(total, jax.Array)
            else 1.0
            for node, total in self._total_weights.items()
        }

    def _find_prox_steps(self) -> dict[int, Any]:
        """`λ c` for each row of each loss."""
        metric = self.layout.metric
        losses = self.graph.losses
        coefficients = self.graph.loss_coefficients(self.values)
        #: Whether no loss is maximised: one with a negative coefficient has no proximal operator.
        self.minimises = jnp.all(jnp.stack([jnp.min(c) for c in coefficients]) >= 0)
        if metric.row_weights == "relative":
            largest = jnp.max(jnp.stack([jnp.max(jnp.abs(c)) for c in coefficients]))
            coefficients = [c / jnp.where(largest > 0, largest, 1) for c in coefficients]
        return {
            node.index: metric.prox_step * jnp.maximum(c, 0)
            for node, c in zip(losses, coefficients, strict=True)
        }

    def _kept_mask(self, slot: Slot, members: frozenset[int]) -> Array | None:
        """1 where a slot reads no producer among `members`; None if all its producers are."""
        moved = [producer in members for producer in slot.producers]
        if all(moved):
            return None
        ones = [jnp.ones_like(self.values[var]) for var in slot.route.sources]
        others = [jnp.zeros_like(o) if m else o for o, m in zip(ones, moved, strict=True)]
        mask = slot.route(others, self.values)
        if moved[0]:
            return mask
        # Entries that read a constant are restored with the first producer.
        return mask + 1 - slot.route(ones, self.values)

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
        )

    def _weight(self, slot: Slot) -> float:
        """The weight of an entry in a consensus: ρ times the number of its copies."""
        return self.layout.weights[slot.index] * self.layout.storages[slot.index].copies

    def _other(self, slot: Slot) -> Any:
        """The value of the operand that is data, for storages that need it."""
        knowns = self.graph.nodes[slot.node].knowns
        return read(self.values, knowns[0]) if knowns else None

    @property
    def loss(self) -> Array:
        """The function's value in the forward pass."""
        return jnp.asarray(read(self.values, self.graph.program.outputs[0]))

    # The state.

    def require(self, grouping: Grouping, reflecting: bool) -> None:
        """Checks that the problem was made for a kind of solver.

        **Raises:** `ValueError` if its groups are others, or if the solver reflects and the
        storage does not keep the copies.
        """
        if grouping != self.layout.grouping:
            raise ValueError(
                f"The solver projects onto {grouping}, and the groups of this problem are "
                f'{self.layout.grouping}: make it with `grouping="{grouping}"`.'
            )
        if reflecting and not self.layout.reflecting:
            raise ValueError(
                "The solver combines states, and the states of this problem keep only the mean of "
                "copies: make it with `reflecting=True`."
            )

    @property
    def num_groups(self) -> int:
        return len(self.layout.groups)

    def initial(self) -> State:
        """The forward pass itself: every deviation 0."""
        return tuple(
            storage.fill(jnp.zeros(slot.shape, slot.dtype))
            for slot, storage in zip(self.graph.slots, self.layout.storages, strict=True)
        )

    def mean(self, state: State, slot: Slot) -> Array:
        """The deviation of a slot; of a slot with copies, their mean."""
        storage = self.layout.storages[slot.index]
        other = None if isinstance(storage, Dense) else self._other(slot)
        return storage.mean(state[slot.index], other)

    def squared_distance(self, a: State, b: State) -> Float[Array, ""]:
        """`Σ ρ |a − b|²` over all slots and copies."""
        total: Any = jnp.zeros(())
        for slot, storage in zip(self.graph.slots, self.layout.storages, strict=True):
            first, second = a[slot.index], b[slot.index]
            if first is not second:
                other = None if isinstance(storage, Dense) else self._other(slot)
                weight = self.layout.weights[slot.index]
                part = storage.squared_distance(first, second, weight, other)
                total = total + part.astype(jnp.promote_types(part.dtype, jnp.float32))
        return total

    def difference(self, a: State, b: State) -> State:
        """`a − b`, as a state."""
        return tuple(
            storage.difference(x, y)
            for storage, x, y in zip(self.layout.storages, a, b, strict=True)
        )

    def distance(self, a: State, b: State) -> Float[Array, ""]:
        """`(Σ ρ |a − b|²)^½`."""
        return jnp.sqrt(jnp.maximum(self.squared_distance(a, b), 0))

    # The projections.

    def project(self, group: int, state: State) -> State:
        """The nearest point to `state` that satisfies every node of a group."""
        kept = {slot: mask for (slot, number), mask in self._kept.items() if number == group}
        return self._project(self.layout.groups[group], kept, state)

    def _project(
        self, members: Sequence[int], kept: dict[int, Array | None], state: State
    ) -> State:
        graph = self.graph
        new = list(state)
        targets = self._targets(members, state)
        outputs: dict[int, Array] = {}
        for index in members:
            node = graph.nodes[index]
            states, output = self._project_node(node, state, targets)
            for slot_index, moved in zip(node.slots, states, strict=True):
                new[slot_index] = moved
            if output is not None:
                outputs[index] = output
        for slot in graph.slots:
            if any(producer in outputs for producer in slot.producers):
                new[slot.index] = self._write(slot, kept[slot.index], outputs, state)
        return tuple(new)

    def _project_node(
        self, node: Node, state: State, targets: dict[int, Array]
    ) -> tuple[tuple[Any, ...], Array | None]:
        """The new states of the node's slots, and the deviation of its output."""
        index = node.index
        if node.rule is None:
            return (), targets.get(index)
        if node.kind == "loss":
            target, weight = None, self._prox_steps[index]
        else:
            target, weight = targets[index], self._rule_weights[index]
        return node.rule.project(
            self._references[index],
            tuple(state[i] for i in node.slots),
            tuple(self.layout.weights[i] for i in node.slots),
            target,
            weight,
        )

    def _targets(self, nodes: Sequence[int], state: State) -> dict[int, Array]:
        """The consensus of each node's readers: the weighted mean of the entries that read it."""
        members = set(nodes)
        sums: dict[int, Any] = {}
        single: dict[int, Array] = {}
        for slot in self.graph.slots:
            if members.isdisjoint(slot.producers):
                continue
            mean = self.mean(state, slot)
            if slot.route.direct and len(self._readers[slot.producers[0]]) == 1:
                single[slot.producers[0]] = mean
                continue
            pulled = slot.route.pull(mean * self._weight(slot), self.values)
            for producer, part in zip(slot.producers, pulled, strict=True):
                if producer in members:
                    sums[producer] = sums[producer] + part if producer in sums else part
        targets = dict(single)
        for producer, total in sums.items():
            weight = self._total_weights[producer]
            if isinstance(weight, jax.Array):
                weight = jnp.where(weight > 0, weight, 1)
            targets[producer] = total / weight
        return targets

    def _write(
        self, slot: Slot, kept: Array | None, outputs: dict[int, Array], state: State
    ) -> Any:
        """The state of a slot after producers of it have moved to `outputs`."""
        value = self._routed(slot, outputs)
        storage = self.layout.storages[slot.index]
        if kept is None:
            return storage.fill(value)
        return storage.combine(state[slot.index], kept, value)

    def _routed(self, slot: Slot, outputs: dict[int, Array]) -> Array:
        """What a slot reads of `outputs`; 0 where it reads other producers, or a constant."""
        deviations = [
            outputs[producer] if producer in outputs else jnp.zeros_like(self.values[var])
            for producer, var in zip(slot.producers, slot.route.sources, strict=True)
        ]
        return slot.route(deviations, self.values)

    # What comes out.

    def parameter_deviations(self, state: State) -> list[Array | None]:
        """For each leaf the consensus of its readers; None where nothing reads it."""
        found: list[Array | None] = [None] * len(self.leaves)
        nodes = [node.index for node in self.graph.parameters]
        for index, deviation in self._targets(nodes, state).items():
            output = self.graph.nodes[index].output
            assert output is not None
            found[output] = deviation
        return found

    def residuals(self, state: State | None = None) -> dict[str, Float[Array, ""]]:
        """The distance of a state to each node's constraint; of a loss, how far its prox would
        move it.

        **Arguments:**

        - `state`: a state of this problem; the forward pass if not given.

        **Returns:** one number per node, by `"<index> <name>"`.
        """
        state = self.initial() if state is None else state
        return {
            f"{node.index} {node.name}": jnp.sqrt(self._squared_residual(node, state))
            for node in self.graph.nodes
        }

    def _squared_residual(self, node: Node, state: State) -> Array:
        graph, layout = self.graph, self.layout
        self._require_copies(node, state)
        states, output = self._project_node(node, state, self._targets((node.index,), state))
        total = jnp.zeros(())
        for index, moved in zip(node.slots, states, strict=True):
            slot, storage = graph.slots[index], layout.storages[index]
            total += storage.squared_distance(
                moved, state[index], layout.weights[index], self._other(slot)
            )
        if output is None:
            return total
        for index in self._readers[node.index]:
            slot, storage = graph.slots[index], layout.storages[index]
            kept = self._kept_mask(slot, frozenset([node.index]))
            if kept is not None:
                self._require_copies(graph.nodes[slot.node], state)
            value = self._routed(slot, {node.index: output})
            mask = jnp.ones_like(value) if kept is None else 1 - kept
            total += storage.squared_distance_to(
                state[index], value, mask, layout.weights[index], self._other(slot)
            )
        return jnp.maximum(total, 0)

    def _require_copies(self, node: Node, state: State) -> None:
        for index in node.slots:
            if isinstance(self.layout.storages[index], Compact):
                spread = state[index][1]
                if not isinstance(spread, Tracer) and float(spread) > 0:
                    raise ValueError(
                        f"The residual of `{node.name}` needs the copies of its operands, of which "
                        "this state keeps the mean. Make the problem with `reflecting=True`."
                    )

    def sizes(self) -> Sizes:
        """Edge variables and bytes of the state, per node and in all."""
        return sizes(self.layout)


def feasibility_problem(
    fn: Callable[..., Any],
    params: PyTree[Array],
    *args: Any,
    metric: Metric | None = None,
    fanout: Fanout = "exact",
    splitting: Splitting = "neuron",
    grouping: Grouping = "colours",
    reflecting: bool = False,
) -> Problem:
    """Find edge values that satisfy every operation, every loss and every parameter of
    `fn(params, *args)`.

    **Arguments:**

    - `fn`: a JAX function that ends in a loss of this library, or a weighted sum of such.
    - `params`: the pytree of parameters; `args` are data, like anything that `fn` closes over.
    - `metric`: the weights of the distances; [`pjax.metrics.Uniform`][] by default.
    - `fanout`: `"exact"`: a node weighs its readers as the nearest point demands; `"paper"`: as
        if it had one reader, whatever their number.
    - `splitting`: `"neuron"`: one constraint per scalar product.
    - `grouping`: `"colours"` (two groups, identities inserted) or `"levels"` (reverse topological).
    - `reflecting`: store copies in the form that reflecting algorithms need.

    **Returns:** a [`Problem`][].

    **Raises:** [`pjax.TraceError`][] if `fn` cannot become a graph, naming the operation and its
    source line.
    """
    program, leaves, consts, _ = trace(lambda p: fn(p, *args), params)
    found = layout(
        program,
        metric=Uniform() if metric is None else metric,
        fanout=fanout,
        splitting=splitting,
        grouping=grouping,
        reflecting=reflecting,
    )
    return Problem(found, leaves, consts)
