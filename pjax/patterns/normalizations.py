"""Which functions are normalisations: `a (x − mean(x)) / (κ Σ(x − mean(x))² + ε)^½`, or without the
mean. Of one of the many ways to write one,

    (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

the groups are the rows, `a = 1` and `κ = 1/n`. The variance may be a mean of squares less a square;
there may be a root and a quotient, and axes that come and go. So a function that was cut
out of a program is followed symbolically, as a polynomial in an entry `x`, the mean `m` of
its group and the mean `q` of the squares there, and a root of one. What remains at its end is a
normalisation, or is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pjax.backend.compat import P
from pjax.patterns.excerpts import Excerpt
from pjax.program import SHAPES, Atom, Equation, Program, Scalar
from pjax.projections.normalization import NormalForm

#: Exponents of `x`, `m` and `q`, and their coefficient.
Polynomial = Mapping[tuple[int, int, int], float]
_ONE, _X, _M, _MM, _Q = (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 2, 0), (0, 0, 1)
#: Coefficients that differ by this share are equal.
_CLOSE = 1e-5
#: For each axis of a value what it is made of, but for lengths of 1: axes of the operand, after
#: these have been split, and repetitions of so many, as negative numbers.
Axes = tuple[tuple[int, ...], ...]


class _Unknown(Exception):
    """The function does something that no normalisation does."""


class _Split(Exception):
    """An axis of the operand is two: the search begins anew with it split."""

    def __init__(self, axis: int, sizes: tuple[int, ...]):
        self.axis, self.sizes = axis, sizes


@dataclass(frozen=True)
class _Value:
    """`polynomial · root^power`, power 0, ½ or −½."""

    polynomial: Polynomial
    axes: Axes
    shape: tuple[int, ...]
    root: tuple[tuple[tuple[int, int, int], float], ...] = ()
    power: float = 0

    @property
    def is_of_group(self) -> bool:
        """Whether it is one number for each group."""
        return all(key[0] == 0 for key in self.polynomial)

    def of_places(self, places: Sequence[int]) -> _Value:
        """With these of its axes, in this order."""
        axes, shape = ([old[place] for place in places] for old in (self.axes, self.shape))
        return replace(self, axes=tuple(axes), shape=tuple(shape))


def normal_form(program: Program, piece: Excerpt) -> NormalForm | None:
    """The normalisation that a function of one operand is; None if it is none."""
    if len(piece.inputs) != 1:
        return None
    shape = program.shape(piece.inputs[0])
    if math.prod(shape) < 2 or any(e.primitive not in _RULES for e in piece.function.equations):
        return None
    numbers = [program.uniform_value(atom) for atom in piece.knowns]
    groups = tuple((n,) for n in shape)  # the lengths that each axis is split in
    for _ in range(4):
        try:
            return _Search(piece, numbers, shape, groups).found()
        except _Split as split:
            groups = _split(groups, split)
        except _Unknown:
            return None
    return None


def _split(groups: tuple[tuple[int, ...], ...], split: _Split) -> tuple[tuple[int, ...], ...]:
    found, first = [], 0
    for sizes in groups:
        place = split.axis - first
        first += len(sizes)
        if 0 <= place < len(sizes):
            sizes = (*sizes[:place], *split.sizes, *sizes[place + 1 :])
        found.append(sizes)
    return tuple(found)


class _Search:
    """One function, followed from its operand to its result."""

    def __init__(
        self,
        piece: Excerpt,
        numbers: Sequence[Any],
        shape: tuple[int, ...],
        groups: tuple[tuple[int, ...], ...],
    ):
        function = piece.function
        self.output = function.output
        self.equations = function.equations
        self.sizes = tuple(n for sizes in groups for n in sizes)
        axes: list[tuple[int, ...]] = []
        first = 0
        for sizes in groups:
            axes.append(tuple(first + i for i, n in enumerate(sizes) if n != 1))
            first += len(sizes)
        self.reduced: frozenset[int] | None = None
        self.values: dict[int, _Value | float] = {0: _Value({_X: 1.0}, tuple(axes), shape)}
        for place, number in enumerate(numbers, 1):
            if number is not None:
                self.values[place] = float(number)

    def found(self) -> NormalForm | None:
        for equation in self.equations:
            (out,) = equation.outputs
            self.values[out] = self._value(equation)
        return self._read()

    def _read(self) -> NormalForm | None:
        if not isinstance(self.output, int):
            return None
        result, operand = self.values[self.output], self.values[0]
        assert isinstance(operand, _Value)
        if not isinstance(result, _Value) or result.power != -0.5 or self.reduced is None:
            return None
        if _flat(result.axes) != _flat(operand.axes):
            return None
        count = math.prod(self.sizes[axis] for axis in self.reduced)
        top, below = dict(result.polynomial), dict(result.root)
        scale, mean = top.pop(_X, 0.0), top.pop(_M, 0.0)
        square, product, floor = below.pop(_Q, 0.0), below.pop(_MM, 0.0), below.pop(_ONE, 0.0)
        if any(top.values()) or any(below.values()):
            return None
        if not (scale and square > 0 and floor >= 0):
            return None
        centred = mean != 0
        if centred and not (_equal(mean, -scale) and _equal(product, -square)):
            return None
        if not centred and product != 0:
            return None
        return NormalForm(
            self.sizes, tuple(sorted(self.reduced)), centred, scale, square / count, floor
        )

    # Operations.

    def _value(self, equation: Equation) -> _Value | float:
        operands = [self._operand(atom) for atom in equation.inputs]
        if equation.primitive in SHAPES and not isinstance(operands[0], _Value):
            return self._same(equation, operands[0])  # a number in another shape
        return _RULES[equation.primitive](self, equation, *operands)

    def _operand(self, atom: Atom) -> _Value | float | None:
        """A value, a number; None of what is known, but not as a number."""
        if isinstance(atom, Scalar):
            return float(atom.value)
        return self.values.get(atom)

    def _length(self, part: int) -> int:
        return -part if part < 0 else self.sizes[part]

    def _shape(self, *values: _Value) -> tuple[Axes, tuple[int, ...]]:
        """Axes and shape of an elementwise operation of values."""
        shape = max((v.shape for v in values), key=len)
        axes = [v.axes if v.shape else tuple((-n,) if n != 1 else () for n in shape)
                for v in values]  # fmt: skip
        if any(v.shape not in ((), shape) for v in values):
            raise _Unknown
        found = axes[0]
        for own in axes[1:]:
            found = tuple(map(self._merged, found, own))
        # One number for each group is repeated along the group, and along nothing else.
        for value, own in zip(values, axes, strict=True):
            there = {part for parts in found for part in parts if part >= 0}
            repeated = there.difference(part for parts in own for part in parts)
            if repeated and not (value.is_of_group and repeated <= (self.reduced or set())):
                raise _Unknown
        return found, shape

    def _merged(self, first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
        """What an axis is that is made of both: repetitions of what the other one has."""
        a, b, found = list(first), list(second), []
        while a and b:
            x, y = a.pop(0), b.pop(0)
            if x < 0 or (y >= 0 and x == y):
                x, y, a, b = y, x, b, a
            if x == y:
                found.append(x)
                continue
            # `y` is a repetition, of `x` and perhaps of what follows it.
            rest, left = divmod(self._length(y), self._length(x))
            if y >= 0 or left:
                raise _Unknown
            found.append(x)
            if rest > 1:
                b.insert(0, -rest)
        if a or b:
            raise _Unknown
        return tuple(found)

    def _sum(self, equation: Equation, *operands: Any, sign: float = 1.0) -> _Value | float:
        first, second = operands
        if isinstance(first, float) and isinstance(second, float):
            return first + sign * second
        if first is None or second is None:
            raise _Unknown
        values = [v for v in operands if isinstance(v, _Value)]
        axes, shape = self._shape(*values)
        if any(v.power for v in values):
            raise _Unknown
        terms = [
            *_terms(first).items(),
            *((key, sign * coefficient) for key, coefficient in _terms(second).items()),
        ]
        return _Value(_collected(terms), axes, shape)

    def _product(self, equation: Equation, *operands: Any) -> _Value | float:
        first, second = operands
        if isinstance(first, float) and isinstance(second, float):
            return first * second
        if first is None or second is None:
            raise _Unknown
        values = [v for v in operands if isinstance(v, _Value)]
        axes, shape = self._shape(*values)
        roots = [v for v in values if v.power]
        if len(roots) > 1:
            raise _Unknown
        terms = [
            ((a[0] + b[0], a[1] + b[1], a[2] + b[2]), x * y)
            for a, x in _terms(first).items()
            for b, y in _terms(second).items()
        ]
        root, power = (roots[0].root, roots[0].power) if roots else ((), 0)
        return _Value(_collected(terms), axes, shape, root, power)

    def _quotient(self, equation: Equation, *operands: Any) -> _Value | float:
        first, second = operands
        if isinstance(second, float) and second != 0:
            return self._product(equation, first, 1 / second)
        if not isinstance(second, _Value) or second.power != 0.5:
            raise _Unknown
        if set(second.polynomial) != {_ONE}:
            raise _Unknown
        inverse = replace(second, polynomial={_ONE: 1 / second.polynomial[_ONE]}, power=-0.5)
        return self._product(equation, first, inverse)

    def _power(self, equation: Equation, *operands: Any) -> _Value | float:
        base, exponent = operands[0], equation.params.get("y")
        if exponent is None and len(operands) == 2:
            exponent = operands[1]
        if exponent == 2:
            return self._product(equation, base, base)
        if exponent in (0.5, -0.5):
            return self._root(base, exponent)
        raise _Unknown

    def _root(self, base: Any, power: float) -> _Value | float:
        if isinstance(base, float):
            if base <= 0:
                raise _Unknown
            return base**power
        if not isinstance(base, _Value) or base.power or not base.is_of_group:
            raise _Unknown
        root = tuple(sorted(base.polynomial.items()))
        return _Value({_ONE: 1.0}, base.axes, base.shape, root, power)

    def _maximum(self, equation: Equation, *operands: Any) -> _Value | float:
        """Of a variance and 0: a variance."""
        for number, value in (operands, operands[::-1]):
            if number == 0 and isinstance(value, _Value) and not value.power:
                terms = dict(value.polynomial)
                square, product = terms.pop(_Q, 0.0), terms.pop(_MM, 0.0)
                if square > 0 and -product <= square * (1 + _CLOSE) and not any(terms.values()):
                    return value
        raise _Unknown

    def _chosen(self, equation: Equation, *operands: Any) -> _Value | float:
        which = operands[0]
        if not isinstance(which, float):
            raise _Unknown
        chosen = operands[1 + int(which)]
        if chosen is None:
            raise _Unknown
        return chosen

    def _compared(self, equation: Equation, *operands: Any) -> float:
        if not all(isinstance(x, float) for x in operands):
            raise _Unknown
        return float(_COMPARISONS[equation.primitive](*operands))

    def _summed(self, equation: Equation, operand: Any) -> _Value:
        if not isinstance(operand, _Value) or operand.power:
            raise _Unknown
        places = [int(axis) for axis in equation.params["axes"]]
        axes = frozenset(part for place in places for part in operand.axes[place])
        if not operand.is_of_group:
            if self.reduced not in (None, axes) or not axes or min(axes) < 0:
                raise _Unknown
            self.reduced = axes
        elif any(part >= 0 for part in axes):
            raise _Unknown
        count = math.prod(operand.shape[place] for place in places)
        terms = []
        for (x, m, q), coefficient in operand.polynomial.items():
            if x > 2:
                raise _Unknown
            terms.append(((0, m + (x == 1), q + (x == 2)), count * coefficient))
        kept = [place for place in range(len(operand.shape)) if place not in places]
        return replace(operand.of_places(kept), polynomial=_collected(terms))

    def _same(self, equation: Equation, operand: Any) -> _Value | float:
        if operand is None:
            raise _Unknown
        return operand

    def _negative(self, equation: Equation, operand: Any) -> _Value | float:
        return self._product(equation, operand, -1.0)

    def _broadcast(self, equation: Equation, operand: _Value, *_: Any) -> _Value:
        shape = tuple(int(n) for n in equation.params["shape"])
        axes: list[tuple[int, ...]] = [(-n,) if n != 1 else () for n in shape]
        for place, target in enumerate(equation.params["broadcast_dimensions"]):
            if operand.shape[place] == shape[int(target)]:
                axes[int(target)] = operand.axes[place]
        if not operand.is_of_group and math.prod(shape) != math.prod(operand.shape):
            raise _Unknown
        return replace(operand, axes=tuple(axes), shape=shape)

    def _transposed(self, equation: Equation, operand: _Value) -> _Value:
        return operand.of_places(equation.params["permutation"])

    def _squeezed(self, equation: Equation, operand: _Value) -> _Value:
        dropped = {int(axis) % len(operand.shape) for axis in equation.params["dimensions"]}
        return operand.of_places([p for p in range(len(operand.shape)) if p not in dropped])

    def _reshaped(self, equation: Equation, operand: _Value) -> _Value:
        shape = tuple(int(n) for n in equation.params["new_sizes"])
        pending = _flat(operand.axes)
        axes: list[tuple[int, ...]] = []
        for n in shape:
            taken: list[int] = []
            while n > 1:
                part = pending.pop(0)
                length = self._length(part)
                if n % length:
                    # The axis goes into this one in part.
                    if length % n:
                        raise _Unknown
                    if part >= 0:
                        raise _Split(part, (n, length // n))
                    pending.insert(0, -(length // n))
                    part, length = -n, n
                taken.append(part)
                n //= length
            axes.append(tuple(taken))
        return replace(operand, axes=tuple(axes), shape=shape)


def _flat(axes: Axes) -> list[int]:
    return [part for own in axes for part in own]


def _terms(operand: _Value | float) -> Polynomial:
    return operand.polynomial if isinstance(operand, _Value) else {_ONE: operand}


def _collected(terms: Sequence[tuple[tuple[int, int, int], float]]) -> Polynomial:
    """The sum of terms, without those that cancel."""
    total: dict[tuple[int, int, int], float] = {}
    size: dict[tuple[int, int, int], float] = {}
    for key, coefficient in terms:
        total[key] = total.get(key, 0.0) + coefficient
        size[key] = size.get(key, 0.0) + abs(coefficient)
    return {key: c for key, c in total.items() if abs(c) > 1e-7 * size[key]}


def _equal(a: float, b: float) -> bool:
    return abs(a - b) <= _CLOSE * abs(b)


_COMPARISONS: dict[Any, Callable[[float, float], bool]] = {
    P.gt_p: lambda a, b: a > b,
    P.ge_p: lambda a, b: a >= b,
    P.lt_p: lambda a, b: a < b,
    P.le_p: lambda a, b: a <= b,
}
_RULES: dict[Any, Callable[..., Any]] = {
    P.add_p: _Search._sum,
    P.sub_p: lambda search, equation, a, b: search._sum(equation, a, b, sign=-1.0),
    P.mul_p: _Search._product,
    P.div_p: _Search._quotient,
    P.neg_p: _Search._negative,
    P.square_p: lambda search, equation, a: search._product(equation, a, a),
    P.integer_pow_p: _Search._power,
    P.pow_p: _Search._power,
    P.sqrt_p: lambda search, equation, a: search._root(a, 0.5),
    P.rsqrt_p: lambda search, equation, a: search._root(a, -0.5),
    P.max_p: _Search._maximum,
    P.select_n_p: _Search._chosen,
    P.reduce_sum_p: _Search._summed,
    P.broadcast_in_dim_p: _Search._broadcast,
    P.reshape_p: _Search._reshaped,
    P.squeeze_p: _Search._squeezed,
    P.transpose_p: _Search._transposed,
    P.convert_element_type_p: _Search._same,
    P.copy_p: _Search._same,
    **dict.fromkeys(_COMPARISONS, _Search._compared),
}
