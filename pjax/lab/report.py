"""One page of HTML about runs and comparisons, for a browser without a network."""

from __future__ import annotations

import importlib.resources
import json
import math
import time
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pjax
from pjax.lab import comparison, config, files, inspection, plots, problem_plots, terminal
from pjax.lab.comparison import Line
from pjax.lab.data import DataError
from pjax.lab.errors import RunError, UsageError
from pjax.lab.html import Child, details, document, element, figure, table
from pjax.lab.inspection import Inspection
from pjax.lab.summaries import Summary, summarise

Say = Callable[[str], None]
#: No script runs in the page and nothing is fetched, whatever is in it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write(
    folders: Sequence[Path],
    output: Path,
    *,
    data_dir: Path | None = None,
    solve: bool = True,
    say: Say = lambda message: None,
) -> None:
    """Writes a page about the folders of runs and comparisons.

    **Arguments:**

    - `folders`: of `pjax train` and `pjax compare`, in any mixture.
    - `output`: the HTML file. It holds all it needs: styles and figures.
    - `data_dir`: the folder with the data sets' files, if not that of a run. Nothing is downloaded.
    - `solve`: solve one batch of each run of a projection method anew, for the figures of its
      problem: the graph, its memory, residuals by node and displacements.
    - `say`: hears what is being done, and of each file that cannot be used.

    **Raises:** `RunError` for a folder that is neither and for damaged settings, `UsageError` if
    there is no folder. What else is missing or damaged is told on the page.
    """
    folders = list(dict.fromkeys(folders))
    if not folders:
        raise UsageError("name at least one folder of pjax train or pjax compare.")
    found = [summarise(folder) for folder in folders]
    names = _names(found)
    sections: list[Child] = []
    for number, (one, name) in enumerate(zip(found, names, strict=True)):
        look = None
        if solve and one.kind == "run" and one.lines:
            say(f"{one.folder}: solving one batch.")
            look = _inspect(one, data_dir)
        for note in one.notes:
            say(note)
        sections.append(_section(one, name, f"run{number}", look))
    title = names[0] if len(found) == 1 else f"{len(found)} runs"
    style = importlib.resources.files("pjax.lab").joinpath("report.css").read_text("utf-8")
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", f"pjax: {title}"),
            element("style", style),
        ),
        element(
            "body",
            element("header", element("h1", f"pjax: {title}"), _contents(found, names)),
            element("main", *_results(found, names), _differences(found, names), *sections),
            element(
                "footer",
                element(
                    "p",
                    f"Written by pjax {pjax.__version__} (pjax report) on "
                    f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}.",
                    class_="quiet",
                ),
            ),
        ),
        lang="en",
    )
    files.make_folder(output.parent)
    files.write_text(output, document(page))


def _names(found: Sequence[Summary]) -> list[str]:
    """The names of the folders; their paths where two have one name."""
    names = [one.folder.resolve().name for one in found]
    if len(set(names)) < len(names):
        return [str(one.folder) for one in found]
    return names


def _contents(found: Sequence[Summary], names: Sequence[str]) -> ET.Element:
    entries = [
        element(
            "li",
            element("a", name, href=f"#run{number}"),
            f", {_kind(one)}" + ("" if one.finished else ", not finished"),
        )
        for number, (one, name) in enumerate(zip(found, names, strict=True))
    ]
    return element("nav", element("ul", entries), aria_label="Runs")


def _kind(one: Summary) -> str:
    settings: Any = one.settings
    if one.kind == "run":
        return f"{settings.dataset}, {settings.method}"
    return f"{settings.dataset}, comparison of {', '.join(settings.methods)}"


# What all runs of a data set reached.


