"""Rows on eight devices: the moves of one device, and few exchanges."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pjax
from tests.conftest import enable_x64
from tests.devices.collectives import collectives
from tests.devices.models import CASES, Case

MESH = Mesh(np.array(jax.devices()), ("data",))
EVERYWHERE, ROWS = (NamedSharding(MESH, PartitionSpec(*axes)) for axes in ((), ("data",)))


def difference(found: Any, expected: Any) -> float:
    """The largest difference, relative to the largest entry of each array, or of all of them for
    arrays that are next to nothing.
    """
    found, expected = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        for tree in (found, expected)
    )
    largest = max(np.max(np.abs(leaf)) for leaf in expected)
    return max(
        np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3 * largest)
        for a, b in zip(found, expected, strict=True)
    )


def step_of(case: Case, kind: str) -> tuple[Any, Any]:
    """A training step `(params, state, x, y) -> (moved, state)`, and the state to begin with."""
    if kind == "gradient":
        return lambda params, state, x, y: (jax.grad(case.loss)(params, x, y), state), ()
    if kind == "displacement":
        return lambda params, state, x, y: (pjax.displacement(case.loss)(params, x, y), state), ()
    if kind == "projection":
        optimizer = pjax.optim.Projection(check=False)
        state = optimizer.init(case.loss, case.params, case.x, case.y)

        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            return optimizer.update(case.loss, params, state, x, y)[:2]

        return step, state
    solver, splitting = kind.split()
    paper = getattr(pjax.optim, solver)(4, splitting=splitting, check=False)

    def solve(params: Any, state: Any, x: Any, y: Any) -> Any:
        return paper.update(lambda p: case.loss(p, x, y), params)[0], state

    return solve, ()


def moves(case: Case, kind: str, rows: Any, params: Any, batches: int) -> Any:
    """What so many steps make of the parameters, less these."""
    step, state = step_of(case, kind)
    step = jax.jit(step)
    found = jax.device_put(case.params, params)
    x, y = jax.device_put((case.x, case.y), rows)
    if params is not None:
        state = jax.device_put(state, params)
    for _ in range(batches):
        found, state = step(found, state, x, y)
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), found, case.params)


#: Networks that are looked at in quick tests too.
FEW = ("perceptron", "batch norm")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name in FEW else [pytest.mark.slow])
        for name in CASES
        for kind in ("displacement", "projection")
    ],
)
def test_exchanges_are_few(name, kind):
    """Nothing of the batch's size; sums only, none in a loop, little more than of the gradient."""
    case = CASES[name]()
    gradient, own = (exchanges(case, kind) for kind in ("gradient", kind))
    assert {one.kind for one in own} == {"all-reduce"}
    # The products behind the second moments: once in a renewal, and four times in the first batch.
    renewals = [one for one in own if one.branch]
    assert all("while/body" in one.name for one in renewals if one.looped)
    always = [one for one in own if not one.branch]
    if name != "recurrent":  # whose gradient has a loop
        assert not any(one.looped for one in always)
    assert len(always) <= len(gradient) + MORE[name], len(always) - len(gradient)
    largest = sum(one.bytes for one in always) + sum(one.bytes for one in renewals) / RENEWED
    assert largest <= 1.5 * bytes_of(gradient, name), largest / bytes_of(gradient, name)


#: How many sums there may be beside those of the gradient: of bounds, and of numbers for a solve.
MORE = {"perceptron": 3, "group norm": 4, "batch norm": 7, "transformer": 9, "recurrent": 13}
#: Moments are renewed every so many batches; in the first ones more often.
RENEWED = 16


def exchanges(case: Case, kind: str) -> list[Any]:
    step, state = step_of(case, kind)
    given = jax.device_put((case.params, state), EVERYWHERE)
    batch = jax.device_put((case.x, case.y), ROWS)
    return collectives(jax.jit(step).lower(*given, *batch).compile())


def bytes_of(found: list[Any], name: str) -> int:
    """A sum in a loop of the recurrent network is one in each of its five steps."""
    times = 5 if name == "recurrent" else 1
    return sum(one.bytes * (times if one.looped else 1) for one in found)


SOLVERS = [
    "displacement",
    "projection",
    *(
        f"{solver} {splitting}"
        for solver in ("AlternatingProjections", "CyclicProjections", "DouglasRachford")
        for splitting in ("layer", "neuron")
    ),
]
QUICK = {
    ("perceptron", "displacement"),
    ("perceptron", "projection"),
    ("perceptron", "AlternatingProjections layer"),
    ("recurrent", "projection"),
}


def agreement(name: str, kind: str) -> float:
    """How closely moves agree that are computed in another order.

    A softmax in neuron splitting is solved for by eight damped steps, which end where costs are
    equal to rounding; differences from a mean lose digits.
    """
    if name == "transformer" and kind.endswith("neuron"):
        return 1e-8
    return 1e-10 if name.endswith("norm") and kind not in ("displacement", "projection") else 1e-12


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if (name, kind) in QUICK else [pytest.mark.slow])
        for name in CASES
        for kind in SOLVERS
    ],
)
def test_moves_are_those_of_one_device(name, kind):
    batches = 3 if kind == "projection" else 1
    one = jax.devices()[0]
    with enable_x64():
        case = CASES[name]()
        expected = moves(case, kind, one, None, batches)
        found = moves(case, kind, ROWS, EVERYWHERE, batches)
        assert difference(found, expected) < agreement(name, kind)
