"""Layer splitting: nearest points against dense linear algebra, and the graphs that it makes."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pjax
from pjax import metrics
from pjax.projections import layer
from pjax.projections.gains import largest
from pjax.projections.products.dot_general import DotGeneral
from pjax.projections.products.operation import Multiply
from pjax.rules import Addend, Geometry, LayerSum, Product, Reference
from pjax.rules.layer_terms import product_gain
from tests.conftest import enable_x64


def dense_parts(rng, count, size, curved):
    """Random linear parts of 2 to 9 entries each, and their matrices."""
    parts, matrices, weights = [], [], []
    for _ in range(count):
        width = int(rng.integers(2, 10))
        matrix = jnp.asarray(rng.normal(size=(size, width)) * 10 ** rng.uniform(-2, 2))
        weight = float(10 ** rng.uniform(-3, 3))
        compliance = float(np.linalg.norm(matrix, 2) ** 2) / weight
        parts.append(
            layer.Part(
                lambda x, m=matrix: m @ x, lambda y, m=matrix: m.T @ y, weight, compliance, curved
            )
        )
        matrices.append(np.asarray(matrix))
        weights += [weight] * width
    return parts, np.concatenate(matrices, axis=1), np.array(weights)


def objective(matrix, weights, target_weight, request, move):
    return np.sum(weights * move**2) + np.sum(target_weight * (matrix @ move - request) ** 2)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3), rows=st.integers(1, 12))
def test_converged_conjugate_gradients_are_the_nearest_point(seed, count, rows):
    """With as many steps as rows the move is the minimiser, weights of 0 included."""
    rng = np.random.default_rng(seed)
    with enable_x64():
        parts, matrix, weights = dense_parts(rng, count, rows, curved=True)
        target_weight = rng.uniform(0, 3, rows) * (rng.random(rows) > 0.2)
        request = rng.normal(size=rows) * 10 ** rng.uniform(-12, 12)
        moves, change, _ = layer.solve(
            parts, jnp.asarray(request), jnp.asarray(target_weight), 6 * rows
        )
        move = np.concatenate([np.asarray(m) for m in moves])
        normal = matrix.T @ (target_weight[:, None] * matrix) + np.diag(weights)
        best = np.linalg.solve(normal, matrix.T @ (target_weight * request))
        least = objective(matrix, weights, target_weight, request, best)
        found = objective(matrix, weights, target_weight, request, move)
        assert found <= least * (1 + 1e-5) + 1e-12 * np.sum(target_weight * request**2)
        np.testing.assert_allclose(
            change, matrix @ move, atol=1e-9 * np.abs(request).max(), rtol=1e-6
        )


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3))
def test_every_step_of_conjugate_gradients_decreases_the_objective(seed, count):
    rng = np.random.default_rng(seed)
    with enable_x64():
        parts, matrix, weights = dense_parts(rng, count, 9, curved=True)
        target_weight = rng.uniform(0.1, 3, 9)
        request = rng.normal(size=9)
        values = [np.sum(target_weight * request**2)]
        for steps in range(1, 7):
            moves, *_ = layer.solve(parts, jnp.asarray(request), jnp.asarray(target_weight), steps)
            move = np.concatenate([np.asarray(m) for m in moves])
            values.append(objective(matrix, weights, target_weight, request, move))
        assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(values))


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3))
def test_bounded_parts_never_overshoot(seed, count):
    """A diagonal step decreases the objective where all outputs weigh the same, and is the nearest
    point for orthogonal rows.
    """
    rng = np.random.default_rng(seed)
    with enable_x64():
        parts, matrix, weights = dense_parts(rng, count, 7, curved=False)
        target_weight = np.full(7, rng.uniform(0.1, 3))
        request = rng.normal(size=7)
        moves, *_ = layer.solve(parts, jnp.asarray(request), jnp.asarray(target_weight), 1)
        move = np.concatenate([np.asarray(m) for m in moves])
        found = objective(matrix, weights, target_weight, request, move)
        assert found <= np.sum(target_weight * request**2) * (1 + 1e-9)

        gain = 10 ** rng.uniform(-2, 2)
        rows = np.linalg.qr(rng.normal(size=(9, 7)))[0].T * np.sqrt(gain)
        part = layer.Part(lambda x: rows @ x, lambda y: rows.T @ y, 0.3, gain / 0.3, False)
        (move,), *_ = layer.solve([part], jnp.asarray(request), jnp.asarray(target_weight), 1)
        normal = rows.T @ (target_weight[:, None] * rows) + 0.3 * np.eye(9)
        best = np.linalg.solve(normal, rows.T @ (target_weight * request))
        np.testing.assert_allclose(move, best, rtol=1e-9, atol=1e-12)


def make_problem(fn, params, metric):
    return pjax.feasibility_problem(fn, params, splitting="layer", metric=metric, grouping="levels")


def layer_node(problem):
    (node,) = [n for n in problem.graph.nodes if isinstance(n.rule, LayerSum)]
    return node


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("rows", "width"), [(6, 20), (20, 6)])
def test_a_dense_layer_with_bias_is_the_joint_least_squares_solution(x64, dtype, rows, width):
    """Weights and bias in one solve, by the rows' Gram matrix or by the weights' shape."""
    rng = np.random.default_rng(rows)
    x, w, b, t = (
        jnp.asarray(rng.normal(size=s), dtype) for s in ((rows, width), (width, 3), (3,), (rows, 3))
    )
    metric = metrics.Uniform(weight=0.7, prox_step=2.0, iterations=40)
    problem = make_problem(
        lambda p: pjax.squared_error(x @ p["w"] + p["b"], t).sum(), {"w": w, "b": b}, metric
    )
    node = layer_node(problem)
    assert len(node.slots) == 2  # the bias has one entry per column, whatever the rows
    asked = problem.project(0, problem.initial())
    request = asked.slots[problem.graph.losses[0].slots[0]]
    found = problem.project(1, asked)
    data = np.concatenate([np.asarray(x, np.float64), np.ones((rows, 1))], axis=1)
    best = np.linalg.solve(data.T @ data + 0.7 * np.eye(width + 1), data.T @ np.asarray(request))
    tolerance = 1e-9 if dtype == "float64" else 1e-3
    dw, db = (np.asarray(found.slots[i]) for i in node.slots)
    scale = np.abs(best).max()
    np.testing.assert_allclose(dw, best[:-1], atol=tolerance * scale)
    np.testing.assert_allclose(db, best[-1], atol=tolerance * scale)
    output = np.asarray(found.slots[problem.graph.losses[0].slots[0]])
    np.testing.assert_allclose(output, data @ best, atol=tolerance * np.abs(output).max())


DENSE = {
    "rows first": (lambda x, w: jnp.einsum("nk,kc->nc", x, w), (30, 6), (6, 4), (4,)),
    "transposed": (lambda x, w: jnp.einsum("kn,ck->nc", x, w), (6, 30), (4, 6), (4,)),
    "columns first": (lambda x, w: jnp.einsum("ck,kn->cn", w, x), (6, 30), (4, 6), (4,)),
    "several axes": (
        lambda x, w: jnp.einsum("abkl,lkcd->abcd", x, w), (5, 6, 2, 3), (3, 2, 2, 4), (2, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("biases", [0, 1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_weights_and_biases_end_at_the_nearest_point(x64, name, biases):
    """For every order of axes."""
    fn, data, weights, bias = DENSE[name]
    steps, rng = 60, np.random.default_rng(0)
    x, w, *b = (jnp.asarray(rng.normal(size=shape)) for shape in (data, weights, *[bias] * biases))

    def output(w, b):
        total = 2.0 * fn(x, w)
        for c in b:
            total = total + 0.5 * (c[:, None] if name == "columns first" else c)
        return total

    target = jnp.asarray(rng.normal(size=jax.eval_shape(output, w, b).shape))
    problem = make_problem(
        lambda p: pjax.squared_error(output(p[0], p[1:]).reshape(1, -1), target.reshape(1, -1)),
        [w, *b],
        metrics.Uniform(iterations=steps),
    )
    node = next(n for n in problem.graph.nodes if isinstance(n.rule, LayerSum))
    rule, reference = node.rule, problem.reference(node.index)
    assert isinstance(rule, LayerSum)
    assert len(node.slots) == 1 + biases
    like = reference.output
    assert like is not None
    geometry = Geometry(0, (None,) * len(node.slots), (True,) * len(node.slots), steps)
    at = rule._operands(reference.inputs, reference.knowns)
    stiffness = tuple(0.3 + 0.4 * number for number in range(len(node.slots)))
    parts = rule._parts(at, stiffness, geometry, like)
    request = jnp.asarray(rng.normal(size=like.shape))
    moves, *_ = layer.solve(parts, request, jnp.asarray(0.8), steps)
    matrix = np.concatenate(
        [
            np.asarray(jax.jit(jax.jacobian(part.apply))(jnp.zeros_like(move))).reshape(
                like.size, -1
            )
            for part, move in zip(parts, moves, strict=True)
        ],
        axis=1,
    )
    stiff = np.concatenate(
        [np.full(move.size, s) for move, s in zip(moves, stiffness, strict=True)]
    )
    best = np.linalg.solve(
        0.8 * matrix.T @ matrix + np.diag(stiff), 0.8 * matrix.T @ np.asarray(request).ravel()
    )
    found = np.concatenate([np.asarray(move).ravel() for move in moves])
    np.testing.assert_allclose(found, best, atol=1e-9 * np.abs(best).max())


BILINEAR_FUNCTIONS = {
    "matmul": ((4, 5), (5, 3), lambda a, b: a @ b),
    "batched": ((2, 4, 5), (2, 5, 3), lambda a, b: a @ b),
    "product": ((4, 3), (4, 3), lambda a, b: a * b),
    "scores": ((2, 4, 5), (2, 3, 5), lambda a, b: jnp.einsum("bqd,bkd->bqk", a, b) / 5**0.5),
    "two products": ((4, 5), (5, 3), lambda a, b: a @ b + 0.5 * (a @ (2 * b))),
}


@pytest.mark.parametrize("size", [0.1, 3.0, 300.0])
@pytest.mark.parametrize("name", BILINEAR_FUNCTIONS)
def test_two_free_operands_stay_feasible_and_decrease_the_objective(x64, name, size):
    """However large the request: the output is the operation of the new operands, and the new point
    is nearer than one that rests and misses the target.
    """
    left, right, fn = BILINEAR_FUNCTIONS[name]
    rng = np.random.default_rng(7)
    params = {"a": jnp.asarray(rng.normal(size=left)), "b": jnp.asarray(rng.normal(size=right))}
    shape = jax.eval_shape(fn, params["a"], params["b"]).shape
    target = fn(params["a"], params["b"]) + size * jnp.asarray(rng.normal(size=shape))
    metric = metrics.Uniform(weight=1.3, prox_step=1e9, iterations=4)
    problem = make_problem(
        lambda p: pjax.squared_error(fn(p["a"], p["b"]), target).sum(), params, metric
    )
    asked = problem.project(0, problem.initial())
    for _ in range(2):
        before = asked
        asked = problem.project(1, asked)
    loss_slot = problem.graph.losses[0].slots[0]
    state = problem.project(1, problem.project(0, problem.initial()))
    moved = dict(zip("ab", [None, None], strict=True))
    deviations = problem.parameter_deviations(state)
    for leaf, name_of in enumerate("ab"):
        deviation = deviations[leaf]
        assert deviation is not None
        moved[name_of] = params[name_of] + deviation
    change = fn(moved["a"], moved["b"]) - fn(params["a"], params["b"])
    if name != "two products":  # an operand read twice is averaged by the consensus
        np.testing.assert_allclose(state.slots[loss_slot], change, atol=1e-9 * (1 + size**2))
    request = np.asarray(target - fn(params["a"], params["b"]))
    request = request * (1e9 / (1 + 1e9))
    node_state = [np.asarray(state.slots[i]) for n in problem.graph.nodes for i in n.slots
                  if isinstance(n.rule, LayerSum)]  # fmt: skip
    spent = sum(1.3 * np.sum(s**2) for s in node_state)
    missed = np.sum((np.asarray(state.slots[loss_slot]) - request) ** 2)
    assert spent + missed < np.sum(request**2)
    assert float(problem.distance(asked, before)) < float(problem.distance(before, state)) + 1e3


def test_a_converged_projection_of_a_product_is_stationary(x64):
    """Repeated from the same point, Gauss-Newton steps end where the objective's gradient is 0."""
    rng = np.random.default_rng(3)
    a, b, z = (jnp.asarray(rng.normal(size=s)) for s in ((4, 5), (5, 3), (4, 3)))
    rule = LayerSum((Product(DotGeneral((((1,), (0,)), ((), ())), (4, 5), (5, 3)), True, True),))

    def value(da, db):
        return jnp.sum(da**2) + jnp.sum(db**2) + 2.0 * jnp.sum(((a + da) @ (b + db) - z) ** 2)

    da, db = jnp.zeros_like(a), jnp.zeros_like(b)
    last = value(da, db)
    geometry = Geometry(0, (None, None), (True, True), 30)
    for _ in range(40):
        # The step about the current point, of the objective that began at 0: exact by completing
        # the square in the moves.
        reference = Reference((a, b), (), a @ b, None, geometry)
        parts = rule._parts([(a + da, b + db)], (1.0, 1.0), geometry, z)
        request = z - (a + da) @ (b + db) + da @ (b + db) + (a + da) @ db
        moves, *_ = layer.solve(parts, request, jnp.asarray(2.0), 30)
        new = [(1 - t) * d + t * m for t in (0.7,) for d, m in zip((da, db), moves, strict=True)]
        da, db = new
        assert reference.inputs[0] is a
    assert float(value(da, db)) < float(last)
    gradient = jax.jit(jax.grad(value, argnums=(0, 1)))(da, db)
    assert max(float(jnp.max(jnp.abs(g))) for g in gradient) < 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
