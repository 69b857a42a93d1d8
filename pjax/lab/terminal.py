"""What the commands show on a terminal, and how Ctrl-C reaches them."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

#: Columns of a table that is not printed on a terminal.
_FILE_WIDTH = 120


def console(width: int = _FILE_WIDTH) -> Console:
    """Standard output; at least so wide where it is no terminal."""
    found = Console()
    if not found.is_terminal:
        # A file or a pipe has no width: cut no table short.
        found = Console(width=max(found.width, width))
    return found


def table(caption: str | None = None) -> Table:
    """A table without rows and columns, in the style of all."""
    return Table(
        box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=caption, caption_justify="left"
    )


def progress(console: Console, remaining: bool = False) -> Progress:
    """Bars with a field `status`, with the time that is left if `remaining`."""
    return Progress(
        TextColumn("{task.description:>5}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *([TextColumn("left"), TimeRemainingColumn()] if remaining else []),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C only asks to stop; the second one is the usual interrupt."""
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def in_bytes(count: int) -> str:
    """A size with a unit."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
