"""Eight devices: a batch in eight parts, weights in eight parts, and `jax.shard_map`.

    python examples/sharded.py

On a computer with fewer devices eight of its CPU are made. Each way gives the moves of one device.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pjax


def network(params, x):
    return jax.nn.relu(x @ params["w1"]) @ params["w2"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(network(params, x), y).mean()


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w1": jax.random.normal(keys[0], (64, 128)) / 8,
        "w2": jax.random.normal(keys[1], (128, 16)) / 11,
    }
    x, y = jax.random.normal(keys[2], (256, 64)), jax.random.randint(keys[3], (256,), 0, 16)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, rows = (
        NamedSharding(mesh, PartitionSpec()),
        NamedSharding(mesh, PartitionSpec("data")),
    )

    optimizer = pjax.optim.Projection(check=False)

    @jax.jit
    def step(params, state, x, y):
        params, state, info = optimizer.update(loss_fn, params, state, x, y)
        return params, state, info.loss

    def train(params, x, y, batches=5):
        state = optimizer.init(loss_fn, params, x, y)
        for _ in range(batches):
            params, state, loss = step(params, state, x, y)
        return params, float(loss)

    one, loss = train(params, x, y)
    print(f"one device: loss {loss:.6f}")
    batch = jax.device_put((x, y), rows)
    for name, placed in (
        ("a part of the batch on each", everywhere),
        ("a part of the weights too", rows),
    ):
        found, loss = train(jax.device_put(params, placed), *batch)
        where = found["w1"].sharding.spec
        print(
            f"{name}: loss {loss:.6f}, w1 lies as {where}, differs by {difference(found, one):.1e}"
        )

    local = pjax.optim.Projection(check=False, axis_name="data")

    def mapped(params, x, y):
        state = local.init(loss_fn, params, x, y)
        for _ in range(5):
            params, state, info = local.update(loss_fn, params, state, x, y)
        return params, info.loss

    everything, some = PartitionSpec(), PartitionSpec("data")
    mapped = jax.shard_map(
        mapped, mesh=mesh, in_specs=(everything, some, some), out_specs=everything, check_vma=False
    )
    found, loss = jax.jit(mapped)(params, x, y)
    print(f"shard_map: loss {float(loss):.6f}, differs by {difference(found, one):.1e}")


def difference(found, expected) -> float:
    return max(
        float(jnp.max(jnp.abs(np.asarray(found[name]) - np.asarray(expected[name]))))
        for name in expected
    )


if __name__ == "__main__":
    main()
