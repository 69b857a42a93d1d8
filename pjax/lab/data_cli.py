"""The commands `pjax data list` and `pjax data fetch`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pjax.lab import data
from pjax.lab.config import Maybe
from pjax.lab.data.files import data_folder
from pjax.lab.data.sources import FILES, Files


@dataclasses.dataclass(frozen=True)
class List:
    """Show which data sets there are, which are here, and how large a download is."""

    data_dir: Maybe[Path] = None
    """Folder with your own files (default: $PJAX_DATA_DIR)."""


@dataclasses.dataclass(frozen=True)
class Fetch:
    """Download the official files of data sets and check them; go on where a try ended."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Which data sets."""
    data_dir: Maybe[Path] = None
    """Where to, each into a folder of its name (default: the cache)."""


@dataclasses.dataclass(frozen=True)
class Data:
    """Find and download data sets."""

    command: Annotated[
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Fetch, tyro.conf.subcommand("fetch")],
        tyro.conf.arg(name=""),
    ]


def run(options: Data, console: Console) -> int:
    """Runs the command.

    **Returns:** the exit status.

    **Raises:** `DataError`.
    """
    match options.command:
        case List(data_dir):
            data_folder("", data_dir)  # A folder that is not there is told once.
            console.print(_table(data_dir))
        case Fetch(names, data_dir):
            if not names:
                raise data.DataError(f"name data sets to fetch: {', '.join(_fetchable())}.")
            for name in names:
                place = data_dir / data.folder_name(name) if data_dir is not None else None
                paths = data.fetch(name, place)
                where = paths[0].parent if paths else "comes with scikit-learn"
                console.print(Text(f"{name}: {where}"), soft_wrap=True)
    return 0


def _fetchable() -> list[str]:
    return [name for name, files in FILES.items() if files.sources]


def _table(data_dir: Path | None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        caption=f"downloads go to {data.cache_folder('').resolve()}",
        caption_justify="left",
    )
    table.add_column("name", no_wrap=True)
    table.add_column("content")
    table.add_column("download", justify="right", no_wrap=True)
    table.add_column("here", overflow="fold")
    for name, files in FILES.items():
        size = sum(source.size for source in files.sources)
        table.add_row(
            name,
            files.description,
            f"{size / 1e6:,.1f} MB" if size else "",
            _here(name, files, data_dir),
        )
    return table


def _here(name: str, files: Files, data_dir: Path | None) -> Text:
    """Where the files are, or why they cannot be used."""
    if not files.layouts:
        return Text("yes")
    try:
        found = data.find(name, data_dir)
    except data.DataError as error:
        return Text(str(error))
    return Text(f"{found.folder}: {found.paths[0].name}" if found is not None else "no")
