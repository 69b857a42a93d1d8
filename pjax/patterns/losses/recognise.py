"""Cross-entropy and squared error, recognised by their values whatever their spelling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pjax.backend import device
from pjax.patterns.losses.rows import RowShape
from pjax.patterns.losses.terms import Tail
from pjax.program import Equation, Program, live, primitives, run


@dataclass(frozen=True)
class _Known:
    """A loss of this library: its primitive, and how its data is found.

    **Attributes:**

    - `times`: the loss is so many times that of the primitive.
    """

    primitive: Any
    times: float

    def data(self, shape: RowShape, scales: Sequence[Array], knowns: Sequence[Any]) -> Array:
        """The labels, or the targets, from the loss's slope at 0."""
        if self.primitive is primitives.cross_entropy_p and shape.base in shape.heads:
            # `log Σ exp x − y·x`: what is linear in it are the labels.
            return -scales[shape.heads.index(shape.base)]
        slope = _slope(shape, scales, knowns, jnp.zeros(shape.shape, scales[0].dtype))
        if self.primitive is primitives.squared_error_p:
            return -slope / self.times
        labels = 1 / shape.shape[-1] - slope
        close = jnp.round(labels)
        return jnp.where(jnp.abs(labels - close) < 1e-5, close, labels)


def _slope(shape: RowShape, scales: Sequence[Array], knowns: Sequence[Any], at: Array) -> Array:
    value = shape.row_function()
    return jax.grad(lambda x: jnp.sum(value(x, *scales, *knowns)))(at)


@dataclass(frozen=True)
class Probe:
    """What a loss was found to be at sample points.

    **Attributes:**

    - `convex`, `concave`: of each row.
    - `found`: a loss of this library that it (or its negative) equals there, up to a number for
        each row.
    - `sign`: that of the coefficients with which it is convex; None if it is not.
    """

    convex: bool
    concave: bool
    found: _Known | None
    sign: float | None


#: Pairs of sample points for each row, of sizes over so many decades.
_PAIRS, _DECADES = 24, (-1.5, 2.5)
_TOLERANCE = 2e-4
#: A loss of more entries is sampled less often.
_ENTRIES = 2**24


