"""Rolled programs give what the programs give, and their size does not grow with repeats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pjax
from pjax.backend import device
from pjax.compile import repeats, rolled, rolled_scan, rolling
from tests.selection import mostly_slow

N = 30


def count(function, *args) -> int:
    """How many equations a function has, those in loops counted once."""

    def inside(jaxpr):
        bodies = [
            leaf
            for equation in jaxpr.eqns
            for leaf in jax.tree.leaves(
                list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            )
            if hasattr(leaf, "eqns")
        ]
        return len(jaxpr.eqns) + sum(map(inside, bodies))

    return inside(jax.make_jaxpr(function)(*args).jaxpr)


def check(function, *args, smaller: float = 0.8):
    """Rolled and not, compiled and not, in float64; and that rolling made it smaller."""
    expected = function(*args)
    found = rolled(function)(*args)
    compiled = jax.jit(rolled(function))(*args)
    for other in (found, compiled):
        assert jax.tree.structure(other) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(other), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)
    assert count(rolled(function), *args) < smaller * count(function, *args)


pytestmark = pytest.mark.usefixtures("x64", "small_programs")


@pytest.fixture
def small_programs(monkeypatch):
    """Programs are rolled whatever their size."""
    monkeypatch.setattr(rolling, "MIN_EQUATIONS", 0)


@pytest.fixture
def arrays():
    return list(jax.random.normal(jax.random.key(0), (N, 3, 3)))


def test_what_compiles_within_seconds_stays_as_it_is(arrays, monkeypatch):
    def function(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight) + 0.5 * x
        return x

    args = arrays, jnp.ones((2, 3))
    small = count(rolled(function), *args)
    monkeypatch.setattr(rolling, "MIN_EQUATIONS", 10_000)
    assert count(rolled(function), *args) == count(function, *args) + 1 > small  # the call of it


def test_layers_in_a_row(arrays):
    def function(weights, x):
        kept = []
        for weight in weights:
            x = jnp.tanh(x @ weight) + 0.5 * x
            kept.append(x)
        # Backwards, as a sweep reads the forward pass.
        y = jnp.ones_like(x)
        for weight, value in zip(reversed(weights), reversed(kept), strict=True):
            y = (y * (1 - value**2)) @ weight.T + y
        return x, y, kept[3], jnp.stack(kept)

    check(function, arrays, jnp.ones((2, 3)))


def test_blocks_side_by_side(arrays):
    def function(weights, x):
        return [jnp.sum(jnp.exp(x @ weight), axis=0) * 2 for weight in weights]

    check(function, arrays, jnp.ones((2, 3)))


def test_equal_blocks_are_computed_once():
    def function(x):
        return [jnp.sin(jnp.cos(x)) + 1 for _ in range(N)]

    check(function, jnp.arange(3.0))


def test_a_block_reads_two_blocks_back(arrays):
    def function(weights):
        a, b = weights[0], weights[1]
        for weight in weights[2:]:
            a, b = b, jnp.tanh(b) * 0.5 + a @ weight
        return a, b

    check(function, arrays)


def test_numbers_and_slices_that_differ():
    def function(x):
        total = jnp.zeros(4)
        for k in range(N):
            total = jnp.sin(total) + k * jax.lax.slice(x, (k, 0), (k + 1, 4))[0] * 2.0
        return total

    check(function, jax.random.normal(jax.random.key(1), (N, 4)))


def test_split_and_joined_arrays():
    def function(x):
        parts = jax.lax.split(x, (2,) * N, axis=1)
        parts = [jnp.exp(part) * 2 for part in parts]
        return jnp.concatenate(parts, axis=1), jnp.stack(parts, axis=1), parts[5]

    check(function, jax.random.normal(jax.random.key(1), (3, 2 * N)))


@pytest.mark.parametrize("reverse", [False, True])
def test_parts_with_others_between(arrays, reverse):
    def function(weights, x):
        parts = [jnp.tanh(weight) + 1 for weight in weights]
        if reverse:
            parts.reverse()
        for part in [x, *parts[:-1]]:
            x = 0.1 * jnp.sin(x @ part) + x  # rounding grows little
        return x

    check(function, arrays, jnp.eye(3))


def test_parts_of_two_arrays_in_turn(arrays):
    def function(weights):
        first = [jnp.tanh(weight) + 1 for weight in weights]
        second = [jnp.exp(weight) * 2 for weight in weights]
        both = [part for pair in zip(first, second, strict=True) for part in pair]
        return [jnp.sum(jnp.sin(part) * part) for part in both]

    check(function, arrays)


def test_blocks_that_begin_elsewhere_stand_side_by_side(arrays):
    """What repeats first begins in the midst of a block, which then reads the one before."""

    def function(weights):
        return [jnp.sum(jnp.cos(weight) * jnp.exp(weight)) * 2 for weight in weights]

    jaxpr = jax.make_jaxpr(function)(arrays).jaxpr
    places = repeats._places(jaxpr.eqns)
    period = len(jaxpr.eqns) // N
    for shift in range(period):
        wiring = repeats._wiring(jaxpr.eqns, places, shift + period, period, 1)
        run = repeats.unchained(jaxpr.eqns, repeats.Run(shift, period, N - 1, wiring), 24)
        assert not repeats.is_chain(run.sources)
        assert run.start % period == 0
        assert run.repeats >= N - 2


def side_by_side(state):
    """Each array moves by itself and by the one before; the last result joins them all."""
    parts, total = state
    moved = [jnp.tanh(part) + 0.1 * before for part, before in zip(parts[1:], parts, strict=False)]
    size = jnp.sum(jnp.stack([jnp.sum(jnp.square(part)) for part in moved]))
    return ([parts[0] * 0.9, *moved], total + size), {"size": size, "first": parts[0]}


@pytest.mark.parametrize("compiled", [False, True])
def test_steps_that_keep_blocks_in_one_array(arrays, compiled):
    state = (arrays, jnp.zeros(()))

    def plain(state):
        return jax.lax.scan(lambda s, _: side_by_side(s), state, None, length=5)

    def together(state):
        return rolled_scan(side_by_side, state, 5)

    expected = plain(state)
    found = (jax.jit(together) if compiled else together)(state)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12)


def body_size(function, *args) -> int:
    """How many equations the step of the outermost loop has."""
    loops = [e for e in jax.make_jaxpr(function)(*args).eqns if e.primitive.name == "scan"]
    return max(len(e.params["jaxpr"].jaxpr.eqns) for e in loops)


def test_a_step_over_blocks_does_not_grow_with_them():
    sizes = []
    for blocks in (N, 3 * N):
        arrays = list(jax.random.normal(jax.random.key(0), (blocks, 3, 3)))
        sizes.append(body_size(lambda s: rolled_scan(side_by_side, s, 5), (arrays, jnp.zeros(()))))
    assert sizes[0] == sizes[1] < N


def test_short_steps_stay_as_they_are(arrays, monkeypatch):
    monkeypatch.setattr(rolling, "MIN_EQUATIONS", 10_000)
    state = (arrays, jnp.zeros(()))
    found = rolled_scan(side_by_side, state, 3)
    expected = jax.lax.scan(lambda s, _: side_by_side(s), state, None, length=3)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12)


@pytest.mark.parametrize("blocks", [4, 12])
@pytest.mark.usefixtures("as_on_a_cpu")
def test_fewer_blocks_are_one_where_kernels_are_launched(blocks, monkeypatch):
    """And what reads the block before stays written out, as a loop would only take longer."""
    monkeypatch.setattr(rolling, "MIN_EQUATIONS", 10_000)
    monkeypatch.setattr(rolling, "MIN_LAUNCHES", 0)
    arrays = list(jax.random.normal(jax.random.key(0), (blocks, 3, 3)))
    state = (arrays, jnp.zeros(()))
    there = body_size(lambda s: rolled_scan(side_by_side, s, 3), state)
    monkeypatch.setattr(device, "launches_kernels", lambda: True)
    here = body_size(lambda s: rolled_scan(side_by_side, s, 3), state)
    assert (here < there) == (blocks == 12)
    found = rolled_scan(side_by_side, state, 3)
    expected = jax.lax.scan(lambda s, _: side_by_side(s), state, None, length=3)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12)

    def chain(state):
        x, weights = state
        for weight in weights:
            x = jnp.tanh(x @ weight) * 0.5 + x
            x = jnp.cos(x) * jnp.exp(x) + jnp.sin(x)
        return (x, weights), jnp.sum(x)

    jaxpr = jax.make_jaxpr(lambda s: rolled_scan(chain, s, 3))((jnp.eye(3), arrays)).jaxpr
    assert sum(e.primitive.name == "scan" for e in jaxpr.eqns) == 1
    (step,) = (e.params["jaxpr"].jaxpr for e in jaxpr.eqns if e.primitive.name == "scan")
    assert not any(e.primitive.name == "scan" for e in step.eqns)


def test_integers_masks_and_none():
    def function(x, nothing):
        flags = [x > k for k in range(N)]
        total = jnp.zeros((), jnp.int32)
        for flag in flags:
            total = total + jnp.sum(flag) * 2
        return {"total": total, "nothing": nothing, "flags": flags}

    check(function, jnp.arange(40.0), None)


def test_functions_with_rules_of_their_own(arrays):
    def function(weights, x):
        for weight in weights:
            x = jax.nn.relu(x @ weight) + optax.safe_norm(x, 1e-3)
        return x

    check(function, arrays, jnp.ones((2, 3)))


def test_types_stay(arrays):
    def function(weights, x):
        for weight in weights:
            x = jnp.tanh(x @ weight.astype(jnp.float32))
        return x, x.astype(jnp.bfloat16)

    half = [weight / 3 for weight in arrays]
    found = rolled(function)(half, jnp.ones((2, 3), jnp.float32))
    assert [leaf.dtype for leaf in found] == [jnp.float32, jnp.bfloat16]


def test_derivatives_and_vmap_pass_through(arrays):
    def function(x):
        for weight in arrays:
            x = jnp.tanh(x @ weight)
        return jnp.sum(x)

    xs = jax.random.normal(jax.random.key(2), (4, 2, 3))
    np.testing.assert_allclose(
        jax.vmap(jax.grad(rolled(function)))(xs), jax.vmap(jax.grad(function))(xs), rtol=1e-9
    )


def test_what_stays_as_it_is(arrays):
    printed = []

    def with_effects(x):
        for k in range(N):
            jax.debug.callback(lambda x, k=k: printed.append(k), x)
            x = jnp.sin(x) * 2
        return x

    def convolutions(x):
        for _ in range(N):
            x = jnp.tanh(jax.lax.conv_general_dilated(x, jnp.ones((1, 1, 3, 3)), (1, 1), "SAME"))
        return x

    def few(x):
        for weight in arrays[: rolling.MIN_REPEATS - 1]:
            x = jnp.tanh(x @ weight)
        return x

    jax.block_until_ready(rolled(with_effects)(1.0))
    jax.effects_barrier()
    assert sorted(printed) == list(range(N))
    for function, x in ((convolutions, jnp.ones((1, 1, 4, 4))), (few, jnp.eye(3))):
        assert count(rolled(function), x) <= count(function, x) + 1  # the call of it


def network(depth):
    keys = jax.random.split(jax.random.key(0), depth + 2)
    params = [0.5 * jax.random.normal(key, (8, 8)) for key in keys[:-1]]
    x = jax.random.normal(keys[-1], (4, 8))

    def loss(params):
        h = x
        for weight in params[:-1]:
            h = jax.nn.relu(h @ weight) + 0.1 * h
        return jnp.mean(pjax.cross_entropy(h @ params[-1], jnp.eye(8)[:4]))

    return loss, params


def recurrent(length):
    key = jax.random.key(0)
    params = {"w": 0.5 * jax.random.normal(key, (8, 4)), "u": jnp.ones((3, 4)), "v": jnp.eye(4)}
    x = jax.random.normal(key, (length, 2, 3))
    labels = jnp.zeros((length, 2), int)

    def loss(params):
        def cell(h, entry):
            both = jnp.concatenate([h, entry @ params["u"]], axis=-1)
            h = 0.5 * h + jax.nn.relu(both @ params["w"])
            return h, h

        _, outputs = jax.lax.scan(cell, jnp.zeros((2, 4)), x)
        return jnp.mean(pjax.cross_entropy(outputs @ params["v"], jnp.eye(4)[labels]))

    return loss, params


def step(kind, loss, params):
    if kind == "displacement":
        return pjax.displacement(loss)(params)
    if kind == "parallel":
        solver = pjax.solvers.AlternatingProjections(steps=4)
        return pjax.displacement(loss, solver=solver)(params)
    optimizer = pjax.optim.CyclicProjections(splitting="layer", check=False)
    return optimizer.update(loss, params)[0]


CASES = [
    (make, kind) for make in (network, recurrent) for kind in ("displacement", "parallel", "pure")
]
_QUICK = [(recurrent, "displacement")]
_IN_PART = pytest.mark.xfail(
    strict=True,
    reason="The projections of one colour of a loop are not found to repeat.",
)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(
            make,
            kind,
            marks=[
                *([] if (make, kind) in _QUICK else [pytest.mark.slow]),
                *([_IN_PART] if (make, kind) == (recurrent, "parallel") else []),
            ],
        )
        for make, kind in CASES
    ],
)
def test_problems_do_not_grow_with_depth_or_length(make, kind, monkeypatch):
    """Steps of 9 and of 18 equal layers have nearly as many operations."""
    monkeypatch.setattr(rolling, "MIN_REPEATS", 6)
    sizes = []
    for layers in (9, 18):
        loss, params = make(layers)
        sizes.append(count(lambda p, loss=loss: step(kind, loss, p), params))
    assert sizes[1] - sizes[0] <= 9 * 15  # of 100 to 400 for each


@pytest.mark.parametrize(("make", "kind"), mostly_slow(CASES, _QUICK))
def test_rolled_problems_have_the_same_solution(make, kind, monkeypatch):
    monkeypatch.setattr(rolling, "MIN_REPEATS", 6)
    loss, params = make(9)
    found = jax.jit(lambda p: step(kind, loss, p))(params)
    monkeypatch.setattr(rolling, "MIN_REPEATS", 10**6)
    jax.clear_caches()
    expected = jax.jit(lambda p: step(kind, loss, p))(params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12)
