"""Which primitive uses which projection: rules, and their registration.

A [`Rule`][] is the specification of a node: everything that the projection needs and that does not
depend on data. It is hashable, and equal nodes share one. Its mathematics is in
`pjax.projections`; a rule only hands over references, deviations, weights and targets.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jaxtyping import Array

from pjax import _compat, primitives
from pjax._compat import P
from pjax.projections import bilinear, extrema, linear, losses, scaling
from pjax.projections import quantize as quantizer
from pjax.projections.bilinear import Bilinear, DotGeneral, Multiply, Side
from pjax.projections.convolution import Convolution
from pjax.projections.piecewise import PiecewiseLinear, piecewise
from pjax.scatters import scatter_add
from pjax.slots import Compact, Dense, Lifted, Storage, Structured
from pjax.trace import REGISTRATIONS, Atom, Equation, Program, canonical, widened

Exactness = Literal["exact", "inexact", "relaxed"]


class Geometry(NamedTuple):
    """The metric at one node, beyond the weights.

    **Attributes:**

    - `exponent`: deviations, targets and results of the node are in a unit of `2**−exponent`.
    - `compliances`: for each slot of a layer a bound on how much the output moves with it, squared,
        over the slot's weight.
    - `curved`: for each slot whether its response is solved for, or only bounded.
    - `iterations`: conjugate gradient steps for that.
    """

    exponent: Any = 0
    compliances: tuple[Any, ...] = ()
    curved: tuple[bool, ...] = ()
    iterations: int = 0


class Reference(NamedTuple):
    """The forward pass at one node.

    **Attributes:**

    - `inputs`: the value of each slot.
    - `knowns`: the values of the operands that are data.
    - `output`: the node's output (None for a loss).
    - `inner`: for a piecewise linear node, the argument `u` of its function.
    - `geometry`: the unit of deviations, and what layer splitting needs to know of the metric.
    - `entries`: for each slot an array that has the same entries, perhaps fewer times each: what it
        is broadcast from. Empty for the inputs themselves.
    - `force`: of a layer, the multiplier of its projection, where that is known.
    """

    inputs: tuple[Array, ...]
    knowns: tuple[Any, ...]
    output: Any
    inner: Any = None
    geometry: Geometry = Geometry()
    entries: tuple[Array, ...] = ()
    force: Any = None


class Force(NamedTuple):
    """What a rule may return for a slot that had not moved: its move times its weight.

    Where the weight is the unit of the slot's deviations that is what the state keeps, and nothing
    is divided.
    """

    value: Array


class Rule(ABC):
    """The projection of one kind of node, and the specification of one node."""

    #: *exact*: the nearest point, proved by an oracle; *inexact*: decreases the objective, optimum
    #: when converged; *relaxed*: a documented heuristic.
    exactness: Exactness
    #: What a table or a drawing calls the node.
    name: str = ""

    @property
    def accepts_rest(self) -> bool:
        """Whether `project` takes None for the state of a slot that has not moved."""
        return False

    def storages(self, reflecting: bool, shared: Sequence[bool]) -> tuple[Storage, ...]:
        """How the solver keeps each slot.

        **Arguments:**

        - `reflecting`: whether the solver reflects, so that copies may differ between steps.
        - `shared`: for each slot whether several groups write to it, each its own entries.
        """
        return (Dense(),) * len(shared)

    @abstractmethod
    def project(
        self,
        reference: Reference,
        states: tuple[Any, ...],
        weights: tuple[Any, ...],
        target: Any,
        target_weight: Any,
    ) -> tuple[tuple[Any, ...], Any]:
        """The nearest point of `{(x, y): y = f(x)}`.

        **Arguments:**

        - `reference`: the forward pass.
        - `states`: the slots' deviations, in the form of their storage.
        - `weights`: the metric weight of each slot, per copy.
        - `target`, `target_weight`: the target deviation of the output, and its weight (0 where
            nobody reads). For a loss: None, and the prox step of each row.

        **Returns:** the new states, a `Force` in the place of one if that is at hand; and the
        output's deviation (None for a loss).
        """

    def copies(self, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """For each slot, of these shapes, how many outputs read one entry: the rows of its data."""
        return (1,) * len(shapes)

    def gains(
        self, reference: Reference, wanted: Sequence[bool], vectors: Sequence[Any]
    ) -> tuple[Any, ...]:
        """For each slot a bound on `|J|²`, the squared gain from it to the output.

        **Arguments:**

        - `reference`: the forward pass.
        - `wanted`: for each slot whether its bound is needed; where it costs something and is not,
            0 is returned.
        - `vectors`: for each slot where a power iteration begins, the last vector of one before,
            or None.

        **Returns:** the bounds: numbers, and a `PowerIteration` where one is to find it.
        """
        return (1.0,) * len(reference.inputs)


# --- Sums and piecewise linear functions ---------------------------------------------------------


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
    def accepts_rest(self) -> bool:
        return self.function is not None and self.terms == (Term(),)

    def _coefficients(self, knowns: Sequence[Any]) -> tuple[Any, ...]:
        values = iter(knowns)
        return tuple(term.coefficient([next(values) for _ in term.factors]) for term in self.terms)

    def project(self, reference, states, weights, target, target_weight):
        coefficients = self._coefficients(reference.knowns)
        axes = tuple(term.axes for term in self.terms)
        if self.function is None:
            return linear.affine(states, coefficients, axes, weights, target, target_weight)
        if self.accepts_rest:
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
        found = []
        coefficients = self._coefficients(reference.knowns)
        for term, c, value in zip(self.terms, coefficients, reference.inputs, strict=True):
            summed = math.prod(value.shape[axis] for axis in term.axes)
            largest = c**2 if np.ndim(c) == 0 else jnp.max(jnp.square(c))
            found.append(slope**2 * largest * summed)
        return tuple(found)


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
        found: list[Any] = [0.0] * count
        for place in range(count):
            if wanted[place]:
                ones = [float(i == place) for i in range(count)]
                found[place] = jnp.max(self._sum(indices, ones, reference.output.dtype))
        return tuple(found)


# --- Bilinear operations -------------------------------------------------------------------------


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
            out = bilinear.project_compact(op, left_ref, right_ref, left, right, *rest)
            return (out.left, out.right), out.output
        if isinstance(left, tuple):
            out = bilinear.project_compact(op, left_ref, right_ref, left[0], right[0], *rest)
            return ((out.left, out.left_spread), (out.right, out.right_spread)), out.output
        out = bilinear.project_lifted(op, left_ref, right_ref, left, right, *rest)
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
            mean, output, spread = bilinear.project_pinned_compact(
                self.operation, self.pinned, value, first, weight, target, target_weight
            )
            return ((mean, spread),), output
        common, multiplier, output = bilinear.project_pinned_structured(
            self.operation, self.pinned, value, first, second, weight, target, target_weight
        )
        return ((common, multiplier),), output

    def _project_copies(self, value, copies, weight, target, target_weight):
        op = self.operation
        data = op.lift_left(value) if self.pinned == "left" else op.lift_right(value)
        product, energy = jnp.sum(data * copies, axis=-1), jnp.sum(jnp.square(data), axis=-1)
        force = target_weight * (target - product) / (1 + target_weight * energy / weight)
        return (copies + data * (force / weight)[..., None],), product + energy * force / weight


# --- Extrema and quantizers ----------------------------------------------------------------------


@dataclass(frozen=True)
class Extremum(Rule):
    """`max` (or `min`) of several slots entry by entry, or of one slot over `axes`."""

    exactness: ClassVar[Exactness] = "exact"

    axes: tuple[int, ...] | None
    sign: int = 1
    name: str = "max"

    def _stack(self, arrays: Sequence[Any]) -> Array:
        if self.axes is None:
            return jnp.stack(arrays, axis=-1)
        (array,) = arrays
        kept = [axis for axis in range(array.ndim) if axis not in self.axes]
        moved = jnp.transpose(array, (*kept, *self.axes))
        return moved.reshape(*moved.shape[: len(kept)], -1)

    def _unstack(self, stacked: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
        if self.axes is None:
            return tuple(jnp.moveaxis(stacked, -1, 0))
        order = (*(axis for axis in range(len(shape)) if axis not in self.axes), *self.axes)
        moved = stacked.reshape([shape[axis] for axis in order])
        return (jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__)),)

    def project(self, reference, states, weights, target, target_weight):
        sign = self.sign
        stacked = self._stack(reference.inputs)
        gap = sign * (stacked - reference.output[..., None])
        gap = scaling.to_unit(gap, reference.geometry.exponent)
        weight = self._stack(
            [jnp.broadcast_to(w, s.shape) for w, s in zip(weights, states, strict=True)]
        )
        moved, output = extrema.maximum(
            gap, sign * self._stack(states), weight, sign * target, target_weight
        )
        return self._unstack(sign * moved, states[0].shape), sign * output


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


# --- Losses --------------------------------------------------------------------------------------


class Loss(Rule):
    """A proximal operator: `argmin Σ ρ/2 |x' − x|² + λ c·loss(x')`; `λ c/ρ` is the prox step.

    A row that counts negatively has its tangent at `x` in the place of the loss, an upper bound of
    a convex loss with its sign changed: `x' = x − λ c/ρ ∇loss(x)`.
    """

    exactness: ClassVar[Exactness] = "exact"

    @abstractmethod
    def prox(self, reference: Array, deviation: Array, step: Array, *knowns: Array) -> Array:
        """The new deviation; `step` is one number per row, not negative, `knowns` the data."""

    @abstractmethod
    def value_of(self, x: Array, *knowns: Array) -> Array:
        """The loss of each row."""

    def project(self, reference, states, weights, target, target_weight):
        (state,), (value,) = states, reference.inputs
        weight = weights[0]
        if jnp.ndim(weight):
            # A row function needs one weight per row: the metric gives a slot of a loss just that.
            weight = jnp.broadcast_to(weight, state.shape)[..., 0]
            weight = jnp.where(weight > 0, weight, 1)
        step = target_weight / weight
        if isinstance(step, (float, np.ndarray)) and np.all(step >= 0):
            return (self.prox(value, state, jnp.asarray(step), *reference.knowns),), None
        moved = self.prox(value, state, jnp.maximum(step, 0), *reference.knowns)
        tangent = losses.tangent(lambda x: self.value_of(x, *reference.knowns), value, state, step)
        return (jnp.where(jnp.expand_dims(step, -1) < 0, tangent, moved),), None


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """`−Σ y log softmax(x)` on rows."""

    name: str = "cross_entropy"

    def value_of(self, x, labels):
        return losses.cross_entropy_value(x, labels)

    def prox(self, reference, deviation, step, labels):
        return losses.cross_entropy(reference, deviation, labels, step)


@dataclass(frozen=True)
class Margin(Loss):
    """`½ Σ max(margin − s x, 0)²` on rows."""

    margin: float
    name: str = "margin_loss"

    def value_of(self, x, labels):
        return losses.margin_value(x, labels, self.margin)

    def prox(self, reference, deviation, step, labels):
        return losses.margin(reference, deviation, labels, self.margin, step)


@dataclass(frozen=True)
class SquaredError(Loss):
    """`½ Σ (x − t)²` on rows."""

    name: str = "squared_error"

    def value_of(self, x, targets):
        return losses.squared_error_value(x, targets)

    def prox(self, reference, deviation, step, labels):
        return losses.squared_error(reference, deviation, labels, step)


@dataclass(frozen=True)
class NumericLoss(Loss):
    """Any loss of rows: a sum of losses of entries, or of whole rows.

    **Attributes:**

    - `value`, `entries`: `(x, *knowns)` to the loss of each row, and of each entry if it is a sum
        of such.
    """

    value: Callable[..., Array]
    entries: Callable[..., Array] | None
    name: str = "loss"
    exactness: Exactness = "inexact"  # pyright: ignore[reportIncompatibleVariableOverride]

    def value_of(self, x, *knowns):
        return self.value(x, *knowns)

    def prox(self, reference, deviation, step, *knowns):
        if self.entries is not None:
            entries = self.entries
            return losses.separable(lambda x: entries(x, *knowns), reference, deviation, step)
        return losses.rows(lambda x: self.value(x, *knowns), reference, deviation, step)


@dataclass(frozen=True)
class LinearLoss(Loss):
    """`c·x` of rows: a shift."""

    value: Callable[..., Array]
    name: str = "linear"

    def value_of(self, x, *knowns):
        return self.value(x, *knowns)

    def prox(self, reference, deviation, step, *knowns):
        return losses.tangent(lambda x: self.value_of(x, *knowns), reference, deviation, step)


# --- The registry --------------------------------------------------------------------------------


class NodeSpec(NamedTuple):
    """What a primitive becomes: its rule, the operands that are slots, and those that are data."""

    rule: Rule
    slots: tuple[Atom, ...]
    knowns: tuple[Atom, ...] = ()


Builder = Callable[[Program, Equation], NodeSpec]
_BUILDERS: dict[Any, Builder] = {}


def find_builder(primitive: Any) -> Builder | None:
    """How a node of this primitive is made, or None if it has no rule."""
    return _BUILDERS.get(primitive)


def _register(primitive: Any, builder: Builder) -> None:
    """Gives `primitive` a user's rule, which from now on goes before every rule of the library."""
    _BUILDERS[primitive] = builder
    REGISTRATIONS[primitive] += 1


