# %% [markdown]
# # Your Equinox model
#
# An Equinox model is a pytree, so it is the parameters. This notebook trains one under
# `jax.vmap`: by projection, and with an optimiser of Optax, which takes a *displacement* where
# it takes a gradient.
#
# You need `pip install ".[lab,examples]"` in a clone of pjax.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import pjax
from pjax.lab.data import batch_rows, load

digits = load("digits")
STEPS = 150
order = batch_rows(len(digits.train), 128, seed=0)
batches = [next(order) for _ in range(STEPS)]


def batch(rows):
    return jnp.asarray(digits.train.x[rows]), jnp.asarray(digits.train.y[rows])


# %% [markdown]
# ## The model and its loss
#
# An Equinox model takes one row; `jax.vmap` makes it take a batch.

# %%
initial = eqx.nn.MLP(64, 10, width_size=64, depth=2, key=jax.random.key(0))


def loss_fn(model, x, y):
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@eqx.filter_jit
def accuracy(model, split_x, split_y):
    return jnp.mean(jax.vmap(model)(split_x).argmax(-1) == split_y)


test, validation = (
    (jnp.asarray(split.x), jnp.asarray(split.y)) for split in (digits.test, digits.validation)
)

# %% [markdown]
# ## By projection
#
# The arrays of floating-point numbers in the module move; its functions and sizes stay.

# %%
projection = pjax.optim.Projection()
model, state = initial, projection.init(loss_fn, initial, *batch(batches[0]))
for number, rows in enumerate(batches):
    model, state, info = projection.update(loss_fn, model, state, *batch(rows))
    if number + 1 in (10, 50, STEPS):
        print(f"{number + 1} batches: {accuracy(model, *test):.1%} of the test rows")
assert accuracy(model, *test) > 0.94

# %% [markdown]
# ## With Optax
#
# `pjax.value_and_displacement` stands where `eqx.filter_value_and_grad` does. It has the scale
# of a gradient: optimiser, schedule and clipping stay as they are. So does the need of a
# learning rate, which is chosen here on the validation rows for each of the two.


# %%
def train(value_and_moves, rate):
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(rate, STEPS)),
    )

    @eqx.filter_jit
    def step(model, state, x, y):
        _, moves = value_and_moves(model, x, y)
        updates, state = optimizer.update(moves, state)
        return eqx.apply_updates(model, updates), state

    model, state = initial, optimizer.init(eqx.filter(initial, eqx.is_inexact_array))
    for rows in batches:
        model, state = step(model, state, *batch(rows))
    return model


for name, value_and_moves in (
    ("displacements", pjax.value_and_displacement(loss_fn)),
    ("gradients", eqx.filter_value_and_grad(loss_fn)),
):
    runs = {rate: train(value_and_moves, rate) for rate in (0.003, 0.01, 0.03)}
    best = max(runs, key=lambda rate: accuracy(runs[rate], *validation))
    found = accuracy(runs[best], *test)
    print(f"Adam on {name}, rate {best}: {found:.1%} of the test rows")
    assert found > 0.94

# %% [markdown]
# In a network of relus both have nearly the same moves. They part where a gradient says
# nothing: [a network of signs](sign_network.py).
