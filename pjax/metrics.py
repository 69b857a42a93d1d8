"""Metrics: in which weights distances are measured, and how far a loss may move its predictions."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from pjax.graph import Graph, Node
from pjax.projections import scaling

RowWeights = Literal["relative", "absolute"]


class Weight(NamedTuple):
    """The weight of a slot or of a node's readers, `ρ = mantissa · 2**exponent`.

    **Attributes:**

    - `mantissa`: a number, or an array that broadcasts to the slot.
    - `exponent`: a scalar, not always whole; it may be far out of the range of the exponents of
        floating-point numbers.
    - `relative`: `2**(exponent − that of the readers of the slot's node)` where it is known as
        such: the difference of two exponents of a deep network has lost digits.
    - `compliance`: the bound on the slot's squared gain over its weight, in the unit of its node,
        where that is known as such.
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
    def loss_weights(self) -> Mapping[int, Any]:
        """For each loss the weights of its rows, relative to the largest of all."""
        ...

    def shapes(self, node: Node, /) -> tuple[tuple[int, ...], ...]:
        """The shapes of a node's slots."""
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

    def resting(self, graph: Graph) -> Sequence[bool]:
        """For each slot whether its weight is infinite: its entries rest, and gather forces."""
        return [False] * len(graph.slots)

    def curved(self, graph: Graph) -> Sequence[bool]:
        """For each slot of a layer whether its response is solved for (else it is bounded)."""
        return [True] * len(graph.slots)

    def weigh(self, measures: Measures) -> Weighing:
        """The weights on one problem; they may depend on its values."""
        weights = [Weight(float(w)) for w in self.slot_weights(measures.graph)]
        nothing = [None] * len(weights)
        return Weighing(weights, nothing, nothing)


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
        object.__setattr__(self, "weight", _by_path("weight", self.weight, _check_positive))
        _check_positive("activation", self.activation)
        _check_positive("prox_step", self.prox_step)
        _check_iterations("iterations", self.iterations)
        if self.row_weights not in ("relative", "absolute"):
            raise ValueError(
                f'`row_weights` must be "relative" or "absolute", got {self.row_weights!r}.'
            )

    def slot_weights(self, graph: Graph) -> Sequence[float]:
        found = _by_parameter("weight", self.weight, graph)
        return [
            max(values) if slot.kind == "weight" else self.activation
            for slot, values in zip(graph.slots, found, strict=True)
        ]


@dataclass(frozen=True)
class Spectral(Metric):
    """`ρ_s = c λ_s W_v`, from the losses backwards: each slot is stiffer than what reads its node
    can bend.

    `W_v` is the weight of the readers of the slot's node, and `λ_s ≥ ‖J_s‖²` a bound on how much
    the node's output moves with the slot (1 for a relu; by the power iteration for a product of
    arrays). Then a node hands on at least the share `1/(1 + k/c)` of a request to its `k` operands
    in the direction `Jᵀ`, whatever the singular values of `J`, and a parallel step is a
    contraction. With `c = activations · levels` the share that reaches a parameter is about
    `exp(−1/activations)` at any depth, so that paths of different lengths stay commensurate.

    The losses' slots weigh what each row counts in the result: a request is the same for each row,
    in units of the predictions, and the batch size, a mean or a sum, and masks change nothing.

    **Arguments:**

    - `activations`: the stiffness of activations, per level of the graph.
    - `parameters`: `"stiff"`: parameters rest in a solve, and gather the forces on them, the exact
        limit of an infinite weight; or a finite stiffness, in rows of the layer's input:
        `ρ_w = rows · (λ_w/n) W_v`, with `λ_w` the bound for the layer's input of `n` rows. Then
        `δW = Xᵀ(XXᵀ + ρ_w)⁻¹R` equalises the input's directions: the fewer rows, the more. Or a
        prefix of the parameter pytree with such leaves.
    - `prox_step`: λ of the losses, in units of a squared prediction.
    - `iterations`: conjugate gradient steps for the response of finite parameters.
    - `power_iterations`: steps of the power iteration for `λ_s` from a fixed direction; at most two
        from where a state that is handed on left it.

    **Raises:** `ValueError` for a number that is not positive and finite.
    """

    activations: float = 4.0
    parameters: Any = "stiff"
    prox_step: float = 0.1
    iterations: int = 3
    power_iterations: int = 4

    row_weights = "relative"

    def __post_init__(self) -> None:
        _check_positive("activations", self.activations)
        object.__setattr__(
            self, "parameters", _by_path("parameters", self.parameters, _check_stiffness)
        )
        _check_positive("prox_step", self.prox_step)
        _check_iterations("iterations", self.iterations)
        _check_iterations("power_iterations", self.power_iterations)

    def resting(self, graph: Graph) -> Sequence[bool]:
        found = _by_parameter("parameters", self.parameters, graph)
        return [
            slot.kind == "weight" and all(value == "stiff" for value in values)
            for slot, values in zip(graph.slots, found, strict=True)
        ]

    def curved(self, graph: Graph) -> Sequence[bool]:
        parameters = {node.index for node in graph.parameters}
        return [
            not rests and slot.kind == "weight" and not parameters.isdisjoint(slot.producers)
            for slot, rests in zip(graph.slots, self.resting(graph), strict=True)
        ]

    def weigh(self, measures: Measures) -> Weighing:
        graph = measures.graph
        stiffness = _by_parameter("parameters", self.parameters, graph)
        resting, curved = self.resting(graph), self.curved(graph)
        readers = graph.readers()
        begun = any(vector is not None for vector in measures.vectors)
        iterations = min(self.power_iterations, 2) if begun else self.power_iterations
        level = self.activations * len(graph.level_groups())
        wanted = [
            not resting[slot.index] or all(resting[i] for i in readers[slot.node])
            for slot in graph.slots
        ]
        gains, vectors = measures.gains(wanted, iterations)
        weights: dict[int, Weight] = {}
        for index in graph.backward_order():
            node = graph.nodes[index]
            if node.kind == "loss":
                for slot in node.slots:
                    # A penalty on parameters that rest: a force on them.
                    found = Weight(measures.loss_weights[index])
                    weights[slot] = Weight(1.0, INFINITE) if resting[slot] else found
                continue
            if node.rule is None:
                continue
            copies = node.rule.copies(measures.shapes(node))
            asked = measures.reader_weight(index, weights)
            largest = asked.mantissa
            if jnp.ndim(largest):
                # Of what data leave unread, as the other branch of a choice, it is 0.
                largest = jnp.maximum(jnp.max(largest), 2.0**-30)
            for slot, rows in zip(node.slots, copies, strict=True):
                if not wanted[slot]:
                    weights[slot] = Weight(1.0, INFINITE)
                    continue
                factor: Any = level
                if curved[slot]:
                    shared = max(len(readers[p]) for p in graph.slots[slot].producers)
                    given = min(v for v in stiffness[slot] if v != "stiff")
                    factor = given / (rows * shared)
                weights[slot] = _relative(factor * largest, gains[slot], asked.exponent)
        return Weighing([weights[i] for i in range(len(graph.slots))], gains, vectors)


