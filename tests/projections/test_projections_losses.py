from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from pjax.backend import device
from pjax.projections import losses
from tests.conftest import enable_x64
from tests.oracles import (
    POINTS,
    PRECISIONS,
    assert_no_farther,
    assert_small,
    cross_entropy_objective,
    cross_entropy_prox_error,
    draw,
    on_many_points,
    ternary_search,
)

cross_entropy = jax.jit(losses.cross_entropy)


@jax.jit
def cross_entropy_where_kernels_are_launched(*args):
    """All its steps written out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "launches_kernels", lambda: True)
        patch.setattr(losses, "_FEW_NUMBERS", 10**9)
        return losses.cross_entropy(*args)


def draw_labels(rng, count, classes, kind):
    labels = np.eye(classes)[rng.integers(0, classes, count)]
    if kind == "soft":
        # Half of them smoothed, half of them anything.
        labels = 0.9 * labels + 0.1 / classes
        labels[::2] = rng.dirichlet(np.full(classes, 0.5), len(labels[::2]))
    return labels.astype(np.float32).astype(np.float64)


def draw_steps(rng, count):
    """From steps that move nothing to steps that leave no loss; some are 0."""
    step = 10.0 ** rng.uniform(-6, 6, count) * rng.choice([0, 1, 1, 1, 1], count)
    return step.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("classes", [1, 2, 10, 17, 100])
@pytest.mark.parametrize("kind", ["one-hot", "soft"])
@pytest.mark.parametrize(
    "prox", [cross_entropy, cross_entropy_where_kernels_are_launched], ids=["loop", "written out"]
)
@on_many_points
def test_cross_entropy_is_the_prox(prox, kind, classes, regime, seed):
    rng = np.random.default_rng(seed)
    count = POINTS // 2
    points = draw(regime, seed, (count, classes), (count,))
    reference, deviation = points.reference, points.deviation
    labels, step = draw_labels(rng, count, classes, kind), draw_steps(rng, count)
    v = np.asarray(reference, np.longdouble) + deviation

    for precision in PRECISIONS:
        eps = precision.eps
        with precision.context():
            fields = (reference, deviation, labels, step)
            arrays = [jnp.asarray(a, precision.dtype) for a in fields]
            found = prox(*arrays)
        assert found.dtype == precision.dtype
        found = np.asarray(found, np.float64)
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(found[step == 0], deviation[step == 0])

        move = found - deviation
        norm = np.sqrt(np.sum(move**2, -1))
        # Rounding of the logits moves the solution by min(move, 1) of it, that of labels by
        # min(λ, 1); the deviation is what the result is added to.
        spread = np.max(np.abs(reference) + np.abs(deviation), -1)
        floor = spread * np.minimum(norm, 1) + np.minimum(step, 1) + np.max(np.abs(found), -1)
        tolerance = 100 * eps * norm + 16 * eps * floor
        assert_small(cross_entropy_prox_error(move, v, labels, step), tolerance)


def test_the_cross_entropy_oracle_agrees_with_a_general_minimiser():
    rng = np.random.default_rng(0)
    labels = np.concatenate([draw_labels(rng, 5, 4, kind) for kind in ("one-hot", "soft")])
    v, step = 2 * rng.normal(size=(10, 4)), 10.0 ** rng.uniform(-1, 1.5, 10)
    with enable_x64():
        found = np.asarray(cross_entropy(v, 0 * v, labels, step))
    for row in range(10):
        problem = functools.partial(
            cross_entropy_objective, v=v[row], labels=labels[row], step=step[row]
        )
        best = minimize(problem, v[row], method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(v[row] + found[row], best.x, atol=1e-5)
        assert problem(v[row] + found[row]) <= best.fun + 1e-12
    # A point off by 1e-3 is seen to be.
    off = found + 1e-3 * np.array([1, -1, 0, 0])
    error = cross_entropy_prox_error(off, v, labels, step)
    np.testing.assert_allclose(error, 1e-3 * np.sqrt(2), rtol=0.02)


def test_rows_of_labels_that_do_not_sum_to_1():
    rng = np.random.default_rng(1)
    v = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    labels = jnp.eye(4)[:3]
    twice = cross_entropy(v, 0 * v, 2 * labels, 1.5)
    np.testing.assert_allclose(twice, cross_entropy(v, 0 * v, labels, 3.0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(cross_entropy(v, 0 * v, 0 * labels, 3.0), 0)


@pytest.mark.parametrize("classes", [3, 30])
def test_rows_without_an_answer_do_not_change_those_beside_them(classes):
    rng = np.random.default_rng(2)
    v = 3 * rng.normal(size=(64, classes)).astype(np.float32)
    labels = np.eye(classes, dtype=np.float32)[rng.integers(0, classes, 64)]
    labels[:20:2] = 0
    step = np.full(64, 100, np.float32)
    expected = cross_entropy(v, 0 * v, labels, step)
    broken = v.copy()
    # Rows that count and rows that do not.
    broken[:2, 0] = np.nan
    found = cross_entropy(broken, 0 * v, labels, step)
    np.testing.assert_allclose(found[2:], expected[2:], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(expected[:20:2], 0)
    assert np.isnan(found[1]).any()


@pytest.mark.parametrize("classes", [3, 30])
def test_axes_before_the_classes_are_those_of_rows(classes):
    rng = np.random.default_rng(3)
    v, dv = rng.normal(size=(2, 2, 3, 4, classes)).astype(np.float32)
    labels = draw_labels(rng, 24, classes, "soft").astype(np.float32).reshape(v.shape)
    step = rng.uniform(0.1, 10, v.shape[:-1]).astype(np.float32)
    rows = [a.reshape(24, *a.shape[3:]) for a in (v, dv, labels, step)]
    expected = cross_entropy(*rows)
    found = cross_entropy(v, dv, labels, step)
    np.testing.assert_allclose(found, expected.reshape(v.shape), rtol=1e-6, atol=1e-6)
    # One row, and one step for all.
    one = cross_entropy(*(a[5] for a in rows))
    np.testing.assert_allclose(one, expected[5], rtol=1e-6, atol=1e-6)
    same = cross_entropy(v, dv, labels, 2.0)
    np.testing.assert_allclose(
        same, cross_entropy(v, dv, labels, np.full_like(step, 2.0)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("step", [1e20, 1e37])
def test_a_step_beyond_all_measure_leaves_no_loss(step):
    """It has no end: `x` grows like `log λ`, and the probability of the label's class with it."""
    v = jnp.array([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    labels = jnp.eye(3)[:2]
    found = np.asarray(cross_entropy(v, 0 * v, labels, jnp.full(2, step)), np.float64)
    error = cross_entropy_prox_error(found, np.asarray(v), np.asarray(labels), np.full(2, step))
    assert_small(error, 1e-5)


def test_a_class_that_is_ruled_out_stays_out():
    v = jnp.array([[1.0, -jnp.inf, 0.0]])
    found = cross_entropy(v, jnp.zeros((1, 3)), jnp.array([[0.0, 0.0, 1.0]]), 2.0)
    pair = cross_entropy(v[:, ::2], jnp.zeros((1, 2)), jnp.array([[0.0, 1.0]]), 2.0)
    np.testing.assert_allclose(found[:, ::2], pair, rtol=1e-6)
    np.testing.assert_array_equal(found[:, 1], 0)
    assert losses.cross_entropy_value(v, jnp.array([[0.0, 0.0, 1.0]])) < 2


SCALAR_LOSSES: dict[str, tuple[Any, Any]] = {
    "margin": (
        lambda x, dx, labels, step: losses.margin(x, dx, labels, 1.5, step),
        lambda x, y: np.maximum(1.5 - (2 * y - 1) * x, 0) ** 2 / 2,
    ),
    "squared error": (losses.squared_error, lambda x, y: (x - y) ** 2 / 2),
}


@functools.cache
def compiled(name):
    return jax.jit(SCALAR_LOSSES[name][0])


@pytest.mark.parametrize("name", SCALAR_LOSSES)
@on_many_points
def test_losses_of_entries_have_their_prox(name, regime, seed):
    project = compiled(name)
    rng = np.random.default_rng(seed)
    count = POINTS // 3
    points = draw(regime, seed, (count, 3), (count, 3))
    reference, deviation = points.reference, points.deviation
    labels = rng.integers(0, 2, (count, 3)).astype(float) if name == "margin" else points.target
    step = draw_steps(rng, count)
    rows = step[:, None]

    def objective(move):
        # Both terms in units of 1 + λ, so that neither is lost.
        gap = SCALAR_LOSSES[name][1](reference + (deviation + move), labels)
        return (move**2 / 2 + rows * gap) / (1 + rows)

    size = np.abs(reference) + np.abs(deviation) + np.abs(labels) + 1.5
    best = ternary_search(objective, -4 * size, 4 * size)
    nearest = np.sqrt(np.minimum(objective(best), objective(0 * best)))
    for precision in PRECISIONS:
        eps = precision.eps
        with precision.context():
            fields = (reference, deviation, labels, step)
            arrays = [jnp.asarray(a, precision.dtype) for a in fields]
            found = project(*arrays)
        assert found.dtype == precision.dtype
        found = np.asarray(found, np.float64)
        assert np.isfinite(found).all()
        floor = 4 * (eps + 1e-15) * size
        assert_small(found - deviation - best, floor + 1e-6 * size)
        assert_no_farther(np.sqrt(objective(found - deviation)), nearest, floor, precision.relative)
        np.testing.assert_array_equal(found[step == 0], deviation[step == 0])


def test_an_infinite_step_is_a_projection():
    v, labels = jnp.array([[0.5, 0.5, 2.0, -2.0]]), jnp.array([[1.0, 0.0, 1.0, 0.0]])
    found = losses.margin(v, 0 * v, labels, 1.0, jnp.inf)
    np.testing.assert_allclose(v + found, [[1, -1, 2, -2]])
    again = losses.margin(v, found, labels, 1.0, jnp.inf)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_allclose(losses.squared_error(v, 0 * v, labels, jnp.inf), labels - v)


def test_values():
    logits = jnp.array([[0.0, 0.0], [3.0, 0.0]])
    labels = jnp.array([[0.5, 0.5], [1.0, 0.0]])
    expected = [np.log(2), np.log1p(np.exp(-3))]
    np.testing.assert_allclose(losses.cross_entropy_value(logits, labels), expected, rtol=1e-6)
    np.testing.assert_allclose(losses.margin_value(logits, labels, 1.0), [1.0, 0.5])
    np.testing.assert_allclose(losses.squared_error_value(logits, labels), [0.25, 2.0])
