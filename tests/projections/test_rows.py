"""Products and sums over rows: those of NumPy, with all places in one axis."""

from __future__ import annotations

import numpy as np
import pytest

from pjax.projections.products import rows as of_rows


@pytest.mark.parametrize("blocks", [(), (3,)])
@pytest.mark.parametrize("places", [(), (5,), (2, 4)])
def test_products_are_those_of_flat_rows(blocks, places):
    random = np.random.default_rng(0)
    rows = random.normal(size=(*blocks, *places, 6)).astype(np.float32)
    other = random.normal(size=(*blocks, *places, 4)).astype(np.float32)
    directions = random.normal(size=(*blocks, 6, 2)).astype(np.float32)
    counts = (random.random((*blocks, *places, 1)) < 0.7).astype(np.float32)
    flat, flat_other, flat_counts = (
        x.reshape(*blocks, -1, x.shape[-1]) for x in (rows, other, counts)
    )
    transposed = np.swapaxes(flat, -1, -2)
    for found, expected in (
        (of_rows.along(rows, directions), (flat @ directions).reshape(*blocks, *places, 2)),
        (of_rows.across(rows, other, len(blocks)), transposed @ flat_other),
        (of_rows.moment(rows, directions), transposed @ (flat @ directions)),
        (
            of_rows.moment(rows, directions, counts),
            transposed @ (flat_counts * (flat @ directions)),
        ),
        (of_rows.trace(rows, len(blocks)), np.sum(flat**2, axis=(-1, -2))),
        (of_rows.trace(rows, len(blocks), counts), np.sum(flat_counts * flat**2, axis=(-1, -2))),
        (of_rows.total(rows), np.sum(rows)),
        (of_rows.dot(rows, rows), np.sum(rows**2)),
    ):
        assert found.shape == np.shape(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
