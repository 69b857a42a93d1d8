"""Reductions over windows, as wiring and a reduction over axes: pooling layers and `cumsum`.

A pooling layer reads windows of its operand. Windows side by side are a reshape; others are strided
slices of the padded operand, stacked along a new axis. What remains is a maximum, a minimum or a
sum over axes, which have exact rules; an entry in several windows has a copy in each, and the
wiring's consensus holds them together. A running sum is a product with a triangle of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pjax.backend import compat
from pjax.program import Atom
from pjax.trace.writer import Writer

_REDUCTIONS: dict[Any, tuple[Callable[..., Array], float]] = {
    **dict.fromkeys(compat.find_primitives("reduce_window_max"), (jnp.max, -np.inf)),
    **dict.fromkeys(compat.find_primitives("reduce_window_min"), (jnp.min, np.inf)),
    **dict.fromkeys(compat.find_primitives("reduce_window_sum"), (jnp.sum, 0.0)),
}
_CUMSUM = compat.find_primitives("cumsum")


def expand(writer: Writer, eqn: Any, inputs: Sequence[Atom], source: str) -> list[Atom] | None:
    """The output of a reduction over windows by operations that have rules; None for any other."""
    primitive, params = eqn.primitive, eqn.params
    if primitive in _CUMSUM:
        return writer.add_function(lambda x: [_running_sum(x, params)], inputs, source)
    if primitive not in _REDUCTIONS:
        return None
    reduce, fill = _REDUCTIONS[primitive]
    return writer.add_function(lambda x: [reduce_windows(x, reduce, fill, params)], inputs, source)


def reduce_windows(
    x: Array, reduce: Callable[..., Array], fill: float, params: Mapping[str, Any]
) -> Array:
    """`jax.lax.reduce_window` of `reduce`, whose identity is `fill`."""
    sizes, padding = params["window_dimensions"], params["padding"]
    config = [(low, high, base - 1) for (low, high), base in zip(
        padding, params["base_dilation"], strict=True)]  # fmt: skip
    if any(part != (0, 0, 0) for part in config):
        x = lax.pad(x, jnp.asarray(fill, x.dtype), config)
    reduced = []
    axis = 0
    for size, stride, dilation in zip(
        sizes, params["window_strides"], params["window_dilation"], strict=True
    ):
        if (size, stride) == (1, 1):
            axis += 1
            continue
        x = _windows(x, axis, size, stride, dilation)
        reduced.append(axis + 1)
        axis += 2
    return reduce(x, axis=tuple(reduced)) if reduced else x


def _windows(x: Array, axis: int, size: int, stride: int, dilation: int) -> Array:
    """The windows along an axis: `[…, window, entry, …]`."""
    count = max((x.shape[axis] - (size - 1) * dilation - 1) // stride + 1, 0)
    if dilation == 1 and (stride == size or count == 1):
        if count * size < x.shape[axis]:
            x = lax.slice_in_dim(x, 0, count * size, axis=axis)
        return x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    parts = [
        lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)
        for start in range(0, size * dilation, dilation)
    ]
    return jnp.concatenate([jnp.expand_dims(part, axis + 1) for part in parts], axis + 1)


def _running_sum(x: Array, params: Mapping[str, Any]) -> Array:
    axis = params["axis"]
    ones = np.tri(x.shape[axis])
    ones = jnp.asarray(ones if params["reverse"] else ones.T, x.dtype)
    summed = lax.dot_general(x, ones, (((axis,), (0,)), ((), ())), precision="highest")
    return jnp.moveaxis(summed, -1, axis)
