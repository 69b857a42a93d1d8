"""Data sets as arrays, split into train, validation and test rows.

Files are looked for in `data_dir` (or the folder that the environment variable `PJAX_DATA_DIR`
names), then in a cache, and are downloaded into the cache if they are in neither. Whatever is
missing, damaged or not what its name says raises a `DataError` that names the file and says what to
do. No pickle is ever loaded.
"""

from __future__ import annotations

from pjax.lab.data.batches import batch_rows
from pjax.lab.data.download import fetch
from pjax.lab.data.errors import DataError
from pjax.lab.data.files import (
    CACHE_DIR_VARIABLE,
    DATA_DIR_VARIABLE,
    Found,
    cache_folder,
    find,
    folder_name,
)
from pjax.lab.data.formats import read_idx
from pjax.lab.data.sets import (
    NAMES,
    Dataset,
    DatasetName,
    Split,
    Text,
    load,
    load_text,
    standardise,
)

__all__ = [
    "CACHE_DIR_VARIABLE",
    "DATA_DIR_VARIABLE",
    "NAMES",
    "DataError",
    "Dataset",
    "DatasetName",
    "Found",
    "Split",
    "Text",
    "batch_rows",
    "cache_folder",
    "fetch",
    "find",
    "folder_name",
    "load",
    "load_text",
    "read_idx",
    "standardise",
]
