"""A graph, a metric and data become a feasibility problem: its projections, its state, its
distances.

The state of a problem is the deviation of every slot from the forward pass, in the form that the
slot's storage gives it. The projections act on groups of nodes that share no slot entry: the two
colours for alternating and reflecting algorithms, reverse topological levels for cyclic ones.
Nothing below knows which algorithm uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from pjax.graph import Node, Slot, feeds_thresholds, latent_nodes
from pjax.metrics import Weight
from pjax.options import Grouping
from pjax.problem.layouts import Layout
from pjax.problem.size_report import Sizes, sizes
from pjax.program import pull_together, read, widened
from pjax.projections import scaling
from pjax.projections.gains import PowerIteration, largest
from pjax.rules import Compact, Dense, Force, Geometry, Joined, LayerSum, Reference

#: A deviation for each slot, in the form of its storage.
State = tuple[Any, ...]
#: What there is to say where the power iterations of another problem were handed on.
OTHER_STATE = (
    "`state` belongs to another function, or to parameters or a batch of other shapes. Make one by "
    "`init` with these."
)


class Problem:
    """Find slot values that satisfy every node: the projections and distances of one problem.

    Made by [`pjax.feasibility_problem`][], or inside compiled code from a layout and data.

    A slot of weight `ρ = m · 2**k` keeps its deviation in a unit of `2**−k`, so that `m` times the
    state is the *force* `ρ δ` on it. With a uniform metric `k` is 0; with a spectral one deviations
    are far below the range of float32 in a deep network, and forces are not. Where the weight is
    infinite the deviation is 0, and the state is the force alone.
    """

    def __init__(
        self,
        layout: Layout,
        leaves: Sequence[Any],
        consts: Sequence[Any],
        vectors: Sequence[Any] | None = None,
    ):
        self.layout = layout
        self.graph = layout.graph
        self.leaves = list(leaves)
        #: The forward pass: the value of every variable of the program.
        self.forward = layout.graph.program.evaluate(leaves, consts)
        #: The same in at least float32: what deviations are from.
        self.values = {number: _widened(value) for number, value in self.forward.items()}
        self._readers = self.graph.readers()
        # What does not change during a solve is computed here, outside of every loop.
        #: `λ c` for each row of each loss.
        self.prox_steps = self._find_prox_steps()
        self._references = {
            node.index: self._reference(node) for node in self.graph.nodes if node.rule is not None
        }
        self.vectors = [None] * len(self.graph.slots) if vectors is None else list(vectors)
        if len(self.vectors) != len(self.graph.slots):
            raise ValueError(OTHER_STATE)
        weighing = layout.metric.weigh(self)
        #: The weight of each slot; of one that stands for copies, of each copy.
        self.weights = weighing.weights
        self._slot_gains = weighing.gains
        #: For each slot where the power iterations of the next problem may begin, or None.
        self.vectors = weighing.vectors
        self._total_weights = self._sum_weights()
        self._rule_weights = self._fanout_weights()
        for node in self.graph.nodes:
            if node.rule is not None:
                self._references[node.index] = self._references[node.index]._replace(
                    geometry=Geometry(
                        self._exponent(node),
                        tuple(self._compliance(self.graph.slots[i]) for i in node.slots),
                        tuple(layout.curved[i] for i in node.slots),
                        layout.metric.iterations,
                    )
                )

        # Of a level that is projected once in a step there is nothing to save.
        self._kept = {
            (slot.index, group): self._kept_mask(slot, frozenset(members))
            for slot in self.graph.slots
            for group, members in enumerate(layout.groups if layout.grouping == "colours" else ())
            if not frozenset(members).isdisjoint(slot.producers)
            and not isinstance(layout.storages[slot.index], Joined)
        }

    # What does not change during a solve.

    def reader_weight(self, node: int, weights: Mapping[int, Weight]) -> Weight:
        """`W_v`: the weight with which the readers of a node hold on to its output.

        In a unit of its own: its exponent is the largest of the readers'.
        """
        slots = [self.graph.slots[i] for i in self._readers[node]]
        exponent = _largest([weights[slot.index].exponent for slot in slots])
        total: Any = 0.0
        pending: list[tuple[Slot, Array]] = []
        for slot in slots:
            mantissa, own, *_ = weights[slot.index]
            weight = mantissa * self._copies(slot) * _share(own, exponent)
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
        for producer, part in self._pull(pending):
            if producer == node:
                total = total + part
        return Weight(total, exponent)

    def _copies(self, slot: Slot) -> Any:
        copies = self.layout.storages[slot.index].copies
        return copies if isinstance(copies, int) else jnp.asarray(copies, slot.dtype)

    def _sum_weights(self) -> dict[int, Weight]:
        weights = dict(enumerate(self.weights))
        return {
            node.index: self.reader_weight(node.index, weights)
            for node in self.graph.nodes
            if node.kind != "loss"
        }

    def _fanout_weights(self) -> dict[int, Any]:
        """The target weight that a node's rule is given: `W_v`, or 1 in the paper's convention."""
        if self.layout.fanout == "exact":
            return {node: total.mantissa for node, total in self._total_weights.items()}
        return {
            node: jnp.where(total.mantissa > 0, 1.0, 0.0).astype(total.mantissa.dtype)
            if isinstance(total.mantissa, jax.Array)
            else 1.0
            for node, total in self._total_weights.items()
        }

    def _find_prox_steps(self) -> dict[int, Any]:
        """`λ c` for each row of each loss."""
        metric = self.layout.metric
        losses = self.graph.losses
        coefficients = self.graph.loss_coefficients(self.forward)
        # A penalty on parameters has no rows of the batch, unless there is nothing else.
        pairs = list(zip(losses, coefficients, strict=True))
        counted = [(n, c) for n, c in pairs if self._of_data(n)] or pairs
        largest = _largest_size([c for _, c in counted])
        # All rows of the batch may count 0 while a penalty does not.
        every = _largest_size(coefficients)
        if isinstance(every, jax.Array):
            largest = jnp.where(largest > 0, largest, every)
        elif largest == 0:
            largest = every
        #: The largest coefficient of a row in the function's result.
        self.largest_coefficient = jnp.asarray(largest)
        relative = [_relative(c, largest) for c in coefficients]
        self.loss_weights = {
            node.index: _row_weights(c) for node, c in zip(losses, relative, strict=True)
        }
        if metric.row_weights == "relative":
            coefficients = relative
        return {
            node.index: metric.prox_step * c for node, c in zip(losses, coefficients, strict=True)
        }

    def _of_data(self, node: Node) -> bool:
        """Whether a loss reads predictions, not parameters alone."""
        return any(self.graph.slots[i].kind == "activation" for i in node.slots)

    def _kept_mask(self, slot: Slot, members: Collection[int]) -> Array | None:
        """1 where a slot reads no producer among `members`; None if all its producers are."""
        moved = [producer in members for producer in slot.producers]
        if all(moved):
            return None
        ones = [jnp.ones_like(self.values[var]) for var in slot.route.sources]
        others = [None if m else o for o, m in zip(ones, moved, strict=True)]
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
            entries=tuple(self._entries(self.graph.slots[i]) for i in node.slots),
        )

    def _entries(self, slot: Slot) -> Array:
        """What a slot's value is broadcast from; the value, where it is more than that."""
        value, route = self.values[slot.variable], slot.route
        return self.values[route.sources[0]].astype(value.dtype) if route.even else value

    def shapes(self, node: Node) -> tuple[tuple[int, ...], ...]:
        """The shapes of a node's slots."""
        return tuple(self.graph.slots[i].shape for i in node.slots)

    def gains(self, wanted: Sequence[bool], iterations: int) -> tuple[list[Any], list[Any]]:
        """Bounds on the squared gain from each slot to its node's output.

        **Arguments:**

        - `wanted`: for each slot whether its bound is needed.
        - `iterations`: steps of the power iteration, where that is what finds it.

        **Returns:** the bounds, 0 where they are not wanted, and where power iterations end.
        """
        found: list[Any] = [0.0] * len(self.graph.slots)
        vectors: list[Any] = [None] * len(self.graph.slots)
        for node in self.graph.nodes:
            if node.rule is None or node.kind == "loss":
                continue
            reference = self._references[node.index]
            starts = [self.vectors[i] for i in node.slots]
            bounds = node.rule.gains(reference, [wanted[i] for i in node.slots], starts)
            for slot, bound in zip(node.slots, bounds, strict=True):
                if wanted[slot]:
                    found[slot] = bound
        unfinished = [i for i, bound in enumerate(found) if isinstance(bound, PowerIteration)]
        for i in unfinished:
            start = found[i].start
            if start is not None and jnp.shape(start) != found[i].shape:
                raise ValueError(OTHER_STATE)
        results = largest([found[i] for i in unfinished], iterations)
        for slot, (bound, vector) in zip(unfinished, results, strict=True):
            found[slot], vectors[slot] = bound, vector
        return found, vectors

    def _exponent(self, node: Node) -> Any:
        """The exponent of a node's unit: that of its output, or of the slot of a loss."""
        if node.kind == "loss":
            return self.weights[node.slots[0]].exponent
        return self._total_weights[node.index].exponent

    def _rests(self, slot: Slot) -> bool:
        """Whether the slot is infinitely stiffer than the readers of its node."""
        if not self.layout.resting[slot.index]:
            return False
        if self.graph.nodes[slot.node].kind == "loss":
            return True
        return not all(self.layout.resting[i] for i in self._readers[slot.node])

    def _ratio(self, slot: Slot, node: int) -> Any:
        """`2**(k_s − K_v)`: from the unit of a node to that of a slot that it has or writes to."""
        weight = self.weights[slot.index]
        if node != slot.node:
            return _share(weight.exponent, self._exponent(self.graph.nodes[node]))
        if weight.relative is not None:
            return weight.relative
        return _power_between(weight.exponent, self._exponent(self.graph.nodes[node]))

    def _compliance(self, slot: Slot) -> Any:
        """The bound on a slot's squared gain over its weight, in the unit of its node."""
        gain, weight = self._slot_gains[slot.index], self.weights[slot.index]
        if gain is None or (isinstance(gain, float) and gain == 0):
            return gain
        if weight.compliance is not None:
            return weight.compliance
        return gain / (weight.mantissa * self._ratio(slot, slot.node))

    def _other(self, slot: Slot) -> Any:
        """The value of the operand that is data, for storages that need it."""
        knowns = self.graph.nodes[slot.node].knowns
        return read(self.values, knowns[0]) if knowns else None

    @property
    def loss(self) -> Array:
        """The function's value in the forward pass."""
        return jnp.asarray(read(self.forward, self.graph.program.outputs[0]))

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

    def at_rest(self) -> State:
        """`initial`, with None for each slot: what rests costs nothing in a first step.

        Only for solvers that project and do not combine states.
        """
        if self.layout.splitting != "layer":
            return self.initial()
        return (None,) * len(self.graph.slots)

    def mean(self, state: State, slot: Slot) -> Array:
        """The deviation of a slot, in its unit; of a slot with copies, their mean."""
        storage = self.layout.storages[slot.index]
        if state[slot.index] is None:
            return jnp.zeros(slot.shape, slot.dtype)
        other = None if isinstance(storage, Dense) else self._other(slot)
        return storage.mean(state[slot.index], other)

    def squared_distance(self, a: State, b: State) -> Float[Array, ""]:
        """`Σ ρ |a − b|²` over all slots and copies."""
        parts = [
            self._slot_distance(slot, a[slot.index], b[slot.index])
            for slot in self.graph.slots
            if a[slot.index] is not b[slot.index]
        ]
        # Added at once: in a chain each would wait for the one before.
        return jnp.sum(jnp.stack(parts)) if parts else jnp.zeros(())

    def _slot_distance(self, slot: Slot, a: Any, b: Any) -> Array:
        """`Σ ρ |a − b|²` over a slot; 0 where it rests."""
        if self.layout.resting[slot.index]:
            return jnp.zeros(())
        a, b = (self._filled(slot, value) for value in (a, b))
        storage = self.layout.storages[slot.index]
        other = None if isinstance(storage, Dense) else self._other(slot)
        mantissa, exponent, *_ = self.weights[slot.index]
        return storage.squared_distance(a, b, mantissa, other) * scaling.power(-exponent)

    def _filled(self, slot: Slot, value: Any) -> Any:
        if value is not None:
            return value
        return self.layout.storages[slot.index].fill(jnp.zeros(slot.shape, slot.dtype))

    def difference(self, a: State, b: State) -> State:
        """`a − b`, as a state."""
        return tuple(
            storage.difference(self._filled(slot, a[slot.index]), self._filled(slot, b[slot.index]))
            for slot, storage in zip(self.graph.slots, self.layout.storages, strict=True)
        )

    def distance(self, a: State, b: State) -> Float[Array, ""]:
        """`(Σ ρ |a − b|²)^½`."""
        return jnp.sqrt(jnp.maximum(self.squared_distance(a, b), 0))

    # The projections.

    def project(self, group: int, state: State) -> State:
        """The nearest point to `state` that satisfies every node of a group."""
        members = self.layout.groups[group]
        new, outputs = self._project_nodes(members, state, self._targets(members, state))
        written = list(new)
        for index in sorted({i for node in outputs for i in self._readers[node]}):
            written[index] = self._write(group, self.graph.slots[index], outputs, state)
        return tuple(written)

    def sweep(
        self,
        prepare: Callable[[dict[int, Array]], None] | None = None,
        without: Collection[int] = frozenset(),
    ) -> State:
        """The forces on parameters after one cyclic sweep from the forward pass.

        What reads an output is projected before it, so where outputs move to is of no use.

        **Arguments:**

        - `prepare`: called with the targets of nodes, which it may change, before these nodes are
            projected.
        - `without`: nodes that are left out.

        **Returns:** a state for `parameter_forces` and `node_forces`.
        """
        state = self.at_rest()
        for members in self.layout.groups:
            targets = self._targets(members, state)
            if prepare is not None:
                prepare(targets)
            nodes = [index for index in members if index not in without]
            state, _ = self._project_nodes(nodes, state, targets)
        return state

    def layer_forces(self) -> tuple[State, dict[int, Array]]:
        """The state after a sweep, and the force on the output of each layer.

        For a metric whose parameters rest. What makes weights of parameters keeps the forces on it,
        for `leaf_moves`.
        """
        forces: dict[int, Array] = {}

        def prepare(targets: dict[int, Array]) -> None:
            for index in targets:
                node = self.graph.nodes[index]
                if not isinstance(node.rule, LayerSum):
                    continue
                if feeds_thresholds(self.graph, index):
                    targets[index] = node.rule.steadied(targets[index], self.shapes(node))
                reference, weight = self._references[index], self._rule_weights[index]
                force = scaling.once(node.rule.force(reference.geometry, targets[index], weight))
                forces[index] = force
                self._references[index] = reference._replace(force=force)

        return self.sweep(prepare, latent_nodes(self.graph)), forces

    def _project_nodes(
        self, nodes: Sequence[int], state: State, targets: dict[int, Array]
    ) -> tuple[State, dict[int, Array]]:
        """A state whose slots of these nodes are projected, and the deviations of their outputs."""
        new = list(state)
        outputs: dict[int, Array] = {}
        for index in nodes:
            node = self.graph.nodes[index]
            states, output = self._project_node(node, state, targets)
            for slot_index, moved in zip(node.slots, states, strict=True):
                new[slot_index] = moved
            if output is not None:
                outputs[index] = output
        return tuple(new), outputs

    def _project_node(
        self, node: Node, state: State, targets: dict[int, Array]
    ) -> tuple[tuple[Any, ...], Array | None]:
        """The new states of the node's slots, and the deviation of its output, in its unit."""
        index = node.index
        if node.rule is None:
            return (), targets.get(index)
        if node.kind == "loss":
            target, target_weight = None, self.prox_steps[index]
        else:
            target, target_weight = targets[index], self._rule_weights[index]
        slots = [self.graph.slots[i] for i in node.slots]
        ratios = [
            _infinite_ratio(slot.dtype) if self._rests(slot) else self._ratio(slot, index)
            for slot in slots
        ]
        weights = [
            self.weights[slot.index].mantissa * ratio
            for slot, ratio in zip(slots, ratios, strict=True)
        ]
        found, output = node.rule.project(
            self._references[index],
            tuple(
                self._into_node(slot, state[slot.index], ratio, node.rule.accepts_rest)
                for slot, ratio in zip(slots, ratios, strict=True)
            ),
            tuple(weights),
            target,
            target_weight,
        )
        return tuple(
            self._out_of_node(slot, state[slot.index], moved, ratio)
            for slot, moved, ratio in zip(slots, found, ratios, strict=True)
        ), output

    def _into_node(self, slot: Slot, state: Any, ratio: Any, accepts_rest: bool) -> Any:
        """A slot's state in the unit of its node."""
        storage = self.layout.storages[slot.index]
        whole = isinstance(storage, Joined)  # for rules, which have operands as one array
        if state is None or self._rests(slot):
            if accepts_rest:
                return None
            return jnp.zeros(slot.shape, slot.dtype) if whole else self._filled(slot, None)
        if whole:
            state = storage.mean(state)
        if isinstance(ratio, float) and ratio == 1:
            return state
        return _divided(state, ratio)

    def _out_of_node(self, slot: Slot, before: Any, moved: Any, ratio: Any) -> Any:
        """What the projection made of it, in the slot's unit; what rests gathers the forces."""
        if isinstance(moved, Force):
            # The rule's weight is the mantissa times the ratio, which would come back here.
            mantissa = self.weights[slot.index].mantissa
            moved = moved.value
            if not (isinstance(mantissa, float) and mantissa == 1):
                moved = (moved / mantissa).astype(moved.dtype)
        elif not (isinstance(ratio, float) and ratio == 1):
            moved = jax.tree_util.tree_map(lambda x: (x * ratio).astype(x.dtype), moved)
        storage = self.layout.storages[slot.index]
        if isinstance(storage, Joined):
            moved = storage.fill(moved)
        if before is None or not self._rests(slot):
            return moved
        return jax.tree_util.tree_map(jnp.add, before, moved)

    def _targets(self, nodes: Sequence[int], state: State) -> dict[int, Array]:
        """The consensus of each node's readers: the weighted mean of the entries that read it, in
        the node's unit.
        """
        members = set(nodes)
        sums: dict[int, Any] = {}
        single: dict[int, Array] = {}
        pending: list[tuple[Slot, Array]] = []
        slots = {i for node in nodes for i in self._readers[node]}
        for slot in (self.graph.slots[i] for i in sorted(slots)):
            storage = self.layout.storages[slot.index]
            if isinstance(storage, Joined) and state[slot.index] is not None:
                weight = self.weights[slot.index].mantissa
                spread = (weight,) * len(slot.producers)
                if jnp.ndim(weight):
                    spread = storage.fill(jnp.broadcast_to(weight, slot.shape))
                for producer, part, own in zip(
                    slot.producers, state[slot.index], spread, strict=True
                ):
                    if producer in members:
                        total = (part * own).astype(part.dtype)
                        sums[producer] = sums[producer] + total if producer in sums else total
                continue
            mean = self.mean(state, slot)
            if slot.route.direct and len(self._readers[slot.producers[0]]) == 1:
                single[slot.producers[0]] = mean
                continue
            if state[slot.index] is None:
                for producer, var in zip(slot.producers, slot.route.sources, strict=True):
                    if producer in members:
                        sums.setdefault(producer, jnp.zeros_like(self.values[var]))
                continue
            weight = self.weights[slot.index].mantissa * self._copies(slot)
            pending.append((slot, (mean * weight).astype(mean.dtype)))
        for producer, part in self._pull(pending):
            if producer in members:
                sums[producer] = sums[producer] + part if producer in sums else part
        targets = dict(single)
        for producer, total in sums.items():
            weight = self._total_weights[producer].mantissa
            if isinstance(weight, jax.Array):
                weight = jnp.where(weight > 0, weight, 1)
            targets[producer] = (total / weight).astype(total.dtype)
        return targets

    def _pull(self, entries: Sequence[tuple[Slot, Array]]) -> list[tuple[int, Array]]:
        """What the entries of slots sum to for each of their producers: `(producer, part)`.

        Slots that share wiring are pulled at once: the steps of a loop read their entries of one
        array, whose transpose then is one array too.
        """
        found: list[tuple[int, Array]] = []
        groups: list[list[tuple[Slot, Array]]] = []
        # For each group the producers of its sources. An identity stands for its producer in some
        # slots: those have a sum of their own.
        producers: list[dict[int, int]] = []
        group_of: dict[tuple[int, int], int] = {}
        for slot, value in entries:
            if slot.route.direct:
                found.append((slot.producers[0], value))
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
            found += [(feeds[var], total) for var, total in sums.items()]
        return found

    def _write(self, group: int, slot: Slot, outputs: dict[int, Array], state: State) -> Any:
        """The state of a slot after producers of it have moved to `outputs`."""
        storage = self.layout.storages[slot.index]
        if isinstance(storage, Joined):
            parts = self._filled(slot, state[slot.index])
            pairs = zip(slot.producers, parts, strict=True)
            return tuple(self._sent(slot, n, outputs[n]) if n in outputs else x for n, x in pairs)
        value = self._routed(slot, outputs)
        key = slot.index, group
        kept = self._kept[key] if key in self._kept else self._kept_mask(slot, outputs)
        if kept is None:
            return storage.fill(value)
        return storage.combine(self._filled(slot, state[slot.index]), kept, value)

    def _routed(self, slot: Slot, outputs: dict[int, Array]) -> Array:
        """What a slot reads of `outputs`; 0 where it reads other producers, or a constant."""
        return slot.route(
            [self._sent(slot, n, outputs[n]) if n in outputs else None for n in slot.producers],
            self.values,
        )

    def _sent(self, slot: Slot, producer: int, output: Array) -> Array:
        """The deviation of a producer's output in the unit of a slot that reads it."""
        ratio = self._ratio(slot, producer)
        plain = isinstance(ratio, float) and ratio == 1
        return output if plain else (output * ratio).astype(output.dtype)

    # What comes out.

    def parameter_deviations(self, state: State) -> list[Array | None]:
        """For each leaf the consensus of its readers; None where nothing reads it.

        0 where the parameters rest.
        """
        found: list[Array | None] = [None] * len(self.leaves)
        nodes = [node.index for node in self.graph.parameters]
        for index, deviation in self._targets(nodes, state).items():
            output = self.graph.nodes[index].output
            assert output is not None
            exponent = self._total_weights[index].exponent
            found[output] = scaling.from_unit(deviation, exponent)
        return found

    def leaf_moves(self, moved: Mapping[int, Array]) -> list[Array | None]:
        """For each leaf how far it moves, from moves of parameters and of functions of parameters
        that have a threshold: those are passed on by the nodes' own projections.
        """
        moved = dict(moved)
        found: list[Array | None] = [None] * len(self.leaves)
        latent = latent_nodes(self.graph)
        for index in self.graph.backward_order():
            node = self.graph.nodes[index]
            if node.kind == "parameter" and node.output is not None and index in moved:
                found[node.output] = moved[index]
            if index not in latent or index not in moved or node.rule is None:
                continue
            slots = [self.graph.slots[i] for i in node.slots]
            reference = self._references[index]._replace(
                geometry=Geometry(0, (0.0,) * len(slots), (True,) * len(slots), 2)
            )
            # Operands that weigh next to nothing move as far as the output is to.
            states, _ = node.rule.project(
                reference,
                tuple(jnp.zeros(slot.shape, slot.dtype) for slot in slots),
                (_NEGLIGIBLE,) * len(slots),
                moved[index],
                1.0,
            )
            for slot, state in zip(slots, states, strict=True):
                parts = slot.route.pull(state, self.values)
                for producer, part in zip(slot.producers, parts, strict=True):
                    moved[producer] = moved[producer] + part if producer in moved else part
        return found

    def parameter_forces(self, state: State) -> list[Array | None]:
        """For each leaf `W_v δ_v`, the sum of the forces of its readers; None where nothing reads
        it.
        """
        found: list[Array | None] = [None] * len(self.leaves)
        nodes = [node.index for node in self.graph.parameters]
        for index, force in self.node_forces(nodes, state).items():
            output = self.graph.nodes[index].output
            assert output is not None
            found[output] = force
        return found

    def node_forces(self, nodes: Sequence[int], state: State) -> dict[int, Array]:
        """`W_v δ_v` of the outputs of nodes, by index: the sum of the forces of their readers."""
        found = {}
        for index, deviation in self._targets(nodes, state).items():
            force = scaling.times(self._total_weights[index].mantissa, deviation)
            found[index] = force.astype(deviation.dtype)
        return found

    def slot_force(self, slot: Slot, state: State) -> Array:
        """`ρ δ` of a slot."""
        mean = self.mean(state, slot)
        return scaling.times(self.weights[slot.index].mantissa, mean).astype(mean.dtype)

    def pull(self, slot: Slot, node: int, entries: Array) -> Array:
        """For each entry of a node's output the sum of the `entries` of a slot that read it."""
        parts = slot.route.pull(entries.astype(slot.dtype), self.values)
        return sum(
            part for part, producer in zip(parts, slot.producers, strict=True) if producer == node
        )  # pyright: ignore[reportReturnType]

    def reference(self, node: int) -> Reference:
        """The forward pass at a node."""
        return self._references[node]

    def node_deviation(self, node: Node, state: State) -> Float[Array, ""]:
        """`(Σ ρ |δ|²)^½` over the slots of a node; slots that rest count the force on them."""
        total: Any = jnp.zeros(())
        zero = self.initial()
        for index in node.slots:
            slot = self.graph.slots[index]
            if self.layout.resting[index]:
                total = total + jnp.square(_length(self.mean(state, slot)))
            else:
                total = total + self._slot_distance(slot, state[index], zero[index])
        return jnp.sqrt(total)

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
            total += self._slot_distance(graph.slots[index], moved, state[index])
        if output is None:
            return total
        for index in self._readers[node.index]:
            slot, storage = graph.slots[index], layout.storages[index]
            kept = self._kept_mask(slot, (node.index,))
            if kept is not None:
                self._require_copies(graph.nodes[slot.node], state)
            value = self._routed(slot, {node.index: output})
            if layout.resting[index]:
                continue
            mask = jnp.ones_like(value) if kept is None else 1 - kept
            mantissa, exponent, *_ = self.weights[index]
            total += storage.squared_distance_to(
                self._filled(slot, state[index]), value, mask, mantissa, self._other(slot)
            ) * scaling.power(-exponent)
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


