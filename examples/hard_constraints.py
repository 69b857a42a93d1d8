"""Four constraints that hold exactly, each beside a penalty in the loss.

A nonnegative autoencoder, a classifier with a Lipschitz bound, a monotone regression, and a budget
for predictions. Both sides of each pair have the same optimiser, network, batches and schedule. The
weight of a penalty is chosen on validation rows: of those that cost at most 2 % more than the set
does there, the largest, which is violated least; if there is none, the one that costs least. What
is printed is of the test rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_diabetes

import pjax
from pjax import sets
from pjax.lab.data import load

WEIGHTS = 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / np.sqrt(shape[0])


def train(loss, params, x, y, weights, chosen=None, updates=200, rows=128):
    """Parameters for each weight of the penalty that is in the loss; `chosen` are their sets."""
    optimizer = pjax.optim.Projection(sets=chosen, check=False)
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


def compare(name, loss, penalty, params, x, y, chosen, cost, violation):
    """Prints cost and violation of the set, and of the penalty.

    `cost` is of parameters, and whether the test rows are meant or those for validation.
    """

    def penalised(params, x, y, weight):
        return loss(params, x, y) + weight * penalty(params)

    (inside,) = train(lambda params, x, y, _: loss(params, x, y), params, x, y, [0.0], chosen)
    tried = train(penalised, params, x, y, WEIGHTS)
    costs = [cost(found, False) for found in tried]
    good = [n for n, found in enumerate(costs) if found <= 1.02 * cost(inside, False)]
    number = max(good) if good else int(np.argmin(costs))
    print(f"{name} (penalty of weight {WEIGHTS[number]})")
    for kind, found in (("set", inside), ("penalty", tried[number])):
        print(f"  {kind:8} cost {cost(found, True):.4f}  violation {violation(found):.2g}")
    assert violation(inside) <= 2e-6


digits = load("digits")
of_digits = [jnp.asarray(split.x) for split in (digits.validation, digits.test)]
labels = [jnp.asarray(split.y) for split in (digits.validation, digits.test)]


# Parts that are added, and none that takes another away.
def coded(params, x):
    return jax.nn.relu(x @ params["in"]) @ params["out"]


def autoencoder(params, x, y):
    return jnp.mean(pjax.squared_error(coded(params, x), x))


def negative(params):
    return sum(jnp.sum(jnp.square(jnp.minimum(w, 0))) for w in params.values())


def unexplained(params, test):
    x = of_digits[test]
    return float(jnp.sum(jnp.square(coded(params, x) - x)) / jnp.sum(jnp.square(x - x.mean(0))))


compare(
    "nonnegative autoencoder: share not explained, most negative weight",
    autoencoder,
    negative,
    {"in": jnp.abs(normal(0, 64, 16)), "out": jnp.abs(normal(1, 16, 64))},
    jnp.asarray(digits.train.x),
    jnp.asarray(digits.train.y),
    sets.Nonnegative(),
    unexplained,
    lambda params: max(0.0, *(float(jnp.max(-w)) for w in params.values())),
)


# Logits that move no farther than their input: each matrix has a spectral norm of at most 1.
def logits(params, x):
    return jax.nn.relu((x - 0.3) @ params["w1"]) @ params["w2"]


def classifier(params, x, y):
    return jnp.mean(pjax.cross_entropy(8 * logits(params, x), jax.nn.one_hot(y, 10)))


def excess(params):
    return sum(jnp.square(jnp.maximum(jnp.linalg.norm(w, 2) - 1, 0)) for w in params.values())


def errors(params, test):
    return 1 - float(jnp.mean(logits(params, of_digits[test]).argmax(-1) == labels[test]))


def beyond_one(params):
    norms = [np.linalg.norm(np.asarray(w, np.float64), 2) for w in params.values()]
    return max(float(np.prod(norms)) - 1, 0.0)


compare(
    "Lipschitz bound of 1: share of errors, bound beyond 1",
    classifier,
    excess,
    {"w1": normal(2, 64, 64), "w2": normal(3, 64, 10)},
    jnp.asarray(digits.train.x),
    jnp.asarray(digits.train.y),
    sets.Ball(1.0, "spectral"),
    errors,
    beyond_one,
)

# A table of patients: 222 rows to learn, 110 for validation, 110 for the test.
measured, target = load_diabetes(return_X_y=True)
order = np.random.default_rng(0).permutation(len(target))
features = jnp.asarray(measured[order] * 20, jnp.float32)
progress = jnp.asarray((target[order] - 152) / 77, jnp.float32)[:, None]
PARTS = slice(222, 332), slice(332, 442)


# A rise with body mass and with blood pressure: heights at knots, in ascending order.
KNOTS = jnp.linspace(-2.5, 3.5, 16)
hats = jnp.maximum(1 - jnp.abs(features[:, [2, 3], None] - KNOTS) / (KNOTS[1] - KNOTS[0]), 0)


def height(params, x):
    return jnp.sum(x * params["heights"], (1, 2))[:, None] + params["shift"]


def regression(params, x, y):
    return jnp.mean(pjax.squared_error(height(params, x), y))


def falls(params):
    return jnp.sum(jnp.square(jnp.maximum(-jnp.diff(params["heights"]), 0)))


def mean_square(params, test):
    rows = PARTS[test]
    return float(jnp.mean(jnp.square(height(params, hats[rows]) - progress[rows])))


compare(
    "monotone regression: mean square, largest fall",
    regression,
    falls,
    {"heights": jnp.zeros((2, 16)), "shift": jnp.zeros(1)},
    hats[:222],
    progress[:222],
    {"heights": sets.Monotone(), "shift": None},
    mean_square,
    lambda params: max(0.0, float(jnp.max(-jnp.diff(params["heights"])))),
)

# A budget for all rows to predict, whose features are known: predictions have the mean 0.2.
BUDGET = 0.2
wide = jnp.concatenate([features, jnp.ones((442, 1))], 1)
mean_row = wide[222:].mean(0)


def planned(params, x, y):
    return jnp.mean(pjax.squared_error(x @ params["w"], y))


def surplus(params):
    return jnp.sum(jnp.square(mean_row @ params["w"] - BUDGET))


def planned_error(params, test):
    rows = PARTS[test]
    return float(jnp.mean(jnp.square(wide[rows] @ params["w"] - progress[rows])))


compare(
    "budget of predictions: mean square, distance from the budget",
    planned,
    surplus,
    {"w": jnp.zeros((11, 1))},
    wide[:222],
    progress[:222],
    sets.LinearEqualities(np.asarray(mean_row), BUDGET, axis=0),
    planned_error,
    lambda params: float(jnp.abs(jnp.mean(wide[222:] @ params["w"]) - BUDGET)),
)
