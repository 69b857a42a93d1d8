"""Products of JAX (`dot_general`, `mul`, convolutions) as bilinear operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from pjax.backend.compat import P
from pjax.program import Equation, Program, widened
from pjax.projections.products.convolution import Convolution
from pjax.projections.products.dot_general import DotGeneral
from pjax.projections.products.operation import Bilinear, Multiply


class BilinearOperands(NamedTuple):
    """A bilinear equation: its operation, and which of its two operands are free."""

    operation: Bilinear
    free: tuple[bool, bool]


def bilinear_operands(program: Program, equation: Equation) -> BilinearOperands:
    """The operation of an equation with one of the primitives in `BILINEAR`."""
    left, right = equation.inputs
    make = BILINEAR[equation.primitive]
    return BilinearOperands(
        make(program, equation), (program.is_variable(left), program.is_variable(right))
    )


def bilinear_name(equation: Equation) -> str:
    """What a node with one of the primitives in `BILINEAR` is called."""
    short = {P.dot_general_p: "dot", P.conv_general_dilated_p: "conv"}
    return short.get(equation.primitive, equation.name)


def _dot_general_operation(program: Program, equation: Equation) -> Bilinear:
    left, right = equation.inputs
    (contract_l, contract_r), (batch_l, batch_r) = equation.params["dimension_numbers"]
    return DotGeneral(
        dimension_numbers=(
            (tuple(contract_l), tuple(contract_r)),
            (tuple(batch_l), tuple(batch_r)),
        ),
        left_shape=program.shape(left),
        right_shape=program.shape(right),
        precision=equation.params.get("precision"),
        preferred_element_type=_wide_or_none(equation.params.get("preferred_element_type")),
        operand_type=_narrow_type(program, equation),
    )


def _narrow_type(program: Program, equation: Equation) -> Any:
    """bfloat16 if that is what the program multiplies, else None."""
    dtype = jnp.result_type(*(program.dtype(atom) for atom in equation.inputs))
    return None if widened(dtype) == dtype else dtype


def _wide_or_none(dtype: Any) -> Any:
    return None if dtype is None or widened(dtype) != dtype else dtype


def _multiply_operation(program: Program, equation: Equation) -> Bilinear:
    return Multiply(program.shape(equation.inputs[0]))


def _convolution_operation(program: Program, equation: Equation) -> Bilinear:
    left, right = equation.inputs
    params = equation.params
    numbers = params["dimension_numbers"]
    return Convolution(
        left_shape=program.shape(left),
        right_shape=program.shape(right),
        window_strides=tuple(params["window_strides"]),
        padding=tuple((low, high) for low, high in params["padding"]),
        lhs_dilation=tuple(params["lhs_dilation"]),
        rhs_dilation=tuple(params["rhs_dilation"]),
        dimension_numbers=(
            tuple(numbers.lhs_spec), tuple(numbers.rhs_spec), tuple(numbers.out_spec)
        ),
        feature_group_count=params["feature_group_count"],
        batch_group_count=params["batch_group_count"],
        precision=params["precision"],
        preferred_element_type=_wide_or_none(params["preferred_element_type"]),
    )  # fmt: skip


#: How the operation of each bilinear primitive is made.
BILINEAR: Mapping[Any, Callable[[Program, Equation], Bilinear]] = {
    P.dot_general_p: _dot_general_operation,
    P.conv_general_dilated_p: _convolution_operation,
    P.mul_p: _multiply_operation,
}
