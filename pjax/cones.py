"""Cones: chains of operations that depend on one variable become one function of it.

`gelu`, `silu`, `softmax` and a layer norm are each many operations and one function. Where the
operations that lead to a value all depend on one variable, a *cone* `y = φ(x)` is cut out of the
program, from the nearest such variable on. Chains go on through it as far as nothing else reads
what lies between: `x · σ(x)` and the `tanh` behind a scaling are one node each.

What has an exact rule keeps it: a cone is made only where an operation in it has none (a smooth
function, a quotient, a product of two functions of one variable).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pjax import _compat, primitives
from pjax._compat import P
from pjax.elementwise import ELEMENTWISE, REDUCTIONS, SHAPES, SMOOTH
from pjax.operations import independent_axes, is_noisy
from pjax.trace import Atom, Equation, Program, Scalar, canonical, read, run, widened

_ROW_LOSSES = {primitives.cross_entropy_p, primitives.margin_loss_p, primitives.squared_error_p}
_JOINS = _compat.find_primitives("stack", "concatenate")


@dataclass(frozen=True, eq=False)
class Function:
    """A piece of a program: `output = function(inputs, knowns)`. Equal pieces are equal.

    **Attributes:**

    - `equations`: over variables of its own: first the inputs, then the knowns, then results.
    - `output`: the variable that it returns.
    - `narrow`: whether the program computes it in fewer digits than float32. The function does not.
    - `key`: what two equal pieces have in common.
    """

    num_inputs: int
    num_knowns: int
    equations: tuple[Equation, ...]
    output: Atom
    narrow: bool
    key: Any

    def __call__(self, inputs: Sequence[Any], knowns: Sequence[Any]) -> Any:
        """The output, in an array of JAX."""
        values: dict[int, Any] = dict(enumerate((*inputs, *knowns)))
        run(self.equations, values, even=True)
        return read(values, self.output)

    @property
    def noisy(self) -> bool:
        """Whether its values may be off by more than their own rounding."""
        return any(is_noisy(e.primitive) for e in self.equations)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True)
class Piece:
    """A function, and what it reads in the program that it was cut out of.

    **Attributes:**

    - `inputs`: variables that depend on parameters.
    - `knowns`: operands that do not.
    - `elementwise`: whether each entry of the output depends on one entry of the one input only.
    - `rows`: pairs `(input axis, output axis)`, ascending, along which the function of the one
        input is independent.
    """

    function: Function
    inputs: tuple[int, ...]
    knowns: tuple[Atom, ...]
    elementwise: bool
    rows: tuple[tuple[int, int], ...]


def _wide(literal: Scalar) -> Scalar:
    return Scalar(literal.value, widened(literal.dtype))


def _wide_params(equation: Equation) -> Any:
    if equation.primitive is not P.convert_element_type_p:
        return equation.params
    return {**equation.params, "new_dtype": widened(equation.params["new_dtype"])}


def cut(
    program: Program, equations: Sequence[Equation], inputs: Sequence[int], output: int
) -> Piece:
    """The function from `inputs` to `output` that `equations`, in order, compute."""
    inside = {out for e in equations for out in e.outputs}
    knowns: dict[Atom, int] = {}
    number: dict[int, int] = {var: place for place, var in enumerate(inputs)}
    for equation in equations:
        for atom in equation.inputs:
            if isinstance(atom, int) and atom not in inside and atom not in number:
                number[atom] = len(inputs) + len(knowns)
                knowns[atom] = number[atom]
    size = len(number)
    local = []
    for equation in equations:
        for out in equation.outputs:
            number[out] = size
            size += 1
        local.append(
            Equation(
                equation.primitive,
                tuple(number[a] if isinstance(a, int) else _wide(a) for a in equation.inputs),
                tuple(number[out] for out in equation.outputs),
                _wide_params(equation),
            )
        )
    free = (*inputs, *knowns)
    key = (
        tuple((program.shape(a), np.dtype(program.dtype(a)).str) for a in inputs),
        tuple(str(program.dtype(a)) + str(program.shape(a)) for a in free[len(inputs) :]),
        tuple(
            (e.primitive, tuple(map(canonical, e.inputs)), e.outputs, canonical(e.params))
            for e in local
        ),
        number[output],
    )
    types = {program.dtype(a) for a in (*free, *inside)}
    narrow = any(widened(dtype) != dtype for dtype in types)
    function = Function(len(inputs), len(knowns), tuple(local), number[output], narrow, key)
    rows: tuple[tuple[int, int], ...] = ()
    elementwise = False
    if len(inputs) == 1:
        same = program.shape(inputs[0]) == program.shape(output)
        elementwise = same and all(
            e.primitive in ELEMENTWISE
            and all(program.shape(a) == program.shape(output) for a in e.inputs
                    if isinstance(a, int) and (a in inside or a == inputs[0]))
            for e in equations
        )  # fmt: skip
        rows = _independent_axes(program, equations, inputs[0], output)
    return Piece(function, tuple(inputs), tuple(knowns), elementwise, rows)


def single(program: Program, equation: Equation, output: int) -> Piece:
    """One operation as a function of all its operands that depend on parameters."""
    inputs = tuple(
        dict.fromkeys(a for a in equation.inputs if isinstance(a, int) and program.is_variable(a))
    )
    piece = cut(program, (equation,), inputs, output)
    shapes = [program.shape(var) for var in inputs]
    rows = independent_axes(equation.primitive, equation.params, shapes, program.shape(output))
    return replace(piece, rows=rows)


# --- Which values are cones ----------------------------------------------------------------------


class Cones:
    """The cones of a program, found by the dominators of each value.

    A value's *chain* is itself, then every variable through which all that it depends on passes,
    the nearest first.
    """

    def __init__(
        self,
        program: Program,
        stop: frozenset[int] = frozenset(),
        opaque: frozenset[int] = frozenset(),
    ):
        """`stop`: variables that no cone reaches beyond; `opaque`: with a rule of their own."""
        self.program = program
        self.definitions = {out: e for e in program.equations for out in e.outputs}
        self.stop, self.opaque = stop, opaque
        self.readers: dict[int, list[int]] = {}
        for equation in program.equations:
            for atom in dict.fromkeys(a for a in equation.inputs if isinstance(a, int)):
                if atom in program.variable:
                    self.readers.setdefault(atom, []).extend(equation.outputs)
        for atom in program.outputs:
            if isinstance(atom, int):
                self.readers.setdefault(atom, []).append(-1)
        self.chains: dict[int, tuple[int, ...]] = {}
        for number, leaf in enumerate(program.leaves):
            if leaf.trainable:
                self.chains[number] = (number,)
        for equation in program.equations:
            for out in equation.outputs:
                if out in program.variable:
                    self.chains[out] = (out, *self._common(equation, out))
        self._found: dict[int, tuple[int, frozenset[int]] | None] = {}

    def piece(self, var: int) -> Piece | None:
        """The cone that ends in `var`; None if it has another rule, or none."""
        found = self.base(var)
        if found is None:
            return None
        base, region = found
        equations = [e for e in self.program.equations if not region.isdisjoint(e.outputs)]
        return cut(self.program, equations, (base,), var)

    def base(self, var: int) -> tuple[int, frozenset[int]] | None:
        """The variable that the cone of `var` begins at, and the variables that it computes."""
        if var not in self._found:
            self._found[var] = self._find(var)
        return self._found[var]

    def _variables(self, equation: Equation) -> list[int]:
        program = self.program
        return [a for a in equation.inputs if isinstance(a, int) and program.is_variable(a)]

    def _common(self, equation: Equation, out: int) -> tuple[int, ...]:
        """The chain behind `out`: what is common to the chains of its operands."""
        if out in self.opaque or len(equation.outputs) != 1:
            return ()
        if equation.primitive not in ELEMENTWISE | REDUCTIONS | SHAPES:
            return ()
        operands = list(dict.fromkeys(self._variables(equation)))
        if any(a in self.stop for a in operands) and len(operands) > 1:
            return ()
        return common_chain(
            [(operand,) if operand in self.stop else self.chains[operand] for operand in operands]
        )

    def _find(self, var: int) -> tuple[int, frozenset[int]] | None:
        chain = self.chains.get(var, (var,))
        if len(chain) < 2:
            return None
        equation = self.definitions[var]
        if equation.primitive in SHAPES:
            return None
        region = self._region(var, chain[1])
        if not self._needs_cone(equation, region):
            return None
        place = 1
        while place + 1 < len(chain) and self._absorbs(chain[place], region):
            place += 1
            region = self._region(var, chain[place])
        return chain[place], frozenset(region)

    def _region(self, var: int, base: int) -> set[int]:
        """What lies between `base` and `var`, `var` included."""
        region: set[int] = set()
        pending = [var]
        while pending:
            now = pending.pop()
            if now not in region and now != base:
                region.add(now)
                pending += self._variables(self.definitions[now])
        return region

    def _needs_cone(self, equation: Equation, region: set[int]) -> bool:
        """Whether the operation has no exact rule, or belongs to one that has none."""
        primitive = equation.primitive
        variables = self._variables(equation)
        if primitive in SMOOTH:
            return True
        if primitive is P.div_p and self.program.is_variable(equation.inputs[1]):
            return True
        if primitive is P.mul_p and len(variables) == 2:
            return True
        # A sum, a maximum or a scaling of something that only it reads, and that needs one.
        return any(
            self._is_private(operand, region) and self._is_smooth(operand)
            for operand in self._behind_shapes(variables, region)
        )

    def _behind_shapes(self, variables: Sequence[int], region: set[int]) -> list[int]:
        """The operands, or what they broadcast."""
        found = []
        for var in variables:
            while (
                var in region
                and self.definitions[var].primitive in SHAPES
                and len(self.chains[var]) > 1
            ):
                (var,) = self._variables(self.definitions[var])
            found.append(var)
        return found

    def _is_smooth(self, var: int) -> bool:
        return self.base(var) is not None

    def _is_private(self, var: int, region: set[int]) -> bool:
        """Whether only the region reads `var`."""
        return var not in self.stop and all(reader in region for reader in self.readers[var])

    def _absorbs(self, base: int, region: set[int]) -> bool:
        """Whether a cone that begins at `base` takes in the operation that defines it."""
        if len(self.chains[base]) < 2 or not self._is_private(base, region):
            return False
        equation = self.definitions[base]
        if equation.primitive in SHAPES:
            # Axes of length 1 that come or go.
            behind = self.chains[base][1]
            same = np.prod(self.program.shape(base)) == np.prod(self.program.shape(behind))
            return bool(same) and self._absorbs(behind, region | {base})
        if self._is_smooth(base):
            return True
        # Elementwise, with numbers: a scaling before a `tanh`.
        others = [a for a in equation.inputs if not self.program.is_variable(a)]
        return (
            equation.primitive in ELEMENTWISE
            and self.program.shape(base) == self.program.shape(self.chains[base][1])
            and all(self.program.uniform_value(a) is not None for a in others)
        )


def common_chain(chains: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What is in all of several chains, in the order of the first; `()` of none."""
    common = chains[0] if chains else ()
    for chain in chains[1:]:
        there = set(chain)
        common = tuple(v for v in common if v in there)
    return common


