"""Chains of elementwise operations become one node each.

Two kinds of structure are found in a program, before any node is made:

- a *scalar cone*: every operation that depends on one variable through comparisons, selections,
  maxima, sums and scalings with static numbers is one piecewise linear function of that variable
  (`leaky_relu`, `hard_tanh`, `clip`, `abs`, a step written with `where`, ...);
- a *sum*: additions, subtractions, scalings by known factors and reductions, whose intermediate
  results nobody else reads, are one linear function `Σ c x` of several variables.

A node `y = f(Σ c x + const)` then takes both: `relu(x + b)` is one constraint, not two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pjax import _compat, primitives
from pjax._compat import P
from pjax.projections.piecewise import RELU, Piece, PiecewiseLinear
from pjax.trace import Atom, Equation, Program, Scalar

Function = PiecewiseLinear
_IDENTITY = PiecewiseLinear.identity()

_SIMPLE: dict[Any, Callable[..., Function]] = {
    P.add_p: lambda f, g: f.add(g),
    P.sub_p: lambda f, g: f.subtract(g),
    P.mul_p: lambda f, g: f.multiply(g),
    P.neg_p: lambda f: f.negate(),
    P.max_p: lambda f, g: f.maximum(g),
    P.min_p: lambda f, g: f.minimum(g),
    P.abs_p: lambda f: f.absolute(),
    P.sign_p: lambda f: f.sign(),
    P.gt_p: lambda f, g: f.compare(">", g),
    P.ge_p: lambda f, g: f.compare(">=", g),
    P.lt_p: lambda f, g: f.compare("<", g),
    P.le_p: lambda f, g: f.compare("<=", g),
    P.eq_p: lambda f, g: f.compare("==", g),
    P.ne_p: lambda f, g: f.compare("!=", g),
    P.and_p: lambda f, g: f.multiply(g),
    P.or_p: lambda f, g: f.maximum(g),
    P.not_p: lambda f: PiecewiseLinear.constant(1.0).subtract(f),
    primitives.step_p: lambda f: f.compare(">", PiecewiseLinear.constant(0.0)),
}


@dataclass(frozen=True)
class Cone:
    """`variable = function(base)`, elementwise; a variable that is no cone is its own base."""

    base: int
    function: Function


def find_cones(
    program: Program, stop: frozenset[int], opaque: frozenset[int] = frozenset()
) -> dict[int, Cone]:
    """The largest cones, with every variable that something else reads the base of what follows it.

    A variable that only cones read is no value of its own: each of them computes it from its base.

    **Arguments:**

    - `stop`: variables that must be values of their own (what losses read, say).
    - `opaque`: variables whose operation has a rule of its own, and joins no cone.
    """
    materialised = set(stop)
    while True:
        cones = _grow(program, materialised, opaque)
        read: set[int] = set()
        for equation in program.equations:
            if any(out in cones and cones[out].base == out for out in equation.outputs):
                read.update(a for a in equation.inputs if isinstance(a, int) and a in cones)
        new = {var for var in read if cones[var].base != var} - materialised
        if not new:
            return cones
        materialised |= new


def _grow(program: Program, materialised: set[int], opaque: frozenset[int]) -> dict[int, Cone]:
    cones = {
        number: Cone(number, _IDENTITY)
        for number, leaf in enumerate(program.leaves)
        if leaf.trainable
    }

    def current(atom: Atom) -> Cone | None:
        """What `atom` is to a reader: a materialised variable is its own base."""
        if isinstance(atom, int) and atom in materialised:
            return Cone(atom, _IDENTITY)
        return cones[atom] if isinstance(atom, int) else None

    for equation in program.equations:
        for out in equation.outputs:
            if out in program.variable:
                cone = None if out in opaque else _compose(program, equation, current)
                cones[out] = cone or Cone(out, _IDENTITY)
    return cones


def _compose(
    program: Program, equation: Equation, current: Callable[[Atom], Cone | None]
) -> Cone | None:
    if len(equation.outputs) != 1:
        return None
    base: int | None = None
    functions = []
    for atom in equation.inputs:
        if program.is_variable(atom):
            cone = current(atom)
            assert cone is not None
            if base is not None and cone.base != base:
                return None
            base = cone.base
            functions.append(cone.function)
        else:
            value = program.uniform_value(atom)
            if value is None:
                return None
            functions.append(PiecewiseLinear.constant(float(value)))
    if base is None or program.shape(base) != program.shape(equation.outputs[0]):
        return None
    function = _apply(program, equation, functions)
    return None if function is None else Cone(base, function)


def _apply(program: Program, equation: Equation, functions: list[Function]) -> Function | None:
    primitive = equation.primitive
    source, out = program.dtype(equation.inputs[0]), program.dtype(equation.outputs[0])
    if primitive is P.convert_element_type_p:
        # Of a condition or a whole number; or to the same type. Others are wiring, or round.
        whole = source == jnp.bool_ or jnp.issubdtype(source, jnp.signedinteger)
        return functions[0] if whole or source == out else None
    if not (source == out or jnp.bool_ in (source, out)):
        return None
    try:
        if primitive is P.div_p and jnp.issubdtype(out, jnp.floating):
            divisor = program.uniform_value(equation.inputs[1])
            return functions[0].scale(1.0 / float(divisor)) if divisor else None
        if primitive is P.select_n_p:
            condition, if_false, if_true = functions
            return condition.where(if_false, if_true) if source == jnp.bool_ else None
        operation = _SIMPLE.get(primitive)
        return None if operation is None else operation(*functions)
    except ValueError:  # a product of two functions that both vary: not piecewise linear
        return None


# --- Sums ----------------------------------------------------------------------------------------


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


_ADD = _compat.find_primitives("add", "add_jaxvals")
_SUMS = _ADD | _compat.find_primitives("sub", "neg", "mul", "div", "reduce_sum")


def sum_step(program: Program, equation: Equation, outer: SumTerm) -> list[SumTerm] | None:
    """`outer`'s variable as a sum of what its equation reads; None if it is none.

    Known addends are dropped: they are in the reference, and deviations do not see them.
    """
    primitive, inputs = equation.primitive, equation.inputs
    out = program.dtype(equation.outputs[0])
    if primitive not in _SUMS or any(program.dtype(atom) != out for atom in inputs):
        return None
    variable = [program.is_variable(atom) for atom in inputs]
    if primitive in _ADD:
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


def known_kink(program: Program, equation: Equation) -> tuple[int, Atom, Function] | None:
    """`max(x, c)` and `min(x, c)` with a known array `c`: `(x, c, f)` with `y = f(x − c) + c`."""
    if equation.primitive not in (P.max_p, P.min_p):
        return None
    left, right = equation.inputs
    if program.is_variable(left) == program.is_variable(right):
        return None
    variable, known = (left, right) if program.is_variable(left) else (right, left)
    if isinstance(variable, Scalar):
        return None
    function = RELU if equation.primitive is P.max_p else RELU_BELOW
    return variable, known, function


def is_relu(function: Function) -> bool:
    """Whether it is `max(a x + c, 0)` for some numbers: a relu of a scaled and shifted value."""
    zero = PiecewiseLinear.constant(0.0)
    return any(
        _line(piece).maximum(zero) == function for piece in function.pieces if piece.slope != 0
    )


def _line(piece: Piece) -> Function:
    """The line that a piece is part of."""
    return _IDENTITY.scale(piece.slope).add(PiecewiseLinear.constant(piece.intercept))


#: `min(x, 0)`.
RELU_BELOW = _IDENTITY.minimum(PiecewiseLinear.constant(0.0))
