from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.projections.quantize import quantize, uniform_quantize
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

QUANTIZERS = {
    "sign": (2, -1.0, 1.0),
    "five levels": (5, -2.0, 2.0),
    "four uneven levels": (4, -0.3, 1.4),
    "wide": (3, -1e6, 1e6),
    "integers": (None, 0.0, 1.0),
}


@functools.cache
def compiled(name):
    project = functools.partial(quantize, *QUANTIZERS[name])
    levels, low, high = QUANTIZERS[name]
    program = functools.partial(uniform_quantize, levels=levels, low=low, high=high)
    return jax.jit(program), jax.jit(project)


def staircase(name, reach):
    """All steps of the closed graph that a nearest point could be on."""
    levels, low, high = QUANTIZERS[name]
    if levels is None:
        heights = np.arange(-reach, reach + 1, dtype=float)
    else:
        heights = np.linspace(low, high, levels)
    middles = (heights[1:] + heights[:-1]) / 2
    ends = np.concatenate([[-np.inf], middles, [np.inf]])
    return [(a, b, 0.0, h) for a, b, h in zip(ends[:-1], ends[1:], heights, strict=True)]


@pytest.mark.parametrize("name", QUANTIZERS)
@on_many_points
def test_quantize_is_the_nearest_point(name, regime, seed):
    program, project = compiled(name)
    points = draw(regime, seed, (POINTS,), (POINTS,))
    if name == "integers":
        # The oracle tries every integer, so there must not be millions of them.
        for array in (points.reference, points.deviation, points.target):
            np.clip(array, -4, 4, out=array)
    reference, deviation, target = points.reference, points.deviation, points.target
    root, target_root = np.sqrt(points.weight), np.sqrt(points.target_weight)
    pieces = staircase(name, 12)
    heights = np.array([piece[3] for piece in pieces])
    for precision in PRECISIONS:
        eps = precision.eps
        with precision.context():
            fields = (reference, deviation, points.weight, target, points.target_weight)
            arrays = [jnp.asarray(a, precision.dtype) for a in fields]
            output_reference = program(arrays[0])
            moved, output = project(arrays[0], output_reference, *arrays[1:])
            again, output_again = project(
                arrays[0], output_reference, moved, arrays[2], output, arrays[4]
            )
        assert moved.dtype == output.dtype == precision.dtype
        moved, output, again, output_again = (
            np.asarray(a, np.float64) for a in (moved, output, again, output_again)
        )
        assert np.isfinite(moved).all()
        assert np.isfinite(output).all()
        # Which level the reference is on the program says, in its precision; its height is rounded.
        level = np.argmin(np.abs(np.asarray(output_reference)[:, None] - heights), axis=1)
        height = heights[level]
        nearest = nearest_on_pieces(pieces, points, height)

        # Levels and thresholds are sums of the range's ends, rounded.
        ends = np.abs(heights).max() if name != "integers" else 12
        size = np.abs(reference) + np.abs(deviation) + np.abs(moved)
        threshold = 4 * eps * (ends + np.abs(height) + size) + 1e-15 * size
        rise = 4 * eps * (ends + np.abs(target))
        off = distance_to_pieces(pieces, reference + moved, height + output, threshold, rise)
        assert off.max() <= 1, np.argmax(off)

        distance = np.hypot(root * (moved - deviation), target_root * (output - target))
        floor = root * threshold + target_root * rise
        assert_no_farther(distance, nearest, floor, precision.relative)

        assert_small(again - moved, threshold)
        assert_small(output_again - output, rise)

        if regime == "at the reference":
            np.testing.assert_array_equal(moved, 0)
            np.testing.assert_array_equal(output, 0)
        if regime == "close to the reference":
            # Whoever asks for a billionth of a step stays on it, to the last digit.
            stays = np.abs(reference + deviation - np.asarray(output_reference)) < 0.1
            np.testing.assert_array_equal(output[stays], 0)
            np.testing.assert_array_equal(moved[stays], deviation[stays])


def test_values_are_the_nearest_level():
    x = np.linspace(-3, 3, 1001)
    levels = np.linspace(-1, 2, 7)
    value = np.asarray(uniform_quantize(x, 7, -1.0, 2.0))
    np.testing.assert_allclose(
        np.abs(value - x), np.abs(levels - x[:, None]).min(axis=1), atol=1e-6
    )
    integers = uniform_quantize(jnp.array([0.5, 1.5, -7.7]), None, 0, 1)
    np.testing.assert_array_equal(integers, [0, 2, -8])


@pytest.mark.parametrize(("levels", "low", "high"), [(1, 0.0, 1.0), (4, 1.0, 1.0)])
def test_a_range_without_levels_is_refused(levels, low, high):
    with pytest.raises(ValueError, match="must be"):
        uniform_quantize(jnp.zeros(3), levels, low, high)
