"""What a state costs: numbers and bytes, node by node."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pjax.options import Exactness
from pjax.problem.layouts import Layout
from pjax.rules import Lifted


class LargeStateWarning(UserWarning):
    """A solver that reflects will store copies that take much memory."""


#: Bytes of stored copies from which on a layout warns.
_LARGE = 2**30


def warn_large(layout: Layout) -> None:
    copied = {
        layout.graph.slots[i].node for i, s in enumerate(layout.storages) if isinstance(s, Lifted)
    }
    rows = [(sizes(layout).nodes[index], layout.graph.nodes[index]) for index in sorted(copied)]
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
        # A parameter's constraint is that its readers agree: their mean is the nearest point.
        exactness = "exact" if node.rule is None else node.rule.exactness
        rows.append(NodeSize(node.name, exactness, count, stored, size))
    return Sizes(tuple(rows))