def _builder(*found: Any) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        _BUILDERS.update(dict.fromkeys(found, builder))
        return builder

    return register


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


@_builder(primitives.identity_p)
def _identity(program: Program, equation: Equation) -> NodeSpec:
    return NodeSpec(IDENTITY, equation.inputs)


#: `y = x`: the mean of the slot and its readers. Also what the bipartition inserts.
IDENTITY = Affine((Term(),), name="identity")


def _loss(rule: Loss, equation: Equation) -> NodeSpec:
    prediction, labels = equation.inputs
    return NodeSpec(rule, (prediction,), (labels,))


@_builder(primitives.cross_entropy_p)
def _cross_entropy(program: Program, equation: Equation) -> NodeSpec:
    return _loss(CrossEntropy(), equation)


@_builder(primitives.margin_loss_p)
def _margin(program: Program, equation: Equation) -> NodeSpec:
    return _loss(Margin(equation.params["margin"]), equation)


@_builder(primitives.squared_error_p)
def _squared_error(program: Program, equation: Equation) -> NodeSpec:
    return _loss(SquaredError(), equation)


LOSSES = frozenset(
    {primitives.cross_entropy_p, primitives.margin_loss_p, primitives.squared_error_p}
)


# --- Rules of users ------------------------------------------------------------------------------

