"""The two sets between which a solver goes, and its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
from jaxtyping import Array, Float

from pjax.options import Grouping

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

    - `state`: where it leads.
    - `distances`: gives for each side, in the order of projection, the distance to its constraints
        in the metric: how far the projection onto it moved its point. A function, since a solve
        without a history never asks.
    - `before`, `after`: two states; their difference is the step's estimate of the gap vector.
    - `residual`: gives what vanishes at a solution. By default `(Σ_sides distance²)^½`; a
        reflecting method, whose points need not approach the sets, has the distance between the
        projections onto the two sides.
    - `size`: gives how far the state moved; by default that is measured.
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


def affine(*terms: tuple[float, State]) -> State:
    """`Σ c·state`, for states whose copies are stored."""
    coefficients = [coefficient for coefficient, _ in terms]
    return jax.tree_util.tree_map(
        lambda *arrays: sum(
            (c * a for c, a in zip(coefficients[1:], arrays[1:], strict=True)),
            start=coefficients[0] * arrays[0],
        ),
        *(state for _, state in terms),
    )
