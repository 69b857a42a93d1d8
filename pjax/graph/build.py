"""From a program to a graph: each operation, or group of them, becomes a node with a rule.

In comes a program; out go nodes, the slots in which they hold copies of variables, and the routes
by which these are read. `units` says what is one node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pjax.backend import compat
from pjax.graph.graph import WHOLE, Ends, Graph, Kind, Node, Slot
from pjax.graph.messages import no_rule
from pjax.graph.units import LayerUnits, Stopped, Unit, Units
from pjax.options import Fallback, Splitting
from pjax.patterns import LossTerm, RowLoss, find_losses
from pjax.program import Atom, Equation, Program, TraceError, find_route
from pjax.rules import (
    PARAMETER,
    LinearLoss,
    NodeSpec,
    NumericLoss,
    Rule,
    find_builder,
)


def build_graph(
    program: Program,
    splitting: Splitting = "neuron",
    fallback: Fallback | None = None,
    ends: Ends = WHOLE,
) -> Graph:
    """The graph of a program: nodes for the operations, slots for their operands, routes between.

    **Arguments:**

    - `splitting`: `"neuron"` fuses sums with the piecewise linear function behind them; `"layer"`
        fuses them with the products before them.
    - `fallback`: `"gauss-newton"`: an operation without a rule gets a numeric projection.
    - `ends`: where the program is a part of a larger one.

    **Raises:** [`pjax.TraceError`][] for an operation without a rule, for labels that depend on
    parameters, and for a function that does not end in a loss.
    """
    kind = LayerUnits if splitting == "layer" else Units
    while True:
        with_losses, terms = find_losses(program)
        try:
            units = kind(with_losses, terms, fallback, ends)
            return _Builder(with_losses, terms, units, ends).build()
        except Stopped as stopped:
            _check_decisions(program, stopped.variables)
            program = _stop(program, stopped.variables)


_BITS = compat.find_primitives("bitcast_convert_type")


def _check_decisions(program: Program, variables: Sequence[Atom]) -> None:
    """Raises an error where numbers become whole numbers by their bits: that is no decision."""
    behind = {atom for atom in variables if isinstance(atom, int)}
    for equation in reversed(program.equations):
        if behind.isdisjoint(equation.outputs):
            continue
        moving = [a for a in equation.inputs if isinstance(a, int) and program.is_variable(a)]
        if moving and equation.primitive in _BITS:
            raise TraceError(no_rule(equation, True))
        behind.update(moving)


def _stop(program: Program, variables: Sequence[Atom]) -> Program:
    """The same program, in which these variables do not follow the parameters.

    Of `jnp.where(w > 0, …)` the condition follows no move of `w`, as for a gradient: it is data.
    """
    moving = set(program.variable) - set(variables)
    for equation in program.equations:
        if moving.isdisjoint(equation.inputs):
            moving.difference_update(equation.outputs)
    return replace(program, variable=frozenset(moving))


class _Builder:
    def __init__(self, program: Program, terms: tuple[LossTerm, ...], units: Units, ends: Ends):
        self.program, self.terms, self.units, self.ends = program, terms, units, ends
        #: Equal rules are one object.
        self.rules: dict[Rule, Rule] = {}
        self.slots: list[Slot] = []

    def build(self) -> Graph:
        program = self.program
        units: dict[int, Unit] = {}
        leaves: dict[int, None] = {}
        seen: set[int] = set()
        pending: list[Any] = list(self.units.predictions)
        while pending:
            var = pending.pop()
            if var in seen:
                continue
            seen.add(var)
            if var < len(program.leaves):
                leaves[var] = None
            elif self.units.is_wire(var):
                pending += self.units.operands(var)
            else:
                units[var] = self.units.unit(var)
                pending += [a for a in units[var].spec.slots if isinstance(a, int)]
        producers = {*leaves, *units}
        # Parameters in the order of the pytree, operations in the order of the program, losses.
        nodes: list[Node] = []
        index_of: dict[int, int] = {}
        for var in sorted(leaves):
            index_of[var] = len(nodes)
            name = program.leaves[var].path or "params"
            nodes.append(Node(len(nodes), "parameter", name, PARAMETER, (), (), var))
        for var in sorted(units):
            index_of[var] = len(nodes)
            unit = units[var]
            rule = self.units.finished(var, unit.spec.rule)
            unit = replace(unit, spec=unit.spec._replace(rule=rule))
            nodes.append(self._node(len(nodes), "operation", unit, var, producers, index_of))
        for equation in (term.equation for term in self.terms):
            spec = _loss_spec(program, equation)
            unit = Unit(spec.rule.name, spec, None, equation.source)
            out = equation.outputs[0]
            nodes.append(self._node(len(nodes), "loss", unit, out, producers, index_of))
        return Graph(program, tuple(nodes), tuple(self.slots), self.terms, self.ends)

    def _node(
        self,
        index: int,
        kind: Kind,
        unit: Unit,
        output: int,
        producers: set[int],
        index_of: Mapping[int, int],
    ) -> Node:
        program = self.program
        first = len(self.slots)
        for atom in unit.spec.slots:
            assert isinstance(atom, int)
            route = find_route(program, producers, atom)
            self.slots.append(
                Slot(
                    index=len(self.slots),
                    node=index,
                    route=route,
                    producers=tuple(index_of[source] for source in route.sources),
                    shape=program.shape(atom),
                    dtype=program.deviation_dtype(atom),
                    kind="weight" if atom in self.units.pure else "activation",
                )
            )
        return Node(
            index=index,
            kind=kind,
            name=unit.name,
            rule=self.rules.setdefault(unit.spec.rule, unit.spec.rule),
            slots=tuple(range(first, len(self.slots))),
            knowns=unit.spec.knowns,
            output=output,
            inner=unit.inner,
            source=unit.source,
            fallback=unit.fallback,
        )


def _loss_spec(program: Program, equation: Equation) -> NodeSpec:
    loss = equation.primitive
    if isinstance(loss, RowLoss):
        if loss.linear:
            rule: Rule = LinearLoss(loss.value)
        else:
            exactness = "exact" if loss.convex and loss.entries is not None else "inexact"
            rule = NumericLoss(loss.value, loss.entries, loss.name, exactness)
        return NodeSpec(rule, equation.inputs[:1], equation.inputs[1:])
    builder = find_builder(loss)
    assert builder is not None
    return builder(program, equation)
