"""Optimisers of the paper: a few steps of a solver on each batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from pjax.backend import shardings
from pjax.compile import rolled
from pjax.metrics import Metric, Uniform
from pjax.options import Fallback, Fanout, Splitting
from pjax.problem import Formulation, Layout, Problem, first_vectors, layout
from pjax.program import Program, leaves_of
from pjax.sets import Set, into
from pjax.solvers import ResidualHistory, Solver
from pjax.trace import trace
from pjax.training.checks import (
    MISSING,
    Checks,
    raise_if_unsound,
    require_own_call,
    require_relaxation,
)
from pjax.training.checks import check as check_solve
from pjax.training.within import sets_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimizerState:
    """What one batch hands on to the next; see [`Optimizer`][].

    **Attributes:**

    - `vectors`: for each slot where its power iteration goes on, or None.
    """

    vectors: tuple[Any, ...]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    layout: Layout,
    solver: Solver,
    check: bool,
    *arrays: Any,
) -> tuple[list[Any], ResidualHistory, Checks | None, OptimizerState | None]:
    return rolled(functools.partial(_solved, layout, solver, check))(*arrays)


def _solved(
    layout: Layout,
    solver: Solver,
    check: bool,
    leaves: Sequence[Any],
    consts: Sequence[Any],
    state: OptimizerState | None,
    relaxation: Any,
    sets: Sequence[Set | None],
) -> tuple[list[Any], ResidualHistory, Checks | None, OptimizerState | None]:
    problem = Problem(layout, leaves, consts, None if state is None else state.vectors, sets)
    solution, history = solver.solve(problem)
    moved = [
        leaf
        if move is None
        else shardings.alike((leaf + relaxation * move).astype(jnp.result_type(leaf)), leaf)
        for leaf, move in zip(leaves, problem.parameter_deviations(solution), strict=True)
    ]
    # A relaxation leads out of a set that is not convex, and the sum has rounded.
    moved = [into(one, leaf) for one, leaf in zip(sets, moved, strict=True)] if sets else moved
    history = replace(history, violations=problem.violations())
    checks = check_solve(leaves, consts, history.loss, moved) if check else None
    new = None if state is None else OptimizerState(tuple(problem.vectors))
    return moved, history, checks, new


@dataclass(frozen=True)
class Optimizer:
    """Moves parameters by the steps of a solver on the problem of each batch.

    The named optimisers below make one; use this class for a solver of your own.

    **Arguments:**

    - `solver`: from `pjax.solvers`, or your own.
    - `metric`: weights of the distances and prox step of the losses.
    - `fanout`: `"paper"` or `"exact"`, see [`pjax.feasibility_problem`][].
    - `splitting`: `"neuron"` or `"layer"`.
    - `check`: raise an error for parameters, data or a loss that are not finite; it waits for the
        result of each update.
    - `fallback`: see [`pjax.feasibility_problem`][].
    - `sets`: in which parameters are to lie: a prefix of their tree whose leaves are sets of
        `pjax.sets` or None. In the solve a parameter is the point of its set that is nearest to
        what its readers ask, in the weights with which they do; it is in the set after each update.
    """

    solver: Solver
    metric: Metric = Uniform()  # noqa: RUF009 - frozen
    fanout: Fanout = "paper"
    splitting: Splitting = "neuron"
    check: bool = True
    fallback: Fallback | None = None
    sets: PyTree[Set | None] = None

    def init(
        self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array] = MISSING
    ) -> OptimizerState:
        """A state for `update`, from a function and parameters of the right shapes."""
        require_own_call(self, fn, params)
        program, leaves, consts, _ = trace(fn, params)
        return OptimizerState(first_vectors(self.layout(program), leaves, consts))

    @overload
    def update(
        self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array], *, relaxation: Any = 1.0
    ) -> tuple[PyTree[Array], ResidualHistory]: ...

    @overload
    def update(
        self,
        fn: Callable[[PyTree[Array]], Array],
        params: PyTree[Array],
        state: OptimizerState,
        *,
        relaxation: Any = 1.0,
    ) -> tuple[PyTree[Array], ResidualHistory, OptimizerState]: ...

    def update(
        self,
        fn: Callable[[PyTree[Array]], Array],
        params: PyTree[Array] = MISSING,
        state: OptimizerState | None = None,
        *,
        relaxation: Any = 1.0,
    ) -> Any:
        """Solves the problem of `fn` from `params`.

        **Arguments:**

        - `fn`: parameters to loss; it closes over the batch.
        - `params`: a pytree of arrays; integer leaves stay as they are.
        - `state`: from `init` or the update before: power iterations go on where they ended.
        - `relaxation`: a factor on the move of the parameters, such as a schedule from 1 to 0.

        **Returns:** `(params, residual)`: the new parameters, and the [`ResidualHistory`][] of
        the solve; with a state `(params, residual, state)`.

        **Raises:** [`pjax.TraceError`][], [`pjax.NonFiniteError`][], `ValueError` (see `check`),
        `TypeError` for a call as Optax makes it.
        """
        kinds = (OptimizerState, type(None))
        require_own_call(self, fn, params, state, kinds)
        require_relaxation(relaxation)
        program, leaves, consts, _ = trace(fn, params)
        apart = leaves_of(params)
        sets = sets_of(self.sets, params, apart)
        anywhere = PartitionSpec()
        moved, history, checks, new = shardings.automatic(
            functools.partial(_solve, self.layout(program), self.solver, self.check),
            leaves,
            consts,
            state,
            relaxation,
            sets,
            like=(list(map(shardings.spec, leaves)), anywhere, anywhere, anywhere),
        )
        if checks is not None:
            raise_if_unsound(program.leaves, consts, checks)
        result = apart.tree(moved)
        return (result, history) if new is None else (result, history, new)

    def problem(self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]) -> Problem:
        """The problem that `update` would solve, to look at."""
        program, leaves, consts, _ = trace(fn, params)
        sets = sets_of(self.sets, params, leaves_of(params))
        return Problem(self.layout(program), leaves, consts, None, sets)

    def lower(self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]) -> Any:
        """The update lowered but not run, like `jax.jit(f).lower(…)`:
        `.compile().memory_analysis()`.
        """
        program, leaves, consts, _ = trace(fn, params)
        found = self.layout(program)
        sets = sets_of(self.sets, params, leaves_of(params))
        return _solve.lower(found, self.solver, self.check, leaves, consts, None, 1.0, sets)

    def layout(self, program: Program) -> Layout:
        """The layout of a traced program's problem, as this optimiser's solver needs it."""
        options = Formulation(self.metric, self.fanout, self.splitting, fallback=self.fallback)
        found = layout(program, options.for_solver(self.solver))
        require_moving([found])
        return found


def require_moving(layouts: Sequence[Layout]) -> None:
    """Raises `ValueError` if the metric lets no parameter move."""
    stiff = [
        is_stiff
        for found in layouts
        for slot, is_stiff in zip(found.graph.slots, found.stiff, strict=True)
        if slot.kind == "weight"
    ]
    if stiff and all(stiff):
        raise ValueError(
            "All parameters are stiff in this metric, so no update would move them: give "
            "`Spectral(parameters=…)` a number, or use `pjax.optim.Projection` or "
            "`pjax.value_and_displacement`."
        )
