"""Brute-force nearest points of scalar products, in NumPy and float64.

Written from the Lagrange conditions, not from the formulas of the library. With `X = √ρx x`,
`V = √ρw w`, `P = X + V`, `M = X − V`, a stationary point has `P' = P/(1−t)`, `M' = M/(1+t)` and
`σ t = W (z − x'·w')`, `σ = √(ρx ρw)`, `x·w = (|P|² − |M|²)/(4σ)`. All real `t` are searched.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

REGIMES = (
    "moderate",
    "wide",
    "zeros",
    "opposed",
    "nearly opposed",
    "tiny deviations",
    "far targets",
    "nothing asked",
)


@dataclass
class ScalarProducts:
    """A batch of independent scalar products: slices `[points, length]`, the rest `[points]`."""

    left_ref: Floats
    right_ref: Floats
    left_dev: Floats
    right_dev: Floats
    left_weight: Floats
    right_weight: Floats
    target_dev: Floats
    target_weight: Floats

    def rounded(self, dtype: type) -> ScalarProducts:
        """The same values after rounding to `dtype`."""
        values = (getattr(self, field.name).astype(dtype) for field in fields(self))
        return ScalarProducts(*(value.astype(np.float64) for value in values))

    @property
    def left(self) -> Floats:
        return self.left_ref + self.left_dev

    @property
    def right(self) -> Floats:
        return self.right_ref + self.right_dev

    def output_change(self, left_dev: Floats, right_dev: Floats) -> Floats:
        """How far the product moves from that of the references, without cancellation."""
        right = self.right_ref + right_dev
        return np.sum(self.left_ref * right_dev + left_dev * right, axis=-1)

    def objective(self, left_dev: Floats, right_dev: Floats) -> Floats:
        """`ρx |x' − x|² + ρw |w' − w|² + W (x'·w' − z)²` at a feasible point."""
        moved = self.left_weight * np.sum((left_dev - self.left_dev) ** 2, axis=-1)
        moved += self.right_weight * np.sum((right_dev - self.right_dev) ** 2, axis=-1)
        missed = self.output_change(left_dev, right_dev) - self.target_dev
        return moved + self.target_weight * missed**2


def draw_scalar_products(regime: str, seed: int, points: int, length: int) -> ScalarProducts:
    """Random scalar products of one of the `REGIMES`."""
    random = np.random.default_rng(seed)

    def scale(low: float, high: float) -> Floats:
        return 10.0 ** random.uniform(low, high, points)

    slices = (points, length)
    left, right = random.normal(size=slices), random.normal(size=slices)
    left_weight, right_weight, target_weight = scale(-1, 1), scale(-1, 1), scale(-1, 1)
    target = random.normal(size=points) * scale(-2, 1)
    share = random.uniform(-1, 1, (4, points, 1))
    if regime == "wide":
        left, right = left * scale(-6, 6)[:, None], right * scale(-6, 6)[:, None]
        target = random.normal(size=points) * scale(-6, 6)
        left_weight, right_weight, target_weight = scale(-6, 6), scale(-6, 6), scale(-6, 6)
    elif regime == "zeros":
        kind = random.integers(0, 4, points)
        left[kind % 2 == 0] = 0
        right[kind >= 2] = 0
        target *= random.integers(0, 2, points) * scale(0, 3)
    elif regime in ("opposed", "nearly opposed"):
        sign = random.choice((-1.0, 1.0), points)
        right = left * sign[:, None]
        # Weights whose ratio is a power of four, so that the operands are opposed in float32 too.
        left_weight = 2.0 ** random.integers(-4, 4, points)
        right_weight = left_weight * 4.0 ** random.integers(-2, 3, points)
        right *= np.sqrt(left_weight / right_weight)[:, None]
        target = random.normal(size=points) * scale(-1, 3)
        if regime == "nearly opposed":
            right += right * random.normal(size=slices) * scale(-6, -1)[:, None]
    elif regime == "far targets":
        target, target_weight = target * scale(2, 6), scale(-3, 3)
    elif regime == "nothing asked":
        target_weight[random.random(points) < 0.5] = 0

    if regime == "tiny deviations":
        tiny = scale(-28, -6)[:, None]
        left_dev, right_dev = share[0] * left * tiny, share[1] * right * tiny
        target_dev = target * tiny[:, 0]
        return ScalarProducts(
            left,
            right,
            left_dev,
            right_dev,
            left_weight,
            right_weight,
            target_dev,
            target_weight,
        )
    if regime in ("opposed", "zeros"):
        share = np.sign(share) / 2
    left_ref, right_ref = left * share[0], right * share[1]
    left_dev, right_dev = left - left_ref, right - right_ref
    target_dev = target - np.sum(left_ref * right_ref, axis=-1)
    return ScalarProducts(
        left_ref,
        right_ref,
        left_dev,
        right_dev,
        left_weight,
        right_weight,
        target_dev,
        target_weight,
    )


def least_objective(problem: ScalarProducts) -> Floats:
    """The least objective over all stationary points of each scalar product."""
    x = np.sqrt(problem.left_weight)[:, None] * problem.left
    w = np.sqrt(problem.right_weight)[:, None] * problem.right
    residual = problem.target_dev - problem.output_change(problem.left_dev, problem.right_dev)
    sigma = np.sqrt(problem.left_weight * problem.right_weight)
    plus, minus = np.sum((x + w) ** 2, axis=-1), np.sum((x - w) ** 2, axis=-1)
    best = problem.target_weight * residual**2  # staying is feasible
    for sign in (1, -1):  # t and -t exchange the roles of P and M
        near, far = (plus, minus) if sign > 0 else (minus, plus)
        _improve(best, near, far, sign * residual, sigma, problem.target_weight)
    return best


def _rise(near: Floats, far: Floats, t: Floats, u: Floats) -> Floats:
    """`σ (x'·w' − x·w)` at the stationary point of `t`, with `u = 1 − t`."""
    return (near * t * (1 + u) / u / u + far * t * (2 + t) / (1 + t) ** 2) / 4


def _below(theta: Floats) -> tuple[Floats, Floats]:
    """`t` in (0, 1) and `1 - t`, both to full precision."""
    return 1 / (1 + np.exp(-theta)), 1 / (1 + np.exp(theta))


def _above(theta: Floats) -> tuple[Floats, Floats]:
    """`t` in (1, ∞) and `1 - t`, both to full precision."""
    return 1 + np.exp(theta), -np.exp(theta)


@np.errstate(all="ignore")
def _improve(
    best: Floats, near: Floats, far: Floats, residual: Floats, sigma: Floats, weight: Floats
) -> None:
    """Lower `best` to the least objective over every `t > 0` with `σ t = W (residual − rise/σ)`."""
    # At t = 1 the length of P' is free, and fixed by the target alone.
    length = np.sqrt(near + 4 * sigma * (residual - sigma / weight) - 0.75 * far)
    moved = ((length - np.sqrt(near)) ** 2 + far / 4) / 2
    np.fmin(best, moved + sigma**2 / weight, out=best)

    grid = np.concatenate([np.linspace(-90, 90, 181), [350.0]])
    for branch in (_below, _above):

        def gap(theta, points, branch=branch):
            t, u = branch(theta)
            rise = _rise(near[points], far[points], t, u)
            return sigma[points] * t - weight[points] * (residual[points] - rise / sigma[points])

        signs = np.sign(gap(grid[:, None], np.arange(near.size)))
        cells, points = np.nonzero(signs[1:] != signs[:-1])
        low, high, start = grid[cells], grid[cells + 1], signs[cells, points]
        for _ in range(60):
            middle = (low + high) / 2
            same = np.sign(gap(middle, points)) == start
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        t, u = branch((low + high) / 2)
        moved = (near[points] * (t / u) ** 2 + far[points] * (t / (1 + t)) ** 2) / 2
        missed = residual[points] - _rise(near[points], far[points], t, u) / sigma[points]
        np.fmin.at(best, points, moved + weight[points] * missed**2)


def root_of_multiplier_equation(alpha: Floats, beta: Floats, g: Floats) -> tuple[Floats, Floats]:
    """The root `t` for `g > 0` of `t + t [α (2−t)/(1−t)² + β (2+t)/(1+t)²]/2 = g`, and `1 − t`."""
    low, high = np.full(g.shape, -700.0), np.full(g.shape, 700.0)
    with np.errstate(over="ignore"):
        for _ in range(64):
            middle = (low + high) / 2
            t, u = _below(middle)
            above = t * (1 + alpha * (1 + u) / u / u / 2 + beta * (2 + t) / (1 + t) ** 2 / 2) > g
            low, high = np.where(above, low, middle), np.where(above, middle, high)
    return _below((low + high) / 2)
