"""How the deviation of one slot is stored: the entries themselves, or its copies in some form.

In `neuron` splitting every scalar product of a bilinear operation holds copies of the slices that
it reads. A solver that only ever projects (alternating, cyclic) finds all copies of an entry
equal before each projection onto the operation, so their mean is enough (`Compact`). A solver
that reflects needs the copies themselves (`Lifted`), unless the other operand is data: then the
copies are `common + data × multiplier`, and stay so through every affine combination
(`Structured`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pjax.program import Route
from pjax.projections.products import pinned
from pjax.projections.products.operation import Bilinear, Copies, Side


class Storage(ABC):
    """The form in which a slot's deviation is kept; hashable.

    `other` is the value of the operand that is data, for the forms that need it.
    """

    #: How many copies of each entry the slot stands for; 0 for an entry that nothing reads.
    copies: Copies = 1
    #: Whether the state has all of these copies.
    lifted: bool = False
    #: Whether it is one array for each producer of the slot. Rules have such a slot as one array.
    in_parts: bool = False

    @abstractmethod
    def fill(self, value: Array) -> Any:
        """The state in which every copy equals `value`."""

    @abstractmethod
    def mean(self, state: Any, other: Any = None) -> Array:
        """The mean of the copies of each entry, in the operand's shape."""

    @abstractmethod
    def squared_distance(self, a: Any, b: Any, weight: Any, other: Any = None) -> Float[Array, ""]:
        """`Σ ρ |a − b|²` over all copies."""

    def squared_distance_to(
        self, state: Any, value: Array, mask: Any, weight: Any, other: Any = None
    ) -> Float[Array, ""]:
        """`Σ ρ |copy − value|²` over all copies of the entries where `mask` is 1."""
        squared = jnp.square(self.mean(state, other) - value)
        return self._over_copies(weight, mask * squared)

    def _over_copies(self, weight: Any, entries: Array) -> Array:
        """The sum of what each entry has, over all its copies."""
        if isinstance(self.copies, int):
            return self.copies * _weighted(weight, entries)
        return _weighted(weight, entries * self.copies)

    def difference(self, a: Any, b: Any) -> Any:
        """`a − b` as a state."""
        return jax.tree_util.tree_map(jnp.subtract, a, b)

    def combine(self, base: Any, kept: Array, value: Array) -> Any:
        """The state in which the copies of an entry equal `value`, or stay where `kept` is 1."""
        return self.fill(value + kept * self.mean(base))

    def spread(self, state: Any) -> Any:
        """`Σ ρ |copy − mean|²`, where that is all that the state says of the copies; else 0."""
        return 0.0

    @abstractmethod
    def numbers(self, shape: tuple[int, ...]) -> int:
        """How many numbers the state of a slot of this shape holds."""


def _weighted(weight: Any, entries: Array) -> Array:
    """`Σ weight · entries`; a scalar is behind the sum, where no array is made for it."""
    if jnp.ndim(weight):
        return jnp.sum(weight * entries)
    return weight * jnp.sum(entries)


@dataclass(frozen=True)
class Dense(Storage):
    """One number per entry."""

    def fill(self, value):
        return value

    def mean(self, state, other=None):
        return state

    def squared_distance(self, a, b, weight, other=None):
        return _weighted(weight, jnp.square(a - b))

    def numbers(self, shape):
        return math.prod(shape)


@dataclass(frozen=True)
class Joined(Storage):
    """One array for each producer of a slot that reads each of their entries once, and nothing
    else.

    Of an array that joins the steps of a loop each step then writes and reads its own part: of
    `T` steps `T` parts in all, where `T` writes of the whole array would be `T²`.
    """

    route: Route
    in_parts: ClassVar[bool] = True

    def fill(self, value):
        return self.route.pull(value, {})

    def mean(self, state, other=None):
        return self.route(state, {})

    def squared_distance(self, a, b, weight, other=None):
        if jnp.ndim(weight):
            return jnp.sum(weight * jnp.square(self.mean(a) - self.mean(b)))
        return sum(weight * jnp.sum(jnp.square(x - y)) for x, y in zip(a, b, strict=True))

    def numbers(self, shape):
        return math.prod(shape)


