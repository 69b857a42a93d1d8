"""Losses: proximal steps, and the forces of rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.options import Exactness
from pjax.program import primitives
from pjax.projections import losses
from pjax.rules.base import Rule


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

    def satisfied(self, x: Array, *knowns: Array) -> Array | None:
        """The nearest point to `x` where the loss of each row is 0; None for a loss without any."""
        return None

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

    def satisfied(self, x, labels):
        signs = (2 * labels - 1).astype(x.dtype)
        return signs * jnp.maximum(signs * x, self.margin)


@dataclass(frozen=True)
class SquaredError(Loss):
    """`½ Σ (x − t)²` on rows."""

    name: str = "squared_error"

    def value_of(self, x, targets):
        return losses.squared_error_value(x, targets)

    def prox(self, reference, deviation, step, labels):
        return losses.squared_error(reference, deviation, labels, step)

    def satisfied(self, x, labels):
        return jnp.broadcast_to(labels, x.shape).astype(x.dtype)


#: The rule of each loss of the library. The parameters of a primitive are the fields of its rule.
LOSS_RULES: dict[Any, type[Loss]] = {
    primitives.cross_entropy_p: CrossEntropy,
    primitives.margin_loss_p: Margin,
    primitives.squared_error_p: SquaredError,
}


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