# --- Axes along which a cone is independent ------------------------------------------------------


def _independent_axes(
    program: Program, equations: Sequence[Equation], base: int, output: int
) -> tuple[tuple[int, int], ...]:
    """Pairs of an axis of `base` and one of `output` along which nothing is mixed."""
    axes, mixed = carried_axes(program, equations, base)
    pairs = [
        (axis, place)
        for place, axis in enumerate(axes[output])
        if axis is not None and axis not in mixed
    ]
    ascending = all(a[0] < b[0] for a, b in itertools.pairwise(pairs))
    return tuple(pairs) if ascending else ()


def carried_axes(
    program: Program, equations: Sequence[Equation], base: int
) -> tuple[dict[int, tuple[int | None, ...]], set[int]]:
    """For each axis of what `equations` compute the axis of `base` that it is, if it is one; and
    the axes of `base` whose entries are mixed.
    """
    axes: dict[int, tuple[int | None, ...]] = {base: tuple(range(len(program.shape(base))))}
    mixed: set[int] = set()

    def lose(found: Sequence[int | None]) -> None:
        mixed.update(axis for axis in found if axis is not None)

    for equation in equations:
        operands = [a for a in equation.inputs if isinstance(a, int) and a in axes]
        if not operands:
            continue
        for out in equation.outputs:
            shape = program.shape(out)
            axes[out] = _carried(program, equation, operands, axes, shape, lose)
    return axes, mixed


