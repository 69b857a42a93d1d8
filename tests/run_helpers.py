"""What the tests of runs share: a tiny run, and what two runs must have in common."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from pjax import nn
from pjax.lab import checkpoints, config, recording, runs
from pjax.lab.config import TrainConfig
from pjax.lab.data import Dataset, load
from pjax.lab.files import write_json
from pjax.lab.train import Record

#: Four batches an epoch; a checkpoint every third, a measurement every fourth batch.
TINY = TrainConfig(
    method="adam",
    hidden=(6,),
    batch_size=256,
    steps=10,
    seeds=(0, 1),
    measure_every=4,
    checkpoint_every=3,
)


def prepare(settings: TrainConfig, folder: Path) -> tuple[Path, TrainConfig, Dataset, nn.Module]:
    """A new run, and what `runs.advance` needs to train it."""
    dataset = load(settings.dataset)
    path = runs.create(settings, dataset, folder)
    return path, settings, dataset, config.make_model(settings, dataset)


def start(folder: Path, **changes: Any) -> tuple[Path, TrainConfig, Dataset, nn.Module]:
    """A new run that differs from `TINY` by these settings."""
    return prepare(dataclasses.replace(TINY, **changes), folder)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics, without the seconds: those differ from run to run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines


def assert_same_runs(one: Path, other: Path) -> None:
    """Bit for bit: parameters, optimiser state, best parameters; metrics and results as well."""
    first, second = (checkpoints.newest(path / "checkpoints") for path in (one, other))
    assert first is not None
    assert second is not None
    assert first.step == second.step
    assert first.arrays.keys() == second.arrays.keys()
    for name, array in first.arrays.items():
        assert array.dtype == second.arrays[name].dtype
        np.testing.assert_array_equal(array, second.arrays[name], err_msg=name)
    standings = [found.numbers["training"]["standings"] for found in (first, second)]
    assert standings[0] == standings[1]
    assert metrics(one) == metrics(other)
    assert runs.finished_result(one).rows == runs.finished_result(other).rows
    tables = [(path / "metrics.csv").read_text().splitlines() for path in (one, other)]
    assert len(tables[0]) == len(tables[1]) == len(metrics(one)) + 1


def recorded(folder: Path, name: str, settings: TrainConfig, finished: bool = True) -> Path:
    """The folder of a run as far as its metrics and its result go, without training it."""
    path = runs.create(settings, load(settings.dataset), folder)
    path = path.rename(folder / name)
    last = settings.steps if finished else settings.steps // 2
    records = [
        Record(
            step=step,
            seconds=0.01 * step,
            validation_accuracy=0.9 - 0.5 / (step + 1) + 0.01 * number,
            residual=1 / (step + 1),
            loss=2 / (step + 1),
            train_accuracy=0.9,
            epoch=step / 4,
            seed=seed,
        )
        for step in range(last + 1)
        for number, seed in enumerate(settings.seeds)
    ]
    recorder = recording.Recorder(path)
    recorder.write(records)
    recorder.close()
    rows = [
        {
            "seed": record.seed,
            "best_step": last,
            "validation_accuracy": record.validation_accuracy,
            "test_accuracy": record.validation_accuracy - 0.0123,
            "steps": last,
            "stopped": "",
        }
        for record in records[-len(settings.seeds) :]
    ]
    if finished:
        costs = {"step": last, "seconds": 0.01 * last, "compile_seconds": 1.5, "state_bytes": 4096}
        content = {**costs, "config": config.to_table(settings), "seeds": rows}
        write_json(path / "result.json", content)
    return path


def events_of(folder: Path) -> dict[tuple[str, int], float]:
    """TensorBoard's numbers in the event files of a folder, by tag and step."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    sent = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                sent[value.tag, event.step] = value.simple_value
            content = content[16 + size :]
    return sent
