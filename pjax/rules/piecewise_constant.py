"""Thresholds and quantizers: `sign`, `step`, `round`, `pjax.quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from pjax.options import Exactness
from pjax.projections import quantize as quantizer
from pjax.projections import scaling, threshold
from pjax.projections.piecewise import PiecewiseLinear
from pjax.rules.affine import Affine, Term
from pjax.rules.base import Rule
from pjax.rules.margins import SIGN, SignedNumber


@dataclass(frozen=True)
class Quantizer(Rule):
    """`quantize` with equally spaced levels, or `round` (`levels=None`)."""

    exactness: ClassVar[Exactness] = "exact"

    levels: int | None
    low: float = 0.0
    high: float = 1.0
    name: str = "quantize"

    def project(self, reference, states, weights, target, target_weight):
        exponent = reference.geometry.exponent
        moved, output = quantizer.quantize(
            self.levels, self.low, self.high, reference.inputs[0], reference.output,
            scaling.from_unit(states[0], exponent), weights[0],
            scaling.from_unit(target, exponent), target_weight,
        )  # fmt: skip
        return (scaling.to_unit(moved, exponent),), scaling.to_unit(output, exponent)


#: In mean distances of the operand to its nearest threshold. Measured on MNIST, 4x128 signs, 390
#: batches: .963; with ½ .957, and with other weights inside of it, such as the distance to a
#: margin, .89 to .95.
_REACH = 0.75
#: So many times the mean request counts fully. Measured on MNIST 784-128(sign)-10 after 390
#: batches: .966; with 3 instead .89.
_CERTAIN = 10.0
#: A weight that is this many mean distances past its threshold is on the asked side for good: it is
#: not moved any farther from it.
_FARTHEST = 4.0


@dataclass(frozen=True)
class Threshold(Rule):
    """`y = f(x)` with `f` piecewise constant, whose operand is moved over its nearest threshold;
    the output stays.

    Let `s` be what `x` is above its nearest threshold, `j` the jump of `f` there, `S = mean|s|`. A
    request `g` asks for the side of the threshold where `f` lies in the direction of `g`, which is
    the direction `d = sign(g j)` for `x`. With `W/(ρ + W)` of it an activation moves by

        d mean|g| θ,  θ = min(1, |g|/(10 mean|g|)) if |s| ≤ ¾ S, else 0:

    the opinion `θ` is none where the threshold is out of reach. Only the directions matter: the
    layer before gives the move its size. A function of parameters alone moves by

        d |g| · 4S/|j|,  0 where d s > 4S,

    wherever the threshold is: parameters are carried from batch to batch, so what is asked adds up
    until they cross. Of entries whose distances are evenly spread, such moves change as many that
    `y` moves by `g` in the mean. Nothing depends on the scale of the operand.

    The rule is *relaxed*: it moves towards the asked side, and not to the nearest point of it or of
    the graph of `f`; no convergence is claimed.

    **Attributes:**

    - `function`: with at least two pieces or levels.
    - `of_weights`: whether the operand depends on parameters only.
    """

    exactness: ClassVar[Exactness] = "relaxed"

    function: PiecewiseLinear | Quantizer
    name: str = "sign"
    of_weights: bool = False

    def project(self, reference, states, weights, target, target_weight):
        (state,), (weight,), (value,) = states, weights, reference.inputs
        nearest = self.nearest(value + scaling.from_unit(state, reference.geometry.exponent))
        spread = threshold.spread(nearest)
        share = target_weight / (weight + target_weight)
        if self.of_weights:
            direction = jnp.sign(target) * jnp.sign(nearest.jump)
            inside = direction * nearest.offset <= _FARTHEST * spread
            move = share * target * (4 * spread / nearest.jump) * inside
        else:
            reachable = jnp.abs(nearest.offset) <= _REACH * spread
            opinion = jnp.minimum(threshold.loudness(target) / _CERTAIN, 1) * reachable
            largest = jnp.max(jnp.abs(target))
            size = largest * jnp.mean(jnp.abs(target) / jnp.where(largest > 0, largest, 1))
            move = share * size * opinion * jnp.sign(target) * jnp.sign(nearest.jump)
        return (state + move.astype(state.dtype),), jnp.zeros_like(target)

    def nearest(self, value: Array) -> threshold.Nearest:
        """The nearest threshold of each entry."""
        function = self.function
        if isinstance(function, PiecewiseLinear):
            return threshold.nearest_of_pieces(function, value)
        low, spacing = 0.0, 1.0
        if function.levels is not None:
            low, spacing = function.low, (function.high - function.low) / (function.levels - 1)
        return threshold.nearest_of_levels(function.levels, low, spacing, value)


def as_threshold(rule: Rule, of_weights: bool = False) -> Rule:
    """What layer splitting makes of a rule: a [`Threshold`][] of a piecewise constant one.

    **Arguments:**

    - `rule`: of a node.
    - `of_weights`: whether the node depends on parameters only.
    """
    if isinstance(rule, Quantizer):
        return Threshold(rule, rule.name, of_weights)
    if isinstance(rule, SignedNumber):
        return Threshold(SIGN, rule.name, of_weights)
    if isinstance(rule, Affine) and rule.function is not None and rule.terms == (Term(),):
        pieces = rule.function.pieces
        if len(pieces) > 1 and all(piece.slope == 0 for piece in pieces):
            return Threshold(rule.function, rule.name, of_weights)
    return rule
