"""Displacements: what a solver makes of the parameters, in the place of a gradient.

```python
step = pjax.value_and_displacement(loss_fn)
loss, displacement = step(params, batch)
updates, opt_state = optimizer.update(displacement, opt_state, params)
```
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from pjax.backend import shardings
from pjax.compile import rolled
from pjax.metrics import Metric
from pjax.options import Fallback, Fanout, Splitting
from pjax.problem import Formulation, Layout, Problem, first_vectors, layout
from pjax.program import Program, leaves_of, read
from pjax.solvers import CyclicProjections, Solver
from pjax.trace import require_function, trace


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _displace(
    found: Layout,
    solver: Solver,
    means: tuple[str, ...],
    leaves: Sequence[Any],
    consts: Sequence[Any],
    vectors: Sequence[Any] | None,
) -> tuple[Array, list[Any], list[Array], list[Any]]:
    """The loss, the auxiliary outputs, the displacement of each leaf, the vectors to go on with."""
    loss, aux, moved, ends = rolled(functools.partial(_displaced, found, solver))(
        leaves, consts, vectors
    )
    if means:
        loss = jax.lax.pmean(loss, means)
        moved = [
            jax.lax.pmean(m, means) if jnp.issubdtype(m.dtype, jnp.floating) else m for m in moved
        ]
    return loss, aux, moved, ends


def _displaced(
    found: Layout,
    solver: Solver,
    leaves: Sequence[Any],
    consts: Sequence[Any],
    vectors: Sequence[Any] | None,
) -> tuple[Array, list[Any], list[Array], list[Any]]:
    problem = Problem(found, leaves, consts, vectors)
    state = problem.sweep() if solver == CyclicProjections(steps=1) else solver.run(problem)
    # A loss's force is −λ times its gradient (at the proximal point), for rows that count 1, and
    # each step of a solver hands on a request of its own.
    scale = problem.largest_coefficient / found.formulation.metric.prox_step / solver.steps
    factor = -scale
    moved = [
        _zero(leaf)
        if force is None
        else shardings.alike((factor * force).astype(jnp.result_type(leaf)), leaf)
        for leaf, force in zip(leaves, problem.parameter_forces(state), strict=True)
    ]
    aux = [read(problem.forward, atom) for atom in found.graph.program.auxiliary_outputs]
    return problem.loss, aux, moved, problem.vectors


def _zero(leaf: Any) -> Array:
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(jnp.shape(leaf), dtype)
    # As `jax.grad` has it for integers.
    return jnp.zeros(jnp.shape(leaf), jax.dtypes.float0)  # pyright: ignore


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DisplacementState:
    """What one batch can hand on to the next: where power iterations go on.

    **Attributes:**

    - `vectors`: for each slot of the graph a vector, or None.
    """

    vectors: tuple[Any, ...]


@dataclass(frozen=True)
class ValueAndDisplacement:
    """See [`pjax.value_and_displacement`][], which makes one."""

    fn: Callable[..., Any]
    solver: Solver
    splitting: Splitting
    metric: Metric
    fanout: Fanout
    has_aux: bool
    argnums: int | tuple[int, ...]
    fallback: Fallback | None = None
    allow_int: bool = True
    axis_name: str | tuple[str, ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """`(value, displacement)`, or `((value, aux), displacement)` with `has_aux`."""
        found, _ = self._solve(args, kwargs, None)
        return found

    def init(self, *args: Any, **kwargs: Any) -> DisplacementState:
        """A state for `update`, from arguments of the right shapes."""
        params, fn = self._of_params(args, kwargs)
        program, leaves, consts, _ = trace(fn, params, self.has_aux, scalar=True)
        return DisplacementState(first_vectors(self._layout(program), leaves, consts))

    def update(
        self, state: DisplacementState, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, Any], DisplacementState]:
        """As a call, with the state that the batch before handed on; returns the next one too.

        **Raises:** `TypeError` for what is no state, `ValueError` for one of other shapes.
        """
        if not isinstance(state, DisplacementState):
            raise TypeError(
                "`update(state, params, *args)` takes the state of `init` first; it got a "
                f"{type(state).__name__}."
            )
        return self._solve(args, kwargs, state)

    def _of_params(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Callable[[Any], Any]]:
        """The parameters among the arguments, and the function of these alone."""
        numbers = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        for number in numbers:
            if not -len(args) <= number < len(args):
                raise TypeError(
                    f"`argnums` names argument {number}, and the function was called with "
                    f"{len(args)} positional argument{'s' * (len(args) != 1)}."
                )
        numbers = tuple(number % len(args) for number in numbers)
        chosen = tuple(args[number] for number in numbers)
        params = chosen[0] if isinstance(self.argnums, int) else chosen

        def fn(params: Any) -> Any:
            given = (params,) if isinstance(self.argnums, int) else params
            replaced = dict(zip(numbers, given, strict=True))
            return self.fn(*(replaced.get(place, arg) for place, arg in enumerate(args)), **kwargs)

        return params, fn

    def _layout(self, program: Program) -> Layout:
        options = Formulation(self.metric, self.fanout, self.splitting, fallback=self.fallback)
        return layout(program, options.for_solver(self.solver))

    def _solve(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], state: DisplacementState | None
    ) -> tuple[tuple[Any, Any], DisplacementState]:
        params, fn = self._of_params(args, kwargs)
        program, leaves, consts, aux_tree = trace(fn, params, self.has_aux, scalar=True)
        for leaf in program.leaves if not self.allow_int else ():
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(
                    f"`params{leaf.path}` has the type {leaf.dtype}, which cannot move: give "
                    "`allow_int=True`, or let the function have it in another argument."
                )
        found_layout, anywhere = self._layout(program), PartitionSpec()
        axes = shardings.axes_of(self.axis_name)
        value, aux, moved, vectors = shardings.automatic(
            functools.partial(_displace, found_layout, self.solver, axes),
            leaves,
            consts,
            None if state is None else state.vectors,
            like=(anywhere, anywhere, list(map(shardings.spec, leaves)), anywhere),
        )
        displacement = leaves_of(params).moves(moved)
        result = value
        if self.has_aux:
            result = value, jax.tree_util.tree_unflatten(aux_tree, aux)
        return (result, displacement), DisplacementState(tuple(vectors))


def value_and_displacement(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    allow_int: bool = True,
    solver: Solver | None = None,
    splitting: Splitting = "layer",
    metric: Metric | None = None,
    fanout: Fanout = "exact",
    fallback: Fallback | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> ValueAndDisplacement:
    """`(value, displacement)`, the drop-in for `jax.value_and_grad`: what a solver moves each
    parameter by, as a force `W (p − p')/λ`.

    With stiff parameters (the default metric's) they rest in the solve, and the displacement is the
    sum of the forces of all constraints on them, divided by the prox step λ and by the number of
    solver steps. As activations become stiff and λ goes to 0, one cyclic sweep gives the gradient,
    where there is one: so learning rates, clipping and weight decay mean what they mean for
    gradients. No derivative of the network is taken.

    **Arguments:**

    - `fn`: a JAX function that ends in a loss, or in means and weighted sums of losses; mapped
        over `(params, *args)` as `jax.value_and_grad` would.
    - `argnums`: which arguments are parameters: a number, or several. The others, and all that are
        given by name, are data.
    - `has_aux`: `fn` returns `(loss, aux)`: `aux` is that of the forward pass.
    - `allow_int`: whether parameters may be integers; `jax.grad` has False for its default.
    - `solver`: from `pjax.solvers`; by default one cyclic sweep.
    - `splitting`: `"layer"` or `"neuron"`.
    - `metric`: from `pjax.metrics`; by default [`pjax.metrics.Spectral`][] for layers.
    - `fanout`: see [`pjax.feasibility_problem`][].
    - `fallback`: see [`pjax.feasibility_problem`][].
    - `axis_name`: inside of `jax.shard_map` (or `vmap`), the axis (or axes) along which devices
        have rows of their own: value and displacement are the means over it, of local losses.
        Without it they are those of one device, as with `jax.value_and_grad`.

    A whole Equinox module may be a parameter, or be inside of one: its floating-point arrays are
    displaced, and everything else in it has None in their place, as
    `equinox.filter_value_and_grad` has it.

    Integer parameters have displacements of `float0`, as with `jax.grad(…, allow_int=True)`. Optax
    does not take those: let `fn` have such leaves in an argument that `argnums` leaves out, or give
    Optax zeros in their place, `jax.tree.map(lambda p, d: jnp.zeros_like(p) if d.dtype ==
    jax.dtypes.float0 else d, params, displacement)`.

    **Returns:** a [`ValueAndDisplacement`][], called with the arguments of `fn`. Its `init` and
    `update` carry a state from batch to batch, which saves most of the power iteration.

    **Raises:** `TypeError` if `fn` is no function. When called, [`pjax.TraceError`][] if `fn`
    cannot become a graph, and `TypeError` for parameters that are not arrays and for a loss that
    is not one number.

    ```python
    step = pjax.value_and_displacement(loss_fn)
    loss, displacement = step(params, batch)
    updates, opt_state = tx.update(displacement, opt_state, params)
    ```
    """
    require_function(fn, "fn")
    return ValueAndDisplacement(
        fn,
        CyclicProjections(steps=1) if solver is None else solver,
        splitting,
        Formulation(metric, fanout, splitting).metric,
        fanout,
        has_aux,
        argnums if isinstance(argnums, int) else tuple(argnums),
        fallback,
        allow_int,
        axis_name,
    )


def displacement(
    fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """As [`pjax.value_and_displacement`][], without the value: the drop-in for `jax.grad`.

    **Arguments:** those of [`pjax.value_and_displacement`][].

    **Returns:** a function of the arguments of `fn` to the displacement, or to
    `(displacement, aux)` with `has_aux`.
    """
    both = value_and_displacement(fn, argnums, has_aux, **options)

    def displace(*args: Any, **kwargs: Any) -> Any:
        value, moved = both(*args, **kwargs)
        return (moved, value[1]) if both.has_aux else moved

    return displace
