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

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pjax.layer import LayerSum
from pjax.problem import Problem, State
from pjax.projections import spectrum
from pjax.projections.spectrum import Spectrum
from pjax.training.readers import Reader, Unit, Units


@dataclass(frozen=True)
class Requests:
    """The constants of the rule; one setting for all networks.

    **Attributes:**

    - `size`: of a request: all layers together are asked to move by this share of their outputs.
        The output is measured as the geometric mean of its size now and in the first batch, so that
        growth does not feed itself.
    - `memory`: μ, of requests.
    - `rows_memory`: β, of input rows, for each batch.
    - `every`: the rows are taken in every so many batches, and more often among the first ones.
    - `damping`: κ, of the noise of the requests, see `_damping`.
    - `rank`: how many directions of the inputs are told apart.
    - `output_rank`: and of the outputs.
    - `equalise`: δ, how far outputs are equalised: the smaller the more.
    - `forget`: of the largest force so far, kept from batch to batch.
    - `threshold_size`: of what only thresholds read, in place of the share of `size`: the loss sees
        which side of a threshold an output is on, and not its size.
    - `threshold_memory`: of these requests, in place of `memory`.
    - `threshold_rows`: where thresholds make the inputs, in place of κ times the length of a row.
    - `pacing`: how quickly moves become shorter where batches undo them, see `_pace`.
    """

    size: float = 1.2
    memory: float = 0.9
    rows_memory: float = 0.95
    every: int = 16
    damping: float = 0.2
    rank: int = 16
    output_rank: int = 8
    equalise: float = 0.1
    forget: float = 0.999
    threshold_size: float = 3.0
    threshold_memory: float = 0.9
    threshold_rows: float = 25.0
    pacing: float = 0.1


class UnitMemory(NamedTuple):
    """What is kept of the batches for one unit.

    **Attributes:**

    - `asked`: `M`, in the shape of the unit.
    - `move`: the last one, in full length.
    - `inputs`: `C`: a spectrum for each block of its matrix, or a diagonal in the unit's shape.
    - `outputs`: of the forces, a spectrum for each block; None where nothing is equalised.
    - `force`: the largest mean force on its readers so far.
    - `first`, `output`: how large its layer's output was in the first batch, and is taken to be.
    - `noise`: `|m − M|²` of a batch's request `m`, over the mean square of its rows.
    """

    asked: Array
    move: Array
    inputs: Spectrum | Array
    outputs: Spectrum | None
    force: Array
    first: Array
    output: Array
    noise: Array


class Memory(NamedTuple):
    """What is kept of the batches.

    **Attributes:**

    - `units`: for each unit.
    - `renewals`, `renewed`: how often second moments were renewed, and in which batch last.
    - `pace`: the share of its length that a move is given, at most 1.
    """

    units: tuple[UnitMemory, ...]
    renewals: Array
    renewed: Array
    pace: Array


#: Moments are renewed in each of so many first batches, then so often until `every` is reached.
_FIRST = 4
#: Products of the inputs in the first batch.
_FIRST_ITERATIONS = 4
#: An output below this share of the input is one that begins at zero.
_NOTHING = 1e-3
#: The share of the last move that batches may undo before moves become shorter. With none, deep
#: networks are 0.6 points behind (20x128 on MNIST); with twice as much, batches of 32 are 4.
_TOLERATED = 0.05
#: The least pace.
_SLOWEST = 1e-3
#: Of the noise, from batch to batch.
_NOISE_MEMORY = 0.9


class _Reading(NamedTuple):
    """One reader in one batch.

    **Attributes:**

    - `output`, `force`: of the reader and on it, as rows.
    - `asked`: 1 for each row with a force, else 0: others take no part, as if they were not there.
    - `square`: the sum of the squares of the forces.
    - `rows`: how many rows are asked.
    """

    output: Array
    force: Array
    asked: Array
    square: Array
    rows: Array

    @property
    def entries(self) -> Array:
        """How many entries the rows that are asked have."""
        return self.rows * self.force.shape[-1]

    @property
    def output_square(self) -> Array:
        """The sum of the squares of the outputs that are asked."""
        return jnp.sum(jnp.square(self.output) * self.asked)


