"""The terms of a loss, and what is linear between them and the result.

Of `jnp.mean(w * rows) + 0.1 * penalty` the tail is the mean, the product with data and the sum; its
heads are `rows`, which count `w/n` each, and `penalty`, which counts 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.backend import compat, device
from pjax.backend.compat import P
from pjax.patterns import sums
from pjax.program import REGISTRATIONS, Equation, Program, is_wiring, read, run


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
    """One loss of the function's result, `Σ coefficient · rows`; or a constraint, which has no part
    in it.

    **Attributes:**

    - `equation`: `rows = loss(prediction, *knowns)`; the last axis of a prediction is a row.
    - `coefficient`: how much each row counts: a known number (or an array), or the variable that
        holds it; None for a constraint.
    """

    equation: Equation
    coefficient: Any

    def counts(self, values: Mapping[int, Any]) -> Any:
        """How much each row counts, from the values of the program."""
        return values[self.coefficient] if type(self.coefficient) is int else self.coefficient


class Tail:
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
        if self.data or any(e.primitive.name in compat.SUMS_OVER_DEVICES for e in self.equations):
            return None
        found = device.run_once(lambda: self.coefficients({}))
        return [one_number(np.asarray(c)) for c in found]

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


def one_number(array: np.ndarray) -> Any:
    """An array as the number that all its entries are, if they are."""
    return array.flat[0] if array.size and np.all(array == array.flat[0]) else array


def is_linear(program: Program, equation: Equation) -> bool:
    """Whether an equation is linear, up to a known addend, in its operands that move."""
    if REGISTRATIONS[equation.primitive]:
        return False
    if is_wiring(program, equation):
        return True
    moving = sum(program.is_variable(a) for a in equation.inputs)
    if equation.primitive.name in compat.SUMS_OVER_DEVICES:
        return True
    if equation.primitive in (P.dot_general_p, P.cumsum_p, P.scatter_add_p):
        return moving == 1
    if len(equation.outputs) != 1:
        return False
    term = sums.SumTerm(equation.outputs[0])
    return sums.sum_step(program, equation, term) is not None


def is_inner_product(program: Program, equation: Equation) -> bool:
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
