"""An operation of one's own: the modulus of pairs, with its projection in a few lines.

`modulus(a, b) = (a² + b²)^½` is the response of a "complex cell": a pair of filters that does not
mind the phase. Its graph is a cone, and the nearest point of a cone keeps the direction of (a, b).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

import pjax
from pjax.lab.data import batch_rows, load


@pjax.register_projection(lambda a, b: jnp.hypot(a, b), name="modulus")
def modulus(inputs, target, input_weights, target_weight):
    """The nearest point of `{(a, b, r): r = (a² + b²)^½}`, for equal weights of a and b."""
    (a, b), (rho, _) = inputs, input_weights
    length = jnp.hypot(a, b)
    moved = jnp.maximum((rho * length + target_weight * target) / (rho + target_weight), 0)
    scale = moved / jnp.where(length > 0, length, 1)
    # At a = b = 0 every direction is nearest: take that of a.
    return jnp.where(length > 0, a * scale, moved), b * scale


def network(params, x):
    return modulus(x @ params["even"], x @ params["odd"]) @ params["output"]


digits = load("digits")
he = jax.nn.initializers.he_normal()
keys = jax.random.split(jax.random.key(0), 3)
shapes = {"even": (64, 32), "odd": (64, 32), "output": (32, 10)}
params = {name: he(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}

optimizer = pjax.optim.DouglasRachford(steps_per_update=50)
for step, rows in zip(range(20), batch_rows(len(digits.train), 128, seed=0), strict=False):
    x, y = jnp.asarray(digits.train.x[rows]), jax.nn.one_hot(digits.train.y[rows], 10)
    params, residual = optimizer.update(
        lambda p, x=x, y=y: pjax.cross_entropy(network(p, x), y), params
    )
    if step % 5 == 4:
        print(f"batch {step + 1}: residual {float(residual):.3f}")

accuracy = jnp.mean(jnp.argmax(network(params, digits.test.x), -1) == digits.test.y)
print(f"test accuracy: {accuracy:.1%}")
assert accuracy > 0.8
