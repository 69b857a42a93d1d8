"""Nearest points of a normalisation: layer, batch, group and RMS norms, and division by a length.

    f(x) = a w / σ,   w = x − mean(x) or x,   σ² = κ |w|² + ε

for each group of entries, as a layer norm has it for each row and a batch norm for each channel:

    argmin  ρ |x' − x|² + W |f(x') − z|²

The mean of `x` stays, and of `z` nothing but what is orthogonal to it counts. With `w' = s u`,
`|u| = 1`, it is

    argmin  ρ |s u − w|² + W |a g(s) u − z|²,   g(s) = s / (κ s² + ε)^½

whose best direction for a length `s` is that of `ρ s w + W a g(s) z`: one number for each group is
looked for. All that is computed for a group are `|w|²` and what the request has along `w` and
across it; the move is a multiple of each. No difference is formed of numbers that are nearly equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.projections import scaling


@dataclass(frozen=True)
class NormalForm:
    """Which normalisation it is.

    **Attributes:**

    - `shape`: of the operand, some of its axes split in several.
    - `axes`: of this shape, along which a group lies.
    - `centred`: whether `w` is `x − mean(x)`.
    - `scale`, `spread`, `floor`: `a`, `κ > 0` and `ε ≥ 0`.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    centred: bool
    scale: float
    spread: float
    floor: float

    def sum(self, x: Array) -> Array:
        """Over each group, in a shape that broadcasts."""
        return jnp.sum(x, axis=self.axes, keepdims=True)

    def across(self, x: Array) -> Array:
        """`x` without its mean, where that does not count."""
        return x - jnp.mean(x, axis=self.axes, keepdims=True) if self.centred else x

    def fits(self, *weights: tuple[Any, tuple[int, ...]]) -> bool:
        """Whether weights that broadcast to operands of these shapes are the same for all of a
        group.
        """
        return all(
            jnp.ndim(weight) == 0
            or (
                self.shape == operand
                and jnp.ndim(weight) == len(operand)
                and all(jnp.shape(weight)[axis] == 1 for axis in self.axes)
            )
            for weight, operand in weights
        )


class _Group(NamedTuple):
    """What the search is about, one number for each group.

    **Attributes:**

    - `length`: `s_0 = |w|`.
    - `sigma`: `σ_0`.
    - `along`, `beyond`: of the request, along `w` and across it.
    - `ratio`: `W/ρ`.
    """

    length: Array
    sigma: Array
    along: Array
    beyond: Array
    ratio: Array


class _Point(NamedTuple):
    """The best point of one length `s`, relative to where the operand is.

    **Attributes:**

    - `slope`: half the derivative of the objective over `ρ` in `s`.
    - `steepness`: `g'(s)`.
    - `cost`: the objective over `ρ`.
    - `along`, `beyond`: of the move, along `w`, and over the request beyond it.
    - `output_along`, `output_beyond`: the same of the output.
    """

    slope: Array
    steepness: Array
    cost: Array
    along: Array
    beyond: Array
    output_along: Array
    output_beyond: Array


def largest_gain(form: NormalForm, operand: Array) -> Array:
    """`‖J‖²` of the group where it is largest: `(a/σ)²`."""
    w = form.across(operand.reshape(form.shape))
    return form.scale**2 / _squared_sigma(form, jnp.min(form.sum(jnp.square(w))))


class _Request(NamedTuple):
    """Where the operand is, and what is asked of the output there.

    **Attributes:**

    - `w`: `x − mean(x)`, or `x`.
    - `squared`: `|w|²` of each group.
    - `request`: `z − f(x)` without its mean where that does not count, in the unit.
    - `height`: `f(x) − f(x_ref)`; None for 0.
    """

    w: Array
    squared: Array
    request: Array
    height: Array | None


def _request(
    form: NormalForm, operand: Array, deviation: Array | None, target: Array, exponent: Any
) -> _Request:
    w = form.across(operand.reshape(form.shape))
    request = target.reshape(form.shape)
    height = None
    if deviation is not None:
        step = form.across(deviation.reshape(form.shape))
        height = _rise(form, w, step, exponent)
        w = w + scaling.from_unit(step, exponent)
        request = request - height
    return _Request(w, form.sum(jnp.square(w)), form.across(request), height)


