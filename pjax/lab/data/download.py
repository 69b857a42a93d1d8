"""Downloads into the cache: resumed, from several mirrors, checked, and whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from pjax.lab.data.errors import DataError, reason
from pjax.lab.data.files import (
    CACHE_DIR_VARIABLE,
    DATA_DIR_VARIABLE,
    cache_folder,
    digest,
    files_of,
    folder_name,
)
from pjax.lab.data.sources import Source

MIRROR_VARIABLE = "PJAX_DATA_MIRROR"
#: Called with a file's name, the bytes that are there, and its size.
OnProgress = Callable[[str, int, int], None]

#: Seconds without a byte after which a server is given up.
TIMEOUT = 30.0
#: A slower server is given up too, in bytes a second over the time `_WINDOW`.
_SLOWEST, _WINDOW = 1024, 60.0
#: Tries of one address that bring less than `_STRIDE` bytes each, and seconds between them.
_TRIES, _PAUSE, _STRIDE = 4, 0.5, 1 << 20
_PIECE = 1 << 16


class _Failed(Exception):
    """This address will not do."""


class _Interrupted(Exception):
    """What has come is good; a further try may bring the rest."""


class _NoRange(_Interrupted):
    """What has come is not the start of what this address has."""


def fetch(
    name: str,
    folder: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[Path, ...]:
    """Downloads the files of a data set, unless they are there and have the published SHA-256.

    A file takes its name only when it is whole and its checksum is right; until then it is
    `NAME.part`, from which a later call goes on. Several processes may fetch the same file at
    once: one downloads, the others wait. The address in the environment variable `PJAX_DATA_MIRROR`
    is tried first, followed by the data set and the file (`mnist/train-labels-idx1-ubyte.gz`).

    **Arguments:**

    - `name`: of the data set.
    - `folder`: where to, by default its folder in the cache.
    - `on_progress`: called as bytes come in; by default a bar is shown on standard error.

    **Returns:** the files.

    **Raises:** `DataError` for an unknown name, a data set without published files, no connection,
    a wrong checksum from every mirror, or no space.
    """
    files = files_of(name)
    if not files.layouts:
        return ()
    if not files.sources:
        raise DataError(f"{name} has no official files to download.")
    place = Path(folder) if folder is not None else cache_folder(name)
    with contextlib.ExitStack() as stack:
        report = on_progress if on_progress is not None else stack.enter_context(_bar())
        return tuple(_fetch_file(name, source, place, report) for source in files.sources)


def _fetch_file(name: str, source: Source, folder: Path, on_progress: OnProgress) -> Path:
    import filelock
    import pooch

    path = folder / source.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with filelock.FileLock(path.with_name(f"{path.name}.lock")), _quiet(pooch):
            urls = addresses(name, source)
            if not (path.is_file() and digest(path) == source.sha256):
                _download(source, urls, part, on_progress)
            # It compares checksums again, and renames what came.
            keeper = pooch.create(
                path=folder,
                base_url="",
                registry={source.name: f"sha256:{source.sha256}"},
                urls={source.name: urls[0]},
            )

            def take(url: str, output_file: Any, pooch: Any) -> None:
                os.replace(part, output_file)

            return Path(keeper.fetch(source.name, downloader=cast(Any, take)))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({reason(error)}).") from error


def addresses(name: str, source: Source) -> list[str]:
    """Where a file is, the user's mirror first.

    **Raises:** `DataError` if the mirror is no address of the web.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return list(source.urls)
    if not mirror.startswith(("http://", "https://")):
        raise DataError(f"{MIRROR_VARIABLE} must start with http:// or https://, got {mirror!r}.")
    own = f"{mirror.rstrip('/')}/{folder_name(name)}/{source.name}"
    return [own, *source.urls]


def _download(source: Source, urls: list[str], part: Path, on_progress: OnProgress) -> None:
    """Fills `part` with the whole file, from the first address that gives it."""
    failures = []
    for url in urls:
        try:
            _download_from(url, source, part, on_progress)
            return
        except _Failed as failure:
            failures.append(f"  {url}: {failure}")
    kept = (
        f"\n{_size(part):,} bytes are kept in {part}; the next try goes on from there."
        if _size(part)
        else ""
    )
    raise DataError(
        f"{part.with_suffix('')}: cannot be downloaded.\n" + "\n".join(failures) + kept + "\n"
        f"Get {source.name} by other means and name its folder (--data-dir DIR or "
        f"{DATA_DIR_VARIABLE}=DIR), or name a mirror ({MIRROR_VARIABLE}=URL)."
    )


