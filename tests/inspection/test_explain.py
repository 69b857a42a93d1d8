"""`pjax.explain`: what it says of a function is what training does with it."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad

import pjax
from pjax.graph import build_graph
from pjax.inspection import label
from pjax.lab import cli
from pjax.trace import trace

ROWS = 8
X = np.linspace(-1, 1, ROWS * 3, dtype=np.float32).reshape(ROWS, 3)
Y = jnp.arange(ROWS) % 2


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(math.prod(shape)), shape)


def params_of(depth: int = 4) -> dict:
    return {
        "in": normal(3, 5),
        "blocks": [{"w": normal(5, 5), "b": jnp.zeros(5)} for _ in range(depth)],
        "scale": jnp.ones(5),
        "table": normal(2, 5),
        "out": normal(5, 2),
    }


def network(p, x, labels):
    h = x @ p["in"] + p["table"][labels]
    for block in p["blocks"]:
        h = jax.nn.relu(h @ block["w"] + block["b"])
    return jnp.tanh(h * p["scale"]) @ p["out"]


def loss_fn(p, x, labels):
    targets = jax.nn.one_hot(labels, 2)
    return jnp.mean(pjax.cross_entropy(network(p, x, labels), targets))


@pytest.mark.parametrize("splitting", ["layer", "neuron"])
def test_lines_are_the_nodes_of_the_graph(splitting):
    params = params_of()
    found = pjax.explain(loss_fn, params, X, Y, splitting=splitting)
    program, *_ = trace(lambda p: loss_fn(p, X, Y), params)
    graph = build_graph(program, splitting)
    indices = [index for line in found.nodes for index in line.nodes]
    assert sorted(indices) == [n.index for n in graph.nodes if n.kind != "parameter"]
    for line in found.nodes:
        for index in line.nodes:
            node = graph.nodes[index]
            assert (line.operation, line.source) == (node.name, node.source)
            assert (line.rule, line.exactness) == (type(node.rule).__name__, node.rule.exactness)  # pyright: ignore
            assert line.inputs == tuple(graph.slots[i].shape for i in node.slots)
    assert sum(line.bytes for line in found.nodes) == pytest.approx(1)
    assert sum(line.work for line in found.nodes) == pytest.approx(1)
    assert not found.warnings


def test_equal_layers_are_one_line_with_their_parameters():
    found = pjax.explain(loss_fn, params_of(12), X, Y)
    (layer,) = [line for line in found.nodes if len(line.parameters) > 10]
    assert len(layer.nodes) == 12
    assert len(layer.parameters) == 24
    text = str(found)
    for part in ("layer ×12", "blocks.0…11.w", "blocks.0…11.b", "test_explain.py:", "LayerSum"):
        assert part in text
    assert len(text.splitlines()) < 40
    assert repr(found) == text
    # A layer does twice the work of a matrix of half its size.
    work = {line.operation: line.work for line in found.nodes}
    assert max(work, key=work.get) == "layer"  # pyright: ignore


def test_steps_of_a_loop_are_one_line():
    def loop(p, x):
        h, _ = jax.lax.scan(lambda h, row: (jnp.tanh(h @ p["w"] + row), None), jnp.zeros(5), x)
        return jnp.sum((h - 1) ** 2)

    found = pjax.explain(loop, {"w": normal(5, 5)}, normal(7, 5))
    # The first step begins at zero: its product is there as well.
    assert [len(n.nodes) for n in found.nodes if n.operation == "tanh"] == [7]
    assert found.parameters[0].readers == 7 == found.parameters[0].readers


def test_how_each_parameter_is_moved():
    def fn(p, x, labels):
        h = jnp.sign(p["signs"]).T @ network(p, x, labels).T
        return jnp.mean((h.T - 1) ** 2) + 0.1 * jnp.sum(p["out"] ** 2)

    params = {**params_of(1), "signs": normal(2, 4), "e": jnp.zeros((0, 2)), "n": jnp.arange(3)}
    found = pjax.explain(fn, params, X, Y)
    lines = {line.name: line for line in found.parameters}
    assert {label(name): line.moves for name, line in lines.items()} == {
        "in": ("product",),
        "blocks.0.w": ("product",),
        "blocks.0.b": ("linear",),
        "scale": ("linear",),
        "table": ("entries",),
        "out": ("product", "entries"),
        "signs": ("threshold",),
        "e": (),
        "n": (),
    }
    assert lines["['in']"].matrix == (3, 5)
    assert lines["['n']"].reason == "no floating-point array, so data"
    assert lines["['e']"].reason == "no entries"
    # What it says moves is what moves.
    optimizer = pjax.optim.Projection()
    new, *_ = optimizer.update(fn, params, optimizer.init(fn, params, X, Y), X, Y)
    for name in params:
        same = jax.tree.map(jnp.array_equal, params[name], new[name])
        assert all(jax.tree.leaves(same)) == (name in ("e", "n")), name


def test_parameters_without_a_move_are_named():
    def fn(p):
        h = X @ p["w"] * jax.lax.stop_gradient(p["still"])
        return jnp.mean((h[:, jnp.argmax(p["gate"])] - 1) ** 2)

    params = {"w": normal(3, 4), "still": jnp.ones(()), "gate": jnp.ones(3), "un": jnp.ones(2)}
    found = pjax.explain(fn, params)
    assert [line.name for line in found.parameters if not line.moves] == [
        "['gate']", "['still']", "['un']"
    ]  # fmt: skip
    assert found.warnings == (
        "No move for gate, still: it is only compared, an index, or behind a stop_gradient.",
        "No move for un: the loss does not use it.",
    )


def test_data_have_the_names_of_the_arguments():
    captured = normal(4, 2)

    def fn(p, x, batch, *rest, scale=None):
        y = batch["y"] + rest[0] + captured[:, 0].sum() + scale
        return jnp.mean((x @ p - y[:, None]) ** 2)

    found = pjax.explain(
        fn, normal(3, 1), X, {"y": Y.astype(float)}, jnp.ones(ROWS), scale=jnp.ones(())
    )
    assert {(line.name, line.shape) for line in found.data} == {
        ("x", (ROWS, 3)),
        ("batch['y']", (ROWS,)),
        ("args[2]", (ROWS,)),
        ("scale", ()),
        ("", (4, 2)),
    }


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("known", [True, False])
def test_a_loss_that_counts_nothing_is_named(weight, known):
    counts = weight if known else jnp.full(ROWS, 0.0).at[2].set(weight)

    def fn(p, x, labels):
        rows = jax.nn.logsumexp(x @ p["w"], -1)  # its maximum is data that the network makes
        return loss_fn(p, x, labels) + jnp.sum(counts * rows**2)

    found = pjax.explain(fn, {**params_of(1), "w": normal(3, 4)}, X, Y)
    silent = [text for text in found.warnings if "counts 0" in text]
    assert len(silent) == (weight == 0)
    assert all("test_explain.py" in text for text in silent)


def test_an_operation_without_a_rule_is_named():
    custom = Primitive("without_rule")
    custom.def_impl(jnp.tanh)
    custom.def_abstract_eval(lambda x: ShapedArray(x.shape, x.dtype))
    ad.defjvp(custom, lambda tangent, x: tangent * (1 - jnp.tanh(x) ** 2))
    found = pjax.explain(lambda p: jnp.mean((custom.bind(X @ p) - 1) ** 2), normal(3, 2))
    assert [line.exactness for line in found.nodes][1] == "fallback"
    assert "`without_rule`" in found.warnings[0]
    assert 'fallback="gauss-newton"' in found.warnings[0]
    with pytest.raises(pjax.TraceError, match="no projection for the operation `without_rule`"):
        pjax.displacement(lambda p: jnp.mean((custom.bind(X @ p) - 1) ** 2))(normal(3, 2))


def test_custom_rules_are_named_and_nothing_is_warned_of():
    @jax.custom_vjp
    def straight(v):
        return jnp.round(v)

    straight.defvjp(lambda v: (straight(v), None), lambda _, g: (g,))

    def fn(p):
        return jnp.mean((straight(X @ p["w"]) - 1) ** 2)

    params = {"w": normal(3, 2), "un": jnp.ones(2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pjax.explain(fn, params)
    assert any("`straight`" in text for text in found.warnings)
    with (
        pytest.warns(pjax.CustomRuleWarning, match="straight"),
        pytest.warns(pjax.UnusedParameterWarning, match="un"),
    ):
        pjax.displacement(fn)(params)


def test_nothing_is_solved(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a problem was made")

    monkeypatch.setattr(pjax.Problem, "__init__", refuse)
    pjax.explain(loss_fn, params_of(), X, Y)


def test_html_is_escaped():
    found = pjax.explain(lambda p: jnp.sum((p["a<b>"] - 1) ** 2), {"a<b>": jnp.ones(2)})
    page = found._repr_html_()
    assert "a&lt;b&gt;" in page
    assert "<b>b" not in page
    assert page.count("<table>") == 2


FILE = """
import jax.numpy as jnp
import beside

def problem():
    return beside.loss, {"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), jnp.ones((4, 2))

def wrong():
    return jnp.ones(3)
"""
BESIDE = """
import jax.numpy as jnp
import pjax

def loss(params, x, y):
    return jnp.mean(pjax.squared_error(x @ params["w"], y))
"""


def test_the_command_prints_it(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "of_explain.py").write_text(FILE)
    (tmp_path / "beside.py").write_text(BESIDE)
    assert cli.main(["explain", f"{tmp_path / 'of_explain.py'}:problem"]) == 0
    printed = capsys.readouterr().out
    for word in ("squared_error", "beside.py:6", "product 3×2", "LayerSum"):
        assert word in printed
    for target, message in (
        (f"{tmp_path / 'of_explain.py'}:wrong", "must return a tuple"),
        (f"{tmp_path / 'of_explain.py'}:other", "there is no function other"),
        (f"{tmp_path / 'none.py'}:problem", "there is no such file"),
        (f"{tmp_path / 'of_explain.py'}", "FILE.py:FUNCTION"),
    ):
        assert cli.main(["explain", target]) == 1
        assert message in capsys.readouterr().err
