"""A flat program becomes a graph: nodes with rules, slots that they read, wiring between them.

Nodes are parameters, operations, losses, and the identities that the bipartition inserts. Each
operand of a node that depends on a parameter is a *slot*: it holds an edge variable, and a route
tells which producers it reads. Operands that do not are data, and belong to the node.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pjax import _compat, fusion
from pjax._compat import P
from pjax.colouring import two_colour
from pjax.cones import SMOOTH, Cones, Piece, single
from pjax.derivatives import CustomRule, CustomRuleWarning
from pjax.fusion import Cone, SumTerm
from pjax.layer import Addend, LayerSum, Product
from pjax.loss_terms import LossTerm, RowLoss, find_losses
from pjax.normalizations import normal_form
from pjax.numeric import ArrayFunction, Normalization, ScalarFunction
from pjax.operations import is_function
from pjax.projections.numeric import Rows
from pjax.rules import (
    BILINEAR,
    IDENTITY,
    Affine,
    LinearLoss,
    NodeSpec,
    NumericLoss,
    Rule,
    Term,
    bilinear_name,
    bilinear_operands,
    find_builder,
)
from pjax.thresholds import as_threshold
from pjax.trace import REGISTRATIONS, Atom, Equation, Leaf, Program, Scalar, TraceError
from pjax.wiring import (
    Route,
    broadcast_step,
    data_operands,
    find_route,
    is_wiring,
)

Kind = Literal["parameter", "operation", "loss", "identity"]
#: How finely a bilinear operation is cut: a constraint for each scalar product, or for the array.
Splitting = Literal["neuron", "layer"]
#: What an operation without a rule gets.
Fallback = Literal["gauss-newton"]


@dataclass(frozen=True, eq=False)
class Slot:
    """One operand of one node.

    **Attributes:**

    - `index`: its place in `graph.slots`.
    - `node`: the index of the node that reads it.
    - `route`: how its entries are read from producers' outputs.
    - `producers`: for each source of the route the node that provides it (the producer itself, or
        its identity).
    - `kind`: `"weight"` if it depends on parameters only, else `"activation"`.
    """

    index: int
    node: int
    route: Route
    producers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    kind: Literal["weight", "activation"]

    @property
    def variable(self) -> int:
        return self.route.target


@dataclass(frozen=True, eq=False)
class Node:
    """A parameter, an operation, a loss or an identity.

    **Attributes:**

    - `rule`: the specification; equal nodes share one. None for a parameter.
    - `slots`: indices of its slots.
    - `knowns`: its operands that are data.
    - `output`: the variable that it defines; None for a loss.
    - `inner`: `(u, offset)` for a piecewise linear node `y = f(u − offset)`: the reference of `f`.
    - `colour`: `"A"` or `"B"`; A holds the (first) loss.
    - `source`: the user's source line.
    - `fallback`: whether its operation has no rule, and `fallback="gauss-newton"` gave it one.
    """

    index: int
    kind: Kind
    name: str
    rule: Rule | None
    slots: tuple[int, ...]
    knowns: tuple[Atom, ...]
    output: int | None
    inner: tuple[int, Atom | None] | None = None
    colour: Literal["A", "B"] = "A"
    source: str = ""
    fallback: bool = False


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes, slots and wiring of a program; built once per program, and free of data."""

    program: Program
    nodes: tuple[Node, ...]
    slots: tuple[Slot, ...]
    #: What each loss node is, in their order.
    terms: tuple[LossTerm, ...]

    def edges(self) -> list[tuple[int, int]]:
        """All pairs `(producer, reader)` of node indices, without repetition, sorted."""
        return sorted({(p, slot.node) for slot in self.slots for p in slot.producers})

    def readers(self) -> dict[int, list[int]]:
        """For each node, the indices of the slots that read it."""
        found: dict[int, list[int]] = {node.index: [] for node in self.nodes}
        for slot in self.slots:
            for producer in dict.fromkeys(slot.producers):
                found[producer].append(slot.index)
        return found

    @property
    def losses(self) -> list[Node]:
        return [node for node in self.nodes if node.kind == "loss"]

    @property
    def parameters(self) -> list[Node]:
        return [node for node in self.nodes if node.kind == "parameter"]

    def colour_groups(self) -> list[list[int]]:
        """The nodes of colour A and those of colour B."""
        return [[n.index for n in self.nodes if n.colour == colour] for colour in ("A", "B")]

    def level_groups(self) -> list[list[int]]:
        """Reverse topological levels from the losses, the parameters last.

        The level of a node is its longest way to a loss, so no node reads another of its group.
        """
        level = [0] * len(self.nodes)
        # Readers before what they read: nodes are in topological order, but for identities, which
        # come last and are read from anywhere.
        place = {node.index: float(node.index) for node in self.nodes}
        for node in self.nodes:
            if node.kind == "identity":
                (slot,) = node.slots
                place[node.index] = self.slots[slot].producers[0] + 0.5
        for producer, reader in sorted(self.edges(), key=lambda edge: -place[edge[1]]):
            level[producer] = max(level[producer], level[reader] + 1)
        groups: dict[int, list[int]] = {}
        for node in self.nodes:
            if node.kind != "parameter":
                groups.setdefault(level[node.index], []).append(node.index)
        ordered = [groups[key] for key in sorted(groups)]
        parameters = [node.index for node in self.parameters]
        return [*ordered, parameters] if parameters else ordered

    def backward_order(self) -> list[int]:
        """All nodes, readers before what they read, the parameters last."""
        return [index for group in self.level_groups() for index in group]

    def loss_coefficients(self, values: Mapping[int, Any]) -> list[Any]:
        """How much each row of each loss counts in the function's result: 1 if it is the result."""
        return [term.counts(values) for term in self.terms]

    def term(self, node: Node) -> LossTerm:
        """What a loss node is in the function's result."""
        return self.terms[self.losses.index(node)]


