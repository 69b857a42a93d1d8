"""An Equinox model under `jax.vmap`: by projection, and by displacements."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import pjax
from pjax.lab.data import batch_rows, load

digits = load("digits")
# The whole module is the parameters: its floating-point arrays move, everything else stays.
initial = eqx.nn.MLP(in_size=64, out_size=10, width_size=64, depth=1, key=jax.random.key(0))


def batches(steps):
    for _, rows in zip(range(steps), batch_rows(len(digits.train), 128, seed=0), strict=False):
        yield jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)


def accuracy(model):
    return jnp.mean(jnp.argmax(jax.vmap(model)(digits.test.x), -1) == digits.test.y)


def loss(model, x, y):
    return jnp.mean(pjax.cross_entropy(jax.vmap(model)(x), y))


projection, model = pjax.optim.Projection(), initial
state = projection.init(loss, model, *next(batches(1)))
for x, y in batches(50):
    model, state, _ = projection.update(loss, model, state, x, y)
print(f"test accuracy, by projection, 50 batches: {accuracy(model):.1%}")
assert accuracy(model) > 0.9


def train(value_and_moves, steps=150):
    optimizer = optax.adam(3e-3)

    @eqx.filter_jit
    def step(model, state, x, y):
        _, moves = value_and_moves(model, x, y)
        updates, state = optimizer.update(moves, state)
        return eqx.apply_updates(model, updates), state

    model, state = initial, optimizer.init(eqx.filter(initial, eqx.is_inexact_array))
    for x, y in batches(steps):
        model, state = step(model, state, x, y)
    return accuracy(model)


displaced = train(pjax.value_and_displacement(loss))
print(f"test accuracy, by displacements, 150 batches: {displaced:.1%}")
print(f"test accuracy, by gradients, 150 batches: {train(eqx.filter_value_and_grad(loss)):.1%}")
assert displaced > 0.9
