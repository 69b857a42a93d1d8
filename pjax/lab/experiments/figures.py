"""The figures of experiments, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from pjax.lab import comparison, plots
from pjax.lab.comparison import Line
from pjax.lab.config import NAMES
from pjax.lab.experiments.definition import Entry, Experiment
from pjax.lab.experiments.measures import Rows

#: Lines of one method in a panel: solid for the first splitting, dashed for the other.
_STYLES = {"layer": "-", "neuron": "--"}
#: For lines that are not of methods: dark to light with any colour vision.
_SERIES = "viridis"


def draw_accuracies(experiment: Experiment, found: Mapping[str, list[Line]], path: Path) -> None:
    """The figure of an experiment of the kind `accuracy`; `found` has the lines of each entry."""
    {"curves": _curves, "against": _against, "rows": _rows}[experiment.figure](
        experiment, found, path
    )


def draw_measures(experiment: Experiment, found: Mapping[str, Rows], path: Path) -> None:
    """The figure of an experiment of another kind; `found` has the rows of each entry."""
    {"cost": _cost, "residual": _residual, "sizes": _sizes}[experiment.kind](
        experiment, found, path
    )


def _curves(experiment: Experiment, found: Mapping[str, list[Line]], path: Path) -> None:
    panels = experiment.panels
    figure = Figure(figsize=(10, 0.6 + 3.6 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False, sharey="row")
    for (by_step, by_time), panel in zip(grid, panels, strict=True):
        entries = [entry for entry in experiment.entries if entry.panel == panel]
        lowest, highest = 1.0, 0.0
        for entry in entries:
            for line in found.get(entry.name, ()):
                curve = comparison.curve(line)
                mean = np.nanmean(curve.validation_accuracy, axis=0)
                style = _style(line.method, entry, _label(line.method, entry, entries))
                by_step.plot(curve.steps[1:], mean[1:], **style)
                by_time.plot(curve.seconds[1:], mean[1:], **style)
                for axes, x in ((by_step, curve.steps), (by_time, curve.seconds)):
                    axes.fill_between(
                        x[1:],
                        np.nanmin(curve.validation_accuracy, axis=0)[1:],
                        np.nanmax(curve.validation_accuracy, axis=0)[1:],
                        color=style["color"],
                        alpha=0.15,
                        linewidth=0,
                    )
                lowest, highest = min(lowest, mean[1:].min()), max(highest, mean[1:].max())
        by_step.set(xlabel="batches", ylabel="validation accuracy")
        by_step.set_title(_literal(panel), loc="left")
        by_time.set(xlabel="seconds of training for each seed", xscale="log")
        if highest:
            by_step.set_ylim(max(lowest, highest - 0.3) - 0.01, highest + 0.01)
        for axes in (by_step, by_time):
            axes.grid(alpha=0.3)
        if by_time.get_legend_handles_labels()[0]:
            by_time.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, experiment, path)


def _against(experiment: Experiment, found: Mapping[str, list[Line]], path: Path) -> None:
    def draw(axes: Any, entries: Sequence[Entry]) -> None:
        for (method, splitting), members in _series(entries, found).items():
            points = []
            for entry in members:
                line = next(line for line in found[entry.name] if line.method == method)
                points.append((entry.x, *line.mean("test_accuracy")))
            x, y, error = zip(*sorted(points), strict=True)
            label = _named(method, splitting)
            error = [0.0 if math.isnan(one) else one for one in error]
            axes.errorbar(x, y, error, capsize=2, **_style(method, members[0], label))
        axes.set(xlabel=_literal(experiment.x), ylabel="test accuracy")
        _whole_ticks(axes, [entry.x for entry in entries])

    _panels(experiment, draw, path, sharey=True)


def _rows(experiment: Experiment, found: Mapping[str, list[Line]], path: Path) -> None:
    """One row for each entry, one mark for each method; each row has its own middle."""
    entries = experiment.entries
    figure = Figure(figsize=(8, 0.9 + 1.15 * len(entries)), layout="constrained")
    grid = figure.subplots(len(entries), 1, squeeze=False)[:, 0]
    seen: dict[str, Any] = {}
    for axes, entry in zip(grid, entries, strict=True):
        lines = found.get(entry.name, [])
        metric = _metric(lines)
        for place, line in enumerate(lines):
            mean, error = line.mean(metric)
            style = _style(line.method, entry, NAMES[line.method]) | {"linestyle": "none"}
            style["markersize"] = 7
            seen[NAMES[line.method]] = axes.errorbar(
                [mean], [-place], xerr=[0.0 if math.isnan(error) else error], capsize=3, **style
            )
        axes.set_ylim(-max(len(lines), 1) + 0.4, 0.6)
        axes.set_yticks([])
        name = f"{_literal(entry.name)}\n{metric.replace('_', ' ').replace('auc', 'AUC')}"
        axes.set_ylabel(name, rotation=0, ha="right", va="center", size=9)
        axes.grid(alpha=0.3, axis="x")
        axes.tick_params(labelsize=8)
    # The same width for all, so that differences can be compared from row to row.
    filled = [axes for axes, entry in zip(grid, entries, strict=True) if found.get(entry.name)]
    width = max(axes.get_xlim()[1] - axes.get_xlim()[0] for axes in filled)
    for axes in filled:
        right = min(sum(axes.get_xlim()) / 2 + 0.55 * width, 1)
        axes.set_xlim(right - 1.1 * width, right)
    if seen:
        figure.legend(
            seen.values(), seen.keys(), loc="outside lower center", ncols=min(len(seen), 3)
        )
    _save(figure, experiment, path)


def _cost(experiment: Experiment, found: Mapping[str, Rows], path: Path) -> None:
    def draw(axes: Any, entries: Sequence[Entry]) -> None:
        for (method, splitting), members in _series(entries, found).items():
            points = []
            for entry in members:
                row = next(row for row in found[entry.name] if row["method"] == method)
                points.append((entry.x, row["milliseconds_per_projection_step"]))
            label = _named(method, splitting)
            axes.plot(*zip(*sorted(points), strict=True), **_style(method, members[0], label))
        axes.set(
            xlabel=_literal(experiment.x), ylabel="ms for one step", xscale="log", yscale="log"
        )
        _plain_ticks(axes)
        _whole_ticks(axes, [entry.x for entry in entries])

    _panels(experiment, draw, path)


def _residual(experiment: Experiment, found: Mapping[str, Rows], path: Path) -> None:
    import matplotlib

    colours = matplotlib.colormaps[_SERIES]

    def draw(axes: Any, entries: Sequence[Entry]) -> None:
        for place, entry in enumerate(entries):
            colour = colours(0.9 * place / max(len(entries) - 1, 1))
            for row in found.get(entry.name, ()):
                values = [math.nan if one is None else one for one in row["residual"]]
                several = len(found[entry.name]) > 1
                label = f"{row['rows']} rows" + f", {NAMES[row['method']]}" * several
                axes.plot(row["steps"], values, color=colour, label=f"{label}: {row['verdict']}")
        axes.set(xlabel=_literal(experiment.x), ylabel="residual", xscale="log", yscale="log")

    _panels(experiment, draw, path, sharey=True)


def _sizes(experiment: Experiment, found: Mapping[str, Rows], path: Path) -> None:
    def draw(axes: Any, entries: Sequence[Entry]) -> None:
        for (method, splitting), members in _series(entries, found).items():
            rows = [
                (entry.x, next(row for row in found[entry.name] if row["method"] == method))
                for entry in sorted(members, key=lambda entry: entry.x or 0.0)
            ]
            name = _named(method, splitting)
            style = _style(method, members[0], name)
            x = [place for place, _ in rows]
            if rows[0][1]["predicted_bytes"] is not None:
                style["linestyle"] = "-"
                predicted = [row["predicted_bytes"] / 1e6 for _, row in rows]
                axes.plot(x, predicted, **style | {"label": f"{name}: state, predicted"})
                allocated = [row["allocated_bytes"] / 1e6 for _, row in rows]
                hollow = {"linestyle": "none", "markerfacecolor": "none", "markersize": 10}
                axes.plot(x, allocated, **style | hollow | {"label": f"{name}: state, allocated"})
            if all(row["temporary_bytes"] is not None for _, row in rows):
                used = [row["temporary_bytes"] / 1e6 for _, row in rows]
                axes.plot(
                    x, used, **style | {"linestyle": ":", "label": f"{name}: XLA's temporaries"}
                )
        axes.set(xlabel=_literal(experiment.x), ylabel="MB", xscale="log", yscale="log")
        _plain_ticks(axes)
        _whole_ticks(axes, [entry.x for entry in entries])

    _panels(experiment, draw, path, sharey=True)


def _panels(
    experiment: Experiment,
    draw: Callable[[Any, Sequence[Entry]], None],
    path: Path,
    sharey: bool = False,
) -> None:
    """One axes for each panel, beside each other, two in a row."""
    panels = experiment.panels
    columns = min(len(panels), 2)
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 4.5 * columns, 0.5 + 4 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False, sharey=sharey).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        draw(axes, [entry for entry in experiment.entries if entry.panel == panel])
        axes.set_title(_literal(panel))
        axes.grid(alpha=0.3)
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            # Two columns of long words would be wider than the panel.
            columns = 2 if max(map(len, labels)) < 34 else 1
            below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": columns}
            axes.legend(fontsize=8, **below)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    _save(figure, experiment, path)


def _series(
    entries: Sequence[Entry], found: Mapping[str, Sequence[Any]]
) -> dict[tuple[str, str], list[Entry]]:
    """The entries that have each method, by method and splitting.

    A method without a splitting is one series, whatever entry it comes from.
    """
    series: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        for one in found.get(entry.name, ()):
            method = one["method"] if isinstance(one, Mapping) else one.method
            series.setdefault((method, _splitting(method, entry)), []).append(entry)
    return series


def _splitting(method: str, entry: Entry) -> str:
    # Adam on displacements always has layers.
    return entry.settings.splitting if method in _PURE else "layer"


_PURE = ("ap", "cp", "dr", "cdr", "dm", "ar")


def _metric(lines: Sequence[Line]) -> str:
    known = lines and all(cell.test_auc is not None for line in lines for cell in line.cells)
    return "test_auc" if known else "test_accuracy"


def _label(method: str, entry: Entry, entries: Sequence[Entry]) -> str:
    name = NAMES[method]
    return name if len(entries) == 1 else f"{name}, {_literal(entry.name)}"


def _named(method: str, splitting: str) -> str:
    return NAMES[method] + (", neurons" if splitting == "neuron" else "")


def _literal(text: str) -> str:
    """A text as it is, where a dollar would begin mathematics."""
    return text.replace("$", r"\$")


def _style(method: str, entry: Entry, label: str) -> dict[str, Any]:
    return {
        **plots.method_style(method),
        "label": label,
        "linewidth": 1.4,
        "linestyle": _STYLES[_splitting(method, entry)],
    }


def _whole_ticks(axes: Any, values: Sequence[float | None]) -> None:
    """A tick at each value alone, as it is written."""
    known = sorted({value for value in values if value is not None})
    if known:
        axes.set_xticks(known, [f"{value:g}" for value in known])
        axes.xaxis.set_minor_locator(NullLocator())


def _plain_ticks(axes: Any) -> None:
    """Plain numbers at 1, 2 and 5 times powers of ten on a logarithmic vertical axis."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
    )


def _save(figure: Figure, experiment: Experiment, path: Path) -> None:
    figure.suptitle(_literal(experiment.title) + ", quick" * experiment.quick)
    plots.save(figure, path)
