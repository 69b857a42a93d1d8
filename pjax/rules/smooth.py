"""Rules for functions without a closed form: smooth scalar functions, functions of rows, and any
operation that the user allows by `fallback="gauss-newton"`.

Each has two: a search for the nearest point, for neuron splitting, and one step of the linearised
constraint (`…Step`), for layer splitting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pjax.backend import device
from pjax.options import Exactness
from pjax.patterns import Function
from pjax.projections import layer, normalization, numeric, scaling
from pjax.projections.gains import PowerIteration
from pjax.projections.normalization import NormalForm
from pjax.projections.numeric import Rows
from pjax.rules.base import Reference, Rule


@dataclass(frozen=True)
class _Numeric(Rule):
    """A node by its function alone."""

    exactness: ClassVar[Exactness] = "inexact"

    function: Function
    name: str = "function"

    def _call(self, reference: Reference) -> Any:
        return lambda *inputs: self.function(inputs, reference.knowns)

    def _value(self, reference: Reference) -> Array:
        """`φ` at the reference, as its points are computed: without the rounding of bfloat16."""
        if self.function.narrow:
            return self._call(reference)(*reference.inputs)
        return reference.output


@dataclass(frozen=True)
class ScalarFunction(_Numeric):
    """`y_i = φ_i(x_i)`, a chain of elementwise operations: the nearest point is looked for in the
    whole interval that can hold it.
    """

    def project(self, reference, states, weights, target, target_weight):
        (state,), (weight,) = states, weights
        moved, output = numeric.scalar(
            self._call(reference), reference.inputs[0], self._value(reference), state, weight,
            target, target_weight,
        )  # fmt: skip
        return (moved,), output

    def _slope(self, reference: Reference, point: Array) -> Array:
        _, slope = jax.jvp(self._call(reference), (point,), (jnp.ones_like(point),))
        return jnp.where(jnp.isfinite(slope), slope, 0)

    def gains(self, reference, wanted, vectors):
        return (jnp.max(jnp.square(self._slope(reference, reference.inputs[0]))),)


@dataclass(frozen=True)
class ArrayFunction(_Numeric):
    """`y = φ(x_1, …)` of rows or of whole arrays (softmax, norms, and what has no rule): damped
    Gauss-Newton steps, each row by itself.
    """

    rows: Rows = Rows((), ())  # noqa: RUF009 - immutable

    def project(self, reference, states, weights, target, target_weight):
        return numeric.gauss_newton(
            self._call(reference), self.rows, reference.inputs, self._value(reference), states,
            weights, target, target_weight,
        )  # fmt: skip

    def gains(self, reference, wanted, vectors):
        call = self._call(reference)
        return tuple(
            self._gain(call, reference.inputs, place, vector) if want else 0.0
            for place, (want, vector) in enumerate(zip(wanted, vectors, strict=True))
        )

    def _gain(self, call: Any, inputs: Sequence[Array], place: int, vector: Any) -> PowerIteration:
        """`|J|²` over all rows, by the power iteration in each."""
        apply, transpose = _linear(call, inputs, place)
        value, kept = inputs[place], self.rows.inputs[place]
        axes = tuple(axis for axis in range(value.ndim) if axis not in kept)

        def response(x: Array) -> Array:
            return transpose(apply(x))

        return PowerIteration(response, (), value.shape, value.dtype, axes, vector)


@dataclass(frozen=True)
class Normalization(ArrayFunction):
    """`y = a (x − mean(x)) / (κ Σ(x − mean(x))² + ε)^½` of each group of entries, or without the
    mean (layer, batch, group and RMS norms, and division by a length): the nearest point, by a
    search for one number for each group. As an `ArrayFunction` where the weights within a group
    differ.
    """

    form: NormalForm = field(kw_only=True)

    def project(self, reference, states, weights, target, target_weight):
        (operand,), (state,), (weight,) = reference.inputs, states, weights
        if not self.form.fits((weight, operand.shape), (target_weight, target.shape)):
            return super().project(reference, states, weights, target, target_weight)
        moved, output = normalization.project(
            self.form, operand, state, weight, target, target_weight
        )
        return (moved,), output

    def gains(self, reference, wanted, vectors):
        return (normalization.largest_gain(self.form, reference.inputs[0]),)


class _Step(_Numeric):
    """One Gauss-Newton step of the linearised constraint, for layer splitting."""

    @property
    def accepts_unmoved(self) -> bool:
        return True

    def _point(self, reference: Reference, states: Sequence[Any]) -> list[Array]:
        """The values that the operands have now; None has not moved."""
        exponent = reference.geometry.exponent
        return [
            value if state is None else value + scaling.from_unit(state, exponent)
            for value, state in zip(reference.inputs, states, strict=True)
        ]

    def _linear_step(
        self,
        reference: Reference,
        states: Sequence[Any],
        parts: Sequence[layer.Part],
        target: Array,
        target_weight: Any,
    ) -> tuple[tuple[Array, ...], Array]:
        """One Gauss-Newton step from where the operands are; shortened if it does not decrease."""
        geometry = reference.geometry
        starts = [
            jnp.zeros_like(value) if state is None else state
            for value, state in zip(reference.inputs, states, strict=True)
        ]

        noise: Any = 0.0
        if self.function.noisy:
            call, at = self._call(reference), reference.inputs
            noise = numeric.noise_of(call, at, self._value(reference))

        def rise(points: Sequence[Array]) -> Array:
            return numeric.difference(
                self._call(reference), reference.inputs, self._value(reference), points,
                geometry.exponent, noise,
            )  # fmt: skip

        unmoved = all(state is None for state in states)
        height = jnp.zeros_like(target) if unmoved else rise(starts)
        weight = jnp.asarray(target_weight, target.dtype)
        moves, change, _ = layer.solve(parts, target - height, weight, geometry.iterations)

        def ahead(length: Any) -> list[Array]:
            return [s + length * m for s, m in zip(starts, moves, strict=True)]

        value = self._value(reference)
        call = self._call(reference)

        def off(length: Any) -> Array:
            """How far the rise is off the linear one; 0 where that is less than its rounding."""
            point = self._point(reference, ahead(length))
            unit = geometry.exponent
            there = call(*point)
            linear = scaling.from_unit(height + length * change, unit)
            curved = (there - value) - linear
            size = jnp.abs(value) + jnp.abs(there)
            rounding = 16 * jnp.finfo(value.dtype).eps * size + noise
            return jnp.where(jnp.abs(curved) <= rounding, 0, scaling.to_unit(curved, unit))

        # In units of the request, whose square might underflow.
        size = jnp.max(jnp.abs(target - height))
        size = jnp.where(size > 0, size, 1)
        before = jnp.sum(weight * jnp.square((target - height) / size))
        energy = sum(
            (jnp.sum(p.weight * jnp.square(m / size)) for p, m in zip(parts, moves, strict=True)),
            start=jnp.zeros((), target.dtype),
        )
        # A stiff step gains less than what the sums are rounded by.
        rounding = 1e2 * jnp.finfo(target.dtype).eps * before

        def costs(length: Array) -> Array:
            """What is left of the request, by rows."""
            left = height + length * change + off(length) - target
            return jnp.sum(jnp.atleast_1d(weight * jnp.square(left / size)), axis=-1)

        points = ahead(_longest(costs, energy, before + rounding))
        # Apart from the loop, so that nothing is computed where nobody reads the output.
        return tuple(points), rise(points)


#: The share of a step that is tried after one that is too long, and how many are tried.
_SHORTER, _TRIALS = 0.25, 7


def _longest(costs: Callable[[Array], Array], energy: Array, most: Array) -> Array:
    """The first of the lengths `1, ¼, ¼², …` with `Σ costs + length² energy ≤ most`; 0 if none is.

    With several devices all are tried: rows are summed once, and not for each length.
    """
    if device.several():
        lengths = _SHORTER ** jnp.arange(_TRIALS, dtype=most.dtype)
        rows = jax.lax.map(costs, lengths)
        sums = jnp.sum(rows, axis=tuple(range(1, rows.ndim))) + lengths**2 * energy
        short = sums <= most
        return jnp.where(jnp.any(short), lengths[jnp.argmax(short)], 0)
    least = 2 * _SHORTER**_TRIALS

    def too_far(state: tuple[Array, Array]) -> Array:
        length, cost = state
        return ~(cost <= most) & (length > least)

    def shorter(state: tuple[Array, Array]) -> tuple[Array, Array]:
        length = _SHORTER * state[0]
        return length, jnp.sum(costs(length)) + length**2 * energy

    # The whole move is tried in the loop, too, so that there is one copy of its body.
    begin = (jnp.full((), 1 / _SHORTER, most.dtype), jnp.full((), jnp.inf, most.dtype))
    length, _ = jax.lax.while_loop(too_far, shorter, begin)
    return jnp.where(length > least, length, 0)


@dataclass(frozen=True)
class ScalarStep(_Step, ScalarFunction):
    """`y_i = φ_i(x_i)`, a chain of elementwise operations: one safeguarded Gauss-Newton step, as
    for every other part of a layer.
    """

    def project(self, reference, states, weights, target, target_weight):
        (weight,) = weights
        slope = self._slope(reference, self._point(reference, states)[0])

        def scaled(x: Array) -> Array:
            return slope * x

        # The response to a force is the slope's square for each entry: solved for as it is.
        part = layer.Part(scaled, scaled, weight, jnp.square(slope) / weight, curved=False)
        return self._linear_step(reference, states, [part], target, target_weight)


@dataclass(frozen=True)
class ArrayStep(_Step, ArrayFunction):
    """`y = φ(x_1, …)` of rows or of whole arrays (softmax, norms, and what has no rule): one
    safeguarded step of the linearised constraint.
    """

    def project(self, reference, states, weights, target, target_weight):
        geometry, call = reference.geometry, self._call(reference)
        point = self._point(reference, states)
        parts = [
            layer.Part(*_linear(call, point, place), weight, compliance, curved)
            for place, (weight, compliance, curved) in enumerate(
                zip(weights, geometry.compliances, geometry.curved, strict=True)
            )
        ]
        return self._linear_step(reference, states, parts, target, target_weight)


@dataclass(frozen=True)
class NormalizationStep(ArrayStep, Normalization):
    """`y = a (x − mean(x)) / (κ Σ(x − mean(x))² + ε)^½` of each group of entries, or without the
    mean (layer, batch, group and RMS norms, and division by a length): a safeguarded step in closed
    form. As an `ArrayStep` where the weights within a group differ.
    """

    def project(self, reference, states, weights, target, target_weight):
        (operand,), (state,), (weight,) = reference.inputs, states, weights
        if not self.form.fits((weight, operand.shape), (target_weight, target.shape)):
            return super().project(reference, states, weights, target, target_weight)
        moved, output = normalization.step(
            self.form, operand, state, weight, target, target_weight, reference.geometry.exponent
        )
        return (moved,), output


def _linear(call: Any, point: Sequence[Array], place: int) -> tuple[Any, Any]:
    """The derivative of `φ` in one operand at a point, and its transpose."""

    # Along all operands: a solution of a system is not linearised in some of its operands alone.
    _, push_all = jax.linearize(call, *point)

    def push(move: Array) -> Array:
        moves = [move if i == place else jnp.zeros_like(x) for i, x in enumerate(point)]
        return push_all(*moves)

    transpose = jax.linear_transpose(push, point[place])
    return push, lambda force: transpose(force)[0]
