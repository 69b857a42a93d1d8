"""Signs with a margin, against a search over both signs and over all multipliers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import PRECISIONS, Precision, assert_no_farther

from pjax.projections.margins import signed_number, signed_product, signed_product_of_data

REGIMES = (
    "generic", "zeros", "opposed", "equal", "ties", "huge", "tiny", "inside", "long",
    "wide weights",
)  # fmt: skip
POINTS = 300


def draw(regime, seed, length) -> Any:
    """Slices, targets, weights and a margin; all representable in float32."""
    rng = np.random.default_rng(seed)
    left, right = rng.normal(size=(2, POINTS, length))
    target = rng.normal(size=POINTS)
    margin = float(rng.choice([0.0, 0.3, 1.0, 3.0]))
    weights = 10.0 ** rng.uniform(-1, 1, (3, POINTS))
    if regime == "zeros":
        left *= rng.choice([0, 1], (POINTS, 1))
        right *= rng.choice([0, 1], (POINTS, 1))
        target *= rng.choice([0, 1], POINTS)
    elif regime in ("opposed", "equal"):  # in the weighted slices, where one has no direction
        right = left * (-1 if regime == "opposed" else 1)
        weights[:2] = 1
    elif regime == "ties":
        left, right = rng.choice([-1.0, 0.0, 1.0], (2, POINTS, length))
        target, margin = rng.choice([-1.0, 0.0, 1.0], POINTS), float(rng.choice([0, 1, 2]))
        weights[:] = 1
    elif regime == "huge":
        left, right, margin = 1e6 * left, 1e6 * right, 1e12 * margin
    elif regime == "tiny":
        left, right, margin = 1e-6 * left, 1e-6 * right, 1e-12 * margin
    elif regime == "inside":
        right = left + 0.1 * right
        target = np.abs(target)
    elif regime == "long":
        left *= 30
    elif regime == "wide weights":
        weights = 10.0 ** rng.uniform(-4, 4, (3, POINTS))
    weights[2] *= rng.choice([0, 1, 1], POINTS)
    rounded = [np.float64(np.float32(a)) for a in (left, right, target, *weights)]
    return (*rounded, float(np.float32(margin)))


def nearest_on_curve(left, right, margin, left_weight, right_weight):
    """The squared distance to `{l·r ≥ margin}`: bisection over the multiplier of the Lagrangian.

    Stationary points solve `ρₗ(l' − l) = μ r'`, `ρᵣ(r' − r) = μ l'` with `0 ≤ μ < √(ρₗρᵣ)`, and
    `l'·r'` grows with `μ`. Where it stays below the margin up to the end, `√ρₗ l = −√ρᵣ r`: what
    is left to reach is an orthogonal addition `e` to both, `|e|² √(ρₗρᵣ) = D − l'·r'`.
    """
    scale = np.sqrt(left_weight * right_weight)
    x, w = np.sqrt(left_weight)[:, None] * left, np.sqrt(right_weight)[:, None] * right
    target = margin * scale

    def at(u):  # μ = u·scale
        u = u[:, None]
        return (x + u * w) / (1 - u * u), (w + u * x) / (1 - u * u)

    def product(u):
        a, b = at(u)
        return np.sum(a * b, axis=-1)

    low, high = np.zeros(len(x)), np.full(len(x), 1 - 1e-13)
    for _ in range(200):
        middle = (low + high) / 2
        below = product(middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    a, b = at(high)
    a, b = (
        np.where((product(np.zeros(len(x))) >= target)[:, None], z, y) for z, y in ((x, a), (w, b))
    )
    distance = np.sum((a - x) ** 2 + (b - w) ** 2, axis=-1)
    # Beyond the end: p = (x + w)/√2 vanishes and m stays at half its length.
    p2, m2 = np.sum((x + w) ** 2, axis=-1) / 2, np.sum((x - w) ** 2, axis=-1) / 2
    lost = np.sqrt(2 * target + m2 / 4) - np.sqrt(p2)
    flat = lost**2 + m2 / 4
    stuck = np.sum(a * b, axis=-1) < target * (1 - 1e-9)
    return np.where(stuck, flat, distance)


def oracle(left, right, target, left_weight, right_weight, target_weight, margin):
    costs = []
    for sign in (1, -1):
        moved = nearest_on_curve(left, sign * right, margin, left_weight, right_weight)
        costs.append(moved + target_weight * (sign - target) ** 2)
    return np.minimum(*costs)


def cost_of(found: Any, left, right, target, left_weight, right_weight, target_weight):
    new_left, new_right, sign = (np.asarray(a, np.float64) for a in found)
    return (
        left_weight * np.sum((new_left - left) ** 2, -1)
        + right_weight * np.sum((new_right - right) ** 2, -1)
        + target_weight * (sign - target) ** 2
    )


def products(precision: Precision, left, right, target, *weights_and_margin) -> Any:
    *weights, margin = weights_and_margin
    arrays = [jnp.asarray(a, precision.dtype) for a in (left, right, target)]
    of_type = [jnp.asarray(weight, precision.dtype) for weight in weights]
    call: Any = signed_product
    return call(*arrays, margin, *of_type)


@pytest.mark.parametrize("precision", PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("length", [1, 3, 9])
def test_product_is_nearest(precision: Precision, regime, length):
    point = draw(regime, length, length)
    left, right, target, left_weight, right_weight, target_weight, margin = point
    with precision.context():
        found = products(precision, *point)
        assert all(np.all(np.isfinite(a)) for a in found)
        new_left, new_right, sign = (np.asarray(a, np.float64) for a in found)
        again = products(precision, new_left, new_right, sign, *point[3:])
    size = np.sum(left_weight[:, None] * left**2 + right_weight[:, None] * right**2, -1)
    scale = size / np.sqrt(left_weight * right_weight) + margin
    # In the set …
    assert np.all(np.abs(sign) == 1)
    reached = sign * np.sum(new_left * new_right, -1)
    assert np.all(reached >= margin - 50 * precision.eps * scale)
    # … nearest …
    floor = (30 * precision.eps) * (size + target_weight * (1 + np.abs(target)) ** 2)
    floor += 30 * precision.eps * margin * np.sqrt(left_weight * right_weight)
    best = oracle(*point)
    assert_no_farther(cost_of(found, *point[:6]), best, floor, 30 * precision.relative)
    # … and what is in the set stays, but for the rounding of being at its edge.
    for a, b in zip(found[:2], again[:2], strict=True):
        longest = np.sqrt(np.max(np.asarray(a, np.float64) ** 2, axis=-1, keepdims=True))
        other = np.sqrt(scale)[:, None] + longest
        assert np.all(np.abs(np.asarray(a) - np.asarray(b)) <= 2e3 * precision.eps * other)


@given(seed=st.integers(0, 2**32 - 1), regime=st.sampled_from(REGIMES))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_no_point_that_is_drawn_is_nearer(seed, regime):
    point = draw(regime, seed, 4)
    left, right, margin = point[0], point[1], point[-1]
    rng = np.random.default_rng(seed)
    with enable_x64():
        found = products(PRECISIONS[1], *point)
    own = cost_of(found, *point[:6])
    for shift in (1e-3, 1e-1, 1.0):
        base = [np.asarray(a) for a in found[:2]]
        size = np.sqrt(np.mean(left**2 + right**2, axis=-1, keepdims=True)) + margin**0.5
        others = [a + shift * size * rng.normal(size=a.shape) for a in base]
        sign = np.where(np.sum(others[0] * others[1], -1) > 0, 1.0, -1.0)
        inside = sign * np.sum(others[0] * others[1], -1) >= margin
        cost = cost_of((*others, sign), *point[:6])
        assert np.all((cost >= own * (1 - 1e-9) - 1e-15 * own.max()) | ~inside)


@pytest.mark.parametrize("precision", PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("regime", REGIMES)
def test_product_of_data_is_nearest(precision: Precision, regime):
    left, right, target, _, weight, target_weight, margin = draw(regime, 5, 4)
    with precision.context():
        arrays = [jnp.asarray(a, precision.dtype) for a in (left, right, target)]
        call: Any = signed_product_of_data
        found = call(*arrays, margin, jnp.asarray(weight), jnp.asarray(target_weight))
        assert all(np.all(np.isfinite(a)) for a in found)
    energy, product = np.sum(left**2, -1), np.sum(left * right, -1)
    costs = []
    for sign in (1, -1):
        short = np.maximum(margin - sign * product, 0)
        distance = np.where(short > 0, short**2 / np.where(energy > 0, energy, np.nan), 0)
        costs.append(weight * distance + target_weight * (sign - target) ** 2)
    best = np.minimum(*costs)
    known = np.isfinite(best)  # data of zeros reach no margin
    ones = np.ones_like(weight)
    own = cost_of(found, left, right, target, ones, weight, target_weight)
    size = weight * np.sum(right**2, -1) + target_weight * (1 + np.abs(target)) ** 2
    floor = 30 * precision.eps * size
    assert_no_farther(own[known], best[known], floor[known], 30 * precision.relative)
    assert np.all(np.asarray(found.left) == np.asarray(arrays[0]))
    stays = ~(energy > 0)
    assert np.array_equal(np.asarray(found.right)[stays], np.asarray(arrays[1])[stays])


@pytest.mark.parametrize("precision", PRECISIONS, ids=["float32", "float64"])
@pytest.mark.parametrize("regime", REGIMES)
def test_number_is_nearest(precision: Precision, regime):
    left, _, target, weight, _, target_weight, margin = draw(regime, 7, 1)
    x = left[:, 0]
    with precision.context():
        arrays = [jnp.asarray(a, precision.dtype) for a in (x, target)]
        call: Any = signed_number
        found = call(*arrays, margin, jnp.asarray(weight), jnp.asarray(target_weight))
    costs = [
        weight * np.maximum(margin - sign * x, 0) ** 2 + target_weight * (sign - target) ** 2
        for sign in (1, -1)
    ]
    new, sign = (np.asarray(a, np.float64) for a in found)
    own = weight * (new - x) ** 2 + target_weight * (sign - target) ** 2
    floor = 30 * precision.eps * (weight * x**2 + target_weight * (1 + np.abs(target)) ** 2)
    assert_no_farther(own, np.minimum(*costs), floor, 30 * precision.relative)
    assert np.all(sign * new >= margin)


def test_ties_go_to_plus_one():
    zero = jnp.zeros((1, 3))
    found = signed_product(zero, zero, jnp.zeros(1), 2.0, 1.0, 1.0, 1.0)
    assert found.sign == 1
    assert float(jnp.sum(found.left * found.right)) == pytest.approx(2.0, rel=1e-6)
    assert signed_number(jnp.zeros(1), jnp.zeros(1), 0.5, 1.0, 1.0) == (0.5, 1.0)


def test_output_decides_when_it_costs_more():
    """The sign follows the cost: `z = −1` wins over a product beyond its margin if `W` is large."""
    ones = jnp.ones((1, 4))
    signs = [
        float(signed_product(ones, ones, -jnp.ones(1), 1.0, 1.0, 1.0, weight).sign[0])
        for weight in (0.1, 100.0)
    ]
    assert signs == [1.0, -1.0]


def test_jit_and_vmap_agree():
    *arrays, left_weight, right_weight, target_weight, margin = draw("generic", 3, 5)
    arrays = [jnp.asarray(a, jnp.float32) for a in arrays]
    weights = [jnp.asarray(w, jnp.float32) for w in (left_weight, right_weight, target_weight)]

    def run(left, right, target, *weights):
        return signed_product(left, right, target, margin, *weights)

    plain = run(*arrays, *weights)
    last = [jnp.moveaxis(a, 0, -1) for a in (*arrays, *weights)]
    mapped = jax.vmap(run, in_axes=-1, out_axes=-1)(*last)
    for a, b, c in zip(plain, jax.jit(run)(*arrays, *weights), mapped, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(a, jnp.moveaxis(c, -1, 0), rtol=1e-5, atol=1e-5)
