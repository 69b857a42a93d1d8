"""A loss as a function of rows: which axes count them, and what it reads of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pjax.patterns.losses.terms import Tail
from pjax.program import Program, carried_axes, run


class RowShape:
    """A group of heads as a function of one value: its rows.

    **Attributes:**

    - `base`: the value.
    - `region`: the equations between it and the heads.
    - `knowns`: the data that these read.
    - `rows`: the axes of the base along which the function is a sum of independent parts.
    """

    def __init__(
        self,
        program: Program,
        tail: Tail,
        heads: Sequence[int],
        base: int,
    ):
        self.program, self.heads, self.base = program, list(heads), base
        inside: set[int] = set()
        pending: list[Any] = [head for head in heads if head != base]
        while pending:
            now = pending.pop()
            if now in inside:
                continue
            inside.add(now)
            operands = program.definitions[now].inputs
            pending += [a for a in operands if program.is_variable(a) and a != base]  # pyright: ignore
        self.region = [e for e in program.equations if not inside.isdisjoint(e.outputs)]
        made = {out for e in self.region for out in e.outputs} | {base}
        self.knowns: tuple[int, ...] = tuple(
            sorted({a for e in self.region for a in e.inputs if isinstance(a, int)} - made)
        )
        _, mixed = carried_axes(program, self.region, base)
        self.axes, _ = carried_axes(program, [*self.region, *tail.equations], base)
        shape = program.shape(base)

        def rows_of(values: Sequence[int]) -> list[int]:
            return [
                axis
                for axis in range(len(shape))
                if axis not in mixed
                and shape[axis] != 1
                and all(self.axes[var].count(axis) == 1 for var in values)
            ]

        self.rows = rows_of(heads)
        #: The value whose coefficient tells how much each row counts.
        self.row_value = tail.row_value(heads)
        if rows_of([*heads, self.row_value]) != self.rows:
            self.row_value = next((h for h in heads if h != base), base)
        self.num_rows = math.prod(shape[axis] for axis in self.rows)
        #: Whether it is a sum over single entries.
        self.separable = all(n == 1 or axis in self.rows for axis, n in enumerate(shape))
        if self.separable:
            # The last axis is the row, as for the losses of this library.
            self.rows = self.rows[:-1]
        others = [axis for axis in range(len(shape)) if axis not in self.rows]
        self._order = (*self.rows, *others)
        self._moved = tuple(shape[axis] for axis in self._order)
        self.row_shape = tuple(shape[axis] for axis in self.rows)
        self.shape = (*self.row_shape, math.prod(shape[axis] for axis in others))

    def transpose(self, x: Array) -> Array:
        identity = self._order == tuple(range(len(self._order)))
        return x if identity else lax.transpose(x, self._order)

    def reshape(self, x: Array) -> Array:
        return lax.reshape(x, self.shape)

    def _back(self, x: Array) -> Array:
        inverse = tuple(np.argsort(self._order)) if self._order else ()
        return lax.reshape(x, self._moved).transpose(inverse)

    def _over(self, head: int, array: Array) -> Array:
        """An array of a head's shape, with the base's row axes first and one more for the rest."""
        axes = self.axes[head]
        front = [axes.index(axis) for axis in self.rows]
        rest = [place for place in range(len(axes)) if place not in front]
        return jnp.transpose(array, (*front, *rest)).reshape((*self.row_shape, -1))

    def counts(self, coefficient: Any, heads: Sequence[Any], sign: float | None) -> Array:
        """How much each row counts in the result: `1/n` for each row of a mean.

        It is the sum of the sizes of the coefficients of the row's entries; of a loss of single
        entries, the largest of them. Where that is 0, another head says it.

        **Arguments:**

        - `coefficient`, `heads`: of `row_value`, and of each head.
        - `sign`: with which the loss is convex. A row whose largest coefficient has the other one
            counts negatively.
        """
        counts = self._counts(self.row_value, coefficient, sign)
        for head, of_head in zip(self.heads, heads, strict=True):
            if head != self.row_value:
                counts = jnp.where(counts == 0, self._counts(head, of_head, sign), counts)
        return counts

    def _counts(self, var: int, coefficient: Any, sign: float | None) -> Array:
        full = self._over(var, self._full(var, coefficient))
        place = jnp.argmax(jnp.abs(full), axis=-1, keepdims=True)
        largest = jnp.take_along_axis(full, place, -1)[..., 0]
        counts = jnp.abs(largest) if self.separable else jnp.sum(jnp.abs(full), -1)
        return counts if sign is None else jnp.where(sign * largest < 0, -counts, counts)

    def scales(self, coefficients: Sequence[Any], counts: Array) -> list[Array]:
        """The coefficients of heads, relative to how much each row counts."""
        divisor = jnp.where(counts == 0, 1, counts)[..., None]
        return [
            self._over(head, self._full(head, c)) / divisor
            for head, c in zip(self.heads, coefficients, strict=True)
        ]

    def _full(self, var: int, array: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(array), self.program.shape(var))

    def _heads(self, x: Array, knowns: Sequence[Any]) -> list[Array]:
        # What deviates is in float32 also where the program computes in bfloat16.
        given = zip((*self.knowns, self.base), (*knowns, self._back(x)), strict=True)
        values: dict[int, Any] = {
            number: value
            if hasattr(value, "dtype") and value.dtype == self.program.dtype(number)
            else jnp.asarray(value, self.program.dtype(number))
            for number, value in given
        }
        run(self.region, values, even=True)
        return [self._over(head, values[head]) for head in self.heads]

    def row_function(self) -> Callable[..., Array]:
        """`(x, *scales, *knowns) -> rows`."""
        count = len(self.heads)

        def value(x: Array, *args: Any) -> Array:
            heads = self._heads(x, args[count:])
            parts = [jnp.sum(c * h, -1) for c, h in zip(args[:count], heads, strict=True)]
            return functools.reduce(jnp.add, parts)

        return value

    def entry_function(self) -> Callable[..., Array] | None:
        """`(x, *scales, *knowns) -> the loss of each entry`, if it is a sum of such."""
        if not self.separable:
            return None
        count = len(self.heads)

        def entries(x: Array, *args: Any) -> Array:
            heads = self._heads(x, args[count:])
            parts = [c * h for c, h in zip(args[:count], heads, strict=True)]
            return functools.reduce(jnp.add, parts)

        return entries
