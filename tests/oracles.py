"""Brute-force nearest points in NumPy, and the regimes of points on which projections are tested.

Nothing here shares a formula with the library. Graphs of scalar functions are searched by ternary
search on each of their pieces, linear sets are least-squares problems, maxima are enumerated over
all subsets of entries, and the cross-entropy prox certifies itself by the strong convexity of its
objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from tests.conftest import enable_x64

Array = Any
#: Left end, right end, slope, intercept.
PieceTuple = tuple[float, float, float, float]

REGIMES = (
    "generic",
    "zeros",
    "equal and opposite",
    "huge",
    "tiny",
    "mixed magnitudes",
    "ties",
    "wide weights",
    "close to the reference",
    "at the reference",
)
POINTS = 1000


def on_many_points(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test of `regime` and `seed`, `POINTS` points each, on every regime and on more draws.

    There is nothing to shrink: a regime and a seed say it all.
    """
    test = given(regime=st.sampled_from(REGIMES), seed=st.integers(0, 2**32 - 1))(test)
    for regime in REGIMES:
        test = example(regime=regime, seed=1)(test)
    phases = (Phase.explicit, Phase.generate)
    return settings(max_examples=4, deadline=None, derandomize=True, phases=phases)(test)


@dataclass(frozen=True)
class Precision:
    """A type, its relative tolerance on distances, and its unit of rounding."""

    dtype: type
    relative: float
    eps: float

    def context(self) -> Any:
        """JAX has this type inside."""
        return enable_x64() if self.dtype == np.float64 else nullcontext()


# A distance is flat at its minimum: to bound points it must be bounded much more tightly.
PRECISIONS = (Precision(np.float32, 1e-6, 1.2e-7), Precision(np.float64, 1e-10, 2.3e-16))


@dataclass(frozen=True)
class Points:
    """Inputs of a projection, all representable in float32; arrays of float64."""

    reference: Array
    deviation: Array
    target: Array
    weight: Array
    target_weight: Array


