"""Nearest points of differentiable functions without a closed form, by safeguarded iterations.

    argmin  ρ |x' − x|² + W |φ(x') − z|²

of a function of one number, of rows, or of whole arrays. Points are a reference plus a deviation,
and differences of `φ` are formed without cancellation. The only derivatives are those of `φ`
itself, a node of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.projections import scaling

#: The two nodes of Gauss' rule on [0, 1].
_NODES = (0.5 - 0.5 / math.sqrt(3), 0.5 + 0.5 / math.sqrt(3))


def difference(
    function: Callable[..., Array],
    at: Sequence[Array],
    value: Array,
    move: Sequence[Array],
    exponent: Any = 0,
    noise: Any = 0.0,
) -> Array:
    """`φ(x + δ) − φ(x)`, also where `δ` is far below the rounding of `x`.

    The difference of the two values is right to their rounding. Where the integral of the
    derivative along the way, by Gauss' rule, agrees to that rounding it is taken: it has no
    cancellation.

    **Arguments:**

    - `function`: `φ`, of several arrays.
    - `at`, `value`: `x`, and `φ(x)`.
    - `move`: `δ`, in a unit of `2**−exponent`, like the result.
    - `noise`: how far values of `φ` may be off, beyond their own rounding.
    """
    real = [scaling.from_unit(m, exponent) for m in move]
    direct = function(*(x + m for x, m in zip(at, real, strict=True))) - value
    integral = jnp.zeros_like(value)
    for node in _NODES:
        points = tuple(x + node * m for x, m in zip(at, real, strict=True))
        _, slope = jax.jvp(function, points, tuple(move))
        integral = integral + 0.5 * slope
    small = scaling.from_unit(integral, exponent)
    size = jnp.abs(value) + jnp.abs(value + direct)
    rounding = 16 * jnp.finfo(value.dtype).eps * size + noise
    agree = jnp.abs(small - direct) <= rounding
    return jnp.where(agree & jnp.isfinite(integral), integral, scaling.to_unit(direct, exponent))


def noise_of(function: Callable[..., Array], at: Sequence[Array], value: Array) -> Array:
    """How far values of `φ` may be off: by what they change with the rounding of the operands, and
    by the rounding of the largest of them, or of 1.

    Of a decomposition that is more than the rounding of each entry.
    """
    eps = jnp.finfo(value.dtype).eps
    near = [
        x * (1 + 2 * eps * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)) for x in at
    ]
    change = jnp.abs(function(*near) - value)
    largest = jnp.max(jnp.where(jnp.isfinite(value), jnp.abs(value), 0), initial=1)
    change = jnp.max(jnp.where(jnp.isfinite(change), change, 0), initial=0)
    return 16 * eps * largest + 4 * change


# --- Functions of one number ---------------------------------------------------------------------

#: Points at which `scalar` looks for the lowest valley, Newton steps into it, probes at its end,
#: and steps by slopes alone.
_SAMPLES, _STEPS, _PROBES, _SETTLING = 65, 12, 24, 2


def scalar(
    function: Callable[..., Array],
    reference: Array,
    output_reference: Array,
    deviation: Array,
    weight: Any,
    target: Array,
    target_weight: Any,
) -> tuple[Array, Array]:
    """`argmin ρ(x' − x)² + W(φ(x') − z)²` for each entry, as deviations of `x'` and of `φ(x')`.

    The objective at `x` bounds how far the nearest point is: `|x' − x| ≤ (W/ρ)^½ |φ(x) − z|`. That
    interval is sampled, and from the best point the valley is followed down by Newton steps between
    the neighbours of that point, shortened where they do not decrease the objective, by probing
    both sides, and at last by Newton steps that do not raise it beyond its rounding. So the result
    is never worse than any sample: the nearest point, but for a valley narrower than the samples.

    **Arguments:**

    - `function`: `φ`, elementwise.
    - `reference`, `output_reference`: `x_ref` and `φ(x_ref)`.
    - `deviation`, `weight`: `x − x_ref` and `ρ > 0`.
    - `target`, `target_weight`: `z − φ(x_ref)` and `W ≥ 0`.
    """
    dtype = deviation.dtype
    weight = jnp.broadcast_to(jnp.asarray(weight, dtype), deviation.shape)
    target_weight = jnp.broadcast_to(jnp.asarray(target_weight, dtype), deviation.shape)

    def rise(move: Array) -> Array:
        return difference(function, (reference,), output_reference, (move,))

    def objective(move: Array, height: Array) -> Array:
        cost = weight * jnp.square(move - deviation) + target_weight * jnp.square(height - target)
        return jnp.where(jnp.isfinite(height), cost, jnp.inf)

    def better_of(best: _Best, move: Array, rounding: Any = 0.0) -> tuple[_Best, Array]:
        """The lower of the two for each entry, and where that is the new one; which may be higher
        by less than the rounding.
        """
        height = rise(move)
        new = _Best(move, height, objective(move, height))
        lower = new.cost < best.cost + rounding
        found = (jnp.where(lower, a, b) for a, b in zip(new, best, strict=True))
        return _Best(*found), lower

    start = rise(deviation)
    safe = jnp.isfinite(start)
    reach = jnp.sqrt(target_weight / weight) * jnp.where(safe, jnp.abs(start - target), 0)
    spacing = 2 / (_SAMPLES - 1)

    def sample(count: Any, best: _Best) -> _Best:
        # Denser around the point where it is now.
        return better_of(best, deviation + reach * _signed_square(count * spacing - 1))[0]

    best = _Best(deviation, start, objective(deviation, start))
    best = lax.fori_loop(0, _SAMPLES, sample, best)
    place = jnp.where(reach > 0, (best.move - deviation) / jnp.where(reach > 0, reach, 1), 0)
    root = jnp.sign(place) * jnp.sqrt(jnp.abs(place))
    low = deviation + reach * _signed_square(root - spacing)
    high = deviation + reach * _signed_square(root + spacing)

    def slopes(move: Array) -> tuple[Array, Array]:
        """`φ′` and `φ″`."""

        def slope(x: Array) -> Array:
            return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

        x = reference + move
        return jax.jvp(slope, (x,), (jnp.ones_like(x),))

    def newton(best: _Best) -> Array:
        slope, bend = slopes(best.move)
        gap = best.height - target
        gradient = weight * (best.move - deviation) + target_weight * gap * slope
        gauss = weight + target_weight * jnp.square(slope)
        curvature = gauss + target_weight * gap * bend
        step = -gradient / jnp.where(curvature > 0.1 * gauss, curvature, gauss)
        return jnp.where(jnp.isfinite(step), step, 0)

    def descend(_: Any, best: _Best) -> _Best:
        step = newton(best)
        for _ in range(4):
            best, lower = better_of(best, jnp.clip(best.move + step, low, high))
            step = jnp.where(lower, 0, 0.25 * step)
        return best

    def settle(_: Any, best: _Best) -> _Best:
        # Costs tell points apart to the root of their rounding, slopes to their rounding.
        gap, size = jnp.abs(best.height - target), jnp.abs(output_reference) + jnp.abs(best.height)
        terms = target_weight * gap * size
        terms = terms + weight * jnp.abs(best.move - deviation) * jnp.abs(best.move)
        rounding = 16 * jnp.finfo(dtype).eps * (best.cost + terms)
        return better_of(best, jnp.clip(best.move + newton(best), low, high), rounding)[0]

    def probe(_: Any, state: tuple[_Best, Array]) -> tuple[_Best, Array]:
        # To both sides, ever closer: onto a kink, where Newton steps only go to and fro.
        best, width = state
        for side in (-1, 1):
            best, _ = better_of(best, jnp.clip(best.move + side * width, low, high))
        return best, 0.5 * width

    best = lax.fori_loop(0, _STEPS, descend, best)
    best, _ = lax.fori_loop(0, _PROBES, probe, (best, 0.25 * (high - low)))
    best = lax.fori_loop(0, _SETTLING, settle, best)
    # Two compilations of one comparison may disagree where costs are equal to rounding: the output
    # is that of the point which was kept.
    return best.move, rise(best.move)


class _Best(NamedTuple):
    """The lowest point so far: where it is, `φ` there, and the objective."""

    move: Array
    height: Array
    cost: Array


def _signed_square(x: Array) -> Array:
    return x * jnp.abs(x)


# --- Functions of rows, and of arrays ------------------------------------------------------------


class Rows(NamedTuple):
    """Along which axes of each operand, and of the output, a function is independent."""

    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]


def _row_sum(array: Array, kept: tuple[int, ...]) -> Array:
    """The sum over each row, one number for each, in the order of the kept axes."""
    return jnp.sum(array, axis=tuple(a for a in range(array.ndim) if a not in kept))


def _spread(rows: Array, ndim: int, kept: tuple[int, ...]) -> Array:
    """One number for each row, in a shape that broadcasts to the operand."""
    return jnp.expand_dims(rows, tuple(a for a in range(ndim) if a not in kept))


#: Gauss-Newton steps of `gauss_newton`, and conjugate gradient steps in each.
_OUTER, _INNER = 8, 8


def gauss_newton(
    function: Callable[..., Array],
    rows: Rows,
    references: Sequence[Array],
    output_reference: Array,
    deviations: Sequence[Array],
    weights: Sequence[Any],
    target: Array,
    target_weight: Any,
    outer: int = _OUTER,
    inner: int = _INNER,
) -> tuple[tuple[Array, ...], Array]:
    """`argmin Σ ρ|x' − x|² + W|φ(x') − z|²` by damped Gauss-Newton steps, each row by itself.

    A step solves the linearised problem by conjugate gradients, and is halved until it decreases
    the objective. The result is never worse than the point it began from, and stationary when
    converged.

    **Arguments:**

    - `function`: `φ` of the operands.
    - `rows`: the axes along which it is independent.
    - `references`, `output_reference`, `deviations`, `weights`: the operands, `φ` of their
        references, how far they are from these, and `ρ > 0`.
    - `target`, `target_weight`: `z − φ(x_ref)` and `W ≥ 0`.
    - `outer`, `inner`: Gauss-Newton steps, and steps of conjugate gradients in each.

    **Returns:** the new deviations, and that of the output.
    """
    dtype = output_reference.dtype
    target_weight = jnp.broadcast_to(jnp.asarray(target_weight, dtype), target.shape)
    weights = [
        jnp.broadcast_to(jnp.asarray(w, d.dtype), d.shape)
        for w, d in zip(weights, deviations, strict=True)
    ]

    def inner_sum(arrays: Sequence[Array]) -> Array:
        total = jnp.zeros((), dtype)
        for array, kept in zip(arrays, rows.inputs, strict=True):
            total = total + _row_sum(array, kept)
        return total

    def to_inputs(number: Array) -> list[Array]:
        return [
            _spread(number, d.ndim, kept) for d, kept in zip(deviations, rows.inputs, strict=True)
        ]

    def rise(moves: Sequence[Array]) -> Array:
        return difference(function, references, output_reference, moves)

    def objective(moves: Sequence[Array], height: Array) -> Array:
        own = inner_sum(
            [w * jnp.square(m - d) for w, m, d in zip(weights, moves, deviations, strict=True)]
        )
        other = _row_sum(target_weight * jnp.square(height - target), rows.output)
        return jnp.where(jnp.isfinite(other), own + other, jnp.inf)

    def step(_: Any, state: tuple[tuple[Array, ...], Array, Array]) -> Any:
        moves, height, cost = state
        point = tuple(r + m for r, m in zip(references, moves, strict=True))
        _, push = jax.linearize(function, *point)
        transpose = jax.linear_transpose(push, *point)

        def pull(force: Array) -> tuple[Array, ...]:
            return tuple(transpose(force))

        back = [d - m for d, m in zip(deviations, moves, strict=True)]
        pulled = pull(target_weight * (target - height))
        gradient = [w * b + p for w, b, p in zip(weights, back, pulled, strict=True)]

        def curvature(way: Sequence[Array]) -> list[Array]:
            """`(ρ + Jᵀ W J) d`."""
            pulled = pull(target_weight * push(*way))
            return [w * d + p for w, d, p in zip(weights, way, pulled, strict=True)]

        way = conjugate_gradients(
            curvature,
            gradient,
            lambda a, b: inner_sum([x * y for x, y in zip(a, b, strict=True)]),
            to_inputs,
            inner,
            lambda arrays: [a / w for a, w in zip(arrays, weights, strict=True)],
        )
        length = jnp.ones_like(cost)
        for _ in range(6):
            new = tuple(m + s * d for m, s, d in zip(moves, to_inputs(length), way, strict=True))
            there = rise(new)
            lower = objective(new, there)
            better = lower < cost
            moves = tuple(
                jnp.where(b, n, m) for b, n, m in zip(to_inputs(better), new, moves, strict=True)
            )
            height = jnp.where(_spread(better, height.ndim, rows.output), there, height)
            cost = jnp.where(better, lower, cost)
            length = jnp.where(better, 0, 0.4 * length)
        return moves, height, cost

    start = tuple(deviations)
    height = rise(start)
    moves, _, _ = lax.fori_loop(0, outer, step, (start, height, objective(start, height)))
    return moves, rise(moves)


def conjugate_gradients(
    apply: Callable[[Sequence[Array]], Sequence[Array]],
    request: Sequence[Array],
    dot: Callable[[Sequence[Array], Sequence[Array]], Array],
    spread: Callable[[Array], Sequence[Array]],
    iterations: int,
    precondition: Callable[[Sequence[Array]], Sequence[Array]] = list,
) -> list[Array]:
    """Towards `A⁻¹ b`, from 0, each row by itself.

    A row ends where `⟨d, A d⟩ ≤ 0`: what it has found until there is a descent direction.

    **Arguments:**

    - `apply`, `request`: `A` and `b`, of several arrays.
    - `dot`, `spread`: one number for each row, and such numbers in shapes that broadcast to each of
        the arrays.
    - `iterations`: how many steps.
    - `precondition`: an approximate `A⁻¹`, symmetric and positive.
    """

    def body(_: Any, state: Any) -> Any:
        found, residual, way, gamma, going = state
        image = apply(way)
        bend = dot(way, image)
        going = going & (bend > 0) & (gamma > 0)
        rate = spread(jnp.where(going, gamma / jnp.where(going, bend, 1), 0))
        found = [f + r * d for f, r, d in zip(found, rate, way, strict=True)]
        residual = [g - r * i for g, r, i in zip(residual, rate, image, strict=True)]
        scaled = precondition(residual)
        new = dot(residual, scaled)
        ratio = spread(jnp.where(going, new / jnp.where(gamma > 0, gamma, 1), 0))
        way = [s + r * d for s, r, d in zip(scaled, ratio, way, strict=True)]
        return found, residual, way, new, going

    way = list(precondition(request))
    gamma = dot(request, way)
    zero = [jnp.zeros_like(g) for g in request]
    first = (zero, list(request), way, gamma, gamma > 0)
    return lax.fori_loop(0, iterations, body, first)[0]
