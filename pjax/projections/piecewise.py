"""Piecewise linear functions of one variable: their algebra, and projection onto their graph.

A chain of elementwise operations of one variable with static constants (`relu`, `abs`, `clip`,
leaky relu, hard tanh, `sign`, a step written with `where`, …) is one such function, and so one
constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from pjax.projections import scaling
from pjax.projections.scaling import times

# Values of two pieces at a common end that differ by less than this, relative to the terms they are
# sums of, are the same up to the rounding of the algebra: a kink, not a jump.
_JUMP_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Piece:
    """`slope·x + intercept` on `[lower, upper]`; the ends may be infinite."""

    lower: float
    upper: float
    slope: float
    intercept: float

    def value(self, x: float) -> float:
        """`slope·x + intercept`."""
        # A constant piece is also asked for its value at infinity.
        return self.slope * x + self.intercept if self.slope else self.intercept


@dataclass(frozen=True)
class PiecewiseLinear:
    """`f(x) = slope_i·x + intercept_i` on `[lower_i, upper_i]`, intervals that cover the real line.

    Jumps are allowed. As a set, the function stands for the closure of its graph: values at
    isolated points, such as `sign(0) = 0`, do not count. Instances are immutable and hashable.
    The algebra merges adjacent pieces of one line, so equal functions compare equal (up to
    rounding).

    **Attributes:**

    - `pieces`: left to right; each begins where the one before ends.

    **Raises:** `ValueError` if the intervals do not cover the real line in order.

    ```python
    >>> f = PiecewiseLinear.identity().maximum(PiecewiseLinear.constant(0.0))
    >>> f == RELU
    True
    >>> f.subtract(f.negate()) == RELU.scale(2.0)
    True

    ```
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        ends = [-math.inf, *(piece.upper for piece in self.pieces)]
        ordered = all(
            piece.lower == end and piece.lower < piece.upper
            for piece, end in zip(self.pieces, ends, strict=False)
        )
        if not self.pieces or not ordered or ends[-1] != math.inf:
            raise ValueError(
                f"The pieces must cover the real line from left to right: {self.pieces}."
            )

    def __call__(self, x: ArrayLike) -> Array:
        """`f(x)` elementwise; at a jump, the value of the piece to the right."""
        x = jnp.asarray(x)

        def value(piece: Piece) -> Array:
            # Without the product where the slope is 0: 0·∞ is not a number.
            if piece.slope == 0:
                return jnp.full_like(x, piece.intercept)
            return piece.slope * x + piece.intercept

        result = value(self.pieces[0])
        for piece in self.pieces[1:]:
            result = jnp.where(x >= piece.lower, value(piece), result)
        return result

    # --- Constructors ----------------------------------------------------------------------------

    @classmethod
    def identity(cls) -> PiecewiseLinear:
        """`f(x) = x`."""
        return cls((Piece(-math.inf, math.inf, 1.0, 0.0),))

    @classmethod
    def constant(cls, value: float) -> PiecewiseLinear:
        """`f(x) = value`."""
        return cls((Piece(-math.inf, math.inf, 0.0, float(value)),))

    # --- Algebra ---------------------------------------------------------------------------------

    def add(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """`f + g`."""
        return _combine(
            [self, other],
            lambda f, g: (f.slope + g.slope, f.intercept + g.intercept),
        )

    def subtract(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """`f − g`."""
        return self.add(other.negate())

    def scale(self, factor: float) -> PiecewiseLinear:
        """`factor·f`."""
        return _combine([self], lambda f: (factor * f.slope, factor * f.intercept))

    def negate(self) -> PiecewiseLinear:
        """`−f`."""
        return self.scale(-1.0)

    def multiply(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """`f·g`, where everywhere at least one of the two is locally constant.

        **Raises:** `ValueError` if both vary on some interval: the product is not piecewise linear.
        """

        def product(f: Piece, g: Piece) -> tuple[float, float]:
            if f.slope and g.slope:
                raise ValueError(
                    "A product of two varying functions is not piecewise linear: "
                    f"both vary on [{f.lower}, {f.upper}]."
                )
            slope = f.intercept * g.slope if g.slope else g.intercept * f.slope
            return slope, f.intercept * g.intercept

        return _combine([self, other], product)

    def maximum(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """`max(f, g)`."""
        return self.compare(">=", other).where(other, self)

    def minimum(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """`min(f, g)`."""
        return self.compare("<=", other).where(other, self)

    def absolute(self) -> PiecewiseLinear:
        """`|f|`."""
        return self.maximum(self.negate())

    def sign(self) -> PiecewiseLinear:
        """The sign of `f`, up to isolated points: −1, 1, and 0 where `f` is 0 on an interval."""
        zero = PiecewiseLinear.constant(0.0)
        return self.compare(">", zero).subtract(self.compare("<", zero))

    def compare(self, op: str, other: PiecewiseLinear) -> PiecewiseLinear:
        """1 where `f op g` holds and 0 elsewhere, up to isolated points.

        **Arguments:**

        - `op`: `">"`, `">="`, `"<"`, `"<="`, `"=="` or `"!="`.

        **Raises:** `ValueError` for any other `op`.
        """
        if op not in _COMPARISONS:
            raise ValueError(f"`op` must be one of {', '.join(_COMPARISONS)}, got {op!r}.")
        holds = _COMPARISONS[op]
        pieces = []
        for piece in _split_at_zeros(self.subtract(other)).pieces:
            truth = holds(piece.value(_inside(piece)))
            pieces.append(Piece(piece.lower, piece.upper, 0.0, float(truth)))
        return _merge(pieces)

    def where(self, if_false: PiecewiseLinear, if_true: PiecewiseLinear) -> PiecewiseLinear:
        """`if_true` where this function, a condition, is 1, and `if_false` where it is 0.

        **Raises:** `ValueError` if this function takes other values than 0 and 1.
        """

        def choose(condition: Piece, f: Piece, g: Piece) -> tuple[float, float]:
            if condition.slope or condition.intercept not in (0.0, 1.0):
                raise ValueError(f"A condition takes the values 0 and 1 only, got {self.pieces}.")
            chosen = g if condition.intercept else f
            return chosen.slope, chosen.intercept

        return _combine([self, if_false, if_true], choose)


_COMPARISONS: dict[str, Callable[[float], bool]] = {
    ">": lambda difference: difference > 0,
    ">=": lambda difference: difference >= 0,
    "<": lambda difference: difference < 0,
    "<=": lambda difference: difference <= 0,
    "==": lambda difference: difference == 0,
    "!=": lambda difference: difference != 0,
}


def _inside(piece: Piece) -> float:
    """A point of the open interval of a piece."""
    if math.isinf(piece.lower) and math.isinf(piece.upper):
        return 0.0
    # An interval may be shorter than 1 and far from 0, or unbounded: go by its own magnitude.
    if math.isinf(piece.lower):
        return piece.upper - 1 - abs(piece.upper)
    if math.isinf(piece.upper):
        return piece.lower + 1 + abs(piece.lower)
    return piece.lower + 0.5 * (piece.upper - piece.lower)


def _merge(pieces: Sequence[Piece]) -> PiecewiseLinear:
    """The function with adjacent pieces of one line joined."""
    merged: list[Piece] = []
    for piece in pieces:
        # Adding 0 turns −0 into 0, which compares equal but is another value.
        line = (piece.slope + 0.0, piece.intercept + 0.0)
        if merged and (merged[-1].slope, merged[-1].intercept) == line:
            merged[-1] = Piece(merged[-1].lower, piece.upper, *line)
        else:
            merged.append(Piece(piece.lower, piece.upper, *line))
    return PiecewiseLinear(tuple(merged))


def _combine(
    functions: Sequence[PiecewiseLinear], line: Callable[..., tuple[float, float]]
) -> PiecewiseLinear:
    """`line(f, g, …)` on every interval of the common refinement."""
    ends = sorted({piece.upper for function in functions for piece in function.pieces})
    index = [0] * len(functions)
    lower = -math.inf
    pieces = []
    for upper in ends:
        parts = [f.pieces[i] for f, i in zip(functions, index, strict=True)]
        pieces.append(Piece(lower, upper, *line(*parts)))
        index = [i + (p.upper == upper) for i, p in zip(index, parts, strict=True)]
        lower = upper
    return _merge(pieces)


def _split_at_zeros(function: PiecewiseLinear) -> PiecewiseLinear:
    """The same function, with a piece divided where it changes its sign."""
    pieces = []
    for piece in function.pieces:
        zero = 0.0 - piece.intercept / piece.slope if piece.slope else math.nan
        # A zero at an end up to rounding would cut off a sliver.
        at_end = any(math.isclose(zero, end, rel_tol=1e-12) for end in (piece.lower, piece.upper))
        if piece.lower < zero < piece.upper and not at_end:
            pieces.append(Piece(piece.lower, zero, piece.slope, piece.intercept))
            pieces.append(Piece(zero, piece.upper, piece.slope, piece.intercept))
        else:
            pieces.append(piece)
    return PiecewiseLinear(tuple(pieces))


#: `max(x, 0)`.
RELU = PiecewiseLinear.identity().maximum(PiecewiseLinear.constant(0.0))


# --- The projection ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kink:
    """Where piece `i` ends and piece `i + 1` begins."""

    place: float
    slope_change: float
    left: float
    right: float

    @property
    def jump(self) -> float:
        return self.right - self.left


def _kinks(function: PiecewiseLinear) -> list[_Kink]:
    kinks = []
    for left, right in zip(function.pieces[:-1], function.pieces[1:], strict=True):
        place = left.upper
        before, after = left.value(place), right.value(place)
        size = max(abs(left.slope * place), abs(left.intercept), abs(right.slope * place))
        if abs(after - before) <= _JUMP_TOLERANCE * max(size, abs(right.intercept)):
            after = before
        kinks.append(_Kink(place, right.slope - left.slope, before, after))
    return kinks


def _is_right_of(kink: _Kink, reference: Array, output_reference: Array) -> Array:
    """Whether the reference point is on the pieces to the right of a kink."""
    right = reference >= kink.place
    if kink.jump:
        # The program that computed the output may round its threshold differently, or take the
        # left value at the jump (`x > 0` does): the output says where it was.
        slack = 4 * jnp.finfo(reference.dtype).eps * abs(kink.place)
        near = jnp.abs(reference - kink.place) <= slack
        to_left = jnp.abs(output_reference - kink.left)
        to_right = jnp.abs(output_reference - kink.right)
        right = jnp.where(near, to_right <= to_left, right)
    return right


def piecewise(
    function: PiecewiseLinear,
    reference: Array,
    output_reference: Array,
    deviation: Array | None,
    weight: ArrayLike,
    target: Array,
    target_weight: ArrayLike,
    exponent: Any = 0,
) -> tuple[Array, Array]:
    """`argmin ρ (dx' − dx)² + W (dy' − dz)²` with `(x_ref + dx', y_ref + dy')` on the graph of `f`.

    Elementwise, onto the closure of the graph: the nearest point of every piece, then the nearest
    of these. Ties go to the piece of the reference, then to the leftmost.

    The height of a piece over the reference output is summed up from the kinks between the
    reference and that piece, `Δslope·(x_ref − kink) + jump`. So it is exactly 0 on the reference's
    own piece, and exact to the rounding *of the deviation* next to a kink.

    **Arguments:**

    - `function`: `f`.
    - `reference`: `x_ref`.
    - `output_reference`: `y_ref = f(x_ref)` as the program computed it. It decides which side of a
        jump a reference at the jump is on.
    - `deviation`: `dx`, of the shape and type of `dz`; None for 0.
    - `weight`: `ρ > 0`.
    - `target`: `dz`.
    - `target_weight`: `W ≥ 0`.
    - `exponent`: deviations, targets and results are in a unit of `2**−exponent`.

    **Returns:** `dx'` and `dy'`.
    """
    dtype = target.dtype
    weight, target_weight = scaling.number(weight, dtype), scaling.number(target_weight, dtype)
    kinks = _kinks(function)
    if len(kinks) == 1 and not kinks[0].jump:
        return _bent(
            function, kinks[0].place, reference, deviation, weight, target, target_weight, exponent
        )
    if deviation is None:
        deviation = jnp.zeros_like(target)

    def in_unit(length: Any) -> Any:
        return scaling.to_unit(jnp.asarray(length, dtype), exponent)

    right_of = [_is_right_of(kink, reference, output_reference) for kink in kinks]
    steps = [
        kink.slope_change * in_unit(reference - kink.place) + in_unit(kink.jump) for kink in kinks
    ]
    # Costs are in units of the request, whose square may underflow. The cap keeps squares of pieces
    # that are far beyond it finite; the reference's own piece is never that far.
    info = jnp.finfo(dtype)
    size = jnp.maximum(jnp.abs(deviation), jnp.abs(target))
    unit = 1 / jnp.maximum(size, info.tiny)
    cap = float(info.max) ** 0.4

    def squared(length: Array) -> Array:
        return jnp.square(jnp.minimum(jnp.abs(length) * unit, cap))

    # An output at an isolated point (`sign(0) = 0`) is on no piece; all heights are over it.
    isolated = jnp.zeros((), dtype)
    for kink, right in zip(kinks, right_of, strict=True):
        if kink.jump:
            gap = jnp.minimum(
                jnp.abs(output_reference - kink.left), jnp.abs(output_reference - kink.right)
            )
            outside = (reference == kink.place) & (gap > 0.25 * abs(kink.jump))
            beside = jnp.where(right, kink.right, kink.left)
            isolated = jnp.where(outside, in_unit(beside - output_reference), isolated)

    moves, outputs, costs, owns = [], [], [], []
    for number, piece in enumerate(function.pieces):
        own = jnp.ones(reference.shape, bool)
        height = isolated
        for k, (right, step) in enumerate(zip(right_of, steps, strict=True)):
            # The kink lies between the reference's piece and this one.
            if k < number:
                height = height + jnp.where(right, 0, step)
                own &= right
            else:
                height = height - jnp.where(right, step, 0)
                own &= ~right
        # Left out where infinite: this is an inner loop.
        lower = None if math.isinf(piece.lower) else in_unit(piece.lower - reference)
        upper = None if math.isinf(piece.upper) else in_unit(piece.upper - reference)
        # The reference may be off its piece by the rounding of the threshold of a jump.
        if lower is not None and kinks[number - 1].jump:
            lower = jnp.where(own, jnp.minimum(lower, 0), lower)
        if upper is not None and kinks[number].jump:
            upper = jnp.where(own, jnp.maximum(upper, 0), upper)
        if slope := piece.slope:
            gain = target_weight * slope / (weight + target_weight * slope**2)
            move = gain * (target - height - slope * deviation)
            moved = jnp.clip(deviation + move, lower, upper)
            move = jnp.clip(
                move,
                None if lower is None else lower - deviation,
                None if upper is None else upper - deviation,
            )
            output = slope * moved + height
        else:
            moved = jnp.clip(deviation, lower, upper)
            move = moved - deviation
            output = jnp.broadcast_to(height, moved.shape)
        cost = weight * squared(move) + target_weight * squared(output - target)
        moves.append(moved)
        outputs.append(output)
        costs.append(cost)
        owns.append(own)

    best, moved, output, own = costs[0], moves[0], outputs[0], owns[0]
    for cost, candidate, height, owned in zip(
        costs[1:], moves[1:], outputs[1:], owns[1:], strict=True
    ):
        better = (cost < best) | ((cost == best) & owned & ~own)
        moved = jnp.where(better, candidate, moved)
        output = jnp.where(better, height, output)
        own = jnp.where(better, owned, own)
        best = jnp.where(better, cost, best)
    return moved, output


def _bent(
    function: PiecewiseLinear,
    place: float,
    reference: Array,
    deviation: Array | None,
    weight: Any,
    target: Array,
    target_weight: Any,
    exponent: Any,
) -> tuple[Array, Array]:
    """`piecewise` of two half-lines that meet: an inner loop of most networks.

    From the kink they go in two directions, and the point is nearer to that with which it has the
    larger scalar product: one sign decides, of `dx − kink + κ (dz − its height)`. A half-line whose
    line has its nearest point beyond the kink offers the kink, which the other has too.
    """
    shape = jnp.broadcast_shapes(reference.shape, target.shape)
    reference, target = (
        jnp.broadcast_to(jnp.asarray(x, target.dtype), shape) for x in (reference, target)
    )
    beyond = scaling.to_unit(reference - place if place else reference, exponent)
    zero = jnp.zeros_like(beyond)
    right = reference >= (place if place else zero)
    left_slope, right_slope = slopes = [piece.slope for piece in function.pieces]
    # For each line what a square of it weighs, and how far the operand follows an error in it.
    tilt: Any = 0.0
    lengths: Any = 0.0
    gains: list[Any] = []
    for slope in slopes:
        normal = weight + target_weight * slope**2 if slope else weight
        gains.append(target_weight * slope / normal if slope else 0.0)
        length = 1 / math.sqrt(normal) if isinstance(normal, float) else lax.rsqrt(normal)
        lengths = lengths + length
        tilt = tilt + slope * length if slope else tilt
    if left_slope * right_slope < 0:
        scaled_tilt = _opposite_tilt(slopes, weight, target_weight)
    else:
        scaled_tilt = tilt * target_weight / weight
    tilt = scaled_tilt / lengths

    def along(is_right: Array, of_lines: Sequence[Any], value: Array) -> Array:
        """The value times what belongs to a line."""
        left, right = (
            zero if isinstance(factor, (int, float)) and factor == 0 else times(factor, value)
            for factor in of_lines
        )
        return lax.select(is_right, right, left)

    kink = -beyond
    other = times(right_slope - left_slope, beyond)
    if deviation is None and left_slope == 0:
        # As in a relu. From the right the left line has nothing nearer than the kink; from the left
        # it has the reference.
        to_right = right | (tilt * target + beyond > zero)
        height = lax.select(right, zero, other)
        moved = jnp.maximum(times(gains[1], target - height), kink)
        output = times(right_slope, moved) + height
        return lax.select(to_right, moved, zero), lax.select(to_right, output, zero)
    score = tilt * target + along(right, [1 + tilt * s if s else 1 for s in slopes], beyond)
    score = score if deviation is None else deviation + score
    to_right = lax.select(right, score >= zero, score > zero)
    # Over the reference's output: 0 on its own line.
    height = lax.select(to_right == right, zero, lax.select(right, -other, other))
    error = target - height
    error = error if deviation is None else error - along(to_right, slopes, deviation)
    foot = along(to_right, gains, error)
    foot = foot if deviation is None else deviation + foot
    moved = lax.select(to_right, jnp.maximum(foot, kink), jnp.minimum(foot, kink))
    return moved, along(to_right, slopes, moved) + height


def _opposite_tilt(slopes: Sequence[float], weight: Any, target_weight: Any) -> Any:
    """`W/ρ Σ s/(ρ + W s²)^½` of two slopes of opposite sign.

    Where W/ρ is large the two terms are nearly equal, and W/ρ times their rounding is not small: so
    their difference is had from that of their squares, without W/ρ.
    """
    up, down = max(slopes), min(slopes)
    steep, flat = (1 / jnp.sqrt(target_weight + weight / slope**2) for slope in (up, down))
    between = 1 / down**2 - 1 / up**2
    return between * (target_weight * steep * flat) * (steep * flat / (steep + flat))
