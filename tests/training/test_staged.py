"""Layers side by side: what the ordinary problem of the whole network is solved to, and errors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.graph import bipartition
from pjax.problem import Formulation, Problem, make_layout
from pjax.trace import trace
from tests.programs import equations

WIDTH, ROWS, LAYERS = 5, 7, 3


def first(p: Any, x: Any) -> Any:
    return jax.nn.relu(x @ p["w"] + p["b"])


def last(p: Any, h: Any, y: Any) -> Any:
    return jnp.mean(pjax.cross_entropy(h @ p["w"], y))


def dense(p: Any, h: Any) -> Any:
    return jax.nn.relu(h @ p["w"] + p["b"])


def residual(p: Any, h: Any) -> Any:
    """The edge has two readers, and an odd way through."""
    return h + jax.nn.relu(h @ p["w"] + p["b"])


def joined(p: Any, h: Any) -> Any:
    """Two nodes hand something on, by wiring; parts of the input have different readers."""
    left = jax.nn.relu(h @ p["w"])
    right = jnp.abs(h[:, :2] @ p["v"])
    return jnp.concatenate([right, left[:, ::-1]], axis=1)


LAYER = {function.__name__: function for function in (dense, residual, joined)}


def params_of(layer: Any, count: int = LAYERS, dtype: Any = jnp.float64) -> tuple[Any, Any, Any]:
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape: int) -> Any:
        return jax.random.normal(next(keys), shape, dtype) / shape[-2] ** 0.5

    own: dict[str, Any] = {"w": normal(count, WIDTH, WIDTH), "b": 0.1 * normal(count, WIDTH)}
    if layer is joined:
        own = {"w": normal(count, WIDTH, WIDTH - 2), "v": normal(count, 2, 2)}
    before = {"w": normal(3, WIDTH), "b": jnp.full(WIDTH, 0.1, dtype)}
    return before, own, {"w": normal(WIDTH, 4)}


def batch(dtype: Any = jnp.float64) -> tuple[Any, Any]:
    x = jax.random.normal(jax.random.key(1), (ROWS, 3), dtype)
    return x, jax.nn.one_hot(jnp.arange(ROWS) % 4, 4, dtype=dtype)


def whole(layer: Any, x: Any, y: Any) -> Any:
    """The loss of the whole network, of a list of the parameters of each layer."""

    def loss(params: Any) -> Any:
        h = first(params[0], x)
        for own in params[1]:
            h = layer(own, h)
        return last(params[2], h, y)

    return loss


def unstacked(params: Any) -> Any:
    count = len(jax.tree.leaves(params[1])[0])
    layers = [jax.tree.map(lambda a, n=n: a[n], params[1]) for n in range(count)]
    return params[0], layers, params[2]


def stacked(params: Any) -> Any:
    return params[0], jax.tree.map(lambda *arrays: jnp.stack(arrays), *params[1]), params[2]


def difference(found: Any, expected: Any, start: Any) -> float:
    """The largest difference of moves, relative to the largest move of each array."""
    pairs = zip(*map(jax.tree.leaves, (found, expected, start)), strict=True)
    errors = []
    for a, b, before in pairs:
        assert np.any(b != before)
        errors.append(np.max(np.abs(a - b)) / np.max(np.abs(b - before)))
    return max(errors)


SOLVERS = {
    "alternating": pjax.optim.AlternatingProjections,
    "douglas-rachford": pjax.optim.DouglasRachford,
}
FORMS = {
    "neuron": {"splitting": "neuron"},
    "neuron, exact": {"splitting": "neuron", "fanout": "exact"},
    "uniform": {"splitting": "layer", "metric": pjax.metrics.Uniform(weight=2.0)},
    "spectral": {"splitting": "layer"},
}


QUICK = {
    ("dense", "alternating", "neuron"),
    ("dense", "douglas-rachford", "spectral"),
    ("joined", "alternating", "spectral"),
    ("residual", "alternating", "uniform"),
}


def cases(*names: str) -> Any:
    """Each layer with each solver and form; the quick ones in the quick tests."""
    every = [(layer, solver, form) for layer in names for solver in SOLVERS for form in FORMS]
    slow = [pytest.mark.slow]
    return pytest.mark.parametrize(
        ("layer", "solver", "form"),
        [pytest.param(*one, marks=[] if one in QUICK else slow) for one in every],
    )


def assert_equal(found: Any, expected: Any, history: Any, given: Any, params: Any) -> None:
    assert difference(found, stacked(expected), params) < 1e-12
    for own, other in zip(jax.tree.leaves(history), jax.tree.leaves(given), strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-11, atol=1e-13)


@cases("dense", "joined")
def test_equal_to_the_whole_network(layer, solver, form, x64):
    layer = LAYER[layer]
    params, (x, y) = params_of(layer), batch()
    optimizer = SOLVERS[solver](2 * LAYERS, **FORMS[form])
    found, history = staged(layer, optimizer).update(params, x, y)
    expected, given = optimizer.update(whole(layer, x, y), unstacked(params))
    assert_equal(found, expected, history, given, params)


@cases("residual")
def test_equal_where_all_layers_have_the_same_colours(layer, solver, form, x64, monkeypatch):
    """The ordinary problem, in which sums at the ends of layers are made to have one colour: an
    identity for each layer. By itself it has none, and every other layer has the other colours.
    """
    layer = LAYER[layer]
    params, (x, y) = params_of(layer), batch()
    optimizer = SOLVERS[solver](2 * LAYERS, **FORMS[form])
    graph = ordinary(layer, params, x, y, optimizer).graph
    assert not identities(graph)
    operations = [node for node in graph.nodes if node.kind == "operation"]
    relus = [node.index for node in operations if node.name in ("relu", "sum_relu")]
    ends = {relus[0], *(node.index for node in operations if node.name == "add")}
    assert len(ends) == LAYERS + 1
    # Before: a product and its relu. In a layer: a product of the colour of the ends, its relu of
    # the other one. Behind: a product of the other one.
    colours = {n.index: int(n.index in relus[1:]) for n in operations}
    colours |= {operations[0].index: 1, operations[-1].index: 1, graph.losses[0].index: 0}
    for producer, reader in graph.edges():
        if producer not in colours:
            colours[producer] = 1 - colours[reader]
    monkeypatch.setattr(
        bipartition, "two_colour", lambda size, _: ([*map(colours.get, range(size))], [])
    )
    problem = ordinary(layer, params, x, y, optimizer)
    monkeypatch.undo()
    assert identities(problem.graph) == LAYERS

    state, given = optimizer.solver.solve(problem)
    leaves, tree = jax.tree.flatten(unstacked(params))
    moves = problem.parameter_deviations(state)
    expected = tree.unflatten([a + move for a, move in zip(leaves, moves, strict=True)])
    found, history = staged(layer, optimizer).update(params, x, y)
    assert_equal(found, expected, history, given, params)


def ordinary(layer: Any, params: Any, x: Any, y: Any, optimizer: Any) -> Problem:
    program, leaves, consts, _ = trace(whole(layer, x, y), unstacked(params))
    options = Formulation(optimizer.metric, optimizer.fanout, optimizer.splitting)
    return Problem(make_layout(program, options.for_solver(optimizer.solver)), leaves, consts)


def identities(graph: Any) -> int:
    return sum(node.kind == "identity" for node in graph.nodes)


STEPS = pjax.optim.AlternatingProjections(2)


def staged(layer: Any = dense, optimizer: Any = STEPS, **changes: Any) -> Any:
    parts = {"first": first, "layer": layer, "last": last} | changes
    return pjax.optim.StagedProjections(optimizer, **parts)


def test_one_layer_and_one_step():
    params, (x, y) = params_of(dense, 1, jnp.float32), batch(jnp.float32)
    optimizer = pjax.optim.AlternatingProjections(1, splitting="layer")
    found, _ = staged(optimizer=optimizer).update(params, x, y)
    expected, _ = optimizer.update(whole(dense, x, y), unstacked(params))
    for a, b in zip(*map(jax.tree.leaves, (found, stacked(expected))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_relaxation_and_another_order(x64):
    params, (x, y) = params_of(dense), batch()
    optimizer = pjax.optim.DouglasRachford(2 * LAYERS, change_projection_order=True)
    found, _ = staged(optimizer=optimizer).update(params, x, y, relaxation=0.5)
    expected, _ = optimizer.update(whole(dense, x, y), unstacked(params), relaxation=0.5)
    assert difference(found, stacked(expected), params) < 1e-12


@pytest.mark.parametrize("place", ["layer", "last"])
def test_what_is_constrained(place, x64):
    """It decides which of the two sets is the first, as in the whole network."""

    def within(h: Any) -> Any:
        return pjax.constrain(h, pjax.sets.Box(0, 0.5))

    def layer(p: Any, h: Any) -> Any:
        return dense(p, within(h) if place == "layer" else h)

    def end(p: Any, h: Any, y: Any) -> Any:
        return last(p, within(h) if place == "last" else h, y)

    def loss(p: Any) -> Any:
        h = first(p[0], x)
        for own in p[1]:
            h = layer(own, h)
        return end(p[2], h, y)

    params, (x, y) = params_of(dense), batch()
    optimizer = pjax.optim.AlternatingProjections(2 * LAYERS)
    found, history = staged(layer, optimizer, last=end).update(params, x, y)
    expected, given = optimizer.update(loss, unstacked(params))
    assert history.violations
    assert_equal(found, expected, history, given, params)


def test_a_program_that_does_not_grow_with_the_layers():
    (x, y), method = batch(jnp.float32), staged()

    def count(layers: int) -> int:
        params = params_of(dense, layers, jnp.float32)
        return equations(jax.jit(method.update).trace(params, x, y).jaxpr.jaxpr)

    assert count(3) == count(24)


def test_what_is_not_finite_is_named():
    params, (x, y) = params_of(dense, dtype=jnp.float32), batch(jnp.float32)
    params[1]["w"] = params[1]["w"].at[1, 0, 0].set(jnp.nan)
    with pytest.raises(pjax.NonFiniteError, match=r"params\[1\]\['w'\]"):
        staged().update(params, x, y)


def of_data(p: Any, x: Any) -> Any:
    return jnp.ones((len(x), WIDTH))


def handing_on(p: Any, h: Any) -> Any:
    return jnp.concatenate([h[:, :1], dense(p, h)[:, 1:]], axis=1)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"layer": lambda p, h: h @ p["w"][:, :2]}, TypeError, "output of equal layers is like"),
        ({"layer": lambda p, h: (h,)}, TypeError, "`layer` must return one array"),
        ({"layer": lambda p, h: jnp.ones_like(h) * p["b"]}, pjax.TraceError, "`layer` does not"),
        ({"layer": handing_on}, pjax.TraceError, "hands on entries of its input"),
        ({"first": of_data}, pjax.TraceError, "of data alone"),
        ({"last": lambda p, h, y: h @ p["w"]}, TypeError, "loss must be one number"),
        ({"last": None}, TypeError, "`last` must be"),
        ({"axis": "rows", "mesh": True}, ValueError, "no axis 'rows'"),
        ({"optimizer": pjax.optim.CyclicProjections()}, ValueError, "level by level"),
        ({"optimizer": pjax.optim.Projection()}, TypeError, "with a solver"),
        (
            {"optimizer": pjax.optim.AlternatingProjections(sets=pjax.sets.Box(0, 1))},
            ValueError,
            "`sets`",
        ),
        (
            {
                "optimizer": pjax.optim.AlternatingProjections(
                    metric=pjax.metrics.Uniform(weight=({"w": 1.0, "b": 1.0}, 1.0, 1.0))
                )
            },
            ValueError,
            "one number for all parameters",
        ),
    ],
)
def test_errors_say_what_to_do(changes, error, text):
    params, (x, y) = params_of(dense, dtype=jnp.float32), batch(jnp.float32)
    if changes.get("mesh"):
        changes = {**changes, "mesh": jax.make_mesh((1,), ("stage",))}
    with pytest.raises(error, match=text):
        staged(**changes).update(params, x, y)


def test_parameters_must_be_stacked():
    params, (x, y) = params_of(dense, dtype=jnp.float32), batch(jnp.float32)
    for wrong, text in (
        (params[:2], "three trees"),
        ((params[0], {"w": params[1]["w"], "b": params[1]["b"][:2]}, params[2]), "stacked"),
        ((params[0], {"w": params[1]["w"], "b": jnp.zeros(())}, params[2]), "stacked"),
        ((params[0], {}, params[2]), "stacked"),
    ):
        with pytest.raises(ValueError, match=text):
            staged().update(wrong, x, y)
