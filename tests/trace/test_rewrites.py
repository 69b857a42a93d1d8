"""Equations in another form: which nodes come out, and that the values stay the same."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pjax
from pjax.graph import build_graph
from pjax.program import REGISTRATIONS
from pjax.projections import numeric
from pjax.rules import ArrayFunction
from pjax.trace import trace
from tests.selection import mostly_slow


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, Y = normal(0, 12, 5), jax.nn.one_hot(jnp.arange(12) % 3, 3)


def numbers():
    return {"w": normal(1, 5, 4) / 2, "b": normal(2, 4) / 2, "s": 1 + normal(3, 4) / 4}


def loss_with(function):
    """The error of `function(x, s)`, of a hidden layer `x` and a parameter `s`."""

    def loss(p):
        return pjax.squared_error(function(X @ p["w"] + p["b"], p["s"]), X[:, :4]).mean()

    return loss


def operations(loss, splitting, params=None):
    program, *_ = trace(loss, numbers() if params is None else params)
    return [n for n in build_graph(program, splitting).nodes if n.kind == "operation"]


def names(loss, splitting="layer", params=None):
    return [node.name for node in operations(loss, splitting, params)]


# --- Factors of one value stand together ---------------------------------------------------------


def flax_norm(x, scale):
    mean = jnp.mean(x, -1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) * scale
    return (x - mean) * factor


@pytest.mark.parametrize("splitting", ["layer", "neuron"])
@pytest.mark.parametrize(
    "function",
    [
        flax_norm,
        lambda x, s: s * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * x,
        lambda x, s: (x * s) / jnp.linalg.norm(x, axis=-1, keepdims=True),
        lambda x, s: x * (s / jnp.sqrt(1 + jnp.sum(x**2, -1, keepdims=True))),
    ],
)
def test_a_scaled_norm_is_a_function_of_rows_and_a_product(function, splitting):
    found = operations(loss_with(function), splitting)
    (norm,) = [node for node in found if isinstance(node.rule, ArrayFunction)]
    (product,) = found[found.index(norm) + 1 :]
    assert product.name == "mul"
    assert isinstance(norm.rule, ArrayFunction)
    assert norm.rule.rows.output == (0,)
    assert len(norm.slots) == 1
    assert len(product.slots) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda r: nnx.LayerNorm(4, rngs=r),
        lambda r: nnx.RMSNorm(4, rngs=r),
        lambda r: nnx.GroupNorm(4, 2, rngs=r),
        lambda r: nnx.InstanceNorm(4, rngs=r),
        lambda r: nnx.BatchNorm(4, use_fast_variance=False, rngs=r),
    ],
)
def test_norms_of_flax_are_one_function_and_a_layer(make):
    model = make(nnx.Rngs(0))
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    images = X.reshape(12, 5, 1) * jnp.linspace(0.5, 1.5, 4)

    def loss(p):
        out = nnx.merge(definition, p["model"], rest, copy=True)(images + p["shift"])
        return pjax.squared_error(out, jnp.ones_like(out)).mean()

    program, *_ = trace(loss, {"model": params, "shift": jnp.zeros((5, 4))})
    found = [n for n in build_graph(program, "layer").nodes if n.kind == "operation"]
    assert [type(n.rule).__name__ for n in found] == ["Affine", "NormalizationStep", "LayerSum"]


def test_factors_that_others_read_stay():
    def both(x, s):
        factor = jnp.exp(-jnp.abs(x)) * s
        return jnp.tanh(x) * factor + factor

    loss = loss_with(both)
    value, _ = pjax.value_and_displacement(loss)(numbers())
    np.testing.assert_allclose(value, loss(numbers()), rtol=1e-6)
    # The product of `exp` and `s` is one value with two readers.
    assert names(loss).count("mul") == 1


def test_auxiliary_outputs_read_what_was_there():
    def loss(p):
        x = X @ p["w"] + p["b"]
        factor = jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * p["s"]
        return pjax.squared_error(x * factor, jnp.ones((12, 4))).mean(), factor

    (_, factor), _ = pjax.value_and_displacement(loss, has_aux=True)(numbers())
    np.testing.assert_allclose(factor, loss(numbers())[1], rtol=1e-6)


def test_a_rule_of_a_user_for_products_is_kept(monkeypatch):
    before = names(loss_with(flax_norm))
    monkeypatch.setitem(REGISTRATIONS, jax.lax.mul_p, 1)
    assert len(names(loss_with(flax_norm))) > len(before)


# --- Quotients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", ["layer", "neuron"])
def test_a_quotient_of_two_values_is_a_product_with_a_reciprocal(splitting):
    loss = loss_with(lambda x, s: x / s)
    found = operations(loss, splitting)
    assert [n.name for n in found][-2:] == ["div", "mul"]
    # The reciprocal is of the four numbers, not of their copies in twelve rows.
    program, *_ = trace(loss, numbers())
    assert program.shape(found[-2].output) == (4,)


def test_a_reciprocal_is_projected_to_the_nearest_point(x64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=80) + np.sign(rng.normal(size=80))
    target, rho, weight = rng.normal(size=80), 0.2 + rng.random(80), 0.2 + rng.random(80)
    moved, output = numeric.scalar(
        lambda v: 1 / v, jnp.asarray(x), 1 / jnp.asarray(x), jnp.zeros(80), jnp.asarray(rho),
        jnp.asarray(target), jnp.asarray(weight),
    )  # fmt: skip
    there = x + moved
    np.testing.assert_allclose(1 / x + output, 1 / there, rtol=1e-8)
    cost = rho * np.square(moved) + weight * np.square(output - target)
    for i in range(80):
        # All points nearer than the start, on both sides of the pole.
        reach = np.sqrt(weight[i] / rho[i]) * abs(target[i])
        grid = x[i] + reach * np.linspace(-1, 1, 20001)
        there = rho[i] * (grid - x[i]) ** 2 + weight[i] * (1 / grid - 1 / x[i] - target[i]) ** 2
        assert cost[i] <= there.min() * (1 + 1e-6) + 1e-9


# --- Choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("splitting", ["layer", "neuron"])
@pytest.mark.parametrize(
    "choose",
    [
        lambda x, s: jnp.where(x >= 0, x, s * x),
        lambda x, s: jnp.where(x > 0, s * x, x * s**2),
        lambda x, s: jnp.where(x > 0.5, s * (x - 0.5), 0.0),
    ],
)
def test_a_choice_by_one_value_with_slopes_of_others(choose, splitting):
    loss = loss_with(choose)
    found = operations(loss, splitting)
    assert all(n.rule is not None for n in found)
    limit = pjax.metrics.Spectral(activations=1e6, prox_step=1e-6)
    value, moved = pjax.value_and_displacement(loss, metric=limit)(numbers())
    expected, gradient = jax.jit(jax.value_and_grad(loss))(numbers())
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for key in gradient:
        np.testing.assert_allclose(moved[key], gradient[key], rtol=1e-3, atol=1e-5)


def test_a_choice_between_unrelated_values_has_the_gradient_in_the_limit(x64):
    """The condition rests, as it does for a gradient."""

    def loss(p):
        x = X @ p["w"] + p["b"]
        chosen = jnp.where(x > 0, p["s"] ** 2 + p["b"], x)
        return pjax.squared_error(chosen, jnp.ones((12, 4))).mean()

    limit = pjax.metrics.Spectral(activations=1e8, prox_step=1e-8)
    moved, gradient = pjax.displacement(loss, metric=limit)(numbers()), jax.grad(loss)(numbers())
    for key in gradient:
        np.testing.assert_allclose(moved[key], gradient[key], rtol=1e-6, atol=1e-9)


# --- Axes of `vmap`, and shapes that come and go -------------------------------------------------


def test_means_over_a_named_axis_are_reductions():
    def centre(row):
        return row - jax.lax.pmean(row, "batch") + jax.lax.pmax(row, "batch")

    def named(x, s):
        return jax.vmap(centre, axis_name="batch")(x) * s

    def plain(x, s):
        return (x - x.mean(0) + x.max(0)) * s

    assert names(loss_with(named)) == names(loss_with(plain))
    np.testing.assert_allclose(
        pjax.value_and_displacement(loss_with(named))(numbers())[1]["w"],
        pjax.value_and_displacement(loss_with(plain))(numbers())[1]["w"],
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip


def test_a_convolution_of_equinox_under_vmap_is_one_layer():
    conv = eqx.nn.Conv2d(2, 3, 2, key=jax.random.key(0))
    params, static = eqx.partition(conv, eqx.is_inexact_array)
    images = normal(1, 4, 2, 5, 5)

    def loss(p):
        out = jax.vmap(eqx.combine(p, static))(images)
        return pjax.squared_error(out, jnp.ones_like(out)).mean()

    assert names(loss, params=params) == ["layer"]


def test_conversions_to_the_same_type_are_no_operation():
    weak = jnp.full((5, 4), 0.3)  # of weak type, so that `x @ weak` converts it
    params = {**numbers(), "w": weak}
    assert names(loss_with(lambda x, s: x * s), params=params) == ["layer", "mul"]


# --- Training ------------------------------------------------------------------------------------


class Norms(nnx.Module):
    def __init__(self, norm, rngs):
        self.first = nnx.Linear(6, 16, rngs=rngs)
        self.norm = norm(rngs)
        self.last = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@pytest.mark.parametrize("way", mostly_slow(["displacement", "projection"], ["displacement"]))
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda r: nnx.LayerNorm(16, rngs=r), id="layer", marks=pytest.mark.slow),
        pytest.param(lambda r: nnx.BatchNorm(16, rngs=r), id="batch"),
        pytest.param(lambda r: nnx.RMSNorm(16, rngs=r), id="rms", marks=pytest.mark.slow),
        pytest.param(lambda r: nnx.GroupNorm(16, 4, rngs=r), id="group", marks=pytest.mark.slow),
    ],
)
def test_training_through_the_norms_of_flax(make, way):
    definition, params, rest = nnx.split(Norms(make, nnx.Rngs(0)), nnx.Param, ...)

    def batch(seed, rows=64):
        x = normal(seed, rows, 6)
        return x, jax.nn.one_hot(jnp.argmax(x @ normal(6, 6, 3), -1), 3)

    def loss(p, x, y):
        logits = nnx.merge(definition, p, rest, copy=True)(x)
        return jnp.mean(pjax.cross_entropy(logits, y))

    held_out = batch(100, 256)
    first = float(loss(params, *held_out))
    if way == "displacement":
        optimizer = optax.adam(1e-2)
        state = optimizer.init(params)
        direction = pjax.value_and_displacement(loss)

        @jax.jit
        def step(params, state, x, y):
            _, moved = direction(params, x, y)
            updates, state = optimizer.update(moved, state, params)
            return optax.apply_updates(params, updates), state

        for number in range(30):
            params, state = step(params, state, *batch(number))
    else:
        projections = pjax.optim.CyclicProjections(splitting="layer")
        for number in range(10):
            x, y = batch(number)
            params, _ = projections.update(lambda p, x=x, y=y: loss(p, x, y), params)
    assert float(loss(params, *held_out)) < 0.6 * first
