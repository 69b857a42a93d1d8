"""Displacements: gradients in the stiff limit, at every depth, for every graph and solver."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pjax
from pjax import metrics, solvers
from pjax.program import TraceError
from tests.networks import assert_close, make_mlp, mlp, mlp_loss, smooth_params, tied
from tests.selection import mostly_slow

#: So stiff and with so short a prox step that only rounding is left between the two.
LIMIT = metrics.Spectral(activations=1e8, prox_step=1e-7)


def skips(p, x, y):
    """Additive and concatenated skips over smooth layers."""
    h = x @ p["w"][0] + p["b"][0]
    g = h + h * (h @ p["square"])
    k = g + g @ p["square"]
    return jnp.mean(pjax.cross_entropy(jnp.concatenate([h, g, k], -1) @ p["head"], y))


def attention(p, x, y):
    """Products of two activations, batched over rows: q kᵀ v without a softmax."""
    h = x.reshape(-1, 4, 3) @ p["small"]
    scores = jnp.einsum("bqd,bkd->bqk", h @ p["square"], h @ p["square"].T) / 16
    read = jnp.einsum("bqk,bkd->bqd", scores, h + p["b"][0])
    return jnp.mean(pjax.cross_entropy(read.sum(1) @ p["w"][1], y))


def weights_of_weights(p, x, y):
    """Parameters meet each other before they meet the data."""
    scaled = p["square"] * p["b"][0][None, :]
    h = x @ (p["w"][0] @ scaled + 0.1 * p["w"][0])
    return jnp.mean(pjax.squared_error(h @ p["w"][1], y))


def gathers(p, x, y):
    """An embedding with repeated tokens, and a slice of a parameter."""
    tokens = jnp.arange(24 * 3).reshape(24, 3) % 7
    h = jnp.sum(p["square"][:7][tokens], axis=1) * (x @ p["w"][0])
    return jnp.sum(pjax.cross_entropy(h @ p["w"][1], y)) / 24


def several_losses(p, x, y):
    h = x @ p["w"][0] + p["b"][0]
    first = jnp.mean(pjax.cross_entropy(h @ p["w"][1], y))
    return 0.3 * first + 2.0 * jnp.sum(pjax.squared_error(h @ p["square"], jnp.ones((24, 16))))


SMOOTH = [skips, tied, attention, weights_of_weights, gathers, several_losses]
SMOOTH_OFTEN = [tied, attention, several_losses]


@pytest.mark.parametrize(
    ("splitting", "metric"),
    [
        ("layer", metrics.Spectral()),
        ("layer", metrics.Spectral(parameters=2.0)),
        ("neuron", metrics.Uniform()),
    ],
    ids=["stiff", "moving", "neuron"],
)
@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
def test_a_sweep_has_the_forces_of_a_cyclic_solver(x64, splitting, metric):
    """Also where parameters move, and where a slot joins activations and parameters."""
    params, x, y = smooth_params()

    def fn(p):
        h = x @ p["w"][0] + p["b"][0]
        both = jnp.concatenate([h, p["square"], p["square"][:8]], axis=0) @ p["square"]
        return jnp.mean(pjax.cross_entropy(jax.nn.relu(both[:24] * both[24:]) @ p["w"][1], y))

    solver = solvers.CyclicProjections(steps=1)
    problem = pjax.feasibility_problem(
        fn, params, metric=metric, splitting=splitting, grouping="levels"
    )
    swept = problem.parameter_forces(problem.sweep())
    solved = problem.parameter_forces(solver.run(problem))
    assert any(force is not None and bool(jnp.any(force != 0)) for force in swept)
    for found, expected in zip(swept, solved, strict=True):
        if found is None or expected is None:
            assert found is expected
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("fn", mostly_slow(SMOOTH, SMOOTH_OFTEN))
def test_the_stiff_limit_is_the_gradient(x64, fn):
    """Skips, tied weights, two free operands, weights of weights, gathers, weighted losses: the
    forces of all readers add up.
    """
    params, x, y = smooth_params()
    with pytest.warns(pjax.UnusedParameterWarning):
        value, found = pjax.value_and_displacement(fn, metric=LIMIT)(params, x, y)
    expected_value, expected = jax.jit(jax.value_and_grad(fn))(params, x, y)
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


@pytest.mark.parametrize("fn", mostly_slow(SMOOTH, SMOOTH_OFTEN))
def test_the_default_points_where_the_gradient_does(x64, fn):
    """At finite stiffness and prox step, in the same scale up to what each level hands on."""
    params, x, y = smooth_params(3)
    with pytest.warns(pjax.UnusedParameterWarning):
        found = pjax.displacement(fn)(params, x, y)
    expected = jax.jit(jax.grad(fn))(params, x, y)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not float(jnp.max(jnp.abs(b))):
            continue
        cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
        assert float(cosine) > 0.97
        assert 0.5 < float(jnp.linalg.norm(a) / jnp.linalg.norm(b)) < 1.05


@pytest.mark.parametrize(
    "solver",
    mostly_slow(
        [
            solvers.CyclicProjections(3),
            solvers.AlternatingProjections(24),
            solvers.DouglasRachford(24),
            solvers.CyclicDouglasRachford(6),
            solvers.DifferenceMap(24),
            solvers.AlternatingReflections(24, relaxation=0.5),
        ],
        [solvers.CyclicProjections(3), solvers.DouglasRachford(24)],
    ),
    ids=lambda solver: type(solver).__name__,
)
def test_every_solver_displaces_along_the_gradient(x64, solver):
    params, x, y = make_mlp(1, 3)
    found = pjax.displacement(mlp_loss, solver=solver)(params, x, y)
    expected = jax.jit(jax.grad(mlp_loss))(params, x, y)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
        assert float(cosine) > 0.99
        assert 0.3 < float(jnp.linalg.norm(a) / jnp.linalg.norm(b)) < 3


@pytest.mark.slow
def test_float32_agrees_with_float64_in_every_layer_of_a_deep_net(x64):
    """Twenty layers: direction to 0.999, although deviations are far below float32's range."""
    params, x, y = make_mlp(0, 20, width=32)
    expected = pjax.displacement(mlp_loss)(params, x, y)
    single = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x, y))
    found = pjax.displacement(mlp_loss)(*single)
    problem = pjax.feasibility_problem(mlp_loss, *single, splitting="layer", grouping="levels")
    assert max(int(w.exponent) for w in problem.weights[3:4]) > 149  # 2**-149 is the least number
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        cosine = jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))
        assert float(cosine) > 0.999


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_very_deep_net_neither_underflows_nor_overflows(steps):
    params, x, y = make_mlp(0, 64, width=16)
    found = pjax.displacement(mlp_loss, solver=solvers.CyclicProjections(steps))(params, x, y)
    gradient = jax.jit(jax.grad(mlp_loss))(params, x, y)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        assert np.isfinite(a).all()
        ratio = jnp.linalg.norm(a) / jnp.linalg.norm(b)
        assert 0.3 < float(ratio) < 3


