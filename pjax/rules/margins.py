"""Signs with a margin: of numbers, and of scalar products as one constraint each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from pjax.options import Exactness
from pjax.projections import margins
from pjax.projections.piecewise import PiecewiseLinear
from pjax.projections.products.operation import Bilinear
from pjax.rules.base import Rule
from pjax.rules.storages import Lifted

#: −1 and 1.
SIGN = PiecewiseLinear.identity().sign()


@dataclass(frozen=True)
class SignedNumber(Rule):
    """`y = ±1` with `y x ≥ margin`."""

    exactness: ClassVar[Exactness] = "exact"

    margin: float
    name: str = "threshold"

    def project(self, reference, states, weights, target, target_weight):
        (value,) = reference.inputs
        found = margins.signed_number(
            value + states[0], reference.output + target, self.margin,
            _array(weights[0], target), _array(target_weight, target),
        )  # fmt: skip
        return (found.x - value,), found.sign - reference.output


@dataclass(frozen=True)
class SignedProduct(Rule):
    """`y = ±1` with `y B(x, w) ≥ margin`, one constraint for each scalar product.

    **Attributes:**

    - `operation`: `B`.
    - `free`: which of its operands are slots. An operand that is data stays, unless there is a
        state for it: where all operations are one set, data has copies like what is learned.
    - `margin`: not negative.
    """

    exactness: ClassVar[Exactness] = "exact"

    operation: Bilinear
    free: tuple[bool, bool]
    margin: float
    name: str = "threshold_dot"

    def storages(self, reflecting, shared):
        return tuple(
            Lifted(self.operation, side)
            for side, moving in zip(("left", "right"), self.free, strict=True)
            if moving
        )

    def all_storages(self) -> tuple[Lifted, Lifted]:
        """Those of both operands, also of one that is data."""
        return Lifted(self.operation, "left"), Lifted(self.operation, "right")

    def project(self, reference, states, weights, target, target_weight):
        op, sign = self.operation, reference.output + target
        dtype, target_weight = target.dtype, _array(target_weight, target)
        first, *others = (jnp.asarray(weight, dtype) for weight in weights)
        slots, knowns = iter(reference.inputs), iter(reference.knowns)
        values = [next(slots if free else knowns).astype(dtype) for free in self.free]
        left, right = op.lift_left(values[0]), op.lift_right(values[1])
        if len(states) == 2:
            # Where a slice reads a constant, such as padding, there is no copy.
            left, right = (
                op.mask_slices(v + s) for v, s in zip((left, right), states, strict=True)
            )
            found = margins.signed_product(
                left, right, sign, self.margin, first, others[0], target_weight,
                op.mask_slices(jnp.ones_like(left)),
            )  # fmt: skip
            moves = (found.left - left, found.right - right)
        else:
            data, value = (left, right) if self.free[1] else (right, left)
            copies = value + states[0]
            found = margins.signed_product_of_data(
                data, copies, sign, self.margin, first, target_weight
            )
            moves = (op.mask_slices(found.right - copies),)
        moved = tuple(state + move for state, move in zip(states, moves, strict=True))
        return moved, found.sign - reference.output


def _array(weight: object, like: Array) -> Array:
    return jnp.asarray(weight, like.dtype)
