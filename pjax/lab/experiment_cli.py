"""The commands `pjax experiment list` and `pjax experiment run`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.progress import TaskID
from rich.text import Text

from pjax.lab import runs, terminal
from pjax.lab.config import Maybe, Told
from pjax.lab.experiments import definition, running


@dataclasses.dataclass(frozen=True)
class List:
    """Show the experiments, what each shows, and rough times in full and quick."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Carry out an experiment: a table and a figure; the same command goes on where it was."""

    experiment: tyro.conf.Positional[str]
    """A name from the list, or the path of a .toml file of your own."""
    quick: bool = False
    """Fewer and smaller, for minutes on two cores."""
    data_dir: Maybe[Path] = None
    """Folder with the files of data sets (default: $PJAX_DATA_DIR, then the cache)."""
    name: Told[str] = ""
    """Name of the folder (default: the experiment's, with -quick if it is)."""
    runs_dir: Path = Path("runs/experiments")
    """Folder that gets a folder for the experiment."""


@dataclasses.dataclass(frozen=True)
class Command:
    """List experiments, or run one."""

    command: Annotated[
        Annotated[List, tyro.conf.subcommand("list")] | Annotated[Run, tyro.conf.subcommand("run")],
        tyro.conf.arg(name=""),
    ]


def run(options: Command, console: Console) -> int:
    """Runs the command.

    **Returns:** the exit status.

    **Raises:** `DataError`, `RunError`, `UsageError`.
    """
    match options.command:
        case List():
            table = terminal.table("rough times on two cores; run one: pjax experiment run NAME")
            table.add_column("name", no_wrap=True)
            table.add_column("shows")
            for heading in ("full", "quick"):
                table.add_column(heading, justify="right", no_wrap=True)
            for name in definition.names():
                one = definition.read(definition.find(name))
                full, quick = (f"{minutes:g} min" for minutes in one.minutes)
                table.add_row(name, Text(one.shows), full, quick)
            console.print(table)
            return 0
        case Run() as chosen:
            return _run(chosen, console)


def _run(options: Run, console: Console) -> int:
    path = definition.find(options.experiment)
    experiment = definition.read(path, options.quick, options.data_dir)
    if options.name:
        runs.check_name(options.name)
    folder = options.runs_dir / (options.name or experiment.name + "-quick" * options.quick)
    console.print(Text.assemble((experiment.title, "bold"), f": {folder}"), soft_wrap=True)
    with (
        terminal.interruptible() as should_stop,
        terminal.progress(console, remaining=True) as progress,
    ):
        total = len(experiment.entries)
        overall = progress.add_task("entries", total=total, status="")
        current: dict[str, TaskID] = {}
        place = {entry.name: number for number, entry in enumerate(experiment.entries)}

        def on_step(entry: str, label: str, done: int, steps: int) -> None:
            progress.update(overall, completed=place[entry], status=entry)
            key = f"{entry}: {label}"
            if key not in current:
                for task in current.values():
                    progress.remove_task(task)
                current.clear()
                current[key] = progress.add_task(label, total=steps, status="")
            progress.update(current[key], completed=done, total=steps)

        complete = running.advance(
            experiment,
            folder,
            on_step=on_step,
            should_stop=should_stop,
            say=lambda text: progress.console.print(f"pjax: {text}", highlight=False),
        )
        if complete:
            progress.update(overall, completed=total, status="")
    console.print(running.table(experiment, folder), highlight=False)
    if not complete:
        options_given = [options.experiment, *["--quick"] * options.quick]
        for option, value, default in (
            ("--data-dir", options.data_dir, None),
            ("--name", options.name, ""),
            ("--runs-dir", options.runs_dir, Run.runs_dir),
        ):
            options_given += [option, str(value)] if value != default else []
        console.print(
            f"Stopped. Go on with: pjax experiment run {' '.join(options_given)}",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
        return 130
    names = f"{running.RESULTS}, {running.TABLE} and {running.FIGURE}"
    console.print(f"Wrote {names} to {folder}.", highlight=False, soft_wrap=True, markup=False)
    return 0
