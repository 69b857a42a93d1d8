"""The problem of a network against the lifted algorithm in full values, and its fixed points."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax import solvers
from pjax.problem import layouts
from pjax.rules import Joined
from tests.naive import NaiveProblem
from tests.selection import mostly_slow


def mlp(params, x, skip=False):
    hidden = []
    for weight, bias in zip(params["w"][:-1], params["b"], strict=True):
        x = jax.nn.relu(x @ weight + bias)
        hidden.append(x)
    if skip:
        x = jnp.concatenate(hidden, axis=-1)
    return x @ params["w"][-1]


def residual_mlp(params, x):
    """Additive skips, a tied weight and an output read twice: odd cycles and fan-out."""
    h = jax.nn.relu(x @ params["w"][0] + params["b"][0])
    g = jax.nn.relu(h @ params["square"] + params["b"][0])
    h = h + g
    h = h + jax.nn.relu(h @ params["square"].T)
    return h @ params["w"][-1]


def pinned_reader(params, x):
    """A constant matrix reads outputs of two levels: their copies are written in parts."""
    h = jax.nn.relu(x @ params["w"][0] + params["b"][0])
    both = jnp.concatenate([h, jax.nn.relu(h @ params["square"])], axis=-1)
    return both @ jnp.cos(jnp.arange(24.0)).reshape(8, 3)


def make(seed, skip=False, sizes=(5, 4, 4, 3), batch=6):
    rng = np.random.default_rng(seed)
    last = sum(sizes[1:-1]) if skip else sizes[-2]
    shapes = [*itertools.pairwise(sizes[:-1]), (last, sizes[-1])]
    params = {
        "w": [jnp.array(rng.normal(size=s) * np.sqrt(2 / s[0])) for s in shapes],
        "b": [jnp.array(rng.normal(size=n) * 0.1) for n in sizes[1:-1]],
        "square": jnp.array(rng.normal(size=(sizes[1], sizes[1])) / 2),
    }
    x = jnp.array(rng.normal(size=(batch, sizes[0])))
    y = jax.nn.one_hot(rng.integers(0, sizes[-1], batch), sizes[-1], dtype=jnp.float64)
    return params, x, y


def loss_of(name, seed):
    skip = name == "skip"
    params, x, y = make(seed, skip)
    if name == "residual":
        params = {**params, "w": [params["w"][0], params["w"][-1]], "b": params["b"][:1]}
        return lambda p: pjax.cross_entropy(residual_mlp(p, x), y), params
    if name == "pinned":
        params = {**params, "w": params["w"][:1], "b": params["b"][:1]}
        return lambda p: pjax.cross_entropy(pinned_reader(p, x), y), params
    params.pop("square")
    return lambda p: pjax.cross_entropy(mlp(p, x, skip), y), params


METRIC = pjax.metrics.Uniform(weight=1.7, activation=0.6)


def assert_update_equals(expected, solver, name, fanout):
    """An update by `solver` leads to the parameters `expected`, by number of leaf."""
    fn, params = loss_of(name, 0)
    optimizer = pjax.optim.Optimizer(solver, METRIC, fanout)
    moved, _ = optimizer.update(fn, params)
    before, after = (jax.tree_util.tree_leaves(tree) for tree in (params, moved))
    assert len(after) == len(expected)
    for number, value in enumerate(after):
        assert float(jnp.max(jnp.abs(value - before[number]))) > 1e-6
        np.testing.assert_allclose(value, expected[number], rtol=0, atol=1e-8)


def problem_of(name, *, reflecting, grouping, fanout):
    fn, params = loss_of(name, 0)
    return pjax.feasibility_problem(
        fn, params, metric=METRIC, fanout=fanout, grouping=grouping, reflecting=reflecting
    )


NETWORKS = ("plain", "skip", "residual", "pinned")


@pytest.mark.parametrize(
    ("name", "grouping", "reflecting", "fanout"),
    mostly_slow(
        [
            (name, grouping, reflecting, fanout)
            for name in NETWORKS
            for grouping, reflecting in (("colours", False), ("levels", False), ("colours", True))
            for fanout in ("exact", "paper")
        ],
        [
            ("plain", "colours", False, "paper"),
            ("skip", "levels", False, "exact"),
            ("residual", "colours", True, "exact"),
            ("pinned", "colours", False, "exact"),
        ],
    ),
)
def test_projections_equal_the_lifted_ones(x64, name, grouping, reflecting, fanout):
    """Compact and structured storages follow the lifted algorithm for several sweeps, distances
    included.
    """
    problem = problem_of(name, reflecting=reflecting, grouping=grouping, fanout=fanout)
    naive = NaiveProblem(problem)
    state, copies = problem.initial(), naive.initial()
    project = jax.jit(problem.project, static_argnums=0)
    for _ in range(4):
        distances, expected = [], []
        for group in range(problem.num_groups):
            new, new_copies = project(group, state), naive.project(group, copies)
            distances.append(float(problem.distance(new, state)))
            expected.append(np.sqrt(naive.squared_distance(new_copies, copies)))
            state, copies = new, new_copies
        if name in ("skip", "pinned") and grouping == "levels":
            # The last layer reads producers of several levels: the first of them counts all its
            # spread.
            distances, expected = np.linalg.norm(distances), np.linalg.norm(expected)
        np.testing.assert_allclose(distances, expected, rtol=1e-7, atol=1e-9)
    assert float(problem.distance(state, problem.initial())) > 0.1  # something moved
    expected = naive.parameters(copies)
    for number, deviation in enumerate(problem.parameter_deviations(state)):
        assert deviation is not None
        value = problem.leaves[number] + deviation
        np.testing.assert_allclose(value, expected[number], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "fanout"),
    mostly_slow(
        itertools.product(NETWORKS, ("exact", "paper")), [("skip", "exact"), ("pinned", "paper")]
    ),
)
def test_douglas_rachford_equals_the_lifted_one(x64, name, fanout):
    problem = problem_of(name, reflecting=True, grouping="colours", fanout=fanout)
    naive = NaiveProblem(problem)
    z = naive.initial()
    for _ in range(6):
        shadow = naive.project(0, z)
        moved = naive.project(1, {i: 2 * shadow[i] - z[i] for i in z})
        z = {i: z[i] + moved[i] - shadow[i] for i in z}
    expected = naive.parameters(naive.project(0, z))
    assert_update_equals(expected, solvers.DouglasRachford(steps=6), name, fanout)


@pytest.mark.parametrize("name", mostly_slow(["skip", "pinned"], ["pinned"]))
def test_cyclic_douglas_rachford_equals_the_lifted_one(x64, name):
    """Slots that several levels write to keep the copies that are not theirs."""
    problem = problem_of(name, reflecting=True, grouping="levels", fanout="exact")
    naive = NaiveProblem(problem)
    z = naive.initial()
    count = problem.num_groups
    for _ in range(3):
        for first, second in zip(range(count), [*range(1, count), 0], strict=True):
            shadow = naive.project(first, z)
            moved = naive.project(second, {i: 2 * shadow[i] - z[i] for i in z})
            z = {i: z[i] + moved[i] - shadow[i] for i in z}
    expected = naive.parameters(naive.project(0, z))
    assert_update_equals(expected, solvers.CyclicDouglasRachford(steps=3), name, "exact")


@pytest.mark.parametrize(
    "solver",
    mostly_slow(
        [
            solvers.AlternatingProjections,
            solvers.CyclicProjections,
            solvers.DouglasRachford,
            solvers.CyclicDouglasRachford,
            solvers.DifferenceMap,
            solvers.AlternatingReflections,
        ],
        [solvers.CyclicProjections, solvers.DouglasRachford],
    ),
)
def test_a_forward_pass_that_hits_its_target_rests(x64, solver):
    """Two layers, one sample, the target equal to the output: every constraint holds, nothing
    moves.
    """
    rng = np.random.default_rng(3)
    params = {"w": [jnp.array(rng.normal(size=s)) for s in ((3, 4), (4, 2))]}
    x = jnp.array(rng.normal(size=(1, 3)))

    def model(p):
        return jax.nn.relu(x @ p["w"][0]) @ p["w"][1]

    target = model(params)
    optimizer = pjax.optim.Optimizer(solver(steps=20))
    moved, residual = optimizer.update(lambda p: pjax.squared_error(model(p), target), params)
    for before, after in zip(params["w"], moved["w"], strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(model(moved), target)
    assert float(residual) == 0
    assert residual.verdict == solvers.Verdict.CONVERGING


def test_residuals_name_the_nodes(x64):
    fn, params = loss_of("skip", 0)
    problem = pjax.feasibility_problem(fn, params)
    residuals = jax.jit(problem.residuals)()
    assert len(residuals) == len(problem.graph.nodes)
    loss = [value for name, value in residuals.items() if "cross_entropy" in name]
    others = [value for name, value in residuals.items() if "cross_entropy" not in name]
    assert float(loss[0]) > 0.1
    assert max(map(float, others)) == 0


@pytest.mark.parametrize("name", mostly_slow(["skip", "residual", "pinned"], ["skip"]))
def test_a_projection_leaves_no_residual_on_its_side(x64, name):
    """What a side satisfies stays; what the other side moves, it moves by its nodes' residuals."""
    problem = problem_of(name, reflecting=True, grouping="colours", fanout="exact")
    project = jax.jit(problem.project, static_argnums=0)
    residuals = jax.jit(problem.residuals)
    state = problem.initial()
    for group in (0, 1, 0, 1):
        state = project(group, state)
        squares = [0.0, 0.0]
        for name_of_node, value in residuals(state).items():
            node = problem.graph.nodes[int(name_of_node.split()[0])]
            mine = node.index in problem.layout.groups[group]
            if mine and node.kind != "loss":
                assert float(value) < 1e-7
            squares[group if mine else 1 - group] += float(value) ** 2
        moved = float(problem.distance(project(1 - group, state), state))
        np.testing.assert_allclose(moved**2, squares[1 - group])
        assert moved > 1e-3