def probe_rows(program: Program, tail: Tail, shape: RowShape) -> Probe | None:
    """Looks at a loss at sample points; None if it has no values there."""
    rng = np.random.default_rng(0)
    dtype = program.dtype(shape.base)
    wanted = [*tail.data, *shape.knowns]
    equations, roots = _behind(program, wanted, shape.base)
    pairs = int(np.clip(_ENTRIES // max(math.prod(shape.shape), 1), 2, _PAIRS))
    sizes = 10 ** rng.uniform(*_DECADES, (pairs, 2, *shape.shape[:-1], 1))
    points = np.asarray(sizes * rng.normal(size=(pairs, 2, *shape.shape)), np.float32)
    value = shape.row_function()
    tolerance = max(_TOLERANCE, 2 * float(jnp.finfo(dtype).eps))

    def look(drawn: Any, reference: Any, points: Any) -> Any:
        values = {**drawn, shape.base: reference}
        run(equations, values)
        every = dict(zip(tail.heads, tail.coefficients(values), strict=True))
        counted = tail.coefficient(shape.row_value, values)
        sign = jnp.where(jnp.sum(counted) < 0, -1.0, 1.0)
        heads = [every[head] for head in shape.heads]
        counts = jnp.abs(shape.counts(counted, heads, None))
        scales = shape.scales(heads, counts)
        knowns = [values[a] for a in shape.knowns]

        def rows(x: Any) -> Any:
            return value(x, *scales, *knowns)

        def at_pair(pair: Any) -> Any:
            first, second = pair
            return rows(first), rows(second), rows((first + second) / 2)

        zero = jnp.zeros(shape.shape, dtype)
        slope = _slope(shape, scales, knowns, zero)
        return lax.map(at_pair, points), rows(zero), slope, sign

    reference = _sample(program.avals[shape.base], rng, normal=True)
    drawn = {root: _sample(program.avals[root], rng) for root in roots}
    found = device.run_once(look, drawn, reference, points.astype(dtype))
    samples, zero, slope, sign = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    first, second, middle = samples
    finite = np.isfinite(first) & np.isfinite(second) & np.isfinite(middle)
    if finite.sum() < 0.25 * finite.size or not np.all(np.isfinite(zero)):
        return None
    a, b, m = (np.where(finite, found, 0) for found in (first, second, middle))
    gap, slack = (a + b) / 2 - m, tolerance * (np.abs(a) + np.abs(b) + np.abs(m) + 1e-3)
    convex, concave = bool(np.all(gap >= -slack)), bool(np.all(gap <= slack))
    if not convex and not concave:
        return Probe(False, False, None, None)
    known = None
    if not convex:  # it is to be maximised: its rows count negatively
        sign, first, zero, slope = -sign, -first, -zero, -slope
    if not (convex and concave) and np.all(np.isfinite(slope)):
        at = points[:, 0].astype(np.dtype(dtype)).astype(np.float64)
        known = _compare(shape, at, first, zero, slope, tolerance)
    return Probe(convex, concave, known, float(sign))


def _compare(
    shape: RowShape,
    points: np.ndarray,
    values: np.ndarray,
    zero: np.ndarray,
    slope: np.ndarray,
    tolerance: float,
) -> _Known | None:
    """The loss of this library with these values, less those at 0, and this slope there."""
    finite = np.isfinite(values)
    wanted = np.where(finite, values - zero, 0)
    size = np.abs(wanted) + np.max(np.abs(points), -1) + 1

    def agrees(value: np.ndarray) -> bool:
        return bool(np.all(np.where(finite, np.abs(value - wanted) <= tolerance * size, True)))

    classes = shape.shape[-1]
    labels = 1 / classes - slope
    if classes > 1 and np.all(labels > -tolerance):
        top = points.max(-1, keepdims=True)
        entropy = np.log(np.exp(points - top).sum(-1)) + top[..., 0] - np.log(classes)
        sums_to_one = np.allclose(labels.sum(-1), 1, atol=tolerance)
        if sums_to_one and agrees(entropy - (labels * points).sum(-1)):
            return _Known(primitives.cross_entropy_p, 1.0)
    # a/2 |x|² + slope·x: the number a from all samples.
    linear, square = (slope * points).sum(-1), np.square(points).sum(-1)
    times = float(np.median((2 * (wanted - linear) / square)[finite]))
    if not times > 0:
        return None
    nearest = 2.0 ** np.round(np.log2(times))
    if abs(times / nearest - 1) < 1e-3:  # of ½(x − t)² or (x − t)², but for rounding
        times = float(nearest)
    return (
        _Known(primitives.squared_error_p, times) if agrees(times / 2 * square + linear) else None
    )


def _behind(program: Program, wanted: Sequence[int], base: int) -> tuple[list[Equation], list[int]]:
    """The equations that lead to known variables, and what they begin at: inputs of the program,
    the base, which counts as given, and conditions on numbers, which samples of these may miss.
    """
    drawn = {
        out
        for e in program.equations
        for out in e.outputs
        if program.dtype(out) == jnp.bool_
        and any(jnp.issubdtype(program.dtype(a), jnp.floating) for a in e.inputs)
    } | {base}
    equations = live([e for e in program.equations if drawn.isdisjoint(e.outputs)], wanted)
    needed = {a for e in equations for a in e.inputs if isinstance(a, int)} | set(wanted)
    made = {out for e in equations for out in e.outputs}
    return equations, sorted(needed - made - {base})


def _sample(aval: Any, rng: np.random.Generator, normal: bool = False) -> Any:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        with device.compile_time_eval():
            keys = jax.random.split(jax.random.key(0), max(math.prod(aval.shape), 1))
            return keys[: math.prod(aval.shape)].reshape(aval.shape)
    if jnp.issubdtype(aval.dtype, jnp.floating):
        drawn = rng.normal(size=aval.shape) if normal else rng.uniform(0.05, 1, aval.shape)
    else:  # class numbers of any number of classes, and masks
        drawn = rng.integers(0, 2, aval.shape)
    return np.asarray(drawn).astype(aval.dtype)
