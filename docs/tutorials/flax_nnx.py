# %% [markdown]
# # Your Flax NNX model, with checkpoints and TensorBoard
#
# A Flax NNX model trains by projection as it is. This notebook writes its curves for
# TensorBoard, saves a checkpoint on the way, and goes on from it as if nothing had happened.
#
# You need `pip install ".[lab,examples,tensorboard]"` in a clone of pjax.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tensorboardX import SummaryWriter

import pjax
from pjax.lab.data import batch_rows, load

digits = load("digits")
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The model
#
# Nothing here is of pjax. The batch norm has running statistics, which are no parameters.


# %%
class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.output = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.norm(self.hidden(x))))


model = Network(nnx.Rngs(0))
definition, params, statistics = nnx.split(model, nnx.Param, ...)

# %% [markdown]
# ## The loss
#
# `nnx.merge` makes the model anew inside the loss, with a copy of the statistics, which change
# there. `has_aux=True` says that the loss returns
# something beside its number: here the new statistics, which come back as `info.aux`.


# %%
def loss_fn(params, statistics, x, y):
    model = nnx.merge(definition, params, statistics, copy=True)
    model.train()
    logits = model(x)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return loss, nnx.split(model, nnx.Param, ...)[2]


@jax.jit
def accuracy(params, statistics, split_x, split_y):
    model = nnx.merge(definition, params, statistics)
    model.eval()
    return jnp.mean(model(split_x).argmax(-1) == split_y)


def batch(rows):
    return jnp.asarray(digits.train.x[rows]), jnp.asarray(digits.train.y[rows])


STEPS = 60
order = batch_rows(len(digits.train), 128, seed=0)
batches = [next(order) for _ in range(STEPS)]

optimizer = pjax.optim.Projection(has_aux=True)
state = optimizer.init(loss_fn, params, statistics, *batch(batches[0]))

# %% [markdown]
# ## Train, record, save
#
# The state of `Projection` is a pytree of arrays, so that any library of checkpoints can hold
# it. What a run needs to go on are parameters, statistics and this state.


# %%
def train(params, statistics, state, start, stop, writer):
    for number in range(start, stop):
        params, state, info = optimizer.update(
            loss_fn, params, state, statistics, *batch(batches[number])
        )
        statistics = info.aux
        writer.add_scalar("loss", float(info.loss), number)
        if number % 10 == 9:
            validation = digits.validation.x, digits.validation.y
            found = accuracy(params, statistics, *validation)
            writer.add_scalar("validation accuracy", float(found), number)
            print(f"batch {number + 1}: loss {info.loss:.3f}, validation {found:.1%}")
    return params, statistics, state


with SummaryWriter(str(folder / "tensorboard"), write_to_disk=True) as writer:
    middle = train(params, statistics, state, 0, 30, writer)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoint", {"run": middle})
    trained = train(*middle, 30, STEPS, writer)

test = digits.test.x, digits.test.y
print(f"test accuracy: {accuracy(*trained[:2], *test):.1%}")
assert accuracy(*trained[:2], *test) > 0.93

# %% [markdown]
# `tensorboard --logdir FOLDER/tensorboard` shows the curves (`pip install tensorboard`).
#
# ## Go on from the checkpoint
#
# A new process would make the model, and `optimizer.init`, as above; they give the structure
# into which the arrays are read. The rest of the run is the same, bit for bit.

# %%
fresh = (
    params,
    statistics,
    optimizer.init(loss_fn, params, statistics, *batch(batches[0])),
)
with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(folder / "checkpoint", {"run": fresh})["run"]

with SummaryWriter(str(folder / "resumed"), write_to_disk=True) as writer:
    resumed = train(*restored, 30, STEPS, writer)
for one, other in zip(jax.tree.leaves(trained), jax.tree.leaves(resumed), strict=True):
    np.testing.assert_array_equal(one, other)
print("the same parameters, statistics and state")

# %% [markdown]
# ## Back to the module

# %%
nnx.update(model, *resumed[:2])
model.eval()
print(model(jnp.asarray(digits.test.x[:5])).argmax(-1), digits.test.y[:5])

# %% [markdown]
# `pjax train` does all of this for the networks of the command line, and a run that was killed
# goes on: see [the folder of a run](../runs.md).
