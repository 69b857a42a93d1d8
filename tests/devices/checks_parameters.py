"""Parameters on eight devices: moves and memories lie as they do, and equal those of one."""

from __future__ import annotations

from typing import Any

import jax
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pjax
from tests.conftest import enable_x64
from tests.devices.checks_data_parallel import MESH, difference, step_of
from tests.devices.collectives import collectives
from tests.devices.models import perceptron


def on(*axes: str | None) -> NamedSharding:
    return NamedSharding(MESH, PartitionSpec(*axes))


SIZES = (128, 128, 128, 16)
#: Of the parameters, and of the batch.
LAYOUTS: dict[str, tuple[dict[str, Any], Any]] = {
    "each a part": ({f"{a}{i}": on("data") for a in "wb" for i in range(3)}, on("data")),
    "columns and rows": (
        {
            "w0": on(None, "data"), "b0": on("data"), "w1": on("data", None), "b1": on(),
            "w2": on(), "b2": on(),
        },
        on(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_displacements_lie_as_parameters_do(layout):
    params, batch = LAYOUTS[layout]
    with enable_x64():
        case = perceptron(SIZES, rows=128)
        expected = pjax.displacement(case.loss)(case.params, case.x, case.y)
        given = jax.device_put((case.params, case.x, case.y), (params, batch, batch))
        found = jax.jit(pjax.displacement(case.loss))(*given)
        assert difference(found, expected) < 1e-12
        for name, move in found.items():
            assert move.sharding.is_equivalent_to(params[name], move.ndim), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memories_lie_as_parameters_do(layout):
    params, batch = LAYOUTS[layout]
    with enable_x64():
        case = perceptron(SIZES, rows=128)
        step, state = step_of(case, "projection")
        expected = case.params
        for _ in range(3):
            expected, state = step(expected, state, case.x, case.y)
        found, *rows = jax.device_put((case.params, case.x, case.y), (params, batch, batch))
        state = pjax.optim.Projection(check=False).init(case.loss, found, *rows)
        step: Any = jax.jit(step)
        for _ in range(2):
            found, state = step(found, state, *rows)
        compiled = step._cache_size()
        found, state = step(found, state, *rows)
        assert step._cache_size() == compiled  # what came out lies as what went in
        assert difference(found, expected) < 1e-12
        for name, leaf in found.items():
            assert leaf.sharding.is_equivalent_to(params[name], leaf.ndim), name
        for unit in state.memory.units:
            like = [leaf for leaf in found.values() if leaf.shape == unit.asked.shape]
            where = [leaf.sharding for leaf in like]
            for memory in (unit.asked, unit.move):
                assert any(memory.sharding.is_equivalent_to(w, memory.ndim) for w in where)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_near_those_of_adam(layout):
    params, batch = LAYOUTS[layout]
    case = perceptron(SIZES, rows=128)
    given, *rows = jax.device_put((case.params, case.x, case.y), (params, batch, batch))
    adam = optax.adam(1e-3)

    def descend(p: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = adam.update(jax.grad(case.loss)(p, x, y), state, p)
        return optax.apply_updates(p, updates), state

    states = adam.init(given), pjax.optim.Projection(check=False).init(case.loss, given, *rows)
    steps = descend, step_of(case, "projection")[0]
    expected, found = (
        collectives(
            jax.jit(step, out_shardings=(params, None)).lower(given, state, *rows).compile()
        )
        for step, state in zip(steps, states, strict=True)
    )
    size = sum(one.bytes / (16 if one.branch else 1) for one in found)
    assert size <= 1.5 * sum(one.bytes for one in expected), size / sum(
        one.bytes for one in expected
    )