def _results(found: Sequence[Summary], names: Sequence[str]) -> list[ET.Element]:
    """A table and curves for each data set: those of different ones have nothing in common."""
    groups: dict[Any, list[tuple[str, Line]]] = {}
    for one, name in zip(found, names, strict=True):
        rows = one.data.get("rows")
        key = one.settings.dataset, str(one.data.get("sha256")), json.dumps(rows, sort_keys=True)
        for line in one.lines:
            label = name
            if one.kind == "comparison":
                label = config.NAMES[line.method]
                label = label if len(found) == 1 else f"{name}: {label}"
            groups.setdefault(key, []).append((label, line))
    made = []
    for number, ((dataset, digest, _), lines) in enumerate(groups.items()):
        several = sum(key[0] == dataset for key in groups) > 1
        heading = f"Results on {dataset}" + (f" (data {digest[:8]})" if several else "")
        made.append(
            element(
                "section",
                element("h2", heading, id=f"results{number}"),
                _results_table(lines),
                element("div", _curves(lines, f"results{number}"), class_="figures"),
                aria_labelledby=f"results{number}",
            )
        )
    return made


def _results_table(lines: Sequence[tuple[str, Line]]) -> ET.Element:
    auc = comparison.has_auc([line for _, line in lines])
    rows = []
    for label, line in lines:
        seconds = line.seconds
        sizes = [cell.state_bytes for cell in line.cells if cell.state_bytes is not None]
        rows.append(
            (
                config.NAMES[line.method],
                _shown(line, "test_accuracy", comparison.percent),
                *([_shown(line, "test_auc", comparison.fraction)] if auc else []),
                _shown(line, "validation_accuracy", comparison.percent),
                label,
                line.description,
                str(len(line.cells)),
                str(max(cell.steps for cell in line.cells)),
                f"{seconds:.2f} s" if math.isfinite(seconds) else "unknown",
                terminal.in_bytes(max(sizes)) if sizes else "unknown",
            )
        )
    headings = (
        "method",
        "test",
        *(["test AUC"] if auc else []),
        "validation",
        "run",
        "settings",
        "seeds",
        "batches",
        "training",
        "state",
    )
    return table(
        "Accuracies: means over seeds ± standard errors, of the parameters with the best "
        "validation accuracy. Training: for each seed, without compiling. State: what a step "
        "allocates beyond parameters and batch.",
        headings,
        rows,
        {*headings} - {"run", "method", "settings"},
    )


def _shown(line: Line, name: str, show: Callable[[float, float], str]) -> str:
    mean, error = line.mean(name)
    return "not measured" if math.isnan(mean) else show(mean, error)


def _curves(lines: Sequence[tuple[str, Line]], name: str) -> list[ET.Element]:
    curves, labels = [], []
    for label, line in lines:
        if all(cell.records for cell in line.cells):
            curve = comparison.curve(line)
            curves.append(curve._replace(**{key: _finite(getattr(curve, key)) for key in _SHOWN}))
            labels.append(_short(label))
    if not any(len(curve.steps) > 1 for curve in curves):
        return []
    best = "; ".join(
        f"{label} {np.nanmax(_mean(curve.validation_accuracy), initial=0):.1%}"
        for label, curve in zip(labels, curves, strict=True)
    )
    made = []
    for against in ("batches", "seconds"):
        made.append(
            figure(
                plots.accuracy_figure(curves, against, labels),
                f"{name}-{against}",
                f"Lines: validation accuracy against {against}. Best means over seeds: {best}.",
                f"Validation accuracy against {against}"
                f"{' of training' * (against == 'seconds')}: mean over seeds and their range.",
            )
        )
    drawn = plots.residual_figure(curves, labels)
    if drawn is not None:
        last = "; ".join(
            f"{label} {_last(_mean(curve.residual)):.2g}"
            for label, curve in zip(labels, curves, strict=True)
            if np.isfinite(curve.residual).any()
        )
        made.append(
            figure(
                drawn,
                f"{name}-residual",
                f"Lines: residual against batches. Last means over seeds: {last}.",
                "Residual at the end of each measured batch's solve: mean over seeds and range.",
            )
        )
    return made


