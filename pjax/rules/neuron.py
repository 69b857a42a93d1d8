"""Products in neuron splitting: one constraint for each entry of the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from pjax.options import Exactness
from pjax.projections.products import compact, lifted, pinned
from pjax.projections.products.operation import Bilinear, Multiply, Side
from pjax.rules.base import Rule
from pjax.rules.storages import Compact, Dense, Lifted, Structured


@dataclass(frozen=True)
class NeuronBilinear(Rule):
    """Two free operands, one constraint per scalar product, on copies of their slices."""

    exactness: ClassVar[Exactness] = "exact"

    operation: Bilinear
    name: str = "dot"

    def storages(self, reflecting, shared):
        op = self.operation
        if isinstance(op, Multiply):
            return Dense(), Dense()
        if reflecting:
            return Lifted(op, "left"), Lifted(op, "right")
        return Compact(op, "left"), Compact(op, "right")

    def project(self, reference, states, weights, target, target_weight):
        op, (left, right) = self.operation, states
        left_ref, right_ref = reference.inputs
        rest: Any = (*weights, target, target_weight, reference.output)
        if isinstance(op, Multiply):
            out = compact.project_compact(op, left_ref, right_ref, left, right, *rest)
            return (out.left, out.right), out.output
        if isinstance(left, tuple):
            out = compact.project_compact(op, left_ref, right_ref, left[0], right[0], *rest)
            return ((out.left, out.left_spread), (out.right, out.right_spread)), out.output
        out = lifted.project_lifted(op, left_ref, right_ref, left, right, *rest)
        return (out.left_copies, out.right_copies), out.output


@dataclass(frozen=True)
class PinnedBilinear(Rule):
    """One operand is data: the node is linear, and its copies are never formed."""

    exactness: ClassVar[Exactness] = "exact"

    operation: Bilinear
    pinned: Side
    name: str = "dot"

    def storages(self, reflecting, shared):
        op = self.operation
        # Of one scalar product every entry has one copy, and nothing to be compact about.
        if not reflecting and op.output_shape:
            return (Compact(op, "right" if self.pinned == "left" else "left"),)
        if shared[0]:
            # Entries that one group writes and another keeps leave the structured form.
            return (Lifted(op, "right" if self.pinned == "left" else "left"),)
        return (Structured(op, self.pinned),)

    def project(self, reference, states, weights, target, target_weight):
        (state,), (weight,), (value,) = states, weights, reference.knowns
        if not isinstance(state, tuple):
            return self._project_copies(value, state, weight, target, target_weight)
        first, second = state
        if jnp.ndim(second) == 0 and self.operation.output_shape:
            mean, output, spread = pinned.project_pinned_compact(
                self.operation, self.pinned, value, first, weight, target, target_weight
            )
            return ((mean, spread),), output
        common, multiplier, output = pinned.project_pinned_structured(
            self.operation, self.pinned, value, first, second, weight, target, target_weight
        )
        return ((common, multiplier),), output

    def _project_copies(self, value, copies, weight, target, target_weight):
        op = self.operation
        data = op.lift_left(value) if self.pinned == "left" else op.lift_right(value)
        product, energy = jnp.sum(data * copies, axis=-1), jnp.sum(jnp.square(data), axis=-1)
        force = target_weight * (target - product) / (1 + target_weight * energy / weight)
        return (copies + data * (force / weight)[..., None],), product + energy * force / weight
