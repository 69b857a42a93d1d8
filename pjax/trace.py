"""A JAX function becomes a flat program: calls inlined, variables renamed, dead code dropped.

A [`Program`][] is a list of equations over integer variables. Its first variables are the leaves
of the parameters, then the arrays that the function closes over, so the program itself holds no
data: two closures over two batches give equal programs, and everything compiled for one serves
the other.

Every variable is one of

- *variable*: it depends on a parameter that can move;
- *known*: it does not; it may be a tracer of an outer `jit`, and is evaluated in each solve;
- *uniform*: known, and all its entries are one number that is fixed by the program (`0.0` in
  `max(x, 0.0)`), whatever the data are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pjax import (
    _compat,
    complex_values,
    control_flow,
    derivatives,
    operations,
    rewrites,
    scatters,
    windows,
)
from pjax._compat import P
from pjax.parameters import leaves_of


@dataclass(frozen=True)
class Scalar:
    """A literal operand: one number of one dtype."""

    value: Any
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return ()

    def array(self) -> np.ndarray:
        return np.asarray(self.value, dtype=self.dtype)


def widened(dtype: Any) -> Any:
    """A floating-point type, or float32 if it has fewer digits."""
    floating = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if floating else dtype


#: An operand: a variable's number, or a literal.
Atom = int | Scalar

#: How often users registered a rule for a primitive: with another rule it is another program.
REGISTRATIONS: Counter[Any] = Counter()


@dataclass(frozen=True, eq=False)
class Equation:
    """`outputs = primitive(*inputs, **params)`, with the user's source line."""

    primitive: Any
    inputs: tuple[Atom, ...]
    outputs: tuple[int, ...]
    params: Mapping[str, Any]
    source: str = ""

    @property
    def name(self) -> str:
        return self.primitive.name.removeprefix("pjax_")

    def bind(self, *args: Any) -> list[Any]:
        """The values of the outputs."""
        out = self.primitive.bind(*args, **self.params)
        return list(out) if self.primitive.multiple_results else [out]


