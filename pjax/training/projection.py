"""Pure projection: one solve for each parameter, without an optimiser or a learning rate."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from pjax.backend import shardings
from pjax.compile import rolled
from pjax.metrics import Spectral
from pjax.options import Fallback
from pjax.problem import Formulation, Layout, Problem, layout
from pjax.program import leaves_of, read
from pjax.sets import Set, into
from pjax.trace import trace
from pjax.training import requests
from pjax.training.checks import (
    MISSING,
    Checks,
    check,
    raise_if_unsound,
    require_own_call,
    require_relaxation,
)
from pjax.training.ends import Step
from pjax.training.memory import Memory, UnitMemory
from pjax.training.readers import Units, find_units
from pjax.training.requests import Requests
from pjax.training.within import sets_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProjectionState:
    """What one batch hands on to the next; a pytree of arrays.

    **Attributes:**

    - `count`: how many batches there were.
    - `memory`: of requests, input rows and forces, for each array that is solved for.
    - `vectors`: where power iterations go on.
    - `mean`: the average of the iterates, for each leaf; None without averaging.
    """

    count: Array
    memory: Memory
    vectors: tuple[Any, ...]
    mean: tuple[Any, ...]


class Info(NamedTuple):
    """What there is beside parameters and state.

    **Attributes:**

    - `loss`: the function's value before the move.
    - `residual`: the length of the forces on the outputs of all layers; 0 where all constraints
        hold.
    - `aux`: the auxiliary output, with `has_aux`; else None.
    - `violations`: how far the forward pass was from the sets of `pjax.constrain`, by the line of
        the call.
    """

    loss: Array
    residual: Array
    aux: Any
    violations: dict[str, Array]


class StateSize(NamedTuple):
    """The bytes of a [`ProjectionState`][].

    **Attributes:**

    - `requests`: what batches ask of each parameter, and the last move.
    - `moments`: eigenvectors of inputs and forces, and diagonals.
    - `rest`: the average of iterates, vectors of power iterations, and numbers.
    """

    requests: int
    moments: int
    rest: int

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(self)


class _Solved(NamedTuple):
    moves: list[Array | None]
    ends: dict[int, Array]
    loss: Array
    residual: Array
    aux: list[Any]
    memory: Memory
    vectors: tuple[Any, ...]
    violations: dict[str, Array]
    checks: Checks | None


_METRIC = Spectral(parameters="stiff", prox_step=0.1)


def formulation(fallback: Fallback | None) -> Formulation:
    """What the forces are found from, by one sweep: layers whose parameters rest."""
    return Formulation(_METRIC, splitting="layer", grouping="levels", fallback=fallback)


@functools.lru_cache(maxsize=256)
def _units(layout: Layout) -> Units:
    return find_units(layout.graph)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _solve(
    layout: Layout,
    settings: Requests,
    checked: bool,
    axes: tuple[str, ...],
    leaves: Sequence[Any],
    consts: Sequence[Any],
    memory: Memory,
    vectors: Sequence[Any] | None,
    count: Array,
    step: Step,
) -> _Solved:
    with shardings.summed_over(axes):
        return rolled(functools.partial(_solved, layout, settings, checked))(
            leaves, consts, memory, vectors, count, step
        )


def _solved(
    layout: Layout,
    settings: Requests,
    checked: bool,
    leaves: Sequence[Any],
    consts: Sequence[Any],
    memory: Memory,
    vectors: Sequence[Any] | None,
    count: Array,
    step: Step,
) -> _Solved:
    problem = Problem(layout, leaves, consts, vectors)
    state = problem.sweep(layer_forces=True)
    units = _units(layout)
    moved, ends, new = requests.moves(
        problem, units, state, state.forces, memory, count, settings, step
    )
    memory = shardings.alike(new, memory)
    moves = [
        None if move is None else shardings.alike(move, leaf)
        for leaf, move in zip(leaves, problem.leaf_moves(moved), strict=True)
    ]
    total = sum((jnp.sum(jnp.square(f)) for f in state.forces.values()), start=jnp.zeros(()))
    total = shardings.everywhere(total)
    aux = [read(problem.forward, atom) for atom in layout.graph.program.auxiliary_outputs]
    checks = None
    if checked:
        checks = check(problem.leaves, consts, problem.loss, [m for m in moves if m is not None])
    violations, vectors = problem.violations(), tuple(problem.vectors)
    loss = shardings.mean_everywhere(problem.loss)
    return _Solved(moves, ends, loss, jnp.sqrt(total), aux, memory, vectors, violations, checks)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _start(
    layout: Layout,
    settings: Requests,
    axes: tuple[str, ...],
    leaves: Sequence[Any],
    consts: Sequence[Any],
) -> tuple[Memory, tuple[Any, ...]]:
    with shardings.summed_over(axes):
        problem = Problem(layout, leaves, consts)
        return requests.empty(problem, _units(layout), settings), tuple(problem.vectors)


@dataclass(frozen=True)
class Projection:
    """Training by projection, without an optimiser and without a learning rate.

    For each batch one sweep from the loss to the parameters finds the force on every layer's
    output. Each parameter `W` is then solved for once, over all that reads it and a fading memory
    of batches:

        argmin  Σ_batches β^age |X δW − R|² + ρ |δW|²

    `X` are the input rows of all its readers and `R` their requests: the forces, in a size that is
    a share of the layer's output. What batches do not agree on cancels. There is one setting for
    all networks; the scale of the inputs, a sum or a mean, and rows that are there twice change
    nothing.

    ```python
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss_fn, params, x, y)
    for x, y in batches:
        params, state, info = optimizer.update(loss_fn, params, state, x, y)
    ```

    **Arguments:**

    - `has_aux`: the function returns `(loss, aux)`: `info.aux` is that of the forward pass, such as
        the statistics of batch norms.
    - `weight_decay`: parameters shrink by this share in each update, times its relaxation.
    - `averaging`: the power with which the weights of iterates grow in [`Projection.average`][];
        None keeps no average, and saves a copy of the parameters.
    - `mask`: which parameters move, True or False for each: a pytree that is a prefix of them, or a
        function of them that returns one. The others stay as they are, and cost nothing.
    - `check`: raise an error for parameters, data or a loss that are not finite; it waits for each
        update.
    - `fallback`: see [`pjax.feasibility_problem`][].
    - `requests`: the constants of the rule.
    - `sets`: in which parameters are to lie: a prefix of their tree whose leaves are sets of
        `pjax.sets` or None. Each solve is over the set of its parameter (by 16 projected steps),
        so a parameter is in its set after each update.
    - `axis_name`: inside of `jax.shard_map`, the axis (or axes) along which devices have rows of
        their own: the loss is that of the rows of one device, and the move that of the mean of all.
        Outside, under `jax.jit`, a sharded batch needs no name.
    """

    has_aux: bool = False
    weight_decay: float = 0.0
    averaging: float | None = None
    mask: Any = None
    check: bool = True
    fallback: Fallback | None = None
    requests: Requests = Requests()  # noqa: RUF009 - frozen
    sets: PyTree[Set | None] = None
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.has_aux, bool):
            raise TypeError(
                f"`has_aux` must be True or False, got {self.has_aux!r}. `Projection` takes its "
                "settings by name, and has no learning rate: `relaxation=` of `update` is a factor "
                "on a move."
            )

    def init(
        self, fn: Callable[..., Any], params: PyTree[Array] = MISSING, *args: Any, **kwargs: Any
    ) -> ProjectionState:
        """The state before the first batch.

        **Arguments:**

        - `fn`: `fn(params, *args, **kwargs)` is the loss, or `(loss, aux)` with `has_aux`.
        - `params`: a pytree of arrays, or an Equinox module, of which the floating-point arrays
            move.
        - `args`, `kwargs`: a batch, for its shapes.

        **Raises:** [`pjax.TraceError`][] if `fn` cannot become a graph; `TypeError` for a call as
        Optax makes it.
        """
        require_own_call(self, fn, params)
        program, leaves, consts, _ = self._traced(fn, params, args, kwargs)
        found_layout, anywhere = self._layout(program), PartitionSpec()
        axes = shardings.axes_of(self.axis_name)
        memory, vectors = shardings.automatic(
            functools.partial(_start, found_layout, self.requests, axes),
            leaves,
            consts,
            like=(_specs(found_layout, leaves), anywhere),
        )
        mean = (None,) * len(leaves) if self.averaging is None else tuple(leaves)
        return ProjectionState(jnp.zeros((), jnp.int32), memory, vectors, mean)

    def update(
        self,
        fn: Callable[..., Any],
        params: PyTree[Array] = MISSING,
        state: ProjectionState = MISSING,
        *args: Any,
        relaxation: Any = 1.0,
        **kwargs: Any,
    ) -> tuple[PyTree[Array], ProjectionState, Info]:
        """The parameters after one batch.

        **Arguments:**

        - `fn`, `params`: as in `init`.
        - `state`: from `init` or the update before.
        - `args`, `kwargs`: the batch.
        - `relaxation`: a factor on the move, such as a schedule from 1 to 0.

        **Returns:** `(params, state, info)`, see [`Info`][].

        **Raises:** [`pjax.TraceError`][], [`pjax.NonFiniteError`][], `ValueError` for a state of
        other shapes, `TypeError` for a call as Optax makes it.
        """
        require_relaxation(relaxation)
        keep = 1 - relaxation * self.weight_decay
        moves, moved, state, info = self._moves(fn, params, state, args, kwargs, keep, relaxation)
        leaves = leaves_of(params, self.mask)
        if self.averaging is not None:
            share = (self.averaging + 1) / (state.count + self.averaging)
            mean = tuple(
                before if move is None else (before + share * (leaf - before)).astype(before.dtype)
                for before, leaf, move in zip(state.mean, moved, moves, strict=True)
            )
            state = ProjectionState(state.count, state.memory, state.vectors, mean)
        return leaves.tree(moved), state, info

    def displacement(
        self,
        fn: Callable[..., Any],
        params: PyTree[Array],
        state: ProjectionState,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[PyTree[Array], ProjectionState, Info]:
        """The move with its sign changed, in the place of a gradient: for schedules, weight decay
        and clipping of Optax.

        ```python
        direction, state, info = optimizer.displacement(loss_fn, params, state, x, y)
        updates, opt_state = optax.sgd(schedule).update(direction, opt_state, params)
        ```

        **Returns:** `(displacement, state, info)`; the displacement is 0 where the mask is False.
        A whole step leads into the sets of parameters; for what Optax makes of it there is
        [`pjax.sets.keep`][].
        """
        moves, moved, state, info = self._moves(fn, params, state, args, kwargs, 1.0, 1.0)
        leaves, moving = leaves_of(params), leaves_of(params, self.mask)
        chosen = zip(moving.paths, moving.arrays, moved, moves, strict=True)
        by_path = {path: p - end for path, p, end, move in chosen if move is not None}
        found = [
            by_path.get(path, jnp.zeros_like(leaf)).astype(jnp.result_type(leaf))
            for path, leaf in zip(leaves.paths, leaves.arrays, strict=True)
        ]
        return leaves.moves(found), state, info

    def average(self, params: PyTree[Array], state: ProjectionState) -> PyTree[Array]:
        """The mean of the iterates so far, for evaluation at any time; no schedule is needed.

        The iterate of batch `t` counts with a weight that grows like `t**averaging`.

        **Raises:** `ValueError` without `averaging`.
        """
        if self.averaging is None:
            raise ValueError("There is no average: make the optimiser with `averaging=8.0`, say.")
        leaves = leaves_of(params, self.mask)
        return leaves.tree(_into(sets_of(self.sets, params, leaves), state.mean))

    def sizes(
        self, fn: Callable[..., Any], params: PyTree[Array], *args: Any, **kwargs: Any
    ) -> StateSize:
        """The bytes of the state, before anything is allocated.

        **Arguments:** those of `init`.

        ```python
        pjax.optim.Projection().sizes(loss_fn, params, x, y).bytes
        ```
        """
        state = jax.eval_shape(lambda: self.init(fn, params, *args, **kwargs))
        units = state.memory.units
        requests = [(unit.asked, unit.move) for unit in units]
        moments = [unit.diagonal for unit in units], state.memory.inputs, state.memory.outputs
        first, second = _bytes(requests), _bytes(moments)
        return StateSize(first, second, _bytes(state) - first - second)

    def _moves(
        self,
        fn: Callable[..., Any],
        params: Any,
        state: ProjectionState,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep: Any,
        relaxation: Any,
    ) -> tuple[list[Array | None], list[Any], ProjectionState, Info]:
        """The free moves, and where parameters end."""
        require_own_call(self, fn, params, state, ProjectionState)
        program, leaves, consts, aux_tree = self._traced(fn, params, args, kwargs)
        found_layout = self._layout(program)
        _check_state(found_layout, state)
        apart = leaves_of(params, self.mask)
        sets = sets_of(self.sets, params, apart)
        step = Step(sets, keep, relaxation) if sets else Step()
        anywhere: Any = PartitionSpec()
        moves: Any = list(map(shardings.spec, leaves))
        axes = shardings.axes_of(self.axis_name)
        found = shardings.automatic(
            functools.partial(_solve, found_layout, self.requests, self.check, axes),
            leaves,
            consts,
            state.memory,
            state.vectors,
            state.count,
            step,
            like=_Solved(
                moves=moves,
                ends=anywhere,
                loss=anywhere,
                residual=anywhere,
                aux=anywhere,
                memory=jax.tree.map(shardings.spec, state.memory),
                vectors=anywhere,
                violations=anywhere,
                checks=anywhere,
            ),
        )
        if found.checks is not None:
            raise_if_unsound(program.leaves, consts, found.checks)
        aux = jax.tree_util.tree_unflatten(aux_tree, found.aux) if self.has_aux else None
        new = ProjectionState(state.count + 1, found.memory, found.vectors, state.mean)
        moved = [
            leaf
            if move is None
            else found.ends.get(n, keep * leaf + relaxation * move).astype(jnp.result_type(leaf))
            for n, (leaf, move) in enumerate(zip(apart.arrays, found.moves, strict=True))
        ]
        info = Info(found.loss, found.residual, aux, found.violations)
        return found.moves, _into(sets, moved), new, info

    def _traced(
        self, fn: Callable[..., Any], params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return trace(lambda p: fn(p, *args, **kwargs), params, self.has_aux, True, self.mask)
        except (TypeError, ValueError) as error:
            rows = [
                jnp.shape(leaf)[0]
                for leaf in jax.tree_util.tree_leaves((args, kwargs))
                if jnp.ndim(leaf)
            ]
            if len(set(rows)) > 1:
                error.add_note(
                    f"The arrays after `params` and `state` have {', '.join(map(str, rows))} rows: "
                    "a batch and its labels must have as many."
                )
            raise

    def _layout(self, program: Any) -> Layout:
        return layout(program, formulation(self.fallback))


@jax.jit
def _nearest(sets: Sequence[Set | None], leaves: Sequence[Any]) -> list[Any]:
    return [into(one, leaf) for one, leaf in zip(sets, leaves, strict=True)]


def _into(sets: Sequence[Set | None], leaves: Sequence[Any]) -> list[Any]:
    """Each leaf at the nearest point of its set, where there are sets."""
    return _nearest(sets, leaves) if sets else list(leaves)


def _specs(layout: Layout, leaves: Sequence[Any]) -> Memory:
    """How the memory lies along explicit axes: what has the shape of a parameter as it does."""
    anywhere: Any = PartitionSpec()
    units = []
    for unit in _units(layout).units:
        output = layout.graph.nodes[unit.node].output
        own = output is not None and output < len(leaves)
        spec: Any = shardings.spec(leaves[output]) if own else anywhere  # pyright: ignore
        units.append(UnitMemory(spec, spec, spec))
    rest: list[Any] = [anywhere] * (len(Memory._fields) - 1)
    return Memory(tuple(units), *rest)


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _check_state(layout: Layout, state: ProjectionState) -> None:
    """Raises `ValueError` for a state that was made for parameters of other shapes."""
    units, kept = _units(layout).units, state.memory.units
    program = layout.graph.program
    outputs = [layout.graph.nodes[unit.node].output for unit in units]
    shapes = [() if output is None else program.shape(output) for output in outputs]
    found = [jnp.shape(memory.asked) for memory in kept]
    if found != shapes:
        raise ValueError(
            "`state` belongs to another function or to parameters of other shapes: it has memories "
            f"of {found}, and {shapes} are solved for. Make one by `init` with these parameters."
        )


__all__ = ["Info", "Projection", "ProjectionState", "StateSize", "formulation"]
