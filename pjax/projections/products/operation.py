"""Nearest points of bilinear operations, one constraint per scalar product (neuron splitting).

A bilinear operation `B(left, right) = output` is cut into its scalar products `y = x·w`, each on
its own copies of two slices. Every projection here solves

    argmin  ρx |x' − x|² + ρw |w' − w|² + W (x'·w' − z)²

for all scalar products of one operation at once, with values given as reference plus deviation.
Three forms of the same projection differ in what is stored:

- *compact*: all copies of an entry agree on entry, and only their mean leaves; no copy is formed;
- *lifted*: the copies themselves, for algorithms that reflect;
- *pinned*: one operand is data, the constraint is affine, and the copies keep a closed form.

Sources: arXiv 2506.05878 for the splitting; Bauschke, Lal, Wang, "Projecting onto rectangular
hyperbolic paraboloids" (2022) for the scalar product.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from jaxtyping import Array, Float

Weight: TypeAlias = Float[Array, "..."] | float


"""A metric weight: a scalar, or an array that broadcasts to the output (constant over a slice)."""


Side: TypeAlias = Literal["left", "right"]
Copies: TypeAlias = int | np.ndarray


"""How many copies each entry has: one number, or counts that broadcast to the operand."""


class Bilinear(ABC):
    """A map `B` linear in each of two operands, every output a scalar product of two slices.

    Each output entry reads a slice of `slice_length` entries of each operand. An entry of `left` is
    read by `left_copies` outputs, an entry of `right` by `right_copies`: a number, or counts that
    broadcast to the operand where they differ. Implementations are hashable, so that they can be
    static arguments.
    """

    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """The shape of `B(left, right)`."""

    @property
    @abstractmethod
    def slice_length(self) -> int:
        """How many products are summed in one output entry."""

    @property
    def slice_lengths(self) -> Copies:
        """How many entries each output reads: fewer than `slice_length` where some are constant."""
        return self.slice_length

    @property
    @abstractmethod
    def left_copies(self) -> Copies:
        """How many outputs read each entry of `left`."""

    @property
    @abstractmethod
    def right_copies(self) -> Copies:
        """How many outputs read each entry of `right`."""

    def copies(self, side: Side) -> Copies:
        """`left_copies` or `right_copies`."""
        return self.left_copies if side == "left" else self.right_copies

    @abstractmethod
    def __call__(
        self, left: Float[Array, "*left"], right: Float[Array, "*right"]
    ) -> Float[Array, "*output"]:
        """`B(left, right)`."""

    @abstractmethod
    def transpose_left(
        self, cotangent: Float[Array, "*output"], right: Float[Array, "*right"]
    ) -> Float[Array, "*left"]:
        """`Bxᵀ(cotangent; right)`, the transpose of `left -> B(left, right)`."""

    @abstractmethod
    def transpose_right(
        self, cotangent: Float[Array, "*output"], left: Float[Array, "*left"]
    ) -> Float[Array, "*right"]:
        """`Bwᵀ(cotangent; left)`, the transpose of `right -> B(left, right)`."""

    @abstractmethod
    def left_energy(self, left: Float[Array, "*left"]) -> Float[Array, ...]:
        """`B(left, 1)`, the sum over each slice, in a shape that broadcasts to the output."""

    @abstractmethod
    def right_energy(self, right: Float[Array, "*right"]) -> Float[Array, ...]:
        """`B(1, right)`, the sum over each slice, in a shape that broadcasts to the output."""

    @abstractmethod
    def left_sum(self, cotangent: Float[Array, "*output"]) -> Float[Array, ...]:
        """`Bxᵀ(cotangent; 1)`, the sum over the readers, in a shape that broadcasts to `left`."""

    @abstractmethod
    def right_sum(self, cotangent: Float[Array, "*output"]) -> Float[Array, ...]:
        """`Bwᵀ(cotangent; 1)`, the sum over the readers, in a shape that broadcasts to `right`."""

    @abstractmethod
    def lift_left(self, left: Float[Array, "*left"]) -> Float[Array, "*output slice"]:
        """The slices of `left` by output: `sum(lift_left(x) * lift_right(w), -1) = B(x, w)`."""

    @abstractmethod
    def lift_right(self, right: Float[Array, "*right"]) -> Float[Array, "*output slice"]:
        """The slices of `right` by output, ordered as in `lift_left`."""

    @abstractmethod
    def lower_left(self, copies: Float[Array, "*output slice"]) -> Float[Array, "*left"]:
        """The transpose of `lift_left`: the sum of all copies of each entry."""

    @abstractmethod
    def lower_right(self, copies: Float[Array, "*output slice"]) -> Float[Array, "*right"]:
        """The transpose of `lift_right`: the sum of all copies of each entry."""

    def mask_slices(self, copies: Float[Array, "*output slice"]) -> Float[Array, "*output slice"]:
        """`copies`, with 0 where a slice reads a constant."""
        return copies


@dataclass(frozen=True)
class Multiply(Bilinear):
    """`B(left, right) = left * right`, entry by entry: slices of length one, one copy of each.

    Arguments:
        shape: the shape of both operands and of the output.
    """

    shape: tuple[int, ...]

    @property
    def left_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shape

    @property
    def right_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def slice_length(self) -> int:
        return 1

    @property
    def left_copies(self) -> int:
        return 1

    @property
    def right_copies(self) -> int:
        return 1

    def __call__(self, left, right):
        return left * right

    def transpose_left(self, cotangent, right):
        return cotangent * right

    def transpose_right(self, cotangent, left):
        return cotangent * left

    def left_energy(self, left):
        return left

    def right_energy(self, right):
        return right

    def left_sum(self, cotangent):
        return cotangent

    def right_sum(self, cotangent):
        return cotangent

    def lift_left(self, left):
        return left[..., None]

    def lift_right(self, right):
        return right[..., None]

    def lower_left(self, copies):
        return copies[..., 0]

    def lower_right(self, copies):
        return copies[..., 0]


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The places of the entries of `order` from the least to the greatest."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
