"""Units of deviations: what is far below the range of floating-point numbers keeps its digits.

A quantity in a unit with exponent `k` is its value times `2**k`. Deviations of a deep network are
too small for float32 as they are; in their units they are not.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.backend import device


def is_trivial(exponent: Any) -> bool:
    """Whether the unit is known to be 1."""
    return isinstance(exponent, int) and exponent == 0


def number(value: Any, dtype: Any) -> Any:
    """A plain number as it is, as what is known is computed once and for all; else an array."""
    return float(value) if isinstance(value, (int, float)) else jnp.asarray(value, dtype)


def times(factor: Any, value: Array) -> Array:
    """The product, left out where the factor is known to be 1, as most weights are: a program has
    thousands of them, and the compiler reads each.
    """
    return value if isinstance(factor, (int, float)) and factor == 1 else factor * value


def power(exponent: Any) -> Any:
    """`2**exponent`, 0 where it underflows, and a very large finite number where it overflows."""
    return _power(exponent, -1000 if isinstance(exponent, (int, float)) else -200, 120)


def _power(exponent: Any, least: int, most: int) -> Any:
    """`2**exponent` within a range; in Python where the exponent is known."""
    if isinstance(exponent, (int, float)):
        return 2.0 ** max(min(exponent, most), least)
    return jnp.exp2(jnp.minimum(jnp.maximum(exponent, least), most))


def once(value: Array) -> Array:
    """A number, or an array, as it is, but computed once.

    XLA computes what is cheap again in everything that reads it: the exponents of a deep network
    would be most of its compile time, and the force on a layer would be found once for each of its
    operands. What XLA holds to be expensive it computes once. So a number becomes its remainder
    after division by the largest float, which is the number itself, and an array a quotient by 1.
    Where kernels are launched arrays stay as they are.
    """
    if value.ndim == 0:
        return lax.rem(value, jnp.asarray(jnp.finfo(value.dtype).max, value.dtype))
    if device.launches_kernels():
        return value
    one = jnp.ones((), value.dtype)
    # That both are 1 it must not see before it has chosen what to compute together.
    ones = [jnp.broadcast_to(x, value.shape) for x in (one, lax.optimization_barrier(one))]
    return value / lax.select(value > 0, *ones)


def from_unit(value: Array, exponent: Any) -> Array:
    """`value · 2**−exponent`: out of the unit; it may underflow to 0."""
    return value if is_trivial(exponent) else _scaled(value, -exponent)


def to_unit(value: Any, exponent: Any) -> Array:
    """`value · 2**exponent`: into the unit; what overflows is a very large number, but finite."""
    if is_trivial(exponent):
        return value
    value = jnp.asarray(value)
    # Room for sums and differences of several such numbers.
    cap = float(jnp.finfo(value.dtype).max) ** 0.8
    low, high = (jnp.asarray(limit, value.dtype) for limit in (-cap, cap))
    scaled = lax.clamp(low, _scaled(value, exponent), high)
    if isinstance(exponent, (int, float)) and exponent > jnp.finfo(value.dtype).maxexp:
        # XLA makes one factor of two known ones, and an infinite one times 0 is not a number.
        scaled = jnp.where(value == 0, 0, scaled).astype(value.dtype)
    return scaled


def _scaled(value: Array, exponent: Any) -> Array:
    # By the same factor twice: once may be out of range.
    reach = 120 if jnp.finfo(value.dtype).bits <= 32 else 1000
    if not isinstance(exponent, (int, float)):
        exponent = jnp.asarray(exponent, value.dtype)
    factor = jnp.broadcast_to(_power(exponent * 0.5, -reach, reach), value.shape)
    return value * factor * factor
