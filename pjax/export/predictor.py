"""Runs a packed network. This file needs NumPy and nothing else: copy it to where there is no JAX.

```python
from predictor import load

network = load("network.npz")
outputs = network(rows)
```

Numbers of few, evenly spaced levels are kept as *codes*. With bits `s_i = ±1` a code of `b` bits
stands for the odd number `c = Σ_i 2^i s_i`, and a level is `unit (c + offset)` with a whole offset.
The product of two rows of codes is then a sum of products of rows of bits, and two rows of `n` bits
that differ in `d` places have the product `n − 2d`: one exclusive or, and a count of ones. What
comes out is a whole number of units, which thresholds turn into the codes of the next layer.
"""

from __future__ import annotations

import functools
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

#: Of the file; another one is refused.
FORMAT = 1
#: Rows that are computed together, and rows of a product.
_ROWS, _PART = 256, 4096
_OLD_NUMPY = not hasattr(np, "bitwise_count")
_ONES = np.array([bin(i).count("1") for i in range(1 << 16)] if _OLD_NUMPY else [], np.uint8)


@dataclass(frozen=True)
class Grid:
    """Evenly spaced levels as `unit (c + offset)`, `c` odd, of so many bits."""

    unit: float
    offset: int
    bits: int

    @classmethod
    def of(cls, table: np.ndarray) -> Grid | None:
        """That of levels in ascending order; None if their offset is not whole."""
        levels = np.asarray(table, np.float64)
        bits = (len(levels) - 1).bit_length()
        unit = (levels[-1] - levels[0]) / (len(levels) - 1) / 2
        offset = levels[0] / unit + (1 << bits) - 1
        if abs(offset - round(offset)) > 1e-4:
            return None
        return cls(float(unit), round(offset), bits)

    def whole(self, codes: np.ndarray) -> np.ndarray:
        """Levels in units: `c + offset`."""
        return 2 * codes.astype(np.int32) - (1 << self.bits) + 1 + self.offset


@dataclass(frozen=True)
class Levels:
    """An array of a few levels: `table[codes]`, the table in ascending order."""

    codes: np.ndarray
    table: np.ndarray

    def numbers(self) -> np.ndarray:
        return self.table[self.codes]

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Levels:
        return replace(self, codes=function(self.codes))


@dataclass(frozen=True)
class Sums:
    """An array of whole numbers of units.

    **Attributes:**

    - `bound`: of their size.
    - `parity`: 0 if all are even, 1 if all are odd; None if neither is known.
    """

    counts: np.ndarray
    unit: float
    bound: int
    parity: int | None

    def numbers(self) -> np.ndarray:
        return (self.unit * self.counts).astype(np.float32)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Sums:
        return replace(self, counts=function(self.counts))


#: What a step computes.
Value = Levels | Sums | np.ndarray


def numbers(value: Value) -> np.ndarray:
    """A value as an ordinary array."""
    return value if isinstance(value, np.ndarray) else value.numbers()


def array_of(value: Value) -> np.ndarray:
    """The array that a value keeps."""
    if isinstance(value, np.ndarray):
        return value
    return value.codes if isinstance(value, Levels) else value.counts


def _mapped(value: Value, function: Callable[[np.ndarray], np.ndarray]) -> Value:
    return function(value) if isinstance(value, np.ndarray) else value.map(function)


