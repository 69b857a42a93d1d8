"""Every projection gives the same answer for a batch as a whole and for its points alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pjax.projections import linear, losses
from pjax.projections.extrema import maximum
from pjax.projections.piecewise import PiecewiseLinear, piecewise
from pjax.projections.quantize import quantize, uniform_quantize
from tests.oracles import draw

ROWS, ENTRIES = 200, 4
HARD_SHRINK = (
    PiecewiseLinear.identity()
    .absolute()
    .compare(">", PiecewiseLinear.constant(1.0))
    .multiply(PiecewiseLinear.identity())
)


def project_piecewise(x, dx, rho, z, weight, rows):
    return piecewise(HARD_SHRINK, x, HARD_SHRINK(x), dx, rho, z, weight)


def project_quantize(x, dx, rho, z, weight, rows):
    return quantize(5, -2.0, 2.0, x, uniform_quantize(x, 5, -2.0, 2.0), dx, rho, z, weight)


def project_affine(x, dx, rho, z, weight, rows):
    terms = ((2.0, -1.0), ((-1,), ()), (rho, rho[..., 0]))
    return linear.affine((dx, z[..., 0]), *terms, rows[0], rows[1])


def project_maximum(x, dx, rho, z, weight, rows):
    return maximum(x - jnp.max(x, axis=-1, keepdims=True), dx, rho, *rows)


def project_cross_entropy(x, dx, rho, z, weight, rows):
    return losses.cross_entropy(x, dx, jax.nn.softmax(z), 10 * rows[1])


def project_margin(x, dx, rho, z, weight, rows):
    return losses.margin(x, dx, (z > 0).astype(z.dtype), 1.0, rows[1])


def project_squared_error(x, dx, rho, z, weight, rows):
    return losses.squared_error(x, dx, z, rows[1])


PROJECTIONS = (
    project_piecewise,
    project_quantize,
    project_affine,
    project_maximum,
    project_cross_entropy,
    project_margin,
    project_squared_error,
)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_a_batch_equals_its_points(project):
    points = draw("generic", 0, (ROWS, ENTRIES), (ROWS, ENTRIES))
    rows = draw("generic", 1, (ROWS,), (ROWS,))
    fields = (points.reference, points.deviation, points.weight, points.target)
    arrays = [jnp.asarray(a, jnp.float32) for a in (*fields, points.target_weight)]
    of_rows = tuple(jnp.asarray(a, jnp.float32) for a in (rows.target, rows.target_weight))
    batch = jax.tree.leaves(jax.jit(project)(*arrays, of_rows))
    alone = jax.tree.leaves(jax.jit(jax.vmap(project))(*arrays, of_rows))
    for together, each in zip(batch, alone, strict=True):
        np.testing.assert_allclose(each, together, rtol=1e-5, atol=1e-5)