def empty(problem: Problem, units: Units, settings: Requests) -> Memory:
    """The memory before the first batch."""
    found = []
    for unit in units.units:
        value = _value(problem, unit)
        dtype = value.dtype
        matrix = unit.matrix
        outputs = None
        if matrix is not None:
            inputs: Any = spectrum.empty(matrix.rows, settings.rank, dtype, matrix.blocks)
            outputs = spectrum.empty(matrix.columns, settings.output_rank, dtype, matrix.blocks)
        else:
            inputs = jnp.zeros(value.shape, dtype)
            if value.ndim > 1:
                outputs = spectrum.empty(value.shape[-1], settings.output_rank, dtype)
        zero, zeros = jnp.zeros((), dtype), jnp.zeros(value.shape, dtype)
        found.append(UnitMemory(zeros, zeros, inputs, outputs, zero, zero, zero, zero))
    never = jnp.zeros((), jnp.int32)
    return Memory(tuple(found), never, never, jnp.ones(()))


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
    readings = _readings(problem, units, state, forces)
    # Each reading of a layer once, though a weight and its bias both have it.
    layers: dict[int, dict[Any, _Reading]] = {}
    for unit, found in zip(units.units, readings, strict=True):
        for reader, reading in zip(unit.readers, found, strict=True):
            node = problem.graph.slots[reader.slot].node
            key = (node,) if reader.kind != "entries" else (node, reader.slot, unit.node)
            layers.setdefault(unit.layer, {}).setdefault(key, reading)
    of_layer = {number: list(found.values()) for number, found in layers.items()}
    ways = [_Way.of(unit, units.layers, settings) for unit in units.units]
    batches = [
        _Batch.of(of_layer[unit.layer], found, unit_forces[unit.node], kept, way, settings)
        for unit, found, kept, way in zip(units.units, readings, memory.units, ways, strict=True)
    ]

    def renewed(memory: Memory) -> Memory:
        age = _Age(count, memory.renewals, count - memory.renewed)
        found = [
            _renew(problem, forces, unit, parts, batch, kept, age, settings)
            for unit, parts, batch, kept in zip(
                units.units, readings, batches, memory.units, strict=True
            )
        ]
        sizes = {number: _output_size(parts) for number, parts in of_layer.items()}
        found = _with_sizes(units, found, sizes, count)
        new = tuple(
            _with_noise(kept, batch, age, settings)
            for kept, batch in zip(found, batches, strict=True)
        )
        return memory._replace(units=new, renewals=memory.renewals + 1, renewed=count)

    soon = (count < _FIRST) | ((count < settings.every) & (count % _FIRST == 0))
    refresh = soon | (count % settings.every == 0)
    memory = jax.lax.cond(refresh, renewed, lambda same: same, memory)
    moved: dict[int, Array] = {}
    new = []
    pace = _pace(units, memory, batches, count, settings)
    for unit, batch, kept in zip(units.units, batches, memory.units, strict=True):
        asked = batch.request(kept)
        keep = batch.way.memory
        done = jnp.asarray(keep, asked.dtype) ** count
        mean = keep * kept.asked + (1 - keep) * asked
        # What it will be if the next batch asks for the same: Nesterov's look ahead.
        ahead = (keep * mean + (1 - keep) * asked) * (1 / (1 - keep**2 * done))
        kept = kept._replace(asked=mean, force=batch.largest)
        move = _solve(problem, unit, ahead, kept, count, settings)
        moved[unit.node] = move if unit.latent else pace * move
        new.append(kept._replace(move=move))
    return moved, memory._replace(units=tuple(new), pace=pace)