class Weights:
    """The constant operand of a product: `[outputs, *taps, inputs]`.

    **Arguments:**

    - `table`, `codes`: its levels; None where it has too many, and `array` is given.
    """

    def __init__(self, array: Any, table: np.ndarray | None = None, codes: Any = None):
        self.table, self.codes = table, codes
        self.grid = None if table is None else Grid.of(table)
        self._array, self.shape = array, (array if codes is None else codes).shape

    @functools.cached_property
    def matrix(self) -> np.ndarray:
        """All as numbers, `[taps · inputs, outputs]`."""
        array = self._array if self.table is None else self.table[self.codes]
        return np.ascontiguousarray(array.reshape(len(array), -1).T)

    @functools.cached_property
    def planes(self) -> list[np.ndarray]:
        """Rows of words for each bit of the codes."""
        assert self.grid is not None
        rows = [p.reshape(len(p), -1) for p in bit_planes(self.codes, self.grid.bits)]
        return [_words(row) for row in rows]

    @functools.cached_property
    def whole(self) -> np.ndarray:
        """The sums over inputs of all levels in units, `[taps, outputs]`."""
        assert self.grid is not None
        sums = self.grid.whole(self.codes).sum(-1)
        return sums.reshape(len(sums), -1).T


def bit_planes(codes: np.ndarray, bits: int) -> list[np.ndarray]:
    """Each bit of codes, eight of the last axis in a byte."""
    return [np.packbits((codes >> bit) & 1, axis=-1, bitorder="little") for bit in range(bits)]


def _words(rows: np.ndarray) -> np.ndarray:
    """Rows of bytes as rows of words of 64 bits."""
    padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
    return np.ascontiguousarray(padded).view(np.uint64)


def count_ones(words: np.ndarray) -> np.ndarray:
    """The number of ones of each word."""
    if not _OLD_NUMPY:
        return np.bitwise_count(words)
    parts = np.ascontiguousarray(words).view(np.uint16).reshape(*words.shape, 4)
    return _ONES[parts].sum(-1, dtype=np.uint8)