@dataclass(frozen=True)
class Leaf:
    """A leaf of the parameter pytree."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    trainable: bool


@dataclass(frozen=True, eq=False)
class Program:
    """A flat program. `key` is equal for two programs of the same equations and the same rules.

    Variables are numbered: first `leaves`, then `num_consts` captured arrays, then results. What
    only auxiliary outputs need (metrics, statistics) is evaluated, and is no part of the graph.
    """

    leaves: tuple[Leaf, ...]
    num_consts: int
    equations: tuple[Equation, ...]
    outputs: tuple[Atom, ...]
    auxiliary: tuple[Equation, ...]
    auxiliary_outputs: tuple[Atom, ...]
    avals: tuple[Any, ...]
    variable: frozenset[int]
    uniform: Mapping[int, Any]
    key: Any
    #: Functions whose own derivative rule forces follow.
    custom_rules: tuple[derivatives.CustomRule, ...] = ()

    def shape(self, atom: Atom) -> tuple[int, ...]:
        return atom.shape if isinstance(atom, Scalar) else tuple(self.avals[atom].shape)

    def dtype(self, atom: Atom) -> Any:
        return atom.dtype if isinstance(atom, Scalar) else self.avals[atom].dtype

    def deviation_dtype(self, atom: Atom) -> Any:
        """The type of deviations from a value: at least float32, also where it is bfloat16."""
        return widened(self.dtype(atom))

    def is_variable(self, atom: Atom) -> bool:
        return isinstance(atom, int) and atom in self.variable

    def uniform_value(self, atom: Atom) -> Any | None:
        """The number that every entry of `atom` equals, if the program fixes it."""
        return atom.value if isinstance(atom, Scalar) else self.uniform.get(atom)

    def evaluate(self, leaves: Sequence[Any], consts: Sequence[Any]) -> dict[int, Any]:
        """The value of every variable: the forward pass."""
        values: dict[int, Any] = dict(enumerate((*leaves, *consts)))
        run(self.equations, values)
        run(self.auxiliary, values)
        return values


def read(values: Mapping[int, Any], atom: Atom) -> Any:
    """The value of an operand."""
    return atom.array() if isinstance(atom, Scalar) else values[atom]


def run(equations: Sequence[Equation], values: dict[int, Any], even: bool = False) -> None:
    """Evaluates `equations` in order, adding what they define to `values`.

    **Arguments:**

    - `even`: the derivative of `|x|` at 0 is 0, the mean of both sides, as JAX has it for `max`.
        JAX's own is 1, which is wrong for smooth functions that are written with both: softplus is
        `max(x, 0) + log1p(exp(−|x|))`. JAX gives these a rule of their own, which is inlined here.
    """
    for equation in equations:
        given = [read(values, atom) for atom in equation.inputs]
        if even and equation.primitive is P.abs_p and jnp.issubdtype(given[0].dtype, jnp.floating):
            out = [given[0] * jnp.sign(given[0])]
        else:
            out = equation.bind(*given)
        values.update(zip(equation.outputs, out, strict=True))


class TraceError(ValueError):
    """The function cannot become a graph of constraints; the message says why and what to do."""


def require_function(fn: Any, name: str) -> None:
    """Raises `TypeError` if what should be the loss is none, as the argument `name` of a call."""
    if not callable(fn):
        raise TypeError(
            f"`{name}` must be the loss as a function, and got {_describe(fn)}: pass the function "
            "itself, `loss_fn`, not what it returns, `loss_fn(params)`, or its gradient."
        )


def trace(
    fn: Callable[[Any], Any],
    params: Any,
    has_aux: bool = False,
    scalar: bool = False,
    mask: Any = None,
) -> tuple[Program, list[Any], list[Any], Any]:
    """Traces `fn(params)` into a flat program.

    **Arguments:**

    - `fn`: a JAX function of the parameters; what it closes over is data.
    - `has_aux`: `fn` returns `(loss, aux)`, with any pytree of arrays as `aux`.
    - `scalar`: `fn` must return one number, as for `jax.grad`; without it an array will do, whose
      sum is the loss.
    - `params`: a pytree of arrays. Floating-point leaves can move; integer, boolean and key
      leaves are known values, and stay as they are. See `pjax.parameters`.
    - `mask`: which leaves are parameters at all, see `pjax.parameters.leaves_of`.

    **Returns:** `(program, leaves, consts, output_tree)`: the program, the leaves of `params` and
    the captured arrays (both possibly tracers of an outer `jit`), and the structure of the result
    (of `aux` if there is one).

    **Raises:** `TypeError` for a function that returns what a gradient would be, or no number where
    it must, and for a leaf that is not an array, is complex or narrower than a deviation needs, or
    is an integer that the function uses as a number.
    """
    apart = leaves_of(params, mask)
    paths, leaves = apart.paths, apart.arrays
    given = jax.tree_util.tree_structure(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not _is_array_like(leaf):
            raise TypeError(
                f"`params{path}` is a {type(leaf).__name__}, not an array. Pass only the arrays: "
                "of an Equinox module all of it or "
                "`params, static = eqx.partition(model, eqx.is_inexact_array)`, for Flax NNX "
                "`graphdef, params, rest = nnx.split(model, nnx.Param, ...)`."
            )
    # Python numbers and NumPy arrays take the types that the program gives them.
    leaves = [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in leaves]
    for path, leaf in zip(paths, leaves, strict=True):
        _check_leaf_type(path, leaf.dtype)
    tree_out: list[Any] = []
    num_outputs: list[int] = []

    def flat(*flat_leaves: Any) -> Any:
        out = fn(apart.tree(flat_leaves))
        if has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    "With `has_aux=True` the function must return a pair `(loss, aux)`; it "
                    f"returned {_describe(out)}."
                )
            out, aux = out
            aux_leaves, structure = jax.tree_util.tree_flatten(aux)
            out_leaves = jax.tree_util.tree_leaves(out)
            if scalar:
                _require_scalar(out, out_leaves)
            num_outputs.append(len(out_leaves))
            tree_out.append(structure)
            return [*out_leaves, *aux_leaves]
        out_leaves, structure = jax.tree_util.tree_flatten(out)
        like_params = structure == given and not jax.tree_util.treedef_is_leaf(structure)
        if like_params and list(map(jnp.shape, out_leaves)) == list(map(jnp.shape, leaves)):
            raise TypeError(
                "The function returns a pytree like `params`, as a gradient is: give the loss "
                "function itself, `loss_fn` and not `jax.grad(loss_fn)`."
            )
        if scalar:
            _require_scalar(out, out_leaves)
        num_outputs.append(len(out_leaves))
        tree_out.append(structure)
        return out_leaves

    closed = jax.make_jaxpr(flat)(*leaves)
    program, consts = Flattener().flatten(closed, paths, num_outputs[0])
    return program, leaves, consts, tree_out[0]


def _require_scalar(out: Any, leaves: Sequence[Any]) -> None:
    if len(leaves) == 1 and jnp.shape(leaves[0]) == ():
        return
    what_to_do = (
        "Take the mean or the sum of the losses of its rows; of logits take a loss first, such as "
        "`optax.softmax_cross_entropy`."
    )
    if len(leaves) != 1:
        what_to_do = "With a pair `(loss, aux)` give `has_aux=True`."
    raise TypeError(
        f"The loss must be one number, and the function returned {_describe(out)}. {what_to_do}"
    )


def _describe(out: Any) -> str:
    if isinstance(out, tuple):
        return f"a tuple of {len(out)}"
    if hasattr(out, "shape") and hasattr(out, "dtype"):
        return f"an array of shape {tuple(out.shape)}"
    return f"{'an' if type(out).__name__[0] in 'AEIOUaeiou' else 'a'} {type(out).__name__}"


def _is_array_like(leaf: Any) -> bool:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return False
    dtype = getattr(leaf, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "OSUMm":
        return False
    return (hasattr(leaf, "shape") and dtype is not None) or isinstance(
        leaf, (bool, int, float, complex)
    )


def _check_leaf_type(path: str, dtype: Any) -> None:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"`params{path}` is complex ({dtype}); projections are of real numbers. Keep the real "
            "and the imaginary part as two arrays."
        )
    if _compat.is_narrow(dtype):
        raise TypeError(
            f"`params{path}` is {dtype}, whose range is too narrow for deviations from a forward "
            "pass. Use float32 or bfloat16."
        )


#: Elementwise primitives that keep a uniform value uniform.
_UNIFORM_ELEMENTWISE = _compat.find_primitives(
    "add", "sub", "mul", "div", "neg", "max", "min", "sqrt", "rsqrt", "integer_pow", "pow", "exp",
    "log", "convert_element_type", "copy", "abs", "sign", "select_n",
    "eq", "ne", "ge", "gt", "le", "lt", "and", "or", "not",
)  # fmt: skip
#: These broadcast scalars, and axes of length 1, without saying so.
_BINARY = _compat.find_primitives(
    "add", "add_jaxvals", "sub", "mul", "div", "max", "min", "pow", "atan2", "rem",
    "eq", "ne", "ge", "gt", "le", "lt",
)  # fmt: skip
_UNIFORM_WIRING = _compat.find_primitives(
    "broadcast_in_dim", "reshape", "squeeze", "transpose", "slice", "rev", "tile",
)  # fmt: skip
#: What turns integers into other integers that are meant as the same kind of number.
_INTEGER_ARITHMETIC = _UNIFORM_WIRING | _compat.find_primitives(
    "add", "sub", "mul", "neg", "copy", "convert_element_type", "abs",
    "concatenate", "stack", "reduce_sum", "reduce_max", "reduce_min", "dot_general",
)  # fmt: skip
#: What does not follow its operands in a solve.
_RESTING = control_flow.INDICES | _compat.find_primitives("stop_gradient", "floor", "ceil")


class Flattener:
    """Inlines and renames: two calls of one jitted function share jaxpr variables, ours do not."""

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
        self.honoured: dict[derivatives.CustomRule, None] = {}
        # By identity: the equation is kept, so that no other one takes its place.
        self._sources: dict[tuple[int, str], tuple[Any, str]] = {}

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
            trainable = bool(jnp.issubdtype(dtype, jnp.floating)) and 0 not in var.aval.shape
            leaves.append(Leaf(path, tuple(var.aval.shape), dtype, trainable))
            if trainable:
                self.variable.add(number)
            elif jnp.issubdtype(dtype, jnp.integer):
                self.integer_leaves[number] = path
        captured = self.capture(closed.jaxpr, closed.consts)
        env.update(zip(closed.jaxpr.constvars, captured, strict=True))
        self._inline(closed.jaxpr, env, "")
        atoms = tuple(self._atom(env, var) for var in closed.jaxpr.outvars)
        cut = len(atoms) if num_outputs is None else num_outputs
        outputs, aux = atoms[:cut], atoms[cut:]
        self._exchange_operands(live(self.equations, outputs))
        needed = live(self.equations, outputs)
        self.equations = rewrites.Regrouping(self, needed, outputs, REGISTRATIONS).run()
        equations = live(self.equations, outputs)
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
        if not isinstance(var, _compat.DropVar):
            env[var] = number
        return number

    def _number(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _atom(self, env: dict[Any, Atom], var: Any) -> Atom:
        if isinstance(var, _compat.Literal):
            if np.ndim(var.val):  # JAX may keep small arrays as literals
                return self.constant(np.asarray(var.val), var.aval.dtype)
            return Scalar(np.asarray(var.val).item(), var.aval.dtype)
        return env[var]

    def constant(self, value: Any, dtype: Any = None) -> Atom:
        """A captured value: a NumPy scalar is a literal, an array an input of the program."""
        if not isinstance(value, jax.Array):
            if np.ndim(value) == 0:
                return Scalar(np.asarray(value).item(), dtype)
            value = jnp.asarray(value, dtype)
        number = self._number(_compat.ShapedArray(value.shape, value.dtype))
        self.constants[number] = value
        return number

    def capture(self, jaxpr: Any, consts: Sequence[Any]) -> list[Atom]:
        """The arrays that a body captures, as operands for `inline_body`."""
        return [
            self.constant(value, var.aval.dtype)
            for var, value in zip(jaxpr.constvars, consts, strict=True)
        ]

    def inline_body(
        self, jaxpr: Any, captured: Sequence[Atom], inputs: Sequence[Atom], source: str
    ) -> list[Atom]:
        """The outputs of the body of a call at `source`, with its equations added."""
        env: dict[Any, Atom] = dict(zip(jaxpr.constvars, captured, strict=True))
        env.update(zip(jaxpr.invars, inputs, strict=True))
        self._inline(jaxpr, env, source, _compat.is_library_function(jaxpr))
        return [self._atom(env, out) for out in jaxpr.outvars]

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
        number = self._number(_compat.ShapedArray(tuple(shape), np.dtype(dtype)))
        self._add(Equation(operation, tuple(inputs), (number,), {}, source))
        return number

    def aval(self, atom: Atom) -> Any:
        """The shape and the type of an operand."""
        return atom if isinstance(atom, Scalar) else self.avals[atom]

    def zeros(self, aval: Any, source: str) -> Atom:
        """An array of zeros, of the type of the parts of complex numbers."""
        shape, dtype = aval.shape, complex_values.real_type(aval.dtype)
        return self.add_function(lambda: [jnp.zeros(shape, dtype)], [], source)[0]

    def parts(self, atom: Atom, source: str) -> tuple[Atom | None, Atom | None]:
        """The real and the imaginary part of a complex operand; None for one that is 0."""
        if isinstance(atom, Scalar):
            dtype = complex_values.real_type(atom.dtype)
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

    def _source(self, eqn: Any, caller: str) -> str:
        # A body of a loop is met once per step, and tracebacks are slow to read.
        key = (id(eqn), caller)
        if key not in self._sources:
            self._sources[key] = (eqn, _compat.source_line(eqn, caller))
        return self._sources[key][1]

    def _inline(self, jaxpr: Any, env: dict[Any, Atom], caller: str, foreign: bool = False) -> None:
        for eqn in jaxpr.eqns:
            inputs = tuple(self._atom(env, var) for var in eqn.invars)
            source = caller if foreign and caller else self._source(eqn, caller)
            body = _compat.call_body(eqn.primitive, eqn.params)
            results = derivatives.expand(self, eqn, inputs, source)
            if results is not None:
                pass
            elif body is not None:
                inner, consts = body
                results = self.inline_body(inner, self.capture(inner, consts), inputs, source)
            else:
                results = control_flow.expand(self, eqn, inputs, source)
            if results is None and any(map(self.is_variable, inputs)):
                results = self._expand(eqn, inputs, source)
            if results is not None:
                for var, out in zip(eqn.outvars, results, strict=True):
                    if not isinstance(var, _compat.DropVar):
                        env[var] = out
                continue
            if eqn.primitive in _BINARY:
                aval = eqn.outvars[0].aval
                inputs = tuple(self._broadcast(atom, aval, source) for atom in inputs)
            if eqn.primitive is P.clamp_p and any(map(self.is_variable, inputs)):
                self._clamp(inputs, self._new(env, eqn.outvars[0]), source)
                continue
            outputs = tuple(self._new(env, var) for var in eqn.outvars)
            self._add(Equation(eqn.primitive, inputs, outputs, eqn.params, source))

    def _expand(self, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
        """The outputs of an equation of parameters by operations that have rules, or None."""
        results = complex_values.expand(self, eqn, inputs, source)
        if results is not None:
            return results
        if not REGISTRATIONS[eqn.primitive]:
            function = windows.find(eqn.primitive, eqn.params)
            if function is not None:
                return self.add_function(function, inputs, source)
            for module in (scatters, operations):
                results = module.expand(self, eqn, inputs, source)
                if results is not None:
                    return results
        return rewrites.expand(self, eqn, inputs, source)

    def is_variable(self, atom: Atom) -> bool:
        return isinstance(atom, int) and atom in self.variable

    def _add(self, equation: Equation) -> None:
        self.equations.append(equation)
        self.definitions.update(dict.fromkeys(equation.outputs, equation))
        # What a `stop_gradient` returns rests during a solve, like any other data; so does the
        # index of a choice.
        rests = equation.primitive in _RESTING and not REGISTRATIONS[equation.primitive]
        if not rests and any(map(self.is_variable, equation.inputs)):
            self.variable.update(equation.outputs)
            return
        self._propagate_uniform(equation)
        if equation.primitive in _INTEGER_ARITHMETIC:
            for atom in equation.inputs:
                if isinstance(atom, int) and atom in self.integer_leaves:
                    path = self.integer_leaves[atom]
                    self.integer_leaves.update(dict.fromkeys(equation.outputs, path))

    def _broadcast(self, atom: Atom, aval: Any, source: str) -> Atom:
        """Binary operations broadcast scalars and axes of length 1: make that a wire of its own."""
        if isinstance(atom, Scalar) or self.avals[atom].shape == aval.shape:
            return atom
        params = _compat.broadcast_params(tuple(self.avals[atom].shape), tuple(aval.shape))
        number = self._number(_compat.ShapedArray(aval.shape, self.avals[atom].dtype))
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
        if equation.primitive in _UNIFORM_WIRING:
            self.uniform[equation.outputs[0]] = values[0].item()
        elif equation.primitive in _UNIFORM_ELEMENTWISE:
            with _compat.compile_time_eval():
                (out,) = equation.bind(*map(jnp.asarray, values))
            self.uniform[equation.outputs[0]] = np.asarray(out).item()

    def _check_integer_parameter(self, equation: Equation) -> None:
        for atom in equation.inputs:
            if (
                isinstance(atom, int)
                and atom in self.integer_leaves
                and jnp.issubdtype(self.avals[equation.outputs[0]].dtype, jnp.floating)
                and equation.primitive in _INTEGER_ARITHMETIC
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
            if out in self.variable and _compat.is_narrow(dtype):
                raise TypeError(
                    f"`{equation.name}` ({equation.source}) makes a {dtype} value of the "
                    "parameters, whose range is too narrow for deviations. Use float32 or bfloat16."
                )


def live(equations: Sequence[Equation], outputs: Sequence[Atom]) -> list[Equation]:
    """The equations that lead to `outputs`, in order."""
    needed = {atom for atom in outputs if isinstance(atom, int)}
    kept = []
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.outputs):
            kept.append(equation)
            needed.update(atom for atom in equation.inputs if isinstance(atom, int))
    return kept[::-1]


class _Identity:
    """Wraps an unhashable value: equal to itself only (better a recompile than a wrong reuse)."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value


