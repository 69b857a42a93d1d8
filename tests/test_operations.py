"""Operations that public models use: in the stiff limit the displacement is the gradient of JAX,
and pure projection trains through them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import metrics
from pjax.graph import build_graph
from pjax.program import TraceError
from pjax.rules import Reference
from pjax.rules.affine import ScatterAdd
from pjax.trace import trace
from tests.public_operations import GROUPS, LOSSES, ROWS, WIDTH, X, data, loss_of, params

#: So stiff and with so short a prox step that only rounding is left between the two.
LIMIT = metrics.Spectral(activations=1e8, prox_step=1e-7)

#: What takes long to compile.
LONG = {"linear": {"expm"}, "math": {"beta", "sample of a gamma"}, "complex": {"recurrence"}}
#: What pure projection is tried on every time.
QUICK = {
    "scatters": {"sum", "maximum", "set"},
    "math": {"free power", "cumprod"},
    "masks": {"two comparisons"},
    "linear": {"solve"},
    "complex": {"spectral layer"},
    "flow": {"cond on a value"},
    "losses": {"ctc", "contrastive"},
}


def _cases(groups, is_slow):
    return [
        pytest.param(
            function,
            id=f"{group}-{name.replace(' ', '_')}",
            marks=[pytest.mark.slow] if is_slow(group, name) else [],
        )
        for group, functions in groups.items()
        for name, function in functions.items()
    ]


def _is_long(group, name):
    return name in LONG.get(group, ())


def _is_not_quick(group, name):
    return name not in QUICK[group]


def assert_is_the_gradient(loss, params, *args, rtol=1e-6):
    value, moved = jax.jit(pjax.value_and_displacement(loss, metric=LIMIT))(params, *args)
    expected, gradient = jax.jit(jax.value_and_grad(loss))(params, *args)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(gradient))
    assert largest > 1e-4
    for (path, d), g in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(gradient), strict=True
    ):
        size = max(float(jnp.max(jnp.abs(g))), 1e-3 * largest)
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(d, g, rtol=0, atol=rtol * size, err_msg=name)


def assert_trains(loss, params, *args, steps=3):
    optimizer = pjax.optim.Projection()
    state = optimizer.init(loss, params, *args)
    before = float(loss(params, *args))
    for _ in range(steps):
        params, state, info = optimizer.update(loss, params, state, *args)
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((params, info)))
    assert float(loss(params, *args)) < before


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("loss", _cases({"losses": LOSSES}, _is_long))
def test_the_stiff_limit_of_a_loss_is_the_gradient(x64, loss):
    assert_is_the_gradient(loss, params(), data())


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("loss", _cases({"losses": LOSSES}, _is_not_quick))
def test_pure_projection_lowers_a_loss(x64, loss):
    assert_trains(loss, params(), data())


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("function", _cases(GROUPS, _is_long))
def test_the_stiff_limit_is_the_gradient(x64, function):
    assert_is_the_gradient(loss_of(function), params(), data())


@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("function", _cases(GROUPS, _is_not_quick))
def test_pure_projection_trains_through_it(x64, function):
    assert_trains(loss_of(function), params(), data())


NEURONS = {
    "scatters": ("sum", "maximum", "set", "softmax"),
    "math": ("free power", "cumprod"),
    "masks": ("between two", "spline"),
    "linear": ("solve", "cholesky"),
    "complex": ("spectral layer", "rotation"),
    "flow": ("cond on a value",),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pjax.UnusedParameterWarning")
@pytest.mark.parametrize("solver", ["AlternatingProjections", "DouglasRachford"])
@pytest.mark.parametrize(("group", "name"), [(g, n) for g, names in NEURONS.items() for n in names])
def test_solvers_in_neuron_splitting(x64, group, name, solver):
    loss = loss_of(GROUPS[group][name])
    optimizer = getattr(pjax.optim, solver)(steps_per_update=8, prox_step=0.1)
    moved, residual = optimizer.update(lambda p: loss(p, data()), params())
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(moved))
    assert np.isfinite(float(residual))
    assert float(loss(moved, data())) < float(loss(params(), data()))


# --- The rule of sums ----------------------------------------------------------------------------


def _random_sum(seed, moves=(True, True)):
    """A node `y = x + Σ u` with repeated and unread indices, and all that its projection takes."""
    rng = np.random.default_rng(seed)
    indices = jnp.asarray(rng.integers(-1, 5, (7, 1)))

    def fn(p):
        out = jnp.ones((4, 2))
        zero = p["x"] if moves[0] else jnp.zeros((4, 2))
        updates = p["u"] if moves[1] else jnp.ones((7, 2))
        out = zero.at[indices[:, 0]].add(updates, mode="drop", wrap_negative_indices=False)
        return pjax.squared_error(out, jnp.zeros((4, 2))).sum()

    arrays = {"x": jnp.asarray(rng.normal(size=(4, 2))), "u": jnp.asarray(rng.normal(size=(7, 2)))}
    kept = {name: arrays[name] for name, moving in zip(("x", "u"), moves, strict=True) if moving}
    program, leaves, consts, _ = trace(fn, kept)
    (node,) = [n for n in build_graph(program, "layer").nodes if n.kind == "operation"]
    values = program.evaluate(leaves, consts)
    knowns = tuple(values[atom] for atom in node.knowns)
    shapes = [a.shape for name, a in arrays.items() if name in kept]
    draw = rng.normal
    states = tuple(jnp.asarray(draw(size=s)) for s in shapes)
    weights = tuple(jnp.asarray(rng.uniform(0.1, 3, s)) for s in shapes)
    target, weight = jnp.asarray(draw(size=(4, 2))), jnp.asarray(rng.uniform(0, 3, (4, 2)))
    reference = Reference(states, knowns, target)
    return node.rule, reference, (states, weights, target, weight), indices[:, 0]


@pytest.mark.parametrize("moves", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("seed", range(4))
def test_the_projection_onto_a_sum_is_the_nearest_point(x64, seed, moves):
    rule, reference, (states, weights, target, weight), indices = _random_sum(seed, moves)
    assert isinstance(rule, ScatterAdd)
    moved, output = rule.project(reference, states, weights, target, weight)
    # The matrix of the sum, entry by entry.
    blocks = [np.eye(4)] if moves[0] else []
    if moves[1]:
        blocks.append((np.arange(4)[:, None] == np.asarray(indices)[None]).astype(float))
    matrix = np.kron(np.concatenate(blocks, 1), np.eye(2))
    flat, rho = (np.concatenate([np.ravel(a) for a in arrays]) for arrays in (states, weights))
    w, z = np.ravel(weight), np.ravel(target)
    nearest = np.linalg.solve(
        np.diag(rho) + matrix.T @ (w[:, None] * matrix), rho * flat + matrix.T @ (w * z)
    )
    found = np.concatenate([np.ravel(m) for m in moved])
    np.testing.assert_allclose(found, nearest, atol=1e-12)
    np.testing.assert_allclose(np.ravel(output), matrix @ nearest, atol=1e-12)
    again, _ = rule.project(reference, moved, weights, output, weight)
    np.testing.assert_allclose(np.concatenate([np.ravel(m) for m in again]), found, atol=1e-12)
    gains = rule.gains(reference, [True] * len(states), [None] * len(states))
    largest = [np.linalg.norm(block, 2) ** 2 for block in blocks]
    np.testing.assert_allclose([float(g) for g in gains], largest, atol=1e-12)


@pytest.mark.parametrize("decides", [lambda d: d > 0, lambda d: jnp.abs(d) < 0.5])
def test_a_loss_is_masked_by_numbers_of_data(x64, decides):
    """What a loss is recognised by are samples of its data, which meet a condition or not."""

    def loss(p, d):
        mask = decides(d["x"] @ jnp.ones((3, WIDTH)) - jnp.arange(WIDTH))
        return jnp.mean((jnp.where(mask, d["x"] @ p["w"] * p["scale"], 1.0) - 2.0) ** 2)

    p = {name: params()[name] for name in ("w", "scale")}
    assert_is_the_gradient(loss, p, data())


# --- What rests, and what is refused -------------------------------------------------------------


def test_numbers_of_whole_numbers_are_steps():
    """A spike, however it is written, is the same threshold."""
    x = jnp.asarray(X, jnp.float32)
    spellings = [
        lambda v: (v > 0).astype(v.dtype),
        lambda v: jnp.where(v > 0, 1, 0).astype(v.dtype),
        lambda v: (v > 0).astype(int).astype(v.dtype),
        lambda v: jnp.where(v > 0, 1.0, 0.0),
    ]
    p = {"w": jnp.asarray(params()["w"], jnp.float32), "v": jnp.ones((WIDTH, 1))}
    found = []
    for spike in spellings:

        def loss(p, spike=spike):
            return jnp.mean((spike(x @ p["w"]) @ p["v"] - x[:, :1]) ** 2)

        graph = build_graph(trace(loss, p)[0], "layer")
        assert [type(n.rule).__name__ for n in graph.nodes if n.kind == "operation"] == [
            "LayerSum", "Threshold", "LayerSum",
        ]  # fmt: skip
        found.append(pjax.displacement(loss)(p)["w"])
    assert float(jnp.linalg.norm(found[0])) > 0
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)


@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("metric", [None, LIMIT])
def test_a_branch_that_data_leave_unread_moves_nothing(chosen, metric):
    x = jnp.asarray(X, jnp.float32)
    p = {"w": jnp.asarray(params()["w"], jnp.float32), "u": jnp.ones(WIDTH)}

    def loss(p, mask):
        h = x @ p["w"]
        return jnp.mean((jnp.where(mask, jnp.sin(h), h * p["u"]) * 2 - 1) ** 2)

    mask = jnp.full((ROWS, WIDTH), chosen)
    found = pjax.displacement(loss, metric=metric)(p, mask)
    gradient = jax.grad(loss)(p, mask)
    for name in p:
        assert bool(jnp.all(jnp.isfinite(found[name])))
        assert float(jnp.vdot(found[name], gradient[name])) >= 0
        assert bool(jnp.any(found[name] != 0)) == bool(jnp.any(gradient[name] != 0))


DECISIONS: dict[str, Any] = {
    "condition": lambda p, x: jnp.where(x @ p["v"] > 0, x @ p["w"], 1.0),
    "index": lambda p, x: x @ p["w"] + p["w"][jnp.clip(p["v"][:, 0].astype(int), 0, 2)][0],
    "rounding": lambda p, x: x @ p["w"] + jnp.floor(p["v"][0]),
}


@pytest.mark.parametrize("name", DECISIONS)
def test_a_parameter_that_only_decides_is_named(name):
    p = {"w": jnp.ones((3, WIDTH)), "v": jnp.full((3, WIDTH), 0.5)}

    def loss(p):
        return jnp.mean((DECISIONS[name](p, jnp.asarray(X, jnp.float32)) - 2.0) ** 2)

    with pytest.warns(pjax.UnusedParameterWarning, match=r"`params\['v'\]` .*conditions.*gradient"):
        found = pjax.displacement(loss)(p)
    assert not bool(jnp.any(found["v"]))
    assert float(jnp.vdot(found["w"], jax.grad(loss)(p)["w"])) > 0


def test_a_parameter_that_is_meant_to_rest_is_not_named(recwarn):
    def loss(p):
        mask = jax.lax.stop_gradient(jnp.asarray(X) @ p["v"]) > 0
        return jnp.mean((jnp.where(mask, jnp.asarray(X) @ p["w"], 1.0) - 2.0) ** 2)

    pjax.displacement(loss)({"w": jnp.ones((3, WIDTH)), "v": jnp.ones((3, WIDTH))})
    assert not [w for w in recwarn if issubclass(w.category, pjax.UnusedParameterWarning)]


def test_a_loop_that_the_program_counts_is_unrolled(x64):
    """A `while_loop` has no gradient in JAX; the same steps in Python have."""

    def step(z, p, d):
        return jnp.tanh(0.3 * z @ jnp.outer(p["u"], p["u"]) + d["x"] @ p["w"])

    def looped(p, d):
        carry = jax.lax.while_loop(
            lambda c: c[1] < 4,
            lambda c: (step(c[0], p, d), c[1] + 1),
            (jnp.zeros((ROWS, WIDTH)), 0),
        )
        return jnp.mean((p["scale"] * carry[0] - 1.0) ** 2)

    def written(p, d):
        z = jnp.zeros((ROWS, WIDTH))
        for _ in range(4):
            z = step(z, p, d)
        return jnp.mean((p["scale"] * z - 1.0) ** 2)

    found = pjax.displacement(looped, metric=LIMIT)(params(), data())
    gradient = jax.grad(written)(params(), data())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(jnp.max(jnp.abs(b))))


REFUSED: dict[str, tuple[Any, str]] = {
    "a loop until it converges": (
        lambda h, p, d: jax.lax.while_loop(lambda z: z[0, 0] < 1, lambda z: z + 1, h),
        r"`while` at .*test_operations.*fixed number of steps.*register_projection",
    ),
    "a loop of as many steps as data say": (
        lambda h, p, d: jax.lax.fori_loop(0, d["segments"][1], lambda i, z: jnp.sin(z), h),
        r"`while` at .*test_operations.*fixed number of steps.*register_projection",
    ),
    "an operation without a rule": (
        lambda h, p, d: jax.lax.reduce_precision(h, 8, 20),
        r"`reduce_precision` at .*test_operations.*register_projection.*fallback=\"gauss-newton\"",
    ),
    "a function without a derivative": (
        lambda h, p, d: jax.scipy.special.zeta(h**2 + 2, 1.0),
        r"`zeta` at .*test_operations.*register_projection",
    ),
    "a function applied in place": (
        lambda h, p, d: h.at[d["segments"]].apply(jnp.sin),
        r"apply\(f\)` \(.*test_operations.*`x.at\[i\].set\(f\(x\[i\]\)\)`",
    ),
    "a product of segments": (
        lambda h, p, d: jax.ops.segment_prod(h, d["segments"], 4),
        r"`scatter-mul` at .*test_operations.*register_projection.*no derivative",
    ),
    "eigenvalues that are complex": (
        lambda h, p, d: jnp.linalg.eigvals(h[:WIDTH]).real,
        r"`eig` .*test_operations.*complex.*register_projection",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name):
    function, match = REFUSED[name]
    with pytest.raises(TraceError, match=f"(?s){match}"):
        pjax.displacement(loss_of(function))(params(), data())


@pytest.mark.parametrize("name", ["a loop until it converges", "a product of segments"])
def test_what_has_no_derivative_is_refused_with_the_fallback_too(name):
    function, match = REFUSED[name]
    with pytest.raises(TraceError, match=f"(?s){match}"):
        pjax.displacement(loss_of(function), fallback="gauss-newton")(params(), data())