_STOPPED = _compat.find_primitives("stop_gradient")
_BITS = _compat.find_primitives("bitcast_convert_type")
_ROUNDED = _compat.find_primitives("floor", "ceil")


class UnusedParameterWarning(UserWarning):
    """A parameter that the loss does not depend on; it stays as it is."""


def build_graph(
    program: Program, splitting: Splitting = "neuron", fallback: Fallback | None = None
) -> Graph:
    """The graph of a program: nodes for the operations, slots for their operands, routes between.

    **Arguments:**

    - `splitting`: `"neuron"` fuses sums with the piecewise linear function behind them; `"layer"`
        fuses them with the products before them.
    - `fallback`: `"gauss-newton"`: an operation without a rule gets a numeric projection.

    **Raises:** [`pjax.TraceError`][] for an operation without a rule, for labels that depend on
    parameters, and for a function that does not end in a loss.
    """
    while True:
        try:
            return _Builder(program, splitting, fallback).build()
        except _Rests as found:
            _check_decisions(program, found.variables)
            program = _at_rest(program, found.variables)


class _Rests(Exception):
    """Conditions, counts and indices of parameters that are part of no piecewise linear function:
    they are data, as for a gradient.
    """

    def __init__(self, variables: Sequence[Atom]):
        super().__init__(variables)
        self.variables = variables


def _check_decisions(program: Program, variables: Sequence[Atom]) -> None:
    """Raises an error where numbers become whole numbers by their bits: that is no decision."""
    behind = {atom for atom in variables if isinstance(atom, int)}
    for equation in reversed(program.equations):
        if behind.isdisjoint(equation.outputs):
            continue
        moving = [a for a in equation.inputs if isinstance(a, int) and program.is_variable(a)]
        if moving and equation.primitive in _BITS:
            raise TraceError(_no_rule(equation, True))
        behind.update(a for a in moving)


def _at_rest(program: Program, variables: Sequence[Atom]) -> Program:
    """The same program, in which these variables do not follow the parameters."""
    moving = set(program.variable) - set(variables)
    for equation in program.equations:
        if moving.isdisjoint(equation.inputs):
            moving.difference_update(equation.outputs)
    return replace(program, variable=frozenset(moving))


