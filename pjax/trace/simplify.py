"""Equations of parameters that say the same more simply, while a function is flattened.

- A conversion to the same type, a reduction over no axis and shapes that come and go (as `vmap`
  leaves them around a convolution) are their operand.
- `psum`, `pmax` and `pmin` over a `vmap` axis are reductions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pjax.backend import compat
from pjax.backend.compat import P
from pjax.program import ORDERED_SHAPES, REDUCTIONS, Atom
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
