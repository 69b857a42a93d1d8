"""How far a state is from the constraint of each node."""

from __future__ import annotations

import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from pjax.graph import Node
from pjax.problem.consensus import Consensus
from pjax.problem.projection import project_nodes
from pjax.problem.state import State, filled, slot_distance
from pjax.projections import scaling


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
