"""Validation accuracy against training seconds on MNIST, 784-128-10, methods in turn.

    python -m benchmarks.accuracy_seconds --data-dir DIR [--seeds 3] [--figure FILE]

Each seed trains every method once, one after the other, with the settings that
`benchmarks.accuracy` chose; the table gives the time to 97 % over Adam's, the median over seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Run, Trainer
from benchmarks.accuracy_methods import METHODS
from benchmarks.accuracy_tasks import ROWS
from pjax.lab.config import NAMES
from pjax.lab.plots import COLOURS

#: The tuned settings of `benchmarks.accuracy` for the row; pure projection has none. Those of Muon
#: and schedule-free AdamW are the best of three rates over two epochs.
SETTINGS: dict[str, dict[str, float]] = {
    "adam": {"rate": 0.01, "cosine": 1.0},
    "muon": {"rate": 0.003, "cosine": 0.0},
    "schedule-free": {"rate": 0.03, "warmup": 0.02},
    "displacement-adam": {"rate": 0.01, "cosine": 1.0},
    "projection": {},
}
ROW = ROWS["mnist-1x128-97"]


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    """Accuracy against seconds and against batches, the first seed of each method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for name, found in runs.items():
        points = found[0].validation
        scores = [100 * point.score for point in points]
        style = {"color": COLOURS[name], "label": NAMES[name]}
        axes[0].plot([point.seconds for point in points], scores, **style)
        axes[1].plot([point.batch for point in points], scores, **style)
    for axis, label in zip(axes, ("seconds of training", "batches of 256"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(97, color="grey", linewidth=0.7)
        axis.set_ylim(90, 98.5)
    axes[0].set_ylabel("validation accuracy, %")
    axes[1].legend()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy against seconds on MNIST.")
    parser.add_argument("--data-dir", default=os.environ.get("PJAX_DATA_DIR"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", type=Path, default=Path("runs/accuracy_seconds.png"))
    options = parser.parse_args()
    trainer = Trainer(options.data_dir)
    runs: dict[str, list[Run]] = {name: [] for name in SETTINGS}
    for seed in range(options.seeds):
        for name, settings in SETTINGS.items():
            runs[name].append(trainer.train(ROW.task, METHODS[name], settings, seed))
    print(f"{'method':20s}{'batches to 97 %':>18s}{'seconds':>10s}{'x Adam':>10s}{'test %':>10s}")
    for name, found in runs.items():
        reached: list[Any] = [run.reached(ROW.reach) for run in found]
        if not all(reached):
            print(f"{name:20s}{'not reached':>18s}")
            continue
        ratios = [
            point.seconds / base.reached(ROW.reach).seconds  # pyright: ignore
            for point, base in zip(reached, runs["adam"], strict=True)
        ]
        print(
            f"{name:20s}{statistics.median(p.batch for p in reached):18.0f}"
            f"{statistics.median(p.seconds for p in reached):10.2f}"
            f"{statistics.median(ratios):10.2f}"
            f"{100 * statistics.mean(run.test for run in found):10.2f}"
        )
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, options.figure)
    print(f"wrote {options.figure}")


if __name__ == "__main__":
    main()
