"""Downloads from a server on this machine that cuts, corrupts, delays, refuses and disappears."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import data_files
import numpy as np
import pytest

from pjax.lab import cli
from pjax.lab.data import DataError, download, fetch, files, load, load_text
from pjax.lab.data.sources import Source

#: A file of a few pieces.
CONTENT = np.random.default_rng(0).bytes(300_000)
NAME = "input.txt"
SET = "tinyshakespeare"


class Server:
    """Serves `CONTENT` on every path; the path's first part says how.

    **Arguments:**

    - `requests`: what was asked for: the path and the range.
    """

    def __init__(self) -> None:
        self.content = CONTENT
        self.requests: list[tuple[str, str | None]] = []
        self.release = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range")))
                manner = self.path.split("/")[1]
                with contextlib.suppress(ConnectionError):
                    getattr(outer, f"_{manner}")(self, len(outer.requests))
                self.close_connection = True

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def url(self, manner: str) -> str:
        return f"{self.address}/{manner}"

    def asked(self) -> list[str]:
        return [f"{path.split('/')[1]} {asked or 'all'}" for path, asked in self.requests]

    @staticmethod
    def _start(handler: BaseHTTPRequestHandler) -> int:
        asked = handler.headers.get("Range")
        return int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        start: int,
        content: bytes,
        length: int | None = None,
        ranged: bool = True,
    ) -> None:
        handler.send_response(206 if start and ranged else 200)
        if start and ranged:
            end = len(self.content)
            handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
        handler.send_header("Content-Length", str(len(content) if length is None else length))
        handler.end_headers()
        handler.wfile.write(content)

    def _good(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        start = self._start(handler)
        self._send(handler, start, self.content[start:])

    def _cuts(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        """A hundred thousand bytes at a time."""
        start = self._start(handler)
        rest = self.content[start:]
        self._send(handler, start, rest[:100_000], len(rest))

    def _cutsearly(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        """As if it were the end: nothing says how much comes."""
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(self.content[:1000])

    def _noranges(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        """It is cut at first, and always sends from the start."""
        end = 50_000 if number == 1 else len(self.content)
        self._send(handler, 0, self.content[:end], len(self.content))

    def _otherrange(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        start = self._start(handler)
        if not start:
            return self._send(handler, 0, self.content[:1000], len(self.content))
        return self._send(handler, 7, self.content[7:])

    def _corrupts(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        start = self._start(handler)
        wrong = bytearray(self.content)
        wrong[len(wrong) // 2] ^= 1
        self._send(handler, start, bytes(wrong[start:]))

    def _corruptsonce(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        """The first piece is wrong and cut off, what follows is right."""
        start = self._start(handler)
        if number == 1:
            return self._send(handler, 0, b"x" * 1000, len(self.content))
        return self._send(handler, start, self.content[start:])

    def _page(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        self._send(handler, 0, b"<html>Sign in to the network</html>")

    def _endless(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        while not self.release.is_set():
            handler.wfile.write(b"0" * 65536)

    def _missing(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        handler.send_error(404)

    def _busy(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        if number < 3:
            return handler.send_error(503)
        return self._good(handler, number)

    def _norange(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        if self._start(handler):
            return handler.send_error(416)
        return self._good(handler, number)

    def _silent(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        self.release.wait(10)

    def _stops(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        """It falls silent in the middle."""
        start = self._start(handler)
        self._send(handler, start, self.content[start : start + 1000], len(self.content) - start)
        self.release.wait(10)

    def _drips(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        self._send(handler, 0, b"", len(self.content))
        while not self.release.wait(0.02):
            handler.wfile.write(b"0")

    def _slow(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        start = self._start(handler)
        self._send(handler, start, b"", len(self.content) - start)
        for at in range(start, len(self.content), 30_000):
            time.sleep(0.02)
            handler.wfile.write(self.content[at : at + 30_000])

    def _moved(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        handler.send_response(302)
        handler.send_header("Location", self.url(f"good/{NAME}"))
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    def _nonsense(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        handler.wfile.write(b"220 mail.example ESMTP\r\n")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file comes to."""
    data_files.leave_only(monkeypatch, tmp_path)
    return tmp_path / SET


