# %% [markdown]
# # Writing a projection
#
# Every operation that can train has a projection: from operands `x` and a wanted output `z` to
# the nearest point of the graph of the operation,
#
# $$\arg\min_{x'} \; \rho\,|x' - x|^2 + W\,|f(x') - z|^2,$$
#
# with a weight `ρ` of the operands and `W` of the output. This notebook adds one for an
# operation that pjax does not know, checks it against brute force, and trains with it.
#
# The operation is the modulus of a pair, `(a² + b²)^½`: the answer of a *complex cell*, a pair
# of filters that does not mind the phase of a stripe.
#
# You need `pip install ".[lab]"` in a clone of pjax.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import pjax
from pjax.lab.data import batch_rows, load

# %% [markdown]
# ## The mathematics
#
# The graph of the modulus is a cone. By symmetry the nearest point keeps the direction of
# `(a, b)`, so only its length `s` is unknown: `ρ (s − r)² + W (s − z)²` is least at
# `s = (ρ r + W z) / (ρ + W)`, and a length is not negative. At `a = b = 0` every direction is
# equally near; one is taken, always the same.


# %%
def nearest(inputs, target, input_weights, target_weight):
    (a, b), (rho, _) = inputs, input_weights
    length = jnp.hypot(a, b)
    moved = jnp.maximum((rho * length + target_weight * target) / (rho + target_weight), 0)
    scale = moved / jnp.where(length > 0, length, 1)
    return jnp.where(length > 0, a * scale, moved), b * scale


def hypot(a, b):
    return jnp.hypot(a, b)


modulus = pjax.register_projection(hypot, name="modulus", exactness="exact")(nearest)
print(modulus(3.0, 4.0))

# %% [markdown]
# `modulus` computes the function, and is one node where it is traced.
#
# ## Is it the nearest point?
#
# A wrong projection trains badly and says nothing. So compare it with brute force first, at
# hard points too: zeros, and wanted outputs that are negative.

# %%
random = np.random.default_rng(0)
grid = np.stack(np.meshgrid(*[np.linspace(-4, 4, 401)] * 2))
for case in range(200):
    a, b, z = random.normal(size=3)
    if case % 10 == 0:
        a = b = 0.0
    rho, weight = random.uniform(0.1, 10, size=2)

    def distance(p, q, a=a, b=b, z=z, rho=rho, weight=weight):
        return rho * ((p - a) ** 2 + (q - b) ** 2) + weight * (np.hypot(p, q) - z) ** 2

    found = distance(*nearest([a, b], z, [rho, rho], weight))
    assert found <= distance(*grid).min() + 1e-5
print("no point of the grid is nearer")

# %%
a, b, z = 0.9, 0.5, 2.0
figure, axes = plt.subplots(figsize=(4.6, 4.2))
level = (grid[0] - a) ** 2 + (grid[1] - b) ** 2 + (np.hypot(*grid) - z) ** 2
axes.contourf(*grid, np.sqrt(level), levels=14, cmap="Greys_r", alpha=0.6)
p, q = nearest([a, b], z, [1.0, 1.0], 1.0)
axes.plot([0, 3 * a], [0, 3 * b], color="#333333", ls=":", lw=1)
axes.plot(a, b, "o", color="#0072B2", ms=9, label="(a, b)")
axes.plot(p, q, "D", color="#D55E00", ms=9, label="nearest")
axes.annotate("", (p, q), (a, b), arrowprops={"arrowstyle": "->", "lw": 2})
axes.set(xlim=(-1, 3), ylim=(-1, 3), xlabel="a", ylabel="b", aspect="equal")
axes.set_title("wanted: modulus 2. Dark: near", fontsize=11)
axes.legend(loc="upper left")
plt.show()

# %% [markdown]
# ## Train with it

# %%
digits = load("digits")
he = jax.nn.initializers.he_normal()
keys = jax.random.split(jax.random.key(0), 3)
shapes = {"even": (64, 32), "odd": (64, 32), "output": (32, 10)}
params = {n: he(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}


def network(params, x):
    return modulus(x @ params["even"], x @ params["odd"]) @ params["output"]


def loss_fn(params, x, y):
    return jnp.mean(pjax.cross_entropy(network(params, x), jax.nn.one_hot(y, 10)))


def accuracy(params):
    return jnp.mean(network(params, digits.test.x).argmax(-1) == digits.test.y)


optimizer = pjax.optim.Projection()
first = digits.train.x[:128], digits.train.y[:128]
state = optimizer.init(loss_fn, params, *first)
print(f"before: {accuracy(params):.1%} of the test rows")
for _, rows in zip(range(60), batch_rows(len(digits.train), 128, seed=0), strict=False):
    x, y = digits.train.x[rows], digits.train.y[rows]
    params, state, info = optimizer.update(loss_fn, params, state, x, y)
print(f"after 60 batches: {accuracy(params):.1%} of the test rows")
assert accuracy(params) > 0.9

# %% [markdown]
# [Adding a projection](../adding-a-projection.md) says what else a projection may be: of a
# primitive of JAX, inexact, or relaxed.
