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

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.backend import compat, device
from pjax.patterns.losses.recognise import Probe, probe_rows
from pjax.patterns.losses.rows import RowShape
from pjax.patterns.losses.terms import (
    Computed,
    LossTerm,
    RowLoss,
    Tail,
    is_inner_product,
    one_number,
)
from pjax.program import (
    IN_LOSSES,
    LOSSES,
    REGISTRATIONS,
    Atom,
    Dominators,
    Equation,
    Program,
    Scalar,
    TraceError,
    primitives,
)

_WHAT_TO_DO = (
    "End it in a loss of the predictions, such as `optax.softmax_cross_entropy`, "
    "`pjax.cross_entropy` or `pjax.squared_error`, or in means and weighted sums of losses."
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
        self.dominators = Dominators()
        #: The results of losses of this library, and what moves with them.
        self.after_losses: set[Atom] = set()
        for equation in program.equations:
            moving = (a in self.after_losses for a in equation.inputs if program.is_variable(a))
            if equation.primitive in LOSSES or any(moving):
                self.after_losses.update(equation.outputs)
        self._check_result()
        self._check_named()
        self.tail = Tail(program)
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
            found.append((head, LossTerm(self.program.definitions[head], coefficients[head])))
        for group in self._groups(others):
            terms = self._terms(group, coefficients)
            found += [(max(group), term) for term in terms]
        self._check_bounded(others, [term for _, term in found])
        found += [
            (equation.outputs[0], LossTerm(equation, None))
            for equation in self.program.equations
            if equation.primitive is primitives.constrain_p
        ]
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
        equation = self.program.definitions.get(head)
        return equation is not None and equation.primitive in LOSSES

    # Which heads belong together, and where their loss begins.

    def _chain(self, var: int) -> tuple[int, ...]:
        """`var`, then every value through which all that it depends on passes, nearest first."""
        pending = [var]
        while pending:
            now = pending[-1]
            if now in self.dominators:
                pending.pop()
                continue
            operands = self._inside(now)
            missing = [a for a in operands if a not in self.dominators]
            if missing:
                pending += missing
                continue
            pending.pop()
            self.dominators.add(now, operands)
        return self.dominators.chain(var)

    def _inside(self, var: int) -> list[int]:
        """The operands of the operation that makes `var`, if a loss may hold that operation."""
        equation = self.program.definitions.get(var)
        if equation is None or len(equation.outputs) != 1 or REGISTRATIONS[equation.primitive]:
            return []
        if (
            equation.primitive not in IN_LOSSES
            and equation not in self.tail
            and not is_inner_product(self.program, equation)
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
        common = self.dominators.common(group)
        candidates = [
            base
            for base in self.dominators.chain(common)
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

    def _shape(self, group: list[int], base: int) -> RowShape:
        return RowShape(self.program, self.tail, group, base)

    def _name(self, group: Sequence[int]) -> tuple[str, str]:
        equation = self.program.definitions.get(max(group))
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
        definitions = [self.program.definitions.get(head) for head in heads]
        if any(e is not None and e.primitive in IN_LOSSES for e in definitions):
            return
        name, source = self._name(heads)
        equation = self.program.definitions.get(max(heads))
        leaf = f"`params{self.program.leaves[heads[-1]].path}`" if equation is None else ""
        message = (
            "The function does not end in a loss: it is linear in "
            f"{leaf or f'`{name}` ({source})'} and has no least value."
        )
        last = self.program.definitions.get(self.program.outputs[0])  # pyright: ignore[reportArgumentType]
        if last is not None and last is not equation:
            message += f" It ends in `{last.name}` ({last.source})."
        raise TraceError(f"{message} {_WHAT_TO_DO}")

    def _choose(self, shapes: Sequence[RowShape]) -> tuple[RowShape, Probe | None]:
        """The farthest beginning of which the loss is convex, with as many rows as the nearest; if
        there is none, one that joins the entries of its rows (the logits of `log(softmax(x))`); if
        there is none of those, the farthest of which it is concave.
        """
        for equation in self.program.equations:
            if equation.primitive.name in compat.SUMS_OVER_DEVICES:
                raise TraceError(
                    f"`{equation.name}` ({equation.source}) is a sum over devices around a loss "
                    "that is tried out where there are none. Return the loss of one "
                    "device, and take `jax.lax.pmean` of value and displacement, or `axis_name=…`."
                )
        nearest = shapes[0]
        probes: dict[int, Probe | None] = {}
        joined = math.prod(nearest.row_shape) if nearest.row_shape else nearest.num_rows
        for num_rows in dict.fromkeys((nearest.num_rows, joined)):
            for shape in reversed(shapes):
                if shape.num_rows < num_rows or shape.base in probes:
                    continue
                probe = probes[shape.base] = probe_rows(self.program, self.tail, shape)
                if probe is not None and probe.convex:
                    return shape, probe
        for shape in reversed(shapes):
            probe = probes.get(shape.base)
            if probe is not None and probe.concave:
                return shape, probe
        return nearest, probes.get(nearest.base)

    # The equations of a loss.

    def _new(self, shape: Sequence[int], dtype: Any, variable: bool) -> int:
        self.avals.append(compat.ShapedArray(tuple(shape), np.dtype(dtype)))
        number = len(self.avals) - 1
        if variable:
            self.variable.add(number)
        return number

    def _add(
        self, shape: RowShape, probe: Probe | None, coefficients: Mapping[int, Any]
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
            counts = count(values[split:end], every)
            scales = shape.scales(every, counts)
            if found is None:
                return [counts, *(s.astype(dtype) for s in scales)]
            target = found.data(shape, scales, values[end:])
            return [times * counts, target.astype(dtype)]

        end = split + len(tail.data)
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
        with device.compile_time_eval():
            number = np.asarray(count((), chosen)) * times
        return LossTerm(equation, one_number(number))

    def _in_rows(self, shape: RowShape, source: str) -> int:
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
