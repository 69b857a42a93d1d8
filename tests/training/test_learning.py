"""Pure projection learns MNIST as fast, batch for batch, as the published algorithms do."""

from __future__ import annotations

import os

import pytest

from benchmarks.learning import accuracy_after
from pjax.lab import data


@pytest.mark.skipif(
    not os.environ.get("PJAX_DATA_DIR"), reason="needs MNIST: set PJAX_DATA_DIR to its folder"
)
@pytest.mark.parametrize(
    ("name", "least"),
    [
        pytest.param("DouglasRachford", 0.87, marks=pytest.mark.slow),
        ("AlternatingProjections", 0.82),
    ],
)
def test_validation_accuracy_after_twenty_batches(name, least):
    """784-128-10, batch 256, 50 steps a batch; the published code: .879 (DR); the same AP
    elsewhere: .833.
    """
    dataset = data.load("mnist")
    assert accuracy_after(name, dataset, seed=0, batches=20, steps=50) >= least
