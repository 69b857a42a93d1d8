"""Functions with a derivative of their own: forces follow the rule that was written."""

from __future__ import annotations

import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.graph import build_graph
from pjax.trace import trace

X = jax.random.normal(jax.random.key(0), (8, 3))
Y = jnp.tanh(X.sum(1, keepdims=True))
PARAMS = {
    "a": jax.random.normal(jax.random.key(1), (3, 6)),
    "b": 0.5 * jax.random.normal(jax.random.key(2), (6, 1)),
}
#: Most functions here have a rule that is not their derivative; one test asks for the warning.
pytestmark = pytest.mark.filterwarnings("ignore::pjax.CustomRuleWarning")
STIFF = pjax.metrics.Spectral(activations=1e4, prox_step=1e-4)


@jax.custom_jvp
def spike(v):
    return (v > 0).astype(v.dtype)


@spike.defjvp
def _(primals, tangents):
    (v,), (t,) = primals, tangents
    return spike(v), t / (1 + 4 * jnp.abs(v)) ** 2


@jax.custom_vjp
def straight(v):
    return jnp.round(v)


straight.defvjp(lambda v: (jnp.round(v), None), lambda _, g: (g,))


@jax.custom_vjp
def inside(v):
    return jnp.sign(v)


inside.defvjp(lambda v: (jnp.sign(v), v), lambda v, g: (jnp.where(jnp.abs(v) <= 1, g, 0),))


@jax.custom_vjp
def reverse(v, strength):
    return v


reverse.defvjp(lambda v, s: (v, s), lambda s, g: (-s * g, jnp.zeros_like(s)))


@jax.custom_vjp
def rows(v):
    """Of rows, with a rule that mixes their entries."""
    return jnp.cumsum(v, -1)


rows.defvjp(lambda v: (jnp.cumsum(v, -1), None), lambda _, g: (g - g.mean(-1, keepdims=True),))


@jax.custom_jvp
def two(v, w):
    return jnp.floor(v) * w, v


@two.defjvp
def _(primals, tangents):
    (v, w), (t, s) = primals, tangents
    return two(v, w), (t * w + jnp.floor(v) * s, 0.5 * t)


@jax.custom_vjp
def nearest(v):
    """As a codebook: values, and which they are."""
    return jnp.round(v), jnp.argmax(v, -1)


nearest.defvjp(lambda v: (nearest(v), None), lambda _, g: (g[0],))


@jax.custom_jvp
def counted(v):
    return jnp.sum(v > 0), jnp.floor(v)


@counted.defjvp
def _(primals, tangents):
    (v,), (t,) = primals, tangents
    return counted(v), (np.zeros((), jax.dtypes.float0), 2 * t)


@jax.custom_jvp
def careful(v):
    return jnp.log1p(jnp.exp(v))


@careful.defjvp
def _(primals, tangents):
    (v,), (t,) = primals, tangents
    return careful(v), jax.nn.sigmoid(v) * t


@jax.custom_vjp
def clipped(v):
    return v


clipped.defvjp(lambda v: (v, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))

FUNCTIONS = {
    "spike": spike,
    "straight": straight,
    "inside": inside,
    "reversed": lambda v: jnp.tanh(reverse(v, jnp.asarray(0.7))),
    "rows": rows,
    "with indices": lambda v: nearest(v)[0],
    "with indices that count": lambda v: nearest(v)[0] * (1.0 + nearest(v)[1][:, None]),
    "with a number": lambda v: counted(v)[1] + counted(v)[0],
    "two results": lambda v: jnp.add(*two(v, 1.0 + v**2)),
    "mapped": jax.vmap(jax.vmap(spike)),
    "compiled": jax.jit(straight),
    "remat": jax.checkpoint(straight),
}


def loss_of(function):
    return lambda p: jnp.mean((function(X @ p["a"]) @ p["b"] - Y) ** 2)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forces_follow_the_rule(name):
    loss = loss_of(FUNCTIONS[name])
    gradient = jax.grad(loss)(PARAMS)
    for metric, cosine, length in ((STIFF, 0.9999, 0.99), (None, 0.95, 0.5)):
        value, moved = pjax.value_and_displacement(loss, metric=metric)(PARAMS)
        np.testing.assert_allclose(value, loss(PARAMS), rtol=1e-6)
        for d, g in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
            sizes = float(jnp.linalg.norm(d)), float(jnp.linalg.norm(g))
            assert sizes[0] > length * sizes[1] > 0
            assert float(jnp.vdot(d, g)) > cosine * sizes[0] * sizes[1]


@pytest.mark.parametrize("optimizer", ["Projection", "AlternatingProjections"])
def test_all_ways_of_training_follow_the_rule(optimizer):
    """A reversed branch moves against its loss, all others with it."""
    loss = loss_of(lambda v: jnp.tanh(reverse(v, jnp.asarray(1.0))))
    if optimizer == "Projection":
        pure = pjax.optim.Projection()
        new, _, _ = pure.update(loss, PARAMS, pure.init(loss, PARAMS))
    else:
        new, _ = pjax.optim.AlternatingProjections(20, prox_step=0.1).update(loss, PARAMS)
    way, gradient = jax.tree.map(jnp.subtract, new, PARAMS), jax.grad(loss)(PARAMS)
    assert float(jnp.vdot(way["a"], gradient["a"])) < 0
    plain = jax.grad(loss_of(jnp.tanh))(PARAMS)
    assert float(jnp.vdot(way["a"], plain["a"])) > 0


def test_a_rule_that_is_the_derivative_is_traced_through():
    for function, name in (
        (careful, "exp-log1p"),
        (jax.nn.relu, "relu"),
        (jax.nn.silu, "logistic"),
    ):
        program, *_ = trace(loss_of(function), PARAMS)
        names = [node.name for node in build_graph(program).nodes]
        assert any(name in found for found in names), names
        assert not any(e.name == "stop_gradient" for e in program.equations)


def test_the_function_without_its_rule():
    program, *_ = trace(loss_of(inspect.unwrap(straight)), PARAMS)
    assert "round" in [node.name for node in build_graph(program).nodes]


def test_equal_functions_compile_once():
    first, second = (trace(loss_of(straight), PARAMS)[0] for _ in range(2))
    assert first.key == second.key


def test_a_rule_that_is_not_linear_is_refused():
    with pytest.raises(pjax.TraceError, match=r"`clipped` \(.*test_derivatives.*not linear"):
        pjax.displacement(loss_of(clipped))(PARAMS)


def test_a_rule_that_forces_follow_is_named_once():
    """With its function and the line that calls it; a rule that is the derivative is not named."""
    with pytest.warns(pjax.CustomRuleWarning, match=r"`straight` \(.*test_derivatives") as found:
        pjax.displacement(loss_of(lambda v: 1.5 * straight(v)))(PARAMS)
    assert len(found) == 1
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pjax.displacement(loss_of(lambda v: 1.5 * straight(v)))(PARAMS)
        pjax.displacement(loss_of(lambda v: 1.5 * careful(v)))(PARAMS)
