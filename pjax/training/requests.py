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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pjax.backend import shardings
from pjax.problem import Problem, State
from pjax.projections import spectrum
from pjax.projections.products.rows import dot
from pjax.projections.spectrum import entries
from pjax.training import moments
from pjax.training.ends import Step, ends_in_sets
from pjax.training.memory import Memory, UnitMemory
from pjax.training.moments import Stacks
from pjax.training.readers import Unit, Units
from pjax.training.readings import Read, Reading, readings
from pjax.training.solve import Plan, limit, solve, whitened


@dataclass(frozen=True)
class Requests:
    """The constants of the rule; one setting for all networks.

    **Attributes:**

    - `size`: of a request: all layers together are asked to move by this share of their outputs.
        Its size is that in the first batch, and a little of that now (see `GROWTH`).
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
    - `pacing`: how quickly moves become shorter where batches undo them, and longer where they ask
        for more, see `_paces`.
    """

    size: float = 1.2
    memory: float = 0.9
    rows_memory: float = 0.95
    every: int = 16
    damping: float = 0.4
    rank: int = 16
    output_rank: int = 8
    equalise: float = 0.1
    forget: float = 0.999
    threshold_size: float = 3.0
    threshold_memory: float = 0.9
    threshold_rows: float = 100.0
    pacing: float = 0.1


#: Moments are renewed in each of so many first batches, then so often until `every` is reached.
_FIRST = 4
#: Products of the inputs in the first batch.
_FIRST_ITERATIONS = 4
#: An output below this share of the input is one that begins at zero, as that of a head whose first
#: weights are scaled by 0.01; of a layer that reads data, whose unit is the user's, it is less.
_SMALL, _SMALL_OF_DATA = 0.03, 1e-3
#: The power with which requests grow with a layer's output. With ½, growth feeds itself in long
#: runs (MNIST in batches of 32 ends at 92 % in place of 97 %, unless moves become shorter).
GROWTH = 0.25
#: The share of the last moves that batches may undo before all become shorter.
_TOLERATED = 0.1
#: The least pace and the largest.
_SLOWEST, _FASTEST = 1e-3, 4.0
#: Directions of the inputs below this share of the mean direction tell little of the noise.
_UNSEEN = 0.01
#: The largest eigenvalue counts as at most so many mean ones: many inputs of which few directions
#: matter, as those of images behind convolutions, would be damped by their mere number. Quantized
#: weights are better off with more.
_CONCENTRATED = 150.0
#: Of the noise, from batch to batch.
_NOISE_MEMORY = 0.9


def empty(problem: Problem, units: Units, settings: Requests) -> Memory:
    """The memory before the first batch."""
    values = _values(problem, units)
    found = []
    for unit, value in zip(units.units, values, strict=True):
        zeros = shardings.zeros_like(value)
        found.append(UnitMemory(zeros, zeros, zeros if unit.matrix is None else None))
    zero = jnp.zeros(len(values), jnp.result_type(jnp.float32, *(v.dtype for v in values)))
    never = jnp.zeros((), jnp.int32)
    inputs, outputs = _stacks(problem, units, settings).empty()
    one = jnp.ones((), zero.dtype)
    return Memory(
        tuple(found), inputs, outputs, zero, zero, zero, zero, never, never, one, zero + 1
    )


def _values(problem: Problem, units: Units) -> list[Array]:
    outputs = [problem.graph.nodes[unit.node].output for unit in units.units]
    return [problem.values[output] for output in outputs if output is not None]


def _stacks(problem: Problem, units: Units, settings: Requests) -> Stacks:
    return Stacks.of(units, _values(problem, units), settings.rank, settings.output_rank)