def step(
    form: NormalForm,
    operand: Array,
    deviation: Array | None,
    weight: Any,
    target: Array,
    target_weight: Any,
    exponent: Any = 0,
) -> tuple[Array, Array]:
    """One step towards `argmin ρ |x' − x|² + W |f(x') − z|²`: the solution of the linearised
    problem, shorter where it would leave the place that `f` is nearly linear in.

    With `J = (a/σ)(1 − κ w wᵀ/σ²)` it is `W J R / (ρ + W J²)`, by a number for what the request `R`
    has along `w` and one for what it has across it.

    **Arguments:**

    - `form`: the normalisation.
    - `operand`: the reference `x_ref`.
    - `deviation`: `x − x_ref`, in a unit of `2**−exponent`, like all deviations; None for 0.
    - `weight`, `target_weight`: `ρ > 0` and `W ≥ 0`, the same for all of a group.
    - `target`: `z − f(x_ref)`.

    **Returns:** the deviations of `x'` and of `f(x')` from the reference.
    """
    at = _request(form, operand, deviation, target, exponent)
    a, dtype = form.scale, target.dtype
    ratio = jnp.asarray(target_weight, dtype) / jnp.asarray(weight, dtype)
    per_sigma = lax.rsqrt(_squared_sigma(form, at.squared))
    bent = form.spread * jnp.square(per_sigma)
    across = a * per_sigma  # J across w, and along it
    along = across * form.floor * jnp.square(per_sigma)
    stiffness = 1 + ratio * jnp.square(along)
    share = ratio * across / (1 + ratio * jnp.square(across))
    share_along = ratio * along / stiffness
    product = form.sum(at.request * at.w)
    # The difference of the two shares over |w|², without the difference.
    bend = share * bent * (1 - ratio * along * across) / stiffness * product
    # How far the move goes, against the lengths over which J and σ change; outwards, `f` hardly
    # follows.
    outwards = scaling.from_unit(jnp.maximum(share * product, 0), exponent)
    lengthens = scaling.from_unit(share_along * product, exponent)
    size = form.sum(jnp.square(share * scaling.from_unit(at.request, exponent)))
    reach = bent * (size + 2 * outwards) + jnp.square(4 * bent * lengthens)
    shorter = lax.rsqrt(1 + reach)
    move = (shorter * share) * at.request - (shorter * bend) * at.w
    output = _rise(form, at.w, move, exponent)
    if at.height is not None:
        output = output + at.height
    move = move.reshape(operand.shape)
    moved = move if deviation is None else deviation + move
    return moved, output.reshape(target.shape)


def project(
    form: NormalForm,
    operand: Array,
    deviation: Array,
    weight: Any,
    target: Array,
    target_weight: Any,
) -> tuple[Array, Array]:
    """`argmin ρ |x' − x|² + W |f(x') − z|²`: the nearest point.

    **Arguments, returns:** those of `step`, in a unit of 1.
    """
    dtype = target.dtype
    reference, squared, request, height = _request(form, operand, deviation, target, 0)
    length = jnp.sqrt(squared)
    per_length = 1 / jnp.where(length > 0, length, 1)
    along = form.sum(request * reference) * per_length
    # The part beyond, in units of the largest entry, whose square might underflow.
    largest = jnp.max(jnp.abs(request), axis=form.axes, keepdims=True)
    largest = jnp.where(largest > 0, largest, 1)
    beyond = form.sum(jnp.square((request - along * per_length * reference) / largest))
    beyond = largest * jnp.sqrt(beyond)
    ratio = jnp.asarray(target_weight, dtype) / jnp.asarray(weight, dtype)
    group = _Group(length, jnp.sqrt(_squared_sigma(form, squared)), along, beyond, ratio)
    found = _best(form, group)

    def combined(first: Array, second: Array) -> Array:
        # Along `w`, and what the request has beyond it.
        first = (first - second * along) * per_length
        return first * reference + second * request

    move = combined(found.along, found.beyond)
    output = combined(found.output_along, found.output_beyond)
    if height is not None:
        output = output + height
    return deviation + move.reshape(operand.shape), output.reshape(target.shape)


def _squared_sigma(form: NormalForm, squared: Array) -> Array:
    return form.spread * squared + form.floor


def _rise(form: NormalForm, w: Array, step: Array, exponent: Any) -> Array:
    real = scaling.from_unit(step, exponent)
    here = jnp.sqrt(_squared_sigma(form, form.sum(jnp.square(w))))
    there = jnp.sqrt(_squared_sigma(form, form.sum(jnp.square(w + real))))
    # σ² grows by this, in the unit.
    growth = form.spread * form.sum(step * (2 * w + real))
    return form.scale * (step / there - w * (growth / (here * there * (here + there))))


