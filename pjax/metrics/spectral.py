"""Metrics: in which weights distances are measured, and how far a loss may move its predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from pjax.graph import Graph
from pjax.metrics.base import INFINITE, Measures, Metric, Weighing, Weight
from pjax.metrics.by_parameter import (
    by_parameter,
    by_path,
    check_iterations,
    check_positive,
    check_stiffness,
)
from pjax.projections import scaling


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
        check_positive("activations", self.activations)
        object.__setattr__(
            self, "parameters", by_path("parameters", self.parameters, check_stiffness)
        )
        check_positive("prox_step", self.prox_step)
        check_iterations("iterations", self.iterations)
        check_iterations("power_iterations", self.power_iterations)

    def stiff(self, graph: Graph) -> Sequence[bool]:
        stiffness = by_parameter("parameters", self.parameters, graph)
        return [
            slot.kind == "weight" and all(value == "stiff" for value in values)
            for slot, values in zip(graph.slots, stiffness, strict=True)
        ]

    def curved(self, graph: Graph) -> Sequence[bool]:
        parameters = {node.index for node in graph.parameters}
        return [
            not is_stiff and slot.kind == "weight" and not parameters.isdisjoint(slot.producers)
            for slot, is_stiff in zip(graph.slots, self.stiff(graph), strict=True)
        ]

    def weigh(self, measures: Measures) -> Weighing:
        graph = measures.graph
        stiffness = by_parameter("parameters", self.parameters, graph)
        stiff, curved = self.stiff(graph), self.curved(graph)
        readers = graph.readers()
        begun = any(vector is not None for vector in measures.vectors)
        iterations = min(self.power_iterations, 2) if begun else self.power_iterations
        level = self.activations * measures.levels
        wanted = [
            not stiff[slot.index] or all(stiff[i] for i in readers[slot.node])
            for slot in graph.slots
        ]
        gains, vectors = measures.gains(wanted, iterations)
        weights: dict[int, Weight] = {}
        for index in graph.backward_order():
            node = graph.nodes[index]
            if node.kind == "loss":
                held = measures.loss_weights[index]
                weight = held if isinstance(held, Weight) else Weight(held)
                for slot in node.slots:
                    # A penalty on stiff parameters: a force on them.
                    weights[slot] = Weight(1.0, INFINITE) if stiff[slot] else weight
                continue
            if not node.slots:
                continue
            copies = node.rule.copies(graph.shapes(node))
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
