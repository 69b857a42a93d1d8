from __future__ import annotations

import functools
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.projections.linear import affine, distribute, forward, scalar_weight
from pjax.projections.piecewise import RELU, piecewise
from tests.oracles import (
    POINTS,
    PRECISIONS,
    assert_no_farther,
    assert_small,
    draw,
    nearest_on_line,
    nearest_on_plane,
    on_many_points,
)


@dataclass(frozen=True, eq=False)
class Case:
    """A sum of operands; with few outputs, so that its matrix is small."""

    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, ...], ...]
    coefficients: tuple
    outputs: tuple[int, ...]
    #: The shape of the weights of each operand, broadcastable to it; the weights are drawn.
    weights: tuple[tuple[int, ...], ...]
    matrix: np.ndarray = field(init=False)

    def __post_init__(self):
        size = sum(int(np.prod(shape)) for shape in self.shapes)
        columns = []
        for unit in np.eye(size):
            value = np.zeros(self.outputs)
            terms = zip(self.split(unit), self.coefficients, self.axes, strict=True)
            for operand, coefficient, axes in terms:
                value = value + np.sum(coefficient * operand, axis=axes)
            columns.append(value.ravel())
        object.__setattr__(self, "matrix", np.stack(columns, -1))

    def split(self, flat, shapes=None):
        """The operands out of the last axis."""
        shapes = shapes or self.shapes
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        parts = np.split(flat, ends, axis=-1)
        return [p.reshape((*p.shape[:-1], *s)) for p, s in zip(parts, shapes, strict=True)]


_rng = np.random.default_rng(5)
VECTOR, TABLE = _rng.normal(size=3), _rng.normal(size=(2, 3))
CASES = {
    "add": Case(((3,), (3,)), ((), ()), (1.0, 1.0), (3,), ((), ())),
    "subtract and scale": Case(
        ((3,), (3,), (3,)), ((), (), ()), (1.0, -2.5, VECTOR), (3,), ((3,), (), (3,))
    ),
    "sum": Case(((2, 3),), ((0, 1),), (1.0,), (), ((),)),
    "mean of rows": Case(((3, 2),), ((-1,),), (0.5,), (3,), ((3, 1),)),
    "sums and a shift": Case(
        ((2, 3, 2), (3,), (2, 3)),
        ((0, 2), (), (0,)),
        (VECTOR[:, None], -1.0, TABLE),
        (3,),
        ((2, 1, 2), (3,), (1, 3)),
    ),
    "a scalar": Case(((),), ((),), (3.0,), (), ((),)),
    "a coefficient of 0": Case(((3,), (3,)), ((), ()), (0.0, 1.0), (3,), ((), (3,))),
}


@functools.cache
def compiled(name):
    case = CASES[name]

    def project(deviations, weights, target, target_weight):
        return affine(deviations, case.coefficients, case.axes, weights, target, target_weight)

    return jax.jit(jax.vmap(project))


