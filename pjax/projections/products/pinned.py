"""Projections onto `y = B(x, w)` where one factor is known.

Every function solves, for all scalar products `j` of an operation at once, with slices `Xⱼ` fixed,

    argmin Σ_j ρ|wⱼ' − wⱼ|² + W (Xⱼ·wⱼ' − zⱼ)²

and takes

- `op`, `side`, `pinned_value`: the bilinear operation, which operand is pinned, and its value;
- `free_dev`: the deviation of the free operand; or `common` and `multiplier`, for copies
  `wⱼ = common + mⱼ Xⱼ`;
- `free_weight`: the positive weight of one copy, a scalar or broadcasting to the output;
- `target_dev`, `target_weight`: the deviation of the target `z` from the reference output, and `W`;
  0 where nothing is asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pjax.projections.products.operation import Bilinear, Copies, Side, Weight
from pjax.projections.products.scalar_products import copies_weight


@dataclass(frozen=True)
class PinnedMap:
    """The linear map `free -> B` that remains when one operand of `op` is pinned.

    Arguments:
        op: the bilinear operation.
        side: which operand is pinned.
        pinned: the full value of that operand.
    """

    op: Bilinear
    side: Side
    pinned: Array

    def apply(self, free: Array) -> Array:
        """`B` of the pinned and the free operand."""
        left = self.side == "left"
        return self.op(self.pinned, free) if left else self.op(free, self.pinned)

    def transpose(self, cotangent: Array) -> Array:
        """The transpose of `apply`, in the shape of the free operand."""
        if self.side == "left":
            return self.op.transpose_right(cotangent, self.pinned)
        return self.op.transpose_left(cotangent, self.pinned)

    @property
    def energy(self) -> Array:
        """`|X|²` of the pinned slice that each output reads, broadcasting to the output."""
        squared = self.pinned**2
        left = self.side == "left"
        return self.op.left_energy(squared) if left else self.op.right_energy(squared)

    @property
    def copies(self) -> Copies:
        """How many outputs read each free entry."""
        return self.op.copies("right" if self.side == "left" else "left")

    def copies_weight(self, weight: Weight) -> Array:
        """The sum of the weights of all copies of each free entry, 1 where there is no copy."""
        total = self.op.right_sum if self.side == "left" else self.op.left_sum
        return copies_weight(weight, self.copies, total, self.op.output_shape)

    def force(
        self, value: Array, free_weight: Array, target_dev: Array, target_weight: Array
    ) -> tuple[Array, Array]:
        """`e = W (z − value)/(1 + W |X|²/ρ)` and the output `value + |X|² e/ρ` it leads to."""
        gain = self.energy / free_weight
        force = target_weight * (target_dev - value) / (1 + target_weight * gain)
        return force, value + gain * force


class PinnedProjection(NamedTuple):
    """Deviations of the mean of the free copies and of the output; `Σ ρ |copy − mean|²`."""

    free: Float[Array, "*free"]
    output: Float[Array, "*output"]
    spread: Float[Array, ""]


def project_pinned_compact(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    free_dev: Float[Array, "*free"],
    free_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
) -> PinnedProjection:
    """The mean over the copies after the projection, all equal on entry, by two products."""
    linear = PinnedMap(op, side, pinned_value)
    value = linear.apply(free_dev)
    free_weight = jnp.asarray(free_weight, value.dtype)
    target_weight = jnp.asarray(target_weight, value.dtype)
    force, output = linear.force(value, free_weight, target_dev, target_weight)
    total = linear.copies_weight(free_weight)
    move = linear.transpose(force) / total
    squared = jnp.sum(linear.energy * force**2 / free_weight) - jnp.sum(total * move**2)
    return PinnedProjection(free_dev + move, output, jnp.maximum(squared, 0))


class StructuredProjection(NamedTuple):
    """The copies `common + X·multiplier`, and the output deviation."""

    common: Float[Array, "*free"]
    multiplier: Float[Array, "*output"]
    output: Float[Array, "*output"]


def project_pinned_structured(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    common: Float[Array, "*free"],
    multiplier: Float[Array, "*output"],
    free_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
) -> StructuredProjection:
    """The projection over copies `wⱼ = common + mⱼ Xⱼ`, by one product.

    The result has the same form with the same `common`, so that every affine combination of such
    copies (reflections, relaxations, consensus) is stored in one array of the free operand's shape
    and one of the output's.
    """
    linear = PinnedMap(op, side, pinned_value)
    value = linear.apply(common) + linear.energy * multiplier
    free_weight = jnp.asarray(free_weight, value.dtype)
    target_weight = jnp.asarray(target_weight, value.dtype)
    force, output = linear.force(value, free_weight, target_dev, target_weight)
    return StructuredProjection(common, multiplier + force / free_weight, output)


def structured_mean(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    common: Float[Array, "*free"],
    multiplier: Float[Array, "*output"],
    free_weight: Weight = 1.0,
) -> Float[Array, "*free"]:
    """`Σ_j ρⱼ wⱼ / Σ_j ρⱼ` over the copies of each free entry."""
    linear = PinnedMap(op, side, pinned_value)
    free_weight = jnp.asarray(free_weight, common.dtype)
    return common + linear.transpose(free_weight * multiplier) / linear.copies_weight(free_weight)


def structured_squared_norm(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    common: Float[Array, "*free"],
    multiplier: Float[Array, "*output"],
    free_weight: Weight = 1.0,
) -> Float[Array, ""]:
    """`Σ_j ρⱼ |wⱼ|²` over all copies of the free operand."""
    linear = PinnedMap(op, side, pinned_value)
    free_weight = jnp.asarray(free_weight, common.dtype)
    shared = linear.copies_weight(free_weight) * (np.asarray(linear.copies) > 0)
    weighted = free_weight * multiplier
    mixed = linear.transpose(weighted)
    squared = jnp.sum(shared * common**2 + 2 * common * mixed)
    return jnp.maximum(squared + jnp.sum(linear.energy * weighted * multiplier), 0)
