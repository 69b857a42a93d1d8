"""Operations in one set, their agreement in the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.problem import Copies, DividedProblem, Formulation, layout
from pjax.trace import trace


def divide(fn, params, *args, sets=()):
    program, leaves, consts, _ = trace(lambda p: fn(p, *args), params)
    found = layout(program, Formulation(grouping="levels", reflecting=True))
    return DividedProblem(found, leaves, consts, sets)


def network(params, x):
    for w in params:
        x = jnp.concatenate([x, jnp.ones((len(x), 1))], axis=1)
        x = pjax.threshold(x @ w, margin=0.7)
    return x


def loss(params, x, y):
    return jnp.mean(pjax.squared_error(network(params, x), y))


def relu_loss(params, x, y):
    hidden = jax.nn.relu(x @ params["a"] + params["b"])
    return jnp.mean(pjax.squared_error(hidden @ params["c"], y))


@pytest.fixture(params=["signs", "relu"])
def problem(request):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.choice([-1.0, 1.0], (5, 3)), jnp.float32)
    y = jnp.asarray(rng.choice([-1.0, 1.0], (5, 2)), jnp.float32)
    if request.param == "signs":
        params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 4), (5, 2))]
        return divide(loss, params, x, y)
    shapes = {"a": (3, 4), "b": (4,), "c": (4, 2)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    return divide(relu_loss, params, x, y)


def weighted(problem, seed=1):
    rng = np.random.default_rng(seed)
    return problem.weighted(
        [jnp.asarray(rng.uniform(0.5, 2, w.shape), w.dtype) for w in problem.weights]
    )


def product(problem, a, b):
    """`Σ g a·b` over all values that operations hold."""
    total = 0.0
    for place, weight in enumerate(problem.weights):
        total += jnp.sum(weight * a.outputs[place] * b.outputs[place])
        for x, y in zip(a.operands[place], b.operands[place], strict=True):
            of_copy = weight[..., None] if weight.ndim else weight
            total += jnp.sum(of_copy * x * y)
    return float(total)


def test_agreement_is_the_nearest_point(problem):
    """`z − P(z)` is orthogonal to all differences of points that agree: the set is affine."""
    problem = weighted(problem)
    state, first, second = (problem.random(jax.random.key(i)) for i in range(3))
    nearest = problem.project(1, state)
    for other in (first, second):
        along = problem.difference(problem.project(1, other), nearest)
        rest = problem.difference(state, nearest)
        size = float(problem.distance(along, problem.initial()))
        assert size > 0.1
        assert abs(product(problem, rest, along)) < 1e-4 * size
    again = problem.project(1, nearest)
    assert float(problem.distance(again, nearest)) < 1e-5


def test_agreement_holds_what_must_hold(problem):
    """Copies of one value are equal, data is data, predictions are labels."""
    nearest, agreed = weighted(problem).agree(problem.random(jax.random.key(0)))
    held = jax.tree.map(jnp.add, nearest, problem._reference())
    moved = problem.parameters(agreed)
    for node, operands, copies in zip(problem.nodes, problem.operands, held.operands, strict=True):
        for operand, values in zip(operands, copies, strict=True):
            if operand.slot is None:
                known = problem._value(node, operand)
                np.testing.assert_allclose(values, operand.storage.fill(known), atol=1e-6)
                continue
            producers = problem.graph.slots[operand.slot].producers
            kinds = {problem.graph.nodes[p].kind for p in producers}
            if kinds == {"parameter"} and problem.graph.slots[operand.slot].route.direct:
                leaf = moved[problem.graph.nodes[producers[0]].output]
                np.testing.assert_allclose(values, operand.storage.fill(leaf), atol=1e-5)
    (label,) = problem.labels
    place = [node.index for node in problem.nodes].index(label)
    (target,) = problem.labels[label][0].knowns
    np.testing.assert_allclose(held.outputs[place], target, atol=1e-6)


def test_operations_hold_by_themselves(problem):
    state = problem.project(0, problem.random(jax.random.key(3)))
    held = jax.tree.map(jnp.add, state, problem._reference())
    for node, operands, output in zip(problem.nodes, held.operands, held.outputs, strict=True):
        if node.name == "threshold_dot":
            reached = output * jnp.sum(operands[0] * operands[1], axis=-1)
            assert jnp.all(jnp.abs(output) == 1)
            assert jnp.all(reached > 0.7 - 1e-5)
    assert float(problem.distance(problem.project(0, state), state)) < 1e-3
    assert float(problem.distance(problem.project(1, state), state)) > 1e-2


def test_a_solution_is_in_both_sets():
    """Of parameters whose products keep the margin, labelled by the network itself."""
    rng = np.random.default_rng(2)
    params = [jnp.asarray(s * rng.normal(size=(4, 3)), jnp.float32) for s in (20.0, 20.0)]
    x = jnp.asarray(rng.choice([-1.0, 1.0], (6, 3)), jnp.float32)
    problem = divide(loss, params, x, network(params, x))
    rest = problem.initial()
    assert float(problem.distance(problem.project(0, rest), rest)) < 1e-4
    assert float(problem.distance(problem.project(1, rest), rest)) < 1e-5


def test_parameters_lie_in_their_set():
    params = [jnp.ones((4, 3))]
    x, y = jnp.ones((2, 3)), jnp.ones((2, 3))
    problem = divide(loss, params, x, y, sets=[pjax.sets.Sphere(1.0, axis=0)])
    _, agreed = problem.agree(problem.random(jax.random.key(0)))
    (found,) = problem.parameters(agreed)
    np.testing.assert_allclose(jnp.sum(found**2, axis=0), 1, rtol=1e-5)


def test_rows_that_do_not_count_have_no_label():
    def masked(params, x, y, counts):
        return jnp.sum(counts * pjax.squared_error(network(params, x), y))

    params = [jnp.ones((4, 3))]
    x, y = jnp.ones((2, 3)), -jnp.ones((2, 3))
    problem = divide(masked, params, x, y, jnp.array([1.0, 0.0]))
    state = problem.project(1, problem.random(jax.random.key(0)))
    (output,) = jax.tree.map(jnp.add, state, problem._reference()).outputs
    np.testing.assert_allclose(output[0], -1, atol=1e-6)
    assert jnp.all(jnp.abs(output[1] + 1) > 1e-3)


def test_margin_loss_is_a_set_of_predictions():
    def fn(params, x, y):
        return jnp.mean(pjax.margin_loss(x @ params, y, margin=0.5))

    x, y = jnp.eye(3), jnp.eye(3)
    problem = divide(fn, jnp.zeros((3, 3)), x, y)
    state = problem.project(1, problem.random(jax.random.key(0), 2.0))
    (output,) = jax.tree.map(jnp.add, state, problem._reference()).outputs
    assert jnp.all((2 * y - 1) * output >= 0.5 - 1e-6)


def test_solvers_of_two_sets_take_it():
    problem = divide(loss, [jnp.ones((4, 3))], jnp.ones((2, 3)), jnp.ones((2, 3)))
    state, history = pjax.solvers.DouglasRachford(steps=200, relaxation=0.5).solve(problem)
    assert isinstance(state, Copies)
    assert float(history) < 1e-3
    with pytest.raises(ValueError, match="levels"):
        pjax.solvers.CyclicProjections(steps=1).solve(problem)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda w, x: jnp.mean(pjax.cross_entropy(x @ w, x)), "no prediction that satisfies"),
        (lambda w, x: jnp.mean(pjax.squared_error((x @ w).reshape(-1), jnp.ones(9))), "reshaping"),
        (lambda w, x: -jnp.mean(pjax.squared_error(x @ w, x)), "negatively"),
        (
            lambda w, x: (
                jnp.mean(pjax.squared_error(x @ w, x)) + jnp.sum(pjax.squared_error(w, jnp.eye(3)))
            ),
            "output of one operation",
        ),
    ],
)
def test_what_cannot_be_divided(fn, message):
    with pytest.raises(pjax.TraceError, match=message):
        divide(fn, jnp.ones((3, 3)), jnp.eye(3))


def test_second_loss_of_one_prediction():
    def fn(w, x):
        out = pjax.threshold(x @ w, 1.0)
        return jnp.mean(pjax.squared_error(out, x)) + jnp.mean(pjax.squared_error(out, -x))

    with pytest.raises(pjax.TraceError, match="second loss"):
        divide(fn, jnp.ones((3, 3)), jnp.eye(3))
