# %% [markdown]
# # A character model
#
# A recurrent network reads a text and guesses each next character. It trains by projection as
# any other network does: the loop is in the model, and pjax needs to know nothing of it.
#
# The text is one that every Python has: the language reference behind `help()`, half a million
# characters. You need `pip install ".[lab]"` in a clone of pjax.

# %%
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import pjax
from pjax.lab.plots import COLOURS

text = "\n".join(topics[name] for name in sorted(topics))
symbols = sorted(set(text))
tokens = np.searchsorted(symbols, list(text)).astype(np.int32)
print(f"{len(text):,} characters, {len(symbols)} of them different")

# %% [markdown]
# ## Windows
#
# Training rows are windows of 32 characters from the first 90 % of the text. The next 5 %
# choose Adam's rate, and the last 5 % judge.

# %%
LENGTH, ROWS, STEPS = 32, 32, 250


def windows(piece):
    count = (len(piece) - 1) // LENGTH
    start = piece[: count * LENGTH].reshape(count, LENGTH)
    return start, piece[1 : count * LENGTH + 1].reshape(count, LENGTH)


cut = [int(len(tokens) * share) for share in (0.9, 0.95)]
train, validation, test = (windows(piece) for piece in np.split(tokens, cut))
random = np.random.default_rng(0)
chosen = random.permutation(len(train[0]))[: STEPS * ROWS].reshape(STEPS, ROWS)
batches = jnp.asarray(train[0][chosen]), jnp.asarray(train[1][chosen])

# %% [markdown]
# ## The network
#
# An embedding, a cell, and a readout. The state goes on beside a skip.

# %%
WIDTH = 64
he, lecun = jax.nn.initializers.he_normal(), jax.nn.initializers.lecun_normal()
keys = jax.random.split(jax.random.key(0), 4)
initial = {
    "embedding": jax.random.normal(keys[0], (len(symbols), WIDTH)),
    "w1": he(keys[1], (2 * WIDTH, WIDTH)),
    "b1": jnp.zeros(WIDTH),
    "w2": lecun(keys[2], (3 * WIDTH, WIDTH)),
    "b2": jnp.zeros(WIDTH),
    "readout": lecun(keys[3], (WIDTH, len(symbols))),
}


def cell(params, state, entry):
    both = jnp.concatenate([state, entry], axis=-1)
    inner = jax.nn.relu(both @ params["w1"] + params["b1"])
    return jnp.concatenate([inner, both], axis=-1) @ params["w2"] + params["b2"]


def network(params, x):
    def step(state, entry):
        state = cell(params, state, entry)
        return state, state

    entries = params["embedding"][x].swapaxes(0, 1)
    _, states = jax.lax.scan(step, jnp.zeros((len(x), WIDTH)), entries)
    return states.swapaxes(0, 1) @ params["readout"]


def loss_fn(params, x, y):
    logits = network(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params, piece):
    return jnp.mean(network(params, piece[0]).argmax(-1) == piece[1])


# %% [markdown]
# ## Training
#
# Both train on the same batches, and both with a cosine: a factor on the moves that falls from 1
# to 0. Adam has the best of three rates on the validation windows.

# %%
optimizer = pjax.optim.Projection()
params = initial
state = optimizer.init(loss_fn, params, batches[0][0], batches[1][0])
by_projection = []
for number, (x, y) in enumerate(zip(*batches, strict=True)):
    relaxation = 0.5 * (1 + np.cos(np.pi * number / STEPS))
    params, state, info = optimizer.update(loss_fn, params, state, x, y, relaxation=relaxation)
    by_projection.append(float(info.loss))
print(f"projection: {accuracy(params, test):.1%} of the test characters")


# %%
def train_adam(rate):
    adam = optax.adam(optax.cosine_decay_schedule(rate, STEPS))

    def step(carry, batch):
        params, state = carry
        loss, gradient = jax.value_and_grad(loss_fn)(params, *batch)
        updates, state = adam.update(gradient, state)
        return (optax.apply_updates(params, updates), state), loss

    start = initial, adam.init(initial)
    (params, _), losses = jax.jit(lambda: jax.lax.scan(step, start, batches))()
    return params, losses


runs = {rate: train_adam(rate) for rate in (0.003, 0.01, 0.03)}
best = max(runs, key=lambda rate: accuracy(runs[rate][0], validation))
print(f"Adam, rate {best}: {accuracy(runs[best][0], test):.1%} of the test characters")
common = np.mean(test[1] == np.bincount(tokens[: cut[0]]).argmax())
print(f"always the most common character: {common:.1%}")
assert accuracy(params, test) > 0.3


# %%
def smooth(losses):
    return np.convolve(losses, np.ones(10) / 10, mode="valid")


figure, axes = plt.subplots()
axes.plot(smooth(by_projection), color=COLOURS["projection"], label="projection")
axes.plot(smooth(runs[best][1]), color=COLOURS["adam"], label=f"Adam, rate {best}")
axes.set(xlabel="batches", ylabel="loss of the next batch", ylim=(None, 3.5))
axes.legend()
plt.show()

# %% [markdown]
# ## Let it write
#
# The characters that the network finds likely, one after the other.


# %%
@jax.jit
def write(params, start, key):
    def step(carry, key):
        state, token = carry
        state = cell(params, state, params["embedding"][token])
        token = jax.random.categorical(key, state @ params["readout"] / 0.6)
        return (state, token), token

    return jax.lax.scan(step, (jnp.zeros(WIDTH), start), jax.random.split(key, 300))[1]


written = write(params, symbols.index("\n"), jax.random.key(1))
print("".join(symbols[token] for token in written))

# %% [markdown]
# `pjax train --dataset tinyshakespeare` trains such a network on Shakespeare;
# [benchmarks](../benchmarks.md) compare several networks on it.
