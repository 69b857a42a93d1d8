"""Which parts of a program become one node each, with which rule and which operands.

In comes a program whose losses are found; out go *units*, one for each variable that is a value of
its own. In neuron splitting sums join the piecewise linear function behind them (`relu(a + b)` is
one node); in layer splitting they join the products before them (`x @ w + b` is one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from pjax.backend.compat import P
from pjax.graph.graph import WHOLE, Ends
from pjax.graph.messages import LOOPS, no_rule
from pjax.options import Fallback
from pjax.patterns import (
    Excerpt,
    LossTerm,
    OfOneValue,
    SmoothFunctions,
    SumTerm,
    normal_form,
    piecewise,
    single,
    sums,
)
from pjax.program import (
    REGISTRATIONS,
    SMOOTH,
    Atom,
    Equation,
    Program,
    Scalar,
    TraceError,
    broadcast_step,
    data_operands,
    is_function,
    is_wiring,
    primitives,
)
from pjax.projections.numeric import Rows
from pjax.rules import (
    BILINEAR,
    Addend,
    Affine,
    ArrayFunction,
    ArrayStep,
    LayerSum,
    NodeSpec,
    Normalization,
    NormalizationStep,
    Product,
    Rule,
    ScalarFunction,
    ScalarStep,
    SignedProduct,
    Term,
    as_threshold,
    bilinear_name,
    bilinear_operands,
    find_builder,
)


class Stopped(Exception):
    """Conditions, counts and indices of parameters that are part of no piecewise linear function:
    they are data, as for a gradient.
    """

    def __init__(self, variables: Sequence[Atom]):
        super().__init__(variables)
        self.variables = variables


@dataclass
class Unit:
    """What will be one node: its rule, the variables of its slots, and the rest of a node."""

    name: str
    spec: NodeSpec
    inner: tuple[int, Atom | None] | None
    source: str
    fallback: bool = False


def _has_own_rule(primitive: Any) -> bool:
    """Whether an operation joins no function of several: a user gave it a rule, or the library one
    to a function that would be linearised.
    """
    exact = primitive in SMOOTH and find_builder(primitive) is not None
    return exact or REGISTRATIONS[primitive] > 0


class Units:
    """The units of a program in neuron splitting."""

    def __init__(
        self,
        program: Program,
        terms: Sequence[LossTerm],
        fallback: Fallback | None = None,
        ends: Ends = WHOLE,
    ):
        self.program, self.ends = program, ends
        self.fallback: Fallback | None = fallback
        self.registered = frozenset(
            out for e in program.equations if _has_own_rule(e.primitive) for out in e.outputs
        )
        self.predictions = [term.equation.inputs[0] for term in terms]
        self.is_empty = any(0 in program.shape(var) for var in self.predictions)
        stop: Any = frozenset(self.predictions)
        self.cones = piecewise.find_cones(program, stop, self.registered)
        pieces = frozenset(var for var, cone in self.cones.items() if cone.base != var)
        self.functions = SmoothFunctions(program, stop, self.registered, pieces)
        self.reads = self._count_reads()
        self.pure = self._find_pure()

    # What is read how often, and what depends on parameters alone.

    def operands(self, var: int) -> list[int]:
        found = self.functions.base(var)
        if found is not None:
            return [found[0]]
        cone = self.cones[var]
        if cone.base != var:
            return [cone.base]
        equation = self.program.definitions.get(var)
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
                for operand in self.operands(var):
                    reads[operand] = reads.get(operand, 0) + 1
        return reads  # pyright: ignore[reportReturnType]

    def _find_pure(self) -> set[int]:
        """What depends on parameters alone. Rows of a parameter that data asks for do as well, but
        what is computed of them depends on the data.
        """
        program = self.program
        leaves = program.leaves[:-1] if self.ends.input else program.leaves
        pure = {number for number, leaf in enumerate(leaves) if leaf.trainable}
        rows: set[int] = set()
        for equation in program.equations:
            if all(isinstance(a, Scalar) or a in pure for a in equation.inputs):
                pure.update(equation.outputs)
            elif is_wiring(program, equation) and all(
                isinstance(a, Scalar) or a in pure or a in rows for a in data_operands(equation)
            ):
                rows.update(equation.outputs)
        return pure | rows

    def _is_by_itself(self, var: int) -> bool:
        """Whether the operation that defines `var` joins no cone, and has no user's rule."""
        return (
            var not in self.registered
            and self.cones[var].base == var
            and self.functions.base(var) is None
        )

    def is_wire(self, var: int) -> bool:
        equation = self.program.definitions.get(var)
        return (
            equation is not None and self._is_by_itself(var) and is_wiring(self.program, equation)
        )

    def _expand(self, start: SumTerm, own: bool) -> list[SumTerm]:
        """`start` as a sum over variables that have nodes; `own`: the first step is free."""
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
        equation = self.program.definitions.get(term.variable)
        if equation is None or term.variable in self.registered:
            return None
        return sums.sum_step(self.program, equation, term)

    def unit(self, var: int) -> Unit:
        # What has no entries cannot move; an empty batch is an error of its own.
        nothing = 0 in self.program.shape(var) and not self.is_empty
        if nothing or not self._is_number(var):
            raise Stopped([var])
        cone = self.cones[var]
        equation = self.program.definitions[var]
        excerpt = self.functions.excerpt(var)
        if excerpt is not None:
            return self._function_unit(excerpt, equation)
        if cone.base != var:
            return self._cone_unit(var, cone, equation)
        if var in self.registered:
            return self._rule_unit(equation, var)
        unit = self._product_unit(var, equation)
        if unit is not None:
            return unit
        kink = piecewise.known_kink(self.program, equation)
        if kink is not None:
            base, offset, function = kink
            terms = self._expand(SumTerm(base), own=False)
            return self._affine_unit(equation.name, terms, function, (base, offset), equation)
        terms = sums.sum_step(self.program, equation, SumTerm(var))
        if terms is not None:
            terms = self._expand(SumTerm(var), own=True)
            return self._affine_unit(equation.name, terms, None, None, equation)
        return self._rule_unit(equation, var)

    def _is_number(self, atom: Atom) -> bool:
        """Whether an operand is of a floating-point type: no condition, and no index."""
        return bool(jnp.issubdtype(self.program.dtype(atom), jnp.floating))

    def _product(self, var: int) -> Equation | None:
        """The bilinear operation that defines `var`, if there is one and no user's rule for it."""
        equation = self.program.definitions.get(var)
        if equation is None or not self._is_by_itself(var):
            return None
        builder = find_builder(equation.primitive)
        if builder is None or equation.primitive not in BILINEAR:
            return None
        # A product with a known number or array entry by entry is a scaling: a linear term.
        variable = [self.program.is_variable(atom) for atom in equation.inputs]
        scaling = equation.primitive is P.mul_p and sum(variable) == 1
        return None if scaling else equation

    def _product_unit(self, var: int, equation: Equation) -> Unit | None:
        """A product with what joins it: its sign, or in layer splitting addends."""
        if equation.primitive is not primitives.threshold_p:
            return None
        (operand,) = equation.inputs
        if not isinstance(operand, int) or self.reads[operand] > 1:
            return None
        product = self._product(operand)
        if product is None:
            return None
        operation, free = bilinear_operands(self.program, product)
        rule = SignedProduct(operation, free, equation.params["margin"])
        slots = tuple(a for a, moving in zip(product.inputs, free, strict=True) if moving)
        knowns = tuple(a for a, moving in zip(product.inputs, free, strict=True) if not moving)
        return Unit(rule.name, NodeSpec(rule, slots, knowns), None, equation.source)

    def finished(self, var: int, rule: Rule) -> Rule:
        """The rule that a node gets, from that of its operation."""
        return rule

    #: The rules of functions that are linearised: of one value, of arrays, of normalisations.
    _SCALAR: type[ScalarFunction] = ScalarFunction
    _ARRAY: type[ArrayFunction] = ArrayFunction
    _NORMALIZATION: type[Normalization] = Normalization

    def _function_unit(self, excerpt: Excerpt, equation: Equation) -> Unit:
        """A cone, or an operation without a rule, by a numeric projection."""
        name = _cone_name(excerpt)
        if excerpt.elementwise:
            rule = self._SCALAR(excerpt.function, name)
        else:
            shapes = [self.program.shape(var) for var in excerpt.inputs]
            inputs, output = tuple(a for a, _ in excerpt.rows), tuple(b for _, b in excerpt.rows)
            kept = Rows((inputs,) * len(shapes), output)
            rule = self._ARRAY(excerpt.function, name, kept)
            form = normal_form(self.program, excerpt)
            if form is not None:
                rule = self._NORMALIZATION(excerpt.function, "normalize", kept, form=form)
        return Unit(name, NodeSpec(rule, excerpt.inputs, excerpt.knowns), None, equation.source)

    def _rule_unit(self, equation: Equation, var: int) -> Unit:
        builder = find_builder(equation.primitive)
        if builder is None or len(equation.outputs) != 1:
            general = is_function(equation.primitive)
            moving = [a for a in equation.inputs if self.program.is_variable(a)]
            whole = [a for a in moving if not self._is_number(a)]
            if whole:
                raise Stopped(whole)
            allowed = general or self.fallback is not None
            if allowed and len(equation.outputs) == 1 and equation.name not in LOOPS:
                excerpt = single(self.program, equation, var)
                _check_derivative(self.program, excerpt, equation)
                return replace(self._function_unit(excerpt, equation), fallback=not general)
            raise TraceError(no_rule(equation, self.fallback is not None))
        spec = builder(self.program, equation)
        return Unit(spec.rule.name or equation.name, spec, None, equation.source)

    def _cone_unit(self, var: int, cone: OfOneValue, equation: Equation) -> Unit:
        if len(cone.function.pieces) == 1:
            unit = self._product_unit(var, equation)
            if unit is not None:
                return unit
            terms = self._expand(SumTerm(var), own=True)
            return self._affine_unit(equation.name, terms, None, None, equation)
        terms = self._expand(SumTerm(cone.base), own=False)
        name = "relu" if piecewise.is_relu(cone.function) else equation.name
        return self._affine_unit(name, terms, cone.function, (cone.base, None), equation)

    def _affine_unit(
        self,
        name: str,
        terms: Sequence[SumTerm],
        function: Any,
        inner: tuple[int, Atom | None] | None,
        equation: Equation,
    ) -> Unit:
        rule = Affine(
            tuple(Term(t.scale, tuple((d, s) for _, d, s in t.factors), t.axes) for t in terms),
            function,
            f"sum_{name}" if function is not None and len(terms) > 1 else name,
        )
        knowns = tuple(atom for t in terms for atom, _, _ in t.factors)
        spec = NodeSpec(rule, tuple(t.variable for t in terms), knowns)
        return Unit(rule.name, spec, inner, equation.source)


