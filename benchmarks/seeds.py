"""Several seeds in one compiled program, beside one after the other.

    python -m benchmarks.seeds [--data-dir DIR] [--seeds 4] [--rounds 5]

Medians of rounds in which both train in turn. "step": one batch for every seed. "run": all of 200
batches with tracing and compiling, one program for each seed against one for all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pjax.lab import config
from pjax.lab.config import MethodName, TrainConfig
from pjax.lab.data import Dataset, load
from pjax.lab.train import Training

METHODS: tuple[MethodName, ...] = ("adam", "displacement-adam", "projection")
_BATCHES = 20


def make(settings: TrainConfig, dataset: Dataset, seeds: tuple[int, ...]) -> Training:
    return Training(
        config.make_method(settings, dataset.num_classes),
        config.make_model(settings, dataset),
        dataset,
        steps=10**6,
        batch_size=settings.batch_size,
        seeds=seeds,
        measure_every=10**6,
    )


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def steps(training: Training) -> None:
    for _ in range(_BATCHES):
        training.advance()


def compare(
    settings: TrainConfig, dataset: Dataset, count: int, rounds: int
) -> tuple[float, float, float, float]:
    """Seconds: a step of all seeds one by one, to make those programs; both again, together."""
    seeds = tuple(range(count))
    made = [timed(lambda seed=seed: make(settings, dataset, (seed,))) for seed in seeds]
    made_together, together = timed(lambda: make(settings, dataset, seeds))
    alone = [training for _, training in made]
    for training in (*alone, together):
        steps(training)
    one_by_one, side_by_side = [], []
    for _ in range(rounds):
        one_by_one.append(sum(timed(lambda one=one: steps(one))[0] for one in alone))
        side_by_side.append(timed(lambda: steps(together))[0])
    return (
        statistics.median(one_by_one) / _BATCHES,
        sum(seconds for seconds, _ in made),
        statistics.median(side_by_side) / _BATCHES,
        made_together,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Seeds side by side, and one after the other.")
    parser.add_argument("--data-dir", default=os.environ.get("PJAX_DATA_DIR"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tasks = [TrainConfig(hidden=(16,), batch_size=32), TrainConfig(hidden=(128,))]
    if options.data_dir:
        where = Path(options.data_dir)
        tasks.append(TrainConfig(dataset="mnist", data_dir=where, hidden=(128,), batch_size=256))
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("data, width, batch", "method", "step alone", "together", "ratio", "run"):
        table.add_column(heading, no_wrap=True)
    for task in tasks:
        dataset = load(task.dataset, task.data_dir)
        for method in METHODS:
            settings = TrainConfig(**{**vars(task), "method": method})
            alone, made, together, made_together = compare(
                settings, dataset, options.seeds, options.rounds
            )
            run = (200 * together + made_together) / (200 * alone + made)
            table.add_row(
                f"{dataset.name}, {task.hidden[0]}, {task.batch_size}",
                method,
                f"{1e3 * alone:.2f} ms",
                f"{1e3 * together:.2f} ms",
                f"{together / alone:.2f}",
                f"{run:.2f}",
            )
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(f"{options.seeds} seeds; ratio and run: together beside one by one")
    console.print(table)


if __name__ == "__main__":
    main()
