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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, PyTree

from pjax import solvers
from pjax.metrics import Metric, Uniform
from pjax.problem import Fanout, Layout, Problem, Splitting, layout
from pjax.solvers import ResidualHistory, Solver
from pjax.trace import Program, trace


class NonFiniteError(ValueError):
    """The parameters, the data or the forward pass hold NaN or infinite values."""


class _Checks(NamedTuple):
    """What holds of a solve: each leaf is finite, each captured array has no NaN, and so on."""

    leaves: list[Array]
    not_nan: list[Array]
    finite: list[Array]
    loss: Array
    solved: Array
    minimises: Array


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(
    layout: Layout, solver: Solver, leaves: Sequence[Any], consts: Sequence[Any]
) -> tuple[list[Any], ResidualHistory, _Checks]:
    problem = Problem(layout, leaves, consts)
    state, history = solver.solve(problem)
    moved = [
        leaf if deviation is None else (leaf + deviation).astype(jnp.result_type(leaf))
        for leaf, deviation in zip(leaves, problem.parameter_deviations(state), strict=True)
    ]
    checks = _Checks(
        leaves=[_is_finite(leaf) for leaf in leaves],
        not_nan=[_has_no_nan(const) for const in consts],
        finite=[_is_finite(const) for const in consts],
        loss=_is_finite(history.loss),
        solved=jnp.all(jnp.array([_is_finite(leaf) for leaf in moved])),
        minimises=problem.minimises,
    )
    return moved, history, checks


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _is_finite(x: Any) -> Array:
    return jnp.all(jnp.isfinite(x)) if _is_floating(x) else jnp.array(True)


def _has_no_nan(x: Any) -> Array:
    return ~jnp.any(jnp.isnan(x)) if _is_floating(x) else jnp.array(True)


def _raise_if_unsound(program: Program, consts: Sequence[Any], checks: _Checks) -> None:
    if any(isinstance(check, Tracer) for check in jax.tree_util.tree_leaves(checks)):
        return  # inside an outer jit: the verdict of the history says it
    # Inputs first: where they are finite and the loss is not, the forward pass overflowed.
    for leaf, finite in zip(program.leaves, checks.leaves, strict=True):
        if not finite:
            raise NonFiniteError(f"`params{leaf.path}` {leaf.shape} holds NaN or infinite values.")
    for const, not_nan in zip(consts, checks.not_nan, strict=True):
        if not not_nan:
            raise NonFiniteError(
                f"The function closes over {_describe(const)} that holds NaN. Check the data of "
                "this batch."
            )
    if not (checks.loss and checks.solved):
        # Infinite data can be meant (a mask of −inf): they are named only where something failed.
        infinite = [
            _describe(const)
            for const, finite in zip(consts, checks.finite, strict=True)
            if not finite
        ]
        holds = f"The function closes over infinite values, in {' and in '.join(infinite)}"
        if not checks.loss and infinite:
            raise NonFiniteError(
                f"The loss of the forward pass is not finite. {holds}: check the data of this "
                "batch."
            )
        if not checks.loss:
            raise NonFiniteError(
                "The loss of the forward pass is not finite, although parameters and data are: "
                "look for an overflow (a smaller initialisation or scaled inputs help) or a NaN "
                "made inside the function."
            )
        if infinite:
            raise NonFiniteError(
                "The solve left the range of floating-point numbers, although parameters and loss "
                f"are finite. {holds}: check the data of this batch."
            )
        raise NonFiniteError(
            "The solve left the range of floating-point numbers, although parameters, data and "
            "loss are finite: look for very large data or activations, or lower `prox_step`."
        )
    if not checks.minimises:
        raise ValueError(
            "A loss has a negative weight in the function's result: it would be maximised, and has "
            "no proximal operator."
        )


def _describe(array: Any) -> str:
    return f"an array of shape {np.shape(array)} and dtype {array.dtype}"


@dataclass(frozen=True)
class Optimizer:
    """Moves parameters by the steps of a solver on the problem of each batch.

    The named optimisers below make one; use this class for a solver of your own.

    **Arguments:**

    - `solver`: from `pjax.solvers`, or your own.
    - `metric`: weights of the distances and prox step of the losses.
    - `fanout`: `"paper"` or `"exact"`, see [`pjax.feasibility_problem`][].
    - `splitting`: `"neuron"`.
    - `check`: raise an error for parameters, data or a loss that are not finite, and for a loss
        with a negative weight; it waits for the result of each update.
    """

    solver: Solver
    metric: Metric = Uniform()  # noqa: RUF009 - frozen
    fanout: Fanout = "paper"
    splitting: Splitting = "neuron"
    check: bool = True

    def update(
        self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]
    ) -> tuple[PyTree[Array], ResidualHistory]:
        """Solves the problem of `fn` from `params`.

        **Arguments:**

        - `fn`: parameters to loss; it closes over the batch.
        - `params`: a pytree of arrays; integer leaves stay as they are.

        **Returns:** `(params, residual)`: the new parameters, and the [`ResidualHistory`][] of
        the solve.

        **Raises:** [`pjax.TraceError`][], [`pjax.NonFiniteError`][], `ValueError` (see `check`).
        """
        program, leaves, consts, _ = trace(fn, params)
        found = self.layout(program)
        moved, history, checks = _solve(found, self.solver, leaves, consts)
        if self.check:
            _raise_if_unsound(program, consts, checks)
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(params), moved), history

    def problem(self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]) -> Problem:
        """The problem that `update` would solve, to look at."""
        program, leaves, consts, _ = trace(fn, params)
        return Problem(self.layout(program), leaves, consts)

    def lower(self, fn: Callable[[PyTree[Array]], Array], params: PyTree[Array]) -> Any:
        """The update lowered but not run, like `jax.jit(f).lower(…)`:
        `.compile().memory_analysis()`.
        """
        program, leaves, consts, _ = trace(fn, params)
        return _solve.lower(self.layout(program), self.solver, leaves, consts)

    def layout(self, program: Program) -> Layout:
        """The layout of a traced program's problem, as this optimiser's solver needs it."""
        return layout(
            program,
            metric=self.metric,
            fanout=self.fanout,
            splitting=self.splitting,
            grouping=self.solver.grouping,
            reflecting=self.solver.reflecting,
        )


def _define(solver: type[Solver]) -> Callable[..., Optimizer]:
    def make(
        steps_per_update: int = 50,
        *,
        prox_step: float = 5.0,
        metric: Metric | None = None,
        fanout: Fanout = "paper",
        splitting: Splitting = "neuron",
        check: bool = True,
        **options: Any,
    ) -> Optimizer:
        if metric is None:
            metric = Uniform(prox_step=prox_step)
        made = solver(steps=steps_per_update, **options)
        return Optimizer(made, metric, fanout, splitting, check)

    make.__name__ = make.__qualname__ = solver.__name__
    make.__doc__ = f"""The optimiser that takes steps of [`pjax.solvers.{solver.__name__}`][].

    **Arguments:**

    - `steps_per_update`: steps for each batch.
    - `prox_step`: λ of the losses (ignored if `metric` is given).
    - `metric`, `fanout`, `splitting`, `check`: see [`Optimizer`][].
    - the solver's own options (`relaxation`, `beta`, `change_projection_order`), by name.

    **Returns:** an [`Optimizer`][].
    """
    return make


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
    "NonFiniteError",
    "Optimizer",
]
