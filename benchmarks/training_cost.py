"""What a whole training step costs beside backprop and Adam: batch in, parameters out.

    python -m benchmarks.training_cost [--networks 1x128 4x128 2x2048] [--rounds 15]

Candidates take turns within each round; times are medians of their ratios to backprop with Adam.
Temporaries are those of XLA's `memory_analysis`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import pjax
from benchmarks.accuracy_tasks import Task

NETWORKS = {
    "1x128": (128,),
    "4x128": (128,) * 4,
    "2x2048": (2048, 2048),
    "12x128": (128,) * 12,
}
#: What the issue of the default training step asks: time and temporaries over backprop's.
ASKED = {"displacement": (1.2, 2.0), "pure": (2.5, None)}


def steps_for(task: Task) -> dict[str, Callable[..., Any]]:
    """`step(params, state, x, y)` of each candidate."""
    adam = optax.adam(1e-3)
    found: dict[str, Callable[..., Any]] = {}

    def descend(direction: Any) -> Callable[..., Any]:
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            _, moved = direction(params, (x, y))
            updates, state = adam.update(moved, state, params)
            return optax.apply_updates(params, updates), state

        return step

    found["backprop"] = descend(jax.value_and_grad(task.loss("gradient")))
    found["displacement"] = descend(pjax.value_and_displacement(task.loss("pure")))
    return found


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
        task = Task("mnist", NETWORKS[name], batch_size=options.batch_size)
        params = task.init(784, 10, seed=0)
        x = jax.random.uniform(jax.random.key(0), (options.batch_size, 784))
        y = jax.nn.one_hot(jnp.arange(options.batch_size) % 10, 10)
        state = optax.adam(1e-3).init(params)
        compiled, compiling = {}, {}
        for method, step in steps_for(task).items():
            start = time.perf_counter()
            compiled[method] = jax.jit(step).lower(params, state, x, y).compile()
            compiling[method] = time.perf_counter() - start
        repeats = 2 if name == "2x2048" else 10
        times = {method: [] for method in compiled}
        for _ in range(options.rounds + 1):
            for method, run in compiled.items():
                times[method].append(seconds(run, params, state, x, y, repeats=repeats))
        memory = {m: c.memory_analysis().temp_size_in_bytes / 1e6 for m, c in compiled.items()}
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