def test_residuals_that_need_copies_are_refused(x64):
    problem = problem_of("plain", reflecting=False, grouping="colours", fanout="exact")
    project = jax.jit(problem.project, static_argnums=0)
    state = project(1, project(0, problem.initial()))
    with pytest.raises(ValueError, match="needs the copies of its operands"):
        problem.residuals(state)


def test_sizes_count_every_copy(x64):
    params, x, y = make(0, sizes=(5, 4, 4, 3), batch=6)
    problem = pjax.feasibility_problem(
        lambda p, x, y: pjax.cross_entropy(mlp(p, x), y), {k: params[k] for k in "wb"}, x, y
    )
    sizes = problem.sizes()
    dots = 6 * 4 * 5 + 2 * 6 * 4 * 4 + 2 * 6 * 3 * 4
    relus = 2 * (6 * 4 + 6 * 4)
    assert sizes.edge_variables == dots + relus + 6 * 3
    stored = (5 * 4 + 1) + (6 * 4 + 1 + 4 * 4 + 1) + (6 * 4 + 1 + 4 * 3 + 1) + relus + 6 * 3
    assert sizes.stored == stored
    assert sizes.bytes == 8 * stored


def test_weighted_rows_and_masks(x64):
    """A mean and a sum are the same problem; a masked row asks for nothing."""
    params, x, y = make(1)
    params = {k: params[k] for k in "wb"}
    optimizer = pjax.optim.AlternatingProjections(steps_per_update=5)

    def update(reduce, x, y):
        new, _ = optimizer.update(lambda p: reduce(pjax.cross_entropy(mlp(p, x), y)), params)
        return new

    rows = update(lambda loss: loss, x, y)
    for reduce in (jnp.mean, jnp.sum, lambda loss: 0.3 * jnp.mean(loss) + 1):
        assert_trees_close(update(reduce, x, y), rows, 1e-12)
    problem = pjax.feasibility_problem(
        lambda p: jnp.sum(jnp.array([1, 0, 1, 2, 1, 1.0]) * pjax.cross_entropy(mlp(p, x), y)),
        params,
    )
    state = jax.jit(problem.project, static_argnums=0)(0, problem.initial())
    (slot,) = problem.graph.losses[0].slots
    moves = jnp.abs(problem.mean(state, problem.graph.slots[slot])).sum(-1)
    assert moves[1] == 0
    assert (moves[jnp.array([0, 2, 3, 4, 5])] > 0).all()


