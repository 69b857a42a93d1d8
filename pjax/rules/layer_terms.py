"""The terms of a layer's sum: products with weights, and addends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.projections.gains import PowerIteration
from pjax.projections.products.convolution import Convolution
from pjax.projections.products.dot_general import DotGeneral
from pjax.projections.products.operation import Bilinear, Multiply, Side
from pjax.rules.affine import Term


@dataclass(frozen=True)
class Product:
    """`scale · B(left, right)`; an operand is a slot, or data."""

    operation: Bilinear
    left: bool
    right: bool
    scale: float = 1.0

    @property
    def is_slot(self) -> tuple[bool, bool]:
        return self.left, self.right


@dataclass(frozen=True)
class Addend:
    """`c · x`, summed or broadcast to the shape of the node's output.

    **Attributes:**

    - `term`: the coefficient, and the axes that are summed.
    - `shape`, `dimensions`: where `x` is broadcast, as in `jax.lax.broadcast_in_dim`: a bias has
        one entry for all rows.
    """

    term: Term
    shape: tuple[int, ...] = ()
    dimensions: tuple[int, ...] | None = None


SIDES: tuple[Side, Side] = ("left", "right")


def product_maps(term: Product, side: Side, now: tuple[Any, ...]) -> tuple[Any, Any]:
    op, scale = term.operation, term.scale
    left, right = now
    if side == "left":
        return (
            lambda move: _scaled(scale, op(move, right)),
            lambda force: _scaled(scale, op.transpose_left(force, right)),
        )
    return (
        lambda move: _scaled(scale, op(left, move)),
        lambda force: _scaled(scale, op.transpose_right(force, left)),
    )


def _scaled(scale: Any, array: Array) -> Array:
    """`scale · array`; the array itself where the scale is known to be 1."""
    return array if isinstance(scale, (int, float)) and scale == 1 else scale * array


def broadcast_axes(addend: Addend, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """The axes of the output along which a broadcast operand differs, and their lengths."""
    assert addend.dimensions is not None
    return tuple((d, n) for d, n in zip(addend.dimensions, shape, strict=True) if n > 1)


def addend_map(addend: Addend, factors: Sequence[Any], like: Array) -> Any:
    term = addend.term
    if addend.dimensions is not None:
        shape, dimensions = addend.shape, addend.dimensions
        return lambda x: _scaled(term.scale, jax.lax.broadcast_in_dim(x, shape, dimensions))
    coefficient = term.coefficient(factors)
    if not isinstance(coefficient, (int, float)):
        coefficient = jnp.asarray(coefficient, like.dtype)
    if not term.axes:
        return lambda x: _scaled(coefficient, x)
    return lambda x: jnp.sum(_scaled(coefficient, x), axis=term.axes)


def transpose_of(apply: Any, operand: Array) -> Any:
    transpose = jax.linear_transpose(apply, jax.ShapeDtypeStruct(operand.shape, operand.dtype))
    return lambda force: transpose(force)[0]


def addend_gain(addend: Addend, factors: Sequence[Any], shape: tuple[int, ...]) -> Any:
    term = addend.term
    if addend.dimensions is not None:
        return term.scale**2 * (np.prod(addend.shape) / max(np.prod(shape), 1))
    summed = float(np.prod([shape[axis] for axis in term.axes]))
    coefficient = term.coefficient(factors)
    if np.ndim(coefficient) == 0:
        return coefficient**2 * summed
    return jnp.max(jnp.square(coefficient)) * summed


def product_gain(term: Product, side: Side, now: Sequence[Any], vector: Array | None) -> Any:
    """A bound on `max |s B(x, other)|²/|x|²` over `x`, the operand on `side`.

    Of a product entry by entry the largest square; else by the power iteration, for each batch
    index of a `dot_general` by itself, of a convolution for one example.

    **Arguments:**

    - `term`, `side`, `now`: the product, and the values of its operands; of one entry by entry,
        what they are broadcast from will do.
    - `vector`: where the iteration begins; None for a fixed direction.

    **Returns:** the bound, or the `PowerIteration` that finds it.
    """
    operation, left = term.operation, side == "left"
    other = now[1] if left else now[0]
    if isinstance(operation, Multiply):
        return term.scale**2 * jnp.max(jnp.square(other))
    batch: tuple[int, ...] = ()
    if isinstance(operation, DotGeneral):
        operation, batch = _narrow(operation, side)
    elif isinstance(operation, Convolution):
        operation = operation.with_one_row(side)
    shape = operation.left_shape if left else operation.right_shape
    axes = tuple(axis for axis in range(len(shape)) if axis not in batch)

    def response(x: Array, other: Array) -> Array:
        shape = {"left_shape": x.shape} if left else {"right_shape": x.shape}
        applied: Any = replace(operation, **shape)  # pyright: ignore[reportArgumentType]
        if left:
            return applied.transpose_left(applied(x, other), other)
        return applied.transpose_right(applied(other, x), other)

    kind, stackable = (operation, side), isinstance(operation, DotGeneral)
    return PowerIteration(
        response, (other,), shape, other.dtype, axes, vector, term.scale**2, kind, stackable
    )


def _narrow(operation: DotGeneral, side: Side) -> tuple[DotGeneral, tuple[int, ...]]:
    """The operation with one row of the free operand, all of which see the same map; and its batch
    axes.
    """
    (contract_l, contract_r), (batch_l, batch_r) = operation.dimension_numbers
    if side == "left":
        shape, kept, batch = operation.left_shape, (*contract_l, *batch_l), batch_l
    else:
        shape, kept, batch = operation.right_shape, (*contract_r, *batch_r), batch_r
    narrow = tuple(n if axis in kept else 1 for axis, n in enumerate(shape))
    if side == "left":
        return replace(operation, left_shape=narrow), batch
    return replace(operation, right_shape=narrow), batch
