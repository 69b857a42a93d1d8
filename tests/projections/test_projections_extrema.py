from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.projections import extrema
from pjax.projections.extrema import maximum
from tests.oracles import (
    POINTS,
    PRECISIONS,
    assert_no_farther,
    assert_small,
    draw,
    nearest_maximum,
    on_many_points,
)

project = jax.jit(maximum)
by_sorting = jax.jit(lambda *arrays: maximum(*arrays))


@pytest.mark.parametrize("entries", [1, 2, 5])
@on_many_points
def test_maximum_is_the_nearest_point(entries, regime, seed):
    rng = np.random.default_rng(seed)
    points = draw(regime, seed, (POINTS, entries), (POINTS,))
    reference = points.reference
    if regime == "close to the reference":
        # Half of the entries within a few deviations of the maximum.
        below = 3e-7 * np.abs(rng.normal(size=reference.shape))
        close = np.max(reference, -1, keepdims=True) - below
        reference = np.where(rng.random(reference.shape) < 0.5, close, reference)
    reference = reference.astype(np.float32).astype(np.float64)
    # Differences of float32 numbers, rounded to float32: the same input in both precisions.
    gap = (reference - np.max(reference, -1, keepdims=True)).astype(np.float32).astype(np.float64)
    if entries > 2:
        # An entry that never takes part.
        gap[::7, 1] = np.where(gap[::7, 1] < 0, -np.inf, 0)
    finite = np.isfinite(gap)
    nearest = nearest_maximum(gap, points)
    root, target_root = np.sqrt(points.weight), np.sqrt(points.target_weight)

    def distance(moved, output):
        moves = root * (moved - points.deviation)
        return np.hypot(np.sqrt(np.sum(moves**2, -1)), target_root * (output - points.target))

    for precision in PRECISIONS:
        eps = precision.eps
        with precision.context():
            fields = (gap, points.deviation, points.weight, points.target, points.target_weight)
            arrays = [jnp.asarray(a, precision.dtype) for a in fields]
            moved, output = project(*arrays)
            again, output_again = project(arrays[0], moved, arrays[2], output, arrays[4])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(extrema, "_PAIRWISE", 0)
                sorted_moved, sorted_output = by_sorting(*arrays)
        assert moved.dtype == output.dtype == precision.dtype
        results = (moved, output, again, output_again, sorted_moved, sorted_output)
        moved, output, again, output_again, sorted_moved, sorted_output = (
            np.asarray(a, np.float64) for a in results
        )
        assert np.isfinite(moved).all()
        assert np.isfinite(output).all()

        # The entries that matter are those near the maximum; the gap of others is not in play.
        value = gap + moved
        held = np.where(finite & (value >= np.max(value, -1, keepdims=True)), -gap, 0)
        size = (
            np.max(np.abs(points.deviation) + np.abs(moved), -1)
            + np.max(held, -1) + np.abs(points.target) + np.abs(output)
        )  # fmt: skip
        tolerance = 8 * eps * size
        assert_small(np.max(value, -1) - output, tolerance)

        floor = (np.max(root, -1) + target_root) * tolerance
        assert_no_farther(distance(moved, output), nearest, floor, precision.relative)

        assert_small(again - moved, 4 * tolerance[:, None])
        assert_small(output_again - output, 4 * tolerance)
        by_sort = distance(sorted_moved, sorted_output)
        assert_no_farther(by_sort, nearest, floor, precision.relative)

        if regime == "at the reference":
            np.testing.assert_array_equal(moved, 0)
            np.testing.assert_array_equal(output, 0)
        unread = points.target_weight == 0
        np.testing.assert_array_equal(moved[unread], points.deviation[unread])


def test_weights_decide_which_entry_rises():
    # The largest entry is heavy: raising the light one is cheaper, though it is farther.
    moved, output = project(
        jnp.array([0.0, -0.1]), jnp.zeros(2), jnp.array([100.0, 0.01]), jnp.array(1.0), 1.0
    )
    np.testing.assert_allclose(moved, [0, 1.1 / 1.01], rtol=1e-5)
    np.testing.assert_allclose(output, 1.1 / 1.01 - 0.1, rtol=1e-5)


def test_many_entries_are_clipped_to_the_weighted_mean():
    # Forty equal entries and a target below: one level, the mean of all with the target.
    moved, output = project(jnp.zeros((2, 40)), jnp.ones((2, 40)), 1.0, jnp.zeros(2), 10.0)
    np.testing.assert_allclose(moved, np.full((2, 40), 0.8), rtol=1e-6)
    np.testing.assert_allclose(output, [0.8, 0.8], rtol=1e-6)
