"""Projection onto the graph of a linear operation, `y = Σ_k Σ_{axes_k} c_k x_k + const`.

The constant drops out of the deviation form, so no function here takes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


def _axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(sorted(axis % ndim for axis in axes))


def _reduce(term: Array, shape: tuple[int, ...], axes: Sequence[int]) -> Array:
    """Sum over `axes` of `term` broadcast to `shape`, without forming the broadcast."""
    if not axes:
        return term
    axes = _axes(axes, len(shape))
    if term.ndim < len(shape):
        term = term.reshape((1,) * (len(shape) - term.ndim) + term.shape)
    repeats = math.prod(shape[axis] for axis in axes if term.shape[axis] == 1)
    return jnp.sum(term, axis=axes) * repeats


def _spread(value: Array, shape: tuple[int, ...], axes: Sequence[int]) -> Array:
    """The transpose of `_reduce`: an array of the output's shape, broadcastable to `shape`."""
    if not axes:
        return value
    axes = _axes(axes, len(shape))
    if value.ndim == 0:
        return value
    output_rank = len(shape) - len(axes)
    value = value.reshape((1,) * (output_rank - value.ndim) + value.shape)
    return jnp.expand_dims(value, axes)


def _gain(
    coefficients: Sequence[ArrayLike],
    shapes: Sequence[tuple[int, ...]],
    axes: Sequence[Sequence[int]],
    weights: Sequence[ArrayLike],
    dtype: jnp.dtype,
) -> Array:
    """`D = Σ_k Σ_{axes_k} c_k²/ρ_k`: the inverse weight of `u = Σ c x` as one variable."""
    gain = jnp.zeros((), dtype)
    for coefficient, shape, summed, weight in zip(coefficients, shapes, axes, weights, strict=True):
        term = jnp.square(jnp.asarray(coefficient, dtype)) / jnp.asarray(weight, dtype)
        gain = gain + _reduce(term, shape, summed)
    return gain


def _moved(
    deviations: Sequence[Array],
    coefficients: Sequence[ArrayLike],
    axes: Sequence[Sequence[int]],
    weights: Sequence[ArrayLike],
    force: Array,
) -> tuple[Array, ...]:
    """`x_k + c_k force/ρ_k` of each operand."""
    dtype = force.dtype
    return tuple(
        deviation
        + jnp.asarray(coefficient, dtype)
        * _spread(force, deviation.shape, summed)
        / jnp.asarray(weight, dtype)
        for deviation, coefficient, summed, weight in zip(
            deviations, coefficients, axes, weights, strict=True
        )
    )


def forward(
    values: Sequence[Array], coefficients: Sequence[ArrayLike], axes: Sequence[Sequence[int]]
) -> Array:
    """`Σ_k Σ_{axes_k} c_k x_k`, without the constant.

    **Arguments:**

    - `values`: one array for each operand.
    - `coefficients`: for each operand a scalar or array broadcastable to its shape.
    - `axes`: for each operand the axes that are summed; `()` for an elementwise term. What remains
        is the shape of the output.

    **Returns:** an array of the output's shape.
    """
    terms = [
        jnp.sum(jnp.asarray(coefficient, value.dtype) * value, axis=_axes(summed, value.ndim))
        for value, coefficient, summed in zip(values, coefficients, axes, strict=True)
    ]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def affine(
    deviations: Sequence[Array],
    coefficients: Sequence[ArrayLike],
    axes: Sequence[Sequence[int]],
    weights: Sequence[ArrayLike],
    target: Array,
    target_weight: ArrayLike,
) -> tuple[tuple[Array, ...], Array]:
    """`argmin Σ_k ρ_k |dx_k' − dx_k|² + W |dy' − dz|²` subject to `dy' = Σ_k Σ_{axes_k} c_k dx_k'`.

    With `D = Σ c²/ρ` and `e = W (dz − Σ c dx)/(1 + W D)` it is `dx' = dx + c e/ρ` and
    `dy' = Σ c dx + D e`.

    **Arguments:**

    - `deviations`: `dx_k`, one array for each operand.
    - `coefficients`: `c_k`, scalars or arrays broadcastable to the shape of the operand.
    - `axes`: for each operand the axes that are summed; `()` for an elementwise term. What remains
        is the shape of the output.
    - `weights`: `ρ_k > 0`, scalars or arrays broadcastable to the shape of the operand.
    - `target`: `dz`, of the output's shape.
    - `target_weight`: `W ≥ 0`, a scalar or of the output's shape.

    **Returns:** the new input deviations and the output deviation.

    **Source:** the projection onto a hyperplane in the metric `diag(ρ, W)`.
    """
    dtype = target.dtype
    shapes = [deviation.shape for deviation in deviations]
    gain = _gain(coefficients, shapes, axes, weights, dtype)
    value = forward(deviations, coefficients, axes)
    target_weight = jnp.asarray(target_weight, dtype)
    force = target_weight * (target - value) / (1 + target_weight * gain)
    moved = _moved(deviations, coefficients, axes, weights, force)
    return moved, value + gain * force


def scalar_weight(
    coefficients: Sequence[ArrayLike],
    axes: Sequence[Sequence[int]],
    weights: Sequence[ArrayLike],
    output_shape: tuple[int, ...],
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> Array:
    """`ρ_u = 1/Σ_k Σ_{axes_k} c_k²/ρ_k`: what moving `u = Σ c x` by one costs, at its cheapest.

    A node `y = f(Σ c x)` is projected as the scalar node `y = f(u)` with this weight; `distribute`
    then shares the move of `u` among the operands.

    **Arguments:**

    - `coefficients`, `axes`, `weights`: as in `affine`.
    - `output_shape`: the shape of `u`.
    - `shapes`: the shapes of the operands; needed where axes are summed.

    **Returns:** an array broadcastable to `output_shape`; very large, but finite, where every
    coefficient is 0.

    **Raises:** `ValueError` if axes are summed and `shapes` is not given.
    """
    if shapes is None:
        if any(len(summed) for summed in axes):
            raise ValueError("`scalar_weight` needs the `shapes` of operands that are summed.")
        shapes = [output_shape] * len(coefficients)
    dtype = jnp.result_type(float, *weights)
    gain = _gain(coefficients, shapes, axes, weights, dtype)
    return 1 / jnp.maximum(gain, jnp.finfo(gain.dtype).tiny)


def distribute(
    deviations: Sequence[Array],
    coefficients: Sequence[ArrayLike],
    axes: Sequence[Sequence[int]],
    weights: Sequence[ArrayLike],
    change: Array,
) -> tuple[Array, ...]:
    """`argmin Σ_k ρ_k |dx_k' − dx_k|²` subject to `Σ c dx' = Σ c dx + Δu`: `dx + c ρ_u Δu/ρ`.

    **Arguments:**

    - `deviations`, `coefficients`, `axes`, `weights`: as in `affine`.
    - `change`: `Δu`, of the output's shape.

    **Returns:** the new input deviations.
    """
    dtype = change.dtype
    shapes = [deviation.shape for deviation in deviations]
    gain = _gain(coefficients, shapes, axes, weights, dtype)
    force = change / jnp.maximum(gain, jnp.finfo(dtype).tiny)
    return _moved(deviations, coefficients, axes, weights, force)
