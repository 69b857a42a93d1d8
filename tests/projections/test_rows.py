"""Products and sums over rows: those of NumPy, with all places in one axis."""

from __future__ import annotations

import jax.numpy as jnp
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
    of_flat = flat @ directions
    sizes = np.sum(flat**2, axis=(-1, -2)), np.sum(flat_counts * flat**2, axis=(-1, -2))
    sums = np.sum(rows), np.sum(rows**2)
    rows, other, given, counts = map(jnp.asarray, (rows, other, directions, counts))
    for found, expected in (
        (of_rows.along(rows, given), of_flat.reshape(*blocks, *places, 2)),
        (of_rows.across(rows, other, len(blocks)), transposed @ flat_other),
        (of_rows.moment(rows, given), transposed @ of_flat),
        (of_rows.moment(rows, given, counts), transposed @ (flat_counts * of_flat)),
        (of_rows.trace(rows, len(blocks)), sizes[0]),
        (of_rows.trace(rows, len(blocks), counts), sizes[1]),
        (of_rows.total(rows), sums[0]),
        (of_rows.dot(rows, rows), sums[1]),
    ):
        assert found.shape == np.shape(expected)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
