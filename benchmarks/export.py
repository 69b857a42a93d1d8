"""Packed networks: bytes and rows a second, beside the same network in float32.

    python -m benchmarks.export [--rows 2000] [--repeats 5]

The networks are of the size of those for MNIST, with random signs: neither depends on what they
have learned. *NumPy* is the same network as products of float32 matrices, with NumPy's BLAS;
*JAX* is the compiled function. One thread computes the packed network; say so to the others by
`taskset -c 0`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.table import Table

import pjax
from pjax.lab import terminal

SIDE = 28


def perceptron(params: Any, x: Any, library: Any = jnp) -> Any:
    """`library` is that of the products: NumPy, or JAX's."""
    *hidden, last = params
    for w in hidden:
        x = library.where(x @ w > 0.5, 1.0, -1.0).astype("float32")
    return x @ last


def convolutional(params: Any, x: Any, library: Any = jnp) -> Any:
    *kernels, last = params
    x = x.reshape(len(x), SIDE, SIDE, 1)
    for kernel in kernels:
        if library is jnp:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        else:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))  # pyright: ignore
            x = np.tensordot(windows, kernel.transpose(2, 0, 1, 3), 3)
        n, side, _, channels = x.shape
        x = x.reshape(n, side // 2, 2, side // 2, 2, channels).max((2, 4))
        x = library.where(x > 0.5, 1.0, -1.0).astype("float32")
    return x.reshape(len(x), -1) @ last


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.where(rng.random(shape) < 0.5, np.float32(-1), np.float32(1)) for shape in shapes]


NETWORKS: dict[str, tuple[Any, list[np.ndarray]]] = {
    "784-128-10": (perceptron, draw((784, 128), (128, 10))),
    "784-4x1024-10": (perceptron, draw((784, 1024), *((1024, 1024),) * 3, (1024, 10))),
    "CNN 32, 64": (convolutional, draw((3, 3, 1, 32), (3, 3, 32, 64), (3136, 10))),
}


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The median of some calls, after one."""
    function()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export", description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    columns = ("network", "float32, bytes", "packed, bytes", "ratio", "rows/s packed",
               "rows/s NumPy", "rows/s JAX")  # fmt: skip
    table = Table(*columns, box=box.SIMPLE_HEAD)
    rows = np.random.default_rng(1).integers(0, 256, (options.rows, SIDE**2)).astype(np.float32)
    of_jax = jnp.asarray(rows)
    with tempfile.TemporaryDirectory() as folder:
        for name, (network, params) in NETWORKS.items():
            report = pjax.export.pack(network, params, rows[:32], Path(folder, "network.npz"))
            assert report.difference == 0
            predict = pjax.export.load(report.path)
            compiled = jax.jit(network)
            ways = (
                lambda p=predict: p(rows),
                lambda f=network, p=params: f(p, rows, np),
                lambda f=compiled, p=params: f(p, of_jax),
            )
            speeds = [options.rows / seconds(way, options.repeats) for way in ways]
            ratio = report.float_bytes / report.bytes
            cells = (f"{report.float_bytes:,}", f"{report.bytes:,}", f"{ratio:.1f}")
            table.add_row(name, *cells, *(f"{speed:,.0f}" for speed in speeds))
    terminal.console(120).print(table, highlight=False)


if __name__ == "__main__":
    main()
