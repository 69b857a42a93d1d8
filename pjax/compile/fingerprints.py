"""Symbols of equations: equal for equations that compute the same of their operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from pjax.backend import compat
from pjax.backend.compat import P

#: XLA runs convolutions in a loop slowly on a CPU, and nothing with effects is moved.
_UNROLLABLE = compat.find_primitives("conv_general_dilated")


def rough_symbols(equations: Sequence[Any]) -> np.ndarray:
    """Numbers that are the same wherever those of `_symbols` are, and sometimes elsewhere."""
    numbers: dict[Any, int] = {}
    keys = ((e.primitive, *(out.aval.shape for out in e.outvars)) for e in equations)
    return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def symbols_of(equations: Sequence[Any]) -> np.ndarray:
    """A number for each equation, the same for equations that do the same to like operands."""
    numbers: dict[Any, int] = {}
    prints = _Prints()
    found = []
    for place, equation in enumerate(equations):
        fixed = equation.effects or equation.primitive in _UNROLLABLE
        key = place if fixed or prints.holds_unrollable(equation) else prints.of(equation)
        found.append(numbers.setdefault(key, len(numbers)))
    return np.asarray(found, np.int64)


class _Prints:
    """Keys of equations and of their parameters, equal where they do the same."""

    def __init__(self) -> None:
        self._bodies: dict[int, tuple[Any, Any]] = {}
        self._held: dict[int, tuple[Any, bool]] = {}

    def of(self, equation: Any) -> Any:
        if is_window(equation):  # of one size, wherever it begins
            return equation.primitive, _type(equation.invars[0]), _type(equation.outvars[0])
        # Rules of derivatives are made anew for each call of one function: its body tells.
        is_call = equation.primitive in compat.CALLS
        params = tuple(
            (name, self._value(value))
            for name, value in sorted(equation.params.items())
            if not is_call or _is_body(value) or isinstance(value, (bool, int, str, tuple))
        )
        operands = tuple(_type(atom) for atom in equation.invars)
        return equation.primitive, params, operands, tuple(_type(out) for out in equation.outvars)

    def holds_unrollable(self, equation: Any) -> bool:
        return any(
            self._holds(compat.open_jaxpr(value)[0])
            for value in jax.tree_util.tree_leaves(list(equation.params.values()), is_leaf=_is_body)
            if _is_body(value)
        )

    def _holds(self, jaxpr: Any) -> bool:
        if id(jaxpr) not in self._held:
            found = any(
                e.effects or e.primitive in _UNROLLABLE or self.holds_unrollable(e)
                for e in jaxpr.eqns
            )
            self._held[id(jaxpr)] = jaxpr, found
        return self._held[id(jaxpr)][1]

    def _value(self, value: Any) -> Any:
        if _is_body(value):
            jaxpr, consts = compat.open_jaxpr(value)
            return self._body(jaxpr), tuple(map(self._value, consts))
        if isinstance(value, (tuple, list)):
            return tuple(map(self._value, value))
        if isinstance(value, dict):
            return tuple((key, self._value(entry)) for key, entry in sorted(value.items()))
        if isinstance(value, np.ndarray):
            return value.shape, str(value.dtype), value.tobytes()
        try:
            hash(value)
        except TypeError:
            return id(value)
        return type(value), value

    def _body(self, jaxpr: Any) -> Any:
        if id(jaxpr) not in self._bodies:  # with the jaxpr, so that its identity stays its own
            self._bodies[id(jaxpr)] = jaxpr, self._print(jaxpr)
        return self._bodies[id(jaxpr)][1]

    def _print(self, jaxpr: Any) -> Any:
        numbers: dict[Any, int] = {}

        def name(atom: Any) -> Any:
            if isinstance(atom, compat.Literal):
                return _type(atom), str(atom.val)
            return numbers.setdefault(atom, len(numbers))

        first = tuple((name(v), _type(v)) for v in (*jaxpr.constvars, *jaxpr.invars))
        equations = tuple(
            (self.of(e), tuple(map(name, e.invars)), tuple(map(name, e.outvars)))
            for e in jaxpr.eqns
        )
        return first, equations, tuple(map(name, jaxpr.outvars))


def is_window(equation: Any) -> bool:
    """Whether an equation is a slice without gaps: the step of a loop that reads its entry."""
    if equation.primitive is not P.slice_p:
        return False
    strides = equation.params["strides"]
    return strides is None or all(stride == 1 for stride in strides)


def _is_body(value: Any) -> bool:
    return isinstance(value, (compat.ClosedJaxpr, compat.Jaxpr))


def _type(atom: Any) -> Any:
    return isinstance(atom, compat.Literal), atom.aval
