"""Damaged files: a `DataError` of one line that names the file, in little memory; never wrong data.

Each format has an intact set of small files, whose published checksums, where the real set has
some, are taken to be those of the small files. Flipped bits are tried twice: without a file
`SHA256SUMS`, where the format itself must show them, and with one, where nothing may pass.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import io
import os
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import data_files
import numpy as np
import pytest

from pjax.lab.data import DataError, Dataset, Text, load, load_text

#: Buffers, the list of a piece's lines, decoders: what is needed beside the content of a file.
SPARE = 4 << 20


def _csv() -> dict[str, bytes]:
    return {"higgs_sample.csv": data_files.csv(data_files.higgs_table())}


def _compressed(contents: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in contents.items()}


def _official_csv(patch: pytest.MonkeyPatch) -> dict[str, bytes]:
    data_files.pretend_higgs_has(patch, 100, 10)
    contents = _compressed({"HIGGS.csv": data_files.csv(data_files.higgs_table())})
    data_files.publish(patch, "higgs", contents)
    return contents


def _mnist(compressed: bool, name: str) -> Callable[[pytest.MonkeyPatch], dict[str, bytes]]:
    def prepare(patch: pytest.MonkeyPatch) -> dict[str, bytes]:
        data_files.pretend_mnist_is_official(patch, name)
        return data_files.mnist(compressed)

    return prepare


def _batches(patch: pytest.MonkeyPatch) -> dict[str, bytes]:
    data_files.pretend_cifar10_is_small(patch)
    return data_files.cifar10_batches()


def _archive(patch: pytest.MonkeyPatch) -> dict[str, bytes]:
    data_files.pretend_cifar10_is_small(patch)
    contents = data_files.cifar10_archive()
    data_files.pretend_archive_is_official(patch, *contents.values())
    return contents


def _text(patch: pytest.MonkeyPatch) -> dict[str, bytes]:
    data_files.pretend_text_is_official(patch, data_files.text())
    return {"input.txt": data_files.text()}


@dataclasses.dataclass(frozen=True)
class Format:
    """A form of a data set.

    **Arguments:**

    - `name`: of the data set.
    - `prepare`: makes the intact files the right ones.
    - `damaged`: those that are damaged.
    - `checked`: no change of the content passes, since a checksum covers it.
    """

    name: str
    prepare: Callable[[pytest.MonkeyPatch], dict[str, bytes]]
    damaged: tuple[str, ...]
    checked: bool


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FORMATS = {
    "idx": Format("mnist", _mnist(False, "mnist"), (IMAGES, LABELS), True),
    "idx.gz": Format("mnist", _mnist(True, "mnist"), (f"{IMAGES}.gz", f"{LABELS}.gz"), True),
    "fashion.gz": Format("fashion-mnist", _mnist(True, "fashion-mnist"), (f"{IMAGES}.gz",), True),
    "tar.gz": Format("cifar10", _archive, ("cifar-10-binary.tar.gz",), True),
    "bin": Format(
        "cifar10",
        _batches,
        ("cifar-10-batches-bin/data_batch_1.bin", "cifar-10-batches-bin/test_batch.bin"),
        False,
    ),
    "parquet": Format(
        "cifar10", lambda patch: data_files.cifar10_parquet(), ("train.parquet",), False
    ),
    "csv": Format("higgs-sample", lambda patch: _csv(), ("higgs_sample.csv",), False),
    "csv.gz": Format(
        "higgs-sample", lambda patch: _compressed(_csv()), ("higgs_sample.csv.gz",), True
    ),
    "official csv.gz": Format("higgs", _official_csv, ("HIGGS.csv.gz",), True),
    "text": Format("tinyshakespeare", _text, ("input.txt",), True),
}


HAS_PARQUET = importlib.util.find_spec("pyarrow") is not None
if not HAS_PARQUET:
    del FORMATS["parquet"]
needs_parquet = pytest.mark.skipif(not HAS_PARQUET, reason="pyarrow is not installed")


class _Runs:
    """Would write a file if it were unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch unpickled",)


