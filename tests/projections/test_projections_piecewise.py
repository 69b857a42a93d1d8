from __future__ import annotations

import functools
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pjax.projections.piecewise import RELU, Piece, PiecewiseLinear, piecewise
from tests.conftest import enable_x64
from tests.oracles import (
    POINTS,
    PRECISIONS,
    assert_no_farther,
    assert_small,
    distance_to_pieces,
    draw,
    nearest_on_pieces,
    on_many_points,
)

X = PiecewiseLinear.identity()


def number(value):
    return PiecewiseLinear.constant(value)


# Each function as the algebra builds it, its program, and its closed graph written by hand.
FUNCTIONS = {
    "relu": (
        RELU,
        lambda x: np.maximum(x, 0),
        [(-np.inf, 0, 0, 0), (0, np.inf, 1, 0)],
    ),
    "leaky relu": (
        X.compare(">=", number(0)).where(X.scale(0.125), X),
        lambda x: np.where(x >= 0, x, 0.125 * x),
        [(-np.inf, 0, 0.125, 0), (0, np.inf, 1, 0)],
    ),
    "abs": (
        X.absolute(),
        np.abs,
        [(-np.inf, 0, -1, 0), (0, np.inf, 1, 0)],
    ),
    "clip": (
        X.maximum(number(-1)).minimum(number(0.5)),
        lambda x: np.clip(x, -1, 0.5),
        [(-np.inf, -1, 0, -1), (-1, 0.5, 1, 0), (0.5, np.inf, 0, 0.5)],
    ),
    "sign": (
        X.sign(),
        np.sign,
        [(-np.inf, 0, 0, -1), (0, np.inf, 0, 1)],
    ),
    "step": (
        X.compare(">", number(0)),
        lambda x: np.where(x > 0, 1.0, 0.0),
        [(-np.inf, 0, 0, 0), (0, np.inf, 0, 1)],
    ),
    "hard shrink": (
        X.absolute().compare(">", number(1)).multiply(X),
        lambda x: np.where(np.abs(x) > 1, x, 0.0),
        [(-np.inf, -1, 1, 0), (-1, 1, 0, 0), (1, np.inf, 1, 0)],
    ),
    "sawtooth": (
        X.compare("<", number(-2)).where(
            X.compare("<", number(1)).where(X.scale(-0.5).add(number(3)), X.scale(2)),
            X.negate(),
        ),
        lambda x: np.where(x < -2, -x, np.where(x < 1, 2 * x, 3 - 0.5 * x)),
        [(-np.inf, -2, -1, 0), (-2, 1, 2, 0), (1, np.inf, -0.5, 3)],
    ),
    "hard sigmoid": (
        X.scale(1 / 6).add(number(0.5)).maximum(number(0)).minimum(number(1)),
        lambda x: np.clip(x / 6 + 0.5, 0, 1),
        [(-np.inf, -3, 0, 0), (-3, 3, 1 / 6, 0.5), (3, np.inf, 0, 1)],
    ),
    "constant": (number(2), lambda x: 2.0 + 0 * x, [(-np.inf, np.inf, 0, 2)]),
}


@functools.cache
def compiled(name):
    return jax.jit(functools.partial(piecewise, FUNCTIONS[name][0]))


@pytest.mark.parametrize("name", FUNCTIONS)
@on_many_points
def test_piecewise_is_the_nearest_point(name, regime, seed):
    _, program, pieces = FUNCTIONS[name]
    project = compiled(name)
    points = draw(regime, seed, (POINTS,), (POINTS,))
    reference, deviation, target = points.reference, points.deviation, points.target
    if regime == "close to the reference":
        # A third of the references within a few deviations of a kink.
        kinks = np.array([piece[0] for piece in pieces[1:]] or [0.0])
        near = np.random.default_rng(seed).choice(kinks, POINTS) + 3 * np.roll(deviation, 1)
        reference[::3] = near.astype(np.float32)[::3]
    output_reference = program(reference)
    nearest = nearest_on_pieces(pieces, points, output_reference)
    root, target_root = np.sqrt(points.weight), np.sqrt(points.target_weight)
    gain = max(1.0, max(abs(piece[2]) for piece in pieces))
    # The arithmetic of this test itself is in float64, on full values.
    own = 1e-15 * (np.abs(reference) + np.abs(output_reference) + 1)

    for precision in PRECISIONS:
        eps = precision.eps
        with precision.context():
            point = (deviation, points.weight, target, points.target_weight)
            arrays = [
                jnp.asarray(a, precision.dtype) for a in (reference, output_reference, *point)
            ]
            moved, output = project(*arrays)
            again, output_again = project(*arrays[:2], moved, arrays[3], output, arrays[5])
        assert moved.dtype == output.dtype == precision.dtype
        moved, output, again, output_again = (
            np.asarray(a, np.float64) for a in (moved, output, again, output_again)
        )
        assert np.isfinite(moved).all()
        assert np.isfinite(output).all()

        # Feasible, to the rounding of deviations.
        size = np.abs(deviation) + np.abs(target) + np.abs(moved) + np.abs(output)
        tolerance = 8 * eps * size + own
        off = distance_to_pieces(
            pieces, reference + moved, output_reference + output, tolerance, 4 * gain * tolerance
        )
        assert off.max() <= 1, np.argmax(off)

        # Nearest.
        distance = np.hypot(root * (moved - deviation), target_root * (output - target))
        request = np.abs(deviation) + np.abs(target)
        floor = (root + gain * target_root) * (8 * eps * request + own)
        assert_no_farther(distance, nearest, floor, precision.relative)

        # Idempotent.
        assert_small(again - moved, 4 * gain * tolerance)
        assert_small(output_again - output, 8 * gain**2 * tolerance)

        if regime == "at the reference" and name != "sign":
            np.testing.assert_array_equal(moved, 0)
            np.testing.assert_array_equal(output, 0)
        unread = points.target_weight == 0
        np.testing.assert_array_equal(moved[unread], deviation[unread])


