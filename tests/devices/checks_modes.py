"""`jax.shard_map`, explicit axes, and sums around the loss: as `jax.grad` does, or an error."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import pjax
from tests.conftest import enable_x64
from tests.devices.checks_data_parallel import MESH, difference, step_of
from tests.devices.models import CASES, perceptron

EVERYWHERE, ROWS = PartitionSpec(), PartitionSpec("data")
SLOW = pytest.mark.slow


def mapped(function: Any, out: Any, typed: bool = False) -> Any:
    """A function of parameters and the rows of one device, on all devices."""
    return jax.jit(
        jax.shard_map(
            function, mesh=MESH, in_specs=(EVERYWHERE, ROWS, ROWS), out_specs=out, check_vma=typed
        )
    )


def mean(tree: Any) -> Any:
    return jax.lax.pmean(tree, "data")


#: How far displacements of local losses may be from those of the whole batch: bounds on gains are
#: of the rows of a device. (A batch norm has other rows.)
NEAR = {"perceptron": 1e-6, "group norm": 1e-2, "transformer": 1e-2, "recurrent": 1e-2}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "perceptron" else SLOW) for n in NEAR]
)
def test_local_displacements_have_the_mean_of_all(name):
    """By `axis_name`, or by a mean over devices."""
    with enable_x64():
        case = CASES[name]()
        value, expected = pjax.value_and_displacement(case.loss)(case.params, case.x, case.y)

        step = pjax.value_and_displacement
        for function in (
            step(case.loss, axis_name="data"),
            lambda *given: mean(step(case.loss)(*given)),
        ):
            loss, moved = mapped(function, EVERYWHERE)(case.params, case.x, case.y)
            np.testing.assert_allclose(loss, value, rtol=1e-12)
            assert difference(moved, expected) < NEAR[name], function


@pytest.mark.parametrize(
    "name",
    [
        "perceptron",
        pytest.param("transformer", marks=SLOW),
        pytest.param("recurrent", marks=SLOW),
    ],
)
def test_pure_projection_of_local_rows_is_that_of_all(name):
    with enable_x64():
        case = CASES[name]()
        step, state = step_of(case, "projection")
        whole, expected = jax.jit(step), case.params
        for _ in range(3):
            expected, state = whole(expected, state, case.x, case.y)
        optimizer = pjax.optim.Projection(check=False, axis_name="data")

        def update(params: Any, x: Any, y: Any) -> Any:
            state = optimizer.init(case.loss, params, x, y)
            for _ in range(3):
                params, state, info = optimizer.update(case.loss, params, state, x, y)
            return params, info.loss

        found, _ = mapped(update, EVERYWHERE)(case.params, case.x, case.y)
        moves = [jax.tree.map(jnp.subtract, p, case.params) for p in (found, expected)]
        assert difference(*moves) < 1e-6


def test_a_mean_around_the_loss():
    """Of losses that are known as such; others are tried out where there are no devices."""
    case = perceptron()

    def network(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["w0"]) @ p["w2"]

    def loss(p: Any, x: Any, y: Any) -> Any:
        return jnp.mean(pjax.cross_entropy(network(p, x), y))

    params = {name: case.params[name] for name in ("w0", "w2")}
    value, expected = pjax.value_and_displacement(loss)(params, case.x, case.y)
    around = pjax.value_and_displacement(lambda *given: mean(loss(*given)))
    found = mapped(lambda *given: mean(around(*given)), EVERYWHERE)(params, case.x, case.y)
    np.testing.assert_allclose(found[0], value, rtol=1e-5)
    assert difference(found[1], expected) < 1e-5
    with pytest.raises(pjax.TraceError, match="of one device"):
        mapped(
            lambda *given: pjax.displacement(lambda *a: mean(case.loss(*a)))(*given), EVERYWHERE
        )(case.params, case.x, case.y)


def test_what_cannot_be_says_what_to_do():
    case = perceptron()
    batch = case.params, case.x, case.y

    def inside(params: Any, x: Any, y: Any) -> Any:
        h = x @ params["w0"]
        h = jax.nn.relu(h - mean(h.mean(0)))
        return jnp.mean(pjax.cross_entropy(h @ params["w2"], y))

    with pytest.raises(pjax.TraceError, match=r"leave it to `jax.jit`"):
        mapped(lambda *given: pjax.displacement(inside)(*given), EVERYWHERE)(*batch)
    network = jax.shard_map(
        lambda p, x: jax.nn.relu(x @ p["w0"]) @ p["w2"],
        mesh=MESH, in_specs=(EVERYWHERE, ROWS), out_specs=ROWS,
    )  # fmt: skip
    with pytest.raises(pjax.TraceError, match=r"inside of `jax.shard_map`"):
        pjax.displacement(lambda p, x, y: jnp.mean(pjax.cross_entropy(network(p, x), y)))(*batch)
    # Types of varying values: whether JAX adds the cast, or the user has.
    with pytest.raises(pjax.TraceError, match="check_vma=False"):
        mapped(pjax.displacement(case.loss), EVERYWHERE, typed=True)(*batch)

    def own(params: Any, x: Any, y: Any) -> Any:
        return pjax.displacement(case.loss)(jax.lax.pcast(params, "data", to="varying"), x, y)

    with pytest.raises(ValueError, match="check_vma=False"):
        mapped(own, ROWS, typed=True)(*batch)


@pytest.mark.parametrize(
    ("name", "kind", "set_mesh"),
    [
        ("perceptron", "projection", False),
        ("perceptron", "displacement", True),
        pytest.param("perceptron", "projection", True, marks=SLOW),
        pytest.param("perceptron", "displacement", False, marks=SLOW),
        pytest.param("perceptron", "CyclicProjections layer", False, marks=SLOW),
        pytest.param("perceptron", "CyclicProjections layer", True, marks=SLOW),
        pytest.param("group norm", "projection", True, marks=SLOW),
    ],
)
def test_explicit_axes(name, kind, set_mesh):
    """Those of `jax.make_mesh`: results are typed as parameters are."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with enable_x64():
        case = CASES[name]()
        step, state = step_of(case, kind)
        expected, _ = jax.jit(step)(case.params, state, case.x, case.y)
        everywhere, rows = (NamedSharding(mesh, spec) for spec in (EVERYWHERE, ROWS))
        given = jax.device_put((case.params, state), everywhere)
        batch = jax.device_put((case.x, case.y), rows)
        with jax.set_mesh(mesh) if set_mesh else jax.default_matmul_precision("highest"):
            found, _ = jax.jit(step)(*given, *batch)
            assert difference(found, expected) < 1e-12
            if set_mesh:
                found, _ = step(*given, *batch)
                assert difference(found, expected) < 1e-12
            for name, leaf in found.items():
                assert jax.typeof(leaf).sharding.spec == jax.typeof(given[0][name]).sharding.spec
