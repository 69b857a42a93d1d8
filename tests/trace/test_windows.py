"""Reductions over windows: the values of `jax.lax`, nearest points, and no needless copies."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pjax
from pjax import metrics
from pjax.graph import build_graph
from pjax.trace import trace
from tests.selection import mostly_slow

REDUCTIONS = {
    "max": (lax.max, -jnp.inf),
    "min": (lax.min, jnp.inf),
    "sum": (lax.add, 0.0),
}
WINDOWS = {
    "side by side": ((1, 2, 2, 1), (1, 2, 2, 1), "VALID", {}),
    "overlapping": ((1, 3, 2, 1), (1, 2, 1, 1), "SAME", {}),
    "padded": ((1, 3, 3, 1), (1, 1, 2, 1), ((0, 0), (2, 1), (1, 1), (0, 0)), {}),
    "with a rest": ((1, 3, 3, 1), (1, 3, 3, 1), "VALID", {}),
    "global": ((1, 5, 7, 1), (1, 1, 1, 1), "VALID", {}),
    "skipping": ((1, 1, 2, 1), (1, 3, 3, 1), "VALID", {}),
    "dilated": ((1, 2, 3, 1), (1, 1, 2, 1), "VALID", {"window_dilation": (1, 3, 2, 1)}),
    "base": ((1, 2, 2, 1), (1, 1, 1, 1), "VALID", {"base_dilation": (1, 2, 3, 1)}),
    "negative padding": ((1, 2, 2, 1), (1, 2, 1, 1), ((0, 0), (-1, 0), (1, -2), (0, 0)), {}),
}
SHAPE = (2, 5, 7, 3)


def pooled(x, name, window):
    operation, start = REDUCTIONS[name]
    size, stride, padding, rest = WINDOWS[window]
    return lax.reduce_window(x, start, operation, size, stride, padding, **rest)


OFTEN = [("max", "overlapping"), ("max", "padded"), ("min", "side by side"), ("sum", "dilated")]


@pytest.mark.parametrize(
    ("name", "window"), mostly_slow(itertools.product(REDUCTIONS, WINDOWS), OFTEN)
)
def test_the_graph_has_the_values_of_the_operation_and_no_nan(x64, name, window):
    """In both splittings, with solvers that project and that reflect."""
    if window == "base" and name != "sum":
        # A window that holds nothing but padding has an infinite maximum, in JAX too.
        pytest.skip("its windows are empty")
    rng = np.random.default_rng(0)
    params = {"x": jnp.asarray(rng.normal(size=SHAPE))}
    expected = pooled(params["x"], name, window)
    target = jnp.asarray(rng.normal(size=expected.shape))

    def loss(p):
        return pjax.squared_error(pooled(p["x"], name, window), target).sum()

    problem = pjax.feasibility_problem(loss, params)
    np.testing.assert_allclose(problem.loss, loss(params), rtol=1e-12)
    for optimizer in (
        pjax.optim.AlternatingProjections(steps_per_update=3),
        pjax.optim.CyclicProjections(steps_per_update=3),
        pjax.optim.DouglasRachford(steps_per_update=3),
        pjax.optim.CyclicProjections(splitting="layer"),
    ):
        moved, residual, _ = optimizer.update(loss, params, optimizer.init(loss, params))
        assert np.isfinite(moved["x"]).all()
        assert np.isfinite(residual)
        assert float(loss(moved)) < float(loss(params))


@pytest.mark.parametrize("window", ["side by side", "with a rest", "global"])
@pytest.mark.parametrize("name", ["max", "sum"])
def test_windows_side_by_side_are_not_copied(name, window):
    params = {"x": jnp.ones(SHAPE)}
    target = jnp.zeros(pooled(params["x"], "sum", window).shape)
    problem = pjax.feasibility_problem(
        lambda p: pjax.squared_error(pooled(p["x"], name, window), target).sum(), params
    )
    node = next(n for n in problem.graph.nodes if n.rule is not None and n.kind == "operation")
    (slot,) = (problem.graph.slots[i] for i in node.slots)
    assert np.prod(slot.shape) <= np.prod(SHAPE)
    assert not any(e.name in ("pad", "concatenate") for e in slot.route.equations)


def test_one_padded_window_is_the_nearest_point(x64):
    """Max-pooling of a border: the padding takes no part, the rest is the nearest point."""
    x, target = jnp.array([0.5, 1.0, -2.0]), jnp.array([0.2, 3.0])

    def loss(p):
        padded = lax.reduce_window(p["x"], -jnp.inf, lax.max, (2,), (2,), ((0, 1),))
        return pjax.squared_error(padded[None], target[None]).sum()

    metric = metrics.Uniform(weight=1.0, prox_step=1e12)
    problem = pjax.feasibility_problem(loss, {"x": x}, metric=metric, grouping="levels")
    state = problem.initial()
    for group in range(problem.num_groups):
        state = problem.project(group, state)
    (deviation,) = problem.parameter_deviations(state)
    assert deviation is not None
    # max(x₀, x₁) is asked to fall to 0.2, by lowering both entries that are above the level
    # that costs least; the second window has one entry, which moves half of the way.
    levels = np.linspace(0.2, 1.0, 800001)
    cost = np.maximum(0.5 - levels, 0) ** 2 + np.maximum(1.0 - levels, 0) ** 2
    level = levels[np.argmin(cost + (levels - 0.2) ** 2)]
    expected = [min(0.5, level) - 0.5, min(1.0, level) - 1.0, 2.5]
    np.testing.assert_allclose(deviation, expected, atol=2e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_running_sum_is_a_product_with_a_triangle(x64, reverse):
    rng = np.random.default_rng(1)
    params = {"x": jnp.asarray(rng.normal(size=(3, 5, 2)))}
    target = jnp.asarray(rng.normal(size=(3, 5, 2)))

    def loss(p):
        return pjax.squared_error(lax.cumsum(p["x"], 1, reverse), target).sum()

    for splitting in ("neuron", "layer"):
        problem = pjax.feasibility_problem(loss, params, splitting=splitting)
        np.testing.assert_allclose(problem.loss, loss(params), rtol=1e-12)
        optimizer = pjax.optim.CyclicProjections(splitting=splitting)
        moved, _, _ = optimizer.update(loss, params, optimizer.init(loss, params))
        assert float(loss(moved)) < float(loss(params))


def test_a_rule_of_the_user_goes_first_and_data_is_left_alone():
    """What depends on no parameter is computed by the operation itself."""
    data = jnp.ones((1, 4, 4, 1))

    def loss(p):
        pooled_data = lax.reduce_window(data, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        return pjax.squared_error(p["w"] * pooled_data, data[:, :2, :2]).sum()

    program, _, _, _ = trace(loss, {"w": jnp.ones(())})
    assert "reduce_window_max" in {e.name for e in program.equations}
    assert build_graph(program, "neuron").nodes
