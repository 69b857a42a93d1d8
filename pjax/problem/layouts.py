"""Layouts: all of a problem that does not depend on data, found once for each program and kept.

In come a program and the options of a problem; out go the graph, its groups, and the form of each
slot's state; `sizes` counts its numbers and bytes. An equal program gets the layout that was found
before, so nothing compiles twice.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pjax.backend import device
from pjax.graph import WHOLE, Ends, Graph, Slot, bipartite, build_graph, warn
from pjax.metrics import Spectral, Uniform
from pjax.options import Exactness, Fallback, Fanout, Grouping, Splitting
from pjax.program import Program, TraceError
from pjax.rules import Dense, Joined, Storage


@dataclass(frozen=True)
class Formulation:
    """How a function becomes a problem; hashable.

    **Arguments:**

    - `metric`: the weights of the distances. By default [`pjax.metrics.Uniform`][] for `"neuron"`
        splitting and [`pjax.metrics.Spectral`][] for `"layer"`.
    - `fanout`, `splitting`, `grouping`, `reflecting`, `fallback`: see
        [`pjax.feasibility_problem`][].
    - `ends`: where the function is a part of a larger one.

    **Raises:** `ValueError` for other words, and for a metric of layers in neuron splitting.
    """

    metric: Any = None
    fanout: Fanout = "exact"
    splitting: Splitting = "neuron"
    grouping: Grouping = "colours"
    reflecting: bool = False
    fallback: Fallback | None = None
    ends: Ends = WHOLE

    def __post_init__(self) -> None:
        if self.fanout not in ("exact", "paper"):
            raise ValueError(f'`fanout` must be "exact" or "paper", got {self.fanout!r}.')
        if self.splitting not in ("neuron", "layer"):
            raise ValueError(f'`splitting` must be "neuron" or "layer", got {self.splitting!r}.')
        if self.fallback not in (None, "gauss-newton"):
            raise ValueError(f'`fallback` must be None or "gauss-newton", got {self.fallback!r}.')
        if self.metric is None:
            default = Spectral() if self.splitting == "layer" else Uniform()
            object.__setattr__(self, "metric", default)
        if self.splitting == "neuron" and isinstance(self.metric, Spectral):
            raise ValueError(
                '`pjax.metrics.Spectral` weighs whole layers: it needs `splitting="layer"`, and '
                '`splitting="neuron"` needs `pjax.metrics.Uniform`.'
            )

    def for_solver(self, solver: Any) -> Formulation:
        """The same with the sets and storages that a solver needs."""
        return replace(self, grouping=solver.grouping, reflecting=solver.reflecting)


@dataclass(frozen=True, eq=False)
class Layout:
    """Everything about a problem that does not depend on data; a static argument of compiled code.

    **Attributes:**

    - `formulation`: what was asked for.
    - `graph`: with identities if the groups are colours.
    - `groups`: indices of nodes, a projection each.
    - `storages`: the form of each slot's state.
    - `stiff`: for each slot whether its weight is infinite.
    - `curved`: for each slot of a layer whether its response is solved for.
    - `counts`: for each slot and each of its producers how many of its entries read each entry of
        the producer; None where that differs or depends on data.
    """

    formulation: Formulation
    graph: Graph
    groups: tuple[tuple[int, ...], ...]
    storages: tuple[Storage, ...]
    stiff: tuple[bool, ...]
    curved: tuple[bool, ...]
    counts: tuple[tuple[float | None, ...], ...]


_LAYOUTS: OrderedDict[Any, Layout] = OrderedDict()
_MAX_LAYOUTS = 256


def layout(program: Program, formulation: Formulation) -> Layout:
    """The layout of a program's problem; equal programs share one, so nothing compiles twice."""
    key = program.key, formulation
    kept = _LAYOUTS.get(key)
    if kept is None:
        kept = make_layout(program, formulation)
        warn(kept.graph)
        warn_large(kept)
        _LAYOUTS[key] = kept
        if len(_LAYOUTS) > _MAX_LAYOUTS:
            _LAYOUTS.popitem(last=False)
    _LAYOUTS.move_to_end(key)
    return kept


