"""A solver on a network of equal layers, which lie side by side on the devices of a mesh."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pjax.backend import shardings
from pjax.backend.neighbours import Neighbours
from pjax.graph import Ends, ends_of
from pjax.metrics import Metric, Spectral
from pjax.problem import Formulation, layout, make_layout
from pjax.problem.forward import ForwardPass
from pjax.problem.stacked import Parts, StackedProblem, count_levels, run_forward
from pjax.program import Program, TraceError, leaves_of, primitives, squared_error
from pjax.solvers import ResidualHistory, Solver
from pjax.trace import require_function, trace
from pjax.training.checks import check, raise_if_unsound, require_relaxation
from pjax.training.optimizer import Optimizer, require_moving


class _Static(NamedTuple):
    """What a solve is compiled for."""

    layouts: Parts
    solver: Solver
    check: bool
    count: int
    levels: int
    mesh: Mesh | None
    axis: str


@dataclass(frozen=True)
class StagedProjections:
    """A solver on `last(layer(… layer(first(x))), y)` with equal layers, all of which are projected
    at the same time, each on the device that has it.

    The parameters of the layers are stacked along a first axis, and layer `l` of `L` lies on device
    `⌊l P/L⌋` of the `P` along an axis of a mesh. In a projection layers tell their neighbours one
    array of activations: the new output goes forward, what readers make of it goes back.

    ```python
    staged = pjax.optim.StagedProjections(
        pjax.optim.DouglasRachford(20), first, layer, last, mesh=jax.make_mesh((8,), ("stage",))
    )
    params = staged.place(params)
    for x, y in batches:
        params, residual = staged.update(params, x, y)
    ```

    It computes what `optimizer` does for the loss of the whole network, also without a mesh, where
    it compiles one layer instead of all. Two things differ where they occur:

    - Nothing is fused across the edge of a layer. In neuron splitting a sum at the end of a layer
      and a relu at the beginning of the next are two constraints.
    - All layers have the same colours. Where the way through a layer has an odd number of
      constraints, as in `h + relu(h @ w)`, each layer gets an identity; a network as one graph may
      have other colours in every other layer instead.

    **Arguments:**

    - `optimizer`: one of `pjax.optim` whose solver projects onto two colours:
        `AlternatingProjections`, `DouglasRachford`, `DifferenceMap`, `AlternatingReflections`.
    - `first`: `h = first(params, x)`, all before the layers; it makes the input of the first one of
        data and parameters.
    - `layer`: `h = layer(params, h)`, of the shape and type that its input has.
    - `last`: `loss = last(params, h, y)`, all behind the layers; one number.
    - `mesh`: its devices along `axis` share out the layers; None: one device.
    - `axis`: of the mesh.

    **Raises:** `ValueError` for an optimizer of another kind, and for a mesh without the axis.
    """

    optimizer: Optimizer
    first: Callable[[Any, Any], Any]
    layer: Callable[[Any, Any], Any]
    last: Callable[[Any, Any, Any], Any]
    mesh: Mesh | None = None
    axis: str = "stage"

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise TypeError(
                "`optimizer` must be one with a solver, such as "
                f"`pjax.optim.DouglasRachford()`, got {type(self.optimizer).__name__}."
            )
        for name in ("first", "layer", "last"):
            require_function(getattr(self, name), name)
        solver, metric = self.optimizer.solver, self.optimizer.metric
        if solver.grouping != "colours":
            raise ValueError(
                f"`{type(solver).__name__}` goes through a network level by level, so layers wait "
                "for each other: take a solver over two colours, such as `AlternatingProjections` "
                "or `DouglasRachford`."
            )
        own = type(metric).weigh is not Metric.weigh and not isinstance(metric, Spectral)
        given = getattr(metric, "parameters", getattr(metric, "weight", ()))
        if own or any(path for path, _ in given):
            raise ValueError(
                "The metric of equal layers must have one number for all parameters: `Uniform` and "
                "`Spectral` with numbers, or a metric of your own with `slot_weights`."
            )
        if self.optimizer.sets is not None:
            raise ValueError("`sets` of parameters are not supported for layers side by side.")
        if self.mesh is not None and self.axis not in self.mesh.shape:
            raise ValueError(
                f"The mesh has no axis {self.axis!r}: its axes are {list(self.mesh.shape)}."
            )

    @property
    def _devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape[self.axis]

    def place(self, params: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        """The parameters where they are to lie: layers shared out along the axis, the others on all
        devices.

        **Arguments:**

        - `params`: `(of first, of all layers stacked, of last)`.
        """
        apart = self._apart(params)
        if self.mesh is None:
            return params
        mesh = self.mesh
        specs = Parts(PartitionSpec(), PartitionSpec(self.axis), PartitionSpec())
        return Parts(
            *(
                leaves.tree([jax.device_put(x, NamedSharding(mesh, spec)) for x in leaves.arrays])
                for leaves, spec in zip(apart, specs, strict=True)
            )
        )

    def update(
        self, params: tuple[Any, Any, Any], x: Any, y: Any, *, relaxation: Any = 1.0
    ) -> tuple[tuple[Any, Any, Any], ResidualHistory]:
        """Solves the problem of a batch from `params`.

        **Arguments:**

        - `params`: `(of first, of all layers stacked, of last)`: pytrees of arrays, those of layers
            with an axis of length `L` in front.
        - `x`, `y`: the batch; pytrees of arrays.
        - `relaxation`: a factor on the moves of the parameters.

        **Returns:** `(params, residual)`: the new parameters, and the [`ResidualHistory`][] of the
        solve.

        **Raises:** `ValueError` for layers that are not stacked, or that devices cannot share out
        evenly; `TypeError` for a layer whose output is not like its input;
        [`pjax.TraceError`][] for an operation without a rule; [`pjax.NonFiniteError`][].
        """
        require_relaxation(relaxation)
        apart = self._apart(params)
        programs, consts, layouts = self._traced(apart, x, y)
        count = jnp.shape(apart.layer.arrays[0])[0]
        mesh = None if self.mesh is None else Mesh(self.mesh.devices, self.mesh.axis_names)
        static = _Static(
            layouts, self.optimizer.solver, self.optimizer.check, count,
            count_levels(layouts, count), mesh, self.axis,
        )  # fmt: skip
        leaves = Parts(*(list(map(jnp.asarray, own.arrays)) for own in apart))
        anywhere = PartitionSpec()
        moved, history, checks = shardings.automatic(
            functools.partial(_solve, static),
            leaves,
            consts,
            relaxation,
            like=(jax.tree.map(shardings.spec, leaves), anywhere, anywhere),
        )
        if checks is not None:
            every = [leaf for program in programs for leaf in program]
            raise_if_unsound(every, [array for own in consts for array in own], checks)
        new = (own.tree(arrays) for own, arrays in zip(apart, moved, strict=True))
        return (*new,), history  # pyright: ignore[reportReturnType]

    def _apart(self, params: Any) -> Parts:
        if not isinstance(params, (list, tuple)) or len(params) != 3:
            found = len(params) if isinstance(params, (list, tuple)) else type(params).__name__
            raise ValueError(
                "`params` must be three trees, `(of first, of all layers stacked, of last)`; got "
                f"{found}."
            )
        apart = Parts(*map(leaves_of, params))
        lengths = {
            path: jnp.shape(leaf)[0] if jnp.ndim(leaf) else None
            for path, leaf in zip(apart.layer.paths, apart.layer.arrays, strict=True)
        }
        if not lengths or None in lengths.values() or len(set(lengths.values())) > 1:
            raise ValueError(
                "The parameters of all layers must be stacked, with an axis of one length in front "
                f"of each array: `jax.tree.map(lambda *x: jnp.stack(x), *layers)`. Got {lengths}."
            )
        (count,) = set(lengths.values())
        if not count or count % self._devices:
            raise ValueError(
                f"{count} layers cannot be shared out evenly to the {self._devices} devices along "
                f"{self.axis!r}."
            )
        return apart

    def _traced(self, apart: Parts, x: Any, y: Any) -> tuple[Parts, Parts, Parts]:
        """The parameters, the data and the layout of each part. Paths are those in `params`."""
        first, layer, last = (
            own.tree([jnp.zeros(jnp.shape(a)[skip:], jnp.result_type(a)) for a in own.arrays])
            for own, skip in zip(apart, (0, 1, 0), strict=True)
        )
        like = _output("first", lambda: self.first(first, x))
        h = jnp.zeros(like.shape, like.dtype)
        out = _output("layer", lambda: self.layer(layer, h))
        if (out.shape, out.dtype) != (like.shape, like.dtype):
            raise TypeError(
                f"`layer` makes {out.dtype} of shape {out.shape} of {like.dtype} of shape "
                f"{like.shape}: the output of equal layers is like their input. Put what changes "
                "it into `first` or `last`."
            )

        def open_end(h: Any) -> Any:
            return jnp.sum(squared_error(h, jnp.zeros(h.shape, h.dtype)))

        before = trace(lambda p: open_end(self.first(p[0], x)), (first,))
        own = trace(lambda p: open_end(self.layer(p[1], p[2])), ((), layer, h))
        behind = trace(lambda p: self.last(p[2], p[3], y), ((), (), last, h), scalar=True)
        programs = before[0], own[0], behind[0]
        if not before[0].is_variable(before[0].outputs[0]):
            raise TraceError(
                "`first` makes the input of the layers of data alone. Give the layer of the "
                "network that reads the data as `first`, with its parameters."
            )
        _require_read("layer", own[0])
        _require_read("last", behind[0])
        layouts = _layouts(self.optimizer, programs)
        require_moving(layouts)
        leaves = Parts(before[0].leaves, own[0].leaves[:-1], behind[0].leaves[:-1])
        return leaves, Parts(before[2], own[2], behind[2]), layouts


def _layouts(optimizer: Optimizer, programs: tuple[Program, Program, Program]) -> Parts:
    """The layouts of the parts, in the colours that the whole network has: A holds its first
    loss, or what is constrained before that.
    """
    options = Formulation(
        optimizer.metric, optimizer.fanout, optimizer.splitting, fallback=optimizer.fallback
    ).for_solver(optimizer.solver)
    ends = Ends(output=True), Ends(True, True), Ends(input=True)
    holds = [
        any(e.primitive is primitives.constrain_p for e in program.equations)
        for program in programs
    ]
    decides = holds.index(True) if any(holds) else 2
    graph = make_layout(programs[decides], replace(options, ends=ends[decides])).graph
    colour = graph.nodes[ends_of(graph)[0]].colour
    return Parts(
        *(
            layout(program, replace(options, ends=own._replace(colour=colour)))
            for program, own in zip(programs, ends, strict=True)
        )
    )


def _output(name: str, function: Callable[[], Any]) -> Any:
    """The shape and type of what a part hands on."""
    found = jax.eval_shape(function)
    if not isinstance(found, jax.ShapeDtypeStruct) or not jnp.issubdtype(found.dtype, jnp.floating):
        raise TypeError(f"`{name}` must return one array of floating-point numbers, got {found}.")
    return found


def _require_read(name: str, program: Program) -> None:
    given = len(program.leaves) - 1
    if not any(given in equation.inputs for equation in program.equations):
        raise TraceError(
            f"The result of `{name}` does not depend on the output of the layer before."
        )


@functools.partial(jax.jit, static_argnums=0)
def _solve(static: _Static, leaves: Parts, consts: Parts, relaxation: Any) -> Any:
    mesh, row = static.mesh, Neighbours()
    if mesh is not None:
        row = Neighbours(static.axis, mesh.shape[static.axis])
    solve = functools.partial(_solved, static, row)
    if mesh is not None:
        every, some = PartitionSpec(), PartitionSpec(static.axis)
        solve = jax.shard_map(
            solve,
            mesh=mesh,
            in_specs=(Parts(every, some, every), every),
            out_specs=(Parts(every, some, every), every),
            axis_names={static.axis},  # rows may lie along others
            check_vma=False,
        )
    moves, history = solve(leaves, consts)
    moved = Parts(
        *(
            [
                leaf if move is None else (leaf + relaxation * move).astype(leaf.dtype)
                for leaf, move in zip(own, found, strict=True)
            ]
            for own, found in zip(leaves, moves, strict=True)
        )
    )
    every = [[x for part in parts for x in part] for parts in (leaves, consts, moved)]
    checks = check(every[0], every[1], history.loss, every[2]) if static.check else None
    return moved, history, checks


def _solved(
    static: _Static, row: Neighbours, leaves: Parts, consts: Parts
) -> tuple[Parts, ResidualHistory]:
    """How far the parameters move, and the history; of the layers on this device."""
    levels, found = static.levels, static.layouts.layer
    first, of_layers, last = run_forward(row, static.layouts, leaves, consts, levels)

    def solve(number: Any, own: Any, of_layer: Any) -> Any:
        h, made = of_layer
        layer = ForwardPass(found, [*own, h], consts.layer, levels=levels, made=made)
        problem = StackedProblem(row, number, static.count, Parts(first, layer, last))
        solution, history = static.solver.solve(problem)
        history = replace(history, violations=problem.violations())
        return problem.parameter_deviations(solution), history

    numbers = jnp.arange(len(of_layers[0]))
    mapped = jax.vmap(solve, out_axes=(Parts(None, 0, None), None))
    return mapped(numbers, leaves.layer, of_layers)


__all__ = ["StagedProjections"]
