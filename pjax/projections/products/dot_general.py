"""`jax.lax.dot_general` as a bilinear operation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.projections.products.operation import Bilinear, inverse


@dataclass(frozen=True)
class _Operand:
    """The axes of one operand of a `dot_general`, and the place of its free axes in the output."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contracting: tuple[int, ...]
    is_left: bool
    other_free: int

    @property
    def free(self) -> tuple[int, ...]:
        taken = self.batch + self.contracting
        return tuple(axis for axis in range(len(self.shape)) if axis not in taken)

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that the output keeps, in the order of the output."""
        return self.batch + self.free

    @property
    def other_axes(self) -> tuple[int, ...]:
        """The axes of the output that come from the other operand."""
        first = len(self.kept) if self.is_left else len(self.batch)
        return tuple(range(first, first + self.other_free))

    def spread(self, array: Array) -> Array:
        """Put axes of length one where the output has the other operand's free axes."""
        return jnp.expand_dims(array, self.other_axes)

    def energy(self, array: Array) -> Array:
        # After the reduction the kept axes stand in the operand's order, not in the output's.
        rank = {axis: place for place, axis in enumerate(sorted(self.kept))}
        summed = jnp.sum(array, axis=self.contracting)
        return self.spread(jnp.transpose(summed, [rank[axis] for axis in self.kept]))

    def sum(self, cotangent: Array) -> Array:
        summed = jnp.sum(cotangent, axis=self.other_axes)
        summed = jnp.transpose(summed, inverse(self.kept))
        return jnp.expand_dims(summed, self.contracting)

    def lift(self, array: Array, output_shape: tuple[int, ...]) -> Array:
        array = jnp.transpose(array, self.kept + self.contracting)
        array = array.reshape(*array.shape[: len(self.kept)], -1)
        return jnp.broadcast_to(self.spread(array), (*output_shape, array.shape[-1]))

    def lower(self, copies: Array) -> Array:
        order = self.kept + self.contracting
        summed = jnp.sum(copies, axis=self.other_axes)
        summed = summed.reshape([self.shape[axis] for axis in order])
        return jnp.transpose(summed, inverse(order))


@dataclass(frozen=True)
class DotGeneral(Bilinear):
    """`B(left, right) = jax.lax.dot_general(left, right, dimension_numbers)`.

    Arguments:
        dimension_numbers: `((left contracting, right contracting), (left batch, right batch))`.
        left_shape: the shape of the left operand.
        right_shape: the shape of the right operand.
        precision: as in `jax.lax.dot_general`; used by the transposes too.
        preferred_element_type: as in `jax.lax.dot_general`; used by the transposes too.
        operand_type: a narrow type, such as bfloat16, in which operands are multiplied; the result
            is float32. None: in their own.

    Raises:
        ValueError: if a contraction runs over no entries: its output is a constant.
    """

    dimension_numbers: Any
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    precision: Any = None
    preferred_element_type: Any = None
    operand_type: Any = None

    def __post_init__(self) -> None:
        # Lists are common in dimension numbers and would make the operation unhashable.
        (left_contracting, right_contracting), (left_batch, right_batch) = self.dimension_numbers
        numbers = (
            (_axes(left_contracting), _axes(right_contracting)),
            (_axes(left_batch), _axes(right_batch)),
        )
        object.__setattr__(self, "dimension_numbers", numbers)
        if self.slice_length == 0:
            raise ValueError(
                f"`dot_general` of shapes {self.left_shape} and {self.right_shape} contracts over "
                "an axis of length 0, so its output does not depend on its operands."
            )

    @property
    def _left(self) -> _Operand:
        (contracting, right_contracting), (batch, _) = self.dimension_numbers
        right_free = len(self.right_shape) - len(batch) - len(right_contracting)
        return _Operand(self.left_shape, batch, contracting, True, right_free)

    @property
    def _right(self) -> _Operand:
        (left_contracting, contracting), (_, batch) = self.dimension_numbers
        left_free = len(self.left_shape) - len(batch) - len(left_contracting)
        return _Operand(self.right_shape, batch, contracting, False, left_free)

    @property
    def output_shape(self) -> tuple[int, ...]:
        left, right = self._left, self._right
        return (
            *(left.shape[axis] for axis in left.kept),
            *(right.shape[axis] for axis in right.free),
        )

    @property
    def slice_length(self) -> int:
        return math.prod(self.left_shape[axis] for axis in self._left.contracting)

    @property
    def left_copies(self) -> int:
        return math.prod(self.right_shape[axis] for axis in self._right.free)

    @property
    def right_copies(self) -> int:
        return math.prod(self.left_shape[axis] for axis in self._left.free)

    def _dot(self, left: Array, right: Array, dimension_numbers: Any) -> Array:
        """The product in this operation's precision."""
        wide = self.preferred_element_type
        if self.operand_type is not None:
            wide = jnp.promote_types(left.dtype, jnp.float32)
            left, right = left.astype(self.operand_type), right.astype(self.operand_type)
        return lax.dot_general(
            left, right, dimension_numbers, self.precision, preferred_element_type=wide
        )

    def __call__(self, left, right):
        return self._dot(left, right, self.dimension_numbers)

    def transpose_left(self, cotangent, right):
        x, w = self._left, self._right
        batch = tuple(range(len(x.batch)))
        result = self._dot(cotangent, right, ((x.other_axes, w.free), (batch, w.batch)))
        # `dot_general` leaves the contracted axes in the order in which `right` has them.
        contracting = tuple(x.contracting[place] for place in inverse(w.contracting))
        return jnp.transpose(result, inverse(x.kept + contracting))

    def transpose_right(self, cotangent, left):
        x, w = self._left, self._right
        batch = tuple(range(len(w.batch)))
        result = self._dot(left, cotangent, ((x.free, w.other_axes), (x.batch, batch)))
        contracting = tuple(w.contracting[place] for place in inverse(x.contracting))
        return jnp.transpose(result, inverse(w.batch + contracting + w.free))

    def left_energy(self, left):
        return self._left.energy(left)

    def right_energy(self, right):
        return self._right.energy(right)

    def left_sum(self, cotangent):
        return self._left.sum(cotangent)

    def right_sum(self, cotangent):
        return self._right.sum(cotangent)

    def lift_left(self, left):
        return self._left.lift(left, self.output_shape)

    def lift_right(self, right):
        return self._right.lift(right, self.output_shape)

    def lower_left(self, copies):
        return self._left.lower(copies)

    def lower_right(self, copies):
        return self._right.lower(copies)


def _axes(axes: Any) -> tuple[int, ...]:
    return tuple(int(axis) for axis in axes)
