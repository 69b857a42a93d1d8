"""What is made for devices that launch kernels computes what is made for a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from benchmarks.accuracy_tasks import ConvolutionalTask, Task, TextTask
from pjax.backend import device
from pjax.compile import loops, rolling
from pjax.solvers import AlternatingProjections
from tests.programs import noise_for

ROWS = 8
TASKS = {
    "mlp": Task("mnist", (16,) * 5, batch_size=ROWS),
    "cnn": ConvolutionalTask("cifar10", channels=(4, 4), batch_size=ROWS),
    "transformer": TextTask("tinyshakespeare", (16,), ROWS, model="transformer", context=6),
}


def both(monkeypatch: Any, compute: Any) -> tuple[Any, Any]:
    """What is computed as on a CPU, and as where kernels are launched."""
    found = []
    for launches in (False, True):
        monkeypatch.setattr(device, "launches_kernels", lambda launches=launches: launches)
        jax.clear_caches()
        found.append(compute())
    jax.clear_caches()
    return found[0], found[1]


@pytest.mark.parametrize(
    "name", ["mlp", "cnn", pytest.param("transformer", marks=pytest.mark.slow)]
)
def test_displacements_are_the_same(name: str, monkeypatch: Any) -> None:
    task = TASKS[name]
    params, batch = noise_for(task, side=8)
    here, there = both(monkeypatch, lambda: pjax.displacement(task.loss("pure"))(params, batch))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
        size = float(jnp.max(jnp.abs(a)))
        assert size > 0
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * size)


def test_parallel_steps_of_equal_layers_are_the_same(monkeypatch: Any) -> None:
    """With blocks side by side in the step, and written out."""
    task = Task("mnist", (16,) * 11, batch_size=ROWS)
    params, batch = noise_for(task, side=8)
    sides: list[Any] = []
    monkeypatch.setattr(rolling, "MIN_LAUNCHES", 0)
    evaluate = loops._loop
    monkeypatch.setattr(
        loops, "_loop", lambda run, *rest: (sides.append(run.repeats), evaluate(run, *rest))
    )

    def solve() -> Any:
        problem = pjax.feasibility_problem(task.loss("pure"), params, batch, splitting="layer")
        sides.append("begun")
        state = AlternatingProjections(8).run(problem)
        return problem.parameter_forces(state)

    here, there = both(monkeypatch, solve)
    assert sides[:2] == ["begun", "begun"]
    assert len(sides) > 2
    for a, b in zip(here, there, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(a))))
