"""Piecewise constant functions under small requests: the branch that is asked for.

A request for the output of `sign`, of a step or of a quantizer that is far smaller than a jump
moves nothing by the nearest point of the whole graph: to stay is nearer. Here it asks for a
*branch*, the nearest piece whose value lies where the request points. No slope is made up for the
function.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from pjax.projections.piecewise import PiecewiseLinear


class Branch(NamedTuple):
    """For each entry an interval of the operand; its ends may be infinite."""

    lower: Array
    upper: Array


def asked_piece(
    function: PiecewiseLinear, reference: Array, output: Array, direction: Array
) -> Branch:
    """The nearest piece whose value is beyond `output` in `direction`, else the own piece.

    **Arguments:**

    - `function`: piecewise constant.
    - `reference`, `output`: the operand, and the value of the function there.
    - `direction`: 1 or −1.
    """
    dtype = reference.dtype
    values = [piece.intercept for piece in function.pieces]
    # Values that are the same up to rounding are no rise.
    least = 1e-4 * min(abs(a - b) for a, b in itertools.pairwise(values) if abs(a - b) > 0)
    lower, upper = jnp.full_like(reference, -jnp.inf), jnp.full_like(reference, jnp.inf)
    for beyond in (False, True):  # the own piece first: it stays where none is beyond
        nearest = jnp.full_like(reference, jnp.inf)
        for piece in function.pieces:
            rise = direction * (piece.intercept - output)
            fits = rise > least if beyond else jnp.abs(rise) <= least
            away = distance(
                Branch(jnp.asarray(piece.lower, dtype), jnp.asarray(piece.upper, dtype)), reference
            )
            better = fits & (away < nearest)
            nearest = jnp.where(better, away, nearest)
            lower = jnp.where(better, piece.lower, lower)
            upper = jnp.where(better, piece.upper, upper)
    return Branch(lower.astype(dtype), upper.astype(dtype))


def asked_level(
    levels: int | None, low: float, spacing: float, output: Array, direction: Array
) -> Branch:
    """The next level of a uniform quantizer in `direction`, else (at the last) the own one.

    **Arguments:**

    - `levels`, `low`, `spacing`: the values `low + k·spacing`, `0 ≤ k < levels`; None: all `k`.
    - `output`: the quantized operand.
    - `direction`: 1 or −1.
    """
    level = jnp.round((output - low) / spacing) + direction
    if levels is not None:
        level = jnp.clip(level, 0, levels - 1)
    middle = low + spacing * level
    lower, upper = middle - spacing / 2, middle + spacing / 2
    if levels is not None:
        lower = jnp.where(level == 0, -jnp.inf, lower)
        upper = jnp.where(level == levels - 1, jnp.inf, upper)
    return Branch(lower, upper)


def distance(branch: Branch, reference: Array) -> Array:
    """The distance to a branch."""
    return jnp.maximum(jnp.maximum(branch.lower - reference, reference - branch.upper), 0)


def nearest_inside(branch: Branch, reference: Array, margin: Any) -> Array:
    """The nearest point of a branch at least `margin` from its ends; its middle if too narrow."""
    margin = jnp.minimum(margin, (branch.upper - branch.lower) / 2)
    return jnp.clip(reference, branch.lower + margin, branch.upper - margin)


def spread(branches: tuple[Branch, Branch], reference: Array) -> Array:
    """The mean distance to the nearest end of the two branches: how far thresholds are."""
    ends = [jnp.abs(reference - end) for branch in branches for end in (branch.lower, branch.upper)]
    nearest = ends[0]
    for end in ends[1:]:
        nearest = jnp.minimum(nearest, end)
    return jnp.maximum(jnp.mean(nearest), jnp.finfo(reference.dtype).tiny)


def loudness(request: Array) -> Array:
    """`|g|/mean|g|`, the mean over the entries that ask for something."""
    size = jnp.abs(request)
    largest = jnp.max(size)
    share = size / jnp.where(largest > 0, largest, 1)
    mean = jnp.sum(share) / jnp.maximum(jnp.sum(share > 0), 1)
    return share / jnp.where(mean > 0, mean, 1)