def make_layout(program: Program, formulation: Formulation) -> Layout:
    """A new layout, without warnings."""
    graph = build_graph(program, formulation.splitting, formulation.fallback, formulation.ends)
    for slot in graph.slots:
        if 0 in slot.shape:
            node = graph.nodes[slot.node]
            raise TraceError(
                f"The batch is empty: `{node.name}` ({node.source}) gets an operand of shape "
                f"{slot.shape}."
            )
    if formulation.grouping == "colours":
        graph = bipartite(graph)
        groups = graph.colour_groups()
    else:
        groups = graph.level_groups()
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    storages: list[Storage] = []  # the slots lie in the order of their nodes
    for node in graph.nodes:
        shared = [
            len({group_of[producer] for producer in graph.slots[index].producers}) > 1
            for index in node.slots
        ]
        forms = node.rule.storages(formulation.reflecting, shared)
        for index, form, several in zip(node.slots, forms, shared, strict=True):
            joins = several and form == Dense() and _is_join(graph.slots[index])
            storages.append(Joined(graph.slots[index].route) if joins else form)
    metric = formulation.metric
    return Layout(
        formulation,
        graph,
        groups=tuple(tuple(group) for group in groups),
        storages=tuple(storages),
        stiff=tuple(metric.stiff(graph)),
        curved=tuple(metric.curved(graph)),
        counts=tuple(map(_reader_counts, graph.slots)),
    )


def _reader_counts(slot: Slot) -> tuple[float | None, ...]:
    """For each producer how many entries of a slot read each of its entries.

    A number where it is the same for all entries and the program alone fixes it, None elsewhere.
    """
    known = {atom for equation in slot.route.equations for atom in equation.inputs}
    made = {out for equation in slot.route.equations for out in equation.outputs}
    free = {atom for atom in known if isinstance(atom, int)} - made - set(slot.route.sources)
    if slot.route.direct:
        return (1.0,)
    if free:
        return (None,) * len(slot.producers)
    if slot.route.even and math.prod(slot.shape):
        (source,) = slot.route.sources
        return (math.prod(slot.shape) / math.prod(slot.route.program.shape(source)),)
    pulled = device.run_once(lambda: slot.route.pull(jnp.ones(slot.shape, slot.dtype), {}))
    counts = [np.asarray(part, np.float64) for part in pulled]
    return tuple(float(c.flat[0]) if np.all(c == c.flat[0]) else None for c in counts)


def _is_join(slot: Slot) -> bool:
    """Whether a slot reads every entry of its producers once, and nothing else."""
    program = slot.route.program
    read = sum(math.prod(program.shape(var)) for var in slot.route.sources)
    return read == math.prod(slot.shape) and all(c == 1 for c in _reader_counts(slot))


# What a state costs.


class LargeStateWarning(UserWarning):
    """A solver that reflects will store copies that take much memory."""


#: Bytes of stored copies from which on a layout warns.
_LARGE = 2**30


def warn_large(layout: Layout) -> None:
    graph = layout.graph
    copied = {slot.node for slot, s in zip(graph.slots, layout.storages, strict=True) if s.lifted}
    rows = [(sizes(layout).nodes[index], graph.nodes[index]) for index in sorted(copied)]
    total = sum(size.bytes for size, _ in rows)
    if total > _LARGE:
        largest, node = max(rows, key=lambda row: row[0].bytes)
        warnings.warn(
            f"A solver that reflects stores the copies of {len(rows)} operation(s) with two free "
            f"operands: {total / 1e9:.1f} GB for one state, {largest.bytes / 1e9:.1f} GB of it for "
            f"`{node.name}` ({node.source}). AlternatingProjections and CyclicProjections store "
            "none; a smaller batch stores fewer.",
            LargeStateWarning,
            stacklevel=3,
        )


class NodeSize(NamedTuple):
    """Edge variables of one node's slots: as the paper counts them, and as they are stored.

    `bytes` are those of the numbers stored.
    `exactness` is the class of its rule: `"exact"`, `"inexact"` or `"relaxed"`.
    """

    name: str
    exactness: Exactness
    edge_variables: int
    stored: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """How large a problem is.

    **Attributes:**

    - `nodes`: for each node its edge variables (every copy counted), the numbers stored for them,
        and the bytes that it has in a state.
    - `edge_variables`, `stored`, `bytes`: the sums.
    """

    nodes: tuple[NodeSize, ...]

    @property
    def edge_variables(self) -> int:
        return sum(node.edge_variables for node in self.nodes)

    @property
    def stored(self) -> int:
        return sum(node.stored for node in self.nodes)

    @property
    def bytes(self) -> int:
        return sum(node.bytes for node in self.nodes)


def sizes(layout: Layout) -> Sizes:
    """The edge variables and bytes of a layout's state, before anything is allocated."""
    rows = []
    for node in layout.graph.nodes:
        count = stored = size = 0
        for index in node.slots:
            slot, storage = layout.graph.slots[index], layout.storages[index]
            copies = np.asarray(storage.copies, np.int64)
            count += int(np.sum(copies)) * (math.prod(slot.shape) // max(copies.size, 1))
            numbers = storage.numbers(slot.shape)
            stored += numbers
            size += numbers * np.dtype(slot.dtype).itemsize
        rows.append(NodeSize(node.name, node.rule.exactness, count, stored, size))
    return Sizes(tuple(rows))
