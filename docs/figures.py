"""Draws the figures of docs/concepts.md: python docs/figures.py"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pjax.lab.plots import COLOURS, save
from pjax.lab.problem_plots import SIDES

HERE = Path(__file__).resolve().parent
INK, MOVE = "#333333", COLOURS["projection"]


def arrow(axes: Any, start: Any, end: Any, colour: str = MOVE, bend: float = 0) -> None:
    axes.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": colour,
            "lw": 2,
            "mutation_scale": 16,
            "shrinkA": 4,
            "shrinkB": 4,
            "connectionstyle": f"arc3,rad={bend}",
        },
    )


def nearest_of_relu(x: float, z: float) -> tuple[float, float]:
    """The nearer of the nearest points of the two pieces."""
    middle = max((x + z) / 2, 0.0)
    pieces = [(min(x, 0.0), 0.0), (middle, middle)]
    return min(pieces, key=lambda point: np.hypot(point[0] - x, point[1] - z))


def projection() -> Figure:
    """Nearest points of the graph of a relu."""
    figure = Figure(figsize=(5, 4))
    axes = figure.subplots()
    axes.plot([-2.2, 0, 2.6], [0, 0, 2.6], color=SIDES["A"][0], lw=3)
    axes.text(1.95, 2.35, "y = relu(x)", color=SIDES["A"][0], ha="right")
    for point in ((1.9, 0.5), (-1.3, 0.7), (-0.4, 1.8)):
        near = nearest_of_relu(*point)
        arrow(axes, point, near)
        axes.plot(*point, "o", color=INK, ms=8)
        axes.plot(*near, "D", color=MOVE, ms=8)
    axes.plot([], [], "o", color=INK, label="operand, and output that is wanted")
    axes.plot([], [], "D", color=MOVE, label="nearest point of the graph")
    axes.set(xlim=(-2.2, 2.6), ylim=(-0.4, 2.6), aspect="equal")
    axes.set(xlabel="operand x", ylabel="output y")
    figure.legend(loc="outside upper left", handletextpad=0.2)
    return figure


#: A network of one hidden layer: what it is made of, where it stands, and its colour.
NODES = {
    "w1": (0.0, 1.0, "A"),
    "layer 1": (1.0, 0.0, "B"),
    "relu": (2.0, 0.0, "A"),
    "w2": (2.0, 1.0, "A"),
    "layer 2": (3.0, 0.0, "B"),
    "loss": (4.0, 0.0, "A"),
}
EDGES = (
    ("w1", "layer 1"),
    ("layer 1", "relu"),
    ("relu", "layer 2"),
    ("w2", "layer 2"),
    ("layer 2", "loss"),
)


def draw_network(axes: Any, filled: Callable[[str], bool]) -> None:
    for start, end in EDGES:
        axes.plot(*zip(NODES[start][:2], NODES[end][:2], strict=True), color="#999999", lw=2)
    for name, (x, y, side) in NODES.items():
        fill, ink = SIDES[side]
        if not filled(name):
            fill, ink = "#DDDDDD", "#666666"
        axes.plot(x, y, "o", color=fill, ms=25, zorder=3)
        letter = side if filled(name) else ""
        axes.text(x, y - 0.02, letter, color=ink, ha="center", va="center", zorder=4)
        above = y > 0
        place = y + 0.33 if above else y - 0.33
        axes.text(x, place, name, ha="center", va="bottom" if above else "top")
    axes.set(xlim=(-0.4, 4.4), ylim=(-0.8, 1.7))
    axes.set_axis_off()


def two_colours() -> Figure:
    """The two maps of a solver, each on all nodes of its colour."""
    figure = Figure(figsize=(5, 4.4))
    for axes, side in zip(figure.subplots(2, 1), "AB", strict=True):
        draw_network(axes, lambda name, side=side: NODES[name][2] == side)
        axes.set_title(f"project all of {side}", fontsize=12, loc="left")
    return figure


def sweep() -> Figure:
    """A sweep from the loss to the parameters."""
    figure = Figure(figsize=(5, 2.9))
    axes = figure.subplots()
    draw_network(axes, lambda name: True)
    requests = (
        ("loss", "layer 2", "1"),
        ("layer 2", "relu", "2"),
        ("layer 2", "w2", "2"),
        ("relu", "layer 1", "3"),
        ("layer 1", "w1", "4"),
    )
    for start, end, number in requests:
        (x0, y0, _), (x1, y1, _) = NODES[start], NODES[end]
        if y0 == y1:
            arrow(axes, (x0 - 0.15, 0.2), (x1 + 0.15, 0.2), bend=0.3)
            place = ((x0 + x1) / 2, 0.5)
        else:
            arrow(axes, (x0, 0.25), (x1 + 0.22, y1), bend=0.25)
            place = ((x0 + x1) / 2 + 0.5, 0.95)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over the edges
        axes.text(
            *place,
            number,
            color=MOVE,
            ha="center",
            va="center",
            weight="bold",
            bbox=box,
        )
    return figure


def main() -> None:
    with matplotlib.rc_context(fname=HERE / "hooks" / "matplotlibrc"):
        matplotlib.rcParams["font.size"] = 13
        for draw in (projection, two_colours, sweep):
            path = HERE / "images" / f"concept-{draw.__name__.replace('_', '-')}.png"
            save(draw(), path)
            print(f"wrote {path.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
