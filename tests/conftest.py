"""Fixtures that several test files share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import pytest

#: Most of the time of the tests is XLA's: this way it takes a quarter to compile a step.
_QUICK_TO_COMPILE = ("--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false")


def _compile_quickly() -> None:
    """Sets the flags that this XLA knows; it ends the process at any other, so another process
    tries. None has been read before the first array is made, and the workers of pytest inherit
    them. `XLA_FLAGS`, also an empty one, goes before them.
    """
    if "XLA_FLAGS" in os.environ:
        return
    for flags in (" ".join(_QUICK_TO_COMPILE), _QUICK_TO_COMPILE[0], ""):
        os.environ["XLA_FLAGS"] = flags
        trial = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(trial, capture_output=True, check=False).returncode == 0:
            return


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


@pytest.fixture
def as_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test counts what is made for a CPU, also where there is a GPU."""
    from pjax.backend import device

    monkeypatch.setattr(device, "launches_kernels", lambda: False)


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs() -> Iterator[None]:
    """A process can map so many programs: beyond, XLA ends with a segmentation fault."""
    yield
    jax.clear_caches()
