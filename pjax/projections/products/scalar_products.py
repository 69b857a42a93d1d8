"""Nearest points of `y = x · w`: the root of one multiplier for each product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from pjax.projections.products.operation import Bilinear, Copies, Weight


class MultiplierRoot(NamedTuple):
    """The root `t` of the multiplier equation, in terms that need no subtraction.

    Attributes:
        odds: `|t|/(1 − |t|)`, to full precision, and with it `|t| = odds/(1 + odds)` and
            `1 − |t| = 1/(1 + odds)`. The sign of `t` is that of `g`.
        near, far: `alpha` and `beta`, exchanged where `g < 0`: `near` belongs to the pole that the
            root approaches.
        excess: `2|g| + near − 0.75 far − 2`; where it is positive and `near` vanishes no root
            exists and the nearest point is not unique.
        set_valued: where that is so to rounding; `odds` has no meaning there.
    """

    odds: Float[Array, "*shape"]
    near: Float[Array, "*shape"]
    far: Float[Array, "*shape"]
    excess: Float[Array, "*shape"]
    set_valued: Bool[Array, "*shape"]


def solve_multiplier(
    alpha: Float[Array, "*shape"],
    beta: Float[Array, "*shape"],
    g: Float[Array, "*shape"],
    negligible: float | None = None,
) -> MultiplierRoot:
    """The `t` in (-1, 1) with `t + t [α (2−t)/(1−t)² + β (2+t)/(1+t)²]/2 = g`.

    For a scalar product this is the stationarity condition of the nearest point, with
    `α, β = W |√ρx x ± √ρw w|²/(2 ρx ρw)` and `g = W (z − x·w)/√(ρx ρw)`. The left side increases,
    so that the root is unique. It is found by Newton's method from a bound on the side of the pole.

    Arguments:
        alpha, beta: the two energies, not negative.
        g: the scaled residual.
        negligible: the share of `alpha + beta` up to which the energy at the pole counts as zero;
            by default what rounding leaves when the energies are sums of squares.

    Returns:
        the root and what decides whether there is one.

    Source: Bauschke, Lal, Wang (2022) for the equation.
    """
    dtype = jnp.result_type(alpha, beta, g)
    single = jnp.finfo(dtype).bits <= 32
    tiny = 1e-30 if single else 1e-200
    negative = g < 0
    near = jnp.where(negative, beta, alpha)
    far = jnp.where(negative, alpha, beta)
    g = jnp.abs(g)

    # The bound: near the pole the equation is `α t/(2u²) ≈ g − …`, far from it it is nearly linear.
    near_floored = jnp.maximum(near, tiny)
    slope = 2 + 0.75 * far
    excess = 2 * g + near_floored - 0.75 * far - 2
    cubic = jnp.exp((jnp.log(near_floored) - jnp.log(2 * slope)) / 3)
    pole = jnp.sqrt(near_floored) / jnp.sqrt(2 * jnp.maximum(excess, tiny))
    lower = jnp.minimum(
        1.0, jnp.maximum(jnp.maximum(-excess, 0.0) / slope, jnp.minimum(pole, cubic))
    )
    t = jnp.minimum(g / (1 + near_floored + 0.375 * far), 1 - lower)

    # One number holds the root to full precision: t up to a half, t − 1 beyond. As a loop, and with
    # no quotient used twice, this is one small kernel; unrolled, XLA took five times as long to
    # compile it.
    def newton(_: Any, point: Array) -> Array:
        t, u = _both_sides(point)
        square = (1 + t) ** 2
        gap = t * (u * u * (square + far * (2 + t) / 2) + near_floored * square * (1 + u) / 2)
        gap = gap - u * (u * g) * square
        slope = near_floored * square / u + u * u * (square + far / (1 + t))
        moved = point - gap / slope
        next_t, next_u = jnp.maximum(moved, 0.0), jnp.clip(-moved, 0.1 * u, 1.0)
        return jnp.where(
            point >= 0,
            jnp.where(next_t <= 0.5, next_t, -jnp.maximum(1 - next_t, 0.1 * u)),
            jnp.where(next_u < 0.5, -next_u, 1 - next_u),
        )

    start = jnp.where(t <= 0.5, t, -jnp.maximum(1 - t, lower))
    t, u = _both_sides(lax.fori_loop(0, 5 if single else 7, newton, start))
    if negligible is None:
        negligible = (8 * float(jnp.finfo(dtype).eps)) ** 2
    set_valued = (near <= negligible * (near + far)) & (excess > 0)
    return MultiplierRoot(t / u, near, far, excess, set_valued)


def _both_sides(point: Array) -> tuple[Array, Array]:
    """`t` and `1 − t` of a number in [-½, ½] that is `t` where it is positive, else `t − 1`."""
    positive = point >= 0
    return jnp.where(positive, point, 1 + point), jnp.where(positive, 1 - point, -point)


class ProductMoves(NamedTuple):
    """What each pair of slices moves by, in the scaled slices `X = √ρx x` and `V = √ρw w`.

    `X` moves by `left_scale·X + cross·V + near·(V + sign·X) + fill`, and `V` by
    `right_scale·V + cross·X + near·(X + sign·V) + sign·fill`. Near a pole `V + sign·X` is small
    and its coefficient large; kept apart, the small vector is rounded once, before it is scaled.
    Without the slices at hand that cannot be done, and `near` is 0.
    """

    left_scale: Array
    right_scale: Array
    cross: Array
    near: Array
    sign: Array
    fill: Array
    output: Array


def scalar_product_moves(
    plus: Array,
    minus: Array,
    residual: Array,
    sigma: Array,
    target_weight: Array,
    slice_length: Copies,
    then: Callable[[ProductMoves], Any],
    *,
    slices_at_hand: bool,
) -> Any:
    """`then` of the solution of every scalar product, given `plus, minus = |X ± V|²/(2σ²)` and
    `z − x·w`.
    """
    dtype = residual.dtype
    # Energies known as a difference of products are exact to ε only. Where they nearly cancel,
    # taking them for zero up to a share δ costs a relative √δ of the distance, and keeping them
    # costs ε/δ: both are least near δ = ε^⅔.
    negligible = None if slices_at_hand else float(jnp.finfo(dtype).eps) ** (2 / 3)
    root = solve_multiplier(
        target_weight * plus, target_weight * minus, target_weight * residual / sigma, negligible
    )

    def moves(set_valued: Array) -> ProductMoves:
        t = root.odds / (1 + root.odds)
        positive = residual >= 0
        sign = jnp.where(positive, 1, -1).astype(dtype)
        near, far = jnp.where(positive, plus, minus), jnp.where(positive, minus, plus)
        rise = near * (1 + root.odds) * (2 + root.odds) + far * (2 + t) / (1 + t) ** 2
        output = sign * sigma * t / 2 * rise

        # Set-valued: X and V lie along the far direction, and any point of a sphere (slices of one
        # entry: of two points) is nearest. Take the one along X; where both vanish, along ones.
        tiny = 1e-30 if jnp.finfo(dtype).bits <= 32 else 1e-200
        vanishing = set_valued & (root.far <= tiny)
        along = set_valued & ~vanishing
        held = jnp.where(set_valued, target_weight, 1)
        length = jnp.sqrt(jnp.maximum(root.excess - 0.25 * root.near, 0))
        ratio = length / jnp.sqrt(jnp.where(along, root.far - root.near, 1))

        regular = ~set_valued
        denominator = jnp.where(regular, 1 + t, 1)
        scale = jnp.where(regular, t * root.odds, 0)
        cross = jnp.where(regular, sign * root.odds, 0)
        near_pole = jnp.zeros_like(cross)
        if slices_at_hand:
            at_pole = regular & (root.odds > 1)
            scale = jnp.where(at_pole, -t, scale)
            cross, near_pole = jnp.where(at_pole, 0, cross), jnp.where(at_pole, cross, 0)
        return ProductMoves(
            left_scale=jnp.where(along, ratio - 0.5, scale) / denominator,
            right_scale=jnp.where(along, -ratio - 0.5, scale) / denominator,
            cross=cross / denominator,
            near=near_pole / denominator,
            sign=sign,
            fill=jnp.where(vanishing, sigma * length, 0)
            / jnp.sqrt(2 * np.maximum(slice_length, 1) * held),
            output=jnp.where(set_valued, residual - sign * sigma / held, output),
        )

    if not slices_at_hand and residual.size < _LARGE:
        return then(moves(root.set_valued))
    # Where nothing is set-valued less is to be done. And what a conditional returns is stored,
    # where compilers would find it again for each copy.
    return lax.cond(
        jnp.any(root.set_valued),
        lambda: then(moves(root.set_valued)),
        lambda: then(moves(jnp.zeros((), bool))),
    )


#: From how many scalar products on a second branch without copies is worth its compile time.
_LARGE = 2**18


def copies_weight(
    weight: Weight, copies: Copies, total: Any, output_shape: tuple[int, ...]
) -> Array:
    """The sum of the weights of all copies of each entry, 1 where there is no copy."""
    weight = jnp.asarray(weight)
    if weight.ndim == 0:
        return weight * np.maximum(copies, 1)
    summed = total(jnp.broadcast_to(weight, output_shape))
    return jnp.where(np.asarray(copies) > 0, summed, 1)


def asked_products(op: Bilinear, target_weight: Any, dtype: Any) -> Array:
    """The target's weight, 0 where the output reads constants only."""
    weight, lengths = jnp.asarray(target_weight, dtype), np.asarray(op.slice_lengths)
    return weight if lengths.all() else jnp.where(lengths > 0, weight, 0)
