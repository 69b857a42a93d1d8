"""One training loop for every method, so that a comparison compares the methods only.

A run draws its batches from a seed, measures validation accuracy as it goes, keeps the parameters
with the best one, and looks at the test rows once, at the end, with those parameters.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pjax
from pjax import nn
from pjax.lab.data import Dataset, batch_rows

Params = dict[str, Array]


@runtime_checkable
class Method(Protocol):
    """A way to train: a pure function from parameters, state and a batch to new ones."""

    @property
    def name(self) -> str:
        """The name that tables and plots show."""
        ...

    @property
    def description(self) -> str:
        """The settings in a few words."""
        ...

    def init(self, params: Params) -> Any:
        """What the method carries from batch to batch, a pytree of arrays (`()` for nothing)."""
        ...

    def step(
        self,
        model: nn.Module,
        params: Params,
        state: Any,
        x: Float[Array, "batch features"],
        y: Int[Array, " batch"],
    ) -> tuple[Params, Any, Float[Array, ""]]:
        """New parameters, new state and the residual (NaN where there is none)."""
        ...


@runtime_checkable
class ProjectionOptimizer(Protocol):
    """What `Projection` needs of an optimiser of `pjax.optim`."""

    def update(self, fn: Callable[[Any], Any], params: Any) -> tuple[Any, Any]: ...


@dataclasses.dataclass(frozen=True)
class Projection:
    """Training by projection alone: no gradient, no learning rate.

    **Arguments:**

    - `name`, `description`: for tables and plots.
    - `optimizer`: one of `pjax.optim`.
    - `num_classes`: the length of a one-hot row.
    """

    name: str
    description: str
    optimizer: ProjectionOptimizer
    num_classes: int

    def init(self, params: Params) -> Any:
        return ()

    def step(
        self, model: nn.Module, params: Params, state: Any, x: Array, y: Array
    ) -> tuple[Params, Any, Array]:
        labels = jax.nn.one_hot(y, self.num_classes)
        params, residual = self.optimizer.update(
            lambda p: pjax.cross_entropy(model.apply(p, x), labels), params
        )
        return params, state, residual.residual[-1]


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known after `step` batches; `seconds` counts training, not compiling or measuring."""

    step: int
    seconds: float
    validation_accuracy: float
    residual: float


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished (or interrupted) run.

    `test_accuracy` belongs to the parameters of `best_step`, chosen by validation accuracy.
    `state_bytes` is what the compiled training step allocates beyond parameters and batch (XLA's
    figure) together with what the method carries from batch to batch; `None` if XLA does not tell.
    """

    method: str
    description: str
    records: list[Record]
    best_step: int
    test_accuracy: float
    compile_seconds: float
    state_bytes: int | None
    interrupted: bool
    params: Params = dataclasses.field(repr=False)

    @property
    def steps(self) -> int:
        return self.records[-1].step

    @property
    def seconds(self) -> float:
        return self.records[-1].seconds

    @property
    def validation_accuracy(self) -> float:
        return max(record.validation_accuracy for record in self.records)


def train(
    method: Method,
    model: nn.Module,
    dataset: Dataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    measure_every: int,
    on_step: Callable[[int, Record], None] = lambda step, record: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Run:
    """Trains from `model.init(jax.random.key(seed))` for `steps` batches.

    **Arguments:**

    - `method`, `model`, `dataset`: what is trained, how, and on what.
    - `steps`, `batch_size`, `seed`: how many batches, their size, and the seed of the initial
      parameters and of the order of the rows.
    - `measure_every`: validation accuracy is measured after so many batches, and at the end.
    - `on_step`: called after each batch with its number and the latest record.
    - `should_stop`: asked before each batch; the run then ends with what is there.
    """
    if steps < 1 or measure_every < 1:
        raise ValueError(f"`steps` and `measure_every` must be positive: {steps}, {measure_every}.")
    params = model.init(jax.random.key(seed))
    state = method.init(params)
    rows = batch_rows(len(dataset.train), batch_size, seed)
    measure = Accuracy(model)

    def step_function(params: Params, state: Any, x: Array, y: Array) -> tuple[Params, Any, Array]:
        return method.step(model, params, state, x, y)

    start = time.perf_counter()
    batch = (
        jax.ShapeDtypeStruct((batch_size, dataset.num_features), jnp.float32),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )
    compiled = jax.jit(step_function).lower(params, state, *batch).compile()
    compile_seconds = time.perf_counter() - start
    state_bytes = _state_bytes(compiled, state)

    record = Record(0, 0.0, measure(params, dataset.validation), math.nan)
    records, best, interrupted = [record], (record, params), False
    seconds = 0.0
    for step in range(1, steps + 1):
        if should_stop():
            interrupted = True
            break
        chosen = next(rows)
        x, y = jnp.asarray(dataset.train.x[chosen]), jnp.asarray(dataset.train.y[chosen])
        start = time.perf_counter()
        params, state, residual = jax.block_until_ready(compiled(params, state, x, y))
        seconds += time.perf_counter() - start
        if step % measure_every == 0 or step == steps:
            accuracy = measure(params, dataset.validation)
            record = Record(step, seconds, accuracy, float(residual))
            records.append(record)
            if accuracy > best[0].validation_accuracy:
                best = (record, params)
        on_step(step, record)
    return Run(
        method=method.name,
        description=method.description,
        records=records,
        best_step=best[0].step,
        test_accuracy=measure(best[1], dataset.test),
        compile_seconds=compile_seconds,
        state_bytes=state_bytes,
        interrupted=interrupted,
        params=best[1],
    )


class Accuracy:
    """The fraction of rows whose largest output is the true class, in chunks of a few thousand."""

    def __init__(self, model: nn.Module, chunk: int = 5000) -> None:
        self._chunk = chunk
        self._correct = jax.jit(
            lambda params, x, y: jnp.sum(jnp.argmax(model.apply(params, x), axis=-1) == y)
        )

    def __call__(self, params: Params, split: Any) -> float:
        correct = 0
        for start in range(0, len(split), self._chunk):
            part = slice(start, start + self._chunk)
            correct += int(self._correct(params, split.x[part], split.y[part]))
        return correct / len(split)


def _state_bytes(compiled: Any, state: Any) -> int | None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    carried = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state))
    return int(analysis.temp_size_in_bytes) + carried