FLAT = {
    "relu": RELU,
    "steep": X.add(number(-0.3)).maximum(number(0)).scale(2.5),
    "downwards": X.maximum(number(0.7)).scale(-1.5),
    "shallow": RELU.scale(1e-3),
}


@pytest.mark.parametrize("exponent", [0, 30])
@pytest.mark.parametrize("name", FLAT)
def test_no_deviation_is_one_of_zero(name, exponent):
    """Of a line that begins flat, by fewer operations."""
    function = FLAT[name]
    rng = np.random.default_rng(0)
    kink = function.pieces[0].upper
    reference = kink + rng.normal(size=4000) * 10.0 ** rng.uniform(-9, 3, 4000)
    reference[:200] = kink
    target = rng.normal(size=4000) * 10.0 ** rng.uniform(-9, 3, 4000) * 2.0**exponent
    target[100:300] = 0
    weight, target_weight = 10.0 ** rng.uniform(-3, 3, (2, 4000))
    target_weight[50:350:3] = 0
    with enable_x64():
        x, y, w, z, total = map(
            jnp.asarray, (reference, function(reference), weight, target, target_weight)
        )
        found, expected = (
            np.asarray(piecewise(function, x, y, deviation, w, z, total, exponent))
            for deviation in (None, jnp.zeros(4000))
        )
    size = np.abs(target) + 2.0**exponent * np.abs(reference - kink)
    assert_small(found - expected, 1e-13 * size)


def test_deviations_below_the_square_root_of_the_least_float_choose_the_right_piece():
    zero = jnp.zeros(2)
    deviation, target = jnp.array([1e-30, -1e-30]), jnp.array([1e-30, 1e-30])
    moved, output = piecewise(RELU, zero, zero, deviation, 1.0, target, 1.0)
    np.testing.assert_allclose(moved, [1e-30, -1e-30], rtol=1e-6)
    np.testing.assert_allclose(output, [1e-30, 0])


@pytest.mark.parametrize("threshold", [0.1, 1 / 3, -0.7, 12345.678])
def test_a_reference_at_a_jump_is_on_the_side_that_its_output_says(threshold):
    # In float32 the program's threshold is not the function's, and `>` and `>=` differ at it.
    function = X.compare(">", number(threshold))
    near = np.float32(threshold) * (1 + np.arange(-2, 3) * np.float32(1.2e-7))
    reference = jnp.asarray(np.repeat(near.astype(np.float32), 2))
    output_reference = jnp.tile(jnp.array([0.0, 1.0]), 5)
    zero = jnp.zeros(10)
    moved, output = piecewise(function, reference, output_reference, zero, 1.0, zero, 1.0)
    np.testing.assert_array_equal(moved, 0)
    np.testing.assert_array_equal(output, 0)
    # Asked for the other side, it goes there: the jump costs almost no move.
    target = 1 - 2 * output_reference
    moved, output = piecewise(function, reference, output_reference, zero, 1.0, target, 1.0)
    assert np.max(np.abs(moved)) <= 5e-7 * abs(threshold)
    np.testing.assert_array_equal(output, target)


def test_a_reference_at_an_isolated_point_goes_to_a_branch():
    zero = jnp.zeros(2)
    target = jnp.array([0.25, -0.25])
    moved, output = piecewise(X.sign(), zero, zero, zero, 1.0, target, 1.0)
    np.testing.assert_array_equal(moved, 0)
    np.testing.assert_array_equal(output, [1, -1])


# --- The algebra ---------------------------------------------------------------------------------

# Pairs of what builds the function and what it computes.
constants = st.integers(-8, 8).map(lambda k: k / 4)
COMPARISONS = {">": np.greater, ">=": np.greater_equal, "<": np.less, "<=": np.less_equal,
               "==": np.equal, "!=": np.not_equal}  # fmt: skip


