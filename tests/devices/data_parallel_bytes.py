"""Run by `test_pipeline_devices` in a process with four CPU devices: the bytes of a data-parallel
displacement are those of the model.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pjax
from pjax.inspection import Network, scaling_cost

COLLECTIVE = r"= (.*) (all-reduce|all-gather|all-to-all|collective-permute)(-start)?\("
NETWORK = Network(layers=4, width=32, batch=64)


def loss(params: Any, x: Any, y: Any) -> Any:
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return jnp.mean(pjax.squared_error(x, y))


def main() -> None:
    mesh = Mesh(np.array(jax.devices()), ("data",))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*names)) for names in (("data",), ()))
    width = NETWORK.width
    params = [{"w": jnp.ones((width, width)), "b": jnp.zeros(width)} for _ in range(NETWORK.layers)]
    params = jax.device_put(params, whole)
    x = y = jax.device_put(jnp.ones((NETWORK.batch, width)), rows)
    text = jax.jit(pjax.value_and_displacement(loss)).lower(params, x, y).compile().as_text()
    total = 0
    for line in str(text).splitlines():
        found = re.search(COLLECTIVE, line)
        if found:
            for sizes in re.findall(r"f32\[([\d,]*)\]", found.group(1)):
                total += 4 * int(np.prod([int(n) for n in sizes.split(",") if n]))
    devices = len(jax.devices())
    predicted = scaling_cost(NETWORK, "data", devices).sent
    # A ring sends what is added 2 (P - 1)/P times.
    assert predicted <= 2 * (devices - 1) / devices * total <= 1.05 * predicted, (predicted, total)
    print("equal")


if __name__ == "__main__":
    main()
