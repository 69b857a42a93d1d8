"""Figures of one batch's problem: its coloured graph, its memory, its residuals and its moves.

Each function returns a Matplotlib figure: `figure.savefig("name.pdf")`.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from graphlib import TopologicalSorter
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pjax.graph import Graph, Node
from pjax.inspection import Profile, label
from pjax.lab.plots import CYCLE, literal
from pjax.lab.terminal import in_bytes
from pjax.problem import Sizes

#: The two sets: their colour, and what can be read on it.
SIDES = {"A": ("#0072B2", "white"), "B": ("#E69F00", "black")}
_GREY = "#555555"
#: Up to so many nodes are drawn one by one, and up to so many rows layer by layer.
_WHOLE, _ROWS = 40, 80
#: Up to so many nodes of a profile are lines, and so many rows of a figure have a name.
_CURVES, _NAMED = len(CYCLE), 150

Detail = Literal["auto", "nodes", "layers"]


def draw_graph(graph: Graph, detail: Detail = "auto") -> Figure:
    """The coloured graph of a problem: blue nodes are set A, orange ones set B.

    **Arguments:**

    - `graph`: of a problem whose groups are colours (`problem.graph`).
    - `detail`: `"nodes"`: every node, data flowing to the right; `"layers"`: every layer (see
      `layers`), data flowing downwards; `"auto"`: nodes up to 40 of them, else layers.

    **Returns:** the figure.
    """
    if detail == "nodes" or (detail == "auto" and len(graph.nodes) <= _WHOLE):
        return _draw_nodes(graph.nodes, graph.edges())
    return _draw_layers(graph)


class Layer(NamedTuple):
    """Nodes that are drawn as one.

    **Attributes:**

    - `nodes`: a chain of operations, with the identities behind them.
    - `parameters`: the nodes that they read directly.
    - `count`: how many such chains this one stands for.
    - `reads`: the places of the layers that they read.
    """

    nodes: tuple[Node, ...]
    parameters: tuple[Node, ...]
    count: int
    reads: tuple[int, ...]


def layers(graph: Graph) -> list[Layer]:
    """The layers of a graph, in the order of the data flow.

    A layer starts at an operation that reads a parameter with two or more axes, several layers, or
    a node that others read too, and at a loss; what follows is added as long as each node has one
    reader. Layers of the same operations on the same parameters (the steps of a loop) are one. If
    more than 80 are left, those of the same operations from the same source line are one.
    """
    chains, place = _chains(graph)
    parameters = [_parameters(graph, chain) for chain in chains]

    def by_parameters(number: int) -> Any:
        names = tuple(node.name for node in chains[number])
        shared = tuple(node.index for node in parameters[number])
        return (names, shared) if shared else number

    def by_line(number: int) -> Any:
        return tuple((node.name, node.source) for node in chains[number])

    merged: dict[Any, list[int]] = {}
    for key in (by_parameters, by_line):
        merged = {}
        for number in range(len(chains)):
            merged.setdefault(key(number), []).append(number)
        if len(merged) <= _ROWS:
            break
    row = {number: r for r, numbers in enumerate(merged.values()) for number in numbers}
    found = []
    for numbers in merged.values():
        reads = {
            row[place[producer]]
            for number in numbers
            for node in chains[number]
            for slot in node.slots
            for producer in graph.slots[slot].producers
            if place.get(producer, number) != number
        }
        found.append(
            Layer(
                tuple(chains[numbers[0]]),
                tuple(dict.fromkeys(p for number in numbers for p in parameters[number])),
                len(numbers),
                tuple(sorted(reads)),
            )
        )
    return found


def _chains(graph: Graph) -> tuple[list[list[Node]], dict[int, int]]:
    """The nodes of each layer before any are merged, and the layer of each node."""
    kinds = {node.index: node.kind for node in graph.nodes}
    producers: dict[int, list[int]] = defaultdict(list)
    readers: dict[int, set[int]] = defaultdict(set)
    through = {
        node.index: graph.slots[node.slots[0]].producers[0]
        for node in graph.nodes
        if node.kind == "identity"
    }
    for node in graph.nodes:
        if node.kind == "identity":
            continue
        for slot in node.slots:
            for one in graph.slots[slot].producers:
                origin = through.get(one, one)
                producers[node.index].append(origin)
                readers[origin].add(node.index)
    chains: list[list[Node]] = []
    place: dict[int, int] = {}
    for node in graph.nodes:
        if node.kind in ("parameter", "identity"):
            continue
        before = {one for one in producers[node.index] if kinds[one] != "parameter"}
        matrix = any(
            kinds[p] == "parameter" and len(graph.program.shape(_output(graph, p))) > 1
            for p in producers[node.index]
        )
        alone = len(before) == 1 and all(len(readers[one]) == 1 for one in before)
        if node.kind == "loss" or matrix or not alone:
            chains.append([])
            place[node.index] = len(chains) - 1
        else:
            place[node.index] = place[before.pop()]
        chains[place[node.index]].append(node)
    for identity, origin in through.items():
        if origin in place:
            place[identity] = place[origin]
            chains[place[origin]].append(graph.nodes[identity])
    return chains, place


def _output(graph: Graph, index: int) -> int:
    output = graph.nodes[index].output
    assert output is not None
    return output


def _parameters(graph: Graph, nodes: Iterable[Node]) -> list[Node]:
    """The parameters that these nodes read, those behind an identity too."""
    found = {}
    for node in nodes:
        for slot in node.slots:
            for index in graph.slots[slot].producers:
                one = graph.nodes[index]
                if one.kind == "identity":
                    one = graph.nodes[graph.slots[one.slots[0]].producers[0]]
                if one.kind == "parameter":
                    found[one.index] = one
    return list(found.values())


def _draw_layers(graph: Graph) -> Figure:
    rows = layers(graph)
    # Units are inches; the first dot of every row stands at 0.
    step, gap, width, most = 0.42, 0.22, 6.0, 12
    figure = Figure(figsize=(width, step * len(rows) + 1.0), layout="constrained")
    axes = figure.subplots()
    edges = [(read, number) for number, row in enumerate(rows) for read in row.reads]
    longest = max((abs(end - start) for start, end in edges), default=1)
    ends = [gap * (min(len(row.nodes), most) - 1) for row in rows]
    for start, end in edges:
        _draw_edge(axes, start, end, step, longest, ends)
    text = max(ends) + (0.75 if any(start >= end for start, end in edges) else 0.3)
    for number, row in enumerate(rows):
        height = -step * number
        shown = row.nodes if len(row.nodes) <= most else row.nodes[: most - 1]
        for column, node in enumerate(shown):
            _dot(axes, gap * column, height, node.colour, node.colour, 11, 7)
        if len(shown) < len(row.nodes):
            axes.text(gap * (most - 1), height, "…", ha="center", va="center", size=9)
        names = ", ".join(node.name for node in row.nodes if node.kind != "identity")
        names = f"{row.count} × {names}" if row.count > 1 else names
        reads = ", ".join(label(node.name) for node in row.parameters)
        axes.text(text, height + 0.02, literal(_cut(names, 46)), va="bottom", size=8.5, weight=700)
        axes.text(text, height - 0.01, literal(_cut(reads, 60)), va="top", size=7.5, color=_GREY)
    _legend_of_sides(axes)
    axes.set_xlim(-1.15, width - 1.3)
    axes.set_ylim(-step * (len(rows) - 0.4), step * 0.6)
    axes.set_axis_off()
    return figure


def _draw_edge(
    axes: Any, start: int, end: int, step: float, longest: int, ends: Sequence[float]
) -> None:
    """From row to row: straight to the next, in an arc on the left past others, back right."""
    style: dict[str, Any] = {"arrowstyle": "-|>", "color": _GREY, "lw": 0.9, "mutation_scale": 8}
    top, bottom = -step * start, -step * end
    if end - start == 1:
        points = [(0.0, top - 0.08), (0.0, bottom + 0.08)]
        codes = [Outline.MOVETO, Outline.LINETO]
    else:
        if end > start:
            first, last = -0.1, -0.1
            middle = -0.22 - 0.9 * (end - start) / longest
        else:
            first, last = ends[start] + 0.1, ends[end] + 0.1
            middle = max(first, last) + 0.4
        if end == start:
            top, bottom = top - 0.06, top + 0.06
        points = [(first, top), (middle, top), (middle, bottom), (last, bottom)]
        codes = [Outline.MOVETO, *[Outline.CURVE4] * 3]
    axes.add_patch(
        FancyArrowPatch(
            path=Outline(points, codes),
            linestyle="-" if end > start else "--",
            shrinkA=0,
            shrinkB=0,
            **style,
        )
    )


def _dot(axes: Any, x: float, y: float, colour: str, text: str, size: float, font: float) -> None:
    fill, ink = SIDES[colour]
    axes.plot(x, y, "o", markersize=size, color=fill, zorder=2)
    axes.annotate(text, (x, y), ha="center", va="center", color=ink, zorder=3, size=font)


def _legend_of_sides(axes: Any) -> None:
    for side, (fill, _) in SIDES.items():
        axes.plot([], [], "o", color=fill, label=f"set {side}")
    axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, handletextpad=0.1)


def _draw_nodes(nodes: Sequence[Any], edges: Sequence[tuple[int, int]]) -> Figure:
    places = _layout([node.index for node in nodes], edges)
    columns = max((x for x, _ in places.values()), default=0) + 1
    rows = max((abs(y) for _, y in places.values()), default=0) * 2 + 1
    figure = Figure(figsize=(1.5 + 1.5 * columns, 1.5 + 0.9 * rows), layout="constrained")
    axes = figure.subplots()
    for start, end in edges:
        # A longer edge bends, or it would run through the nodes in between.
        bend = 0.0 if places[end][0] - places[start][0] <= 1 else 0.35
        axes.annotate(
            "",
            xy=places[end],
            xytext=places[start],
            arrowprops={
                "arrowstyle": "-|>",
                "color": "#666666",
                "shrinkA": 15,
                "shrinkB": 15,
                "connectionstyle": f"arc3,rad={bend}",
            },
        )
    for node in nodes:
        x, y = places[node.index]
        _dot(axes, x, y, node.colour, str(node.index), 26, 10)
        axes.annotate(
            literal(textwrap.fill(label(node.name), 18)),
            (x, y),
            xytext=(0, -18),
            textcoords="offset points",
            ha="center",
            va="top",
            size=8,
            zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )
    _legend_of_sides(axes)
    axes.set_xlim(-0.7, columns - 0.3)
    axes.set_ylim(-rows / 2 - 0.4, rows / 2 + 0.5)
    axes.set_axis_off()
    return figure


def _layout(
    indices: Sequence[int], edges: Sequence[tuple[int, int]]
) -> dict[int, tuple[float, float]]:
    """Columns by the longest way to a node; parameters stand just before their first reader."""
    readers, producers = defaultdict(list), defaultdict(list)
    for start, end in edges:
        readers[start].append(end)
        producers[end].append(start)
    column: dict[int, int] = {}
    for index in TopologicalSorter({index: producers[index] for index in indices}).static_order():
        column[index] = 1 + max((column[other] for other in producers[index]), default=-1)
    for index in indices:
        if not producers[index] and readers[index]:
            column[index] = min(column[reader] for reader in readers[index]) - 1
    members = defaultdict(list)
    for index in indices:
        members[column[index]].append(index)
    row: dict[int, float] = {}
    for place in sorted(members):
        # Each node as high as its producers: fewer crossings.
        ordered = sorted(
            members[place],
            key=lambda i: (
                sum(row[p] for p in producers[i]) / len(producers[i]) if producers[i] else -1e9,
                i,
            ),
        )
        for position, index in enumerate(ordered):
            row[index] = (len(ordered) - 1) / 2 - position
    return {index: (float(column[index]), row[index]) for index in indices}


def memory_by_node(sizes: Sizes, title: str = "") -> Figure:
    """The bytes that a solver stores for the edge variables of each node, in the graph's order.

    Beside each bar stands what every copy of an operand would take, where that is more. Beyond 40
    nodes the smallest are one bar.

    **Arguments:**

    - `sizes`: of a problem (`problem.sizes()`).
    - `title`: such as the batch size, which the bytes grow with; the total is added.

    **Returns:** the figure.
    """
    bars = []
    for index, node in enumerate(sizes.nodes):
        if node.bytes:
            copies = node.edge_variables * node.bytes // node.stored
            bars.append((f"{index} {label(node.name)}", node.bytes, copies))
    if len(bars) > _WHOLE:
        largest = sorted(bars, key=lambda bar: -bar[1])[: _WHOLE - 1]
        rest = [bar for bar in bars if bar not in largest]
        bars = [bar for bar in bars if bar in largest]
        name = f"{len(rest)} other nodes"
        bars.append((name, sum(bar[1] for bar in rest), sum(bar[2] for bar in rest)))
    figure = Figure(figsize=(5.0, 0.26 * len(bars) + 1.3), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(bars)), [size for _, size, _ in bars], color=CYCLE[0][0], height=0.65)
    for place, (_, size, copies) in enumerate(bars):
        text = in_bytes(size)
        if copies > size:
            text += f" ({in_bytes(copies)} with every copy)"
        axes.annotate(
            text,
            (size, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            size=8,
            annotation_clip=False,
        )
    _name_rows(axes, [name for name, _, _ in bars])
    total = f"{in_bytes(sizes.bytes)} in all"
    axes.set_title(literal(f"{title}: {total}" if title else total), size=10, loc="left")
    # Room for the text at the longest bar.
    room = 2.3 if any(copies > size for _, size, copies in bars) else 1.2
    axes.set_xlim(0, room * max([size for _, size, _ in bars], default=1))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes(int(value))))
    axes.set_xlabel("stored for edge variables")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def residual_by_node(profile: Profile, title: str = "") -> Figure:
    """The distance to each node's constraint after each step of a solve, on a logarithmic scale.

    Up to 8 nodes are lines over the steps; more are the rows of a heat map, from the losses down to
    the parameters; a solve of one step is a mark for each node.

    **Arguments:**

    - `profile`: from [`pjax.profile`][].

    **Returns:** the figure.
    """
    values = np.asarray(profile.residual, np.float64)
    names = [label_of_node(name) for name in profile.names]
    steps, nodes = values.shape
    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    if steps == 1:
        figure = Figure(figsize=(5.0, 0.26 * nodes + 1.3), layout="constrained")
        axes = figure.subplots()
        axes.plot(shown[0], range(nodes), "o", color=CYCLE[0][0])
        _name_rows(axes, names)
        _log_axis(axes.xaxis, axes.set_xscale, shown)
        axes.set_xlabel("distance to the constraint after one step (no mark: 0)")
        axes.grid(alpha=0.3)
    elif nodes <= _CURVES:
        figure = Figure(figsize=(5.0, 3.8), layout="constrained")
        axes = figure.subplots()
        for number, name in enumerate(names):
            axes.plot(
                range(1, steps + 1),
                shown[:, number],
                color=CYCLE[number][0],
                marker=CYCLE[number][1],
                markersize=4,
                markevery=max(1, steps // 12),
                label=name,
            )
        _log_axis(axes.yaxis, axes.set_yscale, shown)
        axes.set(xlabel="steps of the solver", ylabel="distance to the constraint")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    else:
        figure = Figure(figsize=(5.0, 0.17 * min(nodes, _NAMED) + 1.4), layout="constrained")
        axes = figure.subplots()
        with np.errstate(invalid="ignore"):
            logarithms = np.log10(shown.T)
        # A few orders of magnitude tell nodes apart; what is far below is all the same.
        top = np.nanmax(logarithms) if np.isfinite(logarithms).any() else 0.0
        bottom = np.nanmin(logarithms) if np.isfinite(logarithms).any() else -1.0
        image = axes.imshow(
            logarithms,
            aspect="auto",
            interpolation="nearest",
            cmap="cividis",
            vmin=max(bottom, top - 8),
            vmax=max(top, bottom + 1e-6),
            extent=(0.5, steps + 0.5, nodes - 0.5, -0.5),
        )
        axes.set_facecolor("white")
        _name_rows(axes, names, grid=False)
        axes.set_xlabel("steps of the solver")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, ax=axes, location="top", pad=0.02, aspect=40, shrink=0.9)
        bar.set_label("distance to the constraint (white: none)", size=9)
        bar.ax.xaxis.set_major_locator(MaxNLocator(5, integer=top - bottom > 2))
        bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.2g}"))
    if title:
        figure.suptitle(literal(title), size=10)
    return figure


def label_of_node(name: str) -> str:
    """`"3 ['dense.weight']"`, as a profile has it, as a person writes it."""
    number, _, rest = name.partition(" ")
    return f"{number} {label(rest)}" if rest else name


def displacement_by_layer(
    params: PyTree, displacement: PyTree, gradient: PyTree | None = None, title: str = ""
) -> Figure:
    """The length of each parameter's displacement over that of the parameter, `|d| / |p|`.

    **Arguments:**

    - `params`: the parameters.
    - `displacement`: in their structure, from [`pjax.displacement`][], or what an update moved
      them by.
    - `gradient`: in their structure; drawn beside.

    **Returns:** the figure. A parameter that is all zeros has no mark: nothing can be said of it.
    """
    named = jax.tree_util.tree_flatten_with_path(params)[0]
    names = [label(jax.tree_util.keystr(path)) for path, _ in named]
    lengths = np.array([_length(leaf) for _, leaf in named])
    series = {"displacement": displacement}
    if gradient is not None:
        series["gradient"] = gradient
    figure = Figure(figsize=(5.0, 0.28 * min(len(names), _NAMED) + 1.5), layout="constrained")
    axes = figure.subplots()
    all_shares = []
    for (name, tree), (colour, marker) in zip(series.items(), CYCLE, strict=False):
        moved = np.array([_length(leaf) for leaf in jax.tree_util.tree_leaves(tree)])
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = np.where((lengths > 0) & (moved > 0), moved / lengths, np.nan)
        all_shares.append(shares)
        axes.plot(shares, range(len(names)), marker, color=colour, label=name)
    _name_rows(axes, names)
    _log_axis(axes.xaxis, axes.set_xscale, np.concatenate(all_shares))
    axes.set_xlabel("length over the parameter's length (no mark: 0)")
    axes.grid(alpha=0.3)
    if len(series) > 1:
        figure.legend(loc="outside upper right", ncols=2, frameon=False)
    if title:
        axes.set_title(literal(title), size=10, loc="left")
    return figure


def _length(leaf: Any) -> float:
    array = np.asarray(leaf)
    if array.dtype == jax.dtypes.float0:
        return 0.0
    return float(np.linalg.norm(array.astype(np.float64)))


def _name_rows(axes: Any, names: Sequence[str], grid: bool = True) -> None:
    """The names of rows from the top down; every so many if they are too many."""
    every = -(-len(names) // _NAMED)
    places = range(0, len(names), every)
    axes.set_yticks(places, [literal(_cut(names[place], 34)) for place in places], size=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if not grid:
        axes.tick_params(axis="y", length=0)


def _log_axis(axis: Any, set_scale: Any, values: np.ndarray) -> None:
    """A logarithmic axis whose numbers are plain text, and which has a few at least."""
    if not np.isfinite(values).any():
        return
    set_scale("log")
    low, high = np.nanmin(values), np.nanmax(values)
    if high / low < 30:
        # No two powers of ten are within reach: let both ends stand on it.
        low, high = low / 3, high * 3
        axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


__all__ = [
    "Layer",
    "displacement_by_layer",
    "draw_graph",
    "label",
    "layers",
    "memory_by_node",
    "residual_by_node",
]
