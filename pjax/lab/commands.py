"""`pjax train`, `compare`, `evaluate`, `predict` and `report`."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from pjax import nn
from pjax.lab import comparison, config, devices, recording, report, runs, terminal
from pjax.lab.config import CompareConfig, Maybe, Task, Told, TrainConfig
from pjax.lab.data import Dataset, standardise
from pjax.lab.errors import RunError, UsageError, shown
from pjax.lab.files import write_text
from pjax.lab.train import Record, Training


@dataclasses.dataclass(frozen=True)
class Train(TrainConfig):
    """Train a network with checkpoints: interrupted or killed, it goes on with --resume."""

    config: Maybe[Path] = None
    """TOML file with settings; options given here go before it."""
    resume: Maybe[Path] = None
    """Go on with the run in this folder; its settings are its own."""
    name: Told[str] = ""
    """Name of the run (default: made from data set, model and method)."""
    runs_dir: Path = Path("runs")
    """Folder that gets a folder for the run."""
    devices: Maybe[int] = None
    """Devices that share each batch: short for --mesh data=N."""
    coordinator: Maybe[str] = None
    """HOST:PORT of process 0, with several processes; auto on a cluster that JAX knows."""
    num_processes: Maybe[int] = None
    """How many processes train this run together."""
    process_id: Maybe[int] = None
    """Which of them this is, from 0 on."""


#: What says where a run is computed: these may be given with --resume.
_WHERE = ("mesh", "devices", "coordinator", "num_processes", "process_id")


@dataclasses.dataclass(frozen=True)
class Compare(CompareConfig):
    """Train each method on every seed, with tuned learning rates; the same command goes on."""

    config: Maybe[Path] = None
    """TOML file with settings; options given here go before it."""
    name: Told[str] = ""
    """Name of the comparison (default: compare-, the data set and the model)."""
    runs_dir: Path = Path("runs")
    """Folder that gets a folder for the comparison."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure validation and test accuracy of a run's best parameters."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    data_dir: Maybe[Path] = None
    """Folder with the data set's files (default: the run's)."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Predict the class of each row of a file with a run's best parameters."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    input: Path
    """Rows of features, scaled as the data set scales them: .npy, or .csv without a header."""
    output: Maybe[Path] = None
    """CSV file for the predictions (default: standard output)."""
    seed: Maybe[int] = None
    """Which seed's parameters (default: the seed with the best validation accuracy)."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Write one HTML page about runs and comparisons: tables, figures, how to repeat them."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of pjax train and pjax compare."""
    output: Path = Path("report.html")
    """The page; it holds all it needs."""
    data_dir: Maybe[Path] = None
    """Folder with the data sets' files (default: each run's); nothing is downloaded."""
    solve: bool = True
    """Solve one batch of each run anew, for the figures of its problem."""


Settings = TypeVar("Settings", Train, Compare)


def from_file(arguments: Sequence[str], kind: type[Settings]) -> Settings:
    """The defaults of a command: those of the file that `--config` names, if it does."""
    path = None
    for number, one in enumerate(arguments):
        if one == "--config" and number + 1 < len(arguments):
            path = Path(arguments[number + 1])
        elif one.startswith("--config="):
            path = Path(one.removeprefix("--config="))
    if path is None:
        return kind()
    base: Any = TrainConfig if kind is Train else CompareConfig
    found = config.read(path, base)
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(base)}
    return kind(**fields, config=path)


