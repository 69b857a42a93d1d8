"""What becomes one node, and what must not: fusion absorbs no value that something else reads."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pjax
from pjax.graph import build_graph
from pjax.patterns import piecewise
from pjax.program import read
from pjax.projections import linear
from pjax.projections.piecewise import RELU
from pjax.rules import Affine, ScalarFunction
from pjax.rules.products import PinnedBilinear
from pjax.trace import trace

X = jnp.arange(12.0).reshape(4, 3) / 7 - 0.8
Y = jnp.zeros((4, 3))
PARAMS = {"w": jnp.ones((3, 3)), "v": jnp.ones((3, 3)), "b": jnp.ones(3), "x": X}


def graph_of(fn, params=None):
    def loss(p):
        out = fn(p)
        outs = out if isinstance(out, (list, tuple)) else [out]
        return sum(jnp.sum(pjax.squared_error(o, jnp.zeros(o.shape))) for o in outs)

    return build_graph(trace(loss, PARAMS if params is None else params)[0])


def operations(graph):
    return [node for node in graph.nodes if node.kind == "operation"]


def names(fn):
    return [node.name for node in operations(graph_of(fn))]


def readers_of(graph, name):
    """The names of the nodes that read the (only) node of this name."""
    (index,) = [node.index for node in graph.nodes if node.name == name]
    return sorted(
        graph.nodes[reader].name for producer, reader in graph.edges() if producer == index
    )


# --- What fuses ----------------------------------------------------------------------------------


def test_a_dense_layer_is_a_product_and_a_sum_relu():
    graph = graph_of(lambda p: jax.nn.relu(p["x"] @ p["w"] + p["b"]))
    assert [node.name for node in operations(graph)] == ["dot", "sum_relu"]
    node = operations(graph)[1]
    assert isinstance(node.rule, Affine)
    assert node.rule.function == RELU
    assert len(node.slots) == 2
    # The bias is read through its broadcast; the reference is the argument of the relu.
    first, second = (graph.slots[i] for i in node.slots)
    assert first.route.direct
    assert {e.name for e in second.route.equations} == {"broadcast_in_dim"}
    inner, offset = node.inner  # pyright: ignore[reportGeneralTypeIssues]
    (add,) = [e for e in graph.program.equations if inner in e.outputs]
    assert (add.name, offset) == ("add", None)


def test_a_relu_of_a_shifted_or_scaled_value_is_still_a_relu():
    assert names(lambda p: jax.nn.relu(p["x"] @ p["w"] + 0.3)) == ["dot", "relu"]
    assert names(lambda p: jax.nn.relu(0.7 - 0.3 * p["x"])) == ["relu"]
    assert names(lambda p: jax.nn.relu(p["x"] @ p["w"] + p["b"] + 0.3)) == ["dot", "sum_relu"]
    assert names(lambda p: jnp.maximum(p["x"], 0.3)) == ["max"]
    assert names(lambda p: jax.nn.relu(p["x"]) + 0.3) == ["add"]


def test_a_sum_takes_in_scalings_and_data():
    def fn(p):
        return 2 * p["x"] - (p["x"] @ p["w"]) / 4 + X * (3 * p["b"]) - 1

    graph = graph_of(fn)
    *_, node = operations(graph)
    assert isinstance(node.rule, Affine)
    assert [term.scale for term in node.rule.terms] == [2.0, -0.25, 1.0]
    # A scaling on the far side of a wire (the broadcast) is a node of its own.
    assert [n.name for n in operations(graph)] == ["dot", "mul", "sub"]
    assert [len(term.factors) for term in node.rule.terms] == [0, 0, 1]


def test_factors_before_and_after_a_reduction():
    t = jnp.ones((2, 4, 3))
    graph = graph_of(lambda p: (p["x"] * t * 2).sum(0) / X[0], {"x": X})
    (node,) = operations(graph)
    assert isinstance(node.rule, Affine)
    (term,) = node.rule.terms
    assert term.axes == (0,)
    # From the result: the division has the shape of the sum, the product that of the slot.
    assert term.factors == ((True, True), (False, False))
    assert term.scale == 2.0


def test_a_chain_of_one_variable_is_one_function():
    def fn(p):
        h = p["x"] * 2 - 0.5
        return jnp.where(h > 1, 1.0, jnp.where(h < -1, -1.0, h)) * 3 + jax.nn.relu(h)

    (node,) = operations(graph_of(fn))
    assert isinstance(node.rule, Affine)
    assert node.rule.function is not None
    u = jnp.linspace(-3, 3, 101)
    np.testing.assert_allclose(node.rule.function(u), fn({"x": u}), atol=1e-5)


def shrunk(x):
    """What becomes of `x` by the proximal operator of `|x|/2`."""
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - 0.5, 0)


@pytest.mark.parametrize("splitting", ["neuron", "layer"])
@pytest.mark.parametrize(
    ("written", "same"),
    [
        (lambda x: x * (x > 0), jax.nn.relu),
        (lambda x: x * pjax.step(x), jax.nn.relu),
        (lambda x: x * jnp.sign(x) + 1, lambda x: jnp.abs(x) + 1),
        (shrunk, lambda x: x - jnp.clip(x, -0.5, 0.5)),
        (lambda x: (x > -1) * x * (x < 1), lambda x: jnp.where(jnp.abs(x) < 1, x, 0)),
    ],
)
def test_a_product_that_is_piecewise_linear_is_exact(written, same, splitting):
    def rule(function):
        def loss(p):
            return pjax.squared_error(function(p["x"] @ p["w"]), jnp.zeros((4, 3))).sum()

        *_, node = operations(build_graph(trace(loss, PARAMS)[0], splitting))
        assert isinstance(node.rule, Affine)
        return node.rule

    assert rule(written).function == rule(same).function


def test_conversions_of_conditions_fuse_and_those_of_numbers_are_wires():
    graph = graph_of(lambda p: (p["x"] > 0).astype(jnp.float32) - 0.5)
    assert len(operations(graph)) == 1
    graph = graph_of(lambda p: jax.nn.relu(p["x"].astype(jnp.bfloat16)))
    (node,) = operations(graph)
    (slot,) = (graph.slots[i] for i in node.slots)
    assert [e.name for e in slot.route.equations] == ["convert_element_type"]
    assert slot.dtype == jnp.float32  # of deviations


# --- What must not -------------------------------------------------------------------------------


def test_a_value_with_two_readers_has_a_node():
    """`h` is read by the relu and by the product: it stays, and both read it."""

    def fn(p):
        h = p["x"] @ p["w"] + p["b"]
        return jax.nn.relu(h) + h @ p["v"]

    graph = graph_of(fn)
    assert Counter(n.name for n in operations(graph)) == Counter(
        ["dot", "add", "relu", "dot", "add"]
    )
    sums = [n for n in operations(graph) if n.name == "add"]
    h = sums[0]
    readers = {reader for producer, reader in graph.edges() if producer == h.index}
    assert {graph.nodes[r].name for r in readers} == {"relu", "dot"}


def test_a_relu_that_a_product_reads_stays_when_a_residual_reads_it_too():
    def fn(p):
        h = jax.nn.relu(p["x"])
        return h + p["x"], h @ p["w"]

    graph = graph_of(fn)
    assert sorted(n.name for n in operations(graph)) == ["add", "dot", "relu"]
    assert readers_of(graph, "relu") == ["add", "dot"]


def test_a_sum_that_is_reduced_and_also_read_stays():
    def fn(p):
        s = p["x"] + p["b"]
        return jnp.abs(s.sum(0)), s @ p["w"]

    graph = graph_of(fn)
    assert readers_of(graph, "add") == ["abs", "dot"]


def test_a_prediction_that_something_else_reads_stays():
    def fn(p):
        logits = p["x"] + p["b"]
        return logits, jax.nn.relu(logits)

    graph = graph_of(fn)
    assert readers_of(graph, "add") == ["relu", "squared_error"]


def test_a_value_read_twice_by_one_operation_stays():
    def fn(p):
        h = p["x"] + p["b"]
        return jax.lax.dot_general(h, h, (((1,), (1,)), ((), ())))

    graph = graph_of(fn)
    assert names(fn) == ["add", "dot"]
    product = operations(graph)[1]
    first, second = (graph.slots[i].producers for i in product.slots)
    assert first == second


def test_a_value_read_through_a_wire_stays():
    def fn(p):
        h = 2 * p["x"] + p["b"]
        return h + h[::-1]

    graph = graph_of(fn)
    assert names(fn) == ["add", "add"]
    last = operations(graph)[1]
    assert len(last.slots) == 2


def test_stopping_a_gradient_cuts():
    def fn(p):
        h = jax.lax.stop_gradient(p["x"] @ p["w"])
        return jax.nn.relu(h + p["b"] @ p["v"])

    graph = graph_of(fn)
    dots = [n for n in operations(graph) if isinstance(n.rule, PinnedBilinear) or n.name == "dot"]
    assert len(dots) == 1
    assert [n.name for n in graph.parameters] == ["['b']", "['v']"]


@st.composite
def recipes(draw):
    """A random straight-line function: steps `(operation, operands)` on earlier values."""
    steps = []
    for number in range(draw(st.integers(1, 9))):
        operation = draw(st.sampled_from(OPERATIONS))
        count = 2 if operation in BINARY else 1
        steps.append((operation, [draw(st.integers(0, number + 1)) for _ in range(count)]))
    heads = draw(st.lists(st.integers(2, len(steps) + 1), min_size=1, max_size=3))
    return steps, heads


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "max": jnp.maximum,
    "dot": lambda a, b: a @ b.T,
}
UNARY = {
    "double": lambda a: 2 * a,
    "zero": lambda a: 0 * a,
    "shift": lambda a: a - 0.3,
    "data": lambda a: a * X[:, :1],
    "relu": jax.nn.relu,
    "abs": jnp.abs,
    "step": pjax.step,
    "flip": lambda a: a[::-1],
    "centre": lambda a: a - a.mean(0),
    "round": jnp.round,
}
OPERATIONS = [*BINARY, *UNARY]


def run(recipe, p):
    steps, heads = recipe
    values: list[Any] = [p["x"], p["y"]]
    for operation, operands in steps:
        args = [values[i % len(values)] for i in operands]
        values.append((BINARY.get(operation) or UNARY[operation])(*args))
    return [values[h] for h in heads]


def loss_of(recipe):
    def loss(p):
        return sum(jnp.sum(pjax.squared_error(out, TARGET)) for out in run(recipe, p))

    return loss


RNG = np.random.default_rng(0)
TARGET = np.zeros((4, 4), np.float32)
POINTS = [{name: RNG.normal(size=(4, 4)).astype(np.float32) for name in "xy"} for _ in range(2)]


def inside(graph, node):
    """The variables that a node has absorbed: computed on the way from its slots to its output."""
    program = graph.program
    definitions = {out: e for e in program.equations for out in e.outputs}
    stops = {graph.slots[i].variable for i in node.slots}
    found: set[int] = set()
    pending = [node.output]
    while pending:
        for atom in definitions[pending.pop()].inputs:
            if program.is_variable(atom) and atom not in stops and atom not in found:
                found.add(atom)
                pending.append(atom)
    return found


@settings(max_examples=60, deadline=None)
@given(recipes())
@example(([("add", [0, 0]), ("mul", [0, 0]), ("flip", [2]), ("add", [2, 3])], [4, 5]))
def test_random_functions_have_sound_graphs(recipe):
    program, _, consts, _ = trace(loss_of(recipe), POINTS[0])
    if not program.is_variable(program.outputs[0]):
        return  # the heads do not depend on parameters
    graph = build_graph(program)
    with_node = {node.output for node in graph.nodes}
    predictions = {graph.slots[i].variable for node in graph.losses for i in node.slots}
    cones = piecewise.find_cones(program, frozenset(predictions))
    for slot in graph.slots:
        assert set(slot.route.sources) <= with_node
    for node in operations(graph):
        absorbed = inside(graph, node)
        # A function of one variable computes for itself what is a value for others, too.
        if not isinstance(node.rule, ScalarFunction):
            assert absorbed.isdisjoint(with_node)
        for equation in program.equations:
            if absorbed.issuperset(equation.outputs) or node.output in equation.outputs:
                continue
            # Read elsewhere: only where it is a function of one variable, which that reader takes
            # in too.
            for atom in absorbed.intersection(a for a in equation.inputs if isinstance(a, int)):
                assert cones[atom].base != atom
    # Each node's formula leads from the program's values at one point to those at another.
    first, second = (program.evaluate(list(point.values()), consts) for point in POINTS)
    for node in operations(graph):
        rule = node.rule
        if not isinstance(rule, Affine):
            continue
        knowns = [read(first, atom) for atom in node.knowns]
        moves = [
            jnp.asarray(second[v] - first[v]) for v in (graph.slots[i].variable for i in node.slots)
        ]
        axes = [term.axes for term in rule.terms]
        change = linear.forward(moves, rule._coefficients(knowns), axes)
        inner, offset = node.inner if node.inner is not None else (node.output, None)
        expected = second[inner] - first[inner]
        scale = 1 + max(float(jnp.max(jnp.abs(move))) for move in [*moves, expected])
        np.testing.assert_allclose(change / scale, expected / scale, atol=1e-4)
        if rule.function is not None:
            argument = second[inner] - (0 if offset is None else read(second, offset))
            value = rule.function(argument) + (second[inner] - argument)
            output = second[node.output]
            error = np.abs(value - output) / (1 + np.abs(output))
            # At a jump the program may be on either side.
            ends = [piece.upper for piece in rule.function.pieces[:-1]]
            gaps = [np.abs(np.asarray(argument) - end) for end in ends]
            assert np.all((error < 1e-4) | (np.min(gaps, axis=0) < 1e-4))
