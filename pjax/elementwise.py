"""Which primitives act entry by entry, which reduce axes, and which only change a shape."""

from __future__ import annotations

from pjax import _compat, primitives

#: Sums of terms that may be larger than the result: `log Γ` near 1 and 2.
SERIES = _compat.find_primitives(
    "lgamma", "digamma", "polygamma", "zeta", "igamma", "igammac", "regularized_incomplete_beta",
    "bessel_i0e", "bessel_i1e", "erf_inv",
)  # fmt: skip
#: Elementwise functions without an exact rule of their own.
SMOOTH = SERIES | _compat.find_primitives(
    "tanh", "logistic", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "square",
    "integer_pow", "pow", "erf", "erfc", "sin", "cos", "tan", "asin", "acos", "atan",
    "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "rem",
)  # fmt: skip
#: Elementwise functions that are piecewise linear, or a product or a quotient.
_EXACT = _compat.find_primitives(
    "add", "add_jaxvals", "sub", "mul", "div", "neg", "max", "min", "abs", "sign", "select_n",
    "convert_element_type", "copy", "eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not",
    "is_finite",
) | {primitives.step_p}  # fmt: skip
ELEMENTWISE = SMOOTH | _EXACT
REDUCTIONS = _compat.find_primitives("reduce_sum", "reduce_max", "reduce_min", "reduce_prod")
SHAPES = _compat.find_primitives(
    "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose"
)
