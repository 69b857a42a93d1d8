"""Projections onto `y = B(x, w)` with all copies of both factors stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pjax.projections.products.operation import Bilinear, Weight
from pjax.projections.products.scalar_products import asked_products, scalar_product_moves


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
    """`argmin Σ_j ρx|xⱼ' − xⱼ|² + ρw|wⱼ' − wⱼ|² + W (xⱼ'·wⱼ' − zⱼ)²` over the copies themselves.

    `j` runs over the scalar products of `op`, each with its own copies of two slices.

    Arguments:
        op: the bilinear operation.
        left_ref, right_ref: reference operands, in the shapes of the operands.
        left_copies_dev, right_copies_dev: deviations of the copies, in the shape
            `[*output_shape, slice_length]`, ordered as by `op.lift_left` and `op.lift_right`.
        left_weight, right_weight: positive weights of one copy, scalars or broadcasting to the
            output.
        target_dev: deviation of the target `z` from `output_ref`.
        target_weight: weight `W`, scalar or broadcasting to the output; 0 where nothing is asked.
        output_ref: `op(left_ref, right_ref)`.

    Returns:
        a `LiftedProjection`.
    """
    # The residual is a sum of products of deviations; the value itself is not needed.
    del output_ref
    moves = lifted_moves(
        op,
        left_ref,
        right_ref,
        left_copies_dev,
        right_copies_dev,
        left_weight,
        right_weight,
        target_dev,
        target_weight,
    )
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