@pytest.mark.parametrize("name", CASES)
@on_many_points
def test_affine_is_the_nearest_point(name, regime, seed):
    case = CASES[name]
    together = compiled(name)
    size, outputs = case.matrix.shape[1], case.matrix.shape[0]
    count = -(-POINTS // outputs)
    points = draw(regime, seed, (count, size), (count, outputs))
    # Weights of the case's own shapes: what is drawn at its first entries, broadcast.
    weights = []
    for full, shape in zip(case.split(points.weight), case.weights, strict=True):
        index = tuple(slice(0, n) for n in (1,) * (full.ndim - 1 - len(shape)) + shape)
        weights.append(full[(slice(None), *index)].reshape(count, *shape))
    points.weight[:] = np.concatenate(
        [
            np.broadcast_to(w.reshape(count, *(1,) * (len(s) + 1 - w.ndim), *w.shape[1:]),
                            (count, *s)).reshape(count, -1)
            for w, s in zip(weights, case.shapes, strict=True)
        ],
        axis=-1,
    )  # fmt: skip
    nearest_x = nearest_on_plane(case.matrix, points)
    root, target_root = np.sqrt(points.weight), np.sqrt(points.target_weight)

    def distance(x, y):
        moves = root * (x - points.deviation)
        misses = target_root * (y - points.target)
        return np.sqrt(np.sum(moves**2, -1) + np.sum(misses**2, -1))

    nearest = distance(nearest_x, nearest_x @ case.matrix.T)
    gain = np.abs(case.matrix)

    for precision in PRECISIONS:
        with precision.context():
            arrays = jax.tree.map(
                lambda a: jnp.asarray(a, precision.dtype),  # noqa: B023
                (
                    case.split(points.deviation),
                    weights,
                    points.target.reshape(count, *case.outputs),
                    points.target_weight.reshape(count, *case.outputs),
                ),
            )
            moved, output = together(*arrays)
            again, output_again = together(moved, arrays[1], output, arrays[3])
        assert output.dtype == precision.dtype

        def flat(arrays):
            parts = [np.asarray(a, np.float64).reshape(count, -1) for a in arrays]
            return np.concatenate(parts, -1)

        x, y = flat(moved), flat([output])
        assert np.isfinite(x).all()
        assert np.isfinite(y).all()
        eps = 32 * precision.eps
        # Rounding is relative to what an output sums up.
        x_size = np.abs(points.deviation) + np.abs(x)
        y_size = np.abs(points.target) + np.abs(y) + x_size @ gain.T
        assert_small(x @ case.matrix.T - y, eps * y_size)
        # ... and comes back to the inputs through the gain, in the metric.
        floor = eps * np.sqrt(
            np.sum((root * x_size) ** 2, -1) + np.sum((target_root * y_size) ** 2, -1)
        )
        assert_no_farther(distance(x, y), nearest, floor, precision.relative)
        assert_small(flat([output_again]) - y, 4 * eps * y_size)
        back = np.abs(y_size) @ (gain / (gain**2).sum(-1, keepdims=True).clip(1e-9))
        assert_small(flat(again) - x, 4 * eps * (x_size + back))
        if regime == "at the reference":
            np.testing.assert_array_equal(x, 0)
            np.testing.assert_array_equal(y, 0)


SUM = Case(((3,), (3, 2)), ((), (1,)), (VECTOR, -0.5), (3,), ((3,), (3, 2)))


@jax.jit
@jax.vmap
def project_sum_relu(reference, deviations, weights, target, target_weight):
    terms = (SUM.coefficients, SUM.axes)
    inner = forward(deviations, *terms)
    shapes = [deviation.shape for deviation in deviations]
    weight = scalar_weight(*terms, weights, inner.shape, shapes)
    moved, output = piecewise(
        RELU, reference, jnp.maximum(reference, 0), inner, weight, target, target_weight
    )
    return distribute(deviations, *terms, weights, moved - inner), output


@on_many_points
def test_sum_relu_is_the_nearest_point(regime, seed):
    """`y = max(Σ c x, 0)` against all candidates: stay, the kink, and the active branch."""
    count = POINTS // 3
    points = draw(regime, seed, (count, 9), (count, 3))
    # Every output has operands of its own: treat it as one point with three operands.
    owner = [np.nonzero(row)[0] for row in SUM.matrix]
    offsets = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    offsets[::2] = 0  # references at the kink
    offsets = offsets * np.abs(points.target)
    root, target_root = np.sqrt(points.weight), np.sqrt(points.target_weight)
    for precision in PRECISIONS:
        with precision.context():
            arrays = jax.tree.map(
                lambda a: jnp.asarray(a, precision.dtype),  # noqa: B023
                (
                    offsets,
                    SUM.split(points.deviation),
                    SUM.split(points.weight),
                    points.target,
                    points.target_weight,
                ),
            )
            moved, output = project_sum_relu(*arrays)
        x = np.concatenate([np.asarray(a, np.float64).reshape(count, -1) for a in moved], -1)
        y = np.asarray(output, np.float64)
        assert np.isfinite(x).all()
        for row, columns in enumerate(owner):
            reference = np.asarray(arrays[0], np.float64)[:, row]
            base = np.maximum(reference, 0)
            part = type(points)(
                reference,
                points.deviation[:, columns],
                points.target[:, [row]] + base[:, None] - reference[:, None],
                points.weight[:, columns],
                points.target_weight[:, [row]],
            )
            matrix = SUM.matrix[[row]][:, columns]
            miss = target_root[:, row]

            def distance(x, y):
                moves = root[:, columns] * (x - part.deviation)  # noqa: B023
                return np.sqrt(
                    np.sum(moves**2, -1) + (miss * (y - points.target[:, row])) ** 2  # noqa: B023
                )

            # The kink, `Σ c dx = −u_ref`, by a shift of the inputs to the plane through 0.
            shift = -reference[:, None] * matrix / np.sum(matrix**2)
            centred = type(points)(
                reference, part.deviation - shift, part.target, part.weight, part.target_weight
            )
            kink = nearest_on_line(matrix, centred) + shift
            active = nearest_on_plane(matrix, part)
            stays = part.deviation @ matrix[0] + reference
            grows = active @ matrix[0] + reference
            scale = np.abs(part.deviation) @ np.abs(matrix[0]) + np.abs(reference)
            nearest = distance(kink, -base)
            nearest = np.fmin(
                nearest, np.where(stays <= 0, distance(part.deviation, -base), np.inf)
            )
            nearest = np.fmin(nearest, np.where(grows >= 0, distance(active, grows - base), np.inf))
            mine, out = x[:, columns], y[:, row]
            size = np.abs(mine) @ np.abs(matrix[0]) + scale + np.abs(points.target[:, row])
            eps = 32 * precision.eps
            value = mine @ matrix[0] + reference
            assert_small(np.maximum(value, 0) - base - out, eps * size)
            size_x = np.abs(mine) + np.abs(part.deviation)
            floor = eps * (miss * size + np.sqrt(np.sum((root[:, columns] * size_x) ** 2, -1)))
            # Landing at the kink to rounding moves the operands by the gain of their sum.
            gain = np.sqrt(np.sum(matrix**2 / part.weight, -1))
            floor = floor + eps * size / gain
            assert_no_farther(distance(mine, out), nearest, floor, precision.relative)


def test_one_variable_weighs_what_its_cheapest_move_costs():
    # Two equal operands of weight 3 share a move: u costs half of either.
    np.testing.assert_allclose(scalar_weight((1, 1), ((), ()), (3.0, 3.0), (4,)), 1.5)
    weight = scalar_weight((0.5,), ((0, 1),), (2.0,), (), [(3, 4)])
    np.testing.assert_allclose(weight, 1 / (12 * 0.25 / 2))
    assert np.isfinite(scalar_weight((0.0,), ((),), (2.0,), ()))
    with pytest.raises(ValueError, match="needs the `shapes`"):
        scalar_weight((1.0,), ((0,),), (2.0,), ())


def test_a_change_is_distributed_by_weight():
    x, y = jnp.ones(2), jnp.zeros((2, 3))
    moved, rows = distribute((x, y), (2.0, 1.0), ((), (1,)), (1.0, 0.5), jnp.array([1.0, 0]))
    np.testing.assert_allclose(moved, [1.2, 1])
    np.testing.assert_allclose(rows, [[0.2] * 3, [0] * 3])
    total = forward((moved, rows), (2.0, 1.0), ((), (1,)))
    np.testing.assert_allclose(total, [3, 2], rtol=1e-6)
