"""Operations that are one differentiable function each, without a rule of their own.

Each becomes one node, linearised numerically: powers with a free exponent and other functions of
several numbers, running products and extrema, decompositions and solutions of linear systems. An
operation with several outputs is one with a single output, in which they lie side by side; what is
no real number of them (the permutation of a decomposition) rests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pjax.backend import compat, shardings
from pjax.program.vocabulary import (
    ELEMENTWISE,
    FOURIER,
    MATRICES,
    REDUCTIONS,
    RUNNING,
    SERIES,
    SYSTEMS,
)

#: `scatter_mul`: of entries that are named once.
_OTHERS = compat.find_primitives("random_gamma", "scatter_mul")
FUNCTIONS = ELEMENTWISE | REDUCTIONS | RUNNING | MATRICES | SYSTEMS | _OTHERS


def is_function(primitive: Any) -> bool:
    """Whether an operation is linearised without being asked to."""
    return primitive in FUNCTIONS or isinstance(primitive, (Packed, OfParts))


def is_noisy(primitive: Any) -> bool:
    """Whether entries of the result may be off by more than their own rounding."""
    noisy = SERIES | MATRICES | SYSTEMS | RUNNING | _OTHERS
    return primitive in noisy or isinstance(primitive, (Packed, OfParts))


def operation_axes(
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
    elif primitive in RUNNING:
        kept = tuple(axis for axis in range(ndim) if axis != params["axis"])
    elif primitive in MATRICES:
        kept = tuple(range(ndim - 2))
    elif primitive in FOURIER:
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
        outputs = self.primitive.bind(*shardings.matched(args), **self.params)
        floats = [out for out in outputs if jnp.issubdtype(out.dtype, jnp.floating)]
        return jnp.concatenate([o.reshape(*o.shape[: self.batch], -1) for o in floats], -1)


@dataclass(frozen=True)
class OfParts:
    """A primitive as a function of the real and imaginary parts of its operands.

    A complex result is its two parts, along a new first axis. It stands where a primitive does.

    **Attributes:**

    - `pairs`: for each operand whether it is given as two.
    - `key`, `params`: the primitive's parameters; first in a hashable form.
    """

    primitive: Any
    pairs: tuple[bool, ...]
    key: Any
    params: Mapping[str, Any] = field(compare=False)
    multiple_results: bool = False

    @property
    def name(self) -> str:
        return self.primitive.name

    def bind(self, *args: Any) -> Array:
        given = iter(args)
        operands = [lax.complex(next(given), next(given)) if p else next(given) for p in self.pairs]
        operands = shardings.matched(operands)
        (out,) = jax.tree.leaves(self.primitive.bind(*operands, **self.params))
        return jnp.stack([out.real, out.imag]) if jnp.iscomplexobj(out) else out


def is_complex(aval: Any) -> bool:
    """Whether a value, or a literal, is of a complex type."""
    return bool(jnp.issubdtype(aval.dtype, jnp.complexfloating))


def real_type(dtype: Any) -> Any:
    """The type of the parts of complex numbers; any other type itself."""
    complex_type = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.finfo(dtype).dtype if complex_type else np.dtype(dtype)
