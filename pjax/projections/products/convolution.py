"""Convolution as a bilinear operation: `jax.lax.conv_general_dilated` with all that it takes.

Along each spatial axis, output `o` reads with tap `k` of the kernel the input `i` for which
`lhs_dilation · i = stride · o + rhs_dilation · k − padding`, if there is one. What a tap reads
beside that, padding and the zeros between dilated entries, is a constant: it is no copy of
anything, and moves nothing. So entries near a border have fewer copies than others, entries that a
stride skips have none, and slices near a border are shorter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from pjax.backend import compat
from pjax.projections.products.operation import Bilinear, inverse


class _Axis(NamedTuple):
    """One spatial axis.

    **Attributes:**

    - `index`: `[out, tap]`, the input that is read (any, where none is).
    - `taps`: `[out, tap]`, 1 where an input is read.
    - `inputs`: `[out, in]`, the number of taps (0 or 1) by which an output reads an input.
    """

    index: np.ndarray
    taps: np.ndarray
    inputs: np.ndarray


@dataclass(frozen=True)
class Convolution(Bilinear):
    """`B(left, right) = jax.lax.conv_general_dilated(left, right, …)`; `right` is the kernel.

    Arguments:
        left_shape, right_shape: the shapes of the operands.
        window_strides, padding, lhs_dilation, rhs_dilation: one entry for each spatial axis;
            of `padding` a pair, which may be negative.
        dimension_numbers: `(lhs_spec, rhs_spec, out_spec)` as in `jax.lax.ConvDimensionNumbers`.
        feature_group_count, batch_group_count: as in `jax.lax.conv_general_dilated`.
        precision, preferred_element_type: as there; used by the transposes too.

    Raises:
        ValueError: if a slice has no entry: the output is a constant.
    """

    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    window_strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    dimension_numbers: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    feature_group_count: int = 1
    batch_group_count: int = 1
    precision: Any = None
    preferred_element_type: Any = None

    def __post_init__(self) -> None:
        if self.slice_length == 0:
            raise ValueError(
                f"`conv_general_dilated` of shapes {self.left_shape} and {self.right_shape} sums "
                "over no entries, so its output does not depend on its operands."
            )

    # The operands and the output with their axes in one order: [group, batch, output channel,
    # input channel, *spatial], without the axes that one of them does not have.

    @property
    def _groups(self) -> int:
        return self.feature_group_count * self.batch_group_count

    @property
    def _sizes(self) -> tuple[int, int, int, int]:
        """Groups, and in each group examples, output channels and input channels."""
        lhs, rhs, _ = self.dimension_numbers
        groups = self._groups
        return (
            groups,
            self.left_shape[lhs[0]] // self.batch_group_count,
            self.right_shape[rhs[0]] // groups,
            self.right_shape[rhs[1]],
        )

    @property
    def _axes(self) -> tuple[_Axis, ...]:
        lhs, rhs, _ = self.dimension_numbers
        return tuple(
            _axis(self.left_shape[i], self.right_shape[k], *rest)
            for i, k, *rest in zip(
                lhs[2:],
                rhs[2:],
                self.window_strides,
                self.padding,
                self.lhs_dilation,
                self.rhs_dilation,
                strict=True,
            )
        )

    @property
    def _taps(self) -> tuple[int, ...]:
        return tuple(self.right_shape[axis] for axis in self.dimension_numbers[1][2:])

    @property
    def _spatial(self) -> tuple[int, ...]:
        return tuple(len(axis.taps) for axis in self._axes)

    @property
    def output_shape(self) -> tuple[int, ...]:
        groups, batch, channels, _ = self._sizes
        shape = (batch, groups * channels, *self._spatial)
        return tuple(shape[place] for place in inverse(self.dimension_numbers[2]))

    @property
    def slice_length(self) -> int:
        return self._sizes[3] * math.prod(self._taps)

    @property
    def slice_lengths(self) -> Any:
        channels = self._sizes[3]
        lengths = channels * _outer([axis.taps.sum(1) for axis in self._axes])
        return _constant(_placed(lengths, self.dimension_numbers[2]))

    @property
    def left_copies(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        counts = self._sizes[2] * _outer([axis.inputs.sum(0) for axis in self._axes])
        return _constant(_placed(counts, self.dimension_numbers[0]))

    @property
    def right_copies(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        counts = self._sizes[1] * _outer([axis.taps.sum(0) for axis in self._axes])
        return _constant(_placed(counts, self.dimension_numbers[1]))

    def _split_left(self, left: Array) -> Array:
        """`[group, batch, input channel, *in]`."""
        left = jnp.transpose(left, self.dimension_numbers[0])
        batch, channels, *spatial = left.shape
        if self.feature_group_count > 1:
            groups = self.feature_group_count
            left = left.reshape(batch, groups, channels // groups, *spatial)
            return jnp.moveaxis(left, 1, 0)
        return left.reshape(self.batch_group_count, -1, channels, *spatial)

    def _join_left(self, left: Array) -> Array:
        """The inverse of `_split_left`, also of arrays with one example or channel for all."""
        groups, batch, _, channels = self._sizes
        spatial = left.shape[3:]
        if groups > 1:
            left = jnp.broadcast_to(left, (groups, batch, channels, *spatial))
        if self.feature_group_count > 1:
            left = jnp.moveaxis(left, 0, 1).reshape(batch, groups * channels, *spatial)
        else:
            left = left.reshape(-1, *left.shape[2:])
        return jnp.transpose(left, inverse(self.dimension_numbers[0]))

    def _split_right(self, right: Array) -> Array:
        """`[group, output channel, input channel, *taps]`."""
        right = jnp.transpose(right, self.dimension_numbers[1])
        return right.reshape(self._groups, -1, *right.shape[1:])

    def _join_right(self, right: Array) -> Array:
        right = right.reshape(-1, *right.shape[2:])
        return jnp.transpose(right, inverse(self.dimension_numbers[1]))

    def _split_output(self, output: Array) -> Array:
        """`[group, batch, output channel, *out]`."""
        output = jnp.transpose(output, self.dimension_numbers[2])
        batch, channels, *spatial = output.shape
        output = output.reshape(batch, self._groups, channels // self._groups, *spatial)
        return jnp.moveaxis(output, 1, 0)

    def _join_output(self, output: Array) -> Array:
        """The inverse of `_split_output`; axes behind `[*out]` stay behind."""
        groups, _, channels, _ = self._sizes
        if groups > 1:
            shape = (groups, output.shape[1], channels, *output.shape[3:])
            output = jnp.broadcast_to(output, shape)
        output = jnp.moveaxis(output, 0, 1)
        output = output.reshape(output.shape[0], -1, *output.shape[3:])
        order = inverse(self.dimension_numbers[2])
        return jnp.transpose(output, (*order, *range(len(order), output.ndim)))

    # The operation and its transposes.

    def _as_given(self, left: Array, right: Array) -> Array:
        return lax.conv_general_dilated(
            left,
            right,
            self.window_strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            lax.ConvDimensionNumbers(*self.dimension_numbers),
            self.feature_group_count,
            self.batch_group_count,
            self.precision,
            self.preferred_element_type,
        )

    def __call__(self, left, right):
        return _channels_last(self._as_given, left, right)

    def transpose_left(self, cotangent, right):
        def transposed(cotangent: Array, right: Array) -> Array:
            operand = jax.ShapeDtypeStruct(self.left_shape, right.dtype)
            apply = jax.linear_transpose(lambda left: self._as_given(left, right), operand)
            return apply(cotangent)[0]

        return _channels_last(transposed, cotangent, right)

    def transpose_right(self, cotangent, left):
        def transposed(cotangent: Array, left: Array) -> Array:
            operand = jax.ShapeDtypeStruct(self.right_shape, left.dtype)
            apply = jax.linear_transpose(lambda right: self._as_given(left, right), operand)
            return apply(cotangent)[0]

        return _channels_last(transposed, cotangent, left)

    # Sums over slices and readers factor over the spatial axes.

    def left_energy(self, left):
        summed = jnp.sum(self._split_left(left), axis=2, keepdims=True)
        return self._join_output(_along_axes(summed, [axis.inputs for axis in self._axes]))

    def right_energy(self, right):
        summed = jnp.sum(self._split_right(right), axis=2)[:, None]
        return self._join_output(_along_axes(summed, [axis.taps for axis in self._axes]))

    def left_sum(self, cotangent):
        summed = jnp.sum(self._split_output(cotangent), axis=2, keepdims=True)
        return self._join_left(_along_axes(summed, [axis.inputs.T for axis in self._axes]))

    def right_sum(self, cotangent):
        summed = jnp.sum(self._split_output(cotangent), axis=1)[:, :, None]
        return self._join_right(_along_axes(summed, [axis.taps.T for axis in self._axes]))

    # The copies for real.

    # Slices are ordered by taps, then input channels: so the last thing that forms them gathers,
    # and what broadcasts them to the copies reads them in order.

    def lift_left(self, left):
        return self._broadcast(self._patches(left))

    def lift_right(self, right):
        return self._broadcast(self._kernels(right))

    def _broadcast(self, shared: Array) -> Array:
        return jnp.broadcast_to(shared, (*self.output_shape, shared.shape[-1]))

    def _patches(self, left: Array) -> Array:
        """`[*output, slice]`, with one output channel for all of a group."""
        # A row of input channels for each place, and one of zeros for the taps that read constants.
        left = jnp.moveaxis(self._split_left(left), 2, -1)
        left = left.reshape(math.prod(left.shape[:2]), -1, left.shape[-1])
        left = jnp.pad(left, ((0, 0), (0, 1), (0, 0)))
        # One index over examples too: XLA would put them behind the places.
        rows = left.shape[1] * np.arange(left.shape[0], dtype=np.int32)
        index = jnp.asarray(rows)[:, None] + self._places.reshape(1, -1).astype(np.int32)
        patches = left.reshape(-1, left.shape[-1]).at[index].get(mode="promise_in_bounds")
        groups, batch, _, channels = self._sizes
        shape = (groups, batch, 1, *self._spatial, math.prod(self._taps) * channels)
        return self._join_output(patches.reshape(shape))

    def _kernels(self, right: Array) -> Array:
        """`[*output, slice]`, with one example for all."""
        right = jnp.moveaxis(self._split_right(right), 2, -1)[:, None]
        right = jnp.expand_dims(right, tuple(range(3, 3 + len(self._axes))))
        lifted = right * jnp.asarray(self._read, right.dtype)[..., None]
        return self._join_output(lifted.reshape(*lifted.shape[: 3 + len(self._axes)], -1))

    @property
    def _read(self) -> np.ndarray:
        """`[*out, *taps]`: 1 where a tap reads an entry."""
        return _interleaved([axis.taps for axis in self._axes], np.multiply)

    @property
    def _places(self) -> np.ndarray:
        """`[*out, *taps]`: the input that is read, of all in a row; behind them, where none is."""
        sizes = [axis.inputs.shape[1] for axis in self._axes]
        strides = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
        steps = [axis.index * stride for axis, stride in zip(self._axes, strides, strict=True)]
        return np.where(self._read > 0, _interleaved(steps, np.add), math.prod(sizes))

    def mask_slices(self, copies):
        read = self._read
        if read.all():
            return copies
        lengths = (*self._spatial, *self._taps, self._sizes[3])
        mask = np.broadcast_to(read[..., None], lengths).reshape(1, 1, 1, *self._spatial, -1)
        return copies * self._join_output(jnp.asarray(mask, copies.dtype))

    def lower_left(self, copies):
        operand = jax.ShapeDtypeStruct(self.left_shape, copies.dtype)
        return jax.linear_transpose(self.lift_left, operand)(copies)[0]

    def lower_right(self, copies):
        operand = jax.ShapeDtypeStruct(self.right_shape, copies.dtype)
        if self._groups > 1:
            return jax.linear_transpose(self.lift_right, operand)(copies)[0]
        # As a product: a sum over examples, the first axis, took ten times as long.
        batch = self.dimension_numbers[2][0]
        ones = jnp.ones((1, self._sizes[1]), copies.dtype)
        summed = jnp.tensordot(ones, copies, ((1,), (batch,)), precision="highest")
        summed = jnp.moveaxis(summed, 0, batch)
        return jax.linear_transpose(self._kernels, operand)(summed)[0]

    def with_one_row(self, side: str) -> Convolution:
        """The operation with one example (or one output channel) of a side in each group: all of
        them see the same linear map.
        """
        lhs, rhs, _ = self.dimension_numbers
        left, right = list(self.left_shape), list(self.right_shape)
        if side == "left":
            left[lhs[0]] = self.batch_group_count
        else:
            right[rhs[0]] = self._groups
        return replace(self, left_shape=tuple(left), right_shape=tuple(right))


def _channels_last(fn: Callable[[Array, Array], Array], *operands: Array) -> Array:
    """`fn`, with every convolution in it on arrays whose channels are last.

    Others XLA brings into this form on a CPU, but not in loops: there they are compiled to plain
    loops, tens of times slower.
    """
    jaxpr, consts = compat.open_jaxpr(jax.make_jaxpr(fn)(*operands))
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, operands, strict=True))
    for equation in jaxpr.eqns:
        inputs = [
            atom.val if isinstance(atom, compat.Literal) else values[atom]
            for atom in equation.invars
        ]
        if equation.primitive is lax.conv_general_dilated_p:
            left, right = inputs
            results = [_convolved(left, right, equation.params)]
        else:
            results = compat.bind(equation, inputs)
        values.update(zip(equation.outvars, results, strict=True))
    return values[jaxpr.outvars[0]]


def _convolved(left: Array, right: Array, params: Mapping[str, Any]) -> Array:
    lhs, rhs, out = params["dimension_numbers"]
    count = len(lhs) - 2
    spatial = tuple(range(count))
    behind = tuple(axis + 1 for axis in spatial)
    last = (0, count + 1, *behind)
    numbers = lax.ConvDimensionNumbers(last, (count + 1, count, *spatial), last)
    found = lax.conv_general_dilated_p.bind(
        jnp.transpose(left, (lhs[0], *lhs[2:], lhs[1])),
        jnp.transpose(right, (*rhs[2:], rhs[1], rhs[0])),
        **{**params, "dimension_numbers": numbers},
    )
    return jnp.transpose(found, inverse((out[0], *out[2:], out[1])))


@functools.lru_cache(maxsize=1024)
def _axis(size: int, taps: int, stride: int, padding: tuple[int, int], lhs: int, rhs: int) -> _Axis:
    dilated = max((size - 1) * lhs + 1, 0) if size else 0
    span = dilated + sum(padding) - ((taps - 1) * rhs + 1)
    out = max(span // stride + 1, 0)
    place = stride * np.arange(out)[:, None] + rhs * np.arange(taps)[None, :] - padding[0]
    valid = (place >= 0) & (place < dilated) & (place % lhs == 0)
    index = np.where(valid, place // lhs, 0)
    inputs = np.zeros((out, size))
    rows, columns = np.nonzero(valid)
    np.add.at(inputs, (rows, index[rows, columns]), 1)
    return _Axis(index, valid.astype(np.float64), inputs)


def _interleaved(factors: Sequence[np.ndarray], join: Callable[..., np.ndarray]) -> np.ndarray:
    """`[out, tap]` of each axis joined to `[*out, *taps]`."""
    count, found = len(factors), np.asarray(join.identity)  # pyright: ignore
    for place, factor in enumerate(factors):
        shape = [1] * (2 * count)
        shape[place], shape[count + place] = factor.shape
        found = join(found, factor.reshape(shape))
    return found


def _outer(factors: Sequence[np.ndarray]) -> np.ndarray:
    found = np.ones(())
    for factor in factors:
        found = np.multiply.outer(found, factor)
    return found


def _placed(spatial: np.ndarray, spec: tuple[int, ...]) -> np.ndarray:
    """An array over the spatial axes, broadcasting to an operand."""
    return np.transpose(spatial[None, None], inverse(spec))


def _constant(counts: np.ndarray) -> Any:
    """A number where all are the same."""
    if counts.size and (counts == counts.flat[0]).all():
        return int(counts.flat[0])
    return counts.astype(np.int64)


def _along_axes(array: Array, matrices: Sequence[np.ndarray]) -> Array:
    """Each matrix applied to one of the axes from the third on."""
    apply: Callable[..., Array] = functools.partial(jnp.matmul, precision="highest")
    for place, matrix in enumerate(matrices):
        moved = jnp.moveaxis(array, 3 + place, -1)
        moved = apply(moved, jnp.asarray(matrix.T, array.dtype))
        array = jnp.moveaxis(moved, -1, 3 + place)
    return array
