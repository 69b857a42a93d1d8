"""How many parallel steps a batch needs: in each, a request goes one layer further."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import pjax
from benchmarks.accuracy_tasks import Task
from pjax.solvers import AlternatingProjections

#: The cosine from which on two displacements of a parameter have one direction.
AGREEMENT = 0.95


def steps_needed(task: Task, params: Any, batch: tuple[Array, Array], most: int) -> int | None:
    """The least number of alternating projection steps after which the displacement of every
    parameter has the direction that one cyclic sweep gives it; None if `most` are too few.
    """
    loss = task.loss("pure")
    sweep = jax.tree.leaves(jax.jit(pjax.displacement(loss))(params, batch))
    solver = AlternatingProjections(1)

    def cosines(params: Any) -> Array:
        problem = pjax.feasibility_problem(loss, params, batch, splitting="layer")

        def step(state: Any, _: None) -> tuple[Any, Array]:
            state = solver.step(problem, state).state
            forces = problem.parameter_forces(state)
            return state, jnp.stack([
                jnp.zeros(()) if force is None else -_cosine(force, moved)
                for force, moved in zip(forces, sweep, strict=True)
            ])  # fmt: skip

        return jax.lax.scan(step, problem.initial(), None, length=most)[1]

    agree = np.asarray(jax.jit(cosines)(params)).min(axis=1) >= AGREEMENT
    return int(np.argmax(agree)) + 1 if agree.any() else None


def _cosine(a: Array, b: Array) -> Array:
    lengths = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.sum(a * b) / jnp.where(lengths > 0, lengths, 1)
