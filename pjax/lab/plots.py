"""Figures: accuracy against steps and time, residuals, and the coloured graph, as PNG files."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from pjax.lab.train import Run

#: Okabe and Ito's colours, told apart with any colour vision; one for each method.
COLOURS = {
    "ap": "#0072B2",
    "cp": "#56B4E9",
    "dr": "#009E73",
    "cdr": "#000000",
    "dm": "#999999",
    "ar": "#F0E442",
    "displacement-adam": "#CC79A7",
    "adam": "#D55E00",
    "sgd": "#E69F00",
    "straight-through": "#882255",
}
_MARKERS = {
    "ap": "o",
    "cp": "s",
    "dr": "^",
    "cdr": "P",
    "dm": "X",
    "ar": "<",
    "displacement-adam": "*",
    "adam": "D",
    "sgd": "v",
    "straight-through": "p",
}
_SIDES = {"A": "#0072B2", "B": "#E69F00"}


def plot_accuracy(runs: Sequence[Run], path: Path, title: str) -> None:
    """Validation accuracy against batches and against seconds of training, side by side."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for run in runs:
        style = _style(run)
        accuracy = [record.validation_accuracy for record in run.records]
        by_step.plot([record.step for record in run.records], accuracy, **style)
        # Time is on a logarithmic axis, which has no place for the start at zero seconds.
        by_time.plot([record.seconds for record in run.records[1:]], accuracy[1:], **style)
    by_step.set(xlabel="batches", ylabel="validation accuracy")
    by_time.set(xlabel="seconds of training, without compilation", xscale="log")
    reached = [record.validation_accuracy for run in runs for record in run.records[1:]]
    if reached:
        # The start is chance for every method; what differs is above.
        best = max(reached)
        by_step.set_ylim(max(min(reached), best - 0.5) - 0.01, best + 0.01)
    _finish_pair(figure, by_step, by_time, path, title)


def plot_residual(runs: Sequence[Run], path: Path, title: str) -> None:
    """The residual at the end of each batch's solve, of the methods that have one."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        known = [record for record in run.records if math.isfinite(record.residual)]
        if known:
            axes.plot(
                [record.step for record in known],
                [record.residual for record in known],
                **_style(run),
            )
    _finish_residual(figure, axes, path, title)


class Curve(NamedTuple):
    """What a method's seeds did: rows are seeds, columns are steps; NaN where one has stopped."""

    method: str
    steps: Float[np.ndarray, " steps"]
    seconds: Float[np.ndarray, " steps"]
    validation_accuracy: Float[np.ndarray, "seeds steps"]
    residual: Float[np.ndarray, "seeds steps"]


def plot_curves(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Validation accuracy against batches and seconds: the mean over seeds, and their range."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for curve in curves:
        _band(by_step, curve.steps, curve.validation_accuracy, curve.method)
        # Time is on a logarithmic axis, which has no place for the start at zero seconds.
        _band(by_time, curve.seconds[1:], curve.validation_accuracy[:, 1:], curve.method)
    by_step.set(xlabel="batches", ylabel="validation accuracy")
    by_time.set(xlabel="seconds of training for each seed, without compilation", xscale="log")
    reached = [float(np.nanmax(curve.validation_accuracy)) for curve in curves]
    low = [float(np.nanmin(curve.validation_accuracy[:, 1:])) for curve in curves]
    # The start is chance for every method; what differs is above.
    by_step.set_ylim(max(min(low), max(reached) - 0.5) - 0.01, max(reached) + 0.01)
    _finish_pair(figure, by_step, by_time, path, title)


def plot_residual_curves(curves: Sequence[Curve], path: Path, title: str) -> None:
    """The residual at the end of a batch's solve: the mean over seeds, and their range."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        if np.isfinite(curve.residual[:, 1:]).any():
            _band(axes, curve.steps[1:], curve.residual[:, 1:], curve.method)
    _finish_residual(figure, axes, path, title)


def _finish_pair(figure: Figure, by_step: Any, by_time: Any, path: Path, title: str) -> None:
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    by_step.legend(loc="lower right")
    figure.suptitle(title)
    save(figure, path)


def _finish_residual(figure: Figure, axes: Any, path: Path, title: str) -> None:
    axes.set(xlabel="batches", ylabel="distance to the constraints", yscale="log", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no method with a residual", ha="center", transform=axes.transAxes)
    save(figure, path)


def _band(axes: Any, x: np.ndarray, values: np.ndarray, method: str) -> None:
    known = np.isfinite(values).any(axis=0)
    x, values = x[known], values[:, known]
    axes.plot(x, np.nanmean(values, axis=0), label=method, **method_style(method))
    axes.fill_between(
        x,
        np.nanmin(values, axis=0),
        np.nanmax(values, axis=0),
        color=COLOURS[method],
        alpha=0.2,
        linewidth=0,
    )


def plot_graph(nodes: Iterable[Any], edges: Iterable[tuple[int, int]], path: Path) -> None:
    """The graph of a problem: data flows to the right, blue nodes are A, orange ones B.

    **Arguments:**

    - `nodes`: with `index`, `name` and `colour` (`"A"` or `"B"`).
    - `edges`: pairs of indices, producer before consumer.
    """
    nodes, edges = list(nodes), list(edges)
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
        axes.plot(x, y, "o", markersize=26, color=_SIDES[node.colour], zorder=2)
        axes.annotate(
            str(node.index), (x, y), ha="center", va="center", color="white", zorder=3, size=10
        )
        axes.annotate(
            label(node.name),
            (x, y),
            xytext=(0, -25),
            textcoords="offset points",
            ha="center",
            size=8,
            zorder=3,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )
    for side, colour in _SIDES.items():
        axes.plot([], [], "o", color=colour, label=f"set {side}")
    axes.legend(loc="upper left", ncols=2, frameon=False)
    axes.set_xlim(-0.7, columns - 0.3)
    axes.set_ylim(-rows / 2 - 0.4, rows / 2 + 0.5)
    axes.set_axis_off()
    save(figure, path)


def label(name: str) -> str:
    """A node's name as a person writes it: `['dense1.weight']` is `dense1.weight`."""
    return name.removeprefix("['").removesuffix("']")


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


def _style(run: Run) -> dict[str, Any]:
    return {
        "label": run.method,
        "color": COLOURS.get(run.method),
        "marker": _MARKERS.get(run.method, "o"),
        "markersize": 3,
        # Cyclic and alternating projections often agree: dashes show the line below.
        "linestyle": "--" if run.method == "cp" else "-",
        "linewidth": 1.4,
    }


def method_style(method: str) -> dict[str, Any]:
    """The colour and the marker of a method."""
    return {"color": COLOURS[method], "marker": _MARKERS[method], "markersize": 4}


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})
