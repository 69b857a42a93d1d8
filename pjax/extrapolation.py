"""How far to go along a move of the parameters: as far as the losses fall.

An extrapolated step in the sense of Pierra: projections that run side by side each move for
themselves, and their common move may be too short or too long. Its length is found where it can be
judged, at the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjax.problem import Problem
from pjax.trace import read

_ITERATIONS = 10


def line_search(
    problem: Problem, moves: Sequence[Array | None], consts: Sequence[Any]
) -> Float[Array, ""]:
    """`argmin_{τ ≥ 0} Σ_i c_i [loss_i(p_i + τ d_i) + |τ d_i|²/(2λ)]`, a convex function of τ.

    `d` is what a forward pass with the moved parameters makes of the predictions `p`, less `p`; no
    derivative of the network is needed, only those of the losses along a line.

    **Arguments:**

    - `problem`: the batch's problem, with its forward pass.
    - `moves`: how far each leaf moves for τ = 1, or None.
    - `consts`: the arrays that the function captures.

    **Returns:** τ; 0 if no way ahead lowers the losses.
    """
    graph, program = problem.graph, problem.graph.program
    moved = [
        leaf if move is None else (leaf + move).astype(jnp.result_type(leaf))
        for leaf, move in zip(problem.leaves, moves, strict=True)
    ]
    after = program.evaluate(moved, consts)
    terms = []
    for node in graph.losses:
        assert node.output is not None
        equation = next(e for e in program.equations if node.output in e.outputs)
        prediction, labels = equation.inputs
        start = read(problem.values, prediction)
        terms.append(
            (
                equation,
                start,
                read(after, prediction) - start,
                read(problem.values, labels),
                problem.loss_weights[node.index],
            )
        )

    def value(length: Array) -> Array:
        total = jnp.zeros(())
        for equation, start, way, labels, weight in terms:
            values = {}
            stepped = equation.bind(start + length * way, labels)
            values.update(zip(equation.outputs, stepped, strict=True))
            rows = values[equation.outputs[0]]
            far = jnp.sum(jnp.square(length * way), axis=-1) / (2 * problem.prox_step)
            per_row = weight[..., 0] if jnp.ndim(weight) else weight
            total = total + jnp.sum(per_row * (rows + far))
        return total

    return minimise_convex(value)


def minimise_convex(value: Any) -> Float[Array, ""]:
    """`argmin_{τ ≥ 0}` of a convex function of one number, by Newton steps inside a bracket."""
    slope = jax.grad(value)
    curvature = jax.grad(slope)

    def body(_: int, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        low, high, at = state
        rise, bend = slope(at), curvature(at)
        low, high = jnp.where(rise < 0, at, low), jnp.where(rise < 0, high, at)
        step = at - rise / jnp.where(bend > 0, bend, jnp.inf)
        # Outside of the bracket, or where the function is flat: halve it, or go further out.
        inner = jnp.where(jnp.isinf(high), 2 * low + 1, (low + high) / 2)
        good = (step > low) & (step < high) & (bend > 0)
        return low, high, jnp.where(good, step, inner)

    zero = jnp.zeros(())
    start = (zero, jnp.asarray(jnp.inf), zero)
    _, _, at = jax.lax.fori_loop(0, _ITERATIONS, body, start)
    return jnp.where(slope(zero) < 0, at, 0.0)
