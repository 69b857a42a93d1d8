"""Balls and spheres of norms of vectors and of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike

from pjax.projections import matrices, vectors
from pjax.sets.base import (
    STATIC,
    Along,
    Axis,
    floating,
    is_known,
    registered,
    require_entries,
    require_matrix,
)

Norm = Literal["spectral", "nuclear"] | float


class _OfNorm(Along):
    """A set of the vectors, or of the matrices, that a norm and a radius describe."""

    radius: Any
    norm: Norm

    #: By the norm 1, 2 or infinity: `(vectors, radius, weights) -> nearest points`.
    _nearest_in: ClassVar[Mapping[float, Callable[..., Array]]]

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.norm not in (1, 2, math.inf, *_OF_SINGULAR_VALUES):
            raise ValueError(
                f'`{name}`: `norm` must be 1, 2, infinity, "spectral" or "nuclear", got '
                f"{self.norm!r}."
            )
        if isinstance(self.norm, str) and self.axis is not None:
            raise ValueError(
                f"`{name}`: the norm {self.norm!r} is one of the last two axes: leave out `axis`."
            )
        if is_known(self.radius) and not np.asarray(self.radius) >= 0:
            raise ValueError(f"`{name}`: `radius` must not be negative, got {self.radius}.")

    def _nearest(self, rows: Array, weights: Array | None) -> Array:
        radius = jnp.asarray(self.radius, rows.dtype)
        if isinstance(self.norm, str):
            nearest = self._nearest_in[_OF_SINGULAR_VALUES[self.norm]]
            return matrices.with_singular_values(rows, lambda s: nearest(s, radius))
        return self._nearest_in[self.norm](rows, radius, weights)

    def project_weighted(self, x: ArrayLike, weights: Array | None) -> Array:
        if not isinstance(self.norm, str):
            return super().project_weighted(x, weights)
        x = floating(self, x)
        self.check(x.shape)
        return self._nearest(x, None)

    def check(self, shape: tuple[int, ...]) -> None:
        if isinstance(self.norm, str):
            require_matrix(self, shape)
        else:
            super().check(shape)


@registered
@dataclass(frozen=True, eq=False)
class Ball(_OfNorm):
    """`{‖x‖ ≤ r}`.

    **Arguments:**

    - `radius`: a number, not negative.
    - `norm`: 1, 2 or infinity of the vectors along `axis`; `"spectral"` or `"nuclear"`, the largest
        singular value or their sum, of the matrices in the last two axes. A dense layer in the
        spectral ball of radius `r` is `r`-Lipschitz.
    - `axis`: for a matrix that is applied as `x @ w`, 0 is a ball for each output.

    In the norms 2, spectral and nuclear there is no closed form for weights that differ inside of a
    vector or matrix: `project_weighted` is then `project`.

    >>> Ball(1.0, axis=0).project([[3.0, 0.3], [4.0, 0.4]])
    Array([[0.6, 0.3],
           [0.8, 0.4]], dtype=float32)
    """

    radius: Any = 1.0
    norm: Norm = field(default=2, metadata=STATIC)
    axis: Axis = field(default=None, metadata=STATIC)

    _nearest_in = {1: vectors.sum_ball, 2: vectors.ball, math.inf: vectors.largest_ball}  # noqa: RUF012


@registered
@dataclass(frozen=True, eq=False)
class Sphere(_OfNorm):
    """`{‖x‖ = r}`: not convex; of 0 the nearest point is one of several.

    **Arguments:** those of [`Ball`][pjax.sets.Ball].

    >>> Sphere(5.0).project([0.3, 0.4])
    Array([3., 4.], dtype=float32)
    """

    radius: Any = 1.0
    norm: Norm = field(default=2, metadata=STATIC)
    axis: Axis = field(default=None, metadata=STATIC)

    _nearest_in = {1: vectors.sum_sphere, 2: vectors.sphere, math.inf: vectors.largest_sphere}  # noqa: RUF012

    def _check_length(self, length: int, shape: tuple[int, ...]) -> None:
        require_entries(self, length, shape)


#: The norm of the singular values.
_OF_SINGULAR_VALUES = {"spectral": math.inf, "nuclear": 1}
