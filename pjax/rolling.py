"""Programs in which the same equations repeat become loops: compile time that does not grow with
depth or length.

The steps of a recurrent network and equal layers in a row give the same equations again and again,
in the forward pass, in the weights and in the projections. [`rolled`][] traces a function, finds
such repeats in its jaxpr, and evaluates each as one `jax.lax.scan` over the stacked operands. It
computes what the function computes, in the same order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pjax import _compat
from pjax._compat import P

#: Programs of fewer equations stay as they are: they compile within seconds, and each step of a
#: loop copies what it reads of stacked arrays.
MIN_EQUATIONS = 8_000
#: A run is rolled from so many repeats on; where each block reads the one before, if that saves so
#: many equations.
MIN_REPEATS = 24
MIN_SAVED = 40
#: Blocks side by side pay sooner where kernels are launched: so many equations and repeats.
MIN_LAUNCHES = 2_000
MIN_REPEATS_LAUNCHED = 8
#: Periods that are tried: those that the most equations have to the next one like them.
_PERIODS = 64
#: XLA runs convolutions in a loop slowly on a CPU, and nothing with effects is moved.
_UNROLLABLE = _compat.find_primitives("conv_general_dilated")
#: A CPU has no room for blocks side by side: larger ones than this take turns there, since the
#: arrays of one block fit its cache, and those of all do not.
_SHORT = 8
#: More pieces than this are gathered by their numbers.
_PIECES = 8
_SPLITS = _compat.find_primitives("split")
_JOINS = _compat.find_primitives("concatenate", "stack")


def rolled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with equations that repeat as loops.

    **Arguments:**

    - `function`: from pytrees of arrays to a pytree of arrays; traced once for each call.
    """

    def run(*args: Any) -> Any:
        leaves, tree = jax.tree_util.tree_flatten(args)

        def flat(*leaves: Any) -> Any:
            return function(*jax.tree_util.tree_unflatten(tree, leaves))

        compiled = jax.jit(flat)
        traced = compiled.trace(*leaves)
        jaxpr, consts = _compat.open_jaxpr(traced.jaxpr)
        equations = _live(jaxpr)
        runs = find_runs(equations, MIN_REPEATS) if len(equations) >= MIN_EQUATIONS else []
        if not runs:
            return compiled(*leaves)  # as it is, without a second trace
        if len(jaxpr.invars) > len(leaves):  # values that `function` closes over
            jaxpr, consts = _compat.open_jaxpr(jax.make_jaxpr(flat)(*leaves))
            runs = find_runs(_live(jaxpr), MIN_REPEATS)
        values = _Values(dict(zip(jaxpr.constvars, consts, strict=True)), MIN_REPEATS)
        values.known.update(zip(jaxpr.invars, leaves, strict=True))
        _evaluate(jaxpr, runs, values)
        outputs = [values.read(atom) for atom in jaxpr.outvars]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(traced.out_info), outputs)

    return run