def differences(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """In how many bits each row of words differs from each other row: `[left, right]`."""
    columns = np.ascontiguousarray(right.T)
    found = np.zeros((len(left), len(right)), np.int32)
    for start in range(0, len(left), _PART):
        part = found[start : start + _PART]
        for place, column in enumerate(columns):
            part += count_ones(left[start : start + _PART, place, None] ^ column)
    return found


@dataclass(frozen=True)
class Windows:
    """How windows lie along the axes between rows and channels.

    **Attributes:**

    - `sizes`, `strides`, `dilations`: for each axis.
    - `padding`: for each axis before and after it.
    """

    sizes: Sequence[int] = ()
    strides: Sequence[int] = ()
    dilations: Sequence[int] = ()
    padding: Sequence[Sequence[int]] = ()

    def of(self, x: np.ndarray, fill: Any = 0) -> np.ndarray:
        """`[rows, *places, *taps, channels]` of `[rows, *axes, channels]`."""
        if not self.sizes:
            return x
        x = np.pad(x, ((0, 0), *map(tuple, self.padding), (0, 0)), constant_values=fill)
        reach = [(n - 1) * d + 1 for n, d in zip(self.sizes, self.dilations, strict=True)]
        axes = tuple(range(1, 1 + len(reach)))
        view = np.lib.stride_tricks.sliding_window_view(x, reach, axes)  # pyright: ignore
        places = tuple(slice(None, None, stride) for stride in self.strides)
        taps = tuple(slice(None, None, dilation) for dilation in self.dilations)
        return np.moveaxis(view[(slice(None), *places, slice(None), *taps)], len(axes) + 1, -1)

    def inside(self, shape: Sequence[int]) -> np.ndarray:
        """Which taps of each place read an entry and no padding, `[*places, *taps]`."""
        return self.of(np.ones((1, *shape, 1), np.int32))[0, ..., 0]


def product(x: Value, weights: Weights, windows: Windows = Windows()) -> Value:
    """The product of `[rows, *axes, channels]` with weights: `[rows, *places, outputs]`."""
    grid = Grid.of(x.table) if isinstance(x, Levels) else None
    if isinstance(x, Levels) and grid is not None and weights.grid is not None:
        return _of_bits(x, grid, weights, weights.grid, windows)
    places, rows = _rows(windows.of(numbers(x).astype(np.float32, copy=False)), windows)
    return (rows @ weights.matrix).reshape(*places, weights.shape[0])


def _rows(array: np.ndarray, windows: Windows) -> tuple[tuple[int, ...], np.ndarray]:
    """The places of windows, and what is read at each as a row."""
    kept = 1 + len(windows.sizes) if windows.sizes else array.ndim - 1
    places, size = array.shape[:kept], math.prod(array.shape[kept:])
    return places, array.reshape(math.prod(places), size)


def _of_bits(x: Levels, grid: Grid, weights: Weights, other: Grid, windows: Windows) -> Sums:
    """The product of codes: xor, and a count of ones."""
    size = math.prod(weights.shape[1:])
    found = [_rows(windows.of(plane), windows) for plane in bit_planes(x.codes, grid.bits)]
    places, rows = found[0][0], [_words(row) for _, row in found]
    counts = np.zeros((len(rows[0]), weights.shape[0]), np.int32)
    for i, row in enumerate(rows):
        for j, column in enumerate(weights.planes):
            counts += (size - 2 * differences(row, column)) << (i + j)
    # Σ c d is found; wanted is Σ (c + o)(d + p) = Σ c d + o Σ (d + p) + p Σ c.
    counts += grid.offset * weights.whole.sum(0, dtype=np.int32)
    if other.offset:
        for i, row in enumerate(rows):
            ones = count_ones(row).sum(-1, dtype=np.int32)[:, None]
            counts += other.offset * ((2 * ones - size) << i)
    counts = counts.reshape(*places, weights.shape[0])
    lowest = int(grid.whole(np.zeros(1, np.uint8))[0])
    if any(map(any, windows.padding)):
        # Padding was read as the lowest level, and counts nothing.
        outside = 1 - windows.inside(x.codes.shape[1:-1])
        flat = outside.reshape(-1, len(weights.whole)) @ weights.whole
        counts -= lowest * flat.reshape(*places[1:], weights.shape[0]).astype(np.int32)
    assert weights.table is not None
    largest = [int(np.abs(g.whole(np.array([0, len(t) - 1]))).max())
               for g, t in ((grid, x.table), (other, weights.table))]  # fmt: skip
    return Sums(
        counts, grid.unit * other.unit, size * math.prod(largest),
        _parity(grid, other, windows, size, weights.shape[-1]),
    )  # fmt: skip


def _parity(grid: Grid, other: Grid, windows: Windows, size: int, channels: int) -> int | None:
    if (grid.offset + 1) * (other.offset + 1) % 2 == 0:
        return 0
    if not any(map(any, windows.padding)):
        return size % 2
    return 0 if channels % 2 == 0 else None


# Steps: from the values that they read, and their settings, to a value. Axis 0 is that of rows.

_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "max": np.maximum, "min": np.minimum, "neg": np.negative, "round": np.round,
}  # fmt: skip
_REDUCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "reduce_max": np.max, "reduce_min": np.min, "reduce_sum": np.sum,
}  # fmt: skip


def _levels(x: Value, *, limits: np.ndarray, table: Sequence[float], flip: Any = None) -> Levels:
    """The level above as many thresholds as a number is not below."""
    array = x.counts if isinstance(x, Sums) else numbers(x)
    if flip is not None:
        array = np.where(flip, -array, array)
    codes = np.zeros(array.shape, np.uint8)
    for limit in limits:
        codes += array >= limit
    return Levels(codes, np.asarray(table, np.float32))


def _product(x: Value, *, weights: Weights, axes: Sequence[int], shape: Sequence[int]) -> Value:
    def last(array: np.ndarray) -> np.ndarray:
        kept = array.ndim - len(axes)
        array = np.moveaxis(array, axes, range(kept, array.ndim))
        return array.reshape(*array.shape[:kept], math.prod(array.shape[kept:]))

    return _mapped(product(_mapped(x, last), weights), lambda a: a.reshape(*a.shape[:-1], *shape))


