"""Products and sums over rows: arrays `[*blocks, *places, length]`, with a row at each place.

The places keep their axes, a batch and positions, say: where one of them lies on several devices,
each sums its own, and what is exchanged has the size of the sum. Rows in one axis would be
exchanged themselves.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def along(
    rows: Float[Array, "*rows length"], directions: Float[Array, "*blocks length k"]
) -> Float[Array, "*rows k"]:
    """The product of each row with directions, of its block."""
    blocks = tuple(range(directions.ndim - 2))
    axes = (rows.ndim - 1,), (directions.ndim - 2,)
    return _product(rows, directions, axes, blocks)


def across(
    left: Float[Array, "*rows n"], right: Float[Array, "*rows k"], blocks: int
) -> Float[Array, "*blocks n k"]:
    """The sum of `l rᵀ` over all places of a block.

    **Arguments:**

    - `blocks`: how many first axes number the blocks.
    """
    places = tuple(range(blocks, left.ndim - 1))
    return _product(left, right, (places, places), tuple(range(blocks)))


def moment(
    rows: Float[Array, "*rows length"],
    directions: Float[Array, "*blocks length k"],
    counts: Float[Array, "*rows 1"] | None = None,
) -> Float[Array, "*blocks length k"]:
    """`XᵀDX U`, for rows `X` of which each counts as often as `counts` says; once if not given."""
    images = along(rows, directions)
    images = images if counts is None else counts * images
    return across(rows, images, directions.ndim - 2)


def trace(
    rows: Float[Array, "*rows length"], blocks: int, counts: Float[Array, "*rows 1"] | None = None
) -> Float[Array, "*blocks"]:
    """`tr XᵀDX`, for each block."""
    if not blocks:
        return dot(rows, rows) if counts is None else dot(row_squares(rows), counts)
    squares = row_squares(rows) if counts is None else row_squares(rows) * counts
    return jnp.sum(squares, axis=tuple(range(blocks, squares.ndim)))


def row_squares(rows: Float[Array, "*rows length"]) -> Float[Array, "*rows 1"]:
    """The sum of the squares of each row. A product with ones: XLA sums rows slowly on a CPU."""
    return jnp.square(rows) @ jnp.ones((rows.shape[-1], 1), rows.dtype)


def dot(left: Float[Array, "*any"], right: Float[Array, "*any"]) -> Float[Array, ""]:
    """`Σ l r` over all entries, without making one axis of all."""
    return jnp.tensordot(left, right, left.ndim)


def total(array: Float[Array, "*any"]) -> Float[Array, ""]:
    """The sum of all entries. A product too: XLA compiles several kernels for a long sum."""
    return dot(array, jnp.ones_like(array))


def _product(left: Array, right: Array, contracted: tuple, blocks: tuple[int, ...]) -> Array:
    dtype = jnp.result_type(left, right)
    return lax.dot_general(left.astype(dtype), right.astype(dtype), (contracted, (blocks, blocks)))


__all__ = ["across", "along", "dot", "moment", "row_squares", "total", "trace"]
