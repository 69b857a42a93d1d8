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
    ("joined", "douglas-rachford", "neuron"),
    ("joined", "alternating", "spectral"),
    ("residual", "alternating", "uniform"),
    ("residual", "douglas-rachford", "spectral"),
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
    staged = pjax.optim.StagedProjections(optimizer, first, layer, last)
    found, history = staged.update(params, x, y)
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
    staged = pjax.optim.StagedProjections(optimizer, first, layer, last)
    found, history = staged.update(params, x, y)
    assert_equal(found, expected, history, given, params)


def ordinary(layer: Any, params: Any, x: Any, y: Any, optimizer: Any) -> Problem:
    program, leaves, consts, _ = trace(whole(layer, x, y), unstacked(params))
    options = Formulation(optimizer.metric, optimizer.fanout, optimizer.splitting)
    return Problem(make_layout(program, options.for_solver(optimizer.solver)), leaves, consts)


def identities(graph: Any) -> int:
    return sum(node.kind == "identity" for node in graph.nodes)
