"""Public architectures: traced, with the gradient for their displacement, and trained a little."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import pjax
from tests.public_models import MODELS
from tests.selection import mostly_slow

#: So stiff and with so short a prox step that only rounding is left to the gradient.
LIMIT = pjax.metrics.Spectral(activations=1e8, prox_step=1e-8)
#: Those of every run; the others are as quick, and many.
OFTEN = ["graph_attention", "real_nvp", "wgan_critic_with_gradient_penalty", "spectral_norm"]

pytestmark = pytest.mark.filterwarnings("ignore::pjax.CustomRuleWarning")


@pytest.mark.parametrize("name", mostly_slow(list(MODELS), OFTEN))
def test_the_stiff_limit_is_the_gradient(x64, name):
    """In every parameter; none with a gradient gets zero."""
    loss, params = MODELS[name]()
    value, moved = pjax.value_and_displacement(loss, metric=LIMIT)(params)
    expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    largest = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(gradient))
    pairs = zip(jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(gradient), strict=True)
    for (path, d), g in pairs:
        size = float(np.max(np.abs(g)))
        # What is zero but for rounding has no direction.
        if size > 1e-12 * largest:
            assert np.any(d), jax.tree_util.keystr(path)
            off = float(np.max(np.abs(d - g))) / size
            assert off < 1e-6, f"{jax.tree_util.keystr(path)}: {off:.1e}"
    found = pjax.explain(loss, params)
    assert all(line.moves for line in found.parameters)
    assert not any("counts 0" in w or "has no rule" in w for w in found.warnings)


@pytest.mark.parametrize("name", mostly_slow(MODELS, OFTEN))
def test_pure_projection_lowers_the_loss(name):
    loss, params = MODELS[name]()
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss, params)
    new, first = params, float(loss(params))
    for _ in range(30):
        new, state, _ = optimizer.update(loss, new, state)
    assert float(loss(new)) < first
    gradient = jax.jit(jax.grad(loss))(params)
    largest = max(float(np.max(np.abs(g))) for g in jax.tree.leaves(gradient))
    leaves = map(jax.tree.leaves, (new, params, gradient))
    for a, b, g in zip(*leaves, strict=True):
        # The last bias of a critic has no gradient but rounding.
        assert np.any(a != b) or np.max(np.abs(g)) < 1e-5 * largest