#: A weight beside which that of a node's output is as good as infinite.
_NEGLIGIBLE = 1e-8


def _agree(feeds: Mapping[int, int], others: Mapping[int, int]) -> bool:
    """Whether no source has two producers."""
    return all(feeds.get(var, producer) == producer for var, producer in others.items())


def _widened(value: Any) -> Any:
    dtype = getattr(value, "dtype", None)
    if dtype is None or widened(dtype) == dtype:
        return value
    return value.astype(widened(dtype))


def _infinite_ratio(dtype: Any) -> float:
    """A ratio of weights that stands for an infinite one: adding its inverse to 1 gives 1."""
    return 2.0**40 if jnp.finfo(dtype).bits <= 32 else 2.0**60


def _length(array: Array) -> Array:
    """`|x|`, without squares that underflow."""
    largest = jnp.max(jnp.abs(array))
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(array / scale)))


def _power_between(exponent: Any, other: Any) -> Any:
    """`2**(exponent − other)`; a plain 1 where the two are known to be the same."""
    return 1.0 if exponent is other else scaling.power(exponent - other)


def _share(exponent: Any, largest: Any) -> Any:
    """What a reader's weight is of the largest; never so little that it counts as no reader.

    The steps of a loop read one array with weights that differ by more than numbers can. The force
    on an entry is what counts, and it does not depend on a weight that is far below the largest.
    """
    share = _power_between(exponent, largest)
    return max(share, 2.0**-30) if isinstance(share, float) else jnp.maximum(share, 2.0**-30)