def _short(text: str, limit: int = 30) -> str:
    """A text that a legend has room for: its middle is left out if it is long."""
    half = limit // 2
    return text if len(text) <= limit else f"{text[:half]}…{text[-half:]}"


_SHOWN = ("seconds", "validation_accuracy", "residual")


def _finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # steps without a value
        return np.nanmean(values, axis=0)


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])


# Settings.


def _differences(found: Sequence[Summary], names: Sequence[str]) -> ET.Element | None:
    """The settings in which runs differ, one column for each run."""
    if len(found) < 2:
        return None
    tables = [config.to_table(one.settings) for one in found]
    rows = []
    for setting in dict.fromkeys(setting for one in tables for setting in one):
        values = [_value(one.get(setting)) for one in tables]
        if len(set(values)) > 1:
            rows.append((setting, *values))
    if not rows:
        return None
    return element(
        "section",
        element("h2", "Settings that differ", id="differences"),
        table("Settings in which these runs differ.", ("setting", *names), rows),
        aria_labelledby="differences",
    )


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


# Each run.


def _section(one: Summary, name: str, anchor: str, look: Inspection | None) -> ET.Element:
    kind = "comparison" if one.kind == "comparison" else "run"
    parts: list[Child] = [
        element("h2", name, id=anchor),
        element(
            "p", f"A {kind} in the folder ", element("code", str(one.folder)), f": {_kind(one)}."
        ),
    ]
    if not one.finished:
        parts.append(
            element(
                "div",
                element("p", f"Not finished: {one.missing}. Go on with:"),
                element("pre", one.go_on),
                class_="note",
                role="note",
            )
        )
    parts += [element("p", note, class_="note", role="note") for note in one.notes]
    if one.lines:
        parts.append(_seeds_table(one))
    if look is not None:
        parts += _problem(look, anchor)
    parts += [
        element("h3", "To repeat it"),
        element("pre", one.command),
        details("All settings", _pairs("Settings", config.to_table(one.settings))),
    ]
    if one.rates:
        parts.append(
            details("Learning rates that were tried", *map(_rates_table, one.rates.items()))
        )
    if one.environment:
        parts.append(details("Environment", _pairs("Environment", one.environment)))
    if one.data:
        parts.append(details("Data", _pairs("Data", one.data)))
    return element("section", *parts, aria_labelledby=anchor)


def _seeds_table(one: Summary) -> ET.Element:
    auc = comparison.has_auc(one.lines)
    after = (*(["test AUC"] if auc else []), "batches", "stopped")
    headings = ("seed", "best batch", "validation", "test", *after)
    if one.kind == "comparison":
        headings = ("method", *headings)
    rows = []
    for line in one.lines:
        for cell in line.cells:
            row = (
                str(cell.seed),
                str(cell.best_step),
                _accuracy(cell.validation_accuracy),
                _accuracy(cell.test_accuracy),
                *([_auc(cell.test_auc)] if auc else []),
                str(cell.steps),
                cell.stopped or "no",
            )
            rows.append((cell.method, *row) if one.kind == "comparison" else row)
    made = table("Each seed.", headings, rows, headings[headings.index("seed") : -1])
    return details("Each seed", made) if len(rows) > 8 else made


def _accuracy(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.2%}"


def _auc(value: float | None) -> str:
    return "not measured" if value is None else comparison.fraction(value, math.nan)


def _rates_table(entry: tuple[str, list[tuple[float, int, float]]]) -> ET.Element:
    method, tried = entry
    best = max(tried, key=lambda one: one[2], default=None)
    rows = [
        (
            f"{rate:g}",
            "cosine" if decay else "constant",
            f"{accuracy:.2%}" + (" (chosen)" if (rate, decay, accuracy) == best else ""),
        )
        for rate, decay, accuracy in sorted(tried)
    ]
    headings = ("rate", "schedule", "best validation accuracy")
    return table(f"{method}: tuned with a seed of its own.", headings, rows, headings[2:])


