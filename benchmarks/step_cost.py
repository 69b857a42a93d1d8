"""What one projection step costs beside one backprop gradient: time, compiled temporaries,
compile time.

    python -m benchmarks.step_cost [--sizes 784 128 10] [--batch-size 256] [--rounds 15]

A step's time is the difference between a solve of many steps and one of few, over the difference
in steps; the gradient, the short and the long solve take turns within each round.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pjax
from pjax.trace import trace

FEW, MANY = 5, 45
#: The published code's compiled temporaries (MB) and step time over a gradient, 784-128-10, batch
#: 256.
PUBLISHED = {"AlternatingProjections": (618, None), "DouglasRachford": (523, 100)}
METHODS = (
    "AlternatingProjections",
    "CyclicProjections",
    "DouglasRachford",
    "CyclicDouglasRachford",
    "DifferenceMap",
    "AlternatingReflections",
)


def seconds(run: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start


def megabytes(compiled: Any) -> float:
    return compiled.memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of one projection step.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[784, 128, 10])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()

    sizes, batch = options.sizes, options.batch_size
    keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    layers = list(itertools.pairwise(sizes))
    params = {
        "w": [
            jax.random.normal(k, s) * (2 / s[0]) ** 0.5 for k, s in zip(keys, layers, strict=False)
        ],
        "b": [jnp.zeros(size) for size in sizes[1:-1]],
    }
    x = jax.random.uniform(keys[-1], (batch, sizes[0]))
    y = jax.nn.one_hot(jnp.arange(batch) % sizes[-1], sizes[-1])

    def rows(params: Any, x: Any, y: Any) -> Any:
        for weight, bias in zip(params["w"], params["b"], strict=False):
            x = jax.nn.relu(x @ weight + bias)
        return pjax.cross_entropy(x @ params["w"][-1], y)

    def loss(params: Any) -> Any:
        return rows(params, x, y)

    start = time.perf_counter()
    for _ in range(10):
        _, leaves, consts, _ = trace(loss, params)
    tracing = (time.perf_counter() - start) / 10
    backprop = jax.jit(jax.grad(lambda *args: jnp.mean(rows(*args)))).lower(params, x, y)
    start = time.perf_counter()
    gradient = backprop.compile()
    compiling = time.perf_counter() - start
    print(
        f"{'-'.join(map(str, sizes))}, batch {batch}; JAX {jax.__version__} on "
        f"{jax.devices()[0].device_kind} ({platform.machine()}); tracing one batch "
        f"{1e3 * tracing:.1f} ms; gradient: compiled in {compiling:.1f} s, temporaries "
        f"{megabytes(gradient):.2f} MB"
    )
    columns = ("x gradient", "published", "temp MB", "published", "compile s")
    print(f"{'one step of':24s}" + "".join(f"{column:>12s}" for column in columns))
    for name in options.methods:
        make = getattr(pjax.optim, name)
        start = time.perf_counter()
        few = make(FEW).lower(loss, params).compile()
        compiling = time.perf_counter() - start
        many = make(MANY).lower(loss, params).compile()
        times = [
            (
                seconds(gradient, params, x, y),
                seconds(few, leaves, consts),
                seconds(many, leaves, consts),
            )
            for _ in range(options.rounds + 1)
        ][1:]
        ratio = statistics.median(
            (long - short) / (MANY - FEW) / base for base, short, long in times
        )
        memory, cost = PUBLISHED.get(name, ("", ""))
        print(
            f"{name:24s}{ratio:12.2f}{cost or '':>12}{megabytes(many):12.2f}{memory:>12}"
            f"{compiling:12.1f}"
        )


if __name__ == "__main__":
    main()
