"""Data sets: where their files are found, how they are split; the real ones if they are here."""

from __future__ import annotations

import gzip
import itertools
import os
import re
from pathlib import Path

import data_files
import numpy as np
import pytest

from pjax.lab import cli
from pjax.lab.data import (
    DATA_DIR_VARIABLE,
    NAMES,
    DataError,
    Dataset,
    batch_rows,
    find,
    load,
    load_text,
    read_idx,
    sets,
)

REAL = Path(os.environ.get(DATA_DIR_VARIABLE) or "nowhere")


def real(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        not (REAL / name).is_dir(), reason=f"{DATA_DIR_VARIABLE} names no folder with {name}"
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data_files.leave_only(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def parts(dataset: Dataset) -> tuple[sets.Split, sets.Split, sets.Split]:
    return dataset.train, dataset.validation, dataset.test


def lengths(dataset: Dataset) -> list[int]:
    return [len(part) for part in parts(dataset)]


def test_digits_splits_are_disjoint_complete_and_seeded() -> None:
    dataset, again, other = load("digits", seed=1), load("digits", seed=1), load("digits", seed=2)
    assert lengths(dataset) == [1077, 360, 360]
    assert (dataset.num_features, dataset.num_classes, dataset.shape) == (64, 10, (8, 8, 1))
    rows = np.concatenate([part.x for part in parts(dataset)])
    assert rows.dtype == np.float32
    assert rows.min() == 0
    assert rows.max() == 1
    all_rows = np.concatenate([part.x for part in parts(other)])
    np.testing.assert_array_equal(np.sort(rows, axis=0), np.sort(all_rows, axis=0))
    np.testing.assert_array_equal(dataset.train.x, again.train.x)
    assert not np.array_equal(dataset.train.x, other.train.x)
    for part in parts(dataset):
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


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("compressed", [True, False])
def test_idx_files_make_images(folder: Path, name: str, compressed: bool) -> None:
    data_files.write(folder, data_files.mnist(compressed))
    dataset = load(name, folder)
    assert lengths(dataset) == [50, 10, 20]
    assert dataset.shape == (28, 28, 1)
    assert dataset.name == name
    arrays = data_files.idx_arrays()
    images, labels = arrays["t10k-images-idx3-ubyte"], arrays["t10k-labels-idx1-ubyte"]
    np.testing.assert_allclose(dataset.test.x * 255, images.reshape(20, 784), rtol=1e-6)
    np.testing.assert_array_equal(dataset.test.y, labels)
    np.testing.assert_array_equal(read_idx(dataset.files[2]), images)
    # Every training row is in one of the two parts, with its label.
    rows = {bytes(row): label for part in parts(dataset)[:2] for row, label in zip(
        np.rint(part.x * 255).astype(np.uint8), part.y, strict=True)}  # fmt: skip
    images, labels = arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"]
    assert rows == {
        image.astype(np.uint8).tobytes(): label for image, label in zip(images, labels, strict=True)
    }


def test_the_users_folder_comes_before_the_cache(folder, cache, monkeypatch) -> None:
    with pytest.raises(DataError, match=f"{cache}.*--data-dir DIR or PJAX_DATA_DIR=DIR"):
        load("mnist", folder, download=False)
    data_files.write(cache / "mnist", data_files.mnist())
    assert {path.parent for path in load("mnist").files} == {cache / "mnist"}
    assert {path.parent for path in load("mnist", folder).files} == {cache / "mnist"}
    for place in (folder, folder / "mnist"):
        data_files.write(place, data_files.mnist(compressed=False))
        assert {path.parent for path in load("mnist", folder).files} == {place}
    monkeypatch.setenv(DATA_DIR_VARIABLE, str(folder))
    assert {path.parent for path in load("mnist").files} == {folder / "mnist"}
    found = find("mnist")
    assert found is not None
    assert found.paths == load("mnist").files
    # A folder with a part of the files is not made up with others.
    (folder / "mnist" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte is not there, though its comp"):
        load("mnist")


def test_missing_folders_and_unknown_names(folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load("mnist", folder / "nowhere")
    with pytest.raises(DataError, match="there are: digits, mnist, fashion-mnist, cifar10, higgs"):
        load("emnist")
    with pytest.raises(DataError, match="`load_text` reads it"):
        load("tinyshakespeare")
    with pytest.raises(DataError, match="`load` reads it"):
        load_text("digits")
    for name in (*NAMES, "tinyshakespeare"):
        assert find(name, folder) is None
    with pytest.raises(DataError, match="pjax data fetch higgs"):
        load("higgs", folder)
    with pytest.raises(DataError, match="looked for higgs_sample.csv.gz or higgs_sample.csv in"):
        load("higgs-sample", folder)


def test_cifar10_is_the_same_from_the_archive_and_from_its_batches(folder, monkeypatch) -> None:
    pytest.importorskip("pyarrow")
    data_files.pretend_cifar10_is_small(monkeypatch)
    archive = data_files.cifar10_archive()
    data_files.pretend_archive_is_official(monkeypatch, *archive.values())
    data_files.write(folder, data_files.cifar10_parquet())
    assert load("cifar10", folder).files == (folder / "train.parquet", folder / "test.parquet")
    data_files.write(folder, data_files.cifar10_batches())
    batches = load("cifar10", folder)
    assert batches.files[0].name == "data_batch_1.bin"
    data_files.write(folder, archive)
    packed = load("cifar10", folder)
    assert packed.files == (folder / "cifar-10-binary.tar.gz",)
    for left, right in zip(parts(packed), parts(batches), strict=True):
        np.testing.assert_array_equal(left.x, right.x)
        np.testing.assert_array_equal(left.y, right.y)
    assert lengths(packed) == [45, 5, 10]
    assert packed.shape == (32, 32, 3)
    # The red plane of an image comes first in a record, red comes first in a pixel here.
    record = np.frombuffer(data_files.cifar10_records()[5], np.uint8)[:3073]
    image = packed.test.x[0].reshape(32, 32, 3)
    np.testing.assert_allclose(image[..., 0].ravel() * 255, record[1:1025], rtol=1e-5)
    np.testing.assert_allclose(image[3, 5, 2] * 255, record[1 + 2 * 1024 + 3 * 32 + 5], rtol=1e-5)
    assert packed.test.y[0] == record[0]


@pytest.mark.parametrize(
    "names", ["{}.parquet", "{}-00000-of-00001.parquet", "plain_text/{}-00000-of-00001.parquet"]
)
def test_cifar10_from_parquet_files(folder: Path, names: str) -> None:
    pytest.importorskip("pyarrow")
    contents = data_files.cifar10_parquet(row_group_size=7)
    data_files.write(
        folder, {names.format(file.split(".")[0]): content for file, content in contents.items()}
    )
    dataset = load("cifar10", folder)
    assert lengths(dataset) == [27, 3, 10]
    expected = np.stack(data_files.pictures(10, seed=1)).reshape(10, -1)
    np.testing.assert_allclose(dataset.test.x * 255, expected, rtol=1e-5)
    np.testing.assert_array_equal(dataset.test.y, np.arange(10))


def test_parquet_files_name_the_packages_that_they_need(folder, monkeypatch) -> None:
    data_files.write(folder, {"train.parquet": b"", "test.parquet": b""})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install \"\.\[parquet\]\""):
        load("cifar10", folder)


def test_channels_are_standardised_by_the_training_rows(folder, monkeypatch) -> None:
    data_files.pretend_cifar10_is_small(monkeypatch)
    data_files.write(folder, data_files.cifar10_batches())
    plain = load("cifar10", folder)
    before = plain.train.x.copy()
    dataset = plain.standardised()
    np.testing.assert_array_equal(plain.train.x, before)
    pixels = dataset.train.x.reshape(-1, 3)
    np.testing.assert_allclose(pixels.mean(0, dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(pixels.std(0, dtype=np.float64), 1, atol=1e-6)
    train = plain.train.x.reshape(-1, 3).astype(np.float64)
    expected = (plain.test.x.reshape(-1, 3) - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(dataset.test.x.reshape(-1, 3), expected, atol=1e-5)
    assert dataset.test.y is plain.test.y


@pytest.mark.parametrize("compressed", [False, True])
def test_a_higgs_sample_is_split_and_standardised(folder: Path, compressed: bool) -> None:
    content = data_files.csv(data_files.higgs_table())
    if compressed:
        content = gzip.compress(content)
    (folder / f"higgs_sample.csv{'.gz' if compressed else ''}").write_bytes(content)
    dataset, other = load("higgs", folder), load("higgs-sample", folder, seed=1)
    assert dataset.name == other.name == "higgs-sample"
    assert lengths(dataset) == [70, 15, 15]
    assert (dataset.num_features, dataset.num_classes, dataset.shape) == (28, 2, (28,))
    np.testing.assert_allclose(dataset.train.x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(dataset.train.x.std(0)[:27], 1, atol=1e-5)
    assert all(np.all(part.x[:, 27] == 0) for part in parts(dataset))
    assert abs(dataset.test.x.mean(0)).max() > 0.01
    assert sum(part.y.sum() for part in parts(dataset)) == 50
    np.testing.assert_array_equal(dataset.train.x, load("higgs", folder).train.x)
    if not compressed:
        (folder / "higgs_sample.csv").write_bytes(content.replace(b"\n", b"\r\n") + b"\n\n")
        np.testing.assert_array_equal(dataset.train.x, load("higgs", folder).train.x)
    assert not np.array_equal(dataset.train.x, other.train.x)


@pytest.mark.parametrize("name", ["HIGGS.csv", "HIGGS.csv.gz"])
def test_the_whole_of_higgs_keeps_its_order(folder, monkeypatch, name: str) -> None:
    # More rows than a piece of the file and than a chunk of the statistics.
    rows = 3000
    table = data_files.higgs_table(rows)
    data_files.pretend_higgs_has(monkeypatch, rows, 200)
    monkeypatch.setattr(sets, "_CHUNK", 999)
    content = data_files.csv(table)
    (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith("gz") else content)
    data_files.write(folder, {"higgs_sample.csv": content[:50]})
    dataset = load("higgs", folder)
    assert dataset.name == "higgs"
    assert lengths(dataset) == [2600, 200, 200]
    np.testing.assert_array_equal(dataset.validation.y, table[2600:2800, 0])
    train = table[:2600, 1:28]
    expected = (table[2800:, 1:28] - train.mean(0)) / train.std(0)
    np.testing.assert_allclose(dataset.test.x[:, :27], expected, atol=1e-5)


def test_text_becomes_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = data_files.text()
    data_files.pretend_text_is_official(monkeypatch, content)
    data_files.write(folder / "tinyshakespeare", {"input.txt": content})
    text = load_text(data_dir=folder)
    assert text.vocabulary == "".join(sorted(set(content.decode())))
    tokens = np.concatenate([text.train, text.validation, text.test])
    assert text.decode(tokens) == content.decode()
    np.testing.assert_array_equal(text.encode(content.decode()), tokens)
    assert [len(text.train), len(text.test)] == [len(content) * 9 // 10, -(-len(content) // 20)]
    windows = text.windows("validation", 5, stride=3)
    np.testing.assert_array_equal(windows[1], text.validation[3:8])
    assert len(windows) == (len(text.validation) - 5) // 3 + 1
    assert windows.base is not None
    with pytest.raises(DataError, match="'é' is not in the vocabulary"):
        text.encode("café")
    for length, stride in ((0, 1), (len(text.test) + 1, 1), (5, 0)):
        with pytest.raises(DataError, match="cannot be taken from"):
            text.windows("test", length, stride)


def test_the_command_lists_what_is_here(folder, cache, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data_files.write(folder / "mnist", data_files.mnist())
    data_files.write(folder / "cifar10", {"train.parquet": b""})
    assert cli.main(["data", "list", "--data-dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    for name in (*NAMES, "tinyshakespeare"):
        assert re.search(rf"^ ?{name} ", printed, re.MULTILINE)
    text = "".join(printed.split())
    assert f"11.6MB{folder}/mnist:train-images-idx3-ubyte.gz" in text
    assert "though" in text
    assert str(cache) in text
    assert cli.main(["data", "list", "--data-dir", str(folder / "nowhere")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err


@real("mnist")
def test_the_real_mnist() -> None:
    dataset = load("mnist", REAL)
    assert lengths(dataset) == [50_000, 10_000, 10_000]
    # The mean pixel of the original training images, .1307, and the first test label, 7.
    pixels = dataset.train.x.sum() + dataset.validation.x.sum(dtype=np.float64)
    np.testing.assert_allclose(pixels / (60_000 * 784), 0.1307, atol=1e-4)
    assert dataset.test.y[0] == 7
    with pytest.raises(DataError, match="this is MNIST, not fashion-mnist"):
        load("fashion-mnist", REAL / "mnist")


@real("higgs")
def test_the_real_higgs_sample() -> None:
    dataset = load("higgs-sample", REAL)
    assert lengths(dataset) == [12_933, 2_772, 2_772]
    assert sum(int(part.y.sum()) for part in parts(dataset)) == 9_807


@real("tinyshakespeare")
def test_the_real_shakespeare() -> None:
    text = load_text(data_dir=REAL)
    assert len(text.vocabulary) == 65
    assert text.decode(text.train[:14]) == "First Citizen:"
    assert [len(text.train), len(text.validation)] == [1_003_854, 55_770]


@pytest.mark.slow
@real("cifar10")
def test_the_real_cifar10() -> None:
    pytest.importorskip("pyarrow")
    dataset = load("cifar10", REAL)
    assert lengths(dataset) == [45_000, 5_000, 10_000]
    # The mean colour of CIFAR-10 is known; the encoding of the images hardly changes it.
    mean = dataset.train.x.reshape(-1, 3).mean(axis=0, dtype=np.float64)
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=2e-3)