@pytest.fixture
def offer(server: Server, monkeypatch) -> Callable[..., Source]:
    """Makes `CONTENT` the official file of the data set, at mirrors of these manners."""

    def publish(*manners: str) -> Source:
        mirrors = [server.url(manner) for manner in manners]
        (source,) = data_files.publish(monkeypatch, SET, {NAME: CONTENT}, *mirrors)
        return source

    return publish


def get() -> tuple[Path, ...]:
    return fetch(SET, on_progress=lambda name, have, size: None)


def left_over(folder: Path) -> set[str]:
    """What is in the folder, but the empty file that is locked."""
    return {path.name for path in folder.iterdir()} - {f"{NAME}.lock"}


def check_whole(folder: Path) -> None:
    assert (folder / NAME).read_bytes() == CONTENT
    assert left_over(folder) == {NAME}


def test_a_whole_file_comes_and_stays(server, offer, folder) -> None:
    offer("good")
    seen: list[tuple[str, int, int]] = []
    paths = fetch(SET, on_progress=lambda *now: seen.append(now))
    assert paths == (folder / NAME,)
    check_whole(folder)
    assert seen[-1] == (NAME, len(CONTENT), len(CONTENT))
    assert [have for _, have, _ in seen] == sorted({have for _, have, _ in seen})
    assert len(seen) > 2
    get()
    assert server.asked() == ["good all"]
    (folder / NAME).write_bytes(b"damaged")
    get()
    check_whole(folder)


@pytest.mark.parametrize(
    ("manner", "asked"),
    [
        ("cuts", ["all", "bytes=100000-", "bytes=200000-"]),
        ("noranges", ["all", "bytes=50000-"]),
        ("corruptsonce", ["all", "bytes=1000-", "all"]),
        ("busy", ["all", "all", "all"]),
        ("slow", ["all"]),
    ],
)
def test_one_server_is_enough(manner, asked, server, offer, folder) -> None:
    offer(manner)
    get()
    check_whole(folder)
    assert [request.split()[1] for request in server.asked()] == asked


def test_redirections_are_followed(server, offer, folder) -> None:
    offer("moved")
    get()
    check_whole(folder)


