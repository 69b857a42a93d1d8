"""Nodes whose output is read through thresholds alone."""

from __future__ import annotations

from pjax.graph.graph import Graph
from pjax.rules import Threshold


def feeds_thresholds(graph: Graph, node: int) -> bool:
    """Whether thresholds, and nothing else, read the output of a node."""
    readers = [graph.nodes[graph.slots[i].node] for i in graph.readers()[node]]
    return bool(readers) and all(isinstance(reader.rule, Threshold) for reader in readers)


def latent_nodes(graph: Graph) -> frozenset[int]:
    """The nodes between parameters and the weights that layers read, where thresholds make these.

    All functions of parameters alone that have a threshold before them, and what these read.
    """
    readers = graph.readers()
    latent: set[int] = set()
    for index in reversed(graph.backward_order()):
        node = graph.nodes[index]
        reading = [graph.slots[i].kind for i in readers[index]]
        if node.kind == "parameter" or "weight" not in reading:
            continue
        before = {p for i in node.slots for p in graph.slots[i].producers}
        if isinstance(node.rule, Threshold) or not before.isdisjoint(latent):
            latent.add(index)
    pending = list(latent)
    while pending:
        for i in graph.nodes[pending.pop()].slots:
            for producer in graph.slots[i].producers:
                if graph.nodes[producer].kind != "parameter" and producer not in latent:
                    latent.add(producer)
                    pending.append(producer)
    return frozenset(latent)
