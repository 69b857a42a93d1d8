"""Maxima and minima."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from pjax.options import Exactness
from pjax.projections import extrema, scaling
from pjax.rules.base import Rule


@dataclass(frozen=True)
class Extremum(Rule):
    """`max` (or `min`) of several slots entry by entry, or of one slot over `axes`."""

    exactness: ClassVar[Exactness] = "exact"

    axes: tuple[int, ...] | None
    sign: int = 1
    name: str = "max"

    def _stack(self, arrays: Sequence[Any]) -> Array:
        if self.axes is None:
            return jnp.stack(arrays, axis=-1)
        (array,) = arrays
        kept = [axis for axis in range(array.ndim) if axis not in self.axes]
        moved = jnp.transpose(array, (*kept, *self.axes))
        return moved.reshape(*moved.shape[: len(kept)], -1)

    def _unstack(self, stacked: Array, shape: tuple[int, ...]) -> tuple[Array, ...]:
        if self.axes is None:
            return tuple(jnp.moveaxis(stacked, -1, 0))
        order = (*(axis for axis in range(len(shape)) if axis not in self.axes), *self.axes)
        moved = stacked.reshape([shape[axis] for axis in order])
        return (jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__)),)

    def project(self, reference, states, weights, target, target_weight):
        sign = self.sign
        stacked = self._stack(reference.inputs)
        gap = sign * (stacked - reference.output[..., None])
        gap = scaling.to_unit(gap, reference.geometry.exponent)
        weight = self._stack(
            [jnp.broadcast_to(w, s.shape) for w, s in zip(weights, states, strict=True)]
        )
        moved, output = extrema.maximum(
            gap, sign * self._stack(states), weight, sign * target, target_weight
        )
        return self._unstack(sign * moved, states[0].shape), sign * output
