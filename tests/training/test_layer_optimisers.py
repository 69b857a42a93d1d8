"""The solvers' optimisers in layers: the metric, units, training; profiles of a solve."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics, solvers
from pjax.problem import Problem
from pjax.projections import losses
from pjax.projections.gains import MARGIN
from pjax.trace import trace
from tests.networks import assert_close, make_mlp, mlp, mlp_loss, smooth_params, tied
from tests.selection import mostly_slow

SOLVERS = {
    "cyclic": solvers.CyclicProjections,
    "alternating": solvers.AlternatingProjections,
    "douglas-rachford": solvers.DouglasRachford,
    "cyclic douglas-rachford": solvers.CyclicDouglasRachford,
    "difference map": solvers.DifferenceMap,
    "reflections": lambda steps: solvers.AlternatingReflections(steps, relaxation=0.5),
}


def moves_of(optimizer, fn, params):
    new, _ = optimizer.update(fn, params)
    return jax.tree.map(jnp.subtract, new, params)


OPTIMIZER = pjax.optim.CyclicProjections(splitting="layer")


def test_a_layer_is_the_ridge_regression_of_its_request(x64):
    """One layer: `argmin |X δW + δb − R|² + ρ_w |δW|² + ρ_b |δb|²` with R what the prox asks, the
    stiffness so many rows of the input.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 6)))
    y = jax.nn.one_hot(rng.integers(0, 3, 20), 3, dtype=x.dtype)
    params = {"w": jnp.asarray(rng.normal(size=(6, 3))), "b": jnp.zeros(3)}
    metric = metrics.Spectral(parameters=5.0, iterations=40, prox_step=2.0)
    optimizer = pjax.optim.CyclicProjections(1, splitting="layer", metric=metric)

    def loss(p):
        return jnp.mean(pjax.cross_entropy(x @ p["w"] + p["b"], y))

    problem = optimizer.problem(loss, params)
    found = moves_of(optimizer, loss, params)
    logits = x @ params["w"] + params["b"]
    request = losses.cross_entropy(logits, jnp.zeros_like(logits), y, 2.0)
    # The bound on the input's gain is that of the power iteration.
    gains = (problem.gains[i] for i in problem.graph.nodes[2].slots)
    gain = next(g for g in gains if jnp.ndim(g) == 0)
    data = np.concatenate([np.asarray(x), np.ones((20, 1))], axis=1)
    stiffness = np.diag([float(gain) * 5 / 20] * 6 + [5.0])
    best = np.linalg.solve(data.T @ data + stiffness, data.T @ np.asarray(request))
    np.testing.assert_allclose(found["w"], best[:-1], rtol=1e-6)
    np.testing.assert_allclose(found["b"], best[-1], rtol=1e-6)


@pytest.mark.parametrize("depth", mostly_slow([1, 3], [1]))
def test_moves_do_not_depend_on_units(x64, depth):
    """A sum or a mean, and inputs in other units (with weights to match), lead to the same
    networks.
    """
    params, x, y = make_mlp(1, depth)
    moves = moves_of(OPTIMIZER, lambda p: mlp_loss(p, x, y), params)
    total = moves_of(OPTIMIZER, lambda p: jnp.sum(pjax.cross_entropy(mlp(p, x), y)), params)
    assert_close(total, moves, 1e-9)
    scaled = {"w": [params["w"][0] / 100, *params["w"][1:]], "b": params["b"]}
    other = moves_of(OPTIMIZER, lambda p: mlp_loss(p, 100 * x, y), scaled)
    other["w"][0] = 100 * other["w"][0]
    assert_close(other, moves, 1e-6)


def test_a_masked_row_takes_no_part(x64):
    params, x, y = make_mlp(2, 2)
    mask = (jnp.arange(24) % 4 > 0).astype(x.dtype)
    kept = moves_of(
        OPTIMIZER,
        lambda p: jnp.sum(mask * pjax.cross_entropy(mlp(p, x), y)) / jnp.sum(mask),
        params,
    )
    noise = jnp.where(mask[:, None] > 0, y, jnp.roll(y, 1, axis=1))
    again = moves_of(
        OPTIMIZER,
        lambda p: jnp.sum(mask * pjax.cross_entropy(mlp(p, x), noise)) / jnp.sum(mask),
        params,
    )
    assert_close(again, kept, 1e-12)


