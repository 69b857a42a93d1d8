"""An Equinox model under `jax.vmap`: by projection, and by displacements."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import pjax
from pjax.lab.data import batch_rows, load

digits = load("digits")
model = eqx.nn.MLP(in_size=64, out_size=10, width_size=64, depth=1, key=jax.random.key(0))
# Projections move arrays; functions and sizes are not parameters.
initial, static = eqx.partition(model, eqx.is_inexact_array)


def batches(steps):
    for _, rows in zip(range(steps), batch_rows(len(digits.train), 128, seed=0), strict=False):
        yield jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)


def accuracy(params):
    model = eqx.combine(params, static)
    return jnp.mean(jnp.argmax(jax.vmap(model)(digits.test.x), -1) == digits.test.y)


def loss(params, x, y):
    return jnp.mean(pjax.cross_entropy(jax.vmap(eqx.combine(params, static))(x), y))


projection, params = pjax.optim.Projection(), initial
state = projection.init(loss, params, *next(batches(1)))
for x, y in batches(50):
    params, state, _ = projection.update(loss, params, state, x, y)
print(f"test accuracy, by projection, 50 batches: {accuracy(params):.1%}")
assert accuracy(params) > 0.9


def train(value_and_moves, steps=150):
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, x, y):
        _, moves = value_and_moves(params, x, y)
        updates, state = optimizer.update(moves, state, params)
        return eqx.apply_updates(params, updates), state

    params, state = initial, optimizer.init(initial)
    for x, y in batches(steps):
        params, state = step(params, state, x, y)
    return accuracy(params)


displaced = train(pjax.value_and_displacement(loss))
print(f"test accuracy, by displacements, 150 batches: {displaced:.1%}")
print(f"test accuracy, by gradients, 150 batches: {train(jax.value_and_grad(loss)):.1%}")
assert displaced > 0.9
