"""What is to lie in a set: `pjax.constrain`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
from jaxtyping import Array

from pjax.options import Exactness
from pjax.projections import scaling
from pjax.rules.base import Rule


@dataclass(frozen=True)
class Membership(Rule):
    """`x ∈ C`, at the end of the graph as losses are.

    **Attributes:**

    - `structure`: of the set, whose numbers are data.
    - `axes`: for each axis that was mapped over, from the first: whether the numbers have it.
    """

    exactness: ClassVar[Exactness] = "exact"

    structure: Any
    axes: tuple[tuple[int | None, ...], ...] = ()
    name: str = "constrain"

    def _each(self, function: Any, x: Array, numbers: Sequence[Any]) -> Array:
        """A function of a set and an array, for each of the arrays that were mapped over."""

        def of_one(x: Array, *numbers: Any) -> Array:
            return function(jax.tree.unflatten(self.structure, numbers), x)

        for own in reversed(self.axes):
            of_one = jax.vmap(of_one, (0, *own))
        return of_one(x, *numbers)

    def project(self, reference, states, weights, target, target_weight):
        (state,), (value,) = states, reference.inputs
        # What is infinitely stiff does not move: the force is that on a value of weight 1.
        stiff = isinstance(weights[0], float) and weights[0] >= STIFF
        exponent = 0 if stiff else reference.geometry.exponent
        point = value + scaling.from_unit(state, exponent)
        move = self._each(lambda one, x: one.project(x), point, reference.knowns) - point
        move = scaling.to_unit(move.astype(state.dtype), exponent)
        return (state + (move / weights[0] if stiff else move),), None

    def distances(self, reference: Any) -> Array:
        """How far the forward pass is from the set, for each of those that were mapped over."""
        return self._each(lambda one, x: one.distance(x), reference.inputs[0], reference.knowns)


#: Weights from here on stand for infinite ones.
STIFF = 2.0**40
