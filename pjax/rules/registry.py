"""The table of rules: which primitive is projected by which rule, and rules of the user's own.

`find_builder(P.max_p)` says how the node of a maximum is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jaxtyping import Array

from pjax.backend import custom_primitives
from pjax.backend.compat import P
from pjax.options import Exactness
from pjax.program import LOSSES, REGISTRATIONS, Equation, Program, canonical, primitives
from pjax.projections import scaling
from pjax.rules.affine import Affine, ScatterAdd, Term
from pjax.rules.base import Builder, NodeSpec, Reference, Rule
from pjax.rules.extrema import Extremum
from pjax.rules.losses import LOSS_RULES, Loss
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


_BUILDERS |= {primitive: _loss(make) for primitive, make in LOSS_RULES.items()}


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
        projected = self.projection(
            self._operands(inputs, knowns),
            target,
            self._operands(weights, pinned),
            target_weight,
            **self.params,
        )
        new = tuple(projected) if isinstance(projected, (tuple, list)) else (projected,)
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
            add_rule(operation, build(operation.bind, projection, batched=False))
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

        primitive = custom_primitives.define_primitive(
            f"pjax_{name or projection.__name__}", implementation, _batch_registered
        )
        add_rule(primitive, build(operation, projection, batched=True))

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
