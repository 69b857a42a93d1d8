"""Wiring: reshape, transpose, slice, gather ...: which entry of a slot reads which producer.

A wiring operation copies scalars and carries no constraint. The way from the producers to one slot
is a [`Route`][]: a linear function of deviations whose matrix has one 1 in each row (or none,
where the slot reads a constant). Its transpose sums what the readers of an entry say, so a
weighted consensus is `pull(ρ z) / pull(ρ)`, exact for fan-out, repeated indices and overlaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from pjax.backend import compat
from pjax.backend.compat import P
from pjax.program.program import Atom, Equation, Program, Scalar, read
from pjax.program.vocabulary import EVEN_WIRING, SPLITS

#: Wiring primitives, and which of their operands are structure (indices, predicates), not data.
#: `slice(k, None)`: all operands from the k-th on.
_STRUCTURE: dict[Any, slice] = {
    **dict.fromkeys(
        compat.find_primitives(
            "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "concatenate",
            "slice", "pad", "rev", "split", "copy", "stack", "unstack", "device_put", "name",
            "optimization_barrier", "sharding_constraint", "tile",
        ),
        slice(0, 0),
    ),
    **dict.fromkeys(compat.find_primitives("gather", "scatter"), slice(1, 2)),
    **dict.fromkeys(compat.find_primitives("dynamic_slice"), slice(1, None)),
    **dict.fromkeys(compat.find_primitives("dynamic_update_slice"), slice(2, None)),
    **dict.fromkeys(compat.find_primitives("select_n"), slice(0, 1)),
}  # fmt: skip


def is_wiring(program: Program, equation: Equation) -> bool:
    """Whether `equation` only copies entries, with known indices and predicates."""
    if equation.primitive is P.convert_element_type_p:
        # From one floating-point type to another: the same number, rounded.
        return all(
            jnp.issubdtype(program.dtype(atom), jnp.floating)
            for atom in (equation.inputs[0], equation.outputs[0])
        )
    structure = _STRUCTURE.get(equation.primitive)
    if structure is None or structure_depends_on_parameters(program, equation):
        return False
    # Where one entry is written twice, which of the two stays is not determined.
    params = equation.params
    return equation.primitive is not P.scatter_p or (
        params["unique_indices"] and is_overwriting(params)
    )


def data_operands(equation: Equation) -> list[Atom]:
    """The operands of an equation without indices and predicates of wiring."""
    structure = range(len(equation.inputs))[_STRUCTURE.get(equation.primitive, slice(0, 0))]
    return [atom for place, atom in enumerate(equation.inputs) if place not in structure]


def structure_depends_on_parameters(program: Program, equation: Equation) -> bool:
    """Whether the indices or the predicate of a wiring operation are computed from parameters."""
    structure = _STRUCTURE.get(equation.primitive, slice(0, 0))
    return any(program.is_variable(atom) for atom in equation.inputs[structure])


def broadcast_step(program: Program, equation: Equation) -> tuple[int, tuple[int, ...]] | None:
    """`(operand, axes)` of a wire that repeats its operand: for each of its axes the result's.

    Also of a reshape that only adds axes of length 1. None for any other wire.
    """
    operand = equation.inputs[0]
    if not isinstance(operand, int) or not program.is_variable(operand):
        return None
    if equation.primitive is P.broadcast_in_dim_p:
        return operand, tuple(equation.params["broadcast_dimensions"])
    if equation.primitive is P.reshape_p:
        shape, result = program.shape(operand), program.shape(equation.outputs[0])
        added = len(result) - len(shape)
        # Ones in front: how a bias gets the rank of what it is added to.
        if added >= 0 and result == (1,) * added + shape:
            return operand, tuple(range(added, len(result)))
    return None


def _linear_part(equation: Equation) -> Equation:
    """`equation`, with 0 for the constant that a `gather` fills in out of bounds."""
    if equation.primitive is not P.gather_p or equation.params["fill_value"] == 0:
        return equation
    return replace(equation, params={**equation.params, "fill_value": 0})


def _some_parts(equation: Equation, operand: Any, used: set[Any]) -> list[Any]:
    """The outputs of a `split` that are in `used`, None for the others: a step of a long loop
    reads one of many.
    """
    axis, parts, start = equation.params["axis"], [], 0
    for out, size in zip(equation.outputs, equation.params["sizes"], strict=True):
        wanted = out in used
        parts.append(
            jax.lax.slice_in_dim(operand, start, start + size, axis=axis) if wanted else None
        )
        start += size
    return parts


@dataclass(frozen=True, eq=False)
class Route:
    """How one slot reads its producers: `slot = route(values of the sources)`.

    **Attributes:**

    - `sources`: the variables that it reads, each the output of one producer.
    - `equations`: the wiring in between, in order.
    - `target`: the variable that the slot holds.
    """

    program: Program
    sources: tuple[int, ...]
    equations: tuple[Equation, ...]
    target: int

    @property
    def direct(self) -> bool:
        """Whether the slot simply is its one producer's output."""
        return not self.equations

    @property
    def even(self) -> bool:
        """Whether each entry of its one producer is read as often as any other."""
        return len(self.sources) == 1 and all(
            equation.primitive in EVEN_WIRING and len(equation.inputs) == 1
            for equation in self.equations
        )

    def __call__(self, deviations: Sequence[Array | None], known: Mapping[int, Any]) -> Array:
        """The slot's deviation; constant entries (padding, masked ones) deviate by 0.

        **Arguments:**

        - `deviations`: one array per source; None for one that deviates by 0 everywhere.
        - `known`: values of the known variables (indices and predicates).
        """
        found = self.values(deviations, known, (self.target,))[self.target]
        return self._zeros(self.target) if found is None else found

    def values(
        self, deviations: Sequence[Array | None], known: Mapping[int, Any], targets: Sequence[int]
    ) -> dict[int, Any]:
        """The deviations of the sources, and of all that the wiring makes of them on the way to
        `targets`.
        """
        used = {atom for equation in self.equations for atom in equation.inputs} | set(targets)
        values: dict[int, Any] = dict(zip(self.sources, deviations, strict=True))
        for equation in self.equations:
            structure = range(len(equation.inputs))[_STRUCTURE.get(equation.primitive, slice(0, 0))]
            if all(
                values.get(atom) is None if isinstance(atom, int) else True
                for position, atom in enumerate(equation.inputs)
                if position not in structure
            ):
                values.update(dict.fromkeys(equation.outputs))
                continue
            operands = []
            for position, atom in enumerate(equation.inputs):
                if isinstance(atom, int) and values.get(atom) is not None:
                    operands.append(values[atom])
                elif position in structure:
                    operands.append(read(known, atom))
                else:
                    operands.append(self._zeros(atom))
            if equation.primitive is P.convert_element_type_p:
                # Deviations are not rounded to a narrow type.
                (out,) = equation.outputs
                outputs = [operands[0].astype(self.program.deviation_dtype(out))]
            elif equation.primitive in SPLITS and not used.issuperset(equation.outputs):
                outputs = _some_parts(equation, operands[0], used)
            else:
                outputs = _linear_part(equation).bind(*operands)
            values.update(zip(equation.outputs, outputs, strict=True))
        return values

    def _zeros(self, atom: Atom) -> Array:
        return jnp.zeros(self.program.shape(atom), self.program.deviation_dtype(atom))

    def pull(self, slot: Array, known: Mapping[int, Any]) -> tuple[Array, ...]:
        """The transpose: for each entry of each source, the sum over the entries that read it."""
        if self.direct:
            return (slot,)
        structs = [
            jax.ShapeDtypeStruct(self.program.shape(var), self.program.deviation_dtype(var))
            for var in self.sources
        ]
        transpose = jax.linear_transpose(lambda *values: self(values, known), *structs)
        # A force may have the type of wider values behind the slot.
        return tuple(transpose(slot.astype(self.program.deviation_dtype(self.target))))