def _at(form: NormalForm, group: _Group, change: Array) -> _Point:
    """The best point whose length has changed by so much."""
    a = form.scale
    before, sigma, ratio = group.length, group.sigma, group.ratio
    length = jnp.maximum(before + change, 0)
    there = jnp.sqrt(_squared_sigma(form, jnp.square(length)))
    steepness = form.floor / (there * there * there)
    # Of the direction, over `ρ s`: `pull` along `w`, and `push` for each unit of the request.
    push = ratio * a / there
    pull = before + a * push * (before / sigma)
    forward = pull + push * group.along
    aside = push * group.beyond
    size = jnp.hypot(forward, aside)
    moves = (before > 0) & (size > 0)
    safe = jnp.where(moves, size, 1)
    cosine = jnp.where(moves, forward / safe, 0)
    # Of the unit vector: what it loses along `w`, and has for each unit of request.
    lost = -jnp.square(aside) / (safe * jnp.where(forward >= 0, safe + forward, safe))
    lost = jnp.where(forward >= 0, lost, cosine - 1)
    lost = jnp.where(moves, lost, 0)
    aside_share = jnp.where(moves, push / safe, 0)
    beyond = length * aside_share
    # A group whose entries are all equal moves as the request has it.
    flat = (before <= 0) & (group.beyond > 0)
    beyond = jnp.where(flat, change / jnp.where(flat, group.beyond, 1), beyond)
    sine = jnp.where(flat, 1, aside / safe)
    total = length + before
    mixed = length * sigma + before * there
    mean = jnp.where(mixed > 0, total / jnp.where(mixed > 0, mixed, 1), 1 / sigma)
    height = form.floor * change * mean / (there * sigma)  # of g
    along = change * cosine + before * lost
    output_along = a * (height * cosine + (before / sigma) * lost)
    output_beyond = a * beyond / there
    miss = output_along - group.along
    across = (output_beyond - 1) * group.beyond
    # Over `ρ`: `s − u·w` and `a g' (a g − u·z)`.
    slope = change - before * lost + ratio * a * steepness * (
        a * height - a * (before / sigma) * lost - group.along * cosine - sine * group.beyond
    )  # fmt: skip
    cost = (
        jnp.square(along)
        + jnp.square(beyond * group.beyond)
        + ratio * (jnp.square(miss) + jnp.square(across))
    )
    return _Point(slope, steepness, cost, along, beyond, output_along, output_beyond)


#: Samples of the length, and Newton steps from the best of them.
_SAMPLES, _STEPS = 129, 24


def _best(form: NormalForm, group: _Group) -> _Point:
    """The best point of all lengths."""

    def at(change: Array) -> tuple[Array, _Point]:
        change = jnp.maximum(change, -group.length)
        return change, _at(form, group, change)

    def lower(a: tuple[Array, _Point], b: tuple[Array, _Point]) -> tuple[Array, _Point]:
        better = b[1].cost < a[1].cost
        best = _Point(*(jnp.where(better, y, x) for x, y in zip(a[1], b[1], strict=True)))
        return jnp.where(better, b[0], a[0]), best

    # A better point is not farther than this: `ρ |w' − w|² ≤ W |f(w) − z|²`.
    reach = jnp.sqrt(group.ratio) * jnp.hypot(group.along, group.beyond)

    def sample(count: Any, best: tuple[Array, _Point]) -> tuple[Array, _Point]:
        place = 2 * count / (_SAMPLES - 1) - 1
        return lower(best, at(reach * place * jnp.abs(place)))

    def descend(_: Any, best: tuple[Array, _Point]) -> tuple[Array, _Point]:
        change, point = best
        # Gauss' curvature: of both squares, without what the direction turns.
        way = -point.slope / (1 + group.ratio * jnp.square(form.scale * point.steepness))
        for _ in range(5):
            best = lower(best, at(change + way))
            way = 0.3 * way
        return best

    found = lax.fori_loop(0, _SAMPLES, sample, at(jnp.zeros_like(group.length)))
    return lax.fori_loop(0, _STEPS, descend, found)[1]


__all__ = ["NormalForm", "largest_gain", "project", "step"]
