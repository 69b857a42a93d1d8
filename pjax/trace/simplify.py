"""Equations of parameters that say the same more simply, while a function is flattened.

- An operation with several outputs has one, in which they lie side by side.
- A conversion to the same type, a reduction over no axis and shapes that come and go (as `vmap`
  leaves them around a convolution) are their operand.
- `psum`, `pmax` and `pmin` over a `vmap` axis are reductions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.backend import compat
from pjax.backend.compat import P
from pjax.program import FUNCTIONS, MATRICES, ORDERED_SHAPES, REDUCTIONS, Atom, Packed, canonical
from pjax.trace.writer import Writer

_COLLECTIVES: dict[Any, Any] = {
    **dict.fromkeys(compat.find_primitives("psum"), jnp.sum),
    **dict.fromkeys(compat.find_primitives("pmax"), jnp.max),
    **dict.fromkeys(compat.find_primitives("pmin"), jnp.min),
}


def expand(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The outputs of an equation of parameters by simpler ones; None if it stays as it is."""
    primitive, params = eqn.primitive, eqn.params
    if primitive in _COLLECTIVES:
        axes = params["axes"]
        if params.get("axis_index_groups") is not None or not all(isinstance(a, int) for a in axes):
            return None
        reduce = _COLLECTIVES[primitive]
        return writer.add_function(
            lambda *arrays: [reduce(array, axis=axes) for array in arrays], inputs, source
        )
    if primitive in FUNCTIONS and len(eqn.outvars) > 1:
        return _side_by_side(writer, eqn, inputs, source)
    (first, *_) = inputs
    if not writer.is_variable(first) or not isinstance(first, int):
        return None
    aval = writer.avals[first]
    out = eqn.outvars[0].aval
    if primitive in REDUCTIONS and not params["axes"]:
        return [first]
    if primitive is P.convert_element_type_p and aval.dtype == out.dtype:
        return [first]
    if primitive in ORDERED_SHAPES and aval.size == out.size and aval.shape != out.shape:
        return _came_and_went(writer, first, out.shape)
    return None


def _came_and_went(writer: Writer, var: int, shape: tuple[int, ...]) -> list[Atom] | None:
    """What has `shape` and has become `var` by shapes alone."""
    while True:
        equation = writer.definitions.get(var)
        if equation is None or equation.primitive not in ORDERED_SHAPES:
            return None
        (operand, *_) = equation.inputs
        if not isinstance(operand, int):
            return None
        if writer.avals[operand].size != math.prod(shape):
            return None
        if tuple(writer.avals[operand].shape) == tuple(shape):
            return [operand]
        var = operand


def _side_by_side(
    writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str
) -> list[Atom] | None:
    """The outputs of an operation that has several, read from one; None if none is a number."""
    primitive = eqn.primitive
    avals = [var.aval for var in eqn.outvars]
    shape = eqn.invars[0].aval.shape
    batch = len(shape) - 2 if primitive in MATRICES else 0
    packed = Packed(primitive, canonical(eqn.params), dict(eqn.params), batch)
    moving = [jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals]
    if not any(moving):
        return None
    front = tuple(shape[:batch])
    sizes = [math.prod(aval.shape[batch:]) for aval in avals]
    total = sum(size for size, moves in zip(sizes, moving, strict=True) if moves)
    dtype = next(aval.dtype for aval, moves in zip(avals, moving, strict=True) if moves)
    joined = writer.add_operation(packed, inputs, (*front, total), dtype, source)

    def parts(joined: Array) -> list[Array]:
        found, start = [], 0
        for aval, size, moves in zip(avals, sizes, moving, strict=True):
            if moves:
                part = lax.slice_in_dim(joined, start, start + size, axis=batch)
                found.append(part.reshape(aval.shape))
                start += size
        return found

    def resting(*args: Any) -> list[Any]:
        outputs = primitive.bind(*map(lax.stop_gradient, args), **eqn.params)
        return [o for o, moves in zip(outputs, moving, strict=True) if not moves]

    real = iter(writer.add_function(parts, [joined], source))
    others = iter(() if all(moving) else writer.add_function(resting, inputs, source))
    return [next(real if moves else others) for moves in moving]
