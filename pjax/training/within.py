"""Moves of parameters that are to stay in sets: the least squares of a batch, over the set.

What batches ask of a parameter is the least squares `½ <δ − δ*, H (δ − δ*)>`, of which the free
move `δ*` is the minimum, with `H` the moments of inputs and forces: large in the directions in
which the layer's output answers. The point of the set that is nearest to where `δ*` leads is so
with all directions alike; in those of large `H` it may be far off, and the loss may grow. So the
minimum over the set is looked for, by steps along `H (δ* − δ)` that end at nearest points.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from pjax.problem import Problem
from pjax.program import Leaves
from pjax.projections import spectrum
from pjax.projections.spectrum import Side
from pjax.sets import Set, for_leaves
from pjax.training.moments import as_matrix, from_matrix
from pjax.training.readers import Unit

#: Steps of the iteration.
_STEPS = 16


def minimum(
    one: Set, start: Array, target: Array, stiffness: Callable[[Array], Array], largest: Array
) -> Array:
    """A point of a set with a small `<y − t, H (y − t)>`: no larger than at `P(start)` and `P(t)`.

    Accelerated projected gradients, which begin anew where the objective grows. They begin at
    `P(t)`: there the many directions of small `H`, in which steps are short, are as they should be,
    and what the set made wrong in those of large `H` the first steps mend. Source: Beck and
    Teboulle (2009); O'Donoghue and Candès, *Adaptive restart* (2015).

    **Arguments:**

    - `start`, `target`: where the parameter is, and `t`, where it would move freely.
    - `stiffness`: `H`.
    - `largest`: a bound on its largest eigenvalue.
    """

    def objective(y: Array) -> Array:
        return jnp.vdot(y - target, stiffness(y - target))

    def step(_: Any, carry: Any) -> Any:
        point, before, age, value, best, least = carry
        ahead = point + (age - 1) / (age + 2) * (point - before)
        force = stiffness(target - ahead)
        new = one.project(ahead + force * spectrum.inverse(largest)).astype(point.dtype)
        found = objective(new)
        age = jnp.where(found > value, 1.0, age + 1)
        better = found < least
        best = jnp.where(better, new, best)
        return new, point, age, found, best, jnp.where(better, found, least)

    rest, first = (one.project(x).astype(start.dtype) for x in (start, target))
    least, value = objective(rest), objective(first)
    best = jnp.where(value < least, first, rest)
    carry = first, first, jnp.ones((), value.dtype), value, best, jnp.minimum(value, least)
    return jax.lax.fori_loop(0, _STEPS, step, carry)[4]


def of_matrix(
    problem: Problem, unit: Unit, left: Side, right: Side
) -> tuple[Callable[[Array], Array], Array]:
    """`H` of a matrix or kernel, and a bound on its largest eigenvalue.

    **Arguments:**

    - `left`, `right`: the functions of spectra that its inverse is made of.
    """
    inverses = _inverse(left), _inverse(right)

    def times(move: Array) -> Array:
        matrix = spectrum.between(inverses[0], as_matrix(problem, unit, move), inverses[1])
        return from_matrix(problem, unit, matrix).astype(move.dtype)

    return times, _largest(inverses[0]) * _largest(inverses[1])


def of_diagonal(diagonal: Array, right: Side | None) -> tuple[Callable[[Array], Array], Array]:
    """The same of what has a diagonal for its inputs, and perhaps a spectrum for its outputs."""
    if right is None:
        return functools.partial(jnp.multiply, diagonal), jnp.max(diagonal)
    inverse = _inverse(right)

    def times(move: Array) -> Array:
        flat = (diagonal * move).reshape(-1, move.shape[-1])
        return spectrum.between(None, flat, inverse).reshape(move.shape).astype(move.dtype)

    return times, jnp.max(diagonal) * _largest(inverse)


def sets_of(sets: PyTree[Set | None], params: Any, apart: Leaves) -> tuple[Set | None, ...]:
    """For each leaf of a program its set, or None; nothing where there are no sets.

    **Arguments:**

    - `sets`: a prefix of `params`.
    - `apart`: `params`, taken apart.
    """
    if sets is None:
        return ()
    found = for_leaves(sets, params)
    return tuple(found[place] for place in apart.places)


def _inverse(side: Side) -> Side:
    if side.outside is None:
        return side._replace(inside=spectrum.inverse(side.inside))
    outside = spectrum.inverse(side.outside)
    # What is outside counts in all directions: the rest of the inside is what is beyond it.
    rest = outside.reshape((*outside.shape[: side.inside.ndim - 1], 1))
    own = side.outside.reshape(rest.shape)
    return side._replace(inside=spectrum.inverse(side.inside + own) - rest, outside=outside)


def _largest(side: Side) -> Array:
    if side.outside is None:
        return jnp.max(side.inside)
    rest = side.outside.reshape((*side.outside.shape[: side.inside.ndim - 1], 1))
    return jnp.maximum(jnp.max(side.inside + rest), jnp.max(rest))


__all__ = ["minimum", "of_diagonal", "of_matrix", "sets_of"]
