"""Piecewise linear functions of one value, whatever operations they are written with.

Each of these is one function of `x`, with two or three pieces, and one node:

    jnp.maximum(x, 0.1 * x)                  # leaky_relu
    jnp.where(x > 0, x, 0.0) - 1
    jnp.clip(2 * x, -1, 1)                   # hard_tanh

Every operation that depends on one variable through comparisons, selections, maxima, sums and
scalings with static numbers is part of one. A node `y = f(Σ c x + const)` also takes the sum before
the function: `relu(x + b)` is one constraint, not two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pjax.backend.compat import P
from pjax.program import Atom, Equation, Program, Scalar, primitives
from pjax.projections.piecewise import RELU, Piece, PiecewiseLinear

_IDENTITY = PiecewiseLinear.identity()
_SIMPLE: dict[Any, Callable[..., PiecewiseLinear]] = {
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
class OfOneValue:
    """`variable = function(base)`, elementwise; any other variable is the identity of itself."""

    base: int
    function: PiecewiseLinear


def find_cones(
    program: Program, stop: frozenset[int], opaque: frozenset[int] = frozenset()
) -> dict[int, OfOneValue]:
    """Each variable as a piecewise linear function of its *base*, as far back as that is possible.

    A base is a variable that something other than such functions reads: a node has it as a value.
    In `abs(x) + relu(x)`, all of it is one function of `x`.

    **Arguments:**

    - `stop`: variables that are bases whatever reads them (what losses read, say).
    - `opaque`: variables whose operation has a rule of its own, so that they are bases.
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


def _grow(
    program: Program, materialised: set[int], opaque: frozenset[int]
) -> dict[int, OfOneValue]:
    cones = {
        number: OfOneValue(number, _IDENTITY)
        for number, leaf in enumerate(program.leaves)
        if leaf.trainable
    }

    def current(atom: Atom) -> OfOneValue | None:
        """What `atom` is to a reader: a materialised variable is its own base."""
        if isinstance(atom, int) and atom in materialised:
            return OfOneValue(atom, _IDENTITY)
        return cones[atom] if isinstance(atom, int) else None

    for equation in program.equations:
        for out in equation.outputs:
            if out in program.variable:
                cone = None if out in opaque else _compose(program, equation, current)
                cones[out] = cone or OfOneValue(out, _IDENTITY)
    return cones


def _compose(
    program: Program, equation: Equation, current: Callable[[Atom], OfOneValue | None]
) -> OfOneValue | None:
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
    return None if function is None else OfOneValue(base, function)


def _apply(
    program: Program, equation: Equation, functions: list[PiecewiseLinear]
) -> PiecewiseLinear | None:
    primitive = equation.primitive
    source, out = program.dtype(equation.inputs[0]), program.dtype(equation.outputs[0])
    if primitive is P.convert_element_type_p:
        # Of a condition or a whole number; or to the same type. Others are wiring, or round.
        is_whole = source == jnp.bool_ or jnp.issubdtype(source, jnp.signedinteger)
        return functions[0] if is_whole or source == out else None
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


def known_kink(program: Program, equation: Equation) -> tuple[int, Atom, PiecewiseLinear] | None:
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


def is_relu(function: PiecewiseLinear) -> bool:
    """Whether it is `max(a x + c, 0)` for some numbers: a relu of a scaled and shifted value."""
    zero = PiecewiseLinear.constant(0.0)
    return any(
        _line(piece).maximum(zero) == function for piece in function.pieces if piece.slope != 0
    )


def _line(piece: Piece) -> PiecewiseLinear:
    """The line that a piece is part of."""
    return _IDENTITY.scale(piece.slope).add(PiecewiseLinear.constant(piece.intercept))


#: `min(x, 0)`.
RELU_BELOW = _IDENTITY.minimum(PiecewiseLinear.constant(0.0))