class LayerUnits(Units):
    """The units of a program in layer splitting: products with what is added to them."""

    _SCALAR = ScalarStep
    _ARRAY = ArrayStep
    _NORMALIZATION = NormalizationStep

    def finished(self, var: int, rule: Rule) -> Rule:
        return as_threshold(rule, of_weights=var in self.pure)

    def _expand(self, start: SumTerm, own: bool) -> list[SumTerm]:
        # A sum joins the products before it, not the function behind it.
        return super()._expand(start, own) if own else [start]

    def _product_unit(self, var: int, equation: Equation) -> Unit | None:
        """`var` as a sum of products and addends; None if no product is among them."""
        product_of_var = self._product(var)
        terms = [SumTerm(var)] if product_of_var is not None else self._layer_terms(var)
        terms_of_rule: list[Product | Addend] = []
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
                terms_of_rule.append(Product(spec.operation, *spec.free, scale=term.scale))
                slots += [a for a, free in zip(product.inputs, spec.free, strict=True) if free]
                knowns += [a for a, free in zip(product.inputs, spec.free, strict=True) if not free]
                has_product = True
            else:
                addend, source = self._addend(term)
                terms_of_rule.append(addend)
                slots.append(source)
                knowns += [atom for atom, _, _ in term.factors]
        if not has_product:
            return None
        name = "layer" if len(terms_of_rule) > 1 else "dot"
        if product_of_var is not None:
            name = bilinear_name(product_of_var)
        rule = LayerSum(tuple(terms_of_rule), name)
        return Unit(name, NodeSpec(rule, tuple(slots), tuple(knowns)), None, equation.source)

    def _layer_terms(self, var: int) -> list[SumTerm] | None:
        equation = self.program.definitions[var]
        if sums.sum_step(self.program, equation, SumTerm(var)) is None:
            return None
        return self._expand(SumTerm(var), own=True)

    def _addend(self, term: SumTerm) -> tuple[Addend, Atom]:
        """An addend and the variable that it reads: what is broadcast is read before that."""
        spec = Term(term.scale, tuple((d, s) for _, d, s in term.factors), term.axes)
        if term.factors or term.axes:
            return Addend(spec), term.variable
        shape = self.program.shape(term.variable)
        source, dimensions = term.variable, tuple(range(len(shape)))
        while self.is_wire(source):
            step = broadcast_step(self.program, self.program.definitions[source])
            if step is None:
                break
            source, inner = step
            dimensions = tuple(dimensions[axis] for axis in inner)
        if source == term.variable:
            return Addend(spec), source
        return Addend(spec, shape, dimensions), source


def _check_derivative(program: Program, excerpt: Excerpt, equation: Equation) -> None:
    """Raises an error for an operation that cannot be linearised."""
    inputs, knowns = (
        [jax.ShapeDtypeStruct(program.shape(a), program.deviation_dtype(a)) for a in atoms]
        for atoms in (excerpt.inputs, excerpt.knowns)
    )

    def derive(inputs: Any, knowns: Any) -> Any:
        out, back = jax.vjp(lambda *xs: excerpt.function(xs, knowns), *inputs)
        return back(out)

    try:
        jax.eval_shape(derive, inputs, knowns)
    except Exception as error:
        raise TraceError(
            f"{no_rule(equation, True)}\nIt has no derivative that could be used "
            f"instead: {str(error).splitlines()[0]}"
        ) from error


def _cone_name(excerpt: Excerpt) -> str:
    """The operations that say what a cone is: those that have no exact rule."""
    names = [e.name for e in excerpt.function.equations if e.primitive in SMOOTH]
    if not names:
        return excerpt.function.equations[-1].name
    return "-".join(dict.fromkeys(names))
