"""Nodes in two groups, of which no two of one group share a variable.

A projection onto the nodes of one colour is local to each of them only if no node of that colour
reads another. Where a producer has a reader of its own colour, an identity node of the other
colour is put between them, one per producer, however many readers it serves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pjax.graph.graph import Graph, Node, Slot
from pjax.program import Route, TraceError
from pjax.rules import IDENTITY

#: Beyond this many edges the integer program is not tried.
_MAX_EDGES_EXACT = 2000


def two_colour(size: int, edges: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Colours `c_v ∈ {0, 1}` with as few producers as possible that have a reader of their colour.

    **Arguments:**

    - `size`: the number of nodes.
    - `edges`: pairs `(producer, reader)`.

    **Returns:** `(colours, producers)`: a colour for each node, and the producers that need an
    identity node, in ascending order. The same graph always gets the same answer. A graph without
    odd cycles needs none; else the integer program `min Σ d_v, d_v ≥ 1 where c_v = c_r` is solved,
    and for large graphs a local search takes its place.
    """
    edges = sorted(set(edges))
    colours = _breadth_first(size, edges)
    if not conflicts(colours, edges):
        return colours, []
    candidates = [_improve(colours, edges)]
    if len(edges) <= _MAX_EDGES_EXACT:
        exact = _integer_program(size, edges)
        if exact is not None:
            candidates.append(exact)
    best = min(candidates, key=lambda found: len(conflicts(found, edges)))
    return best, conflicts(best, edges)


def conflicts(colours: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[int]:
    """The producers that have a reader of their own colour."""
    return sorted({producer for producer, reader in edges if colours[producer] == colours[reader]})


def _breadth_first(size: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    neighbours: list[list[int]] = [[] for _ in range(size)]
    for producer, reader in edges:
        neighbours[producer].append(reader)
        neighbours[reader].append(producer)
    colours = [-1] * size
    for start in range(size):
        if colours[start] >= 0:
            continue
        colours[start] = 0
        queue = deque([start])
        while queue:
            node = queue.popleft()
            for other in neighbours[node]:
                if colours[other] < 0:
                    colours[other] = 1 - colours[node]
                    queue.append(other)
    return colours


def _improve(colours: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[int]:
    """Flips single nodes while that leaves fewer producers in conflict."""
    colours = list(colours)
    readers: list[list[int]] = [[] for _ in colours]
    producers: list[list[int]] = [[] for _ in colours]
    for producer, reader in edges:
        readers[producer].append(reader)
        producers[reader].append(producer)

    def in_conflict(node: int) -> bool:
        return any(colours[node] == colours[reader] for reader in readers[node])

    improved = True
    while improved:
        improved = False
        for node in range(len(colours)):
            affected = {node, *producers[node]}
            before = sum(map(in_conflict, affected))
            colours[node] ^= 1
            if sum(map(in_conflict, affected)) < before:
                improved = True
            else:
                colours[node] ^= 1
    return colours


def _integer_program(size: int, edges: Sequence[tuple[int, int]]) -> list[int] | None:
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError:  # pragma: no cover - JAX itself requires scipy
        return None
    # Unknowns: colour of each node, then whether it needs an identity.
    # c_p + c_r + d_p ≥ 1 and c_p + c_r − d_p ≤ 1.
    count = len(edges)
    producer, reader = np.array(edges).T
    row = np.arange(count)
    rows = np.concatenate([row, row, row, row + count, row + count, row + count])
    columns = np.concatenate([producer, reader, producer + size] * 2)
    ones = np.ones(count)
    values = np.concatenate([ones, ones, ones, ones, ones, -ones])
    matrix = coo_array((values, (rows, columns)), shape=(2 * count, 2 * size)).tocsr()
    lower = np.concatenate([ones, np.full(count, -np.inf)])
    upper = np.concatenate([np.full(count, np.inf), ones])
    solution = milp(
        np.concatenate([np.zeros(size), np.ones(size)]),
        # SciPy's types say one number for a bound; it takes one for each constraint.
        constraints=LinearConstraint(matrix, lower, upper),  # pyright: ignore[reportArgumentType]
        bounds=Bounds(0, 1),
        integrality=np.ones(2 * size),
        # A limit on nodes, not on time: the answer must not depend on the machine's load. Networks
        # are solved at the root; a random graph of 700 edges takes seconds even there.
        options={"node_limit": 1 + 2000 // count},
    )
    if solution.x is None:
        return None
    return [round(colour) for colour in solution.x[:size]]


def bipartite(graph: Graph) -> Graph:
    """The same graph with two colours such that no node reads one of its own colour.

    Identity nodes are inserted where that needs them, one per producer and as few as can be found.
    At the ends of a part all nodes that hand something on have one colour: neighbours have it too.

    **Raises:** [`pjax.TraceError`][] for a part that hands on what it was handed.
    """
    ends = ends_of(graph)
    one = dict.fromkeys(ends, min(ends, default=0))
    # What stands for the readers in the part behind has no say.
    edges = [edge for edge in graph.edges() if graph.exit is None or edge[1] != graph.exit.node]
    merged = [(one.get(producer, producer), one.get(reader, reader)) for producer, reader in edges]
    found, _ = two_colour(len(graph.nodes), merged)
    colours = [found[one.get(node, node)] for node in range(len(graph.nodes))]
    if graph.exit is not None:
        colours[graph.exit.node] = 1 - colours[ends[0]]
    producers = conflicts(colours, edges)
    flip = colours[graph.losses[0].index if graph.ends.colour is None else ends[0]]
    letters = ["A" if colour == flip else "B" for colour in colours]
    if graph.ends.colour == "B":
        letters = ["B" if letter == "A" else "A" for letter in letters]
    nodes = [replace(n, colour=letter) for n, letter in zip(graph.nodes, letters, strict=True)]
    slots = list(graph.slots)
    for producer in producers:
        node = nodes[producer]
        assert node.output is not None
        identity, slot_index = len(nodes), len(slots)
        opposite: Any = "B" if node.colour == "A" else "A"
        var = node.output
        program = graph.program
        for index, slot in enumerate(slots):
            if producer in slot.producers and nodes[slot.node].colour == node.colour:
                through = tuple(identity if p == producer else p for p in slot.producers)
                slots[index] = replace(slot, producers=through)
        kinds = {slots[i].kind for i in range(slot_index) if identity in slots[i].producers}
        slots.append(
            Slot(
                index=slot_index,
                node=identity,
                route=Route(program, (var,), (), var),
                producers=(producer,),
                shape=program.shape(var),
                dtype=program.deviation_dtype(var),
                kind="weight" if kinds == {"weight"} else "activation",
            )
        )
        nodes.append(
            Node(
                index=identity,
                kind="identity",
                name="identity",
                rule=IDENTITY,
                slots=(slot_index,),
                knowns=(),
                output=var,
                colour=opposite,
                source=node.source,
            )
        )
    return replace(graph, nodes=tuple(nodes), slots=tuple(slots))


def ends_of(graph: Graph) -> list[int]:
    """The nodes that hand something on, at both ends of a part."""
    before = [] if graph.entry is None else [graph.entry.index]
    behind = [] if graph.exit is None else list(graph.exit.producers)
    if not set(before).isdisjoint(behind):
        raise TraceError(
            "A layer hands on entries of its input as they are: these are entries of the layer "
            "before. Let an operation make each of its outputs."
        )
    return [*before, *behind]
