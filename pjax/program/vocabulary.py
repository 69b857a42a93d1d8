"""The kinds of primitives that the rest of the library asks for, all in one place.

`equation.primitive in REDUCTIONS` reads as a sentence. What a primitive means to one file alone (a
sort, a running sum) stands there.

A *function* has no rule of its own: it becomes one node, linearised numerically. Such are powers
with a free exponent and other functions of several numbers, running products and extrema,
decompositions and solutions of linear systems. An operation with several outputs is one with a
single output, in which they lie side by side; what is no real number of them (the permutation of a
decomposition) does not move.
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

from pjax.backend import compat
from pjax.program import primitives

#: Elementwise primitives that keep a uniform value uniform.
UNIFORM_ELEMENTWISE = compat.find_primitives(
    "add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "rsqrt", "integer_pow", "pow", "exp",
    "log", "convert_element_type", "copy", "abs", "sign", "select_n",
    "eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not",
)  # fmt: skip
ADDITIONS = compat.find_primitives("add", "add_jaxvals")
COMPARISONS = compat.find_primitives("eq", "ne", "ge", "gt", "le", "lt")
#: These broadcast scalars, and axes of length 1, without saying so.
BINARY = ADDITIONS | COMPARISONS | compat.find_primitives(
    "sub", "mul", "div", "max", "min", "pow", "atan2", "rem",
)  # fmt: skip
UNIFORM_WIRING = compat.find_primitives(
    "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "rev", "tile",
)  # fmt: skip
#: What turns integers into other integers that are meant as the same kind of number.
INTEGER_ARITHMETIC = UNIFORM_WIRING | compat.find_primitives(
    "add", "sub", "mul", "neg", "copy", "convert_element_type", "abs",
    "concatenate", "stack", "reduce_sum", "reduce_max", "reduce_min", "dot_general",
)  # fmt: skip
#: Sums of terms that may be larger than the result: `log Γ` near 1 and 2.
SERIES = compat.find_primitives(
    "lgamma", "digamma", "polygamma", "igamma", "igammac", "regularized_incomplete_beta",
    "bessel_i0e", "bessel_i1e", "erf_inv",
)  # fmt: skip
#: Elementwise functions without an exact rule of their own.
SMOOTH = SERIES | compat.find_primitives(
    "tanh", "logistic", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "square",
    "integer_pow", "pow", "erf", "erfc", "sin", "cos", "tan", "asin", "acos", "atan",
    "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "rem",
)  # fmt: skip
#: Elementwise functions that are piecewise linear, or a product or a quotient.
_EXACT = compat.find_primitives(
    "add", "add_jaxvals", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "select_n",
    "convert_element_type", "copy", "eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not",
    "is_finite",
) | {primitives.step_p}  # fmt: skip
ELEMENTWISE = SMOOTH | _EXACT
REDUCTIONS = compat.find_primitives("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
SHAPES = compat.find_primitives(
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"
)
#: Shapes that leave all entries in their order, if the number of entries is the same.
ORDERED_SHAPES = SHAPES - compat.find_primitives("transpose")
#: Wiring that reads each entry of its operand equally often.
EVEN_WIRING = compat.find_primitives(
    "broadcast_in_dim", "reshape", "squeeze", "transpose", "rev", "convert_element_type", "copy"
)
JOINS = compat.find_primitives("stack", "concatenate")
SPLITS = compat.find_primitives("split")
RUNNING = compat.find_primitives("cumprod", "cumlogsumexp", "cummax", "cummin")
#: Of the last two axes of their operands.
MATRICES = compat.find_primitives(
    "cholesky", "triangular_solve", "eigh", "qr", "householder_product", "svd", "lu",
    "tridiagonal_solve", "geqrf", "symmetric_product",
)  # fmt: skip
SYSTEMS = compat.find_primitives("linear_solve", "custom_linear_solve")
FOURIER = compat.find_primitives("fft")
ROUNDED = compat.find_primitives("floor", "ceil")
STOP_GRADIENT = compat.find_primitives("stop_gradient")
#: What does not follow its operands: an index of the forward pass, say.
STOPPED = ROUNDED | STOP_GRADIENT | compat.find_primitives("argmax", "argmin")
LOSSES = frozenset(primitives.LOSSES)
#: What a loss is made of. Products of arrays and convolutions belong to networks.
IN_LOSSES = (
    ELEMENTWISE | REDUCTIONS | SHAPES | LOSSES | JOINS | RUNNING
    | compat.find_primitives(
        "gather", "slice", "dynamic_slice", "pad", "rev", "cumsum", "sort", "clamp",
    )
)  # fmt: skip


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
        outputs = self.primitive.bind(*args, **self.params)
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
        (out,) = jax.tree.leaves(self.primitive.bind(*operands, **self.params))
        return jnp.stack([out.real, out.imag]) if jnp.iscomplexobj(out) else out


def is_complex(aval: Any) -> bool:
    """Whether a value, or a literal, is of a complex type."""
    return bool(jnp.issubdtype(aval.dtype, jnp.complexfloating))


def real_type(dtype: Any) -> Any:
    """The type of the parts of complex numbers; any other type itself."""
    complex_type = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.finfo(dtype).dtype if complex_type else np.dtype(dtype)
