"""Nearest points of bilinear operations, one constraint per scalar product (neuron splitting).

A bilinear operation `B(left, right) = output` is cut into its scalar products `y = x·w`, each on
its own copies of two slices. Every projection here solves

    argmin  ρx |x' − x|² + ρw |w' − w|² + W (x'·w' − z)²

for all scalar products of one operation at once, with values given as reference plus deviation.
Three forms of the same projection differ in what is stored:

- *compact*: all copies of an entry agree on entry, and only their mean leaves; no copy is formed;
- *lifted*: the copies themselves, for algorithms that reflect;
- *pinned*: one operand is data, the constraint is affine, and the copies keep a closed form.

Sources: arXiv 2506.05878 for the splitting; Bauschke, Lal, Wang, "Projecting onto rectangular
hyperbolic paraboloids" (2022) for the scalar product.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

Weight: TypeAlias = Float[Array, "..."] | float
"""A metric weight: a scalar, or an array that broadcasts to the output (constant over a slice)."""

Side: TypeAlias = Literal["left", "right"]

Copies: TypeAlias = int | np.ndarray
"""How many copies each entry has: one number, or counts that broadcast to the operand."""


class Bilinear(ABC):
    """A map `B` linear in each of two operands, every output a scalar product of two slices.

    Each output entry reads a slice of `slice_length` entries of each operand. An entry of `left` is
    read by `left_copies` outputs, an entry of `right` by `right_copies`: a number, or counts that
    broadcast to the operand where they differ. Implementations are hashable, so that they can be
    static arguments.
    """

    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]

    @property
    @abstractmethod
    def output_shape(self) -> tuple[int, ...]:
        """The shape of `B(left, right)`."""

    @property
    @abstractmethod
    def slice_length(self) -> int:
        """How many products are summed in one output entry."""

    @property
    def slice_lengths(self) -> Copies:
        """How many entries each output reads: fewer than `slice_length` where some are constant."""
        return self.slice_length

    @property
    @abstractmethod
    def left_copies(self) -> Copies:
        """How many outputs read each entry of `left`."""

    @property
    @abstractmethod
    def right_copies(self) -> Copies:
        """How many outputs read each entry of `right`."""

    def copies(self, side: Side) -> Copies:
        """`left_copies` or `right_copies`."""
        return self.left_copies if side == "left" else self.right_copies

    @abstractmethod
    def __call__(
        self, left: Float[Array, "*left"], right: Float[Array, "*right"]
    ) -> Float[Array, "*output"]:
        """`B(left, right)`."""

    @abstractmethod
    def transpose_left(
        self, cotangent: Float[Array, "*output"], right: Float[Array, "*right"]
    ) -> Float[Array, "*left"]:
        """`Bxᵀ(cotangent; right)`, the transpose of `left -> B(left, right)`."""

    @abstractmethod
    def transpose_right(
        self, cotangent: Float[Array, "*output"], left: Float[Array, "*left"]
    ) -> Float[Array, "*right"]:
        """`Bwᵀ(cotangent; left)`, the transpose of `right -> B(left, right)`."""

    @abstractmethod
    def left_energy(self, left: Float[Array, "*left"]) -> Float[Array, ...]:
        """`B(left, 1)`, the sum over each slice, in a shape that broadcasts to the output."""

    @abstractmethod
    def right_energy(self, right: Float[Array, "*right"]) -> Float[Array, ...]:
        """`B(1, right)`, the sum over each slice, in a shape that broadcasts to the output."""

    @abstractmethod
    def left_sum(self, cotangent: Float[Array, "*output"]) -> Float[Array, ...]:
        """`Bxᵀ(cotangent; 1)`, the sum over the readers, in a shape that broadcasts to `left`."""

    @abstractmethod
    def right_sum(self, cotangent: Float[Array, "*output"]) -> Float[Array, ...]:
        """`Bwᵀ(cotangent; 1)`, the sum over the readers, in a shape that broadcasts to `right`."""

    @abstractmethod
    def lift_left(self, left: Float[Array, "*left"]) -> Float[Array, "*output slice"]:
        """The slices of `left` by output: `sum(lift_left(x) * lift_right(w), -1) = B(x, w)`."""

    @abstractmethod
    def lift_right(self, right: Float[Array, "*right"]) -> Float[Array, "*output slice"]:
        """The slices of `right` by output, ordered as in `lift_left`."""

    @abstractmethod
    def lower_left(self, copies: Float[Array, "*output slice"]) -> Float[Array, "*left"]:
        """The transpose of `lift_left`: the sum of all copies of each entry."""

    @abstractmethod
    def lower_right(self, copies: Float[Array, "*output slice"]) -> Float[Array, "*right"]:
        """The transpose of `lift_right`: the sum of all copies of each entry."""

    def mask_slices(self, copies: Float[Array, "*output slice"]) -> Float[Array, "*output slice"]:
        """`copies`, with 0 where a slice reads a constant."""
        return copies


@dataclass(frozen=True)
class Multiply(Bilinear):
    """`B(left, right) = left * right`, entry by entry: slices of length one, one copy of each.

    Arguments:
        shape: the shape of both operands and of the output.
    """

    shape: tuple[int, ...]

    @property
    def left_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shape

    @property
    def right_shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def slice_length(self) -> int:
        return 1

    @property
    def left_copies(self) -> int:
        return 1

    @property
    def right_copies(self) -> int:
        return 1

    def __call__(self, left, right):
        return left * right

    def transpose_left(self, cotangent, right):
        return cotangent * right

    def transpose_right(self, cotangent, left):
        return cotangent * left

    def left_energy(self, left):
        return left

    def right_energy(self, right):
        return right

    def left_sum(self, cotangent):
        return cotangent

    def right_sum(self, cotangent):
        return cotangent

    def lift_left(self, left):
        return left[..., None]

    def lift_right(self, right):
        return right[..., None]

    def lower_left(self, copies):
        return copies[..., 0]

    def lower_right(self, copies):
        return copies[..., 0]


@dataclass(frozen=True)
class _Operand:
    """The axes of one operand of a `dot_general`, and the place of its free axes in the output."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contracting: tuple[int, ...]
    is_left: bool
    other_free: int

    @property
    def free(self) -> tuple[int, ...]:
        taken = self.batch + self.contracting
        return tuple(axis for axis in range(len(self.shape)) if axis not in taken)

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that the output keeps, in the order of the output."""
        return self.batch + self.free

    @property
    def other_axes(self) -> tuple[int, ...]:
        """The axes of the output that come from the other operand."""
        first = len(self.kept) if self.is_left else len(self.batch)
        return tuple(range(first, first + self.other_free))

    def spread(self, array: Array) -> Array:
        """Put axes of length one where the output has the other operand's free axes."""
        return jnp.expand_dims(array, self.other_axes)

    def energy(self, array: Array) -> Array:
        # After the reduction the kept axes stand in the operand's order, not in the output's.
        rank = {axis: place for place, axis in enumerate(sorted(self.kept))}
        summed = jnp.sum(array, axis=self.contracting)
        return self.spread(jnp.transpose(summed, [rank[axis] for axis in self.kept]))

    def sum(self, cotangent: Array) -> Array:
        summed = jnp.sum(cotangent, axis=self.other_axes)
        summed = jnp.transpose(summed, inverse(self.kept))
        return jnp.expand_dims(summed, self.contracting)

    def lift(self, array: Array, output_shape: tuple[int, ...]) -> Array:
        array = jnp.transpose(array, self.kept + self.contracting)
        array = array.reshape(*array.shape[: len(self.kept)], -1)
        return jnp.broadcast_to(self.spread(array), (*output_shape, array.shape[-1]))

    def lower(self, copies: Array) -> Array:
        order = self.kept + self.contracting
        summed = jnp.sum(copies, axis=self.other_axes)
        summed = summed.reshape([self.shape[axis] for axis in order])
        return jnp.transpose(summed, inverse(order))


