"""The layout of a program: graph, groups, and the form of each slot, found once and kept."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import jax.numpy as jnp
import numpy as np

from pjax.backend import device
from pjax.graph import Slot, bipartite, build_graph, warn
from pjax.metrics import Metric, Spectral
from pjax.options import Fallback, Fanout, Grouping, Splitting
from pjax.problem.layouts import Layout
from pjax.problem.size_report import warn_large
from pjax.program import Program, TraceError
from pjax.rules import Dense, Joined, Storage

_LAYOUTS: OrderedDict[Any, Layout] = OrderedDict()
_MAX_LAYOUTS = 256


def layout(
    program: Program,
    *,
    metric: Metric,
    fanout: Fanout = "exact",
    splitting: Splitting = "neuron",
    grouping: Grouping = "colours",
    reflecting: bool = False,
    fallback: Fallback | None = None,
) -> Layout:
    """The layout of a program's problem; equal programs share one, so nothing compiles twice."""
    if fanout not in ("exact", "paper"):
        raise ValueError(f'`fanout` must be "exact" or "paper", got {fanout!r}.')
    if splitting not in ("neuron", "layer"):
        raise ValueError(f'`splitting` must be "neuron" or "layer", got {splitting!r}.')
    if fallback not in (None, "gauss-newton"):
        raise ValueError(f'`fallback` must be None or "gauss-newton", got {fallback!r}.')
    if splitting == "neuron" and isinstance(metric, Spectral):
        raise ValueError(
            '`pjax.metrics.Spectral` weighs whole layers: it needs `splitting="layer"`, and '
            '`splitting="neuron"` needs `pjax.metrics.Uniform`.'
        )
    key = (program.key, metric, fanout, splitting, grouping, reflecting, fallback)
    found = _LAYOUTS.get(key)
    if found is None:
        found = make_layout(program, metric, fanout, splitting, grouping, reflecting, fallback)
        warn(found.graph)
        warn_large(found)
        _LAYOUTS[key] = found
        if len(_LAYOUTS) > _MAX_LAYOUTS:
            _LAYOUTS.popitem(last=False)
    _LAYOUTS.move_to_end(key)
    return found


def make_layout(
    program: Program,
    metric: Metric,
    fanout: Fanout,
    splitting: Splitting,
    grouping: Grouping,
    reflecting: bool,
    fallback: Fallback | None,
) -> Layout:
    """A new layout, without warnings."""
    graph = build_graph(program, splitting, fallback)
    for slot in graph.slots:
        if 0 in slot.shape:
            node = graph.nodes[slot.node]
            raise TraceError(
                f"The batch is empty: `{node.name}` ({node.source}) gets an operand of shape "
                f"{slot.shape}."
            )
    if grouping == "colours":
        graph = bipartite(graph)
        groups = graph.colour_groups()
    else:
        groups = graph.level_groups()
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    storages: list[Storage] = [Dense()] * len(graph.slots)
    for node in graph.nodes:
        if node.rule is not None:
            shared = [
                len({group_of[producer] for producer in graph.slots[index].producers}) > 1
                for index in node.slots
            ]
            forms = node.rule.storages(reflecting, shared)
            for index, form, several in zip(node.slots, forms, shared, strict=True):
                apart = several and isinstance(form, Dense) and _is_join(graph.slots[index])
                storages[index] = Joined(graph.slots[index].route) if apart else form
    return Layout(
        graph=graph,
        groups=tuple(tuple(group) for group in groups),
        storages=tuple(storages),
        resting=tuple(metric.resting(graph)),
        curved=tuple(metric.curved(graph)),
        counts=tuple(map(_reader_counts, graph.slots)),
        splitting=splitting,
        metric=metric,
        fanout=fanout,
        grouping=grouping,
        reflecting=reflecting,
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
