"""Nearest points of sets of vectors, along the last axis.

Each function returns `argmin Σ w (y − x)²` over a set, with `w = 1` where no weights are given. Of
several nearest points it is one, and always the same.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def length(x: Array) -> Array:
    """`|x|₂` along the last axis, which stays with length 1; no square over- or underflows."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale), axis=-1, keepdims=True))


def ball(x: Array, radius: Any, weights: Array | None = None) -> Array:
    """`{|y|₂ ≤ r}`: `x · min(1, r/|x|)`, for equal weights."""
    size = length(x)
    return jnp.where(size > radius, x / jnp.where(size > 0, size, 1) * radius, x)


def sphere(x: Array, radius: Any, weights: Array | None = None) -> Array:
    """`{|y|₂ = r}`: `x · r/|x|`, for equal weights; of 0, from which all are as far, the point of
    equal entries.
    """
    size = length(x)
    even = jnp.full_like(x, x.shape[-1] ** -0.5)
    return jnp.where(size > 0, x / jnp.where(size > 0, size, 1), even) * radius


def largest_ball(x: Array, radius: Any, weights: Array | None = None) -> Array:
    """`{max |y| ≤ r}`: clipped, whatever the weights."""
    return jnp.clip(x, -jnp.asarray(radius, x.dtype), jnp.asarray(radius, x.dtype))


def largest_sphere(x: Array, radius: Any, weights: Array | None = None) -> Array:
    """`{max |y| = r}`: clipped, or else the entry that is raised at the least cost."""
    clipped = largest_ball(x, radius)
    lack = radius - jnp.abs(clipped)
    cost = lack if weights is None else lack * jnp.sqrt(weights)
    chosen = jnp.arange(x.shape[-1]) == jnp.argmin(cost, axis=-1, keepdims=True)
    return jnp.where(chosen, jnp.where(x < 0, -1, 1) * radius, clipped).astype(x.dtype)


def simplex(x: Array, total: Any, weights: Array | None = None) -> Array:
    """`{y ≥ 0, Σ y = total}`: `max(x − τ/w, 0)` with the `τ` of the right sum.

    The entries that stay positive are the first of those sorted by `w x`. Source: Held, Wolfe and
    Crowder, *Validation of subgradient optimization* (1974).
    """
    each = jnp.ones_like(x) if weights is None else 1 / weights
    # Above the largest `w x` all entries are 0, so `τ` is counted down from it: then huge entries
    # lose no digits, and what is farther below than the whole sum can be cut off.
    place = jnp.argmax(x / each, axis=-1, keepdims=True)
    top = jnp.take_along_axis(x / each, place, axis=-1)
    least = -2 * total * each / jnp.take_along_axis(each, place, axis=-1)
    below = jnp.clip(x - top * each, least, 0)
    below = jnp.where(jnp.arange(x.shape[-1]) == place, 0, below)  # whatever has rounded
    key = below / each
    order = jnp.argsort(-key, axis=-1)
    sums, steps = (
        jnp.cumsum(jnp.take_along_axis(a, order, axis=-1), axis=-1) for a in (below, each)
    )
    levels = (sums - total) / steps
    positive = jnp.take_along_axis(key, order, axis=-1) > levels
    count = jnp.maximum(jnp.sum(positive, axis=-1, keepdims=True), 1)
    level = jnp.take_along_axis(levels, count - 1, axis=-1)
    # The running sums have rounded: once more, of the entries that stay.
    stays = key > level
    level = jnp.sum(jnp.where(stays, below, 0), axis=-1, keepdims=True) - total
    level = level / jnp.sum(jnp.where(stays, each, 0), axis=-1, keepdims=True)
    found = jnp.maximum(below - level * each, 0)
    return found * (total / jnp.sum(found, axis=-1, keepdims=True))


def sum_ball(x: Array, radius: Any, weights: Array | None = None) -> Array:
    """`{Σ |y| ≤ r}`: a simplex of the sizes."""
    inside = jnp.sum(jnp.abs(x), axis=-1, keepdims=True) <= radius
    return jnp.where(inside, x, jnp.sign(x) * simplex(jnp.abs(x), radius, weights))


def sum_sphere(x: Array, radius: Any, weights: Array | None = None) -> Array:
    """`{Σ |y| = r}`: from outside as onto the ball; from inside each size grows by `t/w`: of the
    faces, the one with the signs of `x` is nearest.
    """
    each = jnp.ones_like(x) if weights is None else 1 / weights
    lack = radius - jnp.sum(jnp.abs(x), axis=-1, keepdims=True)
    sizes = jnp.abs(x) + jnp.maximum(lack, 0) * each / jnp.sum(each, axis=-1, keepdims=True)
    return jnp.where(lack > 0, jnp.where(x < 0, -sizes, sizes), sum_ball(x, radius, weights))


