"""What a metric is: weights of deviations, for all nodes and parameters."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pjax.graph import Graph
from pjax.options import RowWeights


class Weight(NamedTuple):
    """The weight of a slot or of a node's readers, `ρ = mantissa · 2**exponent`.

    **Attributes:**

    - `mantissa`: a number, or an array that broadcasts to the slot.
    - `exponent`: a scalar, not always whole; it may be far out of the range of the exponents of
        floating-point numbers.
    - `relative`: `2**(exponent − that of the readers of the slot's node)`, for a metric that has
        this ratio: in a deep network both exponents are large, and their difference is inexact.
    - `compliance`: the bound on the slot's squared gain over its weight, in the unit of its node,
        for a metric that has it.
    """

    mantissa: Any
    exponent: Any = 0
    relative: Any = None
    compliance: Any = None


#: The exponent of an infinite weight. Weights in ratio to each other may be infinite together.
INFINITE = 2**15


class Measures(Protocol):
    """What a metric can ask of a problem; `pjax.Problem` is one."""

    @property
    def graph(self) -> Graph:
        """The nodes and slots."""
        ...

    @property
    def vectors(self) -> Sequence[Any]:
        """For each slot where its power iteration begins, or None."""
        ...

    @property
    def levels(self) -> int:
        """How many levels the graph has; of a part, the whole that it is of."""
        ...

    @property
    def loss_weights(self) -> Mapping[int, Any]:
        """For each loss the weights of its rows, relative to the largest of all; for what stands
        for the readers in the part behind, their [`Weight`][].
        """
        ...

    def reader_weight(self, node: int, weights: Mapping[int, Weight], /) -> Weight:
        """`W_v`: the sum of the weights of all entries that read a node's output."""
        ...

    def gains(self, wanted: Sequence[bool], iterations: int, /) -> tuple[list[Any], list[Any]]:
        """Bounds on the squared gain from each slot to its node's output, 0 where it is not wanted,
        by so many power iterations; and where these end, or None.
        """
        ...


class Weighing(NamedTuple):
    """What a metric finds on a problem.

    **Attributes:**

    - `weights`: ρ of each slot; one that stands for copies: of each copy.
    - `gains`: for each slot the bound on its squared gain.
    - `vectors`: for each slot where a power iteration may begin next time, or None.
    """

    weights: list[Weight]
    gains: list[Any]
    vectors: list[Any]


class Metric(ABC):
    """A positive weight for each slot, and the prox step of the losses; hashable."""

    #: λ: a loss is projected as `argmin ½ Σ ρ |x' − x|² + λ c · loss(x')`.
    prox_step: float
    #: What `c` is for a row: `"relative"`, its coefficient in the function's result over the
    #: largest one (a mean and a sum are the same problem, a masked row has none); `"absolute"`,
    #: the coefficient.
    row_weights: RowWeights
    #: Steps of conjugate gradients for the projection onto a layer.
    iterations: int = 8

    def slot_weights(self, graph: Graph) -> Sequence[float]:
        """ρ for each slot of `graph`, if that is all there is to the metric."""
        raise NotImplementedError(f"`{type(self).__name__}` must define `slot_weights` or `weigh`.")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "resting" in vars(cls):
            warnings.warn(
                f"`{cls.__name__}.resting` is `stiff` now; the old name goes with the next "
                "release.",
                DeprecationWarning,
                stacklevel=2,
            )
            cls.stiff = vars(cls)["resting"]

    def stiff(self, graph: Graph) -> Sequence[bool]:
        """For each slot whether its weight is infinite: its entries stay, and gather forces."""
        return [False] * len(graph.slots)

    def curved(self, graph: Graph) -> Sequence[bool]:
        """For each slot of a layer whether its response is solved for (else it is bounded)."""
        return [True] * len(graph.slots)

    def weigh(self, measures: Measures) -> Weighing:
        """The weights on one problem; they may depend on its values."""
        weights = [Weight(float(w)) for w in self.slot_weights(measures.graph)]
        nothing = [None] * len(weights)
        return Weighing(weights, nothing, nothing)
