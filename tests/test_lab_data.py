"""Reading data: the splits, and one clear line for every file that is missing or damaged."""

from __future__ import annotations

import gzip
import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from pjax.lab.data import DATA_DIR_VARIABLE, DataError, batch_rows, load, read_idx


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of four small files in MNIST's form, two compressed and two plain."""
    random = np.random.default_rng(0)
    for part, rows in (("train", 60), ("t10k", 12)):
        images = random.integers(0, 256, (rows, 28, 28))
        labels = np.arange(rows) % 10
        path = tmp_path / f"{part}-images-idx3-ubyte.gz"
        path.write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_digits_splits_are_disjoint_complete_and_seeded() -> None:
    dataset, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [
        1077, 360, 360,
    ]  # fmt: skip
    assert (dataset.num_features, dataset.num_classes) == (64, 10)
    rows = np.concatenate([dataset.train.x, dataset.validation.x, dataset.test.x])
    assert rows.dtype == np.float32
    assert rows.min() == 0
    assert rows.max() == 1
    all_rows = np.concatenate([other.train.x, other.validation.x, other.test.x])
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(all_rows, axis=0))
    np.testing.assert_array_equal(dataset.train.x, again.train.x)
    assert not np.array_equal(dataset.train.x, other.train.x)
    for part in (dataset.train, dataset.validation, dataset.test):
        assert set(part.y) == set(range(10))


def test_batches_cover_an_epoch_and_repeat_with_the_seed() -> None:
    order = list(itertools.islice(batch_rows(10, 3, seed=0), 6))
    first, second = np.concatenate(order[:3]), np.concatenate(order[3:])
    assert len(set(first)) == len(set(second)) == 9
    assert list(first) != list(second)
    again = list(itertools.islice(batch_rows(10, 3, seed=0), 6))
    np.testing.assert_array_equal(order, again)
    assert not np.array_equal(order, list(itertools.islice(batch_rows(10, 3, seed=1), 6)))
    for size in (0, 11):
        with pytest.raises(DataError, match="from 1 to 10"):
            next(batch_rows(10, size, seed=0))


@pytest.mark.parametrize("below", ["", "mnist"])
def test_mnist_from_a_folder_or_its_subfolder(folder: Path, below: str, monkeypatch) -> None:
    place = folder
    if below:
        (folder / below).mkdir()
        for file in list(folder.glob("*ubyte*")):
            file.rename(folder / below / file.name)
    dataset = load("mnist", place)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [50, 10, 12]
    assert dataset.train.x.max() <= 1
    images = read_idx(folder / below / "t10k-images-idx3-ubyte.gz")
    np.testing.assert_allclose(dataset.test.x * 255, images.reshape(12, 784), rtol=1e-6)
    np.testing.assert_array_equal(dataset.test.y, np.arange(12) % 10)
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(place))
    np.testing.assert_array_equal(load("mnist").train.x, dataset.train.x)


def rewrite(path: Path, content: bytes) -> None:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


LABELS, IMAGES = "train-labels-idx1-ubyte", "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (LABELS, lambda path: path.unlink(), "neither"),
        (LABELS, lambda path: rewrite(path, b""), "not an IDX file"),
        (LABELS, lambda path: rewrite(path, b"label\n1\n"), "not an IDX file"),
        (LABELS, lambda path: rewrite(path, b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0"), "not an IDX file"),
        (LABELS, lambda path: rewrite(path, b"\0\0\x08\x03\0\0"), "cut off in its header"),
        (LABELS, lambda path: rewrite(path, path.read_bytes()[:-1]), "cut off, 59 of 60"),
        (LABELS, lambda path: rewrite(path, path.read_bytes() + b"\1"), "more bytes"),
        (LABELS, lambda path: rewrite(path, b"\0\0\x08\x01\xff\xff\xff\xff\x01"), "cut off, 1 of"),
        (
            LABELS,
            lambda path: rewrite(path, b"\0\0\x08\x04" + b"\xff" * 16 + b"\x01"),
            "cut off, 1 of",
        ),
        (LABELS, lambda path: rewrite(path, idx(np.full(60, 10))), "label 10"),
        (LABELS, lambda path: rewrite(path, idx(np.zeros(59))), "59 labels for the 60 images"),
        (LABELS, lambda path: rewrite(path, idx(np.zeros((60, 1)))), r"\(rows,\) expected"),
        (IMAGES, lambda path: path.write_bytes(path.read_bytes()[:-200]), "cannot be read"),
        (IMAGES, lambda path: path.write_bytes(idx(np.zeros((60, 28, 28)))), "cannot be read"),
        (
            IMAGES,
            lambda path: path.write_bytes(
                path.read_bytes()[:99] + bytes(9) + path.read_bytes()[108:]
            ),
            "cannot be read|more bytes|cut off",
        ),
        (IMAGES, lambda path: rewrite(path, idx(np.zeros((60, 27, 28)))), "28, 28"),
        (IMAGES, lambda path: path.unlink() or path.mkdir(), "neither"),
    ],
)
def test_damaged_files_give_one_line_that_names_them(folder, name, damage, message) -> None:
    damage(folder / name)
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def higgs(tmp_path: Path) -> Path:
    """A small file in the layout of the HIGGS set; its last feature is constant."""
    random = np.random.default_rng(0)
    table = random.normal(3, 2, (100, 29))
    table[:, 0] = np.arange(100) % 2
    table[:, 28] = 5
    path = tmp_path / "higgs_sample.csv"
    np.savetxt(path, table, delimiter=",", fmt="%.9g")
    return path


