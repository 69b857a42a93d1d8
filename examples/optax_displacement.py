"""Plain JAX with optax: a displacement is trained with as a gradient is.

`pjax.value_and_displacement` takes the place of `jax.value_and_grad`; the loss line, clipping,
weight decay and a schedule stay as they are, since a displacement has the scale of a gradient.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import pjax
from pjax.lab.data import batch_rows, load


def network(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return x @ w + b


def loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


digits = load("digits")
steps = 150
rows = np.stack(list(itertools.islice(batch_rows(len(digits.train), 128, seed=0), steps)))
batches = jnp.asarray(digits.train.x[rows]), jnp.asarray(digits.train.y[rows])

he = jax.nn.initializers.he_normal()
sizes = list(itertools.pairwise((64, 64, 64, 10)))
keys = jax.random.split(jax.random.key(0), len(sizes))
initial = [(he(key, size), jnp.zeros(size[1])) for key, size in zip(keys, sizes, strict=True)]
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=1e-3),
)


def train(value_and_moves):
    def step(carry, batch):
        params, state = carry
        value, moves = value_and_moves(params, *batch)
        updates, state = optimizer.update(moves, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = initial, optimizer.init(initial)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))(carry)
    return jnp.mean(jnp.argmax(network(params, digits.test.x), -1) == digits.test.y)


displaced = train(pjax.value_and_displacement(loss))
print(f"test accuracy, by displacements: {displaced:.1%}")
print(f"test accuracy, by gradients: {train(jax.value_and_grad(loss)):.1%}")
assert displaced > 0.9
