"""The paper's API: updates, what compiles once, what is refused, and how much memory a solve
takes.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import optim, solvers
from pjax.problem.layouts import LargeStateWarning
from pjax.solvers import ResidualHistory
from pjax.training import optimizer as solves
from tests.conftest import enable_x64
from tests.selection import mostly_slow

OPTIMISERS = [
    optim.AlternatingProjections,
    optim.CyclicProjections,
    optim.DouglasRachford,
    optim.CyclicDouglasRachford,
    optim.DifferenceMap,
    optim.AlternatingReflections,
]


def mlp_params(key, sizes=(6, 8, 3)):
    keys = jax.random.split(key, len(sizes) - 1)
    params = {}
    for number, (k, n_in, n_out) in enumerate(zip(keys, sizes, sizes[1:], strict=False)):
        params[f"dense{number}"] = jax.random.normal(k, (n_in, n_out)) * (2 / n_in) ** 0.5
        if number < len(sizes) - 2:
            params[f"bias{number}"] = jnp.zeros(n_out)
    return params


def mlp(params, x):
    h = jax.nn.relu(x @ params["dense0"] + params["bias0"])
    return h @ params["dense1"]


def batch(seed, rows=16):
    """Three classes, each around a centre of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, rows)
    centres = np.random.default_rng(99).normal(size=(3, 6))
    x = centres[labels] + 0.3 * rng.normal(size=(rows, 6))
    return jnp.asarray(x, jnp.float32), jax.nn.one_hot(labels, 3)


def accuracy(params, x, y):
    return float(jnp.mean(jnp.argmax(mlp(params, x), -1) == jnp.argmax(y, -1)))


@pytest.mark.parametrize("make", mostly_slow(OPTIMISERS, OPTIMISERS[:3]))
def test_learns_classes_of_fresh_batches(make):
    params = mlp_params(jax.random.key(0))
    relaxation = {"relaxation": 0.4} if make is optim.AlternatingReflections else {}
    optimizer = make(steps_per_update=20, **relaxation)
    for seed in range(8):
        x, y = batch(seed, 64)
        params, residual = optimizer.update(
            lambda p, x=x, y=y: pjax.cross_entropy(mlp(p, x), y), params
        )
        assert isinstance(residual, ResidualHistory)
        assert np.isfinite(float(residual))
    x, y = batch(1000, 500)
    assert accuracy(params, x, y) > 0.95


def compiled_solves() -> int:
    """How many solves JAX holds compiled in this process."""
    return solves._solve._cache_size()  # pyright: ignore


def test_a_hundred_fresh_closures_compile_once():
    params = mlp_params(jax.random.key(0))
    optimizer = optim.AlternatingProjections(steps_per_update=2)
    before = compiled_solves()
    for seed in range(100):
        x, y = batch(seed, 7)
        params, _ = optimizer.update(lambda p, x=x, y=y: pjax.cross_entropy(mlp(p, x), y), params)
    assert compiled_solves() == before + 1
    # Another shape is another program; a new optimiser of the same kind is not.
    x, y = batch(0, 7)
    optim.AlternatingProjections(steps_per_update=2).update(
        lambda p: pjax.cross_entropy(mlp(p, x), y), params
    )
    assert compiled_solves() == before + 1
    x, y = batch(0, 8)
    optimizer.update(lambda p: pjax.cross_entropy(mlp(p, x), y), params)
    assert compiled_solves() == before + 2


def test_numbers_that_change_compile_once_as_arrays():
    x, y = batch(0, 5)
    optimizer = optim.AlternatingProjections(steps_per_update=1)
    before = compiled_solves()
    for scale in map(jnp.asarray, (0.31, 0.62)):
        optimizer.update(lambda p, s=scale: pjax.cross_entropy(s * (x @ p), y), jnp.ones((6, 3)))
    assert compiled_solves() == before + 1