@dataclass(frozen=True)
class Compact(Storage):
    """The mean of the copies, and their spread `Σ ρ |copy − mean|²`, a scalar.

    The spread is positive only between a projection onto the operation and the next consensus, so
    of two states that follow each other at most one has a spread, and their distance is exact.
    Between two states that both have one (two points a whole step apart) it is the least distance
    that their means and spreads allow. Of a slot that reads producers of several levels, the first
    level to write counts the whole spread.
    """

    operation: Bilinear
    side: Side

    @property
    def copies(self) -> Copies:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operation.copies(self.side)

    def fill(self, value):
        return value, jnp.zeros((), value.dtype)

    def mean(self, state, other=None):
        return state[0]

    def squared_distance(self, a, b, weight, other=None):
        (mean_a, spread_a), (mean_b, spread_b) = a, b
        means = self._over_copies(weight, jnp.square(mean_a - mean_b))
        return means + jnp.square(jnp.sqrt(spread_a) - jnp.sqrt(spread_b))

    def squared_distance_to(self, state, value, mask, weight, other=None):
        # The spread of entries apart is not kept: where there is one, all entries are meant.
        return super().squared_distance_to(state, value, mask, weight) + state[1]

    def spread(self, state):
        return state[1]

    def difference(self, a, b):
        # At most one of the two has a spread: the other's copies are equal, so it is the
        # difference's.
        return a[0] - b[0], a[1] + b[1]

    def numbers(self, shape):
        return math.prod(shape) + 1


@dataclass(frozen=True)
class Lifted(Storage):
    """All copies, as an array of shape `[*output, slice]`."""

    operation: Bilinear
    side: Side
    lifted: ClassVar[bool] = True

    @property
    def copies(self) -> Copies:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operation.copies(self.side)

    def fill(self, value):
        op = self.operation
        return op.lift_left(value) if self.side == "left" else op.lift_right(value)

    def mean(self, state, other=None):
        op = self.operation
        total = op.lower_left(state) if self.side == "left" else op.lower_right(state)
        return total / np.maximum(self.copies, 1)

    def squared_distance(self, a, b, weight, other=None):
        if jnp.ndim(weight):  # constant over each slice: one weight per output
            weight = weight[..., None]
        return _weighted(weight, jnp.square(a - b))

    def squared_distance_to(self, state, value, mask, weight, other=None):
        return self.squared_distance(
            self.fill(mask) * state, self.fill(mask * value), weight, other
        )

    def combine(self, base, kept, value):
        # Copies that stay may differ from each other: keep each of them.
        return self.fill(value) + self.fill(kept) * base

    def numbers(self, shape):
        return math.prod(self.operation.output_shape) * self.operation.slice_length


@dataclass(frozen=True)
class Structured(Storage):
    """Copies `common + data × multiplier` of the free operand of an operation whose other operand
    is data.
    """

    operation: Bilinear
    pinned: Side

    @property
    def copies(self) -> Copies:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operation.copies("right" if self.pinned == "left" else "left")

    def fill(self, value):
        return value, jnp.zeros(self.operation.output_shape, value.dtype)

    def mean(self, state, other=None):
        common, multiplier = state
        return pinned.structured_mean(self.operation, self.pinned, other, common, multiplier)

    def squared_distance(self, a, b, weight, other=None):
        common, multiplier = (x - y for x, y in zip(a, b, strict=True))
        return weight * pinned.structured_squared_norm(
            self.operation, self.pinned, other, common, multiplier
        )

    def squared_distance_to(self, state, value, mask, weight, other=None):
        common, multiplier = state
        op = self.operation
        transpose = op.transpose_right if self.pinned == "left" else op.transpose_left
        gap = common - value
        cross = 2 * gap * transpose(multiplier, other)
        squares = transpose(jnp.square(multiplier), jnp.square(other))
        return weight * jnp.sum(mask * (self.copies * jnp.square(gap) + cross + squares))

    def combine(self, base, kept, value):
        raise NotImplementedError("A rule stores such slots lifted: see `Rule.storages`.")

    def numbers(self, shape):
        return math.prod(shape) + math.prod(self.operation.output_shape)
