"""What a solver of a user's choice starts from: a layout, and start vectors of power iterations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from pjax.metrics import Metric
from pjax.options import Fallback, Fanout, Splitting
from pjax.problem import Layout, layout
from pjax.program import Program
from pjax.solvers import Solver


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
