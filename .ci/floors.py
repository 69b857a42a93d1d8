"""Prints the floors of the library: the rooms of pjax/, what each imports, and how many arrows.

python .ci/floors.py
"""

from __future__ import annotations

import graphlib
import sys
from pathlib import Path

import grimp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
graph = grimp.build_graph("pjax")
below = {
    room: {
        other
        for other in graph.find_children("pjax")
        if other != room
        and graph.direct_import_exists(importer=room, imported=other, as_packages=True)
    }
    for room in graph.find_children("pjax")
}
floors: dict[str, int] = {}
for room in graphlib.TopologicalSorter(below).static_order():
    floors[room] = 1 + max((floors[other] for other in below[room]), default=0)
for room in sorted(floors, key=lambda room: (floors[room], room)):
    names = ", ".join(sorted(other.removeprefix("pjax.") for other in below[room]))
    print(f"{floors[room]:2} {room.removeprefix('pjax.'):12} {names}")
core = [room for room in below if room not in ("pjax.lab", "pjax.__main__")]
print(
    f"{max(floors[room] for room in core)} floors, {sum(len(below[room]) for room in core)} arrows "
    "(without the laboratory)"
)
