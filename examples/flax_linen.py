"""A Flax Linen model: by projection, and by displacements in a `TrainState`."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training.train_state import TrainState

import pjax
from pjax.lab.data import batch_rows, load


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


digits = load("digits")
model = Network()
initial = model.init(jax.random.key(0), digits.train.x[:1])


def logits(params, x) -> Any:
    return model.apply(params, x)


def batches(steps):
    for _, rows in zip(range(steps), batch_rows(len(digits.train), 128, seed=0), strict=False):
        yield jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)


def accuracy(params):
    return jnp.mean(jnp.argmax(logits(params, digits.test.x), -1) == digits.test.y)


def loss(params, x, y):
    return jnp.mean(pjax.cross_entropy(logits(params, x), y))


projection, params = pjax.optim.Projection(), initial
state = projection.init(loss, params, *next(batches(1)))
for x, y in batches(50):
    params, state, _ = projection.update(loss, params, state, x, y)
print(f"test accuracy, by projection, 50 batches: {accuracy(params):.1%}")
assert accuracy(params) > 0.9


def train(value_and_moves, steps=150):
    @jax.jit
    def step(state, x, y):
        _, moves = value_and_moves(state.params, x, y)
        return state.apply_gradients(grads=moves)

    state = TrainState.create(apply_fn=model.apply, params=initial, tx=optax.adam(3e-3))
    for x, y in batches(steps):
        state = step(state, x, y)
    return accuracy(state.params)


displaced = train(pjax.value_and_displacement(loss))
print(f"test accuracy, by displacements, 150 batches: {displaced:.1%}")
print(f"test accuracy, by gradients, 150 batches: {train(jax.value_and_grad(loss)):.1%}")
assert displaced > 0.9