def _download_from(url: str, source: Source, part: Path, on_progress: OnProgress) -> None:
    """Fills `part` from one address, in several tries if it must be."""
    left = _TRIES
    while True:
        if _size(part) > source.size:
            part.unlink()
        before = _size(part)
        try:
            if before != source.size:
                _receive(url, source, part, before, on_progress)
            found = digest(part)
            if found == source.sha256:
                return
            part.unlink()
            if not before:
                raise _Failed(
                    f"wrong checksum, SHA-256 {found[:16]}… instead of {source.sha256[:16]}…"
                )
            # What was there before was wrong, or what has come: once more from the start.
        except _Interrupted as interruption:
            if isinstance(interruption, _NoRange):
                part.unlink()
            left = _TRIES if _size(part) - before >= _STRIDE else left - 1
            if left == 0:
                raise _Failed(str(interruption)) from interruption
            time.sleep(_PAUSE)


def _receive(url: str, source: Source, part: Path, start: int, on_progress: OnProgress) -> None:
    """Adds to `part` what a server has after `start` bytes, until the file is whole."""
    with _connect(url, start) as response:
        if start and response.status != 206:
            start = 0  # It does not know ranges and sends everything.
        elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _Failed("it sent another range than was asked for")
        _check_space(part, source.size - start)
        try:
            _store(response, source, part, start, on_progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            part.unlink()
            raise _no_space(part, source.size) from error
    have = _size(part)
    if have > source.size:
        part.unlink()
        raise _Failed(f"it sent more than the {source.size:,} bytes of the file")
    if have < source.size:
        raise _Interrupted(f"cut off after {have:,} of {source.size:,} bytes")


def _connect(url: str, start: int) -> Any:
    """The answer of a server that is asked for a file from a byte on."""
    import certifi

    headers = {"Accept-Encoding": "identity", "User-Agent": "pjax"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    context = ssl.create_default_context(cafile=certifi.where())
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT, context=context)
    except urllib.error.HTTPError as error:
        error.close()
        message = f"HTTP {error.code} {error.reason}".strip()
        if error.code == 416 and start:
            raise _NoRange(message) from error
        passing = error.code in (429, 500, 502, 503, 504)
        raise (_Interrupted if passing else _Failed)(message) from error
    except TimeoutError as error:
        raise _Interrupted(f"no answer for {TIMEOUT:g} seconds") from error
    except urllib.error.URLError as error:
        cause = error.reason if isinstance(error.reason, BaseException) else error
        raise _Failed(f"no connection ({reason(cause)})") from error
    except (http.client.HTTPException, OSError) as error:
        raise _Interrupted(f"the connection broke ({reason(error)})") from error


def _store(response: Any, source: Source, part: Path, start: int, on_progress: OnProgress) -> None:
    """Writes what comes behind the first `start` bytes, at most a piece more than the file has."""
    window, since = 0, time.monotonic()
    with open(part, "ab" if start else "wb") as file:
        while start <= source.size and (piece := _read(response)):
            file.write(piece)
            file.flush()
            start += len(piece)
            on_progress(source.name, start, source.size)
            window += len(piece)
            if (passed := time.monotonic() - since) > _WINDOW:
                if window < _SLOWEST * passed:
                    raise _Interrupted(f"slower than {_SLOWEST} bytes a second")
                window, since = 0, time.monotonic()


def _read(response: Any) -> bytes:
    try:
        return response.read1(_PIECE)
    except TimeoutError as error:
        raise _Interrupted(f"silent for {TIMEOUT:g} seconds") from error
    except (http.client.HTTPException, OSError) as error:
        raise _Interrupted(f"the connection broke ({reason(error)})") from error


def _check_space(part: Path, needed: int) -> None:
    if shutil.disk_usage(part.parent).free < needed:
        raise _no_space(part, needed)


def _no_space(part: Path, needed: int) -> DataError:
    free = shutil.disk_usage(part.parent).free
    return DataError(
        f"{part.with_suffix('')}: no space, {needed:,} bytes needed and {free:,} free. "
        f"Free some, or name another folder for downloads: {CACHE_DIR_VARIABLE}=DIR."
    )


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


@contextlib.contextmanager
def _quiet(pooch: Any) -> Iterator[None]:
    """Pooch reports what this module reports itself."""
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _bar() -> Iterator[OnProgress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        tasks = {}

        def report(name: str, have: int, size: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=size)
            progress.update(tasks[name], completed=have)

        yield report
