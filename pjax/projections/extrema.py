"""Projection onto the graph of the maximum of several variables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

# Up to this many entries all pairs are compared: on a CPU the sort alone takes longer than all the
# rest for rows of 4.
_PAIRWISE = 32


def _sums_above(
    value: Float[Array, "n *batch"], weight: Float[Array, "n *batch"]
) -> tuple[Float[Array, "n *batch"], Float[Array, "n *batch"]]:
    """`Σ_j ρ_j u_j` and `Σ_j ρ_j` over `{j : u_j ≥ u_i}`, for every i, in any order of the i."""
    if value.shape[0] > _PAIRWISE:
        height, weight = jax.lax.sort((-value, weight), dimension=0, num_keys=1)
        return -jnp.cumsum(weight * height, axis=0), jnp.cumsum(weight, axis=0)
    above = value[None, :] >= value[:, None]
    pressure = jnp.sum(jnp.where(above, (weight * value)[None, :], 0), axis=1)
    return pressure, jnp.sum(jnp.where(above, weight[None, :], 0), axis=1)


def maximum(
    gap: Float[Array, "*batch n"],
    deviation: Float[Array, "*batch n"],
    weight: ArrayLike,
    target: Float[Array, "*batch"],
    target_weight: ArrayLike,
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch"]]:
    """`argmin Σ_i ρ_i (dx_i' − dx_i)² + W (dy' − dz)²`, `y_ref + dy' = max_i (x_ref_i + dx_i')`.

    With `u = x_ref + dx − y_ref`: if the target is below `max u`, the entries above a common level
    are clipped to it, and the level is the largest of the weighted means of the target with the
    first k entries, sorted downwards. If it is above, one single entry is raised, to
    `max((ρ_i u_i + W dz)/(ρ_i + W), max u)`: with unequal weights not always the largest one.

    **Arguments:**

    - `gap`: `x_ref − y_ref ≤ 0`, the maximum over the last axis; exactly 0 at the entries where it
        is attained, and −∞ for an entry that never takes part.
    - `deviation`: `dx`.
    - `weight`: `ρ > 0`, broadcastable to `deviation`.
    - `target`: `dz`.
    - `target_weight`: `W ≥ 0`, broadcastable to `target`.

    **Returns:** `dx'` and `dy'`. Of entries that could be raised at the same distance the first is.
    """
    dtype = deviation.dtype
    target_weight = jnp.broadcast_to(jnp.asarray(target_weight, dtype), target.shape)
    weight = jnp.broadcast_to(jnp.asarray(weight, dtype), deviation.shape)
    # Entries first: on a CPU reductions over a short last axis are not vectorised.
    weight, deviation = jnp.moveaxis(weight, -1, 0), jnp.moveaxis(deviation, -1, 0)
    value = jnp.moveaxis(gap, -1, 0) + deviation
    top = jnp.max(value, axis=0)
    # Heights relative to the largest entry: a move much smaller than the deviations stays accurate.
    below = value - top
    request = target - top

    # For every entry, sums over the entries that are at least as large.
    pressure, mass = _sums_above(below, weight)
    level = jnp.max((target_weight * request + pressure) / (target_weight + mass), axis=0)
    level = jnp.minimum(level, 0)
    lowered = deviation - jnp.maximum(below - level, 0)

    raised = (weight * below + target_weight * request) / (weight + target_weight)
    raised = jnp.maximum(raised, 0)
    cost = jnp.hypot(
        jnp.sqrt(weight) * (raised - below), jnp.sqrt(target_weight) * (raised - request)
    )
    # The first of the cheapest; `argmin` does the same, more slowly on a CPU.
    index = jnp.arange(deviation.shape[0]).reshape(-1, *(1 for _ in top.shape))
    cheapest = cost == jnp.min(cost, axis=0)
    is_chosen = index == jnp.min(jnp.where(cheapest, index, index.size), axis=0)
    rise = jnp.where(is_chosen, raised - below, 0)

    up = request > 0
    moved = jnp.where(up, deviation + rise, lowered)
    change = jnp.where(up, jnp.sum(jnp.where(is_chosen, raised, 0), axis=0), level)
    return jnp.moveaxis(moved, 0, -1), top + change