def _convolution(
    x: Value, *, weights: Weights, windows: Windows, to: Sequence[int], back: Sequence[int]
) -> Value:
    found = product(_mapped(x, lambda array: array.transpose(to)), weights, windows)
    return _mapped(found, lambda array: array.transpose(back))


def _select(which: Value, *cases: Value) -> np.ndarray:
    chosen = numbers(which).astype(bool)
    return np.where(chosen, *map(numbers, cases[::-1]))


def _concatenate(*parts: Value, axis: int) -> Value:
    first, rows = parts[0], max(len(array_of(part)) for part in parts)

    def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.broadcast_to(a, (rows, *a.shape[1:])) for a in arrays], axis)

    if isinstance(first, Levels) and all(
        isinstance(part, Levels) and np.array_equal(part.table, first.table) for part in parts
    ):
        return first.map(lambda _: joined(map(array_of, parts)))
    return joined(map(numbers, parts))


def _reduce(x: Value, *, name: str, axes: Sequence[int]) -> Value:
    if name != "reduce_sum":
        return _mapped(x, lambda array: _REDUCTIONS[name](array, axis=tuple(axes)))
    if isinstance(x, Sums):
        counts = np.asarray(np.sum(x.counts, axis=tuple(axes), dtype=np.int32))
        many = x.counts.size // max(counts.size, 1)
        return Sums(counts, x.unit, x.bound * many, None)
    return np.sum(numbers(x), axis=tuple(axes))


def _pool(x: Value, *, name: str, windows: Windows) -> Value:
    """Over windows along all axes but that of rows."""
    taps = tuple(range(-len(windows.sizes) - 1, -1))
    if name == "sum":
        return windows.of(numbers(x)[..., None]).sum(axis=taps)[..., 0]
    fill = 0 if isinstance(x, Levels) else -x.bound if isinstance(x, Sums) else -np.inf
    return _mapped(x, lambda array: windows.of(array[..., None], fill).max(axis=taps)[..., 0])


def _broadcast(x: Value, *, shape: Sequence[int], through: Sequence[int]) -> Value:
    def whole(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array.reshape(len(array), *through), (len(array), *shape))

    return _mapped(x, whole)


def _pad(x: Value, *, widths: Sequence[Sequence[int]], fill: float) -> Value:
    widths = [tuple(pair) for pair in widths]
    if isinstance(x, Levels) and fill in x.table:
        code = int(np.searchsorted(x.table, fill))
        return x.map(lambda codes: np.pad(codes, widths, constant_values=code))
    return np.pad(numbers(x), widths, constant_values=fill)


def _argmax(x: Value, *, axis: int, dtype: str) -> np.ndarray:
    return np.argmax(array_of(x), axis=axis).astype(dtype)


def _arithmetic(*operands: Value, name: str) -> np.ndarray:
    return _ARITHMETIC[name](*map(numbers, operands))


_STEPS: dict[str, Callable[..., Value]] = {
    "levels": _levels,
    "product": _product,
    "convolution": _convolution,
    "arithmetic": _arithmetic,
    "select": _select,
    "concatenate": _concatenate,
    "reduce": _reduce,
    "pool": _pool,
    "broadcast": _broadcast,
    "pad": _pad,
    "argmax": _argmax,
    "reshape": lambda x, *, shape: _mapped(x, lambda a: a.reshape(len(a), *shape)),
    "tile": lambda x, *, repeats: _mapped(x, lambda a: np.tile(a, repeats)),
    "transpose": lambda x, *, axes: _mapped(x, lambda a: a.transpose(axes)),
    "slice": lambda x, *, parts: _mapped(x, lambda a: a[tuple(slice(*p) for p in parts)]),
    "convert": lambda x, *, dtype: numbers(x).astype(dtype),
}


def part(arrays: Mapping[str, np.ndarray], place: Mapping[str, Any]) -> np.ndarray:
    """One of the arrays that lie in the file one after the other."""
    start, shape = place["start"], place["shape"]
    return arrays[place["dtype"]][start : start + math.prod(shape)].reshape(shape)