def moves(
    problem: Problem,
    units: Units,
    state: State,
    forces: Mapping[int, Array],
    memory: Memory,
    count: Array,
    settings: Requests,
    step: Step = Step(),  # noqa: B008 - immutable
) -> tuple[dict[int, Array], dict[int, Array], Memory]:
    """How far each unit moves, by the index of its node; where parameters in sets end, by the
    number of the leaf; the memory to go on with.

    **Arguments:**

    - `problem`: of the batch, with parameters at rest.
    - `state`: after a sweep.
    - `forces`: on the output of each node that reads a unit.
    - `memory`, `count`: of the batches before, and how many there were.
    - `step`: what is made of the moves of parameters in sets.
    """
    reads = readings(problem, units, state, forces)
    unit_forces = moments.sums_of_forces(problem, units, reads, state)
    stacks = _stacks(problem, units, settings)
    layers = _layers(units, reads)
    way = _Way.of(units, settings)
    batch = _Batch.of(units, layers, reads, unit_forces, memory, way, settings)

    def renewed(memory: Memory) -> Memory:
        age = _Age(count, memory.renewals, count - memory.renewed)
        memory = _renew(problem, units, stacks, reads, forces, batch, memory, age, settings)
        memory = _with_sizes(units, stacks, memory, layers)
        memory = _with_noise(problem, units, stacks, memory, batch, age)
        return memory._replace(renewals=memory.renewals + 1, renewed=count)

    soon = (count < _FIRST) | ((count < settings.every) & (count % _FIRST == 0))
    refresh = soon | (count % settings.every == 0)
    memory = jax.lax.cond(refresh, renewed, lambda same: same, memory)
    products = [
        (dot(own.move, force), dot(own.move, own.asked))
        for own, force in zip(memory.units, unit_forces, strict=True)
    ]
    found = [own.diagonal for own in memory.units if own.diagonal is not None]
    diagonals = [jnp.max(diagonal) for diagonal in found]
    lengths = [math.prod(diagonal.shape[:-1]) for diagonal in found]

    plan = _planned(units, stacks, lengths, settings, memory, batch, products, diagonals, count)
    kept = [
        own._replace(asked=_combined(weights, own.asked, force))
        for own, force, weights in zip(memory.units, unit_forces, plan.kept, strict=True)
    ]
    ahead = [
        _combined(weights, own.asked, force)
        for own, force, weights in zip(memory.units, unit_forces, plan.ahead, strict=True)
    ]
    solved = solve(problem, units, stacks, ahead, memory, plan)
    found = [
        move * limit(dot(asked, move), square).astype(move.dtype)
        for move, asked, square in zip(solved, ahead, plan.squares, strict=True)
    ]
    lengths = [
        jnp.ones_like(plan.pace) if unit.latent else plan.pace * pace
        for unit, pace in zip(units.units, entries(plan.paces), strict=True)
    ]
    moved = {
        unit.node: length.astype(move.dtype) * move
        for unit, move, length in zip(units.units, found, lengths, strict=True)
    }
    inside = ends_in_sets(problem, units, stacks, memory, plan, step, solved, ahead, lengths)
    found = [inside[n].move if n in inside else move for n, move in enumerate(found)]
    ends = {part.leaf: part.end for part in inside.values()}
    new = tuple(own._replace(move=move) for own, move in zip(kept, found, strict=True))
    return (
        moved,
        ends,
        memory._replace(units=new, force=batch.largest, pace=plan.pace, paces=plan.paces),
    )


def _planned(
    units: Units,
    stacks: Stacks,
    lengths: Sequence[int],
    settings: Requests,
    memory: Memory,
    batch: _Batch,
    products: Sequence[tuple[Array, Array]],
    diagonals: Sequence[Array],
    count: Array,
) -> Plan:
    keep, new = jnp.asarray(batch.way.memory, memory.force.dtype), batch.request(memory)
    done = 1 / (1 - keep**2 * keep**count)
    pace, paces = _paces(units, memory, batch, products, count, settings)
    kept = zip(entries(keep), entries((1 - keep) * new), strict=True)
    ahead = zip(entries(keep**2 * done), entries((1 - keep**2) * new * done), strict=True)
    inputs, outputs = {}, {}
    for stack, spectra in zip(stacks.inputs, memory.inputs, strict=True):
        shape = stack.shape
        own = [units.units[number] for number in stack.members]
        strength = [_strength(u, n, settings) for u, n in zip(own, shape.sizes, strict=True)]
        each, noise = np.asarray(strength)[shape.owners], stack.of(memory.noise)
        mean = spectra.trace(shape) / shape.lengths.astype(spectra.rest.dtype)
        latent = np.asarray([unit.latent for unit in own])[shape.owners]
        bounded = jnp.minimum(spectra.largest, _CONCENTRATED * mean)
        largest = jnp.where(latent, spectra.largest, bounded)
        damping = _damping(each, noise, largest, count, settings)
        inputs |= stack.split(spectrum.resolvent(shape, spectra, damping))
    for stack, spectra in zip(stacks.outputs, memory.outputs, strict=True):
        equaliser = spectrum.equaliser(stack.shape, spectra, settings.equalise)
        outputs |= stack.split(equaliser)
    dampings = _dampings(units, memory, diagonals, lengths, count, settings)
    squares = batch.scale(memory) ** 2 * batch.square / batch.rows
    return Plan(pace, paces, entries(squares), list(kept), list(ahead), inputs, outputs, dampings)


