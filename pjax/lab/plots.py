"""Figures of training: accuracy against batches and seconds, and residuals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from pjax.lab.config import NAMES
from pjax.lab.files import make_folder

#: Okabe and Ito's colours and Tol's, told apart with any colour vision; one for each method.
COLOURS = {
    "ap": "#0072B2",
    "cp": "#56B4E9",
    "dr": "#009E73",
    "cdr": "#000000",
    "dm": "#999999",
    "ar": "#F0E442",
    "projection": "#AA4499",
    "displacement-adam": "#999933",
    "adam": "#D55E00",
    "sgd": "#E69F00",
    "muon": "#332288",
    "schedule-free": "#117733",
    "straight-through": "#882255",
}
_MARKERS = {
    "ap": "o",
    "cp": "s",
    "dr": "^",
    "cdr": "P",
    "dm": "X",
    "ar": "<",
    "projection": "d",
    "displacement-adam": "*",
    "adam": "D",
    "sgd": "v",
    "muon": "h",
    "schedule-free": ">",
    "straight-through": "p",
}
#: Where several lines are of one method: these colours and markers, those that are dark first.
CYCLE = tuple(
    zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#999999"),
        "osD^vP*X",
        strict=True,
    )
)


class Curve(NamedTuple):
    """What a method's seeds did: rows are seeds, columns are steps; NaN where one has stopped."""

    method: str
    steps: Float[np.ndarray, " steps"]
    seconds: Float[np.ndarray, " steps"]
    validation_accuracy: Float[np.ndarray, "seeds steps"]
    residual: Float[np.ndarray, "seeds steps"]


