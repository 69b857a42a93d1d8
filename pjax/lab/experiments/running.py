"""Carries an experiment out, entry by entry, and writes what it found.

Each entry has a folder, `entries/NAME`, as a comparison has one: its cells are kept, so what was
found once is not made again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pjax.lab import comparison, config, runs, terminal
from pjax.lab.comparison import Line
from pjax.lab.data import Dataset
from pjax.lab.errors import RunError
from pjax.lab.experiments import figures
from pjax.lab.experiments.definition import Entry, Experiment
from pjax.lab.experiments.measures import MEASURES, Rows
from pjax.lab.files import make_folder, read_json, write_json, write_text

ENTRIES, RESULTS, TABLE, FIGURE = "entries", "results.json", "table.md", "figure.png"
MEASURE = "measure.json"

#: Hears the entry, what is done for it, how much of that is done and of how much.
OnStep = Callable[[str, str, int, int], None]


def advance(
    experiment: Experiment,
    folder: Path,
    *,
    on_step: OnStep = lambda entry, label, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: runs.Say = lambda message: None,
) -> bool:
    """Makes what is missing of an experiment, then writes its results; also after a stop.

    **Returns:** whether everything is there.

    **Raises:** `DataError`, `RunError`; `UsageError` where the folder holds entries of other
    settings.
    """
    datasets: dict[Any, Dataset] = {}
    complete = True
    for entry in experiment.entries:
        settings = entry.settings
        key = settings.dataset, settings.data_dir, settings.split_seed, settings.standardise
        if key not in datasets:
            datasets = {key: config.load_data(settings)}  # One at a time: they are large.
        config.check_data(settings, datasets[key])
        complete = _advance(experiment, entry, folder, datasets[key], on_step, should_stop, say)
        if not complete:
            break
    write(experiment, folder)
    return complete


def _advance(
    experiment: Experiment,
    entry: Entry,
    folder: Path,
    dataset: Dataset,
    on_step: OnStep,
    should_stop: Callable[[], bool],
    say: runs.Say,
) -> bool:
    settings = entry.settings
    model = config.make_model(settings, dataset)
    place = comparison.open_folder(settings, dataset, folder / ENTRIES, entry.name)
    if experiment.kind == "accuracy":
        return comparison.train_missing(
            place,
            settings,
            dataset,
            model,
            on_step=lambda label, done, total: on_step(entry.name, label, done, total),
            should_stop=should_stop,
            say=say,
        )
    if _measured(experiment, entry, folder, say) is not None:
        return True

    def tick(done: int, total: int) -> bool:
        on_step(entry.name, experiment.kind, done, total)
        return done < total and should_stop()

    rows = MEASURES[experiment.kind](settings, dataset, model, tick)
    if rows is None:
        return False
    write_json(
        place / comparison.CELLS / MEASURE,
        {
            "kind": experiment.kind,
            "methods": list(settings.methods),
            "computer": runs.computer(),
            "rows": rows,
        },
    )
    return True


class _Measured(NamedTuple):
    """The rows of an entry, and what they were measured on; empty if that is not known."""

    rows: Rows
    computer: str


def _measured(
    experiment: Experiment, entry: Entry, folder: Path, say: runs.Say = lambda message: None
) -> _Measured | None:
    """What an entry's file holds; nothing without one, or if it is damaged."""
    path = folder / ENTRIES / entry.name / comparison.CELLS / MEASURE
    if not path.exists():
        return None
    try:
        content = read_json(path)
        rows = content["rows"]
        if [row["method"] for row in rows] != content["methods"]:
            raise ValueError
        for row in rows:
            _measure_cells(experiment, entry, row)
        computer = content.get("computer", "")
        if type(computer) is not str:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        problem = str(error) if isinstance(error, RunError) else f"{path}: damaged."
        say(f"{problem} It is made anew.")
        return None
    # Methods can be added, or be fewer: only the same ones are the same measurement.
    same = content["kind"] == experiment.kind
    same &= content["methods"] == list(entry.settings.methods)
    return _Measured(rows, computer) if same else None


def write(experiment: Experiment, folder: Path) -> None:
    """Writes `results.json`, `table.md` and `figure.png` of what is there."""
    results: list[dict[str, Any]] = []
    cells: list[list[str]] = []
    lines: dict[str, list[Line]] = {}
    measured: dict[str, Rows] = {}
    computers: set[str] = set()
    for entry in experiment.entries:
        content: dict[str, Any] = {
            "name": entry.name,
            "panel": entry.panel,
            "x": entry.x,
            "config": config.to_table(entry.settings),
        }
        if experiment.kind == "accuracy":
            found = comparison.summarise(folder / ENTRIES / entry.name, entry.settings)
            if found:
                lines[entry.name] = found
                results.append({**content, "methods": comparison.plain_lines(found)})
                cells += [_line_cells(entry, line, found) for line in found]
                computers |= {cell.computer for line in found for cell in line.cells}
        else:
            one = _measured(experiment, entry, folder)
            if one is not None:
                measured[entry.name] = one.rows
                results.append({**content, "methods": one.rows})
                cells += [_measure_cells(experiment, entry, row) for row in one.rows]
                computers.add(one.computer)
    make_folder(folder)
    write_json(
        folder / RESULTS,
        {
            "experiment": experiment.name,
            "title": experiment.title,
            "kind": experiment.kind,
            "quick": experiment.quick,
            "complete": len(results) == len(experiment.entries),
            "environment": runs.environment(),
            "entries": results,
        },
    )
    made = [path.stat().st_mtime for path in folder.glob(f"{ENTRIES}/*/{comparison.CELLS}/*")]
    written = max(made, default=time.time())
    write_text(folder / TABLE, _document(experiment, cells, written, computers))
    if lines:
        figures.draw_accuracies(experiment, lines, folder / FIGURE)
    elif measured:
        figures.draw_measures(experiment, measured, folder / FIGURE)