def _carried(
    program: Program,
    equation: Equation,
    operands: Sequence[int],
    axes: Mapping[int, tuple[int | None, ...]],
    shape: tuple[int, ...],
    lose: Any,
) -> tuple[int | None, ...]:
    """For each axis of an equation's result the axis of the base that it is."""
    primitive, params = equation.primitive, equation.params
    first = axes[operands[0]]
    if primitive in ELEMENTWISE:
        found: list[int | None] = []
        for place in range(len(shape)):
            here = {
                axes[a][place] for a in operands if program.shape(a) and axes[a][place] is not None
            }
            found.append(next(iter(here)) if len(here) == 1 else None)
            if len(here) > 1:
                lose(tuple(here))
        return tuple(found)
    if primitive in REDUCTIONS:
        lose([first[axis] for axis in params["axes"]])
        return tuple(a for place, a in enumerate(first) if place not in params["axes"])
    if primitive is P.broadcast_in_dim_p:
        source = program.shape(operands[0])
        kept: list[int | None] = [None] * len(shape)
        for place, target in enumerate(params["broadcast_dimensions"]):
            if source[place] == shape[target]:
                kept[target] = first[place]
            else:
                lose([first[place]])
        return tuple(kept)
    if primitive is P.transpose_p:
        return tuple(first[axis] for axis in params["permutation"])
    if primitive in SHAPES:
        return _reshaped(program.shape(operands[0]), first, shape, lose)
    if primitive in _JOINS:
        place = params.get("axis", params.get("dimension"))
        return _joined(place, [axes[a] for a in operands], len(shape), lose)
    if primitive in _ROW_LOSSES:
        lose(first[-1:])
        return first[:-1]
    if primitive is P.dot_general_p:
        return _multiplied(params["dimension_numbers"], equation.inputs, axes, shape, lose)
    if primitive is P.gather_p and operands == [equation.inputs[0]]:
        return _gathered(params["dimension_numbers"], first, shape, lose)
    for operand in operands:
        lose(axes[operand])
    return (None,) * len(shape)