def warn(graph: Graph) -> None:
    """Warns of what may not be meant: each parameter that the function does not read at all (one at
    rest is), and each derivative rule of the user's that forces follow.
    """
    level = _levels_to_caller()
    for leaf, decides in unused(graph):
        reason = _DECIDES if decides else "is not used by the loss; it stays as it is"
        message = f"`params{leaf.path}` {leaf.shape} {reason}."
        warnings.warn(message, UnusedParameterWarning, stacklevel=level)
    for rule in graph.program.custom_rules:
        warnings.warn(honoured(rule), CustomRuleWarning, stacklevel=level)


def honoured(rule: CustomRule) -> str:
    """What there is to say of a derivative rule that forces follow."""
    return (
        f"The derivative rule of `{rule.name}` ({rule.source}) is not the derivative of its "
        "function: forces follow the rule, as gradients do. "
        f"`inspect.unwrap({rule.name})` is the function without its rule."
    )


#: What there is to say of a parameter that only decides.
_DECIDES = (
    "is read by conditions, indices and roundings alone, which rest: it stays as it is, and its "
    "gradient is 0, too. `pjax.step` in the place of a comparison would move it"
)


def unused(graph: Graph) -> list[tuple[Leaf, bool]]:
    """The parameters that could move and that nothing reads of which they would be moved, and
    whether something is decided by them.
    """
    program = graph.program
    used = {atom for equation in program.equations for atom in equation.inputs}
    nodes = {node.output for node in graph.parameters}
    leaves = [
        (number, leaf)
        for number, leaf in enumerate(program.leaves)
        if leaf.trainable and number not in nodes
    ]
    return [
        (leaf, number in used)
        for number, leaf in leaves
        if number not in used or _decides(program, number)
    ]


def _decides(program: Program, leaf: int) -> bool:
    """Whether what is computed of a parameter becomes a condition, an index or a rounded number,
    and no `stop_gradient` says that it is to rest.
    """
    seen = {leaf}
    for equation in program.equations:
        if seen.isdisjoint(equation.inputs) or equation.primitive in _STOPPED:
            continue
        seen.update(equation.outputs)
        numbers = (jnp.issubdtype(program.dtype(out), jnp.floating) for out in equation.outputs)
        if not all(numbers) or equation.primitive in _ROUNDED:
            return True
    return False


