"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
import pytest


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