def canonical(value: Any) -> Any:
    """A hashable stand-in, equal for equal meaning only: −0 is not 0, True is not 1."""
    if isinstance(value, Scalar):
        return ("literal", value.dtype, value.array().tobytes())
    if isinstance(value, _compat.ClosedJaxpr):
        return ("closed", _canonical_jaxpr(value.jaxpr), tuple(map(canonical, value.consts)))
    if isinstance(value, _compat.Jaxpr):
        return _canonical_jaxpr(value)
    if isinstance(value, Mapping):
        return tuple((name, canonical(value[name])) for name in sorted(value))
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(canonical, value))
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return (type(value).__name__, np.asarray(value).tobytes())
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return value


def _canonical_jaxpr(jaxpr: Any) -> Any:
    """A body of control flow, its variables numbered by appearance (jaxprs hash by identity)."""
    numbers: dict[Any, int] = {}

    def define(var: Any) -> Any:
        numbers[var] = len(numbers)
        return str(var.aval), getattr(var.aval, "weak_type", False)

    def refer(var: Any) -> Any:
        if isinstance(var, _compat.Literal):
            return ("literal", var.aval.dtype, np.asarray(var.val).tobytes())
        return numbers[var]

    return (
        "jaxpr",
        tuple(map(define, (*jaxpr.constvars, *jaxpr.invars))),
        tuple(
            (
                eqn.primitive,
                tuple(map(refer, eqn.invars)),
                tuple(map(define, eqn.outvars)),
                canonical(eqn.params),
            )
            for eqn in jaxpr.eqns
        ),
        tuple(map(refer, jaxpr.outvars)),
    )
