"""What a metric makes of a forward pass: a weight and a unit for each slot and each node.

A slot of weight `ρ = m · 2**k` keeps its deviation in a unit of `2**−k`, so that `m` times the
state is the *force* `ρ δ` on it. With a uniform metric `k` is 0; with a spectral one deviations are
far below the range of float32 in a deep network, and forces are not. A slot of infinite weight is
*stiff*: its deviation is 0, and the state is the force alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pjax.graph import Node, Slot
from pjax.problem.forward import ForwardPass, bounded_power, power_between
from pjax.rules import STIFF, Geometry, Membership, Reference
from pjax.sets import Set


class Weights:
    """The weights of one problem; what does not change during a solve is computed here, once.

    **Attributes:**

    - `forward`: the forward pass that they are of.
    - `slots`: ρ of each slot; of one that stands for copies, of each copy.
    - `gains`: for each slot the bound on its squared gain.
    - `vectors`: for each slot where the power iterations of the next problem may begin, or None.
    - `nodes`: for each node but losses `W_v`, with which its readers hold on to its output.
    - `targets`: the target weight that a node's rule is given: `W_v`, or 1 in the paper's
        convention; of a loss the prox step of each row.
    - `references`: the reference point of each node, with its geometry, and its set.
    """

    def __init__(self, forward: ForwardPass, sets: Sequence[Set | None] = ()):
        self.forward, self.layout, self.graph = forward, forward.layout, forward.graph
        self.slots, self.gains, self.vectors = self.layout.formulation.metric.weigh(forward)
        if forward.behind is not None and self.graph.exit is not None:
            self.slots = list(self.slots)
            self.slots[self.graph.exit.index] = forward.behind
        by_index = dict(enumerate(self.slots))
        self.nodes = {
            node.index: forward.reader_weight(node.index, by_index)
            for node in self.graph.nodes
            if node.kind != "loss"
        }
        mantissas = {index: weight.mantissa for index, weight in self.nodes.items()}
        if self.layout.formulation.fanout == "paper":
            mantissas = {index: _one_if_read(weight) for index, weight in mantissas.items()}
        self.targets: dict[int, Any] = mantissas | forward.rows.prox_steps
        self.references: dict[int, Reference] = {
            node.index: forward.references[node.index]._replace(
                geometry=self._geometry(node), within=self._within(node, sets)
            )
            for node in self.graph.nodes
        }

    def squared_violations(self) -> dict[str, Any]:
        """How far the forward pass is from the sets of `pjax.constrain`, squared, by the line."""
        squares: dict[str, Any] = {}
        for node in self.graph.losses:
            if isinstance(node.rule, Membership):
                distances = node.rule.distances(self.references[node.index])
                line = node.source or node.name
                squares[line] = squares.get(line, jnp.zeros(())) + jnp.sum(jnp.square(distances))
        return squares

    def _within(self, node: Node, sets: Sequence[Set | None]) -> tuple[Set, Any] | None:
        """The set of a parameter, and the weight with which its readers hold on to it."""
        one = sets[node.output] if sets and node.kind == "parameter" else None  # pyright: ignore
        return None if one is None else (one, self.nodes[node.index].mantissa)

    def _geometry(self, node: Node) -> Geometry:
        return Geometry(
            self._exponent(node),
            tuple(self._compliance(self.graph.slots[i]) for i in node.slots),
            tuple(self.layout.curved[i] for i in node.slots),
            self.layout.formulation.metric.iterations,
        )

    def _exponent(self, node: Node) -> Any:
        """The exponent of a node's unit: that of its output, or of the slot of a loss."""
        if node.kind == "loss":
            return self.slots[node.slots[0]].exponent
        return self.nodes[node.index].exponent

    def _compliance(self, slot: Slot) -> Any:
        """The bound on a slot's squared gain over its weight, in the unit of its node."""
        gain, weight = self.gains[slot.index], self.slots[slot.index]
        if gain is None or (isinstance(gain, float) and gain == 0):
            return gain
        if weight.compliance is not None:
            return weight.compliance
        return gain / (weight.mantissa * self.ratio(slot, slot.node))

    def is_stiff(self, slot: Slot) -> bool:
        """Whether the slot is infinitely stiffer than the readers of its node."""
        if not self.layout.stiff[slot.index]:
            return False
        if self.graph.nodes[slot.node].kind == "loss":
            return True
        return not all(self.layout.stiff[i] for i in self.forward.readers[slot.node])

    def ratio(self, slot: Slot, node: int) -> Any:
        """`2**(k_s − K_v)`: from the unit of a node to that of a slot that it has or writes to."""
        weight = self.slots[slot.index]
        exponent = self._exponent(self.graph.nodes[node])
        if node != slot.node:
            return bounded_power(weight.exponent, exponent)
        if weight.relative is not None:
            return weight.relative
        return power_between(weight.exponent, exponent)

    def rule_ratio(self, slot: Slot) -> Any:
        """The `ratio` of a slot to its node that a rule sees: of a stiff slot a number so large
        that adding its inverse to 1 gives 1.
        """
        if not self.is_stiff(slot):
            return self.ratio(slot, slot.node)
        return STIFF if jnp.finfo(slot.dtype).bits <= 32 else 2.0**60


def _one_if_read(weight: Any) -> Any:
    if isinstance(weight, jax.Array):
        return jnp.where(weight > 0, 1.0, 0.0).astype(weight.dtype)
    return 1.0
