"""The metrics of a run as JSON lines, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pjax.lab.errors import RunError, UsageError
from pjax.lab.files import write_text
from pjax.lab.train import Record

#: The fields of every line, in the order of the columns; measures by other names follow.
FIELDS = (
    "step",
    "epoch",
    "seconds",
    "seed",
    "loss",
    "residual",
    "train_accuracy",
    "validation_accuracy",
)
JSON_LINES, CSV, EVENTS = "metrics.jsonl", "metrics.csv", "tensorboard"


class Recorder:
    """Writes records into the folder of a run, each at once.

    The JSON lines are the original. CSV and TensorBoard's events are made anew from them when a run
    goes on, so no line is lost in one and there in another.

    **Arguments:**

    - `folder`: of the run.
    - `tensorboard`: write TensorBoard's event files too.
    - `mark`: where the lines ended when the checkpoint was written (see `mark`); what is behind is
      cut off. `None` starts anew.

    **Raises:** `RunError` if the lines before the mark are not those that were written.
    """

    def __init__(
        self, folder: Path, tensorboard: bool = False, mark: dict[str, Any] | None = None
    ) -> None:
        self._folder = folder
        self._events = _event_writer(folder / EVENTS) if tensorboard else None
        path = folder / JSON_LINES
        kept = b""
        if mark is not None and mark["bytes"]:
            kept = _read(path)[: mark["bytes"]]
            if hashlib.sha256(kept).hexdigest() != mark["sha256"]:
                raise RunError(
                    f"{path}: its first {mark['bytes']} bytes are not those that the run wrote; "
                    "put the original back, or start a new run."
                )
        self._digest = hashlib.sha256(kept)
        self._bytes = len(kept)
        with open(path, "ab") as file:
            file.truncate(len(kept))
        records = [_parse(path, number, line) for number, line in _lines(kept)]
        self._columns = FIELDS
        self._write_table(records)
        if self._events:
            for record in records:
                self._send(record)
            self._events.flush()

    def write(self, records: Iterable[Record]) -> None:
        """Adds records; they are in the files when it returns."""
        records = list(records)
        content = "".join(_line(record) for record in records).encode()
        with open(self._folder / JSON_LINES, "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        self._digest.update(content)
        self._bytes += len(content)
        if any(name not in self._columns for record in records for name in record.measures):
            self._write_table(read_records(self._folder))
        else:
            with open(self._folder / CSV, "a", encoding="utf-8", newline="") as file:
                file.write(_csv(_row(record, self._columns) for record in records))
        if self._events:
            for record in records:
                self._send(record)
            self._events.flush()

    def mark(self) -> dict[str, Any]:
        """How long the JSON lines are now, and their SHA-256: for a checkpoint."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        if self._events:
            self._events.close()

    def _write_table(self, records: Sequence[Record]) -> None:
        """The whole table, with a column for each measure that a record has."""
        measures = dict.fromkeys(name for record in records for name in record.measures)
        self._columns = (*FIELDS, *measures)
        rows = (_row(record, self._columns) for record in records)
        write_text(self._folder / CSV, _csv([self._columns, *rows]))

    def _send(self, record: Record) -> None:
        names = ("loss", "residual", "train_accuracy", "validation_accuracy")
        values = {name: getattr(record, name) for name in names} | record.measures
        for name, value in values.items():
            if math.isfinite(value):
                self._events.add_scalar(f"{name}/seed{record.seed}", value, record.step)  # pyright: ignore


def read_records(folder: Path) -> list[Record]:
    """All whole lines of a run's metrics; a last line that a killed process cut is left out.

    **Raises:** `RunError` for a file that is missing or damaged.
    """
    return [record for record, _ in parse_lines(folder / JSON_LINES)]


def parse_lines(path: Path) -> list[tuple[Record, bytes]]:
    """Each whole line of a file with the record that it holds. `RunError` as `read_records`."""
    return [(_parse(path, number, line), line + b"\n") for number, line in _lines(_read(path))]


def plain(record: Record) -> dict[str, Any]:
    """The record as JSON has it, measures beside fields: `None` for numbers that are not finite."""
    content = dataclasses.asdict(record)
    measures = content.pop("measures")
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in (content | measures).items()
    }


def parse(content: Any) -> Record:
    """The record that `plain` made this of. `ValueError` if there is none."""
    if not isinstance(content, dict) or not content.keys() >= set(FIELDS):
        raise ValueError(f"the fields {', '.join(FIELDS)} expected")
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name in ("step", "seed"):
            if type(value) is not int or value < 0:
                raise ValueError(f"{name} must be an integer from 0 on")
            values[name] = value
        elif value is None:
            values[name] = math.nan
        elif type(value) in (int, float) and abs(value) < 1e308:
            values[name] = float(value)
        else:
            raise ValueError(f"{name} must be a number")
    measures = {name: values.pop(name) for name in content if name not in FIELDS}
    return Record(**values, measures=measures)


def _parse(path: Path, number: int, line: bytes) -> Record:
    try:
        return parse(json.loads(line))
    except (ValueError, RecursionError) as error:
        text = (str(error).splitlines() or ["damaged"])[0][:100]
        raise RunError(f"{path}: line {number} is damaged ({text}).") from error


def _line(record: Record) -> str:
    content = plain(record)
    content = {name: content.pop(name) for name in FIELDS} | content
    return json.dumps(content, allow_nan=False) + "\n"


def _row(record: Record, columns: Sequence[str]) -> list[Any]:
    content = plain(record)
    return ["" if content.get(name) is None else content[name] for name in columns]


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _lines(content: bytes) -> list[tuple[int, bytes]]:
    *whole, _ = content.split(b"\n")
    return list(enumerate(whole, 1))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}).") from error


def check_event_writer() -> None:
    """Raises `UsageError` if what writes event files is not installed."""
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"TensorBoard's event files need tensorboardX ({error}); in a clone of pjax: "
            'pip install ".[tensorboard]".'
        ) from error


def _event_writer(folder: Path) -> Any:
    check_event_writer()
    import tensorboardX

    shutil.rmtree(folder, ignore_errors=True)
    return tensorboardX.SummaryWriter(str(folder))