def _pace(
    units: Units, memory: Memory, batches: Sequence[_Batch], count: Array, settings: Requests
) -> Array:
    """The share of their length that moves are given.

    Along the last move this batch asks for more (a positive product of force and move) or for less.
    Over what was expected, the product of the move and the remembered requests, that is 1 where
    batches agree, 0 where they say nothing of each other or the move was as long as is of use, and
    negative where it was too long: the next ones are shorter where it is below a small share. What
    a threshold makes of parameters does not move as it is asked, and takes no part; beside it
    nothing is tolerated.
    """
    met = expected = jnp.zeros((), memory.pace.dtype)
    for unit, batch, kept in zip(units.units, batches, memory.units, strict=True):
        if unit.latent:
            continue
        met = met + jnp.vdot(kept.move, batch.force)
        done = 1 - jnp.asarray(batch.way.memory, memory.pace.dtype) ** count
        force = spectrum.inverse(batch.scale(kept) * done) * batch.rows
        expected = expected + force * jnp.vdot(kept.move, kept.asked)
    agreement = jnp.where(expected > 0, jnp.clip(met * spectrum.inverse(expected), -1, 1), 0)
    tolerated = 0.0 if any(unit.latent for unit in units.units) else _TOLERATED
    pace = memory.pace * jnp.exp(settings.pacing * (agreement + tolerated))
    return jnp.clip(pace, _SLOWEST, 1).astype(memory.pace.dtype)


class _Age(NamedTuple):
    """How many batches there were, how often moments were renewed, and how many batches ago."""

    count: Array
    renewals: Array
    gap: Array

    def keep(self, memory: float) -> Array:
        """The weight of what was before: a mean over the first times, then the memory fades."""
        return jnp.minimum(memory**self.gap, self.renewals / (self.renewals + 1))


class _Way(NamedTuple):
    """How a unit is asked: the share of its size that its output is to move, and for how long
    requests are remembered.
    """

    share: float
    memory: float

    @classmethod
    def of(cls, unit: Unit, layers: int, settings: Requests) -> _Way:
        if unit.thresholds:
            return cls(settings.threshold_size, settings.threshold_memory)
        return cls(settings.size / math.sqrt(layers), settings.memory)


class _Batch(NamedTuple):
    """What one batch asks of one unit.

    **Attributes:**

    - `force`: the sum of the forces on it.
    - `rows`: how many rows ask.
    - `largest`: the largest mean force so far.
    - `square`: the sum of the squares of the forces on the rows.
    - `way`: how it is asked.
    """

    force: Array
    rows: Array
    largest: Array
    square: Array
    way: _Way

    @classmethod
    def of(
        cls,
        layer: Sequence[_Reading],
        readings: Sequence[_Reading],
        force: Array,
        kept: UnitMemory,
        way: _Way,
        settings: Requests,
    ) -> _Batch:
        square = _total(reading.square for reading in layer)
        entries = jnp.maximum(_total(reading.entries for reading in layer), 1)
        loudness = jnp.sqrt(square / entries).astype(kept.force.dtype)
        rows = jnp.maximum(_total(reading.rows for reading in readings), 1)
        return cls(force, rows, jnp.maximum(settings.forget * kept.force, loudness), square, way)

    def scale(self, kept: UnitMemory) -> Array:
        """From a force to a request."""
        return self.way.share * kept.output * spectrum.inverse(self.largest)

    def request(self, kept: UnitMemory) -> Array:
        """`XᵀR/N`, in the shape of the unit."""
        return ((self.scale(kept) / self.rows) * self.force).astype(kept.asked.dtype)


def _total(parts: Iterable[Any]) -> Any:
    return sum(parts)


def _output_size(readings: Sequence[_Reading]) -> Array:
    """The root of the mean square of a layer's output."""
    square = _total(reading.output_square for reading in readings)
    return jnp.sqrt(square / jnp.maximum(_total(reading.entries for reading in readings), 1))