def rolled_scan(step: Callable[[Any], tuple[Any, Any]], state: Any, length: int) -> tuple[Any, Any]:
    """`jax.lax.scan` of a step, with equations that repeat in it as loops.

    What the blocks of a run hand on to the next step stays in one array from step to step: blocks
    side by side then cost a few operations, however many they are.

    **Arguments:**

    - `step`: from a state to `(state, row)`; traced once.
    - `state`: a pytree of arrays.
    - `length`: how many steps.

    **Returns:** the last state, and the rows.
    """
    leaves, tree = jax.tree_util.tree_flatten(state)

    def flat(*leaves: Any) -> tuple[list[Any], Any]:
        new, row = step(jax.tree_util.tree_unflatten(tree, leaves))
        return jax.tree_util.tree_leaves(new), row

    closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
    jaxpr, consts = _compat.open_jaxpr(closed)
    equations = _live(jaxpr)
    runs, least = _side_by_side(equations)
    results, rows = jaxpr.outvars[: len(leaves)], jaxpr.outvars[len(leaves) :]
    row_tree = jax.tree_util.tree_structure(shapes[1])

    def evaluated(held: Sequence[Sequence[int]], singles: dict[int, Any], wholes: Any) -> _Values:
        values = _Values(dict(zip(jaxpr.constvars, consts, strict=True)), least)
        values.known.update((jaxpr.invars[i], value) for i, value in singles.items())
        for numbers, whole in zip(held, wholes, strict=True):
            parts = ((jaxpr.invars[i], _Part(whole, k)) for k, i in enumerate(numbers))
            values.parts.update(parts)
        _evaluate(jaxpr, runs, values)
        return values

    held: list[list[int]] = []
    if runs:

        def probe(*leaves: Any) -> None:
            values = evaluated([], dict(enumerate(leaves)), [])
            held.extend(_held_together(results, values.parts, least))

        jax.eval_shape(probe, *leaves)
    together = {i for numbers in held for i in numbers}

    def body(carry: tuple[dict[int, Any], list[Any]], _: None) -> tuple[Any, Any]:
        values = evaluated(held, *carry)
        singles = {i: values.read(results[i]) for i in carry[0]}
        wholes = []
        for numbers in held:
            whole, backward = values.stacked([results[i] for i in numbers])
            wholes.append(jnp.flip(whole, 0) if backward else whole)
        row = [values.read(atom) for atom in rows]
        return (singles, wholes), jax.tree_util.tree_unflatten(row_tree, row)

    singles = {i: leaf for i, leaf in enumerate(leaves) if i not in together}
    wholes = [jnp.stack([leaves[i] for i in numbers]) for numbers in held]
    (singles, wholes), found = jax.lax.scan(body, (singles, wholes), None, length=length)
    for numbers, whole in zip(held, wholes, strict=True):
        singles.update((i, whole[k]) for k, i in enumerate(numbers))
    return jax.tree_util.tree_unflatten(tree, [singles[i] for i in range(len(leaves))]), found


def _side_by_side(equations: Sequence[Any]) -> tuple[list[Run], int]:
    """The runs of a step that is done many times, and the least number of repeats of any."""
    launches, large = _compat.launches_kernels(), len(equations) >= MIN_EQUATIONS
    least = MIN_REPEATS_LAUNCHED if launches else MIN_REPEATS
    if not large and not (launches and len(equations) >= MIN_LAUNCHES):
        return [], least
    runs = [_unchained(equations, run, least) for run in find_runs(equations, least)]
    # Blocks that wait for each other are no faster as a loop: it only compiles sooner.
    return [
        run for run in runs if not _is_chain(run.sources) or (large and run.repeats >= MIN_REPEATS)
    ], least


