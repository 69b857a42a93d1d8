"""All deviations count alike, parameters in a ratio of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pjax.graph import Graph
from pjax.metrics.base import Metric
from pjax.metrics.by_parameter import by_parameter, by_path, check_iterations, check_positive
from pjax.options import RowWeights


@dataclass(frozen=True)
class Uniform(Metric):
    """The same weight for all edge variables of a kind: the metric of the paper.

    **Arguments:**

    - `weight`: ρ of slots that depend on parameters only (weights, biases, functions of them). A
        number, or a prefix of the parameter pytree with numbers as leaves.
    - `activation`: ρ of all other slots.
    - `prox_step`: λ of the losses, in units of a squared deviation per loss.
    - `row_weights`: `"relative"` or `"absolute"`, see [`Metric`][].
    - `iterations`: conjugate gradient steps for a layer (`splitting="layer"`).

    **Raises:** `ValueError` for a number that is not positive and finite.

    Source: arXiv 2506.05878, which has all weights 1 and λ = 5.
    """

    weight: Any = 1.0
    activation: float = 1.0
    prox_step: float = 5.0
    row_weights: RowWeights = "relative"
    iterations: int = 8

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", by_path("weight", self.weight, check_positive))
        check_positive("activation", self.activation)
        check_positive("prox_step", self.prox_step)
        check_iterations("iterations", self.iterations)
        if self.row_weights not in ("relative", "absolute"):
            raise ValueError(
                f'`row_weights` must be "relative" or "absolute", got {self.row_weights!r}.'
            )

    def slot_weights(self, graph: Graph) -> Sequence[float]:
        given = by_parameter("weight", self.weight, graph)
        return [
            max(values) if slot.kind == "weight" else self.activation
            for slot, values in zip(graph.slots, given, strict=True)
        ]