#: `(inputs, target, input_weights, target_weight, **params) -> new inputs`
Projection = Callable[..., Any]


@dataclass(frozen=True)
class Registered(Rule):
    """A user's projection, in full values: it returns the new inputs, the output follows."""

    function: Callable[..., Any]
    projection: Projection
    known: tuple[bool, ...]
    #: The primitive's parameters, in a hashable form.
    key: Any
    params: Mapping[str, Any] = field(compare=False)
    batch_dims: int = 0
    name: str = "registered"
    exactness: Exactness = "exact"

    def _operands(self, slots: Sequence[Any], knowns: Sequence[Any]) -> list[Any]:
        slot, other = iter(slots), iter(knowns)
        return [next(other) if known else next(slot) for known in self.known]

    def _moved(self, inputs, target, weights, target_weight, knowns):
        pinned = [jnp.full(jnp.shape(value), jnp.inf, target.dtype) for value in knowns]
        found = self.projection(
            self._operands(inputs, knowns),
            target,
            self._operands(weights, pinned),
            target_weight,
            **self.params,
        )
        new = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        if len(new) == len(self.known):
            new = tuple(x for x, known in zip(new, self.known, strict=True) if not known)
        wanted, shapes = [i.shape for i in inputs], [jnp.shape(x) for x in new]
        if wanted != shapes:
            raise ValueError(
                f"The projection registered for `{self.name}` must return the new value of each "
                f"operand that is not data, of shapes {wanted}; it returned shapes {shapes}."
            )
        return new

    def _evaluate(self, inputs, knowns):
        return self.function(*self._operands(inputs, knowns), **self.params)

    def project(self, reference, states, weights, target, target_weight):
        weights = tuple(
            jnp.broadcast_to(jnp.asarray(weight, state.dtype), state.shape)
            for weight, state in zip(weights, states, strict=True)
        )
        target_weight = jnp.broadcast_to(jnp.asarray(target_weight, target.dtype), target.shape)
        states, target, back = self._resolvable(reference, states, target)
        inputs = tuple(r + d for r, d in zip(reference.inputs, states, strict=True))
        moved, evaluate = self._moved, self._evaluate
        for _ in range(self.batch_dims):
            moved, evaluate = jax.vmap(moved), jax.vmap(evaluate)
        new = moved(inputs, reference.output + target, weights, target_weight, reference.knowns)
        # The moves are added to the deviations: what does not move keeps its deviation exactly.
        states = tuple(d + (n - i) for d, n, i in zip(states, new, inputs, strict=True))
        output = evaluate(new, reference.knowns) - reference.output
        return tuple(state / back for state in states), output / back

    def _resolvable(
        self, reference: Reference, states: Sequence[Array], target: Array
    ) -> tuple[tuple[Array, ...], Array, Any]:
        """Deviations out of their unit, and the factor that was put on them.

        The projection is in full values, from which deviations of a deep network would be rounded
        away. So the node is asked for a move that is small, but large enough to be seen: in the
        range where its response is proportional to the request this changes nothing else.
        """
        exponent = reference.geometry.exponent
        if scaling.is_trivial(exponent):
            return tuple(states), target, 1.0
        largest = jnp.max(jnp.array([jnp.max(jnp.abs(a)) for a in (*states, target)]))
        size = jnp.maximum(jnp.max(jnp.abs(reference.output)), jnp.finfo(target.dtype).tiny)
        seen = float(jnp.finfo(target.dtype).eps) ** 0.5 * size
        largest = jnp.where(largest > 0, largest, 1)
        asked = scaling.from_unit(largest, exponent)
        back = jnp.maximum(asked, seen) / largest
        return tuple(back * state for state in states), back * target, back


