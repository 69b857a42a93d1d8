"""Operations that users register: primitives and functions, batched, with data, and wrong ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pjax
from pjax.graph import build_graph
from pjax.problem import layouts
from pjax.program import REGISTRATIONS, TraceError, canonical, primitives
from pjax.rules import NodeSpec, Reference
from pjax.rules import registry as rules
from pjax.rules.registry import Registered
from pjax.trace import trace


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    builders, counts = dict(rules._BUILDERS), dict(REGISTRATIONS)
    yield
    rules._BUILDERS.clear()
    rules._BUILDERS.update(builders)
    REGISTRATIONS.clear()
    REGISTRATIONS.update(counts)
    layouts._LAYOUTS.clear()


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def register_tanh():
    """`argmin ρ(x' − x)² + W(tanh x' − z)²`: on a grid between x and artanh z, then by halving."""

    @pjax.register_projection(jax.lax.tanh_p, exactness="inexact")
    def project(inputs, target, input_weights, target_weight, **params):
        assert set(params) == {"accuracy"}
        (x,), (rho,) = inputs, input_weights
        aim = jnp.arctanh(jnp.clip(target, -0.999, 0.999))

        def cost(u):
            return rho * (u - x) ** 2 + target_weight * (jnp.tanh(u) - target) ** 2

        grid = x + (aim - x) * jnp.linspace(0, 1, 33).reshape(-1, *[1] * x.ndim)
        best = jnp.take_along_axis(grid, jnp.argmin(cost(grid), 0)[None], 0)[0]

        def halve(_, state):
            u, step = state
            near = jnp.stack([u, u - step, u + step])
            return jnp.take_along_axis(near, jnp.argmin(cost(near), 0)[None], 0)[0], step * 0.7

        return jax.lax.fori_loop(0, 40, halve, (best, jnp.abs(aim - x) / 32))[0]

    return project


def only(graph, name):
    (node,) = [node for node in graph.nodes if node.name == name]
    return node


def project_on(graph, node, values, seed=0):
    """One projection onto a node from random deviations: inputs by variable, and the output."""
    rng = np.random.default_rng(seed)
    program = graph.program

    def draw(variable):
        return jnp.asarray(rng.normal(size=program.shape(variable)), jnp.float32)

    slots = [graph.slots[i].variable for i in node.slots]
    target, target_weight = draw(node.output), jnp.abs(draw(node.output)) + 0.2
    states = {variable: draw(variable) for variable in sorted(slots)}
    weights = {variable: 0.5 + 0.3 * i for i, variable in enumerate(sorted(slots))}
    reference = Reference(
        inputs=tuple(values[v] for v in slots),
        knowns=tuple(values[a] for a in node.knowns),
        output=values[node.output],
    )
    moved, output = node.rule.project(
        reference,
        tuple(states[v] for v in slots),
        tuple(weights[v] for v in slots),
        target,
        target_weight,
    )
    return dict(zip(slots, moved, strict=True)), output


def traced(fn, params):
    out = jax.eval_shape(fn, params)
    program, leaves, consts, _ = trace(
        lambda p: pjax.squared_error(fn(p), jnp.zeros(out.shape)), params
    )
    return build_graph(program), program.evaluate(leaves, consts)


# --- Primitives ----------------------------------------------------------------------------------


def test_without_registration_there_is_no_rule():
    with pytest.raises(TraceError, match="no projection for the operation `reduce_precision`"):
        traced(lambda x: jax.lax.reduce_precision(x, 8, 7), normal(0, 6))


def test_a_rule_of_the_library_goes_before_a_numeric_one():
    """One builder in the table is all that it takes."""

    @rules._builder(jax.lax.tanh_p)
    def _own(program: Any, equation: Any) -> NodeSpec:
        return NodeSpec(rules.Quantizer(2, name="own"), equation.inputs)

    graph, _ = traced(lambda p: jnp.tanh(p["x"]) + p["x"], {"x": normal(0, 4, 3)})
    assert only(graph, "own").rule.exactness == "exact"


def test_a_primitive():
    register_tanh()
    graph, values = traced(lambda p: jax.vmap(jnp.tanh)(p["x"]), {"x": normal(0, 4, 3)})
    node = only(graph, "tanh")
    assert node.rule is not None
    assert node.rule.exactness == "inexact"
    moves, output = project_on(graph, node, values)
    ((variable, moved),) = moves.items()
    np.testing.assert_allclose(
        jnp.tanh(values[variable] + moved), values[node.output] + output, atol=1e-6
    )
    # Better than every point of a fine grid.
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)  # noqa: E731
    target, weight = values[node.output] + draw(), jnp.abs(draw()) + 0.2
    start = values[variable] + draw()

    def cost(u):
        return 0.5 * (u - start) ** 2 + weight * (jnp.tanh(u) - target) ** 2

    grid = jnp.linspace(-6, 6, 4001)[:, None, None]
    assert jnp.all(cost(values[variable] + moved) <= jnp.min(cost(grid), 0) + 1e-4)


def test_a_network_with_a_registered_primitive_learns():
    register_tanh()
    x, w = normal(0, 16, 3), normal(1, 3, 4)
    y = jnp.tanh(x @ w) @ normal(2, 4, 2)
    params = {"w": normal(3, 3, 4), "v": normal(4, 4, 2)}

    def loss(p):
        return pjax.squared_error(jnp.tanh(x @ p["w"]) @ p["v"], y)

    optimizer = pjax.optim.CyclicProjections(steps_per_update=5)
    moved = params
    for _ in range(10):
        moved, _ = optimizer.update(loss, moved)
    assert jnp.mean(loss(moved)) < 0.5 * jnp.mean(loss(params))


def test_a_user_s_rule_goes_before_the_library_s():
    def fn(p):
        return jnp.sign(p["x"] + p["y"]) * 2

    params = {"x": normal(0, 2, 3), "y": normal(1, 2, 3)}
    before, _ = traced(fn, params)
    assert [n.name for n in before.nodes if n.kind == "operation"] == ["sum_mul"]

    @pjax.register_projection(jax.lax.sign_p, exactness="relaxed")
    def project(inputs, target, input_weights, target_weight):
        return jnp.where(target_weight > 0, target, inputs[0])

    after, _ = traced(fn, params)
    assert [n.name for n in after.nodes if n.kind == "operation"] == ["add", "sign", "mul"]
    assert only(after, "sign").rule.exactness == "relaxed"  # pyright: ignore
    # Also for what else is wiring or part of a sum.
    for primitive, change in (
        (jax.lax.rev_p, lambda x: jnp.flip(x)),
        (jax.lax.neg_p, lambda x: 1 - (-x)),
        (jax.lax.reduce_sum_p, lambda x: x.sum(0)),
    ):
        pjax.register_projection(primitive)(project)
        graph, _ = traced(lambda p, f=change: jax.nn.relu(f(p["x"])), {"x": params["x"]})
        assert only(graph, primitive.name).rule.projection is project  # pyright: ignore


def test_registering_again_replaces_the_rule_and_what_was_compiled_with_it():
    x = normal(0, 2, 3)

    def moved_by(shift):
        @pjax.register_projection(jax.lax.tanh_p)
        def project(inputs, target, input_weights, target_weight, **params):
            return inputs[0] + shift

        optimizer = pjax.optim.AlternatingProjections(steps_per_update=1)
        params, _ = optimizer.update(lambda p: pjax.squared_error(jnp.tanh(p), 0 * x), x)
        return float(jnp.mean(params - x))

    assert moved_by(0.25) == pytest.approx(0.25, rel=1e-4)
    assert moved_by(0.5) == pytest.approx(0.5, rel=1e-4)


# --- Functions -----------------------------------------------------------------------------------


def scaled():
    """`c·x` of one row, as users would write it; the library knows it as well."""

    @pjax.register_projection(lambda x, c: c * x, name="scaled")
    def scale(inputs, target, input_weights, target_weight):
        """The nearest point of a line."""
        (x, c), (rho, infinite) = inputs, input_weights
        assert x.ndim == c.ndim == target.ndim == 1  # the batch axes are mapped
        assert rho.shape == x.shape
        assert target_weight.shape == target.shape
        force = target_weight * (target - c * x) / (1 + target_weight * c**2 / rho)
        return x + c * force / rho + 0 / infinite, c + force * x / infinite

    return scale


BATCHES = {
    "alone": lambda f, p, c: f(p["x"][0, 0], c[0]),
    "mapped": lambda f, p, c: jax.vmap(f)(p["x"][0], c),
    "mapped, one factor": lambda f, p, c: jax.vmap(f, (0, None))(p["x"][0], c[1]),
    "mapped columns": lambda f, p, c: jax.vmap(f, (1, 0))(p["x"][0].T, c),
    "nested": lambda f, p, c: jax.vmap(jax.vmap(f), (0, None))(p["x"], c),
    "in jit": lambda f, p, c: jax.jit(jax.vmap(jax.jit(f)))(p["x"][0], c),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_function_of_a_parameter_and_data(name):
    """The same projection as the library's own `c·x`."""
    use = BATCHES[name]
    scale = scaled()
    params, c = {"x": normal(0, 2, 4, 3)}, normal(1, 4, 3)
    graph, values = traced(lambda p: use(scale, p, c), params)
    node = only(graph, "scaled")
    assert isinstance(node.rule, Registered)
    assert (len(node.slots), len(node.knowns)) == (1, 1)
    moves, output = project_on(graph, node, values)
    own, own_values = traced(lambda p: use(lambda x, c: c * x, p, c), params)
    expected, expected_output = project_on(own, only(own, "mul"), own_values)
    (a,), (b,) = moves.values(), expected.values()
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(output, expected_output, rtol=2e-5, atol=2e-6)
    assert float(jnp.max(jnp.abs(output))) > 0.01


