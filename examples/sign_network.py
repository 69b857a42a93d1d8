"""A network of signs, trained in all layers by projections, without a straight-through estimator.

The gradient of such a network is zero in every hidden layer. A projection asks each sign for a
branch instead, and the layer before it moves its operand there.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import pjax
from pjax.lab.data import batch_rows, load


def network(params, x):
    (w1, b1), (w2, b2) = params
    return jnp.sign(x @ w1 + b1) @ w2 + b2


digits = load("digits")
steps = 80
he = jax.nn.initializers.he_normal()
first, last = jax.random.split(jax.random.key(0))
params = [(he(first, (64, 64)), jnp.zeros(64)), (he(last, (64, 10)), jnp.zeros(10))]
batches = list(itertools.islice(batch_rows(len(digits.train), 128, seed=0), steps))


def batch(rows):
    return jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)


def loss(params, x, y):
    return jnp.mean(pjax.cross_entropy(network(params, x), y))


optimizer = pjax.optim.Projection()
state = optimizer.init(loss, params, *batch(batches[0]))
for number, rows in enumerate(batches):
    relaxation = 0.5 * (1 + np.cos(np.pi * number / steps))
    params, state, info = optimizer.update(loss, params, state, *batch(rows), relaxation=relaxation)

accuracy = jnp.mean(jnp.argmax(network(params, digits.test.x), -1) == digits.test.y)
print(f"test accuracy: {accuracy:.1%}")
assert accuracy > 0.9
