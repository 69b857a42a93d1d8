"""Pipelined projection beside pipelined Adam and Muon with the same delays, and its time on two
devices.

    python -m benchmarks.pipeline accuracy --data-dir DIR [--stages 4 13] [--seeds 3]
        [--cache runs/pipeline]
    python -m benchmarks.pipeline seconds [--layers 16] [--width 512] [--rounds 5]

`accuracy` trains MNIST 784-12x128-10 (standardised inputs, 390 batches of 256, moves on a cosine to
0). Adam and Muon get the best of their rates by validation with a seed of its own; test rows are
those of the reported seeds. Each run is one file in the cache, so a command that was killed goes
on where it was. `seconds` times a batch of pipelined training on two CPU devices, a core each,
beside the same network on one device with one core; each in a process of its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

import pjax
from pjax.lab import baselines
from pjax.lab.data import batch_rows, load

WIDTHS = (784, *(128,) * 12, 10)
BATCHES, BATCH_SIZE = 390, 256
#: The seed of the runs that choose a rate; none of the reported seeds.
TUNING_SEED = 1000
#: Of a pipeline: the rate grows over so many batches, as the moves of projection do.
RAMP = 100
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


class Cell(NamedTuple):
    """One run.

    **Attributes:**

    - `method`: `"projection"`, `"adam"` or `"muon"`.
    - `stages`: how many; 1 is without delay.
    - `seed`: of the initial parameters and of the order of the batches.
    - `rate`: of a method that has one.
    - `stashed`: gradients are taken at the weights of the forward pass, of which a stage then keeps
      a copy for each batch on its way; else at those of today.
    """

    method: str
    stages: int
    seed: int
    rate: float = 0.0
    stashed: bool = False


# --- Networks ------------------------------------------------------------------------------------


@functools.cache
def dense_layers(count: int, last: bool) -> Callable[[Any, Any], Any]:
    """A stage of so many dense layers with relus; of the last stage the last layer has none."""

    def stage(params: Any, x: Any) -> Any:
        for number, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            if not (last and number == count - 1):
                x = jax.nn.relu(x)
        return x

    return stage


def cut(layers: Sequence[Any], stages: int) -> tuple[list[Any], list[Any]]:
    """Layers in stages of nearly equal length, the first ones longer."""
    least, more = divmod(len(layers), stages)
    counts = [least + (number < more) for number in range(stages)]
    ends = list(itertools.accumulate(counts))
    params = [list(layers[end - n : end]) for n, end in zip(counts, ends, strict=True)]
    fns = [dense_layers(n, end == len(layers)) for n, end in zip(counts, ends, strict=True)]
    return fns, params


def initial(widths: Sequence[int], seed: int) -> list[Any]:
    keys = jax.random.split(jax.random.key(seed), len(widths) - 1)
    he = jax.nn.initializers.he_normal()
    return [
        {"w": he(key, (rows, columns)), "b": jnp.zeros(columns)}
        for key, rows, columns in zip(keys, widths, widths[1:], strict=False)
    ]


def mean_loss(outputs: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


# --- Accuracy ------------------------------------------------------------------------------------


class Data:
    """MNIST with pixels of mean 0 and deviation 1."""

    def __init__(self, data_dir: str | None) -> None:
        found = load("mnist", data_dir)
        pixels = jnp.asarray(found.train.x)
        mean, deviation = pixels.mean(), pixels.std()
        self.parts = {
            name: ((jnp.asarray(part.x) - mean) / deviation, jnp.asarray(part.y))
            for name, part in (
                ("train", found.train), ("validation", found.validation), ("test", found.test)
            )
        }  # fmt: skip

    def batches(self, seed: int) -> Iterator[tuple[Any, Any]]:
        x, y = self.parts["train"]
        for rows in itertools.islice(batch_rows(len(x), BATCH_SIZE, seed), BATCHES):
            yield x[rows], y[rows]

    def accuracy(self, fns: Sequence[Any], params: Sequence[Any], part: str) -> float:
        x, y = self.parts[part]
        for fn, own in zip(fns, params, strict=True):
            x = fn(own, x)
        return float((x.argmax(-1) == y).mean())


def cosine(tick: int, stages: int) -> float:
    """From 1 to 0 over all ticks, those in which the last batches come back too."""
    return 0.5 * (1 + np.cos(np.pi * tick / (BATCHES + 2 * stages - 2)))


def by_projection(cell: Cell, data: Data, fns: Sequence[Any], params: Sequence[Any]) -> Any:
    pipeline = pjax.optim.PipelinedProjection(fns, mean_loss, check=False)
    state = None
    for number, (x, y) in enumerate(data.batches(cell.seed)):
        if state is None:
            state = pipeline.init(params, x, y)
        params, state, _ = pipeline.update(params, state, x, y, cosine(number, cell.stages))
    assert state is not None
    rest = [cosine(BATCHES + tick, cell.stages) for tick in range(pipeline.delays[0])]
    params, _ = pipeline.finish(params, state, rest)
    return params


def _matrices(params: Any) -> Any:
    return baselines.matrix_axes(params, lambda name, leaf: leaf.shape[-1] == WIDTHS[-1])


METHODS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "muon": lambda: baselines.scale_by_muon(_matrices),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def descend(
    method: str, fn: Any, params: Any, state: Any, weights: Any, x: Any, force: Any, rate: Any
) -> tuple[Any, Any, Any]:
    """A stage moved against the gradient that the stage behind has sent."""
    _, pull = jax.vjp(fn, weights, x)
    gradient, back = pull(force)
    updates, state = METHODS[method]().update(gradient, state, params)
    return jax.tree.map(lambda leaf, move: leaf - rate * move, params, updates), state, back


_forward = jax.jit(lambda fn, params, x: fn(params, x), static_argnums=0)
_last_force = jax.jit(
    lambda fn, params, x, y: jax.grad(lambda out: mean_loss(out, y))(fn(params, x)),
    static_argnums=0,
)


def by_gradients(cell: Cell, data: Data, fns: Sequence[Any], params: Sequence[Any]) -> Any:
    """The pipeline of `pjax.optim.PipelinedProjection`, with gradients in the place of requests.

    The rate grows over the first batches as the moves of projection do.
    """
    params, last = list(params), len(fns) - 1
    states = [METHODS[cell.method]().init(own) for own in params]
    delay = 2 * last
    inputs: dict[tuple[int, int], Any] = {}
    weights: dict[tuple[int, int], Any] = {}
    forces: dict[tuple[int, int], Any] = {}
    labels: dict[int, Any] = {}
    batches = data.batches(cell.seed)
    for tick in range(BATCHES + delay):
        sent = dict(forces)
        if tick < BATCHES:
            inputs[tick, 0], labels[tick] = next(batches)
        for s, fn in enumerate(fns):
            batch = tick - (delay - s)
            if not 0 <= batch < BATCHES:
                continue
            x = inputs.pop((batch, s))
            old = weights.pop((batch, s), params[s])
            if s == last:
                force = _last_force(fn, old, x, labels.pop(batch))
            else:
                force = sent[batch, s]
                del forces[batch, s]
            ramp = min(1.0, (batch + 1) / RAMP) if last else 1.0
            rate = cell.rate * ramp * cosine(tick, cell.stages)
            params[s], states[s], back = descend(
                cell.method, fn, params[s], states[s], old, x, force, rate
            )
            if s:
                forces[batch, s - 1] = back
        for s in reversed(range(last)):
            batch = tick - s
            if 0 <= batch < BATCHES:
                if cell.stashed:
                    weights[batch, s] = params[s]
                inputs[batch, s + 1] = _forward(fns[s], params[s], inputs[batch, s])
    return params


def run(cell: Cell, data: Data, part: str) -> float:
    fns, params = cut(initial(WIDTHS, cell.seed), cell.stages)
    train = by_projection if cell.method == "projection" else by_gradients
    return data.accuracy(fns, train(cell, data, fns, params), part)


def cached(cell: Cell, data: Data, part: str, folder: Path) -> float:
    """The accuracy of a run, from its file or made."""
    name = "-".join(f"{key}_{value:g}" if isinstance(value, float) else f"{key}_{value}"
                    for key, value in cell._asdict().items())  # fmt: skip
    path = folder / f"{name}-{part}.json"
    if path.exists():
        return json.loads(path.read_text("utf-8"))["accuracy"]
    found = run(cell, data, part)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({**cell._asdict(), "part": part, "accuracy": found}), "utf-8")
    os.replace(temporary, path)
    return found


def tuned(method: str, stages: int, data: Data, folder: Path) -> Cell:
    """The best rate by validation, with weights stashed or not."""
    cells = [
        Cell(method, stages, TUNING_SEED, rate, stashed)
        for rate in RATES
        for stashed in ((False, True) if stages > 1 else (False,))
    ]
    return max(cells, key=lambda cell: cached(cell, data, "validation", folder))


def accuracy(args: argparse.Namespace) -> None:
    data, folder, console = Data(args.data_dir), Path(args.cache), Console()
    table = Table("stages", "delay", "method", "setting", "validation", "test", "± (n)")
    for stages in (1, *args.stages):
        for method in args.methods:
            cell = Cell(method, stages, TUNING_SEED)
            if method != "projection":
                cell = tuned(method, stages, data, folder)
            validation = cached(cell, data, "validation", folder)
            row = [str(stages), str(2 * stages - 2), method]
            row.append(f"{cell.rate:g}{', stashed' * cell.stashed}" if cell.rate else "fixed")
            row.append(f"{validation:.2%}")
            if args.seeds:
                scores = [
                    cached(cell._replace(seed=seed), data, "test", folder)
                    for seed in range(args.seeds)
                ]
                spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
                row += [f"{statistics.mean(scores):.2%}", f"{spread:.2%} ({len(scores)})"]
            console.print(*row)
            table.add_row(*row)
    console.print(table)


# --- Seconds -------------------------------------------------------------------------------------


def seconds_of(kind: str, layers: int, width: int) -> float:
    """Seconds of a batch, in this process."""
    widths = (width,) * (layers + 1)
    params = initial(widths, 0)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(BATCH_SIZE, width)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 10, BATCH_SIZE))
    devices = jax.devices()
    # The last stage makes its output once in a tick, those before twice: it gets more layers.
    stages = 1 if kind == "one" else 2
    first = round(layers * 3 / 7) if stages == 2 else 0
    counts = [first, layers - first] if stages == 2 else [layers]
    fns = [dense_layers(n, number == stages - 1) for number, n in enumerate(counts)]
    groups = [params[:first], params[first:]] if stages == 2 else [params]
    pipeline = pjax.optim.PipelinedProjection(fns, mean_loss, devices=devices, check=False)
    state = pipeline.init(groups, x, y)
    given: Any = groups

    def batches(count: int) -> float:
        nonlocal given, state
        begin = time.perf_counter()
        for _ in range(count):
            given, state, _ = pipeline.update(given, state, x, y)
        jax.block_until_ready((given, state))
        return (time.perf_counter() - begin) / count

    batches(20)  # compiling, and the first renewals of moments
    return batches(32)  # two periods of renewals


def seconds(args: argparse.Namespace) -> None:
    """Both kinds in turn, each in a process with as many cores as devices."""
    if args.kind:
        print(seconds_of(args.kind, args.layers, args.width))
        return
    found: dict[str, list[float]] = {"one": [], "two": []}
    for _ in range(args.rounds):
        for kind, count in (("one", 1), ("two", 2)):
            flags = (
                f"--xla_force_host_platform_device_count={count} --xla_cpu_multi_thread_eigen=false"
            )
            command = [
                "taskset", "-c", ",".join(map(str, range(count))), sys.executable, "-m",
                "benchmarks.pipeline", "seconds", "--kind", kind, "--layers", str(args.layers),
                "--width", str(args.width),
            ]  # fmt: skip
            environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            found[kind].append(float(done.stdout.split()[-1]))
    one, two = (statistics.median(found[kind]) for kind in ("one", "two"))
    print(f"one device, one core:    {one * 1e3:.1f} ms a batch")
    print(f"two devices, two stages: {two * 1e3:.1f} ms a batch, {two / one:.2f} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("accuracy")
    one.add_argument("--data-dir")
    one.add_argument("--cache", default="runs/pipeline")
    one.add_argument("--stages", type=int, nargs="*", default=[4, 13])
    one.add_argument("--methods", nargs="*", default=["projection", *METHODS])
    one.add_argument("--seeds", type=int, default=3)
    two = commands.add_parser("seconds")
    two.add_argument("--layers", type=int, default=16)
    two.add_argument("--width", type=int, default=512)
    two.add_argument("--rounds", type=int, default=5)
    two.add_argument("--kind", choices=["one", "two"])
    args = parser.parse_args()
    accuracy(args) if args.command == "accuracy" else seconds(args)


if __name__ == "__main__":
    main()