@dataclass(frozen=True)
class DotGeneral(Bilinear):
    """`B(left, right) = jax.lax.dot_general(left, right, dimension_numbers)`.

    Arguments:
        dimension_numbers: `((left contracting, right contracting), (left batch, right batch))`.
        left_shape: the shape of the left operand.
        right_shape: the shape of the right operand.
        precision: as in `jax.lax.dot_general`; used by the transposes too.
        preferred_element_type: as in `jax.lax.dot_general`; used by the transposes too.
        operand_type: a narrow type, such as bfloat16, in which operands are multiplied; the result
            is float32. None: in their own.

    Raises:
        ValueError: if a contraction runs over no entries: its output is a constant.
    """

    dimension_numbers: Any
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    precision: Any = None
    preferred_element_type: Any = None
    operand_type: Any = None

    def __post_init__(self) -> None:
        # Lists are common in dimension numbers and would make the operation unhashable.
        (left_contracting, right_contracting), (left_batch, right_batch) = self.dimension_numbers
        numbers = (
            (_axes(left_contracting), _axes(right_contracting)),
            (_axes(left_batch), _axes(right_batch)),
        )
        object.__setattr__(self, "dimension_numbers", numbers)
        if self.slice_length == 0:
            raise ValueError(
                f"`dot_general` of shapes {self.left_shape} and {self.right_shape} contracts over "
                "an axis of length 0, so its output does not depend on its operands."
            )

    @property
    def _left(self) -> _Operand:
        (contracting, right_contracting), (batch, _) = self.dimension_numbers
        right_free = len(self.right_shape) - len(batch) - len(right_contracting)
        return _Operand(self.left_shape, batch, contracting, True, right_free)

    @property
    def _right(self) -> _Operand:
        (left_contracting, contracting), (_, batch) = self.dimension_numbers
        left_free = len(self.left_shape) - len(batch) - len(left_contracting)
        return _Operand(self.right_shape, batch, contracting, False, left_free)

    @property
    def output_shape(self) -> tuple[int, ...]:
        left, right = self._left, self._right
        return (
            *(left.shape[axis] for axis in left.kept),
            *(right.shape[axis] for axis in right.free),
        )

    @property
    def slice_length(self) -> int:
        return math.prod(self.left_shape[axis] for axis in self._left.contracting)

    @property
    def left_copies(self) -> int:
        return math.prod(self.right_shape[axis] for axis in self._right.free)

    @property
    def right_copies(self) -> int:
        return math.prod(self.left_shape[axis] for axis in self._left.free)

    def _dot(self, left: Array, right: Array, dimension_numbers: Any) -> Array:
        """The product in this operation's precision."""
        wide = self.preferred_element_type
        if self.operand_type is not None:
            wide = jnp.promote_types(left.dtype, jnp.float32)
            left, right = left.astype(self.operand_type), right.astype(self.operand_type)
        return lax.dot_general(
            left, right, dimension_numbers, self.precision, preferred_element_type=wide
        )

    def __call__(self, left, right):
        return self._dot(left, right, self.dimension_numbers)

    def transpose_left(self, cotangent, right):
        x, w = self._left, self._right
        batch = tuple(range(len(x.batch)))
        result = self._dot(cotangent, right, ((x.other_axes, w.free), (batch, w.batch)))
        # `dot_general` leaves the contracted axes in the order in which `right` has them.
        contracting = tuple(x.contracting[place] for place in inverse(w.contracting))
        return jnp.transpose(result, inverse(x.kept + contracting))

    def transpose_right(self, cotangent, left):
        x, w = self._left, self._right
        batch = tuple(range(len(w.batch)))
        result = self._dot(left, cotangent, ((x.free, w.other_axes), (x.batch, batch)))
        contracting = tuple(w.contracting[place] for place in inverse(x.contracting))
        return jnp.transpose(result, inverse(w.batch + contracting + w.free))

    def left_energy(self, left):
        return self._left.energy(left)

    def right_energy(self, right):
        return self._right.energy(right)

    def left_sum(self, cotangent):
        return self._left.sum(cotangent)

    def right_sum(self, cotangent):
        return self._right.sum(cotangent)

    def lift_left(self, left):
        return self._left.lift(left, self.output_shape)

    def lift_right(self, right):
        return self._right.lift(right, self.output_shape)

    def lower_left(self, copies):
        return self._left.lower(copies)

    def lower_right(self, copies):
        return self._right.lower(copies)


