"""Recurrent cells and attention of Flax NNX and of Equinox learn a small task, by displacements
into Adam and by pure projection.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import pjax
from pjax.backend.device import QUICK

STEPS, WIDTH, BATCHES = 3, 8, 30


class Recurrent(nnx.Module):
    """The last output of a recurrent cell, and a dense layer."""

    def __init__(self, cell, rngs):
        self.rnn = nnx.RNN(cell(WIDTH, WIDTH, rngs=rngs), rngs=rngs)
        self.embed = nnx.Linear(3, WIDTH, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        outputs: jax.Array = self.rnn(self.embed(x))  # pyright: ignore
        return self.last(outputs[:, -1])


class Attentive(nnx.Module):
    """A residual block of attention with a norm, averaged over time, and a dense layer."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(3, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, x):
        h = self.embed(x)
        h = h + self.attention(self.norm(h), mask=nnx.make_causal_mask(x[..., 0]))
        return self.last(jnp.mean(h, 1))


class EquinoxRecurrent(eqx.Module):
    """The last state of a recurrent cell, and a dense layer."""

    cell: eqx.Module
    last: eqx.nn.Linear

    def __init__(self, cell, key):
        self.cell = cell(3, WIDTH, key=key)
        self.last = eqx.nn.Linear(WIDTH, 2, key=key)

    def __call__(self, row):
        lstm = isinstance(self.cell, eqx.nn.LSTMCell)
        state = jnp.zeros(WIDTH)
        state = (state, state) if lstm else state
        state, _ = jax.lax.scan(lambda s, v: (self.cell(v, s), None), state, row)  # pyright: ignore
        return self.last(state[0] if lstm else state)


def flax_model(make):
    definition, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)
    return params, lambda p, x: nnx.merge(definition, p, rest, copy=True)(x)


def equinox_model(make):
    params, static = eqx.partition(make(jax.random.key(0)), eqx.is_inexact_array)
    return params, lambda p, x: jax.vmap(eqx.combine(p, static))(x)


def slow(*values, id):
    return pytest.param(*values, id=id, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model", "make"),
    [
        pytest.param(flax_model, Attentive, id="flax-MultiHeadAttention"),
        slow(flax_model, lambda r: Recurrent(nnx.GRUCell, r), id="flax-GRUCell"),
        slow(equinox_model, lambda k: EquinoxRecurrent(eqx.nn.LSTMCell, k), id="equinox-LSTMCell"),
        slow(flax_model, lambda r: Recurrent(nnx.LSTMCell, r), id="flax-LSTMCell"),
        slow(flax_model, lambda r: Recurrent(nnx.OptimizedLSTMCell, r), id="flax-OptimizedLSTM"),
        slow(flax_model, lambda r: Recurrent(nnx.SimpleCell, r), id="flax-SimpleCell"),
        slow(equinox_model, lambda k: EquinoxRecurrent(eqx.nn.GRUCell, k), id="equinox-GRUCell"),
    ],
)
@pytest.mark.parametrize("method", ["displacement", "projection"])
def test_the_loss_on_new_sequences_falls(model, make, method):
    params, forward = model(make)

    def batch(seed, rows=32):
        x = np.random.default_rng(seed).normal(size=(rows, STEPS, 3)).astype(np.float32)
        return x, np.eye(2, dtype=np.float32)[(x[..., 0].sum(1) > 0).astype(int)]

    def loss(p, x, y):
        return jnp.mean(pjax.cross_entropy(forward(p, x), y))

    optimizer = optax.adam(2e-2)
    direction = pjax.value_and_displacement(loss)
    pure = pjax.optim.Projection(check=False)

    def descend(params, state, x, y):
        _, moved = direction(params, x, y)
        updates, state = optimizer.update(moved, state, params)
        return optax.apply_updates(params, updates), state

    def project(params, state, x, y):
        params, state, _ = pure.update(loss, params, state, x, y)
        return params, state

    step, state = project, pure.init(loss, params, *batch(0)) if method == "projection" else None
    if state is None:
        step, state = descend, optimizer.init(params)

    compiled = jax.jit(step).lower(params, state, *batch(0)).compile(QUICK)
    held_out = batch(1000, 256)
    first = float(loss(params, *held_out))
    for number in range(BATCHES):
        params, state = compiled(params, state, *batch(number))
    assert float(loss(params, *held_out)) < 0.5 * first
