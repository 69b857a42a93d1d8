"""`pjax demo`: the recommended method beside tuned Adam, and the paper's methods after them."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from pjax.lab import commands, comparison, config, runs, terminal
from pjax.lab.comparison import Line
from pjax.lab.config import NAMES, OPTIMIZERS, CompareConfig, Maybe, MethodName
from pjax.lab.data import DatasetName
from pjax.lab.errors import RunError, UsageError
from pjax.lab.files import make_folder, read_json


@dataclasses.dataclass(frozen=True)
class Demo:
    """Train digits without a learning rate, beside tuned Adam and the methods of the paper."""

    dataset: DatasetName = "digits"
    """digits comes with scikit-learn; the others are read from files."""
    data_dir: Maybe[Path] = None
    """Folder with the files (default: $PJAX_DATA_DIR, then the cache; see pjax data list)."""
    hidden: tuple[int, ...] = (128,)
    """Width of each hidden layer."""
    skip: bool = False
    """Let the last layer read the outputs of all hidden layers."""
    methods: tuple[MethodName, ...] = ("projection", "adam", "ap", "cp", "dr")
    """Which methods, in this order; their names are in pjax train --help."""
    steps: int = 50
    """Batches for each method."""
    batch_size: int = 128
    """Rows in a batch."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of initial parameters and batches."""
    name: str = "demo"
    """Name of the folder; what an earlier demo left there is replaced."""
    runs_dir: Path = Path("runs")
    """Folder that gets a folder for the demo."""


def run(options: Demo, console: Console) -> int:
    """Trains with each method, then prints the table and writes the figures.

    **Returns:** the exit status.

    **Raises:** `DataError`, `RunError`, `UsageError`.
    """
    settings = CompareConfig(
        dataset=options.dataset,
        data_dir=options.data_dir,
        hidden=options.hidden,
        skip=options.skip,
        methods=options.methods,
        steps=options.steps,
        batch_size=options.batch_size,
        seeds=options.seeds,
        # As in the paper: a constraint for each scalar product, and no schedule.
        splitting="neuron",
        schedule="constant",
        measure_every=max(1, options.steps // 50),
    )
    config.check(settings)
    runs.check_name(options.name)
    target = options.runs_dir / options.name
    _check_replaceable(target)
    make_folder(target)
    dataset = config.load_data(settings)
    model = config.make_model(settings, dataset)
    title = commands.title(settings, dataset)
    console.print(f"[bold]{title}[/bold]")
    with tempfile.TemporaryDirectory() as place:
        folder = comparison.open_folder(settings, dataset, Path(place), options.name)
        complete = commands.train_cells(folder, settings, dataset, model, console)
        lines = comparison.summarise(folder, settings)
        if lines:
            labels = [_label(line.method) for line in lines]
            command = config.quoted("pjax", "demo", *config.changed(options))
            comparison.write(folder, settings, lines, title, command, labels)
            shutil.rmtree(target)
            shutil.copytree(folder, target)
    if lines:
        console.print(table(lines))
        for text in _sentences(lines):
            console.print(text, highlight=False)
        console.print(
            f"Wrote results.json, accuracy.png and residual.png to {target}.",
            highlight=False,
            soft_wrap=True,
        )
    if not complete:
        console.print("Stopped: methods that were not trained to their end are left out.")
    return 0 if complete else 130


def table(lines: Sequence[Line]) -> Table:
    """The lines as a table, with a rule before those of the paper's methods."""
    target = _target(lines)
    made = terminal.table(
        "test: mean over seeds ± standard error, of the parameters with the best validation "
        "accuracy; seconds: for each seed, without compiling"
        + ("" if target is None else f"; to {target:.1%}: within a point of Adam's best validation")
    )
    made.add_column("method")
    made.add_column("settings")
    for heading in (
        "test",
        *([] if target is None else [f"to {target:.1%}"]),
        "batches",
        "seconds",
        "compile",
    ):
        made.add_column(heading, justify="right", no_wrap=True)
    for place, line in enumerate(lines):
        made.add_row(
            _label(line.method),
            line.description,
            comparison.percent(*line.mean("test_accuracy")),
            *([] if target is None else [_shown(reached(line, target))]),
            str(max(cell.steps for cell in line.cells)),
            f"{line.seconds:.2f} s",
            f"{line.mean_of(lambda cell: cell.compile_seconds):.0f} s",
            end_section=place + 1 < len(lines)
            and line.method not in OPTIMIZERS
            and lines[place + 1].method in OPTIMIZERS,
        )
    return made


def reached(line: Line, accuracy: float) -> tuple[int, float] | None:
    """The first measured batch, and the seconds, at which the mean validation accuracy over the
    seeds is at least this; nothing if none is.
    """
    curve = comparison.curve(line)
    there = np.nanmean(curve.validation_accuracy, axis=0) >= accuracy
    if not there.any():
        return None
    first = int(np.argmax(there))
    return int(curve.steps[first]), float(curve.seconds[first])


def _target(lines: Sequence[Line]) -> float | None:
    """A point below the best mean validation accuracy of Adam; nothing without Adam."""
    for line in lines:
        if line.method == "adam":
            means = np.nanmean(comparison.curve(line).validation_accuracy, axis=0)
            return float(means.max()) - 0.01
    return None


def _shown(found: tuple[int, float] | None) -> str:
    return "never" if found is None else f"{found[0]} batches, {found[1]:.2f} s"


def _label(method: str) -> str:
    if method == "projection":
        return "projection (recommended)"
    if method == "adam":
        return "Adam, tuned"
    return NAMES[method] + (" (paper)" if method in OPTIMIZERS else "")


def _sentences(lines: Sequence[Line]) -> list[str]:
    """The gain in a sentence, with how Adam was tuned."""
    found = {line.method: line for line in lines}
    if not {"projection", "adam"} <= found.keys():
        return []
    ours, theirs = (100 * found[name].mean("test_accuracy")[0] for name in ("projection", "adam"))
    return [
        f"projection has no learning rate: {ours:.2f} % of the test rows are right. Adam: "
        f"{theirs:.2f} %, with the best rate and schedule on the validation rows "
        f"({found['adam'].description}; all that were tried are in results.json)."
    ]


def _check_replaceable(target: Path) -> None:
    """Raises `UsageError` for a folder with anything but an earlier demo."""
    if not target.is_dir() or not any(target.iterdir()):
        return
    try:
        by_demo = str(read_json(target / comparison.RESULTS)["command"]).startswith("pjax demo")
    except (KeyError, RunError):
        by_demo = False
    if not by_demo:
        raise UsageError(f"{target} exists and is no demo: give another --name.")
