"""How long training steps take to trace and lower, and to compile, beside backprop's with Adam:
those of the displacement with Adam and of pure projection.

    python -m benchmarks.compile_time [--networks "mlp 4x128" …] [--batch-size 32] [--repeats 3]

Each is compiled in a fresh process, since what a process has compiled before it need not compile
again; all of them in turn in each round. Prints medians over rounds of seconds and of ratios: of
both over backprop, and of a deep perceptron over a shallow one. The residual networks
have `--width` channels in their first stage and batches of `--batch-size`; the others are those of
`benchmarks.suite`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax

from benchmarks import resnet
from benchmarks.suite.cases import STEPS, Step, cases, measured

#: What is compared: backprop, the displacement and pure projection.
COMPARED = STEPS[:3]
#: Names of residual networks, and whether they have batch norms.
RESIDUAL = {"resnet18 with batch norm": True, "resnet18 without a norm": False}
#: Names of the others, and their cases of the suite.
CASES = {
    "mlp 1x128": "networks/mlp 1x128",
    "mlp 4x128": "depth/4x128",
    "mlp 64x128": "depth/64x128",
    "mlp 2x2048": "networks/mlp 2x2048",
    "cnn 32-64": "networks/cnn 32-64",
    "rnn 64, length 32": "networks/rnn 64, length 32",
    "transformer 64": "networks/transformer 64",
}

#: The name of a network, and what trains it.
Key = tuple[str, Step]


def lowering(network: str, step: Step, options: argparse.Namespace) -> Callable[[], Any]:
    """What lowers a training step."""
    if network in CASES:
        (case,) = (case for case in cases() if case.key == CASES[network])
        found = measured(case, step)
    else:
        found = resnet.measured(RESIDUAL[network], options.width, options.batch_size, step)
    return functools.partial(jax.jit(found.run).lower, *found.args)


def measure(network: str, step: Step, options: argparse.Namespace) -> tuple[float, ...]:
    """Seconds to trace and lower, seconds to compile, seconds of all cores together to compile, and
    gigabytes of temporaries.
    """
    lower = lowering(network, step, options)
    begin = time.perf_counter()
    lowered = lower()
    middle, busy = time.perf_counter(), time.process_time()
    compiled = lowered.compile()
    end = time.perf_counter()
    busy = time.process_time() - busy
    memory: Any = compiled.memory_analysis()
    return middle - begin, end - middle, busy, memory.temp_size_in_bytes / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile time of training steps.")
    names = [*RESIDUAL, *CASES]
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"JAX {jax.__version__}, medians of {options.repeats}, each in a fresh process")
    spawn = multiprocessing.get_context("spawn")
    runs: dict[Key, list[tuple[float, ...]]] = {}
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as processes:
        for number in range(options.repeats):
            for network, step in itertools.product(options.networks, COMPARED):
                run = processes.submit(measure, network, step, options).result()
                runs.setdefault((network, step), []).append(run)
            print(f"round {number + 1} of {options.repeats}", file=sys.stderr, flush=True)
    columns = ("lower s", "compile s", "of cores s", "temp GB")
    print(f"{'network':26s}{'step':21s}" + "".join(f"{column:>12s}" for column in columns))
    for network in options.networks:
        for step in COMPARED:
            _print_row(network, step, runs[network, step], "12.3f")
        for step in COMPARED[1:]:
            ratios = _ratios(runs, (network, step), (network, COMPARED[0]))
            _print_row("", f"{step}, ratio", ratios, "11.2f", "x")
    if {"mlp 4x128", "mlp 64x128"} <= set(options.networks):
        for step in COMPARED:
            ratios = _ratios(runs, ("mlp 64x128", step), ("mlp 4x128", step))
            _print_row("mlp 64x128 over 4x128", step, ratios, "11.2f", "x")


def _ratios(runs: dict[Key, list[tuple[float, ...]]], over: Key, under: Key) -> list[Any]:
    """Of each round."""
    return [
        [a / b for a, b in zip(one, other, strict=True)]
        for one, other in zip(runs[over], runs[under], strict=True)
    ]


def _print_row(name: str, label: str, rows: Sequence[Any], form: str, unit: str = "") -> None:
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(f"{name:26s}{label:21s}" + "".join(f"{number:{form}}{unit}" for number in medians))


if __name__ == "__main__":
    main()
