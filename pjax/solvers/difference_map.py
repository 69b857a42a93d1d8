"""The difference map."""

from __future__ import annotations

from dataclasses import dataclass

from pjax.solvers.solver import Solver, Step, affine, require_two


@dataclass(frozen=True)
class DifferenceMap(Solver):
    """`z ← z + β (P_A(f_B(z)) − P_B(f_A(z)))`, `f_A(z) = P_A(z) − (P_A(z) − z)/β`,
    `f_B(z) = P_B(z) + (P_B(z) − z)/β`; the solution is `P_B(f_A(z))`.

    **Arguments:**

    - `steps`: how many.
    - `beta`: β, not 0; 1 gives Douglas–Rachford.
    - `change_projection_order`: exchange A and B.

    Source: V. Elser, *Phase retrieval by iterated projections* (2003).
    """

    beta: float = 1.0
    change_projection_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 0:
            raise ValueError("`beta` must not be 0.")

    def step(self, problem, state):
        first, second = require_two(problem, self.change_projection_order)
        beta = self.beta
        onto_first = problem.project(first, state)
        towards = affine((1 - 1 / beta, onto_first), (1 / beta, state))
        low = problem.project(second, towards)
        onto_second = problem.project(second, state)
        away = affine((1 + 1 / beta, onto_second), (-1 / beta, state))
        high = problem.project(first, away)
        end = affine((1.0, state), (beta, high), (-beta, low))
        # `high` satisfies the first set and `low` the second: as for Douglas–Rachford.
        return Step(
            end,
            lambda: (problem.distance(onto_first, state), problem.distance(onto_second, state)),
            low,
            high,
            residual=lambda: problem.distance(high, low),
            size=lambda: abs(beta) * problem.distance(high, low),
        )

    def solution(self, problem, state):
        first, second = require_two(problem, self.change_projection_order)
        onto_first = problem.project(first, state)
        towards = affine((1 - 1 / self.beta, onto_first), (1 / self.beta, state))
        return problem.project(second, towards)
