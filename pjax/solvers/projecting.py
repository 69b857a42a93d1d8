"""Solvers that project in turn, onto two sets or onto all levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pjax.solvers.solver import Solver, Step, require_two


@dataclass(frozen=True)
class CyclicProjections(Solver):
    """`z ← P_m(… P_2(P_1(z)))` over reverse topological levels from the losses, the parameters
    last.

    What a loss asks for reaches every parameter in one step, whatever the depth.

    **Arguments:**

    - `steps`: how many sweeps.
    - `change_projection_order`: sweep from the parameters to the losses.

    Source: Bregman's cyclic projections; arXiv 2506.05878, section 3.
    """

    change_projection_order: bool = False

    reflecting: ClassVar[bool] = False
    grouping: ClassVar = "levels"

    def step(self, problem, state):
        order = list(range(problem.num_groups))
        if self.change_projection_order:
            order.reverse()
        points = [state]
        for group in order:
            points.append(problem.project(group, points[-1]))
        # The gap is what the losses ask for: at a least-distance cycle it stays while the sweep
        # rests.
        place = order.index(0)
        return Step(
            points[-1],
            lambda: tuple(map(problem.distance, points[1:], points)),
            points[place],
            points[place + 1],
        )


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
