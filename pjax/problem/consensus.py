"""Consensus: what the readers of a node make of its output, and how an output reaches them.

Before a projection each node takes the weighted mean of the entries that read it for its target;
after it the slots that read the node are written anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pjax.graph import Slot
from pjax.problem.state import State, filled, mean
from pjax.problem.weights import Weights


class Consensus:
    """The wires of one problem between nodes and their readers."""

    def __init__(self, weights: Weights):
        self.weights, self.forward = weights, weights.forward
        layout = weights.layout
        # A solver over colours projects onto each set again and again: what it leaves of the slots
        # that both sets write to is found outside of its loop.
        groups = layout.groups if layout.formulation.grouping == "colours" else ()
        self._others = {
            (slot.index, members): self.reads_others(slot, members)
            for slot in weights.graph.slots
            for members in map(frozenset, groups)
            if not members.isdisjoint(slot.producers) and not layout.storages[slot.index].in_parts
        }
        # The weights of joined slots, for each part.
        self._factors = {
            slot.index: self._part_weights(slot)
            for slot in weights.graph.slots
            if layout.storages[slot.index].in_parts
        }

    def targets(self, nodes: Sequence[int], state: State) -> dict[int, Array]:
        """The weighted mean of the entries that read each node, in the node's unit."""
        members = set(nodes)
        sums: dict[int, Any] = {}
        single: dict[int, Array] = {}
        pending: list[tuple[Slot, Array]] = []
        indices = {i for node in nodes for i in self.forward.readers[node]}
        for slot in (self.weights.graph.slots[i] for i in sorted(indices)):
            storage = self.weights.layout.storages[slot.index]
            if storage.in_parts and state.slots[slot.index] is not None:
                parts = zip(
                    slot.producers, state.slots[slot.index], self._factors[slot.index], strict=True
                )
                # Each level weighs the parts that are its own: of `T` steps `T` parts in all.
                for producer, part, factor in parts:
                    if producer in members:
                        part = (part * factor).astype(part.dtype)
                        sums[producer] = sums[producer] + part if producer in sums else part
                continue
            value = mean(self.weights, state, slot)
            if slot.route.direct and len(self.forward.readers[slot.producers[0]]) == 1:
                single[slot.producers[0]] = value
                continue
            if state.slots[slot.index] is None:
                for producer, var in zip(slot.producers, slot.route.sources, strict=True):
                    if producer in members:
                        sums.setdefault(producer, jnp.zeros_like(self.forward.values[var]))
                continue
            weight = self.weights.slots[slot.index].mantissa * self.forward.copies(slot)
            pending.append((slot, (value * weight).astype(value.dtype)))
        for producer, part in self.forward.pull(pending):
            if producer in members:
                sums[producer] = sums[producer] + part if producer in sums else part
        targets = dict(single)
        for producer, total in sums.items():
            weight = self.weights.nodes[producer].mantissa
            if isinstance(weight, jax.Array):
                weight = jnp.where(weight > 0, weight, 1)
            targets[producer] = (total / weight).astype(total.dtype)
        return targets

    def _part_weights(self, slot: Slot) -> Sequence[Any]:
        weight: Any = self.weights.slots[slot.index].mantissa
        if not jnp.ndim(weight):
            return (weight,) * len(slot.producers)
        storage = self.weights.layout.storages[slot.index]
        return storage.fill(jnp.broadcast_to(weight, slot.shape))

    def written(
        self, members: Collection[int], slot: Slot, outputs: Mapping[int, Array], state: State
    ) -> Any:
        """The state of a slot after the producers of it among `members` have moved to `outputs`."""
        layout, key = self.weights.layout, (slot.index, frozenset(members))
        storage = layout.storages[slot.index]
        if storage.in_parts:
            return tuple(
                self._sent(slot, producer, outputs[producer]) if producer in outputs else part
                for producer, part in zip(slot.producers, filled(layout, slot, state), strict=True)
            )
        value = self.routed(slot, outputs)
        others = self._others[key] if key in self._others else self.reads_others(slot, outputs)
        if others is None:
            return storage.fill(value)
        return storage.combine(filled(layout, slot, state), others, value)

    def routed(self, slot: Slot, outputs: Mapping[int, Array]) -> Array:
        """What a slot reads of `outputs`; 0 where it reads other producers, or a constant."""
        return slot.route(
            [self._sent(slot, n, outputs[n]) if n in outputs else None for n in slot.producers],
            self.forward.values,
        )

    def _sent(self, slot: Slot, producer: int, output: Array) -> Array:
        """The deviation of a producer's output in the unit of a slot that reads it."""
        ratio = self.weights.ratio(slot, producer)
        plain = isinstance(ratio, float) and ratio == 1
        return output if plain else (output * ratio).astype(output.dtype)

    def reads_others(self, slot: Slot, members: Collection[int]) -> Array | None:
        """1 where a slot reads no producer among `members`; None if all its producers are.

        Entries that read no producer at all, but a constant, count as read from the first one, so
        that they are written once.
        """
        is_member = [producer in members for producer in slot.producers]
        if all(is_member):
            return None
        values = self.forward.values
        ones = [jnp.ones_like(values[var]) for var in slot.route.sources]
        others = [None if m else o for o, m in zip(ones, is_member, strict=True)]
        mask = slot.route(others, values)
        return mask if is_member[0] else mask + 1 - slot.route(ones, values)
