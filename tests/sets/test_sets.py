"""Each set against an oracle that shares no formula with it, on hard points.

Of a convex set a point is the nearest one if `<x − y, z> ≤ <x − y, y>` for all `z` of the set, and
the left side is largest at a value that is known: the *support* of the set. Sets that are not
convex are enumerated, or compared with a distance below which no point of them can be.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.isotonic import IsotonicRegression

from pjax import sets
from tests.oracles import PRECISIONS

REGIMES = ("generic", "zeros", "ties", "huge", "tiny", "mixed magnitudes", "inside")
#: Vectors of a regime, their entries, and rows and columns of matrices.
POINTS, LENGTH, ROWS, COLUMNS = 12, 5, 4, 3
MATRIX = np.random.default_rng(3).normal(size=(3, LENGTH))
MATRIX[2] = 2 * MATRIX[0] - MATRIX[1]
VALUES = np.array([1.0, -0.5, 2.5])
LEVELS = (-1.5, -0.5, 0.25, 2.0)


def draw(regime: str, shape: tuple[int, ...]) -> np.ndarray:
    """Points that are representable in float32."""
    rng = np.random.default_rng(REGIMES.index(regime))
    x = rng.normal(size=shape)
    if regime == "zeros":
        x *= rng.integers(0, 2, shape)
        x[0] = 0
    elif regime == "ties":
        x = rng.integers(-2, 3, shape) / 2
    elif regime == "huge":
        x *= 1e30
    elif regime == "tiny":
        x *= 1e-30
    elif regime == "mixed magnitudes":
        x *= 10.0 ** rng.uniform(-6, 6, shape)
    elif regime == "inside":
        x *= 0.1
    return x.astype(np.float32).astype(np.float64)


def violation(name: str, y: np.ndarray) -> float:
    """How far a point is from being in the set, relative to the numbers that decide it."""
    one = CASES[name].one
    if name in ("box", "nonnegative"):
        return float(np.max(np.clip(LOWER[name] - y, 0, None) + np.clip(y - UPPER[name], 0, None)))
    if name == "signs":
        return float(np.max(np.abs(np.abs(y) - 1)))
    if name == "levels":
        return float(np.max(np.min(np.abs(y[..., None] - np.array(LEVELS)), -1)))
    if name == "simplex":
        return max(float(np.max(-y)), abs(float(np.sum(y)) - 2.0))
    if name == "sparse":
        return float(np.sum(y != 0) > 2)
    if name in ("monotone", "decreasing"):
        rise = np.diff(y) if name == "monotone" else -np.diff(y)
        return float(np.max(np.clip(-rise, 0, None)))
    if name == "equalities":
        return float(np.max(np.abs(MATRIX @ y - VALUES) / (1 + np.abs(MATRIX) @ np.abs(y))))
    if name == "low rank":
        s = np.linalg.svd(y, compute_uv=False)
        return float(s[2] / max(s[0], 1e-300))
    if name == "orthogonal":
        return float(np.max(np.abs(y.T @ y - np.eye(COLUMNS))))
    excess = norm(one.norm, y) - one.radius
    return max(excess, 0) if isinstance(one, sets.Ball) else abs(excess)


def norm(kind: object, y: np.ndarray) -> float:
    if isinstance(kind, str):
        s = np.linalg.svd(y, compute_uv=False)
        return float(s[0] if kind == "spectral" else s.sum())
    return float(np.linalg.norm(y, kind))  # pyright: ignore


# The least distance to each set, or how far a point is from the condition of being the nearest.

DUAL = {1: math.inf, 2: 2, math.inf: 1, "spectral": "nuclear", "nuclear": "spectral"}
LOWER = {"box": np.array([-1.0, 0, 0.5, -0.2, -3]), "nonnegative": 0.0}
UPPER = {"box": np.array([1.0, 0, 0.7, 0.1, -1]), "nonnegative": np.inf}


def support(name: str, g: np.ndarray) -> float:
    """`max <g, z>` over a convex set."""
    one = CASES[name].one
    if name == "box":
        return float(np.sum(np.maximum(LOWER["box"] * g, UPPER["box"] * g)))
    if name == "simplex":
        return float(2 * np.max(g))
    return one.radius * norm(DUAL[one.norm], g)


def least_distance(name: str, x: np.ndarray, w: np.ndarray) -> float:
    """Of sets that are enumerated, and of those that another library projects onto."""
    one = CASES[name].one
    n = x.size
    if name == "nonnegative":
        return distance(x, np.where(x > 0, x, 0), w)
    if name in ("signs", "levels"):
        values = (-1.0, 1.0) if name == "signs" else LEVELS
        nearest = np.min(np.abs(x[:, None] - np.array(values)), axis=1)
        return distance(nearest, np.zeros(n), w)
    if name == "sparse":
        kept = [np.isin(np.arange(n), c) for c in itertools.combinations(range(n), 2)]
        return min(distance(x, np.where(k, x, 0), w) for k in kept)
    if name in ("monotone", "decreasing"):
        regression = IsotonicRegression(increasing=name == "monotone")
        return distance(x, regression.fit(np.arange(n), x, w).predict(np.arange(n)), w)
    if name == "equalities":
        # The first two equations, which are independent, by a basis of what they leave free.
        basis = np.linalg.qr(MATRIX[:2].T, mode="complete").Q[:, 2:]
        start = np.linalg.lstsq(MATRIX[:2], VALUES[:2], rcond=None)[0]
        root = np.sqrt(w)[:, None]
        free = np.linalg.lstsq(root * basis, root[:, 0] * (x - start), rcond=None)[0]
        return distance(x, start + basis @ free, w)
    if name == "low rank":
        return float(np.linalg.norm(np.linalg.svd(x, compute_uv=False)[2:]))
    if name == "orthogonal":
        return float(np.linalg.norm(np.linalg.svd(x, compute_uv=False) - 1))
    if isinstance(one.norm, str):
        s = np.linalg.svd(x, compute_uv=False)
        ones = np.ones(s.size)
        return least_on_sphere({"spectral": math.inf, "nuclear": 1}[one.norm], s, ones, one.radius)
    return least_on_sphere(one.norm, x, w, one.radius)


def least_on_sphere(kind: float, x: np.ndarray, w: np.ndarray, radius: float) -> float:
    if kind == 2:
        return abs(float(np.linalg.norm(x)) - radius)
    if kind == 1 and np.sum(np.abs(x)) <= radius:
        # To the plane of each face, from inside; the foot on the nearest one lies on the face.
        faces = itertools.product((-1, 1), repeat=x.size)
        return min(abs(radius - np.dot(s, x)) / math.sqrt(np.sum(1 / w)) for s in faces)
    if kind == 1:
        # Every face by brute force: the weighted simplex of its signs, by bisection.
        sizes, low, high = np.abs(x), 0.0, float(np.max(np.abs(x) * w))
        for _ in range(200):
            middle = (low + high) / 2
            above = np.sum(np.maximum(sizes - middle / w, 0)) > radius
            low, high = (middle, high) if above else (low, middle)
        return distance(sizes, np.maximum(sizes - high / w, 0), w)
    found = []
    for place, side in itertools.product(range(x.size), (-radius, radius)):
        y = np.clip(x, -radius, radius)
        y[place] = side
        found.append(distance(x, y, w))
    return min(found)


def distance(x: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    size = max(float(np.max(np.abs(x - y))), 1e-300)
    return size * math.sqrt(float(np.sum(w * np.square((x - y) / size))))


@dataclass(frozen=True)
class Case:
    one: Any
    #: Whether nearness is shown by the support of the set.
    convex: bool = False
    matrix: bool = False
    #: Whether weights have a closed form.
    weighted: bool = True


CASES = {
    "box": Case(sets.Box(LOWER["box"], UPPER["box"]), convex=True),
    "nonnegative": Case(sets.Nonnegative()),
    "signs": Case(sets.Signs()),
    "levels": Case(sets.Levels(LEVELS)),
    "simplex": Case(sets.Simplex(2.0), convex=True),
    "sparse": Case(sets.Sparse(2)),
    "monotone": Case(sets.Monotone()),
    "decreasing": Case(sets.Monotone(decreasing=True)),
    "equalities": Case(sets.LinearEqualities(MATRIX, VALUES)),
    "low rank": Case(sets.LowRank(2), matrix=True, weighted=False),
    "orthogonal": Case(sets.Orthogonal(), matrix=True, weighted=False),
    **{
        f"{cls.__name__.lower()} {kind}": Case(
            cls(1.5, kind),
            convex=cls is sets.Ball,
            matrix=isinstance(kind, str),
            weighted=kind in (1, math.inf),
        )
        for cls in (sets.Ball, sets.Sphere)
        for kind in DUAL
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_nearest_point_of_each_set(name):
    case = CASES[name]
    shape = (POINTS, ROWS, COLUMNS) if case.matrix else (POINTS, LENGTH)
    xs = np.concatenate([draw(regime, shape) for regime in REGIMES])
    rng = np.random.default_rng(0)
    weights = 10.0 ** rng.uniform(-1, 1, xs.shape).astype(np.float32).astype(np.float64)
    for precision in PRECISIONS:
        with precision.context():
            x, w = (jnp.asarray(a, precision.dtype) for a in (xs, weights))
            project = jax.jit(jax.vmap(case.one.project))
            ones, found = np.ones_like(xs), project(x)
            assert found.dtype == precision.dtype
            again = np.asarray(project(found), np.float64)
            # One by one, and not compiled, the same.
            first = np.asarray(case.one.project(x[0]), np.float64)
            checks = [(np.asarray(found, np.float64), ones)]
            if case.weighted:
                weighted = jax.jit(jax.vmap(case.one.project_weighted))(x, w)
                checks.append((np.asarray(weighted, np.float64), weights))
        rounding = 60 * precision.eps
        scale = np.max(np.abs(xs), axis=tuple(range(1, xs.ndim)))
        assert_close(first, checks[0][0][0], rounding * (1 + scale[0]))
        for row, y in enumerate(again):
            size = np.max(np.abs(checks[0][0][row]))
            assert_close(y, checks[0][0][row], rounding * (1 + size))
        for found, w in checks:
            assert np.all(np.isfinite(found))
            for row, y in enumerate(found):
                size = max(float(np.max(np.abs(y))), 1)
                assert violation(name, y) <= rounding * size, (name, row, y)
                if case.convex:
                    g = w[row] * (xs[row] - y)
                    excess = support(name, g) - float(np.sum(g * y))
                    bound = np.sum(np.abs(g)) * rounding * size
                    bound += np.sum(w[row] * np.abs(xs[row])) * rounding * size
                    assert excess <= bound, (name, row, excess, bound)
                else:
                    least = least_distance(name, xs[row], w[row])
                    floor = rounding * math.sqrt(np.max(w[row])) * (scale[row] + size)
                    assert distance(xs[row], y, w[row]) <= least + floor, (name, row)


def assert_close(a: np.ndarray, b: np.ndarray, tolerance: float) -> None:
    assert np.max(np.abs(a - b), initial=0) <= tolerance


@pytest.mark.parametrize(
    ("one", "oracle"),
    [
        (sets.Simplex(2.0, axis=None), lambda x: optax.projections.projection_simplex(x, 2.0)),
        (sets.Ball(1.5), lambda x: optax.projections.projection_l2_ball(x, 1.5)),
        (sets.Sphere(1.5), lambda x: optax.projections.projection_l2_sphere(x, 1.5)),
        (sets.Ball(1.5, norm=1), lambda x: optax.projections.projection_l1_ball(x, 1.5)),
        (sets.Ball(0.5, norm=math.inf), lambda x: optax.projections.projection_linf_ball(x, 0.5)),
        (sets.Nonnegative(), optax.projections.projection_non_negative),
        (
            sets.LinearEqualities(MATRIX[0], 1.0, axis=None),
            lambda x: optax.projections.projection_hyperplane(x, jnp.asarray(MATRIX[0]), 1.0),
        ),
    ],
)
def test_the_same_as_optax(one, oracle):
    for x in draw("generic", (4, LENGTH)):
        x = jnp.asarray(x, jnp.float32)
        np.testing.assert_allclose(one.project(x), oracle(x), atol=2e-6)


def test_axes_are_rows_columns_or_the_whole_array():
    x = jnp.asarray(draw("generic", (3, 4, 2)), jnp.float32)
    for axis, norms in ((0, 0), (-1, 2), ((0, 2), (0, 2)), (None, None)):
        y = sets.Sphere(2.0, axis=axis).project(x)
        found = jnp.sqrt(jnp.sum(y**2, axis=norms))
        np.testing.assert_allclose(found, jnp.full(found.shape, 2.0), rtol=1e-6)
        # The direction stays.
        np.testing.assert_array_equal(jnp.sign(y), jnp.sign(x))
    kept = sets.Sparse(2, axis=(0, 2)).project(x)
    np.testing.assert_array_equal(jnp.sum(kept != 0, axis=(0, 2)), np.full(4, 2))
    np.testing.assert_array_equal(kept[kept != 0], x[kept != 0])


@pytest.mark.parametrize("name", CASES)
def test_one_entry_no_rows_and_narrow_types(name):
    one = CASES[name].one
    if name not in ("box", "equalities", "sparse", "low rank"):
        shape = (1, 1) if CASES[name].matrix else (1,)
        for value in (0.0, -3.0, 1e30):
            assert np.all(np.isfinite(one.project(jnp.full(shape, value))))
    shape = (0, ROWS, COLUMNS) if CASES[name].matrix else (0, LENGTH)
    assert jax.vmap(one.project)(jnp.zeros(shape)).shape == shape
    x = jnp.ones(shape[1:], jnp.bfloat16)
    assert one.project(x).dtype == jnp.float32
    assert sets.into(one, x).dtype == jnp.bfloat16
    assert float(one.distance(one.project(x))) < 1e-5


def test_numbers_of_a_set_are_leaves():
    calls = 0

    @jax.jit
    def project(one, x):
        nonlocal calls
        calls += 1
        return one.project(x)

    x = jnp.array([3.0, 4.0])
    for radius in (1.0, 2.0):
        np.testing.assert_allclose(
            jnp.linalg.norm(project(sets.Ball(radius), x)), radius, rtol=1e-6
        )
    for total in (5.0, 6.0):
        one = sets.LinearEqualities(jnp.ones(2), jnp.array(total))
        np.testing.assert_allclose(jnp.sum(project(one, x)), total, rtol=1e-6)
    assert calls == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sets.Box(1.0, 0.0), "`lower` is above `upper`: 1.0, 0.0"),
        (lambda: sets.Box(jnp.zeros(3), 1.0).project(jnp.zeros(2)), "does not broadcast"),
        (lambda: sets.Levels((1.0, 1.0)), "ascending"),
        (lambda: sets.Ball(-1.0), "must not be negative"),
        (lambda: sets.Ball(norm=3), "`norm` must be"),
        (lambda: sets.Ball(norm="spectral", axis=0), "leave out `axis`"),
        (lambda: sets.Ball(norm="spectral").project(jnp.zeros(3)), "holds matrices"),
        (lambda: sets.Ball(axis=2).project(jnp.zeros((3, 3))), "has no axes 2"),
        (lambda: sets.Ball(axis=(0, -2)).project(jnp.zeros((3, 3))), "has no axes"),
        (lambda: sets.Sphere().project(jnp.zeros((0,))), "no point without entries"),
        (lambda: sets.Simplex(0.0), "`total` must be positive"),
        (lambda: sets.Simplex().project(jnp.zeros((2, 0))), "no point without entries"),
        (lambda: sets.Sparse(0), "at least 1"),
        (lambda: sets.Sparse(4).project(jnp.zeros(3)), "have 3 entries"),
        (lambda: sets.LowRank(3).project(jnp.zeros((2, 5))), "at most the rank 2"),
        (lambda: sets.LinearEqualities(jnp.ones((2, 3)), jnp.arange(2.0)), "contradict"),
        (lambda: sets.LinearEqualities(jnp.ones(3)).project(jnp.zeros(2)), "has 3 columns"),
        (lambda: sets.LinearEqualities(jnp.ones((2, 3)), jnp.ones(3)), "2 equations"),
    ],
)
def test_errors_say_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_whole_numbers_are_refused():
    with pytest.raises(TypeError, match="floating-point"):
        sets.Nonnegative().project(jnp.arange(3))
