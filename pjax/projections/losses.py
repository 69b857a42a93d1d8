"""Losses of rows, and their proximal operators in deviation form.

The last axis is the row. A proximal operator takes the point as a reference plus a deviation, and a
`step`: one number per row (or one for all), `λ` in `argmin ½|x − v|² + λ·loss(x)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from pjax.backend import device, shardings
from pjax.projections import numeric

#: Newton steps of `cross_entropy`, at most.
_NORMALISER_STEPS = 10
#: For so many numbers a step takes no longer than its launch and than to ask whether to go on.
_FEW_NUMBERS = 2**17
#: With at most so many classes `cross_entropy` has them along the first axis on a CPU: kernels are
#: fast along the last axis, if that is long.
_FEW_CLASSES = 16
_NormaliserState = tuple[Array, Array, Array]


def cross_entropy_value(
    logits: Float[Array, "*batch n"], labels: Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    """`−Σ_c y_c log softmax(x)_c` of every row.

    **Arguments:**

    - `logits`: `x`.
    - `labels`: `y`, one-hot or soft.
    """
    terms = labels * jax.nn.log_softmax(logits, axis=-1)
    # A class that is ruled out by a logit of −∞ and not asked for costs nothing.
    return -jnp.sum(jnp.where(labels == 0, 0, terms), axis=-1)


def margin_value(
    logits: Float[Array, "*batch n"], labels: Float[Array, "*batch n"], margin: float
) -> Float[Array, "*batch"]:
    """`½ Σ_c max(margin − s_c x_c, 0)²` of every row, with `s = 2·labels − 1`.

    **Arguments:**

    - `logits`: `x`.
    - `labels`: 0 or 1.
    - `margin`: the value of `s x` from which on an entry costs nothing.
    """
    gap = jnp.maximum(margin - (2 * labels - 1) * logits, 0)
    return 0.5 * jnp.sum(jnp.square(gap), axis=-1)


def squared_error_value(
    values: Float[Array, "*batch n"], targets: Float[Array, "*batch n"]
) -> Float[Array, "*batch"]:
    """`½ Σ_i (x_i − t_i)²` of every row.

    **Arguments:**

    - `values`: `x`.
    - `targets`: `t`.
    """
    return 0.5 * jnp.sum(jnp.square(values - targets), axis=-1)


def cross_entropy(
    reference: Float[Array, "*batch n"],
    deviation: Float[Array, "*batch n"],
    labels: Float[Array, "*batch n"],
    step: ArrayLike,
) -> Float[Array, "*batch n"]:
    """`argmin_x ½|x − v|² + λ·CE(x, y)` at `v = reference + deviation`, as a deviation.

    With `r = v − x`, and `a = λ y`, stationarity reads `r + log(a + r) = v − L` for one number `L`
    per row. `Σ r(L) = 0` is solved for `L` by Newton steps, monotone from a bound; no number of the
    size of `λ` is subtracted from another.

    **Arguments:**

    - `reference`, `deviation`: their sum is `v`.
    - `labels`: `y ≥ 0`, rows that sum to 1, one-hot or soft. A row that sums to `m` counts `m`
        times its normalised row; a row of zeros stays where it is.
    - `step`: `λ ≥ 0`; 0 leaves the row where it is.

    **Returns:** the new deviation.

    **Source:** the Wright omega function `w + log w = z`; see Corless and Jeffrey (2002), and for
    its iteration Fritsch, Shafer and Crowley (1973).
    """
    dtype = deviation.dtype
    classes = deviation.shape[-1]
    axis = 0 if classes <= _FEW_CLASSES and not device.launches_kernels() else -1
    reference, deviation, labels = (
        jnp.moveaxis(jnp.asarray(x, dtype), -1, axis) for x in (reference, deviation, labels)
    )

    def total(x: Array) -> Array:
        return jnp.sum(x, axis=axis, keepdims=True)

    mass = total(labels)
    step = jnp.asarray(step, dtype)
    step = mass * (jnp.expand_dims(step, axis) if step.ndim else step)
    active = step > 0
    y = labels / jnp.where(mass > 0, mass, 1)
    step = jnp.where(active, step, 1)

    # Everything is counted from the class with the largest w = a + r, so b = v − L = above + ζ.
    a = step * y
    is_top = _first_largest(reference + deviation + a, axis)

    def at_top(x: Array) -> Array:
        return total(jnp.where(is_top, x, 0))

    def others(x: Array) -> Array:
        return total(jnp.where(is_top, 0, x))

    above = (reference - at_top(reference)) + (deviation - at_top(deviation))
    rest = step * (1 - at_top(y))

    # Three upper bounds on ζ, by the softmax q of v + a. Where one class has nearly everything the
    # sums over the others are what matters, and are not differences.
    odds = jnp.exp(above + a + rest - step)
    against = others(odds)
    q = odds / (1 + against)
    impurity = others(q * (1 - q)) + against / jnp.square(1 + against)
    mean = others(above + a + rest) / classes
    bound = jnp.minimum(-jnp.log1p(against) - step * impurity, -math.log(classes) - mean)
    zeta = jnp.log(step) + rest + jnp.minimum(0, bound)

    def newton(state: _NormaliserState) -> _NormaliserState:
        """`r` at this `L`, then a step for `L` and, to first order, what it does to `r`."""
        _, zeta, _ = state
        w, r = _omega_less(a, above + zeta)
        slope = w / (1 + w)
        change = total(r) / total(slope)
        # There may be no solution for a row that stays where it is.
        size = jnp.max(jnp.where(active, jnp.abs(change), 0), initial=0)
        return size, zeta - change, r - change * slope

    # Newton's method squares the error: what follows a change this small is rounding. A row with a
    # NaN never has one, and must not end the steps of the others.
    small = jnp.finfo(dtype).eps ** 0.5
    # The first step computes r anew: a only has its shape.
    start = (jnp.full((), jnp.inf, dtype), zeta, a)
    if device.launches_kernels() and deviation.size <= _FEW_NUMBERS:
        state = start
        for _ in range(_NORMALISER_STEPS):
            state = newton(state)
    else:
        state = shardings.repeat(lambda s: ~(s[0] <= small), newton, start, _NORMALISER_STEPS)
    r = state[-1]

    # The moves of a row sum to 0, and that of the top class may be far smaller than a and w.
    move = jnp.where(is_top, others(r), -r)
    return jnp.moveaxis(deviation + jnp.where(active, move, 0), axis, -1)


def _first_largest(x: Array, axis: int) -> Array:
    """Where the largest entry along an axis is, the first of equal ones. XLA computes two plain
    reductions faster than an `argmax`, which carries a value and an index.
    """
    places = lax.broadcasted_iota(int, x.shape, axis % x.ndim)
    largest = x == jnp.max(x, axis=axis, keepdims=True)
    first = jnp.min(jnp.where(largest, places, x.shape[axis]), axis=axis, keepdims=True)
    return places == first


def _omega_less(a: Array, b: Array) -> tuple[Array, Array]:
    """`w = a + r` and `r` with `r + log w = b`: Wright's omega function of `z = a + b`, less `a`.

    From a start that is within 2 %, by the step of Fritsch, Shafer and Crowley, of fourth order.
    What it changes is added to `r`, which may be far smaller than `a` and `w`.
    """
    z = a + b
    large = z > 1
    exp, above = jnp.exp(jnp.minimum(z, 1)), jnp.maximum(z, 1)
    # For large z a Newton step from z; else a rational function of exp(z), fitted to omega.
    part = jnp.where(large, jnp.log(above), exp * (1 + 0.158 * exp))
    part = part / jnp.where(large, 1 + 1 / above, 1 + 1.046 * exp)
    w, r = jnp.where(large, z - part, part), jnp.where(large, b - part, part - a)
    # Below −60 w is exp(z) to rounding, and its logarithm may not be finite. Above 100 a Newton
    # step from here is as good, and the products of the other would leave the range at last.
    tiny, huge = z < -60, w > 100
    for _ in range(1 if jnp.finfo(z.dtype).bits <= 32 else 2):
        off = b - r - jnp.log(jnp.where(tiny, 1, w))
        double = 2 * (1 + w) * (1 + w + 2 / 3 * off)
        over, under = jnp.where(huge, 1, double - off), jnp.where(huge, 1, double - 2 * off)
        change = jnp.where(tiny, 0, w * off * over / ((1 + w) * under))
        w, r = w + change, r + change
    return w, r


def _per_row(step: ArrayLike, dtype: jnp.dtype) -> Array:
    step = jnp.asarray(step, dtype)
    return step[..., None] if step.ndim else step


def margin(
    reference: Float[Array, "*batch n"],
    deviation: Float[Array, "*batch n"],
    labels: Float[Array, "*batch n"],
    margin: float,
    step: ArrayLike,
) -> Float[Array, "*batch n"]:
    """`argmin_x ½|x − v|² + λ/2 Σ max(margin − s x, 0)²`, `v = reference + deviation`.

    **Arguments:**

    - `reference`, `deviation`: their sum is `v`.
    - `labels`: 0 or 1; `s = 2·labels − 1`.
    - `margin`: the value of `s x` from which on an entry costs nothing.
    - `step`: `λ ≥ 0`; infinite for the projection onto `{s x ≥ margin}`.

    **Returns:** the new deviation.
    """
    sign = 2 * jnp.asarray(labels, deviation.dtype) - 1
    # References first: at a reference on the margin the gap is the deviation, exactly.
    gap = (margin - sign * reference) - sign * deviation
    return deviation + sign * _fraction(step, deviation.dtype) * jnp.maximum(gap, 0)


def squared_error(
    reference: Float[Array, "*batch n"],
    deviation: Float[Array, "*batch n"],
    targets: Float[Array, "*batch n"],
    step: ArrayLike,
) -> Float[Array, "*batch n"]:
    """`argmin_x ½|x − v|² + λ/2 |x − t|²` at `v = reference + deviation`, as a deviation.

    **Arguments:**

    - `reference`, `deviation`: their sum is `v`.
    - `targets`: `t`.
    - `step`: `λ ≥ 0`; infinite for `x = t`.

    **Returns:** the new deviation.
    """
    gap = (jnp.asarray(targets, deviation.dtype) - reference) - deviation
    return deviation + _fraction(step, deviation.dtype) * gap


def _fraction(step: ArrayLike, dtype: jnp.dtype) -> Array:
    """`λ/(1 + λ)`, 1 for an infinite `λ`; with an axis for the row."""
    step = _per_row(step, dtype)
    finite = jnp.where(jnp.isinf(step), 1, step)
    return jnp.where(jnp.isinf(step), 1, finite / (1 + finite))


def tangent(
    value: Callable[[Array], Array],
    reference: Float[Array, "*batch n"],
    deviation: Float[Array, "*batch n"],
    step: ArrayLike,
) -> Float[Array, "*batch n"]:
    """`v − λ ∇ℓ(v) = argmin_x ½|x − v|² + λ ∇ℓ(v)·x` at `v = reference + deviation`.

    Where `λ ℓ` is concave its tangent is an upper bound, and what lowers that lowers `λ ℓ`.

    **Arguments:**

    - `value`: `ℓ`, one number per row; of `x`.
    - `reference`, `deviation`: their sum is `v`.
    - `step`: `λ` of either sign.
    """
    slope = jax.grad(lambda x: jnp.sum(value(x)))(reference + deviation)
    slope = jnp.where(jnp.isfinite(slope), slope, 0)
    return deviation - _per_row(step, deviation.dtype) * slope


# --- Losses without a closed form ----------------------------------------------------------------

#: Steps of `separable`, and of `rows` with at most so many conjugate gradient steps in each.
_ENTRY_STEPS = 60
_ROW_STEPS, _ROW_INNER = 40, 16
#: A loss is straight along a move that changes its slope by less than this share.
_STRAIGHT = 0.5


def separable(
    entries: Callable[[Array], Array],
    reference: Float[Array, "*batch n"],
    deviation: Float[Array, "*batch n"],
    step: ArrayLike,
) -> Float[Array, "*batch n"]:
    """`argmin_x ½|x − v|² + λ Σ_i ℓ_i(x_i)` at `v = reference + deviation`, as a deviation.

    Where `ℓ_i` is convex, `x − v + λ ℓ_i′(x)` rises, and its zero lies between `v` and
    `v − λ ℓ_i′(v)`: Newton steps inside that bracket, which is halved where they leave it, end at
    the nearest point, at a kink as well. Elsewhere the result is kept if it lowers the objective.

    **Arguments:**

    - `entries`: `ℓ`, elementwise; of `x`.
    - `reference`, `deviation`: their sum is `v`.
    - `step`: `λ ≥ 0`, one number per row, finite.
    """
    dtype = deviation.dtype
    step = jnp.broadcast_to(_per_row(step, dtype), deviation.shape)

    def slope_at(x: Array) -> Array:
        _, slope = jax.jvp(entries, (x,), (jnp.ones_like(x),))
        return jnp.where(jnp.isfinite(slope), slope, 0)

    def slope_and_bend(move: Array) -> tuple[Array, Array]:
        x = reference + move
        return jax.jvp(slope_at, (x,), (jnp.ones_like(x),))

    slope_before = slope_at(reference + deviation)
    full_step = deviation - step * slope_before
    low, high = jnp.minimum(deviation, full_step), jnp.maximum(deviation, full_step)

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        at, low, high, _ = state
        slope, bend = slope_and_bend(at)
        rise = at - deviation + step * slope
        low, high = jnp.where(rise < 0, at, low), jnp.where(rise > 0, at, high)
        new = at - rise / (1 + jnp.maximum(step * bend, 0))
        inside = (new > low) & (new < high)
        new = jnp.where(rise == 0, at, jnp.where(inside, new, (low + high) / 2))
        return new, low, high, jnp.max(jnp.abs(new - at) - close(at), initial=0)

    def close(at: Array) -> Array:
        return 2 * jnp.finfo(dtype).eps * jnp.abs(at)

    first = (deviation, low, high, jnp.full((), jnp.inf, dtype))
    at, *_ = shardings.repeat(lambda state: state[-1] > 0, body, first, _ENTRY_STEPS)
    slope_there = slope_at(reference + at)
    found = _settled(deviation, -step * slope_there, at, reference)

    def cost(move: Array) -> Array:
        return 0.5 * jnp.square(move - deviation) + step * entries(reference + move)

    rounding = 8 * jnp.finfo(dtype).eps * jnp.abs(step * entries(reference + deviation))
    lower = cost(found) <= cost(deviation) + rounding
    # What a short move gains may be less than what values are rounded by; slopes know of it.
    lower |= jnp.abs(slope_there - slope_before) <= _STRAIGHT * jnp.abs(slope_before)
    return jnp.where(lower & (step > 0), found, deviation)


def _settled(deviation: Array, move: Array, at: Array, reference: Array) -> Array:
    """`deviation + move` with the move `−λ∇ℓ` of the point itself, which has no cancellation; but
    the point where they differ by more than its rounding: at a kink.
    """
    rounding = 64 * jnp.finfo(at.dtype).eps * (jnp.abs(reference) + jnp.abs(at))
    rounding = rounding + 1e-3 * jnp.abs(at - deviation)
    exact = deviation + move
    return jnp.where(jnp.abs(exact - at) <= rounding, exact, at)


def rows(
    value: Callable[[Array], Array],
    reference: Float[Array, "*batch n"],
    deviation: Float[Array, "*batch n"],
    step: ArrayLike,
) -> Float[Array, "*batch n"]:
    """`argmin_x ½|x − v|² + λ ℓ(x)` of every row at `v = reference + deviation`, as a deviation.

    Newton steps, solved for by conjugate gradients in each row by itself and damped where they do
    not lower the objective; a way along which the loss bends down ends the inner iteration. The
    nearest point where the loss is convex and the iteration converged; elsewhere no worse than `v`.

    **Arguments:**

    - `value`: `ℓ`, one number per row; of `x`.
    - `reference`, `deviation`: their sum is `v`.
    - `step`: `λ ≥ 0`, one number per row, finite.
    """
    dtype = deviation.dtype
    step = jnp.broadcast_to(_per_row(step, dtype), (*deviation.shape[:-1], 1))

    def slope_at(x: Array) -> Array:
        slope = jax.grad(lambda x: jnp.sum(value(x)))(x)
        return jnp.where(jnp.isfinite(slope), slope, 0)

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    def cost(move: Array) -> Array:
        found = 0.5 * dot(move - deviation, move - deviation)
        return found + step * value(reference + move)[..., None]

    def way(at: Array, damping: Array) -> Array:
        """`−(1 + μ + λH)⁻¹ g`, with the gradient `g` and the curvature `H`."""
        slope, bend = jax.linearize(slope_at, reference + at)
        gradient = at - deviation + step * slope

        (found,) = numeric.conjugate_gradients(
            lambda ways: [(1 + damping) * d + step * bend(d) for d in ways],
            [-gradient],
            lambda a, b: dot(a[0], b[0]),
            lambda number: [number],
            min(at.shape[-1], _ROW_INNER),
        )
        return jnp.where(dot(found, gradient) < 0, found, -gradient / (1 + damping))

    def body(state: tuple[Array, ...]) -> tuple[Array, ...]:
        at, height, damping, _ = state
        new = at + way(at, damping)
        there = cost(new)
        # In a deep network moves are below the rounding of the objective: let them be taken.
        own = 0.5 * dot(at - deviation, at - deviation)
        size = jnp.abs(height) + jnp.abs(height - own)
        lower = there <= height + 8 * jnp.finfo(dtype).eps * size
        moved = jnp.abs(new - at) > 4 * jnp.finfo(dtype).eps * jnp.abs(new)
        new, height = jnp.where(lower, new, at), jnp.where(lower, there, height)
        damping = jnp.where(lower, 0.2 * damping, 5 * damping + 1)
        return new, height, damping, jnp.any(moved & (step > 0))

    # What a short move gains may be less than what values are rounded by; slopes know of it.
    slope_before = slope_at(reference + deviation)
    full_step = deviation - step * slope_before
    bend = slope_at(reference + full_step) - slope_before
    straight = dot(bend, bend) <= _STRAIGHT**2 * dot(slope_before, slope_before)
    start = jnp.where(straight, full_step, deviation)

    none = jnp.zeros_like(step)
    first = (start, cost(start), none, jnp.array(True))
    at, *_ = shardings.repeat(lambda state: state[-1], body, first, _ROW_STEPS)
    found = _settled(deviation, -step * slope_at(reference + at), at, reference)
    return jnp.where(step > 0, found, deviation)