def settings_of(step: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The settings of a step, with arrays in the place of where they lie in the file."""

    def read(key: str, setting: Any) -> Any:
        if key == "windows":
            return Windows(**setting)
        if key == "weights" and "table" in setting:
            table, words = np.asarray(setting["table"], np.float32), part(arrays, setting)
            return Weights(None, table, unpacked(words, setting["of"], len(table)))
        if isinstance(setting, dict):
            array = part(arrays, setting)
            return Weights(array) if key == "weights" else array
        return setting

    return {key: read(key, step[key]) for key in step if key not in ("step", "of")}


def run(
    step: Mapping[str, Any],
    settings: Mapping[str, Any],
    values: Sequence[Value],
    arrays: Mapping[str, np.ndarray],
) -> Value:
    """The value of a step, from those before it."""

    def operand(of: Any) -> Value:
        if isinstance(of, int):
            return values[of]
        if not isinstance(of, dict):
            return np.asarray(of[0], np.float32)
        array = part(arrays, of)
        return Levels(array, np.asarray(of["table"], np.float32)) if "table" in of else array

    return _STEPS[step["step"]](*map(operand, step["of"]), **settings)


class Predictor:
    """A packed network, as a function of rows.

    **Attributes:**

    - `shape`, `dtype`: of one row.
    - `steps`: what is computed, one after the other.
    """

    def __init__(self, program: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        self.shape, self.dtype = tuple(program["shape"]), np.dtype(program["dtype"])
        self.steps: list[dict[str, Any]] = program["steps"]
        self._arrays, self._outputs = arrays, program["outputs"]
        self._settings = [settings_of(step, arrays) for step in self.steps]

    def __repr__(self) -> str:
        return f"Predictor(shape={self.shape}, dtype={self.dtype}, {len(self.steps)} steps)"

    def __call__(self, x: Any) -> Any:
        """The outputs for rows.

        **Arguments:**

        - `x`: `[rows, *shape]`.

        **Returns:** what the network returns: an array, or a tuple of arrays.

        **Raises:** `ValueError` for rows of another shape, or that are not finite.
        """
        x = np.asarray(x)
        if x.ndim == 0 or x.shape[1:] != self.shape:
            wanted = ", ".join(("rows", *map(str, self.shape)))
            raise ValueError(f"The network takes an array of shape ({wanted}), got {x.shape}.")
        if not np.all(np.isfinite(x)):
            raise ValueError("Some rows are not finite.")
        x = x.astype(self.dtype, copy=False)
        starts = range(0, max(len(x), 1), _ROWS)
        parts = zip(*(self._outputs_of(x[start : start + _ROWS]) for start in starts), strict=True)
        found = tuple(map(np.concatenate, parts))
        return found[0] if len(found) == 1 else found

    def _outputs_of(self, x: np.ndarray) -> list[np.ndarray]:
        values: list[Value] = [x]
        for step, settings in zip(self.steps, self._settings, strict=True):
            values.append(run(step, settings, values, self._arrays))
        return [numbers(values[output["of"]]).astype(output["dtype"]) for output in self._outputs]


def unpacked(words: np.ndarray, shape: Sequence[int], count: int) -> np.ndarray:
    """Codes of so many levels, from words with one bit of all after the other."""
    bits, size = (count - 1).bit_length(), math.prod(shape)
    found = np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little")
    planes = found[: bits * size].reshape(bits, size)
    codes = sum(plane << bit for bit, plane in enumerate(planes))
    return np.asarray(codes, np.uint8).reshape(shape)


def load(path: Any) -> Predictor:
    """The network in a file that `pjax.export.pack` has written.

    **Raises:** `ValueError` for another file.
    """
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        program = json.loads(arrays.pop("program").tobytes())
        found = program["format"]
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no packed network, or is damaged ({error}).") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, and this is a reader of {FORMAT}.")
    return Predictor(program, arrays)
