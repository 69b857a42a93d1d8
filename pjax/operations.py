"""Operations that are one differentiable function each, without a rule of their own.

Each becomes one node, linearised numerically: powers with a free exponent and other functions of
several numbers, running products and extrema, decompositions and solutions of linear systems. An
operation with several outputs is one with a single output, in which they lie side by side; what is
no real number of them (the permutation of a decomposition) rests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax import _compat
from pjax.complex_values import OfParts
from pjax.elementwise import ELEMENTWISE, REDUCTIONS, SERIES

if TYPE_CHECKING:
    from pjax.trace import Atom, Flattener

_RUNNING = _compat.find_primitives("cumprod", "cumlogsumexp", "cummax", "cummin")
#: Of the last two axes of their operands.
_MATRICES = _compat.find_primitives(
    "cholesky", "triangular_solve", "eigh", "qr", "householder_product", "svd", "lu",
    "tridiagonal_solve", "geqrf", "symmetric_product",
)  # fmt: skip
_FOURIER = _compat.find_primitives("fft")
#: `scatter_mul`: of entries that are named once.
_OTHERS = _compat.find_primitives("random_gamma", "scatter_mul")
_SYSTEMS = _compat.find_primitives("linear_solve", "custom_linear_solve")
_FUNCTIONS = ELEMENTWISE | REDUCTIONS | _RUNNING | _MATRICES | _SYSTEMS | _OTHERS


def is_function(primitive: Any) -> bool:
    """Whether an operation is linearised without being asked to."""
    return primitive in _FUNCTIONS or isinstance(primitive, (Packed, OfParts))


def is_noisy(primitive: Any) -> bool:
    """Whether entries of the result may be off by more than their own rounding."""
    noisy = SERIES | _MATRICES | _SYSTEMS | _RUNNING | _OTHERS
    return primitive in noisy or isinstance(primitive, (Packed, OfParts))


def independent_axes(
    primitive: Any,
    params: Mapping[str, Any],
    inputs: Sequence[tuple[int, ...]],
    output: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """Pairs of an axis of every operand and one of the output along which nothing is mixed.

    **Arguments:**

    - `primitive`, `params`: of the operation.
    - `inputs`, `output`: the shapes of the operands that move, and of the output.
    """
    (ndim, *others) = {len(shape) for shape in inputs}
    shift = 0
    if isinstance(primitive, OfParts):
        # A complex result has its parts along a new first axis.
        primitive, params, shift = primitive.primitive, primitive.params, len(output) - ndim
    kept: tuple[int, ...] = ()
    if isinstance(primitive, Packed):
        kept = tuple(range(primitive.batch))
    elif primitive in ELEMENTWISE:
        kept = tuple(range(ndim))
    elif primitive in REDUCTIONS:
        # What is left of the axes in front; others move.
        kept = tuple(range(min(params["axes"], default=ndim)))
    elif primitive in _RUNNING:
        kept = tuple(axis for axis in range(ndim) if axis != params["axis"])
    elif primitive in _MATRICES:
        kept = tuple(range(ndim - 2))
    elif primitive in _FOURIER:
        kept = tuple(range(ndim - len(params["fft_lengths"])))
    if others or any(shape[axis] != output[axis + shift] for shape in inputs for axis in kept):
        return ()
    return tuple((axis, axis + shift) for axis in kept)


@dataclass(frozen=True)
class Packed:
    """The outputs of a primitive that are real numbers, side by side along the last axis.

    It stands where a primitive does.
    """

    primitive: Any
    #: The primitive's parameters, in a hashable form.
    key: Any
    params: Mapping[str, Any] = field(compare=False)
    batch: int
    multiple_results: bool = False

    @property
    def name(self) -> str:
        return self.primitive.name

    def bind(self, *args: Any) -> Array:
        outputs = self.primitive.bind(*args, **self.params)
        floats = [out for out in outputs if jnp.issubdtype(out.dtype, jnp.floating)]
        return jnp.concatenate([o.reshape(*o.shape[: self.batch], -1) for o in floats], -1)


def expand(
    flattener: Flattener, eqn: Any, inputs: Sequence[Atom], source: str
) -> list[Atom] | None:
    """The outputs of an operation that has several, read from one; None for any other."""
    primitive = eqn.primitive
    if primitive not in _FUNCTIONS or len(eqn.outvars) == 1:
        return None
    from pjax.trace import canonical

    avals = [var.aval for var in eqn.outvars]
    shape = eqn.invars[0].aval.shape
    batch = len(shape) - 2 if primitive in _MATRICES else 0
    packed = Packed(primitive, canonical(eqn.params), dict(eqn.params), batch)
    moving = [jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals]
    if not any(moving):
        return None
    front = tuple(shape[:batch])
    sizes = [math.prod(aval.shape[batch:]) for aval in avals]
    total = sum(size for size, moves in zip(sizes, moving, strict=True) if moves)
    dtype = next(aval.dtype for aval, moves in zip(avals, moving, strict=True) if moves)
    joined = flattener.add_operation(packed, inputs, (*front, total), dtype, source)

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

    real = iter(flattener.add_function(parts, [joined], source))
    others = iter(() if all(moving) else flattener.add_function(resting, inputs, source))
    return [next(real if moves else others) for moves in moving]


__all__ = ["Packed", "expand", "independent_axes", "is_function", "is_noisy"]