def test_a_function_of_two_parameters():
    @pjax.register_projection(lambda a, b: a + b)
    def plus(inputs, target, input_weights, target_weight):
        (a, b), (ra, rb) = inputs, input_weights
        force = target_weight * (target - a - b) / (1 + target_weight * (1 / ra + 1 / rb))
        return [a + force / ra, b + force / rb]

    params = {"a": normal(0, 4, 3), "b": normal(1, 4, 3)}
    graph, values = traced(lambda p: jax.vmap(plus)(p["a"], p["b"]), params)
    own, own_values = traced(lambda p: p["a"] + p["b"], params)
    found = project_on(graph, only(graph, "plus"), values)
    expected = project_on(own, only(own, "add"), own_values)
    for a, b in zip(*map(jax.tree_util.tree_leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_function_of_data_first_and_of_data_alone():
    scale = scaled()
    c, x = normal(0, 4, 3), normal(1, 4, 3)
    # The parameter is the factor here: the other operand is data.
    graph, _ = traced(lambda p: jax.vmap(scale)(x, p), c)
    node = only(graph, "scaled")
    assert isinstance(node.rule, Registered)
    assert node.rule.known == (True, False)
    # Of data alone it is data.
    graph, _ = traced(lambda p: p + jax.vmap(scale)(x, c), c)
    assert [n.name for n in graph.nodes if n.kind == "operation"] == ["add"]


def test_a_registered_function_is_an_ordinary_function():
    scale = scaled()
    x, c = normal(0, 3), normal(1, 3)
    np.testing.assert_allclose(scale(x, c), c * x)
    np.testing.assert_allclose(jax.jit(scale)(x, c), c * x)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda x: jnp.sum(scale(x, c))))(x), c)
    np.testing.assert_allclose(jax.vmap(scale)(x[None], c[None]), (c * x)[None])
    assert scale.__name__ == "scale"
    assert scale.__doc__ == "The nearest point of a line."
    # Its signature is not that of the projection.
    assert [p.kind for p in inspect.signature(scale).parameters.values()] == [
        inspect.Parameter.VAR_POSITIONAL
    ]


