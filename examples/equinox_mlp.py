"""An Equinox model under `jax.vmap`, trained by cyclic projections."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp

import pjax
from pjax.lab.data import batch_rows, load

digits = load("digits")
model = eqx.nn.MLP(in_size=64, out_size=10, width_size=64, depth=1, key=jax.random.key(0))
# Projections move arrays; functions and sizes are not parameters.
params, static = eqx.partition(model, eqx.is_inexact_array)

optimizer = pjax.optim.CyclicProjections(steps_per_update=50)
for step, rows in zip(range(30), batch_rows(len(digits.train), 128, seed=0), strict=False):
    x, y = jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)

    def loss(params, x=x, y=y):
        return pjax.cross_entropy(jax.vmap(eqx.combine(params, static))(x), y)

    params, residual = optimizer.update(loss, params)
    if step % 10 == 9:
        print(f"batch {step + 1}: residual {float(residual):.3f}")

model = eqx.combine(params, static)
accuracy = jnp.mean(jnp.argmax(jax.vmap(model)(digits.test.x), -1) == digits.test.y)
print(f"test accuracy: {accuracy:.1%}")
assert accuracy > 0.85
