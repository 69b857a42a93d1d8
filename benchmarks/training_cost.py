"""What a whole training step costs beside backprop and Adam: batch in, parameters out.

    python -m benchmarks.training_cost [--networks 1x128 4x128 2x2048 cnn32-64] [--rounds 15]

Candidates take turns within each round; times are medians of their ratios to backprop with Adam.
Temporaries are those of XLA's `memory_analysis`: of the gradient or the displacement, and of the
whole step of pure projection.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import pjax
from benchmarks.accuracy_tasks import ConvolutionalTask, Task

#: Widths of dense layers on MNIST's shape, or channels of strided convolutions on CIFAR-10's.
NETWORKS = {
    "1x128": (128,),
    "4x128": (128,) * 4,
    "2x2048": (2048, 2048),
    "12x128": (128,) * 12,
    "cnn32-64": (32, 64),
}
#: What the issue of the default training step asks: time and temporaries over backprop's.
ASKED = {"displacement": (1.2, 2.0), "projection": (2.5, None)}


class Candidate(NamedTuple):
    """`step(params, state, x, y)`, its first state, and the direction alone (None: part of it).

    A step's temporaries lie in the memory of its outputs where they fit, so that memory is that of
    the direction: `(params, (x, y))` to the loss and the gradient or displacement.
    """

    step: Callable[..., Any]
    state: Any
    direction: Callable[..., Any] | None


def candidates(task: Task, params: Any, x: Any, y: Any) -> dict[str, Candidate]:
    """What is compared."""
    adam = optax.adam(1e-3)

    def descend(direction: Any) -> Candidate:
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            _, moved = direction(params, (x, y))
            updates, state = adam.update(moved, state, params)
            return optax.apply_updates(params, updates), state

        return Candidate(step, adam.init(params), direction)

    loss = task.loss("pure")
    pure = pjax.optim.CyclicProjections(splitting="layer", check=False)

    def project(params: Any, state: Any, x: Any, y: Any) -> Any:
        params, _, state = pure.update(lambda p: loss(p, (x, y)), params, state)
        return params, state

    return {
        "backprop": descend(jax.value_and_grad(task.loss("gradient"))),
        "displacement": descend(pjax.value_and_displacement(loss)),
        "projection": Candidate(project, pure.init(lambda p: loss(p, (x, y)), params), None),
    }


def seconds(run: Callable[..., Any], *args: Any, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        out = run(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of a training step.")
    parser.add_argument("--networks", nargs="+", default=["1x128", "4x128", "2x2048"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    print(
        f"JAX {jax.__version__} on {jax.devices()[0].device_kind} ({platform.machine()}), batch "
        f"{options.batch_size}, medians of {options.rounds} rounds"
    )
    columns = ("ms", "x backprop", "asked", "temp MB", "x backprop", "asked", "compile s")
    print(f"{'network':10s}{'step':16s}" + "".join(f"{column:>12s}" for column in columns))
    for name in options.networks:
        if name.startswith("cnn"):
            features = 3072
            task = ConvolutionalTask("cifar10", channels=NETWORKS[name])
        else:
            features = 784
            task = Task("mnist", NETWORKS[name], batch_size=options.batch_size)
        params = task.init(features, 10, seed=0)
        x = jax.random.uniform(jax.random.key(0), (options.batch_size, features))
        y = jax.nn.one_hot(jnp.arange(options.batch_size) % 10, 10)
        found = candidates(task, params, x, y)
        compiled, compiling, memory = {}, {}, {}
        for method, (step, state, direction) in found.items():
            start = time.perf_counter()
            compiled[method] = jax.jit(step).lower(params, state, x, y).compile()
            compiling[method] = time.perf_counter() - start
            measured = compiled[method]
            if direction is not None:
                measured = jax.jit(direction).lower(params, (x, y)).compile()
            analysis: Any = measured.memory_analysis()
            memory[method] = analysis.temp_size_in_bytes / 1e6
        repeats = 2 if name in ("2x2048", "cnn32-64") else 10
        times = {method: [] for method in compiled}
        for _ in range(options.rounds + 1):
            for method, run in compiled.items():
                state = found[method].state
                times[method].append(seconds(run, params, state, x, y, repeats=repeats))
        for method in compiled:
            ratio = statistics.median(
                a / b for a, b in zip(times[method][1:], times["backprop"][1:], strict=True)
            )
            time_asked, memory_asked = ASKED.get(method, ("", ""))
            print(
                f"{name:10s}{method:16s}{1e3 * statistics.median(times[method][1:]):12.2f}"
                f"{ratio:12.2f}{time_asked or '':>12}{memory[method]:12.2f}"
                f"{memory[method] / memory['backprop']:12.2f}{memory_asked or '':>12}"
                f"{compiling[method]:12.1f}"
            )


if __name__ == "__main__":
    main()
