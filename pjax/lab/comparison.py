"""Methods beside each other on the same batches, learning rates tuned; kept cell by cell.

A cell is one file: the search for a method's learning rate, or one method with one seed. What is
there is not trained again, so a comparison that was killed goes on, and one that is finished takes
further methods and seeds. Rates are chosen by validation accuracy with a seed of their own; test
rows are looked at once in each cell, with the parameters that validation chose.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pjax import nn
from pjax.lab import baselines, config, plots, recording, runs, terminal
from pjax.lab.config import CompareConfig, TrainConfig
from pjax.lab.data import Dataset
from pjax.lab.errors import RunError, UsageError
from pjax.lab.files import make_folder, read_json, write_json, write_text
from pjax.lab.train import Record

CELLS, RESULTS = "cells", "results.json"
#: Settings that may change when a comparison goes on: cells do not depend on them.
_FREE = ("methods", "seeds", "seeds_at_once", "data_dir")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method with one seed, as its file has it.

    **Attributes:**

    - `together`: how many seeds trained side by side; `seconds` in the records are of all of them.
    - `test_auc`: where there are two classes.
    - `computer`: what it was computed on, which may not be what goes on with the comparison; empty
        if that is not known.
    """

    method: str
    description: str
    seed: int
    together: int
    best_step: int
    steps: int
    stopped: str
    validation_accuracy: float
    test_accuracy: float
    seconds: float
    compile_seconds: float
    state_bytes: int | None
    records: tuple[Record, ...]
    test_auc: float | None = None
    computer: str = ""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table: a method over its seeds, with standard errors."""

    method: str
    description: str
    cells: tuple[Cell, ...]

    def mean(self, name: str) -> tuple[float, float]:
        """The mean over the seeds and its standard error; NaN where a cell has no such number."""
        values = [getattr(cell, name) for cell in self.cells]
        return runs.mean_and_error([] if None in values else values)

    @property
    def seconds(self) -> float:
        """Mean seconds of training for each seed."""
        return self.mean_of(lambda cell: cell.seconds / cell.together)

    def mean_of(self, value: Callable[[Cell], float]) -> float:
        return sum(map(value, self.cells)) / len(self.cells)


def open_folder(settings: CompareConfig, dataset: Dataset, runs_dir: Path, name: str) -> Path:
    """The comparison's folder, new or with these settings.

    **Raises:** `UsageError` if it holds something else, `RunError` for a damaged file.
    """
    runs.check_name(name)
    folder = runs_dir / name
    if (folder / runs.CONFIG).is_file():
        before = config.to_table(config.read(folder / runs.CONFIG, CompareConfig, complete=True))
        now = config.to_table(settings)
        for setting in sorted(before.keys() | now.keys()):
            if setting not in _FREE and before.get(setting) != now.get(setting):
                raise UsageError(
                    f"{folder} is a comparison with {setting} {before.get(setting)!r}, not "
                    f"{now.get(setting)!r}. Give the same settings to go on, or another --name."
                )
        runs.check_same_data(folder, dataset)
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists and is no comparison: give another --name.")
    make_folder(folder / CELLS)
    write_json(folder / runs.ENVIRONMENT, runs.environment())
    write_json(folder / runs.DATA, runs.describe(dataset))
    write_text(folder / runs.CONFIG, config.to_toml(settings))
    return folder


def train_missing(
    folder: Path,
    settings: CompareConfig,
    dataset: Dataset,
    model: nn.Module,
    *,
    on_step: Callable[[str, int, int], None] = lambda label, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    say: runs.Say = lambda message: None,
) -> bool:
    """Trains every cell that is not there.

    **Arguments:**

    - `on_step`: hears what trains, the batches done and their total.
    - `should_stop`: asked after each batch (each measurement of a search); the cell is then left.
    - `say`: gets a line for each damaged file, which is made anew.

    **Returns:** whether all cells are there.
    """
    for name in settings.methods:
        rate, window, schedule = None, None, settings.schedule
        if name in baselines.RATES:
            chosen = _choose(folder, settings, dataset, model, name, on_step, should_stop, say)
            if chosen is None:
                return False
            rate, schedule = chosen.rate, "cosine" if chosen.decay_steps else "constant"
            window = chosen.window if name in baselines.WINDOWS else None
        missing = [
            seed for seed in settings.seeds if _read(_cell_path(folder, name, seed), say) is None
        ]
        if not missing:
            continue
        one = config.single(
            settings, name, seeds=tuple(missing), schedule=schedule, rate=rate, window=window
        )
        if not _train(folder, one, dataset, model, on_step, should_stop):
            return False
    return True


def summarise(folder: Path, settings: CompareConfig) -> list[Line]:
    """The lines of the methods that have cells."""
    lines = []
    for name in settings.methods:
        found = [_read(_cell_path(folder, name, seed)) for seed in settings.seeds]
        cells = tuple(cell for cell in found if cell is not None)
        if cells:
            lines.append(Line(name, cells[0].description, cells))
    return lines


def write(
    folder: Path,
    settings: CompareConfig,
    lines: Sequence[Line],
    title: str,
    command: str,
    labels: Sequence[str] | None = None,
) -> None:
    """Writes `results.json`, `accuracy.png` and `residual.png`.

    **Arguments:**

    - `command`: the command line that repeats it.
    - `labels`: what the figures call the lines; by default the names of their methods.
    """
    content = {
        "command": command,
        "environment": runs.environment(),
        "config": config.to_table(settings),
        "methods": plain_lines(lines),
        "tuning": {
            line.method: read_json(path)["candidates"]
            for line in lines
            if (path := _tuning_path(folder, line.method)).exists()
        },
    }
    write_json(folder / RESULTS, content)
    curves = [curve(line) for line in lines]
    plots.plot_curves(curves, folder / "accuracy.png", title, labels)
    plots.plot_residual_curves(curves, folder / "residual.png", title, labels)


def plain_lines(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """The lines as JSON has them."""
    results = []
    for line in lines:
        entry: dict[str, Any] = {"method": line.method, "description": line.description}
        for name in ("test_accuracy", "validation_accuracy", "test_auc"):
            mean, error = line.mean(name)
            entry[name] = mean if math.isfinite(mean) else None
            entry[f"{name}_error"] = error if math.isfinite(error) else None
        entry["seconds_per_seed"] = line.seconds
        entry["seeds"] = [_plain(cell) for cell in line.cells]
        results.append(entry)
    return results


def table(lines: Sequence[Line]) -> Table:
    """The lines as a table."""
    shown = terminal.table(
        "means over seeds ± standard errors, of the parameters with the best validation "
        "accuracy; train: for each seed, without compiling"
    )
    for heading in ("method", "settings"):
        shown.add_column(heading, no_wrap=True)
    auc = has_auc(lines)
    for heading in (
        "seeds",
        "validation",
        "test",
        *(["test AUC"] if auc else []),
        "train",
        "state",
    ):
        shown.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        sizes = [cell.state_bytes for cell in line.cells if cell.state_bytes is not None]
        shown.add_row(
            line.method,
            line.description,
            str(len(line.cells)),
            percent(*line.mean("validation_accuracy")),
            percent(*line.mean("test_accuracy")),
            *([fraction(*line.mean("test_auc"))] if auc else []),
            f"{line.seconds:.2f} s",
            terminal.in_bytes(max(sizes)) if sizes else "unknown",
        )
    return shown


def has_auc(lines: Sequence[Line]) -> bool:
    """Whether an AUC was measured: where there are two classes."""
    return any(cell.test_auc is not None for line in lines for cell in line.cells)


def fraction(mean: float, error: float) -> str:
    """A mean and its standard error, as an AUC is shown."""
    text = "" if math.isnan(mean) else f"{mean:.4f}"
    return text if math.isnan(error) else f"{text} ± {error:.4f}"


def percent(mean: float, error: float) -> str:
    """A mean and its standard error in percent."""
    text = f"{100 * mean:.2f}"
    return f"{text} %" if math.isnan(error) else f"{text} ± {100 * error:.2f} %"


def _choose(
    folder: Path,
    settings: CompareConfig,
    dataset: Dataset,
    model: nn.Module,
    name: Any,
    on_step: Callable[[str, int, int], None],
    should_stop: Callable[[], bool],
    say: runs.Say,
) -> baselines.Descent | None:
    """The method with the best rate and schedule; nothing if the search was stopped."""
    path = _tuning_path(folder, name)
    found: list[baselines.Candidate] = []
    if path.exists():
        try:
            found = [
                baselines.Candidate(float(rate), int(decay), float(accuracy), *map(float, window))
                for rate, decay, accuracy, *window in read_json(path)["candidates"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            _report_damage(path, error, say)
    if not found:
        found = baselines.search(
            name,
            model,
            dataset,
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=settings.tuning_seed,
            measure_every=settings.measured_every,
            extend=True,
            on_step=lambda step: on_step(f"{name}, rates", step, settings.steps),
            should_stop=should_stop,
        )
        if should_stop():
            return None
        fields = 4 if name in baselines.WINDOWS else 3
        write_json(path, {"method": name, "candidates": [list(one[:fields]) for one in found]})
    return baselines.best_of(name, found, dataset.num_classes, settings.steps)


def _train(
    folder: Path,
    settings: TrainConfig,
    dataset: Dataset,
    model: nn.Module,
    on_step: Callable[[str, int, int], None],
    should_stop: Callable[[], bool],
) -> bool:
    """Trains a method with all these seeds and writes their cells; `False` if it was stopped."""
    training = config.make_training(settings, dataset, model)
    records = training.measure()
    while not training.finished:
        records += training.advance()
        on_step(settings.method, training.step, settings.steps)
        if should_stop() and not training.finished:
            return False
    for one, accuracy, auc in zip(
        training.standings, training.test(), training.test_auc(), strict=True
    ):
        own = tuple(record for record in records if record.seed == one.seed)
        cell = Cell(
            method=settings.method,
            description=training.method.description,
            seed=one.seed,
            together=len(settings.seeds),
            best_step=one.best_step,
            steps=one.steps,
            stopped=one.stopped,
            validation_accuracy=one.best_accuracy,
            test_accuracy=accuracy,
            seconds=own[-1].seconds,
            compile_seconds=training.compile_seconds,
            state_bytes=training.state_bytes,
            records=own,
            test_auc=auc,
            computer=runs.computer(),
        )
        write_json(_cell_path(folder, settings.method, one.seed), _plain(cell))
    return True


def _cell_path(folder: Path, method: str, seed: int) -> Path:
    return folder / CELLS / f"{method}.seed{seed}.json"


def _tuning_path(folder: Path, method: str) -> Path:
    return folder / CELLS / f"{method}.tuning.json"


def _plain(cell: Cell) -> dict[str, Any]:
    content = {field.name: getattr(cell, field.name) for field in dataclasses.fields(cell)}
    return {**content, "records": [recording.plain(record) for record in cell.records]}


def _read(path: Path, say: runs.Say = lambda message: None) -> Cell | None:
    """The cell in a file; nothing if it is not there or damaged."""
    if not path.exists():
        return None
    try:
        content = read_json(path)
        content["records"] = tuple(recording.parse(one) for one in content["records"])
        cell = Cell(**content)
        if path.name != f"{cell.method}.seed{cell.seed}.json" or not cell.records:
            raise ValueError
        for name in ("validation_accuracy", "test_accuracy", "seconds"):
            if type(getattr(cell, name)) is not float:
                raise ValueError
        if type(cell.test_auc) not in (float, types.NoneType):
            raise ValueError
        if type(cell.computer) is not str:
            raise ValueError
        if type(cell.together) is not int or cell.together < 1:
            raise ValueError
        return cell
    except (KeyError, TypeError, ValueError) as error:
        _report_damage(path, error, say)
        return None


def _report_damage(path: Path, error: Exception, say: runs.Say) -> None:
    problem = str(error) if isinstance(error, RunError) else f"{path}: damaged."
    say(f"{problem} It is made anew.")


def curve(line: Line) -> plots.Curve:
    """What the seeds of a line did, to draw."""
    steps = sorted({record.step for cell in line.cells for record in cell.records})
    place = {step: number for number, step in enumerate(steps)}
    accuracy = np.full((len(line.cells), len(steps)), np.nan)
    residual, seconds = accuracy.copy(), accuracy.copy()
    for row, cell in enumerate(line.cells):
        for record in cell.records:
            column = place[record.step]
            accuracy[row, column] = record.validation_accuracy
            residual[row, column] = record.residual
            seconds[row, column] = record.seconds / cell.together
    return plots.Curve(
        line.method, np.array(steps, float), np.nanmean(seconds, axis=0), accuracy, residual
    )