def test_the_same_inside_an_outer_jit_and_scan():
    params = mlp_params(jax.random.key(0))
    optimizer = optim.CyclicProjections(steps_per_update=3)
    xs, ys = jax.tree_util.tree_map(lambda *a: jnp.stack(a), *[batch(s) for s in range(3)])
    expected = params
    for x, y in zip(xs, ys, strict=True):
        expected, _ = optimizer.update(
            lambda p, x=x, y=y: pjax.cross_entropy(mlp(p, x), y), expected
        )

    @jax.jit
    def epoch(params, xs, ys):
        def step(params, xy):
            x, y = xy
            params, residual = optimizer.update(lambda p: pjax.cross_entropy(mlp(p, x), y), params)
            return params, residual.total[-1]

        return jax.lax.scan(step, params, (xs, ys))

    found, residuals = epoch(params, xs, ys)
    assert residuals.shape == (3,)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_vmapped_over_examples_is_the_batch():
    params = mlp_params(jax.random.key(0))
    x, y = batch(0)
    optimizer = optim.AlternatingProjections(steps_per_update=3)
    whole, _ = optimizer.update(lambda p: pjax.cross_entropy(mlp(p, x), y), params)

    def rows(p):
        return pjax.vmap(lambda x, y: pjax.cross_entropy(mlp(p, x), y))(x, y)

    by_row, _ = optimizer.update(rows, params)
    for name in params:
        np.testing.assert_allclose(by_row[name], whole[name], rtol=1e-4, atol=1e-6)
        assert float(jnp.max(jnp.abs(whole[name] - params[name]))) > 1e-4


def test_integer_and_unused_leaves_stay():
    x, y = batch(0)
    params = {
        **mlp_params(jax.random.key(0)),
        "count": jnp.arange(3),
        "key": jax.random.key(7),
        "unused": jnp.ones(2),
        "frozen": jnp.full(3, 0.5),
    }

    def fn(p):
        keep = jax.random.bernoulli(p["key"], 0.9, (16, 6))
        logits = mlp(p, jnp.where(keep, x, 0)) + jax.lax.stop_gradient(p["frozen"])
        return pjax.cross_entropy(logits, y)

    with pytest.warns(pjax.UnusedParameterWarning, match=r"unused"):
        new, _ = optim.AlternatingProjections(3).update(fn, params)
    np.testing.assert_array_equal(new["count"], params["count"])
    np.testing.assert_array_equal(new["unused"], params["unused"])
    np.testing.assert_array_equal(new["frozen"], params["frozen"])
    assert new["key"] == params["key"]
    assert new["dense0"].dtype == jnp.float32
    assert float(jnp.max(jnp.abs(new["dense0"] - params["dense0"]))) > 0
    with warnings.catch_warnings():  # once per program, not per batch
        warnings.simplefilter("error")
        optim.AlternatingProjections(3).update(fn, params)


def test_what_is_not_finite_is_named():
    params = mlp_params(jax.random.key(0))
    x, y = batch(0)
    optimizer = optim.AlternatingProjections(2)

    def update(params, x):
        return optimizer.update(lambda p: pjax.cross_entropy(mlp(p, x), y), params)

    with pytest.raises(pjax.NonFiniteError, match=r"holds NaN: an array of shape \(16, 6\)"):
        update(params, x.at[3, 2].set(jnp.nan))
    with pytest.raises(pjax.NonFiniteError, match=r"\['dense1'\]"):
        update({**params, "dense1": params["dense1"].at[0, 0].set(jnp.inf)}, x)
    with pytest.raises(
        pjax.NonFiniteError,
        match=r"loss of the forward pass is not finite\. .*infinite values, in an array of shape "
        r"\(16, 6\) and dtype float32:",
    ):
        update(params, x.at[3, 2].set(jnp.inf))
    with pytest.raises(pjax.NonFiniteError, match="data are: .* or a NaN made inside the function"):
        optimizer.update(
            lambda p: pjax.cross_entropy(mlp(p, x) + jnp.zeros(3) / jnp.sum(x[:0]), y), params
        )
    # Finite all the way to the loss, and out of range in the solve.
    huge = x * 1e20
    with pytest.raises(pjax.NonFiniteError, match="The solve left the range"):
        optimizer.update(
            lambda p: pjax.cross_entropy(huge @ p, y), jnp.full((6, 3), 1e-3, jnp.float32)
        )
    # With infinite data that the loss does not see, it is named as what may be the cause.
    mask = jnp.array([0.0, 0.0, -jnp.inf])
    with pytest.raises(pjax.NonFiniteError, match=r"left the range.*in an array of shape \(3,\)"):
        optimizer.update(
            lambda p: pjax.cross_entropy(jnp.where(mask == 0, huge @ p, 0), y),
            jnp.full((6, 3), 1e-3, jnp.float32),
        )
    silent = optim.AlternatingProjections(2, check=False)
    _, residual = silent.update(
        lambda p: pjax.cross_entropy(mlp(p, x.at[3, 2].set(jnp.nan)), y), params
    )
    assert str(residual.verdict) == "non-finite"


def test_a_mask_of_minus_infinity_is_legal():
    params = mlp_params(jax.random.key(0))
    x, y = batch(0)
    mask = jnp.where(jnp.arange(3) == 2, -jnp.inf, 0.0)
    known = jnp.argmax(y, -1) < 2
    new, residual = optim.AlternatingProjections(2).update(
        lambda p: pjax.cross_entropy((mlp(p, x) + mask)[known], y[known]), params
    )
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in new.values())
    assert np.isfinite(float(residual))