def _combined(weights: tuple[Array, Array], x: Array, y: Array) -> Array:
    """`a x + b y`: one kernel for all that is made of two arrays of one shape."""
    a, b = (weight.astype(x.dtype) for weight in weights)
    return (a * x + b * y).astype(x.dtype)


def _layers(units: Units, reads: Sequence[Sequence[Read]]) -> list[list[Reading]]:
    """For each layer its readings, each once, though a weight and its bias both have it."""
    found: dict[int, dict[int, Reading]] = {}
    for unit, parts in zip(units.units, reads, strict=True):
        for _, reading in parts:
            found.setdefault(unit.layer, {})[id(reading)] = reading
    return [list(found[layer].values()) for layer in range(units.layers)]


def _paces(
    units: Units,
    memory: Memory,
    batch: _Batch,
    products: Sequence[tuple[Array, Array]],
    count: Array,
    settings: Requests,
) -> tuple[Array, Array]:
    """The share of their length that all moves are given, and on top of it that of each unit.

    Along the last move this batch asks for more (a positive product of force and move) or for less.
    Over what was expected, the product of the move and the remembered requests, that is 1 where
    batches agree, 0 where they say nothing of each other or the move was as long as is of use, and
    negative where it was too long: the next ones are shorter then. What a threshold makes of
    parameters does not move as it is asked, and takes no part.
    """
    met, remembered = (_stacked(part) for part in zip(*products, strict=True))
    done = 1 - jnp.asarray(batch.way.memory, memory.force.dtype) ** count
    expected = spectrum.inverse(batch.scale(memory) * done) * batch.rows * remembered
    real = np.asarray([not unit.latent for unit in units.units])

    def agreement(met: Array, expected: Array) -> Array:
        return jnp.where(expected > 0, jnp.clip(met * spectrum.inverse(expected), -1, 1), 0)

    def paced(pace: Array, agreement: Array) -> Array:
        pace = pace * jnp.exp(settings.pacing * agreement)
        return jnp.clip(pace, _SLOWEST, _FASTEST).astype(pace.dtype)

    common = agreement(*(jnp.sum(jnp.where(real, part, 0)) for part in (met, expected)))
    # In the first batch there was no move yet.
    common = jnp.where(count > 0, common + _TOLERATED, 0)
    return paced(memory.pace, common), paced(memory.paces, agreement(met, expected))


class _Age(NamedTuple):
    """How many batches there were, how often moments were renewed, and how many batches ago."""

    count: Array
    renewals: Array
    gap: Array

    def keep(self, memory: float) -> Array:
        """The weight of what was before: a mean over the first times, then the memory fades."""
        return jnp.minimum(memory**self.gap, self.renewals / (self.renewals + 1))


class _Way(NamedTuple):
    """How units are asked: the share of its size that the output of each is to move, and for how
    long requests are remembered.
    """

    share: np.ndarray
    memory: np.ndarray

    @classmethod
    def of(cls, units: Units, settings: Requests) -> _Way:
        size = settings.size / math.sqrt(units.layers)
        ways = [
            (settings.threshold_size, settings.threshold_memory)
            if unit.thresholds
            else (size, settings.memory)
            for unit in units.units
        ]
        return cls(*np.asarray(ways).T)


