"""The table of rules: which primitive is projected by which rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pjax.backend.compat import P
from pjax.program import REGISTRATIONS, Equation, Program, canonical, primitives
from pjax.rules.affine import Affine, ScatterAdd, Term
from pjax.rules.base import Builder, NodeSpec
from pjax.rules.extrema import Extremum
from pjax.rules.losses import CrossEntropy, Loss, Margin, SquaredError
from pjax.rules.margins import SignedNumber
from pjax.rules.membership import Membership
from pjax.rules.piecewise_constant import Quantizer
from pjax.rules.products import (
    BILINEAR,
    NeuronBilinear,
    PinnedBilinear,
    bilinear_name,
    bilinear_operands,
)

_BUILDERS: dict[Any, Builder] = {}


def find_builder(primitive: Any) -> Builder | None:
    """How a node of this primitive is made, or None if it has no rule."""
    return _BUILDERS.get(primitive)


def add_rule(primitive: Any, builder: Builder) -> None:
    """Gives `primitive` a user's rule, which from now on goes before every rule of the library."""
    _BUILDERS[primitive] = builder
    REGISTRATIONS[primitive] += 1


def _builder(*found: Any) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(found, builder))
        return builder

    return register


@_builder(*BILINEAR)
def _bilinear(program: Program, equation: Equation) -> NodeSpec:
    left, right = equation.inputs
    operation, free = bilinear_operands(program, equation)
    name = bilinear_name(equation)
    if not free[0]:
        return NodeSpec(PinnedBilinear(operation, "left", name), (right,), (left,))
    if not free[1]:
        return NodeSpec(PinnedBilinear(operation, "right", name), (left,), (right,))
    return NodeSpec(NeuronBilinear(operation, name), (left, right))


@_builder(P.max_p, P.min_p)
def _maximum(program: Program, equation: Equation) -> NodeSpec:
    sign = 1 if equation.primitive is P.max_p else -1
    return NodeSpec(Extremum(None, sign, "max" if sign == 1 else "min"), equation.inputs)


@_builder(P.reduce_max_p, P.reduce_min_p)
def _reduce_max(program: Program, equation: Equation) -> NodeSpec:
    sign = 1 if equation.primitive is P.reduce_max_p else -1
    rule = Extremum(tuple(map(int, equation.params["axes"])), sign, equation.name)
    return NodeSpec(rule, equation.inputs)


@_builder(P.scatter_add_p)
def _scatter_add(program: Program, equation: Equation) -> NodeSpec:
    x, indices, updates = equation.inputs
    moves = program.is_variable(x), program.is_variable(updates)
    shapes = program.shape(x), program.shape(updates)
    params = dict(equation.params)
    rule = ScatterAdd(moves, shapes, canonical(params), params)
    slots = tuple(a for a, moving in zip((x, updates), moves, strict=True) if moving)
    return NodeSpec(rule, slots, (indices,))


@_builder(P.round_p)
def _round(program: Program, equation: Equation) -> NodeSpec:
    return NodeSpec(Quantizer(None, name="round"), equation.inputs)


@_builder(primitives.quantize_p)
def _quantize(program: Program, equation: Equation) -> NodeSpec:
    return NodeSpec(Quantizer(**equation.params), equation.inputs)


@_builder(primitives.threshold_p)
def _threshold(program: Program, equation: Equation) -> NodeSpec:
    return NodeSpec(SignedNumber(equation.params["margin"]), equation.inputs)


@_builder(primitives.constrain_p)
def _constrain(program: Program, equation: Equation) -> NodeSpec:
    x, *numbers = equation.inputs
    return NodeSpec(Membership(**equation.params), (x,), tuple(numbers))


@_builder(primitives.identity_p)
def _identity(program: Program, equation: Equation) -> NodeSpec:
    return NodeSpec(IDENTITY, equation.inputs)


#: `y = x`: the mean of the slot and its readers. Also what the bipartition inserts.
IDENTITY = Affine((Term(),), name="identity")


def _loss(make: Callable[..., Loss]) -> Builder:
    """The builder of a loss; the parameters of its primitive are those of the rule."""

    def builder(program: Program, equation: Equation) -> NodeSpec:
        prediction, labels = equation.inputs
        return NodeSpec(make(**equation.params), (prediction,), (labels,))

    return builder


_BUILDERS |= {
    primitives.cross_entropy_p: _loss(CrossEntropy),
    primitives.margin_loss_p: _loss(Margin),
    primitives.squared_error_p: _loss(SquaredError),
}