def draw(regime: str, seed: int, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Points:
    """Random references, deviations and weights of shape `inputs`, targets of shape `outputs`."""
    rng = np.random.default_rng(seed)

    def some(shape: tuple[int, ...], values: Any) -> Array:
        return rng.choice(np.asarray(values), size=shape)

    def log_uniform(shape: tuple[int, ...], span: float) -> Array:
        return 10.0 ** rng.uniform(-span, span, shape)

    reference, deviation = rng.normal(size=inputs), rng.normal(size=inputs)
    target = rng.normal(size=outputs)
    weight, target_weight = log_uniform(inputs, 1), log_uniform(outputs, 1)
    if regime == "zeros":
        reference *= some(inputs, [0, 1])
        deviation *= some(inputs, [0, 1])
        target *= some(outputs, [0, 1])
    elif regime == "equal and opposite":
        deviation = np.abs(deviation.flat[0]) * some(inputs, [-1, 1])
        reference = np.abs(deviation) * some(inputs, [-1, 0, 1])
        target = np.abs(deviation.flat[0]) * some(outputs, [-2, -1, 1, 2])
    elif regime == "huge":
        reference, deviation, target = 1e6 * reference, 1e6 * deviation, 1e6 * target
    elif regime == "tiny":
        reference, deviation, target = 1e-6 * reference, 1e-6 * deviation, 1e-6 * target
    elif regime == "mixed magnitudes":
        reference *= log_uniform(inputs, 6)
        deviation *= log_uniform(inputs, 6)
        target *= log_uniform(outputs, 6)
    elif regime == "ties":
        grid = np.arange(-4, 5) / 2
        reference, deviation, target = some(inputs, grid), some(inputs, grid), some(outputs, grid)
        weight, target_weight = some(inputs, [1, 1, 2]), some(outputs, [0, 1, 1, 2])
    elif regime == "wide weights":
        weight, target_weight = log_uniform(inputs, 6), log_uniform(outputs, 6)
    elif regime == "close to the reference":
        deviation *= 1e-7
        target *= 1e-7
    elif regime == "at the reference":
        deviation *= 0
        target *= 0
    target_weight = target_weight * some(outputs, [0, 1, 1, 1, 1])
    arrays = (reference, deviation, target, weight, target_weight)
    return Points(*(array.astype(np.float32).astype(np.float64) for array in arrays))


def assert_no_farther(distance: Array, nearest: Array, floor: Array, relative: float) -> None:
    """`distance ≤ (1 + relative)·nearest + floor` everywhere; shows the worst point."""
    excess = distance - (1 + relative) * nearest - floor
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (
        f"point {worst}: distance {distance[worst]:.9g}, but {nearest[worst]:.9g} is possible "
        f"(floor {np.broadcast_to(floor, excess.shape)[worst]:.3g}); "
        f"{np.mean(excess > 0):.2%} of all points"
    )


def assert_small(difference: Array, tolerance: Array) -> None:
    """`|difference| ≤ tolerance` everywhere."""
    excess = np.abs(difference) - tolerance
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (
        f"point {worst}: |{difference[worst]:.9g}| > "
        f"{np.broadcast_to(tolerance, excess.shape)[worst]:.3g}; {np.mean(excess > 0):.2%}"
    )


# --- Graphs of scalar functions ------------------------------------------------------------------


def ternary_search(cost: Callable[[Array], Array], lower: Array, upper: Array) -> Array:
    """The minimiser of a convex `cost` on `[lower, upper]`, elementwise."""
    ends = lower, upper
    for _ in range(45):
        third = (upper - lower) / 3
        left, right = lower + third, upper - third
        go_left = cost(left) <= cost(right)
        lower, upper = np.where(go_left, lower, left), np.where(go_left, right, upper)
    found = lower
    for end in ends:
        found = np.where(cost(end) <= cost(found), end, found)
    return found


def nearest_on_pieces(
    pieces: Sequence[PieceTuple], points: Points, output_reference: Array
) -> Array:
    """The distance from `(dx, dz)` to the union of the pieces, each one a convex problem."""
    nearest = np.full(points.deviation.shape, np.inf)
    for lower, upper, slope, intercept in pieces:
        height = slope * points.reference + intercept - output_reference

        def cost(move: Array, slope: float = slope, height: Array = height) -> Array:
            output = height + slope * (points.deviation + move)
            return points.weight * move**2 + points.target_weight * (output - points.target) ** 2

        # What is farther than some point of the piece is not the nearest.
        low = lower - points.reference - points.deviation
        high = upper - points.reference - points.deviation
        start = np.clip(0, low, high)
        radius = np.sqrt(cost(start) / points.weight) * (1 + 1e-9)
        low, high = np.maximum(low, -radius), np.minimum(high, radius)
        # At its own start the search must not lose to rounding.
        found = ternary_search(cost, np.minimum(low, start), np.maximum(high, start))
        nearest = np.minimum(nearest, np.minimum(cost(found), cost(start)))
    return np.sqrt(nearest)


def distance_to_pieces(
    pieces: Sequence[PieceTuple], x: Array, y: Array, horizontal: Array, vertical: Array
) -> Array:
    """How far `(x, y)` is from the closed graph, in units of tolerances along both axes."""
    best = np.full(np.shape(x), np.inf)
    for lower, upper, slope, intercept in pieces:
        outside = np.maximum(np.maximum(lower - x, x - upper), 0)
        inside = np.clip(x, lower, upper)
        off = np.abs(y - (slope * inside + intercept))
        best = np.minimum(best, np.maximum(outside / horizontal, off / vertical))
    return best


# --- Linear sets ---------------------------------------------------------------------------------


def least_squares(matrix: Array, right: Array) -> Array:
    """`argmin |A x − b|` for a stack of tall matrices of full column rank, by Householder QR."""
    q, r = np.linalg.qr(matrix)
    return np.linalg.solve(r, (np.swapaxes(q, -1, -2) @ right[..., None]))[..., 0]


def nearest_on_plane(matrix: Array, points: Points) -> Array:
    """`argmin Σ ρ (x − dx)² + Σ W (A x − dz)²` for a stack of points, with one matrix `A`."""
    root, target_root = np.sqrt(points.weight), np.sqrt(points.target_weight)
    rows = [root[..., None] * np.eye(matrix.shape[1]), target_root[..., None] * matrix]
    right = [root * points.deviation, target_root * points.target]
    return least_squares(np.concatenate(rows, -2), np.concatenate(right, -1))


def nearest_on_line(matrix: Array, points: Points) -> Array:
    """`argmin Σ ρ (x − dx)²` on `{A x = 0}` for a stack of points and of one-row matrices `A`."""
    # An orthonormal basis of the null space of A/√ρ, from its full QR decomposition.
    root = np.sqrt(points.weight)
    scaled = np.broadcast_to(matrix, points.deviation.shape) / root
    basis = np.linalg.qr(scaled[..., None], mode="complete").Q[..., 1:]
    coordinates = np.swapaxes(basis, -1, -2) @ (root * points.deviation)[..., None]
    return (basis @ coordinates)[..., 0] / root


# --- Maxima --------------------------------------------------------------------------------------


def nearest_maximum(gap: Array, points: Points) -> Array:
    """The distance to `{y = max x}`, over all subsets of entries that share the maximum."""
    value = gap + points.deviation
    finite = np.isfinite(value)
    nearest = np.full(points.target.shape, np.inf)
    for chosen in product((False, True), repeat=value.shape[-1]):
        inside = np.array(chosen)
        if not inside.any():
            continue
        share = np.where(inside & finite, points.weight, 0)
        total = np.sum(share, -1) + points.target_weight
        height = np.where(finite, value, 0)
        level = np.sum(share * height, -1) + points.target_weight * points.target
        with np.errstate(invalid="ignore", divide="ignore"):
            level = level / total
        level = np.maximum(level, np.max(np.where(inside, -np.inf, value), -1))
        with np.errstate(invalid="ignore"):
            cost = np.sum(np.where(inside, points.weight * (level[..., None] - value) ** 2, 0), -1)
            cost = cost + points.target_weight * (level - points.target) ** 2
        nearest = np.fmin(nearest, cost)
    return np.sqrt(nearest)


# --- Losses --------------------------------------------------------------------------------------


def cross_entropy_objective(x: Array, v: Array, labels: Array, step: Array) -> Array:
    """`½|x − v|² + λ CE(x, y)` of rows."""
    top = np.max(x, axis=-1, keepdims=True)
    logsumexp = np.log(np.sum(np.exp(x - top), axis=-1)) + top[..., 0]
    entropy = np.sum(labels, -1) * logsumexp - np.sum(labels * x, axis=-1)
    return np.sum((x - v) ** 2, axis=-1) / 2 + step * entropy


def cross_entropy_prox_error(move: Array, v: Array, labels: Array, step: Array) -> Array:
    """How far `v + move` is from `argmin ½|x − v|² + λ CE(x, y)`, in extended precision.

    That is the size of a Newton step there, and no more than the gradient: the objective is
    1-strongly convex. Exact as the size goes to 0, and no small error passes for a large one.
    """
    v, move, labels, step = (np.asarray(a, np.longdouble) for a in (v, move, labels, step))
    labels_mass = np.sum(labels, -1, keepdims=True)
    scale = step[..., None] * labels_mass
    x = v + move
    exp = np.exp(x - np.max(x, axis=-1, keepdims=True))
    p = exp / np.sum(exp, axis=-1, keepdims=True)
    gradient = move + scale * p - step[..., None] * labels
    # The softmax and the labels sum to the same, so the gradient sums to the sum of the moves. For
    # the likeliest class this is no difference of two numbers near 1.
    likeliest = np.arange(x.shape[-1]) == np.argmax(x, -1)[..., None]
    others = np.sum(np.where(likeliest, 0, gradient), -1, keepdims=True)
    gradient = np.where(likeliest, np.sum(move, -1, keepdims=True) - others, gradient)
    # Sherman–Morrison for I + λ m (diag p − p pᵀ); its denominator is Σ p/(1 + λ m p).
    first, second = gradient / (1 + scale * p), p / (1 + scale * p)
    coupling = scale * np.sum(p * first, -1, keepdims=True) / np.sum(second, -1, keepdims=True)
    newton = first + second * coupling
    size, bound = (np.sqrt(np.sum(g**2, -1)) for g in (newton, gradient))
    return np.asarray(np.minimum(size, bound), np.float64)
