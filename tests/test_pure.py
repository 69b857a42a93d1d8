"""Pure projection in layers: scale-free moves, averages, extrapolation; profiles of a solve."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics, solvers
from pjax.extrapolation import minimise_convex
from pjax.projections import losses
from tests.selection import mostly_slow
from tests.test_displacement import assert_close, make_mlp, mlp, mlp_loss, smooth_params, tied

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
    stiffness so many rows of the input, and no search for the length.
    """
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(20, 6)))
    y = jax.nn.one_hot(rng.integers(0, 3, 20), 3, dtype=x.dtype)
    params = {"w": jnp.asarray(rng.normal(size=(6, 3))), "b": jnp.zeros(3)}
    metric = metrics.Curved(parameters=5.0, iterations=40, prox_step=0.1)
    optimizer = pjax.optim.CyclicProjections(splitting="layer", metric=metric, extrapolate=False)

    def loss(p):
        return jnp.mean(pjax.cross_entropy(x @ p["w"] + p["b"], y))

    problem = optimizer.problem(loss, params)
    found = moves_of(optimizer, loss, params)
    logits = x @ params["w"] + params["b"]
    request = losses.cross_entropy(logits, jnp.zeros_like(logits), y, 0.1 * 20)
    # The bound on the input's gain is that of the power iteration.
    gains = (problem._slot_gains[i] for i in problem.graph.nodes[2].slots)
    gain = next(g for g in gains if jnp.ndim(g) == 0)
    data = np.concatenate([np.asarray(x), np.ones((20, 1))], axis=1)
    stiffness = np.diag([float(gain) * 5 / 20] * 6 + [5.0])
    best = np.linalg.solve(data.T @ data + stiffness, data.T @ np.asarray(request))
    np.testing.assert_allclose(found["w"], best[:-1], rtol=1e-6)
    np.testing.assert_allclose(found["b"], best[-1], rtol=1e-6)


def test_the_size_of_a_hidden_request_is_a_share_of_the_layers_output(x64):
    """Without damping a hidden layer does what it is asked for: it moves by `request/L` of its
    size.
    """
    params, x, y = make_mlp(0, 2, rows=8, width=32)
    params["w"][0] = jnp.asarray(np.random.default_rng(5).normal(size=(12, 32)))
    metric = metrics.Curved(parameters=1e-9, iterations=60, request=0.6)
    optimizer = pjax.optim.CyclicProjections(splitting="layer", metric=metric, extrapolate=False)
    moves = moves_of(optimizer, lambda p: mlp_loss(p, x, y), params)
    before = x @ params["w"][0] + params["b"][0]
    moved = x @ moves["w"][0] + moves["b"][0]
    ratio = jnp.linalg.norm(moved) / jnp.linalg.norm(before)
    np.testing.assert_allclose(ratio, 0.6 / 3, rtol=1e-3)


@pytest.mark.parametrize("depth", mostly_slow([1, 3], [1]))
def test_moves_do_not_depend_on_units(x64, depth):
    """A sum or a mean, a repeated batch, and inputs in other units (with weights to match) lead to
    the same networks.
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


def test_an_update_lowers_the_loss_of_its_batch():
    """Also from saturated logits and tiny inputs."""
    for scale in (1e-2, 1.0, 1e2):
        params, x, y = make_mlp(3, 3)
        x = scale * x
        before = float(mlp_loss(params, x, y))
        new, residual = OPTIMIZER.update(lambda p, x=x, y=y: mlp_loss(p, x, y), params)
        assert float(mlp_loss(new, x, y)) < before
        assert float(residual.loss) == pytest.approx(before, rel=1e-5)


@pytest.mark.slow
def test_updates_lower_the_loss_of_shared_weights_and_two_free_operands():
    params, x, y = smooth_params()
    params = {"w": params["w"], "b": params["b"][:1], "square": params["square"]}
    start = float(tied(params, x, y))
    for _ in range(10):
        params, _ = OPTIMIZER.update(lambda p: tied(p, x, y), params)
    assert float(tied(params, x, y)) < 0.5 * start


def test_the_average_follows_the_iterates(x64):
    """`x ← x + c (z − x)`: with a large exponent the average is the iterate, and state is kept."""
    params, x, y = make_mlp(4, 1)

    def loss(p):
        return mlp_loss(p, x, y)

    plain, _ = OPTIMIZER.update(loss, params)
    state = OPTIMIZER.init(loss, params)
    first, _, state = OPTIMIZER.update(loss, params, state)
    # The first mean is the first iterate; carried vectors only sharpen the bounds on the gains.
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=0.1 * float(jnp.max(jnp.abs(b))))
    assert max(float(jnp.max(jnp.abs(o))) for o in state.offset if o is not None) < 1e-12
    second, _, state = OPTIMIZER.update(loss, first, state)
    exponent = OPTIMIZER.averaging
    assert exponent is not None
    share = (exponent + 1) / (exponent + 2)
    for before, after, ahead in zip(
        jax.tree.leaves(first), jax.tree.leaves(second), state.offset, strict=True
    ):
        np.testing.assert_allclose(ahead, (1 - share) / share * (after - before), rtol=1e-5)
    assert int(state.count) == 2
    rest, _, _ = OPTIMIZER.update(loss, second, OPTIMIZER.init(loss, second), relaxation=0.0)
    assert_close(rest, second, 1e-12)


@pytest.mark.parametrize("centre", [0.0, 1e-4, 0.7, 1e3])
def test_the_line_search_finds_the_least_value(x64, centre):
    """Of functions with and without curvature along the way; 0 where they only rise."""
    for value in (
        lambda t: (t - centre) ** 2,
        lambda t: jnp.logaddexp(0.0, t - centre) + jnp.logaddexp(0.0, centre - t),
    ):
        found = float(minimise_convex(value))
        assert found == pytest.approx(centre, rel=1e-2, abs=1e-6)
    assert float(minimise_convex(lambda t: t + t**2)) == 0


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
