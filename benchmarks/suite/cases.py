"""The networks and steps that the suite compares."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import pjax
from benchmarks.accuracy_tasks import ConvolutionalTask, Task, TextTask
from pjax.trace import trace

Step = Literal["backprop", "displacement", "projection", "parallel"]
#: In the order of the columns; the first is what the others are compared with.
STEPS: tuple[Step, ...] = ("backprop", "displacement", "projection", "parallel")
#: How many characters the texts of noise have, as many as tiny shakespeare.
SYMBOLS = 65


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with a batch.

    **Arguments:**

    - `group`: what varies in it: `"networks"`, `"depth"`, `"width"`, `"batch"` or `"length"`; or
        `"loop"`, where steps are in a compiled loop.
    - `name`: unique within the group.
    - `task`: the network, its loss and the size of a batch.
    - `steps`: what is compared.
    - `number`: what varies, for figures.
    - `quick`: whether it is measured within a minute or two.
    - `looped`: not 0: so many steps at once, in a `jax.lax.scan`.
    """

    group: str
    name: str
    task: Task
    steps: tuple[Step, ...] = STEPS[:3]
    number: int = 0
    quick: bool = False
    looped: int = 0

    @property
    def key(self) -> str:
        return f"{self.group}/{self.name}"

    def arrays(self) -> tuple[Any, tuple[Array, Array]]:
        """Parameters and a batch of noise, `(x, one_hot)`."""
        rng = np.random.default_rng(0)
        rows = self.task.batch_size
        if isinstance(self.task, TextTask):
            tokens = rng.integers(0, SYMBOLS, (rows, self.task.context + 1))
            params = self.task.init(0, SYMBOLS, 0)
            return params, (jnp.asarray(tokens[:, :-1]), jax.nn.one_hot(tokens[:, 1:], SYMBOLS))
        features = 3072 if isinstance(self.task, ConvolutionalTask) else 784
        x = jnp.asarray(rng.uniform(size=(rows, features)), jnp.float32)
        return self.task.init(features, 10, 0), (x, jax.nn.one_hot(jnp.arange(rows) % 10, 10))


class Measured(NamedTuple):
    """A step to be measured: `run(*args)`.

    **Attributes:**

    - `direction`: the gradient or displacement alone, whose temporaries do not lie in the memory of
      a step's outputs; None where the step has no such part. Its arguments are `(params, batch)`.
    - `shorter`: where a step is part of a longer solve: a solve with so many steps fewer.
    """

    run: Callable[..., Any]
    args: tuple[Any, ...]
    direction: Callable[..., Any] | None = None
    shorter: Callable[..., Any] | None = None
    steps: int = 1


#: Steps of alternating projections in the shorter and in the longer solve.
_FEW, _MANY = 4, 12


def measured(case: Case, step: Step) -> Measured:
    """A training step with its optimiser, or one parallel projection step by itself."""
    params, batch = case.arrays()
    if step in ("backprop", "displacement"):
        loss = case.task.loss("gradient" if step == "backprop" else "optax")
        of: Any = jax.value_and_grad if step == "backprop" else pjax.value_and_displacement
        direction, adam = of(loss), optax.adam(1e-3)

        def descend(params: Any, state: Any, batch: Any) -> Any:
            value, moved = direction(params, batch)
            updates, state = adam.update(moved, state, params)
            return value, optax.apply_updates(params, updates), state

        def loop(params: Any, state: Any, batch: Any) -> Any:
            def body(carry: Any, _: None) -> Any:
                value, params, state = descend(carry[0], carry[1], batch)
                return (params, state), value

            (params, state), values = jax.lax.scan(body, (params, state), length=case.looped)
            return values, params, state

        run = loop if case.looped else descend
        return Measured(run, (params, adam.init(params), batch), direction)
    loss = case.task.loss("pure")
    if step == "projection":
        pure = pjax.optim.Projection(check=False)

        def project(params: Any, state: Any, batch: Any) -> Any:
            params, state, info = pure.update(loss, params, state, batch)
            return info.loss, params, state

        return Measured(project, (params, pure.init(loss, params, batch), batch))

    def solve(steps: int) -> Callable[..., Any]:
        optimizer = pjax.optim.AlternatingProjections(steps, splitting="layer", check=False)
        return lambda params, batch: optimizer.update(lambda p: loss(p, batch), params)

    return Measured(solve(_MANY), (params, batch), shorter=solve(_FEW), steps=_MANY - _FEW)


def tracing_seconds(case: Case, repeats: int = 3) -> float:
    """The least time in which a loss becomes a program, after the first."""
    params, batch = case.arrays()
    loss = case.task.loss("pure")
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        trace(lambda p: loss(p, batch), params)
        times.append(time.perf_counter() - begin)
    return min(times)


def _mlp(*hidden: int, batch_size: int = 256) -> Task:
    return Task("mnist", hidden, batch_size=batch_size)


def cases() -> list[Case]:
    """Every case of the suite."""
    found = [
        Case("networks", "mlp 1x128", _mlp(128), quick=True),
        Case("networks", "mlp 4x128", _mlp(*(128,) * 4), quick=True),
        Case("networks", "mlp 2x2048", _mlp(2048, 2048)),
        Case("networks", "cnn 32-64", ConvolutionalTask("cifar10", batch_size=128)),
        Case("networks", "rnn 64, length 32", TextTask("tinyshakespeare", batch_size=64)),
        Case(
            "networks",
            "transformer 64",
            TextTask("tinyshakespeare", model="transformer", batch_size=32),
        ),
    ]
    for depth in (2, 4, 8, 16, 32, 64):
        task = _mlp(*(128,) * depth)
        found.append(Case("depth", f"{depth}x128", task, STEPS, depth, depth == 2))
    for width in (64, 256, 1024, 4096):
        found.append(Case("width", f"2x{width}", _mlp(width, width), number=width))
    for rows in (32, 256, 1024, 4096):
        task = _mlp(*(128,) * 4, batch_size=rows)
        found.append(Case("batch", f"4x128, batch {rows}", task, number=rows))
    for length in (16, 64, 128):
        task = TextTask("tinyshakespeare", batch_size=64, context=length)
        found.append(Case("length", f"rnn 64, length {length}", task, STEPS[:2], length))
    task = ConvolutionalTask("cifar10", batch_size=128)
    found.append(Case("loop", "cnn 32-64, 4 steps", task, STEPS[:2], looped=4))
    return found
