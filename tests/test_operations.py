"""Operations that public models use: in the stiff limit the displacement is the gradient of JAX, and
pure projection trains through them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics
from pjax.graph import build_graph
from pjax.trace import TraceError, trace
from tests.public_operations import GROUPS, LOSSES, data, loss_of, params

#: So stiff and with so short a prox step that only rounding is left between the two.
LIMIT = metrics.Spectral(activations=1e8, prox_step=1e-7)

CASES = [
    pytest.param(function, id=f"{group}-{name.replace(' ', '_')}")
    for group, functions in GROUPS.items()
    for name, function in functions.items()
]


def assert_is_the_gradient(loss, params, *args, rtol=1e-6):
    value, moved = jax.jit(pjax.value_and_displacement(loss, metric=LIMIT))(params, *args)
    expected, gradient = jax.jit(jax.value_and_grad(loss))(params, *args)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient))
    assert largest > 1e-4
    for (path, d), g in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(gradient), strict=True
    ):
        size = max(float(jnp.max(jnp.abs(g))), 1e-3 * largest)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(d, g, rtol=0, atol=rtol * size, err_msg=name)


def assert_trains(loss, params, *args, steps=3):
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss, params, *args)
    before = float(loss(params, *args))
    for _ in range(steps):
        params, state, info = optimizer.update(loss, params, state, *args)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, info)))
    assert float(loss(params, *args)) < before


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_stiff_limit_of_a_loss_is_the_gradient(x64, loss):
    assert_is_the_gradient(loss, params(), data())


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_pure_projection_lowers_a_loss(x64, loss):
    assert_trains(loss, params(), data())


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("function", CASES)
def test_the_stiff_limit_is_the_gradient(x64, function):
    assert_is_the_gradient(loss_of(function), params(), data())


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("function", CASES)
def test_pure_projection_trains_through_it(x64, function):
    assert_trains(loss_of(function), params(), data())
