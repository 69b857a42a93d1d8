# %% [markdown]
# # Watching a solve
#
# The paper's solvers look for values that satisfy all constraints of one batch. This notebook
# looks inside such a solve: what the constraints are, how far each is from being satisfied after
# every step, and how it shows when no solution exists.
#
# You need `pip install ".[lab]"` in a clone of pjax.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import pjax
from pjax.lab.data import load
from pjax.lab.plots import COLOURS
from pjax.lab.problem_plots import draw_graph, residual_by_node

# %matplotlib inline
digits = load("digits")
x, y = digits.train.x[:32], jax.nn.one_hot(digits.train.y[:32], 10)
he = jax.nn.initializers.he_normal()
keys = jax.random.split(jax.random.key(0))
params = {"w1": he(keys[0], (64, 16)), "w2": he(keys[1], (16, 10))}


# %% [markdown]
# ## The constraints
#
# `margin_loss` vanishes where the right class of a row scores at least 1 and every other class at
# most −1. That is a constraint like the others: it can be satisfied or not.


# %%
def loss_fn(params):
    hidden = jax.nn.relu(x @ params["w1"])
    return pjax.margin_loss(hidden @ params["w2"], y)


problem = pjax.feasibility_problem(loss_fn, params, reflecting=True)
for node in problem.graph.nodes:
    print(node.colour, node.index, node.name)
print(f"{problem.sizes().edge_variables:,} edge variables")

# %% [markdown]
# Nodes of one colour share no edge, so that all of them are projected at the same time. A is
# blue, B is orange:

# %%
draw_graph(problem.graph, "layers")

# %% [markdown]
# ## Residuals by node
#
# `pjax.profile` runs a solver and measures, after each step, the distance of the point to every
# node's constraint. Where a line stays high, there is what the solve is waiting for.

# %%
solver = pjax.solvers.DouglasRachford(steps=600)
profile = pjax.profile(problem, solver)
for name, values in zip(profile.names, np.asarray(profile.residual).T, strict=True):
    print(f"{name:24s} {values[0]:9.2e} at the first step, {values[-1]:9.2e} at the last")

# %%
residual_by_node(profile)

# %% [markdown]
# ## Training steps and their verdict
#
# `optimizer.update` runs such a solve and returns the consensus of the parameters with the
# history. The history has a verdict.

# %%
optimizer = pjax.optim.DouglasRachford(steps_per_update=600, prox_step=1e6)
moved, history = optimizer.update(loss_fn, params)
print(history)
print("rows satisfied:", int(jnp.sum(loss_fn(moved) < 1e-3)), "of", len(x))

# %% [markdown]
# ## Infeasibility
#
# A linear classifier of `d` numbers separates about `2d` rows whose labels are random (Cover,
# 1965), and no more. Here `d` is 20: 16 rows have a solution, 128 have none. `prox_step` is
# large, so that the margin is all but a hard constraint.


# %%
random = np.random.default_rng(0)
points = jnp.asarray(random.normal(size=(128, 20)), jnp.float32)
labels = jax.nn.one_hot(jnp.asarray(random.integers(0, 2, 128)), 2)


def solve(make, count):
    optimizer = make(steps_per_update=3000, prox_step=1e6, check=False)
    found, history = optimizer.update(
        lambda p: pjax.margin_loss(points[:count] @ p["w"], labels[:count]),
        {"w": jnp.zeros((20, 2))},
    )
    held = pjax.margin_loss(points[:count] @ found["w"], labels[:count]) < 1e-3
    return history, int(held.sum())


figure, axes = plt.subplots()
for method, name, make in (
    ("ap", "alternating projections", pjax.optim.AlternatingProjections),
    ("dr", "Douglas-Rachford", pjax.optim.DouglasRachford),
):
    for count, style in ((16, "-"), (128, "--")):
        history, held = solve(make, count)
        label = f"{name}, {count} rows"
        axes.loglog(history.residual, style, color=COLOURS[method], label=label)
        print(f"{label}: {history.verdict}, {held} of {count} satisfied")
axes.set(xlabel="steps", ylabel="residual", ylim=(1e-6, None))
axes.legend(fontsize=9)
plt.show()

# %% [markdown]
# With 16 rows the residual goes to zero. With 128 it falls a little and stays far from zero: a
# gap between the two sets. Alternating projections settle there, and the verdict is
# `infeasible`. The residual of Douglas-Rachford still creeps down after 3000 steps, and its
# verdict is `converging`: a verdict describes the steps that were taken, and proves nothing.
#
# [Solvers and their residuals](../solvers.md) says
# what each verdict means, and [the paper's experiments](../results.md) have this one on HIGGS.
