"""What steps compute, in numbers that do not depend on the machine: matrix products against the
minimum, and operations and memory against recorded ceilings.

A count that rises above its ceiling is waste that came in, or a feature that is worth it: then the
ceiling is raised in the same commit, with the reason.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import pjax
from benchmarks.accuracy_tasks import ConvolutionalTask, Task, TextTask
from benchmarks.resnet import ResNet
from benchmarks.suite.reach import steps_needed
from tests.programs import all_equations, equations, kernels, noise_for
from tests.selection import mostly_slow

pytestmark = pytest.mark.usefixtures("as_on_a_cpu")

ROWS = 32
TASKS = {
    "mlp": Task("mnist", (64, 64, 64), batch_size=ROWS),
    "cnn": ConvolutionalTask("cifar10", channels=(8, 16), batch_size=ROWS),
    "rnn": TextTask("tinyshakespeare", (16,), batch_size=ROWS, context=6),
    "transformer": TextTask("tinyshakespeare", (16,), ROWS, model="transformer", context=6),
}
#: Equations of the step's program as it is traced, and compiled temporaries over the gradient's.
CEILINGS = {
    ("mlp", "displacement"): (550, 1.15),
    ("mlp", "projection"): (3450, 4.2),
    ("cnn", "displacement"): (470, 1.15),
    ("cnn", "projection"): (2700, 2.1),
    ("rnn", "displacement"): (3000, 2.5),
    ("transformer", "displacement"): (2560, 2.0),
}
#: Of a step of `pjax.optim.Projection` on a perceptron of four hidden layers: different kernels,
#: and how many more they may be with four more.
PURE_KERNELS, PURE_KERNELS_OF_FOUR_LAYERS = 255, 8
#: Products of matrices of such a step, by the number of layers.
PURE_PRODUCTS = {2: 43, 5: 110}


def step_of(task: Task, kind: str) -> Any:
    loss = task.loss("gradient" if kind == "gradient" else "pure")
    if kind == "gradient":
        return jax.value_and_grad(loss)
    if kind == "displacement":
        return pjax.value_and_displacement(loss)
    optimizer = pjax.optim.Projection(check=False)
    return lambda params, batch, state: optimizer.update(loss, params, state, batch)


def products(compiled: str) -> int:
    """How many products of matrices a compiled program has; those with a vector do not count."""
    shapes = {
        name: math.prod(map(int, filter(None, shape.split(","))))
        for name, shape in re.findall(r"%?([\w.-]+) = \w+\[([\d,]*)\]", compiled)
    }
    dots = re.findall(
        r"%?([\w.-]+) = \S+ dot\((?:\S+ )?%?([\w.-]+), (?:\S+ )?%?([\w.-]+)\)", compiled
    )
    return sum(shapes[out] > max(1, *_rows(shapes, out, left, right)) for out, left, right in dots)


def _rows(shapes: dict[str, int], out: str, left: str, right: str) -> tuple[int, int]:
    """Of `m × k` times `k × n`: m and n, from the three sizes."""
    m = math.isqrt(shapes[out] * shapes[left] // shapes[right])
    return m, shapes[out] // m


def traced(task: Task, kind: str) -> Any:
    arguments = noise_for(task, side=16)
    if kind == "projection":
        init = functools.partial(pjax.optim.Projection().init, task.loss("pure"))
        arguments = *arguments, jax.eval_shape(init, *arguments)
    return jax.jit(step_of(task, kind)).trace(*arguments)


@pytest.mark.parametrize("depth", [2, 5])
def test_a_cyclic_sweep_has_few_products(depth):
    """Those of the forward pass and of a gradient, 3L − 1; 4L are allowed."""
    task = Task("mnist", (24,) * (depth - 1), batch_size=ROWS)
    found, least = (
        products(traced(task, kind).lower().compile().as_text())
        for kind in ("displacement", "gradient")
    )
    assert least == 3 * depth - 1
    assert found == least


def test_deeper_networks_have_the_same_kernels():
    """Most of the time that it takes to compile them is that of their different kernels."""
    tasks = [Task("mnist", (24,) * depth, batch_size=ROWS) for depth in (18, 26)]
    counts = [kernels(traced(t, "displacement").lower().compile().as_text()) for t in tasks]
    assert counts[0] == counts[1]


def test_pure_projection_has_the_same_kernels_for_equal_layers():
    """Arrays of one shape share their kernels, and all layers those of their numbers."""
    tasks = [Task("mnist", (24,) * depth, batch_size=ROWS) for depth in (4, 8)]
    counts = [kernels(traced(t, "projection").lower().compile().as_text()) for t in tasks]
    assert counts[1] - counts[0] <= PURE_KERNELS_OF_FOUR_LAYERS, counts
    assert counts[0] <= PURE_KERNELS, counts


@pytest.mark.parametrize("depth", [2, 5])
def test_pure_projection_has_few_products(depth):
    """A sweep, a solve and a renewal."""
    task = Task("mnist", (24,) * (depth - 1), batch_size=ROWS)
    found = products(traced(task, "projection").lower().compile().as_text())
    assert found <= PURE_PRODUCTS[depth], found


def test_a_residual_network_has_few_kernels():
    """What is asked of a layer is computed once, not in each kernel that reads it: 1.9 times the
    gradient's kernels, which would be 2.3 times as many.
    """
    network = ResNet((2, 2), False, 4, True, nnx.Rngs(0))
    definition, params, state = nnx.split(network, nnx.Param, ...)
    x, labels = jax.random.normal(jax.random.key(0), (8, 8, 8, 3)), jnp.arange(8)

    def loss(params):
        logits = nnx.merge(definition, params, state, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    found, least = (
        kernels(jax.jit(of(loss)).lower(params).compile().as_text())
        for of in (pjax.value_and_displacement, jax.value_and_grad)
    )
    assert found <= 2.05 * least


def test_the_gain_of_a_scaling_is_found_from_its_factors():
    """Not from what they are broadcast to."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"w": jax.random.normal(keys[0], (5, 24)), "scale": jnp.ones(24)}
    x, labels = jax.random.normal(keys[1], (ROWS, 5)), jax.nn.one_hot(jnp.arange(ROWS) % 24, 24)

    def loss(p):
        return jnp.mean(jnp.sum(jnp.square(jax.nn.relu(x @ p["w"]) * p["scale"] - labels), 1))

    jaxpr = jax.make_jaxpr(pjax.displacement(loss))(params).jaxpr
    found = [e.invars[0].aval for e in all_equations(jaxpr) if e.primitive.name == "reduce_max"]
    assert max(aval.size for aval in found) == 24


def test_a_request_goes_one_layer_further_in_each_parallel_step():
    """And no faster: the first of four layers hears of it in the fourth step."""
    task = Task("mnist", (24,) * 3, batch_size=ROWS)
    assert steps_needed(task, *noise_for(task, side=16), most=6) == 4
    assert steps_needed(task, *noise_for(task, side=16), most=3) is None


@pytest.mark.parametrize(
    ("name", "kind"), mostly_slow(CEILINGS, [c for c in CEILINGS if c[1] == "displacement"])
)
def test_nothing_rises_above_its_ceiling(name, kind):
    found = traced(TASKS[name], kind)
    count = equations(found.jaxpr.jaxpr)
    gradient = traced(TASKS[name], "gradient").lower().compile().memory_analysis()
    memory = found.lower().compile().memory_analysis()
    ratio = memory.temp_size_in_bytes / gradient.temp_size_in_bytes
    measured = count, ratio
    assert all(value <= most for value, most in zip(measured, CEILINGS[name, kind], strict=True)), (
        measured
    )
    # A ceiling far above tells nothing.
    assert count > 0.6 * CEILINGS[name, kind][0]
