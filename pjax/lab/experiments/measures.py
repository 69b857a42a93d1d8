"""What experiments measure beside accuracies: costs, residuals and sizes.

Each is a function of an entry's settings, its data set and its model; it returns a list of rows
that JSON can hold, one for each method.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pjax
from pjax import nn
from pjax.lab import config
from pjax.lab.config import OPTIMIZERS, CompareConfig, TrainConfig
from pjax.lab.data import Dataset, Split
from pjax.lab.train import Accuracy, Params, Training

Rows = list[dict[str, Any]]
#: Hears how much is done and how much there is; returns whether to stop.
Tick = Callable[[int, int], bool]
Measure = Callable[[CompareConfig, Dataset, nn.Module, Tick], Rows | None]


def cost(settings: CompareConfig, dataset: Dataset, model: nn.Module, tick: Tick) -> Rows | None:
    """The time of a training step and its memory.

    Each of `steps` rounds trains one batch with each method in turn; figures are medians over the
    rounds, the first left out. `relative` is the median of the ratios to the method `adam` in the
    same round, None without it.
    """
    total = settings.steps + len(settings.methods)
    trainings: list[Training] = []
    for method in settings.methods:
        if tick(len(trainings), total):
            return None
        one = _one_method(settings, method)
        trainings.append(config.make_training(one, dataset, model))
    times: list[list[float]] = []
    for number in range(settings.steps):
        if tick(len(trainings) + number, total):
            return None
        times.append([])
        for training in trainings:
            before = training.seconds
            training.advance()
            times[-1].append(training.seconds - before)
    rows = []
    base = settings.methods.index("adam") if "adam" in settings.methods else None
    kept = times[1:] or times
    for number, (name, training) in enumerate(zip(settings.methods, trainings, strict=True)):
        seconds = statistics.median(one[number] for one in kept)
        optimizer = getattr(training.method, "optimizer", None)
        projections = 1 if optimizer is None else optimizer.solver.steps
        ratio = None
        if base is not None:
            ratio = statistics.median(one[number] / one[base] for one in kept)
        rows.append(
            {
                "method": name,
                "description": training.method.description,
                "milliseconds": 1000 * seconds,
                "projection_steps": projections,
                "milliseconds_per_projection_step": 1000 * seconds / projections,
                "relative": ratio,
                "compile_seconds": training.compile_seconds,
                "state_bytes": training.state_bytes,
            }
        )
    tick(total, total)
    return rows


#: A solve's history is kept at so many steps.
_KEPT = 200
#: Of the margin loss: what a row asks for is then its nearest point that holds the margin.
_PROX_STEP = 1e6


def residual(
    settings: CompareConfig, dataset: Dataset, model: nn.Module, tick: Tick
) -> Rows | None:
    """The residual along one solve for the first `batch_size` training rows, from the first seed.

    The constraint on a row is all but hard: its class scores at least 1, the others at most −1
    (`pjax.margin_loss` with a large prox step). Where a network can do that for all rows the
    residual goes to 0; where it cannot, a gap stays.
    """
    batch, params, loss = _first_batch(settings, dataset, model, pjax.margin_loss)
    rows: Rows = []
    for number, method in enumerate(settings.methods):
        if tick(number, len(settings.methods)):
            return None
        optimizer = OPTIMIZERS[method](
            settings.projection_steps,
            splitting=settings.splitting,
            check=False,
            prox_step=_PROX_STEP,
        )
        moved, history = optimizer.update(loss, params)
        count = len(history)
        steps = np.unique(np.geomspace(1, count, min(_KEPT, count)).round().astype(int))
        values = np.asarray(history.residual)
        held = np.asarray(jnp.sum(loss(moved) <= 1e-3))
        rows.append(
            {
                "method": method,
                "description": f"{settings.splitting}, {count} steps",
                "rows": settings.batch_size,
                "steps": steps.tolist(),
                "residual": [_number(values[step - 1]) for step in steps],
                "first": _number(values[0]),
                "last": _number(values[-1]),
                "verdict": history.verdict.name.lower().replace("_", "-"),
                "satisfied": int(held),
                "train_accuracy": Accuracy(model)(moved, batch),
            }
        )
    tick(len(settings.methods), len(settings.methods))
    return rows


def sizes(settings: CompareConfig, dataset: Dataset, model: nn.Module, tick: Tick) -> Rows | None:
    """Edge variables and bytes of a batch's problem: predicted from shapes alone, and allocated.

    `temporary_bytes` is what XLA reports for the compiled update of a method, beyond parameters,
    batch and result.
    """
    _, params, loss = _first_batch(settings, dataset, model, pjax.cross_entropy)
    rows: Rows = []
    for number, method in enumerate(settings.methods):
        if tick(number, len(settings.methods)):
            return None
        if method not in OPTIMIZERS:
            training = config.make_training(_one_method(settings, method), dataset, model)
            rows.append(
                {
                    "method": method,
                    "description": "",
                    "edge_variables": None,
                    "stored": None,
                    "predicted_bytes": None,
                    "allocated_bytes": None,
                    "temporary_bytes": training.state_bytes,
                }
            )
            continue
        optimizer = OPTIMIZERS[method](
            settings.projection_steps, splitting=settings.splitting, check=False
        )
        problem = optimizer.problem(loss, params)
        found = problem.sizes()
        state = jax.block_until_ready(jax.jit(problem.initial)())
        analysis: Any = optimizer.lower(loss, params).compile().memory_analysis()
        rows.append(
            {
                "method": method,
                "description": settings.splitting,
                "edge_variables": found.edge_variables,
                "stored": found.stored,
                "predicted_bytes": found.bytes,
                "allocated_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
                "temporary_bytes": None if analysis is None else int(analysis.temp_size_in_bytes),
            }
        )
        del state, problem
    tick(len(settings.methods), len(settings.methods))
    return rows


MEASURES: dict[str, Measure] = {"cost": cost, "residual": residual, "sizes": sizes}


def _first_batch(
    settings: CompareConfig, dataset: Dataset, model: nn.Module, loss: Callable[..., Any]
) -> tuple[Split, Params, Callable[[Params], Any]]:
    """The first training rows, the first seed's parameters, and the loss of these rows."""
    part = slice(settings.batch_size)
    batch = Split(dataset.train.x[part], dataset.train.y[part])
    x, labels = jnp.asarray(batch.x), jax.nn.one_hot(batch.y, dataset.num_classes)
    params = model.init(jax.random.key(settings.seeds[0]))
    return batch, params, lambda params: loss(model.apply(params, x), labels)


def _one_method(settings: CompareConfig, method: Any) -> TrainConfig:
    """The settings with one method and one seed, measured at the end alone."""
    return config.single(settings, method, seeds=settings.seeds[:1], measure_every=10**9)


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
