"""Residual networks for images: how large their problems are, and the loss of first batches beside
Adam's.

    python -m benchmarks.resnet sizes [--networks resnet18 resnet50] [--batch-size 128]
    python -m benchmarks.resnet train --data-dir DIR --width 8 --batch-size 64 [--batches 400]
        [--seeds 3]

The networks are Flax NNX modules with a 3x3 stem, with batch norm or without a norm (then the last
convolution of each block begins at zero). `sizes` traces a training step and counts; `train`
trains narrow networks on CIFAR-10 by pure projection, with Adam and Muon on gradients and with Adam
on displacements; rates and schedules are tuned by a seed of their own. It prints the mean loss of
each quarter and of the last 20 batches. How long a step takes to compile:
`benchmarks.compile_time`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

import pjax
from benchmarks.accuracy_methods import matrices
from benchmarks.suite.cases import Measured
from pjax.lab import baselines, data
from pjax.problem import Formulation, layout, sizes
from pjax.trace import trace

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SCHEDULES = ("constant", "cosine")
PROJECTION = "projection"
#: What is multiplied by minus the rate, for each method that has one.
SCALES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "muon": lambda: baselines.scale_by_muon(matrices),
    "displacement-adam": optax.scale_by_adam,
}
METHODS = (PROJECTION, *SCALES)
#: The batches at the end of which the mean loss is printed.
LAST = 20
TUNING_SEED = 1000
#: Blocks in each of the four stages, and whether they are bottlenecks.
NETWORKS = {"resnet18": ((2, 2, 2, 2), False), "resnet50": ((3, 4, 6, 3), True)}


class Block(nnx.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, beside a skip."""

    def __init__(
        self, inputs: int, width: int, stride: int, bottleneck: bool, norm: bool, rngs: nnx.Rngs
    ) -> None:
        outputs = 4 * width if bottleneck else width
        shapes = [(inputs, width, 1), (width, width, 3), (width, outputs, 1)]
        if not bottleneck:
            shapes = [(inputs, width, 3), (width, width, 3)]
        # The stride is that of the first 3x3 convolution.
        strided = next(i for i, (_, _, size) in enumerate(shapes) if size == 3)
        he, zero = nnx.initializers.he_normal(), nnx.initializers.zeros
        last = len(shapes) - 1
        self.convolutions = nnx.List(
            nnx.Conv(
                before,
                after,
                (size, size),
                strides=stride if place == strided else 1,
                use_bias=not norm,
                kernel_init=zero if place == last and not norm else he,
                rngs=rngs,
            )
            for place, (before, after, size) in enumerate(shapes)
        )
        self.norms = nnx.List(nnx.BatchNorm(after, rngs=rngs) for _, after, _ in shapes if norm)
        same = stride == 1 and inputs == outputs
        self.shortcut = nnx.data(
            None
            if same
            else nnx.Conv(
                inputs, outputs, (1, 1), strides=stride, use_bias=False, kernel_init=he, rngs=rngs
            )
        )

    def __call__(self, x: Array) -> Array:
        y = x
        for place, convolution in enumerate(self.convolutions):
            y = convolution(nnx.relu(y) if place else y)
            y = self.norms[place](y) if len(self.norms) else y
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class ResNet(nnx.Module):
    """A residual network for 32x32 images; its first stage has `width` channels."""

    def __init__(
        self, stages: Sequence[int], bottleneck: bool, width: int, norm: bool, rngs: nnx.Rngs
    ) -> None:
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=not norm, rngs=rngs)
        self.norm = nnx.data(nnx.BatchNorm(width, rngs=rngs) if norm else None)
        blocks, inputs = [], width
        for stage, count in enumerate(stages):
            for block in range(count):
                stride = 2 if stage and not block else 1
                blocks.append(Block(inputs, width << stage, stride, bottleneck, norm, rngs))
                inputs = (width << stage) * (4 if bottleneck else 1)
        self.blocks = nnx.List(blocks)
        self.head = nnx.Linear(inputs, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        x = nnx.relu(x if self.norm is None else self.norm(x))
        for block in self.blocks:
            x = block(x)
        return self.head(jnp.mean(x, axis=(1, 2)))


def make(name: str, width: int, norm: bool, seed: int) -> tuple[Any, Any, Callable[..., Any]]:
    """The parameters, the other state, and `loss(params, state, x, labels)` with the new state."""
    definition, params, state = nnx.split(
        ResNet(*NETWORKS[name], width, norm, nnx.Rngs(seed)), nnx.Param, ...
    )

    def loss(params: Any, state: Any, x: Array, labels: Array) -> tuple[Array, Any]:
        model = nnx.merge(definition, params, state, copy=True)
        rows = optax.softmax_cross_entropy_with_integer_labels(model(x), labels)
        return jnp.mean(rows), nnx.split(model, nnx.Param, ...)[2]

    return params, state, loss


def batch(size: int) -> tuple[Array, Array]:
    """Noise of CIFAR-10's shape."""
    x = jax.random.normal(jax.random.key(0), (size, 32, 32, 3))
    return x, jnp.arange(size) % 10


def measured(norm: bool, width: int, batch_size: int, step: str) -> Measured:
    """A training step of ResNet-18: parameters and statistics, and the optimiser's state."""
    params, state, loss = make("resnet18", width, norm, 0)
    images = batch(batch_size)
    method = "adam" if step == "backprop" else PROJECTION if step == PROJECTION else f"{step}-adam"
    taken = _step(method, loss)

    def run(carry: Any, moments: Any, images: Any) -> Any:
        carry, value = taken.run((*carry, moments), 1e-3, *images)
        return value, carry[:2], carry[2]

    return Measured(run, ((params, state), taken.init(params, state, *images), images))


def show_sizes(options: argparse.Namespace) -> None:
    print(f"batch {options.batch_size}, width {options.width}; numbers in millions, bytes in GB")
    columns = ("norm", "params", "nodes", "layer: edges", "bytes", "neuron: edges", "bytes", "s")
    print(f"{'network':10s}" + "".join(f"{column:>14s}" for column in columns))
    for name in options.networks:
        for norm in (True, False):
            params, state, loss = make(name, options.width, norm, 0)
            x, labels = batch(options.batch_size)
            begin = time.perf_counter()
            program, *_ = trace(lambda p: loss(p, state, x, labels), params, True)  # noqa: B023
            cells: list[Any] = ["batch" if norm else "none"]
            cells.append(f"{sum(p.size for p in jax.tree.leaves(params)) / 1e6:.2f}")
            for splitting in ("layer", "neuron"):
                found = layout(program, Formulation(splitting=splitting, grouping="levels"))
                size = sizes(found)
                if splitting == "layer":
                    cells.append(len(found.graph.nodes))
                cells += [f"{size.edge_variables / 1e6:.1f}", f"{size.bytes / 1e9:.2f}"]
            cells.append(f"{time.perf_counter() - begin:.1f}")
            print(f"{name:10s}" + "".join(f"{cell:>14}" for cell in cells), flush=True)


class Setting(NamedTuple):
    """How a method is set, for those that must be."""

    rate: float
    schedule: str

    def __str__(self) -> str:
        return f"{self.schedule} {self.rate:g}"


def train(options: argparse.Namespace) -> None:
    """Losses of the first batches; each curve is kept, so that a killed command goes on."""
    found = data.load("cifar10", options.data_dir).standardised()
    images = found.train.x.reshape(-1, *found.shape)
    print(
        f"ResNet-18, width {options.width}, batches of {options.batch_size}: mean training loss of "
        f"each quarter of {options.batches} batches and of the last {LAST}, {options.seeds} seeds "
        "± standard deviations"
    )
    for norm in options.norms:
        means: dict[str, np.ndarray] = {}
        for kind in options.methods:
            _, _, loss = make("resnet18", options.width, norm == "batch", 0)
            init, run = _step(kind, loss)
            step = Step(init, jax.jit(run))
            curve = functools.partial(_curve, step, kind, options, norm, images, found.train.y)
            best = None if kind == PROJECTION else _tuned(curve)
            curves = [curve(best, seed) for seed in range(options.seeds)]
            means[kind] = np.array(
                [[part.mean() for part in (*np.array_split(c, 4), c[-LAST:])] for c in curves]
            )
            _print_means(f"{norm:8s}{kind:20s}{best or ''!s:16}", means[kind])
        for kind in [name for name in means if name != "adam" and "adam" in means]:
            _print_means(f"{norm:8s}{f'{kind} − adam':36s}", means[kind] - means["adam"])


def _tuned(curve: Callable[[Setting, int], np.ndarray]) -> Setting:
    """The setting with the least loss of the last batches, by a seed of its own."""
    settings = itertools.starmap(Setting, itertools.product(RATES, SCHEDULES))
    losses = {setting: float(np.mean(curve(setting, TUNING_SEED)[-LAST:])) for setting in settings}
    return min(losses, key=lambda s: losses[s] if np.isfinite(losses[s]) else np.inf)


def _print_means(label: str, rows: np.ndarray) -> None:
    spread = rows.std(0, ddof=1) if len(rows) > 1 else np.full(rows.shape[1], np.nan)
    cells = (f"{mean:8.3f} ± {s:.3f}" for mean, s in zip(rows.mean(0), spread, strict=True))
    print(label + "".join(cells), flush=True)


class Step(NamedTuple):
    """A step of a method: `run(carry, rate, x, labels)` from a carry that `init` makes."""

    init: Callable[..., Any]
    run: Callable[..., tuple[Any, Array]]


def _step(kind: str, loss: Callable[..., Any]) -> Step:
    if kind == PROJECTION:
        pure = pjax.optim.Projection(has_aux=True)

        def project(carry: Any, rate: Any, x: Array, labels: Array) -> tuple[Any, Array]:
            params, state, memory = carry
            params, memory, info = pure.update(loss, params, memory, state, x, labels)
            return (params, info.aux, memory), info.loss

        return Step(functools.partial(pure.init, loss), project)
    of = pjax.value_and_displacement if kind == "displacement-adam" else jax.value_and_grad
    direction = of(loss, has_aux=True)

    def descend(carry: Any, rate: Any, x: Array, labels: Array) -> tuple[Any, Array]:
        params, state, moments = carry
        (value, state), moved = direction(params, state, x, labels)
        updates, moments = SCALES[kind]().update(moved, moments, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        return (params, state, moments), value

    return Step(lambda params, *_: SCALES[kind]().init(params), descend)


def _curve(
    step: Step,
    kind: str,
    options: argparse.Namespace,
    norm: str,
    images: np.ndarray,
    labels: np.ndarray,
    setting: Setting | None,
    seed: int,
) -> np.ndarray:
    folder = f"{kind}-{norm}-{options.width}-{options.batch_size}-{options.batches}"
    name = "fixed" if setting is None else f"{setting.schedule}-{setting.rate:g}"
    file = options.cache / folder / f"{name}-{seed}.npy"
    if file.exists():
        return np.load(file, allow_pickle=False)
    params, state, _ = make("resnet18", options.width, norm == "batch", seed)
    order = np.random.default_rng(seed).permutation(len(images))
    batches = order[: options.batches * options.batch_size].reshape(options.batches, -1)
    first = images[batches[0]], labels[batches[0]]
    carry = params, state, step.init(params, state, *first)
    values = []
    for number, rows in enumerate(batches):
        rate = 0.0 if setting is None else setting.rate
        if setting is not None and setting.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * number / options.batches))
        carry, value = step.run(carry, rate, images[rows], labels[rows])
        values.append(float(value))
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, np.asarray(values))
    partial.replace(file)
    return np.asarray(values)


def main() -> None:
    parser = argparse.ArgumentParser(description="Residual networks by projection.")
    parser.add_argument("command", choices=("sizes", "train"))
    parser.add_argument("--networks", nargs="+", default=["resnet18"], choices=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--norms", nargs="+", default=["batch", "none"], choices=["batch", "none"])
    parser.add_argument("--cache", type=Path, default=Path("runs/resnet"))
    parser.add_argument("--data-dir", default=os.environ.get("PJAX_DATA_DIR"))
    options = parser.parse_args()
    {"sizes": show_sizes, "train": train}[options.command](options)


if __name__ == "__main__":
    main()