def plot_curves(
    curves: Sequence[Curve], path: Path, title: str, labels: Sequence[str] | None = None
) -> None:
    """Validation accuracy against batches and seconds: the mean over seeds, and their range.

    **Arguments:**

    - `curves`: what is drawn.
    - `path`, `title`: of the file; of the figure.
    - `labels`: of the curves; by default the names of their methods.
    """
    with matplotlib.rc_context({"font.size": 12}):  # it is read on phones too
        figure = Figure(figsize=(8, 4.4), layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        for curve, text, style in _styled(curves, labels):
            accuracy = curve.validation_accuracy
            _band(by_step, curve.steps, accuracy, text, style)
            # Time is on a logarithmic axis, which has no place for the start at zero seconds.
            _band(by_time, curve.seconds[1:], accuracy[:, 1:], text, style)
        by_step.set(xlabel="batches", ylabel="validation accuracy")
        by_time.set(xlabel="seconds, without compiling", xscale="log")
        by_time.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        by_time.xaxis.set_minor_formatter(NullFormatter())
        _limit_accuracy(by_step, curves)
        by_step.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in (by_step, by_time):
            axes.grid(alpha=0.3)
        if by_step.lines:
            figure.legend(handles=by_step.lines, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(literal(title), fontsize=12)
        save(figure, path)


def plot_residual_curves(
    curves: Sequence[Curve], path: Path, title: str, labels: Sequence[str] | None = None
) -> None:
    """The residual at the end of a batch's solve: the mean over seeds, and their range."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for curve, text, style in _styled(curves, labels):
        if np.isfinite(curve.residual[:, 1:]).any():
            _band(axes, curve.steps[1:], curve.residual[:, 1:], text, style)
    axes.set(xlabel="batches", ylabel="distance to the constraints", yscale="log")
    axes.set_title(literal(title), fontsize=10)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=9)
    else:
        axes.text(0.5, 0.5, "no method with a residual", ha="center", transform=axes.transAxes)
    save(figure, path)


def accuracy_figure(
    curves: Sequence[Curve],
    against: Literal["batches", "seconds"] = "batches",
    labels: Sequence[str] | None = None,
) -> Figure:
    """Validation accuracy against batches or seconds: the mean over seeds, and their range.

    **Arguments:**

    - `curves`: what is drawn; not all of them may be empty.
    - `against`: batches, or seconds of training for each seed (on a logarithmic axis).
    - `labels`: of the curves; by default the names of their methods.

    **Returns:** the figure, of one panel.
    """
    figure = Figure(figsize=_PANEL, layout="constrained")
    axes = figure.subplots()
    for curve, text, style in _styled(curves, labels):
        if against == "batches":
            _band(axes, curve.steps, curve.validation_accuracy, text, style)
        else:
            _band(axes, curve.seconds[1:], curve.validation_accuracy[:, 1:], text, style)
    if against == "batches":
        axes.set_xlabel("batches")
    else:
        axes.set(xlabel="seconds of training for each seed, without compilation", xscale="log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("validation accuracy")
    _limit_accuracy(axes, curves)
    _legend(axes, "lower right")
    return figure


def residual_figure(curves: Sequence[Curve], labels: Sequence[str] | None = None) -> Figure | None:
    """The residual at the end of a batch's solve: the mean over seeds, and their range.

    **Returns:** the figure, of one panel; nothing if no curve has a residual.
    """
    figure = Figure(figsize=_PANEL, layout="constrained")
    axes = figure.subplots()
    for curve, text, style in _styled(curves, labels):
        if (curve.residual[:, 1:] > 0).any():
            _band(axes, curve.steps[1:], curve.residual[:, 1:], text, style)
    if not axes.lines:
        return None
    axes.set(xlabel="batches", ylabel="distance to the constraints", yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    _legend(axes, "best")
    return figure


#: Inches of a figure of one panel: it can be read on a phone.
_PANEL = (4.8, 3.6)


def _styled(
    curves: Sequence[Curve], labels: Sequence[str] | None
) -> list[tuple[Curve, str, dict[str, Any]]]:
    methods = [curve.method for curve in curves]
    known = len(set(methods)) == len(methods) and all(method in COLOURS for method in methods)
    found = []
    for number, curve in enumerate(curves):
        colour, marker = CYCLE[number % len(CYCLE)]
        if known:
            colour, marker = COLOURS[curve.method], _MARKERS[curve.method]
        style = {
            "color": colour,
            "marker": marker,
            "markersize": 5,
            # Light colours need an edge on white.
            "markeredgecolor": "#333333",
            "markeredgewidth": 0.5,
            # Alternating and cyclic projections often agree: dashes show the line below.
            "linestyle": "--" if number >= len(CYCLE) or (known and curve.method == "cp") else "-",
        }
        name = NAMES.get(curve.method, curve.method)
        found.append((curve, name if labels is None else labels[number], style))
    return found


def _legend(axes: Any, place: str) -> None:
    axes.grid(alpha=0.3)
    if len(axes.lines) > 5:
        axes.figure.set_figheight(_PANEL[1] + 0.1 * len(axes.lines))
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    elif axes.lines:
        axes.legend(loc=place, fontsize=8)


def _limit_accuracy(axes: Any, curves: Sequence[Curve]) -> None:
    """The start is chance for every method; what differs is above."""
    later = np.concatenate([curve.validation_accuracy[:, 1:].ravel() for curve in curves])
    later = later[np.isfinite(later)]
    if len(later):
        best = float(later.max())
        axes.set_ylim(max(float(later.min()), best - 0.3) - 0.01, best + 0.01)


def literal(text: str) -> str:
    """Text that a figure shows as it is: a dollar starts no formula, a name is never hidden."""
    text = "".join(
        sign if sign.isprintable() or sign == "\n" else "\N{REPLACEMENT CHARACTER}" for sign in text
    )
    text = text.replace("$", r"\$")
    # Matplotlib leaves labels with an underscore in front out of a legend.
    return f" {text}" if text.startswith("_") else text


def method_style(method: str) -> dict[str, Any]:
    """Colour and marker of a method's line."""
    return {"color": COLOURS[method], "marker": _MARKERS[method], "markersize": 4}


def _band(axes: Any, x: np.ndarray, values: np.ndarray, text: str, style: dict[str, Any]) -> None:
    known = np.isfinite(values).any(axis=0)
    x, values = x[known], values[:, known]
    if not len(x):
        return
    every = max(1, len(x) // 20)
    axes.plot(x, np.nanmean(values, axis=0), label=literal(text), markevery=every, **style)
    axes.fill_between(
        x,
        np.nanmin(values, axis=0),
        np.nanmax(values, axis=0),
        color=style["color"],
        alpha=0.2,
        linewidth=0,
    )


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, in the format that the file's ending names."""
    make_folder(path.parent)
    figure.savefig(path, dpi=150, metadata={"Software": None} if path.suffix == ".png" else None)
