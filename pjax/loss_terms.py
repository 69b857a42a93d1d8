"""How a function ends: in which losses, of which predictions, and how much each row of them counts.

What comes last in a training script (a mean over a batch, weights of rows, a sum of several losses
and penalties) is linear: the *tail*. What it reads are *heads*. Heads that depend on one common
value are one loss, which begins at the farthest value back of which it is convex: at the logits of
a softmax cross-entropy, at the output of a `tanh` that a squared error reads. Convexity is looked
for at sample points; where it is not found, the loss begins at the nearest common value.

A loss in rows is then compared with those that have a proximal operator in closed form, again by
what it computes and not by how it is written. For any other one the operator is numeric.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pjax import _compat, fusion, primitives
from pjax._compat import P
from pjax.cones import ELEMENTWISE, REDUCTIONS, SHAPES, carried_axes, common_chain
from pjax.rules import LOSSES
from pjax.trace import REGISTRATIONS, Atom, Equation, Program, Scalar, TraceError, live, read, run
from pjax.wiring import is_wiring

#: What a loss is made of. Products of arrays and convolutions belong to networks.
_IN_LOSSES = (
    ELEMENTWISE
    | REDUCTIONS
    | SHAPES
    | LOSSES
    | _compat.find_primitives(
        "gather", "slice", "dynamic_slice", "concatenate", "stack", "pad", "rev", "cumsum",
        "cumlogsumexp", "cummax", "cumprod", "sort", "clamp", "sign",
    )
)  # fmt: skip

_WHAT_TO_DO = (
    "End it in a loss of the predictions, such as `optax.softmax_cross_entropy`, "
    "`pjax.cross_entropy` or `pjax.squared_error`, or in means and weighted sums of losses."
)


@dataclass(frozen=True, eq=False)
class Computed:
    """An operation on data that is a function of Python; it stands where a primitive does."""

    function: Callable[..., list[Any]]
    name: str
    multiple_results: bool = True

    def bind(self, *args: Any) -> list[Any]:
        return self.function(*args)


@dataclass(frozen=True, eq=False)
class RowLoss:
    """A loss `(x, *knowns) -> one number per row` without a name; it stands where a primitive does.

    **Attributes:**

    - `value`: the function; the last axis of `x` is the row.
    - `entries`: for a sum of functions of single entries: the loss of each.
    - `convex`: whether it was found to be convex at sample points.
    - `linear`: whether it is linear.
    """

    value: Callable[..., Array]
    entries: Callable[..., Array] | None
    convex: bool
    linear: bool
    name: str
    multiple_results: bool = False

    def bind(self, *args: Any) -> Array:
        return self.value(*args)


@dataclass(frozen=True, eq=False)
class LossTerm:
    """One loss of the function's result, `Σ coefficient · rows`.

    **Attributes:**

    - `equation`: `rows = loss(prediction, *knowns)`; the last axis of a prediction is a row.
    - `coefficient`: how much each row counts: a known number (or an array), or the variable that
        holds it.
    """

    equation: Equation
    coefficient: Any

    def counts(self, values: Mapping[int, Any]) -> Any:
        """How much each row counts, from the values of the program."""
        return values[self.coefficient] if type(self.coefficient) is int else self.coefficient


class _Tail:
    """The linear end of a program: the result as a function of its heads."""

    def __init__(self, program: Program):
        self.program = program
        self.output = program.outputs[0]
        consumers: dict[int, list[Equation]] = {}
        for equation in program.equations:
            for atom in equation.inputs:
                if program.is_variable(atom):
                    consumers.setdefault(atom, []).append(equation)  # pyright: ignore
        inside: set[int] = set()
        for equation in reversed(program.equations):
            moving = any(program.is_variable(out) for out in equation.outputs)
            if not moving or not is_linear(program, equation):
                continue
            if all(
                id(reader) in inside
                for out in equation.outputs
                for reader in consumers.get(out, ())
            ):
                inside.add(id(equation))
        self._inside = inside
        self.equations = [e for e in program.equations if id(e) in inside]
        made = {out for e in self.equations for out in e.outputs}
        read_here = [a for e in self.equations for a in e.inputs] + [self.output]
        #: What the tail reads, in the order of the program.
        self.heads: list[int] = sorted(
            {a for a in read_here if program.is_variable(a) and a not in made}  # pyright: ignore
        )
        heads = set(self.heads)
        #: The data that it reads.
        self.data = sorted(
            {a for e in self.equations for a in e.inputs if isinstance(a, int)} - made - heads
        )

    def __contains__(self, equation: Equation) -> bool:
        return id(equation) in self._inside

    def coefficients(self, values: Mapping[int, Any]) -> list[Any]:
        """`∂ result/∂ head` for each head: the transpose of the tail, of ones."""
        program = self.program

        def result(*heads: Any) -> Any:
            known = {**values, **dict(zip(self.heads, heads, strict=True))}
            run(self.equations, known)
            return jnp.sum(read(known, self.output))

        # Linear: any point will do, also one where the losses overflow.
        points = [jnp.zeros(program.shape(v), program.dtype(v)) for v in self.heads]
        return list(jax.grad(result, argnums=tuple(range(len(points))))(*points))

    def coefficient(self, var: int, values: Mapping[int, Any]) -> Any:
        """`∂ result/∂ var` for a value inside of the tail, or a head."""
        program = self.program
        after, seen = [], {var}
        for equation in self.equations:
            if not seen.isdisjoint(equation.inputs) and var not in equation.outputs:
                seen.update(equation.outputs)
                after.append(equation)

        def result(value: Any) -> Any:
            known = {**values, var: value}
            for equation in after:
                for atom in equation.inputs:
                    if isinstance(atom, int) and atom not in known:
                        known[atom] = jnp.zeros(program.shape(atom), program.dtype(atom))
                run([equation], known)
            return jnp.sum(read(known, self.output))

        return jax.grad(result)(jnp.zeros(program.shape(var), program.dtype(var)))

    def static(self) -> list[Any] | None:
        """The coefficients as known numbers, where no data enters: a float if all are the same."""
        if self.data:
            return None
        found = _compat.run_once(lambda: self.coefficients({}))
        return [_one_number(np.asarray(c)) for c in found]

    def row_value(self, heads: Sequence[int]) -> int:
        """The last value that joins all of `heads`: what follows only sums and scales it."""
        behind: dict[int, bool] = dict.fromkeys(heads, True)
        definitions: dict[int, Equation] = {}
        for equation in self.equations:
            leads = any(behind.get(a, False) for a in equation.inputs if isinstance(a, int))
            for out in equation.outputs:
                behind[out] = leads
                definitions[out] = equation
        now = self.output
        assert isinstance(now, int)
        while now in definitions and now not in heads:
            leading = {
                a for a in definitions[now].inputs if isinstance(a, int) and behind.get(a, False)
            }
            if len(leading) != 1:
                break
            (now,) = leading
        return now


def _one_number(array: np.ndarray) -> Any:
    """An array as the number that all its entries are, if they are."""
    return array.flat[0] if array.size and np.all(array == array.flat[0]) else array


def is_linear(program: Program, equation: Equation) -> bool:
    """Whether an equation is linear, up to a known addend, in its operands that move."""
    if REGISTRATIONS[equation.primitive]:
        return False
    if is_wiring(program, equation):
        return True
    moving = sum(program.is_variable(a) for a in equation.inputs)
    if equation.primitive in (P.dot_general_p, P.cumsum_p, P.scatter_add_p):
        return moving == 1
    if len(equation.outputs) != 1:
        return False
    term = fusion.SumTerm(equation.outputs[0])
    return fusion.sum_step(program, equation, term) is not None


def _is_inner_product(program: Program, equation: Equation) -> bool:
    """Whether an equation is `Σ a b` of two values of parameters, over all but their batch axes."""
    if equation.primitive is not P.dot_general_p or not all(
        map(program.is_variable, equation.inputs)
    ):
        return False
    contracted, batch = equation.params["dimension_numbers"]
    return all(
        len(axes) + len(rows) == len(program.shape(atom))
        for axes, rows, atom in zip(contracted, batch, equation.inputs, strict=True)
    )


def find_losses(program: Program) -> tuple[Program, tuple[LossTerm, ...]]:
    """The losses that a program ends in, and the program with equations for them.

    **Raises:** [`pjax.TraceError`][] if the function does not end in losses.
    """
    # Errors name source lines; what follows the parameters may be less than the equations say.
    key = (program.key, tuple(e.source for e in program.equations), program.variable)
    if key not in _FOUND:
        _FOUND[key] = _Finder(program).find()
        if len(_FOUND) > _MAX_FOUND:
            _FOUND.popitem(last=False)
    _FOUND.move_to_end(key)
    return _FOUND[key]


_FOUND: OrderedDict[Any, tuple[Program, tuple[LossTerm, ...]]] = OrderedDict()
_MAX_FOUND = 64


class _Finder:
    def __init__(self, program: Program):
        self.program = program
        self.definitions = {out: e for e in program.equations for out in e.outputs}
        self.chains: dict[int, tuple[int, ...]] = {}
        #: The results of losses of this library, and what moves with them.
        self.after_losses: set[Atom] = set()
        for equation in program.equations:
            moving = (a in self.after_losses for a in equation.inputs if program.is_variable(a))
            if equation.primitive in LOSSES or any(moving):
                self.after_losses.update(equation.outputs)
        self._check_result()
        self._check_named()
        self.tail = _Tail(program)
        self.avals = list(program.avals)
        self.equations = list(program.equations)
        self.variable = set(program.variable)

    def _check_result(self) -> None:
        program = self.program
        if len(program.outputs) != 1:
            raise TraceError(
                f"The function returns {len(program.outputs)} arrays; it must return one, the "
                f"loss. {_WHAT_TO_DO}"
            )
        if not program.is_variable(program.outputs[0]):
            self._check_rows()
            raise TraceError(
                "The function's result does not depend on any parameter that can move. "
                + _WHAT_TO_DO
            )

    def _check_rows(self) -> None:
        """Whether nothing moves since there are no rows."""
        empty = [
            (equation, self.program.shape(atom))
            for equation in self.program.equations
            for atom in equation.inputs
            if 0 in self.program.shape(atom)
        ]
        if empty:
            equation, shape = empty[-1]
            raise TraceError(
                f"The batch is empty: `{equation.name}` ({equation.source}) gets an operand of "
                f"shape {shape}."
            )

    def _check_named(self) -> None:
        """Of the losses of this library, whether they read predictions and data."""
        for equation in self.program.equations:
            if equation.primitive not in LOSSES:
                continue
            prediction, labels = equation.inputs
            if self.program.is_variable(labels):
                raise TraceError(
                    f"The labels of `{equation.name}` ({equation.source}) depend on the "
                    "parameters; they must be data. Use `jax.lax.stop_gradient` on them if they "
                    "are meant to rest."
                )
            if self.program.is_variable(prediction) and prediction in self.after_losses:
                raise TraceError(
                    f"`{equation.name}` ({equation.source}) reads the result of another loss."
                )

    def find(self) -> tuple[Program, tuple[LossTerm, ...]]:
        coefficients = dict(zip(self.tail.heads, self._coefficients(), strict=True))
        named = [h for h in self.tail.heads if self._is_named(h)]
        others = [h for h in self.tail.heads if h not in named]
        found: list[tuple[int, LossTerm]] = []
        for head in named:
            found.append((head, LossTerm(self.definitions[head], coefficients[head])))
        for group in self._groups(others):
            terms = self._terms(group, coefficients)
            found += [(max(group), term) for term in terms]
        self._check_bounded(others, [term for _, term in found])
        found.sort(key=lambda pair: pair[0])
        program = replace(
            self.program,
            equations=tuple(self.equations),
            avals=tuple(self.avals),
            variable=frozenset(self.variable),
        )
        return program, tuple(term for _, term in found)

    def _coefficients(self) -> list[Any]:
        """How much each head counts: known numbers, or else variables, whose equation is added."""
        static = self.tail.static()
        if static is not None:
            return static
        tail = self.tail

        def derive(*values: Any) -> list[Any]:
            return tail.coefficients(dict(zip(tail.data, values, strict=True)))

        return list(self._add_computed(derive, tail.data, ""))

    def _add_computed(
        self, function: Callable[..., list[Any]], atoms: Sequence[Atom], source: str
    ) -> tuple[int, ...]:
        """The variables that hold what a function of data returns."""
        args = [
            jax.ShapeDtypeStruct(a.shape, a.dtype)
            if isinstance(a, Scalar)
            else jax.ShapeDtypeStruct(self.avals[a].shape, self.avals[a].dtype)
            for a in atoms
        ]
        shapes = jax.eval_shape(function, *args)
        outputs = tuple(self._new(s.shape, s.dtype, False) for s in shapes)
        operation = Computed(function, "loss_data")
        self.equations.append(Equation(operation, tuple(atoms), outputs, {}, source))
        return outputs

    def _is_named(self, head: int) -> bool:
        equation = self.definitions.get(head)
        return equation is not None and equation.primitive in LOSSES

    # Which heads belong together, and where their loss begins.

    def _chain(self, var: int) -> tuple[int, ...]:
        """`var`, then every value through which all that it depends on passes, nearest first."""
        pending = [var]
        while pending:
            now = pending[-1]
            if now in self.chains:
                pending.pop()
                continue
            operands = self._inside(now)
            missing = [a for a in operands if a not in self.chains]
            if missing:
                pending += missing
                continue
            pending.pop()
            self.chains[now] = (now, *common_chain([self.chains[a] for a in operands]))
        return self.chains[var]

    def _inside(self, var: int) -> list[int]:
        """The operands of the operation that makes `var`, if a loss may hold that operation."""
        equation = self.definitions.get(var)
        if equation is None or len(equation.outputs) != 1 or REGISTRATIONS[equation.primitive]:
            return []
        if (
            equation.primitive not in _IN_LOSSES
            and equation not in self.tail
            and not _is_inner_product(self.program, equation)
        ):
            return []
        return list(
            dict.fromkeys(a for a in equation.inputs if self.program.is_variable(a))  # pyright: ignore
        )

    def _groups(self, heads: Sequence[int]) -> list[list[int]]:
        """Heads whose chains meet."""
        groups: list[tuple[list[int], set[int]]] = []
        for head in heads:
            chain = set(self._chain(head))
            meeting = [g for g in groups if not chain.isdisjoint(g[1])]
            members, seen = [head], chain
            for group in meeting:
                members, seen = group[0] + members, seen | group[1]
                groups.remove(group)
            groups.append((sorted(members), seen))
        return [members for members, _ in groups]

    def _terms(self, group: list[int], coefficients: Mapping[int, Any]) -> list[LossTerm]:
        """The loss of heads that depend on one common value, or of each the linear one."""
        common = common_chain([self._chain(head) for head in group])
        candidates = [
            base
            for base in common
            if group != [base]
            and base not in self.after_losses
            and jnp.issubdtype(self.program.dtype(base), jnp.floating)
        ]
        if candidates:
            shapes = [self._shape(group, b) for b in candidates]
            return [self._add(*self._choose(shapes), coefficients)]
        if not self.after_losses.isdisjoint(group):
            raise TraceError(self._joins_losses(group))
        return [self._add(self._shape([h], h), None, coefficients) for h in group]

    def _shape(self, group: list[int], base: int) -> _Shape:
        return _Shape(self.program, self.definitions, self.tail, group, base)

    def _name(self, group: Sequence[int]) -> tuple[str, str]:
        equation = self.definitions.get(max(group))
        return ("loss", "") if equation is None else (equation.name, equation.source)

    def _joins_losses(self, group: Sequence[int]) -> str:
        name, source = self._name(group)
        return (
            f"`{name}` ({source}) joins a loss with a value of the parameters that is no data, and "
            f"is no function of one prediction. {_WHAT_TO_DO}"
        )

    def _check_bounded(self, heads: Sequence[int], terms: Sequence[LossTerm]) -> None:
        """Raises an error where the whole result is linear in parameters or in what the network's
        own operations return: no loss was taken of it.
        """
        if not all(
            isinstance(t.equation.primitive, RowLoss) and t.equation.primitive.linear for t in terms
        ):
            return
        definitions = [self.definitions.get(head) for head in heads]
        if any(e is not None and e.primitive in _IN_LOSSES for e in definitions):
            return
        name, source = self._name(heads)
        equation = self.definitions.get(max(heads))
        leaf = f"`params{self.program.leaves[heads[-1]].path}`" if equation is None else ""
        message = (
            "The function does not end in a loss: it is linear in "
            f"{leaf or f'`{name}` ({source})'} and has no least value."
        )
        last = self.definitions.get(self.program.outputs[0])  # pyright: ignore[reportArgumentType]
        if last is not None and last is not equation:
            message += f" It ends in `{last.name}` ({last.source})."
        raise TraceError(f"{message} {_WHAT_TO_DO}")

    def _choose(self, shapes: Sequence[_Shape]) -> tuple[_Shape, _Probe | None]:
        """The farthest beginning of which the loss is convex, with as many rows as the nearest; if
        there is none, one that joins the entries of its rows (the logits of `log(softmax(x))`); if
        there is none of those, the farthest of which it is concave.
        """
        nearest = shapes[0]
        probes: dict[int, _Probe | None] = {}
        joined = math.prod(nearest.row_shape) if nearest.row_shape else nearest.num_rows
        for num_rows in dict.fromkeys((nearest.num_rows, joined)):
            for shape in reversed(shapes):
                if shape.num_rows < num_rows or shape.base in probes:
                    continue
                probe = probes[shape.base] = _probe(self.program, self.tail, shape)
                if probe is not None and probe.convex:
                    return shape, probe
        for shape in reversed(shapes):
            probe = probes.get(shape.base)
            if probe is not None and probe.concave:
                return shape, probe
        return nearest, probes.get(nearest.base)

    # The equations of a loss.

    def _new(self, shape: Sequence[int], dtype: Any, variable: bool) -> int:
        self.avals.append(_compat.ShapedArray(tuple(shape), np.dtype(dtype)))
        number = len(self.avals) - 1
        if variable:
            self.variable.add(number)
        return number

    def _add(
        self, shape: _Shape, probe: _Probe | None, coefficients: Mapping[int, Any]
    ) -> LossTerm:
        name, source = self._name(shape.heads)
        dtype = self.program.dtype(shape.base)
        prediction = self._in_rows(shape, source)
        found = None if probe is None else probe.found
        sign = None if probe is None else probe.sign
        chosen = [coefficients[head] for head in shape.heads]
        places = [c for c in chosen if type(c) is int]
        split = len(places)

        tail, times = self.tail, 1.0 if found is None else found.times

        def count(values: Sequence[Any], every: Sequence[Any]) -> Array:
            data = dict(zip(tail.data, values, strict=True))
            return shape.counts(tail.coefficient(shape.row_value, data), every, sign)

        def derive(*values: Any) -> list[Any]:
            """The coefficient of each row, then what the loss needs to know of data."""
            given = iter(values)
            every = [next(given) if type(c) is int else c for c in chosen]
            counts = count(values[split:whole], every)
            scales = shape.scales(every, counts)
            if found is None:
                return [counts, *(s.astype(dtype) for s in scales)]
            target = found.data(shape, scales, values[whole:])
            return [times * counts, target.astype(dtype)]

        whole = split + len(tail.data)
        reads = [*places, *tail.data, *shape.knowns]
        counts, *derived = self._add_computed(derive, reads, source)
        if found is None:
            knowns: tuple[Atom, ...] = (*derived, *shape.knowns)
            convex = probe is not None and probe.sign is not None
            linear = shape.heads == [shape.base]
            value, entries = shape.row_function(), shape.entry_function()
            primitive: Any = RowLoss(value, entries, convex, linear, name)
        else:
            knowns, primitive = tuple(derived), found.primitive
        rows = self._new(shape.row_shape, dtype, True)
        equation = Equation(primitive, (prediction, *knowns), (rows,), {}, source)
        self.equations.append(equation)
        if places:
            return LossTerm(equation, counts)
        with _compat.compile_time_eval():
            number = np.asarray(count((), chosen)) * times
        return LossTerm(equation, _one_number(number))

    def _in_rows(self, shape: _Shape, source: str) -> int:
        """The prediction with its rows last, by wiring."""
        var, program = shape.base, self.program
        dtype = program.dtype(var)
        for function in (shape.transpose, shape.reshape):
            aval = self.avals[var]
            closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
            if not closed.eqns or (
                closed.out_avals[0].shape == aval.shape and function is shape.reshape
            ):
                continue
            (eqn,) = closed.eqns
            new = self._new(closed.out_avals[0].shape, dtype, True)
            self.equations.append(Equation(eqn.primitive, (var,), (new,), eqn.params, source))
            var = new
        return var


class _Shape:
    """A group of heads as a function of one value: its rows.

    **Attributes:**

    - `base`: the value.
    - `region`: the equations between it and the heads.
    - `knowns`: the data that these read.
    - `rows`: the axes of the base along which the function is a sum of independent parts.
    """

    def __init__(
        self,
        program: Program,
        definitions: Mapping[int, Equation],
        tail: _Tail,
        heads: Sequence[int],
        base: int,
    ):
        self.program, self.heads, self.base = program, list(heads), base
        inside: set[int] = set()
        pending: list[Any] = [head for head in heads if head != base]
        while pending:
            now = pending.pop()
            if now in inside:
                continue
            inside.add(now)
            pending += [a for a in definitions[now].inputs if program.is_variable(a) and a != base]  # pyright: ignore
        self.region = [e for e in program.equations if not inside.isdisjoint(e.outputs)]
        made = {out for e in self.region for out in e.outputs} | {base}
        self.knowns: tuple[int, ...] = tuple(
            sorted({a for e in self.region for a in e.inputs if isinstance(a, int)} - made)
        )
        _, mixed = carried_axes(program, self.region, base)
        self.axes, _ = carried_axes(program, [*self.region, *tail.equations], base)
        shape = program.shape(base)

        def rows_of(values: Sequence[int]) -> list[int]:
            return [
                axis
                for axis in range(len(shape))
                if axis not in mixed
                and shape[axis] != 1
                and all(self.axes[var].count(axis) == 1 for var in values)
            ]

        self.rows = rows_of(heads)
        #: The value whose coefficient tells how much each row counts.
        self.row_value = tail.row_value(heads)
        if rows_of([*heads, self.row_value]) != self.rows:
            self.row_value = next((h for h in heads if h != base), base)
        self.num_rows = math.prod(shape[axis] for axis in self.rows)
        #: Whether it is a sum over single entries.
        self.separable = all(n == 1 or axis in self.rows for axis, n in enumerate(shape))
        if self.separable:
            # The last axis is the row, as for the losses of this library.
            self.rows = self.rows[:-1]
        others = [axis for axis in range(len(shape)) if axis not in self.rows]
        self._order = (*self.rows, *others)
        self._moved = tuple(shape[axis] for axis in self._order)
        self.row_shape = tuple(shape[axis] for axis in self.rows)
        self.shape = (*self.row_shape, math.prod(shape[axis] for axis in others))

    def transpose(self, x: Array) -> Array:
        identity = self._order == tuple(range(len(self._order)))
        return x if identity else lax.transpose(x, self._order)

    def reshape(self, x: Array) -> Array:
        return lax.reshape(x, self.shape)

    def _back(self, x: Array) -> Array:
        inverse = tuple(np.argsort(self._order)) if self._order else ()
        return lax.reshape(x, self._moved).transpose(inverse)

    def _over(self, head: int, array: Array) -> Array:
        """An array of a head's shape, with the base's row axes first and one more for the rest."""
        axes = self.axes[head]
        front = [axes.index(axis) for axis in self.rows]
        rest = [place for place in range(len(axes)) if place not in front]
        return jnp.transpose(array, (*front, *rest)).reshape((*self.row_shape, -1))

    def counts(self, coefficient: Any, heads: Sequence[Any], sign: float | None) -> Array:
        """How much each row counts, from the coefficient of `row_value`: the sum of the sizes of
        its entries (of a loss of entries the largest), negatively if the largest of them has not
        the sign given, with which the loss is convex. Where it is 0, that of another head.
        """
        found = self._counts(self.row_value, coefficient, sign)
        for head, own in zip(self.heads, heads, strict=True):
            if head != self.row_value:
                found = jnp.where(found == 0, self._counts(head, own, sign), found)
        return found

    def _counts(self, var: int, coefficient: Any, sign: float | None) -> Array:
        full = self._over(var, self._full(var, coefficient))
        place = jnp.argmax(jnp.abs(full), axis=-1, keepdims=True)
        largest = jnp.take_along_axis(full, place, -1)[..., 0]
        counts = jnp.abs(largest) if self.separable else jnp.sum(jnp.abs(full), -1)
        return counts if sign is None else jnp.where(sign * largest < 0, -counts, counts)

    def scales(self, coefficients: Sequence[Any], counts: Array) -> list[Array]:
        """The coefficients of heads, relative to how much each row counts."""
        divisor = jnp.where(counts == 0, 1, counts)[..., None]
        return [
            self._over(head, self._full(head, c)) / divisor
            for head, c in zip(self.heads, coefficients, strict=True)
        ]

    def _full(self, var: int, array: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(array), self.program.shape(var))

    def _heads(self, x: Array, knowns: Sequence[Any]) -> list[Array]:
        # What deviates is in float32 also where the program computes in bfloat16.
        given = zip((*self.knowns, self.base), (*knowns, self._back(x)), strict=True)
        values: dict[int, Any] = {
            number: value
            if hasattr(value, "dtype") and value.dtype == self.program.dtype(number)
            else jnp.asarray(value, self.program.dtype(number))
            for number, value in given
        }
        run(self.region, values, even=True)
        return [self._over(head, values[head]) for head in self.heads]

    def row_function(self) -> Callable[..., Array]:
        """`(x, *scales, *knowns) -> rows`."""
        count = len(self.heads)

        def value(x: Array, *args: Any) -> Array:
            heads = self._heads(x, args[count:])
            parts = [jnp.sum(c * h, -1) for c, h in zip(args[:count], heads, strict=True)]
            return functools.reduce(jnp.add, parts)

        return value

    def entry_function(self) -> Callable[..., Array] | None:
        """`(x, *scales, *knowns) -> the loss of each entry`, if it is a sum of such."""
        if not self.separable:
            return None
        count = len(self.heads)

        def entries(x: Array, *args: Any) -> Array:
            heads = self._heads(x, args[count:])
            parts = [c * h for c, h in zip(args[:count], heads, strict=True)]
            return functools.reduce(jnp.add, parts)

        return entries


# --- What a loss computes ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """A loss of this library: its primitive, and how its data is found.

    **Attributes:**

    - `times`: the loss is so many times that of the primitive.
    """

    primitive: Any
    times: float

    def data(self, shape: _Shape, scales: Sequence[Array], knowns: Sequence[Any]) -> Array:
        """The labels, or the targets, from the loss's slope at 0."""
        if self.primitive is primitives.cross_entropy_p and shape.base in shape.heads:
            # `log Σ exp x − y·x`: what is linear in it are the labels.
            return -scales[shape.heads.index(shape.base)]
        slope = _slope(shape, scales, knowns, jnp.zeros(shape.shape, scales[0].dtype))
        if self.primitive is primitives.squared_error_p:
            return -slope / self.times
        labels = 1 / shape.shape[-1] - slope
        close = jnp.round(labels)
        return jnp.where(jnp.abs(labels - close) < 1e-5, close, labels)


