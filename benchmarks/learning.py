"""Pure projection on MNIST, neuron splitting: validation accuracy after 20 batches of 50 steps
each.

    python -m benchmarks.learning --data-dir DIR [--seeds 3]

784-128-10, batch 256, `fanout="paper"`, λ = 5, He initialisation; validation on 10,000 images
that training does not see.
"""

from __future__ import annotations

import argparse
import os
import statistics

import jax
import jax.numpy as jnp

import pjax
from pjax.lab import data, models

#: After 20 batches: the published code (DR), and the same algorithm in a prototype (AP).
PUBLISHED = {"DouglasRachford": 0.879, "AlternatingProjections": 0.833}


def accuracy_after(name: str, dataset: data.Dataset, seed: int, batches: int, steps: int) -> float:
    """Validation accuracy of one run."""
    model = models.MLP(dataset.num_features, dataset.num_classes, hidden=(128,))
    params = model.init(jax.random.key(seed))
    optimizer = getattr(pjax.optim, name)(steps_per_update=steps)
    rows = data.batch_rows(len(dataset.train), 256, seed)
    for _, index in zip(range(batches), rows, strict=False):
        x = jnp.asarray(dataset.train.x[index])
        y = jax.nn.one_hot(dataset.train.y[index], 10)
        params, _ = optimizer.update(
            lambda p, x=x, y=y: pjax.cross_entropy(model.apply(p, x), y), params
        )
    logits = model.apply(params, jnp.asarray(dataset.validation.x))
    return float(jnp.mean(jnp.argmax(logits, -1) == jnp.asarray(dataset.validation.y)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Pure projection on MNIST, batch by batch.")
    parser.add_argument("--data-dir", default=os.environ.get("PJAX_DATA_DIR"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    dataset = data.load("mnist", options.data_dir)
    for name, published in PUBLISHED.items():
        found = [
            accuracy_after(name, dataset, seed, options.batches, options.steps)
            for seed in range(options.seeds)
        ]
        print(
            f"{name:24s} mean {statistics.mean(found):.4f}  each "
            f"{' '.join(f'{a:.4f}' for a in found)}  (published {published} after 20 batches)"
        )


if __name__ == "__main__":
    main()
