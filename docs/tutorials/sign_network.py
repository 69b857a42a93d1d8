# %% [markdown]
# # A network of signs, and its deployment
#
# Weights and activations of this network are signs, so that a trained network is a few kilobytes
# of bits, and its products count bits. Such a network has no gradient in its hidden layer:
# the derivative of a sign is zero. A projection needs no derivative. It asks each sign for a side,
# and what is before the sign moves there.
#
# You need `pip install ".[lab]"` in a clone of pjax.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import pjax
from pjax.lab.data import batch_rows, load

# %% [markdown]
# ## The network
#
# Two hidden layers. The network takes the signs of its weights; the parameters behind them,
# the *latent weights*, stay real numbers while it trains. Afterwards only the biases and the last
# layer are numbers.


# %%
digits = load("digits")
HIDDEN, STEPS, ROWS = 128, 160, 128


def signs(x):
    return jnp.where(x > 0, 1.0, -1.0)


def network(params, x):
    h1 = signs(x @ signs(params["w1"]) + params["b1"])
    h2 = signs(h1 @ signs(params["w2"]) + params["b2"])
    return h2 @ params["w3"] + params["b3"]


def loss_fn(params, x, y):
    logits = network(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(params, split):
    return float(jnp.mean(network(params, split.x).argmax(-1) == split.y))


keys = jax.random.split(jax.random.key(0), 3)
initial = {
    "w1": jax.random.normal(keys[0], (64, HIDDEN)) / 2,
    "b1": jnp.zeros(HIDDEN),
    "w2": jax.random.normal(keys[1], (HIDDEN, HIDDEN)) / 2,
    "b2": jnp.zeros(HIDDEN),
    "w3": jax.random.normal(keys[2], (HIDDEN, 10)) / np.sqrt(HIDDEN),
    "b3": jnp.zeros(10),
}
x, y = digits.train.x, digits.train.y
gradient = jax.grad(loss_fn)(initial, x[:ROWS], y[:ROWS])
for name in ("w1", "w2", "w3"):
    print(f"largest entry of the gradient of {name}: {jnp.abs(gradient[name]).max():.3f}")

# %% [markdown]
# ## Training
#
# The optimiser is the one for any other network. A relaxation that falls to zero lets the last
# signs settle; it is optional.
#
# What would the hidden layers be worth untrained? Adam moves only the last layer, whose gradient
# is not zero; it is the control, with the best of four rates on the validation rows.

# %%
order = batch_rows(len(y), ROWS, seed=0)
batches = [next(order) for _ in range(STEPS)]

optimizer = pjax.optim.Projection()
params, state = initial, optimizer.init(loss_fn, initial, x[:ROWS], y[:ROWS])
for number, rows in enumerate(batches):
    relaxation = 0.5 * (1 + np.cos(np.pi * number / STEPS))
    params, state, info = optimizer.update(
        loss_fn, params, state, x[rows], y[rows], relaxation=relaxation
    )
trained = accuracy(params, digits.test)
print(f"projection: {trained:.1%} of the test rows")


# %%
def train_adam(rate):
    adam = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    @jax.jit
    def step(params, state, x, y):
        updates, state = adam.update(jax.grad(loss_fn)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    params, state = initial, adam.init(initial)
    for rows in batches:
        params, state = step(params, state, x[rows], y[rows])
    return params


runs = [train_adam(rate) for rate in (0.003, 0.01, 0.03, 0.1)]
control = max(runs, key=lambda params: accuracy(params, digits.validation))
print(f"last layer only, by Adam: {accuracy(control, digits.test):.1%}")
assert trained > 0.9

# %% [markdown]
# [Signs and quantizers](../benchmarks.md#signs-and-quantizers) compares with the usual way, a
# tuned straight-through estimator, on MNIST.
#
# ## Deployment
#
# In the second layer, rows of ±1 become bits. Two rows of `n` signs that differ in `d` places have
# the product `n − 2d`, and `d` is the number of ones of their exclusive or. A bias becomes a
# threshold. `pjax.export.pack` writes all that into one file, and `pjax.export.load` runs it with
# NumPy alone ([packed networks](../export.md)).

# %%
path = Path(tempfile.mkdtemp(), "digits.npz")
report = pjax.export.pack(network, params, digits.test.x, path)
print(report)

# %% [markdown]
# Pixels are multiples of 1/16 here, so that the sums of the first layer are exact. The last layer
# has real weights: its sums are rounded in another order, and the labels are the same.

# %%
deployed = pjax.export.load(path)
answers = deployed(digits.test.x).argmax(-1)
np.testing.assert_array_equal(answers, network(params, digits.test.x).argmax(-1))
print(f"deployed: {np.mean(answers == digits.test.y):.1%} of the test rows, the same answers")

# %% [markdown]
# What the first hidden units look for, as signs of their 64 weights:

# %%
figure, axes = plt.subplots(2, 6, figsize=(5, 1.9))
for unit, place in enumerate(axes.flat):
    place.imshow(signs(params["w1"])[:, unit].reshape(8, 8), cmap="gray")
    place.set_axis_off()
plt.show()