def train(options: Train, console: Console) -> int:
    """Starts a run or goes on with one; one of several processes, where these are given."""
    if options.resume is not None:
        where = {name: getattr(options, name) for name in _WHERE}
        if dataclasses.replace(options, resume=None) != Train(**where):
            raise UsageError(
                "--resume takes all settings from the run: give no other option, but for the "
                "devices and processes."
            )
    devices.start(options.coordinator, options.num_processes, options.process_id)
    if not devices.first():
        console = Console(quiet=True)
    if options.resume is not None:
        folder = options.resume
        settings = _placed(runs.settings_of(folder), options)
        dataset = config.load_data(settings)
        runs.check_same_data(folder, dataset)
        model = config.make_model(settings, dataset)
    else:
        settings = _placed(_plain(options, TrainConfig), options)
        config.check(settings)
        dataset = config.load_data(settings)
        model = config.make_model(settings, dataset)
        if settings.tensorboard:
            recording.check_event_writer()
        made = None
        if devices.first():
            made = runs.create(settings, dataset, options.runs_dir, options.name)
        folder = devices.path_of_first(made)
    with devices.together(folder):
        return _train(options, folder, settings, dataset, model, console)


def _placed(settings: TrainConfig, options: Train) -> TrainConfig:
    """The settings with the mesh that options say, or all devices of several processes.

    **Raises:** `UsageError` for a mesh that cannot be.
    """
    mesh = options.mesh or settings.mesh
    if options.devices is not None:
        if options.mesh or options.devices < 1:
            raise UsageError(
                f"--devices takes a positive number, in the place of --mesh, got {options.devices}."
            )
        mesh = f"data={options.devices}"
    if not mesh and jax.process_count() > 1:
        mesh = f"data={jax.device_count()}"
    settings = dataclasses.replace(settings, mesh=mesh)
    config.check(settings)
    devices.Placement(mesh or "", settings.batch_size)
    return settings


def _train(
    options: Train,
    folder: Path,
    settings: TrainConfig,
    dataset: Dataset,
    model: nn.Module,
    console: Console,
) -> int:
    console.print(f"[bold]{title(settings, dataset)}, {settings.method}[/bold]: {folder}")
    if options.resume is not None and (folder / runs.RESULT).exists():
        console.print("Finished already.")
        return _show(runs.finished_result(folder), console)
    with (
        terminal.interruptible() as should_stop,
        terminal.progress(console, remaining=True) as progress,
    ):
        task = progress.add_task("train", total=settings.steps, status="compiling")
        status = ""

        def on_start(training: Training) -> None:
            if training.step:
                progress.console.print(f"Going on from step {training.step}.")
            progress.update(task, completed=training.step, status="")

        def on_step(training: Training, records: Sequence[Record]) -> None:
            nonlocal status
            if records:
                status = _status(records)
            progress.update(task, completed=training.step, status=status)

        result = runs.advance(
            folder,
            settings,
            dataset,
            model,
            on_start=on_start,
            on_step=on_step,
            should_stop=should_stop,
            say=lambda text: progress.console.print(f"pjax: {text}", highlight=False),
        )
    if not result.finished:
        console.print(
            f"Stopped after step {result.step}. Go on with: pjax train --resume {folder}",
            highlight=False,
            soft_wrap=True,
        )
        return 130
    console.print(f"Wrote {folder}.", highlight=False, soft_wrap=True)
    return _show(result, console)


def compare(options: Compare, console: Console) -> int:
    """Trains what is missing of a comparison, and shows all of it."""
    settings = _plain(options, CompareConfig)
    config.check(settings)
    dataset = config.load_data(settings)
    model = config.make_model(settings, dataset)
    name = options.name or f"compare-{settings.dataset}-{settings.model}"
    folder = comparison.open_folder(settings, dataset, options.runs_dir, name)
    console.print(f"[bold]{title(settings, dataset)}[/bold]: {folder}")
    complete = train_cells(folder, settings, dataset, model, console)
    lines = comparison.summarise(folder, settings)
    if lines:
        command = config.to_command(settings, "compare")
        comparison.write(folder, settings, lines, title(settings, dataset), command)
        console.print(comparison.table(lines))
    if not complete:
        console.print(
            f"Stopped. The same command goes on; what is there is in {folder}.",
            highlight=False,
            soft_wrap=True,
        )
        return 130
    console.print(
        f"Wrote results.json, accuracy.png and residual.png to {folder}.",
        highlight=False,
        soft_wrap=True,
    )
    return 0


