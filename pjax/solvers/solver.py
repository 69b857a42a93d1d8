"""What every solver is: a step over the projections of a problem, and the history of a solve."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from pjax.compile import rolled_scan
from pjax.options import Grouping
from pjax.solvers.history import ResidualHistory, vector_length
from pjax.solvers.sets import Sets, State, Step


@dataclass(frozen=True)
class Solver(ABC):
    """An iteration over the projections of a problem; it knows nothing of networks.

    **Attributes:**

    - `steps`: how many steps a solve takes.
    - `reflecting`: whether copies of an entry may differ between steps, so that they must be
      stored.
    - `grouping`: the sets it projects onto: two colours, or levels.
    """

    steps: int = 50

    # The safe choice: only a method that projects onto each operation at most once between two
    # consensus steps over its operands may do without the copies.
    reflecting: ClassVar[bool] = True
    grouping: ClassVar[Grouping] = "colours"

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"`steps` must be a whole number, at least 1, got {self.steps}.")

    @abstractmethod
    def step(self, problem: Sets, state: State) -> Step:
        """One step."""

    def solution(self, problem: Sets, state: State) -> State:
        """The point that the state stands for (the shadow, for reflecting methods)."""
        return state

    def solve(self, problem: Sets) -> tuple[State, ResidualHistory]:
        """All steps from the forward pass.

        **Returns:** `(state, history)`; the state is the solution point.

        **Raises:** `ValueError` if the problem was made for another kind of solver.
        """
        problem.require(self.grouping, self.reflecting)

        def body(carry: Any) -> Any:
            state, last_gap = carry
            new = self.step(problem, state)
            gap = problem.difference(new.after, new.before)
            distances = jnp.stack(new.distances())
            row = (
                distances,
                vector_length(distances) if new.residual is None else new.residual(),
                problem.distance(new.state, state) if new.size is None else new.size(),
                problem.distance(new.after, new.before),
                problem.distance(gap, last_gap),
            )
            return (new.state, gap), row

        initial = problem.initial()
        if self.steps > _UNROLLED or self.reflecting:
            (state, _), rows = rolled_scan(body, (initial, initial), self.steps)
        else:
            # Single steps need no loop, and what of their history is not used is not computed.
            carry, found = (_unmoved(problem), initial), []
            for _ in range(self.steps):
                carry, row = body(carry)
                found.append(row)
            state, rows = carry[0], jax.tree_util.tree_map(lambda *x: jnp.stack(x), *found)
        return self.solution(problem, state), ResidualHistory(*rows, loss=problem.loss)

    def run(self, problem: Sets) -> State:
        """All steps from the forward pass, without the history of distances.

        The first step begins where nothing has moved, which saves most of its work; a few steps are
        not worth a loop.

        **Returns:** the solution point.

        **Raises:** `ValueError` if the problem was made for another kind of solver.
        """
        problem.require(self.grouping, self.reflecting)
        state = problem.initial() if self.reflecting else _unmoved(problem)
        first = min(self.steps, 1 if self.steps > _UNROLLED else self.steps)
        for _ in range(first):
            state = self.step(problem, state).state
        if self.steps > first:
            state, _ = rolled_scan(
                lambda now: (self.step(problem, now).state, None), state, self.steps - first
            )
        return self.solution(problem, state)


def _unmoved(problem: Sets) -> State:
    """The initial state, in the cheaper form that some problems have for it."""
    return getattr(problem, "unmoved", problem.initial)()


#: Up to so many steps are compiled one after the other.
_UNROLLED = 2