class _Batch(NamedTuple):
    """What one batch asks of units.

    **Attributes:**

    - `forces`: the sum of the forces on each.
    - `rows`: how many rows ask, a number for each as are the next.
    - `largest`: the largest mean force so far.
    - `square`: the sum of the squares of the forces on the rows.
    - `way`: how they are asked.
    """

    forces: Sequence[Array]
    rows: Float[Array, " units"]
    largest: Float[Array, " units"]
    square: Float[Array, " units"]
    way: _Way

    @classmethod
    def of(
        cls,
        units: Units,
        layers: Sequence[Sequence[Reading]],
        reads: Sequence[Sequence[Read]],
        forces: Sequence[Array],
        memory: Memory,
        way: _Way,
        settings: Requests,
    ) -> _Batch:
        square = _sums(units, layers, lambda reading: reading.square)
        count = _sums(units, layers, lambda reading: reading.entries)
        loudness = jnp.sqrt(square / jnp.maximum(count, 1)).astype(memory.force.dtype)
        largest = jnp.maximum(settings.forget * memory.force, loudness)
        rows = _stacked([_total(part.reading.rows for part in parts) for parts in reads])
        return cls(forces, jnp.maximum(rows, 1), largest, square, way)

    def scale(self, memory: Memory) -> Float[Array, " units"]:
        """From a force to a request."""
        share = jnp.asarray(self.way.share, memory.output.dtype)
        return share * memory.output * spectrum.inverse(self.largest)

    def request(self, memory: Memory) -> Float[Array, " units"]:
        """From the sum of forces to `XᵀR/N`."""
        return self.scale(memory) / self.rows


def _sums(
    units: Units, layers: Sequence[Sequence[Reading]], number: Callable[[Reading], Array]
) -> Float[Array, " units"]:
    """For each unit the sum of a number of all readings of its layer."""
    return _stacked([_total(map(number, layers[unit.layer])) for unit in units.units])


def _total(parts: Iterable[Any]) -> Any:
    return sum(parts)


def _stacked(numbers: Sequence[Any]) -> Array:
    """One array of numbers, at least in single precision."""
    dtype = jnp.result_type(jnp.float32, *(number.dtype for number in numbers))
    return jnp.stack([number.astype(dtype) for number in numbers])


def _renew(
    problem: Problem,
    units: Units,
    stacks: Stacks,
    reads: Sequence[Sequence[Read]],
    forces: Mapping[int, Array],
    batch: _Batch,
    memory: Memory,
    age: _Age,
    settings: Requests,
) -> Memory:
    """The memory with the second moments of this batch's inputs and forces taken in."""
    keep = age.keep(settings.rows_memory).astype(memory.force.dtype)
    # The first directions are not yet those of the inputs.
    iterations = jnp.where(age.count == 0, _FIRST_ITERATIONS, 1)
    inputs, outputs, kept = {}, {}, []

    scales, shares = 1 / batch.rows, entries((1 - keep) / batch.rows)
    for number, (unit, parts, own) in enumerate(zip(units.units, reads, memory.units, strict=True)):
        if own.diagonal is None:
            inputs[number] = moments.input_rows(problem, unit, parts, forces)
        else:
            diagonal: Any = sum(moments.diagonal(problem, unit, part, forces) for part in parts)
            own = own._replace(diagonal=_combined((keep, shares[number]), own.diagonal, diagonal))
        kept.append(own)
        if own.diagonal is None or own.asked.ndim > 1:
            outputs[number] = moments.force_rows(unit, parts, batch.forces[number])
    args = scales, keep, iterations
    return memory._replace(
        units=tuple(kept),
        inputs=moments.renewed(stacks.inputs, memory.inputs, inputs, *args),
        outputs=moments.renewed(stacks.outputs, memory.outputs, outputs, *args),
    )


def _with_sizes(
    units: Units,
    stacks: Stacks,
    memory: Memory,
    layers: Sequence[Sequence[Reading]],
) -> Memory:
    """The memory with the sizes of outputs: geometric means of those now and in the first batch.

    What begins at zero has no size of its own: that of its input has to do.
    """

    square = _sums(units, layers, lambda reading: reading.output_square)
    rows = _sums(units, layers, lambda reading: reading.entries)
    size = jnp.sqrt(square / jnp.maximum(rows, 1))
    other = _input_sizes(units, stacks, memory)
    hidden = {unit.layer for unit in units.units if unit.hidden}
    small = np.asarray([_SMALL if u.layer in hidden else _SMALL_OF_DATA for u in units.units])
    begins = jnp.where(size > small * other, size, other)
    # What was 0 in all batches so far has not begun yet.
    first = jnp.where(memory.first > 0, memory.first, begins).astype(memory.first.dtype)
    size = jnp.where(size > small * first, size, first)
    output = (first ** (1 - GROWTH) * size**GROWTH).astype(memory.output.dtype)
    return memory._replace(first=first, output=output)


