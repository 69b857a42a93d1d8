# %% [markdown]
# # Hard constraints
#
# A penalty in the loss asks for something; how much of it one gets depends on a weight. A set
# decides: parameters of `pjax.optim.Projection(sets=...)` are in their sets after every update,
# to the last digit. What does that cost? Here are two constraints, each beside a penalty whose
# weight is chosen on validation rows.
#
# You need `pip install ".[lab]"` in a clone of pjax.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_diabetes

import pjax
from pjax.lab.data import load

# %% [markdown]
# Both ways of training have the same optimiser, batches and schedule. The weight is an argument
# of the loss, so that all weights share one compiled program.


# %%
def train(loss, params, x, y, weights, sets=None, updates=200, rows=128):
    optimizer = pjax.optim.Projection(sets=sets, check=False)
    state = optimizer.init(loss, params, x[:rows], y[:rows], 0.0)
    order = jax.random.randint(jax.random.key(0), (updates, rows), 0, len(x))
    schedule = jnp.asarray(0.5 * (1 + np.cos(np.pi * np.arange(updates) / updates)))

    @jax.jit
    def run(weight):
        def step(carry, batch):
            own, relaxation = batch
            moved = optimizer.update(loss, *carry, x[own], y[own], weight, relaxation=relaxation)
            return moved[:2], None

        return jax.lax.scan(step, (params, state), (order, schedule))[0][0]

    return [run(weight) for weight in weights]


WEIGHTS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]


# %% [markdown]
# Of the penalties that cost at most 2 % more than the set on the validation rows, the fair one is
# the largest: it is violated least. Costs that are printed are those of the test rows.


# %%
def choose(inside, tried, cost):
    costs = [cost(params, "validation") for params in tried]
    good = [n for n, found in enumerate(costs) if found <= 1.02 * cost(inside, "validation")]
    return max(good) if good else int(np.argmin(costs))


def show(inside, tried, cost, violation):
    number = choose(inside, tried, cost)
    for name, params in (("set", inside), (f"penalty {WEIGHTS[number]}", tried[number])):
        print(f"{name}: cost {cost(params, 'test'):.3f}, violation {violation(params):.1e}")
    return tried[number]


# %% [markdown]
# ## Parts
#
# An autoencoder of digits whose weights are not negative: a digit is a sum of parts, and no part
# takes another away.

# %%
digits = load("digits")
x, y = jnp.asarray(digits.train.x), jnp.asarray(digits.train.y)
initial = {
    "in": jnp.abs(jax.random.normal(jax.random.key(0), (64, 16))) / 8,
    "out": jnp.abs(jax.random.normal(jax.random.key(1), (16, 64))) / 4,
}


def coded(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]


def autoencoder(params, x, y, weight):
    return jnp.mean(pjax.squared_error(coded(params, x), x))


def with_penalty(params, x, y, weight):
    negative = sum(jnp.sum(jnp.square(jnp.minimum(w, 0))) for w in params.values())
    return autoencoder(params, x, y, weight) + weight * negative


def unexplained(params, split):
    x = getattr(digits, split).x
    return float(jnp.sum(jnp.square(coded(params, x) - x)) / np.sum(np.square(x - x.mean(0))))


def most_negative(params):
    return max(0.0, *(float(jnp.max(-w)) for w in params.values()))


(inside,) = train(autoencoder, initial, x, y, [0.0], pjax.sets.Nonnegative())
tried = train(with_penalty, initial, x, y, WEIGHTS)
penalised = show(inside, tried, unexplained, most_negative)
assert most_negative(inside) == 0

# %% [markdown]
# The penalty explains more, since its weights are not the ones asked for: some are negative.
# Where a violation of that size does no harm, take the penalty. The parts of the set (above) and
# of the penalty (below; negative weights are red):

# %%
figure, axes = plt.subplots(2, 8, figsize=(7, 2))
for row, params in zip(axes, (inside, penalised), strict=True):
    largest = float(jnp.max(jnp.abs(params["out"])))
    for place, part in zip(row, params["out"], strict=False):
        image = part.reshape(8, 8)
        place.imshow(image, cmap="RdBu", vmin=-largest, vmax=largest)
        place.set_axis_off()
plt.show()

# %% [markdown]
# ## A curve that never falls
#
# How a disease proceeds, from the body mass alone, in a table of 442 patients: heights at knots,
# between which the curve is straight. More body mass is not to predict less, not even by a bit.

# %%
measured, target = load_diabetes(return_X_y=True)
order = np.random.default_rng(0).permutation(len(target))
mass = measured[order, 2] * 20
progress = jnp.asarray((target[order] - 152) / 77, jnp.float32)[:, None]
knots = np.linspace(-2.5, 3.5, 16)
hats = jnp.asarray(np.maximum(1 - np.abs(mass[:, None] - knots) / (knots[1] - knots[0]), 0))
hats = hats.astype(jnp.float32)
rows = {"train": slice(0, 222), "validation": slice(222, 332), "test": slice(332, 442)}


def regression(params, x, y, weight):
    return jnp.mean(pjax.squared_error(x @ params["heights"], y))


def without_falls(params, x, y, weight):
    falls = jnp.sum(jnp.square(jnp.maximum(-jnp.diff(params["heights"], axis=0), 0)))
    return regression(params, x, y, weight) + weight * falls


def mean_square(params, split):
    error = hats[rows[split]] @ params["heights"] - progress[rows[split]]
    return float(jnp.mean(jnp.square(error)))


def largest_fall(params):
    return max(0.0, float(jnp.max(-jnp.diff(params["heights"], axis=0))))


flat = {"heights": jnp.zeros((16, 1))}
batch = hats[rows["train"]], progress[rows["train"]]
(rising,) = train(regression, flat, *batch, [0.0], pjax.sets.Monotone(axis=0))
tried = train(without_falls, flat, *batch, WEIGHTS)
asked = show(rising, tried, mean_square, largest_fall)
assert largest_fall(rising) == 0

# %%
figure, axes = plt.subplots()
axes.plot(mass, progress[:, 0], ".", color="0.8")
for params, name in ((rising, "set"), (asked, "penalty")):
    axes.plot(knots, params["heights"][:, 0], lw=2, label=name)
axes.set(xlabel="body mass, standardised", ylabel="progress")
axes.legend()
plt.show()

# %% [markdown]
# The penalty is convex here, comes close to the set, and costs as little. What is left of the falls
# is small, and is not nothing: a check that demands a curve without one fails.
#
# `examples/hard_constraints.py` has two more: a classifier with a Lipschitz bound, and a budget
# that predictions keep. [Sets](../sets.md) lists all sets.
