"""Gradient methods, tuned: Adam and SGD through Optax, on the same batches as the projections."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from pjax import nn
from pjax.lab.data import Dataset, batch_rows
from pjax.lab.train import Accuracy, Params

Name = Literal["adam", "sgd"]

#: The rates that are tried, each with and without cosine decay.
RATES: dict[str, tuple[float, ...]] = {
    "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "sgd": (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
}
_DIRECTIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "sgd": optax.identity,
}


@dataclasses.dataclass(frozen=True)
class Gradient:
    """`params − rate(t) · direction(∇ mean cross-entropy)`, the direction Adam's or the gradient.

    **Arguments:**

    - `name`: `"adam"` or `"sgd"`.
    - `rate`: the learning rate at the start.
    - `decay_steps`: the batches over which a cosine takes the rate to zero; 0 keeps it constant.
    - `num_classes`: the length of a one-hot row.
    """

    name: Name
    rate: float
    decay_steps: int
    num_classes: int

    @property
    def description(self) -> str:
        return f"rate {self.rate:g}, {'cosine' if self.decay_steps else 'constant'}"

    def init(self, params: Params) -> Any:
        return jnp.zeros((), jnp.int32), _DIRECTIONS[self.name]().init(params)

    def step(
        self, model: nn.Module, params: Params, state: Any, x: Array, y: Array
    ) -> tuple[Params, Any, Array]:
        params, state = _update(
            self.name, model, self.num_classes, params, state, x, y, self.rate, self.decay_steps
        )
        return params, state, jnp.array(jnp.nan)


def tune(
    name: Name,
    model: nn.Module,
    dataset: Dataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    measure_every: int,
    on_step: Callable[[int], None] = lambda step: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Gradient:
    """The rate and schedule of `RATES[name]` with the best validation accuracy along its run.

    All candidates train at once, in one compiled program, from the initial parameters and on the
    batches that `pjax.lab.train.train` uses for the same seed.

    **Arguments:** as for `pjax.lab.train.train`; `on_step` gets the number of batches done. If
    `should_stop` ends the search early, the choice rests on what was measured until then.
    """
    candidates = list(itertools.product(RATES[name], (0, steps)))
    rates = jnp.array([rate for rate, _ in candidates])
    decays = jnp.array([decay for _, decay in candidates])
    params = model.init(jax.random.key(seed))
    state = jnp.zeros((), jnp.int32), _DIRECTIONS[name]().init(params)
    params, state = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (len(candidates), *leaf.shape)), (params, state)
    )
    train_x, train_y = jnp.asarray(dataset.train.x), jnp.asarray(dataset.train.y)

    def run(params: Params, state: Any, rate: Array, decay: Array, rows: Array) -> Any:
        def body(carry: tuple[Params, Any], chosen: Array) -> tuple[tuple[Params, Any], None]:
            x, y = train_x[chosen], train_y[chosen]
            return _update(name, model, dataset.num_classes, *carry, x, y, rate, decay), None

        return jax.lax.scan(body, (params, state), rows)[0]

    advance = jax.jit(jax.vmap(run, in_axes=(0, 0, 0, 0, None)))
    measure = Accuracy(model)
    order = batch_rows(len(dataset.train), batch_size, seed)
    best = np.zeros(len(candidates))
    done = 0
    while done < steps and not (done and should_stop()):
        size = min(measure_every, steps - done)
        rows = jnp.asarray(np.stack(list(itertools.islice(order, size))))
        params, state = jax.block_until_ready(advance(params, state, rates, decays, rows))
        done += size
        for i in range(len(candidates)):
            one = {key: value[i] for key, value in params.items()}
            best[i] = max(best[i], measure(one, dataset.validation))
        on_step(done)
    rate, decay = candidates[int(np.argmax(best))]
    return Gradient(name, rate, decay, dataset.num_classes)


def _update(
    name: Name,
    model: nn.Module,
    num_classes: int,
    params: Params,
    state: Any,
    x: Array,
    y: Array,
    rate: Any,
    decay_steps: Any,
) -> tuple[Params, Any]:
    count, direction_state = state

    def loss(params: Params) -> Array:
        logits = model.apply(params, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    direction, direction_state = _DIRECTIONS[name]().update(jax.grad(loss)(params), direction_state)
    # `decay_steps` may be traced: tuning runs constant and decaying rates side by side.
    share = jnp.where(decay_steps > 0, count / jnp.maximum(decay_steps, 1), 0.0)
    rate = rate * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(share, 1.0)))
    updates = jax.tree.map(lambda leaf: -rate * leaf, direction)
    return optax.apply_updates(params, updates), (count + 1, direction_state)  # pyright: ignore
