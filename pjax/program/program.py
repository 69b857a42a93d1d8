"""A flat program: equations over integer variables.

Its first variables are the leaves of the parameters, then the arrays that the function closes over,
so the program itself holds no data: two closures over two batches give equal programs, and
everything compiled for one serves the other.

Every variable is one of

- *variable*: it depends on a parameter that can move;
- *known*: it does not; it may be a tracer of an outer `jit`, and is evaluated in each solve;
- *uniform*: known, and all its entries are one number that is fixed by the program (`0.0` in
  `max(x, 0.0)`), whatever the data are.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pjax.backend.compat import P
from pjax.program import program


@dataclass(frozen=True)
class Scalar:
    """A literal operand: one number of one dtype."""

    value: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def array(self) -> np.ndarray:
        return np.asarray(self.value, dtype=self.dtype)


def widened(dtype: Any) -> Any:
    """A floating-point type, or float32 if it has fewer digits."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if floating else dtype


#: An operand: a variable's number, or a literal.
Atom = int | Scalar


@dataclass(frozen=True, eq=False)
class Equation:
    """`outputs = primitive(*inputs, **params)`, with the user's source line."""

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    source: str = ""

    @property
    def name(self) -> str:
        return self.primitive.name.removeprefix("pjax_")

    def bind(self, *args: Any) -> list[Any]:
        """The values of the outputs."""
        out = self.primitive.bind(*args, **self.params)
        return list(out) if self.primitive.multiple_results else [out]


@dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter pytree."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    trainable: bool


@dataclass(frozen=True, eq=False)
class Program:
    """A flat program. `key` is equal for two programs of the same equations and the same rules.

    Variables are numbered: first `leaves`, then `num_consts` captured arrays, then results. What
    only auxiliary outputs need (metrics, statistics) is evaluated, and is no part of the graph.
    """

    leaves: tuple[Leaf, ...]
    num_consts: int
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    auxiliary: tuple[Equation, ...]
    auxiliary_outputs: tuple[Atom, ...]
    avals: tuple[Any, ...]
    variable: frozenset[int]
    uniform: Mapping[int, Any]
    key: Any
    #: Functions whose own derivative rule forces follow.
    custom_rules: tuple[program.CustomRule, ...] = ()

    @functools.cached_property
    def definitions(self) -> Mapping[int, Equation]:
        """The equation that makes each variable."""
        return {out: equation for equation in self.equations for out in equation.outputs}

    def shape(self, atom: Atom) -> tuple[int, ...]:
        return atom.shape if isinstance(atom, Scalar) else tuple(self.avals[atom].shape)

    def dtype(self, atom: Atom) -> Any:
        return atom.dtype if isinstance(atom, Scalar) else self.avals[atom].dtype

    def deviation_dtype(self, atom: Atom) -> Any:
        """The type of deviations from a value: at least float32, also where it is bfloat16."""
        return widened(self.dtype(atom))

    def is_variable(self, atom: Atom) -> bool:
        return isinstance(atom, int) and atom in self.variable

    def uniform_value(self, atom: Atom) -> Any | None:
        """The number that every entry of `atom` equals, if the program fixes it."""
        return atom.value if isinstance(atom, Scalar) else self.uniform.get(atom)

    def evaluate(
        self, leaves: Sequence[Any], consts: Sequence[Any], made: Mapping[int, Any] = {}
    ) -> dict[int, Any]:
        """The value of every variable: the forward pass.

        **Arguments:**

        - `made`: values of variables that are there already.
        """
        values: dict[int, Any] = {**dict(enumerate((*leaves, *consts))), **made}
        run([e for e in self.equations if not made.keys() >= set(e.outputs)], values)
        run(self.auxiliary, values)
        return values


def read(values: Mapping[int, Any], atom: Atom) -> Any:
    """The value of an operand."""
    return atom.array() if isinstance(atom, Scalar) else values[atom]


def run(equations: Sequence[Equation], values: dict[int, Any], even: bool = False) -> None:
    """Evaluates `equations` in order, adding what they define to `values`.

    **Arguments:**

    - `even`: the derivative of `|x|` at 0 is 0, the mean of both sides, as JAX has it for `max`.
        JAX's own is 1, which is wrong for smooth functions that are written with both: softplus is
        `max(x, 0) + log1p(exp(−|x|))`. JAX gives these a rule of their own, which is inlined here.
    """
    for equation in equations:
        given = [read(values, atom) for atom in equation.inputs]
        if even and equation.primitive is P.abs_p and jnp.issubdtype(given[0].dtype, jnp.floating):
            out = [given[0] * jnp.sign(given[0])]
        else:
            out = equation.bind(*given)
        values.update(zip(equation.outputs, out, strict=True))


class TraceError(ValueError):
    """The function cannot become a graph of constraints; the message says why and what to do."""


def live(equations: Sequence[Equation], outputs: Sequence[Atom]) -> list[Equation]:
    """The equations that lead to `outputs`, in order."""
    needed = {atom for atom in outputs if isinstance(atom, int)}
    kept = []
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.outputs):
            kept.append(equation)
            needed.update(atom for atom in equation.inputs if isinstance(atom, int))
    return kept[::-1]


class CustomRule(NamedTuple):
    """A function whose own derivative rule forces follow in place of the function.

    **Attributes:**

    - `name`: of the function.
    - `source`: the user's line that calls it.
    """

    name: str
    source: str
