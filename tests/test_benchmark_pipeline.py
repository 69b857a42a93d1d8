"""The baseline of pipelined training: without delay it is its optimiser, and nothing is lost."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import pipeline
from benchmarks.pipeline import Cell

WIDTHS, ROWS, COUNT = (6, 5, 4, 3), 8, 7


@pytest.fixture
def batches(monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(pipeline, "BATCHES", COUNT)
    monkeypatch.setattr(pipeline, "RAMP", 1)
    monkeypatch.setattr(pipeline, "cosine", lambda tick, stages: 1.0)
    return [
        (
            jnp.asarray(rng.normal(size=(ROWS, 6)), jnp.float32),
            jnp.asarray(rng.integers(3, size=ROWS)),
        )
        for _ in range(COUNT)
    ]


def trained(cell, batches):
    """The layers, and those that they were."""
    fns, params = pipeline.cut(pipeline.initial(WIDTHS, 0), cell.stages)
    data = SimpleNamespace(batches=lambda seed: iter(batches))
    found = pipeline.by_gradients(cell, data, fns, params)
    return [layer for part in found for layer in part], [layer for part in params for layer in part]


def test_one_stage_is_the_optimiser_itself(batches):
    found, params = trained(Cell("adam", 1, 0, rate=1e-2), batches)
    (fn,), _ = pipeline.cut(params, 1)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)
    for x, y in batches:
        gradient = jax.grad(lambda p: pipeline.mean_loss(fn(p, x), y))(params)  # noqa: B023
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stashed", [False, True])
def test_every_batch_comes_back_to_every_stage_once(batches, stashed):
    # Where weights hardly move, a delay changes nothing.
    rate = 1e-5
    plain, before = trained(Cell("adam", 1, 0, rate=rate), batches)
    found, _ = trained(Cell("adam", 3, 0, rate=rate, stashed=stashed), batches)
    for start, a, b in zip(*map(jax.tree.leaves, (before, plain, found)), strict=True):
        np.testing.assert_allclose((b - start) / rate, (a - start) / rate, atol=0.1)
        assert np.max(np.abs(a - start)) > 2 * rate