def train_cells(
    folder: Path, settings: CompareConfig, dataset: Dataset, model: nn.Module, console: Console
) -> bool:
    """Trains what is missing of a comparison, with bars that show how far it is.

    **Returns:** whether all is there; Ctrl-C leaves the rest.
    """
    with (
        terminal.interruptible() as should_stop,
        terminal.progress(console, remaining=True) as progress,
    ):

        def on_step(label: str, done: int, total: int) -> None:
            ids = {one.description: one.id for one in progress.tasks}
            number = ids.get(label)
            if number is None:
                number = progress.add_task(label, total=total, status="")
            progress.update(number, completed=done)

        return comparison.train_missing(
            folder,
            settings,
            dataset,
            model,
            on_step=on_step,
            should_stop=should_stop,
            say=lambda text: progress.console.print(f"pjax: {text}", highlight=False),
        )


def evaluate(options: Evaluate, console: Console) -> int:
    """Prints a run's accuracies, measured anew."""
    run = runs.trained(options.run, _warn)
    settings = run.settings
    if options.data_dir is not None:
        settings = dataclasses.replace(settings, data_dir=options.data_dir)
    dataset = config.load_data(settings)
    runs.check_same_data(options.run, dataset)
    console.print(f"[bold]{options.run}[/bold], checkpoint of step {run.step}")
    console.print(_accuracy_table(runs.evaluate(run, dataset)))
    return 0


def predict(options: Predict, console: Console) -> int:
    """Writes row, class and probability for each row of the input."""
    run = runs.trained(options.run, _warn)
    params = run.of_seed(options.seed)
    if run.settings.dataset in config.TEXTS:
        raise UsageError(f"pjax predict reads rows of features; {options.run} is of a text.")
    x = read_rows(options.input, run.features)
    forward = jax.jit(lambda params, x: jax.nn.softmax(run.model.apply(params, x), axis=-1))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "class", "probability"])
    far: list[tuple[int, float]] = []
    for start in range(0, len(x), _CHUNK):
        part = np.array(x[start : start + _CHUNK], np.float32)
        if not np.isfinite(part).all():
            row = start + int(np.argmin(np.isfinite(part).all(axis=1))) + 1
            raise RunError(f"{options.input}: row {row} holds a value that is not finite.")
        if run.moments is not None:
            standardise(part.reshape(-1, len(run.moments[0])), *run.moments)
        if run.range is not None:
            # A whole width beyond what training rows hold is no tail of theirs.
            low, high = run.range
            beyond = np.maximum(part - high, low - part) > high - low
            far += [
                (start + int(row) + 1, float(x[start + row, np.argmax(beyond[row])]))
                for row in np.flatnonzero(beyond.any(axis=1))
            ]
        chances = np.asarray(forward(params, part))
        for number, row in enumerate(chances, start + 1):
            best = int(np.argmax(row))
            writer.writerow([number, best, f"{row[best]:.4f}"])
    if far and run.range is not None:
        scaled = " (after standardising them)" if run.moments is not None else ""
        _warn(
            f"{options.input}: {len(far)} of {len(x)} rows hold values far outside those of the "
            f"training rows, which are from {run.range[0]:g} to {run.range[1]:g}{scaled}; row "
            f"{far[0][0]} holds {far[0][1]:g}. Scale them as the data set does, or do not trust "
            "their classes."
        )
    if options.output is None:
        sys.stdout.write(text.getvalue())
    else:
        write_text(options.output, text.getvalue())
        console.print(f"Wrote {len(x)} predictions to {options.output}.", highlight=False)
    return 0


def write_report(options: Report, console: Console) -> int:
    """Writes the page."""
    report.write(
        options.run,
        options.output,
        data_dir=options.data_dir,
        solve=options.solve,
        say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
    )
    console.print(f"Wrote {options.output}.", markup=False, highlight=False, soft_wrap=True)
    return 0


_CHUNK = 5000