def _axes(axes: Any) -> tuple[int, ...]:
    return tuple(int(axis) for axis in axes)


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The places of the entries of `order` from the least to the greatest."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))


class MultiplierRoot(NamedTuple):
    """The root `t` of the multiplier equation, in terms that need no subtraction.

    Attributes:
        odds: `|t|/(1 − |t|)`, to full precision, and with it `|t| = odds/(1 + odds)` and
            `1 − |t| = 1/(1 + odds)`. The sign of `t` is that of `g`.
        near, far: `alpha` and `beta`, exchanged where `g < 0`: `near` belongs to the pole that the
            root approaches.
        excess: `2|g| + near − 0.75 far − 2`; where it is positive and `near` vanishes no root
            exists and the nearest point is not unique.
        set_valued: where that is so to rounding; `odds` has no meaning there.
    """

    odds: Float[Array, "*shape"]
    near: Float[Array, "*shape"]
    far: Float[Array, "*shape"]
    excess: Float[Array, "*shape"]
    set_valued: Bool[Array, "*shape"]


def solve_multiplier(
    alpha: Float[Array, "*shape"],
    beta: Float[Array, "*shape"],
    g: Float[Array, "*shape"],
    negligible: float | None = None,
) -> MultiplierRoot:
    """The `t` in (-1, 1) with `t + t [α (2−t)/(1−t)² + β (2+t)/(1+t)²]/2 = g`.

    For a scalar product this is the stationarity condition of the nearest point, with
    `α, β = W |√ρx x ± √ρw w|²/(2 ρx ρw)` and `g = W (z − x·w)/√(ρx ρw)`. The left side increases,
    so that the root is unique. It is found by Newton's method from a bound on the side of the pole.

    Arguments:
        alpha, beta: the two energies, not negative.
        g: the scaled residual.
        negligible: the share of `alpha + beta` up to which the energy at the pole counts as zero;
            by default what rounding leaves when the energies are sums of squares.

    Returns:
        the root and what decides whether there is one.

    Source: Bauschke, Lal, Wang (2022) for the equation.
    """
    dtype = jnp.result_type(alpha, beta, g)
    single = jnp.finfo(dtype).bits <= 32
    tiny = 1e-30 if single else 1e-200
    negative = g < 0
    near = jnp.where(negative, beta, alpha)
    far = jnp.where(negative, alpha, beta)
    g = jnp.abs(g)

    # The bound: near the pole the equation is `α t/(2u²) ≈ g − …`, far from it it is nearly linear.
    near_floored = jnp.maximum(near, tiny)
    slope = 2 + 0.75 * far
    excess = 2 * g + near_floored - 0.75 * far - 2
    cubic = jnp.exp((jnp.log(near_floored) - jnp.log(2 * slope)) / 3)
    pole = jnp.sqrt(near_floored) / jnp.sqrt(2 * jnp.maximum(excess, tiny))
    lower = jnp.minimum(
        1.0, jnp.maximum(jnp.maximum(-excess, 0.0) / slope, jnp.minimum(pole, cubic))
    )
    t = jnp.minimum(g / (1 + near_floored + 0.375 * far), 1 - lower)

    # One number holds the root to full precision: t up to a half, t − 1 beyond. As a loop, and with
    # no quotient used twice, this is one small kernel; unrolled, XLA took five times as long to
    # compile it.
    def newton(_: Any, point: Array) -> Array:
        t, u = _both_sides(point)
        square = (1 + t) ** 2
        gap = t * (u * u * (square + far * (2 + t) / 2) + near_floored * square * (1 + u) / 2)
        gap = gap - u * (u * g) * square
        slope = near_floored * square / u + u * u * (square + far / (1 + t))
        moved = point - gap / slope
        next_t, next_u = jnp.maximum(moved, 0.0), jnp.clip(-moved, 0.1 * u, 1.0)
        return jnp.where(
            point >= 0,
            jnp.where(next_t <= 0.5, next_t, -jnp.maximum(1 - next_t, 0.1 * u)),
            jnp.where(next_u < 0.5, -next_u, 1 - next_u),
        )

    start = jnp.where(t <= 0.5, t, -jnp.maximum(1 - t, lower))
    t, u = _both_sides(lax.fori_loop(0, 5 if single else 7, newton, start))
    if negligible is None:
        negligible = (8 * float(jnp.finfo(dtype).eps)) ** 2
    set_valued = (near <= negligible * (near + far)) & (excess > 0)
    return MultiplierRoot(t / u, near, far, excess, set_valued)


