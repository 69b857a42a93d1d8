"""A Flax NNX model, unchanged, trained by alternating projections."""

from __future__ import annotations

import jax
import jax.numpy as jnp
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
model = Network(nnx.Rngs(0))
definition, params = nnx.split(model, nnx.Param)  # the parameters are a pytree of arrays

optimizer = pjax.optim.AlternatingProjections(steps_per_update=50)
for step, rows in zip(range(30), batch_rows(len(digits.train), 128, seed=0), strict=False):
    x, y = jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)
    params, residual = optimizer.update(
        lambda p, x=x, y=y: pjax.cross_entropy(nnx.merge(definition, p)(x), y), params
    )
    if step % 10 == 9:
        print(f"batch {step + 1}: residual {float(residual):.3f}")

nnx.update(model, params)
accuracy = jnp.mean(jnp.argmax(model(jnp.asarray(digits.test.x)), -1) == digits.test.y)
print(f"test accuracy: {accuracy:.1%}")
assert accuracy > 0.85
