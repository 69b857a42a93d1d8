"""A graph of constraints: nodes, and the slots in which they hold copies of variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pjax.patterns import LossTerm
from pjax.program import Atom, Program, Route
from pjax.rules import Membership, Rule, Threshold

Kind = Literal["parameter", "operation", "loss", "identity"]


@dataclass(frozen=True, eq=False)
class Slot:
    """One operand of one node.

    **Attributes:**

    - `index`: its place in `graph.slots`.
    - `node`: the index of the node that reads it.
    - `route`: how its entries are read from producers' outputs.
    - `producers`: for each source of the route the node that provides it (the producer itself, or
        its identity).
    - `kind`: `"weight"` if it depends on parameters only, else `"activation"`.
    """

    index: int
    node: int
    route: Route
    producers: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    kind: Literal["weight", "activation"]

    @property
    def variable(self) -> int:
        return self.route.target


@dataclass(frozen=True, eq=False)
class Node:
    """A parameter, an operation, a loss or an identity.

    **Attributes:**

    - `rule`: the specification; equal nodes share one.
    - `slots`: indices of its slots.
    - `knowns`: its operands that are data.
    - `output`: the variable that it defines; None for a loss.
    - `inner`: `(u, offset)` for a piecewise linear node `y = f(u − offset)`: the reference of `f`.
    - `colour`: `"A"` or `"B"`; A holds the (first) loss.
    - `source`: the user's source line.
    - `fallback`: whether its operation has no rule, and `fallback="gauss-newton"` gave it one.
    """

    index: int
    kind: Kind
    name: str
    rule: Rule
    slots: tuple[int, ...]
    knowns: tuple[Atom, ...]
    output: int | None
    inner: tuple[int, Atom | None] | None = None
    colour: Literal["A", "B"] = "A"
    source: str = ""
    fallback: bool = False


class Ends(NamedTuple):
    """Where a graph is one part of a larger one.

    **Attributes:**

    - `input`: whether the last leaf is no parameter, but what the part before hands on.
    - `output`: whether the loss is none, but stands for what the part behind has of readers.
    - `colour`: of the nodes that hand something on, at both ends; None: what follows from the loss.
    """

    input: bool = False
    output: bool = False
    colour: Literal["A", "B"] | None = None


#: Of a graph that is a whole.
WHOLE = Ends()


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes, slots and wiring of a program; built once per program, and free of data."""

    program: Program
    nodes: tuple[Node, ...]
    slots: tuple[Slot, ...]
    #: What each loss node is, in their order.
    terms: tuple[LossTerm, ...]
    ends: Ends = WHOLE

    @property
    def entry(self) -> Node | None:
        """The node of what the part before hands on."""
        last = len(self.program.leaves) - 1
        found = (node for node in self.parameters if node.output == last)
        return next(found, None) if self.ends.input else None

    @property
    def exit(self) -> Slot | None:
        """The slot that stands for the readers in the part behind."""
        losses = (node for node in self.losses if not isinstance(node.rule, Membership))
        return self.slots[next(losses).slots[0]] if self.ends.output else None

    def edges(self) -> list[tuple[int, int]]:
        """All pairs `(producer, reader)` of node indices, without repetition, sorted."""
        return sorted({(p, slot.node) for slot in self.slots for p in slot.producers})

    def shapes(self, node: Node) -> tuple[tuple[int, ...], ...]:
        """The shapes of a node's slots."""
        return tuple(self.slots[i].shape for i in node.slots)

    def readers(self) -> dict[int, list[int]]:
        """For each node, the indices of the slots that read it."""
        slots_of: dict[int, list[int]] = {node.index: [] for node in self.nodes}
        for slot in self.slots:
            for producer in dict.fromkeys(slot.producers):
                slots_of[producer].append(slot.index)
        return slots_of

    @property
    def losses(self) -> list[Node]:
        return [node for node in self.nodes if node.kind == "loss"]

    @property
    def parameters(self) -> list[Node]:
        return [node for node in self.nodes if node.kind == "parameter"]

    def colour_groups(self) -> list[list[int]]:
        """The nodes of colour A and those of colour B."""
        return [[n.index for n in self.nodes if n.colour == colour] for colour in ("A", "B")]

    def levels(self) -> list[int]:
        """The level of each node: its longest way to a loss."""
        level = [0] * len(self.nodes)
        # Readers before what they read: nodes are in topological order, but for identities, which
        # come last and are read from anywhere.
        place = {node.index: float(node.index) for node in self.nodes}
        for node in self.nodes:
            if node.kind == "identity":
                (slot,) = node.slots
                place[node.index] = self.slots[slot].producers[0] + 0.5
        for producer, reader in sorted(self.edges(), key=lambda edge: -place[edge[1]]):
            level[producer] = max(level[producer], level[reader] + 1)
        return level

    def level_groups(self) -> list[list[int]]:
        """Reverse topological levels from the losses, the parameters last: no node reads another of
        its group.
        """
        level = self.levels()
        groups: dict[int, list[int]] = {}
        for node in self.nodes:
            if node.kind != "parameter":
                groups.setdefault(level[node.index], []).append(node.index)
        ordered = [groups[key] for key in sorted(groups)]
        parameters = [node.index for node in self.parameters]
        return [*ordered, parameters] if parameters else ordered

    def backward_order(self) -> list[int]:
        """All nodes, readers before what they read, the parameters last."""
        return [index for group in self.level_groups() for index in group]

    def loss_coefficients(self, values: Mapping[int, Any]) -> list[Any]:
        """How much each row of each loss counts in the function's result: 1 if it is the result."""
        return [term.counts(values) for term in self.terms]

    def term(self, node: Node) -> LossTerm:
        """What a loss node is in the function's result."""
        return self.terms[self.losses.index(node)]


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
