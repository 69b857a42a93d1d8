"""Random networks: in the stiff limit displacements are gradients, whatever is wired to what.

A network is drawn as a list of instructions on arrays of four rows of three features: elementwise
functions, products with weights and with each other, broadcasting, slices, norms, softmax, shared
parameters; and a sum of losses whose weights may be zero or negative.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import pjax
from pjax.backend.device import QUICK

LIMIT = pjax.metrics.Spectral(activations=1e9, prox_step=1e-9, power_iterations=1)
TOLERANCE = 1e-6
TOKENS = np.array([0, 2, 2, 4])
MASK = np.arange(12).reshape(4, 3) % 2 == 0
LABELS = np.eye(3)[[0, 1, 2, 1]]
TARGETS = np.linspace(-1, 1, 12).reshape(4, 3)
INPUTS = np.random.default_rng(0).normal(size=(4, 3))

UNARY = {
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "sigmoid": jax.nn.sigmoid,
    "softplus": jax.nn.softplus,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "abs": jnp.abs,
    "square": jnp.square,
    "exp": lambda a: jnp.exp(a / 3),
    "log": lambda a: jnp.log(1 + a * a),
    "leaky": jax.nn.leaky_relu,
    "softmax": jax.nn.softmax,
    "centred": lambda a: a - jnp.mean(a, axis=0),
    "normalised": lambda a: a * jax.lax.rsqrt(1 + jnp.mean(a * a, axis=1, keepdims=True)),
    "by sums": lambda a: a * jnp.sum(a, axis=1, keepdims=True),
    "cumsum": lambda a: jnp.cumsum(a, axis=1),
    "turned": lambda a: a.reshape(3, 4).T,
    "reversed": lambda a: a[::-1, ::-1],
    "rolled": lambda a: jnp.roll(a, 1, axis=0),
    "shrunk": lambda a: 0.5 * a,
    "negative": lambda a: -1.5 * a,
    "nothing": lambda a: 0.0 * a,
    "largest": lambda a: a - jnp.max(a),
}
BINARY = {
    "add": jnp.add, "subtract": jnp.subtract, "multiply": jnp.multiply, "maximum": jnp.maximum,
    "divide": lambda a, b: a / (2 + b * b), "choose": lambda a, b: jnp.where(MASK, a, b),
    "attend": lambda a, b: jax.nn.softmax(a @ b.T) @ b, "product": lambda a, b: (a @ b.T) @ a / 3,
    "joined": lambda a, b: jnp.concatenate([a, b], axis=1)[:, 2:5],
    "outer": lambda a, b: a[:, :1] * b[:1],
}  # fmt: skip
WITH_PARAMETERS = {
    "dense": lambda a, p: a @ p["w"] + p["b"], "transposed": lambda a, p: a @ p["w"].T,
    "other": lambda a, p: a @ p["v"], "scale": lambda a, p: a * p["b"],
    "number": lambda a, p: a * p["s"], "rows": lambda a, p: a + p["c"],
    "embedding": lambda a, p: a + p["e"][TOKENS], "both": lambda a, p: a @ (p["w"] @ p["v"]),
    "slice": lambda a, p: a * p["e"][1:, :1],
}  # fmt: skip
LOSSES = {
    "cross entropy": lambda a: pjax.cross_entropy(a, jnp.asarray(LABELS)),
    "squared error": lambda a: pjax.squared_error(a, jnp.asarray(TARGETS)),
    "logistic": lambda a: jnp.sum(jax.nn.softplus(-TARGETS * a), axis=1),
    "linear": lambda a: jnp.sum(TARGETS * a, axis=1),
    "own": lambda a: jnp.sum(jnp.log(1 + a * a), axis=1),
}


class Term(NamedTuple):
    """A loss of one of the arrays."""

    name: str
    place: int
    weight: float
    rows: tuple[float, ...] | None


class Network(NamedTuple):
    """Instructions `(name, place, other place)`, terms of the loss, and a seed of parameters."""

    steps: tuple[tuple[str, int, int], ...]
    terms: tuple[Term, ...]
    penalty: float
    seed: int

    def params(self) -> dict[str, jax.Array]:
        rng = np.random.default_rng(self.seed)
        shapes = {"w": (3, 3), "v": (3, 3), "b": (3,), "s": (), "c": (4, 1), "e": (5, 3)}
        return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}

    def loss(self, p: dict[str, jax.Array]) -> jax.Array:
        arrays = [jnp.asarray(INPUTS) @ p["w"]]
        for name, place, other in self.steps:
            a, b = arrays[place % len(arrays)], arrays[other % len(arrays)]
            if name in UNARY:
                arrays.append(UNARY[name](a))
            elif name in BINARY:
                arrays.append(BINARY[name](a, b))
            else:
                arrays.append(WITH_PARAMETERS[name](a, p))
        total = self.penalty * jnp.sum(p["v"] ** 2)
        for term in self.terms:
            rows = LOSSES[term.name](arrays[-1 - term.place % len(arrays)])
            if term.rows is None:
                total = total + term.weight * jnp.mean(rows)
            else:
                total = total + term.weight * jnp.sum(jnp.asarray(term.rows) * rows)
        return total


PLACES = st.integers(0, 20)
STEPS = st.tuples(st.sampled_from([*UNARY, *BINARY, *WITH_PARAMETERS]), PLACES, PLACES)
ROWS = st.sampled_from([None, (1.0, 0.0, 2.0, 0.5), (1.0, -1.0, 0.5, -0.25), (0.0,) * 4])
TERMS = st.builds(
    Term, st.sampled_from(list(LOSSES)), st.integers(0, 2), st.sampled_from([1.0, 0.3, 0.0, -0.5]),
    ROWS,
)  # fmt: skip
NETWORKS = st.builds(
    Network,
    st.lists(STEPS, min_size=2, max_size=9).map(tuple),
    st.lists(TERMS, min_size=1, max_size=3).map(tuple),
    st.sampled_from([0.0, 0.1]),
    st.integers(0, 2**16),
)


def both(network: Network) -> tuple[Any, Any]:
    """The displacement and the gradient."""

    def compare(params: Any) -> Any:
        moved = pjax.value_and_displacement(network.loss, metric=LIMIT)(params)
        return moved, jax.value_and_grad(network.loss)(params)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pjax.UnusedParameterWarning)
        params = network.params()
        return jax.jit(compare).lower(params).compile(QUICK)(params)


def check(network: Network) -> None:
    """Asserts that displacement and gradient agree, leaf by leaf."""
    (value, moved), (expected, gradient) = both(network)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    assume(np.isfinite(largest) and largest < 1e4)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
    for name, leaf in gradient.items():
        atol = TOLERANCE * max(float(jnp.max(jnp.abs(leaf))), 1e-3 * largest, 1e-9)
        np.testing.assert_allclose(moved[name], leaf, rtol=0, atol=atol, err_msg=name)


def drawn(count: int) -> Any:
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None,
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@given(network=NETWORKS)
@drawn(12)
def test_displacements_of_random_networks_are_gradients(x64, network):
    check(network)


@pytest.mark.slow
@given(network=NETWORKS)
@drawn(2000)
def test_displacements_of_many_random_networks_are_gradients(x64, network):
    check(network)