def _both_sides(point: Array) -> tuple[Array, Array]:
    """`t` and `1 − t` of a number in [-½, ½] that is `t` where it is positive, else `t − 1`."""
    positive = point >= 0
    return jnp.where(positive, point, 1 + point), jnp.where(positive, 1 - point, -point)


class _Moves(NamedTuple):
    """What each pair of slices moves by, in the scaled slices `X = √ρx x` and `V = √ρw w`.

    `X` moves by `left_scale·X + cross·V + near·(V + sign·X) + fill`, and `V` by
    `right_scale·V + cross·X + near·(X + sign·V) + sign·fill`. Near a pole `V + sign·X` is small
    and its coefficient large; kept apart, the small vector is rounded once, before it is scaled.
    Without the slices at hand that cannot be done, and `near` is 0.
    """

    left_scale: Array
    right_scale: Array
    cross: Array
    near: Array
    sign: Array
    fill: Array
    output: Array


def _scalar_product_moves(
    plus: Array,
    minus: Array,
    residual: Array,
    sigma: Array,
    target_weight: Array,
    slice_length: Copies,
    then: Callable[[_Moves], Any],
    *,
    slices_at_hand: bool,
) -> Any:
    """`then` of the solution of every scalar product, given `plus, minus = |X ± V|²/(2σ²)` and
    `z − x·w`.
    """
    dtype = residual.dtype
    # Energies known as a difference of products are exact to ε only. Where they nearly cancel,
    # taking them for zero up to a share δ costs a relative √δ of the distance, and keeping them
    # costs ε/δ: both are least near δ = ε^⅔.
    negligible = None if slices_at_hand else float(jnp.finfo(dtype).eps) ** (2 / 3)
    root = solve_multiplier(
        target_weight * plus, target_weight * minus, target_weight * residual / sigma, negligible
    )

    def moves(set_valued: Array) -> _Moves:
        t = root.odds / (1 + root.odds)
        positive = residual >= 0
        sign = jnp.where(positive, 1, -1).astype(dtype)
        near, far = jnp.where(positive, plus, minus), jnp.where(positive, minus, plus)
        rise = near * (1 + root.odds) * (2 + root.odds) + far * (2 + t) / (1 + t) ** 2
        output = sign * sigma * t / 2 * rise

        # Set-valued: X and V lie along the far direction, and any point of a sphere (slices of one
        # entry: of two points) is nearest. Take the one along X; where both vanish, along ones.
        tiny = 1e-30 if jnp.finfo(dtype).bits <= 32 else 1e-200
        vanishing = set_valued & (root.far <= tiny)
        along = set_valued & ~vanishing
        held = jnp.where(set_valued, target_weight, 1)
        length = jnp.sqrt(jnp.maximum(root.excess - 0.25 * root.near, 0))
        ratio = length / jnp.sqrt(jnp.where(along, root.far - root.near, 1))

        regular = ~set_valued
        denominator = jnp.where(regular, 1 + t, 1)
        scale = jnp.where(regular, t * root.odds, 0)
        cross = jnp.where(regular, sign * root.odds, 0)
        near_pole = jnp.zeros_like(cross)
        if slices_at_hand:
            at_pole = regular & (root.odds > 1)
            scale = jnp.where(at_pole, -t, scale)
            cross, near_pole = jnp.where(at_pole, 0, cross), jnp.where(at_pole, cross, 0)
        return _Moves(
            left_scale=jnp.where(along, ratio - 0.5, scale) / denominator,
            right_scale=jnp.where(along, -ratio - 0.5, scale) / denominator,
            cross=cross / denominator,
            near=near_pole / denominator,
            sign=sign,
            fill=jnp.where(vanishing, sigma * length, 0)
            / jnp.sqrt(2 * np.maximum(slice_length, 1) * held),
            output=jnp.where(set_valued, residual - sign * sigma / held, output),
        )

    if not slices_at_hand and residual.size < _LARGE:
        return then(moves(root.set_valued))
    # Where nothing is set-valued less is to be done. And what a conditional returns is stored,
    # where compilers would find it again for each copy.
    return lax.cond(
        jnp.any(root.set_valued),
        lambda: then(moves(root.set_valued)),
        lambda: then(moves(jnp.zeros((), bool))),
    )


