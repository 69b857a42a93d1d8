"""Which primitives act entry by entry, which reduce axes, and which only change a shape."""

from __future__ import annotations

from pjax import _compat, primitives

#: Elementwise functions without an exact rule of their own.
SMOOTH = _compat.find_primitives(
    "tanh", "logistic", "exp", "exp2", "expm1", "log", "log1p", "sqrt", "rsqrt", "cbrt", "square",
    "integer_pow", "pow", "erf", "erfc", "erf_inv", "sin", "cos", "tan", "asin", "acos", "atan",
    "atan2", "sinh", "cosh", "asinh", "acosh", "atanh", "lgamma", "digamma", "polygamma", "zeta",
    "igamma", "igammac", "regularized_incomplete_beta", "bessel_i0e", "bessel_i1e", "rem",
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