@pytest.mark.parametrize(
    ("manner", "says"),
    [
        ("missing", "HTTP 404"),
        ("corrupts", "wrong checksum, SHA-256 .*… instead of"),
        ("page", "cut off after 35 of 300,000 bytes"),
        ("endless", "it sent more than the 300,000 bytes"),
        ("silent", "no answer for 0.5 seconds"),
        ("stops", "silent for 0.5 seconds"),
        ("drips", "slower than"),
        ("cutsearly", "cut off after 1,000"),
        ("otherrange", "another range"),
        ("nonsense", "the connection broke"),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_a_server_that_fails(manner, says, mirrored, server, offer, folder, monkeypatch) -> None:
    monkeypatch.setattr(download, "_WINDOW", 0.2)
    monkeypatch.setattr(download, "_TRIES", 2)
    if manner in ("silent", "stops"):
        monkeypatch.setattr(download, "TIMEOUT", 0.5)
    if mirrored:
        offer(manner, "good")
        get()
        check_whole(folder)
        return
    offer(manner)
    with pytest.raises(DataError, match=says) as caught:
        get()
    message = str(caught.value)
    assert str(folder / NAME) in message
    assert server.url(manner) in message
    assert "--data-dir DIR" in message
    assert message.count("\n") < 6
    assert left_over(folder) <= {f"{NAME}.part"}
    # What was kept is no obstacle for a server that works.
    offer("good")
    get()
    check_whole(folder)


def test_a_range_that_a_server_does_not_have(server, offer, folder) -> None:
    folder.mkdir()
    (folder / f"{NAME}.part").write_bytes(CONTENT[:1000])
    offer("norange")
    get()
    check_whole(folder)
    assert server.asked() == ["norange bytes=1000-", "norange all"]


@pytest.mark.parametrize("part", [b"", CONTENT[:250_000], CONTENT, b"x" * 1000, CONTENT + b"x"])
def test_what_an_earlier_try_left(part: bytes, server, offer, folder) -> None:
    folder.mkdir()
    (folder / f"{NAME}.part").write_bytes(part)
    offer("good")
    get()
    check_whole(folder)
    expected = {0: ["good all"], 250_000: ["good bytes=250000-"], 300_000: []}
    if len(part) in expected:
        assert server.asked() == expected[len(part)]


def test_mirrors_go_on_from_where_another_ended(server, offer, folder, monkeypatch) -> None:
    monkeypatch.setattr(download, "_TRIES", 1)
    offer("missing", "cuts", "corrupts", "cuts", "good")
    get()
    check_whole(folder)
    assert server.asked() == [
        "missing all",
        "cuts all",
        # The rest is wrong: what there was is not trusted either, and asked for again.
        "corrupts bytes=100000-",
        "corrupts all",
        "cuts all",
        "good bytes=100000-",
    ]


def test_the_users_mirror_comes_first(server, offer, folder, monkeypatch) -> None:
    offer("missing")
    monkeypatch.setenv(download.MIRROR_VARIABLE, server.url("good/"))
    get()
    assert server.requests == [(f"/good/{SET}/{NAME}", None)]
    monkeypatch.setenv(download.MIRROR_VARIABLE, "ftp://example.org")
    (folder / NAME).unlink()
    with pytest.raises(DataError, match="must start with http:// or https://"):
        get()


def test_no_network(offer, server, folder, monkeypatch, tmp_path) -> None:
    data_files.publish(monkeypatch, SET, {NAME: CONTENT}, "http://127.0.0.1:9", "http://no.invalid")
    (tmp_path / "mine").mkdir()
    start = time.monotonic()
    with pytest.raises(DataError, match="no connection") as caught:
        load_text(SET, tmp_path / "mine")
    assert time.monotonic() - start < 60
    message = str(caught.value)
    assert "127.0.0.1:9" in message
    assert "no.invalid" in message
    assert f"Not there either: {tmp_path / 'mine'} and {folder}." in message
    assert len(message.splitlines()) < 8
    assert left_over(folder) == set()
    with pytest.raises(DataError, match="looked for input.txt"):
        load_text(SET, download=False)


def test_a_data_set_is_downloaded_when_it_is_asked_for(server, tmp_path, monkeypatch) -> None:
    data_files.pretend_mnist_is_official(monkeypatch)
    contents = data_files.mnist()
    files = iter(contents.values())
    data_files.publish(monkeypatch, "mnist", contents, server.url("good"))
    data_files.write(tmp_path / "mnist", {"train-images-idx3-ubyte.gz": next(files)})
    monkeypatch.setattr(
        Server,
        "_good",
        lambda self, handler, number: self._send(
            handler, 0, contents[handler.path.rsplit("/", 1)[1]]
        ),
    )
    dataset = load("mnist")
    assert len(dataset.train) == 50
    assert {path.parent for path in dataset.files} == {tmp_path / "mnist"}
    assert len(server.requests) == 3
    load("mnist")
    assert len(server.requests) == 3


def test_damage_in_the_cache_is_seen_and_mended(server, offer, folder) -> None:
    source = offer("good")
    get()
    with (folder / NAME).open("r+b") as file:
        file.write(b"x")
    data_files.write(folder, {NAME: b"x" + CONTENT[1:]})
    with pytest.raises(DataError, match=f"pjax data fetch {SET}"):
        files.verify(folder / NAME, SET, source)
    get()
    check_whole(folder)


def test_parallel_downloads_of_one_file(server, offer, folder) -> None:
    offer("slow")
    found: list[object] = []

    def run() -> None:
        try:
            found.append(get())
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == 6 * [(folder / NAME,)]
    check_whole(folder)
    assert server.asked() == ["slow all"]


def test_an_interrupted_download_goes_on(server, offer, folder) -> None:
    offer("slow")

    def interrupt(name: str, have: int, size: int) -> None:
        if have > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(SET, on_progress=interrupt)
    (kept,) = left_over(folder)
    assert kept == f"{NAME}.part"
    have = (folder / kept).stat().st_size
    assert have > 100_000
    get()
    check_whole(folder)
    assert server.asked() == ["slow all", f"slow bytes={have}-"]


KILLED = """
import dataclasses, sys
from pjax.lab import data
from pjax.lab.data import download, sources
name, url, size, sha256 = sys.argv[1:]
source = sources.Source("input.txt", int(size), sha256, (url,))
sources.FILES[name] = dataclasses.replace(sources.FILES[name], sources=(source,))
data.fetch(name, on_progress=lambda name, have, size: print(have, flush=True))
"""


def test_a_killed_download_goes_on(server, offer, folder) -> None:
    source = offer("good")
    arguments = (SET, server.url(f"stops/{NAME}"), str(source.size), source.sha256)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1000\n"
        process.kill()
    assert left_over(folder) == {f"{NAME}.part"}
    get()
    check_whole(folder)
    assert server.asked() == ["stops all", "good bytes=1000-"]


def test_no_space_is_seen_before_the_download(server, offer, folder, monkeypatch) -> None:
    offer("good")
    free = download.shutil.disk_usage(folder.parent)._replace(free=len(CONTENT) - 1)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda place: free)
    with pytest.raises(DataError, match="no space, 300,000 bytes needed and 299,999 free"):
        get()
    assert left_over(folder) == set()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_no_space_during_the_download(server, offer, folder) -> None:
    folder.mkdir()
    (folder / f"{NAME}.part").symlink_to("/dev/full")
    offer("good", "good")
    with pytest.raises(DataError, match="no space") as caught:
        get()
    assert str(folder / NAME) in str(caught.value)
    assert left_over(folder) == set()
    assert len(server.requests) == 1


def test_a_cache_that_cannot_be_written(offer, folder, monkeypatch) -> None:
    offer("good")
    folder.parent.joinpath("file").write_text("")
    with pytest.raises(DataError, match=r"file/input.txt: cannot be written \(.+\)"):
        fetch(SET, folder.parent / "file", lambda *now: None)

    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(download, "_store", refuse)
    with pytest.raises(DataError, match="input.txt: cannot be written.*Permission denied"):
        get()


def test_what_has_no_official_files() -> None:
    assert fetch("digits") == ()
    with pytest.raises(DataError, match="no official files"):
        fetch("higgs-sample")
    with pytest.raises(DataError, match="no data set is called 'emnist'"):
        fetch("emnist")


def test_the_command_fetches(server, offer, folder, capsys, monkeypatch) -> None:
    offer("good")
    assert cli.main(["data", "fetch", SET, "digits"]) == 0
    printed = capsys.readouterr().out
    assert f"{SET}: {folder}" in printed
    assert "digits: comes with scikit-learn" in printed
    check_whole(folder)
    assert cli.main(["data", "fetch", SET, "--data-dir", str(folder / "other")]) == 0
    check_whole(folder / "other" / SET)
    offer("missing")
    (folder / NAME).unlink()
    assert cli.main(["data", "fetch", SET]) == 1
    captured = capsys.readouterr().err
    assert "HTTP 404" in captured
    assert "Traceback" not in captured
    assert cli.main(["data", "fetch"]) == 1
    assert "mnist, fashion-mnist, cifar10, higgs, tinyshakespeare" in capsys.readouterr().err


def test_a_bar_shows_the_progress(server, offer, folder, capsys) -> None:
    offer("good")
    fetch(SET)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{NAME}" in captured.err
    assert "300.0/300.0 kB" in captured.err