def register_projection(
    operation: Any, *, exactness: Exactness = "exact", name: str | None = None
) -> Callable[[Projection], Any]:
    """Adds an operation: decorates `argmin Σ ρ|x' − x|² + W|f(x') − z|²` as the projection of `f`.

    **Arguments:**

    - `operation`: a `jax.lax` primitive with one output, or a Python function of arrays.
    - `exactness`: `"exact"` (the nearest point), `"inexact"` or `"relaxed"`; shown in tables.
    - `name`: what tables and errors call the operation.

    The decorated function is called as
    `projection(inputs, target, input_weights, target_weight, **params)`: lists of the operands'
    values and of their positive weights (of the operands' shapes), the value `z` wanted of the
    output with its weight `W` (0 where nobody reads it), and the primitive's parameters. An operand
    that is data keeps its place in both lists, with the weight infinity: it does not move. It
    returns the new operands (those that are data may be left out); the new output is the
    operation's own.

    **Returns:** for a primitive, the projection unchanged. For a Python function, a function that
    computes the operation and is traced as one node; use it in the model. It works under `jit`,
    `vmap` and `grad`.

    **Raises:** `TypeError` if `operation` is neither, has several outputs or is a loss;
    `ValueError` for another `exactness`.

    ```python
    @pjax.register_projection(lambda x: 2.0 * x)
    def double(inputs, target, input_weights, target_weight):
        (x,), (rho,) = inputs, input_weights
        return (rho * x + 2 * target_weight * target) / (rho + 4 * target_weight)
    ```
    """

    def build(function: Callable[..., Any], projection: Projection, batched: bool) -> Builder:
        def builder(program: Program, equation: Equation) -> NodeSpec:
            params = dict(equation.params)
            batch_dims = params.pop("batch_dims") if batched else 0
            known = tuple(not program.is_variable(atom) for atom in equation.inputs)
            rule = Registered(
                function, projection, known, canonical(params), params, batch_dims,
                name or getattr(operation, "name", None) or projection.__name__, exactness,
            )  # fmt: skip
            slots = tuple(a for a, k in zip(equation.inputs, known, strict=True) if not k)
            knowns = tuple(a for a, k in zip(equation.inputs, known, strict=True) if k)
            return NodeSpec(rule, slots, knowns)

        return builder

    if exactness not in get_args(Exactness):
        raise ValueError(f'`exactness` must be "exact", "inexact" or "relaxed", got {exactness!r}.')
    if isinstance(operation, Primitive):
        if operation.multiple_results:
            raise TypeError(f"`{operation.name}` has several outputs; a node has one.")
        if operation in LOSSES:
            raise TypeError(
                f"`{operation.name}` is a loss: it has a proximal operator, not a projection."
            )

        def register(projection: Projection) -> Projection:
            _register(operation, build(operation.bind, projection, batched=False))
            return projection

        return register
    if not callable(operation):
        raise TypeError(
            f"`operation` must be a JAX primitive (such as `jax.lax.tanh_p`) or a function, got "
            f"{type(operation).__name__}."
        )

    def define(projection: Projection) -> Callable[..., Array]:
        def implementation(*args: Array, batch_dims: int) -> Array:
            function = operation
            for _ in range(batch_dims):
                function: Any = jax.vmap(function)
            return function(*args)

        primitive = _compat.define_primitive(
            f"pjax_{name or projection.__name__}", implementation, _batch_registered
        )
        _register(primitive, build(operation, projection, batched=True))

        def call(*args: Any) -> Array:
            return primitive.bind(*map(jnp.asarray, args), batch_dims=0)

        # Its name and its text, not its signature: `call` takes the operands.
        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(call, attribute, getattr(projection, attribute))
        return call

    return define


def _batch_registered(bind: Any, size: int, args: Any, dims: Any, params: Any) -> Any:
    args = primitives.to_front(args, dims, size)
    return bind(*args, batch_dims=params["batch_dims"] + 1), 0
