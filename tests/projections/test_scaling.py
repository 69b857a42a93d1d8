"""Units of deviations, and what is computed once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.projections import scaling
from tests.programs import kernels

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")

VALUES = [0.0, -0.0, 1.0, -3.7, 1e38, -1e-38, 1e-42, np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["as it is", "compiled"])
def test_what_is_computed_once_is_what_it_was(run, dtype):
    """To the last bit; numbers below the normal ones may be 0."""
    values = jnp.asarray(VALUES, dtype)
    tiny = float(jnp.finfo(dtype).tiny)
    found = np.asarray(run(scaling.once)(values), np.float64)
    wanted = np.asarray(values, np.float64)
    normal = ~(np.abs(wanted) < tiny)
    np.testing.assert_array_equal(found[normal], wanted[normal])
    np.testing.assert_array_equal(np.signbit(found[normal]), np.signbit(wanted[normal]))
    assert np.all(np.abs(found[~normal]) <= tiny)
    for value in values[:5]:
        assert run(scaling.once)(value) == value


def test_it_is_one_kernel_for_all_that_read_it():
    """Four sums of different multiples of one long expression."""

    def readers(x: Any, once: Any) -> Any:
        value = x
        for count in range(12):
            value = jnp.where(value > count, value * 0.5 - x, value + 0.25 * x)
        value = once(value)
        return [(value * x[k]).T @ x for k in range(4)]

    x = jnp.ones((64, 32))
    counts, sizes = {}, {}
    for name, once in (("once", scaling.once), ("again", lambda value: value)):
        compiled = str(jax.jit(readers, static_argnums=1).lower(x, once).compile().as_text())
        counts[name] = kernels(compiled)
        sizes[name] = compiled.count(" select(")
    assert sizes["once"] < 0.5 * sizes["again"]
    assert counts["once"] <= counts["again"] + 1
