"""Sets of single entries: whatever the weights, the nearest point is the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.projections import vectors
from pjax.sets.base import STATIC, Entrywise, is_known, registered


@registered
@dataclass(frozen=True, eq=False)
class Box(Entrywise):
    """`{lower ≤ x ≤ upper}`.

    **Arguments:**

    - `lower`, `upper`: numbers, or arrays that broadcast to `x`; they may be infinite.

    **Raises:** `ValueError` if the lower end is above the upper one.

    >>> Box(-1.0, 2.0).project([-3.0, 0.5, 3.0])
    Array([-1. ,  0.5,  2. ], dtype=float32)
    """

    lower: Any = -1.0
    upper: Any = 1.0

    def __post_init__(self) -> None:
        ends = self.lower, self.upper
        if is_known(*ends) and np.any(np.greater(*map(np.asarray, ends))):
            raise ValueError(f"`Box`: `lower` is above `upper`: {self.lower}, {self.upper}.")

    def _nearest(self, x: Array) -> Array:
        return jnp.clip(x, jnp.asarray(self.lower, x.dtype), jnp.asarray(self.upper, x.dtype))

    def check(self, shape: tuple[int, ...]) -> None:
        for name in ("lower", "upper"):
            own = jnp.shape(getattr(self, name))
            if own and not _broadcasts(own, shape):
                raise ValueError(f"`Box`: `{name}` of shape {own} does not broadcast to {shape}.")


@registered
@dataclass(frozen=True, eq=False)
class Nonnegative(Entrywise):
    """`{x ≥ 0}`.

    >>> Nonnegative().project([-3.0, 0.5])
    Array([0. , 0.5], dtype=float32)
    """

    def _nearest(self, x: Array) -> Array:
        return jnp.maximum(x, 0)


@registered
@dataclass(frozen=True, eq=False)
class Signs(Entrywise):
    """`{x = ±1}`, entry by entry; 0 becomes 1.

    >>> Signs().project([-0.2, 0.0, 3.0])
    Array([-1.,  1.,  1.], dtype=float32)
    """

    def _nearest(self, x: Array) -> Array:
        return jnp.where(x < 0, -1, 1).astype(x.dtype)


@registered
@dataclass(frozen=True, eq=False)
class Levels(Entrywise):
    """Each entry is one of some values.

    **Arguments:**

    - `values`: at least one number, in ascending order.

    **Raises:** `ValueError` for values that do not rise.

    >>> Levels((-1.5, -0.5, 0.5, 1.5)).project([-9.0, 0.1, 0.9])
    Array([-1.5,  0.5,  0.5], dtype=float32)
    """

    values: tuple[float, ...] = field(default=(-1.0, 0.0, 1.0), metadata=STATIC)

    def __post_init__(self) -> None:
        values = tuple(map(float, self.values))
        if not values or not np.all(np.isfinite(values)) or np.any(np.diff(values) <= 0):
            raise ValueError(
                f"`Levels` needs finite numbers in ascending order, got {self.values}."
            )
        object.__setattr__(self, "values", values)

    def _nearest(self, x: Array) -> Array:
        return vectors.levels(x, jnp.asarray(self.values, x.dtype))


def _broadcasts(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(own, shape) == shape
    except ValueError:
        return False
