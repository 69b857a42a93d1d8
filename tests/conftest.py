"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import pytest

#: Most of the time of the tests is XLA's: this way it takes a quarter to compile a step.
_QUICK_TO_COMPILE = {
    "xla_backend_optimization_level": "0",
    "xla_cpu_use_fusion_emitters": "false",
}


def _compile_quickly() -> None:
    """Sets the flags that this XLA knows: it ends the process at any other. None has been read
    before the first array is made. `XLA_FLAGS`, also an empty one, goes before them.
    """
    spec = importlib.util.find_spec("jaxlib")
    library = Path(spec.origin or "").parent / "libjax_common.so" if spec else Path()
    if "XLA_FLAGS" in os.environ or not library.is_file():
        return
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as code:
        known = [f"--{k}={v}" for k, v in _QUICK_TO_COMPILE.items() if code.find(k.encode()) >= 0]
    os.environ["XLA_FLAGS"] = " ".join(known)


_compile_quickly()


def enable_x64() -> AbstractContextManager[Any]:
    """A context in which JAX has float64; the name moved out of `jax.experimental`."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64 as context  # pyright: ignore

    return context()


@pytest.fixture
def x64() -> Iterator[None]:
    """The test runs in float64."""
    with enable_x64():
        yield


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """A process can map so many programs: beyond, XLA ends with a segmentation fault."""
    yield
    jax.clear_caches()
