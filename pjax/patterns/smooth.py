"""Smooth functions of one array: chains of operations that all depend on one variable.

Each of these is one node:

    x * jax.nn.sigmoid(1.7 * x)
    e = jnp.exp(x - x.max(-1, keepdims=True)); e / e.sum(-1, keepdims=True)

Where the operations that lead to a value all depend on one variable, they form a *cone* above it,
and `y = φ(x)` is cut out of the program, from the nearest such variable on. Chains go on through it
as far as nothing else reads what lies between: the `tanh` behind a scaling is one node with it.

What has an exact rule keeps it: a cone is made only where an operation in it has none (a smooth
function, a quotient, a product of two functions of one variable that is not piecewise linear).
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from pjax.backend.compat import P
from pjax.patterns.excerpts import Excerpt, cut
from pjax.program import ELEMENTWISE, REDUCTIONS, SHAPES, SMOOTH, Dominators, Equation, Program


class SmoothFunctions:
    """The cones of a program, found by the dominators of each value.

    A value's *chain* is itself, then every variable through which all that it depends on passes,
    the nearest first.
    """

    def __init__(
        self,
        program: Program,
        stop: frozenset[int] = frozenset(),
        opaque: frozenset[int] = frozenset(),
        exact: Container[int] = frozenset(),
    ):
        """`stop`: variables behind which no function begins (what losses read); `opaque`: variables
        whose operation has a rule of its own; `exact`: piecewise linear functions of one value.
        """
        self.program = program
        self.stop, self.opaque, self.exact = stop, opaque, exact
        self.readers: dict[int, list[int]] = {}
        for equation in program.equations:
            for atom in dict.fromkeys(a for a in equation.inputs if isinstance(a, int)):
                if atom in program.variable:
                    self.readers.setdefault(atom, []).extend(equation.outputs)
        for atom in program.outputs:
            if isinstance(atom, int):
                self.readers.setdefault(atom, []).append(-1)
        self.dominators = Dominators(stop)
        for equation in program.equations:
            for out in equation.outputs:
                if out in program.variable:
                    self.dominators.add(out, self._operands(equation, out))
        self._found: dict[int, tuple[int, frozenset[int]] | None] = {}

    def excerpt(self, var: int) -> Excerpt | None:
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

    def _operands(self, equation: Equation, out: int) -> list[int]:
        """What `out` is computed of, if a cone may hold the operation."""
        if out in self.opaque or len(equation.outputs) != 1:
            return []
        if equation.primitive not in ELEMENTWISE | REDUCTIONS | SHAPES:
            return []
        operands = list(dict.fromkeys(self._variables(equation)))
        if any(a in self.stop for a in operands) and len(operands) > 1:
            return []
        return operands

    def _find(self, var: int) -> tuple[int, frozenset[int]] | None:
        chain = self.dominators.chain(var)
        if len(chain) < 2:
            return None
        equation = self.program.definitions[var]
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
                pending += self._variables(self.program.definitions[now])
        return region

    def _needs_cone(self, equation: Equation, region: set[int]) -> bool:
        """Whether the operation has no exact rule, or belongs to one that has none."""
        primitive = equation.primitive
        variables = self._variables(equation)
        if primitive in SMOOTH:
            return True
        if primitive is P.div_p and self.program.is_variable(equation.inputs[1]):
            return True
        if primitive is P.mul_p and len(variables) == 2 and equation.outputs[0] not in self.exact:
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
                and self.program.definitions[var].primitive in SHAPES
                and self.dominators.above(var) is not None
            ):
                (var,) = self._variables(self.program.definitions[var])
            found.append(var)
        return found

    def _is_smooth(self, var: int) -> bool:
        return self.base(var) is not None

    def _is_private(self, var: int, region: set[int]) -> bool:
        """Whether only the region reads `var`."""
        return var not in self.stop and all(reader in region for reader in self.readers[var])

    def _absorbs(self, base: int, region: set[int]) -> bool:
        """Whether a cone that begins at `base` takes in the operation that defines it."""
        behind = self.dominators.above(base)
        if behind is None or not self._is_private(base, region):
            return False
        equation = self.program.definitions[base]
        if equation.primitive in SHAPES:
            # Axes of length 1 that come or go.
            same = np.prod(self.program.shape(base)) == np.prod(self.program.shape(behind))
            return bool(same) and self._absorbs(behind, region | {base})
        if self._is_smooth(base):
            return True
        # Elementwise, with numbers: a scaling before a `tanh`.
        others = [a for a in equation.inputs if not self.program.is_variable(a)]
        return (
            equation.primitive in ELEMENTWISE
            and self.program.shape(base) == self.program.shape(behind)
            and all(self.program.uniform_value(a) is not None for a in others)
        )