#: From how many scalar products on a second branch without copies is worth its compile time.
_LARGE = 2**18


def _copies_weight(
    weight: Weight, copies: Copies, total: Any, output_shape: tuple[int, ...]
) -> Array:
    """The sum of the weights of all copies of each entry, 1 where there is no copy."""
    weight = jnp.asarray(weight)
    if weight.ndim == 0:
        return weight * np.maximum(copies, 1)
    summed = total(jnp.broadcast_to(weight, output_shape))
    return jnp.where(np.asarray(copies) > 0, summed, 1)


def _asked(op: Bilinear, target_weight: Any, dtype: Any) -> Array:
    """The target's weight, 0 where the output reads constants only."""
    weight, lengths = jnp.asarray(target_weight, dtype), np.asarray(op.slice_lengths)
    return weight if lengths.all() else jnp.where(lengths > 0, weight, 0)


class CompactProjection(NamedTuple):
    """Consensus of the copies after the projection.

    Attributes:
        left, right: deviations of the (weighted) mean of all copies of each entry.
        output: exact output deviations.
        left_spread, right_spread: `Σ ρ |copy − mean|²` over all copies, scalars. Differences of
            sums of squares: exact to rounding of the squared moves, not of themselves.
    """

    left: Float[Array, "*left"]
    right: Float[Array, "*right"]
    output: Float[Array, "*output"]
    left_spread: Float[Array, ""]
    right_spread: Float[Array, ""]


def project_compact(
    op: Bilinear,
    left_ref: Float[Array, "*left"],
    right_ref: Float[Array, "*right"],
    left_dev: Float[Array, "*left"],
    right_dev: Float[Array, "*right"],
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
    output_ref: Float[Array, "*output"],
) -> CompactProjection:
    """`mean over copies of argmin Σ_j ρx|xⱼ' − xⱼ|² + ρw|wⱼ' − wⱼ|² + W (xⱼ'·wⱼ' − zⱼ)²`.

    `j` runs over the scalar products of `op`; all copies of an entry are equal on entry. Four
    products of the operation and memory of the size of the operands; no copy is formed. Where the
    nearest point is not unique one is chosen, the same every time.

    Arguments:
        op: the bilinear operation.
        left_ref, right_ref: reference operands.
        left_dev, right_dev: deviations of the operands.
        left_weight, right_weight: positive weights of one copy, constant over a slice: scalars, or
            arrays that broadcast to the output. With arrays, means are weighted by them.
        target_dev: deviation of the target `z` from `output_ref`.
        target_weight: weight `W`, scalar or broadcasting to the output; 0 where nothing is asked.
        output_ref: `op(left_ref, right_ref)`.

    Returns:
        a `CompactProjection`. As a slot it weighs `ρ` times the number of copies of each entry.

    Equal to `project_lifted` on the broadcast operands, then averaging. Only where two slices of
    two entries or more are opposed to within a relative ε^⅓ (`√ρx x ≈ ±√ρw w`) is it less accurate,
    by about ε^⅓ of the move: the copies it does not form would tell their small sum apart.
    """
    if op.slice_length == 1:
        # The copies have the shape of the output, and projecting them is the more accurate.
        return _project_single_entries(
            op,
            left_ref,
            right_ref,
            left_dev,
            right_dev,
            left_weight,
            right_weight,
            target_dev,
            target_weight,
        )
    left, right = left_ref + left_dev, right_ref + right_dev
    change = op(left_ref, right_dev) + op(left_dev, right)
    dtype = change.dtype
    left_weight, right_weight = jnp.asarray(left_weight, dtype), jnp.asarray(right_weight, dtype)
    product = output_ref + change
    left_energy, right_energy = op.left_energy(left**2), op.right_energy(right**2)
    left_root, right_root = jnp.sqrt(left_weight), jnp.sqrt(right_weight)
    sigma = left_root * right_root
    half = (left_energy / right_weight + right_energy / left_weight) / 2

    def consensus(moves: _Moves) -> CompactProjection:
        # In the scaled slices no weights are left, and `ρ |copy − mean|²` is a difference of sums.
        own, other = left_weight * left_energy, right_weight * right_energy
        cross, filled = moves.cross, op.slice_lengths * moves.fill**2
        mixed = 2 * cross * sigma * product
        left_squared = jnp.sum(
            moves.left_scale * (moves.left_scale * own + mixed) + cross**2 * other + filled
        )
        right_squared = jnp.sum(
            moves.right_scale * (moves.right_scale * other + mixed) + cross**2 * own + filled
        )
        left_total = _copies_weight(left_weight, op.left_copies, op.left_sum, op.output_shape)
        left_move = (
            left * op.left_sum(left_weight * moves.left_scale)
            + op.transpose_left(sigma * cross, right)
            + op.left_sum(left_root * moves.fill)
        ) / left_total
        right_total = _copies_weight(right_weight, op.right_copies, op.right_sum, op.output_shape)
        right_move = (
            right * op.right_sum(right_weight * moves.right_scale)
            + op.transpose_right(sigma * cross, left)
            + op.right_sum(right_root * moves.sign * moves.fill)
        ) / right_total
        return CompactProjection(
            left_dev + left_move,
            right_dev + right_move,
            change + moves.output,
            jnp.maximum(left_squared - jnp.sum(left_total * left_move**2), 0),
            jnp.maximum(right_squared - jnp.sum(right_total * right_move**2), 0),
        )

    return _scalar_product_moves(
        jnp.maximum(half + product / sigma, 0),
        jnp.maximum(half - product / sigma, 0),
        target_dev - change,
        sigma,
        _asked(op, target_weight, dtype),
        op.slice_lengths,
        consensus,
        slices_at_hand=False,
    )


