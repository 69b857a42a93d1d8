"""Small networks of all kinds, in plain JAX, with a loss and a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


class Case(NamedTuple):
    """Parameters, a loss of parameters and a batch, and the batch."""

    params: dict[str, Any]
    loss: Callable[..., Any]
    x: Any
    y: Any


def perceptron(sizes: tuple[int, ...] = (48, 32, 32, 10), rows: int = 32) -> Case:
    random = np.random.default_rng(0)
    params = {}
    for i, (inside, out) in enumerate(itertools.pairwise(sizes)):
        params[f"w{i}"] = _normal(random, (inside, out), (2 / inside) ** 0.5)
        params[f"b{i}"] = jnp.zeros(out)
    last = len(sizes) - 2

    def network(p: Any, x: Any) -> Any:
        for i in range(last):
            x = jax.nn.relu(x @ p[f"w{i}"] + p[f"b{i}"])
        return x @ p[f"w{last}"] + p[f"b{last}"]

    return _classes(random, params, network, (rows, sizes[0]), sizes[-1])


def convolutional(norm: str, rows: int = 16) -> Case:
    random = np.random.default_rng(0)
    params = {
        "c1": _normal(random, (3, 3, 1, 8), 0.4),
        "c2": _normal(random, (3, 3, 8, 16), 0.2),
        "s1": jnp.ones(8), "t1": jnp.zeros(8), "s2": jnp.ones(16), "t2": jnp.zeros(16),
        "w": _normal(random, (144, 10), 0.1),
    }  # fmt: skip

    def normalised(x: Any, scale: Any, shift: Any) -> Any:
        if norm == "batch":
            mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
            return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + shift
        groups = x.reshape(*x.shape[:-1], 2, -1)
        axes = (1, 2, 4)
        mean, variance = groups.mean(axes, keepdims=True), groups.var(axes, keepdims=True)
        return ((groups - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x.shape) * scale + shift

    def network(p: Any, x: Any) -> Any:
        for i in (1, 2):
            x = jax.lax.conv_general_dilated(
                x, p[f"c{i}"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jax.nn.relu(normalised(x, p[f"s{i}"], p[f"t{i}"]))
        return x.reshape(x.shape[0], -1) @ p["w"]

    return _classes(random, params, network, (rows, 12, 12, 1), 10)


def transformer(rows: int = 16, length: int = 6, width: int = 16, words: int = 12) -> Case:
    random = np.random.default_rng(0)
    shapes = {
        "q": (width, 2, 8), "k": (width, 2, 8), "v": (width, 2, 8), "o": (2, 8, width),
        "f1": (width, 32), "f2": (32, width), "out": (width, words),
    }  # fmt: skip
    params = {name: _normal(random, shape, 0.25) for name, shape in shapes.items()}
    params |= {
        "e": _normal(random, (words, width), 1.0),
        "g1": jnp.ones(width),
        "g2": jnp.ones(width),
    }

    def normalised(x: Any, scale: Any) -> Any:
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale

    def network(p: Any, tokens: Any) -> Any:
        x = p["e"][tokens]
        h = normalised(x, p["g1"])
        q, k, v = (jnp.einsum("nld,dhe->nlhe", h, p[name]) for name in "qkv")
        scores = jnp.einsum("nlhe,nmhe->nhlm", q, k) / 8**0.5
        causal = np.tril(np.ones((length, length), bool))
        chances = jax.nn.softmax(jnp.where(causal, scores, -1e9))
        x = x + jnp.einsum("nhlm,nmhe,hed->nld", chances, v, p["o"])
        x = x + jax.nn.gelu(normalised(x, p["g2"]) @ p["f1"]) @ p["f2"]
        return x @ p["out"]

    def loss(p: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(network(p, x), y).mean()

    tokens = random.integers(0, words, (rows, length + 1))
    return Case(params, loss, jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))


def recurrent(rows: int = 16, length: int = 5) -> Case:
    random = np.random.default_rng(0)
    params = {
        "u": _normal(random, (8, 16), 0.3), "v": _normal(random, (16, 16), 0.2),
        "b": jnp.zeros(16), "o": _normal(random, (16, 10), 0.2),
    }  # fmt: skip

    def network(p: Any, x: Any) -> Any:
        def step(h: Any, now: Any) -> tuple[Any, None]:
            return jnp.tanh(h @ p["v"] + now @ p["u"] + p["b"]), None

        # Of the rows: inside of `shard_map` a constant is not what comes out of a step.
        start = jnp.zeros((len(x), 16), x.dtype) + 0 * x[:, 0, :1]
        h, _ = jax.lax.scan(step, start, jnp.swapaxes(x, 0, 1))
        return h @ p["o"]

    return _classes(random, params, network, (rows, length, 8), 10)


def _normal(random: Any, shape: tuple[int, ...], scale: float) -> Any:
    return jnp.asarray(random.normal(size=shape) * scale)


def _classes(random: Any, params: Any, network: Any, shape: tuple[int, ...], classes: int) -> Case:
    def loss(p: Any, x: Any, y: Any) -> Any:
        return optax.softmax_cross_entropy(network(p, x), y).mean()

    labels = np.eye(classes)[random.integers(0, classes, shape[0])]
    return Case(params, loss, _normal(random, shape, 1.0), jnp.asarray(labels))


CASES: dict[str, Callable[[], Case]] = {
    "perceptron": perceptron,
    "group norm": lambda: convolutional("group"),
    "batch norm": lambda: convolutional("batch"),
    "transformer": transformer,
    "recurrent": recurrent,
}
