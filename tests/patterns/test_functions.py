"""Smooth functions, functions of rows, and operations that only the fallback handles."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.graph import build_graph
from pjax.program import TraceError
from pjax.projections import numeric
from pjax.projections.numeric import Rows
from pjax.rules import ArrayFunction
from pjax.trace import trace
from tests.selection import mostly_slow


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


X, Y = normal(0, 12, 5), jax.nn.one_hot(jnp.arange(12) % 3, 3)


def mlp_params():
    return {"w": normal(1, 5, 4) / 2, "b": normal(2, 4) / 2, "v": normal(3, 4, 3)}


def layer_norm(x):
    mean = jnp.mean(x, -1, keepdims=True)
    variance = jnp.maximum(jnp.mean(x * x, -1, keepdims=True) - mean * mean, 0)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


SCALAR = {
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "exact gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "softplus": jax.nn.softplus,
    "log sigmoid": jax.nn.log_sigmoid,
    "mish": jax.nn.mish,
    "exp": lambda x: jnp.exp(0.5 * x),
    "square": jnp.square,
    "cube": lambda x: x**3,
    "product with itself": lambda x: x * x,
    "hard swish": jax.nn.hard_swish,
    "soft sign": jax.nn.soft_sign,
    "residual": lambda x: x + jnp.tanh(x),
    "scaled": lambda x: 2 * jnp.tanh(x / 3) + 1,
    "log": lambda x: jnp.log(1 + x * x),
    "rsqrt": lambda x: jax.lax.rsqrt(1 + x * x),
    "sqrt": lambda x: jnp.sqrt(1 + x * x),
    "power": lambda x: (1 + x * x) ** 0.3,
}
ROWS = {
    "softmax": jax.nn.softmax,
    "log softmax": jax.nn.log_softmax,
    "standardize": jax.nn.standardize,
    "layer norm": layer_norm,
    "rms norm": lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5),
    "l2 normalise": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "logsumexp": lambda x: x - jax.nn.logsumexp(x, -1, keepdims=True),
    "masked softmax": lambda x: jax.nn.softmax(jnp.where(jnp.arange(4) < 3, x, -jnp.inf)),
}
COLUMNS = {
    "batch norm": lambda x: (x - x.mean(0)) / jnp.sqrt(x.var(0) + 1e-5),
}
ALL = {**SCALAR, **ROWS, **COLUMNS}


def loss_with(function, reduce=jnp.mean):
    def loss(p):
        return reduce(pjax.cross_entropy(function(X @ p["w"] + p["b"]) @ p["v"], Y))

    return loss


def nodes(loss, splitting, params=None):
    program, *_ = trace(loss, mlp_params() if params is None else params)
    return [n for n in build_graph(program, splitting).nodes if n.kind == "operation"]


@pytest.mark.parametrize("name", SCALAR)
def test_a_chain_of_scalar_functions_is_one_node(name):
    found = nodes(loss_with(SCALAR[name]), "layer")
    assert [type(n.rule).__name__ for n in found] == ["LayerSum", "ScalarStep", "LayerSum"]


@pytest.mark.parametrize("name", [*ROWS, *COLUMNS])
def test_a_function_of_rows_is_one_node(name):
    found = nodes(loss_with(ALL[name]), "layer")
    (rule,) = [n.rule for n in found if isinstance(n.rule, ArrayFunction)]
    kept = (1,) if name in COLUMNS else (0,)
    assert rule.rows == Rows((kept,), kept)


def test_exact_rules_go_before_cones():
    def pooled(p):
        hidden = jax.nn.relu(X @ p["w"] + p["b"])
        return pjax.cross_entropy(jnp.tanh(jnp.max(hidden, 0)) @ p["v"], Y[0])

    names = [n.name for n in nodes(pooled, "neuron")]
    assert names == ["dot", "sum_relu", "reduce_max", "tanh", "dot"]


def test_what_others_read_stays_a_value():
    def shared(p):
        hidden = jnp.tanh(X @ p["w"] + p["b"])
        return pjax.cross_entropy((hidden + jnp.exp(hidden)) @ p["v"] + hidden[:, :3], Y).mean()

    assert [n.name for n in nodes(shared, "layer")].count("tanh") == 1


def test_equal_functions_share_one_rule():
    def deep(p):
        h = jax.nn.gelu(X @ p["w"] + p["b"])
        h = jax.nn.gelu(h @ (p["v"] @ p["v"].T) + p["b"])
        return pjax.cross_entropy(h @ p["v"], Y).mean()

    first, second = [n.rule for n in nodes(deep, "layer") if "tanh" in n.name]
    assert first is second


OFTEN_SCALAR = ("tanh", "exact gelu", "silu", "elu", "softplus", "exp", "log", "square")
OFTEN = (
    "tanh",
    "exact gelu",
    "elu",
    "softplus",
    "softmax",
    "layer norm",
    "masked softmax",
    "batch norm",
)


@pytest.mark.parametrize("name", mostly_slow(ALL, OFTEN))
def test_the_stiff_limit_is_the_gradient(name):
    loss, params = loss_with(ALL[name]), mlp_params()
    metric = pjax.metrics.Spectral(activations=1e5, prox_step=1e-5)
    value, moved = pjax.value_and_displacement(loss, metric=metric)(params)
    expected, gradient = jax.value_and_grad(loss)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for key in params:
        scale = float(jnp.max(jnp.abs(gradient[key])))
        np.testing.assert_allclose(moved[key], gradient[key], atol=2e-3 * scale + 1e-7)


@pytest.mark.parametrize(
    ("name", "solver", "splitting"),
    [
        ("gelu", pjax.optim.AlternatingProjections, "neuron"),
        pytest.param(
            "softmax", pjax.optim.AlternatingProjections, "neuron", marks=pytest.mark.slow
        ),
        ("gelu", pjax.optim.CyclicProjections, "layer"),
        ("layer norm", pjax.optim.CyclicProjections, "layer"),
        pytest.param("batch norm", pjax.optim.CyclicProjections, "layer", marks=pytest.mark.slow),
    ],
)
def test_training_lowers_the_loss(name, solver, splitting):
    loss, params = loss_with(ALL[name]), mlp_params()
    optimizer = solver(splitting=splitting, steps_per_update=10)
    now = params
    for _ in range(10):
        now, _ = optimizer.update(loss, now)
    assert loss(now) < loss(params)


# --- Oracles -------------------------------------------------------------------------------------


def scalar_oracle(function, x, z, rho, weight):
    """The least objective on a fine grid of the interval that holds the nearest point."""
    reach = np.sqrt(weight / rho) * abs(float(function(x)) - z)
    grid = x + reach * np.linspace(-1, 1, 40001)
    values = np.asarray(jax.vmap(function)(jnp.asarray(grid)), np.float64)
    cost = rho * (grid - x) ** 2 + weight * (values - z) ** 2
    return np.nanmin(cost)


@pytest.mark.parametrize("name", mostly_slow(SCALAR, OFTEN_SCALAR))
def test_scalar_projection_is_the_nearest_point(x64, name):
    function = SCALAR[name]
    rng = np.random.default_rng(0)
    reference, deviation = rng.normal(size=60) * 2, rng.normal(size=60)
    target = rng.normal(size=60) * 2
    rho, weight = np.exp(rng.normal(size=60)), np.exp(rng.normal(size=60))
    base = function(jnp.asarray(reference))
    moved, output = numeric.scalar(
        function, jnp.asarray(reference), base, jnp.asarray(deviation), jnp.asarray(rho),
        jnp.asarray(target) - base, jnp.asarray(weight),
    )  # fmt: skip
    there = reference + moved
    np.testing.assert_allclose(base + output, function(there), rtol=1e-9, atol=1e-9)
    cost = rho * (there - reference - deviation) ** 2 + weight * (base + output - target) ** 2
    for i in range(60):
        least = scalar_oracle(function, reference[i] + deviation[i], target[i], rho[i], weight[i])
        assert cost[i] <= least * (1 + 1e-6) + 1e-9, (name, i, float(cost[i]), least)


@pytest.mark.parametrize("name", [n for n in ROWS if n != "masked softmax"])
@pytest.mark.parametrize("size", mostly_slow([2, 4, 16], [4]))
def test_row_projection_decreases_and_is_stationary(x64, name, size):
    function = ROWS[name]
    reference = normal(5, 20, size).astype(jnp.float64)
    deviation = 0.3 * normal(6, 20, size).astype(jnp.float64)
    base = function(reference)
    target = 0.3 * normal(7, 20, size).astype(jnp.float64)
    rows = Rows(((0,),), (0,))
    (moved,), output = numeric.gauss_newton(
        function, rows, (reference,), base, (deviation,), (2.0,), target, 1.5,
        outer=40, inner=16,
    )  # fmt: skip

    def objective(move):
        gap = function(reference + move) - base - target
        return 2.0 * jnp.sum((move - deviation) ** 2, -1) + 1.5 * jnp.sum(gap**2, -1)

    np.testing.assert_allclose(output, function(reference + moved) - base, atol=1e-9)
    before, after = objective(deviation), objective(moved)
    assert jnp.all(after <= before)
    slope = jax.jit(jax.grad(lambda m: jnp.sum(objective(m))))(moved)
    assert jnp.max(jnp.linalg.norm(slope, axis=-1)) < 1e-4 * jnp.max(before)
    # The least of all points of a fine grid around. Two entries, standardised, are signs: flat,
    # with a valley that no step leads to.
    if size == 2 and name not in ("standardize", "layer norm"):
        side = jnp.linspace(-2.5, 2.5, 401)
        grid = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
        for i in range(20):
            gap = function(reference[i] + deviation[i] + grid) - base[i] - target[i]
            cost = 2.0 * jnp.sum(grid**2, -1) + 1.5 * jnp.sum(gap**2, -1)
            assert after[i] <= jnp.min(cost) * (1 + 1e-6) + 1e-9


def test_rows_do_not_depend_on_each_other():
    function = jax.nn.softmax
    reference, target = normal(8, 6, 4), 0.2 * normal(9, 6, 4)
    rows, base = Rows(((0,),), (0,)), function(reference)
    zero = jnp.zeros_like(reference)
    (whole,), _ = numeric.gauss_newton(
        function, rows, (reference,), base, (zero,), (1.0,), target, 1.0
    )
    (first,), _ = numeric.gauss_newton(
        function, rows, (reference[:1],), base[:1], (zero[:1],), (1.0,), target[:1], 1.0
    )
    np.testing.assert_allclose(whole[:1], first, atol=1e-5)


@pytest.mark.parametrize("exponent", [0, 100])
def test_differences_without_cancellation(exponent):
    x = normal(10, 50)
    move = jnp.full(50, 1e-4)  # in a unit of 2**-100: far below the rounding of x
    found = numeric.difference(jnp.tanh, (x,), jnp.tanh(x), (move,), exponent)
    slope = 1 - np.tanh(np.asarray(x, np.float64)) ** 2
    np.testing.assert_allclose(found, slope * 1e-4, rtol=3e-4)


# --- The fallback --------------------------------------------------------------------------------


def test_an_operation_without_a_rule_is_an_error_unless_allowed():
    def loss(p):
        return pjax.squared_error(
            jax.lax.reduce_precision(X @ p["w"] + p["b"], 8, 20), jnp.ones((12, 4))
        ).mean()

    params = {key: mlp_params()[key] for key in "wb"}
    with pytest.raises(TraceError, match="reduce_precision.*test_functions"):
        pjax.value_and_displacement(loss)(params)
    metric = pjax.metrics.Spectral(activations=1e5, prox_step=1e-5)
    step = pjax.value_and_displacement(loss, metric=metric, fallback="gauss-newton")
    _, moved = step(params)
    gradient = jax.jit(jax.grad(loss))(params)
    scale = float(jnp.max(jnp.abs(gradient["w"])))
    np.testing.assert_allclose(moved["w"], gradient["w"], atol=2e-3 * scale)
    optimizer = pjax.optim.AlternatingProjections(
        steps_per_update=50, prox_step=0.1, fallback="gauss-newton"
    )
    assert loss(optimizer.update(loss, params)[0]) < loss(params)


def test_an_unknown_fallback_is_refused():
    with pytest.raises(ValueError, match="`fallback`"):
        pjax.value_and_displacement(loss_with(jnp.tanh), fallback="newton")(mlp_params())


@pytest.mark.parametrize("function", [jnp.tanh, jax.nn.softplus, jnp.exp])
def test_nearest_points_are_stationary_to_rounding(x64, function):
    rng = np.random.default_rng(0)
    x, deviation, target = (jnp.asarray(a) for a in rng.normal(size=(3, 500)))
    move, height = numeric.scalar(function, x, function(x), deviation, 1.0, target, 2.0)
    slope = jax.vmap(jax.grad(function))(x + move)
    gradient = move - deviation + 2 * (height - target) * slope
    np.testing.assert_allclose(gradient, 0, atol=1e-11)
