"""`pjax.constrain`: the identity of a forward pass, and a constraint of a problem."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import sets


def task(rows=6):
    x = jax.random.normal(jax.random.key(0), (rows, 4))
    y = jax.random.normal(jax.random.key(1), (rows, 3))
    params = {
        "w1": jax.random.normal(jax.random.key(2), (4, 5)) / 2,
        "w2": jax.random.normal(jax.random.key(3), (5, 3)) / 2,
    }
    return params, x, y


def network(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def loss_in(one):
    def loss(params, x, y):
        return jnp.mean(pjax.squared_error(pjax.constrain(network(params, x), one), y))

    return loss


def test_it_is_the_identity():
    one = sets.Simplex()
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))

    def total(x):
        return jnp.sum(jnp.sin(pjax.constrain(x, one)))

    np.testing.assert_array_equal(pjax.constrain(x, one), x)
    np.testing.assert_array_equal(jax.jit(lambda x: pjax.constrain(x, one))(x), x)
    np.testing.assert_allclose(jax.grad(total)(x), jnp.cos(x), rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(total)(x[0, 0]), -jnp.diag(jnp.sin(x[0, 0])), atol=1e-6)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(lambda x: pjax.constrain(x, one)))(x), x)
    radii = jnp.arange(1.0, 3.0)
    of_each = jax.vmap(lambda x, radius: pjax.constrain(x, sets.Ball(radius)))
    np.testing.assert_array_equal(of_each(x, radii), x)


def test_violations_are_distances_by_line():
    params, x, y = task()

    def loss(params, x, y, radii):
        def of_row(row, radius):
            return pjax.constrain(network(params, row), sets.Ball(radius))

        out = jax.vmap(of_row)(x, radii)
        return jnp.mean(pjax.squared_error(pjax.constrain(out, sets.Nonnegative()), y))

    radii = jnp.linspace(0.1, 1.0, len(x))
    problem = pjax.feasibility_problem(loss, params, x, y, radii)
    out = network(params, x)
    balls = [sets.Ball(radius).distance(row) for radius, row in zip(radii, out, strict=True)]
    wanted = [jnp.linalg.norm(jnp.stack(balls)), sets.Nonnegative().distance(out)]
    found = problem.violations()
    assert [key.split(".")[-1] for key in found] == ["of_row)", "loss)"]
    assert all("test_constrain.py:" in key for key in found)
    np.testing.assert_allclose(list(found.values()), wanted, rtol=1e-5)
    # In an unrolled loop the steps are one line.

    def repeated(params, x, y):
        hidden = x
        for _ in range(3):
            hidden = pjax.constrain(hidden @ params["w"], sets.Nonnegative())
        return jnp.mean(pjax.squared_error(hidden, y))

    square = {"w": jnp.eye(4) * -1.0}
    (key,) = found = pjax.feasibility_problem(repeated, square, x, jnp.ones((6, 4))).violations()
    negative, positive = (np.linalg.norm(np.clip(s * x, 0, None)) for s in (-1, 1))
    np.testing.assert_allclose(found[key], np.sqrt(2 * positive**2 + negative**2), rtol=1e-5)


def test_a_displacement_is_the_gradient_of_a_squared_distance():
    params, x, y = task()
    step = 1e-3
    metric = pjax.metrics.Spectral(activations=1e4, prox_step=step)
    for one in (
        sets.Ball(0.5, axis=-1),
        sets.Simplex(),
        sets.LinearEqualities(jnp.ones(6), 0.0, 0),
    ):

        def penalised(params, x, y, one=one):
            out = network(params, x)
            away = out - jax.lax.stop_gradient(one.project(out))
            return loss_in(one)(params, x, y) + jnp.sum(away**2) / (2 * step * len(x))

        _, moved = pjax.value_and_displacement(loss_in(one), metric=metric)(params, x, y)
        wanted = jax.grad(penalised)(params, x, y)
        for name in params:
            np.testing.assert_allclose(
                moved[name], wanted[name], atol=2e-3 * np.max(np.abs(wanted[name]))
            )


def test_a_projection_in_the_problem_is_the_nearest_point():
    params, x, y = task()
    one = sets.Simplex()
    problem = pjax.feasibility_problem(loss_in(one), params, x, y)
    (node,) = (n for n in problem.graph.nodes if n.name == "constrain")
    (group,) = (g for g, nodes in enumerate(problem.layout.groups) if node.index in nodes)
    state = problem.project(group, problem.initial())
    out = network(params, x)
    np.testing.assert_allclose(out + state.slots[node.slots[0]], one.project(out), atol=1e-6)
    residual = problem.residuals()[f"{node.index} constrain"]
    np.testing.assert_allclose(residual, one.distance(out), rtol=1e-5)


@pytest.mark.parametrize("splitting", ["neuron", "layer"])
def test_solvers_end_nearer_to_the_set(splitting):
    params, x, y = task()
    one = sets.Nonnegative()

    def trained(loss):
        optimiser = pjax.optim.DouglasRachford(40, splitting=splitting)
        after = params
        for _ in range(4):
            after, history = optimiser.update(lambda p: loss(p, x, y), after)
        return one.distance(network(after, x)), history

    with_set, history = trained(loss_in(one))
    without, _ = trained(lambda p, x, y: jnp.mean(pjax.squared_error(network(p, x), y)))
    assert float(with_set) < 0.6 * float(without)
    assert len(history.violations) == 1


def test_pure_projection_reports_and_lowers_the_violation():
    params, x, y = task(64)
    y = y + 1.0
    one = sets.LinearEqualities(jnp.full(64, 1 / 64), 0.0, axis=0)  # each mean is to be 0
    optimiser = pjax.optim.Projection()
    state = optimiser.init(loss_in(one), params, x, y)
    after, seen = params, []
    for _ in range(60):
        after, state, info = optimiser.update(loss_in(one), after, state, x, y)
        (violation,) = info.violations.values()
        seen.append(float(violation))
    np.testing.assert_allclose(seen[0], float(one.distance(network(params, x))), rtol=1e-4)
    free = optimiser.init(loss_in(sets.Box(-9.0, 9.0)), params, x, y)
    other = params
    for _ in range(60):
        other, free, _ = optimiser.update(loss_in(sets.Box(-9.0, 9.0)), other, free, x, y)
    assert seen[-1] < 0.4 * float(one.distance(network(other, x)))


def test_a_constraint_on_a_parameter_and_one_that_nothing_reads():
    params, x, y = task()

    def loss(params, x, y):
        w = pjax.constrain(params["w1"], sets.Nonnegative())
        pjax.constrain(params["w2"], sets.Nonnegative())
        return jnp.mean(pjax.squared_error(jnp.tanh(x @ w) @ params["w2"], y))

    problem = pjax.feasibility_problem(loss, params, x, y, splitting="layer")
    assert len(problem.violations()) == 2
    _, moved = pjax.value_and_displacement(loss)(params, x, y)
    _, free = pjax.value_and_displacement(lambda p, x, y: jnp.mean(
        pjax.squared_error(network(p, x), y)))(params, x, y)  # fmt: skip
    for name in params:
        # The force towards the set, in the scale of a loss's: λ = 0.1, and six rows in a mean.
        wanted = jnp.minimum(params[name], 0) / 0.1 / 6
        np.testing.assert_allclose(moved[name] - free[name], wanted, atol=1e-5)


def test_parameters_already_in_the_set_feel_no_force():
    params, x, y = task()
    _, moved = pjax.value_and_displacement(loss_in(sets.Box(-50.0, 50.0)))(params, x, y)
    _, free = pjax.value_and_displacement(
        lambda p, x, y: jnp.mean(pjax.squared_error(network(p, x), y))
    )(params, x, y)
    for name in params:
        np.testing.assert_allclose(moved[name], free[name], rtol=1e-4, atol=1e-6)


def test_explain_lists_it():
    params, x, y = task()
    found = pjax.explain(loss_in(sets.Simplex()), params, x, y)
    (line,) = (node for node in found.nodes if node.operation == "constrain")
    assert line.exactness == "exact"
    assert not found.warnings


def test_a_new_set_of_the_same_form_compiles_nothing():
    params, x, y = task()
    optimiser = pjax.optim.Projection()

    def loss(params, x, y, radius):
        return loss_in(sets.Ball(radius))(params, x, y)

    state = optimiser.init(loss, params, x, y, 1.0)
    from pjax.training.projection import _solve

    optimiser.update(loss, params, state, x, y, jnp.array(1.0))
    before = _solve._cache_size()  # pyright: ignore
    optimiser.update(loss, params, state, x, y, jnp.array(0.5))
    assert _solve._cache_size() == before  # pyright: ignore


def test_errors():
    params, x, y = task()
    with pytest.raises(TypeError, match="needs a set of `pjax.sets`"):
        pjax.constrain(x, 3.0)
    with pytest.raises(TypeError, match="floating-point"):
        pjax.constrain(jnp.arange(3), sets.Signs())
    with pytest.raises(ValueError, match="have 3 entries"):
        loss_in(sets.Sparse(4, axis=-1))(params, x, y)
    with pytest.raises(pjax.TraceError, match=r"test_constrain.py:.*depends on the parameters"):
        pjax.value_and_displacement(lambda p, x, y: loss_in(sets.Ball(jnp.sum(p["w1"])))(p, x, y))(
            params, x, y
        )
