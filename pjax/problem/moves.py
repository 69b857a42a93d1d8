"""What a state says of the parameters: how far they have moved, and the forces on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from pjax.graph import Slot, latent_nodes
from pjax.problem.consensus import Consensus
from pjax.problem.projection import project_nodes
from pjax.problem.state import State, mean
from pjax.problem.weights import Weights
from pjax.projections import scaling
from pjax.rules import Geometry

#: A weight beside which that of a node's output is as good as infinite.
_NEGLIGIBLE = 1e-8


def parameter_deviations(consensus: Consensus, state: State) -> list[Array | None]:
    """For each leaf the weighted mean of its readers, in its set; None where nothing reads it, 0
    where all that reads it is stiff.
    """
    weights = consensus.weights
    nodes = _parameters(weights)
    _, deviations = project_nodes(weights, nodes, state, consensus.targets(nodes, state))
    return _by_leaf(
        weights,
        {i: scaling.from_unit(x, weights.nodes[i].exponent) for i, x in deviations.items()},
    )


def parameter_forces(consensus: Consensus, state: State) -> list[Array | None]:
    """For each leaf the sum of the forces of its readers; None where nothing reads it."""
    weights = consensus.weights
    return _by_leaf(weights, node_forces(consensus, _parameters(weights), state))


def node_forces(consensus: Consensus, nodes: Sequence[int], state: State) -> dict[int, Array]:
    """`W_v δ_v` of the outputs of nodes, by index: the sum of the forces of their readers."""
    return {
        index: scaling.times(consensus.weights.nodes[index].mantissa, x).astype(x.dtype)
        for index, x in consensus.targets(nodes, state).items()
    }


def slot_force(weights: Weights, slot: Slot, state: State) -> Array:
    """`ρ δ` of a slot."""
    deviation = mean(weights, state, slot)
    return scaling.times(weights.slots[slot.index].mantissa, deviation).astype(deviation.dtype)


def leaf_moves(weights: Weights, moved: Mapping[int, Array]) -> list[Array | None]:
    """For each leaf how far it moves, from moves of parameters and of functions of parameters
    that have a threshold: those are passed on by the nodes' own projections.
    """
    moved, graph = dict(moved), weights.graph
    latent = latent_nodes(graph)
    for index in (i for i in graph.backward_order() if i in latent and i in moved):
        node = graph.nodes[index]
        slots = [graph.slots[i] for i in node.slots]
        reference = weights.references[index]._replace(
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
            parts = slot.route.pull(state, weights.forward.values)
            for producer, part in zip(slot.producers, parts, strict=True):
                moved[producer] = moved[producer] + part if producer in moved else part
    return _by_leaf(weights, {i: moved[i] for i in _parameters(weights) if i in moved})


def _parameters(weights: Weights) -> list[int]:
    return [node.index for node in weights.graph.parameters]


def _by_leaf(weights: Weights, of_nodes: Mapping[int, Array]) -> list[Array | None]:
    leaves: list[Array | None] = [None] * len(weights.graph.program.leaves)
    for index, array in of_nodes.items():
        leaf = weights.graph.nodes[index].output
        assert leaf is not None
        leaves[leaf] = array
    return leaves
