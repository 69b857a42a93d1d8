"""Piecewise constant functions in layers: the asked side, opinions, units, and training."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pjax
from pjax import metrics
from pjax.graph import latent_nodes
from pjax.lab.data import load
from pjax.projections.piecewise import PiecewiseLinear
from pjax.rules import Affine, Geometry, LayerSum, Reference, Term, Threshold, as_threshold
from pjax.rules.piecewise_constant import Quantizer
from pjax.trace import trace
from pjax.training import find_units
from pjax.training.requests import Requests

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


def brute_nearest(function, ends, x):
    """Of all thresholds the nearest one: how far `x` is above it, and the jump of `f` there."""
    nearest = min((end for end in ends if np.isfinite(end)), key=lambda end: abs(x - end))
    below, above = (float(function(jnp.asarray(nearest + side))) for side in (-1e-6, 1e-6))
    return x - nearest, above - below


def inputs(ends, seed=0):
    rng = np.random.default_rng(seed)
    x, g = 3 * rng.normal(size=200), rng.normal(size=200) ** 3
    x = np.concatenate([x, np.array([end for end in ends if np.isfinite(end)]) + 0.01])
    return x, np.resize(g, len(x))


@pytest.mark.parametrize("name", RULES)
def test_what_is_in_reach_of_its_nearest_threshold_moves_to_the_asked_side(name, x64):
    rule, function, ends = RULES[name]
    x, g = inputs(ends)
    reference = Reference((jnp.asarray(x),), (), function(jnp.asarray(x)))
    (moved,), output = rule.project(reference, (jnp.zeros(len(x)),), (3.0,), jnp.asarray(g), 1.0)
    assert not np.any(output)
    found = [brute_nearest(function, ends, a) for a in x]
    spread, size = np.mean([abs(offset) for offset, _ in found]), np.mean(np.abs(g))
    expected = [
        0.25 * size * min(abs(b) / size / 10, 1) * np.sign(b * jump)
        if abs(offset) <= 0.75 * spread
        else 0.0
        for b, (offset, jump) in zip(g, found, strict=True)
    ]
    np.testing.assert_allclose(np.asarray(moved), np.asarray(expected), rtol=1e-9, atol=1e-12)
    assert 0 < np.count_nonzero(moved) < len(x)


@pytest.mark.parametrize("name", RULES)
def test_weights_move_towards_the_asked_side_wherever_they_are(name, x64):
    rule, function, ends = RULES[name]
    x, g = inputs(ends)
    reference = Reference((jnp.asarray(x),), (), function(jnp.asarray(x)))
    (moved,), output = replace(rule, of_weights=True).project(
        reference, (jnp.zeros(len(x)),), (3.0,), jnp.asarray(g), 1.0
    )
    assert not np.any(output)
    found = [brute_nearest(function, ends, a) for a in x]
    spread = np.mean([abs(offset) for offset, _ in found])
    expected = [
        0.25 * b * 4 * spread / jump if np.sign(b * jump) * offset <= 4 * spread else 0.0
        for b, (offset, jump) in zip(g, found, strict=True)
    ]
    np.testing.assert_allclose(np.asarray(moved), np.asarray(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sign", "quantize", "round"])
def test_weights_change_as_many_that_the_mean_moves_by_what_is_asked(name, x64):
    """Of weights that are evenly spread between the levels, over many draws."""
    rule, function, _ = RULES[name]
    low, high = {"sign": (-2.0, 2.0), "quantize": (-1.0, 2.0), "round": (-3.0, 3.0)}[name]
    x = jnp.asarray(np.random.default_rng(2).uniform(low, high, 200_000))
    for asked in (0.1, -0.05):
        request = jnp.full_like(x, asked)
        reference = Reference((x,), (), function(x))
        (move,), _ = replace(rule, of_weights=True).project(
            reference, (jnp.zeros_like(x),), (1e-9,), request, 1.0
        )
        changed = float(jnp.mean(function(x + move) - function(x)))
        assert changed == pytest.approx(asked, rel=0.05)


def test_opinions_grow_with_the_request_and_vanish_out_of_reach():
    x = jnp.array([-0.1, -0.1, -10.0, -0.1, 10.0] + [-0.1] * 40)
    g = jnp.array([1.0, 100.0, 100.0, -1.0, 1.0] + [0.01] * 40)
    reference = Reference((x,), (), jnp.sign(x))
    (moved,), _ = Threshold(SIGN).project(reference, (jnp.zeros_like(x),), (1.0,), g, 1.0)
    assert moved[1] > moved[0] > 0
    assert moved[2] == 0
    assert moved[4] == 0
    assert moved[3] < 0  # away from the threshold, on the side where it is


@pytest.mark.parametrize("of_weights", [False, True])
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_nothing_depends_on_the_scale_of_the_operand_or_of_the_request(factor, of_weights):
    rng = np.random.default_rng(1)
    x, g = jnp.asarray(rng.normal(size=64)), jnp.asarray(rng.normal(size=64))

    def move(x, g):
        reference = Reference((x,), (), jnp.sign(x))
        rule = Threshold(SIGN, of_weights=of_weights)
        return rule.project(reference, (jnp.zeros_like(x),), (1.0,), g, 1.0)[0][0]

    # A weight moves with its own scale: as many of them change.
    np.testing.assert_allclose(
        move(factor * x, g), (factor if of_weights else 1) * move(x, g), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        move(x, factor * g), factor * move(x, g), rtol=1e-4, atol=1e-6 * factor
    )


def test_hard_inputs_stay_finite():
    for x, g in (
        (jnp.zeros(4), jnp.ones(4)),
        (jnp.ones(4), jnp.zeros(4)),
        (jnp.array([1e18, -1e18, 1e-18, 0.0]), jnp.array([1e18, 1e-18, -1e-18, 0.0])),
    ):
        for of_weights, (rule, function, _) in itertools.product((False, True), RULES.values()):
            geometry = Geometry(exponent=jnp.float32(90.0))
            reference = Reference((x,), (), function(x), geometry=geometry)
            project = jax.jit(replace(rule, of_weights=of_weights).project)
            (moved,), _ = project(reference, (jnp.zeros(4),), (1.0,), g, 1.0)
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


@pytest.mark.slow
def test_requests_cross_deep_networks_of_signs():
    x = jax.random.normal(jax.random.key(1), (32, 64))
    y = jax.nn.one_hot(jnp.arange(32) % 10, 10)
    loss = lambda p: pjax.cross_entropy(network(p, x), y).mean()  # noqa: E731
    moves = pjax.displacement(loss, metric=metrics.Spectral())(initial(16))
    gradient = jax.jit(jax.grad(lambda p: -(jax.nn.log_softmax(network(p, x)) * y).sum(-1).mean()))(
        initial(16)
    )
    assert not np.any(gradient[0][0])  # there is no gradient to hand on
    assert all(np.isfinite(m).all() and np.any(m) for m in jax.tree.leaves(moves))


def train(params, frozen, net=network, steps=60):
    digits = load("digits")
    x, y = jnp.asarray(digits.train.x), jax.nn.one_hot(digits.train.y, 10)
    optimizer = pjax.optim.Projection()
    rest = jax.lax.stop_gradient if frozen else lambda p: p

    def loss(p, x, y):
        return pjax.cross_entropy(net([*rest(p[:-1]), p[-1]], x), y).mean()

    batches = np.random.default_rng(0).integers(0, len(x), (steps, 128))
    state = optimizer.init(loss, params, x[batches[0]], y[batches[0]])
    for number, rows in enumerate(batches):
        relaxation = 0.5 * (1 + np.cos(np.pi * number / steps))
        params, state, _ = optimizer.update(
            loss, params, state, x[rows], y[rows], relaxation=relaxation
        )
    predicted = jnp.argmax(net(params, digits.validation.x), -1)
    return float(jnp.mean(predicted == digits.validation.y))


def test_a_move_needs_no_derivative_of_the_network():
    """Where signs stand behind a layer its gradient is 0, and its displacement is not."""
    x, y = jnp.ones((8, 64)), jnp.eye(10)[:8]
    loss = lambda p: pjax.cross_entropy(network(p, x), y).mean()  # noqa: E731
    params = initial(1)
    assert not np.any(jax.grad(loss)(params)[0][0])
    assert np.any(pjax.displacement(loss)(params)[0][0])


def two_bit(params, x):
    """Weights of four levels, in units of their initial size, and activations of four levels."""
    for number, (w, b) in enumerate(params):
        unit = (2 / len(w)) ** 0.5
        w = unit * pjax.quantize(w / unit, 4, -1.5, 1.5)
        x = x @ w + b
        if number + 1 < len(params):
            x = pjax.quantize(x, 4, -1.0, 1.0)
    return x


def one_bit(params, x):
    """Signs of weights, in units of their initial size, and of activations."""
    for number, (w, b) in enumerate(params):
        x = x @ ((2 / len(w)) ** 0.5 * jnp.sign(w)) + b
        if number + 1 < len(params):
            x = jnp.sign(x)
    return x


@pytest.mark.parametrize(("net", "least"), [(network, 0.92), (two_bit, 0.89), (one_bit, 0.84)])
def test_thresholds_learn(net, least):
    learned, frozen = train(initial(1), False, net), train(initial(1), True, net)
    assert learned > frozen + 0.03
    assert learned > least


def test_latent_nodes_are_those_between_parameters_and_quantized_weights():
    x, y = jnp.ones((4, 8)), jnp.eye(4)
    params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 4)), "u": jnp.ones((4, 4))}

    def loss(p):
        size = jax.lax.stop_gradient(jnp.mean(jnp.abs(p["w"]), axis=0))
        hidden = jnp.sign(x @ (size * jnp.sign(2 * p["w"].T).T))
        return pjax.cross_entropy(hidden @ p["v"] @ jnp.tanh(p["u"]), y).mean()

    program, *_ = trace(loss, params)
    graph = pjax.optim.Projection()._layout(program).graph
    latent = latent_nodes(graph)
    assert [n.name for n in graph.nodes if n.index in latent if isinstance(n.rule, Threshold)]
    assert not any("tanh" in graph.nodes[index].name for index in latent)
    reading = [slot for slot in graph.slots if not latent.isdisjoint(slot.producers)]
    (layer,) = {slot.node for slot in reading} - latent
    (unit,) = (unit for unit in find_units(graph).units if unit.latent)
    assert unit.node in latent
    assert [graph.slots[reader.slot].node for reader in unit.readers] == [layer]


@pytest.mark.parametrize(
    "scale",
    [
        1.0,
        0.1,
        0.02,
    ],
)
def test_what_a_layer_solves_for_quantized_weights_reaches_the_latent_ones(scale):
    """The move of the weights behind a quantizer is that of the same weights without one, times
    four mean distances over the jump, but where they would go farther beyond their threshold.
    """
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(16, 8))), jax.nn.one_hot(np.arange(16) % 3, 3)
    latent = jnp.asarray(rng.normal(size=(8, 3)))
    optimizer = pjax.optim.Projection()

    def loss(make):
        return lambda w: pjax.cross_entropy(x @ make(w), y).mean()

    def update(fn, params):
        return optimizer.update(fn, params, optimizer.init(fn, params))[0]

    quantizer = lambda w: scale * pjax.quantize(w / scale, 4, -1.5, 1.5)  # noqa: E731
    given = scale * latent
    moved = update(loss(quantizer), given)
    plain = update(loss(lambda w: w), quantizer(given))
    wanted = np.asarray(plain - quantizer(given))
    thresholds = scale * np.array([-1.0, 0.0, 1.0])
    offset = np.asarray(given)[..., None] - thresholds
    offset = np.take_along_axis(
        offset, np.argmin(np.abs(offset), -1, keepdims=True), -1
    )[..., 0]  # fmt: skip
    spread = np.mean(np.abs(offset))
    inside = np.sign(wanted) * offset <= 4 * spread
    expected = wanted * 4 * spread / scale * inside
    np.testing.assert_allclose(np.asarray(moved - given), expected, rtol=2e-3, atol=1e-6)
    assert np.any(expected)


def convolutional(layout, params, x):
    """Signs after a convolution of `x`, with the channels last or first; then a dense layer."""
    numbers = (layout, "HWIO", layout)
    y = jax.lax.conv_general_dilated(x, params["k"], (2, 2), "SAME", dimension_numbers=numbers)
    bias = params["b"] if layout == "NHWC" else params["b"][:, None, None]
    y = jnp.sign(y + bias)
    if layout == "NCHW":
        y = y.transpose(0, 2, 3, 1)
    return y.reshape(len(y), -1) @ params["w"]


def convolutional_problem(layout):
    """The optimiser's problem of a batch of 8 images with 16 places after the convolution."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(8, 8, 8, 2)))
    x = x if layout == "NHWC" else x.transpose(0, 3, 1, 2)
    params = {
        "k": jnp.asarray(rng.normal(size=(3, 3, 2, 4))),
        "b": jnp.asarray(0.1 * rng.normal(size=4)),
        "w": jnp.asarray(rng.normal(size=(64, 3))),
    }
    y = jax.nn.one_hot(np.arange(8) % 3, 3)
    return lambda p: pjax.cross_entropy(convolutional(layout, p, x), y).mean(), params


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_what_all_places_of_an_image_share_is_asked_for_less(layout, x64):
    loss, params = convolutional_problem(layout)
    problem = pjax.feasibility_problem(loss, params, splitting="layer")
    (node,) = (n for n in problem.graph.nodes if _is_convolution(n))
    assert isinstance(node.rule, LayerSum)
    assert node.output is not None
    request = np.random.default_rng(4).normal(1.0, 1.0, problem.values[node.output].shape)
    shapes = problem.graph.shapes(node)
    found = np.asarray(node.rule.steadied(jnp.asarray(request), shapes))
    channel = 3 if layout == "NHWC" else 1
    others = tuple(axis for axis in range(4) if axis != channel)
    mean = request.mean(others, keepdims=True)
    np.testing.assert_allclose(found - mean / 16, request - mean, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("classes", [1, 3])
def test_dense_layers_are_asked_for_all_of_it_whatever_the_rows_of_the_loss(classes):
    x, y = jnp.ones((8, 4)), jnp.ones((8, classes))
    params = {"w": jnp.ones((4, 5)), "b": jnp.zeros(5), "v": jnp.ones((5, classes))}

    def loss(p):
        logits = jnp.sign(x @ p["w"] + p["b"]) @ p["v"]
        return optax.sigmoid_binary_cross_entropy(jnp.squeeze(logits), jnp.squeeze(y)).mean()

    problem = pjax.feasibility_problem(loss, params, splitting="layer")
    nodes = [node for node in problem.graph.nodes if isinstance(node.rule, LayerSum)]
    assert len(nodes) == 2
    for node in nodes:
        assert isinstance(node.rule, LayerSum)
        assert node.output is not None
        request = 1.0 + jnp.arange(problem.values[node.output].size, dtype=float)
        request = request.reshape(problem.values[node.output].shape)
        shapes = problem.graph.shapes(node)
        np.testing.assert_array_equal(node.rule.steadied(request, shapes), request)


def _is_convolution(node):
    terms = getattr(node.rule, "terms", ())
    return any(hasattr(getattr(term, "operation", None), "window_strides") for term in terms)


def test_convolutions_of_signs_move_alike_in_both_layouts(x64):
    optimizer = pjax.optim.Projection()
    (last, params), (first, _) = (convolutional_problem(layout) for layout in ("NHWC", "NCHW"))
    found, other = (
        optimizer.update(loss, params, optimizer.init(loss, params))[0] for loss in (last, first)
    )
    for name in params:
        assert not np.allclose(found[name], params[name])
        np.testing.assert_allclose(found[name], other[name], rtol=1e-6, atol=1e-9)


def test_a_shared_bias_moves_less_than_by_the_whole_request(monkeypatch, x64):
    """Beside its kernel, which hears little of the mean that places ask for."""
    loss, params = convolutional_problem("NHWC")
    # Of settings that do not count in a first batch, another number compiles another program.
    first, second = (pjax.optim.Projection(requests=Requests(forget=n)) for n in (0.98, 0.99))
    state = first.init(loss, params)
    found, *_ = first.update(loss, params, state)
    monkeypatch.setattr(LayerSum, "steadied", lambda self, request, *rest: request)
    whole, *_ = second.update(loss, params, state)
    shares = [
        np.linalg.norm(p["b"] - params["b"]) / np.linalg.norm(p["k"] - params["k"])
        for p in (found, whole)
    ]
    assert shares[0] < 0.7 * shares[1]