@pytest.mark.parametrize("below", [False, True])
def test_higgs_is_split_and_standardised_with_training_statistics(higgs: Path, below) -> None:
    folder = higgs.parent
    if below:
        (folder / "higgs").mkdir()
        (folder / "higgs" / "higgs_sample.csv.gz").write_bytes(gzip.compress(higgs.read_bytes()))
        higgs.unlink()
    dataset, other = load("higgs", folder), load("higgs", folder, seed=1)
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part) for part in parts] == [70, 15, 15]
    assert (dataset.num_features, dataset.num_classes) == (28, 2)
    np.testing.assert_allclose(dataset.train.x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train.x.std(0)[:27], 1, atol=1e-5)
    assert all(np.all(part.x[:, 27] == 0) for part in parts)
    assert abs(dataset.test.x.mean(0)).max() > 0.01
    assert np.concatenate([part.y for part in parts]).sum() == 50
    np.testing.assert_array_equal(dataset.train.x, load("higgs", folder).train.x)
    assert not np.array_equal(dataset.train.x, other.train.x)


ROW = b"1.0" + 28 * b",0.5" + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "neither higgs_sample.csv.gz nor higgs_sample.csv"),
        (b"", "holds 0 rows"),
        (9 * ROW + b"\n\n", "holds 9 rows"),
        (b"label,lepton_pT\n" + 10 * ROW, "not a table of numbers"),
        (10 * ROW + ROW[:-5] + b"\n", "not a table of numbers"),
        (10 * b"1,2,3\n", "3 columns"),
        (10 * ROW + ROW.replace(b"0.5", b"nan", 1), "row 11 holds"),
        (10 * ROW + b"2" + ROW[3:], "label 2 found"),
        (10 * ROW + b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_higgs_files_give_one_line_that_names_them(tmp_path, content, message) -> None:
    if content is not None:
        (tmp_path / "higgs_sample.csv").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load("higgs", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_higgs_file_that_is_cut_off_cannot_be_read(higgs: Path) -> None:
    cut = gzip.compress(higgs.read_bytes())[:-100]
    higgs.with_name("higgs_sample.csv.gz").write_bytes(cut)
    with pytest.raises(DataError, match="cannot be read"):
        load("higgs", higgs.parent)


def test_missing_folder_variable_and_unknown_name(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
    with pytest.raises(DataError, match="--data-dir"):
        load("mnist")
    with pytest.raises(DataError, match="no such folder"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="there are: digits, mnist, higgs"):
        load("emnist")


@pytest.mark.skipif(
    not (Path(os.environ.get(DATA_DIR_VARIABLE) or "nowhere") / "mnist").is_dir(),
    reason=f"{DATA_DIR_VARIABLE} names no folder with MNIST",
)
def test_the_real_mnist() -> None:
    dataset = load("mnist")
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [
        50_000, 10_000, 10_000,
    ]  # fmt: skip
    # The mean pixel of the original training images, .1307, and the first test label, 7.
    pixels = dataset.train.x.sum() + dataset.validation.x.sum(dtype=np.float64)
    np.testing.assert_allclose(pixels / (60_000 * 784), 0.1307, atol=1e-4)
    assert dataset.test.y[0] == 7


@pytest.mark.skipif(
    not (Path(os.environ.get(DATA_DIR_VARIABLE) or "nowhere") / "higgs").is_dir(),
    reason=f"{DATA_DIR_VARIABLE} names no folder with HIGGS",
)
def test_the_real_higgs_sample() -> None:
    dataset = load("higgs")
    parts = (dataset.train, dataset.validation, dataset.test)
    assert [len(part) for part in parts] == [12_933, 2_772, 2_772]
    assert sum(int(part.y.sum()) for part in parts) == 9_807
