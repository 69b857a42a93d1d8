"""How operations that are more than elementwise become steps of the predictor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pjax.export import predictor
from pjax.export.predictor import Levels, Sums
from pjax.export.walk import ARITHMETIC, LEVELS, Handlers, PackedProduct, Walk, in_front
from pjax.program import Atom, Equation, read


def _binary(walk: Walk, equation: Equation) -> None:
    walk.set(equation, walk.of_numbers(equation), walk.row_of(equation))


def _convert(walk: Walk, equation: Equation) -> None:
    dtype = str(walk.program.dtype(equation.outputs[0]))
    _one(walk, equation, walk.row_of(equation), "convert", dtype=dtype)


def _one(walk: Walk, equation: Equation, row: int, step: str, **settings: Any) -> None:
    """A step that reads the first operand."""
    operand = walk.value(equation.inputs[0])
    walk.set(equation, walk.step(step, [operand], **settings), row)


def _weights(walk: Walk, array: np.ndarray) -> tuple[dict[str, Any], int]:
    """`[outputs, *taps, inputs]` in the file, and how many levels it has; 0 for numbers."""
    table, codes = levels_of(array)
    if table is None or codes is None:
        return walk.place(array.astype(np.float32)), 0
    place = walk.place(packed(codes, len(table)))
    return {**place, "table": table.tolist(), "of": list(codes.shape)}, len(table)


def _product(
    walk: Walk, equation: Equation, step: str, x: Atom, array: np.ndarray, **settings: Any
) -> int:
    """A step with weights."""
    number = walk.value(x)
    weights, levels = _weights(walk, array)
    made = walk.step(step, [number], weights=weights, **settings)
    value, bits = walk.values[made], 0
    if isinstance(value, Sums):
        given = walk.values[number]
        assert isinstance(given, Levels)
        bits = (len(given.table) - 1).bit_length()
        walk.require(value.bound < 1 << 31, equation, "has sums beyond 32 bits")
    walk.products.append(PackedProduct(equation.source, array.shape, levels, bits))
    return made


def _dense(walk: Walk, equation: Equation) -> None:
    contract, batch = equation.params["dimension_numbers"]
    walk.require(not any(batch), equation, "is a product of stacks of matrices")
    place = 0 if equation.inputs[0] in walk.row else 1
    x, other = equation.inputs[place], equation.inputs[1 - place]
    walk.require(other not in walk.row, equation, "multiplies two values of rows")
    row, array = walk.row_of(equation), np.asarray(read(walk.known, other))
    axes, others = list(contract[place]), list(contract[1 - place])
    walk.require(row not in axes, equation, "mixes rows")
    of_x = [axis for axis in range(len(walk.program.shape(x))) if axis not in axes]
    free = [axis for axis in range(array.ndim) if axis not in others]
    matrix = array.transpose(*free, *others)
    shape = [array.shape[axis] for axis in free]
    matrix = matrix.reshape(math.prod(shape), math.prod(array.shape[a] for a in others))
    order = in_front(row, len(walk.program.shape(x)))
    axes = [order.index(axis) for axis in axes]
    made = _product(walk, equation, "product", x, matrix, axes=axes, shape=shape)
    rest = len(of_x) - 1
    if place == 1 and rest:  # the axes of the weights come first
        turned = [0, *range(1 + rest, 1 + rest + len(free)), *range(1, 1 + rest)]
        made = walk.step("transpose", [made], axes=turned)
    walk.set(equation, made, of_x.index(row) + place * len(free))


def _convolution(walk: Walk, equation: Equation) -> None:
    params = equation.params
    x, kernel = equation.inputs
    numbers = params["dimension_numbers"]
    plain = params["feature_group_count"] == params["batch_group_count"] == 1
    plain = plain and set(params["lhs_dilation"]) <= {1}
    walk.require(plain, equation, "has groups or a dilated input")
    walk.require(kernel not in walk.row, equation, "has a kernel that depends on rows")
    walk.require(numbers.lhs_spec[0] == walk.row_of(equation), equation, "mixes rows")
    walk.require(min(map(min, params["padding"])) >= 0, equation, "crops its input")
    (of, channels, *taps), (_, *from_) = numbers.rhs_spec, numbers.lhs_spec
    array = np.asarray(read(walk.known, kernel)).transpose(of, *taps, channels)
    windows = _windows(array.shape[1:-1], params["window_strides"], params["rhs_dilation"],
                       params["padding"])  # fmt: skip
    order = walk.order(equation)
    to = [0, *(order.index(axis) for axis in (*from_[1:], from_[0]))]
    row, channels, *places = numbers.out_spec
    found = [row, *places, channels]
    back = [found.index(axis) for axis in in_front(row, len(found))]
    made = _product(walk, equation, "convolution", x, array, windows=windows, to=to, back=back)
    walk.set(equation, made, row)


def _reshape(walk: Walk, equation: Equation) -> None:
    before, after = (walk.program.shape(a) for a in (equation.inputs[0], equation.outputs[0]))
    row = walk.row_of(equation)
    front = math.prod(before[:row])
    rows = [axis for axis, size in enumerate(after)
            if size == walk.rows and math.prod(after[:axis]) == front]  # fmt: skip
    walk.require(bool(rows), equation, "does not keep rows apart")
    shape = [size for axis, size in enumerate(after) if axis != rows[0]]
    _one(walk, equation, rows[0], "reshape", shape=shape)


def _broadcast(walk: Walk, equation: Equation) -> None:
    shape = walk.program.shape(equation.outputs[0])
    axes, before = equation.params["broadcast_dimensions"], walk.program.shape(
        equation.inputs[0])  # fmt: skip
    row = axes[walk.row_of(equation)]
    sizes = dict(zip(axes, before, strict=True))
    others = in_front(row, len(shape))[1:]
    through = [sizes.get(axis, 1) for axis in others]
    _one(walk, equation, row, "broadcast", shape=[shape[a] for a in others], through=through)


def _tile(walk: Walk, equation: Equation) -> None:
    repeats, (row, *others) = equation.params["reps"], walk.order(equation)
    walk.require(repeats[row] == 1, equation, "adds rows")
    _one(walk, equation, row, "tile", repeats=[1, *(repeats[axis] for axis in others)])


def _transpose(walk: Walk, equation: Equation) -> None:
    turned, order = list(equation.params["permutation"]), walk.order(equation)
    row = turned.index(order[0])
    axes = [order.index(turned[axis]) for axis in in_front(row, len(order))]
    _one(walk, equation, row, "transpose", axes=axes)


def _slice(walk: Walk, equation: Equation) -> None:
    start, stop = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(start)
    row, *others = walk.order(equation)
    whole = (start[row], stop[row], strides[row]) == (0, walk.rows, 1)
    walk.require(whole, equation, "takes some of the rows")
    parts = [[start[axis], stop[axis], strides[axis]] for axis in others]
    _one(walk, equation, row, "slice", parts=[[None], *parts])


def _concatenate(walk: Walk, equation: Equation) -> None:
    row = walk.row_of(equation)
    order = in_front(row, len(walk.program.shape(equation.outputs[0])))
    axis = order.index(equation.params["dimension"])
    walk.require(axis != 0, equation, "adds rows")
    operands: list[Any] = [
        walk.value(atom) if atom in walk.row else None for atom in equation.inputs
    ]
    given = [walk.values[number] for number in operands if number is not None]
    tables = {tuple(v.table.tolist()) if isinstance(v, Levels) else () for v in given}
    for place, atom in enumerate(equation.inputs):
        if atom not in walk.row:
            walk.constant(atom, equation)  # rows are equal, or it is an error
            array = np.moveaxis(np.asarray(read(walk.known, atom)), row, 0)[:1]
            operands[place] = _joined(walk, array.astype(np.float32), tables)
    walk.set(equation, walk.step("concatenate", operands, axis=axis), row)


def _joined(walk: Walk, array: np.ndarray, tables: set[tuple[float, ...]]) -> dict[str, Any]:
    """A constant beside others: as codes where all are of these levels."""
    table = np.asarray(next(iter(tables)) if len(tables) == 1 else (), np.float32)
    if not len(table) or not np.all(np.isin(array, table)):
        return walk.place(array)
    codes = np.searchsorted(table, array).astype(np.uint8)
    return {**walk.place(codes), "table": table.tolist()}


def _pad(walk: Walk, equation: Equation) -> None:
    config = equation.params["padding_config"]
    row, *others = walk.order(equation)
    plain = all(low >= 0 and high >= 0 and inner == 0 for low, high, inner in config)
    walk.require(plain, equation, "crops, or pads between entries")
    walk.require(config[row] == (0, 0, 0), equation, "adds rows")
    _, fill = equation.inputs
    walk.require(fill not in walk.row, equation, "pads with a value of rows")
    widths = [[0, 0], *([int(config[axis][0]), int(config[axis][1])] for axis in others)]
    _one(walk, equation, row, "pad", widths=widths, fill=float(walk.constant(fill, equation)))


def _reduce(walk: Walk, equation: Equation) -> None:
    order, axes = walk.order(equation), equation.params["axes"]
    walk.require(order[0] not in axes, equation, "mixes rows")
    row = order[0] - sum(axis < order[0] for axis in axes)
    places = [order.index(axis) for axis in axes]
    _one(walk, equation, row, "reduce", name=equation.primitive.name, axes=places)


def _pool(walk: Walk, equation: Equation) -> None:
    params, (row, *others) = equation.params, walk.order(equation)
    names = ("window_dimensions", "window_strides", "window_dilation", "padding")
    sizes, strides, dilations, padding = (params[name] for name in names)
    alone = (sizes[row], strides[row], tuple(padding[row])) == (1, 1, (0, 0))
    walk.require(alone, equation, "mixes rows")
    walk.require(set(params["base_dilation"]) <= {1}, equation, "has a dilated input")
    windows = _windows(
        *([part[a] for a in others] for part in (sizes, strides, dilations, padding))
    )
    shape = walk.program.shape(equation.inputs[0])
    inside = predictor.Windows(**windows).inside([shape[axis] for axis in others])
    some = inside.any(axis=tuple(range(-len(others), 0))).all()
    walk.require(bool(some), equation, "has windows of padding alone")
    name = equation.primitive.name.removeprefix("reduce_window_")
    _one(walk, equation, row, "pool", name=name, windows=windows)


def _argmax(walk: Walk, equation: Equation) -> None:
    order, (axis,) = walk.order(equation), equation.params["axes"]
    walk.require(axis != order[0], equation, "mixes rows")
    dtype = str(np.dtype(equation.params["index_dtype"]))
    row = order[0] - (axis < order[0])
    _one(walk, equation, row, "argmax", axis=order.index(axis), dtype=dtype)


def _windows(sizes: Any, strides: Any, dilations: Any, padding: Any) -> dict[str, Any]:
    """The settings of windows, as lists."""
    return {
        "sizes": list(sizes),
        "strides": list(strides),
        "dilations": list(dilations),
        "padding": [list(pair) for pair in padding],
    }


HANDLERS: Handlers = {
    **dict.fromkeys((*ARITHMETIC, "clamp", "select_n"), _binary),
    "convert_element_type": _convert,
    "dot_general": _dense,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(("reshape", "squeeze", "expand_dims"), _reshape),
    "broadcast_in_dim": _broadcast,
    "tile": _tile,
    "transpose": _transpose,
    "slice": _slice,
    "concatenate": _concatenate,
    "pad": _pad,
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_sum"), _reduce),
    **dict.fromkeys(("reduce_window_max", "reduce_window_sum"), _pool),
    "argmax": _argmax,
}


def packed(codes: np.ndarray, count: int) -> np.ndarray:
    """Codes of so many levels as words of 32 bits, one bit of all after the other."""
    bits = [(codes.ravel() >> bit) & 1 for bit in range((count - 1).bit_length())]
    found = np.packbits(np.concatenate(bits).astype(np.uint8), bitorder="little")
    return np.pad(found, (0, -len(found) % 4)).view("<u4")


def levels_of(array: np.ndarray) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The evenly spaced levels of an array, at most 16, and the level of each entry; None where it
    has others.
    """
    found = np.unique(array.astype(np.float32))
    if len(found) > LEVELS or not np.all(np.isfinite(found)):
        return None, None
    if len(found) == 1:
        size = abs(found[0]) or np.float32(1)
        table = np.array([-size if found[0] else 0, size], np.float32)
        return table, np.searchsorted(table, array.astype(np.float32)).astype(np.uint8)
    wide = found.astype(np.float64)
    spacing = np.min(np.diff(wide))
    places = (wide - wide[0]) / spacing
    whole = np.round(places).astype(int)
    if whole[-1] >= LEVELS or np.max(np.abs(places - whole)) > 1e-3:
        return None, None
    spacing = (wide[-1] - wide[0]) / whole[-1]
    table = (wide[0] + spacing * np.arange(whole[-1] + 1)).astype(np.float32)
    table[whole] = found
    return table, np.searchsorted(table, array.astype(np.float32)).astype(np.uint8)
