"""What an experiment is, and the file that says so."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from pjax.lab import config
from pjax.lab.config import CompareConfig
from pjax.lab.errors import RunError, UsageError, shown

#: What is found out: accuracies of methods, what a training step costs, the residual of one solve,
#: or how large the problem of one batch is.
Kind = Literal["accuracy", "cost", "residual", "sizes"]
#: How accuracies are drawn: along the run, against a number, or one line for each entry.
Figure = Literal["curves", "against", "rows"]

FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class Entry:
    """One comparison of an experiment.

    **Arguments:**

    - `name`: of its folder, and its row in tables.
    - `settings`: what `pjax compare` would do.
    - `panel`: the part of the figure that it belongs to.
    - `x`: where it stands on the horizontal axis.
    """

    name: str
    settings: CompareConfig
    panel: str = ""
    x: float | None = None


@dataclasses.dataclass(frozen=True)
class Experiment:
    """An experiment as its file has it, in full or quick.

    **Arguments:**

    - `name`, `path`: of the file.
    - `title`: of figures and tables.
    - `shows`: what it shows, in one line.
    - `kind`, `figure`: see `Kind` and `Figure`.
    - `x`: the label of the horizontal axis.
    - `minutes`: rough times on two cores, in full and quick.
    - `quick`: whether the entries are the quick ones.
    - `entries`: what is compared.
    """

    name: str
    path: Path
    title: str
    shows: str
    kind: Kind
    figure: Figure
    x: str
    minutes: tuple[float, float]
    quick: bool
    entries: tuple[Entry, ...]

    @property
    def panels(self) -> list[str]:
        """The parts of the figure, in the order of the entries."""
        return list(dict.fromkeys(entry.panel for entry in self.entries))


def names() -> list[str]:
    """The experiments that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Path:
    """The file of an experiment: one that comes with the package, or a path that ends in `.toml`.

    **Raises:** `UsageError`.
    """
    if name.endswith(".toml"):
        if not Path(name).is_file():
            raise UsageError(f"{name}: no such file.")
        return Path(name)
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"there is no experiment {shown(name)}.{hint} There are: {', '.join(names())}; or give "
            "the path of a .toml file."
        )
    return FOLDER / f"{name}.toml"


def read(path: Path, quick: bool = False, data_dir: Path | None = None) -> Experiment:
    """The experiment in a file.

    **Arguments:**

    - `path`: the file.
    - `quick`: with what its table `quick` has instead.
    - `data_dir`: in place of that of the entries.

    **Raises:** `RunError`, with a message of one line that names the file and the key.
    """
    table = config.read_toml(path)
    known = {"title", "shows", "kind", "figure", "x", "minutes", "settings", "quick", "entries"}
    _check_keys(path, table, known)
    for key in ("title", "shows", "kind", "entries"):
        if key not in table:
            raise RunError(f"{path}: {key} is missing.")
    title, shows = _text(path, "title", table["title"]), _text(path, "shows", table["shows"])
    kind = _one_of(path, "kind", table["kind"], get_args(Kind))
    figure = _one_of(path, "figure", table.get("figure", "curves"), get_args(Figure))
    changes = _table(path, "quick", table.get("quick", {}))
    chosen = changes.pop("entries", None)
    shared = _table(path, "settings", table.get("settings", {}))
    rows = table["entries"]
    if not isinstance(rows, list) or not rows:
        raise RunError(f"{path}: entries must be a list of tables, one for each comparison.")
    entries = []
    for number, row in enumerate(rows, 1):
        more = [shared, _table(path, f"entry {number}", row)]
        more += [changes] * quick
        entries.append(_entry(path, number, more, data_dir))
    taken = [entry.name for entry in entries]
    if len({name.lower() for name in taken}) < len(taken):
        raise RunError(f"{path}: two entries have the same name.")
    if chosen is not None and (
        not isinstance(chosen, list) or not chosen or any(one not in taken for one in chosen)
    ):
        raise RunError(f"{path}: quick.entries must be a list of names of entries.")
    if quick and chosen is not None:
        entries = [entry for entry in entries if entry.name in chosen]
    if figure == "against" or kind in ("cost", "sizes"):
        for entry in entries:
            if entry.x is None:
                raise RunError(f"{path}: entry {shown(entry.name)} needs x, a number.")
    for entry in entries if kind == "residual" else ():
        for method in entry.settings.methods:
            if method not in config.OPTIMIZERS:
                raise RunError(
                    f"{path}: methods of entry {shown(entry.name)} must be of projection, as "
                    f"kind is residual, got {method}."
                )
    return Experiment(
        name=path.stem,
        path=path,
        title=title,
        shows=shows,
        kind=kind,
        figure=figure,
        x=_text(path, "x", table.get("x", "x")),
        minutes=_minutes(path, table.get("minutes", [0, 0])),
        quick=quick,
        entries=tuple(entries),
    )


def _entry(path: Path, number: int, tables: list[dict[str, Any]], data_dir: Path | None) -> Entry:
    merged = {key: value for table in tables for key, value in table.items()}
    where = f"entry {number}"
    if "name" not in merged:
        raise RunError(f"{path}: {where} needs a name.")
    name = _text(path, f"name of {where}", merged.pop("name"))
    where = f"entry {shown(name)}"
    if name.startswith(".") or any(sign in name for sign in "/\\:|"):
        raise RunError(
            f"{path}: the name of {where} must be the name of a folder, without / \\ : |."
        )
    panel = merged.pop("panel", "")
    if panel:
        panel = _text(path, f"panel of {where}", panel)
    x = merged.pop("x", None)
    if x is not None and (type(x) not in (int, float) or not math.isfinite(x)):
        raise RunError(f"{path}: x of {where} must be a number, got {shown(x)}.")
    if data_dir is not None:
        merged["data_dir"] = str(data_dir)
    settings = config.from_table(f"{path}: {where}", merged, CompareConfig)
    return Entry(name, settings, panel, None if x is None else float(x))


def _check_keys(path: Path, table: Mapping[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}."
            raise RunError(f"{path}: there is no key {shown(key)}; {hint}")


def _text(path: Path, key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise RunError(f"{path}: {key} must be a text on one line, got {shown(value)}.")
    return value


def _one_of(path: Path, key: str, value: object, choices: tuple[str, ...]) -> Any:
    if value not in choices:
        raise RunError(f"{path}: {key} must be one of {', '.join(choices)}, got {shown(value)}.")
    return value


def _table(path: Path, key: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunError(f"{path}: {key} must be a table, got {shown(value)}.")
    return dict(value)


def _minutes(path: Path, value: object) -> tuple[float, float]:
    numbers = value if isinstance(value, list) else []
    if len(numbers) != 2 or any(type(one) not in (int, float) or one < 0 for one in numbers):
        raise RunError(
            f"{path}: minutes must be two numbers, in full and quick, got {shown(value)}."
        )
    return float(numbers[0]), float(numbers[1])