def test_rows_count_what_they_weigh(x64):
    """A sum is N means; a masked row is not there; weights act as repetitions."""
    params, x, y = make_mlp(2, 2)
    metric = metrics.Spectral(prox_step=1.0)
    displace = {
        name: pjax.displacement(fn, metric=metric)
        for name, fn in {
            "mean": mlp_loss,
            "sum": lambda p, x, y: jnp.sum(pjax.cross_entropy(mlp(p, x), y)),
            "weighted": lambda p, x, y, r: jnp.sum(r * pjax.cross_entropy(mlp(p, x), y)) / r.sum(),
        }.items()
    }
    mean = displace["mean"](params, x, y)
    assert_close(displace["sum"](params, x, y), jax.tree.map(lambda a: 24 * a, mean), 1e-9)
    mask = (jnp.arange(24) % 3 > 0).astype(x.dtype)
    kept = displace["mean"](params, x[mask > 0], y[mask > 0])
    assert_close(displace["weighted"](params, x, y, mask), kept, 1e-9)
    twice = displace["mean"](params, jnp.concatenate([x, x[:12]]), jnp.concatenate([y, y[:12]]))
    repeated = jnp.where(jnp.arange(24) < 12, 2.0, 1.0)
    # A row of half the weight of another is as stiff in its own units: the same to first order.
    assert_close(displace["weighted"](params, x, y, repeated), twice, 0.05)