def _relative(stiffness: Any, gain: Any, exponent: Any) -> Weight:
    """`stiffness · gain · 2**exponent`; a weight of 0 becomes a very small one."""
    ratio = stiffness * gain
    tiny = float(jnp.finfo(jnp.float32).tiny)
    if isinstance(ratio, (int, float)):  # then nothing is computed on the device
        ratio = max(float(ratio), tiny)
        return Weight(1.0, exponent + math.log2(ratio), ratio, 1 / stiffness)
    ratio = jnp.asarray(ratio, jnp.promote_types(jnp.result_type(ratio), jnp.float32))
    ratio = jnp.maximum(ratio, tiny)
    step = jnp.log(ratio) * (1 / math.log(2))
    return Weight(1.0, scaling.once(exponent + step), ratio, 1 / stiffness)


# --- Numbers by parameter ------------------------------------------------------------------------

#: `(path, value)` for each leaf of a prefix of the parameter pytree.
ByPath = tuple[tuple[str, Any], ...]


def _by_path(name: str, given: Any, check: Any) -> ByPath:
    """A number, or a pytree prefix of numbers, as pairs of a path and a number."""
    if isinstance(given, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in given
    ):
        return given  # made before: `dataclasses.replace` hands it over
    leaves, _ = jax.tree_util.tree_flatten_with_path(given)
    pairs = tuple((jax.tree_util.keystr(path), leaf) for path, leaf in leaves)
    for path, value in pairs:
        check(name + path, value)
    return pairs


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f"`{name}` must be positive and finite, got {value!r}.")


def _check_stiffness(name: str, value: Any) -> None:
    if value == "stiff":
        return
    if not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
        raise ValueError(f'`{name}` must be "stiff" or a positive finite number, got {value!r}.')


def _check_iterations(name: str, value: Any) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a whole number, at least 1, got {value!r}.")


def _by_parameter(name: str, pairs: ByPath, graph: Graph) -> list[tuple[Any, ...]]:
    """For each slot the values of the parameters that it depends on; `()` for an activation.

    **Raises:** `ValueError` for a path that is no prefix of a parameter's, and for a parameter that
    none is a prefix of.
    """
    leaves = graph.program.leaves
    for path, _ in pairs:
        if not any(_is_prefix(path, leaf.path) for leaf in leaves):
            known = ", ".join(f"`{leaf.path}`" for leaf in leaves[:8])
            raise ValueError(
                f"`{name}{path}` names no parameter: the parameters are {known}"
                f"{', …' if len(leaves) > 8 else ''}."
            )
    value_of: dict[int, Any] = {}
    for node in graph.parameters:
        assert node.output is not None
        path = leaves[node.output].path
        found = [value for prefix, value in pairs if _is_prefix(prefix, path)]
        if not found:
            raise ValueError(
                f"`{name}` has no entry for the parameter `{path}`: give a number for all, or a "
                "prefix of the parameter pytree that covers each."
            )
        value_of[node.index] = (found[0],)
    below: dict[int, tuple[Any, ...]] = dict(value_of)

    def values(node: int) -> tuple[Any, ...]:
        if node not in below:
            found = [v for i in graph.nodes[node].slots for p in graph.slots[i].producers
                     for v in values(p)]  # fmt: skip
            below[node] = tuple(dict.fromkeys(found))
        return below[node]

    return [
        tuple(dict.fromkeys(v for p in slot.producers for v in values(p)))
        if slot.kind == "weight"
        else ()
        for slot in graph.slots
    ]


def _is_prefix(prefix: str, path: str) -> bool:
    # Paths are made of `['key']`, `[0]` and `.name`: a prefix ends where one of these begins.
    return path.startswith(prefix) and path[len(prefix) : len(prefix) + 1] in ("", "[", ".")


__all__ = ["INFINITE", "Measures", "Metric", "Spectral", "Uniform", "Weighing", "Weight"]
