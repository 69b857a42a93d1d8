"""Alternating projections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pjax.solvers.sets import Step, require_two
from pjax.solvers.solver import Solver


@dataclass(frozen=True)
class AlternatingProjections(Solver):
    """`z ← P_B(P_A(z))`.

    **Arguments:**

    - `steps`: how many.
    - `change_projection_order`: project onto B, then A.

    Source: von Neumann; arXiv 2506.05878, section 3.
    """

    change_projection_order: bool = False

    reflecting: ClassVar[bool] = False

    def step(self, problem, state):
        first, second = require_two(problem, self.change_projection_order)
        middle = problem.project(first, state)
        end = problem.project(second, middle)
        return Step(
            end,
            lambda: (problem.distance(middle, state), problem.distance(end, middle)),
            middle,
            end,
        )
