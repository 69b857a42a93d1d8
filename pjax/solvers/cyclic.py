"""Cyclic projections: one level of the graph after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pjax.solvers.sets import Step
from pjax.solvers.solver import Solver


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