def _pairs(caption: str, content: dict[str, Any]) -> ET.Element:
    rows = [
        (
            key,
            json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else _value(value),
        )
        for key, value in content.items()
    ]
    return table(f"{caption}.", ("name", "value"), rows)


# One batch of a run.


def _inspect(one: Summary, data_dir: Path | None) -> Inspection | None:
    """One batch, solved; a note tells why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return inspection.inspect(one.folder, data_dir, one.notes.append)
    except (RunError, DataError, UsageError, pjax.TraceError) as error:
        problem = str(error).splitlines()[0]
    except pjax.NonFiniteError as error:
        problem = str(error)
    except jax.errors.JaxRuntimeError as error:
        problem = str(error).splitlines()[0][:200]
    one.notes.append(f"One batch could not be solved anew: {problem}")
    return None


def _problem(look: Inspection, anchor: str) -> list[ET.Element]:
    moved = f"the best parameters of seed {look.seed} (after {look.step} batches)"
    batch = f"batches of {look.batch_size}"
    made = []
    if look.profile is not None:
        residual = np.asarray(look.profile.residual)[-1]
        steps = len(look.profile.residual)
        largest = sorted(zip(residual, look.profile.names, strict=True), reverse=True)[:5]
        words = "; ".join(
            f"{problem_plots.label_of_node(name)} {value:.2g}" for value, name in largest
        )
        made.append(
            figure(
                problem_plots.residual_by_node(look.profile),
                f"{anchor}-residual",
                f"Residual of each node over {steps} steps. Largest at the end: {words}.",
                "Residual by node and step: the distance to each node's constraint, from the "
                "losses to the parameters.",
            )
        )
    made.append(
        figure(
            problem_plots.displacement_by_layer(look.params, look.displacement, look.gradient),
            f"{anchor}-displacement",
            "Marks: length of each parameter's displacement and gradient over its own length. "
            + _shares(look),
            "Displacement by layer: how far the method moves each parameter, beside the gradient "
            "of the mean loss, both over the parameter's length.",
        )
    )
    largest_nodes = sorted(look.sizes.nodes, key=lambda node: -node.bytes)[:5]
    words = "; ".join(
        f"{problem_plots.label(node.name)} {terminal.in_bytes(node.bytes)}"
        for node in largest_nodes
        if node.bytes
    )
    made.append(
        figure(
            problem_plots.memory_by_node(look.sizes, batch),
            f"{anchor}-memory",
            f"Bars: bytes of each node, {terminal.in_bytes(look.sizes.bytes)} in all. "
            f"Largest: {words}.",
            f"Memory by node: what the solver stores for edge variables, {batch}.",
        )
    )
    graph = look.graph
    sides = [sum(node.colour == side for node in graph.nodes) for side in "AB"]
    drawn = figure(
        problem_plots.draw_graph(graph),
        f"{anchor}-graph",
        f"Graph of {len(graph.nodes)} nodes, {sides[0]} in set A and {sides[1]} in set B, and "
        f"{len(graph.edges())} edges: "
        + "; ".join(
            ", ".join(node.name for node in layer.nodes) for layer in problem_plots.layers(graph)
        )
        + ".",
        "The coloured graph: no node reads one of its own set.",
    )
    return [
        element("h3", "One batch, node by node"),
        element("p", f"The first batch of the run, solved from {moved}.", class_="quiet"),
        element("div", made, class_="figures"),
        drawn,
    ]


def _shares(look: Inspection) -> str:
    words = []
    for name, value in list(look.params.items())[:12]:
        length = float(np.linalg.norm(np.asarray(value)))
        if length:
            moved = float(np.linalg.norm(np.asarray(look.displacement[name])))
            words.append(f"{name} {moved / length:.2g}")
    return f"Displacements: {'; '.join(words)}."


__all__ = ["write"]