def test_batches_accumulate(x64):
    params, x, y = make_mlp(2, 2)
    displace = pjax.displacement(mlp_loss)
    halves = [displace(params, x[part], y[part]) for part in (slice(0, 12), slice(12, 24))]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert_close(displace(params, x, y), mean, 1e-12)


def test_the_batch_size_does_not_change_the_size_of_a_request(x64):
    """The prox step is in units of the predictions: repeating the batch changes nothing."""
    params, x, y = make_mlp(2, 2)
    displace = pjax.displacement(mlp_loss, metric=metrics.Spectral(prox_step=5.0))
    repeated = displace(params, jnp.tile(x, (4, 1)), jnp.tile(y, (4, 1)))
    assert_close(repeated, displace(params, x, y), 1e-9)


def test_the_state_goes_on_where_the_batch_before_left_it(x64):
    """Carried vectors sharpen the bounds, and change nothing else."""
    params, x, y = make_mlp(4, 3)
    step = pjax.value_and_displacement(mlp_loss)
    state = step.init(params, x, y)
    for _ in range(5):
        (value, found), state = jax.jit(step.update)(state, params, x, y)
    plain_value, plain = step(params, x, y)
    np.testing.assert_allclose(value, plain_value, rtol=1e-12)
    assert_close(found, plain, 0.01)
    problem = pjax.feasibility_problem(mlp_loss, params, x, y, splitting="layer")
    carried = (
        type(problem)(problem.layout, problem.leaves, [x, y], vectors=list(state.vectors))
        if len(state.vectors) == len(problem.graph.slots)
        else None
    )
    assert (
        carried is None
        or max(float(jnp.max(jnp.abs(v))) for v in carried.vectors if v is not None) > 0
    )


def test_auxiliary_outputs_and_argnums(x64):
    params, x, y = make_mlp(5, 2)

    def fn(scale, p, x):
        hidden = jax.nn.relu(x @ p["w"][0] + p["b"][0])
        rows = pjax.cross_entropy(scale * mlp(p, x), y)
        return jnp.mean(rows), {"mean": hidden.mean(0), "squared loss": jnp.mean(rows) ** 2}

    scale = jnp.asarray(1.3)
    step = pjax.value_and_displacement(fn, metric=LIMIT, has_aux=True, argnums=(0, 1))
    (value, aux), (moved_scale, moved) = jax.jit(step)(scale, params, x)
    expected = jax.jit(jax.value_and_grad(fn, argnums=(0, 1), has_aux=True))(scale, params, x)
    np.testing.assert_allclose(value, expected[0][0], rtol=1e-12)
    assert_close(aux, expected[0][1], 1e-12)
    assert_close((moved_scale, moved), expected[1], 1e-5)
    with pytest.raises(TypeError, match=r"pair `\(loss, aux\)`"):
        pjax.value_and_displacement(mlp_loss, has_aux=True)(params, x, y)
    with pytest.raises(TypeError, match="`argnums` names argument 3"):
        pjax.value_and_displacement(mlp_loss, argnums=3)(params, x, y)


