"""Piecewise constant functions in layers: the asked branch, opinions, units, and training."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics
from pjax.lab.data import load
from pjax.projections import threshold
from pjax.projections.piecewise import PiecewiseLinear
from pjax.rules import Affine, Geometry, Quantizer, Reference, Term
from pjax.thresholds import Threshold, as_threshold

ONE = PiecewiseLinear.identity()
SIGN = ONE.sign()
BUMP = ONE.absolute().compare("<", PiecewiseLinear.constant(1.0)).scale(3.0)
STAIRS = SIGN.add(ONE.compare(">", PiecewiseLinear.constant(2.5)).scale(0.5))
RULES = {
    "sign": (Threshold(SIGN), SIGN, (-np.inf, 0.0, np.inf)),
    "bump": (Threshold(BUMP), BUMP, (-np.inf, -1.0, 1.0, np.inf)),
    "stairs": (Threshold(STAIRS), STAIRS, (-np.inf, 0.0, 2.5, np.inf)),
    "quantize": (
        Threshold(Quantizer(4, -1.0, 2.0)),
        lambda x: pjax.quantize(x, 4, -1.0, 2.0),
        (-np.inf, -0.5, 0.5, 1.5, np.inf),
    ),
    "round": (Threshold(Quantizer(None)), jnp.round, tuple(np.arange(-20.5, 21))),
}


def brute_branch(function, ends, x, direction):
    """All intervals between thresholds, by their value in the middle: the nearest one beyond."""
    pieces = []
    for lower, upper in itertools.pairwise(ends):
        inside = np.clip(0.5 * (max(lower, -1e3) + min(upper, 1e3)), lower, upper)
        pieces.append((lower, upper, float(function(jnp.asarray(inside)))))
    here = float(function(jnp.asarray(x)))
    distance = [max(lower - x, x - upper, 0.0) for lower, upper, _ in pieces]
    beyond = [k for k, piece in enumerate(pieces) if direction * (piece[2] - here) > 1e-9]
    if not beyond:
        beyond = [k for k in range(len(pieces)) if distance[k] == 0]
    return pieces[min(beyond, key=distance.__getitem__)][:2]


@pytest.mark.parametrize("name", RULES)
def test_the_move_is_the_relaxed_nearest_point_of_the_asked_branch(name, x64):
    rule, function, ends = RULES[name]
    rng = np.random.default_rng(0)
    x, g = jnp.asarray(3 * rng.normal(size=200)), jnp.asarray(rng.normal(size=200) ** 3)
    reference = Reference((x,), (), function(x))
    (moved,), output = rule.project(reference, (jnp.zeros(200),), (3.0,), g, 1.0)
    assert not np.any(output)
    finite = np.array([end for end in ends if np.isfinite(end)])
    branches = [brute_branch(function, ends, a, np.sign(b)) for a, b in zip(x, g, strict=True)]
    others = [brute_branch(function, ends, a, -np.sign(b)) for a, b in zip(x, g, strict=True)]
    near = [
        min(abs(a - end) for end in (*one, *two))
        for a, one, two in zip(x, branches, others, strict=True)
    ]
    spread, size = np.mean(near), np.mean(np.abs(g))
    assert finite.size
    expected = []
    for a, b, (lower, upper) in zip(np.asarray(x), np.asarray(g), branches, strict=True):
        # The nearest point of the branch with its margin, on a fine grid.
        margin = min(spread, (upper - lower) / 2)
        left, right = max(lower + margin, -60.0), min(upper - margin, 60.0)
        grid = np.linspace(left, max(left, right), 60001)
        point = grid[np.argmin(np.abs(grid - a))]
        reachable = max(lower - a, a - upper, 0.0) <= 0.5 * spread
        opinion = min(abs(b) / size / 10, 1) if reachable else 0.0
        expected.append(0.25 * size * opinion * (point - a) / spread)
    np.testing.assert_allclose(np.asarray(moved), expected, atol=float(2e-3 * size))
    assert np.any(np.abs(moved) > 0.01 * size)


def test_opinions_grow_with_the_request_and_vanish_out_of_reach():
    x = jnp.array([-0.1, -0.1, -10.0, -0.1, 10.0] + [-0.1] * 40)
    g = jnp.array([1.0, 100.0, 100.0, -1.0, 1.0] + [0.01] * 40)
    reference = Reference((x,), (), jnp.sign(x))
    (moved,), _ = Threshold(SIGN).project(reference, (jnp.zeros_like(x),), (1.0,), g, 1.0)
    assert moved[1] > moved[0] > 0
    assert moved[2] == 0
    assert moved[4] == 0
    assert moved[3] < 0  # already on its side: towards its margin


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_nothing_depends_on_the_scale_of_the_operand_or_of_the_request(factor):
    rng = np.random.default_rng(1)
    x, g = jnp.asarray(rng.normal(size=64)), jnp.asarray(rng.normal(size=64))

    def move(x, g):
        reference = Reference((x,), (), jnp.sign(x))
        return Threshold(SIGN).project(reference, (jnp.zeros_like(x),), (1.0,), g, 1.0)[0][0]

    np.testing.assert_allclose(move(factor * x, g), move(x, g), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        move(x, factor * g), factor * move(x, g), rtol=1e-4, atol=1e-6 * factor
    )


def test_hard_inputs_stay_finite():
    for x, g in (
        (jnp.zeros(4), jnp.ones(4)),
        (jnp.ones(4), jnp.zeros(4)),
        (jnp.array([1e30, -1e30, 1e-30, 0.0]), jnp.array([1e30, 1e-30, -1e-30, 0.0])),
    ):
        for rule, function, _ in RULES.values():
            geometry = Geometry(exponent=jnp.float32(90.0))
            reference = Reference((x,), (), function(x), geometry=geometry)
            (moved,), _ = jax.jit(rule.project)(reference, (jnp.zeros(4),), (1.0,), g, 1.0)
            assert jnp.all(jnp.isfinite(moved))


def rules_of(fn, params, splitting):
    graph = pjax.feasibility_problem(fn, params, splitting=splitting).graph
    return [node.rule for node in graph.nodes if node.rule is not None]


def test_layers_use_it_for_piecewise_constant_functions_only():
    y = jnp.eye(4)
    for act, constant in (
        (jnp.sign, True),
        (pjax.step, True),
        (lambda x: jnp.where(x > 0, 1.0, -1.0), True),
        (jnp.round, True),
        (lambda x: pjax.quantize(x, 4, -1.0, 1.0), True),
        (jax.nn.relu, False),
        (lambda x: x + jnp.sign(x), False),
    ):
        fn = lambda w, act=act: pjax.cross_entropy(act(jnp.eye(4) @ w), y).mean()  # noqa: E731
        found = [isinstance(rule, Threshold) for rule in rules_of(fn, jnp.eye(4), "layer")]
        assert any(found) == constant
        assert not any(isinstance(r, Threshold) for r in rules_of(fn, jnp.eye(4), "neuron"))
    assert as_threshold(Affine((Term(),))) == Affine((Term(),))
    assert Threshold.exactness == "relaxed"


def network(params, x):
    for w, b in params[:-1]:
        x = jnp.sign(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def initial(depth, width=32, features=64):
    he = jax.nn.initializers.he_normal()
    sizes = [features, *[width] * depth, 10]
    keys = jax.random.split(jax.random.key(0), depth + 1)
    return [
        (he(k, (a, b)), jnp.zeros(b)) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def test_requests_cross_deep_networks_of_signs():
    x = jax.random.normal(jax.random.key(1), (32, 64))
    y = jax.nn.one_hot(jnp.arange(32) % 10, 10)
    loss = lambda p: pjax.cross_entropy(network(p, x), y).mean()  # noqa: E731
    moves = pjax.displacement(loss, metric=metrics.Spectral())(initial(16))
    gradient = jax.grad(lambda p: -(jax.nn.log_softmax(network(p, x)) * y).sum(-1).mean())(
        initial(16)
    )
    assert not np.any(gradient[0][0])  # there is no gradient to hand on
    assert all(np.isfinite(m).all() and np.any(m) for m in jax.tree.leaves(moves))


def train(params, frozen, steps=60):
    digits = load("digits")
    x, y = jnp.asarray(digits.train.x), jax.nn.one_hot(digits.train.y, 10)
    optimizer = pjax.optim.CyclicProjections(splitting="layer")
    rest = jax.lax.stop_gradient if frozen else lambda p: p

    def loss(p, rows):
        return pjax.cross_entropy(network([*rest(p[:-1]), p[-1]], x[rows]), y[rows]).mean()

    batches = np.random.default_rng(0).integers(0, len(x), (steps, 128))
    state = optimizer.init(lambda p: loss(p, batches[0]), params)
    for number, rows in enumerate(batches):
        relaxation = 0.5 * (1 + np.cos(np.pi * number / steps))
        params, _, state = optimizer.update(
            lambda p, rows=rows: loss(p, rows), params, state, relaxation=relaxation
        )
    predicted = jnp.argmax(network(params, digits.validation.x), -1)
    return float(jnp.mean(predicted == digits.validation.y))


def test_hidden_signs_learn():
    learned, frozen = train(initial(1), False), train(initial(1), True)
    assert learned > frozen + 0.03
    assert learned > 0.9


def test_no_derivative_is_taken_of_the_network():
    """A function without a derivative rule stands in the way of `jax.grad` and of nothing else."""

    @jax.custom_vjp
    def refuses(x):
        return x

    def backward(_, g):
        raise AssertionError("the network was differentiated")

    refuses.defvjp(lambda x: (x, None), backward)
    x, y = jnp.ones((8, 64)), jnp.eye(10)[:8]
    loss = lambda p: pjax.cross_entropy(refuses(network(p, x)), y).mean()  # noqa: E731
    with pytest.raises(AssertionError, match="differentiated"):
        jax.grad(loss)(initial(1))
    moves = pjax.displacement(loss)(initial(1))
    assert np.any(moves[0][0])


def test_asked_level_of_the_last_is_the_own_one():
    branch = threshold.asked_level(4, 0.0, 1.0, jnp.array([3.0, 0.0]), jnp.array([1.0, -1.0]))
    np.testing.assert_array_equal(branch.lower, [2.5, -np.inf])
    np.testing.assert_array_equal(branch.upper, [np.inf, 0.5])
