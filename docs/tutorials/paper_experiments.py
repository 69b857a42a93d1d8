# %% [markdown]
# # The paper's experiments
#
# The paper (arXiv 2506.05878) trains networks with one constraint for each scalar product, and
# takes many steps of a solver on every batch. This notebook uses its interface, and compares its
# algorithms with the recommended `Projection` and with tuned Adam, on digits.
#
# You need `pip install ".[lab]"` in a clone of pjax.

# %%
import time

import jax
import matplotlib.pyplot as plt
import optax

import pjax
from pjax import nn
from pjax.lab.data import batch_rows, load
from pjax.lab.plots import COLOURS

digits = load("digits")

# %% [markdown]
# ## Modules and named arrays
#
# `pjax.nn` and `pjax.array` are the interface of the paper's library. Parameters are a
# dictionary by name.


# %%
class Network(nn.Module):
    """One hidden layer of 64."""

    def __init__(self) -> None:
        self.hidden = nn.Linear(64, 64)
        self.relu = nn.ReLU(64)
        self.output = nn.Linear(64, 10)

    def __call__(self, x):
        return self.output(self.relu(self.hidden(x)))


model = Network()
initial = model.init(jax.random.key(0))
print({name: value.shape for name, value in initial.items()})


def loss_fn(params, x, y):
    images = pjax.array(x, name="images")
    labels = pjax.array(jax.nn.one_hot(y, 10), name="labels")
    return pjax.cross_entropy(model.apply(params, images), labels).mean()


def accuracy(params, split):
    return float((model.apply(params, split.x).argmax(-1) == split.y).mean())


STEPS, ROWS = 30, 128
order = batch_rows(len(digits.train), ROWS, seed=0)
drawn = [next(order) for _ in range(STEPS)]
batches = [(digits.train.x[rows], digits.train.y[rows]) for rows in drawn]

# %% [markdown]
# ## The algorithms
#
# Alternating projections, cyclic projections and Douglas-Rachford take 50 steps on each batch.
# Their update gets a function of the parameters alone, with the batch in a closure. `Projection`
# makes one sweep for each batch. Seconds leave out the first batch, which compiles.


# %%
def follow(step):
    params, curve = initial, []
    for number, batch in enumerate(batches):
        if number == 1:
            start = time.perf_counter()
        params = jax.block_until_ready(step(params, *batch))
        curve.append((params, time.perf_counter() - start if number else 0.0))
    found = [accuracy(params, digits.validation) for params, _ in curve]
    return params, found, curve[-1][1]


def solver(make):
    optimizer = make(steps_per_update=50)

    def step(params, x, y):
        return optimizer.update(lambda p: loss_fn(p, x, y), params)[0]

    return step


def projection():
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, initial, *batches[0])

    def step(params, x, y):
        nonlocal state
        params, state, _ = optimizer.update(loss_fn, params, state, x, y)
        return params

    return step


def adam(rate):
    optimizer = optax.adam(rate)
    state = optimizer.init(initial)

    @jax.jit
    def compiled(params, state, x, y):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, x, y), state)
        return optax.apply_updates(params, updates), state

    def step(params, x, y):
        nonlocal state
        params, state = compiled(params, state, x, y)
        return params

    return step


tuning = {rate: follow(adam(rate)) for rate in (0.003, 0.01, 0.03, 0.1)}
best = max(tuning, key=lambda rate: tuning[rate][1][-1])
runs = {
    "projection": ("Projection", follow(projection())),
    "adam": (f"Adam, rate {best}", tuning[best]),
    "dr": ("Douglas-Rachford", follow(solver(pjax.optim.DouglasRachford))),
    "ap": (
        "alternating projections",
        follow(solver(pjax.optim.AlternatingProjections)),
    ),
    "cp": ("cyclic projections", follow(solver(pjax.optim.CyclicProjections))),
}
for name, (params, _, seconds) in runs.values():
    print(f"{name:24s} {accuracy(params, digits.test):.1%} of the test rows", end=", ")
    print(f"{1e3 * seconds / (STEPS - 1):.1f} ms for a batch")
    assert accuracy(params, digits.test) > 0.85

# %%
figure, axes = plt.subplots(figsize=(5, 4))
for method, (name, (_, curve, _)) in runs.items():
    style = "--" if method == "cp" else "-"
    axes.plot(range(1, STEPS + 1), curve, style, color=COLOURS[method], label=name, lw=2)
axes.set(xlabel="batches", ylabel="validation accuracy", ylim=(0.6, 1))
axes.legend(loc="lower right", fontsize=9)
plt.show()

# %% [markdown]
# Douglas-Rachford makes the most of each batch, and takes the longest. The time of a batch of so
# small a network is mostly that of the call; [benchmarks](../benchmarks.md) have larger ones.
#
# ## The experiments themselves
#
# Each experiment of the paper is one command. `pjax experiment list` shows them:

# %%
from pjax.lab.experiments import definition

for name in definition.names():
    experiment = definition.read(definition.find(name))
    print(f"pjax experiment run {name:10s}  # {experiment.shows}")

# %% [markdown]
# They use MNIST, CIFAR-10, HIGGS and tiny shakespeare; [data sets](../data.md) says where the
# files come from, and [the results](../results.md) have tables and figures of each.