def test_gains_are_bounds_and_close(x64, side):
    """From a fixed direction, for random matrices of every shape, also one by one in a batch."""
    rng = np.random.default_rng(0)
    for rows, inner, columns in [(1, 7, 3), (30, 20, 20), (4, 64, 10), (50, 10, 80)]:
        for batch in [(), (3,)]:
            axis = len(batch)
            numbers = (
                ((axis + 1,), (axis,)),
                (tuple(range(axis)), tuple(range(axis))),
            )
            op = DotGeneral(numbers, (*batch, rows, inner), (*batch, inner, columns))
            term = Product(op, True, True, 2.0)
            shape = op.right_shape if side == "left" else op.left_shape
            other = jnp.asarray(rng.normal(size=shape))
            ((gain, vector),) = largest([product_gain(term, side, (other, other), None)], 4)
            exact = 4 * np.max(np.linalg.svd(np.asarray(other), compute_uv=False)) ** 2
            assert 0.95 * exact < float(gain) < 1.5 * exact
            ((again, _),) = largest([product_gain(term, side, (other, other), vector)], 4)
            assert 1.15 * exact < float(again) < 1.5 * exact
    other = jnp.asarray(rng.normal(size=(4, 5)))
    gain = product_gain(Product(Multiply((4, 5)), True, True, 3.0), side, (other, other), None)
    np.testing.assert_allclose(gain, 9 * jnp.max(other**2))


