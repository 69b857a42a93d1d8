"""How long a step of pure projection takes beside one of backprop with Adam, in the long run.

    python -m benchmarks.steady_step [--networks "mlp 4x128" …] [--rounds 5]

`pjax.optim.Projection` renews its second moments in every `Requests.every`-th batch, and more often
among the first ones. Here steps are measured from a batch on from which renewals are that far
apart, in whole periods, so that the mean includes one renewal; both steps in turn in each round.
Prints medians over rounds of milliseconds a step and of the ratio, and the ratio of what is
compiled: seconds to trace and lower, and in XLA. The first of them in a process pays for what
others find done: `benchmarks.compile_time` has each in a fresh one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pjax
from benchmarks import resnet
from benchmarks.suite.cases import Measured, Step, cases, measured

CASES: dict[str, Callable[[Step], Measured]] = {
    case.name: functools.partial(measured, case) for case in cases() if case.group == "networks"
} | {
    f"resnet18, {name}, width 8": functools.partial(resnet.measured, norm, 8, 64)
    for name, norm in (("batch norm", True), ("no norm", False))
}
COMPARED: tuple[Step, ...] = ("backprop", "projection")


class Compiled(NamedTuple):
    """A step, with what it begins from, and how long it took to get it."""

    run: Callable[..., Any]
    args: tuple[Any, ...]
    lower: float
    compile: float


def compiled(case: Callable[[Step], Measured], step: Step) -> Compiled:
    """A step of a case; of projection from a batch on with which a period begins."""
    found = case(step)
    begin = time.perf_counter()
    lowered = jax.jit(found.run).lower(*found.args)
    middle = time.perf_counter()
    run = lowered.compile()
    end = time.perf_counter()
    params, state, batch = found.args
    if step == "projection":
        every = pjax.optim.Projection().requests.every
        for _ in range(every):
            _, params, state = run(params, state, batch)
        state = dataclasses.replace(state, count=jnp.full_like(state.count, every))
    return Compiled(run, (params, state, batch), middle - begin, end - middle)


def seconds(step: Compiled, steps: int) -> tuple[float, Compiled]:
    """Seconds a step, and the step to go on with."""
    params, state, batch = step.args
    begin = time.perf_counter()
    for _ in range(steps):
        _, params, state = step.run(params, state, batch)
    jax.block_until_ready((params, state))
    return (time.perf_counter() - begin) / steps, step._replace(args=(params, state, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps of pure projection beside backprop's.")
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    every = pjax.optim.Projection().requests.every
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, {options.rounds} rounds of "
          f"{every} steps")  # fmt: skip
    columns = ("backprop ms", "projection ms", "x step", "x lower", "x XLA")
    print(f"{'network':28s}" + "".join(f"{column:>15s}" for column in columns))
    for name in options.networks:
        steps = [compiled(CASES[name], step) for step in COMPARED]
        rounds = []
        for _ in range(options.rounds + 1):
            once = [seconds(step, every) for step in steps]
            steps = [step for _, step in once]
            rounds.append([time for time, _ in once])
        base, own = zip(*rounds[1:], strict=True)  # the first warms up
        ratio = statistics.median(b / a for a, b in rounds[1:])
        first, second = steps
        numbers = (
            1e3 * statistics.median(base), 1e3 * statistics.median(own), ratio,
            second.lower / first.lower, second.compile / first.compile,
        )  # fmt: skip
        print(f"{name:28s}" + "".join(f"{number:15.2f}" for number in numbers), flush=True)


if __name__ == "__main__":
    main()
