"""The paper's optimisers: `update(fn, params)` solves the feasibility problem of one batch.

```python
optimizer = pjax.optim.DouglasRachford(steps_per_update=50)
params, residual = optimizer.update(lambda p: pjax.cross_entropy(model(p, x), y), params)
```

There is no learning rate and no optimiser state. A fresh closure for each batch does not compile
again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pjax import solvers
from pjax.extrapolation import line_search
from pjax.graph import Fallback
from pjax.metrics import Curved, Metric, Spectral, Uniform
from pjax.problem import Fanout, Layout, Problem, Splitting
from pjax.rolling import rolled
from pjax.solvers import ResidualHistory, Solver
from pjax.solvers.base import first_vectors, layout_for
from pjax.trace import Program, trace
from pjax.training.checks import Checks, NonFiniteError, raise_if_unsound
from pjax.training.checks import check as check_solve
from pjax.training.projection import Info, Projection, ProjectionState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OptimizerState:
    """What one batch hands on to the next; see [`Optimizer`][].

    **Attributes:**

    - `vectors`: for each slot where its power iteration goes on, or None.
    - `offset`: for each leaf how far the latest iterate is from the average, or None.
    - `count`: how many batches there were.
    """

    vectors: tuple[Any, ...]
    offset: tuple[Any, ...]
    count: Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _solve(
    layout: Layout,
    solver: Solver,
    extrapolate: bool,
    averaging: float | None,
    check: bool,
    *arrays: Any,
) -> tuple[list[Any], ResidualHistory, Checks | None, OptimizerState | None]:
    fixed = layout, solver, extrapolate, averaging, check
    return rolled(functools.partial(_solved, *fixed))(*arrays)


def _solved(
    layout: Layout,
    solver: Solver,
    extrapolate: bool,
    averaging: float | None,
    check: bool,
    leaves: Sequence[Any],
    consts: Sequence[Any],
    state: OptimizerState | None,
    relaxation: Any,
) -> tuple[list[Any], ResidualHistory, Checks | None, OptimizerState | None]:
    problem = Problem(layout, leaves, consts, None if state is None else state.vectors)
    solution, history = solver.solve(problem)
    moves = problem.parameter_moves(solution)
    length: Any = relaxation
    if extrapolate:
        length = relaxation * line_search(problem, moves, consts, problem.output_moves(solution))
    steps = [None if move is None else length * move for move in moves]
    new = None
    if state is not None:
        count = state.count + 1
        steps, offset = _averaged(steps, state.offset, averaging, count)
        new = OptimizerState(tuple(problem.vectors), offset, count)
    moved = [
        leaf if step is None else (leaf + step).astype(jnp.result_type(leaf))
        for leaf, step in zip(leaves, steps, strict=True)
    ]
    checks = check_solve(problem, consts, history.loss, moved) if check else None
    return moved, history, checks, new


def _averaged(
    steps: Sequence[Any], offset: Sequence[Any], averaging: float | None, count: Array
) -> tuple[list[Any], tuple[Any, ...]]:
    """The steps of the average, and how far the iterates are ahead of it.

    The iterates move by the steps found at the average, `z ← z + s(x)`, and the average follows
    them, `x ← x + c (z − x)` with `c = (a + 1)/(t + a)`: a mean with weights that grow like `t^a`.
    """
    if averaging is None:
        return list(steps), tuple(offset)
    share = (averaging + 1) / (count + averaging)
    ahead = [
        None if step is None else step + before for step, before in zip(steps, offset, strict=True)
    ]
    return (
        [None if z is None else share * z for z in ahead],
        tuple(None if z is None else (1 - share) * z for z in ahead),
    )


@dataclass(frozen=True)
class Optimizer:
    """Moves parameters by the steps of a solver on the problem of each batch.

    The named optimisers below make one; use this class for a solver of your own.

    **Arguments:**

    - `solver`: from `pjax.solvers`, or your own.
    - `metric`: weights of the distances and prox step of the losses.
    - `fanout`: `"paper"` or `"exact"`, see [`pjax.feasibility_problem`][].
    - `splitting`: `"neuron"` or `"layer"`.
    - `check`: raise an error for parameters, data or a loss that are not finite; it waits
        for the result of each update.
    - `extrapolate`: scale the whole move so that the losses, along the line to the predictions that
        it leads to, are least (with a brake): one more forward pass.
    - `averaging`: with a state, the parameters are a mean of the iterates, with weights that grow
        like the `averaging`-th power of the number of the batch; None: the last iterate.
    - `fallback`: see [`pjax.feasibility_problem`][].
    """

    solver: Solver
    metric: Metric = Uniform()  # noqa: RUF009 - frozen
    fanout: Fanout = "paper"
    splitting: Splitting = "neuron"
    check: bool = True
    extrapolate: bool = False
    averaging: float | None = None
    fallback: Fallback | None = None

    def init(self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]) -> OptimizerState:
        """A state for `update`, from a function and parameters of the right shapes."""
        program, leaves, consts, _ = trace(fn, params)
        found = self.layout(program)
        vectors = first_vectors(lambda *args: Problem(found, *args).vectors, leaves, consts)
        read = {node.output for node in found.graph.parameters}
        offset = tuple(
            jnp.zeros_like(leaf) if number in read else None for number, leaf in enumerate(leaves)
        )
        return OptimizerState(vectors, offset, jnp.zeros((), jnp.float32))

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
        params: PyTree[Array],
        state: OptimizerState | None = None,
        *,
        relaxation: Any = 1.0,
    ) -> Any:
        """Solves the problem of `fn` from `params`.

        **Arguments:**

        - `fn`: parameters to loss; it closes over the batch.
        - `params`: a pytree of arrays; integer leaves stay as they are.
        - `state`: from `init` or the update before, for averages and power iterations.
        - `relaxation`: a factor on the move of the parameters, such as a schedule from 1 to 0.

        **Returns:** `(params, residual)`: the new parameters, and the [`ResidualHistory`][] of
        the solve; with a state `(params, residual, state)`.

        **Raises:** [`pjax.TraceError`][], [`pjax.NonFiniteError`][], `ValueError` (see `check`).
        """
        program, leaves, consts, _ = trace(fn, params)
        moved, history, checks, new = _solve(
            self.layout(program), *self._options(), leaves, consts, state, relaxation
        )
        if checks is not None:
            raise_if_unsound(program, consts, checks)
        result = jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(params), moved)
        return (result, history) if new is None else (result, history, new)

    def _options(self) -> tuple[Solver, bool, float | None, bool]:
        return self.solver, self.extrapolate, self.averaging, self.check

    def problem(self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]) -> Problem:
        """The problem that `update` would solve, to look at."""
        program, leaves, consts, _ = trace(fn, params)
        return Problem(self.layout(program), leaves, consts)

    def lower(self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]) -> Any:
        """The update lowered but not run, like `jax.jit(f).lower(…)`:
        `.compile().memory_analysis()`.
        """
        program, leaves, consts, _ = trace(fn, params)
        return _solve.lower(self.layout(program), *self._options(), leaves, consts, None, 1.0)

    def layout(self, program: Program) -> Layout:
        """The layout of a traced program's problem, as this optimiser's solver needs it."""
        return layout_for(
            self.solver, program, self.metric, self.fanout, self.splitting, self.fallback
        )


def _define(solver: type[Solver]) -> Callable[..., Optimizer]:
    def make(
        steps_per_update: int | None = None,
        *,
        prox_step: float | None = None,
        metric: Metric | None = None,
        fanout: Fanout | None = None,
        splitting: Splitting = "neuron",
        check: bool = True,
        extrapolate: bool | None = None,
        averaging: float | None = None,
        fallback: Fallback | None = None,
        **options: Any,
    ) -> Optimizer:
        layers = splitting == "layer"
        if metric is None:
            given: dict[str, Any] = {} if prox_step is None else {"prox_step": prox_step}
            metric = default_metric(solver, **given) if layers else Uniform(**given)
        if steps_per_update is None:
            steps_per_update = _LAYER_STEPS[solver] if layers else 50
        return Optimizer(
            solver(steps=steps_per_update, **options),
            metric,
            fanout or ("exact" if layers else "paper"),
            splitting,
            check,
            metric.request is not None if extrapolate is None else extrapolate,
            averaging if averaging is not None or metric.request is None else 45.0,
            fallback,
        )

    make.__name__ = make.__qualname__ = solver.__name__
    make.__doc__ = f"""The optimiser that takes steps of [`pjax.solvers.{solver.__name__}`][].

    **Arguments:**

    - `steps_per_update`: steps for each batch; by default 50, and in layers as many as the solver
        needs.
    - `prox_step`: λ of the losses (ignored if `metric` is given).
    - `splitting`: `"neuron"`: the paper's problem, with `fanout="paper"`, a uniform metric and
        λ = 5; `"layer"`: one constraint for each array operation, with the metric that
        `pjax.optim.default_metric` has for the solver.
    - `metric`, `fanout`, `check`, `extrapolate`, `averaging`, `fallback`: see [`Optimizer`][]; with
        the metric `Curved`, the default for `"layer"`, moves are extrapolated, and iterates
        averaged by 45.
    - the solver's own options (`relaxation`, `beta`, `change_projection_order`), by name.

    **Returns:** an [`Optimizer`][].
    """
    return make


#: Steps for each batch in layers, where none are given: a sweep reaches every parameter.
_LAYER_STEPS: dict[type[Solver], int] = {
    solvers.AlternatingProjections: 10,
    solvers.CyclicProjections: 1,
    solvers.DouglasRachford: 10,
    solvers.CyclicDouglasRachford: 10,
    solvers.DifferenceMap: 10,
    solvers.AlternatingReflections: 10,
}


def default_metric(solver: type[Solver], **options: Any) -> Metric:
    """The metric of pure projection in layers, where none is given.

    Solvers that project get [`pjax.metrics.Curved`][]. Those that reflect reach a layer by its
    activations, which must be soft for that: `Spectral(activations=0.01, parameters=3.0,
    prox_step=5.0)`.

    **Arguments:**

    - `solver`: the class of the solver.
    - `options`: of the metric, to change.
    """
    if solver.reflecting:
        soft: dict[str, Any] = {"activations": 0.01, "parameters": 3.0, "prox_step": 5.0}
        return Spectral(**{**soft, **options})
    return Curved(**options)


AlternatingProjections = _define(solvers.AlternatingProjections)
CyclicProjections = _define(solvers.CyclicProjections)
DouglasRachford = _define(solvers.DouglasRachford)
CyclicDouglasRachford = _define(solvers.CyclicDouglasRachford)
DifferenceMap = _define(solvers.DifferenceMap)
AlternatingReflections = _define(solvers.AlternatingReflections)

__all__ = [
    "AlternatingProjections",
    "AlternatingReflections",
    "CyclicDouglasRachford",
    "CyclicProjections",
    "DifferenceMap",
    "DouglasRachford",
    "Info",
    "NonFiniteError",
    "Optimizer",
    "Projection",
    "ProjectionState",
]
