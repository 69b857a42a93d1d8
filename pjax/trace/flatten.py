"""Calls are inlined and variables renamed; equations become those that have rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from pjax.backend import compat, source_lines
from pjax.backend.compat import P
from pjax.program import (
    BINARY,
    INTEGER_ARITHMETIC,
    REGISTRATIONS,
    Atom,
    Equation,
    Leaf,
    Program,
    Scalar,
    TraceError,
    canonical,
    live,
    primitives,
)
from pjax.trace import (
    complex_values,
    control_flow,
    derivatives,
    regroup,
    scatters,
    simplify,
    windows,
)
from pjax.trace.writer import Writer


class Flattener(Writer):
    """Inlines and renames: two calls of one jitted function share jaxpr variables, ours do not.

    **Arguments:**

    - `rests`: no leaf is a parameter that moves.
    """

    def __init__(self, rests: bool = False) -> None:
        super().__init__()
        self._rests = rests
        # By identity: the equation is kept, so that no other one takes its place.
        self._sources: dict[tuple[int, str], tuple[Any, str]] = {}
        #: The outputs of constraints, which nothing reads: what is constrained is read itself.
        self._constrained: list[int] = []

    def flatten(
        self, closed: Any, paths: Sequence[str], num_outputs: int | None = None
    ) -> tuple[Program, list[Any]]:
        """The program of a closed jaxpr, and the arrays that it captures.

        The first `num_outputs` outputs (all, if not given) are the result, the others auxiliary.
        """
        env: dict[Any, Atom] = {}
        leaves = []
        for path, var in zip(paths, closed.jaxpr.invars, strict=True):
            number = self._new(env, var)
            dtype = var.aval.dtype
            # What has no entries cannot move, and is data.
            real = bool(jnp.issubdtype(dtype, jnp.floating))
            trainable = real and 0 not in var.aval.shape and not self._rests
            leaves.append(Leaf(path, tuple(var.aval.shape), dtype, trainable))
            if trainable:
                self.variable.add(number)
            elif jnp.issubdtype(dtype, jnp.integer) and not self._rests:
                self.integer_leaves[number] = path
        captured = self.capture(closed.jaxpr, closed.consts)
        env.update(zip(closed.jaxpr.constvars, captured, strict=True))
        self._inline(closed.jaxpr, env, "")
        atoms = tuple(self._atom(env, var) for var in closed.jaxpr.outvars)
        cut = len(atoms) if num_outputs is None else num_outputs
        outputs, aux = atoms[:cut], atoms[cut:]
        roots = (*outputs, *self._constrained)
        self._exchange_operands(live(self.equations, roots))
        needed = live(self.equations, roots)
        self.equations = regroup.Regrouping(self, needed, roots, REGISTRATIONS).run()
        equations = live(self.equations, roots)
        for equation in equations:
            self._check_integer_parameter(equation)
            self._check_narrow(equation)
        done = set(map(id, equations))
        auxiliary = [e for e in live(self.equations, aux) if id(e) not in done]
        return self._renumber(leaves, equations, outputs, auxiliary, aux)

    def _exchange_operands(self, live: Sequence[Equation]) -> None:
        """A product that is read once, transposed, is the product of its operands exchanged: so the
        batch of `w @ x + b` by `vmap` is the layer `x @ wᵀ + b`.
        """
        reads = Counter(atom for e in live for atom in e.inputs if isinstance(atom, int))
        products = {e.outputs[0]: e for e in live if e.primitive is P.dot_general_p}
        for place, equation in enumerate(self.equations):
            if equation.primitive is not P.transpose_p:
                continue
            (atom,) = equation.inputs
            if not isinstance(atom, int) or atom not in products or reads[atom] != 1:
                continue
            product = products[atom]
            (contract_l, contract_r), (batch_l, batch_r) = product.params["dimension_numbers"]
            # The result's axes: the batch's, the left operand's, the right operand's.
            left, batch = product.inputs[0], len(batch_l)
            rank = len(left.shape) if isinstance(left, Scalar) else self.avals[left].ndim
            middle = rank - len(contract_l)
            axes = tuple(range(len(equation.params["permutation"])))
            exchanged = axes[:batch] + axes[middle:] + axes[batch:middle]
            sharded = product.params.get("out_sharding") is not None
            if sharded or tuple(equation.params["permutation"]) != exchanged:
                continue
            numbers = (contract_r, contract_l), (batch_r, batch_l)
            params = {**product.params, "dimension_numbers": numbers}
            self.equations[place] = Equation(
                P.dot_general_p, product.inputs[::-1], equation.outputs, params, product.source
            )

    def _renumber(
        self,
        leaves: list[Leaf],
        equations: list[Equation],
        outputs: tuple[Atom, ...],
        auxiliary: list[Equation],
        aux: tuple[Atom, ...],
    ) -> tuple[Program, list[Any]]:
        """Numbers leaves, then captured arrays, then results, leaving out what is not read.

        Arrays that a called function captures (a jitted closure over the batch) become inputs of
        the program like all others, wherever they were met.
        """
        every = [*equations, *auxiliary]
        read_atoms = [atom for equation in every for atom in equation.inputs] + [*outputs, *aux]
        captured = sorted({a for a in read_atoms if isinstance(a, int)} & self.constants.keys())
        order = [
            *range(len(leaves)),
            *captured,
            *(out for equation in every for out in equation.outputs),
        ]
        number = {old: new for new, old in enumerate(order)}

        def rename(atom: Atom) -> Atom:
            return number[atom] if isinstance(atom, int) else atom

        renamed = tuple(
            Equation(
                e.primitive,
                tuple(map(rename, e.inputs)),
                tuple(number[out] for out in e.outputs),
                e.params,
                e.source,
            )
            for e in every
        )
        outputs, aux = tuple(map(rename, outputs)), tuple(map(rename, aux))
        avals = tuple(self.avals[old] for old in order)
        key = (
            tuple(leaves),
            tuple((tuple(aval.shape), aval.dtype) for aval in avals[: len(leaves) + len(captured)]),
            tuple(
                (
                    (e.primitive, REGISTRATIONS[e.primitive]),
                    tuple(map(canonical, e.inputs)),
                    e.outputs,
                    canonical(e.params),
                )
                for e in renamed
            ),
            tuple(map(canonical, outputs)),
            tuple(map(canonical, aux)),
        )
        program = Program(
            leaves=tuple(leaves),
            num_consts=len(captured),
            equations=renamed[: len(equations)],
            outputs=outputs,
            auxiliary=renamed[len(equations) :],
            auxiliary_outputs=aux,
            avals=avals,
            variable=frozenset(number[old] for old in self.variable if old in number),
            uniform={number[old]: v for old, v in self.uniform.items() if old in number},
            key=key,
            custom_rules=tuple(self.honoured),
        )
        return program, [self.constants[old] for old in captured]

    def _new(self, env: dict[Any, Atom], var: Any) -> int:
        number = self._number(var.aval)
        if not isinstance(var, compat.DropVar):
            env[var] = number
        return number

    def _source(self, eqn: Any, caller: str) -> str:
        # A body of a loop is met once per step, and tracebacks are slow to read.
        key = (id(eqn), caller)
        if key not in self._sources:
            self._sources[key] = (eqn, source_lines.source_line(eqn, caller))
        return self._sources[key][1]

    def _inline(self, jaxpr: Any, env: dict[Any, Atom], caller: str, foreign: bool = False) -> None:
        for eqn in map(compat.without_shardings, jaxpr.eqns):
            inputs = tuple(self._atom(env, var) for var in eqn.invars)
            if compat.is_cast(eqn):
                env.update(zip(eqn.outvars, inputs, strict=True))
                continue
            source = caller if foreign and caller else self._source(eqn, caller)
            body = compat.call_body(eqn.primitive, eqn.params)
            results = derivatives.expand(self, eqn, inputs, source)
            if results is not None:
                pass
            elif eqn.primitive is primitives.constrain_p:
                results = [self._constrain(eqn, inputs, source)]
            elif body is not None:
                inner, consts = body
                results = self.inline_body(inner, self.capture(inner, consts), inputs, source)
            else:
                results = control_flow.expand(self, eqn, inputs, source)
            if results is None and any(map(self.is_variable, inputs)):
                results = self._expand(eqn, inputs, source)
            if results is not None:
                for var, out in zip(eqn.outvars, results, strict=True):
                    if not isinstance(var, compat.DropVar):
                        env[var] = out
                continue
            if eqn.primitive in BINARY:
                aval = eqn.outvars[0].aval
                inputs = tuple(self._broadcast(atom, aval, source) for atom in inputs)
            if eqn.primitive is P.clamp_p and any(map(self.is_variable, inputs)):
                self._clamp(inputs, self._new(env, eqn.outvars[0]), source)
                continue
            outputs = tuple(self._new(env, var) for var in eqn.outvars)
            self._add(Equation(eqn.primitive, inputs, outputs, eqn.params, source))

    def _constrain(self, eqn: Any, inputs: tuple[Atom, ...], source: str) -> Atom:
        """What is constrained; the equation says so and leads nowhere."""
        x, *numbers = inputs
        if any(map(self.is_variable, numbers)):
            raise TraceError(
                f"The set of `constrain` ({source}) depends on the parameters; it must be data. "
                "Use `jax.lax.stop_gradient` on its numbers if they are meant to rest."
            )
        if self.is_variable(x):
            output = self._number(eqn.outvars[0].aval)
            self._add(Equation(eqn.primitive, inputs, (output,), eqn.params, source))
            self._constrained.append(output)
        return x

    def _expand(self, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
        """The outputs of an equation of parameters by operations that have rules, or None."""
        results = complex_values.expand(self, eqn, inputs, source)
        if results is not None:
            return results
        if not REGISTRATIONS[eqn.primitive]:
            for module in (windows, scatters):
                results = module.expand(self, eqn, inputs, source)
                if results is not None:
                    return results
        return simplify.expand(self, eqn, inputs, source)

    def _check_integer_parameter(self, equation: Equation) -> None:
        for atom in equation.inputs:
            if (
                isinstance(atom, int)
                and atom in self.integer_leaves
                and jnp.issubdtype(self.avals[equation.outputs[0]].dtype, jnp.floating)
                and equation.primitive in INTEGER_ARITHMETIC
            ):
                raise TypeError(
                    f"`params{self.integer_leaves[atom]}` is an integer array "
                    f"({self.avals[atom].dtype}) that the function uses as a number "
                    f"({equation.source}): a projection cannot move it. Convert it to a "
                    "floating-point array, or keep it outside of `params`."
                )

    def _check_narrow(self, equation: Equation) -> None:
        for out in equation.outputs:
            dtype = self.avals[out].dtype
            if out in self.variable and compat.is_narrow(dtype):
                raise TypeError(
                    f"`{equation.name}` ({equation.source}) makes a {dtype} value of the "
                    "parameters, whose range is too narrow for deviations. Use float32 or bfloat16."
                )
