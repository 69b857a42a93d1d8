# %% [markdown]
# # Your first network
#
# You train a small network on handwritten digits by projection: no learning rate, and no
# derivative of the network. Then you train it with Adam, tuned, on the same batches.
#
# You need `pip install ".[lab]"` in a clone of pjax. The digits come with scikit-learn.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import pjax
from pjax.lab.data import batch_rows, load
from pjax.lab.plots import COLOURS

digits = load("digits")
print(len(digits.train), "rows to train,", len(digits.validation), "to choose settings,")
print(len(digits.test), "to judge;", digits.train.x.shape[1], "pixels in a row")

# %% [markdown]
# ## The network and its loss
#
# A function of parameters and a batch that returns one number is all that pjax asks for. Any
# operation of JAX and any loss of Optax may be in it.


# %%
def network(params, x):
    hidden = jax.nn.relu(x @ params["w1"] + params["b1"])
    return hidden @ params["w2"]


def loss_fn(params, x, y):
    logits = network(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def accuracy(params, split):
    return float(jnp.mean(network(params, split.x).argmax(-1) == split.y))


he = jax.nn.initializers.he_normal()
keys = jax.random.split(jax.random.key(0))
initial = {
    "w1": he(keys[0], (64, 64)),
    "b1": jnp.zeros(64),
    "w2": he(keys[1], (64, 10)),
}
print(f"untrained: {accuracy(initial, digits.test):.1%} of the test rows")

# %% [markdown]
# What will become a constraint? `pjax.explain` says it before anything is trained.

# %%
STEPS, ROWS = 50, 128
first = digits.train.x[:ROWS], digits.train.y[:ROWS]
print(pjax.explain(loss_fn, initial, *first))

# %% [markdown]
# ## Train by projection
#
# The first call of `update` compiles, which takes some seconds. There is nothing to set.

# %%
order = batch_rows(len(digits.train), ROWS, seed=0)
batches = [next(order) for _ in range(STEPS)]

optimizer = pjax.optim.Projection()
params, state = initial, optimizer.init(loss_fn, initial, *first)
by_projection = []
for rows in batches:
    x, y = digits.train.x[rows], digits.train.y[rows]
    params, state, info = optimizer.update(loss_fn, params, state, x, y)
    by_projection.append(accuracy(params, digits.validation))
print(f"projection: {accuracy(params, digits.test):.1%} of the test rows")
assert accuracy(params, digits.test) > 0.94

# %% [markdown]
# ## The same with Adam
#
# Adam needs a learning rate. To be fair it gets the best of five, chosen on the validation
# rows; the test rows are looked at once, with that one. Batches and initial parameters are the
# same.


# %%
def train_adam(rate):
    adam = optax.adam(rate)

    @jax.jit
    def step(params, state, x, y):
        updates, state = adam.update(jax.grad(loss_fn)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    params, state, curve = initial, adam.init(initial), []
    for rows in batches:
        params, state = step(params, state, digits.train.x[rows], digits.train.y[rows])
        curve.append(accuracy(params, digits.validation))
    return params, curve


runs = {rate: train_adam(rate) for rate in (0.001, 0.003, 0.01, 0.03, 0.1)}
best = max(runs, key=lambda rate: runs[rate][1][-1])
for rate, (_, curve) in runs.items():
    print(f"rate {rate}: {curve[-1]:.1%} of the validation rows")
print(f"Adam, rate {best}: {accuracy(runs[best][0], digits.test):.1%} of the test rows")

# %%
figure, axes = plt.subplots()
steps = np.arange(1, STEPS + 1)
axes.plot(steps, by_projection, color=COLOURS["projection"], label="projection", lw=2)
axes.plot(steps, runs[best][1], color=COLOURS["adam"], label=f"Adam, rate {best}", lw=2)
for rate in runs:
    if rate != best:
        axes.plot(steps, runs[rate][1], color=COLOURS["adam"], alpha=0.3, lw=1, zorder=1)
axes.set(xlabel="batches", ylabel="validation accuracy", ylim=(0.6, 1))
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# Thin lines are Adam with the other rates. One seed and a small data set say little about
# which method ends higher; [benchmarks](../benchmarks.md) compare both with several seeds, on
# larger sets and deeper networks.
#
# Next: [a Flax model with checkpoints](flax_nnx.py), [an Equinox model](equinox_model.py), or
# [concepts](../concepts.md), which say what a projection is.
