"""Units that are powers of two: what is far below the range of floating-point numbers stays exact.

A quantity in a unit with exponent `k` is its value times `2**k`. Deviations of a deep network are
too small for float32 as they are; in their units they are not, and scaling by a power of two
rounds nothing.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array


def power(exponent: Any) -> Any:
    """`2**exponent`, 0 where it underflows, and a very large finite number where it overflows."""
    if isinstance(exponent, int):
        if exponent == 0:
            return 1.0
        return 2.0**exponent if -1000 < exponent < 1000 else (0.0 if exponent < 0 else 2.0**1000)
    return jnp.ldexp(jnp.ones((), jnp.float32), jnp.clip(exponent, -200, 120))


def from_unit(value: Array, exponent: Any) -> Array:
    """`value · 2**−exponent`: out of the unit; it may underflow to 0."""
    if isinstance(exponent, int) and exponent == 0:
        return value
    return _scaled(value, -exponent)


def to_unit(value: Any, exponent: Any) -> Array:
    """`value · 2**exponent`: into the unit; what overflows is a very large number, but finite."""
    if isinstance(exponent, int) and exponent == 0:
        return value
    value = jnp.asarray(value)
    # Room for sums and differences of several such numbers.
    cap = float(jnp.finfo(value.dtype).max) ** 0.8
    return jnp.clip(_scaled(value, exponent), -cap, cap)


def _scaled(value: Array, exponent: Any) -> Array:
    # By two factors of half the exponent: a single one may be out of range.
    reach = 120 if jnp.finfo(value.dtype).bits <= 32 else 1000
    exponent = jnp.clip(jnp.asarray(exponent, jnp.int32), -2 * reach, 2 * reach)
    half = exponent // 2
    one = jnp.ones((), value.dtype)
    return value * jnp.ldexp(one, half) * jnp.ldexp(one, exponent - half)