def test_integer_and_unused_leaves():
    params, x, y = make_mlp(6, 1)
    given = {**params, "count": jnp.arange(3), "unused": jnp.ones(2)}
    with pytest.warns(pjax.UnusedParameterWarning, match="unused"):
        found = pjax.displacement(mlp_loss)(given, x, y)
    assert found["count"].dtype == jax.dtypes.float0
    np.testing.assert_array_equal(found["unused"], 0)


@pytest.mark.parametrize("make", [lambda: optax.sgd(0.1), lambda: optax.adam(0.1)])
def test_optax_takes_integer_parameters_as_documented(make):
    """Zeros in the place of `float0`, or integers as data: the other parameters move alike."""
    params, x, y = make_mlp(6, 1)
    given = {"net": params, "count": jnp.arange(3)}
    tx = make()

    def moved(params, displacement):
        updates, _ = tx.update(displacement, tx.init(params), params)
        return optax.apply_updates(params, updates)

    found = pjax.displacement(lambda p: mlp_loss(p["net"], x, y))(given)
    found = jax.tree.map(
        lambda p, d: jnp.zeros_like(p) if d.dtype == jax.dtypes.float0 else d, given, found
    )
    new: Any = moved(given, found)
    assert new["count"].dtype == given["count"].dtype
    np.testing.assert_array_equal(new["count"], given["count"])
    apart = pjax.displacement(lambda p, count: mlp_loss(p, x, y))(params, given["count"])
    expected = moved(params, apart)
    assert_close(new["net"], expected, 1e-6)
    assert not np.allclose(new["net"]["w"][0], params["w"][0])


def test_fresh_closures_compile_once():
    from pjax.training.displacements import _displace

    params, x, y = make_mlp(7, 2)
    compiled: Any = _displace
    before = compiled._cache_size()
    for number in range(100):
        batch = x + number
        pjax.displacement(lambda p, batch=batch: mlp_loss(p, batch, y))(params)
    assert compiled._cache_size() == before + 1


def test_a_function_without_a_loss_is_refused():
    params, x, _ = make_mlp(8, 1)
    with pytest.raises(TraceError, match="does not end in a loss"):
        pjax.displacement(lambda p: jnp.sum(mlp(p, x)))(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activations": 0.0}, "`activations` must be positive"),
        ({"prox_step": float("inf")}, "`prox_step` must be positive"),
        ({"parameters": "hard"}, '`parameters` must be "stiff" or a positive'),
        ({"parameters": {"w": -1.0, "b": "stiff"}}, r"`parameters\['w'\]` must be"),
        ({"iterations": 0}, "`iterations` must be a whole number"),
    ],
)
def test_metrics_refuse_what_makes_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        metrics.Spectral(**options)


def test_weights_by_parameter():
    """A prefix of the parameter pytree says which parameters rest, and how stiff the others are."""
    params, x, y = make_mlp(9, 2)

    def make(parameters):
        return pjax.feasibility_problem(
            mlp_loss,
            params,
            x,
            y,
            splitting="layer",
            metric=metrics.Spectral(parameters=parameters),
        )

    problem = make({"w": ["stiff", 0.5, "stiff"], "b": "stiff"})
    stiff = {
        problem.graph.nodes[slot.producers[0]].name: problem.layout.stiff[slot.index]
        for slot in problem.graph.slots
        if slot.kind == "weight"
    }
    assert stiff.pop("['w'][1]") is False
    assert all(stiff.values())
    assert len(stiff) == 5
    with pytest.raises(ValueError, match=r"`parameters\['v'\]` names no parameter"):
        make({"w": "stiff", "b": "stiff", "v": 1.0})
    with pytest.raises(ValueError, match=r"no entry for the parameter `\['b'\]\[0\]`"):
        make({"w": "stiff"})
    uniform = metrics.Uniform(weight={"w": 3.0, "b": 0.5})
    weights = pjax.feasibility_problem(mlp_loss, params, x, y, metric=uniform).weights
    assert {w.mantissa for w in weights} == {3.0, 0.5, 1.0}


