"""Linear operations: sums of wires, and sums over segments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.options import Exactness
from pjax.program import scatter_add
from pjax.projections import linear
from pjax.projections.piecewise import PiecewiseLinear, piecewise
from pjax.rules.base import Rule


@dataclass(frozen=True)
class Term:
    """One operand of a sum: `scale · Π factors · x`, summed over `axes` (of the slot's shape).

    **Attributes:**

    - `scale`: a static number.
    - `factors`: for each known factor, whether it divides, and whether it has the shape of the sum
        (so that `axes` are to be inserted) rather than that of the slot.
    - `axes`: the axes that are summed.
    """

    scale: float = 1.0
    factors: tuple[tuple[bool, bool], ...] = ()
    axes: tuple[int, ...] = ()

    def coefficient(self, values: Sequence[Array]) -> Any:
        product: Any = self.scale
        for (divides, summed), value in zip(self.factors, values, strict=True):
            if summed and jnp.ndim(value):
                value = jnp.expand_dims(value, self.axes)
            product = product / value if divides else product * value
        return product


@dataclass(frozen=True)
class Affine(Rule):
    """`y = f(Σ c x + const)` with `f` piecewise linear, or the identity (`function=None`)."""

    exactness: ClassVar[Exactness] = "exact"

    terms: tuple[Term, ...]
    function: PiecewiseLinear | None = None
    name: str = "affine"

    @property
    def accepts_unmoved(self) -> bool:
        return self.function is not None and self.terms == (Term(),)

    def _coefficients(self, knowns: Sequence[Any]) -> tuple[Any, ...]:
        values = iter(knowns)
        return tuple(term.coefficient([next(values) for _ in term.factors]) for term in self.terms)

    def project(self, reference, states, weights, target, target_weight):
        coefficients = self._coefficients(reference.knowns)
        axes = tuple(term.axes for term in self.terms)
        if self.function is None:
            return linear.affine(states, coefficients, axes, weights, target, target_weight)
        if self.accepts_unmoved:
            moved, output = piecewise(
                self.function, reference.inner, reference.output, states[0], weights[0],
                target, target_weight, reference.geometry.exponent,
            )  # fmt: skip
            return (moved,), output
        inner = linear.forward(states, coefficients, axes)
        shapes = [state.shape for state in states]
        weight = linear.scalar_weight(coefficients, axes, weights, inner.shape, shapes)
        moved, output = piecewise(
            self.function, reference.inner, reference.output, inner, weight, target, target_weight,
            reference.geometry.exponent,
        )  # fmt: skip
        return linear.distribute(states, coefficients, axes, weights, moved - inner), output

    def gains(self, reference, wanted, vectors):
        slope = 1.0
        if self.function is not None:
            slope = max(abs(piece.slope) for piece in self.function.pieces)
        bounds = []
        coefficients = self._coefficients(reference.knowns)
        for term, c, value in zip(self.terms, coefficients, reference.inputs, strict=True):
            summed = math.prod(value.shape[axis] for axis in term.axes)
            largest = c**2 if np.ndim(c) == 0 else jnp.max(jnp.square(c))
            bounds.append(slope**2 * largest * summed)
        return tuple(bounds)


@dataclass(frozen=True)
class ScatterAdd(Rule):
    """`y = x + Σ u`, with each entry of the updates `u` added to the entry of `y` that a known
    index names.

    Each entry of an operand is read by one entry of `y` at most, so of `y = A (x, u)` the matrix
    `A Aᵀ` is diagonal: with `D = A (1/ρ)` and `e = W (z − A s)/(1 + W D)` the nearest point of `s`
    is `s + Aᵀe/ρ`.

    **Attributes:**

    - `moves`: whether `x` and `u` are slots; what is data does not deviate.
    - `shapes`: of both.
    - `key`, `params`: the primitive's parameters; first in a hashable form.
    """

    exactness: ClassVar[Exactness] = "exact"

    moves: tuple[bool, bool]
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    key: Any
    params: Mapping[str, Any] = field(compare=False)
    name: str = "scatter-add"

    def _sum(self, indices: Array, slots: Sequence[Any], dtype: Any) -> Array:
        """`A s`; a number stands for an array of it."""
        given = iter(slots)
        x, updates = (
            jnp.broadcast_to(jnp.asarray(next(given) if moves else 0, dtype), shape)
            for moves, shape in zip(self.moves, self.shapes, strict=True)
        )
        return scatter_add(x, indices, updates, self.params)

    def project(self, reference, states, weights, target, target_weight):
        (indices,), dtype = reference.knowns, target.dtype

        def apply(*slots: Any) -> Array:
            return self._sum(indices, slots, dtype)

        value = apply(*states)
        gain = apply(*(1 / jnp.asarray(weight, dtype) for weight in weights))
        target_weight = jnp.asarray(target_weight, dtype)
        force = target_weight * (target - value) / (1 + target_weight * gain)
        structs = [jax.ShapeDtypeStruct(state.shape, dtype) for state in states]
        pulled = jax.linear_transpose(apply, *structs)(force)
        moved = tuple(
            state + pull / jnp.asarray(weight, dtype)
            for state, pull, weight in zip(states, pulled, weights, strict=True)
        )
        return moved, value + gain * force

    def gains(self, reference, wanted, vectors):
        (indices,), count = reference.knowns, len(wanted)
        bounds: list[Any] = [0.0] * count
        for place in range(count):
            if wanted[place]:
                ones = [float(i == place) for i in range(count)]
                bounds[place] = jnp.max(self._sum(indices, ones, reference.output.dtype))
        return tuple(bounds)