def _picture() -> bytes:
    return data_files.png(np.zeros((8, 8, 3)))


#: Files of another kind under the right name.
OTHERS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "zeros": lambda: bytes(3000),
    "noise": lambda: np.random.default_rng(1).bytes(3000),
    "page": lambda: b"<!DOCTYPE html><html><body>Sign in to the network</body></html>\n",
    "pickle": lambda: pickle.dumps(_Runs()),
    "compressed pickle": lambda: gzip.compress(pickle.dumps(_Runs())),
    "compressed nothing": lambda: gzip.compress(b""),
    "twice compressed": lambda: gzip.compress(gzip.compress(bytes(3000))),
    "text": lambda: "Ünïcödé,1,2,3\n".encode(),
}
MORE = {"byte": b"\x01", "record": bytes(3073) + b"1,2\n"}
CUTS = [0.02, 0.25, 0.5, 0.75, 0.99, -1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_files.leave_only(monkeypatch, tmp_path / "cache")
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


def read(name: str, folder: Path) -> Dataset | Text:
    if name == "tinyshakespeare":
        return load_text(name, folder, download=False)
    return load(name, folder, download=False)


def arrays(data: Dataset | Text) -> list[np.ndarray]:
    if isinstance(data, Text):
        return [data.train, data.validation, data.test]
    return [
        array for part in (data.train, data.validation, data.test) for array in (part.x, part.y)
    ]


def same(left: Dataset | Text, right: Dataset | Text) -> bool:
    pairs = zip(arrays(left), arrays(right), strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def refuse(
    name: str, folder: Path, file: str, match: str | None = None, honest: int = 1 << 16
) -> None:
    """Reading fails with one line that names the file, in at most twice the honest memory."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match) as caught:
            read(name, folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    check_message(caught.value, folder / file)
    assert peak < 2 * honest + SPARE


def check_message(error: DataError, path: Path) -> None:
    message = str(error)
    assert str(path).removesuffix(".gz") in message
    assert "\n" not in message
    assert len(message) < 600


def whole(format: Format, folder: Path, patch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Writes the intact files, which load."""
    contents = format.prepare(patch)
    data_files.write(folder, contents)
    return contents


def cases(among: Iterator[Any] | list[Any], checked: bool | None = None) -> list[Any]:
    return [
        pytest.param(format, file, case, id=f"{name}-{file}-{case}")
        for name, format in FORMATS.items()
        if checked is None or format.checked == checked
        for file in format.damaged
        for case in among
    ]


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_intact_files_load(format: Format, folder: Path, monkeypatch) -> None:
    contents = whole(format, folder, monkeypatch)
    data = read(format.name, folder)
    assert same(data, read(format.name, folder))
    below = folder / Path(next(iter(contents))).parent
    names = {Path(name).name: content for name, content in contents.items()}
    (below / "SHA256SUMS").write_bytes(data_files.sums(names))
    assert same(data, read(format.name, folder))


@pytest.mark.parametrize(("format", "file", "part"), cases(CUTS))
def test_truncated(format: Format, file: str, part: float, folder, monkeypatch) -> None:
    contents = whole(format, folder, monkeypatch)
    end = -1 if part < 0 else max(1, int(len(contents[file]) * part))
    (folder / file).write_bytes(contents[file][:end])
    refuse(format.name, folder, file)


@pytest.mark.parametrize(("format", "file", "kind"), cases(list(OTHERS)))
def test_of_another_type(format: Format, file: str, kind: str, folder, monkeypatch) -> None:
    whole(format, folder, monkeypatch)
    (folder / file).write_bytes(OTHERS[kind]())
    refuse(format.name, folder, file)
    assert not list(folder.parent.rglob("unpickled"))


@pytest.mark.parametrize(("format", "file", "more"), cases(list(MORE)))
def test_longer_than_it_should_be(format: Format, file: str, more: str, folder, monkeypatch):
    contents = whole(format, folder, monkeypatch)
    (folder / file).write_bytes(contents[file] + MORE[more])
    refuse(format.name, folder, file)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "device"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_not_a_regular_file(format: Format, kind: str, folder: Path, monkeypatch) -> None:
    whole(format, folder, monkeypatch)
    path = folder / format.damaged[0]
    path.unlink()
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path)
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=path.name) as caught:
        read(format.name, folder)
    assert str(folder) in str(caught.value)


