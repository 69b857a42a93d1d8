"""What each data set is made of: names, sizes and checksums of its files, and where they are.

The SHA-256 sums and sizes are those that TensorFlow Datasets publishes for the same addresses
(`tensorflow_datasets/url_checksums` and `datasets/*/checksums.tsv`, version 4.9.10).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """A file as its authors publish it.

    **Arguments:**

    - `name`: of the file.
    - `size`: in bytes.
    - `sha256`: in hexadecimal.
    - `urls`: where it is, the best first.
    """

    name: str
    size: int
    sha256: str
    urls: tuple[str, ...]


#: The names that one file may have, the preferred one first.
Slot = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Files:
    """The files of a data set.

    **Arguments:**

    - `description`: one line.
    - `layouts`: ways to have the data set on disk, each a tuple of slots; the first that is there
      is used.
    - `sources`: what a download fetches.
    - `automatic`: whether `load` may download it; otherwise only `fetch` does.
    - `refused`: files that hold the same data as a pickle, and are not read.
    """

    description: str
    layouts: tuple[tuple[Slot, ...], ...] = ()
    sources: tuple[Source, ...] = ()
    automatic: bool = True
    refused: tuple[str, ...] = ()


def _idx_layout() -> tuple[Slot, ...]:
    names = [
        f"{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    return tuple((f"{name}.gz", name) for name in names)


def _idx_sources(
    folders: tuple[str, ...], files: tuple[tuple[int, str], ...]
) -> tuple[Source, ...]:
    return tuple(
        Source(names[0], size, sha256, tuple(f"{folder}/{names[0]}" for folder in folders))
        for names, (size, sha256) in zip(_idx_layout(), files, strict=True)
    )


_MNIST = _idx_sources(
    (
        "https://storage.googleapis.com/cvdf-datasets/mnist",
        "https://ossci-datasets.s3.amazonaws.com/mnist",
    ),
    (
        (9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        (28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        (1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        (4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
)

_FASHION_MNIST = _idx_sources(
    (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion",
    ),
    (
        (26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        (29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        (4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        (5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    ),
)

CIFAR10_ARCHIVE = Source(
    "cifar-10-binary.tar.gz",
    170052171,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
)
#: The members of the archive that hold images, the test rows last.
CIFAR10_BATCHES = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")

_HIGGS = Source(
    "HIGGS.csv.gz",
    2816407858,
    "ea302c18164d4e3d916a1e2e83a9a8d07069fa6ebc7771e4c0540d54e593b698",
    ("https://archive.ics.uci.edu/ml/machine-learning-databases/00280/HIGGS.csv.gz",),
)
_HIGGS_SAMPLE = (("higgs_sample.csv.gz", "higgs_sample.csv"),)

SHAKESPEARE = Source(
    "input.txt",
    1115394,
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    (
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/"
        "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
    ),
)

#: Every data set, by the name that `load` takes.
FILES: dict[str, Files] = {
    "digits": Files("1,797 images of 8 x 8 pixels, shipped with scikit-learn"),
    "mnist": Files(
        "70,000 grey images of 28 x 28 pixels, 10 digits",
        (_idx_layout(),),
        _MNIST,
        refused=("mnist.pkl.gz", "mnist.pkl"),
    ),
    "fashion-mnist": Files(
        "70,000 grey images of 28 x 28 pixels, 10 kinds of clothes",
        (_idx_layout(),),
        _FASHION_MNIST,
    ),
    "cifar10": Files(
        "60,000 colour images of 32 x 32 pixels, 10 classes",
        (
            ((CIFAR10_ARCHIVE.name,),),
            tuple((f"cifar-10-batches-bin/{name}", name) for name in CIFAR10_BATCHES),
            tuple(
                (f"{part}.parquet", f"{long}.parquet", f"plain_text/{long}.parquet")
                for part, long in (
                    ("train", "train-00000-of-00001"),
                    ("test", "test-00000-of-00001"),
                )
            ),
        ),
        (CIFAR10_ARCHIVE,),
        refused=("cifar-10-python.tar.gz", "cifar-10-batches-py", "data_batch_1"),
    ),
    "higgs": Files(
        "11,000,000 collisions with 28 features, or a sample of them, 2 classes",
        ((("HIGGS.csv.gz", "HIGGS.csv"),), _HIGGS_SAMPLE),
        (_HIGGS,),
        automatic=False,
    ),
    "higgs-sample": Files("a sample of HIGGS; has no official file", (_HIGGS_SAMPLE,)),
    "tinyshakespeare": Files(
        "1,115,394 characters of Shakespeare, 65 different ones",
        (((SHAKESPEARE.name,),),),
        (SHAKESPEARE,),
    ),
}
#: Sets that share the folder of another.
FOLDERS = {"higgs-sample": "higgs"}