def _largest(exponents: Sequence[Any]) -> Any:
    largest = exponents[0]
    for exponent in exponents[1:]:
        if isinstance(largest, (int, float)) and isinstance(exponent, (int, float)):
            largest = max(largest, exponent)
        else:
            largest = jnp.maximum(largest, exponent)
    return largest


def _divided(state: Any, ratio: Any) -> Any:
    inverse = 1 / ratio if isinstance(ratio, float) else 1 / jnp.maximum(ratio, 2.0**-126)
    return jax.tree_util.tree_map(lambda x: (x * inverse).astype(x.dtype), state)


def _largest_size(coefficients: Sequence[Any]) -> Any:
    """The largest size of losses' coefficients; a plain number where that is known."""
    if all(not isinstance(c, jax.Array) for c in coefficients):
        return max(float(np.max(np.abs(c))) for c in coefficients)
    return jnp.max(jnp.stack([jnp.max(jnp.abs(c)) for c in coefficients]))


def _relative(coefficient: Any, largest: Any) -> Any:
    """A loss's coefficients over the largest of all; a plain 1 where that is known to be so."""
    if isinstance(coefficient, jax.Array) or isinstance(largest, jax.Array):
        return coefficient / jnp.where(largest > 0, largest, 1)
    found = np.asarray(coefficient / (largest if largest > 0 else 1))
    return float(found) if found.ndim == 0 else found


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