def assert_trees_close(a, b, tolerance):
    for x, y in zip(jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance)


def test_slots_of_parameters_alone_are_weights():
    """Also through indices that are data, and through functions of parameters; not with data
    mixed in.
    """
    x, y = jnp.ones((4, 3)), jnp.ones((4, 2)) / 2
    rows = jnp.array([0, 2, 2])

    def kinds(weight):
        problem = pjax.feasibility_problem(
            lambda p: pjax.cross_entropy(x @ weight(p), y), jnp.ones((3, 2))
        )
        node = next(n for n in problem.graph.nodes if n.name == "dot")
        return [problem.graph.slots[index].kind for index in node.slots]

    assert kinds(lambda p: p) == ["weight"]
    assert kinds(lambda p: p[rows]) == ["weight"]
    assert kinds(jnp.sign) == ["weight"]
    assert kinds(lambda p: p * x[:3, :2]) == ["activation"]


def test_labels_that_are_not_numbers_trace():
    problem = pjax.feasibility_problem(
        lambda p: pjax.cross_entropy(jnp.ones((4, 3)) @ p, jnp.ones((4, 2)) * jnp.nan),
        jnp.ones((3, 2)),
    )
    assert [node.kind for node in problem.graph.nodes] == ["parameter", "operation", "loss"]


