"""The model of cost, beside what compiled programs count."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.inspection import Machine, Network, scaling_cost
from pjax.inspection.scaling import Way
from pjax.training import stages
from pjax.training.stages import Asked, Labelled

NETWORK = Network(layers=8, width=64, batch=4096)
WAYS: tuple[Way, ...] = ("data", "sharded", "pipelined")


def dense(params: Any, x: Any) -> Any:
    for layer in params:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x


def loss(outputs: Any, labels: Any) -> Any:
    return jnp.mean(pjax.squared_error(outputs, labels))


def pipeline_of(network: Network, count: int) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    shape = network.batch, network.width
    x, y = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    own = network.layers // count
    params = [
        [
            {
                "w": jnp.asarray(rng.normal(size=(network.width,) * 2) / 8, jnp.float32),
                "b": jnp.zeros(network.width),
            }
            for _ in range(own)
        ]
        for _ in range(count)
    ]
    return pjax.optim.PipelinedProjection([dense] * count, loss), params, x, y


def operations(compiled: Any) -> float:
    return compiled.cost_analysis()["flops"]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_products_of_a_pipeline(count: int) -> None:
    """Beside products there are entry-wise operations, and now and then renewed moments."""
    pipeline, params, x, y = pipeline_of(NETWORK, count)
    state = pipeline.init(params, x, y)
    described = pipeline._described(state.layers)
    counted = []
    for number in {count // 2 - 1, count - 1}:
        last = number == count - 1
        one = Labelled(x, y) if last else Asked(x, x, x)
        program = stages.solve.lower(
            described[number], params[number], state.kept[number], one, 1.0
        )
        total = operations(program.compile())
        if not last:
            ahead = stages.forward.lower(dense, params[number], x)
            total += operations(ahead.compile())
        counted.append(total)
    predicted = scaling_cost(NETWORK, "pipelined", count).operations
    assert predicted <= max(counted) <= 1.6 * predicted


@pytest.mark.parametrize("count", [2, 4, 8])
def test_bytes_of_a_pipeline(count: int) -> None:
    network = NETWORK._replace(batch=32)
    pipeline, params, x, y = pipeline_of(network, count)
    state = pipeline.init(params, x, y)
    for _ in range(2 * count):
        params, state, _ = pipeline.update(params, state, x, y)

    def size(tree: Any) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    predicted = scaling_cost(network, "pipelined", count)
    assert predicted.delay == pipeline.delays[0]
    sent = [size(state.arrived[n + 1 : n + 2]) + size(state.asked[n - 1 : n] if n else ())
            for n in range(count)]  # fmt: skip
    assert max(sent) == predicted.sent
    # Moments have some bytes more.
    kept = size((params[0], state.kept[0], state.inputs[0], state.outputs[0]))
    working = network.layers // count * network.activations
    assert predicted.kept <= kept + working <= 1.5 * predicted.kept


def test_time_of_a_batch_does_not_grow_with_depth() -> None:
    costs = [scaling_cost(NETWORK._replace(layers=n), "pipelined", n) for n in (4, 8, 16)]
    assert len({cost.operations for cost in costs}) == 1
    assert [cost.delay for cost in costs] == [6, 14, 30]


def test_ways_agree_on_one_device() -> None:
    data, sharded, pipelined = (
        scaling_cost(NETWORK, way, 1) for way in ("data", "sharded", "pipelined")
    )
    assert data == sharded == pipelined
    assert data.sent == data.idle == data.delay == 0


def test_few_rows_of_wide_layers_are_sent_by_a_pipeline_sooner() -> None:
    network, machine = Network(64, 8192, 1024), Machine(1e14, 5e10, 1e-5)
    data, sharded, pipelined = (
        scaling_cost(network, way, 64) for way in ("data", "sharded", "pipelined")
    )
    assert pipelined.sent < data.sent / 50
    assert sharded.kept < data.kept
    assert pipelined.seconds(machine) < min(data.seconds(machine), sharded.seconds(machine))
    thousands = scaling_cost(network, "pipelined", 4096, 64)
    assert thousands.operations < pipelined.operations / 10


def test_errors() -> None:
    with pytest.raises(ValueError, match="`way` must be"):
        scaling_cost(NETWORK, "other", 2)  # pyright: ignore
    with pytest.raises(ValueError, match="cannot share"):
        scaling_cost(NETWORK, "pipelined", 12)
    with pytest.raises(ValueError, match="4096 rows cannot be shared out to 5000"):
        scaling_cost(NETWORK, "data", 5000)
    with pytest.raises(ValueError, match="at least 1"):
        scaling_cost(NETWORK, "data", 0)
    with pytest.raises(ValueError, match="from 1 to the 8 layers"):
        scaling_cost(NETWORK, "pipelined", 16, 16)
    with pytest.raises(ValueError, match="`stages` are of"):
        scaling_cost(NETWORK, "data", 4, 2)
