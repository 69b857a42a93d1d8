"""Solvers that reflect in sets: Douglas–Rachford, between two and around a cycle, and others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp

from pjax.solvers.solver import Sets, Solver, State, Step, affine, require_two


@dataclass(frozen=True)
class DouglasRachford(Solver):
    """`z ← z + γ (P_B(2 P_A(z) − z) − P_A(z))`; the solution is the shadow `P_A(z)`.

    **Arguments:**

    - `steps`: how many.
    - `relaxation`: γ in (0, 2); 1 is the classical method.
    - `change_projection_order`: exchange A and B.

    Source: Douglas and Rachford (1956); Lions and Mercier (1979); arXiv 2506.05878, section 3.
    """

    relaxation: float = 1.0
    change_projection_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"`relaxation` must be between 0 and 2, got {self.relaxation}.")

    def step(self, problem, state):
        first, second = require_two(problem, self.change_projection_order)
        return reflect(problem, first, second, state, self.relaxation)

    def solution(self, problem, state):
        return problem.project(require_two(problem, self.change_projection_order)[0], state)


@dataclass(frozen=True)
class CyclicDouglasRachford(Solver):
    """`z ← T_{m,1} … T_{2,3} T_{1,2} z` with `T_{i,j} z = z + γ (P_j(2 P_i(z) − z) − P_i(z))`.

    The sets are the levels of the graph from the losses to the parameters.

    **Arguments:**

    - `steps`: how many sweeps.
    - `relaxation`: γ in (0, 2).
    - `change_projection_order`: sweep from the parameters to the losses.

    Source: Borwein and Tam, *A cyclic Douglas–Rachford iteration scheme* (2014).
    """

    relaxation: float = 1.0
    change_projection_order: bool = False

    grouping: ClassVar = "levels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.relaxation < 2:
            raise ValueError(f"`relaxation` must be between 0 and 2, got {self.relaxation}.")

    def step(self, problem, state):
        order = list(range(problem.num_groups))
        if self.change_projection_order:
            order.reverse()
        end, parts = state, []
        for first, second in zip(order, [*order[1:], order[0]], strict=True):
            part = reflect(problem, first, second, end, self.relaxation)
            parts.append(part)
            end = part.state
        return Step(
            end,
            lambda: tuple(part.distances()[0] for part in parts),
            parts[0].before,
            parts[0].after,
            lambda: jnp.sqrt(sum(jnp.square(part.residual()) for part in parts)),
        )

    def solution(self, problem, state):
        # The fixed points of the whole cycle project onto the intersection from any of the sets.
        return problem.project(0, state)


def reflect(problem: Sets, first: int, second: int, state: State, relaxation: Any) -> Step:
    """`z + γ (P_j(2 P_i(z) − z) − P_i(z))`: the step that all reflecting methods share."""
    shadow = problem.project(first, state)
    reflected = affine((2.0, shadow), (-1.0, state))
    moved = problem.project(second, reflected)
    end = affine((1.0, state), (relaxation, moved), (-relaxation, shadow))
    # The shadow satisfies the one set and `moved` the other: their distance bounds how far each is
    # from the set that is not its own, and vanishes at a solution. The state and its reflection
    # need not approach either set.
    return Step(
        end,
        lambda: (problem.distance(shadow, state), problem.distance(moved, reflected)),
        shadow,
        moved,
        residual=lambda: problem.distance(moved, shadow),
        size=lambda: relaxation * problem.distance(moved, shadow),
    )


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