@pytest.mark.parametrize(
    "solver",
    [
        pjax.solvers.CyclicProjections(steps=3),
        pytest.param(pjax.solvers.CyclicDouglasRachford(steps=3), marks=pytest.mark.slow),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("splitting", ["layer", pytest.param("neuron", marks=pytest.mark.slow)])
def test_slots_in_parts_follow_whole_ones(x64, monkeypatch, solver, splitting):
    """Slots that join producers, before a layer and before a loss: parts change nothing."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = [jax.random.normal(key, (3, 3)) for key in keys[:3]]
    x = jax.random.normal(keys[3], (4, 3))

    def fn(params):
        first = jax.nn.relu(x @ params[0])
        second = jax.nn.relu(first @ params[1])
        both = jnp.concatenate([first, 2 * second], axis=1)
        rows = jnp.stack([both[:, :3] @ params[2], second])
        return jnp.mean(pjax.squared_error(rows, jnp.ones_like(rows))) + jnp.mean(
            pjax.squared_error(both, jnp.zeros_like(both))
        )

    def solve():
        made = pjax.feasibility_problem(
            fn,
            params,
            splitting=splitting,
            grouping=solver.grouping,
            reflecting=True,  # residuals need the copies
            metric=pjax.metrics.Uniform(),
        )
        state, history = solver.solve(made)
        means = [made.mean(state, slot) for slot in made.graph.slots]
        size = made.sizes().bytes, made.sizes().edge_variables
        return made, (means, history.distances, made.residuals(state), size)

    made, found = solve()
    assert any(isinstance(storage, Joined) for storage in made.layout.storages)
    monkeypatch.setattr(layouts, "_is_join", lambda slot: False)
    layouts._LAYOUTS.clear()
    jax.clear_caches()
    made, expected = solve()
    assert not any(isinstance(storage, Joined) for storage in made.layout.storages)
    layouts._LAYOUTS.clear()
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-10, atol=1e-12)
