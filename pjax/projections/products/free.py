"""Projections onto `y = B(x, w)` with both factors free: each entry has a copy for each output.

Every function solves, for all scalar products `j` of an operation at once,

    argmin Σ_j ρx|xⱼ' − xⱼ|² + ρw|wⱼ' − wⱼ|² + W (xⱼ'·wⱼ' − zⱼ)²

*Lifted*: all copies are stored. *Compact*: they agree on entry, and only their mean leaves. All
take

- `op`: the bilinear operation;
- `left_ref`, `right_ref`: reference operands, in the shapes of the operands;
- deviations of the operands, or of their copies, in the shape `[*output_shape, slice_length]`,
  ordered as by `op.lift_left` and `op.lift_right`;
- `left_weight`, `right_weight`: positive weights of one copy, constant over a slice: scalars, or
  arrays that broadcast to the output;
- `target_dev`: the deviation of the target `z` from `output_ref`, `op(left_ref, right_ref)`;
- `target_weight`: `W`, a scalar or broadcasting to the output; 0 where nothing is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pjax.projections.products.operation import Bilinear, Weight
from pjax.projections.products.scalar_products import (
    ProductMoves,
    asked_products,
    copies_weight,
    scalar_product_moves,
)


class LiftedProjection(NamedTuple):
    """Deviations of the copies, `[*output_shape, slice_length]`, and of the output."""

    left_copies: Float[Array, "*output slice"]
    right_copies: Float[Array, "*output slice"]
    output: Float[Array, "*output"]


def project_lifted(
    op: Bilinear,
    left_ref: Float[Array, "*left"],
    right_ref: Float[Array, "*right"],
    left_copies_dev: Float[Array, "*output slice"],
    right_copies_dev: Float[Array, "*output slice"],
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
    output_ref: Float[Array, "*output"],
) -> LiftedProjection:
    """The projection over the copies themselves, each scalar product with its own two slices."""
    # The residual is a sum of products of deviations; the value itself is not needed.
    del output_ref
    moves = lifted_moves(
        op, left_ref, right_ref, left_copies_dev, right_copies_dev, left_weight, right_weight,
        target_dev, target_weight,
    )  # fmt: skip
    left, right = left_copies_dev + moves.left_copies, right_copies_dev + moves.right_copies
    # Stored once; XLA would find them again in each kernel that reads them.
    left, right = lax.optimization_barrier((left, right))
    return LiftedProjection(left, right, moves.output)


def lifted_moves(
    op: Bilinear,
    left_ref: Array,
    right_ref: Array,
    left_copies_dev: Array,
    right_copies_dev: Array,
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Array,
    target_weight: Weight,
) -> LiftedProjection:
    """How far `project_lifted` moves the copies, and the output deviation."""
    dtype = jnp.result_type(left_copies_dev, right_copies_dev, target_dev)
    left_root = jnp.sqrt(jnp.asarray(left_weight, dtype))
    right_root = jnp.sqrt(jnp.asarray(right_weight, dtype))
    left_base, right_base = op.lift_left(left_ref), op.lift_right(right_ref)
    left, right = left_base + left_copies_dev, right_base + right_copies_dev
    # A factor, not a quotient: XLA would store the quotient rather than divide twice.
    x, w = left * per_slice(1 / right_root), right * per_slice(1 / left_root)
    change, plus, minus = _sum_slices(
        left_base * right_copies_dev + left_copies_dev * right, *_energies(x, w)
    )
    moves = scalar_product_moves(
        plus,
        minus,
        target_dev - change,
        left_root * right_root,
        asked_products(op, target_weight, dtype),
        op.slice_lengths,
        lambda moves: moves,
        slices_at_hand=True,
    )
    near, sign, cross = moves.near[..., None], moves.sign[..., None], moves.cross[..., None]
    left_scale, right_scale = moves.left_scale[..., None], moves.right_scale[..., None]
    left_fill, right_fill = moves.fill / left_root, moves.sign * moves.fill / right_root
    left_move = near * (w + sign * x) + left_scale * x + cross * w
    right_move = near * (x + sign * w) + right_scale * w + cross * x
    return LiftedProjection(
        per_slice(right_root) * left_move + op.mask_slices(left_fill[..., None]),
        per_slice(left_root) * right_move + op.mask_slices(right_fill[..., None]),
        change + moves.output,
    )


def _energies(x: Array, w: Array) -> tuple[Array, Array]:
    """The terms of `|x ± w|²/2`."""
    return (x + w) ** 2 / 2, (x - w) ** 2 / 2


def _sum_slices(*copies: Array) -> Sequence[Array]:
    """Sum each array over the slice axis, the last, in one pass.

    One reduction of several operands reads the copies once and stores nothing of their size; three
    sums did, and took 2.5 to 7 times as long (XLA on CPU, 1.3 MB and 17 MB of copies).
    """
    zeros = tuple(jnp.zeros((), array.dtype) for array in copies)
    return lax.reduce(copies, zeros, _add_each, (copies[0].ndim - 1,))


def _add_each(sums: Sequence[Array], terms: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(sums, terms, strict=True))


def per_slice(weight: Array) -> Array:
    return weight if weight.ndim == 0 else weight[..., None]


class CompactProjection(NamedTuple):
    """Consensus of the copies after the projection.

    Attributes:
        left, right: deviations of the (weighted) mean of all copies of each entry.
        output: exact output deviations.
        left_spread, right_spread: `Σ ρ |copy − mean|²` over all copies, scalars. Differences of
            sums of squares: exact to rounding of the squared moves, not of themselves.
    """

    left: Float[Array, "*left"]
    right: Float[Array, "*right"]
    output: Float[Array, "*output"]
    left_spread: Float[Array, ""]
    right_spread: Float[Array, ""]


def project_compact(
    op: Bilinear,
    left_ref: Float[Array, "*left"],
    right_ref: Float[Array, "*right"],
    left_dev: Float[Array, "*left"],
    right_dev: Float[Array, "*right"],
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
    output_ref: Float[Array, "*output"],
) -> CompactProjection:
    """The weighted mean over the copies after the projection, all equal on entry.

    Four products of the operation and memory of the size of the operands; no copy is formed. Where
    the nearest point is not unique one is chosen, the same every time. As a slot the result weighs
    `ρ` times the number of copies of each entry.

    Equal to `project_lifted` on the broadcast operands, then averaging. Only where two slices of
    two entries or more are opposed to within a relative ε^⅓ (`√ρx x ≈ ±√ρw w`) is it less accurate,
    by about ε^⅓ of the move: the copies it does not form would tell their small sum apart.
    """
    if op.slice_length == 1:
        # The copies have the shape of the output, and projecting them is the more accurate.
        return _project_single_entries(
            op, left_ref, right_ref, left_dev, right_dev, left_weight, right_weight, target_dev,
            target_weight,
        )  # fmt: skip
    left, right = left_ref + left_dev, right_ref + right_dev
    change = op(left_ref, right_dev) + op(left_dev, right)
    dtype = change.dtype
    left_weight, right_weight = jnp.asarray(left_weight, dtype), jnp.asarray(right_weight, dtype)
    product = output_ref + change
    left_energy, right_energy = op.left_energy(left**2), op.right_energy(right**2)
    left_root, right_root = jnp.sqrt(left_weight), jnp.sqrt(right_weight)
    sigma = left_root * right_root
    half = (left_energy / right_weight + right_energy / left_weight) / 2

    def consensus(moves: ProductMoves) -> CompactProjection:
        # In the scaled slices no weights are left, and `ρ |copy − mean|²` is a difference of sums.
        own, other = left_weight * left_energy, right_weight * right_energy
        cross, filled = moves.cross, op.slice_lengths * moves.fill**2
        mixed = 2 * cross * sigma * product
        left_squared = jnp.sum(
            moves.left_scale * (moves.left_scale * own + mixed) + cross**2 * other + filled
        )
        right_squared = jnp.sum(
            moves.right_scale * (moves.right_scale * other + mixed) + cross**2 * own + filled
        )
        left_total = copies_weight(left_weight, op.left_copies, op.left_sum, op.output_shape)
        left_move = (
            left * op.left_sum(left_weight * moves.left_scale)
            + op.transpose_left(sigma * cross, right)
            + op.left_sum(left_root * moves.fill)
        ) / left_total
        right_total = copies_weight(right_weight, op.right_copies, op.right_sum, op.output_shape)
        right_move = (
            right * op.right_sum(right_weight * moves.right_scale)
            + op.transpose_right(sigma * cross, left)
            + op.right_sum(right_root * moves.sign * moves.fill)
        ) / right_total
        return CompactProjection(
            left_dev + left_move,
            right_dev + right_move,
            change + moves.output,
            jnp.maximum(left_squared - jnp.sum(left_total * left_move**2), 0),
            jnp.maximum(right_squared - jnp.sum(right_total * right_move**2), 0),
        )

    return scalar_product_moves(
        jnp.maximum(half + product / sigma, 0),
        jnp.maximum(half - product / sigma, 0),
        target_dev - change,
        sigma,
        asked_products(op, target_weight, dtype),
        op.slice_lengths,
        consensus,
        slices_at_hand=False,
    )


def _project_single_entries(
    op: Bilinear,
    left_ref: Array,
    right_ref: Array,
    left_dev: Array,
    right_dev: Array,
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Array,
    target_weight: Weight,
) -> CompactProjection:
    """`project_compact` by the copies themselves, for slices of one entry."""
    copies = lifted_moves(
        op, left_ref, right_ref, op.lift_left(left_dev), op.lift_right(right_dev), left_weight,
        right_weight, target_dev, target_weight,
    )  # fmt: skip

    def consensus(moves, weight, count, total, lift, lower):
        weight = jnp.asarray(weight, moves.dtype)
        weights = per_slice(jnp.broadcast_to(weight, op.output_shape))
        move = lower(weights * moves) / copies_weight(weight, count, total, op.output_shape)
        return move, jnp.sum(weights * (moves - lift(move)) ** 2)

    left_move, left_spread = consensus(
        copies.left_copies, left_weight, op.left_copies, op.left_sum, op.lift_left, op.lower_left
    )
    right_move, right_spread = consensus(
        copies.right_copies, right_weight, op.right_copies, op.right_sum, op.lift_right,
        op.lower_right,
    )  # fmt: skip
    return CompactProjection(
        left_dev + left_move, right_dev + right_move, copies.output, left_spread, right_spread
    )
