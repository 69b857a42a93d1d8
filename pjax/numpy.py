"""NumPy-like functions for writing models, on plain JAX arrays.

They are thin: each is one or a few `jax.lax` operations that the tracer knows, either wiring
(reshape, transpose, broadcast, slice, concatenate, pad, gather) or an operation with an exact
projection (addition, sum, dot product, maximum). A model written with `jax.numpy` traces just as
well; these names exist so that code written for the paper's library runs unchanged.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike

from pjax.program import identity, quantize

__all__ = [
    "add",
    "array",
    "broadcast_to",
    "concatenate",
    "conv_patch",
    "dot",
    "expand_dims",
    "identity",
    "index",
    "matmul",
    "max",
    "maximum",
    "moveaxis",
    "parameter",
    "quantize",
    "relu",
    "repeat",
    "reshape",
    "squeeze",
    "stack",
    "sum",
    "sum_relu",
    "swapaxes",
    "transpose",
    "vmap",
    "zero_pad",
]
vmap = jax.vmap
Values = ArrayLike | Sequence[Any]
Axes = int | Sequence[int] | None
Padding = str | int | Sequence[int | Sequence[int]]


def array(x: Values, name: str | None = None) -> Array:
    """`x` as a JAX array: data, which no projection moves.

    **Arguments:**

    - `x`: anything that `jax.numpy.asarray` takes.
    - `name`: accepted so that code written for the paper's library runs; a plain JAX array has no
      name, and nodes are named after the line that made them.
    """
    _check_name("array", name)
    return jnp.asarray(x)


def parameter(x: Values, name: str | None = None) -> Array:
    """`x` as a floating-point JAX array: a value that training may move.

    What a training step moves is decided by the pytree it is given, not by this call; it makes sure
    that the array can move at all (integers become the default floating-point type).

    **Arguments:** as for `array`.
    """
    _check_name("parameter", name)
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        return x
    if jnp.issubdtype(x.dtype, jnp.integer):
        return x.astype(jnp.result_type(float))
    raise TypeError(f"`parameter` needs real numbers, got {x.dtype}.")


def dot(x: Values, y: Values) -> Array:
    """`Σ_k x[…, k] y[…, k, j]`, with the conventions of `numpy.dot`."""
    return jnp.dot(jnp.asarray(x), jnp.asarray(y))


def matmul(x: Values, y: Values) -> Array:
    """The matrix product over the last two axes; the axes before are batch axes."""
    return jnp.matmul(jnp.asarray(x), jnp.asarray(y))


def add(x: Values, y: Values, *more: Values) -> Array:
    """`x + y + …`, with broadcasting."""
    total = jnp.add(jnp.asarray(x), jnp.asarray(y))
    for term in more:
        total = jnp.add(total, jnp.asarray(term))
    return total


def sum(x: Values, axis: Axes = None, keepdims: bool = False) -> Array:
    """`Σ x` over the given axes (all of them by default)."""
    return jnp.sum(jnp.asarray(x), axis=_axes(axis), keepdims=keepdims)


def max(x: Values, axis: Axes = None, keepdims: bool = False) -> Array:
    """`max x` over the given axes (all of them by default)."""
    return jnp.max(jnp.asarray(x), axis=_axes(axis), keepdims=keepdims)


def maximum(x: Values, y: Values) -> Array:
    """`max(x, y)` elementwise, with broadcasting."""
    return jnp.maximum(jnp.asarray(x), jnp.asarray(y))


def relu(x: Values) -> Array:
    """`max(x, 0)` elementwise."""
    return jax.nn.relu(jnp.asarray(x))


def sum_relu(x: Values, *more: Values) -> Array:
    """`max(x + …, 0)` elementwise, with broadcasting: one node for the sum and the relu.

    >>> import pjax.numpy as pnp
    >>> pnp.sum_relu([1.0, -1.0], [2.0, -2.0], 0.5).tolist()
    [3.5, 0.0]
    """
    return relu(add(x, *more) if more else x)


def index(x: Values, indices: Any) -> Array:
    """`x[indices]`: indices may repeat, and each reader of an entry takes part in its consensus.

    **Arguments:**

    - `x`: any array.
    - `indices`: what NumPy takes: integers, slices, `None`, `...`, arrays of integers, boolean
      masks whose values are known, or a tuple of these.

    **Raises:** `IndexError` for an index that is out of bounds or not an index. Indices that are
    traced (computed under `jax.jit`) cannot be checked and are clipped to the bounds.

    >>> import jax.numpy as jnp
    >>> import pjax.numpy as pnp
    >>> pnp.index(jnp.array([5.0, 6.0, 7.0]), [2, 0, 2]).tolist()
    [7.0, 5.0, 7.0]
    """
    x = jnp.asarray(x)
    parts = indices if isinstance(indices, tuple) else (indices,)
    parts = tuple(np.asarray(part) if isinstance(part, list) else part for part in parts)
    if any(isinstance(part, Tracer) for part in parts):
        for part in parts:
            if isinstance(part, Tracer) and not jnp.issubdtype(part.dtype, jnp.integer):
                raise IndexError(f"`index` needs integer indices, got a traced {part.dtype} array.")
        return x.at[parts].get(mode="clip")
    parts = tuple(np.asarray(part) if isinstance(part, jax.Array) else part for part in parts)
    # NumPy checks the indices on an array of x's shape that takes no memory.
    np.broadcast_to(np.int8(0), x.shape)[parts]
    return x.at[parts].get(mode="promise_in_bounds")


def reshape(x: Values, shape: int | Sequence[int]) -> Array:
    """The entries of `x`, in row-major order, in another shape (one `-1` is worked out)."""
    return jnp.reshape(jnp.asarray(x), shape)


def transpose(x: Values, axes: Sequence[int] | None = None) -> Array:
    """`x` with its axes permuted (reversed by default)."""
    return jnp.transpose(jnp.asarray(x), axes)


def swapaxes(x: Values, axis1: int, axis2: int) -> Array:
    """`x` with two axes exchanged."""
    return jnp.swapaxes(jnp.asarray(x), axis1, axis2)


def moveaxis(x: Values, source: int | Sequence[int], destination: int | Sequence[int]) -> Array:
    """`x` with the axes `source` moved to `destination`, the others kept in order."""
    return jnp.moveaxis(jnp.asarray(x), _axes(source), _axes(destination))  # pyright: ignore[reportArgumentType]


def expand_dims(x: Values, axis: int | Sequence[int]) -> Array:
    """`x` with axes of length 1 inserted at `axis`."""
    return jnp.expand_dims(jnp.asarray(x), _axes(axis))  # pyright: ignore[reportArgumentType]


def squeeze(x: Values, axis: Axes = None) -> Array:
    """`x` without its axes of length 1 (all of them, or those named)."""
    return jnp.squeeze(jnp.asarray(x), _axes(axis))


def broadcast_to(x: Values, shape: int | Sequence[int]) -> Array:
    """`x` repeated along new axes and along axes of length 1 until it has `shape`."""
    return jnp.broadcast_to(jnp.asarray(x), shape)  # pyright: ignore[reportArgumentType]


def repeat(x: Values, repeats: int | Sequence[int], axis: int | None = None) -> Array:
    """Every entry of `x` along `axis` repeated in place; `axis=None` flattens `x` first.

    **Arguments:**

    - `x`: any array.
    - `repeats`: one number, or one for each entry along `axis`.
    - `axis`: the axis, or `None`.
    """
    x = jnp.asarray(x)
    if axis is None:
        x, axis = x.reshape(-1), 0
    axis = _axis(axis, x.ndim)
    counts = np.asarray(repeats)
    if not np.issubdtype(counts.dtype, np.integer) or (counts < 0).any():
        raise ValueError(f"`repeats` must be integers that are not negative, got {repeats}.")
    if counts.ndim > 1 or (counts.ndim == 1 and counts.size != x.shape[axis]):
        raise ValueError(
            f"`repeats` must be one number or one for each of the {x.shape[axis]} entries along "
            f"axis {axis}, got shape {counts.shape}."
        )
    positions = np.repeat(np.arange(x.shape[axis]), counts)
    return index(x, (slice(None),) * axis + (positions,))


def concatenate(xs: Sequence[Values], axis: int = 0) -> Array:
    """The arrays of `xs` one after the other along an existing axis."""
    return jnp.concatenate([jnp.asarray(x) for x in xs], axis)


def stack(xs: Sequence[Values], axis: int = 0) -> Array:
    """The arrays of `xs`, all of one shape, one after the other along a new axis."""
    arrays = [jnp.asarray(x) for x in xs]
    if not arrays:
        raise ValueError("`stack` needs at least one array.")
    shapes = {x.shape for x in arrays}
    if len(shapes) > 1:
        raise ValueError(f"`stack` needs arrays of one shape, got {sorted(shapes)}.")
    return jnp.concatenate([jnp.expand_dims(x, axis) for x in arrays], axis)


def zero_pad(x: Values, pad_width: int | Sequence[int | Sequence[int]]) -> Array:
    """`x` with zeros around it; the zeros are constants, restored with the consensus over `x`.

    **Arguments:**

    - `x`: any array.
    - `pad_width`: one number for every side of every axis, or for each axis a number (both sides)
      or a pair `(before, after)`.

    >>> import pjax.numpy as pnp
    >>> pnp.zero_pad([1.0, 2.0], [(1, 2)]).tolist()
    [0.0, 1.0, 2.0, 0.0, 0.0]
    """
    x = jnp.asarray(x)
    pairs = _pairs("pad_width", pad_width, x.ndim)
    return jax.lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in pairs])


def conv_patch(
    x: Values,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
) -> Array:
    """The patches of `x` that a convolution multiplies with its kernel.

    `patches[…, i, j, (a·kw + b)·c + k] = x[…, i·sh + a − top, j·sw + b − left, k]`, zero outside.
    A convolution is then one dot product with the kernel reshaped to `(kh·kw·c, out)`. Overlapping
    patches read an entry of `x` several times; its consensus is over all of them.

    **Arguments:**

    - `x`: shape `(…, height, width, channels)`.
    - `kernel_size`: `(kh, kw)`, or one number for both.
    - `stride`: `(sh, sw)`, or one number for both.
    - `padding`: `"SAME"` (output of `⌈height / sh⌉` rows), `"VALID"` (none), one number for all
      four sides, or for height and width each a number or a pair `(before, after)`.

    **Returns:** shape `(…, rows, columns, kh·kw·channels)`.

    **Raises:** `ValueError` if a kernel is larger than the padded image, and for other wrong sizes.
    """
    x = jnp.asarray(x)
    if x.ndim < 3:
        raise ValueError(f"`conv_patch` needs (…, height, width, channels), got shape {x.shape}.")
    kernel = _two("kernel_size", kernel_size)
    strides = _two("stride", stride)
    size = x.shape[-3:-1]
    pads = _padding(padding, size, kernel, strides)
    x = zero_pad(x, [(0, 0)] * (x.ndim - 3) + [*pads, (0, 0)])
    # One axis after the other: kh + kw slices instead of kh·kw, then (b, a, k) becomes (a, b, k).
    x = _windows(x, -3, kernel[0], strides[0])
    x = _windows(x, -2, kernel[1], strides[1])
    windows = x.reshape(*x.shape[:-1], kernel[1], kernel[0], -1)
    return jnp.swapaxes(windows, -3, -2).reshape(x.shape)


def _windows(x: Array, axis: int, length: int, stride: int) -> Array:
    """For every window along `axis`, its `length` entries side by side on the last axis."""
    count = (x.shape[axis] - length) // stride + 1
    slices = [
        jax.lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis=axis)
        for start in range(length)
    ]
    return jnp.concatenate(slices, axis=-1)


def _check_name(function: str, name: str | None) -> None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"`{function}` takes a string as `name`, got {type(name).__name__}.")


def _axes(axis: Axes) -> int | tuple[int, ...] | None:
    return axis if axis is None or isinstance(axis, int) else tuple(axis)


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} is out of bounds for an array with {ndim} axes.")
    return axis % ndim


def _count(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` must be made of integers from {least} on, got {value!r}.")
    return int(value)


def _two(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if not isinstance(value, Sequence):
        value = (value, value)
    if len(value) != 2:
        raise ValueError(f"`{name}` must be one integer or two, got {value!r}.")
    return _count(name, value[0], 1), _count(name, value[1], 1)


def _pairs(
    name: str, value: int | Sequence[int | Sequence[int]], axes: int
) -> list[tuple[int, int]]:
    if not isinstance(value, Sequence):
        value = [value] * axes
    if len(value) != axes:
        raise ValueError(
            f"`{name}` must be one integer, or an integer or a pair for each of {axes} axes; "
            f"got {value!r}."
        )
    pairs = [pair if isinstance(pair, Sequence) else (pair, pair) for pair in value]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"`{name}` must hold pairs (before, after), got {value!r}.")
    return [(_count(name, low, 0), _count(name, high, 0)) for low, high in pairs]


def _padding(
    padding: Padding, size: tuple[int, ...], kernel: tuple[int, int], strides: tuple[int, int]
) -> list[tuple[int, int]]:
    if isinstance(padding, str):
        if padding.upper() == "VALID":
            pads = [(0, 0), (0, 0)]
        elif padding.upper() == "SAME":
            pads = []
            for n, k, s in zip(size, kernel, strides, strict=True):
                total = builtins.max((math.ceil(n / s) - 1) * s + k - n, 0)
                pads.append((total // 2, total - total // 2))
        else:
            raise ValueError(f'`padding` must be "SAME", "VALID" or numbers, got {padding!r}.')
    else:
        pads = _pairs("padding", padding, 2)
    for n, k, (low, high) in zip(size, kernel, pads, strict=True):
        if n + low + high < k:
            raise ValueError(
                f"a kernel of size {kernel} does not fit into an image of size {tuple(size)} "
                f"with padding {pads}."
            )
    return pads
