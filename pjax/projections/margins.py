"""Signs with a margin: `y = ±1` where a number, or a scalar product, is beyond `±margin`.

The set is not convex: of its two halves, one for each value of `y`, the nearer one counts, with
the cost of the output; of two that are as near the one of `y = 1`. All arguments are full values.

Source: V. Elser and M. Krishan Lal, *Learning with Boolean threshold functions*, arXiv 2602.17493.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pjax.projections.products.operation import Weight


class SignedNumber(NamedTuple):
    """A nearest point: the number and its sign."""

    x: Float[Array, "*shape"]
    sign: Float[Array, "*shape"]


class SignedProduct(NamedTuple):
    """A nearest point: both slices of each scalar product, and its sign."""

    left: Float[Array, "*output slice"]
    right: Float[Array, "*output slice"]
    sign: Float[Array, "*output"]


def signed_number(
    x: Float[Array, "*shape"],
    target: Float[Array, "*shape"],
    margin: float,
    weight: Weight,
    target_weight: Weight,
) -> SignedNumber:
    """`argmin ρ (x' − x)² + W (y − z)²` with `y = 1` and `x' ≥ margin`, or `y = −1` and
    `x' ≤ −margin`.

    Arguments:
        x: the numbers.
        target, target_weight: `z` and `W ≥ 0`.
        margin: not negative.
        weight: `ρ > 0`.
    """
    up, down = jnp.maximum(x, margin), jnp.minimum(x, -margin)
    # The two costs of the output differ by 4 W z: nothing is lost where z is large.
    costlier = weight * (_square(up - x) - _square(down - x)) - 4 * target_weight * target
    plus = costlier <= 0
    return SignedNumber(jnp.where(plus, up, down), _sign(plus, target))


def signed_product(
    left: Float[Array, "*output slice"],
    right: Float[Array, "*output slice"],
    target: Float[Array, "*output"],
    margin: float,
    left_weight: Weight,
    right_weight: Weight,
    target_weight: Weight,
    direction: Array | None = None,
) -> SignedProduct:
    """`argmin ρₗ|l' − l|² + ρᵣ|r' − r|² + W (y − z)²` with `y = ±1` and `y l'·r' ≥ margin`.

    With `L = √ρₗ l`, `R = √ρᵣ r`, `p = (L + R)/√2` and `m = (L − R)/√2` the set of `y = 1` is
    `|p|² − |m|² ≥ 2D`, `D = √(ρₗρᵣ) margin`, and its nearest point `p/v`, `m/(2 − v)` with `v` in
    (0, 1]; that of `y = −1` has `p` and `m` exchanged. Where `p = 0` and must not stay, all
    directions of it are as near, and `direction` is taken.

    Arguments:
        left, right: the slices of each scalar product, along the last axis.
        target, target_weight: `z` and `W ≥ 0`, of each product.
        margin: not negative.
        left_weight, right_weight: positive numbers, or one for each product.
        direction: of slices, in any shape that broadcasts to theirs; by default ones.
    """
    dtype = left.dtype
    if direction is None:
        direction = jnp.ones(left.shape[-1], dtype)
    roots = [jnp.sqrt(jnp.asarray(weight, dtype)) for weight in (left_weight, right_weight)]
    scales = [root if root.ndim == 0 else root[..., None] for root in roots]
    x, w = left * scales[0], right * scales[1]
    sum_square = jnp.sum(_square(x + w), axis=-1) / 2
    difference_square = jnp.sum(_square(x - w), axis=-1) / 2
    least = 2 * margin * roots[0] * roots[1]
    above = _stretch(sum_square, difference_square, least)
    below = _stretch(difference_square, sum_square, least)
    costlier = above.cost - below.cost - 4 * jnp.asarray(target_weight, dtype) * target
    plus = costlier <= 0
    # Half of what `L + R` and `L − R` are multiplied by.
    of_sum = jnp.where(plus, above.stretched, below.shrunk)[..., None] / 2
    of_difference = jnp.where(plus, above.shrunk, below.stretched)[..., None] / 2
    unit = direction / jnp.sqrt(2 * jnp.sum(_square(direction), axis=-1, keepdims=True))
    fill = jnp.where(plus, above.fill, below.fill)[..., None] * unit
    same, other = of_sum + of_difference, of_sum - of_difference
    fill_right = jnp.where(plus[..., None], fill, -fill)
    return SignedProduct(
        (same * x + other * w + fill) / scales[0],
        (same * w + other * x + fill_right) / scales[1],
        _sign(plus, target),
    )


def signed_product_of_data(
    data: Float[Array, "*output slice"],
    free: Float[Array, "*output slice"],
    target: Float[Array, "*output"],
    margin: float,
    weight: Weight,
    target_weight: Weight,
) -> SignedProduct:
    """`signed_product` where one operand is data: the nearest point of one of two half-spaces.

    A slice of zeros reaches no margin: it stays, and has the sign that costs the output less.

    Returns:
        a `SignedProduct` with `left` the data.
    """
    product, energy = jnp.sum(data * free, axis=-1), jnp.sum(_square(data), axis=-1)
    reachable = energy > 0
    energy = jnp.where(reachable, energy, 1)
    up = jnp.where(reachable, jnp.maximum(margin - product, 0) / energy, 0)
    down = jnp.where(reachable, jnp.minimum(-margin - product, 0) / energy, 0)
    costlier = weight * energy * (_square(up) - _square(down)) - 4 * target_weight * target
    plus = costlier <= 0
    return SignedProduct(
        data, free + data * jnp.where(plus, up, down)[..., None], _sign(plus, target)
    )


class _Stretch(NamedTuple):
    stretched: Array  # 1/v
    shrunk: Array  # 1/(2 − v)
    fill: Array  # the length of p' where p has no direction
    cost: Array  # |p' − p|² + |m' − m|²


def _stretch(near: Array, far: Array, least: Array) -> _Stretch:
    """The nearest `p', m'` with `|p'|² − |m'|² ≥ least`, given `near = |p|²` and `far = |m|²`.

    `v √(least + far/(2 − v)²) = √near` is convex and increases with `v`: Newton's steps from above
    the root stay above it. Three leave a relative error below 1e-7, four below 1e-14, from the
    least of three bounds, each of which is the root in a limit.
    """
    single = jnp.finfo(near.dtype).bits <= 32
    tiny = 1e-30 if single else 1e-250
    length, floor = jnp.sqrt(near), jnp.maximum(least, tiny)
    v = jnp.minimum(1, length / jnp.sqrt(floor + far / 4))
    v = jnp.minimum(v, 2 * length / jnp.maximum(length + jnp.sqrt(far), tiny))
    for _ in range(3 if single else 4):
        shrunk = 1 / (2 - v)
        reached = jnp.sqrt(floor + far * shrunk * shrunk)
        slope = reached + v * far * shrunk * shrunk * shrunk / reached
        v = jnp.clip(v - (v * reached - length) / slope, 0, 1)
    inside = near - far >= least
    shrunk = jnp.where(inside, 1, 1 / (2 - v))
    reached = jnp.sqrt(least + far * shrunk * shrunk)
    without = near <= tiny
    stretched = jnp.where(inside, 1, reached / jnp.where(without, 1, length))
    moved = jnp.where(inside, 0, reached - length)
    cost = _square(moved) + far * _square(1 - shrunk)
    return _Stretch(
        jnp.where(without, 1, stretched), shrunk, jnp.where(without & ~inside, moved, 0), cost
    )


def _square(x: Array) -> Array:
    return x * x


def _sign(plus: Array, like: Array) -> Array:
    return jnp.where(plus, 1, -1).astype(like.dtype)
