"""Losses that are no classification's: by hand, learned, and with displacements."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import pjax
from benchmarks import accuracy
from benchmarks.accuracy_methods import METHODS
from benchmarks.accuracy_tasks import LossTask
from benchmarks.loss_models import ActorCritic, Autoencoder, Poisson

TASKS = [
    LossTask("digits", (8,), model="vae", batches=60),
    LossTask("rollouts", (8, 8), model="ppo", batches=60),
    LossTask("points", (8, 8), model="poisson", batches=60),
]


def first_batch(task: LossTask, size: int):
    rows = task.load(None)
    x, y = jax.tree.map(lambda leaf: jnp.asarray(leaf[:size]), (rows.train.x, rows.train.y))
    params = task.init(rows.num_features, rows.num_classes, seed=0)
    return params, task.batch(x, y, rows.num_classes, jax.random.key(2))


def dense(params, name, x):
    return x @ params[f"{name}_weight"] + params[f"{name}_bias"]


def test_the_autoencoder_by_hand() -> None:
    model = Autoencoder((8,), latent=2, variance=0.5)
    params = {name: leaf + 0.1 for name, leaf in model.init(jax.random.key(0)).items()}
    x = np.random.default_rng(0).uniform(size=(5, 64)).astype(np.float32)
    _, noise = model.batch(jnp.asarray(x), None, jax.random.key(1))
    code = np.maximum(dense(params, "encoder0", x), 0)
    mean, logs = dense(params, "mean0", code), dense(params, "log_variance0", code)
    z = mean + np.exp(logs / 2) * noise
    y = dense(params, "head0", np.maximum(dense(params, "decoder0", z), 0))
    divergence = (np.exp(logs) + mean**2 - 1 - logs).sum(1) / 2
    expected = np.mean(((x - y) ** 2).sum(1) + divergence)
    assert model.loss(params, (x, noise)) == pytest.approx(float(expected), rel=1e-4)


def test_the_actor_and_critic_by_hand() -> None:
    params, (x, rollout) = first_batch(TASKS[1], 50)
    # Further from the policy that acted, so that some ratios are clipped.
    params = {
        name: leaf + 0.5 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)
        for name, leaf in params.items()
    }
    y = x
    for layer in range(2):
        y = np.tanh(dense(params, f"trunk{layer}", y))
    logs = np.asarray(jax.nn.log_softmax(dense(params, "policy_head0", y)))
    ratio = np.exp(logs[np.arange(50), rollout["action"]] - rollout["log_probability"])
    assert np.any(ratio > 1.2)
    assert np.any(ratio < 0.8)
    gain = rollout["advantage"]
    surrogate = np.minimum(ratio * gain, np.clip(ratio, 0.8, 1.2) * gain)
    error = (dense(params, "value_head0", y)[:, 0] - rollout["return"]) ** 2 / 2
    entropy = -(np.exp(logs) * logs).sum(1)
    expected = np.mean(error - surrogate - 0.01 * entropy)
    assert ActorCritic((8, 8)).loss(params, (x, rollout)) == pytest.approx(
        float(expected), rel=1e-4
    )


def test_rollouts_are_of_the_policy_that_they_name() -> None:
    rows = TASKS[1].load(None)
    y = rows.train.y
    assert len(rows.train.x) == 4096
    probabilities = np.exp(y["log_probability"])
    # The sum over actions of π · 1 / π, estimated from those that were taken.
    assert np.mean(1 / probabilities) == pytest.approx(4, rel=0.1)
    assert abs(y["advantage"].mean()) < 0.1
    assert y["advantage"].std() == pytest.approx(1, rel=0.1)


def test_the_equation_has_the_solution_that_it_is_said_to_have() -> None:
    rows = TASKS[2].load(None)

    def solution(x):
        return jnp.sin(jnp.pi * x) + jnp.sin(3 * jnp.pi * x) / 4

    second = jax.vmap(jax.grad(jax.grad(solution)))(rows.test.x[:, 0])
    np.testing.assert_allclose(second, rows.test.y, atol=1e-3)
    model, params = Poisson((8,)), TASKS[2].init(1, 0, 0)
    params = {name: leaf for name, leaf in params.items() if "layer1" not in name}
    ends = [float(model.solution(params, jnp.float32(end))) for end in (0, 1)]
    bent = [jax.hessian(model.solution, 1)(params, x) for x in rows.test.x[:3, 0]]
    expected = np.mean((np.array(bent) - rows.test.y[:3]) ** 2) + 10 * np.sum(np.square(ends))
    found = model.loss(params, (rows.test.x[:3, 0], rows.test.y[:3]))
    assert found == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.model)
def test_adam_learns(task: LossTask) -> None:
    rows = task.load(None)
    first = task.init(rows.num_features, rows.num_classes, seed=0)
    before, again = task.evaluate(first, rows.validation)
    assert before == again
    run = accuracy.Trainer(None).train(task, METHODS["adam"], {"rate": 0.01, "cosine": 1.0}, 0)
    assert run.validation[-1].score < before - 0.3 * abs(before)
    lost = {name: leaf * jnp.nan for name, leaf in first.items()}
    assert task.evaluate(lost, rows.test) == (float("inf"), float("inf"))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.model)
def test_displacements_point_where_gradients_do(task: LossTask) -> None:
    params, batch = first_batch(task, 16)
    loss = task.loss("optax")
    value, moved = jax.jit(pjax.value_and_displacement(loss))(params, batch)
    expected, found = jax.value_and_grad(loss)(params, batch)
    assert value == pytest.approx(float(expected), rel=1e-4)
    moved, found = (ravel_pytree(tree)[0] for tree in (moved, found))
    assert moved @ found > 0.95 * jnp.linalg.norm(moved) * jnp.linalg.norm(found)
