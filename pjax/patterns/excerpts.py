"""Excerpts of a program as functions of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pjax.backend.compat import P
from pjax.program import (
    ELEMENTWISE,
    Atom,
    Equation,
    Program,
    Scalar,
    canonical,
    independent_axes,
    is_noisy,
    operation_axes,
    read,
    run,
    widened,
)


@dataclass(frozen=True, eq=False)
class Function:
    """A piece of a program: `output = function(inputs, knowns)`. Equal pieces are equal.

    **Attributes:**

    - `equations`: over variables of its own: first the inputs, then the knowns, then results.
    - `output`: the variable that it returns.
    - `narrow`: whether the program computes it in fewer digits than float32. The function does not.
    - `key`: what two equal pieces have in common.
    """

    equations: tuple[Equation, ...]
    output: Atom
    narrow: bool
    key: Any

    def __call__(self, inputs: Sequence[Any], knowns: Sequence[Any]) -> Any:
        """The output, in an array of JAX."""
        values: dict[int, Any] = dict(enumerate((*inputs, *knowns)))
        run(self.equations, values, even=True)
        return read(values, self.output)

    @property
    def noisy(self) -> bool:
        """Whether its values may be off by more than their own rounding."""
        return any(is_noisy(e.primitive) for e in self.equations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Excerpt:
    """A function, and what it reads in the program that it was cut out of.

    **Attributes:**

    - `inputs`: variables that depend on parameters.
    - `knowns`: operands that do not.
    - `elementwise`: whether each entry of the output depends on one entry of the one input only.
    - `rows`: pairs `(input axis, output axis)`, ascending, along which the function of the one
        input is independent.
    """

    function: Function
    inputs: tuple[int, ...]
    knowns: tuple[Atom, ...]
    elementwise: bool
    rows: tuple[tuple[int, int], ...]


def _wide(literal: Scalar) -> Scalar:
    return Scalar(literal.value, widened(literal.dtype))


def _wide_params(equation: Equation) -> Any:
    if equation.primitive is not P.convert_element_type_p:
        return equation.params
    return {**equation.params, "new_dtype": widened(equation.params["new_dtype"])}


def cut(
    program: Program, equations: Sequence[Equation], inputs: Sequence[int], output: int
) -> Excerpt:
    """The function from `inputs` to `output` that `equations`, in order, compute."""
    inside = {out for e in equations for out in e.outputs}
    knowns: dict[Atom, int] = {}
    number: dict[int, int] = {var: place for place, var in enumerate(inputs)}
    for equation in equations:
        for atom in equation.inputs:
            if isinstance(atom, int) and atom not in inside and atom not in number:
                number[atom] = len(inputs) + len(knowns)
                knowns[atom] = number[atom]
    size = len(number)
    local = []
    for equation in equations:
        for out in equation.outputs:
            number[out] = size
            size += 1
        local.append(
            Equation(
                equation.primitive,
                tuple(number[a] if isinstance(a, int) else _wide(a) for a in equation.inputs),
                tuple(number[out] for out in equation.outputs),
                _wide_params(equation),
            )
        )
    free = (*inputs, *knowns)
    key = (
        tuple((program.shape(a), np.dtype(program.dtype(a)).str) for a in inputs),
        tuple(str(program.dtype(a)) + str(program.shape(a)) for a in free[len(inputs) :]),
        tuple(
            (e.primitive, tuple(map(canonical, e.inputs)), e.outputs, canonical(e.params))
            for e in local
        ),
        number[output],
    )
    types = {program.dtype(a) for a in (*free, *inside)}
    narrow = any(widened(dtype) != dtype for dtype in types)
    function = Function(tuple(local), number[output], narrow, key)
    rows: tuple[tuple[int, int], ...] = ()
    elementwise = False
    if len(inputs) == 1:
        same = program.shape(inputs[0]) == program.shape(output)
        elementwise = same and all(
            e.primitive in ELEMENTWISE
            and all(program.shape(a) == program.shape(output) for a in e.inputs
                    if isinstance(a, int) and (a in inside or a == inputs[0]))
            for e in equations
        )  # fmt: skip
        rows = independent_axes(program, equations, inputs[0], output)
    return Excerpt(function, tuple(inputs), tuple(knowns), elementwise, rows)


def single(program: Program, equation: Equation, output: int) -> Excerpt:
    """One operation as a function of all its operands that depend on parameters."""
    inputs = tuple(
        dict.fromkeys(a for a in equation.inputs if isinstance(a, int) and program.is_variable(a))
    )
    piece = cut(program, (equation,), inputs, output)
    shapes = [program.shape(var) for var in inputs]
    rows = operation_axes(equation.primitive, equation.params, shapes, program.shape(output))
    return replace(piece, rows=rows)
