"""Networks with losses that are no classification's, written as one would without this library.

Each has `load(data_dir)`, its rows; `init(key)`, a dictionary of parameters; `batch(x, y, key)`,
what the loss takes of some rows; and `loss(params, batch)`, a mean over these.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pjax.lab import data

Params = dict[str, Array]
Batch = tuple[Any, Any]

_lecun = jax.nn.initializers.lecun_normal()


class Rows(NamedTuple):
    """Inputs, and what else the loss reads: a pytree of arrays with as many rows."""

    x: np.ndarray
    y: Any


class Parts(NamedTuple):
    """Rows to train on, to choose by, and to test on."""

    train: Rows
    validation: Rows
    test: Rows
    num_features: int
    num_classes: int = 0


class LossModel(Protocol):
    def load(self, data_dir: str | None) -> Any: ...

    def init(self, key: Array) -> Params: ...

    def batch(self, x: Array, y: Any, key: Array) -> Batch: ...

    def loss(self, params: Params, batch: Batch) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """A variational autoencoder of scikit-learn's digits, with one layer's widths on either side.

    The loss of an image `x` is `|x − μ(z)|² / (2 σ²) + KL(N(m, s²) | N(0, 1))`, `z = m + s ε`, with
    the deviation `σ` of a pixel fixed and normal `ε` drawn anew for each batch.

    **Arguments:**

    - `hidden`: the widths of the encoder's hidden layers; the decoder has them in reverse.
    - `latent`: the length of `z`.
    - `variance`: `σ²`.
    """

    hidden: tuple[int, ...] = (64,)
    latent: int = 8
    variance: float = 0.1

    def load(self, data_dir: str | None) -> data.Dataset:
        return data.load("digits", data_dir)

    def init(self, key: Array) -> Params:
        up, down = (64, *self.hidden), (self.latent, *reversed(self.hidden))
        keys = iter(jax.random.split(key, len(up) + len(down) + 1))
        return {
            **_dense("encoder", up, keys),
            # Small: the first latents are all but noise with the deviation 1.
            **_dense("mean", (up[-1], self.latent), keys, scale=0.1),
            **_dense("log_variance", (up[-1], self.latent), keys, scale=0.1),
            **_dense("decoder", down, keys),
            **_dense("head", (down[-1], 64), keys),
        }

    def batch(self, x: Array, y: Any, key: Array) -> Batch:
        """Images, and noise in the place of their labels."""
        return x, jax.random.normal(key, (len(x), self.latent))

    def loss(self, params: Params, batch: Batch) -> Array:
        x, noise = batch
        code = x
        for layer in range(len(self.hidden)):
            code = jax.nn.relu(_apply(params, f"encoder{layer}", code))
        mean = _apply(params, "mean0", code)
        log_variance = _apply(params, "log_variance0", code)
        y = mean + jnp.exp(0.5 * log_variance) * noise
        for layer in range(len(self.hidden)):
            y = jax.nn.relu(_apply(params, f"decoder{layer}", y))
        y = _apply(params, "head0", y)
        error = jnp.sum((x - y) ** 2, axis=-1) / (2 * self.variance)
        divergence = 0.5 * jnp.sum(jnp.exp(log_variance) + mean**2 - 1 - log_variance, axis=-1)
        return jnp.mean(error + divergence)


@dataclasses.dataclass(frozen=True)
class ActorCritic:
    """A policy and a value on one trunk, with PPO's loss (Schulman et al., arXiv:1707.06347).

    `−min(r A, clip(r, 0.8, 1.2) A) + ½ (V − R)² − 0.01 H`, with the ratio `r` of the action's
    probabilities, the advantage `A`, the return `R` and the policy's entropy `H`.

    The rollouts are synthetic and stay the same: normal observations, actions of a random policy,
    and rewards that are a random function of both, with noise. No environment is played.

    **Arguments:**

    - `hidden`: the widths of the trunk's layers.
    """

    hidden: tuple[int, ...] = (64, 64)

    def load(self, data_dir: str | None) -> Parts:
        return _rollouts()

    def init(self, key: Array) -> Params:
        widths = (OBSERVATIONS, *self.hidden)
        keys = iter(jax.random.split(key, len(widths) + 1))
        return {
            **_dense("trunk", widths, keys),
            # Small: the first policy prefers no action.
            **_dense("policy_head", (widths[-1], ACTIONS), keys, scale=0.01),
            **_dense("value_head", (widths[-1], 1), keys),
        }

    def batch(self, x: Array, y: Any, key: Array) -> Batch:
        return x, y

    def loss(self, params: Params, batch: Batch) -> Array:
        x, rollout = batch
        for layer in range(len(self.hidden)):
            x = jnp.tanh(_apply(params, f"trunk{layer}", x))
        logs = jax.nn.log_softmax(_apply(params, "policy_head0", x))
        value = _apply(params, "value_head0", x)[:, 0]
        taken = jnp.take_along_axis(logs, rollout["action"][:, None], axis=-1)[:, 0]
        ratio = jnp.exp(taken - rollout["log_probability"])
        advantage = rollout["advantage"]
        surrogate = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        entropy = -jnp.sum(jnp.exp(logs) * logs, axis=-1)
        error = 0.5 * (value - rollout["return"]) ** 2
        return jnp.mean(-surrogate + error - 0.01 * entropy)


OBSERVATIONS, ACTIONS = 6, 4


@functools.cache
def _rollouts() -> Parts:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6144, OBSERVATIONS))
    preference = 0.5 * x @ rng.normal(size=(OBSERVATIONS, ACTIONS)) / OBSERVATIONS**0.5
    logs = preference - np.log(np.sum(np.exp(preference), axis=1, keepdims=True))
    noise = rng.gumbel(size=logs.shape)
    action = np.argmax(logs + noise, axis=1)
    gains = np.tanh(x @ rng.normal(size=(OBSERVATIONS, 16))) @ rng.normal(size=(16, ACTIONS)) / 4
    expected = np.sum(np.exp(logs) * gains, axis=1)
    place = np.arange(len(x))
    found = gains[place, action] + 0.1 * rng.normal(size=len(x))
    advantage = found - expected
    columns = {
        "action": action.astype(np.int32),
        "log_probability": logs[place, action].astype(np.float32),
        "advantage": ((advantage - advantage.mean()) / advantage.std()).astype(np.float32),
        "return": found.astype(np.float32),
    }
    return _parts(x.astype(np.float32), columns, (4096, 1024, 1024))


@dataclasses.dataclass(frozen=True)
class Poisson:
    """`u'' = f` on [0, 1] with `u(0) = u(1) = 0`, solved by a network with tanh layers.

    The loss of a point is `(u''(x) − f(x))²`, to which 10 times `u(0)² + u(1)²` is added; `u''` is
    found by differentiating the network. `f` belongs to `u(x) = sin πx + ¼ sin 3πx`.

    **Arguments:**

    - `hidden`: the widths of the hidden layers.
    """

    hidden: tuple[int, ...] = (32, 32)

    def load(self, data_dir: str | None) -> Parts:
        return _points()

    def init(self, key: Array) -> Params:
        widths = (1, *self.hidden)
        first, *rest = jax.random.split(key, len(widths) + 1)
        keys = iter(rest)
        params = _dense("layer", widths, keys) | _dense("head", (widths[-1], 1), keys)
        # Layer 0 has one input: without biases all its functions would be odd.
        params["layer0_bias"] = jax.random.normal(first, (widths[1],))
        return params

    def solution(self, params: Params, x: Float[Array, ""]) -> Float[Array, ""]:
        """`u(x)`."""
        y = jnp.reshape(x, (1,))
        for layer in range(len(self.hidden)):
            y = jnp.tanh(_apply(params, f"layer{layer}", y))
        return _apply(params, "head0", y)[0]

    def batch(self, x: Array, y: Any, key: Array) -> Batch:
        return x[:, 0], y

    def loss(self, params: Params, batch: Batch) -> Array:
        x, force = batch
        second = jax.grad(jax.grad(self.solution, argnums=1), argnums=1)
        bent = jax.vmap(second, in_axes=(None, 0))(params, x)
        ends = jnp.stack([self.solution(params, jnp.float32(end)) for end in (0, 1)])
        return jnp.mean((bent - force) ** 2) + 10 * jnp.sum(ends**2)


@functools.cache
def _points() -> Parts:
    x = np.random.default_rng(0).uniform(size=(1536, 1))
    turns = np.pi * x[:, 0]
    force = -(np.pi**2) * (np.sin(turns) + 9 / 4 * np.sin(3 * turns))
    return _parts(x.astype(np.float32), force.astype(np.float32), (1024, 256, 256))


def _parts(x: np.ndarray, y: Any, sizes: tuple[int, int, int]) -> Parts:
    ends = np.cumsum((0, *sizes))
    parts = (
        Rows(*jax.tree.map(lambda leaf: leaf[begin:end], (x, y)))  # noqa: B023
        for begin, end in itertools.pairwise(ends)
    )
    return Parts(*parts, num_features=x.shape[1])


def _dense(name: str, widths: tuple[int, ...], keys: Any, scale: float = 1.0) -> Params:
    """Weights and zero biases of layers called by the name and their number, from 0."""
    params = {}
    for layer, shape in enumerate(itertools.pairwise(widths)):
        params[f"{name}{layer}_weight"] = scale * _lecun(next(keys), shape)
        params[f"{name}{layer}_bias"] = jnp.zeros(shape[1])
    return params


def _apply(params: Params, name: str, x: Array) -> Array:
    return x @ params[f"{name}_weight"] + params[f"{name}_bias"]
