"""What is stopped, as by `stop_gradient`: decisions that depend on what moves.

Of `jnp.where(w > 0, …)` the condition follows no move of `w`, as for a gradient: it is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax.numpy as jnp

from pjax.backend import compat
from pjax.graph.missing import no_rule
from pjax.program import ROUNDED, STOP_GRADIENT, Atom, Program, TraceError

_BITS = compat.find_primitives("bitcast_convert_type")


class Stopped(Exception):
    """Conditions, counts and indices of parameters that are part of no piecewise linear function:
    they are data, as for a gradient.
    """

    def __init__(self, variables: Sequence[Atom]):
        super().__init__(variables)
        self.variables = variables


def check_decisions(program: Program, variables: Sequence[Atom]) -> None:
    """Raises an error where numbers become whole numbers by their bits: that is no decision."""
    behind = {atom for atom in variables if isinstance(atom, int)}
    for equation in reversed(program.equations):
        if behind.isdisjoint(equation.outputs):
            continue
        moving = [a for a in equation.inputs if isinstance(a, int) and program.is_variable(a)]
        if moving and equation.primitive in _BITS:
            raise TraceError(no_rule(equation, True))
        behind.update(a for a in moving)


def stop(program: Program, variables: Sequence[Atom]) -> Program:
    """The same program, in which these variables do not follow the parameters."""
    moving = set(program.variable) - set(variables)
    for equation in program.equations:
        if moving.isdisjoint(equation.inputs):
            moving.difference_update(equation.outputs)
    return replace(program, variable=frozenset(moving))


#: What there is to say of a parameter that only decides.
DECIDES = (
    "is read by conditions, indices and roundings alone, which do not move: it stays as it is, and "
    "its gradient is 0, too. `pjax.step` in the place of a comparison would move it"
)


def decides(program: Program, leaf: int) -> bool:
    """Whether what is computed of a parameter becomes a condition, an index or a rounded number,
    and no `stop_gradient` says so.
    """
    seen = {leaf}
    for equation in program.equations:
        if seen.isdisjoint(equation.inputs) or equation.primitive in STOP_GRADIENT:
            continue
        seen.update(equation.outputs)
        numbers = (jnp.issubdtype(program.dtype(out), jnp.floating) for out in equation.outputs)
        if not all(numbers) or equation.primitive in ROUNDED:
            return True
    return False
