"""Equal layers on eight devices: the moves of one, an eighth of its products, and shifts alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import pjax
from tests.conftest import enable_x64
from tests.devices.checks_data_parallel import difference
from tests.devices.collectives import collectives

MESH = Mesh(np.array(jax.devices()), ("stage",))
LAYERS, WIDTH, ROWS, CLASSES = 16, 64, 32, 10


def first(p: Any, x: Any) -> Any:
    return jax.nn.relu(x @ p["w"])


def last(p: Any, h: Any, y: Any) -> Any:
    return jnp.mean(pjax.cross_entropy(h @ p["w"], y))


def dense(p: Any, h: Any) -> Any:
    return jax.nn.relu(h @ p["w"])


def residual(p: Any, h: Any) -> Any:
    return h + jax.nn.relu(h @ p["w"]) / 4


def given(width: int = WIDTH, rows: int = ROWS) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) * (2 / shape[-2]) ** 0.5)

    params = (
        {"w": normal(width, width)},
        {"w": normal(LAYERS, width, width)},
        {"w": normal(width, CLASSES)},
    )
    y = np.eye(CLASSES)[rng.integers(0, CLASSES, rows)]
    return params, normal(rows, width), jnp.asarray(y)


def staged(solver: str, steps: int, splitting: str, layer: Any, mesh: Any) -> Any:
    optimizer = getattr(pjax.optim, solver)(steps, splitting=splitting, check=False)
    return pjax.optim.StagedProjections(optimizer, first, layer, last, mesh=mesh)


def moves(method: Any, params: Any, x: Any, y: Any) -> Any:
    found, history = method.update(method.place(params), x, y)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, params), history


CASES = [
    ("AlternatingProjections", "neuron", dense),
    ("DouglasRachford", "layer", residual),
    pytest.param("DouglasRachford", "neuron", dense, marks=pytest.mark.slow),
    pytest.param("AlternatingProjections", "layer", residual, marks=pytest.mark.slow),
    pytest.param("DifferenceMap", "layer", residual, marks=pytest.mark.slow),
    pytest.param("AlternatingReflections", "neuron", residual, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("solver", "splitting", "layer"), CASES)
def test_moves_are_those_of_one_device(solver, splitting, layer):
    with enable_x64():
        params, x, y = given(8, 6)
        few = staged(solver, 36, splitting, layer, MESH)
        found, history = moves(few, params, x, y)
        expected, one = moves(staged(solver, 36, splitting, layer, None), params, x, y)
        assert difference(found, expected) < 1e-12
        for a, b in zip(*map(jax.tree.leaves, (history, one)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11)
        # What came out lies as what goes in.
        new, _ = few.update(few.place(params), x, y)
        wanted = few.place(params)
        for a, b in zip(*map(jax.tree.leaves, (new, wanted)), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


def compiled(method: Any, params: Any, x: Any, y: Any) -> Any:
    return jax.jit(method.update).lower(method.place(params), x, y).compile()


@pytest.mark.parametrize(
    ("solver", "splitting"),
    [
        ("AlternatingProjections", "neuron"),
        ("DouglasRachford", "layer"),
        pytest.param("AlternatingProjections", "layer", marks=pytest.mark.slow),
        pytest.param("DouglasRachford", "neuron", marks=pytest.mark.slow),
    ],
)
def test_an_eighth_of_the_products_and_a_shift_each_way(solver, splitting):
    params, x, y = given()
    many = compiled(staged(solver, 5, splitting, dense, MESH), params, x, y)
    one = compiled(staged(solver, 5, splitting, dense, None), params, x, y)
    # Counted as if each device ran what is before and behind the layers as well, and of loops, also
    # of that over layers in the forward pass of one device, as if they ran once.
    share = many.cost_analysis()["flops"] / one.cost_analysis()["flops"]
    assert 1 / 8 < share <= 0.2, share

    found = collectives(many)
    shifts = [one for one in found if one.kind == "collective-permute"]
    sums = [one for one in found if one.kind == "all-reduce"]
    assert len(shifts) + len(sums) == len(found)
    large = [one for one in shifts if one.bytes > 8]
    assert {one.shapes for one in large} == {((ROWS, WIDTH),)}
    # Of the two projections of a step one is of the nodes at the edges, which has a shift each way;
    # the third one is that of the forward pass. Outside of the loop is the projection that makes
    # the solution of a solver that reflects.
    assert sum(one.looped for one in large) == 3
    assert sum(not one.looped for one in large) <= 2
    # Sums of numbers, and in the end the moves of what is before and behind the layers.
    assert all(shape == () for one in sums if one.looped for shape in one.shapes)
    sizes = {shape for one in sums for shape in one.shapes if shape}
    assert sizes == {(WIDTH, WIDTH), (WIDTH, CLASSES)}


@pytest.mark.parametrize(
    "kind", [AxisType.Explicit, pytest.param(AxisType.Auto, marks=pytest.mark.slow)]
)
def test_rows_along_another_axis(kind):
    """Stages of two devices, each with half of the rows."""
    mesh = jax.make_mesh((4, 2), ("stage", "data"), axis_types=(kind, kind))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    with enable_x64():
        params, x, y = given(8, 6)
        expected, _ = moves(staged("DouglasRachford", 36, "neuron", dense, None), params, x, y)
        method = staged("DouglasRachford", 36, "neuron", dense, mesh)
        batch = jax.device_put((x, y), rows)
        found, _ = moves(method, params, *batch)
        assert difference(found, expected) < 1e-12
        shifts = [
            one.shapes
            for one in collectives(compiled(method, params, *batch))
            if one.kind == "collective-permute" and one.bytes > 8
        ]
        assert set(shifts) == {((3, 8),)}


def test_layers_that_cannot_be_shared_out():
    params, x, y = given(4, 4)
    method = staged("AlternatingProjections", 2, "neuron", dense, MESH)
    odd = params[0], {"w": params[1]["w"][:12]}, params[2]
    with pytest.raises(ValueError, match="12 layers cannot be shared out evenly to the 8 devices"):
        method.update(odd, x, y)
