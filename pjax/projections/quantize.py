"""Uniform quantizers, and the projection onto the closure of their graph."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def uniform_quantize(x: ArrayLike, levels: int | None, low: float, high: float) -> Array:
    """The nearest of `levels` equally spaced values from `low` to `high`, elementwise.

    **Arguments:**

    - `x`: a floating-point array.
    - `levels`: how many values, at least 2; `None` for all integers, whatever `low` and `high` are.
    - `low`, `high`: the least and the greatest value.

    **Returns:** an array like `x`. Half-way values go to the even level, as `jnp.round` does.

    **Raises:** `ValueError` if there are fewer than two levels or `low` is not below `high`.
    """
    x = jnp.asarray(x)
    if levels is None:
        return jnp.round(x)
    spacing = _spacing(levels, low, high)
    level = jnp.clip(jnp.round((x - low) / spacing), 0, levels - 1)
    return low + spacing * level


def _spacing(levels: int, low: float, high: float) -> float:
    if levels < 2:
        raise ValueError(f"`levels` must be at least 2, got {levels}.")
    if not low < high:
        raise ValueError(f"`low` must be below `high`, got {low} and {high}.")
    return (high - low) / (levels - 1)


def quantize(
    levels: int | None,
    low: float,
    high: float,
    reference: Array,
    output_reference: Array,
    deviation: Array,
    weight: ArrayLike,
    target: Array,
    target_weight: ArrayLike,
) -> tuple[Array, Array]:
    """`argmin ρ (dx' − dx)² + W (dy' − dz)²`, `(x_ref + dx', y_ref + dy')` on the closed staircase.

    Elementwise. The level of the current input, and the two nearest to `(ρ (x ± ½) + W z)/(ρ + W)`
    in units of the spacing, are the only ones that can be nearest: those are where the distances to
    the near ends of the steps to the right and to the left, quadratic in the level, are least.
    Levels are counted from that of the reference, whose own rise is so exactly 0; ties go to it.

    **Arguments:**

    - `levels`, `low`, `high`: as in `uniform_quantize`.
    - `reference`: `x_ref`.
    - `output_reference`: `y_ref`, the quantized reference.
    - `deviation`: `dx`.
    - `weight`: `ρ > 0`.
    - `target`: `dz`.
    - `target_weight`: `W ≥ 0`.

    **Returns:** `dx'` and `dy'`.
    """
    dtype = deviation.dtype
    weight, target_weight = jnp.asarray(weight, dtype), jnp.asarray(target_weight, dtype)
    if levels is None:
        spacing = 1.0
        lowest, highest = -jnp.inf, jnp.inf
    else:
        spacing = _spacing(levels, low, high)
        level = jnp.round((output_reference - low) / spacing)
        lowest, highest = -level, levels - 1 - level
    offset = reference - output_reference
    current = offset + deviation

    def nearest_on(rise: Array) -> tuple[Array, Array, Array]:
        """The nearest point of one level, `rise` levels above the reference's, and its distance."""
        lower = jnp.where(rise <= lowest, -jnp.inf, (rise - 0.5) * spacing - offset)
        upper = jnp.where(rise >= highest, jnp.inf, (rise + 0.5) * spacing - offset)
        # The reference may be off its own level by the rounding of a threshold.
        lower = jnp.where(rise == 0, jnp.minimum(lower, 0), lower)
        upper = jnp.where(rise == 0, jnp.maximum(upper, 0), upper)
        move = jnp.clip(0, lower - deviation, upper - deviation)
        output = rise * spacing
        cost = jnp.hypot(jnp.sqrt(weight) * move, jnp.sqrt(target_weight) * (output - target))
        return jnp.clip(deviation, lower, upper), output, cost

    candidates = [jnp.round(current / spacing)]
    for half in (-0.5, 0.5):
        mean = weight * (current + half * spacing) + target_weight * target
        mean = mean / ((weight + target_weight) * spacing)
        candidates.append(jnp.round(mean))
    moved, output, best = nearest_on(jnp.zeros_like(current))
    for candidate in candidates:
        point, rise, cost = nearest_on(jnp.clip(candidate, lowest, highest))
        better = cost < best
        moved = jnp.where(better, point, moved)
        output = jnp.where(better, rise, output)
        best = jnp.where(better, cost, best)
    return moved, output
