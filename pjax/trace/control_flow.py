"""Control flow and choices become plain equations: loops unrolled, branches taken.

- `scan` (and a `fori_loop` with fixed bounds, which is one) over values that depend on parameters
  is unrolled: its body once per step, the entries of `xs` and `ys` by wiring. A scan of known
  values alone stays one equation.
- `cond` and `switch` take the branch of a predicate that the program fixes. Of any other predicate
  all branches are computed, and it chooses between their results; it rests during a solve.
- `while` loops whose condition the program fixes, step by step, are unrolled.
- `sort` and `top_k` of values that depend on parameters read their operands in the order of the
  forward pass: the choice rests during a solve, like any other data, and what is chosen is wiring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.backend import compat, device
from pjax.backend.compat import P
from pjax.program import Atom, Equation
from pjax.trace.writer import Writer

_SORT = compat.find_primitives("sort")
_TOP_K = compat.find_primitives("top_k")
#: Larger arrays than this are not evaluated to find out which branch is taken.
_MAX_STATIC_SIZE = 2**20
#: Steps of a `while` loop.
_MAX_STEPS = 10_000


def expand(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The outputs of a control flow equation, as plain equations; None if it stays as it is."""
    if eqn.primitive is P.cond_p:
        return _branch(writer, eqn, inputs, source)
    if not any(map(writer.is_variable, inputs)):
        return None
    if eqn.primitive is P.scan_p:
        return _unroll(writer, eqn, inputs, source)
    if eqn.primitive is P.while_p:
        return _unroll_while(writer, eqn, inputs, source)
    if eqn.primitive in _SORT:
        return writer.add_function(_sorted(eqn.params), inputs, source)
    if eqn.primitive in _TOP_K:
        return writer.add_function(_top_k(eqn.params), inputs, source)
    return None


