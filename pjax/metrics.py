"""Metrics: in which weights distances are measured, and how far a loss may move its predictions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pjax.graph import Graph


class Metric(ABC):
    """A positive weight for each slot, and the prox step of the losses; hashable."""

    #: λ: a loss is projected as `argmin ½ Σ ρ |x' − x|² + λ c · loss(x')`.
    prox_step: float
    #: What `c` is for a row: `"relative"`, its coefficient in the function's result over the
    #: largest one (a mean and a sum are the same problem, a masked row has none); `"absolute"`,
    #: the coefficient.
    row_weights: Literal["relative", "absolute"]

    @abstractmethod
    def slot_weights(self, graph: Graph) -> Sequence[float]:
        """ρ for each slot of `graph`; a slot that stands for copies: for each copy."""


@dataclass(frozen=True)
class Uniform(Metric):
    """The same weight for all edge variables of a kind: the metric of the paper.

    **Arguments:**

    - `weight`: ρ of slots that depend on parameters only (weights, biases, functions of them).
    - `activation`: ρ of all other slots.
    - `prox_step`: λ of the losses, in units of a squared deviation per loss.
    - `row_weights`: `"relative"` or `"absolute"`, see [`Metric`][].

    **Raises:** `ValueError` for a number that is not positive and finite.

    Source: arXiv 2506.05878, which has all weights 1 and λ = 5.
    """

    weight: float = 1.0
    activation: float = 1.0
    prox_step: float = 5.0
    row_weights: Literal["relative", "absolute"] = "relative"

    def __post_init__(self) -> None:
        for name in ("weight", "activation", "prox_step"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` must be positive and finite, got {value}.")
        if self.row_weights not in ("relative", "absolute"):
            raise ValueError(
                f'`row_weights` must be "relative" or "absolute", got {self.row_weights!r}.'
            )

    def slot_weights(self, graph: Graph) -> Sequence[float]:
        return [self.weight if slot.kind == "weight" else self.activation for slot in graph.slots]
