"""A solve seen node by node: how far each has moved and what it still misses, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjax.problem import Problem
from pjax.solvers import Solver


@dataclass(frozen=True)
class Profile:
    """What [`pjax.profile`][] found.

    **Attributes:**

    - `names`: `"<index> <name>"` of each node, from the losses backwards, the parameters last.
    - `deviation`: `(Σ ρ |δ|²)^½` over the slots of each node, after each step; slots that rest
        count the length of the force on them.
    - `residual`: the distance to each node's constraint; of a loss, how far its prox would move it.
    """

    names: tuple[str, ...]
    deviation: Float[Array, "steps nodes"]
    residual: Float[Array, "steps nodes"]


def profile(problem: Problem, solver: Solver) -> Profile:
    """Runs a solver from the forward pass and looks at every node after every step.

    **Arguments:**

    - `problem`: a problem made for the kind of solver, with `splitting="layer"`, or with
        `reflecting=True`: residuals need the copies.
    - `solver`: from `pjax.solvers`.

    **Returns:** a [`Profile`][].

    **Raises:** `ValueError` if the problem was made for another kind of solver, or keeps only means
    of copies.
    """
    problem.require(solver.grouping, solver.reflecting)
    formulation = problem.layout.formulation
    if formulation.splitting == "neuron" and not formulation.reflecting:
        raise ValueError(
            "A profile needs the copies of operands, and this problem keeps their means: make it "
            'with `reflecting=True`, or with `splitting="layer"`.'
        )
    order = problem.graph.backward_order()
    nodes = [problem.graph.nodes[index] for index in order]
    names = tuple(f"{node.index} {node.name}" for node in nodes)

    def look(state, _):
        state = solver.step(problem, state).state
        point = solver.solution(problem, state)
        residuals = problem.residuals(point)
        deviation = jnp.stack([problem.node_deviation(node, point) for node in nodes])
        return state, (deviation, jnp.stack([residuals[name] for name in names]))

    start = solver.start(problem, problem.initial())
    _, (deviation, residual) = jax.lax.scan(look, start, None, length=solver.steps)
    return Profile(names, deviation, residual)
