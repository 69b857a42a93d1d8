"""Repetitions in a list of equations: which parts are equal, and what joins them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pjax.backend import compat
from pjax.compile.fingerprints import rough_symbols, symbols_of

MIN_SAVED = 40
#: Periods that are tried: those that the most equations have to the next one like them.
_PERIODS = 64


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
OUTER = ()


def live_equations(jaxpr: Any) -> list[Any]:
    """The equations that outputs depend on, or that have effects."""
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, compat.Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not needed.isdisjoint(equation.outvars):
            kept.append(equation)
            needed.update(a for a in equation.invars if not isinstance(a, compat.Literal))
    return kept[::-1]


def last_uses(equations: Sequence[Any], outputs: Sequence[Any]) -> dict[Any, int]:
    """For each variable the place of the last equation that reads it; behind all for outputs."""
    found: dict[Any, int] = {}
    for place, equation in enumerate(equations):
        for atom in equation.invars:
            if not isinstance(atom, compat.Literal):
                found[atom] = place
    found.update((a, len(equations)) for a in outputs if not isinstance(a, compat.Literal))
    return found


# --- Which equations repeat ----------------------------------------------------------------------


def find_runs(equations: Sequence[Any], least: int) -> list[Run]:
    """The runs of at least so many repeats that save the most equations, in order."""
    if not _candidates(rough_symbols(equations), 0, len(equations), least):
        return []
    symbols = symbols_of(equations)
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
            enough = saved >= MIN_SAVED or not is_chain(wirings[low])
            if repeats >= least and enough and (best is None or repeats > best.repeats):
                best = Run(first + low * period, period, repeats, wirings[low])
            low = high
        if best is not None and best.repeats >= count - 1:
            break
    return best


def unchained(equations: Sequence[Any], run: Run, least: int) -> Run:
    """The run with blocks that begin elsewhere, if then none reads what the one before has made."""
    edges = [
        (source[0], source[1], j)
        for j, row in enumerate(run.sources)
        for source in row
        if source != OUTER
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


def is_chain(sources: Sequence[Sequence[Any]]) -> bool:
    """Whether blocks read what those before them have made."""
    return any(source != OUTER and source[0] > 0 for row in sources for source in row)


def _wiring(
    equations: Sequence[Any], places: dict[Any, Any], start: int, period: int, number: int
) -> tuple[tuple[Any, ...], ...]:
    """For each equation of a block where its operands come from; see `Run.sources`."""

    def source(atom: Any) -> Any:
        if isinstance(atom, compat.Literal) or atom not in places:
            return OUTER
        place, output = places[atom]
        back, at = divmod(place - start, period)
        return (-back, at, output) if -number <= back <= 0 else OUTER

    return tuple(
        tuple(source(atom) for atom in equation.invars)
        for equation in equations[start : start + period]
    )