def read_rows(path: Path, features: int) -> np.ndarray:
    """The rows of numbers in a `.npy` or `.csv` file, `features` in each.

    An array file is mapped, not read: no header makes it take more memory than the file has.

    **Raises:** `RunError`, with a message of one line that names the file.
    """
    try:
        if path.suffix == ".npy":
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        elif path.suffix == ".csv":
            rows = _read_csv(path)
        else:
            raise RunError(f"{path}: a .npy or a .csv file expected.")
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}).") from error
    except RunError:
        raise
    except Exception as error:  # NumPy parses the header as Python, and raises what that does
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(f"{path}: not an array of numbers ({shown(text, 120)[1:-1]}).") from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiub":
        kind = getattr(rows, "dtype", type(rows).__name__)
        raise RunError(f"{path}: holds {kind}, numbers expected.")
    if rows.ndim > 2 and math.prod(rows.shape[1:]) == features:
        rows = rows.reshape(len(rows), features)
    if rows.ndim != 2 or rows.shape[1] != features:
        raise RunError(f"{path}: shape {rows.shape}, (rows, {features}) expected.")
    if not len(rows):
        raise RunError(f"{path}: holds no rows.")
    return rows


def _read_csv(path: Path) -> np.ndarray:
    if not path.stat().st_size:
        raise RunError(f"{path}: holds no rows.")
    return np.loadtxt(path, dtype=np.float32, delimiter=",", comments=None, ndmin=2)


def _plain(options: Any, kind: Any) -> Any:
    """The settings alone, without what the command adds."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def _warn(text: str) -> None:
    print(f"pjax: {text}", file=sys.stderr)


def title(settings: Task, dataset: Dataset) -> str:
    if settings.model == "cnn":
        shape = f"CNN {'-'.join(map(str, settings.channels))}"
    elif settings.model == "rnn":
        shape = f"RNN {'-'.join(map(str, settings.hidden))}" + (" with skips" * settings.skip)
    else:
        widths = [dataset.num_features, *settings.hidden, dataset.num_classes]
        shape = "-".join(map(str, widths)) + (" with skips" if settings.skip else "")
    seeds = ", ".join(map(str, settings.seeds))
    return (
        f"{dataset.name}, {shape} ({settings.activation}), batches of {settings.batch_size}, "
        f"seed{'s' * (len(settings.seeds) > 1)} {seeds}"
    )


def _show(result: runs.Result, console: Console) -> int:
    console.print(_accuracy_table(result.rows))
    for row in result.rows:
        if row["stopped"] == "not finite":
            console.print(
                f"Seed {row['seed']} stopped at step {row['steps']}: its loss is not finite."
            )
    return 0


def _status(records: Sequence[Record]) -> str:
    """Means over the seeds of the latest records."""

    def mean(name: str) -> float:
        return sum(getattr(record, name) for record in records) / len(records)

    words = [f"loss {mean('loss'):.3g}"]
    if math.isfinite(mean("residual")):
        words.append(f"residual {mean('residual'):.2g}")
    words.append(f"validation {mean('validation_accuracy'):.1%}")
    return ", ".join(words)


def _accuracy_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = terminal.table()
    auc = any(row["test_auc"] is not None for row in rows)
    for heading in ("seed", "best step", "validation", "test", *(["test AUC"] if auc else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["seed"]),
            str(row["best_step"]),
            f"{row['validation_accuracy']:.2%}",
            f"{row['test_accuracy']:.2%}",
            *([f"{row['test_auc']:.4f}"] if auc else []),
        )
    if len(rows) > 1:
        table.add_section()
        both = [
            runs.mean_and_error([row[name] for row in rows])
            for name in ("validation_accuracy", "test_accuracy")
        ]
        means = [comparison.percent(*one) for one in both]
        if auc:
            found = runs.mean_and_error([row["test_auc"] for row in rows])
            means.append(comparison.fraction(*found))
        table.add_row("mean", "", *means)
    return table
