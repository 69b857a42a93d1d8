"""What one projection step costs beside one backprop gradient: time, compiled temporaries,
compile time.

    python -m benchmarks.step_cost [--sizes 784 128 10] [--batch-size 256] [--rounds 15]
    python -m benchmarks.step_cost --channels 8 16 --batch-size 64 --steps 2 6 [--rounds 7]

With `--channels` the network has 3x3 convolutions of stride 1 on 28x28 images, then a dense layer.
A step's time is the difference between a solve of many steps and one of few, over the difference
in steps; the gradient, the short and the long solve take turns within each round.
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pjax
from pjax.trace import trace

#: The published code's compiled temporaries (MB) and step time over a gradient, 784-128-10, batch
#: 256.
PUBLISHED = {"AlternatingProjections": (618, None), "DouglasRachford": (523, 100)}
#: Of the images that convolutions read.
SIDE = 28
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


def network(
    sizes: list[int], channels: list[int] | None, batch: int
) -> tuple[Any, jax.Array, Callable[..., Any]]:
    """Parameters, a batch of noise, and the function from them to logits."""
    kernels = [] if channels is None else list(itertools.pairwise([1, *channels]))
    if channels is not None:
        sizes = [SIDE * SIDE * channels[-1], sizes[-1]]
    shapes = [(3, 3, *pair) for pair in kernels] + list(itertools.pairwise(sizes))
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    params = {
        "w": [
            jax.random.normal(key, shape) * (2 / math.prod(shape[:-1])) ** 0.5
            for key, shape in zip(keys, shapes, strict=False)
        ],
        "b": [jnp.zeros(shape[-1]) for shape in shapes[:-1]],
    }
    features = (sizes[0],) if channels is None else (SIDE, SIDE, 1)

    def rows(params: Any, x: Any) -> Any:
        for weight, bias in zip(params["w"], params["b"], strict=False):
            if weight.ndim == 2:
                product = x @ weight
            else:
                layout = ("NHWC", "HWIO", "NHWC")
                product = jax.lax.conv_general_dilated(
                    x, weight, (1, 1), "SAME", dimension_numbers=layout
                )
            x = jax.nn.relu(product + bias)
        return x.reshape(batch, -1) @ params["w"][-1]

    return params, jax.random.uniform(keys[-1], (batch, *features)), rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of one projection step.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[784, 128, 10])
    parser.add_argument("--channels", type=int, nargs="+", help="convolutions, in place of sizes")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, nargs=2, default=[5, 45], metavar=("FEW", "MANY"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()

    batch, (few_steps, many_steps) = options.batch_size, options.steps
    params, x, rows = network(options.sizes, options.channels, batch)
    y = jax.nn.one_hot(jnp.arange(batch) % options.sizes[-1], options.sizes[-1])
    published = PUBLISHED if options.channels is None else {}

    def loss(params: Any) -> Any:
        return pjax.cross_entropy(rows(params, x), y)

    start = time.perf_counter()
    for _ in range(10):
        _, leaves, consts, _ = trace(loss, params)
    tracing = (time.perf_counter() - start) / 10
    backprop = jax.jit(
        jax.grad(lambda params, x, y: jnp.mean(pjax.cross_entropy(rows(params, x), y)))
    ).lower(params, x, y)
    start = time.perf_counter()
    gradient = backprop.compile()
    compiling = time.perf_counter() - start
    described = "-".join(map(str, options.sizes))
    if options.channels is not None:
        described = f"3x3 convolutions of {options.channels} channels"
    print(
        f"{described}, batch {batch}; JAX {jax.__version__} on "
        f"{jax.devices()[0].device_kind} ({platform.machine()}); tracing one batch "
        f"{1e3 * tracing:.1f} ms; gradient: compiled in {compiling:.1f} s, temporaries "
        f"{megabytes(gradient):.2f} MB"
    )
    columns = ("x gradient", "published", "temp MB", "published", "compile s")
    print(f"{'one step of':24s}" + "".join(f"{column:>12s}" for column in columns))
    for name in options.methods:
        make = getattr(pjax.optim, name)
        start = time.perf_counter()
        few = make(few_steps).lower(loss, params).compile()
        compiling = time.perf_counter() - start
        many = make(many_steps).lower(loss, params).compile()
        times = [
            (
                seconds(gradient, params, x, y),
                seconds(few, leaves, consts, None, 1.0),
                seconds(many, leaves, consts, None, 1.0),
            )
            for _ in range(options.rounds + 1)
        ][1:]
        ratio = statistics.median(
            (long - short) / (many_steps - few_steps) / base for base, short, long in times
        )
        memory, cost = published.get(name, ("", ""))
        print(
            f"{name:24s}{ratio:12.2f}{cost or '':>12}{megabytes(many):12.2f}{memory:>12}"
            f"{compiling:12.1f}"
        )


if __name__ == "__main__":
    main()
