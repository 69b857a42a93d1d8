"""Operations with several outputs, as one output in which they lie side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.program import FUNCTIONS, MATRICES, Atom, Packed, canonical
from pjax.trace.writer import Writer


def expand(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The outputs of an operation that has several, read from one; None for any other."""
    primitive = eqn.primitive
    if primitive not in FUNCTIONS or len(eqn.outvars) == 1:
        return None

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
