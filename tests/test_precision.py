"""Networks that multiply in bfloat16: deviations and displacements stay in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pjax

nnx = pytest.importorskip("flax.nnx")

X = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
LABELS = jnp.arange(8) % 5


class Net(nnx.Module):
    """Convolution, batch and layer norm, GELU and attention, all computed in one type."""

    def __init__(self, dtype: Any, rngs: Any) -> None:
        self.conv = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs, dtype=dtype)
        self.norm = nnx.BatchNorm(8, rngs=rngs, dtype=dtype)
        self.dense = nnx.Linear(8, 16, rngs=rngs, dtype=dtype)
        self.inner = nnx.LayerNorm(16, rngs=rngs, dtype=dtype)
        self.attend = nnx.MultiHeadAttention(4, 16, decode=False, rngs=rngs, dtype=dtype)
        self.head = nnx.Linear(16, 5, rngs=rngs, dtype=dtype)

    def __call__(self, x: Any) -> Any:
        h = nnx.relu(self.norm(self.conv(x)))
        h = nnx.gelu(self.dense(h.reshape(len(h), -1, 8)))
        return self.head((h + self.attend(self.inner(h))).mean(1))


def make(dtype):
    definition, params, rest = nnx.split(Net(dtype, nnx.Rngs(0)), nnx.Param, ...)

    def loss(p):
        logits = nnx.merge(definition, p, rest, copy=True)(X)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    return loss, params


def products(jaxpr, found=()):
    """The types that matrix products of a program multiply."""
    found = list(found)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(v.aval.dtype for v in equation.invars))
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found = products(inner, found)
    return found


def test_displacements_are_those_of_the_network_in_float32():
    (loss, params), (wide, _) = make(jnp.bfloat16), make(jnp.float32)
    value, found = pjax.value_and_displacement(loss)(params)
    _, expected = pjax.value_and_displacement(wide)(params)
    assert value.dtype == loss(params).dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == jnp.float32
        if jnp.linalg.norm(b) > 1e-4:  # a bias before a norm has none
            assert jnp.vdot(a, b) > 0.99 * jnp.linalg.norm(a) * jnp.linalg.norm(b)
            np.testing.assert_allclose(jnp.linalg.norm(a), jnp.linalg.norm(b), rtol=0.05)


def test_what_the_network_multiplies_in_bfloat16_a_step_does_too():
    x, w = jnp.ones((6, 4)), {"a": jnp.ones((4, 5)), "b": jnp.ones((5, 3))}
    narrow = jnp.dtype(jnp.bfloat16)

    def loss(p):
        h = jax.nn.relu(jnp.dot(x.astype(narrow), p["a"].astype(narrow)))
        return jnp.mean(pjax.squared_error(jnp.dot(h, p["b"].astype(narrow)), jnp.ones((6, 3))))

    types = products(jax.jit(pjax.displacement(loss)).trace(w).jaxpr.jaxpr)
    assert len(types) >= 5
    assert set(types) == {(narrow, narrow)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    [
        pjax.optim.CyclicProjections(splitting="layer"),
        pjax.optim.CyclicProjections(10),
        pjax.optim.DouglasRachford(10),
    ],
    ids=["layer", "neuron", "reflecting"],
)
def test_pure_projection_lowers_the_loss(optimizer):
    loss, params = make(jnp.bfloat16)
    new, _ = optimizer.update(loss, params)
    assert float(loss(new)) < 0.95 * float(loss(params))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new))
