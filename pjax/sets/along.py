"""Sets of the vectors along some axes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.projections import vectors
from pjax.sets.base import STATIC, Along, Axis, is_known, registered, require_count, require_entries


@registered
@dataclass(frozen=True, eq=False)
class Simplex(Along):
    """`{x ≥ 0, Σ x = total}`.

    **Arguments:**

    - `total`: a positive number.
    - `axis`: by default the last one.

    >>> Simplex().project([0.5, 1.5, -1.0])
    Array([0., 1., 0.], dtype=float32)
    """

    total: Any = 1.0
    axis: Axis = field(default=-1, metadata=STATIC)

    def __post_init__(self) -> None:
        if is_known(self.total) and not np.asarray(self.total) > 0:
            raise ValueError(f"`Simplex`: `total` must be positive, got {self.total}.")

    def _nearest(self, rows: Array, weights: Array | None) -> Array:
        return vectors.simplex(rows, jnp.asarray(self.total, rows.dtype), weights)

    def _check_length(self, length: int, shape: tuple[int, ...]) -> None:
        require_entries(self, length, shape)


@registered
@dataclass(frozen=True, eq=False)
class Sparse(Along):
    """`{at most k entries are not 0}`: the k largest stay; of equal ones the first.

    **Arguments:**

    - `k`: a whole number, at least 1 and at most the length of the vectors.

    >>> Sparse(2).project([1.0, -3.0, 2.0])
    Array([ 0., -3.,  2.], dtype=float32)
    """

    k: int = field(default=1, metadata=STATIC)
    axis: Axis = field(default=None, metadata=STATIC)

    def __post_init__(self) -> None:
        require_count(self, "k", self.k)

    def _nearest(self, rows: Array, weights: Array | None) -> Array:
        return vectors.sparse(rows, self.k, weights)

    def _check_length(self, length: int, shape: tuple[int, ...]) -> None:
        if self.k > length:
            raise ValueError(
                f"`Sparse(k={self.k}, axis={self.axis})`: the vectors of an array of shape {shape} "
                f"have {length} entries, and `k` must not be more."
            )


@registered
@dataclass(frozen=True, eq=False)
class Monotone(Along):
    """`{x₁ ≤ x₂ ≤ …}`: isotonic regression.

    **Arguments:**

    - `decreasing`: `{x₁ ≥ x₂ ≥ …}` in its place.
    - `axis`: by default the last one.

    >>> Monotone().project([1.0, 3.0, 2.0, 4.0])
    Array([1. , 2.5, 2.5, 4. ], dtype=float32)
    """

    decreasing: bool = field(default=False, metadata=STATIC)
    axis: Axis = field(default=-1, metadata=STATIC)

    def _nearest(self, rows: Array, weights: Array | None) -> Array:
        if rows.shape[-1] == 0:
            return rows
        sign = -1 if self.decreasing else 1
        return sign * vectors.monotone(sign * rows, weights)


@registered
@dataclass(frozen=True, eq=False)
class LinearEqualities(Along):
    """`{A x = b}`.

    A budget, a sum of predictions; or fairness, two groups of rows with one mean prediction.

    **Arguments:**

    - `matrix`: `A`, `[equations, n]`, or `[n]` for one equation. Equations may depend on each
        other.
    - `values`: `b`, a number or `[equations]`.
    - `axis`: by default the last one.

    **Raises:** `ValueError` for shapes that do not fit and, unless they are traced, for equations
    that contradict each other.

    >>> LinearEqualities([2.0, 0.0], 6.0).project([1.0, 2.0])
    Array([3., 2.], dtype=float32)
    """

    matrix: Any
    values: Any = 0.0
    axis: Axis = field(default=-1, metadata=STATIC)

    def __post_init__(self) -> None:
        if not is_known(self.matrix, self.values):
            return
        for name in ("matrix", "values"):
            given = getattr(self, name)
            if isinstance(given, (list, tuple, int, float)):
                object.__setattr__(self, name, np.asarray(given, np.float64))
        matrix, values = _equations(self.matrix, self.values, np)
        found = np.linalg.lstsq(matrix, values, rcond=1e-7)[0]
        size = np.linalg.norm(matrix, axis=1) * np.linalg.norm(found) + np.abs(values)
        if np.any(np.abs(matrix @ found - values) > 1e-5 * size):
            raise ValueError(
                f"`LinearEqualities`: the {len(values)} equations contradict each other; none of "
                "the nearest points would satisfy them."
            )

    def _nearest(self, rows: Array, weights: Array | None) -> Array:
        matrix, values = _equations(self.matrix, self.values, jnp)
        return vectors.equalities(
            rows, matrix.astype(rows.dtype), values.astype(rows.dtype), weights
        )

    def _check_length(self, length: int, shape: tuple[int, ...]) -> None:
        columns = jnp.shape(self.matrix)[-1]
        if columns != length:
            raise ValueError(
                f"`LinearEqualities`: `matrix` has {columns} columns, and vectors along "
                f"axis {self.axis} of an array of shape {shape} have {length} entries."
            )


def _equations(matrix: Any, values: Any, numpy: Any) -> tuple[Any, Any]:
    """`A` as a matrix and `b` as a vector of as many entries as it has rows."""
    matrix, values = numpy.asarray(matrix), numpy.asarray(values)
    if matrix.ndim not in (1, 2) or values.ndim > 1:
        raise ValueError(
            "`LinearEqualities`: `matrix` must be `[equations, n]` or `[n]` and `values` a number "
            f"or `[equations]`, got shapes {matrix.shape} and {values.shape}."
        )
    matrix = matrix[None] if matrix.ndim == 1 else matrix
    if values.ndim and len(values) not in (1, len(matrix)):
        raise ValueError(
            f"`LinearEqualities`: `matrix` has {len(matrix)} equations, and `values` "
            f"{len(values)} numbers."
        )
    return matrix, numpy.broadcast_to(values, (len(matrix),))
