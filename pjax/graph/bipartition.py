"""Nodes in two groups, of which no two of one group share a variable."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pjax.graph.colouring import two_colour
from pjax.graph.graph import Graph, Node, Slot
from pjax.program import Route
from pjax.rules import IDENTITY


def bipartite(graph: Graph) -> Graph:
    """The same graph with two colours such that no node reads one of its own colour.

    Identity nodes are inserted where that needs them, one per producer and as few as can be found.
    """
    colours, producers = two_colour(len(graph.nodes), graph.edges())
    flip = colours[graph.losses[0].index]
    letters = ["A" if colour == flip else "B" for colour in colours]
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
    return Graph(graph.program, tuple(nodes), tuple(slots), graph.terms)