SIGNS = jnp.asarray([[1.0], [-1.0], [1.0], [1.0], [-1.0]])
SMOOTH_WITH_KINKS = {
    "sigmoid cross-entropy": lambda v: optax.sigmoid_binary_cross_entropy(v, SIGNS > 0),
    "log-sigmoid": lambda v: -jax.nn.log_sigmoid(SIGNS * v),
    "focal": lambda v: optax.sigmoid_focal_loss(v, SIGNS > 0),
    "log-cosh": lambda v: optax.log_cosh(v + 0.5, v * 0 + SIGNS),
    "softplus": lambda v: (jax.nn.softplus(v) @ jnp.ones((1, 2)) - SIGNS) ** 2,
    "base two": lambda v: (jnp.logaddexp2(v, 0.0) @ jnp.ones((1, 2)) - SIGNS) ** 2,
    "two operands": lambda v: (jnp.logaddexp(v, -2 * v) * v - SIGNS) ** 2,
}


@pytest.mark.parametrize("name", SMOOTH_WITH_KINKS)
def test_smooth_functions_that_are_written_with_kinks(x64, name):
    """`max(x, 0) + log1p(exp(−|x|))` at exactly 0, as behind a layer that begins at zero."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))

    def fn(w):
        return jnp.mean(SMOOTH_WITH_KINKS[name](x @ w))

    zero = jnp.zeros((3, 1))
    gradient = jax.grad(fn)(zero)
    assert_close(pjax.displacement(fn, metric=LIMIT)(zero), gradient, 1e-6)
    optimizer = pjax.optim.Projection()
    new, *_ = optimizer.update(fn, zero, optimizer.init(fn, zero))
    assert fn(new) < fn(zero)


@pytest.mark.parametrize(
    ("function", "place"),
    [
        (jax.nn.relu, 0.0),
        (jnp.abs, 0.0),
        (jax.nn.leaky_relu, 0.0),
        (jax.nn.relu6, 6.0),
        (jax.nn.hard_tanh, -1.0),
        (lambda v: jnp.maximum(v, 0.1 * v), 0.0),
        (jax.nn.hard_sigmoid, 3.0),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_on_a_kink(x64, function, place, dtype):
    """The displacement lies between the gradients on both sides."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), dtype)
    for fn in (
        lambda p: jnp.mean((x * function(p) - 3) ** 2),
        lambda p: jnp.mean((function(p) - 3) ** 2),
        lambda p: jnp.mean((x @ function(p) - 3) ** 2),
    ):
        p = jnp.full(3, place, dtype)
        found = pjax.displacement(fn, metric=LIMIT)(p)
        sides = jnp.stack([jax.grad(fn)(p + way) for way in (-1e-3, 1e-3)])
        off = 0.01 * jnp.max(jnp.abs(sides))
        assert jnp.all(found >= jnp.min(sides, 0) - off)
        assert jnp.all(found <= jnp.max(sides, 0) + off)


def test_a_parameter_without_entries_rests():
    params = {"a": jnp.ones(2), "e": jnp.zeros((0, 3))}
    for term in (
        lambda p: jnp.sum(p["e"] ** 2),
        lambda p: jnp.sum(jnp.abs(p["e"])),
        lambda p: jnp.sum(jnp.zeros((4, 0)) @ p["e"] + p["a"][0] ** 2),
        lambda p: jnp.sum(jnp.concatenate([p["e"], p["a"][0] * jnp.ones((1, 3))]) ** 2),
    ):

        def fn(p, term=term):
            return jnp.sum((p["a"] - 3) ** 2) + term(p)

        moved, gradient = pjax.displacement(fn)(params), jax.grad(fn)(params)
        assert moved["e"].shape == (0, 3)
        assert float(jnp.vdot(moved["a"], gradient["a"])) > 0
