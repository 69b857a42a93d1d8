"""The suite's measurements, for pytest-benchmark: run by `python -m benchmarks.suite run`.

Each round runs backprop with Adam and then the step in question, so that both see the same machine;
`extra_info` keeps the median of their ratios beside counts that do not depend on the machine.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from benchmarks.suite.cases import STEPS, Case, Measured, Step, cases, measured, tracing_seconds

#: A round runs a step so often that it takes this long.
_SECONDS = 0.05
_MOST_REPEATS = 100


class Compiled(NamedTuple):
    """A step, ready to run.

    **Attributes:**

    - `lower`, `compile`, `first`: seconds to trace and lower, in XLA, and of the first run.
    - `info`: what the compiled program says of itself.
    """

    run: Callable[[], Any]
    shorter: Callable[[], Any] | None
    steps: int
    lower: float
    compile: float
    first: float
    info: dict[str, Any]


def _compile(function: Callable[..., Any], args: Any) -> tuple[Any, float, float]:
    begin = time.perf_counter()
    lowered = jax.jit(function).lower(*args)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return compiled, middle - begin, time.perf_counter() - middle


def _seconds(run: Callable[[], Any], repeats: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        out = run()
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / repeats


@functools.lru_cache(maxsize=2)
def compiled(case: Case, step: Step) -> Compiled:
    """A step of a case, compiled and run once."""
    found: Measured = measured(case, step)
    program, lowering, compiling = _compile(found.run, found.args)
    direction = program
    if found.direction is not None:
        params, batch = found.args[0], found.args[-1]
        direction = _compile(found.direction, (params, batch))[0]
    shorter = None
    if found.shorter is not None:
        short = _compile(found.shorter, found.args)[0]
        shorter = functools.partial(short, *found.args)
        _seconds(shorter)
    run = functools.partial(program, *found.args)
    first = _seconds(run)
    costs: Any = program.cost_analysis() or {}
    memory: Any = program.memory_analysis()
    info = {
        "temporaries": direction.memory_analysis().temp_size_in_bytes,
        "operands": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "flops": float(costs.get("flops", 0)),
        "bytes_moved": float(costs.get("bytes accessed", 0)),
    }
    return Compiled(run, shorter, found.steps, lowering, compiling, first, info)


@pytest.fixture(scope="session")
def machine() -> dict[str, float]:
    """What the device reaches: operations each second in a large matrix product, bytes each second
    in a copy (read and written).
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    square = jax.random.normal(jax.random.key(0), (size, size))
    product = functools.partial(jax.jit(jnp.matmul), square, square)
    copy = functools.partial(jax.jit(jnp.negative), jnp.ones(2**26))
    for run in (product, copy):
        _seconds(run)
    return {
        "flops_per_second": 2 * size**3 / min(_seconds(product) for _ in range(7)),
        "bytes_per_second": 2**29 / min(_seconds(copy) for _ in range(7)),
    }


@pytest.mark.parametrize(
    ("case", "step"),
    [pytest.param(case, step, id=f"{case.key}:{step}") for case in cases() for step in case.steps],
)
def test_step(
    benchmark: Any, machine: dict[str, float], request: Any, case: Case, step: Step
) -> None:
    rounds = request.config.getoption("--rounds")
    baseline, found = compiled(case, STEPS[0]), compiled(case, step)
    once = max(_seconds(baseline.run), 1e-6)
    repeats = int(min(max(_SECONDS / once, 1), _MOST_REPEATS))
    times: list[tuple[float, float]] = []

    def of_one_step(run_seconds: float) -> float:
        if found.shorter is None:
            return run_seconds
        return (run_seconds - _seconds(found.shorter, repeats)) / found.steps

    def before() -> None:
        times.append((_seconds(baseline.run, repeats), of_one_step(_seconds(found.run, repeats))))

    benchmark.group = case.key
    benchmark.pedantic(
        lambda: jax.block_until_ready(found.run()), setup=before, rounds=rounds, warmup_rounds=1
    )
    measured_times = times[1:]  # the first warms up
    floor = max(
        baseline.info["flops"] / machine["flops_per_second"],
        baseline.info["operands"] / machine["bytes_per_second"],
    )
    step_seconds = statistics.median(own for _, own in measured_times)
    benchmark.extra_info.update(
        group=case.group,
        case=case.name,
        step=step,
        number=case.number,
        seconds=step_seconds,
        ratio=statistics.median(own / base for base, own in measured_times),
        floor_seconds=floor,
        trace_seconds=0.0 if step == STEPS[0] else tracing_seconds(case),
        lower_seconds=found.lower,
        compile_seconds=found.compile,
        first_seconds=found.first,
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        **found.info,
        **machine,
    )
    assert step_seconds > 0
