"""Small data sets in the forms of the official ones, and the registry adapted to them."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pjax.lab.data import download, files, formats, sets, sources
from pjax.lab.data.sources import Source

TRAIN_ROWS, TEST_ROWS = 60, 20
#: Rows in each of CIFAR-10's six batches.
BATCH_ROWS = 10


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def source(name: str, content: bytes, *urls: str) -> Source:
    return Source(name, len(content), sha256(content), urls)


def write(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def sums(contents: Mapping[str, bytes]) -> bytes:
    """The file `SHA256SUMS` for these files."""
    return "".join(f"{sha256(content)}  {name}\n" for name, content in contents.items()).encode()


def idx(array: Any) -> bytes:
    array = np.asarray(array)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def idx_arrays() -> dict[str, np.ndarray]:
    """Images and labels by the names of MNIST's files, without `.gz`."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, rows in (("train", TRAIN_ROWS), ("t10k", TEST_ROWS)):
        arrays[f"{part}-images-idx3-ubyte"] = random.integers(0, 256, (rows, 28, 28))
        arrays[f"{part}-labels-idx1-ubyte"] = random.permutation(rows) % 10
    return arrays


def mnist(compressed: bool = True) -> dict[str, bytes]:
    contents = {name: idx(array) for name, array in idx_arrays().items()}
    if not compressed:
        return contents
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in contents.items()}


def pretend_mnist_is_official(patch: pytest.MonkeyPatch, name: str = "mnist") -> None:
    """The small files are the published ones, by size and by checksum."""
    patch.setattr(sets, "_IDX_ROWS", {"train": TRAIN_ROWS, "t10k": TEST_ROWS})
    if name == "mnist":
        md5 = {
            file.rsplit("-", 2)[0]: hashlib.md5(idx(array)).hexdigest()
            for file, array in idx_arrays().items()
        }
        patch.setattr(sets, "_MNIST_MD5", md5)
    publish(patch, name, mnist())


def publish(
    patch: pytest.MonkeyPatch, name: str, contents: Mapping[str, bytes], *mirrors: str
) -> tuple[Source, ...]:
    """Makes files the official ones of a data set, to be had from mirrors."""
    official = tuple(
        source(file, content, *(f"{mirror}/{file}" for mirror in mirrors))
        for file, content in contents.items()
    )
    changed = dataclasses.replace(sources.FILES[name], sources=official)
    patch.setitem(sources.FILES, name, changed)
    return official


def cifar10_records(labels: np.ndarray | None = None) -> list[bytes]:
    """The six batches, as bytes."""
    random = np.random.default_rng(0)
    records = random.integers(0, 256, (6, BATCH_ROWS, 3073)).astype(np.uint8)
    records[..., 0] = np.arange(BATCH_ROWS) % 10 if labels is None else labels
    return [batch.tobytes() for batch in records]


def cifar10_batches() -> dict[str, bytes]:
    return {
        f"cifar-10-batches-bin/{name}": content
        for name, content in zip(sources.CIFAR10_BATCHES, cifar10_records(), strict=True)
    }


def tar(members: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """A compressed archive; a member may be a ready header."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return gzip.compress(packed.getvalue(), mtime=0)


def cifar10_archive() -> dict[str, bytes]:
    extra = {"cifar-10-batches-bin/batches.meta.txt": b"airplane\n"}
    return {"cifar-10-binary.tar.gz": tar({**extra, **cifar10_batches()})}


def pretend_cifar10_is_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(formats, "CIFAR10_BATCH_ROWS", BATCH_ROWS)


def pretend_archive_is_official(patch: pytest.MonkeyPatch, content: bytes) -> None:
    patch.setattr(sets, "CIFAR10_ARCHIVE", source("cifar-10-binary.tar.gz", content))


def png(pixels: np.ndarray, form: str = "PNG") -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(encoded, form)
    return encoded.getvalue()


def parquet(images: list[bytes | None], labels: Any, **options: Any) -> bytes:
    """A table in the layout of Hugging Face."""
    import pyarrow as arrow

    rows = [None if image is None else {"bytes": image, "path": "x.png"} for image in images]
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    table = arrow.table({"img": arrow.array(rows, kind), "label": arrow.array(labels)})
    return parquet_table(table, **options)


def parquet_table(table: Any, **options: Any) -> bytes:
    from pyarrow import parquet as module

    packed = io.BytesIO()
    module.write_table(table, packed, **options)
    return packed.getvalue()


def pictures(rows: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return list(random.integers(0, 256, (rows, 32, 32, 3)))


def cifar10_parquet(**options: Any) -> dict[str, bytes]:
    return {
        f"{part}.parquet": parquet(
            [png(picture) for picture in pictures(rows, seed)],
            np.arange(rows) % 10,
            **options,
        )
        for seed, (part, rows) in enumerate((("train", 30), ("test", 10)))
    }


def higgs_table(rows: int = 100) -> np.ndarray:
    """A label, 27 features that vary and one that does not."""
    table = np.random.default_rng(0).normal(3, 2, (rows, 29))
    table[:, 0] = np.arange(rows) % 2
    table[:, 28] = 5
    return table


def csv(table: np.ndarray) -> bytes:
    packed = io.BytesIO()
    np.savetxt(packed, table, delimiter=",", fmt="%.9g")
    return packed.getvalue()


def pretend_higgs_has(patch: pytest.MonkeyPatch, rows: int, held_out: int) -> None:
    patch.setattr(formats, "HIGGS_ROWS", rows)
    patch.setattr(sets, "_HIGGS_HELD_OUT", held_out)


def text() -> bytes:
    return 40 * b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n"


def pretend_text_is_official(patch: pytest.MonkeyPatch, content: bytes) -> None:
    patch.setattr(sets, "SHAKESPEARE", source("input.txt", content))


def leave_only(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """The user names no folder and no mirror, and this is the cache."""
    for variable in (files.DATA_DIR_VARIABLE, download.MIRROR_VARIABLE):
        patch.delenv(variable, raising=False)
    patch.setenv(files.CACHE_DIR_VARIABLE, str(cache))
