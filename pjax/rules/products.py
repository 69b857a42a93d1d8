"""Products: which bilinear operation an equation is, and its rule in neuron splitting.

There `x @ w` is one constraint for each entry of the output, on copies of a row and a column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp

from pjax.backend.compat import P
from pjax.options import Exactness
from pjax.program import Equation, Program, widened
from pjax.projections.products import free, pinned
from pjax.projections.products.convolution import Convolution
from pjax.projections.products.dot_general import DotGeneral
from pjax.projections.products.operation import Bilinear, Multiply, Side
from pjax.rules.base import Rule
from pjax.rules.storages import Compact, Dense, Lifted, Structured


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


@dataclass(frozen=True)
class NeuronBilinear(Rule):
    """Two free operands, one constraint per scalar product, on copies of their slices."""

    exactness: ClassVar[Exactness] = "exact"

    operation: Bilinear
    name: str = "dot"

    def storages(self, reflecting, shared):
        op = self.operation
        if isinstance(op, Multiply):
            return Dense(), Dense()
        if reflecting:
            return Lifted(op, "left"), Lifted(op, "right")
        return Compact(op, "left"), Compact(op, "right")

    def project(self, reference, states, weights, target, target_weight):
        op, (left, right) = self.operation, states
        left_ref, right_ref = reference.inputs
        rest: Any = (*weights, target, target_weight, reference.output)
        if isinstance(op, Multiply):
            out = free.project_compact(op, left_ref, right_ref, left, right, *rest)
            return (out.left, out.right), out.output
        if isinstance(left, tuple):
            out = free.project_compact(op, left_ref, right_ref, left[0], right[0], *rest)
            return ((out.left, out.left_spread), (out.right, out.right_spread)), out.output
        out = free.project_lifted(op, left_ref, right_ref, left, right, *rest)
        return (out.left_copies, out.right_copies), out.output


@dataclass(frozen=True)
class PinnedBilinear(Rule):
    """One operand is data: the node is linear, and its copies are never formed."""

    exactness: ClassVar[Exactness] = "exact"

    operation: Bilinear
    pinned: Side
    name: str = "dot"

    def storages(self, reflecting, shared):
        op = self.operation
        # Of one scalar product every entry has one copy, and nothing to be compact about.
        if not reflecting and op.output_shape:
            return (Compact(op, "right" if self.pinned == "left" else "left"),)
        if shared[0]:
            # Entries that one group writes and another keeps leave the structured form.
            return (Lifted(op, "right" if self.pinned == "left" else "left"),)
        return (Structured(op, self.pinned),)

    def project(self, reference, states, weights, target, target_weight):
        (state,), (weight,), (value,) = states, weights, reference.knowns
        if not isinstance(state, tuple):
            return self._project_copies(value, state, weight, target, target_weight)
        first, second = state
        if jnp.ndim(second) == 0 and self.operation.output_shape:
            mean, output, spread = pinned.project_pinned_compact(
                self.operation, self.pinned, value, first, weight, target, target_weight
            )
            return ((mean, spread),), output
        common, multiplier, output = pinned.project_pinned_structured(
            self.operation, self.pinned, value, first, second, weight, target, target_weight
        )
        return ((common, multiplier),), output

    def _project_copies(self, value, copies, weight, target, target_weight):
        op = self.operation
        data = op.lift_left(value) if self.pinned == "left" else op.lift_right(value)
        product, energy = jnp.sum(data * copies, axis=-1), jnp.sum(jnp.square(data), axis=-1)
        force = target_weight * (target - product) / (1 + target_weight * energy / weight)
        return (copies + data * (force / weight)[..., None],), product + energy * force / weight
