"""`pjax.threshold` in problems and in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.rules import SignedProduct, Threshold

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.choice([-1.0, 1.0], (16, 5)), jnp.float32)
PARAMS = {
    "a": jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32),
    "b": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32),
}
Y = jnp.sign(X[:, :3])


def loss(params, x, y, margin=1.0):
    hidden = pjax.threshold(x @ params["a"], margin)
    return jnp.mean(pjax.squared_error(pjax.threshold(hidden @ params["b"], margin), y))


def problem_of(fn, **options):
    return pjax.feasibility_problem(fn, PARAMS, X, Y, reflecting=True, **options)


def rules_of(fn, **options):
    nodes = problem_of(fn, **options).graph.nodes
    return [type(node.rule).__name__ for node in nodes if node.kind == "operation"]


def test_value():
    assert list(pjax.threshold(jnp.array([-2.0, 0.0, 1e-9]), 5.0)) == [-1, -1, 1]
    assert pjax.threshold(jnp.ones((2, 3))).shape == (2, 3)
    np.testing.assert_array_equal(
        jax.vmap(lambda x: pjax.threshold(x, 0.1))(X), jax.jit(pjax.threshold)(X)
    )


@pytest.mark.parametrize("margin", [-1.0, np.inf, np.nan])
def test_margins_that_are_none(margin):
    with pytest.raises(ValueError, match="margin"):
        pjax.threshold(X, margin)


def test_integers_are_no_operands():
    with pytest.raises(TypeError, match="floating-point"):
        pjax.threshold(jnp.arange(3))


def test_product_and_sign_are_one_constraint():
    assert rules_of(loss) == ["SignedProduct", "SignedProduct"]
    assert rules_of(loss, splitting="layer") == ["LayerSum", "Threshold"] * 2


def test_a_product_that_is_read_twice_is_one_of_its_own():
    def fn(params, x, y):
        product = x @ params["a"] @ params["b"]
        return jnp.mean(pjax.squared_error(pjax.threshold(product, 1.0) + product, y))

    assert rules_of(fn).count("SignedNumber") == 1
    assert rules_of(fn).count("NeuronBilinear") == 1


def test_sum_has_a_margin_by_entries():
    """Of one row, a bias is moved until each sum keeps the margin on the side of its label."""
    x, y = X[:1], X[:1]

    def fn(params, x, y):
        return jnp.mean(pjax.squared_error(pjax.threshold(x + params["b"], 2.0), y))

    params = {"b": jnp.zeros(5)}
    problem = pjax.feasibility_problem(fn, params, x, y)
    solver = pjax.solvers.AlternatingProjections(steps=300)
    (moved,) = problem.parameter_deviations(solver.solve(problem)[0])
    assert moved is not None
    assert jnp.all(y * (x + moved) > 2 - 0.05)


@pytest.mark.parametrize("data", ["left", "right", "none"])
def test_projection_satisfies_every_product(data):
    """What data leaves free reaches the margin; of both operands, their copies do."""

    def fn(params, x, y):
        x = x @ params["a"] if data == "none" else x
        if data == "right":
            product = params["a"].T @ x.T
            return jnp.mean(pjax.squared_error(pjax.threshold(product, 1.5).T[:, :3], y))
        return jnp.mean(pjax.squared_error(pjax.threshold(x @ params["b"][:5], 1.5), y))

    params = {"a": PARAMS["a"][:, :5], "b": PARAMS["b"]}
    if data != "none":
        del params["b" if data == "right" else "a"]
    problem = pjax.feasibility_problem(fn, params, X, Y, reflecting=True)
    (node,) = (n for n in problem.graph.nodes if isinstance(n.rule, SignedProduct))
    group = next(i for i, members in enumerate(problem.layout.groups) if node.index in members)
    before = problem.initial()
    after = problem.project(group, before)
    rule, reference = node.rule, problem.reference(node.index)
    assert isinstance(rule, SignedProduct)
    slots, knowns = iter(node.slots), iter(reference.knowns)
    values = iter(reference.inputs)
    copies = []
    for free, storage in zip(rule.free, rule.all_storages(), strict=True):
        value = storage.fill(next(values) if free else jnp.asarray(next(knowns)))
        copies.append(value + after.slots[next(slots)] if free else value)
    assert jnp.all(jnp.abs(jnp.sum(copies[0] * copies[1], axis=-1)) > 1.5 - 1e-4)


def test_residual_is_the_distance_to_the_margin():
    """Of products far beyond the margin 0, and of those that the margin asks to grow."""
    params = jax.tree.map(lambda w: 100 * w, PARAMS)
    y = pjax.threshold(pjax.threshold(X @ params["a"]) @ params["b"])

    def residual(margin):
        problem = pjax.feasibility_problem(lambda p: loss(p, X, y, margin), params, reflecting=True)
        found = problem.residuals()
        return float(sum(v for name, v in found.items() if "threshold" in name))

    assert residual(0.0) < 1e-4
    assert residual(1000.0) > 1


def test_padded_convolution():
    """Where a slice reads padding nothing moves, and the margin is reached without it."""

    def fn(kernel, x, y):
        out = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.mean(pjax.squared_error(pjax.threshold(out, 2.0), y))

    x = jnp.asarray(RNG.normal(size=(2, 4, 4, 2)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 2, 3)), jnp.float32)
    y = jnp.ones((2, 4, 4, 3))
    found = pjax.solve(fn, kernel, x, y, starts=2, steps=5, every=5)
    assert jnp.all(jnp.isfinite(found.gap))
    problem = pjax.feasibility_problem(fn, kernel, x, y, reflecting=True)
    (node,) = (n for n in problem.graph.nodes if isinstance(n.rule, SignedProduct))
    zeros = (jnp.zeros((2, 4, 4, 3, 18)),) * 2
    reference = problem.reference(node.index)
    rule = node.rule
    assert isinstance(rule, SignedProduct)
    new, _ = rule.project(reference, zeros, (1.0, 1.0), jnp.zeros(y.shape), 1.0)
    padded = rule.operation.mask_slices(jnp.ones_like(zeros[0])) == 0
    assert padded.any()
    assert all(jnp.all(jnp.where(padded, array, 0) == 0) for array in new)


def test_trains_in_layers_like_a_sign():
    def signs(params, x, y):
        hidden = jnp.where(x @ params["a"] > 0, 1.0, -1.0)
        return jnp.mean(pjax.cross_entropy(hidden @ params["b"], y))

    def thresholds(params, x, y):
        hidden = pjax.threshold(x @ params["a"], 3.0)
        return jnp.mean(pjax.cross_entropy(hidden @ params["b"], y))

    y = jax.nn.one_hot(jnp.arange(16) % 3, 3)
    optimizer = pjax.optim.Projection()
    found = []
    for fn in (signs, thresholds):
        params, state = PARAMS, optimizer.init(fn, PARAMS, X, y)
        for _ in range(3):
            params, state, _ = optimizer.update(fn, params, state, X, y)
        found.append(params)
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    graph = pjax.feasibility_problem(thresholds, PARAMS, X, y, splitting="layer").graph
    assert any(isinstance(node.rule, Threshold) for node in graph.nodes)
