"""Which primitives act entry by entry, reduce axes, change a shape, or return an index."""

from __future__ import annotations

from pjax.backend import compat
from pjax.program import primitives

#: Elementwise primitives that keep a uniform value uniform.
UNIFORM_ELEMENTWISE = compat.find_primitives(
    "add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "rsqrt", "integer_pow", "pow", "exp",
    "log", "convert_element_type", "copy", "abs", "sign", "select_n",
    "eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not",
)  # fmt: skip
#: These broadcast scalars, and axes of length 1, without saying so.
BINARY = compat.find_primitives(
    "add", "add_jaxvals", "sub", "mul", "div", "max", "min", "pow", "atan2", "rem",
    "eq", "ne", "ge", "gt", "le", "lt",
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
#: Choices whose only output is an index: known values of the forward pass.
INDICES = compat.find_primitives("argmax", "argmin")
LOSSES = frozenset(
    {primitives.cross_entropy_p, primitives.margin_loss_p, primitives.squared_error_p}
)
