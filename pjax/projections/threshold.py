"""Piecewise constant functions under small requests: which threshold an entry is asked to cross.

A request for the output of `sign`, of a step or of a quantizer that is far smaller than a jump
moves nothing by the nearest point of the whole graph: to stay is nearer. Here it asks for a *side*
of the nearest threshold, the one whose value lies where the request points.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pjax.projections.piecewise import PiecewiseLinear


class Nearest(NamedTuple):
    """For each entry its nearest threshold.

    **Attributes:**

    - `offset`: the entry less the threshold.
    - `jump`: the value above the threshold less the one below; not 0.
    """

    offset: Array
    jump: Array


def nearest_of_pieces(function: PiecewiseLinear, x: Array) -> Nearest:
    """The nearest threshold of a piecewise constant function of at least two pieces; of two that
    are as near the lower one.
    """
    offset = jump = None
    for below, above in itertools.pairwise(function.pieces):
        away, rise = x - above.lower, above.intercept - below.intercept
        if offset is None or jump is None:
            offset, jump = away, jnp.full_like(x, rise)
            continue
        nearer = jnp.abs(away) < jnp.abs(offset)
        offset, jump = jnp.where(nearer, away, offset), jnp.where(nearer, rise, jump)
    assert offset is not None
    assert jump is not None
    return Nearest(offset.astype(x.dtype), jump.astype(x.dtype))


def nearest_of_levels(levels: int | None, low: float, spacing: float, x: Array) -> Nearest:
    """The nearest threshold of a uniform quantizer, half-way between two levels.

    **Arguments:**

    - `levels`, `low`, `spacing`: the values `low + k·spacing`, `0 ≤ k < levels`; None: all `k`.
    - `x`: the operand.
    """
    number = jnp.round((x - low) / spacing - 0.5)
    if levels is not None:
        number = jnp.clip(number, 0, levels - 2)
    offset = x - (low + spacing * (number + 0.5))
    return Nearest(offset.astype(x.dtype), jnp.full_like(x, spacing))


def spread(nearest: Nearest) -> Array:
    """The mean distance to the nearest threshold."""
    mean = jnp.mean(jnp.abs(nearest.offset))
    return jnp.maximum(mean, jnp.finfo(nearest.offset.dtype).tiny)


def loudness(request: Array) -> Array:
    """`|g|/mean|g|`, the mean over the entries that ask for something."""
    size = jnp.abs(request)
    largest = jnp.max(size)
    share = size / jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(share) / jnp.maximum(jnp.sum(share > 0), 1)
    return share / jnp.where(mean > 0, mean, 1)
