"""The training loop, the baselines, and the models of the laboratory."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pjax
from pjax.lab import baselines
from pjax.lab.data import Dataset, Split, batch_rows, load
from pjax.lab.models import MLP
from pjax.lab.train import Outcome, Projection, train

SETTINGS: dict[str, Any] = {"steps": 12, "batch_size": 64, "seed": 0, "measure_every": 5}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load("digits")


@pytest.fixture(scope="module")
def model() -> MLP:
    return MLP(64, 10, hidden=(16,))


@pytest.mark.parametrize(
    ("hidden", "skip", "read"),
    [((), False, 4), ((), True, 4), ((5,), True, 5), ((5, 6), False, 6), ((5, 6), True, 11)],
)
def test_mlp_computes_its_layers(hidden, skip, read) -> None:
    network = MLP(4, 3, hidden, skip)
    params = network.init(jax.random.key(0))
    assert params["output.weight"].shape == (read, 3)
    params = {name: value + 0.1 for name, value in params.items()}
    x = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    outputs = [x]
    for i in range(len(hidden)):
        total = outputs[-1] @ params[f"dense.{i}.weight"] + params[f"relu.{i}.bias"]
        outputs.append(np.maximum(total, 0))
    last = np.concatenate(outputs[1:], -1) if skip and hidden else outputs[-1]
    expected = last @ params["output.weight"]
    np.testing.assert_allclose(network.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def projection(name: str, steps: int = 10) -> Projection:
    optimizer = getattr(pjax.optim, name)(steps_per_update=steps)
    return Projection(name, f"{steps} steps", optimizer, 10)


def test_a_run_by_projection_learns_and_reports(digits: Dataset, model: MLP) -> None:
    method = projection("AlternatingProjections", 30)
    seen = []
    run = train(method, model, digits, **SETTINGS, callback=seen.append)
    assert [record.step for record in run.records] == [0, 5, 10, 12]
    assert seen == run.records
    assert run.steps == 12
    assert not run.interrupted
    assert run.seconds == run.records[-1].seconds > run.records[1].seconds > 0
    assert run.compile_seconds > 0
    assert run.records[-1].residual > 0
    assert math.isnan(run.records[0].residual)
    assert run.validation_accuracy > run.records[0].validation_accuracy + 0.3
    assert run.test_accuracy > 0.5
    assert run.state_bytes is not None
    # The state must hold at least what the problem stores, and no copies of the weights.
    x, y = jnp.asarray(digits.train.x[:64]), jax.nn.one_hot(digits.train.y[:64], 10)
    params = model.init(jax.random.key(0))
    problem = pjax.feasibility_problem(lambda p: pjax.cross_entropy(model.apply(p, x), y), params)
    assert problem.sizes().bytes < run.state_bytes < 20 * problem.sizes().bytes


def test_the_loop_is_the_update_on_each_batch(digits: Dataset, model: MLP) -> None:
    settings = {**SETTINGS, "steps": 2, "measure_every": 2}
    run = train(projection("DouglasRachford"), model, digits, **settings)
    params = model.init(jax.random.key(0))
    optimizer = pjax.optim.DouglasRachford(steps_per_update=10)
    residual: Any = None
    for rows in itertools.islice(batch_rows(len(digits.train), 64, seed=0), 2):
        x, y = digits.train.x[rows], jax.nn.one_hot(digits.train.y[rows], 10)
        params, residual = optimizer.update(
            lambda p, x=x, y=y: pjax.cross_entropy(model.apply(p, x), y), params
        )
    assert run.best_step == 2
    for name, value in params.items():
        np.testing.assert_allclose(run.params[name], value, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(run.records[-1].residual, float(residual), rtol=1e-3)


def test_the_best_parameters_are_kept(digits: Dataset, model: MLP) -> None:
    class Spoiling:
        """Right after one batch, wrong afterwards."""

        name = "spoiling"
        description = ""

        def init(self, model, params, x, y):
            return jnp.zeros(())

        def step(self, model, params, state, x, y):
            good, _ = pjax.optim.AlternatingProjections(20).update(
                lambda p: pjax.cross_entropy(model.apply(p, x), jax.nn.one_hot(y, 10)), params
            )
            spoilt = jax.tree.map(jnp.zeros_like, params)
            params = jax.tree.map(lambda g, s: jnp.where(state == 0, g, s), good, spoilt)
            return params, state + 1, Outcome(jnp.array(0.0), jnp.array(jnp.nan))

    run = train(Spoiling(), model, digits, **{**SETTINGS, "steps": 3, "measure_every": 1})
    assert run.best_step == 1
    assert run.steps == 3
    assert run.validation_accuracy == run.records[1].validation_accuracy
    assert run.records[-1].validation_accuracy < 0.2
    assert any(np.any(value != 0) for value in run.params.values())
    correct = np.argmax(model.apply(run.params, digits.test.x), -1) == digits.test.y
    assert run.test_accuracy == pytest.approx(correct.mean())


@pytest.mark.parametrize("last", [0, 3])
def test_a_callback_that_is_true_ends_the_run_with_what_is_there(
    digits: Dataset, model: MLP, last: int
) -> None:
    method = baselines.Descent("sgd", 0.1, 0, 10)
    settings = {**SETTINGS, "measure_every": 1}
    run = train(method, model, digits, **settings, callback=lambda record: record.step == last)
    assert run.interrupted
    assert run.steps == last
    whole = train(method, model, digits, **settings, callback=lambda record: record.step == 12)
    assert not whole.interrupted
    accuracies = [record.validation_accuracy for record in run.records]
    assert accuracies == [record.validation_accuracy for record in whole.records[: last + 1]]


def test_what_a_callback_raises_reaches_the_caller(digits: Dataset, model: MLP) -> None:
    def callback(record: Any) -> None:
        raise LookupError(record.step)

    with pytest.raises(LookupError, match="0"):
        train(baselines.Descent("sgd", 0.1, 0, 10), model, digits, **SETTINGS, callback=callback)


def muon(schedule: Any) -> optax.GradientTransformation:
    """Muon on the first layer only: all else is a vector, or the layer of the outputs."""

    def axes(params: Any) -> Any:
        matrix = optax.contrib.MuonDimensionNumbers()
        return {name: matrix if name == "dense.0.weight" else None for name in params}

    return optax.contrib.muon(schedule, consistent_rms=0.2, muon_weight_dimension_numbers=axes)


@pytest.mark.parametrize(
    ("name", "decay"), [("adam", 0), ("adam", 6), ("sgd", 6), ("muon", 6), ("schedule-free", 0)]
)
def test_gradient_steps_are_those_of_optax(digits: Dataset, model: MLP, name, decay) -> None:
    method = baselines.Descent(name, 0.01, decay, 10)
    schedule = optax.cosine_decay_schedule(0.01, decay) if decay else 0.01
    transformation = {
        "adam": optax.adam,
        "sgd": optax.sgd,
        "muon": muon,
        "schedule-free": optax.contrib.schedule_free_adamw,
    }[name](schedule)
    params = model.init(jax.random.key(0))
    expected: Any = params
    x, y = jnp.asarray(digits.train.x[:64]), jnp.asarray(digits.train.y[:64])
    state, optax_state = method.init(model, params, x, y), transformation.init(params)
    for rows in itertools.islice(batch_rows(len(digits.train), 64, seed=0), 4):
        x, y = jnp.asarray(digits.train.x[rows]), jnp.asarray(digits.train.y[rows])

        def loss(p, x=x, y=y):
            logits = model.apply(p, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        params, state, _ = method.step(model, params, state, x, y)
        found = jax.grad(loss)(expected)
        updates, optax_state = transformation.update(found, optax_state, expected)
        expected = optax.apply_updates(expected, updates)
    if name == "schedule-free":
        expected = optax.contrib.schedule_free_eval_params(optax_state, expected)
    for key, value in expected.items():
        np.testing.assert_allclose(params[key], value, rtol=1e-4, atol=1e-6)


def test_the_rate_without_a_schedule_grows_at_first(digits: Dataset, model: MLP) -> None:
    params = model.init(jax.random.key(0))
    x, y = jnp.asarray(digits.train.x[:64]), jnp.asarray(digits.train.y[:64])

    def moved(warmup_steps):
        method = baselines.Descent("schedule-free", 0.01, 0, 10, warmup_steps=warmup_steps)
        state = method.init(model, params, x, y)
        new, _, _ = method.step(model, params, state, x, y)
        return new["dense.0.weight"] - params["dense.0.weight"]

    np.testing.assert_allclose(4 * moved(4), moved(0), rtol=1e-3, atol=1e-5)


def test_muon_takes_the_matrices_of_hidden_layers() -> None:
    params = {
        "kernel.0": jnp.ones((3, 3, 2, 4)),
        "relu.0.bias": jnp.ones(4),
        "embedding.weight": jnp.ones((5, 4)),
        "cell.output.weight": jnp.ones((4, 4)),
        "output.weight": jnp.ones((4, 5)),
    }
    rng = np.random.default_rng(0)
    gradient: Any = {
        name: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for name, leaf in params.items()
    }
    transformation = baselines.scale_by_muon()
    updates: Any = transformation.update(gradient, transformation.init(params), params)[0]
    for name in ("relu.0.bias", "embedding.weight", "output.weight"):
        assert np.ptp(np.abs(updates[name])) < 1e-3  # Adam's first step: signs
    for name in ("kernel.0", "cell.output.weight"):
        matrix = updates[name].reshape(-1, 4)
        values = np.linalg.svd(matrix, compute_uv=False)
        assert np.all(values < 2 * values[-1])
        assert jnp.vdot(updates[name], gradient[name]) > 0


def test_tuning_finds_the_rate_that_training_shows_to_be_best(digits: Dataset, model: MLP) -> None:
    done = []
    chosen = baselines.tune("sgd", model, digits, **SETTINGS, on_step=done.append)
    assert done == [5, 10, 12]
    results = {}
    for rate, decay in itertools.product(baselines.RATES["sgd"], (0, 12)):
        run = train(baselines.Descent("sgd", rate, decay, 10), model, digits, **SETTINGS)
        # Tuning does not look at the untrained parameters.
        results[rate, decay] = max(record.validation_accuracy for record in run.records[1:])
    assert results[chosen.rate, chosen.decay_steps] >= max(results.values()) - 0.01
    assert len(set(results.values())) > 3


def test_tuning_can_be_interrupted(digits: Dataset, model: MLP) -> None:
    done = []
    baselines.tune("adam", model, digits, **SETTINGS, on_step=done.append, should_stop=lambda: True)
    assert done == [5]


def test_wrong_settings_are_refused(digits: Dataset, model: MLP) -> None:
    method = baselines.Descent("sgd", 0.1, 0, 10)
    with pytest.raises(ValueError, match="positive"):
        train(method, model, digits, **{**SETTINGS, "steps": 0})


def test_every_row_counts_once_in_the_accuracy(model: MLP) -> None:
    from pjax.lab.train import Accuracy

    params = model.init(jax.random.key(0))
    x = np.random.default_rng(0).normal(size=(11, 64)).astype(np.float32)
    y = np.asarray(jnp.argmax(model.apply(params, x), -1)).astype(np.int32)
    y[[2, 10]] = (y[[2, 10]] + 1) % 10
    assert Accuracy(model, chunk=4)(params, Split(x, y)) == pytest.approx(9 / 11)