def _project_single_entries(
    op: Bilinear,
    left_ref: Array,
    right_ref: Array,
    left_dev: Array,
    right_dev: Array,
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Array,
    target_weight: Weight,
) -> CompactProjection:
    """`project_compact` by the copies themselves, for slices of one entry."""
    copies = _lifted_moves(
        op,
        left_ref,
        right_ref,
        op.lift_left(left_dev),
        op.lift_right(right_dev),
        left_weight,
        right_weight,
        target_dev,
        target_weight,
    )

    def consensus(moves, weight, count, total, lift, lower):
        weight = jnp.asarray(weight, moves.dtype)
        weights = _per_slice(jnp.broadcast_to(weight, op.output_shape))
        move = lower(weights * moves) / _copies_weight(weight, count, total, op.output_shape)
        return move, jnp.sum(weights * (moves - lift(move)) ** 2)

    left_move, left_spread = consensus(
        copies.left_copies, left_weight, op.left_copies, op.left_sum, op.lift_left, op.lower_left
    )
    right_move, right_spread = consensus(
        copies.right_copies,
        right_weight,
        op.right_copies,
        op.right_sum,
        op.lift_right,
        op.lower_right,
    )
    return CompactProjection(
        left_dev + left_move, right_dev + right_move, copies.output, left_spread, right_spread
    )


class LiftedProjection(NamedTuple):
    """Deviations of the copies, `[*output_shape, slice_length]`, and of the output."""

    left_copies: Float[Array, "*output slice"]
    right_copies: Float[Array, "*output slice"]
    output: Float[Array, "*output"]


def project_lifted(
    op: Bilinear,
    left_ref: Float[Array, "*left"],
    right_ref: Float[Array, "*right"],
    left_copies_dev: Float[Array, "*output slice"],
    right_copies_dev: Float[Array, "*output slice"],
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
    output_ref: Float[Array, "*output"],
) -> LiftedProjection:
    """`argmin Σ_j ρx|xⱼ' − xⱼ|² + ρw|wⱼ' − wⱼ|² + W (xⱼ'·wⱼ' − zⱼ)²` over the copies themselves.

    `j` runs over the scalar products of `op`, each with its own copies of two slices.

    Arguments:
        op: the bilinear operation.
        left_ref, right_ref: reference operands, in the shapes of the operands.
        left_copies_dev, right_copies_dev: deviations of the copies, in the shape
            `[*output_shape, slice_length]`, ordered as by `op.lift_left` and `op.lift_right`.
        left_weight, right_weight: positive weights of one copy, scalars or broadcasting to the
            output.
        target_dev: deviation of the target `z` from `output_ref`.
        target_weight: weight `W`, scalar or broadcasting to the output; 0 where nothing is asked.
        output_ref: `op(left_ref, right_ref)`.

    Returns:
        a `LiftedProjection`.
    """
    # The residual is a sum of products of deviations; the value itself is not needed.
    del output_ref
    moves = _lifted_moves(
        op,
        left_ref,
        right_ref,
        left_copies_dev,
        right_copies_dev,
        left_weight,
        right_weight,
        target_dev,
        target_weight,
    )
    left, right = left_copies_dev + moves.left_copies, right_copies_dev + moves.right_copies
    # Stored once; XLA would find them again in each kernel that reads them.
    left, right = lax.optimization_barrier((left, right))
    return LiftedProjection(left, right, moves.output)


