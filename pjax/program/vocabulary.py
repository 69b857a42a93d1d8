"""The kinds of primitives that the rest of the library asks for, all in one place.

`equation.primitive in REDUCTIONS` reads as a sentence. What a primitive means to one file alone (a
sort, a running sum) stands there.
"""

from __future__ import annotations

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
    "lgamma", "digamma", "polygamma", "zeta", "igamma", "igammac", "regularized_incomplete_beta",
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
LOSSES = frozenset(
    {primitives.cross_entropy_p, primitives.margin_loss_p, primitives.squared_error_p}
)
#: What a loss is made of. Products of arrays and convolutions belong to networks.
IN_LOSSES = (
    ELEMENTWISE | REDUCTIONS | SHAPES | LOSSES | JOINS | RUNNING
    | compat.find_primitives(
        "gather", "slice", "dynamic_slice", "pad", "rev", "cumsum", "sort", "clamp",
    )
)  # fmt: skip
