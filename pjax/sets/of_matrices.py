"""Sets of the matrices in the last two axes."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Array

from pjax.projections import matrices
from pjax.sets.base import STATIC, OfMatrices, registered, require_count


@registered
@dataclass(frozen=True, eq=False)
class LowRank(OfMatrices):
    """`{rank x ≤ k}`.

    **Arguments:**

    - `rank`: a whole number, at least 1 and at most the number of rows and of columns.

    >>> LowRank(1).project([[3.0, 0.0], [0.0, 1.0]])
    Array([[3., 0.],
           [0., 0.]], dtype=float32)
    """

    rank: int = field(default=1, metadata=STATIC)

    def __post_init__(self) -> None:
        require_count(self, "rank", self.rank)

    def _nearest(self, x: Array) -> Array:
        return matrices.low_rank(x, self.rank)

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if self.rank > min(shape[-2:]):
            raise ValueError(
                f"`LowRank(rank={self.rank})`: matrices of an array of shape {shape} have at most "
                f"the rank {min(shape[-2:])}."
            )


@registered
@dataclass(frozen=True, eq=False)
class Orthogonal(OfMatrices):
    """`{xᵀx = 1}`: orthonormal columns; of a wide matrix orthonormal rows.

    >>> Orthogonal().project([[2.0, 0.0], [0.0, -3.0]])
    Array([[ 1.,  0.],
           [ 0., -1.]], dtype=float32)
    """

    def _nearest(self, x: Array) -> Array:
        return matrices.orthogonal(x)