def terms_of(fn, params, *args):
    problem = pjax.feasibility_problem(fn, params, *args, splitting="layer")
    return [n.rule.terms for n in problem.graph.nodes if isinstance(n.rule, LayerSum)]


def test_products_and_what_is_added_to_them_are_one_node():
    """A recurrent cell's two products and bias are one constraint; a shared product is its own."""
    x, h = jnp.ones((4, 3)), jnp.ones((4, 5))
    y = jax.nn.one_hot(jnp.arange(4) % 2, 2)
    params = {"w": jnp.ones((3, 5)), "u": jnp.ones((5, 5)), "b": jnp.ones(5), "v": jnp.ones((5, 2))}

    def cell(p):
        new = jax.nn.relu(x @ p["w"] + h @ p["u"] + p["b"][None, :])
        return pjax.cross_entropy(new @ p["v"], y)

    first, last = terms_of(cell, params)
    assert [type(term) for term in first] == [Product, Product, Addend]
    assert getattr(first[2], "dimensions", None) == (1,)
    assert [type(term) for term in last] == [Product]

    def shared(p):
        product = x @ p["w"]
        return pjax.cross_entropy((jax.nn.relu(product + p["b"]) + product) @ p["v"], y)

    sizes = [len(terms) for terms in terms_of(shared, {k: params[k] for k in "wbv"})]
    assert sizes == [1, 1]


def test_the_metric_and_the_splitting_must_fit():
    x, y = jnp.ones((4, 3)), jax.nn.one_hot(jnp.arange(4) % 2, 2)
    params = {"w": jnp.ones((3, 2))}

    def loss(p):
        return pjax.cross_entropy(x @ p["w"], y)

    with pytest.raises(ValueError, match='needs `splitting="layer"`'):
        pjax.feasibility_problem(loss, params, metric=metrics.Spectral())
    with pytest.raises(ValueError, match='must be "neuron" or "layer"'):
        pjax.feasibility_problem(loss, params, splitting="row")
