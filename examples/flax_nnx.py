"""A Flax NNX model, unchanged: by projection, and by displacements."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import pjax
from pjax.lab.data import batch_rows, load


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.output(nnx.relu(self.hidden(x)))


digits = load("digits")


def batches(steps):
    for _, rows in zip(range(steps), batch_rows(len(digits.train), 128, seed=0), strict=False):
        yield jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)


def accuracy(model):
    return jnp.mean(jnp.argmax(model(jnp.asarray(digits.test.x)), -1) == digits.test.y)


model = Network(nnx.Rngs(0))
definition, params = nnx.split(model, nnx.Param)  # the parameters are a pytree of arrays


def loss(params, x, y):
    return jnp.mean(pjax.cross_entropy(nnx.merge(definition, params)(x), y))


projection = pjax.optim.Projection()
state = projection.init(loss, params, *next(batches(1)))
for x, y in batches(50):
    params, state, _ = projection.update(loss, params, state, x, y)
nnx.update(model, params)
print(f"test accuracy, by projection, 50 batches: {accuracy(model):.1%}")
assert accuracy(model) > 0.9


def train(value_and_moves, steps=150):
    @nnx.jit
    def step(model, optimizer, x, y):
        _, moves = value_and_moves(nnx.state(model, nnx.Param), x, y)
        optimizer.update(model, moves)

    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for x, y in batches(steps):
        step(model, optimizer, x, y)
    return accuracy(model)


displaced = train(pjax.value_and_displacement(loss))
print(f"test accuracy, by displacements, 150 batches: {displaced:.1%}")
print(f"test accuracy, by gradients, 150 batches: {train(jax.value_and_grad(loss)):.1%}")
assert displaced > 0.9
