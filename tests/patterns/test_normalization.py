"""Normalisations: nearest points against brute force, steps, and which functions are recognised."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx

from pjax.graph import build_graph
from pjax.projections import normalization
from pjax.projections.normalization import NormalForm
from pjax.rules import (
    ArrayFunction,
    ArrayStep,
    Geometry,
    Normalization,
    NormalizationStep,
    Reference,
)
from pjax.trace import trace
from tests.selection import mostly_slow


def form_of(rows, size, centred=True, scale=1.0, spread=None, floor=1e-5):
    spread = 1 / size if spread is None else spread
    return NormalForm((rows, size), (1,), centred, scale, spread, floor)


FORMS = {
    "layer norm": {},
    "large floor": {"floor": 0.5},
    "rms norm": {"centred": False, "floor": 1e-2},
    "length": {"centred": False, "spread": 1.0, "floor": 0.0},
    "scaled": {"scale": -3.0, "spread": 0.7, "floor": 0.1},
}


def value(form, x):
    """The function itself, in NumPy."""
    w = x - x.mean(-1, keepdims=True) if form.centred else x
    return form.scale * w / np.sqrt(form.spread * np.sum(w * w, -1, keepdims=True) + form.floor)


# --- Nearest points ------------------------------------------------------------------------------


def least(form, x, z, rho, weight, rng):
    """The least objective that descents from many points find."""

    def cost(point):
        return rho * np.sum((point - x) ** 2) + weight * np.sum((value(form, point) - z) ** 2)

    reach = np.sqrt(weight / rho) * np.linalg.norm(value(form, x) - z)
    starts = [x, *(x + reach * rng.normal(size=(4, x.size)) / np.sqrt(x.size))]
    # Near the mean, where the function turns fastest, and far along the request.
    starts += [x.mean() + t * (z - z.mean() * form.centred) for t in (1e-4, 0.3, 1.0)]
    return min(scipy.optimize.minimize(cost, s, tol=1e-12).fun for s in starts)


@pytest.mark.parametrize(
    ("name", "size"),
    mostly_slow(
        [(name, size) for name in FORMS for size in (2, 3, 8)],
        [("layer norm", 3), ("rms norm", 2), ("scaled", 8), ("length", 3)],
    ),
)
def test_the_projection_is_the_nearest_point(x64, name, size):
    form, rng = form_of(1, size, **FORMS[name]), np.random.default_rng(size)
    for case in range(4):
        reference = rng.normal(size=(1, size)) * 10.0 ** rng.integers(-2, 2)
        deviation = rng.normal(size=(1, size)) * 10.0 ** rng.integers(-4, 1)
        target = rng.normal(size=(1, size)) * 10.0 ** rng.integers(-4, 1)
        rho, weight = np.exp(rng.normal(size=2))
        base = value(form, reference)
        moved, output = normalization.project(
            form, jnp.asarray(reference), jnp.asarray(deviation), rho, jnp.asarray(target), weight
        )
        there = value(form, reference + moved)
        np.testing.assert_allclose(base + output, there, rtol=1e-9, atol=1e-11)
        cost = rho * np.sum((moved - deviation) ** 2) + weight * np.sum((output - target) ** 2)
        best = least(form, (reference + deviation)[0], (base + target)[0], rho, weight, rng)
        assert cost <= best * (1 + 1e-6) + 1e-12, (case, cost, best)


def test_a_group_whose_entries_are_equal(x64):
    """Nothing has a direction there, and the request gives one."""
    form = form_of(1, 4, floor=0.01)
    reference, zero = jnp.full((1, 4), 3.0), jnp.zeros((1, 4))
    target = jnp.asarray([[0.5, -0.5, 0.2, 0.0]])
    moved, output = normalization.project(form, reference, zero, 1.0, target, 2.0)
    cost = jnp.sum(moved**2) + 2 * jnp.sum((output - target) ** 2)
    best = least(form, np.full(4, 3.0), np.asarray(target[0]), 1.0, 2.0, np.random.default_rng(0))
    assert cost <= best * (1 + 1e-6)
    moved, output = normalization.step(form, reference, zero, 1.0, target, 2.0)
    assert jnp.sum(moved**2) + 2 * jnp.sum((output - target) ** 2) < 2 * jnp.sum(target**2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("floor", [1e-5, 0.5])
@pytest.mark.parametrize("centred", [True, False])
def test_a_step_is_never_worse_than_where_it_begins(x64, dtype, floor, centred):
    """Of any size and direction: requests to grow and to shrink, and weights far apart."""
    rng, rows = np.random.default_rng(0), 4000

    def sized(low, high):
        return 10.0 ** rng.uniform(low, high, (rows, 1))

    for size in (2, 5, 40):
        form = form_of(rows, size, centred, floor=floor)
        x = rng.normal(size=(rows, size)) * sized(-4, 2)
        deviation = rng.normal(size=(rows, size)) * sized(-4, 1)
        here = value(form, x + deviation)
        request = rng.normal(size=(rows, size)) * sized(-4, 4)
        outwards = here * sized(-2, 4) * rng.choice([-1, 1], (rows, 1))
        request += np.where(rng.random((rows, 1)) < 0.5, outwards, 0)
        target = here - value(form, x) + request
        weight = sized(-4, 4)
        x, deviation, target, weight = (
            np.asarray(v, dtype) for v in (x, deviation, target, weight)
        )  # fmt: skip
        moved, output = normalization.step(
            form, *map(jnp.asarray, (x, deviation, np.ones((rows, 1), dtype), target, weight))
        )
        x, deviation, target, moved = (
            np.asarray(v, np.float64) for v in (x, deviation, target, moved)
        )  # fmt: skip
        start = value(form, x + deviation) - value(form, x)
        end = value(form, x + moved) - value(form, x)
        before = weight[:, 0] * np.sum((start - target) ** 2, -1)
        after = np.sum((moved - deviation) ** 2, -1)
        after = after + weight[:, 0] * np.sum((end - target) ** 2, -1)
        rounding = 1e-9 if dtype == np.float64 else 1e-4
        assert np.all(after <= before * (1 + rounding) + rounding**2)
        if dtype == np.float64:
            np.testing.assert_allclose(output, end, atol=1e-8)


@pytest.mark.parametrize("exponent", [0, 90.0])
@pytest.mark.parametrize("name", FORMS)
def test_a_small_step_solves_the_linearised_problem(name, exponent):
    """Also in a unit in which the moves are far below the rounding of the operand."""
    form = form_of(3, 6, **FORMS[name])
    x = jax.random.normal(jax.random.key(0), (3, 6))
    target = 1e-4 * jax.random.normal(jax.random.key(1), (3, 6))
    rho, weight = 2.0, 0.7
    moved, output = normalization.step(form, x, None, rho, target, weight, exponent)
    for row in range(3):
        x64, z64 = (np.asarray(v[row], np.float64) for v in (x, target))
        step = 1e-6 * np.eye(6)
        one = form_of(1, 6, **FORMS[name])
        slope = (value(one, x64 + step) - value(one, x64 - step)).T / 2e-6
        best = np.linalg.solve(rho * np.eye(6) + weight * slope.T @ slope, weight * slope.T @ z64)
        size = np.max(np.abs(best))
        np.testing.assert_allclose(moved[row], best, atol=1e-3 * size)
        np.testing.assert_allclose(output[row], slope @ best, atol=2e-3 * np.max(slope @ best))


@pytest.mark.parametrize("name", FORMS)
def test_the_gain_is_that_of_the_group_where_it_is_largest(x64, name):
    form = form_of(4, 5, **FORMS[name])
    x = np.random.default_rng(0).normal(size=(4, 5)) * np.asarray([[1.0], [0.3], [2.0], [0.5]])
    one = form_of(1, 5, **FORMS[name])

    def row(v):
        w = v - jnp.mean(v) if one.centred else v
        return one.scale * w / jnp.sqrt(one.spread * jnp.sum(w * w) + one.floor)

    norms = [np.linalg.norm(jax.jacobian(row)(jnp.asarray(v)), 2) for v in x]
    np.testing.assert_allclose(normalization.largest_gain(form, jnp.asarray(x)), max(norms) ** 2)


# --- Which functions are normalisations ----------------------------------------------------------

X = jax.random.normal(jax.random.key(0), (4, 6, 8))
W = {"w": jax.random.normal(jax.random.key(1), (8, 8))}


def found(function):
    """The rules of rows in `function` behind a layer."""
    program, *_ = trace(lambda p: jnp.mean(jnp.square(function(X @ p["w"]) - 1)), W)
    nodes = build_graph(program, "layer").nodes
    return [n.rule for n in nodes if isinstance(n.rule, ArrayFunction)]


def flax(make):
    def apply(x):
        definition, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
        return nnx.merge(definition, params, rest, copy=True)(x)

    return apply


def equinox(module):
    return jax.vmap(jax.vmap(module))


def mean(x):
    return jnp.mean(x, -1, keepdims=True)


ROWS, FLOOR = (4, 6, 8), 1e-5
RECOGNISED = {
    "flax layer norm": (flax(lambda r: nnx.LayerNorm(8, rngs=r)), (ROWS, (2,), True, 1 / 8, 1e-6)),
    "flax layer norm, slow variance": (
        flax(lambda r: nnx.LayerNorm(8, use_fast_variance=False, rngs=r)),
        (ROWS, (2,), True, 1 / 8, 1e-6),
    ),
    "flax rms norm": (flax(lambda r: nnx.RMSNorm(8, rngs=r)), (ROWS, (2,), False, 1 / 8, 1e-6)),
    "flax group norm": (
        flax(lambda r: nnx.GroupNorm(8, 2, rngs=r)),
        ((4, 6, 2, 4), (1, 3), True, 1 / 24, 1e-6),
    ),
    "flax instance norm": (
        flax(lambda r: nnx.InstanceNorm(8, rngs=r)),
        (ROWS, (1,), True, 1 / 6, 1e-6),
    ),
    "flax batch norm": (
        flax(lambda r: nnx.BatchNorm(8, rngs=r)),
        (ROWS, (0, 1), True, 1 / 24, 1e-5),
    ),
    "equinox layer norm": (equinox(eqx.nn.LayerNorm(8)), (ROWS, (2,), True, 1 / 8, FLOOR)),
    "equinox rms norm": (equinox(eqx.nn.RMSNorm(8)), (ROWS, (2,), False, 1 / 8, FLOOR)),
    "equinox group norm": (
        equinox(eqx.nn.GroupNorm(2, 8)),
        ((4, 6, 2, 4), (3,), True, 1 / 4, FLOOR),
    ),
    "standardize": (jax.nn.standardize, (ROWS, (2,), True, 1 / 8, 1e-5)),
    "by variance": (
        lambda x: (x - mean(x)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5),
        (ROWS, (2,), True, 1 / 8, FLOOR),
    ),
    "unbiased, by a power": (
        lambda x: (x - mean(x)) * (x.var(-1, keepdims=True, ddof=1) + 1e-5) ** -0.5,
        (ROWS, (2,), True, 1 / 7, FLOOR),
    ),
    "length": (
        lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
        (ROWS, (2,), False, 1.0, 0.0),
    ),
    "mean of squares": (
        lambda x: x / jnp.sqrt(mean(x * x) + 0.25),
        (ROWS, (2,), False, 1 / 8, 0.25),
    ),
    "all at once": (
        lambda x: (x - x.mean()) * jax.lax.rsqrt(x.var() + 1e-5),
        (ROWS, (0, 1, 2), True, 1 / 192, FLOOR),
    ),
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_normalisations_are_recognised(name):
    function, (shape, axes, centred, spread, floor) = RECOGNISED[name]
    (rule,) = found(function)
    assert isinstance(rule, Normalization)
    form = rule.form
    assert (form.shape, form.axes, form.centred, form.scale) == (shape, axes, centred, 1.0)
    np.testing.assert_allclose((form.spread, form.floor), (spread, floor), rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", RECOGNISED)
def test_the_form_is_the_function(name):
    function, _ = RECOGNISED[name]
    (rule,) = found(function)
    assert isinstance(rule, Normalization)
    form, x = rule.form, X.reshape(rule.form.shape)
    w = x - jnp.mean(x, form.axes, keepdims=True) if form.centred else x
    size = form.spread * jnp.sum(w * w, form.axes, keepdims=True) + form.floor
    made = function(X).reshape(form.shape)
    np.testing.assert_allclose(made, form.scale * w / jnp.sqrt(size), rtol=2e-5, atol=2e-5)


NOT = {
    "a floor under the root": lambda x: (x - mean(x)) / (jnp.std(x, -1, keepdims=True) + 1e-5),
    "a bounded length": lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-3),
    "variance without the mean": lambda x: (x - mean(x)) / jnp.sqrt(mean(x * x) + 1e-5),
    "mean and variance of other groups": lambda x: (
        (x - mean(x)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)
    ),
    "half of the mean": lambda x: (x - 0.5 * mean(x)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5),
    "a constant is added": lambda x: (x + 1) / jnp.sqrt(mean(x * x) + 1e-5),
    "the sum of entries": lambda x: x / (2 + jnp.sin(mean(x))),
    "softmax": jax.nn.softmax,
    "groups in another order": lambda x: (
        (x.swapaxes(0, 1).reshape(4, 6, 8)) / jnp.sqrt(mean(x * x) + 1e-5)
    ),
}


@pytest.mark.parametrize("name", NOT)
def test_what_is_no_normalisation(name):
    assert not any(isinstance(rule, Normalization) for rule in found(NOT[name]))


@pytest.mark.parametrize("layers", [True, False])
def test_weights_that_differ_in_a_group_take_the_general_way(layers):
    (rule,) = found(RECOGNISED["mean of squares"][0])
    assert isinstance(rule, Normalization)
    form = rule.form
    kinds = (ArrayStep, NormalizationStep) if layers else (ArrayFunction, Normalization)
    plain = kinds[0](rule.function, rule.name, rule.rows)
    rule = kinds[1](rule.function, rule.name, rule.rows, form=form)
    target = 0.1 * jax.random.normal(jax.random.key(2), X.shape)
    gain = normalization.largest_gain(form, X)
    reference = Reference(
        (X,), (), rule.function((X,), ()), geometry=Geometry(0, (gain,), (False,), 1)
    )
    state = (jnp.zeros_like(X),)
    uneven = jnp.arange(8.0).reshape(1, 1, 8) + jnp.zeros_like(X)
    for chosen in (rule, plain):
        moved, output = chosen.project(reference, state, (1.0,), target, uneven)
        if chosen is rule:
            first = moved[0], output
    np.testing.assert_array_equal(first[0], moved[0])
    np.testing.assert_array_equal(first[1], output)
    # The same for all of a group, in the shape of the operand's rows: the closed form.
    rows = jnp.arange(1.0, 7.0).reshape(1, 6, 1) + jnp.zeros((4, 6, 1))
    closed, general = (r.project(reference, state, (1.0,), target, rows) for r in (rule, plain))
    cost = [
        jnp.sum(m[0] ** 2, -1) + jnp.sum(rows * (o - target) ** 2, -1) for m, o in (closed, general)
    ]
    assert jnp.all(cost[0] <= cost[1] * (1 + 1e-4))