@st.composite
def conditions(draw, children):
    (f, f_at), (g, g_at), op = draw(children), draw(children), draw(st.sampled_from([*COMPARISONS]))
    return lambda: f().compare(op, g()), lambda x: 1.0 * COMPARISONS[op](f_at(x), g_at(x))


@st.composite
def extended(draw, children):
    (f, f_at), (g, g_at) = draw(children), draw(children)
    (c, c_at), number = draw(conditions(children)), draw(constants)
    return draw(
        st.sampled_from(
            [
                (lambda: f().add(g()), lambda x: f_at(x) + g_at(x)),
                (lambda: f().subtract(g()), lambda x: f_at(x) - g_at(x)),
                (lambda: f().scale(number), lambda x: number * f_at(x)),
                (lambda: f().negate(), lambda x: -f_at(x)),
                (lambda: f().absolute(), lambda x: np.abs(f_at(x))),
                (lambda: f().sign(), lambda x: np.sign(f_at(x))),
                (lambda: f().maximum(g()), lambda x: np.maximum(f_at(x), g_at(x))),
                (lambda: f().minimum(g()), lambda x: np.minimum(f_at(x), g_at(x))),
                (lambda: c().where(f(), g()), lambda x: np.where(c_at(x) == 1, g_at(x), f_at(x))),
                (lambda: c().multiply(f()), lambda x: c_at(x) * f_at(x)),
            ]
        )
    )


leaves = st.one_of(
    st.just((lambda: X, lambda x: x)),
    constants.map(lambda c: (lambda: number(c), lambda x: np.full_like(x, c))),
)


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.recursive(leaves, extended, max_leaves=8))
def test_a_chain_of_operations_is_its_piecewise_linear_function(case):
    build, program = case
    function = build()
    # Constants are dyadic, so that products and sums are exact; the points meet no breakpoint,
    # where a jump may have a value of its own.
    x = np.sort(np.random.default_rng(0).uniform(-40, 40, 200))
    ends = np.array([piece.upper for piece in function.pieces[:-1]])
    x = x[np.all(np.abs(x[:, None] - ends) > 1e-9, axis=1)]
    with enable_x64():
        np.testing.assert_allclose(function(jnp.asarray(x)), program(x), rtol=1e-12, atol=1e-12)
    lines = [(piece.slope, piece.intercept) for piece in function.pieces]
    assert all(line != following for line, following in pairwise(lines))
    assert hash(function) == hash(PiecewiseLinear(function.pieces))


def test_equal_functions_are_equal():
    assert X.maximum(number(0)) == RELU == X.add(X.absolute()).scale(0.5)
    assert RELU.subtract(RELU.negate().negate()) == number(0)
    assert RELU.subtract(X.negate().maximum(number(0))) == X


def test_values_at_jumps_and_at_infinity():
    x = jnp.array([-jnp.inf, 0.0, jnp.inf])
    np.testing.assert_array_equal(RELU(x), [0, 0, jnp.inf])
    np.testing.assert_array_equal(X.sign()(x), [-1, 1, 1])


def test_what_is_not_piecewise_linear_is_refused():
    with pytest.raises(ValueError, match="both vary"):
        X.multiply(RELU)
    with pytest.raises(ValueError, match="0 and 1 only"):
        X.where(X, X)
    with pytest.raises(ValueError, match="must be one of"):
        X.compare("=>", X)
    with pytest.raises(ValueError, match="cover the real line"):
        PiecewiseLinear((Piece(-np.inf, 0.0, 1.0, 0.0), Piece(1.0, np.inf, 1.0, 0.0)))


@pytest.mark.parametrize("slopes", [(-2, 1), (-0.5, 1), (1, -3), (-0.25, 0.3), (-1, 1), (0.5, 3)])
def test_a_bend_keeps_to_the_near_piece_where_the_target_weighs_much(slopes):
    left, right = map(float, slopes)
    bend = PiecewiseLinear((Piece(-np.inf, 0.0, left, 0.0), Piece(0.0, np.inf, right, 0.0)))
    rng, size = np.random.default_rng(0), 40_000
    x = np.abs(rng.normal(size=size)).astype(np.float32)
    dx, dz = (1e-3 * rng.normal(size=(2, size))).astype(np.float32)
    y = (right * x).astype(np.float32)
    rho = (10 ** rng.uniform(-1, 1, size)).astype(np.float32)
    weight = (rho * 10 ** rng.uniform(4, 12, size)).astype(np.float32)
    moved, _ = piecewise(bend, *map(jnp.asarray, (x, y, dx, rho, dz, weight)))
    # The other piece is nearer where the target lies beyond the kink only.
    near = right * (y + dz) > 0
    limit = 2 * (np.abs(dx) + np.abs(dz) / abs(right))
    assert np.all(np.abs(moved)[near] <= limit[near] + 1e-6)
