"""Parameters in sets: after each update in every way of training, and as a part of a solve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from sklearn.isotonic import IsotonicRegression

import pjax
from pjax import sets
from pjax.lab.data import batch_rows, load

#: Sets for `w1`, `b1` and `w2`.
SETS: Any = (
    (sets.Nonnegative(), sets.Simplex(), sets.Ball(0.5, "spectral")),
    (sets.Sphere(1.0, axis=0), sets.Sparse(3), sets.LowRank(1)),
    (sets.LinearEqualities(jnp.ones(4), 1.0, axis=0), sets.Box(-0.1, 0.1), sets.Signs()),
)
OPTIMISERS = {
    "projection": pjax.optim.Projection(),
    "alternating": pjax.optim.AlternatingProjections(4),
    "cyclic": pjax.optim.CyclicProjections(2),
    "Douglas-Rachford": pjax.optim.DouglasRachford(4),
    "alternating, layers": pjax.optim.AlternatingProjections(2, splitting="layer"),
    "Douglas-Rachford, layers": pjax.optim.DouglasRachford(3, splitting="layer"),
}


def task():
    x = jax.random.normal(jax.random.key(0), (16, 4))
    y = jax.nn.one_hot((x[:, 0] > x[:, 1]).astype(int), 2)
    params = {
        "w1": jax.random.normal(jax.random.key(1), (4, 8)) / 2,
        "b1": jnp.zeros(8),
        "w2": jax.random.normal(jax.random.key(2), (8, 2)) / 3,
    }
    return params, x, y


def loss(params, x, y):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return jnp.mean(pjax.cross_entropy(hidden @ params["w2"], y))


def run(optimiser, params, x, y, updates, state=None) -> Iterator[Any]:
    """Parameters after each update."""
    if isinstance(optimiser, pjax.optim.Projection):
        state = optimiser.init(loss, params, x, y) if state is None else state
        for _ in range(updates):
            params, state, _ = optimiser.update(loss, params, state, x, y)
            yield params, state
    else:
        for _ in range(updates):
            params, _ = optimiser.update(lambda p: loss(p, x, y), params)
            yield params, None


@pytest.mark.parametrize("method", OPTIMISERS)
@pytest.mark.parametrize("number", range(len(SETS)))
def test_parameters_are_in_their_sets_after_each_update(method, number):
    params, x, y = task()
    chosen = dict(zip(params, SETS[number], strict=True))
    optimiser = replace(OPTIMISERS[method], sets=chosen)
    found = [after for after, _ in run(optimiser, params, x, y, 2)]
    for after in found:
        for name, one in chosen.items():
            assert float(one.distance(after[name])) <= 1e-6, name
    first, last = found
    assert any(not np.array_equal(last[name], first[name]) for name in params)


@pytest.mark.parametrize("method", ["projection", "Douglas-Rachford", "alternating, layers"])
def test_training_in_a_set_lowers_the_loss(method):
    params, x, y = task()
    one = sets.Nonnegative()
    start = sets.project({"w1": one, "b1": None, "w2": None}, params)
    optimiser = replace(OPTIMISERS[method], sets={"w1": one, "b1": None, "w2": None})
    *_, (after, _) = run(optimiser, start, x, y, 8)
    assert loss(after, x, y) < 0.7 * loss(start, x, y)


def test_a_solver_finds_a_point_of_the_set_and_not_a_clipped_one():
    """Two equations for four numbers that are to be at least 0: one of many solutions is."""
    x = jnp.array([[1.0, -1.0, 2.0, 0.5], [0.5, 1.0, -1.0, 1.0]])
    y = x @ jnp.array([2.0, 0.0, 0.3, 0.0])
    params = {"w": jnp.array([-3.0, -1.0, 1.0, -2.0])}

    def error(params):
        return jnp.sum(pjax.squared_error(x @ params["w"], y))

    def solved(chosen):
        optimiser = pjax.optim.DouglasRachford(400, prox_step=1e4, sets=chosen)
        return optimiser.update(error, params)[0]

    found, free = solved({"w": sets.Nonnegative()}), solved(None)
    assert np.all(np.asarray(found["w"]) >= 0)
    assert error(found) < 1e-6
    assert error(free) < 1e-6
    clipped = jax.tree.map(lambda w: jnp.maximum(w, 0), free)
    assert error(clipped) > 1e-3


def test_the_consensus_is_projected_in_the_weights_of_the_readers():
    """A kernel whose ends are read less often than its middle, since there is padding."""
    signal = jax.random.normal(jax.random.key(0), (1, 1, 4))
    params = {"k": jnp.array([0.5, -0.2, 0.1])}

    def error(params):
        kernel = params["k"].reshape(1, 1, 3)
        out = jax.lax.conv_general_dilated(signal, kernel, (1,), [(1, 1)])
        return jnp.sum(pjax.squared_error(out, jnp.ones_like(out)))

    one = sets.Monotone()
    optimiser = pjax.optim.AlternatingProjections(1, fanout="exact", sets={"k": one})
    problem = optimiser.problem(error, params)
    (node,) = problem.graph.parameters
    group = next(g for g, nodes in enumerate(problem.layout.groups) if node.index in nodes)
    state = problem.project(1 - group, problem.initial())
    free = params["k"] + problem._consensus.targets([node.index], state)[node.index]
    after = problem.project(group, state)
    (moved,) = problem.parameter_deviations(after)
    assert np.any(np.diff(np.asarray(free)) < 0)
    # The padding leaves the first and the last entry without a reader once.
    place = np.arange(3)
    oracle = IsotonicRegression().fit(place, np.asarray(free), [3, 4, 3]).predict(place)
    equal = IsotonicRegression().fit_transform(place, np.asarray(free))
    assert moved is not None
    np.testing.assert_allclose(params["k"] + moved, oracle, atol=1e-6)
    assert np.max(np.abs(oracle - equal)) > 1e-4


def test_a_transformation_for_optax():
    params, x, y = task()
    for found in SETS:
        chosen = dict(zip(params, found, strict=True))
        optimiser = optax.chain(optax.adam(0.05), sets.keep(chosen))

        @jax.jit
        def step(params, state, optimiser=optimiser):
            updates, state = optimiser.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        after, state = params, optimiser.init(params)
        for _ in range(3):
            after, state = step(after, state)
            for name, one in chosen.items():
                assert float(one.distance(after[name])) <= 1e-6, name
    with pytest.raises(ValueError, match="needs the parameters"):
        sets.keep(chosen).update(params, ())


@pytest.mark.parametrize("number", range(len(SETS)))
def test_an_interrupted_run_is_in_its_sets_and_goes_on(tmp_path, number):
    """Bit for bit, from a checkpoint of Orbax."""
    params, x, y = task()
    chosen = dict(zip(params, SETS[number], strict=True))
    optimiser = pjax.optim.Projection(sets=chosen)

    def assert_inside(params):
        for name, one in chosen.items():
            assert float(one.distance(params[name])) <= 1e-6, name

    whole = [after for after, _ in run(optimiser, params, x, y, 4)]
    kept = params, optimiser.init(loss, params, x, y)

    def interrupts(params, x, y):
        raise KeyboardInterrupt

    for fn in (loss, loss, interrupts):
        try:
            kept = optimiser.update(fn, *kept, x, y)[:2]
        except KeyboardInterrupt:
            break
        assert_inside(kept[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kept", jax.tree.leaves(kept))
    with ocp.StandardCheckpointer() as checkpointer:
        fresh = params, optimiser.init(loss, params, x, y)
        leaves = checkpointer.restore(tmp_path / "kept", jax.tree.leaves(fresh))
    kept, state = jax.tree.unflatten(jax.tree.structure(fresh), leaves)
    assert_inside(kept)
    rest = [after for after, _ in run(optimiser, kept, x, y, 2, state)]
    for after, expected in zip(rest, whole[2:], strict=True):
        assert_inside(after)
        for name in params:
            np.testing.assert_array_equal(after[name], expected[name])


def test_masks_averages_and_displacements():
    params, x, y = task()
    one = sets.Nonnegative()
    optimiser = pjax.optim.Projection(
        sets=one, mask={"w1": True, "b1": True, "w2": False}, averaging=8.0
    )
    state = optimiser.init(loss, params, x, y)
    after, new, _ = optimiser.update(loss, params, state, x, y)
    assert np.all(np.asarray(after["w1"]) >= 0)
    np.testing.assert_array_equal(after["w2"], params["w2"])
    assert np.all(np.asarray(optimiser.average(after, new)["w1"]) >= 0)
    moved, _, _ = optimiser.displacement(loss, params, state, x, y)
    np.testing.assert_allclose(params["w1"] - moved["w1"], after["w1"], atol=1e-6)


def test_inside_of_a_module():
    model = eqx.nn.Linear(4, 2, key=jax.random.key(0))
    _, x, y = task()

    def of_model(model, x, y):
        return jnp.mean(pjax.cross_entropy(jax.vmap(model)(x), y))

    optimiser = pjax.optim.Projection(sets=sets.Box(-0.1, 0.1))
    state = optimiser.init(of_model, model, x, y)
    after, _, _ = optimiser.update(of_model, model, state, x, y)
    assert float(jnp.max(jnp.abs(after.weight))) <= 0.1 + 1e-7


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"w1": sets.Signs()}, ValueError, "no prefix of `params`"),
        ({"w1": 3.0, "b1": None, "w2": None}, TypeError, r"params\['w1'\].*got 3.0"),
        (sets.LowRank(1), ValueError, r"params\['b1'\].*holds matrices"),
        ({"w1": sets.Sparse(9, 0), "b1": None, "w2": None}, ValueError, "have 4 entries"),
    ],
)
def test_errors_name_the_parameter(chosen, error, message):
    params, x, y = task()
    optimiser = pjax.optim.DouglasRachford(1, sets=chosen)
    with pytest.raises(error, match=message):
        optimiser.update(lambda p: loss(p, x, y), params)


def autoencoder_error(params, x):
    hidden = jax.nn.relu(x @ params["in"])
    return jnp.mean(pjax.squared_error(hidden @ params["out"], x))


def test_a_nonnegative_autoencoder_learns():
    """Its inputs have a large mean: the nearest point of a free move is not a good one there."""
    parts = jax.random.uniform(jax.random.key(0), (4, 20)) ** 4
    x = jax.random.uniform(jax.random.key(1), (256, 4)) @ parts
    params = {
        "in": jax.random.uniform(jax.random.key(2), (20, 6)) / 5,
        "out": jax.random.uniform(jax.random.key(3), (6, 20)) / 5,
    }
    one = sets.Nonnegative()
    optimiser = pjax.optim.Projection(sets=one)
    state, after = optimiser.init(autoencoder_error, params, x), params
    for _ in range(150):
        after, state, _ = optimiser.update(autoencoder_error, after, state, x)
    found = float(autoencoder_error(after, x))
    mean = float(jnp.mean(jnp.sum((x - x.mean(0)) ** 2, -1)) / 2)
    assert float(one.distance(after["in"])) == float(one.distance(after["out"])) == 0
    assert found < 0.2 * mean


def test_digits_explained_by_parts():
    """Rows that were not trained with; without sets 0.80 is explained at best."""
    digits = load("digits")
    x, rows = jnp.asarray(digits.train.x), jnp.asarray(digits.validation.x)
    params = {
        "in": jnp.abs(jax.random.normal(jax.random.key(0), (64, 16))) / 8,
        "out": jnp.abs(jax.random.normal(jax.random.key(1), (16, 64))) / 4,
    }
    spread = float(jnp.mean(jnp.sum((rows - x.mean(0)) ** 2, -1)) / 2)
    for one, least in ((sets.Nonnegative(), 0.65), (sets.Box(-0.1, 0.3), 0.76)):
        optimiser = pjax.optim.Projection(sets=one)
        state, after = optimiser.init(autoencoder_error, params, x[:128]), params
        for number, own in zip(range(200), batch_rows(len(x), 128, seed=0), strict=False):
            after, state, _ = optimiser.update(
                autoencoder_error, after, state, x[own],
                relaxation=0.5 * (1 + np.cos(np.pi * number / 200)),
            )  # fmt: skip
        assert max(float(one.distance(w)) for w in after.values()) <= 1e-6
        assert 1 - float(autoencoder_error(after, rows)) / spread > least


def test_one_solve_is_enough_where_inputs_have_a_large_mean():
    """Most directions are a thousand times softer than that of the mean."""
    from scipy.optimize import nnls

    from pjax.training.within import minimum

    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(40, 8)) + 10.0
    wanted = rng.normal(size=8) + 0.3
    right = matrix @ wanted
    moments = jnp.asarray(matrix.T @ matrix)
    largest = jnp.asarray(np.linalg.eigvalsh(matrix.T @ matrix)[-1])
    found = minimum(
        sets.Nonnegative(), jnp.zeros(8), jnp.asarray(wanted), lambda x: moments @ x, largest
    )
    _, least = nnls(matrix, right)
    assert np.linalg.norm(matrix @ np.asarray(found) - right) < 1.1 * least


def test_a_solve_over_a_set_ends_at_the_least_squares_of_the_set():
    """Nonnegative least squares, by another library."""
    from scipy.optimize import nnls

    from pjax.training.within import minimum

    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(30, 5)) + 1.0
    right = rng.normal(size=30)
    moments = jnp.asarray(matrix.T @ matrix)
    target = jnp.asarray(np.linalg.lstsq(matrix, right, rcond=None)[0])
    largest = jnp.asarray(np.linalg.eigvalsh(matrix.T @ matrix)[-1])
    found = jnp.zeros(5)
    for _ in range(10):
        found = minimum(sets.Nonnegative(), found, target, lambda x: moments @ x, largest)
    wanted, least = nnls(matrix, right)
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    clipped = np.maximum(np.asarray(target), 0)
    assert np.linalg.norm(matrix @ clipped - right) > 1.01 * least
