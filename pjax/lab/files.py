"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pjax.lab.errors import RunError

_LARGEST_JSON = 50_000_000


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, unless it is there.

    **Raises:** `RunError`, with a message of one line that names the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot create the folder ({error.strerror}).") from error


def write_text(path: Path, text: str) -> None:
    """Writes a file in one go: a reader, or a process that is killed, sees the old or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """As `write_text`, one entry of the outer level on a line."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    **Raises:** `RunError`, with a message of one line that names the file.
    """
    try:
        size = path.stat().st_size
        if size > _LARGEST_JSON:
            raise RunError(f"{path}: too large for such a file ({size:,} bytes).")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}).") from error
    except RecursionError as error:
        raise RunError(f"{path}: damaged (nested too deeply).") from error
    except RunError:
        raise
    except ValueError as error:
        raise RunError(f"{path}: damaged, not JSON ({str(error).splitlines()[0][:80]}).") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged, an object expected.")
    return content