def _joined(
    place: int, operands: Sequence[tuple[int | None, ...]], ndim: int, lose: Any
) -> tuple[int | None, ...]:
    """The axes of arrays side by side along the axis `place`, which is none of theirs."""
    found: list[int | None] = []
    stacked = ndim > len(operands[0])
    for axis in range(ndim):
        here = axis - (stacked and axis > place)
        named = set() if stacked and axis == place else {axes[here] for axes in operands}
        if axis == place or len(named) != 1:
            lose(tuple(named))
            named = {None}
        found.append(named.pop())
    return tuple(found)


def _multiplied(
    numbers: Any,
    operands: Sequence[Any],
    axes: Mapping[int, tuple[int | None, ...]],
    shape: tuple[int, ...],
    lose: Any,
) -> tuple[int | None, ...]:
    """The batch axes of a product of arrays."""
    kept = []
    for place in range(len(numbers[1][0])):
        here = {
            axes[atom][batch[place]]
            for atom, batch in zip(operands, numbers[1], strict=True)
            if atom in axes
        }
        kept.append(here.pop() if len(here) == 1 else None)
    for atom in operands:
        lose([axis for axis in axes.get(atom, ()) if axis not in kept])
    return (*kept, *(None,) * (len(shape) - len(kept)))


def _gathered(
    numbers: Any, axes: tuple[int | None, ...], shape: tuple[int, ...], lose: Any
) -> tuple[int | None, ...]:
    """The batch axes of a gather: of each row other entries (`jnp.take_along_axis`)."""
    batch = [place for place in range(len(shape)) if place not in numbers.offset_dims]
    found: list[int | None] = [None] * len(shape)
    kept = set()
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    for operand_axis, index_axis in pairs:
        found[batch[index_axis]] = axes[operand_axis]
        kept.add(operand_axis)
    lose([axis for place, axis in enumerate(axes) if place not in kept])
    return tuple(found)


def _reshaped(
    source: tuple[int, ...], axes: tuple[int | None, ...], shape: tuple[int, ...], lose: Any
) -> tuple[int | None, ...]:
    """Axes that a reshape leaves whole, from the front and from the back."""
    found: list[int | None] = [None] * len(shape)
    kept: set[int] = set()
    old = [place for place, n in enumerate(source) if n != 1]
    new = [place for place, n in enumerate(shape) if n != 1]
    for ends in (zip(old, new, strict=False), zip(old[::-1], new[::-1], strict=False)):
        for before, after in ends:
            if source[before] != shape[after]:
                break
            found[after] = axes[before]
            kept.add(before)
    lose([a for place, a in enumerate(axes) if place not in kept])
    return tuple(found)


__all__ = [
    "ELEMENTWISE", "REDUCTIONS", "SHAPES", "SMOOTH", "Cones", "Function", "Piece", "carried_axes",
    "common_chain", "cut", "single",
]  # fmt: skip
