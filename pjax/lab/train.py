"""One training loop for every method, so that a comparison compares the methods only.

A run draws its batches from a seed, measures validation accuracy as it goes, keeps the parameters
with the best one, and looks at the test rows once, at the end, with those parameters. Several seeds
train side by side in one compiled program.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pjax
from pjax import nn
from pjax.lab.data import Dataset, Split, batch_rows
from pjax.lab.devices import Placement

Params = dict[str, Array]


class Outcome(NamedTuple):
    """What a step tells: the mean loss of its batch before it, and the residual after it.

    The residual is NaN where there is none.
    """

    loss: Float[Array, ""]
    residual: Float[Array, ""]


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

    def init(
        self,
        model: nn.Module,
        params: Params,
        x: Float[Array, "batch features"],
        y: Int[Array, "batch *positions"],
    ) -> Any:
        """What the method carries from batch to batch, a pytree of arrays (`()` for nothing).

        It depends on the shapes of the batch, not on its values.
        """
        ...

    def step(
        self,
        model: nn.Module,
        params: Params,
        state: Any,
        x: Float[Array, "batch features"],
        y: Int[Array, "batch *positions"],
    ) -> tuple[Params, Any, Outcome]:
        """New parameters, new state and what the step tells."""
        ...


@runtime_checkable
class ProjectionOptimizer(Protocol):
    """What `Projection` needs of an optimiser of `pjax.optim`."""

    def init(self, fn: Callable[[Any], Any], params: Any) -> Any: ...

    def update(self, fn: Callable[[Any], Any], params: Any, *args: Any, **options: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Projection:
    """Training by projection alone: no gradient, no learning rate.

    **Arguments:**

    - `name`, `description`: for tables and plots.
    - `optimizer`: one of `pjax.optim`.
    - `num_classes`: the length of a one-hot row.
    - `carries_state`: hand the optimiser's state (power iterations) from batch to batch.
    - `decay_steps`: with a state, the batches over which a cosine takes the relaxation from 1 to 0;
      0 keeps it at 1.
    """

    name: str
    description: str
    optimizer: ProjectionOptimizer
    num_classes: int
    carries_state: bool = False
    decay_steps: int = 0

    def init(self, model: nn.Module, params: Params, x: Array, y: Array) -> Any:
        if not self.carries_state:
            return ()
        return jnp.zeros((), jnp.int32), self.optimizer.init(self._loss(model, x, y), params)

    def step(
        self, model: nn.Module, params: Params, state: Any, x: Array, y: Array
    ) -> tuple[Params, Any, Outcome]:
        loss = self._loss(model, x, y)
        if not self.carries_state:
            params, history = self.optimizer.update(loss, params)
        else:
            count, carried = state
            relaxation = cosine(count, self.decay_steps)
            params, history, carried = self.optimizer.update(
                loss, params, carried, relaxation=relaxation
            )
            state = count + 1, carried
        return params, state, Outcome(jnp.mean(history.loss), history.residual[-1])

    def _loss(self, model: nn.Module, x: Array, y: Array) -> Callable[[Params], Array]:
        return _batch_loss(model, x, y, self.num_classes)


@dataclasses.dataclass(frozen=True)
class PureProjection:
    """Training by `pjax.optim.Projection`: no gradient, no learning rate.

    **Arguments:**

    - `description`: for tables and plots.
    - `num_classes`: the length of a one-hot row.
    - `decay_steps`: the batches over which a cosine takes the relaxation from 1 to 0; 0 keeps it at
      1.
    """

    description: str
    num_classes: int
    decay_steps: int = 0
    name: str = "projection"

    def init(self, model: nn.Module, params: Params, x: Array, y: Array) -> Any:
        return _PURE.init(self._loss(model, x, y), params)

    def step(
        self, model: nn.Module, params: Params, state: Any, x: Array, y: Array
    ) -> tuple[Params, Any, Outcome]:
        relaxation = cosine(state.count, self.decay_steps)
        loss = self._loss(model, x, y)
        params, state, info = _PURE.update(loss, params, state, relaxation=relaxation)
        return params, state, Outcome(info.loss, info.residual)

    def _loss(self, model: nn.Module, x: Array, y: Array) -> Callable[[Params], Array]:
        rows = _batch_loss(model, x, y, self.num_classes)
        return lambda params: jnp.mean(rows(params))


_PURE = pjax.optim.Projection(check=False)


def _batch_loss(
    model: nn.Module, x: Array, y: Array, num_classes: int
) -> Callable[[Params], Array]:
    """Parameters to the cross-entropy of each row."""
    labels = jax.nn.one_hot(y, num_classes)
    return lambda params: pjax.cross_entropy(model.apply(params, x), labels)


def cosine(count: Any, decay_steps: Any) -> Array:
    """A factor from 1 to 0 over `decay_steps` counts; always 1 if these are 0. Both may be traced.

    `½ (1 + cos(π · min(count / decay_steps, 1)))`
    """
    share = jnp.where(decay_steps > 0, count / jnp.maximum(decay_steps, 1), 0.0)
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(share, 1.0)))


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known of one seed after `step` batches.

    **Attributes:**

    - `seconds`: of training, all seeds of the run together; compiling and measuring do not count.
    - `validation_accuracy`: of the parameters after this step.
    - `residual`: at the end of the last batch's solve; NaN where there is none.
    - `loss`: the mean over the batches since the record before, each before its step.
    - `train_accuracy`: on the first training rows, as many as there are validation rows; a curve to
      look at, not a result. NaN if it was not asked for.
    - `epoch`: how many times the training rows were seen.
    - `seed`: of the initial parameters and of the order of the rows.
    - `measures`: other numbers by name, those that a loop of one's own gives to `pjax.lab.Logger`.
    """

    step: int
    seconds: float
    validation_accuracy: float
    residual: float
    loss: float = math.nan
    train_accuracy: float = math.nan
    epoch: float = 0.0
    seed: int = 0
    measures: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished (or interrupted) run of one seed.

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


