"""The data sets themselves: files in, splits out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Int32, UInt8

from pjax.lab.data import formats
from pjax.lab.data.download import fetch
from pjax.lab.data.errors import DataError
from pjax.lab.data.files import Found, advice, files_of, find, missing, places, verify
from pjax.lab.data.sources import CIFAR10_ARCHIVE, CIFAR10_BATCHES, FILES, SHAKESPEARE

#: The names that `load` takes, as a type for command lines.
DatasetName = Literal["digits", "mnist", "fashion-mnist", "cifar10", "higgs", "higgs-sample"]


@dataclasses.dataclass(frozen=True)
class Split:
    """Rows and their class numbers; of a text, the class of each position of a row."""

    x: Float32[np.ndarray, "rows features"]
    y: Int32[np.ndarray, "rows *positions"]

    def __len__(self) -> int:
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A classification task; pixels are scaled to [0, 1], other features standardised.

    Rows of a text are the numbers of its characters.

    **Arguments:**

    - `name`: of the data set, `"higgs-sample"` where a sample stands in for `"higgs"`.
    - `train`, `validation`, `test`: its rows.
    - `num_classes`: labels are 0 to `num_classes - 1`.
    - `shape`: that the features of a row have: `(height, width, channels)` for images; by default
      `(features,)`.
    - `files`: what was read.
    - `moments`: what `standardised` subtracted and divided by, for each channel.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    shape: tuple[int, ...] = ()
    files: tuple[Path, ...] = ()
    moments: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self) -> None:
        if not self.shape:
            object.__setattr__(self, "shape", (self.num_features,))

    @property
    def num_features(self) -> int:
        return self.train.x.shape[1]

    def standardised(self) -> Dataset:
        """The same rows, where each channel (the last axis of `shape`) has mean 0 and deviation 1.

        Both are taken over the training rows. A channel that is constant becomes 0.
        """
        channels = self.shape[-1]
        mean, deviation = _moments(self.train.x.reshape(-1, channels))

        def split(part: Split) -> Split:
            x = part.x.copy()
            standardise(x.reshape(-1, channels), mean, deviation)
            return Split(x, part.y)

        parts = (split(part) for part in (self.train, self.validation, self.test))
        train, validation, test = parts
        moments = mean, deviation
        return dataclasses.replace(
            self, train=train, validation=validation, test=test, moments=moments
        )


@dataclasses.dataclass(frozen=True)
class Text:
    """A text as numbers of characters, cut into three parts, one after the other.

    **Arguments:**

    - `name`: of the data set.
    - `vocabulary`: the characters by their number, sorted.
    - `train`, `validation`, `test`: tokens, 0 to `len(vocabulary) - 1`.
    - `files`: what was read.
    """

    name: str
    vocabulary: str
    train: Int32[np.ndarray, " train_tokens"]
    validation: Int32[np.ndarray, " validation_tokens"]
    test: Int32[np.ndarray, " test_tokens"]
    files: tuple[Path, ...] = ()

    def decode(self, tokens: Sequence[int] | Int32[np.ndarray, " tokens"]) -> str:
        """The characters of tokens."""
        return "".join(self.vocabulary[int(token)] for token in tokens)

    def encode(self, text: str) -> Int32[np.ndarray, " tokens"]:
        """The tokens of characters.

        **Raises:** `DataError` for a character that is not in the vocabulary.
        """
        numbers = {character: number for number, character in enumerate(self.vocabulary)}
        unknown = next((character for character in text if character not in numbers), None)
        if unknown is not None:
            raise DataError(f"{self.name}: the character {unknown!r} is not in the vocabulary.")
        return np.array([numbers[character] for character in text], np.int32)

    def windows(
        self, part: Literal["train", "validation", "test"], length: int, stride: int = 1
    ) -> Int32[np.ndarray, "windows length"]:
        """Every run of `length` tokens that starts at a multiple of `stride`; a view, read-only.

        With `length = n + 1`, `windows[:, :-1]` are inputs of `n` tokens and `windows[:, 1:]` the
        tokens that follow each of them.
        """
        tokens = getattr(self, part)
        if not (1 <= length <= len(tokens) and stride >= 1):
            raise DataError(
                f"{self.name}: windows of {length} tokens with stride {stride} cannot be taken "
                f"from {len(tokens)} {part} tokens."
            )
        return np.lib.stride_tricks.sliding_window_view(tokens, length)[::stride]

    def dataset(self, length: int) -> Dataset:
        """Windows side by side: a row has `length` tokens, its classes are those that follow."""

        def split(part: Literal["train", "validation", "test"]) -> Split:
            windows = self.windows(part, length + 1, length)
            return Split(windows[:, :-1].astype(np.float32), windows[:, 1:].copy())

        parts = split("train"), split("validation"), split("test")
        return Dataset(self.name, *parts, num_classes=len(self.vocabulary), files=self.files)


def load(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    download: bool = True,
) -> Dataset:
    """The data set of this name.

    **Arguments:**

    - `name`: one of
        - `"digits"`: scikit-learn's 1,797 images of 8 x 8 pixels; no files needed;
        - `"mnist"`, `"fashion-mnist"`: four IDX files, gzip-compressed or not;
        - `"cifar10"`: the official archive of the binary form, its six batches, or two Parquet
          files in the layout of Hugging Face;
        - `"higgs"`: UCI's `HIGGS.csv`, gzip-compressed or not, or else the sample;
        - `"higgs-sample"`: rows in the same layout, `higgs_sample.csv`, gzip-compressed or not.
    - `data_dir`: the folder with the files, or with a subfolder of the data set's name (`higgs` for
      the sample); by default the environment variable `PJAX_DATA_DIR`. Then the cache is searched.
    - `seed`: of the permutation that makes the splits. UCI's HIGGS is not permuted: its last
      500,000 rows are the test rows, the 500,000 before them validate.
    - `download`: whether files that are nowhere are downloaded into the cache; HIGGS, 2.8 GB, never
      is (see `fetch`).

    **Raises:** `DataError`.
    """
    files = files_of(name)
    if name not in _LOADERS:
        raise DataError(f"{name} is a text: `load_text` reads it.")
    if not files.layouts:
        return _digits(seed)
    return _LOADERS[name](_obtain(name, data_dir, download), seed)


def load_text(
    name: str = "tinyshakespeare",
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> Text:
    """The text of this name; its first 90 % train, the next 5 % validate, the last 5 % test.

    **Arguments:**

    - `name`: `"tinyshakespeare"`, the file `input.txt`.
    - `data_dir`, `download`: as for `load`.

    **Raises:** `DataError`.
    """
    files_of(name)
    if name in _LOADERS:
        raise DataError(f"{name} is no text: `load` reads it.")
    found = _obtain(name, data_dir, download)
    (path,) = found.paths
    verify(path, name, SHAKESPEARE, strict=True)
    codes = np.frombuffer(formats.read_text(path).encode("ascii"), np.uint8)
    known, tokens = np.unique(codes, return_inverse=True)
    parts = np.split(tokens.astype(np.int32), [len(codes) * 9 // 10, len(codes) * 19 // 20])
    return Text(name, bytes(known).decode("ascii"), *parts, files=found.paths)


def _obtain(name: str, data_dir: str | os.PathLike[str] | None, download: bool) -> Found:
    found = find(name, data_dir)
    files = FILES[name]
    if found is None and download and files.automatic and files.sources:
        try:
            fetch(name)
        except DataError as error:
            raise DataError(f"{error}\nNot there either: {places(name, data_dir)}.") from error
        found = find(name, data_dir)
    if found is None:
        more = f" Or: pjax data fetch {name}." if files.sources else ""
        raise DataError(missing(name, data_dir) + more)
    return found


def _digits(seed: int) -> Dataset:
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    rows = Split((x / 16).astype(np.float32), y.astype(np.int32))
    order = np.random.default_rng(seed).permutation(len(rows))
    test, validation, train = np.split(order, [360, 720])
    parts = (_take(rows, train), _take(rows, validation), _take(rows, test))
    return Dataset("digits", *parts, num_classes=10, shape=(8, 8, 1))


# MNIST and Fashion-MNIST

_IDX_ROWS = {"train": 60_000, "t10k": 10_000}
#: MD5 of MNIST's files, uncompressed, as first published.
_MNIST_MD5 = {
    "train-images": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels": "a25bea736e30d166cdddb491f175f624",
    "t10k-images": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels": "27ae3e4e09519cfbb04c329615203637",
}


def _idx_set(found: Found, seed: int, name: str) -> Dataset:
    sources = FILES[name].sources
    for path, source in zip(found.paths, sources, strict=True):
        verify(path, name, source if path.name == source.name else None)
    train = _idx_part(found.paths[:2], "train", name)
    test = _idx_part(found.paths[2:], "t10k", name)
    if len(train[1]) < 2:
        raise DataError(
            f"{found.paths[1]}: the training files hold {len(train[1])} rows, at least 2 needed."
        )
    # A sixth: 10,000 of the 60,000.
    return _image_set(name, train, test, max(1, len(train[1]) // 6), seed, found)


def _idx_part(
    paths: tuple[Path, ...], part: Literal["train", "t10k"], name: str
) -> tuple[UInt8[np.ndarray, "rows 28 28 1"], Int32[np.ndarray, " rows"]]:
    images_path, labels_path = paths
    most = _IDX_ROWS[part]
    images = formats.read_idx(images_path, (most, 28, 28))
    labels = formats.read_idx(labels_path, (most,))
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: {len(labels)} labels for the {len(images)} images of {images_path}."
        )
    if not len(labels):
        raise DataError(f"{labels_path}: holds no rows.")
    if labels.max() > 9:
        raise DataError(f"{labels_path}: label {labels.max()} found, 0 to 9 expected.")
    if len(labels) == most:
        _check_content(images_path, images, f"{part}-images", name)
        _check_content(labels_path, labels, f"{part}-labels", name)
        if name == "fashion-mnist":
            _check_balance(labels_path, labels)
    return images[..., None], labels.astype(np.int32)


def _check_content(path: Path, array: UInt8[np.ndarray, "..."], which: str, name: str) -> None:
    is_mnist = formats.idx_md5(array) == _MNIST_MD5[which]
    if name == "mnist" and not is_mnist:
        raise DataError(
            f"{path}: its content is not that of the official file: it is damaged, or another set "
            f"in the same form. {advice(name)}"
        )
    if name != "mnist" and is_mnist:
        raise DataError(f"{path}: this is MNIST, not {name}.")


def _check_balance(path: Path, labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=10)
    if (counts != len(labels) // 10).any():
        wrong = int(np.argmax(counts != len(labels) // 10))
        raise DataError(
            f"{path}: {counts[wrong]:,} rows of class {wrong}, {len(labels) // 10:,} expected as "
            "of each class: it is damaged or another file."
        )


# CIFAR-10


def _cifar10(found: Found, seed: int) -> Dataset:
    archive, parquet = found.layout == 0, found.layout == 2
    for path in found.paths:
        verify(path, "cifar10", CIFAR10_ARCHIVE if archive else None, strict=archive)
    if parquet:
        limits = (50_000, 10_000)
        train, test = (
            formats.read_parquet_images(path, most)
            for path, most in zip(found.paths, limits, strict=True)
        )
        whole = tuple(len(labels) for _, labels in (train, test)) == limits
    else:
        if archive:
            members = tuple(f"cifar-10-batches-bin/{name}" for name in CIFAR10_BATCHES)
            records = formats.read_cifar10_archive(found.paths[0], members)
        else:
            records = formats.read_cifar10_batches(found.paths)
        images, labels = formats.cifar10_images(records), records[:, 0].astype(np.int32)
        cut = len(labels) * 5 // 6
        train, test = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
        whole = True
    if whole:
        _check_balance(found.paths[0], train[1])
        _check_balance(found.paths[-1], test[1])
    return _image_set("cifar10", train, test, max(1, len(train[1]) // 10), seed, found)


def _image_set(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    validation_rows: int,
    seed: int,
    found: Found,
) -> Dataset:
    order = np.random.default_rng(seed).permutation(len(train[1]))
    validation, training = np.split(order, [validation_rows])
    parts = (
        _pixels(train[0][training], train[1][training]),
        _pixels(train[0][validation], train[1][validation]),
        _pixels(*test),
    )
    return Dataset(name, *parts, num_classes=10, shape=train[0].shape[1:], files=found.paths)


def _pixels(images: UInt8[np.ndarray, "rows height width channels"], labels: np.ndarray) -> Split:
    x = images.reshape(len(images), -1).astype(np.float32)
    x /= 255
    return Split(x, labels)


# HIGGS

_HIGGS_LEAST_ROWS = 10
_HIGGS_HELD_OUT = 500_000


def _higgs(found: Found, seed: int) -> Dataset:
    (path,) = found.paths
    official = path.name.startswith("HIGGS")
    verify(path, "higgs", FILES["higgs"].sources[0] if path.name == "HIGGS.csv.gz" else None)
    x, y = formats.read_higgs(path)
    if official and len(y) != formats.HIGGS_ROWS:
        raise DataError(f"{path}: holds {len(y):,} rows, {formats.HIGGS_ROWS:,} expected.")
    if len(y) < _HIGGS_LEAST_ROWS:
        raise DataError(f"{path}: holds {len(y)} rows, at least {_HIGGS_LEAST_ROWS} needed.")
    if official:
        # Views: no second copy of more than a gigabyte.
        cuts = [len(y) - 2 * _HIGGS_HELD_OUT, len(y) - _HIGGS_HELD_OUT]
        pairs = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
        train, validation, test = (Split(*pair) for pair in pairs)
    else:
        order = np.random.default_rng(seed).permutation(len(y))
        part = round(0.15 * len(y))
        rows = Split(x, y)
        test, validation, train = (
            _take(rows, chosen) for chosen in np.split(order, [part, 2 * part])
        )
    mean, deviation = _moments(train.x)
    for split in (train, validation, test):
        standardise(split.x, mean, deviation)
    name = "higgs" if official else "higgs-sample"
    return Dataset(name, train, validation, test, num_classes=2, files=found.paths)


_LOADERS: dict[str, Callable[[Found, int], Dataset]] = {
    "digits": lambda found, seed: _digits(seed),
    "mnist": lambda found, seed: _idx_set(found, seed, "mnist"),
    "fashion-mnist": lambda found, seed: _idx_set(found, seed, "fashion-mnist"),
    "cifar10": _cifar10,
    "higgs": _higgs,
    "higgs-sample": _higgs,
}
#: The names that `load` takes.
NAMES: tuple[DatasetName, ...] = get_args(DatasetName)


def _take(rows: Split, indices: np.ndarray) -> Split:
    return Split(rows.x[indices], rows.y[indices])


_CHUNK = 1 << 16


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column in float64, without a copy of `x` in float64."""
    chunks = [x[at : at + _CHUNK] for at in range(0, len(x), _CHUNK)]
    mean, variance = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for chunk in chunks:
        mean += chunk.sum(axis=0, dtype=np.float64) / len(x)
    for chunk in chunks:
        variance += np.square(chunk - mean).sum(axis=0) / len(x)
    return mean, np.sqrt(variance)


def standardise(x: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> None:
    """`x ← (x − mean) / deviation` in place, computed in float64; constant columns become 0."""
    scale = np.where(deviation > 0, deviation, 1)
    for at in range(0, len(x), _CHUNK):
        x[at : at + _CHUNK] = (x[at : at + _CHUNK] - mean) / scale
