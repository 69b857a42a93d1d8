"""What every solver is: a step over the projections onto the sets of a problem, and its history."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pjax.compile import rolled_scan
from pjax.options import Grouping
from pjax.solvers.history import ResidualHistory, vector_length

#: A state is any pytree.
State = Any


class Sets(Protocol):
    """What a solver needs to know of a problem: the projections onto its sets, and distances.

    [`pjax.Problem`][] is one; a state is any pytree.
    """

    @property
    def num_groups(self) -> int:
        """How many sets there are."""
        ...

    @property
    def loss(self) -> Array:
        """What the history reports as the loss."""
        ...

    def require(self, grouping: Grouping, reflecting: bool, /) -> None:
        """Raises `ValueError` if the sets are not such, or states cannot be combined."""
        ...

    def initial(self) -> Any:
        """The state to start from: zero in every entry."""
        ...

    def project(self, group: int, state: Any, /) -> Any:
        """The nearest point of a set."""
        ...

    def difference(self, a: Any, b: Any, /) -> Any:
        """`a − b`."""
        ...

    def distance(self, a: Any, b: Any, /) -> Float[Array, ""]:
        """`‖a − b‖`."""
        ...


class Step(NamedTuple):
    """One step of a solver.

    **Attributes:**

    - `state`: where it leads: what the solver carries.
    - `distances`: gives for each side, in the order of projection, the distance to its constraints
        in the metric: how far the projection onto it moved its point. A function, since a solve
        without a history never asks.
    - `before`, `after`: two states; their difference is the step's estimate of the gap vector.
    - `residual`: gives what vanishes at a solution. By default `(Σ_sides distance²)^½`; a
        reflecting method, whose points need not approach the sets, has the distance between the
        projections onto the two sides.
    - `size`: gives how far the state moved; by default that is measured, which needs a state of the
        problem.
    """

    state: State
    distances: Callable[[], tuple[Float[Array, ""], ...]]
    before: State
    after: State
    residual: Callable[[], Float[Array, ""]] | None = None
    size: Callable[[], Float[Array, ""]] | None = None


def require_two(problem: Sets, order: bool) -> tuple[int, int]:
    """The two groups in the order of projection: A, which holds the loss, first unless `order`."""
    assert problem.num_groups == 2
    return (1, 0) if order else (0, 1)


def affine(*terms: tuple[Any, State]) -> State:
    """`Σ c·state`, for states whose copies are stored: those of a solver that reflects.

    >>> affine((2.0, jnp.ones(2)), (-1.0, jnp.arange(2.0)))
    Array([2., 1.], dtype=float32)
    """
    coefficients = [coefficient for coefficient, _ in terms]
    return jax.tree_util.tree_map(
        lambda *arrays: sum(
            (c * a for c, a in zip(coefficients[1:], arrays[1:], strict=True)),
            start=coefficients[0] * arrays[0],
        ),
        *(state for _, state in terms),
    )


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

    def start(self, problem: Sets, state: State) -> State:
        """What the solver carries from step to step, at the problem's initial `state`: that state,
        or any pytree that holds more, such as a count or a memory.
        """
        return state

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
            start = self.start(problem, initial)
            (state, _), rows = rolled_scan(body, (start, initial), self.steps)
        else:
            # Single steps need no loop, and what of their history is not used is not computed.
            carry, found = (self.start(problem, _unmoved(problem)), initial), []
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
        state = self.start(problem, problem.initial() if self.reflecting else _unmoved(problem))
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