def _held_together(results: Sequence[Any], parts: dict[Any, _Part], least: int) -> list[list[int]]:
    """Which results, by number and in order, are the entries of one array, next to each other."""
    numbers: dict[int, dict[int, int]] = {}
    for number, atom in enumerate(results):
        part = None if isinstance(atom, _compat.Literal) else parts.get(atom)
        if part is not None:
            numbers.setdefault(id(part.whole), {}).setdefault(part.index, number)
    found = []
    for entries in numbers.values():
        stretch: list[int] = []
        for index in sorted(entries):
            if index - 1 not in entries:
                stretch = []
                found.append(stretch)
            stretch.append(entries[index])
    return [stretch for stretch in found if len(stretch) >= least // 2]


class Run(NamedTuple):
    """Equations `start … start + period · repeats − 1`, blocks of `period` equations that repeat.

    **Attributes:**

    - `sources`: for each operand of a block where it comes from.
    """

    start: int
    period: int
    repeats: int
    sources: tuple[tuple[Any, ...], ...]

    @property
    def stop(self) -> int:
        return self.start + self.period * self.repeats


#: An operand from outside of the run; `(d, j, o)` stands for output `o` of equation `j` of the
#: block `d` before.
_OUTER = ()


def _evaluate(jaxpr: Any, runs: Sequence[Run], values: _Values) -> None:
    """Adds what the equations of a program make of its arguments, which `values` has."""
    equations = _live(jaxpr)
    uses = _last_uses(equations, jaxpr.outvars)
    place = 0
    for run in runs:
        for equation in equations[place : run.start]:
            values.add(equation)
        _loop(run, equations, uses, values)
        place = run.stop
    for equation in equations[place:]:
        values.add(equation)


def _live(jaxpr: Any) -> list[Any]:
    """The equations that outputs depend on, or that have effects."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, _compat.Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed.update(a for a in equation.invars if not isinstance(a, _compat.Literal))
    return kept[::-1]


def _last_uses(equations: Sequence[Any], outputs: Sequence[Any]) -> dict[Any, int]:
    """For each variable the place of the last equation that reads it; behind all for outputs."""
    found: dict[Any, int] = {}
    for place, equation in enumerate(equations):
        for atom in equation.invars:
            if not isinstance(atom, _compat.Literal):
                found[atom] = place
    found.update((a, len(equations)) for a in outputs if not isinstance(a, _compat.Literal))
    return found


# --- Which equations repeat ----------------------------------------------------------------------


def find_runs(equations: Sequence[Any], least: int) -> list[Run]:
    """The runs of at least so many repeats that save the most equations, in order."""
    if not _candidates(_rough_symbols(equations), 0, len(equations), least):
        return []
    symbols = _symbols(equations)
    found: list[Run] = []
    places = _places(equations)
    segments = [(0, len(equations))]
    while segments:
        begin, end = segments.pop()
        run = _best_run(equations, symbols, places, begin, end, least)
        if run is not None:
            found.append(run)
            segments += [(begin, run.start), (run.stop, end)]
    return sorted(found)


def _places(equations: Sequence[Any]) -> dict[Any, tuple[int, int]]:
    """For each variable the equation that makes it, and which of its outputs it is."""
    return {
        out: (place, number)
        for place, equation in enumerate(equations)
        for number, out in enumerate(equation.outvars)
    }


def _best_run(
    equations: Sequence[Any],
    symbols: np.ndarray,
    places: dict[Any, Any],
    begin: int,
    end: int,
    least: int,
) -> Run | None:
    for _, period, start, length in _candidates(symbols, begin, end, least):
        run = _aligned(equations, places, period, start, length, least)
        if run is not None:
            return run
    return None


def _candidates(
    symbols: np.ndarray, begin: int, end: int, least: int
) -> list[tuple[int, int, int, int]]:
    """`(−saved, period, start, length)` of all stretches that repeat, the best first."""
    part, found = symbols[begin:end], []
    for period in _periods(part, least):
        same = part[:-period] == part[period:]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], same, [False]])))
        for first, last in zip(edges[::2], edges[1::2], strict=True):
            repeats = (last - first) // period + 1
            if repeats >= least:
                saved, length = int((repeats - 1) * period), int(last - first + period)
                found.append((-saved, period, begin + int(first), length))
    return sorted(found)


def _periods(symbols: np.ndarray, least: int) -> list[int]:
    """The distances from an equation to the next one like it that occur the most."""
    if len(symbols) < least:
        return []
    order = np.argsort(symbols, kind="stable")
    distances = np.diff(order)[np.diff(symbols[order]) == 0]
    periods, counts = np.unique(distances, return_counts=True)
    best = np.argsort(-counts, kind="stable")[:_PERIODS]
    return [int(periods[i]) for i in best if counts[i] >= least]


def _aligned(
    equations: Sequence[Any],
    places: dict[Any, Any],
    period: int,
    start: int,
    length: int,
    least: int,
) -> Run | None:
    """The longest run of blocks wired alike among the places where a block may begin."""
    best: Run | None = None
    for shift in sorted({*range(min(length % period + 1, 8)), length % period}):
        count = (length - shift) // period
        first = start + shift
        wirings = [_wiring(equations, places, first + k * period, period, k) for k in range(count)]
        low = 0
        while low < count:
            high = low
            while high < count and wirings[high] == wirings[low]:
                high += 1
            repeats = high - low
            saved = (repeats - 1) * period
            enough = saved >= MIN_SAVED or not _is_chain(wirings[low])
            if repeats >= least and enough and (best is None or repeats > best.repeats):
                best = Run(first + low * period, period, repeats, wirings[low])
            low = high
        if best is not None and best.repeats >= count - 1:
            break
    return best


def _unchained(equations: Sequence[Any], run: Run, least: int) -> Run:
    """The run with blocks that begin elsewhere, if then none reads what the one before has made."""
    edges = [
        (source[0], source[1], j)
        for j, row in enumerate(run.sources)
        for source in row
        if source != _OUTER
    ]
    before = [(at, j) for back, at, j in edges if back]
    if not before or any(back > 1 for back, _, _ in edges) or run.repeats - 1 < least:
        return run
    places = _places(equations)
    # What is made at `at` is read at `j` of the next block: a block that begins between them has
    # both. It must not come between what is made and read within one block.
    for shift in range(max(j for _, j in before) + 1, min(at for at, _ in before) + 1):
        if any(not back and at < shift <= j for back, at, j in edges):
            continue
        start = run.start + shift
        found = {
            _wiring(equations, places, start + k * run.period, run.period, k)
            for k in range(run.repeats - 1)
        }
        if len(found) == 1:
            return Run(start, run.period, run.repeats - 1, found.pop())
    return run


def _is_chain(sources: Sequence[Sequence[Any]]) -> bool:
    """Whether blocks read what those before them have made."""
    return any(source != _OUTER and source[0] > 0 for row in sources for source in row)


def _wiring(
    equations: Sequence[Any], places: dict[Any, Any], start: int, period: int, number: int
) -> tuple[tuple[Any, ...], ...]:
    """For each equation of a block where its operands come from; see `Run.sources`."""

    def source(atom: Any) -> Any:
        if isinstance(atom, _compat.Literal) or atom not in places:
            return _OUTER
        place, output = places[atom]
        back, at = divmod(place - start, period)
        return (-back, at, output) if -number <= back <= 0 else _OUTER

    return tuple(
        tuple(source(atom) for atom in equation.invars)
        for equation in equations[start : start + period]
    )


def _rough_symbols(equations: Sequence[Any]) -> np.ndarray:
    """Numbers that are the same wherever those of `_symbols` are, and sometimes elsewhere."""
    numbers: dict[Any, int] = {}
    keys = ((e.primitive, *(out.aval.shape for out in e.outvars)) for e in equations)
    return np.asarray([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _symbols(equations: Sequence[Any]) -> np.ndarray:
    """A number for each equation, the same for equations that do the same to like operands."""
    numbers: dict[Any, int] = {}
    prints = _Prints()
    found = []
    for place, equation in enumerate(equations):
        fixed = equation.effects or equation.primitive in _UNROLLABLE
        key = place if fixed or prints.holds_unrollable(equation) else prints.of(equation)
        found.append(numbers.setdefault(key, len(numbers)))
    return np.asarray(found, np.int64)


class _Prints:
    """Keys of equations and of their parameters, equal where they do the same."""

    def __init__(self) -> None:
        self._bodies: dict[int, tuple[Any, Any]] = {}
        self._held: dict[int, tuple[Any, bool]] = {}

    def of(self, equation: Any) -> Any:
        if _is_window(equation):  # of one size, wherever it begins
            return equation.primitive, _type(equation.invars[0]), _type(equation.outvars[0])
        # Rules of derivatives are made anew for each call of one function: its body tells.
        is_call = equation.primitive in _compat.CALLS
        params = tuple(
            (name, self._value(value))
            for name, value in sorted(equation.params.items())
            if not is_call or _is_body(value) or isinstance(value, (bool, int, str, tuple))
        )
        operands = tuple(_type(atom) for atom in equation.invars)
        return equation.primitive, params, operands, tuple(_type(out) for out in equation.outvars)

    def holds_unrollable(self, equation: Any) -> bool:
        return any(
            self._holds(_compat.open_jaxpr(value)[0])
            for value in jax.tree_util.tree_leaves(list(equation.params.values()), is_leaf=_is_body)
            if _is_body(value)
        )

    def _holds(self, jaxpr: Any) -> bool:
        if id(jaxpr) not in self._held:
            found = any(
                e.effects or e.primitive in _UNROLLABLE or self.holds_unrollable(e)
                for e in jaxpr.eqns
            )
            self._held[id(jaxpr)] = jaxpr, found
        return self._held[id(jaxpr)][1]

    def _value(self, value: Any) -> Any:
        if _is_body(value):
            jaxpr, consts = _compat.open_jaxpr(value)
            return self._body(jaxpr), tuple(map(self._value, consts))
        if isinstance(value, (tuple, list)):
            return tuple(map(self._value, value))
        if isinstance(value, dict):
            return tuple((key, self._value(entry)) for key, entry in sorted(value.items()))
        if isinstance(value, np.ndarray):
            return value.shape, str(value.dtype), value.tobytes()
        try:
            hash(value)
        except TypeError:
            return id(value)
        return type(value), value

    def _body(self, jaxpr: Any) -> Any:
        if id(jaxpr) not in self._bodies:  # with the jaxpr, so that its identity stays its own
            self._bodies[id(jaxpr)] = jaxpr, self._print(jaxpr)
        return self._bodies[id(jaxpr)][1]

    def _print(self, jaxpr: Any) -> Any:
        numbers: dict[Any, int] = {}

        def name(atom: Any) -> Any:
            if isinstance(atom, _compat.Literal):
                return _type(atom), str(atom.val)
            return numbers.setdefault(atom, len(numbers))

        first = tuple((name(v), _type(v)) for v in (*jaxpr.constvars, *jaxpr.invars))
        equations = tuple(
            (self.of(e), tuple(map(name, e.invars)), tuple(map(name, e.outvars)))
            for e in jaxpr.eqns
        )
        return first, equations, tuple(map(name, jaxpr.outvars))


def _is_window(equation: Any) -> bool:
    """Whether an equation is a slice without gaps: the step of a loop that reads its entry."""
    if equation.primitive is not P.slice_p:
        return False
    strides = equation.params["strides"]
    return strides is None or all(stride == 1 for stride in strides)


def _is_body(value: Any) -> bool:
    return isinstance(value, (_compat.ClosedJaxpr, _compat.Jaxpr))


def _type(atom: Any) -> Any:
    return isinstance(atom, _compat.Literal), str(atom.aval)


# --- Loops ---------------------------------------------------------------------------------------


class _Part(NamedTuple):
    """One entry along the first axis of an array that holds those of all blocks."""

    whole: Any
    index: int


@dataclass
class _Values:
    """The values of variables so far; those that stand in a larger array, until they are read.

    **Attributes:**

    - `least`: as many parts of an array stay together.
    """

    known: dict[Any, Any]
    least: int
    parts: dict[Any, _Part] = field(default_factory=dict)

    def read(self, atom: Any) -> Any:
        if isinstance(atom, _compat.Literal):
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
        outputs = _compat.bind(equation, [self.read(atom) for atom in equation.invars])
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
        self.parts.update((out, _Part(whole, k)) for k, out in enumerate(equation.outvars))
        return True

    def _join(self, equation: Any) -> bool:
        """Concatenates or stacks arrays most of which are parts of one."""
        atoms = equation.invars
        parts = sum(atom in self.parts for atom in atoms if not isinstance(atom, _compat.Literal))
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
        parts = [None if isinstance(a, _compat.Literal) else self.parts.get(a) for a in atoms]
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
    if isinstance(first, _compat.Literal):
        return all(np.array_equal(atom.val, first.val) for atom in atoms)
    return all(atom is first for atom in atoms)


#: `(j, a)`: operand `a`, or output `a`, of equation `j` of a block.
_Place = tuple[int, int]


def _loop(run: Run, equations: Sequence[Any], uses: dict[Any, int], values: _Values) -> None:
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
            if source == _OUTER:
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
                outputs = _compat.bind(equation, operands)
            made.update(((j, o), value) for o, value in enumerate(outputs))
        return made

    if not carried and not entries:
        made = evaluate({}, {})
        for j, o in kept:
            values.known.update((block[j].outvars[o], made[j, o]) for block in blocks)
        return
    in_turn = not _compat.launches_kernels() and run.period > _SHORT
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
            values.parts[block[j].outvars[o]] = _Part(whole, index)


#: In the place of an operand: where a slice begins.
_START = -1


def _entries(
    along: dict[_Place, list[Any]], blocks: Sequence[Sequence[Any]], values: _Values
) -> tuple[dict[_Place, Any], bool]:
    """What differs from block to block, along a first axis; and whether in reverse order."""
    found = {place: values.stacked(atoms) for place, atoms in along.items()}
    reverse = 2 * sum(backward for _, backward in found.values()) > len(found)
    entries = {
        place: whole if backward == reverse else jnp.flip(whole, 0)
        for place, (whole, backward) in found.items()
    }
    for j, equation in enumerate(blocks[0]):
        if _is_window(equation):
            starts = [block[j].params["start_indices"] for block in blocks]
            if any(start != starts[0] for start in starts):
                order = np.asarray(starts[::-1] if reverse else starts, np.int32)
                entries[j, _START] = jnp.asarray(order)
    return entries, reverse
