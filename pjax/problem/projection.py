"""The projections onto groups of nodes, and the sweep from the losses to the parameters.

A group holds nodes that share no slot entry: the two colours for alternating and reflecting
algorithms, reverse topological levels for cyclic ones. So its projection is that of each node by
itself: targets come from the readers, the rule finds the nearest point, and what reads the node is
written anew. Nothing here knows which algorithm uses it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from pjax.compile import traced_once
from pjax.graph import Node, Slot, feeds_thresholds, latent_nodes
from pjax.problem.consensus import Consensus
from pjax.problem.state import State, filled, slot_distance, unmoved
from pjax.problem.weights import Weights
from pjax.projections import scaling
from pjax.rules import Force, LayerSum


def project(consensus: Consensus, members: Sequence[int], state: State) -> State:
    """The nearest point to `state` that satisfies every node among `members`."""
    new, outputs = project_nodes(
        consensus.weights, members, state, consensus.targets(members, state)
    )
    return written(consensus, members, state, new, outputs)


def written(
    consensus: Consensus,
    members: Sequence[int],
    before: State,
    new: State,
    outputs: Mapping[int, Array],
) -> State:
    """`new`, in which all slots that read nodes among `members` have their outputs."""
    slots = list(new.slots)
    for index in sorted({i for node in outputs for i in consensus.forward.readers[node]}):
        slot = consensus.weights.graph.slots[index]
        slots[index] = consensus.written(members, slot, outputs, before)
    return State(tuple(slots))


def sweep(consensus: Consensus, layer_forces: bool = False) -> State:
    """The forces after one cyclic sweep from the forward pass.

    What reads an output is projected before it, so where outputs move to is of no use.

    **Arguments:**

    - `layer_forces`: for a metric whose parameters are stiff: keep the force on the output of each
        layer. What makes weights of parameters by a threshold is left out, and keeps the forces on
        it for `leaf_moves`.

    **Returns:** a state for the forces on parameters and nodes.
    """
    weights, graph = consensus.weights, consensus.weights.graph
    state, forces = unmoved(weights.layout), {}
    left_out = latent_nodes(graph) if layer_forces else frozenset()
    for members in weights.layout.groups:
        targets = consensus.targets(members, state)
        for index in targets if layer_forces else ():
            node = graph.nodes[index]
            if not isinstance(node.rule, LayerSum):
                continue
            if feeds_thresholds(graph, index):
                targets[index] = node.rule.steadied(targets[index], graph.shapes(node))
            geometry, weight = weights.references[index].geometry, weights.targets[index]
            force = traced_once(node.rule, "force", geometry, targets[index], weight)
            forces[index] = scaling.once(force)
        nodes = [index for index in members if index not in left_out]
        state, _ = project_nodes(weights, nodes, state, targets, forces)
    return State(state.slots, forces)


def project_nodes(
    weights: Weights,
    nodes: Sequence[int],
    state: State,
    targets: Mapping[int, Array],
    forces: Mapping[int, Array] | None = None,
) -> tuple[State, dict[int, Array]]:
    """A state whose slots of these nodes are projected, and the deviations of their outputs, in
    their units.

    **Arguments:**

    - `targets`: of the outputs of these nodes.
    - `forces`: the multipliers of projections, where they are known.
    """
    slots = list(state.slots)
    outputs: dict[int, Array] = {}
    for node in (weights.graph.nodes[index] for index in nodes):
        reference = weights.references[node.index]
        if forces and node.index in forces:
            reference = reference._replace(force=forces[node.index])
        operands = [weights.graph.slots[i] for i in node.slots]
        ratios = [weights.rule_ratio(slot) for slot in operands]
        moved, output = traced_once(
            node.rule,
            "project",
            reference,
            tuple(
                _into_node(weights, node, slot, state.slots[slot.index], ratio)
                for slot, ratio in zip(operands, ratios, strict=True)
            ),
            tuple(
                weights.slots[slot.index].mantissa * ratio
                for slot, ratio in zip(operands, ratios, strict=True)
            ),
            targets.get(node.index),
            weights.targets[node.index],
        )
        for slot, new, ratio in zip(operands, moved, ratios, strict=True):
            slots[slot.index] = _out_of_node(weights, slot, state.slots[slot.index], new, ratio)
        if output is not None:
            outputs[node.index] = output
    return State(tuple(slots)), outputs


def _into_node(weights: Weights, node: Node, slot: Slot, state: Any, ratio: Any) -> Any:
    """A slot's state in the unit of its node."""
    storage = weights.layout.storages[slot.index]
    if state is None or weights.is_stiff(slot):
        if node.rule.accepts_unmoved:
            return None
        zeros = jnp.zeros(slot.shape, slot.dtype)
        return zeros if storage.in_parts else storage.fill(zeros)
    if storage.in_parts:
        state = storage.mean(state)
    if isinstance(ratio, float) and ratio == 1:
        return state
    inverse = 1 / ratio if isinstance(ratio, float) else 1 / jnp.maximum(ratio, 2.0**-126)
    return jax.tree_util.tree_map(lambda x: (x * inverse).astype(x.dtype), state)


def _out_of_node(weights: Weights, slot: Slot, before: Any, moved: Any, ratio: Any) -> Any:
    """What the projection made of it, in the slot's unit; stiff slots gather the forces."""
    if isinstance(moved, Force):
        # The rule's weight is the mantissa times the ratio, which would come back here.
        mantissa = weights.slots[slot.index].mantissa
        moved = moved.value
        if not (isinstance(mantissa, float) and mantissa == 1):
            moved = (moved / mantissa).astype(moved.dtype)
    elif not (isinstance(ratio, float) and ratio == 1):
        moved = jax.tree_util.tree_map(lambda x: (x * ratio).astype(x.dtype), moved)
    storage = weights.layout.storages[slot.index]
    if storage.in_parts:
        moved = storage.fill(moved)
    if before is None or not weights.is_stiff(slot):
        return moved
    return jax.tree_util.tree_map(jnp.add, before, moved)


def squared_residual(consensus: Consensus, node: Node, state: State) -> Array:
    """The squared distance of a state to a node's constraint; of a loss, of its proximal step."""
    weights, graph, layout = consensus.weights, consensus.weights.graph, consensus.weights.layout
    _require_copies(consensus, node, state)
    targets = consensus.targets((node.index,), state)
    moved, outputs = project_nodes(weights, (node.index,), state, targets)
    total = jnp.zeros(())
    for index in node.slots:
        total += slot_distance(weights, graph.slots[index], moved, state)
    for index in consensus.forward.readers[node.index] if outputs else ():
        slot = graph.slots[index]
        others = consensus.reads_others(slot, outputs)
        if others is not None:
            _require_copies(consensus, graph.nodes[slot.node], state)
        if layout.stiff[index]:
            continue
        value = consensus.routed(slot, outputs)
        mask = jnp.ones_like(value) if others is None else 1 - others
        mantissa, exponent, *_ = weights.slots[index]
        total += layout.storages[index].squared_distance_to(
            filled(layout, slot, state), value, mask, mantissa, consensus.forward.data_of(slot)
        ) * scaling.power(-exponent)
    return jnp.maximum(total, 0)


def _require_copies(consensus: Consensus, node: Node, state: State) -> None:
    for index in node.slots:
        spread = consensus.weights.layout.storages[index].spread(state.slots[index])
        if not isinstance(spread, Tracer) and float(spread) > 0:
            raise ValueError(
                f"The residual of `{node.name}` needs the copies of its operands, of which "
                "this state keeps the mean. Make the problem with `reflecting=True`."
            )
