"""How far to go along a move of the parameters: as far as the losses fall.

An extrapolated step in the sense of Pierra: projections that run side by side each move for
themselves, and their common move may be too short or too long. Its length is found where it can be
judged, at the losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjax.problem import Problem
from pjax.trace import read

_ITERATIONS = 10
#: A Newton step of less than this share of the length is the last.
_RESTING = 1e-2
#: Measured on MNIST at batch 32: 97.5 %; with 2 for each row 97.3 %, without a brake 95 % and less.
_BRAKE = 16.0


def line_search(
    problem: Problem,
    moves: Sequence[Array | None],
    consts: Sequence[Any],
    outputs: Mapping[int, Array],
) -> Float[Array, ""]:
    """`argmin_{τ ≥ 0} Σ_i c_i [loss_i(p_i + τ d_i) + |τ d_i|²/(2Λ)]`, a convex function of τ.

    `d` is what a forward pass with the moved parameters makes of the predictions `p`, less `p`; no
    derivative of the network is needed, only those of the losses along a line. The brake Λ is
    16 for each row that counts, times the mean loss where that is above 1: without it the few rows
    of a small batch are fitted at any price.

    **Arguments:**

    - `problem`: the batch's problem, with its forward pass.
    - `moves`: how far each leaf moves for τ = 1, or None.
    - `consts`: the arrays that the function captures.
    - `outputs`: for some variables how far they move, where the solve has found it.

    **Returns:** τ; 0 if no way ahead lowers the losses.
    """
    graph, program = problem.graph, problem.graph.program
    moved = [
        leaf if move is None else (leaf + move).astype(jnp.result_type(leaf))
        for leaf, move in zip(problem.leaves, moves, strict=True)
    ]
    known = {
        variable: (problem.values[variable] + move).astype(problem.forward[variable].dtype)
        for variable, move in outputs.items()
    }
    after = program.evaluate(moved, consts, known)
    lines = []
    for node in graph.losses:
        equation = graph.term(node).equation
        prediction, *labels = (read(problem.values, atom) for atom in equation.inputs)
        way = read(after, equation.inputs[0]) - prediction
        weight = problem.loss_weights[node.index]
        weight = weight[..., 0] if jnp.ndim(weight) else weight
        sign = jnp.sign(problem.prox_steps[node.index])
        lines.append((equation, prediction, way, labels, weight, sign))

    def losses(length: Any) -> Array:
        total = jnp.zeros(())
        for equation, prediction, way, labels, weight, sign in lines:
            (rows,) = equation.bind(prediction + length * way, *labels)
            # A row that counts negatively has its tangent in the place of the loss.
            start, slope = jax.jvp(
                lambda x, e=equation, known=labels: e.bind(x, *known)[0], (prediction,), (way,)
            )
            total = total + jnp.sum(
                weight * sign * jnp.where(sign < 0, start + length * slope, rows)
            )
        return total

    rows = problem.rows
    brake = _BRAKE * rows * jnp.maximum(losses(0.0) / rows, 1)
    far = sum(
        (jnp.sum(weight * jnp.sum(jnp.square(way), -1)) for _, _, way, _, weight, _ in lines),
        start=jnp.zeros(()),
    )
    return minimise_convex(lambda length: losses(length) + far * length**2 / (2 * brake))


class _Bracket(NamedTuple):
    """Where the minimum lies, the iterate, and whether it rests; whether the way ahead falls."""

    low: Array
    high: Array
    at: Array
    count: Array
    done: Array
    falls: Array


def minimise_convex(value: Any) -> Float[Array, ""]:
    """`argmin_{τ ≥ 0}` of a convex function of one number, by Newton steps inside a bracket."""
    slope = jax.grad(value)

    def bend_at(at: Array) -> tuple[Array, Array]:
        return jax.jvp(slope, (at,), (jnp.ones_like(at),))

    def body(state: _Bracket) -> _Bracket:
        rise, bend = bend_at(state.at)
        low = jnp.where(rise < 0, state.at, state.low)
        high = jnp.where(rise < 0, state.high, state.at)
        step = state.at - rise / jnp.where(bend > 0, bend, jnp.inf)
        # Outside of the bracket, or where the function is flat: halve it, or go further out.
        inner = jnp.where(jnp.isinf(high), 10 * low + 10, (low + high) / 2)
        good = (step >= low) & (step <= jnp.minimum(high, 10 * state.at + 10)) & (bend > 0)
        new = jnp.where(good, step, inner)
        rests = jnp.abs(new - state.at) <= _RESTING * state.at
        falls = jnp.where(state.count == 0, rise < 0, state.falls)
        return _Bracket(low, high, new, state.count + 1, rests | ~falls, falls)

    zero = jnp.zeros(())
    start = _Bracket(
        zero, jnp.asarray(jnp.inf), zero, jnp.zeros((), int), jnp.array(False), jnp.array(True)
    )
    found = jax.lax.while_loop(lambda state: (state.count < _ITERATIONS) & ~state.done, body, start)
    return jnp.where(found.falls, found.at, 0.0)
