"""Readers of the file formats. Each refuses what it cannot vouch for with a `DataError`.

None needs more memory than twice the uncompressed size of an intact file: content is read piece by
piece, whatever a header promises, and no further than an intact file goes.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from pjax.lab.data.errors import DataError, reason

_PIECE = 1 << 16


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What goes wrong inside is the file's fault."""
    try:
        yield
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, tarfile.TarError) as error:
        raise DataError(f"{path}: cannot be read ({reason(error)}).") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BufferedIOBase | IO[bytes]]:
    """The content of a file, uncompressed if its name ends in `.gz`."""
    with _reading(path), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        yield file


class _Growing:
    """An array that rows are added to. Its spare room is at most a quarter of it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._array = np.empty((0, *shape), dtype)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def extend(self, rows: np.ndarray) -> None:
        end = self._rows + len(rows)
        if end > len(self._array):
            self._resize(max(end, len(self._array) * 5 // 4))
        self._array[self._rows : end] = rows
        self._rows = end

    def finish(self) -> np.ndarray:
        self._resize(self._rows)
        return self._array

    def _resize(self, rows: int) -> None:
        # In place: no other array shares this memory.
        self._array.resize((rows, *self._array.shape[1:]), refcheck=False)


# IDX


def read_idx(path: Path, limit: tuple[int, ...] | None = None) -> UInt8[np.ndarray, "..."]:
    """The array in an IDX file of bytes, gzip-compressed if its name ends in `.gz`.

    **Arguments:**

    - `path`: the file.
    - `limit`: the largest shape that it may have; all axes but the first must have exactly this
      length.

    **Raises:** `DataError` if the file is not one, is cut off, or holds more than its header says.
    No more memory is used than the file honestly holds.
    """
    with _open(path) as file:
        magic = file.read(4)
        if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
            raise DataError(
                f"{path}: not an IDX file of bytes (it starts with {magic.hex() or '-'})."
            )
        header = file.read(4 * magic[3])
        if len(header) < 4 * magic[3]:
            raise DataError(f"{path}: cut off in its header.")
        shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
        if limit is not None:
            _check_shape(path, shape, limit)
        size = int(np.prod(shape, dtype=object))
        # Read piece by piece: the header of a damaged file may promise any number of bytes.
        content = bytearray()
        while len(content) <= size:
            piece = file.read(min(size + 1 - len(content), _PIECE))
            if not piece:
                break
            content += piece
    if len(content) < size:
        raise DataError(f"{path}: cut off, {len(content)} of {size} bytes for shape {shape}.")
    if len(content) > size:
        raise DataError(f"{path}: more bytes than its header's shape {shape} holds.")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _check_shape(path: Path, shape: tuple[int, ...], limit: tuple[int, ...]) -> None:
    kind = "labels" if len(limit) == 1 else "images"
    if len(shape) != len(limit) or shape[1:] != limit[1:]:
        expected = f"({', '.join(('rows', *map(str, limit[1:])))}{',' if len(limit) == 1 else ''})"
        raise DataError(f"{path}: {kind} of shape {shape}, {expected} expected.")
    if shape[0] > limit[0]:
        raise DataError(f"{path}: {kind} of shape {shape}, at most {limit[0]:,} rows expected.")


def idx_md5(array: UInt8[np.ndarray, "..."]) -> str:
    """The MD5 of the uncompressed IDX file that holds an array."""
    md5 = hashlib.md5(bytes([0, 0, 8, array.ndim]), usedforsecurity=False)
    md5.update(np.array(array.shape, ">u4").tobytes())
    md5.update(memoryview(np.ascontiguousarray(array)))  # pyright: ignore[reportArgumentType]
    return md5.hexdigest()


# CIFAR-10

#: Rows in each file of the official binary form.
CIFAR10_BATCH_ROWS = 10_000
#: A label, then 32 x 32 pixels of each of three colours.
_CIFAR10_RECORD = 1 + 3 * 32 * 32


def read_cifar10_batches(paths: tuple[Path, ...]) -> UInt8[np.ndarray, "rows 3073"]:
    """The records of binary batches, one file after the other.

    **Raises:** `DataError` if a file has another size than the official ones.
    """
    wanted = CIFAR10_BATCH_ROWS * _CIFAR10_RECORD
    for path in paths:
        with _reading(path):
            size = path.stat().st_size
        if size != wanted:
            raise DataError(f"{path}: {size:,} bytes, {wanted:,} expected.")
    records = np.empty((len(paths) * CIFAR10_BATCH_ROWS, _CIFAR10_RECORD), np.uint8)
    for path, batch in zip(paths, np.split(records, len(paths)), strict=True):
        with _open(path) as file:
            _fill(path, file, batch)
        _check_labels(path, batch[:, 0])
    return records


def read_cifar10_archive(path: Path, members: tuple[str, ...]) -> UInt8[np.ndarray, "rows 3073"]:
    """The records of the named members of an archive, which is read as a stream, never unpacked.

    **Raises:** `DataError` if a member is missing, or has another size than the official ones.
    """
    wanted = CIFAR10_BATCH_ROWS * _CIFAR10_RECORD
    records = np.empty((len(members) * CIFAR10_BATCH_ROWS, _CIFAR10_RECORD), np.uint8)
    left = dict(zip(members, np.split(records, len(members)), strict=True))
    with _open(path) as content, tarfile.open(fileobj=content, mode="r|") as archive:
        for member in archive:
            batch = left.pop(member.name, None)
            # Nothing in it is larger; what says so would be read through to be passed over.
            if member.size > wanted or (batch is not None and member.size != wanted):
                raise DataError(
                    f"{path}: its member {member.name[:80]} has {member.size:,} bytes, {wanted:,} "
                    "expected."
                )
            if batch is None:
                continue
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                raise DataError(f"{path}: its member {member.name} is no file.")
            _fill(path, file, batch)
            _check_labels(path, batch[:, 0])
            if not left:
                break
    if left:
        raise DataError(f"{path}: has no member {min(left)}.")
    return records


def cifar10_images(records: UInt8[np.ndarray, "rows 3073"]) -> UInt8[np.ndarray, "rows 32 32 3"]:
    """The pixels of records, colours last; a view."""
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _fill(path: Path, file: BufferedIOBase | IO[bytes], batch: np.ndarray) -> None:
    flat, start = batch.reshape(-1), 0
    while start < len(flat):
        piece = file.read(min(len(flat) - start, _PIECE))
        if not piece:
            raise DataError(f"{path}: cut off, {start:,} of {len(flat):,} bytes.")
        flat[start : start + len(piece)] = np.frombuffer(piece, np.uint8)
        start += len(piece)


def _check_labels(path: Path, labels: np.ndarray) -> None:
    if labels.min() < 0 or labels.max() > 9:
        wrong = labels[(labels < 0) | (labels > 9)][0]
        raise DataError(f"{path}: label {wrong} found, 0 to 9 expected.")


#: A page of a honest file takes this many bytes for each row at the most, and a file at the least.
_PARQUET_ROW_MOST, _PARQUET_ROW_LEAST = 1 << 14, 64


def read_parquet_images(
    path: Path, most_rows: int
) -> tuple[UInt8[np.ndarray, "rows 32 32 3"], Int32[np.ndarray, " rows"]]:
    """Images and labels from a Parquet file in the layout of Hugging Face.

    Columns are `img`, a structure with the field `bytes` (a PNG or JPEG of 32 x 32 pixels), and
    `label`, 0 to 9.

    **Raises:** `DataError`; also if pyarrow or pillow is not installed.
    """
    try:
        import pyarrow as arrow  # pyright: ignore[reportMissingImports]
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet files need pyarrow and pillow ({reason(error)}). "
            'Install them in a clone of pjax: pip install ".[parquet]"'
        ) from error

    images, labels = _Growing((32, 32, 3), np.uint8), _Growing((), np.int32)
    try:
        with _reading(path), warnings.catch_warnings(), _parquet_file(path) as file:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            rows = file.metadata.num_rows
            size = path.stat().st_size
            _check_parquet(path, file, size, most_rows)
            for batch in file.iter_batches(
                batch_size=500, columns=["img.bytes", "label"], use_threads=False
            ):
                encoded, numbers = batch.column("img").field("bytes"), batch.column("label")
                if encoded.null_count or numbers.null_count or batch.column("img").null_count:
                    raise DataError(f"{path}: a value after row {len(labels)} is missing.")
                values = numbers.to_numpy(zero_copy_only=False)
                _check_labels(path, values)
                decoded = [
                    _decode(path, Image, value.as_buffer(), len(labels) + number)
                    for number, value in enumerate(encoded, 1)
                ]
                images.extend(np.stack(decoded))
                labels.extend(values.astype(np.int32))
    except (arrow.ArrowException, MemoryError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a sound Parquet file ({reason(error)}).") from error
    if len(labels) != rows:
        raise DataError(f"{path}: {len(labels)} rows, its footer promises {rows}.")
    return images.finish(), labels.finish()


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]

    with (
        path.open("rb") as raw,
        parquet.ParquetFile(
            raw,
            page_checksum_verification=True,
            thrift_string_size_limit=1 << 20,
            thrift_container_size_limit=1 << 16,
        ) as file,
    ):
        yield file


def _check_parquet(path: Path, file: Any, size: int, most_rows: int) -> None:
    import pyarrow as arrow  # pyright: ignore[reportMissingImports]

    metadata, schema = file.metadata, file.schema_arrow
    rows = metadata.num_rows
    names = schema.names
    if "img" not in names or "label" not in names:
        raise DataError(f"{path}: columns {', '.join(names)[:80]}; img and label expected.")
    image, label = schema.field("img").type, schema.field("label").type
    fields = {field.name: field.type for field in image} if arrow.types.is_struct(image) else {}
    content = fields.get("bytes")
    if content is None or not (
        arrow.types.is_binary(content) or arrow.types.is_large_binary(content)
    ):
        raise DataError(f"{path}: column img is {str(image)[:80]}; struct<bytes: binary> expected.")
    if not arrow.types.is_integer(label):
        raise DataError(f"{path}: column label is {str(label)[:80]}; an integer expected.")
    if not 1 <= rows <= most_rows:
        raise DataError(f"{path}: {rows:,} rows, 1 to {most_rows:,} expected.")
    uncompressed = sum(
        metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)
    )
    if size < rows * _PARQUET_ROW_LEAST or not 0 < uncompressed <= rows * _PARQUET_ROW_MOST + size:
        raise DataError(
            f"{path}: {size:,} bytes ({uncompressed:,} uncompressed) cannot be {rows:,} images."
        )


def _decode(path: Path, image_module: Any, content: Any, number: int) -> np.ndarray:
    try:
        with image_module.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.size != (32, 32):
                raise DataError(
                    f"{path}: the image of row {number} has {image.size[0]} x {image.size[1]} "
                    "pixels, 32 x 32 expected."
                )
            return np.asarray(image.convert("RGB"))
    except DataError:
        raise
    except (
        OSError,
        ValueError,
        SyntaxError,
        MemoryError,
        EOFError,
        zlib.error,
        image_module.DecompressionBombError,
        image_module.DecompressionBombWarning,
    ) as error:
        raise DataError(
            f"{path}: the image of row {number} cannot be decoded ({reason(error)})."
        ) from error


# HIGGS

HIGGS_FEATURES = 28
HIGGS_ROWS = 11_000_000
#: Longer lines are no numbers. The official ones have about 730 characters.
_LONGEST_LINE = 4096


def read_higgs(
    path: Path,
) -> tuple[Float32[np.ndarray, "rows 28"], Int32[np.ndarray, " rows"]]:
    """Features and labels of a file in the layout of UCI's `HIGGS.csv`.

    It has no header; each line is a label, 0 or 1, and 28 features. The file is read in pieces of
    some hundred rows.

    **Raises:** `DataError`.
    """
    x, y = _Growing((HIGGS_FEATURES,), np.float32), _Growing((), np.int32)
    for lines in _lines(path):
        table = _parse_rows(path, lines, len(y))
        x.extend(table[:, 1:])
        y.extend(table[:, 0])
        if len(y) > HIGGS_ROWS:
            raise DataError(f"{path}: more than {HIGGS_ROWS:,} rows.")
    return x.finish(), y.finish()


def _lines(path: Path) -> Iterator[list[str]]:
    """The lines of a text, some at a time, without empty ones."""
    rest = b""
    with _open(path) as file:
        while piece := file.read(_PIECE):
            complete, _, rest = (rest + piece).rpartition(b"\n")
            while b"\n\n" in complete:
                complete = complete.replace(b"\n\n", b"\n")
            lines = (complete.decode("ascii") + "\n").replace("\r\n", "\n").split("\n")
            if len(rest) > _LONGEST_LINE or any(len(line) > _LONGEST_LINE for line in lines):
                raise DataError(f"{path}: a line is longer than {_LONGEST_LINE} bytes.")
            if lines := [line for line in lines if line.strip()]:
                yield lines
        if rest.strip():
            text = rest[:40].decode("ascii")
            raise DataError(f"{path}: cut off, its last line ({text}…) has no end.")


def _parse_rows(path: Path, lines: list[str], before: int) -> np.ndarray:
    try:
        table = np.loadtxt(lines, dtype=np.float64, delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        where = "" if before == 0 else f"after row {before:,}: "
        raise DataError(f"{path}: not a table of numbers ({where}{reason(error)}).") from error
    if table.shape[1] != HIGGS_FEATURES + 1:
        raise DataError(
            f"{path}: {table.shape[1]} columns, a label and {HIGGS_FEATURES} features expected."
        )
    finite = (np.abs(table) <= np.finfo(np.float32).max).all(axis=1)
    if not finite.all():
        row = before + int(np.argmin(finite)) + 1
        raise DataError(f"{path}: row {row:,} holds a value that is not finite in float32.")
    known = np.isin(table[:, 0], (0, 1))
    if not known.all():
        row = int(np.argmin(known))
        raise DataError(
            f"{path}: label {table[row, 0]:g} found in row {before + row + 1:,}, 0 or 1 expected."
        )
    return table


# Text


def read_text(path: Path) -> str:
    """An ASCII text.

    **Raises:** `DataError`.
    """
    with _reading(path):
        return path.read_bytes().decode("ascii")
