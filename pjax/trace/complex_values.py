"""Complex values between real parameters and a real loss, as pairs of real numbers.

A complex value that depends on parameters is the pair of its real and its imaginary part. What is
linear in it over the real numbers (sums, wiring) is done with both; products are sums of real
products; any other function of complex numbers (`exp`, `abs`, a Fourier transform) becomes one
function of real numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from pjax.backend import compat
from pjax.backend.compat import P
from pjax.program import (
    ADDITIONS,
    ELEMENTWISE,
    SHAPES,
    Atom,
    OfParts,
    TraceError,
    canonical,
    is_complex,
    real_type,
    scatter_add,
)
from pjax.trace.writer import Writer

#: A value in real numbers: one for a real value; of a complex one two, None for 0.
Parts = tuple[Any, ...]
#: Linear over the real numbers, part by part.
_LINEAR = SHAPES | compat.find_primitives(
    "add", "add_jaxvals", "sub", "neg", "reduce_sum", "cumsum", "concatenate", "slice", "pad",
    "rev", "split", "copy", "stack", "unstack", "tile", "gather", "dynamic_slice",
    "dynamic_update_slice", "select_n", "scatter", "scatter_add", "stop_gradient",
    "optimization_barrier", "device_put", "sharding_constraint", "name",
)  # fmt: skip
_SUMS = ADDITIONS | compat.find_primitives("sub")
_SQUARES = compat.find_primitives("square", "integer_pow")
_PRODUCTS = compat.find_primitives("mul", "dot_general", "conv_general_dilated")
_OTHERS = ELEMENTWISE | compat.find_primitives(
    "fft", "cumprod", "reduce_prod", "triangular_solve", "cholesky", "linear_solve",
    "custom_linear_solve",
    "reduce_precision",
)  # fmt: skip


def expand(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The outputs of an equation of parameters with complex operands or results, by real ones; None
    for any other.

    **Raises:** [`pjax.TraceError`][] for an operation that is not known for pairs.
    """
    primitive, params = eqn.primitive, eqn.params
    ins, outs = [writer.aval(atom) for atom in inputs], [var.aval for var in eqn.outvars]
    if not any(map(is_complex, (*ins, *outs))):
        return None
    operands = [
        writer.parts(atom, source) if is_complex(aval) else (atom,)
        for atom, aval in zip(inputs, ins, strict=True)
    ]
    function = _function(primitive, params, ins, outs)
    if function is None:
        if primitive not in _OTHERS:
            return _unknown(eqn, source)
        return _of_parts(writer, eqn, inputs, operands, source)
    results: list[Parts] = []

    def run(*given: Any) -> list[Any]:
        values = iter(given)
        parts = [tuple(None if p is None else next(values) for p in x) for x in operands]
        results[:] = function(parts)
        return [part for parts in results for part in parts if part is not None]

    present = [part for parts in operands for part in parts if part is not None]
    found = iter(writer.add_function(run, present, source))
    made: list[Any] = [
        tuple(None if part is None else next(found) for part in parts) for parts in results
    ]
    return [
        writer.define_parts(parts, aval, source) if is_complex(aval) else parts[0]
        for parts, aval in zip(made, outs, strict=True)
    ]


def _unknown(eqn: Any, source: str) -> Any:

    raise TraceError(
        f"`{eqn.primitive.name}` ({source}) computes with complex numbers that depend on the "
        "parameters, and there is no rule for it. Write it with real and imaginary parts as two "
        "arrays, or register it as an operation of real numbers, `pjax.register_projection`."
    )


def _function(
    primitive: Any, params: Mapping[str, Any], ins: Sequence[Any], outs: Sequence[Any]
) -> Callable[[list[Parts]], list[Parts]] | None:
    """The operation as a function of parts to parts; None if it is not linear in each operand."""
    if primitive in (P.real_p, P.imag_p):
        place = int(primitive is P.imag_p)
        return lambda xs: [(_full(xs[0][place], outs[0]),)]
    if primitive is P.complex_p:
        return lambda xs: [(xs[0][0], xs[1][0])]
    if primitive is P.conj_p:
        return lambda xs: [(xs[0][0], _negative((*xs[0], None)[1]))]
    if primitive is P.convert_element_type_p:
        return lambda xs: [_converted(xs[0], outs[0])]
    if primitive in _LINEAR:
        return lambda xs: _by_parts(primitive, params, xs, ins, outs)
    if primitive in _PRODUCTS:
        return lambda xs: [_product(primitive, params, *xs)]
    if primitive in _SQUARES and params.get("y", 2) == 2:
        return lambda xs: [_product(P.mul_p, {}, xs[0], xs[0])]
    if primitive is P.div_p and not is_complex(ins[1]):
        return lambda xs: [tuple(None if x is None else x / xs[1][0] for x in xs[0])]
    return None


