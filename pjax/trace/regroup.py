"""Products, quotients and choices of parameters, in a form that has better rules.

- Factors that are functions of one value stand together. A layer norm of Flax is
  `(x − m)·(r·scale)`, with m and r computed from x; as `((x − m)·r)·scale` it is one function of
  rows, and a scaling.
- A quotient `a/b` of values of different origin is the product `a·(1/b)`.
- A choice `where(x > 0, x, a·x)` is the sum `where(x > 0, x, 0) + a·where(x > 0, 0, x)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pjax.backend import compat
from pjax.backend.compat import P
from pjax.program import COMPARISONS, ELEMENTWISE, REDUCTIONS, SHAPES, Atom, Dominators, Equation
from pjax.trace.writer import Writer

_BINARY = {"add": P.add_p, "mul": P.mul_p, "div": P.div_p}


@dataclass(frozen=True)
class _Factor:
    """`atom`, after the wires that broadcast it; or its reciprocal."""

    atom: Atom
    divides: bool
    wires: tuple[Equation, ...] = ()


@dataclass
class Regrouping:
    """Products, quotients and choices of a flat program, in a form that has better rules."""

    writer: Writer
    live: Sequence[Equation]
    outputs: Sequence[Atom]
    #: The primitives that users have given rules, which stay as they are.
    registered: Mapping[Any, int]
    dominators: Dominators = field(default_factory=Dominators)
    made: list[Equation] = field(default_factory=list)

    def run(self) -> list[Equation]:
        """All equations, in order, with the new ones where the old ones were."""
        equations = self.writer.equations
        if not any(map(self._is_candidate, self.live)):
            return equations
        live = {equation.outputs[0] for equation in self.live if equation.outputs}
        self.reads = Counter(a for e in self.live for a in e.inputs if isinstance(a, int))
        self.reads.update(a for a in self.outputs if isinstance(a, int))
        self.definitions = {out: e for e in self.live for out in e.outputs}
        done: list[Equation] = []
        for equation in equations:
            self.made = []
            if equation.outputs and equation.outputs[0] in live and self._is_candidate(equation):
                self._rewrite(equation)
            new = self.made or [equation]
            for one in new:
                self._place(one)
            done += new
        return done

    def _is_variable(self, atom: Atom) -> bool:
        return self.writer.is_variable(atom)

    def _is_candidate(self, equation: Equation) -> bool:
        if self.registered[equation.primitive]:
            return False
        if equation.primitive is P.select_n_p:
            return self._is_variable(equation.inputs[0]) and len(equation.inputs) == 3
        if equation.primitive not in (P.mul_p, P.div_p):
            return False
        return all(map(self._is_variable, equation.inputs))

    # What is computed of one value.

    def _place(self, equation: Equation) -> None:
        for out in equation.outputs:
            if not self._is_variable(out):
                continue
            operands = equation.inputs if self._is_function(equation) else ()
            self.dominators.add(
                out, [a for a in operands if isinstance(a, int) and self._is_variable(a)]
            )

    def _is_function(self, equation: Equation) -> bool:
        return (
            len(equation.outputs) == 1
            and not self.registered[equation.primitive]
            and equation.primitive in ELEMENTWISE | REDUCTIONS | SHAPES
        )

    def _share(self, a: Atom, b: Atom) -> bool:
        return (
            isinstance(a, int) and isinstance(b, int) and self.dominators.common((a, b)) is not None
        )

    # New equations.

    def _add(self, primitive: Any, inputs: tuple[Atom, ...], like: Equation, aval: Any) -> int:
        number = self.writer._number(aval)
        self.writer.variable.add(number)
        self._append(replace(like, primitive=primitive, inputs=inputs, outputs=(number,)))
        return number

    def _join(
        self, name: str, inputs: tuple[Atom, ...], at: Equation, aval: Any, last: bool = False
    ) -> int:
        """`add`, `mul` or `div` of two values at the source line of `at`, or in its place."""
        params = compat.binary_params(name, aval.dtype)
        primitive = _BINARY[name]
        if not last:
            return self._add(primitive, inputs, replace(at, params=params), aval)
        self._append(replace(at, primitive=primitive, inputs=inputs, params=params))
        return at.outputs[0]

    def _append(self, equation: Equation) -> None:
        self.made.append(equation)
        self._place(equation)

    def _rewrite(self, equation: Equation) -> None:
        if equation.primitive is P.select_n_p:
            self._split_choice(equation)
        else:
            self._regroup(equation)

    # Products and quotients.

    def _private_product(self, atom: Atom) -> Equation | None:
        """The product or quotient that defines `atom`, if nothing else reads it."""
        if not isinstance(atom, int) or self.reads[atom] != 1:
            return None
        equation = self.definitions.get(atom)
        if equation is None or self.registered[equation.primitive]:
            return None
        return equation if equation.primitive in (P.mul_p, P.div_p) else None

    def _factors(self, factor: _Factor) -> list[_Factor]:
        atom, wires = factor.atom, factor.wires
        while isinstance(atom, int) and self.reads[atom] == 1 and self._is_variable(atom):
            wire = self.definitions.get(atom)
            if wire is None or wire.primitive not in SHAPES or len(wire.inputs) != 1:
                break
            atom, wires = wire.inputs[0], (wire, *wires)
        product = self._private_product(atom)
        if product is None or not self._is_variable(atom):
            return [factor]
        left, right = product.inputs
        flipped = factor.divides != (product.primitive is P.div_p)
        return [
            *self._factors(_Factor(left, factor.divides, wires)),
            *self._factors(_Factor(right, flipped, wires)),
        ]

    def _regroup(self, equation: Equation) -> None:
        left, right = equation.inputs
        divides = equation.primitive is P.div_p
        factors = [
            *self._factors(_Factor(left, False)), *self._factors(_Factor(right, divides)),
        ]  # fmt: skip
        groups: list[list[_Factor]] = []
        known: list[_Factor] = []
        for factor in factors:
            if not self._is_variable(factor.atom):
                known.append(factor)
                continue
            joined = [g for g in groups if any(self._share(f.atom, factor.atom) for f in g)]
            rest = [g for g in groups if g not in joined]
            groups = [*rest, [*(f for g in joined for f in g), factor]]
        # What is computed of one value has a rule, however it is written.
        alone = len(groups) == 1
        together = len(groups) < len(factors) - len(known)
        if alone or not (together or (divides and not self._share(left, right))):
            return
        order = {id(f): place for place, f in enumerate(factors)}
        groups.sort(key=lambda g: min(order[id(f)] for f in g))
        groups[0] += known
        aval = self.writer.avals[equation.outputs[0]]
        products = [self._product(group, equation, aval) for group in groups]
        total = products[0]
        for product in products[1:]:
            total = self._join(
                "mul", (total, product), equation, aval, last=product is products[-1]
            )

    def _product(self, group: Sequence[_Factor], equation: Equation, aval: Any) -> Atom:
        above = [f for f in group if not f.divides]
        below = [f for f in group if f.divides]
        if not above:
            # The reciprocal of what is not broadcast yet.
            if len(below) == 1:
                (factor,) = below
                atom, wires = factor.atom, factor.wires
                while (wire := self.definitions.get(atom)) is not None:  # pyright: ignore
                    if wire.primitive not in SHAPES or len(wire.inputs) != 1:
                        break
                    atom, wires = wire.inputs[0], (wire, *wires)
                return self._wired(_Factor(self._inverse(atom, equation), False, wires))
            return self._inverse(self._joined(below, equation, aval), equation)
        total = self._joined(above, equation, aval)
        for factor in below:
            operands = total, self._wired(factor)
            total = self._join("div", operands, equation, aval)
        return total

    def _joined(self, factors: Sequence[_Factor], equation: Equation, aval: Any) -> Atom:
        total = self._wired(factors[0])
        for factor in factors[1:]:
            operands = total, self._wired(factor)
            total = self._join("mul", operands, equation, aval)
        return total

    def _inverse(self, atom: Atom, equation: Equation) -> int:
        assert isinstance(atom, int)
        aval = self.writer.avals[atom]
        one = self.writer.constant(aval.dtype.type(1), aval.dtype)
        return self._join("div", (one, atom), equation, aval)

    def _wired(self, factor: _Factor) -> Atom:
        """The factor in the shape of the product; a number has every shape."""
        atom = factor.atom
        for wire in factor.wires:
            if not isinstance(atom, int):
                return atom
            aval = compat.ShapedArray(
                self.writer.avals[wire.outputs[0]].shape, self.writer.avals[atom].dtype
            )
            if self._is_variable(atom):
                atom = self._add(wire.primitive, (atom,), wire, aval)
            else:
                number = self.writer._number(aval)
                new = replace(wire, inputs=(atom,), outputs=(number,))
                self.writer._propagate_uniform(new)
                self._append(new)
                atom = number
        return atom

    # Choices.

    def _split_choice(self, equation: Equation) -> None:
        condition, *branches = equation.inputs
        assert isinstance(condition, int)
        comparison = self.definitions.get(condition)
        if comparison is None or comparison.primitive not in COMPARISONS:
            return
        if sum(map(self._is_variable, comparison.inputs)) != 1:
            return
        (origin,) = filter(self._is_variable, comparison.inputs)
        if all(self._share(b, origin) or not self._is_variable(b) for b in branches):
            return
        aval = self.writer.avals[equation.outputs[0]]
        zero = self.writer.constant(aval.dtype.type(0), aval.dtype)
        own: list[Atom] = [zero, zero]
        parts: list[tuple[int, Atom, Atom]] = []
        for place, branch in enumerate(branches):
            if self._share(branch, origin) or not self._is_variable(branch):
                own[place] = branch
                continue
            product = self._private_product(branch)
            if product is None or product.primitive is not P.mul_p:
                return
            left, right = product.inputs
            if self._share(left, origin) == self._share(right, origin):
                return
            of_origin, other = (left, right) if self._share(left, origin) else (right, left)
            parts.append((place, of_origin, other))
        total: Atom = self._choose(equation, condition, own, aval)
        for number, (place, of_origin, other) in enumerate(parts):
            chosen: list[Atom] = [zero, zero]
            chosen[place] = of_origin
            masked = self._choose(equation, condition, chosen, aval)
            scaled = self._join("mul", (other, masked), equation, aval)
            last = number == len(parts) - 1
            total = self._join("add", (total, scaled), equation, aval, last)

    def _choose(self, equation: Equation, condition: int, cases: Sequence[Atom], aval: Any) -> int:
        full = [self._filled(case, equation, aval) for case in cases]
        return self._add(P.select_n_p, (condition, *full), equation, aval)

    def _filled(self, atom: Atom, equation: Equation, aval: Any) -> Atom:
        """A number as an array: a choice does not broadcast."""
        if isinstance(atom, int) or not aval.shape:
            return atom
        params = compat.broadcast_params((), tuple(aval.shape))
        number = self.writer._number(compat.ShapedArray(aval.shape, aval.dtype))
        new = replace(
            equation, primitive=P.broadcast_in_dim_p, inputs=(atom,), outputs=(number,),
            params=params,
        )  # fmt: skip
        self.writer._propagate_uniform(new)
        self._append(new)
        return number
