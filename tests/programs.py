"""Programs that tests look at: batches for the benchmarks' tasks, counts of equations and of
kernels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from benchmarks.accuracy_tasks import ConvolutionalTask, Task, TextTask


def noise_for(task: Task, side: int) -> tuple[Any, tuple[jax.Array, jax.Array]]:
    """Parameters of a task and a batch of noise, `(x, one_hot)`; of images so many pixels high."""
    rows = task.batch_size
    if isinstance(task, TextTask):
        tokens = jax.random.randint(jax.random.key(0), (rows, task.context + 1), 0, 20)
        return task.init(0, 20, 0), (tokens[:, :-1], jax.nn.one_hot(tokens[:, 1:], 20))
    features = 3 * side * side if isinstance(task, ConvolutionalTask) else 50
    x = jax.random.normal(jax.random.key(0), (rows, features))
    return task.init(features, 10, 0), (x, jax.nn.one_hot(jnp.arange(rows) % 10, 10))


def all_equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for body in jaxprs_in_params(equation.params):
            yield from all_equations(body)


def equations(jaxpr: Any, name: str = "") -> int:
    """How many equations a program has, those of inner programs included; or those of one kind."""
    return sum(name in ("", equation.primitive.name) for equation in all_equations(jaxpr))


def kernels(compiled: str) -> int:
    """How many different kernels a compiled program has: most of its compile time on a CPU."""
    bodies = dict(re.findall(r"^%?([\w.-]+) \(.*\{\n((?:.+\n)*?)\}", compiled, re.MULTILINE))
    called = re.findall(r"kind=k\w+, calls=%?([\w.-]+)", compiled)
    return len({_anonymous(bodies[name]) for name in called})


def _anonymous(body: str) -> str:
    """What a kernel does, whatever its values are called and wherever they come from."""
    body = re.sub(r", (metadata=\{[^}]*\}|backend_config=.*)", "", body)
    names: dict[str, str] = {}
    return re.sub(r"%[\w.-]+", lambda found: names.setdefault(found[0], f"%{len(names)}"), body)