def _full(part: Any, aval: Any) -> Any:
    return jnp.zeros(aval.shape, aval.dtype) if part is None else part


def _negative(part: Any) -> Any:
    return None if part is None else -part


def _converted(parts: Parts, aval: Any) -> Parts:
    dtype = real_type(aval.dtype)
    count = 2 if is_complex(aval) else 1
    converted = [None if x is None else lax.convert_element_type(x, dtype) for x in parts]
    return tuple([*converted, None][:count]) if count == 2 else (_full(converted[0], aval),)


def _by_parts(
    primitive: Any,
    params: Mapping[str, Any],
    xs: Sequence[Parts],
    ins: Sequence[Any],
    outs: Sequence[Any],
) -> list[Parts]:
    """The operation on the real parts, and on the imaginary parts."""
    sides: list[list[Any]] = []
    for side in range(2):
        if all(x[side] is None for x, aval in zip(xs, ins, strict=True) if is_complex(aval)):
            sides.append([None] * len(outs))
            continue
        operands = []
        for x, aval in zip(xs, ins, strict=True):
            part = x[side] if is_complex(aval) else x[0]
            operands.append(jnp.zeros(aval.shape, real_type(aval.dtype)) if part is None else part)
        given = dict(params)
        if given.get("fill_value") is not None:
            given["fill_value"] = (np.real, np.imag)[side](given["fill_value"]).item()
        if primitive is P.scatter_add_p:
            x, indices, updates = operands
            out: Any = scatter_add(x, indices, updates, given)
        elif primitive in _SUMS:
            operands = [jnp.broadcast_to(x, outs[0].shape) for x in operands]
            out = primitive.bind(*operands, **given)
        else:
            out = primitive.bind(*operands, **given)
        sides.append(list(out) if primitive.multiple_results else [out])
    return list(zip(*sides, strict=True))


def _product(primitive: Any, params: Mapping[str, Any], left: Parts, right: Parts) -> Parts:
    """`(a + ib) (c + id)`, without the products of what is 0."""
    params = dict(params)
    if params.get("preferred_element_type") is not None:
        params["preferred_element_type"] = real_type(params["preferred_element_type"])

    def times(x: Any, y: Any) -> Any:
        if x is None or y is None:
            return None
        return x * y if primitive is P.mul_p else primitive.bind(x, y, **params)

    (a, b), (c, d) = ((*x, None)[:2] for x in (left, right))
    return _total(times(a, c), _negative(times(b, d))), _total(times(a, d), times(b, c))


def _total(x: Any, y: Any) -> Any:
    if x is None or y is None:
        return x if y is None else y
    return x + y


def _of_parts(
    writer: Writer, eqn: Any, inputs: Sequence[Atom], operands: Sequence[Any], source: str
) -> list[Atom]:
    """One function of all parts."""

    (aval,) = (var.aval for var in eqn.outvars)
    if not (is_complex(aval) or jnp.issubdtype(aval.dtype, jnp.floating)):
        # A comparison: it rests.
        def compare(*given: Any) -> list[Any]:
            return [eqn.primitive.bind(*map(lax.stop_gradient, given), **eqn.params)]

        return writer.add_function(compare, inputs, source)
    filled = [
        writer.zeros(writer.aval(atom), source) if part is None else part
        for atom, parts in zip(inputs, operands, strict=True)
        for part in parts
    ]
    pairs = tuple(len(parts) == 2 for parts in operands)
    operation = OfParts(eqn.primitive, pairs, canonical(eqn.params), dict(eqn.params))
    dtype = real_type(aval.dtype)
    if not is_complex(aval):
        return [writer.add_operation(operation, filled, aval.shape, dtype, source)]
    joined = writer.add_operation(operation, filled, (2, *aval.shape), dtype, source)
    both = writer.add_function(lambda x: [x[0], x[1]], [joined], source)
    return [writer.define_parts(tuple(both), aval, source)]
