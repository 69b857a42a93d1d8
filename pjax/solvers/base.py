"""What every solver is: a step over the projections of a problem, and the history of a solve."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from pjax.graph import Fallback, Splitting
from pjax.metrics import Metric
from pjax.problem import Fanout, Grouping, Layout, State, layout
from pjax.rolling import rolled_scan
from pjax.trace import Program


class Verdict(enum.IntEnum):
    """What the residual history says of a solve.

    - `CONVERGING`: the residual (see [`ResidualHistory`][]) vanishes, or still shrinks: by a
        thousandth in the last quarter of the steps, or by less and no slower than in the quarter
        before.
    - `STALLED`: it neither shrinks nor settles.
    - `INFEASIBLE`: the gap vector between the sets is stable and does not vanish, and the residual
        has stopped to shrink: as far as these steps can tell, no point near here satisfies all
        constraints.
    - `DIVERGED`: the residual has grown far beyond that at the start.
    - `NON_FINITE`: a residual is NaN or infinite.
    """

    CONVERGING = 0
    STALLED = 1
    INFEASIBLE = 2
    DIVERGED = 3
    NON_FINITE = 4

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")


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


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ResidualHistory:
    """The residuals of a solve, one row per step.

    **Attributes:**

    - `distances`: `(steps, sides)`: the distance to the constraints of each side (of each level
        for cyclic solvers), in the metric and in the order of projection: how far the projection
        moved its point; slots that stand for copies count all of them.
    - `residual`: `(steps,)`: what vanishes at a solution: `total`, and for reflecting methods the
        distance between the projections onto the two sides, see [`Step`][].
    - `step_size`: `(steps,)`: how far the state moved.
    - `gap`: `(steps,)`: the length of the gap vector between the sets.
    - `gap_change`: `(steps,)`: how far the gap vector moved since the step before.
    - `loss`: the function's value in the forward pass that began the solve.

    `float(history)` is the last residual.
    """

    distances: Float[Array, "steps sides"]
    residual: Float[Array, " steps"]
    step_size: Float[Array, " steps"]
    gap: Float[Array, " steps"]
    gap_change: Float[Array, " steps"]
    loss: Float[Array, "..."]

    @property
    def total(self) -> Float[Array, " steps"]:
        """`(Σ_sides distance²)^½` per step."""
        return _length(self.distances)

    @property
    def verdict_code(self) -> Int[Array, ""]:
        """The [`Verdict`][] as a number, also inside `jit`."""
        return _verdict(self.residual, self.gap, self.gap_change, self.step_size)

    @property
    def verdict(self) -> Verdict:
        """What the history says; needs concrete values, so not inside `jit`."""
        return Verdict(int(self.verdict_code))

    def __len__(self) -> int:
        return self.distances.shape[0]

    def __float__(self) -> float:
        return float(self.residual[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.residual[-1], dtype=dtype)

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    def __repr__(self) -> str:
        concrete = isinstance(self.residual, jax.Array) and not isinstance(self.residual, Tracer)
        if not concrete or self.residual.ndim != 1:  # inside `jit`, under `vmap`
            return f"ResidualHistory(residual of shape {getattr(self.residual, 'shape', None)})"
        first, last = float(self.residual[0]), float(self.residual[-1])
        return (
            f"ResidualHistory({len(self)} steps, residual {first:.3g} to {last:.3g}, "
            f"verdict {self.verdict})"
        )


def _length(distances: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(distances), axis=-1))


#: Below this share of the first residual a solve counts as feasible.
_FEASIBLE = 1e-5
#: The last quarter of the steps must shrink the residual by this share to count as converging.
_SHRINKING = 1e-3
#: The gap vector is stable if the last quarter of the steps moves it by less than this share of
#: its length.
_STABLE = 0.01
_DIVERGED = 10.0


#: A residual that shrinks by this share of what it did a window before does not settle yet.
_STEADY = 0.7


def _verdict(residual: Array, gap: Array, gap_change: Array, step_size: Array) -> Array:
    steps = residual.shape[0]
    window = max(steps // 4, 1)
    start = max(steps - 1 - window, 0)
    scale = jnp.max(residual[: max(steps // 4, 1)])
    last, early = residual[-1], residual[start]
    # A cyclic or reflecting method may settle in its gap while single distances still wobble.
    shrinking = (last < (1 - _SHRINKING) * early) | (steps == 1)
    # A problem that is solved slowly shrinks by little, and by as much as before.
    rounding = 8 * jnp.finfo(residual.dtype).eps
    shrunk, before = early - last, residual[max(start - window, 0)] - early
    if start > window:
        shrinking |= (shrunk > rounding * early) & (shrunk > _STEADY * before)
    vanished = last <= _FEASIBLE * scale
    # States that drift have gaps that are rounded by more than they change.
    noise = rounding * jnp.cumsum(step_size)
    stable = jnp.sum(jnp.maximum(gap_change - noise, 0)[-window:]) <= _STABLE * gap[-1]
    stable &= gap[-1] > _FEASIBLE * scale
    code = jnp.where(
        vanished | shrinking,
        Verdict.CONVERGING,
        jnp.where(
            last > _DIVERGED * scale,
            Verdict.DIVERGED,
            jnp.where(stable, Verdict.INFEASIBLE, Verdict.STALLED),
        ),
    )
    finite = jnp.all(jnp.isfinite(residual)) & jnp.all(jnp.isfinite(gap))
    return jnp.where(finite, code, Verdict.NON_FINITE)


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
                _length(distances) if new.residual is None else new.residual(),
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
            carry, found = (_at_rest(problem), initial), []
            for _ in range(self.steps):
                carry, row = body(carry)
                found.append(row)
            state, rows = carry[0], jax.tree_util.tree_map(lambda *x: jnp.stack(x), *found)
        return self.solution(problem, state), ResidualHistory(*rows, loss=problem.loss)

    def run(self, problem: Sets) -> State:
        """All steps from the forward pass, without the history of distances.

        The first step begins at rest, where most of the work is to be saved; a few steps are not
        worth a loop.

        **Returns:** the solution point.

        **Raises:** `ValueError` if the problem was made for another kind of solver.
        """
        problem.require(self.grouping, self.reflecting)
        state = problem.initial() if self.reflecting else _at_rest(problem)
        first = min(self.steps, 1 if self.steps > _UNROLLED else self.steps)
        for _ in range(first):
            state = self.step(problem, state).state
        if self.steps > first:
            state, _ = rolled_scan(
                lambda now: (self.step(problem, now).state, None), state, self.steps - first
            )
        return self.solution(problem, state)


def _at_rest(problem: Sets) -> State:
    """The initial state, in the cheaper form that some problems have for it."""
    return getattr(problem, "at_rest", problem.initial)()


#: Up to so many steps are compiled one after the other.
_UNROLLED = 2


def layout_for(
    solver: Solver,
    program: Program,
    metric: Metric,
    fanout: Fanout,
    splitting: Splitting,
    fallback: Fallback | None = None,
) -> Layout:
    """The layout of a traced program's problem, as a solver needs it."""
    return layout(
        program,
        metric=metric,
        fanout=fanout,
        splitting=splitting,
        grouping=solver.grouping,
        reflecting=solver.reflecting,
        fallback=fallback,
    )


def first_vectors(vectors: Callable[..., Sequence[Any]], *args: Any) -> tuple[Any, ...]:
    """Where power iterations begin: where those of `vectors(*args)` end, without a state before."""
    return tuple(jax.jit(vectors)(*args))


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
