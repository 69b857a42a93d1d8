"""A network in plain JAX, trained by projection: no derivative of the network, no learning rate.

Any JAX function of a parameter pytree that ends in a loss can be trained so.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import pjax


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"]


pixels, digits = load_digits(return_X_y=True)
order = np.random.default_rng(0).permutation(len(digits))
x, y = jnp.asarray(pixels[order] / 16, jnp.float32), jax.nn.one_hot(digits[order], 10)
train_x, train_y, test_x, test_y = x[:1400], y[:1400], x[1400:], y[1400:]

key1, key2 = jax.random.split(jax.random.key(0))
he = jax.nn.initializers.he_normal()
params = {"w1": he(key1, (64, 64)), "b1": jnp.zeros(64), "w2": he(key2, (64, 10))}


def loss_fn(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return pjax.cross_entropy(network(params, x), y).mean()


def accuracy(params: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean(jnp.argmax(network(params, test_x), -1) == jnp.argmax(test_y, -1))


print(f"test accuracy before: {accuracy(params):.1%}")
optimizer = pjax.optim.Projection()
state = optimizer.init(loss_fn, params, train_x[:140], train_y[:140])
for epoch in range(3):
    for start in range(0, 1400, 140):
        batch = train_x[start : start + 140], train_y[start : start + 140]
        params, state, info = optimizer.update(loss_fn, params, state, *batch)
    print(f"test accuracy after epoch {epoch + 1}: {accuracy(params):.1%}, loss {info.loss:.3f}")
assert accuracy(params) > 0.9
