"""What the folders of `pjax train` and `pjax compare` tell, in one form."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal

from pjax.lab import comparison, config, recording, runs
from pjax.lab.comparison import Cell, Line
from pjax.lab.config import CompareConfig, Task
from pjax.lab.errors import RunError
from pjax.lab.files import read_json
from pjax.lab.train import Record


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run or a comparison as far as it got.

    **Attributes:**

    - `lines`: a run has one line, a comparison one for each method that has cells. Test accuracies
      are NaN where they are not measured yet.
    - `environment`, `data`: what their files hold, empty if they are not there.
    - `rates`: for each method of a comparison the settings that were tried, as `(rate, batches of
      decay, validation accuracy)`.
    - `missing`: what is not finished, in words; empty if all is.
    - `go_on`: the command that finishes it.
    - `command`: the command that makes the same again.
    - `notes`: a sentence for each file that cannot be used.
    """

    folder: Path
    kind: Literal["run", "comparison"]
    settings: Task
    lines: list[Line]
    environment: dict[str, Any]
    data: dict[str, Any]
    rates: dict[str, list[tuple[float, int, float]]]
    missing: str
    go_on: str
    command: str
    notes: list[str]

    @property
    def finished(self) -> bool:
        return not self.missing


def summarise(folder: Path) -> Summary:
    """Reads the folder of a run or of a comparison.

    **Raises:** `RunError` for a folder that is neither, and for damaged settings. Other files that
    cannot be used leave a note.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: no such folder.")
    if not (folder / runs.CONFIG).is_file():
        raise RunError(
            f"{folder}: not the folder of pjax train or pjax compare ({runs.CONFIG} is missing)."
        )
    notes: list[str] = []
    found = {}
    for name in (runs.ENVIRONMENT, runs.DATA):
        try:
            found[name] = read_json(folder / name)
        except RunError as error:
            notes.append(str(error))
            found[name] = {}
    read = _comparison if (folder / comparison.CELLS).is_dir() else _run
    return read(folder, found[runs.ENVIRONMENT], found[runs.DATA], notes)


def _run(
    folder: Path, environment: dict[str, Any], data: dict[str, Any], notes: list[str]
) -> Summary:
    settings = runs.settings_of(folder)
    records: list[Record] = []
    try:
        records = recording.read_records(folder)
    except RunError as error:
        notes.append(f"{error} Curves are left out.")
    rows: list[dict[str, Any]] = []
    costs: dict[str, Any] = {}
    if (folder / runs.RESULT).exists():
        try:
            rows = runs.finished_result(folder).rows
            costs = read_json(folder / runs.RESULT)
        except (RunError, OverflowError) as error:
            text = (
                str(error) if isinstance(error, RunError) else f"{folder / runs.RESULT}: damaged."
            )
            notes.append(f"{text} Test accuracies are left out.")
    finished = {row["seed"]: row for row in rows}
    cells = []
    for seed in settings.seeds:
        own = tuple(record for record in records if record.seed == seed)
        if seed not in finished and not own:
            continue
        best = max(own, key=lambda record: _or_least(record.validation_accuracy), default=None)
        row = finished.get(seed) or _so_far(own, best)
        size = costs.get("state_bytes")
        cells.append(
            Cell(
                method=settings.method,
                description=config.make_method(settings, 2).description,
                seed=seed,
                together=len(settings.seeds),
                best_step=row["best_step"],
                steps=row["steps"],
                stopped=row["stopped"],
                validation_accuracy=row["validation_accuracy"],
                test_accuracy=row["test_accuracy"],
                test_auc=row["test_auc"],
                seconds=_number(costs.get("seconds"), own[-1].seconds if own else math.nan),
                compile_seconds=_number(costs.get("compile_seconds"), math.nan),
                state_bytes=size if type(size) is int else None,
                records=own,
            )
        )
    missing = ""
    if not rows:
        step = max((record.step for record in records), default=0)
        missing = f"measured up to batch {step} of {settings.steps}"
    lines = [Line(settings.method, cells[0].description, tuple(cells))] if cells else []
    return Summary(
        folder=folder,
        kind="run",
        settings=settings,
        lines=lines,
        environment=environment,
        data=data,
        rates={},
        missing=missing,
        go_on=config.quoted("pjax", "train", "--resume", folder),
        command=config.to_command(settings, "train"),
        notes=notes,
    )


def _so_far(records: tuple[Record, ...], best: Record | None) -> dict[str, Any]:
    """As the row of a result, of a seed that is not finished."""
    assert best is not None
    return {
        "best_step": best.step,
        "steps": records[-1].step,
        "stopped": "",
        "validation_accuracy": best.validation_accuracy,
        "test_accuracy": math.nan,
        "test_auc": None,
    }


def _comparison(
    folder: Path, environment: dict[str, Any], data: dict[str, Any], notes: list[str]
) -> Summary:
    settings = config.read(folder / runs.CONFIG, CompareConfig, complete=True)
    lines, missing = [], []
    for line in comparison.summarise(folder, settings):
        cells = tuple(cell for cell in line.cells if _is_sound(cell))
        if cells:
            lines.append(Line(line.method, line.description, cells))
    there = {(line.method, cell.seed) for line in lines for cell in line.cells}
    rates = {}
    for method in settings.methods:
        seeds = [seed for seed in settings.seeds if (method, seed) not in there]
        if seeds:
            missing.append(
                f"{method} with seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
            )
        for seed in seeds:
            path = folder / comparison.CELLS / f"{method}.seed{seed}.json"
            if path.exists():
                notes.append(f"{path}: damaged. The same command trains it anew.")
        path = folder / comparison.CELLS / f"{method}.tuning.json"
        if path.exists():
            try:
                rates[method] = _candidates(path)
            except RunError as error:
                notes.append(str(error))
    command = config.to_command(settings, "compare")
    place = config.quoted("--name", folder.resolve().name, "--runs-dir", folder.parent)
    return Summary(
        folder=folder,
        kind="comparison",
        settings=settings,
        lines=lines,
        environment=environment,
        data=data,
        rates=rates,
        missing=f"not trained: {'; '.join(missing)}" if missing else "",
        go_on=f"{command} {place}",
        command=command,
        notes=notes,
    )


def _candidates(path: Path) -> list[tuple[float, int, float]]:
    try:
        return [
            (float(one[0]), int(one[1]), float(one[2])) for one in read_json(path)["candidates"]
        ]
    except RunError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise RunError(f"{path}: damaged, not the search for a rate.") from error


def _is_sound(cell: Cell) -> bool:
    """Whether what a file gave has the types that a cell has."""
    for name, hint in typing.get_type_hints(Cell).items():
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if name != "records" and type(getattr(cell, name)) not in kinds:
            return False
    return True


def _number(value: Any, default: float) -> float:
    return float(value) if type(value) is float else default


def _or_least(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


__all__ = ["Summary", "summarise"]
