"""Small networks that tests share, their parameters and data, and how results are compared."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import pjax


def make_mlp(seed, depth, width=16, classes=5, rows=24, dtype=None):
    rng = np.random.default_rng(seed)
    sizes = [12, *depth * [width], classes]
    params = {
        "w": [
            jnp.asarray(rng.normal(size=s) * np.sqrt(2 / s[0]), dtype)
            for s in itertools.pairwise(sizes)
        ],
        "b": [jnp.asarray(0.1 * rng.normal(size=n), dtype) for n in sizes[1:]],
    }
    x = jnp.asarray(rng.normal(size=(rows, 12)), dtype)
    y = jax.nn.one_hot(rng.integers(0, classes, rows), classes, dtype=x.dtype)
    return params, x, y


def mlp(params, x):
    for number, (w, b) in enumerate(zip(params["w"], params["b"], strict=True)):
        x = x @ w + b
        if number < len(params["w"]) - 1:
            x = jax.nn.relu(x)
    return x


def mlp_loss(params, x, y):
    return jnp.mean(pjax.cross_entropy(mlp(params, x), y))


def tied(p, x, y):
    """One matrix read three times, once transposed, and a bias read twice."""
    h = (x @ p["w"][0] + p["b"][0]) @ p["square"] + p["b"][0]
    h = h @ p["square"].T
    return jnp.mean(pjax.cross_entropy((h * h) @ p["square"] @ p["w"][1], y))


def smooth_params(seed=0):
    params, x, y = make_mlp(seed, 1)
    rng = np.random.default_rng(seed + 1)
    params["square"] = jnp.asarray(rng.normal(size=(16, 16)) / 4)
    params["head"] = jnp.asarray(rng.normal(size=(48, 5)) / 7)
    params["small"] = jnp.asarray(rng.normal(size=(3, 16)) / 2)
    return params, x, y


def assert_close(found, expected, rtol):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * float(jnp.max(jnp.abs(b))))
