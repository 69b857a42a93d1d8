"""Layouts: all of a problem that does not depend on data, found once for each program."""

from __future__ import annotations

from dataclasses import dataclass

from pjax.graph import Graph
from pjax.metrics import Metric
from pjax.options import Fanout, Grouping, Splitting
from pjax.rules import Storage


@dataclass(frozen=True)
class Layout:
    """Everything about a problem that does not depend on data; a static argument of compiled code.

    **Attributes:**

    - `graph`: with identities if the groups are colours.
    - `groups`: indices of nodes, a projection each.
    - `storages`: the form of each slot's state.
    - `resting`: for each slot whether its weight is infinite.
    - `curved`: for each slot of a layer whether its response is solved for.
    - `counts`: for each slot and each of its producers how many of its entries read each entry of
        the producer; None where that differs or depends on data.
    """

    graph: Graph
    groups: tuple[tuple[int, ...], ...]
    storages: tuple[Storage, ...]
    resting: tuple[bool, ...]
    curved: tuple[bool, ...]
    counts: tuple[tuple[float | None, ...], ...]
    splitting: Splitting
    metric: Metric
    fanout: Fanout
    grouping: Grouping
    reflecting: bool

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other