@pytest.mark.parametrize("optimizer", ["AlternatingProjections", "DouglasRachford"])
def test_rows_that_count_negatively_go_along_the_tangent(optimizer):
    params = mlp_params(jax.random.key(0))
    x, y = batch(0)
    for weights in (-jnp.ones(16), jnp.ones(16).at[jnp.arange(0, 16, 2)].set(-1)):

        def fn(p, weights=weights):
            return jnp.mean(weights * pjax.cross_entropy(mlp(p, x), y))

        new, _ = getattr(optim, optimizer)(20).update(fn, params)
        assert float(fn(new)) < float(fn(params))


def test_large_copies_are_announced_before_they_are_made():
    params = {"a": jnp.zeros((64, 512)), "b": jnp.zeros((512, 512))}
    x, y = jnp.ones((4096, 64)), jnp.ones((4096, 512)) / 512

    def fn(p):
        return pjax.cross_entropy(jax.nn.relu(x @ p["a"]) @ p["b"], y)

    with pytest.warns(LargeStateWarning, match=r"8\.6 GB for one state.*`dot`"):
        optim.DouglasRachford(2).lower(fn, params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.AlternatingProjections(2).lower(fn, params)


def test_empty_batches_and_wrong_options_are_refused():
    params = mlp_params(jax.random.key(0))
    x, y = batch(0)
    with pytest.raises(pjax.TraceError, match="The batch is empty"):
        optim.AlternatingProjections(2).update(
            lambda p: pjax.cross_entropy(mlp(p, x[:0]), y[:0]), params
        )
    with pytest.raises(pjax.TraceError, match=r"The batch is empty: .*test_optim.py.*\(0, "):
        optim.AlternatingProjections(2).update(
            lambda p: pjax.cross_entropy(mlp(p, x[:0]), y[:0]).mean(), params
        )
    with pytest.raises(pjax.TraceError, match="The batch is empty"):
        optim.AlternatingProjections(2).update(
            lambda p: pjax.cross_entropy(mlp(p, x[:0]).sum(0, keepdims=True), y[:1]), params
        )
    with pytest.raises(ValueError, match="`fanout` must be"):
        optim.AlternatingProjections(2, fanout="some").update(  # pyright: ignore
            lambda p: pjax.cross_entropy(mlp(p, x), y), params
        )
    with pytest.raises(ValueError, match="`splitting` must be"):
        optim.AlternatingProjections(2, splitting="some").update(  # pyright: ignore
            lambda p: pjax.cross_entropy(mlp(p, x), y), params
        )
    with pytest.raises(TypeError, match="beta"):
        optim.AlternatingProjections(2, beta=0.5)


@pytest.mark.parametrize(
    ("make", "ceiling"),
    [
        (optim.AlternatingProjections, 4e6),
        pytest.param(optim.CyclicProjections, 4e6, marks=pytest.mark.slow),
        pytest.param(optim.DouglasRachford, 20e6, marks=pytest.mark.slow),
    ],
)
def test_memory_of_a_solve(make, ceiling):
    """784-128-10, batch 256: the published code's compiled temporaries are 618 MB (AP) and 523 MB
    (DR).
    """
    params = mlp_params(jax.random.key(0), (784, 128, 10))
    x, y = jnp.ones((256, 784)), jnp.ones((256, 10)) / 10
    lowered = make(50).lower(lambda p: pjax.cross_entropy(mlp(p, x), y), params)
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes <= ceiling


def test_small_deviations_survive_float32():
    """Moves far below the rounding of the values they are added to still add up, as deviations."""
    x = jnp.full((1, 2), 1e-4)
    params = {"w": jnp.full((2, 1), 1e4)}
    target = x @ params["w"] + 1e-3  # relative 5e-4 of the output; 1e-11 of the weights per step

    def moved(dtype):
        p = {"w": params["w"].astype(dtype)}
        problem = pjax.feasibility_problem(
            lambda p: pjax.squared_error(x.astype(dtype) @ p["w"], target.astype(dtype)), p
        )
        state, _ = solvers.AlternatingProjections(50).solve(problem)
        return problem.parameter_deviations(state)[0]

    single = np.asarray(moved(jnp.float32))
    with enable_x64():
        double = np.asarray(moved(jnp.float64))
    assert np.abs(double).max() > 0
    assert np.abs(double).max() < 1e-6 * 1e4  # invisible in float32 full values
    np.testing.assert_allclose(single, double, rtol=1e-2)
