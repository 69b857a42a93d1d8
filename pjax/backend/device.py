"""What the device is good at, and programs that run once, also within a trace."""

from __future__ import annotations

import contextlib
from typing import Any

import jax

#: Options of XLA for what is compiled to run once. At level 0 its CPU backend makes NaN of some
#: programs whose numbers are finite.
QUICK = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}


def compile_time_eval() -> contextlib.AbstractContextManager[Any]:
    """Operations inside run now, also within an outer `jit`."""
    return jax.ensure_compile_time_eval()


def launches_kernels() -> bool:
    """Whether the device runs one launched kernel after the other, as a GPU does: then few large
    operations are faster than many small ones, where a CPU is as fast with either.
    """
    return jax.default_backend() != "cpu"


def several() -> bool:
    """Whether arrays may lie on several devices. What all rows have a say in, such as whether a
    loop goes on, is then exchanged between devices, each time that it is asked for.
    """
    return jax.device_count() > 1


def run_once(function: Any, *args: Any) -> Any:
    """`function(*args)` now, also within an outer `jit`, compiled as quickly as can be.

    As one program: within `compile_time_eval` each operation on known numbers is compiled by
    itself, also while something is traced.
    """
    return jax.jit(function).lower(*args).compile(compiler_options=QUICK)(*args)