@dataclasses.dataclass
class Standing:
    """Where one seed stands, apart from its arrays; plain numbers.

    **Attributes:**

    - `best_step`, `best_accuracy`: the first measurement with the best validation accuracy.
    - `waited`: measurements since then.
    - `stopped`: why it trains no further: `"patience"`, `"not finite"`, or `""` if it does.
    - `steps`: the batches that count, up to the stop.
    - `loss_sum`, `loss_count`: of the batches since the last record.
    """

    seed: int
    best_step: int = 0
    best_accuracy: float = -1.0
    waited: int = 0
    stopped: str = ""
    steps: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0


class Training:
    """Several seeds in training: where they are, and how they go on.

    Each seed's parameters start from `model.init(jax.random.key(seed))`, its batches are those of
    `batch_rows` for the seed: both are functions of the seed and the step alone, so that what
    `snapshot` gives is all that a later process needs to go on from.

    **Arguments:**

    - `method`, `model`, `dataset`: what is trained, how, and on what.
    - `steps`, `batch_size`, `seeds`: how many batches, their size, and the seeds.
    - `measure_every`: accuracies are measured after so many batches, and at the end.
    - `patience`: a seed stops after so many measurements without a better validation accuracy;
      0: never.
    - `seeds_at_once`: how many seeds one vectorised step takes (the groups follow each other in the
      same program); 0: as many as memory allows.
    - `measure_train`: measure accuracy on training rows too.
    - `mesh`: the devices, see `pjax.lab.devices.parse_mesh`; one if not given. The batch size is
      that of all devices and processes together.

    **Raises:** `ValueError` for counts that are not positive, `UsageError` for devices that there
    are not.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        dataset: Dataset,
        *,
        steps: int,
        batch_size: int,
        seeds: Sequence[int],
        measure_every: int,
        patience: int = 0,
        seeds_at_once: int = 0,
        measure_train: bool = True,
        mesh: str = "",
    ) -> None:
        if steps < 1 or measure_every < 1:
            raise ValueError(
                f"`steps` and `measure_every` must be positive: {steps}, {measure_every}."
            )
        self.method, self.model, self.dataset = method, model, dataset
        self.steps, self.batch_size = steps, batch_size
        self.seeds = tuple(seeds)
        self.measure_every, self.patience = measure_every, patience
        self.measure_train = measure_train
        self.step = 0
        self.seconds = 0.0
        self.standings = [Standing(seed) for seed in self.seeds]
        self.placement = Placement(mesh, batch_size)
        params = [model.init(jax.random.key(seed)) for seed in self.seeds]
        x, y = self._first_batch()
        states = [method.init(model, one, x, y) for one in params]
        self._place(_stack(params), _stack(states))
        self.best = self.params
        self._rows = self._order(0)
        self._residual = np.full(len(self.seeds), math.nan)
        self._measure = Accuracy(model)
        self._select = jax.jit(_select)
        start = time.perf_counter()
        self._compiled, self.seeds_at_once = self._compile(seeds_at_once)
        self.compile_seconds = time.perf_counter() - start
        self.state_bytes = _state_bytes(self._compiled, self.state)

    @property
    def epoch(self) -> float:
        return self.step * self.batch_size / len(self.dataset.train)

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.steps or all(one.stopped for one in self.standings)

    def measure(self) -> list[Record]:
        """The records of the seeds that still train, at this step; it keeps the best parameters."""
        validation = self._measure.each(self.params, self.dataset.validation)
        training = np.full(len(self.seeds), math.nan)
        if self.measure_train:
            rows = slice(min(len(self.dataset.validation), len(self.dataset.train)))
            part = Split(self.dataset.train.x[rows], self.dataset.train.y[rows])
            training = self._measure.each(self.params, part)
        records = []
        better = np.zeros(len(self.seeds), bool)
        for number, (one, accuracy) in enumerate(zip(self.standings, validation, strict=True)):
            if one.stopped:
                continue
            mean = one.loss_sum / one.loss_count if one.loss_count else math.nan
            records.append(
                Record(
                    step=self.step,
                    seconds=self.seconds,
                    validation_accuracy=float(accuracy),
                    residual=float(self._residual[number]),
                    loss=mean,
                    train_accuracy=float(training[number]),
                    epoch=self.epoch,
                    seed=one.seed,
                )
            )
            if accuracy > one.best_accuracy:
                one.best_step, one.best_accuracy, one.waited = self.step, float(accuracy), 0
                better[number] = True
            else:
                one.waited += 1
            if one.loss_count and not math.isfinite(mean):
                one.stopped = "not finite"
            elif self.patience and one.waited >= self.patience:
                one.stopped = "patience"
            one.loss_sum, one.loss_count = 0.0, 0
        if better.all():
            self.best = self.params
        elif better.any():
            self.best = self._select(better, self.params, self.best)
        return records

    def advance(self) -> list[Record]:
        """One batch for every seed; the records, if it is time to measure."""
        chosen = np.stack([next(rows) for rows in self._rows])
        train = self.dataset.train
        x, y = self.placement.rows(train.x, chosen), self.placement.rows(train.y, chosen)
        start = time.perf_counter()
        self.params, self.state, outcome = jax.block_until_ready(
            self._compiled(self.params, self.state, x, y)
        )
        self.seconds += time.perf_counter() - start
        self.step += 1
        losses, self._residual = np.asarray(outcome.loss), np.asarray(outcome.residual)
        for one, loss in zip(self.standings, losses, strict=True):
            if not one.stopped:
                one.steps = self.step
                one.loss_sum += float(loss)
                one.loss_count += 1
        if self.step % self.measure_every == 0 or self.step == self.steps:
            return self.measure()
        return []

    def test(self) -> list[float]:
        """Test accuracy of each seed's best parameters."""
        return [float(one) for one in self._measure.each(self.best, self.dataset.test)]

    def test_auc(self) -> list[float | None]:
        """Test AUC of each seed's best parameters; None where there are not two classes."""
        if self.dataset.num_classes != 2:
            return [None] * len(self.seeds)
        return [float(one) for one in self._measure.auc(self.best, self.dataset.test)]

    def best_of(self, number: int) -> Params:
        """The best parameters of the seed with this position."""
        return {name: jnp.asarray(np.asarray(value)[number]) for name, value in self.best.items()}

    def snapshot(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All that is needed to go on: a pytree of arrays, and numbers that JSON can hold."""
        arrays = {"params": self.params, "state": self.state, "best": self.best}
        numbers = {
            "step": self.step,
            "seconds": self.seconds,
            "seeds_at_once": self.seeds_at_once,
            "standings": [dataclasses.asdict(one) for one in self.standings],
        }
        return arrays, numbers

    def restore(self, arrays: dict[str, Any], numbers: dict[str, Any]) -> None:
        """Goes on from a snapshot of a training with the same arguments."""
        self._place(arrays["params"], arrays["state"])
        self.best = self.placement.put(arrays["best"], self._shardings[0])
        self.step, self.seconds = int(numbers["step"]), float(numbers["seconds"])
        self.standings = [Standing(**one) for one in numbers["standings"]]
        self._rows = self._order(self.step)

    def _place(self, params: Any, state: Any) -> None:
        place = self.placement
        self._shardings = place.params(params), place.like_params(state, params)
        self.params, self.state = place.put((params, state), self._shardings)

    def _order(self, start: int) -> list[Iterator[np.ndarray]]:
        rows = len(self.dataset.train)
        return [
            itertools.islice(batch_rows(rows, self.batch_size, seed), start, None)
            for seed in self.seeds
        ]

    def _first_batch(self) -> tuple[Array, Array]:
        rows = next(batch_rows(len(self.dataset.train), self.batch_size, self.seeds[0]))
        return jnp.asarray(self.dataset.train.x[rows]), jnp.asarray(self.dataset.train.y[rows])

    def _compile(self, at_once: int) -> tuple[Any, int]:
        count, features = len(self.seeds), self.dataset.num_features
        rows = count, self.batch_size
        batch = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=self.placement.batch(len(shape)))
            for shape, dtype in (
                ((*rows, features), jnp.float32),
                ((*rows, *self.dataset.train.y.shape[1:]), jnp.int32),
            )
        ]
        chosen = min(at_once, count) or count
        while True:
            step = _over_seeds(self.method, self.model, count, chosen)
            step = jax.jit(step, out_shardings=(*self._shardings, self.placement.everywhere()))
            compiled = step.lower(self.params, self.state, *batch).compile()
            if at_once or chosen == 1 or _fits_memory(compiled):
                return compiled, chosen
            chosen = -(-chosen // 2)


def train(
    method: Method,
    model: nn.Module,
    dataset: Dataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    measure_every: int,
    callback: Callable[[Record], bool | None] = lambda record: None,
) -> Run:
    """Trains from `model.init(jax.random.key(seed))` for `steps` batches.

    **Arguments:**

    - `method`, `model`, `dataset`: what is trained, how, and on what.
    - `steps`, `batch_size`, `seed`: how many batches, their size, and the seed of the initial
      parameters and of the order of the rows.
    - `measure_every`: validation accuracy is measured after so many batches, and at the end.
    - `callback`: called with each record, the first at step 0: `record.step`, `record.loss`,
      `record.residual`, `record.validation_accuracy`. If it returns `True` the run ends there, with
      what is there and `interrupted` set; what it raises goes on to the caller. The method `write`
      of a `pjax.lab.Logger` is one.

    **Raises:** `ValueError` for counts that are not positive.

    ```python
    from pjax.lab.config import TrainConfig, make_method, make_model
    from pjax.lab.data import load
    from pjax.lab.train import train

    settings, digits = TrainConfig(hidden=(16,)), load("digits")
    run = train(
        make_method(settings, 10), make_model(settings, digits), digits,
        steps=100, batch_size=128, seed=0, measure_every=5,
        callback=lambda record: record.validation_accuracy > 0.9,  # enough
    )
    ```
    """
    training = Training(
        method,
        model,
        dataset,
        steps=steps,
        batch_size=batch_size,
        seeds=(seed,),
        measure_every=measure_every,
        measure_train=False,
    )
    records = training.measure()
    interrupted = callback(records[0]) is True
    while not (interrupted or training.finished):
        found = training.advance()
        records += found
        # What it says of the last record interrupts nothing.
        interrupted = any(callback(one) is True for one in found) and not training.finished
    return Run(
        method=method.name,
        description=method.description,
        records=records,
        best_step=training.standings[0].best_step,
        test_accuracy=training.test()[0],
        compile_seconds=training.compile_seconds,
        state_bytes=training.state_bytes,
        interrupted=interrupted,
        params=training.best_of(0),
    )


class Accuracy:
    """The fraction of classes that have the largest output, over rows (and positions of texts).

    Rows are taken in chunks of a few thousand.
    """

    def __init__(self, model: nn.Module, chunk: int = 5000) -> None:
        self._chunk = chunk

        def correct(params: Params, x: Array, y: Array) -> Array:
            return jnp.sum(jnp.argmax(model.apply(params, x), axis=-1) == y)

        self._correct = jax.jit(jax.vmap(correct, in_axes=(0, None, None)))
        self._outputs = jax.jit(jax.vmap(model.apply, in_axes=(0, None)))

    def __call__(self, params: Params, split: Split) -> float:
        """The accuracy of these parameters."""
        one = {name: jnp.asarray(np.asarray(value)[None]) for name, value in params.items()}
        return float(self.each(one, split)[0])

    def each(self, params: Params, split: Split) -> Float[np.ndarray, " seeds"]:
        """The accuracies of parameters that are stacked along a first axis."""
        correct: Any = 0
        for start in range(0, len(split), self._chunk):
            part = slice(start, start + self._chunk)
            correct = correct + np.asarray(self._correct(params, split.x[part], split.y[part]))
        return correct / split.y.size

    def auc(self, params: Params, split: Split) -> Float[np.ndarray, " seeds"]:
        """The area under the receiver operating characteristic, of two classes.

        The score of a row is the difference of its outputs; 0.5 where one is not finite or the rows
        have one class only.
        """
        from sklearn.metrics import roc_auc_score

        chunks = [
            np.asarray(self._outputs(params, split.x[start : start + self._chunk]))
            for start in range(0, len(split), self._chunk)
        ]
        outputs = np.concatenate(chunks, axis=1)
        scores = outputs[..., 1] - outputs[..., 0]
        known = len(np.unique(split.y)) == 2
        return np.array(
            [
                roc_auc_score(split.y, one) if known and np.isfinite(one).all() else 0.5
                for one in scores
            ]
        )


def _over_seeds(method: Method, model: nn.Module, count: int, at_once: int) -> Callable[..., Any]:
    """The method's step on arrays that are stacked along a first axis, one entry for each seed."""

    def step(params: Params, state: Any, x: Array, y: Array) -> tuple[Params, Any, Outcome]:
        new_params, new_state, outcome = method.step(model, params, state, x, y)
        # What comes out goes in again: same types, or the compiled step would not take it.
        new_params, new_state = jax.tree.map(
            lambda new, old: jnp.asarray(new, jnp.result_type(old)),
            (new_params, new_state),
            (params, state),
        )
        return new_params, new_state, outcome

    if count == 1:
        return lambda *given: jax.tree.map(
            lambda leaf: leaf[None], step(*jax.tree.map(lambda leaf: leaf[0], given))
        )
    if at_once >= count:
        return jax.vmap(step)
    return lambda *given: jax.lax.map(lambda one: step(*one), given, batch_size=at_once)


def _fits_memory(compiled: Any) -> bool:
    """Whether a step's arrays take less than half of the device's memory."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return True
    stats = jax.devices()[0].memory_stats() or {}
    memory = stats.get("bytes_limit") or _physical_memory()
    needed = (
        analysis.temp_size_in_bytes
        + analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
    )
    return memory is None or needed < memory / 2


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _stack(trees: Sequence[Any]) -> Any:
    def stack(*leaves: Any) -> np.ndarray:
        # In NumPy: JAX would compile a program for each shape.
        return np.stack([np.asarray(leaf) for leaf in leaves])

    return jax.tree.map(stack, *trees)


def _select(chosen: Array, new: Params, old: Params) -> Params:
    def pick(new: Array, old: Array) -> Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(pick, new, old)


def _state_bytes(compiled: Any, state: Any) -> int | None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    carried = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    return int(analysis.temp_size_in_bytes) + carried
