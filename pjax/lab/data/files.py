"""Where the files of a data set are, and whether they are what their names say."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path

from pjax.lab.data.errors import DataError, reason
from pjax.lab.data.sources import FILES, FOLDERS, Files, Slot, Source

DATA_DIR_VARIABLE = "PJAX_DATA_DIR"
CACHE_DIR_VARIABLE = "PJAX_CACHE_DIR"
#: A file of this name, in the form of `sha256sum`, is obeyed for the files beside it.
SUMS = "SHA256SUMS"
_SUMS_LIMIT = 1 << 20


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a data set.

    **Arguments:**

    - `folder`: where they are.
    - `layout`: the number of the way to have them that was found.
    - `paths`: one for each slot of that layout.
    """

    folder: Path
    layout: int
    paths: tuple[Path, ...]


def folder_name(name: str) -> str:
    """The folder of a data set: its name, or that of the data set whose folder it shares."""
    return FOLDERS.get(name, name)


def cache_folder(name: str) -> Path:
    """The folder in which downloads of a data set are kept.

    It is in the folder that `PJAX_CACHE_DIR` names, by default in the user's cache as the system
    has it.
    """
    import pooch

    place = os.environ.get(CACHE_DIR_VARIABLE) or pooch.os_cache("pjax")
    return Path(place).expanduser() / folder_name(name)


def data_folder(name: str, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The folder of the user's own files, its subfolder of this name if it has one.

    **Raises:** `DataError` if a folder is named that does not exist.
    """
    place = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE)
    if not place:
        return None
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder.")
    below = folder / folder_name(name)
    return below if below.is_dir() else folder


def files_of(name: str) -> Files:
    """What the registry says of a data set.

    **Raises:** `DataError` if there is none of this name.
    """
    if name not in FILES:
        raise DataError(f"no data set is called {name!r}; there are: {', '.join(FILES)}.")
    return FILES[name]


def find(name: str, data_dir: str | os.PathLike[str] | None = None) -> Found | None:
    """The files of a data set in the user's folder, else in the cache; nothing is downloaded.

    **Raises:** `DataError` if the user's folder does not exist, holds the files in part, or holds
    them as a pickle only.
    """
    files = files_of(name)
    folder = data_folder(name, data_dir)
    if folder is not None:
        found = _find_in(folder, files)
        if found is not None:
            return found
        _refuse_parts(folder, files)
    return _find_in(cache_folder(name), files)


def _find_in(folder: Path, files: Files) -> Found | None:
    for number, layout in enumerate(files.layouts):
        paths = tuple(_present(folder, slot) for slot in layout)
        if all(paths):
            return Found(folder, number, tuple(path for path in paths if path))
    return None


def _present(folder: Path, slot: Slot) -> Path | None:
    # Only regular files: a pipe would be waited for, a device has no end.
    return next((folder / name for name in slot if (folder / name).is_file()), None)


def _refuse_parts(folder: Path, files: Files) -> None:
    for layout in files.layouts:
        missing = [slot for slot in layout if _present(folder, slot) is None]
        if len(missing) < len(layout):
            names = " or ".join(missing[0])
            also = f", nor are {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(f"{folder}: {names} is not there{also}, though its companions are.")
    for pickle in files.refused:
        if (folder / pickle).exists():
            wanted = " or ".join(files.layouts[0][0])
            raise DataError(
                f"{folder / pickle}: holds pickles, which can run any code and are never loaded; "
                f"{wanted} is read instead."
            )


def places(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """The folders in which a data set is looked for."""
    folders = [data_folder(name, data_dir), cache_folder(name)]
    return " and ".join(str(folder) for folder in folders if folder is not None)


def missing(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """Where a data set was looked for and what to do."""
    wanted = ", ".join(" or ".join(slot) for slot in FILES[name].layouts[0])
    return (
        f"{name}: looked for {wanted} in {places(name, data_dir)}. Put files into a folder DIR "
        f"or DIR/{folder_name(name)} and name it: --data-dir DIR or {DATA_DIR_VARIABLE}=DIR."
    )


def digest(path: Path, name: str = "sha256") -> str:
    """A checksum of a file, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, functools.partial(hashlib.new, name)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}).") from error


def verify(path: Path, name: str, source: Source | None = None, strict: bool = False) -> None:
    """Compares a file with the sums that are known of it.

    They are the published one, if the file has the published size (another size is another file of
    the same kind, compressed anew or a part of it), and one in a file `SHA256SUMS` beside it.

    **Arguments:**

    - `path`: the file.
    - `name`: of the data set.
    - `source`: what was published.
    - `strict`: only the published file will do, since its content cannot be checked otherwise.

    **Raises:** `DataError`.
    """
    wanted = _listed(path)
    if source is not None:
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({reason(error)}).") from error
        if strict and size != source.size:
            raise DataError(
                f"{path}: {size:,} bytes, the official file has {source.size:,}. {advice(name)}"
            )
        if size == source.size:
            wanted[source.sha256] = "the official file"
    if not wanted:
        return
    found = digest(path)
    for sha256, origin in wanted.items():
        if found != sha256:
            raise DataError(
                f"{path}: its SHA-256 is {found[:16]}…, not {sha256[:16]}… as of {origin}: it is "
                f"damaged or another file. {advice(name)}"
            )


def advice(name: str) -> str:
    """What to do about a damaged file."""
    return f"Remove it, and fetch the official one (pjax data fetch {name})."


def _listed(path: Path) -> dict[str, str]:
    """The sum that `SHA256SUMS` beside a file has for it."""
    sums = path.with_name(SUMS)
    if not sums.is_file():
        return {}
    try:
        if sums.stat().st_size > _SUMS_LIMIT:
            raise DataError(f"{sums}: longer than a list of checksums.")
        lines = sums.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{sums}: cannot be read ({reason(error)}).") from error
    listed = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        sha256, _, name = line.partition(" ")
        name = name.removeprefix(" ").removeprefix("*")
        if not name or len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
            raise DataError(f"{sums}: line {number} is not a SHA-256 sum and a file's name.")
        if name == path.name:
            listed[sha256.lower()] = f"line {number} of {sums.name}"
    return listed
