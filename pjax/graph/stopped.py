"""What is stopped, as by `stop_gradient`: decisions that depend on what moves.

Of `jnp.where(w > 0, …)` the condition follows no move of `w`, as for a gradient: it is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pjax.backend import compat
from pjax.graph.messages import no_rule
from pjax.program import Atom, Program, TraceError

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
