"""Nearest points of sets of matrices, along the last two axes.

The sets depend on singular values alone: for any matrix `U S Vᵀ` the nearest point keeps `U` and
`V`, and has the singular values nearest to `S` (von Neumann's trace inequality).
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array


def with_singular_values(x: Array, function: Callable[[Array], Array]) -> Array:
    """`U f(S) Vᵀ`; `x` itself where `f` changes nothing.

    **Arguments:**

    - `function`: of the singular values, `[…, min(rows, columns)]` in descending order.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    u, s, vt = jnp.linalg.svd(x / scale, full_matrices=False)
    s = s * scale[..., 0]
    new = function(s)
    found = jnp.matmul(u * new[..., None, :], vt, precision="highest")
    return jnp.where(jnp.all(new == s, axis=-1)[..., None, None], x, found)


def low_rank(x: Array, rank: int) -> Array:
    """`{rank y ≤ k}`: the k largest singular values stay. Source: Eckart and Young (1936)."""
    return with_singular_values(x, lambda s: jnp.where(jnp.arange(s.shape[-1]) < rank, s, 0))


def orthogonal(x: Array) -> Array:
    """`{yᵀy = 1}`, or `{y yᵀ = 1}` of a wide matrix: `U Vᵀ`, the polar factor.

    Of a matrix that has not the full rank one of several.
    """
    return with_singular_values(x, jnp.ones_like)