def sparse(x: Array, count: int, weights: Array | None = None) -> Array:
    """`{at most k entries are not 0}`: the k largest `w x²` stay; of equal ones the first."""
    size = jnp.abs(x) if weights is None else jnp.abs(x) * jnp.sqrt(weights)
    rank = jnp.argsort(jnp.argsort(-size, axis=-1), axis=-1)
    return jnp.where(rank < count, x, 0)


def levels(x: Array, values: Array) -> Array:
    """`{each entry is one of some values}`: the nearest, whatever the weights; half-way the upper.

    **Arguments:**

    - `values`: in ascending order.
    """
    middle = values[:-1] + (values[1:] - values[:-1]) / 2
    return values[jnp.searchsorted(middle, x, side="right")]


def monotone(x: Array, weights: Array | None = None) -> Array:
    """`{y₁ ≤ y₂ ≤ …}`: isotonic regression.

    Entries that fall are pooled with those before, until the means of the pools rise. Source: Ayer
    et al., *An empirical distribution function for sampling with incomplete information* (1955).
    """
    weights = jnp.ones_like(x) if weights is None else jnp.broadcast_to(weights, x.shape)
    rows, of_rows = (a.reshape(-1, x.shape[-1]) for a in (x, weights))
    return jax.vmap(_pooled)(rows, of_rows).reshape(x.shape)


def _pooled(x: Array, weights: Array) -> Array:
    n = x.size

    def step(_: Any, carry: Any) -> Any:
        means, masses, sizes, pools, taken = carry
        last, before = pools - 1, pools - 2
        joins = (pools >= 2) & (means[before] > means[last])
        takes = ~joins & (taken < n)
        both = masses[before] + masses[last]
        # A mean between the two, also where their products overflow.
        share = masses[last] / both
        joined = means[before] + share * (means[last] - means[before])
        place = jnp.where(joins, before, jnp.where(takes, pools, n))
        new = jnp.minimum(taken, n - 1)
        return (
            means.at[place].set(jnp.where(joins, joined, x[new]), mode="drop"),
            masses.at[place].set(jnp.where(joins, both, weights[new]), mode="drop"),
            sizes.at[place].set(jnp.where(joins, sizes[before] + sizes[last], 1), mode="drop"),
            pools - joins + takes,
            taken + takes,
        )

    none = jnp.zeros((), jnp.int32)
    start = jnp.zeros_like(x), jnp.zeros_like(weights), jnp.zeros(n, jnp.int32), none, none
    means, _, sizes, pools, _ = lax.fori_loop(0, 2 * n, step, start)
    ends = jnp.cumsum(jnp.where(jnp.arange(n) < pools, sizes, 0))
    return means[jnp.searchsorted(ends, jnp.arange(n), side="right")]


def equalities(x: Array, matrix: Array, values: Array, weights: Array | None = None) -> Array:
    """`{A y = b}`: `x − W⁻¹Aᵀ(A W⁻¹Aᵀ)⁺(A x − b)`, of equations that may depend on each other.

    **Arguments:**

    - `matrix`: `A`, `[equations, n]`.
    - `values`: `b`, `[equations]`.
    """
    root = jnp.ones_like(x) if weights is None else jnp.sqrt(weights)
    scaled = matrix / root[..., None, :]
    # Each equation by its length, so that the cut below is between directions, not between units.
    size = jnp.maximum(length(scaled), jnp.finfo(x.dtype).tiny)
    u, s, vt = jnp.linalg.svd(scaled / size, full_matrices=False)
    cut = jnp.finfo(x.dtype).eps * 10 * max(matrix.shape) * jnp.max(s, -1, keepdims=True, initial=0)
    inverse = jnp.where(s > cut, 1 / jnp.where(s > cut, s, 1), 0)
    right = values / size[..., 0]
    found = x * root
    for _ in range(2):  # the second time for what has rounded
        lack = right - _times(scaled / size, found)
        part = inverse * _times(jnp.swapaxes(u, -1, -2), lack)
        found = found + _times(jnp.swapaxes(vt, -1, -2), part)
    return found / root


def _times(matrix: Array, vector: Array) -> Array:
    return jnp.matmul(matrix, vector[..., None], precision="highest")[..., 0]
