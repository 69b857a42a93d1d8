"""Where an update leaves parameters that are to stay in sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from pjax.problem import Problem
from pjax.projections import spectrum
from pjax.projections.products.rows import dot
from pjax.sets import Set
from pjax.training.memory import Memory
from pjax.training.moments import Stacks
from pjax.training.readers import Units
from pjax.training.solve import Plan, limit, stiffnesses
from pjax.training.within import minimum


class Step(NamedTuple):
    """What is made of moves where parameters are to stay in sets.

    **Attributes:**

    - `sets`: for each leaf its set or None; nothing where there are none.
    - `keep`, `relaxation`: factors on the parameter, and on the move.
    """

    sets: Sequence[Set | None] = ()
    keep: Any = 1.0
    relaxation: Any = 1.0


class End(NamedTuple):
    """Where a parameter in a set ends, and the move that leads there, to remember."""

    leaf: int
    end: Array
    move: Array


def ends_in_sets(
    problem: Problem,
    units: Units,
    stacks: Stacks,
    memory: Memory,
    plan: Plan,
    step: Step,
    solved: Sequence[Array],
    asked: Sequence[Array],
    lengths: Sequence[Array],
) -> dict[int, End]:
    """For parameters in sets, by the number of the unit.

    What counts against the limit of a move is what it explains within the set: where a set refuses
    most of what is asked, and it is asked again and again, the rest is not to be shorter for it.
    """
    leaves = {
        number: leaf
        for number, unit in enumerate(units.units)
        if step.sets
        and problem.graph.nodes[unit.node].kind == "parameter"
        and (leaf := problem.graph.nodes[unit.node].output) is not None
        and step.sets[leaf] is not None
    }
    stiffness = stiffnesses(problem, units, stacks, memory, plan, list(leaves))
    found = {}
    for number, leaf in leaves.items():
        one, free = step.sets[leaf], solved[number]
        assert one is not None
        length = (step.relaxation * lengths[number]).astype(free.dtype)
        start = step.keep * problem.values[leaf]
        end = minimum(one, start, start + length * free, *stiffness[number])
        move = (end - start) * spectrum.inverse(length)
        share = limit(dot(asked[number], move), plan.squares[number]).astype(free.dtype)
        end = jnp.where(share < 1, one.project(start + share * (end - start)), end)
        found[number] = End(leaf, end.astype(free.dtype), (share * move).astype(free.dtype))
    return found


__all__ = ["End", "Step", "ends_in_sets"]
