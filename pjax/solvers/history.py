"""Residuals of a solve, and what they say about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int


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
    - `violations`: how far the forward pass was from the sets of `pjax.constrain`, by the line of
        the call.

    `float(history)` is the last residual.
    """

    distances: Float[Array, "steps sides"]
    residual: Float[Array, " steps"]
    step_size: Float[Array, " steps"]
    gap: Float[Array, " steps"]
    gap_change: Float[Array, " steps"]
    loss: Float[Array, "..."]
    violations: dict[str, Float[Array, ""]] = field(default_factory=dict)

    @property
    def total(self) -> Float[Array, " steps"]:
        """`(Σ_sides distance²)^½` per step."""
        return vector_length(self.distances)

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


def vector_length(distances: Array) -> Array:
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