def flips(content: bytes, count: int) -> Iterator[bytes]:
    """The content with one bit changed, at places all over it, the first bytes among them."""
    places = {*range(min(12, len(content))), *np.linspace(0, len(content) - 1, count, dtype=int)}
    for number, place in enumerate(sorted(int(place) for place in places)):
        changed = bytearray(content)
        changed[place] ^= 1 << number % 8
        yield bytes(changed)


@pytest.mark.parametrize("sums", [False, True], ids=["", "with sums"])
@pytest.mark.parametrize(
    ("format", "file"),
    [(format, file) for format in FORMATS.values() for file in format.damaged],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flipped_bits(format: Format, file: str, sums: bool, folder: Path, monkeypatch) -> None:
    contents = whole(format, folder, monkeypatch)
    intact = read(format.name, folder)
    if sums:
        listed = data_files.sums({Path(file).name: contents[file]})
        (folder / file).with_name("SHA256SUMS").write_bytes(listed)
    refused = 0
    for changed in flips(contents[file], 40):
        (folder / file).write_bytes(changed)
        try:
            data = read(format.name, folder)
        except DataError as error:
            check_message(error, folder / file)
            refused += 1
            continue
        assert not sums
        # What is not refused is the same data (a changed time stamp in the header of a compressed
        # file), or at least sound data, where no checksum covers the file.
        assert not format.checked or same(data, intact)
        assert all(np.isfinite(array).all() for array in arrays(data))
        assert [array.shape for array in arrays(data)] == [a.shape for a in arrays(intact)]
    assert refused > 0


# What only one format has


MAGIC = b"\0\0\x08"


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        (LABELS, b"label\n1\n", "not an IDX file"),
        (LABELS, b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file"),
        (LABELS, MAGIC + b"\x03\0\0", "cut off in its header"),
        (LABELS, MAGIC + b"\x01\xff\xff\xff\xff\x01", "at most 20 rows"),
        (LABELS, MAGIC + b"\x04" + b"\xff" * 16 + b"\x01", r"\(rows,\) expected"),
        (LABELS, MAGIC + b"\0", "not an IDX file"),
        (LABELS, MAGIC + b"\xff" + b"\0" * 1020, "not an IDX file"),
        (LABELS, data_files.idx(np.full(20, 10)), "label 10"),
        (LABELS, data_files.idx(np.full(20, 255)), "label 255"),
        (LABELS, data_files.idx(np.zeros(19)), "19 labels for the 20 images"),
        (LABELS, data_files.idx(np.zeros(21)), "at most 20 rows"),
        (LABELS, data_files.idx(np.zeros((20, 1))), r"\(rows,\) expected"),
        (LABELS, data_files.idx(np.zeros(0)), "0 labels"),
        (LABELS, data_files.idx(np.zeros(20)), "not that of the official file"),
        (IMAGES, data_files.idx(np.zeros((60, 27, 28))), r"\(rows, 28, 28\) expected"),
        (IMAGES, data_files.idx(np.zeros((60, 784))), r"\(rows, 28, 28\) expected"),
        (IMAGES, data_files.idx(np.zeros((60, 28, 28))), "not that of the official file"),
        (IMAGES, MAGIC + b"\x03" + struct.pack(">3I", 1 << 31, 28, 28), "at most 60 rows"),
        (IMAGES, MAGIC + b"\x03" + struct.pack(">3I", 60, 28, 28) + b"\1", "cut off, 1 of 47040"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_idx(file, content, match, compressed, folder, monkeypatch) -> None:
    whole(FORMATS["idx.gz" if compressed else "idx"], folder, monkeypatch)
    path = folder / (f"{file}.gz" if compressed else file)
    path.write_bytes(gzip.compress(content) if compressed else content)
    refuse("mnist", folder, path.name, match)


def test_both_idx_files_of_a_part_empty(folder: Path) -> None:
    data_files.write(folder, data_files.mnist(compressed=False))
    (folder / LABELS).write_bytes(data_files.idx(np.zeros(0)))
    (folder / "t10k-images-idx3-ubyte").write_bytes(data_files.idx(np.zeros((0, 28, 28))))
    refuse("mnist", folder, LABELS, "holds no rows")


def test_one_set_under_the_name_of_another(folder: Path, monkeypatch) -> None:
    data_files.pretend_mnist_is_official(monkeypatch)
    data_files.write(folder, data_files.mnist())
    with pytest.raises(DataError, match="this is MNIST, not fashion-mnist"):
        load("fashion-mnist", folder)


RECORDS = data_files.cifar10_records()
WRONG_LABEL = bytes([10]) + RECORDS[0][1:]
OTHER_LABEL = bytes([1]) + RECORDS[0][1:]
MEMBERS = data_files.cifar10_batches()
FIRST = "cifar-10-batches-bin/data_batch_1.bin"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (WRONG_LABEL, "label 10 found"),
        (OTHER_LABEL, "rows of class 0"),
        (RECORDS[0][:-3073], "expected"),
        (RECORDS[0] + RECORDS[1][:3073], "expected"),
        (bytes(len(RECORDS[0])), "rows of class 0"),
    ],
)
def test_batches(content: bytes, match: str, folder: Path, monkeypatch) -> None:
    whole(FORMATS["bin"], folder, monkeypatch)
    (folder / FIRST).write_bytes(content)
    refuse("cifar10", folder, FIRST, match)


def _header(kind: bytes, **fields: Any) -> tarfile.TarInfo:
    header = tarfile.TarInfo(FIRST)
    header.type = kind
    for name, value in fields.items():
        setattr(header, name, value)
    return header


@pytest.mark.parametrize(
    ("members", "match"),
    [
        ({}, "has no member"),
        ({name: content for name, content in MEMBERS.items() if name != FIRST}, "data_batch_1"),
        ({**MEMBERS, FIRST: RECORDS[0][:-1]}, "data_batch_1.bin has 30,729 bytes, 30,730 exp"),
        ({**MEMBERS, FIRST: WRONG_LABEL}, "label 10 found"),
        ({**MEMBERS, FIRST: OTHER_LABEL}, "rows of class 0"),
        ({**MEMBERS, FIRST: _header(tarfile.SYMTYPE, linkname="/etc/passwd")}, "data_batch_1"),
        ({**MEMBERS, FIRST: _header(tarfile.LNKTYPE, linkname="../../x")}, "data_batch_1"),
        ({**MEMBERS, FIRST: _header(tarfile.DIRTYPE)}, "data_batch_1"),
        ({FIRST: _header(tarfile.REGTYPE, size=8 << 30)}, "data_batch_1"),
        ({FIRST: RECORDS[0], "x": _header(tarfile.REGTYPE, name="x", size=8 << 30)}, "x has 8,5"),
        ({f"../../{FIRST}": RECORDS[0], f"/{FIRST}": RECORDS[0]}, "has no member"),
    ],
)
def test_archives_whose_checksum_is_right(members, match: str, folder: Path, monkeypatch) -> None:
    """The members are checked, whatever the sum says; nothing is written anywhere."""
    data_files.pretend_cifar10_is_small(monkeypatch)
    content = data_files.tar(members)
    data_files.pretend_archive_is_official(monkeypatch, content)
    data_files.write(folder, {"cifar-10-binary.tar.gz": content})
    refuse("cifar10", folder, "cifar-10-binary.tar.gz", match, honest=8 * len(RECORDS[0]))
    assert [path.name for path in folder.parent.rglob("*") if path.is_file()] == [
        "cifar-10-binary.tar.gz"
    ]


@pytest.mark.parametrize("name", ["cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"])
def test_pickles_of_cifar10_are_refused(name: str, folder: Path) -> None:
    (folder / name).write_bytes(pickle.dumps(_Runs()))
    refuse("cifar10", folder, name, "holds pickles.*cifar-10-binary.tar.gz is read instead")
    assert not list(folder.parent.rglob("unpickled"))


def _pngs(rows: int = 30) -> list[bytes | None]:
    return [data_files.png(picture) for picture in data_files.pictures(rows)]


def _tables() -> dict[str, tuple[Callable[[], bytes], str]]:
    import pyarrow as arrow

    labels = np.arange(30) % 10
    one = lambda image: [image, *_pngs()[1:]]  # noqa: E731
    big = data_files.png(np.zeros((3000, 3000, 3)))
    flat = lambda **columns: data_files.parquet_table(arrow.table(columns))  # noqa: E731
    jpeg = data_files.png(data_files.pictures(1)[0], "JPEG")
    huge_header = _pngs()[0] or b""
    size = struct.pack(">2I", 1 << 20, 1 << 20)
    chunk = b"IHDR" + size + huge_header[24:29]
    huge_header = huge_header[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + huge_header[33:]
    parquet = data_files.parquet
    return {
        "no image column": (lambda: flat(label=labels), "img and label expected"),
        "no label column": (lambda: flat(img=_pngs()), "img and label expected"),
        "images not in a structure": (
            lambda: flat(img=_pngs(), label=labels),
            "column img is binary",
        ),
        "labels as text": (
            lambda: parquet(_pngs(), [str(label) for label in labels]),
            "column label is string",
        ),
        "labels as fractions": (lambda: parquet(_pngs(), labels / 2), "column label is double"),
        "label too large": (lambda: parquet(_pngs(), labels + 1), "label 10"),
        "label negative": (lambda: parquet(_pngs(), labels - 1), "label -1"),
        "label huge": (lambda: parquet(_pngs(), labels + (1 << 40)), "label 1099511627776"),
        "label missing": (lambda: parquet(_pngs(), [None, *labels[1:]]), "is missing"),
        "image missing": (lambda: parquet(one(None), labels), "is missing"),
        "image empty": (lambda: parquet(one(b""), labels), "row 1 cannot be decoded"),
        "image is noise": (lambda: parquet(one(bytes(500)), labels), "row 1 cannot be decoded"),
        "image cut off": (
            lambda: parquet(one((_pngs()[0] or b"")[:-900]), labels),
            "row 1 cannot be decoded",
        ),
        "jpeg cut off": (lambda: parquet(one(jpeg[:-300]), labels), "row 1 cannot be decoded"),
        "image of another kind": (
            lambda: parquet(one(data_files.png(np.zeros((32, 32, 3)), "GIF")), labels),
            "row 1 cannot be decoded",
        ),
        "image too small": (
            lambda: parquet(one(data_files.png(np.zeros((31, 32, 3)))), labels),
            "32 x 31 pixels",
        ),
        "image too large": (lambda: parquet(one(big), labels), "3000 x 3000 pixels"),
        "image header huge": (lambda: parquet(one(huge_header), labels), "row 1"),
        "no rows": (lambda: parquet([], np.zeros(0, np.int64)), "0 rows"),
        "columns of other lengths": (
            lambda: parquet(one(bytes(40 << 20)), labels, compression="zstd"),
            "cannot be 30 images",
        ),
        "too many rows": (
            lambda: parquet(50_001 * [b"x"], np.zeros(50_001, np.int64)),
            "50,001 rows",
        ),
        "more rows than bytes": (
            lambda: parquet(5000 * [b"x"], np.zeros(5000, np.int64)),
            "cannot be 5,000 images",
        ),
    }


TABLES = _tables() if HAS_PARQUET else {}


@pytest.mark.parametrize("case", TABLES)
def test_parquet(case: str, folder: Path) -> None:
    make, match = TABLES[case]
    data_files.write(folder, {**data_files.cifar10_parquet(), "train.parquet": make()})
    refuse("cifar10", folder, "train.parquet", match, honest=30 * 3072)


@needs_parquet
def test_parquet_with_flipped_bits_takes_no_more_memory(folder: Path) -> None:
    """Also what Arrow takes by itself."""
    import pyarrow as arrow

    contents = data_files.cifar10_parquet()
    data_files.write(folder, contents)
    pool, before = arrow.proxy_memory_pool(arrow.default_memory_pool()), arrow.default_memory_pool()
    arrow.set_memory_pool(pool)
    try:
        for changed in flips(contents["train.parquet"][-800:], 100):
            head = contents["train.parquet"][:-800]
            (folder / "train.parquet").write_bytes(head + changed)
            try:
                read("cifar10", folder)
            except DataError as error:
                check_message(error, folder / "train.parquet")
    finally:
        arrow.set_memory_pool(before)
    assert 0 < (pool.max_memory() or 0) < 2 * 30 * 3072 + SPARE


ROW = b"1.0" + 28 * b",0.5" + b"\n"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "holds 0 rows"),
        (9 * ROW + b"\n\n", "holds 9 rows"),
        (b"\n" * 1000, "holds 0 rows"),
        (b"label,lepton_pT\n" + 10 * ROW, "not a table of numbers"),
        (10 * ROW + ROW[:-5] + b"\n", "not a table of numbers"),
        (10 * ROW + ROW[:-1] + b",0.5\n", "not a table of numbers"),
        (10 * ROW + ROW[:-5] + b",\n", "not a table of numbers"),
        (10 * ROW.replace(b",", b";"), "not a table of numbers"),
        (10 * ROW.replace(b"0.5", b"0x5"), "not a table of numbers"),
        (10 * b"1,2,3\n", "3 columns"),
        (10 * ROW + ROW.replace(b"0.5", b"nan", 1), "row 11 holds"),
        (10 * ROW + ROW.replace(b"0.5", b"-inf", 1), "row 11 holds"),
        (10 * ROW + ROW.replace(b"0.5", b"1e39", 1), "row 11 holds"),
        (10 * ROW + ROW.replace(b"0.5", b"1e999", 1), "row 11 holds"),
        (10 * ROW + b"2" + ROW[3:], "label 2 found in row 11"),
        (10 * ROW + b"-1" + ROW[3:], "label -1 found"),
        (10 * ROW + b"0.5" + ROW[3:], "label 0.5 found"),
        (10 * ROW + b"nan" + ROW[3:], "row 11 holds"),
        (10 * ROW + b"\xff\xfe\n", "cannot be read"),
        (10 * ROW + b"\0" + ROW, "not a table of numbers"),
        (10 * ROW + b"0" * 5000 + ROW, "a line is longer"),
        (10 * ROW + ROW[:-1], "has no end"),
        (101 * ROW, "more than 100 rows"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_higgs(content: bytes, match: str, compressed: bool, folder, monkeypatch) -> None:
    data_files.pretend_higgs_has(monkeypatch, 100, 10)
    name = "higgs_sample.csv.gz" if compressed else "higgs_sample.csv"
    (folder / name).write_bytes(gzip.compress(content) if compressed else content)
    refuse("higgs-sample", folder, name, match)


@pytest.mark.parametrize("rows", [99, 101])
def test_the_official_higgs_with_another_number_of_rows(rows: int, folder, monkeypatch) -> None:
    data_files.pretend_higgs_has(monkeypatch, 100, 10)
    (folder / "HIGGS.csv").write_bytes(rows * ROW)
    refuse("higgs", folder, "HIGGS.csv", "100")


@pytest.mark.parametrize(
    "content",
    [b"\0" * 3, b"0" * 64, b"z" * 64 + b"  input.txt\n", b"0" * 64 + b"\n", b"\xff\xfe", b"x" * 70],
)
def test_damaged_lists_of_checksums(content: bytes, folder: Path, monkeypatch) -> None:
    whole(FORMATS["text"], folder, monkeypatch)
    (folder / "SHA256SUMS").write_bytes(content)
    refuse("tinyshakespeare", folder, "SHA256SUMS")


def test_a_huge_list_of_checksums(folder: Path, monkeypatch) -> None:
    whole(FORMATS["text"], folder, monkeypatch)
    with (folder / "SHA256SUMS").open("wb") as file:
        file.truncate(1 << 34)
    refuse("tinyshakespeare", folder, "SHA256SUMS", "longer than a list")


# Files that would take much memory


def bomb(head: bytes, fill: bytes, size: int) -> bytes:
    """A small compressed file of a large content."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6, mtime=0) as file:
        file.write(head)
        for _ in range(size // (len(fill) << 10)):
            file.write(fill << 10 if isinstance(fill, int) else fill * 1024)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("form", "file", "head", "fill", "match"),
    [
        ("idx.gz", f"{IMAGES}.gz", data_files.idx(np.zeros((60, 28, 28))), bytes(8), "more bytes"),
        ("idx.gz", f"{LABELS}.gz", data_files.idx(np.zeros(20)), bytes(8), "more bytes"),
        ("csv.gz", "higgs_sample.csv.gz", b"", b"1", "a line is longer"),
        ("csv.gz", "higgs_sample.csv.gz", b"", b"\n", "holds 0 rows"),
        ("csv.gz", "higgs_sample.csv.gz", ROW, 300 * b" " + b"\n", "holds 1 rows"),
        ("tar.gz", "cifar-10-binary.tar.gz", b"", bytes(8), "the official file has"),
    ],
)
def test_decompression_bombs(form, file, head, fill, match, folder, monkeypatch) -> None:
    whole(FORMATS[form], folder, monkeypatch)
    (folder / file).write_bytes(bomb(head, fill, 64 << 20))
    refuse(FORMATS[form].name, folder, file, match)


@pytest.mark.parametrize(
    ("form", "file", "match"),
    [
        ("idx", LABELS, "not an IDX file"),
        ("bin", FIRST, "bytes, 30,730 expected"),
        ("text", "input.txt", "the official file has"),
        ("csv", "higgs_sample.csv", "a line is longer"),
        pytest.param("parquet", "train.parquet", "not a sound Parquet file", marks=needs_parquet),
    ],
)
def test_huge_files(form: str, file: str, match: str, folder: Path, monkeypatch) -> None:
    """They take no room on disk: their end was moved, and there is nothing in them."""
    whole(FORMATS[form], folder, monkeypatch)
    with (folder / file).open("wb") as opened:
        opened.truncate(1 << 34)
    refuse(FORMATS[form].name, folder, file, match)


def test_memory_for_honest_content_that_is_wrong_at_its_end(folder: Path, monkeypatch) -> None:
    """A large table whose last row is damaged: the rows before it are in memory once."""
    rows = 30_000
    data_files.pretend_higgs_has(monkeypatch, rows, 10)
    long = b"1.000000000000000000e+00" + 28 * b",5.000000000000000000e-01" + b"\n"
    content = rows * long + b"2" + long[1:]
    (folder / "HIGGS.csv").write_bytes(content)
    monkeypatch.setattr("test_lab_data_damage.SPARE", 1 << 20)
    refuse("higgs", folder, "HIGGS.csv", "label 2", honest=len(content))