@pytest.mark.slow
def test_updates_lower_the_loss_of_shared_weights_and_two_free_operands():
    params, x, y = smooth_params()
    params = {"w": params["w"], "b": params["b"][:1], "square": params["square"]}
    start = float(tied(params, x, y))
    for _ in range(10):
        params, _ = OPTIMIZER.update(lambda p: tied(p, x, y), params)
    assert float(tied(params, x, y)) < 0.5 * start


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_more_steps_never_hurt(x64, name):
    """On a net of 8 layers: by step, what every node misses does not grow, and the direction in
    every parameter stays that of descent.
    """
    params, x, y = make_mlp(5, 8)
    metric = metrics.Spectral()
    gradient = jax.tree.leaves(jax.jit(jax.grad(mlp_loss))(params, x, y))
    levels = 2 * 8 + 4
    cosines = []
    for steps in (levels, 3 * levels):
        solver = SOLVERS[name](steps)
        found = pjax.displacement(mlp_loss, solver=solver, metric=metric)(params, x, y)
        cosines.append(
            min(
                float(jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b)))
                for a, b in zip(jax.tree.leaves(found), gradient, strict=True)
            )
        )
    assert cosines[1] > 0.9
    assert cosines[1] > cosines[0] - 0.05
    problem = pjax.feasibility_problem(
        mlp_loss,
        params,
        x,
        y,
        splitting="layer",
        metric=metric,
        grouping=solver.grouping,
        reflecting=solver.reflecting,
    )
    seen = pjax.profile(problem, solver)
    assert seen.residual.shape == (3 * levels, len(problem.graph.nodes))
    assert np.isfinite(seen.residual).all()
    assert np.isfinite(seen.deviation).all()
    total = np.linalg.norm(seen.residual, axis=1)
    assert total[-1] <= 1.05 * total[levels]


def test_a_profile_of_means_of_copies_is_refused():
    params, x, y = make_mlp(5, 1)
    problem = pjax.feasibility_problem(mlp_loss, params, x, y)
    with pytest.raises(ValueError, match="needs the copies of operands"):
        pjax.profile(problem, solvers.AlternatingProjections(2))


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        [
            "CyclicProjections",
            "AlternatingProjections",
            "DouglasRachford",
            "CyclicDouglasRachford",
            "DifferenceMap",
            "AlternatingReflections",
        ],
        ["CyclicProjections"],
    ),
)
def test_every_optimiser_learns_with_layers(name):
    """A state of one number per entry, whatever the solver; the loss on the batch falls."""
    params, x, y = make_mlp(6, 2)
    options = {"relaxation": 0.5} if name == "AlternatingReflections" else {}
    optimizer = getattr(pjax.optim, name)(splitting="layer", **options)
    problem = optimizer.problem(lambda p: mlp_loss(p, x, y), params)
    assert problem.sizes().stored == problem.sizes().edge_variables
    state = jax.eval_shape(problem.initial)
    in_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert problem.sizes().bytes == in_bytes
    before = float(mlp_loss(params, x, y))
    for _ in range(10):
        params, _ = optimizer.update(lambda p: mlp_loss(p, x, y), params)
    assert float(mlp_loss(params, x, y)) < 0.7 * before


def test_a_state_begins_where_power_iterations_end(x64):
    """Two more steps, those of a batch, are then enough for a bound."""
    params, x, y = make_mlp(2, 3)

    def loss(p):
        return mlp_loss(p, x, y)

    program, leaves, consts, _ = trace(loss, params)
    state = OPTIMIZER.init(loss, params)
    begun = Problem(OPTIMIZER.layout(program), leaves, consts, state.vectors)
    metric = metrics.Spectral(parameters=1.0, power_iterations=60)
    many = pjax.optim.CyclicProjections(splitting="layer", metric=metric).problem(loss, params)
    compared = 0
    for node in begun.graph.nodes:
        if not node.slots:
            continue
        gains = [begun.gains[i] for i in node.slots]
        best = [many.gains[i] for i in node.slots]
        for gain, limit in zip(gains, best, strict=True):
            if isinstance(gain, jax.Array) and gain.ndim == 0:
                assert float(limit) / MARGIN <= float(gain) <= float(limit) * (1 + 1e-9)
                compared += 1
    assert compared >= 7


def test_parameters_that_all_rest_are_an_error():
    params, x, y = make_mlp(7, 1)
    optimizer = pjax.optim.CyclicProjections(splitting="layer", metric=metrics.Spectral())
    with pytest.raises(ValueError, match=r"pjax\.optim\.Projection"):
        optimizer.update(lambda p: mlp_loss(p, x, y), params)


@pytest.mark.parametrize("name", ["extrapolate", "averaging"])
def test_options_that_are_gone_name_what_to_use(name):
    with pytest.raises(TypeError, match=r"pjax\.optim\.Projection"):
        pjax.optim.CyclicProjections(splitting="layer", **{name: None})