def _levels_to_caller() -> int:
    """The `stacklevel` with which the caller of this function names the user's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _compat.is_library_file(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    return level


def bipartite(graph: Graph) -> Graph:
    """The same graph with two colours such that no node reads one of its own colour.

    Identity nodes are inserted where that needs them, one per producer and as few as can be found.
    """
    colours, producers = two_colour(len(graph.nodes), graph.edges())
    flip = colours[graph.losses[0].index]
    letters = ["A" if colour == flip else "B" for colour in colours]
    nodes = [replace(n, colour=letter) for n, letter in zip(graph.nodes, letters, strict=True)]
    slots = list(graph.slots)
    for producer in producers:
        node = nodes[producer]
        assert node.output is not None
        identity, slot_index = len(nodes), len(slots)
        opposite: Any = "B" if node.colour == "A" else "A"
        var = node.output
        program = graph.program
        for index, slot in enumerate(slots):
            if producer in slot.producers and nodes[slot.node].colour == node.colour:
                through = tuple(identity if p == producer else p for p in slot.producers)
                slots[index] = replace(slot, producers=through)
        kinds = {slots[i].kind for i in range(slot_index) if identity in slots[i].producers}
        slots.append(
            Slot(
                index=slot_index,
                node=identity,
                route=Route(program, (var,), (), var),
                producers=(producer,),
                shape=program.shape(var),
                dtype=program.deviation_dtype(var),
                kind="weight" if kinds == {"weight"} else "activation",
            )
        )
        nodes.append(
            Node(
                index=identity,
                kind="identity",
                name="identity",
                rule=IDENTITY,
                slots=(slot_index,),
                knowns=(),
                output=var,
                colour=opposite,
                source=node.source,
            )
        )
    return Graph(graph.program, tuple(nodes), tuple(slots), graph.terms)


@dataclass
class _Unit:
    """What one producer will be: its rule, the variables of its slots, and the rest of a node."""

    name: str
    spec: NodeSpec
    inner: tuple[int, Atom | None] | None
    source: str
    fallback: bool = False


class _Builder:
    def __init__(self, program: Program, splitting: Splitting, fallback: Fallback | None = None):
        program, self.terms = find_losses(program)
        self.program = program
        self.fallback: Fallback | None = fallback
        self.layers = splitting == "layer"
        self.definitions = {out: e for e in program.equations for out in e.outputs}
        self.registered = frozenset(
            out for e in program.equations if REGISTRATIONS[e.primitive] for out in e.outputs
        )
        self.predictions = [term.equation.inputs[0] for term in self.terms]
        self.is_empty = any(0 in program.shape(var) for var in self.predictions)
        stop: Any = frozenset(self.predictions)
        self.cones = fusion.find_cones(program, stop, self.registered)
        self.functions = Cones(program, stop, self.registered)
        self.reads = self._count_reads()
        self.pure = self._find_pure()
        self.specs: dict[Rule, Rule] = {}

    # What is read how often, and what depends on parameters alone.

    def _operands(self, var: int) -> list[int]:
        found = self.functions.base(var)
        if found is not None:
            return [found[0]]
        cone = self.cones[var]
        if cone.base != var:
            return [cone.base]
        equation = self.definitions.get(var)
        if equation is None:
            return []
        return [a for a in equation.inputs if isinstance(a, int) and self.program.is_variable(a)]

    def _count_reads(self) -> dict[int, int]:
        reads = dict.fromkeys(self.predictions, 0)
        for prediction in self.predictions:
            reads[prediction] += 1
        # Operands have smaller numbers than what they define: from the greatest down.
        for var in range(len(self.program.avals) - 1, -1, -1):
            if var in reads:
                for operand in self._operands(var):
                    reads[operand] = reads.get(operand, 0) + 1
        return reads  # pyright: ignore[reportReturnType]

    def _find_pure(self) -> set[int]:
        """What depends on parameters alone. Rows of a parameter that data asks for do as well, but
        what is computed of them depends on the data.
        """
        program = self.program
        pure = {number for number, leaf in enumerate(program.leaves) if leaf.trainable}
        rows: set[int] = set()
        for equation in program.equations:
            if all(isinstance(a, Scalar) or a in pure for a in equation.inputs):
                pure.update(equation.outputs)
            elif is_wiring(program, equation) and all(
                isinstance(a, Scalar) or a in pure or a in rows for a in data_operands(equation)
            ):
                rows.update(equation.outputs)
        return pure | rows

    # Units.

    def _is_by_itself(self, var: int) -> bool:
        """Whether the operation that defines `var` joins no cone, and has no user's rule."""
        return (
            var not in self.registered
            and self.cones[var].base == var
            and self.functions.base(var) is None
        )

    def _is_wire(self, var: int) -> bool:
        equation = self.definitions.get(var)
        return (
            equation is not None and self._is_by_itself(var) and is_wiring(self.program, equation)
        )

    def _expand(self, start: SumTerm, own: bool) -> list[SumTerm]:
        """`start` as a sum over variables that have nodes; `own`: the first step is free."""
        if self.layers and not own:  # a sum joins the products before it instead
            return [start]
        done, pending = [], [(start, own)]
        while pending:
            term, free = pending.pop(0)
            parts = None
            if free or self.reads[term.variable] == 1:
                parts = self._open(term)
            if parts is None:
                done.append(term)
            else:
                pending[:0] = [(part, False) for part in parts]
        return done

    def _open(self, term: SumTerm) -> list[SumTerm] | None:
        cone = self.cones[term.variable]
        if self.functions.base(term.variable) is not None:
            return None
        if cone.base != term.variable:
            pieces = cone.function.pieces
            if len(pieces) != 1:
                return None
            return [term.of(cone.base).scaled(pieces[0].slope)]
        equation = self.definitions.get(term.variable)
        if equation is None or term.variable in self.registered:
            return None
        return fusion.sum_step(self.program, equation, term)

    def _unit(self, var: int) -> _Unit:
        # What has no entries cannot move; an empty batch is an error of its own.
        nothing = 0 in self.program.shape(var) and not self.is_empty
        if nothing or not self._is_number(var):
            raise _Rests([var])
        cone = self.cones[var]
        equation = self.definitions[var]
        piece = self.functions.piece(var)
        if piece is not None:
            return self._function_unit(piece, equation)
        if cone.base != var:
            return self._cone_unit(var, cone, equation)
        if var in self.registered:
            return self._rule_unit(equation, var)
        if self.layers:
            unit = self._layer_unit(var, equation)
            if unit is not None:
                return unit
        kink = fusion.known_kink(self.program, equation)
        if kink is not None:
            base, offset, function = kink
            terms = self._expand(SumTerm(base), own=False)
            return self._affine_unit(equation.name, terms, function, (base, offset), equation)
        terms = fusion.sum_step(self.program, equation, SumTerm(var))
        if terms is not None:
            terms = self._expand(SumTerm(var), own=True)
            return self._affine_unit(equation.name, terms, None, None, equation)
        return self._rule_unit(equation, var)

    def _is_number(self, atom: Atom) -> bool:
        """Whether an operand is of a floating-point type: no condition, and no index."""
        return bool(jnp.issubdtype(self.program.dtype(atom), jnp.floating))

    def _function_unit(self, piece: Piece, equation: Equation) -> _Unit:
        """A cone, or an operation without a rule, by a numeric projection."""
        name = _cone_name(piece)
        if piece.elementwise:
            rule = ScalarFunction(piece.function, self.layers, name)
        else:
            shapes = [self.program.shape(var) for var in piece.inputs]
            inputs, output = tuple(a for a, _ in piece.rows), tuple(b for _, b in piece.rows)
            kept = Rows((inputs,) * len(shapes), output)
            rule = ArrayFunction(piece.function, self.layers, name, kept)
            form = normal_form(self.program, piece)
            if form is not None:
                rule = Normalization(piece.function, self.layers, "normalize", kept, form=form)
        return _Unit(name, NodeSpec(rule, piece.inputs, piece.knowns), None, equation.source)

    # Layer splitting: products and what is added to them.

    def _product(self, var: int) -> Equation | None:
        """The bilinear operation that defines `var`, if there is one and no user's rule for it."""
        equation = self.definitions.get(var)
        if equation is None or not self._is_by_itself(var):
            return None
        builder = find_builder(equation.primitive)
        if builder is None or equation.primitive not in BILINEAR:
            return None
        # A product with a known number or array entry by entry is a scaling: a linear term.
        variable = [self.program.is_variable(atom) for atom in equation.inputs]
        scaling = equation.primitive is P.mul_p and sum(variable) == 1
        return None if scaling else equation

    def _layer_unit(self, var: int, equation: Equation) -> _Unit | None:
        """`var` as a sum of products and addends; None if no product is among them."""
        own = self._product(var)
        terms = [SumTerm(var)] if own is not None else self._layer_terms(var)
        found: list[Product | Addend] = []
        slots: list[Atom] = []
        knowns: list[Atom] = []
        has_product = False
        for term in terms or []:
            product = None
            plain = not term.factors and not term.axes
            if plain and (term.variable == var or self.reads[term.variable] == 1):
                product = self._product(term.variable)
            if product is not None:
                spec = bilinear_operands(self.program, product)
                found.append(Product(spec.operation, *spec.free, scale=term.scale))
                slots += [a for a, free in zip(product.inputs, spec.free, strict=True) if free]
                knowns += [a for a, free in zip(product.inputs, spec.free, strict=True) if not free]
                has_product = True
            else:
                addend, source = self._addend(term)
                found.append(addend)
                slots.append(source)
                knowns += [atom for atom, _, _ in term.factors]
        if not has_product:
            return None
        name = "layer" if len(found) > 1 else "dot"
        if own is not None:
            name = bilinear_name(own)
        rule = LayerSum(tuple(found), name)
        return _Unit(name, NodeSpec(rule, tuple(slots), tuple(knowns)), None, equation.source)

    def _layer_terms(self, var: int) -> list[SumTerm] | None:
        equation = self.definitions[var]
        if fusion.sum_step(self.program, equation, SumTerm(var)) is None:
            return None
        return self._open_sums(SumTerm(var))

    def _open_sums(self, start: SumTerm) -> list[SumTerm]:
        """`start` as a sum, down to products, values that are read elsewhere, and other nodes."""
        done, pending = [], [(start, True)]
        while pending:
            term, own = pending.pop(0)
            parts = None
            if own or (self.reads[term.variable] == 1 and self._product(term.variable) is None):
                parts = self._open(term)
            if parts is None:
                done.append(term)
            else:
                pending[:0] = [(part, False) for part in parts]
        return done

    def _addend(self, term: SumTerm) -> tuple[Addend, Atom]:
        """An addend and the variable that it reads: what is broadcast is read before that."""
        spec = Term(term.scale, tuple((d, s) for _, d, s in term.factors), term.axes)
        if term.factors or term.axes:
            return Addend(spec), term.variable
        shape = self.program.shape(term.variable)
        source, dimensions = term.variable, tuple(range(len(shape)))
        while self._is_wire(source):
            step = broadcast_step(self.program, self.definitions[source])
            if step is None:
                break
            source, inner = step
            dimensions = tuple(dimensions[axis] for axis in inner)
        if source == term.variable:
            return Addend(spec), source
        return Addend(spec, shape, dimensions), source

    def _rule_unit(self, equation: Equation, var: int) -> _Unit:
        builder = find_builder(equation.primitive)
        if builder is None or len(equation.outputs) != 1:
            general = is_function(equation.primitive)
            moving = [a for a in equation.inputs if self.program.is_variable(a)]
            resting = [a for a in moving if not self._is_number(a)]
            if resting:
                raise _Rests(resting)
            allowed = general or self.fallback is not None
            if allowed and len(equation.outputs) == 1 and equation.name not in _LOOPS:
                piece = single(self.program, equation, var)
                _check_derivative(self.program, piece, equation)
                return replace(self._function_unit(piece, equation), fallback=not general)
            raise TraceError(_no_rule(equation, self.fallback is not None))
        spec = builder(self.program, equation)
        return _Unit(spec.rule.name or equation.name, spec, None, equation.source)

    def _cone_unit(self, var: int, cone: Cone, equation: Equation) -> _Unit:
        if len(cone.function.pieces) == 1:
            unit = self._layer_unit(var, equation) if self.layers else None
            if unit is not None:
                return unit
            terms = self._expand(SumTerm(var), own=True)
            return self._affine_unit(equation.name, terms, None, None, equation)
        terms = self._expand(SumTerm(cone.base), own=False)
        name = "relu" if fusion.is_relu(cone.function) else equation.name
        return self._affine_unit(name, terms, cone.function, (cone.base, None), equation)

    def _affine_unit(
        self,
        name: str,
        terms: Sequence[SumTerm],
        function: Any,
        inner: tuple[int, Atom | None] | None,
        equation: Equation,
    ) -> _Unit:
        rule = Affine(
            tuple(Term(t.scale, tuple((d, s) for _, d, s in t.factors), t.axes) for t in terms),
            function,
            f"sum_{name}" if function is not None and len(terms) > 1 else name,
        )
        knowns = tuple(atom for t in terms for atom, _, _ in t.factors)
        spec = NodeSpec(rule, tuple(t.variable for t in terms), knowns)
        return _Unit(rule.name, spec, inner, equation.source)

    # The graph.

    def build(self) -> Graph:
        program = self.program
        units: dict[int, _Unit] = {}
        leaves: dict[int, None] = {}
        seen: set[int] = set()
        pending: list[Any] = list(self.predictions)
        while pending:
            var = pending.pop()
            if var in seen:
                continue
            seen.add(var)
            if var < len(program.leaves):
                leaves[var] = None
            elif self._is_wire(var):
                pending += self._operands(var)
            else:
                units[var] = self._unit(var)
                pending += [a for a in units[var].spec.slots if isinstance(a, int)]
        producers = {*leaves, *units}
        # Parameters in the order of the pytree, operations in the order of the program, losses.
        nodes: list[Node] = []
        index_of: dict[int, int] = {}
        for var in sorted(leaves):
            index_of[var] = len(nodes)
            name = program.leaves[var].path or "params"
            nodes.append(Node(len(nodes), "parameter", name, None, (), (), var))
        self.slots: list[Slot] = []
        for var in sorted(units):
            index_of[var] = len(nodes)
            unit = units[var]
            if self.layers:
                rule = as_threshold(unit.spec.rule, of_weights=var in self.pure)
                unit = replace(unit, spec=unit.spec._replace(rule=rule))
            nodes.append(self._node(len(nodes), "operation", unit, var, producers, index_of))
        for equation in (term.equation for term in self.terms):
            spec = _loss_spec(program, equation)
            unit = _Unit(spec.rule.name, spec, None, equation.source)
            out = equation.outputs[0]
            nodes.append(self._node(len(nodes), "loss", unit, out, producers, index_of))
        return Graph(program, tuple(nodes), tuple(self.slots), self.terms)

    def _node(
        self,
        index: int,
        kind: Kind,
        unit: _Unit,
        output: int,
        producers: set[int],
        index_of: Mapping[int, int],
    ) -> Node:
        program = self.program
        first = len(self.slots)
        for atom in unit.spec.slots:
            assert isinstance(atom, int)
            route = find_route(program, self.definitions, producers, atom)
            self.slots.append(
                Slot(
                    index=len(self.slots),
                    node=index,
                    route=route,
                    producers=tuple(index_of[source] for source in route.sources),
                    shape=program.shape(atom),
                    dtype=program.deviation_dtype(atom),
                    kind="weight" if atom in self.pure else "activation",
                )
            )
        return Node(
            index=index,
            kind=kind,
            name=unit.name,
            rule=self.specs.setdefault(unit.spec.rule, unit.spec.rule),
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


def _check_derivative(program: Program, piece: Piece, equation: Equation) -> None:
    """Raises an error for an operation that cannot be linearised."""
    inputs, knowns = (
        [jax.ShapeDtypeStruct(program.shape(a), program.deviation_dtype(a)) for a in atoms]
        for atoms in (piece.inputs, piece.knowns)
    )

    def derive(inputs: Any, knowns: Any) -> Any:
        out, back = jax.vjp(lambda *xs: piece.function(xs, knowns), *inputs)
        return back(out)

    try:
        jax.eval_shape(derive, inputs, knowns)
    except Exception as error:
        raise TraceError(
            f"{_no_rule(equation, True)}\nIt has no derivative that could be used "
            f"instead: {str(error).splitlines()[0]}"
        ) from error


def _cone_name(piece: Piece) -> str:
    """The operations that say what a cone is: those that have no exact rule."""
    names = [e.name for e in piece.function.equations if e.primitive in SMOOTH]
    if not names:
        return piece.function.equations[-1].name
    return "-".join(dict.fromkeys(names))


def _no_rule(equation: Equation, has_fallback: bool) -> str:
    name = equation.name
    where = f" at {equation.source}" if equation.source else ""
    message = f"There is no projection for the operation `{name}`{where}."
    if name in _LOOPS:
        return (
            f"{message} Control flow over parameters whose course depends on data is not "
            f"supported: {_LOOPS[name]}; or make the function around it an operation of its own, "
            "with a projection: `pjax.register_projection`."
        )
    if len(equation.outputs) != 1:
        return (
            f"{message} It has several outputs, and a node has one: make a function of it that "
            "returns one array an operation of its own, `@pjax.register_projection(function)`."
        )
    path = _compat.primitive_path(name.replace("-", "_")) or "the_primitive"
    message = (
        f"{message} Register one:\n"
        f"    @pjax.register_projection({path})\n"
        "    def project(inputs, target, input_weights, target_weight, **params): ...\n"
        "It returns the inputs nearest to `inputs` whose output is nearest to `target`; see "
        "`help(pjax.register_projection)`."
    )
    if not has_fallback:
        message += (
            '\nOr allow a numeric one, of the linearised operation: `fallback="gauss-newton"`, of '
            "`pjax.value_and_displacement`, `pjax.optim.Projection` and all that train."
        )
    return message


#: What to do about loops whose length is not known.
_LOOPS = {
    "scan": "unroll the loop in Python",
    "while": "give the loop a fixed number of steps (`jax.lax.fori_loop` with Python numbers, "
    "`jax.lax.scan`), the largest that may be needed, and keep what is done by "
    "`jnp.where(is_running, new, old)`",
}
