"""Sums of multiples, as `add`, `sub`, `neg` and products with known numbers make them.

`0.5 * x - mask * y.sum(0)` is `½ x` and `−mask · Σ y`: two terms of one node.
"""

from __future__ import annotations

from dataclasses import dataclass

from pjax.backend import compat
from pjax.backend.compat import P
from pjax.program import ADDITIONS, Atom, Equation, Program


@dataclass(frozen=True)
class SumTerm:
    """`scale · Π factors · variable`, summed over `axes`.

    A factor is `(atom, divides, has the sum's shape)`.
    """

    variable: int
    scale: float = 1.0
    factors: tuple[tuple[Atom, bool, bool], ...] = ()
    axes: tuple[int, ...] = ()

    def scaled(self, number: float) -> SumTerm:
        return SumTerm(self.variable, self.scale * number, self.factors, self.axes)

    def times(self, atom: Atom, divides: bool) -> SumTerm:
        # A factor met before the reduction (walking from the result) has the shape of the sum.
        factor = (atom, divides, False)
        return SumTerm(self.variable, self.scale, (*self.factors, factor), self.axes)

    def reduced(self, axes: tuple[int, ...]) -> SumTerm:
        factors = tuple((atom, divides, True) for atom, divides, _ in self.factors)
        return SumTerm(self.variable, self.scale, factors, axes)

    def of(self, variable: int) -> SumTerm:
        return SumTerm(variable, self.scale, self.factors, self.axes)


_SUMS = ADDITIONS | compat.find_primitives("sub", "neg", "mul", "div", "reduce_sum")


def sum_step(program: Program, equation: Equation, outer: SumTerm) -> list[SumTerm] | None:
    """`outer`'s variable as a sum of what its equation reads; None if it is none.

    Known addends are dropped: they are in the reference, and deviations do not see them.
    """
    primitive, inputs = equation.primitive, equation.inputs
    out = program.dtype(equation.outputs[0])
    if primitive not in _SUMS or any(program.dtype(atom) != out for atom in inputs):
        return None
    variable = [program.is_variable(atom) for atom in inputs]
    if primitive in ADDITIONS:
        return [outer.of(a) for a in inputs if program.is_variable(a)]  # pyright: ignore
    if primitive is P.sub_p:
        signs = (1.0, -1.0)
        return [
            outer.of(a).scaled(sign)  # pyright: ignore
            for a, sign in zip(inputs, signs, strict=True)
            if program.is_variable(a)
        ]
    if primitive is P.neg_p:
        return [outer.of(inputs[0]).scaled(-1.0)]  # pyright: ignore
    if primitive is P.reduce_sum_p:
        if outer.axes:
            return None
        axes = tuple(map(int, equation.params["axes"]))
        return [outer.of(inputs[0]).reduced(axes)]  # pyright: ignore
    if primitive in (P.mul_p, P.div_p) and sum(variable) == 1:
        operand, factor = inputs if variable[0] else inputs[::-1]
        divides = primitive is P.div_p
        if divides and not variable[0]:
            return None
        term = outer.of(operand)  # pyright: ignore
        number = program.uniform_value(factor)
        if number is None:
            return [term.times(factor, divides)]
        if divides and number == 0:
            return None
        return [term.scaled(1.0 / float(number) if divides else float(number))]
    return None
