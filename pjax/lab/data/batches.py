"""The order of the rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int32

from pjax.lab.data.errors import DataError


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