def _with_sizes(
    units: Units, memory: Sequence[UnitMemory], sizes: Mapping[int, Array], count: Array
) -> list[UnitMemory]:
    """The memory with the present sizes of outputs: geometric means with those in the first batch.

    What begins at zero has no size of its own: that of its input has to do.
    """
    inputs = {
        unit.layer: jnp.sqrt(jnp.mean(kept.inputs.trace) / unit.matrix.rows)
        for unit, kept in zip(units.units, memory, strict=True)
        if unit.matrix is not None and isinstance(kept.inputs, Spectrum)
    }
    found = []
    for unit, kept in zip(units.units, memory, strict=True):
        size, other = sizes[unit.layer], inputs.get(unit.layer, jnp.ones(()))
        begins = jnp.where(size > _NOTHING * other, size, other)
        first = jnp.where(count == 0, begins, kept.first)
        size = jnp.where(size > _NOTHING * first, size, first)
        now = jnp.sqrt(first * size).astype(kept.output.dtype)
        found.append(kept._replace(first=first.astype(kept.first.dtype), output=now))
    return found


def _with_noise(kept: UnitMemory, batch: _Batch, age: _Age, settings: Requests) -> UnitMemory:
    """The memory with the noise of this batch taken in."""
    asked = batch.request(kept)
    expected = kept.asked * spectrum.inverse(
        1 - jnp.asarray(batch.way.memory, asked.dtype) ** age.count
    )
    mean_square = batch.scale(kept) ** 2 * batch.square / batch.rows
    surprise = jnp.sum(jnp.square(asked - expected)) * spectrum.inverse(mean_square)
    fades = jnp.where(age.count == 0, 0.0, _NOISE_MEMORY**age.gap)
    noise = fades * kept.noise + (1 - fades) * surprise
    return kept._replace(noise=noise.astype(asked.dtype))


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


def _readings(
    problem: Problem, units: Units, state: State, forces: Mapping[int, Array]
) -> list[list[_Reading]]:
    """For each unit those of its readers; what reads a layer's operands shares one."""
    of_layer: dict[int, _Reading] = {}
    products = [r for unit in units.units for r in unit.readers if r.kind == "product"]
    for reader in products:
        node = problem.graph.nodes[problem.graph.slots[reader.slot].node]
        if node.index not in of_layer:
            assert reader.matrix is not None
            assert node.output is not None
            outputs = problem.values[node.output], forces[node.index]
            of_layer[node.index] = _reading(*map(reader.matrix.outputs, outputs))
    found = []
    for unit in units.units:
        parts = []
        for reader in unit.readers:
            slot = problem.graph.slots[reader.slot]
            node = problem.graph.nodes[slot.node]
            if reader.kind == "entries":
                value, force = problem.values[slot.variable], problem.slot_force(slot, state)
                if len(slot.producers) > 1:
                    mask = problem.reads(slot, unit.node)
                    value, force = value * mask, force * mask
                parts.append(_reading(value, force))
                continue
            if node.index not in of_layer:
                assert node.output is not None
                of_layer[node.index] = _reading(problem.values[node.output], forces[node.index])
            parts.append(of_layer[node.index])
        found.append(parts)
    return found


def _reading(output: Array, force: Array) -> _Reading:
    if not force.ndim:
        force, output = force[None], output[None]
    # A product with ones: XLA sums rows slowly on a CPU.
    of_rows = jnp.square(force) @ jnp.ones((force.shape[-1], 1), force.dtype)
    asked = (of_rows > 0).astype(output.dtype)
    return _Reading(output, force, asked, jnp.sum(of_rows), jnp.sum(asked))


