"""A network in plain JAX, trained by Douglas-Rachford: no gradient, no learning rate.

Any JAX function of a parameter pytree that ends in one of the library's losses is a problem.
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

optimizer = pjax.optim.DouglasRachford(steps_per_update=50)
for start in range(0, 1400, 140):
    batch_x, batch_y = train_x[start : start + 140], train_y[start : start + 140]
    # A fresh lambda for each batch; it is compiled once.
    params, residual = optimizer.update(
        lambda p, x=batch_x, y=batch_y: pjax.cross_entropy(network(p, x), y), params
    )
    print(f"rows {start:4} to {start + 140:4}: residual {float(residual):.3f}, {residual.verdict}")

accuracy = jnp.mean(jnp.argmax(network(params, test_x), -1) == jnp.argmax(test_y, -1))
print(f"test accuracy after one epoch: {accuracy:.1%}")
assert accuracy > 0.85