def _lifted_moves(
    op: Bilinear,
    left_ref: Array,
    right_ref: Array,
    left_copies_dev: Array,
    right_copies_dev: Array,
    left_weight: Weight,
    right_weight: Weight,
    target_dev: Array,
    target_weight: Weight,
) -> LiftedProjection:
    """How far `project_lifted` moves the copies, and the output deviation."""
    dtype = jnp.result_type(left_copies_dev, right_copies_dev, target_dev)
    left_root = jnp.sqrt(jnp.asarray(left_weight, dtype))
    right_root = jnp.sqrt(jnp.asarray(right_weight, dtype))
    left_base, right_base = op.lift_left(left_ref), op.lift_right(right_ref)
    left, right = left_base + left_copies_dev, right_base + right_copies_dev
    # A factor, not a quotient: XLA would store the quotient rather than divide twice.
    x, w = left * _per_slice(1 / right_root), right * _per_slice(1 / left_root)
    change, plus, minus = _sum_slices(
        left_base * right_copies_dev + left_copies_dev * right, *_energies(x, w)
    )
    moves = _scalar_product_moves(
        plus,
        minus,
        target_dev - change,
        left_root * right_root,
        _asked(op, target_weight, dtype),
        op.slice_lengths,
        lambda moves: moves,
        slices_at_hand=True,
    )
    near, sign, cross = moves.near[..., None], moves.sign[..., None], moves.cross[..., None]
    left_scale, right_scale = moves.left_scale[..., None], moves.right_scale[..., None]
    left_fill, right_fill = moves.fill / left_root, moves.sign * moves.fill / right_root
    left_move = near * (w + sign * x) + left_scale * x + cross * w
    right_move = near * (x + sign * w) + right_scale * w + cross * x
    return LiftedProjection(
        _per_slice(right_root) * left_move + op.mask_slices(left_fill[..., None]),
        _per_slice(left_root) * right_move + op.mask_slices(right_fill[..., None]),
        change + moves.output,
    )


def _energies(x: Array, w: Array) -> tuple[Array, Array]:
    """The terms of `|x ± w|²/2`."""
    return (x + w) ** 2 / 2, (x - w) ** 2 / 2


def _sum_slices(*copies: Array) -> Sequence[Array]:
    """Sum each array over the slice axis, the last, in one pass.

    One reduction of several operands reads the copies once and stores nothing of their size; three
    sums did, and took 2.5 to 7 times as long (XLA on CPU, 1.3 MB and 17 MB of copies).
    """
    zeros = tuple(jnp.zeros((), array.dtype) for array in copies)
    return lax.reduce(copies, zeros, _add_each, (copies[0].ndim - 1,))


def _add_each(sums: Sequence[Array], terms: Sequence[Array]) -> tuple[Array, ...]:
    return tuple(a + b for a, b in zip(sums, terms, strict=True))


def _per_slice(weight: Array) -> Array:
    return weight if weight.ndim == 0 else weight[..., None]


@dataclass(frozen=True)
class PinnedBilinear:
    """The linear map `free -> B` that remains when one operand of `op` is pinned.

    Arguments:
        op: the bilinear operation.
        side: which operand is pinned.
        pinned: the full value of that operand.
    """

    op: Bilinear
    side: Side
    pinned: Array

    def apply(self, free: Array) -> Array:
        """`B` of the pinned and the free operand."""
        left = self.side == "left"
        return self.op(self.pinned, free) if left else self.op(free, self.pinned)

    def transpose(self, cotangent: Array) -> Array:
        """The transpose of `apply`, in the shape of the free operand."""
        if self.side == "left":
            return self.op.transpose_right(cotangent, self.pinned)
        return self.op.transpose_left(cotangent, self.pinned)

    @property
    def energy(self) -> Array:
        """`|X|²` of the pinned slice that each output reads, broadcasting to the output."""
        squared = self.pinned**2
        left = self.side == "left"
        return self.op.left_energy(squared) if left else self.op.right_energy(squared)

    @property
    def copies(self) -> Copies:
        """How many outputs read each free entry."""
        return self.op.copies("right" if self.side == "left" else "left")

    def copies_weight(self, weight: Weight) -> Array:
        """The sum of the weights of all copies of each free entry, 1 where there is no copy."""
        total = self.op.right_sum if self.side == "left" else self.op.left_sum
        return _copies_weight(weight, self.copies, total, self.op.output_shape)

    def force(
        self, value: Array, free_weight: Array, target_dev: Array, target_weight: Array
    ) -> tuple[Array, Array]:
        """`e = W (z − value)/(1 + W |X|²/ρ)` and the output `value + |X|² e/ρ` it leads to."""
        gain = self.energy / free_weight
        force = target_weight * (target_dev - value) / (1 + target_weight * gain)
        return force, value + gain * force


class PinnedProjection(NamedTuple):
    """Deviations of the mean of the free copies and of the output; `Σ ρ |copy − mean|²`."""

    free: Float[Array, "*free"]
    output: Float[Array, "*output"]
    spread: Float[Array, ""]


