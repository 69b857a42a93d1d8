"""What a step of pure projection computes: its matrix products, and what it does not repeat."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics
from pjax.problem import Problem
from pjax.projections import layer
from pjax.projections.gains import MARGIN
from pjax.trace import trace
from tests.test_displacement import assert_close, make_mlp, mlp, mlp_loss

OPTIMIZER = pjax.optim.CyclicProjections(splitting="layer", check=False)


def multiplications(compiled: str) -> int:
    """How many multiplications the matrix products of a compiled program have."""
    shapes = {
        name: tuple(map(int, filter(None, shape.split(","))))
        for name, shape in re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", compiled)
    }
    total = 0
    result, operand = r"= \w+\[([\d,]*)\]\S* dot\(", r"(?:\w+\[[^\]]*\]\S* )?%?([\w.-]+),.*"
    dots = result + operand + r"lhs_contracting_dims={([\d,]*)}"
    for out, left, axes in re.findall(dots, compiled):
        size = math.prod(map(int, filter(None, out.split(","))))
        total += size * math.prod(shapes[left][int(axis)] for axis in axes.split(",") if axis)
    return total


def step_of(loss, params, *args):
    """A compiled step with a state, in text."""
    state = OPTIMIZER.init(lambda p: loss(p, *args), params)

    def step(params, state, *args):
        params, _, state = OPTIMIZER.update(lambda p: loss(p, *args), params, state)
        return params, state

    return jax.jit(step).lower(params, state, *args).compile().as_text()


def dense(rng, *shape):
    return jnp.asarray(rng.normal(size=shape) / math.sqrt(shape[0]), jnp.float32)


def test_the_counter_counts():
    a, b, c = jnp.ones((6, 5)), jnp.ones((5, 3)), jnp.ones((6, 2))
    text = jax.jit(lambda a, b, c: jnp.tanh(a @ b).T @ c).lower(a, b, c).compile().as_text()
    assert multiplications(text) == 6 * 5 * 3 + 3 * 6 * 2


def test_the_products_of_a_step():
    """Of the first layer, whose rows are fewer than its columns: the forward pass, the rows' Gram
    matrix and two steps in it, the weights; its part of the line search is known. Of a square
    layer: the forward pass, the pull to the layer below, the weights' gradient, the inputs'
    covariance and two steps in it, what the move changes, the line search. Of a narrow one, five
    in the solve, the forward pass, the pull and the line search. And two power iterations for each
    layer's input and for the weights of all but the first.
    """
    rows, inputs, width, classes = 64, 200, 32, 10
    rng = np.random.default_rng(0)
    shapes = [(inputs, width), (width, width), (width, classes)]
    params = {"w": [dense(rng, *s) for s in shapes], "b": [jnp.zeros(s[1]) for s in shapes]}
    x = jnp.asarray(rng.normal(size=(rows, inputs)), jnp.float32)
    y = jax.nn.one_hot(jnp.arange(rows) % classes, classes)
    first, square, narrow = (rows * m * n for m, n in shapes)
    most = 2 * first + rows**2 * inputs + 2 * rows**2 * width
    most += 5 * square + width**2 * rows + 2 * width**3
    most += 8 * narrow
    most += 4 * rows * (inputs + 2 * width) + 4 * width * (width + classes)
    found = multiplications(step_of(mlp_loss, params, x, y))
    assert first < found <= most


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_moves_of_outputs_are_those_of_their_parameters(x64, steps):
    """What the line search takes from the solve is what it would compute, also of a layer without
    a bias, of two heads on the data, and of convolutions.
    """
    params, x, y = make_mlp(0, 2)
    kernel = {"k": jnp.asarray(np.random.default_rng(1).normal(size=(4, 1, 3)))}

    def heads(p):
        hidden = jnp.tanh(x @ p["w"])
        return jnp.mean(pjax.cross_entropy(hidden @ p["u"], y)) + jnp.mean(
            pjax.squared_error(x @ p["v"] + p["c"], y)
        )

    def convolution(p):
        h = jax.lax.conv_general_dilated(x[:, None], p["k"], (2,), "SAME")
        return jnp.mean(pjax.squared_error(h.reshape(len(x), -1), jnp.ones((len(x), 24))))

    classes = y.shape[1]
    two = {
        "w": params["w"][0],
        "u": params["w"][-1],
        "v": params["w"][0][:, :classes],
        "c": jnp.zeros(classes),
    }
    for fn, given, count in (
        (lambda p: mlp_loss(p, x, y), params, 1),
        (heads, two, 2),
        (convolution, kernel, 1),
    ):
        optimizer = pjax.optim.CyclicProjections(steps, splitting="layer")
        program, leaves, consts, _ = trace(fn, given)
        problem = Problem(optimizer.layout(program), leaves, consts)
        state, _ = optimizer.solver.solve(problem)
        moves = problem.parameter_moves(state)
        moved = [a if m is None else a + m for a, m in zip(leaves, moves, strict=True)]
        after = program.evaluate(moved, consts)
        found = problem.output_moves(state)
        assert len(found) == count
        for variable, move in found.items():
            assert_close(move, after[variable] - problem.values[variable], 1e-9)


def test_outputs_that_are_not_linear_in_what_moves_are_computed(x64):
    """Shared and transposed parameters, stiff ones, products of two, and what reads layers."""
    params, x, y = make_mlp(0, 1)
    w = params["w"][0]
    outputs = {
        "shared": lambda p: x @ p + jnp.tanh(x @ p),
        "transposed": lambda p: x @ p.T.reshape(p.shape),
        "product": lambda p: x @ (p * p),
    }
    for fn in outputs.values():
        loss = lambda p, fn=fn: jnp.mean(pjax.squared_error(fn(p), jnp.ones((24, w.shape[1]))))  # noqa: E731
        problem = OPTIMIZER.problem(loss, w)
        assert problem.layout.linear == ()
        new, _ = OPTIMIZER.update(loss, w)
        assert float(loss(new)) < float(loss(w))
    stiff = pjax.optim.CyclicProjections(
        splitting="layer", metric=metrics.Curved(parameters="stiff")
    )
    assert stiff.problem(lambda p: mlp_loss(p, x, y), params).layout.linear == ()


def test_a_state_begins_where_power_iterations_end(x64):
    """Two more steps, those of a batch, are then enough for a bound."""
    params, x, y = make_mlp(2, 3)

    def loss(p):
        return mlp_loss(p, x, y)

    program, leaves, consts, _ = trace(loss, params)
    state = OPTIMIZER.init(loss, params)
    begun = Problem(OPTIMIZER.layout(program), leaves, consts, state.vectors)
    many = pjax.optim.CyclicProjections(
        splitting="layer", metric=metrics.Curved(power_iterations=60)
    ).problem(loss, params)
    compared = 0
    for node in begun.graph.nodes:
        if node.index not in begun._references or node.rule is None:
            continue
        gains = [begun._slot_gains[i] for i in node.slots]
        best = [many._slot_gains[i] for i in node.slots]
        for gain, limit in zip(gains, best, strict=True):
            if isinstance(gain, jax.Array) and gain.ndim == 0:
                assert float(limit) / MARGIN <= float(gain) <= float(limit) * (1 + 1e-9)
                compared += 1
    assert compared >= 7


def test_a_free_bias_takes_the_mean_out_of_the_inputs(x64):
    """Two steps for the weights are the same for inputs with any mean, and nearer to the nearest
    point than three where the bias is one more unknown.
    """
    rng = np.random.default_rng(3)
    x = rng.normal(size=(40, 12)) * np.geomspace(1, 0.1, 12)
    request = jnp.asarray(rng.normal(size=(40, 5)))

    def parts(x, repeats):
        data = jnp.asarray(x)
        weights = layer.Part(lambda d: data @ d, lambda f: data.T @ f, 1.0, None, True)
        bias = layer.Part(
            lambda d: jnp.broadcast_to(d, (40, 5)), lambda f: f.sum(0), 1e-9, None, True,
            repeats=repeats,
        )  # fmt: skip
        return [weights, bias]

    def objective(x, moves):
        left = x @ moves[0] + moves[1] - request
        return float(jnp.sum(moves[0] ** 2) + 1e-9 * jnp.sum(moves[1] ** 2) + jnp.sum(left**2))

    plain, *_ = layer.solve(parts(x, 40.0), request, 1.0, 2)
    moves, change, _ = layer.solve(parts(x + 10, 40.0), request, 1.0, 2)
    np.testing.assert_allclose(moves[0], plain[0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(change, (x + 10) @ moves[0] + moves[1], atol=1e-9)
    joint, *_ = layer.solve(parts(x + 10, None), request, 1.0, 3)
    best, *_ = layer.solve(parts(x + 10, None), request, 1.0, 60)
    least = objective(x + 10, best)
    assert objective(x + 10, moves) - least < 0.5 * (objective(x + 10, joint) - least)


@pytest.mark.slow
def test_what_is_left_over_is_the_force_on_the_layer_below(x64):
    """Leaving the line search to other values changes the length of a step only."""
    params, x, y = make_mlp(4, 2)

    def loss(p):
        return jnp.mean(pjax.cross_entropy(mlp(p, x), y))

    without = pjax.optim.CyclicProjections(splitting="layer", extrapolate=False)
    ways = []
    for optimizer in (without, OPTIMIZER):
        new, _ = optimizer.update(loss, params)
        moved = [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (new, params)), strict=True)]
        moved = np.concatenate(moved)
        ways.append(moved / np.linalg.norm(moved))
    np.testing.assert_allclose(ways[0], ways[1], atol=1e-9)
