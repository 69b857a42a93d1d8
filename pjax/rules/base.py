"""What a rule is: the constraint of one node, and what it is given to project onto it.

In come the forward pass at the node (`Reference`), deviations, weights and a target; out go the
nearest operands and output. To add an operation, subclass `Rule` with one `project`, and with
`gains` where the output may move further than an operand; the other methods have defaults that are
right for an operation without copies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pjax.options import Exactness
from pjax.program import Atom, Equation, Program
from pjax.projections import scaling
from pjax.rules.storages import Dense, Storage
from pjax.sets import Set


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
    - `within`: of a parameter in a set, the set and the weight of its readers.
    """

    inputs: tuple[Array, ...]
    knowns: tuple[Any, ...]
    output: Any
    inner: Any = None
    geometry: Geometry = Geometry()
    entries: tuple[Array, ...] = ()
    force: Any = None
    within: tuple[Set, Any] | None = None


class Force(NamedTuple):
    """What a rule may return for a slot that had not moved: its move times its weight.

    Where the weight is the unit of the slot's deviations that is what the state keeps, and nothing
    is divided.
    """

    value: Array


class Rule(ABC):
    """The projection of one kind of node, and the specification of one node.

    Rules are frozen dataclasses: equal nodes share one, and compiled code is found by it.
    """

    #: *exact*: the nearest point, proved by an oracle; *inexact*: decreases the objective, optimum
    #: when converged; *relaxed*: a documented heuristic.
    exactness: Exactness
    #: What a table or a drawing calls the node.
    name: str = ""

    @property
    def accepts_unmoved(self) -> bool:
        """Whether `project` takes None for the state of a slot that has not moved.

        In the first sweep nothing has moved yet: `LayerSum` then leaves out the products of
        operands that are 0.
        """
        return False

    def storages(self, reflecting: bool, shared: Sequence[bool]) -> tuple[Storage, ...]:
        """How the solver keeps each slot: one number per entry, or the copies of it in some form.

        `NeuronBilinear` has one constraint for each entry of `x @ w`, on copies of a row and a
        column: it keeps their means, or for a solver that reflects the copies.

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
        """The nearest point of `{(x, y): y = f(x)}`: what the rule is for.

        Of `y = 2x` with the weights ρ and W it is `δx = (ρ d + 2 W z)/(ρ + 4 W)`, `δy = 2 δx`, with
        the deviation `d` and the target `z`. All are deviations from the reference, in the unit of
        `reference.geometry.exponent`: a move far below the rounding of a value keeps its digits.

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
        """For each slot, of these shapes, how many outputs read one entry.

        A metric weighs a parameter by its rows: a bias of `[32, 10]` outputs has 32.
        """
        return (1,) * len(shapes)

    def gains(
        self, reference: Reference, wanted: Sequence[bool], vectors: Sequence[Any]
    ) -> tuple[Any, ...]:
        """For each slot a bound on `|J|²`, the squared gain from it to the output.

        By it the spectral metric makes each slot stiffer than what reads its node can bend: 1 for a
        relu, the largest eigenvalue of `WᵀW` for the operand `x` of `x @ W`.

        **Arguments:**

        - `reference`: the forward pass.
        - `wanted`: for each slot whether its bound is needed; where it costs something and is not,
            0 is returned.
        - `vectors`: for each slot where a power iteration begins, the last vector of one before,
            or None.

        **Returns:** the bounds: numbers, and a `PowerIteration` where one is to find it.
        """
        return (1.0,) * len(reference.inputs)


@dataclass(frozen=True)
class Parameter(Rule):
    """A parameter: all that is asked of it is that its readers agree, so it has no slots, and the
    nearest point is the weighted mean of its readers, its target; in a set, the point that is
    nearest to that in their weights.
    """

    exactness: ClassVar[Exactness] = "exact"
    name: str = "parameter"

    def project(self, reference, states, weights, target, target_weight):
        if reference.within is None:
            return (), target
        one, weight = reference.within
        exponent = reference.geometry.exponent
        point = reference.output + scaling.from_unit(target, exponent)
        if isinstance(weight, jax.Array) and weight.ndim:
            # What nothing reads costs nothing to move; it is not to move for that.
            least = jnp.finfo(weight.dtype).eps * jnp.max(weight)
            moved = one.project_weighted(point, jnp.where(least > 0, jnp.maximum(weight, least), 1))
        else:
            moved = one.project(point)
        return (), target + scaling.to_unit((moved - point).astype(target.dtype), exponent)


#: The rule of every parameter.
PARAMETER = Parameter()


class NodeSpec(NamedTuple):
    """What a primitive becomes: its rule, the operands that are slots, and those that are data."""

    rule: Rule
    slots: tuple[Atom, ...]
    knowns: tuple[Atom, ...] = ()


Builder = Callable[[Program, Equation], NodeSpec]