def _slope(shape: _Shape, scales: Sequence[Array], knowns: Sequence[Any], at: Array) -> Array:
    value = shape.row_function()
    return jax.grad(lambda x: jnp.sum(value(x, *scales, *knowns)))(at)


@dataclass(frozen=True)
class _Probe:
    """What a loss was found to be at sample points.

    **Attributes:**

    - `convex`, `concave`: of each row.
    - `found`: a loss of this library that it (or its negative) equals there, up to a number for
        each row.
    - `sign`: that of the coefficients with which it is convex; None if it is not.
    """

    convex: bool
    concave: bool
    found: _Known | None
    sign: float | None


#: Pairs of sample points for each row, of sizes over so many decades.
_PAIRS, _DECADES = 24, (-1.5, 2.5)
_TOLERANCE = 2e-4
#: A loss of more entries is sampled less often.
_ENTRIES = 2**24


def _probe(program: Program, tail: _Tail, shape: _Shape) -> _Probe | None:
    """Looks at a loss at sample points; None if it has no values there."""
    rng = np.random.default_rng(0)
    dtype = program.dtype(shape.base)
    wanted = [*tail.data, *shape.knowns]
    equations, roots = _behind(program, wanted, shape.base)
    pairs = int(np.clip(_ENTRIES // max(math.prod(shape.shape), 1), 2, _PAIRS))
    sizes = 10 ** rng.uniform(*_DECADES, (pairs, 2, *shape.shape[:-1], 1))
    points = np.asarray(sizes * rng.normal(size=(pairs, 2, *shape.shape)), np.float32)
    value = shape.row_function()
    tolerance = max(_TOLERANCE, 2 * float(jnp.finfo(dtype).eps))

    def look(drawn: Any, reference: Any, points: Any) -> Any:
        values = {**drawn, shape.base: reference}
        run(equations, values)
        every = dict(zip(tail.heads, tail.coefficients(values), strict=True))
        counted = tail.coefficient(shape.row_value, values)
        sign = jnp.where(jnp.sum(counted) < 0, -1.0, 1.0)
        heads = [every[head] for head in shape.heads]
        counts = jnp.abs(shape.counts(counted, heads, None))
        scales = shape.scales(heads, counts)
        knowns = [values[a] for a in shape.knowns]

        def rows(x: Any) -> Any:
            return value(x, *scales, *knowns)

        def at_pair(pair: Any) -> Any:
            first, second = pair
            return rows(first), rows(second), rows((first + second) / 2)

        zero = jnp.zeros(shape.shape, dtype)
        slope = _slope(shape, scales, knowns, zero)
        return lax.map(at_pair, points), rows(zero), slope, sign

    reference = _sample(program.avals[shape.base], rng, normal=True)
    drawn = {root: _sample(program.avals[root], rng) for root in roots}
    found = _compat.run_once(look, drawn, reference, points.astype(dtype))
    samples, zero, slope, sign = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    first, second, middle = samples
    finite = np.isfinite(first) & np.isfinite(second) & np.isfinite(middle)
    if finite.sum() < 0.25 * finite.size or not np.all(np.isfinite(zero)):
        return None
    a, b, m = (np.where(finite, found, 0) for found in (first, second, middle))
    gap, slack = (a + b) / 2 - m, tolerance * (np.abs(a) + np.abs(b) + np.abs(m) + 1e-3)
    convex, concave = bool(np.all(gap >= -slack)), bool(np.all(gap <= slack))
    if not convex and not concave:
        return _Probe(False, False, None, None)
    known = None
    if not convex:  # it is to be maximised: its rows count negatively
        sign, first, zero, slope = -sign, -first, -zero, -slope
    if not (convex and concave) and np.all(np.isfinite(slope)):
        at = points[:, 0].astype(np.dtype(dtype)).astype(np.float64)
        known = _compare(shape, at, first, zero, slope, tolerance)
    return _Probe(convex, concave, known, float(sign))


def _compare(
    shape: _Shape,
    points: np.ndarray,
    values: np.ndarray,
    zero: np.ndarray,
    slope: np.ndarray,
    tolerance: float,
) -> _Known | None:
    """The loss of this library with these values, less those at 0, and this slope there."""
    finite = np.isfinite(values)
    wanted = np.where(finite, values - zero, 0)
    size = np.abs(wanted) + np.max(np.abs(points), -1) + 1

    def agrees(value: np.ndarray) -> bool:
        return bool(np.all(np.where(finite, np.abs(value - wanted) <= tolerance * size, True)))

    classes = shape.shape[-1]
    labels = 1 / classes - slope
    if classes > 1 and np.all(labels > -tolerance):
        top = points.max(-1, keepdims=True)
        whole = np.log(np.exp(points - top).sum(-1)) + top[..., 0] - np.log(classes)
        sums_to_one = np.allclose(labels.sum(-1), 1, atol=tolerance)
        if sums_to_one and agrees(whole - (labels * points).sum(-1)):
            return _Known(primitives.cross_entropy_p, 1.0)
    # a/2 |x|² + slope·x: the number a from all samples.
    linear, square = (slope * points).sum(-1), np.square(points).sum(-1)
    times = float(np.median((2 * (wanted - linear) / square)[finite]))
    if not times > 0:
        return None
    nearest = 2.0 ** np.round(np.log2(times))
    if abs(times / nearest - 1) < 1e-3:  # of ½(x − t)² or (x − t)², but for rounding
        times = float(nearest)
    return (
        _Known(primitives.squared_error_p, times) if agrees(times / 2 * square + linear) else None
    )


def _behind(program: Program, wanted: Sequence[int], base: int) -> tuple[list[Equation], list[int]]:
    """The equations that lead to known variables, and what they begin at: inputs of the program,
    the base, which counts as given, and conditions on numbers, which samples of these may miss.
    """
    drawn = {
        out
        for e in program.equations
        for out in e.outputs
        if program.dtype(out) == jnp.bool_
        and any(jnp.issubdtype(program.dtype(a), jnp.floating) for a in e.inputs)
    } | {base}
    equations = live([e for e in program.equations if drawn.isdisjoint(e.outputs)], wanted)
    needed = {a for e in equations for a in e.inputs if isinstance(a, int)} | set(wanted)
    made = {out for e in equations for out in e.outputs}
    return equations, sorted(needed - made - {base})


def _sample(aval: Any, rng: np.random.Generator, normal: bool = False) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        with _compat.compile_time_eval():
            keys = jax.random.split(jax.random.key(0), max(math.prod(aval.shape), 1))
            return keys[: math.prod(aval.shape)].reshape(aval.shape)
    if jnp.issubdtype(aval.dtype, jnp.floating):
        drawn = rng.normal(size=aval.shape) if normal else rng.uniform(0.05, 1, aval.shape)
    else:  # class numbers of any number of classes, and masks
        drawn = rng.integers(0, 2, aval.shape)
    return np.asarray(drawn).astype(aval.dtype)
