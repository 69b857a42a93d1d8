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
from typing import Any

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


@functools.partial(jax.jit, static_argnums=(0, 1))
def _solve(
    layout: Layout, solver: Solver, leaves: Sequence[Any], consts: Sequence[Any]
) -> tuple[list[Any], ResidualHistory, list[Array]]:
    problem = Problem(layout, leaves, consts)
    state, history = solver.solve(problem)
    moved = [
        leaf if deviation is None else (leaf + deviation).astype(jnp.result_type(leaf))
        for leaf, deviation in zip(leaves, problem.parameter_deviations(state), strict=True)
    ]
    # Inputs first: where they are finite and the loss is not, the forward pass overflowed.
    checks = [_is_finite(leaf) for leaf in leaves] + [_has_no_nan(const) for const in consts]
    solved = jnp.all(jnp.array([_is_finite(leaf) for leaf in moved]))
    return moved, history, [*checks, _is_finite(history.loss), solved, problem.minimises]


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def _is_finite(x: Any) -> Array:
    return jnp.all(jnp.isfinite(x)) if _is_floating(x) else jnp.array(True)


def _has_no_nan(x: Any) -> Array:
    # An infinite constant can be meant (a mask of −inf); the loss tells if it was not.
    return ~jnp.any(jnp.isnan(x)) if _is_floating(x) else jnp.array(True)


def _raise_if_unsound(program: Program, consts: Sequence[Any], checks: Sequence[Array]) -> None:
    if any(isinstance(check, Tracer) for check in checks):
        return  # inside an outer jit: the verdict of the history says it
    *finite, solved, minimises = (bool(check) for check in checks)
    if all(finite):
        if not solved:
            raise NonFiniteError(
                "The solve left the range of floating-point numbers, although parameters, data and "
                "loss are finite: look for very large data or activations, or lower `prox_step`."
            )
        if not minimises:
            raise ValueError(
                "A loss has a negative weight in the function's result: it would be maximised, "
                "and has no proximal operator."
            )
        return
    num_leaves = len(program.leaves)
    for leaf, good in zip(program.leaves, finite, strict=False):
        if not good:
            raise NonFiniteError(f"`params{leaf.path}` {leaf.shape} holds NaN or infinite values.")
    for const, good in zip(consts, finite[num_leaves:], strict=False):
        if not good:
            raise NonFiniteError(
                f"The function closes over an array of shape {np.shape(const)} and dtype "
                f"{const.dtype} that holds NaN. Check the data of this batch."
            )
    raise NonFiniteError(
        "The loss of the forward pass is not finite, although parameters and data hold no NaN: "
        "look for infinite data, or for an overflow (a smaller initialisation or scaled inputs "
        "help)."
    )


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
