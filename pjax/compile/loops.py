"""Repetitions are run as loops: operands are stacked, results taken apart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pjax.backend import compat, device
from pjax.compile.fingerprints import is_window
from pjax.compile.repeats import OUTER, Run, last_uses, live_equations

#: A CPU has no room for blocks side by side: larger ones than this take turns there, since the
#: arrays of one block fit its cache, and those of all do not.
_SHORT = 8
#: More pieces than this are gathered by their numbers.
_PIECES = 8
_SPLITS = compat.find_primitives("split")
_JOINS = compat.find_primitives("concatenate", "stack")


def evaluate_equations(jaxpr: Any, runs: Sequence[Run], values: Values) -> None:
    """Adds what the equations of a program make of its arguments, which `values` has."""
    equations = live_equations(jaxpr)
    uses = last_uses(equations, jaxpr.outvars)
    place = 0
    for run in runs:
        for equation in equations[place : run.start]:
            values.add(equation)
        _loop(run, equations, uses, values)
        place = run.stop
    for equation in equations[place:]:
        values.add(equation)


# --- Loops ---------------------------------------------------------------------------------------


class Part(NamedTuple):
    """One entry along the first axis of an array that holds those of all blocks."""

    whole: Any
    index: int


@dataclass
class Values:
    """The values of variables so far; those that stand in a larger array, until they are read.

    **Attributes:**

    - `least`: as many parts of an array stay together.
    """

    known: dict[Any, Any]
    least: int
    parts: dict[Any, Part] = field(default_factory=dict)

    def read(self, atom: Any) -> Any:
        if isinstance(atom, compat.Literal):
            return atom.val
        if atom not in self.known:
            whole, index = self.parts[atom]
            self.known[atom] = jax.lax.index_in_dim(whole, index, keepdims=False)
        return self.known[atom]

    def add(self, equation: Any) -> None:
        if equation.primitive in _SPLITS and self._split(equation):
            return
        if equation.primitive in _JOINS and self._join(equation):
            return
        outputs = compat.bind(equation, [self.read(atom) for atom in equation.invars])
        self.known.update(zip(equation.outvars, outputs, strict=True))

    def _split(self, equation: Any) -> bool:
        """Splits an array into parts of one array, if they are many and equal."""
        sizes, axis = equation.params["sizes"], equation.params["axis"]
        if len(sizes) < self.least or len(set(sizes)) > 1:
            return False
        operand = self.read(equation.invars[0])
        shape = operand.shape
        whole = operand.reshape(*shape[:axis], len(sizes), sizes[0], *shape[axis + 1 :])
        whole = jnp.moveaxis(whole, axis, 0)
        self.parts.update((out, Part(whole, k)) for k, out in enumerate(equation.outvars))
        return True

    def _join(self, equation: Any) -> bool:
        """Concatenates or stacks arrays most of which are parts of one."""
        atoms = equation.invars
        parts = sum(atom in self.parts for atom in atoms if not isinstance(atom, compat.Literal))
        if parts < self.least or 2 * parts < len(atoms):
            return False
        if any(atom.aval.shape != atoms[0].aval.shape for atom in atoms):
            return False
        axis = equation.params["dimension" if "dimension" in equation.params else "axis"]
        whole, backward = self.stacked(atoms)
        whole = jnp.moveaxis(jnp.flip(whole, 0) if backward else whole, 0, axis)
        self.known[equation.outvars[0]] = whole.reshape(equation.outvars[0].aval.shape)
        return True

    def stacked(self, atoms: Sequence[Any]) -> tuple[Any, bool]:
        """The values of variables along a new first axis; and whether in reverse order."""
        parts = [None if isinstance(a, compat.Literal) else self.parts.get(a) for a in atoms]
        steps = [
            after.index - before.index
            for before, after in itertools.pairwise(parts)
            if before is not None and after is not None and before.whole is after.whole
        ]
        backward = steps.count(-1) > steps.count(1)
        pairs = list(zip(atoms, parts, strict=True))
        pieces: list[Any] = []
        for atom, part in pairs[::-1] if backward else pairs:
            last = pieces[-1] if pieces else None
            if part is None:
                if not isinstance(last, list):
                    pieces.append(last := [])
                last.append(self.read(atom))
            elif isinstance(last, tuple) and last[0] is part.whole and last[2] == part.index:
                pieces[-1] = (part.whole, last[1], part.index + 1)
            else:
                pieces.append((part.whole, part.index, part.index + 1))
        if len(pieces) > _PIECES:
            return _gathered(pieces), backward
        arrays = [_cut(*piece) if isinstance(piece, tuple) else _stack(piece) for piece in pieces]
        return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays), backward


def _gathered(pieces: Sequence[Any]) -> Any:
    """The entries of many pieces, of few arrays, in one array."""
    arrays: list[Any] = []
    first: dict[int, int] = {}
    size, order = 0, []
    for piece in pieces:
        whole, low, high = piece if isinstance(piece, tuple) else (_stack(piece), 0, len(piece))
        if id(whole) not in first:
            first[id(whole)] = size
            arrays.append(whole)
            size += whole.shape[0]
        order += range(first[id(whole)] + low, first[id(whole)] + high)
    return jnp.concatenate(arrays).at[np.asarray(order)].get(mode="promise_in_bounds")


def _cut(whole: Any, low: int, high: int) -> Any:
    if (low, high) == (0, whole.shape[0]):
        return whole
    return jax.lax.slice_in_dim(whole, low, high)


def _stack(values: Sequence[Any]) -> Any:
    if any(isinstance(value, jax.Array) for value in values):
        return jnp.stack(values)
    return np.stack(values)


def _same(atoms: Sequence[Any]) -> bool:
    first = atoms[0]
    if isinstance(first, compat.Literal):
        return all(np.array_equal(atom.val, first.val) for atom in atoms)
    return all(atom is first for atom in atoms)


#: `(j, a)`: operand `a`, or output `a`, of equation `j` of a block.
_Place = tuple[int, int]


def _loop(run: Run, equations: Sequence[Any], uses: dict[Any, int], values: Values) -> None:
    """Evaluates all blocks of a run: side by side, or one after the other where they follow."""
    blocks = [
        equations[run.start + k * run.period : run.start + (k + 1) * run.period]
        for k in range(run.repeats)
    ]
    fixed: dict[_Place, Any] = {}
    along: dict[_Place, list[Any]] = {}
    # Outputs that later blocks read: in how many blocks' time, and who comes before the first.
    carried: dict[_Place, dict[int, Any]] = {}
    for j, sources in enumerate(run.sources):
        for a, source in enumerate(sources):
            atoms = [block[j].invars[a] for block in blocks]
            if source == OUTER:
                if _same(atoms):
                    fixed[j, a] = values.read(atoms[0])
                else:
                    along[j, a] = atoms
            elif source[0] > 0:
                back, *output = source
                before = carried.setdefault((output[0], output[1]), {})
                before.update((back - k, atoms[k]) for k in range(min(back, run.repeats)))
    kept: list[_Place] = []
    ends: list[_Place] = []
    for j, equation in enumerate(blocks[0]):
        for o in range(len(equation.outvars)):
            used = [uses.get(block[j].outvars[o], -1) >= run.stop for block in blocks]
            if any(used[:-1]) or (used[-1] and (j, o) not in carried):
                kept.append((j, o))
            elif used[-1]:  # where the carry ends
                ends.append((j, o))

    entries, reverse = _entries(along, blocks, values)

    def evaluate(before: dict[Any, Any], entry: dict[_Place, Any]) -> dict[_Place, Any]:
        made: dict[_Place, Any] = {}
        for j, equation in enumerate(blocks[0]):
            operands = []
            for a, source in enumerate(run.sources[j]):
                if (j, a) in fixed:
                    operands.append(fixed[j, a])
                elif (j, a) in entry:
                    operands.append(entry[j, a])
                else:
                    back, *output = source
                    place = output[0], output[1]
                    operands.append(before[place, back] if back else made[place])
            if (j, _START) in entry:
                sizes = equation.outvars[0].aval.shape
                outputs = [jax.lax.dynamic_slice(operands[0], list(entry[j, _START]), sizes)]
            else:
                outputs = compat.bind(equation, operands)
            made.update(((j, o), value) for o, value in enumerate(outputs))
        return made

    if not carried and not entries:
        made = evaluate({}, {})
        for j, o in kept:
            values.known.update((block[j].outvars[o], made[j, o]) for block in blocks)
        return
    in_turn = not device.launches_kernels() and run.period > _SHORT
    if not carried and not in_turn:
        wholes = jax.vmap(lambda entry: [evaluate({}, entry)[place] for place in kept])(entries)
    else:
        initial = {}
        for place, before in carried.items():
            like = blocks[0][place[0]].outvars[place[1]].aval
            for back in range(1, max(before) + 1):  # one that is missing is not read either
                value = values.read(before[back]) if back in before else jnp.zeros(like.shape)
                initial[place, back] = jnp.asarray(value, like.dtype)

        def step(before: dict[Any, Any], entry: dict[_Place, Any]) -> tuple[Any, list[Any]]:
            made = evaluate(before, entry)
            new = {
                (place, back): made[place] if back == 1 else before[place, back - 1]
                for place, back in before
            }
            return new, [made[place] for place in kept]

        last, wholes = jax.lax.scan(step, initial, entries, length=run.repeats, reverse=reverse)
        for j, o in ends:
            values.known[blocks[-1][j].outvars[o]] = last[(j, o), 1]
    for (j, o), whole in zip(kept, wholes, strict=True):
        for k, block in enumerate(blocks):
            index = run.repeats - 1 - k if reverse else k
            values.parts[block[j].outvars[o]] = Part(whole, index)


#: In the place of an operand: where a slice begins.
_START = -1


def _entries(
    along: dict[_Place, list[Any]], blocks: Sequence[Sequence[Any]], values: Values
) -> tuple[dict[_Place, Any], bool]:
    """What differs from block to block, along a first axis; and whether in reverse order."""
    found = {place: values.stacked(atoms) for place, atoms in along.items()}
    reverse = 2 * sum(backward for _, backward in found.values()) > len(found)
    entries = {
        place: whole if backward == reverse else jnp.flip(whole, 0)
        for place, (whole, backward) in found.items()
    }
    for j, equation in enumerate(blocks[0]):
        if is_window(equation):
            starts = [block[j].params["start_indices"] for block in blocks]
            if any(start != starts[0] for start in starts):
                order = np.asarray(starts[::-1] if reverse else starts, np.int32)
                entries[j, _START] = jnp.asarray(order)
    return entries, reverse
