"""Alternating reflections."""

from __future__ import annotations

from dataclasses import dataclass

from pjax.solvers.douglas_rachford import reflect
from pjax.solvers.sets import require_two
from pjax.solvers.solver import Solver


@dataclass(frozen=True)
class AlternatingReflections(Solver):
    """`z ← (1 − γ) z + γ R_B(R_A(z))` with `R = 2 P − Id`; the solution is the shadow `P_A(z)`.

    **Arguments:**

    - `steps`: how many.
    - `relaxation`: γ in (0, 1]; 1 is Peaceman–Rachford, which need not converge (between two
        lines it goes round for ever), 1/2 is Douglas–Rachford.
    - `change_projection_order`: exchange A and B.

    Source: Peaceman and Rachford (1955).
    """

    relaxation: float = 1.0
    change_projection_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation <= 1:
            raise ValueError(f"`relaxation` must be in (0, 1], got {self.relaxation}.")

    def step(self, problem, state):
        # R_B R_A z = 2 P_B(r) − r with r = R_A z, so it is z + 2 (P_B(r) − P_A(z)).
        first, second = require_two(problem, self.change_projection_order)
        return reflect(problem, first, second, state, 2 * self.relaxation)

    def solution(self, problem, state):
        return problem.project(require_two(problem, self.change_projection_order)[0], state)