def project_pinned_compact(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    free_dev: Float[Array, "*free"],
    free_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
) -> PinnedProjection:
    """`mean over copies of argmin Σ_j ρ|wⱼ' − wⱼ|² + W (Xⱼ·wⱼ' − zⱼ)²`, the slices `Xⱼ` fixed.

    All copies of an entry are equal on entry. Two products of the operation.

    Arguments:
        op: the bilinear operation.
        side: which operand is pinned, "left" or "right".
        pinned_value: the full value of the pinned operand.
        free_dev: deviation of the free operand.
        free_weight: positive weight of one copy, scalar or broadcasting to the output.
        target_dev: deviation of the target from the reference output.
        target_weight: weight `W`, scalar or broadcasting to the output; 0 where nothing is asked.

    Returns:
        a `PinnedProjection`.
    """
    linear = PinnedBilinear(op, side, pinned_value)
    value = linear.apply(free_dev)
    free_weight = jnp.asarray(free_weight, value.dtype)
    target_weight = jnp.asarray(target_weight, value.dtype)
    force, output = linear.force(value, free_weight, target_dev, target_weight)
    total = linear.copies_weight(free_weight)
    move = linear.transpose(force) / total
    squared = jnp.sum(linear.energy * force**2 / free_weight) - jnp.sum(total * move**2)
    return PinnedProjection(free_dev + move, output, jnp.maximum(squared, 0))


class StructuredProjection(NamedTuple):
    """The copies `common + X·multiplier`, and the output deviation."""

    common: Float[Array, "*free"]
    multiplier: Float[Array, "*output"]
    output: Float[Array, "*output"]


def project_pinned_structured(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    common: Float[Array, "*free"],
    multiplier: Float[Array, "*output"],
    free_weight: Weight,
    target_dev: Float[Array, "*output"],
    target_weight: Weight,
) -> StructuredProjection:
    """`argmin Σ_j ρ|wⱼ' − wⱼ|² + W (Xⱼ·wⱼ' − zⱼ)²` over copies `wⱼ = common + mⱼ Xⱼ`, `Xⱼ` fixed.

    The result has the same form with the same `common`, so that every affine combination of such
    copies (reflections, relaxations, consensus) is stored in one array of the free operand's shape
    and one of the output's. One product of the operation.

    Arguments:
        op: the bilinear operation.
        side: which operand is pinned, "left" or "right".
        pinned_value: the full value of the pinned operand.
        common: the part of the free operand's deviation that all copies share.
        multiplier: each copy's multiple of its pinned slice.
        free_weight: positive weight of one copy, scalar or broadcasting to the output.
        target_dev: deviation of the target from the reference output.
        target_weight: weight `W`, scalar or broadcasting to the output; 0 where nothing is asked.

    Returns:
        a `StructuredProjection`.
    """
    linear = PinnedBilinear(op, side, pinned_value)
    value = linear.apply(common) + linear.energy * multiplier
    free_weight = jnp.asarray(free_weight, value.dtype)
    target_weight = jnp.asarray(target_weight, value.dtype)
    force, output = linear.force(value, free_weight, target_dev, target_weight)
    return StructuredProjection(common, multiplier + force / free_weight, output)


def structured_mean(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    common: Float[Array, "*free"],
    multiplier: Float[Array, "*output"],
    free_weight: Weight = 1.0,
) -> Float[Array, "*free"]:
    """`Σ_j ρⱼ wⱼ / Σ_j ρⱼ` over the copies `wⱼ = common + mⱼ Xⱼ` of each free entry.

    Arguments:
        op, side, pinned_value, common, multiplier: as in `project_pinned_structured`.
        free_weight: the weights; a scalar has no effect.

    Returns:
        the mean, in the shape of the free operand.
    """
    linear = PinnedBilinear(op, side, pinned_value)
    free_weight = jnp.asarray(free_weight, common.dtype)
    return common + linear.transpose(free_weight * multiplier) / linear.copies_weight(free_weight)


def structured_squared_norm(
    op: Bilinear,
    side: Side,
    pinned_value: Float[Array, "*pinned"],
    common: Float[Array, "*free"],
    multiplier: Float[Array, "*output"],
    free_weight: Weight = 1.0,
) -> Float[Array, ""]:
    """`Σ_j ρⱼ |common + mⱼ Xⱼ|²` over all copies of the free operand.

    Arguments:
        op, side, pinned_value, common, multiplier: as in `project_pinned_structured`.
        free_weight: the weights.

    Returns:
        a scalar, at least 0.
    """
    linear = PinnedBilinear(op, side, pinned_value)
    free_weight = jnp.asarray(free_weight, common.dtype)
    shared = linear.copies_weight(free_weight) * (np.asarray(linear.copies) > 0)
    weighted = free_weight * multiplier
    mixed = linear.transpose(weighted)
    squared = jnp.sum(shared * common**2 + 2 * common * mixed)
    return jnp.maximum(squared + jnp.sum(linear.energy * weighted * multiplier), 0)
