"""A program in the making: equations are added one by one, and know what moves and what is fixed.

Rewriting rules write with it: `add_function` traces a function of variables into the program.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax.backend import compat, device, source_lines
from pjax.backend.compat import P
from pjax.program import (
    INTEGER_ARITHMETIC,
    REGISTRATIONS,
    STOPPED,
    UNIFORM_ELEMENTWISE,
    UNIFORM_WIRING,
    Atom,
    CustomRule,
    Equation,
    Scalar,
    real_type,
)


class Writer(abc.ABC):
    """The equations so far, and for each variable its type and whether it moves."""

    def __init__(self) -> None:
        self.avals: list[Any] = []
        self.equations: list[Equation] = []
        self.uniform: dict[int, Any] = {}
        self.variable: set[int] = set()
        self.constants: dict[int, Any] = {}
        self.integer_leaves: dict[int, str] = {}
        self.definitions: dict[int, Equation] = {}
        #: Of complex variables the real and the imaginary part.
        self._parts: dict[int, Any] = {}
        #: The derivative rules that forces follow; a dictionary for its order.
        self.honoured: dict[CustomRule, None] = {}

    def is_variable(self, atom: Atom) -> bool:
        return isinstance(atom, int) and atom in self.variable

    def aval(self, atom: Atom) -> Any:
        """The shape and the type of an operand."""
        return atom if isinstance(atom, Scalar) else self.avals[atom]

    def constant(self, value: Any, dtype: Any = None) -> Atom:
        """A captured value: a NumPy scalar is a literal, an array an input of the program."""
        if not isinstance(value, jax.Array):
            if np.ndim(value) == 0:
                return Scalar(np.asarray(value).item(), dtype)
            value = jnp.asarray(value, dtype)
        number = self._number(compat.ShapedArray(value.shape, value.dtype))
        self.constants[number] = value
        return number

    def capture(self, jaxpr: Any, consts: Sequence[Any]) -> list[Atom]:
        """The arrays that a body captures, as operands for `inline_body`."""
        return [
            self.constant(value, var.aval.dtype)
            for var, value in zip(jaxpr.constvars, consts, strict=True)
        ]

    def zeros(self, aval: Any, source: str) -> Atom:
        """An array of zeros, of the type of the parts of complex numbers."""
        shape, dtype = aval.shape, real_type(aval.dtype)
        return self.add_function(lambda: [jnp.zeros(shape, dtype)], [], source)[0]

    def add_function(self, fn: Any, inputs: Sequence[Atom], source: str) -> list[Atom]:
        """The outputs of a JAX function of `inputs`, with its equations added at `source`."""
        shapes = [
            jax.ShapeDtypeStruct(atom.shape, atom.dtype)
            if isinstance(atom, Scalar)
            else jax.ShapeDtypeStruct(self.avals[atom].shape, self.avals[atom].dtype)
            for atom in inputs
        ]
        closed = jax.make_jaxpr(fn)(*shapes)
        captured = self.capture(closed.jaxpr, closed.consts)
        return self.inline_body(closed.jaxpr, captured, inputs, source)

    def add_operation(
        self,
        operation: Any,
        inputs: Sequence[Atom],
        shape: Sequence[int],
        dtype: Any,
        source: str,
    ) -> int:
        """The output of something that stands where a primitive with one output does."""
        number = self._number(compat.ShapedArray(tuple(shape), np.dtype(dtype)))
        self._add(Equation(operation, tuple(inputs), (number,), {}, source))
        return number

    def inline_body(
        self, jaxpr: Any, captured: Sequence[Atom], inputs: Sequence[Atom], source: str
    ) -> list[Atom]:
        """The outputs of the body of a call at `source`, with its equations added."""
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, captured, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        self._inline(jaxpr, env, source, source_lines.is_library_function(jaxpr))
        return [self._atom(env, out) for out in jaxpr.outvars]

    def parts(self, atom: Atom, source: str) -> tuple[Atom | None, Atom | None]:
        """The real and the imaginary part of a complex operand; None for one that is 0."""
        if isinstance(atom, Scalar):
            dtype = real_type(atom.dtype)
            both = np.real(atom.value), np.imag(atom.value)
            return tuple(Scalar(x.item(), dtype) if x else None for x in map(np.asarray, both))  # pyright: ignore
        if atom not in self._parts:
            both = self.add_function(lambda z: [jnp.real(z), jnp.imag(z)], (atom,), source)
            self._parts[atom] = tuple(both)
        return self._parts[atom]

    def define_parts(self, parts: Sequence[Atom | None], aval: Any, source: str) -> int:
        """A complex variable with these parts; only an auxiliary output reads it as it is."""
        full = [self.zeros(aval, source) if part is None else part for part in parts]
        number = self._number(aval)
        self._add(Equation(P.complex_p, tuple(full), (number,), {}, source))
        if self.is_variable(number):
            self._parts[number] = tuple(parts)
        return number

    def _atom(self, env: dict[Any, Atom], var: Any) -> Atom:
        if isinstance(var, compat.Literal):
            if np.ndim(var.val):  # JAX may keep small arrays as literals
                return self.constant(np.asarray(var.val), var.aval.dtype)
            return Scalar(np.asarray(var.val).item(), var.aval.dtype)
        return env[var]

    def _number(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _add(self, equation: Equation) -> None:
        self.equations.append(equation)
        self.definitions.update(dict.fromkeys(equation.outputs, equation))
        # What a `stop_gradient` returns rests during a solve, like any other data; so does the
        # index of a choice.
        rests = equation.primitive in STOPPED and not REGISTRATIONS[equation.primitive]
        if not rests and any(map(self.is_variable, equation.inputs)):
            self.variable.update(equation.outputs)
            return
        self._propagate_uniform(equation)
        if equation.primitive in INTEGER_ARITHMETIC:
            for atom in equation.inputs:
                if isinstance(atom, int) and atom in self.integer_leaves:
                    path = self.integer_leaves[atom]
                    self.integer_leaves.update(dict.fromkeys(equation.outputs, path))

    def _broadcast(self, atom: Atom, aval: Any, source: str) -> Atom:
        """Binary operations broadcast scalars and axes of length 1: make that a wire of its own."""
        if isinstance(atom, Scalar) or self.avals[atom].shape == aval.shape:
            return atom
        params = compat.broadcast_params(tuple(self.avals[atom].shape), tuple(aval.shape))
        number = self._number(compat.ShapedArray(aval.shape, self.avals[atom].dtype))
        self._add(Equation(P.broadcast_in_dim_p, (atom,), (number,), params, source))
        return number

    def _clamp(self, inputs: tuple[Atom, ...], output: int, source: str) -> None:
        """`clamp(low, x, high)` is `min(max(x, low), high)`: two operations that have rules."""
        low, x, high = (self._broadcast(atom, self.avals[output], source) for atom in inputs)
        raised = self._number(self.avals[output])
        self._add(Equation(P.max_p, (x, low), (raised,), {}, source))
        self._add(Equation(P.min_p, (raised, high), (output,), {}, source))

    def _propagate_uniform(self, equation: Equation) -> None:
        values = []
        for atom in equation.inputs:
            value = atom.value if isinstance(atom, Scalar) else self.uniform.get(atom)
            if value is None:
                return
            dtype = atom.dtype if isinstance(atom, Scalar) else self.avals[atom].dtype
            values.append(np.asarray(value, dtype=dtype))
        if not values:
            return
        if equation.primitive in UNIFORM_WIRING:
            self.uniform[equation.outputs[0]] = values[0].item()
        elif equation.primitive in UNIFORM_ELEMENTWISE:
            with device.compile_time_eval():
                (out,) = equation.bind(*map(jnp.asarray, values))
            self.uniform[equation.outputs[0]] = np.asarray(out).item()

    @abc.abstractmethod
    def _inline(self, jaxpr: Any, env: dict[Any, Atom], caller: str, foreign: bool = False) -> None:
        """Adds the equations of a body, whose operands are in `env`; its results go there too."""