def _renew(
    problem: Problem,
    forces: Mapping[int, Array],
    unit: Unit,
    readings: Sequence[_Reading],
    batch: _Batch,
    kept: UnitMemory,
    age: _Age,
    settings: Requests,
) -> UnitMemory:
    """The memory with the second moments of this batch's inputs and forces taken in."""
    rows = batch.rows
    keep = age.keep(settings.rows_memory).astype(kept.asked.dtype)
    # The first directions are not yet those of the inputs.
    iterations = jnp.where(age.count == 0, _FIRST_ITERATIONS, 1)
    pairs = list(zip(unit.readers, readings, strict=True))
    inputs: Any
    if unit.matrix is None:
        assert isinstance(kept.inputs, jax.Array)
        diagonal = sum(
            _diagonal(problem, unit, reader, reading, forces) for reader, reading in pairs
        )
        inputs = (keep * kept.inputs + (1 - keep) * diagonal / rows).astype(kept.asked.dtype)
    else:
        assert isinstance(kept.inputs, Spectrum)
        size = unit.matrix.rows
        products = [(r, reading) for r, reading in pairs if r.kind == "product"]
        # What has no rows counts as rows in all directions alike.
        others = sum(
            jnp.mean(_diagonal(problem, unit, r, reading, forces))
            for r, reading in pairs
            if r.kind != "product"
        )
        operands = [_other(problem, reader) for reader, _ in products]

        def times(directions: Array) -> Array:
            total = others * directions
            for (reader, reading), other in zip(products, operands, strict=True):
                assert reader.matrix is not None
                total = total + reader.matrix.moment(other, reading.asked, directions)
            return total / rows

        trace = sum(
            reader.matrix.trace(other, reading.asked)  # pyright: ignore
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
            parts = [batch.force.reshape(-1, batch.force.shape[-1])]

        def pull(directions: Array) -> Array:
            return sum(jnp.swapaxes(g, -1, -2) @ (g @ directions) for g in parts) / rows

        trace = sum(jnp.sum(jnp.square(g), axis=(-1, -2)) for g in parts) / rows
        outputs = spectrum.renew(outputs, pull, trace, keep, iterations)
    return kept._replace(inputs=inputs, outputs=outputs)


def _other(problem: Problem, reader: Reader) -> Array:
    """The value of the operand beside that which a product's reader reads."""
    slot = problem.graph.slots[reader.slot]
    rule = problem.graph.nodes[slot.node].rule
    assert isinstance(rule, LayerSum)
    assert reader.matrix is not None
    reference = problem.reference(slot.node)
    return rule.operand_beside(reader.place, reference)


def _diagonal(
    problem: Problem,
    unit: Unit,
    reader: Reader,
    reading: _Reading,
    forces: Mapping[int, Array],
) -> Array:
    """A bound on `JᵀJ`, in the shape of the unit."""
    slot = problem.graph.slots[reader.slot]
    node = problem.graph.nodes[slot.node]
    if reader.kind == "entries":
        entries = jnp.broadcast_to(reading.asked, slot.shape)
    else:
        assert isinstance(node.rule, LayerSum)
        force = forces[node.index]
        asked = jnp.any(force != 0, axis=-1, keepdims=True) if force.ndim else force != 0
        asked = jnp.broadcast_to(asked, force.shape).astype(force.dtype)
        entries = node.rule.diagonal(reader.place, problem.reference(slot.node), asked)
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
            flat = move.reshape(-1, move.shape[-1])
            move = spectrum.equalise(memory.outputs, flat, settings.equalise).reshape(move.shape)
        return move
    assert unit.slot is not None
    assert isinstance(memory.inputs, Spectrum)
    slot = problem.graph.slots[unit.slot]
    entries = asked if slot.route.direct else slot.route([asked], problem.values)
    matrix = unit.matrix.of(entries)

    trace = jnp.sum(memory.inputs.trace)
    damping = _damping(
        unit, memory, unit.matrix.rows, trace, memory.inputs.largest, count, settings
    )
    matrix = spectrum.solve(memory.inputs, matrix, damping)
    assert memory.outputs is not None
    move = unit.matrix.back(spectrum.equalise(memory.outputs, matrix, settings.equalise))
    if slot.route.direct:
        return move
    (back,) = slot.route.pull(move.astype(slot.dtype), problem.values)
    return back


__all__ = ["Memory", "Requests", "UnitMemory", "empty", "moves"]