def _input_sizes(units: Units, stacks: Stacks, memory: Memory) -> Float[Array, " units"]:
    """For each unit the root of the mean square of its layer's input rows; 1 without any."""
    found, places, count = [jnp.ones(1, memory.output.dtype)], {}, 1
    for stack, spectra in zip(stacks.inputs, memory.inputs, strict=True):
        shape = stack.shape
        means = spectra.trace(shape) / shape.lengths.astype(spectra.rest.dtype)
        found.append(jnp.sqrt(shape.sums(means) / shape.counts).astype(memory.output.dtype))
        for member, number in enumerate(stack.members):
            places[number] = count + shape.places(member)[0]
        count += len(shape.owners)
    of_layer = {units.units[number].layer: places[number] for number in sorted(places)}
    return jnp.concatenate(found)[np.asarray([of_layer.get(u.layer, 0) for u in units.units])]


def _with_noise(
    problem: Problem, units: Units, stacks: Stacks, memory: Memory, batch: _Batch, age: _Age
) -> Memory:
    """The memory with the noise of this batch taken in: `1/N`, in rows that are independent.

    If the requests of a batch of `N` independent rows were noise, `tr C⁻¹(m − M)(m − M)ᵀ` would be
    their mean square times the number of directions over `N`: in this measure all directions count
    alike. In the plain one the largest do, in which requests change from batch to batch by moves,
    not by noise. Rows that are there twice count once.
    """
    new = batch.request(memory)
    before = spectrum.inverse(1 - jnp.asarray(batch.way.memory, new.dtype) ** age.count)
    weights = zip(entries(-before), entries(new), strict=True)
    surprises = [
        _combined(own_weights, own.asked, force)
        for own, force, own_weights in zip(memory.units, batch.forces, weights, strict=True)
    ]
    found = whitened(problem, units, stacks, surprises, memory, _UNSEEN)
    squares, directions = (_stacked(part) for part in zip(*found, strict=True))
    mean_square = batch.scale(memory) ** 2 * batch.square / batch.rows
    surprise = squares * spectrum.inverse(directions * mean_square)
    fades = jnp.where(age.count == 0, 0.0, _NOISE_MEMORY**age.gap)
    noise = fades * memory.noise + (1 - fades) * surprise
    return memory._replace(noise=noise.astype(memory.noise.dtype))


def _damping(
    strength: np.ndarray, noise: Array, largest: Array, count: Array, settings: Requests
) -> Array:
    """`ρ = κ λ d/n` for rows of length `d`, of which `n` in memory count as independent, and the
    largest eigenvalue `λ`; for each of some units.
    """
    rows_kept = (1 - settings.rows_memory ** (count + 1)) / (1 - settings.rows_memory)
    share = jnp.minimum(noise / rows_kept, 1)
    return (jnp.asarray(strength, share.dtype) * share).astype(largest.dtype) * largest


def _strength(unit: Unit, length: int, settings: Requests) -> float:
    """`κ d`; `threshold_rows` where thresholds make the rows."""
    return settings.threshold_rows if unit.reads_thresholds else settings.damping * length


def _dampings(
    units: Units,
    memory: Memory,
    diagonals: Sequence[Array],
    lengths: Sequence[int],
    count: Array,
    settings: Requests,
) -> dict[int, Array]:
    """`ρ` of the units whose `C` is a diagonal."""
    numbers = [number for number, unit in enumerate(units.units) if unit.matrix is None]
    if not numbers:
        return {}
    strength = [
        _strength(units.units[number], length, settings)
        for number, length in zip(numbers, lengths, strict=True)
    ]
    noise = memory.noise[np.asarray(numbers)]
    damping = _damping(np.asarray(strength), noise, _stacked(diagonals), count, settings)
    return dict(zip(numbers, entries(damping), strict=True))


__all__ = ["GROWTH", "Memory", "Requests", "UnitMemory", "empty", "moves"]