#: The headings of a table, by kind of experiment.
COLUMNS = {
    "accuracy": (
        "entry", "method", "setting", "seeds", "validation", "test", "− Adam", "train s", "state"
    ),
    "cost": ("entry", "method", "setting", "ms a batch", "ms a step", "× Adam", "state"),
    "residual": ("entry", "method", "rows", "first", "last", "verdict", "rows satisfied"),
    "sizes": (
        "entry", "method", "splitting", "edge variables", "stored", "predicted", "allocated",
        "temporaries",
    ),
}  # fmt: skip
_NOTES = {
    "accuracy": "Means over seeds ± standard errors, in percent (or AUC, of two classes); of the "
    "parameters with the best validation accuracy. − Adam: paired by seed. train s: seconds of "
    "training for each seed, without compiling and measuring.",
    "cost": "Medians over rounds in which all methods take turns. A step: of projection, or of the "
    "gradient method. × Adam: of the whole batch. State: what XLA allocates beyond parameters and "
    "batch, with what is carried from batch to batch.",
    "residual": "The residual after the first and after the last step of one solve; verdicts are "
    "those of `ResidualHistory.verdict`. A row is satisfied if its margin loss is at most 0.001.",
    "sizes": "Stored: numbers kept for the edge variables. Predicted: bytes by "
    "`Problem.sizes`, before anything is allocated; allocated: those of the state's arrays; "
    "temporaries: what XLA reports for the compiled update of one batch.",
}


def _document(
    experiment: Experiment, cells: Sequence[Sequence[str]], made: float, computers: set[str]
) -> str:
    head = COLUMNS[experiment.kind]
    rows = [head, ["---"] * len(head), *cells]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    computed = " and ".join(sorted(one or "an unknown device" for one in computers))
    date = time.strftime("%Y-%m-%d", time.gmtime(made))
    quick = " --quick" * experiment.quick
    return (
        f"# {experiment.title}\n\n`pjax experiment run {experiment.name}{quick}`, {date}, "
        f"{computed}\n\n{table}\n{_NOTES[experiment.kind]}\n"
    )


def _line_cells(entry: Entry, line: Line, found: Sequence[Line]) -> list[str]:
    auc = line.mean("test_auc")
    test = comparison.percent(*line.mean("test_accuracy")).removesuffix(" %")
    if not math.isnan(auc[0]):
        test += f" (AUC {comparison.fraction(*auc)})"
    sizes = [cell.state_bytes for cell in line.cells if cell.state_bytes is not None]
    return [
        entry.name,
        line.method,
        line.description,
        str(len(line.cells)),
        comparison.percent(*line.mean("validation_accuracy")).removesuffix(" %"),
        test,
        _difference(line, found),
        f"{line.seconds:.1f}",
        terminal.in_bytes(max(sizes)) if sizes else "unknown",
    ]


def _difference(line: Line, found: Sequence[Line]) -> str:
    """How far a method's test accuracy is from Adam's, paired by seed, in points."""
    base = next((other for other in found if other.method == "adam"), None)
    if base is None or base is line:
        return ""
    theirs = {cell.seed: cell.test_accuracy for cell in base.cells}
    pairs = [cell.test_accuracy - theirs[cell.seed] for cell in line.cells if cell.seed in theirs]
    mean, error = runs.mean_and_error(pairs)
    if math.isnan(mean):
        return ""
    return f"{100 * mean:+.2f}" + ("" if math.isnan(error) else f" ± {100 * error:.2f}")


def _measure_cells(experiment: Experiment, entry: Entry, row: Mapping[str, Any]) -> list[str]:
    def size(value: int | None) -> str:
        return "" if value is None else terminal.in_bytes(value)

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    head = [entry.name, row["method"]]
    match experiment.kind:
        case "cost":
            return [
                *head,
                row["description"],
                f"{row['milliseconds']:.2f}",
                f"{row['milliseconds_per_projection_step']:.3f}",
                number(row["relative"], ".2f"),
                size(row["state_bytes"]),
            ]
        case "residual":
            return [
                *head,
                str(row["rows"]),
                number(row["first"], ".2e"),
                number(row["last"], ".2e"),
                row["verdict"],
                f"{row['satisfied']} of {row['rows']}",
            ]
        case _:
            return [
                *head,
                row["description"],
                number(row["edge_variables"], ","),
                number(row["stored"], ","),
                size(row["predicted_bytes"]),
                size(row["allocated_bytes"]),
                size(row["temporary_bytes"]),
            ]


def table(experiment: Experiment, folder: Path) -> Any:
    """The table of what is there, for a terminal."""
    shown = terminal.table(_NOTES[experiment.kind])
    for heading in COLUMNS[experiment.kind]:
        shown.add_column(heading, overflow="fold")
    for line in (folder / TABLE).read_text("utf-8").splitlines():
        if line.startswith("| ") and not line.startswith(("| entry |", "| --- |")):
            shown.add_row(*line.removeprefix("| ").removesuffix(" |").split(" | "))
    return shown
