"""Data sets as arrays, split into train, validation and test rows.

Nothing is downloaded, generated or unpickled. Files come from `data_dir`, or from the folder that
the environment variable `PJAX_DATA_DIR` names. A file that is missing or damaged raises a
`DataError` whose message is one line that names the file.
"""

from __future__ import annotations

import dataclasses
import gzip
import os
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, UInt8

DATA_DIR_VARIABLE = "PJAX_DATA_DIR"


class DataError(ValueError):
    """A data set cannot be used; the message is one line that names the file or the folder."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows and their class numbers."""

    x: Float32[np.ndarray, "rows features"]
    y: Int32[np.ndarray, " rows"]

    def __len__(self) -> int:
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification task; pixels are scaled to [0, 1], other features standardised."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int

    @property
    def num_features(self) -> int:
        return self.train.x.shape[1]


def load(name: str, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Dataset:
    """The data set of this name.

    **Arguments:**

    - `name`: `"digits"` (scikit-learn's 1,797 images of 8 x 8 pixels, no files needed),
      `"mnist"` (four IDX files, gzip-compressed or not, in the folder or in its subfolder `mnist`)
      or `"higgs"` (a sample of the HIGGS set, `higgs_sample.csv`, gzip-compressed or not, in the
      folder or in its subfolder `higgs`).
    - `data_dir`: the folder; by default the environment variable `PJAX_DATA_DIR`.
    - `seed`: of the permutation that makes the splits.

    **Raises:** `DataError`.
    """
    if name == "digits":
        return _digits(seed)
    if name == "mnist":
        return _mnist(_find_folder(data_dir, "mnist"), seed)
    if name == "higgs":
        return _higgs(_find_folder(data_dir, "higgs"), seed)
    raise DataError(f"no data set is called {name!r}; there are: digits, mnist, higgs.")


def batch_rows(rows: int, batch_size: int, seed: int) -> Iterator[Int32[np.ndarray, " batch"]]:
    """Endless batches of row numbers, in a new random order every epoch.

    Equal arguments give equal batches. Every batch has `batch_size` rows; what is left over at the
    end of an epoch sits it out.
    """
    if not 1 <= batch_size <= rows:
        raise DataError(
            f"the batch size must be from 1 to {rows} (training rows), got {batch_size}."
        )
    random = np.random.default_rng([seed, 1])
    while True:
        order = random.permutation(rows).astype(np.int32)
        for start in range(0, rows - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _digits(seed: int) -> Dataset:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rows = Split((x / 16).astype(np.float32), y.astype(np.int32))
    order = np.random.default_rng(seed).permutation(len(rows))
    test, validation, train = np.split(order, [360, 720])
    return Dataset("digits", _take(rows, train), _take(rows, validation), _take(rows, test), 10)


def _mnist(folder: Path, seed: int) -> Dataset:
    train, test = _mnist_split(folder, "train"), _mnist_split(folder, "t10k")
    if len(train) < 2:
        raise DataError(f"{folder}: the training files hold {len(train)} rows, at least 2 needed.")
    order = np.random.default_rng(seed).permutation(len(train))
    validation, training = np.split(order, [len(order) // 6])  # 10,000 of the 60,000
    if not len(validation):
        validation, training = training[:1], training[1:]
    return Dataset("mnist", _take(train, training), _take(train, validation), test, 10)


def _mnist_split(folder: Path, part: str) -> Split:
    images_path = _find_file(folder, f"{part}-images-idx3-ubyte")
    labels_path = _find_file(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path}: images of shape {images.shape}, (rows, 28, 28) expected.")
    if labels.ndim != 1:
        raise DataError(f"{labels_path}: labels of shape {labels.shape}, (rows,) expected.")
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path}."
        )
    if not len(labels):
        raise DataError(f"{labels_path}: holds no rows.")
    if labels.max() > 9:
        raise DataError(f"{labels_path}: label {labels.max()} found, 0 to 9 expected.")
    x = images.reshape(len(images), -1).astype(np.float32)
    x /= 255
    return Split(x, labels.astype(np.int32))


_HIGGS_FEATURES = 28
_HIGGS_LEAST_ROWS = 10


def _higgs(folder: Path, seed: int) -> Dataset:
    rows = _read_higgs(_find_file(folder, "higgs_sample.csv"))
    order = np.random.default_rng(seed).permutation(len(rows))
    part = round(0.15 * len(rows))
    test, validation, train = np.split(order, [part, 2 * part])
    # In float64: the statistics of the training rows, the same for all three parts.
    mean = rows.x[train].mean(axis=0, dtype=np.float64)
    deviation = rows.x[train].std(axis=0, dtype=np.float64)
    x = (rows.x - mean) / np.where(deviation > 0, deviation, 1)
    rows = Split(x.astype(np.float32), rows.y)
    return Dataset("higgs", _take(rows, train), _take(rows, validation), _take(rows, test), 2)


def _read_higgs(path: Path) -> Split:
    """The rows of a file in the layout of UCI's `HIGGS.csv`: no header, the label, 28 features."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
            lines = [line for line in file if line.strip()]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}).") from error
    if len(lines) < _HIGGS_LEAST_ROWS:
        raise DataError(f"{path}: holds {len(lines)} rows, at least {_HIGGS_LEAST_ROWS} needed.")
    try:
        table = np.loadtxt(lines, dtype=np.float32, delimiter=",", comments=None, ndmin=2)
    except ValueError as error:
        raise DataError(
            f"{path}: not a table of numbers ({str(error).splitlines()[0]})."
        ) from error
    if table.shape[1] != _HIGGS_FEATURES + 1:
        raise DataError(
            f"{path}: {table.shape[1]} columns, a label and {_HIGGS_FEATURES} features expected."
        )
    finite = np.isfinite(table).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{path}: row {int(np.argmin(finite)) + 1} holds a value that is not finite."
        )
    known = np.isin(table[:, 0], (0, 1))
    if not known.all():
        raise DataError(f"{path}: label {table[np.argmin(known), 0]:g} found, 0 or 1 expected.")
    return Split(np.ascontiguousarray(table[:, 1:]), table[:, 0].astype(np.int32))


def _take(rows: Split, indices: np.ndarray) -> Split:
    return Split(rows.x[indices], rows.y[indices])


def _find_folder(data_dir: str | os.PathLike[str] | None, name: str) -> Path:
    place = data_dir if data_dir is not None else os.environ.get(DATA_DIR_VARIABLE)
    if not place:
        raise DataError(
            f"{name} needs files: pass --data-dir DIR or set {DATA_DIR_VARIABLE}=DIR "
            f"(files in DIR or in DIR/{name})."
        )
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder.")
    return folder / name if (folder / name).is_dir() else folder


def _find_file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"{folder}: neither {name}.gz nor {name} is there.")


def read_idx(path: Path) -> UInt8[np.ndarray, "..."]:
    """The array in an IDX file of bytes, gzip-compressed if its name ends in `.gz`.

    **Raises:** `DataError` if the file is not one, is cut off, or holds more than its header says.
    No more memory is used than the file honestly holds.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _parse_idx(path, file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({str(error).splitlines()[0]}).") from error


def _parse_idx(path: Path, file: BufferedIOBase) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != b"\0\0\x08" or not 1 <= magic[3] <= 4:
        raise DataError(f"{path}: not an IDX file of bytes (it starts with {magic.hex() or '-'}).")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise DataError(f"{path}: cut off in its header.")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    size = int(np.prod(shape, dtype=object))
    # Read piece by piece: the header of a damaged file may promise any number of bytes.
    content = bytearray()
    while len(content) <= size:
        piece = file.read(min(size + 1 - len(content), 1 << 20))
        if not piece:
            break
        content += piece
    if len(content) < size:
        raise DataError(f"{path}: cut off, {len(content)} of {size} bytes for shape {shape}.")
    if len(content) > size:
        raise DataError(f"{path}: more bytes than its header's shape {shape} holds.")
    return np.frombuffer(content, np.uint8).reshape(shape)