def _unroll(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    jaxpr, consts, num_consts, num_carry = compat.scan_body(eqn.params)
    length, reverse = eqn.params["length"], eqn.params["reverse"]
    shared = list(inputs[:num_consts])
    carry = list(inputs[num_consts : num_consts + num_carry])
    xs = [
        writer.add_function(_entries(length), (atom,), source)
        for atom in inputs[num_consts + num_carry :]
    ]
    num_ys = len(jaxpr.outvars) - num_carry
    ys: list[list[Atom]] = [[] for _ in range(num_ys)]
    captured = writer.capture(jaxpr, consts)
    for step in reversed(range(length)) if reverse else range(length):
        outputs = writer.inline_body(
            jaxpr, captured, [*shared, *carry, *(x[step] for x in xs)], source
        )
        carry = outputs[:num_carry]
        for column, out in zip(ys, outputs[num_carry:], strict=True):
            column.append(out)
    if reverse:
        for column in ys:
            column.reverse()
    stacked: list[Atom] = []
    for column, var in zip(ys, jaxpr.outvars[num_carry:], strict=True):
        if column:
            stacked += writer.add_function(_stack, column, source)
        else:
            stacked.append(writer.constant(jnp.zeros((0, *var.aval.shape), var.aval.dtype)))
    return [*carry, *stacked]


def _entries(length: int) -> Any:
    """`[x[0], …, x[length − 1]]` in one wire, whose transpose joins all entries at once."""

    def entries(x: Any) -> Any:
        if length == 0:
            return []
        parts = jax.lax.split(x, (1,) * length) if length > 1 else [x]
        return [jax.lax.squeeze(part, (0,)) for part in parts]

    return entries


def _stack(*parts: Any) -> Any:
    return [jnp.stack(parts)]


def _sorted(params: Any) -> Any:
    axis, num_keys, is_stable = params["dimension"], params["num_keys"], params["is_stable"]

    def in_order(*operands: Any) -> Any:
        known = [jax.lax.stop_gradient(operand) for operand in operands]
        places = jax.lax.broadcasted_iota(jnp.int32, operands[0].shape, axis)
        *_, order = jax.lax.sort(
            (*known, places), dimension=axis, num_keys=num_keys, is_stable=is_stable
        )
        return [_take(operand, order, axis) for operand in operands]

    return in_order


def _top_k(params: Any) -> Any:
    k, axis = params["k"], params.get("axis", -1)

    def top(operand: Any) -> Any:
        known = jnp.moveaxis(jax.lax.stop_gradient(operand), axis, -1)
        indices = jnp.moveaxis(jax.lax.top_k(known, k)[1], -1, axis)
        return [_take(operand, indices, axis), indices]

    return top


def _take(operand: Any, indices: Any, axis: int) -> Any:
    return jnp.take_along_axis(operand, indices, axis, mode="promise_in_bounds")


def _branch(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The branch of a fixed predicate, or the choice between all; None where all is known."""
    which = static_value(writer, inputs[0])
    bodies = [compat.open_jaxpr(branch) for branch in eqn.params["branches"]]

    def take(place: int) -> list[Atom]:
        jaxpr, consts = bodies[place]
        captured = writer.capture(jaxpr, consts)
        return writer.inline_body(jaxpr, captured, inputs[1:], source)

    if which is not None:
        return take(int(np.clip(int(which), 0, len(bodies) - 1)))
    if not any(map(writer.is_variable, inputs)):
        return None
    results = [take(place) for place in range(len(bodies))]

    def choose(which: Any, *cases: Any) -> list[Any]:
        return [_choice(jax.lax.stop_gradient(which), cases)]

    return [
        writer.add_function(choose, [inputs[0], *cases], source)[0]
        for cases in zip(*results, strict=True)
    ]


def _choice(which: Any, cases: Sequence[Any]) -> Any:
    if len(cases) == 2:
        return jax.lax.select_n(which > 0, *cases)
    return jax.lax.select_n(jnp.clip(which, 0, len(cases) - 1).astype(jnp.int32), *cases)


def _unroll_while(
    writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str
) -> list[Atom] | None:
    """The steps of a loop whose condition the program fixes; None where it depends on data."""
    test, test_consts = compat.open_jaxpr(eqn.params["cond_jaxpr"])
    body, body_consts = compat.open_jaxpr(eqn.params["body_jaxpr"])
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tested, shared = inputs[:first], inputs[first : first + second]
    carry = list(inputs[first + second :])
    captured = writer.capture(body, body_consts), writer.capture(test, test_consts)
    for _ in range(_MAX_STEPS):
        (goes_on,) = writer.inline_body(test, captured[1], [*tested, *carry], source)
        value = static_value(writer, goes_on)
        if value is None:
            return None
        if not value:
            return carry
        carry = [
            _as_number(writer, atom)
            for atom in writer.inline_body(body, captured[0], [*shared, *carry], source)
        ]
    return None


def _as_number(writer: Writer, atom: Atom) -> Atom:
    """A counter whose value the program fixes as a literal."""
    if not isinstance(atom, int) or writer.is_variable(atom) or writer.avals[atom].ndim:
        return atom
    value = static_value(writer, atom)
    return atom if value is None else writer.constant(value[()], writer.avals[atom].dtype)


def static_value(writer: Writer, atom: Atom) -> np.ndarray | None:
    """The value of an operand that the program alone fixes; None if it depends on data."""
    found: dict[int, np.ndarray] = {}

    def value(atom: Atom) -> np.ndarray | None:
        if not isinstance(atom, int):
            return atom.array()
        aval = writer.avals[atom]
        if writer.is_variable(atom) or aval.size > _MAX_STATIC_SIZE:
            return None
        if atom in writer.uniform:
            return np.full(aval.shape, writer.uniform[atom], aval.dtype)
        if atom in found:
            return found[atom]
        equation: Equation | None = writer.definitions.get(atom)
        if equation is None:
            return None
        operands = [value(operand) for operand in equation.inputs]
        if any(operand is None for operand in operands):
            return None
        with device.compile_time_eval():
            outputs = equation.bind(*map(jnp.asarray, operands))
        found.update(zip(equation.outputs, map(np.asarray, outputs), strict=True))
        return found[atom]

    return value(atom)
