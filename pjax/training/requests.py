"""One solve for each parameter, over all its readers and a fading memory of batches.

From a problem whose sweep has found the force on every node's output to a move of every parameter.
For each unit (see `pjax.training.readers`):

1. The force on what its readers make of it becomes a *request* of a fixed size: `R = a G` with `a`
   such that the layer's output would move by a share of its size, measured against the largest
   force so far.
2. The memory takes in what this batch asks, `M ← μ M + (1 − μ) XᵀR/N`, and from time to time the
   rows, `C ← β C + (1 − β) XᵀX/N`, by its largest eigenvectors.
3. The move is `(C + ρ)⁻¹ M`, the least squares of what the recent batches ask together: what they
   do not agree on cancels in `M`. Its columns are equalised, so that weak outputs are moved too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pjax.layer import LayerSum
from pjax.problem import Problem, State
from pjax.projections import spectrum
from pjax.projections.spectrum import Spectrum
from pjax.training.readers import Matrix, Reader, Unit, Units


@dataclass(frozen=True)
class Requests:
    """The constants of the rule; one setting for all networks.

    **Attributes:**

    - `size`: of a request: all layers together are asked to move by this share of their outputs.
        The output is measured as the geometric mean of its size now and in the first batch, so that
        growth does not feed itself.
    - `memory`: μ, of requests.
    - `rows_memory`: β, of input rows, for each batch.
    - `every`: the rows are taken in every so many batches, and in each of the first ones.
    - `damping`: κ, of the noise of the requests, see `_damping`.
    - `rank`: how many directions of the inputs are told apart.
    - `output_rank`: and of the outputs.
    - `equalise`: δ, how far outputs are equalised: the smaller the more.
    - `forget`: of the largest force so far, kept from batch to batch.
    - `threshold_size`: of what only thresholds read, in place of the share of `size`: the loss sees
        which side of a threshold an output is on, and not its size.
    - `threshold_memory`: of these requests, in place of `memory`.
    - `threshold_rows`: where thresholds make the inputs, in place of κ times the length of a row.
    """

    size: float = 1.2
    memory: float = 0.8
    rows_memory: float = 0.95
    every: int = 4
    damping: float = 0.2
    rank: int = 32
    output_rank: int = 16
    equalise: float = 0.1
    forget: float = 0.999
    threshold_size: float = 3.0
    threshold_memory: float = 0.9
    threshold_rows: float = 25.0


class UnitMemory(NamedTuple):
    """What is kept of the batches for one unit.

    **Attributes:**

    - `asked`: `M`, in the shape of the unit.
    - `inputs`: `C`: a spectrum for each block of its matrix, or a diagonal in the unit's shape.
    - `outputs`: of the forces, a spectrum for each block; None where nothing is equalised.
    - `force`: the largest mean force on its readers so far.
    - `output`: how large its readers' outputs were in the first batch.
    - `noise`: `|m − M|²` of a batch's request `m`, over the mean square of its rows.
    """

    asked: Array
    inputs: Spectrum | Array
    outputs: Spectrum | None
    force: Array
    output: Array
    noise: Array


Memory = tuple[UnitMemory, ...]

#: Products of the inputs in the first batch.
_FIRST_ITERATIONS = 3
#: An output below this share of the input is one that begins at zero.
_NOTHING = 1e-3
#: Of the noise, from batch to batch.
_NOISE_MEMORY = 0.9


class _Reading(NamedTuple):
    """One reader in one batch: its output, the force on it, and which places are asked."""

    output: Array
    force: Array
    asked: Array


def empty(problem: Problem, units: Units, settings: Requests) -> Memory:
    """The memory before the first batch."""
    found = []
    for unit in units.units:
        value = _value(problem, unit)
        dtype = value.dtype
        matrix = unit.matrix
        outputs = None
        if matrix is not None:
            blocks, rows, columns = matrix.shape
            inputs: Any = spectrum.empty(rows, settings.rank, dtype, (blocks,))
            outputs = spectrum.empty(columns, settings.output_rank, dtype, (blocks,))
        else:
            inputs = jnp.zeros(value.shape, dtype)
            if value.ndim > 1:
                outputs = spectrum.empty(
                    value.shape[-1], settings.output_rank, dtype, (1,)
                )
        zero = jnp.zeros((), dtype)
        found.append(UnitMemory(jnp.zeros(value.shape, dtype), inputs, outputs, zero, zero, zero))
    return tuple(found)


def _value(problem: Problem, unit: Unit) -> Array:
    output = problem.graph.nodes[unit.node].output
    assert output is not None
    return problem.values[output]


def moves(
    problem: Problem,
    units: Units,
    state: State,
    forces: Mapping[int, Array],
    memory: Memory,
    count: Array,
    settings: Requests,
) -> tuple[dict[int, Array], Memory]:
    """How far each unit moves, by the index of its node, and the memory to go on with.

    **Arguments:**

    - `problem`: of the batch, with parameters at rest.
    - `state`: after a sweep.
    - `forces`: on the output of each node that reads a unit.
    - `memory`, `count`: of the batches before, and how many there were.
    """
    unit_forces = problem.node_forces([unit.node for unit in units.units], state)
    readings = [
        [_reading(problem, unit, reader, state, forces) for reader in unit.readers]
        for unit in units.units
    ]
    # Each reading of a layer once, though a weight and its bias both have it.
    squares: dict[int, dict[Any, tuple[Array, Array, Array]]] = {}
    for unit, found in zip(units.units, readings, strict=True):
        layer = squares.setdefault(unit.layer, {})
        for reader, reading in zip(unit.readers, found, strict=True):
            node = problem.graph.slots[reader.slot].node
            key = (node,) if reader.kind != "entries" else (node, reader.slot, unit.node)
            if key not in layer:
                places = reading.asked
                layer[key] = (
                    jnp.sum(jnp.square(reading.output) * places),
                    jnp.sum(jnp.square(reading.force)),
                    jnp.sum(places) * (reading.output.size / places.size),
                )
    refresh = (count < settings.every) | (count % settings.every == 0)
    rows = [jnp.maximum(sum(jnp.sum(r.asked) for r in found), 1) for found in readings]
    moments = [
        jax.lax.cond(
            refresh,
            functools.partial(
                _renew, problem, unit, found, unit_forces[unit.node], number, count, settings
            ),
            lambda k: (k.inputs, k.outputs),
            kept,
        )
        for unit, found, number, kept in zip(units.units, readings, rows, memory, strict=True)
    ]
    input_sizes: dict[int, Array] = {}
    for unit, (inputs, _) in zip(units.units, moments, strict=True):
        if unit.matrix is not None:
            blocks, length, _ = unit.matrix.shape
            input_sizes[unit.layer] = jnp.sqrt(jnp.sum(inputs.trace) / (blocks * length))
    moved: dict[int, Array] = {}
    new = []
    for unit, number, (inputs, outputs), kept in zip(
        units.units, rows, moments, memory, strict=True
    ):
        output, force, entries = (
            sum(parts) for parts in zip(*squares[unit.layer].values(), strict=True)
        )
        entries = jnp.maximum(entries, 1)
        size, loudness = jnp.sqrt(output / entries), jnp.sqrt(force / entries)
        largest = jnp.maximum(settings.forget * kept.force, loudness)
        # What begins at zero has no size of its own: that of its input has to do.
        stand_in = input_sizes.get(unit.layer, jnp.ones(()))
        begins = jnp.where(size > _NOTHING * stand_in, size, stand_in)
        first = jnp.where(count == 0, begins, kept.output)
        size = jnp.where(size > _NOTHING * first, size, first)
        share, keep = settings.size / math.sqrt(units.layers), settings.memory
        if unit.thresholds:
            share, keep = settings.threshold_size, settings.threshold_memory
        scale = share * jnp.sqrt(first * size) * spectrum.inverse(largest)
        asked = (scale * unit_forces[unit.node] / number).astype(kept.asked.dtype)
        request = scale**2 * force / number
        mean, ahead, noise = _remember(kept, asked, request, count, keep)
        numbers = (x.astype(asked.dtype) for x in (largest, first, noise))
        kept = UnitMemory(mean, inputs, outputs, *numbers)
        moved[unit.node] = _solve(problem, unit, ahead, kept, count, settings)
        new.append(kept)
    return moved, tuple(new)


def _remember(
    kept: UnitMemory, asked: Array, request: Array, count: Array, keep: float
) -> tuple[Array, Array, Array]:
    """The memory of requests with one more; what it will be if the next batch asks for the same
    (Nesterov's look ahead), as a mean; and the noise.
    """
    dtype = asked.dtype
    done = jnp.asarray(keep, dtype) ** count
    expected = kept.asked * spectrum.inverse(1 - done)
    mean = keep * kept.asked + (1 - keep) * asked
    ahead = (keep * mean + (1 - keep) * asked) / (1 - keep**2 * done)
    surprise = jnp.sum(jnp.square(asked - expected)) * spectrum.inverse(request)
    noise = jnp.where(
        count == 0, surprise, _NOISE_MEMORY * kept.noise + (1 - _NOISE_MEMORY) * surprise
    )
    return mean, ahead.astype(dtype), noise.astype(dtype)


def _damping(
    unit: Unit,
    memory: UnitMemory,
    length: int,
    trace: Array,
    largest: Array,
    count: Array,
    settings: Requests,
) -> Array:
    """`ρ = κ λmax d/n` for rows of length `d`, of which `n` in memory count as independent; with
    `threshold_rows` for `κ d` where thresholds make the rows.

    If the requests of a batch of `N` independent rows were noise, `|m − M|²` would be their mean
    square times `tr C/N`: that is how `N` is measured. Rows that are there twice count once.
    """
    strength = settings.threshold_rows if unit.reads_thresholds else settings.damping * length
    rows_kept = (1 - settings.rows_memory ** (count + 1)) / (1 - settings.rows_memory)
    share = memory.noise * spectrum.inverse(trace) / rows_kept
    return strength * jnp.minimum(share, 1) * largest


def _reading(
    problem: Problem, unit: Unit, reader: Reader, state: State, forces: Mapping[int, Array]
) -> _Reading:
    slot = problem.graph.slots[reader.slot]
    if reader.kind != "entries":
        node = problem.graph.nodes[slot.node]
        assert node.output is not None
        output, force = problem.values[node.output], forces[node.index]
    else:
        output, force = problem.values[slot.variable], problem.slot_force(slot, state)
        if len(slot.producers) > 1:
            mask = problem.reads(slot, unit.node)
            output, force = output * mask, force * mask
    if reader.matrix is not None and reader.kind == "product":
        force = reader.matrix.outputs(force)
        output = reader.matrix.outputs(output)
    asked = jnp.any(force != 0, axis=-1, keepdims=True) if force.ndim else force != 0
    return _Reading(output, force, asked.astype(output.dtype))


def _renew(
    problem: Problem,
    unit: Unit,
    readings: Sequence[_Reading],
    unit_force: Array,
    rows: Array,
    count: Array,
    settings: Requests,
    kept: UnitMemory,
) -> tuple[Any, Any]:
    """The second moments of inputs and outputs, with this batch taken in."""
    # A mean over the first times; from then on the memory fades.
    every = settings.every
    times_before = jnp.where(count < every, count, every - 1 + count // every)
    beta = jnp.where(count < every, settings.rows_memory, settings.rows_memory**every)
    keep = jnp.minimum(beta, times_before / (times_before + 1)).astype(kept.asked.dtype)
    # The first directions are not yet those of the inputs.
    iterations = jnp.where(count == 0, _FIRST_ITERATIONS, 1)
    pairs = list(zip(unit.readers, readings, strict=True))
    inputs: Any
    if unit.matrix is None:
        diagonal = sum(_diagonal(problem, unit, reader, reading) for reader, reading in pairs)
        inputs = (keep * kept.inputs + (1 - keep) * diagonal / rows).astype(kept.asked.dtype)
    else:
        assert isinstance(kept.inputs, Spectrum)
        size = unit.matrix.shape[1]
        products = [(r, reading) for r, reading in pairs if r.kind == "product"]
        # What has no rows counts as rows in all directions alike.
        others = sum(
            jnp.mean(_diagonal(problem, unit, r, reading)) for r, reading in pairs if r.kind != "product"
        )
        operands = [_other(problem, reader) for reader, _ in products]

        def times(directions: Array) -> Array:
            total = others * directions
            for (reader, reading), other in zip(products, operands, strict=True):
                assert reader.matrix is not None
                total = total + reader.matrix.moment(other, reading.asked[..., 0], directions)
            return total / rows

        trace = sum(
            reader.matrix.trace(other, reading.asked[..., 0])  # pyright: ignore
            for (reader, reading), other in zip(products, operands, strict=True)
        )
        inputs = spectrum.renew(
            kept.inputs, times, (trace + size * others) / rows, keep, iterations
        )
    outputs = kept.outputs
    if outputs is not None:
        # Where there is no matrix, the forces on the entries are its rows.
        parts = [reading.force for reader, reading in pairs if reader.kind == "product"]
        if unit.matrix is None:
            parts = [unit_force.reshape(1, -1, unit_force.shape[-1])]

        def pull(directions: Array) -> Array:
            return sum(jnp.swapaxes(g, 1, 2) @ (g @ directions) for g in parts) / rows

        trace = sum(jnp.sum(jnp.square(g), axis=(1, 2)) for g in parts) / rows
        outputs = spectrum.renew(outputs, pull, trace, keep, iterations)
    return inputs, outputs


def _other(problem: Problem, reader: Reader) -> Array:
    """The value of the operand beside that which a product's reader reads."""
    slot = problem.graph.slots[reader.slot]
    rule = problem.graph.nodes[slot.node].rule
    assert isinstance(rule, LayerSum) and reader.matrix is not None
    reference = problem.reference(slot.node)
    return rule.operand_beside(reader.place, reference)


def _diagonal(problem: Problem, unit: Unit, reader: Reader, reading: _Reading) -> Array:
    """A bound on `JᵀJ`, in the shape of the unit."""
    slot = problem.graph.slots[reader.slot]
    if reader.kind == "entries":
        entries = jnp.broadcast_to(reading.asked, reading.output.shape)
    else:
        rule = problem.graph.nodes[slot.node].rule
        assert isinstance(rule, LayerSum)
        asked = jnp.broadcast_to(reading.asked, reading.output.shape)
        entries = rule.diagonal(reader.place, problem.reference(slot.node), asked)
    return problem.pull(slot, unit.node, entries)


def _solve(
    problem: Problem,
    unit: Unit,
    asked: Array,
    memory: UnitMemory,
    count: Array,
    settings: Requests,
) -> Array:
    """`(C + ρ)⁻¹ M`, its columns equalised."""
    if unit.matrix is None:
        assert isinstance(memory.inputs, jax.Array)
        columns = asked.shape[-1] if asked.ndim else 1
        trace = jnp.sum(memory.inputs) / columns
        largest = jnp.max(memory.inputs)
        damping = _damping(unit, memory, asked.size // columns, trace, largest, count, settings)
        move = asked * spectrum.inverse(memory.inputs + damping)
        if memory.outputs is not None:
            flat = move.reshape(1, -1, move.shape[-1])
            move = spectrum.equalise(memory.outputs, flat, settings.equalise).reshape(move.shape)
        return move
    assert unit.slot is not None and isinstance(memory.inputs, Spectrum)
    slot = problem.graph.slots[unit.slot]
    entries = asked if slot.route.direct else slot.route([asked], problem.values)
    matrix = unit.matrix.of(entries)

    trace = jnp.sum(memory.inputs.trace)
    damping = _damping(
        unit, memory, unit.matrix.shape[1], trace, memory.inputs.largest, count, settings
    )
    matrix = spectrum.solve(memory.inputs, matrix, damping)
    assert memory.outputs is not None
    move = unit.matrix.back(spectrum.equalise(memory.outputs, matrix, settings.equalise))
    if slot.route.direct:
        return move
    (back,) = slot.route.pull(move.astype(slot.dtype), problem.values)
    return back


__all__ = ["Memory", "Requests", "UnitMemory", "empty", "moves"]
