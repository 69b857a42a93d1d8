"""A program of rows as steps of the predictor, made and run one by one.

What is run at once is known as the predictor will have it: as numbers, levels, or whole numbers of
units. Elementwise equations wait in chains until something else reads their result; a chain that
ends in a few levels becomes thresholds of what it began with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pjax.export import predictor, thresholds
from pjax.export.predictor import Value
from pjax.program import Atom, Equation, Program, Scalar, TraceError, read

#: At most so many levels become bits.
LEVELS = 16
#: Elementwise arithmetic, by the names of JAX: what it is for the predictor.
ARITHMETIC = {
    "add": "add", "add_any": "add", "sub": "sub", "mul": "mul", "div": "div", "max": "max",
    "min": "min", "neg": "neg", "round": "round",
}  # fmt: skip
_COMPARISONS = ("gt", "ge", "lt", "le")
_SAME = ("copy", "copy_p", "stop_gradient", "optimization_barrier", "pjax_identity")
_STEPS = {"sign": (-1.0, 0.0, 1.0), "pjax_threshold": (-1.0, 1.0), "pjax_step": (0.0, 1.0)}
_WHAT = (
    "A packed network is made of products and convolutions with constant weights, sums, scales, "
    "maxima, thresholds, pooling and shapes, for each row on its own."
)
#: How an equation becomes steps, by the name of its primitive.
Handlers = Mapping[str, Callable[["Walk", Equation], None]]


@dataclass(frozen=True)
class PackedProduct:
    """A product or convolution of a packed network.

    **Attributes:**

    - `source`: the line that it is from.
    - `shape`: of its weights: outputs, places of a kernel, inputs.
    - `levels`: of its weights; 0 where they are kept as numbers.
    - `bits`: of its inputs, where these are codes and the product is by xor and a count of ones;
        else 0.
    """

    source: str
    shape: tuple[int, ...]
    levels: int
    bits: int

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape[::-1]))
        weights = f"{self.levels} levels" if self.levels else "numbers"
        way = f"xor and popcount, inputs of {self.bits} bits" if self.bits else "sums"
        line = self.source.replace(os.sep, "/").rpartition("/")[2]
        return f"{shape}, weights: {weights}; {way} ({line})"


@dataclass(frozen=True)
class _Chain:
    """Elementwise equations, one after the other.

    **Attributes:**

    - `root`: the variable that the first reads.
    - `levels`: all that the last may result in, in ascending order; None if that is not known.
    """

    root: int
    equations: tuple[Equation, ...] = ()
    levels: np.ndarray | None = None


class Walk:
    """The steps of a program, made and run one by one.

    The predictor has rows in front. In the program they may be any axis, as `vmap` leaves them.

    **Attributes:**

    - `known`: the values of what does not depend on rows.
    - `row`: the axis of rows of each variable that does.
    - `chains`: of the variables that wait.
    - `made`: for the others the number of their value.
    - `arrays`: those of the file, by their type.
    - `steps`, `values`: number 0 is that of the rows given, and has no step.
    - `products`: what is reported of.
    """

    def __init__(self, program: Program, x: Array, consts: Sequence[Any], handlers: Handlers):
        self.program, self.rows, self._handlers = program, x.shape[0], handlers
        self.known: dict[int, Any] = dict(enumerate((x, *consts)))
        self.row = {0: 0}
        self.chains: dict[int, _Chain] = {}
        self.made = {0: 0}
        self.arrays: dict[str, np.ndarray] = {}
        self.steps: list[dict[str, Any]] = []
        self.values: list[Value] = [np.asarray(x)]
        self.products: list[PackedProduct] = []
        for equation in program.equations:
            if any(atom in self.row for atom in equation.inputs):
                self._add(equation)
                continue
            values = equation.bind(*(read(self.known, atom) for atom in equation.inputs))
            self.known.update(zip(equation.outputs, values, strict=True))

    def described(self) -> dict[str, Any]:
        """What the file says beside arrays."""
        outputs = []
        for atom in self.program.outputs:
            if self.row.get(atom) != 0:  # pyright: ignore
                raise TraceError("An output of the function has no row for each row of `x`.")
            outputs.append({"of": self.value(atom), "dtype": str(self.program.dtype(atom))})
        x = self.values[0]
        assert isinstance(x, np.ndarray)
        return {"shape": x.shape[1:], "dtype": str(x.dtype), "outputs": outputs,
                "steps": self.steps}  # fmt: skip

    # Equations.

    def _add(self, equation: Equation) -> None:
        name = equation.primitive.name
        own = [atom for atom in equation.inputs if isinstance(atom, int) and atom in self.row]
        for out in equation.outputs:
            dtype = self.program.dtype(out)
            if jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.float32:
                raise self._error(equation, f"computes in {dtype}, and files hold float32")
        convert = name == "convert_element_type"
        if name in _SAME or (
            convert and self.program.dtype(own[0]) == self.program.dtype(equation.outputs[0])
        ):
            self._alias(equation.outputs[0], own[0])
        elif len(own) == 1 and self._is_elementwise(equation):
            base = self.chains.get(own[0], _Chain(own[0]))
            levels = self._levels(equation, base)
            chain = _Chain(base.root, (*base.equations, equation), levels)
            self.chains[equation.outputs[0]] = chain
            self.row[equation.outputs[0]] = self.row[own[0]]
        elif name in self._handlers:
            self._handlers[name](self, equation)
        else:
            raise self._error(equation, "has no packed form")

    def _error(self, equation: Equation, why: str) -> TraceError:
        return TraceError(f"`{equation.name}` ({equation.source}) {why}. {_WHAT}")

    def require(self, condition: bool, equation: Equation, why: str) -> None:
        """Raises `TraceError` with the equation's line if a condition does not hold."""
        if not condition:
            raise self._error(equation, why)

    def set(self, equation: Equation, made: Any, row: int) -> None:
        """What an equation results in: a value by its number, with rows along this axis."""
        (out,) = equation.outputs
        self.row[out] = row
        self.made[out] = made

    def _alias(self, out: int, atom: int) -> None:
        found: Any
        for found in (self.chains, self.made, self.row):
            if atom in found:
                found[out] = found[atom]

    def _constants(self, equation: Equation) -> list[np.ndarray]:
        return [self.constant(a, equation) for a in equation.inputs if a not in self.row]

    def _is_elementwise(self, equation: Equation) -> bool:
        name = equation.primitive.name
        if name == "select_n":
            cases = equation.inputs[1:]
            known = not any(case in self.row for case in cases)
            return known and all(constant.size == 1 for constant in self._constants(equation))
        if name == "convert_element_type":
            base = self.chains.get(equation.inputs[0])  # pyright: ignore
            return base is not None and base.levels is not None
        if name == "round":
            return int(equation.params["rounding_method"]) == 1  # half to even
        chained = (*ARITHMETIC, *_COMPARISONS, *_STEPS, "pjax_quantize", "clamp")
        return name in chained

    def _levels(self, equation: Equation, base: _Chain) -> np.ndarray | None:
        """All that an elementwise equation may result in."""
        name = equation.primitive.name
        if name in _STEPS:
            return np.asarray(_STEPS[name], np.float32)
        if name in _COMPARISONS:
            return np.array([False, True])
        if name == "pjax_quantize":
            low, high, count = (equation.params[key] for key in ("low", "high", "levels"))
            if count > LEVELS:
                raise self._error(equation, f"has {count} levels, more than {LEVELS}")
            return np.asarray(equation.bind(jnp.linspace(low, high, count))[0])
        if base.levels is None or any(c.size > 1 for c in self._constants(equation)):
            return None
        found = np.unique(self.apply(equation, base.levels))
        return found if np.all(np.isfinite(found)) else None

    def apply(self, equation: Equation, array: np.ndarray) -> np.ndarray:
        """An elementwise equation of an array, in JAX."""
        given = [
            array if atom in self.row else self.constant(atom, equation) for atom in equation.inputs
        ]
        shape = np.broadcast_shapes(*map(np.shape, given))
        (found,) = equation.bind(*(jnp.asarray(np.broadcast_to(g, shape)) for g in given))
        return np.asarray(found)

    def constant(self, atom: Atom, equation: Equation) -> np.ndarray:
        """What is known, as the predictor has it: with rows in front, and with one entry along axes
        where all are equal.
        """
        if isinstance(atom, Scalar):
            return atom.array()
        array = np.asarray(self.known[atom])
        if array.ndim:
            array = np.moveaxis(array, self.row_of(equation), 0)
        for axis in range(array.ndim):
            first = array.take([0], axis)
            if np.all(array == first):
                array = first
        if array.ndim and array.shape[0] != 1:
            raise self._error(equation, "reads a constant that differs from row to row")
        return array.reshape(()) if array.size == 1 else array

    def row_of(self, equation: Equation) -> int:
        """The axis of rows of all operands that have one."""
        (row, *others) = {self.row[a] for a in equation.inputs if a in self.row}  # pyright: ignore
        self.require(not others, equation, "has rows along different axes")
        return row

    # Values.

    def step(self, step: str, of: Sequence[Any], **settings: Any) -> int:
        """The number of the value of a new step."""
        made = {"step": step, "of": list(of), **settings}
        ready = predictor.settings_of(made, self.arrays)
        self.values.append(predictor.run(made, ready, self.values, self.arrays))
        self.steps.append(made)
        return len(self.steps)

    def place(self, array: np.ndarray) -> dict[str, Any]:
        """Where an array lies among those of its type."""
        name = str(array.dtype)
        before = self.arrays.get(name, np.zeros(0, array.dtype))
        self.arrays[name] = np.concatenate([before, array.ravel()])
        return {"dtype": name, "start": len(before), "shape": list(array.shape)}

    def value(self, atom: Any) -> int:
        """The number of the value of a variable; what it waits for becomes steps."""
        if atom not in self.made:
            chain = self.chains[atom]
            if chain.levels is not None and len(chain.levels) <= LEVELS:
                self.made[atom] = self._of_levels(chain)
            else:
                self.made[atom] = self.of_numbers(chain.equations[-1])
        return self.made[atom]

    def _of_levels(self, chain: _Chain) -> int:
        root = self.value(chain.root)
        assert chain.levels is not None

        def level(array: np.ndarray) -> np.ndarray:
            for equation in chain.equations:
                array = self.apply(equation, array)
            return np.searchsorted(chain.levels, array)  # pyright: ignore

        constants = [c for equation in chain.equations for c in self._constants(equation)]
        ndim = len(self.program.shape(chain.root))
        shape = np.broadcast_shapes((1,) * ndim, *map(np.shape, constants))
        found = thresholds.find(level, self.values[root], shape, chain.levels)
        settings: dict[str, Any] = {"limits": self.place(found.limits), "table": found.table}
        if found.flip is not None:
            settings["flip"] = self.place(found.flip)
        return self.step("levels", [root], **settings)

    def of_numbers(self, equation: Equation) -> int:
        """The number of the value of a step of arithmetic."""
        name = equation.primitive.name
        operands = [self._operand(atom, equation) for atom in equation.inputs]
        if name == "clamp":
            low, x, high = operands
            raised = self.step("arithmetic", [x, low], name="max")
            return self.step("arithmetic", [raised, high], name="min")
        if name == "select_n":
            return self.step("select", operands)
        if name not in ARITHMETIC:
            raise self._error(equation, f"has more than {LEVELS} levels")
        return self.step("arithmetic", operands, name=ARITHMETIC[name])

    def _operand(self, atom: Atom, equation: Equation) -> Any:
        """A value by its number, a constant number, or the place of an array."""
        if atom in self.row:
            return self.value(atom)
        constant = self.constant(atom, equation)
        if constant.size == 1:
            return [float(constant)]
        return self.place(constant.astype(np.float32))

    def order(self, equation: Equation) -> list[int]:
        """The axes of the first operand as the predictor has them."""
        return in_front(self.row_of(equation), len(self.program.shape(equation.inputs[0])))


def in_front(row: int, ndim: int) -> list[int]:
    """All axes, that of rows first."""
    return [row, *(axis for axis in range(ndim) if axis != row)]