def pull_together(
    routes: Sequence[Route], slots: Sequence[Array], known: Mapping[int, Any]
) -> dict[int, Array]:
    """The transpose of several routes at once: for each source the sum over all their slots.

    What the routes have in common is transposed once, after their sum.
    """
    if len(routes) == 1:
        return dict(zip(routes[0].sources, routes[0].pull(slots[0], known), strict=True))
    program = routes[0].program
    sources = tuple(dict.fromkeys(var for route in routes for var in route.sources))
    # An equation defines greater numbers than those that it reads.
    equations = sorted(
        dict.fromkeys(equation for route in routes for equation in route.equations),
        key=lambda equation: equation.outputs[0],
    )
    targets = tuple(dict.fromkeys(route.target for route in routes))
    joint = Route(program, sources, tuple(equations), targets[-1])
    structs = [jax.ShapeDtypeStruct(program.shape(v), program.deviation_dtype(v)) for v in sources]

    def values_of(*values: Array) -> list[Array]:
        found = joint.values(values, known, targets)
        return [found[target] for target in targets]

    sums: dict[int, Array] = {}
    for route, slot in zip(routes, slots, strict=True):
        slot = slot.astype(program.deviation_dtype(route.target))
        sums[route.target] = sums[route.target] + slot if route.target in sums else slot
    transpose = jax.linear_transpose(values_of, *structs)
    return dict(zip(sources, transpose([sums[target] for target in targets]), strict=True))


def find_route(program: Program, producers: set[int], target: int) -> Route:
    """The wiring that leads from `producers` (variables) to the variable `target`."""
    sources: dict[int, None] = {}
    equations: dict[Equation, None] = {}

    def visit(var: int) -> None:
        if var in producers:
            sources[var] = None
            return
        equation = program.definitions[var]
        if equation in equations:
            return
        for atom in equation.inputs:
            if not isinstance(atom, Scalar) and program.is_variable(atom):
                visit(atom)
        equations[equation] = None

    visit(target)
    return Route(program, tuple(sources), tuple(equations), target)


def is_overwriting(params: Mapping[str, Any]) -> bool:
    """Whether a `scatter` writes its updates: not `x.at[i].apply(f)`."""
    if params["update_jaxpr"] is None:
        return True
    jaxpr, _ = compat.open_jaxpr(params["update_jaxpr"])
    return list(jaxpr.outvars) == list(jaxpr.invars[1:])


def bind_scatter(scatter: Any, x: Array, indices: Array, updates: Array, params: Any) -> Array:
    return scatter(
        x, indices, updates, params["dimension_numbers"],
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"], mode=params["mode"],
    )  # fmt: skip


def scatter_add(x: Array, indices: Array, updates: Array, params: Mapping[str, Any]) -> Array:
    """`x` with each entry of the updates added to the entry that its index names."""
    return bind_scatter(lax.scatter_add, x, indices, updates, params)
