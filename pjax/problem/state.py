"""The state of a problem: how far every slot is from the forward pass.

Deviations are in the form that the slot's storage gives them and in the slot's unit. Distances are
in the metric, over all copies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjax.graph import Node, Slot
from pjax.problem.layouts import Layout
from pjax.problem.weights import Weights
from pjax.projections import scaling


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A point of a problem.

    **Attributes:**

    - `slots`: for each slot its deviation, in the form of its storage; None for 0.
    - `forces`: after a sweep that asks for them: the force on the output of each layer, by the
        index of its node.
    """

    slots: tuple[Any, ...]
    forces: Mapping[int, Array] = field(default_factory=dict)


def zero(layout: Layout) -> State:
    """The forward pass itself: every deviation 0, as arrays."""
    return State(tuple(zeros(layout, slot) for slot in layout.graph.slots))


def unmoved(layout: Layout) -> State:
    """The same with None for each deviation: what has not moved costs nothing in a first step.

    Only for solvers that project and do not combine states.
    """
    if layout.formulation.splitting != "layer":
        return zero(layout)
    return State((None,) * len(layout.graph.slots))


def zeros(layout: Layout, slot: Slot) -> Any:
    """A deviation of 0 in the form of a slot's storage."""
    return layout.storages[slot.index].fill(jnp.zeros(slot.shape, slot.dtype))


def filled(layout: Layout, slot: Slot, state: State) -> Any:
    """A slot's deviation, as arrays."""
    value = state.slots[slot.index]
    return zeros(layout, slot) if value is None else value


def mean(weights: Weights, state: State, slot: Slot) -> Array:
    """The deviation of a slot, in its unit; of a slot with copies, their mean."""
    value = state.slots[slot.index]
    if value is None:
        return jnp.zeros(slot.shape, slot.dtype)
    return weights.layout.storages[slot.index].mean(value, weights.forward.data_of(slot))


def difference(layout: Layout, a: State, b: State) -> State:
    """`a − b`, as a state."""
    return State(
        tuple(
            storage.difference(filled(layout, slot, a), filled(layout, slot, b))
            for slot, storage in zip(layout.graph.slots, layout.storages, strict=True)
        )
    )


def squared_distance(weights: Weights, a: State, b: State) -> Float[Array, ""]:
    """`Σ ρ |a − b|²` over all slots and copies."""
    parts = [
        slot_distance(weights, slot, a, b)
        for slot in weights.graph.slots
        if a.slots[slot.index] is not b.slots[slot.index]
    ]
    # Added at once: in a chain each would wait for the one before.
    return jnp.sum(jnp.stack(parts)) if parts else jnp.zeros(())


def slot_distance(weights: Weights, slot: Slot, a: State, b: State) -> Array:
    """`Σ ρ |a − b|²` over a slot; 0 where it is stiff."""
    layout = weights.layout
    if layout.stiff[slot.index]:
        return jnp.zeros(())
    mantissa, exponent, *_ = weights.slots[slot.index]
    return layout.storages[slot.index].squared_distance(
        filled(layout, slot, a), filled(layout, slot, b), mantissa, weights.forward.data_of(slot)
    ) * scaling.power(-exponent)


def node_deviation(weights: Weights, node: Node, state: State) -> Float[Array, ""]:
    """`(Σ ρ |δ|²)^½` over the slots of a node; stiff slots count the force on them."""
    total: Any = jnp.zeros(())
    start = zero(weights.layout)
    for slot in (weights.graph.slots[i] for i in node.slots):
        if weights.layout.stiff[slot.index]:
            total = total + jnp.square(_length(mean(weights, state, slot)))
        else:
            total = total + slot_distance(weights, slot, state, start)
    return jnp.sqrt(total)


def _length(array: Array) -> Array:
    """`|x|`, without squares that underflow."""
    largest = jnp.max(jnp.abs(array))
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(array / scale)))