def test_what_a_projection_does_not_move_keeps_its_deviation_exactly():
    """Deviations far below the precision of the values survive a projection in full values."""
    rule = Registered(jnp.tanh, lambda i, t, w, tw: i, (False,), (), {})
    x = normal(0, 5)
    tiny = 1e-12 * normal(1, 5)
    (moved,), output = rule.project(
        Reference((x,), (), jnp.tanh(x)), (tiny,), (1.0,), jnp.zeros(5), jnp.ones(5)
    )
    np.testing.assert_array_equal(moved, tiny)
    np.testing.assert_array_equal(output, 0)


def test_equal_uses_share_one_specification():
    scale = scaled()
    params, c = {"x": normal(0, 4, 3)}, normal(1, 4, 3)

    def fn(p):
        h = jax.vmap(scale)(p["x"], c)
        return jax.vmap(scale)(h, c)

    graph, _ = traced(fn, params)
    first, second = (n.rule for n in graph.nodes if n.name == "scaled")
    assert first is second


def test_parameters_that_are_not_hashable():
    def rule(values):
        params: dict[str, Any] = {"values": values}
        return Registered(jnp.tanh, jnp.tanh, (False,), canonical(params), params)

    assert rule([1, 2]) == rule([1, 2])
    assert hash(rule([1, 2])) == hash(rule([1, 2]))
    assert rule([1, 2]) != rule([1, 3])


# --- Errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: jnp.sum(x),
        lambda x: x[:, None],
        lambda x: (x, x),
        lambda x: [],
        lambda x: 0.0,
    ],
)
def test_a_projection_that_returns_other_shapes(wrong, batched):
    @pjax.register_projection(lambda x: 2 * x)
    def double(inputs, target, input_weights, target_weight):
        return wrong(inputs[0])

    x = normal(0, 4, 3)
    graph, values = traced(jax.vmap(double) if batched else lambda p: double(p[0]), x)
    with pytest.raises(
        ValueError, match=r"registered for `double` must return .*shapes \[\(3,\)\]; it"
    ):
        project_on(graph, only(graph, "double"), values)


def test_what_cannot_be_registered():
    from jax.extend.core.primitives import scan_p

    with pytest.raises(TypeError, match="`scan` has several outputs; a node has one"):
        pjax.register_projection(scan_p)
    with pytest.raises(TypeError, match="must be a JAX primitive .* or a function, got str"):
        pjax.register_projection("tanh")
    with pytest.raises(ValueError, match='`exactness` must be "exact", "inexact" or "relaxed"'):
        pjax.register_projection(jax.lax.tanh_p, exactness="perfect")  # pyright: ignore
    with pytest.raises(TypeError, match="`pjax_cross_entropy` is a loss: it has a proximal"):
        pjax.register_projection(primitives.cross_entropy_p)
